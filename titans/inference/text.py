"""Where a text of any length is cut, so that it is tokenized in bounded memory and always in the same way."""

from collections.abc import Iterator

UNIT = 1 << 16


def cut(text: str, unit: int = UNIT) -> Iterator[str]:
    """`text` in parts of at most `unit` characters; together they are the text.

    A part ends after the last line's end within reach, better one between two characters that are no white
    space; else before the last space; else where it is full. Most tokenizers never join characters across a
    single line's end, and put a space into the token of the next word. Bytes are not changed by any cut.
    """
    start = 0
    while len(text) - start > unit:
        last = start + unit
        # Before the space; not at the very start, where the part would be empty.
        end = _line_end(text, start, last) or text.rfind(" ", start + 1, last)
        if end <= start:
            end = last
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _line_end(text: str, start: int, last: int) -> int:
    """The place behind the line's end to cut at, or 0."""
    any_end = end = text.rfind("\n", start, last) + 1
    while end > start + 1:
        if not text[end - 2].isspace() and not text[end].isspace():
            return end
        end = text.rfind("\n", start, end - 1) + 1
    return any_end
