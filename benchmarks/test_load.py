"""A bulk load into a new agent, index and all, against the same by create_memories."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import numpy as np
import pytest

from benchmarks import data
from benchmarks.conftest import QUICK, ROWS, TABLE, Run, open_adapter, served, sized
from benchmarks.report import Comparison, Report, played_back, record
from elizasql import DatabaseAdapter, Entity, Memory, Room

pytestmark = pytest.mark.benchmark(timer=played_back, group="load")

_STEP = 5000


@asynccontextmanager
async def _new_agent(dsn: str) -> AsyncIterator[tuple[DatabaseAdapter, UUID, UUID]]:
    """Give an agent with a room and an entity, for as long as the block runs."""
    db = await open_adapter(dsn, uuid4())
    try:
        await db.ensure_agent_exists({"name": "loads"})
        await db.ensure_embedding_dimension(data.WIDTH)
        room, entity = uuid4(), uuid4()
        await db.create_room(Room(id=room, source="benchmark", type="GROUP"))
        await db.create_entity(Entity(id=entity, names=["Entity"]))
        yield db, room, entity
        await db.delete_agent(db.agent_id)
    finally:
        await db.close()


def _memories(vectors: data.Floats, room: UUID, entity: UUID) -> Iterator[Memory]:
    for number, vector in enumerate(vectors):
        text = {"text": f"Memory {number}: what was said here is of no account, only that it is about as long as talk."}
        yield Memory(room_id=room, entity_id=entity, content=text, unique=True, embedding=vector)


def test_load_memories(benchmark: Any, run: Run, folder: Path, vectors: data.Data, report: Report) -> None:
    """The rows alone, and with the index; the index is the same, and so must be what a search finds."""
    size, repeats = min(ROWS, sized(50_000, 300)), sized(2, 1)
    chosen = vectors.vectors[:size]
    stored: dict[str, list[float]] = {"create_memories, index_memories(rebuild)": [], "load_memories": []}
    whole: dict[str, list[float]] = {way: [] for way in stored}
    found: dict[str, float] = {}

    async def recall(db: DatabaseAdapter) -> float:
        shares = []
        for query in vectors.queries[: sized(1000, 5)]:
            hits = await db.search_memories(embedding=query, table_name=TABLE)
            at = [int(str(hit.content["text"]).split()[1].rstrip(":")) for hit in hits if hit.content]
            shares.append(data.recall(chosen, query, at, 10))
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
            found[way] = await recall(db)

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
                f"{found[way]:.3f}",
            ]
            for way in whole
        ],
    )
    report.goal("load_memories, index and all", f"{size / after:,.0f} rows/s", "≥ 4,000 rows/s", size / after >= 4_000)
    report.goal("load_memories over create_memories", f"{before / after:.2f} x", "≥ 1 x", before >= after)
