"""Fused GPU kernels in Triton: `impl="triton"`. Importing this module imports Triton; `support` does not.

Reading order: functions.py, gates.py, linear.py, linear_scan.py, mlp_forward.py, mlp_backward.py,
mlp_write_backward.py, states.py (device code); plan.py, dispatch.py, launch.py, linear_passes.py,
mlp_passes.py, passes.py (what runs when). step.py and step_operator.py: one token, for decoding. layer.py,
layer_conv.py, layer_norm.py: what surrounds the memory.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from titans.ops.spec import MemoryState


def fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    log_decay: Tensor,
    log_momentum: Tensor | None,
    state: MemoryState,
    *others: Any,
) -> tuple[Tensor, MemoryState]:
    """`neural_memory` by the kernels; registers their operators at the first call."""
    from titans.ops.kernels import registration  # noqa: F401
    from titans.ops.operator import run_operator

    return run_operator("triton", q, k, v, theta, log_decay, log_momentum, state, *others)


def stepped(*arguments: Any) -> tuple[Tensor, MemoryState]:
    """The same for one token a row without gradients, by `step.py`; registers its operator."""
    from titans.ops.kernels.step_operator import run_step

    return run_step(*arguments)
