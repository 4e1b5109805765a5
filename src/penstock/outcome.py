"""How a job ended, as a record, and what kind of failure an error is. Decides only: no I/O, no clock."""

import asyncio
import concurrent.futures
import errno
import reprlib
import socket
from enum import StrEnum
from typing import Any, Generic, NamedTuple, TypeVar

import aiohttp

from penstock.errors import ConnectionFailed, HttpStatusError, InternalError, UsageError

T = TypeVar("T")


class FailureKind(StrEnum):
    """What went wrong, as far as the question "shall we ask again?" goes."""

    THROTTLED = "throttled"
    """The service asks for less: 429, or 403 or 503 with a wait. Ask again, later."""
    TRANSIENT = "transient"
    """The same call may work the next time: connection trouble, time-outs, 408, 502, 503, 504."""
    PERMANENT = "permanent"
    """The same call will fail again: other statuses of 400 and more, bad data, and errors that we do not know."""
    CANCELLED = "cancelled"
    """The job cancelled itself."""
    BUG = "bug"
    """The program is wrong: TypeError, KeyError, a usage error. Never asked again."""


TRANSIENT_STATUSES = frozenset({408, 502, 503, 504})
"""RFC 9110 15.5.9, 15.6.3 to 15.6.5. 500 is not among them: it says nothing about the next call, so a policy must."""

_BUGS = (
    UsageError,
    InternalError,
    TypeError,
    AttributeError,
    NameError,
    AssertionError,
    LookupError,
    ArithmeticError,
    ImportError,
)
_BUGS_THEMSELVES = (RuntimeError, NotImplementedError, RecursionError)
"""Bugs, but classes derived from them are none: see `classify`."""
_CANCELLED = (asyncio.CancelledError, concurrent.futures.CancelledError)
_TRANSIENT = (
    ConnectionError,
    TimeoutError,
    concurrent.futures.BrokenExecutor,  # a worker died; its pool is replaced
    socket.gaierror,
    asyncio.IncompleteReadError,
    aiohttp.ClientConnectionError,
    aiohttp.ClientPayloadError,
)
_TRANSIENT_ERRNOS = frozenset({errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET})
"""Connection trouble for which Python has no class: a plain OSError with one of these numbers."""
_WRONG_PEER = (aiohttp.ClientConnectorCertificateError, aiohttp.ServerFingerprintMismatch)


def classify(error: BaseException) -> FailureKind:
    """Say what kind of failure `error` is. Any thread.

    The one place that knows. An error may say it itself: an attribute `failure_kind`, of the exception or of its class,
    that is a `FailureKind` or its word is believed before anything else but a cancellation. So a class of your own is
    retried by default once it says what it is:

        class Busy(Exception):
            failure_kind = FailureKind.THROTTLED

    Anything else by that name is ignored, also a property that raises.

    Without it: statuses are read from `HttpStatusError` and `aiohttp.ClientResponseError`; connection
    trouble, failed name resolution and time-outs are transient, except a peer that cannot prove who it is; errors of
    the program are bugs; everything unknown is permanent, because asking again without a reason is how a client hurts
    a service.

    `RuntimeError` is a bug when it is raised as such: so the interpreter and its libraries say that they are used
    wrongly. Classes derived from it say anything (a device out of memory) and are unknown; that of a broken process
    pool is transient, since its executor starts new processes.
    `ValueError` is no bug: most often it is said of data, such as JSON that is none. Nor is an `OSError` that has
    nothing to do with connections, such as a missing file. A library with connection errors of its own (`requests`)
    is unknown here: name them in `Retry(on=...)`.
    """
    if isinstance(error, _CANCELLED):
        return FailureKind.CANCELLED
    told = _kind_told_by(error)
    if told is not None:
        return told
    if isinstance(error, HttpStatusError):
        return _classify_status(error.status, hinted=error.retry_after is not None)
    if isinstance(error, aiohttp.ClientResponseError):
        hinted = error.headers is not None and "Retry-After" in error.headers
        return _classify_status(error.status, hinted=hinted)
    if isinstance(error, _WRONG_PEER) or isinstance(error.__cause__, _WRONG_PEER):
        return FailureKind.PERMANENT
    if isinstance(error, _TRANSIENT) or (isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNOS):
        return FailureKind.TRANSIENT
    if isinstance(error, _BUGS) or type(error) in _BUGS_THEMSELVES:
        return FailureKind.BUG
    return FailureKind.PERMANENT


def _kind_told_by(error: BaseException) -> FailureKind | None:
    try:
        told = getattr(error, "failure_kind", None)
        return FailureKind(told) if isinstance(told, str) else None
    except Exception:  # noqa: BLE001  # a property of the user's, or a word that is no kind: the error itself matters more
        return None


def _classify_status(status: int, *, hinted: bool) -> FailureKind:
    if status == 429 or (status in (403, 503) and hinted):
        return FailureKind.THROTTLED
    return FailureKind.TRANSIENT if status in TRANSIENT_STATUSES else FailureKind.PERMANENT


def provably_unsent(error: BaseException) -> bool:
    """True when the request behind `error` never left this machine, so that repeating it cannot repeat its effect."""
    return isinstance(error, ConnectionFailed) and not error.sent


def contained(error: BaseException, where: object) -> Exception:
    """`error` as an exception that can be handed around without ending the run.

    `StopIteration` and `StopAsyncIteration` end the iteration of whoever reads the result, `SystemExit` and
    `KeyboardInterrupt` end the event loop, and a cancellation that comes out of a thread or is raised by hand looks
    like one of the caller's. Raised by user code they become a `UsageError` with the original as its cause.
    Everything else comes back unchanged.
    """
    cause = _stop_iteration_in_a_coroutine(error) or error
    if isinstance(error, Exception) and not isinstance(cause, _END_MORE):
        return error
    # The arguments are the user's data, of any size, and their repr may fail: reprlib takes care of both.
    arguments = ", ".join(reprlib.repr(argument) for argument in cause.args[:MOST_ARGUMENTS])
    usage = UsageError(
        f"{where} raised {type(cause).__name__}({arguments}), which would end more than this job. "
        f"Return from the function instead, or raise an exception of your own."
    )
    usage.__cause__ = cause
    return usage


MOST_ARGUMENTS = 5
"""Arguments of such an exception that are shown. Arbitrary, because: they have one as a rule."""

_END_MORE = (StopIteration, StopAsyncIteration, concurrent.futures.CancelledError)
"""Exceptions that are no `BaseException`, and yet must not travel. asyncio turns the last one into its own."""


def _stop_iteration_in_a_coroutine(error: BaseException) -> BaseException | None:
    """The `StopIteration` that Python itself has wrapped when it left a coroutine; a user may wrap one with reason."""
    cause = error.__cause__
    if isinstance(cause, StopIteration) and error.args == ("coroutine raised StopIteration",):
        return cause
    return None


class Outcome(NamedTuple, Generic[T]):
    """How one job ended: a value or an error, never both.

    A cancellation from outside is never an outcome; one that the job inflicts on itself, by raising `CancelledError`,
    has kind *cancelled*. (A job that calls `cancel()` on its own task cannot be told from one that others cancel.)
    A job that raised `SkipItem` was skipped: that is its error, and it has no kind.
    Durations are seconds. A named tuple, because one is made for every item and a frozen dataclass costs four times
    as much to make.
    """

    key: Any
    """What `key=` said of the item; None without it."""
    input: Any
    """The item."""
    value: T | None
    """What the job returned; None when it failed or was skipped."""
    error: BaseException | None
    """What the job raised; None when it succeeded. A `RecordedError` when a failure is replayed."""
    kind: FailureKind | None
    """What `classify` says of the error; None when the job succeeded or was skipped: what has a kind is a failure."""
    attempts: int
    """All attempts of all round trips of the job."""
    waited: float
    """Time the job spent waiting for permits and back-off. Waits side by side within a job each count."""
    ran: float
    """Time from the job's start to its end, waits included."""
    replayed: bool = False
    """True when this outcome was recorded by an earlier run."""

    @property
    def ok(self) -> bool:
        """True when the job succeeded; False also when it was skipped."""
        return self.error is None

    def unwrap(self) -> T:
        """The value; raises the job's own error when it failed, and its `SkipItem` when it was skipped."""
        error = self.error
        if error is None:
            return self.value  # type: ignore[return-value]  # without an error it is a T, also when T admits None
        try:
            raise error
        finally:
            del error, self  # the traceback holds this frame: a cycle that would keep the item alive
