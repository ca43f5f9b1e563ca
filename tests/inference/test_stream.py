"""Whatever the pieces, a stream gives the answer of one forward pass, in constant memory."""

import pytest
import torch
import torch.nn.functional as F

from tests.inference.tiny import SIZES, tiny, tokens
from tests.training.tiny import tiny_model as llama
from titans.inference import stream as stream_module
from titans.inference.stream import Stream
from titans.models import VARIANTS
from titans.models.state import leaves

MEMORY_VARIANTS = [variant for variant in VARIANTS if variant != "attention"]
LENGTH = 61  # ends inside a chunk (4), a window (6) and a segment (8)


def states(stream):
    return leaves(stream.cache.states)


def assert_same_state(one, other, exact):
    ours, theirs = states(one), states(other)
    assert ours.keys() == theirs.keys()
    for name, leaf in ours.items():
        if isinstance(leaf, int) or exact:
            assert leaf == theirs[name] if isinstance(leaf, int) else torch.equal(leaf, theirs[name]), name
        else:
            torch.testing.assert_close(leaf, theirs[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("piece", [1, 3, 8, 16, 1000])
def test_pieces_change_nothing(variant, piece):
    """Logits, losses and the whole state, in float64, against one forward pass without a cache."""
    model, ids = tiny(variant), tokens(LENGTH)
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    expected = F.cross_entropy(logits[:-1], ids[1:], reduction="none")
    whole, stream, losses = (Stream(model, piece=size) for size in (1000, piece, piece))
    whole.read(ids)
    torch.testing.assert_close(stream.read(ids), logits[-1], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(losses.losses(ids), expected, rtol=1e-9, atol=1e-11)
    assert torch.equal(losses.logits, stream.logits)
    assert stream.tokens_read == losses.tokens_read == LENGTH
    assert_same_state(stream, whole, exact=False)
    assert_same_state(stream, losses, exact=True)


@pytest.mark.parametrize("variant", MEMORY_VARIANTS)
@torch.no_grad()
def test_pieces_change_no_more_than_rounding_in_float32(variant):
    """The mean error against float64 over six texts is at most twice that of one forward pass."""
    exact_model, model = tiny(variant), tiny(variant).float()
    errors = []
    for ids in (tokens(LENGTH, seed) for seed in range(6)):
        exact = exact_model(ids[None]).logits[0, -1]
        answers = [
            model(ids[None]).logits[0, -1],
            *(Stream(model, piece=size).read(ids) for size in (5, 16)),
        ]
        errors.append([float((answer - exact).norm() / exact.norm()) for answer in answers])
    once, *pieces = torch.tensor(errors).mean(dim=0).tolist()
    assert max(pieces) <= 2 * once < 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_calls_and_steps_continue_exactly(variant):
    """`read` in several calls, `losses` after `read`, and token by token: one stream."""
    model, ids = tiny(variant), tokens(LENGTH)
    whole, stepped = Stream(model), Stream(model)
    losses = whole.losses(ids)
    stepped.read(ids[:20])
    rest = stepped.losses(ids[20:40])
    torch.testing.assert_close(rest, losses[19:39], rtol=1e-9, atol=1e-11)
    for token in ids[40:].tolist():
        logits = stepped.step(token)
    torch.testing.assert_close(logits, whole.logits, rtol=1e-9, atol=1e-11)
    assert stepped.tokens_read == LENGTH


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fork_leaves_its_origin_alone(variant):
    model, ids = tiny(variant), tokens(LENGTH)
    stream = Stream(model, piece=7)
    stream.read(ids[:30])
    before = {name: leaf if isinstance(leaf, int) else leaf.clone() for name, leaf in states(stream).items()}
    fork = stream.fork()
    fork.read(ids[30:])
    fork.step(5)
    assert (stream.tokens_read, fork.tokens_read) == (30, LENGTH + 1)
    for name, leaf in states(stream).items():
        assert leaf == before[name] if isinstance(leaf, int) else torch.equal(leaf, before[name]), name
    alone = Stream(model, piece=7)
    alone.read(ids[:30])
    assert torch.equal(alone.read(ids[30:]), stream.read(ids[30:]))


def test_a_fork_of_nothing_starts_anew():
    model = tiny("mac")
    assert torch.equal(Stream(model).fork().read(tokens(9)), Stream(model).read(tokens(9)))


@pytest.mark.parametrize("variant", MEMORY_VARIANTS)
def test_the_state_has_a_constant_size_and_nothing_larger_behind_it(variant):
    """A tail that is a view of a whole piece would keep the piece alive."""
    model, sizes = tiny(variant), set()
    stream = Stream(model, piece=24)
    for _ in range(3):
        stream.read(tokens(48))  # a multiple of chunk and segment, longer than the window
        tensors = [leaf for leaf in states(stream).values() if not isinstance(leaf, int)]
        assert all(leaf.untyped_storage().nbytes() == leaf.nbytes for leaf in tensors)
        sizes.add(sum(leaf.nbytes for leaf in tensors))
    assert len(sizes) == 1


def test_logits_of_a_large_vocabulary_are_made_in_parts(monkeypatch):
    """At most so many logits at once, with the same losses."""
    model, ids = tiny("mag"), tokens(LENGTH)
    expected = Stream(model).losses(ids)
    rows = []
    model.lm_head.register_forward_hook(lambda module, inputs, logits: rows.append(len(logits)))
    monkeypatch.setattr(stream_module, "_LOGITS", 7 * SIZES["vocab_size"])
    torch.testing.assert_close(Stream(model).losses(ids), expected, rtol=1e-9, atol=1e-11)
    assert rows == [7] * 8 + [5]


def test_progress_counts_the_tokens_of_the_call():
    stream, seen = Stream(tiny("lmm"), piece=8), []
    stream.read(tokens(3))
    stream.read(tokens(20), seen.append)
    assert seen == [8, 16, 20]


def test_a_model_of_another_library_streams_too():
    model, ids = llama().eval(), tokens(40)
    whole = Stream(model, piece=1000)
    torch.testing.assert_close(Stream(model, piece=9).losses(ids), whole.losses(ids), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="expected a Titans model"):
        whole.fork()


def test_mistakes_are_named():
    model = tiny("lmm")
    with pytest.raises(ValueError, match="piece: expected at least 1"):
        Stream(model, piece=0)
    with pytest.raises(ValueError, match=r"ids: expected shape \[T\]"):
        Stream(model).read(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"ids: expected shape \[T\]"):
        Stream(model).read(torch.zeros(0, dtype=torch.int64))
    batch = model(torch.zeros(2, 3, dtype=torch.int64), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="expected one row, got 2"):
        Stream(model, batch)
