"""Does the recipe train? Every variant at tiny size, 500 steps on bytes of CPython's documentation, no NaN.

    python benchmarks/stability.py                    all rows, written to results/stability.json
    python benchmarks/stability.py --only lmm mac     some of them
    python benchmarks/stability.py --steps 60 --jobs 2
    python benchmarks/stability.py --matrix --steps 2000 --jobs 32 --threads 1 --seconds 520 \\
        --out stability_gpu                           on GPUs; with --resume goes on where that was cut off

Beside the variants: the memory at depth 1 and 4, chunks of 64, bfloat16 autocast, and what happens when the
bound on the inner step is moved (by default 0.1, 0.5, 0.1 and 0.02 at depth 1 to 4). A row that diverges is
a result, too. Batches hold two sequences, so that a row takes minutes on one core. (Not a `bench_*.py`: those
take seconds a row.) The matrix: every variant with a memory, depth 1 to 4, chunk 16 and 64, fp32 and bf16,
heads of 64, which the kernels of two layers need. On a GPU those take depth 1 and 2, in chunks of 16 fp32,
too (which "auto" leaves to the chunked path, as it does deeper memories). Rows are spread over all GPUs and
trained in `runs/OUT/COMMIT/ROW`; a row that was cut off goes on from its checkpoint there.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import cycle, islice, product
from pathlib import Path
from queue import SimpleQueue
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from titans.benchmark.harness import Session, print_table
from titans.benchmark.machine import ROOT, commit, visible_gpus

GRACE = 30.0  # seconds for the last step and its checkpoint, once a row was asked to end
POINTS = 50  # of every series that is kept
Series = list[tuple[int, float]]

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
        {"variant": variant, "memory_depth": depth, "chunk_size": chunk, "memory_head_dim": 64},
        {"precision": precision},
    )
    for depth, chunk, variant, precision in product(
        (1, 2, 3, 4), (64, 16), ("lmm", "mag", "mal", "mac"), ("bf16", "fp32")
    )
}


@dataclass
class Options:
    """steps: of training, each of two sequences. matrix: its rows. only: names of rows. jobs: rows at a time;
    threads: of PyTorch in each. commit: of the code, where git cannot tell. seconds: after which rows end
    with the step that they are in. resume: keep the rows of the file that have ended by themselves. cpu_jobs:
    rows at a time beside those that train without kernels on a GPU, without one: bound by
    launches, a step of the chunked path takes as long on a core, and cores are many."""

    steps: int = 500
    sequence_length: int = 256
    matrix: bool = False
    only: tuple[str, ...] = ()
    commit: str | None = None
    jobs: int = 1
    cpu_jobs: int = 0
    threads: int = 2
    out: str = "stability"
    seconds: float = 7 * 86400.0
    resume: bool = False


def run_row(name: str, steps: int, threads: int, folder: Path, sequence_length: int = 256) -> dict[str, Any]:
    """Train one row in this process on the shards in `folder`/data, and report its losses and norms."""
    import torch
    from rich.console import Console
    from transformers import set_seed

    from titans.nn.memory import MemoryCore
    from titans.recipes import load_recipe
    from titans.training.callbacks import LOG_NAME, read_log
    from titans.training.data import open_data
    from titans.training.recipe import DataSettings
    from titans.training.run import build_model, train

    torch.set_num_threads(threads)
    model, training = (ROWS | MATRIX)[name]
    recipe = load_recipe("tiny_lmm")
    out = folder / name.replace(", ", "-").replace(" ", "_")
    recipe = replace(
        recipe,
        model=replace(recipe.model, **model),
        data=DataSettings(folder=folder / "data", sequence_length=sequence_length),
        training=replace(
            recipe.training,
            steps=steps,
            batch_size=2,
            save_every=steps,
            keep=1,
            eval_every=max(steps // 5, 1),
            eval_sequences=16,
            cuda_graph=True,
            **training,
        ),
        logging=replace(recipe.logging, memory_metrics_every=max(steps // POINTS, 1)),
    )
    data = open_data(recipe)
    set_seed(recipe.training.seed)
    built = build_model(recipe, data)
    on_kernels = torch.cuda.is_available() and has_kernels(name)
    if on_kernels:
        for module in built.modules():
            if isinstance(module, MemoryCore):
                module.impl = "triton"
    result = train(recipe, data, out, console=Console(quiet=True), model=built)
    log = read_log(out / LOG_NAME)
    norms = series(log, "grad_norm")
    values = sorted(value for _, value in norms)
    metrics = sorted({key for record in log for key in record if key.startswith("memory_")})
    return {
        "row": name,
        "recipe": recipe.to_dict() | {"data": None},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "kernels": on_kernels,
        "ending": result.ending,
        "message": result.message,
        "steps": result.step,
        "seconds": sum(2 * sequence_length / speed for _, speed in series(log, "tokens_per_second")),
        "loss": series(log, "loss")[:: max(steps // POINTS, 1)],
        "validation": series(log, "eval_loss"),
        "max_grad_norm": max(values, default=math.nan),
        "median_grad_norm": values[len(values) // 2] if values else math.nan,
        "grad_norm": peaks(norms, max(steps // POINTS, 1)),
        "memory": {metric.removeprefix("memory_"): series(log, metric) for metric in metrics},
    }


def series(log: list[dict[str, Any]], key: str) -> Series:
    """(step, value) of every record that has one, to four digits."""
    return [(record["step"], float(f"{record[key]:.4g}")) for record in log if record.get(key) is not None]


def peaks(values: Series, stretch: int) -> Series:
    """The largest of every so many."""
    stretches = (values[first : first + stretch] for first in range(0, len(values), stretch))
    return [(part[-1][0], max(value for _, value in part)) for part in stretches]


def launch(name: str, options: Options, folder: Path, gpu: str | None, until: float) -> dict[str, Any] | None:
    """Train a row in a process of its own; None where it had to end before its first step."""
    if (left := until - time.monotonic()) <= 0:
        return None
    # On a CPU four layers cost four times as much: the hidden ones are F x F.
    threads = options.threads * (4 if not gpu and "depth 4" in name else 1)
    process = subprocess.Popen(
        [
            *(sys.executable, __file__, "--row"),
            json.dumps([name, options.steps, threads, str(folder), options.sequence_length]),
        ],
        env=os.environ if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": gpu},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for seconds, end in ((left, process.terminate), (GRACE, process.kill)):
        with suppress(subprocess.TimeoutExpired):
            stdout, stderr = process.communicate(timeout=seconds)
            break
        end()
    else:
        stdout, stderr = process.communicate()
    if process.returncode == 0:
        row: dict[str, Any] = json.loads(stdout.splitlines()[-1])
        return row
    if time.monotonic() >= until:
        return None
    said = stderr.strip().splitlines() or [f"exit code {process.returncode}"]
    return {"row": name, "ending": "crashed", "message": said[-1], "steps": 0}


def has_kernels(name: str) -> bool:
    """Whether a row of the matrix trains on the fused kernels on a GPU: one layer or two, bf16 or chunk 16.

    In fp32 and chunks of 64 they spill: a step of two layers took three times one of three layers on the
    chunked path.
    """
    if name not in MATRIX:
        return False
    model, training = MATRIX[name]
    return model["memory_depth"] <= 2 and (training["precision"] == "bf16" or model["chunk_size"] == 16)


def kept(session: Session) -> dict[str, dict[str, Any]]:
    """The rows of an earlier run with the same settings, by name."""
    if not session.path.exists():
        return {}
    record = json.loads(session.path.read_text(encoding="utf-8"))
    if record["options"] != session.options:
        sys.exit(f"--resume: {session.path} was made with {record['options']}, this is {session.options}")
    return {row["row"]: row for row in record["rows"]}


def main(options: Options) -> None:
    from titans.data.prepare import prepare
    from titans.data.sources import PYTHON_DOCS

    names = options.only or tuple(MATRIX if options.matrix else ROWS)
    if unknown := set(names) - {*ROWS, *MATRIX}:
        sys.exit(f"--only {sorted(unknown)}: expected some of {[*ROWS, *MATRIX]}")
    until = time.monotonic() + options.seconds
    session = Session(
        options.out,
        Path(__file__).resolve(),
        {"steps": options.steps, "sequence_length": options.sequence_length},
        options.threads,
        command=f"python benchmarks/stability.py{' --matrix' * options.matrix} --steps {options.steps} "
        f"--sequence-length {options.sequence_length}",
        commit=options.commit or commit(),
    )
    rows = kept(session) if options.resume else {}
    folder = ROOT / "runs" / options.out / str(session.commit)
    if not options.resume:
        shutil.rmtree(folder, ignore_errors=True)
    if not (folder / "data").exists():
        prepare([PYTHON_DOCS], folder / "data", validation_fraction=0.1)
    slots: SimpleQueue[str | None] = SimpleQueue()
    for slot in islice(cycle(visible_gpus() or [None]), options.jobs):
        slots.put(slot)

    def train_row(name: str) -> dict[str, Any] | None:
        slot = slots.get()
        try:
            return launch(name, options, folder, slot, until)
        finally:
            slots.put(slot)

    def train_row_on_a_core(name: str) -> dict[str, Any] | None:
        return launch(name, options, folder, "", until)

    def save() -> Path:
        session.rows = [rows[name] for name in (*ROWS, *MATRIX) if name in rows]
        return session.save()

    todo = [name for name in names if rows.get(name, {}).get("ending") not in ("finished", "diverged")]
    on_cores = {name for name in todo if options.cpu_jobs and not has_kernels(name)}
    with ThreadPoolExecutor(options.jobs) as pool, ThreadPoolExecutor(max(options.cpu_jobs, 1)) as cores:
        # The dearest first where there are cores enough: the last row to end is one of them.
        started = [cores.submit(train_row_on_a_core, name) for name in reversed(todo) if name in on_cores]
        started += [pool.submit(train_row, name) for name in todo if name not in on_cores]
        for future in as_completed(started):
            row = future.result()
            if row is None or row["steps"] < rows.get(row["row"], row)["steps"]:
                continue
            rows[row["row"]] = row | {"commit": session.commit}
            save()
            print(f"{row['row']}: {row['ending']} {row['message']}", flush=True)
    print_table(
        f"{options.steps} steps, bytes",
        ["row", "ending", "steps", "validation loss", "median grad norm", "max grad norm", "time"],
        list(map(cells, rows.values())),
    )
    print(f"{len(set(names) - set(rows))} rows without a step; written: {save()}")


def cells(row: dict[str, Any]) -> list[str]:
    return [
        row["row"],
        row["ending"],
        str(row["steps"]),
        f"{row['validation'][-1][1]:.3f}" if row.get("validation") else "-",
        f"{row.get('median_grad_norm', math.nan):.2f}",
        f"{row.get('max_grad_norm', math.nan):.1f}",
        f"{row.get('seconds', math.nan):.0f} s",
    ]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--row"]:
        name, steps, threads, folder, sequence_length = json.loads(sys.argv[2])
        print(json.dumps(run_row(name, steps, threads, Path(folder), sequence_length)))
    else:
        import tyro

        main(tyro.cli(Options))
