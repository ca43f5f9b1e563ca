"""Memory as context (MAC): segment by segment, attention reads what the memory recalls and feeds it back.

Per segment (paper sec. 4.1, Eq. 21 to 25), made causal: a token never reads a memory that has seen a later
one, and attends to the recalled h_j only for j <= its own index.

    h   = M_frozen(q(x))          the memory as it was at the end of the previous segment
    y   = attention([prefix, h, x])
    M_i = write(M_{i-1}; k(y_i), v(y_i))           the chunk rule
    o_i = W_o[ norm_1(y_i) * sigmoid(norm_2(M_i(q'(y_i)))) ]        M_{i-1} with memory_read_before_write

With `memory_input="token"` k, v and q' are those of x_i, and the gates see x_i + norm_1(y_i).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from titans.models.configuration import TitansConfig
from titans.nn import (
    ContextAttention,
    MemoryCore,
    NeuralMemoryState,
    PersistentTokens,
    Prefix,
    RMSNorm,
    Rows,
    Segment,
)
from titans.nn.context_attention import SegmentRing


@dataclass(frozen=True)
class MacState:
    """What MAC carries between tokens.

    memory: what is written to, with the conv tails of what is written, y or x.
    frozen: its weights at the last end of a segment, L tensors `[B, H, D_in, D_out]`.
    context_tail: conv tail of the queries of x.
    segment: keys and values since that end; prefix: those of the persistent tokens.
    """

    memory: NeuralMemoryState
    frozen: tuple[Tensor, ...]
    context_tail: Tensor
    segment: Segment | SegmentRing
    prefix: Prefix | None

    @property
    def batch(self) -> int:
        return self.memory.batch

    @property
    def device(self) -> torch.device:
        return self.memory.device

    def select(self, rows: Tensor) -> MacState:
        return MacState(
            self.memory.select(rows),
            tuple(weight.index_select(0, rows) for weight in self.frozen),
            self.context_tail.index_select(0, rows),
            self.segment.select(rows),
            self.prefix,
        )

    def detach(self) -> MacState:
        return MacState(
            self.memory.detach(),
            tuple(weight.detach() for weight in self.frozen),
            self.context_tail.detach(),
            self.segment.detach(),
            None if self.prefix is None else Prefix(*(part.detach() for part in self.prefix)),
        )


class MacMixer(nn.Module):
    """See the file's docstring. Persistent tokens are attended to and, unlike in the others, not written."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        size, count = config.hidden_size, config.num_persistent_tokens
        self.segment_size = config.segment_size
        self.writes_tokens = config.memory_input == "token"
        self.persistent = PersistentTokens(count, size) if count else None
        self.memory = MemoryCore(config.memory_spec)
        self.context_norm = RMSNorm(config.memory_head_dim, config.rms_norm_eps, heads=self.memory.spec.heads)
        self.context_proj = nn.Linear(size, size, bias=False)
        self.attention = ContextAttention(size, config.num_attention_heads, config.rope_theta)
        self.attention_norm = RMSNorm(size, config.rms_norm_eps)
        self.memory_norm = RMSNorm(size, config.rms_norm_eps)
        self.o_proj = nn.Linear(size, size, bias=False)
        # Not bound to this module: a copy of the module must not take the steps of the original.
        self._run_step: Callable[..., tuple[Tensor, Tensor, MacState]] = MacMixer._step

    def compile_step(self, **options: Any) -> None:
        """torch.compile for the step of a segment, which is the same graph for all but the first."""
        self._run_step = torch.compile(MacMixer._step, **options)

    def initial_state(self, batch: int) -> MacState:
        memory = self.memory.initial_state(batch)
        return MacState(
            memory,
            memory.memory.weights,
            self.memory.q_conv.initial_tail(batch),
            self.attention.initial_segment(batch),
            self.attention.prefix(None if self.persistent is None else self.persistent()),
        )

    def forward(
        self, x: Tensor, state: MacState | None = None, rows: Rows | None = None
    ) -> tuple[Tensor, MacState]:
        """x `[B, T, C]`, or packed `[1, total, C]` with `rows`; the output has the shape of x."""
        if state is None:
            state = self.initial_state(x.shape[0] if rows is None else len(rows))
        if isinstance(state.segment, SegmentRing) and (rows is not None or x.shape[1] != 1):
            state = replace(state, segment=state.segment.unrolled())
        if rows is None and isinstance(state.segment.offsets, tuple):
            # Full rows at different places of their segments: as a stream.
            stream = Rows((x.shape[1],) * x.shape[0], x.device)
            output, state = self.forward(x.flatten(0, 1)[None], state, stream)
            return output.view_as(x), state

        # What depends on x alone is computed for all segments at once.
        queries, entries = self.attention.queries(x), self.attention.entries(x)
        if isinstance(state.segment, SegmentRing) and not state.segment.ring.takes(entries):
            state = replace(state, segment=state.segment.unrolled())
            return self.forward(x, state, rows)
        if self.writes_tokens:  # what recalls from the frozen memory asks the live one, too
            recall: Sequence[Tensor]
            recall, memory = self.memory.project_write(x, state.memory, rows)
            state = replace(state, memory=memory, context_tail=memory.query_tail)
        else:
            query, tail = self.memory.project_query(x, state.context_tail, rows)
            recall, state = (query,), replace(state, context_tail=tail)
        attended, memories = [], []
        steps = _steps(x.shape[1], state.segment.offsets, rows, self.segment_size)
        pieces = zip(*(_cut(each, steps) for each in (x, queries, entries, *recall)), strict=True)
        for step, (token, asking, entering, *recalling) in zip(steps, pieces, strict=True):
            y, m, state = self._run_step(self, token, asking, entering, recalling, state, step.rows)
            attended.append(y)
            memories.append(m)
        y, m = _join(attended, steps), _join(memories, steps)
        gate = torch.sigmoid(self.memory_norm(m.flatten(2)))
        return self.o_proj(y * gate), state

    def _step(
        self,
        x: Tensor,
        queries: Tensor,
        entries: Tensor,
        recall: Sequence[Tensor],
        state: MacState,
        rows: Rows | None,
    ) -> tuple[Tensor, Tensor, MacState]:
        """Some tokens of one segment: norm_1(y), m and the state after them.

        recall: the queries of x; with `writes_tokens` its keys and values, too.
        """
        h = self._recall(recall[0], state.frozen, rows)
        context = self.context_proj(self.context_norm(h).flatten(2))
        entries = torch.cat([entries, self.attention.entries(context)], dim=2)
        segment: Segment | SegmentRing
        if isinstance(state.segment, SegmentRing):
            y, segment = self.attention.step(queries, entries, state.segment)
        else:
            segment = state.segment.append(entries, rows)
            y = self.attention.attend(queries, segment, state.prefix, rows)

        normed = self.attention_norm(y)
        if self.writes_tokens:
            (q, k, v), memory, seen = recall, state.memory, x + normed
        else:
            (q, k, v), memory = self.memory.project_write(y, state.memory, rows)
            seen = y
        m, memory = self.memory.write(q, k, v, self.memory.gates(seen), memory, rows)
        frozen = self._freeze(state.frozen, memory.memory.weights, segment)
        state = replace(state, memory=memory, frozen=frozen, segment=segment.close(self.segment_size))
        return normed, m, state

    def _recall(self, recall: Tensor, frozen: tuple[Tensor, ...], rows: Rows | None) -> Tensor:
        if rows is None:
            return self.memory.read(recall, frozen)
        return rows.pack(self.memory.read(rows.pad(recall), frozen))

    def _freeze(
        self, frozen: tuple[Tensor, ...], weights: tuple[Tensor, ...], segment: Segment | SegmentRing
    ) -> tuple[Tensor, ...]:
        """The weights that the next tokens recall from: new ones in rows whose segment is complete."""
        if isinstance(segment.offsets, int):
            return weights if segment.offsets == self.segment_size else frozen
        if isinstance(segment, SegmentRing):  # the host does not know
            complete = segment.offsets == self.segment_size
        else:
            of_rows = [offset == self.segment_size for offset in segment.offsets]
            if not any(of_rows):
                return frozen
            complete = torch.tensor(of_rows, device=frozen[0].device)
        rows = complete[:, None, None, None]
        return tuple(torch.where(rows, new, old) for new, old in zip(weights, frozen, strict=True))


@dataclass(frozen=True)
class _Step:
    """Tokens of one step: a slice of every row, or with `rows` these places of the stream."""

    where: slice | list[int]
    rows: Rows | None


def _steps(tokens: int, offsets: int | tuple[int, ...] | Tensor, rows: Rows | None, size: int) -> list[_Step]:
    """Cut the new tokens where their segments end; in every step each row takes what its segment holds."""
    if isinstance(offsets, Tensor):  # a ring takes one token a row
        return [_Step(slice(None), None)]
    if rows is None:
        assert isinstance(offsets, int)
        ends = [*range(size - offsets, tokens, size), tokens]
        return [_Step(slice(start, end), None) for start, end in pairwise([0, *ends])]
    at = [offsets] * len(rows) if isinstance(offsets, int) else list(offsets)
    left, next_token = list(rows.lengths), list(rows.starts)
    steps = []
    while any(left):
        lengths = [min(size - offset, count) for offset, count in zip(at, left, strict=True)]
        where = [
            place
            for start, length in zip(next_token, lengths, strict=True)
            for place in range(start, start + length)
        ]
        # A step with every token needs no gathering: the stream is already in that order.
        everything = len(where) == tokens
        steps.append(_Step(slice(None) if everything else where, Rows(lengths, rows.device)))
        at = [(offset + length) % size for offset, length in zip(at, lengths, strict=True)]
        left = [count - length for count, length in zip(left, lengths, strict=True)]
        next_token = [start + length for start, length in zip(next_token, lengths, strict=True)]
    return steps


def _cut(x: Tensor, steps: list[_Step]) -> Sequence[Tensor]:
    """x `[B, T, ...]` at the tokens of each step.

    By one split, whose gradient is one concatenation: that of a slice is as long as x, once for every step.
    """
    if len(steps) == 1 and isinstance(steps[0].where, slice):
        return [x]
    slices = [step.where for step in steps if isinstance(step.where, slice)]
    if len(slices) == len(steps):
        return x.split([len(range(x.shape[1])[where]) for where in slices], dim=1)
    places = [torch.tensor(step.where, dtype=torch.long, device=x.device) for step in steps]
    return [x.index_select(1, place) for place in places]


def _join(parts: list[Tensor], steps: list[_Step]) -> Tensor:
    """The steps' results in the order of the tokens."""
    if len(parts) == 1:
        return parts[0]
    joined = torch.cat(parts, dim=1)
    places: list[int] = []
    for step in steps:
        if isinstance(step.where, slice):
            return joined
        places += step.where
    return joined.index_select(1, torch.tensor(places, device=joined.device).argsort())
