"""Probes that every variant must pass, in float64 with randomised weights: a difference of 1e-9 is a leak."""

import math
from dataclasses import fields, is_dataclass
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titans.ops import neural_memory

TOLERANCE = {"rtol": 0, "atol": 1e-9}
LENGTH = 29


def feed(model, ids, lengths, **kwargs):
    """Logits of the pieces of `ids`, one after another through the cache, and that cache."""
    cache, logits = None, []
    for piece in ids.split(lengths, dim=1):
        out = model(piece, past_key_values=cache, use_cache=True, **kwargs)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, dim=1), cache


@torch.no_grad()
@pytest.mark.parametrize("cut", [1, 7, 8, 9, 17])
def test_no_future_leak(variant, build, tokens, cut):
    """Logits before a token do not change with it: MAC's recalled tokens would be the first to leak."""
    model, ids = build(variant), tokens(2, LENGTH)
    other = torch.cat([ids[:, :cut], (ids[:, cut:] + 2) % 20 + 3], dim=1)  # every later token is another
    before, after = model(ids).logits, model(other).logits
    torch.testing.assert_close(before[:, :cut], after[:, :cut], **TOLERANCE)
    assert (before[:, cut:] - after[:, cut:]).abs().amax(-1).min() > 1e-6, "later logits must notice"


@torch.no_grad()
def test_no_batch_leak(variant, build, tokens):
    """A row's answers do not depend on the other rows."""
    model, ids = build(variant), tokens(3, LENGTH)
    other = ids.clone()
    other[1] = tokens(1, LENGTH, seed=2)[0]
    before, after = model(ids).logits, model(other).logits
    torch.testing.assert_close(before[[0, 2]], after[[0, 2]], **TOLERANCE)
    assert not torch.allclose(before[1], after[1])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"memory_depth": 1},
        {"memory_momentum": False, "memory_forget_gate": "none", "memory_forget_per_channel": False},
        {"memory_step_gate": "hard", "memory_forget_gate": "sigmoid", "tie_word_embeddings": False},
    ],
    ids=["default", "linear", "delta-rule", "hard-step"],
)
def test_every_parameter_gets_gradient_at_initialisation(variant, fresh, tokens, fields):
    """A parameter without gradient is a dead one, and breaks distributed training."""
    model, ids = fresh(variant, **fields), tokens(2, LENGTH)
    model(ids, labels=ids).loss.backward()
    dead = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.isfinite().all() or not parameter.grad.any()
    ]
    assert not dead


@torch.no_grad()
@settings(max_examples=10)
@given(data=st.data())
def test_any_partition_is_one_call(variant, build, tokens, data):
    """Prefill, steps and pieces of any length agree: nothing is lost or counted twice at a cut."""
    cuts = data.draw(st.sets(st.integers(1, LENGTH - 1)))
    bounds = [0, *sorted(cuts), LENGTH]
    lengths = [stop - start for start, stop in pairwise(bounds)]
    model, ids = build(variant), tokens(2, LENGTH)
    pieces, _ = feed(model, ids, lengths)
    torch.testing.assert_close(pieces, model(ids).logits, **TOLERANCE)


@torch.no_grad()
def test_token_by_token_is_one_call(variant, build, tokens):
    """Decoding: also where windows, segments and persistent tokens are missing or as small as they get."""
    for sizes in ({}, {"num_persistent_tokens": 0}, {"window_size": 1, "segment_size": 4, "conv_size": 1}):
        model, ids = build(variant, **sizes), tokens(2, LENGTH)
        steps, _ = feed(model, ids, [1] * LENGTH)
        torch.testing.assert_close(steps, model(ids).logits, **TOLERANCE)


def test_gradients_flow_through_the_cache(variant, build, tokens):
    """Backpropagation through pieces equals that through one call, initial memory included."""
    model, ids = build(variant).train(), tokens(2, LENGTH)
    weights = torch.randn(2, LENGTH, model.config.vocab_size, dtype=torch.float64)

    def gradients(logits):
        model.zero_grad()
        (logits * weights).sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    whole = gradients(model(ids).logits)
    pieces = gradients(feed(model, ids, [3, 11, 15])[0])
    for got, expected in zip(pieces, whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "inside"])
@pytest.mark.parametrize("lengths", [[LENGTH], [9, 1, 1, 1, 17], [20, 9]])
def test_padded_rows_answer_as_alone(variant, build, tokens, side, lengths):
    """Padding is skipped as if it were not there: no conv, chunk, segment or window counts it."""
    model, ids = build(variant), tokens(3, LENGTH)
    mask = padding(side, [LENGTH, 11, 20])
    cache, logits = None, []
    for piece, piece_mask in zip(ids.split(lengths, 1), mask.split(lengths, 1), strict=True):
        out = model(piece, attention_mask=piece_mask, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    logits = torch.cat(logits, dim=1)
    for row in range(3):
        real = mask[row].bool()
        alone = model(ids[row : row + 1, real]).logits[0]
        torch.testing.assert_close(logits[row, real], alone, **TOLERANCE)


def padding(side, lengths):
    """A mask `[B, LENGTH]` with so many ones in each row."""
    mask = torch.zeros(len(lengths), LENGTH, dtype=torch.long)
    for row, length in enumerate(lengths):
        if side == "left":
            mask[row, LENGTH - length :] = 1
        elif side == "right":
            mask[row, :length] = 1
        else:
            mask[row, torch.randperm(LENGTH)[:length]] = 1
    return mask


@torch.no_grad()
def test_a_mask_may_hold_the_history(variant, build, tokens):
    """`generate` passes the mask of everything so far; only the new tokens' columns are news."""
    model, ids, mask = build(variant), tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    cache = model(ids[:, :8], attention_mask=mask[:, :8], use_cache=True).past_key_values
    rest = model(ids[:, 8:], attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(rest, model(ids, attention_mask=mask).logits[:, 8:], **TOLERANCE)


@torch.no_grad()
def test_packed_documents_answer_as_alone(variant, build, tokens):
    """Nothing crosses documents, at any length and also not through the cache; empty ones are allowed."""
    model, ids = build(variant), tokens(1, 87)
    bounds = [0, 11, 11, 12, 30, 87]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    out = model(ids, cu_seqlens=cu_seqlens, use_cache=True)
    more = model(
        ids[:, :5], cu_seqlens=torch.arange(6, dtype=torch.int32), past_key_values=out.past_key_values
    )
    for row, (start, stop) in enumerate(pairwise(bounds)):
        document = torch.cat([ids[:, start:stop], ids[:, row : row + 1]], dim=1)
        alone = model(document).logits
        torch.testing.assert_close(out.logits[:, start:stop], alone[:, :-1], **TOLERANCE)
        torch.testing.assert_close(more.logits[:, row], alone[:, -1], **TOLERANCE)


def test_packed_gradients_are_the_sum_of_the_documents(variant, build, tokens):
    """Training on packed documents is training on each, whatever lies beside it."""
    model, ids = build(variant).train(), tokens(1, 40)
    weights = torch.randn(1, 40, model.config.vocab_size, dtype=torch.float64)
    bounds = [0, 19, 23, 40]

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    packed = gradients(
        (model(ids, cu_seqlens=torch.tensor(bounds, dtype=torch.int32)).logits * weights).sum()
    )
    parts = [(model(ids[:, a:b]).logits * weights[:, a:b]).sum() for a, b in pairwise(bounds)]
    for got, expected in zip(packed, gradients(sum(parts)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_ten_million_tokens_in_nothing_changes(variant, build, tokens):
    """Counters shifted by 10 million periods give the same answers: no absolute position anywhere."""
    model, ids = build(variant), tokens(2, LENGTH)
    period = math.lcm(model.config.chunk_size, model.config.segment_size)
    for first in (7, 8, 16):
        _, cache = feed(model, ids[:, :first], [first])
        _, far = feed(model, ids[:, :first], [first])
        far.seen += 10_000_000 * period
        near_logits = model(ids[:, first:], past_key_values=cache).logits
        far_logits = model(ids[:, first:], past_key_values=far).logits
        assert torch.equal(near_logits, far_logits)
        assert far.get_seq_length() == 10_000_000 * period + LENGTH


@torch.no_grad()
def test_a_stream_needs_constant_memory(variant, build, tokens):
    """The state after 200 tokens is as large as after 40, every counter but the length seen included."""
    model, ids = build(variant), tokens(1, 200)
    _, short = feed(model, ids[:, :40], [40])
    _, long = feed(model, ids, [40] * 5)
    assert describe(short.states) == describe(long.states)


def describe(value):
    """Shapes of all tensors and the values of all integers in nested states."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if is_dataclass(value):
        return {field.name: describe(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    return value


@torch.no_grad()
def test_the_answer_does_not_depend_on_the_implementation(build, tokens, monkeypatch):
    """The models on the token-by-token reference: the chunked op is used as it is meant to be."""
    ids = tokens(2, LENGTH)
    for variant in ("lmm", "mac"):
        model = build(variant)
        chunked = model(ids).logits
        with monkeypatch.context() as patch:
            patch.setattr("titans.nn.memory.neural_memory", partial(neural_memory, impl="reference"))
            torch.testing.assert_close(model(ids).logits, chunked, rtol=0, atol=1e-8)
