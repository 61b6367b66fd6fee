"""A progress bar on standard error: one line, rewritten in place on a terminal, silent elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO


class Progress:
    """`with Progress("translate", total) as progress: progress.advance()`; rate and time left included.

    total: expected units, or 0 if unknown. unit: what one step is ("image", "B" for bytes, shown in MiB).
    start: units that an earlier run has done.
    """

    def __init__(
        self, title: str, total: int = 0, *, unit: str = "it", start: int = 0, stream: TextIO | None = None
    ) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = self._done_before = start
        self._stream = sys.stderr if stream is None else stream
        self._visible = self._stream.isatty()
        self._start = time.monotonic()
        self._shown = 0.0

    def __enter__(self) -> Progress:
        return self

    def advance(self, steps: int = 1) -> None:
        """Count `steps` more units as done."""
        self.done += steps
        now = time.monotonic()
        if self._visible and (now - self._shown > 0.1 or self.done == self.total):
            self._shown = now
            self._stream.write(f"\r{self._line(now - self._start)}\x1b[K")
            self._stream.flush()

    def write(self, message: str) -> None:
        """Print a line of its own without breaking the bar."""
        self._stream.write(f"\r{message}\x1b[K\n" if self._visible else f"{message}\n")
        self._stream.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._visible and self.done > self._done_before:
            self._stream.write("\n")

    def _line(self, elapsed: float) -> str:
        scale, unit = (2**20, "MiB") if self.unit == "B" else (1, self.unit)
        rate = (self.done - self._done_before) / scale / max(elapsed, 1e-9)
        if not self.total:
            return f"{self.title}: {self.done / scale:.0f} {unit}, {rate:.2f} {unit}/s"
        filled = 24 * self.done // self.total
        left = (self.total - self.done) / scale / max(rate, 1e-9)
        bar = "#" * filled + "-" * (24 - filled)
        count = f"{self.done / scale:.0f}/{self.total / scale:.0f} {unit}"
        return f"{self.title} [{bar}] {count}, {rate:.2f} {unit}/s, {int(left) // 60}:{int(left) % 60:02d} left"
