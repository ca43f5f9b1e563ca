"""Root-mean-square normalisation that computes in at least fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans.nn.precision import at_least_fp32


class RMSNorm(nn.Module):
    """`x / rms(x) * weight` over the last dimension; the result has the dtype of x.

    A `heads` count makes it per head: x is `[..., H, D]` and every head has its own gain.
    """

    def __init__(self, dim: int, eps: float = 1e-6, heads: int | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim if heads is None else (heads, dim)))

    def forward(self, x: Tensor) -> Tensor:
        wide = F.rms_norm(x.to(at_least_fp32(x.dtype)), (self.dim,), eps=self.eps)
        return (wide * self.weight).to(x.dtype)


def l2_normalize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """`x / sqrt(|x|^2 + eps)`, in at least fp32.

    eps stands inside the root: the gradient at a zero vector is finite (`x / max(|x|, eps)` is not safe
    to differentiate there, and padding or dead SiLUs do produce zeros).
    """
    wide = x.to(at_least_fp32(x.dtype))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)
