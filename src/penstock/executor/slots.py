"""Job slots: how many jobs run at once, and how a job's children get by when all slots are taken.

A child (a job that a job of the same executor submits) takes a free slot, else runs on the slot of its parent, one
child for each parent at a time, else waits for whichever comes first. So fan-out stays bounded, and a job that waits
for its children never waits for ever: at any depth, the deepest job of a chain has a slot to run on.

    free slot: `_free`, an asyncio.Semaphore.   loan of a running job: a Semaphore(1) made when first asked for.

A parent that ends before its borrower hands its slot on to it. A child whose parent has ended looks to the nearest
ancestor that still runs. Loop thread only.
"""

import asyncio

from penstock.context import Host, RunningJob


class Holder(RunningJob):
    """A job as the slots see it."""

    __slots__ = ("_loan", "borrower", "holds", "lender", "parent")

    def __init__(self, host: Host, name: str, key: object, parent: "Holder | None") -> None:
        super().__init__(host, name, key, 0 if parent is None else parent.depth + 1)
        self.parent = parent
        self.holds = False
        """True while the job has a slot to run on, its own or a borrowed one."""
        self.lender: Holder | None = None
        """Whose slot the job runs on; None when the slot is its own."""
        self.borrower: Holder | None = None
        self._loan: asyncio.Semaphore | None = None

    @property
    def loan(self) -> asyncio.Semaphore:
        """The right to run on this job's slot."""
        if self._loan is None:
            self._loan = asyncio.Semaphore(1)
        return self._loan

    def release_loan(self) -> None:
        """Give the loan back, if it was ever asked for."""
        if self._loan is not None:
            self._loan.release()

    def nearest_lender(self) -> "Holder | None":
        """The nearest ancestor that still runs. Ancestors that have ended are forgotten on the way."""
        while self.parent is not None and not self.parent.holds:
            self.parent = self.parent.parent
        return self.parent


class Slots:
    """The slots of one executor."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._free = asyncio.Semaphore(limit)

    async def take(self, job: Holder) -> None:
        """Wait until `job` may run. Cancellation gives everything back."""
        while not job.holds:
            if not self._free.locked():
                await self._free.acquire()  # does not suspend: it is free
                job.holds = True
            elif (lender := job.nearest_lender()) is None:
                await self._free.acquire()
                job.holds = True
            elif not lender.loan.locked():
                await lender.loan.acquire()  # does not suspend either
                self._borrow(job, lender)
            elif await _first_of(self._free, lender.loan) is self._free:
                job.holds = True
            else:
                self._borrow(job, lender)

    def give_back(self, job: Holder) -> None:
        """`job` has ended: its slot goes to who runs on it, else to its lender, else it is free."""
        job.holds = False
        heir, lender = job.borrower, job.lender
        job.borrower = job.lender = None
        if heir is not None:
            heir.lender = lender
            if lender is not None:
                lender.borrower = heir
        elif lender is not None:
            lender.borrower = None
            lender.release_loan()
        else:
            self._free.release()
        job.release_loan()  # who waits for it is to look for another lender
        job.nearest_lender()  # forgets ancestors that have ended: a chain of successors must not grow for ever

    def _borrow(self, job: Holder, lender: Holder) -> None:
        if not lender.holds:
            lender.release_loan()  # it ended while we waited; the next one is to notice too
            return
        lender.borrower = job
        job.lender = lender
        job.holds = True


async def _first_of(*semaphores: asyncio.Semaphore) -> asyncio.Semaphore:
    """Acquire exactly one of the semaphores, whichever is free first."""
    waits = {asyncio.ensure_future(semaphore.acquire()): semaphore for semaphore in semaphores}
    won: asyncio.Semaphore | None = None
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        won = next(semaphore for wait, semaphore in waits.items() if wait.done())
    finally:
        for wait, semaphore in waits.items():
            if not wait.done():
                wait.cancel()  # a Semaphore hands on what a cancelled acquire was granted in the same tick
            elif semaphore is not won:
                semaphore.release()
    return won
