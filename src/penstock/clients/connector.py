"""The connector under a client: wide enough for its gate, and within the process's file descriptors."""

import asyncio
import sys

import aiohttp

from penstock.errors import ClosedError, UsageError, WrongLoop
from penstock.gate.limiter import LimitRule

SPARE_DESCRIPTORS = 64
"""File descriptors left to the rest of the process. Arbitrary, because: files, pipes and other sockets need some."""


def connector_for(own: aiohttp.BaseConnector | None, limit: int | LimitRule) -> aiohttp.BaseConnector:
    """The user's own connector if it can carry `limit` requests at once, else a new `TCPConnector` that can.

    A limit that is measured takes what there is: see `most_connections`.

    Raises:
        UsageError: `limit` is more than the process's file descriptors, or than the user's connector, allow.
        ClosedError, WrongLoop: the user's connector has been closed, or belongs to another loop.
    """
    if isinstance(limit, int):
        check_connections(own, limit)
    if own is None:
        return aiohttp.TCPConnector(limit=_descriptors())
    if own.closed:
        raise ClosedError("the connector= has been closed. Make a new one for each client, or leave it out.")
    if own._loop is not asyncio.get_running_loop():  # private, and there is no public way to find out in time
        raise WrongLoop("the connector= belongs to another event loop. Make it inside this one.")
    return own


def most_connections(own: aiohttp.BaseConnector | None) -> int:
    """How many requests the user's connector, or one of ours, can carry at once to one origin."""
    return min([_descriptors(), *(bound for _, bound in _bounds(own) if bound > 0)])


def check_connections(own: aiohttp.BaseConnector | None, limit: int) -> None:
    """Refuse a limit that there will never be connections for.

    Raises:
        UsageError: `limit` is more than the process's file descriptors, or than the user's connector, allow.
    """
    if limit > _descriptors():
        raise UsageError(
            f"limit={limit}: this process may open {_descriptors() + SPARE_DESCRIPTORS} files, {SPARE_DESCRIPTORS} of "
            f"them kept for other uses. Lower limit=, or raise the process's limit (`ulimit -n`)."
        )
    for name, bound in _bounds(own):
        if 0 < bound < limit:
            raise UsageError(
                f"the connector's {name}={bound} is below the client's limit={limit}: requests would wait inside "
                f"aiohttp, on the clock of their timeout. Make it at least {limit}, or 0."
            )


def _bounds(own: aiohttp.BaseConnector | None) -> tuple[tuple[str, int], ...]:
    if own is None:
        return ()
    return ("limit", own.limit), ("limit_per_host", getattr(own, "limit_per_host", 0))


def _descriptors() -> int:
    """Connections that this process may have open."""
    try:
        import resource
    except ImportError:  # Windows has no such limit on sockets
        return sys.maxsize
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else max(1, soft - SPARE_DESCRIPTORS)
