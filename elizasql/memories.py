"""Memories and their embeddings."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterable, Awaitable, Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from decimal import Decimal
from itertools import islice
from typing import Any
from uuid import UUID

from rapidfuzz.distance import Levenshtein

from . import _codecs
from ._calls import current_deadline, lasting, wait_for
from ._duplicates import find_alike
from ._executor import Fetch
from ._loader import Loader
from ._resident import Resident
from ._statements import SQL
from ._store import Store, as_limit, name_row, order_by_id, read_cursor, read_limits
from .config import Config
from .errors import ArgumentError, DeadlineError, EmbeddingDimensionError, IntegrityError, NotFoundError, show
from .models import LoadSummary, Memory
from .types import DIMENSIONS, Embedding, EmbeddingInput, Recall

# Seconds for which a scope that was measured is not measured again: 10,000 rows cost 1 ms, 4 where vacuum has not been,
# up to half of the exact search of them. A scope that shrinks meanwhile still gives every row: HNSW that yields too few
# is followed by an exact scan. One that grows is scanned for longer, so a small one is looked at sooner.
_LARGE_TTL, _SMALL_TTL = 60.0, 10.0
_MOST_MEASURED = 10_000
_Scope = tuple[Any, ...]

# Candidates that HNSW gives to the exact ranking, for each row asked for: the index orders by half precision.
_RERANK = 3

# Under filters of time and metadata a search looks first among the nearest of all, so many for each one asked for and
# no fewer than the second figure: one in ten that passes is enough. Beyond the third it reads more than it can save.
_WIDER, _WIDE_LEAST, _WIDE_MOST = 10, 100, 10_000

# Memories of a batch that are compared with one another without leaving the event loop.
_COMPARED_AT_ONCE = 256

# Pairs of characters of two texts that are compared without leaving the event loop, some 10 ms; and those that any two
# texts count for beside their own.
_CHARACTERS_AT_ONCE = 1 << 28
_CHARACTERS_LEAST = 1 << 16

# A memory to create of which nothing is given, and the metadata that it gets.
_NOTHING = dict.fromkeys(
    ("id", "type", "created_at", "content", "entity_id", "room_id", "world_id", "unique", "metadata", "embedding")
)
_NO_METADATA = _codecs.encode_json({})

# What the table asks of metadata by their type, and the words without which it asks nothing.
_NEEDED = {"document": ("timestamp",), "fragment": ("documentId", "position")}
_DOCUMENT, _FRAGMENT = b'"document"', b'"fragment"'


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a search was asked beside the vector, checked.

    Attributes:
        params: Of the statements, without the vector. Searches that ask the same share it.
        scope: The key in `_measured`.
        name: Of the statement, where HNSW is not known to be the way.
    """

    params: dict[str, Any]
    scope: _Scope
    name: str


@dataclass(frozen=True, slots=True)
class _Where:
    """Filters of a search that the memory itself must answer.

    Attributes:
        start: Not older.
        end: Not newer.
        metadata: What the metadata contain, as it comes out of the database; None: anything.
        encoded: The same, as it goes in.
    """

    start: datetime | None
    end: datetime | None
    metadata: dict[str, Any] | None
    encoded: bytes | None

    @classmethod
    def read(cls, start: object, end: object, metadata: object) -> _Where:
        encoded = None if metadata is None else _codecs.encode_object(metadata, "metadata")
        return cls(
            _codecs.as_optional_time(start, "start"),
            _codecs.as_optional_end(end, "end"),
            None if encoded is None else _codecs.decode_json(encoded),
            encoded,
        )

    def holds(self, memory: Memory) -> bool:
        """Tell whether a memory passes."""
        created_at = memory.created_at
        assert created_at is not None
        return (
            (self.start is None or created_at >= self.start)
            and (self.end is None or created_at <= self.end)
            and (self.metadata is None or contains(memory.metadata, self.metadata))
        )


def contains(value: Any, part: Any) -> bool:
    """Tell whether a JSON value contains another one, as the server's operator @> does inside of objects."""
    # Loops, not all() and any(): these go two steps deeper a level, and documents may have hundreds of levels.
    if isinstance(part, dict):
        if not isinstance(value, dict):
            return False
        for key, wanted in part.items():  # noqa: SIM110
            if key not in value or not contains(value[key], wanted):
                return False
        return True
    if isinstance(part, list):
        if not isinstance(value, list):
            return False
        for wanted in part:
            for item in value:
                if contains(item, wanted):
                    break
            else:
                return False
        return True
    # A float of 1e16 and more comes back in all its digits, as an integer; what is compared is the numbers as written.
    if isinstance(value, int) and isinstance(part, float):
        return not isinstance(value, bool) and value == Decimal(repr(part))
    # To Python True is 1.
    return bool(value == part) and isinstance(value, bool) is isinstance(part, bool)


class Memories(Store):
    """Remember, recall, change and forget.

    Methods that create, list, count or search take `table_name`, the type of memory, such as "messages", "facts" or
    "documents"; not empty, at most 1,024 bytes, and where `config.memory_types` is set one of these.

    Where an adapter does not know yet that the agent has the width of an embedding, as when another adapter has locked
    it since, a call with one asks first: one round trip more.
    """

    _dimension: int | None
    # Whether policies hold for this role, of memories or of embeddings, which need not hide the same.
    _guarded: bool
    _resident: Resident
    # By type, candidates asked for and filters: whether HNSW was the way when the scope was measured, how many
    # candidates it keeps, and until when that holds.
    _measured: dict[_Scope, tuple[bool, str | None, float]]
    # `check_search` for this agent, remembering what it was asked: its dozen of small steps take 3 us in a row, and 25
    # when the processor's caches hold something else, as they do when the server has worked meanwhile.
    _asked: Callable[..., _Asked]

    # --- the dimension -----------------------------------------------------------------------------------------------

    async def ensure_embedding_dimension(self, dimension: int, *, timeout: float | None = None) -> None:
        """Lock the agent to a width of embeddings. The first lock stays; the same width again is no error.

        The way to another width is `reembed`.

        Args:
            dimension: 384, 512, 768, 1024, 1536 or 3072.

        Raises:
            ArgumentError: Another number.
            EmbeddingDimensionError: The agent is locked to another one.
            NotFoundError: The agent does not exist.

        Statement: sql/embeddings.sql lock_embedding_dimension. Source: ensureEmbeddingDimension; differs: really locks.
        """
        if _codecs.as_count(dimension, "dimension") not in DIMENSIONS:
            raise ArgumentError(f"dimension must be one of {', '.join(map(str, DIMENSIONS))}, not {dimension}")
        locked = await self._executor.fetch_value(
            SQL["lock_embedding_dimension"], agent_id=self.agent_id, dimension=dimension
        )
        if locked is None:
            raise NotFoundError(f"no such agent: {self.agent_id}; call ensure_agent_exists() first")
        self._learn(locked)
        if locked != dimension:
            raise EmbeddingDimensionError(self.agent_id, locked=locked, given=dimension)

    async def get_embedding_dimension(self, *, timeout: float | None = None) -> int | None:
        """Get the width that the agent is locked to, None before the first lock.

        Statement: sql/embeddings.sql get_embedding_dimension.
        """
        self._learn(await self._executor.fetch_value(SQL["get_embedding_dimension"], agent_id=self.agent_id))
        return self._dimension

    # --- writing -----------------------------------------------------------------------------------------------------

    async def create_memory(
        self,
        memory: Memory | Mapping[str, Any],
        table_name: str | None = None,
        unique: bool | None = None,
        *,
        timeout: float | None = None,
    ) -> UUID:
        """Store a memory with the embedding that it has, both or neither, and give its id.

        An id that is there already keeps its row. `unique` left out everywhere and an embedding given: the store looks
        for a near-duplicate, a memory of cosine similarity >= 0.95 of the same type and, where given, room, world and
        entity; the new one is then stored with `unique=False`. That costs about one search more.

        Args:
            memory: What to store; `content` is needed, and `timestamp` in metadata of type "document", `documentId` and
                `position` in those of type "fragment".
            table_name: Its type; None: `memory.type`.
            unique: Overrides `memory.unique`.

        Raises:
            ArgumentError, EmbeddingError: Something does not fit; nothing was sent.
            EmbeddingDimensionError: The agent is locked to another width, or to none yet.
            ForeignKeyError: Room, entity, world or agent does not exist.

        Statement: sql/memories.sql create_memory, create_memory_with_embedding, or
        create_memories_marking_duplicates. One round trip. Source: createMemory.
        """
        row = self._read_row(memory, self._memory_reader(table_name, unique))
        given: int | None = row.get("width")
        if given is not None:
            await self._require_width(given)
            if row["unique"] is None:
                return (await self._create([row["id"]], [row], given))[0]
        statement = SQL["create_memory"] if given is None else SQL.at("create_memory_with_embedding", given)
        row["metadata"] = row["metadata"] or _NO_METADATA
        about = {"agent_id": self.agent_id, "is_unique": row["unique"] is not False, "indexed": self._inline}
        await self._write(self._executor.fetch(statement, **row, **about), given)
        id: UUID = row["id"]
        return id

    async def create_memories(
        self,
        memories: Iterable[Memory | Mapping[str, Any]],
        table_name: str | None = None,
        *,
        timeout: float | None = None,
    ) -> list[UUID]:
        """Store memories with the embeddings that they have, all or none, and give their ids in the order given.

        One statement for each `config.batch_size` memories, in one transaction. Ids that are there already keep their
        rows; of two memories with one id the first counts. `unique` is decided as in `create_memory`, also against
        the memories before in the batch; give it where it is known, the check costs up to one search for each.

        Args:
            memories: Models, mappings, or mappings `{"memory": ..., "tableName": ..., "unique": ...}`.
            table_name: Their type; None: each memory's own.

        Raises:
            As `create_memory`; errors of a memory name its position.

        Statement: sql/memories.sql create_memories or create_memories_marking_duplicates, one round trip a chunk; where
        near-duplicates are looked for, and are in several chunks or in the batch itself, find_near_duplicates and
        create_memories, two round trips a chunk in one transaction. Source: createMemories.
        """
        ids, rows = await self._read_all(Memory, memories, read=self._memory_reader(table_name, None))
        return await self._create(ids, rows, await self._width_of(rows)) if rows else []

    async def _create(self, ids: list[UUID], rows: list[dict[str, Any]], given: int | None) -> list[UUID]:
        undecided = {
            (row["type"], row["room_id"]) for row in rows if row["unique"] is None and row["embedding"] is not None
        }
        in_order = tuple(rows)
        chunks = self._batch(rows, undecided=bool(undecided))
        if not undecided:
            write = self._executor.fetch_chunks(SQL.at("create_memories", given or 384), chunks)
            await self._write(write, given, rows, ids)
            return ids
        for chunk in chunks:
            chunk |= {"lock_types": [], "lock_rooms": []}
        chunks[0]["lock_types"], chunks[0]["lock_rooms"] = map(list, zip(*undecided, strict=True))
        # One at a time looks into each of these: many that wait for their turn must not have every connection.
        locks = [(self.agent_id, *each) for each in (sorted(undecided, key=str) if len(undecided) > 1 else undecided)]
        width = given or 384
        alike = await _find_alike(in_order)
        if len(chunks) == 1 and not alike:
            statement = SQL.at("create_memories_marking_duplicates", width)
            await self._write(self._executor.fetch_in_turn(statement, locks, **chunks[0]), given, rows, ids)
            return ids
        look, create = SQL.at("find_near_duplicates", width), SQL.at("create_memories", width)

        async def work(fetch: Fetch) -> list[Any]:
            # All are looked up before any is stored: what the batch itself stores need not be compared again.
            near: list[bool | None] = []
            for chunk in chunks:
                near += (await fetch(look, **chunk))[0]["near"]
            there = {row["id"] for row, found in zip(rows, near, strict=True) if found is None}
            like_others = await _find_alike(in_order, there) if there else alike
            uniques = iter(
                not (found or row["id"] in like_others) if row["unique"] is None else row["unique"]
                for row, found in zip(rows, near, strict=True)
            )
            for chunk in chunks:
                await fetch(create, **chunk | {"uniques": list(islice(uniques, len(chunk["ids"])))})
            return []

        await self._write(self._executor.fetch_together(create, work, locks), given, rows, ids)
        return ids

    @lasting(86_400.0)
    async def load_memories(
        self,
        memories: Iterable[Memory | Mapping[str, Any]] | AsyncIterable[Memory | Mapping[str, Any]],
        table_name: str | None = None,
        *,
        batch_size: int = 5000,
        on_conflict: str = "error",
        build_index: bool = True,
        progress: Callable[[int, int | None], None] | None = None,
        timeout: float | None = None,
    ) -> LoadSummary:
        """Store any number of memories, as fast as it goes, and bring their embeddings into the index.

        The memories are taken one after the other and never all held. Each `batch_size` of them are stored in one
        transaction, while the next ones are taken: a load that ends early keeps its whole batches, and the error's
        `kept` says how many memories these are. The load takes a connection of the background's, and each batch has
        `config.timeout`.

        Vectors of a small load wait in the tail and are moved into the index at the end. A load that is large beside
        what is indexed (10,000 and more, and a quarter of it) drops the HNSW index of the agent's partition on its way
        and builds a new one at the end: five times faster. Until that is there, searches of the partition's agents scan
        exactly what is theirs, 2 to 4 us a row; and while it is built, their writes of vectors wait. A load that fails
        leaves the building to the background indexer, or to `index_memories`.

        Args:
            memories: As in `create_memories`, also from an asynchronous iterator. `unique` left out is True: nothing
                looks for near-duplicates.
            table_name: Their type; None: each memory's own.
            batch_size: Memories in one transaction, 1 to 50,000; default 5,000.
            on_conflict: What becomes of an id that is there already, or comes twice: "error" or "skip". With "skip" and
                ids that are given, a load may be repeated: it goes on where it ended.
            build_index: False: leave the vectors to the background indexer, or to a later `index_memories`.
            progress: Called after each batch with the number of memories done, and of all where `memories` has a
                length, else None.
            timeout: Seconds for the whole of it; None: a day.

        Raises:
            As `create_memories`.
            UniqueViolationError: An id is there already, and `on_conflict` is "error".

        Statement: sql/memories.sql load_memories, `config.batch_size` rows a round trip, three for each transaction;
        sql/embeddings.sql drop_index, build_index.
        """
        self._refuse_in_transaction("load_memories")
        skip = _codecs.as_choice(on_conflict, ("error", "skip"), "on_conflict") == "skip"
        size = _codecs.as_count(batch_size, "batch_size", least=1)
        if size > 50_000:
            raise ArgumentError(f"batch_size must be at most 50,000, not {size}")
        _codecs.check_progress(progress)
        loader = Loader(
            self,
            self._memory_reader(table_name, None),
            size=size,
            skip=skip,
            build=_codecs.as_bool(build_index, "build_index"),
            progress=progress,
        )
        try:
            return await loader.run(memories)
        finally:
            self._measure_anew()

    async def upsert_memories(
        self,
        memories: Iterable[Memory | Mapping[str, Any]],
        table_name: str | None = None,
        *,
        timeout: float | None = None,
    ) -> list[UUID]:
        """Store memories, or replace content, metadata, `unique` and embedding of those that are there.

        What is None stays: the metadata, the embedding and `unique` of a memory that is there. Its type, entity, room,
        world and time stay always. No near-duplicate check. All or none; of two memories with one id the last counts.

        Raises:
            As `create_memories`.

        Statement: sql/memories.sql upsert_memories. One round trip a chunk. Source: upsertMemories.
        """
        reader = self._memory_reader(table_name, None)
        ids, rows = await self._read_all(Memory, memories, read=reader, twice="last")
        if not rows:
            return []
        given = await self._width_of(rows)
        chunks = self._batch(rows)
        for name in ("unique", "metadata"):
            kept = {row["id"] for row in rows if row[name] is None}
            for chunk in chunks:
                chunk[f"keep_{name}"] = [id for id in chunk["ids"] if id in kept]
        write = self._executor.fetch_chunks(SQL.at("upsert_memories", given or 384), chunks)
        await self._write(write, given, rows, ids)
        if any(row["unique"] is not None for row in rows):
            self._indexer.wake()
        return ids

    async def update_memory(self, memory: Memory | Mapping[str, Any], *, timeout: float | None = None) -> bool:
        """Change the fields of a memory that are given; False when there is no memory of this id.

        Args:
            memory: `id`, and of content, metadata, unique, embedding, entity_id, room_id, world_id those to change;
                None leaves a field as it is. Content and metadata are replaced as a whole. Whatever else is in it is
                left as it is.

        Raises:
            As `create_memory`.

        Statement: sql/memories.sql update_memories. One round trip. Source: updateMemory; differs: an unknown id is
        False and a failure is an error.
        """
        return bool(await self._update([memory], required=False))

    async def update_memories(
        self, memories: Iterable[Memory | Mapping[str, Any]], *, timeout: float | None = None
    ) -> None:
        """Change memories as `update_memory` does, all or none; changes of one memory are put together.

        Raises:
            NotFoundError: A memory does not exist; names it. Nothing was changed.
            As `update_memory`; errors of a memory name its position.

        Statement: sql/memories.sql update_memories. One round trip a chunk. Source: updateMemories.
        """
        await self._update(memories, required=True)

    async def _update(self, memories: Iterable[Memory | Mapping[str, Any]], *, required: bool) -> list[Any]:
        reader = self._reader(Memory.read)
        ids, rows = await self._read_all(Memory, memories, read=reader, new_ids=False, twice="together")
        if not rows:
            return []
        rows.sort(key=lambda row: row["id"].int)
        given = await self._width_of(rows)
        chunks = [
            {
                "agent_id": self.agent_id,
                "ids": [row["id"] for row in chunk],
                "contents": [row.get("content") for row in chunk],
                "metadatas": [row.get("metadata") for row in chunk],
                "uniques": [row.get("unique") for row in chunk],
                "entity_ids": [row.get("entity_id") for row in chunk],
                "room_ids": [row.get("room_id") for row in chunk],
                "world_ids": [row.get("world_id") for row in chunk],
                "embeddings": [row.get("embedding") for row in chunk],
                "indexed": self._inline,
                "required": required,
            }
            for chunk in self._chunks(rows, _weigh)
        ]
        write = self._executor.fetch_chunks(SQL.at("update_memories", given or 384), chunks)
        changed = await self._write(write, given, rows, ids)
        if any(not _SCOPE.isdisjoint(row) for row in rows):
            self._indexer.wake()
        return changed

    async def delete_memory(self, memory_id: UUID | str, *, timeout: float | None = None) -> bool:
        """Delete a memory and its fragments; False when there was nothing.

        Its fragments are what names it as `documentId` in its metadata, whatever the types of both.

        Statement: sql/memories.sql delete_memories. Source: deleteMemory.
        """
        return await self.delete_memories([memory_id]) > 0

    async def delete_memories(self, memory_ids: Iterable[UUID | str], *, timeout: float | None = None) -> int:
        """Delete memories and their fragments, as `delete_memory` does, all or none; give how many went.

        Statement: sql/memories.sql delete_memories. Source: deleteManyMemories.
        """
        return await self._delete_by_ids("delete_memories", memory_ids, "memory_ids")

    async def delete_all_memories(
        self, room_id: UUID | str | Iterable[UUID | str], table_name: str, *, timeout: float | None = None
    ) -> int:
        """Delete every memory of a type in a room or in several, and their fragments; give how many went.

        Raises:
            ArgumentError: `table_name` or an id does not fit; nothing was sent.

        Statement: sql/memories.sql delete_all_memories. Source: deleteAllMemories; differs: this agent's only.
        """
        single = isinstance(room_id, (str, UUID))
        rooms = [_codecs.as_id(room_id, "room_id")] if single else _codecs.as_ids(room_id, "room_id")  # type: ignore[arg-type]
        kind = self._type(table_name)
        if not rooms:
            return 0
        deleted: int = await self._executor.fetch_value(
            SQL["delete_all_memories"], agent_id=self.agent_id, room_ids=rooms, type=kind
        )
        return deleted

    async def prune_memories(
        self,
        table_name: str,
        older_than: timedelta | datetime | float | None = None,
        keep: int | None = None,
        *,
        room_id: UUID | str | None = None,
        timeout: float | None = None,
    ) -> int:
        """Delete old memories of a type, oldest first, and their fragments, as `delete_memory` does; give how many.

        Each batch of `config.batch_size` is a transaction of its own, so that nobody waits long; with fragments it may
        be two of them, or one document and all that it has. When both limits are given, only what is beyond both goes.
        Fragments go with their document, whatever their own type, room and age.

        Args:
            table_name: The type.
            older_than: Only what is older than this time (an aware datetime, or milliseconds since 1970) or this age.
            keep: The newest so many stay in any case.
            room_id: Only of this room, and the newest of it stay.

        Raises:
            ArgumentError: Neither is given, or one does not fit.

        Statement: sql/memories.sql prune_memories, one round trip a batch; get_memories or get_memories_of_room before
        it for `keep`. Source: none, ours.
        """
        params = {
            **self._filters(table_name, None, None, False, None, None),
            **read_limits(older_than, keep),
            **_scope(room_id, None, None),
            "agent_id": self.agent_id,
            "batch_size": self.config.batch_size,
        }
        if keep:
            name = _BY_SCOPE["get_memories"][_path(params)]
            page = {"cursor_time": None, "cursor_id": None, "skip": keep - 1, "count": 1, "include_embedding": False}
            oldest = await self._aside.fetch_row(SQL[name], **params, **page)
            if oldest is None:
                return 0
            params |= {"kept_time": oldest["created_at"], "kept_id": oldest["id"]}
        deleted: int = 0
        while True:
            [(gone, more, last_time, last_id)] = await self._aside.fetch(SQL["prune_memories"], **params)
            deleted += gone
            if not more:
                return deleted
            params |= {"after_time": last_time, "after_id": last_id}

    # --- reading -----------------------------------------------------------------------------------------------------

    async def get_memories(
        self,
        *,
        table_name: str,
        room_id: UUID | str | None = None,
        entity_id: UUID | str | None = None,
        world_id: UUID | str | None = None,
        agent_id: UUID | str | None = None,
        count: int | None = None,
        limit: int | None = None,
        offset: int | None = None,
        cursor: Memory | Mapping[str, Any] | tuple[datetime, UUID] | None = None,
        start: datetime | float | None = None,
        end: datetime | float | None = None,
        unique: bool = False,
        metadata: Mapping[str, Any] | None = None,
        text_contains: str | None = None,
        include_embedding: bool = False,
        timeout: float | None = None,
    ) -> list[Memory]:
        """Get memories of a type, newest first; equal times are ordered by id, descending. Filters combine with AND.

        Args:
            table_name: The type.
            room_id: Only of this room.
            entity_id: Only of this entity.
            world_id: Only with this `world_id` of their own.
            agent_id: The adapter's agent; another one is refused.
            count: At most so many; None: all.
            limit: Another name of `count`.
            offset: Leave out so many of the newest; for deep pages `cursor` is faster.
            cursor: Only what comes after this memory, exclusive: the last one of the page before, or its time and id.
            start: Not older, inclusive: an aware datetime or milliseconds since 1970; 0 is a time.
            end: Not newer, inclusive; whole milliseconds mean to the end of the last one.
            unique: True: leave near-duplicates out.
            metadata: Only where the metadata contain this object (jsonb containment).
            text_contains: Only where `content["text"]` contains this, whatever the case; no index serves it.
            include_embedding: Fill `embedding`.

        Raises:
            ArgumentError: `cursor` and `offset` are both given, `count` and `limit` differ, `agent_id` is another one,
                or a value does not fit; nothing was sent.

        Statement: sql/memories.sql get_memories, get_memories_of_room, _of_entity or _of_world. One round trip.
        Source: getMemories; differs: every filter filters, the embedding comes only when asked for.
        """
        self._check_agent_id(_codecs.as_optional_id(agent_id, "agent_id"))
        params = self._filters(table_name, start, end, unique, metadata, text_contains)
        if cursor is not None and offset:
            raise ArgumentError("cursor and offset exclude each other")
        params |= {
            **read_cursor(Memory, cursor),
            "count": as_limit(count, limit),
            "skip": _codecs.as_optional_count(offset, "offset"),
            "include_embedding": _codecs.as_bool(include_embedding, "include_embedding"),
        }
        scope = _scope(room_id, entity_id, world_id)
        return await self._fetch_memories(_BY_SCOPE["get_memories"][_path(scope)], **params, **scope)

    async def get_memory_by_id(
        self, memory_id: UUID | str, *, include_embedding: bool = False, timeout: float | None = None
    ) -> Memory | None:
        """Get a memory, None where there is none.

        Statement: sql/memories.sql get_memory_by_id. One round trip. Source: getMemoryById; differs: this agent's only.
        """
        found = await self._fetch_memories(
            "get_memory_by_id",
            id=_codecs.as_id(memory_id, "memory_id"),
            include_embedding=_codecs.as_bool(include_embedding, "include_embedding"),
        )
        return found[0] if found else None

    async def get_memories_by_ids(
        self,
        memory_ids: Iterable[UUID | str],
        table_name: str | None = None,
        *,
        include_embedding: bool = False,
        timeout: float | None = None,
    ) -> list[Memory]:
        """Get those of the memories that exist, newest first.

        Args:
            memory_ids: The memories.
            table_name: Only of this type; None: of any.
            include_embedding: Fill `embedding`.

        Raises:
            As `get_memories`.

        Statement: sql/memories.sql get_memories_by_ids. One round trip. Source: getMemoriesByIds.
        """
        ids = _codecs.as_ids(memory_ids, "memory_ids")
        params = {
            "type": None if table_name is None else self._type(table_name),
            "include_embedding": _codecs.as_bool(include_embedding, "include_embedding"),
        }
        return await self._fetch_memories("get_memories_by_ids", ids=ids, **params) if ids else []

    async def get_memories_by_room_ids(
        self,
        *,
        room_ids: Iterable[UUID | str],
        table_name: str,
        count: int | None = None,
        limit: int | None = None,
        include_embedding: bool = False,
        timeout: float | None = None,
    ) -> list[Memory]:
        """Get the newest memories of several rooms together.

        Args:
            room_ids: The rooms; none give no memories.
            table_name, count, limit, include_embedding: As in `get_memories`.

        Raises:
            As `get_memories`.

        Statement: sql/memories.sql get_memories_by_room_ids. One round trip. Source: getMemoriesByRoomIds.
        """
        rooms = _codecs.as_distinct_ids(room_ids, "room_ids")
        params = {
            "type": self._type(table_name),
            "count": as_limit(count, limit),
            "include_embedding": _codecs.as_bool(include_embedding, "include_embedding"),
        }
        return await self._fetch_memories("get_memories_by_room_ids", room_ids=rooms, **params) if rooms else []

    async def get_memories_by_world_id(
        self,
        *,
        world_id: UUID | str | None = None,
        world_ids: Iterable[UUID | str] | None = None,
        table_name: str = "messages",
        count: int | None = None,
        limit: int | None = None,
        include_embedding: bool = False,
        timeout: float | None = None,
    ) -> list[Memory]:
        """Get the newest memories of a world, or of several together: those that name it, and those in rooms of it.

        Args:
            world_id: The world.
            world_ids: The worlds, instead of `world_id`; each memory comes once, none give no memories.
            table_name: The type; default "messages".
            count, limit, include_embedding: As in `get_memories`.

        Raises:
            ArgumentError: Neither `world_id` nor `world_ids` is given, or both; or as `get_memories`.

        Statement: sql/memories.sql get_memories_by_world_id. One round trip. Source: getMemoriesByWorldId; differs:
        the memory's own `world_id` counts, too.
        """
        if (world_id is None) == (world_ids is None):
            raise ArgumentError("give either world_id or world_ids")
        if world_ids is None:
            worlds = [_codecs.as_id(world_id, "world_id")]
        else:
            worlds = _codecs.as_distinct_ids(world_ids, "world_ids")
        params = {
            "type": self._type(table_name),
            "count": as_limit(count, limit),
            "include_embedding": _codecs.as_bool(include_embedding, "include_embedding"),
        }
        return await self._fetch_memories("get_memories_by_world_id", world_ids=worlds, **params) if worlds else []

    async def count_memories(
        self,
        room_id: UUID | str | None = None,
        unique: bool = False,
        table_name: str = "messages",
        *,
        room_ids: Iterable[UUID | str] | None = None,
        entity_id: UUID | str | None = None,
        world_id: UUID | str | None = None,
        agent_id: UUID | str | None = None,
        start: datetime | float | None = None,
        end: datetime | float | None = None,
        metadata: Mapping[str, Any] | None = None,
        text_contains: str | None = None,
        timeout: float | None = None,
    ) -> int:
        """Count the memories that `get_memories` with the same filters gives.

        Args:
            room_id: Only of this room.
            unique: True: leave near-duplicates out.
            table_name: The type; default "messages".
            room_ids: Only of these rooms, instead of `room_id`.
            entity_id, world_id, agent_id, start, end, metadata, text_contains: As in `get_memories`.

        Raises:
            ArgumentError: `room_id` and `room_ids` are both given, `agent_id` is another one, or a value does not fit;
                nothing was sent.

        Statement: sql/memories.sql count_memories, count_memories_of_rooms, _of_entity or _of_world. One round trip.
        Source: countMemories; differs: `unique` is False by default in every form, so that it agrees with get_memories.
        """
        if room_id is not None and room_ids is not None:
            raise ArgumentError("room_id and room_ids exclude each other")
        self._check_agent_id(_codecs.as_optional_id(agent_id, "agent_id"))
        params = self._filters(table_name, start, end, unique, metadata, text_contains)
        scope: dict[str, Any] = _scope(room_id, entity_id, world_id)
        path = _path(scope)
        scope["room_ids"] = [scope.pop("room_id")] if room_id is not None else None
        if room_ids is not None:
            scope["room_ids"] = _codecs.as_distinct_ids(room_ids, "room_ids")
            path = "room_id"
        counted: int = await self._executor.fetch_value(
            SQL[_BY_SCOPE["count_memories"][path]], agent_id=self.agent_id, **params, **scope
        )
        return counted

    # --- recall ------------------------------------------------------------------------------------------------------

    async def search_memories(
        self,
        *,
        embedding: EmbeddingInput,
        table_name: str,
        match_threshold: float | None = None,
        count: int | None = None,
        limit: int | None = None,
        unique: bool = False,
        query: str | None = None,  # noqa: ARG002
        room_id: UUID | str | None = None,
        world_id: UUID | str | None = None,
        entity_id: UUID | str | None = None,
        start: datetime | float | None = None,
        end: datetime | float | None = None,
        metadata: Mapping[str, Any] | None = None,
        include_embedding: bool = False,
        recall: Recall = "balanced",
        ef_search: int | None = None,
        timeout: float | None = None,
    ) -> list[Memory]:
        """Find the memories nearest in meaning, most similar first; equal ones are ordered by id.

        Never fewer than `count` rows while more match. What is searched often is held in the process and searched
        there, exactly (`config.resident`). In the database scopes up to 2,000 rows, and larger ones that are a small
        part of the index, are searched exactly; the others through HNSW and, for what is not indexed yet, exactly.
        Under `start`, `end` or `metadata` the nearest ten for each one asked for are looked through; where too few of
        them pass, every memory that passes is compared.

        Args:
            embedding: float32[dimension], or anything that converts to it; any norm but zero.
            table_name: The type.
            match_threshold: Least cosine similarity, -1 to 1; None: none. Applied to the `count` nearest.
            count: At most so many; default 10.
            limit: Another name of `count`.
            unique: True: leave near-duplicates out.
            query: The text behind the embedding; taken for ElizaOS's sake and not used.
            room_id, world_id, entity_id: Only of these; they combine.
            start, end, metadata: As in `get_memories`; they combine with the others.
            include_embedding: Fill `embedding`.
            recall: "balanced": HNSW keeps `config.ef_search` candidates; "fast": half as many; "exact": every memory in
                the scope is compared, 0.1 ms and more for each hundred. What is held in the process is searched exactly
                in any case.
            ef_search: The candidates themselves, 1 to 1,000, in place of what `recall` says.

        Returns:
            Memories with `similarity`; [] for an agent that has no width yet, or that does not exist.

        Raises:
            ArgumentError: `count` and `limit` differ, `ef_search` is given beside `recall="exact"`, or a value does not
                fit; nothing was sent.
            EmbeddingError: Not a vector that can be compared; nothing was sent.
            EmbeddingDimensionError: The agent is locked to another width.

        Statement: sql/resident.sql check_resident or fetch_resident, or sql/embeddings.sql search_memories,
        search_memories_by_hnsw, search_memories_of_room, _of_entity, _of_world or _of_several, and
        search_memories_where, _of_room, _of_entity or _of_world. One round trip, one more where too few of the nearest
        pass; in the process two after an update or a removal, or where similarities are too close to tell the order,
        and more after many changes.
        Source: searchMemories; differs: uses an index, the threshold 0 means 0.
        """
        # A copy: the caller may change it while the server is asked.
        vector = _codecs.as_embedding(embedding).copy()
        width = vector.shape[0]
        rest = (
            *(table_name, match_threshold, count, limit, unique, room_id, world_id, entity_id),
            *(include_embedding, recall, ef_search),
        )
        try:
            asked = self._asked(*rest)
        except TypeError:  # one that has no hash: to be refused by name
            asked = check_search(self.agent_id, self.config, *rest)
        filtered = not (start is None and end is None and metadata is None)
        where = _Where.read(start, end, metadata) if filtered else None
        number = asked.params["count"]
        if number == 0 and self._dimension in (None, width):
            return []
        if width != self._dimension and (locked := await self.get_embedding_dimension()) != width:
            if locked is None:
                return []
            raise EmbeddingDimensionError(self.agent_id, locked=locked, given=width)
        try:
            if not number:
                return []
            if where is None and not self._guarded:
                return await self._search(vector, asked)
            return await self._search_where(vector, asked, where)
        except EmbeddingDimensionError as error:
            self._learn(error.locked)
            raise

    async def _search(self, vector: Embedding, asked: _Asked) -> list[Memory]:
        width = vector.shape[0]
        params = {"embedding": _codecs.encode_vector(vector), **asked.params}
        if not self._resident.off:
            found = await self._resident.search(self._executor, vector, params)
            if found is not None:
                return found
        by_hnsw, ef, until = self._measured.get(asked.scope, (None, None, 0.0))
        if until < time.monotonic():
            by_hnsw = None
        if params["ef_search"] is None:
            by_hnsw = False
        if by_hnsw and asked.name == "search_memories":
            statement = SQL.at("search_memories_by_hnsw", width)
            return [Memory(*row) for row in await self._executor.fetch(statement, known_ef=ef, **params)]
        rows = await self._executor.fetch(SQL.at(asked.name, width), by_hnsw=by_hnsw, known_ef=ef, **params)
        if rows and by_hnsw is None:
            if len(self._measured) >= _MOST_MEASURED:
                self._measured.clear()
            by_hnsw, ef = rows[0]["by_hnsw"], rows[0]["ef"]
            self._measured[asked.scope] = (by_hnsw, ef, time.monotonic() + (_LARGE_TTL if by_hnsw else _SMALL_TTL))
        return [Memory(*row[:-2]) for row in rows]

    async def _search_where(self, vector: Embedding, asked: _Asked, where: _Where | None) -> list[Memory]:
        """Search for what passes, by the filters and by the policies of memories, which embeddings may not share."""
        number, threshold = asked.params["count"], asked.params["threshold"]
        wide = number if where is None else max(_WIDER * number, _WIDE_LEAST)
        if wide <= _WIDE_MOST and asked.params["ef_search"] is not None:
            params = asked.params | {"count": wide, "candidates": _RERANK * wide, "threshold": None}
            nearest = await self._search(vector, replace(asked, params=params))
            found = nearest if where is None else [memory for memory in nearest if where.holds(memory)]
            if len(found) >= number or (len(nearest) < wide and not self._guarded):
                return [memory for memory in found[:number] if threshold is None or memory.similarity >= threshold]
        statement = SQL.at(_BY_SCOPE["search_memories_where"][_path(asked.params)], vector.shape[0])
        where = where or _Where(None, None, None, None)
        given = {"start_time": where.start, "end_time": where.end, "metadata": where.encoded}
        embedding = _codecs.encode_vector(vector)
        rows = await self._executor.fetch(statement, embedding=embedding, **given, **asked.params)
        return [Memory(*row) for row in rows]

    def _measure_anew(self) -> None:
        """Look again at scopes that were small, which may have grown by much."""
        for scope in [scope for scope, (by_hnsw, *_) in self._measured.items() if not by_hnsw]:
            del self._measured[scope]

    async def search_memories_by_embedding(
        self,
        embedding: EmbeddingInput,
        *,
        table_name: str,
        match_threshold: float | None = None,
        count: int | None = None,
        limit: int | None = None,
        unique: bool = False,
        room_id: UUID | str | None = None,
        world_id: UUID | str | None = None,
        entity_id: UUID | str | None = None,
        start: datetime | float | None = None,
        end: datetime | float | None = None,
        metadata: Mapping[str, Any] | None = None,
        include_embedding: bool = False,
        recall: Recall = "balanced",
        ef_search: int | None = None,
        timeout: float | None = None,
    ) -> list[Memory]:
        """Find the memories nearest in meaning: `search_memories` with the embedding in front.

        Raises:
            As `search_memories`.

        Source: searchMemoriesByEmbedding.
        """
        return await self.search_memories(
            embedding=embedding,
            table_name=table_name,
            match_threshold=match_threshold,
            count=count,
            limit=limit,
            unique=unique,
            room_id=room_id,
            world_id=world_id,
            entity_id=entity_id,
            start=start,
            end=end,
            metadata=metadata,
            include_embedding=include_embedding,
            recall=recall,
            ef_search=ef_search,
        )

    async def get_cached_embeddings(
        self,
        *,
        query_table_name: str,
        query_threshold: int,
        query_input: str,
        query_field_name: str = "content",
        query_field_sub_name: str = "text",
        query_match_count: int = 10,
        timeout: float | None = None,
    ) -> list[dict[str, Any]]:
        """Find embeddings of texts that are nearly the same, so that a text need not be embedded twice.

        Args:
            query_table_name: The type of the memories to look in.
            query_threshold: Greatest edit distance (Levenshtein, in code points).
            query_input: The text; of any length.
            query_field_name: "content" or "metadata".
            query_field_sub_name: The key in it; an index serves "text" of the content.
            query_match_count: At most so many; default 10.

        Returns:
            `{"embedding": float32[dimension], "levenshtein_score": int}`, nearest first; equal ones ordered by id.

        Raises:
            ArgumentError: `query_field_name` is neither "content" nor "metadata", `query_field_sub_name` is empty, or a
                value does not fit; nothing was sent.

        Statement: sql/memories.sql get_cached_embeddings, _by_content or _by_metadata. One round trip; a second one,
        get_cached_vectors, when more than 256 texts have about the length. Source: getCachedEmbeddings; differs: texts
        of any length, this agent's, of its dimension, and the field that was named.
        """
        text = _codecs.as_text(query_input, "query_input")
        key = _codecs.as_text(query_field_sub_name, "query_field_sub_name", empty=False)
        threshold = _codecs.as_count(query_threshold, "query_threshold")
        count = _codecs.as_count(query_match_count, "query_match_count")
        kind = self._type(query_table_name)
        field = _codecs.as_choice(query_field_name, tuple(_CACHED_BY_FIELD), "query_field_name")
        indexed = (field, key) == ("content", "text")
        name = "get_cached_embeddings" if indexed else _CACHED_BY_FIELD[query_field_name]
        if count == 0:
            return []
        # An edit distance of k needs lengths that differ by at most k: exact, and an index range.
        rows = await self._executor.fetch(
            SQL[name],
            agent_id=self.agent_id,
            type=kind,
            key=key,
            lengths_from=max(len(text) - threshold, 0),
            lengths_to=min(len(text) + threshold, 2**31 - 1),
            most=256,
        )
        near: list[tuple[int, UUID]] = []
        compared = 0
        for row in rows:
            score = Levenshtein.distance(text, row["text"], score_cutoff=threshold)
            if score <= threshold:
                near.append((score, row["id"]))
            compared += max(len(text) * len(row["text"]), _CHARACTERS_LEAST)
            if compared >= _CHARACTERS_AT_ONCE:
                compared = 0
                await asyncio.sleep(0)
        ranked = sorted(near)[:count]
        vectors = {row["id"]: row["embedding"] for row in rows}
        missing = [id for _, id in ranked if vectors[id] is None]
        if missing:
            texts = {row["id"]: row["text"] for row in rows}
            vectors |= await self._executor.fetch(
                SQL["get_cached_vectors"],
                agent_id=self.agent_id,
                type=kind,
                ids=missing,
                texts=[texts[id] for id in missing],
                key=key,
                of_metadata=field == "metadata",
            )
        return [
            {"embedding": vectors[id], "levenshtein_score": score} for score, id in ranked if vectors[id] is not None
        ]

    # --- what the methods share --------------------------------------------------------------------------------------

    def _type(self, table_name: object) -> str:
        return _as_type(table_name, self.config)

    def _memory_reader(self, table_name: str | None, unique: bool | None) -> Callable[[Any], dict[str, Any]]:
        """Give what reads one memory that is to be created."""
        kind = None if table_name is None else self._type(table_name)
        decided = None if unique is None else _codecs.as_bool(unique, "unique")

        def prepare(value: object) -> dict[str, Any]:
            row = {**_NOTHING, **_unwrap(value)}
            if row["content"] is None:
                raise ArgumentError("content is missing")
            if kind is not None:
                row["type"] = kind
            elif row["type"] is None:
                raise ArgumentError("table_name is missing, and so is the memory's type")
            else:
                row["type"] = self._type(row["type"])
            if decided is not None:
                row["unique"] = decided
            return row

        return self._reader(prepare)

    def _reader(self, prepare: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
        """Give what reads one memory of a batch: checks it, and encodes its JSON and its embedding."""
        first: int | None = None

        def read(value: Any) -> dict[str, Any]:
            nonlocal first
            row = prepare(value)
            for name in ("content", "metadata"):
                if row.get(name) is not None:
                    row[name] = _codecs.encode_json(row[name], name)
            if row.get("metadata") is not None:
                _check_metadata(row["metadata"])
            vector = row.get("embedding")
            if vector is not None:
                row["width"] = vector.shape[0]
                first = first or row["width"]
                if row["width"] != first:
                    # Of two widths one is wrong, whichever is in force by now.
                    if self._dimension is not None:
                        wrong = row["width"] if row["width"] != self._dimension else first
                        raise EmbeddingDimensionError(self.agent_id, locked=self._dimension, given=wrong)
                    raise ArgumentError(f"embedding has {row['width']} dimensions, others of the batch have {first}")
                row["embedding"] = _codecs.encode_vector(vector)
            return row

        return read

    async def _width_of(self, rows: Sequence[Mapping[str, Any]]) -> int | None:
        """Give the one width of a batch's embeddings, None where there are none; refuse one that is not the agent's."""
        given = next((row["width"] for row in rows if row.get("width") is not None), None)
        if given is not None:
            await self._require_width(given)
        return given

    async def _require_width(self, width: int) -> None:
        """Refuse a width that is not the agent's.

        Asks the server where this adapter knows of none or of another: somebody may have locked or moved the agent.
        Where there is no agent, the server says so of the write.
        """
        if width == self._dimension:
            return
        found = await self._executor.fetch_row(SQL["get_embedding_dimension"], agent_id=self.agent_id)
        if found is not None:
            self._learn(found[0])
            if found[0] != width:
                raise EmbeddingDimensionError(self.agent_id, locked=found[0], given=width)

    def _learn(self, dimension: int | None) -> None:
        """Take note of the width in force, which the server has told."""
        if dimension != self._dimension:
            self._dimension = dimension
            self._resident.forget()

    async def _load(self, rows: list[dict[str, Any]], *, skip: bool) -> list[Any]:
        """Store a batch of a load, in one transaction of the background's."""
        given = await self._width_of(rows)
        chunks = [{**chunk, "skip": skip} for chunk in self._batch(rows)]
        statement = SQL.at("load_memories", given or 384)
        return await self._write(self._background.fetch_chunks(statement, chunks, settle=True), None)

    def _batch(self, rows: list[dict[str, Any]], *, undecided: bool = False) -> list[dict[str, Any]]:
        """Give what a batch statement takes, chunk by chunk; the rows are ordered by id, over all chunks.

        Args:
            rows: What to store, every id once; they are put in this order.
            undecided: Near-duplicates are looked for: "unique" may stay open.
        """
        positions = iter(order_by_id(rows))
        chunks: list[dict[str, Any]] = []
        for chunk in self._chunks(rows, _weigh):
            columns = _columns(chunk)
            where = list(islice(positions, len(chunk)))
            if not undecided:
                columns["uniques"] = [value is not False for value in columns["uniques"]]
            about = {"agent_id": self.agent_id, "positions": where, "begins": not chunks, "indexed": self._inline}
            chunks.append(about | columns)
        return chunks

    async def _write(
        self,
        write: Awaitable[list[Any]],
        given: int | None,
        rows: Sequence[Mapping[str, Any]] = (),
        ids: Sequence[UUID] = (),
    ) -> list[Any]:
        """Wait for a write, and tell the indexer.

        The server refuses it when the agent has moved to another width meanwhile.

        Args:
            write: What writes.
            given: The width of the vectors in it that go to the tail.
            rows, ids: Of a batch, as of `naming_row`.
        """
        try:
            stored = await write
        except EmbeddingDimensionError as error:
            self._learn(error.locked)
            raise
        except IntegrityError as error:
            name_row(error, "Memory", rows, enumerate(ids))
            raise
        if given is not None:
            self._indexer.wake()
        return stored

    def _filters(
        self,
        table_name: str,
        start: datetime | float | None,
        end: datetime | float | None,
        unique: bool,
        metadata: Mapping[str, Any] | None,
        text_contains: str | None,
    ) -> dict[str, Any]:
        return {
            "type": self._type(table_name),
            "only_unique": _codecs.as_bool(unique, "unique"),
            "start_time": _codecs.as_optional_time(start, "start"),
            "end_time": _codecs.as_optional_end(end, "end"),
            "metadata": None if metadata is None else _codecs.encode_object(metadata, "metadata"),
            "text_contains": _codecs.as_optional_text(text_contains, "text_contains"),
        }

    async def _fetch_memories(self, name: str, **params: Any) -> list[Memory]:
        return [Memory(*row) for row in await self._executor.fetch(SQL[name], agent_id=self.agent_id, **params)]


_BY_SCOPE: dict[str, dict[str | None, str]] = {
    name: {
        None: name,
        "room_id": f"{name}_of_{rooms}",
        "entity_id": f"{name}_of_entity",
        "world_id": f"{name}_of_world",
    }
    for name, rooms in (
        ("get_memories", "room"),
        ("count_memories", "rooms"),
        ("search_memories", "room"),
        ("search_memories_where", "room"),
    )
}
_FILTERS = ("room_id", "entity_id", "world_id")
# What is copied to the vector, and sends it to the tail when it changes.
_SCOPE = {*_FILTERS, "unique"}
# The share of `config.ef_search` that HNSW keeps; None: it is not asked.
_SHARES: dict[str, float | None] = {"fast": 0.5, "balanced": 1.0, "exact": None}
_CACHED_BY_FIELD = {"content": "get_cached_embeddings_by_content", "metadata": "get_cached_embeddings_by_metadata"}


def check_search(
    agent_id: UUID,
    config: Config,
    table_name: str,
    match_threshold: float | None,
    count: int | None,
    limit: int | None,
    unique: bool,
    room_id: UUID | str | None,
    world_id: UUID | str | None,
    entity_id: UUID | str | None,
    include_embedding: bool,
    recall: Recall,
    ef_search: int | None,
) -> _Asked:
    """Check what `search_memories` was asked beside the vector."""
    number = as_limit(count, limit)
    number = 10 if number is None else number
    params = {
        "agent_id": agent_id,
        "type": _as_type(table_name, config),
        **_scope(room_id, entity_id, world_id),
        "only_unique": _codecs.as_bool(unique, "unique"),
        "threshold": _threshold(match_threshold),
        "count": number,
        "candidates": min(number * _RERANK, 2**63 - 1),
        "include_embedding": _codecs.as_bool(include_embedding, "include_embedding"),
        "ef_search": _as_ef_search(recall, ef_search, config),
    }
    filters = (params["room_id"], params["entity_id"], params["world_id"])
    name = _BY_SCOPE["search_memories"][_path(params)] if filters.count(None) > 1 else "search_memories_of_several"
    return _Asked(params, (params["type"], params["ef_search"], filters), name)


def _as_type(table_name: object, config: Config) -> str:
    kind = _codecs.as_key(table_name, "table_name", empty=False)
    known = config.memory_types
    if known is not None and kind not in known:
        raise ArgumentError(f"table_name {show(kind)} is not one of memory_types: {', '.join(sorted(known))}")
    return kind


def _as_ef_search(recall: Recall, ef_search: int | None, config: Config) -> int | None:
    """Give the candidates that HNSW is to keep, None where it is not to be asked."""
    share = _SHARES[_codecs.as_choice(recall, tuple(_SHARES), "recall")]
    if ef_search is None:
        return None if share is None else max(1, int(config.ef_search * share))
    if share is None:
        raise ArgumentError("an exact search keeps no candidates: give recall or ef_search")
    if _codecs.as_count(ef_search, "ef_search", least=1) > 1000:
        raise ArgumentError(f"ef_search: pgvector takes at most 1000, not {ef_search}")
    return int(ef_search)


def _scope(
    room_id: UUID | str | None, entity_id: UUID | str | None, world_id: UUID | str | None
) -> dict[str, UUID | None]:
    return {
        "room_id": _codecs.as_optional_id(room_id, "room_id"),
        "entity_id": _codecs.as_optional_id(entity_id, "entity_id"),
        "world_id": _codecs.as_optional_id(world_id, "world_id"),
    }


def _path(scope: Mapping[str, Any]) -> str | None:
    """Give the filter whose index serves: the narrowest one first."""
    for name in _FILTERS:
        if scope[name] is not None:
            return name
    return None


def _threshold(value: float | None) -> float | None:
    if value is None:
        return None
    if not _codecs.is_number(value) or not -1 <= value <= 1:
        raise ArgumentError(f"match_threshold must be between -1 and 1, not {show(value, 40)}")
    return float(value)


def _unwrap(memory: Any) -> dict[str, Any]:
    """Read a memory; the batch contract's form of it, {memory, tableName, unique}, is one with these fields."""
    if isinstance(memory, Memory) or not (isinstance(memory, Mapping) and "memory" in memory):
        return Memory.read(memory)
    unknown = set(memory) - {"memory", "tableName", "table_name", "unique"}
    if unknown:
        raise ArgumentError(f"a memory to create has no {', '.join(sorted(map(show, unknown)))}")
    fields = Memory.read(memory["memory"])
    kind = memory.get("tableName", memory.get("table_name"))
    if kind is not None:
        fields["type"] = _codecs.as_text(kind, "tableName")
    if memory.get("unique") is not None:
        fields["unique"] = _codecs.as_bool(memory["unique"], "unique")
    return fields


def _check_metadata(encoded: bytes) -> None:
    """Refuse metadata that the table would refuse, and name what is missing.

    Encoded, as the table sees them: a key or a type may have been written otherwise. Few have to be read for it.
    """
    if _DOCUMENT not in encoded and _FRAGMENT not in encoded:
        return
    metadata = _codecs.decode_json(encoded)
    kind = metadata.get("type")
    if isinstance(kind, str):
        missing = [name for name in _NEEDED.get(kind, ()) if name not in metadata]
        if missing:
            raise ArgumentError(f"metadata of type {kind!r} need {' and '.join(missing)}")


async def _find_alike(rows: Sequence[Mapping[str, Any]], left_out: Container[UUID] = ()) -> set[UUID]:
    """Run `find_alike`, of more than a millisecond in another thread, which ends when the call does."""
    if len(rows) <= _COMPARED_AT_ONCE:
        return find_alike(rows, left_out)
    left = current_deadline(math.inf) - time.monotonic()
    over = threading.Event()
    finding = asyncio.to_thread(find_alike, rows, left_out, over.is_set)
    try:
        return await wait_for(finding, left, "elizasql-find-alike")
    except (asyncio.TimeoutError, TimeoutError):
        name = "create_memories"
        raise DeadlineError(f"{name}: no end of the comparison within the time limit", statement=name) from None
    finally:
        over.set()


def _weigh(row: Mapping[str, Any]) -> int:
    return len(row.get("content") or b"") + len(row.get("metadata") or b"")


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Turn rows into the arrays that a batch statement takes."""
    return {
        "ids": [row["id"] for row in rows],
        "types": [row["type"] for row in rows],
        "created_ats": [row["created_at"] for row in rows],
        "contents": [row["content"] for row in rows],
        "entity_ids": [row["entity_id"] for row in rows],
        "room_ids": [row["room_id"] for row in rows],
        "world_ids": [row["world_id"] for row in rows],
        "uniques": [row["unique"] for row in rows],
        "metadatas": [row["metadata"] or _NO_METADATA for row in rows],
        "embeddings": [row["embedding"] for row in rows],
    }
