"""Results that are too large for a row: one file of bytes beside the journal, that only grows.

    data -> appended at the real end of the file -> (offset, size, crc32), for a row to keep -> read() checks all three

Guarantees: what is referred to by a row has been written before it. A tail that nothing refers to (the process was
killed within a write, or before its row was committed) does no harm: what follows stands behind it. Nothing is made
before there is something to write.

Threads: `SideFile` belongs to the thread that writes the journal; `read` is for any.
"""

import os
import zlib
from contextlib import suppress

from penstock.errors import JournalError
from penstock.journal.database import explained, sync_folder


class SideFile:
    """The side file at `path` (as by `schema.side_file_of`), to be written. Made at the first `append`."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._is_new = False

    def append(self, data: bytes) -> tuple[int, int, int]:
        """Write `data` at the end, and return its offset, size and CRC-32. Blocks for as long as the disk does.

        It is not on the disk before `sync`.

        Raises:
            OSError: it could not be written as a whole; then nothing of it is left in the file, if the disk allows.
        """
        descriptor = self._opened()
        offset = os.lseek(descriptor, 0, os.SEEK_END)
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(descriptor, left) :]
        except BaseException:
            with suppress(OSError):  # a tail does no harm
                os.ftruncate(descriptor, offset)
            raise
        return offset, len(data), zlib.crc32(data)

    def sync(self) -> None:
        """Have on the disk what was appended. Blocks for as long as the disk does.

        Raises:
            OSError: it may not be there.
        """
        if self._descriptor is None:
            return
        getattr(os, "fdatasync", os.fsync)(self._descriptor)
        if self._is_new:
            sync_folder(self._path)
            self._is_new = False

    def close(self) -> None:
        """Close the file, without `sync`. May be called again; the next `append` opens it anew."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _opened(self) -> int:
        if self._descriptor is None:
            self._is_new = not os.path.exists(self._path)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
            self._descriptor = os.open(self._path, flags, 0o644)
        return self._descriptor


def read(path: str, offset: int, size: int, crc: int) -> bytes:
    """What `append` wrote to the side file at `path`, by what it returned. Any thread.

    Raises:
        JournalError: the file is missing, too short, damaged, or cannot be read.
    """
    try:
        with open(path, "rb") as file:
            if offset + size > os.fstat(file.fileno()).st_size:
                raise _lost(path, "ends before a result that the journal has there", offset)
            file.seek(offset)
            data = file.read(size)
    except FileNotFoundError:
        raise _lost(path, "is missing, with a result that the journal has there", offset) from None
    except OSError as error:
        raise explained(error, path) from error
    if zlib.crc32(data) != crc:
        raise _lost(path, "is damaged: a result differs from its checksum", offset)
    return data


def _lost(path: str, what: str, offset: int) -> JournalError:
    return JournalError(
        f"{path}: {what}, at byte {offset:,}. Journal and side file belong together: restore both from the same copy, "
        f"or move both away to start anew."
    )
