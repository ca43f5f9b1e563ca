"""Reading every token of a group with its own weights, all chunks at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from titans.ops.chunked import activations
from titans.ops.chunked.dual import LayerRead, ReadGradients, read_layer, read_layer_backward
from titans.ops.chunked.gates import GateGradients
from titans.ops.chunked.group import Group
from titans.ops.chunked.inner import normalize, normalize_backward
from titans.ops.chunked.write import Written
from titans.ops.spec import MemorySpec


@dataclass
class GroupRead:
    """A group after its reads: every layer, (normed, mean, rstd) of the LN, and the output `[N, C, D]`."""

    layers: list[LayerRead]
    norm: tuple[Tensor, Tensor, Tensor] | None
    output: Tensor


def read_group(group: Group, written: Written, spec: MemorySpec) -> GroupRead:
    layers: list[LayerRead] = []
    queries = group.q
    for layer, state in enumerate(written.starts):
        if layer > 0:
            below = layers[-1].output
            queries = activations.value(below, spec.activation, out=torch.empty_like(below))
        trace = written.trace
        layers.append(
            read_layer(
                queries,
                trace.inputs[layer],
                trace.grads[layer],
                state.weights,
                state.momentum,
                group.gates[layer],
            )
        )
    output, norm = layers[-1].output, None
    if spec.norm:
        norm = normalize(output)
        output = norm[0] if group.gain is None else norm[0] * group.gain
        if group.bias is not None:
            output = output + group.bias
    return GroupRead(layers, norm, output + group.q if spec.residual else output)


@dataclass
class GroupReadGradients:
    """q: `[N, C, D]`; gain, bias: of the LN's gain and bias, `[N, C, D]` or None; layers: the rest."""

    q: Tensor
    gain: Tensor | None
    bias: Tensor | None
    layers: list[ReadGradients]


def read_group_backward(
    group: Group,
    written: Written,
    read: GroupRead,
    grad_output: Tensor,
    into: list[GateGradients],
    spec: MemorySpec,
) -> GroupReadGradients:
    grad, grad_gain, grad_bias = grad_output, None, None
    if read.norm is not None:
        normed, mean, rstd = read.norm
        grad_gain, grad_bias = grad * normed, grad
        scaled = grad if group.gain is None else grad * group.gain
        grad = normalize_backward(scaled, read.layers[-1].output, mean, rstd)
    layers: list[ReadGradients] = []
    for layer in range(spec.depth - 1, -1, -1):
        state = written.starts[layer]
        gradients = read_layer_backward(
            grad,
            read.layers[layer],
            written.trace.inputs[layer],
            written.trace.grads[layer],
            state.weights,
            state.momentum,
            group.gates[layer],
            into[layer],
        )
        layers.insert(0, gradients)
        if layer > 0:
            below, through = read.layers[layer - 1].output, gradients.queries
            grad = activations.slope_times(through, below, spec.activation, out=torch.empty_like(below))
    grad_q = layers[0].queries + grad_output if spec.residual else layers[0].queries
    return GroupReadGradients(grad_q, grad_gain, grad_bias, layers)
