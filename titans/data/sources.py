"""Documents from wherever text lies: files, folders, archives, standard input, data sets, Python's docs."""

import importlib.util
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, cast

from titans.data.streams import COMPRESSED_SUFFIXES, ByteStream, file_stream, not_utf8
from titans.errors import UserError

STDIN = "-"
PYTHON_DOCS = "python-docs"
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".json")
# A text file of any size is read in constant memory: beyond so many characters its document comes in pieces.
PIECE_CHARACTERS = 1 << 22

InputFormat = Literal["auto", "text", "jsonl"]


@dataclass(frozen=True, slots=True)
class Document:
    """A text and where it comes from.

    ``continues`` marks a further piece of the document before it: only text files (and standard input) above
    ``PIECE_CHARACTERS`` are cut so, after a line's end where there is one.
    """

    text: str
    source: str
    continues: bool = False


class _Source(Protocol):
    """One resolved source. ``size`` is in bytes on disk (for an ETA), None when unknown."""

    size: int | None

    def check(self) -> None:
        """Look at the source's beginning and raise ``UserError`` for what is wrong there already."""

    def documents(self, on_read: Callable[[int], None]) -> Iterator[Document]: ...


class Corpus:
    """The documents of several sources, in order. Iterating twice reads twice (except standard input).

    Args:
        sources: each a text file, a folder (all its files that are not hidden, in sorted order), a JSON lines
            file (``.jsonl``, ``.ndjson``, ``.json``), one of those with ``.gz`` or ``.xz``, ``-`` for
            standard input, ``python-docs`` for the documentation that CPython ships, or a Hugging Face data
            set's name (owner/name).
        text_field: the field of JSON lines and data sets that holds the text.
        input_format: what files and standard input hold; ``auto`` goes by the suffix.
        dataset_config, dataset_split: which part of a Hugging Face data set.

    Raises:
        UserError: a source is missing, empty, damaged or not UTF-8 (as far as its first block shows; while
            iterating, for the rest).
    """

    def __init__(
        self,
        sources: Sequence[str | Path],
        *,
        text_field: str = "text",
        input_format: InputFormat = "auto",
        dataset_config: str | None = None,
        dataset_split: str = "train",
    ):
        if not sources:
            raise UserError("no sources: expected files, folders, '-', 'python-docs' or a data set's name")
        names = [str(source) for source in sources]
        if names.count(STDIN) > 1:
            raise UserError("standard input ('-') can be read only once, but was named more than once")
        self.names = names
        self.files: list[Path] = []
        self.bytes_read = 0
        self.empty = 0
        self._sources: list[_Source] = []
        for name in names:
            if name == STDIN:
                self._sources.append(_Stdin(text_field, input_format))
            elif name == PYTHON_DOCS:
                self._sources.append(_PythonDocs())
            elif (path := Path(name).expanduser()).exists():
                files = _files_below(path) if path.is_dir() else [path]
                # An empty file among many is ordinary; one named by hand is a mistake.
                self._sources += [_File(file, text_field, input_format, path.is_dir()) for file in files]
                self.files += files
            else:
                self._sources.append(_HuggingFaceDataset(name, dataset_config, dataset_split, text_field))
        for source in self._sources:
            source.check()

    @property
    def size(self) -> int | None:
        """Bytes on disk of all sources; None when one of them cannot tell."""
        sizes = [source.size for source in self._sources]
        return None if None in sizes else sum(cast(list[int], sizes))

    def __iter__(self) -> Iterator[Document]:
        """The documents that are not empty; ``empty`` counts the others, ``bytes_read`` what was read."""
        self.bytes_read = self.empty = 0
        for source in self._sources:
            for document in source.documents(self._count):
                if document.text:
                    yield document
                else:
                    self.empty += 1

    def _count(self, read: int) -> None:
        self.bytes_read += read


class _File:
    """A text or JSON lines file, perhaps compressed."""

    def __init__(self, path: Path, text_field: str, input_format: InputFormat, may_be_empty: bool):
        # A pipe given by name (`<(command)`) has no size, and what a check would read from it would be gone.
        self._regular = path.is_file()
        self.size: int | None = path.stat().st_size if self._regular else None
        self._path = path
        self._text_field = text_field
        self._may_be_empty = may_be_empty
        inner = path.with_suffix("") if path.suffix.lower() in COMPRESSED_SUFFIXES else path
        json_lines = inner.suffix.lower() in JSON_LINES_SUFFIXES
        self._json_lines = json_lines if input_format == "auto" else input_format == "jsonl"

    def check(self) -> None:
        if not os.access(self._path, os.R_OK):
            raise UserError(f"{self._path}: cannot be read (permission denied)")
        if not self._regular:
            return
        if next(file_stream(self._path).blocks(1), None) is None and not self._may_be_empty:
            raise UserError(f"{self._path}: the file is empty")
        # Two blocks or lines: enough for a wrong format, encoding or field, and to see a short file's end.
        stream = file_stream(self._path)
        beginning = _json_documents(stream, self._text_field) if self._json_lines else stream.text()
        for _ in itertools.islice(beginning, 2):
            pass

    def documents(self, on_read: Callable[[int], None]) -> Iterator[Document]:
        stream = file_stream(self._path, on_read)
        return _json_documents(stream, self._text_field) if self._json_lines else _text_document(stream)


class _Stdin:
    """Standard input: one document of plain text, or JSON lines when ``input_format`` says so."""

    size: int | None = None

    def __init__(self, text_field: str, input_format: InputFormat):
        self._text_field = text_field
        self._json_lines = input_format == "jsonl"

    def check(self) -> None:
        """Nothing: what is read here would be gone."""

    def documents(self, on_read: Callable[[int], None]) -> Iterator[Document]:
        stream = ByteStream("standard input", _open_stdin, "", on_read)
        return _json_documents(stream, self._text_field) if self._json_lines else _text_document(stream)


def _open_stdin() -> BinaryIO:
    return os.fdopen(os.dup(sys.stdin.fileno()), "rb")  # a copy, for whoever reads it closes it


class _PythonDocs:
    """The language reference's topics that CPython ships for ``help()``: about 470 KB of text."""

    def __init__(self) -> None:
        if importlib.util.find_spec("pydoc_data.topics") is None:
            raise UserError("python-docs: this Python was installed without the module pydoc_data.topics")
        from pydoc_data.topics import topics

        self._topics: dict[str, str] = topics
        self.size: int | None = sum(len(text.encode()) for text in topics.values())

    def check(self) -> None:
        """Nothing: it was loaded."""

    def documents(self, on_read: Callable[[int], None]) -> Iterator[Document]:
        for topic in sorted(self._topics):
            text = self._topics[topic]
            on_read(len(text.encode()))
            yield Document(text, f"{PYTHON_DOCS}:{topic}")


class _HuggingFaceDataset:
    """A data set of the Hugging Face Hub, streamed: nothing is downloaded whole."""

    size: int | None = None

    def __init__(self, name: str, config: str | None, split: str, text_field: str):
        self._name, self._config, self._split, self._text_field = name, config, split, text_field
        self._rows: Any = None

    def check(self) -> None:
        # What may be a path is one: a misspelt file must not become half a minute of asking the Hub.
        owner, _, name = self._name.partition("/")
        if (
            not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", self._name)
            or Path(owner).is_dir()
            or name.lower().endswith((".txt", ".md", *JSON_LINES_SUFFIXES, *COMPRESSED_SUFFIXES))
        ):
            raise UserError(
                f"{self._name}: no such file or folder (and not a data set's name of the form owner/name)"
            )
        if importlib.util.find_spec("datasets") is None:
            raise UserError(
                f"{self._name}: no such file or folder; if it is a Hugging Face data set's name, "
                "the package 'datasets' is missing: pip install 'titans-ltm[data]'"
            )
        import datasets

        try:
            self._rows = datasets.load_dataset(self._name, self._config, split=self._split, streaming=True)
            first = next(iter(self._rows), None)
        except Exception as error:  # the Hub's client raises whatever its layers raise
            reason = (str(error).splitlines() or [""])[0] or type(error).__name__
            raise UserError(
                f"{self._name}: no such file or folder, and no Hugging Face data set of that name "
                f"could be opened (config {self._config}, split {self._split!r}): {reason}"
            ) from error
        if first is not None:
            _field(first, self._text_field, f"{self._name}, row 0")

    def documents(self, on_read: Callable[[int], None]) -> Iterator[Document]:
        for number, row in enumerate(self._rows):
            text = _field(row, self._text_field, f"{self._name}, row {number}")
            yield Document(text, f"{self._name}:{number}")


def _files_below(folder: Path) -> list[Path]:
    """All files below ``folder`` except hidden ones, sorted by path so that every machine reads alike."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    if not found:
        raise UserError(f"{folder}: the folder holds no files")
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def _text_document(stream: ByteStream) -> Iterator[Document]:
    """The whole stream as one document, in pieces when it is long."""
    blocks: list[str] = []
    length = 0
    continues = False
    for block in stream.text():
        blocks.append(block)
        length += len(block)
        if length >= PIECE_CHARACTERS:
            text = "".join(blocks)
            end = text.rfind("\n") + 1 or len(text)
            yield Document(text[:end], stream.name, continues)
            blocks, length, continues = [text[end:]], len(text) - end, True
    if length or not continues:
        yield Document("".join(blocks), stream.name, continues)


def _json_documents(stream: ByteStream, field: str) -> Iterator[Document]:
    """One document per line that is not blank."""
    offset = 0
    for number, line in enumerate(stream.lines(), start=1):
        where = f"{stream.name}, line {number}"
        try:
            decoded = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(stream.name, offset + error.start, error) from None
        offset += len(line) + 1
        if not decoded.strip():
            continue
        try:
            row = json.loads(decoded)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{where}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(
                f"{where}: expected a JSON object with a field {field!r}, got {type(row).__name__}"
            )
        yield Document(_field(row, field, where), f"{stream.name}:{number}")


def _field(row: dict[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise UserError(
            f"{where}: no field {field!r}, the fields are {sorted(row)} (choose one with --text-field)"
        )
    text = row[field]
    if not isinstance(text, str):
        raise UserError(f"{where}: expected text in the field {field!r}, got {type(text).__name__}")
    try:
        # JSON can spell half a surrogate pair ("\ud83d"), which no tokenizer could turn into bytes.
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: the field {field!r} is not valid Unicode: {error}") from None
    return text
