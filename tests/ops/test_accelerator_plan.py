"""How chunks are laid out where the host does not know the positions, exercised on the CPU.

On an accelerator a dense batch is planned without reading `position` (that would wait for the device): every
row gets one chunk more than it may need.
"""

from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_map_only

from titans.ops import MemorySpec, operator
from titans.ops.chunked import OPERATOR, grid, group
from titans.ops.chunked.group import ChunkedInputs
from titans.testing import assert_agreement, evaluate, random_inputs

LINEAR = MemorySpec(dim=4, depth=1)
MLP = MemorySpec(dim=4, depth=2, expansion=2)


@pytest.fixture
def plan_without_positions(monkeypatch):
    """The accelerator's grid for tensors on the CPU; returns how often it was asked for."""
    asked = []

    def make_grid(batch, num_tokens, chunk_size, position, cu_seqlens):
        assert cu_seqlens is None
        asked.append(num_tokens)
        return grid._uniform_grid(batch, num_tokens, chunk_size, position)

    monkeypatch.setattr(group, "make_grid", make_grid)
    monkeypatch.setattr(ChunkedInputs, "starts_inside_chunk", lambda self: True)
    return asked


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8, 31, 32, 33, 70])
@pytest.mark.parametrize("spec", [LINEAR, MLP], ids=["linear", "mlp"])
@pytest.mark.parametrize("position", [[0, 0, 0, 0], [0, 1, 2, 3], [3, 3, 3, 3]], ids=str)
def test_plan_without_positions(spec, tokens, position, plan_without_positions):
    inputs = random_inputs(spec, batch=4, tokens=tokens, chunk_size=4, position=position, forget=0.02)
    assert_agreement(evaluate(inputs, "chunked"), evaluate(inputs, "reference"))
    assert plan_without_positions


@pytest.mark.parametrize("decay", ["layer", "channel"])
@pytest.mark.parametrize("momentum", [None, "layer"])
def test_every_gate_shape(decay, momentum, plan_without_positions):
    inputs = random_inputs(MLP, tokens=35, chunk_size=4, decay=decay, momentum=momentum, theta="layer")
    assert_agreement(evaluate(inputs, "chunked"), evaluate(inputs, "reference"))
    assert plan_without_positions


def test_no_value_is_read_from_the_device():
    """Tensors on the meta device have no values: reading one on the host raises.

    The operators' arguments are caught on the CPU and run again there.
    """
    inputs = random_inputs(MLP, batch=3, tokens=70, chunk_size=4, dtype=torch.float32)
    for needs_grad in (False, True):
        arguments = arguments_of_the_operators(inputs, needs_grad)
        for function, given in arguments.items():
            on_device = tree_map_only(torch.Tensor, lambda t: t.to("meta"), given)
            assert [t.device.type for t in function(*on_device)].count("meta") > 4
    with pytest.raises(RuntimeError, match="meta"):
        bool(inputs.state.position.to("meta").any())  # what the test relies on


def arguments_of_the_operators(inputs, needs_grad):
    """What the two operators are called with in one forward and, when needed, backward."""
    caught = {}
    functions = {"forward": OPERATOR._run_forward, "backward": OPERATOR._run_backward}
    run = operator.call
    with pytest.MonkeyPatch.context() as patch:

        def record(name, direction, *arguments):
            caught[functions[direction]] = tree_map_only(torch.Tensor, torch.Tensor.detach, arguments)
            return run(name, direction, *arguments)

        patch.setattr(operator, "call", record)
        q = inputs.q.detach().requires_grad_(needs_grad)
        output = replace(inputs, q=q).run("chunked").output
        if needs_grad:
            output.square().sum().backward()
    return caught
