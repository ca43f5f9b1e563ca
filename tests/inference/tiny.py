"""A tiny model of any variant with randomised weights, and tokens for it."""

import functools
from typing import Any

import torch

from tests.models.conftest import SIZES
from titans.models import TitansConfig, TitansForCausalLM

__all__ = ["SIZES", "randomised", "tiny", "tokens"]


def randomised(variant: str, seed: int = 0, **fields: Any) -> TitansForCausalLM:
    """In float64 and evaluation mode; fresh weights would hide mistakes behind zeros and ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TitansForCausalLM(TitansConfig(variant=variant, **{**SIZES, **fields})).double()
        for parameter in model.parameters():
            std = 0.3 if parameter.dim() == 1 else 0.5 * parameter.shape[-1] ** -0.5
            parameter.data.add_(torch.randn_like(parameter) * std)
    return model.eval()


@functools.cache
def _weights(variant: str) -> dict[str, torch.Tensor]:
    return randomised(variant).state_dict()


def tiny(variant: str) -> TitansForCausalLM:
    """A model of its own for every caller: float64, in evaluation mode."""
    model = TitansForCausalLM(TitansConfig(variant=variant, **SIZES)).double()
    model.load_state_dict(_weights(variant))
    return model.eval()


def tokens(length: int, seed: int = 1) -> torch.Tensor:
    """Ordinary tokens, no special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, SIZES["vocab_size"], (length,), generator=generator)
