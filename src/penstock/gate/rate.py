"""How many round trips may start in a time: what the user allows, what the server says, what its refusals show.

A `Meter` belongs to one service key and has three sources, of which the slowest decides:

    Rate (configured)   GCRA, one bucket for each dimension ("requests", "tokens", ...), all taken in one step
    Quota (hints)       a policy that the server tells of in its answers: paced when it runs low, obeyed when it is gone
    Cubic (refusals)    a rate that is found by trial, for a server that refuses and says nothing

    gate: delay(weight, now) == 0 -> take(weight, now) -> attempt -> settle(reserved, used, now), learn(hints, ...)

GCRA is the generic cell rate algorithm of ATM (ITU-T I.371): with `T = per / amount`, one number for each bucket, the
theoretical arrival time `tat`, at which the bucket is full again:

    it may start when      now >= tat - (burst - min(weight, burst)) * T
    and then               tat = max(tat, now) + weight * T

So a timer that fires late loses nothing as long as the delay is less than the burst; a weight above the burst waits for
a full bucket and leaves a debt. In no time `t` more is taken than `amount * t / per + burst` and one heavy weight.

Pure: time is an argument, in seconds of any clock that does not go back. Nothing blocks. Loop thread only.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from penstock.errors import UsageError
from penstock.gate.cubic import Cubic
from penstock.gate.quota import Quota
from penstock.gate.server_hints import CONCURRENT, Policy, ServerHints
from penstock.gate.server_hints import REQUESTS as REQUESTS

BURST_SHARE = 0.1
"""Of `amount`, for a burst that nobody gave. Arbitrary, because: a tenth of the time makes up for any late timer, and
few servers mind it."""

EARLY = 1e-6
"""Seconds that a start may be early. Floats of a loop's time are this exact after years, and no timer is."""

MOST_QUOTAS = 16
"""Policies of one server that are kept. Arbitrary, because: real ones send one to six, and a bad one must not fill the
memory with new names."""

MOST_CONCURRENT = 1_000_000
"""What a server may allow in flight. Arbitrary, because: more than any machine has ports."""

SLICE = 0.02
"""Seconds. Round trips that start within such a time may reach the server in any order. Arbitrary, because: the jitter
of a good network path is a fraction of it, and it costs nothing where requests come seldom."""


@dataclass(frozen=True)
class Rate:
    """So much in so long a time. A plain value: comparable, picklable, safe to share.

    Args:
        amount: what may be used in `per` seconds, on average: requests, or whatever the dimension counts.
        per: seconds.
        burst: what may be used at once after a rest. None: a tenth of `amount`, and at least 1.

    Raises:
        UsageError: a value that cannot work.
    """

    amount: float
    per: float = 1.0
    burst: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("amount", self.amount), ("per", self.per), ("burst", self.burst)):
            if name == "burst" and value is None:
                continue
            if not is_amount(value) or value == 0:
                raise UsageError(
                    f"Rate({name}={value!r}): expected a number above 0. Write Rate(500, per=60) for 500 in a minute."
                )

    @property
    def size(self) -> float:
        """The burst that applies."""
        return max(1.0, self.amount * BURST_SHARE) if self.burst is None else self.burst


Rates: TypeAlias = Rate | Mapping[str, Rate]
"""One `Rate` counts requests. A mapping names its dimensions:
`{"requests": Rate(500, per=60), "tokens": Rate(90_000, per=60)}`."""

Weight: TypeAlias = float | Mapping[str, float]
"""What one round trip uses. A number: so many requests. A mapping: amounts by dimension; requests are 1 unless said."""


def checked_rates(rates: Rates | None) -> Rates | None:
    """Refuse what is no rate.

    Raises:
        UsageError: neither None, nor a `Rate`, nor a mapping of names to rates.
    """
    named = {} if rates is None or isinstance(rates, Rate) else rates
    if not isinstance(named, Mapping) or not all(
        isinstance(name, str) and isinstance(rate, Rate) for name, rate in named.items()
    ):
        raise UsageError(
            f"rate={rates!r}: expected a Rate, or a mapping of names to rates. Write rate=Rate(500, per=60), or "
            f'rate={{"requests": Rate(500, per=60), "tokens": Rate(90_000, per=60)}}.'
        )
    return rates


def amounts(weight: Weight | None) -> Mapping[str, float] | None:
    """The form that a `Meter` takes: amounts by dimension, or None for one plain request. A copy: it stays as it is.

    Raises:
        UsageError: neither a number of at least 0, nor a mapping of names to such numbers.
    """
    if weight is None:
        return None
    named = weight if isinstance(weight, Mapping) else {REQUESTS: weight}
    for name, amount in named.items():
        if not isinstance(name, str) or not is_amount(amount):
            found = f"{name!r:.100} is {amount!r:.100}" if isinstance(name, str) else f"{name!r:.100} is no name"
            raise UsageError(
                f"weight={weight!r:.200}: {found}, expected a number of at least 0. "
                f'Write a weight of 3 for three requests, or of {{"requests": 1, "tokens": 812}}.'
            )
    return None if weight == 1 else dict(named)


def is_amount(value: object) -> bool:
    """A finite number of at least 0."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return 0 <= float(value) < math.inf
    except OverflowError:  # an integer beyond all floats
        return False


class _Bucket:
    """The state of one configured rate."""

    __slots__ = ("allowance", "burst", "interval", "lead", "rate", "tat")

    def __init__(self, rate: Rate) -> None:
        self.tat = -math.inf
        self.set(rate)

    def set(self, rate: Rate) -> None:
        self.rate = rate
        self.burst = rate.size
        self.interval = rate.per / rate.amount
        self.allowance = self.burst * self.interval
        """Seconds from empty to full."""
        self.lead = self.allowance - min(1.0, self.burst) * self.interval
        """How long before `tat` a single one may start."""

    def due(self, weight: float) -> float:
        """When so much may be taken."""
        return self.tat - self.allowance + min(weight, self.burst) * self.interval

    def take(self, weight: float, now: float) -> None:
        self.tat = max(self.tat, now) + weight * self.interval

    def give_back(self, weight: float, now: float) -> None:
        """Undo so much of what was taken. A full bucket takes no more."""
        self.tat = max(self.tat - weight * self.interval, min(self.tat, now))

    def tokens(self, now: float) -> float:
        """What is in it; negative while it is in debt."""
        return self.burst - max(0.0, self.tat - now) / self.interval


class Meter:
    """Decides when the next round trip of one service key may start, by rates.

    A weight is None for one request, or amounts by dimension; what it does not name is 0, and 1 for requests.

    Raises:
        UsageError: `rates` is neither a `Rate` nor a mapping of names to rates.
    """

    __slots__ = (
        "_buckets", "_cubic", "_dimensions", "_quotas", "_requests", "_rescaled", "_slice", "_slice_from", "_started",
        "_units", "_used_up", "active", "concurrency", "taken",
    )  # fmt: skip

    def __init__(self, rates: Rates | None = None) -> None:
        self.active = False
        """Whether anything can delay anybody. While it is False, `delay` and `take` need not be called."""
        self.concurrency: int | None = None
        """What the server allows in flight, where it says so."""
        self.taken = 0
        """How many have started, but for those of the last instants. Read it after `take`, and hand it to `learn` as
        `mark` when the answer is there: it tells what the server cannot have seen when it wrote the answer."""
        self._started = 0
        self._slice = 0
        """What had started when the current slice of time began."""
        self._slice_from = -math.inf
        self._dimensions: set[str] = set()
        """Those that weights have named."""
        self._buckets: dict[str, _Bucket] = {}
        self._requests: _Bucket | None = None
        """The bucket of requests, if it is the only thing there is: the short way."""
        self._rescaled: list[tuple[_Bucket, float]] = []
        """Buckets whose rate has changed, with the interval that they had before."""
        self._quotas: dict[tuple[str, str], Quota] = {}
        self._used_up: dict[tuple[str, str], float] = {}
        """When there is more of quotas in units in which nobody counts, and which are used up. The one that was heard
        of longest ago comes first."""
        self._units: set[str] = set()
        """Those that the server has named."""
        self._cubic = Cubic()
        self.set_rates(rates)

    @property
    def searching(self) -> bool:
        """Whether the rate is being found by trial. Refusals are answered by that then, and by nothing else: a limit
        on what is in flight that heard of them too would make it half as fast."""
        return self._cubic.enabled

    def set_rates(self, rates: Rates | None) -> None:
        """Change the rates of a live meter. What was used so far stays used, for dimensions that stay.

        Raises:
            UsageError: neither a `Rate` nor a mapping of names to rates.
        """
        checked_rates(rates)
        named = {REQUESTS: rates} if isinstance(rates, Rate) else rates or {}
        buckets = {}
        for name, rate in named.items():
            bucket = self._buckets.get(name)
            if bucket is None:
                bucket = _Bucket(rate)
            elif bucket.rate != rate:
                self._rescaled.append((bucket, bucket.interval))
                bucket.set(rate)
            buckets[name] = bucket
        self._buckets = buckets
        self._arrange()

    def _arrange(self) -> None:
        """See what there is, and choose the shortest way."""
        more = bool(self._quotas or self._used_up) or self._cubic.enabled
        self.active = more or bool(self._buckets)
        alone = list(self._buckets) == [REQUESTS] and not more and not self._rescaled
        self._requests = self._buckets[REQUESTS] if alone else None
        if not more:
            self.taken = self._slice = 0  # nobody counts from now on

    def _rescale(self, now: float) -> None:
        """Give buckets whose rate has changed as many tokens as they had."""
        for bucket, interval in self._rescaled:
            if bucket.tat > now:
                bucket.tat = now + (bucket.tat - now) / interval * bucket.interval
        self._rescaled.clear()
        self._arrange()

    def delay(self, weight: Mapping[str, float] | None, now: float) -> float:
        """Seconds until a round trip of that weight may start; 0.0: now."""
        bucket = self._requests
        if bucket is not None and weight is None:
            wait = bucket.tat - bucket.lead - now
            return wait if wait > EARLY else 0.0
        if self._rescaled:
            self._rescale(now)
        due = -math.inf
        for name, bucket in self._buckets.items():
            amount = _amount(weight, name)
            if amount > 0:
                due = max(due, bucket.due(amount))
        for quota in self._quotas.values():
            amount = _amount(weight, quota.dimension)
            if amount > 0:
                due = max(due, quota.due(amount, now))
        if self._used_up:
            due = max(due, *self._used_up.values())
        if self._cubic.enabled:
            due = max(due, self._cubic.due(now))
            if not self._cubic.enabled:
                self._arrange()
        wait = due - now
        return wait if wait > EARLY else 0.0

    def take(self, weight: Mapping[str, float] | None, now: float) -> None:
        """Count a round trip that starts now, in all dimensions at once."""
        bucket = self._requests
        if bucket is not None and weight is None:
            tat = bucket.tat
            bucket.tat = (tat if tat > now else now) + bucket.interval
            return
        if self._rescaled:
            self._rescale(now)
        self._count(now)
        if weight is not None:
            self._dimensions.update(weight)
        for name, bucket in self._buckets.items():
            bucket.take(_amount(weight, name), now)
        for quota in self._quotas.values():
            amount = _amount(weight, quota.dimension)
            if amount > 0:
                quota.take(amount, now)
        if self._cubic.enabled:
            self._cubic.take(now)

    def _count(self, now: float) -> None:
        if now >= self._slice_from + SLICE:
            self._slice_from = now
            self.taken = self._slice
            self._slice = self._started
        self._started += 1

    def settle(self, reserved: Mapping[str, float] | None, used: Mapping[str, float], now: float) -> None:
        """Correct a reservation by what was really used, up or down. What `used` does not name stays as reserved.

        A refund never fills a bucket beyond its burst; a debit may leave a debt, for which later starts wait.
        """
        if self._rescaled:
            self._rescale(now)
        for name, amount in used.items():
            difference = amount - _amount(reserved, name)
            bucket = self._buckets.get(name)
            if bucket is not None:
                if difference > 0:
                    bucket.take(difference, now)
                else:
                    bucket.give_back(-difference, now)
            for quota in self._quotas.values():
                if quota.dimension == name:
                    quota.correct(difference)

    def refuse_what_never_fits(self, weight: Mapping[str, float] | None) -> None:
        """Refuse a weight for which no wait would ever be long enough.

        Raises:
            UsageError: more than a whole `amount`; a dimension that has no rate while others have.
        """
        if weight is None:
            weight = _ONE_REQUEST
        else:
            self._dimensions.update(weight)
        for name, amount in weight.items():
            bucket = self._buckets.get(name)
            if bucket is not None:
                most = max(bucket.rate.amount, bucket.burst)
                if amount > most:
                    raise UsageError(
                        f"weight={_shown(weight)} never fits: {amount:g} {name}, and {bucket.rate} lets {most:g} "
                        f"through at once, however long it waits. Write a smaller weight, or rate="
                        f"{{{name!r}: Rate({_rounded_up(amount)}, per=...)}}."
                    )
            elif self._buckets and name != REQUESTS:
                known = ", ".join(repr(known) for known in self._buckets)
                raise UsageError(
                    f"weight={_shown(weight)}: there is no rate named {name!r}, only {known}. "
                    f"Write rate={{..., {name!r}: Rate(...)}}, or leave it out of the weight."
                )

    def refuse_unknown(self, used: Mapping[str, float]) -> None:
        """Refuse what was used of something that nobody counts: most likely it is misspelt.

        Raises:
            UsageError: a dimension that has no rate while others have, and of which the server does not tell.
        """
        for name in used if self._buckets else ():
            if name not in self._buckets and name != REQUESTS and name not in self._units:
                known = ", ".join(repr(known) for known in self._buckets)
                raise UsageError(
                    f"used={dict(used)!r:.200}: there is no rate named {name!r}, only {known}, and the server tells of "
                    f"none. Write rate={{..., {name!r}: Rate(...)}}, or leave it out."
                )

    def learn(self, hints: ServerHints, in_flight: int, now: float, mark: int | None = None) -> None:
        """Take over what an answer says about the server's quotas. Call it before `throttled`.

        Args:
            hints: those of the answer.
            in_flight: round trips that are under way, without the one that was answered.
            now: when it was.
            mark: what `taken` was after the answer's own round trip had started. An answer to an older one than one
                that was heard already changes nothing. None: answers are taken to come in the order of their round
                trips.
        """
        for policy in hints.policies:
            self._learn(policy, in_flight, now, mark or None)
        if hints.policies:
            self._forget(now)
        self._arrange()

    def _forget(self, now: float) -> None:
        """Drop what is over, and what the server tells of no longer."""
        for key in [key for key, quota in self._quotas.items() if quota.stale(now)]:
            del self._quotas[key]
        for key in [key for key, until in self._used_up.items() if until <= now]:
            del self._used_up[key]

    def _learn(self, policy: Policy, in_flight: int, now: float, mark: int | None) -> None:
        if policy.unit == CONCURRENT:
            if policy.quota is not None and policy.quota >= 1:
                self.concurrency = int(min(policy.quota, MOST_CONCURRENT))
            return
        if policy.remaining is None or policy.reset is None:
            return
        key = policy.name, policy.unit
        self._note_unit(policy.unit)
        dimension = self._dimension(policy.unit)
        if dimension is None:
            self._note(key, policy.remaining, now + policy.reset)
            return
        quota = self._quotas.get(key)
        if quota is None:
            if len(self._quotas) >= MOST_QUOTAS:
                del self._quotas[min(self._quotas, key=lambda key: self._quotas[key].heard)]
            quota = self._quotas[key] = Quota(dimension, now)
            self._used_up.pop(key, None)
        if mark is not None:
            if mark < quota.newest:
                return
            in_flight = min(in_flight, self._started - mark)
        if quota.disbelieved and policy.remaining > 0:
            quota = self._quotas[key] = Quota(dimension, now)  # what was learnt from lies is worth nothing
        quota.newest = quota.newest if mark is None else mark
        quota.learn(policy.remaining, policy.reset, policy.quota, policy.window, in_flight, now)

    def _dimension(self, unit: str) -> str | None:
        """What the user calls it; None if it is not counted here."""
        for name in (unit, unit.replace("-", "_")):
            if name == REQUESTS or name in self._buckets or name in self._dimensions:
                return name
        return None

    def _note(self, key: tuple[str, str], remaining: float, until: float) -> None:
        self._used_up.pop(key, None)
        if remaining <= 0:
            if len(self._used_up) >= MOST_QUOTAS:
                del self._used_up[next(iter(self._used_up))]
            self._used_up[key] = until

    def _note_unit(self, unit: str) -> None:
        if unit not in self._units:
            if len(self._units) >= 2 * MOST_QUOTAS:
                self._units.clear()
            self._units.update((unit, unit.replace("-", "_")))

    def throttled(self, now: float, hinted: bool, queueing: bool, mark: int | None = None) -> None:
        """A round trip was refused for being too many.

        Args:
            now: when.
            hinted: whether the server said when to come back, or what its quotas are.
            queueing: whether requests queue at the server, so that it is too slow rather than asked too often.
            mark: as of `learn`.
        """
        for quota in self._quotas.values():
            quota.believe()
            if quota.dimension == REQUESTS:
                quota.refused(now)
        if not hinted:
            enabled = self._cubic.enabled
            self._cubic.throttled(now, queueing)
            if self._cubic.enabled != enabled:
                self._arrange()

    def succeeded(self, now: float) -> None:
        """A round trip was answered, and not with a refusal. Call it before or after `learn`."""
        for quota in self._quotas.values():
            quota.answered()
        self._cubic.succeeded(now)

    def tokens(self, now: float) -> dict[str, float]:
        """What could start at once now, by dimension: of rates, and of quotas that the server tells of."""
        if self._rescaled:
            self._rescale(now)
        tokens = {name: bucket.tokens(now) for name, bucket in self._buckets.items()}
        for quota in self._quotas.values():
            if not quota.disbelieved:
                tokens[quota.dimension] = min(tokens.get(quota.dimension, math.inf), quota.left(now))
        return tokens

    def told(self, now: float) -> dict[str, float]:
        """What is left of each quota that the server tells of, by the server's name for it."""
        left = {name: 0.0 for (name, _), until in self._used_up.items() if until > now}
        for (name, _), quota in self._quotas.items():
            if not quota.disbelieved:
                left[name] = min(left.get(name, math.inf), max(0.0, quota.left(now)))
        return left

    def rate_found(self, now: float) -> float | None:
        """Requests a second, as found by refusals; None while there are none to find it by."""
        return self._cubic.found(now)

    def at_rest(self, now: float) -> bool:
        """Whether nothing would be lost by forgetting all this: no bucket lacks anything, no reset is to come."""
        if self._rescaled:
            self._rescale(now)
        return (
            all(bucket.tat <= now for bucket in self._buckets.values())
            and all(quota.at_rest(now) for quota in self._quotas.values())
            and all(until <= now for until in self._used_up.values())
            and self._cubic.found(now) is None
        )

    def wait_reason(self, now: float, weight: Mapping[str, float] | None = None) -> str | None:
        """What holds a round trip of that weight back, and for how long, in words; None: nothing does."""
        if self._rescaled:
            self._rescale(now)
        due, reason = max(self._reasons(now, weight), default=(-math.inf, ""))
        return f"{reason}, for another {due - now:.1f} s" if due - now > EARLY else None

    def _reasons(self, now: float, weight: Mapping[str, float] | None) -> Iterator[tuple[float, str]]:
        for name, bucket in self._buckets.items():
            amount = _amount(weight, name)
            if amount > 0:
                rate = bucket.rate
                yield bucket.due(amount), f"the rate of {name!r} ({rate.amount:.12g} in {rate.per:.12g} s)"
        for (told, _), quota in self._quotas.items():
            amount = _amount(weight, quota.dimension)
            if amount > 0:
                yield quota.due(amount, now), _of_server(told, quota.left(now), quota.reset_in(now))
        for (told, _), until in self._used_up.items():
            yield until, _of_server(told, 0, until - now)
        found = self._cubic.found(now)
        if found is not None:
            yield self._cubic.due(now), f"the rate found by refusals ({found:.3g}/s)"


def _of_server(name: str, left: float, reset: float) -> str:
    return f"the server's quota {name!r:.100} ({max(0, math.floor(left))} left, reset in {max(0, math.ceil(reset))} s)"


_ONE_REQUEST: Mapping[str, float] = {REQUESTS: 1}


def _amount(weight: Mapping[str, float] | None, name: str) -> float:
    if weight is None:
        return 1.0 if name == REQUESTS else 0.0
    return weight.get(name, 1.0 if name == REQUESTS else 0.0)


def _shown(weight: Mapping[str, float]) -> str:
    return f"{weight[REQUESTS]!r}" if list(weight) == [REQUESTS] else f"{dict(weight)!r}"


def _rounded_up(amount: float) -> str:
    return f"{math.ceil(amount):_}"
