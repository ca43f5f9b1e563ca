"""Sliding attention against a sum over visible tokens written out, and MAC's against its definition."""

import math

import pytest
import torch

from titans.nn import ContextAttention, Rows, SlidingAttention, attention
from titans.nn.rope import RotaryTable

HIDDEN, HEADS, THETA = 16, 2, 100.0


@pytest.fixture
def persistent():
    return torch.randn(3, HIDDEN, dtype=torch.float64)


def angle_matrix(distance, head_dim):
    """RoPE as the rotation it is: one 2 x 2 block for each pair of channels."""
    half = head_dim // 2
    rotation = torch.zeros(head_dim, head_dim, dtype=torch.float64)
    for pair in range(half):
        angle = distance * THETA ** (-2 * pair / head_dim)
        cos, sin = math.cos(angle), math.sin(angle)
        rotation[pair, pair], rotation[pair, half + pair] = cos, -sin
        rotation[half + pair, pair], rotation[half + pair, half + pair] = sin, cos
    return rotation


def naive(layer, x, persistent, visible, extra=None):
    """Token by token: softmax over the prefix (no rotation) and what `visible(i)` lists."""
    size = layer.head_dim
    q, k, v = (proj(x).unflatten(-1, (HEADS, size)) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    sources = {"x": (k, v)}
    if extra is not None:
        sources["h"] = tuple(
            proj(extra).unflatten(-1, (HEADS, size)) for proj in (layer.k_proj, layer.v_proj)
        )
    output = torch.zeros_like(x)
    for i in range(len(x)):
        for head in range(HEADS):
            columns = slice(head * size, (head + 1) * size)
            scores, values = [], []
            if persistent is not None:
                for key, value in zip(layer.k_proj(persistent), layer.v_proj(persistent), strict=True):
                    scores.append(q[i, head] @ key[columns])
                    values.append(value[columns])
            for source, j in visible(i):
                keys, source_values = sources[source]
                scores.append(q[i, head] @ angle_matrix(j - i, size) @ keys[j, head])
                values.append(source_values[j, head])
            weights = torch.softmax(torch.stack(scores) / size**0.5, dim=0)
            output[i, columns] = weights @ torch.stack(values)
    return layer.o_proj(output)


@pytest.fixture(params=[2, 64])
def block(request, monkeypatch):
    """Blocks of queries shorter than the window, and as long."""
    monkeypatch.setattr(attention, "CPU_BLOCK", request.param)


@pytest.mark.parametrize("window", [None, 1, 3, 5, 8, 100])
@pytest.mark.parametrize("with_prefix", [True, False])
@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
@pytest.mark.usefixtures("block")
def test_sliding_attention_is_its_definition(persistent, window, with_prefix, grad):
    """Window edges, blocks longer than the window, and a prefix that does not care about distance.

    On a CPU, prefix and window are one softmax in training and two that are merged in inference.
    """
    layer = SlidingAttention(HIDDEN, HEADS, THETA, window).double().train(grad)
    prefix = persistent if with_prefix else None
    x = torch.randn(2, 17, HIDDEN, dtype=torch.float64)
    leaves = [x, *layer.parameters(), *([persistent] if with_prefix else [])]
    with torch.set_grad_enabled(grad):
        for leaf in leaves:
            leaf.requires_grad_(grad)
        output, state = layer(x, layer.initial_state(2, prefix))

        def visible(i):
            return [("x", j) for j in range(max(0, i - (window or 99) + 1), i + 1)]

        expected = torch.stack([naive(layer, row, prefix, visible) for row in x])
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    assert state.counts == (17 if window is None else min(17, window - 1))
    if grad:
        direction = torch.randn_like(output)
        grads = [torch.autograd.grad(y, leaves, direction) for y in (output, expected)]
        torch.testing.assert_close(*grads, rtol=0, atol=1e-11)


@torch.no_grad()
@pytest.mark.usefixtures("block")
def test_every_cut_of_a_sliding_window_is_exact(persistent):
    """All cuts in two of 17 tokens, and rows that differ in length."""
    layer = SlidingAttention(HIDDEN, HEADS, THETA, window=5).double().eval()
    x = torch.randn(2, 17, HIDDEN, dtype=torch.float64)
    whole, _ = layer(x, layer.initial_state(2, persistent))
    for cut in range(1, 17):
        first, state = layer(x[:, :cut], layer.initial_state(2, persistent))
        second, _ = layer(x[:, cut:], state)
        torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=1e-12)
    rows = Rows([3, 14], x.device)
    first, state = layer(torch.cat([x[0, :3], x[1, :14]])[None], layer.initial_state(2, persistent), rows)
    assert state.counts == (3, 4)
    rest = Rows([14, 3], x.device)
    second, state = layer(torch.cat([x[0, 3:], x[1, 14:]])[None], state, rest)
    assert state.counts == 4, "both windows are full again: one number, no mask"
    torch.testing.assert_close(torch.cat([first[0, :3], second[0, :14]]), whole[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat([first[0, 3:], second[0, 14:]]), whole[1], rtol=0, atol=1e-12)

    # Behind full windows, rows of different lengths.
    _, state = layer(x[:, :6], layer.initial_state(2, persistent))
    rest, state = layer(torch.cat([x[0, 6:], x[1, 6:9]])[None], state, Rows([11, 3], x.device))
    torch.testing.assert_close(rest[0], torch.cat([whole[0, 6:], whole[1, 6:9]]), rtol=0, atol=1e-12)
    assert state.counts == 4


def test_angles_of_a_long_piece_are_exact():
    """In fp32, the product of position and frequency would be wrong by 0.004 radians at the end."""
    like = torch.empty(0)
    table, exact = (RotaryTable(100_000, 64, 10_000.0, kind) for kind in (like, like.double()))
    assert table.cos.dtype == table.sin.dtype == torch.float32
    torch.testing.assert_close(table.cos, exact.cos.float(), rtol=0, atol=1e-7)
    torch.testing.assert_close(table.sin, exact.sin.float(), rtol=0, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("with_prefix", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_context_attention_is_its_definition(persistent, with_prefix, training):
    """Token i sees h_j and x_j for j <= i at the same distance, and the prefix."""
    layer = ContextAttention(HIDDEN, HEADS, THETA).double().train(training)
    persistent = persistent if with_prefix else None
    x, h = torch.randn(2, 7, HIDDEN, dtype=torch.float64)
    segment, outputs = layer.initial_segment(1), []
    for piece in ([0, 1, 2], [3], [4, 5, 6]):
        entries = torch.cat([layer.entries(x[None, piece]), layer.entries(h[None, piece])], dim=2)
        segment = segment.append(entries, None)
        outputs.append(layer.attend(layer.queries(x[None, piece]), segment, layer.prefix(persistent), None))

    def visible(i):
        return [(source, j) for j in range(i + 1) for source in "xh"]

    expected = naive(layer, x, persistent, visible, extra=h)
    torch.testing.assert_close(torch.cat(outputs, 1)[0], expected, rtol=0, atol=1e-12)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match=r"hidden_size \(18\) must be an even multiple of .* heads \(6\)"):
        SlidingAttention(18, 6, THETA, window=4)
