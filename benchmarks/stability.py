"""Does the recipe train? Every variant at tiny size, 500 steps on bytes of CPython's documentation, no NaN.

    python benchmarks/stability.py                    all rows, written to results/stability.json
    python benchmarks/stability.py --only lmm mac     some of them
    python benchmarks/stability.py --steps 60 --jobs 2
    python benchmarks/stability.py --matrix --steps 2000 --jobs 15 --threads 1 --out stability_gpu

Beside the variants: the memory at depth 1 and 4, chunks of 64, bfloat16 autocast, and what happens when the
bound on the inner step is moved (by default 0.1, 0.5, 0.1 and 0.02 at depth 1 to 4). A row that diverges is
a result, too. Batches hold two sequences, so that a row takes minutes on one core. (Not a `bench_*.py`: those
take seconds a row.) The matrix: every variant with a memory, depth 1 to 4, chunk 16 and 64, fp32 and bf16.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from titans.benchmark.harness import Session, commit, print_table

# name: fields of the model, fields of the training.
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lmm": ({"variant": "lmm"}, {}),
    "mac": ({"variant": "mac"}, {}),
    "mag": ({"variant": "mag"}, {}),
    "mal": ({"variant": "mal"}, {}),
    "attention": ({"variant": "attention"}, {}),
    "lmm, depth 1": ({"variant": "lmm", "memory_depth": 1}, {}),
    "lmm, depth 4": ({"variant": "lmm", "memory_depth": 4}, {}),
    "lmm, chunk 64": ({"variant": "lmm", "chunk_size": 64}, {}),
    "lmm, bf16 autocast": ({"variant": "lmm"}, {"precision": "bf16"}),
    "lmm, max step 0.1": ({"variant": "lmm", "memory_max_step": 0.1}, {}),
    "lmm, max step 2": ({"variant": "lmm", "memory_max_step": 2.0}, {}),
    "lmm, max step 8": ({"variant": "lmm", "memory_max_step": 8.0}, {}),
    "lmm, depth 1, max step 0.5": ({"variant": "lmm", "memory_depth": 1, "memory_max_step": 0.5}, {}),
    "lmm, depth 4, max step 0.5": ({"variant": "lmm", "memory_depth": 4, "memory_max_step": 0.5}, {}),
    "lmm, chunk 64, max step 2": ({"variant": "lmm", "chunk_size": 64, "memory_max_step": 2.0}, {}),
}
# The cheap ones first: a run that is cut off has them.
MATRIX: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    f"{variant}, depth {depth}, chunk {chunk}, {precision}": (
        {"variant": variant, "memory_depth": depth, "chunk_size": chunk},
        {"precision": precision},
    )
    for depth, chunk, precision, variant in product(
        (2, 1, 3, 4), (64, 16), ("bf16", "fp32"), ("lmm", "mac", "mag", "mal")
    )
}


@dataclass
class Options:
    """steps: of training, each of two sequences. matrix: its rows. only: names of rows. jobs: rows at a time;
    threads: of PyTorch in each. commit: of the code, where git cannot tell."""

    steps: int = 500
    sequence_length: int = 256
    matrix: bool = False
    only: tuple[str, ...] = ()
    commit: str | None = None
    jobs: int = 1
    threads: int = 2
    out: str = "stability"


def run_row(name: str, steps: int, threads: int, sequence_length: int = 256) -> dict[str, Any]:
    """Train one row in this process and report its losses and norms."""
    import torch
    from rich.console import Console

    from titans.data.prepare import prepare
    from titans.data.sources import PYTHON_DOCS
    from titans.recipes import load_recipe
    from titans.training.callbacks import LOG_NAME, read_log
    from titans.training.data import open_data
    from titans.training.run import train

    torch.set_num_threads(threads)
    model, training = (ROWS | MATRIX)[name]
    recipe = load_recipe("tiny_lmm")
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "data", Path(folder) / "out"
        prepare([PYTHON_DOCS], data, validation_fraction=0.1)
        recipe = replace(
            recipe,
            model=replace(recipe.model, **model),
            data=replace(recipe.data, folder=data, sequence_length=sequence_length),
            training=replace(
                recipe.training,
                steps=steps,
                batch_size=2,
                save_every=steps,
                eval_every=max(steps // 5, 1),
                eval_sequences=16,
                **training,
            ),
            logging=replace(recipe.logging, memory_metrics_every=max(steps // 10, 1)),
        )
        started = time.perf_counter()
        result = train(recipe, open_data(recipe), out, console=Console(quiet=True))
        seconds = time.perf_counter() - started
        log = read_log(out / LOG_NAME)
    losses = [(record["step"], record["loss"]) for record in log if "loss" in record]
    norms = [record["grad_norm"] for record in log if record.get("grad_norm") is not None]
    return {
        "row": name,
        "recipe": recipe.to_dict() | {"data": None},
        "ending": result.ending,
        "message": result.message,
        "steps": result.step,
        "seconds": seconds,
        "loss": losses[:: max(len(losses) // 50, 1)],
        "validation": [(record["step"], record["eval_loss"]) for record in log if "eval_loss" in record],
        "max_grad_norm": max(norms, default=math.nan),
        "median_grad_norm": sorted(norms)[len(norms) // 2] if norms else math.nan,
        "memory": [
            {"step": record["step"]}
            | {key: value for key, value in record.items() if key.startswith("memory_")}
            for record in log
            if any(key.startswith("memory_") for key in record)
        ],
    }


def main(options: Options) -> None:
    names = options.only or tuple(MATRIX if options.matrix else ROWS)
    if unknown := set(names) - {*ROWS, *MATRIX}:
        sys.exit(f"--only {sorted(unknown)}: expected some of {[*ROWS, *MATRIX]}")
    started_on = options.commit or commit()

    def launch(name: str) -> dict[str, Any]:
        # Four layers cost four times as much: the hidden ones are F x F.
        job = json.dumps(
            [name, options.steps, options.threads * (4 if "depth 4" in name else 1), options.sequence_length]
        )
        done = subprocess.run([sys.executable, __file__, "--row", job], capture_output=True, text=True)
        if done.returncode:
            return {"row": name, "ending": "crashed", "message": done.stderr.strip().splitlines()[-1]}
        return json.loads(done.stdout.splitlines()[-1])

    session = Session(
        options.out,
        Path(__file__).resolve(),
        {"steps": options.steps, "sequence_length": options.sequence_length},
        options.threads,
        commit=options.commit,
    )
    session.summary = {"commit_at_start": started_on}
    with ThreadPoolExecutor(options.jobs) as pool:
        for row in pool.map(launch, names):
            session.rows.append(row)
            session.save()
            print(f"{row['row']}: {row['ending']} {row.get('message', '')}", flush=True)
    path = session.save()
    table = [
        [
            row["row"],
            row["ending"],
            f"{row['validation'][-1][1]:.3f}" if row.get("validation") else "-",
            f"{row.get('median_grad_norm', math.nan):.2f}",
            f"{row.get('max_grad_norm', math.nan):.1f}",
            f"{row.get('seconds', math.nan):.0f} s",
        ]
        for row in session.rows
    ]
    print_table(
        f"{options.steps} steps, bytes",
        ["row", "ending", "validation loss", "median grad norm", "max grad norm", "time"],
        table,
    )
    print(f"written: {path}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--row"]:
        row = run_row(*json.loads(sys.argv[2]))
        print(json.dumps(row))
    else:
        import tyro

        main(tyro.cli(Options))
