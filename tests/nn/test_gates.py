"""Gates: in range, bounded, exact at their zeros, and in full precision under autocast."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from titans.nn import GateSpec, MemoryGates

HIDDEN, HEADS, LAYERS = 8, 2, 3
WIDTHS = (5, 7, 4)  # of what the layers put out
PER_CHANNEL = GateSpec(forget_per_channel=True)


def randomised(spec, scale=1.0):
    gates = MemoryGates(HIDDEN, HEADS, LAYERS, spec, widths=WIDTHS).double()
    torch.nn.init.normal_(gates.weight, std=scale)
    torch.nn.init.normal_(gates.bias, std=scale)
    return gates


@pytest.mark.parametrize("forget", ["rectified", "sigmoid", "none"])
@pytest.mark.parametrize("step", ["sigmoid", "hard"])
@pytest.mark.parametrize("momentum", [True, False])
@torch.no_grad()
def test_gates_are_in_range_and_the_step_is_bounded(forget, step, momentum):
    """theta / (1 - eta) <= max_step: what one token's surprise adds over all time."""
    gates = randomised(GateSpec(forget=forget, step=step, momentum=momentum, max_step=0.25), scale=3.0)
    theta, log_decay, log_momentum = gates(torch.randn(4, 50, HIDDEN, dtype=torch.float64))
    assert theta.shape == log_decay.shape == (4, 50, HEADS, LAYERS)
    assert (theta >= 0).all()
    assert (log_decay <= 0).all()
    total = theta
    if momentum:
        assert (log_momentum <= 0).all()
        total = -theta / torch.expm1(log_momentum)
    else:
        assert log_momentum is None
    assert total.max() <= 0.25 * (1 + 1e-9)
    assert total.max() > 0.2, "the bound is reached"
    alpha = 1 - log_decay.exp()
    if forget == "rectified":
        assert alpha.max() <= 0.1
        assert (alpha == 0).any(), "it can keep everything"
        assert (alpha > 0).any()
    if forget == "none":
        assert not alpha.any()
    assert (theta == 0).any() == (step == "hard")


@torch.no_grad()
def test_a_fresh_layer_remembers_and_steps_by_a_quarter():
    """Half the bound, half of it again for momentum 0.5; forgetting below 0.01 % a token but not dead."""
    theta, log_decay, log_momentum = MemoryGates(HIDDEN, HEADS, LAYERS, GateSpec(max_step=0.5))(
        torch.randn(1, 5, HIDDEN)
    )
    torch.testing.assert_close(theta, torch.full_like(theta, 0.125))
    torch.testing.assert_close(log_momentum.exp(), torch.full_like(theta, 0.5))
    assert 0 < (1 - log_decay.double().exp()).max() < 1e-4


@pytest.mark.parametrize("step", ["sigmoid", "hard"])
@torch.no_grad()
def test_the_first_step_is_the_share_asked_for(step):
    spec = GateSpec(step=step, step_init=0.1, momentum=False, max_step=0.5)
    theta = MemoryGates(HIDDEN, HEADS, LAYERS, spec)(torch.randn(1, 5, HIDDEN)).theta
    torch.testing.assert_close(theta, torch.full_like(theta, 0.05))


@pytest.mark.parametrize(
    "spec",
    [
        GateSpec(),
        GateSpec(forget="sigmoid", step="hard"),
        GateSpec(step="hard", step_init=0.02),
        PER_CHANNEL,
        GateSpec(forget_per_channel=True, forget="sigmoid", per_layer=False, momentum=False),
    ],
)
def test_every_kind_gets_gradient_at_initialisation(spec):
    """A rectified gate that starts at its zero would stay there."""
    gates = MemoryGates(HIDDEN, HEADS, LAYERS, spec, widths=WIDTHS)
    sum(gate.sum() for gate in tree_leaves(gates(torch.randn(1, 5, HIDDEN))) if gate is not None).backward()
    assert gates.weight.grad.abs().sum(1).min() > 0
    assert gates.bias.grad.abs().min() > 0


@torch.no_grad()
def test_extreme_inputs_make_no_nan():
    for forget in ("rectified", "sigmoid"):
        gates = randomised(GateSpec(forget=forget), scale=1e3)
        with torch.enable_grad():
            x = torch.randn(1, 20, HIDDEN, dtype=torch.float64, requires_grad=True)
            values = gates(x)
            sum(value.sum() for value in values).backward()
        assert all(value.isfinite().all() for value in values)
        assert x.grad.isfinite().all()


@torch.no_grad()
def test_autocast_and_bf16_inputs_do_not_round_gates():
    """bf16 cannot tell a forget gate of 0.0001 from none."""
    gates = MemoryGates(HIDDEN, HEADS, LAYERS, GateSpec())
    torch.nn.init.normal_(gates.weight)
    x = torch.randn(1, 5, HIDDEN).bfloat16()
    plain = gates(x.float())
    for module in (gates, gates.bfloat16()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for got, expected in zip(module(x), plain, strict=True):
                assert got.dtype == torch.float32
                assert torch.equal(got, expected)


def test_one_gate_for_all_layers_when_asked():
    gates = MemoryGates(HIDDEN, HEADS, LAYERS, GateSpec(per_layer=False))
    assert gates(torch.randn(1, 5, HIDDEN)).theta.shape == (1, 5, HEADS)


@pytest.mark.parametrize("per_layer", [True, False])
@pytest.mark.parametrize("forget", ["rectified", "sigmoid"])
@torch.no_grad()
def test_a_forget_gate_per_channel_leaves_the_others_as_they_are(forget, per_layer):
    spec = GateSpec(forget=forget, per_layer=per_layer, forget_per_channel=True)
    gates = randomised(spec, scale=3.0)
    theta, log_decay, log_momentum = values = gates(torch.randn(4, 50, HIDDEN, dtype=torch.float64))
    assert theta.shape == log_momentum.shape == (4, 50, HEADS, *([LAYERS] if per_layer else []))
    assert [decay.shape for decay in log_decay] == [(4, 50, HEADS, width) for width in WIDTHS]
    for layer, decay in enumerate(log_decay):
        alpha = 1 - decay.exp()
        assert 0 <= alpha.min() < alpha.max() <= (0.1 if forget == "rectified" else 1)
        assert (alpha[..., 0] != alpha[..., 1]).any(), "channels differ"
        torch.testing.assert_close(values.alpha[..., layer], alpha.mean(-1))


def test_gates_per_channel_need_the_widths_of_all_layers():
    with pytest.raises(ValueError, match=r"one width for each of 3 memory layers .* got \(5, 7\)"):
        MemoryGates(HIDDEN, HEADS, LAYERS, PER_CHANNEL, widths=(5, 7))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"forget": "channel"}, "forget must be one of"),
        ({"step": "soft"}, "step must be one of"),
        ({"momentum_init": 0.0}, "between 0 and 1"),
        ({"max_step": -1.0}, "must be positive"),
        (
            {"forget_per_channel": True, "forget": "none"},
            "forget_per_channel must be False with forget='none'",
        ),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        GateSpec(**fields)


def test_the_default_bound_falls_with_depth_and_with_the_power_of_the_inputs():
    """Three layers with a step of 0.5 train until an outer gradient of 4e6 (docs/decisions.md)."""
    x = torch.randn(1, 3, HIDDEN)
    theta = [MemoryGates(HIDDEN, HEADS, layers, GateSpec())(x).theta.max() for layers in (1, 2, 3, 4)]
    torch.testing.assert_close(torch.stack(theta), 0.5 * 0.5 * torch.tensor([0.1, 0.5, 0.1, 0.02]))
    for per_layer in (True, False):
        gates = MemoryGates(HIDDEN, HEADS, 2, GateSpec(per_layer=per_layer), input_power=(1.0, 8.0))
        theta = gates(x).theta
        assert theta.shape == (1, 3, HEADS, 2)
        torch.testing.assert_close(theta[..., 0], 8 * theta[..., 1])
