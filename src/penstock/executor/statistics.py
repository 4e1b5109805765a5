"""What an executor and a stream tell of themselves: frozen records of one moment."""

from dataclasses import dataclass

from penstock.histogram import Distribution
from penstock.outcome import FailureKind
from penstock.threads.lane import LaneStatistics


@dataclass(frozen=True, slots=True)
class ExecutorStatistics:
    """An executor as it was at the time of asking. Durations are seconds."""

    limit: int
    """Job slots."""
    jobs: int
    """Jobs that have a task: running, or submitted and waiting for a slot."""
    done: int
    failed: dict[FailureKind, int]
    """Failed jobs by kind."""
    cancelled: int
    """Jobs that were cancelled from outside."""
    ran: Distribution
    """How long successful jobs took."""
    threads: LaneStatistics | None
    """The lane for blocking calls; None before its first call."""
    cpu: LaneStatistics | None
    """The lane for response processing; None before its first call."""
    processes: LaneStatistics | None
    """The lane for `to_process`, whose threads each wait for a process; None before its first call."""


@dataclass(frozen=True, slots=True)
class StreamStatistics:
    """A stream as it was at the time of asking: read = finished + in flight + left + duplicates."""

    read: int
    """Items taken from the source."""
    finished: int
    """Items that have an outcome, delivered or not; with a journal, a recorded one."""
    failed: int
    """Those of them that failed."""
    in_flight: int
    """Items whose job runs, or whose outcome waits for its commit."""
    ready: int
    """Outcomes that wait for the reader."""
    left: int
    """Items whose job was cancelled from outside or never started."""
    duplicates: int = 0
    """Items that were left out, because their key had come before (`Journal(duplicates="skip")`)."""
    replayed: int = 0
    """Those finished that an earlier run had finished."""
