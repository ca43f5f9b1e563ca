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
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import cycle, takewhile
from pathlib import Path
from queue import SimpleQueue
from types import MappingProxyType
from typing import Any

from titans.benchmark.machine import ROOT, commit, machine

RESULTS = ROOT / "results"
WORKER = Path(__file__).resolve().parent / "worker.py"
SEED = 0
BREAKS = 3  # processes that a workload may break
START_UP = 60.0  # seconds that a process may take before its first row begins
OUT_OF_TIME = "not measured: out of time"
TOO_LONG = "not measured within"

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

    @property
    def reason(self) -> str:
        """Without the row's workload and settings."""
        return str(self).partition("}: ")[2]


@dataclass(frozen=True)
class Job:
    """A row to be measured: `workload(settings)` of the session's script returns the step.

    name: the caller's, for its tables. timeout: seconds from the end of the row before to this one's.
    """

    workload: str
    settings: dict[str, Any]
    repeats: int = 5
    warmup: int = 1
    timeout: float = math.inf
    name: str = ""

    @property
    def key(self) -> str:
        return _key(self.workload, self.settings)


Result = Measurement | RowFailed


@dataclass
class Session:
    """Rows measured in one run, and everything that a reader needs to judge them.

    script: the file with the workloads. command: how the run was started; None: as that script.
    commit: of the code, where git cannot tell. output: folder of the JSON file. budget: seconds after which
    nothing more is measured. resume: take the rows that the file has already, from the same machine and
    commit. gpus: what CUDA_VISIBLE_DEVICES may name, cards of one kind to measure on side by side; none: the
    first.
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
    gpus: Sequence[str] = ()
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    compiled: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    summary: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit = self.commit or commit()
        self.machine = machine(self.threads)
        self.started = time.monotonic()
        self.deadline = math.inf if self.budget is None else self.started + self.budget
        self._running: set[subprocess.Popen[str]] = set()
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
        ((_, result),) = self.measure_each([Job(workload, settings, repeats, warmup)], python=python)
        if isinstance(result, RowFailed):
            raise result
        return result

    def measure_each(
        self, jobs: Iterable[Job], *, python: str = sys.executable
    ) -> Iterator[tuple[Job, Result]]:
        """The same for many rows in one process, as they come: a GPU's process takes 10 s to start.

        Rows that the file holds already come first. A row that fails is kept as such and the next one
        follows, in a new process where this one broke off (a GPU is lost to a process after an illegal
        access). A workload that broke `BREAKS` processes is given up, and all is once the budget is spent.
        With several `gpus` each has a process and its share of the rows, and says in them which it was.
        """
        rest = []
        for job in jobs:
            if row := self._known.get(job.key):
                yield job, self._add(row)
            else:
                rest.append(job)
        if len(self.gpus) < 2:
            yield from self._measure(rest, python)
            return
        results: SimpleQueue[tuple[Job, Result] | None] = SimpleQueue()

        def measure_share(number: int) -> None:
            try:
                share = rest[number :: len(self.gpus)]
                for result in self._measure(share, python, self.gpus[number]):
                    results.put(result)
            finally:
                results.put(None)

        with self._side_by_side(len(self.gpus)) as pool:
            shares = [pool.submit(measure_share, number) for number in range(len(self.gpus))]
            for _ in shares:
                yield from iter(results.get, None)
            for share in shares:
                share.result()

    def _measure(self, rest: list[Job], python: str, gpu: str | None = None) -> Iterator[tuple[Job, Result]]:
        where = {} if gpu is None else {"gpu": gpu}
        lost: Counter[str] = Counter()

        def refused(job: Job) -> str | None:
            if time.monotonic() >= self.deadline:
                return OUT_OF_TIME
            return f"given up after {BREAKS} lost processes" if lost[job.workload] == BREAKS else None

        while rest:
            if reason := refused(rest[0]):
                job = rest.pop(0)
                yield job, self._add(_row(job, {"error": reason}) | where)
                continue
            together = list(takewhile(lambda job: not refused(job), rest))
            for job, outcome in self._process(together, python, environment=_on(gpu)):
                rest.remove(job)
                yield job, self._add(_row(job, outcome) | where)
            if job is not together[-1]:
                lost[job.workload] += 1

    def knows(self, job: Job) -> bool:
        """Whether the row need not be measured again."""
        return job.key in self._known

    def compile(
        self, groups: Sequence[Sequence[Job]], processes: int, timeout: float, **environment: str
    ) -> None:
        """Take one step of every row and time nothing: what is compiled stays on disk for `measure_each`.

        A process for each group, several side by side, the first groups first. What every first step took,
        compilers beside it, is kept in the file.
        """
        if groups:
            print(f"compiling: {len(groups)} processes, {processes} at a time", flush=True)
        with self._side_by_side(processes) as pool:
            futures = [
                pool.submit(self._compile, group, timeout, environment | _on(gpu))
                for group, gpu in zip(groups, cycle(self.gpus or [None]), strict=False)
            ]
            for number, future in enumerate(as_completed(futures), 1):
                print(f"compiled {number} of {len(groups)}: {future.result()}", flush=True)

    @contextlib.contextmanager
    def _side_by_side(self, count: int) -> Iterator[ThreadPoolExecutor]:
        """Threads that watch a process each; interrupted, all of them end and start no other."""
        with ThreadPoolExecutor(count) as pool:
            try:
                yield pool
            except BaseException:
                self.deadline = -math.inf
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self._running):
                    _kill(process)
                raise

    def _compile(self, group: Sequence[Job], timeout: float, environment: dict[str, str]) -> str:
        start = time.monotonic()
        single = [dataclasses.replace(job, repeats=0, warmup=1, timeout=timeout) for job in group]
        error = ""
        for job, outcome in self._process(single, sys.executable, start + timeout, environment):
            found = {name: outcome[name] for name in ("first_seconds", "error") if name in outcome}
            self.compiled.append({"workload": job.workload, "settings": job.settings} | found)
            error = error or f", failed: {outcome['error'][:100]}" if "error" in outcome else error
        return f"{group[0].name}, {time.monotonic() - start:.0f} s{error}"

    def _process(
        self,
        jobs: Sequence[Job],
        python: str,
        until: float = math.inf,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> Iterator[tuple[Job, dict[str, Any]]]:
        """What a fresh process finds, row by row. Ends early, with the error of the row that broke it."""
        work = [[job.workload, job.settings, job.repeats, job.warmup] for job in jobs]
        order = {"script": str(self.script), "jobs": work, "threads": self.threads, "seed": SEED}
        outcome: dict[str, Any] = {}
        with (
            tempfile.TemporaryFile("w+") as stderr,
            subprocess.Popen(
                [python, str(WORKER), json.dumps(order)],
                cwd=ROOT,
                env={**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": str(self.threads), **environment},
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,  # compilers that it starts end with it
            ) as process,
        ):
            assert process.stdout is not None
            self._running.add(process)
            try:
                start_up = START_UP
                for job in jobs:
                    limit = min(time.monotonic() + start_up + job.timeout, until, self.deadline)
                    if (row := _next_row(process, process.stdout, limit)) is None:
                        break
                    outcome, start_up = row, 0.0
                    yield job, outcome
                else:
                    return
                code, now = process.wait(), time.monotonic()
            finally:
                self._running.discard(process)
                _kill(process)
            if "error" in outcome:  # of the row before: this is what ended the process
                return
            stderr.seek(0)
            said = stderr.read().strip().splitlines() or [f"exit code {code}"]
        if now >= self.deadline:
            said = [OUT_OF_TIME]
        elif now >= limit:
            said = [f"{TOO_LONG} {job.timeout:g} s"]
        yield job, {"error": said[-1]}

    def _add(self, row: dict[str, Any]) -> Result:
        self.rows.append(row)
        return result_of(row)

    def _stored_rows(self) -> dict[str, dict[str, Any]]:
        """Rows without an error that `path` holds from this machine and commit; their compilation, too."""
        if not self.path.exists():
            return {}
        record = json.loads(self.path.read_text(encoding="utf-8"))
        here, there = comparable(self.machine), comparable(record["machine"])
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


class Progress:
    """A printed line for every name, once all that is measured for it is there, with the time to the end."""

    def __init__(self, names: Sequence[str]) -> None:
        self.start = time.monotonic()
        self.left = Counter(names)
        self.total = len(names)
        self.failed: dict[str, list[RowFailed]] = {}

    def add(self, name: str, result: Result) -> None:
        self.left[name] -= 1
        if isinstance(result, RowFailed):
            self.failed.setdefault(name, []).append(result)
        if self.left[name]:
            return
        left, failed = self.left.total(), self.failed.get(name, [])
        seconds = time.monotonic() - self.start
        note = f", {len(failed)} failed: {failed[0].reason}" if failed else ""
        eta = f"{seconds:.0f} s, {seconds / (self.total - left) * left:.0f} s left"
        print(f"{self.total - left}/{self.total} rows, {eta}: {name}{note}", flush=True)


def _next_row(process: subprocess.Popen[str], lines: Iterable[str], until: float) -> dict[str, Any] | None:
    """What the process says next; None where it ended, or was ended at `until`, before."""
    left = min(max(until - time.monotonic(), 0.0), threading.TIMEOUT_MAX)
    alarm = threading.Timer(left, _kill, [process])
    alarm.start()
    try:
        for line in lines:
            # Marked, because a workload may print, too; without its end the line was cut off.
            if line.startswith("row ") and line.endswith("\n"):
                outcome: dict[str, Any] = json.loads(line.removeprefix("row "))
                return outcome
        return None
    finally:
        alarm.cancel()


def _kill(process: subprocess.Popen[str]) -> None:
    """The process and those that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def result_of(row: dict[str, Any]) -> Result:
    """What a stored row says."""
    if "error" in row:
        return RowFailed(f"{row['workload']} {row['settings']}: {row['error']}")
    return Measurement(**{field.name: row[field.name] for field in dataclasses.fields(Measurement)})


def comparable(machine: dict[str, Any]) -> Any:
    """What two runs must share for their rows to stand in one file: a card, its driver and compilers."""
    return machine.get("gpu") or machine


def _on(gpu: str | None) -> dict[str, str]:
    return {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}


def _key(workload: str, settings: dict[str, Any]) -> str:
    return json.dumps([workload, settings], sort_keys=True)


def _row(job: Job, outcome: dict[str, Any]) -> dict[str, Any]:
    """As it is stored."""
    row = {"workload": job.workload, "settings": job.settings, "repeats": job.repeats, "warmup": job.warmup}
    if "error" not in outcome:
        row["median_seconds"] = statistics.median(outcome["seconds"])
    return row | outcome


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
