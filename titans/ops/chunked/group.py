"""The arguments of the op, and the part of them that a group of consecutive chunks needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from titans.ops.chunked.gates import GateMatrices
from titans.ops.chunked.grid import ChunkGrid, make_grid
from titans.ops.chunked.inner import shifted_target
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
    channelwise: bool

    @property
    def gates_are_shared(self) -> bool:
        """Whether all memory layers have the same theta, decay and momentum."""
        gates = [self.theta, *self.log_decay, *([] if self.log_momentum is None else [self.log_momentum])]
        return not self.channelwise and all(gate.shape[-1] == 1 for gate in gates)

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
    """The data of some consecutive steps: tensors of N = cells x heads chunks.

    sizes: how many of the N belong to each step. target: see `inner.shifted_target`. gates: one entry per
    memory layer. real: `[N, C]`, None where no slot is padded. gain, bias: `[N, 1, D]` or None.
    """

    steps: range
    first_cell: int
    cells: int
    sizes: list[int]
    q: Tensor
    k: Tensor
    target: Tensor
    gates: list[GateMatrices]
    real: Tensor | None
    gain: Tensor | None
    bias: Tensor | None

    @classmethod
    def load(cls, x: ChunkedInputs, grid: ChunkGrid, first_step: int) -> Group:
        steps = range(first_step, min(first_step + GROUP, grid.steps))
        first_cell = grid.first_cell[steps.start]
        cells = grid.first_cell[steps.stop] - first_cell

        def affine(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.repeat(cells, 1).unsqueeze(1)

        k, bias = grid.gather(x.k, first_cell, cells), affine(x.norm_bias)
        real = None if grid.real is None else grid.mask(first_cell, cells, x.heads)
        return cls(
            steps,
            first_cell,
            cells,
            sizes=[grid.active[step] * x.heads for step in steps],
            q=grid.gather(x.q, first_cell, cells),
            k=k,
            target=shifted_target(k, grid.gather(x.v, first_cell, cells), x.spec, bias),
            gates=gate_matrices(x, lambda gate: grid.gather_zeroed(gate, first_cell, cells), real),
            real=real,
            gain=affine(x.norm_weight),
            bias=bias,
        )


def gate_matrices(
    x: ChunkedInputs, gather: Callable[[Tensor], Tensor], real: Tensor | None
) -> list[GateMatrices]:
    """One entry per layer; the same object where layers share all their gates, so that it is built once."""
    theta, log_decay = gather(x.theta), [gather(tensor) for tensor in x.log_decay]
    log_momentum = None if x.log_momentum is None else gather(x.log_momentum)

    def build(layer: int) -> GateMatrices:
        def one(gate: Tensor) -> Tensor:
            return gate[..., min(layer, gate.shape[-1] - 1)]

        return GateMatrices.build(
            one(theta),
            log_decay[layer] if x.channelwise else one(log_decay[0]),
            None if log_momentum is None else one(log_momentum),
            real,
            x.channelwise,
        )

    if x.gates_are_shared:
        return [build(0)] * x.spec.depth
    return [build(layer) for layer in range(x.spec.depth)]
