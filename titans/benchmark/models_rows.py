"""The rows of `titans bench models`: whole models at several lengths, and what their speeds say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from titans.benchmark.harness import TOO_LONG, Job, Measurement, Progress, RowFailed, Session

WORKLOADS = Path(__file__).resolve().parent / "models.py"
BASELINE = "attention"
TIMEOUT = 150.0  # seconds of a row, compilation included
ONE_COMPILER = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # in each of the processes that compile side by side
# Attention without persistent tokens: with them it would lose PyTorch's fastest kernel.
_PLAIN = {"variant": "attention", "num_persistent_tokens": 0}
_CHUNK_64 = {"chunk_size": 64}

# Fields of the configuration. In this order: what the targets ask for comes first.
ROWS: dict[str, dict[str, Any]] = {
    BASELINE: _PLAIN | {"window_size": None},
    "lmm-f256": {"variant": "lmm"} | _CHUNK_64,
    "lmm-f64": {"variant": "lmm", "memory_expansion": 1} | _CHUNK_64,
    "lmm-linear": {"variant": "lmm", "memory_depth": 1} | _CHUNK_64,
    "attention-2048": _PLAIN | {"window_size": 2048},
    "mag": {"variant": "mag"} | _CHUNK_64,
    "mal": {"variant": "mal"} | _CHUNK_64,
    "mac": {"variant": "mac"} | _CHUNK_64,
    "lmm-f256-c16": {"variant": "lmm", "chunk_size": 16},
}


@dataclass(frozen=True)
class Plan:
    """A run: lengths of a sequence, tokens of a step and of a backward, and which models."""

    device: str
    size: str
    lengths: tuple[int, ...]
    step_tokens: int
    micro_tokens: int
    compiled: bool
    graph: bool
    repeats: int = 3

    def jobs(self, row: str) -> list[Job]:
        """Every length."""
        return [
            Job(
                "training_step",
                {
                    "device": self.device,
                    "dtype": "bfloat16",
                    "size": self.size,
                    "config": ROWS[row],
                    "tokens": tokens,
                    "step_tokens": self.step_tokens,
                    "micro_tokens": self.micro_tokens,
                    "compiled": self.compiled,
                    "graph": self.graph,
                },
                repeats=self.repeats,
                warmup=0,  # building the step takes one, to see what fits
                timeout=TIMEOUT,
                name=row,
            )
            for tokens in self.lengths
        ]


Found = dict[tuple[str, int], Measurement | RowFailed]


def _place(job: Job) -> tuple[str, int]:
    return job.name, job.settings["tokens"]


def measure(session: Session, plan: Plan, names: Sequence[str], compile_jobs: int) -> None:
    """All models at all lengths; saved, with the summary, after each."""
    jobs = [job for name in names for job in plan.jobs(name)]
    jobs = _without_slow_compilers(session, plan, jobs)  # an earlier run's
    if plan.compiled and compile_jobs > 1:
        groups = [
            [_one_block(plan, job)] for job in jobs if job.settings["compiled"] and not session.knows(job)
        ]
        session.compile(groups, compile_jobs, TIMEOUT, **ONE_COMPILER)
        jobs = _without_slow_compilers(session, plan, jobs)
    found: Found = {}
    progress = Progress(names=[job.name for job in jobs])
    for job, result in session.measure_each(jobs):
        found[_place(job)] = result
        in_order = {key: found[key] for key in map(_place, jobs) if key in found}
        session.summary["table"] = summarise(in_order, plan.step_tokens)
        session.save()
        progress.add(job.name, result)


def _one_block(plan: Plan, job: Job) -> Job:
    """The same model of one block and few words: it fills the compilers' caches.

    A block of the real model is the same graph: its process finds it compiled. One backward is enough.
    """
    config = job.settings["config"] | {"num_hidden_layers": 1, "vocab_size": 512}
    tokens = max(job.settings["tokens"], min(plan.micro_tokens, plan.step_tokens))
    return replace(job, settings=job.settings | {"config": config, "step_tokens": tokens, "graph": False})


def _without_slow_compilers(session: Session, plan: Plan, jobs: Sequence[Job]) -> list[Job]:
    """What took the compilers too long is not compiled."""
    slow = [row["settings"] for row in session.compiled if row.get("error", "").startswith(TOO_LONG)]
    return [
        replace(job, settings=job.settings | {"compiled": False})
        if _one_block(plan, job).settings in slow
        else job
        for job in jobs
    ]


def summarise(found: Found, step_tokens: int) -> list[dict[str, Any]]:
    """One entry a model and length: tokens/s, that over full attention's at this length, and the targets."""

    def speed(row: str, tokens: int) -> float | None:
        result = found.get((row, tokens))
        return step_tokens / result.median if isinstance(result, Measurement) else None

    entries = []
    for (name, tokens), result in found.items():
        mine, other = speed(name, tokens), speed(BASELINE, tokens)
        entry: dict[str, Any] = {
            "row": name,
            "tokens": tokens,
            "tokens_per_second": mine,
            "ratio": None if mine is None or other is None else mine / other,
            "peak_gb": None,
            "first_seconds": None,
            "facts": {},
            "error": str(result) if isinstance(result, RowFailed) else None,
            "targets": [],
        }
        if isinstance(result, Measurement):
            entry |= {
                "peak_gb": result.peak_bytes / 1e9,
                "first_seconds": result.first_seconds,
                "facts": result.facts,
            }
        if entry["ratio"] is not None:
            entry["targets"] = [
                {"what": what, "limit": limit, "value": entry["ratio"], "met": entry["ratio"] >= limit}
                for what, limit in _targets(name, tokens)
            ]
        entries.append(entry)
    return entries


def _targets(name: str, tokens: int) -> Iterator[tuple[str, float]]:
    """The speed over full attention's that is asked for, at least: the paper's, and F = 64 ahead from 8K."""
    if name.startswith("lmm-f256") and tokens == 4096:
        yield "paper's ratio", 0.83
    if name.startswith("lmm-f256") and tokens >= 16384:
        yield "ahead", 1.0
    if name == "lmm-f64" and tokens >= 8192:
        yield "ahead", 1.0


def _speed(entry: dict[str, Any]) -> str:
    if entry["error"]:
        return "failed: " + entry["error"].partition("}: ")[2][:60]
    over = "" if entry["ratio"] is None else f" ({entry['ratio']:.2f})"
    return f"{entry['tokens_per_second'] / 1e3:,.1f}{over}"


def table(entries: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and a line for each model: thousands of tokens/s at each length, (over full attention's)."""
    lengths = sorted({entry["tokens"] for entry in entries})
    lines: dict[str, list[str]] = {}
    for entry in entries:
        cells = lines.setdefault(entry["row"], [entry["row"], *[""] * len(lengths), ""])
        missed = "; ".join(
            f"{target['what']} at {entry['tokens']} {target['value']:.2f} "
            f"{'>=' if target['met'] else 'MISSED'} {target['limit']:g}"
            for target in entry["targets"]
        )
        cells[1 + lengths.index(entry["tokens"])] = _speed(entry)
        notes = [missed]
        if not entry["facts"].get("compiled", True):
            notes.append(f"{entry['tokens']} not compiled")
        if not entry["facts"].get("graph", True):
            notes.append(f"{entry['tokens']} without a graph")
        if entry["facts"].get("graph_breaks"):
            notes.append(f"{entry['tokens']} in {entry['facts']['graphs']} graphs")
        cells[-1] = "; ".join(filter(None, [cells[-1], *notes]))
    return ["model", *map(str, lengths), "targets"], list(lines.values())
