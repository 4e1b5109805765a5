"""The flagship example accounts for every record: whatever goes wrong, and however it is ended."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import pytest

import two_step
from penstock import Adaptive, Breaker, FailureKind, KeyStatistics, LimitChange
from records import key_of, make_records
from service import EmbeddedService, ServiceConfig, fate_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from penstock.gate.limiter import Reason

EXAMPLES = Path(__file__).parents[2] / "examples"
BOUND = 30.0
FAST = "--latency=0.005"
FIRST_LIMIT = Adaptive().start
"""Requests that a service gets before it has answered any."""

QUIET = ServiceConfig(latency=0.005, errors=0.0, drops=0.0)
OVERLOADED = "nothing: this machine's CPU or memory, which other programs may have taken"
NEVER = ServiceConfig(latency=10 * BOUND, errors=0.0, drops=0.0)


@dataclass
class Ended:
    """A run that is over."""

    status: int
    stdout: str
    stderr: str
    lines: list[dict[str, Any]]

    @property
    def sums(self) -> tuple[int, int, int, int]:
        """in, done, failed, left"""
        found = re.search(r"^in (\d+) = done (\d+) \+ failed (\d+) \+ left (\d+)$", self.stdout, re.MULTILINE)
        assert found, self.stdout
        taken, done, failed, left = map(int, found.groups())
        return taken, done, failed, left

    @property
    def by_id(self) -> dict[Any, dict[str, Any]]:
        return {line["id"]: line for line in self.lines}


class Running:
    """The program while it runs."""

    def __init__(self, directory: Path, *flags: str, limit_bytes: int | None = None) -> None:
        self.output = directory / "output.jsonl"
        self._stderr = directory / "stderr"
        command = [sys.executable, "-W", "error", str(EXAMPLES / "two_step.py"), f"--output={self.output}", *flags]
        with self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                preexec_fn=None if limit_bytes is None else lambda: limit_files(limit_bytes),
            )

    def text(self) -> str:
        return self.output.read_text("utf-8") if self.output.exists() else ""

    def stderr(self) -> str:
        return self._stderr.read_text("utf-8")

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + BOUND
        while not condition():
            assert self.process.poll() is None, self.stderr()
            assert time.monotonic() < deadline, self.stderr()

    def until_lines(self, lines: int) -> None:
        self.until(lambda: self.text().count("\n") >= lines)

    def interrupt(self) -> None:
        said = self.stderr().count("interrupted")
        self.process.send_signal(signal.SIGINT)
        self.until(lambda: self.stderr().count("interrupted") > said)

    def ended(self, *, killed: bool = False) -> Ended:
        stdout, _ = self.process.communicate(timeout=BOUND)
        assert not re.search("Traceback|Exception ignored|Warning", self.stderr()), self.stderr()
        text = self.text()
        whole, newline, torn = text.rpartition("\n")
        # Linux looks for a SIGKILL between the pages of a write, and then the rest of the line is not written.
        assert not torn or (killed and len(text.encode()) % resource.getpagesize() == 0)
        text = whole + newline
        return Ended(
            self.process.returncode, stdout.decode(), self.stderr(), [json.loads(line) for line in text.splitlines()]
        )


def is_busy() -> bool:
    """Whether more wants to run than there are cores."""
    return os.getloadavg()[0] > (os.cpu_count() or 1)


def limit_files(size_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, size_bytes))


@contextmanager
def running(directory: Path, *flags: str, limit_bytes: int | None = None) -> Iterator[Running]:
    program = Running(directory, *flags, limit_bytes=limit_bytes)
    try:
        yield program
    finally:
        program.process.kill()
        program.process.communicate()


def run(directory: Path, *flags: str, limit_bytes: int | None = None) -> Ended:
    with running(directory, *flags, limit_bytes=limit_bytes) as program:
        return program.ended()


@pytest.fixture(scope="module")
def quiet_url() -> Iterator[str]:
    with EmbeddedService(QUIET) as service:
        yield service.url


@pytest.fixture(scope="module")
def silent_service() -> Iterator[EmbeddedService]:
    """It takes requests and does not answer while the tests last."""
    with EmbeddedService(NEVER) as service:
        yield service


def expected_outcome(config: ServiceConfig, number: int) -> tuple[bool, int]:
    """Whether the record succeeds, and with how many attempts in all."""
    attempts = 0
    for route in ("/api1", "/api2"):
        endings = [fate_of(config, route, str(number), nth).ending for nth in range(two_step.RETRY.attempts)]
        if "answer" not in endings:
            return False, attempts + len(endings)
        attempts += endings.index("answer") + 1
    return True, attempts


def check_made_records(ended: Ended, jobs: int, seed: int = 0) -> None:
    expected = {record["id"]: key_of(record) for record in make_records(jobs, seed)}
    assert len(ended.lines) == jobs
    assert {line["id"]: line["key"] for line in ended.lines} == expected


# --- outcomes ---


def test_every_record_gets_the_key_that_belongs_to_it(tmp_path: Path) -> None:
    """With the default share of faults all records are done, each with its own key, and the exit status is 0."""
    ended = run(tmp_path, "--jobs=200", FAST, "--seed=5")
    assert (ended.status, ended.sums) == (0, (200, 200, 0, 0))
    check_made_records(ended, 200, seed=5)
    assert re.search(r"^200 done in .* jobs/s$", ended.stdout, re.MULTILINE)
    assert re.search(r"requests, \d+ of them retries; round trip p50 .* ms, p99 .* ms$", ended.stdout, re.MULTILINE)
    assert re.search(r"^CPU: client \d+%, service \d+% of a core$", ended.stdout, re.MULTILINE)
    assert "200 of 200 jobs" in ended.stderr


def test_failed_records_are_one_whole_line_each_and_counted_by_kind(tmp_path: Path) -> None:
    """When all attempts fail the record is reported as failed: exactly those that the seed decides, exit status 5."""
    config = ServiceConfig(errors=0.3)
    expected = {number: expected_outcome(config, number) for number in range(1, 401)}
    failures = sum(not ok for ok, _ in expected.values())
    ended = run(tmp_path, "--jobs=400", FAST, "--errors=0.3")
    assert (ended.status, ended.sums) == (5, (400, 400 - failures, failures, 0))
    assert len(ended.lines) == 400
    assert {line["id"]: (line["ok"], line["attempts"]) for line in ended.lines} == expected
    assert f"{failures} failed (transient)" in ended.stdout
    for line in ended.lines:
        assert line["ok"] or (line["kind"] == "transient" and line["error"] and "key" not in line)


def test_the_same_seed_gives_the_same_outcomes(tmp_path: Path) -> None:
    """Which records fail, and after how many attempts, does not depend on how many jobs run at once."""
    runs = []
    for limit in ("--limit=20", "--limit=200"):
        ended = run(tmp_path, "--jobs=100", "--latency=0", "--errors=0.4", "--seed=9", limit)
        runs.append({line["id"]: (line["ok"], line["attempts"], line.get("key")) for line in ended.lines})
    assert runs[0] == runs[1]
    assert {ok for ok, _, _ in runs[0].values()} == {True, False}


def test_a_service_that_is_not_there_fails_every_record_in_bounded_time(tmp_path: Path) -> None:
    """After some refused connections nothing more is sent, every record says why, and the run ends by itself."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ended = run(tmp_path, "--jobs=300", f"--base-url=http://127.0.0.1:{port}")
    assert (ended.status, ended.sums) == (5, (300, 0, 300, 0))
    assert {line["kind"] for line in ended.lines} == {"transient"}
    assert sum(line["attempts"] for line in ended.lines) <= 3 * Breaker().connect_errors
    assert all(f"http://127.0.0.1:{port}" in line["error"] for line in ended.lines)
    assert "nothing has ever answered" in ended.stderr
    assert "  held back by: the service: it has never answered. Is the address right?" in ended.stdout
    assert "service" not in ended.stdout.splitlines()[-2]


def test_a_run_at_a_service_with_a_knee_says_so(tmp_path: Path) -> None:
    """No limit is set: the one that it finds is near the knee, and the account names it."""
    ended = run(tmp_path, "--jobs=450", "--knee=40", "--latency=0.2", "--errors=0", "--drops=0")
    assert (ended.status, ended.sums) == (0, (450, 450, 0, 0))
    found = re.search(r"^  limit (\d+), found by queue; baseline (\d+) ms$", ended.stdout, re.MULTILINE)
    assert found, ended.stdout
    assert 20 <= int(found[1]) <= 80
    assert 180 <= int(found[2]) <= 300
    assert re.search(r"^  waited for: permit \d+%", ended.stdout, re.MULTILINE)
    knee = f"  held back by: the service's knee (limit {found[1]})"
    # A machine that is busy with other things may delay the program for most of so short a run, and then it says that.
    assert knee in ended.stdout or (is_busy() and OVERLOADED in ended.stdout), ended.stdout


@pytest.mark.parametrize("headers", [[], ["--quota-headers"]])
def test_a_run_at_a_service_with_a_quota_says_so(tmp_path: Path, headers: list[str]) -> None:
    """The quota is kept to as the service tells it, and the account names it; nothing fails for good."""
    ended = run(tmp_path, "--jobs=150", "--quota=200", "--burst=20", "--errors=0", "--drops=0", *headers)
    assert (ended.status, ended.sums) == (0, (150, 150, 0, 0))
    found = re.search(r"^  held back by: the service's quota \((\d+)/s\)$", ended.stdout, re.MULTILINE)
    assert found, ended.stdout
    assert 20 <= int(found[1]) <= 240


def seen(**fields: Any) -> KeyStatistics:
    """What a gate may have seen; what the account does not read is left out."""
    known: dict[str, Any] = dict.fromkeys(KeyStatistics.__dataclass_fields__)
    known.update(limit=8, waited={}, changes=(), failed={}, succeeded=100, opened=0)
    return KeyStatistics(**{**known, **fields})


def changes(*limits: tuple[float, int, Reason]) -> tuple[LimitChange, ...]:
    before = [8, *(after for _, after, _ in limits)]
    return tuple(LimitChange(at, old, new, reason) for (at, new, reason), old in zip(limits, before, strict=False))


KNEE = changes((1.0, 64, "growth"), (2.0, 40, "queue"), (11.0, 20, "probe"), (11.1, 40, "probe"))


@pytest.mark.parametrize(
    ("found", "cpu", "answer"),
    [
        (seen(changes=KNEE, waited={"permit": 9.0}), 0.5, "the service's knee (limit 40)"),
        (seen(changes=KNEE, waited={"permit": 9.0}), 0.95, "nothing: this machine's CPU"),
        (seen(changes=KNEE, waited={"permit": 0.5}), 0.5, "nothing: too few records at once"),
        (seen(), 0.5, "nothing: too few records at once"),
        (seen(opened=1, succeeded=0), 0.1, "the service: it has never answered. Is the address right?"),
        (seen(waited={"rate": 8.0}, succeeded=2000), 0.5, "the service's quota (200/s)"),
        (seen(waited={"permit": 3.0, "pause": 4.0}, succeeded=2000), 0.5, "the service's quota (200/s)"),
        (
            seen(changes=changes((1.0, 3, "loss")), waited={"permit": 8.0}, failed={FailureKind.TRANSIENT: 9}),
            0.5,
            "its refusals and failures (limit 3)",
        ),
        (
            seen(
                changes=changes((1.0, 3, "loss")),
                waited={"permit": 8.0, "pause": 1.0},
                failed={FailureKind.THROTTLED: 9, FailureKind.TRANSIENT: 1},
                succeeded=50,
            ),
            0.5,
            "the service's quota (5/s)",
        ),
        (
            seen(opened=1, waited={"breaker": 9.0}),
            0.5,
            "the service's failures: for most of the time it was left alone",
        ),
        (
            seen(waited={"processing": 9.0}),
            0.5,
            "nothing: this machine's CPU, where answers wait to be processed",
        ),
        (
            seen(changes=changes((1.0, 6, "guard")), waited={"permit": 9.0}),
            0.5,
            OVERLOADED,
        ),
        (
            seen(changes=changes((1.0, 5, "server")), waited={"permit": 9.0}),
            0.5,
            "the service's word on how many it takes at once (5)",
        ),
        (
            seen(limit=32, changes=changes((1.0, 32, "growth")), waited={"permit": 9.0}),
            0.5,
            "nothing: too few records to find a limit (it has grown to 32)",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_account_names_what_held_the_run_back(found: KeyStatistics, cpu: float, answer: str) -> None:
    """By what was waited for, by what the limit was found, and by the CPU that the program has used itself."""
    assert two_step.held_back_by(found, 10.0, cpu, 12.0) == answer


def test_an_overload_that_is_over_has_not_held_the_run_back() -> None:
    """Only what lasted for most of the time has."""
    short = changes((1.0, 64, "growth"), (2.0, 40, "queue"), (3.0, 32, "guard"), (5.0, 40, "guard"))
    assert not two_step.is_overloaded(seen(changes=short), 12.0)
    assert two_step.is_overloaded(seen(changes=short[:3]), 5.5)
    assert not two_step.is_overloaded(seen(), 12.0)


def test_the_limit_that_is_told_is_the_usual_one() -> None:
    """A probe at half of it, or the end of a run that needs less and less, is not what was found."""
    assert two_step.usual_limit(seen(changes=KNEE), 12.0) == 40
    assert two_step.usual_limit(seen(changes=(*KNEE, LimitChange(12.0, 40, 9, "application"))), 13.0) == 40
    assert two_step.usual_limit(seen(limit=17), 12.0) == 17


# --- input ---


def test_jsonl_records_are_known_by_their_id_else_by_their_line(tmp_path: Path, quiet_url: str) -> None:
    """An `id` is the key, whatever its type; a record without one goes by its line. Blank lines are skipped."""
    records: list[dict[str, Any]] = [{"id": 7, "name": "Łódź"}, {"id": "b", "n": 1.5}, {"name": "nobody"}, {"id": 0}]
    text = "\ufeff" + "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    (tmp_path / "in.jsonl").write_text(text, "utf-8")
    ended = run(tmp_path, f"--input={tmp_path / 'in.jsonl'}", f"--base-url={quiet_url}")
    # The service knows records by their id: without one it answers 400.
    assert (ended.status, ended.sums) == (5, (4, 3, 1, 0))
    found = ended.by_id
    assert set(found) == {7, "b", 0, "line 5"}
    assert [found[record["id"]]["key"] for record in records if "id" in record] == [
        key_of(record) for record in records if "id" in record
    ]
    assert (found["line 5"]["kind"], "HTTP 400" in found["line 5"]["error"]) == ("permanent", True)


def test_csv_records_take_their_names_from_the_header(tmp_path: Path, quiet_url: str) -> None:
    """Each row is a record of texts; a quoted field may hold commas, quotes and line ends."""
    (tmp_path / "in.csv").write_bytes('id,name\r\n1,"Ada, ""A"""\r\n\r\n2,"two\nlines"\r\n3,Fès\r\n'.encode())
    ended = run(tmp_path, f"--input={tmp_path / 'in.csv'}", f"--base-url={quiet_url}")
    records = [{"id": "1", "name": 'Ada, "A"'}, {"id": "2", "name": "two\nlines"}, {"id": "3", "name": "Fès"}]
    assert (ended.status, ended.sums) == (0, (3, 3, 0, 0))
    assert {line["id"]: line["key"] for line in ended.lines} == {record["id"]: key_of(record) for record in records}


def test_input_is_read_as_it_comes(tmp_path: Path, quiet_url: str) -> None:
    """Outcomes of records from a pipe are written while the pipe is still open; its end ends the run."""
    with running(tmp_path, "--input=-", f"--base-url={quiet_url}") as program:
        assert program.process.stdin is not None
        for number in (1, 2, 3):
            program.process.stdin.write(b'{"id": %d}\n' % number)
            program.process.stdin.flush()
            program.until_lines(number)
        ended = program.ended()
    assert (ended.status, ended.sums) == (0, (3, 3, 0, 0))


def test_a_pipe_that_is_silent_does_not_hold_up_an_interrupt(tmp_path: Path, quiet_url: str) -> None:
    """Ctrl-C ends a run that waits for its input."""
    with running(tmp_path, "--input=-", f"--base-url={quiet_url}") as program:
        assert program.process.stdin is not None
        program.process.stdin.write(b'{"id": 1}\n')
        program.process.stdin.flush()
        program.until_lines(1)
        program.interrupt()
        program.process.wait(BOUND)
        ended = program.ended()
    assert (ended.status, ended.sums) == (130, (1, 1, 0, 0))


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("in.jsonl", b'{"id": "1"}\n\n{"id": \n{"id": "2"}\n', 3),
        ("in.jsonl", b'{"id": "1"}\n[1]\n', 2),
        ("in.csv", b'id,name\n1,Ada\n2,"Ada\n3,Ada\n', 4),
        ("in.csv", b"id,name\n1,Ada\n2,\xff\n", 3),
    ],
)
def test_a_malformed_line_ends_the_run_after_what_came_before_it(
    tmp_path: Path, quiet_url: str, name: str, content: bytes, line: int
) -> None:
    """The message names file and line, the records before it are delivered and summed up, the exit status is 1."""
    (tmp_path / name).write_bytes(content)
    ended = run(tmp_path, f"--input={tmp_path / name}", f"--base-url={quiet_url}")
    assert (ended.status, ended.sums) == (1, (1, 1, 0, 0))
    assert [entry["id"] for entry in ended.lines] == ["1"]
    assert f"{tmp_path / name}, line {line}:" in ended.stderr


# --- output ---


def test_no_line_is_torn_when_the_disk_is_full(tmp_path: Path) -> None:
    """What does not fit is taken back to the last whole line; the message says so, the exit status is 1."""
    ended = run(tmp_path, "--jobs=200", FAST, limit_bytes=3_000)
    assert ended.status == 1
    assert 0 < len(ended.lines) < 200
    assert f"{tmp_path / 'output.jsonl'}: File too large, after {len(ended.lines)} whole lines" in ended.stderr


def test_no_line_is_torn_when_the_program_is_killed(tmp_path: Path, quiet_url: str) -> None:
    """Each line of the output is there as soon as its outcome has been counted, whole, and once.

    But for the last one, where the kernel itself stops writing at the end of a page.
    """
    with running(tmp_path, "--jobs=5000", f"--base-url={quiet_url}") as program:
        program.until_lines(100)
        program.process.kill()
        ended = program.ended(killed=True)
    assert len(ended.by_id) == len(ended.lines) >= 100


def test_an_earlier_output_is_replaced(tmp_path: Path, quiet_url: str) -> None:
    """A second run leaves its own outcomes only."""
    (tmp_path / "output.jsonl").write_text("of an earlier run\n")
    ended = run(tmp_path, "--jobs=5", f"--base-url={quiet_url}")
    check_made_records(ended, 5)


# --- interrupts ---


def test_one_interrupt_finishes_what_is_in_flight(tmp_path: Path) -> None:
    """Ctrl-C takes no more records, hangs up on no request, and the sums hold: exit status 130."""
    with EmbeddedService(ServiceConfig(latency=0.02)) as service:
        with running(tmp_path, "--jobs=5000", f"--base-url={service.url}") as program:
            program.until_lines(100)
            program.interrupt()
            ended = program.ended()
        assert service.stats()["hung_up"] == 0
    taken, done, failed, left = ended.sums
    assert ended.status == 130
    assert taken == 5000 == done + failed + left
    assert left > 0
    assert len(ended.by_id) == len(ended.lines) == done + failed


def interrupted_twice(directory: Path, service: EmbeddedService, *flags: str) -> Ended:
    before = service.stats()["requests"]["/api1"]
    with running(directory, f"--base-url={service.url}", *flags) as program:
        program.until(lambda: service.stats()["requests"]["/api1"] == before + FIRST_LIMIT)
        program.interrupt()
        program.interrupt()
        return program.ended()


@pytest.mark.parametrize("jobs", [20, 1000])
def test_a_second_interrupt_stops_at_once(tmp_path: Path, silent_service: EmbeddedService, jobs: int) -> None:
    """Ctrl-C twice waits for no answer, whether or not all records were taken, and counts them as left."""
    ended = interrupted_twice(tmp_path, silent_service, f"--jobs={jobs}", "--limit=20")
    assert (ended.status, ended.sums, ended.lines) == (130, (jobs, 0, 0, jobs), [])


def test_an_interrupted_run_counts_the_rest_of_its_file(tmp_path: Path, silent_service: EmbeddedService) -> None:
    """What the file still holds is left, too; a malformed line in there is told, and ends the count."""
    (tmp_path / "in.jsonl").write_text("".join(f'{{"id": {number}}}\n' for number in range(1000)) + "{\n")
    ended = interrupted_twice(tmp_path, silent_service, f"--input={tmp_path / 'in.jsonl'}", "--limit=20")
    assert (ended.status, ended.sums) == (130, (1000, 0, 0, 1000))
    assert "in.jsonl, line 1001: not JSON" in ended.stderr


# --- the journal ---


def without_port(ended: Ended) -> list[str]:
    """The lines, in an order of their own, as if all services had the same port."""
    return sorted(re.sub(r"127\.0\.0\.1:\d+", "service", json.dumps(line)) for line in ended.lines)


def test_a_run_that_is_killed_and_resumed_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """Killed again and again at random moments, it leaves one line for each record in the end, and the sums hold.

    The service is killed with it, and what it answers follows from record and seed: so each line must be the same as in
    a run that was left in peace, failures with their attempts and messages among them.
    """
    flags = ("--jobs=1200", "--latency=0.01", "--errors=0.02", "--malformed=0.02", "--limit=32")
    (tmp_path / "peace").mkdir()
    expected = run(tmp_path / "peace", *flags)
    chance = Random(5)
    before = 0
    for _ in range(3):
        with running(tmp_path, *flags, f"--journal={tmp_path / 'run.db'}") as program:
            # First the outcomes of earlier runs, then new ones.
            program.until_lines(before + chance.randint(1, 150))
            with contextlib.suppress(subprocess.TimeoutExpired):
                program.process.wait(chance.uniform(0, 0.2))
            program.process.kill()
            ended = program.ended(killed=True)
        assert len(ended.by_id) == len(ended.lines) >= before
        before = len(ended.lines)
    ended = run(tmp_path, *flags, f"--journal={tmp_path / 'run.db'}")
    assert (ended.status, ended.sums) == (5, expected.sums)
    check_every_record_once(ended, 1200)
    assert without_port(ended) == without_port(expected)
    found = re.search(r"^(\d+) of the outcomes are from the journal", ended.stdout, re.MULTILINE)
    assert found, ended.stdout
    assert before <= int(found[1]) < 1200


def check_every_record_once(ended: Ended, jobs: int) -> None:
    assert sorted(line["id"] for line in ended.lines) == list(range(1, jobs + 1))


def test_a_journal_without_anything_left_to_do_writes_the_output_again(tmp_path: Path, quiet_url: str) -> None:
    """Nobody is asked for anything, and so nothing is said of the service and its speed."""
    flags = ("--jobs=100", f"--base-url={quiet_url}", f"--journal={tmp_path / 'run.db'}")
    first = run(tmp_path, *flags)
    (tmp_path / "output.jsonl").write_text("torn")
    again = run(tmp_path, *flags)
    assert (first.status, again.status, again.sums) == (0, 0, (100, 100, 0, 0))
    assert without_port(first) == without_port(again)
    assert re.search(r"^100 done in .* s: 0\.0 jobs/s$", again.stdout, re.MULTILINE)
    assert "100 of the outcomes are from the journal" in again.stdout
    assert "requests" not in again.stdout
    assert "from the journal" not in first.stdout


def test_more_records_may_follow_in_a_later_run(tmp_path: Path, quiet_url: str) -> None:
    """What is recorded is known by its key, so the input may have grown."""
    flags = (f"--base-url={quiet_url}", f"--journal={tmp_path / 'run.db'}")
    run(tmp_path, "--jobs=50", *flags)
    ended = run(tmp_path, "--jobs=80", *flags)
    assert (ended.status, ended.sums) == (0, (80, 80, 0, 0))
    check_made_records(ended, 80)
    assert "50 of the outcomes are from the journal" in ended.stdout


def test_an_interrupted_run_is_resumed_as_well(tmp_path: Path) -> None:
    """What Ctrl-C has let finish is not asked for again."""
    with EmbeddedService(replace(QUIET, latency=0.03)) as service:
        flags = ("--jobs=1000", "--limit=32", f"--base-url={service.url}", f"--journal={tmp_path / 'run.db'}")
        with running(tmp_path, *flags) as program:
            program.until_lines(1)  # one commit at a time: there are many more at once
            program.interrupt()
            interrupted = program.ended()
        taken, done, failed, left = interrupted.sums
        assert (interrupted.status, taken, failed) == (130, 1000, 0)
        assert left > 0
        assert len(interrupted.lines) == done
        ended = run(tmp_path, *flags)
        assert (ended.status, ended.sums) == (0, (1000, 1000, 0, 0))
        assert service.stats()["requests"] == {"/api1": 1000, "/api2": 1000}
    check_made_records(ended, 1000)


def test_input_is_read_as_it_comes_with_a_journal_too(tmp_path: Path, quiet_url: str) -> None:
    """Outcomes of records from a pipe do not wait for further records."""
    flags = ("--input=-", f"--base-url={quiet_url}", f"--journal={tmp_path / 'run.db'}")
    with running(tmp_path, *flags) as program:
        assert program.process.stdin is not None
        for number in (1, 2, 3):
            program.process.stdin.write(b'{"id": %d}\n' % number)
            program.process.stdin.flush()
            program.until_lines(number)
        ended = program.ended()
    assert (ended.status, ended.sums) == (0, (3, 3, 0, 0))


def test_a_run_that_is_refused_by_its_journal_leaves_the_output_alone(tmp_path: Path) -> None:
    """Started twice, the second run says who has the journal; of other records, that it is not theirs."""
    journal = f"--journal={tmp_path / 'run.db'}"
    with EmbeddedService(replace(QUIET, latency=0.03)) as service:
        url = f"--base-url={service.url}"
        with running(tmp_path, "--jobs=500", url, journal, "--limit=32") as first:
            first.until_lines(1)
            with running(tmp_path, "--jobs=500", url, journal) as second:
                refused = second.ended()
            assert refused.status == 1
            assert f"process {first.process.pid} " in refused.stderr
            ended = first.ended()
        assert (ended.status, ended.sums) == (0, (500, 500, 0, 0))
        check_made_records(ended, 500)
        other = run(tmp_path, "--jobs=500", url, journal, "--seed=1")
    assert other.status == 1
    assert f"two_step.py: error: {tmp_path / 'run.db'}" in other.stderr
    check_made_records(other, 500)


# --- the command line ---


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--jobs=0"], "argument --jobs: '0' is not"),
        (["--jobs=ten"], "argument --jobs: 'ten' is not"),
        (["--limit=-1"], "argument --limit: '-1' is not"),
        (["--errors=2"], "errors is a share"),
        (["--no-such-flag"], "unrecognized arguments"),
        (["--input=nowhere.jsonl"], "--input nowhere.jsonl: No such file"),
        (["--input=given.txt"], "ends in .jsonl or .csv"),
        (["--input=given.jsonl", "--jobs=3"], "not allowed with argument"),
        (["--input=given.jsonl", "--output=./given.jsonl"], "is the input, too"),
        (["--input=given.jsonl", "--journal=./given.jsonl"], "is the input, too"),
        (["--journal=run.db", "--output=./run.db"], "is the output, too"),
        (["--output=nowhere/keys.jsonl"], "--output nowhere/keys.jsonl: No such file"),
        (["--base-url=localhost:8080"], "--base-url localhost:8080: "),
        (["--base-url=http://localhost:99999"], "--base-url http://localhost:99999: "),
        (["--base-url="], "--base-url : "),
    ],
)
def test_wrong_use_is_refused_before_anything_starts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    """The message says what is wrong, as argparse does it; nothing is run or written; the exit status is 1."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["two_step.py", *flags])
    Path("given.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(SystemExit) as ended:
        two_step.main()
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("usage: two_step.py")
    assert message in said
    assert [path.read_text() for path in tmp_path.iterdir()] == ['{"id": 1}\n']


def test_wrong_use_is_an_exit_status_of_the_program(tmp_path: Path) -> None:
    """The same in a process of its own, whose output is not even opened."""
    ended = run(tmp_path, "--input=nowhere.jsonl")
    assert (ended.status, ended.stdout) == (1, "")
    assert ended.stderr.endswith("two_step.py: error: --input nowhere.jsonl: No such file or directory\n")
    assert not (tmp_path / "output.jsonl").exists()


def test_sums_that_do_not_hold_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    """A record that was taken and is nowhere afterwards is an error of its own, whatever else went well."""
    source = two_step.Source(iter(()))
    source.taken = 3
    whole = two_step.Run(ended=Counter({None: 1, FailureKind.TRANSIENT: 1}), left=1)
    assert two_step.exit_status(whole, source) == 130
    assert two_step.exit_status(two_step.Run(ended=Counter({None: 2})), source) == 1
    assert "the sums do not hold" in capsys.readouterr().err


@pytest.mark.full
def test_the_default_run_accounts_for_ten_thousand_records(tmp_path: Path) -> None:
    """Without any option but an output: 10,000 records, all done, each key once."""
    ended = run(tmp_path)
    assert (ended.status, ended.sums) == (0, (10_000, 10_000, 0, 0))
    check_made_records(ended, 10_000)
