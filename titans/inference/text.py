"""Where a text of any length is cut, so that it is tokenized in bounded memory and always in the same way."""

from collections.abc import Iterator

UNIT = 1 << 16


def cut(text: str, unit: int = UNIT) -> Iterator[str]:
    """`text` in parts of at most `unit` characters; together they are the text.

    A part ends after the last line's end within reach, else before the last space, else wherever it is full.
    Most tokenizers never join characters across the first two; bytes are not changed by any cut.
    """
    start = 0
    while len(text) - start > unit:
        end = text.rfind("\n", start, start + unit) + 1
        if not end:
            # Before the space: byte-level tokenizers and SentencePiece make it part of the next word.
            end = text.rfind(" ", start + 1, start + unit)
        if end <= start:
            end = start + unit
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]
