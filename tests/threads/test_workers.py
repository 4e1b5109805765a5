"""The set of worker threads: few of them, made when they are needed, gone when they are not, and no work forgotten."""

import asyncio
import os
import random
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

import pytest

from penstock import UsageError, clock
from penstock.memory import MEMORY
from penstock.threads import workers as module
from penstock.threads.lane import Lane
from penstock.threads.workers import Work, Worker, Workers, check_threads, cores, most_threads, usable_cores

BOUND = 10.0
"""Seconds after which a thread of a failed test lets go."""

QUICK = 0.05
"""Seconds until an idle thread of these tests ends."""


class Task:
    """Work that tells when it begins, and goes on when it is let."""

    def __init__(self, *, held: bool = False) -> None:
        self.began = threading.Event()
        self.landed = threading.Event()
        self.go = threading.Event()
        self.worker: Worker | None = None
        self.name = ""
        if not held:
            self.go.set()

    def __call__(self, worker: Worker) -> None:
        self.worker = worker
        worker.call = self
        self.name = threading.current_thread().name
        self.began.set()
        assert self.go.wait(BOUND)
        worker.call = None

    def land(self) -> None:
        self.landed.set()

    def thread_name(self, number: int) -> str:
        return f"penstock-mine_{number}"


Make = Callable[..., Workers]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes sets of threads, and looks that no promise is left in the end."""
    made: list[Workers] = []

    def make_one(most: int = 4, **options: object) -> Workers:
        made.append(Workers(most, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make_one
    for workers in made:
        workers.dismiss()
        gone(workers)
        assert workers._promised == 0


def gone(workers: Workers) -> None:
    """All threads have ended."""
    for worker in workers.threads:
        worker.join(BOUND)
    assert workers.threads == ()


def run(workers: Workers, *tasks: Work) -> None:
    for task in tasks:
        assert workers.take_nowait()
        workers.run(task)


def parked(workers: Workers) -> None:
    """Wait until every thread is idle."""
    deadline = time.monotonic() + BOUND
    while len(workers._parked) < len(workers.threads):
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def refuse(_thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


# --- threads come and go ---


def test_there_is_no_thread_until_the_first_work(make: Make) -> None:
    """A promise alone makes none."""
    workers = make()
    assert workers.threads == ()
    assert workers.take_nowait()
    assert workers.threads == ()
    workers.give_back()


def test_work_one_after_the_other_is_done_by_one_thread(make: Make) -> None:
    """`land` comes when the thread counts as free, so whoever goes on then finds it so."""
    workers = make(1)
    done = []
    for _ in range(50):
        run(workers, task := Task())
        assert task.landed.wait(BOUND)
        done.append(task.worker)
    assert len(set(done)) == len(workers.threads) == 1


def test_work_that_runs_at_the_same_time_has_a_thread_each(make: Make) -> None:
    workers = make(4)
    tasks = [Task(held=True) for _ in range(4)]
    run(workers, *tasks)
    assert all(task.began.wait(BOUND) for task in tasks)
    assert len({task.worker for task in tasks}) == len(workers.threads) == 4
    for task in tasks:
        task.go.set()


def test_a_burst_of_short_work_is_done_by_few_threads(make: Make) -> None:
    """One wake-up at a time: who has been woken does what is there, and wakes the next one if there is more."""
    workers = make(200)
    tasks = [Task() for _ in range(200)]
    run(workers, *tasks)
    assert all(task.landed.wait(BOUND) for task in tasks)
    assert len(workers.threads) < 200


def test_the_thread_that_was_idle_last_works_first(make: Make) -> None:
    """So the others become idle for long, and end."""
    workers = make(3)
    tasks = [Task(held=True) for _ in range(3)]
    run(workers, *tasks)
    for task in tasks:
        assert task.began.wait(BOUND)
    for number, task in enumerate(tasks, 1):
        task.go.set()
        deadline = time.monotonic() + BOUND
        while len(workers._parked) < number:
            assert time.monotonic() < deadline
            time.sleep(0.0005)
    for _ in range(5):
        run(workers, again := Task())
        assert again.landed.wait(BOUND)
        assert again.worker is tasks[-1].worker
        parked(workers)


def test_idle_threads_end_and_come_back_when_they_are_needed(make: Make) -> None:
    ended: list[str] = []
    workers = make(3, idle_timeout=QUICK, on_exit=lambda: ended.append(threading.current_thread().name))
    for expected in (3, 6):
        tasks = [Task(held=True) for _ in range(3)]
        run(workers, *tasks)
        for task in tasks:
            assert task.began.wait(BOUND)
        threads = workers.threads
        assert len(threads) == 3
        for task in tasks:
            task.go.set()
        for thread in threads:
            thread.join(BOUND)
        assert workers.threads == ()
        assert len(ended) == expected, "each thread has told of its end"
    assert {name.split("_")[0] for name in ended} == {"penstock-idle"}


def test_a_thread_that_is_woken_while_its_time_runs_out_does_the_work(make: Make) -> None:
    """The time-out and the wake-up cross: it finds that it is not parked any more, and looks again."""
    workers = make(1, idle_timeout=QUICK)
    run(workers, task := Task())
    assert task.landed.wait(BOUND)
    parked(workers)
    (worker,) = workers.threads
    with workers._lock:  # as `_summon` does, but for the bell, which comes when the time has run out
        workers._promised += 1
        workers._parked.remove(worker)
        workers._waking += 1
        workers._backlog.append(late := Task())
        time.sleep(2 * QUICK)
    worker.bell.release()
    assert late.landed.wait(BOUND)
    assert late.worker is worker


def test_dismissed_threads_end_after_their_work(make: Make) -> None:
    """Idle ones at once. Work that comes later is done all the same, by threads that end after it."""
    ended: list[int] = []
    workers = make(3, on_exit=lambda: ended.append(threading.get_ident()))
    busy, idle = Task(held=True), Task(held=True)
    run(workers, busy, idle)
    assert busy.began.wait(BOUND)
    assert idle.began.wait(BOUND)
    idle.go.set()
    deadline = time.monotonic() + BOUND
    while not workers._parked:
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    workers.dismiss()
    assert idle.worker is not None
    idle.worker.join(BOUND)
    assert len(workers.threads) == 1
    run(workers, later := Task())
    assert later.landed.wait(BOUND)
    busy.go.set()
    gone(workers)
    assert len(ended) == 3


# --- promises ---


def test_there_are_never_more_promises_than_threads_allowed(make: Make) -> None:
    workers = make(2)
    assert [workers.take_nowait() for _ in range(4)] == [True, True, False, False]
    workers.give_back()
    assert workers.take_nowait()
    for _ in range(2):
        workers.give_back()


def test_a_few_more_are_promised_to_those_that_a_thread_waits_for(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the cap, and not without end."""
    monkeypatch.setattr(module, "SPARE_THREADS", 2)
    workers = make(1)
    assert [workers.take_nowait(spare=True) for _ in range(4)] == [True, True, True, False]
    for _ in range(2):
        workers.give_back()
        assert not workers.take_nowait(), "the cap holds for everybody else"
    workers.give_back()
    assert workers.take_nowait()
    workers.give_back()


def test_a_set_with_its_spare_threads_can_be_handed_around(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promises are those of the set; who wants a thread is told when one is free, a spare one as well."""
    monkeypatch.setattr(module, "SPARE_THREADS", 1)
    workers = make(1)
    assert [workers.with_spare.take_nowait() for _ in range(3)] == [True, True, False]
    told: list[int] = []
    workers.with_spare.when_free(lambda: told.append(1))
    workers.with_spare.give_back()
    assert len(told) == 1
    workers.when_free(lambda: told.append(2))
    assert len(told) == 1, "who needs an ordinary one waits for that"
    workers.give_back()
    assert told == [1, 2]


def test_who_wants_a_thread_is_told_when_one_is_free(make: Make) -> None:
    """Once: at once if there is one, else when a promise is given back or its work is done."""
    workers = make(1)
    told: list[str] = []
    workers.when_free(lambda: told.append("at once"))
    assert told == ["at once"]
    assert workers.take_nowait()
    workers.when_free(lambda: told.append("given back"))
    assert told == ["at once"]
    workers.give_back()
    assert told[1:] == ["given back"]
    run(workers, task := Task(held=True))
    free = threading.Event()
    workers.when_free(free.set)
    assert not free.is_set()
    task.go.set()
    assert free.wait(BOUND)
    workers.give_back() if workers.take_nowait() else None
    assert len(told) == 2


def test_who_wants_a_thread_is_not_told_of_spare_ones(make: Make) -> None:
    """When one of those comes back, the cap is still reached."""
    workers = make(1)
    assert workers.take_nowait()
    assert workers.take_nowait(spare=True)
    told: list[int] = []
    workers.when_free(lambda: told.append(1))
    workers.give_back()
    assert told == []
    workers.give_back()
    assert told == [1]


# --- threads that cannot be started ---


def test_work_is_refused_when_its_thread_cannot_be_started_and_there_is_none(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The promise is taken back, and the work is not done later on."""
    workers = make()
    refused = Task()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert workers.take_nowait()
        with pytest.raises(RuntimeError, match="can't start new thread"):
            workers.run(refused)
    assert (workers._promised, workers.threads) == (0, ())
    run(workers, task := Task())
    assert task.landed.wait(BOUND)
    assert not refused.began.is_set()


def test_work_waits_for_the_threads_there_are_when_no_more_can_be_started(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever becomes free does it; also when it was the chain of wake-ups that found no thread."""
    workers = make(8)
    run(workers, first := Task(held=True))
    assert first.began.wait(BOUND)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        tasks = [Task() for _ in range(5)]
        run(workers, *tasks)
        first.go.set()
        assert all(task.landed.wait(BOUND) for task in tasks)
    assert {task.worker for task in tasks} == {first.worker}


# --- names and clocks ---


def test_a_thread_is_named_after_what_it_does(make: Make) -> None:
    workers = make()
    run(workers, task := Task())
    assert task.landed.wait(BOUND)
    parked(workers)
    (worker,) = workers.threads
    assert (task.name, worker.name, worker.idle) == ("penstock-mine_0", "penstock-idle_0", True)
    worker.name = "given by somebody else"
    assert worker.name == "penstock-idle_0"
    assert worker.daemon


def test_a_thread_tells_how_much_it_has_computed(make: Make) -> None:
    """By a clock that any thread may read, as long as the thread lives."""
    workers = make()
    run(workers, task := Task())
    assert task.landed.wait(BOUND)
    (worker,) = workers.threads
    assert worker.cpu_clock is not None
    used = clock.cpu_time(worker.cpu_clock)
    assert used is not None
    assert 0 < used < BOUND


# --- how many ---


@pytest.mark.parametrize(
    ("memory", "most"), [(1, 1), (1 << 20, 1), (8 << 20, 2), (2 << 30, 512), (1 << 50, 512), (None, 512)], ids=str
)
def test_the_cap_of_threads_follows_the_memory(monkeypatch: pytest.MonkeyPatch, memory: int | None, most: int) -> None:
    """A MiB each in a quarter of it; at least one and at most 512, also where nobody knows how much there is."""
    monkeypatch.setattr(MEMORY, "allowed", lambda: memory)
    assert most_threads() == most


def test_more_threads_than_there_may_be_are_refused() -> None:
    check_threads("threads", module.SHARED.most)
    with pytest.raises(UsageError, match=r"size=\d+: this process uses at most .* Write at most size="):
        check_threads("size", module.SHARED.most + 1)


def test_one_core_is_of_use_to_threads_that_share_a_lock_and_all_of_them_to_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "cores", lambda: 7)
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: True, raising=False)
    assert usable_cores() == 1
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
    assert usable_cores() == 7


def test_cores_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the interpreter says, else the scheduler, else the machine; one where nobody knows."""
    cases: list[tuple[dict[str, object], int]] = [
        ({"process_cpu_count": 5, "sched_getaffinity": {1}, "cpu_count": 9}, 5),
        ({"process_cpu_count": None}, 1),
        ({"sched_getaffinity": {1, 2, 3}, "cpu_count": 9}, 3),
        ({"cpu_count": 9}, 9),
        ({"cpu_count": None}, 1),
    ]
    for known, expected in cases:
        with monkeypatch.context() as patch:
            for name in ("process_cpu_count", "sched_getaffinity", "cpu_count"):
                patch.delattr(os, name, raising=False)
            for name, value in known.items():
                patch.setattr(os, name, lambda *_, value=value: value, raising=False)
            assert cores() == expected


# --- processes and many threads ---


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_the_child_of_a_fork_has_no_threads_and_can_make_calls() -> None:
    """Those of its parent, one idle and one busy, are not in it."""
    program = """
import asyncio, os, threading, warnings
from penstock import Executor
from penstock.threads.workers import SHARED
warnings.simplefilter("ignore", DeprecationWarning)  # of fork in a process with threads
busy, go = threading.Event(), threading.Event()
def hold():
    busy.set()
    go.wait(10)
async def calls():
    async with Executor(threads=2) as executor:
        return await asyncio.gather(*[executor.to_thread(pow, 2, n) for n in range(5)])
async def main():
    async with Executor(threads=2) as executor:
        held = asyncio.ensure_future(executor.to_thread(hold))
        await executor.to_thread(int)
        await asyncio.to_thread(busy.wait, 10)
        child = os.fork()
        if child == 0:
            try:
                asyncio._set_running_loop(None)
                assert SHARED.threads == ()
                assert asyncio.run(calls()) == [1, 2, 4, 8, 16]
                os._exit(7)
            finally:
                os._exit(1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        go.set()
        await held
        print(await executor.to_thread(pow, 2, 5))
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert (done.stdout, done.stderr) == ("7\n32\n", "")


def test_no_work_is_forgotten_when_several_loops_share_the_threads(make: Make) -> None:
    """Three loops in threads of their own, with more calls than threads, which come and go all the time."""
    workers = make(3, idle_timeout=0.001)
    count = 400
    errors: list[BaseException] = []

    async def calls(seed: int) -> None:
        chance = random.Random(seed)
        lanes = [Lane(f"lane {number}", 2, workers=workers) for number in range(2)]

        async def caller(number: int) -> int:
            if chance.random() < 0.1:
                await asyncio.sleep(chance.random() * 0.01)
            if chance.random() < 0.1:
                task = asyncio.create_task(chance.choice(lanes).call(time.sleep, 0.0005))
                await asyncio.sleep(0)
                task.cancel()
            return await chance.choice(lanes).call(abs, -number)

        async with asyncio.timeout(BOUND):
            assert await asyncio.gather(*[caller(number) for number in range(count)]) == list(range(count))
        for lane in lanes:
            lane.close()

    def on_a_loop(seed: int) -> None:
        try:
            asyncio.run(calls(seed))
        except BaseException as error:  # noqa: BLE001  # it belongs to the test
            errors.append(error)

    threads = [threading.Thread(target=on_a_loop, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * BOUND)
    assert errors == []
    deadline = time.monotonic() + BOUND
    while workers._promised and time.monotonic() < deadline:
        time.sleep(0.001)
    assert workers._promised == 0


# --- sets that belong to one executor ---


def test_threads_that_are_kept_do_not_end_when_they_are_idle(make: Make) -> None:
    """The others do, as ever; a dismissal ends all."""
    workers = make(3, idle_timeout=0.001, keep=2)
    tasks = [Task(held=True) for _ in range(3)]
    run(workers, *tasks)
    for task in tasks:
        assert task.began.wait(BOUND)
    for task in tasks:
        task.go.set()
    deadline = time.monotonic() + BOUND
    while len(workers.threads) > 2:
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    time.sleep(QUICK)  # many times as long as the others had
    assert len(workers.threads) == 2
    parked(workers)


def test_threads_are_named_by_the_prefix_of_their_set(make: Make) -> None:
    """Whatever they do, as those of the standard library's executors are."""
    workers = make(2, prefix="mine")
    tasks = [Task(held=True), Task(held=True)]
    run(workers, *tasks)
    for task in tasks:
        assert task.began.wait(BOUND)
    for task in tasks:
        task.go.set()
    assert sorted(task.name for task in tasks) == ["mine_0", "mine_1"]
    parked(workers)
    assert sorted(worker.name for worker in workers.threads) == ["mine_0", "mine_1"]


def test_each_thread_begins_by_what_the_set_was_given_for_that(make: Make) -> None:
    """Once, in the thread itself, before it takes work."""
    started = list[threading.Thread]()

    def on_start() -> bool:
        started.append(threading.current_thread())
        return True

    workers = make(2, on_start=on_start)
    for _ in range(3):
        tasks = [Task(held=True), Task(held=True)]
        run(workers, *tasks)
        for task in tasks:
            assert task.began.wait(BOUND)
            assert task.worker in started
            task.go.set()
        for task in tasks:
            assert task.landed.wait(BOUND)
    assert len(started) == len(set(started)) == 2


def test_a_set_does_without_a_thread_that_cannot_begin(make: Make) -> None:
    """The next work has another one started, which does what waits as well."""
    oks, ended = iter([False, True, True]), threading.Event()
    workers = make(2, on_start=lambda: next(oks), on_exit=ended.set)
    run(workers, first := Task())
    assert ended.wait(BOUND)
    run(workers, second := Task())
    assert first.landed.wait(BOUND)
    assert second.landed.wait(BOUND)


def test_a_thread_that_takes_its_time_to_begin_keeps_no_other_from_it(make: Make) -> None:
    """Both are under way at once: they meet."""
    meeting = threading.Barrier(2, timeout=BOUND)

    def on_start() -> bool:
        meeting.wait()
        return True

    workers = make(2, on_start=on_start)
    tasks = [Task(held=True), Task(held=True)]
    run(workers, *tasks)
    for task in tasks:
        assert task.began.wait(BOUND)
        task.go.set()


@pytest.mark.parametrize("spare", [0, 2])
def test_a_set_has_as_many_spare_threads_as_it_is_given(make: Make, spare: int) -> None:
    """For calls that a thread waits for; those of `SHARED` have a number of their own."""
    workers = make(1, spare=spare)
    assert [workers.take_nowait(spare=True) for _ in range(spare + 2)] == [True] * (spare + 1) + [False]
    assert not workers.all_wait
    for _ in range(spare + 1):
        workers.begin_to_wait()
    assert workers.all_wait
    for _ in range(spare + 1):
        workers.go_on()
        workers.give_back()


def test_an_interrupt_while_a_thread_starts_takes_nothing_back(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C comes when the thread is under way: it does the work, and others after that."""
    workers, first, second = make(2), Task(), Task()
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    assert workers.take_nowait()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            workers.run(first)
    assert first.landed.wait(BOUND)
    run(workers, second)
    assert second.landed.wait(BOUND)


def test_an_interrupt_before_work_is_taken_leaves_none_behind(make: Make) -> None:
    class Interrupted(deque[Work]):
        def append(self, work: Work) -> None:
            raise KeyboardInterrupt

    workers, task = make(1), Task()
    assert workers.take_nowait()
    backlog, workers._backlog = workers._backlog, Interrupted()
    with pytest.raises(KeyboardInterrupt):
        workers.run(task)
    workers._backlog = backlog
    assert not workers.has(task)
    workers.run(task)
    assert task.landed.wait(BOUND)


def test_a_thread_that_takes_its_time_to_begin_summons_nobody_where_nothing_waits(make: Make) -> None:
    """There may be nothing left in the backlog by then: it only counts as under way no more."""
    workers = make(1)
    workers._waking = 1
    workers._others_may_start()
    assert workers._waking == 0
    assert workers.threads == ()
