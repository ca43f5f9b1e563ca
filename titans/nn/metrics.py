"""What the memories of a model do while it runs: for logs, and for the first look when a loss explodes."""

from __future__ import annotations

from functools import partial
from types import TracebackType

import torch
from torch import Tensor, nn

from titans.nn.memory import MemoryCore, MemoryWrite
from titans.ops.reference import inner_gradient


class MemoryMetrics:
    """Watches every memory inside `model` as long as the context lasts.

        with MemoryMetrics(model) as metrics:
            loss = model(ids, labels=ids).loss
        metrics.means()  # {"weight_norm": 11.3, "momentum_norm": ..., ...}

    Seen is the last write of each memory: in MAC the last segment's. One more inner gradient of one token
    is all it costs; nothing waits for the device before `means`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.memories = {
            name: module for name, module in model.named_modules() if isinstance(module, MemoryCore)
        }
        self.by_memory: dict[str, dict[str, Tensor]] = {}

    def __enter__(self) -> MemoryMetrics:
        for name, memory in self.memories.items():
            memory.observer = partial(self._observe, name, memory)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for memory in self.memories.values():
            memory.observer = None

    def means(self) -> dict[str, float]:
        """Averages over memories, rows and heads; empty for a model without memories.

        weight_norm, momentum_norm: Frobenius norm of a head's weights (all layers together) and momentum.
        inner_gradient_norm: of the loss that the memory makes on its last token, at its new weights.
        theta, alpha, eta: means of the gates over tokens.
        """
        if not self.by_memory:
            return {}
        names = next(iter(self.by_memory.values()))
        return {
            name: torch.stack([seen[name] for seen in self.by_memory.values()]).mean().item()
            for name in names
        }

    @torch.no_grad()
    def _observe(self, name: str, memory: MemoryCore, write: MemoryWrite) -> None:
        state, initial = write.state, memory.initial
        dtype = state.weights[0].dtype
        if write.rows is None:
            ends: tuple[slice | int, int | list[int]] = (slice(None), -1)
            weights = state.weights
        else:  # packed: the last token of every row that has one
            full = [row for row, length in enumerate(write.rows.lengths) if length]
            ends = (0, [write.rows.starts[row] + write.rows.lengths[row] - 1 for row in full])
            weights = tuple(weight[full] for weight in state.weights)
        k, v = write.k[ends].to(dtype), write.v[ends].to(dtype)
        gradient = inner_gradient(k, v, weights, memory.spec.memory, initial.norm_weight, initial.norm_bias)
        seen = {
            "weight_norm": _norm(state.weights),
            "momentum_norm": _norm(state.momentum),
            "inner_gradient_norm": _norm(gradient),
            "theta": write.gates.theta.mean(),
            "alpha": -torch.expm1(write.gates.log_decay).mean(),
        }
        if write.gates.log_momentum is not None:
            seen["eta"] = write.gates.log_momentum.exp().mean()
        self.by_memory[name] = seen


def _norm(layers: tuple[Tensor, ...]) -> Tensor:
    """Frobenius norm of all layers `[B, H, D_in, D_out]` together, mean over rows and heads."""
    return torch.stack([layer.square().sum((-2, -1)) for layer in layers]).sum(0).sqrt().mean()
