"""One way to measure: a fresh process per row, warm-up, median of repeats, peak memory, one JSON file.

A benchmark script holds workloads: functions that take a row's settings (plain JSON) and return the step to
be timed. `Session.measure` runs one of them in a process of its own, under another interpreter if asked, so
that a peer can live in its own environment; nothing but torch is needed there.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
SEED = 0

# glibc hands large blocks back to the kernel at every free and takes page faults at every malloc: up to 3x on
# workloads with many large temporaries, ours and the peers'. Every row keeps what it has freed.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)}

Step = Callable[[], object]


@dataclass(frozen=True)
class Measurement:
    """Of one row: seconds of every repeat, and how far resident memory grew while it ran."""

    seconds: list[float]
    peak_bytes: int
    versions: dict[str, str]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class RowFailed(RuntimeError):  # noqa: N818 (it is a result, and is stored as one)
    """The process of a row ended with an error; the message holds the last line that it said."""


@dataclass
class Session:
    """Rows measured in one run, and everything that a reader needs to judge them."""

    name: str
    script: Path
    options: dict[str, Any]
    threads: int
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    summary: dict[str, Any] = dataclasses.field(default_factory=dict)

    def measure(
        self,
        workload: str,
        settings: dict[str, Any],
        *,
        repeats: int = 5,
        warmup: int = 1,
        python: str = sys.executable,
    ) -> Measurement:
        """Run `workload(settings)` of the script in a fresh process; the row is kept for the JSON file."""
        job = {
            "script": str(self.script),
            "workload": workload,
            "settings": settings,
            "repeats": repeats,
            "warmup": warmup,
            "threads": self.threads,
        }
        environment = {**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": str(self.threads)}
        command = [python, str(Path(__file__).resolve()), json.dumps(job)]
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        row: dict[str, Any] = {
            "workload": workload,
            "settings": settings,
            "repeats": repeats,
            "warmup": warmup,
        }
        self.rows.append(row)
        if run.returncode != 0:
            said = run.stderr.strip().splitlines() or [f"exit code {run.returncode}"]
            row["error"] = said[-1]
            raise RowFailed(f"{workload} {settings}: {said[-1]}")
        result = Measurement(**json.loads(run.stdout.splitlines()[-1]))
        row |= {"median_seconds": result.median, **dataclasses.asdict(result)}
        return result

    def save(self) -> Path:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{self.name}.json"
        record = {
            "name": self.name,
            "command": f"python {self.script.relative_to(ROOT)}",
            "options": self.options,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "seed": SEED,
            "machine": machine(self.threads),
            "allocator": ALLOCATOR,
            "summary": self.summary,
            "rows": self.rows,
        }
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        return path


def commit() -> str:
    """The checkout's commit, marked when files differ from it."""
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return run.stdout.strip() or "unknown"


def machine(threads: int) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    cpuinfo, meminfo = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    if cpuinfo.exists() and (found := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())):
        cpu = found.group(1)
    memory = None
    if meminfo.exists() and (found := re.search(r"MemTotal:\s*(\d+) kB", meminfo.read_text())):
        memory = round(int(found.group(1)) / 2**20, 1)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": memory,
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
    }


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """First column to the left, the others to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _resident(field: str) -> int:
    """Bytes of VmRSS or VmHWM (the high-water mark) of this process."""
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(rf"{field}:\s*(\d+) kB", status.read_text())):
        return int(found.group(1)) * 1024
    import resource  # no /proc: the high-water mark since the start is all there is

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _forget_peak() -> None:
    """Set the high-water mark back to what is resident now (Linux)."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def _work(job: dict[str, Any]) -> dict[str, Any]:
    """What the fresh process does: build the step, then time it and watch its memory."""
    import torch

    torch.set_num_threads(job["threads"])
    torch.manual_seed(SEED)
    sys.path.insert(0, str(ROOT))  # titans from this checkout
    spec = importlib.util.spec_from_file_location("workloads", job["script"])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["workloads"] = module
    spec.loader.exec_module(module)
    step: Step = getattr(module, job["workload"])(job["settings"])
    before = _resident("VmRSS")
    _forget_peak()
    seconds = []
    for repeat in range(job["warmup"] + job["repeats"]):
        start = time.perf_counter()
        step()
        if repeat >= job["warmup"]:
            seconds.append(time.perf_counter() - start)
    peak = max(_resident("VmHWM") - before, 0)
    versions = {"torch": torch.__version__}
    if "titans_pytorch" in sys.modules:
        from importlib.metadata import version

        versions["titans-pytorch"] = version("titans-pytorch")
    return {"seconds": seconds, "peak_bytes": peak, "versions": versions}


if __name__ == "__main__":
    print(json.dumps(_work(json.loads(sys.argv[1]))))
