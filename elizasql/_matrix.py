"""An agent's vectors in the process, searched exactly: the part of the resident tier that knows no server."""

from __future__ import annotations

import math
import mmap
import sys
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any, NamedTuple
from uuid import UUID

import numpy as np
import simsimd
from asyncpg.pgproto import pgproto
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Levels = NDArray[np.int8]
Places = NDArray[np.intp]

# Of equally similar rows all are candidates, up to so many beyond twice the number asked for.
_MOST_EQUAL = 1000

# OpenBLAS takes several threads for a product of a matrix and a vector from 9,216 elements on, and spins until all have
# run: with one core busy 10,000 x 384 took 8 ms at the 95th percentile. As a stack of small products it never does.
_BLAS_SINGLE = 9215

# Fewer rows than this are scored at once: their bytes first would take as long.
_QUANTIZED_FROM = 1000
# A component is kept in so many steps, either side of zero: a byte.
_LEVELS = 127

# Components of the rows that are gathered at once: they stay in the core's own cache until they are multiplied.
_GATHERED = 96 << 10

_of_thread = threading.local()

# Of how many rows one more is made room for: at first, when most agents grow slowly, and when one has grown.
_SPARE_AT_FIRST = 32
_SPARE = 8

# Bytes of a row beside its components: id, mark, scope, scale, error, and its part of the dictionary from ids to
# places.
_ROW_OVERHEAD = 216

# From here on an array stands on large pages, where the kernel has them; numpy asks for them from twice as much on, and
# not for its beginning and its end. Ten matrices of 10,000 x 384 in turn: their bytes are read in 0.34 ms in place of
# 0.54, since less time goes to finding the pages.
_LARGE_PAGE = 2 << 20

# Bytes that Python adds to a bytes object; and those of a row's contents beside the texts: the place for a version and
# three references, the time.
_BYTES_OVERHEAD = 33
_PLACE = 8 + 3 * 8
_TIME = 48

# What most memories have as metadata is held once.
_NO_METADATA = b"\x01{}"

# A listed memory: its id and its version.
_LISTED = np.dtype([("id", "V16"), ("version", ">i8")])
LISTED = _LISTED.itemsize

# What the process holds of a memory beside its vector: its version, when it was created, and its content and metadata
# as the server sends them.
Contents = tuple[int, datetime, bytes, bytes]


@dataclass(frozen=True, slots=True)
class Found:
    """What `Matrix.search` found.

    Attributes:
        ids: Of all rows that can be among the nearest, in no order.
        reach: No other row that matches is more similar than this, by the server's arithmetic.
    """

    ids: list[UUID]
    reach: float


class Row(NamedTuple):
    """A row among the nearest, with what else is held of its memory.

    Attributes:
        id, room_id, world_id, entity_id, unique: Of the memory.
        created_at, content, metadata: Of the memory, the latter two as the server sends them.
        similarity: To the query.
    """

    id: UUID
    room_id: UUID | None
    world_id: UUID | None
    entity_id: UUID | None
    unique: bool
    created_at: datetime
    content: bytes
    metadata: bytes
    similarity: float


class _Held:
    """The contents of a matrix's rows, at the same places.

    Attributes:
        versions: The server's number of each; what is not above 0 is not known, below 0 since that put.
        puts: Grows; a put leaves it, with a minus, as the version of its rows.
        size: Bytes of all of this.
    """

    __slots__ = ("contents", "created", "metadata", "puts", "size", "versions")

    def __init__(self, capacity: int) -> None:
        self.versions: NDArray[np.int64] = np.zeros(capacity, np.int64)
        self.created: NDArray[np.object_] = np.empty(capacity, np.object_)
        self.contents: NDArray[np.object_] = np.empty(capacity, np.object_)
        self.metadata: NDArray[np.object_] = np.empty(capacity, np.object_)
        self.puts = 1
        self.size = _PLACE * capacity

    def grow(self, capacity: int) -> None:
        more = capacity - len(self.versions)
        self.versions = np.concatenate([self.versions, np.zeros(more, np.int64)])
        nothing = np.empty(more, np.object_)
        self.created, self.contents, self.metadata = (
            np.concatenate([column, nothing]) for column in (self.created, self.contents, self.metadata)
        )
        self.size += _PLACE * more

    def move(self, place: int, last: int) -> None:
        """Put the last row in the place of one that is cleared."""
        for column in (self.versions, self.created, self.contents, self.metadata):
            column[place] = column[last]
        self.created[last] = self.contents[last] = self.metadata[last] = None
        self.versions[last] = 0

    def clear(self, place: int) -> None:
        """Let go of what is held of a row that changes or goes."""
        if self.versions[place] > 0:
            self.size -= size_of(self.contents[place], self.metadata[place])
            self.created[place] = self.contents[place] = self.metadata[place] = None
        self.versions[place] = -self.puts

    def fill(self, place: int, contents: Contents) -> None:
        self.clear(place)
        self.versions[place], self.created[place], content, metadata = contents
        self.contents[place] = content
        self.metadata[place] = _NO_METADATA if metadata == _NO_METADATA else metadata
        self.size += size_of(content, metadata)


def size_of(content: bytes, metadata: bytes) -> int:
    """Give the bytes that a memory's contents take beside their place."""
    own = _BYTES_OVERHEAD + len(metadata) if metadata != _NO_METADATA else 0
    return _TIME + _BYTES_OVERHEAD + len(content) + own


class Matrix:
    """Vectors of unit norm, one a row, without gaps; and what searches filter by, beside them.

    The scores found here and the server's similarities differ by at most `_slack`: each of the two sums in float32,
    in an order of its own, and the bound holds for any order. So whatever lies within twice that of the last one asked
    for is a candidate, and the server, which ranks the candidates, has every row that its own search would give.

    Most of a search is reading the vectors from main memory. So each also stands here in a byte a component, in steps
    of its own scale, and products of these are exact in whole numbers. What the rounding leaves out has a norm that is
    kept beside them, and by it they bound the score from both sides (Cauchy-Schwarz); only rows that may be better than
    as many as are asked for are read in full.
    """

    def __init__(self, dimension: int, size: int = 0) -> None:
        self.size = 0
        self.dimension = dimension
        gamma = dimension * 2.0**-24 / (1 - dimension * 2.0**-24)
        self._slack = 4.1 * gamma
        # Of two similarities, what they can be off by together: sums in eight lanes, of the product and of the norms.
        self._doubt = dimension * 2.0**-25
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
        self._coded: list[UUID | None] = [None]
        self._held: _Held | None = None
        self._allocate(_with_spare(size, _SPARE_AT_FIRST))

    # --- memory ------------------------------------------------------------------------------------------------------

    @staticmethod
    def estimate(dimension: int, size: int) -> int:
        """Give the bytes that so many rows are going to take."""
        return _with_spare(size, _SPARE_AT_FIRST) * (5 * dimension + _ROW_OVERHEAD)

    @property
    def footprint(self) -> int:
        """Bytes that all of this takes."""
        vectors = self._vectors.nbytes + self._levels.nbytes
        return vectors + _ROW_OVERHEAD * (self.capacity + len(self._codes)) + self.contents_size

    @property
    def capacity(self) -> int:
        """Rows that there is room for."""
        return len(self._vectors)

    def _allocate(self, capacity: int) -> None:
        self._vectors: Floats = _zeros((capacity, self.dimension), np.float32)
        self._ids: NDArray[np.uint8] = np.zeros((capacity, 16), np.uint8)
        self._scopes: NDArray[np.int32] = np.zeros((3, capacity), np.int32)
        self._unique: NDArray[np.bool_] = np.zeros(capacity, np.bool_)
        self._levels: Levels = _zeros((capacity, self.dimension), np.int8)
        # What one level is, and the norm of what rounding to levels leaves out, never too small.
        self._scales: Floats = np.zeros(capacity, np.float32)
        self._errors: Floats = np.zeros(capacity, np.float32)
        # Of rows with equal marks the vectors are the same as stored, to the bit.
        self._marks: NDArray[np.int64] = np.zeros(capacity, np.int64)
        self._scores_of_all: Floats = np.zeros(capacity, np.float32)

    def _reserve(self, size: int) -> None:
        if size > self.capacity:
            self._resize(_with_spare(size, _SPARE))

    def _resize(self, capacity: int) -> None:
        used, before, held = self.size, self._columns(), self._held
        self._allocate(capacity)
        for old, new in zip(before, self._columns(), strict=True):
            new[:used] = old[:used]
        if held is not None:
            held.grow(self.capacity)

    def _columns(self) -> tuple[NDArray[Any], ...]:
        """Give all that is kept of the rows, a row first."""
        return (
            self._vectors,
            self._levels,
            self._scales,
            self._errors,
            self._ids,
            self._marks,
            self._unique,
            self._scopes.T,
        )

    # --- change ------------------------------------------------------------------------------------------------------

    def rows_in(self, content: bytes) -> int:
        """Give the number of rows that the server has sent."""
        return len(content) // self._row.itemsize

    def put(self, content: bytes, start: int = 0, count: int = -1, contents: Sequence[Contents] | None = None) -> None:
        """Add rows as the server sends them, or put them in place of those with the same ids.

        Args:
            content: Rows, one after the other.
            start: The first one to take.
            count: How many; -1: all from there on.
            contents: Of the same rows, to be held where others are; None, or a version that is: they are not known.
        """
        width = self._row.itemsize
        rows = np.frombuffer(content, self._row, count, start * width)
        vectors = rows["vector"].astype(np.float32)
        # A check of the table sees to it that each has a direction.
        vectors /= np.sqrt(np.einsum("ij,ij->i", vectors, vectors))[:, None]
        places, codes = self._places, self._codes
        begin = start * width
        ids = [content[at : at + 16] for at in range(begin, begin + len(rows) * width, width)]
        self._reserve(self.size + sum(id not in places for id in set(ids)))
        at = np.empty(len(rows), np.intp)
        marks = np.empty(len(rows), np.int64)
        scopes = np.zeros((len(rows), 3), np.int32)
        flags = rows["flags"].astype(np.int64)
        for number, (id, flag) in enumerate(zip(ids, flags.tolist(), strict=True)):
            place = places.get(id)
            if place is None:
                place = places[id] = self.size
                self.size += 1
            at[number] = place
            marks[number] = hash(content[begin + width - 4 * self.dimension : begin + width])
            for which in (0, 1, 2):
                if flag & (2 << which):
                    begin_of = begin + 16 + 16 * which
                    key = content[begin_of : begin_of + 16]
                    code = codes.get(key)
                    if code is None:
                        code = codes[key] = len(self._coded)
                        self._coded.append(pgproto.UUID(key))
                    scopes[number, which] = code
            begin += width
        self._vectors[at] = vectors
        self._ids[at] = np.frombuffer(rows["id"].tobytes(), np.uint8).reshape(-1, 16)
        self._scopes[:, at] = scopes.T
        self._marks[at] = marks
        self._unique[at] = flags & 1
        self._levels[at], self._scales[at], self._errors[at] = _quantize(vectors)
        held = self._held
        if held is not None:
            for number, place in enumerate(at.tolist()):
                if contents is None or contents[number][0] is None:
                    held.clear(place)
                else:
                    held.fill(place, contents[number])

    def drop(self, ids: Iterable[UUID]) -> None:
        """Take rows out, where they are; the last rows come in their places."""
        for id in ids:
            place = self._places.pop(id.bytes, None)
            if place is None:
                continue
            self.size -= 1
            last, held = self.size, self._held
            if held is not None:
                held.clear(place)
            if place != last:
                self._places[self._ids[last].tobytes()] = place
                for column in self._columns():
                    column[place] = column[last]
                if held is not None:
                    held.move(place, last)

    # --- contents ----------------------------------------------------------------------------------------------------

    @property
    def contents_size(self) -> int:
        """Bytes of the contents; 0: none are held."""
        held = self._held
        return 0 if held is None else held.size

    @staticmethod
    def estimate_contents(size: int) -> int:
        """Give the bytes that the contents of so many rows take before any is known."""
        return _PLACE * _with_spare(size, _SPARE_AT_FIRST)

    def hold_contents(self) -> int:
        """Begin to hold contents, or a new stretch of puts; give the number of that stretch."""
        if self._held is None:
            self._held = _Held(self.capacity)
        self._held.puts += 1
        return self._held.puts

    def release_contents(self) -> None:
        """Let go of all contents. Another thread may do so while this one's goes on with what it has."""
        self._held = None

    def find_outdated(self, listed: bytes) -> list[UUID]:
        """Give the ids of rows whose contents are not known in the version that the server has listed."""
        held = self._held
        if held is None:
            return []
        found: list[UUID] = []
        rows = np.frombuffer(listed, _LISTED)
        versions = rows["version"].tolist()
        for number, version in enumerate(versions):
            id = listed[LISTED * number : LISTED * number + 16]
            place = self._places.get(id)
            if place is not None and held.versions[place] != version:
                found.append(pgproto.UUID(id))
        return found

    def find_unknown(self) -> list[UUID]:
        """Give the ids of rows whose contents are not known."""
        held = self._held
        return [] if held is None else self._ids_at(np.flatnonzero(held.versions[: self.size] <= 0))

    def find_gone(self, listed: bytes, since: int) -> list[UUID]:
        """Give the ids of rows that the server has not listed, and that were not put since that stretch began."""
        held = self._held
        if held is None:
            return []
        there = {listed[begin : begin + 16] for begin in range(0, len(listed), LISTED)}
        return [
            pgproto.UUID(id) for id, place in self._places.items() if id not in there and held.versions[place] > -since
        ]

    def put_contents(self, id: UUID, contents: Contents) -> None:
        """Hold the contents of a row, if it is there."""
        place, held = self._places.get(id.bytes), self._held
        if place is not None and held is not None:
            held.fill(place, contents)

    # --- search ------------------------------------------------------------------------------------------------------

    def suits(
        self,
        least: int,
        most: int,
        *,
        room_id: UUID | None = None,
        world_id: UUID | None = None,
        entity_id: UUID | None = None,
        only_unique: bool = False,
    ) -> bool:
        """Tell whether as many rows match as `search` with these arguments would compare."""
        at = self._select((room_id, world_id, entity_id), only_unique)
        return least <= (self.size if at is None else len(at)) <= most

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
        most: int = sys.maxsize,
    ) -> Found | None:
        """Find what can be among the `count` nearest.

        Args:
            query: Of any norm but zero.
            count: How many rows are wanted, at least 1.
            room_id, world_id, entity_id, only_unique: Only rows like this.
            threshold: Rows below may be left out.
            least: How many must match.
            most: How many may.

        Returns:
            The candidates; None when fewer or more match, or too many are equally near.
        """
        at = self._select((room_id, world_id, entity_id), only_unique)
        if not least <= (self.size if at is None else len(at)) <= most:
            return None
        found = self._find(query, count, at, threshold)
        return None if found is None else Found(self._ids_at(found[0]), found[1])

    def rank(
        self,
        query: Floats,
        count: int,
        *,
        room_id: UUID | None = None,
        world_id: UUID | None = None,
        entity_id: UUID | None = None,
        only_unique: bool = False,
        threshold: float | None = None,
    ) -> list[Row] | None:
        """Find the `count` nearest, most similar first; equal ones are ordered by id.

        Similarities are computed in double precision. The server, which sums in float32, may find others, but not by
        more than `_doubt`: where less than that decides, over the order or the threshold, it is to be asked.

        Args:
            As of `search`.

        Returns:
            The rows; None when the server is to be asked, or contents are not known.
        """
        held = self._held
        if held is None:
            return None
        at = self._select((room_id, world_id, entity_id), only_unique)
        found = self._find(query, count, at, threshold)
        if found is None:
            return None
        at = found[0]
        asked = query.astype(np.float64)
        asked /= math.sqrt(float(np.dot(asked, asked)))
        # Not by BLAS or einsum, in which the sum of a row hangs on its place: equal vectors score the same.
        similarities = (self._vectors[at] * asked).sum(axis=1).clip(-1.0, 1.0).tolist()
        ids, marks = self._ids[at].tobytes(), self._marks[at].tolist()
        order = sorted(range(len(at)), key=lambda number: (-similarities[number], ids[16 * number : 16 * number + 16]))
        for place, (number, following) in enumerate(pairwise(order), start=1):
            if similarities[number] - similarities[following] >= self._doubt:
                if place >= count:
                    break
            elif marks[number] != marks[following]:
                return None
        if threshold is not None:
            if any(abs(similarities[number] - threshold) < self._doubt for number in order[:count]):
                return None
            order = [number for number in order if similarities[number] >= threshold]
        order = order[:count]
        places = at[order]
        if not (held.versions[places] > 0).all():
            return None
        coded = self._coded
        return [
            Row(
                pgproto.UUID(ids[16 * number : 16 * number + 16]),
                *(coded[room], coded[world], coded[entity]),
                *(unique, created, content, metadata),
                similarities[number],
            )
            for number, (room, world, entity), unique, created, content, metadata in zip(
                order,
                self._scopes[:, places].T.tolist(),
                self._unique[places].tolist(),
                held.created[places].tolist(),
                held.contents[places].tolist(),
                held.metadata[places].tolist(),
                strict=True,
            )
        ]

    def _find(
        self, query: Floats, count: int, at: Places | None, threshold: float | None
    ) -> tuple[Places, float] | None:
        """Give the places of what can be among the nearest, and the reach of all others; None: too many are as near."""
        matching = self.size if at is None else len(at)
        if matching <= count:
            return np.arange(matching) if at is None else at, -math.inf
        query = query / np.float32(math.sqrt(float(np.dot(query, query))))
        floor = -math.inf if threshold is None else threshold - self._slack
        at, scores, cut = self._contenders(query, at, count, floor)
        if len(scores) > count:
            cut = max(cut, float(_nth_largest(scores, count)) - 2 * self._slack)
        chosen = np.flatnonzero(scores >= cut)
        if len(chosen) > 2 * count + _MOST_EQUAL:
            return None
        return chosen if at is None else at[chosen], cut + self._slack if cut > floor else -math.inf

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
        if matching < max(_QUANTIZED_FROM, 8 * count):
            return at, self._score(query, at), floor
        middles, spreads = self._approximate(query, at)
        # As many rows as are asked for are at least as near as this.
        lowest = _nth_largest_or_less(middles - spreads, count)
        needed = max(floor, float(lowest) - 2 * self._slack)
        left = np.flatnonzero(middles + spreads >= needed)
        if len(left) > matching // 3:
            return at, self._score(query, at), floor
        at = left if at is None else at[left]
        return at, self._score(query, at), needed

    def _score(self, query: Floats, at: Places | None) -> Floats:
        """Multiply rows with the query."""
        if at is None or len(at) > self.size // 2:
            scores = _multiply(self._vectors, query, self._block, self.size, self._scores_of_all)
            return scores if at is None else scores[at]
        return _gather(self._vectors, at, query)

    def _approximate(self, query: Floats, at: Places | None) -> tuple[Floats, Floats]:
        """Give what the bytes say of the rows' scores, and by how much each can be off, either way."""
        levels, scale, error = _quantize(query)
        everywhere = at is None or len(at) > self.size // 2
        which: Any = slice(self.size) if everywhere else at
        # Above 2^24, from some 1,000 components on, float32 rounds the product: far less than `_slack`.
        middles: Floats = np.asarray(simsimd.dot(levels, self._levels[which], out_dtype="float32"))
        middles *= self._scales[which] * scale
        spreads = self._errors[which] * (1 + error)
        spreads += error + self._slack
        return (middles[at], spreads[at]) if at is not None and everywhere else (middles, spreads)

    def _ids_at(self, at: Places) -> list[UUID]:
        content = self._ids[at].tobytes()
        # asyncpg's own class, as in the rows that it gives: made in a fifth of the time.
        return [pgproto.UUID(content[begin : begin + 16]) for begin in range(0, len(content), 16)]


def _zeros(shape: tuple[int, int], kind: type[np.generic]) -> NDArray[Any]:
    """Make an array of zeros, on large pages where it is large."""
    size = math.prod(shape) * np.dtype(kind).itemsize
    if size >= _LARGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        # What this does not give, numpy may: a kernel without large pages, or the error of too little memory.
        with suppress(OSError):
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_HUGEPAGE)
            return np.frombuffer(memory, kind).reshape(shape)
    return np.zeros(shape, kind)


def _with_spare(size: int, part: int) -> int:
    """Give the rows to make room for: a part of them more, and a multiple of every block."""
    return (size + size // part + 64) // 128 * 128 + 128


def _block(width: int) -> int:
    """Give the rows of a product that BLAS does on one thread: a power of two, 128 at most."""
    return min(128, 1 << ((_BLAS_SINGLE // width).bit_length() - 1))


def _multiply(matrix: Floats, vector: Floats, block: int, size: int, out: Floats) -> Floats:
    """Multiply the first `size` rows with a vector; the matrix has room for whole blocks."""
    blocks = -(-size // block)
    rows = blocks * block
    np.matmul(matrix[:rows].reshape(blocks, block, -1), vector, out=out[:rows].reshape(blocks, block))
    return out[:size]


def _gather(matrix: Floats, at: Places, vector: Floats) -> Floats:
    """Multiply some rows with a vector, through a scratch that stays in the core's own cache."""
    width = len(vector)
    block = _block(width)
    step = _GATHERED // width // block * block
    if not hasattr(_of_thread, "scratch"):
        _of_thread.scratch = np.zeros(_GATHERED, np.float32)
    rows = _of_thread.scratch[: step * width].reshape(step, width)
    scores = np.empty(-(-len(at) // block) * block, np.float32)
    for begin in range(0, len(at), step):
        end = min(begin + step, len(at))
        # "clip", since "raise" makes a copy first; every place is there.
        np.take(matrix, at[begin:end], axis=0, out=rows[: end - begin], mode="clip")
        blocks = -(-(end - begin) // block)
        out = scores[begin : begin + blocks * block].reshape(blocks, block)
        np.matmul(rows[: blocks * block].reshape(blocks, block, width), vector, out=out)
    return scores[: len(at)]


def _nth_largest(scores: NDArray[Any], count: int) -> Any:
    return np.partition(scores, len(scores) - count)[len(scores) - count]


def _nth_largest_or_less(scores: NDArray[Any], count: int) -> Any:
    """Give a number that at least `count` scores reach, and not many more: a fifth of the time of the exact one."""
    columns = len(scores) // 64
    if columns < 4 * count:
        return _nth_largest(scores, count)
    return _nth_largest(scores[: 64 * columns].reshape(64, columns).max(axis=0), count)


def _quantize(vectors: Floats) -> tuple[Levels, Floats, Floats]:
    """Round vectors to levels; give these, what one level is in each, and the norm of what is left out, or more."""
    scales = np.abs(vectors).max(axis=-1) / np.float32(_LEVELS)
    # What is not a number here would have been refused before; the quotient rounds to 127 at most.
    levels = np.rint(vectors / scales[..., None])
    rounding = vectors - levels * scales[..., None]
    errors = np.sqrt((rounding * rounding).sum(axis=-1)) * np.float32(1.0001) + np.float32(1e-6)
    return levels.astype(np.int8), scales, errors
