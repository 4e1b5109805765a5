"""The example that kills its own run proves what it says, and would say so if it were otherwise."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import kill_and_resume
from kill_and_resume import DONE, FAILED, Killed, Recorded, Unproven, prove
from service import Call

if TYPE_CHECKING:
    from service import Ending

EXAMPLES = Path(__file__).parents[2] / "examples"
BOUND = 60.0

KEYS = {1: "one", 2: "two", 3: "three"}
ALL = [Recorded(key, DONE, result) for key, result in KEYS.items()]
NONE_SEEN = Killed(2, set())


def call(record_id: int, route: str = "/api1", ending: Ending = "answer") -> Call:
    return Call(0.0, route, str(record_id), "", ending)


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(EXAMPLES / "kill_and_resume.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BOUND)
    assert not re.search("Traceback|Exception ignored|Warning", done.stderr), done.stderr
    return done


def test_a_run_that_is_killed_again_and_again_comes_to_its_end() -> None:
    """Every record is recorded exactly once, nothing is lost, and what it cost is told; the exit status is 0."""
    ended = run("--records=1500", "--every=1", "--rounds=3", "--latency=0.02", "--errors=0.05", "--drops=0.01")
    assert (ended.returncode, ended.stderr) == (0, "")
    *kills, account = ended.stdout.splitlines()
    found = re.fullmatch(
        r"(\d) kills: 1,500 of 1,500 records are recorded exactly once \(([\d,]+) done, (\d+) failed\), 0 lost, "
        r"0 with a wrong result; ([\d,]+) of ([\d,]+) calls were repeated",
        account,
    )
    assert found, account
    assert len(kills) == int(found[1]) >= 1
    assert all(re.fullmatch(r"killed after 1 s: [\d,]+ of 1,500 recorded", line) for line in kills)
    done, failed, repeated, answers = (int(number.replace(",", "")) for number in found.groups()[1:])
    assert done + failed == 1500
    # Each record that was done took two answers at least, and each repeated call is one more.
    assert answers >= 2 * done + repeated


def test_a_run_without_a_kill_repeats_nothing() -> None:
    """A run that ends before its first kill is not killed."""
    done = run("--records=40", "--every=50", "--latency=0.001", "--errors=0.2", "--drops=0")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("0 kills: 40 of 40 records are recorded exactly once (")
    assert re.search(r"; 0 of \d+ calls were repeated\n$", done.stdout)


def test_what_was_asked_twice_is_counted_and_is_no_fault() -> None:
    """An answer that came to a process that was killed is asked for again. What failed at the service is no repeat."""
    calls = [call(1), call(1), call(2, ending="error"), call(2), call(3), call(3, "/api2"), call(3, "/api2")]
    assert prove(Killed(2, {1}), ALL, calls, KEYS) == (
        "2 kills: 3 of 3 records are recorded exactly once (3 done, 0 failed), 0 lost, 0 with a wrong result; "
        "2 of 6 calls were repeated"
    )


def test_a_failed_record_is_recorded_too() -> None:
    """It has no result to be right or wrong."""
    assert "(2 done, 1 failed)" in prove(NONE_SEEN, [*ALL[:2], Recorded(3, FAILED, None)], [], KEYS)


@pytest.mark.parametrize(
    ("killed", "found", "message"),
    [
        (NONE_SEEN, ALL[:2], "2 of 3 records"),
        (NONE_SEEN, [*ALL, ALL[0]], "2 of 3 records"),
        (NONE_SEEN, [*ALL, Recorded(4, DONE, "four")], "3 of 3 records .* 1 with a wrong result"),
        (NONE_SEEN, [*ALL, Recorded(4, FAILED, None)], "3 of 3 records"),
        (NONE_SEEN, [*ALL[:2], Recorded(3, DONE, "two")], "1 with a wrong result"),
        (Killed(1, {7}), ALL, "1 lost"),
        (Killed(1, {1, 2}), [], "0 of 3 records .* 2 lost"),
    ],
    ids=["missing", "twice", "unknown", "unknown and failed", "wrong", "lost", "emptied"],
)
def test_what_is_not_as_it_should_be_is_told(killed: Killed, found: list[Recorded], message: str) -> None:
    with pytest.raises(Unproven, match=message):
        prove(killed, found, [], KEYS)


def test_a_run_that_fails_by_itself_is_no_proof(tmp_path: Path) -> None:
    """Its exit status is told, and it is not started again."""
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    with pytest.raises(Unproven, match="exit status 3"):
        kill_and_resume.kill_and_resume(command, tmp_path / "run.db", every=BOUND, rounds=3, records=1)


def test_after_the_last_kill_the_run_is_left_alone(tmp_path: Path) -> None:
    """However short the time between two kills is, it comes to an end."""
    command = [sys.executable, "-c", "import time; time.sleep(0.5)"]
    killed = kill_and_resume.kill_and_resume(command, tmp_path / "run.db", every=0.05, rounds=2, records=1)
    assert killed == (2, set())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--records=0"], "'0' is not"),
        (["--every=0"], "'0' is not"),
        (["--every=soon"], "'soon' is not"),
        (["--every=inf"], "'inf' is not"),
        (["--rounds=none"], "'none' is not"),
        (["--errors=2"], "errors is a share"),
        (["--no-such-flag"], "unrecognized arguments"),
    ],
)
def test_wrong_use_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["kill_and_resume.py", *flags])
    with pytest.raises(SystemExit) as ended:
        kill_and_resume.main()
    assert ended.value.code == 1
    assert message in capsys.readouterr().err


@pytest.mark.full
def test_the_default_run_is_proven() -> None:
    """20,000 records, killed every 3 s."""
    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    assert "20,000 of 20,000 records are recorded exactly once" in done.stdout
