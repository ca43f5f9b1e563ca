"""The arguments of the op, and the part of them that a group of consecutive chunks needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from titans.ops.chunked.gates import GateMatrices
from titans.ops.chunked.grid import ChunkGrid, make_grid
from titans.ops.spec import MemorySpec

GROUP = 8  # chunks whose reads are done together, and between two kept states


@dataclass(frozen=True)
class ChunkedInputs:
    """Arguments of the op, all of one dtype.

    q, k, v: `[B, T, H, D]`; theta, log_momentum: `[B, T, H, 1 or L]`; log_decay: one such tensor, or L
    tensors `[B, T, H, D_out]` (channelwise); weights, momentum, anchor: L tensors `[R, H, D_in, D_out]`
    (momentum is empty without momentum); position `[R]`; norm_weight, norm_bias: `[H, D]` or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    theta: Tensor
    log_decay: list[Tensor]
    log_momentum: Tensor | None
    weights: list[Tensor]
    momentum: list[Tensor]
    anchor: list[Tensor]
    position: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    cu_seqlens: Tensor | None
    spec: MemorySpec
    chunk_size: int

    @property
    def channelwise(self) -> bool:
        return self.log_decay[0].shape[-1] not in (1, self.spec.depth) or len(self.log_decay) > 1

    @property
    def heads(self) -> int:
        return self.q.shape[2]

    def grid(self) -> ChunkGrid:
        return make_grid(self.q.shape[0], self.q.shape[1], self.chunk_size, self.position, self.cu_seqlens)

    def empty_rows(self) -> Tensor | None:
        """`[R]`, True for documents without tokens, whose state passes through; None for a dense batch."""
        return None if self.cu_seqlens is None else self.cu_seqlens.diff() == 0

    def closing_rows(self) -> Tensor:
        """`[R]`, True where the last token closes a chunk: then the returned anchor is the weights."""
        if self.cu_seqlens is None:
            return (self.position + self.q.shape[1]) % self.chunk_size == 0
        lengths = self.cu_seqlens.diff()
        return ((self.position + lengths) % self.chunk_size == 0) & (lengths > 0)

    def starts_inside_chunk(self) -> bool:
        """Whether some row may begin inside a chunk (always, where the host does not know)."""
        return self.position.device.type != "cpu" or bool((self.position != 0).any())


@dataclass
class Group:
    """The data of some consecutive steps, N = cells x heads rows each."""

    steps: range
    first_cell: int
    cells: int
    q: Tensor
    k: Tensor
    v: Tensor
    theta: list[Tensor]
    gates: list[GateMatrices]
    real: Tensor | None
    gain: Tensor | None
    bias: Tensor | None
    slices: list[slice] = field(default_factory=list)

    @classmethod
    def load(cls, x: ChunkedInputs, grid: ChunkGrid, first_step: int) -> Group:
        steps = range(first_step, min(first_step + GROUP, grid.steps))
        first_cell, cells = grid.cells(0, first_step), grid.cells(steps.start, steps.stop)

        def load(tensor: Tensor) -> Tensor:
            return grid.gather(tensor, first_cell, cells)

        def gate(tensor: Tensor) -> Tensor:
            return grid.gather_zeroed(tensor, first_cell, cells)

        def affine(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.repeat(cells, 1).unsqueeze(1)

        real = None if grid.real is None else grid.mask(first_cell, cells, x.heads)
        theta = gate(x.theta)
        group = cls(
            steps,
            first_cell,
            cells,
            load(x.q),
            load(x.k),
            load(x.v),
            [theta[..., layer : layer + 1] for layer in per_layer(theta.shape[-1], x.spec.depth)],
            gate_matrices(x, gate, real),
            real,
            affine(x.norm_weight),
            affine(x.norm_bias),
        )
        start = 0
        for step in steps:
            stop = start + grid.active[step] * x.heads
            group.slices.append(slice(start, stop))
            start = stop
        return group


def per_layer(gates: int, depth: int) -> list[int]:
    """Which of the `gates` (1 or L) each memory layer uses."""
    return [min(layer, gates - 1) for layer in range(depth)]


def gate_matrices(x: ChunkedInputs, gate: Callable[[Tensor], Tensor], real: Tensor | None) -> list[GateMatrices]:
    """One entry per layer; the same object where layers share their gates, so that it is built once."""
    log_momentum = None if x.log_momentum is None else gate(x.log_momentum)
    log_decay = [gate(tensor) for tensor in x.log_decay]
    built: dict[tuple[int, int], GateMatrices] = {}
    matrices = []
    for layer in range(x.spec.depth):
        slot = 0 if log_momentum is None else min(layer, log_momentum.shape[-1] - 1)
        decay_slot = layer if x.channelwise else min(layer, log_decay[0].shape[-1] - 1)
        if (decay_slot, slot) not in built:
            built[decay_slot, slot] = GateMatrices.build(
                log_decay[layer] if x.channelwise else log_decay[0][..., decay_slot],
                None if log_momentum is None else log_momentum[..., slot],
                real,
                x.channelwise,
            )
        matrices.append(built[decay_slot, slot])
    return matrices
