"""What a failed attempt says about its service: one error in, one `Verdict` out, read by limiter, meter and breaker.

The error of an attempt is judged once, so that the parts of the gate cannot disagree about it. The table:

    what happened                                  limiter           breaker     meter
    an answer: 4xx but those below, bad JSON       round-trip time   success     -
    401, 403, 407, 425, a body that is too large   nothing           success     -
    429; 503 or 403 with a wait to keep            dropped           nothing     throttled
    408, 502, 503, 504, time-outs, connections     dropped           failure     -
    500 and the other 5xx                          nothing           failure     -
    cancelled, bugs, our own refusals, unknown     nothing           nothing     -

A refusal such as 403 is often said by what stands before the service, and faster than the service can be: its time
would teach the limiter a latency that no work has. An error of which we do not know where it comes from says nothing
about the service, and so moves nothing.

Pure: no I/O, no clock, no state; any thread.
"""

import concurrent.futures
import errno
import socket
from typing import NamedTuple

import aiohttp

from penstock.errors import BodyTooLarge, CircuitOpen, ConnectionFailed, ConnectTimeout, Overloaded, status_of
from penstock.gate.server_hints import hint_of
from penstock.outcome import FailureKind, classify


class Verdict(NamedTuple):
    """What one failed attempt says about its service."""

    dropped: bool
    """The service did not do the work, for want of capacity as far as we can tell: the limiter's sign of loss."""
    sampled: bool
    """The service has answered, in a time that is its own: the round-trip time counts, where it is known."""
    failed: bool | None
    """For the breaker: True is a failure, False a success (the service lives), None says nothing."""
    throttled: bool
    """The service asks for a lower rate."""
    unreachable: bool
    """There was not even a connection."""


ANSWERED = Verdict(dropped=False, sampled=True, failed=False, throttled=False, unreachable=False)
REFUSED = Verdict(dropped=False, sampled=False, failed=False, throttled=False, unreachable=False)
THROTTLED = Verdict(dropped=True, sampled=False, failed=None, throttled=True, unreachable=False)
LOST = Verdict(dropped=True, sampled=False, failed=True, throttled=False, unreachable=False)
UNREACHABLE = Verdict(dropped=True, sampled=False, failed=True, throttled=False, unreachable=True)
BROKEN = Verdict(dropped=False, sampled=False, failed=True, throttled=False, unreachable=False)
UNKNOWN = Verdict(dropped=False, sampled=False, failed=None, throttled=False, unreachable=False)

REFUSALS = frozenset({401, 403, 407, 425})
"""RFC 9110 15.5.2, 15.5.4, 15.5.8 and RFC 8470 5.2: said before the work begins, by whoever guards the service."""

_OURS = (CircuitOpen, Overloaded, concurrent.futures.BrokenExecutor)
_UNREACHABLE = (
    ConnectTimeout,
    ConnectionRefusedError,
    socket.gaierror,
    aiohttp.ClientConnectorError,
    aiohttp.ConnectionTimeoutError,
)
_UNREACHABLE_ERRNOS = frozenset({errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH})


def judge(error: BaseException) -> Verdict:
    """Say what `error`, with which an attempt ended, says about the service. Raises nothing, blocks on nothing.

    `classify` decides first, so an error that carries a `failure_kind` of its own is believed here too. A status is
    read from any error that has one. Our own refusals, and a worker process that died, may be retried, but are no word
    of the service.
    """
    kind = classify(error)
    if kind is FailureKind.THROTTLED:
        return THROTTLED
    if kind is FailureKind.TRANSIENT:
        return _judge_transient(error)
    if kind is FailureKind.PERMANENT:
        return _judge_permanent(error)
    return UNKNOWN


def _judge_transient(error: BaseException) -> Verdict:
    if isinstance(error, _OURS):
        return UNKNOWN
    return UNREACHABLE if _never_connected(error) else LOST


def _never_connected(error: BaseException) -> bool:
    if isinstance(error, ConnectionFailed) and not error.sent:
        return True
    return isinstance(error, _UNREACHABLE) or (isinstance(error, OSError) and error.errno in _UNREACHABLE_ERRNOS)


def _judge_permanent(error: BaseException) -> Verdict:
    if isinstance(error, BodyTooLarge):
        return REFUSED  # ours, not the service's; and the time of a body that was cut off is no sample
    status = status_of(error)
    if status is None or not 200 <= status < 600:
        return UNKNOWN
    if status >= 500:
        return BROKEN
    if status == 403 and hint_of(error) is not None:
        return THROTTLED  # GitHub says so of its secondary rate limits
    return REFUSED if status in REFUSALS else ANSWERED
