"""The result of a whole run: a record that can be checked."""

from dataclasses import dataclass
from typing import Any

from penstock.errors import InternalError
from penstock.histogram import Distribution, Histogram
from penstock.outcome import FailureKind, Outcome


@dataclass(frozen=True, slots=True)
class Cause:
    """One reason why jobs failed: the same kind, class of error and first line of its message."""

    kind: FailureKind
    error: str
    """Class and first line of the message, as of the first such failure."""
    count: int
    example_key: Any
    """Key of the first item that failed so."""


@dataclass(frozen=True, slots=True)
class Report:
    """What became of the items of a run. Durations are seconds."""

    read: int
    """Items taken from the source."""
    done: int
    failed: int
    left: int
    """Items that were read, but whose job was cancelled or never started."""
    stopped: str | None
    """Why the source was not read to its end; None when it was."""
    kinds: dict[FailureKind, int]
    """Failed jobs by kind."""
    causes: tuple[Cause, ...]
    """The most frequent reasons, at most 20."""
    attempts: int
    """Attempts of all round trips of all jobs."""
    elapsed: float
    ran: Distribution
    """How long the successful jobs took."""

    @property
    def exit_code(self) -> int:
        """For a script: 0 all done, 5 some failed, 8 stopped by `max_errors`, 130 interrupted."""
        if self.stopped is not None:
            return 8 if self.stopped == TOO_MANY_ERRORS else 130
        return 5 if self.failed or self.left else 0

    def verify(self) -> None:
        """Check that every item that was read has exactly one state.

        Raises:
            InternalError: read = done + failed + left does not hold, or the failures do not add up.
        """
        explained = sum(cause.count for cause in self.causes)  # at most all: only the most frequent ones are kept
        failed = sum(self.kinds.values())
        if self.read != self.done + self.failed + self.left or self.failed != failed or explained > failed:
            raise InternalError(
                f"items do not add up: read {self.read} != done {self.done} + failed {self.failed} + left {self.left} "
                f"(failed by kind: {self.kinds}, by cause: {explained}). This is a bug in penstock, please report it."
            )


TOO_MANY_ERRORS = "too many errors"
INTERRUPTED = "interrupted"
"""Values of `Report.stopped`."""

MOST_CAUSES = 20
"""Arbitrary, because: more than a person reads, and a bound on memory when every error has a message of its own."""


class Tally:
    """Counts outcomes into a `Report`. Memory is bounded: causes beyond the first thousand are counted by kind only."""

    KNOWN_CAUSES = 1_000
    """Arbitrary, because: a thousand distinct messages already say that the message holds the record."""

    def __init__(self) -> None:
        self.done = 0
        self.attempts = 0
        self.kinds: dict[FailureKind, int] = {}
        self._ran = Histogram()
        self._causes: dict[tuple[FailureKind, str], tuple[int, Any]] = {}

    def add(self, outcome: Outcome[Any]) -> None:
        """Count one outcome."""
        self.attempts += outcome.attempts
        if outcome.kind is None:
            self.done += 1
            self._ran.record(outcome.ran)
            return
        assert outcome.error is not None, "what has a kind has an error"
        self.kinds[outcome.kind] = self.kinds.get(outcome.kind, 0) + 1
        cause = (outcome.kind, first_line(outcome.error))
        count, key = self._causes.get(cause, (0, outcome.key))
        if count or len(self._causes) < self.KNOWN_CAUSES:
            self._causes[cause] = (count + 1, key)

    def report(self, *, read: int, left: int, stopped: str | None, elapsed: float) -> Report:
        """Close the books. `read` and `left` are counted where items are taken, not derived from the counts here."""
        failed = sum(self.kinds.values())
        frequent = sorted(self._causes.items(), key=lambda entry: -entry[1][0])[:MOST_CAUSES]
        return Report(
            read=read,
            done=self.done,
            failed=failed,
            left=left,
            stopped=stopped,
            kinds=dict(self.kinds),
            causes=tuple(Cause(kind, error, count, key) for (kind, error), (count, key) in frequent),
            attempts=self.attempts,
            elapsed=elapsed,
            ran=self._ran.snapshot(),
        )


def first_line(error: BaseException) -> str:
    """Class and first line of the message, at most 200 characters. An error that cannot be shown says so."""
    try:
        message = str(error)
    except Exception:  # noqa: BLE001  # an exception class of the user's: its mistake must not end the run
        message = "<its __str__ raised an error>"
    start = message.lstrip()[:200].splitlines()
    return f"{type(error).__name__}: {start[0]}"[:200] if start else type(error).__name__
