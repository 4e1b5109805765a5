"""A pool: resources that one job at a time checks out, made when they are needed and used again.

    acquire -> [queue: place] -> newest idle resource, checked if it stood long; else a new one -> block
                    ^                                                                               |
                    |                         left, and no abandoned call uses it any more: it is   v
                    +---- place back <---- idle <- sound | suspect: checked, or closed if there is no check

Purpose: things that are dear to make and serve one user at a time, database connections above all.

Guarantees: never more than `size` resources exist, those being opened and closed included, since each has a place
until it is closed or idle; a plain close holds it until its thread has ended. The exception is an async close that is
given up: its time is over, and what it leaves behind is the driver's. A place and a resource are never lost, wherever
who asked is cancelled: what is opened for someone who has left is for the next one. A resource that a thread may still
use is given to nobody and not closed. Who holds one and asks for another is told so, instead of waiting for itself.

The factory, the check and the close run in tasks of the pool's own, and not as part of the job that happened to ask
first: what is made here outlives it. Plain functions run where the factory runs: in a thread beside a plain factory, on
the loop beside an async one, whose resources belong to the loop's thread.

Everything here belongs to the loop thread; threads run only what the user gave us.
"""

import asyncio
import inspect
import logging
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from contextvars import Context, copy_context
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Self, TypeVar, overload

from penstock.callables import check_function, is_async, name_of, refuse_coroutine
from penstock.context import RunningJob, current_job, enter, leases
from penstock.errors import AttemptTimeout, ClosedError, DeadlockError, UsageError, WrongLoop, WrongThread, first_line
from penstock.gate.retry import check_timeout
from penstock.outcome import FailureKind, classify
from penstock.permits import PermitQueue
from penstock.threads.lane import Lane

logger = logging.getLogger("penstock.pool")

R = TypeVar("R")
T = TypeVar("T")

DEFAULT_IDLE_TIMEOUT = 300.0
"""Seconds. As asyncpg's `max_inactive_connection_lifetime`: below what firewalls and servers commonly allow."""
CHECK_AFTER = 1.0
"""Seconds of standing idle after which a resource is checked. Arbitrary, because: under load no job then pays a round
trip for the check, and a resource that has just served dies seldom."""
PATIENCE = 5.0
"""Seconds that an async close or check gets, and all together when the pool is left. Arbitrary, because: longer than
clean-up takes, shorter than a hang."""
MOST_NAMED = 5
"""Holders named in a message. Arbitrary, because: a line stays readable."""


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """A pool as it was at the time of asking."""

    size: int
    in_use: int
    """Places taken: resources that are checked out, held by abandoned calls, or being opened, checked or closed."""
    idle: int
    """Resources that wait to be used."""
    waiting: int
    """Who waits for a place."""
    abandoned: int
    """Those of the places in use where a thread does what nobody waits for any more: a call that was abandoned and uses
    a resource, an opening whose caller has gone, a close that takes more than 5 s."""
    made: int
    """Resources made so far."""
    closed: int
    """Resources closed so far."""


@dataclass(frozen=True, slots=True)
class _Options(Generic[R]):
    name: str
    size: int
    factory: Callable[[], Any]
    close: Callable[[R], object] | None
    check: Callable[[R], object] | None
    idle_timeout: float | None
    timeout: float | None


class Pool(Generic[R]):
    """At most `size` resources, such as database connections, each used by one job at a time.

        async with Pool(connect, size=10) as pool, Executor() as executor:
            async def store(record):
                async with pool.acquire() as connection:
                    await connection.execute(...)

    Resources are made when they are asked for, and the one used last is used next. One whose block was left by an
    exception, a cancellation among them, is suspect, and so is one that an abandoned blocking call has used: it is
    checked at once, or closed if there is no `check`.

    Leaving the pool refuses who waits (`ClosedError`), also for an opening, closes what is idle, and waits at most 5 s
    for what is in use and for what is being closed. What is still used after that is named in the log, and closed when
    it comes back if the loop still runs. A cancellation meanwhile ends the wait for what is in use, not for what is
    closing.

    Args:
        factory: makes a resource; an async function, or a plain one, which runs in a thread.
        size: resources at once.
        close: closes one; None calls its own `aclose()` or `close()`, if it has one. What it raises is logged. An async
            one that takes more than 5 s is given up, and its place given back; a plain one in a thread cannot be
            stopped, and keeps its place until it has ended.
        check: says whether one can be used again. It is asked about a suspect one, which it must also put in order (a
            database connection: roll back), and about one that was idle for a second, before it is used. An exception
            and a false value other than None mean no: it is closed and another one is taken. An error that is a
            mistake in the check itself, such as an `AttributeError`, means no as well, and is logged once as a warning.
        idle_timeout: seconds after which an idle resource is closed; None for never.
        name: what the pool is called in errors and the log; None is the factory's name.
        timeout: seconds that `acquire` may take, opening included; None for no limit.

    `close` and `check` may be async. Plain ones run where the factory runs: in a thread, or on the loop beside an async
    factory.

    Raises:
        UsageError: a value that cannot work.
    """

    @overload
    def __init__(
        self,
        factory: Callable[[], Awaitable[R]],
        *,
        size: int,
        close: Callable[[R], object] | None = None,
        check: Callable[[R], object] | None = None,
        idle_timeout: float | None = DEFAULT_IDLE_TIMEOUT,
        name: str | None = None,
        timeout: float | None = None,
    ) -> None: ...

    @overload
    def __init__(
        self,
        factory: Callable[[], R],
        *,
        size: int,
        close: Callable[[R], object] | None = None,
        check: Callable[[R], object] | None = None,
        idle_timeout: float | None = DEFAULT_IDLE_TIMEOUT,
        name: str | None = None,
        timeout: float | None = None,
    ) -> None: ...

    def __init__(
        self,
        factory: Callable[[], Any],
        *,
        size: int,
        close: Callable[[R], object] | None = None,
        check: Callable[[R], object] | None = None,
        idle_timeout: float | None = DEFAULT_IDLE_TIMEOUT,
        name: str | None = None,
        timeout: float | None = None,
    ) -> None:
        _refuse_open_connection(factory, size)
        check_function(factory, "Pool")
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise UsageError(f"size={size!r}: expected a whole number of at least 1 (resources at once).")
        for what, fn in (("close", close), ("check", check)):
            if fn is not None and not callable(fn):
                raise UsageError(f"{what}={fn!r:.100}: expected a function that is given the resource.")
        check_timeout(f"idle_timeout={idle_timeout!r}", idle_timeout)
        check_timeout(f"timeout={timeout!r}", timeout)
        if name is not None and not isinstance(name, str):
            raise UsageError(f"name={name!r:.100}: expected a string.")
        if name is None:
            name = name_of(factory).rpartition(".")[2]
        self._options: _Options[R] = _Options(name, size, factory, close, check, idle_timeout, timeout)
        self._stock: _Stock[R] | None = None

    def __repr__(self) -> str:
        stock, options = self._stock, self._options
        if stock is None:
            return f"<Pool {options.name!r} new size={options.size}>"
        seen = stock.statistics()
        state = "closed" if stock.closed else "open"
        return (
            f"<Pool {options.name!r} {state} size={seen.size} in_use={seen.in_use} idle={seen.idle} "
            f"waiting={seen.waiting}>"
        )

    async def __aenter__(self) -> Self:
        if self._stock is not None:
            raise UsageError("this pool has been opened before. Make a new Pool() for each `async with`.")
        self._stock = _Stock(self._options, asyncio.get_running_loop())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._opened().leave()

    def acquire(self) -> "_Lease[R]":
        """Check a resource out for a block: `async with pool.acquire() as resource: ...`.

        Waits, first in, first out, until one of the `size` places is free; the wait counts into the job's `waited`.

        A task that holds a resource, or was started by one that does, gets a second one only while a place is free or
        about to be: else it would wait for itself, and gets a `DeadlockError`.

        A blocking call that was abandoned in the block (its caller timed out or was cancelled) may go on using the
        resource in its thread. It comes back when the block is left and the thread has ended.

        **Cancellation**: gives the place, or the place in the queue, back; a resource that is just being opened in a
        thread is kept for the next one. **Threads**: loop thread only.

        Raises:
            AttemptTimeout: none was to be had within `timeout`.
            DeadlockError: this task holds one already, and would have to wait for another one.
            ClosedError: the pool is not open, or was left meanwhile.
            WrongThread, WrongLoop: called from elsewhere than the pool's loop thread.
            UsageError: the factory returned something that is to be awaited.
            Exception: what the factory raised.
        """
        stock = self._opened()
        stock.check_usable()
        return _Lease(stock)

    def statistics(self) -> PoolStatistics:
        """What is going on. Loop thread only.

        Raises:
            ClosedError: the pool has not been opened.
        """
        return self._opened().statistics()

    def _opened(self) -> "_Stock[R]":
        if self._stock is None:
            name = self._options.name
            raise ClosedError(f"pool {name!r} is not open yet. Write `async with Pool({name}, size=...) as pool:`.")
        return self._stock


@dataclass(slots=True, eq=False)
class _Unit(Generic[R]):
    """A resource, and since when it is idle."""

    resource: R
    since: float = 0.0


class _Lease(Generic[R]):
    """What `Pool.acquire` returns: an async context manager for one resource, and a `penstock.context.Lease`."""

    __slots__ = ("_asked", "_holder", "_holds", "_since", "_stock", "_suspect", "_unit", "in_block")

    def __init__(self, stock: "_Stock[R]") -> None:
        self._stock = stock
        self._unit: _Unit[R] | None = None
        self._asked = False
        self._holds = 0
        self._suspect = False
        self._holder: RunningJob | asyncio.Task[Any] | None = None
        self._since = 0.0
        self.in_block = False

    async def __aenter__(self) -> R:
        if self._asked:
            raise UsageError("this acquire() has been used. Call pool.acquire() once for each `async with`.")
        self._asked = True
        self._stock.check_usable()
        unit = self._unit = await self._stock.take()
        self.in_block = True
        self._holder = current_job() or asyncio.current_task()
        self._since = self._stock.now()
        self._stock.leased[self] = None
        leases.set((*[lease for lease in leases.get() if not _is_stale(lease)], self))
        return unit.resource

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.in_block = False
        self._suspect = self._suspect or kind is not None
        leases.set(tuple(lease for lease in leases.get() if lease is not self))
        self._give_back_if_free()

    if not TYPE_CHECKING:  # pragma: no branch  # a type checker says it better

        def _refuse(self, *_: object) -> NoReturn:
            raise UsageError(
                "pool.acquire() gives a resource for a block. Write `async with pool.acquire() as resource:`."
            )

        __await__ = __enter__ = __exit__ = _refuse

    @property
    def abandoned(self) -> bool:
        """Whether an abandoned call still uses the resource."""
        return self._holds > 0

    def described(self, now: float) -> str:
        """Who has it, and since when."""
        holder = self._holder
        who = f"task {holder.get_name()!r}" if isinstance(holder, asyncio.Task) else repr(holder)
        how = " (an abandoned call)" if self._holds and not self.in_block else ""
        return f"{who} for {now - self._since:.1f} s{how}"

    def belongs_to(self, stock: "_Stock[Any]") -> bool:
        """Whether it is one of this stock's."""
        return self._stock is stock

    def hold(self) -> None:
        """An abandoned call still uses the resource."""
        self._holds += 1
        self._suspect = True

    def release(self) -> None:
        """That call has really ended."""
        self._holds -= 1
        self._give_back_if_free()

    def _give_back_if_free(self) -> None:
        unit = self._unit
        if unit is not None and not self.in_block and not self._holds:
            self._unit = self._holder = None
            del self._stock.leased[self]
            self._stock.take_back(unit, self._suspect)


class _Stock(Generic[R]):
    """The resources of an open pool: who has them, and their way from opening to closing."""

    def __init__(self, options: _Options[R], loop: asyncio.AbstractEventLoop) -> None:
        self._options = options
        self._loop = loop
        self.now = loop.time
        self._places = PermitQueue(loop, options.size)
        self._lane = None if is_async(options.factory) else Lane(f"pool {options.name}", options.size)
        self._context = _context_of_nobody()
        self.leased: dict[_Lease[R], None] = {}
        self._idle: deque[_Unit[R]] = deque()  # the newest to the right
        self._eviction: asyncio.TimerHandle | None = None
        self._preparing: set[asyncio.Task[_Unit[R]]] = set()
        self._returning: set[asyncio.Task[Any]] = set()  # whose place comes back without anybody's doing
        self._in_vain: set[asyncio.Task[Any]] = set()  # nobody waits for what their threads do
        self._made = self._closed_so_far = 0
        self._told_of_nesting = self._told_of_bug = False
        self.closed = False
        self._over = asyncio.Event()

    def statistics(self) -> PoolStatistics:
        return PoolStatistics(
            size=self._options.size,
            in_use=self._places.in_flight,
            idle=len(self._idle),
            waiting=self._places.waiting,
            abandoned=sum(lease.abandoned for lease in self.leased) + len(self._in_vain),
            made=self._made,
            closed=self._closed_so_far,
        )

    def check_usable(self) -> None:
        loop = asyncio._get_running_loop()
        if loop is None:
            raise WrongThread(
                "pool.acquire() was called from a thread without the pool's event loop. "
                "Acquire in a coroutine on that loop, and give the thread the resource."
            )
        if loop is not self._loop:
            raise WrongLoop(
                "pool.acquire() was called on another event loop than the one it was opened on. "
                "Open one pool for each loop."
            )
        if self.closed:
            raise self._has_been_closed()

    # --- out: a place, and a resource for it ---

    async def take(self) -> _Unit[R]:
        """A place and a resource; nothing is taken if it raises."""
        has_place = self._places.take_nowait()
        if any(isinstance(lease, _Lease) and lease.in_block and lease.belongs_to(self) for lease in leases.get()):
            self._judge_nesting(has_place)
        unit = self._at_hand() if has_place else None
        return unit or await self._take_in_time(has_place)

    def _judge_nesting(self, has_place: bool) -> None:
        name = self._options.name
        if not has_place and len(self._returning) <= self._places.waiting:
            raise DeadlockError(
                f"this task, or the one that started it, holds a resource of pool {name!r} and asks for another one, "
                f"while all {self._options.size} are taken ({self._holders()}): if every holder did so, none would "
                f"ever get it. Pass the resource on as an argument, or leave its block before asking for another one."
            )
        if not self._told_of_nesting:
            self._told_of_nesting = True
            logger.warning(
                "pool %r: a task that holds a resource asks for another one and gets it, since a place is free; when "
                "none is, that raises DeadlockError. Pass the resource on as an argument",
                name,
            )

    async def _take_in_time(self, has_place: bool) -> _Unit[R]:
        timeout = self._options.timeout
        try:
            async with asyncio.timeout(timeout) as scope:
                if not has_place:
                    await self._wait_for_place()
                    has_place = True
                return self._at_hand() or await self._prepared()
        except TimeoutError as error:
            if not scope.expired():
                raise
            missing = "no resource was ready" if has_place else "no place was free"
            raise AttemptTimeout(
                f"pool {self._options.name!r}: {missing} within {timeout:g} s (size {self._options.size}; "
                f"{self._holders()})"
            ) from error

    async def _wait_for_place(self) -> None:
        job = current_job()
        asked = self.now()
        try:
            await self._places.take()
        except BaseException:
            self._note_end()  # it may have had the last place for a moment
            raise
        finally:
            if job is not None:
                job.waited += self.now() - asked
        if self.closed:
            self._place_back()
            raise self._has_been_closed()

    def _at_hand(self) -> _Unit[R] | None:
        """The resource that was used last, if there is one and it needs no check."""
        return self._idle.pop() if self._idle and not self._stood_long(self._idle[-1]) else None

    async def _prepared(self) -> _Unit[R]:
        """A resource that was checked or made in a task of the pool's own, which has the place until then."""
        # In the context of who asks, who may be a thread: without it, nobody would know that a thread waits for this.
        task = self._start(self._prepare(), _context_of_nobody())
        self._preparing.add(task)
        task.add_done_callback(self._preparing.discard)
        try:
            await asyncio.wait([task])
            if self.closed:
                raise self._has_been_closed()
            return task.result()
        except BaseException:
            self._disown(task)
            raise
        finally:
            del task  # its exception's traceback holds this frame: a cycle

    def _disown(self, task: "asyncio.Task[_Unit[R]]") -> None:
        """Nobody waits for it any more: keep what it makes for the next one."""
        if task.done():
            self._settle(task)
            return
        if self._lane is None:
            task.cancel()
        else:  # a thread cannot be stopped
            self._in_vain.add(task)
            task.add_done_callback(self._in_vain.discard)
        self._returning.add(task)
        task.add_done_callback(self._settle_late)

    def _settle_late(self, task: "asyncio.Task[_Unit[R]]") -> None:
        self._returning.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.warning(
                "pool %r: opening a resource failed when nobody waited for it any more: %s",
                self._options.name, first_line(error),
            )  # fmt: skip
        self._settle(task)

    def _settle(self, task: "asyncio.Task[_Unit[R]]") -> None:
        if task.cancelled() or task.exception() is not None:
            self._place_back()
        else:
            self.take_back(task.result(), suspect=False)

    async def _prepare(self) -> _Unit[R]:
        while self._idle:
            unit = self._idle.pop()
            if not self._stood_long(unit) or await self._is_well(unit):
                return unit
            await self._close_to_the_end(unit)
        resource: R = await self._call(self._options.factory)
        if self._lane is not None and inspect.isawaitable(resource):
            factory = name_of(self._options.factory)
            raise UsageError(
                f"{factory} returned an object that is to be awaited ({type(resource).__qualname__}). "
                f"Make it `async def`, and await that in it."
            )
        self._made += 1
        return _Unit(resource)

    # --- back: the place is still taken ---

    def take_back(self, unit: _Unit[R], suspect: bool) -> None:
        """Keep it or close it, and give its place back."""
        if self.closed or (suspect and self._options.check is None):
            self._send_off(self._close(unit))
        elif suspect:
            self._send_off(self._keep_if_well(unit))
        else:
            self._keep(unit)
            self._place_back()

    def _send_off(self, last: Coroutine[Any, Any, None]) -> None:
        """Give a place back when `last` is done."""
        task = self._start(last)
        self._returning.add(task)
        task.add_done_callback(self._returned)

    def _returned(self, task: "asyncio.Task[None]") -> None:
        self._returning.discard(task)
        self._place_back()

    async def _keep_if_well(self, unit: _Unit[R]) -> None:
        if await self._is_well(unit) and not self.closed:
            self._keep(unit)
        else:
            await self._close_to_the_end(unit)

    def _place_back(self) -> None:
        self._places.give_back()
        self._note_end()

    def _note_end(self) -> None:
        if self.closed and not self._places.in_flight:
            self._over.set()
            if self._lane is not None:
                self._lane.close()

    # --- idle ---

    def _keep(self, unit: _Unit[R]) -> None:
        unit.since = self.now()
        self._idle.append(unit)
        self._set_timer()

    def _stood_long(self, unit: _Unit[R]) -> bool:
        return self._options.check is not None and self.now() - unit.since >= CHECK_AFTER

    def _set_timer(self) -> None:
        """One timer, for the resource that has been idle for longest."""
        if self._eviction is None and self._idle and self._options.idle_timeout is not None:
            self._eviction = self._loop.call_at(self._idle[0].since + self._options.idle_timeout, self._evict)

    def _evict(self) -> None:
        self._eviction = None
        idle_timeout = self._options.idle_timeout
        assert idle_timeout is not None, "else there is no timer"
        # Without a place for closing it, it is meant for someone who has been admitted and will run in a moment.
        while self._idle and self._idle[0].since + idle_timeout <= self.now() and self._places.take_nowait():
            self._send_off(self._close(self._idle.popleft()))
        self._set_timer()

    # --- what the user gave us ---

    async def _is_well(self, unit: _Unit[R]) -> bool:
        check = self._options.check
        assert check is not None, "a resource is suspect, or stands long, only where there is a check"
        on_loop = self._lane is None or is_async(check)
        scope = asyncio.timeout(PATIENCE if on_loop else None)
        try:
            async with scope:
                answer = await self._call(check, unit.resource)
            well = answer is None or bool(answer)
            reason = "its check said so"
        except Exception as error:  # noqa: BLE001  # whatever it is, the resource has failed its check
            well = False
            self._tell_of_bug(error)
            reason = f"no answer to its check within {PATIENCE:g} s" if scope.expired() else first_line(error)
        except BaseException:
            # Cancelled half-way: nobody knows its state. One that a thread may use is left to the garbage collector.
            if on_loop:
                await self._close_to_the_end(unit)
            raise
        if not well:
            logger.info("pool %r: a resource is of no use any more and is replaced: %s", self._options.name, reason)
        return well

    def _tell_of_bug(self, error: Exception) -> None:
        if classify(error) is FailureKind.BUG and not self._told_of_bug:
            self._told_of_bug = True
            logger.warning(
                "pool %r: its check raised %s, which is a mistake in the check: each resource that is checked is "
                "replaced",
                self._options.name, type(error).__name__, exc_info=error,
            )  # fmt: skip

    async def _close_to_the_end(self, unit: _Unit[R]) -> None:
        """Close it; a cancellation comes out when that is done."""
        closing = self._start(self._close(unit))
        try:
            await asyncio.wait([closing])
        except BaseException:
            await asyncio.wait([closing])  # it has a bound of its own, or is a thread's and cancelled as this one was
            raise

    async def _close(self, unit: _Unit[R]) -> None:
        """Close it: on the loop within its time, in a thread for as long as that takes. No error comes out."""
        try:
            own = self._options.close
            close = _own_close(unit.resource) if own is None else partial(own, unit.resource)
            if close is not None:
                await self._call_close(close)
        except Exception as error:  # noqa: BLE001  # the user's own error must not be lost over it
            logger.warning("pool %r: closing a resource failed: %s", self._options.name, first_line(error))
        finally:
            self._closed_so_far += 1

    async def _call_close(self, close: Callable[[], object]) -> None:
        on_loop = self._lane is None or is_async(close)
        slow = None if on_loop else self._loop.call_later(PATIENCE, self._note_slow_close, asyncio.current_task())
        scope = asyncio.timeout(PATIENCE if on_loop else None)
        try:
            async with scope:
                await self._call(close)
        except Exception:
            if not scope.expired():
                raise
            logger.warning(
                "pool %r: closing a resource takes more than %g s and is given up", self._options.name, PATIENCE
            )
        finally:
            if slow is not None:
                slow.cancel()

    def _note_slow_close(self, closing: "asyncio.Task[Any] | None") -> None:
        assert closing is not None, "each close is a task or in one"
        self._in_vain.add(closing)
        closing.add_done_callback(self._in_vain.discard)
        logger.warning(
            "pool %r: closing a resource takes more than %g s; it keeps its place until its thread has ended",
            self._options.name, PATIENCE,
        )  # fmt: skip

    async def _call(self, fn: Callable[..., Any], *args: R) -> Any:
        """Call it where the resources are at home."""
        if self._lane is None or is_async(fn):
            value = fn(*args)
            return await value if inspect.isawaitable(value) else value
        value = await self._lane.call(fn, *args)
        refuse_coroutine(value, name_of(fn))
        return value

    def _start(self, coroutine: Coroutine[Any, Any, T], context: Context | None = None) -> "asyncio.Task[T]":
        name = f"penstock-pool-{self._options.name}"
        context = self._context.copy() if context is None else context
        return self._loop.create_task(coroutine, name=name, context=context)

    # --- the end ---

    async def leave(self) -> None:
        """Take everything back and close it, within its time."""
        self.closed = True
        end = self.now() + PATIENCE
        if self._lane is None:
            for task in self._preparing:  # nobody would get it
                task.cancel()
        self._places.resize(sys.maxsize)  # who waits is admitted, to be told
        if self._eviction is not None:
            self._eviction.cancel()
        while self._idle:
            self._places.take_nowait()
            self._send_off(self._close(self._idle.popleft()))
        self._note_end()
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(end):
                    await self._over.wait()
        finally:
            await self._wait_for_closing(end - self.now())
            if self._places.in_flight:
                logger.warning(
                    "pool %r was left while %d of its resources are in use; each is closed when it comes back: %s",
                    self._options.name, self._places.in_flight, self._holders(),
                )  # fmt: skip

    async def _wait_for_closing(self, remaining: float) -> None:
        """Wait for what is being closed, and for what has been cancelled, if the first wait was cut short."""
        ending: list[asyncio.Task[Any]] = [*self._returning]
        if self._lane is None:
            ending += self._preparing
        if ending and remaining > 0:
            await asyncio.wait(ending, timeout=remaining)

    def _has_been_closed(self) -> ClosedError:
        return ClosedError(
            f"pool {self._options.name!r} has been closed. Acquire inside `async with Pool(...) as pool:`, and leave "
            f"the executor before the pool: `async with Pool(...) as pool, Executor() as executor:`."
        )

    def _holders(self) -> str:
        now = self.now()
        named = [lease.described(now) for lease in list(self.leased)[:MOST_NAMED]]
        if len(self.leased) > MOST_NAMED:
            named.append(f"{len(self.leased) - MOST_NAMED} more")
        others = self._places.in_flight - len(self.leased)
        if others:
            named.append(f"{others} being opened, checked or closed")
        return "in use by " + ", ".join(named) if named else "none in use"


def _own_close(resource: object) -> Callable[[], object] | None:
    for name in ("aclose", "close"):
        close = getattr(resource, name, None)
        if callable(close):
            return close  # type: ignore[no-any-return]
    return None


def _refuse_open_connection(factory: object, size: object) -> None:
    """Refuse a connection of the DB API that is open: that of sqlite3 can be called, and would pass for a function."""
    kind = type(factory)
    if hasattr(kind, "cursor") and hasattr(kind, "close"):
        raise UsageError(
            f"Pool: found an open connection ({kind.__qualname__}), expected a function that makes one: the pool calls "
            f"it for each. Write `Pool(connect, size={size!r})`, where `connect()` returns a connection."
        )


def _is_stale(lease: object) -> bool:
    return isinstance(lease, _Lease) and not lease.in_block


def _context_of_nobody() -> Context:
    """The current context, but not as its job's: what is done in it is done for all."""
    context = copy_context()
    context.run(enter, None)
    context.run(leases.set, ())
    return context
