"""Launches of the linear memory's kernels over one group of cells, with the buffers that they share."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any

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
from titans.ops.kernels.linear_scan import (
    linear_carry,
    linear_carry_backward,
    linear_scan,
    linear_scan_backward,
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
CARRY = Launch(warps=4, stages=3, block=32)
SCAN = Launch(warps=4, stages=1, block=16)

# A group is scanned where that many segments of so many steps run side by side: with fewer, the transitions
# cost what the shorter chain gains, and a short chain is done before three launches are.
SCAN_SEGMENTS, SCAN_STEPS = 4, 8


@lru_cache
def scan_launch(dim: int, exact: bool) -> Launch:
    """P of a head of 128 is 256 KiB: more than 4 warps have registers for."""
    return replace(SCAN, warps=8) if exact or dim > 64 else SCAN


def scans(groups: Groups, cells: int, dtype: torch.dtype) -> bool:
    """Whether a group of so many cells is scanned. fp16: transitions of a growing memory pass 65,504 long
    before the memory does."""
    long = groups.segment >= SCAN_STEPS and groups.segments(cells) >= SCAN_SEGMENTS
    return long and dtype != torch.float16


def empty_transitions(q: Tensor, slots: int, sources: int) -> Tensor:
    """sources: matrices of the state."""
    H, D = q.shape[2:]
    return q.new_empty(slots, H, sources, D, sources * D, dtype=torch.float32)


@lru_cache
def serial_launch(launch: Launch, dim: int, chunk_size: int, exact: bool, crowded: bool) -> Launch:
    """exact: fp32 tiles are twice as large, three of each do not fit into shared memory."""
    if exact or (dim > 64 and chunk_size >= 64):
        return replace(launch, stages=2)
    return replace(launch, warps=2) if crowded and (dim, chunk_size) == (64, 64) else launch


@lru_cache
def read_backward_launch(dim: int, chunk_size: int) -> Launch:
    """4 warps spill up to 1,000 bytes a thread of a head of 128 with 64 rows, 8 next to nothing."""
    return replace(READ_BACKWARD, warps=8) if dim > 64 and chunk_size >= 64 else READ_BACKWARD


@lru_cache
def finish_launch(dim: int, chunk_size: int, exact: bool) -> Launch:
    """Registers for three programs a core, four of less than 64 rows."""
    if dim > 64 and chunk_size >= 64:
        return replace(FINISH, warps=8)
    return FINISH if exact else replace(FINISH, registers=168 if chunk_size >= 64 else 128)


class LinearGroup:
    """The group whose turn it is, in buffers that the largest one fills: states at the chunks' starts and
    gradients of the loss at the tokens."""

    PROGRAMS = 256  # that `write` runs at once in the backward: two a core
    CROWD = 512  # programs of a serial kernel, from which on two warps each are faster than four

    group: tuple[int, int]
    kept: list[Tensor]  # states at the starts of its segments (and transitions), where a backward follows
    vectors: Tensor  # of the gates

    def __init__(self, call: Call, groups: Groups) -> None:
        cells, H, D = groups.cells, call.H, call.D
        self.call, self.groups = call, groups
        self.W_start = call.scratch(cells + call.plan.rows, H, D, D)
        self.S_start = call.scratch(cells, H, D, D) if call.momentum else self.W_start
        self.G = call.scratch(cells, H, call.C, D)

    def take(self, group: tuple[int, int], kept: list[Tensor]) -> None:
        """What follows is about this group. kept: those of the whole call."""
        self.group, self.kept = group, self.groups.of_group(kept, group)
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

    def _serial_options(self, launch: Launch, grid: tuple[int]) -> dict[str, int]:
        call, crowded = self.call, grid[0] >= self.CROWD
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

    @property
    def _scans(self) -> bool:
        return scans(self.groups, self._cells, self.call.q.dtype)

    def _empty_states(self) -> list[Tensor]:
        """At the ends of a group's segments."""
        call, slots = self.call, self.groups.slots(self.groups.cells)
        matrices = 2 if call.momentum else 1
        return [call.scratch(slots, call.H, call.D, call.D, dtype=torch.float32) for _ in range(matrices)]

    @cached_property
    def _scanned(self) -> list[Tensor]:
        """What `kept` holds, where no backward follows."""
        states = self._empty_states()
        return [*states, empty_transitions(self.call.q, states[0].shape[0], len(states))]

    @cached_property
    def _ends(self) -> list[Tensor]:
        """Gradients of the state there."""
        return self._empty_states()

    def write(
        self, weights: list[Tensor], momentum: list[Tensor], first: list[Tensor], end: list[Tensor]
    ) -> None:
        """Moves weights and momentum on to the end of the group, in place."""
        states = [*weights, *(momentum or weights), *first, *end]
        if self._scans:
            self.kept = self.kept or self._scanned
            self._scan(states)
            self._write(states, 0, again=True, leave=True)
        else:
            for number in range(self.groups.segments(self._cells) if self.kept else 1):
                self._write(states, number, again=False, leave=True)

    def write_again(self, first: list[Tensor]) -> None:
        """The same from the kept states: what `backward` needs."""
        self._write(first * 4, 0, again=True, leave=False)  # all but `first` are left alone

    def _grid(self, block: int, segments: bool, parts: int = 1) -> tuple[int]:
        """Of a serial kernel: blocks of value columns first (times parts), then heads, rows, segments."""
        call = self.call
        rows = call.plan.rows * (self.groups.segments(self._cells) if segments else 1)
        return (parts * (call.D // block) * rows * call.H,)

    def _write(self, states: list[Tensor], number: int, again: bool, leave: bool) -> None:
        call, plan = self.call, self.call.plan
        segment = self.groups.segment if self.kept else self._cells  # one
        W, S = _pair(self.kept or states, call.momentum)
        block = min(WRITE.block, call.D)
        grid = self._grid(block, segments=again)
        run_kernel(
            linear_write, grid, self._serial_options(WRITE, grid),
            call.k, call.v, self.vectors, plan.table, *states, W, S, self.W_start, self.S_start, self.G,
            plan.rows, *self.group, plan.stride, segment, number, call.H, call.D, block, call.C,
            call.spec.residual, call.momentum, bool(self.kept) and not again, again, leave, call.precision,
        )  # fmt: skip

    def _scan(self, states: list[Tensor]) -> None:
        """The states at the starts of segments and their transitions, from the state at the group's start."""
        call = self.call
        block = min(CARRY.block, call.D)
        grid = self._grid(block, segments=True, parts=3 if call.momentum else 2)
        run_kernel(
            linear_carry, grid, self._serial_options(CARRY, grid),
            call.k, call.v, self.vectors, call.plan.table, *states[:3],
            *_pair(self.kept, call.momentum), self.kept[-1],
            *self._segments(), block, call.C, call.spec.residual, call.momentum, call.precision,
        )  # fmt: skip
        self._over_segments(linear_scan, self.kept)

    def _scan_backward(self, states: list[Tensor], grad_end: Tensor) -> None:
        """The gradients of the state at the ends of segments."""
        call = self.call
        block = min(CARRY.block, call.D)
        grid = self._grid(block, segments=True)
        run_kernel(
            linear_carry_backward, grid, self._serial_options(CARRY, grid),
            call.k, self.vectors, call.plan.table, *states, grad_end,
            *_pair(self._ends, call.momentum), *self._gradients[:3],
            *self._segments(), block, call.C, call.momentum, call.precision,
        )  # fmt: skip
        self._over_segments(linear_scan_backward, self._ends)

    def _segments(self) -> tuple[int, ...]:
        call, plan = self.call, self.call.plan
        return (plan.rows, *self.group, plan.stride, self.groups.segment, call.H, call.D)

    def _over_segments(self, kernel: Any, states: list[Tensor]) -> None:
        call = self.call
        launch = scan_launch(call.D, call.exact)
        run_kernel(
            kernel, self._grid(launch.block, segments=False), launch.options,
            *_pair(states, call.momentum), self.kept[-1], call.plan.table,
            *self._segments(), launch.block, call.momentum, call.scan_precision,
        )  # fmt: skip

    def read(self, output: Tensor) -> None:
        call, plan = self.call, self.call.plan
        block = min(READ.block, call.D)
        run_kernel(
            linear_read, (self._cells * call.H, call.D // block), READ.options,
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
            linear_read_backward, (cells * call.H,), read_backward_launch(D, C).options,
            call.q, call.k, grad_output, grads.q, grads.k, self.vectors, *self._row_tables(),
            self.W_start, self.S_start, self.G, grad_G, grad_W, grad_S, parts,
            plan.rows, self.group[0], plan.stride, *sizes, block, C,
            call.spec.residual, call.momentum, call.exact, call.precision,
        )  # fmt: skip
        states = [grad_weights[0], grad_momentum[0] if call.momentum else grad_weights[0]]
        if self._scans:
            self._scan_backward(states, grad_end[0])
        block = min(WRITE_BACKWARD.block, D)
        grid = self._grid(block, segments=self._scans)
        run_kernel(
            linear_write_backward, grid, self._serial_options(WRITE_BACKWARD, grid),
            call.k, self.vectors, plan.table, *states, grad_first[0], grad_end[0],
            *_pair(self._ends if self._scans else states, call.momentum),
            grad_G, grad_W, grad_S, W_end, S_end, grads.v,
            plan.rows, *self.group, plan.stride, self.groups.segment, *sizes, block, C,
            call.momentum, self._scans, call.precision,
        )  # fmt: skip
        block = min(FINISH.block, D)
        run_kernel(
            linear_finish, (cells * call.H,), finish_launch(D, C, call.exact).options,
            call.k, grads.k, self.vectors, *self._row_tables(), self.W_start, self.S_start, self.G, grad_G,
            W_end, S_end, parts, grads.theta, grads.log_decay, grads.log_momentum,
            plan.rows, *self.group, plan.stride, *sizes, block, C,
            call.spec.residual, call.momentum, call.precision,
        )  # fmt: skip


def _pair(states: list[Tensor], momentum: bool) -> tuple[Tensor, Tensor]:
    """Weights and momentum, which is the weights where there is none: never read."""
    return states[0], states[1] if momentum else states[0]
