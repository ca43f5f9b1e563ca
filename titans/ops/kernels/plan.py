"""Where tokens, chunks and documents of a call lie: one description for dense batches and packed documents.

A cell is one chunk of one row (a sequence of the batch, or a packed document). Cells are numbered step by
step in a dense batch (all rows advance together) and row by row in packed documents. Kernels work on groups
of consecutive cells, which bounds the memory that a pass needs. Nothing here waits for the device: sizes
follow from shapes alone, so some cells may turn out to be empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """What shapes alone decide. stride: cells from one chunk of a row to the next."""

    rows: int
    cells: int
    stride: int

    @classmethod
    def of(cls, batch: int, tokens: int, chunk_size: int, rows: int, packed: bool) -> Sizes:
        if packed:
            return cls(rows, (tokens + 2 * rows * (chunk_size - 1)) // chunk_size, 1)
        # A row that starts inside a chunk may touch one more; the host does not know.
        return cls(rows, rows * ((tokens + 2 * chunk_size - 2) // chunk_size), rows)

    def groups(self, cells_at_once: int) -> list[tuple[int, int]]:
        """`[start, end)` of consecutive groups of cells, whole steps of a dense batch."""
        size = max(1, cells_at_once // self.stride) * self.stride
        return [(start, min(start + size, self.cells)) for start in range(0, self.cells, size)]


@dataclass(frozen=True)
class Plan:
    """table `[5, rows]` int64: first token, end, first slot of chunk 0 (before the first token where the row
    starts inside a chunk), first cell, chunks. cell_row `[cells]` int32."""

    table: Tensor
    cell_row: Tensor
    sizes: Sizes

    @property
    def rows(self) -> int:
        return self.sizes.rows

    @property
    def stride(self) -> int:
        return self.sizes.stride


def make_plan(batch: int, tokens: int, chunk_size: int, position: Tensor, cu_seqlens: Tensor | None) -> Plan:
    rows = position.shape[0]
    sizes = Sizes.of(batch, tokens, chunk_size, rows, cu_seqlens is not None)
    if cu_seqlens is None:
        capturing = position.is_cuda and torch.cuda.is_current_stream_capturing()
        # What a graph records is not computed until it runs: nothing that others may find.
        parts = _dense_parts.__wrapped__ if capturing else _dense_parts
        table, cell_row = parts(sizes, tokens, position.device)
        table = table.clone()
        table[2] -= position
        table[4] = (position + (tokens + chunk_size - 1)) // chunk_size
        return Plan(table, cell_row, sizes)
    begin, position = cu_seqlens[:-1].long(), position.long()
    lengths = cu_seqlens.diff().long()
    count = torch.where(lengths > 0, (position + lengths + chunk_size - 1) // chunk_size, 0)
    ends = count.cumsum(0)
    cell_row = torch.searchsorted(ends, torch.arange(sizes.cells, device=position.device), right=True)
    table = torch.stack([begin, begin + lengths, begin - position, ends - count, count])
    return Plan(table, cell_row.clamp_max(rows - 1).to(torch.int32), sizes)


@lru_cache(maxsize=32)
def _dense_parts(sizes: Sizes, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The table of rows at the start of a chunk, and cell_row: few shapes come again and again."""
    row = torch.arange(sizes.rows, device=device)
    begin = row * tokens
    table = torch.stack([begin, begin + tokens, begin, row, row])
    return table, (torch.arange(sizes.cells, device=device) % sizes.rows).to(torch.int32)
