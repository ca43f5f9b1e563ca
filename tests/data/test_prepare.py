"""prepare: same input, same bytes; all or nothing; documents keep their boundaries and their text."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import titans.data.prepare
import titans.data.sources
from titans.data.prepare import prepare
from titans.data.shards import TokenShards
from titans.data.tokenizer import load_tokenizer
from titans.errors import UserError


def write_documents(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


def some_documents(number: int = 40) -> list[str]:
    return [f"document {i} ü " + "word " * (7 * i % 31) for i in range(number)]


def documents_of(shards: TokenShards) -> list[list[int]]:
    """The documents' tokens, boundary tokens included."""
    ends = [*shards.starts[1:], len(shards)]
    return [
        shards.read(int(start), int(end)).tolist() for start, end in zip(shards.starts, ends, strict=True)
    ]


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "source.jsonl", some_documents())


def test_every_document_comes_back_from_one_of_the_splits(source: Path, tmp_path: Path):
    meta = prepare([source], tmp_path / "out", validation_fraction=0.2)
    tokenizer = load_tokenizer(tmp_path / "out")
    texts = []
    for split in ("train", "val"):
        shards = TokenShards(tmp_path / "out", split)
        shards.verify()
        assert meta.splits[split].documents == len(shards.starts)
        for ids in documents_of(shards):
            assert ids[0] == tokenizer.bos_token_id
            assert tokenizer.bos_token_id not in ids[1:]
            texts.append(tokenizer.decode(ids, skip_special_tokens=True))
    assert sorted(texts) == sorted(some_documents())
    assert meta == TokenShards(tmp_path / "out").meta
    total = meta.splits["train"].tokens + meta.splits["val"].tokens
    assert total == sum(len(text.encode()) + 1 for text in some_documents())
    assert 0.15 < meta.splits["val"].tokens / total < 0.25


def test_documents_keep_their_order_within_a_split(source: Path, tmp_path: Path):
    prepare([source], tmp_path / "out")
    train = [bytes(ids[1:]).decode() for ids in documents_of(TokenShards(tmp_path / "out"))]
    assert train == [text for text in some_documents() if text in train]


def test_same_seed_same_bytes_other_seed_other_split(source: Path, tmp_path: Path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare([source], tmp_path / name, seed=seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a")["val-00000.bin"] != contents(tmp_path / "c")["val-00000.bin"]


def test_batches_and_pieces_do_not_change_the_tokens(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Bytes do not depend on where text is cut for reading and encoding."""
    (tmp_path / "long.txt").write_text("some long line\n" * 100_000)
    prepare([source, tmp_path / "long.txt"], tmp_path / "a")
    monkeypatch.setattr(titans.data.prepare, "_BATCH_CHARACTERS", 100)
    monkeypatch.setattr(titans.data.prepare, "_COPY_TOKENS", 1000)
    monkeypatch.setattr(titans.data.sources, "PIECE_CHARACTERS", 1 << 20)
    prepare([source, tmp_path / "long.txt"], tmp_path / "b")
    assert TokenShards(tmp_path / "a").starts.tolist() == TokenShards(tmp_path / "b").starts.tolist()
    assert contents(tmp_path / "a").keys() == contents(tmp_path / "b").keys()
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert {name: a[name] for name in a if ".bin" in name} == {name: b[name] for name in b if ".bin" in name}


@pytest.mark.parametrize("shard_size", [1, 7, 64, 100_000])
def test_shards_of_any_size_hold_the_same_stream(source: Path, tmp_path: Path, shard_size: int):
    documents = some_documents(4)
    source = write_documents(tmp_path / "few.jsonl", documents)
    prepare([source], tmp_path / "out", validation_fraction=0, shard_size=shard_size)
    shards = TokenShards(tmp_path / "out")
    assert [bytes(ids[1:]).decode() for ids in documents_of(shards)] == documents
    sizes = [shard.tokens for shard in shards.meta.splits["train"].shards]
    assert all(size == shard_size for size in sizes[:-1])
    assert 0 < sizes[-1] <= shard_size
    middle = len(shards) // 2
    assert shards.read(3, middle).tolist() == shards.read(0, len(shards)).tolist()[3:middle]


def test_copies_of_a_document_stay_on_one_side(tmp_path: Path):
    """A validation text that was trained on measures memory, not learning."""
    source = write_documents(tmp_path / "twice.jsonl", some_documents() * 2)
    for seed in range(5):
        prepare([source], tmp_path / str(seed), seed=seed, validation_fraction=0.1)
        train, val = (documents_of(TokenShards(tmp_path / str(seed), split)) for split in ("train", "val"))
        assert not {tuple(ids) for ids in train} & {tuple(ids) for ids in val}


def test_an_exact_number_of_validation_documents(source: Path, tmp_path: Path):
    for number in (1, 5, 39):
        meta = prepare([source], tmp_path / str(number), validation_documents=number)
        assert meta.splits["val"].documents == number
        assert meta.splits["train"].documents == 40 - number
    with pytest.raises(UserError, match="validation_documents: expected fewer than the 40 documents, got 40"):
        prepare([source], tmp_path / "all", validation_documents=40)
    assert not (tmp_path / "all").exists()


def test_one_long_document_among_short_ones_is_not_held_out(tmp_path: Path):
    source = write_documents(tmp_path / "a.jsonl", ["x" * 10_000, *some_documents()])
    for seed in range(5):
        meta = prepare([source], tmp_path / str(seed), seed=seed, validation_fraction=0.05)
        assert meta.splits["val"].tokens < 1500
    two = write_documents(tmp_path / "two.jsonl", ["x" * 10_000, "y" * 9_000])
    meta = prepare([two], tmp_path / "two", validation_fraction=0.01)
    assert meta.splits["val"].tokens == 9_001, "with long documents only, the shorter one"


def test_a_single_document_is_split_by_position(tmp_path: Path):
    text = "".join(f"{i} " for i in range(1000))
    (tmp_path / "a.txt").write_text(text)
    meta = prepare([tmp_path / "a.txt"], tmp_path / "out", validation_fraction=0.1)
    assert meta.validation == "position"
    train, val = TokenShards(tmp_path / "out"), TokenShards(tmp_path / "out", "val")
    assert len(val) == round(0.1 * (len(text) + 1))
    stream = [*train.read(0, len(train)), *val.read(0, len(val))]
    assert stream == [256, *text.encode()]
    assert val.starts.tolist() == [0]


def test_no_validation_split(source: Path, tmp_path: Path):
    meta = prepare([source], tmp_path / "out", validation_fraction=0)
    assert (meta.validation, meta.splits["val"].tokens) == ("none", 0)
    with pytest.raises(UserError, match="the split 'val' is empty"):
        TokenShards(tmp_path / "out", "val")


@pytest.fixture
def words() -> Tokenizer:
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.Fuse()
    return backend


def test_documents_end_with_eos_when_there_is_no_bos(tmp_path: Path, words: Tokenizer):
    source = write_documents(tmp_path / "a.jsonl", ["a b", "b", "a a a"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="[UNK]")
    meta = prepare([source], tmp_path / "out", tokenizer, validation_fraction=0)
    assert (meta.boundary, meta.boundary_id, meta.vocab_size) == ("eos", 1, 4)
    assert documents_of(TokenShards(tmp_path / "out")) == [[2, 3, 1], [3, 1], [2, 2, 2, 1]]


def test_documents_without_tokens_vanish_when_nothing_marks_them(tmp_path: Path, words: Tokenizer):
    source = write_documents(tmp_path / "a.jsonl", ["  ", "a b", " ", "b", "\n"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    meta = prepare([source], tmp_path / "out", tokenizer, validation_fraction=0)
    assert meta.boundary == "none"
    assert documents_of(TokenShards(tmp_path / "out")) == [[2, 3], [3]]


def test_a_vocabulary_with_a_hole_above_16_bits(tmp_path: Path):
    """Its number of tokens says uint16, its ids do not."""
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 70_000}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    source = write_documents(tmp_path / "a.jsonl", ["a b", "b b"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    meta = prepare([source], tmp_path / "out", tokenizer, validation_fraction=0)
    assert (meta.dtype, meta.vocab_size) == ("uint32", 70_001)
    assert documents_of(TokenShards(tmp_path / "out")) == [[0, 70_000], [70_000, 70_000]]


def test_progress_counts_up_to_the_whole(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(titans.data.prepare, "_BATCH_CHARACTERS", 500)
    seen: list[tuple[int, int, int]] = []
    meta = prepare([source], tmp_path / "out", progress=lambda *counts: seen.append(counts))
    assert len(seen) > 3
    assert seen == sorted(seen)
    assert seen[-1] == (40, sum(split.tokens for split in meta.splits.values()), source.stat().st_size)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_run_leaves_what_was_there(source: Path, tmp_path: Path, error: type[BaseException]):
    """Nothing at first, later the old folder: never half of a new one."""

    def fail(*counts: int) -> None:
        raise error

    before = set(os.listdir(tmp_path))
    with pytest.raises(error):
        prepare([source], tmp_path / "out", progress=fail)
    assert set(os.listdir(tmp_path)) == before
    prepare([source], tmp_path / "out")
    old = contents(tmp_path / "out")
    with pytest.raises(error):
        prepare([source], tmp_path / "out", seed=5, overwrite=True, progress=fail)
    assert contents(tmp_path / "out") == old
    assert set(os.listdir(tmp_path)) == before | {"out"}


def test_a_failure_while_writing_shards_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    before = set(os.listdir(tmp_path))
    monkeypatch.setattr(titans.data.prepare.Meta, "write", lambda self, folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare([source], tmp_path / "out")
    assert set(os.listdir(tmp_path)) == before


def test_a_bad_line_far_into_the_source_leaves_nothing(tmp_path: Path):
    path = write_documents(tmp_path / "a.jsonl", some_documents())
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(UserError, match=r"a\.jsonl, line 41: not JSON"):
        prepare([path], tmp_path / "out")
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_overwriting_replaces_only_what_prepare_made(source: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    prepare([source], out)  # an empty folder may be filled
    old = contents(out)
    with pytest.raises(UserError, match=r"out: exists already \(replace it with --overwrite\)"):
        prepare([source], out, seed=1)
    assert contents(out) == old
    prepare([source], out, seed=1, overwrite=True)
    assert contents(out) != old
    assert set(os.listdir(tmp_path)) == {"source.jsonl", "out"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(UserError, match="mine: exists and was not made by titans prepare"):
        prepare([source], tmp_path / "mine", overwrite=True)
    with pytest.raises(UserError, match=r"source\.jsonl: exists and is not a folder"):
        prepare([source], source, overwrite=True)


def test_a_target_inside_a_source_is_refused(tmp_path: Path):
    (tmp_path / "texts").mkdir()
    write_documents(tmp_path / "texts" / "a.jsonl", some_documents())
    with pytest.raises(UserError, match=r"out: lies inside the source .*texts"):
        prepare([tmp_path / "texts"], tmp_path / "texts" / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": 1.0}, r"validation_fraction: expected a number in \[0, 1\), got 1.0"),
        (
            {"validation_fraction": float("nan")},
            r"validation_fraction: expected a number in \[0, 1\), got nan",
        ),
        ({"validation_documents": -1}, "validation_documents: expected 0 or more, got -1"),
        ({"shard_size": 0}, "shard_size: expected at least 1 token, got 0"),
        ({"tokenizer": "nope"}, "tokenizer 'nope': no such file or folder"),
    ],
)
def test_bad_arguments(source: Path, tmp_path: Path, options: dict[str, object], message: str):
    with pytest.raises(UserError, match=message):
        prepare([source], tmp_path / "out", **options)  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == ["source.jsonl"]


def test_only_empty_documents(tmp_path: Path):
    source = write_documents(tmp_path / "a.jsonl", ["", ""])
    with pytest.raises(UserError, match=r"no documents in .*a\.jsonl \(2 empty ones\)"):
        prepare([source], tmp_path / "out")
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_books(data_dir: Path, tmp_path: Path):
    """Real text through the compressed path: every book whole, and bytes as dense as they should be."""
    path = data_dir / "books" / "books_val.jsonl.xz"
    if not path.is_file():
        pytest.skip(f"needs {path.name}")
    meta = prepare([path], tmp_path / "out", shard_size=1 << 22)
    assert sum(split.documents for split in meta.splits.values()) == 40
    shards = TokenShards(tmp_path / "out")
    assert len(meta.splits["train"].shards) == -(-len(shards) // (1 << 22))
    assert (shards.read(0, len(shards))[shards.starts] == 256).all()
    assert np.count_nonzero(shards.read(0, len(shards)) == 256) == len(shards.starts)
