"""The switch interval is shortened for as long as anybody needs it, and then is what it was, or what others made it."""

import math
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.threads.switch_interval import SHORT, short_switch_interval

BOUND = 10.0
"""Seconds after which a thread of a failed test lets go."""


@pytest.fixture(autouse=True)
def _put_back() -> Iterator[None]:
    before = sys.getswitchinterval()
    yield
    sys.setswitchinterval(before)


def test_the_interval_is_short_in_the_block_and_what_it_was_after_it() -> None:
    before = sys.getswitchinterval()
    with short_switch_interval():
        assert sys.getswitchinterval() == pytest.approx(SHORT)
    assert sys.getswitchinterval() == before


def test_none_changes_nothing() -> None:
    before = sys.getswitchinterval()
    with short_switch_interval(None):
        assert sys.getswitchinterval() == before
        sys.setswitchinterval(0.002)
    assert sys.getswitchinterval() == pytest.approx(0.002)


def test_an_error_in_the_block_puts_it_back_too() -> None:
    before = sys.getswitchinterval()
    with pytest.raises(RuntimeError, match="in the block"), short_switch_interval(0.001):
        raise RuntimeError("in the block")
    assert sys.getswitchinterval() == before


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_of_several_users_the_first_sets_it_and_the_last_puts_it_back(order: tuple[int, ...]) -> None:
    """In whichever order they leave."""
    before = sys.getswitchinterval()
    users = [short_switch_interval(seconds) for seconds in (0.001, 0.0005, 0.002)]
    for user in users:
        user.__enter__()
        assert sys.getswitchinterval() == pytest.approx(0.001)
    for place in order:
        assert sys.getswitchinterval() == pytest.approx(0.001)
        users[place].__exit__(None, None, None)
    assert sys.getswitchinterval() == before


def test_users_are_counted_over_threads() -> None:
    """All are inside at once, again and again; whoever comes last finds it short, whoever leaves last puts it back."""
    before = sys.getswitchinterval()
    users = 8
    meet = threading.Barrier(users, timeout=BOUND)

    def use() -> list[float]:
        found = []
        for _ in range(20):
            with short_switch_interval(0.001):
                meet.wait()
                found.append(sys.getswitchinterval())
                meet.wait()
            meet.wait()
            found.append(sys.getswitchinterval())
            meet.wait()
        return found

    with ThreadPoolExecutor(users) as threads:
        for found in [threads.submit(use) for _ in range(users)]:
            assert found.result(BOUND) == pytest.approx([0.001, before] * 20)
    assert sys.getswitchinterval() == before


@pytest.mark.parametrize("theirs", [0.0001, 0.02])
def test_what_somebody_else_set_meanwhile_stays(theirs: float) -> None:
    with short_switch_interval(0.001):
        sys.setswitchinterval(theirs)
        with short_switch_interval(0.0005):
            assert sys.getswitchinterval() == pytest.approx(theirs)
    assert sys.getswitchinterval() == pytest.approx(theirs)


def test_an_interval_that_is_shorter_already_stays() -> None:
    sys.setswitchinterval(0.0002)
    before = sys.getswitchinterval()
    with short_switch_interval(0.001):
        assert sys.getswitchinterval() == before
    assert sys.getswitchinterval() == before


@given(st.integers(min_value=1, max_value=1_000_000))
def test_any_interval_comes_back_to_the_microsecond(microseconds: int) -> None:
    """Putting back what the interpreter answered loses one for many values, 15 us being the first."""
    sys.setswitchinterval((microseconds + 0.5) * 1e-6)
    before = sys.getswitchinterval()
    with short_switch_interval(2e-6):
        pass
    assert sys.getswitchinterval() == before


@pytest.mark.parametrize("seconds", [0, -0.001, math.nan])
def test_what_is_not_positive_is_refused_and_not_counted(seconds: float) -> None:
    before = sys.getswitchinterval()
    with ExitStack() as outer:
        outer.enter_context(short_switch_interval(0.001))
        with pytest.raises(ValueError, match="more than 0"), short_switch_interval(seconds):
            raise AssertionError("entered")
    assert sys.getswitchinterval() == before
