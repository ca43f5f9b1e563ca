"""Rows of different lengths as one packed stream, with all counts on the host."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class TailOrder(NamedTuple):
    """A stream in which every row stands behind a few tokens of its own past, its tail.

    stream: for every token of it, its place in all tails followed by all rows.
    tokens: where the rows' tokens lie in `stream` less its first tail; ends: where the new tails lie in it.
    """

    stream: Tensor
    tokens: Tensor
    ends: Tensor


class Rows:
    """Where the tokens of each row lie in a packed stream `[1, total, ...]`.

    Rows are the sequences of a padded batch or packed documents; a row may be empty. Lengths are host
    integers, so nothing here waits for the device. `None` in place of a `Rows` means the dense case:
    `[B, T, ...]`, every row full.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = tuple(lengths)
        self.device = device
        self.total = sum(self.lengths)
        self.longest = max(self.lengths)
        self._tail_orders: dict[int, TailOrder] = {}

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Offset of each row in the stream."""
        starts, offset = [], 0
        for length in self.lengths:
            starts.append(offset)
            offset += length
        return tuple(starts)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """int32 `[B + 1]`, as the memory op wants it."""
        return torch.tensor([*self.starts, self.total], dtype=torch.int32, device=self.device)

    @cached_property
    def _padded_positions(self) -> Tensor:
        """For every token of the stream, its place in the flattened `[B * longest]`."""
        places = [
            row * self.longest + token for row, length in enumerate(self.lengths) for token in range(length)
        ]
        return self._indices(places)

    def after_tails(self, lead: int) -> TailOrder:
        """Indices (int64, on the device) for tails of `lead` tokens; worked out once for all that ask."""
        if lead not in self._tail_orders:
            stream: list[int] = []
            tokens: list[int] = []
            ends: list[int] = []
            offset, tails = 0, len(self) * lead
            for row, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
                stream += range(row * lead, (row + 1) * lead)
                stream += range(tails + start, tails + start + length)
                tokens += range(offset, offset + length)
                ends += range(offset + length, offset + length + lead)
                offset += lead + length
            self._tail_orders[lead] = TailOrder(*map(self._indices, (stream, tokens, ends)))
        return self._tail_orders[lead]

    def _indices(self, places: Sequence[int]) -> Tensor:
        return torch.tensor(places, dtype=torch.long, device=self.device)

    def pad(self, stream: Tensor) -> Tensor:
        """`[1, total, ...]` -> `[B, longest, ...]`, right-padded with zeros."""
        shape = stream.shape[2:]
        padded = stream.new_zeros(len(self) * self.longest, *shape)
        return padded.index_copy(0, self._padded_positions, stream[0]).view(len(self), self.longest, *shape)

    def pack(self, padded: Tensor) -> Tensor:
        """`[B, longest, ...]` -> `[1, total, ...]`, dropping the padding."""
        return padded.flatten(0, 1).index_select(0, self._padded_positions)[None]
