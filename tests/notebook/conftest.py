"""A real notebook kernel in a process of its own, and its cells."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from jupyter_client.blocking.client import BlockingKernelClient
    from jupyter_client.manager import KernelManager

BOUND = 30.0
"""Seconds without a word from the kernel, after which it is not waited for any more."""

IMPORTS = """
import asyncio, itertools, threading
import penstock
from penstock import Executor
"""


@dataclass
class Cell:
    """What became of a cell."""

    value: str | None = None
    """What its last line shows."""
    error: str | None = None
    """The name of the exception that ended it, and its message."""
    traceback: str = ""
    out: str = ""
    """What it has written to its standard output and standard error."""
    streams: dict[str, str] = field(default_factory=dict)
    """The same by the name of the stream."""


class Kernel:
    """Runs cells, one at a time, and presses "interrupt the kernel"."""

    def __init__(self, manager: "KernelManager", client: "BlockingKernelClient") -> None:
        self._manager = manager
        self._client = client

    def run(self, code: str, *, interrupt_at: tuple[str, ...] = ()) -> Cell:
        """Run a cell to its end. It is interrupted when it has written the first of these texts, then the second."""
        cell, due = Cell(), list(interrupt_at)
        request = self._client.execute(code)
        while True:
            message = self._client.get_iopub_msg(timeout=BOUND)
            if message["parent_header"].get("msg_id") != request:
                continue
            content: dict[str, Any] = message["content"]
            match message["msg_type"]:
                case "stream":
                    cell.out += content["text"]
                    cell.streams[content["name"]] = cell.streams.get(content["name"], "") + content["text"]
                    while due and due[0] in cell.out:
                        due.pop(0)
                        self._manager.interrupt_kernel()
                case "execute_result":
                    cell.value = content["data"]["text/plain"]
                case "error":
                    cell.error = f"{content['ename']}: {content['evalue']}"
                    cell.traceback = "\n".join(content["traceback"])
                case "status" if content["execution_state"] == "idle":
                    self._client.get_shell_msg(timeout=BOUND)  # the reply, so that the next cell gets its own
                    assert not due, f"the cell did not write {due[0]!r}: {cell}"
                    return cell

    def value(self, code: str) -> str:
        """What a cell shows that is to end without an error."""
        cell = self.run(code)
        assert cell.error is None, f"{cell.traceback}\n{cell.out}"
        assert cell.value is not None, cell
        return cell.value


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """One for all tests of a file, as a notebook has one for all its cells. On loopback; nothing outlives it."""
    jupyter_client = pytest.importorskip("jupyter_client")
    pytest.importorskip("ipykernel")
    utils = pytest.importorskip("jupyter_core.utils")
    directory = tmp_path_factory.mktemp("kernel")
    manager: KernelManager = jupyter_client.KernelManager(
        ip="127.0.0.1", connection_file=str(directory / "kernel.json")
    )
    with (directory / "output").open("w+") as output:
        manager.start_kernel(cwd=str(directory), env=_environment(directory), stdout=output, stderr=subprocess.STDOUT)
        try:
            client = manager.blocking_client()
            client.start_channels(stdin=False, hb=False)
            try:
                client.wait_for_ready(timeout=BOUND)
                kernel = Kernel(manager, client)
                assert kernel.run(IMPORTS).error is None
                yield kernel
            finally:
                client.stop_channels()
        finally:
            manager.shutdown_kernel(now=True)  # and its zmq context
            utils.ensure_event_loop().close()  # on which the blocking client runs its coroutines
            asyncio.set_event_loop(None)


def _environment(directory: Path) -> dict[str, str]:
    """Whoever runs the tests has settings and a history of their own."""
    path = os.pathsep.join(part for part in sys.path if part)
    return {**os.environ, "IPYTHONDIR": str(directory / "ipython"), "PYTHONPATH": path}
