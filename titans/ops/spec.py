"""What a memory is (`MemorySpec`) and what it holds while it reads (`MemoryState`)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

Activation = Literal["gelu", "gelu_tanh", "silu"]
MAX_DEPTH = 4


@dataclass(frozen=True)
class MemorySpec:
    """Shape of the memory network of one head.

    `depth` matrices with `activation` between them: `W_1 [D, F], ..., W_L [F, D]`, F = expansion x D.
    `M(x) = x + LN(act(x W_1) ... W_L)`; `residual` switches the `x +`, `norm` the LN. Depth 1 is the
    linear memory `M(x) = x W`. Paper sec. 3.1; camera-ready sec. 3.3 for the two-layer default.

    `residual` and `norm` default to what the contract says: on for depth >= 2, off for depth 1.
    """

    dim: int
    depth: int = 2
    expansion: int = 4
    activation: Activation = "gelu"
    residual: bool | None = None
    norm: bool | None = None

    def __post_init__(self) -> None:
        for name in ("dim", "depth", "expansion"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"MemorySpec.{name} must be a positive integer, got {value!r}")
        if self.depth > MAX_DEPTH:
            raise ValueError(f"MemorySpec.depth must be at most {MAX_DEPTH}, got {self.depth}")
        if self.activation not in get_args(Activation):
            raise ValueError(
                f"MemorySpec.activation must be one of {get_args(Activation)}, got {self.activation!r}"
            )
        for name in ("residual", "norm"):
            value = getattr(self, name)
            if value is None:
                object.__setattr__(self, name, self.depth > 1)
            elif not isinstance(value, bool):
                raise ValueError(f"MemorySpec.{name} must be True or False, got {value!r}")

    @property
    def layer_shapes(self) -> tuple[tuple[int, int], ...]:
        """`(D_in, D_out)` of each matrix, first to last."""
        hidden = self.dim * self.expansion
        widths = [self.dim, *[hidden] * (self.depth - 1), self.dim]
        return tuple(pairwise(widths))

    @property
    def num_parameters(self) -> int:
        """Fast weights of one head (the state holds three such sets: weights, momentum, anchor)."""
        return sum(d_in * d_out for d_in, d_out in self.layer_shapes)


@dataclass(frozen=True)
class MemoryState:
    """Everything the memory carries from one token to the next; cutting a sequence anywhere is exact.

    weights, momentum, anchor: tuples of L tensors `[B, H, D_in, D_out]`, fp32 (fp64 for fp64 inputs).
        `anchor` is the weights at the start of the current chunk, where gradients are taken; it is
        ignored in rows whose `position` is 0.
    position: tokens already read in the current chunk, int32 `[B]`; rows may differ.
    """

    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    anchor: tuple[Tensor, ...]
    position: Tensor

    @classmethod
    def initial(cls, weights: tuple[Tensor, ...], batch: int) -> MemoryState:
        """State before the first token: `weights` (L tensors `[H, D_in, D_out]`) in every row.

        Differentiable: gradients of all rows add up in `weights`.
        """
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        for layer, weight in enumerate(weights):
            if weight.dim() != 3:
                raise ValueError(
                    f"weights[{layer}] must have shape [H, D_in, D_out], got {list(weight.shape)}"
                )
        dtype = torch.promote_types(weights[0].dtype, torch.float32)
        rows = tuple(weight.to(dtype).expand(batch, *weight.shape) for weight in weights)
        return cls(
            weights=rows,
            momentum=tuple(torch.zeros_like(row, memory_format=torch.contiguous_format) for row in rows),
            anchor=rows,
            position=torch.zeros(batch, dtype=torch.int32, device=weights[0].device),
        )

    @property
    def batch(self) -> int:
        return self.position.shape[0]

    def select(self, rows: Tensor) -> MemoryState:
        """The state of some rows, in the order of the index tensor `rows [N]` (beam reorder, dropping)."""
        return MemoryState(
            weights=tuple(weight.index_select(0, rows) for weight in self.weights),
            momentum=tuple(momentum.index_select(0, rows) for momentum in self.momentum),
            anchor=tuple(anchor.index_select(0, rows) for anchor in self.anchor),
            position=self.position.index_select(0, rows),
        )

    @classmethod
    def concatenate(cls, states: list[MemoryState]) -> MemoryState:
        """The rows of several states, one after another."""

        def stack(tensors: tuple[tuple[Tensor, ...], ...]) -> tuple[Tensor, ...]:
            return tuple(torch.cat(rows) for rows in zip(*tensors, strict=True))

        return cls(
            weights=stack(tuple(state.weights for state in states)),
            momentum=stack(tuple(state.momentum for state in states)),
            anchor=stack(tuple(state.anchor for state in states)),
            position=torch.cat([state.position for state in states]),
        )

    def expand(self, batch: int) -> MemoryState:
        """A one-row state in `batch` rows (views, no copy)."""
        if self.batch != 1:
            raise ValueError(f"expand needs a state of one row, got {self.batch} rows")

        def grow(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(tensor.expand(batch, *tensor.shape[1:]) for tensor in tensors)

        return MemoryState(
            grow(self.weights), grow(self.momentum), grow(self.anchor), self.position.expand(batch)
        )

    def detach(self) -> MemoryState:
        """The same numbers without their history: truncates backpropagation through time here."""
        return MemoryState(
            weights=tuple(weight.detach() for weight in self.weights),
            momentum=tuple(momentum.detach() for momentum in self.momentum),
            anchor=tuple(anchor.detach() for anchor in self.anchor),
            position=self.position,
        )

    def to(self, device: torch.device | str) -> MemoryState:
        def move(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(tensor.to(device) for tensor in tensors)

        return MemoryState(
            move(self.weights), move(self.momentum), move(self.anchor), self.position.to(device)
        )
