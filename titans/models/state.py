"""Walking through a mixer's state: every tensor and count that a stream has of its own, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from titans.models.configuration import TitansConfig
from titans.models.mac import MacState
from titans.nn import AttentionState, Prefix, Segment
from titans.nn.attention_ring import AttentionRing
from titans.nn.context_attention import SegmentRing

Leaf = Tensor | int


def map_leaves(state: Any, change: Callable[[str, Leaf], Leaf], name: str = "") -> Any:
    """A state like `state`, every leaf of it replaced by `change(name, leaf)`.

    Leaves are tensors and host counts (columns of a window, tokens of a segment); their names are paths such
    as "memory.memory.weights.0". The prefix is no leaf: it is the model's, the same for every stream.
    """
    if state is None or isinstance(state, Prefix):
        return state
    if isinstance(state, Tensor | int):
        return change(name, state)
    dot = f"{name}." if name else ""
    if isinstance(state, list | tuple):
        return type(state)(map_leaves(part, change, f"{dot}{index}") for index, part in enumerate(state))
    assert is_dataclass(state), f"a state holds tensors, counts, tuples and dataclasses, not {type(state)}"
    parts = {
        field.name: map_leaves(getattr(state, field.name), change, f"{dot}{field.name}")
        for field in fields(state)
    }
    return replace(state, **parts)  # type: ignore[type-var]  # the narrowed type may be a class


def leaves(state: Any) -> dict[str, Leaf]:
    """The leaves of a state by name, in a fixed order."""
    found: dict[str, Leaf] = {}

    def note(name: str, leaf: Leaf) -> Leaf:
        found[name] = leaf
        return leaf

    map_leaves(state, note)
    return found


def compact(state: Any) -> Any:
    """The same numbers in tensors of their own size: no leaf keeps a larger one alive that it is a view of.

    A piece of T tokens leaves tails and windows that are views of buffers of T tokens and more.
    """

    def own(_: str, leaf: Leaf) -> Leaf:
        if isinstance(leaf, int) or (leaf.is_contiguous() and leaf.untyped_storage().nbytes() == leaf.nbytes):
            return leaf
        return leaf.contiguous().clone() if leaf.is_contiguous() else leaf.contiguous()

    return map_leaves(state, own)


@torch.no_grad()
def for_steps(states: list[Any], config: TitansConfig) -> list[Any]:
    """The same states, windows and segments as rings, which steps of one token a row then write in place.

    For who owns the states: rings must not be shared. They are copies, without gradients; what is a ring
    already stays the one it is. Full attention has none: it keeps every token. `unrolled` is the way back.
    """

    def ring(part: Any) -> Any:
        if isinstance(part, AttentionState) and config.window_size is not None:
            return AttentionRing.of(part, config.window_size, config.rope_theta)
        if isinstance(part, MacState) and isinstance(part.segment, Segment):
            size, theta = config.segment_size, config.rope_theta
            return replace(part, segment=SegmentRing.of(part.segment, part.prefix, size, theta))
        return part

    changed: list[Any] = _map_parts(states, ring)
    return changed


@torch.no_grad()
def unrolled(states: list[Any]) -> list[Any]:
    """The same states without rings: those are copied, everything else stays the object that it is."""

    def state_of(part: Any) -> Any:
        return part.unrolled() if isinstance(part, AttentionRing | SegmentRing) else part

    changed: list[Any] = _map_parts(states, state_of)
    return changed


def _map_parts(state: Any, change: Callable[[Any], Any]) -> Any:
    """Change the parts of nested states from the outside in; nothing is changed within what was replaced."""
    if (changed := change(state)) is not state:
        return changed
    if state is None or isinstance(state, Tensor | int | Prefix):
        return state
    if isinstance(state, list | tuple):
        return type(state)(_map_parts(part, change) for part in state)
    parts = {field.name: _map_parts(getattr(state, field.name), change) for field in fields(state)}
    same = all(getattr(state, name) is part for name, part in parts.items())
    return state if same else replace(state, **parts)
