"""Reading text files, plain or compressed, block by block, with errors that say where the file is wrong."""

import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from titans.errors import UserError

BLOCK_BYTES = 1 << 20
COMPRESSED_SUFFIXES = (".gz", ".xz")


class ByteStream:
    """The uncompressed bytes of a file or of standard input.

    Args:
        name: what errors call it.
        open_raw: opens the bytes as they lie on disk.
        suffix: ``.gz`` or ``.xz`` for an archive, anything else for plain bytes.
        on_read: called with the number of bytes taken from disk since the last call (for progress).
    """

    def __init__(
        self, name: str, open_raw: Callable[[], BinaryIO], suffix: str, on_read: Callable[[int], None]
    ):
        self.name = name
        self._open_raw = open_raw
        self._suffix = suffix
        self._on_read = on_read

    def blocks(self, size: int = BLOCK_BYTES) -> Iterator[bytes]:
        """Blocks of ``size`` bytes, the last one shorter.

        Raises:
            UserError: the archive is damaged, cut short or no archive at all.
        """
        taken = 0
        with self._open_raw() as raw:
            counted = cast(BinaryIO, _Counting(raw, self._on_read))
            stream = _uncompressed(counted, self._suffix)
            while True:
                try:
                    block = stream.read(size)
                except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
                    if stream is counted:
                        raise
                    # Both libraries say "ended before the end-of-stream marker" for a file cut short.
                    raise UserError(
                        f"{self.name}: broken {self._suffix} archive, {taken} bytes could be read: {error}"
                    ) from error
                if not block:
                    return
                taken += len(block)
                yield block

    def lines(self) -> Iterator[bytes]:
        """Lines without their ends. A line lies in memory whole."""
        parts: list[
            bytes
        ] = []  # of the line that goes on in the next block: joined once, so linear in its length
        for block in self.blocks():
            first, *others = block.split(b"\n")
            parts.append(first)
            if others:
                yield b"".join(parts)
                yield from others[:-1]
                parts = [others[-1]]
        if last := b"".join(parts):
            yield last

    def text(self) -> Iterator[str]:
        """The text in blocks, its UTF-8 decoded and a byte-order mark at the start dropped.

        Raises:
            UserError: the bytes are not UTF-8; it names the offset of the first bad one.
        """
        decoder = codecs.getincrementaldecoder("utf-8")()
        offset = 0  # of the first byte that the decoder has not turned into text yet
        first = True
        for block, final in _with_end(self.blocks()):
            pending = decoder.getstate()[0]
            try:
                text = decoder.decode(block, final)
            except UnicodeDecodeError as error:
                raise not_utf8(self.name, offset + error.start, error) from None
            offset += len(pending) + len(block) - len(decoder.getstate()[0])
            if first and text:
                text, first = text.removeprefix("\ufeff"), False
            if text:
                yield text


def not_utf8(name: str, offset: int, error: UnicodeDecodeError) -> UserError:
    """The error for bytes that are not UTF-8, at ``offset`` in the (uncompressed) bytes of ``name``."""
    byte = error.object[error.start]
    hint = " (UTF-16? convert it to UTF-8)" if offset == 0 and byte in (0xFF, 0xFE) else ""
    return UserError(f"{name}: not UTF-8 text: byte 0x{byte:02x} at offset {offset}: {error.reason}{hint}")


def file_stream(path: Path, on_read: Callable[[int], None] = lambda n: None) -> ByteStream:
    """The bytes of the file at ``path``, uncompressed according to its suffix."""
    return ByteStream(str(path), lambda: path.open("rb"), path.suffix.lower(), on_read)


class _Counting(io.RawIOBase):
    """Passes reads through and reports how many bytes went by, for progress within archives."""

    def __init__(self, raw: BinaryIO, on_read: Callable[[int], None]):
        self._raw = raw
        self._on_read = on_read

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        block = self._raw.read(size)
        self._on_read(len(block))
        return block


def _uncompressed(raw: BinaryIO, suffix: str) -> BinaryIO | gzip.GzipFile | lzma.LZMAFile:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw, mode="rb")
    return lzma.LZMAFile(raw) if suffix == ".xz" else raw


def _with_end(blocks: Iterator[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Each block with whether it is the decoder's last call; an empty block closes the sequence."""
    for block in blocks:
        yield block, False
    yield b"", True
