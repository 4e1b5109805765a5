"""A whole run from a script: items in, report out."""

import asyncio
import sys
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Sequence, Sized
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from penstock.errors import UsageError
from penstock.events import Instrument
from penstock.executor.definition import Job
from penstock.executor.executor import Executor
from penstock.executor.signals import Interrupts
from penstock.instruments.progress import ProgressLine
from penstock.report import Report

I = TypeVar("I")  # noqa: E741  # the item


def run(
    job: Job[Any] | Callable[[I], Any],
    items: Iterable[I] | AsyncIterable[I],
    *,
    key: Callable[[I], Any] | None = None,
    limit: int | None = None,
    timeout: float | None = None,
    max_errors: float | None = None,
    progress: bool | None = None,
    instruments: Sequence[Instrument] = (),
) -> Report:
    """Run a job over all items on an event loop of its own, and report what became of them.

    Blocks until the run has ended. What the job returns is dropped: write results in the job, or read
    `Executor.as_completed`. Ctrl-C drains: no more items are taken, what is in flight is finished, the report
    says that it was interrupted. A second Ctrl-C cancels what is in flight, a third one raises `KeyboardInterrupt`,
    even from a job that blocks the loop. Outside the main thread, and where the program has a SIGINT handler of its
    own, signals are left alone.

    Args:
        job: a function of the item, or a `@penstock.job`, whose resources are open while the run lasts.
        items: any iterable or async iterable; see `Executor.map`.
        key: gives each item the key that outcomes, logs and errors carry.
        limit: jobs that run at once; None is the executor's default.
        timeout: seconds for each job.
        max_errors: an int or a float, see `Executor.as_completed`; the run ends early and the report says so.
        progress: show a progress line on standard error; None shows it on a terminal only.
        instruments: who else is told of each job's end.

    Raises:
        UsageError: called under a running event loop, or with arguments that cannot work.
        KeyboardInterrupt: Ctrl-C was pressed three times.
        Exception: what the source raised, or the job's opening or closing.
    """
    _refuse_a_running_loop()
    line = _progress_line(progress, items)
    listening = [*instruments, line] if line is not None else list(instruments)

    async def main() -> Report:
        async with (
            _refreshed(line),
            Executor(limit=limit, instruments=listening) as executor,
            interrupts.shut_down(executor),
        ):
            return await executor.run(job, items, key=key, timeout=timeout, max_errors=max_errors)

    interrupts = Interrupts()
    try:
        with interrupts, asyncio.Runner() as runner:
            return runner.run(main())
    finally:
        if line is not None:
            line.close()


@asynccontextmanager
async def _refreshed(line: ProgressLine | None) -> AsyncIterator[None]:
    """While the block runs, keep the line alive though no job may end for a while."""

    async def refresh(line: ProgressLine) -> None:
        while True:
            await asyncio.sleep(line.pause)
            line.refresh()

    if line is None:
        yield
        return
    refreshing = asyncio.get_running_loop().create_task(refresh(line))
    try:
        yield
    finally:
        refreshing.cancel()
        await asyncio.wait([refreshing])


def _refuse_a_running_loop() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise UsageError(
        "penstock.run() was called under a running event loop, which it would block. Write "
        "`async with Executor() as executor: report = await executor.run(job, items)`."
    )


def _progress_line(wanted: bool | None, items: object) -> ProgressLine | None:
    if sys.stderr is None or not (sys.stderr.isatty() if wanted is None else wanted):  # None: a service, pythonw
        return None
    return ProgressLine(total=len(items) if isinstance(items, Sized) else None)
