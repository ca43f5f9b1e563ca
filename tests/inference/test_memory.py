"""`Memory` from Python: what was saved goes on to the bit, and asking changes nothing."""

import shutil

import pytest
import torch

import titans
from tests.inference.saved import TEXT, checkpoint, word_tokenizer
from tests.inference.tiny import randomised
from tests.training.tiny import tiny_model as llama
from titans import Memory
from titans.data.tokenizer import byte_tokenizer
from titans.errors import UserError
from titans.inference.fingerprint import model_fingerprint, tokenizer_fingerprint
from titans.inference.memory_file import read_memory
from titans.models import VARIANTS, TitansConfig
from titans.models.state import leaves


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("checkpoint"))


def state(memory):
    return {**leaves(memory.stream.cache.states), "logits": memory.stream.logits}


def assert_equal(one, other):
    """To the bit, anchors at the start of a chunk aside, which mean nothing."""
    ours, theirs = state(one), state(other)
    assert ours.keys() == theirs.keys()
    for name, leaf in ours.items():
        at_start = ".anchor." in name and not ours[f"{name.rpartition('.anchor.')[0]}.position"].any()
        if isinstance(leaf, int):
            assert leaf == theirs[name], name
        elif not at_start:
            assert leaf.dtype == theirs[name].dtype, name
            assert torch.equal(leaf, theirs[name]), name
    assert one.stream.tokens_read == other.stream.tokens_read
    assert one.sources == other.sources


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("first", [1, 23, 40])
def test_a_saved_memory_goes_on_to_the_bit(tmp_path, variant, first, dtype):
    """Saved inside a chunk, a window and a segment, and (23 bytes, <bos> and 8 for MAC) where they end."""
    model = checkpoint(tmp_path / "model", variant, dtype=dtype)
    kept = Memory.new(model)
    kept.read(TEXT[:first], "beginning")
    kept.save(tmp_path / "x.memory")
    loaded = Memory.load(tmp_path / "x.memory")
    assert_equal(loaded, kept)
    for memory in (kept, loaded):
        memory.read(TEXT[first:100])
    assert_equal(loaded, kept)
    assert loaded.stream.step(65).equal(kept.stream.step(65))


def test_reading_in_calls_is_reading_at_once(tmp_path):
    """In float64: the tiny model's random dynamics blow rounding up a thousandfold every hundred bytes."""
    folder = checkpoint(tmp_path, dtype=torch.float64)
    whole, parts = Memory.new(folder), Memory.new(folder, piece=7)
    whole.read(TEXT[:120])
    for start in range(0, 120, 30):
        parts.read(TEXT[start : start + 30])
    torch.testing.assert_close(parts.stream.logits, whole.stream.logits, rtol=1e-9, atol=1e-9)
    assert parts.stream.tokens_read == whole.stream.tokens_read == 1 + len(TEXT[:120].encode())


def test_asking_reads_nothing(folder, tmp_path):
    memory = Memory.new(folder)
    memory.read(TEXT[:100])
    memory.save(tmp_path / "before")
    answers = [memory.ask("line 1: ", max_new_tokens=20, seed=3) for _ in range(2)]
    assert answers[0] == answers[1] != memory.ask("line 1: ", max_new_tokens=20, seed=4)
    memory.save(tmp_path / "after")
    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes()


def test_the_answer_is_the_models_after_text_and_question(folder):
    memory = Memory.new(folder)
    memory.read(TEXT[:100])
    ids = [256, *f"{TEXT[:100]}what".encode()]
    expected = []
    for _ in range(8):
        with torch.no_grad():
            token = int(memory.stream.model(torch.tensor([[*ids, *expected]])).logits[0, -1].argmax())
        if token in (256, 257):
            break
        expected.append(token)
    answer = memory.ask("what", max_new_tokens=8, greedy=True)
    assert answer == memory.tokenizer.decode(expected)


def test_an_empty_question_continues_the_text_and_an_empty_memory_has_none(folder):
    memory = Memory.new(folder)
    with pytest.raises(UserError, match="prompt is empty"):
        memory.ask("")
    assert memory.ask("abc", max_new_tokens=5, greedy=True)
    memory.read("abc")
    assert memory.ask("", max_new_tokens=5, greedy=True) == Memory.new(folder).ask(
        "abc", max_new_tokens=5, greedy=True
    )


def test_a_memory_that_has_read_nothing_is_a_file_too(folder, tmp_path):
    Memory.new(folder).save(tmp_path / "x")
    loaded, new = Memory.load(tmp_path / "x"), Memory.new(folder)
    for memory in (loaded, new):
        memory.read("abc")
    assert_equal(loaded, new)


def test_a_reading_that_fails_leaves_the_memory_as_it_was(folder, monkeypatch):
    memory, same = Memory.new(folder, piece=16), Memory.new(folder, piece=16)
    for each in (memory, same):
        each.read(TEXT[:50])
    calls = []

    def interrupted(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(*arguments, **keywords)

    forward = memory.stream.model.forward
    monkeypatch.setattr(memory.stream.model, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        memory.read(TEXT)
    assert_equal(memory, same)


def test_the_file_says_what_was_read(folder, tmp_path):
    memory = Memory.new(folder)
    memory.read("hé", "greeting")
    memory.save(tmp_path / "x")
    header = read_memory(tmp_path / "x").header
    assert (header.tokens_read, header.variant, header.dtype) == (4, "mac", "float32")
    assert header.sources[0].name == "greeting"
    # printf 'h\xc3\xa9' | sha256sum
    assert header.sources[0].sha256 == "7dfbe0eab96510b11c9a2671d83019cd52953211294db5f917ffa0b7cc84f534"
    assert header.sources[0].bytes == 3
    assert header.reading is None


def test_other_models_and_tokenizers_are_refused(folder, tmp_path):
    memory = Memory.new(folder)
    memory.read("abc")
    memory.save(tmp_path / "x")
    other = checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(
        UserError, match=r"x: made with another model: expected fingerprint \w{12}, the model"
    ):
        Memory.load(tmp_path / "x", other)
    with pytest.raises(UserError, match="made with another tokenizer"):
        Memory.load(tmp_path / "x", folder, tokenizer=word_tokenizer())
    # The model's place is a hint: anywhere else will do as well.
    shutil.copytree(folder, tmp_path / "moved")
    assert_equal(Memory.load(tmp_path / "x", tmp_path / "moved"), memory)


def test_a_model_that_is_gone_is_asked_for(tmp_path):
    model = checkpoint(tmp_path / "model")
    Memory.new(model).save(tmp_path / "x")
    model.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"its model is no longer at .*model: name it"):
        Memory.load(tmp_path / "x")


def test_models_at_hand_need_their_tokenizer():
    with pytest.raises(UserError, match="tokenizer: expected the model's tokenizer"):
        Memory.new(randomised("mac"))
    with pytest.raises(UserError, match="expected a Titans model, got LlamaForCausalLM"):
        Memory.new(llama(), byte_tokenizer())


def test_a_new_switch_leaves_fingerprints_as_they_were(monkeypatch):
    """A memory file that was made before the library had the switch is still of the same model."""
    model = randomised("mac")
    same = model_fingerprint(model)
    monkeypatch.setitem(TitansConfig.__annotations__, "memory_new", str)
    monkeypatch.setattr(TitansConfig, "memory_new", "off", raising=False)
    assert model_fingerprint(model) == same
    model.config.memory_new = "on"
    assert model_fingerprint(model) != same


def test_fingerprints_tell_what_matters_apart():
    model = randomised("mac")
    same = model_fingerprint(model)
    assert model_fingerprint(randomised("mac")) == same
    model.config.use_cache = False
    assert model_fingerprint(model) == same
    assert model_fingerprint(randomised("mac", segment_size=16)) != same
    assert model_fingerprint(randomised("mac").float()) != same
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-9
    assert model_fingerprint(model) != same

    tokenizer = byte_tokenizer()
    fingerprint = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)  # changes the backend's settings
    assert tokenizer_fingerprint(tokenizer) == fingerprint
    assert tokenizer_fingerprint(word_tokenizer()) != fingerprint


def test_it_is_exported_lazily():
    assert titans.Memory is Memory
    with pytest.raises(AttributeError, match="no attribute 'Memry'"):
        _ = titans.Memry
