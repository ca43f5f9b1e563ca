"""A tiny model of any variant with randomised weights: a fresh one hides bugs behind zeros and ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from titans.models import VARIANTS, TitansConfig, TitansForCausalLM

VOCAB = 23
# Chunk 4, segment 8, window 6: every boundary, and every two of them apart, within 30 tokens.
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "memory_head_dim": 8,
    "memory_expansion": 2,
    "chunk_size": 4,
    "segment_size": 8,
    "window_size": 6,
    "num_persistent_tokens": 3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}

Build = Callable[..., TitansForCausalLM]

# Beside the variants: two kinds of blocks, attention alone, then a memory whose gates see attention; and
# switches on which it depends what the op is given.
KINDS: dict[str, dict[str, Any]] = {
    "mag after attention": {"variant": "mag", "memory_from_layer": 1, "memory_gates_from": "attention"},
    "mac reading first": {"variant": "mac", "memory_read_before_write": True},
    "mac of tokens": {"variant": "mac", "memory_input": "token"},
    "mal per channel": {"variant": "mal", "memory_forget_per_channel": True},
}


@pytest.fixture(params=(*VARIANTS, *KINDS), scope="session")
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def fresh() -> Build:
    """`fresh(variant, seed=0, **fields)`: a model in float64 as its initialisation leaves it."""

    def make(variant: str, seed: int = 0, **fields: Any) -> TitansForCausalLM:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            kind = KINDS.get(variant, {"variant": variant})
            return TitansForCausalLM(TitansConfig(**{**SIZES, **kind, **fields})).double()

    return make


@pytest.fixture(scope="session")
def build(fresh: Build) -> Build:
    """`build(variant, seed=0, **fields)`: a model in float64 and eval mode, its weights randomised."""

    def make(variant: str, seed: int = 0, **fields: Any) -> TitansForCausalLM:
        model = fresh(variant, seed, **fields)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                std = 0.3 if parameter.dim() == 1 else 0.5 * parameter.shape[-1] ** -0.5
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * std)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def tokens() -> Callable[..., torch.Tensor]:
    """`tokens(rows, length)`: random ordinary tokens, no special ones."""

    def draw(rows: int, length: int, seed: int = 1) -> torch.Tensor:
        return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))

    return draw
