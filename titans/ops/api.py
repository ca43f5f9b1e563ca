"""The public operation: a memory that is written while it is read.

    l(M; k, v) = || M(k) - v ||^2
    G_t = grad_M l(anchor; k_t, v_t)                      anchor: the weights at the chunk's start
    S_t = exp(log_momentum_t) S_{t-1} - theta_t G_t
    M_t = exp(log_decay_t)    M_{t-1} + S_t
    y_t = M_t(q_t)

Paper sec. 3.1 and 3.2 (Eq. 8 to 18). `reference.py` is this recurrence, `chunked/` its parallel form,
`kernels/` that form on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from titans.ops.chunked import chunked
from titans.ops.chunked.step import step
from titans.ops.kernels.support import unsupported
from titans.ops.network import apply_memory
from titans.ops.reference import reference
from titans.ops.spec import MemorySpec, MemoryState
from titans.ops.validation import (
    check_affine,
    check_memory_inputs,
    compute_dtype,
    expect_floating,
    expect_shape,
)

Implementation = Literal["auto", "reference", "chunked", "triton"]


def _fused(*arguments: Any) -> tuple[Tensor, MemoryState]:
    from titans.ops.kernels import fused  # here: the rest of the library runs where Triton is not installed

    return fused(*arguments)


def _stepped(*arguments: Any) -> tuple[Tensor, MemoryState]:
    from titans.ops.kernels import stepped

    return stepped(*arguments)


_IMPLEMENTATIONS: dict[str, Callable[..., tuple[Tensor, MemoryState]]] = {
    "reference": reference,
    "chunked": chunked,
    "chunked step": step,
    "triton": _fused,
    "triton step": _stepped,
}


class MemoryOutput(NamedTuple):
    """output: `[B, T, H, D]`, dtype of v; state: the memory after the last token."""

    output: Tensor
    state: MemoryState


def resolve_implementation(
    impl: str,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    spec: MemorySpec | None = None,
    chunk_size: int = 16,
    channelwise: bool = False,
    one_token: bool = False,
) -> str:
    """The implementation that `impl` stands for; an explicit one never falls back silently.

    "auto" is "triton" for half-precision tensors on a CUDA device where its kernels cover the call (see
    `kernels/support.py`), otherwise "chunked".

    one_token: the call holds one token a row, no documents, and nothing in it requires a gradient. "chunked"
    and "triton" are then "chunked step" and "triton step", made for decoding. The kernel covers any chunk
    size and computes in float32 throughout, so "auto" takes it for float32 tensors, too.
    """
    if impl not in get_args(Implementation):
        raise ValueError(f"impl must be one of {list(get_args(Implementation))}, got {impl!r}")
    if impl == "reference":
        return impl
    plain, kernels = ("chunked step", "triton step") if one_token else ("chunked", "triton")
    if impl == "chunked":
        return plain
    chunk = None if one_token else chunk_size
    if impl == "auto":
        if device is None or device.type != "cuda" or spec is None:
            return plain
        pays = one_token or dtype in (torch.bfloat16, torch.float16)
        return kernels if pays and not unsupported(device, dtype, spec, chunk, channelwise) else plain
    if device is not None and spec is not None:
        reason = unsupported(device, dtype, spec, chunk, channelwise)
        if reason is not None:
            raise ValueError(f"impl='triton' {reason}")
    return kernels


def neural_memory(
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
    cu_seqlens: Tensor | None = None,
    impl: Implementation = "auto",
) -> MemoryOutput:
    """Write every token into the memory and read it just after: `y_t = M_t(q_t)`.

    Args:
        q, k, v: `[B, T, H, D]`, one floating dtype; q and k l2-normalised by the caller.
        theta: step size >= 0, `[B, T, H]` or, one gate per memory layer, `[B, T, H, L]`.
        log_decay: `log(1 - alpha) <= 0`, same shapes, or a tuple of L tensors `[B, T, H, D_out]` for a
            decay per output channel. `-inf` (forget everything) is legal.
        log_momentum: `log(eta) <= 0`, same shapes; `-inf` is legal. None: `S = -theta G` at every
            token, and `state.momentum` is returned untouched.
        state: the memory before the first token, `MemoryState.initial(weights, batch=B)` for a fresh one.
        norm_weight, norm_bias: `[H, D]`, gain and bias of the memory's LN; None is 1 and 0.
        chunk_size: tokens whose inner gradients share one anchor. Part of the model, not a speed knob.
        cu_seqlens: int32 `[N + 1]`, packed documents (B = 1); the state then has N rows, no information
            crosses documents and an empty document passes its state through.
        impl: "reference" (token loop), "chunked" (dual form in PyTorch), "triton" (fused kernels on a CUDA
            device: bf16 and fp16 inputs are multiplied as they are, sums and state are float32; one token
            without gradients takes the kernel for decoding) or "auto" (`resolve_implementation`). An
            explicit choice never falls back to another.

    Returns:
        `MemoryOutput(output [B, T, H, D] in the dtype of v, state)`. Differentiable with respect to
        every tensor argument and through the state; arithmetic is float32 (float64 for float64 inputs),
        but see impl="triton".

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names it.
    """
    check_memory_inputs(
        q, k, v, theta, log_decay, log_momentum, state, spec, norm_weight, norm_bias, chunk_size, cu_seqlens
    )
    channelwise = isinstance(log_decay, tuple)
    one_token = q.shape[1] == 1 and cu_seqlens is None
    if one_token and torch.is_grad_enabled():
        decays = log_decay if isinstance(log_decay, tuple) else (log_decay,)
        tensors = [q, k, v, theta, *decays, log_momentum, norm_weight, norm_bias]
        tensors += [*state.weights, *state.momentum, *state.anchor]
        one_token = not any(tensor is not None and tensor.requires_grad for tensor in tensors)
    name = resolve_implementation(impl, q.device, q.dtype, spec, chunk_size, channelwise, one_token)
    run = _IMPLEMENTATIONS[name]
    dtype = compute_dtype(q)
    # The kernels multiply in the dtype of the inputs and add up in float32.
    of_tokens = q.dtype if name.startswith("triton") else dtype

    def cast(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    # Explicit casts do not stop autocast from choosing low-precision products, so it is switched off.
    with torch.autocast(q.device.type, enabled=False):
        output, new_state = run(
            q.to(of_tokens),
            k.to(of_tokens),
            v.to(of_tokens),
            theta.to(dtype),
            tuple(gate.to(dtype) for gate in log_decay)
            if isinstance(log_decay, tuple)
            else log_decay.to(dtype),
            cast(log_momentum),
            state,
            spec,
            cast(norm_weight),
            cast(norm_bias),
            chunk_size,
            cu_seqlens,
        )
    return MemoryOutput(output.to(v.dtype), new_state)


def read_memory(
    q: Tensor,
    weights: tuple[Tensor, ...],
    spec: MemorySpec,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
) -> Tensor:
    """Retrieval alone (paper Eq. 15): `M(q)` with fixed weights, nothing is written.

    q: `[B, T, H, D]`; weights: L tensors `[B, H, D_in, D_out]`. Returns `[B, T, H, D]` in the dtype of q.
    """
    expect_floating("q", q)
    if q.dim() != 4 or q.shape[-1] != spec.dim:
        raise ValueError(f"q must have shape [B, T, H, {spec.dim}], got {list(q.shape)}")
    if len(weights) != spec.depth:
        raise ValueError(f"weights must hold spec.depth = {spec.depth} tensors, got {len(weights)}")
    for layer, (weight, shape) in enumerate(zip(weights, spec.layer_shapes, strict=True)):
        expect_shape(f"weights[{layer}]", weight, (q.shape[0], q.shape[2], *shape), "[B, H, D_in, D_out]")
    check_affine(norm_weight, norm_bias, spec, q.shape[2], q.device)
    dtype = compute_dtype(q)
    with torch.autocast(q.device.type, enabled=False):
        output = apply_memory(
            q.to(dtype),
            tuple(weight.to(dtype) for weight in weights),
            spec,
            None if norm_weight is None else norm_weight.to(dtype),
            None if norm_bias is None else norm_bias.to(dtype),
        )
    return output.to(q.dtype)
