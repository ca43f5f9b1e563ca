"""Files that are whole or not there."""

import os
from pathlib import Path


def replace_file(path: Path, data: bytes | bytearray) -> None:
    """Make `data` the content of `path`: a reader, a crash or a power cut meets the old file or the new one.

    The new one has reached the disk when this returns. After an error the old one is as it was.
    """
    temporary = path.with_name(f".{path.name}.saving")
    try:
        temporary.write_bytes(data)
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """fsync a file or, for its entries, a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
