"""Runs that are resumed: what is done is not done again, all else is, and each item has one row and one state.

The model is a dictionary: key -> how the item last ended. Whatever runs come one after the other, complete or ended
in their middle, the journal and its readers say the same.
"""

import asyncio
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

import penstock
from penstock import Executor, FailureKind, Journal, Outcome, RecordedError, SkipItem, UsageError
from penstock.journal.schema import INLINE_BYTES, State
from penstock.testing import run_in_virtual_time

LARGE = "x" * (INLINE_BYTES + 1)
"""What goes to the side file."""

UNUSABLE = object()
"""What `key=` may return, and no journal can take."""


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL", logger="penstock.jobs")


# --- the model ---


class End(NamedTuple):
    """How an item ended."""

    state: State
    told: Any
    """What its job returned; or the message of its error."""


UNKNOWN = End(State.UNKNOWN, None)
WITHDRAWN = End(State.RETRY, "it was about to begin")
STILL_UNKNOWN = End(State.RETRY, None)


class Fate(NamedTuple):
    """What becomes of one item of one run."""

    key: Any
    end: str
    lasts: float
    """Virtual seconds."""


class Plan(NamedTuple):
    """One run."""

    items: list[Fate]
    resume: str = "missing"
    duplicates: str = "suffix"
    replay: bool = True
    intents: bool = False
    on_unknown: str = "dead"
    limit: int = 3
    ending: str = "none"
    """Of a run that is ended early: how."""
    moment: float = 0.0
    """Of the same: virtual seconds from its beginning, or outcomes for "break"."""


class Expected(NamedTuple):
    """What a run must come to, if nobody ends it."""

    ends: dict[Any, End]
    """By the key that an item is recorded under: those that are run."""
    replayed: dict[Any, End]
    skipped: int
    nameless: int
    """Items without a usable key."""
    refused: bool
    """Whether a key that comes twice ends it."""


def other_key(key: Any, number: int) -> Any:
    return key + b"#%d" % number if isinstance(key, bytes) else f"{key}#{number}"


def keys_of(plan: Plan) -> Iterable[tuple[Any, Fate]]:
    """The key that each item is known by; None: it has no usable one. Without those that are left out or refused."""
    seen: set[Any] = set()
    for fate in plan.items:
        key = fate.key
        if key is UNUSABLE:
            yield None, fate
            continue
        if key in seen:
            if plan.duplicates == "skip":
                continue
            if plan.duplicates == "error":
                return
            key = next(other for number in range(2, 99) if (other := other_key(fate.key, number)) not in seen)
        seen.add(key)
        yield key, fate


def runs_again(known: End | None, plan: Plan) -> bool:
    if known is None or known.state == State.RETRY:
        return True
    if known.state == State.UNKNOWN:
        return plan.on_unknown == "rerun"
    if plan.resume == "all":
        return True
    return known.state == State.DEAD and (plan.resume == "failed" or plan.resume == f"failed:{known.told}")


def end_of(fate: Fate, run: int) -> End:
    if fate.end in ("blue", "red"):
        return End(State.DEAD, fate.end)
    if fate.end == "skip":
        return End(State.SKIPPED, "no need")
    return End(State.DONE, [run, LARGE if fate.end == "large" else "", fate.lasts])


def expect(plan: Plan, run: int, known: dict[Any, End]) -> Expected:
    ends, replayed, nameless, entries = {}, {}, 0, 0
    for key, fate in keys_of(plan):
        entries += 1
        if key is None:
            nameless += 1
        elif runs_again(known.get(key), plan):
            ends[key] = end_of(fate, run)
        else:
            replayed[key] = known[key]
    refused = plan.duplicates == "error" and entries < len(plan.items)
    return Expected(ends, replayed, 0 if refused else len(plan.items) - entries, nameless, refused)


def after(known: End | None, end: End) -> End:
    """What a journal holds of an item that has ended a second time: what was paid for is not lost."""
    return known if known is not None and known.state == State.DONE and end.state != State.DONE else end


def ended(outcome: Outcome[Any]) -> End:
    if outcome.error is None:
        return End(State.DONE, outcome.value)
    if not isinstance(outcome.error, RecordedError):
        message = str(outcome.error)
    elif outcome.error.error == "OutcomeUnknown":
        return UNKNOWN
    else:
        message = outcome.error.message
    return End(State.SKIPPED if isinstance(outcome.error, SkipItem) else State.DEAD, message)


# --- the runs ---


async def job(work: tuple[Fate, int]) -> Any:
    """The same for each run, and so for their journal."""
    fate, run = work
    await asyncio.sleep(fate.lasts)
    end = end_of(fate, run)
    if end.state == State.DEAD:
        raise ValueError(end.told)
    if end.state == State.SKIPPED:
        raise SkipItem(end.told)
    return end.told


def key_of(work: tuple[Fate, int]) -> Any:
    return work[0].key


def in_the_file(path: str) -> tuple[dict[Any, End], int]:
    """What the journal holds by key, and how many rows without one; looked at from outside."""
    if not os.path.exists(path):
        return {}, 0
    found: dict[Any, End] = {}
    nameless = 0
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT key, state, message, result, file_offset, file_size FROM item").fetchall()
    for key, state, message, result, offset, size in rows:
        if key is None:
            nameless += 1
            continue
        assert key not in found, "one row for each key"
        told = message
        if state == State.DONE:
            told = json.loads(result if offset is None else Path(f"{path}-results").read_bytes()[offset:][:size])
        found[key] = End(State(state), told)
    return found, nameless


class Told(NamedTuple):
    """What the reader of a run was told."""

    outcomes: list[Outcome[Any]]
    error: BaseException | None
    statistics: Any


def journal_of(path: str, plan: Plan) -> Journal:
    options: dict[str, Any] = {
        name: getattr(plan, name) for name in ("resume", "duplicates", "replay", "intents", "on_unknown")
    }
    return Journal(path, **options)


async def perform(path: str, plan: Plan, run: int) -> Told:
    outcomes: list[Outcome[Any]] = []
    error: BaseException | None = None
    items = [(fate, run) for fate in plan.items]

    async def read(executor: Executor) -> None:
        nonlocal error
        async with stream:
            try:
                async for outcome in stream:
                    outcomes.append(outcome)
                    if plan.ending == "break" and len(outcomes) >= plan.moment:
                        break
            except Exception as raised:  # noqa: BLE001  # it is looked at
                error = raised

    async with Executor(limit=plan.limit) as executor:
        stream = executor.as_completed(job, items, key=key_of, journal=journal_of(path, plan))
        reader = asyncio.ensure_future(read(executor))
        if plan.ending in ("cancel", "drain", "hurry"):
            await asyncio.wait([reader], timeout=plan.moment)
            if plan.ending == "cancel":
                reader.cancel()
            else:
                await executor.shutdown(timeout=0.05 if plan.ending == "hurry" else None)
        with suppress(asyncio.CancelledError):
            await reader
    return Told(outcomes, error, stream.statistics())


def check(plan: Plan, told: Told, expected: Expected, known: dict[Any, End], path: str) -> dict[Any, End]:
    """That the run was as it should be; what the journal holds now."""
    fresh = [outcome for outcome in told.outcomes if not outcome.replayed and outcome.key is not None]
    replayed = [outcome for outcome in told.outcomes if outcome.replayed]
    nameless = [outcome for outcome in told.outcomes if outcome.key is None]
    counts = told.statistics
    rows, rows_without_key = in_the_file(path)

    assert counts.read == counts.finished + counts.left + counts.duplicates
    assert counts.in_flight == 0
    assert max(Counter(outcome.key for outcome in (*fresh, *replayed)).values(), default=0) <= 1
    assert all(ended(outcome) == expected.ends[outcome.key] for outcome in fresh)
    assert all(ended(outcome) == expected.replayed[outcome.key] for outcome in replayed)
    assert all(type(outcome.error) is UsageError for outcome in nameless)
    assert plan.replay or not replayed

    now = dict(known)
    for key, end in expected.ends.items():
        before = known.get(key)
        allowed: list[End | None] = [after(before, end)]
        if plan.ending != "none" or expected.refused:  # it has perhaps not come to its end
            allowed.append(before)
            if plan.intents and (before is None or before.state != State.DONE):
                allowed += [UNKNOWN, STILL_UNKNOWN if before in (UNKNOWN, STILL_UNKNOWN) else WITHDRAWN]
        found = rows.pop(key, None)
        assert found in allowed, f"{key}: {found}, not any of {allowed}"
        if found is not None:
            now[key] = found
    assert rows == {key: end for key, end in known.items() if key not in expected.ends}, "the others stay as they were"
    for outcome in fresh:
        assert now[outcome.key] == after(known.get(outcome.key), ended(outcome)), "delivered, and so recorded"
    assert rows_without_key >= len(nameless)

    if plan.ending == "none":
        whole = not expected.refused
        assert isinstance(told.error, UsageError) if expected.refused else told.error is None
        assert {outcome.key for outcome in fresh} == expected.ends.keys()
        assert {outcome.key for outcome in replayed} == (expected.replayed.keys() if plan.replay else set())
        assert len(nameless) == rows_without_key == expected.nameless
        assert counts.replayed == len(expected.replayed)
        assert counts.duplicates == expected.skipped
        assert counts.finished == len(expected.ends) + len(expected.replayed) + expected.nameless
        assert counts.left == 0 if whole else counts.left >= 1
    return now


def live(plans: Sequence[Plan]) -> None:
    """All runs, one after the other, on one journal."""
    known: dict[Any, End] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "run.db")
        for run, plan in enumerate(plans):
            expected = expect(plan, run, known)
            told = run_in_virtual_time(perform(path, plan, run))
            known = check(plan, told, expected, known, path)


keys = st.sampled_from([1, 2, 1.5, "1", "a", "a#2", b"a", -3, UNUSABLE])
fates = st.builds(
    Fate, keys, st.sampled_from(["done", "done", "large", "blue", "red", "skip"]), st.sampled_from([0.0, 0.0, 0.1, 1.0])
)
plans = st.builds(
    Plan,
    items=st.lists(fates, max_size=9),
    resume=st.sampled_from(["missing", "failed", "failed:blue", "all"]),
    duplicates=st.sampled_from(["error", "skip", "suffix"]),
    replay=st.booleans(),
    intents=st.booleans(),
    on_unknown=st.sampled_from(["dead", "rerun"]),
    limit=st.integers(1, 4),
    ending=st.sampled_from(["none", "none", "break", "cancel", "drain", "hurry"]),
    moment=st.sampled_from([0.0, 0.05, 0.15, 0.3, 1.0, 2.0, 3.0]),
).map(lambda plan: plan._replace(intents=False) if plan.resume == "all" else plan)


@given(st.lists(plans, min_size=1, max_size=3))
def test_any_runs_one_after_the_other_agree_with_a_dictionary(plans: list[Plan]) -> None:
    """Which items run again, what is replayed, what is counted, and one row for each key."""
    live(plans)


def whole(plan: Plan) -> Plan:
    """As it is, but for its end; keys that come twice do not end it either."""
    return plan._replace(ending="none", duplicates="skip" if plan.duplicates == "error" else plan.duplicates)


@given(st.lists(plans.map(whole), min_size=1, max_size=2))
def test_a_report_says_what_the_dictionary_says(plans: list[Plan]) -> None:
    """Done, failed and skipped count recorded items too; `replayed` says how many they were."""
    known: dict[Any, End] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "run.db")
        for run, plan in enumerate(plans):
            expected = expect(plan, run, known)
            report = run_in_virtual_time(reported(path, plan, run))
            ends = Counter(end.state for end in (*expected.ends.values(), *expected.replayed.values()))
            report.verify()
            assert report.read == len(plan.items)
            assert report.done == ends[State.DONE]
            assert report.failed == ends[State.DEAD] + expected.nameless
            assert report.skipped == ends[State.SKIPPED] + expected.skipped
            assert report.replayed == len(expected.replayed)
            assert (report.left, report.stopped, report.journal) == (0, None, path)
            assert report.exit_code == (5 if report.failed else 0)
            known |= {key: after(known.get(key), end) for key, end in expected.ends.items()}
            assert in_the_file(path) == (known, expected.nameless)


async def reported(path: str, plan: Plan, run: int) -> penstock.Report:
    async with Executor(limit=plan.limit) as executor:
        items = [(fate, run) for fate in plan.items]
        return await executor.run(job, items, key=key_of, journal=journal_of(path, plan))


# --- which items run again ---


class Refused(Exception):
    """As a client raises it."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the service said {status}")
        self.status = status


async def ask(item: tuple[str, int | None]) -> str:
    _, status = item
    if status == 0:
        raise ConnectionResetError("reset by peer")
    if status is not None:
        raise Refused(status)
    return "answer"


FIRST = [("done", None), ("422", 422), ("404", 404), ("reset", 0)]


@pytest.mark.parametrize(
    ("resume", "again"),
    [
        ("missing", set()),
        ("failed", {"422", "404", "reset"}),
        ("failed:HTTP 422", {"422"}),
        ("failed:http 422", {"422"}),
        ("failed:transient", {"reset"}),
        ("failed:Refused", {"422", "404"}),
        ("failed:by peer", {"reset"}),
        ("failed:HTTP 500", set()),
        ("all", {"done", "422", "404", "reset"}),
    ],
)
def test_who_resumes_says_which_items_run_again(tmp_path: Path, resume: str, again: set[str]) -> None:
    """None of those that have a state; those that failed, or failed in some way; or all of them."""
    path = tmp_path / "run.db"
    first = penstock.run(ask, FIRST, key=itemgetter(0), journal=path)
    assert (first.done, first.failed, first.exit_code) == (1, 3, 5)
    assert {letter.key for letter in penstock.dead(path)} == {"422", "404", "reset"}

    run: set[str] = set()

    async def mended(item: tuple[str, int | None]) -> str:
        run.add(item[0])
        return "answer"

    journal = Journal(path, resume=resume, on_mismatch="ignore")
    items = [("new", None), *reversed(FIRST)]
    report = penstock.run(mended, items, key=itemgetter(0), journal=journal)
    report.verify()
    assert run == again | {"new"}
    assert report.replayed == 4 - len(again)
    assert {letter.key for letter in penstock.dead(path)} == {"422", "404", "reset"} - again


def test_a_run_of_what_is_recorded_runs_nothing(tmp_path: Path) -> None:
    """The report counts the whole all the same, with kinds and causes; the journal keeps both runs."""
    path = tmp_path / "run.db"
    for life in range(2):
        report = penstock.run(ask, FIRST, key=itemgetter(0), journal=path, fail_fast=2, max_errors=None)
        report.verify()
        assert (report.read, report.done, report.failed) == (4, 1, 3)
        assert report.replayed == 4 * life
        assert report.journal == str(path)
        assert sum(cause.count for cause in report.causes) == 3
        assert {cause.error.partition(":")[0] for cause in report.causes} == {"Refused", "ConnectionResetError"}
        assert report.kinds[FailureKind.TRANSIENT] >= 1
    with closing(sqlite3.connect(path)) as connection:
        counts = [json.loads(each) for (each,) in connection.execute("SELECT counts FROM run")]
    assert [each["replayed"] for each in counts] == [0, 4]
    assert [each["finished"] for each in counts] == [4, 4]


def test_items_may_be_shuffled_and_more_of_them_may_come(tmp_path: Path) -> None:
    """An item is known by its key, never by its place."""
    path = tmp_path / "run.db"
    ran: list[int] = []

    async def square(item: int) -> int:
        ran.append(item)
        return item * item

    assert penstock.run(square, range(50), key=int, journal=path).done == 50
    report = penstock.run(square, range(99, -1, -1), key=int, journal=path)
    assert (report.done, report.replayed) == (100, 50)
    assert sorted(ran) == list(range(100))


# --- what a process was in the middle of when it was killed ---

PROGRAM = """
import asyncio, sys, penstock

async def charge(item):
    told = "again" if penstock.current_job().outcome_unknown else "first"
    print(item, told, flush=True)
    if item < 2 and told == "first":
        await asyncio.sleep(600)
    return told

journal = penstock.Journal(sys.argv[1], intents=True, on_unknown=sys.argv[2])
report = penstock.run(charge, range(6), key=int, limit=3, journal=journal, progress=False)
report.verify()
print("report", report.done, report.failed, report.replayed)
sys.exit(report.exit_code)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize(
    ("on_unknown", "told"),
    [("dead", ["report 4 2 6"]), ("rerun", ["0 again", "1 again", "report 6 0 4"])],
)
def test_what_was_in_flight_when_a_process_was_killed_is_known(
    tmp_path: Path, on_unknown: str, told: list[str]
) -> None:
    """With intents: as unknown. It is a failure until somebody has looked; or it is run again, and told so."""
    path = str(tmp_path / "run.db")
    command = [sys.executable, "-c", PROGRAM, path, on_unknown]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        heard = {next(process.stdout).strip() for _ in range(6)}
        wait_for(path, {2, 3, 4, 5})
        process.kill()
    assert heard == {f"{item} first" for item in range(6)}
    rows, _ = in_the_file(path)
    assert {key for key, end in rows.items() if end.state == State.UNKNOWN} == {0, 1}

    second = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert second.returncode == (5 if on_unknown == "dead" else 0), second.stderr
    assert sorted(second.stdout.split("\n")[:-1]) == told
    letters = list(penstock.dead(path))
    assert [(letter.key, letter.state) for letter in letters] == (
        [(0, "unknown"), (1, "unknown")] if on_unknown == "dead" else []
    )


def wait_for(path: str, keys: set[int]) -> None:
    """Until these are done, as another process sees it."""
    deadline = time.monotonic() + 60
    while not keys <= {key for key, end in in_the_file(path)[0].items() if end.state == State.DONE}:
        assert time.monotonic() < deadline
        time.sleep(0.01)
