"""Jobs that submit jobs: any depth, any fan-out, never a deadlock, never more at once than slots allow."""

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import Executor, current_job
from penstock.testing import run_in_virtual_time

pytestmark = pytest.mark.virtual_clock


@pytest.mark.parametrize("limit", [1, 3])
async def test_a_chain_of_a_thousand_jobs_runs_on_any_number_of_slots(limit: int) -> None:
    """Each job waits for the one it submits; the deepest always has a slot to run on."""
    async with Executor(limit=limit) as executor:

        async def deeper(depth: int) -> int:
            job = current_job()
            assert job is not None
            assert job.depth == 1_000 - depth
            return 0 if depth == 0 else 1 + await executor.submit(deeper, depth - 1)

        assert await executor.submit(deeper, 1_000) == 1_000


@pytest.mark.parametrize("limit", [1, 2, 7])
async def test_fan_out_in_every_job_of_a_full_executor_ends(limit: int) -> None:
    """Every slot is taken by a job that maps over children with children of their own."""
    async with Executor(limit=limit) as executor:

        async def leaf(item: int) -> int:
            await asyncio.sleep(1)
            return item

        async def branch(item: int) -> int:
            return sum(await executor.map(leaf, range(item)))

        async def tree(item: int) -> int:
            return sum(await executor.map(branch, range(item)))

        assert await executor.map(tree, [4] * 10) == [4] * 10


@pytest.mark.parametrize("limit", [1, 3])
async def test_fan_out_from_threads_of_a_full_executor_with_one_thread_ends(limit: int) -> None:
    """Plain functions that map over children of their own: each child runs on the place of a thread that waits."""
    async with Executor(limit=limit, threads=1) as executor:

        def tree(depth: int) -> int:
            if depth == 0:
                return 1

            async def children() -> int:
                return sum(await executor.map(tree, [depth - 1] * 3))

            leaves: int = executor.from_thread(children)
            return leaves

        assert await executor.map(tree, [3] * 4) == [27] * 4
        threads = executor.statistics().threads
        assert threads is not None
        assert threads.calls == 4 * (1 + 3 + 9 + 27)


async def test_a_child_takes_a_free_slot_before_its_parents() -> None:
    """Children run side by side as long as slots are free."""
    loop = asyncio.get_running_loop()
    async with Executor(limit=5) as executor:

        async def child(_item: int) -> None:
            await asyncio.sleep(1)

        async def parent() -> float:
            started = loop.time()
            await executor.map(child, range(10))
            return loop.time() - started

        # Four free slots and the parent's: ten children take two rounds.
        assert await executor.submit(parent) == pytest.approx(2)


async def test_one_child_at_a_time_runs_on_its_parents_slot() -> None:
    """With a single slot, the children of a job run one after another."""
    loop = asyncio.get_running_loop()
    async with Executor(limit=1) as executor:

        async def child() -> None:
            await asyncio.sleep(1)

        async def parent() -> float:
            started = loop.time()
            await asyncio.gather(*(executor.submit(child) for _ in range(5)))
            return loop.time() - started

        assert await executor.submit(parent) == pytest.approx(5)


async def test_a_child_that_waits_takes_whichever_slot_is_free_first() -> None:
    """A straggler on the parent's slot does not keep the other children from slots that become free."""
    loop = asyncio.get_running_loop()
    async with Executor(limit=2) as executor:

        async def sleep_for(seconds: int) -> None:
            await asyncio.sleep(seconds)

        async def parent() -> float:
            straggler = executor.submit(sleep_for, 100)
            started = loop.time()
            await executor.map(sleep_for, [1] * 10)
            elapsed = loop.time() - started
            await straggler
            return elapsed

        other = executor.submit(sleep_for, 20)
        elapsed = await executor.submit(parent)
        await other
    # The straggler has the parent's slot; after 20 s the other slot is free, and takes the ten one after another.
    assert elapsed == pytest.approx(30)


async def test_a_parent_that_ends_first_hands_its_slot_to_its_child() -> None:
    """The slot stays taken until the child has ended: never more run than there are slots."""
    async with Executor(limit=1) as executor:
        order = []

        async def child() -> None:
            await asyncio.sleep(5)
            order.append("child")

        async def parent() -> None:
            executor.submit(child)
            await asyncio.sleep(1)
            order.append("parent")

        async def other() -> None:
            order.append("other")

        await executor.submit(parent)
        await executor.submit(other)
        assert order == ["parent", "child", "other"]


async def test_children_of_a_parent_that_has_ended_look_to_the_grandparent() -> None:
    """A job that waits for its grandchildren gets them, though their own parent is gone and no slot is free."""
    async with Executor(limit=1) as executor:

        async def grandchild() -> str:
            await asyncio.sleep(1)
            return "grandchild"

        async def parent() -> "list[asyncio.Future[str]]":
            return [executor.submit(grandchild) for _ in range(3)]

        async def grandparent() -> list[str]:
            return await asyncio.gather(*await executor.submit(parent))

        assert await executor.submit(grandparent) == ["grandchild"] * 3


async def test_a_borrower_that_ends_first_hands_its_loan_on() -> None:
    """Three generations on one slot: the middle one ends while its child runs on what it had borrowed."""
    async with Executor(limit=1) as executor:
        order = []

        async def grandchild() -> None:
            await asyncio.sleep(5)
            order.append("grandchild")

        async def parent() -> "asyncio.Future[None]":
            future = executor.submit(grandchild)
            await asyncio.sleep(1)
            order.append("parent")
            return future

        async def sibling() -> None:
            order.append("sibling")

        async def grandparent() -> None:
            future = await executor.submit(parent)
            await executor.submit(sibling)
            await future

        await executor.submit(grandparent)
        assert order == ["parent", "grandchild", "sibling"]


@pytest.mark.parametrize("children", [1, 2, 3, 5])
async def test_children_that_wait_for_a_loan_are_woken_when_their_parent_ends(children: int) -> None:
    """One slot; the parent ends while one child runs on its slot and others wait for it: all get their turn."""
    async with Executor(limit=1) as executor:
        futures: list[asyncio.Future[float]] = []

        async def leaf() -> float:
            await asyncio.sleep(1)
            return 1.0

        async def parent() -> None:
            futures.extend(executor.submit(leaf) for _ in range(children))
            await asyncio.sleep(0.5)

        async def grandparent() -> float:
            await executor.submit(parent)
            return sum(await asyncio.gather(*futures))

        assert await executor.submit(grandparent) == children


async def test_cancelling_every_task_of_the_loop_keeps_the_books_of_the_slots() -> None:
    """Children that wait for whichever slot comes first are cancelled with all the others: no slot is made up."""
    async with Executor(limit=1) as executor:
        running = most = 0

        async def child() -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(5)
            running -= 1

        async def parent() -> None:
            await asyncio.gather(*(executor.submit(child) for _ in range(3)))

        for _ in range(3):
            future = executor.submit(parent)
            await asyncio.sleep(1)
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await asyncio.wait([future])
            running = 0
        await asyncio.gather(*(executor.submit(child) for _ in range(4)))
        assert most == 1
        assert executor._jobs is not None
        assert executor._jobs.slots._free.in_flight == 0


async def test_a_chain_of_successors_does_not_grow_in_memory() -> None:
    """A job that submits its successor and ends is forgotten: no record keeps its ancestors alive."""
    import gc

    from penstock.executor.active import ActiveJob

    done = asyncio.Event()
    async with Executor(limit=1) as executor:

        async def hop(left: int) -> None:
            await asyncio.sleep(0)
            if left:
                executor.submit(hop, left - 1)
            else:
                gc.collect()
                assert sum(isinstance(thing, ActiveJob) for thing in gc.get_objects()) < 10
                done.set()

        executor.submit(hop, 500)
        await done.wait()


async def test_jobs_of_another_executor_are_no_children() -> None:
    """Slots are lent within one executor only; the other one has slots of its own."""
    async with Executor(limit=1) as first, Executor(limit=1) as second:

        async def depth() -> int:
            job = current_job()
            assert job is not None
            return job.depth

        async def ask() -> int:
            return await second.submit(depth)

        assert await first.submit(ask) == 0


programs = st.recursive(
    st.integers(0, 3), lambda children: st.tuples(st.integers(0, 2), st.lists(children, max_size=4)), max_leaves=12
)


@given(roots=st.lists(programs, min_size=1, max_size=5), limit=st.integers(1, 4), by_map=st.booleans())
def test_random_trees_of_jobs_end_and_never_exceed_the_slots(roots: list[object], limit: int, by_map: bool) -> None:
    """Whatever the tree, by `submit` or by `map`: all jobs end, and those that work themselves fit the slots."""
    busy = 0
    ended: Counter[str] = Counter()

    async def main() -> None:
        async with Executor(limit=limit) as executor:

            async def work(seconds: int) -> None:
                nonlocal busy
                busy += 1
                assert busy <= limit
                await asyncio.sleep(seconds)
                busy -= 1

            async def node(program: object) -> None:
                if isinstance(program, tuple):
                    seconds, children = program
                    await work(seconds)
                    if by_map:
                        await executor.map(node, children)
                    else:
                        await asyncio.gather(*(executor.submit(node, child) for child in children))
                else:
                    assert isinstance(program, int)
                    await work(program)
                ended["jobs"] += 1

            await executor.map(node, roots)
            assert executor.statistics().jobs == 0

    run_in_virtual_time(main())
    assert ended["jobs"] == sum(map(size, roots))


def size(program: object) -> int:
    """The number of jobs in a program."""
    return 1 + sum(map(size, program[1])) if isinstance(program, tuple) else 1
