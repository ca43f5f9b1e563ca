"""Launches of the linear memory's kernels over one group of cells, with the buffers that they share."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from titans.ops.kernels.dispatch import run_kernel
from titans.ops.kernels.gates import GRAD_ROWS
from titans.ops.kernels.launch import Call, Launch
from titans.ops.kernels.linear import (
    linear_finish,
    linear_read,
    linear_read_backward,
    linear_write,
    linear_write_backward,
)
from titans.ops.kernels.plan import Groups
from titans.ops.spec import MemorySpec

# Three stages of loads where all waits for the chain of chunks (docs/kernels.md). With one Triton 3.6 goes
# past its memory, or is wrong. Two for heads of 128 in chunks of 64: then two programs share a core's memory.
WRITE = Launch(warps=4, stages=3, block=32)
READ = Launch(warps=4, stages=2, block=64)
READ_BACKWARD = Launch(warps=4, stages=1, block=64)
WRITE_BACKWARD = Launch(warps=4, stages=3, block=32)
FINISH = Launch(warps=4, stages=1, block=64)


@lru_cache
def serial_launch(launch: Launch, dim: int, chunk_size: int, exact: bool, crowded: bool) -> Launch:
    """exact: fp32 tiles are twice as large, three of each do not fit into shared memory."""
    if exact or (dim > 64 and chunk_size >= 64):
        return replace(launch, stages=2)
    return replace(launch, warps=2) if crowded and (dim, chunk_size) == (64, 64) else launch


@lru_cache
def parallel_launch(launch: Launch, dim: int, chunk_size: int) -> Launch:
    """4 warps spill up to 1,000 bytes a thread of a head of 128 with 64 rows, 8 next to nothing."""
    return replace(launch, warps=8) if dim > 64 and chunk_size >= 64 else launch


class LinearGroup:
    """The group whose turn it is, in buffers that the largest one fills: states at the chunks' starts and
    gradients of the loss at the tokens."""

    PROGRAMS = 256  # that `write` runs at once in the backward: two a core
    CROWD = 512  # programs of a serial kernel, from which on two warps each are faster than four

    group: tuple[int, int]
    vectors: Tensor  # of the gates

    def __init__(self, call: Call, groups: Groups) -> None:
        cells, H, D = groups.cells, call.H, call.D
        self.call, self.groups = call, groups
        self.W_start = call.scratch(cells + call.plan.rows, H, D, D)
        self.S_start = call.scratch(cells, H, D, D) if call.momentum else self.W_start
        self.G = call.scratch(cells, H, call.C, D)

    def take(self, group: tuple[int, int]) -> None:
        """What follows is about this group."""
        self.group = group
        self.vectors = self.call.gate_vectors(group)[0]

    @staticmethod
    def programs_per_head(spec: MemorySpec) -> int:
        return max(1, spec.dim // WRITE.block)

    @staticmethod
    def momentum_dtype(dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    @staticmethod
    def numbers_per_cell(spec: MemorySpec, chunk_size: int) -> int:
        """In the buffers of one head of a cell, forward and backward."""
        return 6 * spec.dim**2 + 3 * chunk_size * spec.dim

    @property
    def _cells(self) -> int:
        return self.group[1] - self.group[0]

    def _serial_options(self, launch: Launch, grid: tuple[int, int]) -> dict[str, int]:
        call, crowded = self.call, grid[0] * grid[1] >= self.CROWD
        return serial_launch(launch, call.D, call.C, call.exact, crowded).options

    def _row_tables(self) -> tuple[Tensor, Tensor]:
        return self.call.plan.table, self.call.plan.cell_row

    @cached_property
    def _gradients(self) -> tuple[Tensor, ...]:
        """Of G, of W and S by the reads, of W and S at the chunks' ends, and parts of those of the gates."""
        call, cells, H, D = self.call, self.groups.cells, self.call.H, self.call.D
        grad_W, W_end = call.scratch(cells, H, D, D), call.scratch(cells, H, D, D)
        grad_S, S_end = grad_W, W_end
        if call.momentum:
            grad_S, S_end = torch.empty_like(grad_W), torch.empty_like(grad_W)
        parts = call.scratch(cells, H, GRAD_ROWS.value, call.C, dtype=torch.float32)
        return torch.empty_like(self.G), grad_W, grad_S, W_end, S_end, parts

    def write(
        self,
        weights: list[Tensor],
        momentum: list[Tensor],
        first: list[Tensor],
        end: list[Tensor],
        kept: list[Tensor],
    ) -> None:
        """Moves weights and momentum on to the end of the group, in place. kept: [], or gets its segments."""
        states = [*weights, *(momentum or weights), *first, *end]
        segment = self.groups.segment if kept else self._cells  # one
        for number in range(self.groups.segments(self._cells, self.call.plan.stride) if kept else 1):
            self._write(states, kept, (segment, number), 1, again=False)

    def write_again(self, first: list[Tensor], kept: list[Tensor]) -> None:
        """The same from the kept states: what `backward` needs."""
        segments = self.groups.segments(self._cells, self.call.plan.stride)
        states = first * 4  # all but `first` are left alone
        self._write(states, kept, (self.groups.segment, 0), segments, again=True)

    def _write(
        self, states: list[Tensor], kept: list[Tensor], segment: tuple[int, int], segments: int, again: bool
    ) -> None:
        call, plan = self.call, self.call.plan
        kept_W, *kept_S = kept or states[:1]
        block = min(WRITE.block, call.D)
        grid = call.D // block, segments * plan.rows * call.H
        run_kernel(
            linear_write, grid, self._serial_options(WRITE, grid),
            call.k, call.v, self.vectors, plan.table, *states, kept_W, *(kept_S or [kept_W]),
            self.W_start, self.S_start, self.G,
            plan.rows, *self.group, plan.stride, *segment, call.H, call.D, block, call.C,
            call.spec.residual, call.momentum, bool(kept) and not again, again, call.precision,
        )  # fmt: skip

    def read(self, output: Tensor) -> None:
        call, plan = self.call, self.call.plan
        block = min(READ.block, call.D)
        run_kernel(
            linear_read, (self._cells, call.H, call.D // block), READ.options,
            call.q, call.k, output, self.vectors, *self._row_tables(), self.W_start, self.S_start, self.G,
            plan.rows, self.group[0], plan.stride, call.H, call.D, block, call.C,
            call.spec.residual, call.momentum, call.exact, call.precision,
        )  # fmt: skip

    def backward(
        self,
        grad_output: Tensor,
        grad_weights: list[Tensor],
        grad_momentum: list[Tensor],
        grad_first: list[Tensor],
        grad_end: list[Tensor],
    ) -> None:
        """After `write`: gradients of the tokens go to the call's, those of the state move back in place."""
        call, plan, grads = self.call, self.call.plan, self.call.grads
        cells, D, C = self._cells, call.D, call.C
        grad_G, grad_W, grad_S, W_end, S_end, parts = self._gradients
        sizes = (call.H, D)
        block = min(READ_BACKWARD.block, D)
        run_kernel(
            linear_read_backward, (cells, call.H), parallel_launch(READ_BACKWARD, D, C).options,
            call.q, call.k, grad_output, grads.q, grads.k, self.vectors, *self._row_tables(),
            self.W_start, self.S_start, self.G, grad_G, grad_W, grad_S, parts,
            plan.rows, self.group[0], plan.stride, *sizes, block, C,
            call.spec.residual, call.momentum, call.exact, call.precision,
        )  # fmt: skip
        block = min(WRITE_BACKWARD.block, D)
        grid = D // block, plan.rows * call.H
        dS = grad_momentum[0] if call.momentum else grad_weights[0]
        run_kernel(
            linear_write_backward, grid, self._serial_options(WRITE_BACKWARD, grid),
            call.k, self.vectors, plan.table, grad_weights[0], dS, grad_first[0], grad_end[0],
            grad_G, grad_W, grad_S, W_end, S_end, grads.v,
            plan.rows, *self.group, plan.stride, *sizes, block, C,
            call.momentum, call.precision,
        )  # fmt: skip
        block = min(FINISH.block, D)
        run_kernel(
            linear_finish, (cells, call.H), parallel_launch(FINISH, D, C).options,
            call.k, grads.k, self.vectors, *self._row_tables(), self.W_start, self.S_start, self.G, grad_G,
            W_end, S_end, parts, grads.theta, grads.log_decay, grads.log_momentum,
            plan.rows, *self.group, plan.stride, *sizes, block, C,
            call.spec.residual, call.momentum, call.exact, call.precision,
        )  # fmt: skip
