"""The result of a whole run: a record that can be checked."""

import re
import reprlib
from dataclasses import dataclass, replace
from typing import Any

from penstock.errors import InternalError, first_line, status_of
from penstock.histogram import Distribution, Histogram
from penstock.outcome import FailureKind, Outcome


@dataclass(frozen=True, slots=True)
class Cause:
    """One reason why jobs failed: the same kind and class of error, and the same HTTP status, or else the same first
    line of the message but for its numbers."""

    kind: FailureKind
    error: str
    """Class and first line of the message, as of the first such failure."""
    count: int
    example_key: Any
    """Key of the first item that failed so; without `key=`, the item as text, shortened."""


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

    def __str__(self) -> str:
        kinds = "".join(f", {count:,} {kind}" for kind, count in self.kinds.items())
        rate = (self.done + self.failed) / self.elapsed if self.elapsed else 0.0
        lines = [
            f"read {self.read:,} = done {self.done:,} + failed {self.failed:,} + left {self.left:,}{kinds}",
            f"{self.elapsed:,.1f} s, {rate:,.0f} jobs/s, {self.attempts:,} attempts",
        ]
        if self.stopped is not None:
            lines.append(f"stopped early: {self.stopped}")
        lines += [f"{cause.count:,} x {cause.error} (first: {cause.example_key!r:.80})" for cause in self.causes]
        return "\n".join(lines)

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

KNOWN_CAUSES = 1_000
"""Arbitrary, because: a thousand distinct messages already say that the message holds the record."""
MOST_CAUSES = 20
"""Arbitrary, because: more than a person reads."""


class Tally:
    """Counts outcomes into a `Report`. Memory is bounded: causes beyond the first thousand are counted by kind only."""

    def __init__(self) -> None:
        self.done = 0
        self.attempts = 0
        self.kinds: dict[FailureKind, int] = {}
        self._ran = Histogram()
        self._causes: dict[tuple[FailureKind, str], Cause] = {}

    def add(self, outcome: Outcome[Any]) -> None:
        """Count one outcome."""
        self.attempts += outcome.attempts
        if outcome.kind is None:
            self.done += 1
            self._ran.record(outcome.ran)
            return
        assert outcome.error is not None, "what has a kind has an error"
        self.kinds[outcome.kind] = self.kinds.get(outcome.kind, 0) + 1
        reason = (outcome.kind, _reason(outcome.error))
        known = self._causes.get(reason)
        if known is not None:
            self._causes[reason] = replace(known, count=known.count + 1)
        elif len(self._causes) < KNOWN_CAUSES:
            example = reprlib.repr(outcome.input) if outcome.key is None else outcome.key
            self._causes[reason] = Cause(outcome.kind, first_line(outcome.error), 1, example)

    def report(self, *, read: int, left: int, stopped: str | None, elapsed: float) -> Report:
        """Close the books. `read` and `left` are counted where items are taken, not derived from the counts here."""
        failed = sum(self.kinds.values())
        frequent = sorted(self._causes.values(), key=lambda cause: -cause.count)[:MOST_CAUSES]
        return Report(
            read=read,
            done=self.done,
            failed=failed,
            left=left,
            stopped=stopped,
            kinds=dict(self.kinds),
            causes=tuple(frequent),
            attempts=self.attempts,
            elapsed=elapsed,
            ran=self._ran.snapshot(),
        )


def _reason(error: BaseException) -> str:
    """What an error has in common with others of its cause: messages and addresses often hold the record's number."""
    status = status_of(error)
    return re.sub(r"\d+", "#", first_line(error)) if status is None else f"{type(error).__name__} {status}"
