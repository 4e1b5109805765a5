"""The CPU time of a thread can be read from another one, and one that has ended has none."""

import threading
import time

import pytest

from penstock import clock

BOUND = 10.0
"""Seconds after which a thread of a failed test lets go."""


class Burner:
    """A thread that computes until it has burnt some CPU by its own account, then holds still, then ends."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.clock_id: int | None = None
        self.has_burnt = threading.Event()
        self.go = threading.Event()
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        self.clock_id = clock.thread_cpu_clock()
        while time.thread_time() < self._seconds:
            sum(range(1_000))
        self.has_burnt.set()
        self.go.wait(BOUND)

    def __enter__(self) -> "Burner":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.go.set()
        self.thread.join(BOUND)


@pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="no such clocks on this platform")
class TestCpuTime:
    def test_it_is_what_the_thread_burnt_and_nobody_else(self) -> None:
        """Two threads, one of which does nothing: each has its own clock."""
        with Burner(0.05) as busy, Burner(0.0) as idle:
            assert busy.has_burnt.wait(BOUND)
            assert idle.has_burnt.wait(BOUND)
            assert busy.clock_id is not None
            assert idle.clock_id is not None
            burnt, other = clock.cpu_time(busy.clock_id), clock.cpu_time(idle.clock_id)
            assert burnt is not None
            assert other is not None
            assert burnt >= 0.05
            assert 0 <= other < 0.05

    def test_a_thread_that_waits_uses_none(self) -> None:
        with Burner(0.01) as burner:
            assert burner.has_burnt.wait(BOUND)
            assert burner.clock_id is not None
            before = clock.cpu_time(burner.clock_id)
            deadline = time.thread_time() + 0.02
            while time.thread_time() < deadline:
                sum(range(1_000))
            after = clock.cpu_time(burner.clock_id)
            assert before is not None
            assert after is not None
            assert after - before < 0.01

    def test_the_calling_thread_has_one_too(self) -> None:
        clock_id = clock.thread_cpu_clock()
        assert clock_id is not None
        before = time.thread_time()
        between = clock.cpu_time(clock_id)
        assert between is not None
        assert before <= between <= time.thread_time()

    def test_a_thread_that_has_ended_has_none(self) -> None:
        """The clocks of many threads, read again and again after their end: no error, no crash.

        The system's thread may outlive the interpreter's by a moment.
        """
        burners = [Burner(0.0) for _ in range(20)]
        for burner in burners:
            with burner:
                assert burner.has_burnt.wait(BOUND)
        deadline = time.monotonic() + BOUND
        for _ in range(100):
            for burner in burners:
                assert burner.clock_id is not None
                while clock.cpu_time(burner.clock_id) is not None:
                    assert time.monotonic() < deadline


def test_a_platform_without_such_clocks_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(time, "pthread_getcpuclockid", raising=False)
    assert clock.thread_cpu_clock() is None
