"""Forward and backward over the groups of cells.

A group is as many cells as fit a budget of scratch memory. The forward walks the groups once: the serial
write
leaves the state at every chunk's start, the reads of the whole group follow in parallel. Only the state at
every
group's start is kept; the backward walks the groups from the last, writes each again, then takes reads and
writes back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans.ops.chunked.group import ChunkedInputs
from titans.ops.chunked.passes import ChunkedGradients, ChunkedResult
from titans.ops.kernels.launch import Call
from titans.ops.kernels.linear_passes import LinearGroup
from titans.ops.kernels.mlp_passes import MLPGroup
from titans.ops.kernels.plan import Plan

Tensors = list[Tensor]

SCRATCH_BYTES = 5 * 2**27  # of one group: enough work to fill the device at every size that fits it


def _group_kind(call: Call) -> type[LinearGroup] | type[MLPGroup]:
    return LinearGroup if call.spec.depth == 1 else MLPGroup


def cells_at_once(call: Call) -> int:
    """Forward and backward must agree on the groups: the kept states lie at their starts."""
    kind = _group_kind(call)
    return max(1, SCRATCH_BYTES // (kind.bytes_per_cell(call, backward=True) * call.H))


def kept_groups(x: ChunkedInputs) -> int:
    """States that the forward keeps, from shapes alone."""
    call = Call(x)
    return len(call.plan.groups(cells_at_once(call))) - 1


def _to_kernel(tensors: Tensors) -> Tensors:
    """Layers after the first are held transposed, `[D, F]` like the first; copies, to be overwritten."""
    return [
        (tensor if layer == 0 else tensor.mT).clone(memory_format=torch.contiguous_format)
        for layer, tensor in enumerate(tensors)
    ]


def _from_kernel(tensors: Tensors) -> Tensors:
    return [tensor if layer == 0 else tensor.mT.contiguous() for layer, tensor in enumerate(tensors)]


def _rows(mask: Tensor) -> Tensor:
    return mask[:, None, None, None]


def _where(mask: Tensor, yes: Tensors, no: Tensors) -> Tensors:
    return [torch.where(_rows(mask), a, b) for a, b in zip(yes, no, strict=True)]


def _add(into: Tensors, mask: Tensor, tensors: Tensors) -> Tensors:
    """into + tensors, in the rows of the mask."""
    return [a + b.masked_fill(~_rows(mask), 0) for a, b in zip(into, tensors, strict=True)]


def _empty(plan: Plan) -> Tensor:
    return plan.table[0] == plan.table[1]


def forward_pass(x: ChunkedInputs, keep: bool) -> ChunkedResult:
    call = Call(x)
    plan, kind = call.plan, _group_kind(call)
    weights, momentum = _to_kernel(x.weights), _to_kernel(x.momentum)
    first = _to_kernel(_where(x.position == 0, x.weights, x.anchor))
    end = _where(_empty(plan), _to_kernel(x.anchor), first)
    output = torch.empty_like(call.v)
    groups = plan.groups(cells_at_once(call))
    kept: Tensors = []
    if keep:
        kept = [state.new_empty((len(groups) - 1, *state.shape)) for state in [*weights, *momentum]]
    for index, group in enumerate(groups):
        if keep and index > 0:
            for stack, state in zip(kept, [*weights, *momentum], strict=True):
                stack[index - 1] = state
        buffers = kind.allocate(call, group)
        buffers.write(weights, momentum, first, end)
        buffers.read(output)
    anchor = _where(plan.closes, weights, end)
    return ChunkedResult(output, _from_kernel(weights), _from_kernel(momentum), _from_kernel(anchor), kept)


def backward_pass(
    x: ChunkedInputs,
    kept: Tensors,
    grad_output: Tensor,
    grad_weights: Tensors,
    grad_momentum: Tensors,
    grad_anchor: Tensors,
) -> ChunkedGradients:
    call = Call(x)
    plan, kind = call.plan, _group_kind(call)
    empty = _empty(plan)
    fresh = x.position == 0
    first = _to_kernel(_where(fresh, x.weights, x.anchor))
    d_anchor = _to_kernel(grad_anchor)
    d_weights = _add(_to_kernel(grad_weights), plan.closes, d_anchor)
    d_momentum = _to_kernel(grad_momentum)
    # The returned anchor of other rows is the state at their last chunk's start: added by the kernels there,
    # here where that is the first chunk.
    d_end = [grad.masked_fill(_rows(plan.closes), 0) for grad in d_anchor]
    d_first = [torch.zeros_like(tensor) for tensor in first]
    grad_output = grad_output.to(call.v.dtype).contiguous()
    groups = plan.groups(cells_at_once(call))
    depth = len(x.weights)
    for index in range(len(groups) - 1, -1, -1):
        if index == 0:
            weights, momentum = _to_kernel(x.weights), _to_kernel(x.momentum)
        else:
            states = [stack[index - 1].clone() for stack in kept]
            weights, momentum = states[:depth], states[depth:]
        buffers = kind.allocate(call, groups[index])
        buffers.write(weights, momentum, first, [torch.empty_like(tensor) for tensor in first])
        buffers.backward(grad_output, d_weights, d_momentum, d_first, d_end)
    d_first = _add(d_first, plan.one_chunk & ~empty, d_end)
    d_weights = _add(d_weights, fresh & ~empty, d_first)
    anchor = [grad.masked_fill(_rows(fresh | empty), 0) for grad in d_first]
    anchor = _from_kernel(_add(anchor, empty, d_anchor))
    grads = call.grads

    def gate(grad: Tensor, like: Tensor) -> Tensor:
        return grad if like.shape[-1] == grad.shape[-1] else grad.sum(-1, keepdim=True)

    def affine(like: Tensor | None, reads: Tensor, writes: Tensor) -> Tensor | None:
        return None if like is None else reads + writes.sum(0)

    return ChunkedGradients(
        q=grads.q,
        k=grads.k,
        v=grads.v,
        theta=gate(grads.theta, x.theta),
        log_decay=[gate(grads.log_decay, x.log_decay[0])],
        log_momentum=None if x.log_momentum is None else gate(grads.log_momentum, x.log_momentum),
        weights=_from_kernel(d_weights),
        momentum=_from_kernel(d_momentum),
        anchor=anchor,
        norm_weight=affine(x.norm_weight, grads.gain, grads.row_gain),
        norm_bias=affine(x.norm_bias, grads.bias, grads.row_bias),
    )
