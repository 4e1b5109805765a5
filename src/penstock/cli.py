"""The command line: what is in a journal, and what is to be done with it.

    penstock status run.db      what it is, how far it is, why items are dead
    penstock report run.db      a line for each item
    penstock dead run.db        the items that failed, with all that is known of them
    penstock export run.db      the results
    penstock retry run.db       have dead items run again by the next run
    penstock compact run.db     give disk space back

arguments -> command -> journal -> lines to a file or standard output. Nothing is collected: output of any length
streams. The first four only read, and may be used while a run writes.

Exit status: 0; 1 for wrong use and for everything that is wrong with a file, as one line on standard error; 130 after
Ctrl-C. A pipe that is closed (`| head`) is no error: what was asked for has been read.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from io import TextIOWrapper
from operator import attrgetter
from typing import Any, NoReturn, TextIO

from penstock.errors import PenstockError, UsageError, first_line
from penstock.journal.completion import write_completion
from penstock.journal.database import version_of_penstock
from penstock.journal.letters import dead_letter
from penstock.journal.lines import FORMATS, Lines
from penstock.journal.lock import is_held
from penstock.journal.options import JSON, Codec
from penstock.journal.plain import as_json
from penstock.journal.reading import Reading, Run
from penstock.journal.schema import Key, State, lock_of, side_file_of
from penstock.journal.upkeep import compact, forget_damaged, retry

DONE, WRONG, INTERRUPTED = 0, 1, 130
"""Exit statuses. The last one is the shell's for a program that SIGINT ended."""

DEAD_COLUMNS = (
    "key", "key_base64", "state", "kind", "error", "status", "message", "attempts", "recorded", "input",
    "input_base64", "shown_input", "answer", "answer_base64",
)  # fmt: skip
EXPORT_COLUMNS = ("key", "key_base64", "value", "value_base64")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status.

    Args:
        argv: its arguments; None are those of the process.

    Raises:
        SystemExit: after `--help` and `--version`, as argparse does it.
    """
    try:
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8", newline="")  # whatever the locale says: this is data
        arguments = _parser().parse_args(argv)
        arguments.command(arguments)
        sys.stdout.flush()
        status = DONE
    except BrokenPipeError:
        status = DONE
    except KeyboardInterrupt:
        status = INTERRUPTED
    except (PenstockError, OSError) as error:
        sys.stderr.write(f"penstock: error: {' '.join(str(error).splitlines())}\n")
        status = WRONG
    _let_go_of_output()
    return status


# --- commands ---


def _status(arguments: argparse.Namespace) -> None:
    with Reading(arguments.journal) as reading:
        for name, told in _status_lines(reading):
            sys.stdout.write(f"{name:<10}{told}\n")


def _status_lines(reading: Reading) -> Iterator[tuple[str, str]]:
    fingerprint = reading.fingerprint()
    yield "journal", f"{reading.path}, made by penstock {reading.meta().get('penstock version', '?')}"
    yield "job", str(fingerprint.get("job", "none has begun"))
    yield from ((name, str(fingerprint[name])) for name in ("version",) if fingerprint.get(name))
    yield from ((name, json.dumps(fingerprint[name])) for name in ("params",) if fingerprint.get(name))
    for state, count in reading.counts().items():
        if count or state in (State.DONE, State.DEAD):
            yield _name_of(state), f"{count:,}"
    spent = reading.spent()
    if spent:
        yield "spent", ", ".join(f"{amount:,.12g} {unit}" for unit, amount in spent.items())
    yield from _run_lines(reading)
    for place, cause in enumerate(reading.causes()):
        kind = f"{cause.kind}: " if cause.kind else ""
        told = f"{cause.count:,} x {kind}{cause.error} (first: {cause.example_key!r:.80})"
        yield "" if place else "causes", told


def _run_lines(reading: Reading) -> Iterator[tuple[str, str]]:
    runs = reading.runs()
    yield "runs", f"{len(runs):,}"
    if not runs:
        return
    last = runs[-1]
    if reading.going_on() == last:
        how = f"goes on, {_process_of(last)}"
    else:
        how = _how_it_ended(last)
        if is_held(reading.path):
            how += "; somebody opens the journal now, or works on it"
        elif last.ended is None:
            how += "; start it again, and it goes on from here"
    yield "last run", f"began {last.started}, {how}"


def _how_it_ended(run: Run) -> str:
    if run.ended is None:
        return f"its process died ({_process_of(run)})"
    return f"ended {run.ended}, " + (f"stopped: {run.stopped}" if run.stopped else "came to the end of its items")


def _process_of(run: Run) -> str:
    return f"process {run.pid} on host {run.host}"


def _report(arguments: argparse.Namespace) -> None:
    with _output(arguments) as file:
        write_completion(arguments.journal, file, arguments.format)


def _dead(arguments: argparse.Namespace) -> None:
    with Reading(arguments.journal) as reading, _values(arguments) as values, _output(arguments) as file:
        lines = Lines(file, arguments.format, DEAD_COLUMNS, anything=("input",))
        for row in reading.rows(State.DEAD, State.UNKNOWN):
            letter = dead_letter(reading, row._replace(input=None))
            lines.write(
                {
                    "key": letter.key,
                    "state": letter.state,
                    "kind": letter.kind,
                    "error": letter.error,
                    "status": letter.status,
                    "message": letter.message,
                    "attempts": letter.attempts,
                    "recorded": reading.recorded(row),
                    "input": values.shown("input", row.key, reading.input_data(row)),
                    "shown_input": letter.shown_input,
                    "answer": _text_if_it_is(letter.answer) if letter.answer else None,
                }
            )


def _export(arguments: argparse.Namespace) -> None:
    reading = Reading(arguments.journal, skip_damaged=arguments.skip_damaged)
    with reading, _values(arguments) as values, _output(arguments) as file:
        lines = Lines(file, arguments.format, EXPORT_COLUMNS, anything=("value",))
        for row, data in reading.results():
            lines.write({"key": row.key, "value": values.shown("result", row.key, data)})
    if reading.damaged:
        sys.stderr.write(f"penstock: {reading.damaged:,} damaged items were left out\n")


def _retry(arguments: argparse.Namespace) -> None:
    if arguments.damaged:
        number = forget_damaged(arguments.journal)
        sys.stdout.write(f"{number:,} items and steps that are damaged will be run again by the next run\n")
        return
    number = retry(arguments.journal, arguments.where, unknown=arguments.unknown)
    sys.stdout.write(f"{number:,} items will be run again by the next run on {arguments.journal}\n")


def _compact(arguments: argparse.Namespace) -> None:
    before, after = compact(arguments.journal)
    sys.stdout.write(f"{arguments.journal}: {before:,} bytes before, {after:,} bytes after\n")


# --- values ---


@contextmanager
def _values(arguments: argparse.Namespace) -> Iterator["_Values"]:
    """What shows values as the arguments say, and says at the end what it could not show.

    Raises:
        UsageError: there is no such codec.
    """
    if arguments.codec is None:
        yield (values := _Values(None))
    else:
        # As `python -m` does, which the command of an installed package does not: the codec is the user's, and so are
        # the classes that a pickle names.
        folder = os.getcwd()
        sys.path.insert(0, folder)
        try:
            yield (values := _Values(arguments.codec))
        finally:
            sys.path.remove(folder)
    values.tell()


class _Values:
    """Recorded values as JSON shows them.

    Args:
        name: of the codec, as `module` or `module:name`; None is JSON.

    Raises:
        UsageError: there is no such codec.
    """

    def __init__(self, name: str | None) -> None:
        self._told = name
        self._codec = JSON if name is None else _codec(name)
        self._as_recorded = 0
        self._lenient = 0

    def shown(self, what: str, key: Key | None, data: str | bytes | None) -> Any:
        """The value; or what is recorded, as bytes, where it has no form in JSON.

        Args:
            what: the value is, of the item with this key.

        Raises:
            UsageError: the codec that was asked for cannot read it.
        """
        if data is None:
            return None
        try:
            value = self._codec.loads(data)
        except Exception as error:
            if self._told is not None:
                raise UsageError(f"--codec {self._told} cannot read the {what} of {key!r:.80}{_why(error)}") from error
        else:
            with suppress(Exception):  # its class is the user's
                plain = value if self._told is None else as_json(value)
                self._lenient += not _is_strict(plain)
                return plain
        self._as_recorded += 1
        return data.encode() if isinstance(data, str) else data

    def tell(self) -> None:
        """Say on standard error what a reader might not expect."""
        if self._as_recorded:
            why = "are no JSON" if self._told is None else "hold what has no form in JSON"
            cure = ". Give --codec, that of the run" if self._told is None else ""
            sys.stderr.write(f"penstock: {self._as_recorded:,} values {why}: base64 of what is recorded{cure}\n")
        if self._lenient:
            sys.stderr.write(f"penstock: {self._lenient:,} values hold NaN or infinities, which strict JSON refuses\n")


def _is_strict(value: Any) -> bool:
    """Whether it is JSON to everybody, and not to Python alone.

    Raises:
        ValueError, RecursionError: it is none at all.
    """
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        json.dumps(value)
        return False
    return True


def _why(error: Exception) -> str:
    found = first_line(error)
    if "__main__" in found:
        return (
            f" ({found}). A class that is defined in the script which is run belongs to __main__, and no other program "
            f"finds it there: put it into a module, and have the script import that."
        )
    return (
        f" ({found}). Give the codec that the run was given; without --codec, values that are no JSON are written as "
        f"base64."
    )


def _codec(told: str) -> Codec:
    module, _, name = told.partition(":")
    try:
        found = import_module(module)
        codec: Codec = attrgetter(name)(found) if name else found
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"--codec {told}: {first_line(error)}. Expected module or module:name.") from error
    if not callable(getattr(codec, "loads", None)):
        raise UsageError(f"--codec {told}: has no loads(). Expected a codec, such as pickle or orjson.")
    return codec


def _text_if_it_is(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _name_of(state: State) -> str:
    return state.name.lower()


# --- output ---


@contextmanager
def _output(arguments: argparse.Namespace) -> Iterator[TextIO]:
    """Standard output; or a file, which gets its name once it is complete.

    Raises:
        UsageError: the file is the journal's own, or cannot be made.
    """
    if arguments.output is None:
        yield sys.stdout
        return
    name = os.path.realpath(arguments.output)
    journal = os.path.realpath(arguments.journal)
    if name in (journal, f"{journal}-wal", f"{journal}-shm", lock_of(journal), side_file_of(journal)):
        raise UsageError(f"--output {arguments.output}: belongs to the journal. Choose another name.")
    if os.path.exists(name) and not os.path.isfile(name):  # /dev/null, a pipe: nothing that could be replaced
        with _made(name, arguments.output) as file:
            yield file
        return
    draft = f"{name}.{os.getpid()}.part"
    try:
        with _made(draft, arguments.output) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, name)
    except BaseException:
        with suppress(OSError):
            os.remove(draft)
        raise


def _made(name: str, told: str) -> TextIO:
    """The file of that name, which the user calls otherwise."""
    try:
        return open(name, "w", encoding="utf-8", newline="")
    except OSError as error:
        folder = os.path.dirname(name)
        why = error.strerror if os.path.isdir(folder) else f"there is no folder {folder}"
        raise UsageError(f"--output {told}: cannot be written: {why}. Choose another name.") from error


def _let_go_of_output() -> None:
    """What cannot be written any more goes nowhere: the interpreter would complain of it at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


# --- arguments ---


class _Parser(argparse.ArgumentParser):
    """As argparse, but that wrong use is one line, and status 1."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. Try `{self.prog} --help`.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="penstock", description="Look into the journal of a run, or do something with it.")
    parser.add_argument("--version", action="version", version=f"penstock {version_of_penstock()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, command: Callable[[argparse.Namespace], None], summary: str, more: str) -> _Parser:
        found = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}. {more}")
        found.add_argument("journal", metavar="run.db", help="the journal")
        found.set_defaults(command=command)
        assert isinstance(found, _Parser), "made by one"
        return found

    add("status", _status, "show what it is, how far it is, and why items are dead", "May be used while a run writes.")
    report = add(
        "report", _report, "write a line for each item: its state, attempts, error, run and time", _HOW_WRITTEN
    )
    dead = add(
        "dead", _dead, "write the items that failed, or of which nobody knows how they ended, with all that is known",
        _HOW_WRITTEN,
    )  # fmt: skip
    export = add("export", _export, "write the results of the items that are done", _HOW_WRITTEN)
    for found, default in ((report, "csv"), (dead, "jsonl"), (export, "jsonl")):
        found.add_argument("--format", choices=FORMATS, default=default, help="(default: %(default)s)")
        found.add_argument("--output", metavar="FILE", help="write there, instead of standard output; under a "
                           "temporary name until it is complete")  # fmt: skip
    for found in (dead, export):
        found.add_argument("--codec", metavar="MODULE[:NAME]", help="what reads recorded values, such as pickle; as "
                           "the run was given it (default: JSON). Reading a pickle can run any program: do so only "
                           "with journals that you trust")  # fmt: skip
    export.add_argument("--skip-damaged", action="store_true", help="leave out what is damaged, and say how much it is")
    again = add(
        "retry", _retry, "have dead items run again by the next run", "All of them, unless --where says which ones. "
        "Refused while a run writes.",
    )  # fmt: skip
    again.add_argument("--where", metavar="WHICH", help='a kind ("transient"), a status ("HTTP 422"), or a part of the '
                       'class and first line of the error ("ValueError")')  # fmt: skip
    again.add_argument("--damaged", action="store_true", help="instead: what is damaged, and is forgotten with that")
    again.add_argument("--unknown", action="store_true", help="also those of which nobody knows how they ended")
    add(
        "compact", _compact, "give disk space back", "Refused while a run writes. Needs as much room as the journal "
        "takes, for a while. May be killed at any time: nothing is lost.",
    )  # fmt: skip
    return parser


_HOW_WRITTEN = (
    "In JSON lines and CSV, bytes are base64 in a field of their own, such as key_base64. Dates, decimals, sets, "
    "dataclasses and the like are shown as JSON can; a value that has no form in it is given as it is recorded, as "
    "value_base64. In CSV, values are JSON. May be used while a run writes."
)
