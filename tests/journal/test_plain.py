"""Values as JSON shows them: readable for whoever has no Python, or refused as a whole."""

import dataclasses
import enum
import json
from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, NamedTuple
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.journal.plain import as_json


class Colour(enum.Enum):
    RED = date(2026, 1, 1)


class Grade(enum.IntEnum):
    GOOD = 2


class Place(NamedTuple):
    name: str
    seen: date


@dataclasses.dataclass(frozen=True)
class Person:
    born: date
    tags: frozenset[str]


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(value=PLAIN)
def test_what_is_json_stays_as_it_is(value: Any) -> None:
    """Whatever it is made of."""
    assert as_json(value) == value
    json.dumps(as_json(value))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), "2026-01-02T03:04:05+00:00"),
        (date(2026, 1, 2), "2026-01-02"),
        (time(3, 4), "03:04:00"),
        (timedelta(minutes=1.5), 90.0),
        (Decimal("1.10"), "1.10"),
        (Fraction(1, 3), "1/3"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (PurePosixPath("/a/b"), "/a/b"),
        (Colour.RED, "2026-01-01"),
        (Grade.GOOD, 2),
        (Person(date(2000, 1, 1), frozenset({"b", "a"})), {"born": "2000-01-01", "tags": ["a", "b"]}),
        (Place("x", date(2026, 1, 2)), {"name": "x", "seen": "2026-01-02"}),
        ((1, (2, b"\xff")), [1, [2, {"base64": "/w=="}]]),
        (bytearray(b"a"), {"base64": "YQ=="}),
        (memoryview(b"a"), {"base64": "YQ=="}),
        ({3, 1, 2}, [1, 2, 3]),
        ({"a", 1}, ["a", 1]),
        ({Colour.RED}, ["2026-01-01"]),
        (deque([1, Decimal(2)]), [1, "2"]),
        (array("d", [0.5]), [0.5]),
        (OrderedDict(a=deque([1])), {"a": [1]}),
        (MappingProxyType({"a": Path("b")}), {"a": "b"}),
        (Counter("aab"), {"a": 2, "b": 1}),
        ({1: "a", None: "b", False: "c", 0.5: "d"}, {"1": "a", "null": "b", "false": "c", "0.5": "d"}),
        ({date(2026, 1, 2): {UUID(int=1): 1}}, {"2026-01-02": {"00000000-0000-0000-0000-000000000001": 1}}),
    ],
)
def test_each_form_is_what_the_table_says(value: Any, shown: Any) -> None:
    """Wherever it stands, and JSON writes it."""
    assert as_json(value) == shown
    assert as_json([{"deep": (value,)}]) == [{"deep": [shown]}]
    assert json.loads(json.dumps(as_json(value))) == shown


@pytest.mark.parametrize(
    "value",
    [object(), Person, array, 1j, {(1, 2): 3}, {b"a": 1}, {1: "a", "1": "b"}, {date(2026, 1, 2): 1, "2026-01-02": 2}],
)
def test_what_has_no_form_is_refused_as_a_whole(value: Any) -> None:
    """Rather than shown without some of it: two keys that are one as text would be."""
    with pytest.raises(TypeError):
        as_json({"deep": [value]})


def test_values_of_other_libraries_say_it_by_the_same_names() -> None:
    """Arrays and dates of any of them; what raises on the way is no form."""

    class Array:
        def tolist(self) -> Any:
            return [1, date(2026, 1, 2)]

    class Broken:
        def isoformat(self) -> str:
            raise ArithmeticError

    assert as_json(Array()) == [1, "2026-01-02"]
    with pytest.raises(ArithmeticError):
        as_json(Broken())
    with pytest.raises(TypeError):
        as_json(Array)


def test_what_can_only_be_iterated_over_is_refused() -> None:
    """It may be a part of what there is, such as the names of a table's columns."""

    class Table:
        def __len__(self) -> int:
            return 1

        def __iter__(self) -> Iterator[str]:
            return iter(["a"])

        def __contains__(self, name: object) -> bool:
            return name == "a"

    with pytest.raises(TypeError, match="a Table has no form in JSON"):
        as_json(Table())


def test_what_holds_itself_is_refused() -> None:
    """And does not go on for ever."""
    value: list[Any] = []
    value.append(value)
    with pytest.raises(RecursionError):
        as_json(value)
