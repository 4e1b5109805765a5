"""The gate in front of a service: permits, rates, retries, time-outs, a breaker, one queue per service key.

The way of one round trip:

    call -> [queue of the key] -> permit, tokens, thread -> attempt, under its timeout -> permit back -> value
              ^  ^    at its head, in one look: breaker . pause . rate . in flight < limit . a thread
              |  |                                             | failed
              |  |                                             v
              |  +-- due again, before fresh work <-- back-off, holding nothing <-- policy: may it be repeated?
              +----- behind fresh work <-- wait until affordable <-- budget: no <--------+

Guarantees: a permit is held while an attempt runs and at no other time (for `permit()` and `begin()`: until it is
given back); what a server says of its rates counts for the whole key, not just for the call that heard it;
`CancelledError` is never retried, swallowed or turned into anything else; the last error is raised as it came, with its
attempts as a note.

Everything here belongs to the loop thread.
"""

import asyncio
import logging
import random
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Mapping
from dataclasses import replace
from typing import Any, TypeVar, overload

from penstock import clock
from penstock.callables import check_function, is_async, name_of, refuse_coroutine
from penstock.context import RunningJob, current_job
from penstock.errors import AttemptTimeout, CircuitOpen, UsageError, WrongLoop, first_line
from penstock.gate.adaptive import Adaptive
from penstock.gate.breaker import Breaker
from penstock.gate.budget import RETRY_COST, THROTTLED_RETRY_COST
from penstock.gate.deadlines import Deadlines
from penstock.gate.guard import Guard, guard_of
from penstock.gate.in_thread import CallInThread
from penstock.gate.limiter import LimitRule
from penstock.gate.permit import Permit
from penstock.gate.rate import Rates, Weight, amounts, checked_rates
from penstock.gate.retry import Retry, RetryPolicy, check_timeout
from penstock.gate.round_trip import RoundTrip, headers_of
from penstock.gate.server_hints import REQUESTS, ServerHints, hint_of, hints_of
from penstock.gate.service import PROCESSING, WORTH_TELLING, KeyStatistics, Rules, Service, Tag
from penstock.outcome import FailureKind, classify, provably_unsent
from penstock.threads.backlog import tell_of_backlog
from penstock.threads.crossing import Crossing
from penstock.threads.workers import SHARED, Workers

logger = logging.getLogger("penstock.gate")

T = TypeVar("T")

DEFAULT_TIMEOUT = 60.0
"""Seconds. Arbitrary, because: longer than a sound service takes, shorter than a person's patience."""
MOST_IDLE_KEYS = 1_024
"""Arbitrary, because: it bounds memory when keys come and go; a key in use is never dropped."""
DEFAULT_LIMIT = Adaptive()
"""Measured: no fixed number fits an unknown service."""
DEFAULT_BREAKER = Breaker()
JUST_NOW = 0.001
"""Seconds. Arbitrary, because: longer than the way into the queue, and nobody minds a deadline that is so much late."""
LONGEST_PILE = 0.02
"""Seconds of processing that an answer may find before it: the queue delay at which Finagle's filter rejects."""
HINT_JITTER = 0.1
"""Share of a server's wait by which it is lengthened at random, so that not all clients come back at once."""


class Gate:
    """Guards calls to a service: finds out how many it can take, keeps its rates, retries, gives each attempt its time.

    A gate is cheap, needs no opening or closing, and may be shared by all jobs of one event loop.

        gate = Gate("geocoder", rate=Rate(50, per=1.0), retry=Retry(attempts=4), timeout=5.0)
        place = await gate.call(geocode, address)

    All of what follows holds for each key on its own. `limit`, `rate` and `breaker` can be read and set at any time.

    Args:
        name: what it is called in errors and statistics.
        limit: round trips in flight at once: a number, or the rule by which it is measured. The default finds out.
        rate: starts in a time; a `Rate` for requests, or several by name, such as
            `{"requests": Rate(500, per=60), "tokens": Rate(90_000, per=60)}`. What a server tells of its own rates is
            obeyed with and without it.
        retry: the policy; `Retry(attempts=1)` for none.
        breaker: when to leave a service alone that fails; None for never.
        timeout: seconds for one attempt, counted from its admission; None for no limit.
        key: a function that is given the arguments of `call` and returns the service key (any hashable). Each key
            has a queue, limits and pauses of its own. None: one key for all calls.
        weight: a function that is given the arguments of `call` and returns what the call takes of each rate: a number
            of requests, or amounts by name. None: one request.
        used: a function that is given the value of a call and returns what it really took, by name. What was taken
            beyond that is given back, what was not taken is taken then. None: what `weight` says.

    Raises:
        UsageError: a value that cannot work.
    """

    def __init__(
        self,
        name: str,
        *,
        limit: int | LimitRule = DEFAULT_LIMIT,
        rate: Rates | None = None,
        retry: Retry | None = None,
        breaker: Breaker | None = DEFAULT_BREAKER,
        timeout: float | None = DEFAULT_TIMEOUT,
        key: Callable[..., Hashable] | None = None,
        weight: Callable[..., Weight] | None = None,
        used: Callable[[Any], Mapping[str, float] | None] | None = None,
    ) -> None:
        check_timeout(f"timeout={timeout!r}", timeout)
        _check_function("key", key, "the arguments and returns the key")
        _check_function("weight", weight, "the arguments and returns what the call takes of each rate")
        _check_function("used", used, "the value and returns what the call took of each rate")
        self.name = name
        self._retry = _checked_retry(retry)
        self._rules = Rules(
            limit=_checked_limit(limit),
            rate=checked_rates(rate),
            breaker=_checked_breaker(breaker),
            budget=self._retry.budget,
        )
        self._timeout = timeout
        self._key = key
        self._weight = weight
        self._used = used
        self._policy = RetryPolicy(self._retry)
        self._rng = random.Random(random.getrandbits(64))
        self._told_of_used = False
        self._sweep_at = MOST_IDLE_KEYS
        """The number of keys at which idle ones are looked for."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._guard: Guard | None = None
        self._deadlines: Deadlines | None = None
        self._waits: Deadlines | None = None
        """The ends of `Retry(timeout=)` of those who wait for their first attempt."""
        self._services: OrderedDict[Hashable, Service] = OrderedDict()
        self._crossing: Crossing | None = None

    def __repr__(self) -> str:
        in_flight = sum(service.in_flight for service in self._services.values())
        waiting = sum(service.waiting for service in self._services.values())
        return f"<Gate {self.name!r} limit={self.limit} keys={len(self._services)} {in_flight=} {waiting=}>"

    @property
    def limit(self) -> int | LimitRule:
        """Round trips in flight at once, for each key: a number, or the rule by which it is measured.

        Set it at any time, on the loop thread: a larger number lets through at once, a smaller one as permits come
        back; a rule begins to measure anew.
        """
        return self._rules.limit

    @limit.setter
    def limit(self, limit: int | LimitRule) -> None:
        self._rules = replace(self._rules, limit=_checked_limit(limit))
        for service in self._services.values():
            service.set_limit(limit)

    @property
    def rate(self) -> Rates | None:
        """Starts in a time. Set it at any time, on the loop thread; what a server has told stays."""
        return self._rules.rate

    @rate.setter
    def rate(self, rate: Rates | None) -> None:
        self._rules = replace(self._rules, rate=checked_rates(rate))
        for service in self._services.values():
            service.set_rate(rate)

    @property
    def breaker(self) -> Breaker | None:
        """When to leave a service alone. Set it at any time, on the loop thread: one that is open closes."""
        return self._rules.breaker

    @breaker.setter
    def breaker(self, breaker: Breaker | None) -> None:
        self._rules = replace(self._rules, breaker=_checked_breaker(breaker))
        for service in self._services.values():
            service.set_breaker(breaker)

    @property
    def retry(self) -> Retry:
        """The policy. Set it at any time, on the loop thread; calls that are under way go by it
        from their next attempt on, within the time that they had."""
        return self._retry

    @retry.setter
    def retry(self, retry: Retry | None) -> None:
        self._retry = _checked_retry(retry)
        self._policy = RetryPolicy(self._retry)
        self._rules = replace(self._rules, budget=self._retry.budget)
        if self._loop is not None:
            self._waits = None if self._retry.timeout is None else Deadlines(self._loop, self._retry.timeout)
        for service in self._services.values():
            service.set_budget(self._retry.budget)

    def bound(self, most: int) -> None:
        """Measure no limits beyond `most`, all keys together. To be called before there are any; for clients."""
        self._rules = replace(self._rules, most=most)

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
        weight = None if self._weight is None else amounts(self._weight(*args, **kwargs))
        service = self.service(key)
        trip: RoundTrip[Any]
        if is_async(fn):
            trip = _AsyncCall(fn, args, kwargs)
        else:
            trip = CallInThread(self.crossing(), service, name_of(fn), fn, args, kwargs)
        trip.weight = weight
        return await self.perform(trip, key)

    def permit(self, *, key: Hashable = None, weight: Weight | None = None) -> Permit:
        """A permit for a round trip that you do yourself: `async with gate.permit() as permit: ...`.

        Waits in the key's queue and holds the permit until the block is left; how it is left tells how the round trip
        went: see `Permit`. No retry, no timeout. A job that takes a second permit of the same key while it holds one
        may wait for itself.

        Args:
            key: the service key.
            weight: what it takes of each rate: a number of requests, or amounts by name.

        **Cancellation**: gives the permit, or the place in the queue, back. **Threads**: loop thread only.

        Raises:
            UsageError: `weight` can never fit.
            CircuitOpen: on entering: the breaker is open, and to fail fast.
        """
        return Permit(self, key, amounts(weight))

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
            service.hold_back(PROCESSING, late)
            held |= late
        return held

    def beat(self, share: float, lag: float, lagging: bool) -> None:
        """The loop's heartbeat: what share of its limits it can carry, and how late it was. For the guard alone."""
        for service in self._services.values():
            service.beat(share, lag, lagging)
        if self._rules.most is not None and len(self._services) > 1:
            self._share_out(self._rules.most)

    def _share_out(self, most: int) -> None:
        """All keys together use no more than there is, such as connections."""
        in_use = [service for service in self._services.values() if not service.idle]
        for service in in_use:
            service.bound(max(1, most // len(in_use)))

    def total_limit(self) -> int:
        """Round trips that the services in use can take at once, whatever the loop can carry."""
        return sum(service.unshared for service in self._services.values() if not service.idle)

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
        guard = self._guard
        assert guard is not None, "service() has bound the loop"
        now = service.now
        if asked is None:
            asked = now()
        if trip.weight is not None:
            service.refuse_what_never_fits(trip.weight)
        policy = self._policy
        deadline = None if policy.timeout is None else asked + policy.timeout
        history: list[str] = []
        cost = 0.0
        in_turn = False
        while True:
            if service.refuses or not service.take_nowait(trip.needs, trip.weight):
                await self._wait_for_permit(trip, service, job, deadline, history, again=in_turn)
            started = now()
            if deadline is not None and started >= deadline:
                service.give_tokens_back(trip.weight)
                trip.over(service)
                raise self._too_late(trip, "the attempt could not start in time", history)
            try:
                tag = service.start(started, bool(history))
            except BaseException:  # of a limit that is somebody else's rule
                service.give_tokens_back(trip.weight)
                trip.over(service)
                raise
            if guard.quiet:
                guard.stir()
            if job is not None:
                job.count_attempt()
            try:
                value = await self._attempt(trip, started, deadline)
            except Exception as error:  # noqa: BLE001  # raised again below unless it is retried
                failure = error
            except BaseException:
                service.end_ignored(tag)
                trip.over(service)
                raise
            else:
                try:
                    service.end_well(tag, started, trip.rtt, cost)
                    if trip.headers is not None:
                        self.learn(service, trip.headers, tag)
                    if self._used is not None:
                        self._settle(trip, service, value, self._used)
                except BaseException:
                    trip.over(service)
                    raise
                return value
            try:
                history.append(f"attempt {len(history) + 1} took {now() - started:.3f} s: {first_line(failure)}")
                hint = hint_of(failure)
                headers = headers_of(failure) if trip.headers is None else trip.headers
                hints = None if headers is None else self.learn(service, headers, tag)
                service.end_badly(tag, failure, trip.rtt, hint, hinted=hints is not None)
                back_off = self._back_off(trip, service, failure, hint, history, asked, deadline)
                self.refund(service, trip.weight, failure)
                if back_off is None:
                    raise failure
                cheap = hint is not None and classify(failure) is FailureKind.THROTTLED
                cost = THROTTLED_RETRY_COST if cheap else RETRY_COST
                in_turn = service.may_repeat(cost)
            finally:
                trip.rtt = trip.headers = None
                trip.over(service)  # after a pause was noted, or the next in line would slip through before it
                del failure  # its traceback holds this frame: a cycle that would keep the job's data alive
            await self._sleep(trip, service, job, back_off, cost, deadline, history, paid=in_turn)

    def stir(self) -> None:
        """A round trip begins that `begin` does not know."""
        assert self._guard is not None, "service() has bound the loop"
        self._guard.stir()

    def obey(self, service: Service, failure: BaseException, hint: float | None, *, refused: bool) -> None:
        """Pause the key if the server asks for that. Others are about to call it too, also when this call is over."""
        if hint is not None and (not refused or classify(failure) is FailureKind.THROTTLED):
            self._pause(service, hint * (1.0 + self._rng.uniform(0.0, HINT_JITTER)))

    def refund(self, service: Service, weight: Mapping[str, float] | None, failure: BaseException) -> None:
        """What was refused, or never left, has used nothing but its request; and that was not seen if it never left."""
        if service.tokens is None:
            return
        if provably_unsent(failure):
            service.give_tokens_back(weight)
        elif weight is not None and classify(failure) is FailureKind.THROTTLED:
            service.settle(weight, {name: 0.0 for name in weight if name != REQUESTS})

    def learn(self, service: Service, headers: Mapping[str, str], tag: Tag) -> ServerHints | None:
        """Obey what the headers of an answer say, if they say anything."""
        try:
            hints = hints_of(headers, now=clock.wall())
        except Exception:  # noqa: BLE001  # somebody else's mapping: the answer must not be lost over its mistake
            return None
        if hints is not None:
            service.learn(hints, tag)
        return hints

    def _settle(
        self, trip: RoundTrip[Any], service: Service, value: Any, used: Callable[[Any], Mapping[str, float] | None]
    ) -> None:
        try:
            if (amount := used(value)) is not None:
                service.settle(trip.weight, amount)
        except Exception:  # the answer is there, and has been paid for: it must not be lost over this
            if not self._told_of_used:
                self._told_of_used = True
                logger.exception("gate %r: used= failed, so the call counts as what was reserved", self.name)

    def _back_off(
        self,
        trip: RoundTrip[Any],
        service: Service,
        failure: Exception,
        hint: float | None,
        history: list[str],
        asked: float,
        deadline: float | None,
    ) -> float | None:
        """Seconds until the next attempt may ask for a permit; None, with a note on `failure`, if there is to be none.

        A server that asks for less pauses the key even so. The pause is not slept off here but waited for in the key's
        queue, so that at its end the retries come before fresh work.
        """
        now = service.now()
        decision = self._policy.decide(failure, len(history), asked, now)
        if not isinstance(decision, str) and not trip.repeatable(failure):
            decision = "it may have been carried out, and is not declared idempotent"
        self.obey(service, failure, hint, refused=isinstance(decision, str))
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
        self._annotate(late, f"{self._total} was over", history)
        return late

    @property
    def _total(self) -> str:
        timeout = self._policy.timeout  # None if the policy has been exchanged meanwhile
        return "Retry(timeout=)" if timeout is None else f"Retry(timeout={timeout:g})"

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
            raise AttemptTimeout(f"{trip}: no answer before the end of {self._total}") from error

    async def _wait_for_permit(
        self,
        trip: RoundTrip[Any],
        service: Service,
        job: RunningJob | None,
        deadline: float | None,
        history: list[str],
        *,
        again: bool,
    ) -> None:
        asked = service.now()
        if deadline is not None and asked + service.paused_for >= deadline:
            raise self._too_late(trip, f"gate {self.name!r} is paused for {service.paused_for:.1f} s", history)
        try:
            if service.sends_away:
                raise service.circuit_open()
            if deadline is None or self._waits is None or abs(asked + self._waits.timeout - deadline) > JUST_NOW:
                async with asyncio.timeout_at(deadline):
                    await trip.wait(service, again=again)
            else:
                await self._first_wait(trip, service, self._waits, deadline)
        except TimeoutError as error:
            reason = trip.why_waiting(service) or service.why_waiting()
            why = f": {reason}" if reason else ""
            what = f"got no permit of gate {self.name!r} in {service.now() - asked:g} s{why}"
            raise self._too_late(trip, what, history) from error
        except CircuitOpen as error:
            self._annotate(error, "it was not sent", history)
            raise
        except asyncio.CancelledError as error:
            if reason := trip.why_waiting(service):
                error.add_note(reason)
            raise
        finally:
            if job is not None:
                job.waited += service.now() - asked

    async def _first_wait(self, trip: RoundTrip[Any], service: Service, waits: Deadlines, deadline: float) -> None:
        """Wait until `deadline`, on the timer that all share who have just begun to ask, so that theirs come in order.

        Raises:
            TimeoutError: it has come.
        """
        own = waits.start(deadline - waits.timeout)
        try:
            await trip.wait(service, again=False)
        except asyncio.CancelledError as error:
            if own.has_cancelled:
                raise TimeoutError from error
            raise
        finally:
            waits.end(own)

    async def _sleep(
        self,
        trip: RoundTrip[Any],
        service: Service,
        job: RunningJob | None,
        duration: float,
        cost: float,
        deadline: float | None,
        history: list[str],
        *,
        paid: bool,
    ) -> None:
        """Back off, and then wait until the retry budget can afford `cost`, unless it has been paid."""
        started = service.now()
        service.backing_off += 1
        try:
            await asyncio.sleep(duration)
            if not paid:
                async with asyncio.timeout_at(deadline):
                    await service.afford(cost)
        except TimeoutError as error:
            what = f"the retry budget of gate {self.name!r} had no room in {service.now() - started:g} s"
            raise self._too_late(trip, what, history) from error
        except BaseException:
            if paid:
                service.refund(cost)
            raise
        finally:
            service.backing_off -= 1
            if job is not None:
                job.waited += service.now() - started

    def _add(self, key: Hashable) -> Service:
        assert self._loop is not None, "service() has bound the loop"
        if len(self._services) >= self._sweep_at:
            self._drop_idle_keys()
            self._sweep_at = max(MOST_IDLE_KEYS, 2 * len(self._services))  # or each new key would search all in use
        service = self._services[key] = Service(self._loop, self.name, self._rules, self._rng)
        return service

    def _drop_idle_keys(self) -> None:
        # All but half as many, so that the search through the keys in use is not paid for each new key.
        idle = [key for key, service in self._services.items() if service.idle]
        for key in idle[: -(MOST_IDLE_KEYS // 2)]:
            del self._services[key]

    def _move_to(self, loop: asyncio.AbstractEventLoop) -> None:
        """Belong to `loop` from now on; a gate outlives the loop of one `asyncio.run`, but serves one at a time."""
        old = self._loop
        if old is not None and not old.is_closed() and any(not s.idle for s in self._services.values()):
            raise WrongLoop(
                f"gate {self.name!r} is in use on another event loop. A gate serves one loop at a time: "
                f"make one gate for each loop, or finish there first."
            )
        if self._guard is not None:
            self._guard.remove(self)
        self._loop = loop
        self._deadlines = None if self._timeout is None else Deadlines(loop, self._timeout)
        self._waits = None if self._retry.timeout is None else Deadlines(loop, self._retry.timeout)
        self._services.clear()
        self._crossing = None
        self._guard = guard_of(loop)
        self._guard.add(self)
        tell_of_backlog(loop, self)


def _checked_limit(limit: int | LimitRule) -> int | LimitRule:
    number = isinstance(limit, int) and not isinstance(limit, bool) and limit >= 1
    if not number and (isinstance(limit, type) or not callable(getattr(limit, "limiter", None))):
        raise UsageError(
            f"limit={limit!r}: expected a whole number of at least 1 (round trips in flight), or a rule that measures "
            f"it, such as Adaptive()."
        )
    return limit


def _checked_retry(retry: Retry | None) -> Retry:
    if retry is not None and not isinstance(retry, Retry):
        raise UsageError(f"retry={retry!r}: expected a policy. Write retry=Retry(attempts=3).")
    return Retry() if retry is None else retry


def _checked_breaker(breaker: Breaker | None) -> Breaker | None:
    if breaker is not None and not isinstance(breaker, Breaker):
        raise UsageError(f"breaker={breaker!r}: expected a Breaker(), or None for none.")
    return breaker


def _check_function(name: str, function: object, is_given: str) -> None:
    if function is not None and (not callable(function) or is_async(function)):
        raise UsageError(f"{name}={function!r}: expected a function that is given {is_given}.")


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
        self.headers = headers_of(value)
        return value

    def repeatable(self, _error: Exception) -> bool:
        return True

    def __str__(self) -> str:
        return name_of(self.fn)
