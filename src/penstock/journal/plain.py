"""Values as JSON shows them, for those who read a journal without the program that wrote it.

    a value, as the codec read it -> as_json() -> text, numbers, lists and objects

| what                                    | becomes                                            |
|-----------------------------------------|----------------------------------------------------|
| date, time: what has an `isoformat()`   | text, ISO 8601                                     |
| span of time: has `total_seconds()`     | seconds                                            |
| Decimal, Fraction, UUID, path           | text                                               |
| enum                                    | its value                                          |
| dataclass, named tuple                  | an object, by field                                |
| mapping                                 | an object; keys that are no text are written as it |
| set                                     | a list, sorted where that is possible              |
| sequence; array: what has a `tolist()`  | a list                                             |
| bytes                                   | `{"base64": "..."}`                                |

This is for reading: what was a date and what was text is not told apart any more. What is none of these is refused as a
whole, rather than shown in part.

Threads: any.
"""

import dataclasses
import decimal
import enum
import fractions
import json
import pathlib
import uuid
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

_AS_TEXT = decimal.Decimal | fractions.Fraction | uuid.UUID | pathlib.PurePath
_BYTES = bytes | bytearray | memoryview
_METHODS = ("isoformat", "total_seconds", "tolist")
"""Of values of other libraries too, which say the same by these names."""


def as_json(value: Any) -> Any:
    """The value made of what `json.dumps` knows; NaN and infinities are left as they are.

    Raises:
        TypeError: there is something in it that has no such form, or two keys of a mapping would become one.
        RecursionError: it is nested too deeply, or holds itself.
        Exception: what its own methods raise.
    """
    if value is None or isinstance(value, str | int | float | enum.Enum):
        return as_json(value.value) if isinstance(value, enum.Enum) else value
    for kinds, shown in _FORMS:
        if isinstance(value, kinds):
            return shown(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    for name in _METHODS:
        if callable(getattr(type(value), name, None)):  # a class has them too, but not for itself
            return as_json(getattr(value, name)())
    raise TypeError(f"a {type(value).__name__} has no form in JSON")


def _object(value: Mapping[Any, Any]) -> dict[str, Any]:
    found = {_name(key): as_json(each) for key, each in value.items()}
    if len(found) < len(value):
        raise TypeError("two of its keys are the same as text")
    return found


def _name(key: Any) -> str:
    plain = as_json(key)
    if isinstance(plain, str):
        return plain
    if plain is None or isinstance(plain, int | float):
        return json.dumps(plain)
    raise TypeError(f"a {type(key).__name__} is no name of a field in JSON")


def _sequence(value: Sequence[Any]) -> Any:
    names = getattr(value, "_fields", None) if isinstance(value, tuple) else None
    if names is None:
        return [as_json(each) for each in value]
    return {name: as_json(each) for name, each in zip(names, value, strict=True)}


def _set(value: Set[Any]) -> list[Any]:
    try:
        return [as_json(each) for each in sorted(value)]
    except TypeError:  # of several types, or of one that knows no order
        return sorted(map(as_json, value), key=json.dumps)


def _bytes(value: bytes | bytearray | memoryview) -> dict[str, str]:
    return {"base64": b64encode(value).decode()}


_FORMS: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
    (_AS_TEXT, str),
    (_BYTES, _bytes),
    (Mapping, _object),
    (Sequence, _sequence),
    (Set, _set),
)
