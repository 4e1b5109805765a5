"""What a user says of a journal: `journal="run.db"`, or a `Journal` with options. A plain value; decides only."""

import json
import math
import operator
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, Protocol, SupportsIndex, cast, get_args

from penstock.errors import UsageError, first_line
from penstock.journal.schema import Key

Resume = Literal["missing", "failed", "all"]
OnMismatch = Literal["error", "new", "ignore"]
Duplicates = Literal["error", "skip", "suffix"]
Durability = Literal["process", "machine"]
OnUnknown = Literal["dead", "rerun"]


class Codec(Protocol):
    """How values are written: the modules json, pickle and orjson are codecs, and so is anything like them."""

    def dumps(self, obj: Any, /) -> str | bytes:
        """The value as text or bytes. Called on the loop thread."""
        ...

    def loads(self, data: Any, /) -> Any:
        """The value again, from exactly that. Called on the loop thread."""
        ...


def fast_encoder(default: Callable[[Any], Any] | None = None, *, sort_keys: bool = False) -> Callable[[Any], str]:
    """JSON without spaces. `JSONEncoder.encode` makes an encoder for each value: more work than a small one is."""
    slow = json.JSONEncoder(separators=(",", ":"), default=default, sort_keys=sort_keys)
    make, text = getattr(json.encoder, "c_make_encoder", None), getattr(json.encoder, "c_encode_basestring_ascii", None)
    if make is None or text is None:  # another interpreter than CPython
        return slow.encode
    # Without the record of what it is within: what contains itself ends by a RecursionError.
    encode = make(None, slow.default, text, None, ":", ",", sort_keys, False, True)
    return lambda value: "".join(encode(value, 0))


class _Json:
    """JSON, in ASCII."""

    dumps = staticmethod(fast_encoder())
    loads = staticmethod(json.loads)


JSON: Codec = _Json()


@dataclass(frozen=True, slots=True)
class Journal:
    """A file that remembers how each item ended, so that a run can be resumed.

        penstock.run(score, records, key=itemgetter("id"), journal=Journal("run.db", version="2", resume="failed"))

    A path is as good where the options are left alone: `journal="run.db"`. The file is made if there is none; its
    folder is not. One run at a time writes it. It has to lie on a local disk.

    Args:
        path: the file, an SQLite database. Its neighbours `-wal`, `-shm`, `-lock` and `-results` belong to it.
        version: of the job, in your words: change it when what the job returns is no longer comparable.
        params: what the job was given besides its items, and what tells two runs apart: anything that can be JSON.
        on_mismatch: when the journal was begun by a job of another name, version or params: "error"; "new" renames it
            (`run.db` to `run-1.db`) and begins a new one; "ignore" goes on with it, and counts as the new job's.
        resume: which items of those that have a state are run again: none ("missing": only items that have none are
            run); those that failed ("failed"); those of them whose kind, HTTP status or error says so
            ("failed:HTTP 422", "failed:transient", "failed:ValueError"); or all of them ("all"). An item that was done
            keeps its result if it is run again and fails.
        replay: whether streams deliver what an earlier run recorded, with `replayed=True`. Counted in any case.
        duplicates: when a key comes a second time in one run: "error" stops the run; "skip" leaves the item out;
            "suffix" records it under the key with "#2" behind it, "#3" for the next one.
        durability: what a recorded outcome survives: "process", the death of the process, by `kill -9` too; or
            "machine", also a power cut, for which each commit waits for the disk. (After a power cut the first kind
            may lack the last commits; it is never torn.)
        intents: whether the start of each job is committed before it begins. What was in flight when the process died
            is then known, as *outcome unknown*. A job waits for that commit, some milliseconds.
        on_unknown: what becomes of an item whose outcome is unknown: "dead" fails it, until somebody has looked;
            "rerun" runs it, and `current_job().outcome_unknown` tells the job.
        codec: how results and inputs are written; None is JSON. Tuples come back as lists then, keys as text.

    Raises:
        UsageError: a value that cannot work.
    """

    path: str | os.PathLike[str]
    _: KW_ONLY
    version: str | int = ""
    params: Mapping[str, Any] | None = None
    on_mismatch: OnMismatch = "error"
    resume: str = "missing"
    replay: bool = True
    duplicates: Duplicates = "error"
    durability: Durability = "process"
    intents: bool = False
    on_unknown: OnUnknown = "dead"
    codec: Codec | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | os.PathLike) or not isinstance(os.fspath(self.path), str):
            raise UsageError(f'journal={self.path!r:.100}: expected a path, such as "run.db", or a penstock.Journal.')
        if not os.path.basename(self.path) or self.path == ":memory:" or "\0" in os.fspath(self.path):
            raise UsageError(f'journal={self.path!r}: expected the path of a file, such as "run.db".')
        _check_word("on_mismatch", self.on_mismatch, get_args(OnMismatch))
        _check_word("duplicates", self.duplicates, get_args(Duplicates))
        _check_word("durability", self.durability, get_args(Durability))
        _check_word("on_unknown", self.on_unknown, get_args(OnUnknown))
        which = self.resume.partition(":") if isinstance(self.resume, str) else ("", "", "")
        if which[0] not in get_args(Resume) or (which[1] and (which[0] != "failed" or not which[2].strip())):
            raise UsageError(
                f'resume={self.resume!r}: expected "missing", "failed", "failed:HTTP 422" (a kind, an HTTP status or a '
                f'part of the error) or "all".'
            )
        for name in ("replay", "intents"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name}={getattr(self, name)!r}: expected True or False.")
        if self.intents and self.resume == "all":
            raise UsageError(
                'Journal(intents=True, resume="all"): an item that is done stays so in the journal while it is run '
                "again, so nobody could say which of them were in flight. Leave one of the two out."
            )
        if self.codec is not None and not (hasattr(self.codec, "dumps") and hasattr(self.codec, "loads")):
            raise UsageError(
                f"codec={self.codec!r:.100}: expected something with dumps(value) and loads(data), such as the "
                f"module pickle."
            )
        if isinstance(self.version, bool) or not isinstance(self.version, str | int):
            raise UsageError(f"version={self.version!r:.100}: expected text or a whole number.")
        self.fingerprint("")  # params that cannot be JSON

    @property
    def file(self) -> str:
        """The path as text, from the root, with links followed: its neighbours stand beside the file itself."""
        return os.path.realpath(os.fspath(self.path))

    @property
    def values(self) -> Codec:
        """The codec."""
        return JSON if self.codec is None else self.codec

    def fingerprint(self, job: str) -> str:
        """What tells this job from others, as JSON that can be read and compared.

        Raises:
            UsageError: params that cannot be JSON.
        """
        codec = self.codec
        name = "json" if codec is None else getattr(codec, "__name__", None) or type(codec).__qualname__
        try:
            told = {"job": job, "version": str(self.version), "params": dict(self.params or {}), "codec": name}
            return json.dumps(told, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(
                f'params: expected names and values that can be JSON, as in params={{"model": "small"}}; found '
                f"otherwise: {first_line(error)}."
            ) from error


def as_journal(journal: "str | os.PathLike[str] | Journal") -> Journal:
    """What was given as `journal=`, with its options.

    Raises:
        UsageError: neither a path nor a `Journal`.
    """
    return journal if isinstance(journal, Journal) else Journal(journal)


def key_to_record(key: object) -> Key:
    """`key` as it is recorded: of one of four plain types.

    Raises:
        ValueError: it cannot be recorded. The message says what it is.
    """
    kind = type(key)
    if kind is not str and kind is not int and kind is not bytes and kind is not float:
        key = _plain(key)
    if isinstance(key, str):
        try:
            key.encode()
        except UnicodeEncodeError:
            raise ValueError("text with lone surrogates, which is no Unicode") from None
    elif isinstance(key, int):
        if not -(1 << 63) <= key < 1 << 63:
            raise ValueError("a whole number of more than 64 bits")
    elif isinstance(key, float):
        if not math.isfinite(key):
            raise ValueError("no finite number")
        return key + 0.0  # SQLite keeps no sign of zero
    return cast("Key", key)


def _plain(key: object) -> Key:
    """What a key of a derived class, such as a `StrEnum`, is below."""
    if isinstance(key, str):
        return str.__str__(key)
    if isinstance(key, bytes):
        return bytes(memoryview(key))
    if isinstance(key, float):
        return float.__float__(key)
    if hasattr(type(key), "__index__") and not isinstance(key, bool):  # integers of other libraries, too
        with suppress(Exception):  # an array may be one, or not
            return operator.index(cast("SupportsIndex", key))
    raise ValueError(f"of type {type(key).__name__}")


def _check_word(name: str, value: object, words: tuple[str, ...]) -> None:
    if value not in words:
        raise UsageError(f"{name}={value!r:.100}: expected {', '.join(map(repr, words[:-1]))} or {words[-1]!r}.")
