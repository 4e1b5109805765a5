"""The public face: every name has one home and says what it does; importing it costs nothing that it does not need."""

import ast
import inspect
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import penstock
import penstock.testing

PUBLIC = [getattr(penstock, name) for name in penstock.__all__]


def imported_names() -> list[tuple[str, str]]:
    """Module and name of each import in `penstock/__init__.py`."""
    tree = ast.parse(Path(penstock.__file__).read_text(encoding="utf-8"))
    return [
        (node.module or "", alias.asname or alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]


def test_what_is_imported_is_what_is_exported() -> None:
    """Nothing forgotten, nothing twice, in the order of the alphabet."""
    names = [name for _, name in imported_names()]
    assert Counter(names) == Counter(penstock.__all__)
    assert max(Counter(names).values()) == 1
    assert penstock.__all__ == sorted(penstock.__all__)


@pytest.mark.parametrize(("module", "name"), imported_names())
def test_a_public_name_comes_from_where_it_is_defined(module: str, name: str) -> None:
    """Not by way of a module that happens to import it too."""
    assert getattr(getattr(penstock, name), "__module__", None) in (module, None)


def test_the_module_holds_no_other_public_name() -> None:
    """Submodules aside, which importing leaves behind."""
    others = set(vars(penstock)) - set(penstock.__all__)
    assert not {name for name in others if not name.startswith("_") and not inspect.ismodule(vars(penstock)[name])}


@pytest.mark.parametrize("thing", PUBLIC, ids=penstock.__all__)
def test_a_public_class_or_function_says_what_it_does(thing: object) -> None:
    """Its public methods and properties too; a docstring that was inherited or generated does not count."""
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):
        return
    assert thing.__doc__
    assert not thing.__doc__.startswith(f"{thing.__name__}("), "a dataclass made this one"
    for name, member in vars(thing).items() if inspect.isclass(thing) else ():
        member = inspect.unwrap(getattr(member, "fget", None) or getattr(member, "__func__", member))
        if not name.startswith("_") and inspect.isfunction(member):
            assert member.__doc__, f"{thing.__name__}.{name}"


def test_the_tools_for_tests_are_public_and_documented() -> None:
    for name in penstock.testing.__all__:
        assert getattr(penstock.testing, name).__doc__
    assert penstock.testing.__all__ == sorted(penstock.testing.__all__)


def test_importing_penstock_starts_no_thread() -> None:
    """Nor does it change anything else that belongs to the process: signal handlers, the switch interval."""
    program = (
        "import signal, sys, threading; before = signal.getsignal(2), signal.getsignal(15), sys.getswitchinterval();"
        "import penstock; after = signal.getsignal(2), signal.getsignal(15), sys.getswitchinterval();"
        "print(threading.active_count(), before == after)"
    )
    answer = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "1 True"


def test_importing_penstock_imports_no_extra_and_no_test_tool() -> None:
    """In a fresh interpreter: what is not needed is not paid for, and may be absent."""
    unwanted = ["pytest", "hypothesis", "_pytest", "uvloop", "orjson", "requests", "boto3", "botocore"]
    unwanted += ["penstock.testing", "penstock.threads.processes", "concurrent.futures.process"]
    program = f"import sys, penstock; print([name for name in {unwanted!r} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
    assert answer.stderr == ""
