"""A bulk load: takes memories one after the other, stores them batch by batch, and sees to the index."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable, Sized
from contextlib import aclosing
from typing import TYPE_CHECKING, Any
from uuid import UUID

from . import _codecs
from ._calls import end, has_new_ids, note_new_id, within
from ._store import READ_AT_ONCE, name_row
from .errors import ArgumentError, ElizaSQLError, IntegrityError
from .models import LoadSummary

if TYPE_CHECKING:
    from .memories import Memories

Row = dict[str, Any]

# Below so many vectors the index stays: to build even a small one locks out writers, and the tail is soon moved.
_LARGE = 10_000

# Seconds of reading without leaving the event loop.
_READ_FOR = 0.005


class Loader:
    """One run of `load_memories`."""

    def __init__(
        self,
        store: Memories,
        read: Callable[[Any], Row],
        *,
        size: int,
        skip: bool,
        build: bool,
        progress: Callable[[int, int | None], None] | None,
    ) -> None:
        self._store = store
        self._indexer = store._indexer
        self._read = read
        self._size = size
        self._skip = skip
        self._build = build
        self._progress = progress
        self._total: int | None = None
        self._taken = 0
        self._kept = 0
        self._loaded = 0
        self._vectors = 0  # that were given
        self._embedded = 0  # that were stored
        self._placed = 0  # of these, past the tail
        # How many vectors must have come before the index is looked at, and whether it is gone.
        self._next_look = _LARGE
        self._dropped = False

    async def run(self, memories: Iterable[Any] | AsyncIterable[Any]) -> LoadSummary:
        """Load everything, and build the index or fill it."""
        began = time.perf_counter()
        source = memories
        if not isinstance(memories, AsyncIterable):
            source = _codecs.as_collection(memories, "expected a collection of Memory")
        self._total = len(memories) if isinstance(memories, Sized) else None
        try:
            async with aclosing(_each(source)) as each:
                await self._store_all(each)
            indexed = await self._index()
        except BaseException as error:
            if self._dropped:
                self._indexer.restore()
            if isinstance(error, ElizaSQLError):
                error.kept = self._kept
                # Made again as it is, it would meet what is kept.
                error.retryable = error.retryable and (not self._kept or (self._skip and not has_new_ids()))
            raise
        return LoadSummary(self._loaded, self._kept - self._loaded, indexed, time.perf_counter() - began)

    async def _store_all(self, memories: AsyncIterator[Any]) -> None:
        """Store batch by batch; the server works on one while the next one is read."""
        storing: asyncio.Future[None] | None = None
        try:
            while True:
                try:
                    batch, count = await self._take(memories, storing)
                except Exception:
                    # What was read before a memory that is wrong is stored, or its own error comes first.
                    if storing is not None:
                        await storing
                    raise
                if storing is not None:
                    await storing
                if not count:
                    return
                storing = asyncio.ensure_future(self._store_batch(batch, count))
        finally:
            if storing is not None:
                await end(storing)

    async def _take(
        self, memories: AsyncIterator[Any], storing: asyncio.Future[None] | None
    ) -> tuple[dict[UUID, tuple[int, Row]], int]:
        """Read the next batch: each row with its position, by id; and how many memories that took.

        Not to its end once the one before, which is being stored, has failed: to make memories may take long.
        """
        batch: dict[UUID, tuple[int, Row]] = {}
        count = 0
        until = time.perf_counter() + _READ_FOR
        async for value in memories:
            position = self._taken
            try:
                row = self._read(value)
                self._store._check_agent(row)
            except ArgumentError as error:
                error.args = (f"Memory at position {position}: {error}",)
                raise
            if row["id"] is None:
                row["id"] = _codecs.new_id()
                note_new_id()
            if batch.setdefault(row["id"], (position, row))[0] != position and not self._skip:
                raise ArgumentError(f"Memory at position {position}: id {row['id']} was given before")
            self._taken += 1
            count += 1
            # A source may be slow, as one that makes the embeddings: the last batch, which is being stored, waits.
            if count % READ_AT_ONCE == 0 or time.perf_counter() >= until:
                await asyncio.sleep(0)
                until = time.perf_counter() + _READ_FOR
            if storing is not None and storing.done():
                storing.result()
            if count == self._size:
                break
        return batch, count

    async def _store_batch(self, batch: dict[UUID, tuple[int, Row]], count: int) -> None:
        rows = [row for _, row in batch.values()]
        vectors = sum(row["embedding"] is not None for row in rows)
        try:
            with within(self._store.config.timeout):
                await self._store._width_of(rows)  # a wrong one must not cost the partition its index
                await self._make_way(len(rows), vectors)
                stored = await self._store._load(rows, skip=self._skip)
        except IntegrityError as error:
            name_row(error, "Memory", rows, ((position, id) for id, (position, _) in batch.items()))
            raise
        self._kept += count
        self._vectors += vectors
        self._loaded += sum(row["stored"] for row in stored)
        embedded, placed = sum(row["embedded"] for row in stored), sum(row["placed"] for row in stored)
        self._embedded += embedded
        self._placed += placed
        # Another load may have built the index meanwhile; then the tail is used again.
        self._dropped = self._dropped and placed == embedded
        if self._progress is not None:
            self._progress(self._kept, self._total)

    async def _make_way(self, rows: int, vectors: int) -> None:
        """Drop the index when what has come, or will for all that is known, is large beside what it holds.

        Args:
            rows: Memories of the batch that is about to be stored.
            vectors: How many of them have one.
        """
        if not vectors or not self._build or self._dropped:
            return
        # What may be skipped does not count before it is stored: a load that is repeated leaves the index alone.
        coming = self._embedded if self._skip else self._embedded + vectors
        all_new = self._embedded == self._kept and (self._kept > 0 if self._skip else rows == vectors)
        if self._total is not None and all_new:
            coming = max(coming, self._total)
        if coming >= self._next_look:
            self._dropped = True  # for all that is known, should the answer not come
            self._dropped = await self._indexer.drop(coming)
            self._next_look = 2 * coming

    async def _index(self) -> int:
        if not self._build or not self._vectors:
            self._indexer.wake()
            return self._placed
        moved = await self._indexer.build() if self._dropped else 0
        return self._placed + moved + await self._indexer.drain()


async def _each(memories: Iterable[Any] | AsyncIterable[Any]) -> AsyncGenerator[Any, None]:
    if isinstance(memories, AsyncIterable):
        async for memory in memories:
            yield memory
    else:
        for memory in memories:
            yield memory
