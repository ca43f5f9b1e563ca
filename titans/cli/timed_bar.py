"""Progress on stderr: a bar with figures and time left at a terminal; elsewhere a line every ten seconds."""

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_EVERY = 10.0  # seconds between lines where there is no terminal


class TimedBar:
    """To be entered; the bar is gone afterwards. total: None where it is not known."""

    def __init__(self, title: str, total: int | None) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.started = self._printed = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=total, figures="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, now: float, completed: int, figures: str, line: str) -> None:
        """figures: beside the bar. line: what is printed instead, if it is time for that."""
        self._bar.update(self._task, completed=completed, figures=figures)
        if not self._console.is_terminal and now - self._printed >= _EVERY:
            self._console.print(line, markup=False)
            self._printed = now
