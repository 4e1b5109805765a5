"""Failed jobs in the log: the first ones with their traceback, repeats by count.

A million records that fail for one reason must not write a million tracebacks, and must not be silent either.
"""

import logging
from typing import Any

from penstock.outcome import FailureKind, Outcome

logger = logging.getLogger("penstock.jobs")

WITH_TRACEBACK = 3
"""Arbitrary, because: one traceback shows the place, three show whether it depends on the record."""
KNOWN_PLACES = 1_000
"""Arbitrary, because: bounds memory when failures come from very many places."""
ELSEWHERE = (BaseException, "other places", 0)
"""Where all further failures are counted together once so many places are known."""


class FailureLog:
    """Writes the failures of one executor to the logger `penstock.jobs`: bugs as errors, all others as warnings.

    The same class of error from the same line is written in full three times, and as a count at its 10th, 100th,
    1,000th ... time.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[type[BaseException], str, int], int] = {}

    def write(self, name: str, outcome: Outcome[Any]) -> None:
        """Write one failure, or count it."""
        error, kind = outcome.error, outcome.kind
        assert error is not None, "only failures are written"
        place = _place(error)
        if place not in self._seen and len(self._seen) >= KNOWN_PLACES:
            place = ELSEWHERE
        count = self._seen[place] = self._seen.get(place, 0) + 1
        level = logging.ERROR if kind is FailureKind.BUG else logging.WARNING
        if count <= WITH_TRACEBACK:
            more = "; further ones from here are counted" if count == WITH_TRACEBACK else ""
            logger.log(
                level, "job %s key=%r failed (%s)%s", name, outcome.key, kind, more, exc_info=error, stacklevel=2
            )
        elif _is_power_of_ten(count):
            logger.log(level, "job %s: %s of %s:%d for the %d. time", name, place[0].__name__, *place[1:], count)


def _place(error: BaseException) -> tuple[type[BaseException], str, int]:
    """Class of the error, file and line of the innermost frame."""
    traceback = error.__traceback__
    if traceback is None:
        return type(error), "?", 0
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return type(error), traceback.tb_frame.f_code.co_filename, traceback.tb_lineno


def _is_power_of_ten(count: int) -> bool:
    while count % 10 == 0:
        count //= 10
    return count == 1
