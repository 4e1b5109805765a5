"""Headers that prove who asks: asked for once, renewed once for all who wait, lost for nobody by anybody's end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from penstock import ClosedError, Executor, HttpClient, HttpStatusError, Retry, RoundTripError, UsageError, current_job
from penstock.clients.auth import PATIENCE, RenewableAuth

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.clients.conftest import Request, Web

pytestmark = pytest.mark.virtual_clock


class Tokens:
    """An auth function that takes its time and counts its calls; the service accepts the newest token only."""

    def __init__(self, web: Web, takes: float = 1.0) -> None:
        self.web = web
        self.takes = takes
        self.calls = 0
        self.accepted = 1
        self.failures: list[BaseException] = []

    async def __call__(self) -> dict[str, str]:
        self.calls += 1
        number = self.calls
        await asyncio.sleep(self.takes)
        if self.failures:
            raise self.failures.pop(0)
        return {"Authorization": f"Token {number}"}

    def answer(self, request: Request) -> bytes:
        accepted = request.headers.get("Authorization") == f"Token {self.accepted}"
        return self.web.reply(status=200 if accepted else 401)


async def all_of(*requests: asyncio.Task[Any]) -> list[Any]:
    return await asyncio.gather(*requests, return_exceptions=True)


def start(api: HttpClient, amount: int) -> list[asyncio.Task[Any]]:
    return [asyncio.create_task(api.get(f"/{number}")) for number in range(amount)]


async def test_a_mapping_is_sent_as_it_is(web: Web) -> None:
    """A 401 is then final: there is nothing to renew."""
    async with web.serving(web.reply(status=401)) as server, HttpClient(server.url, auth={"X-Key": "k"}) as api:
        with pytest.raises(HttpStatusError, match="401"):
            await api.get("/x")
    assert [request.headers["X-Key"] for request in server.requests] == ["k"]


async def test_the_function_is_called_at_first_use_once_for_all(web: Web) -> None:
    """Not when the client is made, and not by each of the first hundred jobs."""
    tokens = Tokens(web)
    async with web.serving(tokens.answer) as server, HttpClient(server.url, auth=tokens) as api:
        assert tokens.calls == 0
        assert all(response.status == 200 for response in await all_of(*start(api, 100)))
        await api.get("/later")
    assert tokens.calls == 1
    assert len(server.requests) == 101


async def test_a_401_renews_once_for_all_who_wait(web: Web) -> None:
    """A hundred requests hear a 401; the function is called once, and all of them succeed at their second attempt."""
    tokens = Tokens(web)
    async with (
        web.serving(tokens.answer) as server,
        HttpClient(server.url, auth=tokens, retry=Retry(attempts=1)) as api,
    ):
        await api.get("/first")
        tokens.accepted = 2
        responses = await all_of(*start(api, 100))
        assert [response.attempts for response in responses] == [2] * 100
        assert web.in_use(api) == 0
    assert tokens.calls == 2
    assert len(server.requests) == 201


async def test_a_second_401_is_raised(web: Web) -> None:
    """Fresh headers are refused too: it is not their age."""
    tokens = Tokens(web)
    tokens.accepted = 99
    async with web.serving(tokens.answer) as server, HttpClient(server.url, auth=tokens) as api:
        with pytest.raises(HttpStatusError, match="401"):
            await api.get("/x")
    assert (tokens.calls, len(server.requests)) == (2, 2)


async def test_a_late_401_of_old_headers_renews_nothing(web: Web) -> None:
    """The newer ones that somebody else has fetched are simply used."""
    tokens = Tokens(web)

    def answer(request: Request) -> bytes:
        slow = request.target == "/slow" and request.headers["Authorization"] == "Token 1"
        return web.later(request, 10, tokens.answer(request)) if slow else tokens.answer(request)

    async with web.serving(answer) as server, HttpClient(server.url, auth=tokens) as api:
        await api.get("/first")
        tokens.accepted = 2
        slow = asyncio.create_task(api.get("/slow"))
        await api.get("/quick")
        assert (await slow).attempts == 2
    assert tokens.calls == 2


async def test_nobody_uses_headers_that_are_being_renewed(web: Web) -> None:
    """They have been refused: who comes meanwhile waits, and does not hear a 401 of his own."""
    tokens = Tokens(web, takes=5)
    async with web.serving(tokens.answer) as server, HttpClient(server.url, auth=tokens) as api:
        await api.get("/first")
        tokens.accepted = 2
        first = asyncio.create_task(api.get("/x"))
        await asyncio.sleep(1)
        assert (await api.get("/y")).attempts == 1
        assert (await first).attempts == 2
    assert tokens.calls == 2


@pytest.mark.parametrize("victim", [0, 1, 2])
async def test_who_is_cancelled_while_waiting_takes_the_renewal_from_nobody(web: Web, victim: int) -> None:
    """Not even the one that began it."""
    tokens = Tokens(web)
    async with web.serving(tokens.answer) as server, HttpClient(server.url, auth=tokens) as api:
        waiting = start(api, 3)
        await asyncio.sleep(0.5)
        waiting[victim].cancel()
        ended = await all_of(*waiting)
        assert isinstance(ended.pop(victim), asyncio.CancelledError)
        assert [response.status for response in ended] == [200, 200]
    assert tokens.calls == 1


async def test_an_error_of_the_function_reaches_all_who_wait_and_the_next_one_asks_again(web: Web) -> None:
    """The same error, unwrapped; a failure is not remembered."""
    tokens = Tokens(web)
    tokens.failures = [LookupError("no token today")]
    async with web.serving(tokens.answer) as server, HttpClient(server.url, auth=tokens) as api:
        ended = await all_of(*start(api, 10))
        assert [repr(error) for error in ended] == ["LookupError('no token today')"] * 10
        assert (tokens.calls, server.requests) == (1, [])
        tokens.accepted = 2
        assert (await api.get("/x")).status == 200
    assert tokens.calls == 2


async def test_an_error_that_nobody_waits_for_any_more_is_no_complaint(web: Web) -> None:
    """All who waited were cancelled; asyncio is not to log "exception was never retrieved"."""
    tokens = Tokens(web)
    tokens.failures = [LookupError()]
    async with web.serving(tokens.answer) as server, HttpClient(server.url, auth=tokens) as api:
        waiting = start(api, 3)
        await asyncio.sleep(0.5)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        await asyncio.sleep(5)
        tokens.accepted = 2
        assert (await api.get("/x")).status == 200


async def test_a_function_that_asks_the_client_itself_is_told_so(web: Web) -> None:
    """It would wait for itself for ever."""

    async def token() -> Mapping[str, str]:
        answer = await api.get_json("/token")
        return {"Authorization": answer["token"]}

    async with web.serving(web.reply(b'{"token": "t"}')) as server, HttpClient(server.url, auth=token) as api:
        with pytest.raises(UsageError, match="auth= made a request with the client .* Use another HttpClient in it"):
            await api.get("/x")
    assert server.requests == []


async def test_a_function_that_returns_no_mapping_is_told_so(web: Web) -> None:
    """A bare token is the usual mistake."""

    async def token() -> Any:
        return "secret"

    async with web.serving(web.reply()) as server, HttpClient(server.url, auth=token) as api:
        with pytest.raises(
            UsageError, match=r"returned str, expected a mapping .*'Authorization': 'Bearer \.\.\.'"
        ) as e:
            await api.get("/x")
    assert "secret" not in str(e.value)


async def test_closing_ends_a_renewal_and_tells_those_who_wait(web: Web) -> None:
    """They were not cancelled: they get an error that says what happened."""
    tokens = Tokens(web, takes=1_000)
    async with web.serving(tokens.answer) as server:
        async with HttpClient(server.url, auth=tokens) as api:
            waiting = start(api, 3)
            await asyncio.sleep(1)
        for error in await all_of(*waiting):
            assert isinstance(error, ClosedError)
            assert "closed while its auth= function was asked" in str(error)
    assert server.requests == []


async def test_who_is_cancelled_while_the_client_is_closed_stays_cancelled(web: Web) -> None:
    """A cancellation is never turned into anything else."""
    tokens = Tokens(web, takes=1_000)
    async with web.serving(tokens.answer) as server:
        async with HttpClient(server.url, auth=tokens) as api:
            (waiting,) = start(api, 1)
            await asyncio.sleep(1)
            asyncio.get_running_loop().call_soon(waiting.cancel)
        with pytest.raises(asyncio.CancelledError):
            await waiting


async def test_a_function_that_cannot_be_cancelled_does_not_keep_the_client_open(web: Web) -> None:
    """Closing waits for it for a bounded time."""
    end = asyncio.Event()

    async def stubborn() -> Mapping[str, str]:
        while not end.is_set():
            try:
                await end.wait()
            except asyncio.CancelledError:
                continue
        return {}

    async with web.serving(web.reply()) as server:
        async with HttpClient(server.url, auth=stubborn) as api:
            (waiting,) = start(api, 1)
            await asyncio.sleep(1)
            closing = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - closing == PATIENCE
        end.set()
        with pytest.raises(ClosedError):
            await waiting


async def test_closing_that_is_cancelled_still_closes_the_connections(web: Web) -> None:
    """Waiting for a renewal to end is the only wait before them."""

    async def slow_to_end() -> Mapping[str, str]:
        try:
            await asyncio.sleep(1_000)
        finally:
            await asyncio.sleep(1)
        return {}

    async with web.serving(web.reply()) as server:
        api = await HttpClient(server.url, auth=slow_to_end).__aenter__()
        (waiting,) = start(api, 1)
        await asyncio.sleep(1)
        closing = asyncio.create_task(api.aclose())
        await asyncio.sleep(0.5)
        closing.cancel()
        await asyncio.wait([closing])
        assert closing.cancelled()
        assert api._session is not None
        assert api._session.closed
        with pytest.raises(ClosedError):
            await waiting
        await asyncio.sleep(1)  # until the function has ended, for which nobody waits


async def test_a_function_that_cancels_itself_cancels_nobody_else(web: Web) -> None:
    """Who waits gets an error, and the next one asks again."""
    tokens = Tokens(web)
    tokens.failures = [asyncio.CancelledError()]
    async with web.serving(tokens.answer) as server, HttpClient(server.url, auth=tokens) as api:
        for error in await all_of(*start(api, 3)):
            assert isinstance(error, RoundTripError)
            assert "auth= cancelled itself" in str(error)
        tokens.accepted = 2
        assert (await api.get("/x")).status == 200


async def test_headers_are_outdated_when_they_were_refused_or_newer_ones_are_asked_for() -> None:
    """What there is during a renewal has been refused, whichever generation somebody heard the 401 with."""
    release = asyncio.Event()

    async def fetch() -> dict[str, str]:
        await release.wait()
        return {}

    auth = RenewableAuth(fetch)
    assert auth.outdated(0)
    renewing = asyncio.create_task(auth.renew())
    await asyncio.sleep(0)
    assert auth.outdated(0)
    release.set()
    await renewing
    assert not auth.outdated(0)
    assert auth.outdated(1)


async def test_the_function_is_asked_for_all_and_not_for_the_job_that_happened_to_be_first(web: Web) -> None:
    """Its context variables are those of the first, its attempts are nobody's."""
    seen: list[object] = []

    async def fetch() -> dict[str, str]:
        seen.append(current_job())
        return {}

    async with web.serving(web.reply()) as server, HttpClient(server.url, auth=fetch) as api, Executor() as executor:

        async def ask(_item: int) -> None:
            await api.get("/x")

        outcomes = await executor.as_completed(ask, range(2))
    assert seen == [None]
    assert [outcome.attempts for outcome in outcomes] == [1, 1]


async def test_a_client_whose_function_was_never_asked_is_closed_like_any_other(web: Web) -> None:
    """There is no renewal to wait for; and none begins afterwards."""

    async def fetch() -> dict[str, str]:
        return {}

    auth = RenewableAuth(fetch)
    await auth.close()
    with pytest.raises(ClosedError, match="not asked any more"):
        await auth.renew()


async def test_a_time_out_of_the_functions_own_stays_its_own(web: Web) -> None:
    """It is not taken for the end of `Retry(timeout=)`."""

    async def fetch() -> dict[str, str]:
        raise TimeoutError("the token service")

    async with web.serving(web.reply()) as server, HttpClient(server.url, auth=fetch) as api:
        with pytest.raises(TimeoutError, match="the token service"):
            await api.get("/x")
