"""The text of every token, in characters that can be shown."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

# A character's UTF-8 bytes may be spread over as many tokens.
_LONGEST = 4


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text. A character of several tokens stands at the first, the others are "".

    Joined, they are the decoded text.
    """

    def decode(first: int, last: int) -> str:
        return str(
            tokenizer.decode(ids[first:last], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    texts: list[str] = []
    before = 0  # decoded with its predecessor: SentencePiece drops the space of a text's first token
    while len(texts) < len(ids):
        first = len(texts)
        known = decode(before, first) if before < first else ""
        for last in range(first + 1, min(first + _LONGEST, len(ids)) + 1):
            text = decode(before, last)
            if not text.endswith("\ufffd"):
                break
        else:
            last = first + 1  # bytes that are no UTF-8: each its own U+FFFD
            text = decode(before, last)
        texts += [text[len(known) :], *[""] * (last - first - 1)]
        before = first
    return texts


def visible(text: str) -> str:
    """The text with every character that is not drawn replaced by a sign for it; line ends and tabs stay.

    Control characters become Unicode's pictures of them; those that reorder, join or hide text, and code
    points that mean nothing to a reader, their number.
    """
    return "".join(_sign(character) for character in text)


def _sign(character: str) -> str:
    if character in "\n\t":
        return character
    code, category = ord(character), unicodedata.category(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if category in ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"):
        return f"\u27e8U+{code:04X}\u27e9"
    return character
