"""What mixes tokens in a block: one class per variant, one signature for all.

    forward(x, state, rows) -> (y, state)      initial_state(batch) -> state

x is `[B, T, C]`, or with `rows` packed `[1, total, C]`. A state is an argument and a return value; None
starts a sequence.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from titans.models.configuration import TitansConfig
from titans.nn import (
    AttentionState,
    MemoryCore,
    NeuralMemory,
    NeuralMemoryState,
    PersistentTokens,
    Rows,
    SlidingAttention,
)


def persistent_tokens(config: TitansConfig) -> PersistentTokens | None:
    count = config.num_persistent_tokens
    return PersistentTokens(count, config.hidden_size) if count else None


def sliding_attention(config: TitansConfig) -> SlidingAttention:
    return SlidingAttention(
        config.hidden_size, config.num_attention_heads, config.rope_theta, config.window_size
    )


def start_memory(memory: MemoryCore, persistent: PersistentTokens | None, batch: int) -> NeuralMemoryState:
    """The memory before token 0: it has read the persistent tokens, whose outputs nobody uses.

    They are the same for every row: one row is computed, and gradients of all rows flow back into it.
    """
    state = memory.initial_state(1)
    if persistent is not None:
        _, state = memory.retrieve(persistent()[None], state)
    return state.expand(batch)


class LmmMixer(nn.Module):
    """The memory alone."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        self.persistent = persistent_tokens(config)
        self.memory = NeuralMemory(config.memory_spec)

    def initial_state(self, batch: int) -> NeuralMemoryState:
        return start_memory(self.memory, self.persistent, batch)

    def forward(
        self, x: Tensor, state: NeuralMemoryState | None = None, rows: Rows | None = None
    ) -> tuple[Tensor, NeuralMemoryState]:
        if state is None:
            state = self.initial_state(x.shape[0] if rows is None else len(rows))
        return self.memory(x, state, rows)


class AttentionMixer(nn.Module):
    """Attention alone, sliding or full: the baseline."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        self.persistent = persistent_tokens(config)
        self.attention = sliding_attention(config)

    def initial_state(self, batch: int) -> AttentionState:
        return self.attention.initial_state(batch, None if self.persistent is None else self.persistent())

    def forward(
        self, x: Tensor, state: AttentionState | None = None, rows: Rows | None = None
    ) -> tuple[Tensor, AttentionState]:
        if state is None:
            state = self.initial_state(x.shape[0] if rows is None else len(rows))
        return self.attention(x, state, rows)


MIXERS: dict[str, Any] = {"lmm": LmmMixer, "attention": AttentionMixer}


def build_mixer(config: TitansConfig) -> nn.Module:
    return MIXERS[config.variant](config)
