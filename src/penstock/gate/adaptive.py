"""An in-flight limit that finds itself from what the service does: Vegas over cohorts, with probes.

    started, ended -> cohort -> mean R, its tolerance, in flight n, refused
                                   |
        refused more than usual? --+--> loss:   L falls in proportion, and must not pass there again at once
        queue > much?            --+--> queue:  L falls to what the service can do, in one step
        queue < little?          --+--> growth: L doubles at first, later by 1, 2, 4, ...
        time to look again?      --+--> probe:  L/2 for one cohort, which measures R0 and the usual refusals anew

A *cohort* is the next N requests that start once no more is in flight than the limit allows; it is judged when nine of
ten have ended. Those that are late, and the slowest tenth, count as the 90th percentile. From the cohort:

    n = in flight, averaged over time          R = mean round-trip time        s = its relative deviation
    tolerance = 6 s / sqrt(N), at least .03, at most .5
    knee  = n R0 (1 + tolerance) / R           what would be in flight if none queued (Little's law), at most n
    queue = n - knee                           little = max(1, .06 n)          much = max(2, .15 n)

    queue > much:    L = max(knee + much, L/2)
    queue < little:  L = 2 L in the start phase; else half the way to where it was last refused, and there by 2 % for
                     each 220 requests; else L + min(2^k, L/2) for the k-th growth running
    refused:         L = n (1 - min(.5, max(.02, .4 share))), at most n - 1, at least L/2
    probe:           every max(10 s, 40 R), + 0..15 %:  R < R0: R0 = R, and probe again, lower;
                     R > 1.5 R0: R0 = R, L as before the cuts that led here, start phase;  else: R0 half the way to R
    not all in use:  no growth; L falls to 2 peak + 8 by tenths. With a queue it falls as above, halved from the peak,
                     so that each cut takes effect

Why, and what goes wrong without it:

* *Cohorts*, since "the next N that end" are the fast ones first: more fast requests are let in, the mean falls further.
  With three of ten fast, a limit that samples so gets a part of what the service can do.
* *The mean as R0, never the minimum*: the fastest of many is luck, and a limit that wants all to be as fast shrinks.
  For the same reason R0 is lowered only by what is more than luck (`tolerance`).
* *R0 is raised by a probe alone*, at half the requests: measured under the load that it is to judge, it drifts up with
  the queue. If two cuts did not make it faster, the latency is not ours (a longer way), and the probe comes at once.
  If it got faster at the same load, the way is shorter, and what it saved stands in a queue: a probe, too.
* *Probes go on downwards while it gets faster*, so a first limit far above what the service can do does no harm.
* *Tolerance by noise*: a fixed share is too tight for a noisy service and too lax for a quiet one. Noisy ones get
  larger cohorts, too, but not in the start phase, where being late costs more than being wrong.
* *The queue is looked at though not all is in use*: as many as there are may be more than a service that got slower
  can do.
* *A cohort during which this process lagged* says nothing of times, and its probe is given up: L would stay at half as
  long as that lasts. What it was refused counts: a refusal is not made by lag.
* *A cohort begins when the limit is obeyed* (`_waiting`): what was sent before a cut cannot cause the next, and n is
  not what was in flight before.
* *Refusals and failures are no samples*: an instant 429 is the quickest answer of all. They are counted over cohorts
  (CUSUM: refused - usual x ended, never below 0), so that one in a thousand means nothing, and one in fifty is seen
  after the second.
* *Some failures are usual*: if a second loss follows on a cut, a probe asks whether half the load is refused half as
  seldom. If not, they are the service's own, holding back does not help, and L goes back to where it was. Otherwise one
  random failure in a hundred would keep L at a handful, as it does with TCP. More than half is an outage, never usual.

Guarantees: `min <= limit <= max` whatever happens, except that a lower `cap` wins; nothing raises, in any order of
calls; marks of older cohorts are ignored; one generator, same events: same limits. `started` and `ended` cost constant
time and together less than a microsecond; a judgement sorts a cohort (100 values, 400 in a probe for losses).

Known limits: what a shorter way saves is seen at once only if a cohort saw the change, else at the next probe. A
service that is used by others is shared fairly, but each keeps a queue of its own, up to a sixth of what it has in
flight. While a tenth of a cohort hangs, nothing is learnt: attempts need a timeout. At a cap that refuses softly (the
more, the nearer) L stays some per cent below the best. A share of failures that ends is forgotten over some probes, and
that long the limit is late to notice a new cap. A quota of requests a second is not a matter of what is in flight.

Sources: Vegas (Brakmo and Peterson 1995) for the queue between two bounds; DCTCP (RFC 8257) for the cut in proportion;
BIC (Xu, Harfoush and Rhee 2004) for the way back to where it was refused; BBRv2 (IETF drafts) for probing at half; Page
(1954) for CUSUM; Envoy's adaptive concurrency filter for the jitter and for measuring among requests of one window.
The numbers were tuned in simulation (`tests/scenarios`, and further ones that were not tuned on).

Pure: time and randomness are arguments. Loop thread only.
"""

import math
import random
from dataclasses import dataclass

from penstock.errors import UsageError
from penstock.gate.limiter import LimitChange, Limiter, LimitRule, Reason

START = 8
"""Arbitrary, because: no service minds eight requests, and any limit is some doublings away."""

SMALLEST_COHORT = 12
"""Requests. With 24, a service of 2 s that serves six at once takes eight seconds to be judged; 8 are too noisy."""
NOISY_COHORT = 48
"""To what the noise of a service may enlarge a cohort."""
WANTED_TOLERANCE = 0.25
"""Noise enlarges it until the tolerance is no larger."""
LARGEST_COHORT = 100
"""More requests say little more, and later."""
PROBE_COHORT = 32
"""At most: a probe costs half of what the service could do meanwhile."""
LATE = 0.1
"""Share of a cohort that is not waited for."""

SIGMAS = 6.0
"""Standard errors that are chance. Above the usual 3: requests that queue behind each other are not independent."""
LEAST_TOLERANCE = 0.03
MOST_TOLERANCE = 0.5
"""Arbitrary, because: a queue of half the round trip is wanted nowhere."""
LITTLE_QUEUE = 0.06
MUCH_QUEUE = 0.15
"""Shares of the requests in flight. At .1 and .2, the p99 at a knee of 400 was 6 points higher, with the same
throughput."""
LITTLE_WAIT, MUCH_WAIT = 0.0025, 0.005
"""Seconds of queueing below which a service is not busy, whatever share of a fast round trip they are. A loop that does
thousands of round trips a second makes answers wait for that long itself. Arbitrary, because: as CPython's switch
interval between threads; with less, a service of 0.1 ms is held at 3 requests in flight."""
ONE, TWO = 1.0, 2.0
"""The least bounds of the queue, as in Vegas: less than a request does not queue."""
BOUND = 0.7
"""Share of the limit that must be in use, on average, for the limit to be what holds requests back."""
STILL_SLOW = 0.9
"""Of the round-trip time at the last cut: above, the cut was in vain."""
VAIN_CUTS = 2
MOVED = 1.5
"""Times R0 at half the load: beyond, it is no queue of others, the way has changed."""

PROBE_EVERY = 10.0
"""Seconds. Arbitrary, because: a probe of some 100 ms then costs less than a hundredth."""
PROBE_ROUND_TRIPS = 40.0
"""The same for slow services."""
PROBE_JITTER = 0.15
"""As Envoy: clients of one service should not probe together, each then sees what the others leave."""

LEAST_LOSS = 0.005
"""Share of refusals that is tolerated. Half of the 1 % that a service behind a hard cap is to refuse at most."""
LOSS_ALARM = 1.0
"""Refusals beyond the tolerated ones that are a loss: the second within 200 requests."""
NOISY_ALARM, NOISY_LOSS = 5.0, 0.05
"""So many more if the usual share is this or higher: chance then brings that many at once."""
OUTAGE = 0.5
"""Share of refusals from which they are never usual."""
STILL_LOST = 0.5
"""Of the share before: if half the load is refused so often, the load is not the reason."""
EXPECTED_LOST = 6.0
"""Refusals that a probe for losses should see, if the load is not the reason."""
LARGEST_LOSS_PROBE = 400
LOSS_MEMORY = 100
"""Requests whose weight the known usual share has against those of an ordinary probe."""
LOSS_PAUSE, RARE_LOSS, LONGEST_LOSS_PAUSE = 1.0, 0.1, 8.0
"""Seconds until the next probe for losses after one that found the load to be the reason, doubled each time; longer the
rarer the losses are, as these do less harm than the probes."""
ASK_AGAIN = 0.8
"""Of the limit before the cuts: if there are still losses below, the answer of the last probe was chance."""
CUT_BY_LOSS = 0.4
"""Of the share refused. DCTCP has half; at caps, where the next request more is refused, less was better."""
LEAST_CUT, MOST_CUT = 0.02, 0.5
HOLD = 220
"""Requests without a loss, before it grows beyond the limit at which there was one: so that losses stay below 1 %."""
HOLD_ROUND_TRIPS = 30
"""The same for small limits, for which it would be an eternity."""
STEP = 0.02
"""Share of the limit by which it then grows."""
PASSED = 1.1
"""Times the limit at which there was a loss: beyond, it is forgotten."""


@dataclass(frozen=True)
class Adaptive(LimitRule):
    """A limit on requests in flight that finds itself, for each service key, from what the service does. A plain value.

    It grows while requests do not queue at the service, shrinks when they do or when they are refused, and lets in half
    as many for a moment now and then, to see how fast the service is when it is not busy.

    Args:
        start: the first limit; `min` or `max` if it is not between them.
        min: it never goes below.
        max: it never goes above; None: as many as there are connections or threads.

    Raises:
        UsageError: no whole number of at least 1, or `min` is above `max`.
    """

    start: int = START
    min: int = 1
    max: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("start", self.start), ("min", self.min), ("max", self.max)):
            if value is None and name == "max":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(
                    f"Adaptive({name}={value!r}): expected a whole number of at least 1 (round trips in flight)."
                )
        if self.max is not None and self.min > self.max:
            raise UsageError(
                f"Adaptive(min={self.min}, max={self.max}): expected min <= max, "
                f"such as Adaptive(min={self.max}, max={self.min})."
            )

    def limiter(self, now: float, most: int | None, rng: random.Random) -> Limiter:
        """A limiter for a service that has not been used yet. `most`: what connections or threads allow."""
        return AdaptiveLimiter(self, now, most, rng)


class Losses:
    """What share of requests is refused, and whether that is more than usual."""

    __slots__ = ("_ended", "_excess", "_lost", "usual")

    def __init__(self) -> None:
        self.usual = 0.0
        """The share that is refused however little the service has to do."""
        self.forget()

    def forget(self) -> None:
        """Count from here."""
        self._excess = 0.0
        self._lost = 0
        self._ended = 0

    def add(self, lost: int, ended: int) -> bool:
        """Count a cohort; True if too many are refused."""
        self._excess += lost - ended * (self.usual + max(LEAST_LOSS, self.usual / 2))
        self._lost += lost
        self._ended += ended
        if self._excess <= 0:
            self.forget()
        return self._excess >= LOSS_ALARM + NOISY_ALARM * min(1.0, self.usual / NOISY_LOSS)

    @property
    def share(self) -> float:
        """The share since counting began. Without the last one, which is there by choice: it made the alarm."""
        return (self._lost - 1) / (self._ended - 1) if self._ended > 1 else float(self._lost)

    def learn(self, lost: int, ended: int) -> None:
        """What an ordinary probe has seen."""
        self.usual += ended / (ended + LOSS_MEMORY) * (lost / ended - self.usual)


class AdaptiveLimiter:
    """The limit of one service key. Loop thread only; nothing blocks, nothing raises."""

    __slots__ = (
        "_area", "_at", "_before_cuts", "_ceiling", "_cohort", "_cut_from", "_drops", "_enough_drops", "_held",
        "_in_flight", "_largest", "_late", "_loss_pause", "_loss_probe_at", "_losses", "_max", "_min", "_missing",
        "_noisiness", "_opened", "_peak", "_places", "_probe_at", "_probe_size", "_restore", "_rng", "_rtts",
        "_shrunk_at", "_start", "_starting", "_streak", "_suspected", "_vain", "_value", "_void", "_waiting",
        "baseline", "limit", "queue",
    )  # fmt: skip

    def __init__(self, rule: Adaptive, now: float, most: int | None, rng: random.Random) -> None:
        self._rng = rng
        self._min = rule.min
        self._largest = min(math.inf if rule.max is None else rule.max, math.inf if most is None else max(1, most))
        self._max = self._largest
        self._start = rule.start
        self._set(rule.start)
        self.baseline: float | None = None
        self.queue = 0.0

        self._in_flight = 0
        self._peak = 0
        self._area = 0.0
        """Integral of what was in flight, up to `_at`."""
        self._at = now

        self._cohort = 0
        self._rtts: list[float] = []
        self._void = False
        self._noisiness = 0.0

        self._starting = True
        self._streak = 0
        self._ceiling: float | None = None
        """Where there was a loss."""
        self._held = 0
        """Requests without a loss since then, or since the last step beyond."""

        self._losses = Losses()
        self._cut_from: float | None = None
        """The limit before the first cut by loss of which nobody has asked yet whether it helped."""
        self._suspected = 0.0
        """The share that may be the service's own; a probe is asking."""
        self._loss_probe_at = now
        self._loss_pause = LOSS_PAUSE

        self._shrunk_at: float | None = None
        """The round-trip time at the last cut by queue."""
        self._before_cuts = 0.0
        self._vain = 0

        self._restore: float | None = None
        """The limit after the probe; None: there is no probe."""
        self._probe_size = 0
        self._probe_at = now + self._probe_interval(0.0)
        self._open(now)

    def started(self, now: float) -> int:
        """An attempt begins. Returns the mark of its cohort; 0 when it is not measured."""
        n = self._in_flight
        self._area += n * (now - self._at)
        self._at = now
        self._in_flight = n = n + 1
        if n > self._peak:
            self._peak = n
        if self._places:
            self._places -= 1
            return self._cohort
        return 0

    def ended(self, mark: int, now: float, rtt: float | None, dropped: bool) -> LimitChange | None:
        """An attempt is over, however it went."""
        n = self._in_flight
        self._area += n * (now - self._at)
        self._at = now
        if n:
            self._in_flight = n - 1
        if mark == self._cohort:
            self._missing -= 1
            if dropped:
                self._drops += 1
                if self._drops >= self._enough_drops:
                    return self._close(now)
            elif rtt is not None:
                self._rtts.append(rtt)
            if self._missing <= self._late:
                return self._close(now)
        elif self._waiting and self._in_flight <= self.limit:
            self._open(now)
        return None

    def contaminate(self) -> None:
        """This process lags: the round-trip times of this cohort say nothing."""
        self._void = True

    def half_open(self, now: float) -> LimitChange | None:
        """The breaker lets single requests through."""
        self._begin_again(now)
        return self._change(now, self._min, "breaker")

    def recovered(self, now: float) -> LimitChange | None:
        """The breaker has closed: begin as at first, with the baseline as it is."""
        self._begin_again(now)
        self._next()
        return self._change(now, self._start, "breaker")

    def cap(self, most: int | None, now: float) -> LimitChange | None:
        """Never allow more than `most` from now on; None: no such bound."""
        self._max = self._largest if most is None else min(self._largest, max(1, most))
        return self._change(now, self._value, "server")

    # --- the cohort ---

    def _open(self, now: float) -> None:
        size = self._cohort_size()
        self._cohort += 1
        self._places = self._missing = size
        self._late = round(size * LATE)
        self._enough_drops = max(2, int(min(size, self.limit) * OUTAGE))
        self._drops = 0
        self._rtts = []
        self._waiting = False
        self._void = False
        self._opened = now
        self._area = 0.0
        self._peak = self._in_flight

    def _cohort_size(self) -> int:
        if self._restore is not None:
            return self._probe_size
        size = max(SMALLEST_COHORT, self.limit)
        if not self._starting:
            size = max(size, min(NOISY_COHORT, int((SIGMAS * self._noisiness / WANTED_TOLERANCE) ** 2)))
        return min(size, LARGEST_COHORT)

    def _close(self, now: float) -> LimitChange | None:
        change = self._judge(now)
        if change is None:
            self._next()
        return change

    def _next(self) -> None:
        """End this cohort. The next opens when a request ends and no more is in flight than may be."""
        self._cohort += 1
        self._places = 0
        self._waiting = True

    def _judge(self, now: float) -> LimitChange | None:
        ended = len(self._rtts) + self._drops
        elapsed = now - self._opened
        n = self._area / elapsed if elapsed > 0 else float(self._peak)
        if ended and self._too_many_lost(ended):
            return self._lose(now, n)
        if ended and self._restore is not None:
            self._learn_losses(now, ended)
        if not self._rtts or self._void:
            return self._give_up_probe(now)
        mean, self._noisiness, size = _mean_and_deviation(self._rtts, self._missing - self._places)
        tolerance = self._tolerance(size)
        if self._restore is not None:
            return self._end_probe(now, mean, tolerance)
        return self._steer(now, n, mean, tolerance)

    def _tolerance(self, size: int) -> float:
        """By how much the mean of so many may be wrong."""
        return min(MOST_TOLERANCE, max(LEAST_TOLERANCE, SIGMAS * self._noisiness / math.sqrt(size)))

    # --- by round-trip times ---

    def _steer(self, now: float, n: float, mean: float, tolerance: float) -> LimitChange | None:
        base = mean if self.baseline is None else self.baseline
        if mean * (1 + tolerance) < base:
            base += 0.5 * (mean - base)
            self._probe_at = now
        self.baseline = base
        knee = n * min(1.0, base * (1 + tolerance) / mean)
        self.queue = n - knee
        wait = mean - base
        if self.queue > max(TWO, MUCH_QUEUE * n) and wait > MUCH_WAIT:
            return self._shrink(now, mean, knee + max(TWO, MUCH_QUEUE * n))
        if self._peak < self.limit or n < BOUND * self.limit:
            return self._spare(now)
        self._shrunk_at = None
        self._before_cuts = 0.0
        self._vain = 0
        if now >= self._probe_at and self._can_probe():
            return self._probe(now, min(PROBE_COHORT, max(SMALLEST_COHORT, self.limit)))
        if self.queue >= max(ONE, LITTLE_QUEUE * n) and wait > LITTLE_WAIT:
            self._starting = False
            self._streak = 0
            return None
        return self._change(now, self._grown(), "growth")

    def _spare(self, now: float) -> LimitChange | None:
        """There is more room than is used: do not grow, and do not keep what has never been tried."""
        self._streak = 0
        enough = 2.0 * self._peak + 8
        return self._change(now, max(enough, 0.9 * self._value), "application") if self._value > enough else None

    def _shrink(self, now: float, mean: float, wanted: float) -> LimitChange | None:
        if self._starting:
            self._starting = False
            self._probe_at = now  # the first baseline may have been measured with a queue
        self._streak = 0
        if self._shrunk_at is None:
            self._before_cuts = self._value
        elif mean > STILL_SLOW * self._shrunk_at:
            self._vain += 1
        else:
            self._vain = 0
        self._shrunk_at = mean
        if self._vain >= VAIN_CUTS and self._can_probe():
            return self._probe(now, min(PROBE_COHORT, max(SMALLEST_COHORT, self.limit)))
        # From what was used: a cut that nobody feels would be one in vain.
        return self._change(now, max(wanted, min(self._value, self._peak) / 2), "queue")

    def _grown(self) -> float:
        value = self._value
        if self._starting:
            return 2 * value
        if self._ceiling is None:
            self._streak += 1
            return value + max(1.0, min(2.0 ** (self._streak - 1), value / 2))
        if value < self._ceiling - 1:
            return value + max(1.0, (self._ceiling - 1 - value) / 2)
        self._held += len(self._rtts)
        if self._held < min(HOLD, HOLD_ROUND_TRIPS * value):
            return value
        self._held = 0
        if value > PASSED * self._ceiling + 1:
            self._ceiling = None
        return value + max(1.0, STEP * value)

    # --- by losses ---

    def _too_many_lost(self, ended: int) -> bool:
        if self._restore is not None:
            return self._drops > OUTAGE * max(4, ended)
        return self._losses.add(self._drops, ended)

    def _lose(self, now: float, n: float) -> LimitChange | None:
        share = self._losses.share if self._restore is None else 1.0
        self._losses.forget()
        self._starting = False
        self._streak = 0
        self._held = 0
        self._restore = None
        self._suspected = 0.0
        if not self._can_probe():
            if share <= OUTAGE:  # nobody can ask for less than this: it is the service's own
                self._losses.usual = max(self._losses.usual, share)
        elif self._cut_from is None or self._value > self._cut_from:
            self._cut_from = self._value
        elif 0 < share <= OUTAGE and (now >= self._loss_probe_at or self._value < ASK_AGAIN * self._cut_from):
            self._suspected = share
            return self._probe(now, round(min(LARGEST_LOSS_PROBE, max(PROBE_COHORT, EXPECTED_LOST / share))))
        share = max(0.0, share - self._losses.usual)
        self._ceiling = n * (1 - share) if share < OUTAGE else None
        return self._change(now, max(min(n - 1, n * _kept(share)), self._value / 2), "loss")

    def _learn_losses(self, now: float, ended: int) -> None:
        """A probe is over: what is refused at half the load?"""
        suspected, self._suspected = self._suspected, 0.0
        if not suspected:
            self._losses.learn(self._drops, ended)
            return
        assert self._restore is not None, "a probe is going on"
        assert self._cut_from is not None, "losses are suspected after a cut alone"
        self._losses.usual = self._drops / ended
        if self._losses.usual >= STILL_LOST * suspected:
            self._restore = max(self._restore, self._cut_from)
            self._ceiling = None
            self._loss_pause = LOSS_PAUSE
        else:
            self._ceiling = self._restore * (1 - suspected)
            self._restore *= _kept(suspected)
            self._loss_probe_at = now + self._loss_pause * max(1.0, RARE_LOSS / suspected)
            self._loss_pause = min(2 * self._loss_pause, LONGEST_LOSS_PAUSE)
        self._cut_from = None

    # --- the probe ---

    def _can_probe(self) -> bool:
        return self.limit > self._min

    def _probe(self, now: float, size: int) -> LimitChange | None:
        self._restore = self._value
        self._probe_size = size
        return self._change(now, self._value / 2, "probe")

    def _give_up_probe(self, now: float) -> LimitChange | None:
        """Nothing is known of the times of this cohort: if it was a probe, go on as if there had been none."""
        value, self._restore = self._restore, None
        if value is None:
            return None
        self._suspected = 0.0
        self._probe_at = now + self._probe_interval(self.baseline or 0.0)
        return self._change(now, value, "probe")

    def _end_probe(self, now: float, mean: float, tolerance: float) -> LimitChange | None:
        base = mean if self.baseline is None else self.baseline
        value, self._restore = self._restore, None
        assert value is not None, "a probe is going on"
        self._probe_at = now + self._probe_interval(mean)
        if mean * (1 + tolerance) < base:
            value *= mean / base
            self._probe_at = now
            base = mean
        elif mean > MOVED * base:
            value = max(value, self._before_cuts)
            self._starting = True
            base = mean
        else:
            base += 0.5 * (mean - base)
        self.baseline = base
        self._shrunk_at = None
        self._vain = 0
        return self._change(now, value, "probe")

    def _probe_interval(self, rtt: float) -> float:
        return max(PROBE_EVERY, PROBE_ROUND_TRIPS * rtt) * (1 + PROBE_JITTER * self._rng.random())

    # --- the limit ---

    def _begin_again(self, now: float) -> None:
        """After an outage: what was learnt of losses belongs to it, and who has to grow need not look back yet."""
        self._probe_at = now + self._probe_interval(self.baseline or 0.0)
        self._losses.forget()
        self._starting = True
        self._ceiling = None
        self._restore = None
        self._cut_from = None
        self._suspected = 0.0

    def _set(self, value: float) -> None:
        self._value = min(max(value, self._min), self._max)
        self.limit = int(self._value)

    def _change(self, now: float, value: float, reason: Reason) -> LimitChange | None:
        before = self.limit
        self._set(value)
        if self.limit == before:
            return None
        self._next()
        return LimitChange(now, before, self.limit, reason)


def _mean_and_deviation(rtts: list[float], unfinished: int) -> tuple[float, float, int]:
    """Mean, relative deviation and size of a cohort, in which nothing counts as more than its 90th percentile.

    The slowest say the least about the queue, but move the mean the most; and of the unfinished nothing else is known.
    """
    rtts.sort()
    size = len(rtts) + unfinished
    slow = rtts[min(len(rtts) - 1, int(size * (1 - LATE)))]
    values = [min(rtt, slow) for rtt in rtts]
    mean = (sum(values) + slow * unfinished) / size
    if mean <= 0:  # a clock that stood still
        return math.ulp(1.0), 0.0, size
    variance = (sum((value - mean) ** 2 for value in values) + unfinished * (slow - mean) ** 2) / size
    return mean, math.sqrt(variance) / mean, size


def _kept(share: float) -> float:
    """What is left of a limit at which this share is refused."""
    return 1 - min(MOST_CUT, max(LEAST_CUT, CUT_BY_LOSS * share))
