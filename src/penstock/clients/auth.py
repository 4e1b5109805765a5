"""Headers that prove who asks, renewed once for all who wait."""

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeAlias

from penstock.context import enter
from penstock.errors import ClosedError, RoundTripError, UsageError

Headers: TypeAlias = Mapping[str, str]
FetchHeaders: TypeAlias = Callable[[], Awaitable[Headers]]

PATIENCE = 5.0
"""Seconds that a cancelled renewal gets to end. Arbitrary, because: longer than clean-up takes, shorter than a hang."""


class RenewableAuth:
    """The headers that an async function gives, asked for at first use and again after a 401.

    However many jobs hear a 401 at once, the function is called once: a job tells which generation of the headers was
    refused, and a newer one is simply used. While a renewal is under way everybody waits for it, since what there is
    has been refused. It runs in a task of its own, so that a job that is cancelled while it waits takes the renewal
    away from nobody. Loop thread only.
    """

    def __init__(self, fetch: FetchHeaders) -> None:
        self._fetch = fetch
        self._renewal: asyncio.Task[None] | None = None
        self._closed = False
        self.headers: Headers | None = None
        self.generation = 0

    def outdated(self, refused: int) -> bool:
        """Whether there are no headers newer than generation `refused`, or newer ones are being asked for."""
        return refused == self.generation or self._renewing

    async def renew(self) -> None:
        """Have newer headers: ask for them, or wait with those who have asked.

        Raises:
            Exception: what the function raised; all who wait get it, and the next one asks again.
            ClosedError: the client was closed meanwhile.
            UsageError: the function asks the client that waits for it, or returned no mapping.
        """
        task = asyncio.current_task()
        assert task is not None, "a coroutine of ours runs in a task"
        renewal = self._renewal
        if renewal is None or not self._renewing:
            renewal = self._renewal = self._begin()
        elif renewal is task:
            raise UsageError(
                "the function given as auth= made a request with the client that waits for its headers. "
                "Use another HttpClient in it."
            )
        try:
            await asyncio.shield(renewal)
        except asyncio.CancelledError:
            if not renewal.cancelled() or task.cancelling():
                raise
            # It is the renewal that was cancelled, and nobody has cancelled who waits for it.
            if self._closed:
                raise ClosedError("this HttpClient was closed while its auth= function was asked.") from None
            raise RoundTripError("the function given as auth= cancelled itself.") from None

    @property
    def _renewing(self) -> bool:
        return self._renewal is not None and not self._renewal.done()

    def _begin(self) -> "asyncio.Task[None]":
        if self._closed:
            raise ClosedError("this HttpClient has been closed; its auth= function is not asked any more.")
        # The context of whoever happens to be first, but not as its job: what is done here is done for all.
        context = contextvars.copy_context()
        context.run(enter, None)
        loop = asyncio.get_running_loop()
        renewal = loop.create_task(self._renew(), name="penstock-auth", context=context)
        renewal.add_done_callback(_looked_at)
        return renewal

    async def close(self) -> None:
        """Cancel a renewal that is under way; one that does not end is abandoned after `PATIENCE`."""
        self._closed = True
        if self._renewal is not None:
            self._renewal.cancel()
            await asyncio.wait([self._renewal], timeout=PATIENCE)

    async def _renew(self) -> None:
        headers = await self._fetch()
        if not isinstance(headers, Mapping):
            raise UsageError(
                f"the function given as auth= returned {type(headers).__name__}, expected a mapping of headers, "
                f"such as {{'Authorization': 'Bearer ...'}}."
            )
        self.headers = dict(headers)
        self.generation += 1


def _looked_at(renewal: "asyncio.Task[None]") -> None:
    """Keep asyncio from complaining of an error that nobody retrieved: all who waited may have been cancelled."""
    if not renewal.cancelled():
        renewal.exception()
