"""Writing the chunks of a group one after another: the only part that must be serial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from titans.ops.chunked.dual import Carry
from titans.ops.chunked.grid import ChunkGrid
from titans.ops.chunked.group import Group
from titans.ops.chunked.inner import InnerTrace, inner_forward
from titans.ops.spec import MemorySpec


@dataclass
class LayerState:
    """Weights (and momentum, None without) of one memory layer, `[N, D_in, D_out]`."""

    weights: Tensor
    momentum: Tensor | None

    @property
    def tensors(self) -> list[Tensor]:
        return [self.weights] if self.momentum is None else [self.weights, self.momentum]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> LayerState:
        return cls(tensors[0], tensors[1] if len(tensors) > 1 else None)

    def rows(self, rows: slice) -> LayerState:
        return LayerState.of([tensor[rows] for tensor in self.tensors])

    def clone(self) -> LayerState:
        return LayerState.of([tensor.clone() for tensor in self.tensors])

    def empty(self, rows: int) -> LayerState:
        return LayerState.of([tensor.new_empty((rows, *tensor.shape[1:])) for tensor in self.tensors])

    def split(self, sizes: list[int]) -> list[LayerState]:
        parts = zip(*(tensor.split(sizes) for tensor in self.tensors), strict=True)
        return [LayerState.of(part) for part in parts]


States = list[LayerState]


@dataclass
class Written:
    """A group after its writes. starts: the state at the start of every chunk; state: after the last."""

    trace: InnerTrace
    starts: States
    state: States


class Ends:
    """State and anchor of every row after its last token (a row without tokens keeps what it came with)."""

    def __init__(self, states: States, anchor: list[Tensor], heads: int) -> None:
        self.states = [state.clone() for state in states]
        self.anchor = [tensor.clone() for tensor in anchor]
        self.heads = heads

    def keep(self, ending: slice | Tensor, states: States, anchor: list[Tensor]) -> None:
        if isinstance(
            ending, Tensor
        ):  # all rows live to the last step; steps after a row's end change nothing
            mask = ending.repeat_interleave(self.heads)[:, None, None]
            self.states = states
            self.anchor = [torch.where(mask, new, old) for new, old in zip(anchor, self.anchor, strict=True)]
            return
        rows = slice(ending.start * self.heads, ending.stop * self.heads)
        for kept, new in zip(self.states, states, strict=True):
            for kept_tensor, new_tensor in zip(kept.tensors, new.tensors, strict=True):
                kept_tensor[rows] = new_tensor[rows]
        for kept_anchor, new_anchor in zip(self.anchor, anchor, strict=True):
            kept_anchor[rows] = new_anchor[rows]


def anchors_at(step: int, starts: States, first_anchor: list[Tensor] | None, rows: int) -> list[Tensor]:
    """Where gradients are taken: the weights at the chunk's start, unless a row began inside its chunk."""
    if step == 0 and first_anchor is not None:
        return [tensor[:rows] for tensor in first_anchor]
    return [state.weights for state in starts]


def write_group(
    grid: ChunkGrid,
    group: Group,
    states: States,
    first_anchor: list[Tensor] | None,
    ends: Ends | None,
    spec: MemorySpec,
) -> Written:
    sizes, steps = group.sizes, len(group.sizes)
    trace = InnerTrace.allocate(group.k, spec)
    buffers = [state.empty(sum(sizes)) for state in states]
    traces, targets = trace.split(sizes), group.target.split(sizes)
    starts = list(zip(*(buffer.split(sizes) for buffer in buffers), strict=True))
    carries = list(
        zip(
            *(Carry.of(g, s.weights).split(sizes) for g, s in zip(group.gates, states, strict=True)),
            strict=True,
        )
    )
    _copy(states, starts[0], sizes[0])
    for index, step in enumerate(group.steps):
        rows, at_start = sizes[index], list(starts[index])
        anchor = anchors_at(step, at_start, first_anchor, rows)
        gain = None if group.gain is None else group.gain[:rows]
        inner_forward(targets[index], anchor, spec, gain, traces[index])
        follows = index + 1 < steps
        in_place = follows and sizes[index + 1] == rows
        states = list(starts[index + 1]) if in_place else [state.empty(rows) for state in at_start]
        for layer, (carry, start) in enumerate(zip(carries[index], at_start, strict=True)):
            inputs, grads = traces[index].inputs[layer], traces[index].grads[layer]
            carry.forward(inputs, grads, start.weights, start.momentum, out=states[layer].tensors)
        if follows and not in_place:
            _copy(states, starts[index + 1], sizes[index + 1])
        ending = grid.ending(step)
        if ends is not None and ending is not None:
            ends.keep(ending, states, anchor)
    return Written(trace, buffers, states)


def _copy(states: States, into: Sequence[LayerState], rows: int) -> None:
    for state, target in zip(states, into, strict=True):
        for tensor, slot in zip(state.tensors, target.tensors, strict=True):
            slot.copy_(tensor[:rows])
