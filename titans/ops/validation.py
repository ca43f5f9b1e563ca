"""Checks of shapes, dtypes and devices, before any work begins. Values are never looked at here."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from titans.ops.spec import MemorySpec, MemoryState


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float32 whatever the inputs are, float64 only for float64 inputs."""
    return torch.promote_types(tensors[0].dtype, torch.float32)


def expect_shape(name: str, tensor: Tensor, shape: tuple[int, ...], words: str) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {words} = {list(shape)}, got {list(tensor.shape)}")


def expect_floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor, got {tensor.dtype}")


def expect_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like q, got {tensor.device}")


def check_memory_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    log_decay: Tensor | tuple[Tensor, ...],
    log_momentum: Tensor | None,
    state: MemoryState,
    spec: MemorySpec,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    chunk_size: int,
    cu_seqlens: Tensor | None,
) -> None:
    """Raise `ValueError` naming the argument, what was expected and what came."""
    if q.dim() != 4:
        raise ValueError(f"q must have shape [B, T, H, D], got {list(q.shape)}")
    batch, tokens, heads, dim = q.shape
    if tokens == 0:
        raise ValueError("q must hold at least one token, got T = 0")
    if dim != spec.dim:
        raise ValueError(f"q must have head width spec.dim = {spec.dim}, got {dim}")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        expect_floating(name, tensor)
        expect_shape(name, tensor, (batch, tokens, heads, dim), "[B, T, H, D]")
        expect_device(name, tensor, q.device)
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} must have dtype {q.dtype} like q, got {tensor.dtype}")
    if not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1:
        raise ValueError(f"chunk_size must be a positive integer, got {chunk_size!r}")

    rows = batch
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"cu_seqlens needs packed inputs with B = 1, got B = {batch}")
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.shape[0] < 2:
            raise ValueError(
                "cu_seqlens must be int32 of shape [N + 1] with N >= 1, "
                f"got {cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}"
            )
        rows = cu_seqlens.shape[0] - 1

    check_gates(theta, log_decay, log_momentum, (batch, tokens, heads), spec, q.device)
    check_state(state, spec, rows, heads, compute_dtype(q), q.device)
    check_affine(norm_weight, norm_bias, spec, heads, q.device)


def check_affine(
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    spec: MemorySpec,
    heads: int,
    device: torch.device,
) -> None:
    for name, affine in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if affine is None:
            continue
        if not spec.norm:
            raise ValueError(f"{name} must be None for a spec without norm, got shape {list(affine.shape)}")
        expect_shape(name, affine, (heads, spec.dim), "[H, D]")
        expect_device(name, affine, device)


def check_bounds(bounds: list[int], num_tokens: int) -> None:
    """The documents' bounds, where they are on the host anyway."""
    if bounds[0] != 0 or bounds[-1] != num_tokens or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(
            f"cu_seqlens must rise from 0 to T = {num_tokens}, got {bounds[:8]} ... {bounds[-1]}"
        )


def check_gates(
    theta: Tensor,
    log_decay: Tensor | tuple[Tensor, ...],
    log_momentum: Tensor | None,
    leading: tuple[int, int, int],
    spec: MemorySpec,
    device: torch.device,
) -> None:
    gates = {"theta": theta}
    if log_momentum is not None:
        gates["log_momentum"] = log_momentum
    if isinstance(log_decay, tuple):
        if len(log_decay) != spec.depth:
            raise ValueError(
                f"log_decay as a tuple must hold spec.depth = {spec.depth} tensors, got {len(log_decay)}"
            )
        for layer, (gate, (_, d_out)) in enumerate(zip(log_decay, spec.layer_shapes, strict=True)):
            expect_floating(f"log_decay[{layer}]", gate)
            expect_shape(f"log_decay[{layer}]", gate, (*leading, d_out), "[B, T, H, D_out]")
            expect_device(f"log_decay[{layer}]", gate, device)
    else:
        gates["log_decay"] = log_decay
    for name, gate in gates.items():
        expect_floating(name, gate)
        expect_device(name, gate, device)
        if tuple(gate.shape) not in (leading, (*leading, spec.depth)):
            raise ValueError(
                f"{name} must have shape [B, T, H] = {list(leading)} or [B, T, H, L] = "
                f"{[*leading, spec.depth]}, got {list(gate.shape)}"
            )


def check_state(
    state: MemoryState, spec: MemorySpec, rows: int, heads: int, dtype: torch.dtype, device: torch.device
) -> None:
    for name in ("weights", "momentum", "anchor"):
        tensors = getattr(state, name)
        if len(tensors) != spec.depth:
            raise ValueError(
                f"state.{name} must hold spec.depth = {spec.depth} tensors, got {len(tensors)}: "
                "is it the state of another spec?"
            )
        for layer, (tensor, shape) in enumerate(zip(tensors, spec.layer_shapes, strict=True)):
            expect_shape(f"state.{name}[{layer}]", tensor, (rows, heads, *shape), "[B, H, D_in, D_out]")
            expect_device(f"state.{name}[{layer}]", tensor, device)
            if tensor.dtype != dtype:
                raise ValueError(
                    f"state.{name}[{layer}] must be {dtype} for these inputs, got {tensor.dtype}"
                )
    expect_shape("state.position", state.position, (rows,), "[B]")
    if state.position.dtype != torch.int32:
        raise ValueError(f"state.position must be int32, got {state.position.dtype}")
    expect_device("state.position", state.position, device)
