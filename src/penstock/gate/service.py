"""What a gate knows of one service key: its queue, what decides who may go, and the counts that `statistics()` shows.

    start -> attempt -> end_well | end_badly | end_ignored
               what it took and how it ended -> limiter, breaker, retry budget, rates -> the queue's limit and holds

The deciders are pure (`adaptive.py`, `breaker.py`, `budget.py`, `rate.py`): they are told what happened and when. This
is where their answers become permits: the limiter's number, times the share that the loop can carry, or as many probes
as the breaker lets through; a hold while it is open; retries that the budget cannot afford yet. Loop thread only.
"""

import asyncio
import logging
import math
import random
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from penstock.errors import CircuitOpen, UsageError, first_line, status_of
from penstock.gate.breaker import Breaker, Circuit, CircuitState
from penstock.gate.budget import RetryBudget
from penstock.gate.limiter import LimitChange, Limiter, LimitRule, Reason
from penstock.gate.rate import Meter, Rates, is_amount
from penstock.gate.server_hints import REQUESTS, ServerHints
from penstock.gate.verdict import judge
from penstock.histogram import Distribution, Histogram
from penstock.outcome import FailureKind, classify
from penstock.permits import TOKENS, Companion, PermitQueue, Waiter, Weight
from penstock.threads.call import AbandonedCall

logger = logging.getLogger("penstock.gate")

BREAKER: Final = "breaker"
PROCESSING: Final = "processing"
"""What a queue waits for, beside the words of `permits.py`."""
REMEMBERED_CHANGES = 32
"""Of the limit. Arbitrary, because: a minute of them, and a screen."""
WORTH_TELLING = 5.0
"""Seconds of a pause or a wait that is logged. Arbitrary, because: a person begins to wonder."""
LEAST_PAUSE = 0.1
"""Seconds. A server that asks for less tells nothing, as if it had only refused. Arbitrary, because: many send a 0."""
ALL_REFUSED = 20
"""Arbitrary, because: more than a burst at the start, and soon enough to look after it."""
ONE_CHANGE = 1.0
"""Seconds for which changes of one kind are told as one. Arbitrary, because: a person reads them."""
LEAST_LAG = 0.005
"""Seconds. Arbitrary, because: timers are a millisecond late as a rule, and a pause of that size tells nothing."""
LAG_SHARE = 0.1
"""Of the baseline: a loop that lags more than that measures itself. Arbitrary, because: what the limiter tolerates."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What a gate asks of each of its keys."""

    limit: int | LimitRule
    rate: Rates | None
    breaker: Breaker | None
    budget: float | None
    """Share of first attempts that may be repeated."""
    most: int | None = None
    """What an adaptive limit cannot exceed, such as connections."""


@dataclass(frozen=True, slots=True)
class KeyStatistics:
    """One service key of a gate, as it was at the time of asking. Durations are seconds."""

    limit: int
    """Round trips that may be in flight now."""
    baseline: float | None
    """What a round trip takes at an idle service, as far as an adaptive limit knows."""
    queue: float
    """Estimate of the requests that queue at the service, by an adaptive limit."""
    in_flight: int
    waiting: int
    waits_for: str | None
    """What the first in line waits for: "permit", "rate", "pause", "breaker", "thread", "processing"; None when nobody
    waits."""
    waited: dict[str, float]
    """For how long it has waited for each of them so far."""
    paused_for: float
    """Time until the key may be used again, after a `Retry-After`; 0 when it may be used now."""
    deferred: int
    """Retries that wait until the retry budget has room for them."""
    tokens: dict[str, float]
    """What each rate would let through at once, by its name; what is left of each quota that the server tells of, as
    "server: NAME"; and the rate that was found by refusals, as "found, a second"."""
    budget: float | None
    """Retries that may be made at once; None without a budget."""
    breaker: str | None
    """"closed", "open" or "half-open"; None without a breaker."""
    opened: int
    """How often the breaker has opened."""
    attempts: int
    retries: int
    """Attempts after the first of their round trip."""
    succeeded: int
    failed: dict[FailureKind, int]
    """Failed attempts by kind."""
    abandoned_calls: tuple[AbandonedCall, ...]
    """Blocking calls whose caller stopped waiting and whose thread still runs: they hold permits."""
    changes: tuple[LimitChange, ...]
    """The latest changes of the limit, the oldest first."""
    reasons: dict[str, int]
    """All changes of the limit so far, by reason."""
    latency: Distribution
    """From admission to the end of the attempt; successful attempts only."""


Tag: TypeAlias = tuple[int, int, int | None, Limiter | None]
"""What was so when an attempt began: the limiter's cohort, the breaker's epoch, how many had started at the meter; and
the limiter itself, since another one must not be told of ends without beginnings."""


class Service(PermitQueue):
    """A key's queue, and what has happened there. Loop thread only."""

    __slots__ = (
        "_answered", "_breaker", "_changes", "_deferred", "_epoch", "_last_beat", "_latest", "_left_behind",
        "_limiter", "_limits", "_most", "_name", "_on_trial", "_opened", "_payday", "_probing", "_reasons", "_rng",
        "_share", "_stale", "_told_until", "_unreachable", "_waited", "_waited_for", "_whole", "attempts",
        "backing_off", "budget", "circuit", "failed", "latency", "refuses", "retries", "succeeded", "tokens",
    )  # fmt: skip

    def __init__(self, loop: asyncio.AbstractEventLoop, name: str, rules: Rules, rng: random.Random) -> None:
        super().__init__(loop, 1)
        self._name = name
        self._rng = rng
        self._share = 1.0
        self._whole = self._most = rules.most
        """What there is for all keys together, and for this one."""
        self._limits = 1
        """The limit as the service goes, when it was last looked at; the one to keep where nothing measures it."""
        self._limiter: Limiter | None = None
        self._changes: deque[LimitChange] = deque(maxlen=REMEMBERED_CHANGES)
        self._reasons: dict[str, int] = {}
        self.circuit: Circuit | None = None
        self._epoch = 0
        """The last breaker's epoch: attempts that begin without a breaker have none."""
        self._opened = 0
        self._latest = ""
        """The latest failure, for the message of who is not let through."""
        self._answered = False
        """Whether the service has ever answered, be it with a refusal."""
        self._unreachable = False
        """Whether the latest failure found no connection. A service that has never had one is not worth waiting for."""
        self._stale = 0
        """Attempts that began before the breaker opened: they take no probe's place."""
        self._left_behind = 0
        """Permits that threads keep for which nobody waits any more: they take no probe's place either."""
        self._on_trial = False
        """Whether the breaker has let probes through since it opened, and has not closed since."""
        self._probing: asyncio.TimerHandle | None = None
        self.refuses = False
        """Whether the breaker is open and to fail fast."""
        self.budget = None if rules.budget is None else RetryBudget(rules.budget)
        self._deferred: OrderedDict[asyncio.Future[None], float] = OrderedDict()
        self._payday: asyncio.TimerHandle | None = None
        self.tokens: Meter | None = None
        self._told_until = 0.0
        """Until when there is nothing new to tell of a wait for tokens."""
        self.attempts = 0
        self.backing_off = 0
        """Callers that will come back for their next attempt: the key is in use."""
        self.retries = 0
        self.succeeded = 0
        self.failed: dict[FailureKind, int] = {}
        self.latency = Histogram()
        self._waited: dict[str, float] = {}
        self._waited_for: str | None = None
        self._last_beat = self.now()
        self.set_limit(rules.limit)
        self._changes.clear()
        self._reasons.clear()
        self.set_rate(rules.rate)
        self.set_breaker(rules.breaker)

    @property
    def idle(self) -> bool:
        """True when it may be forgotten: nobody uses it, waits for it or will come back, and nothing is remembered that
        those who come later have to obey."""
        if not super().idle or self.backing_off:
            return False
        circuit, tokens = self.circuit, self.tokens
        if circuit is not None and (circuit.state is CircuitState.OPEN or circuit.probing):
            return False
        return tokens is None or tokens.at_rest(self.now())

    # --- live changes ---

    def set_limit(self, limit: int | LimitRule) -> None:
        """From now on, admit so many, or as many as this rule finds out."""
        if isinstance(limit, int):
            self._limiter, self._limits = None, limit
        else:
            self._limiter = limit.limiter(self.now(), self._whole, self._rng)
            if self._most != self._whole or (self.tokens is not None and self.tokens.concurrency is not None):
                self._cap(self._limiter)
            self._on_trial = False  # it has been told of no probes
        self._apply("set")

    def bound(self, most: int) -> None:
        """Measure no limit beyond `most`."""
        if most != self._most:
            self._most = most
            if self._limiter is not None:
                self._cap(self._limiter)
                self._apply("application")

    def _cap(self, limiter: Limiter) -> None:
        """Bound a limiter by what is there for this key, and by what the server allows."""
        concurrency = None if self.tokens is None else self.tokens.concurrency
        limiter.cap(_least(concurrency, self._most), self.now())

    def set_rate(self, rate: Rates | None) -> None:
        """From now on, keep these rates."""
        if rate is not None or self.tokens is not None:
            self._metered().set_rates(rate)
            self.look_again()

    def set_breaker(self, breaker: Breaker | None) -> None:
        """From now on, break the circuit by these rules. One that is open closes."""
        self._epoch = 1 + (self._epoch if self.circuit is None else self.circuit.epoch)
        self.circuit = None if breaker is None else Circuit(breaker, self.now(), self._rng)
        if self.circuit is not None:
            self.circuit.epoch = self._epoch  # what is under way says nothing to it
        self._breaker = breaker
        self._follow_circuit()

    def set_budget(self, share: float | None) -> None:
        """From now on, allow this share of retries."""
        self.budget = None if share is None else RetryBudget(share)
        self._release_deferred()

    # --- attempts ---

    def start(self, now: float, retried: bool) -> Tag:
        """An attempt begins with a permit that has been taken; what has to be known at its end."""
        self.attempts += 1
        if retried:
            self.retries += 1
        elif self.budget is not None:
            self.budget.deposit(now)
            if self._deferred:
                self._release_deferred()
        limiter = self._limiter
        mark = 0 if limiter is None else limiter.started(now)
        taken = None if self.tokens is None else self.tokens.taken
        circuit = self.circuit
        if circuit is None:
            return mark, 0, taken, limiter
        epoch = circuit.started(now)
        if circuit.state is not CircuitState.CLOSED:
            self._let_probes_through()
        return mark, epoch, taken, limiter

    def end_well(self, tag: Tag, started: float, rtt: float | None, refund: float = 0.0) -> None:
        """An attempt has worked: its time is a sample."""
        now = self.now()
        elapsed = now - started
        self.succeeded += 1
        self._answered = True
        self.latency.record(elapsed)
        if self.budget is not None:
            self.budget.succeeded(now, refund)
            if self._deferred:
                self._release_deferred()
        if self.tokens is not None:
            self.tokens.succeeded(now)
        limiter, circuit = self._limiter, self.circuit
        if limiter is not None and limiter is tag[3]:
            change = limiter.ended(tag[0], now, elapsed if rtt is None else rtt, False)
            if change is not None or limiter.limit != self._limits:
                self._apply("growth" if change is None else change.reason)
        if circuit is not None:
            changed = circuit.ended(tag[1], now, False)
            if changed or circuit.state is not CircuitState.CLOSED:
                self._follow_probe(tag[1], changed)

    def end_badly(
        self, tag: Tag, error: BaseException, rtt: float | None, pause: float | None, *, hinted: bool = False
    ) -> None:
        """An attempt has failed. `pause`: what the server asked for; `hinted`: it tells its rates."""
        now = self.now()
        kind = classify(error)
        self.failed[kind] = self.failed.get(kind, 0) + 1
        verdict = judge(error)
        if verdict.failed:
            self._latest = first_line(error)
        if verdict.failed is False or status_of(error) is not None:
            self._answered = True
        self._unreachable = verdict.unreachable
        if verdict.throttled:
            hinted = hinted or (pause is not None and pause >= LEAST_PAUSE)
            self._metered().throttled(now, hinted=hinted, queueing=self._queueing, mark=tag[2])
            self._tell_of_refusals()
        # Of two who answer the same refusal, one would hold back what the other needs to find its way.
        searching = verdict.throttled and self._metered().searching
        # While it is to be found out whether the service is back, whatever it says means that it is.
        half_open = self.circuit is not None and self.circuit.state is CircuitState.HALF_OPEN
        failed = False if half_open and verdict.failed is None else verdict.failed
        self._end(
            tag, now, rtt if verdict.sampled else None, dropped=verdict.dropped and not searching, failed=failed,
            unreachable=verdict.unreachable, pause=pause,
        )  # fmt: skip

    def _tell_of_refusals(self) -> None:
        """Nothing but refusals: somebody should know."""
        if not self.succeeded and self.failed == {FailureKind.THROTTLED: ALL_REFUSED}:
            logger.warning(
                "gate %r: the first %d answers were all refusals for being asked too much. It goes on, slowly",
                self._name, ALL_REFUSED,
            )  # fmt: skip

    def end_ignored(self, tag: Tag) -> None:
        """An attempt was cancelled, or says nothing about the service."""
        self._end(tag, self.now(), None, dropped=False, failed=None)

    def _end(
        self, tag: Tag, now: float, rtt: float | None, *, dropped: bool, failed: bool | None,
        unreachable: bool = False, pause: float | None = None,
    ) -> None:  # fmt: skip
        limiter, circuit = self._limiter, self.circuit
        if limiter is not None and limiter is tag[3]:
            change = limiter.ended(tag[0], now, rtt, dropped)
            if change is not None or limiter.limit != self._limits:
                self._apply("growth" if change is None else change.reason)
        if circuit is not None:
            changed = circuit.ended(tag[1], now, failed, unreachable=unreachable, retry_after=pause)
            if changed or circuit.state is not CircuitState.CLOSED:
                self._follow_probe(tag[1], changed)

    def leave_behind(self) -> None:
        """An attempt is over whose permit stays with its thread."""
        self._left_behind += 1
        if self.circuit is not None and self.circuit.state is CircuitState.HALF_OPEN:
            self._apply(BREAKER)  # its place was a probe's, or one of those from before

    def come_back(self) -> None:
        """Such a thread has ended."""
        self._left_behind -= 1
        if self.circuit is not None and self.circuit.state is CircuitState.HALF_OPEN:
            self._apply(BREAKER)
        self.give_back()

    @property
    def _queueing(self) -> bool:
        """Whether the service is slow because it is asked for much, and not just refusing."""
        return self._limiter is not None and self._limiter.queue > max(1.0, 0.1 * self.limit)

    # --- limit ---

    def beat(self, share: float, lag: float, lagging: bool) -> None:
        """The loop's heartbeat: what share of its limits it can carry, and how late it was."""
        self._note_wait()
        limiter = self._limiter
        if limiter is not None:
            usual = limiter.baseline or (self.latency.mean if self.latency.count else 0.0)
            if lagging or lag > max(LEAST_LAG, LAG_SHARE * usual):
                limiter.contaminate()
        if share != self._share:
            self._share = share
            self._apply("guard")

    @property
    def unshared(self) -> int:
        """The limit as the service goes, whatever the loop can carry."""
        return self._limits if self._limiter is None else self._limiter.limit

    def _apply(self, reason: Reason) -> None:
        """Admit as many as the limiter, the breaker and the loop allow."""
        limit = self._limits = self.unshared
        if self.tokens is not None and self.tokens.concurrency is not None:
            limit = min(limit, self.tokens.concurrency)
        if self._share < 1.0:
            limit = max(1, int(limit * self._share))
        if self.circuit is not None and self.circuit.state is CircuitState.HALF_OPEN:
            probes = self._stale + self._left_behind + self.circuit.allowed(self.now())
            # A number that somebody has set may be more than a wish: an SDK that bears no more.
            limit = probes if self._limiter is not None else min(probes, limit + self._left_behind)
        if limit != self.limit:
            self._note(reason, limit)
            self.resize(limit)

    def _note(self, reason: Reason, limit: int) -> None:
        """Remember a change; many small ones of one kind are one."""
        now, last = self.now(), self._changes[-1] if self._changes else None
        if last is not None and last.reason == reason and now - last.at < ONE_CHANGE:
            self._changes[-1] = last._replace(after=limit)
            if last.before == limit:
                self._changes.pop()
        else:
            self._changes.append(LimitChange(now, self.limit, limit, reason))
            self._reasons[reason] = self._reasons.get(reason, 0) + 1

    # --- breaker ---

    def circuit_open(self) -> CircuitOpen:
        """What to raise to who is to fail fast."""
        assert self.circuit is not None, "only a circuit opens"
        seen = self.circuit.statistics(self.now())
        return CircuitOpen(
            f"the circuit breaker of gate {self._name!r} is open: {seen.failures} of the last {seen.calls} attempts "
            f"failed{'' if self._answered else ', and nothing has ever answered'}. "
            f"It lets a probe through in {seen.opens_for:.1f} s. The latest failure: {self._latest}"
        )

    def _follow_probe(self, epoch: int, changed: bool) -> None:
        """An attempt has ended that began in `epoch`, and the circuit is not closed, or has just changed."""
        assert self.circuit is not None, "it is its state"
        if changed:
            self._follow_circuit()
            return
        if self.circuit.outrun is not None:
            self._stale += self.circuit.outrun
            self.circuit.outrun = None
        elif self._stale and epoch < self.circuit.epoch:
            self._stale -= 1
        if self.circuit.state is CircuitState.HALF_OPEN:
            self._let_probes_through()

    def _follow_circuit(self) -> None:
        """The breaker is in another state."""
        circuit = self.circuit
        state = CircuitState.CLOSED if circuit is None else circuit.state
        self._disarm()
        self.refuses = state is CircuitState.OPEN and self._fails_fast
        if circuit is not None and state is CircuitState.OPEN:
            self._opened += 1
            self.hold_back(BREAKER, True)  # before the limit is that of probes no more
            self._probing = self._loop.call_at(circuit.until, self._end_of_pause)
            self._tell_that_it_is_open(circuit)
        elif self._on_trial:
            self._on_trial = False
            if self._limiter is not None:
                self._limiter.recovered(self.now())
        self._apply(BREAKER)
        if state is not CircuitState.OPEN:
            self.hold_back(BREAKER, False)
        if self.refuses:
            self._send_away()
        self._release_deferred()

    def _tell_that_it_is_open(self, circuit: Circuit) -> None:
        seen = circuit.statistics(self.now())
        what = "waits"
        if self.refuses:
            what = "fails" if self._answered else "fails, since nothing has ever answered: is the address right?"
        why = f"{seen.failures} of the last {seen.calls} attempts failed"
        if self._on_trial:
            why = "a probe failed"
        elif self._breaker is not None and seen.failures < self._breaker.share * seen.calls:
            why = f"the last {self._breaker.connect_errors} attempts found no connection"
        logger.warning(
            "gate %r: the circuit breaker is open, %s (%s). The next probe follows in %.1f s. "
            "What is asked meanwhile %s",
            self._name, why, self._latest, seen.opens_for, what,
        )  # fmt: skip

    def _end_of_pause(self) -> None:
        assert self.circuit is not None, "only a circuit has pauses"
        if self.circuit.half_open(self.now()):
            self._on_trial = True
            if self._limiter is not None:
                self._limiter.half_open(self.now())
            self.refuses = False
            self._stale = self.in_flight - self._left_behind  # while it was open, nobody was admitted
            self._let_probes_through()
            self.hold_back(BREAKER, False)
            self._release_deferred()  # there may be nobody else to probe with
        else:  # a timer may come a little early
            self._probing = self._loop.call_at(self.circuit.until, self._end_of_pause)

    def _let_probes_through(self) -> None:
        """Admit as many probes as may be in flight, and come back when that will have changed by itself."""
        assert self.circuit is not None, "only a circuit lets probes through"
        if self.circuit.state is CircuitState.HALF_OPEN:
            self._disarm()
            delay = self.circuit.delay(self.now())
            if 0 < delay < math.inf:
                self._probing = self._loop.call_later(delay, self._let_probes_through)
        self._apply(BREAKER)

    def _disarm(self) -> None:
        if self._probing is not None:
            self._probing.cancel()
            self._probing = None

    def _send_away(self) -> None:
        """Fail who waits."""
        for waiter in self.clear():
            if isinstance(waiter, asyncio.Future) and not waiter.done():
                waiter.set_exception(self.circuit_open())

    @property
    def sends_away(self) -> bool:
        """Whether who has to wait is to fail at once: while the breaker is not closed, and does not park."""
        half_open = self.circuit is not None and self.circuit.state is CircuitState.HALF_OPEN
        return self.refuses or (half_open and self._fails_fast)

    @property
    def _fails_fast(self) -> bool:
        nobody_there = self._unreachable and not self._answered
        return nobody_there or (self._breaker is not None and self._breaker.fail_fast)

    # --- retry budget ---

    def may_repeat(self, cost: float) -> bool:
        """Pay for a retry; False if it has to wait until it can be afforded."""
        return self.budget is None or (not self._deferred and self.budget.withdraw(cost, self.now()))

    async def afford(self, cost: float) -> None:
        """Wait until the retry budget has room, behind who waits for that already. Cancellation: gives up the place."""
        affordable = self._loop.create_future()
        self._deferred[affordable] = cost
        self._release_deferred()
        try:
            await affordable
        except BaseException:
            if affordable.done() and not affordable.cancelled():  # it has just been paid for
                self.refund(cost)
            self._deferred.pop(affordable, None)
            raise

    def refund(self, cost: float) -> None:
        """A retry that was paid for is not made."""
        if self.budget is not None:
            self.budget.refund(cost, self.now())

    def _release_deferred(self) -> None:
        now = self.now()
        if self._payday is not None:
            self._payday.cancel()
            self._payday = None
        if self.circuit is not None and self.circuit.state is CircuitState.OPEN and not self.refuses:
            return
        while self._deferred:
            affordable, cost = next(iter(self._deferred.items()))
            if not affordable.done():
                if self.budget is not None and not self.refuses and not self.budget.withdraw(cost, now):
                    delay = self.budget.affordable_in(cost, now)
                    if delay is not None:
                        self._payday = self._loop.call_later(delay, self._release_deferred)
                    return
                affordable.set_result(None)
            del self._deferred[affordable]

    # --- rates ---

    def refuse_what_never_fits(self, weight: Weight) -> None:
        """Refuse a weight for which there will never be tokens enough.

        Raises:
            UsageError: it is more than one of the rates ever lets through at once, or of an unknown rate.
        """
        if self.tokens is not None:
            self.tokens.refuse_what_never_fits(weight)

    def learn(self, hints: ServerHints, tag: Tag) -> None:
        """Obey what the server says of its rates."""
        meter = self._metered()
        before = meter.concurrency
        meter.learn(hints, max(0, self.in_flight - 1), self.now(), tag[2])
        if meter.concurrency != before:
            if self._limiter is not None:
                self._cap(self._limiter)
            self._apply("server")
        if self._stuck is TOKENS:  # there may be more than was known; but a pause that was asked for comes first
            self._loop.call_soon(self.look_again)

    def settle(self, reserved: Weight, used: Mapping[str, float]) -> None:
        """Put right what an attempt has taken: give back what it has not used, take what it has used beyond.

        Raises:
            UsageError: `used` is no mapping of names to numbers of at least 0, or names what nobody counts.
        """
        check_used(used)
        if self.tokens is not None:
            self.tokens.refuse_unknown(used)
            self._correct(self.tokens, reserved, used)

    def _correct(self, tokens: Meter, reserved: Weight, used: Mapping[str, float]) -> None:
        tokens.settle(reserved, used, self.now())
        if self._stuck is TOKENS:
            self.look_again()

    def delay_on_loan(self, weight: Weight) -> float:
        """Seconds until an attempt may start that needs no permit of this queue.

        Raises:
            CircuitOpen: the breaker is open, and to fail fast.
        """
        if self.refuses:
            raise self.circuit_open()
        now = self.now()
        delay = self.paused_for
        if self.circuit is not None and self.circuit.state is CircuitState.OPEN:
            delay = max(delay, self.circuit.delay(now))
        if self.tokens is not None and self.tokens.active:
            delay = max(delay, self.tokens.delay(weight, now))
        return delay

    def give_tokens_back(self, weight: Weight) -> None:
        """What was taken of the rates is not used."""
        if self.tokens is not None:
            self._correct(self.tokens, weight, dict.fromkeys([REQUESTS, *(weight or ())], 0.0))

    def spend(self, weight: Weight) -> None:
        """Take tokens for an attempt that did not have to wait here."""
        if self.tokens is not None:
            self.tokens.take(weight, self.now())

    def _metered(self) -> Meter:
        if self.tokens is None:
            self.tokens = self.meter = Meter()
        return self.tokens

    # --- statistics ---

    def why_waiting(self) -> str | None:
        """Why nobody is admitted at present, in words; None where it is the limit."""
        if paused_for := self.paused_for:
            return f"it is paused for another {paused_for:.1f} s"
        if self.circuit is not None and self.circuit.state is not CircuitState.CLOSED:
            return f"its circuit breaker is {self.circuit.state}"
        if self.held_back(PROCESSING):
            return "answers that wait to be processed hold it back"
        return None if self.tokens is None else self.tokens.wait_reason(self.now(), None)

    def join(
        self, waiter: Waiter, *, again: bool = False, needs: Companion | None = None, weight: Weight = None
    ) -> None:
        """As in a `PermitQueue`; what is waited for is noted from now on, and not from the next beat on."""
        super().join(waiter, again=again, needs=needs, weight=weight)
        if self._waited_for is None:
            self._note_wait()

    def leave(self, waiter: Waiter) -> None:
        """As in a `PermitQueue`; nobody waits any more when the last one has gone."""
        super().leave(waiter)
        if self._waited_for is not None and not self.waiting:
            self._note_wait()

    def _note_reason(self) -> None:
        if self._stuck is TOKENS:
            self._tell_of_long_wait()
        if self._waited_for is not None and self.waits_for != self._waited_for:
            self._note_wait()

    def _tell_of_long_wait(self) -> None:
        """Nothing goes for a while, because of a rate: somebody should know, once for each such wait."""
        assert self._refill is not None, "who waits for tokens has asked when there are some"
        assert self.tokens is not None, "nobody else is waited for so"
        until = self._refill.when()
        if until - self.now() > WORTH_TELLING and until > self._told_until + WORTH_TELLING:
            self._told_until = until
            logger.warning("gate %r waits for %s", self._name, self.tokens.wait_reason(self.now(), None))

    def _note_wait(self) -> None:
        """Add up how long it has been waited for what, and look what it is now."""
        now = self.now()
        if self._waited_for is not None:
            self._waited[self._waited_for] = self._waited.get(self._waited_for, 0.0) + now - self._last_beat
        self._waited_for, self._last_beat = self.waits_for, now

    def _tokens_left(self, now: float) -> dict[str, float]:
        if self.tokens is None:
            return {}
        told = {f"server: {name}": left for name, left in self.tokens.told(now).items()}
        found = self.tokens.rate_found(now)
        return {**self.tokens.tokens(now), **told, **({} if found is None else {"found, a second": found})}

    def _waited_so_far(self) -> dict[str, float]:
        waited = dict(self._waited)
        if self._waited_for is not None:
            waited[self._waited_for] = waited.get(self._waited_for, 0.0) + self.now() - self._last_beat
        return waited

    def statistics(self, abandoned_calls: tuple[AbandonedCall, ...] = ()) -> KeyStatistics:
        """A frozen copy of the counts."""
        limiter, circuit, now = self._limiter, self.circuit, self.now()
        return KeyStatistics(
            limit=self.limit,
            baseline=None if limiter is None else limiter.baseline,
            queue=0.0 if limiter is None else limiter.queue,
            in_flight=self.in_flight,
            waiting=self.waiting,
            waits_for=self.waits_for,
            waited=self._waited_so_far(),
            paused_for=self.paused_for,
            deferred=len(self._deferred),
            tokens=self._tokens_left(now),
            budget=None if self.budget is None else self.budget.balance(now),
            breaker=None if circuit is None else str(circuit.state),
            opened=self._opened,
            attempts=self.attempts,
            retries=self.retries,
            succeeded=self.succeeded,
            failed=dict(self.failed),
            abandoned_calls=abandoned_calls,
            changes=tuple(self._changes),
            reasons=dict(self._reasons),
            latency=self.latency.snapshot(),
        )


def check_used(used: object) -> None:
    """Refuse what cannot have been used.

    Raises:
        UsageError: it is no mapping of names to numbers of at least 0.
    """
    if not isinstance(used, Mapping) or not all(is_amount(amount) for amount in used.values()):
        raise UsageError(f"used={used!r:.100}: expected amounts by the names of the rates, such as {{'tokens': 812}}.")


def _least(*numbers: int | None) -> int | None:
    return min((number for number in numbers if number is not None), default=None)
