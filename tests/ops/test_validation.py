"""Every mistake in the arguments gets an error that names the argument, what was expected and what came."""

import re
from dataclasses import replace

import pytest
import torch

from titans.ops import MemorySpec, MemoryState, neural_memory, read_memory, resolve_implementation
from titans.testing import random_inputs

MLP = MemorySpec(dim=4, depth=2, expansion=2)
DENSE = {"batch": 2, "tokens": 5, "heads": 3, "dtype": torch.float32}


def changed(**changes):
    """A good dense call with some arguments replaced, or computed from the good ones."""
    good = random_inputs(MLP, **DENSE)
    return replace(
        good, **{name: change(good) if callable(change) else change for name, change in changes.items()}
    )


def changed_state(**changes):
    return changed(state=lambda x: replace(x.state, **{name: f(x.state) for name, f in changes.items()}))


def first_layer(tensors, change):
    return (change(tensors[0]), *tensors[1:])


def random_state(spec, rows, heads=3):
    return random_inputs(spec, batch=rows, tokens=1, heads=heads, dtype=torch.float32).state


CASES = {
    "q is not four-dimensional": (
        lambda: changed(q=lambda x: x.q[0]),
        "q must have shape [B, T, H, D], got [5, 3, 4]",
    ),
    "no tokens": (
        lambda: random_inputs(MLP, **DENSE).tokens(0, 0),
        "q must hold at least one token, got T = 0",
    ),
    "another head width": (
        lambda: changed(q=lambda x: x.q[..., :2]),
        "q must have head width spec.dim = 4, got 2",
    ),
    "q of integers": (
        lambda: changed(q=lambda x: x.q.long()),
        "q must be a floating-point tensor, got torch.int64",
    ),
    "k of another length": (
        lambda: changed(k=lambda x: x.k[:, :4]),
        "k must have shape [B, T, H, D] = [2, 5, 3, 4], got [2, 4, 3, 4]",
    ),
    "v of another batch": (
        lambda: changed(v=lambda x: x.v[:1]),
        "v must have shape [B, T, H, D] = [2, 5, 3, 4], got [1, 5, 3, 4]",
    ),
    "v of another dtype": (
        lambda: changed(v=lambda x: x.v.bfloat16()),
        "v must have dtype torch.float32 like q, got torch.bfloat16",
    ),
    "k on another device": (
        lambda: changed(k=lambda x: x.k.to("meta")),
        "k must be on cpu like q, got meta",
    ),
    "chunk of zero": (
        lambda: changed(chunk_size=0),
        "chunk_size must be a positive integer, got 0",
    ),
    "chunk that is no integer": (
        lambda: changed(chunk_size=16.0),
        "chunk_size must be a positive integer, got 16.0",
    ),
    "chunk that is a bool": (
        lambda: changed(chunk_size=True),
        "chunk_size must be a positive integer, got True",
    ),
    "packed with two rows": (
        lambda: changed(cu_seqlens=torch.tensor([0, 5], dtype=torch.int32)),
        "cu_seqlens needs packed inputs with B = 1, got B = 2",
    ),
    "cu_seqlens of int64": (
        lambda: replace(random_inputs(MLP, documents=[2, 3]), cu_seqlens=torch.tensor([0, 2, 5])),
        "cu_seqlens must be int32 of shape [N + 1] with N >= 1, got torch.int64 of shape [3]",
    ),
    "cu_seqlens with one number": (
        lambda: replace(random_inputs(MLP, documents=[5]), cu_seqlens=torch.tensor([0]).int()),
        "cu_seqlens must be int32 of shape [N + 1] with N >= 1, got torch.int32 of shape [1]",
    ),
    "cu_seqlens of another number of documents": (
        lambda: replace(random_inputs(MLP, documents=[2, 3]), cu_seqlens=torch.tensor([0, 5]).int()),
        "state.weights[0] must have shape [B, H, D_in, D_out] = [1, 2, 4, 8], got [2, 2, 4, 8]",
    ),
    "theta without heads": (
        lambda: changed(theta=lambda x: x.theta[..., 0]),
        "theta must have shape [B, T, H] = [2, 5, 3] or [B, T, H, L] = [2, 5, 3, 2], got [2, 5]",
    ),
    "theta for too many layers": (
        lambda: changed(theta=torch.zeros(2, 5, 3, 3)),
        "theta must have shape [B, T, H] = [2, 5, 3] or [B, T, H, L] = [2, 5, 3, 2], got [2, 5, 3, 3]",
    ),
    "theta of integers": (
        lambda: changed(theta=torch.zeros(2, 5, 3, dtype=torch.int64)),
        "theta must be a floating-point tensor, got torch.int64",
    ),
    "theta on another device": (
        lambda: changed(theta=torch.zeros(2, 5, 3, device="meta")),
        "theta must be on cpu like q, got meta",
    ),
    "log_decay of another length": (
        lambda: changed(log_decay=torch.zeros(2, 6, 3)),
        "log_decay must have shape [B, T, H] = [2, 5, 3] or [B, T, H, L] = [2, 5, 3, 2], got [2, 6, 3]",
    ),
    "log_decay for too few layers": (
        lambda: changed(log_decay=(torch.zeros(2, 5, 3, 8),)),
        "log_decay as a tuple must hold spec.depth = 2 tensors, got 1",
    ),
    "channel-wise log_decay of the wrong width": (
        lambda: changed(log_decay=(torch.zeros(2, 5, 3, 8), torch.zeros(2, 5, 3, 8))),
        "log_decay[1] must have shape [B, T, H, D_out] = [2, 5, 3, 4], got [2, 5, 3, 8]",
    ),
    "channel-wise log_decay of integers": (
        lambda: changed(log_decay=(torch.zeros(2, 5, 3, 8).long(), torch.zeros(2, 5, 3, 4))),
        "log_decay[0] must be a floating-point tensor, got torch.int64",
    ),
    "channel-wise log_decay on another device": (
        lambda: changed(log_decay=(torch.zeros(2, 5, 3, 8), torch.zeros(2, 5, 3, 4, device="meta"))),
        "log_decay[1] must be on cpu like q, got meta",
    ),
    "log_momentum of another shape": (
        lambda: changed(log_momentum=torch.zeros(2, 5)),
        "log_momentum must have shape [B, T, H] = [2, 5, 3] or [B, T, H, L] = [2, 5, 3, 2], got [2, 5]",
    ),
    "the state of another depth": (
        lambda: changed(state=random_state(MemorySpec(dim=4, depth=1), rows=2)),
        "state.weights must hold spec.depth = 2 tensors, got 1: is it the state of another spec?",
    ),
    "the state of another expansion": (
        lambda: changed(state=random_state(MemorySpec(dim=4, depth=2, expansion=4), rows=2)),
        "state.weights[0] must have shape [B, H, D_in, D_out] = [2, 3, 4, 8], got [2, 3, 4, 16]",
    ),
    "the state of another batch": (
        lambda: changed(state=random_state(MLP, rows=1)),
        "state.weights[0] must have shape [B, H, D_in, D_out] = [2, 3, 4, 8], got [1, 3, 4, 8]",
    ),
    "the state of another number of heads": (
        lambda: changed(state=random_state(MLP, rows=2, heads=2)),
        "state.weights[0] must have shape [B, H, D_in, D_out] = [2, 3, 4, 8], got [2, 2, 4, 8]",
    ),
    "momentum of another shape": (
        lambda: changed_state(momentum=lambda s: first_layer(s.momentum, lambda t: t.mT)),
        "state.momentum[0] must have shape [B, H, D_in, D_out] = [2, 3, 4, 8], got [2, 3, 8, 4]",
    ),
    "an anchor too few": (
        lambda: changed_state(anchor=lambda s: s.anchor[:1]),
        "state.anchor must hold spec.depth = 2 tensors, got 1: is it the state of another spec?",
    ),
    "a state in bfloat16": (
        lambda: changed_state(weights=lambda s: first_layer(s.weights, torch.Tensor.bfloat16)),
        "state.weights[0] must be torch.float32 for these inputs, got torch.bfloat16",
    ),
    "a float32 state for float64 inputs": (
        lambda: replace(random_inputs(MLP, batch=2, heads=3), state=random_state(MLP, rows=2)),
        "state.weights[0] must be torch.float64 for these inputs, got torch.float32",
    ),
    "a state on another device": (
        lambda: changed_state(anchor=lambda s: first_layer(s.anchor, lambda t: t.to("meta"))),
        "state.anchor[0] must be on cpu like q, got meta",
    ),
    "position as one number": (
        lambda: changed_state(position=lambda s: s.position[0]),
        "state.position must have shape [B] = [2], got []",
    ),
    "position of int64": (
        lambda: changed_state(position=lambda s: s.position.long()),
        "state.position must be int32, got torch.int64",
    ),
    "position on another device": (
        lambda: changed_state(position=lambda s: s.position.to("meta")),
        "state.position must be on cpu like q, got meta",
    ),
    "norm_weight of another shape": (
        lambda: changed(norm_weight=torch.ones(4)),
        "norm_weight must have shape [H, D] = [3, 4], got [4]",
    ),
    "norm_bias on another device": (
        lambda: changed(norm_bias=torch.ones(3, 4, device="meta")),
        "norm_bias must be on cpu like q, got meta",
    ),
    "norm_weight for a memory without norm": (
        lambda: replace(
            random_inputs(MemorySpec(dim=4, depth=1), heads=3), norm_weight=torch.ones(3, 4).double()
        ),
        "norm_weight must be None for a spec without norm, got shape [3, 4]",
    ),
}


@pytest.mark.parametrize("impl", ["reference", "chunked", "auto"])
@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_named(case, impl):
    build, message = CASES[case]
    inputs = build()
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        inputs.run(impl)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("bounds", [[0, 2, 4], [1, 2, 5], [0, 3, 6], [0, 4, 2], [0, 7, 5]], ids=str)
def test_bad_document_bounds(bounds, impl):
    """Bounds that do not rise from 0 to T would drop tokens or read a token twice."""
    inputs = random_inputs(MLP, documents=[2, 3])
    inputs = replace(inputs, cu_seqlens=torch.tensor(bounds).int())
    with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0 to T = 5, got "):
        inputs.run(impl)


def test_nothing_to_complain_about():
    """The call that the cases above spoil is itself a good one."""
    changed().run("reference")
    random_inputs(MLP, documents=[2, 3]).run("reference")


@pytest.mark.parametrize(
    ("impl", "message"),
    [
        ("chunk", "impl must be one of ['auto', 'reference', 'chunked', 'triton'], got 'chunk'"),
    ],
)
def test_an_implementation_that_is_not_there_is_refused(impl, message):
    """An explicit choice never falls back to another implementation."""
    with pytest.raises(ValueError, match=re.escape(message)):
        random_inputs(MLP, tokens=2).run(impl)
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve_implementation(impl)


def test_resolve_implementation():
    assert resolve_implementation("reference") == "reference"
    assert resolve_implementation("chunked") == "chunked"
    assert resolve_implementation("auto") == "chunked"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, w: (q.long(), w), "q must be a floating-point tensor, got torch.int64"),
        (lambda q, w: (q[0], w), "q must have shape [B, T, H, 4], got [5, 3, 4]"),
        (lambda q, w: (q[..., :3], w), "q must have shape [B, T, H, 4], got [2, 5, 3, 3]"),
        (lambda q, w: (q, w[:1]), "weights must hold spec.depth = 2 tensors, got 1"),
        (
            lambda q, w: (q, (w[0], w[0])),
            "weights[1] must have shape [B, H, D_in, D_out] = [2, 3, 8, 4], got [2, 3, 4, 8]",
        ),
        (
            lambda q, w: (q[:1], w),
            "weights[0] must have shape [B, H, D_in, D_out] = [1, 3, 4, 8], got [2, 3, 4, 8]",
        ),
    ],
)
def test_read_memory_checks_its_arguments(change, message):
    good = random_inputs(MLP, **DENSE)
    q, weights = change(good.q, good.state.weights)
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        read_memory(q, weights, MLP)


@pytest.mark.parametrize("name", ["norm_weight", "norm_bias"])
def test_read_memory_checks_gain_and_bias(name):
    """A gain for a memory without norm, or of another shape, would be ignored or broadcast."""
    good = random_inputs(MLP, **DENSE)
    with pytest.raises(ValueError, match=re.escape(f"{name} must have shape [H, D] = [3, 4], got [4]")):
        read_memory(good.q, good.state.weights, MLP, **{name: torch.ones(4)})
    linear = MemorySpec(dim=4, depth=1)
    with pytest.raises(ValueError, match=f"{name} must be None for a spec without norm"):
        read_memory(good.q, random_state(linear, rows=2).weights, linear, **{name: torch.ones(3, 4)})


def test_keyword_arguments_are_keyword_only():
    """Gates have equal shapes: passing them by position would swap them silently."""
    x = random_inputs(MLP, tokens=2)
    with pytest.raises(TypeError):
        neural_memory(x.q, x.k, x.v, x.theta, x.log_decay, x.log_momentum, x.state, x.spec)


def test_initial_state_checks_its_arguments():
    weights = (torch.zeros(2, 4, 4),)
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        MemoryState.initial(weights, batch=0)
    with pytest.raises(
        ValueError, match=re.escape("weights[0] must have shape [H, D_in, D_out], got [4, 4]")
    ):
        MemoryState.initial((weights[0][0],), batch=1)
