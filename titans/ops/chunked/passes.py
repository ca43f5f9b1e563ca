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
from titans.ops.chunked.group import GROUP, ChunkedInputs, Group
from titans.ops.chunked.read import read_group, read_group_backward
from titans.ops.chunked.unwrite import StateGradients, write_group_backward
from titans.ops.chunked.write import Ends, LayerState, States, write_group

Tensors = list[Tensor]


@dataclass
class ChunkedResult:
    """output `[B, T, H, D]`; weights, momentum, anchor after the last token; kept: the states at the start of
    every group after the first, `[cells, H, D_in, D_out]` each, weights of all layers before momentum."""

    output: Tensor
    weights: Tensors
    momentum: Tensors
    anchor: Tensors
    kept: Tensors


def kept_cells(num_tokens: int, rows: int, chunk_size: int) -> int:
    """An upper bound, from shapes alone, of the states kept: one per row and group after its first."""
    return (num_tokens + rows * chunk_size) // (chunk_size * GROUP)


def forward_pass(x: ChunkedInputs, keep: bool) -> ChunkedResult:
    grid = x.grid()
    states = _load_states(x.weights, x.momentum, grid)
    first_anchor = _first_anchor(x, grid)
    ends = Ends(states, _sorted(x.anchor, grid), x.heads)
    kept = _Kept.allocate(x, grid) if keep else None
    canvas = grid.canvas(x.v)
    for first_step in range(0, grid.steps, GROUP):
        if kept is not None and first_step > 0:
            kept.push(states, grid.active[first_step] * x.heads)
        group = Group.load(x, grid, first_step)
        written = write_group(grid, group, states, first_anchor, ends, x.spec)
        states = written.state
        grid.scatter(canvas, read_group(group, written, x.spec).output, group.first_cell, group.cells)
    closes_chunk = _over_states(x.closing_rows())  # then the returned anchor is the returned weights
    weights = _unsorted([state.weights for state in ends.states], grid, x.heads)
    anchor = _unsorted(ends.anchor, grid, x.heads)
    return ChunkedResult(
        grid.finish(canvas, x.v),
        weights,
        _unsorted([state.momentum for state in ends.states if state.momentum is not None], grid, x.heads),
        [torch.where(closes_chunk, w, a) for w, a in zip(weights, anchor, strict=True)],
        [] if kept is None else kept.tensors,
    )


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
    x: ChunkedInputs,
    kept: Tensors,
    grad_output: Tensor,
    grad_weights: Tensors,
    grad_momentum: Tensors,
    grad_anchor: Tensors,
) -> ChunkedGradients:
    """`kept` as `forward_pass` returned it; the other arguments are gradients of what it returned."""
    grid = x.grid()
    gradients = _end_gradients(x, grid, grad_weights, grad_momentum, grad_anchor)
    initial = _load_states(x.weights, x.momentum, grid)
    states_kept = _Kept(
        kept, x.spec.depth, sum(grid.active[s] for s in range(GROUP, grid.steps, GROUP)) * x.heads
    )
    collected = _Collected(x, grid)
    for first_step in range((grid.steps - 1) // GROUP * GROUP, -1, -GROUP):
        states = initial if first_step == 0 else states_kept.pop(grid.active[first_step] * x.heads)
        group = Group.load(x, grid, first_step)
        written = write_group(grid, group, states, gradients.first_anchor, None, x.spec)
        unique = {id(gates): GateGradients(gates) for gates in group.gates}
        into = [unique[id(gates)] for gates in group.gates]
        grad = grid.gather_zeroed(grad_output, group.first_cell, group.cells)
        read = read_group(group, written, x.spec)
        reads = read_group_backward(group, written, read, grad, into, x.spec)
        writes = write_group_backward(grid, group, written, reads, into, gradients, x.spec)
        collected.put(group, "q", reads.q)
        collected.put(group, "k", writes.k)
        collected.put(group, "v", writes.v)
        collected.put_gates(group, list(unique.values()))
        collected.add_affine([reads.gain, writes.gain], [reads.bias, writes.bias])
    weights, anchor = _start_gradients(x, grid, gradients, grad_anchor)
    momentum = [state.momentum for state in gradients.states if state.momentum is not None]
    return collected.finish(weights, _unsorted(momentum, grid, x.heads), anchor)


def _over_states(rows: Tensor) -> Tensor:
    """A mask of rows, shaped to broadcast against `[R, H, D_in, D_out]`."""
    return rows[:, None, None, None]


def _sorted(tensors: Tensors, grid: ChunkGrid) -> Tensors:
    """`[R, H, ...]` -> `[sorted rows x H, ...]`."""
    return [grid.sort(tensor).flatten(0, 1) for tensor in tensors]


def _unsorted(tensors: Tensors, grid: ChunkGrid, heads: int) -> Tensors:
    return [grid.unsort(tensor.unflatten(0, (-1, heads))) for tensor in tensors]


def _load_states(weights: Tensors, momentum: Tensors, grid: ChunkGrid) -> States:
    layers = zip(*(_sorted(tensors, grid) for tensors in (weights, momentum) if tensors), strict=True)
    return [LayerState.of(layer) for layer in layers]


def _first_anchor(x: ChunkedInputs, grid: ChunkGrid) -> Tensors | None:
    """The anchor of the first chunk; None where it is simply the weights."""
    if not x.starts_inside_chunk():
        return None
    fresh = _over_states(x.position == 0)
    return _sorted([torch.where(fresh, w, a) for w, a in zip(x.weights, x.anchor, strict=True)], grid)


def _end_gradients(
    x: ChunkedInputs, grid: ChunkGrid, grad_weights: Tensors, grad_momentum: Tensors, grad_anchor: Tensors
) -> StateGradients:
    closes_chunk = _over_states(x.closing_rows())
    weights = [w + a.masked_fill(~closes_chunk, 0) for w, a in zip(grad_weights, grad_anchor, strict=True)]
    states = [state.clone() for state in _load_states(weights, grad_momentum, grid)]
    end_anchor = _sorted([a.masked_fill(closes_chunk, 0) for a in grad_anchor], grid)
    return StateGradients(states, end_anchor, _first_anchor(x, grid), x.heads)


def _start_gradients(
    x: ChunkedInputs, grid: ChunkGrid, gradients: StateGradients, grad_anchor: Tensors
) -> tuple[Tensors, Tensors]:
    """Gradients of the initial weights and anchor."""
    weights = _unsorted([state.weights for state in gradients.states], grid, x.heads)
    anchor = [torch.zeros_like(tensor) for tensor in weights]
    if gradients.grad_first_anchor is not None:
        rows = grid.rows * x.heads
        first = _unsorted([_pad_rows(tensor, rows) for tensor in gradients.grad_first_anchor], grid, x.heads)
        fresh = _over_states(x.position == 0)
        weights = [w + a.masked_fill(~fresh, 0) for w, a in zip(weights, first, strict=True)]
        anchor = [a.masked_fill(fresh, 0) for a in first]
    empty = x.empty_rows()
    if empty is not None:
        passed = ~_over_states(empty)
        anchor = [a + end.masked_fill(passed, 0) for a, end in zip(anchor, grad_anchor, strict=True)]
    return weights, anchor


def _pad_rows(tensor: Tensor, rows: int) -> Tensor:
    missing = rows - tensor.shape[0]
    return tensor if missing == 0 else torch.cat([tensor, tensor.new_zeros((missing, *tensor.shape[1:]))])


class _Kept:
    """A stack of states, stored in tensors whose size follows from shapes alone (so they may have slack)."""

    def __init__(self, tensors: Tensors, depth: int, top: int = 0) -> None:
        self.tensors, self.depth, self.top = tensors, depth, top
        self.flat = [tensor.flatten(0, 1) for tensor in tensors]

    @classmethod
    def allocate(cls, x: ChunkedInputs, grid: ChunkGrid) -> _Kept:
        cells = kept_cells(grid.num_tokens, grid.rows, x.chunk_size)
        tensors = [state.new_empty((cells, *state.shape[1:])) for state in [*x.weights, *x.momentum]]
        return cls(tensors, x.spec.depth)

    def push(self, states: States, rows: int) -> None:
        weights, momentum = (
            [s.weights for s in states],
            [s.momentum for s in states if s.momentum is not None],
        )
        for flat, tensor in zip(self.flat, [*weights, *momentum], strict=True):
            flat[self.top : self.top + rows] = tensor[:rows]
        self.top += rows

    def pop(self, rows: int) -> States:
        self.top -= rows
        tensors = [flat[self.top : self.top + rows] for flat in self.flat]
        return [LayerState.of(tensors[layer :: self.depth]) for layer in range(self.depth)]


class _Collected:
    """Gradients of the token-wise arguments, group by group."""

    def __init__(self, x: ChunkedInputs, grid: ChunkGrid) -> None:
        self.x, self.grid = x, grid
        gates = {"theta": x.theta, "log_momentum": x.log_momentum}
        gates |= {f"log_decay{layer}": tensor for layer, tensor in enumerate(x.log_decay)}
        tokens = {"q": x.q, "k": x.k, "v": x.v, **gates}
        self.like = {name: tensor for name, tensor in tokens.items() if tensor is not None}
        self.canvas = {name: grid.canvas(tensor) for name, tensor in self.like.items()}
        self.norm_weight = None if x.norm_weight is None else torch.zeros_like(x.norm_weight)
        self.norm_bias = None if x.norm_bias is None else torch.zeros_like(x.norm_bias)

    def put(self, group: Group, name: str, values: Tensor) -> None:
        self.grid.scatter(self.canvas[name], values, group.first_cell, group.cells)

    def put_gates(self, group: Group, unique: list[GateGradients]) -> None:
        """`unique` has one entry per memory layer, or a single one that they all share."""
        theta, decay, momentum = zip(*(gradients.to_gates(group.real) for gradients in unique), strict=True)

        def put_scalar(name: str, layers: tuple[Tensor, ...]) -> None:
            stacked = torch.stack(layers, dim=-1)
            shared = self.like[name].shape[-1] == 1
            self.put(group, name, stacked.sum(-1, keepdim=True) if shared else stacked)

        put_scalar("theta", theta)
        if self.x.log_momentum is not None:
            put_scalar("log_momentum", momentum)
        if not self.x.channelwise:
            put_scalar("log_decay0", decay)
            return
        for layer, values in enumerate(decay):
            self.put(group, f"log_decay{layer}", values)

    def add_affine(self, gains: list[Tensor | None], biases: list[Tensor | None]) -> None:
        for total, parts in ((self.norm_weight, gains), (self.norm_bias, biases)):
            if total is None:
                continue
            for part in parts:
                assert part is not None
                total += part.sum(1).view(-1, *total.shape).sum(0)

    def finish(self, weights: Tensors, momentum: Tensors, anchor: Tensors) -> ChunkedGradients:
        done = {name: self.grid.finish(self.canvas[name], like) for name, like in self.like.items()}
        return ChunkedGradients(
            q=done["q"],
            k=done["k"],
            v=done["v"],
            theta=done["theta"],
            log_decay=[done[f"log_decay{layer}"] for layer in range(len(self.x.log_decay))],
            log_momentum=done.get("log_momentum"),
            weights=weights,
            momentum=momentum,
            anchor=anchor,
            norm_weight=self.norm_weight,
            norm_bias=self.norm_bias,
        )
