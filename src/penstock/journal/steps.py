"""Steps: round trips of a job that are not paid for twice.

    step(name, fn, *args) -- known? --> the recorded value
                          -- else --> fn(*args) -> recorded with the next commit -> its value

A step is known by its name, a hash of its arguments, and how often the job has called just that before: a job that
polls may call the same step again and again, and a life after this one hears the same answers in the same order.

Steps are kept for items that are not finished: until one is done or skipped, and removed in the transaction that says
so. Without a journal a step is a call.

Guarantees: a step that was cancelled or raised is not recorded. One that has returned is recorded with the next commit;
a process that is killed before that calls it again. Loop thread only.
"""

import dataclasses
import enum
import hashlib
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, overload

from penstock.callables import check_function, is_async
from penstock.context import RunningJob, current_job
from penstock.errors import UsageError
from penstock.journal.options import fast_encoder, key_to_record
from penstock.journal.schema import Key, StepRow

if TYPE_CHECKING:
    from penstock.journal.recording import Recording

T = TypeVar("T")
P = ParamSpec("P")

HASH_BYTES = 16
"""Arbitrary, because: two of them are the same by accident once in 10^19 steps of one item."""


class Memo:
    """The steps of one item, as far as they are finished. Made when its job calls the first one."""

    def __init__(self, recording: "Recording", key: Key | None, known: list[StepRow] | None) -> None:
        self._recording = recording
        self._key = key
        self._known = {(row.name, row.arguments): row for row in known or ()}
        self._calls: Counter[bytes] = Counter()
        self._over = False

    def identify(self, name: str, call: bytes) -> bytes:
        """What a step is recorded under, which is being called now."""
        seed = name.encode() + b"\0" + call
        self._calls[seed] += 1
        return call + self._calls[seed].to_bytes(4, "big")

    def find(self, name: str, arguments: bytes) -> StepRow | None:
        """The step, if an earlier life of the item has finished it."""
        return self._known.get((name, arguments))

    async def value_of(self, row: StepRow) -> Any:
        """What it returned then."""
        return await self._recording.value_of(row)

    def keep(self, name: str, arguments: bytes, value: Any) -> Any:
        """It has returned `value` now; the value as a later life would hear it."""
        if self._over or self._key is None:
            return value
        return self._recording.put_step(self._key, name, arguments, value)

    def close(self) -> None:
        """The item is finished: what still runs for it is not recorded."""
        self._over = True


@overload
async def step(name: str, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T: ...


@overload
async def step(name: str, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...


async def step(name: str, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Inside a job: `fn(*args, **kwargs)`, unless an earlier life of this item has finished just this step.

        profile = await penstock.step("profile", api.get_json, "/api1", params=record)

    `fn` is an async function, or a plain one, which runs in a thread. With a journal, what it returns is recorded until
    the item is done, so that a run that is resumed, or an item that is tried again (`resume="failed"`), does not pay
    for it twice. It is given back as the journal's codec reads it, in the first life too: tuples as lists. Changed
    arguments make it run again. A job that calls the same step with the same arguments twice has two of them. In jobs
    that an item's job submits or maps over, it is that item's. Without a journal it is just called.

    **Cancellation** cancels `fn`; nothing is recorded then. **Threads**: loop thread only; in a thread that works for
    the job, `penstock.from_thread(penstock.step, ...)`.

    Raises:
        UsageError: outside a job; or the arguments are nothing that can be compared with those of another life; or
            the codec cannot write what `fn` returned.
        JournalError: what is recorded of it is damaged.
        Exception: what `fn` raised.
    """
    job = _job("step")
    name = _checked("step", name)
    check_function(fn, f"penstock.step({name!r}, ...)")
    item: RunningJob | None = job.root or job
    while item is not None and item.recorder is None:
        item = item.reader  # of a stream within a job: that job's item is recorded
    memo: Memo | None = None if item is None or item.recorder is None else item.recorder.memo_of(item)
    if memo is None:
        return await _call(job, fn, args, kwargs)
    arguments = memo.identify(name, _hash_of(name, args, kwargs))
    known = memo.find(name, arguments)
    if known is not None:
        return await memo.value_of(known)
    return memo.keep(name, arguments, await _call(job, fn, args, kwargs))


def idempotency_key(step: str = "") -> str:
    """Inside a job: a key that stays the same over retries, restarts and machines, for just this step of this item.

        await api.post_json("/charge", json=order, headers={"Idempotency-Key": penstock.idempotency_key("charge")})

    32 hexadecimal digits: BLAKE2b of the job's name, the item's key and the step's name. A service that takes an
    `Idempotency-Key` does then once what it is asked twice: the one way to close the gap between an effect and its
    record (draft-ietf-httpapi-idempotency-key-header). Any thread that works for the job.

    Raises:
        UsageError: outside a job, or in one whose item has no key: give the run a `key=`.
    """
    job = _job("idempotency_key")
    item = job.root or job
    try:
        key = key_to_record(item.key)
    except ValueError as error:
        raise UsageError(
            f"penstock.idempotency_key() in {item!r}, whose key is {error}. Give the run a key= that returns text, a "
            f"number or bytes."
        ) from None
    told = [item.name, type(key).__name__, key.hex() if isinstance(key, bytes | float) else key]
    told.append(_checked("idempotency_key", step))
    return hashlib.blake2b(json.dumps(told).encode(), digest_size=HASH_BYTES).hexdigest()


def _job(wanted: str) -> RunningJob:
    job = current_job()
    if job is None:
        raise UsageError(
            f"penstock.{wanted}() was called outside a job. Call it in the function that a run is given, such as "
            f"`penstock.run(score, items, key=..., journal=...)`."
        )
    return job


def _checked(call: str, name: object) -> str:
    """The name of a step, as plain text."""
    try:
        if isinstance(name, str):
            name.encode()
            return str.__str__(name)
        found = repr(name)
    except UnicodeEncodeError:
        found = f"{name!r}, which is no Unicode"
    raise UsageError(f"penstock.{call}({found:.200}, ...): expected the name of a step, such as 'score'.")


async def _call(job: RunningJob, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return await (fn(*args, **kwargs) if is_async(fn) else job.host.to_thread(fn, *args, **kwargs))


def _hash_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    try:
        told = _encode([args, kwargs])
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"penstock.step({name!r}, ...) cannot tell whether its arguments have changed: {error}. Give it what can "
            f"be JSON, and bind everything else: `functools.partial(fn, client)`."
        ) from error
    return hashlib.blake2b(told.encode(), digest_size=HASH_BYTES).digest()


_SHOWN_AS_THEY_ARE = frozenset({"datetime", "decimal", "fractions", "pathlib", "uuid"})
"""Modules whose values have a repr that is the same in each process."""


def _as_json(value: Any) -> Any:
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, bytes | bytearray | memoryview):
        return {kind: bytes(value).hex()}
    if type(value).__module__.partition(".")[0] in _SHOWN_AS_THEY_ARE or isinstance(value, enum.Enum | complex):
        return {kind: repr(value)}
    if isinstance(value, set | frozenset):
        return {kind: sorted(json.dumps(each, sort_keys=True, default=_as_json) for each in value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {kind: {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}}
    raise TypeError(f"found a {type(value).__name__} among them")


_encode = fast_encoder(_as_json, sort_keys=True)
