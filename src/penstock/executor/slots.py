"""Job slots: how many jobs run at once, and how a job's children get by when all slots are taken.

A child (a job that a job of the same executor submits) takes a free slot, else runs on the slot of its parent, one
child for each parent at a time, else waits for whichever comes first. So fan-out stays bounded, and a job that waits
for its children never waits for ever: at any depth, the deepest job of a chain has a slot to run on.

A parent that ends before its borrower hands its slot on to it. A child whose parent has ended looks to the nearest
ancestor that still runs. Loop thread only.
"""

import asyncio

from penstock.context import RunningJob
from penstock.permits import PermitQueue, take_first


class Holder(RunningJob):
    """A job as the slots see it."""

    parent: "Holder | None" = None
    """The job that submitted it, as long as that one runs or has not been asked for."""
    holds: bool = False
    """True while the job has a slot to run on, its own or a borrowed one."""
    lender: "Holder | None" = None
    """Whose slot the job runs on; None when the slot is its own."""
    borrower: "Holder | None" = None
    """Who runs on this job's slot beside it."""
    loan: PermitQueue | None = None
    """The right to run on this job's slot; made when it is first asked for."""

    def nearest_lender(self) -> "Holder | None":
        """The nearest ancestor that still runs. Ancestors that have ended are forgotten on the way."""
        while self.parent is not None and not self.parent.holds:
            self.parent = self.parent.parent
        return self.parent


class Slots:
    """The slots of one executor."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: int) -> None:
        self._loop = loop
        self._free = PermitQueue(loop, limit)

    @property
    def limit(self) -> int:
        """How many slots there are."""
        return self._free.limit

    @property
    def in_use(self) -> int:
        """How many are taken."""
        return self._free.in_flight

    def resize(self, limit: int) -> None:
        """Change their number. Those beyond a smaller one are taken back as their jobs end."""
        self._free.resize(limit)

    def take_nowait(self, job: Holder) -> bool:
        """Take a slot of the job's own if one is free and nobody is before us."""
        if self._free.take_nowait():
            job.holds = True
            return True
        return False

    async def take(self, job: Holder) -> None:
        """Wait until `job` may run. Cancellation gives everything back."""
        while not self.take_nowait(job):
            lender = job.nearest_lender()
            if lender is None:
                await self._free.take()
                job.holds = True
                return
            if lender.loan is None:
                lender.loan = PermitQueue(self._loop, 1)
            if lender.loan.take_nowait() or await take_first(self._loop, self._free, lender.loan) is lender.loan:
                if self._borrow(job, lender, lender.loan):
                    return
            else:
                job.holds = True
                return

    def give_back(self, job: Holder) -> None:
        """`job` has ended: its slot goes to who runs on it, else to its lender, else it is free."""
        job.holds = False
        if job.borrower is None and job.lender is None:
            self._free.give_back()
        else:
            self._hand_on(job, job.borrower, job.lender)
        if job.parent is not None:
            job.nearest_lender()  # forgets ancestors that have ended: a chain of successors must not grow for ever

    def _hand_on(self, job: Holder, heir: Holder | None, lender: Holder | None) -> None:
        job.borrower = job.lender = None
        if heir is not None:
            assert job.loan is not None, "it has been lent"
            heir.lender = lender
            job.loan.give_back()  # who waits for it is to look for another lender
        if lender is not None:
            lender.borrower = heir
            if heir is None:
                assert lender.loan is not None, "it has been lent"
                lender.loan.give_back()

    def _borrow(self, job: Holder, lender: Holder, loan: PermitQueue) -> bool:
        if not lender.holds:
            loan.give_back()  # it ended while we waited; the next one is to notice too
            return False
        lender.borrower = job
        job.lender = lender
        job.holds = True
        return True
