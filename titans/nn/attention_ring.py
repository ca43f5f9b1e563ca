"""Keys and values in a ring: a decoding step writes one column of it and copies no other.

A ring is the form of a state for steps of one token a row. It belongs to who made it: handing it to a layer
is asking for a step in place. The column that is overwritten is one that no row sees any more, so the ring
before the step still says what it said, also where a step breaks off. Two different steps from one ring,
however, would overwrite each other: whoever branches takes copies (`detach`, `select`).

Shape suffixes: B rows, H heads, L columns that a token takes, W tokens, N prefix tokens, D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from titans.nn.attention_state import AttentionState, Prefix, one_if_equal
from titans.nn.rope import RotaryTable


@dataclass(frozen=True)
class Ring:
    """The last W tokens; token number p, counted from the ring's beginning, stands at p % W in all rows.

    Its number is its angle, too, so that a key is turned once. The prefix, which has no distance, is turned
    along with each query: then all columns go into one product, without a mask where a row sees them all.

    keys: as they came, `[B, H, L x W, D]`: turning back would round them. rotated, values: `[B, H, N + L x W,
    D]`. position: int64 `[1]`, the next token's number, on the device: a CUDA graph's replay moves it on.
    """

    keys: Tensor
    rotated: Tensor
    values: Tensor
    position: Tensor
    prefix: Prefix | None
    size: int

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, prefix: Prefix | None, size: int, theta: float) -> Ring:
        """Tokens 0 .. P - 1 are those given, `[B, H, L, P, D]`, P < W; nothing of them is shared."""
        batch, heads, lanes, past, width = keys.shape
        assert past < size, f"a ring of {size} has no room behind {past} tokens"
        fixed = 0 if prefix is None else prefix.keys.shape[1]

        def columns(tokens: Tensor, before: int) -> Tensor:
            # Zeros where nothing stands yet: those columns are masked, but NaN would come through a mask.
            ring = tokens.new_zeros(batch, heads, before + lanes * size, width)
            ring[:, :, before:].unflatten(2, (lanes, size))[..., :past, :] = tokens
            return ring

        rotated = columns(RotaryTable(past, width, theta, keys).rotate(keys), fixed)
        with_prefix = columns(values, fixed)
        if prefix is not None:
            with_prefix[:, :, :fixed] = prefix.values
        position = torch.full((1,), past, dtype=torch.int64, device=keys.device)
        return cls(columns(keys, 0), rotated, with_prefix, position, prefix, size)

    @property
    def fixed(self) -> int:
        """N, columns of the prefix."""
        return self.rotated.shape[2] - self.keys.shape[2]

    def takes(self, new: Tensor) -> bool:
        """Whether keys like these can be written here: no gradients, and no other dtype (autocast)."""
        return not torch.is_grad_enabled() and new.dtype == self.keys.dtype

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, theta: float, counts: Tensor | None
    ) -> tuple[Tensor, Ring]:
        """Write a token a row, k and v `[B, H, L, D]`; then q `[B, H, 1, D]` looks at what its row sees.

        counts: tokens before this one that each row sees, `[B]`; None: all W - 1.
        """
        lanes, fixed, size = k.shape[2], self.fixed, self.size
        now = RotaryTable(self.position, q.shape[-1], theta, q)
        slots = self.position % size + size * torch.arange(lanes, device=q.device)
        self.keys.index_copy_(2, slots, k)
        self.rotated.index_copy_(2, fixed + slots, now.rotate_all(k))
        self.values.index_copy_(2, fixed + slots, v)
        if self.prefix is not None:
            self.rotated[:, :, :fixed] = now.rotate_all(self.prefix.keys.to(k.dtype))
        mask = None
        if counts is not None:
            age = (self.position - torch.arange(size, device=q.device)) % size
            seen = (age <= counts[:, None]).repeat(1, lanes)
            mask = F.pad(seen, (fixed, 0), value=True)[:, None, None]
        output = F.scaled_dot_product_attention(
            now.rotate_all(q),
            self.rotated,
            self.values,
            attn_mask=mask,
            scale=q.shape[-1] ** -0.5,
        )
        return output, replace(self, position=self.position + 1)

    def last(self, count: int) -> tuple[Tensor, Tensor]:
        """Keys, unrotated, and values of the last `count` tokens, `[B, H, L, count, D]`: copies."""
        lanes = self.keys.shape[2] // self.size
        order = (self.position - count + torch.arange(count, device=self.keys.device)) % self.size
        lane = self.size * torch.arange(lanes, device=self.keys.device)[:, None]
        columns = (lane + order).flatten()
        return (
            self.keys.index_select(2, columns).unflatten(2, (lanes, count)),
            self.values.index_select(2, self.fixed + columns).unflatten(2, (lanes, count)),
        )

    def select(self, rows: Tensor) -> Ring:
        keys, rotated, values = (
            part.index_select(0, rows) for part in (self.keys, self.rotated, self.values)
        )
        return replace(self, keys=keys, rotated=rotated, values=values)


@dataclass(frozen=True)
class AttentionRing:
    """An `AttentionState` as a ring of `window` tokens; what is no step in place gets that state back.

    counts: W - 1 where all rows are full; else `[B]` on the device: no step waits for the host, and a CUDA
    graph's replay moves them on. That all have become full shows in the next ring, made from `unrolled`.
    """

    ring: Ring
    counts: int | Tensor

    @classmethod
    def of(cls, state: AttentionState, window: int, theta: float) -> AttentionRing:
        """A copy; gradients end here."""
        state = state.detach()
        ring = Ring.of(state.keys[:, :, None], state.values[:, :, None], state.prefix, window, theta)
        if state.counts == window - 1:
            return cls(ring, state.counts)
        return cls(ring, torch.tensor(state.row_counts, device=state.device))

    @property
    def device(self) -> torch.device:
        return self.ring.keys.device

    @property
    def batch(self) -> int:
        return self.ring.keys.shape[0]

    def step(self, q: Tensor, k: Tensor, v: Tensor, theta: float) -> tuple[Tensor, AttentionRing]:
        """A token a row, each `[B, H, 1, D]`: what q sees, and the ring after it, in the same memory."""
        if isinstance(self.counts, int):
            output, ring = self.ring.step(q, k, v, theta, None)
            return output, AttentionRing(ring, self.counts)
        output, ring = self.ring.step(q, k, v, theta, self.counts)
        return output, AttentionRing(ring, (self.counts + 1).clamp(max=self.ring.size - 1))

    def unrolled(self) -> AttentionState:
        """A copy in the order of the tokens. Waits for the device where not all rows are full."""
        counts = self.counts if isinstance(self.counts, int) else one_if_equal(tuple(self.counts.tolist()))
        keys, values = self.ring.last(counts if isinstance(counts, int) else max(counts))
        return AttentionState(keys[:, :, 0], values[:, :, 0], self.ring.prefix, counts)

    def select(self, rows: Tensor) -> AttentionState:
        counts = self.counts if isinstance(self.counts, int) else self.counts.index_select(0, rows)
        return AttentionRing(self.ring.select(rows), counts).unrolled()

    def detach(self) -> AttentionState:
        """Not the ring itself, which one owner has."""
        return self.unrolled()
