"""The connector under a client: wide enough for its gate, and within the process's file descriptors."""

import asyncio
import sys

import aiohttp

from penstock.errors import ClosedError, UsageError, WrongLoop

SPARE_DESCRIPTORS = 64
"""File descriptors left to the rest of the process. Arbitrary, because: files, pipes and other sockets need some."""


def connector_for(own: aiohttp.BaseConnector | None, limit: int) -> aiohttp.BaseConnector:
    """The user's own connector if it can carry `limit` requests at once, else a new `TCPConnector` that can.

    Raises:
        UsageError: `limit` is more than the process's file descriptors, or than the user's connector, allow.
        ClosedError, WrongLoop: the user's connector has been closed, or belongs to another loop.
    """
    available = _descriptors(limit)
    if own is None:
        return aiohttp.TCPConnector(limit=available)
    _check(own, limit)
    return own


def _check(connector: aiohttp.BaseConnector, limit: int) -> None:
    if connector.closed:
        raise ClosedError("the connector= has been closed. Make a new one for each client, or leave it out.")
    if connector._loop is not asyncio.get_running_loop():  # private, and there is no public way to find out in time
        raise WrongLoop("the connector= belongs to another event loop. Make it inside this one.")
    for name, bound in (("limit", connector.limit), ("limit_per_host", getattr(connector, "limit_per_host", 0))):
        if 0 < bound < limit:
            raise UsageError(
                f"the connector's {name}={bound} is below the client's limit={limit}: requests would wait inside "
                f"aiohttp, on the clock of their timeout. Make it at least {limit}, or 0."
            )


def _descriptors(limit: int) -> int:
    """Connections that this process may have open, which must be `limit` at least."""
    try:
        import resource
    except ImportError:  # Windows has no such limit on sockets
        return sys.maxsize
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return sys.maxsize
    if limit > max(1, soft - SPARE_DESCRIPTORS):
        raise UsageError(
            f"limit={limit}: this process may open {soft} files, {SPARE_DESCRIPTORS} of them kept for other uses. "
            f"Lower limit=, or raise the process's limit (`ulimit -n`)."
        )
    return max(1, soft - SPARE_DESCRIPTORS)
