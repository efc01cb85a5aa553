"""An agent's vectors in the process, searched exactly by numpy: the part of the resident tier that knows no server."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import numpy as np
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

# Rows whose sketches are not looked at: scoring them takes no longer.
_SKETCH_LEAST = 512
# Rows from which a matrix gets a sketch, rows to find the axes by, and the numbers of axes that are tried.
SKETCH_FROM = 2000
_SKETCH_SAMPLE = 2000
_SKETCH_AXES = (64, 96, 128, 160, 192, 224, 256)
# A coordinate is kept in so many steps, either side of zero: a byte, and a bound that lies higher by less than 0.01.
_SKETCH_LEVELS = 127
# What reading costs, in components of rows that lie one after the other: a coordinate of a sketch, a component of rows
# that lie apart. A search by the sketch must cost less than this share of one by the rows.
_COST_OF_LEVEL, _COST_OF_GATHERED, _COST_LIMIT = 0.7, 3.0, 0.7
# By so much the rounding raises the bound, about.
_COST_ROUNDING = 0.008

# Components of the rows that are gathered at once: they stay in the core's own cache until they are multiplied.
_GATHERED = 96 << 10

_of_thread = threading.local()

# Bytes of a row beside its vector and its sketch: id, scope, norms, and its part of the dictionary from ids to places.
_ROW_OVERHEAD = 208


class IncomparableError(ValueError):
    """A vector without a direction, which only raw SQL can have stored: the server ranks it by rules of its own."""


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

    Most of a search is reading the vectors from main memory. A sketch of each row, its coordinates on half of the axes
    in a byte each, bounds the score from above by reading an eighth of the bytes (Cauchy-Schwarz for what it leaves
    out: the norm of the rest, and of the rounding, stand beside it); only rows whose bound reaches the best scores are
    read in full. Axes are those along which the agent's vectors differ most; new rows get their sketch on the same
    ones. The bound holds for any axes, and for rounding, too.
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
        self._steps: Floats = np.zeros(0, np.float32)
        self._allocate(_with_spare(size))

    # --- memory ------------------------------------------------------------------------------------------------------

    @staticmethod
    def estimate(dimension: int, size: int) -> int:
        """Give the bytes that so many rows are going to take, about: the sketch is not known yet."""
        sketch = dimension // 2 if size >= SKETCH_FROM else 0
        return _with_spare(size) * (4 * dimension + sketch + _ROW_OVERHEAD)

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
        sketched = capacity if self._axes is not None else 0
        self._sketches: Levels = np.zeros((sketched, len(self._steps)), np.int8)
        # Norms of what the sketch leaves out: of the rest, and of the rounding.
        self._omitted: Floats = np.zeros((2, sketched), np.float32)
        self._scores_of_all: Floats = np.zeros(capacity, np.float32)

    def _reserve(self, size: int) -> None:
        if size <= self.capacity:
            return
        used, before = self.size, self._columns()
        self._allocate(_with_spare(size))
        for old, new in zip(before, self._columns(), strict=True):
            new[:used] = old[:used]

    def _columns(self) -> tuple[NDArray[Any], ...]:
        """Give all that is kept of the rows, a row first."""
        sketch = () if self._axes is None else (self._sketches, self._omitted.T)
        return (self._vectors, self._ids, self._unique, self._scopes.T, *sketch)

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
            IncomparableError: One has no direction. Nothing was changed.
        """
        width = self._row.itemsize
        rows = np.frombuffer(content, self._row, count, start * width)
        vectors = rows["vector"].astype(np.float32)
        squares = np.einsum("ij,ij->i", vectors, vectors)
        # Beyond these the server's sums of squares may become zero or infinite.
        if not bool(((squares > 1e-30) & (squares < 1e30)).all()):
            raise IncomparableError
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
            self._sketches[at], self._omitted[:, at] = self._sketch_of(self._coordinates(vectors))

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
                for column in self._columns():
                    column[place] = column[last]

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
        matching = self.size if at is None else len(at)
        if not least <= matching <= most:
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
        return _gather(self._vectors, at, query)

    def _bound(self, query: Floats, at: Places | None) -> Floats:
        """Give an upper bound of the rows' scores, up to `_sketch_slack`."""
        coordinates = self._coordinates(query[None])[0]
        length = np.dot(coordinates, coordinates)
        rest, rounding = _rest_above(length, self._least_rest), _norm_above(length)
        everywhere = at is None or len(at) > self.size // 2
        which = range(self.size) if at is None or everywhere else at
        bounds = _gather(self._sketches, which, coordinates * self._steps)
        omitted = self._omitted[:, : self.size] if everywhere else self._omitted[:, at]
        bounds += omitted[0] * rest
        bounds += omitted[1] * rounding
        return bounds[at] if at is not None and everywhere else bounds

    def _ids_at(self, at: Places) -> list[UUID]:
        content = self._ids[at].tobytes()
        # asyncpg's own class, as in the rows that it gives: made in a fifth of the time.
        return [pgproto.UUID(content[begin : begin + 16]) for begin in range(0, len(content), 16)]

    # --- the sketch --------------------------------------------------------------------------------------------------

    @property
    def _least_rest(self) -> float:
        # 1 minus a sum of squares in float32, of coordinates that are sums in float32 themselves.
        return (2 * math.sqrt(len(self._steps)) + 2) * self._gamma

    @property
    def _sketch_slack(self) -> float:
        # Each coordinate is a sum in float32, of the rows' and of the query's alike; and so is the bound.
        return (2 * math.sqrt(len(self._steps)) + 12) * self._gamma

    def _coordinates(self, vectors: Floats) -> Floats:
        """Give the coordinates on the axes."""
        axes = self._axes
        assert axes is not None
        block = _block(self.dimension)
        coordinates = np.empty((len(vectors), len(axes)), np.float32)
        stacked = axes.reshape(-1, block, self.dimension)
        for number, vector in enumerate(vectors):
            np.matmul(stacked, vector, out=coordinates[number].reshape(-1, block))
        return coordinates

    def _sketch_of(self, coordinates: Floats) -> tuple[Levels, Floats]:
        """Give the coordinates in steps, and the norms of what these leave out, never too small."""
        levels = np.clip(np.rint(coordinates / self._steps), -_SKETCH_LEVELS, _SKETCH_LEVELS).astype(np.int8)
        rounding = coordinates - levels * self._steps
        rest = _rest_above(np.einsum("ij,ij->i", coordinates, coordinates), self._least_rest)
        return levels, np.stack([rest, _norm_above(np.einsum("ij,ij->i", rounding, rounding))])

    def make_sketch(self) -> None:
        """Find the axes and sketch every row, when that pays; some 0.1 s, in which nothing else may use the matrix."""
        if self.size < SKETCH_FROM:
            return
        random = np.random.default_rng(self.size)
        vectors = self._vectors[: self.size]
        sample = vectors[random.choice(self.size, min(self.size, _SKETCH_SAMPLE), replace=False)]
        axes = _main_axes(sample, max(_SKETCH_AXES), random)
        number = self._find_number(sample, axes)
        if not number:
            return
        self._axes = np.ascontiguousarray(axes[:number])
        # New rows may lie further out: then their rounding is large, and the bound as high as it has to be.
        furthest = np.abs(sample @ self._axes.T).max(axis=0)
        self._steps = np.maximum(furthest / _SKETCH_LEVELS, np.float32(1e-12)).astype(np.float32)
        self._sketches = np.zeros((self.capacity, number), np.int8)
        self._omitted = np.zeros((2, self.capacity), np.float32)
        for begin in range(0, self.size, _SKETCH_SAMPLE):
            some = slice(begin, min(begin + _SKETCH_SAMPLE, self.size))
            self._sketches[some], self._omitted[:, some] = self._sketch_of(vectors[some] @ self._axes.T)

    def _find_number(self, sample: Floats, axes: Floats) -> int:
        """Find how many axes make a search cheapest, tried with some rows as queries on the sample; 0: none do."""
        queries = sample[:32]
        best = np.partition(self._vectors[: self.size] @ queries.T, -11, axis=0)[-11]  # the query itself is the first
        coordinates, of_queries = sample @ axes.T, queries @ axes.T
        cheapest, chosen = _COST_LIMIT * self.dimension, 0
        for number in _SKETCH_AXES:
            part, part_of_queries = coordinates[:, :number], of_queries[:, :number]
            rest = np.sqrt(np.maximum(1 - np.einsum("ij,ij->i", part, part), 0))
            rest_of_queries = np.sqrt(np.maximum(1 - np.einsum("ij,ij->i", part_of_queries, part_of_queries), 0))
            left = (part @ part_of_queries.T + np.outer(rest, rest_of_queries) + _COST_ROUNDING >= best).mean()
            cost = _COST_OF_LEVEL * number + _COST_OF_GATHERED * float(left) * self.dimension
            if cost < cheapest:
                cheapest, chosen = cost, number
        return chosen


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


def _gather(matrix: NDArray[Any], at: Places | range, vector: Floats) -> Floats:
    """Multiply some rows with a vector, through a scratch that stays in the core's own cache.

    Args:
        matrix: Rows, of any type of numbers.
        at: Which; a range begins at 0.
        vector: Of the width of the rows.
    """
    width = len(vector)
    block = _block(width)
    step = _GATHERED // width // block * block
    if not hasattr(_of_thread, "scratch"):
        _of_thread.scratch = np.zeros(_GATHERED, np.float32)
    rows = _of_thread.scratch[: step * width].reshape(step, width)
    scores = np.empty(-(-len(at) // block) * block, np.float32)
    for begin in range(0, len(at), step):
        end = min(begin + step, len(at))
        if isinstance(at, range):
            rows[: end - begin] = matrix[begin:end]
        elif matrix.dtype == rows.dtype:
            # "clip", since "raise" makes a copy first; every place is there.
            np.take(matrix, at[begin:end], axis=0, out=rows[: end - begin], mode="clip")
        else:
            rows[: end - begin] = matrix[at[begin:end]]
        blocks = -(-(end - begin) // block)
        out = scores[begin : begin + blocks * block].reshape(blocks, block)
        np.matmul(rows[: blocks * block].reshape(blocks, block, width), vector, out=out)
    return scores[: len(at)]


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


def _rest_above(squares: Any, least: float) -> Any:
    """Give the norm of what coordinates leave of a unit vector, by the sum of their squares, never too small."""
    return np.sqrt(np.maximum(1 - squares, 0) + np.float32(least))


def _norm_above(squares: Any) -> Any:
    """Give a norm by the sum of squares, never too small."""
    return np.sqrt(squares) * np.float32(1.0001) + np.float32(1e-6)
