"""What an instrument is told: frozen records, and the protocol of whoever listens.

Instruments only listen. Nothing below them knows what they do; one that raises is logged and told nothing more.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from penstock.outcome import Outcome


@dataclass(frozen=True, slots=True)
class JobEnded:
    """A job has ended. Cancellations from outside are not told: they are no outcome."""

    outcome: Outcome[Any]


class Instrument(Protocol):
    """Whoever wants to know: give it to `Executor(instruments=[...])`."""

    def notify(self, event: JobEnded, /) -> None:
        """Take note. Called on the loop thread for every event: must not block."""
        ...
