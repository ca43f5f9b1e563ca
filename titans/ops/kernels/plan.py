"""Where the tokens, chunks and documents of a call lie: one description for dense batches and packed
documents.

A cell is one chunk of one row (a sequence of the batch, or a packed document). Cells are numbered step by
step
in a dense batch (all rows advance together) and row by row in packed documents. Kernels work on groups of
consecutive cells, which bounds the memory that a pass needs. Nothing here waits for the device: sizes follow
from shapes alone, so some cells may turn out to be empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """table `[5, rows]` int64: first token, end, first slot of chunk 0 (before the first token where the row
    starts inside a chunk), first cell, chunks. cell_row `[cells]` int32. stride: cells from one chunk of a
    row to the next."""

    table: Tensor
    cell_row: Tensor
    rows: int
    cells: int
    stride: int
    chunk_size: int
    one_chunk: Tensor  # [rows], rows whose tokens all lie in the chunk that they start in
    closes: Tensor  # [rows], rows whose last token closes a chunk

    def groups(self, cells_at_once: int) -> list[tuple[int, int]]:
        """`[start, end)` of consecutive groups of cells, whole steps of a dense batch."""
        size = max(1, cells_at_once // self.stride) * self.stride
        return [(start, min(start + size, self.cells)) for start in range(0, self.cells, size)]


def make_plan(batch: int, tokens: int, chunk_size: int, position: Tensor, cu_seqlens: Tensor | None) -> Plan:
    device, rows = position.device, position.shape[0]
    position = position.long()
    if cu_seqlens is None:
        begin = torch.arange(0, batch * tokens, tokens, device=device)
        lengths = torch.full_like(begin, tokens)
        count = (position + tokens + chunk_size - 1) // chunk_size
        base = torch.arange(rows, device=device)
        # A row that starts inside a chunk may touch one more; the host does not know.
        cells = rows * ((tokens + 2 * chunk_size - 2) // chunk_size)
        cell_row = torch.arange(cells, device=device, dtype=torch.int32) % rows
        stride = rows
    else:
        begin = cu_seqlens[:-1].long()
        lengths = cu_seqlens.diff().long()
        count = torch.where(lengths > 0, (position + lengths + chunk_size - 1) // chunk_size, 0)
        ends = count.cumsum(0)
        base = ends - count
        cells = (tokens + 2 * rows * (chunk_size - 1)) // chunk_size
        cell_row = torch.searchsorted(ends, torch.arange(cells, device=device), right=True)
        cell_row = cell_row.clamp_max(rows - 1).to(torch.int32)
        stride = 1
    table = torch.stack([begin, begin + lengths, begin - position, base, count])
    closes = ((position + lengths) % chunk_size == 0) & (lengths > 0)
    return Plan(table, cell_row, rows, cells, stride, chunk_size, count <= 1, closes)
