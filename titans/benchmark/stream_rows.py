"""The rows of `titans bench stream`: who reads and decodes at which positions, and what the times say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from titans.benchmark.harness import Job, Measurement, Progress, RowFailed, Session

WORKLOADS = Path(__file__).resolve().parent / "stream.py"
BASELINE = "attention"
TIMEOUTS = {"cuda": 150.0, "cpu": 900.0}  # seconds of a row: 10 million tokens at 70,000 tokens/s; 1 at 1,200
LONG = 200_000  # tokens, from which one repeat is enough

_MEMORY = {"memory_expansion": 1, "chunk_size": 64}  # F = 64
# Fields of the configuration. In this order: what the targets ask for comes first.
ROWS: dict[str, dict[str, Any]] = {
    "lmm": {"variant": "lmm"} | _MEMORY,
    "mag": {"variant": "mag"} | _MEMORY,
    "mag-64": {"variant": "mag", "window_size": 64} | _MEMORY,  # what a wide window costs
    # Without persistent tokens, which would cost it PyTorch's fastest kernel.
    BASELINE: {"variant": "attention", "num_persistent_tokens": 0, "window_size": None},
    "mal": {"variant": "mal"} | _MEMORY,
    "mac": {"variant": "mac"} | _MEMORY,
}
# Two layers of width 256 and 4,096 words, for a CPU; overrides "tiny".
CPU_MODEL = {
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "intermediate_size": 768,
    "memory_head_dim": 64,
    "vocab_size": 4096,
    "window_size": 512,
    "num_persistent_tokens": 128,
}
LENGTHS = (1024, 10_240, 16_384, 102_400, 2**20, 2**21)
CPU_LENGTHS = (10_240, 102_400, 2**20)
LONGEST = 10 * 2**20  # read by one model, to see that nothing grows there, either
BASELINE_LONGEST = 2**20  # one forward: 2 million tokens take a 170M model about 3 minutes

PREFILL_TARGET = 20.0  # seconds for 2 million tokens, 170M
FLAT_TARGET = 1.05  # decoding at any position over that at the first
AHEAD_FROM, AHEAD_BATCH = 16_384, 64  # from where decoding has to be faster than full attention's
CPU_TARGET = 12_000.0  # tokens/s


@dataclass(frozen=True)
class Plan:
    """A run: where, which named sizes, positions, and numbers of streams that decode together."""

    device: str
    sizes: tuple[str, ...]
    lengths: tuple[int, ...]
    batches: tuple[int, ...]
    fields: tuple[tuple[str, Any], ...] = ()  # of every configuration, under those of its row

    def jobs(self, row: str) -> list[Job]:
        """Shortest first: what a prefill has read is what decoding at its end starts from."""
        jobs = []
        timeout = TIMEOUTS[self.device]
        of_attention = "attention_" if row == BASELINE else ""
        for size in self.sizes:
            lengths = list(self.lengths)
            if row == "lmm" and size == self.sizes[0] and 2**21 in lengths:
                lengths.append(LONGEST)
            for tokens in sorted(lengths):
                settings = {
                    "device": self.device,
                    "dtype": "bfloat16" if self.device == "cuda" else "float32",
                    "size": size,
                    "config": dict(self.fields) | ROWS[row],
                    "tokens": tokens,
                }
                if row != BASELINE or tokens <= BASELINE_LONGEST:
                    repeats = 1 if tokens > LONG else 3
                    jobs.append(Job(f"{of_attention}prefill", settings, repeats, 0, timeout, row))
                if tokens < LONGEST:
                    jobs += [
                        Job(f"{of_attention}decode", settings | {"batch": batch}, 20, 3, timeout, row)
                        for batch in self.batches
                    ]
        return jobs


Key = tuple[str, str, str, int, int]  # row, size, what, batch (0: prefill), tokens
Found = dict[Key, Measurement | RowFailed]


def measure(session: Session, plan: Plan, names: Sequence[str]) -> None:
    """One process measures everything; saved, with the summary, after each row.

    On a CPU a process for each model and position: there, peak memory is that of the process.
    """
    # Size by size: the targets are those of the first.
    jobs = sorted(
        (job for name in names for job in plan.jobs(name)),
        key=lambda job: plan.sizes.index(job.settings["size"]),
    )
    found: Found = {}
    progress = Progress(names=[f"{job.name} {job.settings['size']}" for job in jobs])
    together = [jobs]
    if plan.device == "cpu":
        together = [list(some) for _, some in groupby(jobs, lambda job: (job.name, job.settings["tokens"]))]
    for job, result in chain.from_iterable(map(session.measure_each, together)):
        settings = job.settings
        what = job.workload.removeprefix("attention_")
        found[job.name, settings["size"], what, settings.get("batch", 0), settings["tokens"]] = result
        session.summary["table"] = summarise(found, plan)
        session.save()
        progress.add(f"{job.name} {settings['size']}", result)


def summarise(found: Found, plan: Plan) -> list[dict[str, Any]]:
    """One entry a measurement: seconds of a read or of a step, tokens/s, memory, and the targets."""

    def seconds(key: Key) -> float | None:
        result = found.get(key)
        return result.median if isinstance(result, Measurement) else None

    entries = []
    for key, result in found.items():
        row, size, what, batch, tokens = key
        mine = seconds(key)
        entry: dict[str, Any] = {"row": row, "size": size, "what": what, "batch": batch, "tokens": tokens}
        entry |= {"seconds": mine, "tokens_per_second": mine and (batch or tokens) / mine}
        if isinstance(result, Measurement):
            entry |= {"peak_bytes": result.peak_bytes, **result.facts, "error": None}
        else:
            entry["error"] = result.reason
        entry["targets"] = []
        if mine is not None and row != BASELINE:
            first = seconds((row, size, what, batch, min(plan.lengths)))
            baseline = seconds((BASELINE, size, what, batch, tokens))
            entry["targets"] = [
                {"what": name, "limit": limit, "value": value, "met": value <= limit}
                for name, limit, value in _targets(entry, plan, first, baseline)
            ]
        entries.append(entry)
    return entries


def _targets(
    entry: dict[str, Any], plan: Plan, first: float | None, baseline: float | None
) -> Iterator[tuple[str, float, float]]:
    """What was asked of this entry: name, upper limit, and what came."""
    mine, tokens = entry["seconds"], entry["tokens"]
    asked = entry["row"] in ("lmm", "mag", "mag-64")
    if entry["what"] == "prefill":
        if asked and plan.device == "cpu" and plan.fields:
            yield "seconds", tokens / CPU_TARGET, mine
        if asked and plan.device == "cuda" and entry["size"] == "170m" and tokens == 2**21:
            yield "seconds", PREFILL_TARGET, mine
        return
    if plan.device == "cuda" and first is not None:
        yield "flat", FLAT_TARGET, mine / first
    compared = tokens >= AHEAD_FROM and entry["batch"] == AHEAD_BATCH
    if plan.device == "cuda" and baseline is not None and compared:
        yield "over attention's", 1.0, mine / baseline


def table(entries: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and, for each model, lines of tokens/s and of memory at each position."""
    lengths = sorted({entry["tokens"] for entry in entries})
    lines: dict[tuple[str, ...], dict[int, str]] = {}
    missed: dict[tuple[str, ...], list[str]] = {}

    def put(entry: dict[str, Any], what: str, text: str) -> tuple[str, ...]:
        line = (f"{entry['row']} {entry['size']}", what)
        lines.setdefault(line, {})[entry["tokens"]] = text
        return line

    for entry in entries:
        of = f"decode, {entry['batch']} streams" if entry["batch"] else "prefill"
        if entry["error"]:
            put(entry, f"{of}, tokens/s", "failed: " + entry["error"].partition(":")[0][:24])
            continue
        line = put(entry, f"{of}, tokens/s", f"{entry['tokens_per_second']:,.0f}")
        missed.setdefault(line, []).extend(
            f"{target['what']} at {entry['tokens']:,} {target['value']:.3g}, asked {target['limit']:.3g}"
            for target in entry["targets"]
            if not target["met"]
        )
        if not entry["batch"]:
            put(entry, "prefill, peak MB above the weights", f"{entry['peak_bytes'] / 1e6:,.0f}")
        put(entry, "state of a stream, MB", f"{entry['state_bytes'] / 1e6:,.1f}")
    header = ["model", "", *(f"{tokens:,}" for tokens in lengths), "missed"]
    cells = [
        [*line, *(texts.get(tokens, "") for tokens in lengths), "; ".join(missed.get(line, []))]
        for line, texts in lines.items()
    ]
    return header, cells
