"""Where a suspended task stands, as text: the lines on which its coroutines wait for each other."""

import asyncio
import traceback
from collections.abc import Iterable, Iterator
from types import CoroutineType, FrameType, GeneratorType
from typing import Any


def location(task: asyncio.Task[Any]) -> str:
    """One line for each coroutine of the task, outermost first, the one that really waits last.

    `Task.get_stack` shows the outermost frame of a suspended task only, which is seldom the interesting one.
    Loop thread only, or when the loop does not run.
    """
    summary = traceback.StackSummary.extract((frame, frame.f_lineno) for frame in _frames(task.get_coro()))
    lines = [f"      {frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in summary]
    return "\n".join(lines) or "      (no Python frame)"


def locations(tasks: Iterable[asyncio.Task[Any]]) -> str:
    """Name and location of each task, in the order of their names: `all_tasks` is a set and has no order."""
    ordered = sorted(tasks, key=lambda task: (len(task.get_name()), task.get_name()))
    return "\n".join(f"  {task.get_name()} waits at\n{location(task)}" for task in ordered)


def _frames(awaited: object) -> Iterator[FrameType]:
    """The frames of the chain of coroutines, as far as they are written in Python."""
    while isinstance(awaited, CoroutineType | GeneratorType):
        if isinstance(awaited, CoroutineType):
            frame, awaited = awaited.cr_frame, awaited.cr_await
        else:
            frame, awaited = awaited.gi_frame, awaited.gi_yieldfrom
        if frame is not None:
            yield frame
