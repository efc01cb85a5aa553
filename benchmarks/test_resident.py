"""The resident tier: what a search takes when the vectors are in the process, and where that does not pay."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_OID, UUID, uuid5

import numpy as np
import pytest

from benchmarks import data
from benchmarks.conftest import QUICK, ROWS, TABLE, Database, Run, Stored, bare, open_adapter, sent_by, sized
from benchmarks.report import HEADER, Comparison, Report, interleave, micro, percentile, played_back, record
from elizasql import DatabaseAdapter, Memory, _codecs, _embedded
from elizasql._matrix import Matrix
from elizasql._resident import Tier

pytestmark = pytest.mark.benchmark(timer=played_back, group="resident")

COUNT = 10

# An exact search as a good hand would write it.
EXACT = """
SELECT m.id, m.entity_id, m.agent_id, m.room_id, m.world_id, m.type, m.content, m.metadata, m."unique", m.created_at,
    best.similarity
FROM (
    SELECT agent_id, memory_id, 1 - (dim_384 <=> $1) AS similarity
    FROM elizasql.embeddings
    WHERE agent_id = $2 AND type = $3
    ORDER BY dim_384 <=> $1, memory_id
    LIMIT 10
) AS best
JOIN elizasql.memories AS m ON m.agent_id = $2 AND m.id = best.memory_id
ORDER BY best.similarity DESC, m.id
"""


@pytest.fixture
def apart(run: Run, folder: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """Give the address of a server whose agents may come and go: deleted rows stay in an index for a while."""
    if QUICK or os.environ.get("ELIZASQL_TEST_URL"):
        yield request.getfixturevalue("ten").dsn
        return
    server = run(_embedded.acquire(folder / "pg-resident"))
    yield server.dsn
    run(server.release())


def _tier(db: DatabaseAdapter) -> Tier:
    (tier,) = db._resident._tiers.values()
    return tier


def _matrix(db: DatabaseAdapter) -> Matrix:
    matrix = _tier(db).matrix
    assert matrix is not None
    return matrix


@asynccontextmanager
async def _resident(database: Database, agents: Iterable[Stored]) -> AsyncIterator[list[DatabaseAdapter]]:
    """Open adapters that hold the vectors of some agents, and load them."""
    async with AsyncExitStack() as stack:
        adapters = []
        for agent in agents:
            db = await open_adapter(database.dsn, agent.db.agent_id, resident="required", resident_memory_mb=1024)
            stack.push_async_callback(db.close)
            await db.search_memories(embedding=agent.vectors[0], table_name=TABLE)
            adapters.append(db)
        yield adapters


def _exact(agent: Stored, query: data.Floats, found: list[Memory], among: data.Ints | None = None) -> bool:
    """Tell whether the rows are those of an exact search; of equally near ones any counts."""
    positions = [agent.positions[memory.id] for memory in found if memory.id is not None]
    vectors = agent.vectors
    if among is not None:
        place = {int(position): number for number, position in enumerate(among)}
        positions, vectors = [place[each] for each in positions], agent.vectors[among]
    return data.recall_in_full(vectors, query, positions, COUNT) == 1.0


@pytest.mark.parametrize("agents", [10, 1])
def test_warm(benchmark: Any, run: Run, ten: Database, vectors: data.Data, report: Report, agents: int) -> None:
    """Ten agents ask in turn, so that the vectors come from main memory; or one alone."""
    queries, stored = vectors.queries, ten.agents[:agents]
    found: dict[int, list[Memory]] = {}

    async def measure() -> Comparison:
        async with _resident(ten, stored) as adapters, bare(ten.dsn, tuned=True) as connection:

            def pick(number: int) -> tuple[data.Floats, int]:
                return queries[number % len(queries)], number % agents

            async def database(number: int) -> None:
                query, agent = pick(number)
                await stored[agent].db.search_memories(embedding=query, table_name=TABLE)

            async def tier(number: int) -> None:
                query, agent = pick(number)
                found[number] = await adapters[agent].search_memories(embedding=query, table_name=TABLE)

            async def fetching(number: int) -> None:
                query, agent = pick(number)
                tier = _tier(adapters[agent])
                tier.behind, tier.renew_at = True, math.inf  # as after an update or a removal
                await adapters[agent].search_memories(embedding=query, table_name=TABLE)
                tier.behind = False

            async def exact(number: int) -> None:
                query, agent = pick(number)
                await connection.fetch(EXACT, _codecs.encode_vector(query), stored[agent].db.agent_id, TABLE)

            async def matrix_alone(number: int) -> None:
                query, agent = pick(number)
                _matrix(adapters[agent]).search(query, COUNT + 4)

            async def in_full(number: int) -> None:
                query, agent = pick(number)
                scores = _matrix(adapters[agent])._score(query, None)
                np.argpartition(scores, -COUNT)[-COUNT:]

            floor = await _floor(connection, [partial(tier, number) for number in range(len(queries))], adapters)
            variants = {
                "search_memories, in the database": database,
                "search_memories, resident": tier,
                "the same, rows fetched and ranked by the server": fetching,
                "of this: the statement alone on bare asyncpg": floor,
                "of this: the matrix": matrix_alone,
                "numpy, every vector in float32": in_full,
                "exact SQL on bare asyncpg": exact,
            }
            return await interleave(variants, sized(len(queries), 10), warmup=sized(50, 1))

    comparison = run(measure())
    name = "search_memories, resident"
    record(benchmark, comparison, name)
    plural = "s" * (agents > 1)
    report.table(
        f"Search with the resident tier, {agents} agent{plural} of {len(stored[0].ids):,}", HEADER, comparison.rows()
    )
    right = [_exact(stored[n % agents], queries[n % len(queries)], hits) for n, hits in found.items() if n >= 0]
    report.goal(f"resident, {agents} agent{plural}: recall@10", f"{np.mean(right):.4f}", "1", all(right))
    ratio = comparison.ratio(name)
    report.goal(
        f"resident, {agents} agent{plural}: p50 over the search in the database",
        comparison.times(name),
        "< 1 x",
        ratio < 1,
    )
    assert all(right), "not what an exact search finds"


async def _floor(connection: Any, calls: list[Any], adapters: list[DatabaseAdapter]) -> Any:
    """Give a call of the statement that each search sends."""

    async def try_out(call: Any) -> None:
        with suppress(IndexError):  # there is no answer
            await call()

    sent = [await sent_by(adapters[at % len(adapters)], partial(try_out, call)) for at, call in enumerate(calls)]
    ready = [(each[0].sql, each[0].arguments) for each in sent]

    async def floor(number: int) -> None:
        sql, arguments = ready[number % len(ready)]
        await connection.fetch(sql, *arguments)

    return floor


def test_rooms(benchmark: Any, run: Run, ten: Database, vectors: data.Data, report: Report) -> None:
    """Rooms of all sizes of every agent."""
    queries = vectors.queries
    scopes = [
        (agent, int(topic), np.flatnonzero(stored.topics == topic))
        for agent, stored in enumerate(ten.agents)
        for topic in np.unique(stored.topics)
    ]
    order = np.random.default_rng(3).permutation(len(scopes) * sized(5, 1))[: sized(10**9, 20)] % len(scopes)
    found: dict[int, list[Memory]] = {}

    def pick(number: int) -> tuple[int, dict[str, Any]]:
        agent, topic, _ = scopes[order[number]]
        options = {"embedding": queries[number % len(queries)], "table_name": TABLE}
        return agent, {**options, "room_id": ten.agents[agent].rooms[topic]}

    async def measure() -> Comparison:
        async with _resident(ten, ten.agents) as adapters:

            async def database(number: int) -> None:
                agent, options = pick(number)
                await ten.agents[agent].db.search_memories(**options)

            async def tier(number: int) -> None:
                agent, options = pick(number)
                found[number] = await adapters[agent].search_memories(**options)

            variants = {"in the database": database, "resident": tier}
            return await interleave(variants, len(order), warmup=min(100, len(order) - 1))

    comparison = run(measure())
    rows = []
    for least, most in ((0, 30), (30, 100), (100, 300), (300, 1_000), (1_000, 10**9)):
        numbers = [n for n, scope in enumerate(order) if least < len(scopes[scope][2]) <= most]
        if numbers:
            sizes = [len(scopes[order[n]][2]) for n in numbers]
            before, after = ([comparison.seconds[name][n] for n in numbers] for name in comparison.seconds)
            p50s = percentile(before, 0.5), percentile(after, 0.5)
            rows.append(
                [
                    *(f"{min(sizes):,}-{max(sizes):,}", str(len(numbers)), *map(micro, p50s)),
                    *(micro(percentile(after, 0.95)), f"{p50s[1] / p50s[0]:.2f}"),
                ]
            )
    header = ["rows of the room", "searches", "p50 us in the database", "p50 us resident", "p95 us resident", "ratio"]
    report.table("Search in a room with the resident tier, 10 agents", header, rows)
    record(benchmark, comparison, "resident")
    right = []
    for number, hits in found.items():
        if number >= 0:
            agent, _, among = scopes[order[number]]
            right.append(_exact(ten.agents[agent], queries[number % len(queries)], hits, among))
    report.goal("resident: recall@10 in every room", f"{np.mean(right):.4f}", "1", all(right))
    assert all(right), "not what an exact search finds"


def test_cold(benchmark: Any, run: Run, ten: Database, vectors: data.Data, report: Report) -> None:
    """Loading: how long it takes, and what the searches take that go to the database meanwhile."""
    rounds = sized(5, 2)
    loads: list[float] = []
    beside: list[float] = []
    alone: list[float] = []

    async def measure() -> None:
        for number in range(rounds):
            # Each is another event loop's business: what one has loaded stays.
            agent = ten.agents[number]
            db = await open_adapter(ten.dsn, agent.db.agent_id, resident="auto", resident_memory_mb=1024)
            try:
                for turn in range(sized(100, 3)):
                    query = vectors.queries[turn % len(vectors.queries)]
                    begun = time.perf_counter()
                    await agent.db.search_memories(embedding=query, table_name=TABLE)
                    alone.append(time.perf_counter() - begun)
                tier = db._resident._find_tier(TABLE, data.WIDTH)
                db._resident._give_up(tier, 0.0)
                begun = time.perf_counter()
                db._resident._begin_load(tier, TABLE, data.WIDTH)
                turn = 0
                while tier.matrix is None:
                    turn += 1
                    asked = time.perf_counter()
                    query = vectors.queries[turn % len(vectors.queries)]
                    await db.search_memories(embedding=query, table_name=TABLE)
                    if tier.matrix is None:
                        beside.append(time.perf_counter() - asked)
                loads.append(time.perf_counter() - begun)
            finally:
                await db.close()

    run(measure())
    size = len(ten.agents[0].ids)
    report.table(
        f"Loading {size:,} vectors while searches go to the database",
        [
            "loads",
            "median ms",
            "vectors/s",
            "searches meanwhile",
            "p50 us",
            "p95 us",
            "p50 us without",
            "p95 us without",
        ],
        [
            [
                *(str(rounds), f"{np.median(loads) * 1e3:,.0f}", f"{size / np.median(loads):,.0f}", str(len(beside))),
                *(micro(percentile(beside, share)) if beside else "" for share in (0.5, 0.95)),
                *(micro(percentile(alone, share)) for share in (0.5, 0.95)),
            ]
        ],
    )
    record(benchmark, Comparison({"load": loads}), "load")


@pytest.mark.parametrize("rate", [1, 10, 100])
def test_while_writing(benchmark: Any, run: Run, ten: Database, vectors: data.Data, report: Report, rate: int) -> None:
    """The agent remembers so many things a second while it searches."""
    agent = ten.agents[0]
    others = np.concatenate([other.vectors for other in ten.agents[1:]])
    rounds = sized(1000, 5)
    found: list[bool] = []
    added: list[UUID] = []

    async def measure() -> Comparison:
        async with _resident(ten, [agent]) as (db,):
            writer = await open_adapter(ten.dsn, agent.db.agent_id)
            try:
                last: data.Floats
                stop = asyncio.Event()

                async def remember() -> None:
                    nonlocal last
                    vector = others[len(added)]
                    added.append(await writer.create_memory(agent.memory(vector, 0, len(added)), TABLE))
                    last = vector

                async def write() -> None:
                    begun = time.perf_counter()
                    while True:
                        # Not cancelled in a write: it might be done, and stay.
                        with suppress(asyncio.TimeoutError, TimeoutError):
                            wait = max(0.0, begun + len(added) / rate - time.perf_counter())
                            await asyncio.wait_for(stop.wait(), wait)
                        if stop.is_set():
                            return
                        await remember()

                async def database(number: int) -> None:
                    await agent.db.search_memories(
                        embedding=vectors.queries[number % len(vectors.queries)], table_name=TABLE
                    )

                async def tier(number: int) -> None:
                    await db.search_memories(embedding=vectors.queries[number % len(vectors.queries)], table_name=TABLE)

                async def look(_: int) -> None:
                    wanted, asked = added[-1], last
                    hits = await db.search_memories(embedding=asked, table_name=TABLE, count=5)
                    found.append(wanted in {hit.id for hit in hits})

                await remember()
                task = asyncio.create_task(write())
                try:
                    comparison = await interleave(
                        {"in the database": database, "resident": tier}, rounds, warmup=sized(50, 1), after=look
                    )
                finally:
                    stop.set()
                    await task
                stats = db._resident.snapshot()
                trips = 1 + stats["repeats"] / stats["hits"]
                report.table(
                    f"Search with the resident tier while the agent writes {rate} memories/s",
                    [*HEADER, "round trips a search", "rows merged"],
                    [
                        [*row, "", ""] if row[0] != "resident" else [*row, f"{trips:.3f}", str(stats["changes"])]
                        for row in comparison.rows()
                    ],
                )
                return comparison
            finally:
                await agent.db.delete_memories(added)
                await writer.close()

    comparison = run(measure())
    record(benchmark, comparison, "resident")
    measured = f"{np.mean(found):.4f}"
    report.goal(f"resident, {rate} writes/s: the newest memory is found", measured, "always", all(found))
    assert found
    assert all(found), "a new memory was not found by the next search"


@pytest.mark.parametrize(
    ("width", "sizes"),
    [
        (384, sized(0, (30, 100)) or (100, 300, 1_000, 3_000, 10_000, 25_000, 50_000, 100_000)),  # type: ignore[arg-type]
        (1536, sized(0, (40,)) or (300, 1_000, 3_000, 10_000, 20_000)),  # type: ignore[arg-type]
    ],
)
def test_crossover(
    benchmark: Any,
    run: Run,
    apart: str,
    vectors: data.Data,
    report: Report,
    request: pytest.FixtureRequest,
    width: int,
    sizes: tuple[int, ...],
) -> None:
    """Agents of all sizes, one after the other: from where on the tier pays, and up to where."""
    rounds = sized(300, 2)
    rows: list[list[str]] = []
    # Whoever has all memories is loaded already.
    whole: Database | None = request.getfixturevalue("one") if width == data.WIDTH and ROWS in sizes else None

    async def measure() -> Comparison:
        for size in sizes:
            given = vectors if width == data.WIDTH else data.generate(size, 200, width=width)
            if size > len(given.vectors):
                break
            async with AsyncExitStack() as stack:
                if whole is not None and size == ROWS:
                    dsn, db = whole.dsn, whole.agents[0].db
                else:
                    dsn, db = apart, await open_adapter(apart, uuid5(NAMESPACE_OID, f"resident {width} {size}"))
                    stack.push_async_callback(db.close)
                    await db.ensure_agent_exists({"name": "x"})
                    stack.push_async_callback(db.delete_agent, db.agent_id)
                    await db.ensure_embedding_dimension(width)
                    for start in range(0, size, 1000):
                        batch = given.vectors[start : min(start + 1000, size)]
                        await db.create_memories(
                            [Memory(content={"text": "x" * 80}, embedding=each, unique=True) for each in batch], TABLE
                        )
                    await db.index_memories(rebuild=True)
                tier = await open_adapter(
                    dsn, db.agent_id, resident="required", resident_max_vectors=10**6, resident_memory_mb=4096
                )
                stack.push_async_callback(tier.close)
                begun = time.perf_counter()
                await tier.search_memories(embedding=given.queries[0], table_name=TABLE)
                loaded = time.perf_counter() - begun

                async def search(db: DatabaseAdapter, number: int, given: data.Data = given) -> None:
                    await db.search_memories(embedding=given.queries[number % len(given.queries)], table_name=TABLE)

                comparison = await interleave(
                    {"in the database": partial(search, db), "resident": partial(search, tier)},
                    rounds,
                    warmup=sized(30, 1),
                )
                matrix = _matrix(tier)
                rows.append(
                    [
                        *(
                            f"{size:,}",
                            micro(comparison.median("in the database")),
                            micro(comparison.median("resident")),
                        ),
                        *(micro(comparison.p95("resident")), f"{comparison.ratio('resident'):.2f}"),
                        *(f"{loaded * 1e3:,.0f}", f"{matrix.footprint / 2**20:,.1f}"),
                    ]
                )
        return comparison

    comparison = run(measure())
    header = [
        "vectors",
        "p50 us in the database",
        "p50 us resident",
        "p95 us resident",
        "ratio",
        "load ms",
        "MiB",
    ]
    report.table(f"Agents of all sizes, {width} dimensions: in the database and resident", header, rows)
    record(benchmark, comparison, "resident")
