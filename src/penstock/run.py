"""A whole run from a script: items in, report out.

    run() -> signals taken -> a loop of its own -> Executor.run -> report -> loop closed -> signals put back

In a notebook, the loop that runs the cell waits below it. There the loop of the run is in a thread of its own, and the
thread of the cell waits for it: it hears the signals.

What belongs to the process and not to a library (signals, the switch interval of threads) is touched here and nowhere
else, and put back.

Guarantees: once a signal has come, the waits for jobs are bounded: for those in flight by the drain's deadline, for
cancelled ones, for the closing of resources and for tasks that swallow their cancellation by `PATIENCE`. Threads of the
executor are not waited for. Unbounded are an opening or a closing that swallows its cancellation, and asyncio's default
executor.
"""

import asyncio
import math
import os
import signal
import sys
import threading
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Sequence, Sized
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

from penstock.context import current_job
from penstock.errors import UsageError
from penstock.events import Instrument
from penstock.executor.definition import Job
from penstock.executor.executor import FAIL_FAST, Executor, check_seconds
from penstock.executor.ledger import Budget
from penstock.executor.running import PATIENCE
from penstock.executor.signals import DRAIN_TIMEOUT, Interrupts
from penstock.instruments.progress import ProgressLine
from penstock.journal.options import Journal
from penstock.report import Report
from penstock.threads.main_guard import refuse_a_child_that_imports
from penstock.threads.own_loop import check_loop_factory, run_in_own_thread, run_on_own_loop
from penstock.threads.switch_interval import SHORT, short_switch_interval

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
    fail_fast: int | None = FAIL_FAST,
    budget: Budget | None = None,
    journal: str | os.PathLike[str] | Journal | None = None,
    progress: bool | None = None,
    instruments: Sequence[Instrument] = (),
    drain_timeout: float | None = DRAIN_TIMEOUT,
    switch_interval: float | None = SHORT,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> Report:
    """Run a job over all items on an event loop of its own, and report what became of them.

    Blocks until the run has ended. What the job returns is dropped: write results in the job, or read
    `Executor.as_completed`. Any thread without a running event loop may call it, several at once.

    **Notebooks**: in a cell of IPython, whose loop is running, the run gets a thread of its own, and the cell waits.
    Context variables go along. Jobs then run in that thread, not in the main one.

    **Signals**: Ctrl-C (SIGINT) or SIGTERM drains: no more items are taken, what is in flight is finished, the report
    says that it was interrupted; after `drain_timeout` seconds what still runs is cancelled: the opening of the job's
    resources too, and their closing 5 s later. A second signal cancels at once. A third one ends the program, even
    where a job blocks the loop: Ctrl-C by `KeyboardInterrupt`, SIGTERM as if it had no handler. Calls that hang in
    threads of the executor are left behind, and the interpreter does not wait for them at its exit, as it does for
    `asyncio.to_thread`. Each signal is left alone outside the main thread, and where the program has a handler of its
    own. In a notebook, "interrupt the kernel" is Ctrl-C: the third one, or what any handler raises, cancels the run,
    and the cell ends when the run has, but no later than 5 s later. A job that blocks the loop for longer is left
    behind in its thread.

    Args:
        job: a function of the item, or a `@penstock.job`, whose resources are open while the run lasts.
        items: any iterable or async iterable; see `Executor.map`.
        key: gives each item the key that outcomes, logs and errors carry.
        limit, threads, processes: jobs, blocking calls and processes that run at once. None measures how many jobs keep
            the services busy and fit in the memory, and how many calls; see `Executor`.
        timeout: seconds for each job.
        max_errors: an int or a float, see `Executor.as_completed`; the run ends early and the report says so.
        fail_fast: the run ends early when so many first jobs all fail, by a wrong address or key for example; None:
            whatever fails.
        budget: the run ends early when a limit of it is reached; see `Budget`.
        journal: a path, or a `Journal` with options: what an earlier run of the same command has recorded is not run
            again. Needs `key`.
        progress: show a progress line on standard error; None shows it on a terminal only.
        instruments: who else is told of each job's end.
        drain_timeout: seconds that a drain after a signal may take, 0 to cancel at once; None: as long as it takes.
            The default leaves time for cancelled jobs within the 30 s after which Kubernetes kills what it has sent a
            SIGTERM (`terminationGracePeriodSeconds`); give a longer one where the orchestrator does.
        switch_interval: what `sys.setswitchinterval` is set to while the run lasts, for the whole process: a thread
            that computes keeps the interpreter for up to that long each time the loop wants it, which is most of what
            `penstock.compute` costs the round trips. Shorter is more switching. None leaves it alone.
        loop_factory: makes the event loop, as in `asyncio.Runner(loop_factory=)`: `loop_factory=uvloop.new_event_loop`.
            None asks the event loop policy, so an installed uvloop policy is heard too.

    Raises:
        UsageError: called under a running event loop that is not that of a cell of IPython, or with arguments that
            cannot work.
        JournalError: the journal cannot be used, or no longer: the message names the file and the cure.
        KeyboardInterrupt: Ctrl-C was pressed three times, or when the run was over.
        Exception: what the source raised, or the job's opening or closing, or `loop_factory`.
    """
    refuse_a_child_that_imports("penstock.run()")
    in_a_cell = _above_a_cell_s_loop()
    check_seconds("drain_timeout", drain_timeout)
    _check_switch_interval(switch_interval)
    check_loop_factory(loop_factory)
    line = _progress_line(progress, items)
    listening = [*instruments, line] if line is not None else list(instruments)

    async def main() -> Report:
        async with (
            _refreshed(line),
            Executor(limit=limit, threads=threads, processes=processes, instruments=listening) as executor,
            interrupts.shut_down(executor),
        ):
            report = await executor.run(
                job, items, key=key, timeout=timeout, max_errors=max_errors, fail_fast=fail_fast, budget=budget,
                journal=journal,
            )  # fmt: skip
            await executor.shutdown()  # while signals are heard: jobs may have left jobs behind
            return report

    interrupts = Interrupts(drain_timeout)
    run_main = run_in_own_thread if in_a_cell else run_on_own_loop
    try:
        with short_switch_interval(switch_interval), _kernel_s_handler_set_aside(), interrupts:
            return run_main(main, patience=PATIENCE, loop_factory=loop_factory)
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


def _above_a_cell_s_loop() -> bool:
    """Whether the loop that runs in this thread is IPython's, and runs a cell. False where none runs.

    Raises:
        UsageError: a loop runs here that the run would block.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    if current_job() is None and _in_ipython():
        return True
    raise UsageError(
        "penstock.run() was called under a running event loop, which it would block. Write "
        "`async with Executor() as executor: report = await executor.run(job, items)`."
    )


def _in_ipython() -> bool:
    """Whether this thread runs cells: the main one, or one that the kernel made for a subshell."""
    thread = threading.current_thread()
    if thread is not threading.main_thread() and not _is_ipykernel_s(type(thread)):
        return False
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return get_ipython is not None and get_ipython() is not None


def _is_ipykernel_s(thing: object) -> bool:
    return str(getattr(thing, "__module__", "")).partition(".")[0] == "ipykernel"


@contextmanager
def _kernel_s_handler_set_aside() -> Iterator[None]:
    """While the block runs, Ctrl-C is not the kernel's, whose handler would cancel the cell's task: we block it.

    It has one in place where the cell itself awaits something.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not _is_ipykernel_s(handler):
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else somebody has replaced it since
            signal.signal(signal.SIGINT, handler)


def _check_switch_interval(interval: object) -> None:
    number = isinstance(interval, int | float) and not isinstance(interval, bool)
    if interval is not None and not (number and 0 < interval < math.inf):  # type: ignore[operator]
        raise UsageError(f"switch_interval={interval!r}: expected seconds above 0, or None to leave it alone.")


def _progress_line(wanted: bool | None, items: object) -> ProgressLine | None:
    if sys.stderr is None or not (sys.stderr.isatty() if wanted is None else wanted):  # None: a service, pythonw
        return None
    return ProgressLine(total=len(items) if isinstance(items, Sized) else None)
