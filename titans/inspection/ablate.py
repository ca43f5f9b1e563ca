"""What a position would have read had an earlier span never been written: one run of the stream per span."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from titans.inspection.watch import MemoryWatch, Write
from titans.models import TitansCache
from titans.nn import Gates

ROWS = 8  # spans ablated side by side, one row each, beside the row that is left as it is
_LOGITS = 1 << 25  # at once: 128 MB in fp32, whatever the vocabulary

Array = npt.NDArray[np.floating]
Span = tuple[int, int]


@dataclass(frozen=True)
class Dependence:
    """How tokens depend on the writes of S spans; everything is 0 before a span begins.

    spans: first token and the one after the last, ascending.
    retrieval: `[S, M, T]`, `||y' - y|| / ||y||` of what memory m reads at a token, all heads together.
    prediction: `[S, T]`, KL divergence in nats of the next token's distribution p from p'.
    gain: `[S]`, nats by which the mean loss of the tokens after the span rises without its writes.
    """

    spans: tuple[Span, ...]
    retrieval: Array
    prediction: Array
    gain: Array


class SpanAblation(MemoryWatch):
    """theta = 0 in row 1 + i at the tokens of span i; how far its reads are from row 0's is kept.

    Decay and momentum go on: from the sum that a memory is, exactly the span's own gradients are missing.
    """

    def __init__(self, model: PreTrainedModel, start: int, spans: Sequence[Span], retrieval: Array) -> None:
        super().__init__(model, start)
        self.spans = spans
        self.retrieval = retrieval

    def change_gates(self, index: int, gates: Gates) -> Gates:
        theta, at = gates.theta.clone(), self.read[index]
        for row, (first, last) in enumerate(self.spans, start=1):
            theta[row, max(first - at, 0) : max(last - at, 0)] = 0
        return gates._replace(theta=theta)

    def look(self, index: int, write: Write) -> None:
        output = write.output.flatten(2).float()
        distance = (output[1:] - output[:1]).norm(dim=-1) / output[:1].norm(dim=-1)
        at = self.read[index]
        self.retrieval[:, index, at : at + output.shape[1]] = distance.cpu().numpy()


def equal_spans(tokens: int, count: int, chunk: int, first: int) -> tuple[Span, ...]:
    """At most `count` spans of about equal length that cover the text and begin where chunks begin."""
    chunks = max(1, -(-(tokens - first) // chunk) + 1)
    starts = {max(0, first + (span * chunks // count - 1) * chunk) for span in range(count)}
    bounds = [*sorted(start for start in starts if start < tokens), tokens]
    return tuple(pairwise(bounds))


def groups_of(spans: Sequence[Span]) -> list[Sequence[Span]]:
    """Spans that share a run."""
    return [spans[first : first + ROWS] for first in range(0, len(spans), ROWS)]


def cost(spans: Sequence[Span], tokens: int) -> int:
    """Tokens that `dependence` puts through the model."""
    return sum((1 + len(group)) * (tokens - group[0][0]) for group in groups_of(spans))


@torch.inference_mode()
def dependence(
    model: PreTrainedModel,
    ids: Tensor,
    spans: Sequence[Span],
    caches: Mapping[int, TitansCache],
    progress: Callable[[int], None] = lambda read: None,
) -> Dependence:
    """Run ids, int64 `[T]`, once for every span with its writes left out, and compare every token after it.

    caches: states of the stream before the first span of each group (`groups_of`), from `record`.
    progress: called with the tokens put through the model so far, `cost` in the end.
    """
    tokens, memories = len(ids), len(MemoryWatch(model).memories)
    retrieval = np.zeros((len(spans), memories, tokens), np.float16)
    prediction = np.zeros((len(spans), tokens), np.float32)
    rise = np.zeros(len(spans))
    done, row = 0, 0
    for group in groups_of(spans):
        start, rows = group[0][0], slice(row, row + len(group))
        cache = caches[start].detach()
        cache.batch_repeat_interleave(1 + len(group))
        with SpanAblation(model, start, group, retrieval[rows]):
            for at, piece in _pieces(model, ids, start, 1 + len(group)):
                out = model(input_ids=piece.expand(1 + len(group), -1), past_key_values=cache, use_cache=True)
                divergence, losses = _compare(out.logits, ids[at + 1 : at + 1 + len(piece)].to(piece.device))
                prediction[rows, at : at + len(piece)] = divergence
                for index, (_, last) in enumerate(group):
                    rise[row + index] += losses[index, max(last - at - 1, 0) :].sum()
                done += len(piece) * (1 + len(group))
                progress(done)
        row += len(group)
    after = np.array([max(tokens - last, 1) for _, last in spans])
    return Dependence(tuple(spans), retrieval, prediction, rise / after)


def _pieces(model: PreTrainedModel, ids: Tensor, start: int, rows: int) -> list[tuple[int, Tensor]]:
    size = max(64, min(1024, _LOGITS // (rows * model.config.vocab_size)))
    parts = ids[start:].to(model.device).split(size)
    return [(start + index * size, part) for index, part in enumerate(parts)]


def _compare(logits: Tensor, targets: Tensor) -> tuple[Array, Array]:
    """KL divergence `[S, T]` and rise of the loss `[S, len(targets)]`, both from row 0."""
    logs = F.log_softmax(logits.float(), dim=-1)
    divergence = (logs[:1].exp() * (logs[:1] - logs[1:])).sum(-1).clamp(min=0)
    chosen = logs[:, : len(targets)].gather(-1, targets.expand(len(logs), -1)[..., None])[..., 0]
    return divergence.cpu().numpy(), (chosen[:1] - chosen[1:]).double().cpu().numpy()
