"""Taking over what the original has stored: rows a second, and whether a search finds the same as in its own tables."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any
from uuid import UUID, uuid4

import numpy as np
import pytest

import elizasql
from benchmarks import data
from benchmarks.conftest import QUICK, TABLE, Run, bare, open_adapter, sized
from benchmarks.report import Comparison, Report, played_back, record
from elizasql import Config, _codecs, _embedded
from elizasql.transfer.elizaos import import_elizaos
from tests.elizaos_schema import TABLES

pytestmark = pytest.mark.benchmark(timer=played_back, group="import")

SIZE = sized(50_000, 500)
AGENTS = 2


# What each side has of every agent and type: memories, vectors, and one hash of all that is in them.
_CONTENTS = """
SELECT
    m.agent_id,
    m.type,
    count(*),
    count(e.dim_384),
    md5(string_agg(
        md5(ROW(
            m.id, m.entity_id, m.room_id, m.world_id, m.content, m.metadata, m."unique",
            extract(EPOCH FROM m.created_at), vector_send(e.dim_384)
        )::text),
        '' ORDER BY m.id
    ))
FROM {schema}.memories AS m
LEFT JOIN {schema}.embeddings AS e ON e.memory_id = m.id
WHERE m.agent_id = ANY($1)
GROUP BY m.agent_id, m.type
ORDER BY m.agent_id, m.type
"""


@pytest.fixture
def dsn(run: Run, folder: Path) -> Iterator[str]:
    """Give the address of a server whose schema public is free."""
    if os.environ.get("ELIZASQL_TEST_URL"):
        pytest.skip("makes the original's tables in the schema public")
    server = run(_embedded.acquire(folder / "pg-import"))
    yield server.dsn
    run(server.release())


async def _fill(dsn: str, vectors: data.Data, agents: list[UUID], ids: list[UUID]) -> None:
    """Make the original's tables with memories as it stores them, dealt to the agents in turn."""
    rooms, people = [uuid4() for _ in range(20)], [uuid4() for _ in range(20)]
    async with bare(dsn, tuned=True) as connection:
        await connection.execute(TABLES)
        await connection.executemany("INSERT INTO agents (id, name) VALUES ($1, 'Agent')", [(id,) for id in agents])
        for number, agent in enumerate(agents):
            mine = slice(number * 10, number * 10 + 10)
            await connection.executemany(
                "INSERT INTO rooms (id, agent_id, source, type) VALUES ($1, $2, 'x', 'GROUP')",
                [(id, agent) for id in rooms[mine]],
            )
            await connection.executemany(
                "INSERT INTO entities (id, agent_id, names) VALUES ($1, $2, '{Somebody}')",
                [(id, agent) for id in people[mine]],
            )
        await connection.execute("CREATE TEMP TABLE given (id uuid, number int, embedding vector(384))")
        await connection.copy_records_to_table(
            "given",
            records=[(id, row, _codecs.encode_vector(vectors.vectors[row])) for row, id in enumerate(ids)],
        )
        await connection.execute(
            """
            INSERT INTO memories (id, type, content, entity_id, agent_id, room_id, created_at)
            SELECT id, CASE WHEN number % 10 < 8 THEN $1 ELSE 'facts' END,
                jsonb_build_object('text', 'Memory ' || number || repeat(' of no account', number % 15)),
                ($2::uuid[])[1 + number % 2 * 10 + number % 10], ($3::uuid[])[1 + number % 2],
                ($4::uuid[])[1 + number % 2 * 10 + number / 2 % 10], timestamp '2025-01-01' + number * interval '1 s'
            FROM given
            """,
            TABLE,
            people,
            agents,
            rooms,
        )
        await connection.execute("INSERT INTO embeddings (memory_id, dim_384) SELECT id, embedding FROM given")
        await connection.execute("ANALYZE")


def test_import(benchmark: Any, run: Run, dsn: str, vectors: data.Data, report: Report) -> None:
    agents, ids = [uuid4() for _ in range(AGENTS)], [uuid4() for _ in range(min(SIZE, len(vectors.vectors)))]

    taken_by_index: list[float] = []
    found: dict[str, list[float]] = {"recall@10": [], 'recall@10, recall="exact"': []}

    async def measure() -> tuple[float, list[list[Any]]]:
        await _fill(dsn, vectors, agents, ids)
        async with elizasql.connect(agent_id=uuid4(), dsn=dsn, indexing="manual", timeout=3600) as db:
            begun = perf_counter()
            summary, _ = await import_elizaos(dsn, Config.load(dsn=dsn), db)
            taken = perf_counter() - begun
            assert summary.created["memories"] == summary.created["embeddings"] == len(ids)
            assert not summary.refused
            assert not summary.altered
            async with bare(dsn, tuned=True) as connection:
                sides = [
                    [tuple(row) for row in await connection.fetch(_CONTENTS.format(schema=schema), agents)]
                    for schema in ("public", "elizasql")
                ]
            again, _ = await import_elizaos(dsn, Config.load(dsn=dsn), db)
            assert not +again.created
        for number, agent in enumerate(agents):
            mine = np.array([row for row in range(number, len(ids), AGENTS) if row % 10 < 8])
            place = {ids[row]: at for at, row in enumerate(mine)}
            exact = data.Exact(vectors.vectors[mine])
            db = await open_adapter(dsn, agent)
            begun = perf_counter()
            await db.index_memories(rebuild=True)
            taken_by_index.append(perf_counter() - begun)
            for query in vectors.queries[: sized(100, 5)]:
                for kept, recall in zip(found.values(), ("balanced", "exact"), strict=True):
                    hits = await db.search_memories(embedding=query, table_name=TABLE, recall=recall)  # type: ignore[arg-type]
                    positions = [place[hit.id] for hit in hits if hit.id is not None]
                    kept.append(exact.recall_in_full(query, positions))
            await db.close()
        return taken, sides

    taken, (before, after) = run(measure())
    rate = len(ids) / taken
    recalls = {what: float(np.mean(shares)) for what, shares in found.items()}
    report.table(
        "Import of a database of the original, whose tables and rows were made by hand here, as 1.7.2 makes them",
        ["memories with vectors", "seconds", "memories/s", "indexes of both agents, seconds", *recalls],
        [
            [
                *(f"{len(ids):,}", f"{taken:.1f}", f"{rate:,.0f}", f"{sum(taken_by_index):.1f}"),
                *(f"{recall:.4f}" for recall in recalls.values()),
            ]
        ],
    )
    size = len(ids)
    usual, exactly = recalls.values()
    report.recall("after the import", {"": usual}, size=size, of=50_000)
    report.recall('after the import, recall="exact"', {"": exactly}, 1.0, size=size, of=50_000)
    same = sum(there == here for there, here in zip(before, after, strict=False))
    what = "imported memories and vectors, hashed by agent and type, as in the original's tables"
    report.goal(what, f"{same} of {len(before)} equal", "all", before == after, size=size, of=50_000)
    what = "import of the original's memories"
    report.goal(what, f"{rate:,.0f}/s", "≥ 5,000/s", rate >= 5000, size=size, of=50_000)
    record(benchmark, Comparison({"import": [taken]}), "import")
    assert len(before) == 2 * AGENTS
    assert before == after, "not what the original has"
    assert exactly == 1.0, "not what an exact search finds"
    if QUICK:
        assert usual >= 0.9
