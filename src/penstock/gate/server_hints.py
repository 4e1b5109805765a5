"""What a server says about when to come back. Decides only: text and `now` in, seconds out."""

from calendar import timegm
from email.utils import parsedate_to_datetime

LONGEST_HINT = 3_600.0
"""Seconds. A longer wait is taken for a mistake and ignored: a key that is asleep for a day looks like a hang."""


def parse_retry_after(value: str | None, *, date: str | None, now: float) -> float | None:
    """Seconds to wait, from a `Retry-After` header (RFC 9110 10.2.3: a number of seconds, or an HTTP date).

    A date is compared with the response's own `Date`, so that a wrong clock on either side does not matter; with
    `now` (seconds since the epoch) where there is none. Malformed values, negative numbers and waits of more than
    an hour give None; a date in the past gives 0.
    """
    if value is None:
        return None
    value = value.strip()
    if value.isascii() and value.isdigit():
        seconds = float(value)
    else:
        until = _epoch(value)
        if until is None:
            return None
        answered = _epoch(date) if date is not None else None
        seconds = max(0.0, until - (now if answered is None else answered))
    return seconds if seconds <= LONGEST_HINT else None


def _epoch(value: str) -> float | None:
    try:
        # Not .timestamp(): a date without a zone is GMT here (RFC 9110 5.6.7), not the local time of this machine.
        return float(timegm(parsedate_to_datetime(value).utctimetuple()))
    except (ValueError, OverflowError, IndexError):
        return None


def hint_of(error: BaseException) -> float | None:
    """The wait in seconds that an error carries as `.retry_after`, or None where there is none that can be used.

    Read from any exception, so that an error of an SDK can carry one too.
    """
    hint = getattr(error, "retry_after", None)
    if isinstance(hint, bool) or not isinstance(hint, int | float):
        return None
    return float(hint) if 0 <= hint <= LONGEST_HINT else None
