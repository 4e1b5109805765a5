"""The drop-in example brings the key of every record, with each of its programs, or says which one it has not."""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import drop_in
from penstock import BridgeExecutor
from records import key_of, make_records
from service import EmbeddedService, ServiceConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from records import Record

PROGRAM = Path(__file__).parents[2] / "examples" / "drop_in.py"
BOUND = 30.0
FAST = ("--latency=0.005", "--records=20")
NAMES = ["ThreadPoolExecutor(3), requests", "BridgeExecutor(3), requests", "BridgeExecutor(), HttpClient"]
WITHOUT_REQUESTS = f"""
import runpy, sys
sys.modules["requests"] = None
sys.path.insert(0, {str(PROGRAM.parent)!r})
runpy.run_path({str(PROGRAM)!r}, run_name="__main__")
"""


class Ended:
    """A run that is over; whatever it printed of errors has failed the test already."""

    def __init__(self, *command: str) -> None:
        ended = subprocess.run(
            [sys.executable, "-W", "error", *command], capture_output=True, text=True, timeout=BOUND, check=False
        )
        assert ended.stderr == ""
        self.status = ended.returncode
        self.stdout = ended.stdout

    @property
    def speeds(self) -> list[tuple[str, str, str]]:
        """name, done, of how many"""
        found = re.findall(r"^(.+?) +(\d+) of (\d+) done in [\d.]+ s: +[\d.]+ records/s", self.stdout, re.MULTILINE)
        assert len(found) == self.stdout.count("records/s"), self.stdout
        return found


def test_all_three_programs_bring_the_key_of_every_record() -> None:
    """Each has a line with its speed, and the ratio to the first one; the exit status is 0."""
    ended = Ended(str(PROGRAM), *FAST, "--workers=3")
    assert (ended.status, ended.speeds) == (0, [(name, "20", "20") for name in NAMES])
    ratios = re.findall(r"([\d.]+) x$", ended.stdout, re.MULTILINE)
    assert len(ratios) == len(NAMES)
    assert ratios[0] == "1.00"


def test_without_requests_the_async_program_is_left_and_says_so() -> None:
    """penstock's own dependencies are enough for it; what was left out is named, with what to install."""
    ended = Ended("-c", WITHOUT_REQUESTS, *FAST)
    assert (ended.status, ended.speeds) == (0, [(NAMES[-1], "20", "20")])
    assert "two programs with threads are left out (pip install requests)" in ended.stdout


@pytest.mark.parametrize("pool", [ThreadPoolExecutor, BridgeExecutor])
def test_the_usual_program_tells_which_records_have_failed(
    pool: Callable[[int], Executor], capsys: pytest.CaptureFixture[str]
) -> None:
    """A record that the service refuses is not done: it is named with its error, whichever executor ran it."""
    with EmbeddedService(ServiceConfig(latency=0.0, errors=1.0, drops=0.0)) as service:
        assert drop_in.with_threads(pool, 3, service.url, list(make_records(2))) == 0
    said = capsys.readouterr().err
    assert sorted(re.findall(r"^record (\d): HTTPError\('503", said, re.MULTILINE)) == ["1", "2"]


class Inline(Executor):
    """Calls at once, in the thread that submits."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except LookupError as error:
            future.set_exception(error)
        return future


def test_a_record_is_done_only_with_its_own_key(capsys: pytest.CaptureFixture[str]) -> None:
    """The key of another record, or an error, is told with the record's id, and not counted."""
    answers: dict[object, str] = {record["id"]: key_of(record) for record in make_records(4)}
    answers[2] = answers[1]
    del answers[3]

    def score(record: Record) -> str:
        return answers[record["id"]]

    assert drop_in.collect(Inline(), score, list(make_records(4))) == 2
    said = capsys.readouterr().err.splitlines()
    assert sorted(said) == [f"record 2: the key of another one: {answers[1]}", "record 3: KeyError(3)"]


def test_a_missing_key_is_exit_status_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One record short in one of the programs is enough."""
    speeds = [drop_in.Speed("all", 2, 0.5), drop_in.Speed("one short", 1, 0.5)]
    monkeypatch.setattr(sys, "argv", ["drop_in.py", "--records=2"])
    monkeypatch.setattr(drop_in, "run_all", lambda *_: speeds)
    assert drop_in.main() == 1
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[-2:] for line in said] == [["1.00", "x"], ["0.50", "x"]]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--records=0", "--records and --workers are at least 1"),
        ("--workers=-1", "--records and --workers are at least 1"),
        ("--latency=-1", "latency cannot be -1.0"),
        ("--errors=0.1", "unrecognized arguments"),
    ],
)
def test_wrong_use_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flag: str, message: str
) -> None:
    """The message says what is wrong, as argparse does it."""
    monkeypatch.setattr(sys, "argv", ["drop_in.py", flag])
    with pytest.raises(SystemExit) as ended:
        drop_in.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
