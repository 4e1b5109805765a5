"""A program that is killed and started again, and what is known of each of its lives.

Life    one process of `program_to_kill.py`: what it told, and what its journal held when it was over
Lives   all of them, one after the other, on one journal and one service
"""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from penstock.journal.schema import State

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Iterator, Sequence
    from typing import IO

    from service import Call, EmbeddedService

PROGRAM = Path(__file__).with_name("program_to_kill.py")
BOUND = 40.0
"""Seconds after which a program that should have ended is killed."""
GLANCE = 0.002
"""Seconds between two looks at what a program has told."""

Outcomes = dict[int, str]
"""State by key."""


class Life:
    """One process of the program. What it tells goes to files: a pipe would lose what its reader has not yet read."""

    def __init__(self, folder: Path, name: str, flags: Sequence[str], **keywords: Any) -> None:
        self.name = name
        self.fresh: Outcomes = {}
        self.replayed: Outcomes = {}
        self.begun = False
        self.account: dict[str, Any] = {}
        self.killed_at: float | None = None
        """On `time.monotonic()`, as the service's log."""
        self.recorded: Outcomes = {}
        """What the journal held when this life was over."""
        self.steps: set[tuple[int, str]] = set()
        """The same of the steps: key and name."""
        self._told = folder / f"{name}.told"
        self._said = folder / f"{name}.said"
        command = [sys.executable, "-W", "error", str(PROGRAM), f"--name={name}", *flags]
        with self._told.open("wb") as told, self._said.open("wb") as said:
            self.process = subprocess.Popen(command, stdout=told, stderr=said, **keywords)
        self._read: IO[bytes] = self._told.open("rb")
        self._rest = b""

    def look(self) -> None:
        """Read what it has told since; twice the same outcome in one life is a fault."""
        *lines, self._rest = (self._rest + self._read.read()).split(b"\n")
        for line in lines:
            if line == b"begin":
                self.begun = True
            elif line.startswith(b"{"):
                self.account = json.loads(line)
            else:
                key, state, how = line.decode().split()
                assert int(key) not in self.fresh.keys() | self.replayed.keys(), f"{self.name}: {key} came twice"
                (self.fresh if how == "fresh" else self.replayed)[int(key)] = state

    def until(self, condition: Callable[[], object]) -> bool:
        """Wait for it; False if the program has ended before."""
        deadline = time.monotonic() + BOUND
        while True:
            self.look()
            if condition():
                return True
            if not self.runs_on(GLANCE):
                return False
            assert time.monotonic() < deadline, self.said()

    def runs_on(self, seconds: float) -> bool:
        """Wait so long; whether it has not ended by itself."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return True
        return False

    def said(self) -> str:
        return self._said.read_text("utf-8")

    def send(self, number: signal.Signals) -> None:
        """A signal after which it goes on for a while; wait until it has said that it was heard."""
        heard = self.said().count("interrupted")
        self.process.send_signal(number)
        self.until(lambda: self.said().count("interrupted") > heard)

    def kill(self) -> None:
        self.killed_at = time.monotonic()
        self.process.kill()

    def ended(self) -> int:
        """Its exit status, once all that it has told is read. A traceback or a warning is a fault."""
        status = self.process.wait(BOUND)
        self.look()
        assert not any(word in self.said() for word in ("Traceback", "Warning", "Exception ignored")), self.said()
        return status

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._read.close()


class Lives:
    """The lives of one run, whose journal lies in `folder` unless it is given."""

    def __init__(self, folder: Path, service: EmbeddedService, *flags: str, journal: Path | None = None) -> None:
        self.journal = journal or folder / "run.db"
        self.all: list[Life] = []
        self._folder = folder
        self._service = service
        self._flags = [service.url, str(self.journal), *flags]

    def __enter__(self) -> Lives:
        return self

    def __exit__(self, *_: object) -> None:
        for life in self.all:
            life.close()

    def begin(self, *flags: str, **keywords: Any) -> Life:
        """Start the program, as one that nothing but the journal tells of its earlier lives."""
        life = Life(self._folder, f"life-{len(self.all) + 1}", [*self._flags, *flags], **keywords)
        self.all.append(life)
        return life

    def end(self, life: Life) -> int:
        """Wait for its end, and look into the journal; the exit status."""
        status = life.ended()
        life.recorded, life.steps = recorded(self.journal), steps(self.journal)
        return status

    def calls(self) -> dict[str, list[Call]]:
        """What the service was asked, by life. To be read at the end: a request may outlive its sender."""
        found: dict[str, list[Call]] = {life.name: [] for life in self.all}
        for call in self._service.calls():
            found[call.caller].append(call)
        return found

    def asked(self) -> list[set[int]]:
        """The items that the service was asked about, life by life."""
        calls = self.calls()
        return [{item_of(call) for call in calls[life.name]} for life in self.all]


def check_outcomes(lives: Lives, items: int) -> None:
    """None lost, none duplicated, none missing, none changed."""
    known: Outcomes = {}
    for life in lives.all:
        # What was there at its start is there at its end, and comes out of it as what it is.
        assert life.replayed.items() <= known.items()
        assert life.recorded.items() >= known.items()
        # Fresh is only what was not there; and what was delivered was recorded before.
        assert not life.fresh.keys() & known.keys()
        assert life.recorded.items() >= life.fresh.items()
        known = life.recorded
    assert known.keys() == set(range(1, items + 1))
    assert lives.all[-1].fresh | lives.all[-1].replayed == known


def item_of(call: Call) -> int:
    return int(call.record_id.partition("/")[0])


def step_of(call: Call) -> str:
    if call.route == "/api2":
        return "score"
    return "check" if call.record_id.endswith("/check") else "profile"


def answers(calls: Sequence[Call]) -> dict[tuple[int, str], float]:
    """The steps that the service has answered well, and when it was asked for that."""
    return {(item_of(call), step_of(call)): call.at for call in calls if call.ending == "answer"}


# --- the journal, as somebody sees it who knows SQL and no penstock ---


def rows(path: Path, query: str) -> list[tuple[Any, ...]]:
    """Read only: what a killed program has left behind must be there for its next life."""
    if not path.exists():
        return []
    with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=BOUND)) as connection:
        if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'item'").fetchone() is None:
            return []
        return connection.execute(query).fetchall()


def recorded(path: Path) -> Outcomes:
    found: dict[int, list[str]] = defaultdict(list)
    for key, state in rows(path, "SELECT key, state FROM item"):
        found[key].append(State(state).name.lower())
    assert all(len(states) == 1 for states in found.values()), "an item has two rows"
    return {key: states[0] for key, states in found.items()}


def steps(path: Path) -> set[tuple[int, str]]:
    return {(key, name) for key, name in rows(path, "SELECT key, name FROM step")}


# --- somebody else ---

LOCKER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], timeout=20.0, isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.read()
connection.execute("ROLLBACK")
connection.close()
"""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another program has begun a transaction, and forgets to end it until the block does."""
    command = [sys.executable, "-c", LOCKER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as locker:
        assert locker.stdin is not None
        assert locker.stdout is not None
        try:
            assert locker.stdout.readline() == b"locked\n"
            yield
        finally:
            locker.stdin.close()
            locker.wait(BOUND)
