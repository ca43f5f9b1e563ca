"""Continue a text token by token, in constant memory however long the prompt and the continuation are."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from titans.errors import UserError
from titans.inference.stream import Stream


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 256
    """Tokens to add, at most."""
    temperature: float = 0.8
    """Below 1 sharpens the distribution, above 1 flattens it."""
    top_k: int = 0
    """Choose among the k likeliest tokens; 0: among all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that hold this share of the probability."""
    greedy: bool = False
    """Always the likeliest token; the three above do not apply."""
    seed: int = 0
    """The same seed gives the same text."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens: expected at least 1, got {self.max_new_tokens}")
        if not self.temperature > 0:
            raise UserError(f"temperature: expected a number above 0 (or greedy), got {self.temperature}")
        if self.top_k < 0:
            raise UserError(f"top_k: expected 0 (all tokens) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: expected a number above 0 and up to 1, got {self.top_p}")

    def warpers(self) -> LogitsProcessorList:
        """transformers' own filters for these settings."""
        filters = LogitsProcessorList([TemperatureLogitsWarper(self.temperature)])
        if self.top_k:
            filters.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            filters.append(TopPLogitsWarper(self.top_p))
        return filters


def generate_ids(stream: Stream, sampling: Sampling, stop_ids: frozenset[int] = frozenset()) -> Iterator[int]:
    """Token ids that continue what `stream` has read, until one of `stop_ids` (not yielded).

    The stream reads on: in the end it has read every token that was yielded.

    Raises:
        UserError: the stream has read nothing, or the model's logits are not finite.
    """
    if stream.logits is None:
        raise UserError("the prompt is empty: expected at least one token")
    filters = sampling.warpers()
    generator = torch.Generator(stream.model.device).manual_seed(sampling.seed)
    for _ in range(sampling.max_new_tokens):
        token = _choose(stream.logits[None].float(), sampling, filters, generator)
        if token in stop_ids:
            return
        yield token
        stream.step(token)


@torch.inference_mode()
def _choose(
    logits: torch.Tensor, sampling: Sampling, filters: LogitsProcessorList, generator: torch.Generator
) -> int:
    if not bool(torch.isfinite(logits).all()):
        raise UserError("the model's logits are not finite (NaN or infinity): its weights are damaged")
    if sampling.greedy:
        return int(logits.argmax(-1))
    probabilities = filters(None, logits).softmax(-1)  # they ignore the ids
    return int(torch.multinomial(probabilities, 1, generator=generator))


def generate_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, sampling: Sampling
) -> Iterator[str]:
    """Pieces of text that continue ``prompt``, as soon as they are certain.

    Raises:
        UserError: the prompt is empty.
    """
    if not prompt:
        raise UserError("the prompt is empty: expected at least one character")
    stream = Stream(model)
    stream.read(torch.tensor(tokenizer(prompt)["input_ids"], dtype=torch.int64))
    yield from continue_text(stream, tokenizer, sampling)


def continue_text(stream: Stream, tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> Iterator[str]:
    """Pieces of text that continue what ``stream`` has read, as soon as they are certain."""
    stop_ids = frozenset(
        int(token) for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None
    )
    pending: list[int] = []
    for token in generate_ids(stream, sampling, stop_ids):
        pending.append(token)
        text = str(tokenizer.decode(pending))
        # A character's bytes may be spread over tokens: what does not decode yet may with the next ones
        # (UTF-8 needs four at most).
        if text.endswith("\ufffd") and len(pending) < 4:
            continue
        yield text
        pending = []
    if pending:
        yield str(tokenizer.decode(pending))
