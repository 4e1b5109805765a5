"""A blocking SDK behind a gate: its client is made once, its calls run in threads, each a round trip.

    call("method", ...) -> gate: permit and thread in one step -> thread: client.method(...) -> classified, retried

Guarantees: the factory is called in a thread, never on the loop, and never twice at the same time. A call that takes
too long is abandoned and keeps its permit until its thread has ended, so never more than `limit` threads use the
client, which is not closed while an abandoned call uses it.

Threads: everything belongs to the loop thread, but for the factory, the calls and `close`, which run in worker threads.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Hashable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, Self, TypeVar

from penstock.callables import check_function, is_async, name_of, refuse_coroutine
from penstock.errors import AttemptTimeout, ClosedError, UsageError, WrongLoop, WrongThread, first_line
from penstock.gate.breaker import Breaker
from penstock.gate.gate import DEFAULT_BREAKER, DEFAULT_LIMIT, DEFAULT_TIMEOUT, Gate
from penstock.gate.in_thread import CallInThread
from penstock.gate.limiter import LimitRule
from penstock.gate.rate import Rates, Weight, amounts
from penstock.gate.retry import Retry
from penstock.gate.service import KeyStatistics
from penstock.outcome import FailureKind
from penstock.threads.crossing import Crossing, named
from penstock.threads.lane import Lane
from penstock.threads.workers import SHARED, Workers, check_threads

if TYPE_CHECKING:
    from concurrent.futures import Future

C = TypeVar("C")
P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger("penstock.threads")

LEAST_TO_OPEN = 10.0
"""Seconds that an opening has, however short an attempt may be. Arbitrary, because: SDKs import and read much when they
are made, boto3 for 0.3 s on an idle machine."""
PATIENCE = 5.0
"""Seconds for what closing waits for. Arbitrary, because: longer than it takes, shorter than a hang."""


class BlockingClient(Generic[C]):
    """A client of a blocking SDK, for async code: in threads, limited, retried, each attempt in its time.

        async with BlockingClient(make_s3_client, limit=32, retry=Retry(attempts=4)) as s3:
            await s3.call("put_object", Bucket="out", Key=key, Body=body)
            text = await s3.run(read_text, key)        # read_text(client, key), in a thread

    Args:
        factory: makes the client, in a thread.
        name: what it is called in errors and thread names; None is the factory's name.
        limit: calls in flight at once, for each key, and so threads: a number, or the rule by which it is measured. The
            default finds out, by the time that calls take in their threads.
        rate: calls in a time, for each key; or several rates by name, of which a call takes what `weight` says.
        per_thread: make a client for each thread, for SDKs whose clients are not thread-safe. The threads are this
            client's own, and each closes its client.
        close: closes a client, in a thread; None calls its `close()` where it has one. An error of it is logged.
        classify: says what kind of failure an error of the SDK is, None where it does not know. Its answer, a
            `FailureKind` or its word, is kept as the error's `failure_kind`, where `penstock.classify` looks first. It
            runs on the loop. Where it raises or answers anything else, the SDK's error is raised as if it had not been
            asked, with a note of that, and the log has it once.
        breaker: when to leave a service alone that fails; None for never.
        retry: the policy; None is `Retry()`. Only errors that are known to be throttled or transient are retried.
        timeout: seconds for one attempt, counted from when it has its thread; None for no limit. An attempt that takes
            longer cannot be stopped: it goes on and keeps its permit, also while the next attempt runs. Give the SDK a
            timeout of its own that is shorter; use `Retry(attempts=1)` for calls that must not run twice. Opening the
            client has this time as well, but at least 10 s, then raises `AttemptTimeout`; what the factory makes later
            is closed.
        key: a function that is given the arguments of `call` or `run` and returns the service key.
        weight: a function that is given the same and returns what the call takes of each rate; see `Gate`.
        used: a function that is given the value of a call and returns what it really took; see `Gate`.

    Raises:
        UsageError: a value that cannot work.
    """

    def __init__(
        self,
        factory: Callable[[], C],
        *,
        name: str | None = None,
        limit: int | LimitRule = DEFAULT_LIMIT,
        rate: Rates | None = None,
        per_thread: bool = False,
        close: Callable[[C], object] | None = None,
        classify: Callable[[Exception], FailureKind | str | None] | None = None,
        breaker: Breaker | None = DEFAULT_BREAKER,
        retry: Retry | None = None,
        timeout: float | None = DEFAULT_TIMEOUT,
        key: Callable[..., Hashable] | None = None,
        weight: Callable[..., Weight] | None = None,
        used: Callable[[Any], Mapping[str, float] | None] | None = None,
    ) -> None:
        check_function(factory, "BlockingClient")
        if is_async(factory):
            raise UsageError(
                f"BlockingClient({name_of(factory)}): found an async factory, expected a plain one, which runs in a "
                f"thread. An async client needs no thread: open it in the job's own code, or put it into a Pool."
            )
        _check_plain("close", close)
        _check_plain("classify", classify)
        if not isinstance(per_thread, bool):
            raise UsageError(f"per_thread={per_thread!r:.100}: expected True or False.")
        if name is not None and not isinstance(name, str):
            raise UsageError(f"name={name!r:.100}: expected a string.")
        self.name = name_of(factory) if name is None else name
        self._gate = Gate(
            self.name, limit=limit, rate=rate, retry=retry, breaker=breaker, timeout=timeout, key=key, weight=weight,
            used=used,
        )  # fmt: skip
        if isinstance(limit, int):
            check_threads("limit", limit)
        self._key = key
        self._weight = weight
        self._clients: _Clients[C]
        self._clients = _PerThread(factory, close) if per_thread else _Shared(factory, close)
        self._classify = None if classify is None else _Classifier(self.name, classify)
        self._factory = factory
        self._timeout = timeout
        self._loop: asyncio.AbstractEventLoop | None = None
        self._crossing: Crossing | None = None
        self._aside: Lane | None = None
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else "new" if self._crossing is None else "open"
        return f"<BlockingClient {self.name!r} {state} limit={self._gate.limit}>"

    async def __aenter__(self) -> Self:
        if self._loop is not None:
            raise UsageError("this client has been opened before. Make a new BlockingClient for each `async with`.")
        self._loop = asyncio.get_running_loop()
        self._aside = Lane(self.name, 2)
        timeout = None if self._timeout is None else max(self._timeout, LEAST_TO_OPEN)
        try:
            async with asyncio.timeout(timeout) as scope:
                await self._aside.call(self._clients.open)
        except asyncio.CancelledError:
            self._close_aside()  # what the factory still makes
            raise
        except TimeoutError as error:
            if not scope.expired():
                raise
            self._close_aside()
            raise AttemptTimeout(
                f"{self.name}: its factory {name_of(self._factory)} has made no client within {timeout:g} s "
                f"(timeout of one attempt, at least {LEAST_TO_OPEN:g} s for the opening)"
            ) from error
        self._gate.bound(SHARED.most)
        self._crossing = self._gate.crossing(self._clients.workers)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._crossing is not None, "entered before it is left"
        self._closed = self._clients.closed = True
        try:
            await self._crossing.wait_until_idle(PATIENCE)
        finally:
            closing = None if self._still_used(self._crossing) else self._close_aside()
        if closing is not None:
            await self._wait_for(closing)

    def _still_used(self, crossing: Crossing) -> bool:
        """Whether threads use the client, which is then left to them."""
        if not crossing.busy:
            return False
        if abandoned := crossing.abandoned():
            users = f"calls that nobody waits for still use it: {named(abandoned)}"
        else:
            users = f"{crossing.busy} of its calls take longer than {PATIENCE:g} s"
        logger.warning("%r is left open: %s", self.name, users)
        self._clients.dismiss()
        return True

    def _close_aside(self) -> "Future[None]":
        """Close the client in a thread, now or when the factory is through."""
        assert self._aside is not None, "made before anything is opened"
        closing = self._aside.submit(self._clients.close)
        closing.add_done_callback(self._tell_of_failure)
        return closing

    async def _wait_for(self, closing: "Future[None]") -> None:
        ended = asyncio.wrap_future(closing)
        ended.add_done_callback(asyncio.Future.exception)  # which has been logged
        await asyncio.wait([ended], timeout=PATIENCE)
        if not ended.done():
            logger.warning("closing %r takes longer than %g s; it goes on in its thread", self.name, PATIENCE)

    def _tell_of_failure(self, closing: "Future[None]") -> None:
        if (error := closing.exception()) is not None:
            logger.error("%r could not be closed", self.name, exc_info=error)

    @property
    def limit(self) -> int | LimitRule:
        """Calls in flight at once, for each key; see `Gate.limit`."""
        return self._gate.limit

    @limit.setter
    def limit(self, limit: int | LimitRule) -> None:
        if isinstance(limit, int):
            check_threads("limit", limit)
        self._gate.limit = limit

    @property
    def rate(self) -> Rates | None:
        """Calls in a time, for each key; see `Gate.rate`."""
        return self._gate.rate

    @rate.setter
    def rate(self, rate: Rates | None) -> None:
        self._gate.rate = rate

    @property
    def breaker(self) -> Breaker | None:
        """When to leave a service alone; see `Gate.breaker`."""
        return self._gate.breaker

    @breaker.setter
    def breaker(self, breaker: Breaker | None) -> None:
        self._gate.breaker = breaker

    async def call(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        """Call `client.method(*args, **kwargs)` in a thread, through the gate, and return its value.

        **Cancellation**: a call that waits is given up, one that runs is abandoned: the caller goes on, and the thread
        keeps its permit until it ends. **Threads**: loop thread only.

        Raises:
            AttemptTimeout: the last attempt, or all attempts with their waits, took too long.
            ClosedError, WrongThread, WrongLoop: the client is not open, or this is not its loop.
            UsageError: it returned a coroutine: the client is an async one.
            Exception: what the last attempt raised, unchanged, with a note on all attempts.
        """
        if not isinstance(method, str):
            raise UsageError(
                f"{self.name}.call({method!r:.100}): expected the name of a method of the client. "
                f"For a function write `run(fn, ...)`, which calls `fn(client, ...)`."
            )
        return await self._perform(f"{self.name}.{method}", self._clients.call_method, method, args, kwargs)

    async def run(self, fn: Callable[Concatenate[C, P], T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `fn(client, *args, **kwargs)` in a thread, as one round trip; everything else as for `call`.

        For what takes several steps with the client, such as reading the body of an answer.
        """
        check_function(fn, f"{self.name}.run")
        if is_async(fn):
            raise UsageError(f"{self.name}.run({name_of(fn)}): found an async function, expected a plain one.")
        value: T = await self._perform(
            f"{self.name}: {name_of(fn)}", self._clients.call_function, fn, args, dict(kwargs)
        )
        return value

    def statistics(self) -> dict[Hashable, KeyStatistics]:
        """What is going on, by service key, abandoned calls with their names and ages. Loop thread only."""
        return self._gate.statistics()

    async def _perform(
        self, label: str, work: Callable[..., Any], what: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        crossing = self._opened(label)
        key = None if self._key is None else self._key(what, *args, **kwargs)
        trip = CallInThread(
            crossing, self._gate.service(key), label, work, (what, args, kwargs), {}, self._classify
        )  # fmt: skip
        trip.weight = None if self._weight is None else amounts(self._weight(what, *args, **kwargs))
        return await self._gate.perform(trip, key)

    def _opened(self, label: str) -> Crossing:
        loop = asyncio._get_running_loop()
        if self._crossing is None or self._closed:
            state = "has been closed" if self._closed else "is not open yet"
            raise ClosedError(
                f"{label}: the client {state}. Use it inside `async with BlockingClient(...) as client:`."
            )
        if loop is None:
            raise WrongThread(f"{label} was called from a thread. There, use `from_thread`, or the SDK itself.")
        if loop is not self._loop:
            raise WrongLoop(f"{label} was called on another event loop than the one the client was opened on.")
        return self._crossing


def _check_plain(what: str, fn: object) -> None:
    if fn is None:
        return
    if not callable(fn):
        raise UsageError(f"{what}={fn!r:.100}: expected a function.")
    if is_async(fn):
        raise UsageError(f"{what}={name_of(fn)}: found an async function, expected a plain one.")


class _Classifier:
    """The user's `classify`, whose own mistakes never take the place of the SDK's error. Loop thread only."""

    def __init__(self, client: str, classify: Callable[[Exception], FailureKind | str | None]) -> None:
        self._client = client
        self._classify = classify
        self._told = False

    def __call__(self, error: Exception) -> FailureKind | None:
        mistake: Exception | None = None
        try:
            answer = self._classify(error)
            refuse_coroutine(answer, "it")
        except Exception as raised:  # noqa: BLE001  # the SDK's error must not be lost over it
            mistake = raised
            found = f"raised {type(raised).__name__}: {first_line(raised)}"
        else:
            if answer is None or answer in _KINDS:
                return None if answer is None else FailureKind(answer)
            found = f"answered {answer!r:.100}"
        found = f"classify={name_of(self._classify)} {found}; expected None or a FailureKind: {', '.join(_KINDS)}"
        error.add_note(found)
        if not self._told:
            self._told = True
            logger.warning("%r: %s. Asked about %s", self._client, found, type(error).__name__, exc_info=mistake)
        return None


_KINDS = tuple(FailureKind)


class _Clients(Generic[C]):
    """The SDK's clients, as seen from worker threads."""

    workers: Workers
    closed = False
    """Nobody may use them any more."""

    def __init__(self, factory: Callable[[], C], close: Callable[[C], object] | None) -> None:
        self._factory = factory
        self._close = close

    def open(self) -> None:
        """What is to be done before the first call."""

    def close(self) -> None:
        """Close all there is."""

    def dismiss(self) -> None:
        """Let go of the threads without closing anything that they use."""

    def call_method(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return getattr(self._open_client(), method)(*args, **kwargs)

    def call_function(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return fn(self._open_client(), *args, **kwargs)

    def _open_client(self) -> C:
        if self.closed:  # while the call waited for a permit
            raise ClosedError("the client has been closed before this call had its turn.")
        return self._client()

    def _client(self) -> C:
        raise AssertionError

    def _close_one(self, client: Any) -> None:
        if self._close is not None:
            self._close(client)
        elif hasattr(client, "close"):
            client.close()


class _Shared(_Clients[C]):
    """One client for all threads."""

    workers = SHARED

    def __init__(self, factory: Callable[[], C], close: Callable[[C], object] | None) -> None:
        super().__init__(factory, close)
        self._making = threading.Lock()

    def open(self) -> None:
        with self._making:
            if not self.closed:
                self._made = self._factory()

    def close(self) -> None:
        with self._making:  # also by a factory for which nobody waits any more
            self.closed = True
            made = hasattr(self, "_made")
        if made:
            self._close_one(self._made)

    def _client(self) -> C:
        return self._made


class _PerThread(_Clients[C]):
    """A client for each thread, made when it first needs it, in threads of their own."""

    def __init__(self, factory: Callable[[], C], close: Callable[[C], object] | None) -> None:
        super().__init__(factory, close)
        self.workers = Workers(SHARED.most, on_exit=self._close_own)
        self._making = threading.Lock()
        self._own = threading.local()

    def close(self) -> None:
        """Let the threads end, and wait until they have closed their clients."""
        threads = self.workers.threads
        self.workers.dismiss()
        for thread in threads:
            thread.join()

    def dismiss(self) -> None:
        """Let the threads end, those that work after their call."""
        self.workers.dismiss()

    def _client(self) -> C:
        if not hasattr(self._own, "client"):
            with self._making:  # SDKs that need a client for each thread seldom make them safely
                self._own.client = self._factory()
        client: C = self._own.client
        return client

    def _close_own(self) -> None:
        if hasattr(self._own, "client"):
            try:
                self._close_one(self._own.client)
            except BaseException:  # its thread ends here, and nobody waits for it
                logger.exception("a client of %s could not be closed", name_of(self._factory))
