"""Which keys have come in this run already: exact, without a set of them.

A key that comes is looked up in the journal some time before it is admitted. It has come before if

    it is admitted and not yet committed              -> `_open`
    it was committed after the look-up had begun      -> the set that the look-up was given
    its row was written by this run                   -> the row says so
    its row is older, and has been met in this run    -> a bit for each row

so memory is what is in flight, and a byte for eight items of earlier runs. Decides only: no I/O. Loop thread only.
"""

from collections.abc import Collection

from penstock.journal.schema import Key
from penstock.journal.store import Known


class Seen:
    """The keys of one run."""

    def __init__(self, run: int) -> None:
        self._run = run
        self._open: set[Key] = set()
        self._since: list[set[Key]] = []
        self._met = bytearray()

    def look_up_begins(self) -> set[Key]:
        """From now on, what is committed may be missing in what the look-up finds. It will be in this set."""
        since: set[Key] = set()
        self._since.append(since)
        return since

    def look_up_is_used(self, since: set[Key]) -> None:
        """The keys of that look-up are admitted, all of them."""
        self._since = [other for other in self._since if other is not since]

    def is_repeat(self, key: Key, known: Known | None, since: set[Key]) -> bool:
        """Whether a key has come before in this run; `known` is what its look-up found, `since` of what it was told."""
        if key in self._open or key in since:
            return True
        return known is not None and (known.row.run == self._run or self._is_met(known.id))

    def admit(self, key: Key, known: Known | None, *, runs: bool) -> None:
        """A key has come for the first time; whether its item is run, so that its outcome will be committed."""
        if runs:
            self._open.add(key)
        if known is not None:
            self._meet(known.id)

    def committed(self, keys: Collection[Key]) -> None:
        """Their outcomes are in the journal."""
        self._open.difference_update(keys)
        for since in self._since:
            since.update(keys)

    def _is_met(self, number: int) -> bool:
        byte, bit = divmod(number, 8)
        return byte < len(self._met) and bool(self._met[byte] >> bit & 1)

    def _meet(self, number: int) -> None:
        byte, bit = divmod(number, 8)
        if byte >= len(self._met):
            self._met.extend(bytes(byte + 1 - len(self._met)))
        self._met[byte] |= 1 << bit
