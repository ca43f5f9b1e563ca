"""One token a row, no gradients: the recurrence with the inner gradient by hand. Decoding in plain PyTorch.

The dual form pays a few hundred small operations for gate matrices and masks that one token has no use for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans.ops.chunked.inner import InnerTrace, inner_forward, shifted_target
from titans.ops.network import apply_memory
from titans.ops.reference import layer_gate
from titans.ops.spec import MemorySpec, MemoryState


@torch.no_grad()
def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    log_decay: Tensor | tuple[Tensor, ...],
    log_momentum: Tensor | None,
    state: MemoryState,
    spec: MemorySpec,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    chunk_size: int,
    cu_seqlens: None = None,
) -> tuple[Tensor, MemoryState]:
    """`neural_memory` for T = 1 without documents. Nothing is differentiable, and the state not written."""
    batch, _, heads, dim = q.shape
    cells = batch * heads  # the memories, one for each row and head

    def of_cells(affine: Tensor | None) -> Tensor | None:
        return None if affine is None else affine.expand(batch, heads, dim).reshape(cells, 1, dim)

    key, target = (tensor.reshape(cells, 1, dim) for tensor in (k, v))
    anchor = _anchor(state.position, state.weights, state.anchor)
    trace = InnerTrace.allocate(key, spec)
    target = shifted_target(key, target, spec, of_cells(norm_bias))
    inner_forward(target, [matrix.flatten(0, 1) for matrix in anchor], spec, of_cells(norm_weight), trace)

    weights, momentum = [], []
    for layer, old in enumerate(state.weights):
        size = layer_gate(theta, 0, layer).expand(batch, heads, 1, 1).reshape(cells, 1, 1)
        column, row = trace.inputs[layer].mT, trace.grads[layer] * -size
        if log_momentum is None:
            surprise = torch.bmm(column, row).view(old.shape)
        else:
            kept = layer_gate(log_momentum, 0, layer).exp() * state.momentum[layer]
            surprise = torch.baddbmm(kept.flatten(0, 1), column, row).view(old.shape)
            momentum.append(surprise)
        weights.append(torch.addcmul(surprise, layer_gate(log_decay, 0, layer).exp(), old))

    output = apply_memory(q[:, 0], tuple(weights), spec, norm_weight, norm_bias)
    position = (state.position + 1) % chunk_size
    return output[:, None], MemoryState(
        tuple(weights),
        tuple(momentum) if log_momentum is not None else state.momentum,
        _anchor(position, tuple(weights), anchor),
        position,
    )


def _anchor(position: Tensor, weights: tuple[Tensor, ...], anchor: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The weights in rows at the start of a chunk, elsewhere the anchor that holds for the chunk."""
    starts_chunk = (position == 0)[:, None, None, None]
    return tuple(torch.where(starts_chunk, new, old) for new, old in zip(weights, anchor, strict=True))
