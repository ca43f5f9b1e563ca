"""One call of the kernels: its tensors as they want them, scratch memory, and launch settings."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from titans.ops.kernels.dispatch import run_kernel
from titans.ops.kernels.functions import ROWS
from titans.ops.kernels.gates import gate_vectors
from titans.ops.kernels.plan import Plan, make_plan
from titans.ops.kernels.support import interpreted
from titans.ops.spec import MemorySpec


@dataclass(frozen=True)
class Launch:
    """warps and pipeline stages of a kernel, and the width of its column (or hidden) blocks. registers: of a
    thread, at most (None: the compiler's choice); 128 let two programs of 8 warps share a core."""

    warps: int
    stages: int = 1
    block: int = 64
    registers: int | None = None

    @cached_property
    def options(self) -> dict[str, int]:
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


GATES = Launch(warps=1)  # two of 64 tokens a thread: its scans stay within the warp


@dataclass
class TokenGradients:
    """Gradients of the token-wise arguments, filled group by group."""

    q: Tensor
    k: Tensor
    v: Tensor
    theta: Tensor
    log_decay: Tensor
    log_momentum: Tensor
    affine: Tensor | None = None  # `[2, H, D]`, of the LN's gain and bias where the call has any


def _fp32(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous()


class Call:
    """The arguments of one call, contiguous; gates fp32 `[B, T, H, sets]`, one set or one for every layer."""

    def __init__(self, x: Any, table: Tensor | None = None, vectors: Tensor | None = None) -> None:
        """table: the plan's; vectors: the gates'. The backward has the forward's."""
        self.spec: MemorySpec = x.spec
        self.q, self.k, self.v = x.q.contiguous(), x.k.contiguous(), x.v.contiguous()
        self.B, self.T, self.H, self.D = x.q.shape
        self.C: int = x.chunk_size
        self.F = self.spec.layer_shapes[0][1]
        self.momentum = x.log_momentum is not None
        gates = [x.theta, x.log_decay[0]] + ([x.log_momentum] if self.momentum else [])
        self.sets = max(gate.shape[-1] for gate in gates)
        gates = [
            (gate if gate.shape[-1] == self.sets else gate.expand(*gate.shape[:-1], self.sets)).contiguous()
            for gate in gates
        ]
        self.theta, self.log_decay = gates[:2]
        self.log_momentum = gates[-1]  # log_decay where there is none: never read
        self._norm = (x.norm_weight, x.norm_bias)
        self.plan: Plan = make_plan(self.B, self.T, self.C, x.position, x.cu_seqlens, table)
        if vectors is not None:
            self.vectors = vectors
        self.exact = self.q.dtype == torch.float32
        self.precision = "ieee" if self.exact else "tf32"  # of products of fp32 tiles; half ones ignore it
        self.scan_precision = "ieee" if self.exact else "tf32x3"  # of a state that passes many segments

    @property
    def one_after_another(self) -> bool:
        """The interpreter runs programs in turn: none may wait for another one."""
        return interpreted()

    def scratch(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.q.dtype, device=self.q.device)

    @cached_property
    def gain(self) -> Tensor:
        """`[H, D]` of the memory's LN, and so is `bias`."""
        weight = self._norm[0]
        return torch.ones(self.H, self.D, device=self.q.device) if weight is None else _fp32(weight)

    @cached_property
    def bias(self) -> Tensor:
        bias = self._norm[1]
        return torch.zeros(self.H, self.D, device=self.q.device) if bias is None else _fp32(bias)

    @cached_property
    def grads(self) -> TokenGradients:
        q, k, v, theta, log_decay = map(
            torch.empty_like, (self.q, self.k, self.v, self.theta, self.log_decay)
        )
        log_momentum = torch.empty_like(self.log_momentum) if self.momentum else self.log_momentum
        given = any(tensor is not None for tensor in self._norm)
        affine = torch.zeros(2, self.H, self.D, device=self.q.device) if given else None
        return TokenGradients(q, k, v, theta, log_decay, log_momentum, affine)

    @cached_property
    def vectors(self) -> Tensor:
        """`[sets, cells, H, ROWS, C]` of the whole call, see `functions.py`."""
        cells, plan = self.plan.sizes.cells, self.plan
        vectors = self.scratch(self.sets, cells, self.H, ROWS.value, self.C, dtype=torch.float32)
        run_kernel(
            gate_vectors, (cells * self.H, self.sets), GATES.options,
            self.theta, self.log_decay, self.log_momentum, vectors, plan.table, plan.cell_row,
            plan.rows, 0, plan.stride, self.H, self.sets, self.C, self.momentum,
        )  # fmt: skip
        return vectors

    @cached_property
    def _sets_of_vectors(self) -> tuple[Tensor, ...]:
        return self.vectors.unbind()

    def gate_vectors(self, group: tuple[int, int]) -> list[Tensor]:
        """Those of a group, one tensor for every set."""
        return [vectors[group[0] : group[1]] for vectors in self._sets_of_vectors]
