"""The memory as a function of its weights: M(x) = x + LN(act(x W_1) ... W_L)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from titans.ops.spec import MemorySpec

NORM_EPS = 1e-6

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def apply_memory(
    x: Tensor,
    weights: tuple[Tensor, ...],
    spec: MemorySpec,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
) -> Tensor:
    """M(x) of paper sec. 3.1 (camera-ready sec. 3.3), in plain differentiable PyTorch.

    x: `[B, H, D]` or `[B, T, H, D]`; weights: L tensors `[B, H, D_in, D_out]`; norm_weight and
    norm_bias: `[H, D]`, the slow gain and bias of the LN (None: 1 and 0).
    """
    hidden = x
    for layer, weight in enumerate(weights):
        if layer > 0:
            hidden = ACTIVATIONS[spec.activation](hidden)
        hidden = torch.einsum("b...hi,bhio->b...ho", hidden, weight)
    if spec.norm:
        hidden = F.layer_norm(hidden, (spec.dim,), eps=NORM_EPS)
        if norm_weight is not None:
            hidden = hidden * norm_weight
        if norm_bias is not None:
            hidden = hidden + norm_bias
    return x + hidden if spec.residual else hidden
