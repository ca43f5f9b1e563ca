"""One pass over a text: surprise, gates and change of every memory, and the loss with and without writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from titans.errors import UserError
from titans.inference.stream import Stream
from titans.inspection.inner import distance, inner_writes, norm
from titans.inspection.watch import MemoryWatch, Write, initial_cache, memories_of
from titans.models import TitansCache
from titans.nn import Gates
from titans.ops import MemoryState

Array = npt.NDArray[np.floating]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Record:
    """What M memories of H heads did with T tokens; L is the number of memory layers, or 1 for shared gates.

    Of forget gates per channel, alpha is the mean over a layer's channels.

    surprise: `[M, H, T]`, Frobenius norm of each token's inner gradient at its chunk's anchor.
    theta, alpha, eta: `[M, H, L, T]`; eta is None without momentum.
    change: `[M, H, N]`, `||M - M_0||` after `change_at` `[N]` tokens: at every chunk's start and the end.
    initial_norm: `[M, H]`, `||M_0||`.
    loss, frozen_loss: `[T - 1]`, nats, of tokens 1 to T - 1: as the model is, and with nothing written.
    """

    surprise: Array
    theta: Array
    alpha: Array
    eta: Array | None
    change: Array
    change_at: npt.NDArray[np.int64]
    initial_norm: Array
    loss: Array
    frozen_loss: Array


class Recorder(MemoryWatch):
    """Keeps the figures of every write; gates in fp16, for 24 blocks x 16 heads x 50,000 tokens add up."""

    def __init__(self, model: PreTrainedModel, tokens: int) -> None:
        super().__init__(model)
        count, spec = len(self.memories), self.memories[0].spec
        self.surprise = np.zeros((count, spec.heads, tokens), np.float32)
        self.gates: dict[str, Array] = {}
        self.change: list[list[Tensor]] = [[] for _ in self.memories]
        self.change_at: list[list[int]] = [[] for _ in self.memories]
        self.last: list[MemoryState | None] = [None] * count
        self.tokens = tokens

    def look(self, index: int, write: Write) -> None:
        memory, start = self.memories[index], self.read[index]
        stop = start + write.k.shape[1]
        names = dict(zip(("theta", "alpha", "eta"), _plain(write.gates), strict=True))
        for name, gate in names.items():
            if gate is not None:
                values = gate[0].reshape(*gate.shape[1:3], -1).permute(1, 2, 0)  # [H, L, T]
                if name not in self.gates:
                    shape = (len(self.memories), *values.shape[:2], self.tokens)
                    self.gates[name] = np.zeros(shape, np.float16)
                self.gates[name][index, :, :, start:stop] = values.cpu().numpy()
        surprise, change, at = inner_writes(memory, write.k, write.v, write.gates, write.before.memory)
        self.surprise[index, :, start:stop] = surprise.cpu().numpy()
        self.change[index].append(change)
        self.change_at[index] += [start + each for each in at]
        self.last[index] = write.after.memory

    def finish(self, loss: Array, frozen_loss: Array) -> Record:
        change = []
        for memory, state, parts in zip(self.memories, self.last, self.change, strict=True):
            assert state is not None
            change.append(torch.cat([*parts, distance(state.weights, memory.initial.weights)]).T.cpu())
        initial = [norm(memory.initial.weights) for memory in self.memories]
        return Record(
            surprise=self.surprise,
            theta=self.gates["theta"],
            alpha=self.gates["alpha"],
            eta=self.gates.get("eta"),
            change=torch.stack(change).float().numpy(),
            change_at=np.array([*self.change_at[0], self.tokens]),
            initial_norm=torch.stack(initial).float().cpu().numpy(),
            loss=loss,
            frozen_loss=frozen_loss,
        )


class FrozenMemory(MemoryWatch):
    """Nothing is written and nothing forgotten: every token reads the memory as the first one found it.

    theta = 0 alone would not do: forgetting would go on and empty the memory, and momentum left by the
    persistent tokens would still move it. So alpha = 0 and eta = 0, too.
    """

    def change_gates(self, index: int, gates: Gates) -> Gates:
        nothing, momentum = torch.zeros_like(gates.theta), gates.log_momentum
        return Gates(nothing, nothing, None if momentum is None else torch.full_like(momentum, -math.inf))


@torch.inference_mode()
def record(
    model: PreTrainedModel, ids: Tensor, stops: Sequence[int] = (), progress: Progress = lambda read: None
) -> tuple[Record, dict[int, TitansCache]]:
    """Read ids, int64 `[T]`, T >= 2, twice: as the model is, and with its memories frozen.

    stops: positions whose states are returned: those of the stream before it reads these tokens.
    progress: called with the number of tokens read, 2 T in the end.

    Raises:
        UserError: the model has no memory, or a loss is not finite.
    """
    tokens, first_stop = len(ids), first_boundary(model)
    start = initial_cache(model)
    # Pieces end where chunks end, so that a memory's change is known at the chunks' starts and nowhere else.
    bounds = sorted({0, *(stop for stop in (first_stop, *stops) if stop < tokens), tokens})
    losses, caches = [], {}
    with Recorder(model, tokens) as recorder:
        stream = Stream(model, start.detach())
        for first, last in pairwise(bounds):
            if first in stops:
                caches[first] = stream.fork().cache if first else start
            losses.append(stream.losses(ids[first:last], partial(_from, progress, first)))
    assert set(recorder.read) == {tokens}, "a memory was written past the watch"
    loss = torch.cat(losses)
    with FrozenMemory(model):
        frozen = Stream(model, start.detach()).losses(ids, partial(_from, progress, tokens))
    for name, each in (("loss", loss), ("loss without writes", frozen)):
        if not bool(torch.isfinite(each).all()):
            where = int((~torch.isfinite(each)).nonzero()[0]) + 1
            raise UserError(f"the {name} is not finite (NaN or infinity) at token {where}")
    return recorder.finish(loss.float().cpu().numpy(), frozen.float().cpu().numpy()), caches


def first_boundary(model: PreTrainedModel) -> int:
    """How many tokens of a text the first chunk takes: all, or what the persistent tokens leave of it."""
    chunk = memories_of(model)[0].spec.chunk_size
    state = initial_cache(model).states[0]
    while not isinstance(state, MemoryState):  # a mixer's state holds the layer's, and that the memory's
        state = state.memory
    return chunk - int(state.position[0])


def _plain(gates: Gates) -> tuple[Tensor, Tensor, Tensor | None]:
    """theta, alpha = 1 - decay, eta."""
    momentum = gates.log_momentum
    return gates.theta, gates.alpha, None if momentum is None else momentum.exp()


def _from(progress: Progress, start: int, read: int) -> None:
    progress(start + read)
