"""Ctrl-C and SIGTERM, with a journal: a run that is ended kindly repeats nothing that it has finished."""

from __future__ import annotations

import signal
from random import Random
from typing import TYPE_CHECKING

import pytest

from service import EmbeddedService, ServiceConfig

from .lives import Life, Lives, check_outcomes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

ITEMS = 600
LIMIT = 16
ROUNDS = 2

signals = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])


@pytest.fixture
def service() -> Iterator[EmbeddedService]:
    with EmbeddedService(ServiceConfig(latency=0.02, errors=0.02, drops=0.01, log=True)) as service:
        yield service


def ended_by(end: Callable[[Life], None], lives: Lives, service: EmbeddedService, *flags: str) -> None:
    """Start the program again and again, `end` it at a moment drawn by chance, and in the end let it finish."""
    chance = Random(4)
    for _ in range(ROUNDS):
        wanted = service.stats()["requests"]["/api1"] + chance.randint(1, ITEMS // (ROUNDS + 1))
        life = lives.begin(*flags)
        assert life.until(lambda: service.stats()["requests"]["/api1"] >= wanted)  # noqa: B023
        end(life)
        assert lives.end(life) == 130, life.said()
        assert len(life.recorded) < ITEMS
    assert lives.end(lives.begin(*flags)) == 0


def again(lives: Lives) -> list[int]:
    """How many items each life but the last has asked about and not recorded, so that the next one asks again."""
    asked = lives.asked()
    for earlier, later in zip(lives.all, asked[1:], strict=False):
        assert not earlier.recorded.keys() & later
    return [len(asked - life.recorded.keys()) for life, asked in zip(lives.all, asked, strict=True)][:-1]


@signals
def test_a_drain_repeats_nothing(tmp_path: Path, service: EmbeddedService, number: signal.Signals) -> None:
    """What is in flight is finished and recorded; the next run begins with what was never begun."""
    with Lives(tmp_path, service, f"--items={ITEMS}", f"--limit={LIMIT}", "--report") as lives:
        ended_by(lambda life: life.send(number), lives, service)
        assert again(lives) == [0] * ROUNDS
        assert all(life.account["stopped"] == "interrupted" for life in lives.all[:-1])
        last = lives.all[-1]
        assert (last.account["read"], last.account["left"], last.account["stopped"]) == (ITEMS, 0, None)
        assert last.account["replayed"] == len(lives.all[-2].recorded)
        assert last.recorded.keys() == set(range(1, ITEMS + 1))
    assert service.stats()["hung_up"] == 0


def twice(life: Life) -> None:
    life.send(signal.SIGTERM)
    life.process.send_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("end", "flags"),
    [(twice, []), (lambda life: life.send(signal.SIGINT), ["--drain-timeout=0"])],
    ids=["two signals", "no time to drain"],
)
def test_a_cancellation_repeats_what_it_has_cancelled(
    tmp_path: Path, service: EmbeddedService, end: Callable[[Life], None], flags: list[str]
) -> None:
    """And nothing else: what had ended before is recorded, also what waited for the next commit."""
    with Lives(tmp_path, service, f"--items={ITEMS}", f"--limit={LIMIT}", "--report") as lives:
        ended_by(end, lives, service, *flags)
        cancelled = again(lives)
        assert all(
            repeated <= min(LIMIT, life.account["left"]) for repeated, life in zip(cancelled, lives.all, strict=False)
        )
        assert lives.all[-1].recorded.keys() == set(range(1, ITEMS + 1))


def test_a_ctrl_c_in_a_program_that_does_not_handle_it_repeats_what_it_has_cancelled(
    tmp_path: Path, service: EmbeddedService
) -> None:
    """`asyncio.run` cancels the task that reads the outcomes: what had ended is recorded all the same."""
    with Lives(tmp_path, service, f"--items={ITEMS}", f"--limit={LIMIT}") as lives:
        ended_by(lambda life: life.process.send_signal(signal.SIGINT), lives, service)
        assert all(repeated <= LIMIT for repeated in again(lives))
        check_outcomes(lives, ITEMS)
