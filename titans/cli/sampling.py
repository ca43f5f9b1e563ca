"""The options of commands that continue a text."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch takes seconds to import: a mistake in the options must not wait for it
    from titans.inference.generate import Sampling


@dataclass(frozen=True, kw_only=True)
class SamplingArguments:
    """How the next token is chosen: the fields of ``titans.inference.generate.Sampling``."""

    max_new_tokens: int = 256
    """Tokens to add, at most."""
    temperature: float = 0.8
    """Below 1 sharpens the distribution, above 1 flattens it."""
    top_k: int = 0
    """Choose among the k likeliest tokens; 0: among all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that hold this share of the probability."""
    greedy: bool = False
    """Always the likeliest token."""
    seed: int = 0
    """The same seed gives the same text."""

    def sampling(self) -> "Sampling":
        """Raises ``UserError`` for a value out of range."""
        from titans.inference.generate import Sampling

        return Sampling(**{field.name: getattr(self, field.name) for field in fields(SamplingArguments)})
