"""The command line: what it says of a journal, what it does to one, and how it ends."""

import csv
import io
import json
import os
import pickle
import runpy
import signal
import socket
import sqlite3
import subprocess
import sys
from base64 import b64decode
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from penstock import cli
from penstock.cli import main
from penstock.journal.database import open_to_write, version_of_penstock
from penstock.journal.lock import Lock
from penstock.journal.reading import Reading
from penstock.journal.schema import INLINE_BYTES, ITEM_COLUMNS, Row, State, checksum, lock_of, side_file_of
from penstock.journal.side_file import SideFile

RECORDED = 1_767_225_600.25  # 2026-01-01
FINGERPRINT = '{"job": "score", "version": "2", "params": {"model": "x"}, "codec": "json"}'
COMMAND = [sys.executable, "-m", "penstock"]

WRITER = """
import os, sys
from penstock.journal.database import open_to_write
from penstock.journal.lock import Lock
from penstock.journal.schema import ITEM_COLUMNS, Row, checksum
path = sys.argv[1]
lock = Lock(path)
lock.take()
connection = open_to_write(path, full_sync=False)
connection.execute("INSERT INTO run(started, host, pid) VALUES (1.5, 'here', ?)", (os.getpid(),))
def write(key):
    row = Row(key, 1, 1, 1, 1.5, 0.0, 0.0, result="7")
    columns, marks = ", ".join((*ITEM_COLUMNS, "crc")), ", ".join("?" * (len(row) + 1))
    connection.execute(f"INSERT INTO item({columns}) VALUES ({marks})", (*row, checksum(row)))
for key in range(3):
    write(key)
print("written", flush=True)
for line in sys.stdin:
    write("later")
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "run.db")


def row(key: str | int | bytes | None, state: State, **more: Any) -> Row:
    return Row(key, int(state), 1, 1, RECORDED, 0.0, 0.0)._replace(**more)


def failed(key: str | None, message: str = "no", **more: Any) -> Row:
    told = {"kind": "permanent", "error": "m.Refused", "message": message, "input": '{"id": 1}', "status": 422}
    return row(key, State.DEAD, **(told | more))


@contextmanager
def run(path: str, stopped: str | None = None) -> Iterator[sqlite3.Connection]:
    """One that holds the lock, has begun, and ends with the block."""
    lock = Lock(path)
    lock.take()
    with closing(open_to_write(path, full_sync=False)) as connection:
        begun = connection.execute(
            "INSERT INTO run(started, host, pid, fingerprint) VALUES (?, 'here', 7, ?)", (RECORDED, FINGERPRINT)
        )
        yield connection
        ended = (RECORDED + 1, stopped, begun.lastrowid)
        connection.execute("UPDATE run SET ended = ?, stopped = ? WHERE id = ?", ended)
    lock.release()


def record(path: str, rows: Iterable[Row], stopped: str | None = None) -> None:
    """As a run of one commit does."""
    with run(path, stopped) as connection:
        connection.execute("BEGIN")
        for row in rows:
            columns, marks = ", ".join((*ITEM_COLUMNS, "crc")), ", ".join("?" * (len(row) + 1))
            connection.execute(f"INSERT INTO item({columns}) VALUES ({marks})", (*row, checksum(row)))
        connection.execute("COMMIT")


def change(path: str, statement: str) -> None:
    """As no run does."""
    with closing(open_to_write(path, full_sync=False)) as connection:
        connection.execute(statement)


def lines_of(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


# --- status ---


def test_status_tells_what_there_is(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What the journal is, how far it is, what was spent, how the last run ended, and why items are dead."""
    done = [row(key, State.DONE, result="1", spent='{"usd": 0.5, "tokens": 1500}') for key in range(1500)]
    record(
        path, [*done, failed("a"), failed("b"), failed("c", "else", status=None, kind=None), row("s", State.SKIPPED)]
    )
    record(path, [], stopped="interrupted")
    assert main(["status", path]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"journal   {path}, made by penstock ")
    assert lines[1:-3] == [
        "job       score",
        "version   2",
        'params    {"model": "x"}',
        "done      1,500",
        "dead      3",
        "skipped   1",
        "spent     2,250,000 tokens, 750 usd",
        "runs      2",
    ]
    assert lines[-3] == (
        "last run  began 2026-01-01T00:00:00.250Z, ended 2026-01-01T00:00:01.250Z, stopped: interrupted"
    )
    assert lines[-2:] == [
        "causes    2 x permanent: Refused: no (first: 'a')",
        "          1 x Refused: else (first: 'c')",
    ]


def test_status_tells_whether_a_run_goes_on(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Or has come to its end, or was killed, or whether none has begun."""
    with run(path):
        assert main(["status", path]) == 0
        assert "goes on, process 7 on host here\n" in capsys.readouterr().out
    assert main(["status", path]) == 0
    assert "came to the end of its items" in capsys.readouterr().out
    for statement, told in (("UPDATE run SET ended = NULL", "its process died"), ("DELETE FROM run", "runs      0")):
        change(path, statement)
        assert main(["status", path]) == 0
        assert told in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="elsewhere nobody is asked whether a process lives")
def test_status_does_not_say_of_a_dead_process_that_it_goes_on(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Though somebody has the lock: who begins, and checks the file first, or who compacts it."""
    record(path, [])
    lock = Lock(path)
    change(path, f"UPDATE run SET ended = NULL, host = '{socket.gethostname()}', pid = {2**31 - 1}")
    lock.take()
    busy = "; somebody opens the journal now, or works on it\n"
    assert main(["status", path]) == 0
    assert f"died (process 2147483647 on host {socket.gethostname()}){busy}" in capsys.readouterr().out
    change(path, "UPDATE run SET ended = 1.5")
    assert main(["status", path]) == 0
    assert f"came to the end of its items{busy}" in capsys.readouterr().out
    lock.release()
    assert main(["status", path]) == 0
    assert "came to the end of its items\n" in capsys.readouterr().out


# --- report, dead, export ---


def test_report_has_a_line_for_each_item(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    """CSV, unless JSON is asked for."""
    record(path, [row("a", State.DONE, result="1"), failed("b")])
    assert main(["report", path]) == 0
    found = list(csv.DictReader(io.StringIO(capsys.readouterr().out, newline="")))
    assert [(line["key"], line["state"]) for line in found] == [("a", "done"), ("b", "dead")]
    assert main(["report", path, "--format", "jsonl"]) == 0
    assert [line["key"] for line in lines_of(capsys.readouterr().out)] == ["a", "b"]


def test_dead_has_a_line_for_each_dead_letter(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With its input as JSON, or else as it is recorded; the service's answer as text, if it is any."""
    record(
        path,
        [
            row("done", State.DONE, result="1"),
            failed("a", answer=b"sorry"),
            row("b", State.UNKNOWN, input=b"\x80", answer=b"\xff"),
            failed(None, input=None, shown_input="{1}"),
        ],
    )
    assert main(["dead", path]) == 0
    first, second, third = lines_of(capsys.readouterr().out)
    assert first == {
        "key": "a", "state": "dead", "kind": "permanent", "error": "m.Refused", "status": 422, "message": "no",
        "attempts": 1, "recorded": "2026-01-01T00:00:00.250Z", "input": {"id": 1}, "shown_input": None,
        "answer": "sorry",
    }  # fmt: skip
    assert (second["state"], b64decode(second["input_base64"]), b64decode(second["answer_base64"])) == (
        "unknown", b"\x80", b"\xff",
    )  # fmt: skip
    assert (third["key"], third["input"], third["shown_input"]) == (None, None, "{1}")
    assert main(["dead", path, "--format", "csv"]) == 0
    header, row_a, *_ = csv.reader(io.StringIO(capsys.readouterr().out, newline=""))
    assert tuple(header) == cli.DEAD_COLUMNS
    assert row_a[header.index("input")] == '{"id": 1}'


@pytest.mark.parametrize("codec", [None, "json", "pickle"])
def test_a_large_input_is_shown_from_the_side_file(
    path: str, codec: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever wrote it."""
    item = "é" * INLINE_BYTES
    data = pickle.dumps(item) if codec == "pickle" else json.dumps(item).encode()
    file = SideFile(side_file_of(path))
    offset, size, crc = file.append(data)
    file.close()
    place: dict[str, Any] = {"file_offset": offset, "file_size": size, "file_crc": crc}
    record(path, [failed("a", input=b"" if codec == "pickle" else "", **place)])
    assert main(["dead", path, *(["--codec", codec] if codec else [])]) == 0
    (line,) = lines_of(capsys.readouterr().out)
    assert line["input"] == item


def test_export_has_a_line_for_each_result(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Values as JSON, or else as they are recorded. What is not done has no result."""
    pickled = pickle.dumps({1})
    record(
        path,
        [
            row("a", State.DONE, result='{"x": "\u2028"}'),
            row(b"b", State.DONE, result=pickled),
            row("c", State.DONE, result="[NaN, no"),
            failed("d"),
        ],
    )
    assert main(["export", path]) == 0
    out, err = capsys.readouterr()
    first, second, third = lines_of(out)
    assert err == ("penstock: 2 values are no JSON: base64 of what is recorded. Give --codec, that of the run\n")
    assert first == {"key": "a", "value": {"x": "\u2028"}}
    assert (b64decode(second["key_base64"]), b64decode(second["value_base64"])) == (b"b", pickled)
    assert b64decode(third["value_base64"]) == b"[NaN, no"
    assert main(["export", path, "--format", "csv"]) == 0
    found = list(csv.DictReader(io.StringIO(capsys.readouterr().out, newline="")))
    assert json.loads(found[0]["value"]) == {"x": "\u2028"}
    assert b64decode(found[1]["value_base64"]) == pickled


def test_values_are_read_by_the_codec_that_is_named(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A module, or something in one, of the working directory too. What has no form in JSON stays as it is recorded."""
    pickled = pickle.dumps(1j)
    record(path, [row("a", State.DONE, result=pickle.dumps((1, "x"))), row("b", State.DONE, result=pickled)])
    (tmp_path / "our_codec.py").write_text("import pickle\nclass Ours:\n    loads = staticmethod(pickle.loads)\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    for codec in ("pickle", "our_codec:Ours"):
        assert main(["export", path, "--codec", codec]) == 0
        out, err = capsys.readouterr()
        first, second = lines_of(out)
        assert first == {"key": "a", "value": [1, "x"]}
        assert b64decode(second["value_base64"]) == pickled
        assert err == "penstock: 1 values hold what has no form in JSON: base64 of what is recorded\n"
    assert sys.path == before
    del sys.modules["our_codec"]


def test_values_that_json_does_not_know_are_shown_as_it_can(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As text, objects and lists, in CSV too: what a codec such as pickle was chosen for."""
    value = {"when": datetime(2026, 1, 2, tzinfo=UTC), "price": Decimal("1.10"), "tags": {"b", "a"}, "raw": b"\xff"}
    record(path, [row("a", State.DONE, result=pickle.dumps(value)), failed("b", input=pickle.dumps(value))])
    shown = {"when": "2026-01-02T00:00:00+00:00", "price": "1.10", "tags": ["a", "b"], "raw": {"base64": "/w=="}}
    assert main(["export", path, "--codec", "pickle"]) == 0
    assert main(["dead", path, "--codec", "pickle"]) == 0
    out, err = capsys.readouterr()
    exported, letter = lines_of(out)
    assert exported["value"] == shown == letter["input"]
    assert err == ""
    assert main(["export", path, "--codec", "pickle", "--format", "csv"]) == 0
    (line,) = csv.DictReader(io.StringIO(capsys.readouterr().out, newline=""))
    assert json.loads(line["value"]) == shown


def test_nan_is_told_of(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It is written as Python writes it, which others refuse; a null would be another value."""
    record(path, [row("a", State.DONE, result="[NaN, 1]"), row("b", State.DONE, result="1")])
    assert main(["export", path]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == '{"key": "a", "value": [NaN, 1]}'
    assert err == "penstock: 1 values hold NaN or infinities, which strict JSON refuses\n"


def test_a_number_that_python_would_not_write_stays_as_it_is_recorded(
    path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of more digits than it converts."""
    record(path, [row("a", State.DONE, result=pickle.dumps(10**5000))])
    assert main(["export", path, "--codec", "pickle"]) == 0
    (line,) = lines_of(capsys.readouterr().out)
    assert b64decode(line["value_base64"]) == pickle.dumps(10**5000)


def test_a_class_of_the_working_directory_is_found(path: str, tmp_path: Path) -> None:
    """By the command of an installed package too, which does not look there by itself."""
    (tmp_path / "our_types.py").write_text("import dataclasses\n@dataclasses.dataclass\nclass Price:\n    total: int\n")
    write = "import our_types, pickle, sys; sys.stdout.buffer.write(pickle.dumps(our_types.Price(7)))"
    pickled = subprocess.run([sys.executable, "-c", write], cwd=tmp_path, capture_output=True, check=True, timeout=20)
    record(path, [row("a", State.DONE, result=pickled.stdout)])
    command = "import sys; sys.path.remove(''); from penstock.cli import main; sys.exit(main())"
    ended = subprocess.run(
        [sys.executable, "-c", command, "export", path, "--codec", "pickle"],
        cwd=tmp_path, capture_output=True, text=True, timeout=20,
    )  # fmt: skip
    assert (ended.returncode, lines_of(ended.stdout)) == (0, [{"key": "a", "value": {"total": 7}}])


def test_a_class_of_the_script_itself_is_told_from_a_wrong_codec(
    path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The codec was right: what has to be done is something else."""
    (tmp_path / "script.py").write_text(
        "import pickle, sys\nclass Price:\n    pass\nsys.stdout.buffer.write(pickle.dumps(Price()))\n"
    )
    pickled = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, check=True, timeout=20)
    record(path, [row("a", State.DONE, result=pickled.stdout)])
    assert main(["export", path, "--codec", "pickle"]) == 1
    err = capsys.readouterr().err
    assert "--codec pickle cannot read the result of 'a' (AttributeError" in err
    assert "belongs to __main__" in err
    assert "put it into a module" in err


@pytest.mark.parametrize(
    ("codec", "told"),
    [
        ("nowhere", "ModuleNotFoundError: No module named 'nowhere'. Expected module or module:name"),
        ("json:nothing", "AttributeError"),
        ("", "Expected module or module:name"),
        ("math", "has no loads"),
        ("pickle", "cannot read the result of 'a' (TypeError"),
    ],
)
def test_a_codec_that_cannot_be_used_is_refused(
    path: str, codec: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether there is none, or it is another one than the run's."""
    record(path, [row("a", State.DONE, result="1")])
    assert main(["export", path, "--codec", codec]) == 1
    assert told in capsys.readouterr().err


def test_what_is_whole_can_be_saved_from_a_damaged_journal(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Damage is an error, unless it is to be left out; then it is counted."""
    record(path, [row(key, State.DONE, result="1") for key in "abc"])
    change(path, "UPDATE item SET result = '2' WHERE key = 'b'")
    assert main(["export", path]) == 1
    assert capsys.readouterr().err.startswith(f"penstock: error: {path} is damaged: the row of 'b'")
    assert main(["export", path, "--skip-damaged"]) == 0
    out, err = capsys.readouterr()
    assert [line["key"] for line in lines_of(out)] == ["a", "c"]
    assert err == "penstock: 1 damaged items were left out\n"


# --- output ---


def test_a_file_has_its_name_once_it_is_complete(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After an error the old one is there, and nothing beside it. UTF-8, whatever the locale."""
    record(path, [failed("é")])
    output = tmp_path / "out"
    assert main(["report", path, "--output", str(output)]) == 0
    written = output.read_bytes()
    assert "é".encode() in written
    assert written.count(b"\r\n") == 2
    change(path, "UPDATE item SET message = 'else'")
    assert main(["report", path, "--output", str(output)]) == 1
    assert output.read_bytes() == written
    assert {name for name in os.listdir(tmp_path) if name.startswith("out")} == {"out"}
    assert capsys.readouterr().out == ""


def test_a_link_stays_one_and_a_device_too(path: str, tmp_path: Path) -> None:
    """What is written goes where they lead."""
    record(path, [row("a", State.DONE, result="1")])
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "file")
    assert main(["export", path, "--output", str(link)]) == 0
    assert link.is_symlink()
    assert lines_of((tmp_path / "file").read_text()) == [{"key": "a", "value": 1}]
    null = tmp_path / "null"
    null.symlink_to(os.devnull)
    assert main(["export", path, "--output", str(null)]) == 0
    assert not os.path.isfile(os.devnull)


def test_the_journal_is_not_written_over(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither it nor one of its neighbours, by whatever name."""
    record(path, [row("a", State.DONE, result="1")])
    (tmp_path / "link").symlink_to(path)
    for output in (path, f"{path}-wal", f"{path}-shm", lock_of(path), side_file_of(path), str(tmp_path / "link")):
        assert main(["export", path, "--output", output]) == 1
        assert "belongs to the journal" in capsys.readouterr().err
    with Reading(path) as reading:
        assert reading.counts()[State.DONE] == 1


# --- retry, compact ---


def test_retry_asks_for_dead_items_again(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    """All of them, or those that are said."""
    record(path, [failed("a"), failed("b", status=400), row("c", State.UNKNOWN), failed("d", status=500)])
    for options, number in ((["--where", "HTTP 422"], 1), (["--where", "HTTP 400", "--unknown"], 2), ([], 1)):
        assert main(["retry", path, *options]) == 0
        assert capsys.readouterr().out == f"{number} items will be run again by the next run on {path}\n"


def test_what_is_damaged_is_run_again_on_request(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One turned bit is no reason to begin anew."""
    record(path, [row("a", State.DONE, result="1"), row("b", State.DONE, result="1")])
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE item SET result = '2' WHERE key = 'a'")
        connection.commit()
    assert main(["export", path]) == 1
    assert "retry --damaged" in capsys.readouterr().err
    assert main(["retry", path, "--damaged"]) == 0
    assert capsys.readouterr().out == "1 items and steps that are damaged will be run again by the next run\n"
    assert main(["export", path]) == 0


def test_compact_tells_what_it_has_come_to(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Sizes before and after."""
    record(path, [])
    assert main(["compact", path]) == 0
    assert capsys.readouterr().out.startswith(f"{path}: ")


# --- how it ends ---


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "the following arguments are required: COMMAND. Try `penstock --help`."),
        (["status"], "the following arguments are required: run.db. Try `penstock status --help`."),
        (["fly", "run.db"], "invalid choice: 'fly'"),
        (["export", "run.db", "--format", "xml"], "invalid choice: 'xml'"),
        (["status", "none.db"], "none.db: does not exist."),
        (["retry", "none.db", "--where", ""], "where is empty: expected which dead items are meant"),
        (["export", "none.db", "--output", "nowhere/out"], "none.db: does not exist."),
    ],
)
def test_wrong_use_is_one_line_and_status_1(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On standard error, without a traceback."""
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("penstock: error: ")
    assert err.count("\n") == 1
    assert told in err


def test_an_output_that_cannot_be_written_is_an_error(
    path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder that there is not, or a folder itself: it is named as the user has named it."""
    record(path, [])
    output = str(tmp_path / "nowhere" / "out")
    assert main(["export", path, "--output", output]) == 1
    assert capsys.readouterr().err == (
        f"penstock: error: --output {output}: cannot be written: there is no folder {tmp_path / 'nowhere'}. Choose "
        f"another name.\n"
    )
    assert main(["export", path, "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"penstock: error: --output {tmp_path}: cannot be written: ")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is full")
def test_a_full_disk_is_an_error(path: str) -> None:
    """Though the last of it is noticed at the end: `penstock export run.db > file`, with the real command."""
    record(path, [row("a", State.DONE, result="1")])
    with open("/dev/full", "w") as file:
        ended = subprocess.run([*COMMAND, "export", path], stdout=file, stderr=subprocess.PIPE, text=True, timeout=20)
    assert ended.returncode == 1
    assert ended.stderr == "penstock: error: [Errno 28] No space left on device\n"


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """As other commands tell it."""
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"penstock {version_of_penstock()}\n"


@pytest.mark.parametrize("command", [[], ["status"], ["report"], ["dead"], ["export"], ["retry"], ["compact"]])
def test_each_command_has_a_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """That says what it does."""
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) > 5


def test_output_that_is_not_a_text_file_of_python_is_taken_as_it_is(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook."""
    record(path, [row("a", State.DONE, result="1")])
    monkeypatch.setattr(sys, "stdout", stream := io.StringIO())
    assert main(["export", path]) == 0
    assert lines_of(stream.getvalue()) == [{"key": "a", "value": 1}]


def test_ctrl_c_is_status_130(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a traceback."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "compact", interrupted)
    assert main(["compact", path]) == 130


def test_ctrl_c_ends_the_command_quietly(path: str) -> None:
    """The real one, in the middle of its output: nothing is said, and the status is the shell's."""
    record(path, (row(key, State.DONE, result=f'"{"x" * 1000}"') for key in range(1000)))
    with subprocess.Popen([*COMMAND, "export", path], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)  # while it waits: a pipe holds far less than a megabyte
        process.stdout.read()
        assert process.wait(20) == 130
        assert process.stderr.read() == b""


def test_a_closed_pipe_is_no_error(path: str) -> None:
    """`penstock export run.db | head -1`, with the real command."""
    record(path, (row(key, State.DONE, result=f'"{"x" * 1000}"') for key in range(1000)))
    with subprocess.Popen([*COMMAND, "export", path], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["key"] == 0
        process.stdout.close()
        assert process.wait(20) == 0
        assert process.stderr.read() == b""


def test_the_package_is_the_command(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m penstock`, with the arguments and the exit status of the process."""
    for status in (1, 0):
        monkeypatch.setattr(sys, "argv", ["penstock", "status", path])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("penstock", run_name="__main__")
        assert ended.value.code == status
        record(path, [])


def test_what_is_left_for_a_closed_pipe_goes_nowhere(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the interpreter would complain of it at its end."""
    record(path, [row("a", State.DONE, result="1")])
    to_read, to_write = os.pipe()
    os.close(to_read)
    with open(to_write, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["export", path]) == 0
        stream.write("more")


def test_a_journal_can_be_read_while_another_process_writes_it(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Also what that has written since; it is not held up, and upkeep is refused."""
    command = [sys.executable, "-c", WRITER, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        assert writer.stdout.readline() == "written\n"
        assert main(["status", path]) == 0
        assert f"process {writer.pid}" in capsys.readouterr().out
        with Reading(path) as reading:
            rows = reading.rows()
            assert next(rows).key == 0
            assert main(["retry", path]) == 1
            assert f"process {writer.pid}" in capsys.readouterr().err
            writer.stdin.write("more\n")
            writer.stdin.close()
            assert writer.wait(20) == 0
            assert [row.key for row in rows] == [1, 2]
    assert main(["export", path]) == 0
    assert [line["key"] for line in lines_of(capsys.readouterr().out)] == [0, 1, 2, "later"]
