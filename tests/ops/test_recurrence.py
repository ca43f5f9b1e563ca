"""What holds the reference itself: the contract's formulas written out in NumPy, without autograd.

The inner gradient of the linear memory is written by hand, that of the MLP comes from differences of the
inner loss, and outer gradients from differences of the whole recurrence.
"""

import math

import numpy as np
import pytest
import torch

from titans.ops import MemorySpec, MemoryState, neural_memory, read_memory
from titans.testing import evaluate, random_inputs
from titans.testing.comparison import random_cotangents

IMPLS = ["reference", "chunked"]
erf = np.vectorize(math.erf, otypes=[float])

ACTIVATIONS = {
    "gelu": lambda x: x * 0.5 * (1 + erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def network(x, weights, spec, gain, bias):
    """M(x) of one head: `x [D]`, weights `[D_in, D_out]`."""
    hidden = x
    for layer, weight in enumerate(weights):
        hidden = (ACTIVATIONS[spec.activation](hidden) if layer else hidden) @ weight
    if spec.norm:
        hidden = (hidden - hidden.mean()) / np.sqrt(hidden.var() + 1e-6)
        hidden = hidden * gain + bias
    return x + hidden if spec.residual else hidden


def gradient_by_differences(k, v, weights, spec, gain, bias, step=1e-4):
    """grad_M ||M(k) - v||^2, five points for each weight: layer norm over three numbers curves sharply."""
    gradients = []
    for layer, weight in enumerate(weights):
        gradient = np.zeros_like(weight)
        for index in np.ndindex(*weight.shape):
            for steps, factor in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
                moved = [w.copy() for w in weights]
                moved[layer][index] += steps * step
                loss = ((network(k, moved, spec, gain, bias) - v) ** 2).sum()
                gradient[index] += factor * loss / (12 * step)
        gradients.append(gradient)
    return gradients


def gradient_of_linear_memory(k, v, weights, spec, gain, bias):
    """2 k^T (k W - v), written out."""
    return [2 * np.outer(k, k @ weights[0] - v)]


def recurrence(inputs, inner_gradient):
    """The contract's five lines, one row, head, token and layer at a time. Returns outputs and states."""
    arrays = {name: tensor.numpy() for name, tensor in inputs.tensors().items()}
    spec, depth = inputs.spec, inputs.spec.depth
    batch, tokens, heads, dim = arrays["q"].shape

    def gate(name, b, t, h, layer):
        """A number, or an array over the layer's output channels."""
        if f"{name}[{layer}]" in arrays:
            return arrays[f"{name}[{layer}]"][b, t, h]
        values = arrays[name][b, t, h]
        return values if values.ndim == 0 else values[layer]

    final = {name: array.copy() for name, array in arrays.items() if name.startswith("state.")}
    output = np.zeros((batch, tokens, heads, dim))
    for b, h in np.ndindex(batch, heads):
        gain = arrays["norm_weight"][h] if "norm_weight" in arrays else 1.0
        bias = arrays["norm_bias"][h] if "norm_bias" in arrays else 0.0
        M, S, A = (
            [arrays[f"state.{name}[{layer}]"][b, h].copy() for layer in range(depth)]
            for name in ("weights", "momentum", "anchor")
        )
        position = int(inputs.state.position[b])
        for t in range(tokens):
            if position == 0:
                A = [m.copy() for m in M]
            G = inner_gradient(arrays["k"][b, t, h], arrays["v"][b, t, h], A, spec, gain, bias)
            for layer in range(depth):
                step = -gate("theta", b, t, h, layer) * G[layer]
                if "log_momentum" in arrays:
                    S[layer] = np.exp(gate("log_momentum", b, t, h, layer)) * S[layer] + step
                    step = S[layer]
                M[layer] = np.exp(gate("log_decay", b, t, h, layer)) * M[layer] + step
            output[b, t, h] = network(arrays["q"][b, t, h], M, spec, gain, bias)
            position = (position + 1) % inputs.chunk_size
        if position == 0:
            A = [m.copy() for m in M]
        for name, values in (("weights", M), ("momentum", S), ("anchor", A)):
            for layer in range(depth):
                final[f"state.{name}[{layer}]"][b, h] = values[layer]
    return output, final


def assert_close_to_recurrence(inputs, impl, inner_gradient, atol):
    output, final = recurrence(inputs, inner_gradient)
    with torch.no_grad():
        result = inputs.run(impl)
    np.testing.assert_allclose(result.output.numpy(), output, rtol=0, atol=atol)
    for name in ("weights", "momentum", "anchor"):
        for layer, tensor in enumerate(getattr(result.state, name)):
            np.testing.assert_allclose(
                tensor.numpy(), final[f"state.{name}[{layer}]"], rtol=0, atol=atol, err_msg=name
            )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("chunk_size", [1, 3, 16])
@pytest.mark.parametrize(("decay", "momentum"), [("head", "head"), ("channel", "layer"), ("layer", None)])
def test_linear_memory_is_the_written_recurrence(impl, chunk_size, decay, momentum):
    inputs = random_inputs(
        MemorySpec(dim=4, depth=1), tokens=11, chunk_size=chunk_size, decay=decay, momentum=momentum
    )
    assert_close_to_recurrence(inputs, impl, gradient_of_linear_memory, atol=1e-13)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "spec",
    [
        MemorySpec(dim=3, depth=2, expansion=2),
        MemorySpec(dim=3, depth=3, expansion=1, activation="silu"),
        MemorySpec(dim=3, depth=2, expansion=2, activation="gelu_tanh", residual=False),
        MemorySpec(dim=3, depth=1, residual=True, norm=True),
        MemorySpec(dim=3, depth=4, expansion=1, norm=False),
    ],
    ids=lambda spec: f"depth{spec.depth}-{spec.activation}-{'norm' if spec.norm else 'bare'}",
)
def test_mlp_memory_is_the_recurrence_with_gradients_by_differences(impl, spec):
    inputs = random_inputs(
        spec, batch=2, heads=2, tokens=5, chunk_size=3, theta="layer", decay="head", momentum="layer"
    )
    assert_close_to_recurrence(inputs, impl, gradient_by_differences, atol=1e-8)


@pytest.mark.parametrize("impl", IMPLS)
def test_outer_gradients_are_those_of_the_written_recurrence(impl):
    """Differences of the NumPy recurrence: gradients flow through the writes, to the gates and the state."""
    inputs = random_inputs(
        MemorySpec(dim=2, depth=1), batch=2, heads=1, tokens=5, chunk_size=3, position=[0, 2]
    )
    gradients = evaluate(inputs, impl)
    cotangents = random_cotangents({name: t for name, t in gradients.items() if "grad" not in name}, seed=0)

    def loss(moved):
        output, final = recurrence(moved, gradient_of_linear_memory)
        total = (cotangents["output"].numpy() * output).sum()
        for name in ("weights", "momentum", "anchor"):
            total += (cotangents[f"final {name}[0]"].numpy() * final[f"state.{name}[0]"]).sum()
        return total

    step = 1e-6
    for name, tensor in inputs.tensors().items():
        for index in np.ndindex(*tensor.shape):
            losses = []
            for sign in (1, -1):

                def move(other, value, sign=sign, name=name, index=index):
                    if other != name:
                        return value
                    value = value.clone()
                    value[index] += sign * step
                    return value

                losses.append(loss(inputs.map(move)))
            expected = (losses[0] - losses[1]) / (2 * step)
            assert gradients[f"grad {name}"][index].item() == pytest.approx(expected, abs=1e-7), (name, index)


@torch.no_grad()
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("heads", [1, 3])
def test_plain_delta_rule(impl, heads):
    """Linear memory, no momentum, no decay, chunk 1: the delta rule with step 2 theta, in six lines."""
    inputs = random_inputs(
        MemorySpec(dim=4, depth=1), heads=heads, tokens=9, chunk_size=1, momentum=None, position=[0, 0]
    )
    result = neural_memory(
        inputs.q,
        inputs.k,
        inputs.v,
        theta=inputs.theta,
        log_decay=torch.zeros_like(inputs.theta),
        log_momentum=None,
        state=inputs.state,
        spec=inputs.spec,
        chunk_size=1,
        impl=impl,
    )
    q, k, v = inputs.q.numpy(), inputs.k.numpy(), inputs.v.numpy()
    W = inputs.state.weights[0].numpy().copy()
    for t in range(9):
        for b, h in np.ndindex(2, heads):
            error = v[b, t, h] - k[b, t, h] @ W[b, h]
            W[b, h] += 2 * inputs.theta[b, t, h].item() * np.outer(k[b, t, h], error)
            np.testing.assert_allclose(result.output[b, t, h].numpy(), q[b, t, h] @ W[b, h], atol=1e-13)
    np.testing.assert_allclose(result.state.weights[0].numpy(), W, atol=1e-13)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("norm", [False, True])
def test_read_memory_is_the_network(activation, norm):
    spec = MemorySpec(dim=4, depth=3, expansion=2, activation=activation, norm=norm)
    inputs = random_inputs(spec, tokens=3)
    output = read_memory(inputs.q, inputs.state.weights, spec, inputs.norm_weight, inputs.norm_bias)
    for b, t, h in np.ndindex(2, 3, 2):
        expected = network(
            inputs.q[b, t, h].numpy(),
            [weight[b, h].numpy() for weight in inputs.state.weights],
            spec,
            inputs.norm_weight[h].numpy() if norm else 1.0,
            inputs.norm_bias[h].numpy() if norm else 0.0,
        )
        np.testing.assert_allclose(output[b, t, h].numpy(), expected, atol=1e-13)


@pytest.mark.parametrize("impl", IMPLS)
def test_read_memory_reads_what_was_written(impl):
    """y_t is a read of the state after token t, not before it."""
    inputs = random_inputs(MemorySpec(dim=8, depth=2), tokens=6, chunk_size=4)
    for t in range(1, 7):
        piece = inputs.tokens(0, t).run(impl)
        read = read_memory(
            inputs.q[:, t - 1 : t], piece.state.weights, inputs.spec, inputs.norm_weight, inputs.norm_bias
        )
        torch.testing.assert_close(piece.output[:, -1:], read, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_gates_of_a_single_token_by_hand(impl):
    """D = 1 with numbers that can be checked on paper: k = 1, v = 3, M = 1, S = 0.5, anchor = 2."""
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    state = MemoryState(
        weights=(1 * one,), momentum=(0.5 * one,), anchor=(2 * one,), position=torch.tensor([1]).int()
    )
    result = neural_memory(
        one,
        one,
        3 * one,
        theta=0.1 * one[..., 0],
        log_decay=torch.log(0.5 * one[..., 0]),
        log_momentum=torch.log(0.2 * one[..., 0]),
        state=state,
        spec=MemorySpec(dim=1, depth=1),
        chunk_size=4,
        impl=impl,
    )
    # G = 2 (2 - 3) = -2;  S = 0.2 * 0.5 + 0.1 * 2 = 0.3;  M = 0.5 * 1 + 0.3 = 0.8
    assert result.state.momentum[0].item() == pytest.approx(0.3, abs=1e-15)
    assert result.state.weights[0].item() == pytest.approx(0.8, abs=1e-15)
    assert result.output.item() == pytest.approx(0.8, abs=1e-15)
    assert result.state.anchor[0].item() == 2
    assert result.state.position.tolist() == [2]
