"""Many small processing steps in one hop: a thread goes through the items, a slice of time at a go.

A hop into a thread and back costs some ten microseconds, which is more than a small step takes. So one hop does as many
items as fit into `SLICE`; then others have their turn in the lane, and a caller that was cancelled is noticed.
"""

from collections.abc import Callable, Iterable, Iterator
from types import CoroutineType
from typing import Any, Generic, TypeVar

from penstock import clock
from penstock.callables import name_of, refuse_coroutine
from penstock.outcome import Outcome, classify, contained

I = TypeVar("I")  # noqa: E741  # the item
T = TypeVar("T")

SLICE = 0.02
"""Seconds. A thousand hops' worth, and what may be waited for in the CPU lane without being noticed."""


class Batch(Generic[T]):
    """`fn` of each item, as outcomes in the order of the items. One thread at a time."""

    def __init__(self, fn: Callable[[Any], T], items: Iterable[Any]) -> None:
        self.__qualname__ = name_of(fn)
        """What messages and threads call a slice of it."""
        self._fn = fn
        self._items = items
        self._iterator: Iterator[Any] | None = None
        self._outcomes: list[Outcome[T]] = []

    def take(self) -> list[Outcome[T]]:
        """The outcomes so far, which are the caller's from now on.

        The traceback of an error among them knows this batch: if it kept them, that would be a cycle.
        """
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def __call__(self) -> bool:
        """Do a slice; True when all is done.

        Raises:
            Exception: what the iterable raised.
        """
        fn, now = self._fn, clock.steady
        started = now()
        end = started + SLICE
        if self._iterator is None:
            # Here and not on the loop: it may take its time. What is done is not to be kept by errors of later items.
            self._iterator, self._items = iter(self._items), ()
        for item in self._iterator:
            try:
                value = fn(item)
                if type(value) is CoroutineType:
                    refuse_coroutine(value, name_of(fn))
            except BaseException as raised:  # noqa: BLE001  # one item's error is its own
                error = contained(raised, name_of(fn))
                ended = now()
                self._outcomes.append(Outcome(None, item, None, error, classify(error), 0, 0.0, ended - started))
                del error  # its traceback holds this frame: a cycle
            else:
                ended = now()
                self._outcomes.append(Outcome(None, item, value, None, None, 0, 0.0, ended - started))
            if ended >= end:
                return False
            started = ended
        return True
