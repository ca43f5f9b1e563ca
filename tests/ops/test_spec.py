"""`MemorySpec` says what it is and refuses nonsense; `MemoryState` is cut, joined and moved without loss."""

import re

import pytest
import torch

from titans.ops import MemorySpec, MemoryState
from titans.testing import random_inputs

MLP = MemorySpec(dim=4, depth=2, expansion=2)


def test_shapes_of_the_layers():
    assert MemorySpec(dim=4, depth=1).layer_shapes == ((4, 4),)
    assert MemorySpec(dim=4, depth=3, expansion=2).layer_shapes == ((4, 8), (8, 8), (8, 4))
    assert MemorySpec(dim=64, depth=2, expansion=4).num_parameters == 2 * 64 * 256


def test_residual_and_norm_follow_the_depth():
    """The linear memory of the paper has neither."""
    linear, deep = MemorySpec(dim=4, depth=1), MemorySpec(dim=4, depth=2)
    assert (linear.residual, linear.norm) == (False, False)
    assert (deep.residual, deep.norm) == (True, True)
    chosen = MemorySpec(dim=4, depth=2, residual=False, norm=False)
    assert (chosen.residual, chosen.norm) == (False, False)


def test_a_spec_can_be_a_key():
    assert len({MemorySpec(dim=4), MemorySpec(dim=4), MemorySpec(dim=8)}) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "MemorySpec.dim must be a positive integer, got 0"),
        ({"dim": 64.0}, "MemorySpec.dim must be a positive integer, got 64.0"),
        ({"dim": 4, "depth": 0}, "MemorySpec.depth must be a positive integer, got 0"),
        ({"dim": 4, "depth": True}, "MemorySpec.depth must be a positive integer, got True"),
        ({"dim": 4, "depth": 5}, "MemorySpec.depth must be at most 4, got 5"),
        ({"dim": 4, "expansion": -1}, "MemorySpec.expansion must be a positive integer, got -1"),
        ({"dim": 4, "activation": "relu"}, "MemorySpec.activation must be one of"),
        ({"dim": 4, "norm": "yes"}, "MemorySpec.norm must be True or False, got 'yes'"),
        ({"dim": 4, "residual": 1}, "MemorySpec.residual must be True or False, got 1"),
    ],
    ids=str,
)
def test_a_spec_refuses(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MemorySpec(**options)


def test_initial_state():
    weights = tuple(torch.randn(3, *shape, dtype=torch.bfloat16) for shape in MLP.layer_shapes)
    state = MemoryState.initial(weights, batch=2)
    assert state.batch == 2
    assert state.position.tolist() == [0, 0]
    assert state.position.dtype == torch.int32
    for layer, weight in enumerate(weights):
        assert state.weights[layer].dtype == torch.float32
        assert torch.equal(state.weights[layer], weight.float().expand(2, *weight.shape))
        assert torch.equal(state.anchor[layer], state.weights[layer])
        assert not state.momentum[layer].any()
        assert state.momentum[layer].is_contiguous()
    assert MemoryState.initial((weights[0].double(),), batch=1).weights[0].dtype == torch.float64


def tensors_of(state):
    return (*state.weights, *state.momentum, *state.anchor, state.position)


def test_select_and_concatenate():
    state = random_inputs(MLP, batch=3, tokens=1, position=[2, 0, 1]).state
    reordered = state.select(torch.tensor([2, 0, 0]))
    for before, after in zip(tensors_of(state), tensors_of(reordered), strict=True):
        assert torch.equal(after, before[[2, 0, 0]])
    joined = MemoryState.concatenate([state.select(torch.tensor([row])) for row in range(3)])
    for before, after in zip(tensors_of(state), tensors_of(joined), strict=True):
        assert torch.equal(after, before)


def test_expand():
    state = random_inputs(MLP, batch=1, tokens=1).state
    for before, after in zip(tensors_of(state), tensors_of(state.expand(3)), strict=True):
        assert torch.equal(after, before.expand(3, *before.shape[1:]))
    with pytest.raises(ValueError, match="expand needs a state of one row, got 2 rows"):
        state.expand(2).expand(3)


def test_detach_and_to():
    weights = tuple(torch.randn(3, *shape, requires_grad=True) for shape in MLP.layer_shapes)
    state = MemoryState.initial(weights, batch=2)
    assert state.weights[0].requires_grad
    assert not any(tensor.requires_grad for tensor in tensors_of(state.detach()))
    assert {tensor.device.type for tensor in tensors_of(state.to("meta"))} == {"meta"}
    assert {tensor.device.type for tensor in tensors_of(state)} == {"cpu"}
