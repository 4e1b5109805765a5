"""The books of a run: what is counted, what is kept, and that they cannot be cooked."""

import csv
import dataclasses
import json
import math
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import (
    Executor,
    FailureKind,
    HttpStatusError,
    InternalError,
    JournalError,
    Outcome,
    Report,
    UsageError,
    classify,
)
from penstock.errors import RecordedError, SkipItem, first_line
from penstock.report import (
    ALL_FAILED,
    BUDGET_REACHED,
    INTERRUPTED,
    KNOWN_CAUSES,
    MOST_CAUSES,
    TIME_UP,
    TOO_MANY_ERRORS,
    Cause,
    Tally,
)


def done(ran: float = 0.0, attempts: int = 0) -> Outcome[Any]:
    return Outcome("k", "item", 1, None, None, attempts, 0.0, ran)


def failed(error: Exception, key: object = None, attempts: int = 0) -> Outcome[Any]:
    return Outcome(key, "item", None, error, classify(error), attempts, 0.0, 0.0)


def skipped(attempts: int = 0) -> Outcome[Any]:
    return Outcome("k", "item", None, SkipItem("no address"), None, attempts, 0.0, 0.0)


def replayed(outcome: Outcome[Any]) -> Outcome[Any]:
    return outcome._replace(replayed=True)


def report_of(*outcomes: Outcome[Any], left: int = 0, stopped: str | None = None) -> Report:
    tally = Tally()
    for outcome in outcomes:
        tally.add(outcome)
    return tally.report(read=len(outcomes) + left, left=left, stopped=stopped, elapsed=1.0)


ERRORS = st.sampled_from([ValueError("a"), ValueError("b"), KeyError("c"), TimeoutError(), OSError("d\nmore")])
OUTCOMES = st.lists(
    st.one_of(
        st.builds(done, ran=st.floats(0, 1e6), attempts=st.integers(0, 5)),
        st.builds(failed, error=ERRORS, key=st.integers(), attempts=st.integers(0, 5)),
        st.builds(skipped, attempts=st.integers(0, 5)),
    )
)


# --- counting ---


@given(outcomes=OUTCOMES, left=st.integers(0, 10))
def test_every_outcome_is_counted_exactly_once(outcomes: list[Outcome[Any]], left: int) -> None:
    """By state, by kind and by cause; attempts are those of all jobs, durations those of the successful ones."""
    report = report_of(*outcomes, left=left)
    report.verify()
    bad = [outcome for outcome in outcomes if outcome.kind is not None]
    assert (report.done, report.failed, report.left) == (sum(outcome.ok for outcome in outcomes), len(bad), left)
    assert report.skipped == len(outcomes) - report.done - report.failed
    assert report.kinds == Counter(outcome.kind for outcome in bad)
    assert sum(cause.count for cause in report.causes) == len(bad)
    assert report.attempts == sum(outcome.attempts for outcome in outcomes)
    assert report.ran.count == report.done


@given(outcomes=OUTCOMES)
def test_causes_are_sorted_and_each_is_told_once(outcomes: list[Outcome[Any]]) -> None:
    """The most frequent first, of equally frequent ones the one that came first; each with its first key."""
    causes = report_of(*outcomes).causes
    told = [(cause.kind, cause.error) for cause in causes]
    assert len(set(told)) == len(told)
    bad = [o for o in outcomes if o.kind is not None]
    in_order_of_coming = [(o.kind, first_line(o.error)) for o in bad if o.error is not None]
    assert told == [cause for cause, _ in Counter(in_order_of_coming).most_common()]
    for cause in causes:
        first = next(o for o in bad if o.error is not None and (o.kind, first_line(o.error)) == told[0])
        assert cause.example_key == first.key
        told.pop(0)


def test_a_cause_is_kind_class_and_first_line_with_an_example() -> None:
    report = report_of(failed(ValueError("bad id\ndetails 1"), key=7), failed(ValueError("bad id\ndetails 2"), key=8))
    assert report.causes == (Cause(FailureKind.PERMANENT, "ValueError: bad id", 2, 7),)


def test_memory_is_bounded_when_every_error_has_a_message_of_its_own() -> None:
    """Causes beyond the first thousand are counted by kind only; those that are known go on being counted."""
    tally = Tally()
    for number in range(KNOWN_CAUSES + 500):
        tally.add(failed(ValueError(f"record {in_letters(number)}"), key=number))
    for _ in range(3):
        tally.add(failed(ValueError(f"record {in_letters(5)}"), key=None))
    assert len(tally._causes) == KNOWN_CAUSES
    report = tally.report(read=KNOWN_CAUSES + 503, left=0, stopped=None, elapsed=1.0)
    report.verify()
    assert len(report.causes) == MOST_CAUSES
    assert report.causes[0] == Cause(FailureKind.PERMANENT, f"ValueError: record {in_letters(5)}", 4, 5)


def in_letters(number: int) -> str:
    """A number that does not look like one."""
    return "".join(chr(ord("a") + int(digit)) for digit in str(number))


def test_failures_that_differ_in_numbers_or_addresses_only_are_one_cause() -> None:
    """Ten thousand 404s of ten thousand addresses are one line, and the first of them is the example."""
    tally = Tally()
    for number in range(50):
        tally.add(failed(HttpStatusError(404, "GET", f"http://h/{number}"), key=number))
        tally.add(failed(HttpStatusError(410, "GET", f"http://h/{number}"), key=number))
        tally.add(failed(ValueError(f"no item {number}"), key=number))
    report = tally.report(read=150, left=0, stopped=None, elapsed=1.0)
    assert [(cause.error, cause.count, cause.example_key) for cause in report.causes] == [
        ("HttpStatusError: GET http://h/0 -> HTTP 404", 50, 0),
        ("HttpStatusError: GET http://h/0 -> HTTP 410", 50, 0),
        ("ValueError: no item 0", 50, 0),
    ]


def test_failures_of_different_requests_are_different_causes() -> None:
    """Whoever mends the first one is not to believe that all is mended. By method and path: what is asked for behind
    the "?", and what the answer says, may name the record."""
    tally = Tally()
    refused = [
        ("GET", "http://h/profile?id=a", b"'id' is missing"),
        ("GET", "http://h/profile?id=b", b"'name' is missing"),
        ("POST", "http://h/profile", b"too long"),
        ("POST", "http://h/score/7", b"the profile does not belong to record a"),
        ("POST", "http://h/score/8", b"the profile does not belong to record b"),
    ]
    for number, (method, url, answer) in enumerate(refused):
        tally.add(failed(HttpStatusError(400, method, url, answer), key=number))
    report = tally.report(read=5, left=0, stopped=None, elapsed=1.0)
    assert [(cause.count, cause.example_key) for cause in report.causes] == [(2, 0), (2, 3), (1, 2)]


def test_a_status_that_differs_makes_another_cause() -> None:
    """Its digits tell apart, unlike those of a record's number."""
    report = report_of(*(failed(HttpStatusError(status, "GET", "http://h/1")) for status in (404, 410, 404)))
    assert [cause.count for cause in report.causes] == [2, 1]


def test_a_report_is_printed_as_a_summary() -> None:
    """Sums, speed, why it stopped, and the causes, a line each."""
    tally = Tally()
    tally.add(failed(ValueError("bad"), key="k", attempts=3))
    report = tally.report(read=3, left=2, stopped="interrupted", elapsed=0.5)
    assert str(report).splitlines() == [
        "read 3 = done 0 + failed 1 + left 2, 1 permanent",
        "0.5 s, 2 jobs/s, 3 attempts",
        "stopped early: interrupted",
        "1 x ValueError: bad (first: 'k')",
    ]
    assert "0 jobs/s" in str(Tally().report(read=0, left=0, stopped=None, elapsed=0.0))


@given(
    outcomes=st.lists(
        st.tuples(st.sampled_from([done(2.0, 3), failed(KeyError(), attempts=3), skipped(3)]), st.booleans())
    )
)
def test_what_an_earlier_run_recorded_counts_as_what_it_is_but_not_as_work_of_this_one(
    outcomes: list[tuple[Outcome[Any], bool]],
) -> None:
    """States, kinds and causes are those of the whole job; attempts and durations those of this run."""
    mixed = report_of(*(replayed(outcome) if old else outcome for outcome, old in outcomes))
    mixed.verify()
    plain = report_of(*(outcome for outcome, _ in outcomes))
    for same in ("done", "failed", "skipped", "kinds", "causes"):
        assert getattr(mixed, same) == getattr(plain, same)
    fresh = [outcome for outcome, old in outcomes if not old]
    assert mixed.replayed == len(outcomes) - len(fresh)
    assert mixed.attempts == 3 * len(fresh)
    assert mixed.ran.count == sum(outcome.ok for outcome in fresh)


def test_a_recorded_failure_and_a_fresh_one_are_one_cause() -> None:
    """By HTTP status and by message; the error of the earlier run is told of, not the one that stands for it."""
    tally = Tally()
    tally.add(replayed(failed(RecordedError("penstock.errors.HttpStatusError", "GET http://h/1 -> HTTP 404", 404))))
    tally.add(failed(HttpStatusError(404, "GET", "http://h/2")))
    tally.add(replayed(failed(RecordedError("builtins.ValueError", "no item 1"))))
    tally.add(failed(ValueError("no item 2")))
    report = tally.report(read=4, left=0, stopped=None, elapsed=1.0)
    assert [(cause.error, cause.count) for cause in report.causes] == [
        ("HttpStatusError: GET http://h/1 -> HTTP 404", 2),
        ("ValueError: no item 1", 2),
    ]


def test_items_that_were_there_twice_are_skipped_on_top_of_those_that_said_so() -> None:
    """No outcome was added for them: whoever left them out tells how many they were."""
    tally = Tally()
    tally.add(skipped())
    tally.add(done())
    report = tally.report(read=5, left=0, skipped=3, stopped=None, elapsed=1.0)
    report.verify()
    assert report.skipped == 4


def test_a_report_is_printed_with_what_only_some_runs_have() -> None:
    """What was skipped, recorded earlier, spent, why it stopped, and where the journal is: where there is any."""
    tally = Tally()
    tally.add(replayed(done()))
    tally.add(skipped())
    tally.add(done(attempts=2))
    report = tally.report(
        read=1203, left=1200, stopped=BUDGET_REACHED, why="10 USD are gone", elapsed=0.5,
        spent={"usd": 10.02, "tokens": 1_000_812.0}, journal="run.db",
    )  # fmt: skip
    assert str(report).splitlines() == [
        "read 1,203 = done 2 + failed 0 + skipped 1 + left 1,200",
        "0.5 s, 4 jobs/s, 2 attempts",
        "recorded by earlier runs: 1",
        "spent: usd 10.02, tokens 1,000,812",
        "stopped early: a budget was reached: 10 USD are gone",
        "journal: run.db",
    ]


def test_what_was_spent_later_does_not_change_a_report() -> None:
    """A thread that was left behind may still spend."""
    spent = {"usd": 1.0}
    report = Tally().report(read=0, left=0, stopped=None, elapsed=0.0, spent=spent)
    spent["usd"] = 2.0
    assert report.spent == {"usd": 1.0}


def test_a_report_does_not_change_when_counting_goes_on() -> None:
    tally = Tally()
    tally.add(failed(ValueError()))
    report = tally.report(read=1, left=0, stopped=None, elapsed=1.0)
    tally.add(failed(ValueError()))
    report.verify()
    assert report.kinds == {FailureKind.PERMANENT: 1}
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.done = 5  # type: ignore[misc]


def test_a_report_survives_pickling() -> None:
    report = report_of(done(0.5), failed(KeyError("id"), key=3), left=1, stopped=INTERRUPTED)
    assert pickle.loads(pickle.dumps(report)) == report


# --- verify ---


BOOKS = report_of(done(), replayed(done()), failed(ValueError("x")), failed(KeyError("y")), skipped(), left=3)


def test_books_that_add_up_verify() -> None:
    BOOKS.verify()
    report_of().verify()


@pytest.mark.parametrize(
    "cooked",
    [
        {"read": 9},
        {"read": 7},
        {"done": 1},
        {"done": 3},
        {"failed": 3},
        {"left": 0},
        {"skipped": 0},
        {"skipped": 2},
        {"skipped": 2, "done": 1, "left": 3, "kinds": {}},
        {"replayed": 6},
        {"done": 3, "failed": 1},
        {"done": 4, "failed": 0},
        {"kinds": {}},
        {"kinds": {FailureKind.BUG: 3}},
        {"causes": (Cause(FailureKind.BUG, "KeyError", 3, None),)},
    ],
    ids=str,
)
def test_cooked_books_do_not_verify(cooked: dict[str, Any]) -> None:
    """One number changed, an item in two states, a failure without a kind: it says so, and whose fault it is."""
    with pytest.raises(InternalError, match=r"items do not add up: read \d.*bug in penstock, please report it"):
        dataclasses.replace(BOOKS, **cooked).verify()


def test_keys_are_known_to_a_journal_alone() -> None:
    with pytest.raises(UsageError, match="a run without a journal: nothing knows which keys it had"):
        BOOKS.verify(keys=[1, 2, 3])


# --- item by item ---


@pytest.mark.virtual_clock
async def test_a_report_tells_of_each_item_in_a_file(tmp_path: Path) -> None:
    """A line for each, with what became of it; those of earlier runs on the journal are among them."""

    async def job(item: object) -> object:
        if item == "dead":
            raise ValueError("bad, because:\nmany lines")
        if item == "skipped":
            raise SkipItem("of no use")
        return item

    journal, file = tmp_path / "run.db", tmp_path / "report.csv"
    async with Executor() as executor:
        await executor.run(job, ["earlier"], key=str, journal=journal)
        report = await executor.run(job, ["dead", "skipped", 7], key=lambda item: item, journal=journal)
    assert report.write_csv(file) == 4
    with file.open(newline="", encoding="utf-8") as lines:
        found = {line["key"]: line for line in csv.DictReader(lines)}
    assert {key: line["state"] for key, line in found.items()} == {
        "earlier": "done", "dead": "dead", "skipped": "skipped", "7": "done",
    }  # fmt: skip
    assert {key: line["run"] for key, line in found.items()} == {"earlier": "1", "dead": "2", "skipped": "2", "7": "2"}
    assert (found["dead"]["error"], found["dead"]["kind"]) == ("ValueError", "permanent")
    assert found["dead"]["message"] == "bad, because:\nmany lines"
    with pytest.raises(FileNotFoundError):
        report.write_csv(tmp_path / "nowhere" / "report.csv")
    journal.unlink()
    with pytest.raises(JournalError, match=r"run\.db"):
        report.write_csv(file)


def test_without_a_journal_nothing_is_known_of_each_item(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a run without a journal, so nothing is known of each item"):
        BOOKS.write_csv(tmp_path / "report.csv")
    assert list(tmp_path.iterdir()) == []


# --- exit code ---


@pytest.mark.parametrize(
    ("report", "code"),
    [
        (report_of(), 0),
        (report_of(done()), 0),
        (report_of(done(), failed(ValueError())), 5),
        (report_of(done(), left=1), 5),
        (report_of(done(), skipped(), replayed(done())), 0),
        (report_of(replayed(failed(ValueError()))), 5),
        (report_of(failed(ValueError()), left=1, stopped=ALL_FAILED), 8),
        (report_of(done(), left=1, stopped=BUDGET_REACHED), 8),
        (report_of(done(), left=1, stopped=TIME_UP), 10),
        (report_of(done(), stopped="of a later version"), 130),
        (report_of(failed(ValueError()), stopped=TOO_MANY_ERRORS), 8),
        (report_of(done(), left=1, stopped=TOO_MANY_ERRORS), 8),
        (report_of(done(), stopped=INTERRUPTED), 130),
        (report_of(failed(ValueError()), left=2, stopped=INTERRUPTED), 130),
    ],
)
def test_a_script_can_exit_with_what_happened(report: Report, code: int) -> None:
    """What ended the run early says more than what failed in it."""
    assert report.exit_code == code


# --- JSON ---


class Uncopyable:
    """As keys that hold a connection or a lock."""

    def __deepcopy__(self, _memo: object) -> None:
        raise TypeError("cannot be copied")

    def __repr__(self) -> str:
        return "<a key>"


def test_a_report_as_json_holds_all_of_it() -> None:
    """Under the names of its fields, and the exit code beside them: for whoever starts runs and is no Python."""
    tally = Tally()
    tally.add(done(ran=0.5, attempts=1))
    tally.add(failed(ValueError("bad"), key=7))
    report = tally.report(
        read=2, left=0, stopped=TIME_UP, why="it was late", elapsed=1.5, spent={"usd": 0.5}, journal="run.db"
    )
    told = json.loads(report.to_json())
    assert told == {
        "read": 2, "done": 1, "failed": 1, "skipped": 0, "left": 0, "replayed": 0, "stopped": "time was up",
        "why": "it was late", "exit_code": 10, "kinds": {"permanent": 1}, "attempts": 1, "elapsed": 1.5,
        "causes": [{"kind": "permanent", "error": "ValueError: bad", "count": 1, "example_key": 7}],
        "ran": dataclasses.asdict(report.ran), "spent": {"usd": 0.5}, "journal": "run.db", "duplicates": 0,
    }  # fmt: skip
    assert set(told) == {field.name for field in dataclasses.fields(Report)} | {"exit_code"}


def test_a_report_as_json_is_json_for_everybody() -> None:
    """No NaN for the times of no jobs, no infinity, and no line break, whatever the keys are."""
    tally = Tally()
    for number, key in enumerate([Uncopyable(), ("a", 1), math.nan, b"x", "a\nb", True, 2.5]):
        tally.add(failed(ValueError(in_letters(number)), key=key))
    report = tally.report(read=7, left=0, stopped=None, elapsed=0.0, spent={"usd": math.inf})
    text = report.to_json()
    told = json.loads(text, parse_constant=pytest.fail)
    assert "\n" not in text
    assert [cause["example_key"] for cause in told["causes"]] == [
        "<a key>", "('a', 1)", None, "b'x'", "a\nb", True, 2.5,
    ]  # fmt: skip
    assert told["ran"]["mean"] is None
    assert told["spent"] == {"usd": None}
    assert told["exit_code"] == 5


# --- first_line ---


class Unshowable(Exception):
    """As classes that read an attribute of a response that never came."""

    def __str__(self) -> str:
        raise AttributeError("'NoneType' object has no attribute 'status'")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("bad id"), "ValueError: bad id"),
        (ValueError("bad id\nand more"), "ValueError: bad id"),
        (ValueError("\n\n  bad id"), "ValueError: bad id"),
        (ValueError(), "ValueError"),
        (TimeoutError(), "TimeoutError"),
        (UsageError("x"), "UsageError: x"),
        (Unshowable(), "Unshowable: <its __str__ raised an error>"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_is_told_in_one_line(error: Exception, line: str) -> None:
    """Also one whose class cannot be shown: that mistake must not end a run of a million items."""
    assert first_line(error) == line


@pytest.mark.parametrize("length", [187, 188, 189, 10_000])
def test_a_line_that_is_cut_says_so(length: int) -> None:
    """By an ellipsis within the 200 characters; one that just fits is whole."""
    line = first_line(ValueError("x" * length))
    whole = f"ValueError: {'x' * length}"
    assert line == (whole if len(whole) <= 200 else f"{whole[:197]}...")
    assert len(line) <= 200


@given(st.text())
def test_the_line_is_one_line_and_short_whatever_the_message_is(message: str) -> None:
    line = first_line(ValueError(message * 10))
    assert line.startswith("ValueError")
    assert len(line) <= 200
    assert len(line.splitlines()) == 1
