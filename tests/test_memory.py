"""How much memory there is, as the kernel tells it: files, of both versions of control groups."""

import os
from pathlib import Path

import pytest

from penstock.memory import LOOKS_FOR_EACH_LIMIT, MEMORY, Memory

MIB = 1 << 20
PAGE = os.sysconf("SC_PAGE_SIZE")
MACHINE = os.sysconf("SC_PHYS_PAGES") * PAGE


class Kernel:
    """Writes what the kernel would show."""

    def __init__(self, folder: Path) -> None:
        self.proc = folder / "proc"
        self.groups = folder / "cgroup"
        self.write("proc/self/statm", "765 25600 368 5 0 123 0")
        self.write("proc/meminfo", f"MemTotal: {MACHINE >> 10} kB\nMemFree: 1 kB\nMemAvailable: {400 << 10} kB\n")
        self.groups.mkdir()

    def write(self, path: str, text: str) -> None:
        file = self.proc.parent / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def group(self, path: str, limit: object, current: int, cache: int = 0) -> None:
        """A group of the second version."""
        self.write(f"cgroup/{path}/memory.max", f"{limit}\n")
        self.write(f"cgroup/{path}/memory.current", f"{current}\n")
        self.write(f"cgroup/{path}/memory.stat", f"anon 5\nactive_file 0\ninactive_file {cache}\nfile {cache}\n")

    def memory(self) -> Memory:
        return Memory(self.proc, self.groups)


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    return Kernel(tmp_path)


def test_without_a_group_it_is_the_machines(kernel: Kernel) -> None:
    """What is used counts in pages."""
    assert kernel.memory().allowed() == MACHINE
    use = kernel.memory().use()
    assert use is not None
    assert use == (25600 * PAGE, MACHINE, 400 * MIB)


def test_a_container_sees_the_limit_of_its_group_at_the_root(kernel: Kernel) -> None:
    kernel.write("proc/self/cgroup", "0::/\n")
    kernel.group("", 512 * MIB, 100 * MIB)
    assert kernel.memory().allowed() == 512 * MIB
    assert kernel.memory().use() == (25600 * PAGE, 512 * MIB, 400 * MIB)  # the machine has less left than the group


def test_the_groups_around_ones_own_bound_it_too(kernel: Kernel) -> None:
    """As those of a service manager do; a group may have no limit."""
    kernel.write("proc/self/cgroup", "0::/slice/service\n")
    kernel.group("slice", 512 * MIB, 300 * MIB)
    kernel.group("slice/service", "max", 10 * MIB)
    use = kernel.memory().use()
    assert use is not None
    assert (use.allowed, use.available) == (512 * MIB, 212 * MIB)


def test_the_name_that_the_host_has_for_a_group_is_not_looked_for_in_vain(kernel: Kernel) -> None:
    kernel.write("proc/self/cgroup", "0::/kubepods/pod1\n")
    kernel.group("", 64 * MIB, 1)
    assert kernel.memory().allowed() == 64 * MIB


def test_page_cache_counts_as_available_when_little_else_is_left(kernel: Kernel) -> None:
    """The kernel takes it back before it kills anybody."""
    kernel.write("proc/self/cgroup", "0::/\n")
    kernel.group("", 100 * MIB, 99 * MIB, cache=50 * MIB)
    use = kernel.memory().use()
    assert use is not None
    assert use.available == 51 * MIB


def test_groups_of_the_first_version_are_known(kernel: Kernel) -> None:
    """Theirs is a folder of its own, and those without a limit have an absurd one."""
    kernel.write("proc/self/cgroup", "9:name=systemd:/\n5:cpu,cpuacct:/\n4:memory:/docker/1\n0::/\n")
    for path, limit in (("memory", 9223372036854771712), ("memory/docker/1", 256 * MIB)):
        kernel.write(f"cgroup/{path}/memory.limit_in_bytes", str(limit))
        kernel.write(f"cgroup/{path}/memory.usage_in_bytes", str(250 * MIB))
        stat = f"active_file 1\ninactive_file 1\ntotal_active_file {MIB}\ntotal_inactive_file {2 * MIB}\n"
        kernel.write(f"cgroup/{path}/memory.stat", stat)
    use = kernel.memory().use()
    assert use is not None
    assert (use.allowed, use.available) == (256 * MIB, 9 * MIB)


def test_a_group_that_has_used_more_than_it_may_has_nothing_left(kernel: Kernel) -> None:
    kernel.write("proc/self/cgroup", "0::/\n")
    kernel.group("", 100 * MIB, 101 * MIB)
    use = kernel.memory().use()
    assert use is not None
    assert use.available == 0


def test_a_group_that_is_gone_bounds_nothing(kernel: Kernel) -> None:
    """It may be, between two looks."""
    kernel.write("proc/self/cgroup", "0::/\n")
    kernel.group("", 100 * MIB, 10 * MIB)
    memory = kernel.memory()
    assert memory.allowed() == 100 * MIB
    (kernel.groups / "memory.current").unlink()
    use = memory.use()
    assert use is not None
    assert use.available == 400 * MIB
    (kernel.groups / "memory.max").unlink()
    assert memory.allowed() == MACHINE


def test_what_cannot_be_read_says_nothing(kernel: Kernel) -> None:
    """A directory can be opened, and not read."""
    (kernel.proc / "meminfo").unlink()
    (kernel.proc / "meminfo").mkdir()
    use = kernel.memory().use()
    assert use is not None
    assert use.available == MACHINE - 25600 * PAGE


def test_a_limit_that_is_changed_is_seen_by_and_by(kernel: Kernel) -> None:
    """Containers are resized while they run."""
    kernel.write("proc/self/cgroup", "0::/\n")
    kernel.group("", 100 * MIB, 10 * MIB)
    memory = kernel.memory()
    assert memory.use() is not None
    kernel.group("", 200 * MIB, 10 * MIB)
    seen = [memory.use() for _ in range(LOOKS_FOR_EACH_LIMIT)]
    assert [use.allowed for use in seen if use is not None] == [100 * MIB] * (LOOKS_FOR_EACH_LIMIT - 1) + [200 * MIB]


def test_what_is_left_is_reckoned_where_the_kernel_does_not_tell(kernel: Kernel) -> None:
    """MemAvailable came with Linux 3.14."""
    kernel.write("proc/meminfo", f"MemTotal: {MACHINE >> 10} kB\n")
    use = kernel.memory().use()
    assert use is not None
    assert use.available == MACHINE - 25600 * PAGE


def test_nothing_is_known_where_there_is_no_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's memory is, on other POSIX systems."""
    memory = Memory(tmp_path / "proc", tmp_path / "groups")
    assert memory.use() is None
    assert memory.allowed() == MACHINE

    def unknown(_name: str) -> int:
        raise ValueError

    monkeypatch.setattr(os, "sysconf", unknown)
    assert Memory(tmp_path / "proc", tmp_path / "groups").allowed() is None


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the kernel tells elsewhere, or not at all")
def test_this_process_uses_more_when_it_holds_more() -> None:
    before = MEMORY.use()
    block = bytearray(b"x" * (64 * MIB))
    after = MEMORY.use()
    assert before is not None
    assert after is not None
    assert 0 < before.used < before.allowed
    assert after.used - before.used > len(block) // 2
    assert after.available > 0
