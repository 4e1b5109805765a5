"""What an adaptive in-flight limit is to the gate: it is told of each attempt, and its `limit` is read at admission.

    started -> mark -> attempt -> ended(mark, round-trip time or None, refused or not) -> LimitChange | None

The gate owns one limiter for each service key. Time is the loop's clock and comes in as an argument; randomness comes
from the generator that the rule was given. Loop thread only, nothing blocks, nothing raises.
"""

import random
from typing import Literal, NamedTuple, Protocol

Reason = Literal["queue", "loss", "probe", "growth", "application", "guard", "breaker", "server", "set"]
"""Why a limit changed: requests queue at the service; it refuses them; its baseline is measured; it can take more; we
do not use what we have; this process is overloaded; the breaker; what the server allows; somebody set it."""


class LimitChange(NamedTuple):
    """One change of a limit, for events and statistics."""

    at: float
    before: int
    after: int
    reason: Reason


class Limiter(Protocol):
    """The adaptive limit of one service key."""

    limit: int
    """Requests that may be in flight now."""
    baseline: float | None
    """Seconds that a request takes when none queues at the service; None: not known yet."""
    queue: float
    """Requests that queue at the service, by the newest measurement."""

    def started(self, now: float) -> int:
        """An attempt begins. Returns the mark that its `ended` hands back; 0 when it is not measured."""

    def ended(self, mark: int, now: float, rtt: float | None, dropped: bool) -> LimitChange | None:
        """An attempt is over, however it went.

        `rtt`: its round-trip time in seconds if that tells how busy the service is; None for refusals, errors and
        cancellations. `dropped`: the service, or the way to it, could not take it.
        """

    def contaminate(self) -> None:
        """This process lags, so what is measured at present says nothing: the limit must not grow by it."""

    def half_open(self, now: float) -> LimitChange | None:
        """The breaker lets single requests through, to see whether the service is back."""

    def recovered(self, now: float) -> LimitChange | None:
        """The breaker has closed: the service is back."""

    def cap(self, most: int | None, now: float) -> LimitChange | None:
        """Never allow more than `most` from now on, as the server or the connector says; None: no such bound."""


class LimitRule(Protocol):
    """What `Gate(limit=)` takes beside a number: it makes the limiter of each service key."""

    def limiter(self, now: float, most: int | None, rng: random.Random) -> Limiter:
        """A limiter for a service that has not been used yet. `most`: what connections or threads allow."""
