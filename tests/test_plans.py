"""Plans: the hot statements use the index that they are written for, with few rows and with many."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta, timezone
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import numpy as np
import pytest

import elizasql
from elizasql import Config, DatabaseAdapter, Entity, Memory, Room, World, _codecs, _pool
from elizasql._statements import SQL, Statement

from .conftest import MakeAdapter

MANY = 6000


def literal(value: Any) -> str:
    """Write a parameter as SQL text: EXPLAIN EXECUTE, which shows the generic plan, takes no bound ones."""
    if value is None:
        return "NULL"
    if isinstance(value, bytes):
        value = np.frombuffer(value, ">f4", offset=4).tolist()
    elif isinstance(value, list):
        value = "{" + ",".join(map(str, value)) + "}"
    return "'" + str(value).replace("'", "''") + "'"


async def partition_of(session: asyncpg.Connection[Any], agent_id: UUID) -> str:
    """Give what the names of an agent's partitions end in."""
    return str(await session.fetchval("SELECT right(elizasql.partition_of($1), 4)", agent_id))


async def plan_of(
    session: asyncpg.Connection[Any],
    statement: Statement,
    params: dict[str, Any],
    *,
    execute: bool = False,
    named: bool = True,
) -> list[dict[str, Any]]:
    """Give the nodes of a statement's generic plan, run when asked; parameters that are missing are NULL.

    The text is the one that an adapter of `agent_id` sends: it names the agent's partitions, unless `named` is False.
    """
    text = statement.sql
    if named and statement.of_one_agent and "agent_id" in params:
        text = statement.within(await partition_of(session, params["agent_id"]))
    await session.execute(f"PREPARE planned AS {text}")
    arguments = ", ".join(literal(params.get(name)) for name in statement.params)
    options = "ANALYZE, BUFFERS, FORMAT JSON" if execute else "FORMAT JSON"
    row = await session.fetchval(f"EXPLAIN ({options}) EXECUTE planned{f'({arguments})' if arguments else ''}")
    await session.execute("DEALLOCATE planned")
    nodes: list[dict[str, Any]] = []

    def walk(node: dict[str, Any]) -> None:
        nodes.append(node)
        for child in node.get("Plans", ()):
            walk(child)

    walk((json.loads(row) if isinstance(row, str) else row)[0]["Plan"])
    return nodes


def indexes(nodes: list[dict[str, Any]]) -> set[str]:
    """Give the names of the indexes that were really read."""
    return {node["Index Name"] for node in nodes if "Index Name" in node and node.get("Actual Loops", 1)}


def scans_a_table(nodes: list[dict[str, Any]]) -> list[str]:
    return [
        node["Relation Name"]
        for node in nodes
        if node["Node Type"] == "Seq Scan" and node["Actual Loops"] and node["Actual Rows"]
    ]


@pytest.fixture(scope="module")
def vectors() -> np.ndarray[Any, np.dtype[np.float32]]:
    centers = np.random.default_rng(1).normal(size=(20, 384))
    noise = np.random.default_rng(2).normal(size=(MANY + 1000, 384)) * 0.7
    return (centers[np.arange(MANY + 1000) % 20] + noise).astype(np.float32)


WORLD, BIG, SMALL, ENTITY, RARE = (uuid4() for _ in range(5))
# Searches of scopes that are large and dense: one filter at most, and several.
LARGE: list[tuple[str, dict[str, UUID]]] = [
    ("search_memories", {}),
    ("search_memories_of_room", {"room_id": BIG}),
    ("search_memories_of_entity", {"entity_id": ENTITY}),
    ("search_memories_of_world", {"world_id": WORLD}),
]
LARGE_TOGETHER: list[tuple[str, dict[str, UUID]]] = [
    ("search_memories_of_several", {"room_id": BIG, "entity_id": ENTITY}),
    ("search_memories_of_several", {"room_id": BIG, "world_id": WORLD}),
    ("search_memories_of_several", {"entity_id": ENTITY, "world_id": WORLD}),
]
# A generic plan is made for the average room: with two rooms in all, the index of the type is as good as the room's.
WORLDS, ROOMS, ENTITIES = ([uuid4() for _ in range(60)] for _ in range(3))


@pytest.fixture(scope="module")
def agents(dsn: str, vectors: np.ndarray[Any, Any]) -> dict[str, UUID]:
    """Give an agent with 40 memories and one with 6,000 indexed ones."""
    ids = {"few": uuid4(), "many": uuid4()}

    async def load() -> None:
        for name, id in ids.items():
            async with elizasql.connect(agent_id=id, dsn=dsn, indexing="manual", resident="off") as db:
                await db.ensure_agent_exists({"name": name})
                await db.ensure_embedding_dimension(384)
                await fill(db, vectors[: 40 if name == "few" else MANY])

    asyncio.run(load())
    return ids


async def fill(db: DatabaseAdapter, vectors: np.ndarray[Any, Any]) -> None:
    await db.create_worlds([World(id=id) for id in (WORLD, *WORLDS)])
    await db.create_rooms([Room(id=id, source="t", type="GROUP", world_id=WORLD) for id in (BIG, SMALL, *ROOMS)])
    await db.create_entities([Entity(id=id) for id in (ENTITY, RARE, *ENTITIES)])
    await db.create_memories(
        [
            Memory(
                room_id=SMALL if i % 200 == 0 else BIG if i % 10 < 6 else ROOMS[i % 60],
                entity_id=RARE if i % 100 == 0 else ENTITY if i % 10 < 6 else ENTITIES[i % 60],
                world_id=WORLD if i % 2 else WORLDS[i % 60],
                content={"text": f"memory {i}"},
                embedding=vector,
                unique=True,
            )
            for i, vector in enumerate(vectors)
        ],
        "messages",
    )
    await db.index_memories(rebuild=True)


@pytest.fixture
async def loaded(make_db: MakeAdapter, agents: dict[str, UUID]) -> dict[str, DatabaseAdapter]:
    return {name: await make_db(id) for name, id in agents.items()}


def search_params(agent_id: UUID, vector: Any, **scope: Any) -> dict[str, Any]:
    return {
        "agent_id": agent_id,
        "type": "messages",
        "embedding": _codecs.encode_vector(vector),
        "only_unique": False,
        "threshold": None,
        "count": 10,
        "candidates": 30,
        "include_embedding": False,
        "room_id": None,
        "entity_id": None,
        "world_id": None,
        **scope,
    }


async def test_search_of_many_goes_through_hnsw(
    session: asyncpg.Connection[Any], agents: dict[str, UUID], vectors: np.ndarray[Any, Any]
) -> None:
    for name in ("search_memories", "search_memories_by_hnsw"):
        nodes = await plan_of(session, SQL[name], search_params(agents["many"], vectors[-1]), execute=True)
        used = indexes(nodes)
        assert any(index.endswith("dim_384_hnsw") for index in used), (name, used)
        assert not scans_a_table(nodes)
        # The exact scan of the whole scope is there for the case that HNSW gives too few; it did not run.
        gates = [node for node in nodes if node.get("One-Time Filter", "").startswith("(NOT")]
        assert gates, name
        scans = [
            child
            for gate in gates
            for child in gate["Plans"]
            if child["Parent Relationship"] not in ("InitPlan", "SubPlan")
        ]
        assert scans and all(scan["Actual Loops"] == 0 for scan in scans), name


@pytest.mark.parametrize(
    ("name", "scope", "index"),
    [
        ("search_memories_of_room", {"room_id": SMALL}, "agent_id_room_id_type"),
        ("search_memories_of_entity", {"entity_id": RARE}, "agent_id_entity_id_type"),
        ("search_memories_of_world", {"world_id": WORLDS[0]}, "agent_id_world_id_type"),
        ("search_memories_of_several", {"room_id": BIG, "entity_id": RARE}, "agent_id_entity_id_type"),
        ("search_memories_of_several", {"room_id": SMALL, "world_id": WORLD}, "agent_id_room_id_type"),
        ("search_memories_of_several", {"room_id": BIG, "world_id": WORLDS[2]}, "agent_id_world_id_type"),
        ("search_memories_of_several", {"entity_id": ENTITY, "world_id": WORLDS[2]}, "agent_id_world_id_type"),
    ],
)
async def test_search_of_a_small_scope_is_exact(
    session: asyncpg.Connection[Any],
    agents: dict[str, UUID],
    vectors: np.ndarray[Any, Any],
    name: str,
    scope: dict[str, UUID],
    index: str,
) -> None:
    nodes = await plan_of(session, SQL[name], search_params(agents["many"], vectors[-1], **scope), execute=True)
    assert not any("hnsw" in used for used in indexes(nodes))
    assert not scans_a_table(nodes)
    # Each scope was counted, off its index alone; one of them has its vectors read. What is the oldest says which graph
    # it is, on whose size depends how far is counted.
    fetched = indexes([node for node in nodes if node["Node Type"] != "Index Only Scan"])
    [compared] = [used for used in fetched if used.startswith("embeddings") and "_xid_" not in used]
    assert index in compared
    # What of it is indexed makes no difference here, so nobody looks.
    assert {node["Actual Loops"] for node in nodes if node.get("Subplan Name") == "CTE placed"} == {0}


@pytest.mark.parametrize(
    ("name", "scope"),
    [*LARGE, *LARGE_TOGETHER],
)
async def test_search_of_a_large_dense_scope_goes_through_hnsw(
    session: asyncpg.Connection[Any],
    agents: dict[str, UUID],
    vectors: np.ndarray[Any, Any],
    name: str,
    scope: dict[str, UUID],
) -> None:
    nodes = await plan_of(session, SQL[name], search_params(agents["many"], vectors[-1], **scope), execute=True)
    assert any("hnsw" in used for used in indexes(nodes)), indexes(nodes)


async def test_what_waits_in_the_tail_is_not_looked_for_in_the_graph(
    session: asyncpg.Connection[Any], agents: dict[str, UUID], vectors: np.ndarray[Any, Any]
) -> None:
    """HNSW would go on through all that others have there, to find that it is too little."""
    agent = agents["many"]
    transaction = session.transaction()
    await transaction.start()
    try:
        await session.execute(
            "UPDATE elizasql.embeddings SET indexed = FALSE WHERE agent_id = $1 AND memory_id <> ALL(ARRAY("
            "SELECT memory_id FROM elizasql.embeddings WHERE agent_id = $1 ORDER BY memory_id LIMIT 1000))",
            agent,
        )
        for name, scope in (*LARGE, *LARGE_TOGETHER):
            nodes = await plan_of(session, SQL[name], search_params(agent, vectors[-1], **scope), execute=True)
            assert not any("hnsw" in used for used in indexes(nodes)), (name, scope)
            assert not scans_a_table(nodes)
    finally:
        await transaction.rollback()


@pytest.mark.parametrize(("name", "scope"), [*LARGE, *LARGE_TOGETHER])
async def test_a_scope_is_counted_no_further_than_decides(
    session: asyncpg.Connection[Any],
    agents: dict[str, UUID],
    vectors: np.ndarray[Any, Any],
    name: str,
    scope: dict[str, UUID],
) -> None:
    """In a graph of 6,000 the 2,001st is more than 0.3 of it; and where nothing waits they all are in it."""
    nodes = await plan_of(session, SQL[name], search_params(agents["many"], vectors[-1], **scope), execute=True)
    read = [node for node in nodes if node.get("Index Name", "").startswith("embeddings") and node["Actual Loops"]]
    counted = [0] + [2001] * max(1, len(scope))
    assert sorted(node["Actual Rows"] for node in read if node["Node Type"] == "Index Only Scan") == counted
    # Else only its oldest row, and what HNSW gives.
    assert max(node["Actual Rows"] for node in read if node["Node Type"] == "Index Scan") == 30


@pytest.mark.parametrize("by_hnsw", [False, True])
@pytest.mark.parametrize(
    ("name", "scope"),
    LARGE,
)
async def test_what_was_measured_is_not_measured_again(
    session: asyncpg.Connection[Any],
    agents: dict[str, UUID],
    vectors: np.ndarray[Any, Any],
    name: str,
    scope: dict[str, UUID],
    by_hnsw: bool,
) -> None:
    params = search_params(agents["many"], vectors[-1], by_hnsw=by_hnsw, **scope)
    nodes = await plan_of(session, SQL[name], params, execute=True)
    assert any("hnsw" in used for used in indexes(nodes)) is by_hnsw
    counted = [node for node in nodes if node.get("Subplan Name") == "CTE scope"]
    assert [node["Actual Loops"] for node in counted] == [0]


async def test_a_batch_measures_a_scope_once_for_near_duplicates(
    db: DatabaseAdapter, session: asyncpg.Connection[Any]
) -> None:
    """To count what is there takes as long as to compare it, and a batch mostly goes into a room or two."""
    rooms = await db.create_rooms([Room(source="test", type="GROUP"), Room(source="test", type="GROUP")])
    vectors = np.random.default_rng(1).normal(size=(140, 384)).astype(np.float32)
    memories = [Memory(room_id=rooms[i % 2], content={}, embedding=vector) for i, vector in enumerate(vectors)]
    await db.create_memories(memories[:100], "messages")
    scans = (
        "SELECT sum(idx_scan) FROM pg_stat_xact_user_tables WHERE schemaname = 'elizasql' AND relname ~ '^embeddings_p'"
    )
    async with session.transaction():
        before = await session.fetchval(scans) or 0
        duplicates = await session.fetchval(
            "SELECT elizasql.near_duplicates_384($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
            db.agent_id,
            [uuid4() for _ in range(40)],
            ["messages"] * 40,
            [rooms[i % 2] for i in range(40)],
            *([None] * 40 for _ in range(2)),
            [_codecs.encode_vector(vector) for vector in vectors[100:]],
            [None] * 40,
            ["messages"] * 2,
            rooms,
        )
        assert duplicates == [False] * 40
        assert await session.fetchval(scans) - before <= 40 + 5


@pytest.mark.parametrize(
    "name", ["search_memories", *(f"search_memories_of_{each}" for each in ("room", "entity", "world", "several"))]
)
async def test_the_size_of_the_graph_is_one_look(
    session: asyncpg.Connection[Any], agents: dict[str, UUID], vectors: np.ndarray[Any, Any], name: str
) -> None:
    """Of an agent with many rows a bitmap is cheaper to read as a whole, and was made for a single one."""
    await session.execute("SET random_page_cost = 40")
    params = search_params(agents["many"], vectors[-1], room_id=BIG, entity_id=ENTITY, world_id=WORLD)
    nodes = await plan_of(session, SQL[name], params, execute=True)
    [look] = {node["Node Type"] for node in nodes if node.get("Alias", "").startswith("one")}
    assert look == "Index Scan"


@pytest.mark.parametrize(
    ("name", "scope", "index"),
    [
        ("search_memories_where", {}, "agent_id_type_greatest"),
        ("search_memories_where_of_room", {"room_id": SMALL}, "agent_id_room_id_type"),
        ("search_memories_where_of_entity", {"entity_id": RARE}, "agent_id_entity_id_type"),
        ("search_memories_where_of_world", {"world_id": WORLDS[0]}, "agent_id_world_id_type"),
    ],
)
async def test_what_passes_the_filters_is_found_by_the_index_of_the_scope(
    session: asyncpg.Connection[Any],
    agents: dict[str, UUID],
    vectors: np.ndarray[Any, Any],
    name: str,
    scope: dict[str, UUID],
    index: str,
) -> None:
    partition = await partition_of(session, agents["many"])
    times = await session.fetch(
        f"SELECT created_at FROM elizasql.memories{partition} WHERE agent_id = $1 ORDER BY created_at", agents["many"]
    )
    params = search_params(agents["many"], vectors[-1], **scope)
    nodes = await plan_of(session, SQL[name], params, execute=True)
    assert any(index in used for used in indexes(nodes)), indexes(nodes)
    assert any(used.startswith("embeddings") and used.endswith("pkey") for used in indexes(nodes)), indexes(nodes)
    assert not any("hnsw" in used for used in indexes(nodes)) and not scans_a_table(nodes)
    # Of a range of time nothing else is read.
    params |= {
        "start_time": times[0]["created_at"] - timedelta(days=2),
        "end_time": times[0]["created_at"] - timedelta(days=1),
    }
    nodes = await plan_of(session, SQL[name], params, execute=True)
    read = [node for node in nodes if index in node.get("Index Name", "")]
    assert read and not any(node["Actual Rows"] or node.get("Rows Removed by Filter", 0) for node in read)


@asynccontextmanager
async def counted(session: asyncpg.Connection[Any], part: str, size: float) -> AsyncIterator[None]:
    """Let a partition count as one of so many rows, until the block ends."""
    if session.get_server_version().major < 18:
        pytest.skip("statistics can be set from PostgreSQL 18 on")
    transaction = session.transaction()
    await transaction.start()
    await session.execute(
        f"SELECT pg_restore_relation_stats("
        f"'schemaname', 'elizasql', 'relname', '{part}', 'reltuples', {size:.0f}::real)"
    )
    try:
        yield
    finally:
        await transaction.rollback()


async def test_near_duplicates_are_looked_for_with_candidates_of_their_own(
    session: asyncpg.Connection[Any], agents: dict[str, UUID], vectors: np.ndarray[Any, Any]
) -> None:
    """They stand apart from all else: fewer do than a search needs, and what a search is set to is of no account."""
    read = []
    for ef in (40, 10, 400):
        await session.execute(f"SET hnsw.ef_search = {ef}")
        row = await session.fetchval(
            "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) SELECT elizasql.near_duplicates_384("
            "$1, $2, '{messages}', none, none, none, $3, '{NULL}', '{messages}', none)"
            " FROM (VALUES ('{NULL}'::uuid[])) AS given (none)",
            agents["many"],
            [uuid4()],
            [_codecs.encode_vector(vectors[-1])],
        )
        plan = json.loads(row)[0]["Plan"]
        read.append(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])
    assert await session.fetchval("SHOW hnsw.ef_search") == "400"
    assert abs(read[1] - read[2]) < 100 and read[2] > 500, read


async def test_near_duplicates_of_a_tail_are_not_looked_for_in_the_graph(
    make_db: MakeAdapter, session: asyncpg.Connection[Any]
) -> None:
    """It holds none of them, and the scan would walk all of another type before it gave up."""
    db = await make_db(indexing="manual", resident="off")
    vectors = np.random.default_rng(1).normal(size=(2002, 384)).astype(np.float32)
    memories = [Memory(content={}, embedding=vector, unique=True) for vector in vectors[1:]]
    await db.create_memories(memories, "facts")
    part = await session.fetchval("SELECT elizasql.partition_of($1)", db.agent_id)
    scans = f"SELECT pg_stat_get_xact_numscans('elizasql.{part}_dim_384_hnsw'::regclass)"
    async with counted(session, part, 1000):
        before = await session.fetchval(scans)
        near = await session.fetchval(
            "SELECT elizasql.near_duplicates_384($1, $2, '{facts}', none, none, none, $3, '{NULL}', '{facts}', none)"
            " FROM (VALUES ('{NULL}'::uuid[])) AS given (none)",
            db.agent_id,
            [uuid4()],
            [_codecs.encode_vector(vectors[0])],
        )
        assert near == [False] and await session.fetchval(scans) == before


@pytest.mark.parametrize(
    ("name", "scope"),
    [*LARGE, *LARGE_TOGETHER],
)
async def test_larger_graphs_get_more_candidates(
    session: asyncpg.Connection[Any],
    loaded: dict[str, DatabaseAdapter],
    vectors: np.ndarray[Any, Any],
    name: str,
    scope: dict[str, UUID],
) -> None:
    db = loaded["many"]
    params = search_params(db.agent_id, vectors[-1], by_hnsw=None, known_ef=None, ef_search=100, **scope)
    part = await session.fetchval("SELECT elizasql.partition_of($1)", db.agent_id)

    async def search(name: str, **changed: Any) -> tuple[list[asyncpg.Record], str]:
        """Give the rows, and how many candidates the transaction has from then on."""
        given = params | changed
        rows = await session.fetch(SQL[name].within(f"_{part[-3:]}"), *[given[param] for param in SQL[name].params])
        return rows, await session.fetchval("SHOW hnsw.ef_search")

    async def transacted(name: str, **changed: Any) -> tuple[list[asyncpg.Record], str]:
        async with session.transaction():
            return await search(name, **changed)

    rows, in_force = await transacted(name)
    assert (rows[0]["by_hnsw"], rows[0]["ef"], in_force) == (True, "100", "100")
    for size, ef_search, ef in ((1e6, 100, "178"), (1e6, 60, "107"), (3e5, 100, "132"), (1e9, 400, "1000")):
        async with counted(session, part, size):
            # 6,000 rows are a small part of such a graph: what is large enough is known, but they are scanned exactly.
            rows, in_force = await search(name, by_hnsw=None, ef_search=ef_search)
            assert {row["ef"] for row in rows} == {ef}
            assert not rows[0]["by_hnsw"] and in_force == "100"
            rows, in_force = await search(name, by_hnsw=True, known_ef=ef)
            assert {row["ef"] for row in rows} == {in_force} == {ef}
    rows, in_force = await transacted(name, by_hnsw=True, known_ef="237")
    assert (rows[0]["by_hnsw"], rows[0]["ef"], in_force) == (True, "237", "237")
    rows, in_force = await transacted(name, by_hnsw=False, known_ef=None)
    assert (rows[0]["by_hnsw"], rows[0]["ef"], in_force) == (False, None, "100")
    if not scope:
        assert (await transacted("search_memories_by_hnsw", known_ef="237"))[1] == "237"
        assert (await transacted("search_memories_by_hnsw"))[1] == "100"
    assert await session.fetchval("SHOW hnsw.ef_search") == "100"


@pytest.mark.parametrize(("name", "scope"), [*LARGE, *LARGE_TOGETHER])
async def test_a_graph_that_was_never_counted_is_not_taken_for_a_small_one(
    session: asyncpg.Connection[Any],
    agents: dict[str, UUID],
    vectors: np.ndarray[Any, Any],
    name: str,
    scope: dict[str, UUID],
) -> None:
    params = search_params(agents["many"], vectors[-1], by_hnsw=None, known_ef=None, ef_search=100, **scope)
    part = await session.fetchval("SELECT elizasql.partition_of($1)", agents["many"])
    async with counted(session, part, -1):
        rows = await session.fetch(SQL[name].within(f"_{part[-3:]}"), *[params[param] for param in SQL[name].params])
    assert {(row["by_hnsw"], row["ef"]) for row in rows} == {(False, "100")}


async def test_candidates_are_set_before_the_index_is_opened(
    session: asyncpg.Connection[Any], agents: dict[str, UUID], vectors: np.ndarray[Any, Any]
) -> None:
    """What it reads tells: pgvector looks at the setting when the scan begins."""
    for name in ("search_memories", "search_memories_by_hnsw"):
        read = {}
        for ef in ("10", "400"):
            params = search_params(agents["many"], vectors[-1], by_hnsw=True, known_ef=ef, ef_search=100)
            nodes = await plan_of(session, SQL[name], params, execute=True)
            (read[ef],) = [
                node["Shared Hit Blocks"] + node["Shared Read Blocks"]
                for node in nodes
                if "hnsw" in node.get("Index Name", "") and node["Actual Loops"]
            ]
        assert read["400"] > 1.5 * read["10"], (name, read)  # alike, if it came too late


async def test_search_of_few_reads_no_table_whole(
    session: asyncpg.Connection[Any], agents: dict[str, UUID], vectors: np.ndarray[Any, Any]
) -> None:
    for name, scope in (*LARGE, *LARGE_TOGETHER):
        nodes = await plan_of(session, SQL[name], search_params(agents["few"], vectors[-1], **scope), execute=True)
        assert not scans_a_table(nodes), name
        assert not any("hnsw" in used for used in indexes(nodes)), name


LIST = {
    "type": "messages",
    "only_unique": False,
    "start_time": None,
    "end_time": None,
    "cursor_time": None,
    "cursor_id": None,
    "metadata": None,
    "text_contains": None,
    "skip": None,
    "count": 20,
    "include_embedding": False,
    "room_id": BIG,
    "room_ids": [SMALL],
    "entity_id": None,
    "world_id": WORLD,
    "world_ids": [WORLD],
}


@pytest.mark.parametrize(
    ("name", "index", "extra"),
    [
        ("get_memories", "agent_id_type_greatest", {}),
        ("get_memories_of_room", "agent_id_room_id_type_created_at", {}),
        ("get_memories_of_entity", "agent_id_entity_id_type_created_at", {"entity_id": ENTITY}),
        ("get_memories_of_world", "agent_id_world_id_type_created_at", {}),
        ("get_memories_by_room_ids", "agent_id_room_id_type_created_at", {}),
        ("get_memories_by_world_id", "agent_id_world_id_type_created_at", {}),
    ],
)
@pytest.mark.parametrize("who", ["few", "many"])
async def test_lists_come_off_an_index_in_order(
    session: asyncpg.Connection[Any],
    agents: dict[str, UUID],
    name: str,
    index: str,
    extra: dict[str, Any],
    who: str,
) -> None:
    params = {**LIST, "agent_id": agents[who], **extra}
    nodes = await plan_of(session, SQL[name], params, execute=True)
    assert not scans_a_table(nodes)
    if who == "many":
        assert any(index in used for used in indexes(nodes)), indexes(nodes)
        # No more rows than asked for leave the index: nothing is read to be sorted away.
        read = [node["Actual Rows"] for node in nodes if index in node.get("Index Name", "") and node["Actual Loops"]]
        assert max(read) <= 30, read


async def test_a_deep_page_by_cursor_reads_one_page(
    session: asyncpg.Connection[Any], loaded: dict[str, DatabaseAdapter]
) -> None:
    db = loaded["many"]
    page = await db.get_memories(table_name="messages", count=3000)
    params = {**LIST, "agent_id": db.agent_id, "cursor_time": page[-1].created_at, "cursor_id": page[-1].id}
    nodes = await plan_of(session, SQL["get_memories"], params, execute=True)
    read = [node["Actual Rows"] for node in nodes if "greatest" in node.get("Index Name", "") and node["Actual Loops"]]
    assert max(read) <= 21, read


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        ("get_memories", {}),
        ("get_memories_of_room", {"room_id": BIG, "entity_id": None, "world_id": None}),
        ("get_memories_of_entity", {"entity_id": ENTITY, "world_id": None}),
        ("get_memories_of_world", {}),
    ],
)
async def test_a_page_up_to_a_time_reads_nothing_newer(
    session: asyncpg.Connection[Any], agents: dict[str, UUID], name: str, scope: dict[str, Any]
) -> None:
    agent = agents["many"]
    oldest = await session.fetchval("SELECT min(created_at) FROM elizasql.memories WHERE agent_id = $1", agent)
    params = {**LIST, "agent_id": agent, **scope, "end_time": oldest + timedelta(microseconds=200), "count": 5}
    nodes = await plan_of(session, SQL[name], params, execute=True)
    (read,) = [
        node["Shared Hit Blocks"] + node["Shared Read Blocks"]
        for node in nodes
        if "created_at" in node.get("Index Name", "") or "greatest" in node.get("Index Name", "")
    ]
    assert read <= 15, read


@pytest.mark.parametrize(
    ("scope", "index"), [({}, "agent_id_type_greatest_id"), ({"room_id": BIG}, "agent_id_room_id_type_created_at_id")]
)
async def test_a_prune_reads_its_batch(
    session: asyncpg.Connection[Any], agents: dict[str, UUID], scope: dict[str, Any], index: str
) -> None:
    """Off the index that has the order, between what is behind it and the limits."""
    agent = agents["many"]
    mine = await partition_of(session, agent)
    ordered = await session.fetch(
        "SELECT created_at, id FROM elizasql.memories"
        " WHERE agent_id = $1 AND type = 'messages' AND ($2 OR room_id = $3) ORDER BY created_at, id",
        *(agent, not scope, scope.get("room_id")),
    )
    after, end, kept = (ordered[i] for i in (1000, 1030, 1020))
    params = {"agent_id": agent, "type": "messages", **scope, "after_time": after[0], "after_id": after[1]}
    for limits, most in (
        ({"batch_size": 10}, 10),
        ({"batch_size": 100, "before": end[0]}, 29),
        ({"batch_size": 100, "before": end[0], "kept_time": kept[0], "kept_id": kept[1]}, 19),
    ):
        transaction = session.transaction()
        await transaction.start()
        nodes = await plan_of(session, SQL["prune_memories"], {**params, **limits}, execute=True)
        await transaction.rollback()
        assert not scans_a_table(nodes)
        assert f"memories{mine}_{index}_idx" in indexes(nodes), indexes(nodes)
        read = [
            node["Actual Loops"] * (node["Actual Rows"] + node.get("Rows Removed by Filter", 0))
            for node in nodes
            if node.get("Relation Name") == f"memories{mine}"
        ]
        assert max(read) == most, (limits, read)


async def test_counts_and_text_lengths_use_an_index(session: asyncpg.Connection[Any], agents: dict[str, UUID]) -> None:
    agent = agents["many"]
    for name in ("count_memories", "count_memories_of_rooms", "count_memories_of_entity", "count_memories_of_world"):
        nodes = await plan_of(session, SQL[name], {**LIST, "agent_id": agent, "entity_id": RARE}, execute=True)
        assert not scans_a_table(nodes), name
    params = {"agent_id": agent, "type": "messages", "lengths_from": 8, "lengths_to": 8, "most": 10, "key": "text"}
    nodes = await plan_of(session, SQL["get_cached_embeddings"], params, execute=True)
    assert any("length" in used for used in indexes(nodes)), indexes(nodes)
    assert not scans_a_table(nodes)


async def test_without_statistics_rows_are_looked_up_one_by_one(
    session: asyncpg.Connection[Any], agents: dict[str, UUID]
) -> None:
    """As after a load, before the server has looked at the tables."""
    if int(await session.fetchval("SHOW server_version_num")) < 180000:
        pytest.skip("statistics are cleared by functions of PostgreSQL 18")
    agent = agents["many"]
    mine = await partition_of(session, agent)
    params = {
        "agent_id": agent,
        "type": "messages",
        "lengths_from": 8,
        "lengths_to": 11,
        "most": 10,
        "key": "text",
        "room_ids": [SMALL],
    }
    transaction = session.transaction()
    await transaction.start()
    try:
        await session.execute(CLEAR_STATISTICS, [f"memories{mine}", f"embeddings{mine}", "goals"])
        for name in ("get_cached_embeddings", "get_cached_embeddings_by_content", "get_cached_embeddings_by_metadata"):
            nodes = await plan_of(session, SQL[name], params)
            conditions = [node["Index Cond"] for node in nodes if node.get("Relation Name") == f"embeddings{mine}"]
            assert len(conditions) == 1, (name, conditions)
            assert "memory_id" in conditions[0], (name, conditions)
        nodes = await plan_of(session, SQL["delete_all_memories"], params)
        conditions = [node["Index Cond"] for node in nodes if node.get("Relation Name") == f"memories{mine}"]
        assert any("room_id" in condition for condition in conditions), conditions
        assert any("documentId" in condition for condition in conditions), conditions
        nodes = await plan_of(session, SQL["prune_memories"], params)
        conditions = [node["Index Cond"] for node in nodes if node.get("Relation Name") == f"memories{mine}"]
        for part in ("room_id", "GREATEST", "documentId"):
            assert any(part in condition for condition in conditions), conditions
        # Where entries of an index cost nothing the sizes of the indexes decide, as they may in another table.
        await session.execute("SET LOCAL cpu_operator_cost = 0; SET LOCAL cpu_index_tuple_cost = 0")
        nodes = await plan_of(session, SQL["delete_all_memories"], params)
        conditions = [node["Index Cond"] for node in nodes if node.get("Relation Name") == f"memories{mine}"]
        assert any("room_id" in condition for condition in conditions), conditions
        await session.execute("SET LOCAL cpu_operator_cost = DEFAULT; SET LOCAL cpu_index_tuple_cost = DEFAULT")
        nodes = await plan_of(session, SQL["count_memories_of_rooms"], params)
        [condition] = [node["Index Cond"] for node in nodes if node.get("Relation Name") == f"memories{mine}"]
        assert "room_id" in condition, condition
        nodes = await plan_of(session, SQL["delete_all_goals"], params)
        [found] = [node["Index Name"] for node in nodes if "given.id" in node.get("Index Cond", "")]
        assert found == "goals_pkey", found
    finally:
        await transaction.rollback()


CLEAR_STATISTICS = """
    SELECT pg_clear_attribute_stats('elizasql', relname, attname, FALSE), pg_clear_relation_stats('elizasql', relname)
    FROM pg_class INNER JOIN pg_attribute ON attrelid = pg_class.oid
    WHERE relnamespace = 'elizasql'::regnamespace AND relname = ANY($1) AND attnum > 0
"""


async def test_fragments_of_a_document_are_found_by_an_index(
    session: asyncpg.Connection[Any], agents: dict[str, UUID]
) -> None:
    params = {"agent_id": agents["many"], "ids": [uuid4()], "room_ids": [uuid4()], "type": "documents"}
    for name in ("delete_memories", "delete_all_memories", "prune_memories"):
        nodes = await plan_of(session, SQL[name], params, execute=True)
        assert not scans_a_table(nodes), name
        read = [node["Actual Rows"] for node in nodes if node["Node Type"].endswith("Scan") and "Index Name" in node]
        assert max(read, default=0) <= 1, (name, read)


async def test_the_tail_is_found_by_its_own_index(session: asyncpg.Connection[Any], agents: dict[str, UUID]) -> None:
    # The function that moves it looks under the same condition.
    statement = SQL["count_unindexed_embeddings"]
    nodes = await plan_of(session, statement, {"agent_id": agents["many"]}, execute=True)
    assert not scans_a_table(nodes)
    read = [node["Actual Rows"] for node in nodes if "Index Name" in node and node["Actual Loops"]]
    assert max(read, default=0) == 0, read


# Those that begin and end transactions have no plan.
# What moves whole databases reads whole tables.
PLANNED = {
    name: statement
    for name, statement in SQL.items()
    if not name.endswith(("_transaction", "_savepoint")) and statement.file != "transfer.sql"
}


@pytest.mark.parametrize("statement", list(PLANNED.values()), ids=list(PLANNED))
async def test_no_statement_reads_a_whole_table(
    session: asyncpg.Connection[Any], agents: dict[str, UUID], statement: Statement
) -> None:
    """With sequential scans switched off, the planner still takes one where no index serves: none may be left."""
    for params in ({}, {"agent_id": agents["many"]}):
        nodes = await plan_of(session, statement, params)
        tables = {node["Relation Name"] for node in nodes if node["Node Type"] == "Seq Scan"}
        assert tables <= {"pg_class", "pg_extension", "pg_index", "pg_namespace"}, tables


INDEXES = """
    SELECT
        i.indrelid AS of_table, i.indexrelid::regclass::text AS name, pg_get_expr(i.indpred, i.indrelid) AS predicate,
        i.indisunique AS is_unique, m.amname::text AS method,
        (SELECT inhparent::regclass::text FROM pg_inherits WHERE inhrelid = i.indexrelid) AS parent,
        ARRAY(
            SELECT a.attname::text
            FROM unnest(string_to_array(i.indkey::text, ' ')::smallint[]) WITH ORDINALITY AS k (number, place)
            LEFT JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = k.number
            WHERE k.place <= i.indnkeyatts
            ORDER BY k.place
        ) AS columns
    FROM pg_index AS i
    INNER JOIN pg_class AS c ON c.oid = i.indexrelid
    INNER JOIN pg_am AS m ON m.oid = c.relam
    WHERE c.relnamespace = 'elizasql'::regnamespace AND i.indisvalid
"""
FOREIGN_KEYS = """
    SELECT
        conrelid AS of_table, conrelid::regclass::text || ' ' || conname AS name,
        ARRAY(SELECT attname::text FROM pg_attribute WHERE attrelid = conrelid AND attnum = ANY(conkey)) AS columns
    FROM pg_constraint
    WHERE contype = 'f' AND connamespace = 'elizasql'::regnamespace
"""


def serves(index: asyncpg.Record, key: asyncpg.Record) -> bool:
    """Tell whether an index finds the rows that point at one which is deleted."""
    columns = set(key["columns"])
    # Of an expression the column is None. A row that points at another has all the columns of the key.
    return (
        (index["method"], index["of_table"]) == ("btree", key["of_table"])
        and set(index["columns"][: len(columns)]) == columns
        and (index["predicate"] is None or index["predicate"] in {f"({column} IS NOT NULL)" for column in columns})
    )


async def test_every_foreign_key_has_an_index(raw: asyncpg.Connection[Any]) -> None:
    """So that no cascade reads a table."""
    indexes, keys = await raw.fetch(INDEXES), await raw.fetch(FOREIGN_KEYS)
    assert len(keys) > 30
    assert [key["name"] for key in keys if not any(serves(index, key) for index in indexes)] == []


# Of few rows another one looks as good. Tests of many name these: those of searches, and of the summaries of runs.
READ_OF_MANY = {"embeddings_room_idx", "embeddings_entity_idx", "logs_run_event_time_idx"}


async def test_every_index_is_of_use(own_database: str) -> None:
    """Each costs every write: it is unique, serves a foreign key that no unique one does, or a statement needs it.

    Nothing is stored there: which of two indexes is cheaper by a hair does not hang on other tests.
    """
    session = await asyncpg.connect(own_database, server_settings=_pool.session_settings(Config.load(environ={})))
    found, keys = await session.fetch(INDEXES), await session.fetch(FOREIGN_KEYS)
    useful = {index["name"] for index in found if index["is_unique"]} | READ_OF_MANY
    for key in keys:
        serving = [index for index in found if serves(index, key)]
        if not any(index["is_unique"] for index in serving):
            useful |= {index["name"] for index in serving}
    first = {index["name"]: index["columns"][0] for index in found}
    for name, statement in SQL.items():
        if name.endswith(("_transaction", "_savepoint")):
            continue
        nodes = await plan_of(session, statement, {"agent_id": uuid4()})
        is_sorted = "ORDER BY" not in statement.sql or any(node["Node Type"].endswith("Sort") for node in nodes)
        in_order = {key.split(".")[-1] for node in nodes for key in node.get("Presorted Key", ())}
        for node in nodes:
            index, bounds = node.get("Index Name"), node.get("Index Cond", "")
            # Whatever begins with the agent finds what is an agent's.
            finds = bounds and (" AND " in bounds or "(agent_id = " not in bounds)
            if index and (finds or not is_sorted or first.get(index) in in_order):
                useful.add(index)
    await session.close()
    needed = {index["parent"] or index["name"] for index in found if index["name"] in useful}
    left = {index["name"] for index in found if index["parent"] is None and index["method"] != "hnsw"} - needed
    assert left == set()


OF_ONE_AGENT = {name: statement for name, statement in PLANNED.items() if statement.of_one_agent}


@pytest.mark.parametrize("statement", list(OF_ONE_AGENT.values()), ids=list(OF_ONE_AGENT))
async def test_a_statement_of_one_agent_needs_its_partitions_alone(
    session: asyncpg.Connection[Any], agents: dict[str, UUID], statement: Statement
) -> None:
    """What names the agent's partitions does what the text through the partitioned tables does: there, too, the server
    leaves out all others."""
    agent_id = agents["many"]
    mine = await partition_of(session, agent_id)
    through_all = dataclasses.replace(statement)
    object.__setattr__(through_all, "of_one_agent", False)
    read = {}
    for text in (through_all, statement):
        nodes = await plan_of(session, text, {"agent_id": agent_id})
        tables = {node.get("Relation Name", "") for node in nodes}
        read[text.of_one_agent] = {table for table in tables if re.fullmatch("(memories|embeddings)_p[0-9]+", table)}
    assert all(table.endswith(mine) for tables in read.values() for table in tables), read
    assert set(re.findall("(?:memories|embeddings)_p[0-9]+", statement.within(mine))) >= read[False]
    assert not re.search(r"elizasql\.(memories|embeddings)\b", statement.within(mine))


def test_epoch_is_a_time() -> None:
    assert _codecs.as_time(0, "start") == datetime(1970, 1, 1, tzinfo=timezone.utc)
