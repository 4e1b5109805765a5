"""The identity of the current job: where it is seen, and what is said where there is none."""

import asyncio
import contextvars
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import pytest

from penstock.context import RunningJob, current_job, enter, host_of_current_job
from penstock.errors import UsageError
from penstock.outcome import Outcome

T = TypeVar("T")


class Host:
    """Runs everything at once."""

    async def to_thread(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        return fn(*args, **kwargs)

    compute = to_process = to_thread

    async def compute_each(self, fn: Callable[[Any], T], items: Iterable[Any], /) -> list[Outcome[T]]:
        return [Outcome(None, item, fn(item), None, None, 0, 0.0, 0.0) for item in items]

    def from_thread(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)


def running(name: str, key: object = None) -> RunningJob:
    job = RunningJob()
    job.host, job.name, job.key = Host(), name, key
    return job


def test_outside_any_job_there_is_none() -> None:
    assert current_job() is None


async def test_a_job_is_seen_in_its_own_task_and_in_those_that_it_starts() -> None:
    """And in no other: jobs share nothing."""
    seen = {}

    async def child(name: str) -> None:
        seen[name + " child"] = current_job()

    async def body(job: RunningJob) -> None:
        enter(job)
        await asyncio.sleep(0)
        seen[job.name] = current_job()
        await asyncio.create_task(child(job.name))

    jobs = [running("a"), running("b")]
    await asyncio.gather(*[asyncio.create_task(body(job)) for job in jobs])
    assert seen == {"a": jobs[0], "b": jobs[1], "a child": jobs[0], "b child": jobs[1]}
    assert current_job() is None


async def test_a_job_is_seen_in_threads_that_work_for_it() -> None:
    job = running("a")

    async def body() -> object:
        enter(job)
        return await asyncio.to_thread(current_job)

    assert await asyncio.create_task(body()) is job


def test_a_new_job_has_used_nothing() -> None:
    """What most jobs never change is shared by all; what one job uses is its own."""
    job, other = running("a"), running("b")
    job.attempts += 1
    job.waited += 0.5
    assert (job.attempts, job.waited, job.depth, job.key) == (1, 0.5, 0, None)
    assert (other.attempts, other.waited) == (0, 0.0)


def test_a_job_is_shown_with_its_key_if_it_has_one() -> None:
    assert repr(running("score")) == "<job score>"
    assert repr(running("score", key=17)) == "<job score key=17>"
    assert repr(running("score", key="")) == "<job score key=''>"
    assert len(repr(running("score", key="x" * 10_000))) < 150


def test_the_host_of_a_job_is_the_executor_that_runs_it() -> None:
    job = running("a")

    def inside() -> object:
        enter(job)
        return host_of_current_job("to_thread")

    assert contextvars.copy_context().run(inside) is job.host


@pytest.mark.parametrize("call", ["to_thread", "compute"])
def test_outside_a_job_nobody_says_which_executor_is_meant(call: str) -> None:
    with pytest.raises(UsageError) as caught:
        host_of_current_job(call)
    assert str(caught.value) == (
        f"penstock.{call} was called outside a job, so it cannot know which executor is meant. "
        f"Write `await executor.{call}(...)`."
    )
