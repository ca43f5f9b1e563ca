"""What watches a run: the log file, the terminal, and the signals that end it early."""

import contextlib
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from titans.training.checkpoints import write_text_atomically

LOG_NAME = "log.jsonl"


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log file in order; a last line cut short by a crash is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


class JsonLinesLog(TrainerCallback):
    """One line per step and evaluation in ``log.jsonl``; resuming drops what came after the checkpoint."""

    def __init__(self, out: Path):
        self._path = out / LOG_NAME
        self._file: TextIO | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        kept = [record for record in read_log(self._path) if record["step"] <= state.global_step]
        write_text_atomically(self._path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = self._path.open("a", encoding="utf-8")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **_: Any,
    ) -> None:
        if self._file is not None:
            # NaN is not JSON; a run stops on it, but an evaluation may show one.
            plain = {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in logs.items()
            }
            self._file.write(json.dumps({"step": state.global_step, **plain}) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file; the run is over, well or not."""
        if self._file is not None:
            self._file.close()
            self._file = None


class TerminalProgress(TrainerCallback):
    """A bar with loss, speed and time left at a terminal; elsewhere about fifty plain lines."""

    def __init__(self, console: Console):
        self._console = console
        self._validation = math.nan
        self._progress: Progress | None = None
        self._task: Any = None
        self._started = (0.0, 0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._started = (time.perf_counter(), state.global_step)
        if not state.is_world_process_zero or not self._console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._progress.add_task(
            "", total=state.max_steps, completed=state.global_step, figures=""
        )
        self._progress.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **_: Any,
    ) -> None:
        if not state.is_world_process_zero:
            return
        step = state.global_step
        if "eval_loss" in logs:
            self._console.print(
                f"step {step}: validation loss {logs['eval_loss']:.4f}", highlight=False, soft_wrap=True
            )
        if "loss" not in logs:
            return
        figures = f"loss {logs['loss']:.4f}  {logs['tokens_per_second']:,.0f} tokens/s"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, figures=figures)
        elif step in (1, state.max_steps) or step % max(1, state.max_steps // 50) == 0:
            started, first = self._started
            left = (state.max_steps - step) * (time.perf_counter() - started) / (step - first)
            self._console.print(
                f"step {step}/{state.max_steps}  {figures}  lr {logs['learning_rate']:.2e}  "
                f"grad norm {logs['grad_norm']:.2f}  {left:.0f} s left",
                highlight=False,
                soft_wrap=True,
            )

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class StopRequest:
    """Whether SIGINT (Ctrl-C) or SIGTERM has asked the run to end after the step in progress."""

    def __init__(self) -> None:
        self.signal: int | None = None


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """While open, a first SIGINT or SIGTERM only sets the request; a second one acts as it always does."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield request
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}

    def ask(number: int, frame: FrameType | None) -> None:
        request.signal = number
        for each in signals:
            signal.signal(each, before[each])
        print(
            f"\n{signal.Signals(number).name}: finishing this step, then saving (again: stop at once)",
            file=sys.stderr,
        )

    for number in signals:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        for number in signals:
            signal.signal(number, before[number])


class GracefulStop(TrainerCallback):
    """Ends the run after the current step, with a checkpoint, once it is asked to."""

    def __init__(self, request: StopRequest):
        self._request = request

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        asked = self._request.signal is not None
        if args.world_size > 1:
            # A signal may reach the processes in different steps: they must stop in the same one.
            flag = torch.tensor(int(asked), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            asked = bool(flag)
        if asked:
            control.should_save = True
            control.should_training_stop = True
