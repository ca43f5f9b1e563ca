"""Walking through a mixer's state: every tensor and count that a stream has of its own, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor

from titans.nn import Prefix

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
