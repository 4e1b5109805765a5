"""What a server says about when to come back, and about its quotas. Decides only: text and `now` in, numbers out.

    headers -> hints_of -> ServerHints(retry_after, policies) -> Meter.learn: paced before anything is refused
                                                              -> pause(status): the whole key rests

What is understood, strongest first:

    Retry-After                            RFC 9110 10.2.3: seconds, or an HTTP date
    retry-after-ms, x-ms-retry-after-ms    milliseconds: OpenAI and Azure
    x-amz-retry-after                      milliseconds: the AWS SDKs' protocols
    RateLimit, RateLimit-Policy            draft-ietf-httpapi-ratelimit-headers: structured fields (RFC 9651), lists,
                                           any number of policies, and the draft's form of 2023, a dictionary
    RateLimit-Limit, -Remaining, -Reset    its older form, with policies in the limit ("100, 100;w=60")
    X-RateLimit-..., X-Rate-Limit-...,     everybody's own form, with a unit in the name, behind ("-limit-requests")
    anthropic-ratelimit-...                or in the middle ("-requests-limit"), or none

A reset is a number of seconds, a time in seconds or milliseconds of the epoch (what is larger than a billion), a
duration ("6m0s", "500ms"), or a date. Dates and times are compared with the response's own `Date`, so that a wrong
clock on either side does not matter.

Guarantees: no text raises; no wait is negative, or longer than an hour; what is malformed is as good as absent. A
response that says nothing costs less than a microsecond.
"""

import re
from calendar import timegm
from collections.abc import Iterable, Mapping
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any, NamedTuple

from penstock import clock
from penstock.errors import status_of

LONGEST_HINT = 3_600.0
"""Seconds. A longer wait is taken for a mistake and ignored: a key that is asleep for a day looks like a hang."""

LONGEST_VALUE = 4_096
"""Characters. Arbitrary, because: no server's field is as long, and what is longer is not worth its parsing."""
LONGEST_TIME = 80
"""Characters of a date or a number; the longest form that is known has 61."""
MOST_POLICIES = 16
"""Of one answer. Arbitrary, because: real ones tell of one to six."""

FIRST_EPOCH = 1e9
"""What is larger is no number of seconds from now but a time of the epoch: it was so much in 2001."""
FIRST_EPOCH_IN_MS = 1e12
"""And what is larger than this counts milliseconds."""

REQUESTS = "requests"
CONCURRENT = "concurrent-requests"
"""Quota units of the IETF draft; the latter limits what is in flight."""


class Policy(NamedTuple):
    """One limit that a server tells of. None where it does not say."""

    name: str
    quota: float | None
    remaining: float | None
    reset: float | None
    """Seconds until there is more; at most an hour."""
    window: float | None
    """Seconds."""
    unit: str
    """What is counted: "requests", "tokens", "concurrent-requests", ..."""


class ServerHints(NamedTuple):
    """What one answer says about when to come back."""

    retry_after: float | None
    """Seconds; at most an hour."""
    policies: tuple[Policy, ...]

    def pause(self, status: int | None) -> float | None:
        """Seconds for which the whole key has to rest after an answer of that status; None: it need not.

        `Retry-After` wins over any reset (the IETF draft demands it), and counts for refusals only: some servers send
        it with each answer. Without it a 429 or 403 rests until the reset of what is used up. If nothing is, a 429
        rests until that of what is nearest to it, since the limit is then one of which the server does not tell
        (GitHub's secondary ones); a 403 does not: with much left, it forbids this request and no other.
        """
        if status is None or status < 400:
            return None
        if self.retry_after is not None:
            return self.retry_after
        if status not in (403, 429):
            return None
        known = [policy for policy in self.policies if policy.reset is not None and policy.unit != CONCURRENT]
        used_up = [policy.reset for policy in known if not policy.remaining]
        if used_up:
            return max(reset for reset in used_up if reset is not None)
        if not known or status == 403:
            return None
        reset = min(known, key=_share_left).reset
        assert reset is not None, "those are known"
        return reset


def _share_left(policy: Policy) -> float:
    assert policy.remaining is not None, "the others are used up"
    return policy.remaining / policy.quota if policy.quota else policy.remaining


def hints_of(headers: Mapping[str, str], *, now: float) -> ServerHints | None:
    """What the headers of an answer say; None for most answers, which say nothing. Never raises.

    Args:
        headers: any mapping of names, in any case, to text; one of several lines for a name is read whole.
        now: seconds since the epoch, for dates in an answer that has no `Date` of its own.
    """
    try:
        names = "\n".join(headers).lower()
    except TypeError:  # no mapping, or not of text
        return None
    if "retry-after" not in names and "ratelimit" not in names and "rate-limit" not in names:
        return None
    fields = _fields(headers)
    date = _epoch(fields["date"][0]) if "date" in fields else None
    answered = now if date is None else date
    retry_after = _retry_after(fields, answered)
    policies = _new_draft(fields) or _families(fields, answered)
    if retry_after is None and not policies:
        return None
    return ServerHints(retry_after, policies)


def hint_of(error: BaseException, *, now: float | None = None) -> float | None:
    """The wait in seconds that an error carries, or None where there is none that can be used. Never raises.

    Read from any exception, so that an error of an SDK can carry one too: as `.retry_after`, a number of seconds, or in
    its `.headers`, such as those of `aiohttp.ClientResponseError`, together with its `.status`.
    """
    hint = _attribute(error, "retry_after")
    if isinstance(hint, int | float) and not isinstance(hint, bool):
        return float(hint) if 0 <= hint <= LONGEST_HINT else None
    headers = _attribute(error, "headers")
    if headers is None or not callable(_attribute(headers, "items")):
        return None
    try:
        hints = hints_of(headers, now=clock.wall() if now is None else now)
    except Exception:  # noqa: BLE001  # somebody else's mapping: its mistake must not end the run
        return None
    if hints is None:
        return None
    status = status_of(error)
    return hints.retry_after if status is None else hints.pause(status)


def _attribute(of: Any, name: str) -> Any:
    try:
        return getattr(of, name, None)
    except Exception:  # noqa: BLE001  # a property of the user's: its mistake must not end the run
        return None


_Fields = dict[str, list[str]]


def _fields(headers: Mapping[str, str]) -> _Fields:
    """What may matter, by lower-case name, with all its lines."""
    fields: _Fields = {}
    for name, value in headers.items():
        name = name.lower()
        wanted = name == "date" or "retry-after" in name or "ratelimit" in name or "rate-limit" in name
        if wanted and isinstance(value, str) and len(value) <= LONGEST_VALUE:
            fields.setdefault(name, []).append(value)
    return fields


# --- waits ---


def parse_retry_after(value: str | None, *, date: str | None, now: float) -> float | None:
    """Seconds to wait, from a `Retry-After` header (RFC 9110 10.2.3: a number of seconds, or an HTTP date).

    A date is compared with the response's own `Date`, so that a wrong clock on either side does not matter; with
    `now` (seconds since the epoch) where there is none. Malformed values, negative numbers and waits of more than
    an hour give None; a date in the past gives 0.
    """
    if value is None:
        return None
    answered = _epoch(date) if date is not None else None
    return _retry_after_of(value, now if answered is None else answered)


def _retry_after_of(value: str, answered: float) -> float | None:
    value = value.strip()
    if value.isascii() and value.isdigit():
        seconds = float(value)
    else:
        until = _epoch(value)
        if until is None:
            return None
        seconds = max(0.0, until - answered)
    return seconds if seconds <= LONGEST_HINT else None


def _retry_after(fields: _Fields, answered: float) -> float | None:
    for value in fields.get("retry-after", ()):
        seconds = _retry_after_of(value, answered)
        if seconds is not None:
            return seconds
    for name in ("retry-after-ms", "x-ms-retry-after-ms", "x-amz-retry-after"):
        for value in fields.get(name, ()):
            milliseconds = _number(value)
            if milliseconds is not None and 0 <= milliseconds <= LONGEST_HINT * 1000:
                return milliseconds / 1000
    return None


_NUMBER = re.compile(r"-?[0-9]{1,15}(?:\.[0-9]{1,15})?", re.ASCII)
_DURATION = re.compile(
    r"(?:([0-9]{1,9})h)?(?:([0-9]{1,9})m)?(?:([0-9]{1,9}(?:\.[0-9]{1,9})?)s)?(?:([0-9]{1,9}(?:\.[0-9]{1,9})?)ms)?",
    re.ASCII,
)
_TIMESTAMP = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})[Tt ]([0-9]{2}):([0-9]{2}):([0-9]{2})(\.[0-9]{1,9})?"
    r"(?:[Zz]|([+-])([0-9]{2}):?([0-9]{2}))?",
    re.ASCII,
)
"""RFC 3339; without a zone it means Greenwich."""
_OF_A_SCRIPT = re.compile(
    r"[A-Z][a-z]{2} ([A-Z][a-z]{2}) ([0-9]{1,2}) ([0-9]{4}) ([0-9]{2}:[0-9]{2}:[0-9]{2}) GMT([+-][0-9]{4})", re.ASCII
)
"""As JavaScript prints a date; what follows is the zone in words."""


def _number(value: str) -> float | None:
    value = value.strip()
    return float(value) if _NUMBER.fullmatch(value) else None


def _reset(value: str, answered: float, *, relative: bool = False) -> float | None:
    """Seconds until a reset, in whatever form it is given."""
    value = value.strip()
    if not value or len(value) > LONGEST_TIME:
        return None
    number = _number(value)
    if number is not None:
        if number > FIRST_EPOCH and not relative:
            return _until(number / 1000 if number > FIRST_EPOCH_IN_MS else number, answered)
        return number if 0 <= number <= LONGEST_HINT else None
    duration = _DURATION.fullmatch(value)
    if duration is not None:
        hours, minutes, seconds, milliseconds = (float(part or 0) for part in duration.groups())
        total = hours * 3600 + minutes * 60 + seconds + milliseconds / 1000
        return total if total <= LONGEST_HINT else None
    until = _time_of(value)
    return None if until is None else _until(until, answered)


def _until(when: float, answered: float) -> float | None:
    """A time that has just passed is now; any other one that is far away is a mistake."""
    seconds = when - answered
    return max(0.0, seconds) if -LONGEST_HINT <= seconds <= LONGEST_HINT else None


def _time_of(value: str) -> float | None:
    found = _TIMESTAMP.fullmatch(value)
    if found is not None:
        return _time_of_timestamp(found)
    script = _OF_A_SCRIPT.match(value)
    if script is not None:
        month, day, year, time, zone = script.groups()
        value = f"{day} {month} {year} {time} {zone}"
    return _epoch(value)


def _time_of_timestamp(found: re.Match[str]) -> float | None:
    year, month, day, hour, minute, second = (int(part) for part in found.groups()[:6])
    fraction, sign, hours, minutes = found.groups()[6:]
    if not (year >= 1 and 1 <= month <= 12 and 1 <= day <= 31 and hour <= 24 and minute <= 59 and second <= 60):
        return None
    epoch = timegm((year, month, day, hour, minute, second)) + float(fraction or 0)
    if sign is not None:
        offset = int(hours) * 3600 + int(minutes) * 60
        epoch += -offset if sign == "+" else offset
    return epoch


@lru_cache(maxsize=64)  # the same second is read again and again: of each answer, where a server sends times
def _epoch(value: str) -> float | None:
    try:
        # Not .timestamp(): a date without a zone is GMT here (RFC 9110 5.6.7), not the local time of this machine.
        return float(timegm(parsedate_to_datetime(value).utctimetuple()))
    except (ValueError, OverflowError, IndexError):
        return None


# --- policies: RateLimit and RateLimit-Policy ---

_STRING = r'"(?:[ !#-\[\]-~]|\\["\\])*"'
_BARE = (
    rf"{_STRING}|-?[0-9]{{1,15}}(?:\.[0-9]{{1,9}})?|[A-Za-z*][!#$%&'*+\-.^_`|~0-9A-Za-z:/]*|\?[01]|:[A-Za-z0-9+/=]*:"
)
_ITEM = re.compile(rf"[ \t]*({_BARE})", re.ASCII)
_PARAMETER = re.compile(rf" *; *([a-z*][a-z0-9_\-.*]*)(?:=({_BARE}))?", re.ASCII)
_NEXT = re.compile(r"[ \t]*(?:,|$)", re.ASCII)
_MEMBER = re.compile(r"[ \t]*([a-z]+)=([0-9]{1,15})[ \t]*", re.ASCII)

_Items = tuple[tuple[str, Mapping[str, str]], ...]


def _items(lines: Iterable[str]) -> _Items:
    """The members of a structured list with their parameters; none if it is malformed anywhere (RFC 9651 4.2)."""
    text = ", ".join(lines).strip()
    return _parsed(text) if len(text) <= LONGEST_VALUE else ()


@lru_cache(maxsize=64)  # policies are the same in each answer
def _parsed(text: str) -> _Items:
    items: list[tuple[str, Mapping[str, str]]] = []
    at = 0
    while at < len(text) and len(items) < MOST_POLICIES:
        item = _ITEM.match(text, at)
        if item is None:
            return ()
        at = item.end()
        parameters = {}
        while (parameter := _PARAMETER.match(text, at)) is not None:
            parameters[parameter[1]] = parameter[2] or "?1"
            at = parameter.end()
        end = _NEXT.match(text, at)
        if end is None:
            return ()
        at = end.end()
        items.append((_plain(item[1]), parameters))
    return tuple(items)


def _plain(bare: str) -> str:
    return re.sub(r"\\(.)", r"\1", bare[1:-1]) if bare.startswith('"') else bare


def _new_draft(fields: _Fields) -> tuple[Policy, ...]:
    if "ratelimit" not in fields and "ratelimit-policy" not in fields:
        return ()
    policies: dict[str, Policy] = {}
    named: dict[str, Policy] = {}
    for name, parameters in _items(fields.get("ratelimit-policy", ())):
        quota = _count(parameters.get("q"))
        if quota is not None:  # required: a bare number is the older form, for which see `_windows`
            unit = _plain(parameters.get("qu", REQUESTS)).lower()
            key = _partition(name, parameters)
            policies[key] = named[name] = Policy(key, quota, None, None, _span(parameters.get("w")), unit)
    lines = fields.get("ratelimit", ())
    for name, parameters in _items(lines):
        remaining = _count(parameters.get("r"))
        if remaining is not None:  # required
            key = _partition(name, parameters)
            told = policies.get(key) or named.get(name) or Policy(key, None, None, None, None, REQUESTS)
            if told.name != key:
                policies.pop(told.name, None)
            policies[key] = told._replace(name=key, remaining=remaining, reset=_soon(parameters.get("t")))
    return tuple(policies.values()) or _dictionary(lines, fields)


def _partition(name: str, parameters: Mapping[str, str]) -> str:
    """Each partition of a policy has a quota of its own."""
    return f"{name} {parameters['pk']}" if "pk" in parameters else name


def _dictionary(lines: Iterable[str], fields: _Fields) -> tuple[Policy, ...]:
    """The draft's form of 2023: "limit=100, remaining=50, reset=5"."""
    found = {}
    for member in ",".join(lines).split(","):
        pair = _MEMBER.fullmatch(member)
        if pair is None:
            return ()
        found[pair[1]] = pair[2]
    remaining = _count(found.get("remaining"))
    if remaining is None:
        return ()
    quota = _count(found.get("limit"))
    window = _windows(fields).get(quota)
    return (Policy("default", quota, remaining, _soon(found.get("reset")), window, REQUESTS),)


def _windows(fields: _Fields) -> dict[float | None, float | None]:
    """Windows by quota, as the older drafts tell them: "100;w=60" in the policy, or behind the limit."""
    windows: dict[float | None, float | None] = {}
    for name in ("ratelimit-policy", "ratelimit-limit", "x-ratelimit-limit"):
        for quota, parameters in _items(fields[name]) if name in fields else ():
            if "w" in parameters:
                windows.setdefault(_count(quota), _span(parameters["w"]))
    return windows


def _count(value: str | None) -> float | None:
    """An amount; less than nothing is nothing."""
    number = None if value is None else _number(value)
    return None if number is None else max(0.0, number)


def _span(value: str | None) -> float | None:
    """The length of a window."""
    return _count(value) or None


def _soon(value: str | None) -> float | None:
    seconds = None if value is None else _number(value)
    return seconds if seconds is not None and 0 <= seconds <= LONGEST_HINT else None


# --- policies: everybody's own ---

_FAMILY = re.compile(r"(.*?rate-?limit)-(.+)")
_PERIODS = {"second": 1.0, "minute": 60.0, "hour": 3_600.0, "day": 86_400.0}
"""Units that are windows in truth, of requests: Kong's."""


def _families(fields: _Fields, answered: float) -> tuple[Policy, ...]:
    """Headers of the kind `x-ratelimit-remaining`, by what stands before and behind it."""
    groups: dict[tuple[str, str], dict[str, str]] = {}
    for name, lines in fields.items():
        found = _FAMILY.fullmatch(name)
        if found is None:
            continue
        kind, unit = _kind(found[2])
        if kind is not None:
            groups.setdefault((found[1], unit), {})[kind] = lines[0]
    policies: dict[tuple[float | None, float | None, float | None, str], Policy] = {}
    windows = _windows(fields)
    for (family, unit), values in groups.items():
        policy = _policy(family, unit, values, windows, answered)
        if policy is not None and len(policies) < MOST_POLICIES:
            # Many servers say it in two spellings.
            policies.setdefault((policy.quota, policy.remaining, policy.reset, policy.unit), policy)
    return tuple(policies.values())


@lru_cache(maxsize=256)
def _kind(rest: str) -> tuple[str | None, str]:
    """What such a header tells, and of which unit."""
    words = rest.split("-")
    for kind in ("remaining", "limit", "reset"):
        if kind in words:
            words.remove(kind)
            if kind == "reset" and "after" in words:
                words.remove("after")
                kind = "reset-after"
            return kind, "-".join(words)
    return None, ""


def _policy(
    family: str, unit: str, values: dict[str, str], windows: dict[float | None, float | None], answered: float
) -> Policy | None:
    remaining = _count(values.get("remaining"))
    if "reset-after" in values:
        reset = _reset(values["reset-after"], answered, relative=True)
    else:
        reset = _reset(values["reset"], answered) if "reset" in values else None
    if remaining is None and reset is None:
        return None
    quota = _count(re.split("[,;]", values.get("limit", ""), maxsplit=1)[0])
    window = _PERIODS.get(unit, windows.get(quota))
    counted = REQUESTS if not unit or unit in _PERIODS else unit
    return Policy(f"{family}-{unit}" if unit else family, quota, remaining, reset, window, counted)
