"""The synchronous view: what is async, used from synchronous code in other threads than the loop's.

    thread: view.method(...)          -> call -> loop: method(...), awaited                -> thread: its value
    thread: with opened(cm, call):    -> call -> loop: a task that enters, waits and leaves -> thread: a view, the block
    thread: for piece in iterator     -> call -> loop: one step of the async iterator      -> thread: the piece

How a thread has something done on the loop and waits for it is an argument, `Call`; all that blocks here blocks there.

Guarantees: a block is entered and left in one task, as cancel scopes and time-outs require, and left once: with the
block's end, when opening it was interrupted (Ctrl-C), when its handle is dropped, and at the end of the loop. Nothing
that is raised in it ends the loop. What entering sets of context variables is set in the block, as under `async with`.

Why not anyio's `BlockingPortal.wrap_async_context_manager`: when the thread is interrupted while it opens, it opens all
the same and stays open. A `SystemExit` while opening or closing ends the portal with all that is open on it. After the
portal's end, leaving raises `RuntimeError` over the block's own exception. And its waiting thread lends its place to
nobody, which `Portal.call` does.

Threads: views and iterators may be used by any thread but the loop's, by several at once; a block is entered and left
by one thread at a time.
"""

import asyncio
import os
import warnings
from collections.abc import AsyncIterable, Callable, Coroutine, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import AbstractAsyncContextManager, AbstractContextManager, suppress
from contextvars import Context, ContextVar, Token, copy_context
from functools import wraps
from inspect import isasyncgenfunction, isawaitable, iscoroutinefunction, unwrap
from types import CoroutineType, FunctionType, TracebackType
from typing import Any, NoReturn, Protocol, Unpack, cast

from penstock.callables import is_async, name_of
from penstock.clients.auth import Headers
from penstock.clients.http import RequestOptions
from penstock.clients.request import Body, Params
from penstock.clients.response import Response
from penstock.errors import UsageError
from penstock.gate.breaker import Breaker
from penstock.gate.limiter import LimitRule
from penstock.gate.rate import Rates, Weight
from penstock.gate.service import KeyStatistics
from penstock.outcome import contained


class Call(Protocol):
    """Has a function called on the loop and waits for it, as `Portal.call` does: raises what it raised.

    What it returns is awaited if it can be. The thread's context variables go along. When the wait is interrupted, what
    runs on the loop is cancelled. Without a loop it raises `ClosedError`, on the loop's own thread `WrongThread`.
    """

    def __call__(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], /) -> Any: ...


class _Here:
    """Belongs to a loop of this process."""

    __slots__ = ()

    def __reduce__(self) -> NoReturn:
        raise UsageError(
            f"{self!r} cannot be pickled or copied: it belongs to an event loop of this process. "
            f"Send what it is made from, and open that on a bridge of the other process."
        )


# --- the view ---


class Synchronous(_Here):
    """An object with async methods, for synchronous code: `api.get_json("/x")` blocks and returns the value.

    Public attributes are the object's own. Its methods are called on the loop, the plain ones too, and block: a
    coroutine gives its value, an async context manager a plain one, an async iterator a plain one. Classes and what is
    no function are read as they are, in the calling thread; what is set is set on the loop.

    Blocks. **Interrupted** (Ctrl-C), what runs on the loop is cancelled. **Threads**: any but the loop's own.

    Raises, at each call:
        ClosedError: the loop is gone.
        WrongThread: called on the loop's own thread.
        Exception: what the object raised.
    """

    __slots__ = ("_call", "_viewed")

    _call: Call
    _viewed: Any

    def __init__(self, viewed: Any, call: Call) -> None:
        object.__setattr__(self, "_viewed", viewed)
        object.__setattr__(self, "_call", call)

    def __repr__(self) -> str:
        return f"<synchronous view of {self._viewed!r}>"

    def __dir__(self) -> list[str]:
        return [name for name in dir(self._viewed) if not name.startswith("_")]

    def __getattr__(self, name: str) -> Any:
        self._refuse_private(name)
        attribute = getattr(self._viewed, name)
        if callable(attribute) and not isinstance(attribute, type):
            return _blocking(attribute, self._call, self)
        return attribute

    def __setattr__(self, name: str, value: Any) -> None:
        self._refuse_private(name)
        self._call(setattr, (self._viewed, name, value), {})

    def _refuse_private(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(f"a synchronous view has no attribute {name!r}: it shows public names", name=name)


class IterableView(Synchronous):
    """The view of what is async-iterable: `for piece in view`."""

    __slots__ = ()

    def __iter__(self) -> "PlainIterator":
        return PlainIterator(self._viewed, self._call, owned=False)


def view_of(value: Any, call: Call) -> Any:
    """What synchronous code sees of `value`: a view if it has async parts, a blocking function if it is async."""
    kind = type(value)
    if hasattr(kind, "__aiter__"):
        return IterableView(value, call)
    if _has_async_parts(kind):
        return Synchronous(value, call)
    return _blocking(value, call) if callable(value) and is_async(value) else value


def _has_async_parts(kind: type) -> bool:
    if any(hasattr(kind, name) for name in ("__aenter__", "__anext__", "__await__")):
        return True
    return any(
        _is_async_method(attribute)
        for base in kind.__mro__
        for name, attribute in vars(base).items()
        if not name.startswith("_")
    )


def _is_async_method(attribute: object) -> bool:
    if not isinstance(attribute, FunctionType | staticmethod | classmethod):
        return False
    fn = unwrap(cast("Callable[..., Any]", attribute))  # by `asynccontextmanager`, for example
    return iscoroutinefunction(fn) or isasyncgenfunction(fn)


def _blocking(fn: Callable[..., Any], call: Call, view: Synchronous | None = None) -> Callable[..., Any]:
    """`fn` for threads; what returns its own object, returns its view."""

    async def on_loop(*args: Any, **kwargs: Any) -> Any:
        value = fn(*args, **kwargs)
        # What can be both awaited and entered is to be entered: else nobody lets go of what it holds.
        if isawaitable(value) and not _can_be_entered(value):
            value = await value
        return view if view is not None and value is view._viewed else _handed_over(value, call)

    on_loop.__qualname__ = name_of(fn)  # for errors that name it

    @wraps(fn, updated=())  # without its __dict__, in which some mark it as a coroutine function
    def blocking(*args: Any, **kwargs: Any) -> Any:
        return call(on_loop, args, kwargs)

    return blocking


def _handed_over(value: Any, call: Call) -> Any:
    """A value of the loop for a thread."""
    if _can_be_entered(value):
        return Opened(value, call)
    if hasattr(type(value), "__aiter__"):
        return PlainIterator(value, call, owned=True)
    return value


def _can_be_entered(value: object) -> bool:
    return hasattr(type(value), "__aenter__") and hasattr(type(value), "__aexit__")


# --- a block ---


def opened(
    cm: AbstractAsyncContextManager[Any], call: Call, in_flight: Callable[[], Iterable["Future[Any]"]] = tuple
) -> "Opened":
    """A plain context manager around an async one: `with opened(HttpClient(url), call) as api: api.get_json("/x")`.

    The value is a view of what `async with` would give, if that has async parts. Exceptions of the block are passed
    on, and may be swallowed.

    Args:
        cm: what to open.
        call: how something is done on the loop.
        in_flight: what has been submitted there and may use it: leaving the block without an exception waits for what
            has come since it was entered.

    Blocks while it opens and while it closes. **Interrupted** (Ctrl-C) while it opens, the opening is cancelled, and
    closed if it was just done; while it closes, the thread goes on, and so does the closing. **Threads**: any but the
    loop's own. At the end of the loop, what is still open is closed there.

    Raises:
        UsageError: `cm` is no async context manager, or is open already.
        ClosedError: the loop is gone.
        WrongThread: entered on the loop's own thread.
        Exception: what opening or closing raised.
    """
    if isinstance(cm, Synchronous | Opened):
        raise UsageError(
            f"found {cm!r:.200}, which is for synchronous code already. "
            f"{'Write `with` around it, as it is.' if isinstance(cm, Opened) else 'Use it as it is.'}"
        )
    if not _can_be_entered(cm):
        raise UsageError(f"found {_what_it_is(cm)} Write `with bridge.open(HttpClient(url)) as api:`.")
    return Opened(cm, call, in_flight)


def _what_it_is(found: object) -> str:
    expected = "expected what `async with` opens"
    if isinstance(found, CoroutineType):
        found.close()
        return (
            f"a coroutine object ({found.__qualname__}), {expected}. To await it, pass its function: "
            f"`bridge.submit({found.__name__}, ...).result()`."
        )
    if isinstance(found, type) and hasattr(found, "__aenter__"):
        return f"the class {found.__qualname__}, expected one of its objects: `{found.__name__}(...)`."
    if isinstance(found, FunctionType):
        return f"the function {name_of(found)}, {expected}. If it returns that, call it: `{found.__name__}(...)`."
    if hasattr(type(found), "__enter__"):
        return f"{found!r:.200}, which a plain `with` opens, without the bridge."
    return f"{found!r:.200}, {expected}."


class Opened(_Here):
    """What `opened` returns, and a view's method that returns an async context manager."""

    __slots__ = ("_before", "_block", "_call", "_cm", "_in_flight", "_tokens")

    def __init__(
        self,
        cm: AbstractAsyncContextManager[Any],
        call: Call,
        in_flight: Callable[[], Iterable["Future[Any]"]] = tuple,
    ) -> None:
        self._cm = cm
        self._call = call
        self._in_flight = in_flight
        self._before: frozenset[Future[Any]] = frozenset()
        """What was in flight when it was entered."""
        self._block: _Block | None = None
        self._tokens: list[Token[Any]] = []

    def __repr__(self) -> str:
        return f"<{'not open' if self._block is None else 'open'}: {self._cm!r}, for synchronous code>"

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{self!r} has no attribute {name!r}. Open it: `with ... as it: it.{name}`", name=name)

    def __enter__(self) -> Any:
        if self._block is not None:
            raise UsageError(f"{self!r} has been entered before, and not been left.")
        block = _Block(self._cm)
        self._before = frozenset(self._in_flight())
        try:
            value, set_by_it = self._call(block.enter, (), {})
            self._tokens = [variable.set(content) for variable, content in set_by_it]
            self._block = block
        except BaseException:  # KeyboardInterrupt, when it may even have been opened
            block.give_up()
            raise
        return view_of(value, self._call)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        block, self._block = self._block, None
        if block is None:
            raise UsageError(f"{self!r} has not been entered.")
        with suppress(ValueError):  # left in another context than entered: these are not its variables
            while self._tokens:
                token = self._tokens.pop()
                token.var.reset(token)
        if block.of_parent:
            return None
        try:
            if error is None:
                wait(frozenset(self._in_flight()) - self._before)
            # Over before its block: closed with the loop, or cancelled from within, as a task group is.
            swallowed: bool = block.result() if block.over else self._call(block.leave, (error,), {})
        except BaseException:  # KeyboardInterrupt, when nobody on the loop may know yet
            block.let_go(error)
            raise
        finally:
            self._before = frozenset()
        return swallowed

    def __del__(self) -> None:
        if self._block is not None and not self._block.of_parent:
            self._block.give_up()
            warnings.warn(  # last, since it may be an error
                f"{self._cm!r} was opened and never closed. Write `with ... as it:`.",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )


class _Block:
    """One opening: entered, held and left by one task. In the loop, but for `give_up`, `let_go` and `over`."""

    def __init__(self, cm: AbstractAsyncContextManager[Any]) -> None:
        self._cm = cm
        self._process = os.getpid()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._unwanted = False
        self._task: asyncio.Task[bool] | None = None
        self._entered: asyncio.Future[tuple[Any, list[tuple[ContextVar[Any], Any]]]]
        self._left: asyncio.Future[BaseException | None]

    # --- the thread ---

    @property
    def over(self) -> bool:
        """Whether the task has ended."""
        assert self._task is not None, "it has been entered, and not been left"
        return self._task.done()

    @property
    def of_parent(self) -> bool:
        """Whether this is the child of a fork: what was opened before is open where its loop runs, and closed there."""
        return os.getpid() != self._process

    def give_up(self) -> None:
        """Nobody will leave it: cancel the opening, or close what is open. Does not wait."""
        self._unwanted = True  # before the loop is looked for: `enter` does it the other way round
        self._post(self._cancel)

    def let_go(self, error: BaseException | None) -> None:
        """It is left, whether `leave` was called or not. Does not wait."""
        self._post(self._end, error)

    def _post(self, callback: Callable[..., object], *args: Any) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed, and with it everything that was open
                self._loop.call_soon_threadsafe(callback, *args)

    # --- the loop ---

    async def enter(self) -> tuple[Any, list[tuple[ContextVar[Any], Any]]]:
        """Open it. Its value, and the context variables that it set. Cancelled, it goes on opening until `give_up`."""
        self._loop = asyncio.get_running_loop()
        if self._unwanted:
            raise asyncio.CancelledError
        self._entered = self._loop.create_future()
        self._left = self._loop.create_future()
        self._task = _kept(self._run())
        await asyncio.wait((self._task, self._entered), return_when=asyncio.FIRST_COMPLETED)
        if not self._entered.done():
            self.result()
        return self._entered.result()

    async def leave(self, error: BaseException | None) -> bool:
        """Close it, and tell whether it swallowed the block's `error`. Cancelled, it goes on closing."""
        assert self._task is not None, "it has been entered"
        self._end(error)
        del error
        await asyncio.wait((self._task,))
        return self.result()

    def result(self) -> bool:
        """Whether it swallowed the error; raises what opening or closing it raised."""
        task, self._task = self._task, None
        assert task is not None, "it is asked for once"
        try:
            # Cancelled before anybody left it, as at the end of the loop: it has been closed all the same.
            return not (task.cancelled() and self._left.cancelled()) and task.result()
        finally:
            del task  # its exception's traceback holds this frame: a cycle

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _end(self, error: BaseException | None) -> None:
        if not self._left.done():
            self._left.set_result(error)

    async def _run(self) -> bool:
        try:
            return await self._hold()
        except (KeyboardInterrupt, SystemExit) as error:  # from a task they would end the loop
            raise contained(error, name_of(type(self._cm))) from error

    async def _hold(self) -> bool:
        before = copy_context()
        value = await self._cm.__aenter__()
        self._entered.set_result((value, _set_since(before)))
        del value, before
        try:
            error = await self._left
        except asyncio.CancelledError as cancelled:
            if not await self._cm.__aexit__(type(cancelled), cancelled, cancelled.__traceback__):
                raise
            return False
        if error is None:
            await self._cm.__aexit__(None, None, None)
            return False
        try:
            return bool(await self._cm.__aexit__(type(error), error, error.__traceback__))
        except BaseException as raised:
            if raised is error:
                return False
            raise
        finally:
            del error


def _set_since(before: Context) -> list[tuple[ContextVar[Any], Any]]:
    """The context variables that are other ones than `before`."""
    return [
        (variable, content)
        for variable, content in copy_context().items()
        if variable not in before or before[variable] is not content
    ]


_tasks: set["asyncio.Task[Any]"] = set()
"""What runs with nobody on the loop to wait for it. A loop itself forgets such tasks."""


def _kept(work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
    task = asyncio.get_running_loop().create_task(work)
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)
    return task


# --- an iterator ---


class PlainIterator(_Here):
    """A plain iterator over an async one, each step a call. Several threads may read it: each piece goes to one.

    `close`, and the garbage collector, close the async one, if it was made for this one.
    """

    __slots__ = ("_call", "_pieces")

    def __init__(self, source: AsyncIterable[Any], call: Call, *, owned: bool) -> None:
        self._call = call
        self._pieces = _Pieces(source, call, owned)

    def __repr__(self) -> str:
        return f"<plain iterator over {self._pieces.source!r}>"

    def __iter__(self) -> "PlainIterator":
        return self

    def __next__(self) -> Any:
        piece = _END if self._pieces.over else self._call(self._pieces.next, (), {})
        if piece is _END:
            raise StopIteration
        return piece

    def close(self) -> None:
        """Close the async iterator, and wait for that. Closing twice is fine."""
        if not self._pieces.over:
            self._call(self._pieces.close, (), {})

    def __del__(self) -> None:
        self._pieces.close_soon()


class _Pieces:
    """The async iterator. In the loop, but for `over` and `close_soon`."""

    def __init__(self, source: AsyncIterable[Any], call: Call, owned: bool) -> None:
        self.source = source
        self.over = False
        self._call = call
        self._owned = owned
        self._iterator: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._turn = asyncio.Lock()

    def close_soon(self) -> None:
        """Close it, if it has been begun. Does not wait. From any thread, or the garbage collector in it."""
        if self._loop is not None and not self.over:
            with suppress(RuntimeError):  # the loop is closed, and has closed its generators
                self._loop.call_soon_threadsafe(self._close_in_a_task)

    def _close_in_a_task(self) -> None:
        _kept(self.close())

    async def next(self) -> Any:
        """The next piece, or `_END`."""
        async with self._turn:
            if self.over:
                return _END
            if self._iterator is None:
                self._loop = asyncio.get_running_loop()
                self._iterator = aiter(self.source)
            try:
                return _handed_over(await anext(self._iterator), self._call)
            except StopAsyncIteration:
                self.over = True
                return _END

    async def close(self) -> None:
        """Take no more, and close what was made for this iterator alone."""
        async with self._turn:
            if self.over:
                return
            self.over = True
            used = self.source if self._iterator is None else self._iterator
            if (self._owned or used is not self.source) and hasattr(used, "aclose"):
                await used.aclose()


_END = object()


# --- what a type checker is told ---


class SyncStreamedResponse(Protocol):
    """The synchronous view of a `StreamedResponse`."""

    status: int
    headers: Mapping[str, str]
    url: str
    attempts: int

    def iter_bytes(self) -> Iterator[bytes]:
        """The body, piece by piece, as it arrives; see `StreamedResponse.iter_bytes`."""

    def close(self) -> None:
        """Give the connection back if the body was read to its end, else close it."""


class SyncHttpClient(Protocol):
    """The synchronous view of an `HttpClient`: the same calls, which block. See there."""

    limit: int | LimitRule
    rate: Rates | None
    breaker: Breaker | None

    def request(
        self,
        method: str,
        path: str,
        *,
        params: Params = None,
        json: Any = None,
        data: Body = None,
        headers: Headers | None = None,
        idempotent: bool | None = None,
        weight: Weight | None = None,
    ) -> Response:
        """Do one round trip and return the answer, read fully; see `HttpClient.request`."""

    def stream(
        self,
        method: str,
        path: str,
        *,
        params: Params = None,
        json: Any = None,
        data: Body = None,
        headers: Headers | None = None,
        idempotent: bool | None = None,
        weight: Weight | None = None,
    ) -> AbstractContextManager[SyncStreamedResponse]:
        """Read a large answer in pieces: `with api.stream("GET", "/dump") as answer:`; see `HttpClient.stream`."""

    def get(self, path: str, **how: Unpack[RequestOptions]) -> Response:
        """GET; options as for `request`."""

    def head(self, path: str, **how: Unpack[RequestOptions]) -> Response:
        """HEAD; options as for `request`."""

    def options(self, path: str, **how: Unpack[RequestOptions]) -> Response:
        """OPTIONS; options as for `request`."""

    def put(self, path: str, **how: Unpack[RequestOptions]) -> Response:
        """PUT; options as for `request`."""

    def delete(self, path: str, **how: Unpack[RequestOptions]) -> Response:
        """DELETE; options as for `request`."""

    def post(self, path: str, **how: Unpack[RequestOptions]) -> Response:
        """POST; options as for `request`."""

    def patch(self, path: str, **how: Unpack[RequestOptions]) -> Response:
        """PATCH; options as for `request`."""

    def get_json(self, path: str, **how: Unpack[RequestOptions]) -> Any:
        """GET, and the body as JSON; options as for `request`."""

    def post_json(self, path: str, **how: Unpack[RequestOptions]) -> Any:
        """POST, and the body as JSON; options as for `request`."""

    def statistics(self) -> dict[Hashable, KeyStatistics]:
        """What is going on, by service key."""
