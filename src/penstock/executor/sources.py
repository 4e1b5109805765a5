"""What items may be: any iterable or async iterable, several of them side by side."""

import asyncio
import logging
import reprlib
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from typing import Any, TypeAlias, TypeVar, cast

from penstock.errors import UsageError

I = TypeVar("I")  # noqa: E741  # the item
Items: TypeAlias = Iterable[I] | AsyncIterable[I]

sources = logging.getLogger("penstock.sources")

LONGEST_TURN = 0.005
"""Seconds of pulling after which the loop gets a turn. CPython's own switch interval between threads."""
BLOCKS = 0.1
"""Seconds for one item that are worth a warning. As asyncio's debug mode (`loop.slow_callback_duration`)."""


def check_items(items: object) -> None:
    """Refuse what cannot be iterated.

    Raises:
        UsageError: neither an iterable nor an async iterable.
    """
    if not isinstance(items, Iterable | AsyncIterable):
        raise UsageError(
            f"found {items!r:.100} as items, expected an iterable or an async iterable: a list, a generator, a file."
        )


def is_cancelled() -> bool:
    """Whether somebody has cancelled the current task, so that a CancelledError is not of the user's own making."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def warn_that_it_blocks(duration: float) -> None:
    """Say that a source took so long for an item on the loop thread."""
    sources.warning(
        "the source of a stream took %.2f s for an item, during which nothing else could run. "
        "Wrap it: penstock.pull_in_thread(items).",
        duration,
    )


def key_raised(item: object, error: BaseException) -> UsageError:
    """Why an item cannot be given to its job: nobody can say what it is known by."""
    refusal = UsageError(
        f"key= raised {reprlib.repr(error)} for item {reprlib.repr(item)}. It must return the key of "
        f"every item; this item was not given to the job."
    )
    refusal.__cause__ = error
    return refusal


def side_by_side(*iterables: Items[Any]) -> Items[tuple[Any, ...]]:
    """`zip`, also for async iterables."""
    if any(isinstance(items, AsyncIterable) for items in iterables):
        return _async_side_by_side(iterables)
    return zip(*cast("tuple[Iterable[Any], ...]", iterables), strict=False)


async def _async_side_by_side(iterables: tuple[Items[Any], ...]) -> AsyncIterator[tuple[Any, ...]]:
    iterators = [aiter(items) if isinstance(items, AsyncIterable) else iter(items) for items in iterables]
    while True:
        row = []
        for iterator in iterators:
            try:
                row.append(await anext(iterator) if isinstance(iterator, AsyncIterator) else next(iterator))
            except (StopIteration, StopAsyncIteration):
                return
        yield tuple(row)
