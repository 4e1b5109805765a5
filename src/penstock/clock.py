"""The only module that reads time.

Everything else is given `now`, or asks its event loop, whose time `now()` is: under the virtual-clock loop of
`penstock.testing` the whole library then lives in virtual time. Durations are float seconds.
"""

import asyncio
import threading
import time
from contextlib import AbstractContextManager, nullcontext


def now() -> float:
    """Seconds on the running loop's own clock; only differences mean anything. Loop thread only."""
    return asyncio.get_running_loop().time()


def wall() -> float:
    """Seconds since the epoch: for comparing with dates that a server wrote, never for durations. Any thread."""
    return time.time()


def steady() -> float:
    """Seconds on the process's monotonic clock, for code that runs outside a loop. Any thread."""
    return time.monotonic()


def thread_cpu_clock() -> int | None:
    """The calling thread's own CPU clock, for `cpu_time`; None where the platform has none. Any thread.

    The thread asks for itself: asked for by another one after its end, the C library may crash.
    """
    if not hasattr(time, "pthread_getcpuclockid"):
        return None
    return time.pthread_getcpuclockid(threading.get_ident())


def cpu_time(clock_id: int) -> float | None:
    """Seconds of CPU that the thread of `thread_cpu_clock` has used; None once it has ended. Any thread.

    The system may give the clock of a thread that has ended to a later one: forget it when its thread ends.
    """
    try:
        return time.clock_gettime(clock_id)
    except OSError:
        return None


def stands_still(loop: asyncio.AbstractEventLoop) -> AbstractContextManager[None]:
    """While the block runs, something outside `loop` is at work for it: a virtual clock must not jump meanwhile.

    A clock that is not virtual (any loop without `external_work`) goes on as ever.
    """
    block: AbstractContextManager[None] = getattr(loop, "external_work", nullcontext)()
    return block
