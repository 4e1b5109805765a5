"""Whether a folder lies on a network file system, where a journal cannot be.

    /proc/self/mountinfo -> the mount that the folder is under -> its type -> refused

SQLite's WAL shares memory among the processes that have a database open, and trusts the locks of the file system.
Over a network the memory is not shared, and locks may not be kept: what was committed would be lost, and nothing would
say so (https://sqlite.org/wal.html, https://sqlite.org/howtocorrupt.html).

Guarantees: what is refused lies on a network. The opposite does not hold: without /proc nothing can be told, and a file
system that is unknown here is taken for a local one.

Threads: any.
"""

import os
import re

from penstock.errors import JournalError

MOUNTS = "/proc/self/mountinfo"

# As mountinfo shows them: the kernel's own, and those that FUSE programs give themselves.
NETWORK_TYPES = frozenset(
    (
        *(
            "9p",
            "afpfs",
            "afs",
            "beegfs",
            "ceph",
            "cifs",
            "coda",
            "davfs",
            "gfs",
            "gfs2",
            "glusterfs",
            "gpfs",
            "lustre",
        ),
        *("ncpfs", "nfs", "nfs4", "ocfs2", "orangefs", "panfs", "pvfs2", "smb", "smb2", "smb3", "smbfs", "wekafs"),
        *("fuse.ceph-fuse", "fuse.cephfs", "fuse.curlftpfs", "fuse.davfs", "fuse.gcsfuse", "fuse.glusterfs"),
        *("fuse.goofys", "fuse.gvfsd-fuse", "fuse.juicefs", "fuse.lizardfs", "fuse.mfs", "fuse.moosefs"),
        *("fuse.quobyte", "fuse.rclone", "fuse.s3fs", "fuse.s3ql", "fuse.seaweedfs", "fuse.smbnetfs", "fuse.sshfs"),
    )
)

_ESCAPE = re.compile(r"\\([0-7]{3})")


def refuse_network(path: str) -> None:
    """Refuse a journal at `path`, which need not exist, where its folder lies on a network file system.

    Reads /proc/self/mountinfo; does not block otherwise. Any thread.

    Raises:
        JournalError: it does.
    """
    folder = os.path.dirname(os.path.realpath(path))
    os.path.isdir(folder)  # a folder that is mounted when somebody looks at it is there by now
    try:
        with open(MOUNTS, "rb") as file:
            mounts = os.fsdecode(file.read())
    except OSError:
        return
    kind = type_of(folder, mounts)
    if kind in NETWORK_TYPES:
        raise JournalError(
            f"{path}: its folder lies on a network file system ({kind}), where commits of SQLite can be lost. "
            f"Choose a path on a local disk, and copy the journal when the run is over."
        )


def type_of(folder: str, mounts: str) -> str | None:
    """The type of the file system that an absolute `folder` without links lies on; None where no mount covers it.

    Args:
        folder: as `os.path.realpath` gives it.
        mounts: as /proc/self/mountinfo: a line for each mount, later ones cover earlier ones.
    """
    found, depth = None, -1
    for line in mounts.split("\n"):  # not splitlines(): a name may hold other line ends, which are not escaped
        place, separator, source = line.partition(" - ")
        fields = place.split(" ")
        if not separator or len(fields) < 5:
            continue
        point = _unescaped(fields[4])
        if len(point) >= depth and _is_under(folder, point):
            found, depth = source.split(" ")[0], len(point)
    return found


def _unescaped(name: str) -> str:
    """The kernel writes space, tab, line feed, backslash and # as three octal digits."""
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), name)


def _is_under(folder: str, point: str) -> bool:
    return folder == point or folder.startswith(point.rstrip("/") + "/")
