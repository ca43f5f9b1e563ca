"""Rotary positions by index in a local buffer: only distances between tokens matter.

Shape suffixes: T tokens, D width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans.nn.precision import at_least_fp32

# Positions up to which angles may be computed in fp32: there they are wrong by 1e-4 radians.
FP32_LENGTH = 4096


class RotaryTable:
    """cos and sin of the angles at positions 0 .. T-1, or at those given, in fp32 (fp64 for fp64), `[T, D]`.

    A pair of channels is (i, D/2 + i): cos is the same in both halves, sin has a minus in the first.

    Made anew in every call: a buffer would be cast to bf16 with the model, and at position 2048 a bf16
    angle is wrong by several radians.
    """

    def __init__(self, length: int | Tensor, head_dim: int, theta: float, like: Tensor) -> None:
        dtype = at_least_fp32(like.dtype)
        if isinstance(length, Tensor):  # positions on the device, which may be any
            exact = torch.float64
            positions = length.to(exact)
        else:
            exact = torch.float64 if length > FP32_LENGTH else dtype
            positions = torch.arange(length, dtype=exact, device=like.device)
        halves = torch.arange(0, head_dim, 2, dtype=exact, device=like.device) / head_dim
        angles_TD = torch.outer(positions, theta**-halves)
        cos, sin = angles_TD.cos().to(dtype), angles_TD.sin().to(dtype)
        self.cos = torch.cat([cos, cos], dim=-1)
        self.sin = torch.cat([-sin, sin], dim=-1)

    def rotate(self, x: Tensor, start: int = 0) -> Tensor:
        """x `[..., T, D]` standing at positions start .. start + T - 1."""
        stop = start + x.shape[-2]
        return _turn(x, self.cos[start:stop], self.sin[start:stop])

    def rotate_all(self, x: Tensor) -> Tensor:
        """x `[..., D]`, all of it at the one position of this table."""
        assert len(self.cos) == 1
        return _turn(x, self.cos, self.sin)

    def rotate_at(self, x: Tensor, positions: Tensor) -> Tensor:
        """x `[B, H, T, D]` whose rows stand at positions `[B, T]` of their own."""
        return _turn(x, self.cos[positions][:, None], self.sin[positions][:, None])


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.to(cos.dtype)
    first, second = wide.chunk(2, dim=-1)
    return torch.addcmul(wide * cos, torch.cat([second, first], dim=-1), sin).to(x.dtype)
