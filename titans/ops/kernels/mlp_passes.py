"""Launches of the two-layer memory's kernels over one group of cells, with the buffers that they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

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
    mlp_write_backward,
)
from titans.ops.kernels.mlp_forward import mlp_read, mlp_write
from titans.ops.kernels.plan import Groups
from titans.ops.spec import MemorySpec

Tensors = list[Tensor]

# 64 columns: with 32, Triton 3.6 reads past its shared memory on Hopper (wrong results, illegal accesses).
# 4 warps hold a tile of 64 rows once; 8 hold it twice wherever one product feeds the next.
WRITE = Launch(warps=4)
READ = Launch(warps=4, stages=2)
READ_BACKWARD_2 = Launch(warps=4, stages=2)
READ_BACKWARD_1 = Launch(warps=4, stages=2)
WRITE_BACKWARD = Launch(warps=4)
FINISH = Launch(warps=4)


@dataclass
class MLPGroup:
    """Buffers of a group. states: W1, S1, W2, S2 at the chunks' starts (S is W without momentum: never read);
    written, G1, G2, normed, GN, rows: what the write leaves of the inner gradient; slope, bend: act' and what
    passes through act'', for the backward alone."""

    call: Call
    group: tuple[int, int]
    vectors: Tensor
    states: Tensors
    written: Tensor
    G1: Tensor
    G2: Tensor
    slope: Tensor
    bend: Tensor
    normed: Tensor
    GN: Tensor
    rows: Tensor

    PROGRAMS: ClassVar[int] = 128  # that `write` runs at once in the backward: one a core

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

    @classmethod
    def allocate(cls, call: Call, group: tuple[int, int]) -> MLPGroup:
        cells, H, C = group[1] - group[0], call.H, call.C
        weights = [call.scratch(cells + call.plan.rows, H, call.D, call.F) for _ in range(2)]
        momentum = weights
        if call.momentum:
            momentum = [call.scratch(cells, H, call.D, call.F) for _ in range(2)]
        return cls(
            call,
            group,
            call.gate_vectors(group),
            [weights[0], momentum[0], weights[1], momentum[1]],
            written=call.scratch(cells, H, C, call.F),
            G1=call.scratch(cells, H, C, call.F),
            G2=call.scratch(cells, H, C, call.D),
            slope=call.scratch(cells, H, C, call.F),
            bend=call.scratch(cells, H, C, call.F),
            normed=call.scratch(cells, H, C, call.D),
            GN=call.scratch(cells, H, C, call.D),
            rows=call.scratch(cells, H, 3, C, dtype=torch.float32),
        )

    @property
    def _cells(self) -> int:
        return self.group[1] - self.group[0]

    @property
    def _vectors(self) -> tuple[Tensor, Tensor]:
        """Of the first and the second layer: the same where they share their gates."""
        return self.vectors[0], self.vectors[-1]

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
        stages = 1 if wide > 1 or self.call.exact else launch.stages
        return {"num_warps": launch.warps * wide, "num_stages": stages}

    def _sizes(self, columns: int) -> tuple[Any, ...]:
        call = self.call
        activation: str = call.spec.activation
        if activation == "gelu" and call.exact:
            activation = "gelu_fp32"
        return (call.H, call.D, call.F, min(columns, call.F), call.C, activation)

    def _parts(self, launch: Launch, segments: int = 1) -> tuple[int, int, Tensor, Tensor]:
        """Of a serial kernel: programs, columns of the hidden width that each holds, what a head's share."""
        call = self.call
        columns = call.F if call.one_after_another else min(launch.block, call.F)
        heads, parts = segments * call.plan.rows * call.H, call.F // columns
        floats = (heads, 2, parts, call.C, call.D) if parts > 1 else (1,)
        arrived = torch.zeros(1 + heads, dtype=torch.int32, device=call.q.device)
        return heads * parts, columns, call.scratch(*floats, dtype=torch.float32), arrived

    def write(
        self, weights: Tensors, momentum: Tensors, first: Tensors, end: Tensors, kept: Tensors, groups: Groups
    ) -> None:
        """Moves weights and momentum on to the end of the group, in place. kept: [], or gets its segments."""
        (W1, W2), (S1, S2) = weights, momentum or weights
        states = [W1, S1, W2, S2, *first, *end]
        segment = groups.segment if kept else self._cells  # one
        for number in range(groups.segments(self.group, self.call.plan.stride) if kept else 1):
            self._write(states, kept, (segment, number), self._parts(WRITE), again=False)

    def write_again(self, first: Tensors, kept: Tensors, groups: Groups) -> None:
        """The same from the kept states, with what `backward` needs."""
        parts = self._parts(WRITE, groups.segments(self.group, self.call.plan.stride))
        states = [first[0]] * 4 + [*first, *first]  # all but `first` are left alone
        self._write(states, kept, (groups.segment, 0), parts, again=True)

    def _write(
        self,
        states: Tensors,
        kept: Tensors,
        segment: tuple[int, int],
        parts: tuple[int, int, Tensor, Tensor],
        again: bool,
    ) -> None:
        call = self.call
        programs, columns, exchange, arrived = parts
        W1, W2, *momentum = kept or self.states[::2]
        S1, S2 = momentum or (W1, W2)
        run_kernel(
            mlp_write, (programs,), self._options(WRITE),
            call.k, call.v, call.gain, call.bias, *self._vectors, call.plan.table, *states, W1, S1, W2, S2,
            *self.states, self.written, self.G1, self.G2, self.slope, self.bend, self.normed, self.GN,
            self.rows, exchange, arrived, *self._serial(), *segment, *self._sizes(columns),
            call.spec.residual, call.spec.norm, call.momentum, bool(kept) and not again, again,
            call.precision,
        )  # fmt: skip

    def read(self, output: Tensor) -> None:
        call = self.call
        run_kernel(
            mlp_read, (self._cells, call.H), self._options(READ),
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
        call, grads = self.call, self.call.grads
        cells, H, D, C = self._cells, call.H, call.D, call.C
        shared = call.sets == 1
        parts = call.scratch(2, cells, H, GRAD_ROWS.value, C, dtype=torch.float32)
        affine = torch.zeros(2, cells, H, D, device=call.q.device)
        grad_Z2 = torch.empty_like(self.G2)
        mixed1, mixed2, grad_scores2 = (call.scratch(cells, H, C, C) for _ in range(3))
        grad_H, grad_G1, d_Z1, slope = (torch.empty_like(self.G1) for _ in range(4))
        read = grad_G1  # until its place is taken, as the reads' share of d_Z1
        run_kernel(
            mlp_read_backward_2, (cells, H), self._options(READ_BACKWARD_2),
            call.q, call.k, grad_output, call.gain, *self._vectors, *self._tables, *self.states,
            self.written, self.G1, self.G2, read, slope, grad_Z2, mixed1, mixed2, grad_scores2,
            parts[1], *affine,
            *self._parallel(), *self._sizes(READ_BACKWARD_2.block),
            call.spec.norm, call.momentum, shared, call.exact, call.precision,
        )  # fmt: skip
        grad_K = call.scratch(cells, H, D, C)
        grad_G2 = torch.empty_like(self.G2)
        d_states, d_ends = self._state_gradients(), self._state_gradients()
        run_kernel(
            mlp_read_backward_1a, (cells, H), self._options(READ_BACKWARD_1),
            self._vectors[1], *self._tables, *self.states[2:], self.written, read, slope, grad_Z2, mixed2,
            grad_scores2, d_Z1, grad_H, grad_G2, *d_states[2:], parts[1],
            *self._parallel(), *self._sizes(READ_BACKWARD_1.block), call.momentum, call.precision,
        )  # fmt: skip
        run_kernel(
            mlp_read_backward_1, (cells, H), self._options(READ_BACKWARD_1),
            call.q, call.k, grad_output, grads.q, self._vectors[0], *self._tables, *self.states[:2], self.G1,
            d_Z1, mixed1, grad_K, grad_G1, *d_states[:2], parts[0],
            *self._parallel(), *self._sizes(READ_BACKWARD_1.block),
            call.spec.residual, call.momentum, call.exact, call.precision,
        )  # fmt: skip
        (W1, W2), (S1, S2) = grad_weights, grad_momentum or grad_weights
        programs, columns, exchange, arrived = self._parts(WRITE_BACKWARD)
        d_G2 = torch.empty_like(grad_G2)
        run_kernel(
            mlp_write_backward, (programs,), self._options(WRITE_BACKWARD),
            call.k, call.gain, *self._vectors, call.plan.table, W1, S1, W2, S2,
            *grad_first, *grad_end, self.states[2], self.written, self.slope, self.bend, self.G2, self.normed,
            self.GN, self.rows,
            grad_H, grad_G1, grad_G2, *d_states, *d_ends, grad_Z2, d_Z1, d_G2,
            exchange, arrived, *self._serial(), *self._sizes(columns),
            call.spec.norm, call.momentum, call.precision,
        )  # fmt: skip
        run_kernel(
            mlp_finish, (cells, H), self._options(FINISH),
            call.k, call.v, call.gain, call.bias, grads.k, grads.v, *self._vectors, *self._tables,
            *self.states, self.written, self.G1, self.G2, self.normed, self.rows, grad_K, d_Z1, d_G2, *affine,
            *d_ends, *parts, grads.theta, grads.log_decay, grads.log_momentum,
            call.plan.rows, *self.group, call.plan.stride, *self._sizes(FINISH.block),
            call.spec.residual, call.spec.norm, call.momentum, shared, call.exact, call.precision,
        )  # fmt: skip
        if grads.gain is not None and grads.bias is not None:
            gain, bias = affine.sum(1)
            grads.gain += gain
            grads.bias += bias

    def _state_gradients(self) -> Tensors:
        """Like `states`: W1, S1, W2, S2."""
        shape = (self._cells, self.call.H, self.call.D, self.call.F)
        W1, W2 = self.call.scratch(*shape), self.call.scratch(*shape)
        if not self.call.momentum:
            return [W1, W1, W2, W2]
        return [W1, self.call.scratch(*shape), W2, self.call.scratch(*shape)]
