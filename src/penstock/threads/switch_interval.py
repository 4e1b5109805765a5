"""Shorter turns at the GIL, for as long as somebody needs a loop that answers beside threads that compute.

A thread that wants the GIL asks for it after the switch interval, 5 ms unless somebody changed it. An event loop asks
each time it wakes, so every wake-up is late by about as much, once for each thread that computes.

The interval is one for the whole process. So users are counted: the first one shortens it, the last one puts back
what was there, and whatever somebody else set meanwhile stays.

Threads: any may enter, any other may leave; the lock guards what is shared.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SHORT = 0.0005
"""Seconds. Measured with one thread that computes: loop lag p50 of 10 ms (p99 19 ms) at the interpreter's 5 ms, 0.9 ms
(6 ms) at this, 31 ms (186 ms) and 5.7 ms (28 ms) with four, and no visible loss of computing;
`tests/benchmarks/bridge.py` measures it again."""

_HALF_STEP = 0.5e-6
"""Seconds. The interpreter counts whole microseconds and cuts the rest off: of its own values, more than one in four
would come back one less."""

_lock = threading.Lock()
_users = 0
_before = _ours = 0.0


@contextmanager
def short_switch_interval(seconds: float | None = SHORT) -> Iterator[None]:
    """While the block runs, threads take turns at the GIL after `seconds` at most. None: nothing is changed.

    The first of several users decides, in whichever threads they are. An interval that is shorter already stays.
    Never blocks.

    Raises:
        ValueError: `seconds` is not positive; where the block is entered.
    """
    if seconds is None:
        yield
        return
    if not seconds > 0:
        raise ValueError(f"short_switch_interval({seconds!r}): expected seconds, more than 0.")
    _enter(seconds)
    try:
        yield
    finally:
        _leave()


def _enter(seconds: float) -> None:
    global _users, _before, _ours
    with _lock:
        if not _users:
            _before = sys.getswitchinterval()
            if seconds < _before:
                sys.setswitchinterval(seconds)
            _ours = sys.getswitchinterval()
        _users += 1


def _leave() -> None:
    global _users
    with _lock:
        _users -= 1
        if not _users and sys.getswitchinterval() == _ours:
            sys.setswitchinterval(_before + _HALF_STEP)
