"""What surrounds the memory in its layer, fused: registered operators with gradients.

Opaque to torch.compile: a compiled layer keeps one graph. `titans.nn` decides when to call them. Not
differentiable twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titans.ops.kernels import layer_conv, layer_norm

_Gradients = tuple[Tensor, Tensor, Tensor]


def conv_silu(x: Tensor, tail: Tensor, weight: Tensor, heads: int, unit: bool) -> Tensor:
    """Causal depthwise convolution, SiLU and (`unit`) `y / sqrt(|y|^2 + 1e-6)` per head.

    x: `[B, T, C]`; tail: `[B, W - 1, C]`, what came before; weight: `[C, W]`. Floating dtypes of at most 32
    bits; sums are fp32.

    Returns `[B, T, heads, C / heads]` in the dtype of x.
    """
    B, _, C = x.shape
    width = weight.shape[-1]
    _expect("tail", tail, (B, width - 1, C), x.device)
    _expect("weight", weight, (C, width), x.device)
    if C % heads:
        raise ValueError(f"heads must divide the {C} channels of x, got {heads}")
    result: Tensor = _conv_forward(x, tail, weight, heads, unit)
    return result


def norm_gate(x: Tensor, gain: Tensor, gate: Tensor, eps: float) -> Tensor:
    """`rms_norm(x) * gain * silu(gate)`: x `[B, T, H, D]`, gain `[H, D]`, gate `[B, T, H D]`.

    Returns `[B, T, H D]` in the wider dtype of x and gate; arithmetic is fp32.
    """
    B, T, H, D = x.shape
    _expect("gain", gain, (H, D), x.device)
    _expect("gate", gate, (B, T, H * D), x.device)
    result: Tensor = _norm_gate_forward(x, gain, gate, eps)
    return result


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != device:  # a launch does not look (dispatch.py)
        raise ValueError(f"{name} must be on {device} like x, got {tensor.device}")


@torch.library.custom_op("titans::conv_silu_forward", mutates_args=())
def _conv_forward(x: Tensor, tail: Tensor, weight: Tensor, heads: int, unit: bool) -> Tensor:
    return layer_conv.run_forward(x, tail, weight, heads, unit)


@_conv_forward.register_fake
def _(x: Tensor, tail: Tensor, weight: Tensor, heads: int, unit: bool) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], heads, x.shape[2] // heads)


@torch.library.custom_op("titans::conv_silu_backward", mutates_args=())
def _conv_backward(
    grad: Tensor, x: Tensor, tail: Tensor, weight: Tensor, heads: int, unit: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return layer_conv.run_backward(grad, x, tail, weight, heads, unit)


@_conv_backward.register_fake
def _(grad: Tensor, x: Tensor, tail: Tensor, weight: Tensor, heads: int, unit: bool) -> _Gradients:
    return x.new_empty(x.shape), tail.new_empty(tail.shape), weight.new_empty(weight.shape)


@torch.library.custom_op("titans::norm_gate_forward", mutates_args=())
def _norm_gate_forward(x: Tensor, gain: Tensor, gate: Tensor, eps: float) -> Tensor:
    return layer_norm.run_forward(x, gain, gate, eps)


@_norm_gate_forward.register_fake
def _(x: Tensor, gain: Tensor, gate: Tensor, eps: float) -> Tensor:
    return gate.new_empty(gate.shape, dtype=torch.promote_types(x.dtype, gate.dtype))


@torch.library.custom_op("titans::norm_gate_backward", mutates_args=())
def _norm_gate_backward(
    grad: Tensor, x: Tensor, gain: Tensor, gate: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return layer_norm.run_backward(grad, x, gain, gate, eps)


@_norm_gate_backward.register_fake
def _(grad: Tensor, x: Tensor, gain: Tensor, gate: Tensor, eps: float) -> _Gradients:
    return x.new_empty(x.shape), gain.new_empty(gain.shape), gate.new_empty(gate.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.settings = inputs[3:]


def _conv_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_conv_backward(grad, *ctx.saved_tensors, *ctx.settings), None, None)


def _norm_gate_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_norm_gate_backward(grad, *ctx.saved_tensors, *ctx.settings), None)


_conv_forward.register_autograd(_conv_gradients, setup_context=_keep)
_norm_gate_forward.register_autograd(_norm_gate_gradients, setup_context=_keep)
