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
    ├── AllFailed              the first jobs of a run all failed: it is hopeless
    ├── BudgetReached          a run has used what its `budget=` allows
    ├── SkipItem               raised by a job: the item needs no work
    ├── RecordedError          an error that an earlier run recorded
    ├── CircuitOpen            the circuit breaker refuses
    ├── Overloaded             the queue is full and shedding was asked for
    ├── DeadlockError          a wait that cannot be resolved
    ├── JournalError           the journal cannot be used
    └── InternalError          a bug in penstock: please report

Every exception can be pickled: all its data stand in `args`.
"""

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from penstock.outcome import Outcome


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


class AllFailed(PenstockError):
    """The first jobs of a run all failed, as many as `fail_fast=` says. What was in flight has been finished.

    `first` is the first of their errors, as a line of text.
    """

    def __init__(self, count: int, first: str) -> None:
        super().__init__(count, first)
        self.count = count
        self.first = first

    def __str__(self) -> str:
        return (
            f"the first {self.count:,} jobs all failed, the first one by {self.first!r}. As a rule the URL or the key "
            f'is wrong, or the job is; correct it and run again, with a journal by resume="failed". '
            f"fail_fast=None goes on whatever fails."
        )


class BudgetReached(PenstockError):
    """A run has used what its `budget=` allows. What was in flight has been finished, and delivered before this."""

    def __init__(self, unit: str, spent: float, limit: float) -> None:
        super().__init__(unit, spent, limit)
        self.unit = unit
        self.spent = spent
        self.limit = limit

    def __str__(self) -> str:
        seconds = " s" if self.unit == "time" else ""
        return (
            f"the budget of {self.unit}={self.limit!r} was reached: {in_figures(self.spent)}{seconds} used. "
            f"Raise the budget, or run again to go on: with the same journal=, what is recorded is not done twice."
        )


class SkipItem(PenstockError):
    """Raise it in a job: this item needs no work. `SkipItem("why")`.

    The outcome carries it as its error and has no kind: it is neither a success nor a failure, and is not retried.
    """


class RecordedError(PenstockError):
    """An error as an earlier run recorded it; the object itself has ended with that run.

    `error` is its class, with its module; `message` its text; `status` the HTTP status, or None; `failure_kind` what
    `classify` said of it then, and says of this one; `answer` the first bytes of the service's last answer, or None.
    """

    def __init__(
        self, error: str, message: str, status: int | None = None, kind: str = "permanent", answer: bytes | None = None
    ) -> None:
        super().__init__(error, message, status, kind, answer)
        self.error = error
        self.message = message
        self.status = status
        self.failure_kind = kind
        self.answer = answer

    def __str__(self) -> str:
        return f"{name_of_class(self)}: {self.message}" if self.message else name_of_class(self)


class CircuitOpen(PenstockError):
    """The circuit breaker of a service is open and was asked to fail fast. Transient: nothing was sent."""

    failure_kind = "transient"


class Overloaded(PenstockError):
    """A queue is full and load shedding was asked for."""


class DeadlockError(PenstockError):
    """A wait that cannot be resolved by anything that is still able to run."""


class JournalError(PenstockError):
    """The journal cannot be used: the message names the file and the cure.

    `unrecorded` holds the outcomes of jobs that had ended and found no place in it: nothing else knows of them.
    """

    def __init__(self, message: str = "", unrecorded: "tuple[Outcome[Any], ...]" = ()) -> None:
        super().__init__(message, unrecorded)
        self.message = message
        self.unrecorded = unrecorded

    def hold(self, outcomes: "Iterable[Outcome[Any]]") -> None:
        """Keep outcomes that could not be recorded."""
        self.unrecorded = tuple(outcomes)
        self.args = self.message, self.unrecorded

    def __str__(self) -> str:
        count = len(self.unrecorded)
        held = f" {count:,} outcomes could not be recorded: `error.unrecorded` holds them." if count else ""
        return self.message + held


class InternalError(PenstockError):
    """A bug in penstock, never in your program: please report it."""


def shown(body: bytes, limit: int = 200) -> str:
    """The first bytes of a body as one readable line."""
    text = body[:limit].decode("utf-8", errors="replace")
    return repr(text) + ("..." if len(body) > limit else "")


def in_common(line: str, status: int | None) -> str:
    """What an error has in common with others of its cause: messages and addresses often hold the record's number.

    `line` is as `first_line` gives it. What was asked for is told apart, what the service answered is not.
    """
    if status is None:
        return re.sub(r"\d+", "#", line)
    asked = line.partition(" -> ")[0].partition("?")[0]
    return f"{re.sub(_NUMBERS_OF_RECORDS, '#', asked)} {status}"


_NUMBERS_OF_RECORDS = r"(?<![A-Za-z])\d+|\d{3,}"
"""In an address: /items/17 and /item-4711, but not /api1."""


def in_figures(amount: float) -> str:
    """An amount of anything for people: six figures of it, or all that stand before the point."""
    return f"{amount:,.0f}" if 1e5 <= amount < 1e15 else f"{amount:,.6g}"


LONGEST_LINE = 200
"""Characters of an error in a log or a report. Arbitrary, because: two lines of a terminal."""


def first_line(error: BaseException) -> str:
    """Class and first line of the message, at most 200 characters. An error that cannot be shown says so.

    A recorded error is told as the one that it stands for.
    """
    try:
        message = error.message if isinstance(error, RecordedError) else str(error)
    except Exception:  # noqa: BLE001  # an exception class of the user's: its mistake must not end the run
        message = "<its __str__ raised an error>"
    start = message.lstrip()[: LONGEST_LINE + 1].splitlines()
    line = f"{name_of_class(error)}: {start[0]}" if start else name_of_class(error)
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 3]}..."


def name_of_class(error: BaseException) -> str:
    """The error's class, without its module; of a recorded error, that of the one that it stands for."""
    return error.error.rpartition(".")[2] if isinstance(error, RecordedError) else type(error).__name__


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error carries as `.status`; None where there is none, or something else."""
    try:
        status = getattr(error, "status", None)
    except Exception:  # noqa: BLE001  # a property of the user's: its mistake must not end the run
        return None
    return status if isinstance(status, int) else None
