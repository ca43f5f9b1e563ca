"""The way out of the layer: RMSNorm per head times a SiLU gate, one kernel forward and one backward.

    n = x / sqrt(mean(x^2) + eps)        out = n gain silu(gate)

As `titans.nn.RMSNorm` and a product do, but in fp32 up to the result. Nothing is kept but the inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans.ops.kernels.dispatch import run_kernel
from titans.ops.kernels.launch import Launch

FORWARD = Launch(warps=4, block=2048)  # block: channels x tokens of a tile
BACKWARD = Launch(warps=4, stages=2, block=2048)
TILES = 8  # of a program of the backward: as many share one part of the gain's gradient


@triton.jit(do_not_specialize=["tokens"])
def norm_gate_forward(
    x, gain, gate, out, tokens,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of BT tokens x H), heads first: neighbours read the same lines of memory."""
    head = tl.program_id(0) % H
    t = (tl.program_id(0) // H).to(tl.int64) * BT + tl.arange(0, BT)[:, None]
    d = tl.arange(0, BD)[None, :]
    real = (d < D) & (t < tokens)
    at = (t * H + head) * D + d
    wide = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
    z = tl.load(gate + at, mask=real, other=0.0).to(tl.float32)
    scale = tl.load(gain + head * D + d, mask=d < D, other=0.0).to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 1, keep_dims=True) / D + EPS)
    tl.store(out + at, normed * scale * (z * tl.sigmoid(z)), mask=real)


@triton.jit(do_not_specialize=["tokens"])
def norm_gate_backward(
    x, gain, gate, grad, grad_x, grad_gain, grad_gate, tokens,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr,
    EPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of TILES x BT tokens x H). grad_gain: fp32 `[blocks, H, D]`, one part each."""
    head = tl.program_id(0) % H
    block = (tl.program_id(0) // H).to(tl.int64)
    d = tl.arange(0, BD)[None, :]
    scale = tl.load(gain + head * D + d, mask=d < D, other=0.0).to(tl.float32)
    total = tl.zeros([BT, BD], tl.float32)
    for tile in tl.range(0, TILES, num_stages=STAGES):
        t = (block * TILES + tile) * BT + tl.arange(0, BT)[:, None]
        real = (d < D) & (t < tokens)
        at = (t * H + head) * D + d
        wide = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
        z = tl.load(gate + at, mask=real, other=0.0).to(tl.float32)
        dy = tl.load(grad + at, mask=real, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(wide * wide, 1, keep_dims=True) / D + EPS)
        normed = wide * rstd
        share = tl.sigmoid(z)
        opened = z * share
        tl.store(grad_gate + at, dy * normed * scale * (share + opened * (1.0 - share)), mask=real)
        dy *= opened
        total += dy * normed
        dy *= scale
        dx = rstd * (dy - normed * (tl.sum(dy * normed, 1, keep_dims=True) / D))
        tl.store(grad_x + at, dx, mask=real)
    tl.store(grad_gain + (block * H + head) * D + d, tl.sum(total, 0, keep_dims=True), mask=d < D)


def run_forward(x: Tensor, gain: Tensor, gate: Tensor, eps: float) -> Tensor:
    """x `[B, T, H, D]`, gain `[H, D]`, gate `[B, T, C]` -> `[B, T, C]`, in the wider dtype of x and gate."""
    B, T, H, D = x.shape
    BD = triton.next_power_of_2(D)
    BT = max(1, FORWARD.block // BD)
    out = gate.new_empty(gate.shape, dtype=torch.promote_types(x.dtype, gate.dtype))
    with torch.cuda.device_of(x):
        run_kernel(
            norm_gate_forward, (triton.cdiv(B * T, BT) * H,), FORWARD.options,
            x.contiguous(), gain.contiguous(), gate.contiguous(), out, B * T, H, D, BD, BT, eps,
        )  # fmt: skip
    return out


def run_backward(
    grad: Tensor, x: Tensor, gain: Tensor, gate: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gain and gate, in their dtypes, from that of `run_forward`'s result."""
    B, T, H, D = x.shape
    BD = triton.next_power_of_2(D)
    BT = max(1, BACKWARD.block // BD)
    blocks = triton.cdiv(B * T, BT * TILES)
    grad_x, grad_gate = x.new_empty(x.shape), gate.new_empty(gate.shape)
    parts = x.new_empty((blocks, H, D), dtype=torch.float32)
    with torch.cuda.device_of(x):
        run_kernel(
            norm_gate_backward, (blocks * H,), BACKWARD.options,
            x.contiguous(), gain.contiguous(), gate.contiguous(), grad.contiguous(), grad_x, parts, grad_gate,
            B * T, H, D, BD, BT, TILES, eps, BACKWARD.stages,
        )  # fmt: skip
    return grad_x, parts.sum(0).to(gain.dtype), grad_gate
