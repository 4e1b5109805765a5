"""A blocking call as a round trip: its permit comes together with a thread, and goes back when the thread has ended.

    gate: permit + thread in one step -> thread: fn -> classified -> permit back, or later if it was abandoned

An attempt that takes too long, or whose caller goes away, is abandoned: it cannot be stopped, so it keeps its permit.
A call that a thread waits for (`penstock.from_thread`) may run on the permit of whoever waits, if that is one of the
same service key: without that, it would wait for itself. Loop thread only.
"""

import asyncio
import contextvars
from collections.abc import Callable
from typing import Any

from penstock.callables import refuse_coroutine
from penstock.gate.round_trip import RoundTrip, headers_of
from penstock.gate.service import Service
from penstock.outcome import FailureKind
from penstock.permits import Companion, PermitQueue, take_first
from penstock.threads.call import Call, waited_for
from penstock.threads.crossing import Crossing, enter
from penstock.threads.place import loans, out_of_threads

Classify = Callable[[Exception], FailureKind | None]
"""Says what kind of failure an error of a library is; None where it does not know."""


class CallInThread(RoundTrip[Any]):
    """One blocking call that a gate can attempt several times."""

    def __init__(
        self,
        crossing: Crossing,
        service: Service,
        name: str,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        classify: Classify | None = None,
    ) -> None:
        self._nested = waited_for(contextvars.copy_context())
        """A thread waits for it: it must not wait for that thread, nor behind others that do."""
        self.needs: Companion = crossing.workers.with_spare if self._nested else crossing.workers
        self._crossing = crossing
        self._service = service
        self._name = name
        self._fn = fn
        self._args = args
        self._kwargs = kwargs
        self._classify = classify
        self._held: PermitQueue = service
        self._call: Call | None = None

    def __str__(self) -> str:
        return self._name

    async def attempt(self) -> Any:
        """Call the function in a thread, with the permit and the thread that have been taken."""
        crossing = self._crossing
        call = self._call = Call(crossing, self._fn, self._args, self._kwargs)
        call.label = self._name
        call.home = self._service
        call.held = self._held
        try:
            value = await enter(crossing.loop, crossing.door, call)
        except Exception as error:
            if self._classify is not None and (kind := self._classify(error)) is not None:
                error.failure_kind = kind  # type: ignore[attr-defined]  # where `penstock.classify` looks
            raise
        except BaseException:
            call.leave()
            self._crossing.tell_once(self.why_waiting(self._service), self._service.limit)
            raise
        self.rtt = call.ended - call.began
        refuse_coroutine(value, self)
        self.headers = headers_of(value)
        return value

    def repeatable(self, _error: Exception) -> bool:
        """A function that is given to a gate may be called again: `Retry` says when."""
        return True

    async def wait(self, service: Service, *, again: bool) -> None:
        """Wait for a permit with a thread, or for the place of a call that waits for this one."""
        again = again or self._nested
        lent = loans(service, contextvars.copy_context())
        if not lent:
            self._refuse_to_wait_for_a_thread(service)
            await service.take(again=again, needs=self.needs, weight=self.weight)
            return
        while True:
            self._held = await take_first(
                self._crossing.loop, service, *lent, again=again, needs=self.needs, weight=self.weight
            )
            if self._held is service:
                return
            await self._wait_on_loan(service, self._held)
            if self._held.limit:
                service.spend(self.weight)
                return
            self._held.give_back()  # its thread went on meanwhile, and lends nothing any more

    async def _wait_on_loan(self, service: Service, loan: PermitQueue) -> None:
        """The place is lent; rates, pauses and the breaker are not."""
        try:
            while loan.limit and (delay := service.delay_on_loan(self.weight)) > 0:  # noqa: ASYNC110  # it is time that is waited for
                await asyncio.sleep(delay)
        except BaseException:
            self._held = service
            loan.give_back()
            raise

    def _refuse_to_wait_for_a_thread(self, service: Service) -> None:
        """A thread waits for this call, and so do all others that there are: none of them will ever be free."""
        if self._nested and service.in_flight < service.limit and self._crossing.workers.all_wait:
            call = Call(self._crossing, self._fn, self._args, self._kwargs)
            call.label = self._name
            raise out_of_threads(call)

    def over(self, service: Service) -> None:
        """Give the permit back, now or when the thread has ended."""
        call, self._call = self._call, None
        held, self._held = self._held, service
        if call is not None and not call.over:
            call.give_back = held.give_back
            if held is service:
                service.leave_behind()
                call.give_back = service.come_back
            return
        held.give_back()
        if call is None and held is service:
            self._crossing.workers.give_back()

    def why_waiting(self, service: Service) -> str | None:
        """All permits are held by calls that nobody waits for any more."""
        return self._crossing.in_vain(service, service.limit)
