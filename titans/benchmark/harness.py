"""One way to measure: fresh processes, warm-up, median of repeats, peak memory, one JSON file.

A benchmark script holds workloads: functions that take a row's settings (plain JSON) and return the step to
be timed. `Session.measure` runs one of them in a process of its own, under another interpreter if asked, so
that a peer can live in its own environment; nothing but torch is needed there. What the process does is in
`worker.py`.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "results"
WORKER = Path(__file__).resolve().parent / "worker.py"
SEED = 0
BREAKS = 3  # processes lost, after which the rows that are left are given up

# glibc hands large blocks back to the kernel at every free and takes page faults at every malloc: up to 3x on
# workloads with many large temporaries, ours and the peers'. Every row keeps what it has freed.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)}

Step = Callable[[], object]


@dataclass(frozen=True)
class Measurement:
    """Of one row: seconds of every repeat, and the memory that its steps took above what was there before.

    On a CPU peak_bytes is how far resident memory grew, on a GPU what the allocator held at most.
    """

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
    """Rows measured in one run, and everything that a reader needs to judge them.

    script: the file with the workloads. command: how the run was started; None: as that script.
    commit: of the code, where git cannot tell. output: folder of the JSON file.
    """

    name: str
    script: Path
    options: dict[str, Any]
    threads: int
    command: str | None = None
    commit: str | None = None
    output: Path = RESULTS
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
        (result,) = self.measure_each(workload, [settings], repeats=repeats, warmup=warmup, python=python)
        if isinstance(result, RowFailed):
            raise result
        return result

    def measure_each(
        self,
        workload: str,
        settings: Sequence[dict[str, Any]],
        *,
        repeats: int = 5,
        warmup: int = 1,
        python: str = sys.executable,
        timeout: float | None = None,
    ) -> list[Measurement | RowFailed]:
        """The same for several rows in one process, in their order: a GPU's process takes 10 s to start.

        A row that fails is kept as such and the next one follows, in a new process where this one broke off
        (a GPU is lost to a process after an illegal access). After `timeout` seconds, or `BREAKS` processes
        that broke off, the rest has failed.
        """
        results: list[Measurement | RowFailed] = []
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        breaks = 0
        while len(results) < len(settings):
            rest = list(settings[len(results) :])
            left = None if timeout is None else max(deadline - time.monotonic(), 0.0)
            found, said = self._process(workload, rest, repeats, warmup, python, left)
            missing = len(rest) - len(found)
            if time.monotonic() >= deadline:
                found += missing * [{"error": f"not measured within {timeout:g} s"}]
            elif missing:
                breaks += 1
                if not (found and "error" in found[-1]):  # no row has told yet what ended the process
                    found.append({"error": said})
                if breaks == BREAKS:
                    found += (len(rest) - len(found)) * [{"error": f"given up after {BREAKS} lost processes"}]
            for setting, outcome in zip(rest, found, strict=False):
                row: dict[str, Any] = {
                    "workload": workload,
                    "settings": setting,
                    "repeats": repeats,
                    "warmup": warmup,
                }
                self.rows.append(row)
                if "error" in outcome:
                    row["error"] = outcome["error"]
                    results.append(RowFailed(f"{workload} {setting}: {outcome['error']}"))
                else:
                    result = Measurement(**outcome)
                    row |= {"median_seconds": result.median, **dataclasses.asdict(result)}
                    results.append(result)
        return results

    def compile(
        self, workload: str, settings: Sequence[dict[str, Any]], timeout: float, **environment: str
    ) -> None:
        """Take one step of every row and time nothing: what is compiled stays on disk for `measure_each`."""
        self._process(workload, list(settings), 0, 1, sys.executable, timeout, **environment)

    def _process(
        self,
        workload: str,
        settings: list[dict[str, Any]],
        repeats: int,
        warmup: int,
        python: str,
        timeout: float | None,
        **environment: str,
    ) -> tuple[list[dict[str, Any]], str]:
        """What a fresh process found, one entry a row as far as it came, and the last line that it said."""
        job = {
            "script": str(self.script),
            "workload": workload,
            "settings": settings,
            "repeats": repeats,
            "warmup": warmup,
            "threads": self.threads,
            "seed": SEED,
        }
        environment = {**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": str(self.threads), **environment}
        command = [python, str(WORKER), json.dumps(job)]
        try:
            run = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired as expired:
            stdout = expired.stdout or b""
            text = stdout.decode() if isinstance(stdout, bytes) else stdout
            return _rows(text[: text.rfind("\n") + 1]), "out of time"  # the last line may be half a row
        said = run.stderr.strip().splitlines() or [f"exit code {run.returncode}"]
        return _rows(run.stdout), said[-1]

    def save(self) -> Path:
        self.output.mkdir(parents=True, exist_ok=True)
        path = self.output / f"{self.name}.json"
        record = {
            "name": self.name,
            "command": self.command or f"python {self.script.relative_to(ROOT)}",
            "options": self.options,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": self.commit or commit(),
            "seed": SEED,
            "machine": machine(self.threads),
            "allocator": ALLOCATOR,
            "summary": self.summary,
            "rows": self.rows,
        }
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        return path


def _rows(stdout: str) -> list[dict[str, Any]]:
    """The worker marks its rows: a workload may print, too."""
    marked = [line.removeprefix("row ") for line in stdout.splitlines() if line.startswith("row ")]
    return [json.loads(line) for line in marked]


def commit() -> str:
    """The checkout's commit, marked when files differ from it; "unknown" without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
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
    console = Console()
    if not console.is_terminal:  # 80 columns are assumed of a pipe
        console.width = 200
    console.print(table)
