"""A whole run from a script: items in, report out.

    run() -> signals taken -> a loop of its own -> Executor.run -> report -> loop closed -> signals put back

What belongs to the process and not to a library (signals, the switch interval of threads) is touched here and nowhere
else, and put back.

Guarantees: once a signal has come, the waits for jobs are bounded: for those in flight by the drain's deadline, for
cancelled ones, for the closing of resources and for tasks that swallow their cancellation by `PATIENCE`. Threads of the
executor are not waited for. Unbounded are an opening or a closing that swallows its cancellation, and asyncio's default
executor.
"""

import asyncio
import math
import sys
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable, Sequence, Sized
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from penstock.errors import UsageError
from penstock.events import Instrument
from penstock.executor.definition import Job
from penstock.executor.executor import Executor, check_seconds
from penstock.executor.running import PATIENCE
from penstock.executor.signals import DRAIN_TIMEOUT, Interrupts
from penstock.instruments.progress import ProgressLine
from penstock.report import Report
from penstock.threads.main_guard import refuse_a_child_that_imports
from penstock.threads.switch_interval import SHORT, short_switch_interval

T = TypeVar("T")
I = TypeVar("I")  # noqa: E741  # the item


def run(
    job: Job[Any] | Callable[[I], Any],
    items: Iterable[I] | AsyncIterable[I],
    *,
    key: Callable[[I], Any] | None = None,
    limit: int | None = None,
    threads: int | None = None,
    processes: int | None = None,
    timeout: float | None = None,
    max_errors: float | None = None,
    progress: bool | None = None,
    instruments: Sequence[Instrument] = (),
    drain_timeout: float | None = DRAIN_TIMEOUT,
    switch_interval: float | None = SHORT,
) -> Report:
    """Run a job over all items on an event loop of its own, and report what became of them.

    Blocks until the run has ended. What the job returns is dropped: write results in the job, or read
    `Executor.as_completed`.

    **Signals**: Ctrl-C (SIGINT) or SIGTERM drains: no more items are taken, what is in flight is finished, the report
    says that it was interrupted; after `drain_timeout` seconds what still runs is cancelled: the opening of the job's
    resources too, and their closing 5 s later. A second signal cancels at once. A third one ends the program, even
    where a job blocks the loop: Ctrl-C by `KeyboardInterrupt`, SIGTERM as if it had no handler. Calls that hang in
    threads of the executor are left behind, and the interpreter does not wait for them at its exit, as it does for
    `asyncio.to_thread`. Each signal is left alone outside the main thread, and where the program has a handler of its
    own.

    Args:
        job: a function of the item, or a `@penstock.job`, whose resources are open while the run lasts.
        items: any iterable or async iterable; see `Executor.map`.
        key: gives each item the key that outcomes, logs and errors carry.
        limit, threads, processes: jobs, blocking calls and processes that run at once. None measures how many jobs keep
            the services busy and fit in the memory, and how many calls; see `Executor`.
        timeout: seconds for each job.
        max_errors: an int or a float, see `Executor.as_completed`; the run ends early and the report says so.
        progress: show a progress line on standard error; None shows it on a terminal only.
        instruments: who else is told of each job's end.
        drain_timeout: seconds that a drain after a signal may take, 0 to cancel at once; None: as long as it takes.
            The default leaves time for cancelled jobs within the 30 s after which Kubernetes kills what it has sent a
            SIGTERM (`terminationGracePeriodSeconds`); give a longer one where the orchestrator does.
        switch_interval: what `sys.setswitchinterval` is set to while the run lasts, for the whole process: a thread
            that computes keeps the interpreter for up to that long each time the loop wants it, which is most of what
            `penstock.compute` costs the round trips. Shorter is more switching. None leaves it alone.

    Raises:
        UsageError: called under a running event loop, or with arguments that cannot work.
        KeyboardInterrupt: Ctrl-C was pressed three times, or when the run was over.
        Exception: what the source raised, or the job's opening or closing.
    """
    refuse_a_child_that_imports("penstock.run()")
    _refuse_a_running_loop()
    check_seconds("drain_timeout", drain_timeout)
    _check_switch_interval(switch_interval)
    line = _progress_line(progress, items)
    listening = [*instruments, line] if line is not None else list(instruments)

    async def main() -> Report:
        async with (
            _refreshed(line),
            Executor(limit=limit, threads=threads, processes=processes, instruments=listening) as executor,
            interrupts.shut_down(executor),
        ):
            report = await executor.run(job, items, key=key, timeout=timeout, max_errors=max_errors)
            await executor.shutdown()  # while signals are heard: jobs may have left jobs behind
            return report

    interrupts = Interrupts(drain_timeout)
    try:
        with short_switch_interval(switch_interval), interrupts:
            return _on_a_loop_of_its_own(main)
    finally:
        if line is not None:
            line.close()


def _on_a_loop_of_its_own(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """As `asyncio.run`, which waits for ever for a task that swallows its cancellation."""
    runner = asyncio.Runner()
    loop = runner.get_loop()
    ended = False
    try:
        try:
            return runner.run(main())
        finally:
            ended = _all_ended(loop)
    finally:
        if ended:
            runner.close()
        else:  # without its unbounded wait
            asyncio.set_event_loop(None)
            loop.close()


def _all_ended(loop: asyncio.AbstractEventLoop) -> bool:
    """Cancel what still runs, before it takes another step; False if some of it goes on `PATIENCE` seconds later."""
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if not tasks:
        return True
    _, going_on = loop.run_until_complete(asyncio.wait(tasks, timeout=PATIENCE))
    return not going_on


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


def _check_switch_interval(interval: object) -> None:
    number = isinstance(interval, int | float) and not isinstance(interval, bool)
    if interval is not None and not (number and 0 < interval < math.inf):  # type: ignore[operator]
        raise UsageError(f"switch_interval={interval!r}: expected seconds above 0, or None to leave it alone.")


def _progress_line(wanted: bool | None, items: object) -> ProgressLine | None:
    if sys.stderr is None or not (sys.stderr.isatty() if wanted is None else wanted):  # None: a service, pythonw
        return None
    return ProgressLine(total=len(items) if isinstance(items, Sized) else None)
