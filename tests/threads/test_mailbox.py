"""What is posted to a loop: one wake-up for many, in order, and nothing overlooked."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from penstock.threads.mailbox import Mailbox

BOUND = 10.0
"""Seconds after which a failed test gives up."""

POSTERS = 4
POSTS = 3000
"""Of each poster. Arbitrary, because: long enough for looks and posts to meet thousands of times."""


class WakeUps:
    """Counts how often a loop is woken from other threads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self._loop = asyncio.get_running_loop()
        self._wake = self._loop.call_soon_threadsafe
        monkeypatch.setattr(self._loop, "call_soon_threadsafe", self._counted)

    def _counted(self, callback: Callable[..., object], *args: Any) -> asyncio.Handle:
        self.count += 1
        return self._wake(callback, *args)


async def test_many_that_are_posted_before_the_loop_looks_share_one_wake_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """And come in the order in which they were posted."""
    wake_ups, taken = WakeUps(monkeypatch), list[int]()
    mailbox = Mailbox(asyncio.get_running_loop(), taken.append)
    assert all(mailbox.post(number) for number in range(100))
    assert taken == [], "post never looks itself"
    await asyncio.sleep(0)
    assert taken == list(range(100))
    assert wake_ups.count == 1


async def test_the_next_post_after_a_look_wakes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    wake_ups, taken = WakeUps(monkeypatch), list[int]()
    mailbox = Mailbox(asyncio.get_running_loop(), taken.append)
    for number in range(3):
        mailbox.post(number)
        await asyncio.sleep(0)
        assert taken == list(range(number + 1))
    assert wake_ups.count == 3


async def test_after_is_called_once_for_all_that_were_there() -> None:
    """When they have been taken: who waits for a state finds it whole."""
    steps = list[object]()
    mailbox = Mailbox(asyncio.get_running_loop(), steps.append, lambda: steps.append("after"))
    mailbox.post(1)
    mailbox.post(2)
    await asyncio.sleep(0)
    mailbox.post(3)
    await asyncio.sleep(0)
    assert steps == [1, 2, "after", 3, "after"]


async def test_what_is_posted_during_a_look_waits_its_turn() -> None:
    """A poster without end keeps nobody else from the loop: what was ready before comes in between."""
    loop, steps = asyncio.get_running_loop(), list[object]()

    def take(number: int) -> None:
        steps.append(number)
        if number < 3:
            mailbox.post(number + 1)
            loop.call_soon(steps.append, f"other {number}")

    mailbox = Mailbox(loop, take)
    mailbox.post(1)
    while "other 2" not in steps:
        await asyncio.sleep(0)
    assert steps == [1, 2, "other 1", 3, "other 2"]


async def test_nothing_is_overlooked_when_posts_meet_looks() -> None:
    """Four threads post while the loop looks. In the end all have been taken, those of each thread in their order.

    Nobody posts or wakes after the last one: an item that was overlooked would stay where it is.
    """
    taken = list[tuple[int, int]]()
    complete = asyncio.Event()

    def look_again() -> None:
        if len(taken) == POSTERS * POSTS:
            complete.set()

    mailbox = Mailbox(asyncio.get_running_loop(), taken.append, look_again)

    def post_all(poster: int) -> None:
        for number in range(POSTS):
            assert mailbox.post((poster, number))

    threads = [threading.Thread(target=post_all, args=(poster,)) for poster in range(POSTERS)]
    for thread in threads:
        thread.start()
    async with asyncio.timeout(BOUND):
        await complete.wait()
    for thread in threads:
        thread.join(BOUND)
    for poster in range(POSTERS):
        assert [number for whose, number in taken if whose == poster] == list(range(POSTS))


async def test_the_last_post_is_not_overlooked_however_it_meets_the_look() -> None:
    """One at a time: a thread posts, the loop takes it, and says so; each meets a look that is just over."""
    posted, taken = 500, asyncio.Semaphore(0)
    go = threading.Semaphore(0)

    def take(_number: int) -> None:
        go.release()  # the thread posts the next one while this look is still under way
        taken.release()

    mailbox = Mailbox(asyncio.get_running_loop(), take)

    def post_all() -> None:
        for number in range(posted):
            assert mailbox.post(number)
            assert go.acquire(timeout=BOUND)

    thread = threading.Thread(target=post_all)
    thread.start()
    async with asyncio.timeout(BOUND):
        for _ in range(posted):
            await taken.acquire()
    thread.join(BOUND)


def test_a_closed_loop_takes_nothing_and_post_says_so() -> None:
    """It holds nothing of what it was given: nobody will ever take it."""
    loop, taken = asyncio.new_event_loop(), list[int]()
    mailbox = Mailbox(loop, taken.append)
    loop.close()
    assert [mailbox.post(number) for number in range(3)] == [False, False, False]
    assert taken == []
    assert not mailbox._items


def test_what_a_loop_had_taken_before_it_was_closed_stays_taken() -> None:
    async def main() -> Mailbox[int]:
        mailbox = Mailbox(asyncio.get_running_loop(), taken.append)
        mailbox.post(1)
        await asyncio.sleep(0)
        return mailbox

    taken = list[int]()
    mailbox = asyncio.run(main())
    assert not mailbox.post(2)
    assert taken == [1]


async def test_an_item_that_goes_wrong_holds_up_no_other() -> None:
    """Its error is the loop's to tell, as that of any callback; the others are taken without a further post."""
    loop, taken, told = asyncio.get_running_loop(), list[int](), list[object]()
    loop.set_exception_handler(lambda _loop, context: told.append(context["exception"]))
    error = ValueError("the second one")

    def take(number: int) -> None:
        if number == 1:
            raise error
        taken.append(number)

    mailbox = Mailbox(loop, take)
    for number in range(4):
        mailbox.post(number)
    for _ in range(3):
        await asyncio.sleep(0)
    assert taken == [0, 2, 3]
    assert told == [error]


async def test_an_item_that_goes_wrong_after_another_post_makes_no_second_wake_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever posted while the loop looked has woken it: that look takes the rest as well."""
    loop, taken = asyncio.get_running_loop(), list[int]()
    loop.set_exception_handler(lambda _loop, _context: None)
    looks = list[int]()

    def take(number: int) -> None:
        if number == 0:
            mailbox.post(2)
            raise ValueError("the first one")
        taken.append(number)

    mailbox = Mailbox(loop, take, lambda: looks.append(len(taken)))
    mailbox.post(0)
    mailbox.post(1)
    for _ in range(3):
        await asyncio.sleep(0)
    assert taken == [1, 2]
    assert looks == [2]


def test_a_loop_that_is_closed_before_it_looked_takes_nothing_more() -> None:
    """A wake-up was under way: that it never comes must not hide that nobody looks."""
    loop, taken = asyncio.new_event_loop(), list[int]()
    mailbox = Mailbox(loop, taken.append)
    assert mailbox.post(1), "the loop was there"
    loop.close()
    assert [mailbox.post(number) for number in range(3)] == [False, False, False]
    assert taken == []
    assert not mailbox._items


async def test_a_wake_up_that_is_interrupted_is_made_up_for_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C may come in the midst of it, in the main thread: what was posted is taken with what comes later."""
    loop, taken = asyncio.get_running_loop(), list[int]()
    mailbox = Mailbox(loop, taken.append)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "call_soon_threadsafe", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mailbox.post(1)
    assert mailbox.post(2)
    await asyncio.sleep(0)
    assert taken == [1, 2]
