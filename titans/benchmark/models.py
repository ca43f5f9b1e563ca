"""The workload of `titans bench models`: training steps of a whole model with random weights.

Settings: device, dtype of autocast, size, `config` (fields that override the size's), tokens of a sequence,
step_tokens, micro_tokens (at most, per backward), compiled, graph (a step's gradients as one CUDA graph), and
for small runs more fields in `config`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch._dynamo.utils
from torch import Tensor

from titans.models import TitansConfig, TitansForCausalLM
from titans.nn.cuda_graph import record


class TrainingStep:
    """Forward, backward and AdamW on `step_tokens` random tokens, in pieces that fit into memory.

    A piece has `micro_tokens` at most, or one sequence; half of that as long as memory does not suffice.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.device = torch.device(settings["device"])
        self.compiled = settings["compiled"]
        self.facts: dict[str, Any] = {"compiled": self.compiled}
        count, length = settings["step_tokens"] // settings["tokens"], settings["tokens"]
        self.sequences = min(count, max(1, settings["micro_tokens"] // length))
        self._build()
        vocabulary = self.model.config.vocab_size
        self.ids = torch.randint(vocabulary, (count, length), device=self.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self._settle()
        if settings["graph"]:
            self._record()
        if self.compiled:  # one graph where nothing in a block broke it
            counted = torch._dynamo.utils.counters
            self.facts["graphs"] = counted["stats"]["unique_graphs"]
            self.facts["graph_breaks"] = sum(counted["graph_break"].values())
        self.facts["parameters"] = sum(parameter.numel() for parameter in self.model.parameters())
        self.facts["micro_tokens"] = self.sequences * length

    def __call__(self) -> None:
        if self.graph is not None:
            self.graph.replay()
            self.optimizer.step()
            return
        self._backwards()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _backwards(self) -> None:
        for ids in self.ids.split(self.sequences):
            self._backward(ids)

    def _record(self) -> None:
        """The gradients of a step as one graph, which begins with zeros; without it where it cannot be."""

        def gradients() -> None:
            for parameter in self.model.parameters():
                parameter.grad = (
                    torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()
                )
            self._backwards()

        try:
            self.graph = record(gradients)
        except Exception as error:
            said = " ".join(str(error).split())
            self.facts["graph_error"] = f"{type(error).__name__}: {said}"[:300]
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        self.facts["graph"] = self.graph is not None

    def _backward(self, ids: Tensor) -> None:
        with torch.autocast(self.device.type, dtype=getattr(torch, self.settings["dtype"])):
            loss = self.model(ids, labels=ids).loss
        assert loss is not None
        (loss * (len(ids) / len(self.ids))).backward()

    def _build(self) -> None:
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        with torch.device(self.device):
            config = TitansConfig.named(self.settings["size"], **self.settings["config"])
            self.model = TitansForCausalLM(config)
        self.model.train()
        if self.compiled:
            self.model.compile_blocks()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def _settle(self) -> None:
        """One step that shows what fits, and whether the compiler can do it."""
        while True:
            try:
                self()
                return
            except torch.OutOfMemoryError:
                if self.sequences == 1:
                    raise
                self.sequences //= 2
            except Exception as error:
                if not self.compiled:
                    raise
                said = " ".join(str(error).split())
                self.facts |= {"compiled": False, "compiler_error": f"{type(error).__name__}: {said}"[:300]}
                self.compiled = False
                self._build()
            self.optimizer.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


def training_step(settings: dict[str, Any]) -> TrainingStep:
    return TrainingStep(settings)
