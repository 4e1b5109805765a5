"""Things for an event loop to look at, from any thread: one wake-up for all that are posted before it looks.

    any thread: post(item), post(item) ...  -- the first one wakes the loop -->  loop: arrive(items)

Each `call_soon_threadsafe` writes to a socket and makes the loop turn, which costs more than the rest of a short call
(`tests/benchmarks/bridge.py` prints it).

Guarantees: items are taken in the order in which each thread has posted them. None is overlooked: the flag that says
that the loop has been woken is taken back before the loop looks. What is posted while it looks has its turn when the
others on the loop have had theirs: a thread that posts without end keeps nobody from it.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """What is posted to one loop.

    Args:
        loop: who is to look.
        take: called with each item, on the loop. What it raises is the loop's to handle, and keeps no other item.
        after: called when those that were there have been taken.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, take: Callable[[T], object], after: Callable[[], object] | None = None
    ) -> None:
        self._loop = loop
        self._take = take
        self._after = after
        self._items: deque[T] = deque()
        self._woken = False

    def post(self, item: T) -> bool:
        """Have the loop take `item`; False if it is closed, which drops what it has not taken. Any thread."""
        self._items.append(item)
        if not self._woken:
            try:
                self._woken = True
                self._loop.call_soon_threadsafe(self._look)
            except BaseException as error:  # KeyboardInterrupt in the main thread: the next one is to wake the loop
                self._woken = False
                if not isinstance(error, RuntimeError):
                    raise
                self._items.clear()  # the loop is closed: nobody looks any more
                return False
        elif self._loop.is_closed():  # before it looked
            self._items.clear()
            return False
        return True

    def _look(self) -> None:
        self._woken = False  # before looking: who posts from now on wakes again
        items, take = self._items, self._take
        try:
            for _ in range(len(items)):
                take(items.popleft())
        finally:
            if items and not self._woken:
                self._woken = True
                self._loop.call_soon(self._look)
        if self._after is not None:
            self._after()
