"""Causal attention, sliding or full, behind an always visible prefix of persistent tokens.

Nothing depends on absolute positions: the state keeps keys unrotated, angles are indices in the buffer at
hand, and scores against the prefix use neither rotation.

Shape suffixes: B rows, H heads, T tokens, P tokens kept from the past, N prefix tokens, W window,
D width of a head, C = H x D channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans.nn.attention_ring import AttentionRing
from titans.nn.attention_state import AttentionState, Prefix, one_if_equal
from titans.nn.rope import RotaryTable
from titans.nn.rows import Rows

__all__ = ["Attention", "AttentionState", "Prefix", "SlidingAttention"]

# Queries of a block on a CPU, where a hidden score costs what a visible one does: two layers of width 256,
# W = 512 took 130 us a token with 32 and with 64, 133 with 96, 140 with 128 (one core).
CPU_BLOCK = 64


class Attention(nn.Module):
    """Projections and the score product that sliding attention and MAC's segments share."""

    def __init__(self, hidden_size: int, heads: int, rope_theta: float) -> None:
        super().__init__()
        if hidden_size % (2 * heads):
            raise ValueError(
                f"hidden_size ({hidden_size}) must be an even multiple of the attention heads ({heads})"
            )
        self.heads = heads
        self.head_dim = hidden_size // heads
        self.rope_theta = rope_theta
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def prefix(self, persistent: Tensor | None) -> Prefix | None:
        """Keys and values of persistent tokens `[N, C]`; None when there are none."""
        if persistent is None:
            return None
        persistent = persistent.to(self.k_proj.weight.dtype)
        return Prefix(
            self.split(self.k_proj(persistent)[None])[0], self.split(self.v_proj(persistent)[None])[0]
        )

    def split(self, x_BTC: Tensor) -> Tensor:
        """`[B, T, C]` -> `[B, H, T, D]`."""
        return x_BTC.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

    def merge(self, x_BHTD: Tensor) -> Tensor:
        """`[B, H, T, D]` -> `[B, T, C]`."""
        return x_BHTD.transpose(1, 2).flatten(2)

    def rotary(self, length: int, like: Tensor) -> RotaryTable:
        return RotaryTable(length, self.head_dim, self.rope_theta, like)

    def scores(
        self,
        q: Tensor,
        q_rotated: Tensor,
        k_rotated: Tensor,
        values: Tensor,
        prefix: Prefix | None,
        mask: Tensor | None,
        causal: bool = False,
    ) -> Tensor:
        """softmax(scores) values for queries `[B, H, T, D]`; mask `[.., T, keys]`, True = visible.

        The prefix is matched by unrotated queries, the rest by rotated ones. One kernel does both: side by
        side, `[rotated, plain]` queries meet `[rotated, 0]` keys and `[0, plain]` prefix keys. In inference
        on a CPU each has a softmax of its own, half as wide, and the two are merged.
        """
        scale = self.head_dim**-0.5
        if prefix is None:
            return F.scaled_dot_product_attention(
                q_rotated, k_rotated, values, attn_mask=mask, is_causal=causal, scale=scale
            )
        assert mask is None or not causal
        batch, tokens = q.shape[0], q.shape[2]
        prefix_keys = prefix.keys.to(k_rotated.dtype).expand(batch, -1, -1, -1)
        prefix_values = prefix.values.to(values.dtype).expand(batch, -1, -1, -1)
        # Not in training mode: a checkpointed block runs with gradients off, then on, and must give the same.
        if q.device.type == "cpu" and not (self.training or torch.is_grad_enabled()):
            # softmax over both = a mean of the two, weighted by their sums.
            output, log_sum = _attend_cpu(q_rotated, k_rotated, values, mask, causal, scale)
            of_prefix, prefix_log_sum = _attend_cpu(q, prefix_keys, prefix_values, None, False, scale)
            share = torch.sigmoid(log_sum - prefix_log_sum).unsqueeze(-1).to(output.dtype)
            return torch.lerp(of_prefix, output, share)
        zeros = torch.zeros_like(k_rotated)
        keys = torch.cat(
            [F.pad(prefix_keys, (self.head_dim, 0)), torch.cat([k_rotated, zeros], dim=-1)], dim=2
        )
        if causal:
            mask = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()
        all_values = torch.cat([prefix_values, values], dim=2)
        if q.device.type == "cpu":
            # PyTorch's fast kernel there wants values as wide as keys: half the time, zeros included.
            all_values = F.pad(all_values, (0, self.head_dim))
        output = F.scaled_dot_product_attention(
            torch.cat([q_rotated, q], dim=-1),
            keys,
            all_values,
            attn_mask=None if mask is None else F.pad(mask, (prefix.keys.shape[1], 0), value=True),
            scale=scale,
        )
        return output[..., : self.head_dim]


def _attend_cpu(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """softmax(scores) values, and the logarithm `[B, H, T]` of the sums that the softmax divides by.

    The kernel behind `scaled_dot_product_attention`, which hides the second result. No gradient flows through
    that one: not for training.
    """
    bias = None if mask is None else q.new_zeros(mask.shape).masked_fill_(~mask, -torch.inf)
    result: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, keys, values, 0.0, causal, attn_mask=bias, scale=scale
    )
    return result


class SlidingAttention(Attention):
    """Every token sees the prefix, itself and the `window - 1` tokens before it (all of them: None)."""

    def __init__(self, hidden_size: int, heads: int, rope_theta: float, window: int | None) -> None:
        super().__init__(hidden_size, heads, rope_theta)
        self.window = window

    def initial_state(self, batch: int, persistent: Tensor | None = None) -> AttentionState:
        """Nothing seen yet; persistent `[N, C]` becomes the prefix."""
        nothing = self.k_proj.weight.new_empty(batch, self.heads, 0, self.head_dim)
        return AttentionState(nothing, nothing, self.prefix(persistent), 0)

    def forward(
        self, x: Tensor, state: AttentionState | AttentionRing | None = None, rows: Rows | None = None
    ) -> tuple[Tensor, AttentionState | AttentionRing]:
        """x `[B, T, C]`, or packed `[1, total, C]` with `rows`; the output has the shape of x.

        A ring moves on in place by one token a row; in every other case a state comes back.
        """
        if state is None:
            state = self.initial_state(x.shape[0] if rows is None else len(rows))
        projected = [proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj)]
        if rows is not None:
            projected = [rows.pad(stream) for stream in projected]
        q, k, v = (self.split(stream) for stream in projected)
        if isinstance(state, AttentionRing):
            assert state.ring.size == self.window, f"a ring of {state.ring.size}, a window of {self.window}"
            if rows is None and q.shape[2] == 1 and state.ring.takes(k):
                output, ring = state.step(q, k, v, self.rope_theta)
                return self.o_proj(self.merge(output)), ring
            state = state.unrolled()
        past, tokens = state.keys.shape[2], q.shape[2]
        keys = torch.cat([state.keys.to(k.dtype), k], dim=2)
        values = torch.cat([state.values.to(v.dtype), v], dim=2)
        outputs = []
        first = self._before_blocks(tokens, state.counts, q.device)
        if first:
            seen = past + first
            outputs.append(self._attend_past(q[:, :, :first], keys[:, :, :seen], values[:, :, :seen], state))
        if first < tokens:
            assert self.window is not None
            start = past + first - (self.window - 1)
            outputs.append(
                self._attend_blocks(q[:, :, first:], keys[:, :, start:], values[:, :, start:], state.prefix)
            )
        merged = self.merge(outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2))
        if rows is not None:
            merged = rows.pack(merged)
        return self.o_proj(merged), self._advance(state, keys, values, rows)

    def _block(self, device: torch.device) -> int:
        """Queries of a block."""
        assert self.window is not None
        return min(self.window, CPU_BLOCK) if device.type == "cpu" else self.window

    def _before_blocks(self, tokens: int, counts: int | tuple[int, ...], device: torch.device) -> int:
        """How many of the first queries do not go in blocks: those whose windows may not be full, or all when
        they would not fill one."""
        if self.window is None:
            return tokens
        if counts == self.window - 1:
            return 0 if tokens > self._block(device) else tokens
        return min(tokens, self.window)

    def _attend_past(self, q: Tensor, keys: Tensor, values: Tensor, state: AttentionState) -> Tensor:
        """Queries that stand at the end of the keys `[B, H, P + T, D]`, T at most one window."""
        tokens, length = q.shape[2], keys.shape[2]
        past = length - tokens
        rotary = self.rotary(length, q)
        full = isinstance(state.counts, int)
        if full and past == 0:  # as many keys as queries: plain causal attention, the kernel's fast path
            mask, causal = None, True
        elif full and tokens == 1 and (self.window is None or length <= self.window):
            mask, causal = None, False
        else:
            distance = torch.arange(past, length, device=q.device)[:, None] - torch.arange(
                length, device=q.device
            )
            mask, causal = distance >= 0, False
            if self.window is not None:
                mask &= distance < self.window
            if not isinstance(state.counts, int):
                oldest = torch.tensor([past - count for count in state.counts], device=q.device)
                valid = torch.arange(length, device=q.device) >= oldest[:, None]
                mask = mask & valid[:, None, None, :]
        return self.scores(q, rotary.rotate(q, past), rotary.rotate(keys), values, state.prefix, mask, causal)

    def _attend_blocks(self, q: Tensor, keys: Tensor, values: Tensor, prefix: Prefix | None) -> Tensor:
        """Queries `[B, H, T, D]` with full windows: W - 1 keys before the first query, then theirs.

        In blocks of S queries against W + S keys: memory and time are linear in T. Zeros stand before the
        first key, which makes that number even, and fill the last block; no token sees them.
        """
        window = self.window
        assert window is not None
        batch, tokens = q.shape[0], q.shape[2]
        block = self._block(q.device)
        blocks = -(-tokens // block)
        fill = blocks * block - tokens
        rotary = self.rotary(window - 1 + tokens, q)

        def of_queries(x: Tensor) -> Tensor:
            return _blocks(F.pad(x, (0, 0, 0, fill)), block, block)

        def of_keys(x: Tensor) -> Tensor:
            return _blocks(F.pad(x, (0, 0, 1, fill)), window + block, block)

        distance = torch.arange(window, window + block, device=q.device)[:, None] - torch.arange(
            window + block, device=q.device
        )
        output = self.scores(
            of_queries(q),
            of_queries(rotary.rotate(q, window - 1)),
            of_keys(rotary.rotate(keys)),
            of_keys(values),
            prefix,
            (distance >= 0) & (distance < window),
        )
        output = output.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)
        return output[:, :, :tokens]

    def _advance(
        self, state: AttentionState, keys: Tensor, values: Tensor, rows: Rows | None
    ) -> AttentionState:
        """Keep of each row what its next token can see."""
        reach = keys.shape[2] if self.window is None else self.window - 1
        past = state.keys.shape[2]
        if rows is None:
            counts = state.counts
            tokens = keys.shape[2] - past
            if isinstance(counts, int):
                keep = min(past + tokens, reach)
                kept: int | tuple[int, ...] = keep
            else:
                kept = tuple(min(count + tokens, reach) for count in counts)
                keep = max(kept)
            start = keys.shape[2] - keep
            return AttentionState(keys[:, :, start:], values[:, :, start:], state.prefix, one_if_equal(kept))
        seen = [count + length for count, length in zip(state.row_counts, rows.lengths, strict=True)]
        kept = tuple(min(count, reach) for count in seen)
        keep = max(kept)
        # Row b's tokens end at column past + length_b; the columns before a short row's first are any.
        columns = [[max(past + length - keep + i, 0) for i in range(keep)] for length in rows.lengths]
        index = torch.tensor(columns, dtype=torch.long, device=keys.device).view(len(rows), 1, keep, 1)
        index = index.expand(-1, self.heads, -1, self.head_dim)
        return AttentionState(
            keys.gather(2, index), values.gather(2, index), state.prefix, one_if_equal(kept)
        )


def _blocks(x: Tensor, size: int, step: int) -> Tensor:
    """`[B, H, T, D]` -> `[B x blocks, H, size, D]`, one from every `step`-th token on; a view for B = 1."""
    return x.unfold(2, size, step).permute(0, 2, 1, 4, 3).flatten(0, 1)
