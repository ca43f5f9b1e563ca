"""When the layer runs fused kernels around the memory, and a way to them that imports Triton only then.

The kernels: convolution + SiLU + unit length per head, and norm + gate (`titans/ops/kernels/layer.py`).
"""

from __future__ import annotations

from torch import Tensor

from titans.ops.api import Implementation
from titans.ops.kernels.support import CHECKED_CONV_SIZES, layer_unsupported

# Checked on an H100, where they were faster than the same layer without them, compiled or not.
FUSED_BY_DEFAULT = True


def runs_fused(impl: Implementation, projected: Tensor, conv_size: int | None = None) -> bool:
    """Whether the layer's kernels take this stream, `[B, T, C]` as it came out of its projection.

    conv_size: tokens of the convolution; None for the kernel behind the memory.

    "triton": they do. "chunked", "reference": they do not. "auto": they do on CUDA devices wherever they can
    and were checked on a card (with `FUSED_BY_DEFAULT` off, nowhere).

    Raises:
        ValueError: "triton" where they cannot; the message says why.
    """
    if impl == "triton":
        if (reason := layer_unsupported(projected.device, projected.dtype, conv_size)) is not None:
            raise ValueError(f"impl='triton' {reason}")
        return True
    # On a CPU they would run in Triton's interpreter, if at all.
    wanted = impl == "auto" and FUSED_BY_DEFAULT and projected.device.type == "cuda"
    checked = conv_size is None or conv_size in CHECKED_CONV_SIZES
    return wanted and checked and layer_unsupported(projected.device, projected.dtype, conv_size) is None


def conv_silu(x: Tensor, tail: Tensor, weight: Tensor, heads: int, unit: bool) -> Tensor:
    """See `titans.ops.kernels.layer.conv_silu`."""
    from titans.ops.kernels import layer

    return layer.conv_silu(x, tail, weight, heads, unit)


def norm_gate(x: Tensor, gain: Tensor, gate: Tensor, eps: float) -> Tensor:
    """See `titans.ops.kernels.layer.norm_gate`."""
    from titans.ops.kernels import layer

    return layer.norm_gate(x, gain, gate, eps)
