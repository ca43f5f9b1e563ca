"""Progress of reading: tokens, tokens/s, time left and memory; without a terminal a line now and then."""

import time

from titans.cli.timed_bar import TimedBar
from titans.evaluation.stream_loss import resident_bytes


class ReadingBar(TimedBar):
    """To be entered; `add` counts tokens as they are read."""

    def __init__(self, title: str, total: int) -> None:
        super().__init__(title, total)
        self._title, self._total, self.read = title, total, 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def add(self, tokens: int) -> None:
        self.read += tokens
        now = time.monotonic()
        speed = self.read / max(now - self.started, 1e-9)
        figures = (
            f"{self.read:,} of {self._total:,} tokens, {speed:,.0f} tokens/s, "
            f"process {resident_bytes() / 1e6:,.0f} MB"
        )
        left = (self._total - self.read) / max(speed, 1e-9)
        self.update(now, self.read, figures, f"{self._title}: {figures}, {left:.0f} s left")
