"""What sliding attention carries from one piece of a sequence to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Prefix(NamedTuple):
    """Keys and values of the persistent tokens, `[H, N, D]`, the same for every row."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class AttentionState:
    """Unrotated keys and values of the last tokens, `[B, H, P, D]`, right-aligned.

    counts: valid columns of each row, on the host; one number when all rows have P of them.
    """

    keys: Tensor
    values: Tensor
    prefix: Prefix | None
    counts: int | tuple[int, ...]

    @property
    def device(self) -> torch.device:
        return self.keys.device

    @property
    def batch(self) -> int:
        return self.keys.shape[0]

    @property
    def row_counts(self) -> tuple[int, ...]:
        """Valid columns of each row, also where all have as many."""
        return (self.counts,) * self.batch if isinstance(self.counts, int) else self.counts

    def select(self, rows: Tensor) -> AttentionState:
        counts = self.counts
        if not isinstance(counts, int):
            counts = tuple(counts[row] for row in rows.tolist())
        return AttentionState(
            self.keys.index_select(0, rows), self.values.index_select(0, rows), self.prefix, counts
        )

    def detach(self) -> AttentionState:
        prefix = None if self.prefix is None else Prefix(*(part.detach() for part in self.prefix))
        return AttentionState(self.keys.detach(), self.values.detach(), prefix, self.counts)


def one_if_equal(counts: int | tuple[int, ...]) -> int | tuple[int, ...]:
    """One number when all rows agree: then no column is masked and the masks can be left out."""
    return counts[0] if isinstance(counts, tuple) and len(set(counts)) == 1 else counts
