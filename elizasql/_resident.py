"""The resident tier: an agent's vectors of one type in the process, searched exactly by numpy.

What an agent asks of its memory again and again is one vector against its own few thousand. `Matrix` finds the
candidates here; one statement, `fetch_resident`, fetches their rows, ranks them exactly, and tells in the same snapshot
what has changed since this process last looked. So a search is one round trip, and what it gives is what an exact
search in the database gives at the moment of the fetch, whoever wrote what until then:

- Rows that were written since are in the statement's ranking, and come back with it to be merged here. When there are
  too many for that, they are read first and the search is done again.
- Rows that were deleted or moved out of the scope are missing from it; a few candidates more than asked for are sent,
  and when those do not make up for it, the search is done again with more.
- `Matrix` says how similar a row that it did not send can be at most: the answer holds when the last row is above.

What cannot be answered here is left to the database: a type that is too large, not loaded yet or over the budget, and
everything inside a transaction, which must see what it has written itself.

`sql/resident.sql` says how a change is recognised.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any
from uuid import UUID

import numpy as np
from asyncpg.pgproto import pgproto
from numpy.typing import NDArray

from ._calls import current_deadline, spawn
from ._executor import Executor
from ._statements import SQL
from .config import Config
from .errors import ElizaSQLError
from .models import Memory
from .types import Embedding

logger = logging.getLogger("elizasql")

Floats = NDArray[np.float32]
Places = NDArray[np.intp]
Snapshot = tuple[int, int, tuple[int, ...]]

# Candidates beyond those asked for: they stand in for rows that were deleted meanwhile.
_SPARE = 4

# A fetch brings fewer changes than this itself; more are read before the search is done again.
_MOST_CHANGES = 65

# Bytes of vectors that are read at once, as a page of a load or as changes: some milliseconds.
_PAGE_BYTES = 1 << 20
_CHANGES_BYTES = 8 << 20

# Times that a search is done here; each takes four times the candidates of the one before.
_ROUNDS = 6

# Of equally similar rows all are candidates, up to so many beyond twice the number asked for.
_MOST_EQUAL = 1000

# In "auto" a type is loaded at this search of it: a load takes as much of the processor as some hundred searches save,
# so that a script which asks a few times does not pay for it; whoever asks that often goes on asking.
_LOAD_AFTER = 16

# In "auto" fewer rows than this, of a type or in the scope of a search, are left to the database, which compares them
# all just as well: measured, rooms of 100 took 0.8 times what they take here, of 200 the same, of 500 1.2 times.
_LEAST = 200

# Seconds for which a tier that was just used is not put out for another: agents that take turns would do nothing but
# load one another out.
_REST = 10.0

# Seconds until a type that was too large or too small, or whose load failed, is looked at again.
_TOO_LARGE = 300.0
_TOO_SMALL = 30.0
_FAILED = 30.0

# Seconds for which nothing is loaded after more was written than can be merged: an import is likely still going on.
_CALM = 5.0

# The columns of a memory come first in a row of fetch_resident.
_FIELDS = 12
_SIMILARITY = 11


class _IncomparableError(ValueError):
    """A vector without a direction, which only raw SQL can have stored: the server ranks it by rules of its own."""


# --- the vectors -----------------------------------------------------------------------------------------------------

# OpenBLAS takes several threads for a product of a matrix and a vector from 9,216 elements on, and spins until all have
# run: with one core busy 10,000 x 384 took 8 ms at the 95th percentile. As a stack of small products it never does.
_BLAS_SINGLE = 9215

# Rows whose sketches are not looked at: scoring them takes no longer.
_SKETCH_LEAST = 512
# Rows from which a matrix gets a sketch, rows to find the axes by, and the numbers of axes that are tried.
_SKETCH_FROM = 2000
_SKETCH_SAMPLE = 2000
_SKETCH_AXES = (64, 96, 128, 192, 256)

# Bytes of the rows that are gathered at once: they stay in the core's own cache until they are multiplied.
_GATHERED = 192 << 10

# Bytes of a row beside its vector and its sketch: id and scope, and its part of the dictionary from ids to places.
_ROW_OVERHEAD = 200


@dataclass(frozen=True, slots=True)
class Found:
    """What `Matrix.search` found.

    Attributes:
        ids: Of all rows that can be among the nearest, in no order.
        reach: No other row that matches is more similar than this, by the server's arithmetic.
    """

    ids: list[UUID]
    reach: float


class Matrix:
    """Vectors of unit norm, one a row, without gaps; and what searches filter by, beside them.

    The scores found here and the server's similarities differ by at most `_slack`: each of the two sums in float32,
    in an order of its own, and the bound holds for any order. So whatever lies within twice that of the last one asked
    for is a candidate, and the server, which ranks the candidates, has every row that its own search would give.

    Most of a search is reading the vectors from main memory. A sketch of each row, its coordinates on a few axes and
    the norm of the rest, bounds the score from above by a product with far fewer columns (Cauchy-Schwarz for the rest);
    only rows whose bound reaches the best scores are read in full. Axes are those along which the agent's vectors
    differ most; new rows get their sketch on the same ones. The bound holds for any axes, and for rounding, too.
    """

    def __init__(self, dimension: int, size: int = 0) -> None:
        self.size = 0
        self.dimension = dimension
        gamma = dimension * 2.0**-24 / (1 - dimension * 2.0**-24)
        self._gamma = gamma
        self._slack = 4.1 * gamma
        self._row = np.dtype(
            [
                *((name, "V16") for name in ("id", "room", "world", "entity")),
                ("flags", ">i2"),
                ("header", "V4"),
                ("vector", ">f4", (dimension,)),
            ]
        )
        self._block = _block(dimension)
        self._places: dict[bytes, int] = {}
        # Of rooms, worlds and entities alike; 0 stands for none.
        self._codes: dict[bytes, int] = {}
        self._axes: Floats | None = None
        self._allocate(_with_spare(size))

    # --- memory ------------------------------------------------------------------------------------------------------

    @staticmethod
    def estimate(dimension: int, size: int) -> int:
        """Give the bytes that so many rows are going to take, about: the sketch is not known yet."""
        sketch = min(129, dimension // 2) if size >= _SKETCH_FROM else 0
        return _with_spare(size) * (4 * (dimension + sketch) + _ROW_OVERHEAD)

    @property
    def footprint(self) -> int:
        """Bytes that all of this takes."""
        return self._vectors.nbytes + self._sketches.nbytes + _ROW_OVERHEAD * (self.capacity + len(self._codes))

    @property
    def capacity(self) -> int:
        """Rows that there is room for."""
        return len(self._vectors)

    def _allocate(self, capacity: int) -> None:
        self._vectors: Floats = np.zeros((capacity, self.dimension), np.float32)
        self._ids: NDArray[np.uint8] = np.zeros((capacity, 16), np.uint8)
        self._scopes: NDArray[np.int32] = np.zeros((3, capacity), np.int32)
        self._unique: NDArray[np.bool_] = np.zeros(capacity, np.bool_)
        self._sketches: Floats = np.zeros((capacity if self._axes is not None else 0, self._width), np.float32)
        self._scores_of_all: Floats = np.zeros(capacity, np.float32)

    @property
    def _width(self) -> int:
        return 0 if self._axes is None else len(self._axes) + 1

    def _reserve(self, size: int) -> None:
        if size <= self.capacity:
            return
        used, before = self.size, (self._vectors, self._ids, self._unique, self._sketches, self._scopes.T)
        self._allocate(_with_spare(size))
        after = (self._vectors, self._ids, self._unique, self._sketches, self._scopes.T)
        for old, new in zip(before, after, strict=True):
            new[:used] = old[:used]

    # --- change ------------------------------------------------------------------------------------------------------

    def rows_in(self, content: bytes) -> int:
        """Give the number of rows that the server has sent."""
        return len(content) // self._row.itemsize

    def put(self, content: bytes, start: int = 0, count: int = -1) -> None:
        """Add rows as the server sends them, or put them in place of those with the same ids.

        Args:
            content: Rows, one after the other.
            start: The first one to take.
            count: How many; -1: all from there on.

        Raises:
            _IncomparableError: One has no direction. Nothing was changed.
        """
        width = self._row.itemsize
        rows = np.frombuffer(content, self._row, count, start * width)
        vectors = rows["vector"].astype(np.float32)
        squares = np.einsum("ij,ij->i", vectors, vectors)
        # Beyond these the server's sums of squares may become zero or infinite.
        if not bool(((squares > 1e-30) & (squares < 1e30)).all()):
            raise _IncomparableError
        vectors /= np.sqrt(squares)[:, None]
        self._reserve(self.size + len(rows))
        places, codes = self._places, self._codes
        at = np.empty(len(rows), np.intp)
        scopes = np.zeros((len(rows), 3), np.int32)
        flags = rows["flags"].astype(np.int64)
        begin = start * width
        for number, flag in enumerate(flags.tolist()):
            id = content[begin : begin + 16]
            place = places.get(id)
            if place is None:
                place = places[id] = self.size
                self.size += 1
            at[number] = place
            for which in (0, 1, 2):
                if flag & (2 << which):
                    begin_of = begin + 16 + 16 * which
                    key = content[begin_of : begin_of + 16]
                    scopes[number, which] = codes.get(key) or codes.setdefault(key, len(codes) + 1)
            begin += width
        self._vectors[at] = vectors
        self._ids[at] = np.frombuffer(rows["id"].tobytes(), np.uint8).reshape(-1, 16)
        self._scopes[:, at] = scopes.T
        self._unique[at] = flags & 1
        if self._axes is not None:
            self._sketches[at] = self._sketch_of(vectors)

    def drop(self, ids: Iterable[UUID]) -> None:
        """Take rows out, where they are; the last rows come in their places."""
        for id in ids:
            place = self._places.pop(id.bytes, None)
            if place is None:
                continue
            self.size -= 1
            last = self.size
            if place != last:
                self._places[self._ids[last].tobytes()] = place
                for array in (self._vectors, self._ids, self._unique):
                    array[place] = array[last]
                self._scopes[:, place] = self._scopes[:, last]
                if self._axes is not None:
                    self._sketches[place] = self._sketches[last]

    # --- search ------------------------------------------------------------------------------------------------------

    def search(
        self,
        query: Floats,
        count: int,
        *,
        room_id: UUID | None = None,
        world_id: UUID | None = None,
        entity_id: UUID | None = None,
        only_unique: bool = False,
        threshold: float | None = None,
        least: int = 0,
    ) -> Found | None:
        """Find what can be among the `count` nearest.

        Args:
            query: Of any norm but zero.
            count: How many rows are wanted, at least 1.
            room_id, world_id, entity_id, only_unique: Only rows like this.
            threshold: Rows below may be left out.
            least: How many must match.

        Returns:
            The candidates; None when fewer match, or too many are equally near.
        """
        at = self._select((room_id, world_id, entity_id), only_unique)
        matching = self.size if at is None else len(at)
        if matching < least:
            return None
        if matching <= count:
            return Found(self._ids_at(np.arange(matching) if at is None else at), -math.inf)
        query = query / np.float32(math.sqrt(float(np.dot(query, query))))
        floor = -math.inf if threshold is None else threshold - self._slack
        at, scores, cut = self._contenders(query, at, count, floor)
        if len(scores) > count:
            cut = max(cut, float(_nth_largest(scores, count)) - 2 * self._slack)
        chosen = np.flatnonzero(scores >= cut)
        if len(chosen) > 2 * count + _MOST_EQUAL:
            return None
        return Found(
            self._ids_at(chosen if at is None else at[chosen]), cut + self._slack if cut > floor else -math.inf
        )

    def _select(self, scope: Iterable[UUID | None], only_unique: bool) -> Places | None:
        """Give the places of the rows that match, None for all."""
        mask: NDArray[np.bool_] | None = self._unique[: self.size] if only_unique else None
        for codes, id in zip(self._scopes, scope, strict=True):
            if id is not None:
                # -1: nothing here has to do with it.
                matches = codes[: self.size] == self._codes.get(id.bytes, -1)
                mask = matches if mask is None else mask & matches
        return None if mask is None else np.flatnonzero(mask)

    def _contenders(
        self, query: Floats, at: Places | None, count: int, floor: float
    ) -> tuple[Places | None, Floats, float]:
        """Give places and scores of all rows that reach a score, and this score: `floor`, or what the best exceed."""
        matching = self.size if at is None else len(at)
        if self._axes is None or matching < max(_SKETCH_LEAST, 8 * count):
            return at, self._score(query, at), floor
        bounds = self._bound(query, at)
        # The scores of those that look best show what it takes.
        best = np.flatnonzero(bounds >= _nth_largest_or_less(bounds, 2 * count))
        scores = self._score(query, best if at is None else at[best])
        needed = max(floor, float(_nth_largest(scores, count)) - 2 * self._slack)
        left = np.flatnonzero(bounds >= needed - self._sketch_slack)
        if len(left) > matching // 3:
            return at, self._score(query, at), floor
        at = left if at is None else at[left]
        return at, self._score(query, at), needed

    def _score(self, query: Floats, at: Places | None) -> Floats:
        """Multiply rows with the query."""
        if at is None or len(at) > self.size // 2:
            scores = _multiply(self._vectors, query, self._block, self.size, self._scores_of_all)
            return scores if at is None else scores[at]
        return _gather(self._vectors, at, query, self._block)

    def _bound(self, query: Floats, at: Places | None) -> Floats:
        """Give an upper bound of the rows' scores, up to `_sketch_slack`."""
        sketch = self._sketch_of(query[None])[0]
        block = _block(len(sketch))
        if at is None or len(at) > self.size // 2:
            bounds = _multiply(self._sketches, sketch, block, self.size, self._scores_of_all)
            return bounds.copy() if at is None else bounds[at]
        return _gather(self._sketches, at, sketch, block)

    def _ids_at(self, at: Places) -> list[UUID]:
        content = self._ids[at].tobytes()
        # asyncpg's own class, as in the rows that it gives: made in a fifth of the time.
        return [pgproto.UUID(content[begin : begin + 16]) for begin in range(0, len(content), 16)]

    # --- the sketch --------------------------------------------------------------------------------------------------

    @property
    def _sketch_slack(self) -> float:
        # Each coordinate is a sum in float32, of the rows' and of the query's alike.
        return (2 * math.sqrt(self._width) + 8) * self._gamma

    def _sketch_of(self, vectors: Floats) -> Floats:
        """Give the coordinates on the axes, and the norm of the rest, never too small."""
        axes = self._axes
        assert axes is not None
        block = _block(self.dimension)
        sketches = np.empty((len(vectors), len(axes) + 1), np.float32)
        stacked = axes.reshape(-1, block, self.dimension)
        for number, vector in enumerate(vectors):
            np.matmul(stacked, vector, out=sketches[number, :-1].reshape(-1, block))
        return _with_rest(sketches, self._gamma)

    def make_sketch(self) -> None:
        """Find the axes and sketch every row, when that pays; some 0.1 s, in which nothing else may use the matrix."""
        if self.size < _SKETCH_FROM:
            return
        random = np.random.default_rng(self.size)
        vectors = self._vectors[: self.size]
        sample = vectors[random.choice(self.size, min(self.size, _SKETCH_SAMPLE), replace=False)]
        axes = _main_axes(sample, max(_SKETCH_AXES), random)
        # What each number of axes would cost, tried with some rows as queries: elements read by the sketches, and by
        # the rows that they leave, which lie apart and take about twice as long to read.
        queries = sample[:32]
        best = np.partition(vectors @ queries.T, -11, axis=0)[-11]  # the query itself is the first
        coordinates, of_queries = vectors @ axes.T, queries @ axes.T
        cheapest, chosen = 0.7 * self.dimension, 0
        for number in _SKETCH_AXES:
            part, part_of_queries = coordinates[:, :number], of_queries[:, :number]
            rest = np.sqrt(np.maximum(1 - np.einsum("ij,ij->i", part, part), 0))
            rest_of_queries = np.sqrt(np.maximum(1 - np.einsum("ij,ij->i", part_of_queries, part_of_queries), 0))
            left = (part @ part_of_queries.T + np.outer(rest, rest_of_queries) >= best).mean()
            cost = number + 2 * float(left) * self.dimension
            if cost < cheapest:
                cheapest, chosen = cost, number
        if chosen:
            self._axes = np.ascontiguousarray(axes[:chosen])
            self._sketches = np.zeros((self.capacity, chosen + 1), np.float32)
            self._sketches[: self.size, :-1] = coordinates[:, :chosen]
            _with_rest(self._sketches[: self.size], self._gamma)


def _with_spare(size: int) -> int:
    """Give the rows to make room for: an eighth more, and a multiple of every block."""
    return (size + size // 8 + 64) // 128 * 128 + 128


def _block(width: int) -> int:
    """Give the rows of a product that BLAS does on one thread: a power of two, 128 at most."""
    return min(128, 1 << ((_BLAS_SINGLE // width).bit_length() - 1))


def _multiply(matrix: Floats, vector: Floats, block: int, size: int, out: Floats) -> Floats:
    """Multiply the first `size` rows with a vector; the matrix has room for whole blocks."""
    blocks = -(-size // block)
    rows = blocks * block
    np.matmul(matrix[:rows].reshape(blocks, block, -1), vector, out=out[:rows].reshape(blocks, block))
    return out[:size]


def _gather(matrix: Floats, at: Places, vector: Floats, block: int) -> Floats:
    """Multiply some rows with a vector."""
    scores = np.empty(len(at), np.float32)
    step = min(_GATHERED // 4 // len(vector), len(at)) // block * block + block
    scratch = np.zeros((step, len(vector)), np.float32)
    for begin in range(0, len(at), step):
        some = at[begin : begin + step]
        # "clip", since "raise" makes a copy first; every place is there.
        np.take(matrix, some, axis=0, out=scratch[: len(some)], mode="clip")
        blocks = -(-len(some) // block)
        product = np.matmul(scratch[: blocks * block].reshape(blocks, block, -1), vector)
        scores[begin : begin + step] = product.reshape(-1)[: len(some)]
    return scores


def _nth_largest(scores: Floats, count: int) -> np.float32:
    return np.partition(scores, len(scores) - count)[len(scores) - count]  # type: ignore[no-any-return]


def _nth_largest_or_less(scores: Floats, count: int) -> np.float32:
    """Give a number that at least `count` scores reach, and not many more: a fifth of the time of the exact one."""
    columns = len(scores) // 64
    if columns < 4 * count:
        return _nth_largest(scores, count)
    return _nth_largest(scores[: 64 * columns].reshape(64, columns).max(axis=0), count)


def _main_axes(sample: Floats, number: int, random: np.random.Generator) -> Floats:
    """Give orthonormal axes as rows, those of the greatest share first: nearly the principal ones."""
    axes = random.standard_normal((sample.shape[1], min(number, *sample.shape))).astype(np.float32)
    for _ in range(2):
        axes = sample.T @ (sample @ axes)
        axes /= np.sqrt(np.einsum("ij,ij->j", axes, axes))
    base = np.linalg.qr(axes.astype(np.float64))[0]
    coordinates = sample @ base
    _, turn = np.linalg.eigh(coordinates.T @ coordinates)
    return np.ascontiguousarray((base @ turn[:, ::-1]).T, dtype=np.float32)


def _with_rest(sketches: Floats, gamma: float) -> Floats:
    """Fill the last column: the norm of what the coordinates leave of a unit vector, rounding counted in."""
    coordinates = sketches[:, :-1]
    least = (2 * math.sqrt(sketches.shape[1]) + 2) * gamma
    rest = 1 - np.einsum("ij,ij->i", coordinates, coordinates)
    sketches[:, -1] = np.sqrt(np.maximum(rest, 0) + np.float32(least))
    return sketches


# --- the tiers of the process ----------------------------------------------------------------------------------------


class Tier:
    """What the process holds of one agent's memories of one type.

    Attributes:
        matrix: The rows; None: not loaded.
        seen: The snapshot that they were read in, changes merged up to it.
        life: The server's life in which its numbers of transactions count.
        used: When it was last asked, by `time.monotonic`.
        asked: Searches since it was last loaded or put out, while there is no matrix.
        loading: The task that loads it.
        not_before: When it may be loaded, by `time.monotonic`.
        catching_up: Held by whoever reads many changes.
        loaded_size: Rows that the load found.
        dropped: Rows that were found to be gone since.
    """

    __slots__ = (
        "__weakref__",
        "asked",
        "catching_up",
        "dropped",
        "life",
        "loaded_size",
        "loading",
        "matrix",
        "not_before",
        "seen",
        "used",
    )

    def __init__(self) -> None:
        self.matrix: Matrix | None = None
        self.seen: Snapshot = (0, 0, ())
        self.life = ""
        self.used = 0.0
        self.asked = 0
        self.loading: asyncio.Task[None] | None = None
        self.not_before = 0.0
        self.catching_up = asyncio.Lock()
        self.loaded_size = 0
        self.dropped = 0

    @property
    def outlived(self) -> bool:
        """Whether so much has changed since the load that another one pays: for the memory, and for the sketch."""
        assert self.matrix is not None
        return self.dropped > self.loaded_size // 4 + 1000 or self.matrix.size > 2 * self.loaded_size + 2 * _SKETCH_FROM


class _Shelf:
    """The tiers of an event loop: all that somebody uses, and those that hold something."""

    def __init__(self) -> None:
        self.tiers: weakref.WeakValueDictionary[Any, Tier] = weakref.WeakValueDictionary()
        self.filled: set[Tier] = set()


# Tiers go with their event loop; the budget is the process's.
_shelves: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Shelf] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _forget() -> None:
    """Begin anew in a forked child: the loops, and what they hold, are the parent's."""
    global _lock  # noqa: PLW0603
    _lock = threading.Lock()
    _shelves.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _shelf() -> _Shelf:
    with _lock:
        return _shelves.setdefault(asyncio.get_running_loop(), _Shelf())


def _held() -> int:
    """Give the bytes of all tiers of the process."""
    with _lock:
        filled = [tier for shelf in _shelves.values() for tier in shelf.filled]
    return sum(tier.matrix.footprint for tier in filled if tier.matrix is not None)


def _make_room(tier: Tier, needed: int, limit: int) -> int | None:
    """Put tiers out until `needed` bytes for this one fit beside the others; give how many went, None: it cannot be."""
    now = time.monotonic()
    with _lock:
        others = [(shelf, each) for shelf in _shelves.values() for each in shelf.filled if each is not tier]
        sizes = {id(each): each.matrix.footprint if each.matrix is not None else 0 for _, each in others}
        excess = needed + sum(sizes.values()) - limit
        out: list[tuple[_Shelf, Tier]] = []
        for shelf, each in sorted(others, key=lambda pair: pair[1].used):
            if excess <= 0 or now - each.used < _REST:
                break
            excess -= sizes[id(each)]
            out.append((shelf, each))
        if excess > 0:
            return None
        for shelf, each in out:
            each.matrix = None
            each.asked = 0
            shelf.filled.discard(each)
    return len(out)


# --- the adapter's side ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Stats:
    """What happened, as counts since the adapter was opened.

    Attributes:
        hits: Searches that were answered here.
        misses: Searches that were left to the database.
        repeats: Times that a search was done once more, a round trip each.
        deltas: Times that changes were merged.
        changes: Rows that were merged.
        loads: Types that were loaded.
        evictions: Types that were put out to make room.
    """

    hits: int = 0
    misses: int = 0
    repeats: int = 0
    deltas: int = 0
    changes: int = 0
    loads: int = 0
    evictions: int = 0


class Resident:
    """An adapter's way to the tiers of its agent.

    Attributes:
        stats: What happened.
    """

    def __init__(self, background: Executor, agent_id: UUID, config: Config, address: str) -> None:
        self.stats = Stats()
        self._background = background
        self._agent_id = agent_id
        self._address = address
        self._mode = config.resident
        self._budget = int(config.resident_memory_mb * (1 << 20))
        self._most = config.resident_max_vectors
        self._least = _LEAST if self._mode == "auto" else 0
        self._off = self._mode == "off" or not self._budget or not self._most
        self._tiers: dict[tuple[str, int], Tier] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def snapshot(self) -> dict[str, int]:
        """Give the counts; `vectors` and `bytes` that are held now: of this adapter's agent, and of the process."""
        matrices = [tier.matrix for tier in self._tiers.values() if tier.matrix is not None]
        return {**asdict(self.stats), "vectors": sum(matrix.size for matrix in matrices), "bytes": _held()}

    async def close(self) -> None:
        """End the loads that this adapter has begun. What is loaded stays for other adapters of the process."""
        self._closed = True
        for task in tuple(self._tasks):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def search(self, executor: Executor, vector: Embedding, params: Mapping[str, Any]) -> list[Memory] | None:
        """Search here, where that can be done; None: ask the database.

        Args:
            executor: The caller's.
            vector: What is asked, checked.
            params: Those of `search_memories`, the scope included: embedding, agent_id, type, room_id, world_id,
                entity_id, only_unique, threshold, count, include_embedding.

        Statement: sql/resident.sql fetch_resident. One round trip; more after many changes.
        """
        if self._off or executor.in_transaction:
            return None
        tier = self._find_tier(params["type"], vector.shape[0])
        if tier.matrix is None:
            await self._consider(tier, params["type"], vector.shape[0])
        found = await self._search(tier, executor, vector, params) if tier.matrix is not None else None
        if found is None:
            self.stats.misses += 1
        else:
            self.stats.hits += 1
        return found

    async def _search(
        self, tier: Tier, executor: Executor, vector: Embedding, params: Mapping[str, Any]
    ) -> list[Memory] | None:
        statement = SQL.at("fetch_resident", vector.shape[0])
        count = params["count"]
        wanted = count + _SPARE
        filters = {name: params[name] for name in ("room_id", "world_id", "entity_id", "only_unique", "threshold")}
        for number in range(_ROUNDS):
            matrix, seen = tier.matrix, tier.seen
            candidates = matrix.search(vector, wanted, **filters, least=self._least) if matrix is not None else None
            if matrix is None or candidates is None:
                return None
            self.stats.repeats += number > 0
            rows = await executor.fetch(
                statement,
                embedding=params["embedding"],
                agent_id=self._agent_id,
                type=params["type"],
                ids=candidates.ids,
                seen=seen,
                life=tier.life,
                **filters,
                count=count,
                most=_MOST_CHANGES,
                include_embedding=params["include_embedding"],
            )
            *found, news = rows
            # Who was faster has merged it already; whoever comes next sees the rest.
            current = tier.matrix is matrix and tier.seen is seen
            if not news["alive"]:
                if current:
                    self._give_up(tier, 1.0)
                return None
            if news["number"] >= _MOST_CHANGES:
                await self._catch_up(tier, matrix, seen, executor, params["type"])
                continue
            if current:
                self._merge(tier, params["type"], news["seen"], news["changed"], news["gone"])
            if candidates.reach == -math.inf or (len(found) == count and found[-1][_SIMILARITY] > candidates.reach):
                return [Memory(*row[:_FIELDS]) for row in found]
            wanted *= 4
        return None

    # --- changes -----------------------------------------------------------------------------------------------------

    def _merge(
        self, tier: Tier, kind: str, seen: Snapshot, changed: bytes | None, gone: list[UUID] | None = None
    ) -> None:
        """Bring a tier up to a snapshot; only with what was read for the state that it is in."""
        matrix = tier.matrix
        assert matrix is not None
        if changed:
            capacity = matrix.capacity
            try:
                matrix.put(changed)
            except _IncomparableError:
                self._give_up(tier, _TOO_LARGE)
                return
            self.stats.deltas += 1
            self.stats.changes += matrix.rows_in(changed)
            if matrix.size > self._most + self._most // 8:
                self._give_up(tier, _TOO_LARGE)
                return
            if matrix.capacity > capacity and not self._make_room(tier, matrix.footprint):
                return
        if gone:
            matrix.drop(gone)
            tier.dropped += len(gone)
        tier.seen = seen
        if (changed or gone) and tier.outlived:
            self._begin_load(tier, kind, matrix.dimension)

    async def _catch_up(self, tier: Tier, matrix: Matrix, seen: Snapshot, executor: Executor, kind: str) -> None:
        """Read and merge what has changed since `seen`; of several that want it, one does."""
        async with tier.catching_up:
            if tier.matrix is not matrix or tier.seen is not seen:
                return
            most = _CHANGES_BYTES // (4 * matrix.dimension)
            row = await executor.fetch_row(
                SQL.at("read_resident_changes", matrix.dimension),
                agent_id=self._agent_id,
                type=kind,
                seen=seen,
                most=most,
            )
            assert row is not None
            if tier.matrix is not matrix or tier.seen is not seen:
                return
            if row["number"] < most:
                self._merge(tier, kind, row["seen"], row["content"])
            else:
                self._give_up(tier, _CALM)

    def _give_up(self, tier: Tier, seconds: float) -> None:
        """Let go of what a tier holds, and leave it at that for a while."""
        tier.matrix = None
        tier.not_before = time.monotonic() + seconds
        with _lock:
            for shelf in _shelves.values():
                shelf.filled.discard(tier)

    # --- loading -----------------------------------------------------------------------------------------------------

    def _find_tier(self, kind: str, dimension: int) -> Tier:
        tier = self._tiers.get((kind, dimension))
        if tier is None:
            # Adapters of one agent share it.
            key = (self._address, self._agent_id, kind, dimension)
            shelf = _shelf()
            tier = shelf.tiers.get(key)
            if tier is None:
                tier = shelf.tiers[key] = Tier()
            self._tiers[kind, dimension] = tier
        tier.used = time.monotonic()
        return tier

    async def _consider(self, tier: Tier, kind: str, dimension: int) -> None:
        """Begin to load a tier when that pays; "required" waits for it."""
        tier.asked += 1
        required = self._mode == "required"
        if tier.used >= tier.not_before and (required or tier.asked >= _LOAD_AFTER):
            self._begin_load(tier, kind, dimension)
        if required and tier.loading is not None:
            left = current_deadline(60.0) - time.monotonic()
            await asyncio.wait({tier.loading}, timeout=max(left, 0.0))

    def _begin_load(self, tier: Tier, kind: str, dimension: int) -> None:
        if tier.loading is None and not self._closed:
            tier.loading = spawn(self._load(tier, kind, dimension), "elizasql-resident-load")
            self._tasks.add(tier.loading)
            tier.loading.add_done_callback(self._tasks.discard)

    async def _load(self, tier: Tier, kind: str, dimension: int) -> None:
        try:
            await self._read(tier, kind, dimension)
        except ElizaSQLError as error:
            # Searches go on in the database; if that cannot be reached, they tell.
            logger.warning("loading vectors of type %s is put off: %s", kind, error)
            tier.not_before = time.monotonic() + _FAILED
        except _IncomparableError:
            tier.not_before = time.monotonic() + _TOO_LARGE
        finally:
            tier.loading = None

    async def _read(self, tier: Tier, kind: str, dimension: int) -> None:
        """Read a type page by page, each in a snapshot of its own; what it holds then counts as seen by the first.

        A row that is written meanwhile moves to a later page, and is a change for the first search in any case.
        """
        statement = SQL.at("load_resident", dimension)
        page_size = _PAGE_BYTES // (4 * dimension)
        after, matrix, first = 0, None, None
        while True:
            page = await self._background.fetch_row(
                statement,
                agent_id=self._agent_id,
                type=kind,
                after=after,
                page_size=page_size,
                most=self._most + 1 if first is None else 0,
            )
            assert page is not None
            if first is None:
                first = page
                if not self._fits(tier, page, dimension):
                    return
                matrix = Matrix(dimension, page["size"])
            assert matrix is not None
            if page["life"] != first["life"]:
                tier.not_before = time.monotonic() + 1.0
                return
            for start in range(0, page["number"], page_size):
                matrix.put(page["content"], start, min(page_size, page["number"] - start))
                await asyncio.sleep(0)  # a page may be large: all that one transaction wrote
            if page["number"] < page_size:
                break
            if matrix.size > self._most:
                tier.not_before = time.monotonic() + _TOO_LARGE
                return
            after = page["last"]
        await asyncio.to_thread(matrix.make_sketch)
        if not self._make_room(tier, matrix.footprint):
            return
        tier.matrix, tier.seen, tier.life = matrix, first["seen"], first["life"]
        tier.loaded_size, tier.dropped, tier.asked = matrix.size, 0, 0
        with _lock:
            _shelves[asyncio.get_running_loop()].filled.add(tier)
        self.stats.loads += 1

    def _fits(self, tier: Tier, page: Mapping[str, Any], dimension: int) -> bool:
        """Tell by the first page whether to go on, and make room."""
        if not page["numbers_transactions"] or page["size"] > self._most:
            self._give_up(tier, _TOO_LARGE)
            return False
        if page["size"] < self._least:
            self._give_up(tier, _TOO_SMALL)
            return False
        return self._make_room(tier, Matrix.estimate(dimension, page["size"]))

    def _make_room(self, tier: Tier, needed: int) -> bool:
        """Put other tiers out so that this one fits; otherwise it has to wait."""
        put_out = _make_room(tier, needed, self._budget)
        if put_out is None:
            self._give_up(tier, _FAILED)
            return False
        self.stats.evictions += put_out
        return True
