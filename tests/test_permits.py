"""The queue of one key: limit, order, pauses, and no permit lost, whatever is cancelled when."""

import asyncio

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock.permits import PermitQueue
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
