"""Which keys have come before in a run: as a real set would say, without one."""

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock.journal.schema import Key, Row, State
from penstock.journal.seen import Seen
from penstock.journal.store import Known

RUN = 3
KEYS: tuple[Key, ...] = ("1", 1, b"1", "2", 2, 2.5, *range(10, 20))


def known(number: int, run: int = RUN - 1, state: State = State.DONE) -> Known:
    return Known(number, Row("key", state, 1, run, 100.0, 0.0, 0.0))


class LookUp:
    """One of a chunk of keys: what it is told, and what of it is not admitted yet."""

    def __init__(self, keys: list[Key], since: set[Key]) -> None:
        self.keys = keys
        self.since = since
        self.found: dict[Key, Known] | None = None


class AsASetWouldSay(RuleBasedStateMachine):
    """A run as `Lookahead` and `Recording` drive it, with a journal that is a dict, and a real set of all keys.

    Look-ups begin, find what the journal holds at some moment until they have ended, and are used up in order, one key
    at a time; outcomes are committed in batches whenever it suits them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = Seen(RUN)
        self.came: set[Key] = set()
        self.journal: dict[Key, Known] = {}
        self.look_ups: list[LookUp] = []
        self.uncommitted: list[Key] = []
        self.number = 0

    @initialize(old=st.sets(st.sampled_from(KEYS)), gap=st.integers(0, 40))
    def there_is_a_journal_of_earlier_runs(self, old: set[Key], gap: int) -> None:
        for key in sorted(old, key=repr):
            self.number += 1 + gap
            self.journal[key] = known(self.number)

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=5))
    @precondition(lambda self: len(self.look_ups) < 3)
    def a_look_up_begins(self, keys: list[Key]) -> None:
        self.look_ups.append(LookUp(keys, self.seen.look_up_begins()))

    @rule()
    @precondition(lambda self: any(look_up.found is None for look_up in self.look_ups))
    def a_look_up_finds_what_is_there(self) -> None:
        look_up = next(look_up for look_up in self.look_ups if look_up.found is None)
        look_up.found = {key: self.journal[key] for key in look_up.keys if key in self.journal}

    @rule(runs_again=st.booleans(), takes=st.integers(1, 5))
    @precondition(lambda self: self.look_ups and self.look_ups[0].found is not None)
    def its_keys_are_admitted(self, runs_again: bool, takes: int) -> None:
        look_up = self.look_ups[0]
        assert look_up.found is not None
        for key in look_up.keys[:takes]:
            found = look_up.found.get(key)
            assert self.seen.is_repeat(key, found, look_up.since) == (key in self.came), key
            if key not in self.came:
                self.came.add(key)
                runs = found is None or runs_again
                self.seen.admit(key, found, runs=runs)
                if runs:
                    self.uncommitted.append(key)
        del look_up.keys[:takes]
        if not look_up.keys:
            self.seen.look_up_is_used(look_up.since)
            del self.look_ups[0]

    @rule(rows=st.integers(1, 5), stays=st.booleans(), seen=st.booleans())
    @precondition(lambda self: self.uncommitted)
    def a_batch_is_committed(self, rows: int, stays: bool, seen: bool) -> None:
        """Into the file first, and somewhat later the loop hears of it. `stays`: what was done is not overwritten."""
        keys, self.uncommitted = self.uncommitted[:rows], self.uncommitted[rows:]
        for key in keys:
            before = self.journal.get(key)
            if before is None:
                self.number += 1
            if before is None or not stays:
                self.journal[key] = known(self.number if before is None else before.id, RUN)
        if seen and any(look_up.found is None for look_up in self.look_ups):
            self.a_look_up_finds_what_is_there()
        self.seen.committed(keys)

    @invariant()
    def what_is_kept_is_what_is_in_flight(self) -> None:
        assert self.seen._open == set(self.uncommitted)
        assert len(self.seen._since) == len(self.look_ups)
        assert len(self.seen._met) <= self.number // 8 + 1


TestAsASetWouldSay = AsASetWouldSay.TestCase
TestAsASetWouldSay.settings = settings(stateful_step_count=30)


def test_a_key_in_flight_has_come() -> None:
    seen = Seen(RUN)
    since = seen.look_up_begins()
    assert not seen.is_repeat("a", None, since)
    seen.admit("a", None, runs=True)
    assert seen.is_repeat("a", None, since)


def test_a_key_that_was_committed_after_its_look_up_has_come() -> None:
    """The look-up had not found it."""
    seen = Seen(RUN)
    seen.admit("a", None, runs=True)
    since = seen.look_up_begins()
    seen.committed(["a"])
    assert since == {"a"}
    assert seen.is_repeat("a", None, since)


def test_a_key_whose_row_this_run_has_written_has_come() -> None:
    seen = Seen(RUN)
    seen.admit("a", None, runs=True)
    seen.committed(["a"])
    assert seen.is_repeat("a", known(1, RUN), seen.look_up_begins())


def test_a_key_of_an_earlier_run_has_come_when_it_was_met() -> None:
    """Run again or not, and whether its row was overwritten or stays what it was."""
    seen = Seen(RUN)
    since = seen.look_up_begins()
    numbers = [1, 7, 8, 9, 1000]
    for number in numbers:
        assert not seen.is_repeat("a", known(number), since)
    seen.admit("a", known(8), runs=False)
    seen.admit("b", known(1000), runs=True)
    seen.committed(["b"])
    assert [number for number in numbers if seen.is_repeat("c", known(number), seen.look_up_begins())] == [8, 1000]


def test_a_look_up_that_was_used_is_told_no_more() -> None:
    """Or the memory of a run would grow with its items."""
    seen = Seen(RUN)
    used, other = seen.look_up_begins(), seen.look_up_begins()
    seen.look_up_is_used(used)
    seen.committed([1])
    assert (used, other) == (set(), {1})


def test_memory_is_a_byte_for_eight_items_of_earlier_runs() -> None:
    seen: Any = Seen(RUN)
    for number in range(1, 100_001):
        seen.admit(number, known(number), runs=False)
    assert len(seen._met) == 100_000 // 8 + 1
    assert not seen._open
