"""One job, from its slot to its outcome: the record, and calling the user's function within its time."""

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from penstock.context import Host
from penstock.errors import SkipItem
from penstock.executor.slots import Holder
from penstock.outcome import Outcome, classify


class Receiver(Protocol):
    """Who is told how a job ended."""

    def job_ended(self, job: "ActiveJob", outcome: Outcome[Any] | None) -> None: ...


class ActiveJob(Holder):
    """A job of an executor. What most jobs never change stands on the class: one is made for every item."""

    kwargs: dict[str, Any] | None = None
    input: Any = None
    before: "Callable[[ActiveJob], Awaitable[None]] | None" = None
    """Awaited before the job starts, in its task; cancels the task where the job is not to start."""
    started: float | None = None
    """When its function was called; None before that."""
    logged: bool = True
    """Whether its failure goes to the log, too."""
    cancelled: bool = False
    """True when the executor or a stream asked for the cancellation, so that it is no outcome."""
    given_up: bool = False
    """True when its outcome has been delivered although its task goes on."""
    abandoned: bool = False
    """True when it went on although it was cancelled, and was named for it: nobody waits for it any more."""
    settled: bool = False
    """True when the job has ended and waits for the items before it to be delivered."""
    result: Outcome[Any] | None = None
    """Its outcome, while it waits for them."""

    def __init__(
        self,
        host: Host,
        parent: Holder | None,
        name: str,
        fn: Callable[..., Awaitable[Any]],
        args: tuple[Any, ...],
        timeout: float | None = None,
        receiver: Receiver | None = None,
    ) -> None:
        self.host = host
        self.name = name
        self.fn = fn
        self.args = args
        self.timeout = timeout
        self.receiver = receiver
        """The stream's side that the job belongs to; None for a submitted job."""
        if parent is not None:
            self.parent = parent
            self.depth = parent.depth + 1
            root = parent.root or parent
            if receiver is None:
                self.root = root
            elif root.account is not None:
                self.reader = root

    def succeeded(self, value: Any, ended: float) -> Outcome[Any]:
        """The outcome with a value."""
        started = ended if self.started is None else self.started
        return Outcome(self.key, self.input, value, None, None, self.attempts, self.waited, ended - started)

    def failed(self, error: BaseException, ended: float) -> Outcome[Any]:
        """The outcome with an error; no kind of failure where the job said that its item needs no work."""
        started = ended if self.started is None else self.started
        kind = None if isinstance(error, SkipItem) else classify(error)
        return Outcome(self.key, self.input, None, error, kind, self.attempts, self.waited, ended - started)

    def forget(self) -> None:
        """Let go of the user's data: children may keep this record longer than anyone needs them."""
        self.args = ()
        self.kwargs = self.input = None
