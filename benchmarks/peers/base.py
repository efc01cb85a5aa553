"""What a peer is to the worker that runs it; imported in every peer's environment, so nothing but numpy is needed.

The clock runs around one call of a peer's public way to search or to store. What the caller would have at hand is made
before: vectors in the form that the peer takes, texts, ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from struct import pack
from typing import Any, ClassVar
from urllib.parse import quote
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

COUNT = 10
POOL = 20  # connections, the original's number
LOADED = 10_000  # rows that are stored at once where a peer is loaded through its own methods
_FILLER = "what was said here is of no account, only that it is about as long as what people say to each other. " * 2


@dataclass(frozen=True)
class Place:
    """Where a peer's own database is."""

    host: str
    port: int
    user: str
    password: str
    database: str

    def url(self, scheme: str = "postgresql", *, host_as_parameter: bool = True) -> str:
        """Write it as an address. A host may be a folder with a socket, which only a parameter can name."""
        who = quote(self.user, safe="") + (f":{quote(self.password, safe='')}" if self.password else "")
        if host_as_parameter:
            return f"{scheme}://{who}@/{self.database}?host={quote(self.host, safe='')}&port={self.port}"
        return f"{scheme}://{who}@{self.host}:{self.port}/{self.database}"


@dataclass(frozen=True)
class Knob:
    """How widely HNSW searches; the database's settings say the same to peers that have no parameter for it."""

    ef_search: int | None = None
    iterative: str | None = None


class Rows:
    """What there is to store and to ask. Row n is the same memory in every peer.

    Attributes:
        vectors: float32[n, width], those to insert later behind those to load.
        agents: Whose it is, a small number.
        rooms: In which of its agent's two rooms it is: 1 for a tenth of what is loaded, else 0.
        queries: float32[q, width].
    """

    def __init__(self, folder: Path, width: int) -> None:
        self.width = width
        self.vectors: NDArray[np.float32] = _read(folder / "vectors.f32", np.float32).reshape(-1, width)
        self.queries: NDArray[np.float32] = _read(folder / "queries.f32", np.float32).reshape(-1, width)
        self.agents: NDArray[np.int32] = _read(folder / "agents.i32", np.int32)
        self.rooms: NDArray[np.int32] = _read(folder / "rooms.i32", np.int32)

    @cached_property
    def agent_ids(self) -> list[UUID]:
        """The id of each agent."""
        return [agent_id(number) for number in range(int(self.agents.max()) + 1)]

    def agent(self, row: int) -> UUID:
        """Tell whose a row is."""
        owner: UUID = self.agent_ids[self.agents[row]]
        return owner

    def content(self, row: int) -> str:
        """Give the text of a memory."""
        return f"Memory {row}: {_FILLER[row % 50 : 90 + row % 70]}"


def copy_binary(rows: Iterable[Sequence[bytes]]) -> Iterator[bytes]:
    """Write rows for COPY ... WITH (FORMAT BINARY), a thousand at a time; a field is in the binary form of its type."""
    yield b"PGCOPY\n\xff\r\n\0" + bytes(8)
    left = iter(rows)
    while part := list(islice(left, 1000)):
        yield b"".join(pack("!h", len(row)) + b"".join(pack("!i", len(each)) + each for each in row) for row in part)
    yield b"\xff\xff"


def jsonb(value: Any) -> bytes:
    """Write a value as jsonb's binary form: a version, then the text."""
    return b"\x01" + json.dumps(value).encode()


def _read(path: Path, kind: Any) -> NDArray[Any]:
    # As plain arrays that show the file: the memory of a process then is what its peer takes.
    return np.asarray(np.memmap(path, kind, "r"))


def row_id(row: int) -> UUID:
    """Give the id of a row: of version 7, ascending."""
    return UUID(f"{row:012x}" + "70008000" + f"{row:012x}")


def row_of(id: object) -> int:
    """Find the row of an id."""
    return int(str(id)[-12:], 16)


def agent_id(number: int) -> UUID:
    """Give the id of an agent."""
    return UUID(f"{number + 1:08x}" + "a9e0400080000000" + f"{number + 1:08x}")


class Peer:
    """A way to remember vectors. Either every method that says so is a coroutine function, or none is.

    Attributes:
        asynchronous: Whether they are.
        loads_itself: Whether `load` goes through its methods; past them, what takes ten minutes takes one.
    """

    asynchronous: ClassVar[bool] = True
    loads_itself: ClassVar[bool] = True

    def __init__(self, place: Place, rows: Rows, option: str) -> None:
        self.place = place
        self.rows = rows
        self.option = option
        self.knob = Knob()

    def open(self) -> Any:
        """Connect, and make tables where there are none. Maybe a coroutine function."""
        raise NotImplementedError

    def close(self) -> Any:
        """Let go of the connections. Maybe a coroutine function."""
        raise NotImplementedError

    def load(self, rows: range) -> Any:
        """Store many at the beginning. Maybe a coroutine function."""
        parts = [rows[start : start + LOADED] for start in range(0, len(rows), LOADED)]
        if self.asynchronous:
            return self._load(parts)
        for part in parts:
            self.insert_many(self.prepare_many(part))
        return None

    async def _load(self, parts: Sequence[range]) -> None:
        for part in parts:
            await self.insert_many(self.prepare_many(part))

    def index(self) -> Any:
        """Build the vector index, where the peer does it after loading. Maybe a coroutine function."""
        return self._nothing() if self.asynchronous else None

    def catch_up(self) -> Any:
        """Bring what was stored since into the index, where that is left for later. Maybe a coroutine function."""
        return self._nothing() if self.asynchronous else None

    async def _nothing(self) -> None: ...

    def binary(self, row: int) -> bytes:
        """Write a vector in pgvector's binary form."""
        vector: bytes = self.rows.vectors[row].astype(">f4").tobytes()
        return pack("!HH", self.rows.width, 0) + vector

    def vector(self, vector: NDArray[np.float32]) -> Any:
        """Bring a vector into the form that the peer takes."""
        return vector.tolist()

    def search(self, question: Any, agent: int) -> Any:
        """Find the nearest ten of an agent, with their texts; give what the peer gives. Maybe a coroutine function.

        Args:
            question: What `question` gave.
            agent: The number.
        """
        raise NotImplementedError

    def search_room(self, question: Any, agent: int) -> Any:
        """Find the nearest ten in the smaller room of an agent; asked of the original and ours. Maybe a coroutine."""
        raise NotImplementedError

    def question(self, query: int) -> Any:
        """Make ready what is asked."""
        return self.vector(self.rows.queries[query])

    def found(self, answer: Any) -> Sequence[object]:
        """Take the ids out of what `search` gave."""
        raise NotImplementedError

    def insert_one(self, prepared: Any) -> Any:
        """Store one memory. Maybe a coroutine function."""
        raise NotImplementedError

    def prepare(self, row: int) -> Any:
        """Make ready what `insert_one` takes."""
        raise NotImplementedError

    def prepare_many(self, rows: range) -> Any:
        """Make ready what `insert_many` takes."""
        return [self.prepare(row) for row in rows]

    def insert_many(self, prepared: Any) -> Any:
        """Store memories of one agent, as one call where the peer has one. Maybe a coroutine function."""
        raise NotImplementedError

    def versions(self) -> dict[str, str]:
        """Tell the versions of what is installed."""
        from importlib.metadata import distributions

        return {each.metadata["Name"].lower(): each.version for each in distributions()}
