"""A bulk load into a new agent, index and all, against the same by create_memories."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import numpy as np
import pytest

from benchmarks import data
from benchmarks.conftest import QUICK, ROWS, TABLE, Run, open_adapter, served, sized
from benchmarks.report import MILLION, Comparison, Report, grown, interleave, micro, played_back, record
from elizasql import DatabaseAdapter, Entity, Memory, Room

pytestmark = pytest.mark.benchmark(timer=played_back, group="load")

_STEP = 5000


@asynccontextmanager
async def _opened(dsn: str, agent: UUID, **options: Any) -> AsyncIterator[DatabaseAdapter]:
    db = await open_adapter(dsn, agent, **options)
    try:
        yield db
    finally:
        await db.close()


@asynccontextmanager
async def _new_agent(dsn: str) -> AsyncIterator[tuple[DatabaseAdapter, UUID, UUID]]:
    """Give an agent with a room and an entity, for as long as the block runs."""
    room, entity = uuid4(), uuid4()
    async with _opened(dsn, uuid4()) as db:
        await _populate(db, room, entity)
        yield db, room, entity
        await db.delete_agent(db.agent_id)


async def _populate(db: DatabaseAdapter, room: UUID, entity: UUID) -> None:
    """Make the agent with its width, a room and an entity."""
    await db.ensure_agent_exists({"name": "loads"})
    await db.ensure_embedding_dimension(data.WIDTH)
    await db.create_room(Room(id=room, source="benchmark", type="GROUP"))
    await db.create_entity(Entity(id=entity, names=["Entity"]))


def _memories(vectors: data.Floats, room: UUID, entity: UUID) -> Iterator[Memory]:
    for number, vector in enumerate(vectors):
        text = {"text": f"Memory {number}: what was said here is of no account, only that it is about as long as talk."}
        yield Memory(room_id=room, entity_id=entity, content=text, unique=True, embedding=vector)


def _recall(exact: data.Exact, query: data.Floats, hits: list[Memory]) -> float:
    """Compare what was found; too few rows are an error."""
    positions = [int(str(hit.content["text"]).split()[1].rstrip(":")) for hit in hits if hit.content]
    return exact.recall_in_full(query, positions)


def test_load_memories(benchmark: Any, run: Run, folder: Path, vectors: data.Data, report: Report) -> None:
    """The rows alone, and with the index; the index is the same, and so must be what a search finds."""
    size, repeats = min(ROWS, sized(50_000, 300)), sized(2, 1)
    chosen = vectors.vectors[:size]
    stored: dict[str, list[float]] = {"create_memories, index_memories(rebuild)": [], "load_memories": []}
    whole: dict[str, list[float]] = {way: [] for way in stored}
    found: dict[str, list[float]] = {way: [] for way in stored}
    exact = data.Exact(chosen)

    async def recall(db: DatabaseAdapter) -> float:
        shares = []
        for query in vectors.queries[: sized(500, 5)]:
            hits = await db.search_memories(embedding=query, table_name=TABLE)
            shares.append(_recall(exact, query, hits))
        return float(np.mean(shares))

    async def measure(dsn: str, way: str) -> None:
        async with _new_agent(dsn) as (db, room, entity):
            memories = _memories(chosen, room, entity)
            begun = time.perf_counter()
            if way == "load_memories":
                marks: list[float] = []
                await db.load_memories(memories, TABLE, progress=lambda *_: marks.append(time.perf_counter()))
                rows = marks[-1]
            else:
                while batch := list(islice(memories, _STEP)):
                    await db.create_memories(batch, TABLE)
                rows = time.perf_counter()
                await db.index_memories(rebuild=True)
            whole[way].append(time.perf_counter() - begun)
            stored[way].append(rows - begun)
            found[way].append(await recall(db))

    with served(run, folder / ("pg" if QUICK else "load")) as dsn:
        for number in range(repeats):
            for way in list(stored)[:: -1 if number % 2 else 1]:
                run(measure(dsn, way))

    comparison = Comparison(whole)
    record(benchmark, comparison, "load_memories")
    before, after = (comparison.median(way) for way in whole)
    report.table(
        f"a load of {size:,} into a new agent",
        ["way", "rows/s, index and all", "rows/s stored", "share of the index", "recall@10"],
        [
            [
                way,
                f"{size / comparison.median(way):,.0f}",
                f"{size / Comparison(stored).median(way):,.0f}",
                f"{1 - Comparison(stored).median(way) / comparison.median(way):.0%}",
                f"{np.mean(found[way]):.3f}",
            ]
            for way in whole
        ],
    )
    rates = sorted(size / seconds for seconds in whole["load_memories"])
    measured = f"{size / after:,.0f} rows/s ({rates[0]:,.0f}-{rates[-1]:,.0f})"
    what = f"load_memories of {size:,} into a new agent, index and all"
    report.goal(what, measured, "≥ 4,000 rows/s", size / after >= 4_000, size, MILLION)
    what, measured = f"load_memories of {size:,} over create_memories", comparison.times("load_memories")
    report.goal(what, measured, "≤ 1 x", after <= before, size, 50_000)


def test_growth(benchmark: Any, run: Run, folder: Path, report: Report) -> None:
    """One agent that gets ten times as many memories, and again: the load, and what a search takes and finds then.

    The embedded server starts anew between load and searches: it takes buffers for what it finds stored at its start.
    """
    largest = int(os.environ.get("ELIZASQL_BENCH_GROWTH") or sized(ROWS, 300))
    steps = (100, 10_000, 100_000, 1_000_000)
    sizes = [size for size in steps if sized(10_000, 100) <= size <= largest] or [largest]
    given = data.load(max(sizes), sized(500, 5))
    agent, room, entity = uuid4(), uuid4(), uuid4()
    memories = _memories(given.vectors, room, entity)
    comparisons: dict[int, Comparison] = {}
    found_at: dict[int, float] = {}
    rows: list[list[str]] = []
    loading = 0.0

    async def prepare(dsn: str) -> None:
        async with _opened(dsn, agent) as db:
            await _populate(db, room, entity)

    async def load(dsn: str, count: int) -> tuple[float, float]:
        """Give the seconds until all is stored, and until it is indexed, too."""
        marks: list[float] = []
        async with _opened(dsn, agent) as db:
            begun = time.perf_counter()
            await db.load_memories(
                islice(memories, count), TABLE, progress=lambda *_: marks.append(time.perf_counter())
            )
            return marks[-1] - begun, time.perf_counter() - begun

    async def search(dsn: str, size: int) -> tuple[Comparison, list[float]]:
        """Give what searches take, and their recall, as they come and with twice the ef_search."""
        found: list[list[tuple[int, list[Memory]]]] = [[], []]
        async with _opened(dsn, agent) as db, _opened(dsn, agent, ef_search=200) as thorough:

            async def one(db: DatabaseAdapter, kept: list[tuple[int, list[Memory]]], number: int) -> None:
                query = number % len(given.queries)
                kept.append((query, await db.search_memories(embedding=given.queries[query], table_name=TABLE)))

            variants = {"search": partial(one, db, found[0]), "ef_search twice": partial(one, thorough, found[1])}
            comparison = await interleave(variants, sized(500, 2), warmup=sized(500, 1))
        exact = data.Exact(given.vectors[:size])
        recalls = [
            [_recall(exact, given.queries[query], hits) for query, hits in kept[-sized(200, 2) :]] for kept in found
        ]
        return comparison, [float(np.mean(each)) for each in recalls]

    async def clear(dsn: str) -> None:
        async with _opened(dsn, agent) as db:
            await db.delete_agent(agent)

    place = folder / ("pg" if QUICK else "growth")
    for before, size in zip([0, *sizes], sizes, strict=False):
        with served(run, place) as dsn:
            if not before:
                run(prepare(dsn))
            stored, taken = run(load(dsn, size - before))
        loading += taken
        with served(run, place) as dsn:
            comparison, recalls = run(search(dsn, size))
        comparisons[size], found_at[size] = comparison, recalls[0]
        rows.append(
            [
                f"{size:,}",
                *(f"{(size - before) / stored:,.0f}", f"{(size - before) / taken:,.0f}"),
                *(f"{recalls[0]:.4f}", micro(comparison.median("search")), micro(comparison.p95("search"))),
                *(f"{recalls[1]:.4f}", micro(comparison.median("ef_search twice"))),
            ]
        )
    with served(run, place) as dsn:
        run(clear(dsn))

    header = ["memories", "rows/s stored", "rows/s, index and all", "recall@10", "p50 us", "p95 us"]
    header += ["ef_search twice: recall@10", "p50 us"]
    report.table(f"Growth of one agent by load_memories, {given.source}, 384 dimensions", header, rows)
    record(benchmark, comparisons[sizes[-1]], "search")
    # An index for each step: somewhat harder than one load of as many.
    rate, steps_taken = sizes[-1] / loading, f"{len(sizes)} step{'s' * (len(sizes) > 1)}"
    what = f"load_memories of {sizes[-1]:,} into one agent in {steps_taken}, index and all"
    report.goal(what, f"{rate:,.0f} rows/s", "≥ 4,000 rows/s", rate >= 4_000, sizes[-1], MILLION)
    if len(sizes) > 1:
        small, large = (comparisons[size] for size in (sizes[0], sizes[-1]))
        growth = large.median("search") / small.median("search")
        # The two were measured apart: any stretch of the one against any of the other.
        parts = [b / a for a in small.stretches("search") for b in large.stretches("search")]
        what = f"growth of one agent, {sizes[0]:,} to {sizes[-1]:,}"
        ends = found_at[sizes[0]], found_at[sizes[-1]]
        report.goal(*grown(what, growth, parts, ends, sizes[-1]))
