"""Headers that prove who asks, renewed once for all who wait."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeAlias

Headers: TypeAlias = Mapping[str, str]
FetchHeaders: TypeAlias = Callable[[], Awaitable[Headers]]


class RenewableAuth:
    """The headers that an async function gives, asked for at first use and again after a 401.

    However many jobs hear a 401 at once, the function is called once: a job tells which generation of the headers was
    refused, and a newer one is simply used. The call runs in a task of its own, so that a job that is cancelled while
    it waits takes the renewal away from nobody. Loop thread only.
    """

    def __init__(self, fetch: FetchHeaders) -> None:
        self._fetch = fetch
        self._renewal: asyncio.Task[None] | None = None
        self.headers: Headers | None = None
        self.generation = 0

    async def renew(self, refused: int) -> None:
        """Have headers newer than generation `refused`.

        Raises:
            Exception: what the function raised; all who wait get it, and the next one asks again.
        """
        if refused != self.generation:
            return
        if self._renewal is None:
            self._renewal = asyncio.get_running_loop().create_task(self._renew(), name="penstock-auth")
        await asyncio.shield(self._renewal)

    async def close(self) -> None:
        """Cancel a renewal that is under way."""
        if self._renewal is not None:
            self._renewal.cancel()
            await asyncio.wait([self._renewal])

    async def _renew(self) -> None:
        try:
            self.headers = dict(await self._fetch())
            self.generation += 1
        finally:
            self._renewal = None
