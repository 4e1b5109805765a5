"""Folders on network file systems, where no journal can be."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import JournalError
from penstock.journal import network
from penstock.journal.network import NETWORK_TYPES, refuse_network, type_of

LOCAL = "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard"

names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=6).filter(
    lambda name: name not in (".", "..")
)
# Few different ones, so that mounts lie within each other and over each other.
folders = st.lists(st.one_of(st.sampled_from(["a", "b", "a b", "a\\040b", "#", "\n"]), names), max_size=4)


def escaped(name: str) -> str:
    """As the kernel does it (`mangle`, fs/seq_file.c)."""
    return "".join(f"\\{ord(letter):03o}" if letter in " \t\n\\#" else letter for letter in name)


def mount(point: str, kind: str, optional: str = "") -> str:
    return f"36 35 98:0 /root\\040of {escaped(point)} rw,noatime{optional} - {kind} server:/export rw,errors=continue"


def joined(parts: list[str]) -> str:
    return "/" + "/".join(parts)


@given(mounts=st.lists(st.tuples(folders, st.sampled_from(["ext4", "nfs4", "fuse.sshfs", "tmpfs"]))), folder=folders)
def test_a_folder_lies_on_the_last_of_the_deepest_mounts_above_it(
    mounts: list[tuple[list[str], str]], folder: list[str]
) -> None:
    """Whatever the names hold: blanks, line ends, what looks like an escape."""
    above = [(len(parts), kind) for parts, kind in mounts if folder[: len(parts)] == parts]
    deepest = max((depth for depth, _ in above), default=None)
    expected = [kind for depth, kind in above if depth == deepest]
    text = "\n".join(mount(joined(parts), kind) for parts, kind in mounts) + "\n"
    assert type_of(joined(folder), text) == (expected[-1] if expected else None)


@given(st.text())
def test_no_text_upsets_it(text: str) -> None:
    assert isinstance(type_of("/a", text), str | None)


def test_optional_fields_come_before_the_separator() -> None:
    """None, one, or several of them."""
    for optional in ("", " shared:1", " shared:1 master:2 unbindable"):
        assert type_of("/data/x", mount("/data", "cifs", optional)) == "cifs"


def test_a_mount_beside_it_with_a_longer_name_is_none_of_it() -> None:
    assert type_of("/data", f"{LOCAL}\n{mount('/dat', 'nfs')}\n{mount('/data2', 'nfs')}") == "ext4"


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "lustre", "fuse.sshfs", "fuse.s3fs"])
def test_a_journal_on_a_network_file_system_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names file, file system and cure."""
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"{LOCAL}\n{mount(os.path.realpath(tmp_path), kind)}\n")
    monkeypatch.setattr(network, "MOUNTS", str(mounts))
    with pytest.raises(
        JournalError, match=r"run\.db: .* network file system .* Choose a path on a local disk"
    ) as caught:
        refuse_network(str(tmp_path / "run.db"))
    assert f"({kind})" in str(caught.value)


def test_a_journal_behind_a_link_is_where_the_link_leads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (tmp_path / "link").symlink_to(there)
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"{LOCAL}\n{mount(os.path.realpath(there), 'nfs')}\n")
    monkeypatch.setattr(network, "MOUNTS", str(mounts))
    with pytest.raises(JournalError, match="network"):
        refuse_network(str(tmp_path / "link" / "run.db"))
    refuse_network(str(tmp_path / "run.db"))


def test_where_nothing_can_be_told_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "MOUNTS", str(tmp_path / "missing"))
    refuse_network(str(tmp_path / "run.db"))


@pytest.mark.skipif(not os.path.exists(network.MOUNTS), reason="there is no /proc")
def test_this_machine_s_own_mounts_are_understood() -> None:
    with open(network.MOUNTS, encoding="utf-8", errors="surrogateescape") as file:
        mounts = file.read()
    assert type_of("/proc/self", mounts) == "proc"
    assert "proc" not in NETWORK_TYPES
