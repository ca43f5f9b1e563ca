"""The comparison itself has teeth: a token loop with one thing wrong must not agree with the right one."""

import inspect

import pytest
import torch

from titans.ops import MemorySpec, api, reference
from titans.testing import assert_agreement, evaluate, random_inputs, relative_error

MISTAKES = {
    "the anchor never moves": ("torch.where(starts_chunk, w, a)", "a"),
    "the anchor is the current weights": ("torch.where(starts_chunk, w, a)", "w"),
    "factor 1 instead of 2": (".square().sum()", ".square().sum() / 2"),
    "loss averaged over the channels": (".square().sum()", ".square().mean()"),
    "decay towards the state's first weights": (
        "* weights[layer] + surprise",
        "* (weights[layer] - state.weights[layer]) + state.weights[layer] + surprise",
    ),
    "decay after the write": (
        "layer_gate(log_decay, t, layer).exp() * weights[layer] + surprise",
        "layer_gate(log_decay, t, layer).exp() * (weights[layer] + surprise)",
    ),
    "read before write": (
        *("weights = tuple(new_weights)", "old, weights = weights, tuple(new_weights)"),
        *("apply_memory(q[:, t], weights,", "apply_memory(q[:, t], old,"),
    ),
    "momentum of the token is not carried": (
        "new_momentum.append(surprise)",
        "new_momentum.append(0 * surprise)",
    ),
    "momentum restarts at every chunk": (
        "* momentum[layer] + surprise",
        "* torch.where(starts_chunk, 0, momentum[layer]) + surprise",
    ),
    "momentum without decay": ("layer_gate(log_momentum, t, layer).exp() * momentum", "momentum"),
    "theta of the next token": ("layer_gate(theta, t, layer)", "layer_gate(theta, t - 1, layer)"),
    "one gate for all layers": ("layer_gate(log_momentum, t, layer)", "layer_gate(log_momentum, t, 0)"),
    "the position does not advance": ("position = (position + 1) % chunk_size", "pass"),
    "the final anchor is forgotten": (
        "MemoryState(weights, momentum, anchor, position)",
        "MemoryState(weights, momentum, state.anchor, position)",
    ),
    "no gradient through the writes": ("create_graph=", "create_graph=False and "),
    "no gradient through the anchor": (
        "torch.where(starts_chunk, w, a)",
        "torch.where(starts_chunk, w, a).detach()",
    ),
}


def mutant(*changes):
    """The reference with some expressions changed, (old, new) pairs, as an implementation of its own."""
    source = inspect.getsource(reference)
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert old in source, f"the reference no longer contains {old!r}"
        source = source.replace(old, new)
    namespace = {"__name__": "mutant"}
    exec(compile(source, "mutant", "exec"), namespace)
    return namespace["reference"]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_recurrence_is_noticed(mistake, monkeypatch):
    monkeypatch.setitem(api._IMPLEMENTATIONS, "chunked", mutant(*MISTAKES[mistake]))
    inputs = random_inputs(
        MemorySpec(dim=4, depth=2), tokens=10, chunk_size=4, position=[0, 2], theta="layer", momentum="layer"
    )
    with pytest.raises(AssertionError, match="results differ"):
        assert_agreement(evaluate(inputs, "chunked"), evaluate(inputs, "reference"))


def test_the_unchanged_copy_agrees(monkeypatch):
    """Without this, a copy that fails for any reason would pass for a mistake found."""
    monkeypatch.setitem(api._IMPLEMENTATIONS, "chunked", mutant("chunk_size", "chunk_size"))
    inputs = random_inputs(MemorySpec(dim=4, depth=2), tokens=10, chunk_size=4)
    assert_agreement(evaluate(inputs, "chunked"), evaluate(inputs, "reference"), 1e-15)


def test_every_kind_of_difference_is_reported():
    good = {"a": torch.ones(3, dtype=torch.float64), "n": torch.tensor([1, 2])}
    for bad, message in [
        ({"n": good["n"]}, "missing: a"),
        (good | {"a": torch.ones(2)}, r"a: shape \[2\] instead of \[3\]"),
        (good | {"a": torch.tensor([1, torch.nan, 1])}, "a: not finite"),
        (good | {"a": good["a"] + 2e-9}, "a: relative error 2.00e-09 > 1e-09"),
        (good | {"n": torch.tensor([1, 3])}, r"n: \[1, 3\] instead of \[1, 2\]"),
    ]:
        with pytest.raises(AssertionError, match=message):
            assert_agreement(bad, good)
    assert_agreement(good, good)


def test_relative_error():
    assert relative_error(torch.tensor([1.1]), torch.tensor([1.0])) == pytest.approx(0.1, rel=1e-6)
    assert relative_error(torch.tensor([1e-7]), torch.tensor([0.0])) == pytest.approx(0.1)


def test_inputs_are_stable_and_in_mid_stream():
    """Cases must not explode (then nothing would be shown) nor start from zeros (then carries are hidden)."""
    inputs = random_inputs(MemorySpec(dim=16, depth=2), tokens=300, heads=2)
    assert inputs.run("reference").output.abs().max() < 10
    assert all(momentum.any() for momentum in inputs.state.momentum)
    assert not torch.equal(inputs.state.anchor[0], inputs.state.weights[0])
    again = random_inputs(MemorySpec(dim=16, depth=2), tokens=300, heads=2)
    assert all(torch.equal(t, again.tensors()[name]) for name, t in inputs.tensors().items())


def test_map_changes_every_tensor():
    """Each argument that can have a gradient is a leaf in `evaluate`; one left out is never compared."""
    inputs = random_inputs(MemorySpec(dim=4, depth=2), tokens=3, decay="channel")
    doubled = inputs.map(lambda _, tensor: 2 * tensor)
    # q, k, v, theta; decays of two layers; log_momentum; gain, bias; three sets of weights
    assert len(inputs.tensors()) == 4 + 2 + 1 + 2 + 3 * 2
    for name, tensor in inputs.tensors().items():
        assert torch.equal(doubled.tensors()[name], 2 * tensor), name
