"""How a job ended, as a record, and what kind of failure an error is. Decides only: no I/O, no clock."""

import asyncio
from enum import StrEnum
from typing import Any, Generic, NamedTuple, TypeVar

import aiohttp

from penstock.errors import ConnectionFailed, HttpStatusError, InternalError, UsageError

T = TypeVar("T")


class FailureKind(StrEnum):
    """What went wrong, as far as the question "shall we ask again?" goes."""

    THROTTLED = "throttled"
    """The service asks for less: 429, or 503 with `Retry-After`. Ask again, later."""
    TRANSIENT = "transient"
    """The same call may work the next time: connection trouble, time-outs, 408, 502, 503, 504."""
    PERMANENT = "permanent"
    """The same call will fail again: other statuses of 400 and more, and errors that we do not know."""
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
    RuntimeError,
    ImportError,
)
_TRANSIENT = (ConnectionError, TimeoutError, aiohttp.ClientConnectionError, aiohttp.ClientPayloadError)
_BAD_CERTIFICATE = aiohttp.ClientConnectorCertificateError


def classify(error: BaseException) -> FailureKind:
    """Say what kind of failure `error` is.

    The one place that knows. Statuses are read from `HttpStatusError` and `aiohttp.ClientResponseError`; connection
    trouble and time-outs are transient, except a certificate that does not verify; errors of the program are bugs;
    everything unknown is permanent, because asking again without a reason is how a client hurts a service.
    """
    if isinstance(error, asyncio.CancelledError):
        return FailureKind.CANCELLED
    if isinstance(error, HttpStatusError):
        return _classify_status(error.status, hinted=error.retry_after is not None)
    if isinstance(error, aiohttp.ClientResponseError):
        hinted = error.headers is not None and "Retry-After" in error.headers
        return _classify_status(error.status, hinted=hinted)
    if isinstance(error, _BAD_CERTIFICATE) or isinstance(error.__cause__, _BAD_CERTIFICATE):
        return FailureKind.PERMANENT
    if isinstance(error, _TRANSIENT):
        return FailureKind.TRANSIENT
    return FailureKind.BUG if isinstance(error, _BUGS) else FailureKind.PERMANENT


def _classify_status(status: int, *, hinted: bool) -> FailureKind:
    if status == 429 or (status == 503 and hinted):
        return FailureKind.THROTTLED
    return FailureKind.TRANSIENT if status in TRANSIENT_STATUSES else FailureKind.PERMANENT


def provably_unsent(error: BaseException) -> bool:
    """True when the request behind `error` never left this machine, so that repeating it cannot repeat its effect."""
    return isinstance(error, ConnectionFailed) and not error.sent


def contained(error: BaseException, where: str) -> Exception:
    """`error` as an exception that can be handed around without ending the run.

    `StopIteration` breaks whoever awaits it and `SystemExit` and `KeyboardInterrupt` end the event loop; raised by
    user code they become a `UsageError` with the original as its cause. Everything else comes back unchanged.
    """
    cause = error.__cause__ if isinstance(error, RuntimeError) and isinstance(error.__cause__, StopIteration) else error
    if isinstance(error, Exception) and not isinstance(cause, StopIteration):
        return error
    usage = UsageError(
        f"{where} raised {type(cause).__name__}{cause.args!r}, which would end more than this job. "
        f"Return from the function instead, or raise an exception of your own."
    )
    usage.__cause__ = cause
    return usage


class Outcome(NamedTuple, Generic[T]):
    """How one job ended: a value or an error, never both.

    A cancellation from outside is never an outcome; one that the job inflicts on itself has kind *cancelled*.
    Durations are seconds. A named tuple, because one is made for every item and a frozen dataclass costs four times
    as much to make.
    """

    key: Any
    """What `key=` said of the item; None without it."""
    input: Any
    """The item."""
    value: T | None
    """What the job returned; None when it failed."""
    error: BaseException | None
    """What the job raised; None when it succeeded."""
    kind: FailureKind | None
    """What `classify` says of the error; None when it succeeded."""
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
        """True when the job succeeded."""
        return self.error is None

    def unwrap(self) -> T:
        """The value; raises the job's own error when it failed."""
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]  # without an error the value is a T, also when T admits None
