"""The queue of one key: limit, order, pauses, and no permit lost, whatever is cancelled when."""

import asyncio
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock.permits import PermitQueue, Weight, take_first
from penstock.testing import VirtualClockLoop, cancel_at_every_step


class QueueAndModel(RuleBasedStateMachine):
    """A queue beside a model of lists, both told the same.

    Callers join one at a time; releases, cancellations and pauses happen between two iterations of the loop, in any
    number and order, so that a waiter is also cancelled in the very tick in which it is admitted.
    """

    @initialize(limit=st.integers(1, 3))
    def start(self, limit: int) -> None:
        self.loop = VirtualClockLoop()
        self.queue = PermitQueue(self.loop, limit)
        self.tasks: list[asyncio.Task[None]] = []
        self.admitted: list[int] = []
        # The model.
        self.due: list[int] = []
        self.fresh: list[int] = []
        self.granted: list[int] = []
        self.cancelled: set[int] = set()
        self.to_hand_on = 0
        self.in_flight = 0
        self.pause_ends: float | None = None

    def model_admits(self) -> None:
        while self.in_flight < self.queue.limit and self.pause_ends is None and (self.due or self.fresh):
            first = (self.due or self.fresh).pop(0)
            if first not in self.cancelled:
                self.granted.append(first)
                self.in_flight += 1

    def settle(self, seconds: float = 0.0) -> None:
        self.loop.run_until_complete(asyncio.sleep(seconds))
        if self.pause_ends is not None and self.loop.time() >= self.pause_ends:
            self.pause_ends = None
            self.model_admits()
        while self.to_hand_on:
            self.to_hand_on -= 1
            self.in_flight -= 1
            self.model_admits()
        for _ in range(5):
            self.loop.run_until_complete(asyncio.sleep(0))
        self.due = [number for number in self.due if number not in self.cancelled]
        self.fresh = [number for number in self.fresh if number not in self.cancelled]

    @rule(again=st.booleans())
    def join(self, again: bool) -> None:
        self.settle()
        number = len(self.tasks)

        async def caller() -> None:
            await self.queue.take(again=again)
            self.admitted.append(number)

        self.tasks.append(self.loop.create_task(caller()))
        (self.due if again else self.fresh).append(number)
        self.model_admits()
        self.settle()

    @rule()
    def take_if_free(self) -> None:
        self.settle()
        nobody_before = not self.due and not self.fresh and self.pause_ends is None
        taken = self.queue.take_nowait()
        assert taken == (nobody_before and self.in_flight < self.queue.limit)
        self.in_flight += taken

    @precondition(lambda self: self.in_flight > self.to_hand_on)
    @rule()
    def give_back(self) -> None:
        self.queue.give_back()
        self.in_flight -= 1
        self.model_admits()

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        alive = [n for n, task in enumerate(self.tasks) if not task.done() and n not in self.cancelled]
        if alive:
            number = data.draw(st.sampled_from(alive))
            self.tasks[number].cancel()
            self.cancelled.add(number)
            if number in self.granted:
                self.granted.remove(number)
                self.to_hand_on += 1

    @rule(seconds=st.sampled_from([0.0, 1.0, 2.0]))
    def pause(self, seconds: float) -> None:
        self.queue.pause(seconds)
        if seconds:
            self.pause_ends = max(self.pause_ends or 0.0, self.loop.time() + seconds)

    @rule(seconds=st.sampled_from([0.0, 0.5, 1.0, 2.0]))
    def time_passes(self, seconds: float) -> None:
        self.settle(seconds)
        assert self.admitted == self.granted
        assert self.queue.waiting == len(self.due) + len(self.fresh)
        nothing_going_on = not (self.in_flight or self.due or self.fresh or self.pause_ends)
        assert self.queue.idle == nothing_going_on
        assert self.queue.paused_for == (0 if self.pause_ends is None else self.pause_ends - self.loop.time())

    @invariant()
    def permits_add_up(self) -> None:
        assert self.queue.in_flight == self.in_flight <= self.queue.limit

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        self.settle()
        for task in self.tasks:
            task.cancel()
        self.settle()
        assert self.queue.waiting == 0, "a waiter that is gone leaves nothing behind"
        assert self.queue.in_flight == self.in_flight
        self.loop.close()


QueueAndModel.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestQueueAndModel = QueueAndModel.TestCase


@pytest.mark.virtual_clock
async def test_a_permit_granted_in_the_tick_of_a_cancel_is_handed_on() -> None:
    """The classic lost wake-up: granted, cancelled before it runs."""
    queue = PermitQueue(asyncio.get_running_loop(), 1)
    await queue.take()
    unlucky, next_in_line = asyncio.create_task(queue.take()), asyncio.create_task(queue.take())
    await asyncio.sleep(0)
    queue.give_back()
    unlucky.cancel()
    await next_in_line
    assert unlucky.cancelled()
    assert (queue.in_flight, queue.waiting) == (1, 0)


@pytest.mark.virtual_clock
async def test_a_waiter_cancelled_before_the_grant_is_passed_over_at_once() -> None:
    """Its task has not run yet to leave the queue, and the next in line must not wait for that."""
    queue = PermitQueue(asyncio.get_running_loop(), 1)
    await queue.take()
    unlucky, next_in_line = asyncio.create_task(queue.take()), asyncio.create_task(queue.take())
    await asyncio.sleep(0)
    unlucky.cancel()
    queue.give_back()
    await next_in_line
    assert (queue.in_flight, queue.waiting) == (1, 0)


@pytest.mark.virtual_clock
async def test_a_cancelled_waiter_leaves_a_paused_queue_at_once() -> None:
    """However long the pause lasts: a million given-up waiters must not pile up behind it."""
    queue = PermitQueue(asyncio.get_running_loop(), 1)
    queue.pause(3_600)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await queue.take()
    assert (queue.in_flight, queue.waiting) == (0, 0)


@pytest.mark.virtual_clock
async def test_a_pause_is_only_ever_lengthened() -> None:
    """The server's longest wish counts."""
    queue = PermitQueue(asyncio.get_running_loop(), 1)
    for duration in (5, 2, 7, -1):
        queue.pause(duration)
    started = queue.now()
    await queue.take()
    assert queue.now() - started == 7


def test_no_permit_is_lost_at_any_step() -> None:
    """Contention, a pause and a due retry, cancelled everywhere."""
    queues: list[PermitQueue] = []

    async def hold(queue: PermitQueue, again: bool) -> None:
        await queue.take(again=again)
        try:
            await asyncio.sleep(1)
        finally:
            queue.give_back()

    async def scenario() -> None:
        queue = PermitQueue(asyncio.get_running_loop(), 1)
        queues.append(queue)
        async with asyncio.TaskGroup() as group:
            for again in (False, False, True):
                group.create_task(hold(queue, again))
            queue.pause(0.5)

    assert cancel_at_every_step(scenario, check=lambda: queues[-1].in_flight == queues[-1].waiting == 0) >= 5


# --- what is needed besides a permit ---


class Threads:
    """A companion with a number of its own: threads, as the queue sees them."""

    def __init__(self, free: int) -> None:
        self.free = free
        self.wanting: list[Callable[[], None]] = []

    def take_nowait(self) -> bool:
        if not self.free:
            return False
        self.free -= 1
        return True

    def give_back(self) -> None:
        self.free += 1
        wanting, self.wanting = self.wanting, []
        for tell in wanting:
            tell()

    def when_free(self, tell: Callable[[], None]) -> None:
        if self.free:
            tell()
        else:
            self.wanting.append(tell)


def new_queue(limit: int = 1) -> PermitQueue:
    return PermitQueue(asyncio.get_running_loop(), limit)


async def settled() -> None:
    """All that is ready has run."""
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.virtual_clock
async def test_a_permit_and_what_it_needs_are_taken_in_one_step() -> None:
    """Without the companion no permit is taken, and without a permit no companion."""
    queue, threads = new_queue(), Threads(0)
    assert not queue.take_nowait(threads)
    assert queue.in_flight == 0
    threads.free = 2
    assert queue.take_nowait(threads)
    assert not queue.take_nowait(threads)
    assert (queue.in_flight, threads.free) == (1, 1)


@pytest.mark.virtual_clock
async def test_who_waits_for_its_companion_holds_no_permit_and_is_overtaken_by_nobody() -> None:
    """Neither by those behind it nor by a late comer that needs nothing."""
    queue, threads = new_queue(2), Threads(0)
    order: list[str] = []

    async def caller(name: str, needs: Threads | None) -> None:
        await queue.take(needs=needs)
        order.append(name)

    tasks = [asyncio.create_task(caller("first", threads)), asyncio.create_task(caller("second", None))]
    await settled()
    assert (queue.in_flight, queue.waiting, order) == (0, 2, [])
    assert not queue.take_nowait()
    threads.give_back()
    await asyncio.gather(*tasks)
    assert order == ["first", "second"]
    assert (queue.in_flight, threads.free) == (2, 0)


@pytest.mark.virtual_clock
@pytest.mark.parametrize("again", [False, True], ids=["fresh", "due"])
async def test_those_behind_go_on_when_the_one_that_waits_for_its_companion_leaves(again: bool) -> None:
    """They may need none."""
    queue, threads = new_queue(), Threads(0)
    first = asyncio.create_task(queue.take(again=again, needs=threads))
    await settled()
    second = asyncio.create_task(queue.take())
    await settled()
    assert not second.done()
    first.cancel()
    await second
    assert (queue.in_flight, queue.waiting) == (1, 0)


@pytest.mark.virtual_clock
async def test_many_who_give_up_behind_the_first_ask_for_the_companion_no_more_often() -> None:
    """Each wish is a call when a thread comes free: twenty thousand of them would hold it up."""
    queue, threads = new_queue(), Threads(0)
    tasks = [asyncio.create_task(queue.take(needs=threads)) for _ in range(100)]
    await settled()
    for task in tasks[1:]:
        task.cancel()
    await settled()
    assert len(threads.wanting) == 1
    threads.give_back()
    await tasks[0]
    assert (queue.in_flight, queue.waiting) == (1, 0)


@pytest.mark.virtual_clock
async def test_a_companion_that_was_taken_in_the_tick_of_a_cancel_is_handed_on() -> None:
    """With its permit."""
    queue, threads = new_queue(), Threads(0)
    unlucky = asyncio.create_task(queue.take(needs=threads))
    next_in_line = asyncio.create_task(queue.take(needs=threads))
    await settled()
    threads.free = 1
    queue.look_again()
    unlucky.cancel()
    await next_in_line
    assert unlucky.cancelled()
    assert (queue.in_flight, threads.free, queue.waiting) == (1, 0, 0)


@pytest.mark.virtual_clock
async def test_a_permit_that_comes_back_brings_its_companion_to_who_waits_for_one() -> None:
    """At once: nobody has to be told by the companion first."""
    queue, threads = new_queue(2), Threads(1)
    await queue.take(needs=threads)
    waiting = asyncio.create_task(queue.take(needs=threads))
    await settled()
    assert not waiting.done()
    threads.free += 1
    queue.give_back()
    await waiting
    assert (queue.in_flight, threads.free) == (1, 0)


@pytest.mark.virtual_clock
async def test_a_companion_may_say_in_another_thread_that_it_is_free() -> None:
    queue, threads = new_queue(), Threads(0)
    task = asyncio.create_task(queue.take(needs=threads))
    await settled()
    await asyncio.to_thread(threads.give_back)
    await task
    assert queue.in_flight == 1


def test_a_companion_that_comes_free_when_the_loop_is_closed_tells_nobody() -> None:
    """No error in the thread that says so."""
    threads = Threads(0)

    async def impatient() -> None:
        queue = new_queue()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await queue.take(needs=threads)

    asyncio.run(impatient())
    assert len(threads.wanting) == 1
    threads.give_back()


# --- several queues ---


@pytest.mark.virtual_clock
@pytest.mark.parametrize("which", [0, 1])
async def test_who_waits_in_two_queues_takes_the_first_permit_and_leaves_the_other_line(which: int) -> None:
    queues = [new_queue(), new_queue()]
    for queue in queues:
        await queue.take()
    waiter = asyncio.create_task(take_first(asyncio.get_running_loop(), *queues))
    await settled()
    assert [queue.waiting for queue in queues] == [1, 1]
    queues[which].give_back()
    assert await waiter is queues[which]
    assert [queue.waiting for queue in queues] == [0, 0]
    assert [queue.in_flight for queue in queues] == [1, 1]


@pytest.mark.virtual_clock
@pytest.mark.parametrize("free", [[0], [1], [0, 1]])
async def test_a_permit_that_is_free_is_taken_at_once_from_the_first_such_queue(free: list[int]) -> None:
    """Never two of them."""
    queues = [new_queue(), new_queue()]
    for number, queue in enumerate(queues):
        if number not in free:
            await queue.take()
    assert await take_first(asyncio.get_running_loop(), *queues) is queues[free[0]]
    assert sum(queue.in_flight for queue in queues) == (2 if len(free) == 1 else 1)


@pytest.mark.virtual_clock
@pytest.mark.parametrize("which", [0, 1])
async def test_a_cancelled_waiter_gives_back_what_it_got_from_either_queue(which: int) -> None:
    """The companion belongs to the first queue only."""
    queues, threads = [new_queue(), new_queue()], Threads(1)
    for queue in queues:
        await queue.take()
    waiter = asyncio.create_task(take_first(asyncio.get_running_loop(), *queues, needs=threads))
    await settled()
    queues[which].give_back()
    assert threads.free == (0 if which == 0 else 1)
    waiter.cancel()
    await asyncio.wait([waiter])
    assert waiter.cancelled()
    assert [queue.in_flight for queue in queues] == [which != 0, which != 1]
    assert [queue.waiting for queue in queues] == [0, 0]
    assert threads.free == 1


@pytest.mark.virtual_clock
async def test_who_joins_is_first_in_line_and_may_leave_at_any_time() -> None:
    """Leaving a line that one is not in is fine."""
    queue = new_queue()
    loop = asyncio.get_running_loop()
    await queue.take()
    fresh: asyncio.Future[PermitQueue] = loop.create_future()
    due: asyncio.Future[PermitQueue] = loop.create_future()
    queue.join(fresh)
    assert queue.first is fresh
    queue.join(due, again=True)
    assert queue.first is due
    for _ in range(2):
        queue.leave(due)
    queue.give_back()
    assert fresh.result() is queue
    assert queue.first is None
    assert queue.in_flight == 1


# --- number, pauses, end ---


@pytest.mark.virtual_clock
async def test_a_greater_limit_admits_at_once_and_a_smaller_one_takes_permits_back() -> None:
    queue = new_queue(1)
    tasks = [asyncio.create_task(queue.take()) for _ in range(6)]
    await settled()
    queue.resize(4)
    await settled()
    assert (queue.in_flight, queue.waiting) == (4, 2)
    queue.resize(2)
    for left in (3, 2):
        queue.give_back()
        await settled()
        assert (queue.in_flight, queue.waiting) == (left, 2)
    for waiting in (1, 0):
        queue.give_back()
        await settled()
        assert (queue.in_flight, queue.waiting) == (2, waiting)
    await asyncio.gather(*tasks)


@pytest.mark.virtual_clock
async def test_a_queue_that_is_held_back_admits_nobody_until_it_goes_on() -> None:
    """Whatever else changes meanwhile; saying it twice is fine."""
    queue = new_queue(1)
    for _ in range(2):
        queue.hold_back("processing", True)
    task = asyncio.create_task(queue.take())
    await settled()
    queue.resize(3)
    queue.pause(1)
    await asyncio.sleep(2)
    assert not queue.take_nowait()
    assert (queue.in_flight, queue.waiting) == (0, 1)
    for _ in range(2):
        queue.hold_back("processing", False)
    await task
    assert queue.in_flight == 1


@pytest.mark.virtual_clock
async def test_a_pause_outlasts_the_end_of_holding_back() -> None:
    queue = new_queue(1)
    queue.hold_back("processing", True)
    queue.pause(5)
    started = queue.now()
    queue.hold_back("processing", False)
    await queue.take()
    assert queue.now() - started == 5


@pytest.mark.virtual_clock
async def test_clearing_names_who_waits_the_due_ones_first() -> None:
    """The queue is of use afterwards, also when the first of them waited for its companion."""
    queue, threads = new_queue(1), Threads(0)
    loop = asyncio.get_running_loop()
    waiters: list[asyncio.Future[PermitQueue]] = [loop.create_future() for _ in range(3)]
    queue.join(waiters[1], needs=threads)
    queue.join(waiters[2])
    queue.join(waiters[0], again=True, needs=threads)
    assert queue.clear() == waiters
    assert queue.clear() == []
    assert queue.waiting == 0
    assert queue.take_nowait()
    assert not any(waiter.done() for waiter in waiters)


@pytest.mark.virtual_clock
async def test_a_queue_is_held_back_until_all_who_said_so_have_taken_it_back() -> None:
    """Each for a reason of its own, the first of which is shown."""
    queue = new_queue()
    queue.hold_back("breaker", True)
    queue.hold_back("processing", True)
    assert (queue.held_back("breaker"), queue.held_back("memory")) == (True, False)
    task = asyncio.create_task(queue.take())
    await settled()
    assert queue.waits_for == "breaker"
    queue.hold_back("breaker", False)
    assert queue.waits_for == "processing"
    assert not task.done()
    queue.hold_back("processing", False)
    await task
    assert queue.waits_for is None


@pytest.mark.virtual_clock
async def test_it_tells_what_the_first_in_line_waits_for() -> None:
    """A pause before all else; nothing while nobody waits, though nobody could go."""
    queue, threads = new_queue(), Threads(0)
    queue.pause(1)
    assert queue.waits_for is None
    tasks = [asyncio.create_task(queue.take(needs=threads)), asyncio.create_task(queue.take())]
    await settled()
    queue.hold_back("breaker", True)
    assert queue.waits_for == "pause"
    await asyncio.sleep(1)
    assert queue.waits_for == "breaker"
    queue.hold_back("breaker", False)
    assert queue.waits_for == "thread"
    threads.give_back()
    await settled()
    assert queue.waits_for == "permit"
    queue.give_back()
    await asyncio.gather(*tasks)
    assert queue.waits_for is None


# --- rates ---


class Bucket:
    """A meter of tokens, of which there is one a second; a weight is that many of them."""

    def __init__(self, tokens: float = 0.0) -> None:
        self.active = True
        self.full_at = asyncio.get_running_loop().time() - tokens
        self.taken: list[float] = []

    def delay(self, weight: Weight, now: float) -> float:
        return max(0.0, self.full_at + self.size(weight) - now)

    def take(self, weight: Weight, _now: float) -> None:
        self.taken.append(self.size(weight))
        self.full_at += self.size(weight)

    def size(self, weight: Weight) -> float:
        return 1.0 if weight is None else weight["tokens"]


def metered(tokens: float = 0.0, limit: int = 9) -> tuple[PermitQueue, Bucket]:
    queue = new_queue(limit)
    queue.meter = bucket = Bucket(tokens)
    return queue, bucket


@pytest.mark.virtual_clock
async def test_a_permit_is_taken_together_with_its_tokens() -> None:
    """None of them without the other."""
    queue, bucket = metered(2, limit=2)
    assert queue.take_nowait()
    assert not queue.take_nowait(weight={"tokens": 2})
    assert (queue.in_flight, bucket.taken) == (1, [1])
    assert queue.take_nowait()
    bucket.full_at -= 10
    assert not queue.take_nowait()
    assert (queue.in_flight, bucket.taken) == (2, [1, 1])


@pytest.mark.virtual_clock
@pytest.mark.parametrize("free", [0, 1])
async def test_permit_tokens_and_companion_are_taken_in_one_step(free: int) -> None:
    queue, bucket = metered(1)
    threads = Threads(free)
    assert queue.take_nowait(threads) is bool(free)
    assert (queue.in_flight, len(bucket.taken), threads.free) == (free, free, 0)


@pytest.mark.virtual_clock
async def test_no_companion_is_taken_while_there_are_no_tokens() -> None:
    """And no tokens while there is no companion."""
    queue, bucket = metered()
    threads = Threads(1)
    began = queue.now()
    assert not queue.take_nowait(threads)
    task = asyncio.create_task(queue.take(needs=threads))
    await settled()
    assert (threads.free, queue.waits_for) == (1, "rate")
    threads.free = 0
    await asyncio.sleep(5)
    assert (bucket.taken, queue.waits_for) == ([], "thread")
    threads.give_back()
    await task
    assert (bucket.taken, threads.free, queue.now() - began) == ([1], 0, 5)


@pytest.mark.virtual_clock
async def test_who_waits_for_tokens_is_overtaken_by_nobody() -> None:
    """Each goes when there are tokens for it and for all before it."""
    queue, _ = metered()
    began, at = queue.now(), dict[str, float]()

    async def caller(name: str, tokens: float) -> None:
        await queue.take(weight={"tokens": tokens})
        at[name] = queue.now() - began

    tasks = [asyncio.create_task(caller(name, tokens)) for name, tokens in (("heavy", 5), ("light", 1), ("last", 2))]
    await settled()
    assert not queue.take_nowait(weight={"tokens": 0})
    await asyncio.gather(*tasks)
    assert at == {"heavy": 5, "light": 6, "last": 8}


@pytest.mark.virtual_clock
async def test_a_due_retry_goes_before_fresh_work_that_waits_for_tokens() -> None:
    """It may need less."""
    queue, _ = metered(1)
    heavy = asyncio.create_task(queue.take(weight={"tokens": 3}))
    await settled()
    began = queue.now()
    await queue.take(again=True)
    assert queue.now() == began
    await heavy
    assert queue.now() - began == 3


@pytest.mark.virtual_clock
async def test_when_who_waits_for_tokens_leaves_the_next_one_goes_as_soon_as_it_can() -> None:
    queue, _ = metered(1)
    heavy = asyncio.create_task(queue.take(weight={"tokens": 30}))
    light = asyncio.create_task(queue.take())
    await settled()
    assert queue.waits_for == "rate"
    heavy.cancel()
    began = queue.now()
    await light
    assert queue.now() == began
    assert queue._refill is None


@pytest.mark.virtual_clock
async def test_tokens_come_in_vain_while_a_pause_lasts_or_all_permits_are_out() -> None:
    """Whoever gives a permit back then lets the next one go."""
    queue, bucket = metered(limit=1)
    task = asyncio.create_task(queue.take())
    await settled()
    queue.pause(5)
    assert queue.waits_for == "pause"
    await asyncio.sleep(3)
    assert bucket.taken == []
    await task
    next_in_line = asyncio.create_task(queue.take())
    await settled()
    assert queue.waits_for == "permit"
    queue.give_back()
    await next_in_line
    assert bucket.taken == [1, 1]


@pytest.mark.virtual_clock
async def test_a_meter_that_is_not_active_is_not_asked() -> None:
    queue, bucket = metered()
    bucket.active = False
    await queue.take(weight={"tokens": 100})
    assert (queue.in_flight, bucket.taken) == (1, [])


@pytest.mark.virtual_clock
async def test_a_place_in_another_queue_needs_no_tokens_of_the_first() -> None:
    """What is needed is said of the first queue only."""
    queue, bucket = metered()
    other = new_queue(1)
    assert await take_first(asyncio.get_running_loop(), queue, other, weight={"tokens": 5}) is other
    assert (queue.waiting, bucket.taken) == (0, [])


@pytest.mark.virtual_clock
async def test_who_is_sent_away_gets_the_reason_and_takes_nothing() -> None:
    """Also when it is cancelled in the same tick: nobody complains of an error that was not looked at."""
    queue = new_queue(0)
    tasks = [asyncio.create_task(queue.take()) for _ in range(2)]
    await settled()
    for waiter in queue.clear():
        assert isinstance(waiter, asyncio.Future)
        waiter.set_exception(ConnectionRefusedError())
    tasks[1].cancel()
    await asyncio.wait(tasks)
    assert isinstance(tasks[0].exception(), ConnectionRefusedError)
    assert tasks[1].cancelled()
    assert (queue.in_flight, queue.waiting) == (0, 0)


def test_no_permit_and_no_timer_is_lost_at_any_step_of_waiting_for_tokens() -> None:
    queues: list[PermitQueue] = []

    async def hold(queue: PermitQueue, tokens: float) -> None:
        await queue.take(weight={"tokens": tokens})
        queue.give_back()

    async def scenario() -> None:
        queue, _ = metered(limit=1)
        queues.append(queue)
        async with asyncio.TaskGroup() as group:
            for tokens in (2, 1, 3):
                group.create_task(hold(queue, tokens))

    def check() -> bool:
        queue = queues[-1]
        return (queue.in_flight, queue.waiting, queue._refill) == (0, 0, None)

    assert cancel_at_every_step(scenario, check=check) >= 5


class TwoQueuesAndThreads(RuleBasedStateMachine):
    """Two queues and a companion under random demand: nothing is lost, nothing given out twice, nobody forgotten."""

    @initialize(limits=st.tuples(st.integers(0, 3), st.integers(0, 3)), free=st.integers(0, 3))
    def start(self, limits: tuple[int, int], free: int) -> None:
        self.loop = VirtualClockLoop()
        self.queues = [PermitQueue(self.loop, limit) for limit in limits]
        self.threads = Threads(free)
        self.total = free
        self.tasks: list[asyncio.Task[None]] = []
        self.holding: list[tuple[PermitQueue, bool]] = []

    @rule(order=st.sampled_from([(0,), (1,), (0, 1), (1, 0)]), needs=st.booleans(), again=st.booleans())
    def join(self, order: tuple[int, ...], needs: bool, again: bool) -> None:
        async def caller() -> None:
            queues = [self.queues[number] for number in order]
            companion = self.threads if needs else None
            queue = await take_first(self.loop, *queues, again=again, needs=companion)
            self.holding.append((queue, needs and queue is queues[0]))

        self.tasks.append(self.loop.create_task(caller()))

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        alive = [task for task in self.tasks if not task.done()]
        if alive:
            data.draw(st.sampled_from(alive)).cancel()

    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        if self.holding:
            held = self.holding.pop(data.draw(st.integers(0, len(self.holding) - 1)))
            self.end(held)

    def end(self, held: tuple[PermitQueue, bool]) -> None:
        queue, companion = held
        queue.give_back()
        if companion:
            self.threads.give_back()

    @rule(which=st.integers(0, 1), limit=st.integers(0, 3))
    def resize(self, which: int, limit: int) -> None:
        self.queues[which].resize(limit)

    @rule(which=st.integers(0, 1), on=st.booleans())
    def hold_back(self, which: int, on: bool) -> None:
        self.queues[which].hold_back("processing", on)

    @rule(which=st.integers(0, 1), seconds=st.sampled_from([0.5, 1.0]))
    def pause(self, which: int, seconds: float) -> None:
        self.queues[which].pause(seconds)

    @rule(seconds=st.sampled_from([0.0, 0.5, 1.0]))
    def time_passes(self, seconds: float) -> None:
        self.settle(seconds)
        for queue in self.queues:
            held = sum(each is queue for each, _ in self.holding)
            assert queue.in_flight == held
        assert self.threads.free == self.total - sum(companion for _, companion in self.holding)

    def settle(self, seconds: float = 0.0) -> None:
        self.loop.run_until_complete(asyncio.sleep(seconds))
        self.loop.run_until_complete(settled())

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        for queue in self.queues:
            queue.hold_back("processing", False)
            queue.resize(1)
        self.total += 1
        self.threads.give_back()
        for _ in range(2 * len(self.tasks) + 2):
            self.settle(1.0)
            holding, self.holding = self.holding, []
            for held in holding:
                self.end(held)
        assert all(task.done() for task in self.tasks), "somebody was forgotten in a queue"
        assert [queue.in_flight for queue in self.queues] == [queue.waiting for queue in self.queues] == [0, 0]
        assert self.threads.free == self.total
        self.loop.close()


TwoQueuesAndThreads.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestTwoQueuesAndThreads = TwoQueuesAndThreads.TestCase
