"""Writing the chunks of a group one after another: the only part that must be serial."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from titans.ops.chunked.dual import carry, carry_backward
from titans.ops.chunked.gates import GateGradients
from titans.ops.chunked.grid import ChunkGrid
from titans.ops.chunked.group import ChunkedInputs, Group
from titans.ops.chunked.inner import Curvature, InnerTrace, inner_backward, inner_forward, stack_layers
from titans.ops.chunked.read import GroupReadGradients
from titans.ops.chunked.written import Written


class Ends:
    """State of every row after its last token (rows without tokens keep the state they came with)."""

    def __init__(self, weights: list[Tensor], momentum: list[Tensor], anchor: list[Tensor], heads: int) -> None:
        self.weights = [tensor.clone() for tensor in weights]
        self.momentum = [tensor.clone() for tensor in momentum]
        self.anchor = [tensor.clone() for tensor in anchor]
        self.heads = heads

    def keep(
        self, ending: slice | Tensor, weights: list[Tensor], momentum: list[Tensor], anchor: list[Tensor]
    ) -> None:
        if isinstance(ending, slice):
            rows = slice(ending.start * self.heads, ending.stop * self.heads)
            for kept, new in zip(
                self.weights + self.momentum + self.anchor, weights + momentum + anchor, strict=True
            ):
                kept[rows] = new[rows]
        else:  # every row is alive to the last step; later steps change nothing in rows that have ended
            self.weights, self.momentum = weights, momentum
            mask = ending.repeat_interleave(self.heads)[:, None, None]
            self.anchor = [torch.where(mask, new, old) for new, old in zip(anchor, self.anchor, strict=True)]


def write_group(
    x: ChunkedInputs,
    grid: ChunkGrid,
    group: Group,
    weights: list[Tensor],
    momentum: list[Tensor],
    first_anchor: list[Tensor] | None,
    ends: Ends | None,
) -> Written:
    """Write the chunks of a group one after another. `first_anchor` replaces the weights at step 0."""
    traces, updates, start_weights, start_momentum = [], [], [], []
    for step, cells in zip(group.steps, group.slices, strict=True):
        rows = cells.stop - cells.start
        weights = [tensor[:rows] for tensor in weights]
        momentum = [tensor[:rows] for tensor in momentum]
        anchor = first_anchor if step == 0 and first_anchor is not None else weights
        trace = inner_forward(
            group.k[cells],
            group.v[cells],
            [tensor[:rows] for tensor in anchor],
            x.spec,
            None if group.gain is None else group.gain[cells],
            None if group.bias is None else group.bias[cells],
        )
        update = [theta[cells] * grad for theta, grad in zip(group.theta, trace.grads, strict=True)]
        traces.append(trace)
        updates.append(update)
        start_weights.append(weights)
        start_momentum.append(momentum)
        new_weights, new_momentum = [], []
        for layer in range(x.spec.depth):
            new_weight, new = carry(
                trace.inputs[layer],
                update[layer],
                weights[layer],
                momentum[layer] if momentum else None,
                group.gates[layer][cells],
            )
            new_weights.append(new_weight)
            if new is not None:
                new_momentum.append(new)
        ending = grid.ending(step)
        if ends is not None and ending is not None:
            ends.keep(ending, new_weights, new_momentum, anchor)
        weights, momentum = new_weights, new_momentum
    return Written(
        traces, stack_layers(updates), stack_layers(start_weights), stack_layers(start_momentum), weights, momentum
    )


class StateGradients:
    """Gradients of the state while the backward walks from the last chunk to the first, sorted rows x heads.

    first_anchor: the anchor used at step 0 where it is not the weights at that step.
    """

    def __init__(
        self,
        weights: list[Tensor],
        momentum: list[Tensor],
        end_anchor: list[Tensor],
        first_anchor: list[Tensor] | None,
        heads: int,
    ) -> None:
        self.weights, self.momentum = weights, momentum
        self.end_anchor, self.first_anchor, self.heads = end_anchor, first_anchor, heads
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

    def replace(
        self, weights: list[Tensor], momentum: list[Tensor], grad_first_anchor: list[Tensor] | None
    ) -> None:
        """The rows that were alive move on to the start of their chunk; the others wait for theirs."""
        for old, new in ((self.weights, weights), (self.momentum, momentum)):
            for layer, tensor in enumerate(new):
                if tensor.shape[0] == old[layer].shape[0]:
                    old[layer] = tensor
                else:
                    old[layer][: tensor.shape[0]] = tensor
        if grad_first_anchor is not None:
            self.grad_first_anchor = grad_first_anchor


def write_group_backward(
    x: ChunkedInputs,
    grid: ChunkGrid,
    group: Group,
    written: Written,
    trace: InnerTrace,
    reads: GroupReadGradients,
    into: list[GateGradients],
    state: StateGradients,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Take the writes back one by one. Returns the gradients of k, v and of theta per layer (`[N, C]`)."""
    bend = Curvature.of(trace, x.spec.activation)
    grad_inputs = [gradients.inputs for gradients in reads.layers]
    grad_updates = [gradients.updates for gradients in reads.layers]
    grad_v = torch.empty_like(group.v)
    for step, cells in zip(reversed(group.steps), reversed(group.slices), strict=True):
        rows = cells.stop - cells.start
        start_weights, start_momentum = [], []
        for layer, gradients in enumerate(reads.layers):
            at_start, momentum_at_start = carry_backward(
                state.weights[layer][:rows],
                state.momentum[layer][:rows] if state.momentum else None,
                trace.inputs[layer][cells],
                written.updates[layer][cells],
                written.start_weights[layer][cells],
                written.start_momentum[layer][cells] if state.momentum else None,
                group.gates[layer][cells],
                into[layer],
                cells,
                grad_inputs[layer][cells],
                grad_updates[layer][cells],
            )
            left, right = gradients.weights_factors
            start_weights.append(at_start.baddbmm_(left[cells].mT, right[cells]))
            if momentum_at_start is not None:
                assert gradients.momentum_factors is not None
                left, right = gradients.momentum_factors
                start_momentum.append(momentum_at_start.baddbmm_(left[cells].mT, right[cells]))
        separate = step == 0 and state.first_anchor is not None
        anchor = state.first_anchor if separate else [w[cells] for w in written.start_weights]
        grad_anchor = [torch.zeros_like(weight) for weight in start_weights] if separate else start_weights
        ending = grid.ending(step)
        if ending is not None:
            state.add_end_anchor(grad_anchor, ending)
        inner = inner_backward(
            [theta[cells] * grad[cells] for theta, grad in zip(group.theta, grad_updates, strict=True)],
            [grad[cells] for grad in grad_inputs],
            trace[cells],
            bend[cells],
            [tensor[:rows] for tensor in anchor],
            grad_anchor,
            x.spec,
            None if group.gain is None else group.gain[cells],
        )
        grad_v[cells] = inner.v
        if inner.gain is not None and inner.bias is not None:
            assert reads.gain is not None and reads.bias is not None
            reads.gain[cells] += inner.gain
            reads.bias[cells] += inner.bias
        state.replace(start_weights, start_momentum, grad_anchor if separate else None)
    grad_theta = [
        (grad_update * grad).sum(-1) for grad_update, grad in zip(grad_updates, trace.grads, strict=True)
    ]
    return grad_inputs[0], grad_v, grad_theta
