"""What mixes tokens in a block: one class per variant, one signature for all.

    forward(x, state, rows) -> (y, state)      initial_state(batch) -> state

x is `[B, T, C]`, or with `rows` packed `[1, total, C]`. A state is an argument and a return value; None
starts a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from titans.models.configuration import TitansConfig
from titans.models.mac import MacMixer
from titans.nn import (
    AttentionState,
    MemoryCore,
    NeuralMemory,
    NeuralMemoryState,
    PersistentTokens,
    RMSNorm,
    Rows,
    SlidingAttention,
)
from titans.nn.attention_ring import AttentionRing


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
        self, x: Tensor, state: AttentionState | AttentionRing | None = None, rows: Rows | None = None
    ) -> tuple[Tensor, AttentionState | AttentionRing]:
        if state is None:
            state = self.initial_state(x.shape[0] if rows is None else len(rows))
        return self.attention(x, state, rows)


@dataclass(frozen=True)
class HybridState:
    """States of a memory and of an attention, the latter as a ring for steps in place."""

    memory: NeuralMemoryState
    attention: AttentionState | AttentionRing

    @property
    def batch(self) -> int:
        return self.memory.batch

    @property
    def device(self) -> torch.device:
        return self.memory.device

    def select(self, rows: Tensor) -> HybridState:
        return HybridState(self.memory.select(rows), self.attention.select(rows))

    def detach(self) -> HybridState:
        return HybridState(self.memory.detach(), self.attention.detach())


class MagMixer(nn.Module):
    """Memory as gate (paper sec. 4.2, Eq. 26 to 28): attention and memory read the same x side by side.

    `W_o[ norm_1(SWA(x)) * sigmoid(norm_2(m)) ]`, m what the memory recalls just after each token. With
    `memory_gates_from="attention"` its gates see `x + norm_1(SWA(x))`.
    """

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.gates_see_attention = config.memory_gates_from == "attention"
        self.persistent = persistent_tokens(config)
        self.attention = sliding_attention(config)
        self.memory = MemoryCore(config.memory_spec)
        self.attention_norm = RMSNorm(size, config.rms_norm_eps)
        self.memory_norm = RMSNorm(size, config.rms_norm_eps)
        self.o_proj = nn.Linear(size, size, bias=False)

    def initial_state(self, batch: int) -> HybridState:
        return start_hybrid(self.memory, self.attention, self.persistent, batch)

    def forward(
        self, x: Tensor, state: HybridState | None = None, rows: Rows | None = None
    ) -> tuple[Tensor, HybridState]:
        if state is None:
            state = self.initial_state(x.shape[0] if rows is None else len(rows))
        y, attention = self.attention(x, state.attention, rows)
        y = self.attention_norm(y)
        m, memory = self.memory.retrieve(x, state.memory, rows, x + y if self.gates_see_attention else None)
        gate = torch.sigmoid(self.memory_norm(m.flatten(2)))
        return self.o_proj(y * gate), HybridState(memory, attention)


class MalMixer(nn.Module):
    """Memory as layer (paper sec. 4.3, Eq. 29 to 31): attention reads what the memory made of x."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        self.persistent = persistent_tokens(config)
        self.memory = NeuralMemory(config.memory_spec)
        self.memory_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = sliding_attention(config)

    def initial_state(self, batch: int) -> HybridState:
        return start_hybrid(self.memory, self.attention, self.persistent, batch)

    def forward(
        self, x: Tensor, state: HybridState | None = None, rows: Rows | None = None
    ) -> tuple[Tensor, HybridState]:
        if state is None:
            state = self.initial_state(x.shape[0] if rows is None else len(rows))
        m, memory = self.memory(x, state.memory, rows)
        y, attention = self.attention(self.memory_norm(m), state.attention, rows)
        return y, HybridState(memory, attention)


def start_hybrid(
    memory: MemoryCore, attention: SlidingAttention, persistent: PersistentTokens | None, batch: int
) -> HybridState:
    prefix = None if persistent is None else persistent()
    return HybridState(start_memory(memory, persistent, batch), attention.initial_state(batch, prefix))


MIXERS: dict[str, type[nn.Module]] = {
    "lmm": LmmMixer,
    "mac": MacMixer,
    "mag": MagMixer,
    "mal": MalMixer,
    "attention": AttentionMixer,
}


def build_mixer(config: TitansConfig, layer: int) -> nn.Module:
    """Of block ``layer``."""
    return MIXERS["attention" if layer < config.memory_from_layer else config.variant](config)
