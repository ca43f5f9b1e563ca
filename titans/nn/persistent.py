"""Learned tokens that do not depend on the input (paper sec. 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PersistentTokens(nn.Module):
    """N learned vectors `[N, C]` of a layer. They stand among normalised tokens, so they start with rms 1."""

    def __init__(self, count: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)

    def forward(self) -> Tensor:
        return self.weight
