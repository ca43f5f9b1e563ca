"""What the memories of a model do while it runs: for logs, and for the first look when a loss explodes."""

from __future__ import annotations

from collections.abc import Callable
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
            "alpha": write.gates.alpha.mean(),
        }
        if write.gates.log_momentum is not None:
            seen["eta"] = write.gates.log_momentum.exp().mean()
        self.by_memory[name] = seen


class WriteShares:
    """How much of the largest step all tokens take, differentiable: a term for the loss.

        with WriteShares(model) as shares:
            loss = model(ids, labels=ids).loss
        loss = loss + 0.1 * shares.mean()

    Who else observes the memories still does.
    """

    def __init__(self, model: nn.Module) -> None:
        self._memories = [module for module in model.modules() if isinstance(module, MemoryCore)]
        self._before = [memory.observer for memory in self._memories]
        self._shares: list[Tensor] = []

    def __enter__(self) -> WriteShares:
        for memory, before in zip(self._memories, self._before, strict=True):
            memory.observer = partial(self._observe, memory, before)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for memory, before in zip(self._memories, self._before, strict=True):
            memory.observer = before

    def mean(self) -> Tensor:
        """Mean over memories, tokens, heads and memory layers, 0 to 1; zero for a model without memories."""
        return torch.stack(self._shares).mean() if self._shares else torch.zeros(())

    def _observe(
        self, memory: MemoryCore, before: Callable[[MemoryWrite], None] | None, write: MemoryWrite
    ) -> None:
        if before is not None:
            before(write)
        pairs = memory.gates.steps_and_bounds(write.gates.theta)
        self._shares += [layer.mean() / bound for layer, bound in pairs]


def _norm(layers: tuple[Tensor, ...]) -> Tensor:
    """Frobenius norm of all layers `[B, H, D_in, D_out]` together, mean over rows and heads."""
    return torch.stack([layer.square().sum((-2, -1)) for layer in layers]).sum(0).sqrt().mean()
