"""What mac's memory is given: what attention made of a token, as in the paper, or the token."""

import pytest
import torch
from torch import Tensor

from titans.models import TitansConfig, TitansForCausalLM
from titans.nn.memory import MemoryCore


def untrained(memory_input: str, seed: int = 0) -> TitansForCausalLM:
    torch.manual_seed(seed)
    return TitansForCausalLM(
        TitansConfig.named("tiny", variant="mac", memory_input=memory_input, vocab_size=256)
    )


def first_keys(model: TitansForCausalLM, ids: Tensor) -> Tensor:
    """Of the first block's memory, `[B, T, H, D]`."""
    memory = next(module for module in model.modules() if isinstance(module, MemoryCore))
    seen: list[Tensor] = []
    memory.observer = lambda write: seen.append(write.k)
    with torch.no_grad():
        model(ids)
    memory.observer = None
    return torch.cat(seen, dim=1)


def likeness(keys: Tensor) -> float:
    """Mean cosine of two tokens of a row, beyond its first half."""
    keys = keys[:, keys.shape[1] // 2 :].transpose(1, 2)
    cosines = keys @ keys.transpose(2, 3)
    count = keys.shape[2]
    return float((cosines.sum((2, 3)) - count).mean() / (count * (count - 1)))


@pytest.mark.parametrize("seed", range(3))
def test_an_untrained_attention_hides_the_tokens_from_the_memory(seed):
    """Why mac learns to recall late or never from attention's output alone (docs/recall.md)."""
    ids = torch.randint(256, (2, 64), generator=torch.Generator().manual_seed(seed))
    assert likeness(first_keys(untrained("attention", seed), ids)) > 0.5
    assert likeness(first_keys(untrained("token", seed), ids)) < 0.2


@pytest.mark.parametrize(("memory_input", "same"), [("attention", False), ("token", True)])
def test_keys_are_those_of_the_input(memory_input, same):
    """Another attention in the first block: other keys there, unless they are the tokens' own."""
    model, ids = untrained(memory_input), torch.arange(40)[None]
    before = first_keys(model, ids)
    with torch.no_grad():
        model.model.layers[0].mixer.attention.o_proj.weight.normal_()
    assert torch.allclose(first_keys(model, ids), before) == same
