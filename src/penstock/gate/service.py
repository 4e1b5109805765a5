"""What a gate knows of one service key: its queue, and the counts that `statistics()` shows."""

import asyncio
from dataclasses import dataclass

from penstock.histogram import Distribution, Histogram
from penstock.outcome import FailureKind, classify
from penstock.permits import PermitQueue
from penstock.threads.call import AbandonedCall


@dataclass(frozen=True, slots=True)
class KeyStatistics:
    """One service key of a gate, as it was at the time of asking. Durations are seconds."""

    limit: int
    in_flight: int
    waiting: int
    paused_for: float
    """Time until the key may be used again, after a `Retry-After`; 0 when it may be used now."""
    attempts: int
    retries: int
    """Attempts after the first of their round trip."""
    succeeded: int
    failed: dict[FailureKind, int]
    """Failed attempts by kind."""
    abandoned_calls: tuple[AbandonedCall, ...]
    """Blocking calls whose caller stopped waiting and whose thread still runs: they hold permits."""
    latency: Distribution
    """From admission to the end of the attempt; successful attempts only."""


class Service(PermitQueue):
    """A key's queue, and what has happened there. Loop thread only."""

    __slots__ = ("attempts", "backing_off", "failed", "latency", "retries", "succeeded")

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: int) -> None:
        super().__init__(loop, limit)
        self.attempts = 0
        self.backing_off = 0
        """Callers that will come back for their next attempt: the key is in use."""
        self.retries = 0
        self.succeeded = 0
        self.failed: dict[FailureKind, int] = {}
        self.latency = Histogram()

    @property
    def idle(self) -> bool:
        """True when it may be forgotten: nobody uses it, waits for it or will come back, and no pause is remembered."""
        return super().idle and not self.backing_off

    def count_success(self, elapsed: float) -> None:
        """Count an attempt that worked."""
        self.succeeded += 1
        self.latency.record(elapsed)

    def count_failure(self, error: BaseException) -> None:
        """Count an attempt that failed. Its time is no latency: a fast refusal says nothing about speed."""
        kind = classify(error)
        self.failed[kind] = self.failed.get(kind, 0) + 1

    def statistics(self, abandoned_calls: tuple[AbandonedCall, ...] = ()) -> KeyStatistics:
        """A frozen copy of the counts."""
        return KeyStatistics(
            limit=self.limit,
            in_flight=self.in_flight,
            waiting=self.waiting,
            paused_for=self.paused_for,
            attempts=self.attempts,
            retries=self.retries,
            succeeded=self.succeeded,
            failed=dict(self.failed),
            abandoned_calls=abandoned_calls,
            latency=self.latency.snapshot(),
        )
