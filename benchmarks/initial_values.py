"""What the initial values of the memory and the bound on its step do to training: one row, one process.

    python benchmarks/initial_values.py --values fan-in --seconds 420 --batch 8
    python benchmarks/initial_values.py --values unit --memory-depth 4 --max-step 0.02

Initial values: "fan-in" (deviation 1 / sqrt(D_in)), "one" (1 in every layer), "two", or "unit" (outputs of
unit variance and steps divided by the input's power: what the library does). A plain loop on bytes of
CPython's documentation: AdamW at a constant 2e-3 after 50 steps of warm-up, gradients clipped to 1, sequences
of 256. It prints what `results/initial_values.json` holds for many rows, run side by side.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

LENGTH, WARMUP, RATE = 256, 50, 2e-3


@dataclass
class Options:
    """values: of the memory before training. max_step: None, the depth's default. seconds: then it stops."""

    values: Literal["fan-in", "one", "two", "unit"]
    variant: str = "lmm"
    memory_depth: int = 2
    chunk_size: int = 16
    max_step: float | None = None
    steps: int = 500
    batch: int = 2
    seconds: float = 420.0


def set_initial_values(model, values: str) -> None:  # type: ignore[no-untyped-def]
    """Draw the initial memories again; all but "unit" also lose the division by the input's power."""
    import torch

    from titans.nn.gates import DEFAULT_MAX_STEP, MemoryGates
    from titans.nn.memory import InitialMemory

    if values == "unit":
        return
    for module in model.modules():
        if isinstance(module, InitialMemory):
            for weight in module.weights:
                scale = {"fan-in": weight.shape[1] ** -0.5, "one": 1.0, "two": 2.0}[values]
                torch.nn.init.normal_(weight, std=scale)
        if isinstance(module, MemoryGates):
            depth = len(module.max_steps)
            module.max_steps = (module.spec.max_step or DEFAULT_MAX_STEP[depth],) * depth


def main(options: Options) -> None:
    import pydoc_data.topics

    import torch

    from titans.models import TitansConfig, TitansForCausalLM

    torch.set_num_threads(1)
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    data = torch.tensor(list(text))
    training, held_out = data[:-40000], data[-40000:]
    torch.manual_seed(0)
    config = TitansConfig.named(
        "tiny",
        vocab_size=259,
        variant=options.variant,
        memory_depth=options.memory_depth,
        chunk_size=options.chunk_size,
        memory_max_step=options.max_step,
    )
    model = TitansForCausalLM(config)
    set_initial_values(model, options.values)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    started, norms, losses = time.monotonic(), [], []
    for step in range(options.steps):
        if time.monotonic() - started > options.seconds:
            break
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / WARMUP)
        starts = torch.randint(0, len(training) - LENGTH, (options.batch,), generator=generator)
        batch = torch.stack([training[start : start + LENGTH] for start in starts])
        loss = model(batch, labels=batch).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        losses.append(loss.item())
        norms.append(norm.item())
        if not torch.isfinite(norm):
            break
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        windows = held_out[: 16 * LENGTH].view(16, LENGTH)
        validation = model(windows, labels=windows).loss.item()
    ordered = sorted(norms)
    found = {
        "steps": len(losses),
        "validation": validation,
        "median_grad_norm": ordered[len(ordered) // 2],
        "p95_grad_norm": ordered[int(len(ordered) * 0.95)],
        "max_grad_norm": ordered[-1],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Options))
