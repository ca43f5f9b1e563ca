"""Forward and backward over the groups of cells.

A group is as many cells as fit a budget of scratch memory. The forward walks the groups once: the serial
write leaves the state at every chunk's start, the reads of the whole group follow in parallel. Kept are the
gates as vectors (32 bytes a token and head) and the states at the starts of segments, which are groups or
parts of them; the backward walks the groups from the last, writes each again, its segments side by side, then
takes reads and writes back.

The groups take turns in one set of buffers: two layers have 34 and up to ten groups, and the host would spend
more on allocating for each than on launching.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from titans.ops.chunked.group import ChunkedInputs
from titans.ops.chunked.passes import ChunkedGradients, ChunkedResult
from titans.ops.kernels.launch import Call
from titans.ops.kernels.linear_passes import LinearGroup, empty_transitions, scans
from titans.ops.kernels.mlp_passes import MLPGroup
from titans.ops.kernels.plan import Groups, Sizes
from titans.ops.kernels.states import States
from titans.ops.spec import MemorySpec

Tensors = list[Tensor]

SCRATCH_BYTES = 5 * 2**27  # of one group: enough work to fill the device at every size that fits it
STEPS = (
    5  # of a row's chunks in a group, at least: each launch of a serial kernel loads and stores all states
)


def _group_kind(spec: MemorySpec) -> type[LinearGroup] | type[MLPGroup]:
    return LinearGroup if spec.depth == 1 else MLPGroup


def sizes_of(x: ChunkedInputs) -> Sizes:
    return Sizes.of(x.q.shape[0], x.q.shape[1], x.chunk_size, x.position.shape[0], x.cu_seqlens is not None)


def groups_of(x: ChunkedInputs, keep: bool = True) -> Groups:
    """Forward and backward must agree on the segments: the kept states lie at their starts.

    keep: a backward follows. Then groups are not shorter than STEPS, nor than where a step more would take as
    much memory in buffers as it saves in kept states.
    """
    kind, sizes, heads = _group_kind(x.spec), sizes_of(x), x.q.shape[2]
    of_cell = kind.numbers_per_cell(x.spec, x.chunk_size) * x.q.element_size()  # and head
    pieces = kind.PROGRAMS // (sizes.rows * heads * kind.programs_per_head(x.spec))
    cells = max(1, SCRATCH_BYTES // (of_cell * heads))
    if keep:
        matrix = math.prod(x.spec.layer_shapes[0])
        momentum = kind.momentum_dtype(x.q.dtype).itemsize * len(x.momentum)
        of_state = matrix * (4 * len(x.weights) + momentum)
        even = math.isqrt(sizes.cells // sizes.stride * of_state // of_cell)
        cells = max(cells, sizes.stride * max(STEPS, even))
    return sizes.groups(cells, max(1, pieces))


def empty_kept(x: ChunkedInputs, groups: Groups) -> Tensors:
    """States at the starts of segments: every layer's weights, then momentum, as the kernels hold them; a
    linear memory's transitions where it has any (`linear_scan.py`)."""
    kind, slots, heads = _group_kind(x.spec), groups.slots(groups.sizes.cells), x.q.shape[2]
    momentum = kind.momentum_dtype(x.q.dtype)
    dtypes = [torch.float32] * len(x.weights) + [momentum] * len(x.momentum)
    kept = [x.q.new_empty(slots, heads, *x.spec.layer_shapes[0], dtype=dtype) for dtype in dtypes]
    if kind is LinearGroup and scans(groups, groups.cells, x.q.dtype):
        kept.append(empty_transitions(x.q, slots, len(dtypes)))
    return kept


def forward_pass(x: ChunkedInputs, keep: bool) -> ChunkedResult:
    call, kind = Call(x), _group_kind(x.spec)
    states = States(call.plan.table, x.chunk_size, call.momentum)
    weights, momentum, first, end = states.enter(x.weights, x.momentum, x.anchor)
    output = torch.empty_like(call.v)
    groups = groups_of(x, keep)
    kept = empty_kept(x, groups) if keep else []
    buffers = kind(call, groups)
    for group in groups.bounds:
        buffers.take(group, kept)
        buffers.write(weights, momentum, first, end)
        buffers.read(output)
    weights, momentum, anchor = states.leave(weights, momentum, end)
    return ChunkedResult(
        output, weights, momentum, anchor, [call.plan.table, call.vectors, *kept] if keep else []
    )


def backward_pass(
    x: ChunkedInputs,
    kept: Tensors,
    grad_output: Tensor,
    grad_weights: Tensors,
    grad_momentum: Tensors,
    grad_anchor: Tensors,
) -> ChunkedGradients:
    table, vectors, *kept = kept
    call, kind = Call(x, table, vectors), _group_kind(x.spec)
    states = States(table, x.chunk_size, call.momentum)
    d_weights, d_momentum, d_first, d_end = states.gradients_enter(grad_weights, grad_momentum, grad_anchor)
    _, _, first, _ = states.enter(x.weights, x.momentum, x.anchor)
    grad_output = grad_output.to(call.v.dtype).contiguous()
    groups = groups_of(x)
    buffers = kind(call, groups)
    for group in reversed(groups.bounds):
        buffers.take(group, kept)
        buffers.write_again(first)
        buffers.backward(grad_output, d_weights, d_momentum, d_first, d_end)
    d_weights, d_momentum, d_anchor = states.gradients_leave(
        d_weights, d_momentum, d_first, d_end, grad_anchor
    )
    grads = call.grads

    def gate(grad: Tensor, like: Tensor) -> Tensor:
        return grad if like.shape[-1] == grad.shape[-1] else grad.sum(-1, keepdim=True)

    def affine(index: int, like: Tensor | None) -> Tensor | None:
        # A copy: what an operator returns shares no memory.
        return None if like is None or grads.affine is None else grads.affine[index].clone()

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
        norm_weight=affine(0, x.norm_weight),
        norm_bias=affine(1, x.norm_bias),
    )
