"""Parameters that must not be rounded: gates and the memory's initial weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The dtype that gates, RoPE, norms and the memory compute in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


class FullPrecision(nn.Module):
    """A module whose floating parameters never fall below fp32, whatever `.to(bfloat16)` asks for.

    bf16 keeps 8 bits: a forget gate of 0.0001 a token would round `1 - alpha` to exactly 1, and a needle
    is lost or kept by less than that. `.double()` still works; devices are followed as usual.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FullPrecision:
        def guarded(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if not tensor.is_floating_point() or moved.dtype == at_least_fp32(moved.dtype):
                return moved
            return tensor.to(device=moved.device, dtype=at_least_fp32(moved.dtype))

        return super()._apply(guarded, recurse)
