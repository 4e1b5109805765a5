"""A request that is cancelled, at whichever step, gives everything back: permits, connections, tasks, sockets."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from penstock import HttpClient, HttpStatusError, PenstockError, Retry
from penstock.testing import act_at_every_step, cancel_at_every_step

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tests.clients.conftest import Request, Web

RETRY = Retry(attempts=3, wait=1)


class State:
    """What one run of a scenario leaves."""

    def __init__(self) -> None:
        self.left: list[tuple[int, int, int]] = []
        self.api: HttpClient | None = None
        self.closing: asyncio.Task[None] | None = None
        self.ended = 0

    def note(self, web: Web, api: HttpClient) -> None:
        """What is held at this moment: connections, permits, places in queues."""
        seen = api.statistics().values()
        self.left.append((web.in_use(api), sum(key.in_flight for key in seen), sum(key.waiting for key in seen)))

    def is_clean(self) -> bool:
        return all(held == (0, 0, 0) for held in self.left)


def eventful(web: Web) -> Callable[[Request], bytes | None]:
    """A 401, a 503 with a long body, a dead connection, a 429 with a pause, a redirect; then all is well."""

    return web.script(
        web.reply(status=401),
        web.reply(b"x" * 70_000, status=503),
        None,
        web.reply(status=307, Location="/elsewhere"),
        web.reply(status=429, Retry_After="2"),
        web.reply(b"done" * 10_000),
    )


async def token() -> Mapping[str, str]:
    await asyncio.sleep(1)
    return {"Authorization": "t"}


def test_a_cancelled_request_gives_everything_back_at_any_step(web: Web) -> None:
    """Through renewal, retries, a dead connection, a redirect and a pause; closing the client is cancelled too."""

    async def scenario(state: State) -> None:
        async with (
            web.serving(eventful(web)) as server,
            HttpClient(server.url, auth=token, retry=RETRY, timeout=30) as api,
        ):
            try:
                assert len((await api.get("/x")).body) == 40_000
            finally:
                state.note(web, api)

    assert cancel_at_every_step(scenario, arrange=State, check=State.is_clean) >= 40


def test_a_cancelled_stream_gives_everything_back_at_any_step(web: Web) -> None:
    """Before its headers, between its pieces, and at its end."""

    def answer(request: Request) -> bytes:
        if request.target == "/here":
            return web.reply(b"x" * 1_000, status=302, Location="/there")
        for second in (1, 2):
            web.later(request, second, b"5\r\nhello\r\n" + (b"0\r\n\r\n" if second == 2 else b""))
        return web.head(200, Transfer_Encoding="chunked")

    async def scenario(state: State) -> None:
        async with web.serving(answer) as server, HttpClient(server.url, retry=RETRY) as api:
            try:
                async with api.stream("GET", "/here") as response:
                    assert b"".join([piece async for piece in response.iter_bytes()]) == b"hellohello"
            finally:
                state.note(web, api)

    assert cancel_at_every_step(scenario, arrange=State, check=State.is_clean) >= 12


@pytest.mark.parametrize("way", ["announced", "in chunks", "of an error"])
def test_a_request_that_is_cancelled_within_its_body_gives_everything_back_at_any_step(web: Web, way: str) -> None:
    """The connection is closed at once, and not when the collector finds it."""

    def answer(request: Request) -> bytes:
        web.later(request, 2, b"5\r\nhello\r\n0\r\n\r\n" if way == "in chunks" else b"x" * 10)
        if way == "in chunks":
            return web.head(200, Transfer_Encoding="chunked")
        return web.head(404 if way == "of an error" else 200, Content_Length="10")

    async def scenario(state: State) -> None:
        async with web.serving(answer) as server, HttpClient(server.url) as api:
            try:
                await api.get("/x")
            except HttpStatusError:
                assert way == "of an error"
            except asyncio.CancelledError:
                state.note(web, api)  # here, where the traceback still holds what was in use
                raise

    assert cancel_at_every_step(scenario, arrange=State, check=State.is_clean) >= 8


def test_requests_that_contend_for_a_permit_give_everything_back_at_any_step(web: Web) -> None:
    """Two requests, one permit; a body that is too large and an answer that is too slow among them."""

    def answer(request: Request) -> bytes:
        if request.target == "/large":
            return web.chunked(bytes(3_000))
        return web.later(request, 1, web.reply(b"ok"))

    async def ask(api: HttpClient, path: str) -> None:
        try:
            await api.get(path)
        except PenstockError:
            assert path == "/large"

    async def scenario(state: State) -> None:
        async with (
            web.serving(answer) as server,
            HttpClient(server.url, limit=1, max_body_bytes=1_000, retry=RETRY) as api,
        ):
            try:
                async with asyncio.TaskGroup() as group:
                    for path in ("/slow", "/large"):
                        group.create_task(ask(api, path))
            finally:
                state.note(web, api)

    assert cancel_at_every_step(scenario, arrange=State, check=State.is_clean) >= 10


def test_one_cancelled_request_takes_nothing_from_another_at_any_step(web: Web) -> None:
    """Both wait for the same renewal, then for the same permit; the survivor always gets its answer."""

    class Pair(State):
        victim: asyncio.Task[Any] | None = None

        def strike(self) -> None:
            if self.victim is not None:
                self.victim.cancel()

    async def scenario(pair: Pair) -> None:
        answers = web.script(web.reply(status=401), web.reply(status=503), web.reply(b"ok"))
        async with web.serving(answers) as server, HttpClient(server.url, limit=1, auth=token, retry=RETRY) as api:
            pair.victim = asyncio.create_task(api.get("/victim"))
            survivor = asyncio.create_task(api.get("/survivor"))
            await asyncio.wait([pair.victim, survivor])
            assert survivor.result().body == b"ok"
            pair.note(web, api)

    assert act_at_every_step(scenario, Pair.strike, arrange=Pair, check=Pair.is_clean) >= 20


def test_closing_the_client_ends_every_request_with_an_error_of_the_tree_at_any_step(web: Web) -> None:
    """Whatever the request is at: it is not left hanging, and nothing foreign comes out of it."""

    def close(state: State) -> None:
        if state.api is not None and state.closing is None:
            state.closing = asyncio.get_running_loop().create_task(state.api.aclose())

    async def scenario(state: State) -> None:
        async with web.serving(eventful(web)) as server, HttpClient(server.url, auth=token, retry=RETRY) as api:
            state.api = api
            try:
                await api.get("/x")
            except PenstockError:
                state.ended += 1
            if state.closing is not None:
                await state.closing
            assert not any(key.in_flight or key.waiting for key in api.statistics().values())

    assert act_at_every_step(scenario, close, arrange=State) >= 40


@pytest.mark.virtual_clock
async def test_cancelled_requests_do_not_use_up_the_connections(web: Web) -> None:
    """A thousand given-up requests later the client is as good as new."""
    async with web.serving(lambda _: b"") as server, HttpClient(server.url, limit=10) as api:
        for _ in range(20):
            asked = [asyncio.create_task(api.get("/x")) for _ in range(50)]
            await asyncio.sleep(0.01)
            for task in asked:
                task.cancel()
            await asyncio.wait(asked)
        server.answer = lambda _: web.reply(b"ok")
        assert (await api.get("/x")).body == b"ok"
        assert web.in_use(api) == 0
