"""Work that is recorded once and replayed: hundreds of launches for the host's time of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

WARMUPS = 3  # runs before the recording, in which kernels are compiled and chosen


def can_record(device: torch.device) -> bool:
    return device.type == "cuda"


def record(step: Callable[[], object], pool: Any = None) -> torch.cuda.CUDAGraph:
    """`step`, which may not wait for the device, as a CUDA graph; its `replay()` runs it again.

    step reads and writes the same memory in every run. pool: another graph's `pool()`, to be shared with it:
    what the one has left there is gone when the other is replayed.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUPS):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Other threads, which load data, may allocate meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        step()
    return graph
