"""Forward and backward over the groups of cells.

A group is as many cells as fit a budget of scratch memory. The forward walks the groups once: the serial
write leaves the state at every chunk's start, the reads of the whole group follow in parallel. Kept are the
gates as vectors (32 bytes a token and head) and the state at every group's start; the backward walks the
groups from the last, writes each again, then takes reads and writes back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans.ops.chunked.group import ChunkedInputs
from titans.ops.chunked.passes import ChunkedGradients, ChunkedResult
from titans.ops.kernels.launch import Call
from titans.ops.kernels.linear_passes import LinearGroup
from titans.ops.kernels.mlp_passes import MLPGroup
from titans.ops.kernels.plan import Sizes
from titans.ops.kernels.states import States
from titans.ops.spec import MemorySpec

Tensors = list[Tensor]

SCRATCH_BYTES = 5 * 2**27  # of one group: enough work to fill the device at every size that fits it


def _group_kind(spec: MemorySpec) -> type[LinearGroup] | type[MLPGroup]:
    return LinearGroup if spec.depth == 1 else MLPGroup


def sizes_of(x: ChunkedInputs) -> Sizes:
    return Sizes.of(x.q.shape[0], x.q.shape[1], x.chunk_size, x.position.shape[0], x.cu_seqlens is not None)


def groups_of(x: ChunkedInputs) -> list[tuple[int, int]]:
    """Forward and backward must agree on the groups: the kept states lie at their starts."""
    numbers = _group_kind(x.spec).numbers_per_cell(x.spec, x.chunk_size)
    return sizes_of(x).groups(max(1, SCRATCH_BYTES // (numbers * x.q.element_size() * x.q.shape[2])))


def forward_pass(x: ChunkedInputs, keep: bool) -> ChunkedResult:
    call, kind = Call(x), _group_kind(x.spec)
    states = States(call.plan.table, x.chunk_size, call.momentum)
    weights, momentum, first, end = states.enter(x.weights, x.momentum, x.anchor)
    output = torch.empty_like(call.v)
    groups = groups_of(x)
    stacks: Tensors = []
    if keep:
        stacks = [state.new_empty((len(groups) - 1, *state.shape)) for state in [*weights, *momentum]]
    for index, group in enumerate(groups):
        if keep and index > 0:
            for stack, state in zip(stacks, [*weights, *momentum], strict=True):
                stack[index - 1] = state
        buffers = kind.allocate(call, group)
        buffers.write(weights, momentum, first, end, keep=False)
        buffers.read(output)
    weights, momentum, anchor = states.leave(weights, momentum, end)
    return ChunkedResult(
        output, weights, momentum, anchor, [call.plan.table, call.vectors, *stacks] if keep else []
    )


def backward_pass(
    x: ChunkedInputs,
    kept: Tensors,
    grad_output: Tensor,
    grad_weights: Tensors,
    grad_momentum: Tensors,
    grad_anchor: Tensors,
) -> ChunkedGradients:
    table, vectors, *stacks = kept
    call, kind = Call(x, table, vectors), _group_kind(x.spec)
    states = States(table, x.chunk_size, call.momentum)
    d_weights, d_momentum, d_first, d_end = states.gradients_enter(grad_weights, grad_momentum, grad_anchor)
    weights, momentum, first, end = states.enter(x.weights, x.momentum, x.anchor)
    grad_output = grad_output.to(call.v.dtype).contiguous()
    groups = groups_of(x)
    for index in range(len(groups) - 1, -1, -1):
        start = [*weights, *momentum] if index == 0 else [stack[index - 1].clone() for stack in stacks]
        buffers = kind.allocate(call, groups[index])
        buffers.write(start[: len(weights)], start[len(weights) :], first, end, keep=True)
        buffers.backward(grad_output, d_weights, d_momentum, d_first, d_end)
    d_weights, d_momentum, d_anchor = states.gradients_leave(
        d_weights, d_momentum, d_first, d_end, grad_anchor
    )
    grads = call.grads

    def gate(grad: Tensor, like: Tensor) -> Tensor:
        return grad if like.shape[-1] == grad.shape[-1] else grad.sum(-1, keepdim=True)

    return ChunkedGradients(
        q=grads.q,
        k=grads.k,
        v=grads.v,
        theta=gate(grads.theta, x.theta),
        log_decay=[gate(grads.log_decay, x.log_decay[0])],
        log_momentum=None if x.log_momentum is None else gate(grads.log_momentum, x.log_momentum),
        weights=d_weights,
        momentum=d_momentum,
        anchor=d_anchor,
        norm_weight=None if x.norm_weight is None else grads.gain,
        norm_bias=None if x.norm_bias is None else grads.bias,
    )
