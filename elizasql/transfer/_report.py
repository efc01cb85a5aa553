"""The report of an import: a line of JSON for each row that could not be taken, or not as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import orjson

from elizasql.errors import ArgumentError


def open_private(path: Path, mode: str) -> IO[bytes]:
    """Open a file that, when it is made by that, only its owner may read: what is written to it are memories."""
    return open(path, mode, opener=_open_private)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Say which file could not be written: the system names none where the disk is full, or the unfinished one."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def place(unfinished: Path, path: Path) -> None:
    """Give what is finished its name; what has come there meanwhile stays.

    Raises:
        ArgumentError: There is something of this name.
    """
    try:
        os.link(unfinished, path)  # in one step, unlike a look and a rename
    except OSError:  # there is something, or this is a folder, or the file system has no links
        if os.path.lexists(path):
            raise ArgumentError(f"{path} is there by now: choose another name") from None
        unfinished.rename(path)
    else:
        unfinished.unlink()


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


class Report:
    """A file that is made when there is something to say.

    Attributes:
        path: Where it is, or would be.
        count: Lines in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count: int = 0
        self._file: IO[bytes] | None = None

    def check(self) -> None:
        """Find out whether it can be written, by opening it: rights alone do not tell. What is there stays as it is.

        Raises:
            OSError: It cannot.
        """
        if self.path.is_fifo():
            return  # its reader would take this for the end
        new = not os.path.lexists(self.path)
        open_private(self.path, "ab").close()
        if new:
            self.path.unlink()

    def add(self, table: str, row: bytes, problem: object) -> None:
        """Add a row as JSON, and what is the matter with it."""
        if self._file is None:
            self._file = open_private(self.path, "wb")
        # The row goes in as it is: decoding could alter a number.
        head = orjson.dumps({"table": table, "problem": str(problem)})[:-1]
        with naming(self.path):
            self._file.write(head + b',"row":' + row + b"}\n")
        self.count += 1

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            with naming(self.path):
                self._file.close()
