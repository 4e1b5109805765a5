"""What items may be: any iterable or async iterable, several of them side by side."""

from collections.abc import AsyncIterable, AsyncIterator, Iterable
from typing import Any, TypeAlias, TypeVar, cast

from penstock.errors import UsageError

I = TypeVar("I")  # noqa: E741  # the item
Items: TypeAlias = Iterable[I] | AsyncIterable[I]


def check_items(items: object) -> None:
    """Refuse what cannot be iterated.

    Raises:
        UsageError: neither an iterable nor an async iterable.
    """
    if not isinstance(items, Iterable | AsyncIterable):
        raise UsageError(
            f"found {items!r:.100} as items, expected an iterable or an async iterable: a list, a generator, a file."
        )


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
