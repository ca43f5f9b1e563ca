"""Selective copying: tokens strewn among blanks, to be repeated in order."""

from dataclasses import dataclass

import torch

from titans.data.dataset import IGNORED
from titans.evaluation.recall import TokenBatch, expect, uniforms


@dataclass(frozen=True, kw_only=True)
class SelectiveCopy:
    """MAD's selective copying (arXiv 2403.17844); the defaults are its baseline.

    A sample holds tokens and blanks, a marker, and a blank for every token to be given back (b: blank,
    m: marker; 3 tokens)::

        input_ids  b    5    b    b    2    2    m    b    b    b    b
        labels     .    .    .    .    .    .    .    .    5    2    2

    Tokens are drawn from 0 ... V - 3 and may repeat. Each blank before the marker falls before any of the
    tokens with the same probability, so the last token always stands beside the marker. MAD reads the first
    token at the first blank after the marker and the last at the sequence's end. Its label stands one further
    here (`titans.evaluation.recall`), hence one blank more: MAD's ``seq_len`` is ``length`` - 1.

    Args:
        vocab_size: V, blank and marker included.
        length: T, tokens in a sample.
        tokens: how many are to be copied.
        seed: which endless supply of samples this is.

    Raises:
        ValueError: an argument is out of its range.
    """

    vocab_size: int = 16
    length: int = 257
    tokens: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        expect(self.vocab_size >= 4, "vocab_size", "at least 4 (two tokens, blank, marker)", self.vocab_size)
        expect(self.tokens >= 1, "tokens", "at least 1", self.tokens)
        shortest = 2 * self.tokens + 3
        expect(
            self.length >= shortest,
            "length",
            f"at least {shortest} (twice {self.tokens} tokens, the marker and two blanks)",
            self.length,
        )
        expect(self.seed >= 0, "seed", "at least 0", self.seed)

    @property
    def blank(self) -> int:
        """The token that is to be ignored."""
        return self.vocab_size - 2

    @property
    def marker(self) -> int:
        """The token after which the copy is asked for."""
        return self.vocab_size - 1

    def batch(self, index: int, batch_size: int, device: torch.device | str = "cpu") -> TokenBatch:
        """Batch ``index``, int64 [batch_size, length] on ``device``; the tokens depend on nothing else.

        Raises:
            ValueError: a negative ``index`` or a ``batch_size`` below 1.
        """
        marked = self.length - self.tokens - 2
        blanks = marked - self.tokens
        draws = uniforms(self.seed, index, batch_size, self.tokens + blanks)
        token_draws, blank_draws = draws.split([self.tokens, blanks], dim=1)
        copied = (token_draws * (self.vocab_size - 2)).long()

        # A token's position: the tokens before it and the blanks that fell before it or one of those.
        fell_before = (blank_draws * self.tokens).long()
        counts = torch.zeros_like(copied).scatter_add_(1, fell_before, torch.ones_like(fell_before))
        positions = torch.arange(self.tokens) + counts.cumsum(1)

        input_ids = torch.full((batch_size, self.length), self.blank)
        input_ids.scatter_(1, positions, copied)
        input_ids[:, marked] = self.marker
        labels = torch.full_like(input_ids, IGNORED)
        labels[:, -self.tokens :] = copied
        return TokenBatch(input_ids.to(device), labels.to(device))
