"""A source that is slow without being async: the loop gets its turns, and the log says what to do."""

import asyncio
import logging
import time
from collections.abc import Iterator

import pytest

from penstock import Executor
from penstock.executor.sources import BLOCKS, LONGEST_TURN


def slowly(items: int, seconds: float) -> Iterator[int]:
    """A source that keeps the processor, as one that blocks keeps the loop: what is measured is that it does."""
    for number in range(items):
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            pass
        yield number


async def test_the_loop_gets_a_turn_while_a_slow_source_is_pulled() -> None:
    """The first job runs long before the slots are full."""
    pulled: list[int] = []

    def source() -> Iterator[int]:
        for number in slowly(50, 2 * LONGEST_TURN):
            pulled.append(number)
            yield number

    async def how_many_had_been_pulled(_item: int) -> int:
        return len(pulled)

    async with Executor(limit=50) as executor:
        outcomes = await executor.as_completed(how_many_had_been_pulled, source())
    assert min(outcome.unwrap() for outcome in outcomes) <= 2


async def test_a_source_that_blocks_the_loop_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    """A warning with the cure; not one for each item."""

    async def same(item: int) -> int:
        await asyncio.sleep(0)
        return item

    async with Executor() as executor:
        await executor.map(same, slowly(3, 1.2 * BLOCKS))
    warnings = [record for record in caplog.records if record.name == "penstock.sources"]
    assert len(warnings) == 1
    assert warnings[0].levelno == logging.WARNING
    assert "penstock.pull_in_thread(items)" in warnings[0].getMessage()
