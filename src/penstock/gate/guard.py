"""The guard of an event loop: when it lags, or memory is short, less is started on it.

    a round trip or a job starts -> stir() -> every BEAT: how late am I? every LOOK: how much memory is used?
        -> guard_rule.py -> each gate, each executor: beat(share, lag, lagging)

The heartbeat stops by itself when nothing is started any more, so that an idle loop stays idle and a virtual clock
comes to its end. Only while something is held back does it go on for `WATCH` seconds, or nobody would see that it is
over.

Guarantees: who is told raises nothing here, and hinders nobody else. Guard, gates and executors of one loop find each
other here, and none of them keeps another or the loop alive. That memory is short, and that gates use less than half of
their limits because the loop lags, is logged once when it begins and once when it is over. Loop thread only.
"""

import asyncio
import logging
from typing import TYPE_CHECKING, Protocol
from weakref import WeakKeyDictionary, ref

from penstock.gate.guard_rule import BACK, BEAT, LEAST_IN_FLIGHT, LOOK, LoadRule, MemoryRule
from penstock.memory import MEMORY, MemoryUse

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("penstock.gate")

LINGER = 2 * LOOK
"""Seconds for which the heart beats on after the last start: what was started shows in the memory by then."""
WATCH = 600.0
"""Seconds for which it is watched, after the last start, whether what holds back is over. Arbitrary, because: longer
than jobs take that keep others waiting, as a rule, and each start begins them anew."""
WORTH_A_WARNING = 0.5
"""Share of the limits below which somebody should know that the loop lags. Arbitrary, because: half is reached after
more than three seconds of it, and those are no hiccup."""


class Guarded(Protocol):
    """Who starts something on the loop, and is told how the loop is."""

    def beat(self, share: float, lag: float, lagging: bool) -> None:
        """Start no more than `share` of the limits; what is `lagging` must not grow. `lag`: seconds, just now."""
        ...

    def total_limit(self) -> int:
        """The sum of the limits of its service keys in use, before a share is taken; 0 if it has none."""
        ...


class Guard:
    """What is known of one loop's load, and of the memory."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.quiet = True
        """Nothing has been started since the last beat: who starts something calls `stir`."""
        self.total = 0
        """The sum of all limits in use on this loop, as of the last beat."""
        self.memory = MemoryRule()
        self.look: Callable[[], MemoryUse | None] = MEMORY.use
        """How memory is looked at. Tests put theirs here."""
        self._loop = ref(loop)
        self._load = LoadRule()
        self._told: WeakKeyDictionary[Guarded, bool] = WeakKeyDictionary()
        """Who is told, in the order in which they came; True once it has raised."""
        self._beating = False
        """A timer is set. It is not kept here, since it would keep the loop alive."""
        self._due = 0.0
        self._look_due = 0.0
        self._stirred = 0.0
        self._lags_since: float | None = None
        """Since when it is known from the log that the loop lags; None: it does not, or not much."""

    @property
    def share(self) -> float:
        """Of their limits, that gates may use: in (0, 1]."""
        return self._load.share

    @property
    def lagging(self) -> bool:
        """Whether no limit may grow."""
        return self._load.lagging or self.memory.short

    def add(self, guarded: Guarded) -> None:
        """Tell it from now on, as long as somebody else holds it. Adding it again is fine."""
        self._told.setdefault(guarded, False)

    def remove(self, guarded: Guarded) -> None:
        """Tell it no more."""
        self._told.pop(guarded, None)

    def stir(self) -> None:
        """Something is being started: see that the heart beats."""
        if self.quiet:
            self.quiet = False
            self._stirred = self.now()
            if not self._beating:
                self._set_timer(self._stirred)

    def now(self) -> float:
        """The loop's time."""
        loop = self._loop()
        assert loop is not None, "this is called on it"
        return loop.time()

    def look_now(self) -> int | None:
        """Look at the memory though it is not time; what this process may use, in bytes, if anybody knows."""
        now = self.now()
        self._look_due = now + LOOK
        use = self._look_at_memory(now)
        return None if use is None else use.allowed

    def _set_timer(self, now: float) -> None:
        loop = self._loop()
        assert loop is not None, "this is called on it"
        self._due = now + BEAT
        self._beating = True
        loop.call_at(self._due, self._beat)

    def _beat(self) -> None:
        now = self.now()
        lag = max(0.0, now - self._due)
        held_back = self._load.share < 1.0 or self.memory.short
        if self.quiet and now - self._stirred > (WATCH if held_back else LINGER):
            self._beating = False
        else:
            self.quiet = True
            self._set_timer(now)
        if now >= self._look_due:
            self._look_due = now + LOOK
            self._look_at_memory(now)
        self.total = sum([self._limit_of(guarded) for guarded in list(self._told)])
        self._load.beat(now, lag, self.total, short=self.memory.short)
        self._tell_of_lag(now)
        share, lagging = self.share, self.lagging
        for guarded in list(self._told):
            try:
                guarded.beat(share, lag, lagging)
            except Exception:  # noqa: BLE001  # the others must be told
                self._complain(guarded)

    def _limit_of(self, guarded: Guarded) -> int:
        try:
            return guarded.total_limit()
        except Exception:  # noqa: BLE001  # as above
            self._complain(guarded)
            return 0

    def _complain(self, guarded: Guarded) -> None:
        if not self._told.get(guarded, True):
            self._told[guarded] = True
            logger.exception("%r failed when it was told how busy its event loop is", guarded)

    def _tell_of_lag(self, now: float) -> None:
        share = self.share
        if self._lags_since is None:
            if share < WORTH_A_WARNING and self._load.lagging and self.total:
                self._lags_since = now
                logger.warning(
                    "the event loop lags by %.0f ms: a callback or a coroutine without await blocks it, or it is out "
                    "of CPU; gates use %.0f %% of their limits until that is over",
                    1000 * self._load.worst, 100 * share,
                )  # fmt: skip
        elif share >= 1.0:
            logger.info(
                "the event loop does not lag any more after %.1f s: gates use all of their limits",
                now - self._lags_since,
            )
            self._lags_since = None

    def _look_at_memory(self, now: float) -> MemoryUse | None:
        use = self.look()
        if use is None:
            return None
        memory, was_short = self.memory, self.memory.short
        memory.look(now, use)
        if memory.short and not was_short:
            logger.warning(
                "memory is short: this process holds %s of the %s that it may use, and %s are left. "
                "Until that is over, executors without a limit= start a job only while fewer than %d run, "
                "and gates cut their limits by and by. It is over %s.",
                _size(use.used), _size(use.allowed), _size(use.available), LEAST_IN_FLIGHT,
                "when others have given some back" if memory.by_others else f"below {memory.mark - BACK:.0%}",
            )  # fmt: skip
        elif was_short and not memory.short:
            logger.info(
                "memory is not short any more after %.1f s: this process holds %s of %s",
                now - memory.since, _size(use.used), _size(use.allowed),
            )  # fmt: skip
        return use


def guard_of(loop: asyncio.AbstractEventLoop) -> Guard:
    """The guard of this loop, made when it is first asked for."""
    guard = _of_loop.get(loop)
    if guard is None:
        guard = _of_loop[loop] = Guard(loop)
    return guard


def _size(size_bytes: int) -> str:
    mib = size_bytes / (1 << 20)
    return f"{mib:.0f} MiB" if mib < 10240 else f"{mib / 1024:.1f} GiB"


_of_loop: "WeakKeyDictionary[asyncio.AbstractEventLoop, Guard]" = WeakKeyDictionary()
