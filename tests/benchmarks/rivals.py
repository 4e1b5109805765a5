"""What other libraries do to find a limit, as rules for our gate: so that nothing but the rule differs.

    Gate(limit=Gradient2()) -> limiter -> told of each attempt, as ours is -> a limit

These are our own reading of their rules, written anew. Each class names the project, the version that was read and the
file. What is the same for all, and not theirs: they begin at 8, may go down to 1 and up to 1,000, as ours may, so that
neither a lucky start nor a ceiling decides. All else is as published.

What a rule is told of an attempt is what its own library would tell it: when it began, what was in flight then, how
long it took, whether it was dropped. In particular a refusal has a time there too, where our gate has none. None of
them knows our breaker, our retry budget or a loop that lags: what the gate does about these, it does for all alike.

Loop thread only, as every limiter.
"""

import math
import random
from dataclasses import dataclass
from typing import NamedTuple

from penstock.gate.limiter import LimitChange, Limiter, LimitRule, Reason

START, LEAST, MOST = 8, 1, 1_000
"""MOST is what Vegas and Envoy have by default; Gradient2 and AIMD have 200, which would decide at a knee of 400."""


class Attempt(NamedTuple):
    """What a rule is told when an attempt has ended."""

    ended: float
    rtt: float
    in_flight: int
    """Attempts that were running when it began, with itself."""
    dropped: bool


class Port(Limiter):
    """What the ports share: each attempt is timed here, since the gate has no time for those that are refused."""

    def __init__(self, start: float, least: float, most: float) -> None:
        self._least, self._most = least, most
        self._value = start
        self.limit = int(start)
        self.baseline: float | None = None
        self.queue = 0.0
        self._running: dict[int, tuple[float, int]] = {}
        self._newest = 0

    def started(self, now: float) -> int:
        self._newest += 1
        self._running[self._newest] = (now, len(self._running) + 1)
        return self._newest

    def ended(self, mark: int, now: float, rtt: float | None, dropped: bool) -> LimitChange | None:
        started, in_flight = self._running.pop(mark)
        before = self.limit
        if dropped or rtt is not None:
            self.learn(Attempt(now, now - started if rtt is None else rtt, in_flight, dropped))
        reason: Reason = "loss" if dropped else "growth" if self.limit > before else "queue"
        return None if self.limit == before else LimitChange(now, before, self.limit, reason)

    def learn(self, attempt: Attempt) -> None:
        """Take a sample into account."""
        raise NotImplementedError

    def set(self, value: float) -> None:
        """Have another limit, within the bounds."""
        self._value = max(self._least, min(self._most, value))
        self.limit = int(self._value)

    def contaminate(self) -> None: ...

    def half_open(self, _now: float) -> None: ...

    def recovered(self, _now: float) -> None: ...

    def cap(self, most: int | None, _now: float) -> None:
        self._most = MOST if most is None else most
        self.set(self._value)


# --- Netflix ---


class Averages(NamedTuple):
    """A window of samples, as one."""

    rtt: float
    """Their mean."""
    in_flight: int
    """The most of them."""
    dropped: bool
    """Whether any was."""


class SampleWindow:
    """Samples of a second and at least ten of them: Netflix concurrency-limits 78a74b9, `WindowedLimit`.

    It is what its documentation puts around the limits that go by latency, with means. Too few samples are dropped.
    """

    SHORTEST, LONGEST = 1.0, 1.0
    FEWEST = 10
    QUICKEST = 100e-6
    """Seconds; quicker ones are no samples."""

    def __init__(self) -> None:
        self._until = -math.inf
        self._count = 0
        self._sum = 0.0
        self._quickest = math.inf
        self._in_flight = 0
        self._dropped = False

    def add(self, attempt: Attempt) -> Averages | None:
        """Add a sample; returns the averages if that ended the window."""
        if attempt.rtt < self.QUICKEST:
            return None
        self._count += 1
        self._sum += attempt.rtt
        self._quickest = min(self._quickest, attempt.rtt)
        self._in_flight = max(self._in_flight, attempt.in_flight)
        self._dropped = self._dropped or attempt.dropped
        if attempt.ended <= self._until:
            return None
        self._until = attempt.ended + min(max(2 * self._quickest, self.SHORTEST), self.LONGEST)
        enough = self._count >= self.FEWEST
        averages = Averages(self._sum / self._count, self._in_flight, self._dropped)
        self._clear()
        return averages if enough else None

    def _clear(self) -> None:
        self._count = 0
        self._sum = 0.0
        self._quickest = math.inf
        self._in_flight = 0
        self._dropped = False


class Gradient2Limiter(Port):
    """See `Gradient2`."""

    QUEUE = 4
    TOLERANCE = 1.5
    SMOOTHING = 0.2
    LONG, WARM_UP = 600, 10
    """Windows."""

    def __init__(self) -> None:
        super().__init__(START, LEAST, MOST)
        self._window = SampleWindow()
        self._windows = 0
        self._long = 0.0

    def learn(self, attempt: Attempt) -> None:
        if averages := self._window.add(attempt):
            self.learn_window(averages)

    def learn_window(self, averages: Averages) -> None:
        """Take a window into account. Whether anything was dropped is not asked."""
        short = averages.rtt
        self._average(short)
        if self._long > 2 * short:
            self._long *= 0.95
        self.baseline = self._long
        if averages.in_flight < self._value / 2:
            return
        gradient = max(0.5, min(1.0, self.TOLERANCE * self._long / short))
        wanted = gradient * self._value + self.QUEUE
        self.set((1 - self.SMOOTHING) * self._value + self.SMOOTHING * wanted)

    def _average(self, short: float) -> None:
        """A plain mean at first, then an exponential one."""
        self._windows += 1
        share = 1 / self._windows if self._windows <= self.WARM_UP else 2 / (self.LONG + 1)
        self._long += share * (short - self._long)


@dataclass(frozen=True)
class Gradient2(LimitRule):
    """Netflix concurrency-limits 78a74b9, `Gradient2Limit`, in windows of a second."""

    def limiter(self, now: float, most: int | None, rng: random.Random) -> Gradient2Limiter:
        """A limiter for one service key."""
        return Gradient2Limiter()


class VegasLimiter(Port):
    """See `Vegas`."""

    PROBE = 30

    def __init__(self, rng: random.Random) -> None:
        super().__init__(START, LEAST, MOST)
        self._rng = rng
        self._window = SampleWindow()
        self._samples = 0
        self._jitter = rng.uniform(0.5, 1.0)

    def learn(self, attempt: Attempt) -> None:
        if averages := self._window.add(attempt):
            self.learn_window(averages)

    def learn_window(self, averages: Averages) -> None:
        """Take a window into account."""
        self._samples += 1
        if self._samples >= self._jitter * self.PROBE * self._value:
            self._jitter = self._rng.uniform(0.5, 1.0)
            self._samples = 0
            self.baseline = averages.rtt
        elif self.baseline is None or averages.rtt < self.baseline:
            self.baseline = averages.rtt
        else:
            self._steer(averages, self.baseline)

    def _steer(self, averages: Averages, baseline: float) -> None:
        step = max(1, int(math.log10(self.limit)))
        queue = math.ceil(self._value * (1 - baseline / averages.rtt))
        self.queue = queue
        if averages.dropped:
            self.set(self._value - step)
        elif 2 * averages.in_flight < self._value:
            return
        elif queue <= step:
            self.set(self._value + 6 * step)
        elif queue < 3 * step:
            self.set(self._value + step)
        elif queue > 6 * step:
            self.set(self._value - step)


@dataclass(frozen=True)
class Vegas(LimitRule):
    """Netflix concurrency-limits 78a74b9, `VegasLimit`, in windows of a second."""

    def limiter(self, now: float, most: int | None, rng: random.Random) -> VegasLimiter:
        """A limiter for one service key."""
        return VegasLimiter(rng)


class AimdLimiter(Port):
    """See `Aimd`."""

    BACK_OFF = 0.9
    TOO_LONG = 5.0
    """Seconds."""

    def __init__(self) -> None:
        super().__init__(START, LEAST, MOST)

    def learn(self, attempt: Attempt) -> None:
        if attempt.dropped or attempt.rtt > self.TOO_LONG:
            self.set(int(self.limit * self.BACK_OFF))
        elif 2 * attempt.in_flight >= self.limit:
            self.set(self.limit + 1)


@dataclass(frozen=True)
class Aimd(LimitRule):
    """Netflix concurrency-limits 78a74b9, `AIMDLimit`: with every sample."""

    def limiter(self, now: float, most: int | None, rng: random.Random) -> AimdLimiter:
        """A limiter for one service key."""
        return AimdLimiter()


# --- Palantir ---


class CautiousLimiter(Port):
    """See `Cautious`."""

    RATIO = 0.9

    def __init__(self) -> None:
        super().__init__(START, LEAST, MOST)

    def learn(self, attempt: Attempt) -> None:
        if attempt.dropped:
            self.set(math.floor(self._value * self.RATIO))
        elif attempt.in_flight >= math.floor(self._value * self.RATIO):
            self.set(self._value + 1 / self._value)


@dataclass(frozen=True)
class Cautious(LimitRule):
    """Palantir dialogue 0597474, `CautiousIncreaseAggressiveDecreaseConcurrencyLimiter`.

    Theirs has one for the host, which 429s do not concern, and one for each endpoint, which only these concern; here
    there is one endpoint, so the smaller of the two is a single one that both concern.
    """

    def limiter(self, now: float, most: int | None, rng: random.Random) -> CautiousLimiter:
        """A limiter for one service key."""
        return CautiousLimiter()


# --- Envoy ---


class EnvoyLimiter(Port):
    """See `Envoy`."""

    PINNED = 3
    """The limit while the least round-trip time is measured, and the least one at any time."""
    EVERY = 0.1
    """Seconds from one limit to the next."""
    MEASURE_EVERY, JITTER = 60.0, 0.15
    ENOUGH = 50
    """Samples for the least round-trip time."""
    BUFFER = 0.25
    PATIENCE = 5
    """Times that the limit may be the least one in a row until the least round-trip time is doubted."""

    def __init__(self, now: float, rng: random.Random) -> None:
        super().__init__(START, self.PINNED, MOST)
        self._rng = rng
        self._samples: list[float] = []
        self._low = 0
        self._next = math.inf
        self._measure_at = math.inf
        self._restore: float | None = None
        """The limit to go back to; None while the least round-trip time is not measured."""
        self._since = now
        self._measure(now)

    def learn(self, attempt: Attempt) -> None:
        self._tick(attempt.ended)
        if attempt.ended - attempt.rtt < self._since:
            return
        self._samples.append(attempt.rtt)
        if self._restore is not None and len(self._samples) >= self.ENOUGH:
            self._measured(attempt.ended, self._restore)

    def _tick(self, now: float) -> None:
        """What timers would have done by now."""
        if self._restore is not None:
            return
        if now >= self._measure_at:
            self._measure(now)
        elif now >= self._next:
            self._next = now + self.EVERY
            if self._samples:
                self._steer(self._median())
                if self._low >= self.PATIENCE:
                    self._measure(now)

    def _measure(self, now: float) -> None:
        self._restore = self._value
        self._samples.clear()
        self._since = now
        self.set(self.PINNED)

    def _measured(self, now: float, restore: float) -> None:
        self.baseline = self._median()
        self._restore = None
        self._low = 0
        self.set(restore)
        self._measure_at = now + self.MEASURE_EVERY * (1 + self.JITTER * self._rng.random())
        self._next = now + self.EVERY

    def _steer(self, median: float) -> None:
        assert self.baseline is not None, "it is measured first of all"
        before = self.limit
        gradient = max(0.5, min(2.0, self.baseline * (1 + self.BUFFER) / median))
        wanted = gradient * self.limit
        self.set(int(wanted + math.sqrt(wanted)))
        self._low = self._low + 1 if before == self.limit == self.PINNED else 0

    def _median(self) -> float:
        samples = sorted(self._samples)
        self._samples.clear()
        return samples[(len(samples) - 1) // 2]


@dataclass(frozen=True)
class Envoy(LimitRule):
    """Envoy 054694f, `gradient_controller.cc`, with the settings of its documentation's example and the median.

    Its least limit is 3 and stays so: it is also the one at which it measures.
    """

    def limiter(self, now: float, most: int | None, rng: random.Random) -> EnvoyLimiter:
        """A limiter for one service key."""
        return EnvoyLimiter(now, rng)


RIVALS: dict[str, LimitRule] = {
    "Gradient2": Gradient2(),
    "Vegas": Vegas(),
    "AIMD": Aimd(),
    "Cautious": Cautious(),
    "Envoy": Envoy(),
}
