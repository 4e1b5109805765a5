"""The result of a whole run: a record that can be checked."""

import json
import math
import os
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from penstock.errors import InternalError, SkipItem, UsageError, first_line, in_common, in_figures, status_of
from penstock.histogram import Distribution, Histogram
from penstock.outcome import FailureKind, Outcome


@dataclass(frozen=True, slots=True)
class Cause:
    """One reason why jobs failed: the same kind and class of error, and the same HTTP status and path, or else the
    same first line of the message but for its numbers."""

    kind: FailureKind
    error: str
    """Class and first line of the message, as of the first such failure."""
    count: int
    example_key: Any
    """Key of the first item that failed so; without `key=`, the item as text, shortened."""


@dataclass(frozen=True, slots=True)
class Report:
    """What became of the items of a run. Durations are seconds.

    With a journal, items whose outcome an earlier run has recorded count as what they are (`done`, `failed`, `skipped`,
    `kinds`, `causes`), and `replayed` says how many they were. What this run has used is told of this run alone:
    `attempts`, `ran`, `spent`, `elapsed`.
    """

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
    """Attempts of all round trips of all jobs of this run."""
    elapsed: float
    ran: Distribution
    """How long the successful jobs of this run took."""
    skipped: int = 0
    """Items that needed no work: their jobs said so by `SkipItem`, or they were there twice and that was to be so."""
    replayed: int = 0
    """Of those done, failed and skipped: how many an earlier run had recorded."""
    spent: dict[str, float] = field(default_factory=dict)
    """What jobs have spent in this run, by unit."""
    why: str | None = None
    """Why it stopped early, in a sentence; None where `stopped` says it all."""
    journal: str | None = None
    """Path of the journal; None without one."""
    duplicates: int = 0
    """Of those skipped: items whose key had come before (`Journal(duplicates="skip")`)."""

    @property
    def exit_code(self) -> int:
        """For a script. 1 is left for wrong use, which is what Python ends with after an exception.

        0 all done or skipped, 5 some failed or left, 8 stopped by `max_errors`, by `fail_fast` or by a budget,
        10 stopped because its time was up, 130 interrupted.
        """
        if self.stopped is not None:
            return EXIT_CODES.get(self.stopped, EXIT_CODES[INTERRUPTED])
        return SOME_FAILED if self.failed or self.left else 0

    def __str__(self) -> str:
        lines = [self._sum(), self._speed()]
        if self.replayed:
            lines.append(f"recorded by earlier runs: {self.replayed:,}")
        if self.spent:
            lines.append(f"spent: {', '.join(f'{unit} {in_figures(amount)}' for unit, amount in self.spent.items())}")
        if self.stopped is not None:
            lines.append(f"stopped early: {self.stopped}{'' if self.why is None else f': {self.why}'}")
        if self.journal is not None:
            lines.append(f"journal: {self.journal}")
        lines += [f"{cause.count:,} x {cause.error} (first: {cause.example_key!r:.80})" for cause in self.causes]
        return "\n".join(lines)

    def _sum(self) -> str:
        kinds = "".join(f", {count:,} {kind}" for kind, count in self.kinds.items())
        skipped = f" + skipped {self.skipped:,}" if self.skipped else ""
        return f"read {self.read:,} = done {self.done:,} + failed {self.failed:,}{skipped} + left {self.left:,}{kinds}"

    def _speed(self) -> str:
        ended = self.done + self.failed + self.skipped - self.replayed
        rate = ended / self.elapsed if self.elapsed else 0.0
        return f"{self.elapsed:,.1f} s, {rate:,.0f} jobs/s, {self.attempts:,} attempts"

    def to_json(self) -> str:
        """All of it and the exit code as a JSON object, on one line.

        What JSON does not know is null (the times of no jobs), or text (a key that is neither text nor a number).
        """
        told: dict[str, Any] = _by_name(self)
        told["causes"] = [_by_name(cause) | {"example_key": _in_json(cause.example_key)} for cause in self.causes]
        told["ran"] = {name: _in_json(value) for name, value in _by_name(self.ran).items()}
        told["spent"] = {unit: _in_json(amount) for unit, amount in self.spent.items()}
        return json.dumps({**told, "exit_code": self.exit_code}, allow_nan=False)

    def verify(self, keys: Iterable[Any] | None = None) -> None:
        """Check that every item that was read has exactly one state: by the counts, and with a journal by that.

        With a journal it blocks: every row is read and compared with its checksum, some seconds for a million. Any
        thread. In async code, `await asyncio.to_thread(report.verify)`.

        Args:
            keys: those of all items, as `key=` gives them: with a journal, each must have a state there, and those
                that have none are named, also where the run was stopped before it came to them.

        Raises:
            InternalError: read = done + failed + skipped + left does not hold, the failures do not add up, or more
                was replayed than has a state.
            JournalError: the journal holds less than was counted, or lacks some of the keys, or is damaged.
            UsageError: keys without a journal.
        """
        explained = sum(cause.count for cause in self.causes)  # at most all: only the most frequent ones are kept
        failed = sum(self.kinds.values())
        ended = self.done + self.failed + self.skipped
        if self.read != ended + self.left or self.failed != failed or explained > failed or self.replayed > ended:
            raise InternalError(
                f"items do not add up: read {self.read}, done {self.done} + failed {self.failed} + skipped "
                f"{self.skipped} + left {self.left} (failed by kind: {self.kinds}, by cause: {explained}; replayed "
                f"{self.replayed}). This is a bug in penstock, please report it."
            )
        if self.journal is not None:
            from penstock.journal.proof import prove_counts, prove_keys  # SQLite is not for everybody to import

            prove_counts(self.journal, ended - self.duplicates)
            if keys is not None:
                prove_keys(self.journal, keys)
        elif keys is not None:
            raise UsageError("report.verify(keys) found a run without a journal: nothing knows which keys it had.")

    def write_csv(self, path: str | os.PathLike[str]) -> int:
        """Write what became of each item, a line for each; return how many there are. For JSON, and more, see the
        command `penstock report`.

        Columns: key, key_base64, state, attempts, kind, error, status, message, run, recorded. Blocks. Any thread.

        Raises:
            UsageError: a run without a journal, which alone knows each item.
            JournalError: the journal cannot be read, or is damaged.
            OSError: the file cannot be written.
        """
        if self.journal is None:
            raise UsageError(
                "report.write_csv() found a run without a journal, so nothing is known of each item. Write "
                "`penstock.run(job, items, key=..., journal='run.db')`; `report.to_json()` has the counts."
            )
        from penstock.journal.completion import write_completion  # SQLite is not for everybody to import

        with open(path, "w", newline="", encoding="utf-8") as file:
            return write_completion(self.journal, file)


def _by_name(record: Report | Cause | Distribution) -> dict[str, Any]:
    """Its fields, the objects themselves: a key may be one that cannot be copied, as `asdict` would."""
    return {each.name: getattr(record, each.name) for each in fields(record)}


def _in_json(value: Any) -> str | float | None:
    """`value` as it is where JSON has it, null for numbers that it has not, all else as text, shortened."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else reprlib.repr(value)


INTERRUPTED = "interrupted"
TOO_MANY_ERRORS = "too many errors"
ALL_FAILED = "the first items all failed"
BUDGET_REACHED = "a budget was reached"
TIME_UP = "time was up"
"""Values of `Report.stopped`."""

SOME_FAILED = 5
EXIT_CODES = {TOO_MANY_ERRORS: 8, ALL_FAILED: 8, BUDGET_REACHED: 8, TIME_UP: 10, INTERRUPTED: 130}
"""As rclone's ("List of exit codes" in its documentation): 5 for what another run may mend, 8 for a limit, 10 for the
time; 130 as of a shell for what SIGINT has ended."""

KNOWN_CAUSES = 1_000
"""Arbitrary, because: a thousand distinct messages already say that the message holds the record."""
MOST_CAUSES = 20
"""Arbitrary, because: more than a person reads."""


class Tally:
    """Counts outcomes into a `Report`. Memory is bounded: causes beyond the first thousand are counted by kind only.

    Replayed outcomes count by state, kind and cause, and with a `RecordedError` by what it tells of; their attempts and
    durations are those of an earlier run.
    """

    def __init__(self) -> None:
        self.done = 0
        self.skipped = 0
        self.replayed = 0
        self.attempts = 0
        self.kinds: dict[FailureKind, int] = {}
        self._ran = Histogram()
        self._causes: dict[tuple[FailureKind, str], Cause] = {}

    def add(self, outcome: Outcome[Any]) -> None:
        """Count one outcome."""
        if outcome.replayed:
            self.replayed += 1
        else:
            self.attempts += outcome.attempts
        if outcome.kind is not None:
            self._add_failure(outcome, outcome.kind)
        elif isinstance(outcome.error, SkipItem):
            self.skipped += 1
        else:
            self.done += 1
            if not outcome.replayed:
                self._ran.record(outcome.ran)

    def _add_failure(self, outcome: Outcome[Any], kind: FailureKind) -> None:
        assert outcome.error is not None, "what has a kind has an error"
        self.kinds[kind] = self.kinds.get(kind, 0) + 1
        reason = (kind, in_common(first_line(outcome.error), status_of(outcome.error)))
        known = self._causes.get(reason)
        if known is not None:
            self._causes[reason] = replace(known, count=known.count + 1)
        elif len(self._causes) < KNOWN_CAUSES:
            example = reprlib.repr(outcome.input) if outcome.key is None else outcome.key
            self._causes[reason] = Cause(kind, first_line(outcome.error), 1, example)

    def report(
        self,
        *,
        read: int,
        left: int,
        stopped: str | None,
        elapsed: float,
        skipped: int = 0,
        why: str | None = None,
        spent: Mapping[str, float] | None = None,
        journal: str | None = None,
    ) -> Report:
        """Close the books. `read` and `left` are counted where items are taken, not derived from the counts here.

        `skipped` are items that no job was called for and no outcome was added for: keys that were there before.
        """
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
            skipped=self.skipped + skipped,
            replayed=self.replayed,
            spent=dict(spent or {}),
            why=why,
            journal=journal,
            duplicates=skipped,
        )
