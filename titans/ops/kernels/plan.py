"""Where tokens, chunks and documents of a call lie: one description for dense batches and packed documents.

A cell is one chunk of one row (a sequence of the batch, or a packed document). Cells are numbered step by
step in a dense batch (all rows advance together) and row by row in packed documents. Kernels work on groups
of consecutive cells, which bounds the memory that a pass needs. Nothing here waits for the device: sizes
follow from shapes alone, so some cells may turn out to be empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans.ops.kernels.dispatch import run_kernel

ROWS_AT_ONCE = 32


def ceil_div(a: int, b: int) -> int:
    """`triton.cdiv` is slower on the host: it looks for constants of kernels among its arguments."""
    return -(-a // b)


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

    def groups(self, cells_at_once: int, pieces: int = 1) -> Groups:
        """As many cells as that or fewer in a group, whole steps of a dense batch, cut in as many pieces."""
        steps = max(1, min(cells_at_once, self.cells) // self.stride)
        segment = max(1, steps // pieces)
        size = steps // segment * segment * self.stride
        bounds = [(start, min(start + size, self.cells)) for start in range(0, self.cells, size)]
        return Groups(bounds, segment, self)


@dataclass(frozen=True)
class Groups:
    """bounds: `[start, end)` of consecutive groups of cells. A segment is what lies of a row in a window of
    so many steps (cells of packed documents); windows start with the group. The forward keeps the state at
    each one's start, in as many `slots` for each head at most, and the backward writes them again side by
    side."""

    bounds: list[tuple[int, int]]
    segment: int
    sizes: Sizes

    @property
    def cells(self) -> int:
        """Of the first group, which no other one exceeds."""
        return self.bounds[0][1] - self.bounds[0][0]

    def segments(self, cells: int) -> int:
        return ceil_div(cells // self.sizes.stride, self.segment)

    def slots(self, cells: int) -> int:
        """Every row that a window reaches has one there."""
        return (self.segments(cells) - 1) * self.sizes.stride + self.sizes.rows

    def of_group(self, kept: list[Tensor], group: tuple[int, int]) -> list[Tensor]:
        """Its slots: they begin with those of its first window."""
        start = self.segments(group[0]) * self.sizes.stride
        return [tensor[start : start + self.slots(group[1] - group[0])] for tensor in kept]


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


@triton.jit(do_not_specialize=["num_rows", "tokens"])
def dense_table(position, table, num_rows, tokens, C: tl.constexpr, BLOCK: tl.constexpr):
    """The plan's table of a dense batch. One launch where PyTorch takes five."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = row < num_rows
    begin = row.to(tl.int64) * tokens
    offset = tl.load(position + row, mask=real, other=0).to(tl.int64)
    tl.store(table + row, begin, mask=real)
    tl.store(table + num_rows + row, begin + tokens, mask=real)
    tl.store(table + 2 * num_rows + row, begin - offset, mask=real)
    tl.store(table + 3 * num_rows + row, row.to(tl.int64), mask=real)
    tl.store(table + 4 * num_rows + row, (offset + tokens + C - 1) // C, mask=real)


def make_plan(
    batch: int,
    tokens: int,
    chunk_size: int,
    position: Tensor,
    cu_seqlens: Tensor | None,
    table: Tensor | None = None,
) -> Plan:
    """table: that of an earlier plan of the same call; the backward has the forward's."""
    sizes = Sizes.of(batch, tokens, chunk_size, position.shape[0], cu_seqlens is not None)
    if table is None:
        made_by = _dense_table if cu_seqlens is None else partial(_packed_table, cu_seqlens)
        table = made_by(position, tokens, chunk_size)
    if cu_seqlens is not None:
        ends = table[3] + table[4]
        cell_row = torch.searchsorted(ends, torch.arange(sizes.cells, device=position.device), right=True)
        return Plan(table, cell_row.clamp_max(sizes.rows - 1).to(torch.int32), sizes)
    capturing = position.is_cuda and torch.cuda.is_current_stream_capturing()
    # What a graph records is not computed until it runs: nothing that others may find.
    rows_of_cells = _dense_rows.__wrapped__ if capturing else _dense_rows
    return Plan(table, rows_of_cells(sizes, position.device), sizes)


def _dense_table(position: Tensor, tokens: int, chunk_size: int) -> Tensor:
    rows = position.shape[0]
    table = torch.empty(5, rows, dtype=torch.int64, device=position.device)
    grid, options = (ceil_div(rows, ROWS_AT_ONCE),), {"num_warps": 1}
    position = position.contiguous()
    run_kernel(dense_table, grid, options, position, table, rows, tokens, chunk_size, ROWS_AT_ONCE)
    return table


def _packed_table(cu_seqlens: Tensor, position: Tensor, tokens: int, chunk_size: int) -> Tensor:
    begin, position = cu_seqlens[:-1].long(), position.long()
    lengths = cu_seqlens.diff().long()
    count = torch.where(lengths > 0, (position + lengths + chunk_size - 1) // chunk_size, 0)
    return torch.stack([begin, begin + lengths, begin - position, count.cumsum(0) - count, count])


@lru_cache(maxsize=32)
def _dense_rows(sizes: Sizes, device: torch.device) -> Tensor:
    """cell_row: few shapes come again and again."""
    return (torch.arange(sizes.cells, device=device) % sizes.rows).to(torch.int32)
