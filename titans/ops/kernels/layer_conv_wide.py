"""The backward of `layer_conv.py` for convolutions over other than four tokens, in two kernels.

    dz_t = what the SiLU and the norm make of the gradient       `conv_slopes`, kept in fp32
    dx_s = sum_j w_{W-1-j} dz_{s+j}                              `conv_backward_wide`
    dw_i = sum_t dz_t x_{t-W+1+i}

The kernel for four tokens walks over its tokens with the last x and dz in registers, and stores no dz; that
would be W of each here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans.ops.kernels.dispatch import run_kernel
from titans.ops.kernels.launch import Launch

EPS = 1e-6
BACKWARD = Launch(warps=4, block=2048)  # block: channels x tokens of a program


@triton.jit
def load_token(x, tail, t, channel, real, T, C: tl.constexpr, W: tl.constexpr):
    """x at token t of one row (at t < 0 the tail, at t >= T zero) as fp32; t and channel broadcast."""
    t = t.to(tl.int64)
    inside = tl.load(x + t * C + channel, mask=real & (t >= 0) & (t < T), other=0.0).to(tl.float32)
    before = tl.load(tail + (t + W - 1) * C + channel, mask=real & (t < 0), other=0.0).to(tl.float32)
    return inside + before


@triton.jit(do_not_specialize=["T"])
def conv_slopes(
    x, tail, weight, grad, slopes, T,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, W: tl.constexpr,
    UNIT: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Grid (B x blocks of BT tokens x H), heads first. slopes: fp32 `[B, T, C]`, the gradient of z."""
    C: tl.constexpr = H * D
    head = tl.program_id(0) % H
    block = tl.program_id(0) // H
    blocks = tl.maximum(tl.cdiv(T, BT), 1)
    row = (block // blocks).to(tl.int64)
    t = ((block % blocks) * BT + tl.arange(0, BT))[:, None]
    d = tl.arange(0, BD)[None, :]
    channel = head * D + d
    real = (d < D) & (t < T)
    x += row * T * C
    tail += row * (W - 1) * C
    here = (row * T + t) * C + channel
    z = tl.zeros([BT, BD], tl.float32)
    for i in tl.static_range(W):
        tap = tl.load(weight + channel * W + i, mask=d < D, other=0.0).to(tl.float32)
        z += tap * load_token(x, tail, t - (W - 1) + i, channel, real, T, C, W)
    gate = tl.sigmoid(z)
    y = z * gate
    dy = tl.load(grad + here, mask=real, other=0.0).to(tl.float32)
    if UNIT:
        scale = tl.rsqrt(tl.sum(y * y, 1, keep_dims=True) + EPS)
        y_unit = y * scale
        dy = scale * (dy - y_unit * tl.sum(dy * y_unit, 1, keep_dims=True))
    tl.store(slopes + here, dy * (gate + y * (1.0 - gate)), mask=real)


@triton.jit(do_not_specialize=["T"])
def conv_backward_wide(
    x, tail, weight, slopes, grad_x, grad_tail, grad_weight, T,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """The same grid. grad_weight: fp32 `[B x blocks, W, C]`, parts. BW: power of two, at least W - 1."""
    C: tl.constexpr = H * D
    head = tl.program_id(0) % H
    part = (tl.program_id(0) // H).to(tl.int64)
    blocks = tl.maximum(tl.cdiv(T, BT), 1)
    row = part // blocks
    start = (part % blocks) * BT
    t = (start + tl.arange(0, BT))[:, None]
    d = tl.arange(0, BD)[None, :]
    channel = head * D + d
    real = (d < D) & (t < T)
    x += row * T * C
    tail += row * (W - 1) * C
    slopes += row * T * C
    grad_weight += part * W * C
    dz = tl.load(slopes + t * C + channel, mask=real, other=0.0)
    dx = tl.zeros([BT, BD], tl.float32)
    for i in tl.static_range(W):
        tap = tl.load(weight + channel * W + W - 1 - i, mask=d < D, other=0.0).to(tl.float32)
        dx += tap * tl.load(slopes + (t + i) * C + channel, mask=real & (t + i < T), other=0.0)
        shifted = load_token(x, tail, t - (W - 1) + i, channel, real, T, C, W)
        dw = tl.sum(dz * shifted, 0)[None, :]
        tl.store(grad_weight + i * C + channel, dw, mask=d < D)
    tl.store(grad_x + (row * T + t) * C + channel, dx, mask=real)
    if start == 0:  # what stands before the row's first token
        r = tl.arange(0, BW)[:, None]
        before = (r < W - 1) & (d < D)
        s = r - (W - 1)
        dtail = tl.zeros([BW, BD], tl.float32)
        for i in tl.static_range(W):
            tap = tl.load(weight + channel * W + W - 1 - i, mask=d < D, other=0.0).to(tl.float32)
            inside = before & (s + i >= 0) & (s + i < T)
            dtail += tap * tl.load(slopes + (s + i) * C + channel, mask=inside, other=0.0)
        tl.store(grad_tail + (row * (W - 1) + r) * C + channel, dtail, mask=before)


def run_backward_wide(
    grad: Tensor, x: Tensor, tail: Tensor, weight: Tensor, heads: int, unit: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x `[B, T, C]`, tail `[B, W - 1, C]` and weight `[C, W]`, in their dtypes."""
    B, T, C = x.shape
    W = weight.shape[1]
    D = C // heads
    BD = triton.next_power_of_2(D)
    BT = max(1, BACKWARD.block // BD)
    blocks = B * max(1, triton.cdiv(T, BT))
    x, tail, weight = x.contiguous(), tail.contiguous(), weight.contiguous()
    grad_x, grad_tail = torch.empty_like(x), torch.empty_like(tail)
    slopes = x.new_empty(x.shape, dtype=torch.float32)
    parts = x.new_empty((blocks, W, C), dtype=torch.float32)
    with torch.cuda.device_of(x):
        run_kernel(
            conv_slopes, (blocks * heads,), BACKWARD.options,
            x, tail, weight, grad.contiguous(), slopes, T,
            heads, D, BD, BT, W, unit, EPS,
        )  # fmt: skip
        run_kernel(
            conv_backward_wide, (blocks * heads,), BACKWARD.options,
            x, tail, weight, slopes, grad_x, grad_tail, parts, T,
            heads, D, BD, BT, triton.next_power_of_2(max(W - 1, 1)), W,
        )  # fmt: skip
    return grad_x, grad_tail, parts.sum(0).T.contiguous().to(weight.dtype)
