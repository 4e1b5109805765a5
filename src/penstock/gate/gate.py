"""The gate in front of a service: permits, retries, time-outs, one queue per service key.

The way of one round trip:

    call -> [queue of the key: permit] -> attempt, under its timeout -> permit back -> value
                 ^                            | failed
                 |                            v
                 +---- due again <---- back-off, holding nothing <---- policy: may it be repeated?

Guarantees: a permit is held while an attempt runs and at no other time (for `permit()` and `begin()`: until it is
given back); a server's `Retry-After` pauses the whole key, not just the call that heard it; `CancelledError` is never
retried, swallowed or turned into anything else; the last error is raised as it came, with its attempts as a note.

Everything here belongs to the loop thread.
"""

import asyncio
import logging
import random
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from types import TracebackType
from typing import Any, TypeVar, overload

from penstock.callables import check_function, is_async, name_of, refuse_coroutine
from penstock.context import RunningJob, current_job
from penstock.errors import AttemptTimeout, UsageError, WrongLoop, first_line
from penstock.gate.deadlines import Deadlines
from penstock.gate.in_thread import CallInThread
from penstock.gate.retry import Retry, RetryPolicy, check_timeout
from penstock.gate.round_trip import RoundTrip
from penstock.gate.server_hints import hint_of
from penstock.gate.service import KeyStatistics, Service
from penstock.outcome import FailureKind, classify
from penstock.threads.backlog import tell_of_backlog
from penstock.threads.crossing import Crossing
from penstock.threads.workers import SHARED, Workers

logger = logging.getLogger("penstock.gate")

T = TypeVar("T")

DEFAULT_LIMIT = 128
"""Arbitrary, because: no fixed number fits an unknown service. 128 keeps one loop busy at 50 ms a round trip."""
DEFAULT_TIMEOUT = 60.0
"""Seconds. Arbitrary, because: longer than a sound service takes, shorter than a person's patience."""
MOST_IDLE_KEYS = 1_024
"""Arbitrary, because: it bounds memory when keys come and go; a key in use is never dropped."""
WORTH_TELLING = 5.0
"""Seconds of a pause that is logged. Arbitrary, because: a person begins to wonder."""
LONGEST_PILE = 0.02
"""Seconds of processing that an answer may find before it: the queue delay at which Finagle's filter rejects."""
HINT_JITTER = 0.1
"""Share of a server's wait by which it is lengthened at random, so that not all clients come back at once."""


class Gate:
    """Guards calls to a service: caps what is in flight, retries what may be retried, gives each attempt its time.

    A gate is cheap, needs no opening or closing, and may be shared by all jobs of one event loop.

        gate = Gate("geocoder", limit=20, retry=Retry(attempts=4), timeout=5.0)
        place = await gate.call(geocode, address)

    Args:
        name: what it is called in errors and statistics.
        limit: round trips in flight at once, for each key.
        retry: the policy; `Retry(attempts=1)` for none.
        timeout: seconds for one attempt, counted from its admission; None for no limit.
        key: a function that is given the arguments of `call` and returns the service key (any hashable). Each key
            has a queue, a limit and pauses of its own. None: one key for all calls.

    Raises:
        UsageError: a value that cannot work.
    """

    def __init__(
        self,
        name: str,
        *,
        limit: int = DEFAULT_LIMIT,
        retry: Retry | None = None,
        timeout: float | None = DEFAULT_TIMEOUT,
        key: Callable[..., Hashable] | None = None,
    ) -> None:
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise UsageError(f"limit={limit!r}: expected a whole number of at least 1 (round trips in flight).")
        check_timeout(f"timeout={timeout!r}", timeout)
        if retry is not None and not isinstance(retry, Retry):
            raise UsageError(f"retry={retry!r}: expected a policy. Write retry=Retry(attempts=3).")
        if key is not None and not callable(key):
            raise UsageError(f"key={key!r}: expected a function that is given the arguments and returns the key.")
        self.name = name
        self.limit = limit
        self.retry = Retry() if retry is None else retry
        self._timeout = timeout
        self._key = key
        self._policy = RetryPolicy(self.retry)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._deadlines: Deadlines | None = None
        self._services: OrderedDict[Hashable, Service] = OrderedDict()
        self._crossing: Crossing | None = None

    def __repr__(self) -> str:
        in_flight = sum(service.in_flight for service in self._services.values())
        waiting = sum(service.waiting for service in self._services.values())
        return f"<Gate {self.name!r} limit={self.limit} keys={len(self._services)} {in_flight=} {waiting=}>"

    @overload
    async def call(self, fn: Callable[..., Awaitable[T]], /, *args: Any, **kwargs: Any) -> T: ...

    @overload
    async def call(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> T: ...

    async def call(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call `fn(*args, **kwargs)` through the gate and return its value.

        `fn` is called once for each attempt, so it must be a function and not a coroutine object. A plain function
        runs in a thread, which is taken together with the permit. One that takes too long cannot be stopped: it goes
        on, and keeps its permit until it ends, also while the next attempt runs.

        **Cancellation**: the attempt or the wait is cancelled; nothing is retried, nothing stays taken.
        **Threads**: loop thread only.

        Raises:
            AttemptTimeout: the last attempt, or all attempts with their waits, took too long.
            UsageError: `fn` cannot be called, or returned a coroutine that nobody awaits.
            Exception: what the last attempt raised, unchanged, with a note on all attempts.
        """
        check_function(fn, "gate.call")
        key = None if self._key is None else self._key(*args, **kwargs)
        if is_async(fn):
            return await self.perform(_AsyncCall(fn, args, kwargs), key)
        service = self.service(key)
        trip = CallInThread(self.crossing(), service, name_of(fn), fn, args, kwargs)
        return await self.perform(trip, key)

    def permit(self, *, key: Hashable = None) -> "_Permit":
        """A permit for a round trip that you do yourself: `async with gate.permit(): ...`.

        Waits in the key's queue and holds the permit until the block is left. No retry, no timeout. A job that takes a
        second permit of the same key while it holds one may wait for itself.

        **Cancellation**: gives the permit, or the place in the queue, back. **Threads**: loop thread only.
        """
        return _Permit(self, key)

    def statistics(self) -> dict[Hashable, KeyStatistics]:
        """What is going on, by service key. Any thread, though only the loop thread sees numbers of one moment."""
        return {
            key: service.statistics(() if self._crossing is None else self._crossing.abandoned(service))
            for key, service in list(self._services.items())
        }

    async def perform(self, trip: RoundTrip[T], key: Hashable = None) -> T:
        """Like `call`, for a `RoundTrip` that knows itself what may be repeated."""
        service = self.service(key)
        value = await self.begin(trip, service)
        trip.over(service)
        return value

    def hold_back(self, pile: float) -> bool:
        """There are `pile` seconds of processing to do; True if a key is held back for that. For the backlog alone."""
        if asyncio.get_running_loop() is not self._loop:  # it serves another one meanwhile
            return False
        held = False
        for service in self._services.values():
            late = pile > service.latency.mean + LONGEST_PILE
            service.hold_back(late)
            held |= late
        return held

    def service(self, key: Hashable) -> Service:
        """The queue of a service key, made at first use."""
        if asyncio.get_running_loop() is not self._loop:
            self._move_to(asyncio.get_running_loop())
        service = self._services.get(key)
        return self._add(key) if service is None else service

    def crossing(self, workers: Workers = SHARED) -> Crossing:
        """The books of the blocking calls through this gate; made at first use, for threads of `workers`."""
        if asyncio.get_running_loop() is not self._loop:
            self._move_to(asyncio.get_running_loop())
        if self._crossing is None:
            self._crossing = Crossing(self.name, workers)
        return self._crossing

    async def begin(self, trip: RoundTrip[T], service: Service, *, asked: float | None = None) -> T:
        """Attempt `trip` until it works; return its value with the permit still held: `trip.over(service)` is owed.

        `asked`: when it was first asked for, on the loop's clock, if it is the continuation of an earlier round trip.
        """
        job = current_job()
        now = service.now
        if asked is None:
            asked = now()
        deadline = None if self._policy.timeout is None else asked + self._policy.timeout
        history: list[str] = []
        while True:
            if not service.take_nowait(trip.needs):
                await self._wait_for_permit(trip, service, job, deadline, history)
            started = now()
            if deadline is not None and started >= deadline:
                trip.over(service)
                raise self._too_late(trip, "the attempt could not start in time", history)
            service.attempts += 1
            service.retries += bool(history)
            if job is not None:
                job.attempts += 1
            try:
                value = await self._attempt(trip, started, deadline)
            except Exception as error:  # noqa: BLE001  # raised again below unless it is retried
                failure = error
            except BaseException:
                trip.over(service)
                raise
            else:
                service.count_success(now() - started)
                return value
            try:
                service.count_failure(failure)
                history.append(f"attempt {len(history) + 1} took {now() - started:.3f} s: {first_line(failure)}")
                back_off = self._back_off(trip, service, failure, history, asked, deadline)
                if back_off is None:
                    raise failure
            finally:
                trip.over(service)  # after a pause was noted, or the next in line would slip through before it
                del failure  # its traceback holds this frame: a cycle that would keep the job's data alive
            await _sleep(back_off, service, job)

    def _back_off(
        self,
        trip: RoundTrip[Any],
        service: Service,
        failure: Exception,
        history: list[str],
        asked: float,
        deadline: float | None,
    ) -> float | None:
        """Seconds until the next attempt may ask for a permit; None, with a note on `failure`, if there is to be none.

        A server that asks for less pauses the key even so: others are about to call it too. The pause is not slept
        off here but waited for in the key's queue, so that at its end the retries come before fresh work.
        """
        now = service.now()
        decision = self._policy.decide(failure, len(history), asked, now)
        if not isinstance(decision, str) and not trip.repeatable(failure):
            decision = "it may have been carried out, and is not declared idempotent"
        refused = isinstance(decision, str)
        hint = hint_of(failure)
        if hint is not None and (not refused or classify(failure) is FailureKind.THROTTLED):
            self._pause(service, hint * (1.0 + random.uniform(0.0, HINT_JITTER)))
        if not isinstance(decision, str):
            starts_in = max(decision, service.paused_for)
            if deadline is None or now + starts_in < deadline:
                return decision
            decision = f"the next attempt would start in {starts_in:.1f} s, after the end of Retry(timeout=)"
        self._annotate(failure, decision, history)
        return None

    def _pause(self, service: Service, duration: float) -> None:
        if duration > WORTH_TELLING and not service.paused_for:
            logger.warning(
                "gate %r: the server asks for a pause of %.0f s; nothing is sent so long", self.name, duration
            )
        service.pause(duration)

    def _too_late(self, trip: RoundTrip[Any], what: str, history: list[str]) -> AttemptTimeout:
        late = AttemptTimeout(f"{trip}: {what}")
        self._annotate(late, f"Retry(timeout={self._policy.timeout:g}) was over", history)
        return late

    def _annotate(self, error: Exception, why: str, history: list[str]) -> None:
        """Attach the account of all attempts, in the place of an earlier one: an exception may be raised many times."""
        start = f"gate {self.name!r} gave up: "
        notes: list[str] = getattr(error, "__notes__", [])
        notes[:] = [note for note in notes if not note.startswith(start)]
        error.add_note("\n  ".join([start + why, *history]))

    async def _attempt(self, trip: RoundTrip[T], started: float, deadline: float | None) -> T:
        """One attempt within its time: the gate's timeout, or what is left of `Retry(timeout=)` if that is less."""
        deadlines = self._deadlines
        if deadline is not None and (deadlines is None or deadline < started + deadlines.timeout):
            return await self._attempt_until(trip, deadline)
        if deadlines is None:
            return await trip.attempt()
        own = deadlines.start(started)
        try:
            return await trip.attempt()
        except asyncio.CancelledError as error:
            if not own.has_cancelled:
                raise
            what = f"no answer within {deadlines.timeout:g} s (timeout of one attempt)"
            raise AttemptTimeout(f"{trip}: {what}") from error
        finally:
            deadlines.end(own)

    async def _attempt_until(self, trip: RoundTrip[T], deadline: float) -> T:
        try:
            async with asyncio.timeout_at(deadline) as scope:
                return await trip.attempt()
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise AttemptTimeout(
                f"{trip}: no answer before the end of Retry(timeout={self._policy.timeout:g})"
            ) from error

    async def _wait_for_permit(
        self,
        trip: RoundTrip[Any],
        service: Service,
        job: RunningJob | None,
        deadline: float | None,
        history: list[str],
    ) -> None:
        asked = service.now()
        if deadline is not None and asked + service.paused_for >= deadline:
            raise self._too_late(trip, f"gate {self.name!r} is paused for {service.paused_for:.1f} s", history)
        try:
            async with asyncio.timeout_at(deadline):
                await trip.wait(service, again=bool(history))
        except TimeoutError as error:
            paused = f", which is paused for another {service.paused_for:.1f} s" if service.paused_for else ""
            reason = trip.why_waiting(service)
            why = f": {reason}" if reason else paused
            what = f"got no permit of gate {self.name!r} in {service.now() - asked:g} s{why}"
            raise self._too_late(trip, what, history) from error
        except asyncio.CancelledError as error:
            if reason := trip.why_waiting(service):
                error.add_note(reason)
            raise
        finally:
            if job is not None:
                job.waited += service.now() - asked

    def _add(self, key: Hashable) -> Service:
        assert self._loop is not None, "service() has bound the loop"
        if len(self._services) >= MOST_IDLE_KEYS:
            self._drop_idle_keys()
        service = self._services[key] = Service(self._loop, self.limit)
        return service

    def _drop_idle_keys(self) -> None:
        # Half of them at once, so that the search through the keys in use is not paid for each new key.
        idle = [key for key, service in self._services.items() if service.idle]
        for key in idle[: MOST_IDLE_KEYS // 2]:
            del self._services[key]

    def _move_to(self, loop: asyncio.AbstractEventLoop) -> None:
        """Belong to `loop` from now on; a gate outlives the loop of one `asyncio.run`, but serves one at a time."""
        old = self._loop
        if old is not None and not old.is_closed() and any(not s.idle for s in self._services.values()):
            raise WrongLoop(
                f"gate {self.name!r} is in use on another event loop. A gate serves one loop at a time: "
                f"make one gate for each loop, or finish there first."
            )
        self._loop = loop
        self._deadlines = None if self._timeout is None else Deadlines(loop, self._timeout)
        self._services.clear()
        self._crossing = None
        tell_of_backlog(loop, self)


class _AsyncCall(RoundTrip[Any]):
    """A call of the user's async function as a round trip."""

    __slots__ = ("args", "fn", "kwargs")

    def __init__(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.fn = fn
        self.args = args
        self.kwargs = kwargs

    async def attempt(self) -> Any:
        value = await self.fn(*self.args, **self.kwargs)
        refuse_coroutine(value, self)
        return value

    def repeatable(self, _error: Exception) -> bool:
        return True

    def __str__(self) -> str:
        return name_of(self.fn)


class _Permit:
    """What `Gate.permit` returns: an async context manager for one permit."""

    __slots__ = ("_gate", "_key", "_service")

    def __init__(self, gate: Gate, key: Hashable) -> None:
        self._gate = gate
        self._key = key
        self._service: Service | None = None

    async def __aenter__(self) -> None:
        if self._service is not None:
            raise UsageError("this permit is already in use. Call gate.permit() once for each `async with`.")
        service = self._service = self._gate.service(self._key)
        if service.take_nowait():
            return
        job = current_job()
        asked = service.now()
        try:
            await service.take()
        except BaseException:
            self._service = None
            raise
        finally:
            if job is not None:
                job.waited += service.now() - asked

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._service is not None, "entered before it is left"
        service, self._service = self._service, None
        service.give_back()


async def _sleep(duration: float, service: Service, job: RunningJob | None) -> None:
    started = service.now()
    service.backing_off += 1
    try:
        await asyncio.sleep(duration)
    finally:
        service.backing_off -= 1
        if job is not None:
            job.waited += service.now() - started
