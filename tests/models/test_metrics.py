"""What `MemoryMetrics` reports: the model's own numbers, without changing any."""

import pytest
import torch

from titans.nn import MemoryMetrics
from titans.nn.memory import MemoryCore
from titans.nn.metrics import NOTHING, WriteShares


def test_metrics_are_those_of_the_last_state(build, tokens):
    model, ids = build("lmm"), tokens(2, 13)
    plain = model(ids, use_cache=True)
    with MemoryMetrics(model) as metrics:
        watched = model(ids, use_cache=True)
    assert torch.equal(plain.logits, watched.logits)
    means = metrics.means()
    assert set(means) == {"weight_norm", "momentum_norm", "inner_gradient_norm", "theta", "alpha", "eta"}
    states = [state.memory for state in plain.past_key_values.states]
    for name in ("weights", "momentum"):
        squares = [sum(w.square().sum((-2, -1)) for w in getattr(state, name)) for state in states]
        expected = torch.stack(squares).sqrt().mean().item()
        assert means[f"{name.removesuffix('s')}_norm"] == pytest.approx(expected)
    assert 0 < means["theta"] < 0.5
    assert 0 <= means["alpha"] < 0.1
    assert 0 < means["eta"] < 1
    assert means["inner_gradient_norm"] > 0


@torch.no_grad()
def test_forgetting_per_channel_counts_every_layer_the_same(build, tokens):
    """Layers have 16 and 8 channels; the mean of all 24 would be another number."""
    model, decays = build("lmm", memory_forget_per_channel=True), {}
    for name, memory in MemoryMetrics(model).memories.items():
        memory.gates.bias += 0.5
        memory.gates.register_forward_hook(
            lambda _, args, gates, name=name: decays.update({name: gates.log_decay})  # the last: of the text
        )
    with MemoryMetrics(model) as metrics:
        model(tokens(2, 13))
    means = [1 - layer.exp().mean() for decay in decays.values() for layer in decay]
    assert len(means) == 4
    assert metrics.means()["alpha"] == pytest.approx(torch.stack(means).mean().item(), rel=1e-9)


def test_nothing_watches_after_the_context(build, tokens):
    model = build("mac")
    with MemoryMetrics(model) as metrics:
        pass
    model(tokens(1, 5))
    assert metrics.means() == {}


@torch.no_grad()
def test_metrics_of_ragged_batches_and_every_variant(variant, build, tokens):
    """Packed rows, empty ones included; a model without memories has none."""
    model = build(variant)
    with MemoryMetrics(model) as metrics:
        model(tokens(1, 30), cu_seqlens=torch.tensor([0, 11, 11, 30], dtype=torch.int32))
    assert (metrics.means() == {}) == (variant == "attention")
    assert all(value == value for value in metrics.means().values())


def test_write_shares_are_the_gates_over_their_bounds(build, tokens):
    """A quarter in an untrained model (half of the largest step, eta a half), with a gradient."""
    model, ids = build("lmm"), tokens(2, 13)
    for memory in (module for module in model.modules() if isinstance(module, MemoryCore)):
        memory.gates.reset_parameters()
    with MemoryMetrics(model) as metrics, WriteShares(model) as shares:
        model(ids)
    assert shares.mean().item() == pytest.approx(0.25)
    shares.mean().backward()
    assert all(
        memory.gates.bias.grad.abs().sum() > 0 for memory in model.modules() if isinstance(memory, MemoryCore)
    )
    assert metrics.means()  # both watched
    with WriteShares(build("attention")) as shares:
        build("attention")(ids)
    assert shares.mean() == 0


@torch.no_grad()
def test_the_share_of_noise_is_that_of_the_steps(variant, build, tokens):
    """Against the gates' own numbers, memory by memory, all at once or segment by segment."""
    model, ids = build(variant), tokens(2, 20)
    worth = torch.zeros(2, 20, dtype=torch.int8)
    worth[:, 3:9], worth[0, 12:15], worth[1, 19] = -1, 1, 1
    memories = [module for module in model.modules() if isinstance(module, MemoryCore)]
    seen = [[] for _ in memories]
    for memory, steps in zip(memories, seen, strict=True):
        memory.gates.register_forward_hook(
            lambda gates, _, out, steps=steps: steps.append(out.theta / torch.tensor(gates.max_steps))
        )
    with WriteShares(model) as shares:
        model(ids)
    expected = []
    for steps in seen:
        theta = torch.cat([part for part in steps if len(part) == 2], dim=1)[:, -20:]
        noise, facts = theta[worth < 0].sum((0, 1)), theta[worth > 0].sum((0, 1))
        expected.append(noise / (noise + facts + NOTHING))
    if variant == "attention":
        assert shares.of_noise(worth) == 0
        return
    assert shares.of_noise(worth).item() == pytest.approx(torch.cat(expected).mean().item())


def test_a_price_of_noise_lowers_its_steps_and_raises_those_of_facts(build, tokens):
    model, ids = build("lmm", num_hidden_layers=1), tokens(2, 20)
    worth = torch.where(torch.arange(20) % 2 > 0, 1, -1).expand(2, 20)
    (memory,) = [module for module in model.modules() if isinstance(module, MemoryCore)]
    thetas = []
    memory.gates.register_forward_hook(lambda _, __, out: thetas.append(out.theta))
    with WriteShares(model) as shares:
        model(ids)
    (theta,) = [theta for theta in thetas if len(theta) == 2]
    gradient = torch.autograd.grad(shares.of_noise(worth), theta)[0]
    assert (gradient[worth < 0] > 0).all()
    assert (gradient[worth > 0] < 0).all()
    # Neither all larger nor all smaller is better.
    assert (gradient * theta).sum().abs() < 0.02 * (gradient * theta).abs().sum()
