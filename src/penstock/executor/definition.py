"""`@penstock.job`: a job together with the resources it needs, in a form that another process can find by its name."""

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import update_wrapper
from inspect import isasyncgenfunction
from typing import Any, Generic, TypeVar

from penstock.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])


class Job(Generic[F]):
    """An async generator function that opens resources and yields the job function once.

        @penstock.job
        async def scoring():
            async with HttpClient("http://example.com") as api:
                async def score(record): ...
                yield score

        report = penstock.run(scoring, records)

    It is opened and closed in one task, once for each run and process. It is pickled by its qualified name.
    """

    __name__: str
    __qualname__: str

    def __init__(self, definition: Callable[[], AsyncGenerator[F, None]]) -> None:
        if not isasyncgenfunction(definition):
            raise UsageError(
                f"@penstock.job found {definition!r}, expected an async generator function: "
                f"`async def name():` that opens what the job needs and then yields the job function, once."
            )
        update_wrapper(self, definition)
        self._open = asynccontextmanager(definition)

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        raise UsageError(
            f"the job {self.__qualname__!r} opens resources and cannot be called. Give it to "
            f"`penstock.run({self.__name__}, items)`, or write `async with {self.__name__}.open() as fn:`."
        )

    def __repr__(self) -> str:
        return f"<penstock.Job {self.__qualname__}>"

    def __reduce__(self) -> str:
        return self.__qualname__

    def open(self) -> AbstractAsyncContextManager[F]:
        """Open the resources; the value is the job function. Leaving closes them, in the same task.

        Works as `contextlib.asynccontextmanager` does, and raises what opening and closing raise.
        """
        return self._open()


def job(definition: Callable[[], AsyncGenerator[F, None]]) -> Job[F]:
    """Make a `Job` of an async generator function that opens resources and yields the job function once."""
    return Job(definition)
