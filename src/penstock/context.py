"""Who asks: the identity of the current job.

Every job runs in a task and a context of its own, and a `RunningJob` is set in that context before the job's first
line. Whoever works for the job (a gate, a lane's thread, a log record) finds it here without being told: a context
variable follows the job through awaits, into threads and into tasks that it starts.

The record is written by the loop thread only, but for what the job has spent, which any thread may add to. Other
threads may read it.
"""

import reprlib
import threading
from collections.abc import Callable, Iterable, Mapping
from contextvars import Context, ContextVar
from typing import Any, Protocol, TypeVar

from penstock.errors import UsageError
from penstock.outcome import Outcome

I = TypeVar("I")  # noqa: E741  # the item
T = TypeVar("T")


class Host(Protocol):
    """What a job may ask of the executor that runs it."""

    async def to_thread(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> T: ...

    async def compute(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> T: ...

    async def compute_each(self, fn: Callable[[I], T], items: Iterable[I], /) -> list[Outcome[T]]: ...

    async def to_process(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> T: ...

    def from_thread(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any: ...


class Account(Protocol):
    """Where a run adds up what its jobs spend."""

    def spend(self, units: Mapping[str, float]) -> None:
        """So much more, by unit. Any thread; does not block."""
        ...

    def attempt(self) -> None:
        """One more attempt of a round trip. Loop thread only."""
        ...


class Recorder(Protocol):
    """Who records what becomes of items. Loop thread only."""

    def take_value(self, item: "RunningJob", value: Any, /) -> None:
        """The item's job has returned `value`. Raises where that cannot be recorded."""
        ...

    def memo_of(self, item: "RunningJob", /) -> Any:
        """The `penstock.journal.steps.Memo` of an item; None if none is kept."""
        ...


_spending = threading.Lock()
"""One for all jobs: it is held for the addition of some numbers, and taken only where something is spent."""


class RunningJob:
    """The identity of a job while it runs, and what it has used so far.

    What most jobs never change stands on the class: one of these is made for every item.
    """

    host: Host
    """The executor that runs it."""
    name: str
    """The function's name."""
    key: Any = None
    """What `key=` said of the item; None without it."""
    number: int = 0
    """The item's place in its source, from 1; 0 for a submitted job."""
    depth: int = 0
    """0 for a job of the program, 1 for a job submitted by such a job, and so on."""
    attempts: int = 0
    """Attempts of round trips so far, with those of jobs submitted for its item."""
    waited: float = 0.0
    """Seconds waited so far for permits, threads and back-off."""
    root: "RunningJob | None" = None
    """The job of the item that this job was submitted for, which pays for it; None: itself."""
    reader: "RunningJob | None" = None
    """The job that reads the stream to which this one belongs, and pays for it too; None where it has no account."""
    account: Account | None = None
    """That of its run; None where there is none."""
    recorder: "Recorder | None" = None
    """Who records what becomes of its item; None without a journal, and once it has ended."""
    written: Any = None
    """Its value, as it is recorded."""
    outcome_unknown: bool = False
    """Whether an earlier run started this item and ended in the middle of it; see `Journal(intents=True)`."""
    spent: dict[str, float] | None = None
    """What it has spent so far, by unit, with the jobs that it pays for. Replaced, never changed."""

    def spend(self, units: Mapping[str, float]) -> None:
        """Add to what the job of the item has spent, and to its run's account. Any thread; does not block.

        When that job belongs to a stream that the job of another item reads, that one and its run pay for it too.
        """
        payer = self.root or self
        while True:
            with _spending:
                before = payer.spent or {}
                payer.spent = before | {unit: before.get(unit, 0.0) + amount for unit, amount in units.items()}
            if payer.account is not None:
                payer.account.spend(units)
            if payer.reader is None:
                return
            payer = payer.reader

    def count_attempt(self) -> None:
        """It has begun an attempt of a round trip. Loop thread only."""
        payer = self.root or self
        payer.attempts += 1
        if payer.account is not None:
            payer.account.attempt()

    def __repr__(self) -> str:
        if self.key is not None:
            return f"<job {self.name} key={reprlib.repr(self.key)}>"
        return f"<job {self.name} item {self.number}>" if self.number else f"<job {self.name}>"


class Lease(Protocol):
    """What a job has checked out; a thread may go on using it after the job has let go. Loop thread only."""

    def hold(self) -> None:
        """An abandoned call still uses it."""
        ...

    def release(self) -> None:
        """That call has really ended."""
        ...


leases: ContextVar[tuple[Lease, ...]] = ContextVar("penstock_leases", default=())
"""What is checked out in this context. Whoever abandons a call in a thread holds them until it ends."""

_current: ContextVar[RunningJob | None] = ContextVar("penstock_job", default=None)

current_job = _current.get
"""The job whose code is running, or None outside any job. Any thread that runs for the job."""


def job_in(context: Context) -> RunningJob | None:
    """The job whose code runs in `context`."""
    return context.get(_current)


enter = _current.set
"""Make a job the current one, in the context that is current. For the executor alone."""


def host_of_current_job(wanted: str) -> Host:
    """The executor of the current job.

    Raises:
        UsageError: outside a job, where nobody says which executor is meant.
    """
    job = _current.get()
    if job is None:
        raise UsageError(
            f"penstock.{wanted} was called outside a job, so it cannot know which executor is meant. "
            f"Write `{'' if wanted == 'from_thread' else 'await '}executor.{wanted}(...)`."
        )
    return job.host
