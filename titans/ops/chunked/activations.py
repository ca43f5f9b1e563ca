"""Value, slope and curvature of the memory's activations (the inner gradient needs one derivative, its
own gradient the second)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TANH_SCALE, _TANH_CUBIC = math.sqrt(2 / math.pi), 0.044715
_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


def value(z: Tensor, kind: str, out: Tensor) -> Tensor:
    """`act(z)`, written into `out`."""
    if kind == "silu":
        return torch.ops.aten.silu.out(z, out=out)
    return torch.ops.aten.gelu.out(z, approximate=_APPROXIMATE[kind], out=out)


def slope_times(grad: Tensor, z: Tensor, kind: str, out: Tensor) -> Tensor:
    """`grad * act'(z)` in one pass, written into `out`."""
    if kind == "silu":
        return torch.ops.aten.silu_backward.grad_input(grad, z, grad_input=out)
    return torch.ops.aten.gelu_backward.grad_input(grad, z, approximate=_APPROXIMATE[kind], grad_input=out)


def slope_and_curvature(z: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """`act'(z)` and `act''(z)`."""
    if kind == "silu":
        gate = z.sigmoid()
        slope = gate * (1 + z * (1 - gate))
        return slope, gate * (1 - gate) * (2 + z * (1 - 2 * gate))
    square = z * z
    if kind == "gelu":
        density = (square * -0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
        slope = slope_times(torch.ones_like(z), z, kind, torch.empty_like(z))
        return slope, square.neg_().add_(2).mul_(density)
    inner_slope = _TANH_SCALE * (1 + 3 * _TANH_CUBIC * square)
    tanh = torch.tanh(_TANH_SCALE * z * (1 + _TANH_CUBIC * square))
    sech2 = 1 - tanh * tanh
    slope = 0.5 * (1 + tanh) + 0.5 * z * sech2 * inner_slope
    bend = 6 * _TANH_SCALE * _TANH_CUBIC * z - 2 * tanh * inner_slope * inner_slope
    return slope, sech2 * (inner_slope + 0.5 * z * bend)
