"""A journal that cannot be written: nothing more is begun, what is in flight is finished, the error says what to do.

Real trouble, in real processes: a disk that is full, a limit on the size of files, a read-only mount, a lock that
another program keeps. Mounts need a root who may mount; an ordinary user gets the same from permissions.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from penstock.journal.recording import BATCH_ROWS
from service import EmbeddedService, ServiceConfig

from .lives import BOUND, Life, Lives, check_outcomes, locked

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ITEMS = 3_000
LIMIT = 32
FLAGS = (f"--items={ITEMS}", f"--limit={LIMIT}", "--held-for=0.5")
ATTEMPTS = 4
"""Of the program, for each request."""
ROOM_BYTES = 256 * 1024
"""For a journal and what belongs to it: more than it takes to begin one, less than it takes for all items."""


@pytest.fixture
def service() -> Iterator[EmbeddedService]:
    with EmbeddedService(ServiceConfig(latency=0.01, errors=0.01, drops=0.005, log=True)) as service:
        yield service


def check_stopped(lives: Lives, life: Life, service: EmbeddedService, *words: str) -> None:
    """It has ended early, in order, and says why."""
    life.until(lambda: "Nothing new is begun" in life.said())
    before = service.stats()
    assert lives.end(life) == 1, life.said()
    assert str(lives.journal) in life.said()
    for word in words:
        assert word in life.said()
    # Nothing more was begun; what was in flight was finished, with all attempts that it needed.
    after = service.stats()
    assert after["requests"]["/api1"] - before["requests"]["/api1"] <= LIMIT * ATTEMPTS
    assert after["hung_up"] == before["hung_up"]
    assert len(life.recorded) < ITEMS
    # What was delivered was recorded.
    assert life.recorded.items() >= life.fresh.items()


def check_resumed(lives: Lives) -> None:
    """Once the trouble is over, the same program comes to its end."""
    life = lives.begin()
    assert lives.end(life) == 0, life.said()
    check_outcomes(lives, ITEMS)


# --- no room ---


def mounted(*command: str) -> bool:
    """Whether this process may mount. Elsewhere, and for ordinary users, it may not."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    return subprocess.run(["mount", *command], capture_output=True, timeout=BOUND).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if not mounted("-t", "tmpfs", "-o", f"size={16 * ROOM_BYTES}", "tmpfs", str(folder)):
        pytest.skip("needs to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True, timeout=BOUND)


def test_a_full_disk_ends_the_run_in_order(tmp_path: Path, small_disk: Path, service: EmbeddedService) -> None:
    """And with room again it goes on where it was."""
    filler = small_disk / "filler"
    filler.write_bytes(bytes(15 * ROOM_BYTES))
    with Lives(tmp_path, service, *FLAGS, journal=small_disk / "run.db") as lives:
        check_stopped(lives, lives.begin(), service, "the disk is full", "Make room")
        assert lives.all[0].recorded, "it had got somewhere"
        # As long as there is no room, it is refused, or stops again; and loses nothing.
        check_stopped(lives, lives.begin(), service, "the disk is full")
        filler.unlink()
        check_resumed(lives)


def test_a_limit_on_the_size_of_files_ends_the_run_in_order(tmp_path: Path, service: EmbeddedService) -> None:
    """`ulimit -f`, or a quota: the disk refuses, though it is not full."""

    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM_BYTES, ROOM_BYTES))

    with Lives(tmp_path, service, *FLAGS) as lives:
        check_stopped(lives, lives.begin(preexec_fn=limit_files), service, "ulimit -f", "run again")
        assert lives.all[0].recorded, "it had got somewhere"
        check_resumed(lives)


# --- no right to write ---


@contextmanager
def read_only(path: Path) -> Iterator[None]:
    """Nothing may be written to a file, or to a folder and what is in it; by root neither."""
    if mounted("--bind", str(path), str(path)):
        try:
            subprocess.run(["mount", "-o", "remount,bind,ro", str(path)], check=True, timeout=BOUND)
            yield
        finally:
            subprocess.run(["umount", str(path)], check=True, timeout=BOUND)
    elif os.geteuid() == 0:
        pytest.skip("root may write anywhere, and this one may not mount")
    else:
        modes = {found: found.stat().st_mode for found in (path, *path.glob("*"))}
        try:
            for found, mode in modes.items():
                found.chmod(mode & 0o555)
            yield
        finally:
            for found, mode in modes.items():
                found.chmod(mode)


@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_journal_that_may_not_be_written_is_refused(tmp_path: Path, service: EmbeddedService, what: str) -> None:
    """Before anything is asked of anybody; what it holds is untouched."""
    folder = tmp_path / "folder"
    folder.mkdir()
    with Lives(tmp_path, service, *FLAGS, journal=folder / "run.db") as lives:
        first = lives.begin()
        assert first.until(lambda: first.fresh)
        first.kill()
        lives.end(first)
        with read_only(folder if what == "folder" else lives.journal):
            second = lives.begin()
            check_stopped(lives, second, service, "may not be written", "or choose another path")
        assert (second.fresh, second.replayed, lives.asked()[1]) == ({}, {}, set())
        assert second.recorded == first.recorded
        check_resumed(lives)


# --- somebody else's lock ---


def test_a_lock_of_somebody_else_that_lasts_ends_the_run_in_order(tmp_path: Path, service: EmbeddedService) -> None:
    """So does one that is there at the start: then nothing is begun at all."""
    with Lives(tmp_path, service, *FLAGS, "--busy-timeout=0.3") as lives:
        first = lives.begin()
        assert first.until(lambda: first.fresh)
        with locked(lives.journal):
            check_stopped(lives, first, service, "another process keeps it locked", "End that, and run again")
            second = lives.begin()
            check_stopped(lives, second, service, "another process keeps it locked")
            assert (second.fresh, second.replayed, lives.asked()[1]) == ({}, {}, set())
        check_resumed(lives)


def test_a_lock_of_somebody_else_that_is_given_back_disturbs_nobody(tmp_path: Path, service: EmbeddedService) -> None:
    """A look at the journal with a tool of SQLite's: commits wait for it, jobs go on, and nothing is lost."""
    with Lives(tmp_path, service, *FLAGS) as lives:
        life = lives.begin()
        assert life.until(lambda: life.fresh)
        with locked(lives.journal):
            told = len(life.fresh)
            asked = service.stats()["requests"]["/api1"]
            assert life.until(lambda: service.stats()["requests"]["/api1"] > asked + 2 * LIMIT)
            # What had been committed before the lock may still be on its way here.
            assert len(life.fresh) <= told + 2 * BATCH_ROWS
        assert lives.end(life) == 0, life.said()
        check_outcomes(lives, ITEMS)
