"""`kill -9` at random moments: what was recorded stays, what was delivered was recorded, and little runs again.

    for each life but the last:   start -> so many fresh outcomes, drawn by chance -> at once, or later -> kill -9
    the last one                  start -> ends by itself

The moments are seeded. How far the program is at that moment the machine decides, and so two runs of a test differ.

`pytest -m full -s tests/journal/test_kills.py` kills a hundred times, and prints what it found.
"""

# ruff: noqa: T201  # numbers, for -s

from __future__ import annotations

import re
import signal
import socket
import statistics
from collections import Counter
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from penstock.journal.recording import BATCH_ROWS, BATCH_TIME
from service import EmbeddedService, ServiceConfig

from .lives import Life, Lives, answers, check_outcomes, item_of, locked, rows, step_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from service import Call

LIMIT = 32
EARLY = 0.1
"""Share of the kills in the first moments of a life, while its journal is opened or what is recorded is replayed."""
MOST_EARLY = 0.15
"""Seconds. Arbitrary, because: opening takes some hundredths of one."""
PROMPT = 0.5
"""Share of the kills at once when an outcome comes: when it would be lost, if it came before its commit."""
MOST_LATE = 0.3
"""Seconds at most between an outcome and the other kills: longer than a commit interval."""

FAULTY = ServiceConfig(latency=0.01, errors=0.02, drops=0.01, malformed=0.01, log=True)


def moment(chance: Random, share: int) -> tuple[int, float]:
    """How many fresh outcomes to wait for, at most so many; and seconds from then to the kill."""
    kind = chance.random()
    if kind < EARLY:
        return 0, chance.uniform(0, MOST_EARLY)
    return chance.randint(1, share), 0.0 if kind < EARLY + PROMPT else chance.uniform(0, MOST_LATE)


def killed(lives: Lives, chance: Random, *, items: int, kills: int) -> int:
    """Start the program and kill it, so often or until it ends by itself before; then let it. Its exit status."""
    for _ in range(kills):
        life = lives.begin()
        wanted, late = moment(chance, items // (kills + 1))
        if not life.until(lambda: life.begun and len(life.fresh) >= wanted) or not life.runs_on(late):  # noqa: B023
            return lives.end(life)
        life.kill()
        assert lives.end(life) == -signal.SIGKILL, life.said()
    return lives.end(lives.begin())


class Repeated(NamedTuple):
    """What one kill has cost."""

    again: int
    """Items, or steps, that were begun and are not in the journal: they run again."""
    recent: int
    """Requests of the last two commit intervals: one that gathers, and one that is written."""
    oldest: float
    """Seconds from the first request of the oldest of them that was answered to the kill; 0.0 without one."""

    @classmethod
    def of(cls, life: Life, begun: set[Any], answered: Mapping[Any, float], calls: Sequence[Call]) -> Repeated:
        assert life.killed_at is not None, "only a kill makes anything run again"
        recent = sum(call.at >= life.killed_at - 2 * BATCH_TIME for call in calls)
        oldest = max((life.killed_at - answered[key] for key in begun if key in answered), default=0.0)
        return cls(len(begun), recent, oldest)


def check_repeats(lives: Lives) -> list[Repeated]:
    """Nobody is asked about an item that is recorded; and few are asked about again. What each kill has cost."""
    found = check_nothing_is_asked_twice(lives)
    check_bound(found)
    return found


def check_nothing_is_asked_twice(lives: Lives) -> list[Repeated]:
    """That is recorded. What each kill has cost."""
    found = []
    calls = lives.calls()
    before: dict[int, str] = {}
    for life in lives.all:
        mine = calls[life.name]
        asked = {item_of(call) for call in mine}
        assert not asked & before.keys()
        before = life.recorded
        if life.killed_at is not None:
            answered = {item_of(call): call.at for call in mine if call.ending == "answer"}
            found.append(Repeated.of(life, asked - before.keys(), answered, mine))
    return found


def check_bound(found: list[Repeated]) -> None:
    """What was in flight, what gathers for the next commit, and what is being committed: nothing else."""
    assert found, "no kill has found anything to kill"
    assert all(kill.again <= LIMIT + 2 * BATCH_ROWS for kill in found)
    # A busy disk or machine may delay any one commit: half of them are as they should be.
    assert statistics.median(kill.again - LIMIT - kill.recent for kill in found) <= 0


def check_lives(lives: Lives, items: int) -> list[Repeated]:
    check_outcomes(lives, items)
    found = check_repeats(lives)
    print("\n" + told(lives.all[-1], found))
    return found


def told(last: Life, found: list[Repeated]) -> str:
    states = ", ".join(f"{count} {state}" for state, count in Counter(last.recorded.values()).most_common())
    return (
        f"{len(last.recorded)} items: {states}; {len(found)} kills: {sum(kill.again for kill in found)} repeated, "
        f"{max(kill.again for kill in found)} at most, of up to {max(kill.oldest for kill in found):.2f} s before"
    )


@pytest.fixture
def service() -> Iterator[EmbeddedService]:
    with EmbeddedService(FAULTY) as service:
        yield service


@pytest.fixture(scope="module")
def numbers() -> Iterator[list[Repeated]]:
    """What all kills of the long form have cost."""
    found: list[Repeated] = []
    yield found
    if found:
        again = [kill.again for kill in found]
        print(f"\n{len(found)} kills: {sum(again)} repeated, {max(again)} at most for one")


# --- outcomes ---


def test_no_outcome_is_lost_or_duplicated_by_kills(tmp_path: Path, service: EmbeddedService) -> None:
    """Every item is recorded once; what was delivered before a kill was recorded, and never comes fresh again."""
    items = 2_500
    with Lives(tmp_path, service, f"--items={items}", f"--limit={LIMIT}") as lives:
        assert killed(lives, Random(10), items=items, kills=5) == 0
        found = check_lives(lives, items)
    assert len(found) >= 3, "most of the kills have found something to kill"


def test_nothing_is_delivered_before_its_commit(tmp_path: Path, service: EmbeddedService) -> None:
    """A kill that comes while a commit waits, for the lock of somebody else, takes nothing that was delivered."""
    items = 4_000
    with Lives(tmp_path, service, f"--items={items}", f"--limit={LIMIT}") as lives:
        life = lives.begin()
        assert life.until(lambda: life.fresh)
        with locked(lives.journal):
            wanted = service.stats()["requests"]["/api1"] + 2 * BATCH_ROWS
            assert life.until(lambda: service.stats()["requests"]["/api1"] >= wanted)
            life.kill()
            assert lives.end(life) == -signal.SIGKILL
        assert len(life.fresh) < items - BATCH_ROWS, "jobs have ended whose outcomes were held back"
        assert lives.end(lives.begin()) == 0
        check_outcomes(lives, items)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(20))
def test_a_hundred_kills(tmp_path: Path, service: EmbeddedService, numbers: list[Repeated], seed: int) -> None:
    """The same, a hundred times, for 200,000 items in all."""
    items = 10_000
    with Lives(tmp_path, service, f"--items={items}", f"--limit={LIMIT}") as lives:
        assert killed(lives, Random(seed), items=items, kills=5) == 0
        numbers += check_lives(lives, items)


# --- steps ---


def check_steps(lives: Lives) -> list[Repeated]:
    """A step that is recorded is not called again, nor one of an item that is. What each kill has cost."""
    found = []
    calls = lives.calls()
    for before, life in zip([None, *lives.all], lives.all, strict=False):
        mine = calls[life.name]
        answered = Counter((item_of(call), step_of(call)) for call in mine if call.ending == "answer")
        assert all(count == 1 for count in answered.values()), "no step is called again in the same life"
        if before is not None:
            assert not {(item_of(call), step_of(call)) for call in mine} & before.steps
            assert not {item_of(call) for call in mine} & before.recorded.keys()
        if life.killed_at is not None:
            lost = {(item, step_of(call)) for call in mine if (item := item_of(call)) not in life.recorded}
            found.append(Repeated.of(life, lost - life.steps, answers(mine), mine))
    check_bound(found)
    return found


def test_no_finished_step_is_called_again(tmp_path: Path, service: EmbeddedService) -> None:
    """But for those of the last commit interval: an item goes on where the journal knows of it."""
    items = 900
    with Lives(tmp_path, service, f"--items={items}", f"--limit={LIMIT}", "--work=three_steps") as lives:
        assert killed(lives, Random(10), items=items, kills=4) == 0
        check_outcomes(lives, items)
        found = check_steps(lives)
        last = lives.all[-1]
        assert any(life.steps for life in lives.all[:-1]), "some kill has met an item in the middle of its steps"
        assert {key for key, _ in last.steps} <= {key for key, state in last.recorded.items() if state == "dead"}
    print("\n" + told(last, found))


# --- one at a time ---


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path, service: EmbeddedService) -> None:
    """The message names host and pid of the first, which goes on undisturbed. Killed, it stands in nobody's way."""
    items = 2_000
    with Lives(tmp_path, service, f"--items={items}", f"--limit={LIMIT}") as lives:
        first = lives.begin()
        assert first.until(lambda: first.fresh)
        first.process.send_signal(signal.SIGSTOP)  # it must not come to its end meanwhile
        second = lives.begin()
        assert lives.end(second) == 1
        assert str(lives.journal) in second.said()
        assert re.search(rf"\b{first.process.pid}\b", second.said())
        assert socket.gethostname() in second.said()
        assert (second.fresh, second.replayed, lives.calls()[second.name]) == ({}, {}, [])

        told = len(first.fresh)
        first.process.send_signal(signal.SIGCONT)
        assert first.until(lambda: len(first.fresh) > told), "it goes on"
        first.kill()
        assert lives.end(first) == -signal.SIGKILL
        assert rows(lives.journal, "SELECT pid FROM run WHERE ended IS NULL") == [(first.process.pid,)]

        assert lives.end(lives.begin()) == 0
        lives.all.remove(second)
        second.close()
        check_outcomes(lives, items)
        # Who was stopped for so long has answers that are older than any commit takes.
        (kill,) = check_nothing_is_asked_twice(lives)
        assert kill.again <= LIMIT + 2 * BATCH_ROWS
