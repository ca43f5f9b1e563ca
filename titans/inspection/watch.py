"""Standing between the memories of a model and their op: to look at every write, or to change its gates."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import NamedTuple, Self

from torch import Tensor
from transformers import PreTrainedModel

from titans.errors import UserError
from titans.models import TitansCache
from titans.nn import Gates, MemoryCore, NeuralMemoryState, Rows

WriteFunction = Callable[..., tuple[Tensor, NeuralMemoryState]]


class Write(NamedTuple):
    """One call of a memory's op. k, v, output: `[B, T, H, D]`; the state before and after it."""

    k: Tensor
    v: Tensor
    gates: Gates
    before: NeuralMemoryState
    output: Tensor
    after: NeuralMemoryState


class MemoryWatch:
    """Takes part in every write of every memory inside `model` as long as the context lasts.

    A subclass may change the gates (`change_gates`) and look at what the op did with them (`look`). Both are
    told the memory's index, from the first block up; `self.read[index]` is the number of tokens that it has
    read before this call (MAC calls once a segment). All rows read the same number of tokens.

    `MemoryCore.observer` sees neither the state before a write nor its output, and module hooks miss MAC,
    which calls the steps of a memory one by one: `MemoryCore.write` is what all variants go through.
    """

    def __init__(self, model: PreTrainedModel, read: int = 0) -> None:
        self.memories = memories_of(model)
        self.read = [read] * len(self.memories)

    def change_gates(self, index: int, gates: Gates) -> Gates:
        """The gates that the op gets instead; `[B, T, H]` or `[B, T, H, L]`."""
        return gates

    def look(self, index: int, write: Write) -> None:
        """Called after the op."""

    def __enter__(self) -> Self:
        for index, memory in enumerate(self.memories):
            # An attribute of this very module, in front of its class's method.
            memory.write = partial(self._write, index, memory.write)  # type: ignore[method-assign]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for memory in self.memories:
            del memory.write

    def _write(
        self,
        index: int,
        write: WriteFunction,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Gates,
        state: NeuralMemoryState,
        rows: Rows | None = None,
    ) -> tuple[Tensor, NeuralMemoryState]:
        assert rows is None, "rows of one length are never packed"
        gates = self.change_gates(index, gates)
        output, after = write(q, k, v, gates, state, rows)
        self.look(index, Write(k, v, gates, state, output, after))
        self.read[index] += k.shape[1]
        return output, after


def memories_of(model: PreTrainedModel) -> list[MemoryCore]:
    """The memories of a model, from the first block up.

    Raises:
        UserError: it has none.
    """
    found = [module for module in model.modules() if isinstance(module, MemoryCore)]
    if not found:
        variant = getattr(model.config, "variant", model.config.model_type)
        raise UserError(f"the model has no memory to look at (variant {variant!r})")
    return found


def initial_cache(model: PreTrainedModel) -> TitansCache:
    """The state of one stream before its first token, the persistent tokens read already.

    Made before a watch begins: what the memories make of persistent tokens is no part of the text.
    """
    cache = TitansCache()
    cache.states = [layer.mixer.initial_state(1) for layer in model.model.layers]
    cache.variant = model.config.variant
    return cache
