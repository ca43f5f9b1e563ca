"""Attention inside a segment, over the tokens and what the memory recalled for each (MAC, paper sec. 4.1).

Row i sees the persistent prefix and, for every j <= i of its segment, the token x_j and the context token
h_j. Both stand at position j: they get the same angle.

Shape suffixes: B rows, H heads, T new tokens, S tokens of the segment so far, D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from titans.nn.attention import Attention
from titans.nn.attention_ring import Ring
from titans.nn.attention_state import Prefix, one_if_equal
from titans.nn.rows import Rows


@dataclass(frozen=True)
class Segment:
    """The tokens of the current segment so far, each row's at columns 0 .. offset - 1.

    entries: `[B, S, 4, H, D]`: key and value of x, key and value of h, unrotated.
    offsets: columns in use per row, on the host; one number when all rows have S of them.
    """

    entries: Tensor
    offsets: int | tuple[int, ...]

    def select(self, rows: Tensor) -> Segment:
        offsets = self.offsets
        if not isinstance(offsets, int):
            offsets = tuple(offsets[row] for row in rows.tolist())
        return Segment(self.entries.index_select(0, rows), offsets)

    def detach(self) -> Segment:
        return Segment(self.entries.detach(), self.offsets)

    def append(self, new: Tensor, rows: Rows | None) -> Segment:
        """New entries `[B, T, 4, H, D]`, or packed with `rows`, behind those of each row."""
        if rows is None:
            assert isinstance(self.offsets, int)
            both = torch.cat([self.entries.to(new.dtype), new], dim=1)
            return Segment(both, self.offsets + new.shape[1])
        batch, columns = self.entries.shape[:2]
        before = self.offsets_of(batch)
        after = tuple(offset + length for offset, length in zip(before, rows.lengths, strict=True))
        width = max(after)
        wider = F.pad(self.entries.to(new.dtype), (0, 0, 0, 0, 0, 0, 0, max(width - columns, 0)))[:, :width]
        places = [row * width + column for row in range(batch) for column in range(before[row], after[row])]
        index = torch.tensor(places, dtype=torch.long, device=new.device)
        flat = wider.flatten(0, 1).index_copy(0, index, new[0])
        return Segment(flat.unflatten(0, (batch, width)), after)

    def close(self, size: int) -> Segment:
        """Rows whose segment is complete start over."""
        if isinstance(self.offsets, int):
            return Segment(self.entries[:, :0], 0) if self.offsets == size else self
        offsets = tuple(0 if offset == size else offset for offset in self.offsets)
        width = max(offsets)
        return Segment(self.entries[:, :width], one_if_equal(offsets))

    def offsets_of(self, batch: int) -> tuple[int, ...]:
        return (self.offsets,) * batch if isinstance(self.offsets, int) else self.offsets


@dataclass(frozen=True)
class SegmentRing:
    """A `Segment` as a ring, for steps in place (`attention_ring.py`); a token takes the columns of h and x.

    offsets: int64 `[B]` on the device: no step waits for the host, and a CUDA graph's replay moves them on.
    A row whose segment is complete starts over at 0; its columns are overwritten when their turn comes.
    """

    ring: Ring
    offsets: Tensor

    @classmethod
    def of(cls, segment: Segment, prefix: Prefix | None, size: int, theta: float) -> SegmentRing:
        """A copy; gradients end here."""
        segment = segment.detach()
        batch, width = segment.entries.shape[:2]
        offsets = torch.tensor(segment.offsets_of(batch), device=segment.entries.device)
        # The ring has every row's next token in one column: shorter rows move to the right.
        columns = torch.arange(width, device=offsets.device) - (width - offsets[:, None])
        k_x, v_x, k_h, v_h = _columns(segment.entries, columns.clamp(min=0)).permute(2, 0, 3, 1, 4)
        if prefix is not None:
            prefix = Prefix(*(part.detach() for part in prefix))
        ring = Ring.of(torch.stack([k_h, k_x], 2), torch.stack([v_h, v_x], 2), prefix, size, theta)
        return cls(ring, offsets)

    def step(self, q: Tensor, entries: Tensor, theta: float) -> tuple[Tensor, SegmentRing]:
        """q `[B, 1, H, D]`, entries `[B, 1, 4, H, D]`: what q sees, `[B, H, 1, D]`, and the ring after it."""
        k_x, v_x, k_h, v_h = entries[:, 0].unbind(1)
        k, v = torch.stack([k_h, k_x], dim=2), torch.stack([v_h, v_x], dim=2)
        output, ring = self.ring.step(q.transpose(1, 2), k, v, theta, self.offsets)
        return output, SegmentRing(ring, self.offsets + 1)

    def close(self, size: int) -> SegmentRing:
        """Rows whose segment is complete start over."""
        return SegmentRing(self.ring, self.offsets % size)

    def unrolled(self) -> Segment:
        """A copy in the order of the tokens. Waits for the device."""
        offsets = tuple(self.offsets.tolist())
        width = max(offsets)
        keys, values = self.ring.last(width)  # `[B, H, L, S, D]`, right-aligned
        (k_h, k_x), (v_h, v_x) = keys.unbind(2), values.unbind(2)
        entries = torch.stack([k_x, v_x, k_h, v_h], dim=1).permute(0, 3, 1, 2, 4)
        columns = torch.arange(width, device=entries.device) + (width - self.offsets[:, None])
        return Segment(_columns(entries, columns.clamp(max=width - 1)), one_if_equal(offsets))

    def select(self, rows: Tensor) -> Segment:
        return SegmentRing(self.ring.select(rows), self.offsets.index_select(0, rows)).unrolled()

    def detach(self) -> Segment:
        """Not the ring itself, which one owner has."""
        return self.unrolled()


def _columns(entries: Tensor, columns_BS: Tensor) -> Tensor:
    """entries `[B, S, 4, H, D]` at these columns of each row."""
    return entries.gather(1, columns_BS[:, :, None, None, None].expand(-1, -1, *entries.shape[2:]))


class ContextAttention(Attention):
    """Causal attention over `[prefix, h, x]` of one segment; only tokens x ask."""

    def initial_segment(self, batch: int) -> Segment:
        weight = self.k_proj.weight
        return Segment(weight.new_empty(batch, 0, 4, self.heads, self.head_dim), 0)

    def queries(self, x: Tensor) -> Tensor:
        """`[B, T, C]` -> `[B, T, H, D]`."""
        return self._heads_last(self.q_proj(x))

    def entries(self, x: Tensor) -> Tensor:
        """Keys and values of tokens: `[B, T, C]` -> `[B, T, 2, H, D]`."""
        return torch.stack([self._heads_last(self.k_proj(x)), self._heads_last(self.v_proj(x))], dim=2)

    def _heads_last(self, x_BTC: Tensor) -> Tensor:
        return x_BTC.unflatten(-1, (self.heads, self.head_dim))

    def step(self, q: Tensor, entries: Tensor, segment: SegmentRing) -> tuple[Tensor, SegmentRing]:
        """`append` and `attend` for one token a row, in place: `[B, 1, C]`."""
        output, segment = segment.step(q, entries, self.rope_theta)
        return self.o_proj(self.merge(output)), segment

    def attend(self, q: Tensor, segment: Segment, prefix: Prefix | None, rows: Rows | None) -> Tensor:
        """q `[B, T, H, D]` (or packed), the last tokens of `segment`; returns `[B, T, C]` (or packed)."""
        if rows is not None:
            q = rows.pad(q)
        q_BHTD = q.transpose(1, 2)
        width, tokens = segment.entries.shape[1], q_BHTD.shape[2]
        columns = torch.arange(width, device=q.device)
        if rows is None:
            rotary = self.rotary(width, q)
            q_rotated = rotary.rotate(q_BHTD, width - tokens)
            mask = columns <= columns[width - tokens :, None]
        else:
            rotary = self.rotary(width + tokens, q)  # the padding of q may stand past the last column
            ends = segment.offsets_of(len(rows))
            starts = [end - length for end, length in zip(ends, rows.lengths, strict=True)]
            positions_BT = torch.tensor(starts, device=q.device)[:, None] + torch.arange(
                tokens, device=q.device
            )
            q_rotated = rotary.rotate_at(q_BHTD, positions_BT)
            mask = (columns <= positions_BT[:, :, None])[:, None]
        k_x, v_x, k_h, v_h = segment.entries.transpose(1, 3).unbind(2)
        output = self.scores(
            q_BHTD,
            q_rotated,
            torch.cat([rotary.rotate(k_h), rotary.rotate(k_x)], dim=2),
            torch.cat([v_h, v_x], dim=2),
            prefix,
            torch.cat([mask, mask], dim=-1),
        )
        merged = self.o_proj(self.merge(output))
        return merged if rows is None else rows.pack(merged)
