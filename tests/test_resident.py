"""The resident tier: what it gives is what an exact search in the database gives, whoever writes."""

from __future__ import annotations

import asyncio
import gc
import math
import mmap
import os
import pickle
import re
import subprocess
import sys
import time
import weakref
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack
from copy import copy
from dataclasses import replace
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any, cast
from uuid import UUID, uuid4

import asyncpg
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import elizasql
from elizasql import (
    Config,
    ConfigurationError,
    DatabaseAdapter,
    Entity,
    Memory,
    Room,
    World,
    _codecs,
    _matrix,
    _resident,
)
from elizasql._matrix import Matrix
from elizasql._resident import Resident, Tier
from elizasql._statements import SQL

from . import resident_worker
from .conftest import MakeAdapter, Scene, make_scene, neighbour_of
from .locking import blocked_pid
from .resident_worker import TABLE, vector_of
from .test_cut_short import _stepped, assert_nothing_is_left, cancel
from .test_plans import indexes, plan_of, scans_a_table

Vectors = NDArray[np.float32]

RESIDENT = {"resident": "required"}

# The order of an exact search in the database, and the floats that it gives.
EXACT = """
SELECT memory_id, 1 - (dim_384 <=> $1) AS similarity
FROM elizasql.embeddings
WHERE agent_id = $2 AND type = $3
    AND ($4::uuid IS NULL OR room_id = $4) AND ($5::uuid IS NULL OR world_id = $5)
    AND ($6::uuid IS NULL OR entity_id = $6) AND ("unique" OR NOT $7)
    AND ($8::float8 IS NULL OR 1 - (dim_384 <=> $1) >= $8)
ORDER BY dim_384 <=> $1, memory_id
LIMIT $9
"""


def some_vectors(number: int, *, seed: int = 0, dimension: int = 384) -> Vectors:
    """Give vectors in clusters, with directions along which they differ more than along others; some twice."""
    random = np.random.default_rng(seed)
    spread = np.exp(-np.arange(dimension) / (dimension / 6))
    centers = np.random.default_rng(99).normal(size=(12, dimension)) * spread
    vectors = centers[random.integers(12, size=number)] + random.normal(size=(number, dimension)) * spread
    vectors *= random.uniform(0.1, 10, size=(number, 1))
    vectors[number // 2 : number // 2 + number // 10] = vectors[: number // 10]
    return vectors.astype(np.float32)


class Score(float):
    """A similarity of the server's, which sums in float32: equal to one that is off by what that costs."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, float) and abs(self - other) < 2e-6

    __hash__ = float.__hash__


class Mind:
    """An agent whose memories one adapter writes and another searches by the tier."""

    def __init__(self, db: DatabaseAdapter, writer: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
        self.db = db
        self.writer = writer
        self.raw = raw
        self.worlds = [uuid4(), uuid4()]
        self.rooms = [uuid4() for _ in range(4)]
        self.entities = [uuid4() for _ in range(3)]
        self.ids: list[UUID] = []

    @property
    def resident(self) -> Resident:
        return self.db._resident

    @property
    def tier(self) -> Tier:
        return self.resident._tiers[TABLE, 384]

    async def furnish(self) -> None:
        await self.writer.create_worlds([World(id=id) for id in self.worlds])
        await self.writer.create_rooms([Room(id=id, source="t", type="GROUP") for id in self.rooms])
        await self.writer.create_entities([Entity(id=id) for id in self.entities])

    async def remember(self, vectors: Iterable[Vectors], kind: str = TABLE, **options: Any) -> list[UUID]:
        memories = [
            Memory(
                room_id=(*self.rooms, None)[i % 5],
                world_id=(*self.worlds, None)[i % 3],
                entity_id=(*self.entities, None)[i % 4],
                unique=i % 3 != 0,
                content={"i": i},
                embedding=vector,
                **options,
            )
            for i, vector in enumerate(vectors)
        ]
        ids = await self.writer.create_memories(memories, kind)
        self.ids += ids
        return ids

    async def exact(
        self,
        query: Vectors,
        *,
        table_name: str = TABLE,
        count: int = 10,
        room_id: UUID | None = None,
        world_id: UUID | None = None,
        entity_id: UUID | None = None,
        unique: bool = False,
        match_threshold: float | None = None,
    ) -> list[tuple[UUID, float]]:
        rows = await self.raw.fetch(
            EXACT,
            *(_codecs.encode_vector(query), self.db.agent_id, table_name),
            *(room_id, world_id, entity_id, unique, match_threshold, count),
        )
        return [(row[0], Score(row[1])) for row in rows]

    async def search(self, query: Vectors, **options: Any) -> list[tuple[Any, Any]]:
        hits = await self.db.search_memories(embedding=query, table_name=options.pop("table_name", TABLE), **options)
        assert all(hit.agent_id == self.db.agent_id for hit in hits)
        return [(hit.id, hit.similarity) for hit in hits]

    async def renew(self) -> None:
        """Let the contents be brought up to date, and wait for it."""
        self.tier.renew_at = 0.0
        self.resident._begin_renewal(self.tier, TABLE)
        assert self.tier.loading is not None
        await self.tier.loading
        assert not self.tier.behind and self.tier.listed is not None

    async def check(self, query: Vectors, **options: Any) -> list[tuple[Any, Any]]:
        """Search by the tier and hold it to an exact search in the database: rows, order and similarities."""
        hits = self.resident.stats.hits
        memories = await self.db.search_memories(embedding=query, **{"table_name": TABLE} | options)
        assert self.resident.stats.hits == hits + 1
        found: list[tuple[Any, Any]] = [(memory.id, memory.similarity) for memory in memories]
        assert found == await self.exact(query, **options)
        stored = await self.writer.get_memories_by_ids([memory.id for memory in memories])  # type: ignore[misc]
        by_id = {memory.id: memory for memory in stored}
        assert [replace(memory, similarity=None) for memory in memories] == [by_id[id] for id, _ in found]
        return found


@pytest.fixture
async def plain(dsn: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    """Give a bare connection that reads and writes vectors."""
    connection = await asyncpg.connect(dsn)
    await _codecs.register(connection, "public")
    yield connection
    await connection.close()


@pytest.fixture
async def mind(make_db: MakeAdapter, plain: asyncpg.Connection[Any]) -> Mind:
    writer = await make_db()
    mind = Mind(await make_db(writer.agent_id, **RESIDENT), writer, plain)
    await mind.furnish()
    return mind


# --- the matrix, without a server ------------------------------------------------------------------------------------


def as_sent(rows: Iterable[tuple[UUID, UUID | None, UUID | None, UUID | None, bool, Vectors]]) -> bytes:
    """Write rows as the server sends them."""
    content = b""
    for id, room, world, entity, unique, vector in rows:
        flags = unique + 2 * (room is not None) + 4 * (world is not None) + 8 * (entity is not None)
        scope = b"".join((each or UUID(int=0)).bytes for each in (room, world, entity))
        content += id.bytes + scope + flags.to_bytes(2, "big") + _codecs.encode_vector(vector)
    return content


class Model:
    """What a matrix holds, plainly."""

    def __init__(self, seed: int, dimension: int, size: int) -> None:
        self.random = np.random.default_rng(seed)
        self.dimension = dimension
        self.rooms = [None, *(UUID(int=i) for i in range(3))]  # the nil id is a room like any other
        self.rows: dict[UUID, tuple[UUID | None, UUID | None, UUID | None, bool, Vectors]] = {}
        self.contents: dict[UUID, tuple[int, datetime, bytes, bytes]] = {}
        self.matrix = Matrix(dimension)
        self.put(some_vectors(size, seed=seed, dimension=dimension))
        self.matrix.hold_contents()
        self.learn(list(self.rows)[::2])

    def put(self, vectors: Vectors, ids: list[UUID] | None = None) -> None:
        ids = ids or [UUID(bytes=self.random.bytes(16)) for _ in vectors]
        for id, vector in zip(ids, vectors, strict=True):
            scope = (self.rooms[self.random.integers(4)] for _ in range(3))
            self.rows[id] = (*scope, bool(self.random.integers(2)), vector)  # type: ignore[assignment]
        content, half = as_sent((id, *self.rows[id]) for id in ids), len(ids) // 2
        self.matrix.put(content, 0, half)  # in parts, as a large page is
        for id in ids:
            self.contents.pop(id, None)
        known = [self.make_contents(id) for id in ids[half:]] if self.random.integers(2) else None
        self.matrix.put(content, half, contents=known)
        if known is not None and self.matrix.contents_size:
            self.contents.update(zip(ids[half:], known, strict=True))

    def make_contents(self, id: UUID) -> tuple[int, datetime, bytes, bytes]:
        number = int(self.random.integers(1, 1000))
        metadata = b"\x01{}" if number % 2 else b'\x01{"a": 1}'
        return number, datetime.fromtimestamp(number, timezone.utc), b"\x01" + id.bytes * (number % 9), metadata

    def learn(self, ids: list[UUID]) -> None:
        """Let the matrix hold the contents of rows."""
        for id in ids:
            contents = self.contents[id] = self.make_contents(id)
            self.matrix.put_contents(id, contents)

    def drop(self, ids: list[UUID]) -> None:
        for id in ids:
            self.rows.pop(id, None)
            self.contents.pop(id, None)
        self.matrix.drop(ids)

    def check_ranked(self, query: Vectors, count: int, matching: dict[UUID, float], **filters: Any) -> None:
        """What is ranked here is right, and where it is not there is a reason to ask the server."""
        order = sorted(matching, key=lambda id: (-matching[id], id.bytes))
        doubt, threshold = self.matrix._doubt, filters.get("threshold")
        nearest = [id for id in order[:count] if threshold is None or matching[id] >= threshold]
        found = self.matrix.rank(query, count, **filters)
        if found is None:
            near = [matching[id] for id in order]
            assert (
                any(id not in self.contents for id in nearest)
                or any(above - below < 1.1 * doubt for above, below in pairwise(near[: count + 1]))
                or (threshold is not None and any(abs(score - threshold) < 1.1 * doubt for score in near[:count]))
            )
            return
        same = {id: self.rows[id][4].tobytes() for id in nearest}
        # Equal ones differ in the last digits of this model's sums.
        assert {row.id for row in found} == set(nearest) or len(set(same.values())) < len(same)
        assert [(row.similarity, row.id) for row in found] == sorted(
            ((row.similarity, row.id) for row in found), key=lambda pair: (-pair[0], pair[1].bytes)
        )
        assert [row.similarity for row in found] == pytest.approx([matching[id] for id in nearest], abs=1e-6)
        for row in found:
            room, world, entity, unique, _ = self.rows[row.id]
            assert (row.room_id, row.world_id, row.entity_id, row.unique) == (room, world, entity, unique)
            assert (row.created_at, row.content, row.metadata) == self.contents[row.id][1:]

    def check_contents(self) -> None:
        """What is known, and what that takes."""
        listed, newer = (
            b"".join(id.bytes + (version + more).to_bytes(8, "big") for id, (version, *_) in self.contents.items())
            for more in (0, 1)
        )
        assert self.matrix.find_outdated(listed) == []
        assert self.matrix.find_outdated(newer) == list(self.contents)
        unknown = set(self.rows) - set(self.contents)
        assert set(self.matrix.find_unknown()) == unknown
        assert set(self.matrix.find_gone(listed, self.matrix.hold_contents())) == unknown
        bytes_held = sum(_matrix.size_of(content, metadata) for _, _, content, metadata in self.contents.values())
        assert self.matrix.contents_size == _matrix._PLACE * self.matrix.capacity + bytes_held
        held = self.matrix._held
        assert held is not None
        for column in (held.created, held.contents, held.metadata):
            assert not any(column[held.versions <= 0]), "what is not counted is let go of"

    def check(self, query: Vectors, count: int, **filters: Any) -> None:
        """Whatever can be among the nearest is a candidate, and nothing else is above `reach`."""
        scope = [filters.get(name) for name in ("room_id", "world_id", "entity_id")]
        threshold = filters.get("threshold")
        matching = {
            id: float(
                np.dot(row[4], query.astype(float))
                / np.linalg.norm(row[4].astype(float))
                / np.linalg.norm(query.astype(float))
            )
            for id, row in self.rows.items()
            if all(wanted is None or wanted == has for wanted, has in zip(scope, row[:3], strict=True))
            and (row[3] or not filters.get("only_unique"))
        }
        wanted = sorted(matching.values(), reverse=True)[:count]
        found = self.matrix.search(query, count, **filters)
        assert found is not None
        assert set(found.ids) <= set(matching) and len(set(found.ids)) == len(found.ids)
        least = wanted[-1] if len(wanted) == count else -2
        if threshold is not None:
            least = max(least, threshold)
        assert {id for id, similarity in matching.items() if similarity >= least - 1e-7} <= set(found.ids)
        if len(matching) > 8 * count:
            assert len(found.ids) < len(matching) / 2
        left_out = [matching[id] for id in set(matching) - set(found.ids)]
        if threshold is not None:
            left_out = [similarity for similarity in left_out if similarity >= threshold]
        assert max(left_out, default=-math.inf) <= found.reach + 1e-7
        if len(wanted) == count and threshold is None:
            assert found.reach < wanted[-1]
        self.check_ranked(query, count, matching, **filters)
        self.check_contents()


@pytest.mark.parametrize(
    ("dimension", "size"), [(384, 2500), (768, 700), pytest.param(1536, 2100, marks=pytest.mark.slow), (3072, 300)]
)
def test_the_matrix_gives_all_candidates(dimension: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_matrix, "_QUANTIZED_FROM", 100)
    model = Model(dimension, dimension, size)
    for turn in range(4 if dimension == 384 else 2):
        for number in range(6):
            query = some_vectors(1, seed=1000 + 10 * turn + number, dimension=dimension)[0]
            model.check(query, (1, 10, 40)[number % 3])
            model.check(query, 10, only_unique=True)
            model.check(query, 10, threshold=0.3)
            model.check(query, 5, room_id=model.rooms[1 + number % 3])
            model.check(
                query, 5, room_id=model.rooms[1], world_id=model.rooms[3], entity_id=model.rooms[2], threshold=-0.2
            )
            assert model.matrix.search(query, 5, room_id=uuid4()) == _matrix.Found([], -math.inf)
        ids = list(model.rows)
        model.drop([uuid4()] + [ids[i] for i in model.random.choice(len(ids), size // 8, replace=False)])
        again = [id for id in ids if id in model.rows][: size // 10]
        model.put(some_vectors(len(again), seed=turn, dimension=dimension), again)
        model.put(some_vectors(size // 10, seed=50 + turn, dimension=dimension))
        assert model.matrix.size == len(model.rows)
        model.learn(list(model.rows))
        queries = some_vectors(6, seed=turn, dimension=dimension)
        assert sum(model.matrix.rank(query, 10) is not None for query in queries) >= 4


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), size=st.integers(0, 90), data=st.data())
def test_the_matrix_over_random_changes(seed: int, size: int, data: st.DataObject) -> None:
    model = Model(seed, 384, size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_matrix, "_QUANTIZED_FROM", 16)
        for _ in range(data.draw(st.integers(1, 4))):
            change = data.draw(st.sampled_from(["new", "again", "drop", "learn"]))
            ids = data.draw(st.permutations(list(model.rows)))[: data.draw(st.integers(0, 20))]
            if change == "new":
                model.put(some_vectors(data.draw(st.integers(1, 30)), seed=seed + 1))
            elif change == "again" and ids:
                model.put(some_vectors(len(ids), seed=seed + 2), ids)
            elif change == "drop":
                model.drop(ids)
            elif change == "learn":
                model.learn(ids or list(model.rows))
            query = some_vectors(3, seed=data.draw(st.integers(0, 100)))[0]
            scope = {name: data.draw(st.sampled_from(model.rooms)) for name in ("room_id", "world_id", "entity_id")}
            model.check(
                query,
                data.draw(st.integers(1, 30)),
                **scope,
                only_unique=data.draw(st.booleans()),
                threshold=data.draw(st.none() | st.floats(-1, 1)),
            )


def test_the_matrix_with_equal_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(3, 384, 0)
    vector = some_vectors(1)[0]
    model.put(np.repeat(vector[None], 50, axis=0))
    model.put(some_vectors(50, seed=4))
    found = model.matrix.search(vector, 10)
    assert found is not None and len(found.ids) == 50 and found.reach < 1
    monkeypatch.setattr(_matrix, "_MOST_EQUAL", 20)
    assert model.matrix.search(vector, 10) is None
    assert model.matrix.rank(vector, 10) is None


def test_the_matrix_leaves_to_the_server_what_is_too_close_to_tell() -> None:
    model = Model(3, 384, 0)
    vector = some_vectors(1)[0]
    model.put(np.array([vector, vector]))
    model.learn(list(model.rows))
    ranked = model.matrix.rank(vector, 2)
    assert ranked is not None and [row.id for row in ranked] == sorted(model.rows, key=lambda id: id.bytes)
    almost = vector.copy()
    almost[0] = np.nextafter(almost[0], np.float32(np.inf))
    model.put(almost[None])
    model.learn(list(model.rows))
    assert model.matrix.rank(vector, 3) is None


def test_the_matrix_asks_nobody_about_the_order_of_what_it_does_not_give() -> None:
    model = Model(3, 384, 0)
    vector = np.zeros(384, np.float32)
    vector[0] = 1
    near, nearer = vector.copy(), vector.copy()
    near[1], nearer[1] = 0.01, np.nextafter(np.float32(0.01), np.float32(0))
    model.put(np.array([vector, near, nearer]))
    model.learn(list(model.rows))
    found, ranked = model.matrix.search(vector, 1), model.matrix.rank(vector, 1)
    assert found is not None and len(found.ids) == 3
    assert ranked is not None and [row.id for row in ranked] == [next(iter(model.rows))]
    assert model.matrix.rank(vector, 2) is None
    assert model.matrix.rank(vector, 1, threshold=1 - 1e-6) is None, "the server may find less"


@pytest.mark.parametrize("quantized_from", [2, 1000])
def test_the_matrix_finds_what_the_server_may_find_as_near(
    monkeypatch: pytest.MonkeyPatch, quantized_from: int
) -> None:
    """Rounding leaves nothing out of these, so that no more than the sums is in doubt."""
    monkeypatch.setattr(_matrix, "_QUANTIZED_FROM", quantized_from)
    model = Model(3, 384, 0)
    exact = np.full((2, 384), 100, np.float32)
    exact[:, 0] = 127
    exact[1, 1] -= 28  # by this it is less similar by a little more than the slack
    model.put(np.concatenate([exact, some_vectors(40)]))
    [first, second, *_] = model.rows
    slack = model.matrix._slack
    assert slack < 1 - float(np.dot(*exact)) / math.prod(np.linalg.norm(exact, axis=1)) < 1.5 * slack
    found = model.matrix.search(exact[0], 1)
    assert found is not None and set(found.ids) == {first, second}
    found = model.matrix.search(exact[0], 1, threshold=1 - slack / 2)
    assert found is not None and first in found.ids
    # No more than these are to be had, however many are asked for.
    found = model.matrix.search(exact[0], 5, threshold=0.9)
    assert found is not None and set(found.ids) == {first, second} and found.reach == -math.inf


def test_the_matrix_grows_with_the_contents_that_it_holds() -> None:
    model = Model(5, 384, 100)
    for turn in range(3):
        before = model.matrix.capacity
        model.put(some_vectors(before, seed=turn))
        assert model.matrix.capacity > before
        model.check(some_vectors(1, seed=9)[0], 10)
        model.learn(list(model.rows)[before // 2 :])
        model.check(some_vectors(1, seed=10)[0], 10)


def test_rows_that_are_there_take_no_more_room() -> None:
    matrix = Matrix(384)
    rows = as_sent((UUID(int=i), None, None, None, True, vector) for i, vector in enumerate(some_vectors(300)))
    matrix.put(rows)
    capacity = matrix.capacity
    for _ in range(20):
        matrix.put(rows)
    assert (matrix.size, matrix.capacity) == (300, capacity)


def test_what_was_put_after_a_list_was_asked_for_is_not_gone() -> None:
    model = Model(6, 384, 40)
    before, since = set(model.rows), model.matrix.hold_contents()
    again, new = next(iter(before)), uuid4()
    model.rows[new] = model.rows[again]
    model.contents.pop(again, None)
    model.matrix.put(as_sent((id, *model.rows[id]) for id in (again, new)))
    assert set(model.matrix.find_gone(b"", since)) == before - {again}
    model.matrix.put_contents(uuid4(), model.make_contents(new))
    assert model.matrix.find_outdated(uuid4().bytes + bytes(8)) == [], "listed, and not here yet"
    model.check_contents()


def test_a_row_that_was_the_last_one_comes_back() -> None:
    model = Model(6, 384, 40)
    for id in (list(model.rows)[-1], next(iter(model.rows))):
        model.drop([id])
        model.put(some_vectors(1, seed=2), [id])
        assert model.matrix.size == len(model.rows)
        model.check(some_vectors(1, seed=9)[0], 10)


def test_contents_that_another_thread_has_let_go_of_are_not_known() -> None:
    model, query = Model(6, 384, 40), some_vectors(1, seed=9)[0]
    model.learn(list(model.rows))
    ranked = model.matrix.rank(query, 40)
    assert ranked is not None
    plain = [row.metadata for row in ranked if row.metadata == b"\x01{}"]
    assert plain and all(metadata is _matrix._NO_METADATA for metadata in plain), "held once"
    since = model.matrix.hold_contents()
    model.matrix.release_contents()
    assert model.matrix.contents_size == 0
    assert model.matrix.find_outdated(ranked[0].id.bytes + bytes(8)) == model.matrix.find_unknown() == []
    assert model.matrix.find_gone(b"", since) == []
    model.matrix.put_contents(ranked[0].id, model.make_contents(ranked[0].id))
    assert model.matrix.rank(query, 10) is None


def test_how_many_match_is_between_bounds_that_are_included() -> None:
    model, query = Model(6, 384, 40), some_vectors(1, seed=9)[0]
    here = {"room_id": model.rooms[1]}
    for number, filters in ((40, {}), (sum(row[0] == model.rooms[1] for row in model.rows.values()), here)):
        for least, most, suits in (
            (0, number, True),
            (number, 99, True),
            (number + 1, 99, False),
            (0, number - 1, False),
        ):
            assert model.matrix.suits(least, most, **filters) is suits
            assert (model.matrix.search(query, 5, least=least, most=most, **filters) is not None) is suits


def test_the_footprint_is_about_the_estimate() -> None:
    for dimension, size in ((384, 3000), (1536, 500)):
        model = Model(1, dimension, size)
        assert 0.7 < model.matrix.footprint / Matrix.estimate(dimension, size) < 1.5
        assert model.matrix.footprint > sum(column.nbytes for column in model.matrix._columns())
        before, of_contents = model.matrix.footprint, model.matrix.contents_size
        model.matrix.release_contents()
        assert before - model.matrix.footprint == of_contents > 0


def test_the_footprint_grows_with_rooms() -> None:
    [vector] = some_vectors(1)
    sizes = []
    for rooms in ([None] * 200, [uuid4() for _ in range(200)]):
        matrix = Matrix(384)
        matrix.put(as_sent((uuid4(), room, None, None, False, vector) for room in rooms))
        sizes.append(matrix.footprint)
    assert sizes[1] - sizes[0] > 100 * 200, "an id, an object, and their places in a list and a dictionary"


def _stands_on_large_pages(address: int) -> bool:
    """Tell whether the kernel was asked for large pages there; not every kernel says so."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    return False


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="the kernel has no large pages to ask for")
def test_what_a_search_reads_stands_on_large_pages() -> None:
    with mmap.mmap(-1, 4 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as asked:
        try:
            asked.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pytest.skip("the kernel has no large pages")
        view = np.frombuffer(asked, np.uint8)
        told = _stands_on_large_pages(view.ctypes.data + 4096)
        del view
    if not told:
        pytest.skip("the kernel does not say where large pages are asked for")
    matrix = Matrix(384, 10_000)
    # All of the bytes: numpy would ask for them from 4 MB on alone, which these are not.
    assert matrix._levels.nbytes < 4 << 20
    assert _stands_on_large_pages(matrix._levels.ctypes.data + 4096)
    assert _stands_on_large_pages(matrix._levels.ctypes.data + matrix._levels.nbytes - 4097)
    assert not matrix._levels.any()


@pytest.mark.slow
def test_without_large_pages_all_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", refuse)
    model = Model(3, 384, 6000)
    assert model.matrix._levels.nbytes > _matrix._LARGE_PAGE
    model.put(some_vectors(2000))
    model.check(some_vectors(1, seed=9)[0], 10)


def test_one_coarse_vector_does_not_make_all_be_read_in_full() -> None:
    """Its bytes leave out much more than those of others: no more than its own score is in doubt for that."""
    model, query = Model(4, 384, 2000), some_vectors(1, seed=9)[0]
    [_, before, _] = model.matrix._contenders(query, None, 10, -math.inf)
    coarse = np.full((2, 384), 0.49 / 127, np.float32)  # all but one are rounded to nothing
    coarse[:, 0] = 1.0
    model.put(coarse)
    [_, after, _] = model.matrix._contenders(query, None, 10, -math.inf)
    assert 10 <= len(before) <= len(after) <= len(before) + 2 < 200
    model.check(query, 10)


def test_the_bytes_bound_the_scores_from_both_sides() -> None:
    """Also where all that rounding leaves out of the one points to where the other does, or away from there."""
    exact, rounded = np.full(384, 100, np.float32), np.full(384, 1.49, np.float32)
    exact[0] = rounded[0] = 127
    matrix = Matrix(384)
    rows = np.array([exact, -exact, rounded, -rounded, *some_vectors(200)])
    matrix.put(as_sent((uuid4(), None, None, None, False, row) for row in rows))
    for query, furthest in ((exact, 2), (rounded, 0), (some_vectors(1, seed=9)[0], None)):
        asked = query / np.linalg.norm(query)
        middles, spreads = matrix._approximate(asked, None)
        off = np.abs(matrix._vectors[: matrix.size].astype(float) @ asked.astype(float) - middles)
        assert (off <= spreads).all()
        assert furthest is None or off[furthest] > 0.9 * spreads[furthest]


def test_the_footprint_of_contents_is_that_of_their_objects() -> None:
    content, metadata, time = b"\x01" + bytes(300), b'\x01{"a": 1}', datetime.now(timezone.utc)
    own = sys.getsizeof(content) + sys.getsizeof(time)
    assert _matrix.size_of(content, b"\x01{}") == pytest.approx(own, abs=16)
    assert _matrix.size_of(content, metadata) == pytest.approx(own + sys.getsizeof(metadata), abs=16)


# --- equal to an exact search in the database ------------------------------------------------------------------------


async def test_equal_to_an_exact_search(mind: Mind) -> None:
    await mind.remember(some_vectors(300))
    await mind.remember(some_vectors(40, seed=1), "facts")

    @settings(max_examples=80, database=None)
    @given(
        seed=st.integers(0, 40),
        count=st.sampled_from([1, 2, 3, 10, 50, 299, 300, 301, 5000]),
        room=st.sampled_from([None, *mind.rooms, "elsewhere"]),
        world=st.sampled_from([None, None, *mind.worlds]),
        entity=st.sampled_from([None, None, *mind.entities]),
        unique=st.booleans(),
        threshold=st.none() | st.floats(-1, 1),
        edge=st.none() | st.integers(0, 20),
    )
    def drawn(**values: Any) -> None:
        examples.append(values)

    examples: list[dict[str, Any]] = []
    drawn()
    assert len(examples) > 40
    for values in examples:
        # Half of the questions are memories themselves, some of which are there twice.
        query = some_vectors(300)[values["seed"]] if values["seed"] < 20 else some_vectors(1, seed=values["seed"])[0]
        options = {
            "count": values["count"],
            "room_id": uuid4() if values["room"] == "elsewhere" else values["room"],
            "world_id": values["world"],
            "entity_id": values["entity"],
            "unique": values["unique"],
        }
        everything = await mind.exact(query, **options)
        threshold = values["threshold"]
        if values["edge"] is not None and values["edge"] < len(everything):
            threshold = everything[values["edge"]][1]  # exactly that of a row
        await mind.check(query, **options, match_threshold=threshold)
        await mind.check(query, **options, match_threshold=threshold, table_name="facts")
    assert mind.resident.stats.misses == 0


async def test_equal_vectors_are_ordered_by_id(mind: Mind) -> None:
    vectors = some_vectors(30)
    same = await mind.remember([vectors[0]] * 40 + [vectors[0] * 3] * 10)
    await mind.remember(vectors[1:])
    found = await mind.check(vectors[0], count=30)
    assert [id for id, _ in found] == sorted(same)[:30]
    await mind.check(vectors[0], count=30, match_threshold=1.0)
    await mind.check(-vectors[0], count=79)
    assert await mind.check(vectors[0], room_id=mind.rooms[0], count=3)


async def test_equal_directions_are_ordered_as_in_the_database(mind: Mind) -> None:
    """Of vectors that differ in length alone the server's sums are not quite the same."""
    vectors = np.zeros((80, 384), np.float32)
    for i, vector in enumerate(vectors):
        vector[i // 8 * 4 : i // 8 * 4 + 4] = (1, 3, 5, 7, 9, 10, 11, 13)[i % 8]
    await mind.remember(vectors)
    for query in np.random.default_rng(1).normal(size=(10, 384)).astype(np.float32):
        await mind.check(query, count=11)


async def test_the_fields_of_a_memory(mind: Mind) -> None:
    vectors = some_vectors(20)
    await mind.remember(vectors)
    for include in (False, True):
        wanted = await mind.writer.search_memories(embedding=vectors[3], table_name=TABLE, include_embedding=include)
        found = await mind.db.search_memories(embedding=vectors[3], table_name=TABLE, include_embedding=include)
        assert [m.similarity for m in found] == [Score(m.similarity) for m in wanted] and len(found) == 10
        assert [replace(m, similarity=None) for m in found] == [replace(m, similarity=None) for m in wanted]
        assert all((memory.embedding is not None) == include for memory in found)
    assert mind.resident.stats.hits == 2
    assert await mind.search(vectors[0], count=0) == []


@pytest.mark.parametrize("dimension", [512, 3072])
async def test_other_dimensions(make_db: MakeAdapter, dimension: int) -> None:
    writer = await make_db(dimension=dimension)
    db = await make_db(writer.agent_id, dimension=dimension, **RESIDENT)
    vectors = some_vectors(60, dimension=dimension)
    await writer.create_memories([Memory(content={}, embedding=vector, unique=True) for vector in vectors], TABLE)
    for query in some_vectors(5, seed=9, dimension=dimension):
        options = {"embedding": query, "table_name": TABLE, "count": 20}
        found, wanted = await db.search_memories(**options), await writer.search_memories(**options)
        assert [(m.id, m.similarity) for m in found] == [(m.id, Score(m.similarity)) for m in wanted]
    await writer.create_memory(Memory(content={}, embedding=vectors[0] * 2, unique=True), TABLE)
    assert len(await db.search_memories(embedding=vectors[0], table_name=TABLE, match_threshold=0.9999)) >= 2
    assert db._resident.stats.hits == 6


async def test_an_agent_without_memories(mind: Mind) -> None:
    vector = some_vectors(1)[0]
    assert await mind.check(vector) == []
    (id,) = await mind.remember([vector])
    assert [hit for hit, _ in await mind.check(vector)] == [id]


async def test_agents_do_not_mix(mind: Mind, make_db: MakeAdapter) -> None:
    vectors = some_vectors(50)
    await mind.remember(vectors)
    other = await make_db(**RESIDENT)
    ids = await other.create_memories(
        [Memory(id=id, content={}, embedding=vectors[0], unique=True) for id in mind.ids[:9]], TABLE
    )
    hits = await other.search_memories(embedding=vectors[0], table_name=TABLE, count=50)
    assert [hit.id for hit in hits] == sorted(ids) and {hit.agent_id for hit in hits} == {other.agent_id}
    await mind.check(vectors[0], count=50)


async def test_agents_with_the_same_ids_hold_contents_of_their_own(mind: Mind, make_db: MakeAdapter) -> None:
    """What is listed, what is read of it, what a check tells of, and what is gone: each by the agent, not by the id."""
    writer = await make_db(await neighbour_of(mind.db.agent_id, mind.raw))
    minds = [mind, Mind(await make_db(writer.agent_id, **RESIDENT), writer, mind.raw)]
    query = some_vectors(1, seed=8)[0]

    async def remember(ids: list[UUID], seed: int) -> None:
        for each in minds:
            memories = [
                Memory(id=id, content={"of": str(each.db.agent_id)}, embedding=vector, unique=True)
                for id, vector in zip(ids, some_vectors(len(ids), seed=seed), strict=True)
            ]
            await each.writer.create_memories(memories, TABLE)
            seed += 1

    async def check() -> None:
        for each in minds:
            checks = each.resident.stats.checks
            await each.check(query, count=30)
            assert each.resident.stats.checks == checks + 1, "answered from what is held"

    ids = [uuid4() for _ in range(50)]
    await remember(ids, 1)
    for each in minds:
        await each.check(query)
        await each.renew()
    await check()
    await remember([uuid4() for _ in range(5)], 11)
    await check()
    for each, doomed in zip(minds, (ids[:10], ids[10:20]), strict=True):
        await each.writer.delete_memories(doomed)
    for each in minds:
        await each.renew()
    await check()


# --- whoever writes --------------------------------------------------------------------------------------------------


async def changes(mind: Mind) -> AsyncIterator[str]:
    """Change the memories in every way that there is; the name of what was done is given after each."""
    writer, raw, agent = mind.writer, mind.raw, mind.writer.agent_id
    new = some_vectors(40, seed=77)
    await writer.create_memory(Memory(content={}, embedding=new[0], unique=True, room_id=mind.rooms[0]), TABLE)
    yield "create_memory"
    await writer.create_memory(Memory(content={}, embedding=new[1]), TABLE)
    yield "create_memory, near-duplicates looked for"
    await mind.remember(new[2:8])
    yield "create_memories"
    await writer.load_memories([Memory(content={}, embedding=v) for v in new[20:30]], TABLE, batch_size=4)
    yield "load_memories"
    bare = await writer.create_memory(Memory(content={}), TABLE)
    yield "create_memory without an embedding"
    await writer.update_memory({"id": bare, "embedding": new[9]})
    yield "update_memory gives one its first embedding"
    await writer.update_memory({"id": mind.ids[3], "embedding": new[10]})
    yield "update_memory, embedding"
    await writer.update_memory({"id": mind.ids[4], "content": {"new": 1}})
    yield "update_memory, content"
    await writer.update_memories([{"id": id, "room_id": mind.rooms[1]} for id in mind.ids[5:9]])
    yield "update_memories, room"
    await writer.update_memory({"id": mind.ids[6], "entity_id": mind.entities[1], "world_id": mind.worlds[1]})
    yield "update_memory, entity and world"
    await writer.update_memory({"id": mind.ids[9], "unique": False})
    yield "update_memory, unique"
    await writer.upsert_memories([Memory(id=mind.ids[10], content={}, embedding=new[11], unique=False)], TABLE)
    yield "upsert_memories of one that is there"
    await writer.upsert_memories([Memory(id=uuid4(), content={}, embedding=new[12], room_id=mind.rooms[0])], TABLE)
    yield "upsert_memories of a new one"
    await writer.delete_memory(mind.ids[11])
    yield "delete_memory"
    await writer.create_memory(Memory(id=mind.ids[11], content={}, embedding=new[13], unique=True), TABLE)
    yield "create_memory under the id of one that was deleted"
    await writer.delete_memories(mind.ids[12:16])
    yield "delete_memories"
    await writer.index_memories()
    yield "index_memories"
    await writer.index_memories(rebuild=True)
    yield "index_memories, rebuild"
    await writer.remove_world(mind.worlds[0])
    yield "remove_world: the world of its memories is cleared"
    await writer.delete_entity(mind.entities[2])
    yield "delete_entity: its memories go"
    await writer.delete_room(mind.rooms[3])
    yield "delete_room: its memories go"
    await writer.delete_all_memories(mind.rooms[2], TABLE)
    yield "delete_all_memories"
    async with writer.transaction() as tx:
        await tx.create_memory(Memory(content={}, embedding=new[14], unique=True), TABLE)
        async with tx.transaction() as inner:
            await inner.create_memory(Memory(content={}, embedding=new[15], unique=True), TABLE)
        await tx.delete_memory(mind.ids[16])
    yield "transaction with a savepoint"
    await raw.execute(
        "UPDATE elizasql.memories SET room_id = $2 WHERE agent_id = $1 AND room_id = $3",
        agent,
        mind.rooms[1],
        mind.rooms[0],
    )
    yield "SQL: room of the memories"
    await raw.execute(
        "UPDATE elizasql.memories SET type = 'facts' WHERE agent_id = $1 AND id = ANY($2)", agent, mind.ids[20:25]
    )
    yield "SQL: type of the memories"
    await raw.execute(
        "UPDATE elizasql.embeddings SET dim_384 = $3 WHERE agent_id = $1 AND memory_id = ANY($2)",
        *(agent, mind.ids[30:33], _codecs.encode_vector(new[16])),
    )
    yield "SQL: vectors"
    await raw.execute('UPDATE elizasql.memories SET "unique" = NOT "unique" WHERE agent_id = $1', agent)
    await raw.execute("UPDATE elizasql.embeddings SET xid = '3' WHERE agent_id = $1", agent)
    yield "SQL: unique of the memories, and another number at the embeddings"
    await raw.execute(
        "DELETE FROM elizasql.embeddings WHERE agent_id = $1 AND memory_id = ANY($2)", agent, mind.ids[33:36]
    )
    yield "SQL: vectors deleted"
    await raw.execute(
        """
        INSERT INTO elizasql.embeddings
            (agent_id, memory_id, type, room_id, world_id, entity_id, "unique", dimension, xid, dim_384)
        SELECT agent_id, id, type, room_id, world_id, entity_id, "unique", 384, '3', $3
        FROM elizasql.memories WHERE agent_id = $1 AND id = ANY($2)
        """,
        *(agent, mind.ids[33:36], _codecs.encode_vector(new[17])),
    )
    yield "SQL: vectors inserted with an old number, as a restore does"
    assert await writer.prune_memories(TABLE, keep=10, room_id=mind.rooms[1]) > 0
    yield "prune_memories of a room"
    assert await writer.prune_memories(TABLE, keep=40) > 0
    yield "prune_memories"


async def test_every_change_is_seen_at_once(mind: Mind) -> None:
    vectors = some_vectors(150)
    await mind.remember(vectors)
    await mind.remember(some_vectors(20, seed=2), "facts")
    queries = [*some_vectors(3, seed=5), *some_vectors(40, seed=77)[[0, 5, 10, 13, 16, 17]], vectors[3]]

    async def check() -> None:
        for number, query in enumerate(queries):
            await mind.check(query, count=(10, 40)[number % 2])
            await mind.check(query, room_id=mind.rooms[number % 4])
            await mind.check(query, unique=True, world_id=mind.worlds[number % 2])
            await mind.check(query, table_name="facts", match_threshold=0.2)
        await mind.check(queries[0], count=1000)

    await check()
    async for done in changes(mind):
        try:
            await check()
        except AssertionError as error:
            raise AssertionError(f"after: {done}") from error
    stats = mind.resident.stats
    assert stats.loads == 2 and stats.deltas > 10


async def test_an_agent_that_is_created_anew(mind: Mind) -> None:
    """What was noted of the agent went with it, and nothing else tells that its memories are gone."""
    await mind.remember(some_vectors(40))
    await mind.remember(some_vectors(40, seed=1), "facts")
    query = some_vectors(1, seed=8)[0]
    await mind.check(query)
    await mind.check(query, table_name="facts")
    agent = await mind.writer.get_agent(mind.db.agent_id)
    assert agent is not None
    await mind.writer.delete_agent(mind.db.agent_id)
    noted = "SELECT count(*) FROM elizasql.memory_rewrites WHERE agent_id = $1"
    assert await mind.raw.fetchval(noted, mind.db.agent_id) == 0
    await mind.writer.create_agent(agent)
    await mind.writer.ensure_embedding_dimension(384)
    assert await mind.search(query) == []
    assert await mind.search(query, table_name="facts") == []
    await mind.furnish()
    await mind.remember(some_vectors(30, seed=2))
    await mind.check(query)
    async with mind.raw.transaction():
        await mind.raw.execute("CREATE TEMPORARY TABLE kept ON COMMIT DROP AS SELECT * FROM elizasql.agents")
        await mind.raw.execute("DELETE FROM elizasql.agents WHERE id = $1", mind.db.agent_id)
        await mind.raw.execute("INSERT INTO elizasql.agents SELECT * FROM kept WHERE id = $1", mind.db.agent_id)
    assert await mind.search(query) == []


async def test_a_vector_that_comes_before_its_memory(mind: Mind, dsn: str) -> None:
    """Tables are replicated one by one: the vector is there, and the memory is not yet."""
    await mind.remember(some_vectors(40))
    query = some_vectors(1, seed=8)[0]
    before = await mind.check(query)
    id, admin = uuid4(), await asyncpg.connect(dsn.replace("//elizasql@", "//postgres@"))
    await admin.execute("SET session_replication_role = replica")
    await _codecs.register(admin, "public")
    await admin.execute(
        """
        INSERT INTO elizasql.embeddings (agent_id, memory_id, type, "unique", dimension, dim_384)
        VALUES ($1, $2, $3, TRUE, 384, $4)
        """,
        *(mind.db.agent_id, id, TABLE, _codecs.encode_vector(query)),
    )
    # The vector takes a place among those asked for, as in the database.
    assert [id for id, _ in await mind.search(query)] == [id for id, _ in before[:9]]
    mind.tier.renew_at = 0.0
    mind.resident._begin_renewal(mind.tier, TABLE)
    assert mind.tier.loading is not None
    await mind.tier.loading
    assert [id for id, _ in await mind.search(query)] == [id for id, _ in before[:9]]
    await admin.execute(
        "INSERT INTO elizasql.memories (agent_id, id, type, content) VALUES ($1, $2, $3, '{}')",
        *(mind.db.agent_id, id, TABLE),
    )
    await admin.close()
    assert (await mind.check(query))[0][0] == id
    await mind.renew()
    assert (await mind.check(query))[0][0] == id


async def test_the_numbers_of_another_server_are_not_taken(mind: Mind, dsn: str) -> None:
    """Whatever is published: what is replicated is noted here, and one of theirs that is the same does no harm."""
    await mind.remember(some_vectors(40))
    query = some_vectors(1, seed=8)[0]
    ids = [id for id, _ in await mind.check(query)]
    admin = await asyncpg.connect(dsn.replace("//elizasql@", "//postgres@"))
    await admin.execute("SET session_replication_role = replica")
    async with admin.transaction():
        await admin.execute(
            "UPDATE elizasql.memories SET content = '{}' WHERE agent_id = $1 AND id = $2", mind.db.agent_id, ids[0]
        )
        await admin.execute(
            "UPDATE elizasql.memory_rewrites SET xid = '9223372036854775808' WHERE agent_id = $1", mind.db.agent_id
        )
        await admin.execute("INSERT INTO elizasql.memory_rewrites VALUES ($1, $2, '1')", mind.db.agent_id, TABLE)
        await admin.execute("DELETE FROM elizasql.memory_rewrites WHERE agent_id = $1", mind.db.agent_id)
        versions = await admin.execute("DELETE FROM elizasql.schema_migrations")
    await admin.close()
    assert versions == "DELETE 0"
    assert [id for id, _ in await mind.check(query)] == ids
    assert await rewrites(mind) == 1


async def test_one_round_trip(mind: Mind, round_trips: list[str]) -> None:
    vectors = some_vectors(120)
    await mind.remember(vectors)
    query = some_vectors(1, seed=8)[0]
    await mind.search(query)

    async def trips(**options: Any) -> int:
        round_trips.clear()
        found = await mind.search(query, **options)
        sent = len(round_trips)
        assert found == await mind.exact(query, **options)
        return sent

    for options in ({}, {"room_id": mind.rooms[0]}, {"unique": True}, {"count": 50}, {"match_threshold": 0.9}):
        assert await trips(**options) == 1
    # Nothing that an index does is a change.
    await mind.writer.index_memories()
    assert await trips() == 1 and mind.resident.stats.changes == 0
    # A few changes come along with the answer, which has them already.
    await mind.remember([query, query])
    assert await trips() == 1 and mind.resident.stats.changes == 2
    assert await trips() == 1 and mind.resident.stats.changes == 2
    assert mind.resident.stats.checks == mind.resident.stats.hits
    # After an update the server fetches the rows, until the contents have been brought up to date.
    mind.tier.renew_at = math.inf
    await mind.writer.update_memory({"id": mind.ids[0], "room_id": mind.rooms[1]})
    assert await trips(room_id=mind.rooms[1]) == 2 and mind.resident.stats.changes == 3
    assert await trips(room_id=mind.rooms[1]) == 1
    # The spare candidates stand in for what was deleted.
    nearest = [id for id, _ in await mind.search(query)]
    await mind.writer.delete_memories(nearest[:3])
    assert await trips() == 1
    assert await trips() == 1
    checks = mind.resident.stats.checks
    await mind.renew()
    assert await trips() == 1 and mind.resident.stats.checks == checks + 1
    await mind.writer.delete_memory(nearest[3])
    assert await trips() == 2
    await mind.renew()
    # Many changes are read first.
    await mind.remember(some_vectors(64, seed=3))
    assert await trips() == 1
    await mind.remember(some_vectors(65, seed=4))
    assert await trips() == 3
    assert await trips() == 1
    assert mind.resident.stats.changes == 3 + 64 + 65


async def test_many_changes_where_the_server_fetches_the_rows(mind: Mind) -> None:
    """No more of them come with the rows than are asked for: they are read before anything counts as seen."""
    await mind.remember(some_vectors(60))
    query = some_vectors(1, seed=8)[0]
    await mind.check(query)
    for number in (64, 65, 130):
        await mind.remember(some_vectors(number, seed=number))
        assert await mind.search(query, include_embedding=True, count=200) == await mind.exact(query, count=200)
        await mind.check(query, count=300)
    assert mind.resident.stats.changes == 64 + 65 + 130


async def test_rows_are_ranked_while_the_server_looks(
    mind: Mind, round_trips: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    await mind.remember(some_vectors(60))
    query = some_vectors(1, seed=8)[0]
    await mind.check(query)
    rank, sent = Matrix.rank, []

    def note(matrix: Matrix, *args: Any, **options: Any) -> Any:
        sent.append(len(round_trips))
        return rank(matrix, *args, **options)

    monkeypatch.setattr(Matrix, "rank", note)
    round_trips.clear()
    await mind.search(query)
    assert sent == [1]
    # What it told of changes the last time it may tell again: the rows would be ranked in vain.
    for _ in range(2):
        await mind.remember([query])
        round_trips.clear()
        await mind.search(query)
    assert len(round_trips) == 1 and len(sent) == 4


async def test_searches_at_once_take_a_round_trip_each(mind: Mind, round_trips: list[str]) -> None:
    """Also when all of them are told of the same changes, which the first merges."""
    await mind.remember(some_vectors(60))
    query = some_vectors(1, seed=8)[0]
    await mind.check(query)
    for _ in range(3):
        await mind.remember([query * 1.1])
        round_trips.clear()
        found = await asyncio.gather(*(mind.search(query) for _ in range(8)))
        assert sum("pg_current_snapshot" in sent for sent in round_trips) == 8  # others open connections
        assert all(each == found[0] for each in found) and found[0] == await mind.exact(query)


async def test_the_nearest_are_gone(mind: Mind) -> None:
    vectors = some_vectors(400)
    await mind.remember(vectors)
    query = some_vectors(1, seed=8)[0]
    nearest = [id for id, _ in await mind.check(query, count=300)]
    await mind.writer.delete_memories(nearest)
    await mind.check(query)
    assert mind.tier.matrix is not None and mind.tier.matrix.size == 400 - mind.tier.dropped < 400
    assert 0 < mind.resident.stats.repeats < 6
    for _ in range(3):
        await mind.check(query, count=30)
    await mind.writer.delete_memories(mind.ids)
    assert await mind.check(query, count=50) == []


async def test_the_nearest_have_moved_away(mind: Mind) -> None:
    """All are there that were to be fetched, and others are nearer now."""
    await mind.remember(some_vectors(200))
    query = some_vectors(1, seed=8)[0]
    for _ in range(2):
        nearest = [id for id, _ in await mind.check(query)]
        await mind.writer.update_memories([{"id": id, "embedding": -query} for id in nearest])
    await mind.check(query)


async def test_another_type_is_no_change(mind: Mind, round_trips: list[str]) -> None:
    await mind.remember(some_vectors(50))
    query = some_vectors(1, seed=8)[0]
    await mind.check(query)
    await mind.remember(some_vectors(200, seed=1), "facts")
    round_trips.clear()
    await mind.search(query)
    assert len(round_trips) == 1 and mind.resident.stats.changes == 0


# --- transactions of others ------------------------------------------------------------------------------------------


async def test_a_transaction_that_stays_open(mind: Mind, dsn: str) -> None:
    """It holds back the xmin of every snapshot; what is written beside it is read once all the same."""
    await mind.remember(some_vectors(50))
    query = some_vectors(1, seed=8)[0]
    foreign = await asyncpg.connect(dsn)
    transaction = foreign.transaction()
    await transaction.start()
    await foreign.fetchval("SELECT pg_current_xact_id()")
    await mind.check(query)
    changes = mind.resident.stats.changes
    for number in range(1, 6):
        await mind.remember(some_vectors(10, seed=number))
        for _ in range(3):
            await mind.check(query)
            assert mind.resident.stats.changes == changes + 10 * number
    await transaction.rollback()
    await mind.check(query)
    assert mind.resident.stats.changes == changes + 50
    await foreign.close()


async def test_a_transaction_that_ends_late(mind: Mind, make_db: MakeAdapter) -> None:
    """What it wrote is older than what others committed long ago, and new all the same."""
    await mind.remember(some_vectors(50))
    query = some_vectors(1, seed=8)[0]
    slow = await make_db(mind.db.agent_id)
    await mind.check(query)
    async with slow.transaction() as tx:
        mine = await tx.create_memory(Memory(content={}, embedding=query, unique=True), TABLE)
        async with tx.transaction() as inner:  # a transaction in it has a number of its own
            await inner.update_memory({"id": mind.ids[5], "embedding": query * 2})
        with pytest.raises(ZeroDivisionError):
            async with tx.transaction() as inner:
                await inner.update_memory({"id": mind.ids[6], "embedding": query * 3})
                raise ZeroDivisionError
        for number in range(3):
            await mind.remember(some_vectors(10, seed=number + 1))
            assert mine not in dict(await mind.check(query))
    found = dict(await mind.check(query))
    assert mine in found and mind.ids[5] in found and mind.ids[6] not in found
    changes = mind.resident.stats.changes
    await mind.check(query)
    assert mind.resident.stats.changes == changes


async def test_one_that_leaves_the_type_while_contents_are_read(mind: Mind, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search has seen it there before the list was made, and merges it after: nothing else tells that it left."""
    await mind.remember(some_vectors(40))
    query = some_vectors(1, seed=8)[0]
    await mind.check(query)
    (id,) = await mind.remember([query])
    mind.tier.behind, mind.tier.renew_at = True, math.inf
    fetched, merged = asyncio.Event(), asyncio.Event()
    fetch, fetch_row = mind.db._executor.fetch, mind.resident._executor.fetch_row

    async def arrive_late(statement: Any, **params: Any) -> Any:
        rows = await fetch(statement, **params)
        fetched.set()
        await merged.wait()
        return rows

    async def merge_first(statement: Any, **params: Any) -> Any:
        row = await fetch_row(statement, **params)
        merged.set()
        await searching
        return row

    monkeypatch.setattr(mind.db._executor, "fetch", arrive_late)
    searching = asyncio.ensure_future(mind.search(query))
    await fetched.wait()
    await mind.raw.execute(
        "UPDATE elizasql.memories SET type = 'facts' WHERE agent_id = $1 AND id = $2", mind.db.agent_id, id
    )
    monkeypatch.setattr(mind.resident._executor, "fetch_row", merge_first)
    mind.tier.renew_at = 0.0
    mind.resident._begin_renewal(mind.tier, TABLE)
    assert mind.tier.loading is not None
    await mind.tier.loading
    monkeypatch.undo()
    assert (await searching)[0][0] == id
    await mind.check(query)
    await mind.renew()
    await mind.check(query)


async def test_of_a_change_that_another_search_has_met_no_half_is_given(
    mind: Mind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two memories are deleted together, and one is found to be gone before an earlier answer is looked at."""
    axes = np.eye(40, 384, dtype=np.float32)
    gone = [axes[0] + 0.1 * axes[39], axes[1]]
    await mind.remember([*gone, *(axes[0] + (0.5 + 0.1 * i) * axes[2 + i] for i in range(10))])
    deleted, query, near = mind.ids[:2], axes[0] + axes[1], axes[0]
    assert set(deleted) < {id for id, _ in await mind.check(query, count=40)}
    await mind.remember([axes[0] + 5 * axes[20]])
    fetch, fetched, go_on = mind.db._executor.fetch, asyncio.Event(), asyncio.Event()

    async def arrive_late(statement: Any, **params: Any) -> Any:
        rows = await fetch(statement, **params)
        if not fetched.is_set():
            fetched.set()
            await go_on.wait()
        return rows

    with monkeypatch.context() as patch:
        patch.setattr(mind.db._executor, "fetch", arrive_late)
        searching = asyncio.ensure_future(mind.search(query, count=40))
        await fetched.wait()
        before = await mind.check(query, count=40)  # which has merged the one that is new
        await mind.writer.delete_memories(deleted)
        await mind.search(near, count=1, include_embedding=True)
        matrix = mind.tier.matrix
        assert matrix is not None and matrix.size == 12, "it has found one of the two to be gone"
        go_on.set()
        assert await searching in (before, await mind.exact(query, count=40))


async def test_a_search_that_is_cut_leaves_nothing_behind(mind: Mind) -> None:
    """At each point at which it waits, also while it reads what has changed; and the next one is right."""
    await mind.remember(some_vectors(60))
    query = some_vectors(1, seed=8)[0]
    position, reached = 0, [0]
    while reached[0] >= position:
        await mind.check(query)
        await mind.renew()
        mind.tier.renew_at = math.inf
        await mind.remember(some_vectors(70, seed=position))
        tasks, reached, position = asyncio.all_tasks(), [0], position + 1
        search = mind.db.search_memories(embedding=query, table_name=TABLE)
        running = asyncio.ensure_future(_stepped(search, cancel("with the answer", position, reached)))
        await asyncio.wait({running})
        assert running.cancelled() or not running.exception()
        await assert_nothing_is_left(mind.db, tasks)
        assert mind.tier.catching_up is None
    assert position > 3


async def test_serializable_transactions_do_not_meet(mind: Mind, dsn: str) -> None:
    """None reads what another has noted, so that memories of one agent can be changed side by side."""
    sessions = [await asyncpg.connect(dsn) for _ in range(3)]
    transactions = [session.transaction(isolation="serializable") for session in sessions]
    for transaction in transactions:
        await transaction.start()
    for session in sessions:
        await session.execute("SELECT elizasql.note_rewrite($1, $2)", mind.db.agent_id, TABLE)
    for transaction in reversed(transactions):
        await transaction.commit()
    for session in sessions:
        await session.close()
    assert await rewrites(mind) == 3


async def test_notes_do_not_pile_up(mind: Mind, dsn: str) -> None:
    """Those of transactions that may not look at others' are taken away by the ones that may, which wait for nobody."""
    await mind.remember(some_vectors(3))
    update = "UPDATE elizasql.memories SET content = '{}' WHERE agent_id = $1 AND id = $2"
    noted = "SELECT count(*) FROM elizasql.memory_rewrites WHERE agent_id = $1 AND type = $2"
    for _ in range(20):
        async with mind.raw.transaction(isolation="repeatable_read"):
            await mind.raw.execute(update, mind.db.agent_id, mind.ids[0])
    assert await mind.raw.fetchval(noted, mind.db.agent_id, TABLE) == 20
    other = await asyncpg.connect(dsn)
    async with other.transaction():
        await other.execute(update, mind.db.agent_id, mind.ids[2])  # it has taken over one of them
        for _ in range(1000):  # each takes a number, and others may take one in between
            await mind.raw.execute(update, mind.db.agent_id, mind.ids[1])
            left = await mind.raw.fetchval(noted, mind.db.agent_id, TABLE)
            assert left > 1, "neither its own nor the other one's is taken away"
            if left == 2:
                break
        else:
            raise AssertionError("nothing was taken away")
    await other.close()


async def test_a_transaction_is_noted_once(mind: Mind) -> None:
    """Also where it forgets that it has, as one that applies what is replicated does behind each row."""
    await mind.remember(some_vectors(3))
    update = "UPDATE elizasql.memories SET content = '{}' WHERE agent_id = $1 AND id = $2"
    noted = "SELECT ctid FROM elizasql.memory_rewrites WHERE agent_id = $1 AND type = $2"
    async with mind.raw.transaction():
        await mind.raw.execute(update, mind.db.agent_id, mind.ids[0])
        place = await mind.raw.fetchval(noted, mind.db.agent_id, TABLE)
        await mind.raw.execute("SET LOCAL elizasql.noted = ''")
        await mind.raw.execute(update, mind.db.agent_id, mind.ids[1])
        assert await mind.raw.fetchval(noted, mind.db.agent_id, TABLE) == place


async def test_what_a_savepoint_undid_is_noted_again(mind: Mind) -> None:
    await mind.remember(some_vectors(40))
    query = some_vectors(1, seed=8)[0]
    ids = [id for id, _ in await mind.check(query)]
    async with mind.raw.transaction():
        savepoint = mind.raw.transaction()
        await savepoint.start()
        await mind.raw.execute(
            "DELETE FROM elizasql.memories WHERE agent_id = $1 AND id = $2", mind.db.agent_id, ids[0]
        )
        await savepoint.rollback()
        await mind.raw.execute(
            "DELETE FROM elizasql.memories WHERE agent_id = $1 AND id = $2", mind.db.agent_id, ids[1]
        )
    assert [id for id, _ in await mind.check(query)][:2] == [ids[0], ids[2]]


async def test_an_old_snapshot_does_not_slow_changes_down(
    mind: Mind, dsn: str, session: asyncpg.Connection[Any]
) -> None:
    """It keeps what each change has noted from being vacuumed; none looks through what the others have left."""
    await mind.remember(some_vectors(3))
    update = "UPDATE elizasql.memories SET content = '{}' WHERE agent_id = $1 AND id = $2"
    foreign = await asyncpg.connect(dsn)
    transaction = foreign.transaction(isolation="repeatable_read")
    await transaction.start()
    await foreign.fetchval("SELECT count(*) FROM elizasql.memory_rewrites")
    for _ in range(60):
        await session.execute(update, mind.db.agent_id, mind.ids[0])
    entries = "SELECT pg_stat_get_xact_tuples_returned('elizasql.memory_rewrites_idx'::regclass)"
    read = []
    for _ in range(2):  # one in a hundred transactions tidies up, and looks at everything
        async with session.transaction():
            before = await session.fetchval(entries)
            await session.execute(update, mind.db.agent_id, mind.ids[0])
            read.append(await session.fetchval(entries) - before)
    await transaction.rollback()
    await foreign.close()
    assert 0 < min(read) < 10


async def test_the_own_transaction_goes_to_the_database(mind: Mind) -> None:
    await mind.remember(some_vectors(50))
    query = some_vectors(1, seed=8)[0]
    await mind.check(query)
    before = mind.resident.snapshot()
    async with mind.db.transaction() as tx:
        id = await tx.create_memory(Memory(content={}, embedding=query, unique=True), TABLE)
        assert (await tx.search_memories(embedding=query, table_name=TABLE))[0].id == id
        assert id not in dict(await mind.check(query))
    after = mind.resident.snapshot()
    assert (after["hits"], after["misses"]) == (before["hits"] + 1, before["misses"])
    assert id in dict(await mind.check(query))


# --- loading ---------------------------------------------------------------------------------------------------------


async def test_loading_in_the_background(mind: Mind, make_db: MakeAdapter) -> None:
    await mind.remember(some_vectors(300))
    db = await make_db(mind.db.agent_id, resident="auto")
    query = some_vectors(1, seed=8)[0]
    resident, wanted = db._resident, await mind.exact(query)
    for number in range(_resident._LOAD_AFTER):
        assert resident.stats.misses == number and not resident._tasks
        hits = await db.search_memories(embedding=query, table_name=TABLE)
        assert [(hit.id, hit.similarity) for hit in hits] == wanted
    (task,) = resident._tasks
    await task
    hits = await db.search_memories(embedding=query, table_name=TABLE)
    assert [(hit.id, hit.similarity) for hit in hits] == wanted
    stats = resident.snapshot()
    assert (stats["hits"], stats["misses"], stats["loads"], stats["vectors"]) == (1, _resident._LOAD_AFTER, 1, 300)
    assert stats["bytes"] >= 300 * 384 * 4
    # A small scope is compared in the database just as well.
    options = {"count": 5, "room_id": mind.rooms[0]}
    hits = await db.search_memories(embedding=query, table_name=TABLE, **options)
    assert [(hit.id, hit.similarity) for hit in hits] == await mind.exact(query, **options)
    assert resident.stats.misses == _resident._LOAD_AFTER + 1


async def test_a_small_type_is_left_to_the_database(mind: Mind, make_db: MakeAdapter) -> None:
    await mind.remember(some_vectors(_resident._LEAST - 1))
    mind.db = await make_db(mind.db.agent_id, resident="auto")
    query = some_vectors(1, seed=8)[0]
    for _ in range(_resident._LOAD_AFTER):
        assert await mind.search(query) == await mind.exact(query)
    await asyncio.gather(*mind.resident._tasks)
    assert mind.tier.matrix is None and mind.tier.not_before > mind.tier.used
    await mind.remember(some_vectors(1))
    mind.tier.not_before = 0.0
    await mind.search(query)
    await asyncio.gather(*mind.resident._tasks)
    await mind.check(query)


async def test_a_small_room_takes_one_round_trip(mind: Mind, make_db: MakeAdapter, round_trips: list[str]) -> None:
    """It is known beforehand that the database is to be asked."""
    mind.db = await make_db(mind.db.agent_id, resident="auto")
    await mind.remember(some_vectors(300))
    query = some_vectors(1, seed=8)[0]
    for _ in range(_resident._LOAD_AFTER):
        await mind.search(query)
    assert mind.tier.loading is not None
    await mind.tier.loading
    round_trips.clear()
    await mind.search(query)
    assert mind.resident.stats.checks == 1
    await mind.search(query, room_id=mind.rooms[0])
    assert len(round_trips) == 2 and mind.resident.stats.hits == 1


async def test_writes_between_the_pages_of_a_load(
    mind: Mind, make_db: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_resident, "_PAGE_BYTES", 20 * 4 * 384)
    vectors = some_vectors(150)
    ending = asyncio.Event()

    async def end_late() -> None:
        """Write before everything else, and commit when the page that it belongs to has been read."""
        async with (await make_db(mind.db.agent_id)).transaction() as tx:
            await tx.create_memory(Memory(content={}, embedding=vectors[0], unique=True), TABLE)
            begun.set()
            await ending.wait()

    begun = asyncio.Event()
    late = asyncio.create_task(end_late())
    await begun.wait()
    for start in range(0, 150, 5):  # pages end with a transaction
        await mind.remember(vectors[start : start + 5])
    await mind.remember(some_vectors(70, seed=1))  # a page is as long as this one
    executor = mind.resident._executor
    fetch_row, pages = executor.fetch_row, 0

    async def fetch_and_write(statement: Any, **params: Any) -> Any:
        nonlocal pages
        page = await fetch_row(statement, **params)
        pages += 1
        if pages == 3:
            ending.set()
            await late
        await mind.writer.update_memory({"id": mind.ids[pages], "embedding": some_vectors(1, seed=100 + pages)[0]})
        await mind.writer.update_memory({"id": mind.ids[140 - pages], "room_id": mind.rooms[0]})
        await mind.writer.delete_memory(mind.ids[100 + pages])
        await mind.remember(some_vectors(1, seed=200 + pages))
        return page

    monkeypatch.setattr(executor, "fetch_row", fetch_and_write)
    for query in (vectors[0], *some_vectors(5, seed=8)):
        await mind.check(query, count=40)
        await mind.check(query, room_id=mind.rooms[0], count=40)
    assert pages > 8 and mind.resident.stats.loads == 1


async def test_two_adapters_share_a_tier(mind: Mind, make_db: MakeAdapter) -> None:
    await mind.remember(some_vectors(300))
    query = some_vectors(1, seed=8)[0]
    await mind.check(query)
    held = mind.resident.snapshot()["bytes"]
    second = await make_db(mind.db.agent_id, resident="auto")
    await mind.remember(some_vectors(1, seed=1))
    await second.search_memories(embedding=query, table_name=TABLE)
    stats = second._resident.snapshot()
    assert (stats["hits"], stats["loads"], stats["deltas"]) == (1, 0, 1)
    assert stats["bytes"] - held < 1000
    await second.close()
    await mind.db.close()
    third = await make_db(mind.db.agent_id, resident="auto")
    mind.db = third
    await mind.check(query)
    assert third._resident.stats.loads == 0 and third._resident.stats.changes == 0


async def test_tiers_go_with_their_loop(dsn: str) -> None:
    def other_loop() -> None:
        async def main() -> None:
            async with elizasql.connect(agent_id=uuid4(), dsn=dsn, **RESIDENT) as db:
                await db.ensure_agent_exists({"name": "x"})
                await db.ensure_embedding_dimension(384)
                vector = some_vectors(1)[0]
                await db.create_memory(Memory(content={}, embedding=vector, unique=True), TABLE)
                assert await db.search_memories(embedding=vector, table_name=TABLE)
                assert db._resident.snapshot()["bytes"] > before
                # Some searches wait for the one that reads what has changed.
                changes = [Memory(content={}, embedding=vector, unique=True) for vector in some_vectors(100)]
                for written in ([], changes):  # the first time for the connections
                    await db.create_memories(written, TABLE)
                    await asyncio.gather(*(db.search_memories(embedding=vector, table_name=TABLE) for _ in range(5)))
                assert db._resident.stats.deltas == 1

        asyncio.run(main())

    before = _resident._held()
    gc.disable()  # it comes when it comes
    try:
        await asyncio.to_thread(other_loop)
        assert _resident._held() == before
    finally:
        gc.enable()


def test_a_load_that_is_cut_with_its_loop_keeps_nothing() -> None:
    async def begin() -> None:
        tier = Tier()
        tier.loading = asyncio.get_running_loop().create_future()  # type: ignore[assignment]
        _resident._shelf()
        assert _resident._make_room(tier, 1 << 10, 1 << 40) == 0

    before = _resident._held()
    loop = asyncio.new_event_loop()
    loop.run_until_complete(begin())
    assert _resident._held() == before + (1 << 10)
    loop.close()
    assert _resident._held() == before
    gone = weakref.ref(loop)
    del loop
    gc.collect()
    assert gone() is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_begins_with_nothing() -> None:
    """What is held is the parent's, and the lock may be that of a thread which is not there any more."""
    program = """
import asyncio, os, signal, warnings
from elizasql import _resident

warnings.simplefilter("ignore", DeprecationWarning)  # of fork: there may be threads


async def hold():
    _resident._shelf()
    assert _resident._make_room(_resident.Tier(), 1 << 10, 1 << 40) == 0


loop = asyncio.new_event_loop()
loop.run_until_complete(hold())
with _resident._lock:
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)  # what hangs must not outlive the test
        with _resident._lock:
            os._exit(7 if _resident._held() else 0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), _resident._held())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 1024\n", "")


async def test_types_whose_names_are_made_up_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_resident, "_MOST_KNOWN", 5)
    resident = Resident(cast("Any", None), uuid4(), Config(), "postgresql://nowhere")
    held = resident._find_tier("held", 384)
    held.granted = 1
    for number in range(20):
        resident._find_tier(f"t{number}", 384)
        assert len(resident._tiers) <= 5
    assert resident._find_tier("held", 384) is held


async def test_closing_ends_a_load(mind: Mind, make_db: MakeAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    await mind.remember(some_vectors(20))  # the load hangs before it knows
    db = await make_db(mind.db.agent_id, resident="auto")
    begun, never = asyncio.Event(), asyncio.Event()

    async def hang(*_: Any, **__: Any) -> None:
        begun.set()
        await never.wait()

    monkeypatch.setattr(db._background, "fetch_row", hang)
    for _ in range(_resident._LOAD_AFTER):
        await db.search_memories(embedding=some_vectors(1)[0], table_name=TABLE)
    await begun.wait()
    await db.close()
    assert not db._resident._tasks
    # Whoever comes next loads it.
    await mind.check(some_vectors(1)[0])


async def test_closing_at_once_leaves_the_load_to_others(mind: Mind, make_db: MakeAdapter) -> None:
    """The load is cancelled before it has begun to run."""
    await mind.remember(some_vectors(20))
    query = some_vectors(1)[0]
    hasty = await make_db(mind.db.agent_id, **RESIDENT)
    hasty._resident._begin_load(hasty._resident._find_tier(TABLE, 384), TABLE, 384)
    await hasty.close()
    await mind.check(query)
    assert mind.resident.stats.loads == 1


async def test_a_load_of_a_width_that_is_left_ends(mind: Mind, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, never = asyncio.Event(), asyncio.Event()

    async def hang(*_: Any, **__: Any) -> None:
        begun.set()
        await never.wait()

    monkeypatch.setattr(mind.resident._executor, "fetch_row", hang)
    tier = mind.resident._find_tier(TABLE, 384)
    mind.resident._begin_load(tier, TABLE, 384)
    await begun.wait()
    loading = tier.loading
    assert loading is not None
    mind.resident.forget()
    await asyncio.wait({loading})
    assert loading.cancelled() and tier.matrix is None


async def test_a_load_that_is_waited_for_does_not_wait_for_the_background(mind: Mind, make_db: MakeAdapter) -> None:
    """Whose connections may be in use for as long as indexes are built."""
    await mind.remember(some_vectors(20))
    db = mind.db = await make_db(mind.db.agent_id, **RESIDENT, background_pool_size=1)
    part = await mind.raw.fetchval("SELECT elizasql.partition_of($1)", db.agent_id)
    async with mind.raw.transaction():
        await mind.raw.execute(f"LOCK TABLE elizasql.{part} IN SHARE ROW EXCLUSIVE MODE")
        building = asyncio.ensure_future(db.index_memories())
        await blocked_pid(mind.raw, building)
        assert len(await mind.search(some_vectors(1, seed=8)[0], timeout=20)) == 10
    assert (mind.resident.stats.hits, mind.resident.stats.loads) == (1, 1)
    assert await building == 20


async def test_what_is_too_large_is_not_even_read(mind: Mind, make_db: MakeAdapter, round_trips: list[str]) -> None:
    """However much one transaction has written."""
    await mind.remember(some_vectors(900))
    db = await make_db(mind.db.agent_id, **RESIDENT, resident_memory_mb=1)
    round_trips.clear()
    assert len(await db.search_memories(embedding=some_vectors(1)[0], table_name=TABLE)) == 10
    assert db._resident.stats.misses == 1
    assert not any("string_agg" in sent for sent in round_trips)


async def test_a_load_that_fails(mind: Mind, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    await mind.remember(some_vectors(20))
    query = some_vectors(1)[0]

    async def fail(*_: Any, **__: Any) -> None:
        raise elizasql.ConnectionLostError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(mind.resident._executor, "fetch_row", fail)
        assert await mind.search(query) == await mind.exact(query)
        assert await mind.search(query) == await mind.exact(query)
    assert mind.resident.stats.misses == 2
    assert [record.levelname for record in caplog.records if "put off" in record.message] == ["WARNING"]
    mind.tier.not_before = 0.0
    await mind.check(query)


async def test_memory_that_is_not_to_be_had(
    mind: Mind, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The database answers in place of a matrix that a change has reached by half."""
    await mind.remember(some_vectors(300))
    query = some_vectors(1, seed=8)[0]
    zeros = np.zeros

    def refuse_levels(shape: Any, dtype: Any = float) -> Any:
        if dtype is np.int8:
            raise MemoryError("unable to allocate")
        return zeros(shape, dtype)

    with monkeypatch.context() as patch:
        patch.setattr(np, "zeros", refuse_levels)
        assert await mind.search(query) == await mind.exact(query)
        assert await mind.search(query) == await mind.exact(query)
    assert [record.levelname for record in caplog.records if "put off" in record.message] == ["WARNING"]
    mind.tier.not_before = 0.0
    await mind.check(query)
    matrix = mind.tier.matrix
    assert matrix is not None
    while matrix.size + 60 <= matrix.capacity:
        await mind.remember(some_vectors(60, seed=matrix.size))
        await mind.check(query)
    await mind.remember(some_vectors(60, seed=9))
    with monkeypatch.context() as patch:
        patch.setattr(np, "zeros", refuse_levels)
        assert await mind.search(query) == await mind.exact(query)
    assert mind.resident.snapshot()["vectors"] == 0
    assert [record.levelname for record in caplog.records if "let go" in record.message] == ["WARNING"]
    mind.tier.not_before = 0.0
    await mind.check(query)


async def test_waiting_for_a_load_ends_with_the_call(mind: Mind, monkeypatch: pytest.MonkeyPatch) -> None:
    await mind.remember(some_vectors(20))
    never = asyncio.Event()

    async def hang(*_: Any, **__: Any) -> None:
        await never.wait()

    with monkeypatch.context() as patch:
        patch.setattr(mind.resident._executor, "fetch_row", hang)
        with pytest.raises(elizasql.ElizaSQLError):
            await mind.search(some_vectors(1)[0], timeout=0.05)
        (task,) = mind.resident._tasks
        task.cancel()
        await asyncio.wait({task})
    await mind.check(some_vectors(1)[0])


async def test_nothing_is_begun_for_a_search_that_is_still_running_when_its_adapter_is_closed(
    mind: Mind, make_db: MakeAdapter
) -> None:
    """Nobody would end it."""
    await mind.remember(some_vectors(20))
    query = some_vectors(1)[0]
    late = await make_db(mind.db.agent_id, **RESIDENT)
    await late._resident.close()
    assert len(await late.search_memories(embedding=query, table_name=TABLE)) == 10
    assert (late._resident.stats.misses, late._resident.stats.loads) == (1, 0)
    await mind.check(query)
    mind.tier.behind, mind.tier.renew_at = True, 0.0
    assert len(await late.search_memories(embedding=query, table_name=TABLE)) == 10
    assert mind.tier.loading is None and mind.tier.behind


async def test_waiting_for_the_changes_that_another_reads_ends_with_the_call(
    mind: Mind, monkeypatch: pytest.MonkeyPatch
) -> None:
    await mind.remember(some_vectors(20))
    query = some_vectors(1, seed=8)[0]
    await mind.check(query)
    await mind.remember(some_vectors(70, seed=1))
    fetch_row, begun, go_on = mind.db._executor.fetch_row, asyncio.Event(), asyncio.Event()

    async def wait(statement: Any, **params: Any) -> Any:
        begun.set()
        await go_on.wait()
        return await fetch_row(statement, **params)

    with monkeypatch.context() as patch:
        patch.setattr(mind.db._executor, "fetch_row", wait)
        first = asyncio.ensure_future(mind.search(query))
        await begun.wait()
        assert mind.tier.catching_up is not None
        with pytest.raises(elizasql.DeadlineError):
            await mind.search(query, timeout=0.2)
        assert not first.done()
        go_on.set()
        assert await first == await mind.exact(query)


async def test_when_the_one_that_reads_the_changes_is_cut_the_next_one_does(
    mind: Mind, monkeypatch: pytest.MonkeyPatch
) -> None:
    await mind.remember(some_vectors(20))
    query = some_vectors(1, seed=8)[0]
    await mind.check(query)
    await mind.remember(some_vectors(70, seed=1))
    begun, never = asyncio.Event(), asyncio.Event()

    async def hang(*_: Any, **__: Any) -> None:
        begun.set()
        await never.wait()

    with monkeypatch.context() as patch:
        patch.setattr(mind.db._executor, "fetch_row", hang)
        first = asyncio.ensure_future(mind.search(query))
        await begun.wait()
    reading = mind.tier.catching_up
    assert reading is not None
    second = asyncio.ensure_future(mind.search(query, timeout=10.0))
    while not reading._callbacks:
        await asyncio.sleep(0)
    first.cancel()
    assert await second == await mind.exact(query)
    assert first.cancelled()
    await mind.check(query)


@pytest.mark.parametrize("options", [{}, {"include_embedding": True}], ids=["checked", "fetched"])
async def test_another_life_of_the_server(mind: Mind, options: dict[str, Any]) -> None:
    """After a crash or a failover transactions are numbered anew: nothing that was held says anything any more."""
    await mind.remember(some_vectors(50))
    query = some_vectors(1, seed=8)[0]
    await mind.check(query)
    mind.tier.life = "another"
    assert await mind.search(query, **options) == await mind.exact(query)
    assert mind.tier.matrix is None and mind.resident.stats.misses == 1
    mind.tier.not_before = 0.0
    await mind.check(query)
    assert mind.resident.stats.loads == 2


@pytest.mark.parametrize("method", ["fetch_row", "fetch"], ids=["list", "contents"])
async def test_what_a_standby_says_of_contents_is_not_taken(
    mind: Mind, dsn: str, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """It lags: what it does not have yet is not gone. As where the background has met another host than a search."""
    await mind.remember(some_vectors(40))
    query = some_vectors(40)[7]
    await mind.check(query)
    standby = await asyncpg.connect(dsn)
    async with standby.transaction(isolation="repeatable_read"):
        await standby.execute("SELECT FROM elizasql.agents")  # all that it knows
        (id,) = await mind.remember([query])
        await mind.check(query)
        mind.tier.renew_at = math.inf
        await mind.writer.update_memory({"id": mind.ids[7], "content": {"late": 1}})
        assert {id, mind.ids[7]} < {each for each, _ in await mind.check(query)}

        def ask(statement: Any, **params: Any) -> Any:
            arguments = statement.order(params | {"life": "a standby's"})
            return getattr(standby, method.replace("_", ""))(statement.sql, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(mind.resident._executor, method, ask)
            mind.tier.renew_at = 0.0
            mind.resident._begin_renewal(mind.tier, TABLE)
            assert mind.tier.loading is not None
            await mind.tier.loading
    await standby.close()
    await mind.check(query)
    await mind.renew()
    await mind.check(query)


@pytest.mark.parametrize(
    ("statement", "said"),
    [("measure_resident", {"numbers_transactions": False}), ("load_resident", {"life": "a standby's"})],
)
async def test_what_a_standby_has_is_not_loaded(
    mind: Mind, monkeypatch: pytest.MonkeyPatch, statement: str, said: dict[str, Any]
) -> None:
    """Neither where it is all that there is, nor where the background has met it between two pages: it lags."""
    await mind.remember(some_vectors(40))
    query = some_vectors(1, seed=8)[0]
    fetch_row = mind.resident._executor.fetch_row

    async def ask(each: Any, **params: Any) -> Any:
        row = await fetch_row(each, **params)
        return dict(row) | said if each.name == statement else row

    with monkeypatch.context() as patch:
        patch.setattr(mind.resident._executor, "fetch_row", ask)
        for _ in range(2):
            assert await mind.search(query) == await mind.exact(query)
    assert mind.tier.matrix is None and mind.tier.not_before > mind.tier.used
    assert mind.resident.stats.misses == 2 and _resident._held() == 0
    mind.tier.not_before = 0.0
    await mind.check(query)


async def test_what_a_standby_says_of_changes_is_not_taken(mind: Mind, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not know which transactions run: what these have written would be no change any more."""
    await mind.remember(some_vectors(40))
    query = some_vectors(1, seed=8)[0]
    await mind.check(query)
    fetch_row = mind.db._executor.fetch_row

    async def ask(statement: Any, **params: Any) -> Any:
        row = await fetch_row(statement, **params | {"life": "a standby's"})
        await stack.aclose()  # it commits
        return dict(row) | {"seen": (*row["seen"][:2], ())}

    async with AsyncExitStack() as stack:
        tx = await stack.enter_async_context(mind.writer.transaction())
        id = await tx.create_memory(Memory(content={}, embedding=query, unique=True), TABLE)
        await mind.remember(some_vectors(70, seed=1))
        with monkeypatch.context() as patch:
            patch.setattr(mind.db._executor, "fetch_row", ask)
            assert (await mind.search(query))[0][0] == id
    mind.tier.not_before = 0.0
    assert (await mind.check(query))[0][0] == id


# --- limits ----------------------------------------------------------------------------------------------------------


async def test_more_vectors_than_are_compared(mind: Mind, make_db: MakeAdapter) -> None:
    """What is asked of everything is left to the database, what is asked of a part is answered from what is held."""
    await mind.remember(some_vectors(100))
    db = mind.db = await make_db(mind.db.agent_id, resident_max_vectors=50, **RESIDENT)
    query = some_vectors(1, seed=8)[0]
    for _ in range(3):
        assert await mind.search(query) == await mind.exact(query)
    assert (db._resident.stats.misses, db._resident.stats.loads) == (3, 0)
    # It is not looked at again with every search.
    assert mind.tier.large_until > mind.tier.used + 100
    await mind.check(query, room_id=mind.rooms[0])
    await mind.check(query, entity_id=mind.entities[1], unique=True)
    # Two thirds of the rows: too many as well.
    assert await mind.search(query, unique=True) == await mind.exact(query, unique=True)
    assert (db._resident.stats.misses, db._resident.stats.loads) == (4, 1)
    await mind.remember(some_vectors(30, seed=1))
    await mind.check(query, world_id=mind.worlds[0])
    # One that shrinks is searched as a whole.
    await mind.writer.delete_memories(mind.ids[50:])
    await mind.check(query, world_id=mind.worlds[1])
    await mind.writer.delete_memories(mind.ids[:10])
    mind.resident._give_up(mind.tier, 0.0)
    mind.tier.large_until = 0.0
    await mind.check(query)


async def test_a_part_that_is_too_large_is_not_counted_with_every_search(
    mind: Mind, make_db: MakeAdapter, round_trips: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    await mind.remember(some_vectors(100))
    monkeypatch.setattr(_resident, "_MOST_KNOWN", 1)
    db = mind.db = await make_db(mind.db.agent_id, resident_max_vectors=15, **RESIDENT)
    query = some_vectors(1, seed=8)[0]

    async def sent(**scope: Any) -> int:
        """Search, and give the number of round trips: one, and two more to measure the type and count the part."""
        round_trips.clear()
        found, number = await mind.search(query, **scope), len(round_trips)
        assert found == await mind.exact(query, **scope)
        return number

    room, world = {"room_id": mind.rooms[0]}, {"world_id": mind.worlds[0]}
    assert [await sent(**room) for _ in range(3)] == [3, 1, 1]
    # It says nothing of others. What was asked long ago is forgotten: there may be any number.
    assert [await sent(**world) for _ in range(3)] == [3, 1, 1]
    assert [await sent(**room) for _ in range(2)] == [3, 1]
    assert db._resident.stats.loads == 0
    await mind.check(query, room_id=uuid4())
    assert db._resident.stats.loads == 1


async def test_rows_that_are_gone_do_not_make_a_type_large(mind: Mind, make_db: MakeAdapter) -> None:
    db = await make_db(mind.db.agent_id, **RESIDENT, resident_max_vectors=100)
    query = some_vectors(1, seed=8)[0]
    for _ in range(2):
        ids = await mind.remember(some_vectors(90, seed=len(mind.ids)))
        assert len(await db.search_memories(embedding=query, table_name=TABLE)) == 10
        await mind.writer.delete_memories(ids)
    ids = await mind.remember(some_vectors(20))
    tier = db._resident._tiers[TABLE, 384]
    assert tier.matrix is not None and tier.matrix.size > 100
    misses = db._resident.stats.misses
    assert len(await db.search_memories(embedding=query, table_name=TABLE, count=20)) == 20
    assert db._resident.stats.misses == misses + 1
    if tier.loading is not None:
        await tier.loading
    assert len(await db.search_memories(embedding=query, table_name=TABLE, count=20)) == 20
    assert db._resident.stats.misses == misses + 1
    assert tier.matrix.size == 20
    # One that is large all the same is looked at once.
    await mind.remember(some_vectors(90, seed=3))
    tier.not_before = 0.0
    await db.search_memories(embedding=query, table_name=TABLE)
    await db.search_memories(embedding=query, table_name=TABLE)
    assert tier.loading is not None
    await tier.loading
    assert tier.loaded_size == 110
    tier.not_before = 0.0
    await db.search_memories(embedding=query, table_name=TABLE)
    assert tier.loading is None


async def test_adapters_that_may_hold_unlike_much_do_not_decide_for_one_another(
    mind: Mind, make_db: MakeAdapter
) -> None:
    await mind.remember(some_vectors(500))
    query = some_vectors(1, seed=8)[0]
    for limit in ({"resident_max_vectors": 50}, {"resident_memory_mb": 1}):
        small = await make_db(mind.db.agent_id, **{**RESIDENT, **limit})  # type: ignore[dict-item]
        for _ in range(20):
            assert len(await small.search_memories(embedding=query, table_name=TABLE)) == 10
        assert small._resident.stats.hits == 0
        await mind.check(query)


async def test_what_most_rows_have_left_is_loaded_anew(mind: Mind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever finds that they are gone: a search, or whoever brings the contents up to date."""
    monkeypatch.setattr(Tier, "outlived", property(lambda tier: tier.dropped > tier.loaded_size // 2))
    await mind.remember(some_vectors(600))
    query = some_vectors(1, seed=8)[0]
    await mind.check(query)
    before = mind.tier.matrix
    await mind.writer.delete_memories(mind.ids[20:])
    await mind.renew()
    assert mind.tier.dropped == 580
    for _ in range(3):
        await mind.check(query)
        if mind.tier.loading is not None:
            await mind.tier.loading
    after = mind.tier.matrix
    assert (mind.resident.stats.loads, mind.tier.dropped) == (2, 0)
    assert before is not None and after is not None and after.capacity < before.capacity / 2
    # And again, should it be put out.
    mind.resident._give_up(mind.tier, 0.0)
    await mind.check(query)
    assert mind.resident.stats.loads == 3


@pytest.mark.parametrize("indexing", ["manual", "background"])
async def test_a_load_of_what_is_held_that_is_cut_is_no_reason_to_wait(
    mind: Mind, make_db: MakeAdapter, indexing: str
) -> None:
    """As that of an adapter which is closed meanwhile, where there is no room for both; the end of its indexer gives
    the load the time to meet the executor that is closed."""
    await mind.remember(some_vectors(40))
    query = some_vectors(1, seed=8)[0]
    await mind.check(query)
    other = await make_db(mind.db.agent_id, **{**RESIDENT, "indexing": indexing})
    other._resident._begin_load(mind.tier, TABLE, 384)
    mind.tier.matrix = None
    await other.close()
    await mind.check(query)


async def test_what_ended_without_a_change_is_not_looked_through_again(mind: Mind) -> None:
    """As the rows of a width that is coming: each check would read them all."""
    await mind.remember(some_vectors(20))
    query = some_vectors(1, seed=8)[0]
    await mind.check(query)
    for _ in range(2):
        number = int(await mind.raw.fetchval("SELECT pg_current_xact_id()::text"))
        await mind.check(query)
        assert mind.tier.seen[1] > number


async def test_a_large_type_is_loaded_for_those_who_ask_of_parts(
    mind: Mind, make_db: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    await mind.remember(some_vectors(300))
    monkeypatch.setattr(_resident, "_LEAST", 70)
    db = mind.db = await make_db(mind.db.agent_id, indexing="manual", resident="auto", resident_max_vectors=250)
    query = some_vectors(1, seed=8)[0]

    async def ask(times: int, **scope: Any) -> int:
        for _ in range(times):
            await mind.search(query, **scope)
            if mind.tier.loading is not None:
                await mind.tier.loading
        return db._resident.stats.loads

    # As a whole it is never loaded, nor for parts that are better left to the database.
    assert await ask(3 * _resident._LOAD_AFTER) == 0
    for scope in ({"room_id": mind.rooms[0]}, {"room_id": uuid4()}, {"world_id": uuid4()}, {"entity_id": uuid4()}):
        assert await ask(2 * _resident._LOAD_AFTER, **scope) == 0
    # Of 100 and of 75 memories.
    for scope in ({"world_id": mind.worlds[0]}, {"entity_id": mind.entities[1]}):
        assert await ask(_resident._LOAD_AFTER - 1, **scope) == db._resident.stats.loads
        hits = db._resident.stats.hits
        assert await ask(1, **scope) > 0
        await mind.check(query, **scope)
        assert mind.tier.matrix is not None and mind.tier.matrix.size == 300
        assert db._resident.stats.hits == hits + 1
        mind.resident._give_up(mind.tier, 0.0)


async def test_more_changes_than_are_read(mind: Mind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_resident, "_CHANGES_BYTES", 80 * 4 * 384)
    await mind.remember(some_vectors(100))
    query = some_vectors(1, seed=8)[0]
    await mind.check(query)
    await mind.remember(some_vectors(79, seed=1))
    await mind.check(query)
    await mind.remember(some_vectors(80, seed=2))
    assert await mind.search(query) == await mind.exact(query)
    assert mind.resident.stats.misses == 1 and mind.tier.not_before > mind.tier.used
    mind.tier.not_before = 0.0
    await mind.check(query)
    assert mind.resident.stats.loads == 2


async def test_the_budget(make_db: MakeAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least recently used go out, but none that was used just now."""
    with _resident._lock:
        _resident._shelves.clear()
    minds = []
    for number in range(4):
        db = await make_db(resident_memory_mb=3, **RESIDENT)
        vectors = some_vectors(400, seed=number)
        await db.create_memories([Memory(content={}, embedding=vector, unique=True) for vector in vectors], TABLE)
        minds.append(db)
    query = some_vectors(1, seed=8)[0]

    async def search(number: int) -> bool:
        """Tell whether the tier answered."""
        db = minds[number]
        hits = db._resident.stats.hits
        assert len(await db.search_memories(embedding=query, table_name=TABLE)) == 10
        assert db._resident.snapshot()["bytes"] <= 3 << 20
        return db._resident.stats.hits > hits

    assert [await search(number) for number in (0, 1, 2)] == [True, True, False]
    assert await search(0) and await search(1)
    monkeypatch.setattr(_resident, "_REST", 0.0)
    for db in minds:
        for tier in db._resident._tiers.values():
            tier.not_before = 0.0
    assert await search(0)
    assert await search(2)  # in the place of 1, which has waited longest
    assert minds[2]._resident.stats.evictions == 1
    assert await search(0) and minds[0]._resident.stats.loads == 1
    assert await search(1) and minds[1]._resident.stats.loads == 2
    assert await search(0) and await search(3)
    assert [db._resident.stats.evictions for db in minds] == [0, 1, 1, 1]
    assert sum(db._resident.snapshot()["vectors"] for db in minds) == 800


async def test_loads_at_the_same_time_share_the_budget(make_db: MakeAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    with _resident._lock:
        _resident._shelves.clear()
    minds = [await make_db(resident_memory_mb=3, **RESIDENT) for _ in range(4)]
    for number, db in enumerate(minds):
        vectors = some_vectors(400, seed=number)
        await db.create_memories([Memory(content={}, embedding=vector, unique=True) for vector in vectors], TABLE)
    made: list[Matrix] = []

    def make(dimension: int, size: int) -> Matrix:
        made.append(Matrix(dimension, size))
        return made[-1]

    make.estimate = Matrix.estimate  # type: ignore[attr-defined]
    monkeypatch.setattr(_resident, "Matrix", make)
    query = some_vectors(1, seed=8)[0]
    found = await asyncio.gather(*(db.search_memories(embedding=query, table_name=TABLE) for db in minds))
    assert [len(rows) for rows in found] == [10] * 4
    assert sum(matrix.footprint for matrix in made) <= 3 << 20
    assert sum(db._resident.stats.loads for db in minds) == len(made) == 2
    for db in minds:
        db._resident.forget()
    assert _resident._held() == 0 and not _resident._shelf().filled


async def test_one_that_is_being_loaded_is_not_put_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on filling what it was granted, beside the one that would have got it."""
    monkeypatch.setattr(_resident, "_REST", 0.0)
    with _resident._lock:
        _resident._shelves.clear()
    loading, other = Tier(), Tier()
    loading.loading = asyncio.get_running_loop().create_future()  # type: ignore[assignment]
    _resident._shelf()
    assert _resident._make_room(loading, 1 << 10, 1 << 10) == 0
    assert _resident._make_room(other, 1, 1 << 10) is None
    assert (loading.granted, other.granted) == (1 << 10, 0)
    loading.loading = None
    assert _resident._make_room(other, 1, 1 << 10) == 1
    assert (loading.granted, other.granted) == (0, 1)


@pytest.mark.parametrize("budget", [2, 3], ids=["one", "both"])
async def test_what_is_loaded_anew_stays_within_the_budget(
    make_db: MakeAdapter, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    """What is replaced counts as long as it is there."""
    with _resident._lock:
        _resident._shelves.clear()
    alive: weakref.WeakSet[Matrix] = weakref.WeakSet()

    class Counted(Matrix):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            alive.add(self)

    monkeypatch.setattr(_resident, "Matrix", Counted)
    db = await make_db(resident_memory_mb=budget, **RESIDENT)
    vectors = some_vectors(400)
    await db.create_memories(
        [Memory(content={"text": "x" * 1000}, embedding=vector, unique=True) for vector in vectors], TABLE
    )
    await db.search_memories(embedding=vectors[0], table_name=TABLE)
    (tier,) = db._resident._tiers.values()
    assert tier.matrix is not None and tier.matrix.contents_size > 400_000
    fetch_row = db._resident._executor.fetch_row
    kept: list[bool] = []

    async def look(statement: Any, **params: Any) -> Any:
        if statement.name == "load_resident":
            kept.append(tier.matrix is not None)
            assert sum(matrix.footprint for matrix in alive) <= db._resident.snapshot()["bytes"] <= budget << 20
        return await fetch_row(statement, **params)

    monkeypatch.setattr(db._resident._executor, "fetch_row", look)
    db._resident._begin_load(tier, TABLE, 384)
    assert tier.loading is not None
    await tier.loading
    assert kept == [budget == 3]
    assert sum(matrix.footprint for matrix in alive) == db._resident.snapshot()["bytes"]
    await db.search_memories(embedding=vectors[0], table_name=TABLE)
    assert (db._resident.stats.loads, db._resident.stats.checks) == (2, 2)


async def test_a_load_that_ends_early_gives_its_bytes_back(mind: Mind, monkeypatch: pytest.MonkeyPatch) -> None:
    await mind.remember(some_vectors(300))
    with _resident._lock:
        _resident._shelves.clear()

    class Broken(Matrix):
        def put(self, *_: Any) -> None:
            assert _resident._held() > 0
            raise MemoryError

    monkeypatch.setattr(_resident, "Matrix", Broken)
    assert len(await mind.db.search_memories(embedding=some_vectors(1)[0], table_name=TABLE)) == 10
    assert mind.tier.loading is None and mind.tier.matrix is None
    assert _resident._held() == 0


async def test_what_has_grown_beyond_the_budget_while_it_was_loaded_is_let_go_of(
    mind: Mind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by rows that were written meanwhile, and where others have taken the rest."""
    with _resident._lock:
        _resident._shelves.clear()
    await mind.remember(some_vectors(60))
    query = some_vectors(1, seed=8)[0]
    make_room, asked = _resident._make_room, 0

    def refuse(*args: Any) -> int | None:
        nonlocal asked
        asked += 1
        return make_room(*args) if asked == 1 else None

    with monkeypatch.context() as patch:
        patch.setattr(_resident, "_make_room", refuse)
        assert await mind.search(query) == await mind.exact(query)
    assert asked == 2 and mind.tier.matrix is None and _resident._held() == 0
    mind.tier.not_before = 0.0
    await mind.check(query)


async def test_one_that_another_thread_puts_out(mind: Mind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Event loops in other threads share the budget, and may need it at any moment."""
    await mind.remember(some_vectors(200))
    with _resident._lock:
        _resident._shelves.clear()
    query = some_vectors(1, seed=8)[0]
    await mind.check(query)
    merge = Resident._merge

    def put_out_first(self: Resident, tier: Tier, *args: Any, **options: Any) -> None:
        tier.matrix = None
        merge(self, tier, *args, **options)

    monkeypatch.setattr(Resident, "_merge", put_out_first)
    await mind.remember(some_vectors(60, seed=1))
    assert await mind.search(query) == await mind.exact(query)
    assert mind.tier.matrix is None
    assert _resident._held() == 0


async def test_one_that_is_larger_than_the_budget(make_db: MakeAdapter) -> None:
    db = await make_db(resident_memory_mb=1, **RESIDENT)
    vectors = some_vectors(700)
    await db.create_memories([Memory(content={}, embedding=vector, unique=True) for vector in vectors], TABLE)
    for _ in range(2):
        assert len(await db.search_memories(embedding=vectors[0], table_name=TABLE)) == 10
    assert (db._resident.stats.misses, db._resident.stats.loads) == (2, 0)


async def test_growth_beyond_the_budget(mind: Mind, make_db: MakeAdapter) -> None:
    mind.db = await make_db(mind.db.agent_id, resident_memory_mb=1, **RESIDENT)
    with _resident._lock:
        _resident._shelves.clear()
    await mind.remember(some_vectors(200))
    query = some_vectors(1, seed=8)[0]
    await mind.check(query)
    for number in range(1, 10):
        await mind.remember(some_vectors(60, seed=number))
        assert await mind.search(query) == await mind.exact(query)
    assert mind.tier.matrix is None


async def test_contents_beyond_the_budget(mind: Mind, make_db: MakeAdapter) -> None:
    """New memories come with their contents, for which there was no room yet."""
    mind.db = await make_db(mind.db.agent_id, resident_memory_mb=2, **RESIDENT)
    with _resident._lock:
        _resident._shelves.clear()
    await mind.remember(some_vectors(200))
    query = some_vectors(1, seed=8)[0]
    await mind.check(query)
    for number, vector in enumerate(some_vectors(20, seed=1)):
        await mind.writer.create_memory(
            Memory(content={"text": "x" * 200_000}, embedding=vector, unique=True, metadata={"number": number}), TABLE
        )
        await mind.check(query)
        assert mind.tier.matrix is not None and mind.tier.matrix.footprint == _resident._held() <= 2 << 20
    assert mind.tier.listed is None and mind.tier.matrix.size == 220


@pytest.mark.parametrize("options", [{"resident": "off"}, {"resident_memory_mb": 0}, {"resident_max_vectors": 0}])
async def test_off_costs_nothing(make_db: MakeAdapter, options: dict[str, Any]) -> None:
    db = await make_db(**{"resident": "required", **options})
    vector = some_vectors(1)[0]
    id = await db.create_memory(Memory(content={}, embedding=vector, unique=True), TABLE)
    for _ in range(3):
        assert [hit.id for hit in await db.search_memories(embedding=vector, table_name=TABLE)] == [id]
    assert not db._resident._tiers
    stats = db._resident.snapshot()
    assert not any(count for name, count in stats.items() if name != "bytes")


def test_settings() -> None:
    config = Config.load(environ={})
    assert (config.resident, config.resident_memory_mb, config.resident_max_vectors) == ("auto", 256, None)
    environ = {"ELIZASQL_RESIDENT": "off", "ELIZASQL_RESIDENT_MEMORY_MB": "64", "ELIZASQL_RESIDENT_MAX_VECTORS": "100"}
    config = Config.load(environ=environ)
    assert (config.resident, config.resident_memory_mb, config.resident_max_vectors) == ("off", 64, 100)
    for wrong in ({"resident": "yes"}, {"resident_memory_mb": -1}, {"resident_max_vectors": 1.5}):
        with pytest.raises(ConfigurationError, match=next(iter(wrong))):
            Config.load(environ={}, **wrong)


# --- at the same time ------------------------------------------------------------------------------------------------


async def test_many_searches_and_writes_at_once(mind: Mind, make_db: MakeAdapter) -> None:
    """Searches that run together merge what they see in turn; none is stale, and the tier is right in the end."""
    await mind.remember(some_vectors(200))
    await mind.check(some_vectors(1)[0])
    second = await make_db(mind.db.agent_id, **RESIDENT)
    alive: dict[UUID, UUID] = {}

    async def write(number: int) -> None:
        chance = np.random.default_rng(number)
        for step in range(12):
            ids = [_codecs.new_id() for _ in range((1, 5, 90)[step % 3])]
            room = mind.rooms[int(chance.integers(4))]
            await mind.writer.create_memories(
                [Memory(id=id, content={}, room_id=room, embedding=vector_of(id), unique=True) for id in ids], TABLE
            )
            alive.update(dict.fromkeys(ids, room))
            if step % 2:
                gone = ids[: len(ids) // 2]
                for id in gone:
                    del alive[id]
                await mind.writer.delete_memories(gone)

    async def search(db: DatabaseAdapter, number: int) -> None:
        chance = np.random.default_rng(100 + number)
        for _ in range(60):
            certain = list(alive)
            if not certain:
                await asyncio.sleep(0)
                continue
            id = certain[int(chance.integers(len(certain)))]
            room = alive[id]
            hits = await db.search_memories(embedding=vector_of(id), table_name=TABLE, room_id=room, count=3)
            if id in alive:
                assert hits[0].id == id
            assert all(hit.room_id == room for hit in hits)

    await asyncio.gather(
        *(write(number) for number in range(3)),
        *(search(db, number) for number, db in enumerate([mind.db] * 4 + [second] * 2)),
    )
    for query in some_vectors(5, seed=8):
        await mind.check(query, count=50)
        await mind.check(query, room_id=mind.rooms[0])


class Writer:
    """A process that writes, and what it has said."""

    def __init__(self, orders: tuple[Any, ...]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", resident_worker.__name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parent.parent,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        pickle.dump(orders, self.process.stdin)
        self.process.stdin.close()
        self._pipe = self.process.stdout
        os.set_blocking(self._pipe.fileno(), False)
        self._rest = b""
        # The room of each id that must be found; ids that must not; ids of which something was begun and not done.
        self.rooms: dict[UUID, UUID] = {}
        self.edits: dict[UUID, int] = {}
        self.gone: set[UUID] = set()
        self.uncertain: set[UUID] = set()
        self.ended = False

    def listen(self) -> set[UUID]:
        """Read all that was said until now; give the ids that it was about."""
        touched = set()
        while not self.ended:
            try:
                said = os.read(self._pipe.fileno(), 1 << 20)
            except BlockingIOError:
                break
            self.ended = not said
            *lines, self._rest = (self._rest + said).split(b"\n")
            for line in lines:
                state, action, word, *more = line.decode().split()
                id = UUID(word)
                touched.add(id)
                if state == "try":
                    self.uncertain.add(id)
                    continue
                self.uncertain.discard(id)
                if action == "delete":
                    del self.rooms[id]
                    self.gone.add(id)
                elif action == "edit":
                    self.edits[id] = int(more[0])
                else:
                    self.rooms[id] = UUID(more[0])
        return touched

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._pipe.close()


@pytest.mark.slow
async def test_several_processes_write(mind: Mind, dsn: str) -> None:
    """No search misses what was committed before it began, or gives what was deleted or moved away before."""
    await mind.remember(some_vectors(300))
    writers = [Writer((dsn, mind.db.agent_id, mind.rooms, seed, 120)) for seed in range(3)]
    chance = np.random.default_rng(0)
    searches = 0
    try:
        while not all(writer.ended for writer in writers):
            for writer in writers:
                writer.listen()
            certain = [(id, room) for w in writers for id, room in w.rooms.items() if id not in w.uncertain]
            gone = {id for writer in writers for id in writer.gone}
            where = dict(certain)
            edits = {id: edit for writer in writers for id, edit in writer.edits.items() if id in where}
            if not certain:
                await asyncio.sleep(0)  # lets the loop breathe; nothing is waited for
                continue
            # What was written last is what a stale tier would miss.
            id, room = certain[-1 - int(chance.exponential(3)) % len(certain)]
            wide, narrow = await asyncio.gather(
                mind.db.search_memories(embedding=vector_of(id), table_name=TABLE, count=5),
                mind.db.search_memories(embedding=vector_of(id), table_name=TABLE, room_id=room, count=5),
            )
            # What happened meanwhile was said before it was done.
            touched = set().union(*(writer.listen() for writer in writers))
            if id not in touched:
                assert wide[0].id == narrow[0].id == id
            for hit in narrow:
                assert hit.room_id == room
                assert hit.id in touched or where.get(hit.id, room) == room  # type: ignore[arg-type]
            assert not {hit.id for hit in (*wide, *narrow)} & gone
            for hit in (*wide, *narrow):
                if hit.id in where and hit.id not in touched:
                    assert hit.content == ({"edit": edits[hit.id]} if hit.id in edits else {})
            searches += 2
        assert all(writer.process.wait() == 0 for writer in writers)
    finally:
        for writer in writers:
            writer.close()
    # Now that it is quiet: exactly what the database finds.
    written = [(id, room) for writer in writers for id, room in writer.rooms.items()]
    assert len(written) > 200 and searches >= 10  # hundreds, but on a machine that the writers keep busy
    for id, room in written[::10]:
        await mind.check(vector_of(id))
        assert (await mind.check(vector_of(id), room_id=room))[0][0] == id
    for query in some_vectors(5, seed=8):
        await mind.check(query, count=100)
    stats = mind.resident.stats
    assert stats.loads == 1 and stats.deltas >= 5 and stats.misses == 0


# --- contents --------------------------------------------------------------------------------------------------------


async def test_contents_are_those_of_the_moment(mind: Mind) -> None:
    """Whoever has changed them, and whatever else has changed; and nothing is fetched once they are known again."""
    vectors = some_vectors(100)
    await mind.remember(vectors)
    (id, _), *_ = await mind.check(vectors[3])
    statements = [
        'UPDATE elizasql.memories SET content = \'{"deep": {"ü": [1, null]}}\' WHERE id = $1',
        "UPDATE elizasql.memories SET metadata = '{\"a\": 1.5}' WHERE id = $1",
        "UPDATE elizasql.memories SET created_at = '9999-12-31T23:59:59.999999Z' WHERE id = $1",
        "UPDATE elizasql.memories SET created_at = '0001-01-01T00:00:00Z' WHERE id = $1",
        "UPDATE elizasql.memories SET metadata = '{}', room_id = NULL WHERE id = $1",
    ]
    for number, statement in enumerate(statements):
        await mind.raw.execute(statement, id)
        if number % 2:
            await mind.remember([vectors[3]])
        await mind.check(vectors[3])
        await mind.check(vectors[3])
        await mind.renew()
        checks = mind.resident.stats.checks
        assert any(each == id for each, _ in await mind.check(vectors[3]))
        assert mind.resident.stats.checks == checks + 1


@pytest.mark.parametrize(("pause", "seconds"), [("_RENEWAL", 3600.0), ("_RENEWAL_SHARE", 1e9)])
async def test_contents_are_brought_up_to_date_by_the_next_search(
    mind: Mind, monkeypatch: pytest.MonkeyPatch, pause: str, seconds: float
) -> None:
    """But not by each: the server lists everything for it."""
    await mind.remember(some_vectors(60))
    query = some_vectors(1, seed=8)[0]
    await mind.check(query)
    stats, tier = mind.resident.stats, mind.tier
    monkeypatch.setattr(_resident, pause, seconds)

    async def renewals() -> int:
        await mind.writer.update_memory({"id": mind.ids[0], "content": {}})
        await mind.check(query)
        if tier.loading is not None:
            await tier.loading
        return stats.renewals

    tier.renew_at = 0.0
    assert await renewals() == 2
    checks = stats.checks
    await mind.check(query)
    assert stats.checks == checks + 1
    assert await renewals() == 2
    assert tier.renew_at > time.monotonic() + 1000


async def test_where_less_decides_than_the_server_can_tell(mind: Mind, round_trips: list[str]) -> None:
    """Copies of another length score the same there, or next to it; a threshold may be that of a row."""
    vectors = some_vectors(60)
    await mind.remember([*(vectors[:10] * 3), *(vectors[:10] * np.float32(1.7)), *vectors[:40]])
    for query in (*vectors[:4], *some_vectors(3, seed=9)):
        everything = await mind.exact(query, count=60)
        for count in (1, 2, 3, 10, 30):
            await mind.check(query, count=count)
        for place in (0, 1, 5, 9):
            await mind.check(query, match_threshold=float(everything[place][1]))
    # A hundred stand so close that the server ranks them in any case, in one round trip.
    round_trips.clear()
    await mind.search(vectors[0], count=100)
    assert len(round_trips) == 1
    assert 0 < mind.resident.stats.checks < mind.resident.stats.hits


async def test_contents_that_do_not_fit_are_not_read(make_db: MakeAdapter, round_trips: list[str]) -> None:
    """Nor are many large ones at once."""
    with _resident._lock:
        _resident._shelves.clear()
    random = np.random.default_rng(1)
    for number, budget in enumerate((3, 64)):
        db = await make_db(resident_memory_mb=budget, **RESIDENT)
        memories = [
            Memory(content={"text": random.bytes(100_000).hex()}, embedding=vector, unique=True)
            for vector in some_vectors(40)
        ]
        await db.create_memories(memories, TABLE)
        round_trips.clear()
        assert len(await db.search_memories(embedding=memories[0].embedding, table_name=TABLE)) == 10  # type: ignore[arg-type]
        read = sum("jsonb_send" in sent and "wanted" in sent for sent in round_trips)
        assert (read == 0) if number == 0 else (read >= 3)
        (tier,) = db._resident._tiers.values()
        assert tier.matrix is not None and tier.granted == tier.matrix.footprint
        assert (tier.matrix.contents_size > 40 * 200_000) == (number == 1)
        assert (tier.matrix.contents_size == 0) == (number == 0) == (tier.renew_at > time.monotonic() + 200)


async def test_contents_make_room_for_vectors(make_db: MakeAdapter) -> None:
    with _resident._lock:
        _resident._shelves.clear()
    minds = []
    for number in range(2):
        db = await make_db(resident_memory_mb=3, **RESIDENT)
        memories = [
            Memory(content={"text": "x" * 3000}, embedding=vector, unique=True)
            for vector in some_vectors(400, seed=number)
        ]
        await db.create_memories(memories, TABLE)
        minds.append(db._resident)
        query = some_vectors(1, seed=8)[0]
        await db.search_memories(embedding=query, table_name=TABLE)
        await db.search_memories(embedding=query, table_name=TABLE)
        (tier,) = db._resident._tiers.values()
        assert tier.matrix is not None and db._resident.snapshot()["bytes"] <= 3 << 20
        assert (tier.matrix.contents_size > 400 * 3000) == (number == 0)
        assert (tier.matrix.contents_size == 0) == (number == 1) == (tier.renew_at > time.monotonic() + 200)
        assert db._resident.stats.checks == (2 if number == 0 else 0) and db._resident.stats.hits == 2
    (first,) = minds[0]._tiers.values()
    assert first.matrix is not None and not first.matrix.contents_size and first.listed is None
    assert first.granted == first.matrix.footprint and minds[0].stats.evictions == 0


async def test_contents_stay_where_there_is_room_for_those_of_others(make_db: MakeAdapter) -> None:
    with _resident._lock:
        _resident._shelves.clear()
    vectors = some_vectors(30)
    minds = [await make_db(**RESIDENT) for _ in range(3)]
    for number, db in enumerate(minds):
        await db.create_memories([Memory(content={}, embedding=vector, unique=True) for vector in vectors], TABLE)
        for earlier in minds[: number + 1]:
            assert len(await earlier.search_memories(embedding=vectors[0], table_name=TABLE)) == 10
    assert [db._resident.stats.checks for db in minds] == [3, 2, 1]


@pytest.mark.parametrize("error", [elizasql.ConnectionLostError("gone"), MemoryError()], ids=["server", "memory"])
@pytest.mark.parametrize("known", [False, True])
async def test_contents_that_are_not_read_to_the_end_are_not_given_out(
    mind: Mind, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception, known: bool
) -> None:
    """Nothing would tell what has become of them since."""
    monkeypatch.setattr(_resident, "_CONTENTS", 10)
    vectors = some_vectors(40)
    await mind.remember(vectors)
    change = "UPDATE elizasql.memories SET content = $2::text::jsonb WHERE agent_id = $1"
    if known:
        await mind.check(vectors[0])
        mind.tier.renew_at = math.inf
        await mind.raw.execute(change, mind.db.agent_id, '{"new": 1}')
        await mind.check(vectors[0])
        assert mind.tier.behind
    executor = mind.resident._executor = copy(mind.resident._executor)  # the searches' is not disturbed
    fetch, parts = executor.fetch, 0

    async def fail(*args: Any, **params: Any) -> Any:
        nonlocal parts
        parts += 1
        if parts > 3:
            raise error
        return await fetch(*args, **params)

    with monkeypatch.context() as patch:
        patch.setattr(executor, "fetch", fail)
        if known:
            mind.tier.renew_at = 0.0
        await mind.check(vectors[0])
        if mind.tier.loading is not None:
            await mind.tier.loading
    assert parts >= 4 and {record.levelname for record in caplog.records} == {"WARNING"}
    assert mind.tier.renew_at > time.monotonic(), "not with the next search again"
    mind.tier.renew_at = math.inf
    await mind.raw.execute(change, mind.db.agent_id, '{"newer": 1}')
    for vector in vectors[:20]:
        await mind.check(vector, count=1)
    await mind.renew()
    checks = mind.resident.stats.checks
    await mind.check(vectors[0])
    assert mind.resident.stats.checks == checks + 1


async def test_what_changes_while_contents_are_brought_up_to_date(mind: Mind, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the list, and after each part that is read, memories are written, updated and removed, and searched."""
    monkeypatch.setattr(_resident, "_CONTENTS", 20)
    vectors = some_vectors(90)
    await mind.remember(vectors)
    query = some_vectors(1, seed=8)[0]
    await mind.check(query)
    tier = mind.tier
    executor = mind.resident._executor = copy(mind.resident._executor)  # the searches' is not disturbed
    fetch, fetch_row = executor.fetch, executor.fetch_row
    news = iter(some_vectors(200, seed=5))
    updated = iter(mind.ids)

    async def disturb(rows: Any) -> Any:
        await mind.remember([next(news), query * 1.01])
        await mind.writer.update_memory({"id": next(updated), "content": {"late": 1}})
        await mind.writer.delete_memory(next(updated))
        await mind.writer.update_memory({"id": next(updated), "embedding": next(news)})
        await mind.check(query)
        await mind.check(query, count=40)
        return rows

    async def fetch_then(*args: Any, **params: Any) -> Any:
        return await disturb(await fetch(*args, **params))

    async def fetch_row_then(*args: Any, **params: Any) -> Any:
        return await disturb(await fetch_row(*args, **params))

    for _ in range(2):
        await mind.raw.execute(
            "UPDATE elizasql.memories SET content = content || '{\"all\": 1}' WHERE agent_id = $1", mind.db.agent_id
        )
        await mind.check(query)
        monkeypatch.setattr(executor, "fetch", fetch_then)
        monkeypatch.setattr(executor, "fetch_row", fetch_row_then)
        tier.renew_at = 0.0
        mind.resident._begin_renewal(tier, TABLE)
        assert tier.loading is not None
        await tier.loading
        monkeypatch.setattr(executor, "fetch", fetch)
        monkeypatch.setattr(executor, "fetch_row", fetch_row)
        for each in (query, *vectors[:8]):
            await mind.check(each)
            await mind.check(each, count=50)
        await mind.renew()
        checks = mind.resident.stats.checks
        await mind.check(vectors[70])
        assert mind.resident.stats.checks == checks + 1


async def rewrites(mind: Mind) -> int:
    """Count what is noted beside that the agent was created."""
    count: int = await mind.raw.fetchval(
        "SELECT count(*) FROM elizasql.memory_rewrites WHERE agent_id = $1 AND type <> ''", mind.db.agent_id
    )
    return count


async def test_rewrites_leave_a_number_each_that_ran_together(mind: Mind, dsn: str) -> None:
    await mind.remember(some_vectors(60))
    assert await rewrites(mind) == 0
    for number in range(5):
        await mind.writer.update_memory({"id": mind.ids[number], "content": {}})
        await mind.writer.delete_memories(mind.ids[10 + number : 12 + number])
    assert await rewrites(mind) == 1
    other = await asyncpg.connect(dsn)
    update = "UPDATE elizasql.memories SET content = '{\"by\": 1}' WHERE agent_id = $1 AND id = $2"
    for isolation in ("read_committed", "serializable"):
        # A transaction that began before the other one's, and ends after it; with what a savepoint takes back.
        async with other.transaction(isolation=isolation):
            await other.execute(update, mind.db.agent_id, mind.ids[0])
            saved = other.transaction()
            await saved.start()
            await other.execute(update, mind.db.agent_id, mind.ids[1])
            await saved.rollback()
            await mind.writer.update_memory({"id": mind.ids[2], "content": {isolation: 1}})
            await mind.check(some_vectors(3)[2])
            await mind.renew()
            await mind.check(some_vectors(3)[2])
            await other.execute(update, mind.db.agent_id, mind.ids[4])
        await mind.check(some_vectors(1)[0])
        await mind.check(some_vectors(5)[4])
        await mind.renew()
    await other.close()
    assert 2 <= await rewrites(mind) <= 3
    await mind.writer.delete_agent(mind.db.agent_id)
    assert await rewrites(mind) == 0
    assert await mind.db.search_memories(embedding=some_vectors(1)[0], table_name=TABLE) == []


@pytest.mark.parametrize("what", ["elizasql.memories, elizasql.embeddings", "one partition"])
async def test_truncated(make_db: MakeAdapter, own_database: str, what: str) -> None:
    """Tables that are emptied at once: no row says so."""
    db = await make_db(dsn=own_database, **RESIDENT)
    vectors = some_vectors(30)
    await db.create_memories([Memory(content={}, embedding=vector, unique=True) for vector in vectors], TABLE)
    assert len(await db.search_memories(embedding=vectors[0], table_name=TABLE)) == 10
    raw = await asyncpg.connect(own_database)
    if what == "one partition":
        part = await raw.fetchval("SELECT elizasql.partition_of($1)", db.agent_id)
        what = f"elizasql.{part}"
    await raw.execute(f"TRUNCATE {what}")
    await raw.close()
    assert await db.search_memories(embedding=vectors[0], table_name=TABLE) == []


@pytest.mark.parametrize("tables", [["memories"], ["embeddings"], ["memories", "embeddings"]])
async def test_where_policies_hold_the_server_searches(
    make_db: MakeAdapter, own_database: str, tables: list[str]
) -> None:
    """They may hide and show at any time what nobody has changed."""
    await make_db(dsn=own_database)
    raw = await asyncpg.connect(own_database)
    for table in tables:
        await raw.execute(f"""
            ALTER TABLE elizasql.{table} ENABLE ROW LEVEL SECURITY;
            ALTER TABLE elizasql.{table} FORCE ROW LEVEL SECURITY;
            CREATE POLICY guard ON elizasql.{table} USING (TRUE)
        """)
    db = await make_db(dsn=own_database, **RESIDENT)
    vectors = some_vectors(30)
    await db.create_memories([Memory(content={}, embedding=vector, unique=True) for vector in vectors], TABLE)
    for shown, count in (("TRUE", 30), ("FALSE", 0), ("TRUE", 30)):
        for table in tables:
            await raw.execute(f"ALTER POLICY guard ON elizasql.{table} USING ({shown})")
        assert len(await db.search_memories(embedding=vectors[0], table_name=TABLE, count=30)) == count
    assert (db._resident.stats.hits, db._resident.stats.loads) == (0, 0)
    await raw.close()


async def test_a_role_above_policies_is_answered_from_what_is_held(make_db: MakeAdapter, own_database: str) -> None:
    """The partitions are not named then, but nothing is hidden from it."""
    await make_db(dsn=own_database)
    raw = await asyncpg.connect(own_database)
    await raw.execute("ALTER TABLE elizasql.memories ENABLE ROW LEVEL SECURITY")  # and not FORCE: the owner sees all
    db = await make_db(dsn=own_database, **RESIDENT)
    assert db._executor.home is None
    vectors = some_vectors(30)
    await db.create_memories([Memory(content={}, embedding=vector, unique=True) for vector in vectors], TABLE)
    for _ in range(2):
        assert len(await db.search_memories(embedding=vectors[3], table_name=TABLE)) == 10
    assert (db._resident.stats.hits, db._resident.stats.checks) == (2, 2)
    await raw.close()


# --- the statements --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [30, 3000])
async def test_plans(mind: Mind, session: asyncpg.Connection[Any], size: int) -> None:
    vectors = some_vectors(size)
    await mind.remember(vectors)
    seen = await mind.raw.fetchval("SELECT pg_current_snapshot()::text")
    await mind.remember(some_vectors(10, seed=1))
    running = await mind.raw.fetchval("SELECT pg_current_xact_id()::text")
    await session.execute("ANALYZE elizasql.embeddings, elizasql.memories")
    common = {"agent_id": mind.db.agent_id, "type": TABLE, "most": 65, "life": "x"}
    snapshots = [seen, f"{running}:{int(running) + 1}:{running}"]
    by_xid, by_id = "agent_id_type_xid_idx", "_pkey"

    def scans(nodes: list[dict[str, Any]]) -> dict[str, int]:
        """Give the rows that were read from each index of the embeddings."""
        read: dict[str, int] = {}
        for node in nodes:
            if node.get("Index Name", "").startswith("embeddings") and node["Actual Loops"]:
                rows = node["Actual Rows"] + node.get("Rows Removed by Filter", 0)
                read[node["Index Name"]] = read.get(node["Index Name"], 0) + int(rows * node["Actual Loops"])
        return read

    for snapshot in snapshots:
        nodes = await plan_of(session, SQL["read_resident_changes"], {**common, "seen": snapshot}, execute=True)
        assert not scans_a_table(nodes)
        assert all(name.endswith(by_xid) for name in scans(nodes)) and scans(nodes)
        assert sum(scans(nodes).values()) == (10 if snapshot is seen else 0)
        params = {
            **common,
            "seen": snapshot,
            "embedding": _codecs.encode_vector(vectors[0]),
            "ids": mind.ids[:14],
            "only_unique": False,
            "count": 10,
            "include_embedding": True,
            "threshold": 0.1,
            "room_id": mind.rooms[0],
        }
        nodes = await plan_of(session, SQL["fetch_resident"], params, execute=True)
        assert not scans_a_table(nodes)
        assert all(name.endswith((by_xid, by_id)) for name in scans(nodes))
        assert sum(scans(nodes).values()) <= 14 + 2 * 10
        assert any(name.startswith("memories") and name.endswith(by_id) for name in indexes(nodes))
        params = {**common, "seen": snapshot, "listed": snapshot}
        nodes = await plan_of(session, SQL["check_resident"], params, execute=True)
        assert not scans_a_table(nodes)
        assert all(name.endswith(by_xid) for name in scans(nodes))
        assert sum(scans(nodes).values()) == (10 if snapshot is seen else 0)
        assert {"memory_rewrites_idx"} == {name for name in indexes(nodes) if name.startswith("memory_rewrites")}
        assert any(name.startswith("memories") and name.endswith(by_id) for name in indexes(nodes))
    nodes = await plan_of(session, SQL["list_resident"], {**common, "dimension": 384}, execute=True)
    assert not scans_a_table(nodes)
    assert sum(scans(nodes).values()) == size + 10
    nodes = await plan_of(session, SQL["read_resident_contents"], {**common, "ids": mind.ids[:14]}, execute=True)
    assert not scans_a_table(nodes) and all(name.endswith(by_id) for name in indexes(nodes))
    params = {**common, "after": "0", "page_size": 20}
    nodes = await plan_of(session, SQL["load_resident"], params, execute=True)
    assert not scans_a_table(nodes) and any(index.endswith(by_xid) for index in scans(nodes))
    nodes = await plan_of(session, SQL["measure_resident"], {**common, "most": 10, "dimension": 384}, execute=True)
    assert not scans_a_table(nodes)
    # Nothing is read from the table to count all rows of a type, once they are vacuumed.
    assert not any("dimension" in node.get("Filter", "") for node in nodes if node["Actual Loops"])


async def test_only_a_change_is_stamped(mind: Mind) -> None:
    (id,) = await mind.remember(some_vectors(1))

    async def stamp() -> int:
        return int(await mind.raw.fetchval("SELECT xid FROM elizasql.embeddings WHERE memory_id = $1", id))

    first = await stamp()
    await mind.writer.index_memories()
    await mind.writer.update_memory({"id": id, "content": {"other": 1}, "metadata": {"a": 1}})
    await mind.raw.execute("UPDATE elizasql.embeddings SET indexed = FALSE WHERE memory_id = $1", id)
    assert await stamp() == first
    statements = [
        "UPDATE elizasql.memories SET room_id = NULL WHERE id = $1",
        "UPDATE elizasql.embeddings SET entity_id = NULL WHERE memory_id = $1",
        "UPDATE elizasql.embeddings SET dim_384 = -1 * dim_384 WHERE memory_id = $1",
    ]
    statements[2] = "UPDATE elizasql.embeddings SET dim_384 = dim_384 + dim_384 WHERE memory_id = $1"
    for statement in statements:
        before = await stamp()
        await mind.raw.execute(statement, id)
        assert await stamp() > before
    await mind.raw.execute("UPDATE elizasql.embeddings SET xid = '99999999999' WHERE memory_id = $1", id)
    assert before < await stamp() < 99999999999


async def test_rows_with_numbers_of_another_server(mind: Mind) -> None:
    """A dump is restored before its triggers are there: such rows are loaded, and are no changes ever after."""
    await mind.remember(some_vectors(40))
    query = some_vectors(1, seed=8)[0]
    async with mind.raw.transaction():
        for trigger in ("embeddings_stamp_new", "embeddings_stamp_changed"):
            await mind.raw.execute(f"ALTER TABLE elizasql.embeddings DISABLE TRIGGER {trigger}")
        await mind.raw.execute(
            "UPDATE elizasql.embeddings SET xid = '4000000000000' WHERE agent_id = $1 AND memory_id = ANY($2)",
            *(mind.db.agent_id, mind.ids[:20]),
        )
        for trigger in ("embeddings_stamp_new", "embeddings_stamp_changed"):
            await mind.raw.execute(f"ALTER TABLE elizasql.embeddings ENABLE ALWAYS TRIGGER {trigger}")
    for _ in range(3):
        await mind.check(query, count=40)
    assert mind.resident.stats.changes == 0
    await mind.writer.update_memory({"id": mind.ids[0], "embedding": query})
    await mind.check(query, count=40)
    assert mind.resident.stats.changes == 1


async def test_another_scene(make_db: MakeAdapter) -> None:
    """Participants, worlds and rooms as agents have them."""
    db = await make_db(**RESIDENT)
    scene: Scene = await make_scene(db)
    vectors = some_vectors(10)
    for i, vector in enumerate(vectors):
        place = {"room_id": scene.room, "world_id": scene.world} if i % 2 else {}
        await db.create_memory(
            Memory(content={"i": i}, embedding=vector, entity_id=scene.entity, unique=True, **place), TABLE
        )
    hits = await db.search_memories(embedding=vectors[0], table_name=TABLE, world_id=scene.world)
    assert len(hits) == 5 and all(hit.room_id == scene.room for hit in hits)
    assert len(await db.search_memories(embedding=vectors[0], table_name=TABLE, entity_id=scene.other)) == 0
