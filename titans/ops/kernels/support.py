"""What the Triton kernels cover. No Triton is needed to ask."""

from __future__ import annotations

import importlib.util
import os

import torch

from titans.ops.spec import MemorySpec


def _found(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # somebody forbids it
        return False


# What was checked on a card (H100 and H200, Triton 3.6). Two layers: heads of 32 end in illegal memory
# accesses there (docs/decisions.md, "Kernels"). The interpreter takes all of these and 16, for tests.
LINEAR_DIMS: tuple[int, ...] = (32, 64, 128)
MLP_DIMS: tuple[int, ...] = (64, 128)
STEP_DIMS: tuple[int, ...] = (64, 128)
CHUNKS = (16, 32, 64)
MLP_CHUNKS = (16, 32, 64)
EXPANSIONS = (1, 2, 4)
# Width of a head, expansion, chunk of two layers at the error budget on the card (0.02 of a gradient's RMS in
# bf16), by its gradient of log decay.
OVER_BUDGET = ((128, 1, 64),)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Tokens of a convolution: what the kernels take, and what of that was checked on a card.
CONV_SIZES, CHECKED_CONV_SIZES = range(2, 9), (4, 6, 8)
# Looked up once: torch.compile cannot trace the search, and a graph break costs a compiled block its speed.
INSTALLED = _found("triton")


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors (its own switch, for tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unsupported(
    device: torch.device, dtype: torch.dtype, spec: MemorySpec, chunk_size: int | None, channelwise: bool
) -> str | None:
    """Why `impl="triton"` cannot take a call: "needs ...", or None. chunk_size None: any, as in the step."""
    if (reason := _unsupported_tensor("q, k and v", device, dtype)) is not None:
        return reason
    if spec.depth > 2:
        return f"needs a memory of depth 1 or 2, got {spec.depth}"
    if spec.depth == 1 and spec.norm:
        return "needs a linear memory without norm, got norm=True"
    dims, chunks = (LINEAR_DIMS, CHUNKS) if spec.depth == 1 else (MLP_DIMS, MLP_CHUNKS)
    if spec.depth == 2 and chunk_size is None:
        dims = STEP_DIMS
    if interpreted():
        dims, chunks = (16, *sorted({*dims, *STEP_DIMS})), CHUNKS
    if spec.dim not in dims:
        return f"needs a head width among {dims}, got {spec.dim}"
    if spec.depth == 2 and spec.expansion not in EXPANSIONS:
        return f"needs an expansion among {EXPANSIONS}, got {spec.expansion}"
    if chunk_size is not None and chunk_size not in chunks:
        return f"needs a chunk size among {chunks}, got {chunk_size}"
    over_budget = spec.depth == 2 and (spec.dim, spec.expansion, chunk_size) in OVER_BUDGET
    if over_budget and not interpreted():
        return (
            f"needs another chunk size for heads of {spec.dim} with expansion {spec.expansion} than "
            f"{chunk_size}: its gradients are above the error budget"
        )
    if channelwise:
        return "needs decay per head or per layer, got decay per channel (a tuple of log_decay)"
    return None


def layer_unsupported(device: torch.device, dtype: torch.dtype, conv_size: int | None = None) -> str | None:
    """The same of the kernels around the memory in its layer (`layer.py`), for projections of that dtype.

    conv_size: None for the kernel behind the memory, which has no convolution.
    """
    if (reason := _unsupported_tensor("projections", device, dtype)) is not None:
        return reason
    if conv_size is not None and conv_size not in CONV_SIZES:
        return f"needs a convolution over {CONV_SIZES[0]} to {CONV_SIZES[-1]} tokens, got {conv_size}"
    return None


def _unsupported_tensor(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if not INSTALLED:
        return "needs the package triton, which is not installed"
    if device.type != "cuda" and not interpreted():
        return f"needs tensors on a CUDA device, got {device}"
    if dtype not in DTYPES:
        return f"needs {name} in bfloat16, float16 or float32, got {dtype}"
    return None
