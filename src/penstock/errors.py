"""The exception tree: named after whose problem it is.

    PenstockError
    ├── UsageError             your call is wrong: the message shows the right one
    │   ├── ClosedError        used before it was opened, or after it was closed (also RuntimeError)
    │   ├── WrongLoop          belongs to another event loop (also RuntimeError)
    │   └── WrongThread        belongs to another thread (also RuntimeError)
    ├── RoundTripError         one exchange with a service failed
    │   ├── HttpStatusError    the service answered, with a status of 400 or more
    │   ├── BodyTooLarge       the answer is longer than `max_body_bytes`
    │   ├── NotJson            the answer was to be JSON and is not
    │   ├── ConnectionFailed   no answer arrived: refused, reset, cut off (also ConnectionError)
    │   │   └── ConnectTimeout   not even a connection in time (also TimeoutError)
    │   └── AttemptTimeout     no answer in time (also TimeoutError)
    ├── JobTimeout             a job took longer than the stream's `timeout=` (also TimeoutError)
    ├── TooManyErrors          more jobs failed than `max_errors=` allows
    ├── CircuitOpen            the circuit breaker refuses
    ├── Overloaded             the queue is full and shedding was asked for
    ├── DeadlockError          a wait that cannot be resolved
    ├── JournalError           the journal cannot be used
    └── InternalError          a bug in penstock: please report

Every exception can be pickled: all its data stand in `args`.
"""


class PenstockError(Exception):
    """The root: everything that penstock itself raises."""


class UsageError(PenstockError):
    """Your call is wrong. The message says what was found, what was expected and what to write."""


class ClosedError(UsageError, RuntimeError):
    """Used before it was opened, or after it was shut down or closed."""


class WrongLoop(UsageError, RuntimeError):
    """Used on an event loop other than the one it was opened on."""


class WrongThread(UsageError, RuntimeError):
    """Called from a thread that may not call it."""


class RoundTripError(PenstockError):
    """One exchange with a service failed."""


class HttpStatusError(RoundTripError):
    """The service answered with a status of 400 or more.

    `url` is masked (no user info, no query values); `body_start` holds the first bytes of the answer;
    `retry_after` is the wait the server asked for, in seconds, or None.
    """

    def __init__(
        self, status: int, method: str, url: str, body_start: bytes = b"", retry_after: float | None = None
    ) -> None:
        super().__init__(status, method, url, body_start, retry_after)
        self.status = status
        self.method = method
        self.url = url
        self.body_start = body_start
        self.retry_after = retry_after

    def __str__(self) -> str:
        hint = "" if self.retry_after is None else f", Retry-After {self.retry_after:g} s"
        body = f": {shown(self.body_start)}" if self.body_start else ""
        return f"{self.method} {self.url} -> HTTP {self.status}{hint}{body}"


class BodyTooLarge(RoundTripError):
    """The answer is longer than `max_body_bytes`. It was not read to its end; its connection is closed."""

    def __init__(self, method: str, url: str, max_body_bytes: int) -> None:
        super().__init__(method, url, max_body_bytes)
        self.method = method
        self.url = url
        self.max_body_bytes = max_body_bytes

    def __str__(self) -> str:
        return (
            f"{self.method} {self.url} -> body of more than max_body_bytes={self.max_body_bytes:,}. "
            f"Raise max_body_bytes=, or read it in pieces with `async with client.stream(...)`."
        )


class NotJson(RoundTripError):
    """The answer was to be JSON and is not: shows status, content type and the first bytes."""

    def __init__(self, method: str, url: str, status: int, content_type: str, body_start: bytes, reason: str) -> None:
        super().__init__(method, url, status, content_type, body_start, reason)
        self.method = method
        self.url = url
        self.status = status
        self.content_type = content_type
        self.body_start = body_start
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"{self.method} {self.url} -> HTTP {self.status}, Content-Type {self.content_type or 'absent'}, "
            f"is not JSON ({self.reason}); it starts {shown(self.body_start)}"
        )


class ConnectionFailed(RoundTripError, ConnectionError):
    """No complete answer arrived. `sent` is False when the request provably never left this machine."""

    def __init__(self, method: str, url: str, reason: str, sent: bool = True) -> None:
        super().__init__()  # OSError would take the arguments for an errno and a file, and forget the fourth one
        self.args = (method, url, reason, sent)
        self.method = method
        self.url = url
        self.reason = reason
        self.sent = sent

    def __str__(self) -> str:
        return f"{self.method} {self.url} -> {'no answer' if self.sent else 'not sent'}: {self.reason}"


class ConnectTimeout(ConnectionFailed, TimeoutError):
    """No connection in time: the request was not sent."""


class AttemptTimeout(RoundTripError, TimeoutError):
    """An attempt, or all attempts with their waits, took longer than allowed."""


class JobTimeout(PenstockError, TimeoutError):
    """A job took longer than the `timeout=` of its stream or run."""


class TooManyErrors(PenstockError):
    """More jobs failed than `max_errors=` allows. What was finished has been delivered before this is raised."""

    def __init__(self, failed: int, finished: int, max_errors: float) -> None:
        super().__init__(failed, finished, max_errors)
        self.failed = failed
        self.finished = finished
        self.max_errors = max_errors

    def __str__(self) -> str:
        return (
            f"{self.failed:,} of {self.finished:,} finished jobs failed; max_errors={self.max_errors!r} allows no more"
        )


class CircuitOpen(PenstockError):
    """The circuit breaker of a service is open and was asked to fail fast. Transient: nothing was sent."""

    failure_kind = "transient"


class Overloaded(PenstockError):
    """A queue is full and load shedding was asked for."""


class DeadlockError(PenstockError):
    """A wait that cannot be resolved by anything that is still able to run."""


class JournalError(PenstockError):
    """The journal cannot be used: the message names the file and the cure."""


class InternalError(PenstockError):
    """A bug in penstock, never in your program: please report it."""


def shown(body: bytes, limit: int = 200) -> str:
    """The first bytes of a body as one readable line."""
    text = body[:limit].decode("utf-8", errors="replace")
    return repr(text) + ("..." if len(body) > limit else "")


def first_line(error: BaseException) -> str:
    """Class and first line of the message, at most 200 characters. An error that cannot be shown says so."""
    try:
        message = str(error)
    except Exception:  # noqa: BLE001  # an exception class of the user's: its mistake must not end the run
        message = "<its __str__ raised an error>"
    start = message.lstrip()[:200].splitlines()
    return f"{type(error).__name__}: {start[0]}"[:200] if start else type(error).__name__


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error carries as `.status`; None where there is none, or something else."""
    try:
        status = getattr(error, "status", None)
    except Exception:  # noqa: BLE001  # a property of the user's: its mistake must not end the run
        return None
    return status if isinstance(status, int) else None
