"""Registers the step kernel as `titans::memory_step`, what `neural_memory` runs for one token.

Functional, so opaque to `torch.compile`; the state is copied first. A caller who owns it takes `memory_step`
in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titans.ops.kernels.step import own_memory, step_in_place
from titans.ops.spec import MemorySpec, MemoryState


def run_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    log_decay: Tensor,
    log_momentum: Tensor | None,
    state: MemoryState,
    spec: MemorySpec,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    chunk_size: int,
    cu_seqlens: None,
) -> tuple[Tensor, MemoryState]:
    """`neural_memory` for one token without gradients or documents; its arguments are checked already."""
    depth = spec.depth
    output, *tensors, position = _step(
        *(q, k, v, theta, log_decay, log_momentum),
        *(list(state.weights), list(state.momentum), list(state.anchor), state.position),
        *(norm_weight, norm_bias, spec.expansion, spec.activation, spec.residual, spec.norm, chunk_size),
    )
    weights, anchor, momentum = (tuple(tensors[i * depth : (i + 1) * depth]) for i in range(3))
    return output, MemoryState(weights, momentum or state.momentum, anchor, position)


@torch.library.custom_op("titans::memory_step", mutates_args=())
def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    log_decay: Tensor,
    log_momentum: Tensor | None,
    weights: list[Tensor],
    momentum: list[Tensor],
    anchor: list[Tensor],
    position: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    expansion: int,
    activation: str,
    residual: bool,
    norm: bool,
    chunk_size: int,
) -> list[Tensor]:
    """output, L weights, L anchor, L or no momentum, position."""
    kind: Any = activation  # operators take strings, not literals
    spec = MemorySpec(q.shape[-1], len(weights), expansion, kind, residual, norm)
    given = MemoryState(tuple(weights), tuple(momentum), tuple(anchor), position)
    state = own_memory(given, momentum=log_momentum is not None)
    output = step_in_place(
        q, k, v, theta, log_decay, log_momentum, state, spec, norm_weight, norm_bias, chunk_size
    )
    moved = state.momentum if log_momentum is not None else ()
    return [output, *state.weights, *state.anchor, *moved, state.position]


@_step.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    log_decay: Tensor,
    log_momentum: Tensor | None,
    weights: list[Tensor],
    momentum: list[Tensor],
    anchor: list[Tensor],
    position: Tensor,
    *others: object,
) -> list[Tensor]:
    moved = momentum if log_momentum is not None else []
    given = [v, *weights, *anchor, *moved, position]
    return [tensor.new_empty(tensor.shape) for tensor in given]
