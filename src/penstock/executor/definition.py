"""`@penstock.job`: a job together with the resources it needs, in a form that another process can find by its name."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from functools import update_wrapper
from inspect import isasyncgenfunction
from types import TracebackType
from typing import Any, Generic, TypeVar, cast

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

    def __init__(self, definition: Callable[[], AsyncIterator[F]]) -> None:
        if not isasyncgenfunction(definition):
            raise UsageError(
                f"@penstock.job found {definition!r}, expected an async generator function: "
                f"`async def name():` that opens what the job needs and then yields the job function, once."
            )
        update_wrapper(self, definition)
        self._definition = definition

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

        Works as `contextlib.asynccontextmanager` does, except that an error raised within the block is never swallowed:
        nobody could say what the value of the run is then.

        Raises, when it is entered or left:
            UsageError: the definition does not yield a function, or yields again.
            Exception: what the definition raises while it opens or closes.
        """
        return _Opened(cast("AsyncGenerator[F, None]", self._definition()), self.__qualname__)


class _Opened(AbstractAsyncContextManager[F]):
    """One opening of a job's resources."""

    def __init__(self, generator: AsyncGenerator[F, None], name: str) -> None:
        self._generator = generator
        self._name = name

    async def __aenter__(self) -> F:
        fn = await anext(self._generator, None)
        if callable(fn):
            return fn
        await self._generator.aclose()
        raise UsageError(
            f"the job {self._name!r} yielded {'nothing' if fn is None else repr(fn)}, expected the job function: open "
            f"what it needs, then write `yield score`, where `score` is the function that is called with each item."
        )

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                await anext(self._generator)
            else:
                await self._generator.athrow(error)
        except StopAsyncIteration:
            return
        except BaseException as raised:
            if raised is not error:
                raise
            return
        finally:
            if error is not None:
                error.__traceback__ = traceback  # the block raises it again, as it was
        await self._generator.aclose()
        raise UsageError(
            f"the job {self._name!r} yielded more than once. Yield the job function once; what stands after the "
            f"`yield` closes the resources."
        )


def job(definition: Callable[[], AsyncIterator[F]]) -> Job[F]:
    """Make a `Job` of an async generator function that opens resources and yields the job function once."""
    return Job(definition)
