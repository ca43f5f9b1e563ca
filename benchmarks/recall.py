"""Recall far beyond the training length: small models trained for minutes, then tested at millions of tokens.

    python benchmarks/recall.py --recipes needle_lmm needle_mag --seeds 0 1 --seconds 240 \
        --train runs/recall/train.npz --test runs/recall/test.npz --llama-tokenizer tokenizer.model
    python benchmarks/recall.py --recipes babilong_mag --steps 800 --start needle_mag-0.safetensors \
        --babi runs/recall/babi.tar.xz --lengths 1024 16384 1048576 10485760 ...
    python benchmarks/recall.py --recipes 'mqar_*' --steps 1000

Every (recipe, seed) is a process of its own that trains, then tests; so many run side by side on every
visible GPU (or on the CPU). Samples of the tests, of the published form and from other books than the
training's, are made meanwhile. An answer counts when it is exactly what greedy decoding would begin with.
Rows are written as they come, into one JSON file; each process writes what it says to a file beside it.

The haystacks are made by `titans haystack`; lengths are in Llama-2 tokens, the paper's.
"""

from __future__ import annotations

import fnmatch
import json
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

sys.path.insert(0, str(Path(__file__).parent.parent))

from titans.benchmark.harness import RESULTS, Session, print_table
from titans.benchmark.machine import ROOT

LENGTHS = tuple(1 << power for power in range(11, 22))
SHORT = 16384


@dataclass(frozen=True)
class Options:
    """recipes, seeds: every pair is trained; "mqar_*" are all recipes of such names, "needle_mag@3" is that
    one with seed 3 alone. train, test: haystacks. babi: bAbI's archive, for BABILong. mined: decoys that
    benchmarks/mine.py made. llama_tokenizer: SentencePiece model by which lengths are told. start: weights
    that --save has written, to go on from (of the same model), or the folder with those of each recipe and
    seed. seconds: of each training, start included; steps: instead; 0 steps: test the start as it is.
    tasks, lengths, samples: of the tests, the samples for each task and length, the tasks by default the
    recipe's own; short_samples: of those of at most 16K tokens. rows: of them at once (None: all).
    attention_length: longest test of full attention. token_lengths: of MQAR's tests. evaluation_seconds:
    for each model's tests, after which nothing more is begun. jobs_per_gpu: processes. workers: that read
    data, for each process. tokens_per_batch, train_lengths: other than the recipe's. sample_jobs: processes
    that make samples; 0: somebody else makes them. threads: of PyTorch in each process. save: folder for
    weights. dtype: of those. work: folder for samples and logs. output, out: the JSON file's folder and
    name. commit: of the code, where git cannot tell."""

    recipes: tuple[str, ...] = ("needle_lmm",)
    seeds: tuple[int, ...] = (0,)
    train: Path = Path("runs/recall/train.npz")
    test: Path = Path("runs/recall/test.npz")
    babi: Path = Path("runs/recall/babi.tar.xz")
    mined: Path | None = None
    llama_tokenizer: Path = Path("llama2_tokenizer.model")
    start: Path | None = None
    seconds: float | None = None
    steps: int | None = None
    tasks: tuple[str, ...] = ()
    lengths: tuple[int, ...] = LENGTHS
    samples: int = 16
    short_samples: int = 48
    rows: int | None = None
    attention_length: int = 65536
    token_lengths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096, 16384, 65536)
    evaluation_seconds: float = 600.0
    jobs_per_gpu: int = 1
    workers: int = 4
    tokens_per_batch: int | None = None
    train_lengths: tuple[int, ...] = ()
    learning_rate: float | None = None
    sample_jobs: int = 8
    threads: int = 2
    save: Path | None = None
    dtype: str = "bfloat16"
    work: Path = Path("runs/recall/work")
    output: Path = RESULTS
    out: str = "recall"
    commit: str | None = None


def test_path(options: Options, task: str, length: int) -> Path:
    return options.work / f"{task}-{length}.npz"


def run_path(folder: Path, name: str, seed: int, suffix: str) -> Path:
    """A file of one run; the name may be that of a recipe in a file."""
    return folder / f"{Path(name).name}-{seed}{suffix}"


def named(patterns: tuple[str, ...], seeds: tuple[int, ...]) -> list[tuple[str, int]]:
    """Recipes' names with seeds, names with a "*" replaced by all that are meant."""
    from titans.recipes import RECIPES

    runs = []
    for each in patterns:
        pattern, _, seed = each.partition("@")
        for name in fnmatch.filter(RECIPES, pattern) or [pattern]:
            runs += [(name, number) for number in ([int(seed)] if seed else seeds)]
    return sorted(runs, key=lambda run: run[1])


def task_settings(recipe: Any) -> Any:
    from titans.tasks.settings import TaskSettings

    assert isinstance(recipe.data, TaskSettings), "expected recipes on tasks"
    return recipe.data


# The process of one run


def run(options: Options, name: str, seed: int, rows_path: Path) -> None:
    """Train and test; a line for every row, as it comes."""
    import torch
    from rich.console import Console

    from titans.recipes import load_recipe
    from titans.tasks.experiment import (
        needle_rows,
        save_weights,
        token_rows,
        train_model,
        untrained,
        with_steps,
    )

    torch.set_num_threads(options.threads)
    recipe = load_recipe(name)
    data = task_settings(recipe)
    if not data.of_tokens:
        data = replace(data, haystack=options.train)
    if data.of_babi:
        data = replace(data, babi=options.babi)
    if options.mined:
        data = replace(data, mined=options.mined)
    if options.tokens_per_batch:
        data = replace(data, tokens_per_batch=options.tokens_per_batch)
    if options.train_lengths:
        data = replace(data, lengths=options.train_lengths)
    training = replace(recipe.training, seed=seed, num_workers=options.workers)
    if options.learning_rate:
        training = replace(training, learning_rate=options.learning_rate)
    if not torch.cuda.is_available():
        training = replace(training, precision="fp32")
    recipe = replace(recipe, data=data, training=training)
    if options.steps:
        recipe = with_steps(recipe, options.steps)

    def say(row: dict[str, Any]) -> None:
        with rows_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"model": name, "seed": seed} | row) + "\n")

    start = options.start
    if start is not None and start.is_dir():
        start = run_path(start, name, seed, ".safetensors")
    if options.steps == 0:
        assert start is not None, "checked by main"
        trained = untrained(recipe, start)
    else:
        console = Console(file=sys.stderr)
        trained = train_model(recipe, seconds=options.seconds, start=start, console=console)
    say({"kind": "training"} | trained.row)
    if options.save is not None:
        dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[options.dtype]
        save_weights(trained.model, run_path(options.save, name, seed, ".safetensors"), dtype)
    until = time.monotonic() + options.evaluation_seconds
    if data.of_tokens:
        for row in token_rows(trained.model, data, options.token_lengths, samples=64, seed=10**6 + seed):
            say({"kind": "test"} | row)
        return
    full = recipe.model.variant == "attention" and recipe.model.window_size == 0
    paths = [
        test_path(options, task, length)
        for length in options.lengths
        for task in options.tasks or data.tasks
        if not full or length <= options.attention_length
    ]
    for row in needle_rows(trained.model, paths, rows=options.rows, until=until):
        say({"kind": "test"} | row)
        print(json.dumps(row), file=sys.stderr, flush=True)


# The samples of the tests


@cache
def _haystack(path: Path, llama_tokenizer: Path) -> tuple[Any, Any]:
    """Once a process."""
    import sentencepiece

    from titans.data.sentences import SentenceTokens
    from titans.tasks.needle_test import length_counter

    model = sentencepiece.SentencePieceProcessor(model_file=str(llama_tokenizer))
    haystack = SentenceTokens.load(path)
    return haystack, length_counter(haystack, lambda text: len(model.encode(text)))


def make_samples(options: Options, task: str, length: int) -> None:
    from titans.tasks.needle_test import make_test

    haystack, count = _haystack(options.test, options.llama_tokenizer)
    path = test_path(options, task, length)
    number = options.samples if length > SHORT else options.short_samples
    make_test(task, length, number, haystack, count, seed=0, babi=options.babi).save(path)


# The whole


def main(options: Options) -> None:
    if (options.seconds is None) == (options.steps is None):
        sys.exit("expected either --seconds or --steps")
    if options.steps == 0 and options.start is None:
        sys.exit("--steps 0: expected --start, weights to test")
    import torch

    from titans.recipes import load_recipe

    options.work.mkdir(parents=True, exist_ok=True)
    gpus = torch.cuda.device_count()
    slots = [str(gpu) for gpu in range(gpus)] * options.jobs_per_gpu or [""] * options.jobs_per_gpu
    waiting = named(options.recipes, options.seeds)
    of_text = [data for name, _ in waiting if not (data := task_settings(load_recipe(name))).of_tokens]
    tasks = dict.fromkeys(task for data in of_text for task in options.tasks or data.tasks)
    plain = json.loads(json.dumps(asdict(options), default=str))
    session = Session(
        options.out,
        Path(__file__).resolve(),
        plain,
        options.threads,
        command=" ".join(["python", str(Path(__file__).resolve().relative_to(ROOT)), *sys.argv[1:]]),
        commit=options.commit,
        output=options.output,
    )
    running: dict[subprocess.Popen[bytes], tuple[str, str, Path]] = {}
    read: dict[Path, int] = {}

    def collect() -> None:
        new = False
        for path in list(read):
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
            for line in lines[read[path] :]:
                if line.endswith("\n"):
                    session.rows.append(json.loads(line))
                    read[path] += 1
                    new = True
        if new:
            session.save()

    # Not forked: PyTorch has threads here.
    pool = ProcessPoolExecutor(max(options.sample_jobs, 1), mp_context=multiprocessing.get_context("spawn"))
    try:
        made = [
            pool.submit(make_samples, options, task, length)
            for length in options.lengths
            for task in tasks
            if options.sample_jobs and not test_path(options, task, length).exists()
        ]
        while waiting or running:
            while waiting and slots:
                name, seed = waiting.pop(0)
                gpu = slots.pop(0)
                path = run_path(options.work, name, seed, ".jsonl")
                path.unlink(missing_ok=True)
                read[path] = 0
                order = json.dumps([plain, name, seed, str(path)])
                environment = {
                    **os.environ,
                    **({"CUDA_VISIBLE_DEVICES": _visible(gpu)} if gpu else {}),
                    "OMP_NUM_THREADS": str(options.threads),
                    "TOKENIZERS_PARALLELISM": "false",
                    "HF_HUB_OFFLINE": "1",
                }
                with path.with_suffix(".log").open("wb") as log:
                    process = subprocess.Popen(
                        [sys.executable, __file__, "--run", order],
                        cwd=Path.cwd(),
                        env=environment,
                        stdout=log,
                        stderr=log,
                    )
                running[process] = (gpu, f"{name}, seed {seed}", path)
                print(f"started {name}, seed {seed}, GPU {gpu or '-'}", flush=True)
            time.sleep(1.0)
            collect()
            for process in [process for process in running if process.poll() is not None]:
                gpu, title, path = running.pop(process)
                slots.append(gpu)
                collect()
                if process.returncode:
                    said = path.with_suffix(".log").read_text(errors="replace").strip().splitlines()
                    session.rows.append({"kind": "failed", "run": title, "error": "\n".join(said[-5:])})
                    session.save()
                print(f"ended {title}: exit code {process.returncode}", flush=True)
        for future in made:
            future.result()  # its error, if there was one
    finally:
        for process in running:
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        collect()
        path = session.save()
    _print(session.rows)
    print(f"written: {path}")


def _visible(gpu: str) -> str:
    """The name of a GPU that this process sees under the number ``gpu``."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[int(gpu)] if visible else gpu


def _print(rows: list[dict[str, Any]]) -> None:
    """Share of samples answered (of tokens, for MQAR) by model, task and length, all depths together."""
    shares: dict[tuple[str, str], dict[int, list[int]]] = {}
    for row in rows:
        if row.get("kind") != "test" or "error" in row:
            continue
        key = (f"{row['model']}, seed {row['seed']}", row["task"])
        total = shares.setdefault(key, {}).setdefault(row["length"], [0, 0])
        total[0] += row.get("correct", row["tokens_correct"])
        total[1] += row["samples"] if "correct" in row else row["tokens_asked"]
    lengths = sorted({length for found in shares.values() for length in found})
    table = [
        [*key, *(f"{found[n][0] / found[n][1]:.2f}" if n in found else "-" for n in lengths)]
        for key, found in sorted(shares.items())
    ]
    print_table("answered", ["model", "task", *map(str, lengths)], table)


def _options(plain: dict[str, Any]) -> Options:
    """The options that went through JSON: paths came out as strings, tuples as lists."""
    paths = {name for name, kind in get_type_hints(Options).items() if kind in (Path, Path | None)}

    def made(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return tuple(value)
        return Path(value) if name in paths and value is not None else value

    return Options(**{name: made(name, value) for name, value in plain.items()})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        given, name, seed, path = json.loads(sys.argv[2])
        run(_options(given), name, seed, Path(path))
    else:
        import tyro

        main(tyro.cli(Options))
