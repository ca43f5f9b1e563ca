"""What the writes of a group leave for its reads and for the backward."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from titans.ops.chunked.inner import InnerTrace


@dataclass
class Written:
    """A group after its writes: traces and updates of all its chunks, state at the start of each and after."""

    traces: list[InnerTrace]
    updates: list[Tensor]
    start_weights: list[Tensor]
    start_momentum: list[Tensor]
    weights: list[Tensor]
    momentum: list[Tensor]
