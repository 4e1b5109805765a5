"""Functions of a bridge that submit to it and wait there: no depth, no width and no kind of wait is a deadlock."""

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

import penstock
from penstock import BridgeExecutor

LONG = 10.0
"""Seconds that nothing takes on a machine that works."""
SHORT = 5.0
"""Seconds in which a wait ends that can end: shorter, so that a deadlock is a failure of its test alone."""
BLINK = 0.01

Wait: TypeAlias = Callable[[Sequence[Future[int]]], int]
"""Gives the sum of the values."""


def by_result(futures: Sequence[Future[int]]) -> int:
    return sum(future.result(LONG) for future in futures)


def by_exception(futures: Sequence[Future[int]]) -> int:
    assert [future.exception(LONG) for future in futures] == [None] * len(futures)
    return by_result(futures)


def by_wait(futures: Sequence[Future[int]]) -> int:
    assert not concurrent.futures.wait(futures, LONG).not_done
    return by_result(futures)


def by_first(futures: Sequence[Future[int]]) -> int:
    left, total = set(futures), 0
    while left:
        done, left = concurrent.futures.wait(left, LONG, return_when=concurrent.futures.FIRST_COMPLETED)
        assert done
        total += by_result(list(done))
    return total


def by_as_completed(futures: Sequence[Future[int]]) -> int:
    return sum(future.result() for future in concurrent.futures.as_completed(futures, LONG))


def by_the_loop(futures: Sequence[Future[int]]) -> int:
    """In a thread, on the loop."""
    return penstock.from_thread(wrapped, futures)


async def wrapped(futures: Sequence[Future[int]]) -> int:
    async with asyncio.timeout(SHORT):
        return sum(await asyncio.gather(*map(asyncio.wrap_future, futures)))


WAITS: dict[str, Wait] = {
    "result": by_result,
    "exception": by_exception,
    "wait": by_wait,
    "first": by_first,
    "as_completed": by_as_completed,
}
EACH_WAIT = pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)


def threads_of(bridge: BridgeExecutor) -> int:
    return len(bridge._bridged.workers.threads)


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does and nobody tells."""
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@EACH_WAIT
def test_plain_functions_wait_for_plain_ones_at_any_depth(wait: Wait) -> None:
    """With one thread: for each that waits another one stands in, and no more."""
    deepest = 0

    def dive(depth: int) -> int:
        nonlocal deepest
        if depth == 0:
            deepest = threads_of(bridge)
            return 0
        return 1 + wait([bridge.submit(dive, depth - 1)])

    with BridgeExecutor(1) as bridge:
        assert bridge.submit(dive, 100).result(LONG) == 100
        assert deepest == 101


@EACH_WAIT
def test_both_kinds_wait_for_each_other_at_any_depth(wait: Wait) -> None:
    """A coroutine awaits a plain function, which waits for a coroutine; with one thread and one slot."""

    def plain(depth: int) -> int:
        return 0 if depth == 0 else 1 + wait([bridge.submit(coroutine, depth - 1)])

    async def coroutine(depth: int) -> int:
        return 0 if depth == 0 else 1 + await asyncio.wrap_future(bridge.submit(plain, depth - 1))

    with BridgeExecutor(1, limit=1) as bridge:
        assert bridge.submit(plain, 100).result(LONG) == 100
        assert bridge.submit(coroutine, 100).result(LONG) == 100


def test_coroutines_wait_for_coroutines_at_any_depth() -> None:
    """On one slot, without any thread."""

    async def dive(depth: int) -> int:
        return 0 if depth == 0 else 1 + await asyncio.wrap_future(bridge.submit(dive, depth - 1))

    with BridgeExecutor(1, limit=1) as bridge:
        assert bridge.submit(dive, 100).result(LONG) == 100
        assert threads_of(bridge) == 0


def test_ways_through_the_loop_may_be_mixed_with_futures() -> None:
    """`to_thread` and `from_thread` on one thread, with `submit` and `result` in between."""

    def plain(depth: int) -> int:
        if depth == 0:
            return 0
        if depth % 2:
            return penstock.from_thread(coroutine, depth - 1)
        return bridge.submit(coroutine, depth - 1).result(LONG)

    async def coroutine(depth: int) -> int:
        if depth % 3:
            return 1 + await penstock.to_thread(plain, depth)
        return 1 + await asyncio.wrap_future(bridge.submit(plain, depth))

    with BridgeExecutor(1, limit=1) as bridge:
        assert bridge.submit(plain, 20).result(LONG) == 20


@pytest.mark.parametrize("max_workers", [1, 2])
@EACH_WAIT
def test_a_tree_needs_few_threads(max_workers: int, wait: Wait) -> None:
    """The latest call goes first: as many threads as the tree is deep, not as it has leaves."""
    most = 0

    def fib(n: int) -> int:
        nonlocal most
        most = max(most, threads_of(bridge))
        return n if n < 2 else wait([bridge.submit(fib, n - 1), bridge.submit(fib, n - 2)])

    with BridgeExecutor(max_workers) as bridge:
        assert bridge.submit(fib, 10).result(LONG) == 55
        assert most <= 3 * 10 * max_workers, "of 177 calls"


def test_a_tree_of_coroutines_needs_no_thread() -> None:
    """And one slot."""

    async def fib(n: int) -> int:
        return n if n < 2 else await wrapped([bridge.submit(fib, n - 1), bridge.submit(fib, n - 2)])

    with BridgeExecutor(1, limit=1) as bridge:
        assert bridge.submit(fib, 10).result(LONG) == 55
        assert threads_of(bridge) == 0


def test_a_queue_of_parents_is_not_run_by_those_who_stand_in() -> None:
    """A thousand parents are queued before their children: who stands in for one runs its child, not the next one."""
    most, lock = 0, threading.Lock()

    def child() -> int:
        nonlocal most
        with lock:
            most = max(most, threads_of(bridge))
        return 1

    def parent() -> int:
        return bridge.submit(child).result(LONG)

    with BridgeExecutor(2) as bridge:
        assert by_result([bridge.submit(parent) for _ in range(1_000)]) == 1_000
        assert most <= 4


def test_threads_that_stood_in_end_again() -> None:
    """When they are idle; those of `max_workers` stay."""

    def dive(depth: int) -> int:
        return 0 if depth == 0 else 1 + bridge.submit(dive, depth - 1).result(LONG)

    with BridgeExecutor(2) as bridge:
        bridge._bridged.workers._idle_timeout = BLINK
        assert bridge.submit(dive, 20).result(LONG) == 20
        until(lambda: threads_of(bridge) == 2)
        assert bridge.submit(dive, 5).result(LONG) == 5


def test_two_executors_may_wait_for_each_other() -> None:
    """A thread of one that waits for a future of the other is stood in for as well."""

    def dive(depth: int) -> int:
        other = first if depth % 2 else second
        return 0 if depth == 0 else 1 + other.submit(dive, depth - 1).result(LONG)

    with BridgeExecutor(1) as first, BridgeExecutor(1) as second:
        assert first.submit(dive, 30).result(LONG) == 30


def test_a_wait_that_times_out_leaves_the_counts_as_they_were() -> None:
    """Afterwards there are as many threads at work as before."""
    release = threading.Event()
    barrier = threading.Barrier(2)

    def impatient() -> None:
        blocked = bridge.submit(release.wait, LONG)
        with pytest.raises(TimeoutError):
            blocked.result(BLINK)
        with pytest.raises(TimeoutError):
            blocked.exception(BLINK)
        assert concurrent.futures.wait([blocked], BLINK).not_done == {blocked}
        release.set()
        assert blocked.result(LONG)

    with BridgeExecutor(2) as bridge:
        bridge.submit(impatient).result(LONG)
        assert by_result([bridge.submit(barrier.wait, LONG) for _ in range(2)]) == 1
        inside, most, lock = 0, 0, threading.Lock()

        def count() -> int:
            nonlocal inside, most
            with lock:
                inside += 1
                most = max(most, inside)
            with lock:
                inside -= 1
            return 0

        by_result([bridge.submit(count) for _ in range(50)])
        assert most <= 2


def _ended(bridge: BridgeExecutor, future: Future[Any], *others: Future[Any]) -> bool:
    """Whether it ends by itself; afterwards it has, one way or another, so that the executor can be left."""
    return not concurrent.futures.wait([future, *others], SHORT).not_done


@pytest.mark.parametrize("wait", [by_result, by_wait, by_as_completed, by_first])
def test_a_thread_may_wait_for_a_plain_function_that_others_have_submitted(wait: Wait) -> None:
    """With one thread, and that function queued behind it."""
    futures: list[Future[int]] = []
    submitted = threading.Event()

    def waiter() -> int:
        assert submitted.wait(LONG)
        return wait(futures)

    with BridgeExecutor(1) as bridge:
        future = bridge.submit(waiter)
        futures.append(bridge.submit(int, "7"))
        submitted.set()
        assert _ended(bridge, future)
        assert future.result() == 7


@pytest.mark.parametrize("wait", [by_result, by_wait, by_as_completed])
def test_a_thread_may_wait_for_a_job_that_needs_a_thread(wait: Wait) -> None:
    """With one thread: the job was submitted by others, and asks for a thread when this one waits already."""
    begun = threading.Event()

    async def job() -> int:
        await asyncio.to_thread(begun.wait, LONG)
        return await penstock.to_thread(int, "7")

    def waiter() -> int:
        begun.set()
        return wait([future])

    with BridgeExecutor(1) as bridge:
        future = bridge.submit(job)
        waiting = bridge.submit(waiter)
        assert _ended(bridge, waiting)
        assert waiting.result() == 7


@pytest.mark.parametrize("lane", ["to_thread", "compute"])
def test_jobs_may_wait_for_their_children_in_threads(lane: str) -> None:
    """Each of a chain sends a thread to wait for the next one, with one thread for all."""

    async def dive(depth: int) -> int:
        if depth == 0:
            return 0
        child = bridge.submit(dive, depth - 1)
        value: int = await getattr(penstock, lane)(child.result, LONG)
        return 1 + value

    with BridgeExecutor(1) as bridge:
        future = bridge.submit(dive, 5)
        assert _ended(bridge, future)
        assert future.result() == 5


@pytest.mark.parametrize("max_workers", [1, 2])
def test_a_thread_may_wait_on_the_loop_for_what_it_has_submitted(max_workers: int) -> None:
    """By `from_thread`, at any depth: its thread is stood in for, as if it waited for the futures itself."""

    def dive(depth: int) -> int:
        return 1 if depth == 0 else by_the_loop([bridge.submit(dive, depth - 1) for _ in "ab"])

    with BridgeExecutor(max_workers) as bridge:
        assert bridge.submit(dive, 4).result(LONG) == 16


class Tree(NamedTuple):
    """A function, and those that it submits and waits for."""

    kind: str
    wait: str
    children: tuple["Tree", ...]


def tree_of(children: st.SearchStrategy[tuple[Tree, ...]]) -> st.SearchStrategy[Tree]:
    return st.builds(
        Tree,
        st.sampled_from(["plain", "coroutine"]),
        st.sampled_from([*WAITS, "the loop"]),
        children,
    )


LEAVES = tree_of(st.just(()))
TREES = st.recursive(LEAVES, lambda trees: tree_of(st.lists(trees, max_size=3).map(tuple)), max_leaves=12)


def size(tree: Tree) -> int:
    return 1 + sum(map(size, tree.children))


@given(tree=TREES, max_workers=st.integers(1, 3), limit=st.sampled_from([None, 1, 2]))
def test_any_tree_of_both_kinds_completes(tree: Tree, max_workers: int, limit: int | None) -> None:
    """Whatever each waits by, with few threads and slots: the right value, and never a deadlock."""

    def submit(tree: Tree) -> Future[int]:
        return bridge.submit(plain if tree.kind == "plain" else coroutine, tree)

    def plain(tree: Tree) -> int:
        futures = [submit(child) for child in tree.children]
        return 1 + (by_the_loop if tree.wait == "the loop" else WAITS[tree.wait])(futures)

    async def coroutine(tree: Tree) -> int:
        if tree.wait in ("result", "wait"):  # one by another
            return 1 + sum([await asyncio.wrap_future(submit(child)) for child in tree.children])
        return 1 + await wrapped([submit(child) for child in tree.children])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("penstock.threads.lane.STANDSTILL", 0.02)  # which some of them need, once a level
        with BridgeExecutor(max_workers, limit=limit) as bridge:
            assert submit(tree).result(LONG) == size(tree)


def test_threads_that_wait_on_the_loop_for_slots_do_not_keep_the_jobs_that_have_them_from_threads() -> None:
    """All threads wait for jobs that need the slot of another, which needs a thread: it gets one beyond them."""

    async def inner() -> int:
        return 1

    def waits() -> int:
        return by_the_loop([bridge.submit(inner)])

    async def needs_a_thread() -> int:
        return await bridge.submit(size, Tree("plain", "result", ()))  # type: ignore[misc,no-any-return]

    async def outer() -> int:
        return await wrapped([bridge.submit(waits), bridge.submit(waits), bridge.submit(needs_a_thread)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("penstock.threads.lane.STANDSTILL", 0.02)
        with BridgeExecutor(2, limit=1) as bridge:
            for _ in range(20):
                assert bridge.submit(outer).result(LONG) == 3
