"""`memorize`: a corpus becomes one stream, and an interrupted reading goes on to the bit."""

import functools
import gzip
import json
import lzma
import os
import tracemalloc
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.inference.saved import TEXT, checkpoint, word_tokenizer
from tests.inference.tiny import randomised
from titans import Memory
from titans.data.sources import Corpus
from titans.data.tokenizer import TextEncoder, byte_tokenizer
from titans.errors import UserError
from titans.inference import reading
from titans.inference.memory_file import read_memory
from titans.inference.reading import ChangedSourceError, memorize
from titans.inference.text import cut


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def small_units(monkeypatch):
    """Units of 50 characters: saves fall inside of them and between them."""
    monkeypatch.setattr(reading, "cut", functools.partial(cut, unit=50))


@given(st.text(alphabet="ab \n", max_size=60), st.integers(1, 9))
def test_units_are_the_text_and_not_longer_than_they_may(text, unit):
    parts = list(cut(text, unit))
    assert "".join(parts) == text
    assert all(0 < len(part) <= unit for part in parts)


def test_units_end_where_tokens_do():
    assert list(cut("one two\nthree four\nfive", 12)) == ["one two\n", "three four\n", "five"]
    # "\n\n" at the end of a text may be one token, which before a word it is not.
    assert list(cut("one\ntwo\n\nthree", 10)) == ["one\n", "two\n\nthree"]
    assert list(cut("one\n\ntwo three", 9)) == ["one\n\n", "two three"]
    assert list(cut("one two three four", 9)) == ["one two", " three", " four"]
    assert list(cut("abcdefghij", 4)) == ["abcd", "efgh", "ij"]


def test_cuts_at_lines_change_no_tokens():
    """Of a byte-level BPE with GPT-2's rules: paragraphs, indented lines, windows of every length."""
    encode = TextEncoder(word_tokenizer())
    text = "".join(
        f"line {n}\n" + ("\n" if n % 3 == 0 else "") + ("    indented\n" if n % 4 == 0 else "")
        for n in range(40)
    )
    whole = encode([text])[0].tolist()
    for unit in range(40, 90):
        parts = list(cut(text, unit))
        assert len(parts) > 4
        assert [token for ids in encode(parts) for token in ids.tolist()] == whole


def test_all_sources_are_one_stream(folder, tmp_path):
    """Files, folders in order, archives: the bytes of one text, with <bos> once."""
    texts = [TEXT[start:end] for start, end in pairwise(range(0, 360, 70))]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "1.txt").write_text(texts[0])
    (tmp_path / "texts" / "2.txt.gz").write_bytes(gzip.compress(texts[1].encode()))
    (tmp_path / "3.xz").write_bytes(lzma.compress(texts[2].encode()))
    lines = [json.dumps({"text": text}) for text in (texts[3], "a")]
    (tmp_path / "4.jsonl").write_text("\n".join(lines))
    (tmp_path / "5").write_text(texts[4])
    names = [str(tmp_path / name) for name in ("texts", "3.xz", "4.jsonl", "5")]
    memory, whole = Memory.new(folder), Memory.new(folder)
    assert memorize(memory, Corpus(names), tmp_path / "x")
    whole.read("".join([*texts[:4], "a", texts[4]]))
    assert torch.equal(memory.stream.logits, whole.stream.logits)
    sources = read_memory(tmp_path / "x").header.sources
    assert [source.name for source in sources] == [
        str(tmp_path / name) for name in ("texts/1.txt", "texts/2.txt.gz", "3.xz", "4.jsonl", "5")
    ]
    assert sum(source.bytes for source in sources) == len("".join(texts).encode()) + 1


def stops_after(pieces):
    """A `stop` that ends the reading after so many pieces."""
    counts = iter([*[False] * (pieces - 1), True, False])
    return lambda: next(counts)


@pytest.mark.parametrize("tokenizer", ["bytes", "words"])
def test_an_interrupted_reading_goes_on_to_the_bit(tmp_path, tokenizer, small_units):
    """Stopped after every piece in turn; the files at the end are the same, byte for byte."""
    chosen, piece = (byte_tokenizer(), 24) if tokenizer == "bytes" else (word_tokenizer(), 7)
    model = randomised("mac", vocab_size=300).float()
    (tmp_path / "a.txt").write_text(TEXT[:130])
    (tmp_path / "b.txt").write_text(TEXT[130:220])

    def new():
        return Memory.new(model, chosen, piece=piece)

    corpus = Corpus([tmp_path / "a.txt", tmp_path / "b.txt"])
    whole = new()
    assert memorize(whole, corpus, tmp_path / "whole")
    pieces = -(-whole.stream.tokens_read // piece)
    skips = set()
    for stop in range(1, pieces):
        out = tmp_path / f"stopped-{stop}"
        assert not memorize(new(), corpus, out, stop=stops_after(stop))
        header = read_memory(out).header
        assert (header.tokens_read, header.sources) == (stop * piece, ())
        skips.add(header.reading.skip)
        resumed = Memory.load(out, model, chosen, piece=header.reading.piece)
        assert memorize(resumed, corpus, out)
        assert out.read_bytes() == (tmp_path / "whole").read_bytes()
    assert len(skips) > 2  # places inside units were among them


def test_a_reading_interrupted_at_every_piece_goes_on_to_the_bit(folder, tmp_path, small_units):
    (tmp_path / "a.txt").write_text(TEXT[:150])
    corpus, out = Corpus([tmp_path / "a.txt"]), tmp_path / "x"
    memorize(Memory.new(folder, piece=16), corpus, tmp_path / "whole")
    memorize(Memory.new(folder, piece=16), corpus, out, stop=lambda: True)
    times = 1
    while read_memory(out).header.reading is not None:
        memorize(Memory.load(out, folder, piece=16), corpus, out, stop=lambda: True)
        times += 1
    assert times == -(-read_memory(out).header.tokens_read // 16) + 1
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_finished_memory_reads_on(folder, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT[:60])
    (tmp_path / "b.txt").write_text(TEXT[60:100])
    memorize(Memory.new(folder), Corpus([tmp_path / "a.txt"]), tmp_path / "x")
    memory, same = Memory.load(tmp_path / "x", folder), Memory.new(folder)
    memorize(memory, Corpus([tmp_path / "b.txt"]), tmp_path / "y")
    for text in (TEXT[:60], TEXT[60:100]):
        same.read(text)
    assert torch.equal(memory.stream.logits, same.stream.logits)
    names = [source.name for source in read_memory(tmp_path / "y").header.sources]
    assert names == [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "X" + text[1:],  # before the place
        lambda text: text[:10],  # shorter
        lambda text: "",
    ],
    ids=["edited", "cut", "emptied"],
)
def test_a_source_that_changed_since_is_refused(folder, tmp_path, small_units, change):
    path, out = tmp_path / "a.txt", tmp_path / "x"
    path.write_text(TEXT[:200])
    memorize(Memory.new(folder, piece=24), Corpus([path]), out, stop=stops_after(4))
    before = out.read_bytes()
    corpus = Corpus([path])
    path.write_text(change(TEXT[:200]))
    with pytest.raises(ChangedSourceError, match=r"a\.txt: changed since it was read"):
        memorize(Memory.load(out, folder, piece=24), corpus, out)
    assert out.read_bytes() == before
    path.write_text(TEXT[:250])  # more text behind what was read is no change
    assert memorize(Memory.load(out, folder, piece=24), Corpus([path]), out)


def test_a_file_that_changes_while_it_is_read_is_refused(folder, tmp_path):
    """The memory file stays as the last save left it; going on later notices what changed before it."""
    path, other, out = tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "x"
    path.write_text(TEXT[:100])
    other.write_text(TEXT[100:200])
    kept = []

    def append(bytes_read, tokens):
        if tokens == 48:
            kept.append(out.read_bytes())
            with path.open("a") as file:
                file.write("more")

    with pytest.raises(ChangedSourceError, match=r"a\.txt: changed while it was read"):
        memorize(Memory.new(folder, piece=24), Corpus([path, other]), out, save_every=0, progress=append)
    assert out.read_bytes() == kept[0]
    assert read_memory(out).header.tokens_read == 24
    assert memorize(Memory.load(out, folder, piece=24), Corpus([path, other]), out)


def test_text_that_turns_binary_is_an_error_and_nothing_read_before_is_lost(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("titans.data.sources.PIECE_CHARACTERS", 64)
    monkeypatch.setattr("titans.data.streams.ByteStream.blocks.__defaults__", (64,), raising=False)
    path, out = tmp_path / "a.txt", tmp_path / "x"
    path.write_bytes(TEXT[:300].encode() + b"\xff\xfe\x00")
    corpus = Corpus([path])
    with pytest.raises(UserError, match=r"a\.txt: not UTF-8 text: byte 0xff at offset .* is saved in"):
        memorize(Memory.new(folder, piece=24), corpus, out)
    place = read_memory(out).header
    assert place.tokens_read >= 192
    path.write_text(TEXT[:300])  # mended
    assert memorize(Memory.load(out, folder, piece=24), Corpus([path]), out)
    memorize(Memory.new(folder, piece=24), Corpus([path]), tmp_path / "whole")
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()


def test_control_characters_are_text_like_any_other(folder, tmp_path):
    text = "".join(map(chr, range(32))) + "\x7f\x85\u2028\u202e\ufffd a"
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    memory, whole = Memory.new(folder), Memory.new(folder)
    memorize(memory, Corpus([path]), tmp_path / "x")
    whole.read(text)
    assert memory.stream.tokens_read == 1 + len(text.encode())
    assert torch.equal(memory.stream.logits, whole.stream.logits)


def test_folders_without_text_are_an_error(folder, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "empty").touch()
    with pytest.raises(UserError, match="no text in"):
        memorize(Memory.new(folder), Corpus([tmp_path / "texts"]), tmp_path / "x")
    assert not (tmp_path / "x").exists()


class _Unread:
    """In place of a `Memory`: its text is tokenized, and read by nobody."""

    encode = staticmethod(TextEncoder(byte_tokenizer()))

    def start(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.int64)


def test_a_long_line_takes_bounded_memory(tmp_path):
    """64 MB without a space or an end: pieces of 4 MB of text are what is held."""
    path, size = tmp_path / "line.txt.gz", 64 << 20
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(size >> 20):
            file.write(b"x" * (1 << 20))
    corpus = Corpus([path])
    source = reading._TokenSource(_Unread(), corpus)
    tracemalloc.start()
    try:
        tokens = 0
        while len(ids := source.take(1 << 14)):
            tokens += len(ids)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert tokens == size
    assert source.bytes_read == os.path.getsize(path)
    assert peak < 24 << 20
    assert source.ledger.sources()[0].bytes == size
