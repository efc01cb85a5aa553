"""The report of an import: a line of JSON for each row that could not be taken, or not as it was."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import orjson


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

    def add(self, table: str, row: bytes, problem: object) -> None:
        """Add a row as JSON, and what is the matter with it."""
        if self._file is None:
            self._file = self.path.open("wb")
        # The row goes in as it is: decoding could alter a number.
        head = orjson.dumps({"table": table, "problem": str(problem)})[:-1]
        self._file.write(head + b',"row":' + row + b"}\n")
        self.count += 1

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
