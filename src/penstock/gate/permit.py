"""A gate's permit for a round trip that its user does himself, and how it comes back.

    enter: wait in the key's queue -> permit and tokens -> the user's round trip -> leave: classified, permit back

Loop thread only.
"""

from collections.abc import Hashable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from penstock.context import current_job
from penstock.errors import UsageError
from penstock.gate.server_hints import LONGEST_HINT, hint_of
from penstock.permits import Weight

if TYPE_CHECKING:
    from penstock.gate.gate import Gate
    from penstock.gate.service import Service, Tag


class Permit:
    """One permit: `async with gate.permit() as permit`.

    How the block is left tells the gate how the round trip went. Without an exception it has *succeeded*, and the time
    in the block is a measurement of the service. With one, `classify` decides as for `Gate.call`: a refusal or trouble
    of the service is *dropped*, all else, also a cancellation, is *ignored*. An exception that carries `retry_after`
    pauses the key. Say `ignore()` or `drop()` where the block cannot know: after an error that was caught in it, or
    where it held the permit for longer than the service took.
    """

    def __init__(self, gate: "Gate", key: Hashable, weight: Weight) -> None:
        self._gate = gate
        self._key = key
        self._weight = weight
        self._reserved: Weight = weight
        """What it has taken so far, this time."""
        self._service: Service | None = None
        self._tag: Tag = (0, 0, None, None)
        self._started = 0.0
        self._said: Literal["ignored", "dropped"] | None = None
        self._pause: float | None = None

    def __repr__(self) -> str:
        state = "not held" if self._service is None else self._said or "held"
        return f"<Permit of {self._gate.name!r} {state}>"

    def ignore(self) -> None:
        """What the block takes says nothing about the service."""
        self._held()
        self._said = "ignored"

    def drop(self, *, retry_after: float | None = None) -> None:
        """The service could not take the round trip; it asks for a pause of `retry_after` seconds if that is given.

        Raises:
            UsageError: `retry_after` is no number of seconds from 0 to an hour, or the permit is not held.
        """
        self._held()
        number = isinstance(retry_after, int | float) and not isinstance(retry_after, bool)
        if retry_after is not None and not (number and 0 <= retry_after <= LONGEST_HINT):
            raise UsageError(f"retry_after={retry_after!r}: expected seconds from 0 to {LONGEST_HINT:g}, or None.")
        self._said = "dropped"
        self._pause = retry_after

    def learn(self, headers: Mapping[str, str]) -> None:
        """Obey what an answer tells of the server's rates: give the headers of each.

        Raises:
            UsageError: the permit is not held.
        """
        self._gate.learn(self._held(), headers, self._tag)

    def settle(self, used: Mapping[str, float]) -> None:
        """Say what the round trip really took of each rate: what was reserved beyond is given back, and the reverse.

        Raises:
            UsageError: the permit is not held, or `used` is no mapping of names to numbers of at least 0.
        """
        self._held().settle(self._reserved, used)
        self._reserved = {**(self._reserved or {}), **used}

    def _held(self) -> "Service":
        if self._service is None:
            raise UsageError("this permit is not held. Call this inside `async with gate.permit() as permit:`.")
        return self._service

    async def __aenter__(self) -> Self:
        if self._service is not None:
            raise UsageError("this permit is already in use. Call gate.permit() once for each `async with`.")
        service = self._gate.service(self._key)
        if self._weight is not None:
            service.refuse_what_never_fits(self._weight)
        if service.refuses:
            raise service.circuit_open()
        self._service = service
        if not service.take_nowait(None, self._weight):
            if service.sends_away:
                self._service = None
                raise service.circuit_open()
            await self._wait(service)
        self._said = self._pause = None
        self._reserved = self._weight
        self._started = service.now()
        try:
            self._tag = service.start(self._started, False)
        except BaseException:  # of a limit that is somebody else's rule
            self._service = None
            service.give_tokens_back(self._weight)
            service.give_back()
            raise
        self._gate.stir()
        return self

    async def _wait(self, service: "Service") -> None:
        job = current_job()
        asked = service.now()
        try:
            await service.take(weight=self._weight)
        except BaseException:
            self._service = None
            raise
        finally:
            if job is not None:
                job.waited += service.now() - asked

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        service = self._held()
        self._service = None
        try:
            if self._said == "dropped":
                refusal = Refused(self._pause)
                service.end_badly(self._tag, refusal, None, self._pause)
                self._gate.obey(service, refusal, self._pause, refused=False)
                self._refund(service, refusal)
            elif error is None and self._said is None:
                service.end_well(self._tag, self._started, None)
            elif isinstance(error, Exception) and self._said is None:
                hint = hint_of(error)
                service.end_badly(self._tag, error, None, hint)
                self._gate.obey(service, error, hint, refused=True)
                self._refund(service, error)
            else:
                service.end_ignored(self._tag)
        finally:
            service.give_back()

    def _refund(self, service: "Service", failure: Exception) -> None:
        """Give back what a refused one has not used, unless it was said what it has."""
        if self._reserved is self._weight:
            self._gate.refund(service, self._weight, failure)


class Refused(Exception):
    """Stands for what a user's round trip was refused with."""

    failure_kind = "throttled"

    def __init__(self, retry_after: float | None) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after
