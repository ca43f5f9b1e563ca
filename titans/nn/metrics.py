"""What the memories of a model do while it runs: for logs, and for the first look when a loss explodes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import TracebackType

import torch
from torch import Tensor, nn

from titans.nn.memory import MemoryCore, MemoryWrite
from titans.ops.reference import inner_gradient

NOTHING = 1e-3  # largest steps in all of a batch: a layer that writes less than this has no share of noise


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
    """How much of the largest step every token takes, 0 to 1, differentiable: for a term of the loss.

        with WriteShares(model) as shares:
            loss = model(ids, labels=ids).loss
        loss = loss + 0.1 * shares.mean()

    Who else observes the memories still does.
    """

    def __init__(self, model: nn.Module) -> None:
        self._memories = [module for module in model.modules() if isinstance(module, MemoryCore)]
        self._before = [memory.observer for memory in self._memories]
        self._writes: list[list[tuple[Tensor, ...]]] = [[] for _ in self._memories]

    def __enter__(self) -> WriteShares:
        for memory, before, writes in zip(self._memories, self._before, self._writes, strict=True):
            memory.observer = partial(self._observe, memory, before, writes)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for memory, before in zip(self._memories, self._before, strict=True):
            memory.observer = before

    def mean(self) -> Tensor:
        """Mean over memories, tokens, heads and memory layers; zero for a model without memories."""
        means = [layer.mean() for writes in self._writes for write in writes for layer in write]
        return torch.stack(means).mean() if means else torch.zeros(())

    def of_tokens(self, rows: int, length: int) -> list[Tensor]:
        """`[rows, length, H]` of every memory and its layers, for the ids `[rows, length]` of one forward."""
        found = []
        for writes in self._writes:
            # Segments come one after the other; persistent tokens before them, of all rows in one.
            parts = [write for write in writes if len(write[0]) == rows]
            found += [torch.cat(layers, dim=1)[:, -length:] for layers in zip(*parts, strict=True)]
        return found

    def of_noise(self, worth: Tensor) -> Tensor:
        """Share of all that is written which is noise: `sum(noise) / sum(noise + facts)`, 0 to 1.

        Mean over memories and their layers; larger or smaller steps for all change nothing. Zero for a model
        without memories.

        worth: `[B, T]` beside the ids of one forward: above 0 what is to be remembered, below 0 what is
            noise; the rest does not count.
        """
        noise, facts = (worth < 0).unsqueeze(-1), (worth > 0).unsqueeze(-1)
        shares = []
        for steps in self.of_tokens(*worth.shape):
            lost, kept = (steps * noise).sum(), (steps * facts).sum()
            shares.append(lost / (lost + kept + NOTHING))
        return torch.stack(shares).mean() if shares else torch.zeros(())

    def _observe(
        self,
        memory: MemoryCore,
        before: Callable[[MemoryWrite], None] | None,
        writes: list[tuple[Tensor, ...]],
        write: MemoryWrite,
    ) -> None:
        if before is not None:
            before(write)
        writes.append(
            tuple(layer / bound for layer, bound in memory.gates.steps_and_bounds(write.gates.theta))
        )


def _norm(layers: tuple[Tensor, ...]) -> Tensor:
    """Frobenius norm of all layers `[B, H, D_in, D_out]` together, mean over rows and heads."""
    return torch.stack([layer.square().sum((-2, -1)) for layer in layers]).sum(0).sqrt().mean()
