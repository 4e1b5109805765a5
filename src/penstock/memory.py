"""The only module that asks how much memory there is.

    /proc/self/statm, /proc/meminfo, the limit of the control group -> Memory.use() -> MemoryUse

What a process may use is the limit of its control group (both versions, the groups around it included), else the
machine's memory. Page cache counts as available: the kernel takes it back before it kills anybody.

Where there is no /proc, nobody knows: `resource.getrusage` tells the most that was ever used, which never falls.

Threads: any. Nothing here blocks: these files are no disk's.
"""

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

HARDLY_ANY = 0.1
"""Share of a group's limit that is left, below which its page cache is looked up. Arbitrary, because: more is left than
anybody acts on, and the kernel has to sum up what it is asked for then."""


LOOKS_FOR_EACH_LIMIT = 40
"""Looks until limits are read again. Arbitrary, because: they are changed by hand, if at all."""
LONGEST_FILE = 1 << 16
"""Bytes. Arbitrary, because: all of these are a few thousand bytes long."""


class MemoryUse(NamedTuple):
    """Memory as it was at the time of asking, in bytes."""

    used: int
    """What this process holds."""
    allowed: int
    """What it may use."""
    available: int
    """What it could have in addition before the kernel would have to kill somebody."""


class _Group(NamedTuple):
    """The files of a control group, which have other names in each version."""

    limit: str
    current: str
    stat: str


class Memory:
    """What this process uses, and may use.

    Args:
        proc, groups: where the kernel shows it.
    """

    def __init__(self, proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> None:
        self._statm = str(proc / "self/statm")
        self._meminfo = str(proc / "meminfo")
        self._memberships = str(proc / "self/cgroup")
        self._root = groups
        self._looks = 0
        self._allowed: int | None = None
        self._bounds: list[tuple[int, _Group]] = []
        """The groups that bound it, by their limits."""

    def allowed(self) -> int | None:
        """What this process may use, in bytes; None where nobody knows."""
        most = _BOUNDLESS if self._machine is None else self._machine
        limits = [(limit, group) for group in self._groups if (limit := _number(group.limit)) is not None]
        # One without a limit, of the first version, has an absurd one.
        self._bounds = [(limit, group) for limit, group in limits if limit < most]
        self._allowed = min([limit for limit, _ in self._bounds], default=self._machine)
        return self._allowed

    def use(self) -> MemoryUse | None:
        """What it uses now; None where nobody knows. Costs about 20 us. A limit that is changed is seen by and by."""
        if self._looks % LOOKS_FOR_EACH_LIMIT == 0:
            self.allowed()
        self._looks += 1
        allowed = self._allowed
        statm = _text(self._statm).split()
        if allowed is None or len(statm) < 2:
            return None
        used = int(statm[1]) * self._page
        left = [left for limit, group in self._bounds if (left := _left(limit, group)) is not None]
        found = _text(self._meminfo).partition("MemAvailable:")[2].split(maxsplit=1)
        if found:
            left.append(int(found[0]) << 10)
        return MemoryUse(used, allowed, min(left, default=max(0, allowed - used)))

    @cached_property
    def _page(self) -> int:
        return os.sysconf("SC_PAGE_SIZE")

    @cached_property
    def _machine(self) -> int | None:
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):  # not a POSIX system
            return None

    @cached_property
    def _groups(self) -> tuple[_Group, ...]:
        """The control groups that can bound this process's memory."""
        return tuple(group for group in self._find_groups() if os.path.isfile(group.limit))

    def _find_groups(self) -> Iterator[_Group]:
        paths = {"": "/", "memory": "/"}
        for line in _text(self._memberships).splitlines():
            _, controllers, path = line.split(":", 2)
            for controller in controllers.split(","):
                paths[controller] = path
        for folder in _and_around(self._root, paths[""]):
            yield _Group(f"{folder}/memory.max", f"{folder}/memory.current", f"{folder}/memory.stat")
        for folder in _and_around(self._root / "memory", paths["memory"]):
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"
            yield _Group(*[f"{folder}/{name}" for name in names])


def _and_around(root: Path, path: str) -> Iterator[Path]:
    """The group and those around it. In a container, `path` may be the host's name for it, which is not to be found."""
    folder = root / path.lstrip("/")
    while folder != root:
        if folder.is_dir():
            yield folder
        folder = folder.parent
    if root.is_dir():
        yield root


def _left(limit: int, group: _Group) -> int | None:
    """What the group may use in addition; None if it does not tell."""
    current = _number(group.current)
    if current is None:
        return None
    left = limit - current
    if left < HARDLY_ANY * limit:
        left += _page_cache(group.stat)
    return max(0, left)


def _page_cache(stat: str) -> int:
    """Bytes of a group that the kernel can take back."""
    counts = dict(line.split() for line in _text(stat).splitlines())
    total = "total_" if "total_active_file" in counts else ""  # the first version tells those of groups within apart
    return sum(int(counts.get(f"{total}{kind}_file", 0)) for kind in ("active", "inactive"))


def _number(file: str) -> int | None:
    try:
        return int(_text(file))
    except ValueError:  # no such file, or "max"
        return None


def _text(file: str) -> str:
    """The file, as far as it matters; empty if it cannot be read."""
    try:
        opened = os.open(file, os.O_RDONLY)
    except OSError:
        return ""
    try:
        return os.read(opened, LONGEST_FILE).decode()
    except OSError:  # it is gone meanwhile
        return ""
    finally:
        os.close(opened)


_BOUNDLESS = 1 << 62

MEMORY = Memory()
"""This process's. Asked for nothing until it is needed."""
