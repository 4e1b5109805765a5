"""A progress line: how many jobs are done, how many failed, how fast it goes."""

import sys
from collections import deque
from contextlib import suppress
from typing import TextIO

from penstock import clock
from penstock.events import JobEnded

ON_A_TERMINAL = 0.2
"""Seconds between updates. Arbitrary, because: looks alive, and can still be read."""
IN_A_FILE = 10.0
"""Seconds between lines. Arbitrary, because: a log of an hour's run stays below 400 lines."""

WINDOW = 10.0
"""Seconds over which the rate is taken. Arbitrary, because: a pause shows soon, a burst does not jump."""
MARKS = 20
"""How finely the window moves on."""


class ProgressLine:
    """An instrument that writes progress: one line that renews itself on a terminal, a line now and then elsewhere.

    Args:
        total: items to come, if it is known.
        stream: where to write; None is standard error.
    """

    def __init__(self, total: int | None = None, stream: TextIO | None = None) -> None:
        self._total = total
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self.pause = ON_A_TERMINAL if self._terminal else IN_A_FILE
        """Seconds between updates."""
        now = clock.steady()
        self._written = now
        self._done = self._failed = self._replayed = 0
        self._marks = deque([(now, 0)], maxlen=MARKS)

    def notify(self, event: JobEnded, /) -> None:
        """Count a job's end, and write if it is time to. What an earlier run has ended says nothing about the speed."""
        self._replayed += event.outcome.replayed
        if event.outcome.kind is None:
            self._done += 1
        else:
            self._failed += 1
        self.refresh()

    def refresh(self) -> None:
        """Write if it is time to. Call it now and then, so that a run in which nothing ends does not look frozen."""
        now = clock.steady()
        if now - self._written >= self.pause:
            self._written = now
            self._write(now, going_on=True)

    def close(self) -> None:
        """Write the last state, and end the line. A stream that is gone (a closed terminal) is no error."""
        with suppress(OSError, ValueError):  # ValueError: I/O operation on closed file
            self._write(clock.steady(), going_on=False)
            if self._terminal:
                self._stream.write("\n")
                self._stream.flush()

    def _write(self, now: float, *, going_on: bool) -> None:
        ended = self._done + self._failed
        of = "" if self._total is None else f" of {self._total:,}"
        rate = self._rate(now, ended - self._replayed)
        text = f"{ended:,}{of} jobs, {self._failed:,} failed, {rate:,.{0 if rate >= 10 else 1}f}/s"
        if going_on and rate and self._total is not None and ended < self._total:
            text += f", {(self._total - ended) / rate:,.0f} s to go"
        self._stream.write(f"\r\x1b[K{text}" if self._terminal else f"{text}\n")
        self._stream.flush()

    def _rate(self, now: float, ended: int) -> float:
        """Jobs that end in a second: those of late, not of the whole run, nor of an earlier one."""
        then, before = self._marks[0]
        if now - self._marks[-1][0] >= WINDOW / MARKS:
            self._marks.append((now, ended))
        return (ended - before) / max(now - then, 1e-9)
