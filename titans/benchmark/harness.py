"""One way to measure: fresh processes, warm-up, median of repeats, peak memory, one JSON file.

A benchmark script holds workloads: functions that take a row's settings (plain JSON) and return the step to
be timed. `Session.measure` runs one of them in a process of its own, under another interpreter if asked, so
that a peer can live in its own environment; nothing but torch is needed there. What the process does is in
`worker.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import math
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "results"
WORKER = Path(__file__).resolve().parent / "worker.py"
SEED = 0
BREAKS = 3  # processes lost, after which the rows that are left are given up
OUT_OF_TIME = "not measured: out of time"

# glibc hands large blocks back to the kernel at every free and takes page faults at every malloc: up to 3x on
# workloads with many large temporaries, ours and the peers'. Every row keeps what it has freed.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)}

Step = Callable[[], object]


@dataclass(frozen=True)
class Measurement:
    """Of one row: seconds of every repeat, and the memory that its steps took above what was there before.

    On a CPU peak_bytes is how far resident memory grew, on a GPU what the allocator held at most.
    first_seconds: until the first step had ended, inputs and compilation included. facts: what the workload
    found out about itself.
    """

    seconds: list[float]
    peak_bytes: int
    versions: dict[str, str]
    first_seconds: float = 0.0
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class RowFailed(RuntimeError):  # noqa: N818 (it is a result, and is stored as one)
    """The process of a row ended with an error; the message holds the last line that it said."""


@dataclass
class Session:
    """Rows measured in one run, and everything that a reader needs to judge them.

    script: the file with the workloads. command: how the run was started; None: as that script.
    commit: of the code, where git cannot tell. output: folder of the JSON file. budget: seconds after which
    nothing more is measured. resume: take the rows that the file has already, from the same machine and
    commit. save_each: write the file after every row, for runs that may be cut off.
    """

    name: str
    script: Path
    options: dict[str, Any]
    threads: int
    command: str | None = None
    commit: str | None = None
    output: Path = RESULTS
    budget: float | None = None
    resume: bool = False
    save_each: bool = False
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    compiled: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    summary: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit = self.commit or commit()
        self.machine = machine(self.threads)
        self.deadline = math.inf if self.budget is None else time.monotonic() + self.budget
        self._known = self._stored_rows() if self.resume else {}

    @property
    def path(self) -> Path:
        return self.output / f"{self.name}.json"

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
        timeout: float = math.inf,
    ) -> list[Measurement | RowFailed]:
        """The same for several rows in one process, in their order: a GPU's process takes 10 s to start.

        A row that fails is kept as such and the next one follows, in a new process where this one broke off
        (a GPU is lost to a process after an illegal access). After `timeout` seconds, or `BREAKS` processes
        that broke off, the rest has failed.
        """
        results: dict[int, Measurement | RowFailed] = {}
        deadline = min(time.monotonic() + timeout, self.deadline)

        def add(number: int, row: dict[str, Any]) -> None:
            self.rows.append(row)
            results[number] = _result(row)
            if self.save_each:
                self.save()

        for number, setting in enumerate(settings):
            if row := self._known.get(_key(workload, setting)):
                add(number, row)
        processes = 0
        while rest := [number for number in range(len(settings)) if number not in results]:
            left = [settings[number] for number in rest]
            if time.monotonic() >= deadline:
                outcomes: Iterator[dict[str, Any]] = iter(len(rest) * [{"error": OUT_OF_TIME}])
            elif processes == BREAKS:
                outcomes = iter(len(rest) * [{"error": f"given up after {BREAKS} lost processes"}])
            else:
                outcomes = self._process(workload, left, repeats, warmup, python, deadline)
                processes += 1
            for number, outcome in zip(rest, outcomes, strict=False):
                if "error" not in outcome:
                    outcome = {"median_seconds": statistics.median(outcome["seconds"])} | outcome
                row = {"workload": workload, "settings": settings[number]}
                add(number, row | {"repeats": repeats, "warmup": warmup} | outcome)
        return [results[number] for number in range(len(settings))]

    def knows(self, workload: str, settings: dict[str, Any]) -> bool:
        """Whether the row need not be measured again."""
        return _key(workload, settings) in self._known

    def compile(
        self, workload: str, settings: Sequence[dict[str, Any]], timeout: float, **environment: str
    ) -> None:
        """Take one step of every row and time nothing: what is compiled stays on disk for `measure_each`.

        How long each first step took, compilers beside it, is kept in the file.
        """
        deadline = min(time.monotonic() + timeout, self.deadline)
        outcomes = self._process(workload, list(settings), 0, 1, sys.executable, deadline, **environment)
        for setting, outcome in zip(settings, outcomes, strict=False):
            found = {name: outcome[name] for name in ("first_seconds", "error") if name in outcome}
            self.compiled.append({"workload": workload, "settings": setting} | found)

    def _process(
        self,
        workload: str,
        settings: list[dict[str, Any]],
        repeats: int,
        warmup: int,
        python: str,
        deadline: float,
        **environment: str,
    ) -> Iterator[dict[str, Any]]:
        """What a fresh process finds, row by row. Ends early, with the error of the row that broke it."""
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
        outcome: dict[str, Any] = {}
        found = 0
        with (
            tempfile.TemporaryFile("w+") as stderr,
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,  # compilers that it starts end with it
            ) as process,
        ):
            assert process.stdout is not None
            left = min(max(deadline - time.monotonic(), 0.0), threading.TIMEOUT_MAX)
            alarm = threading.Timer(left, _kill, [process])
            alarm.start()
            try:
                for line in process.stdout:
                    # Marked, because a workload may print, too; without its end the line was cut off.
                    if line.startswith("row ") and line.endswith("\n"):
                        outcome = json.loads(line.removeprefix("row "))
                        found += 1
                        yield outcome
                code = process.wait()
            finally:
                alarm.cancel()
                _kill(process)
            if found == len(settings) or "error" in outcome:  # this error is what ended it
                return
            stderr.seek(0)
            said = stderr.read().strip().splitlines() or [f"exit code {code}"]
        yield {"error": said[-1] if time.monotonic() < deadline else OUT_OF_TIME}

    def _stored_rows(self) -> dict[str, dict[str, Any]]:
        """Rows without an error that `path` holds from this machine and commit; their compilation, too."""
        if not self.path.exists():
            return {}
        record = json.loads(self.path.read_text(encoding="utf-8"))
        here, there = (where.get("gpu") or where for where in (self.machine, record["machine"]))
        for what, ours, theirs in (("machine", here, there), ("commit", self.commit, record["commit"])):
            if ours != theirs:
                print(f"nothing kept of {self.path}: its {what} is {theirs}, this one {ours}", flush=True)
                return {}
        rows = [row for row in record["rows"] if "error" not in row]
        print(f"kept of {self.path}: {len(rows)} rows", flush=True)
        self.compiled = record.get("compiled", [])
        return {_key(row["workload"], row["settings"]): row for row in rows}

    def save(self) -> Path:
        self.output.mkdir(parents=True, exist_ok=True)
        record = {
            "name": self.name,
            "command": self.command or f"python {self.script.relative_to(ROOT)}",
            "options": self.options,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": self.commit,
            "seed": SEED,
            "machine": self.machine,
            "allocator": ALLOCATOR,
            "summary": self.summary,
            "rows": self.rows,
        }
        if self.compiled:
            record["compiled"] = self.compiled
        unfinished = self.path.with_suffix(".part")  # a run that is cut off leaves the file before
        unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(self.path)
        return self.path


def _kill(process: subprocess.Popen[str]) -> None:
    """The process and those that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _key(workload: str, settings: dict[str, Any]) -> str:
    return json.dumps([workload, settings], sort_keys=True)


def _result(row: dict[str, Any]) -> Measurement | RowFailed:
    if "error" in row:
        return RowFailed(f"{row['workload']} {row['settings']}: {row['error']}")
    return Measurement(**{field.name: row[field.name] for field in dataclasses.fields(Measurement)})


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
    described = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": memory,
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
    }
    card = gpu()
    return described if card is None else described | {"gpu": card}


def gpu() -> dict[str, str] | None:
    """The first NVIDIA card, its driver, and the versions of what compiles for it; None without one."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    if run.returncode or run.stdout.count(", ") < 2:
        return None
    found = dict(zip(("name", "driver", "memory"), run.stdout.splitlines()[0].split(", "), strict=True))
    for package in ("torch", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


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
