"""`StepGraph`: the forward pass of a token a row, recorded once as a CUDA graph and replayed for every token.

Decoding launches some hundred small kernels a token, which takes longer than to run them; a replay launches
them all at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titans.models import TitansCache, TitansForCausalLM
from titans.models.state import Leaf, leaves, map_leaves
from titans.nn.cuda_graph import record


class StepGraph:
    """The model's step on buffers of its own: the token goes in, the state moves on where it lies.

    For states whose shapes a step leaves as they are (`keeps_its_shape`): those that `for_steps` makes, but
    for full attention. Their rings are written where they lie, the rest is copied back. As many rows as the
    states have.
    """

    def __init__(self, model: TitansForCausalLM, states: list[Any]) -> None:
        self._model = model
        rows = next(iter(_tensors(states).values())).shape[0]
        self._ids = torch.zeros(rows, 1, dtype=torch.int64, device=model.device)
        self._states = map_leaves(states, _copied)
        self._logits = torch.empty(0)
        self._graph = record(self._step)  # moves the buffers on: `load` comes next

    def fits(self, states: list[Any]) -> bool:
        return _shapes(self._states) == _shapes(states)

    @torch.inference_mode()
    def load(self, states: list[Any]) -> None:
        """Go on from `states`, which are left alone."""
        given = _tensors(states)
        for name, buffer in _tensors(self._states).items():
            buffer.copy_(given[name])

    def states(self) -> list[Any]:
        """A copy of the state as it is now."""
        return map_leaves(self._states, _copied)

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Read a token in each row, `[B]`; the logits `[B, V]` after them."""
        self._ids.copy_(tokens[:, None])
        self._graph.replay()
        return self._logits.clone()

    @torch.inference_mode()
    def _step(self) -> None:
        cache = TitansCache()
        cache.states, cache.variant = list(self._states), self._model.config.variant
        out = self._model(self._ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        buffers, after = _tensors(self._states), _tensors(cache.states)
        places = {buffer.untyped_storage().data_ptr() for buffer in buffers.values()}
        for name, leaf in after.items():
            # What a step hands on as it was, an anchor for one, would be overwritten while it is copied.
            if leaf is not buffers[name] and leaf.untyped_storage().data_ptr() in places:
                after[name] = leaf.clone()
        for name, buffer in buffers.items():
            if after[name] is not buffer:  # a ring has moved on where it lies
                buffer.copy_(after[name])
        self._logits = out.logits[:, -1]


def keeps_its_shape(before: list[Any], after: list[Any]) -> bool:
    """Whether a step from the one state to the other can be recorded."""
    return _shapes(before) == _shapes(after)


def _tensors(states: list[Any]) -> dict[str, Tensor]:
    return {name: leaf for name, leaf in leaves(states).items() if isinstance(leaf, Tensor)}


def _shapes(states: list[Any]) -> list[tuple[str, Any]]:
    return [
        (name, leaf if isinstance(leaf, int) else (leaf.shape, leaf.dtype))
        for name, leaf in leaves(states).items()
    ]


def _copied(_: str, leaf: Leaf) -> Leaf:
    return leaf if isinstance(leaf, int) else leaf.clone(memory_format=torch.contiguous_format)
