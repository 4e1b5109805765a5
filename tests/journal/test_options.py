"""What a user says of a journal: refused where it cannot work, and keys and values as they are written."""

import enum
import json
import math
import os
import pickle
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from penstock.errors import JournalError, UsageError
from penstock.journal import options
from penstock.journal.options import JSON, Codec, Journal, as_journal, key_to_record
from penstock.journal.schema import TABLES, Key
from penstock.journal.store import Store


class Text(str):
    """A derived class that shows itself as something else, as many do."""

    def __str__(self) -> str:
        return "another"

    def __repr__(self) -> str:
        return "Text()"


class Whole(int):
    def __int__(self) -> int:
        return -1

    def __repr__(self) -> str:
        return "Whole()"


class Real(float):
    def __float__(self) -> float:
        return -1.0

    def __repr__(self) -> str:
        return "Real()"


class Octets(bytes):
    def __bytes__(self) -> bytes:
        return b"another"

    def __repr__(self) -> str:
        return "Octets()"


class Colour(enum.StrEnum):
    RED = "red"


class Number(enum.IntEnum):
    ONE = 1


class Opaque:
    """As a path: of bytes."""

    def __fspath__(self) -> bytes:
        return b"run.db"


class Index:
    """A whole number of another library."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __index__(self) -> int:
        return self._number

    def __repr__(self) -> str:
        return f"Index({self._number})"


class Array:
    """Might be a whole number, but is none."""

    def __index__(self) -> int:
        raise TypeError("only integer scalar arrays can be converted to a scalar index")

    def __repr__(self) -> str:
        return "Array"


# --- the options ---


def test_a_path_is_a_journal_with_the_options_left_alone() -> None:
    for path in ("run.db", Path("run.db")):
        journal = as_journal(path)
        assert journal == Journal(path)
        assert journal.file == os.path.join(os.getcwd(), "run.db")
        assert journal.values is JSON


def test_a_journal_stays_what_it_is() -> None:
    journal = Journal("run.db", codec=pickle, resume="failed")
    assert as_journal(journal) is journal
    assert journal.values is pickle


@pytest.mark.parametrize("path", [None, 7, b"run.db", Opaque()])
def test_what_is_no_path_is_refused(path: Any) -> None:
    with pytest.raises(UsageError, match=r'expected a path, such as "run\.db", or a penstock\.Journal'):
        as_journal(path)


@pytest.mark.parametrize("path", ["", "folder/"])
def test_the_path_of_a_folder_is_refused(path: str) -> None:
    with pytest.raises(UsageError, match="expected the path of a file"):
        Journal(path)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"on_mismatch": "new "}, "on_mismatch='new ': expected 'error', 'new' or 'ignore'"),
        ({"duplicates": None}, "duplicates=None: expected 'error', 'skip' or 'suffix'"),
        ({"durability": "disk"}, "durability='disk': expected 'process' or 'machine'"),
        ({"on_unknown": []}, "on_unknown=[]: expected 'dead' or 'rerun'"),
        ({"replay": 1}, "replay=1: expected True or False"),
        ({"intents": "yes"}, "intents='yes': expected True or False"),
        ({"codec": json.dumps}, "expected something with dumps(value) and loads(data)"),
        ({"version": True}, "version=True: expected text or a whole number"),
        ({"version": 1.5}, "version=1.5: expected text or a whole number"),
    ],
)
def test_a_word_that_is_none_is_refused_with_those_that_are(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        Journal("run.db", **options)
    assert expected in str(caught.value)


@pytest.mark.parametrize("resume", ["missing", "failed", "all", "failed:HTTP 422", "failed: transient ", "failed:a:b"])
def test_what_is_run_again_can_be_said_in_these_ways(resume: str) -> None:
    assert Journal("run.db", resume=resume).resume == resume


@pytest.mark.parametrize(
    "resume", ["", "dead", "failed:", "failed:  ", "all:transient", "missing:", "Failed", None, 422]
)
def test_what_is_run_again_can_be_said_in_no_other_way(resume: Any) -> None:
    with pytest.raises(UsageError, match='expected "missing", "failed", "failed:HTTP 422"'):
        Journal("run.db", resume=resume)


def test_a_journal_by_a_link_is_the_file_that_it_leads_to(tmp_path: Path) -> None:
    """Its neighbours stand beside that one."""
    (tmp_path / "link.db").symlink_to(tmp_path / "run.db")
    assert Journal(tmp_path / "link.db").file == str(tmp_path.resolve() / "run.db")


@pytest.mark.parametrize("path", ["run\0.db", ":memory:"])
def test_the_name_of_no_file_is_refused(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the latest when it is looked for, as any other that cannot be used."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UsageError, JournalError)):
        Store(Journal(path), "{}").open()


def test_what_was_in_flight_cannot_be_told_of_items_that_stay_done() -> None:
    with pytest.raises(UsageError, match="Leave one of the two out"):
        Journal("run.db", intents=True, resume="all")


# --- the fingerprint ---


def test_two_jobs_have_the_same_fingerprint_only_if_nothing_tells_them_apart() -> None:
    fingerprints = [
        Journal("run.db").fingerprint("score"),
        Journal("run.db").fingerprint("rate"),
        Journal("run.db", version="2").fingerprint("score"),
        Journal("run.db", params={"model": "large"}).fingerprint("score"),
        Journal("run.db", codec=pickle).fingerprint("score"),
    ]
    assert len(set(fingerprints)) == len(fingerprints)


def test_what_is_the_same_in_other_words_has_the_same_fingerprint() -> None:
    """The order of the parameters, a version as a number, JSON by its name; and how the file is used."""
    plain = Journal("run.db", version="2", params={"a": 1, "b": [2]}).fingerprint("score")
    other = Journal("other.db", version=2, params={"b": (2,), "a": 1}, codec=json, resume="all", durability="machine")
    assert other.fingerprint("score") == plain
    assert json.loads(plain) == {"job": "score", "version": "2", "params": {"a": 1, "b": [2]}, "codec": "json"}


def test_a_codec_without_a_name_is_told_by_its_class() -> None:
    class Mine:
        dumps = staticmethod(pickle.dumps)
        loads = staticmethod(pickle.loads)

    assert json.loads(Journal("run.db", codec=Mine()).fingerprint("score"))["codec"].endswith("Mine")


def nested(depth: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


@pytest.mark.parametrize(
    "params",
    [{"x": {1}}, {"x": math.nan}, {1: 1, "b": 1}, {"x": 10**5000}, {"x": nested(100_000)}, 5, "model", ["model"]],
    ids=["a set", "no number", "names of two types", "a huge number", "too deep", "a number", "text", "a list"],
)
def test_params_that_cannot_be_json_are_refused_at_once(params: Any) -> None:
    """And not when the run has begun."""
    with pytest.raises(UsageError, match="params="):
        Journal("run.db", params=params)


def test_a_version_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(UsageError):
        Journal("run.db", version=10**5000)


# --- JSON ---

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=20)
    | st.builds(Text, st.text(max_size=5))
    | st.builds(Whole, st.integers())
    | st.builds(Real, st.floats())
    | st.sampled_from([Colour.RED, Number.ONE, 10**400, -(10**400), "\ud800", "\0", 2**63, -0.0])
)
NAMES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(Colour.RED)


class Table(dict[Any, Any]):
    pass


VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(NAMES, inner, max_size=4)
        | st.dictionaries(NAMES, inner, max_size=4).map(Table)
    ),
    max_leaves=20,
)


def plain_json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


@given(VALUES)
@example(value={Colour.RED: [math.inf, -math.inf, math.nan]})
@example(value=[[[]], {}, (), {"a": {}}])
def test_json_is_that_of_the_standard_library_without_spaces(value: Any) -> None:
    assert JSON.dumps(value) == plain_json(value)


@pytest.mark.parametrize(
    "value",
    [{1, 2}, b"bytes", object(), {(1, 2): 3}, [1, {"a": {1}}], 10**5000],
    ids=["a set", "bytes", "an object", "a tuple as a name", "a set within", "a huge number"],
)
def test_what_json_refuses_is_refused_in_its_words(value: Any) -> None:
    """And leaves nothing behind that the next value would meet."""
    with pytest.raises((TypeError, ValueError)) as expected:
        plain_json(value)
    with pytest.raises(type(expected.value)) as caught:
        JSON.dumps(value)
    assert str(caught.value) == str(expected.value)
    assert JSON.dumps([1, "a"]) == '[1,"a"]'


def test_what_contains_itself_ends_by_an_error() -> None:
    value: list[Any] = []
    value.append({"itself": value})
    for _ in range(2):
        with pytest.raises((RecursionError, ValueError)):
            JSON.dumps(value)
    assert JSON.dumps({"a": [1]}) == '{"a":[1]}'


@given(VALUES)
def test_json_is_the_same_without_the_encoder_in_c(value: Any) -> None:
    """As on another interpreter than CPython."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("json.encoder.c_make_encoder", None)
        slow = options.fast_encoder()
        assert slow(value) == JSON.dumps(value)


@pytest.mark.parametrize("codec", [JSON, json, pickle, orjson])
def test_a_module_that_writes_and_reads_values_is_a_codec(codec: Codec) -> None:
    assert Journal("run.db", codec=codec).values is codec
    assert codec.loads(codec.dumps({"a": [1, "b", None]})) == {"a": [1, "b", None]}


# --- keys ---

UNICODE = st.text(max_size=20)
"""Hypothesis leaves lone surrogates out."""
WHOLE = st.integers(-(2**63), 2**63 - 1)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
KEYS: st.SearchStrategy[Key] = UNICODE | WHOLE | FINITE | st.binary(max_size=20)
DERIVED = (
    st.builds(Text, UNICODE)
    | st.builds(Whole, WHOLE)
    | st.builds(Real, FINITE)
    | st.builds(Octets, st.binary(max_size=20))
    | st.sampled_from([Colour.RED, Number.ONE])
)

BELOW: dict[type, Callable[[Any], Any]] = {
    str: str.__str__,
    int: int.__int__,
    float: float.__float__,
    bytes: lambda key: memoryview(key).tobytes(),
}


ALIKE: list[Key] = ["1", 1, 1.0, b"1", "", b"", 0, 0.0, -0.0, 2**53, 2.0**53, 2**53 + 1]


@pytest.fixture(scope="module")
def table() -> Iterator[sqlite3.Connection]:
    """The table of items, to be asked what it makes of keys."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        for statement in TABLES:
            connection.execute(statement)
        yield connection


@given(KEYS | DERIVED)
@example(key="")
@example(key=b"")
@example(key="\0a\0")
@example(key=b"\0")
@example(key=-0.0)
@example(key=5e-324)
@example(key=2**63 - 1)
@example(key=-(2**63))
@example(key=2.0**63)
@example(key=Octets(b"mine"))
@example(key=Text("mine"))
def test_a_key_comes_back_from_a_file_as_it_went_in(table: sqlite3.Connection, key: Key) -> None:
    """As what it is below its class; but for the sign of zero, of which equality knows nothing."""
    table.execute("DELETE FROM item")
    recorded = key_to_record(key)
    base = next(base for base in BELOW if isinstance(key, base))
    assert type(recorded) is base
    assert recorded == BELOW[base](key)
    table.execute("INSERT INTO item(key) VALUES (?)", (recorded,))
    [(found,)] = table.execute("SELECT key FROM item WHERE key = ?", (recorded,)).fetchall()
    assert type(found) is base
    assert found == recorded
    assert ascii(found) == ascii(recorded), "a checksum is made of it"


@given(st.lists(KEYS | st.sampled_from(ALIKE), max_size=8))
@example(keys=["1", 1, 1.0, b"1"])
@example(keys=[2**53, 2.0**53, 2**53 + 1, 2**63 - 1, 2.0**63, -(2**63), -(2.0**63)])
@example(keys=["é", "e\u0301", "E", "e", "e\0", "e "])
def test_sqlite_and_python_agree_which_keys_are_the_same(table: sqlite3.Connection, keys: list[Key]) -> None:
    """A number is the same as text or bytes in neither; 1 is 1.0 in both."""
    table.execute("DELETE FROM item")
    recorded = [key_to_record(key) for key in keys]
    for key in recorded:
        table.execute("INSERT INTO item(key) VALUES (?) ON CONFLICT(key) DO NOTHING", (key,))
    assert {key for (key,) in table.execute("SELECT key FROM item")} == set(recorded)
    assert table.execute("SELECT count(*) FROM item").fetchone() == (len(set(recorded)),)


def test_a_whole_number_of_another_library_is_a_key() -> None:
    found = key_to_record(Index(-7))
    assert found == -7
    assert type(found) is int


@pytest.mark.parametrize(
    ("key", "why"),
    [
        (None, "of type NoneType"),
        (True, "of type bool"),
        ((1, 2), "of type tuple"),
        (bytearray(b"x"), "of type bytearray"),
        (1j, "of type complex"),
        ("a\ud800", "lone surrogates"),
        (Text("\udfff"), "lone surrogates"),
        (2**63, "more than 64 bits"),
        (-(2**63) - 1, "more than 64 bits"),
        (Whole(2**63), "more than 64 bits"),
        (Index(2**63), "more than 64 bits"),
        (Array(), "of type Array"),
        (math.nan, "no finite number"),
        (math.inf, "no finite number"),
        (Real("-inf"), "no finite number"),
    ],
    ids=repr,
)
def test_a_key_that_cannot_be_recorded_says_what_it_is(key: object, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        key_to_record(key)
