"""A long text of real sentences, as tokens, and a fact to hide in it: the needle task at any length.

The form is that of `titans.evaluation.needle`: instruction, sentences with single spaces between them, the
needle as one of them, the question.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from titans.data.sentences import LONGEST_SENTENCE
from titans.data.tokenizer import TextEncoder
from titans.errors import UserError
from titans.evaluation.haystack import split_sentences
from titans.evaluation.needle import TASKS, Draws, frame, needle_sentence

TASK = TASKS["niah_single_2"]  # a number, hidden in real text
INSTRUCTION = frame(TASK, ["the key"])[0]  # says how many are asked for, not which


@dataclass(frozen=True, eq=False)
class LongText:
    """Sentences in the order in which they are read, and the tokens that they make.

    start: of the instruction. ids: int64 [T], of all sentences. bounds: the tokens before each sentence and,
    one longer, after the last; nothing is ever hidden before the first.
    """

    sentences: list[str]
    start: Tensor
    ids: Tensor
    bounds: list[int]
    encode: TextEncoder = field(repr=False)

    @classmethod
    def of(
        cls, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, tokens: int, *, seed: int
    ) -> LongText:
        """At least ``tokens`` tokens of ``texts``, and no more of them read than that takes.

        The first time the paragraphs stand in their order, beginning with one that the seed draws. If that
        is too little, they come again, each time in another order.

        Raises:
            UserError: there is no sentence in the texts.
        """
        encode = TextEncoder(tokenizer)
        paragraphs: list[list[str]] = []
        lengths: dict[str, int] = {}
        found = 0
        for text in texts:
            new = list(_paragraphs(text))
            of_new = [sentence for paragraph in new for sentence in paragraph]
            for sentence, ids in zip(of_new, encode([" " + each for each in of_new]), strict=True):
                lengths[sentence] = len(ids)
                found += len(ids)
            paragraphs += new
            if found >= tokens:
                break
        if not found:
            raise UserError(f"expected at least one sentence of at most {LONGEST_SENTENCE} characters")
        chosen: list[str] = []
        left = tokens + 1  # the first sentence may take a token less, after a line break
        for sentence in _in_rounds(paragraphs, random.Random(f"order/{seed}")):
            chosen.append(sentence)
            left -= lengths[sentence]
            if left <= 0:
                break
        rows = encode(["\n" + chosen[0], *(" " + sentence for sentence in chosen[1:])])
        return cls(
            sentences=chosen,
            start=torch.from_numpy(encode([INSTRUCTION])[0].astype(np.int64)),
            ids=torch.from_numpy(np.concatenate(rows, dtype=np.int64, casting="unsafe")),
            bounds=[0, *accumulate(map(len, rows))],
            encode=encode,
        )

    def hide(self, rng: random.Random, length: int, depth: float) -> Hidden:
        """A fact that the text has not, for a prompt of at least ``length`` tokens.

        Args:
            depth: share of the sentences' tokens before the fact, 0 to 1, kept to within a sentence.
        """
        draws = Draws(rng, TASK)
        key, value = draws.key(), draws.value()
        while any(key in sentence or value in sentence for sentence in self.sentences):
            key, value = draws.key(), draws.value()
        sentence, question = needle_sentence(TASK, key, value), frame(TASK, [key])[1]
        needle, asked = (
            torch.from_numpy(ids.astype(np.int64)) for ids in self.encode([" " + sentence, question])
        )
        wanted = length - len(self.start) - len(needle) - len(asked)
        last = max(1, min(bisect_left(self.bounds, wanted), len(self.bounds) - 1))
        end = self.bounds[last]
        place = min(range(1, last + 1), key=lambda place: abs(self.bounds[place] - depth * end))
        return Hidden(
            key=key,
            value=value,
            sentence=sentence,
            question=question,
            needle_ids=needle,
            question_ids=asked,
            place=place,
            last=last,
            position=self.bounds[place],
            end=end,
            tokens=len(self.start) + end + len(needle) + len(asked),
        )

    def text(self, hidden: Hidden, first: int = 0, last: int | None = None) -> str:
        """Sentences ``first`` to ``last`` - 1 (None: up to the end) of what is read, the fact among them.

        With neither, the whole prompt but the question.
        """
        stop = hidden.last if last is None else min(last, hidden.last)
        before, after = self.sentences[first : hidden.place], self.sentences[hidden.place : stop]
        joined = " ".join([*before, hidden.sentence, *after])
        return joined if first else f"{INSTRUCTION}\n{joined}"

    def prompt_ids(self, hidden: Hidden) -> Tensor:
        """All that is read before the answer, int64 [hidden.tokens]."""
        before, after = self.ids[: hidden.position], self.ids[hidden.position : hidden.end]
        return torch.cat([self.start, before, hidden.needle_ids, after, hidden.question_ids])

    def words(self, hidden: Hidden) -> int:
        """Of the sentences that are read, the fact left out."""
        return sum(len(sentence.split()) for sentence in self.sentences[: hidden.last])


@dataclass(frozen=True, kw_only=True, eq=False)
class Hidden:
    """A fact in a text, and the question for it.

    position, end: tokens of the text before the fact, and of the text in all. place, last: the same in
    sentences. tokens: of the whole prompt.
    """

    key: str
    value: str
    sentence: str
    question: str
    needle_ids: Tensor
    question_ids: Tensor
    place: int
    last: int
    position: int
    end: int
    tokens: int

    @property
    def depth(self) -> float:
        return self.position / self.end


def _paragraphs(text: str) -> Iterator[list[str]]:
    for paragraph in text.split("\n\n"):
        sentences = [each for each in split_sentences([paragraph]) if len(each) <= LONGEST_SENTENCE]
        if sentences:
            yield sentences


def _in_rounds(paragraphs: list[list[str]], rng: random.Random) -> Iterator[str]:
    first = rng.randrange(len(paragraphs))
    order = paragraphs[first:] + paragraphs[:first]
    while True:
        for paragraph in order:
            yield from paragraph
        order = rng.sample(paragraphs, len(paragraphs))
