"""Search: what is found of what an exact search finds, and how long it takes, for every size of scope."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any
from uuid import UUID

import numpy as np
import pytest

from benchmarks import data
from benchmarks.conftest import BEGUN, TABLE, WORLDS, Database, Run, Stored, bare, open_adapter, sent_by, sized
from benchmarks.report import (
    HEADER,
    Call,
    Comparison,
    Report,
    interleave,
    micro,
    percentile,
    played_back,
    record,
    with_spread,
)
from elizasql import DatabaseAdapter, Memory, _codecs
from elizasql._resident import _MOST_COMPONENTS

pytestmark = pytest.mark.benchmark(timer=played_back, group="search")

COUNT = 10
# Up to which a scope counts to a class.
CLASSES = (30, 100, 300, 1_000, 3_000, 10_000)

EXACT = """
SELECT memory_id
FROM elizasql.embeddings
WHERE agent_id = $2 AND type = $3 AND world_id = $4
ORDER BY dim_384 <=> $1, memory_id
LIMIT 10
"""


class _Scope:
    """What an exact search finds in all of an agent's vectors or in some, each question searched once."""

    def __init__(self, agent: Stored, among: data.Ints | None = None) -> None:
        self.vectors = agent.vectors if among is None else agent.vectors[among]
        self._exact = data.Exact(self.vectors, COUNT)
        self._positions = agent.positions
        self._place = None if among is None else {int(position): number for number, position in enumerate(among)}

    def recall(self, query: data.Floats, found: Iterable[Memory]) -> float:
        """Compare what was found; too few rows are an error."""
        positions = [self._positions[memory.id] for memory in found if memory.id is not None]
        if self._place is not None:
            positions = [self._place[position] for position in positions]
        return self._exact.recall_in_full(query, positions)


@pytest.mark.parametrize("size", ["ten", "one"])
def test_agent_wide(
    benchmark: Any, run: Run, request: pytest.FixtureRequest, vectors: data.Data, report: Report, size: str
) -> None:
    database: Database = request.getfixturevalue(size)
    agents, queries = database.agents, vectors.queries
    found: dict[int, list[Memory]] = {}

    async def measure() -> Comparison:
        async def method(number: int) -> None:
            query, db = queries[number % len(queries)], agents[number % len(agents)].db
            found[number] = await db.search_memories(embedding=query, table_name=TABLE)

        async def with_embeddings(number: int) -> None:
            query, db = queries[number % len(queries)], agents[number % len(agents)].db
            await db.search_memories(embedding=query, table_name=TABLE, include_embedding=True)

        async def first(number: int) -> None:
            agents[number % len(agents)].db._measured.clear()
            await method(number)

        # After a first search it is known how large the scope is, which decides what those of the next minute send.
        for number in range(len(agents)):
            await method(number)
        sent = [
            (await sent_by(agents[number % len(agents)].db, partial(method, number)))[0]
            for number in range(len(queries))
        ]
        ready = [(each.sql, each.arguments) for each in sent]
        async with bare(database.dsn, tuned=True) as connection:

            async def raw(number: int) -> None:
                sql, arguments = ready[number % len(queries)]
                await connection.fetch(sql, *arguments)

            variants = {"bare asyncpg": raw, "search_memories": method, "embeddings returned": with_embeddings}
            variants["the first in a minute"] = first
            return await interleave(variants, sized(len(queries), 10), warmup=sized(50, 1))

    comparison = run(measure())
    whole = [_Scope(agent) for agent in agents]
    recalls = [
        whole[number % len(agents)].recall(queries[number], found[number])
        for number in range(len(comparison.seconds["search_memories"]))
    ]
    record(benchmark, comparison, "search_memories")
    benchmark.extra_info["recall"] = float(np.mean(recalls))
    name = f"{len(agents)} agent{'s' * (len(agents) > 1)}"
    report.table(f"Search, agent-wide, {name}", HEADER, comparison.rows())
    mean = float(np.mean(recalls))
    report.goal(f"{name}: recall@10, agent-wide", f"{mean:.4f}", "≥ 0.99", mean >= 0.99)
    ratio = comparison.ratio("search_memories")
    report.goal(
        f"{name}: p50 over the statement on bare asyncpg", comparison.times("search_memories"), "≤ 1.3 x", ratio <= 1.3
    )


@pytest.mark.parametrize("size", ["ten", "one"])
def test_every_room(
    benchmark: Any, run: Run, request: pytest.FixtureRequest, vectors: data.Data, report: Report, size: str
) -> None:
    database: Database = request.getfixturevalue(size)
    random = np.random.default_rng(3)
    scopes = [
        (agent, topic, np.flatnonzero(agent.topics == topic))
        for agent in database.agents
        for topic in np.unique(agent.topics)
    ]
    if sized(0, 1):
        scopes = scopes[:: max(1, len(scopes) // 20)]
    per_room = sized(10 if len(database.agents) > 1 else 40, 2)
    # Half of the questions are about the room's topic, the others about anything, so that the nearest are elsewhere.
    asked: list[tuple[int, int]] = []
    for number, (_, topic, _) in enumerate(scopes):
        about = np.flatnonzero(vectors.query_topics == topic)
        queries = random.choice(len(vectors.queries), per_room)
        if len(about):
            queries[: per_room // 2] = random.choice(about, per_room // 2)
        asked += [(number, int(query)) for query in queries]
    asked = [asked[number] for number in random.permutation(len(asked))]
    found: dict[int, list[Memory]] = {}

    async def everywhere(number: int) -> None:
        scope, query = asked[number]
        await scopes[scope][0].db.search_memories(embedding=vectors.queries[query], table_name=TABLE)

    async def in_room(number: int) -> None:
        scope, query = asked[number]
        agent, topic, _ = scopes[scope]
        found[number] = await agent.db.search_memories(
            embedding=vectors.queries[query], table_name=TABLE, room_id=agent.rooms[int(topic)]
        )

    comparison = run(
        interleave({"agent-wide": everywhere, "room": in_room}, len(asked), warmup=min(100, len(asked) - 1))
    )
    recalls: dict[int, list[float]] = defaultdict(list)
    times: dict[int, list[float]] = defaultdict(list)
    rooms = [_Scope(agent, among) for agent, _, among in scopes]
    for number, (scope, query) in enumerate(asked):
        recalls[scope].append(rooms[scope].recall(vectors.queries[query], found[number]))
        times[scope].append(comparison.seconds["room"][number])

    name = f"{len(database.agents)} agent{'s' * (len(database.agents) > 1)}"
    wide = comparison.median("agent-wide")
    rows, shares = [], []
    for least, most in zip((0, *CLASSES), (*CLASSES, 10**9), strict=True):
        members = [scope for scope, (_, _, among) in enumerate(scopes) if least < len(among) <= most]
        if members:
            sizes = [len(scopes[scope][2]) for scope in members]
            seconds = [each for scope in members for each in times[scope]]
            means = [float(np.mean(recalls[scope])) for scope in members]
            within = Comparison(
                {
                    variant: [each[number] for number, (scope, _) in enumerate(asked) if scope in members]
                    for variant, each in comparison.seconds.items()
                }
            )
            shares.append((percentile(seconds, 0.5) / wide, within.ratios("room")))
            rows.append(
                [
                    f"{min(sizes):,}-{max(sizes):,}",
                    str(len(members)),
                    str(len(seconds)),
                    f"{np.mean(means):.4f}",
                    f"{min(means):.4f}",
                    micro(percentile(seconds, 0.5)),
                    micro(percentile(seconds, 0.95)),
                    f"{shares[-1][0]:.2f}",
                ]
            )
    header = ["rows", "rooms", "searches", "recall", "worst room", "p50 us", "p95 us", "p50 over agent-wide"]
    report.table(f"Search in every room, {name}; agent-wide p50 {micro(wide)} us", header, rows)
    record(benchmark, comparison, "room")
    worst = min(float(np.mean(each)) for each in recalls.values())
    benchmark.extra_info["recall"] = worst
    report.goal(f"{name}: recall@10 of every room, the worst room", f"{worst:.4f}", "≥ 0.99", worst >= 0.99)
    # `_Scope.recall` has seen to it for every search.
    report.goal(f"{name}: fewer than min(10, matches) rows", f"0 of {len(asked):,}", "never", True)
    if size == "ten":
        slowest, parts = max(shares)
        measured = with_spread(slowest, parts)
        report.goal(f"{name}: p50 of the slowest rooms over agent-wide", measured, "≤ 1.5 x", slowest <= 1.5)


def test_every_world(benchmark: Any, run: Run, one: Database, vectors: data.Data, report: Report) -> None:
    """Scopes of all sizes whose rows lie anywhere: in the database, in the process, and by an exact index scan.

    Worlds from ten rows on, an entity, and what is in a room, of an entity and in a world.
    """
    agent, queries = one.agents[0], vectors.queries
    worlds = {
        f"world {number}": ({"world_id": world}, np.flatnonzero(agent.world_of == number))
        for number, world in enumerate(agent.worlds)
    }
    of_entity = np.arange(len(agent.ids)) % len(agent.entities) == 1
    topic, largest = int(np.bincount(agent.topics).argmax()), len(WORLDS) - 1
    shared = of_entity & (agent.topics == topic) & (agent.world_of == largest)
    several = {"room_id": agent.rooms[topic], "entity_id": agent.entities[1], "world_id": agent.worlds[largest]}
    scopes: dict[str, tuple[dict[str, UUID], data.Ints]] = {
        **dict(sorted(worlds.items(), key=lambda each: len(each[1][1]))),
        "entity": ({"entity_id": agent.entities[1]}, np.flatnonzero(of_entity)),
        "room, entity and world": (several, np.flatnonzero(shared)),
    }
    # The largest takes a quarter of a second.
    scanned = [name for name in worlds if sized(len(worlds[name][1]) <= len(agent.ids) // 4, False)]
    found: dict[str, dict[int, list[Memory]]] = {name: {} for name in scopes}
    found_resident: dict[str, dict[int, list[Memory]]] = {name: {} for name in scopes}

    def within(db: DatabaseAdapter, name: str, kept: dict[int, list[Memory]]) -> Call:
        async def search(number: int) -> None:
            query = queries[number % len(queries)]
            kept[number] = await db.search_memories(embedding=query, table_name=TABLE, **scopes[name][0])

        return search

    async def everywhere(number: int) -> None:
        await agent.db.search_memories(embedding=queries[number % len(queries)], table_name=TABLE)

    async def measure() -> Comparison:
        async with bare(one.dsn, tuned=True) as connection, AsyncExitStack() as stack:
            # With the default budget. "required" for a first search that waits for the vectors.
            tier = await open_adapter(one.dsn, agent.db.agent_id, resident="required")
            stack.push_async_callback(tier.close)
            await within(tier, "world 0", {})(0)
            assert tier._resident.stats.hits == 1  # what an adapter before had loaded may still be held
            vector = [_codecs.encode_vector(query) for query in queries]

            def exact(world: UUID) -> Call:
                async def search(number: int) -> None:
                    await connection.fetch(EXACT, vector[number % len(queries)], agent.db.agent_id, TABLE, world)

                return search

            variants: dict[str, Call] = {"agent-wide": everywhere}
            for name, (options, _) in scopes.items():
                variants[name] = within(agent.db, name, found[name])
                variants[f"resident {name}"] = within(tier, name, found_resident[name])
                if name in scanned:
                    variants[f"exact {name}"] = exact(options["world_id"])
            return await interleave(variants, sized(200, 2), warmup=sized(20, 1))

    comparison = run(measure())
    rows: list[list[str]] = []
    means: list[dict[str, float]] = [{}, {}]
    for name, (_, among) in scopes.items():
        scope = _Scope(agent, among)
        for kept, mean in zip((found, found_resident), means, strict=True):
            recalls = [scope.recall(queries[n % len(queries)], hits) for n, hits in kept[name].items() if n >= 0]
            mean[name] = float(np.mean(recalls))
        exactly = f"exact {name}"
        rows.append(
            [
                name,
                f"{len(among):,}",
                f"{means[0][name]:.4f}",
                micro(comparison.median(name)),
                micro(comparison.p95(name)),
                f"{comparison.ratio(name):.2f}",
                f"{means[1][name]:.4f}",
                micro(comparison.median(f"resident {name}")),
                micro(comparison.p95(f"resident {name}")),
                micro(comparison.median(exactly)) if exactly in comparison.seconds else "",
            ]
        )
    header = ["scope", "rows", "recall", "p50 us", "p95 us", "p50 over agent-wide"]
    header += ["resident: recall", "p50 us", "p95 us", "exact scan: p50 us"]
    report.table("Search in scopes whose rows lie anywhere, 1 agent", header, rows)
    record(benchmark, comparison, "world 2")
    report.recall("1 agent: of worlds, an entity, and a room, an entity and a world", means[0])
    # What is larger is left to the database by the resident tier, too.
    compared = [name for name, (_, among) in scopes.items() if len(among) * data.WIDTH <= _MOST_COMPONENTS]
    report.recall("1 agent: of those compared in the process", {name: means[1][name] for name in compared}, 1.0)
    asked = sum(map(len, (*found.values(), *found_resident.values())))
    # `_Scope.recall` has seen to it for every search.
    report.goal("1 agent, these scopes: fewer than min(10, matches) rows", f"0 of {asked:,}", "never", True)
    if scanned:
        slowest = max(scanned, key=comparison.median)
        for where, variant in (("in the database", slowest), ("resident", f"resident {slowest}")):
            share = comparison.median(variant) / comparison.median(f"exact {slowest}")
            what = f"1 agent: the slowest world over its exact scan, {where}"
            report.goal(what, comparison.times(variant, f"exact {slowest}"), "≤ 0.5 x", share <= 0.5)


def test_filters(benchmark: Any, run: Run, one: Database, vectors: data.Data, report: Report) -> None:
    """What passes a filter is looked for among the nearest, and where too few do, among all that pass."""
    agent, queries = one.agents[0], vectors.queries
    filters: dict[str, tuple[dict[str, Any], data.Ints]] = {}
    everything = np.arange(len(agent.ids))
    for parts in (2, 10, 100):
        kept = max(1, len(everything) // parts)
        first = (len(everything) - kept) // 2
        # From half a second before the first to half a second after the last.
        start, end = (BEGUN + timedelta(seconds=position - 0.5) for position in (first, first + kept))
        filters[f"time, 1 of {parts}"] = {"start": start, "end": end}, everything[first : first + kept]
        filters[f"metadata, 1 of {parts}"] = {"metadata": {f"of_{parts}": 1}}, everything[everything % parts == 1]
    found: dict[str, dict[int, list[Memory]]] = {name: {} for name in filters}

    def search(kept: dict[int, list[Memory]], **options: Any) -> Call:
        async def call(number: int) -> None:
            query = queries[number % len(queries)]
            kept[number] = await agent.db.search_memories(embedding=query, table_name=TABLE, **options)

        return call

    variants = {"no filter": search({})}
    variants |= {name: search(found[name], **options) for name, (options, _) in filters.items()}
    comparison = run(interleave(variants, sized(50, 2), warmup=sized(5, 1)))
    rows, recalls = [], []
    for name, (_, among) in filters.items():
        scope = _Scope(agent, among)
        recalls.append(
            float(np.mean([scope.recall(queries[n % len(queries)], hits) for n, hits in found[name].items()]))
        )
        rows.append(
            [
                *(name, f"{len(among):,}", f"{recalls[-1]:.4f}", micro(comparison.median(name))),
                *(micro(comparison.p95(name)), f"{comparison.ratio(name):.2f}"),
            ]
        )
    header = ["filter", "rows that pass", "recall", "p50 us", "p95 us", "p50 over no filter"]
    title = f"Search under filters, 1 agent; without any p50 {micro(comparison.median('no filter'))} us"
    report.table(title, header, rows)
    record(benchmark, comparison, "time, 1 of 10")
    worst = min(recalls)
    report.goal("1 agent: recall@10 under filters, the worst", f"{worst:.4f}", "≥ 0.99", worst >= 0.99)


def test_threshold(benchmark: Any, run: Run, ten: Database, vectors: data.Data, report: Report) -> None:
    """Of the nearest ten those above a threshold: how fast, and how many of them are found."""
    agent, queries = ten.agents[0], vectors.queries
    thresholds = (None, 0.3, 0.6, 0.9)
    found: dict[float | None, dict[int, list[Memory]]] = {each: {} for each in thresholds}

    def search(threshold: float | None) -> Call:
        async def call(number: int) -> None:
            query = queries[number % len(queries)]
            found[threshold][number % len(queries)] = await agent.db.search_memories(
                embedding=query, table_name=TABLE, match_threshold=threshold
            )

        return call

    variants = {f"threshold {each}": search(each) for each in thresholds}
    comparison = run(interleave(variants, sized(300, 2), warmup=sized(30, 1)))
    recalls = {each: _recall_above(agent, queries, hits, each) for each, hits in found.items()}
    report.table(
        "Search with a threshold, agent-wide",
        [*HEADER, "rows found a search", "recall of those above it"],
        [
            [*row, f"{np.mean([len(hits) for hits in found[each].values()]):.1f}", f"{recalls[each]:.4f}"]
            for row, each in zip(comparison.rows(), thresholds, strict=True)
        ],
    )
    record(benchmark, comparison, "threshold 0.6")
    worst = min(recalls.values())
    report.goal("10 agents: recall@10 above a threshold, the worst", f"{worst:.4f}", "≥ 0.99", worst >= 0.99)


def _recall_above(
    agent: Stored, queries: data.Floats, found: dict[int, list[Memory]], threshold: float | None
) -> float:
    """Give the share of the nearest above a threshold that were found, of all questions together.

    What is not above it, or comes twice, is an error. Similarities that differ by less than 1e-6 are equal.
    """
    least = -1.0 if threshold is None else threshold
    wanted = right = 0
    for number, hits in found.items():
        similarities = agent.vectors @ queries[number]
        tenth = np.partition(similarities, -COUNT)[-COUNT:].min() if len(similarities) > COUNT else -1.0
        mine = similarities[[agent.positions[hit.id] for hit in hits if hit.id is not None]]
        assert len({hit.id for hit in hits}) == len(mine)
        assert (mine >= least - 1e-6).all(), "below the threshold"
        sure = int((similarities >= max(tenth, least + 1e-6)).sum())
        wanted += min(COUNT, sure)
        right += min(COUNT, sure, int((mine >= tenth - 1e-6).sum()))
    return right / wanted if wanted else 1.0


def test_tail(benchmark: Any, run: Run, ten: Database, vectors: data.Data, report: Report) -> None:
    """What a tail of new vectors costs until they are indexed; another agent's search is the measure beside it."""
    agent, other = ten.agents[0], ten.agents[1]
    strange = np.concatenate([each.vectors for each in ten.agents[2:]])
    topics = np.concatenate([each.topics for each in ten.agents[2:]])
    pick = np.random.default_rng(4).permutation(len(strange))
    rounds = sized(500, 3)
    rows: list[list[str]] = []
    means: dict[str, float] = {}
    comparisons: dict[int, Comparison] = {}
    added: list[UUID] = []
    whole = agent
    for tail in (0, sized(500, 5), sized(5000, 50)):
        new = pick[len(added) : tail]
        batch = [agent.memory(strange[row], int(topics[row]), int(row)) for row in new]
        added += run(agent.db.create_memories(batch, TABLE))
        known = np.concatenate([agent.vectors, strange[pick[: len(added)]]])
        ids = agent.ids + added
        whole = replace(agent, ids=ids, positions={id: at for at, id in enumerate(ids)}, vectors=known)
        found: dict[int, list[Memory]] = {}

        async def without_tail(number: int) -> None:
            query = vectors.queries[number % len(vectors.queries)]
            await other.db.search_memories(embedding=query, table_name=TABLE)

        async def with_tail(number: int, found: dict[int, list[Memory]] = found) -> None:
            query = vectors.queries[number % len(vectors.queries)]
            found[number] = await agent.db.search_memories(embedding=query, table_name=TABLE)

        comparison = run(
            interleave({"another agent": without_tail, "agent": with_tail}, rounds, warmup=min(50, rounds))
        )
        comparisons[tail] = comparison
        scope = _Scope(whole)
        recalls = [scope.recall(vectors.queries[n], hits) for n, hits in found.items() if n >= 0]
        means[f"{len(added):,}"] = float(np.mean(recalls))
        rows.append(
            [
                f"{len(added):,}",
                f"{np.mean(recalls):.4f}",
                micro(comparison.median("agent")),
                micro(comparison.p95("agent")),
                f"{comparison.ratio('agent') / comparisons[0].ratio('agent'):.2f}",
            ]
        )
    run(agent.db.delete_memories(added))
    report.table(
        "Search, agent-wide, with new vectors that are not indexed yet",
        ["tail", "recall", "p50 us", "p95 us", "ratio to no tail"],
        rows,
    )
    record(benchmark, comparisons[sized(500, 5)], "agent")
    report.recall("10 agents, with a tail of new vectors", means)
