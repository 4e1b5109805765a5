"""Threads that stand in for one that waits: nested calls never wait for ever, and the limit means what it says."""

import asyncio
import concurrent.futures
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextvars import ContextVar
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import ClosedError, DeadlockError
from penstock.context import RunningJob
from penstock.threads.call import Call, SubmittedCall, asking_call, context_of_caller
from penstock.threads.future import WatchedFuture
from penstock.threads.lane import Lane
from penstock.threads.portal import Portal
from penstock.threads.workers import Worker, Workers

BOUND = 10.0
"""Seconds after which a thread of a failed test lets go."""

Make = Callable[..., Lane]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes lanes with threads of their own, whose loop is closed; looks that nobody counts as waiting in the end."""
    made = list[Lane]()

    def make_one(limit: int | None = 1, most: int = 64, **options: Any) -> Lane:
        async def on_a_loop() -> Lane:
            return Lane("test", limit, workers=Workers(most, **options))

        made.append(asyncio.run(on_a_loop()))
        return made[-1]

    yield make_one
    for lane in made:
        lane.close()
        at_rest(lane)
        lane._workers.dismiss()
        for worker in lane._workers.threads:
            worker.join(BOUND)


def at_rest(lane: Lane) -> None:
    """All threads have left the lane, and the books balance."""
    settled = threading.Event()
    lane.when_idle(settled.set)
    assert settled.wait(BOUND)
    workers = lane._workers
    while workers._promised and any(worker.is_alive() for worker in workers.threads):
        gc.collect(0)  # takes time, and lets others have theirs
    assert (lane._runners, lane._standing, dict(lane._queue), lane._wanted) == (0, 0, {}, {})


class Job(WatchedFuture[Any]):
    """The future of something that needs no thread."""

    @property
    def subject(self) -> str:
        return "a job"


def depth_of(lane: Lane, depth: int) -> int:
    return 0 if depth == 0 else 1 + lane.submit(depth_of, lane, depth - 1).result(BOUND)


# --- progress ---


async def test_a_lane_that_stands_still_gives_the_oldest_call_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its threads wait for futures, in ways that nobody can see for calls behind them: one each time it is looked."""
    monkeypatch.setattr("penstock.threads.lane.STANDSTILL", 0.01)
    workers = Workers(4)
    lane, first, second, begun = Lane("test", 1, workers=workers), Job(), Job(), threading.Event()

    def outer() -> object:
        begun.set()
        return first.result(BOUND)

    waiting = lane.submit(outer)
    assert await asyncio.to_thread(begun.wait, BOUND)
    while not lane._standing:
        await asyncio.sleep(0)
    lane._last_resort(-1)  # something has begun since it was looked: it stands still for no longer than that
    assert not lane._wanted

    def behind() -> None:
        first.set_result(second.result(BOUND))

    await asyncio.to_thread(lane.submit, behind)  # which has to wait as well
    await asyncio.to_thread(lane.submit, second.set_result, "value")
    lane._last_resort(-1)
    assert not lane._wanted
    assert await asyncio.wrap_future(waiting) == "value"
    workers.dismiss()
    for worker in workers.threads:
        await asyncio.to_thread(worker.join, BOUND)


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_nested_calls_make_progress_at_any_depth(make: Make, limit: int) -> None:
    lane = make(limit)
    assert lane.submit(depth_of, lane, 30).result(BOUND) == 30


def test_several_chains_share_the_threads_that_stand_in(make: Make) -> None:
    lane = make(2)
    futures = [lane.submit(depth_of, lane, 5) for _ in range(20)]
    assert [future.result(BOUND) for future in futures] == [5] * 20


def test_what_it_waits_for_need_not_be_its_own(make: Make) -> None:
    """A call that was submitted by others is wanted from the moment on at which a thread of the lane waits for it."""
    lane, box = make(1), Future[Future[int]]()
    waiting = lane.submit(lambda: box.result(BOUND).result(BOUND))
    box.set_result(lane.submit(pow, 2, 5))
    assert waiting.result(BOUND) == 32


def test_the_latest_is_run_first(make: Make) -> None:
    """What was asked for last is needed first, as on a stack."""
    lane, order = make(1), list[int]()

    def outer() -> None:
        job = Job()
        lane.submit(job.set_result, None)
        for number in range(4):
            lane.submit(order.append, number)
        job.result(BOUND)

    lane.submit(outer).result(BOUND)
    at_rest(lane)
    assert order == [3, 2, 1, 0]


def test_what_is_waited_for_right_now_is_run_before_the_latest(make: Make) -> None:
    lane, order = make(1), list[int]()

    def outer() -> list[int]:
        futures = [lane.submit(order.append, number) for number in range(4)]
        futures[1].result(BOUND)
        seen = order[:1]
        concurrent.futures.wait(futures, BOUND)
        return seen

    assert lane.submit(outer).result(BOUND) == [1]
    assert sorted(order) == [0, 1, 2, 3]


def test_fresh_calls_are_not_run_by_a_thread_that_stands_in(make: Make) -> None:
    """They wait for a thread that is free: or one that waits would begin ever more of them."""
    lane, order, begun, go = make(1), list[str](), threading.Event(), threading.Event()

    def outer() -> None:
        begun.set()
        assert go.wait(BOUND)
        lane.submit(order.append, "nested").result(BOUND)
        order.append("outer")

    first = lane.submit(outer)
    assert begun.wait(BOUND)
    fresh = [lane.submit(order.append, f"fresh {number}") for number in range(3)]
    go.set()
    for future in [first, *fresh]:
        future.result(BOUND)
    assert order == ["nested", "outer", "fresh 0", "fresh 1", "fresh 2"]


def test_a_thread_that_stood_in_leaves(make: Make) -> None:
    """Its permit has gone before the one it stood in for goes on."""
    lane = make(1)

    def outer() -> list[int]:
        seen = list[int]()
        for _ in range(3):
            lane.submit(int).result(BOUND)
            seen.append(lane._runners)
        return seen

    assert lane.submit(outer).result(BOUND) == [1, 1, 1]


def test_a_lane_of_its_limit_goes_on_with_its_queue_meanwhile(make: Make) -> None:
    """Standing in is for what is wanted; another thread of the limit takes fresh calls as ever."""
    lane, gate, begun = make(3), threading.Event(), threading.Event()

    def outer() -> bool:
        def nested() -> bool:
            begun.set()
            return gate.wait(BOUND)

        return lane.submit(nested).result(BOUND)

    first = lane.submit(outer)
    assert begun.wait(BOUND)
    assert [lane.submit(pow, 2, n).result(BOUND) for n in range(5)] == [1, 2, 4, 8, 16]
    gate.set()
    assert first.result(BOUND)


def test_a_time_out_ends_the_wait_while_somebody_stands_in(make: Make) -> None:
    """The nested call goes on in its thread, and the lane is as it was when that has ended."""
    lane, begun, go = make(1), threading.Event(), threading.Event()

    def nested() -> str:
        begun.set()
        assert go.wait(BOUND)
        return "late"

    def outer() -> Future[str]:
        future = lane.submit(nested)
        while not begun.is_set():
            with pytest.raises(TimeoutError):
                future.result(0.01)
        assert lane._standing == 0
        return future

    future = lane.submit(outer).result(BOUND)
    assert not future.done()
    go.set()
    assert future.result(BOUND) == "late"
    assert lane.submit(int).result(BOUND) == 0


def test_a_nested_call_that_is_cancelled_is_passed_over(make: Make) -> None:
    lane = make(1)

    def outer() -> tuple[bool, int, bool]:
        first, second = lane.submit(pow, 2, 5), lane.submit(pow, 2, 6)
        cancelled = second.cancel()
        return cancelled, first.result(BOUND), second.cancelled()

    assert lane.submit(outer).result(BOUND) == (True, 32, True)
    lane.submit(int).result(BOUND)
    assert lane.statistics().never_started == 1


def test_cancelled_nested_calls_alone_give_a_thread_nothing_to_do(make: Make) -> None:
    """It has been summoned for them, and leaves."""
    lane = make(1)

    def outer() -> bool:
        futures = [lane.submit(int) for _ in range(3)]
        for future in futures:
            future.cancel()
        waiting: Future[int] = Future()
        with pytest.raises(TimeoutError):
            lane.submit(lambda: waiting.result(0.05)).result(BOUND)
        return all(future.cancelled() for future in futures)

    assert lane.submit(outer).result(BOUND)


def test_a_thread_that_waits_while_none_can_be_started_waits_for_those_there_are(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread of the lane is busy: it comes to what is wanted when it is through."""
    lane, begun, go = make(2), threading.Event(), threading.Event()

    def hold() -> bool:
        begun.set()
        return go.wait(BOUND)

    starts = threading.Thread.start

    def refuse_workers(thread: threading.Thread) -> None:
        if isinstance(thread, Worker):
            raise RuntimeError("can't start new thread")
        starts(thread)

    def outer() -> int:
        nested, box = lane.submit(pow, 2, 5), threading.Timer(0.02, go.set)
        box.start()
        return nested.result(BOUND)

    holding = lane.submit(hold)
    assert begun.wait(BOUND)
    running, run = threading.Event(), threading.Event()

    def outer_when_told() -> int:
        running.set()
        assert run.wait(BOUND)
        return outer()

    future = lane.submit(outer_when_told)
    assert running.wait(BOUND)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse_workers)
        run.set()
        assert future.result(BOUND) == 32
    assert holding.result(BOUND)


# --- the end of threads ---


def test_when_all_wait_and_no_thread_is_left_the_chain_is_told(make: Make) -> None:
    """By an error in the thread that waits last, instead of a silence for ever. The lane goes on afterwards."""
    lane = make(1, most=1, spare=0)

    def outermost() -> int:
        return lane.submit(innermost).result(BOUND)

    def innermost() -> int:
        return 1

    with pytest.raises(DeadlockError) as caught:
        lane.submit(outermost).result(BOUND)
    message = str(caught.value)
    assert "no thread is left for" in message
    assert message.index("innermost in 'test'") < message.index("<- ") < message.index("outermost in 'test'")
    assert lane.submit(pow, 2, 5).result(BOUND) == 32


@pytest.mark.parametrize("spare", [0, 1, 2, 5])
def test_a_chain_may_be_as_deep_as_there_are_threads(make: Make, spare: int) -> None:
    lane = make(1, most=1, spare=spare)
    assert lane.submit(depth_of, lane, spare).result(BOUND) == spare
    with pytest.raises(DeadlockError):
        lane.submit(depth_of, lane, spare + 1).result(BOUND)
    assert lane.submit(depth_of, lane, spare).result(BOUND) == spare


def test_one_that_still_works_is_waited_for(make: Make) -> None:
    """No deadlock while any thread of the lane is at work: it comes to the nested call when it is through."""
    lane, begun, go = make(2, most=2, spare=0), threading.Event(), threading.Event()

    def hold() -> bool:
        begun.set()
        return go.wait(BOUND)

    def outer() -> int:
        timer = threading.Timer(0.02, go.set)
        timer.start()
        return lane.submit(pow, 2, 5).result(BOUND)

    holding = lane.submit(hold)
    assert begun.wait(BOUND)
    assert lane.submit(outer).result(BOUND) == 32
    assert holding.result(BOUND)


def test_a_lane_that_is_closed_ends_what_waits_and_what_is_stood_in_for(make: Make) -> None:
    """What runs is finished; nested calls that have no thread yet are refused, and who waits for them is told."""
    lane, begun, go = make(1), threading.Event(), threading.Event()

    def nested() -> bool:
        begun.set()
        return go.wait(BOUND)

    def outer() -> tuple[bool, str]:
        refused, running = lane.submit(int), lane.submit(nested)
        first = running.result(BOUND)
        return first, type(refused.exception(BOUND)).__name__

    future, fresh = lane.submit(outer), lane.submit(int)
    assert begun.wait(BOUND)
    lane.shutdown()
    with pytest.raises(ClosedError):
        fresh.result(BOUND)
    go.set()
    assert future.result(BOUND) == (True, "ClosedError")


def test_cancel_waiting_cancels_what_has_no_thread_and_nothing_else(make: Make) -> None:
    lane, begun, go = make(1), threading.Event(), threading.Event()

    def hold() -> bool:
        begun.set()
        return go.wait(BOUND)

    running = lane.submit(hold)
    assert begun.wait(BOUND)
    waiting = [lane.submit(int) for _ in range(3)]
    lane.cancel_waiting()
    assert [future.cancelled() for future in waiting] == [True] * 3
    go.set()
    assert running.result(BOUND)
    assert lane.submit(pow, 2, 5).result(BOUND) == 32


def test_calls_of_an_initializer_that_fails_in_the_middle_are_refused_by_who_says_so(make: Make) -> None:
    """The second thread, which was to stand in, never comes: `refuse_by` ends what waits for it."""
    oks = iter([True, False])

    def on_start() -> bool:
        if next(oks):
            return True
        lane.refuse_by(lambda _call: ValueError("no more threads"))
        return False

    lane = make(1, most=2, on_start=on_start)
    with pytest.raises(ValueError, match="no more threads"):
        lane.submit(lambda: lane.submit(int).result(BOUND)).result(BOUND)
    with pytest.raises(ValueError, match="no more threads"):
        lane.submit(int).result(BOUND)


def test_each_is_told_when_nothing_waits_or_runs(make: Make) -> None:
    lane, idle, go = make(2), threading.Event(), threading.Event()
    futures = [lane.submit(go.wait, BOUND) for _ in range(4)]
    lane.when_idle(idle.set)
    assert not idle.is_set()
    go.set()
    for future in futures:
        assert future.result(BOUND)
    assert idle.wait(BOUND)
    idle.clear()
    lane.submit(int).result(BOUND)
    assert idle.wait(BOUND), "each time"


# --- measured lanes, and threads beside those that wait for the loop ---


async def test_a_measured_lane_is_watched_when_another_thread_submits() -> None:
    """Its timer rests while there is nothing to decide; what waits in the queue starts it again, on the loop."""
    lane, go = Lane("test", None), threading.Event()
    begun = threading.Semaphore(0)

    def hold() -> bool:
        begun.release()
        return go.wait(BOUND)

    def submit_all() -> list[Future[bool]]:
        return [lane.submit(hold) for _ in range(lane.limit + 2)]

    before = lane.limit
    futures = await asyncio.to_thread(submit_all)
    for _ in range(before + 1):  # one more than it had at first: it has grown by what it measured
        assert await asyncio.to_thread(begun.acquire, timeout=BOUND)
    go.set()
    for future in futures:
        assert await asyncio.wrap_future(future)
    assert lane.limit > before
    lane.close()


async def test_a_thread_that_waits_for_a_future_makes_others_look_at_those_that_wait_for_the_loop() -> None:
    """What a thread that waits for the loop runs itself by then is passed over by the one that is summoned for it."""
    lane, portal, job = Lane("test", 2, workers=(workers := Workers(8))), Portal(), Job()
    holding, begin, go = threading.Event(), threading.Event(), threading.Event()
    begun, looked = asyncio.Event(), asyncio.Event()
    loop, look = asyncio.get_running_loop(), lane._look_at_nested

    def look_and_tell() -> None:
        look()
        if lane._standing:
            looked.set()

    lane._look_at_nested = look_and_tell  # type: ignore[method-assign]

    def hold() -> int:
        holding.set()
        assert begin.wait(BOUND)
        value: int = job.result(BOUND)
        return value

    def nested() -> bool:
        loop.call_soon_threadsafe(begun.set)
        return go.wait(BOUND)

    async def on_the_loop() -> bool:
        return await lane.call(nested)

    holder = await asyncio.to_thread(lane.submit, hold)
    assert await asyncio.to_thread(holding.wait, BOUND)
    asking = asyncio.create_task(lane.call(portal.call, on_the_loop, (), {}))
    async with asyncio.timeout(BOUND):
        await begun.wait()
        begin.set()
        await looked.wait()
        go.set()
        assert await asking
        job.set_result(7)
        assert await asyncio.wrap_future(holder) == 7
    lane.close()
    portal.close()
    workers.dismiss()


def test_several_threads_may_wait_for_one_call(make: Make) -> None:
    """Each counts as waiting until the call has ended, or until it gives up."""
    lane, go, waiting = make(3), threading.Event(), threading.Barrier(3, timeout=BOUND)

    def give_up(future: Future[bool]) -> str:
        waiting.wait()
        try:
            future.result(0.01)
        except TimeoutError:
            go.set()
        return "gave up"

    def stay(future: Future[bool]) -> bool:
        waiting.wait()
        return future.result(BOUND)

    slow = lane.submit(go.wait, BOUND)
    others = lane.submit(give_up, slow), lane.submit(stay, slow)
    waiting.wait()
    assert [other.result(BOUND) for other in others] == ["gave up", True]
    assert (lane._standing, lane._waited) == (0, {})


def test_what_a_job_has_asked_for_is_wanted_when_a_thread_waits_for_a_job(make: Make) -> None:
    """It was queued before that, when no thread waited: it must not stay behind the one that does."""

    def needed() -> None:
        future.set_result("value")

    lane, future = make(1), Job()
    begun, go = threading.Event(), threading.Event()

    def outer() -> object:
        begun.set()
        assert go.wait(BOUND)
        return future.result(BOUND)

    waiting = lane.submit(outer)
    assert begun.wait(BOUND)
    call = lane.submit(needed)
    assert isinstance(call, SubmittedCall)
    call.job = RunningJob()
    go.set()
    assert waiting.result(BOUND) == "value"


@pytest.mark.may_leave("errors")  # what is logged, as in the standard library
def test_a_callback_that_would_end_the_thread_is_logged(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """The thread goes on, and the lane has all its permits."""

    def callback(_future: Future[Any]) -> None:
        raise SystemExit

    lane, go = make(1), threading.Event()
    future = lane.submit(go.wait, BOUND)
    future.add_done_callback(callback)
    go.set()
    assert future.result(BOUND)
    assert lane.submit(pow, 2, 5).result(BOUND) == 32
    assert "Exception in worker" in caplog.text


# --- what is left of a call that is over ---


class Mine:
    """Something of the user's."""


variable: ContextVar[Mine | None] = ContextVar("variable", default=None)


def test_a_submitted_call_that_is_over_holds_nothing_of_the_users(make: Make) -> None:
    """Function, arguments and context; its value only as the future's. Its holder may keep the future for long."""
    lane = make(1)

    def submit() -> tuple[Future[Any], list["weakref.ref[Any]"]]:
        class Function:
            def __call__(self, *args: Mine, **kwargs: Mine) -> Mine:
                return Mine()

        fn, argument, keyword, in_context = Function(), Mine(), Mine(), Mine()
        variable.set(in_context)
        future = lane.submit(fn, argument, keyword=keyword)
        variable.set(None)
        return future, [weakref.ref(each) for each in (fn, argument, keyword, in_context)]

    future, references = submit()
    lane.submit(int).result(BOUND)
    gc.collect()
    assert [reference() for reference in references] == [None] * 4
    assert isinstance(future.result(BOUND), Mine)
    assert isinstance(future, SubmittedCall)
    assert future.value is None
    value = weakref.ref(future.result())
    del future
    lane.submit(int).result(BOUND)
    gc.collect()
    assert value() is None


def test_a_nested_call_that_is_over_holds_only_who_asked_for_it_and_still_runs(make: Make) -> None:
    lane = make(1)

    def outer() -> bool:
        call = lane.submit(int)
        call.result(BOUND)
        assert isinstance(call, SubmittedCall)
        worker = threading.current_thread()
        assert isinstance(worker, Worker)
        return call.context.get(asking_call) is worker.call and call.context.get(variable) is None

    variable.set(Mine())
    assert lane.submit(outer).result(BOUND)
    variable.set(None)


def test_a_chain_in_which_each_submits_the_next_does_not_grow(make: Make) -> None:
    """Each is asked for by the one before it, which is over by then: of a long chain the last few are alive."""
    lane, alive, most, done = make(1), weakref.WeakSet[Call](), list[int](), threading.Event()

    def link(left: int) -> None:
        if left == 0:
            done.set()
            return
        if left % 100 == 0:
            gc.collect()
            most.append(len(alive))
        following = lane.submit(link, left - 1)
        assert isinstance(following, SubmittedCall)
        alive.add(following)

    lane.submit(link, 600)
    assert done.wait(BOUND)
    assert len(most) == 6
    assert max(most) <= 3


def test_what_a_call_does_is_done_for_that_call_and_not_for_the_one_around_it(make: Make) -> None:
    """Who asks is known in a copy of the context that is made for what is submitted."""
    lane = make(1)

    def outer() -> tuple[bool, bool]:
        worker = threading.current_thread()
        assert isinstance(worker, Worker)
        known = context_of_caller()
        again = known.run(context_of_caller)
        return known.get(asking_call) is worker.call, again.get(asking_call) is worker.call

    assert lane.submit(outer).result(BOUND) == (True, True)
    assert context_of_caller().get(asking_call) is None


# --- whatever is submitted ---


class AtWork:
    """Counts the functions that run and do not wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now = self.most = self.calls = 0

    def add(self, change: int) -> None:
        with self._lock:
            self._now += change
            self.most = max(self.most, self._now)
            self.calls += change > 0

    def __enter__(self) -> None:
        self.add(1)

    def __exit__(self, *_: object) -> None:
        self.add(-1)


# Calls: what each of them submits.
trees: st.SearchStrategy[Any] = st.recursive(st.just([]), lambda below: st.lists(below, max_size=3), max_leaves=8)
waits = st.sampled_from(["result", "exception", "wait", "as_completed"])


def wait_for(how: str, futures: list[Future[int]]) -> int:
    if how == "wait":
        assert not concurrent.futures.wait(futures, BOUND).not_done
    elif how == "as_completed":
        assert len(list(concurrent.futures.as_completed(futures, BOUND))) == len(futures)
    elif how == "exception":
        assert [future.exception(BOUND) for future in futures] == [None] * len(futures)
    return sum(future.result(BOUND) for future in futures)


def size(tree: Any) -> int:
    return 1 + sum(size(child) for child in tree)


def run_all(limit: int, program: list[Any], node: Callable[[Lane, Any], int]) -> None:
    """All of these trees, from several threads' point of view fresh calls; every one ends with its size."""

    async def on_a_loop() -> Lane:
        return Checked("test", limit, workers=workers)

    workers = Workers(64)
    lane = asyncio.run(on_a_loop())
    futures = [lane.submit(node, lane, tree) for tree in program]
    assert [future.result(BOUND) for future in futures] == [size(tree) for tree in program]
    at_rest(lane)
    lane.close()
    workers.dismiss()
    for worker in workers.threads:
        worker.join(BOUND)
    assert workers._promised == 0


class Checked(Lane):
    """A lane that looks at its own promise whenever a thread takes a call."""

    def _take(self, *, after_call: bool = False) -> Call | None:
        call = super()._take(after_call=after_call)
        assert self._runners <= self.limit + self._standing or call is None
        return call


@given(program=st.lists(trees, min_size=1, max_size=4), limit=st.integers(1, 3), how=waits)
def test_never_more_are_at_work_than_the_limit_where_each_waits_for_one_at_a_time(
    program: list[Any], limit: int, how: str
) -> None:
    """Functions that really run, without those that wait for what they have submitted."""
    at_work = AtWork()

    def node(lane: Lane, tree: Any) -> int:
        with at_work:
            total = 1
            for child in tree:
                future = lane.submit(node, lane, child)
                at_work.add(-1)
                try:
                    total += wait_for(how, [future])
                finally:
                    at_work.add(1)
            return total

    run_all(limit, program, node)
    assert at_work.most <= limit


@given(program=st.lists(trees, min_size=1, max_size=3), limit=st.integers(1, 3), how=waits)
def test_never_more_threads_take_calls_than_the_limit_and_those_that_wait(
    program: list[Any], limit: int, how: str
) -> None:
    """Also where each submits all its calls first; `Checked` looks at it. All end, with nobody left."""

    def node(lane: Lane, tree: Any) -> int:
        return 1 + wait_for(how, [lane.submit(node, lane, child) for child in tree])

    run_all(limit, program, node)


def test_a_callback_that_comes_while_a_call_ends_finds_it_done(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Added between the end of the function and that of the future: both are told, whatever the thread does between."""
    lane, called = make(1), threading.Event()
    take = lane._take

    def take_late(*, after_call: bool = False) -> Call | None:
        if after_call:
            future.add_done_callback(lambda _future: called.set())
        return take(after_call=after_call)

    monkeypatch.setattr(lane, "_take", take_late)
    go = threading.Event()
    future = lane.submit(go.wait, BOUND)
    go.set()
    assert called.wait(BOUND)
    assert future.result(BOUND) is True
