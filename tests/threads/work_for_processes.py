"""Functions and classes for the worker processes of test_processes.py, which import this module by its name."""

import asyncio
import contextvars
import functools
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any

state = "as imported"
variable = contextvars.ContextVar("variable", default="default")


def identity(value: Any) -> Any:
    return value


def pid(*_: object) -> int:
    return os.getpid()


def all_of(*args: object, **kwargs: object) -> object:
    return args, kwargs


def state_here() -> tuple[str, str]:
    return state, variable.get()


def meet(fifo: str, mode: str) -> int:
    """Returns once another call has opened the other end."""
    with open(fifo, mode):
        return os.getpid()


def run_until_told(fifo: str) -> int:
    """Says that it runs, then waits for the word."""
    with open(fifo, "w"):
        pass
    with open(fifo):
        return os.getpid()


def die_when_told(fifo: str) -> None:
    run_until_told(fifo)
    os.kill(os.getpid(), signal.SIGKILL)


def meet_and_hang(fifo: str) -> None:
    with open(fifo, "w"):
        pass
    signal.pause()


def touch(path: str) -> None:
    with open(path, "x"):
        pass


def die(*_: object) -> None:
    os._exit(3)


def die_in_the_middle_of_the_answer() -> bytes:
    def half(self: Any, buffer: Any, *_: object) -> None:
        os.write(self._handle, bytes(buffer)[:1_000])
        os.kill(os.getpid(), signal.SIGKILL)

    connection.Connection._send = half  # type: ignore[attr-defined]
    return bytes(100_000)


def terminate_a_fork() -> int:
    pid = os.fork()
    if not pid:
        signal.pause()
    os.kill(pid, signal.SIGTERM)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def terminate_a_program() -> int:
    with subprocess.Popen(["sleep", "60"]) as program:
        program.terminate()
    return program.returncode


def fail(error: BaseException) -> None:
    raise error


def fail_to_fit(first: str, second: str) -> None:
    raise DoesNotFit(first, second)


def fail_with_a_lock() -> None:
    raise HoldsALock("busy")


def fail_unspeakably() -> None:
    raise Unspeakable


def break_a_pool_of_its_own() -> None:
    raise BrokenProcessPool("of its own")


def lock() -> object:
    return threading.Lock()


def stay_there() -> "StaysThere":
    return StaysThere()


def forget_to_await() -> object:
    return asyncio.sleep(0)


async def coroutine_function() -> None: ...


async def generator_function() -> Any:
    yield


def _wrapped(fn: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fn)
    def wrapper(*args: Any) -> Any:
        return fn(*args)

    return wrapper


def _plain() -> None: ...


hidden_by_its_wrapper = _plain
_plain = _wrapped(_plain)


class HoldsALock(Exception):
    def __init__(self, message: str = "") -> None:
        super().__init__(message)
        self.lock = threading.Lock()

    def method(self) -> None: ...


class DoesNotFit(Exception):
    """As so many exception classes: pickled with one argument, rebuilt with two."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


class Unspeakable(HoldsALock):
    def __str__(self) -> str:
        raise KeyboardInterrupt


class StaysHere:
    """Can be sent, and not be rebuilt in a worker process."""

    def __reduce__(self) -> Any:
        return _refuse_elsewhere, (os.getpid(),)


class StaysThere(StaysHere):
    """Cannot be rebuilt in the process that asked for it."""


def _refuse_elsewhere(home: int) -> None:
    if os.getpid() != home:
        raise ValueError("only at home")
