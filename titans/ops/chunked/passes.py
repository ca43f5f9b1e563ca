"""Forward and backward over the chunk grid.

The forward walks the chunks once: the write of a chunk needs only the state at its start, so the serial part
is the key side alone; the reads of GROUP chunks are then done together. Only the state at the start of every
group is kept. The backward walks the groups from the last: it writes the group again from that state, then
takes the reads back together and the writes back one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from titans.ops.chunked.gates import GateGradients
from titans.ops.chunked.grid import ChunkGrid
from titans.ops.chunked.group import GROUP, ChunkedInputs, Group, per_layer
from titans.ops.chunked.inner import InnerTrace
from titans.ops.chunked.read import read_group, read_group_backward
from titans.ops.chunked.write import Ends, StateGradients, write_group, write_group_backward

Tensors = list[Tensor]


@dataclass
class ChunkedResult:
    """output `[B, T, H, D]`; weights, momentum, anchor after the last token; kept states, L tensors each
    `[cells, H, D_in, D_out]` (see `kept_cells`)."""

    output: Tensor
    weights: Tensors
    momentum: Tensors
    anchor: Tensors
    kept_weights: Tensors
    kept_momentum: Tensors


def kept_cells(num_tokens: int, rows: int, chunk_size: int) -> int:
    """An upper bound, from shapes alone, of the states kept: one per row and group after its first."""
    return (num_tokens + rows * chunk_size) // (chunk_size * GROUP)


def _over_states(rows: Tensor) -> Tensor:
    """A mask of rows, shaped to broadcast against `[R, H, D_in, D_out]`."""
    return rows[:, None, None, None]


def _first_anchor(x: ChunkedInputs, grid: ChunkGrid) -> Tensors | None:
    """The anchor of the first chunk, sorted rows x heads; None where it is simply the weights."""
    if not x.starts_inside_chunk():
        return None
    fresh = _over_states(x.position == 0)
    return [
        grid.sort(torch.where(fresh, w, a)).flatten(0, 1) for w, a in zip(x.weights, x.anchor, strict=True)
    ]


def _sorted(tensors: Tensors, grid: ChunkGrid) -> Tensors:
    return [grid.sort(tensor).flatten(0, 1) for tensor in tensors]


def _unsorted(tensors: Tensors, grid: ChunkGrid, heads: int) -> Tensors:
    return [grid.unsort(tensor.unflatten(0, (-1, heads))) for tensor in tensors]


def forward_pass(x: ChunkedInputs, keep: bool) -> ChunkedResult:
    grid = x.grid()
    weights, momentum = _sorted(x.weights, grid), _sorted(x.momentum, grid)
    first_anchor = _first_anchor(x, grid)
    ends = Ends(weights, momentum, _sorted(x.anchor, grid), x.heads)
    kept: list[tuple[Tensors, Tensors]] = []
    canvas = grid.canvas(x.v)
    for first_step in range(0, grid.steps, GROUP):
        if keep and first_step > 0:
            rows = grid.active[first_step] * x.heads
            kept.append(([w[:rows] for w in weights], [m[:rows] for m in momentum]))
        group = Group.load(x, grid, first_step)
        written = write_group(x, grid, group, weights, momentum, first_anchor, ends)
        weights, momentum = written.weights, written.momentum
        inputs = InnerTrace.stack(written.traces).inputs
        read = read_group(x, group, written, inputs)
        grid.scatter(canvas, read.output, group.first_cell, group.cells)
    closes_chunk = _over_states(x.closing_rows())
    end_weights = _unsorted(ends.weights, grid, x.heads)
    end_anchor = [
        torch.where(closes_chunk, w, a)
        for w, a in zip(end_weights, _unsorted(ends.anchor, grid, x.heads), strict=True)
    ]
    cells = kept_cells(x.q.shape[0] * x.q.shape[1], grid.rows, x.chunk_size) if keep else 0
    return ChunkedResult(
        grid.finish(canvas, x.v),
        end_weights,
        _unsorted(ends.momentum, grid, x.heads),
        end_anchor,
        _pack_states([states for states, _ in kept], x.weights, cells),
        _pack_states([states for _, states in kept], x.momentum, cells),
    )


def _pack_states(kept: list[Tensors], like: Tensors, cells: int) -> Tensors:
    """One tensor per layer for all kept states; its size must follow from shapes alone, so it may have slack."""
    packed = []
    for layer, tensor in enumerate(like):
        storage = tensor.new_empty((cells, *tensor.shape[1:]))
        flat, start = storage.flatten(0, 1), 0
        for states in kept:
            stop = start + states[layer].shape[0]
            flat[start:stop] = states[layer]
            start = stop
        packed.append(storage)
    return packed


@dataclass
class ChunkedGradients:
    """Gradients of `ChunkedInputs`, field by field."""

    q: Tensor
    k: Tensor
    v: Tensor
    theta: Tensor
    log_decay: Tensors
    log_momentum: Tensor | None
    weights: Tensors
    momentum: Tensors
    anchor: Tensors
    norm_weight: Tensor | None
    norm_bias: Tensor | None


def backward_pass(
    x: ChunkedInputs, result: ChunkedResult, grad_output: Tensor, grads: tuple[Tensors, Tensors, Tensors]
) -> ChunkedGradients:
    """`grads`: gradients of the returned weights, momentum and anchor. Of `result` only kept states are used."""
    grid, heads, depth = x.grid(), x.heads, x.spec.depth
    grad_weights, grad_momentum, grad_anchor = grads
    closes_chunk = _over_states(x.closing_rows())
    grad_weights = [
        w + a.masked_fill(~closes_chunk, 0) for w, a in zip(grad_weights, grad_anchor, strict=True)
    ]
    end_anchor = [a.masked_fill(closes_chunk, 0) for a in grad_anchor]
    first_anchor = _first_anchor(x, grid)
    state = StateGradients(
        _sorted(grad_weights, grid),
        [tensor.clone() for tensor in _sorted(grad_momentum, grid)],
        _sorted(end_anchor, grid),
        first_anchor,
        heads,
    )
    canvases = {
        name: grid.canvas(tensor) for name, tensor in (("q", x.q), ("k", x.k), ("v", x.v), ("theta", x.theta))
    }
    decay_canvases = [grid.canvas(tensor) for tensor in x.log_decay]
    momentum_canvas = None if x.log_momentum is None else grid.canvas(x.log_momentum)
    norm_weight = None if x.norm_weight is None else torch.zeros_like(x.norm_weight)
    norm_bias = None if x.norm_bias is None else torch.zeros_like(x.norm_bias)
    last_group = (grid.steps - 1) // GROUP * GROUP
    kept_stop = sum(grid.active[step] for step in range(GROUP, grid.steps, GROUP)) * heads
    initial = _sorted(x.weights, grid), _sorted(x.momentum, grid)
    for first_step in range(last_group, -1, -GROUP):
        weights, momentum = initial
        if first_step > 0:
            kept_start = kept_stop - grid.active[first_step] * heads
            weights = [kept.flatten(0, 1)[kept_start:kept_stop] for kept in result.kept_weights]
            momentum = [kept.flatten(0, 1)[kept_start:kept_stop] for kept in result.kept_momentum]
            kept_stop = kept_start
        group = Group.load(x, grid, first_step)
        written = write_group(x, grid, group, weights, momentum, first_anchor, None)
        trace = InnerTrace.stack(written.traces)
        written.traces.clear()
        unique = {id(gates): GateGradients(gates) for gates in group.gates}
        into = [unique[id(gates)] for gates in group.gates]
        read = read_group(x, group, written, trace.inputs)
        grad_read = grid.gather_zeroed(grad_output, group.first_cell, group.cells)
        reads = read_group_backward(x, group, written, trace.inputs, read, grad_read, into)
        grad_k, grad_v, grad_theta = write_group_backward(x, grid, group, written, trace, reads, into, state)

        def put(canvas: Tensor, values: Tensor, group: Group = group) -> None:
            grid.scatter(canvas, values, group.first_cell, group.cells)

        put(canvases["q"], reads.q)
        put(canvases["k"], grad_k)
        put(canvases["v"], grad_v)
        put(canvases["theta"], _sum_shared(grad_theta, x.theta.shape[-1]))
        decay_logs, momentum_logs = _gate_log_gradients(x, group, into, depth)
        for canvas, values in zip(decay_canvases, decay_logs, strict=True):
            put(canvas, values)
        if momentum_canvas is not None and momentum_logs is not None:
            put(momentum_canvas, momentum_logs)
        if norm_weight is not None and reads.gain is not None:
            norm_weight += reads.gain.view(-1, heads, norm_weight.shape[-1]).sum(0)
        if norm_bias is not None and reads.bias is not None:
            norm_bias += reads.bias.view(-1, heads, norm_bias.shape[-1]).sum(0)

    start_weights = _unsorted(state.weights, grid, heads)
    start_anchor = [torch.zeros_like(weight) for weight in start_weights]
    if state.grad_first_anchor is not None:
        fresh = _over_states(x.position == 0)
        padded = [_pad_rows(tensor, grid.rows * heads) for tensor in state.grad_first_anchor]
        first = _unsorted(padded, grid, heads)
        start_weights = [w + a.masked_fill(~fresh, 0) for w, a in zip(start_weights, first, strict=True)]
        start_anchor = [a.masked_fill(fresh, 0) for a in first]
    empty = x.empty_rows()
    if empty is not None:
        passed = ~_over_states(empty)
        start_anchor = [a + end.masked_fill(passed, 0) for a, end in zip(start_anchor, grad_anchor, strict=True)]
    return ChunkedGradients(
        q=grid.finish(canvases["q"], x.q),
        k=grid.finish(canvases["k"], x.k),
        v=grid.finish(canvases["v"], x.v),
        theta=grid.finish(canvases["theta"], x.theta),
        log_decay=[
            grid.finish(canvas, tensor) for canvas, tensor in zip(decay_canvases, x.log_decay, strict=True)
        ],
        log_momentum=(
            None
            if momentum_canvas is None or x.log_momentum is None
            else grid.finish(momentum_canvas, x.log_momentum)
        ),
        weights=start_weights,
        momentum=_unsorted(state.momentum, grid, heads),
        anchor=start_anchor,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
    )


def _pad_rows(tensor: Tensor, rows: int) -> Tensor:
    missing = rows - tensor.shape[0]
    return tensor if missing == 0 else torch.cat([tensor, tensor.new_zeros((missing, *tensor.shape[1:]))])


def _sum_shared(per_memory_layer: Tensors, gates: int) -> Tensor:
    """L gradients `[N, C]` -> `[N, C, gates]`: the sum where layers share one gate."""
    stacked = torch.stack(per_memory_layer, dim=-1)
    return stacked.sum(-1, keepdim=True) if gates == 1 else stacked


def _gate_log_gradients(
    x: ChunkedInputs, group: Group, into: Tensors | list[GateGradients], depth: int
) -> tuple[Tensors, Tensor | None]:
    """Gradients of log_decay (one tensor, or one per layer) and log_momentum, `[N, C, gates]`."""
    done: dict[int, tuple[Tensor, Tensor | None]] = {}
    for gradients in into:
        if id(gradients) not in done:
            done[id(gradients)] = gradients.to_logs(group.real)
    unique = list(done.values())  # in layer order; one entry where all layers share
    decays = [decay for decay, _ in unique]
    decay_logs = decays if x.channelwise else [_sum_shared(decays, x.log_decay[0].shape[-1])]
    if x.log_momentum is None:
        return decay_logs, None
    momenta = [momentum for _, momentum in unique if momentum is not None]
    return decay_logs, _sum_shared(momenta, x.log_momentum.shape[-1])
