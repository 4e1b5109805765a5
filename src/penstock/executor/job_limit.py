"""How many jobs of an executor without a limit of its own run at once: as many as keep the gates busy.

    every beat of the loop's guard: limits of the keys in use, memory -> JobRule.beat -> slots

Each round trip in flight belongs to a job, and some more jobs beside it process answers, wait for their retry or for
their turn at a gate. So the jobs follow the gates, which measure what their services can take.

What a job takes of the memory nobody says, so it is measured: by how much the process has grown since there were no
jobs, for those that run. Only as many more are begun as fit in half of what is left. When memory is short nevertheless,
none is begun while `FLOOR` of them run; afterwards half as many may run as did, and then a tenth more each second.

Guarantees: the number is never below `FLOOR`, and jobs that run are not stopped by it. Same observations, same numbers.
Loop thread only.
"""

import math
from collections.abc import Callable

from penstock.executor.slots import Slots
from penstock.gate.guard import Guard
from penstock.gate.guard_rule import LEAST_IN_FLIGHT

LEAST = 256
"""Jobs, if they fit in the memory. Arbitrary, because: those that use no gate tell nobody how many they should be, and
as many that wait cost nothing."""
JOBS_FOR_EACH_PERMIT = 4
"""Jobs for each round trip that may be in flight. Arbitrary, because: a job may then spend three times as long on its
answers as on waiting for them before a gate has nothing to do."""
SPARE = 64
"""Jobs beyond these. Arbitrary, because: a gate of a handful of permits must see that more are wanted."""
FALL = 0.05
"""Share by which it falls at a time. Arbitrary, because: a key that is not in use for a moment is about to be."""
SHARE_OF_MEMORY = 0.25
"""For jobs, until it is measured what they take. Arbitrary, because: most of it is the program's own."""
BYTES_FOR_EACH_JOB = 1 << 16
"""Of that share. Arbitrary, because: a task with its context and an answer is seldom smaller."""
SMALLEST_GROWTH = 0.05
"""Share of the memory below which growth says nothing about jobs. Arbitrary, because: a program that has just begun
imports modules and fills caches."""
CAUTION = 0.5
"""Share of what is left that further jobs may fill until memory is looked at again: their answers are still to come."""
MARGIN = 0.02
"""Share of the memory that jobs are not meant to fill. Arbitrary, because: it is short as soon as all is filled."""
FLOOR = LEAST_IN_FLIGHT
"""Jobs that go on while memory is short. Arbitrary, because: some must, since it is their end that frees memory."""
REGROWTH = 0.1
"""Share by which the number of jobs grows each second after memory was short. As gates come back."""


class JobRule:
    """The number of jobs.

    Args:
        allowed: bytes that this process may use; None where nobody knows.
    """

    def __init__(self, allowed: int | None) -> None:
        self.limit = LEAST
        self._most = None if allowed is None else max(LEAST, int(allowed * SHARE_OF_MEMORY) // BYTES_FOR_EACH_JOB)
        self._last = 0.0
        self._at_first: float | None = None
        """Share of the memory that is used when there are no jobs."""
        self._looked_at: float | None = None
        self._fitting: int | None = None
        """Jobs that fit, as of the last look at the memory."""
        self._short = False
        self._ceiling: float | None = None
        """Jobs that may run because memory was short; None when that is long over."""

    @property
    def recovering(self) -> bool:
        """Memory was short, and not all jobs that are wanted may run again. It does not last for ever."""
        return self._ceiling is not None and not self._short

    def beat(
        self,
        now: float,
        total: int,
        running: int,
        used: float | None,
        room: float | None,
        *,
        looked_at: float | None,
        short: bool,
    ) -> int:
        """The number of jobs from `now` on.

        Args:
            total: the sum of the limits of all keys in use.
            running: jobs that have a slot.
            used: share of the memory that is in use; None where nobody knows.
            room: share of it that may be used in addition.
            looked_at: when it was found to be so; None: never.
            short: memory is.
        """
        elapsed, self._last = now - self._last, now
        if used is not None and room is not None and looked_at != self._looked_at:
            self._looked_at = looked_at
            self._measure(running, used, room)
        if short:
            if not self._short:
                self._ceiling = max(FLOOR, running / 2)
            self.limit = FLOOR
        else:
            if self._ceiling is not None:
                self._ceiling *= 1 + REGROWTH * elapsed
            wanted = max(LEAST, JOBS_FOR_EACH_PERMIT * total + SPARE, int(self.limit * (1 - FALL)))
            caps = [cap for cap in (self._most, self._fitting, self._ceiling) if cap is not None]
            self.limit = max(FLOOR, int(min([wanted, *caps])))
            if self._ceiling is not None and self._ceiling >= wanted:
                self._ceiling = None
        self._short = short
        return self.limit

    def _measure(self, running: int, used: float, room: float) -> None:
        if self._at_first is None or not running:
            self._at_first = used
        self._at_first = min(self._at_first, used)
        grown = used - self._at_first
        if grown < SMALLEST_GROWTH:
            self._fitting = None
        else:
            self._fitting = math.ceil(running * (1 + CAUTION * max(0.0, room - MARGIN) / grown))


class MeasuredJobs:
    """Sets the number of slots of an executor that has no limit of its own.

    Args:
        resize: what is told a new number.
    """

    def __init__(self, guard: Guard, slots: Slots, resize: Callable[[int], None]) -> None:
        self._guard = guard
        self._slots = slots
        self._resize = resize
        self._rule = JobRule(guard.look_now())
        guard.add(self)
        self.beat(guard.share, 0.0, guard.lagging)
        if guard.memory.short:
            guard.stir()  # jobs may wait already, and somebody must see when it is over

    def beat(self, share: float, lag: float, lagging: bool) -> None:
        """Look at the gates and the memory."""
        guard, slots, memory = self._guard, self._slots, self._guard.memory
        limit = self._rule.beat(
            guard.now(), guard.total, slots.in_use, memory.used, memory.room,
            looked_at=memory.looked_at, short=memory.short,
        )  # fmt: skip
        if self._rule.recovering:
            guard.stir()  # the number goes on growing though no job may start for a while
        if limit != slots.limit:
            self._resize(limit)

    def total_limit(self) -> int:
        """No round trips start here."""
        return 0

    def stop(self) -> None:
        """The number is somebody else's from now on."""
        self._guard.remove(self)
