"""`penstock.run`: a whole run from a script, its report, and Ctrl-C."""

import asyncio
import contextlib
import io
import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

import penstock
from penstock import Executor, FailureKind, HttpClient, JobEnded, Report, Retry, UsageError
from penstock.executor.signals import Interrupts
from records import Record, key_of, make_records, profile_of
from service import EmbeddedService, ServiceConfig

BOUND = 20.0
"""Seconds after which a program that should have ended is killed."""


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


# --- SIGINT, in this process ---


@pytest.fixture(autouse=True)
def _sigint_is_as_before() -> Iterator[None]:
    """Every test here, whatever it does, must leave Python's own handler in its place."""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "penstock.run"]


FIRST = "interrupted: finishing what is in flight; Ctrl-C again cancels it"
SECOND = "interrupted: cancelling what is in flight; Ctrl-C again ends the program"


def test_one_interrupt_drains(caplog: pytest.LogCaptureFixture) -> None:
    """No more items are taken, what is in flight is finished, and the report says that it was interrupted."""

    async def job(item: int) -> None:
        await asyncio.sleep(0)
        if item == 10:
            press()
            await asyncio.sleep(0.01)

    report = penstock.run(job, itertools.count(), limit=4)
    report.verify()
    assert (report.stopped, report.exit_code, report.left, report.failed) == ("interrupted", 130, 0, 0)
    assert report.done == report.read >= 11
    assert messages(caplog) == [FIRST]


def test_a_second_interrupt_cancels(caplog: pytest.LogCaptureFixture) -> None:
    """What is in flight is left: neither done nor failed. Resources are closed all the same."""
    closed = False

    async def job(item: int) -> None:
        if item == 3:
            press()
            await asyncio.sleep(0)
            press()
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
    assert messages(caplog) == [FIRST, SECOND]


@pytest.mark.may_leave("errors")  # asyncio tells of the KeyboardInterrupt in the job's task too
def test_a_third_interrupt_leaves(caplog: pytest.LogCaptureFixture) -> None:
    """By a KeyboardInterrupt, from a job that blocks the loop as well: the loop never hears of the first two."""
    closed = False

    async def job(_item: int) -> None:
        press()
        press()
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


def test_a_handler_of_the_application_is_left_alone() -> None:
    """Whoever has one has plans of their own; they can call `executor.shutdown` in it."""
    caught: list[int] = []

    def mine(number: int, _frame: object) -> None:
        caught.append(number)

    async def job(_item: int) -> None:
        press()

    before = signal.signal(signal.SIGINT, mine)
    try:
        report = penstock.run(job, range(5))
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, before)
    assert caught == [signal.SIGINT] * 5
    assert (report.done, report.stopped) == (5, None)


def test_a_handler_that_the_job_has_put_in_place_stays() -> None:
    def mine(_number: int, _frame: object) -> None: ...

    async def job(_item: int) -> None:
        signal.signal(signal.SIGINT, mine)

    try:
        penstock.run(job, [1])
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_in_another_thread_sigint_stays_with_the_main_thread() -> None:
    seen: list[object] = []

    async def job(_item: int) -> None:
        seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=penstock.run, args=(job, [1]))
    thread.start()
    thread.join(BOUND)
    assert seen == [signal.default_int_handler]


def test_where_no_executor_is_to_be_shut_down_an_interrupt_is_what_it_always_is() -> None:
    """Before the executor is open, and after its block."""
    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt):
            press()

        async def main() -> None:
            async with Executor() as executor:
                async with interrupts.shut_down(executor):
                    pass
                with pytest.raises(KeyboardInterrupt):
                    press()

        asyncio.run(main())


def test_an_interrupt_in_the_last_moment_of_the_block_shuts_nothing_down() -> None:
    """The loop gets to it when the block is over; no task is left behind for it."""

    async def main(interrupts: Interrupts) -> None:
        async with Executor() as executor:
            async with interrupts.shut_down(executor):
                press()
            await asyncio.sleep(0)
            assert await executor.submit(double, 4) == 8
            assert len(asyncio.all_tasks()) == 1

    with Interrupts() as interrupts:
        asyncio.run(main(interrupts))


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


# --- SIGINT, in a process of its own ---


class Script:
    """A Python program under test; its standard error is read together with its standard output."""

    def __init__(self, path: Path, program: str) -> None:
        script = path / "script.py"
        script.write_text(f"import asyncio, itertools, os, sys, threading, time\nimport penstock\n{program}")
        self._process = subprocess.Popen(
            [sys.executable, "-u", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
        )
        self._watchdog = threading.Timer(BOUND, self._process.kill)
        self._watchdog.start()
        self.lines: list[str] = []

    def read_until(self, wanted: str) -> None:
        """Wait for a line that holds these words."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.rstrip("\n"))
            if wanted in line:
                return
        raise AssertionError(f"{wanted!r} is not in the output:\n" + "\n".join(self.lines))

    def press(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def say(self, line: str) -> None:
        assert self._process.stdin is not None
        print(line, file=self._process.stdin, flush=True)

    def ended(self) -> int:
        """Read the rest; the exit status."""
        assert self._process.stdout is not None
        self.lines += self._process.stdout.read().splitlines()
        return self._process.wait(BOUND)

    def running(self) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.02)
        return self._process.returncode is None

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._watchdog.cancel()
        self._watchdog.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


Start = Callable[[str], Script]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with contextlib.ExitStack() as scripts:

        def start(program: str) -> Script:
            script = Script(tmp_path, program)
            scripts.callback(script.close)
            return script

        yield start


REPORT = """
report.verify()
print("report", report.read, report.done, report.left, report.stopped)
sys.exit(report.exit_code)
"""


def test_ctrl_c_in_a_script_drains(start: Start) -> None:
    """What is in flight is finished, no other item is begun, and the exit status is a shell's for Ctrl-C."""
    script = start(
        """
said = asyncio.Event()
async def job(item):
    print("started", item)
    if item == 1:
        await asyncio.to_thread(sys.stdin.readline)
        said.set()
    await said.wait()
report = penstock.run(job, itertools.count(), limit=2)
"""
        + REPORT
    )
    script.read_until("started 1")
    script.press()
    script.read_until(FIRST)
    script.say("go")
    assert script.ended() == 130
    assert script.lines == ["started 0", "started 1", FIRST, "report 2 2 0 interrupted"]


def test_a_second_ctrl_c_cancels_and_a_hung_thread_does_not_hold_the_exit_up(start: Start) -> None:
    """One job waits for the network, one hangs in a blocking call: the script reports and leaves."""
    script = start(
        """
async def job(item):
    print("started", item)
    try:
        await (penstock.to_thread(threading.Event().wait) if item else asyncio.sleep(3600))
    finally:
        print("cancelled", item)
report = penstock.run(job, itertools.count(), limit=2)
"""
        + REPORT
    )
    script.read_until("started 1")
    script.press()
    script.read_until(FIRST)
    script.press()
    script.read_until(SECOND)
    assert script.ended() == 130
    assert sorted(script.lines[4:6]) == ["cancelled 0", "cancelled 1"]
    assert script.lines[6:] == ["report 2 0 2 interrupted"]


def test_a_third_ctrl_c_leaves_though_a_job_takes_its_time_to_clean_up(start: Start) -> None:
    script = start(
        """
async def job(item):
    try:
        print("started")
        await asyncio.sleep(3600)
    finally:
        print("cleaning up")
        await asyncio.sleep(3600)
report = penstock.run(job, [1])
"""
        + REPORT
    )
    script.read_until("started")
    script.press()
    script.read_until(FIRST)
    script.press()
    script.read_until("cleaning up")
    script.press()
    assert script.ended() == -signal.SIGINT
    assert script.lines[-1] == "KeyboardInterrupt"


def test_a_job_that_blocks_the_loop_can_be_left(start: Start) -> None:
    """The loop hears nothing, so it takes three; more are needed only if one overtakes another on its way."""
    script = start(
        """
async def job(item):
    print("started")
    time.sleep(3600)
report = penstock.run(job, [1])
"""
        + REPORT
    )
    script.read_until("started")
    presses = 0
    while script.running():
        script.press()
        presses += 1
    assert script.ended() == -signal.SIGINT
    assert presses >= 3
    assert script.lines[-1] == "KeyboardInterrupt"


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
