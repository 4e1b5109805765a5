"""`penstock.run`: a whole run from a script, its report, and signals. Whole processes are in test_exit.py."""

import asyncio
import contextlib
import io
import itertools
import os
import re
import signal
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import pytest

import penstock
from penstock import Executor, FailureKind, HttpClient, JobEnded, Report, Retry, UsageError
from penstock.executor.signals import Interrupts
from records import Record, key_of, make_records, profile_of
from service import EmbeddedService, ServiceConfig

BOUND = 20.0
"""Seconds after which a thread that should have ended is not waited for any more."""


async def double(item: int) -> int:
    await asyncio.sleep(0)
    return 2 * item


async def fail_on_odd(item: int) -> int:
    if item % 2:
        raise ValueError(f"odd\nitem {item}")
    return item


class Listener:
    """An instrument that remembers."""

    def __init__(self) -> None:
        self.heard: list[JobEnded] = []

    def notify(self, event: JobEnded, /) -> None:
        self.heard.append(event)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# --- end to end ---


@penstock.job
async def two_steps() -> AsyncGenerator[Callable[[Record], Coroutine[Any, Any, float]], None]:
    """Two round trips and a computation; the address of the service comes by an environment variable."""
    retry = Retry(attempts=20, wait=0)
    async with HttpClient(os.environ["TEST_RUN_SERVICE"], retry=retry, limit=16) as api:

        async def score(record: Record) -> float:
            await api.get_json("/api1", params=record)
            scored = await api.post_json("/api2", json={**record, "profile": profile_of(record)}, idempotent=True)
            return await penstock.compute(lambda: float(scored["score"]))

        yield score


def test_a_run_over_a_real_service_accounts_for_every_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults are retried; what the service counted is what the report says."""
    config = ServiceConfig(latency=0.001, errors=0.1, drops=0.05, seed=3)
    with EmbeddedService(config) as service:
        monkeypatch.setenv("TEST_RUN_SERVICE", service.url)
        listener = Listener()
        report = penstock.run(two_steps, make_records(200), key=key_of, limit=32, instruments=[listener])
        stats = service.stats()
    report.verify()
    assert (report.read, report.done, report.failed, report.left, report.stopped) == (200, 200, 0, 0, None)
    assert (report.causes, report.exit_code) == ((), 0)
    assert report.attempts > 400, "some were retried"
    assert sum(stats["requests"].values()) == report.attempts
    assert report.ran.count == 200
    assert 0 < report.ran.max <= report.elapsed
    assert {event.outcome.key for event in listener.heard} == {key_of(record) for record in make_records(200)}


def test_a_service_that_refuses_for_good_is_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    with EmbeddedService(ServiceConfig(latency=0.0, malformed=1.0)) as service:
        monkeypatch.setenv("TEST_RUN_SERVICE", service.url)
        report = penstock.run(two_steps, make_records(10), key=key_of)
    report.verify()
    assert report.kinds == {FailureKind.PERMANENT: 10}
    assert report.exit_code == 5
    (cause, *_) = report.causes
    assert cause.error.startswith("NotJson: GET http://127.0.0.1:")


# --- what may be given ---


def test_a_function_will_do_as_a_job_and_any_iterable_as_items() -> None:
    """Async or plain; also an async iterable, and one that blocks."""

    async def numbers() -> AsyncIterator[int]:
        for number in range(10):
            yield number

    for job in (double, str):
        for items in (range(10), iter(range(10)), numbers(), penstock.pull_in_thread(range(10))):
            report = penstock.run(job, items)
            report.verify()
            assert (report.read, report.done, report.exit_code) == (10, 10, 0)


def test_no_items_make_an_empty_report() -> None:
    report = penstock.run(double, [])
    report.verify()
    assert (report.read, report.exit_code, report.causes) == (0, 0, ())


def test_limit_and_timeout_are_those_of_the_jobs() -> None:
    running = most = 0

    async def job(item: int) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            await asyncio.sleep(3600 if item == 5 else 0)
        finally:
            running -= 1

    report = penstock.run(job, range(10), limit=3, timeout=0.05)
    report.verify()
    assert most == 3
    assert (report.done, report.kinds) == (9, {FailureKind.TRANSIENT: 1})
    assert report.causes[0].error.startswith("JobTimeout: <job ")


def test_failures_are_told_with_the_key_of_an_example() -> None:
    report = penstock.run(fail_on_odd, range(10), key=lambda item: f"id-{item}")
    report.verify()
    assert (report.done, report.failed, report.exit_code) == (5, 5, 5)
    (cause,) = report.causes
    assert (cause.error, cause.count, cause.example_key) == ("ValueError: odd", 5, "id-1")


@pytest.mark.parametrize(("max_errors", "items"), [(3, itertools.count()), (0.1, itertools.count()), (0, [1, 2, 4])])
def test_too_many_errors_end_the_run_and_the_report_says_so(max_errors: float, items: Any) -> None:
    """Also an endless source; what is in flight is finished and counted."""
    report = penstock.run(fail_on_odd, items, max_errors=max_errors, limit=4)
    report.verify()
    assert (report.stopped, report.exit_code) == ("too many errors", 8)
    assert report.failed > max_errors


def test_an_error_of_the_source_is_raised_after_the_jobs_before_it_have_ended() -> None:
    """No report: nobody knows what was still to come. Instruments have heard of what was done."""
    listener = Listener()

    def breaking() -> Iterator[int]:
        yield from range(10)
        raise OSError("the file is gone")

    with pytest.raises(OSError, match="the file is gone"):
        penstock.run(double, breaking(), instruments=[listener])
    assert sorted(event.outcome.input for event in listener.heard) == list(range(10))


def test_an_instrument_that_fails_does_not_end_the_run() -> None:
    """It is told nothing more; the others are."""

    class Broken:
        calls = 0

        def notify(self, _event: JobEnded, /) -> None:
            self.calls += 1
            raise RuntimeError

    broken, listener = Broken(), Listener()
    report = penstock.run(double, range(10), instruments=[broken, listener])
    assert (report.done, broken.calls, len(listener.heard)) == (10, 1, 10)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((3, [1]), "found 3, expected a function"),
        ((double, 3), "found 3 as items"),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        penstock.run(*arguments)
    with pytest.raises(UsageError, match="limit=0: expected a whole number of at least 1"):
        penstock.run(double, [1], limit=0)


async def test_under_a_running_loop_it_names_the_call_to_write() -> None:
    """It would block the loop. Nothing is started and no item taken."""
    items = iter([1, 2])
    with pytest.raises(
        UsageError, match=r"`async with Executor\(\) as executor: report = await executor\.run\(job, it"
    ):
        penstock.run(double, items)
    async with Executor() as executor:
        report = await executor.run(double, items)
    assert report.read == 2


def test_it_can_run_again_and_in_another_thread() -> None:
    """Each run has a loop of its own. Outside the main thread signals cannot be taken, and are not missed."""
    reports: list[Report] = []
    thread = threading.Thread(target=lambda: reports.append(penstock.run(double, range(5))))
    thread.start()
    reports.append(penstock.run(double, range(5)))
    thread.join(BOUND)
    assert [report.done for report in reports] == [5, 5]


# --- progress ---


def test_progress_is_shown_when_it_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    """Here in a file, so without control characters; the total is known from a list and not from a generator."""
    penstock.run(double, list(range(10)), progress=True)
    assert capsys.readouterr().err.startswith("10 of 10 jobs, 0 failed, ")
    penstock.run(double, iter(range(10)), progress=True)
    assert capsys.readouterr().err.startswith("10 jobs, 0 failed, ")


def test_progress_is_shown_on_a_terminal_unless_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, progress, shown in [
        (Terminal(), None, True),
        (Terminal(), False, False),
        (io.StringIO(), None, False),
        (io.StringIO(), True, True),
    ]:
        monkeypatch.setattr(sys, "stderr", stream)
        penstock.run(double, range(3), progress=progress)
        assert bool(stream.getvalue()) == shown


@pytest.mark.parametrize("progress", [None, True])
def test_a_program_without_a_standard_error_runs_too(monkeypatch: pytest.MonkeyPatch, progress: bool | None) -> None:
    """Under `pythonw`, or as a service, `sys.stderr` is None."""
    monkeypatch.setattr(sys, "stderr", None)
    assert penstock.run(double, range(3), progress=progress).done == 3


def test_the_progress_line_is_ended_when_the_run_fails(capsys: pytest.CaptureFixture[str]) -> None:
    def breaking() -> Iterator[int]:
        yield 1
        raise OSError

    with pytest.raises(OSError):
        penstock.run(double, breaking(), progress=True)
    assert capsys.readouterr().err.startswith("1 jobs, 0 failed, ")


def test_the_progress_line_is_kept_alive_while_no_job_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that waits must not look frozen: the line is written by the clock, too."""
    monkeypatch.setattr("penstock.instruments.progress.IN_A_FILE", 0.01)
    seen: list[str] = []

    async def wait_for_the_line(_item: int) -> None:
        while not seen:
            await asyncio.sleep(0.01)
            seen.extend(capsys.readouterr().err.splitlines())

    penstock.run(wait_for_the_line, [1, 2], progress=True)
    assert seen[0].startswith("0 of 2 jobs, 0 failed")


# --- the process's own things ---


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "25", True])
def test_a_drain_timeout_that_cannot_work_is_refused(value: Any) -> None:
    with pytest.raises(UsageError, match=rf"drain_timeout={value!r}: expected seconds of at least 0, or None"):
        penstock.run(double, [1], drain_timeout=value)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "0.1", True])
def test_a_switch_interval_that_cannot_work_is_refused(value: Any) -> None:
    with pytest.raises(UsageError, match=rf"switch_interval={value!r}: expected seconds above 0, or None"):
        penstock.run(double, [1], switch_interval=value)


@pytest.mark.parametrize("failing", [False, True])
def test_threads_switch_faster_while_the_run_lasts(failing: bool) -> None:
    """The interval is back afterwards, also when the run has failed. None leaves it alone."""
    before = sys.getswitchinterval()
    seen: list[float] = []

    async def look(_item: int) -> None:
        seen.append(sys.getswitchinterval())

    def items() -> Iterator[int]:
        yield 1
        if failing:
            raise OSError

    for interval in (before / 5, None):
        with pytest.raises(OSError) if failing else contextlib.nullcontext():
            penstock.run(look, items(), switch_interval=interval)
        assert sys.getswitchinterval() == before
    assert seen == [pytest.approx(before / 5), before]


def test_unless_it_is_told_otherwise_a_run_has_half_a_millisecond() -> None:
    seen: list[float] = []

    async def look(_item: int) -> None:
        seen.append(sys.getswitchinterval())

    penstock.run(look, [1])
    assert seen == [pytest.approx(0.0005)]


# --- tasks that jobs leave behind ---


def test_a_task_that_a_job_leaves_behind_is_cancelled_at_the_end() -> None:
    """As at the end of `asyncio.run`."""
    ended: list[str] = []
    tasks: list[asyncio.Task[None]] = []

    async def linger() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0)
            ended.append("cleaned up")

    async def job(_item: int) -> None:
        tasks.append(asyncio.create_task(linger()))

    penstock.run(job, [1])
    assert ended == ["cleaned up"]


@pytest.mark.may_leave("errors")  # asyncio tells that the task was pending when it was destroyed
def test_a_task_that_swallows_its_cancellation_does_not_keep_the_run_from_ending(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`asyncio.run` would wait for it for ever. The loop is closed all the same."""
    monkeypatch.setattr(sys.modules["penstock.run"], "PATIENCE", 0.01)
    loops: list[asyncio.AbstractEventLoop] = []
    swallowed = 0

    async def go_on() -> None:
        nonlocal swallowed
        while True:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                swallowed += 1

    async def job(_item: int) -> None:
        loops.append(asyncio.get_running_loop())
        task = asyncio.create_task(go_on())
        await asyncio.sleep(0)
        assert not task.done()

    assert penstock.run(job, [1]).done == 1
    assert (swallowed, loops[0].is_closed()) == (1, True)


# --- signals, in this process ---


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


DEFAULTS = [signal.default_int_handler, signal.SIG_DFL]


@pytest.fixture(autouse=True)
def _signals_are_as_before() -> Iterator[None]:
    """Every test here, whatever it does, must leave Python's own handlers in their place."""
    assert handlers() == DEFAULTS
    yield
    assert handlers() == DEFAULTS


def press(number: int = signal.SIGINT) -> None:
    signal.raise_signal(number)


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "penstock.run"]


def first(name: str = "Ctrl-C", within: str = " within 25 s") -> str:
    return f"interrupted by {name}: finishing what is in flight{within}; {name} again cancels it"


def second(name: str = "Ctrl-C") -> str:
    return f"interrupted by {name}: cancelling what is in flight; {name} again ends the program"


both = pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")], ids=["SIGINT", "SIGTERM"]
)


@both
@pytest.mark.parametrize("drain_timeout", [25, 1.5, None])
def test_one_signal_drains(
    caplog: pytest.LogCaptureFixture, number: int, name: str, drain_timeout: float | None
) -> None:
    """No more items are taken, what is in flight is finished, and the report says that it was interrupted."""

    async def job(item: int) -> None:
        await asyncio.sleep(0)
        if item == 10:
            press(number)
            await asyncio.sleep(0.01)

    report = penstock.run(job, itertools.count(), limit=4, drain_timeout=drain_timeout)
    report.verify()
    assert (report.stopped, report.exit_code, report.left, report.failed) == ("interrupted", 130, 0, 0)
    assert report.done == report.read >= 11
    assert messages(caplog) == [first(name, "" if drain_timeout is None else f" within {drain_timeout:g} s")]


@pytest.mark.parametrize(
    ("one", "other", "names"),
    [
        (signal.SIGINT, signal.SIGINT, ("Ctrl-C", "Ctrl-C")),
        (signal.SIGTERM, signal.SIGTERM, ("SIGTERM", "SIGTERM")),
        (signal.SIGTERM, signal.SIGINT, ("SIGTERM", "Ctrl-C")),
    ],
)
def test_a_second_signal_cancels(
    caplog: pytest.LogCaptureFixture, one: int, other: int, names: tuple[str, str]
) -> None:
    """What is in flight is left: neither done nor failed. Resources are closed all the same. Signals count together."""
    closed = False

    async def job(item: int) -> None:
        if item == 3:
            press(one)
            await asyncio.sleep(0)
            press(other)
        await asyncio.sleep(3600)

    @penstock.job
    async def definition() -> AsyncGenerator[Any, None]:
        nonlocal closed
        yield job
        closed = True

    report = penstock.run(definition, itertools.count(), limit=4)
    report.verify()
    assert (report.read, report.left, report.done, report.stopped, report.exit_code) == (4, 4, 0, "interrupted", 130)
    assert closed
    assert messages(caplog) == [first(names[0]), second(names[1])]


@pytest.mark.parametrize("drain_timeout", [None, 0, 0.02])
def test_what_is_still_opening_is_cancelled(caplog: pytest.LogCaptureFixture, drain_timeout: float | None) -> None:
    """By a second signal or the deadline, as jobs are. What it has opened is closed; nothing is read."""
    closed = False

    @penstock.job
    async def definition() -> AsyncGenerator[Any, None]:
        nonlocal closed
        press()
        if drain_timeout is None:
            press()
        try:
            await asyncio.sleep(3600)
            yield double
        finally:
            closed = True

    report = penstock.run(definition, itertools.count(), drain_timeout=drain_timeout)
    report.verify()
    assert (report.read, report.left, report.done, report.stopped, report.exit_code) == (0, 0, 0, "interrupted", 130)
    assert closed
    assert len(messages(caplog)) == 2


@pytest.mark.parametrize("drain_timeout", [None, 0.02])
def test_what_does_not_close_is_cut_off_and_named(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, drain_timeout: float | None
) -> None:
    """The report of what was done before is kept."""
    monkeypatch.setattr("penstock.executor.resources.PATIENCE", 0.05)
    cancelled = False

    @penstock.job
    async def definition() -> AsyncGenerator[Any, None]:
        nonlocal cancelled
        yield double
        press()
        if drain_timeout is None:
            press()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled = True
            raise

    report = penstock.run(definition, [1, 2, 3], drain_timeout=drain_timeout)
    assert (report.read, report.done, report.stopped) == (3, 3, None)
    assert cancelled
    (complaint,) = [record.getMessage() for record in caplog.records if record.name == "penstock.jobs"]
    assert re.search(r"<penstock.Job .*definition> did not close its resources within 0.05 s", complaint)


def test_a_closing_after_the_deadline_has_its_own_time(caplog: pytest.LogCaptureFixture) -> None:
    """It is not held against it that jobs had to be cancelled first."""
    closed = False

    async def job(_item: int) -> None:
        press()
        press()
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.05)

    @penstock.job
    async def definition() -> AsyncGenerator[Any, None]:
        nonlocal closed
        try:
            yield job
        finally:
            await asyncio.sleep(0.05)
            closed = True

    report = penstock.run(definition, [1])
    assert (report.left, report.stopped) == (1, "interrupted")
    assert closed
    assert messages(caplog) == [first(), second()]


def test_two_signals_at_once_cancel(caplog: pytest.LogCaptureFixture) -> None:
    """The loop hears of both in one turn."""

    async def job(_item: int) -> None:
        press()
        press()
        await asyncio.sleep(3600)

    report = penstock.run(job, [1])
    assert (report.read, report.left, report.stopped) == (1, 1, "interrupted")
    assert messages(caplog) == [first(), second()]


@pytest.mark.parametrize("drain_timeout", [0, 0.02])
def test_what_still_runs_after_the_drain_s_deadline_is_cancelled(
    caplog: pytest.LogCaptureFixture, drain_timeout: float
) -> None:
    """What ends in time is done."""
    pressed = asyncio.Event()

    async def job(item: int) -> None:
        if item == 3:
            press()
            pressed.set()
        await pressed.wait()
        if item:
            await asyncio.sleep(3600)

    report = penstock.run(job, itertools.count(), limit=4, drain_timeout=drain_timeout)
    report.verify()
    assert report.stopped == "interrupted"
    assert (report.done, report.left) == (1, 3)
    assert messages(caplog) == [
        first(within=f" within {drain_timeout:g} s"),
        f"not finished within {drain_timeout:g} s: cancelling what is in flight",
    ]


def test_a_second_signal_does_not_wait_for_the_deadline_nor_the_deadline_for_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Jobs are cancelled once, by whichever comes first."""
    cancelled: list[int] = []

    async def job(item: int) -> None:
        press()
        await asyncio.sleep(0)
        if item:
            press()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.append(item)
            if not item:
                press()
            await asyncio.sleep(0.3)
            raise

    for item in (0, 1):
        report = penstock.run(job, [item], drain_timeout=0.2)
        assert (report.left, report.stopped) == (1, "interrupted")
    assert cancelled == [0, 1]
    soon = first(within=" within 0.2 s")
    assert messages(caplog) == [
        *(soon, "not finished within 0.2 s: cancelling what is in flight", second()),
        *(soon, second()),
    ]


@pytest.mark.may_leave("errors")  # asyncio tells of the KeyboardInterrupt in the job's task too
def test_a_third_interrupt_leaves(caplog: pytest.LogCaptureFixture) -> None:
    """By a KeyboardInterrupt, from a job that blocks the loop as well: the loop never hears of the first two."""
    closed = False

    async def job(_item: int) -> None:
        press()
        press(signal.SIGTERM)
        press()
        raise AssertionError("it was left at the third one")

    @penstock.job
    async def definition() -> AsyncGenerator[Any, None]:
        nonlocal closed
        try:
            yield job
        finally:
            closed = True

    with pytest.raises(KeyboardInterrupt):
        penstock.run(definition, [1, 2])
    assert closed, "the loop's end cancels what runs, and that closes"
    assert messages(caplog) == []


def test_a_third_sigterm_ends_also_a_process_that_it_does_not_end_by_default() -> None:
    """The first process of a container is spared all signals that it has no handler for. So is one that blocks it."""
    sigterm = {signal.SIGTERM}

    def send() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, sigterm)
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    try:
        with pytest.raises(SystemExit) as left:
            with Interrupts():
                press()
                press()
                signal.pthread_sigmask(signal.SIG_BLOCK, sigterm)  # of this thread, whose signals end the process
                sender.start()
                sender.join(BOUND)
                raise AssertionError("the third one did not leave")
        assert left.value.code == 128 + signal.SIGTERM
    finally:
        sender.join(BOUND)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # drops the one that waits
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, sigterm)


@pytest.mark.parametrize(
    ("owned", "taken"),
    [
        ({signal.SIGINT, signal.SIGTERM}, set[int]()),
        ({signal.SIGINT}, {signal.SIGTERM}),
        ({signal.SIGTERM}, {signal.SIGINT}),
    ],
)
def test_a_handler_of_the_application_is_left_alone(owned: set[int], taken: set[int]) -> None:
    """Each signal is decided for itself. Whoever has a handler has plans of their own, a shutdown among them."""
    caught: list[int] = []

    def mine(number: int, _frame: object) -> None:
        caught.append(number)

    async def job(_item: int) -> None:
        for number in owned:
            press(number)

    async def drain(_item: int) -> None:
        for number in taken:
            press(number)

    before = {number: signal.signal(number, mine) for number in owned}
    try:
        report = penstock.run(job, range(5))
        interrupted = penstock.run(drain, range(5), limit=1)
        assert all(signal.getsignal(number) is mine for number in owned)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert sorted(caught) == sorted([*owned] * 5)
    assert (report.done, report.stopped) == (5, None)
    assert (interrupted.stopped == "interrupted") == bool(taken)


async def test_an_executor_on_a_loop_of_the_application_s_takes_no_signals() -> None:
    """A server decides itself what a signal means."""
    caught: list[str] = []
    enough = asyncio.Event()
    loop = asyncio.get_running_loop()

    def mine(name: str) -> None:
        caught.append(name)
        if len(caught) == 6:
            enough.set()

    async def job(_item: int) -> None:
        press(signal.SIGTERM)
        press()
        await enough.wait()

    loop.add_signal_handler(signal.SIGINT, mine, "SIGINT")
    loop.add_signal_handler(signal.SIGTERM, mine, "SIGTERM")
    try:
        before = handlers()
        async with asyncio.timeout(BOUND), Executor() as executor:
            report = await executor.run(job, range(3))
            assert handlers() == before
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        loop.remove_signal_handler(signal.SIGTERM)
    assert (report.done, report.stopped) == (3, None)
    assert sorted(caught) == ["SIGINT"] * 3 + ["SIGTERM"] * 3


def test_a_handler_that_the_job_has_put_in_place_stays() -> None:
    def mine(_number: int, _frame: object) -> None: ...

    async def job(_item: int) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, mine)

    try:
        penstock.run(job, [1])
        assert handlers() == [mine, mine]
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_in_another_thread_signals_stay_with_the_main_thread() -> None:
    seen: list[object] = []

    async def job(_item: int) -> None:
        seen.extend(handlers())

    thread = threading.Thread(target=penstock.run, args=(job, [1]))
    thread.start()
    thread.join(BOUND)
    assert seen == DEFAULTS


@both
def test_a_signal_before_the_executor_is_open_is_heard_when_it_is(
    caplog: pytest.LogCaptureFixture, number: int, name: str
) -> None:
    """Nothing is begun; the report says why. An error in the middle of opening a loop would help nobody."""

    async def main(interrupts: Interrupts) -> Report:
        async with Executor() as executor, interrupts.shut_down(executor):
            return await executor.run(double, itertools.count())

    with Interrupts() as interrupts:
        press(number)
        report = asyncio.run(main(interrupts))
    assert (report.read, report.stopped) == (0, "interrupted")
    assert messages(caplog) == [first(name)]


def test_a_signal_before_an_executor_that_never_opens_is_what_it_always_is() -> None:
    with pytest.raises(KeyboardInterrupt):
        with Interrupts():
            press()
    with pytest.raises(KeyboardInterrupt) as raised:
        with Interrupts():
            press()
            raise KeyError
    assert isinstance(raised.value.__context__, KeyError)


def test_an_interrupt_after_the_executor_s_block_is_what_it_always_is() -> None:
    """And comes once."""

    async def main() -> None:
        async with Executor() as executor:
            async with interrupts.shut_down(executor):
                pass
            with pytest.raises(KeyboardInterrupt):
                press()

    with Interrupts() as interrupts:
        asyncio.run(main())


def test_once_a_signal_was_heard_a_second_one_after_the_block_takes_nothing_away() -> None:
    """All that it asks for is under way: the report is not lost to an impatient finger. The third one leaves."""

    async def main(presses: int) -> str:
        async with Executor() as executor:
            async with interrupts.shut_down(executor):
                press()
                await asyncio.sleep(0)
            for _ in range(presses - 1):
                press()
            return "report"

    with Interrupts() as interrupts:
        assert asyncio.run(main(presses=2)) == "report"
    with pytest.raises(KeyboardInterrupt):
        with Interrupts() as interrupts:
            asyncio.run(main(presses=3))


def test_an_interrupt_in_the_last_moment_of_the_block_is_not_lost() -> None:
    """The loop gets to it when there is nothing left to shut down: it comes as if it had come a moment later."""

    async def main(interrupts: Interrupts) -> None:
        async with Executor() as executor:
            async with interrupts.shut_down(executor):
                press()
            await asyncio.sleep(0)
            assert await executor.submit(double, 4) == 8
            assert len(asyncio.all_tasks()) == 1

    ended = False
    with pytest.raises(KeyboardInterrupt):
        with Interrupts() as interrupts:
            asyncio.run(main(interrupts))
            ended = True
    assert ended


def test_a_shutdown_under_way_is_over_when_the_block_is() -> None:
    """No task of it outlives the block."""

    async def main(interrupts: Interrupts) -> None:
        async with Executor() as executor:
            async with interrupts.shut_down(executor):
                executor.submit(asyncio.sleep, 3600)
                press()
                await asyncio.sleep(0)
                press()
                await asyncio.sleep(0)
            assert len(asyncio.all_tasks()) == 1
            assert executor.statistics().cancelled == 1

    with Interrupts() as interrupts:
        asyncio.run(main(interrupts))
