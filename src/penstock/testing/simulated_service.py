"""A service that is only simulated: with a knee, a cap, a quota and faults, bit-identical for each seed.

    call -> half the path -> [hole? failure? quota? cap?] -> queue, FIFO -> one of the servers -> half the path -> back
                                         |                                                              ^
                                         +-- 429 or 503 at once, or the connection is reset ------------+

It lives on the running loop, and is meant for `VirtualClockLoop`, where an hour of it takes minutes; on any other loop
it works too. Whatever gate is tested calls it as it would call a real one:

    service = SimulatedService(servers=16, service_time=lognormal(0.02, 0.2), path=0.03, seed=1)
    service.change_in(40.0, servers=4)
    answer = await gate.call(service.call)

**The model.** Little's law gives the knee: 16 servers of 20 ms do 800 requests a second, and with a path of 30 ms that
needs 800 * 0.05 = 40 in flight; more than that only wait. A request whose caller has gone stays at the service, which
goes on with it as a real one would, unless it had not arrived yet. The path keeps the order: after it has become
shorter, requests do not overtake those that are still under way.

**How it is so fast.** The fate of a request is computed when it has arrived (a heap of the times at which servers will
be free gives its end at once), so one timer for each request does. Arrivals themselves need none: nobody can notice
that one is looked at late, as long as that is before the earliest answer could be back, half a path later. So they are
looked at by the next call, and by one timer for all of them.

**Randomness** is drawn from one generator in the order of arrivals: same calls at the same times, same answers.

Loop thread only; nothing blocks.
"""

import asyncio
import math
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict, Unpack

from penstock.errors import ConnectionFailed, HttpStatusError, UsageError
from penstock.gate.rate import is_amount

Draw: TypeAlias = Callable[[random.Random], float]
"""Gives the seconds that a server needs for one request."""

URL = "http://simulated.test/"
"""What errors name. RFC 6761 keeps `.test` from ever being somebody's."""


def lognormal(mean: float, sigma: float) -> Draw:
    """Service times of a `mean` in seconds; `sigma`, of their logarithm, is the noise: 0.2 a little, 1 a lot.

    Raises:
        UsageError: a mean that is not above 0, or a negative sigma; what is no number.
    """
    if not (is_amount(mean) and mean > 0 and is_amount(sigma)):
        raise UsageError(f"lognormal({mean!r}, {sigma!r}): expected a mean above 0 and a sigma of at least 0.")
    mu = math.log(mean) - sigma * sigma / 2
    return lambda rng: math.exp(mu + sigma * rng.gauss(0.0, 1.0))


def mixture(*parts: tuple[float, Draw]) -> Draw:
    """Several kinds of requests, each with its share: `mixture((0.3, lognormal(0.01, 0.2)), (0.7, lognormal(0.4, 0)))`.

    Raises:
        UsageError: the shares are not positive or do not add up to 1; what is no pair of a share and a function.
    """
    for part in parts:
        if not (isinstance(part, tuple) and len(part) == 2 and is_amount(part[0]) and callable(part[1])):
            raise UsageError(
                f"mixture({part!r}): expected pairs of a share and a function, (0.3, lognormal(0.01, 0.2))."
            )
    shares = [share for share, _ in parts]
    if not parts or min(shares) <= 0 or not math.isclose(sum(shares), 1.0):
        raise UsageError(f"mixture with the shares {shares}: expected positive numbers that add up to 1.")
    draws = [draw for _, draw in parts]
    bounds = [sum(shares[: index + 1]) for index in range(len(shares) - 1)]
    return lambda rng: draws[_index(bounds, rng.random())](rng)


def _index(bounds: Sequence[float], value: float) -> int:
    for index, bound in enumerate(bounds):
        if value < bound:
            return index
    return len(bounds)


@dataclass(frozen=True)
class Quota:
    """How many requests a service takes in some time, and what it says about that. A plain value.

    Args:
        amount: requests in `per` seconds.
        per: seconds.
        burst: the size of a token bucket that is filled at `amount / per`; None is a fixed window instead: `amount` in
            each stretch of `per` seconds, counted from the service's first call.
        headers: "ratelimit" sends `RateLimit` and `RateLimit-Policy` (draft-ietf-httpapi-ratelimit-headers) with every
            answer, "x-ratelimit" the older `X-RateLimit-Limit`, `-Remaining` and `-Reset` (seconds from now).
        retry_after: whether a refusal says when to come back.

    Raises:
        UsageError: a number that is not above 0, unknown headers, or a `retry_after` that is not True or False.
    """

    amount: float
    per: float = 1.0
    burst: float | None = None
    headers: Literal["ratelimit", "x-ratelimit"] | None = None
    retry_after: bool = False

    def __post_init__(self) -> None:
        for name in ("amount", "per", "burst"):
            value = getattr(self, name)
            if not (is_amount(value) and value > 0) and not (name == "burst" and value is None):
                raise UsageError(f"Quota({name}={value!r}): expected a number above 0.")
        if self.headers not in (None, "ratelimit", "x-ratelimit"):
            raise UsageError(f'Quota(headers={self.headers!r}): expected "ratelimit", "x-ratelimit" or None.')
        if not isinstance(self.retry_after, bool):
            raise UsageError(f"Quota(retry_after={self.retry_after!r}): expected True or False.")


class Conditions(TypedDict, total=False):
    """What can change while a simulated service runs; see `SimulatedService`."""

    servers: int
    service_time: float | Draw
    path: float
    contention: float
    cap: int | None
    retry_after: float | None
    quota: Quota | None
    unavailable: float
    broken: float
    hole: bool


class Answer(NamedTuple):
    """What a simulated service answers."""

    headers: Mapping[str, str]
    """Those of a response; empty where the service has nothing to say."""
    elapsed: float
    """Seconds from the call to this answer: the path there, the wait, the service, the path back."""


class Counts(NamedTuple):
    """What has happened at a simulated service so far."""

    called: int
    arrived: int
    """Requests that have reached it."""
    served: int
    """Answers that have got back, or would have if their caller had still been there."""
    unheard: int
    """Answers and refusals whose caller had gone."""
    refused: int
    """429s, by the cap and the quota."""
    failed: int
    """503s and resets."""
    lost: int
    """Requests and answers that the hole has swallowed."""


class Refusal(HttpStatusError):
    """What a refused call raises: a client's error of status, with the headers of the answer."""

    headers: Mapping[str, str]


_NO_HEADERS: Mapping[str, str] = {}


class SimulatedService:
    """A service in a few numbers. See the module's notes for the model.

    Args:
        servers: requests that are served at once; more wait.
        service_time: seconds that a server needs: a number, or a function of a `random.Random`, such as `lognormal`.
        path: seconds to the service and back, without any of its work.
        contention: by which share each request that waits already when a request arrives makes its service longer.
        cap: requests inside, waiting or served; one more is refused at once with a 429. None: no cap.
        retry_after: seconds that such a 429, or a 503, asks to wait. None: it does not say.
        quota: a `Quota`, beyond which requests are refused at once with a 429.
        unavailable: share of the requests that is answered with a 503 at once.
        broken: share of the requests whose connection is reset at once.
        hole: True swallows every request and every answer: the caller hears nothing until its own time-out.
        seed: of all that is random.

    Raises:
        UsageError: a value that cannot work.
    """

    def __init__(
        self,
        *,
        servers: int = 16,
        service_time: float | Draw = 0.02,
        path: float = 0.03,
        contention: float = 0.0,
        cap: int | None = None,
        retry_after: float | None = None,
        quota: Quota | None = None,
        unavailable: float = 0.0,
        broken: float = 0.0,
        hole: bool = False,
        seed: int = 0,
    ) -> None:
        self._called = 0
        self._arrived = 0
        self._served = 0
        self._unheard = 0
        self._refused = 0
        self._failed = 0
        self._lost = 0
        self._random = random.Random(seed)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._coming: deque[_Request] = deque()
        """On their way to the service, or there and not looked at yet; in the order of arrival."""
        self._last_arrival = -math.inf
        self._look: asyncio.TimerHandle | None = None
        self._look_at = math.inf
        self._free: list[float] = []
        """When each server is done with all that has been given to it: a heap."""
        self._starts: deque[float] = deque()
        """When those begin to be served who wait."""
        self._recent: deque[_Request] = deque()
        """Who has been given to a server, in the order of arrival; all that have not ended are in it."""
        self._ends: list[float] = []
        """When they end: a heap. Kept while there is a cap."""
        self._allowance: _Allowance | None = None
        self._conditions: Conditions = {}
        self._set(
            {
                "servers": servers, "service_time": service_time, "path": path, "contention": contention, "cap": cap,
                "retry_after": retry_after, "quota": quota, "unavailable": unavailable, "broken": broken, "hole": hole,
            }
        )  # fmt: skip
        self._free = [-math.inf] * servers

    def __repr__(self) -> str:
        return f"<SimulatedService servers={self._servers} path={self._half * 2:g} inside={self.inside}>"

    @property
    def counts(self) -> Counts:
        """What has happened up to this moment."""
        self._settle()
        return Counts(self._called, self._arrived, self._served, self._unheard, self._refused, self._failed, self._lost)

    @property
    def inside(self) -> int:
        """Requests that wait or are served at this moment."""
        now = self._settle()
        return sum(request.end > now for request in self._recent)

    @property
    def waiting(self) -> int:
        """Requests that wait for a server at this moment."""
        now = self._settle()
        return sum(request.start > now for request in self._recent)

    async def call(self, *_args: Any, **_kwargs: Any) -> Answer:
        """One request. The arguments are ignored, so that it can stand in for any function.

        **Cancellation**: the request stays where it is and is served, unless it has not arrived yet.

        Raises:
            Refusal: 429 or 503, a `HttpStatusError`.
            ConnectionFailed: the connection was reset.
        """
        loop = self._loop
        if loop is None:
            loop = self._loop = asyncio.get_running_loop()
        now = loop.time()
        coming = self._coming
        if coming and coming[0].arrival <= now:
            self._receive(now)
        self._called += 1
        half = self._half
        arrival = now + half
        if arrival < self._last_arrival:
            arrival = self._last_arrival
        self._last_arrival = arrival
        request = _Request(loop.create_future(), now, arrival, half)
        coming.append(request)
        if arrival <= now:
            self._receive(now)
        elif arrival + half < self._look_at:
            self._look_by(arrival + half)
        try:
            await request.answered
        except asyncio.CancelledError:
            request.withdrawn = loop.time() < arrival
            raise
        if request.error is not None:
            raise request.error
        return Answer(request.headers, loop.time() - now)

    def change(self, **changes: Unpack[Conditions]) -> None:
        """Change the service now: any argument of the class but `seed`.

        Other `servers` also serve those who wait already; everything else concerns requests that are called (`path`),
        arrive, or for a `hole` get back, from now on. Fewer servers finish what they have begun.

        Raises:
            UsageError: a value that cannot work, or an unknown name.
        """
        now = self._settle()
        self._set(changes)
        if "servers" in changes:
            self._share_out(now)
        if "cap" in changes:
            self._count_inside(now)

    def change_in(self, delay: float, **changes: Unpack[Conditions]) -> asyncio.TimerHandle:
        """Change the service `delay` seconds from now, on the running loop; the timer can be cancelled.

        Raises:
            UsageError: as `change`, at once; a delay that is no number of at least 0.
        """
        if not is_amount(delay):
            raise UsageError(f"change_in({delay!r}): expected seconds.")
        _check(changes)
        return asyncio.get_running_loop().call_later(delay, lambda: self.change(**changes))

    def _set(self, changes: Conditions) -> None:
        _check(changes)
        self._conditions.update(changes)
        now = self._conditions
        self._servers = now["servers"]
        time = now["service_time"]
        self._draw: Draw = time if callable(time) else lambda _, fixed=float(time): fixed  # type: ignore[misc]
        self._half = now["path"] / 2
        self._contention = now["contention"]
        self._cap = now["cap"]
        self._retry_after = now["retry_after"]
        self._broken = now["broken"]
        self._troubled = now["broken"] + now["unavailable"]
        self._hole = now["hole"]
        if "quota" in changes:
            self._allowance = None if changes["quota"] is None else _Allowance(changes["quota"])

    def _settle(self) -> float:
        """Look at all that has arrived; return the time. Before the first call there is nothing and no time."""
        if self._loop is None:
            return -math.inf
        now = self._loop.time()
        self._receive(now)
        return now

    def _look_by(self, when: float) -> None:
        assert self._loop is not None, "somebody has called"
        if self._look is not None:
            self._look.cancel()
        self._look_at = when
        self._look = self._loop.call_at(when, self._look_now)

    def _look_now(self) -> None:
        self._look = None
        self._look_at = math.inf
        self._settle()
        if self._coming:
            # Not the first one's alone: behind it there may be one with a shorter way back.
            self._look_by(min(request.arrival + request.half for request in self._coming))

    def _receive(self, now: float) -> None:
        coming = self._coming
        while coming and coming[0].arrival <= now:
            request = coming.popleft()
            if not request.withdrawn:
                self._admit(request)

    def _admit(self, request: "_Request") -> None:
        """Decide what becomes of a request, as of its arrival."""
        self._arrived += 1
        arrival = request.arrival
        if self._hole:
            self._lost += 1
            return
        if self._troubled and (luck := self._random.random()) < self._troubled:
            self._failed += 1
            self._refuse(request, None if luck < self._broken else 503, self._retry_after)
            return
        if self._allowance is not None:
            allowed, request.headers = self._allowance.take(arrival)
            if not allowed:
                self._refused += 1
                self._refuse(request, 429, self._allowance.come_back(arrival))
                return
        if self._cap is not None:
            ends = self._ends
            while ends and ends[0] <= arrival:
                heappop(ends)
            if len(ends) >= self._cap:
                self._refused += 1
                self._refuse(request, 429, self._retry_after)
                return
        self._serve(request)

    def _serve(self, request: "_Request") -> None:
        assert self._loop is not None, "somebody has called"
        arrival = request.arrival
        starts = self._starts
        while starts and starts[0] <= arrival:
            starts.popleft()
        time = self._draw(self._random)
        if self._contention:
            time *= 1 + self._contention * len(starts)
        start = self._free[0]
        if start <= arrival:
            start = arrival
        else:
            starts.append(start)
        end = start + time
        heapreplace(self._free, end)
        if self._cap is not None:
            heappush(self._ends, end)
        recent = self._recent
        while recent and recent[0].end <= arrival:
            recent.popleft()
        recent.append(request)
        request.start = start
        request.end = end
        request.back = self._loop.call_at(end + request.half, self._answer, request)

    def _refuse(self, request: "_Request", status: int | None, retry_after: float | None) -> None:
        assert self._loop is not None, "somebody has called"
        if status is None:
            request.error = ConnectionFailed("GET", URL, "the connection was reset")
        else:
            request.error = refusal = Refusal(status, "GET", URL, retry_after=retry_after)
            hint = {} if retry_after is None else {"Retry-After": f"{retry_after:g}"}
            refusal.headers = {**request.headers, **hint}
        self._loop.call_at(request.arrival + request.half, self._answer, request)

    def _answer(self, request: "_Request") -> None:
        if self._hole:
            self._lost += 1
            return
        if request.error is None:
            self._served += 1
        if request.answered.done():
            self._unheard += 1
        else:
            request.answered.set_result(None)

    def _share_out(self, now: float) -> None:
        """The number of servers has changed: give those who wait to the servers that there are now.

        A server that is one too many ends what it does, so as many ends as there are servers too many free nobody.
        """
        inside = [request for request in self._recent if request.end > now]
        serving = sorted(request.end for request in inside if request.start <= now)
        idle = max(0, self._servers - len(serving))
        self._free = [now] * idle + serving[max(0, len(serving) - self._servers) :]
        heapify(self._free)
        self._starts.clear()
        for request in inside:
            if request.start > now:
                self._move(request)
        self._count_inside(now)

    def _move(self, request: "_Request") -> None:
        """Give a request that waits to the server that will be free first now."""
        assert self._loop is not None, "somebody has called"
        assert request.back is not None, "it has been given to a server"
        time = request.end - request.start
        request.start = self._free[0]
        request.end = request.start + time
        heapreplace(self._free, request.end)
        self._starts.append(request.start)
        request.back.cancel()
        request.back = self._loop.call_at(request.end + request.half, self._answer, request)

    def _count_inside(self, now: float) -> None:
        self._ends = [] if self._cap is None else [request.end for request in self._recent if request.end > now]
        heapify(self._ends)


class _Request:
    """One call, from when it is made to when its answer is back."""

    __slots__ = ("answered", "arrival", "back", "called", "end", "error", "half", "headers", "start", "withdrawn")

    def __init__(self, answered: "asyncio.Future[None]", called: float, arrival: float, half: float) -> None:
        self.answered = answered
        """Done when an answer is back. It never carries the error: nobody may be left to fetch it."""
        self.called = called
        self.arrival = arrival
        self.half = half
        """Seconds that the answer needs for the way back."""
        self.start = -math.inf
        self.end = -math.inf
        self.back: asyncio.TimerHandle | None = None
        self.error: Exception | None = None
        self.headers = _NO_HEADERS
        self.withdrawn = False


class _Allowance:
    """What is left of a quota. Times never go back."""

    def __init__(self, quota: Quota) -> None:
        self._quota = quota
        self._rate = quota.amount / quota.per
        self._left = quota.amount if quota.burst is None else quota.burst
        self._since: float | None = None
        """When the window began, or when the bucket was filled up last."""

    def take(self, now: float) -> tuple[bool, Mapping[str, str]]:
        """Whether one more is allowed, and the headers that say what is left."""
        self._refill(now)
        allowed = self._left >= 1
        if allowed:
            self._left -= 1
        return allowed, self._headers(now)

    def come_back(self, now: float) -> float | None:
        """Whole seconds until one more would be allowed, if that is said at all."""
        if not self._quota.retry_after:
            return None
        if self._quota.burst is None:
            return float(math.ceil(self._reset(now)))
        return float(math.ceil((1 - self._left) / self._rate))

    def _refill(self, now: float) -> None:
        quota = self._quota
        if self._since is None:
            self._since = now
        elif quota.burst is not None:
            self._left = min(quota.burst, self._left + (now - self._since) * self._rate)
            self._since = now
        elif now - self._since >= quota.per:
            self._since += (now - self._since) // quota.per * quota.per
            self._left = quota.amount

    def _reset(self, now: float) -> float:
        """Seconds until all is there again."""
        quota = self._quota
        assert self._since is not None, "somebody has asked before"
        if quota.burst is None:
            return self._since + quota.per - now
        return (quota.burst - self._left) / self._rate

    def _headers(self, now: float) -> Mapping[str, str]:
        quota = self._quota
        if quota.headers is None:
            return _NO_HEADERS
        left, reset = int(self._left), math.ceil(self._reset(now))
        if quota.headers == "ratelimit":
            return {
                "RateLimit-Policy": f'"default";q={quota.amount:g};w={quota.per:g}',
                "RateLimit": f'"default";r={left};t={reset}',
            }
        return {
            "X-RateLimit-Limit": f"{quota.amount:g}",
            "X-RateLimit-Remaining": str(left),
            "X-RateLimit-Reset": str(reset),
        }


def _check(changes: Conditions) -> None:
    for name, value in changes.items():
        if name not in Conditions.__annotations__:
            raise UsageError(f"a simulated service has no {name!r}. It has: {', '.join(Conditions.__annotations__)}.")
        expected = _mistake(name, value)
        if expected:
            raise UsageError(f"{name}={value!r}: expected {expected}.")


def _mistake(name: str, value: Any) -> str | None:
    """What was expected instead of `value`; None if it can work."""
    if name == "servers" or (name == "cap" and value is not None):
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        return None if fits else "a whole number of at least 1"
    if name == "service_time":
        return None if callable(value) or is_amount(value) else "seconds, or a function of a random.Random"
    if name in ("path", "contention") or (name == "retry_after" and value is not None):
        return None if is_amount(value) else "a number of at least 0"
    if name in ("unavailable", "broken"):
        return None if is_amount(value) and value <= 1 else "a share, from 0 to 1"
    if name == "quota":
        return None if value is None or isinstance(value, Quota) else "a Quota, such as Quota(50, per=10), or None"
    if name == "hole":
        return None if isinstance(value, bool) else "True or False"
    return None
