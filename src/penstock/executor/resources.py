"""A job's resources while it runs: opened, closed, and within a bound once what runs is to be cancelled.

    opening -> deadline: cancelled
    closing -> `PATIENCE` seconds after the deadline: cancelled, and named in the log

Guarantees: both happen in the task that asks for them. Nothing is cancelled before there is a deadline. What swallows
its cancellation, or takes long to clean up after it, has no bound: a task cannot be left behind by itself. Loop thread
only.
"""

import asyncio
import logging
from collections.abc import Awaitable
from types import TracebackType
from typing import Any, TypeVar

from penstock.executor.definition import Job
from penstock.executor.running import PATIENCE

T = TypeVar("T")

logger = logging.getLogger("penstock.jobs")


class Resources:
    """One opening of a job, to be used by `async with`. Its value is the job function; None if it was cut off."""

    def __init__(self, job: Job[Any], deadline: float | None) -> None:
        self._job = job
        self._opened = job.open()
        self._is_open = False
        self._deadline = deadline
        self._patience = 0.0
        self._scope: asyncio.Timeout | None = None

    async def __aenter__(self) -> Any:
        fn, ended = await self._in_time(self._opened.__aenter__())
        self._is_open = ended
        return fn

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._is_open:
            return
        self._patience = PATIENCE
        if self._deadline is not None:  # counted from now: cancelled jobs have had theirs
            self._deadline = max(self._deadline, asyncio.get_running_loop().time())
        await self._in_time(self._opened.__aexit__(kind, error, traceback))

    def hurry(self, deadline: float) -> None:
        """What runs is cancelled at this time of the loop, or before if that has been said."""
        if self._deadline is not None and self._deadline <= deadline:
            return
        self._deadline = deadline
        if self._scope is not None:
            self._scope.reschedule(deadline + self._patience)

    async def _in_time(self, step: Awaitable[T]) -> tuple[T | None, bool]:
        """The step's value, and whether it was reached."""
        until = None if self._deadline is None else self._deadline + self._patience
        try:
            async with asyncio.timeout_at(until) as self._scope:
                try:
                    return await step, True
                finally:
                    scope, self._scope = self._scope, None
        except TimeoutError:
            if not scope.expired():
                raise
            if self._is_open:
                logger.error(
                    "%r did not close its resources within %g s after what runs was to be cancelled: its closing was "
                    "cut off.", self._job, PATIENCE,
                )  # fmt: skip
        return None, False
