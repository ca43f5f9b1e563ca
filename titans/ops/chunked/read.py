"""Reading every token of a group with its own weights, all chunks at once."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from titans.ops.chunked import activations
from titans.ops.chunked.dual import LayerRead, ReadGradients, read_layer, read_layer_backward
from titans.ops.chunked.gates import GateGradients
from titans.ops.chunked.group import ChunkedInputs, Group
from titans.ops.chunked.inner import normalize, normalize_backward
from titans.ops.chunked.written import Written


@dataclass
class Read:
    """A group after its reads: every layer, the normalised top and the output `[N, C, D]`."""

    layers: list[LayerRead]
    normed: Tensor | None
    rstd: Tensor | None
    output: Tensor


def read_group(x: ChunkedInputs, group: Group, written: Written, inputs: list[Tensor]) -> Read:
    layers: list[LayerRead] = []
    queries = group.q
    for layer in range(x.spec.depth):
        if layer > 0:
            queries = activations.value(layers[-1].output, x.spec.activation)
        layers.append(
            read_layer(
                queries,
                inputs[layer],
                written.updates[layer],
                written.start_weights[layer],
                written.start_momentum[layer] if written.start_momentum else None,
                group.gates[layer],
            )
        )
    output, normed, rstd = layers[-1].output, None, None
    if x.spec.norm:
        normed, rstd = normalize(output)
        output = normed if group.gain is None else normed * group.gain
        if group.bias is not None:
            output = output + group.bias
    if x.spec.residual:
        output = output + group.q
    return Read(layers, normed, rstd, output)


@dataclass
class GroupReadGradients:
    """q: `[N, C, D]`; gain, bias: `[N, 1, D]` or None; one entry per memory layer in `layers`."""

    q: Tensor
    gain: Tensor | None
    bias: Tensor | None
    layers: list[ReadGradients]


def read_group_backward(
    x: ChunkedInputs,
    group: Group,
    written: Written,
    inputs: list[Tensor],
    read: Read,
    grad_output: Tensor,
    into: list[GateGradients],
) -> GroupReadGradients:
    grad, grad_gain, grad_bias = grad_output, None, None
    if read.normed is not None and read.rstd is not None:
        grad_gain = (grad * read.normed).sum(1, keepdim=True)
        grad_bias = grad.sum(1, keepdim=True)
        grad = normalize_backward(grad if group.gain is None else grad * group.gain, read.normed, read.rstd)
    layers: list[ReadGradients] = []
    for layer in range(x.spec.depth - 1, -1, -1):
        gradients = read_layer_backward(
            grad,
            read.layers[layer],
            inputs[layer],
            written.updates[layer],
            written.start_weights[layer],
            written.start_momentum[layer] if written.start_momentum else None,
            group.gates[layer],
            into[layer],
        )
        layers.insert(0, gradients)
        if layer > 0:
            grad = activations.slope_times(gradients.queries, read.layers[layer - 1].output, x.spec.activation)
    grad_q = layers[0].queries + grad_output if x.spec.residual else layers[0].queries
    return GroupReadGradients(grad_q, grad_gain, grad_bias, layers)
