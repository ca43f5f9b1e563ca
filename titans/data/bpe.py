"""A small byte-level BPE whose numbers and UUIDs are regular, and an encoder that goes word by word.

What precedes a word never changes its tokens: pre-tokens end before spaces and at line breaks. Sentences can
therefore be tokenized once, each with the space before it, and be put together as tokens.
"""

import re
from collections.abc import Iterable
from itertools import chain

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from titans.data.tokenizer import TextEncoder
from titans.errors import UserError

_SPECIAL = {"eos_token": "<eos>", "pad_token": "<pad>"}
# In a run of ASCII letters, digits and hyphens that holds a digit ("1234567", "4abc-beef-01", "3rd") every
# character is a token of its own. Merges would cut each UUID in a way of its own, "beef" in one token and
# "4abc" in two, and a model would have to spell tokens as well as to recall them. A character is in such a
# run if a digit comes after it, or before it: regular expressions look behind only at a fixed distance, hence
# one branch for each distance; the last group of a UUID can end in 12 letters, with a hyphen before them.
_AFTER_A_DIGIT = "|".join(rf"(?<=[0-9][A-Za-z-]{{{gap}}})[A-Za-z-]" for gap in range(18))
_SINGLE = rf"[0-9]|[A-Za-z-](?=[A-Za-z-]*[0-9])|{_AFTER_A_DIGIT}"
_WORDS = r" ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s|\p{N}"
_PIECES = re.compile(r"\n| ?[^ \n]+| ")
_SINGLE_WORD = re.compile(r" ?(?=[a-z-]*[0-9])[0-9a-z-]{1,36}\.?")
_LETTERS_BEHIND = re.compile(r"[a-z-]{18}\.?$")


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of ``vocab_size`` ids, <eos> and <pad> among them, with the merges of ``texts``.

    Any text becomes tokens and comes back unchanged. "<eos>" written in a text is text.

    Raises:
        UserError: fewer ids than the 256 bytes and the two special ones, or too little text for so many.
    """
    least = 256 + len(_SPECIAL)
    if vocab_size < least:
        raise UserError(f"vocab_size: expected at least {least} (bytes and special tokens), got {vocab_size}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SINGLE), "isolated"),
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if (trained := backend.get_vocab_size()) < vocab_size:
        raise UserError(f"vocab_size: the texts are enough for {trained} ids only, got {vocab_size}")
    return wrap(backend.to_str())


def wrap(tokenizer_json: str) -> PreTrainedTokenizerFast:
    """The transformers tokenizer of a ``tokenizer.json``'s content that `train_bpe` made."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer_json),
        padding_side="left",
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        **_SPECIAL,
    )


class WordEncoder:
    """Text -> ids, as the tokenizer of `train_bpe` gives them, word by word from a table that fills.

    Faster than the tokenizer for texts of known words, and safe in forked processes. Numbers
    and UUIDs (which never repeat) are looked up character by character.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._encode = TextEncoder(tokenizer)
        self._words: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        return list(chain.from_iterable(map(self._word, _PIECES.findall(text))))

    def _word(self, word: str) -> list[int]:
        ids = self._words.get(word)
        if ids is None:
            if _is_single(word):
                return [token for character in word for token in self._known(character)]
            ids = self._known(word)
        return ids

    def _known(self, word: str) -> list[int]:
        ids = self._words.get(word)
        if ids is None:
            ids = self._words[word] = self._encode([word])[0].tolist()
        return ids


def _is_single(word: str) -> bool:
    """Whether every character of a word is a token: numbers and UUIDs, perhaps with a full stop."""
    return bool(_SINGLE_WORD.fullmatch(word)) and not _LETTERS_BEHIND.search(word)
