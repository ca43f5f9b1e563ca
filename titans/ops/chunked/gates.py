"""What decay and momentum do inside one chunk, as matrices.

With a_t = exp(log_decay_t), eta_t = exp(log_momentum_t), inside a chunk (t, s, i = 1..C; index 0 = its start):

    B[t, s] = a_{s+1} ... a_t       H[s, i] = eta_{i+1} ... eta_s        (1 on the diagonal, 0 above)
    A = B H                         M_t = B[t, 0] M_0 + A[t, 0] S_0 - sum_i A[t, i] theta_i G_i
                                    S_t = H[t, 0] S_0               - sum_i H[t, i] theta_i G_i

All products are sums of logs over a segment, taken before exp: nothing overflows, a gate of exactly zero
(log = -inf) is legal, and no difference of large sums is ever formed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def segment_products(log_gate: Tensor) -> Tensor:
    """`[..., C]` logs -> `[..., C, C + 1]`: entry (t, s) is the product of the gates s + 1 .. t (counted from 1)."""
    size = log_gate.shape[-1]
    start = torch.arange(size + 1, device=log_gate.device)[:, None]
    token = torch.arange(size, device=log_gate.device)
    # Built transposed, so that the running sum walks along memory.
    logs = log_gate.unsqueeze(-2).expand(*log_gate.shape[:-1], size + 1, size)
    sums = logs.masked_fill(token < start, 0).cumsum(-1)
    return sums.masked_fill_(token < start - 1, -torch.inf).exp_().mT


def segment_products_backward(grad: Tensor, products: Tensor) -> Tensor:
    """Gradient with respect to `log_gate`; exactly zero where the log is -inf."""
    size = products.shape[-2]
    start = torch.arange(size + 1, device=grad.device)[:, None]
    token = torch.arange(size, device=grad.device)
    weighted = (grad * products).mT  # [..., C + 1 (start), C (token)]
    later = weighted @ torch.ones(size, size, dtype=grad.dtype, device=grad.device).tril()
    return later.masked_fill_(token < start, 0).sum(-2)


@dataclass
class GateMatrices:
    """B, H and A of some chunks (N = cells x heads) for one memory layer.

    decay: `[N, C, C + 1]`, or `[N, D_out, C, C + 1]` for a decay per output channel.
    momentum: `[N, C, C + 1]`, None without momentum. mix: A, shaped like decay.
    """

    decay: Tensor
    momentum: Tensor | None
    mix: Tensor
    channelwise: bool

    @classmethod
    def build(
        cls, log_decay: Tensor, log_momentum: Tensor | None, real: Tensor | None, channelwise: bool
    ) -> GateMatrices:
        """log_decay: `[N, C]` or `[N, C, D_out]`; log_momentum: `[N, C]`; real: `[N, C]`, False where a slot
        is padded: there M keeps its value (no decay, and S is not added a second time)."""
        decay = segment_products(log_decay.mT if channelwise else log_decay)
        momentum = None if log_momentum is None else segment_products(log_momentum)
        return cls(decay, momentum, _compose(decay, momentum, real), channelwise)

    def __getitem__(self, cells: slice) -> GateMatrices:
        momentum = None if self.momentum is None else self.momentum[cells]
        return GateMatrices(self.decay[cells], momentum, self.mix[cells], self.channelwise)

    def column(self, matrix: Tensor) -> Tensor:
        """Entry (t, 0) of a matrix: what the chunk's start contributes at t, `[N, C, 1]` or `[N, C, D_out]`."""
        return matrix[..., 0].mT if self.channelwise else matrix[..., :1]

    def last_row(self, matrix: Tensor) -> Tensor:
        """Entry (C, i), i >= 1: what token i contributes to the chunk's end, same shapes."""
        return matrix[..., -1, 1:].mT if self.channelwise else matrix[..., -1, 1:, None]

    @property
    def start_weights(self) -> Tensor:
        return self.column(self.decay)

    @property
    def start_momentum(self) -> Tensor:
        return self.column(self.mix)

    @property
    def write_weights(self) -> Tensor:
        return self.last_row(self.mix)

    @property
    def write_momentum(self) -> Tensor:
        assert self.momentum is not None
        return self.momentum[:, -1, 1:, None]

    @property
    def keep_momentum(self) -> Tensor:
        """`[N, 1, 1]`: how much of the momentum at the chunk's start is left at its end."""
        assert self.momentum is not None
        return self.momentum[:, -1:, :1]


class GateGradients:
    """Sums of gradients with respect to the three matrices of a `GateMatrices`, filled piece by piece."""

    def __init__(self, gates: GateMatrices) -> None:
        self.gates = gates
        self.mix = torch.zeros_like(gates.mix, memory_format=torch.contiguous_format)
        self.decay_start = torch.zeros_like(gates.decay[..., 0])  # only B[., 0] is used outside A
        self.momentum_end = None if gates.momentum is None else torch.zeros_like(gates.momentum[:, -1])

    def to_logs(self, real: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Gradients of log_decay (`[N, C]` or `[N, C, D_out]`) and log_momentum (`[N, C]`)."""
        gates = self.gates
        grad_decay = torch.empty_like(self.mix)
        grad_momentum = None
        if gates.momentum is None:
            grad_decay[..., 1:] = self.mix[..., 1:]
        else:
            momentum = gates.momentum.unsqueeze(1) if gates.channelwise else gates.momentum
            torch.matmul(self.mix, momentum.mT, out=grad_decay[..., 1:])
            grad_momentum = _drop_padded(gates.decay[..., 1:], real).mT @ self.mix
            if gates.channelwise:
                grad_momentum = grad_momentum.sum(1)
            assert self.momentum_end is not None
            grad_momentum[:, -1] += self.momentum_end
            grad_momentum = segment_products_backward(grad_momentum, gates.momentum)
        if real is not None:
            grad_decay[..., 1:] = _drop_padded(grad_decay[..., 1:], real)
        grad_decay[..., 0] = self.decay_start
        grad_log_decay = segment_products_backward(grad_decay, gates.decay)
        return (grad_log_decay.mT if gates.channelwise else grad_log_decay), grad_momentum


def _drop_padded(matrix: Tensor, real: Tensor | None) -> Tensor:
    """Zero the columns of padded slots."""
    if real is None:
        return matrix
    columns = ~real[:, None, :] if matrix.dim() == 3 else ~real[:, None, None, :]
    return matrix.masked_fill(columns, 0)


def _compose(decay: Tensor, momentum: Tensor | None, real: Tensor | None) -> Tensor:
    """A = B H, with column 0 for the chunk's start."""
    kept = _drop_padded(decay[..., 1:], real)
    if momentum is None:  # H is the identity, and no momentum enters from before the chunk
        return torch.cat([torch.zeros_like(kept[..., :1]), kept], dim=-1)
    return kept @ (momentum.unsqueeze(1) if decay.dim() == 4 else momentum)
