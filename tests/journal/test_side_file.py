"""Results that are too large for a row, in a file beside the journal."""

import errno
import os
import resource
import signal
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import JournalError
from penstock.journal.side_file import SideFile, read


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "run.db-results")


@pytest.fixture
def file(path: str) -> Iterator[SideFile]:
    file = SideFile(path)
    yield file
    file.close()


def test_what_is_appended_can_be_read_by_what_was_returned(file: SideFile, path: str) -> None:
    places = [file.append(data) for data in (b"first", b"", b"\0\r\n\x1a" * 30_000)]
    assert places[0] == (0, 5, zlib.crc32(b"first"))
    assert [read(path, *place) for place in places] == [b"first", b"", b"\0\r\n\x1a" * 30_000]


@given(st.lists(st.tuples(st.binary(max_size=50), st.sampled_from(["", "close", "sync", "tail"])), max_size=20))
def test_everything_stays_readable_whatever_comes_after(pieces: list[tuple[bytes, str]]) -> None:
    """Closed and opened anew, synced, or a piece of a write that was cut off."""
    path = f"/dev/shm/penstock-{os.getpid()}" if os.path.isdir("/dev/shm") else f"penstock-{os.getpid()}"
    file = SideFile(path)
    try:
        places = []
        for data, then in pieces:
            places.append((file.append(data), data))
            if then == "tail":
                with open(path, "ab") as tail:
                    tail.write(b"cut o")
            elif then:
                getattr(file, then)()
        assert all(read(path, *place) == data for place, data in places)
    finally:
        file.close()
        Path(path).unlink(missing_ok=True)


def test_there_is_no_file_before_there_is_something_in_it(file: SideFile, path: str) -> None:
    file.sync()
    file.close()
    assert not os.path.exists(path)
    file.append(b"x")
    assert os.path.exists(path)


def test_a_tail_that_nothing_refers_to_does_no_harm(file: SideFile, path: str) -> None:
    """Of a process that was killed within a write."""
    Path(path).write_bytes(b"half a resu")
    place = file.append(b"whole")
    assert place[0] == 11
    assert read(path, *place) == b"whole"


def test_the_folder_is_synced_once_when_the_file_is_new(
    file: SideFile, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or after a power cut there are rows that refer to a file without a name."""
    synced = list[str]()
    monkeypatch.setattr("penstock.journal.side_file.sync_folder", synced.append)
    file.append(b"x")
    file.sync()
    file.append(b"x")
    file.sync()
    file.close()
    file.append(b"x")
    file.sync()
    assert synced == [path]


def test_a_write_that_is_cut_short_goes_on_where_it_was(
    file: SideFile, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system may take less than it is given."""
    write = os.write
    monkeypatch.setattr("os.write", lambda descriptor, data: write(descriptor, data[:7]))
    place = file.append(bytes(range(100)))
    assert read(path, *place) == bytes(range(100))


def test_a_write_that_fails_leaves_nothing_behind(file: SideFile, path: str) -> None:
    """By a real limit: the file may not grow beyond it, and the first part of the write succeeds."""
    first = file.append(b"x" * 1000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(OSError) as caught:
            file.append(b"y" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG
    assert os.path.getsize(path) == 1000
    second = file.append(b"z")
    assert second[0] == 1000
    assert read(path, *first) == b"x" * 1000
    assert read(path, *second) == b"z"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this platform has no /dev/full")
def test_a_full_disk_is_the_caller_s_to_hear_of() -> None:
    """Also where what was written cannot be taken back."""
    file = SideFile("/dev/full")
    with pytest.raises(OSError) as caught:
        file.append(b"x")
    assert caught.value.errno == errno.ENOSPC
    file.close()


# --- what is wrong is named ---


def test_a_missing_file_is_named(path: str) -> None:
    with pytest.raises(JournalError, match=r"run\.db-results: is missing.*byte 1,000\. .*restore both"):
        read(path, 1000, 1, 0)


def test_a_file_that_is_too_short_is_named(file: SideFile, path: str) -> None:
    offset, size, crc = file.append(b"12345")
    os.truncate(path, 4)
    with pytest.raises(JournalError, match=r"run\.db-results: ends before a result.*restore both"):
        read(path, offset, size, crc)


def test_a_size_that_is_absurd_reserves_no_memory(file: SideFile, path: str) -> None:
    file.append(b"12345")
    with pytest.raises(JournalError, match="ends before"):
        read(path, 0, 2**60, 0)


def test_a_bit_that_has_turned_is_found(file: SideFile, path: str) -> None:
    place = file.append(b"12345")
    Path(path).write_bytes(b"12245")
    with pytest.raises(JournalError, match=r"run\.db-results: is damaged.*restore both"):
        read(path, *place)


def test_a_file_that_cannot_be_read_is_explained(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match=r"is a folder|cannot be used|may not"):
        read(str(tmp_path), 0, 0, 0)
