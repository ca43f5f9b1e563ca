"""Every kind of source gives its documents; every kind of bad input is named before work begins."""

import gzip
import io
import json
import lzma
import os
import sys
import threading
import types
from pathlib import Path

import pytest

import titans.data.sources
from titans.data.sources import Corpus
from titans.errors import UserError


def texts(*sources: object, **options: object) -> list[str]:
    return [document.text for document in Corpus([str(source) for source in sources], **options)]  # type: ignore[arg-type]


def write_json_lines(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def test_a_text_file_is_one_document_byte_for_byte(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffGrüße\r\nzwei\n\n".encode())  # a mark at the start goes, line ends stay
    corpus = Corpus([path])
    assert [(document.text, document.source) for document in corpus] == [("Grüße\r\nzwei\n\n", str(path))]
    assert corpus.bytes_read == corpus.size == path.stat().st_size


def test_a_folder_is_read_recursively_in_sorted_order_without_hidden_files(tmp_path: Path):
    for name in ("b.txt", "a/z.txt", "a/y.txt", ".hidden", ".git/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "empty.txt").touch()
    corpus = Corpus([tmp_path])
    assert [document.text for document in corpus] == ["a/y.txt", "a/z.txt", "b.txt"]
    assert corpus.empty == 1


@pytest.mark.parametrize(
    ("suffix", "compress"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)]
)
def test_json_lines_give_a_document_per_line_compressed_or_not(tmp_path: Path, suffix, compress):
    lines = (
        b'{"text": "one", "id": 1}\n\n{"text": "z\\u00e4hl\\ud83d\\ude00"}\r\n{"text": ""}\n{"text": "last"}'
    )
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(lines))
    corpus = Corpus([path])
    assert [(document.text, document.source) for document in corpus] == [
        ("one", f"{path}:1"),
        ("zähl😀", f"{path}:3"),
        ("last", f"{path}:5"),
    ]
    assert corpus.empty == 1
    assert corpus.bytes_read == corpus.size


def test_lines_longer_than_a_block_are_whole(tmp_path: Path):
    long = "x" * ((1 << 20) - 3) + "ü" * 700_000  # the block's edge falls inside a character
    path = write_json_lines(tmp_path / "a.jsonl", {"text": "a"}, {"text": long}, {"text": "b"})
    assert texts(path) == ["a", long, "b"]
    path = tmp_path / "a.txt"
    path.write_text(long, encoding="utf-8")
    assert texts(path) == [long]


def test_a_long_text_comes_in_pieces_that_end_with_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without pieces the memory that prepare needs would grow with the largest file."""
    monkeypatch.setattr(titans.data.sources, "PIECE_CHARACTERS", 1 << 20)
    text = "".join(f"line {number} ä\n" for number in range(200_000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    documents = list(Corpus([tmp_path / "a.txt"]))
    assert len(documents) >= 2
    assert [document.continues for document in documents] == [False] + [True] * (len(documents) - 1)
    assert "".join(document.text for document in documents) == text
    assert all(document.text.endswith("\n") for document in documents)


def test_text_field_and_format_can_be_chosen(tmp_path: Path):
    path = write_json_lines(tmp_path / "a.data", {"body": "one"}, {"body": "two"})
    assert texts(path, text_field="body", input_format="jsonl") == ["one", "two"]
    path = write_json_lines(tmp_path / "a.json", {"body": "one"})
    assert texts(path, input_format="text") == ['{"body": "one"}\n']


@pytest.mark.parametrize(("input_format", "expected"), [("auto", ['{"text": "a"}\n']), ("jsonl", ["a"])])
def test_standard_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, input_format: str, expected: list[str]
):
    (tmp_path / "in").write_text('{"text": "a"}\n')
    with (tmp_path / "in").open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        corpus = Corpus(["-"], input_format=input_format)  # type: ignore[arg-type]
        assert corpus.size is None
        assert [document.text for document in corpus] == expected


def test_a_named_pipe_is_not_read_before_the_work(tmp_path: Path):
    """`titans prepare <(command)`: what a check took from the pipe would be missing from the text."""
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("whole text",))
    writer.start()
    assert texts(tmp_path / "pipe") == ["whole text"]
    writer.join()


def test_python_docs_are_the_topics_in_order():
    documents = list(Corpus(["python-docs"]))
    assert sum(len(document.text) for document in documents) > 300_000
    sources = [document.source for document in documents]
    assert sources == sorted(sources)
    assert "python-docs:assert" in sources


def test_sources_follow_one_another(tmp_path: Path):
    (tmp_path / "a.txt").write_text("first")
    path = write_json_lines(tmp_path / "b.jsonl", {"text": "second"})
    assert texts(tmp_path / "a.txt", path, tmp_path / "a.txt") == ["first", "second", "first"]


def bad_inputs() -> dict[str, tuple[str, bytes, str]]:
    """case -> (file name, its bytes, what the error must say)"""
    good = b'{"text": "good"}\n'
    cut = 20
    return {
        "empty": ("a.txt", b"", r"a\.txt: the file is empty"),
        "empty archive": ("a.txt.gz", gzip.compress(b""), r"a\.txt\.gz: the file is empty"),
        "latin-1": (
            "a.txt",
            "naïve".encode("latin-1"),
            r"a\.txt: not UTF-8 text: byte 0xef at offset 2: inv",
        ),
        "utf-16": (
            "a.txt",
            "text".encode("utf-16"),
            r"a\.txt: not UTF-8 text: byte 0xff at offset 0.*UTF-16\?",
        ),
        "cut utf-8": ("a.txt", "naï".encode()[:-1], r"not UTF-8 text: byte 0xc3 at offset 2: unexpected end"),
        "latin-1 line": (
            "a.jsonl",
            b'{"text": "\xfc"}\n',
            r"a\.jsonl: not UTF-8 text: byte 0xfc at offset 10",
        ),
        "cut gz": (
            "a.txt.gz",
            gzip.compress(b"text" * 99)[:-9],
            r"a\.txt\.gz: broken \.gz archive, \d+ bytes cou",
        ),
        "cut xz": (
            "a.txt.xz",
            lzma.compress(b"text" * 99)[:cut],
            r"a\.txt\.xz: broken \.xz archive, 0 bytes cou",
        ),
        "no gz": ("a.txt.gz", b"plain text", r"a\.txt\.gz: broken \.gz archive.*Not a gzipped file"),
        "no xz": ("a.txt.xz", b"plain text", r"a\.txt\.xz: broken \.xz archive"),
        "no json": ("a.jsonl", b"{text}\n" + good, r"a\.jsonl, line 1: not JSON: Expecting property name"),
        "json array": (
            "a.jsonl",
            b"[1]\n",
            r"a\.jsonl, line 1: expected a JSON object with a field 'text', got list",
        ),
        "no field": (
            "a.jsonl",
            b'{"body": 1, "a": 2}\n',
            r"line 1: no field 'text', the fields are \['a', 'body'\]",
        ),
        "no text": (
            "a.jsonl",
            b'{"text": 5}\n',
            r"a\.jsonl, line 1: expected text in the field 'text', got int",
        ),
        "half a surrogate": (
            "a.jsonl",
            b'{"text": "\\ud83d"}\n',
            r"line 1: the field 'text' is not valid Unicode",
        ),
    }


@pytest.mark.parametrize("case", bad_inputs())
def test_bad_input_is_named_before_any_document_is_read(tmp_path: Path, case: str):
    name, contents, message = bad_inputs()[case]
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(UserError, match=message):
        Corpus([tmp_path / name])


def test_bad_input_far_into_a_file_is_named_with_its_place(tmp_path: Path):
    good = b"g\xc3\xbct\n" * 300_000  # beyond the first block of 1 MiB
    (tmp_path / "a.txt").write_bytes(good + b"\xff")
    with pytest.raises(UserError, match=rf"a\.txt: not UTF-8 text: byte 0xff at offset {len(good)}:"):
        texts(tmp_path / "a.txt")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(os.urandom(3 << 20).hex().encode())[:-20])
    with pytest.raises(UserError, match=r"a\.txt\.gz: broken \.gz archive, \d{7} bytes could be read"):
        texts(tmp_path / "a.txt.gz")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n\n{"text": "b"}\n{"text": "c"\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 4: not JSON"):
        texts(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "a"}\n{"text": "b\xff"}\n')
    with pytest.raises(UserError, match=r"b\.jsonl: not UTF-8 text: byte 0xff at offset 25:"):
        texts(tmp_path / "b.jsonl")


@pytest.mark.parametrize(
    "name", ["nope.txt", "nope/", "nope", "no/such/file", "./nope/file", "owner/x.jsonl.gz"]
)
def test_a_missing_path_is_no_question_to_the_hub(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=rf"{name}: no such file or folder"):
        Corpus([name])


def test_a_misspelt_file_below_an_existing_folder_is_a_missing_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("books").mkdir()
    with pytest.raises(UserError, match=r"books/noevl: no such file or folder \(and not a data set's name"):
        Corpus(["books/noevl"])


def test_no_sources_an_empty_folder_and_standard_input_twice(tmp_path: Path):
    with pytest.raises(UserError, match="no sources: expected files, folders"):
        Corpus([])
    with pytest.raises(UserError, match="the folder holds no files"):
        Corpus([tmp_path])
    with pytest.raises(UserError, match=r"standard input .* only once"):
        Corpus(["-", "-"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path: Path):
    (tmp_path / "a.txt").write_text("secret")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(UserError, match=r"a\.txt: cannot be read"):
        Corpus([tmp_path / "a.txt"])


class FakeDatasets(types.ModuleType):
    """What Corpus uses of the package ``datasets``, without a network."""

    def __init__(self, rows: list[dict[str, object]] | Exception):
        super().__init__("datasets")
        self.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]  # find_spec asks for one
        self.rows = rows
        self.asked: tuple[object, ...] = ()

    def load_dataset(
        self, name: str, config: str | None, *, split: str, streaming: bool
    ) -> list[dict[str, object]]:
        self.asked = (name, config, split, streaming)
        if isinstance(self.rows, Exception):
            raise self.rows
        return self.rows


def test_a_data_set_is_streamed_by_name(monkeypatch: pytest.MonkeyPatch):
    fake = FakeDatasets([{"body": "one"}, {"body": ""}, {"body": "two"}])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    corpus = Corpus(["owner/name"], text_field="body", dataset_config="en", dataset_split="test")
    assert [(document.text, document.source) for document in corpus] == [
        ("one", "owner/name:0"),
        ("two", "owner/name:2"),
    ]
    assert corpus.size is None
    assert fake.asked == ("owner/name", "en", "test", True)


def test_a_data_set_without_the_field_is_refused_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", FakeDatasets([{"body": "one"}]))
    with pytest.raises(UserError, match=r"owner/name, row 0: no field 'text', the fields are \['body'\]"):
        Corpus(["owner/name"])


def test_an_unreachable_data_set_says_why_on_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(
        sys.modules, "datasets", FakeDatasets(ConnectionError("Couldn't reach the Hub\nmore"))
    )
    message = r"owner/name: no such file or folder, and no Hugging Face data set .*Couldn't reach the Hub$"
    with pytest.raises(UserError, match=message):
        Corpus(["owner/name"])


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    find_spec = titans.data.sources.importlib.util.find_spec
    monkeypatch.setattr(
        titans.data.sources.importlib.util,
        "find_spec",
        lambda name: None if name in ("datasets", "pydoc_data.topics") else find_spec(name),
    )
    with pytest.raises(
        UserError, match=r"the package 'datasets' is missing: pip install 'titans-ltm\[data\]'"
    ):
        Corpus(["owner/name"])
    with pytest.raises(UserError, match="python-docs: this Python was installed without the module"):
        Corpus(["python-docs"])


def test_one_file_is_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder of many files must not exhaust the process's file descriptors."""
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text("text")
    opened: list[io.IOBase] = []
    open_ = Path.open

    def recorded(self: Path, *args: object) -> object:
        assert all(file.closed for file in opened)
        opened.append(open_(self, *args))  # type: ignore[arg-type]
        return opened[-1]

    monkeypatch.setattr(Path, "open", recorded)
    assert texts(tmp_path) == ["text"] * 5
    assert len(opened) > 5
