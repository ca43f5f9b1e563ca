"""Causal depthwise convolution with a tail, so that cutting a sequence anywhere changes nothing.

Shape suffixes: B rows, T tokens, C channels, W width of the kernel.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor, nn

from titans.nn.rows import Rows


class ShortConv(nn.Module):
    """`y_t = sum_i w_i x_{t-W+1+i}`: each channel sees its last W tokens (paper sec. 4.4, W = 4).

    The tail holds the W - 1 inputs before the first token, zeros at the very start.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.channels = channels
        self.width = width
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.width**-0.5  # what torch gives a depthwise convolution
        nn.init.uniform_(self.weight, -bound, bound)

    def initial_tail(self, batch: int) -> Tensor:
        """Zeros `[B, W - 1, C]`."""
        return self.weight.new_zeros(batch, self.width - 1, self.channels)

    def forward(self, x: Tensor, tail: Tensor, rows: Rows | None = None) -> tuple[Tensor, Tensor]:
        """x `[B, T, C]` or packed `[1, total, C]` with `rows`; returns the same shape and the new tail."""
        tail = tail.to(x.dtype)
        if rows is None:
            padded_BTC = torch.cat([tail, x], dim=1)
            return self._convolve(padded_BTC), padded_BTC[:, x.shape[1] :]
        # Every row's tail goes in front of its tokens: one stream, no padding, nothing crosses rows.
        lead = self.width - 1
        source: list[int] = []
        outputs: list[int] = []
        tails: list[int] = []
        offset = 0
        for row, (start, length) in enumerate(zip(rows.starts, rows.lengths, strict=True)):
            source += range(row * lead, (row + 1) * lead)
            source += range(len(rows) * lead + start, len(rows) * lead + start + length)
            outputs += range(offset, offset + length)
            tails += range(offset + length, offset + length + lead)
            offset += lead + length
        both = torch.cat([tail.flatten(0, 1), x[0]])
        stream_1TC = both.index_select(0, torch.tensor(source, dtype=torch.long, device=x.device))[None]
        y = self._convolve(stream_1TC).index_select(
            1, torch.tensor(outputs, dtype=torch.long, device=x.device)
        )
        new_tail = stream_1TC[0].index_select(0, torch.tensor(tails, dtype=torch.long, device=x.device))
        return y, new_tail.view(len(rows), lead, self.channels)

    def _convolve(self, padded_BTC: Tensor) -> Tensor:
        tokens = padded_BTC.shape[1] - self.width + 1
        terms = (padded_BTC[:, i : i + tokens] * self.weight[:, i] for i in range(self.width))
        return reduce(torch.add, terms)
