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

CONTROL = (
    1e-6  # the share by which the control changes its steps: what follows is the recurrence's own growth
)
ROWS = 8  # spans ablated side by side, one row each, beside the row that is left as it is
_LOGITS = 1 << 25  # at once: 128 MB in fp32, whatever the vocabulary

Array = npt.NDArray[np.floating]
Span = tuple[int, int]


@dataclass(frozen=True)
class Dependence:
    """How tokens depend on the writes of S spans; everything is 0 before a span begins.

    Row S is a control: nothing is left out, but the steps of the first span are larger by one part in a
    million. Where a span's figure is no larger than the control's, the token depends on what that span held
    no more than on rounding: the recurrence can make much of any difference.

    spans: first token and the one after the last, ascending.
    retrieval: `[S + 1, M, T]`, `||y' - y|| / ||y||` of what memory m reads at a token, all heads together.
    prediction: `[S + 1, T]`, KL divergence in nats of the next token's distribution p from p'.
    gain: `[S]`, nats by which the mean loss of the tokens after the span rises without its writes.
    """

    spans: tuple[Span, ...]
    retrieval: Array
    prediction: Array
    gain: Array


class SpanAblation(MemoryWatch):
    """theta in row 1 + i times `factors[i]` at span i's tokens; how far its reads are from row 0's is kept.

    Decay and momentum go on: with factor 0, from the sum that a memory is, exactly the span's own gradients
    are missing.
    """

    def __init__(
        self, model: PreTrainedModel, start: int, spans: Sequence[Span], factors: Sequence[float], out: Array
    ) -> None:
        super().__init__(model, start)
        self.spans, self.factors, self.out = spans, factors, out

    def change_gates(self, index: int, gates: Gates) -> Gates:
        theta, at = gates.theta.clone(), self.read[index]
        for row, ((first, last), factor) in enumerate(zip(self.spans, self.factors, strict=True), start=1):
            theta[row, max(first - at, 0) : max(last - at, 0)] *= factor
        return gates._replace(theta=theta)

    def look(self, index: int, write: Write) -> None:
        output = write.output.flatten(2).float()
        distance = (output[1:] - output[:1]).norm(dim=-1) / output[:1].norm(dim=-1)
        at = self.read[index]
        self.out[:, index, at : at + output.shape[1]] = distance.cpu().numpy()


def equal_spans(tokens: int, count: int, chunk: int, first: int) -> tuple[Span, ...]:
    """At most `count` spans of about equal length that cover the text and begin where chunks begin."""
    chunks = max(1, -(-(tokens - first) // chunk) + 1)
    starts = {max(0, first + (span * chunks // count - 1) * chunk) for span in range(count)}
    bounds = [*sorted(start for start in starts if start < tokens), tokens]
    return tuple(pairwise(bounds))


def groups_of(spans: Sequence[Span]) -> list[list[int]]:
    """Indices of the spans that share a run; len(spans) is the control, in the first run."""
    groups = [[*range(first, min(first + ROWS, len(spans)))] for first in range(0, len(spans), ROWS)]
    groups[0].append(len(spans))
    return groups


def starts_of(spans: Sequence[Span]) -> list[int]:
    """Where the runs begin: the states that `dependence` needs."""
    return [spans[group[0]][0] for group in groups_of(spans)] if spans else []


def cost(spans: Sequence[Span], tokens: int) -> int:
    """Tokens that `dependence` puts through the model."""
    groups = zip(groups_of(spans), starts_of(spans), strict=True) if spans else ()
    return sum((1 + len(group)) * (tokens - start) for group, start in groups)


@torch.inference_mode()
def dependence(
    model: PreTrainedModel,
    ids: Tensor,
    spans: Sequence[Span],
    caches: Mapping[int, TitansCache],
    progress: Callable[[int], None] = lambda read: None,
) -> Dependence:
    """Run ids, int64 `[T]`, once for every span with its writes left out, and compare every token after it.

    caches: states of the stream before the tokens `starts_of`, from `record`.
    progress: called with the tokens put through the model so far, `cost` in the end.
    """
    tokens, memories = len(ids), len(MemoryWatch(model).memories)
    retrieval = np.zeros((len(spans) + 1, memories, tokens), np.float16)
    prediction = np.zeros((len(spans) + 1, tokens), np.float32)
    rise = np.zeros(len(spans) + 1)
    changed = [*spans, spans[0]]
    factors = [0.0] * len(spans) + [1 + CONTROL]
    done = 0
    for group, start in zip(groups_of(spans), starts_of(spans), strict=True):
        rows = 1 + len(group)
        cache = caches[start].detach()
        cache.batch_repeat_interleave(rows)
        reads = np.zeros((len(group), memories, tokens), np.float16)
        with SpanAblation(model, start, [changed[i] for i in group], [factors[i] for i in group], reads):
            for at, piece in _pieces(model, ids, start, rows):
                out = model(input_ids=piece.expand(rows, -1), past_key_values=cache, use_cache=True)
                divergence, losses = _compare(out.logits, ids[at + 1 : at + 1 + len(piece)].to(piece.device))
                prediction[group, at : at + len(piece)] = divergence
                for index, row in zip(group, losses, strict=True):
                    rise[index] += row[max(changed[index][1] - at - 1, 0) :].sum()
                done += len(piece) * rows
                progress(done)
        retrieval[group] = reads
    for index, (first, _) in enumerate(changed):  # rows are rounded differently: not 0 by themselves
        retrieval[index, :, :first] = prediction[index, :first] = 0
    after = np.array([max(tokens - last, 1) for _, last in spans])
    return Dependence(tuple(spans), retrieval, prediction, rise[: len(spans)] / after)


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
