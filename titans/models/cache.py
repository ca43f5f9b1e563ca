"""`TitansCache`: what a model carries from one piece of a sequence to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache

from titans.models.state import unrolled
from titans.nn import AttentionState, Prefix, Segment
from titans.nn.attention_state import one_if_equal

StateT = TypeVar("StateT", bound="MixerState")


class MixerState(Protocol):
    """A mixer's state: replaced, never changed in place, but for rings (`state.for_steps`)."""

    @property
    def batch(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def select(self: StateT, rows: Tensor) -> StateT: ...

    def detach(self: StateT) -> StateT: ...


class TitansCache(Cache):
    """States of all blocks (memory, momentum, anchor, conv tails, window keys, ...) and the length seen.

    An object of its own kind: memory states cannot be cropped and start from learned weights, not from
    zeros, so transformers' layer caches do not fit. Its size does not grow with the stream (but for
    variant "attention" without a window). Pass it back as `past_key_values` to go on.
    """

    is_compileable = False

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.states: list[Any] = []
        self.seen = 0
        self.variant: str | None = None  # whose states these are

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns fed so far, padding included: what `generate` counts its masks by."""
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        """Rows, or -1 before the first piece."""
        return self.states[0].batch if self.states else -1

    @property
    def is_initialized(self) -> bool:
        return bool(self.states)

    @property
    def is_croppable(self) -> bool:
        return False

    def reset(self) -> None:
        """Forget everything: the next piece starts from the learned initial memory."""
        self.states = []
        self.seen = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i continues what row `beam_idx[i]` has read."""
        self.states = [state.select(beam_idx.to(state.device)) for state in self.states]

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, copies side by side."""
        if self.states:
            self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    @classmethod
    def concatenate(cls, caches: Sequence[TitansCache]) -> TitansCache:
        """The rows of several caches, one after another: streams become a batch, wherever each stands.

        A window or segment gets the columns of its longest row, also where there is one cache alone.
        """
        if len(kinds := {(cache.variant, len(cache.states)) for cache in caches}) != 1:
            raise ValueError(
                f"caches must come from one model and have read something, got (variant, blocks): {kinds}"
            )
        joined = cls()
        blocks = zip(*(unrolled(cache.states) for cache in caches), strict=True)
        joined.states = [concatenate_rows(states) for states in blocks]
        joined.seen, joined.variant = max(cache.seen for cache in caches), caches[0].variant
        return joined

    def detach(self) -> TitansCache:
        """The same numbers without history: the end of truncated backpropagation through time."""
        cache = TitansCache()
        cache.states = [state.detach() for state in self.states]
        cache.seen, cache.variant = self.seen, self.variant
        return cache

    def crop(self, tokens_to_remove: int) -> NoReturn:
        raise ValueError(
            "TitansCache cannot be cropped: a memory that has read a token cannot unread it "
            "(assisted decoding and prompt lookup need that; use greedy, sampling or beam search)"
        )

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError("TitansCache has no keys and values of its own to update; a Titans model fills it")


def concatenate_rows(states: Sequence[Any]) -> Any:
    """The rows of several states of one kind, a mixer's or a part of it, one after another."""
    first = states[0]
    if first is None or isinstance(first, Prefix):  # of the model, not of a row
        return first
    if isinstance(first, Tensor):
        return torch.cat(list(states))
    if isinstance(first, AttentionState):
        return _concatenate_windows(states)
    if isinstance(first, Segment):
        return _concatenate_segments(states)
    if isinstance(first, tuple):
        return tuple(concatenate_rows(parts) for parts in zip(*states, strict=True))
    parts = {
        each.name: concatenate_rows([getattr(state, each.name) for state in states]) for each in fields(first)
    }
    return type(first)(**parts)


def _concatenate_windows(states: Sequence[AttentionState]) -> AttentionState:
    counts = tuple(count for state in states for count in state.row_counts)
    width = max(counts)

    def join(parts: list[Tensor]) -> Tensor:  # `[B, H, P, D]`, right-aligned
        return torch.cat([F.pad(part, (0, 0, width - part.shape[2], 0)) for part in parts])

    return AttentionState(
        join([state.keys for state in states]),
        join([state.values for state in states]),
        states[0].prefix,
        one_if_equal(counts),
    )


def _concatenate_segments(states: Sequence[Segment]) -> Segment:
    offsets = tuple(offset for state in states for offset in state.offsets_of(state.entries.shape[0]))
    width = max(offsets)
    entries = [  # `[B, S, 4, H, D]`, left-aligned
        F.pad(state.entries, (0, 0, 0, 0, 0, 0, 0, width - state.entries.shape[1])) for state in states
    ]
    return Segment(torch.cat(entries), one_if_equal(offsets))
