"""The inner gradients of a stretch of tokens and the memory on the way, from the op's own chunk loop."""

from __future__ import annotations

import torch
from torch import Tensor

from titans.nn import Gates, MemoryCore
from titans.ops import MemoryState
from titans.ops.chunked.group import GROUP, ChunkedInputs, Group
from titans.ops.chunked.write import LayerState, write_group


def inner_writes(
    memory: MemoryCore, k: Tensor, v: Tensor, gates: Gates, state: MemoryState
) -> tuple[Tensor, Tensor, list[int]]:
    """What one row writes: k, v `[1, T, H, D]`, from `state` on.

    Returns:
        surprise `[H, T]`, norm of each token's inner gradient at its chunk's anchor, all layers together;
        change `[N, H]`, `||M - M_0||` at the start of every chunk (the first may be cut); these N starts.

    `ops/chunked/write.py` runs once more for what it leaves on the way: a token's inner gradient is `X^T G`
    in every memory layer, of rank one, so its norm is `|X| |G|` and it need not be formed.
    """
    spec, initial = memory.spec.memory, memory.initial
    dtype = state.weights[0].dtype

    def cast(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    def per_layer(gate: Tensor) -> Tensor:  # [B, T, H, L or 1]
        return gate.to(dtype).reshape(*gate.shape[:3], -1)

    k, v = k.to(dtype), v.to(dtype)
    x = ChunkedInputs(
        q=k,  # unused: nothing is read
        k=k,
        v=v,
        theta=per_layer(gates.theta),
        log_decay=[gate.to(dtype) for gate in gates.log_decay]
        if isinstance(gates.log_decay, tuple)
        else [per_layer(gates.log_decay)],
        log_momentum=None if gates.log_momentum is None else per_layer(gates.log_momentum),
        weights=list(state.weights),
        momentum=[] if gates.log_momentum is None else list(state.momentum),
        anchor=list(state.anchor),
        position=state.position,
        norm_weight=cast(initial.norm_weight),
        norm_bias=cast(initial.norm_bias),
        cu_seqlens=None,
        spec=spec,
        chunk_size=memory.spec.chunk_size,
        channelwise=isinstance(gates.log_decay, tuple),
    )
    grid, position = x.grid(), int(state.position[0])
    # One row: cells x heads is heads.
    states = [
        LayerState(weight[0], x.momentum[layer][0] if x.momentum else None)
        for layer, weight in enumerate(x.weights)
    ]
    anchor = [each[0] for each in (x.anchor if position else x.weights)]
    canvas = grid.canvas(v[..., :1])
    changes, starts = [], []
    for first_step in range(0, grid.steps, GROUP):
        group = Group.load(x, grid, first_step)
        written = write_group(grid, group, states, anchor, None, spec)
        states, trace = written.state, written.trace
        squares = [
            inputs.square().sum(-1, keepdim=True) * grads.square().sum(-1, keepdim=True)
            for inputs, grads in zip(trace.inputs, trace.grads, strict=True)
        ]
        grid.scatter(canvas, torch.stack(squares).sum(0).sqrt(), group.first_cell, group.cells)
        weights = tuple(start.weights.unflatten(0, (-1, memory.spec.heads)) for start in written.starts)
        changes.append(distance(weights, initial.weights))
        starts += [max(0, step * x.chunk_size - position) for step in group.steps]
    starts = [start for start in starts if start < k.shape[1]]  # a GPU plans a chunk more than there may be
    return grid.finish(canvas, v[..., :1])[0, :, :, 0].T, torch.cat(changes)[: len(starts)], starts


def distance(weights: tuple[Tensor, ...], initial: tuple[Tensor, ...]) -> Tensor:
    """`||M - M_0||` `[N, H]`, all layers together, of weights `[N, H, D_in, D_out]`."""
    return norm(tuple(weight - start for weight, start in zip(weights, initial, strict=True)))


def norm(weights: tuple[Tensor, ...]) -> Tensor:
    """Frobenius norm of all layers together: L tensors `[..., D_in, D_out]` -> `[...]`."""
    return torch.stack([weight.square().sum((-2, -1)) for weight in weights]).sum(0).sqrt()
