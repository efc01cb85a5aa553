"""Writes into a database that has its 100,000 memories indexed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any
from uuid import UUID

import asyncpg
import numpy as np
import pytest

from benchmarks.conftest import TABLE, Database, Run, Sent, Stored, bare, open_adapter, sent_by, sized
from benchmarks.report import HEADER, Comparison, Report, interleave, micro, percentile, played_back, record
from elizasql import DatabaseAdapter, Memory, _codecs

pytestmark = pytest.mark.benchmark(timer=played_back, group="writes")


class Source:
    """New memories for an agent, with vectors that other agents have: of the same kind and not known to this one."""

    def __init__(self, agent: Stored, others: Sequence[Stored]) -> None:
        self.agent = agent
        self._vectors = np.concatenate([other.vectors for other in others])
        self._topics = np.concatenate([other.topics for other in others])
        self._order = np.random.default_rng(5).permutation(len(self._vectors))
        self._next = 0

    def take(self, count: int, *, unique: bool | None = True, room: bool = True) -> list[Memory]:
        """Give the next ones; after the last one it begins anew."""
        taken = []
        for _ in range(count):
            row = int(self._order[self._next % len(self._order)])
            self._next += 1
            memory = self.agent.memory(self._vectors[row], int(self._topics[row]), row, unique=unique)
            if not room:
                memory.room_id = None
            taken.append(memory)
        return taken


@pytest.fixture
def source(ten: Database) -> Source:
    return Source(ten.agents[0], ten.agents[1:])


# The floor: the same two rows into plain copies of the two tables, with the same b-trees, checks and foreign keys,
# filled with what the agent's partition holds, but with no HNSW index, no partitions and no trigger. INCLUDING ALL of
# the partitioned parents copies everything but foreign keys; HNSW indexes belong to the partitions alone.
_FLOOR = """
DROP SCHEMA IF EXISTS elizasql_floor CASCADE;
CREATE SCHEMA elizasql_floor;
CREATE TABLE elizasql_floor.memories (LIKE elizasql.memories INCLUDING ALL);
CREATE TABLE elizasql_floor.embeddings (LIKE elizasql.embeddings INCLUDING ALL);
ALTER TABLE elizasql_floor.embeddings SET (toast_tuple_target = 8160);
INSERT INTO elizasql_floor.memories SELECT * FROM {memories};
INSERT INTO elizasql_floor.embeddings SELECT * FROM {embeddings};
ALTER TABLE elizasql_floor.memories
    ADD FOREIGN KEY (agent_id) REFERENCES elizasql.agents (id) ON DELETE CASCADE,
    ADD FOREIGN KEY (agent_id, entity_id) REFERENCES elizasql.entities (agent_id, id) ON DELETE CASCADE,
    ADD FOREIGN KEY (agent_id, room_id) REFERENCES elizasql.rooms (agent_id, id) ON DELETE CASCADE,
    ADD FOREIGN KEY (agent_id, world_id) REFERENCES elizasql.worlds (agent_id, id) ON DELETE SET NULL (world_id);
ALTER TABLE elizasql_floor.embeddings
    ADD FOREIGN KEY (agent_id, memory_id) REFERENCES elizasql_floor.memories (agent_id, id) ON DELETE CASCADE,
    ADD FOREIGN KEY (agent_id, dimension) REFERENCES elizasql.agents (id, embedding_dimension) ON DELETE CASCADE;
"""

# One statement, one round trip, as a good hand would write it.
_INSERT = """
WITH memory AS (
    INSERT INTO elizasql_floor.memories (agent_id, id, type, content, entity_id, room_id)
    VALUES ($1, $2, $3, $4, $5, $6)
)
INSERT INTO elizasql_floor.embeddings (agent_id, memory_id, type, room_id, entity_id, "unique", dimension, dim_384)
VALUES ($1, $2, $3, $6, $5, TRUE, 384, $7)
"""


@asynccontextmanager
async def _floor(database: Database, agent: Stored) -> AsyncIterator[asyncpg.Connection[Any]]:
    """Make the copies and give a bare connection to write to them."""
    async with bare(database.dsn, tuned=True) as connection:
        where = "SELECT tableoid::regclass::text FROM elizasql.embeddings WHERE agent_id = $1 LIMIT 1"
        part = await connection.fetchval(where, agent.db.agent_id)
        await connection.execute(_FLOOR.format(memories=part.replace("embeddings", "memories"), embeddings=part))
        await connection.execute("VACUUM (ANALYZE) elizasql_floor.memories, elizasql_floor.embeddings")
        try:
            yield connection
        finally:
            await connection.execute("DROP SCHEMA elizasql_floor CASCADE")


async def _tidy(database: Database) -> None:
    """Take away what a benchmark has left behind in the tables and indexes."""
    async with bare(database.dsn) as connection:
        await connection.execute("VACUUM (ANALYZE) elizasql.memories, elizasql.embeddings")


def test_create_memory(benchmark: Any, run: Run, ten: Database, source: Source, report: Report) -> None:
    """One memory with its embedding, `unique` given; each of the two tables grows by a row and keeps it."""
    agent = source.agent
    rounds, warmup = sized(2000, 2), sized(100, 1)
    memories = source.take(rounds + warmup)
    created: list[UUID] = []

    async def measure() -> Comparison:
        sent = [
            (await sent_by(agent.db, partial(agent.db.create_memory, memory, TABLE)))[0]
            for memory in source.take(rounds + warmup)
        ]
        ready = [(each.sql, each.arguments) for each in sent]
        created.extend(each.params["id"] for each in sent)
        async with _floor(ten, agent) as floor, bare(ten.dsn, tuned=True) as connection:

            async def bare_insert(number: int) -> None:
                memory = memories[number]
                assert memory.embedding is not None
                await floor.execute(
                    _INSERT,
                    agent.db.agent_id,
                    _codecs.new_id(),
                    TABLE,
                    _codecs.encode_json(memory.content, "content"),
                    memory.entity_id,
                    memory.room_id,
                    _codecs.encode_vector(memory.embedding),
                )

            async def our_statement(number: int) -> None:
                sql, arguments = ready[number]
                await connection.execute(sql, *arguments)

            async def method(number: int) -> None:
                created.append(await agent.db.create_memory(memories[number], TABLE))

            variants = {
                "bare INSERT, no HNSW": bare_insert,
                "our statement on bare asyncpg": our_statement,
                "create_memory": method,
            }
            return await interleave(variants, rounds, warmup=warmup)

    comparison = run(measure())
    run(agent.db.delete_memories(created))
    run(_tidy(ten))
    record(benchmark, comparison, "create_memory")
    report.table("create_memory with embedding, unique given", HEADER, comparison.rows())
    ratio = comparison.ratio("create_memory")
    measured = comparison.times("create_memory")
    report.goal("create_memory over a bare INSERT without HNSW", measured, "≤ 3 x", ratio <= 3)


def test_create_memories(benchmark: Any, run: Run, ten: Database, source: Source, report: Report) -> None:
    """A large batch, `unique` given; each is found by the next search."""
    agent, db = source.agent, source.agent.db
    size, repeats = sized(10_000, 100), sized(5, 1)
    batches = [source.take(size) for _ in range(repeats)]
    created: list[UUID] = []
    found: list[bool] = []

    async def python_alone(number: int) -> list[Sent]:
        return await sent_by(db, partial(db.create_memories, batches[number], TABLE))

    async def measure() -> Comparison:
        ready = [
            [(each.statement.sql.replace("INTO elizasql.", "INTO elizasql_floor."), each.arguments) for each in sent]
            for sent in [await python_alone(number) for number in range(repeats)]
        ]
        async with _floor(ten, agent) as floor:

            async def without_hnsw(number: int) -> None:
                async with floor.transaction():
                    for sql, arguments in ready[number]:
                        await floor.execute(sql, *arguments)

            async def method(number: int) -> None:
                created[:] = await db.create_memories(batches[number], TABLE)

            async def look_and_delete(number: int) -> None:
                for row in range(0, size, max(1, size // 200)):
                    vector = batches[number][row].embedding
                    assert vector is not None
                    hits = await db.search_memories(embedding=vector, table_name=TABLE)
                    found.append(created[row] in [hit.id for hit in hits])
                await db.delete_memories(created)
                await _tidy(ten)

            variants = {
                "the statement alone, tables without HNSW": without_hnsw,
                "create_memories": method,
                "of it Python": python_alone,
            }
            return await interleave(variants, repeats, after=look_and_delete)

    comparison = run(measure())
    assert all(found)
    record(benchmark, comparison, "create_memories")
    report.table(f"create_memories of {size:,}, unique given", HEADER, comparison.rows())
    rate = size / comparison.median("create_memories")
    spread = sorted(size / each for each in comparison.seconds["create_memories"])
    measured = f"{rate:,.0f} rows/s ({spread[0]:,.0f}-{spread[-1]:,.0f})"
    report.goal(f"create_memories of {size:,}", measured, "≥ 10,000 rows/s", rate >= 10_000)
    report.goal("each found by the next search", f"{sum(found)} of {len(found)}", "all", all(found))


@pytest.mark.parametrize("scope", ["largest room", "median room", "no room", "neither room nor entity"])
def test_unique_left_out(benchmark: Any, run: Run, ten: Database, source: Source, report: Report, scope: str) -> None:
    """What it costs to let the store look for a near-duplicate, held to a search of the scope in which it looks."""
    agent, db = source.agent, source.agent.db
    topics, sizes = np.unique(agent.topics, return_counts=True)
    by_size = np.argsort(sizes, kind="stable")
    chosen = {"largest room": by_size[-1], "median room": by_size[len(by_size) // 2]}.get(scope)
    room = None if chosen is None else agent.rooms[int(topics[chosen])]
    rows = len(agent.ids) if chosen is None else int(sizes[chosen])
    rounds, warmup = sized(300, 2), sized(30, 1)
    checked = source.take(rounds + warmup, unique=None)
    plain = source.take(rounds + warmup)
    for memory in (*checked, *plain):
        memory.room_id = room
        if scope == "neither room nor entity":
            memory.entity_id = None
    created: list[UUID] = []

    async def given(number: int) -> None:
        created.append(await db.create_memory(plain[number], TABLE))

    async def left_out(number: int) -> None:
        created.append(await db.create_memory(checked[number], TABLE))

    async def delete(_: int) -> None:
        await db.delete_memories(created)
        created.clear()

    variants = {
        "unique given": given,
        "unique left out": left_out,
        "search_memories": lambda number: _search_scope(db, checked[number]),
    }
    comparison = run(interleave(variants, rounds, warmup=warmup, after=delete))
    run(_tidy(ten))
    record(benchmark, comparison, "unique left out")
    report.table(f"create_memory, {scope} ({rows:,} rows): the near-duplicate check", HEADER, comparison.rows())
    more, one_search = comparison.more("unique left out"), comparison.median("search_memories")
    report.goal(
        f"create_memory with unique left out, {scope}: more than with it given",
        f"{micro(more)} us",
        f"≤ one search, {micro(one_search)} us",
        more <= one_search,
    )


async def _search_scope(db: DatabaseAdapter, memory: Memory) -> list[Memory]:
    """Search where the store looks for near-duplicates of a memory."""
    assert memory.embedding is not None
    return await db.search_memories(
        embedding=memory.embedding, table_name=TABLE, room_id=memory.room_id, entity_id=memory.entity_id
    )


@pytest.mark.parametrize("scope", ["rooms", "no room"])
def test_batch_with_unique_left_out(
    benchmark: Any, run: Run, ten: Database, source: Source, report: Report, scope: str
) -> None:
    """A batch of 1,000 over all rooms, and the same without rooms."""
    db = source.agent.db
    size, some, repeats = sized(1000, 50), sized(200, 50), sized(5, 1)
    plain = [source.take(size, room=scope == "rooms") for _ in range(repeats)]
    checked = [source.take(size, unique=None, room=scope == "rooms") for _ in range(repeats)]
    created: list[UUID] = []

    async def given(number: int) -> None:
        created.extend(await db.create_memories(plain[number], TABLE))

    async def left_out(number: int) -> None:
        created.extend(await db.create_memories(checked[number], TABLE))

    async def searches(number: int) -> None:
        for memory in checked[number][:some]:
            await _search_scope(db, memory)

    async def delete(_: int) -> None:
        await db.delete_memories(created)
        created.clear()

    variants = {"unique given": given, "unique left out": left_out, f"{some} searches": searches}
    comparison = run(interleave(variants, repeats, after=delete))
    run(_tidy(ten))
    record(benchmark, comparison, "unique left out")
    report.table(f"create_memories of {size:,}, {scope}: the near-duplicate check", HEADER, comparison.rows())
    more, one_search = comparison.more("unique left out") / size, comparison.median(f"{some} searches") / some
    report.goal(
        f"create_memories of {size:,} with unique left out, {scope}: more a row",
        f"{micro(more)} us",
        f"≤ one search, {micro(one_search)} us",
        more <= one_search,
    )


@pytest.mark.parametrize("field", ["content", "embedding"])
def test_update_memory(benchmark: Any, run: Run, ten: Database, source: Source, report: Report, field: str) -> None:
    """A change of a memory that is indexed; a new vector goes to the tail."""
    agent, db = source.agent, source.agent.db
    rounds, warmup = sized(500, 2), sized(20, 1)
    # The agent's own vectors again, so that everything is as it was when these are indexed.
    chosen = np.random.default_rng(6).permutation(len(agent.ids))[: rounds + warmup]
    values: list[dict[str, Any]] = [
        {"id": agent.ids[at], field: {"text": "changed"} if field == "content" else agent.vectors[at]} for at in chosen
    ]

    async def measure() -> Comparison:
        sent = [(await sent_by(db, partial(db.update_memory, value)))[0] for value in values]
        ready = [(each.sql, each.arguments) for each in sent]
        async with bare(ten.dsn, tuned=True) as connection:

            async def raw(number: int) -> None:
                sql, arguments = ready[number]
                await connection.fetch(sql, *arguments)

            async def method(number: int) -> None:
                assert await db.update_memory(values[number])

            return await interleave({"bare asyncpg": raw, "update_memory": method}, rounds, warmup=warmup)

    comparison = run(measure())
    run(db.index_memories())
    run(_tidy(ten))
    record(benchmark, comparison, "update_memory")
    report.table(f"update_memory, {field}: the same statement", HEADER, comparison.rows())


def test_index_memories(benchmark: Any, run: Run, ten: Database, source: Source, report: Report) -> None:
    """Bring a tail into the index: row by row as the background indexer does, and by building it anew."""
    db = source.agent.db
    size = sized(2000, 50)
    seconds: dict[str, list[float]] = {"row by row": [], "rebuild": []}
    created: list[UUID] = []
    for way in seconds:
        added = run(db.create_memories(source.take(size), TABLE))
        begun = time.perf_counter()
        assert run(db.index_memories(rebuild=way == "rebuild")) == size
        seconds[way].append(time.perf_counter() - begun)
        created += added
    run(db.delete_memories(created))
    run(_tidy(ten))
    record(benchmark, Comparison(seconds), "row by row")
    report.table(
        f"index_memories of a tail of {size:,}",
        ["way", "seconds", "rows/s of the tail"],
        [[way, f"{times[0]:.2f}", f"{size / times[0]:,.0f}"] for way, times in seconds.items()],
    )


def test_flow(benchmark: Any, run: Run, ten: Database, source: Source, report: Report) -> None:
    """Batches one after the other, and a search of the same agent after the other, until all is in the index.

    In the background the index falls behind, and searches go through a tail that grows first; inline each batch waits
    for it. Twice each, in turns.
    """
    agent, size, batches = source.agent, sized(100, 10), sized(20, 2)
    seconds: dict[str, list[tuple[float, float]]] = {"background": [], "inline": []}
    searches: dict[str, list[float]] = {"idle": [], **{way: [] for way in seconds}}
    created: list[UUID] = []
    longest_tail = 0

    async def search(number: int, kept: list[float]) -> None:
        begun = time.perf_counter()
        hits = await agent.db.search_memories(embedding=agent.vectors[number % len(agent.vectors)], table_name=TABLE)
        kept.append(time.perf_counter() - begun)
        assert len(hits) == 10

    async def write(db: DatabaseAdapter, memories: list[Memory], connection: Any) -> tuple[float, float]:
        nonlocal longest_tail
        begun = time.perf_counter()
        for start in range(0, len(memories), size):
            created.extend(await db.create_memories(memories[start : start + size], TABLE))
        stored = time.perf_counter() - begun
        tail = "SELECT count(*) FROM elizasql.embeddings WHERE agent_id = $1 AND NOT indexed"
        while waiting := await connection.fetchval(tail, db.agent_id):
            longest_tail = max(longest_tail, waiting)
            await asyncio.sleep(0.02)
        return stored, time.perf_counter() - begun

    async def measure(way: str) -> None:
        memories = source.take(size * batches)
        async with bare(ten.dsn) as connection:
            db = await open_adapter(ten.dsn, agent.db.agent_id, indexing=way)
            try:
                task = asyncio.ensure_future(write(db, memories, connection))
                while not task.done():
                    await search(len(searches[way]), searches[way])
                seconds[way].append(await task)
            finally:
                await db.close()
            await agent.db.delete_memories(created)
            created.clear()

    async def idle() -> None:
        for number in range(sized(220, 2)):
            await search(number, searches["idle"])
        del searches["idle"][: sized(20, 1)]

    for way in [*seconds, *seconds]:
        run(_tidy(ten))
        run(idle())
        run(measure(way))
    run(_tidy(ten))
    record(benchmark, Comparison({"background": searches["background"]}), "background")
    total = size * batches
    rows = [
        [
            *(way, f"{total / stored:,.0f}", f"{total / indexed:,.0f}"),
            *(micro(percentile(searches[way], 0.5)), micro(percentile(searches[way], 0.95))),
            f"{percentile(searches[way], 0.5) / percentile(searches['idle'], 0.5):.2f}",
        ]
        for way, times in seconds.items()
        for stored, indexed in [np.median(times, axis=0)]
    ]
    report.table(
        f"{batches} batches of {size} beside searches of the agent, until indexed; longest tail {longest_tail:,}",
        ["indexing", "rows/s stored", "rows/s, index and all", "search p50 us", "search p95 us", "p50 over idle"],
        rows,
    )
