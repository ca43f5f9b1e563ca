"""One token without gradients in plain PyTorch against the recurrence: token after token, through chunks."""

from dataclasses import replace

import pytest
import torch

from titans.ops import MemoryOutput, MemorySpec
from titans.ops.chunked import step as module
from titans.testing import assert_agreement, random_inputs
from titans.testing.comparison import named_results

SPEC = MemorySpec(dim=8, depth=2, expansion=2)
CASES = {
    "linear": (MemorySpec(dim=8, depth=1), {}),
    "linear, residual, no momentum": (MemorySpec(dim=8, depth=1, residual=True), {"momentum": None}),
    "two layers": (SPEC, {}),
    "three layers, silu": (replace(SPEC, depth=3, activation="silu"), {}),
    "no norm, no residual": (replace(SPEC, norm=False, residual=False), {}),
    "gates of layers": (SPEC, {"theta": "layer", "decay": "layer", "momentum": "layer"}),
    "decay of channels": (SPEC, {"decay": "channel"}),
    "no gain, no bias, no momentum": (SPEC, {"norm_affine": False, "momentum": None}),
    "chunks of one": (SPEC, {"chunk_size": 1, "position": [0, 0, 0]}),
}


def token_by_token(inputs, impl):
    state, outputs = inputs.state, []
    for token in range(inputs.q.shape[1]):
        output, state = inputs.tokens(token, token + 1, state).run(impl)
        outputs.append(output)
    return MemoryOutput(torch.cat(outputs, dim=1), state)


@pytest.mark.parametrize(("spec", "settings"), CASES.values(), ids=CASES.keys())
def test_steps_are_the_recurrence(spec, settings, monkeypatch):
    """Rows at different places of their chunks; each closes one. The state goes on into a longer call."""
    calls = []
    inner = module.inner_forward
    monkeypatch.setattr(module, "inner_forward", lambda *arguments: calls.append(inner(*arguments)))
    inputs = random_inputs(
        spec, tokens=9, **({"batch": 3, "chunk_size": 4, "position": [0, 1, 3]} | settings)
    )
    expected = inputs.run("reference")
    start = token_by_token(inputs.tokens(0, 6), "chunked")
    assert len(calls) == 6
    rest = inputs.tokens(6, 9, start.state).run("chunked")
    assert len(calls) == 6
    whole = MemoryOutput(torch.cat([start.output, rest.output], dim=1), rest.state)
    assert_agreement(named_results(whole), named_results(expected))


def test_the_given_state_stays_as_it_is():
    inputs = random_inputs(SPEC, tokens=1, chunk_size=4, batch=2, position=[0, 3])
    before = [
        tensor.clone() for tensor in (*inputs.state.weights, *inputs.state.momentum, *inputs.state.anchor)
    ]
    inputs.run("chunked")
    after = [*inputs.state.weights, *inputs.state.momentum, *inputs.state.anchor]
    assert all(map(torch.equal, before, after))


def test_a_token_with_gradients_takes_the_dual_form():
    inputs = random_inputs(SPEC, tokens=1, chunk_size=4)
    inputs.q.requires_grad_()
    assert inputs.run("chunked").output.requires_grad
