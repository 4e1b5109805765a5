"""The records that the examples push through the service, and what it must answer for each.

Everything here is a pure function of the record, so a client can verify that an answer belongs to the record it asked
about: `key_of(record)` is the key that `POST /api2` returns for it, and for no other.
"""

from __future__ import annotations

import random
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Record = dict[str, str | int]

NAMES = ("Ada", "Blaise", "Chen", "Dorothy", "Emmy", "Fela", "Grace", "Hedy", "Ibn", "Jagadish", "Katherine", "Lise")
CITIES = ("Accra", "Bergen", "Córdoba", "Delft", "Essen", "Fès", "Graz", "Hanoi", "Izmir", "Jena", "Kyoto", "Łódź")
SEGMENTS = ("new", "regular", "frequent", "lapsed")
VOCABULARY = (
    "basin",
    "canal",
    "delta",
    "eddy",
    "flume",
    "gate",
    "head",
    "inlet",
    "jet",
    "keel",
    "lock",
    "mill",
    "weir",
)
WORDS_PER_ANSWER = 40


def make_records(jobs: int, seed: int = 0) -> Iterator[Record]:
    """Yield records numbered from 1; the same seed gives the same records."""
    chance = random.Random(seed)
    for number in range(1, jobs + 1):
        yield {"id": number, "name": chance.choice(NAMES), "city": chance.choice(CITIES)}


def key_of(record: Mapping[str, Any]) -> str:
    return f"{record['id']}-{_fingerprint(record)[:6].hex()}"


def profile_of(record: Mapping[str, Any]) -> dict[str, str | int]:
    digest = _fingerprint(record)
    return {"segment": SEGMENTS[digest[6] % len(SEGMENTS)], "visits": digest[7], "since": 1990 + digest[8] % 30}


def scored(record: Mapping[str, Any]) -> dict[str, Any]:
    digest = _fingerprint(record)
    choice = digest[16 : 16 + WORDS_PER_ANSWER]
    return {
        "key": key_of(record),
        "score": int.from_bytes(digest[9:13], "big") / 2**32,
        "words": [VOCABULARY[byte % len(VOCABULARY)] for byte in choice],
    }


def _fingerprint(record: Mapping[str, Any]) -> bytes:
    # Values travel as text in a query and may come back as numbers in JSON: both spellings are the same record. The
    # profile is derived from the rest, so it has no say in it.
    text = "\x1f".join(f"{name}={record[name]}" for name in sorted(record) if name != "profile")
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16 + WORDS_PER_ANSWER).digest()
