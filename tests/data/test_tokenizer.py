"""Tokenizers: bytes round-trip, saved ones come back, text cannot forge tokens, bad files are named."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from titans.data.tokenizer import (
    TextEncoder,
    boundary_token,
    byte_tokenizer,
    is_byte_tokenizer,
    load_tokenizer,
    save_tokenizer,
)
from titans.errors import UserError

TEXT = "Grüße, 世界 😀\n\n  <bos> <s> </s> \x00 end"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    """A small trained byte-level BPE with <s> and </s>."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the cat sat on the mat and the hat"] * 3, trainer)
    return backend


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SentencePiece BPE with byte fallback, as Llama's."""
    sentencepiece = pytest.importorskip("sentencepiece")
    path = tmp_path_factory.mktemp("sentencepiece") / "small.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the cat sat on the mat", "a hat and a bat"] * 20),
            model_writer=file,
            vocab_size=300,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    return path


def test_byte_ids(tokenizer: PreTrainedTokenizerFast):
    assert (len(tokenizer), tokenizer.vocab_size) == (259, 259)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257, 258)
    assert tokenizer("aü").input_ids == [256, 97, 0xC3, 0xBC]
    assert tokenizer("aü", add_special_tokens=False).input_ids == list("aü".encode())
    assert is_byte_tokenizer(tokenizer)


@given(text=st.text())
def test_any_text_round_trips(tokenizer: PreTrainedTokenizerFast, text: str):
    ids = tokenizer(text).input_ids
    assert ids == [256, *text.encode()]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@given(data=st.binary())
def test_any_bytes_decode_as_python_replaces_them(tokenizer: PreTrainedTokenizerFast, data: bytes):
    """A model emits bytes that are no UTF-8, and a streamed piece may end inside a character."""
    assert tokenizer.decode(list(data)) == data.decode("utf-8", errors="replace")


def test_special_tokens_in_a_text_are_text(tokenizer: PreTrainedTokenizerFast):
    """Otherwise a document that writes "<bos>" would begin a new one in the middle."""
    assert tokenizer("<bos><pad>").input_ids == [256, *b"<bos><pad>"]
    assert tokenizer.decode([256, 97, 257], skip_special_tokens=True) == "a"
    assert tokenizer.decode([256, 97, 257]) == "<bos>a<eos>"


def test_batches_are_padded_on_the_left(tokenizer: PreTrainedTokenizerFast):
    batch = tokenizer(["a", "bcd"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[258, 258, 256, 97], [256, 98, 99, 100]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    collated = DataCollatorWithPadding(tokenizer)([tokenizer("a"), tokenizer("bc")])
    assert collated["input_ids"].tolist() == [[258, 256, 97], [256, 98, 99]]


@pytest.mark.parametrize(
    "load", [load_tokenizer, AutoTokenizer.from_pretrained, PreTrainedTokenizerFast.from_pretrained]
)
def test_a_saved_byte_tokenizer_comes_back_even_without_this_package(tokenizer, load, tmp_path: Path):
    save_tokenizer(tokenizer, tmp_path)
    loaded = load(str(tmp_path))
    assert loaded(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert is_byte_tokenizer(loaded)
    assert loaded.padding_side == "left"
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (256, 257, 258)


def test_a_bare_tokenizer_json_and_its_folder_load_with_their_special_tokens(bpe: Tokenizer, tmp_path: Path):
    bpe.save(str(tmp_path / "tokenizer.json"))
    for spec in (tmp_path / "tokenizer.json", tmp_path):
        loaded = load_tokenizer(spec)
        assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<s>", "</s>", None)
        assert boundary_token(loaded) == ("bos", bpe.token_to_id("<s>"))
    save_tokenizer(loaded, tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved" / "tokenizer.json").bos_token == "<s>"


def test_boundary_is_eos_without_bos_and_none_without_either(bpe: Tokenizer):
    with_eos = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")
    assert boundary_token(with_eos) == ("eos", bpe.token_to_id("</s>"))
    assert boundary_token(PreTrainedTokenizerFast(tokenizer_object=bpe)) == ("none", None)


def test_encoder_ignores_truncation_and_special_tokens_of_a_tokenizer_json(bpe: Tokenizer):
    """A tokenizer.json may say "truncation": documents would silently lose their ends."""
    limited = Tokenizer.from_str(bpe.to_str())
    limited.enable_truncation(max_length=4)
    limited.enable_padding(length=8)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=limited, bos_token="<s>", eos_token="</s>")
    text = "the cat </s> sat on the mat " * 5
    (ids,) = TextEncoder(tokenizer)([text])
    assert tokenizer.decode(ids.tolist()) == text
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids.tolist())
    assert tokenizer.backend_tokenizer.truncation is not None, "the caller's tokenizer was changed"


@pytest.mark.parametrize("kind", ["bytes", "bpe", "sentencepiece", "slow"])
def test_encoder_agrees_with_the_tokenizer(kind: str, tokenizer, bpe, request: pytest.FixtureRequest):
    loaded: PreTrainedTokenizerBase = tokenizer
    if kind == "bpe":
        loaded = PreTrainedTokenizerFast(tokenizer_object=bpe)
    elif kind == "sentencepiece":
        loaded = load_tokenizer(request.getfixturevalue("sentencepiece_model"))
    elif kind == "slow":
        from transformers import ByT5Tokenizer

        loaded = ByT5Tokenizer()
    texts = ["the cat", "ü 😀\n", "x"]
    expected = [loaded.encode(text, add_special_tokens=False) for text in texts]
    encoded = TextEncoder(loaded)(texts)
    assert [ids.tolist() for ids in encoded] == expected
    assert all(np.issubdtype(ids.dtype, np.integer) for ids in encoded)


def test_sentencepiece_is_exact_and_comes_back(sentencepiece_model: Path, tmp_path: Path):
    import sentencepiece

    original = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    loaded = load_tokenizer(sentencepiece_model)
    save_tokenizer(loaded, tmp_path)
    again = load_tokenizer(tmp_path)
    for candidate in (loaded, again):
        assert len(candidate) == original.get_piece_size()
        assert candidate(TEXT).input_ids == [original.bos_id(), *original.encode(TEXT)]
        assert candidate.decode(candidate(TEXT).input_ids, skip_special_tokens=True) == TEXT
        assert candidate.eos_token_id == original.eos_id()
        assert candidate.padding_side == "left"
    assert load_tokenizer(tmp_path / "tokenizer.model")("a").input_ids == loaded("a").input_ids


def test_llama_2_model(data_dir: Path):
    """The paper's tokenizer: 32,000 pieces, byte fallback, <s> first."""
    path = data_dir / "tokenizer" / "llama2_tokenizer.model"
    if not path.is_file():
        pytest.skip(f"needs {path.name}")
    pytest.importorskip("sentencepiece")
    loaded = load_tokenizer(path)
    assert (len(loaded), loaded.bos_token_id, loaded.eos_token_id) == (32000, 1, 2)
    assert loaded("Hello this is a test").input_ids == [1, 15043, 445, 338, 263, 1243]
    assert loaded.decode(loaded(TEXT).input_ids, skip_special_tokens=True) == TEXT


def test_bad_tokenizers_are_named(tmp_path: Path):
    pytest.importorskip("sentencepiece")
    for name, contents, message in [
        ("nope", None, r"tokenizer '.*nope': no such file or folder \(expected 'bytes'"),
        ("a.model", b"no model", r"a\.model: not a SentencePiece model"),
        ("tokenizer.json", b"{", r"tokenizer '.*tokenizer\.json' cannot be read: EOF"),
        ("tokenizer_config.json", b"{", r"tokenizer '.*' cannot be read: Expecting property name"),
    ]:
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        if contents is not None:
            (folder / name).write_bytes(contents)
        spec = folder if name == "tokenizer_config.json" else folder / name
        with pytest.raises(UserError, match=message) as error:
            load_tokenizer(spec)
        assert "\n" not in str(error.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="the folder holds no tokenizer"):
        load_tokenizer(tmp_path / "empty")


def test_without_sentencepiece_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.model").touch()
    monkeypatch.setitem(sys.modules, "titans.data.sentencepiece", None)
    with pytest.raises(
        UserError, match=r"needs the package 'sentencepiece': pip install 'titans-ltm\[sentencepi"
    ):
        load_tokenizer(tmp_path / "a.model")


def test_a_checkpoint_folder_with_a_model_beside_the_tokenizer(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    """Trainer saves both into one folder; AutoTokenizer then also looks at config.json."""
    save_tokenizer(tokenizer, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "titans", "vocab_size": 259}))
    assert is_byte_tokenizer(load_tokenizer(tmp_path))
