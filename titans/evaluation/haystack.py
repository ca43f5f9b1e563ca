"""Long texts to hide things in: sentences of the caller's texts, counted in tokens one by one."""

import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from transformers import PreTrainedTokenizerBase

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"')\]\u2019\u201d])\s+")

TokenCounter = Callable[[str], int]


def split_sentences(texts: Iterable[str]) -> list[str]:
    """Sentences of all ``texts`` with single spaces; a text without a full stop is one sentence."""
    return [
        sentence for text in texts for sentence in _SENTENCE_END.split(" ".join(text.split())) if sentence
    ]


class LengthCounter:
    """Tokens that a text adds after the end of a sentence.

    Counted alone, a text may have more: SentencePiece puts a space in front of every text it is given, one
    token in 25 if added to each line of noise.
    """

    def __init__(self, count_tokens: TokenCounter | PreTrainedTokenizerBase):
        if isinstance(count_tokens, PreTrainedTokenizerBase):
            tokenizer = count_tokens
            self.count: TokenCounter = lambda text: len(tokenizer.encode(text, add_special_tokens=False))
        else:
            self.count = count_tokens
        self._stop = self.count(".")

    def after_stop(self, text: str) -> int:
        tokens = self.count("." + text) - self._stop
        if tokens < 1:  # a haystack of such texts would never fill the context
            raise ValueError(f"count_tokens: expected at least 1 token for {text!r}, got {tokens}")
        return tokens


class SentenceRing:
    """Sentences in their order, from the first again after the last, each counted when first read."""

    def __init__(self, sentences: Sequence[str], counter: LengthCounter):
        self._sentences, self._counter = sentences, counter
        self._tokens: list[int | None] = [None] * len(sentences)

    def read(self, rng: random.Random) -> Iterator[tuple[str, int]]:
        """From a sentence drawn at random on, without end: each with its tokens and those of a space."""
        first = rng.randrange(len(self._sentences))
        for i in itertools.chain(
            range(first, len(self._sentences)), itertools.cycle(range(len(self._sentences)))
        ):
            tokens = self._tokens[i]
            if tokens is None:
                tokens = self._tokens[i] = self._counter.after_stop(" " + self._sentences[i])
            yield self._sentences[i], tokens


def fill(units: Iterable[tuple[str, int]], budget: int) -> tuple[list[str], list[int]]:
    """Units, given with their tokens, until the next would pass ``budget`` tokens.

    Returns:
        The units and, one longer, the tokens before each of them and after the last.
    """
    pieces: list[str] = []
    ends = [0]
    for piece, tokens in units:
        if ends[-1] + tokens > budget:
            break
        pieces.append(piece)
        ends.append(ends[-1] + tokens)
    return pieces, ends
