"""One token of decoding for every row and head: one launch for the linear memory and three for the MLP.

The step is bound by bytes: weights, momentum and anchor are read and weights and momentum written once.
Batch 1 has too few heads to draw that from memory with one program each, so a head is cut into slices of its
hidden units (MLP) or value columns (linear), and the two sums over hidden slices pass through scratch memory:

    mlp_step_anchor  slice   h = act(k A1), its part of z2 = h A2               A: anchor
    mlp_step_write   slice   G at the anchor, S and W of the slice, its part of act(q W1) W2
    mlp_step_finish  head    y and, once every program has read it, the position
    linear_step      slice   all of it, then `advance_position`

Sums run in a fixed order that does not depend on the batch: the same bits twice, alone or among other rows.
On Hopper and later the launches after the first begin early (programmatic dependent launch):
`mlp_step_write` draws weights and momentum, four fifths of the bytes, while `mlp_step_anchor` still runs.
Safe because the first launch is an ordinary one: whatever wrote the state has ended when it starts.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans.ops.api import MemoryOutput
from titans.ops.kernels.functions import act, act_slope, normalize, normalize_backward
from titans.ops.kernels.launch import Launch
from titans.ops.kernels.support import unsupported
from titans.ops.spec import MemorySpec, MemoryState
from titans.ops.validation import check_memory_inputs

# On an H200, 24 layers of 16 heads x 64, F = 256, batch 1, one graph: 173 us; 8 warps 221, block 16 211.
MLP = Launch(warps=4, block=32)  # block: hidden units of a program
LINEAR = Launch(warps=4, block=16)  # block: value columns of a program
FINISH = Launch(warps=2)


@triton.jit
def load_gate(gate, head, LAYER: tl.constexpr, SETS: tl.constexpr):
    """gate: `[B, 1, H, SETS]`, one for all memory layers or one each; head counts over rows and heads."""
    return tl.load(gate + head * SETS + LAYER % SETS).to(tl.float32)


@triton.jit
def load_row(x, head, D: tl.constexpr):
    """`[1, D]` fp32."""
    return tl.load(x + head * D + tl.arange(0, D)).to(tl.float32)[None, :]


@triton.jit
def load_column(x, head, D: tl.constexpr):
    """`[D, 1]` fp32."""
    return tl.load(x + head * D + tl.arange(0, D)).to(tl.float32)[:, None]


@triton.jit
def sum_parts(parts, D: tl.constexpr, SLICES: tl.constexpr):
    """`[SLICES, D]` -> `[1, D]`."""
    of_slices = tl.arange(0, SLICES)
    return tl.sum(tl.load(parts + of_slices[:, None] * D + tl.arange(0, D)[None, :]), 0, keep_dims=True)


@triton.jit
def load_affine(norm_weight, norm_bias, head, D: tl.constexpr):
    """Gain and bias of the norm, `[1, D]`; None is 1 and 0."""
    gain_1D = tl.full([1, D], 1.0, tl.float32)
    if norm_weight is not None:
        gain_1D = load_row(norm_weight, head, D)
    bias_1D = tl.zeros([1, D], tl.float32)
    if norm_bias is not None:
        bias_1D = load_row(norm_bias, head, D)
    return gain_1D, bias_1D


@triton.jit
def mlp_step_anchor(
    k, W1, W2, anchor1, anchor2, position, scratch,
    H: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BF: tl.constexpr,
    ACTIVATION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (B x H, F / BF). Scratch of a head, fp32: `z1 [F]`, parts of z2 and of y `[F / BF, D]` each."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    head, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    of_D, of_F = tl.arange(0, D), block * BF + tl.arange(0, BF)
    tile_DF = head * D * F + of_D[:, None] * F + of_F[None, :]
    tile_FD = head * F * D + of_F[:, None] * D + of_D[None, :]
    # Before the position is known: to wait for it costs a latency at every token, loads in vain one in C.
    A1_DF = tl.load(anchor1 + tile_DF)
    A2_FD = tl.load(anchor2 + tile_FD)
    if tl.load(position + head // H) == 0:
        A1_DF = tl.load(W1 + tile_DF)
        A2_FD = tl.load(W2 + tile_FD)
    z1 = tl.sum(load_column(k, head, D) * A1_DF, 0)
    z2_part = tl.sum(act(z1, ACTIVATION)[:, None] * A2_FD, 0)
    scratch += head * (F + 2 * (F // BF) * D)
    tl.store(scratch + of_F, z1)
    tl.store(scratch + F + block * D + of_D, z2_part)


@triton.jit
def mlp_step_write(
    q, k, v, theta, log_decay, log_momentum, norm_weight, norm_bias,
    W1, W2, S1, S2, anchor1, anchor2, position, scratch, chunk_size,
    THETA_SETS: tl.constexpr, DECAY_SETS: tl.constexpr, MOMENTUM_SETS: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BF: tl.constexpr,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (B x H, F / BF). log_momentum None: momentum is neither read nor written."""
    head, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    of_D, of_F = tl.arange(0, D), block * BF + tl.arange(0, BF)
    tile_DF = head * D * F + of_D[:, None] * F + of_F[None, :]
    tile_FD = head * F * D + of_F[:, None] * D + of_D[None, :]
    W1_DF = tl.load(W1 + tile_DF)
    W2_FD = tl.load(W2 + tile_FD)
    if log_momentum is not None:
        S1_DF = tl.load(S1 + tile_DF)
        S2_FD = tl.load(S2 + tile_FD)
    A2_FD = tl.load(anchor2 + tile_FD)
    at = tl.load(position + head // H)
    A2_FD = tl.where(at == 0, W2_FD, A2_FD)
    k_1D, k_D1 = load_row(k, head, D), load_column(k, head, D)
    q_D1 = load_column(q, head, D)
    target_1D = load_row(v, head, D)
    if RESIDUAL:
        target_1D -= k_1D
    theta1, theta2 = load_gate(theta, head, 0, THETA_SETS), load_gate(theta, head, 1, THETA_SETS)
    keep1 = tl.exp(load_gate(log_decay, head, 0, DECAY_SETS))
    keep2 = tl.exp(load_gate(log_decay, head, 1, DECAY_SETS))
    if log_momentum is not None:
        eta1 = tl.exp(load_gate(log_momentum, head, 0, MOMENTUM_SETS))
        eta2 = tl.exp(load_gate(log_momentum, head, 1, MOMENTUM_SETS))
    if NORM:
        gain_1D, bias_1D = load_affine(norm_weight, norm_bias, head % H, D)
    if EARLY:  # from here on what mlp_step_anchor wrote
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    scratch += head * (F + 2 * (F // BF) * D)
    z1 = tl.load(scratch + of_F)
    z2_1D = sum_parts(scratch + F, D, F // BF)
    if NORM:
        normed_1D, rstd = normalize(z2_1D, D)
        error_1D = normed_1D * gain_1D + bias_1D - target_1D
        G2_1D = normalize_backward(2.0 * error_1D * gain_1D, normed_1D, rstd, D)
    else:
        G2_1D = 2.0 * (z2_1D - target_1D)
    h, slope = act_slope(z1, ACTIVATION)
    G1 = tl.sum(G2_1D * A2_FD, 1) * slope

    new_S1_DF = (-theta1 * k_D1) * G1[None, :]
    new_S2_FD = (-theta2 * h)[:, None] * G2_1D
    if log_momentum is not None:
        new_S1_DF += eta1 * S1_DF
        new_S2_FD += eta2 * S2_FD
    new_W1_DF = keep1 * W1_DF + new_S1_DF
    new_W2_FD = keep2 * W2_FD + new_S2_FD

    if at == 0:
        tl.store(anchor1 + tile_DF, W1_DF)
        tl.store(anchor2 + tile_FD, W2_FD)
    tl.debug_barrier()  # nothing says that the thread that stores an element is the one that loaded it
    if log_momentum is not None:
        tl.store(S1 + tile_DF, new_S1_DF)
        tl.store(S2 + tile_FD, new_S2_FD)
    tl.store(W1 + tile_DF, new_W1_DF)
    tl.store(W2 + tile_FD, new_W2_FD)
    if at + 1 == chunk_size:
        tl.store(anchor1 + tile_DF, new_W1_DF)
        tl.store(anchor2 + tile_FD, new_W2_FD)

    h_query = act(tl.sum(q_D1 * new_W1_DF, 0), ACTIVATION)
    y_part = tl.sum(h_query[:, None] * new_W2_FD, 0)
    tl.store(scratch + F + (F // BF + block) * D + of_D, y_part)


@triton.jit
def mlp_step_finish(
    q, norm_weight, norm_bias, scratch, y, position, chunk_size,
    H: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BF: tl.constexpr,
    NORM: tl.constexpr, RESIDUAL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (B x H)."""
    head = tl.program_id(0).to(tl.int64)
    if NORM:
        gain_1D, bias_1D = load_affine(norm_weight, norm_bias, head % H, D)
    q_1D = load_row(q, head, D)
    at = tl.load(position + head // H)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    y_1D = sum_parts(scratch + head * (F + 2 * (F // BF) * D) + F + (F // BF) * D, D, F // BF)
    if NORM:
        normed_1D, _ = normalize(y_1D, D)
        y_1D = normed_1D * gain_1D + bias_1D
    if RESIDUAL:
        y_1D += q_1D
    tl.store(y + head * D + tl.arange(0, D)[None, :], y_1D.to(y.dtype.element_ty))
    if head % H == 0:
        tl.store(position + head // H, (at + 1) % chunk_size)


@triton.jit
def linear_step(
    q, k, v, theta, log_decay, log_momentum, W, S, anchor, position, y, chunk_size,
    H: tl.constexpr, D: tl.constexpr, BV: tl.constexpr, RESIDUAL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (B x H, D / BV): value columns are independent. Gates of one set: there is one layer."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    head, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = block * BV + tl.arange(0, BV)
    tile_DV = head * D * D + tl.arange(0, D)[:, None] * D + columns[None, :]
    W_DV = tl.load(W + tile_DV)
    if log_momentum is not None:
        S_DV = tl.load(S + tile_DV)
    A_DV = tl.load(anchor + tile_DV)
    at = tl.load(position + head // H)
    A_DV = tl.where(at == 0, W_DV, A_DV)
    k_D1, q_D1 = load_column(k, head, D), load_column(q, head, D)
    target = tl.load(v + head * D + columns).to(tl.float32)
    if RESIDUAL:
        target -= tl.load(k + head * D + columns).to(tl.float32)
    G = 2.0 * (tl.sum(k_D1 * A_DV, 0) - target)
    new_S_DV = (-load_gate(theta, head, 0, 1) * k_D1) * G[None, :]
    if log_momentum is not None:
        new_S_DV += tl.exp(load_gate(log_momentum, head, 0, 1)) * S_DV
    new_W_DV = tl.exp(load_gate(log_decay, head, 0, 1)) * W_DV + new_S_DV
    if at == 0:
        tl.store(anchor + tile_DV, W_DV)
    tl.debug_barrier()  # as in mlp_step_write
    if log_momentum is not None:
        tl.store(S + tile_DV, new_S_DV)
    tl.store(W + tile_DV, new_W_DV)
    if at + 1 == chunk_size:
        tl.store(anchor + tile_DV, new_W_DV)
    read = tl.sum(q_D1 * new_W_DV, 0)
    if RESIDUAL:
        read += tl.load(q + head * D + columns).to(tl.float32)
    tl.store(y + head * D + columns, read.to(y.dtype.element_ty))


@triton.jit
def advance_position(position, chunk_size, rows, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """Grid (rows / BLOCK). A launch of its own: a program cannot know that the others have read theirs."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(position + row, mask=row < rows, other=0)
    tl.store(position + row, (at + 1) % chunk_size, mask=row < rows)


def memory_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    theta: Tensor,
    log_decay: Tensor | tuple[Tensor, ...],
    log_momentum: Tensor | None,
    state: MemoryState,
    spec: MemorySpec,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    chunk_size: int = 16,
    in_place: bool = False,
) -> MemoryOutput:
    """`neural_memory` for one token, without gradients: write it, then read (paper Eq. 10, 13, 15).

    Nothing is read back to the host and no launch depends on data: after one call of the same shapes (it
    compiles) the step can be captured in a CUDA graph and replayed.

    Args:
        q, k, v: `[B, 1, H, D]`, float16, bfloat16 or float32; widths as in `support.py`.
        theta, log_decay, log_momentum: `[B, 1, H]` or `[B, 1, H, L]`; `-inf` is legal in the logs.
        state: fp32, as `neural_memory` returns it; rows may be at different positions.
        spec: depth 1 without norm, or depth 2 with expansion 1, 2 or 4.
        norm_weight, norm_bias, chunk_size: as in `neural_memory`.
        in_place: write into the tensors of `state` and return that very state, at half the bytes. They must
            be contiguous and share no memory (a fresh `MemoryState.initial` shares weights, anchor and
            parameters): `own_memory(state)` makes such a state.

    Returns:
        `MemoryOutput(output [B, 1, H, D] in the dtype of v, state)`.

    Raises:
        ValueError: an argument does not fit, or needs a gradient; the message names it.
    """
    check_memory_inputs(
        q, k, v, theta, log_decay, log_momentum, state, spec, norm_weight, norm_bias, chunk_size, None
    )
    if isinstance(log_decay, tuple):
        raise ValueError("log_decay must be one tensor for the step kernel, got a tuple (decay per channel)")
    _check_step(q, k, v, theta, log_decay, log_momentum, state, spec, norm_weight, norm_bias)
    if in_place:
        _check_own_memory(state)
    else:
        state = own_memory(state, momentum=log_momentum is not None)
    output = step_in_place(
        q, k, v, theta, log_decay, log_momentum, state, spec, norm_weight, norm_bias, chunk_size
    )
    return MemoryOutput(output, state)


def step_in_place(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    log_decay: Tensor,
    log_momentum: Tensor | None,
    state: MemoryState,
    spec: MemorySpec,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    chunk_size: int,
) -> Tensor:
    """`memory_step` without its checks: writes the tensors of `state` (`own_memory`), returns the output."""
    q, k, v, theta, log_decay = (x.contiguous() for x in (q, k, v, theta, log_decay))
    log_momentum = None if log_momentum is None else log_momentum.contiguous()
    output = torch.empty_like(v)
    if spec.depth == 1:
        _linear(q, k, v, theta, log_decay, log_momentum, state, spec, chunk_size, output)
    else:
        norm_weight = None if norm_weight is None else norm_weight.contiguous()
        norm_bias = None if norm_bias is None else norm_bias.contiguous()
        _mlp(q, k, v, theta, log_decay, log_momentum, state, spec, norm_weight, norm_bias, chunk_size, output)
    return output


def own_memory(state: MemoryState, *, momentum: bool = True) -> MemoryState:
    """A copy whose tensors are contiguous and share no memory, for steps in place; momentum is optional."""

    def copy(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in tensors)

    return MemoryState(
        weights=copy(state.weights),
        momentum=copy(state.momentum) if momentum else state.momentum,
        anchor=copy(state.anchor),
        position=state.position.clone(memory_format=torch.contiguous_format),
    )


def _mlp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    log_decay: Tensor,
    log_momentum: Tensor | None,
    state: MemoryState,
    spec: MemorySpec,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    chunk_size: int,
    output: Tensor,
) -> None:
    batch, _, H, D = q.shape
    F = D * spec.expansion
    BF = min(MLP.block, F)
    slices, heads = F // BF, batch * H
    scratch = torch.empty(heads * (F + 2 * slices * D), dtype=torch.float32, device=q.device)
    early = _starts_early(q.device)
    (W1, W2), (S1, S2), (anchor1, anchor2) = state.weights, state.momentum, state.anchor
    mlp_step_anchor[(heads, slices)](
        k, W1, W2, anchor1, anchor2, state.position, scratch,
        H, D, F, BF, spec.activation, early, **MLP.options,
    )  # fmt: skip
    mlp_step_write[(heads, slices)](
        q, k, v, theta, log_decay, log_momentum, norm_weight, norm_bias,
        W1, W2, S1, S2, anchor1, anchor2, state.position, scratch, chunk_size,
        _sets(theta), _sets(log_decay), _sets(log_momentum), H, D, F, BF,
        spec.activation, spec.norm, spec.residual, early, **_following(MLP, early),
    )  # fmt: skip
    mlp_step_finish[(heads,)](
        q, norm_weight, norm_bias, scratch, output, state.position, chunk_size,
        H, D, F, BF, spec.norm, spec.residual, early, **_following(FINISH, early),
    )  # fmt: skip


def _linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    log_decay: Tensor,
    log_momentum: Tensor | None,
    state: MemoryState,
    spec: MemorySpec,
    chunk_size: int,
    output: Tensor,
) -> None:
    batch, _, H, D = q.shape
    BV = min(LINEAR.block, D)
    early = _starts_early(q.device)
    linear_step[(batch * H, D // BV)](
        q, k, v, theta, log_decay, log_momentum,
        state.weights[0], state.momentum[0], state.anchor[0], state.position, output, chunk_size,
        H, D, BV, spec.residual, early, **LINEAR.options,
    )  # fmt: skip
    advance_position[(triton.cdiv(batch, 128),)](
        state.position, chunk_size, batch, 128, early, **_following(FINISH, early)
    )


@cache
def _starts_early(device: torch.device) -> bool:
    """Whether a launch may begin before the one it follows has ended (compute capability 9.0 and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _following(launch: Launch, early: bool) -> dict[str, int]:
    return launch.options | ({"launch_pdl": True} if early else {})


def _sets(gate: Tensor | None) -> int:
    return 1 if gate is None or gate.dim() == 3 else gate.shape[-1]


def _check_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    log_decay: Tensor,
    log_momentum: Tensor | None,
    state: MemoryState,
    spec: MemorySpec,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
) -> None:
    """What the step asks beyond `check_memory_inputs`."""
    if q.shape[1] != 1:
        raise ValueError(f"q must hold one token, [B, 1, H, D], got T = {q.shape[1]}")
    reason = unsupported(q.device, q.dtype, spec, None, False)
    if reason is not None:
        raise ValueError(f"the step kernel {reason}")
    if torch.is_grad_enabled():
        named = {"q": q, "k": k, "v": v, "theta": theta, "log_decay": log_decay, "log_momentum": log_momentum}
        named |= {"norm_weight": norm_weight, "norm_bias": norm_bias}
        for name in ("weights", "momentum", "anchor"):
            for layer, tensor in enumerate(getattr(state, name)):
                named[f"state.{name}[{layer}]"] = tensor
        for name, given in named.items():
            if given is not None and given.requires_grad:
                raise ValueError(
                    f"{name} requires a gradient, which the step kernel does not give: "
                    "call it under torch.no_grad() or use neural_memory"
                )


def _check_own_memory(state: MemoryState) -> None:
    owners: dict[int, str] = {}
    for name in ("weights", "momentum", "anchor"):
        for layer, tensor in enumerate(getattr(state, name)):
            full = f"state.{name}[{layer}]"
            if not tensor.is_contiguous():
                raise ValueError(
                    f"{full} must be contiguous to be written in place, got strides {list(tensor.stride())}: "
                    "own_memory(state) makes a copy that is"
                )
            owner = owners.setdefault(tensor.data_ptr(), full)
            if owner != full:
                raise ValueError(
                    f"{full} shares memory with {owner} and cannot be written in place: "
                    "own_memory(state) makes a copy that does not"
                )
    if not state.position.is_contiguous():
        raise ValueError("state.position must be contiguous to be written in place, got an expanded one")
