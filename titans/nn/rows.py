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

    @cached_property
    def first_places(self) -> Tensor:
        """Where each row's first token lies; an empty row is given that of another."""
        return self._indices([min(start, self.total - 1) for start in self.starts])

    @cached_property
    def next_places(self) -> Tensor:
        """For every token of the stream, where the next one of its row lies; for the last, where it does."""
        ends = [start + length for start, length in zip(self.starts, self.lengths, strict=True)]
        places = zip(self.starts, ends, strict=True)
        return self._indices([min(at + 1, end - 1) for start, end in places for at in range(start, end)])

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


def first_tokens(x: Tensor, rows: Rows | None) -> Tensor:
    """x `[B, T, ...]`, or packed with `rows`, at the first token of every row: `[B, 1, ...]`.

    What stands there for an empty row is another's.
    """
    return x[:, :1] if rows is None else x[0].index_select(0, rows.first_places)[:, None]


def moved_back(x: Tensor, rows: Rows | None) -> Tensor:
    """x with every token in the place of the one before it; a row's last one stays in its own, too."""
    if rows is None:
        return torch.cat([x[:, 1:], x[:, -1:]], dim=1)
    return x.index_select(1, rows.next_places)


def moved_on(x: Tensor, first: Tensor, rows: Rows | None) -> Tensor:
    """x with every token in the place of the one after it, `first` `[B, 1, ...]` in that of the first.

    The last token of every row is lost.
    """
    if rows is None:
        return torch.cat([first, x[:, :-1]], dim=1)
    order = rows.after_tails(1)
    # Tokens are counted from behind the first tail, which is there: each place is that of what comes before.
    places = order.stream.index_select(0, order.tokens)
    return torch.cat([first.flatten(0, 1), x[0]]).index_select(0, places)[None]
