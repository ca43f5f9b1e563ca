"""Where every token lies on the chunk grid.

Rows (batch rows, or packed documents) are cut into chunks that start where the row's own grid says: a row
whose state is at `position` p begins p slots into its first chunk. Step j processes the j-th chunk of every
row that still has one; rows are sorted by their number of chunks, so these rows are a prefix and a long
document among short ones wastes nothing. One (step, row) pair is a cell; cells are ordered by step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from titans.ops.validation import check_bounds


@dataclass(frozen=True)
class ChunkGrid:
    """chunk_size: C. active: rows alive at each step. order: sorted row -> original row, None = the same.

    tokens: `[cells, C]` index into the flattened `[B * T]` tokens, 0 in padded slots.
    real: `[cells, C]`, False in padded slots; None when no slot is padded.
    last_step: `[rows]`, the step that holds the last token of each sorted row (-1: the row is empty).
    uniform: every row lives for all steps though its last token may lie one step earlier (the row's
        length on the grid is not known on the host).
    """

    chunk_size: int
    rows: int
    num_tokens: int
    active: list[int]
    order: Tensor | None
    tokens: Tensor
    real: Tensor | None
    last_step: Tensor
    uniform: bool

    @property
    def steps(self) -> int:
        return len(self.active)

    @cached_property
    def first_cell(self) -> list[int]:
        """The first cell of every step, and the number of cells at the end."""
        return [0, *accumulate(self.active)]

    def sort(self, rows: Tensor) -> Tensor:
        return rows if self.order is None else rows.index_select(0, self.order)

    def unsort(self, rows: Tensor) -> Tensor:
        if self.order is None:
            return rows
        return torch.empty_like(rows).index_copy_(0, self.order, rows)

    def ending(self, step: int) -> slice | Tensor | None:
        """Sorted rows whose last token lies in `step`: a slice, or a mask where the host does not know."""
        if self.uniform:
            return None if step < self.steps - 2 else self.last_step == step
        following = self.active[step + 1] if step + 1 < self.steps else 0
        return slice(following, self.active[step]) if following < self.active[step] else None

    def _slots(self, first_cell: int, cells: int, heads: int, padded_slot: int) -> Tensor:
        """`[cells * H * C]` index into `[B * T * H]`."""
        chosen = slice(first_cell, first_cell + cells)
        tokens = self.tokens[chosen]
        if self.real is not None and padded_slot:
            tokens = tokens.masked_fill(~self.real[chosen], padded_slot)
        head = torch.arange(heads, device=tokens.device)
        return (tokens[:, None, :] * heads + head[None, :, None]).reshape(-1)

    def gather(self, x: Tensor, first_cell: int, cells: int) -> Tensor:
        """`[B, T, H, D]` -> `[cells * H, C, D]`; padded slots repeat token 0."""
        heads, width = x.shape[2:]
        slots = self._slots(first_cell, cells, heads, 0)
        return x.reshape(-1, width).index_select(0, slots).view(cells * heads, self.chunk_size, width)

    def gather_zeroed(self, x: Tensor, first_cell: int, cells: int) -> Tensor:
        """The same with zeros in padded slots."""
        gathered = self.gather(x, first_cell, cells)
        if self.real is None:
            return gathered
        padded = ~self.mask(first_cell, cells, x.shape[2])
        return gathered.masked_fill_(padded[:, :, None], 0)

    def mask(self, first_cell: int, cells: int, heads: int) -> Tensor:
        """`real` of some cells for every head: `[cells * H, C]`."""
        assert self.real is not None
        return self.real[first_cell : first_cell + cells].repeat_interleave(heads, 0)

    def canvas(self, like: Tensor) -> Tensor:
        """Where chunks are scattered to: `[(B * T + 1) * H, D]`; the extra row takes the padded slots."""
        heads, width = like.shape[2:]
        return like.new_empty(((self.num_tokens + 1) * heads, width))

    def scatter(self, canvas: Tensor, values: Tensor, first_cell: int, cells: int) -> None:
        heads = values.shape[0] // cells
        slots = self._slots(first_cell, cells, heads, self.num_tokens)
        canvas.index_copy_(0, slots, values.reshape(-1, canvas.shape[-1]))

    def finish(self, canvas: Tensor, like: Tensor) -> Tensor:
        return canvas[: self.num_tokens * like.shape[2]].view(like.shape)


def count_chunks(num_tokens: int, chunk_size: int) -> int:
    """Chunks that a row of `num_tokens` touches at most, wherever its grid starts."""
    return (num_tokens + 2 * chunk_size - 2) // chunk_size


def make_grid(
    batch: int, num_tokens: int, chunk_size: int, position: Tensor, cu_seqlens: Tensor | None
) -> ChunkGrid:
    """The grid of a dense `[B, T]` batch, or of packed documents.

    A dense batch on an accelerator is planned without reading `position` (no device sync), at the price of
    one chunk that may stay empty. Packed documents need their lengths on the host: one sync.
    """
    if cu_seqlens is None and position.device.type != "cpu":
        return _uniform_grid(batch, num_tokens, chunk_size, position)
    if cu_seqlens is None:
        starts = torch.arange(batch) * num_tokens
        lengths = torch.full((batch,), num_tokens)
    else:
        bounds = cu_seqlens.to("cpu", torch.int64)
        starts, lengths = bounds[:-1], bounds.diff()
        check_bounds(bounds.tolist(), num_tokens)
    offsets = position.to("cpu", torch.int64)
    chunks = torch.where(lengths > 0, (offsets + lengths + chunk_size - 1) // chunk_size, 0)
    order = None
    if bool((chunks[1:] > chunks[:-1]).any()):
        order = torch.argsort(chunks, descending=True, stable=True)
        chunks, starts, lengths, offsets = chunks[order], starts[order], lengths[order], offsets[order]
    alive = chunks[None, :] > torch.arange(int(chunks.max()))[:, None]  # [steps, rows]
    step, row = alive.nonzero(as_tuple=True)  # in the order of cells: by step, then row
    slot = (step * chunk_size - offsets[row])[:, None] + torch.arange(chunk_size)
    real = (slot >= 0) & (slot < lengths[row, None])
    tokens = (starts[row, None] + slot).masked_fill(~real, 0)
    device = position.device
    return ChunkGrid(
        chunk_size=chunk_size,
        rows=position.shape[0],
        num_tokens=batch * num_tokens,
        active=alive.sum(1).tolist(),
        order=None if order is None else order.to(device),
        tokens=tokens.to(device),
        real=None if bool(real.all()) else real.to(device),
        last_step=(chunks - 1).to(device),
        uniform=False,
    )


def _uniform_grid(batch: int, num_tokens: int, chunk_size: int, position: Tensor) -> ChunkGrid:
    device = position.device
    steps = count_chunks(num_tokens, chunk_size)
    offset = position.to(torch.int64)
    step = torch.arange(steps, device=device)[:, None, None]
    slot = step * chunk_size - offset[None, :, None] + torch.arange(chunk_size, device=device)
    real = (slot >= 0) & (slot < num_tokens)
    tokens = slot + torch.arange(batch, device=device)[None, :, None] * num_tokens
    return ChunkGrid(
        chunk_size=chunk_size,
        rows=batch,
        num_tokens=batch * num_tokens,
        active=[batch] * steps,
        order=None,
        tokens=tokens.masked_fill(~real, 0).reshape(steps * batch, chunk_size),
        real=real.reshape(steps * batch, chunk_size),
        last_step=(offset + num_tokens - 1) // chunk_size,
        uniform=True,
    )
