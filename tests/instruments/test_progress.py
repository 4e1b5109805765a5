"""The progress line: what it says, where, and how often."""

import io
import sys

import pytest

from penstock import Executor, FailureKind, JobEnded, Outcome, ProgressLine, clock
from penstock.instruments.progress import IN_A_FILE, ON_A_TERMINAL

GOOD = JobEnded(Outcome(None, None, 1, None, None, 0, 0.0, 0.0))
BAD = JobEnded(Outcome(None, None, None, ValueError(), FailureKind.PERMANENT, 0, 0.0, 0.0))
OLD = JobEnded(GOOD.outcome._replace(replayed=True))
OLD_AND_BAD = JobEnded(BAD.outcome._replace(replayed=True))

RENEWED = "\r\x1b[K"
"""Back to the start of the line, and clear it."""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Hand:
    """A clock that somebody turns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(clock, "steady", lambda: self.now)


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> Hand:
    return Hand(monkeypatch)


def test_a_terminal_gets_one_line_that_renews_itself(hand: Hand) -> None:
    stream = Terminal()
    line = ProgressLine(total=4, stream=stream)
    hand.now += 1
    line.notify(GOOD)
    hand.now += 1
    line.notify(BAD)
    line.close()
    assert stream.getvalue() == (
        f"{RENEWED}1 of 4 jobs, 0 failed, 1.0/s, 3 s to go"
        f"{RENEWED}2 of 4 jobs, 1 failed, 1.0/s, 2 s to go"
        f"{RENEWED}2 of 4 jobs, 1 failed, 1.0/s\n"
    )


def test_a_file_gets_whole_lines(hand: Hand) -> None:
    """And no control characters."""
    stream = io.StringIO()
    line = ProgressLine(total=2, stream=stream)
    hand.now += IN_A_FILE
    line.notify(GOOD)
    hand.now += IN_A_FILE
    line.notify(GOOD)
    line.close()
    assert stream.getvalue().splitlines() == [
        "1 of 2 jobs, 0 failed, 0.1/s, 10 s to go",
        "2 of 2 jobs, 0 failed, 0.1/s",
        "2 of 2 jobs, 0 failed, 0.1/s",
    ]


@pytest.mark.parametrize(("stream", "pause"), [(Terminal(), ON_A_TERMINAL), (io.StringIO(), IN_A_FILE)])
def test_it_writes_no_oftener_than_one_can_read(hand: Hand, stream: io.StringIO, pause: float) -> None:
    """However many jobs end: five times a second on a terminal, six times a minute in a file."""
    line = ProgressLine(stream=stream)
    for _ in range(1000):
        hand.now += 10 * pause / 1000
        line.notify(GOOD)
    assert 9 <= stream.getvalue().count("jobs") <= 10


def test_without_a_total_it_counts_and_promises_nothing(hand: Hand) -> None:
    stream = io.StringIO()
    line = ProgressLine(stream=stream)
    hand.now += 10
    for _ in range(12_345):
        line.notify(GOOD)
    hand.now += 10
    line.close()
    assert stream.getvalue().splitlines()[-1] == "12,345 jobs, 0 failed, 617/s"


def test_a_total_that_was_too_small_promises_nothing_either(hand: Hand) -> None:
    stream = io.StringIO()
    line = ProgressLine(total=1, stream=stream)
    line.notify(GOOD)
    line.notify(GOOD)
    hand.now += 1
    line.close()
    assert stream.getvalue() == "2 of 1 jobs, 0 failed, 2.0/s\n"


def test_what_an_earlier_run_has_ended_counts_and_says_nothing_about_the_speed(hand: Hand) -> None:
    """Thousands are replayed in a second: what is left is promised by the jobs that run."""
    stream = io.StringIO()
    line = ProgressLine(total=2_048, stream=stream)
    for number in range(1_024):
        hand.now += 1 / 1_024
        line.notify(OLD if number % 2 else OLD_AND_BAD)
    hand.now += 8
    for _ in range(9):
        line.notify(GOOD)
    hand.now += 1
    line.notify(GOOD)
    line.close()
    assert stream.getvalue().splitlines() == [
        "1,034 of 2,048 jobs, 512 failed, 1.0/s, 1,014 s to go",
        "1,034 of 2,048 jobs, 512 failed, 1.0/s",
    ]


def test_a_run_in_which_nothing_happened_still_ends_its_line(hand: Hand) -> None:
    stream = Terminal()
    ProgressLine(total=3, stream=stream).close()
    assert stream.getvalue() == f"{RENEWED}0 of 3 jobs, 0 failed, 0.0/s\n"


def test_without_a_stream_it_writes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    """To the one of the moment in which it is made."""
    ProgressLine().close()
    assert capsys.readouterr().err == "0 jobs, 0 failed, 0.0/s\n"


def test_a_terminal_that_is_gone_does_not_cost_the_report() -> None:
    """`close` runs at the end of a run, whose report is worth more than this line."""
    closed = io.StringIO()
    line = ProgressLine(stream=closed)
    closed.close()
    line.close()

    class Hungup(Terminal):
        def write(self, _text: str) -> int:
            raise BrokenPipeError

    ProgressLine(stream=Hungup()).close()


@pytest.mark.virtual_clock
async def test_as_an_instrument_it_counts_every_outcome() -> None:
    async def score(item: int) -> int:
        return 1 // item

    stream = io.StringIO()
    line = ProgressLine(total=3, stream=stream)
    async with Executor(instruments=[line]) as executor, executor.as_completed(score, [0, 1, 2]) as outcomes:
        assert len([outcome async for outcome in outcomes]) == 3
    line.close()
    assert stream.getvalue().startswith("3 of 3 jobs, 1 failed, ")


def test_the_default_stream_is_looked_up_late(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    ProgressLine().close()
    assert terminal.getvalue().startswith(RENEWED)
