"""The pages for users: every Python block runs, every link leads somewhere, the reference names what there is.

The blocks of a page run in order and share one namespace, in a directory of their own, against a small service on
loopback. In the text of a block, the addresses of the pages become that service's, and ten thousand becomes a few, so
that a page is tested in a second. A block with a top-level `await` runs on the page's event loop, any other one outside
it. What a block prints must be what its `# -> ` comments say, if it has any; `...` stands for what varies.

A block that starts with the name of a file, such as `# score.py`, is that file, run by an interpreter of its own: what
starts processes, or shows how a program ends. Files named `# test_something.py` or `# conftest.py` are run by pytest,
those of a page together. A block after `<!-- not run: reason -->` is left out.
"""

import ast
import asyncio
import contextlib
import dataclasses
import doctest
import inspect
import itertools
import logging
import os
import pkgutil
import re
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from aiohttp import web

import penstock
import penstock.testing
from s3_service import EmbeddedS3
from service import ServiceConfig, make_app

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
REFERENCE = DOCS / "reference.md"
DESIGN = DOCS / "design.md"
"""Not for users: it also speaks of what is not built yet. Its links are checked, its code is not run."""

PAGES = [page for page in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))] if page.is_file() and page != DESIGN]
LINKED = [*PAGES, *([DESIGN] if DESIGN.is_file() else [])]

FEWER = {"10_000": "200", "10_001": "201"}
OBJECT_STORE = "http://127.0.0.1:9000"
"""The address that pages give an object store; those that name it get one."""
START_TIMEOUT = 10.0
FILES_TIMEOUT = 60.0
PYTEST_INI = """[pytest]
asyncio_mode = auto
asyncio_default_fixture_loop_scope = function
filterwarnings = error
"""


# --- the service that the pages talk to ---


class Extras:
    """The routes beside those of `examples/service.py`, each of which does one thing that a page explains."""

    def __init__(self, origins: list[str]) -> None:
        self._origins = origins
        self._asked: Counter[str] = Counter()

    def add_to(self, app: web.Application) -> None:
        for path in ("items/{number}", "flaky", "busy", "broken", "slow", "hello", "dump", "headers", "private"):
            app.router.add_get(f"/{path}", getattr(self, path.partition("/")[0]))
        app.router.add_get("/login", self.login)
        app.router.add_get("/moved", self.moved)
        app.router.add_get("/elsewhere", self.elsewhere)
        app.router.add_post("/broken", self.broken)
        app.router.add_post("/token", self.token)

    async def items(self, request: web.Request) -> web.Response:
        """An item; there are ten thousand."""
        number = int(request.match_info["number"])
        if not 1 <= number <= 10_000:
            raise web.HTTPNotFound(text=f"no item {number}")
        return web.json_response({"id": number, "name": f"item {number}"})

    async def flaky(self, request: web.Request) -> web.Response:
        """Fails twice for each id, then works."""
        if self._nth(request) <= 2:
            raise web.HTTPServiceUnavailable(text="restarting")
        return web.json_response({"id": request.query.get("id")})

    async def busy(self, request: web.Request) -> web.Response:
        """Asks for a pause of one second, once."""
        if self._nth(request) == 1:
            raise web.HTTPTooManyRequests(headers={"Retry-After": "1"}, text="slow down")
        return web.json_response({})

    async def broken(self, _: web.Request) -> web.Response:
        """Fails always."""
        raise web.HTTPServiceUnavailable(text="out of order")

    async def slow(self, _: web.Request) -> web.Response:
        """Takes its time."""
        await asyncio.sleep(0.5)
        return web.json_response({})

    async def hello(self, _: web.Request) -> web.Response:
        """Is not JSON."""
        return web.Response(text="<html>hello</html>", content_type="text/html")

    async def dump(self, _: web.Request) -> web.Response:
        """A longer body: 20,000 lines."""
        return web.Response(text="".join(f"line {number}\n" for number in range(20_000)))

    async def headers(self, request: web.Request) -> web.Response:
        """The headers that arrived."""
        return web.json_response({name.lower(): value for name, value in request.headers.items()})

    async def token(self, request: web.Request) -> web.Response:
        """Tokens 1, 2, 3 ..."""
        return web.json_response({"access_token": str(self._nth(request))})

    async def private(self, request: web.Request) -> web.Response:
        """For bearers of a token, the first of which has expired."""
        if request.headers.get("Authorization") in (None, "Bearer 1"):
            raise web.HTTPUnauthorized
        return web.json_response({})

    async def login(self, _: web.Request) -> web.Response:
        """Sets a cookie."""
        response = web.json_response({})
        response.set_cookie("session", "abc")
        return response

    async def moved(self, _: web.Request) -> web.Response:
        """Redirects on the same origin."""
        raise web.HTTPFound("/headers")

    async def elsewhere(self, _: web.Request) -> web.Response:
        """Redirects to another origin."""
        raise web.HTTPFound(f"{self._origins[1]}/headers")

    def _nth(self, request: web.Request) -> int:
        self._asked[request.path_qs] += 1
        return self._asked[request.path_qs]


class LoopbackService:
    """One application under two origins, in a thread, for as long as the `with` block lasts."""

    def __init__(self, config: ServiceConfig) -> None:
        self.origins: list[str] = []
        self._config = config
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="docs-service")

    def __enter__(self) -> "LoopbackService":
        self._thread.start()
        assert self._started.wait(START_TIMEOUT), "the service starts"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = make_app(self._config)
        Extras(self.origins).add_to(app)
        runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
        await runner.setup()
        try:
            for _ in range(2):
                await web.TCPSite(runner, "127.0.0.1", 0).start()
            # By name, since aiohttp keeps no cookies of an address.
            self.origins.extend(f"http://localhost:{address[1]}" for address in runner.addresses)
            self._started.set()
            await self._stop.wait()
        finally:
            await runner.cleanup()

    def put_into(self, text: str) -> str:
        """`text` with this service's addresses in place of those that the pages are written with."""
        text = re.sub(r"https?://other\.example\.com", self.origins[1], text)
        return re.sub(r"https?://((\w+\.)*example\.(com|org)|(127\.0\.0\.1|localhost):8080)", self.origins[0], text)


# --- the blocks of a page ---


class Block(NamedTuple):
    """A piece of Python on a page, and the line before its first one."""

    page: Path
    line: int
    code: str

    @property
    def source(self) -> str:
        """Its code, so that its line numbers are those of the page."""
        return "\n" * self.line + self.code

    @property
    def file_name(self) -> str | None:
        """Which file it is, if it is one."""
        match = re.match(r"# (\w+\.py)$", self.code.partition("\n")[0])
        return match and match[1]

    @property
    def for_pytest(self) -> bool:
        """Whether it is a file that pytest is to run."""
        return re.match(r"(test_\w+|conftest)\.py", self.file_name or "") is not None

    @property
    def printed(self) -> list[str]:
        """What its comments say that it prints."""
        return re.findall(r"# -> ?(.*)$", self.code, re.MULTILINE)


_FENCE = re.compile(
    r"(?P<skipped><!-- not run: \S[^>]*-->\s*)?^(?P<indent> *)```python\n(?P<code>.*?)^(?P=indent)```$", re.M | re.S
)


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    found = list(_FENCE.finditer(text))
    assert len(found) == len(re.findall(r"^ *```py", text, re.M)), f"{page}: a fence that is not ```python alone"
    return [
        Block(page, text.count("\n", 0, match.start("code")), textwrap.dedent(match["code"]))
        for match in found
        if match["skipped"] is None
    ]


def run_block(block: Block, namespace: dict[str, Any], runner: asyncio.Runner) -> None:
    compiled = compile(block.source, str(block.page), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    if compiled.co_flags & inspect.CO_COROUTINE:
        runner.run(eval(compiled, namespace))
        return
    with contextlib.suppress(SystemExit):  # a script may end so
        exec(compiled, namespace)


def run_pytest_on(blocks: list[Block]) -> None:
    for block in blocks:
        assert block.file_name is not None, "only files are given to pytest"
        Path(block.file_name).write_text(block.source, "utf-8")
    Path("pytest.ini").write_text(PYTEST_INI, "utf-8")
    # Without the options that were meant for the pytest that runs this test, such as coverage.
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:anyio", "."],
        env=environment, capture_output=True, text=True, timeout=FILES_TIMEOUT, check=False,
    )  # fmt: skip
    names = ", ".join(f"{block.file_name} from line {block.line + 1}" for block in blocks)
    assert ran.returncode == 0, f"{blocks[0].page}: {names}; line numbers are the page's\n{ran.stdout}{ran.stderr}"


def run_script(block: Block) -> str:
    """Run the file that a block is; return what it prints. It may end with an exit status, but not by an error."""
    assert block.file_name is not None, "only files are run as scripts"
    Path(block.file_name).write_text(block.source, "utf-8")
    ran = subprocess.run(
        [sys.executable, "-W", "error", block.file_name],
        capture_output=True, text=True, timeout=FILES_TIMEOUT, check=False,
    )  # fmt: skip
    # 1 is Python's own for an error that nobody caught; below 0 a signal has ended it.
    assert ran.returncode == 0 or ran.returncode > 2, f"{block.page}: {block.file_name}\n{ran.stdout}{ran.stderr}"
    return ran.stdout


@pytest.fixture
def _log_as_before() -> Iterator[None]:
    """A page may show how to configure the log."""
    yield
    for name in ("penstock.jobs", "penstock.run"):
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.mark.usefixtures("_log_as_before")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_python_block_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = blocks_of(page)
    if not blocks:
        return
    monkeypatch.chdir(tmp_path)
    # The tutorial starts the service of the examples as it is; elsewhere only what a page asks for fails.
    config = ServiceConfig(latency=0.001)
    if page.name != "tutorial.md":
        config = dataclasses.replace(config, errors=0.0, drops=0.0)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    tests = []
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(LoopbackService(config))
        store = OBJECT_STORE
        if any(OBJECT_STORE in block.code for block in blocks):
            store = stack.enter_context(EmbeddedS3()).url
        runner = stack.enter_context(asyncio.Runner())
        for block in blocks:
            code = service.put_into(block.code).replace(OBJECT_STORE, store)
            for many, few in FEWER.items():
                code = re.sub(rf"\b{many}\b", few, code)
            block = block._replace(code=code)
            if block.for_pytest:
                tests.append(block)
                continue
            if block.file_name is not None:
                compare(block, run_script(block))
                continue
            capsys.readouterr()
            run_block(block, namespace, runner)
            compare(block, capsys.readouterr().out)
    if tests:
        run_pytest_on(tests)


def compare(block: Block, output: str) -> None:
    want = "\n".join(block.printed)
    if not want:
        return
    checker, example = doctest.OutputChecker(), doctest.Example("", want + "\n")
    if not checker.check_output(want + "\n", output, doctest.ELLIPSIS):
        difference = checker.output_difference(example, output, doctest.ELLIPSIS)
        raise AssertionError(f"{block.page}, the block at line {block.line + 1}:\n{difference}")


# --- links ---


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def without_code(page: Path) -> str:
    return re.sub(r"^( *)```.*?^\1```$", "", page.read_text("utf-8"), flags=re.M | re.S)


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (
            anchor and anchor not in map(slug, re.findall(r"^#+ (.*)$", without_code(target), re.M))
        ):
            broken.append(link)
    assert broken == []


# --- the reference ---


def sections_of_reference() -> dict[str, str]:
    parts = re.split(r"^## (.*)$", REFERENCE.read_text("utf-8"), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows(text: str) -> list[list[str]]:
    """The cells of all tables, without their heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [row for row, after in itertools.zip_longest(cells, cells[1:]) if not (is_rule(row) or is_rule(after))]


def is_rule(row: list[str] | None) -> bool:
    return row is not None and all(re.fullmatch(r":?-+:?", cell) for cell in row)


def code_in(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_reference_names_exactly_the_public_names() -> None:
    sections = sections_of_reference()
    defaults, testing, tree = (sections.pop(name) for name in ("Defaults", "penstock.testing", "Exceptions"))
    assert defaults
    named = Counter(code_in(row[0])[0] for text in sections.values() for row in rows(text))
    named.update(name for name, _ in tree_in(tree))
    named.pop("Exception")
    assert named == Counter(penstock.__all__)
    assert Counter(code_in(row[0])[0] for row in rows(testing)) == Counter(penstock.testing.__all__)


def tree_in(text: str) -> list[tuple[str, str]]:
    """Each class of the drawn tree with its parent."""
    found: list[tuple[str, str]] = []
    above = ["Exception"]
    for line in text.splitlines():
        match = re.match(r"    ((?:│   |    )*(?:├── |└── )?)([A-Z]\w+)", line)
        if match:
            depth = len(match[1]) // 4
            found.append((match[2], above[depth]))
            above[depth + 1 :] = [match[2]]
    return [*found, ("Exception", "BaseException")]


def test_the_reference_draws_the_tree_of_exceptions() -> None:
    drawn = dict(tree_in(sections_of_reference()["Exceptions"]))
    for name in drawn.keys() - {"Exception"}:
        assert getattr(penstock, name).__mro__[1].__name__ == drawn[name], name
    errors = {name for name in penstock.__all__ if is_error(getattr(penstock, name))}
    assert drawn.keys() - {"Exception"} == errors


def is_error(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, BaseException)


def test_the_reference_lists_the_fields_of_records() -> None:
    for row in rows(sections_of_reference()["Records and statistics"]):
        name, *fields = code_in(row[0]) + code_in(row[1])
        record = getattr(penstock, name)
        if dataclasses.is_dataclass(record):
            assert fields == [field.name for field in dataclasses.fields(record) if field.repr], name
        else:
            assert fields == list(record._fields), name


def test_the_defaults_table_agrees_with_the_constants() -> None:
    table = rows(sections_of_reference()["Defaults"])
    assert table
    for _, value, constant, reason in table:
        (path,) = code_in(constant)
        assert float(value.split()[0].replace(",", "")) == float(pkgutil.resolve_name(path)), path
        assert reason, path
