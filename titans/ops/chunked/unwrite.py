"""Taking the writes of a group back, last chunk first."""

from __future__ import annotations

import torch
from torch import Tensor

from titans.ops.chunked.dual import Carry, CarryTape
from titans.ops.chunked.gates import GateGradients
from titans.ops.chunked.grid import ChunkGrid
from titans.ops.chunked.group import Group
from titans.ops.chunked.inner import InnerTape, finish_inner_backward, inner_backward
from titans.ops.chunked.read import GroupReadGradients
from titans.ops.chunked.write import LayerState, States, Written, anchors_at
from titans.ops.spec import MemorySpec


class StateGradients:
    """Gradients of the state while the backward walks from the last chunk to the first, sorted rows x heads.

    end_anchor: gradients of the returned anchor. first_anchor: the anchor at step 0 where it is not the
    weights there, and after the walk `grad_first_anchor` its gradient.
    """

    def __init__(
        self, states: States, end_anchor: list[Tensor], first_anchor: list[Tensor] | None, heads: int
    ) -> None:
        self.states, self.end_anchor, self.first_anchor, self.heads = states, end_anchor, first_anchor, heads
        self.grad_first_anchor: list[Tensor] | None = None

    def add_end_anchor(self, grad_anchor: list[Tensor], ending: slice | Tensor) -> None:
        """The returned anchor is the one of the chunk that holds the row's last token."""
        for grad, end in zip(grad_anchor, self.end_anchor, strict=True):
            if isinstance(ending, slice):
                rows = slice(ending.start * self.heads, ending.stop * self.heads)
                grad[rows] += end[rows]
            else:
                mask = ending.repeat_interleave(self.heads)[:, None, None]
                grad += end.masked_fill(~mask, 0)

    def replace(self, states: States) -> None:
        """The rows that were alive move on to the start of their chunk; the others wait for theirs."""
        for layer, new in enumerate(states):
            old = self.states[layer]
            if new.weights.shape[0] == old.weights.shape[0]:
                self.states[layer] = new
                continue
            for old_tensor, new_tensor in zip(old.tensors, new.tensors, strict=True):
                old_tensor[: new_tensor.shape[0]] = new_tensor


class WriteGradients:
    """Gradients that leave the writes of a group, `[N, C, D]` each (gain, bias: None without a LN)."""

    def __init__(self, k: Tensor, v: Tensor, gain: Tensor | None, bias: Tensor | None) -> None:
        self.k, self.v, self.gain, self.bias = k, v, gain, bias


def write_group_backward(
    grid: ChunkGrid,
    group: Group,
    written: Written,
    reads: GroupReadGradients,
    into: list[GateGradients],
    gradients: StateGradients,
    spec: MemorySpec,
) -> WriteGradients:
    """Gate gradients are added to `into`, those of the state replace what `gradients` holds."""
    sizes = group.sizes
    tape = InnerTape.of(written.trace, group.target, spec, group.gain)
    tapes = tape.split(sizes)
    whole = [Carry.of(gates, start.weights) for gates, start in zip(group.gates, written.starts, strict=True)]
    carries = [carry.split(sizes) for carry in whole]
    carry_tapes = [CarryTape() for _ in whole]
    starts = [start.split(sizes) for start in written.starts]
    grad_inputs = [read.inputs for read in reads.layers]
    grad_grads = [read.grads for read in reads.layers]
    input_parts = [tensor.split(sizes) for tensor in grad_inputs]
    grad_parts = [tensor.split(sizes) for tensor in grad_grads]
    factors = [
        [
            [side.split(sizes) for side in pair]
            for pair in (read.weights_factors, read.momentum_factors)
            if pair
        ]
        for read in reads.layers
    ]
    square_gain = None if group.gain is None else group.gain[: max(sizes)].square()
    for index in range(len(sizes) - 1, -1, -1):
        step, rows, trace = group.steps[index], sizes[index], tapes[index].trace
        at_start: States = []
        for layer, carry_tape in enumerate(carry_tapes):
            start, grad = starts[layer][index], gradients.states[layer].rows(slice(rows))
            pair = carries[layer][index].backward(
                grad.weights,
                grad.momentum,
                trace.inputs[layer],
                trace.grads[layer],
                start.weights,
                start.momentum,
                input_parts[layer][index],
                grad_parts[layer][index],
                carry_tape,
            )
            state = LayerState(*pair)
            for tensor, (left, right) in zip(state.tensors, factors[layer], strict=True):
                tensor.baddbmm_(left[index].mT, right[index])
            at_start.append(state)
        separate = step == 0 and gradients.first_anchor is not None
        anchor = anchors_at(step, [start[index] for start in starts], gradients.first_anchor, rows)
        grad_anchor = [state.weights for state in at_start]
        if separate:
            grad_anchor = gradients.grad_first_anchor = [torch.zeros_like(tensor) for tensor in anchor]
        ending = grid.ending(step)
        if ending is not None:
            gradients.add_end_anchor(grad_anchor, ending)
        inner_backward(
            [parts[index] for parts in grad_parts],
            [parts[index] for parts in input_parts],
            tapes[index],
            anchor,
            grad_anchor,
            spec,
            None if square_gain is None else square_gain[:rows],
        )
        gradients.replace(at_start)
    _add_gate_gradients(group, written, whole, carry_tapes, into)
    inner = finish_inner_backward(grad_grads[-1], grad_inputs[0], tape, group.target, spec, group.gain)
    return WriteGradients(grad_inputs[0], inner.v, inner.gain, inner.bias)


def _add_gate_gradients(
    group: Group, written: Written, carries: list[Carry], tapes: list[CarryTape], into: list[GateGradients]
) -> None:
    trace = written.trace
    for carry, tape, inputs, grads, target in zip(
        carries, tapes, trace.inputs, trace.grads, into, strict=True
    ):
        tape.add_to(target, carry, inputs, grads)
