"""Search in other shapes: wider vectors, many agents, after deletes, and while others write."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from itertools import accumulate, count
from pathlib import Path
from typing import Any
from uuid import UUID, uuid5

import numpy as np
import pytest

from benchmarks import data
from benchmarks.conftest import (
    QUICK,
    ROWS,
    TABLE,
    Run,
    Stored,
    agent_named,
    bare,
    load_agent,
    open_adapter,
    partition_of,
    sized,
)
from benchmarks.report import (
    Call,
    Comparison,
    Report,
    in_stretches,
    interleave,
    micro,
    percentile,
    played_back,
    record,
    with_spread,
)
from elizasql import DatabaseAdapter, Memory, _embedded

pytestmark = pytest.mark.benchmark(timer=played_back, group="shapes")

# Memories of an agent here, and those of which goals speak that name no other number.
SIZE = int(os.environ.get("ELIZASQL_BENCH_SHAPES") or max(ROWS // 10, 200))
JUDGED = 10_000
# Memories of each width; an index of 3,072 dimensions is built at some hundred rows a second.
WIDE = int(os.environ.get("ELIZASQL_BENCH_WIDE") or SIZE)
WIDTHS = (384, 768, 1536, 3072)
IDLE = "idle"


@pytest.fixture(scope="module")
def dsn(run: Run, folder: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """Give the address of a server of their own: what is deleted stays in an index for a while."""
    if QUICK or os.environ.get("ELIZASQL_TEST_URL"):
        yield request.getfixturevalue("ten").dsn
        return
    server = run(_embedded.acquire(folder / "pg-shapes"))
    yield server.dsn
    run(server.release())


@asynccontextmanager
async def _agents(dsn: str, vectors: data.Data, name: str, agents: int = 1) -> AsyncIterator[list[Stored]]:
    """Load agents, index what they have, and delete them at the end."""
    async with AsyncExitStack() as stack:
        stored = [await load_agent(dsn, vectors, stack, number, agents, name=name) for number in range(agents)]
        del vectors  # each has a copy of its own
        for agent in stored:
            stack.push_async_callback(agent.db.delete_agent, agent.db.agent_id)
        await stored[0].db.index_memories(rebuild=True)
        for agent in stored[1:]:
            await agent.db.index_memories()
        await _vacuum(dsn)
        yield stored


async def _vacuum(dsn: str) -> None:
    async with bare(dsn) as connection:
        await connection.execute("VACUUM (ANALYZE) elizasql.memories, elizasql.embeddings")


def _search(agent: Stored, queries: data.Floats, found: dict[int, list[Memory]]) -> Call:
    async def search(number: int) -> None:
        query = queries[number % len(queries)]
        found[number] = await agent.db.search_memories(embedding=query, table_name=TABLE)

    return search


def _recall(
    agent: Stored, queries: data.Floats, found: dict[int, list[Memory]], kept: data.Ints | None = None
) -> float:
    """Give the mean recall@10 of what was found, among all vectors or those that were kept; too few are an error."""
    among = np.arange(len(agent.vectors)) if kept is None else kept
    place = {int(row): number for number, row in enumerate(among)}
    exact = data.Exact(agent.vectors[among])
    recalls = []
    for number, hits in found.items():
        positions = [place[agent.positions[hit.id]] for hit in hits if hit.id is not None]
        recalls.append(exact.recall_in_full(queries[number % len(queries)], positions))
    return float(np.mean(recalls))


def test_widths(benchmark: Any, run: Run, dsn: str, report: Report) -> None:
    """Vectors of every common width, of one structure, an agent each, searched in turns."""
    rows: list[list[str]] = []
    recalls: dict[str, float] = {}

    async def measure() -> Comparison:
        async with AsyncExitStack() as stack:
            stored, asked = {}, {}
            found: dict[int, dict[int, list[Memory]]] = {}
            variants: dict[str, Call] = {}
            for width in WIDTHS:
                made = data.generate(WIDE, sized(200, 5), width=width)
                (agent,) = await stack.enter_async_context(_agents(dsn, made, f"of {width}"))
                stored[width], asked[width], found[width] = agent, made.queries.copy(), {}
                variants[str(width)] = _search(agent, asked[width], found[width])
                del made  # 1.2 GB of 100,000 of the widest; the agent's own are a copy
            # The first is what the others are compared with: the goal speaks of 768.
            variants = {name: variants[name] for name in ("768", "384", "1536", "3072")}
            comparison = await interleave(variants, sized(200, 3), warmup=sized(20, 1))
            async with bare(dsn) as connection:
                for width in WIDTHS:
                    bytes_each = await connection.fetchval(
                        "SELECT avg(pg_column_size(embeddings.*)) FROM elizasql.embeddings WHERE agent_id = $1",
                        stored[width].db.agent_id,
                    )
                    name = str(width)
                    recall = recalls[name] = _recall(stored[width], asked[width], found[width])
                    rows.append(
                        [
                            *(name, f"{WIDE:,}", f"{recall:.4f}", micro(comparison.median(name))),
                            *(micro(comparison.p95(name)), f"{comparison.ratio(name):.2f}", f"{bytes_each:,.0f}"),
                        ]
                    )
                    if width == 3072:
                        ratio = comparison.ratio(name)
                        what, times = f"3,072 dimensions, {WIDE:,} memories", comparison.times(name)
                        report.recall(what, {name: recalls.pop(name)}, 0.98, size=WIDE)
                        report.goal(f"{what}: p50 over that of 768", times, "≤ 3 x", ratio <= 3, size=WIDE)
            report.recall("384 to 1,536 dimensions", recalls, size=WIDE, of=JUDGED)
            return comparison

    comparison = run(measure())
    header = ["dimensions", "memories", "recall", "p50 us", "p95 us", "p50 over 768", "bytes a stored vector"]
    report.table("Search by the width of the vectors, generated ones", header, rows)
    record(benchmark, comparison, "3072")


def test_many_agents(benchmark: Any, run: Run, dsn: str, vectors: data.Data, report: Report) -> None:
    """The same memories owned by one agent, by ten, and by very many."""
    many = sized(1000, 20)
    part = data.Data(
        vectors.source, vectors.vectors[:SIZE], vectors.topics[:SIZE], vectors.queries, vectors.query_topics
    )
    rows: list[list[str]] = []
    means: dict[str, float] = {}

    async def measure() -> Comparison:
        async with AsyncExitStack() as stack:
            variants: dict[str, Call] = {}
            kept: dict[str, list[tuple[Stored, dict[int, list[Memory]]]]] = {}
            for agents in (1, 10, many):
                name = f"{agents:,} agents"
                stored = await stack.enter_async_context(_agents(dsn, part, f"one of {agents}", agents))
                kept[name] = [(agent, {}) for agent in stored]

                async def search(number: int, among: list[tuple[Stored, dict[int, list[Memory]]]] = kept[name]) -> None:
                    # A hundred of them, so that each is asked again.
                    agent, found = among[number % min(len(among), 100)]
                    await _search(agent, part.queries, found)(number)

                variants[name] = search
            comparison = await interleave(variants, sized(500, 3), warmup=sized(50, 1))
            for name, among in kept.items():
                recalls = [_recall(agent, part.queries, found) for agent, found in among if found]
                means[name] = float(np.mean(recalls))
                median, p95 = comparison.median(name), comparison.p95(name)
                rows.append([name, f"{SIZE:,}", f"{means[name]:.4f}", micro(median), micro(p95)])
            return comparison

    comparison = run(measure())
    report.table("Search by the number of agents", ["agents", "memories", "recall", "p50 us", "p95 us"], rows)
    report.recall(f"1 to {many:,} agents", means, size=SIZE, of=JUDGED)
    record(benchmark, comparison, f"{many:,} agents")


def test_skewed_agents(benchmark: Any, run: Run, dsn: str, vectors: data.Data, report: Report) -> None:
    """One agent of half the rows of a partition, and many of 50 to 2,000, so that HNSW walks through what is others'.

    Each is asked again and again, as agents are: whether its scope is searched exactly or through HNSW is remembered
    from its first search. Beside them the large one when that was forgotten, and the same rows alone in a partition.
    """
    most, among = max(50, min(2000, ROWS // 50)), np.linspace(0, 1, min(100, ROWS // 250))
    sizes = [int(size) for size in 50 * (most / 50) ** among**3]
    large = sum(sizes)
    asked: dict[str, list[tuple[Stored, dict[int, list[Memory]]]]] = {}

    def part(start: int, size: int) -> data.Data:
        mine = slice(start, start + size)
        return replace(vectors, vectors=vectors.vectors[mine], topics=vectors.topics[mine])

    def asking(name: str, agents: list[Stored], *, forgets: bool = False) -> Call:
        kept: list[tuple[Stored, dict[int, list[Memory]]]] = [(agent, {}) for agent in agents]
        asked[name] = kept

        async def search(number: int) -> None:
            agent, found = kept[number % len(kept)]
            if forgets:
                agent.db._measured.clear()
            await _search(agent, vectors.queries, found)(number)

        return search

    async def measure() -> Comparison:
        async with AsyncExitStack() as stack:
            stored: list[Stored] = []

            async def load(name: str, start: int, size: int) -> None:
                agent = await load_agent(dsn, part(start, size), stack, name=name)
                stack.push_async_callback(agent.db.delete_agent, agent.db.agent_id)
                stored.append(agent)

            await load("skewed, large", 0, large)
            connection = await stack.enter_async_context(bare(dsn))
            partition = await partition_of(connection, stored[0].db.agent_id)
            (alone,) = await _names(connection, "skewed, alone", partition, 1, inside=False)
            await load(alone, 0, large)
            names = await _names(connection, "skewed, small", partition, len(sizes))
            for name, start, size in zip(names, accumulate(sizes[:-1], initial=large), sizes, strict=True):
                await load(name, start, size)
            for agent in stored[:2]:
                await agent.db.index_memories(rebuild=True)
            await _vacuum(dsn)
            variants = {
                "the large one": asking("the large one", stored[:1]),
                "the large one, forgotten how": asking("the large one, forgotten how", stored[:1], forgets=True),
                "alone in a partition": asking("alone in a partition", stored[1:2]),
                "the small ones": asking("the small ones", stored[2:]),
            }
            return await interleave(variants, sized(300, 8), warmup=sized(100, 8))

    comparison = run(measure())
    rows: list[list[str]] = []
    worst: dict[str, float] = {}
    searches = 0
    for name, kept in asked.items():
        recalls = [_recall(agent, vectors.queries, found) for agent, found in kept if found]
        worst[name] = min(recalls)
        searches += sum(len(found) for _, found in kept)
        counts = sorted({len(agent.ids) for agent, _ in kept})
        rows.append(
            [
                *(name, f"{len(kept):,}", f"{counts[0]:,}" + (f"-{counts[-1]:,}" if len(counts) > 1 else "")),
                *(f"{np.mean(recalls):.4f}", f"{worst[name]:.4f}", micro(comparison.median(name))),
                *(micro(comparison.p95(name)), f"{comparison.ratio(name):.2f}"),
            ]
        )
    header = [
        "asked",
        "agents",
        "memories of each",
        "recall",
        "worst agent",
        "p50 us",
        "p95 us",
        "p50 over the large one",
    ]
    report.table(f"Search in a partition of {2 * large:,} memories, half of them one agent's", header, rows)
    record(benchmark, comparison, "the large one")
    report.recall("one large agent among many small ones", worst)
    # `_recall` has seen to it for every search.
    what = "one large agent among many small ones: fewer than min(10, matches) rows"
    report.goal(what, f"0 of {searches:,}", "never", True)


def test_after_deletes(benchmark: Any, run: Run, dsn: str, vectors: data.Data, report: Report) -> None:
    """Half of the memories are deleted: before a vacuum their vectors are still in the index."""
    part = data.Data(
        vectors.source, vectors.vectors[:SIZE], vectors.topics[:SIZE], vectors.queries, vectors.query_topics
    )
    rows: list[list[str]] = []
    recalls: dict[str, float] = {}

    async def measure() -> Comparison:
        async with _agents(dsn, part, "that forgets", 2) as (agent, other):
            comparisons = {}
            gone = np.random.default_rng(5).permutation(len(agent.ids))[: len(agent.ids) // 2]
            kept = np.setdiff1d(np.arange(len(agent.ids)), gone)

            async def compare(state: str, among: data.Ints | None) -> None:
                found: dict[int, list[Memory]] = {}
                variants = {
                    "another agent": _search(other, part.queries, {}),
                    "agent": _search(agent, part.queries, found),
                }
                comparison = comparisons[state] = await interleave(variants, sized(300, 3), warmup=sized(30, 1))
                recall = recalls[state] = _recall(agent, part.queries, found, among)
                rows.append(
                    [
                        *(state, f"{recall:.4f}", micro(comparison.median("agent")), micro(comparison.p95("agent"))),
                        f"{comparison.ratio('agent') / comparisons['whole'].ratio('agent'):.2f}",
                    ]
                )

            await compare("whole", None)
            for start in range(0, len(gone), 1000):
                await agent.db.delete_memories([agent.ids[row] for row in gone[start : start + 1000]])
            await compare("half deleted", kept)
            await _vacuum(dsn)
            await compare("and vacuumed", kept)
            return comparisons["and vacuumed"]

    comparison = run(measure())
    report.table("Search after deletes", ["state", "recall", "p50 us", "p95 us", "ratio to whole"], rows)
    report.recall("after deletes", recalls, size=SIZE, of=JUDGED)
    record(benchmark, comparison, "agent")


@pytest.mark.parametrize("resident", ["off", "required"])
def test_while_others_write(
    benchmark: Any, run: Run, dsn: str, vectors: data.Data, report: Report, resident: str
) -> None:
    """An agent searches while another one, of another partition or of its own, stores and indexes memories.

    The other one does in the same process what loads most: a bulk load that builds the partition's index anew, and then
    new memories that go into the index row by row. The searches go on for as long as that takes.
    """
    part = data.Data(
        vectors.source, vectors.vectors[:SIZE], vectors.topics[:SIZE], vectors.queries, vectors.query_topics
    )
    taken: dict[str, tuple[float, list[float]]] = {}

    async def measure() -> None:
        async with AsyncExitStack() as stack:
            (agent,) = await stack.enter_async_context(_agents(dsn, part, "beside a load"))
            connection = await stack.enter_async_context(bare(dsn))
            asking = await open_adapter(dsn, agent.db.agent_id, resident=resident)
            stack.push_async_callback(asking.close)
            agent = replace(agent, db=asking)
            found: dict[int, list[Memory]] = {}
            search = _search(agent, part.queries, found)

            async def beside(what: str, work: Awaitable[Any], least: int = 0) -> None:
                found.clear()
                times: list[float] = []
                task = asyncio.ensure_future(work)
                while not task.done() or len(times) < least:
                    begun = time.perf_counter()
                    await search(len(times))
                    times.append(time.perf_counter() - begun)
                await task
                taken[what] = _recall(agent, part.queries, found), times

            for number in range(sized(50, 1)):
                await search(-number)
            await beside(IDLE, asyncio.sleep(0), sized(500, 3))
            for where in ("another partition", "the same partition"):
                other = await _partner(connection, agent.db.agent_id, same=where == "the same partition")
                async with _writer(dsn, other) as db:
                    await beside(f"a load into {where}, and its index", db.load_memories(_new(part.vectors), TABLE))
                    await beside(f"new memories in {where}, row by row", _store_and_index(db, part.vectors[:1000]))
            await beside("idle again", asyncio.sleep(0), sized(500, 3))

    run(measure())
    idle = percentile(taken[IDLE][1], 0.95)
    rows = [
        [
            *(what, str(len(times)), f"{recall:.4f}", micro(percentile(times, 0.5)), micro(percentile(times, 0.95))),
            *(micro(max(times)), f"{percentile(times, 0.95) / idle:.2f}"),
        ]
        for what, (recall, times) in taken.items()
    ]
    header = ["meanwhile", "searches", "recall", "p50 us", "p95 us", "longest us", "p95 over idle"]
    report.table(f"Search among {SIZE:,} while another agent writes, resident={resident}", header, rows)
    for where in ("another partition", "the same partition"):
        slowest = max((times for what, (_, times) in taken.items() if where in what), key=lambda t: percentile(t, 0.95))
        ratio = percentile(slowest, 0.95) / idle
        parts = [percentile(part, 0.95) / idle for part in in_stretches(slowest)]
        what = f"search p95 while a load and the indexer run in {where}, over idle, resident={resident}"
        report.goal(what, with_spread(ratio, parts), "≤ 3 x", ratio <= 3, size=SIZE, of=JUDGED)
    recalls = {what: recall for what, (recall, _) in taken.items()}
    least = 0.99 if resident == "off" else 1.0
    report.recall(f"while others write, resident={resident}", recalls, least, size=SIZE, of=JUDGED)
    busy = {"search": [each for what, (_, times) in taken.items() if IDLE not in what for each in times]}
    record(benchmark, Comparison(busy), "search")


async def _partner(connection: Any, agent: UUID, *, same: bool) -> UUID:
    """Find an id for an agent whose rows lie in the same partition as an agent's, or in another one."""
    home = await partition_of(connection, agent)
    for number in count():
        other = uuid5(agent, f"writes {number}")
        if (await partition_of(connection, other) == home) == same:
            return other
    raise AssertionError


async def _names(connection: Any, stem: str, partition: int, many: int, *, inside: bool = True) -> list[str]:
    """Find names for agents whose rows lie in a partition, or elsewhere."""
    names: list[str] = []
    for number in count():
        if len(names) == many:
            return names
        name = f"{stem} {number}"
        if (await partition_of(connection, agent_named(name)) == partition) == inside:
            names.append(name)
    raise AssertionError


@asynccontextmanager
async def _writer(dsn: str, agent_id: UUID) -> AsyncIterator[DatabaseAdapter]:
    """Give an agent without memories, for as long as the block runs."""
    db = await open_adapter(dsn, agent_id)
    try:
        await db.ensure_agent_exists({"name": "writes"})
        await db.ensure_embedding_dimension(data.WIDTH)
        yield db
        await db.delete_agent(agent_id)
    finally:
        await db.close()


def _new(vectors: data.Floats) -> list[Memory]:
    return [Memory(content={"text": "what was said"}, embedding=vector, unique=True) for vector in vectors]


async def _store_and_index(db: DatabaseAdapter, vectors: data.Floats) -> None:
    await db.create_memories(_new(vectors), TABLE)
    await db.index_memories()
