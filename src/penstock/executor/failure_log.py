"""Failed jobs in the log: the first one of a place with its traceback, some more in a line, then by count.

A million records that fail for one reason must not write a million tracebacks, and must not be silent either.
"""

import logging
import os
import traceback
from pathlib import Path
from typing import Any, NamedTuple

from penstock.errors import first_line, status_of
from penstock.outcome import FailureKind, Outcome

logger = logging.getLogger("penstock.jobs")

IN_FULL = 3
"""Arbitrary, because: one traceback shows the place, three messages show whether it depends on the record."""
HERE = str(Path(__file__).parent.parent) + os.sep
"""The folder of the package, whose own frames say nothing about the user's program."""


class Place(NamedTuple):
    """What a failure has in common with its repeats."""

    error: type[BaseException]
    status: int | None
    file: str
    line: int

    def __str__(self) -> str:
        if self is ELSEWHERE:
            return f"something from one of more than {KNOWN_PLACES:,} places"
        status = "" if self.status is None else f" {self.status}"
        return f"{self.error.__name__}{status} at {self.file}:{self.line}"


KNOWN_PLACES = 1_000
"""Arbitrary, because: bounds memory when failures come from very many places."""
ELSEWHERE = Place(BaseException, None, "other places", 0)
"""Where all further failures are counted together once so many places are known."""


class FailureLog:
    """Writes the failures of one executor to the logger `penstock.jobs`: bugs as errors, all others as warnings.

    The same class of error (and HTTP status) from the same line of the user's program is written with its traceback
    once, as a line twice, and as a count at its 10th, 100th, 1,000th ... time.
    """

    def __init__(self) -> None:
        self._seen: dict[Place, int] = {}

    def write(self, job: object, outcome: Outcome[Any]) -> None:
        """Write one failure, or count it. `job` is shown as it shows itself."""
        error, kind = outcome.error, outcome.kind
        assert error is not None, "only failures are written"
        place = _place(error)
        if place not in self._seen and len(self._seen) >= KNOWN_PLACES:
            place = ELSEWHERE
        count = self._seen[place] = self._seen.get(place, 0) + 1
        level = logging.ERROR if kind is FailureKind.BUG else logging.WARNING
        if count <= IN_FULL:
            more = "; further ones from here are counted" if count == IN_FULL else ""
            logger.log(
                level, "%r failed (%s): %s%s", job, kind, first_line(error), more,
                exc_info=error if count == 1 else None,
            )  # fmt: skip
        elif _is_power_of_ten(count):
            logger.log(level, "%r failed: %s for the %dth time", job, place, count)


def _place(error: BaseException) -> Place:
    """Where the user's program failed: its innermost frame outside penstock, or the innermost of all."""
    innermost = own = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        innermost = frame.f_code.co_filename, line
        if not innermost[0].startswith(HERE):
            own = innermost
    return Place(type(error), status_of(error), *(own or innermost or ("?", 0)))


def _is_power_of_ten(count: int) -> bool:
    while count % 10 == 0:
        count //= 10
    return count == 1
