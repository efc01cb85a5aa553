"""Search: against exact answers by numpy, over scopes, tails, deletes and skew."""

from __future__ import annotations

import asyncio
import copy
import inspect
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import elizasql
from elizasql import ArgumentError, DatabaseAdapter, EmbeddingDimensionError, Entity, Memory, Room, World, _codecs
from elizasql import memories as _memories
from elizasql._statements import SQL, Statement
from elizasql.memories import _Where, check_search, contains

from .conftest import MakeAdapter, Scene, database, make_scene, neighbour_of

Vectors = NDArray[np.float32]


def clustered(
    number: int, dimension: int = 384, *, clusters: int = 30, seed: int = 0
) -> tuple[Vectors, NDArray[np.int64]]:
    """Give vectors in clusters of skewed sizes, and the cluster of each: nearer to real embeddings than noise is."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, clusters + 1)
    topics = rng.choice(clusters, size=number, p=share / share.sum())
    centers = np.random.default_rng(99).normal(size=(clusters, dimension))
    spread = np.random.default_rng(98).exponential(size=dimension)
    return (centers[topics] + rng.normal(size=(number, dimension)) * spread).astype(np.float32), topics


def exact(unit: Vectors, query: Vectors, among: NDArray[np.bool_], count: int) -> set[int]:
    similarity = np.where(among, unit @ (query / np.linalg.norm(query)), -2)
    return set(np.argsort(-similarity)[: min(count, int(among.sum()))].tolist())


class Loaded:
    """An agent with memories of known vectors."""

    def __init__(self, db: DatabaseAdapter, scene: Scene, vectors: Vectors, topics: NDArray[np.int64]) -> None:
        self.db = db
        self.scene = scene
        self.vectors = vectors
        self.topics = topics
        self.rooms: list[UUID] = []
        self.ids: list[UUID] = []
        self.there = np.ones(len(vectors), bool)
        self._unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    async def fill(self) -> None:
        self.rooms = await self.db.create_rooms(
            [Room(source="t", type="GROUP", world_id=self.scene.world) for _ in range(int(self.topics.max()) + 1)]
        )
        self.ids = await self.db.create_memories(
            [
                Memory(
                    room_id=self.rooms[topic],
                    entity_id=self.scene.entity if i % 3 else self.scene.other,
                    world_id=self.scene.world if i % 2 else None,
                    content={"i": i},
                    embedding=vector,
                    unique=i % 4 != 0,
                )
                for i, (vector, topic) in enumerate(zip(self.vectors, self.topics, strict=True))
            ],
            "messages",
        )

    async def recall(self, queries: Vectors, among: NDArray[np.bool_], count: int = 10, **filters: Any) -> float:
        """Give the mean recall over the queries; fail where rows are missing or out of order."""
        among = among & self.there
        shares = []
        for query in queries:
            hits = await self.db.search_memories(embedding=query, table_name="messages", count=count, **filters)
            assert len(hits) == min(count, int(among.sum()))
            similarities = [hit.similarity or 0 for hit in hits]
            assert similarities == sorted(similarities, reverse=True)
            found = {hit.content["i"] for hit in hits if hit.content}
            assert len(found) == len(hits)
            assert all(among[i] for i in found)
            wanted = exact(self._unit, query, among, count)
            shares.append(len(found & wanted) / len(wanted) if wanted else 1.0)
        return float(np.mean(shares))


@pytest.fixture
async def alone(make_db: MakeAdapter, own_database: str) -> DatabaseAdapter:
    """Give an agent without neighbours: how large a part of the graph a scope is, and what it hides, hangs on these."""
    return await make_db(dsn=own_database)


@pytest.fixture(scope="module")
def loaded_template(dsn: str, migrated_template: str) -> Iterator[tuple[str, Loaded]]:
    """Give a database with an agent of 6,000 memories, none of them indexed, and what is in it."""

    async def fill(address: str) -> Loaded:
        async with elizasql.connect(agent_id=uuid4(), dsn=address, indexing="manual", pool_min_size=0) as db:
            await db.ensure_agent_exists({"name": "loaded"})
            await db.ensure_embedding_dimension(384)
            loaded = Loaded(db, await make_scene(db), *clustered(6000))
            await loaded.fill()
            return loaded

    with database(dsn, migrated_template) as made:
        yield made, asyncio.run(fill(made))


@pytest.fixture
def loaded_database(dsn: str, loaded_template: tuple[str, Loaded]) -> Iterator[str]:
    with database(dsn, loaded_template[0]) as made:
        yield made


@pytest.fixture
async def loaded(make_db: MakeAdapter, loaded_database: str, loaded_template: tuple[str, Loaded]) -> Loaded:
    """Give an agent of 6,000 memories without neighbours."""
    loaded = copy.copy(loaded_template[1])
    loaded.there = loaded.there.copy()
    loaded.db = await make_db(loaded.db.agent_id, dsn=loaded_database)
    return loaded


# To build the graph as a whole takes a tenth of the time of putting in one after the other.
@pytest.mark.parametrize("rebuild", [True, pytest.param(False, marks=pytest.mark.slow)])
async def test_recall_over_every_scope_tail_and_delete(loaded: Loaded, rebuild: bool) -> None:
    """One long walk over one load: empty index, half indexed, all indexed, half deleted."""
    db, scene = loaded.db, loaded.scene
    queries, _ = clustered(12, seed=7)
    position = np.arange(len(loaded.vectors))

    async def check(least: float) -> None:
        assert await loaded.recall(queries, position >= 0) >= least
        assert await loaded.recall(queries, position % 4 != 0, unique=True) >= least
        assert await loaded.recall(queries, position % 3 != 0, entity_id=scene.entity) >= least
        assert await loaded.recall(queries[:4], position % 2 == 1, world_id=scene.world) >= least
        # Two filters: large ones together, by HNSW; and one that is small enough to be scanned.
        for entity, its in ((scene.entity, position % 3 != 0), (scene.other, position % 3 == 0)):
            both = its & (position % 2 == 1)
            assert await loaded.recall(queries[:4], both, entity_id=entity, world_id=scene.world) >= least
        assert await loaded.recall(queries[:2], position >= 0, count=300) >= least
        for topic in (0, 1, 5, int(loaded.topics.max())):
            in_room = loaded.topics == topic
            room = loaded.rooms[topic]
            assert await loaded.recall(queries[:4], in_room, room_id=room) >= least
            both = in_room & (position % 3 == 0)
            assert await loaded.recall(queries[:2], both, room_id=room, entity_id=scene.other) >= least

    await check(1.0)
    while await db.index_memories(rebuild=rebuild) == 0:
        pass
    await check(0.97)
    # A new tail: half of the vectors are written anew.
    changed = [{"id": loaded.ids[i], "embedding": loaded.vectors[i]} for i in range(0, 1000, 2)]
    await db.update_memories(changed)
    await check(0.97)
    gone = [i for i in range(6000) if i % 2]
    await db.delete_memories([loaded.ids[i] for i in gone])
    loaded.there[gone] = False
    await check(0.97)


async def test_near_duplicates_in_large_scopes(loaded: Loaded) -> None:
    """Above 2,000 rows HNSW looks at the agent as a whole, not at the scope."""
    db, scene, vectors = loaded.db, loaded.scene, loaded.vectors

    async def is_unique(vector: Vectors, **scope: UUID | None) -> bool | None:
        memory = Memory(content={}, embedding=vector, **{"entity_id": scene.entity, **scope})  # type: ignore[arg-type]
        id = await db.create_memory(memory, "messages")
        stored = await db.get_memory_by_id(id)
        await db.delete_memory(id)
        assert stored is not None
        return stored.unique

    def near(vector: Vectors, similarity: float, seed: int = 0) -> Vectors:
        unit = vector / np.linalg.norm(vector)
        other = np.random.default_rng(seed).normal(size=len(vector))
        other -= other @ unit * unit
        turned = similarity * unit + (1 - similarity**2) ** 0.5 * other / np.linalg.norm(other)
        return turned.astype(np.float32)  # type: ignore[no-any-return]

    async def check() -> None:
        for i in (1, 7, 13, 31):  # of scene.entity, in scene.world
            assert await is_unique(near(vectors[i], 0.951)) is False
            assert await is_unique(near(vectors[i], 0.951), entity_id=None, world_id=scene.world) is False
            assert await is_unique(near(vectors[i], 0.951), entity_id=None) is False
            assert await is_unique(near(vectors[i], 0.949)) is True
        for i in (0, 6, 12):  # of scene.other, in no world
            assert await is_unique(vectors[i]) is True
            assert await is_unique(vectors[i], entity_id=None, world_id=scene.world) is True

    await check()
    await db.index_memories(rebuild=True)
    await check()
    # More of them elsewhere than are looked at first; then one in the scope, farther away than those.
    much = near(vectors[0], 0.5)
    await db.create_memories(
        [
            Memory(entity_id=scene.other, content={}, embedding=near(much, 0.999, seed), unique=True)
            for seed in range(40)
        ],
        "messages",
    )
    while await db.index_memories() == 0:
        pass
    assert await is_unique(much) is True
    await db.create_memory(
        Memory(entity_id=scene.entity, content={}, embedding=near(much, 0.96), unique=True), "messages"
    )
    assert await is_unique(much) is False
    while await db.index_memories() == 0:
        pass
    assert await is_unique(much) is False


async def test_a_rare_type_among_many_is_found_whole(loaded: Loaded) -> None:
    db = loaded.db
    await db.create_memories(
        [Memory(content={"i": i}, embedding=loaded.vectors[i], unique=True) for i in range(25)], "facts"
    )
    await db.index_memories(rebuild=True)
    for _ in range(3):
        hits = await db.search_memories(embedding=loaded.vectors[3], table_name="facts", count=25)
        assert [hit.content["i"] for hit in hits][:1] == [3]  # type: ignore[index]
        assert len(hits) == 25


async def test_a_scope_that_shrinks_after_it_was_measured(loaded: Loaded) -> None:
    """The choice of HNSW is remembered for a minute; the rows are complete all the same."""
    db = loaded.db
    await db.index_memories(rebuild=True)
    query = loaded.vectors[0]
    scopes: list[dict[str, Any]] = [{}, {"entity_id": loaded.scene.entity}]
    left = [set(loaded.ids[:7]), {loaded.ids[i] for i in range(7) if i % 3}]
    for scope in scopes:
        assert len(await db.search_memories(embedding=query, table_name="messages", **scope)) == 10
    assert [by_hnsw for by_hnsw, *_ in db._measured.values()] == [True, True]
    await db.delete_memories(loaded.ids[7:])
    for scope, ids in zip(scopes, left, strict=True):
        hits = await db.search_memories(embedding=query, table_name="messages", **scope)
        assert {hit.id for hit in hits} == ids


@pytest.mark.parametrize(
    "filters",
    [
        (),
        *(
            pytest.param(names, marks=pytest.mark.slow)
            for names in [("room_id",), ("entity_id",), ("world_id",), ("room_id", "entity_id")]
        ),
    ],
)
async def test_the_tail_does_not_hide_what_hnsw_has_not_reached(
    alone: DatabaseAdapter, make_db: MakeAdapter, own_database: str, filters: tuple[str, ...]
) -> None:
    """HNSW ends its scan among those that do not match; the tail has enough rows, but further ones."""
    scene = await make_scene(alone)
    rng = np.random.default_rng(5)
    query = np.eye(1, 384, dtype=np.float32)[0]

    def memories(number: int, similarity: float, unique: bool) -> list[Memory]:
        others = rng.normal(size=(number, 384))
        others[:, 0] = 0
        others *= np.sqrt(1 - similarity**2) / np.linalg.norm(others, axis=1, keepdims=True)
        others[:, 0] = similarity
        about: dict[str, Any] = {"room_id": scene.room, "entity_id": scene.entity, "world_id": scene.world}
        return [Memory(content={}, embedding=vector, unique=unique, **about) for vector in others]

    await alone.create_memories([*memories(2500, 0.9, unique=False), *memories(8, 0.5, unique=True)], "messages")
    await alone.index_memories(rebuild=True)
    await alone.create_memories(memories(12, 0.1, unique=True), "messages")
    separator = "&" if "?" in own_database else "?"
    db = await make_db(alone.agent_id, dsn=f"{own_database}{separator}hnsw.max_scan_tuples=200")
    scope = {name: getattr(scene, name.removesuffix("_id")) for name in filters}
    for _ in range(2):
        hits = await db.search_memories(embedding=query, table_name="messages", unique=True, **scope)
        assert [round(hit.similarity or 0, 1) for hit in hits] == [0.5] * 8 + [0.1] * 2
        # HNSW was the way, the first time and from then on.
        assert [by_hnsw for by_hnsw, *_ in db._measured.values()] == [True]


@pytest.mark.parametrize("way", ["index_memories", pytest.param("load_memories", marks=pytest.mark.slow)])
async def test_a_scope_that_grows_is_measured_anew(alone: DatabaseAdapter, round_trips: list[str], way: str) -> None:
    """What was small may be large once it is indexed: nobody waits ten seconds for that."""
    db = alone
    vectors, _ = clustered(2500, seed=3)
    memories = [Memory(content={}, embedding=vector, unique=True) for vector in vectors]
    await db.create_memories(memories[:500], "facts")
    await db.search_memories(embedding=vectors[0], table_name="facts")
    if way == "index_memories":
        await db.create_memories(memories[500:], "facts")
        await db.index_memories(rebuild=True)
    else:
        await db.load_memories(memories[500:], "facts")
    for name in ("search_memories", "search_memories_by_hnsw"):
        round_trips.clear()
        assert len(await db.search_memories(embedding=vectors[0], table_name="facts")) == 10
        assert round_trips == [db._executor.text(SQL.at(name, 384), {"agent_id": db.agent_id})]


async def test_how_large_a_scope_is_holds_for_a_while(db: DatabaseAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is kept in mind of scopes has an end, however many are asked for."""
    [vector], _ = clustered(1)
    kinds = [f"t{number}" for number in range(12)]
    for kind in kinds:
        await db.create_memory(Memory(content={}, embedding=vector, unique=True), kind)
    fetch, measured = db._executor.fetch, 0

    async def note(statement: Statement, **params: Any) -> list[asyncpg.Record]:
        nonlocal measured
        measured += params["by_hnsw"] is None
        return await fetch(statement, **params)

    monkeypatch.setattr(db._executor, "fetch", note)
    monkeypatch.setattr(_memories, "_SMALL_TTL", 3600.0)

    async def search(kind: str) -> int:
        assert len(await db.search_memories(embedding=vector, table_name=kind)) == 1
        return measured

    assert await search(kinds[0]) == 1
    [(scope, found)] = db._measured.items()
    assert [await search(kinds[0]) for _ in range(2)] == [1, 1]
    assert db._measured == {scope: found} and found[2] > time.monotonic()
    db._measured[scope] = (*found[:2], time.monotonic())
    assert [await search(kinds[0]) for _ in range(3)] == [2, 2, 2]
    monkeypatch.setattr(_memories, "_MOST_MEASURED", 5)
    for kind in kinds:
        await search(kind)
        assert len(db._measured) <= 5
    assert measured == 2 + 11


async def test_recall_is_chosen_for_a_search(loaded: Loaded, round_trips: list[str]) -> None:
    db = loaded.db
    await db.index_memories(rebuild=True)
    queries, _ = clustered(40, seed=5)
    everywhere = np.ones(len(loaded.vectors), bool)
    found = {}
    ways: list[dict[str, Any]] = [{"recall": "fast"}, {}, {"ef_search": 1}, {"recall": "exact"}, {"ef_search": 1000}]
    for way in ways:
        found[str(way)] = await loaded.recall(queries, everywhere, **way)
    assert found["{'recall': 'exact'}"] == 1.0
    assert found["{'ef_search': 1000}"] >= 0.99
    assert min(found.values()) >= 0.9
    kept = {key[1]: (by_hnsw, ef) for key, (by_hnsw, ef, _) in db._measured.items()}
    assert kept == {asked: (True, str(asked)) for asked in (50, 100, 1, 1000)}
    # What one asks for does not hold for those that follow in its transaction; the exact one asks HNSW for nothing.
    show = Statement("show", "SHOW hnsw.ef_search", (), "", "")
    async with db.transaction() as transaction:
        for way, in_force in zip(ways, ("50", "100", "1", "1", "1000"), strict=True):
            round_trips.clear()
            await transaction.search_memories(embedding=queries[0], table_name="messages", **way)
            assert len(round_trips) == 1
            assert await transaction._executor.fetch_value(show) == in_force


async def test_recall_that_makes_no_sense_is_refused(db: DatabaseAdapter) -> None:
    query = np.ones(384, np.float32)
    refused: list[dict[str, Any]] = [
        {"recall": "best"},
        {"recall": None},
        {"recall": []},
        *({"ef_search": ef_search} for ef_search in (0, 1001, True, 40.0)),
        {"recall": "exact", "ef_search": 40},
    ]
    for wrong in refused:
        with pytest.raises(ArgumentError):
            await db.search_memories(embedding=query, table_name="messages", **wrong)


ONE_PARTITION = """
    SELECT (array_agg(id))[:$1] FROM (SELECT gen_random_uuid() AS id FROM generate_series(1, $1 * 16)) AS new
    GROUP BY elizasql.partition_of(id) HAVING count(*) >= $1 LIMIT 1
"""


async def test_many_agents_share_a_partition_without_mixing(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    vectors, topics = clustered(300, clusters=3)
    agents = []
    for id in await raw.fetchval(ONE_PARTITION, 6):
        db = await make_db(id, pool_max_size=1)
        loaded = Loaded(db, await make_scene(db), vectors, topics)
        await loaded.fill()
        await db.index_memories()
        agents.append(loaded)
    for loaded in agents:
        assert await loaded.recall(vectors[:3], np.ones(300, bool), count=50) == 1.0
        hits = await loaded.db.search_memories(embedding=vectors[0], table_name="messages", count=1000)
        assert len(hits) == 300 and {hit.agent_id for hit in hits} == {loaded.db.agent_id}


async def test_a_written_vector_is_found_at_once(db: DatabaseAdapter) -> None:
    vectors, _ = clustered(200)
    for i, vector in enumerate(vectors[:20]):
        id = await db.create_memory(Memory(content={"i": i}, embedding=vector, unique=True), "messages")
        assert (await db.search_memories(embedding=vector, table_name="messages", count=1))[0].id == id
    ids = await db.create_memories(
        [Memory(content={"i": i}, embedding=vector, unique=True) for i, vector in enumerate(vectors)], "facts"
    )
    for id, vector in zip(ids, vectors, strict=True):
        assert (await db.search_memories(embedding=vector, table_name="facts", count=1))[0].id == id


async def test_threshold_count_and_ties(db: DatabaseAdapter) -> None:
    base = np.zeros(384, np.float32)
    base[0] = 1
    other = np.zeros(384, np.float32)
    other[1] = 1
    same = await db.create_memories(
        [Memory(content={"text": str(i)}, embedding=base, unique=True) for i in range(8)], "messages"
    )
    opposite, across = await db.create_memories(
        [Memory(content={}, embedding=-base, unique=True), Memory(content={}, embedding=other, unique=True)], "messages"
    )

    async def ids(**options: Any) -> list[UUID | None]:
        return [hit.id for hit in await db.search_memories(embedding=base, table_name="messages", **options)]

    assert await ids(count=5) == sorted(same)[:5]
    assert await ids(limit=5) == sorted(same)[:5]
    assert await ids() == [*sorted(same), across, opposite]
    assert await ids(match_threshold=0.5) == await ids(match_threshold=np.float32(0.5)) == sorted(same)
    # 0 is a threshold, None is none.
    assert await ids(match_threshold=0) == [*sorted(same), across]
    assert await ids(match_threshold=-1) == [*sorted(same), across, opposite]
    assert await ids(match_threshold=1) == sorted(same)
    assert await ids(count=0) == []
    with pytest.raises(ArgumentError):
        await ids(count=3, limit=4)
    assert [hit.id for hit in await db.search_memories_by_embedding(base, table_name="messages", count=2)] == sorted(
        same
    )[:2]
    assert await db.search_memories(embedding=base, table_name="nothing") == []


@settings(max_examples=25)
@given(scale=st.floats(1e-4, 6e4), seed=st.integers(0, 50))
async def test_similarity_is_the_cosine_whatever_the_norm(make_db: MakeAdapter, scale: float, seed: int) -> None:
    db = await make_db()
    rng = np.random.default_rng(seed)
    a, b = rng.uniform(-1, 1, size=(2, 384)).astype(np.float32)
    await db.create_memory(Memory(content={}, embedding=a * np.float32(scale), unique=True), "messages")
    await db.index_memories()
    hit = (await db.search_memories(embedding=b / np.float32(scale), table_name="messages"))[0]
    cosine = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert hit.similarity == pytest.approx(cosine, abs=1e-4)


async def test_a_search_with_the_embedding_in_front_leaves_nothing_out(
    db: DatabaseAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    async def note(**options: Any) -> list[Memory]:
        given.update(options)
        return []

    names = set(inspect.signature(db.search_memories).parameters) - {"query", "timeout"}
    asked = {name: object() for name in names}
    monkeypatch.setattr(db, "search_memories", note)
    await db.search_memories_by_embedding(**asked)  # type: ignore[arg-type]
    assert given == asked


async def test_a_wrong_width_is_refused_without_a_search(db: DatabaseAdapter, round_trips: list[str]) -> None:
    with pytest.raises(EmbeddingDimensionError) as caught:
        await db.search_memories(embedding=np.ones(768), table_name="messages")
    assert (caught.value.locked, caught.value.given) == (384, 768)
    assert round_trips == [SQL["get_embedding_dimension"].sql]


@pytest.mark.parametrize("way", ["off", "required", "transaction"])
async def test_an_agent_that_was_made_anew_has_nothing_to_search(make_db: MakeAdapter, way: str) -> None:
    """Its adapter still knows the width of the one that was deleted; the new one has none."""
    db = await make_db(resident="off" if way == "transaction" else way)
    vector = np.ones(384, np.float32)
    about: dict[str, Any] = {"embedding": vector, "table_name": "messages"}
    await db.create_memory(Memory(content={}, embedding=vector, unique=True), "messages")
    assert len(await db.search_memories(**about)) == 1
    await db.delete_agent(db.agent_id)
    assert await db.search_memories(**about) == []
    await db.ensure_agent_exists({"name": "anew"})
    if way == "transaction":
        async with db.transaction() as tx:
            assert await tx.search_memories(**about) == []
            assert await tx.get_memories(table_name="messages") == []
    else:
        assert await db.search_memories(**about) == []
    await db.ensure_embedding_dimension(512)
    with pytest.raises(EmbeddingDimensionError):
        await db.search_memories(**about)


async def test_other_worlds_and_entities_are_left_out(db: DatabaseAdapter, agent_world: Scene) -> None:
    await db.create_world(World(id=uuid4()))
    await db.create_entity(Entity(id=(lone := uuid4())))
    vector = np.ones(384, np.float32)
    await db.create_memory(Memory(content={}, embedding=vector, entity_id=lone), "messages")
    assert await db.search_memories(embedding=vector, table_name="messages", entity_id=agent_world.entity) == []
    assert await db.search_memories(embedding=vector, table_name="messages", world_id=agent_world.world) == []
    assert len(await db.search_memories(embedding=vector, table_name="messages", entity_id=lone)) == 1


# --- filters of time and metadata ------------------------------------------------------------------------------------


class AlwaysByIndex(dict[Any, Any]):
    """What is measured of scopes, as if all were large."""

    def get(self, key: Any, default: Any = None) -> Any:
        return (True, "1000", float("inf"))


@pytest.mark.parametrize("way", ["measured", "index", "exact"])
async def test_nothing_that_does_not_belong_takes_a_place(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any], way: str
) -> None:
    """The nearest are another agent's, of the same ids or not, and of the own those that a filter leaves out."""
    other = await make_db(UUID(int=uuid4().int >> 64))  # whose rows come first by the agent's id
    db = await make_db(await neighbour_of(other.agent_id, raw))
    scene = await make_scene(db)
    await make_scene(other, scene)
    room, world = uuid4(), uuid4()
    await db.create_world(World(id=world, name="elsewhere"))
    await db.create_room(Room(id=room, source="t", type="DM"))
    await raw.execute("SELECT elizasql.build_index($1)", db.agent_id)
    rng = np.random.default_rng(11)
    query, away = rng.normal(size=(2, 384)).astype(np.float32)
    began = datetime(2026, 1, 1, microsecond=500, tzinfo=timezone.utc)
    fit: dict[str, Any] = {"room_id": scene.room, "entity_id": scene.entity, "world_id": scene.world, "unique": True}
    fit |= {"metadata": {"fits": True}, "created_at": began}
    misfits: list[dict[str, Any]] = [
        {"unique": False},
        {"room_id": room},
        {"entity_id": scene.other},
        {"world_id": world},
        {"metadata": {"fits": False}},
        {"created_at": began - timedelta(microseconds=1)},
        {"created_at": began + timedelta(microseconds=1)},
    ]
    # The smallest of several scopes is the one that is gone through.
    misfits.append(misfits[["", "measured", "index", "exact"].index(way)])
    stored: list[tuple[float, UUID, dict[str, Any]]] = []
    for number in range(2):  # in the index, then in the tail
        for place, fields in enumerate([*({**fit, **misfit} for misfit in misfits), *[fit] * 4]):
            distance, id = 0.001 * (1 + place), uuid4()
            vector = query + np.float32(distance) * away
            await other.create_memory(Memory(id=id, content={}, embedding=query, **fit), "messages")
            await db.create_memory(Memory(id=id, content={}, embedding=vector, **fields), "messages")
            stored.append((distance, id, fields))
        await db.create_memory(Memory(content={}, embedding=query, **fit), "facts")
        await other.create_memories([Memory(content={}, embedding=query, **fit) for _ in range(60)], "messages")
        if number == 0:
            await db.index_memories()
            await other.index_memories()
    if way == "index":
        db._measured = AlwaysByIndex()
    far = (query + np.float32(0.0055) * away).astype(np.float64)
    between = float(far @ query / np.linalg.norm(far) / np.linalg.norm(query.astype(np.float64)))
    scopes = ("room_id", "entity_id", "world_id")
    for kept in itertools.product([False, True], repeat=3):
        scope = {word: fit[word] for word, keep in zip(scopes, kept, strict=True) if keep}
        for unique, where, count in itertools.product(
            [False, True], [None, "match_threshold", "metadata", "start", "end"], [3, 8, 30]
        ):
            if where not in {None, "match_threshold"} and way != "exact":
                continue
            tells = {"metadata": fit["metadata"], "start": began, "end": began, "match_threshold": between}
            asked = {where: tells[where]} if where else {}
            expected = [
                (distance, id)
                for distance, id, fields in stored
                if all(fields[word] == value for word, value in scope.items())
                and (fields["unique"] or not unique)
                and (where != "match_threshold" or distance < 0.0055)
                and (where != "metadata" or fields["metadata"] == fit["metadata"])
                and (where != "start" or fields["created_at"] >= began)
                and (where != "end" or fields["created_at"] <= began)
            ]
            found = await db.search_memories(
                embedding=query,
                table_name="messages",
                count=count,
                unique=unique,
                recall="exact" if way == "exact" else "balanced",
                include_embedding=True,
                **scope,
                **asked,
            )
            assert [memory.id for memory in found] == [id for _, id in sorted(expected)][:count], (scope, unique, asked)
            assert {memory.agent_id for memory in found} <= {db.agent_id}
            if way == "index" and not scope and not where:
                # The statement that measures goes by the index, too, where it finds much more than there is here.
                params = check_search(
                    db.agent_id,
                    db.config,
                    "messages",
                    None,
                    count,
                    None,
                    unique,
                    None,
                    None,
                    None,
                    False,
                    "balanced",
                    None,
                ).params
                rows = await db._executor.fetch(
                    SQL.at("search_memories", 384),
                    embedding=_codecs.encode_vector(query),
                    by_hnsw=True,
                    known_ef="1000",
                    **params,
                )
                assert [row["id"] for row in rows] == [memory.id for memory in found], (unique, count)


@pytest.mark.parametrize("resident", ["off", "required"])
async def test_what_the_memory_itself_tells_filters(
    make_db: MakeAdapter, resident: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never short, and in order: among the nearest, and where too few of them pass, among all that pass."""
    db = await make_db(resident=resident)
    scene = await make_scene(db)
    vectors, topics = clustered(600, clusters=4)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    rooms = await db.create_rooms([Room(source="t", type="GROUP", world_id=scene.world) for _ in range(4)])
    began = datetime(2026, 1, 1, tzinfo=timezone.utc)
    at = [began + timedelta(hours=i * 7 % 600) for i in range(600)]
    metadata = [
        {"kind": ["a", "b", "c"][i % 3], "rare": i % 100 == 0, "tags": [i % 5, {"n": i % 7}]} for i in range(600)
    ]
    ids = await db.create_memories(
        [
            Memory(
                room_id=rooms[topics[i]],
                entity_id=scene.entity if i % 2 else scene.other,
                world_id=scene.world if i % 3 else None,
                content={},
                metadata=metadata[i],
                created_at=at[i],
                embedding=vectors[i],
                unique=i % 4 != 0,
            )
            for i in range(600)
        ],
        "messages",
    )
    number = {id: i for i, id in enumerate(ids)}
    await db.index_memories()
    filters: list[tuple[dict[str, Any], Callable[[int], bool]]] = [
        ({"metadata": {}}, lambda i: True),
        ({"metadata": {"kind": "a"}}, lambda i: i % 3 == 0),
        ({"metadata": {"rare": True}}, lambda i: i % 100 == 0),
        ({"metadata": {"rare": 1}}, lambda i: False),
        ({"metadata": {"tags": [4, {"n": 2}]}}, lambda i: i % 5 == 4 and i % 7 == 2),
        ({"metadata": {"kind": "b"}, "unique": True}, lambda i: i % 3 == 1 and i % 4 != 0),
        ({"start": at[100]}, lambda i: at[i] >= at[100]),
        ({"end": at[100]}, lambda i: at[i] <= at[100]),
        ({"start": at[5], "end": at[5], "metadata": {"kind": "c"}}, lambda i: at[i] == at[5]),
        ({"start": at[3], "end": at[80], "metadata": {"kind": "a"}}, lambda i: at[3] <= at[i] <= at[80] and i % 3 == 0),
    ]
    scopes: list[tuple[dict[str, Any], Callable[[int], bool]]] = [
        ({}, lambda i: True),
        ({"room_id": rooms[0]}, lambda i: topics[i] == 0),
        ({"entity_id": scene.other}, lambda i: i % 2 == 0),
        ({"world_id": scene.world}, lambda i: i % 3 > 0),
        ({"room_id": rooms[1], "entity_id": scene.entity}, lambda i: topics[i] == 1 and i % 2 == 1),
    ]
    for (where, passes), (scope, inside), count in itertools.product(filters, scopes, (1, 10, 60)):
        query = vectors[count] + np.float32(0.1)
        among = np.array([passes(i) and inside(i) for i in range(600)])
        similarity = np.where(among, unit @ (query / np.linalg.norm(query)), -2)
        wanted = np.argsort(-similarity, kind="stable")[: min(count, among.sum())]
        hits = await db.search_memories(embedding=query, table_name="messages", count=count, **where, **scope)
        assert [number[hit.id] for hit in hits] == wanted.tolist(), (where, scope, count)
        least = float(similarity[wanted[len(wanted) // 2]]) - 1e-5 if len(wanted) else 0.0
        hits = await db.search_memories_by_embedding(
            query, table_name="messages", count=count, match_threshold=least, **where, **scope
        )
        assert [number[hit.id] for hit in hits] == [i for i in wanted if similarity[i] >= least], (where, scope, count)


async def test_filters_take_one_round_trip_where_enough_of_the_nearest_pass(
    alone: DatabaseAdapter, round_trips: list[str]
) -> None:
    db = alone
    vectors = np.random.default_rng(3).normal(size=(1000, 384)).astype(np.float32)
    await db.create_memories(
        [
            Memory(
                content={}, metadata={"tenth": i % 10 == 0, "hundredth": i % 100 == 0}, embedding=vector, unique=True
            )
            for i, vector in enumerate(vectors)
        ],
        "messages",
    )
    for metadata, options, statements in (
        ({"tenth": False}, {}, 1),
        ({"hundredth": True}, {}, 2),
        ({"tenth": False}, {"recall": "exact"}, 1),
        ({"tenth": False}, {"count": 1001}, 1),
    ):
        round_trips.clear()
        hits = await db.search_memories(
            embedding=vectors[0], table_name="messages", metadata=metadata, include_embedding=True, **options
        )
        assert len(hits) == min(options.get("count", 10), 900) and len(round_trips) == statements
        assert all(hit.embedding is not None for hit in hits)
    round_trips.clear()
    for bad in ({"metadata": "x"}, {"start": "soon"}, {"end": datetime(2026, 1, 1)}):  # noqa: DTZ001
        with pytest.raises(ArgumentError, match=next(iter(bad))):
            await db.search_memories(embedding=vectors[0], table_name="messages", **bad)
    assert not round_trips


@pytest.mark.parametrize("resident", ["off", "required"])
async def test_a_number_that_no_float_holds_keeps_no_other_row_from_being_read(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any], resident: str
) -> None:
    db = await make_db(resident=resident)
    vectors = np.random.default_rng(1).normal(size=(3, 384)).astype(np.float32)
    ids = await db.create_memories([{"content": {"text": "x"}, "embedding": each} for each in vectors], "messages")
    content = '{"n": 1e400, "m": -1e400, "i": 9007199254740993, "j": 123456789012345678901234567890}'
    await raw.execute("UPDATE elizasql.memories SET content = $2 WHERE id = $1", ids[1], content)
    for _ in range(3):
        found = {memory.id: memory.content for memory in await db.get_memories(table_name="messages")}
        hits = await db.search_memories(embedding=vectors[1], table_name="messages")
        assert {memory.id: memory.content for memory in hits} == found
        assert found == {
            **{id: {"text": "x"} for id in ids},
            ids[1]: {"n": math.inf, "m": -math.inf, "i": 9007199254740993, "j": 1.2345678901234568e29},
        }
        task = db._resident._tiers["messages", 384].loading if resident == "required" else None
        if task is not None:
            await task


# Of floats of 1e16 and more the server gives all digits.
_LARGE = [1.7648123456789012e18, -3e16, 1e17, 2**53 + 1, 2.0**60, 1e19, 1.8446744073709552e19, 1e22, 5e-324]
_PARTS = st.recursive(
    st.sampled_from([None, True, False, 0, 1, 1.0, 1.5, -1, -0.0, "", "a", "1", *_LARGE]) | st.floats(1e15, 1e20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
_OBJECTS = st.dictionaries(st.sampled_from("abc"), _PARTS, max_size=3)


@st.composite
def parts_of(draw: st.DrawFn, value: Any) -> Any:
    """Give what is contained in a value, more often than not."""
    if isinstance(value, dict):
        kept = draw(st.lists(st.sampled_from(sorted(value)), unique=True)) if value else []
        return {key: draw(parts_of(value[key])) for key in kept}
    if isinstance(value, list):
        return [draw(parts_of(value[i])) for i in (draw(st.lists(st.integers(0, len(value) - 1))) if value else [])]
    return value


@settings(max_examples=40)
@given(data=st.data())
async def test_metadata_contain_what_the_server_says_they_contain(
    raw: asyncpg.Connection[Any], data: st.DataObject
) -> None:
    values = data.draw(st.lists(_OBJECTS, min_size=20, max_size=20))
    parts = [data.draw(_OBJECTS | parts_of(value)) for value in values]
    said = await raw.fetch(
        "SELECT v::text AS value, v @> p AS contains FROM unnest($1::text[]::jsonb[], $2::text[]::jsonb[]) AS g (v, p)",
        [json.dumps(value) for value in values],
        [json.dumps(part) for part in parts],
    )
    for part, row in zip(parts, said, strict=True):
        where = _Where.read(None, None, part)
        value = orjson.loads(row["value"])
        assert contains(value, where.metadata) == row["contains"], (value, part)


async def test_metadata_with_large_floats_are_found(alone: DatabaseAdapter) -> None:
    [vector] = np.random.default_rng(3).normal(size=(1, 384)).astype(np.float32)
    metadata = {"at": 1.7648123456789012e18}
    await alone.create_memory(Memory(content={}, metadata=metadata, embedding=vector, unique=True), "messages")
    for recall in ("balanced", "exact"):
        found = await alone.search_memories(embedding=vector, table_name="messages", metadata=metadata, recall=recall)  # type: ignore[arg-type]
        assert len(found) == 1


def test_metadata_of_many_levels() -> None:
    lists: Any = 1
    objects: Any = 1
    for _ in range(250):
        lists, objects = [2, lists], {"a": objects, "b": 1}
    assert contains({"a": lists, "o": objects}, {"a": lists, "o": objects})
    assert not contains(lists, lists[1])


def test_metadata_with_other_numbers_do_not_contain() -> None:
    assert contains({"a": 2}, {"a": 2.0}) and contains({"a": 2.0}, {"a": 2})
    for value, part in ((2, 1.5), (1.5, 2), (2**60, 1.1e18), (1, True), (True, 1), (True, 1.0), (1.0, True)):
        assert not contains({"a": value}, {"a": part}), (value, part)
