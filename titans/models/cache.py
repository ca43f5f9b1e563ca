"""`TitansCache`: what a model carries from one piece of a sequence to the next."""

from __future__ import annotations

from typing import Any, NoReturn, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import Cache

StateT = TypeVar("StateT", bound="MixerState")


class MixerState(Protocol):
    """A mixer's state: replaced, never changed in place."""

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
