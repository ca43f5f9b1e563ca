"""Recall among random tokens: MQAR, and what it shares with the other tasks of tokens.

A task is a frozen dataclass; ``task.batch(index, batch_size)`` is batch number ``index`` of an endless,
repeatable supply. Draws, labels and accuracy are the same for all tasks and stand here.

Labels are those of transformers' causal models: ``labels[:, t]`` is the token asked for at position t, and
the model's output at t - 1 is compared with it. Zoology and MAD put the label where the output is read:
``labels[:, 1:]`` beside ``input_ids[:, :-1]`` is their pair. As in theirs, no input gives the answer away:
``input_ids[:, t]`` is noise or filling where ``labels[:, t]`` asks.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from titans.data.dataset import IGNORED


class TokenBatch(NamedTuple):
    """``input_ids`` and ``labels``, int64 [B, T]; ``labels`` is -100 where nothing is asked."""

    input_ids: Tensor
    labels: Tensor


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of the asked tokens that are the most likely ones.

    Args:
        logits: [B, T, V] of a causal model, not shifted; on any device.
        labels: [B, T] as in `TokenBatch`.

    Raises:
        ValueError: the shapes do not fit, or ``labels`` asks for nothing.
    """
    expect(logits.shape[:-1] == labels.shape, "logits", f"shape {[*labels.shape, 'V']}", [*logits.shape])
    labels = labels[:, 1:].to(logits.device)
    asked = labels != IGNORED
    expect(bool(asked.any()), "labels", "a label other than -100 after the first position", "none")
    return float((logits[:, :-1][asked].argmax(-1) == labels[asked]).double().mean())


def uniforms(seed: int, index: int, batch_size: int, width: int) -> Tensor:
    """Uniform draws from [0, 1) of batch ``index``, float64 [batch_size, width] on the CPU.

    Row i is the same for every ``batch_size`` above i, as torch draws row by row.

    Raises:
        ValueError: a negative ``index`` or a ``batch_size`` below 1.
    """
    expect(index >= 0, "index", "at least 0", index)
    expect(batch_size >= 1, "batch_size", "at least 1", batch_size)
    # Torch's CPU generator keeps 32 bits of its seed: seed and index are mixed into those. A batch of one
    # seed is also one of the first 100,000 of another seed with a probability of 1 in 43,000.
    mixed = int(np.random.SeedSequence((seed, index)).generate_state(1)[0])
    generator = torch.Generator().manual_seed(mixed)
    return torch.rand(batch_size, width, dtype=torch.float64, generator=generator)


def expect(holds: bool, argument: str, expected: str, value: object) -> None:
    """Raises a ValueError that names all three unless ``holds``."""
    if not holds:
        raise ValueError(f"{argument}: expected {expected}, got {value}")


@dataclass(frozen=True, kw_only=True)
class MQAR:
    """Multi-query associative recall (Zoology, arXiv 2312.04927); the defaults are those of its code.

    A sample is ``pairs`` pairs of key and value, then every key once more, each asking for its value::

        input_ids  2    8    4    7    0    0    4    0    0    0    0    0    2    0    0    0
        labels     .    .    .    .    .    .    .    7    .    .    .    .    .    8    .    .

    Keys are 1 ... V/2 - 1 and values V/2 ... V - 1, no token twice in a sample. Queries stand in slots of two
    tokens after the pairs. The slot of the first key is the k-th (k = 1, 2, ...) with a probability
    proportional to k^(power_a - 1), and each further key takes its own likewise from the slots left.

    Zoology's Figure 2 has no noise and 4 pairs in 64 tokens, 8 in 128, 16 in 256 and 64 in 512. Its code also
    wants more tokens in the vocabulary than in a sample, which would bar long samples: here a vocabulary must
    only hold enough keys.

    Args:
        vocab_size: V.
        length: T, tokens in a sample, even.
        pairs: keys asked for in a sample; at most ``length`` / 4.
        power_a: the power law's: 1 for slots all alike, towards 0 for queries soon after the pairs.
        noise: fill the other positions with any tokens of the vocabulary, keys and values included; else
            with 0.
        seed: which endless supply of samples this is.

    Raises:
        ValueError: an argument is out of its range.
    """

    vocab_size: int = 8192
    length: int = 64
    pairs: int = 4
    power_a: float = 0.01
    noise: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        expect(self.pairs >= 1, "pairs", "at least 1", self.pairs)
        expect(self.length % 2 == 0, "length", "an even number", self.length)
        expect(
            self.length >= 4 * self.pairs,
            "length",
            f"at least {4 * self.pairs} tokens (4 a pair)",
            self.length,
        )
        expect(
            self.vocab_size >= 2 * (self.pairs + 1),
            "vocab_size",
            f"at least {2 * (self.pairs + 1)} ({self.pairs} keys and 0 in its lower half)",
            self.vocab_size,
        )
        expect(0 < self.power_a < float("inf"), "power_a", "a finite number above 0", self.power_a)
        expect(self.seed >= 0, "seed", "at least 0", self.seed)

    def batch(self, index: int, batch_size: int, device: torch.device | str = "cpu") -> TokenBatch:
        """Batch ``index``, int64 [batch_size, length] on ``device``; the tokens depend on nothing else.

        Raises:
            ValueError: a negative ``index`` or a ``batch_size`` below 1.
        """
        first_value, context = self.vocab_size // 2, 2 * self.pairs
        slots = (self.length - context) // 2
        widths = [first_value - 1, self.vocab_size - first_value, slots, self.length if self.noise else 0]
        draws = uniforms(self.seed, index, batch_size, sum(widths))
        key_draws, value_draws, slot_draws, noise_draws = draws.split(widths, dim=1)

        # The largest of one draw per token: without replacement, in random order.
        keys = 1 + key_draws.topk(self.pairs).indices
        values = first_value + value_draws.topk(self.pairs).indices
        # Log-weights plus Gumbel noise, in descending order, are draws by weight without replacement.
        log_weights = (self.power_a - 1) * torch.arange(1, slots + 1, dtype=torch.float64).log()
        queries = context + 2 * (log_weights - (-slot_draws.log()).log()).topk(self.pairs).indices

        if self.noise:
            input_ids = (noise_draws * self.vocab_size).long()
        else:
            input_ids = torch.zeros(batch_size, self.length, dtype=torch.int64)
        input_ids[:, 0:context:2] = keys
        input_ids[:, 1:context:2] = values
        input_ids.scatter_(1, queries, keys)
        labels = torch.full_like(input_ids, IGNORED).scatter_(1, queries + 1, values)
        return TokenBatch(input_ids.to(device), labels.to(device))
