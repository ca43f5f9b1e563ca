"""Convolution over W tokens, SiLU and unit length per head, one kernel forward and one backward.

For every head's channels, w the taps and eps inside the root as in `titans.nn.norms.l2_normalize`:

    z_t = w0 x_{t-W+1} + ... + w_{W-1} x_t                     x before the first token: the tail
    y_t = silu(z_t)
    out_t = y_t / sqrt(|y_t|^2 + eps)                          UNIT; otherwise y_t

Plain PyTorch passes over the stream about twenty times (a sum of shifted products, then the norm in fp32);
here the forward reads x and writes out, and the backward reads x and the gradient and writes that of x.
Sums are fp32 whatever the dtype. Nothing is kept but the inputs. That is for the paper's four tokens; the
backward for others: `layer_conv_wide.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans.ops.kernels.dispatch import run_kernel
from titans.ops.kernels.launch import Launch
from titans.ops.kernels.layer_conv_wide import EPS, load_token, run_backward_wide

WIDTH = 4  # of `conv_backward`
FORWARD = Launch(warps=4, block=2048)  # block: channels x tokens of a program
BACKWARD = Launch(warps=4, stages=3, block=512)  # block: channels of a program, which walks over TOKENS
TOKENS = 64


@triton.jit(do_not_specialize=["T"])
def conv_forward(
    x, tail, weight, out, T,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, W: tl.constexpr,
    UNIT: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Grid (B x blocks of BT tokens x H), heads first: neighbours read the same lines of memory."""
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
    z = tl.zeros([BT, BD], tl.float32)
    for i in tl.static_range(W):
        tap = tl.load(weight + channel * W + i, mask=d < D, other=0.0).to(tl.float32)
        z += tap * load_token(x, tail, t - (W - 1) + i, channel, real, T, C, W)
    y = z * tl.sigmoid(z)
    if UNIT:
        y *= tl.rsqrt(tl.sum(y * y, 1, keep_dims=True) + EPS)
    tl.store(out + (row * T + t) * C + channel, y, mask=real)


@triton.jit(do_not_specialize=["T"])
def conv_backward(
    x, tail, weight, grad, grad_x, grad_tail, grad_weight, T,
    H: tl.constexpr, D: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
    UNIT: tl.constexpr, EPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (B x blocks of BT tokens x blocks of BH heads). grad_weight: fp32 `[B x blocks, 4, C]`, parts.

    Walks over its tokens and the three after them with the last four x and gradients of z in registers: x_t
    enters z_t .. z_{t+3}, so the gradient of x_t is complete at step t + 3.
    """
    C: tl.constexpr = H * D
    groups: tl.constexpr = (H + BH - 1) // BH
    block = (tl.program_id(0) // groups).to(tl.int64)
    heads = (tl.program_id(0) % groups) * BH + tl.arange(0, BH)[:, None]
    d = tl.arange(0, BD)[None, :]
    channel = heads * D + d
    real = (heads < H) & (d < D)
    blocks = tl.maximum(tl.cdiv(T, BT), 1)
    row = block // blocks
    # A tile of one: the interpreter (3.9) cannot combine the comparison of a scalar with a mask.
    start = (block % blocks) * BT + tl.zeros([1, 1], tl.int64)
    x += row * T * C
    grad += row * T * C
    grad_x += row * T * C
    tail += row * 3 * C
    grad_tail += row * 3 * C
    w0 = tl.load(weight + channel * 4, mask=real, other=0.0).to(tl.float32)
    w1 = tl.load(weight + channel * 4 + 1, mask=real, other=0.0).to(tl.float32)
    w2 = tl.load(weight + channel * 4 + 2, mask=real, other=0.0).to(tl.float32)
    w3 = tl.load(weight + channel * 4 + 3, mask=real, other=0.0).to(tl.float32)
    x0 = load_token(x, tail, start - 3, channel, real, T, C, 4)
    x1 = load_token(x, tail, start - 2, channel, real, T, C, 4)
    x2 = load_token(x, tail, start - 1, channel, real, T, C, 4)
    dz0 = tl.zeros([BH, BD], tl.float32)
    dz1 = tl.zeros([BH, BD], tl.float32)
    dz2 = tl.zeros([BH, BD], tl.float32)
    dw0 = tl.zeros([BH, BD], tl.float32)
    dw1 = tl.zeros([BH, BD], tl.float32)
    dw2 = tl.zeros([BH, BD], tl.float32)
    dw3 = tl.zeros([BH, BD], tl.float32)
    for step in tl.range(0, BT + 3, num_stages=STAGES):
        t = start + step
        here = real & (t < T)
        x3 = tl.load(x + t * C + channel, mask=here, other=0.0).to(tl.float32)
        dy = tl.load(grad + t * C + channel, mask=here, other=0.0).to(tl.float32)
        z = w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
        gate = tl.sigmoid(z)
        y = z * gate
        if UNIT:
            scale = tl.rsqrt(tl.sum(y * y, 1, keep_dims=True) + EPS)
            y_unit = y * scale
            dy = scale * (dy - y_unit * tl.sum(dy * y_unit, 1, keep_dims=True))
        dz3 = dy * (gate + y * (1.0 - gate))
        own = tl.where(t < start + BT, dz3, 0.0)  # the tokens after belong to the next block's part
        dw0 += own * x0
        dw1 += own * x1
        dw2 += own * x2
        dw3 += own * x3
        dx = w3 * dz0 + w2 * dz1 + w1 * dz2 + w0 * dz3
        done = t - 3
        tl.store(grad_x + done * C + channel, dx, mask=real & (done >= start) & (done < T))
        tl.store(grad_tail + t * C + channel, dx, mask=real & (t < 3))  # before the row's first token
        x0, x1, x2 = x1, x2, x3
        dz0, dz1, dz2 = dz1, dz2, dz3
    grad_weight += block * 4 * C
    tl.store(grad_weight + channel, dw0, mask=real)
    tl.store(grad_weight + C + channel, dw1, mask=real)
    tl.store(grad_weight + 2 * C + channel, dw2, mask=real)
    tl.store(grad_weight + 3 * C + channel, dw3, mask=real)


def _blocks(tokens: int, size: int) -> int:
    return max(1, triton.cdiv(tokens, size))  # one for no tokens, too: the tail has a gradient


def run_forward(x: Tensor, tail: Tensor, weight: Tensor, heads: int, unit: bool) -> Tensor:
    """x `[B, T, C]`, tail `[B, W - 1, C]`, weight `[C, W]` -> `[B, T, H, D]` in the dtype of x."""
    B, T, C = x.shape
    D = C // heads
    BD = triton.next_power_of_2(D)
    BT = max(1, FORWARD.block // BD)
    out = x.new_empty(B, T, heads, D)
    with torch.cuda.device_of(x):
        run_kernel(
            conv_forward, (B * _blocks(T, BT) * heads,), FORWARD.options,
            x.contiguous(), tail.contiguous(), weight.contiguous(), out, T,
            heads, D, BD, BT, weight.shape[1], unit, EPS,
        )  # fmt: skip
    return out


def run_backward(
    grad: Tensor, x: Tensor, tail: Tensor, weight: Tensor, heads: int, unit: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, tail and weight, in their dtypes, from that of `run_forward`'s result."""
    if weight.shape[1] != WIDTH:
        return run_backward_wide(grad, x, tail, weight, heads, unit)
    B, T, C = x.shape
    D = C // heads
    BD = triton.next_power_of_2(D)
    BH = min(triton.next_power_of_2(heads), max(1, BACKWARD.block // BD))
    blocks = B * _blocks(T, TOKENS)
    grad_x, grad_tail = x.new_empty(x.shape), tail.new_empty(tail.shape)
    parts = x.new_empty((blocks, WIDTH, C), dtype=torch.float32)
    with torch.cuda.device_of(x):
        run_kernel(
            conv_backward, (blocks * triton.cdiv(heads, BH),), BACKWARD.options,
            x.contiguous(), tail.contiguous(), weight.contiguous(), grad.contiguous(),
            grad_x, grad_tail, parts, T,
            heads, D, BH, BD, TOKENS, unit, EPS, BACKWARD.stages,
        )  # fmt: skip
    return grad_x, grad_tail, parts.sum(0).T.contiguous().to(weight.dtype)
