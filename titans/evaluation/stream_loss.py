"""Loss by position over one long stream: does the model still predict well far from the start?

The stream goes through the model in pieces with the cache carried along, so memory does not grow with it.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from titans.data.tokenizer import TextEncoder
from titans.errors import UserError
from titans.inference.stream import Stream


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Positions ``start`` <= p < ``stop`` of the stream, p being the predicted token's.

    ``loss`` is the mean in nats per token; ``memory_bytes`` what the process (or the GPU) holds when it ends.
    """

    start: int
    stop: int
    tokens: int
    loss: float
    tokens_per_second: float
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class StreamLoss:
    """The whole stream's figures and each bucket's; ``peak_memory_bytes`` is the maximum seen."""

    tokens: int
    loss: float
    tokens_per_second: float
    peak_memory_bytes: int
    piece: int
    buckets: tuple[Bucket, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def powers_of_two(length: int, first: int = 256) -> list[int]:
    """Edges first, 2 first, 4 first, ... below ``length``."""
    return [first << i for i in range(max(0, (length - 1) // first).bit_length())]


def as_stream(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> torch.Tensor:
    """All ``texts``, one after the other, as one sequence of token ids, int64 [T].

    Only the first is preceded by the tokenizer's <bos>, if it has one: a model never learns to predict it.
    """
    parts = [torch.from_numpy(ids.astype("int64")) for ids in TextEncoder(tokenizer)(list(texts))]
    if tokenizer.bos_token_id is not None:
        parts.insert(0, torch.tensor([tokenizer.bos_token_id]))
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def stream_loss(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    *,
    piece: int = 1024,
    edges: Sequence[int] | None = None,
    progress: Callable[[int], None] = lambda position: None,
) -> StreamLoss:
    """Read ``tokens`` once through ``model``, ``piece`` tokens at a time, and average the loss by position.

    Args:
        model: a causal language model whose cache continues from any position.
        tokens: int64 [T], T >= 2; on any device (it is moved piece by piece).
        piece: tokens per forward pass: speed and memory, not the result.
        edges: positions at which a new bucket starts, ascending; None for powers of two from 256.
        progress: called with the number of tokens read after each piece.

    Raises:
        UserError: fewer than two tokens, ids outside the vocabulary, edges out of order, or a loss that is
            not finite (the message names the position).
    """
    length = len(tokens)
    edges = powers_of_two(length) if edges is None else list(edges)
    _check(model, tokens, piece, edges)
    bounds = [0, *(edge for edge in edges if edge < length), length]
    stream = Stream(model, piece=piece)
    meter = _MemoryMeter(model.device)

    buckets: list[Bucket] = []
    started = clock = time.perf_counter()
    for start, stop in itertools.pairwise(bounds):
        total, count = 0.0, 0
        # Pieces end at the bucket's edge, so that each bucket's time and memory are its own.
        for ids in tokens[start:stop].split(piece):
            losses = stream.losses(ids)
            piece_loss = float(losses.sum(dtype=torch.float64))
            if not math.isfinite(piece_loss):
                last = stream.tokens_read
                raise UserError(
                    f"the loss is not finite (NaN or infinity) between tokens {last - len(ids)} and {last}"
                )
            total += piece_loss
            count += len(losses)
            meter.sample()
            progress(stream.tokens_read)
        now = time.perf_counter()
        if count:
            buckets.append(
                Bucket(
                    start=start,
                    stop=stop,
                    tokens=count,
                    loss=total / count,
                    tokens_per_second=(stop - start) / (now - clock),
                    memory_bytes=meter.now,
                )
            )
        clock = now
    return StreamLoss(
        tokens=length,
        loss=sum(bucket.loss * bucket.tokens for bucket in buckets) / (length - 1),
        tokens_per_second=length / (time.perf_counter() - started),
        peak_memory_bytes=meter.peak,
        piece=piece,
        buckets=tuple(buckets),
    )


class _MemoryMeter:
    """Bytes in use now and at most: the GPU's allocations, or the process's resident memory."""

    def __init__(self, device: torch.device):
        self._device = device
        self.now = self.peak = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.sample()

    def sample(self) -> None:
        if self._device.type == "cuda":
            self.now = torch.cuda.memory_allocated(self._device)
            self.peak = torch.cuda.max_memory_allocated(self._device)
        else:
            self.now = resident_bytes()
            self.peak = max(self.peak, self.now)


def resident_bytes() -> int:
    """What this process holds of the machine's memory."""
    import psutil  # type: ignore[import-untyped]  # comes with accelerate

    return int(psutil.Process().memory_info().rss)


def _check(model: PreTrainedModel, tokens: torch.Tensor, piece: int, edges: Sequence[int]) -> None:
    if tokens.dim() != 1 or len(tokens) < 2:
        raise UserError(f"tokens: expected one sequence of at least 2 tokens, got shape {list(tokens.shape)}")
    if piece < 1:
        raise UserError(f"piece: expected at least 1 token, got {piece}")
    if any(low >= high for low, high in itertools.pairwise([0, *edges])):
        raise UserError(f"edges: expected ascending positions above 0, got {list(edges)}")
    lowest, highest = int(tokens.min()), int(tokens.max())
    if lowest < 0 or highest >= model.config.vocab_size:
        raise UserError(
            f"tokens: expected ids from 0 to {model.config.vocab_size - 1} (the model's vocabulary), "
            f"got {lowest} to {highest}"
        )
