"""Causal depthwise convolution with a tail, so that cutting a sequence anywhere changes nothing.

Shape suffixes: B rows, T tokens, C channels, W width of the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor, nn

from titans.nn.rows import Rows

# (x `[B, T, C]`, tail `[B, W - 1, C]`, weight `[C, W]`) -> `[B, T, ...]`
Convolve = Callable[[Tensor, Tensor, Tensor], Tensor]


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

    def forward(
        self, x: Tensor, tail: Tensor, rows: Rows | None = None, convolve: Convolve | None = None
    ) -> tuple[Tensor, Tensor]:
        """x `[B, T, C]` or packed `[1, total, C]` with `rows`; returns the same shape and the new tail.

        convolve: what runs in place of the plain convolution; its result may have other dimensions after T.
        """
        run = _convolve if convolve is None else convolve
        tail = tail.to(x.dtype)
        lead = self.width - 1
        if rows is None:
            # Not a view of all of x, which would stay alive in a streaming state.
            end = torch.cat([tail, x[:, max(0, x.shape[1] - lead) :]], dim=1)
            return run(x, tail, self.weight), end[:, end.shape[1] - lead :]
        # Every row's tail goes in front of its tokens: one stream, no padding, nothing crosses rows.
        order = rows.after_tails(lead)
        stream_1TC = torch.cat([tail.flatten(0, 1), x[0]]).index_select(0, order.stream)[None]
        y = run(stream_1TC[:, lead:], stream_1TC[:, :lead], self.weight)
        new_tail = stream_1TC[0].index_select(0, order.ends)
        return y.index_select(1, order.tokens), new_tail.view(len(rows), lead, self.channels)


def _convolve(x_BTC: Tensor, tail_BTC: Tensor, weight_CW: Tensor) -> Tensor:
    padded_BTC = torch.cat([tail_BTC, x_BTC], dim=1)
    tokens = x_BTC.shape[1]
    weight_WC = weight_CW.mT.contiguous()  # else every step to the next channel is one of W
    terms = (padded_BTC[:, i : i + tokens] * weight_WC[i] for i in range(len(weight_WC)))
    # Under autocast the sum is wider than the stream; what follows goes on in the stream's dtype.
    return reduce(torch.add, terms).to(x_BTC.dtype)
