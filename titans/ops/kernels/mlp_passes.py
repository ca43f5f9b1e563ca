"""Launches of the two-layer memory's kernels over one group of cells, with the buffers that they share."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from titans.ops.kernels.dispatch import run_kernel
from titans.ops.kernels.gates import GRAD_ROWS
from titans.ops.kernels.launch import Call, Launch
from titans.ops.kernels.mlp_backward import (
    mlp_finish,
    mlp_read_backward_1,
    mlp_read_backward_1a,
    mlp_read_backward_2,
)
from titans.ops.kernels.mlp_forward import mlp_read, mlp_write
from titans.ops.kernels.mlp_write_backward import mlp_write_backward
from titans.ops.kernels.plan import Groups, ceil_div
from titans.ops.spec import MemorySpec

Tensors = list[Tensor]

# 64 columns: with 32, Triton 3.6 reads past its shared memory on Hopper (wrong results, illegal accesses).
# 4 warps hold a tile of 64 rows once; 8 hold it twice wherever one product feeds the next in registers, so
# the serial kernels hand such tiles on through memory (docs/decisions.md, "Kernels"). Then 8 warps take half
# the time of 4 where each program has a core to itself. Where cores are full, `write` is faster with 4; below
# 64 rows, which wgmma does not multiply, both kernels are.
WRITE = Launch(warps=4)
WRITE_ALONE = Launch(warps=8)
READ = Launch(warps=4, stages=2)
READ_BACKWARD_2 = Launch(warps=4, stages=2)
READ_BACKWARD_1 = Launch(warps=4, stages=2)
WRITE_BACKWARD = Launch(warps=4)
WRITE_BACKWARD_ALONE = Launch(warps=8)  # and where there are 64 rows
FINISH = Launch(warps=4)
FINISH_IN_PAIRS = Launch(warps=8, registers=128)  # two programs a core, 16 warps where 4 have 255 registers


def write_launch(chunk_size: int, alone: bool) -> Launch:
    return WRITE_ALONE if alone and chunk_size >= 64 else WRITE


def write_backward_launch(chunk_size: int, alone: bool) -> Launch:
    return WRITE_BACKWARD_ALONE if alone or chunk_size >= 64 else WRITE_BACKWARD


def finish_launch(dim: int, chunk_size: int, exact: bool) -> Launch:
    """In pairs where 128 registers hold a thread's share of the tiles."""
    return FINISH_IN_PAIRS if (dim, chunk_size) == (64, 64) and not exact else FINISH


def _states(call: Call, cells: int, anchors: int = 0) -> Tensors:
    """W1, S1, W2, S2, with room for so many anchors behind each W; without momentum S is W: never read."""
    states = []
    for _ in range(2):
        W = call.scratch(cells + anchors, call.H, call.D, call.F)
        states += [W, call.scratch(cells, call.H, call.D, call.F) if call.momentum else W]
    return states


class MLPGradients:
    """The buffers of a group that `MLPGroup.backward` alone needs, named as in its kernels."""

    def __init__(self, call: Call, cells: int) -> None:
        H, D, F, C = call.H, call.D, call.F, call.C
        self.parts = call.scratch(2, cells, H, GRAD_ROWS.value, C, dtype=torch.float32).unbind()
        self.Z2, self.G2, self.complete_G2 = (call.scratch(cells, H, C, D) for _ in range(3))
        self.mixed1, self.mixed2, self.scores2 = (call.scratch(cells, H, C, C) for _ in range(3))
        self.H, self.G1, self.Z1, self.slope = (call.scratch(cells, H, C, F) for _ in range(4))
        self.K = call.scratch(cells, H, D, C)
        self.states, self.ends = _states(call, cells), _states(call, cells)


class MLPGroup:
    """The group whose turn it is, in buffers that the largest one fills. states: W1, S1, W2, S2 at the
    chunks' starts; written, G1, G2, normed, GN, rows: what the write leaves of the inner gradient; slope,
    bend: act' and what passes through act'', for the backward alone."""

    PROGRAMS = 128  # of a serial kernel that a GPU runs at once: one a core

    group: tuple[int, int]
    kept: Tensors  # states at the starts of its segments, where a backward follows
    _vectors: tuple[Tensor, Tensor]  # of the layers' gates: the same where they share them

    def __init__(self, call: Call, groups: Groups) -> None:
        cells, H, C, D, F = groups.cells, call.H, call.C, call.D, call.F
        self.call, self.groups = call, groups
        self.states = _states(call, cells, call.plan.rows)
        self.written, self.G1, self.slope, self.bend = (call.scratch(cells, H, C, F) for _ in range(4))
        self.G2, self.normed, self.GN = (call.scratch(cells, H, C, D) for _ in range(3))
        self.rows = call.scratch(cells, H, 3, C, dtype=torch.float32)
        self._columns = F if call.one_after_another else min(WRITE.block, F)
        self._allocate_shared(F // self._columns)

    def _allocate_shared(self, parts: int) -> None:
        """What the programs of a head share in the serial kernels, so many of them: one exchange for all
        launches, and for each a row of counters, which start at zero (one launch fills them all)."""
        call = self.call
        self._arrived: Iterator[Tensor]
        if parts == 1:  # nobody looks at either
            self._exchange = call.scratch(1, dtype=torch.float32)
            self._arrived = repeat(call.scratch(1, dtype=torch.int32))
            return
        segments = self.groups.segments(self.groups.cells)
        heads = segments * call.plan.rows * call.H  # of a launch, at most
        self._exchange = call.scratch(heads, 2, parts, call.C, call.D, dtype=torch.float32)
        launches = sum(max(2, self.groups.segments(end - start)) for start, end in self.groups.bounds)
        width = ceil_div(1 + heads, 4) * 4  # every row at a multiple of 16 bytes, as `run_kernel` wants it
        counters = torch.zeros(launches, width, dtype=torch.int32, device=call.q.device)
        self._arrived = iter(counters.unbind())

    def take(self, group: tuple[int, int], kept: Tensors) -> None:
        """What follows is about this group. kept: those of the whole call."""
        self.group, self.kept = group, self.groups.of_group(kept, group)
        vectors = self.call.gate_vectors(group)
        self._vectors = vectors[0], vectors[-1]

    @cached_property
    def _gradients(self) -> MLPGradients:
        return MLPGradients(self.call, self.groups.cells)

    @staticmethod
    def programs_per_head(spec: MemorySpec) -> int:
        return max(1, spec.dim * spec.expansion // WRITE.block)

    @staticmethod
    def momentum_dtype(dtype: torch.dtype) -> torch.dtype:
        """In which `write` hands it on from chunk to chunk."""
        return dtype

    @staticmethod
    def numbers_per_cell(spec: MemorySpec, chunk_size: int) -> int:
        """In the buffers of one head of a cell, forward and backward."""
        D, F, C = spec.dim, spec.dim * spec.expansion, chunk_size
        return 12 * D * F + 8 * C * F + 8 * C * D + 3 * C * C

    @property
    def _cells(self) -> int:
        return self.group[1] - self.group[0]

    @property
    def _tables(self) -> tuple[Tensor, Tensor]:
        return self.call.plan.table, self.call.plan.cell_row

    def _serial(self) -> tuple[int, ...]:
        plan = self.call.plan
        return (plan.rows, *self.group, plan.stride)

    def _parallel(self) -> tuple[int, ...]:
        plan = self.call.plan
        return (plan.rows, self.group[0], plan.stride)

    def _options(self, launch: Launch) -> dict[str, int]:
        """Tiles of a head twice as wide need twice the registers, and loads ahead do not fit."""
        wide = max(1, self.call.D // 64)
        if wide == 1 and not self.call.exact:
            return launch.options
        return {"num_warps": max(launch.warps, 4 * wide), "num_stages": 1}

    def _sizes(self, columns: int) -> tuple[Any, ...]:
        call = self.call
        activation: str = call.spec.activation
        if activation == "gelu" and call.exact:
            activation = "gelu_fp32"
        return (call.H, call.D, call.F, min(columns, call.F), call.C, activation)

    def _programs(self, segments: int = 1) -> tuple[int]:
        """The grid of a serial kernel."""
        return (segments * self.call.plan.rows * self.call.H * (self.call.F // self._columns),)

    def _alone(self, segments: int = 1) -> bool:
        """Whether every program of a serial kernel has a core to itself, and waits for its own chain only."""
        return self._programs(segments)[0] <= self.PROGRAMS

    def write(self, weights: Tensors, momentum: Tensors, first: Tensors, end: Tensors) -> None:
        """Moves weights and momentum on to the end of the group, in place."""
        (W1, W2), (S1, S2) = weights, momentum or weights
        states = [W1, S1, W2, S2, *first, *end]
        segment = self.groups.segment if self.kept else self._cells  # one
        for number in range(self.groups.segments(self._cells) if self.kept else 1):
            self._write(states, (segment, number), 1, again=False)

    def write_again(self, first: Tensors) -> None:
        """The same from the kept states, with what `backward` needs."""
        segments = self.groups.segments(self._cells)
        states = [first[0]] * 4 + [*first, *first]  # all but `first` are left alone
        self._write(states, (self.groups.segment, 0), segments, again=True)

    def _write(self, states: Tensors, segment: tuple[int, int], segments: int, again: bool) -> None:
        call, alone = self.call, self._alone(segments)
        W1, W2, *momentum = self.kept or self.states[::2]
        S1, S2 = momentum or (W1, W2)
        run_kernel(
            mlp_write, self._programs(segments), self._options(write_launch(call.C, alone)),
            call.k, call.v, call.gain, call.bias, *self._vectors, call.plan.table, *states, W1, S1, W2, S2,
            *self.states, self.written, self.G1, self.G2, self.slope, self.bend, self.normed, self.GN,
            self.rows, self._exchange, next(self._arrived),
            *self._serial(), *segment, *self._sizes(self._columns),
            call.spec.residual, call.spec.norm, call.momentum, bool(self.kept) and not again, again,
            alone, call.precision,
        )  # fmt: skip

    def read(self, output: Tensor) -> None:
        call = self.call
        run_kernel(
            mlp_read, (self._cells * call.H,), self._options(READ),
            call.q, call.k, output, call.gain, call.bias, *self._vectors, *self._tables, *self.states,
            self.written, self.G1, self.G2, *self._parallel(), *self._sizes(READ.block),
            call.spec.residual, call.spec.norm, call.momentum, call.sets == 1, call.exact, call.precision,
        )  # fmt: skip

    def backward(
        self,
        grad_output: Tensor,
        grad_weights: Tensors,
        grad_momentum: Tensors,
        grad_first: Tensors,
        grad_end: Tensors,
    ) -> None:
        """After `write`: gradients of the tokens go to the call's, those of the state move back in place."""
        call, grads, own = self.call, self.call.grads, self._gradients
        grid, shared = (self._cells * call.H,), call.sets == 1
        of_affine = self._affine()
        gain, bias = of_affine.unbind()
        read = own.G1  # until its place is taken, as the reads' share of Z1
        run_kernel(
            mlp_read_backward_2, grid, self._options(READ_BACKWARD_2),
            call.q, call.k, grad_output, call.gain, *self._vectors, *self._tables, *self.states,
            self.written, self.G1, self.G2, read, own.slope, own.Z2, own.mixed1, own.mixed2, own.scores2,
            own.parts[1], gain, bias,
            *self._parallel(), *self._sizes(READ_BACKWARD_2.block),
            call.spec.norm, call.momentum, shared, call.exact, call.precision,
        )  # fmt: skip
        run_kernel(
            mlp_read_backward_1a, grid, self._options(READ_BACKWARD_1),
            self._vectors[1], *self._tables, *self.states[2:], self.written, read, own.slope, own.Z2,
            own.mixed2, own.scores2, own.Z1, own.H, own.G2, *own.states[2:], own.parts[1],
            *self._parallel(), *self._sizes(READ_BACKWARD_1.block), call.momentum, call.precision,
        )  # fmt: skip
        run_kernel(
            mlp_read_backward_1, grid, self._options(READ_BACKWARD_1),
            call.q, call.k, grad_output, grads.q, self._vectors[0], *self._tables, *self.states[:2], self.G1,
            own.Z1, own.mixed1, own.K, own.G1, *own.states[:2], own.parts[0],
            *self._parallel(), *self._sizes(READ_BACKWARD_1.block),
            call.spec.residual, call.momentum, call.exact, call.precision,
        )  # fmt: skip
        (W1, W2), (S1, S2) = grad_weights, grad_momentum or grad_weights
        alone = self._alone()
        run_kernel(
            mlp_write_backward, self._programs(), self._options(write_backward_launch(call.C, alone)),
            call.k, call.gain, *self._vectors, call.plan.table, W1, S1, W2, S2,
            *grad_first, *grad_end, self.states[2], self.written, self.slope, self.bend, self.G2, self.normed,
            self.GN, self.rows,
            own.H, own.G1, own.G2, *own.states, *own.ends, own.Z2, own.Z1, own.complete_G2,
            self._exchange, next(self._arrived), *self._serial(), *self._sizes(self._columns),
            call.spec.norm, call.momentum, alone, call.precision,
        )  # fmt: skip
        run_kernel(
            mlp_finish, grid, self._options(finish_launch(call.D, call.C, call.exact)),
            call.k, call.v, call.gain, call.bias, grads.k, grads.v, *self._vectors, *self._tables,
            *self.states, self.written, self.G1, self.G2, self.normed, self.rows, own.K, own.Z1,
            own.complete_G2, gain, bias, *own.ends, *own.parts,
            grads.theta, grads.log_decay, grads.log_momentum,
            call.plan.rows, *self.group, call.plan.stride, *self._sizes(FINISH.block),
            call.spec.residual, call.spec.norm, call.momentum, shared, call.precision,
        )  # fmt: skip
        if grads.affine is not None:
            grads.affine += of_affine.sum(1)

    def _affine(self) -> Tensor:
        """Gradients of gain and bias by the cells: kernels leave out those without tokens, hence zero."""
        zeros = self.call.grads.affine is not None
        shape = (2, self._cells, self.call.H, self.call.D)
        return (torch.zeros if zeros else torch.empty)(shape, device=self.call.q.device)
