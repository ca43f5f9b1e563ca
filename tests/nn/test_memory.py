"""The layer around the op, step by step, and what it hands on."""

import pytest
import torch
import torch.nn.functional as F

from titans.nn import FullPrecision, GateSpec, NeuralMemory, NeuralMemorySpec, RMSNorm, Rows, l2_normalize
from titans.ops import MemorySpec, MemoryState, neural_memory


def build(depth=2, **fields):
    spec = NeuralMemorySpec(
        hidden_size=16, memory=MemorySpec(dim=8, depth=depth, expansion=2), chunk_size=4, **fields
    )
    layer = NeuralMemory(spec).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_layer_is_what_the_paper_says(depth):
    """Projection, convolution, SiLU, l2 norm of q and k but not v; norm, gate and projection after."""
    layer = build(depth)
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    output, _ = layer(x)

    def stream(proj, conv):
        padded = F.pad(proj(x).transpose(1, 2), (3, 0))
        return F.silu(F.conv1d(padded, conv.weight[:, None], groups=16)).transpose(1, 2).unflatten(-1, (2, 8))

    q, k, v = (stream(getattr(layer, f"{n}_proj"), getattr(layer, f"{n}_conv")) for n in "qkv")
    unit_q, unit_k = (z / z.square().sum(-1, keepdim=True).add(1e-6).sqrt() for z in (q, k))
    theta, log_decay, log_momentum = layer.gates(x)
    m = neural_memory(
        unit_q,
        unit_k,
        v,
        theta=theta,
        log_decay=log_decay,
        log_momentum=log_momentum,
        state=MemoryState.initial(layer.initial.weights, batch=2),
        spec=layer.spec.memory,
        norm_weight=layer.initial.norm_weight,
        norm_bias=layer.initial.norm_bias,
        chunk_size=4,
        impl="reference",
    ).output
    normed = m / m.square().mean(-1, keepdim=True).add(1e-6).sqrt() * layer.norm.weight
    expected = layer.o_proj(normed.flatten(2) * F.silu(layer.gate_proj(x)))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_without_momentum_a_linear_memory_is_the_delta_rule():
    """M <- M - 2 theta k^T (k M_anchor - v): a plain loop over the layer's own q, k, v."""
    layer = build(1, gates=GateSpec(momentum=False, forget="none"))
    x = torch.randn(1, 11, 16, dtype=torch.float64)
    state = layer.initial_state(1)
    (q, k, v), _ = layer.project_write(x, state)
    theta = layer.gates(x).theta
    weights = layer.initial.weights[0].clone()
    expected = torch.zeros_like(v)
    for t in range(11):
        if t % 4 == 0:
            anchor = weights.clone()
        error = torch.einsum("hi,hio->ho", k[0, t], anchor) - v[0, t]
        weights -= 2 * theta[0, t, :, None, None] * k[0, t, :, :, None] * error[:, None, :]
        expected[0, t] = torch.einsum("hi,hio->ho", q[0, t], weights)
    got, state = layer.retrieve(x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(state.memory.weights[0][0], weights, rtol=0, atol=1e-9)


@torch.no_grad()
def test_a_step_of_zero_leaves_a_memory_that_only_decays():
    layer = build(2, gates=GateSpec(step="hard", forget="sigmoid", momentum=False))
    layer.gates.weight.zero_()
    layer.gates.bias.zero_()
    layer.gates.bias[: layer.gates.bias.numel() // 2] = -50.0  # theta comes first
    _, state = layer.retrieve(torch.randn(1, 10, 16, dtype=torch.float64))
    keep = (1 - torch.sigmoid(torch.tensor(-8.0, dtype=torch.float64))) ** 10
    for now, initial in zip(state.memory.weights, layer.initial.weights, strict=True):
        torch.testing.assert_close(now[0], initial * keep, rtol=1e-12, atol=0)


def spread(layer, like):
    """Give `like`, with gates per channel, the parameters of `layer`: the same gate in all of a layer's."""
    state, heads = layer.state_dict(), layer.spec.heads
    for name in ("gates.weight", "gates.bias"):
        others, forget = state[name].tensor_split([layer.gates.sizes[0] * 2])
        per_layer = forget.unflatten(0, (heads, -1))
        shapes = enumerate(layer.spec.memory.layer_shapes)
        channels = [per_layer[:, i].repeat_interleave(width, dim=0) for i, (_, width) in shapes]
        state[name] = torch.cat([others, *channels])
    like.load_state_dict(state)


@torch.no_grad()
@pytest.mark.parametrize("forget", ["rectified", "sigmoid"])
def test_equal_channels_forget_as_one_gate_per_layer(forget):
    layer = build(2, gates=GateSpec(forget=forget))
    layer.gates.bias += 1.0  # forgets by several percent a token
    channels = build(2, gates=GateSpec(forget=forget, forget_per_channel=True))
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    assert (channels(x)[0] - layer(x)[0]).abs().max() > 1e-3
    spread(layer, channels)
    (expected, after), (got, moved) = layer(x), channels(x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    for one, other in zip(after.memory.weights, moved.memory.weights, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-9)
    assert layer.gates(x).alpha.max() > 0.03


@torch.no_grad()
def test_every_channel_has_the_gate_that_is_its_own():
    """One logit moved, of layer 1, head 1, channel 3: only those weights are forgotten."""
    layer = build(2, gates=GateSpec(step="hard", forget_per_channel=True, momentum=False))
    layer.gates.weight.zero_()
    layer.gates.bias[: layer.gates.sizes[0]] = -50.0  # no step
    layer.gates.bias[layer.gates.sizes[0] :] = -1.0  # remember all
    layer.gates.bias[layer.gates.sizes[0] + 2 * 16 + 8 + 3] = 50.0  # alpha = 0.1
    _, state = layer.retrieve(torch.randn(1, 10, 16, dtype=torch.float64))
    expected = [weight.clone() for weight in layer.initial.weights]
    expected[1][1, :, 3] *= 0.9**10
    for now, kept in zip(state.memory.weights, expected, strict=True):
        torch.testing.assert_close(now[0], kept, rtol=1e-12, atol=0)


def test_a_zero_vector_has_a_finite_gradient():
    """Padding, dead SiLUs and a first token without a tail make zeros; 0/0 in the norm would spread NaN."""
    x = torch.zeros(2, 4, requires_grad=True)
    l2_normalize(x).sum().backward()
    assert x.grad.isfinite().all()
    layer = build()
    zeros = torch.zeros(1, 6, 16, dtype=torch.float64, requires_grad=True)
    layer(zeros)[0].sum().backward()
    assert zeros.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@torch.no_grad()
def test_states_select_expand_and_pass_through_empty_rows():
    layer = build()
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    _, state = layer(x)
    picked = state.select(torch.tensor([2, 0]))
    more = torch.randn(2, 4, 16, dtype=torch.float64)
    expected = layer(torch.cat([x[[2, 0]], more], dim=1))[0][:, 5:]
    torch.testing.assert_close(layer(more, picked)[0], expected, rtol=0, atol=1e-9)
    one = layer.initial_state(1).expand(3)
    torch.testing.assert_close(layer(x, one)[0], layer(x)[0], rtol=0, atol=1e-12)
    _, moved = layer(more[:1], state, Rows([0, 4, 0], x.device))
    for row in (0, 2):
        before, after = (s.select(torch.tensor([row])) for s in (state, moved))
        assert all(
            torch.equal(a, b) for a, b in zip(before.memory.weights, after.memory.weights, strict=True)
        )
        assert torch.equal(before.key_tail, after.key_tail)


def test_casting_keeps_full_precision_parameters():
    layer = build().float()
    weights = [weight.clone() for weight in layer.initial.weights]
    for cast in (layer.bfloat16(), layer.half(), layer.to(torch.bfloat16)):
        assert cast.q_proj.weight.dtype in (torch.bfloat16, torch.float16)
        for module in cast.modules():
            if isinstance(module, FullPrecision):
                assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
        assert all(torch.equal(a, b) for a, b in zip(cast.initial.weights, weights, strict=True))
    assert layer.double().initial.weights[0].dtype == torch.float64
    assert layer.bfloat16().initial.weights[0].dtype == torch.float32


@torch.no_grad()
def test_norms_compute_in_fp32():
    """The sum of squares of 1000 bf16 numbers would be off by percents in bf16."""
    x = torch.randn(4, 1000).bfloat16()
    norm = RMSNorm(1000).bfloat16()
    wide = x.float()
    expected = (wide / wide.square().mean(-1, keepdim=True).add(1e-6).sqrt()).bfloat16()
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x), expected)


def test_the_head_width_must_divide_the_hidden_size():
    with pytest.raises(ValueError, match=r"hidden_size \(20\) must be a multiple of .* head width \(8\)"):
        NeuralMemorySpec(hidden_size=20, memory=MemorySpec(dim=8))
