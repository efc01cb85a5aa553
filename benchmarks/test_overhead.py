"""What the library costs: the same statement on a bare asyncpg connection, through the executor, through the method."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar
from uuid import UUID, uuid4

import asyncpg
import pytest
from pgvector import Vector

import elizasql
from benchmarks import data
from benchmarks.conftest import TABLE, Database, Run, open_adapter, sent_by, sized
from benchmarks.report import HEADER, Comparison, Report, interleave, played_back, record
from elizasql import Config, Memory, _codecs, _pool
from elizasql.types import Embedding

T = TypeVar("T")

pytestmark = pytest.mark.benchmark(timer=played_back, group="overhead")

# So many different calls take turns.
DIFFERENT = sized(1000, 50)
RAW, ENCODED, EXECUTOR, METHOD = "bare asyncpg", "bare asyncpg, encoded before", "pool and executor", "public method"


async def _compare(
    dsn: str,
    agent_id: UUID,
    method: Callable[[elizasql.DatabaseAdapter, int], Awaitable[Any]],
    embeddings: Sequence[Embedding] | None = None,
) -> tuple[Comparison, str]:
    """Run what a method sends in several ways, with a connection of this event loop; give the statement's name, too.

    Args:
        dsn: Where.
        agent_id: Whose rows.
        method: The public method, with the arguments of a number.
        embeddings: What it is given, when that is vectors: then the bare call begins with them as well, and encodes
            them by pgvector's own codec, as a program without the library does.
    """
    # A single connection for all three: a second one has a process of its own in the server, and the two find the
    # caches of the processor in different states (100 us of 1,100).
    db = await open_adapter(dsn, agent_id, pool_max_size=1)
    try:
        # After a first call it is known how large the scope is, which decides what later ones send.
        await method(db, 0)
        sent = [(await sent_by(db, partial(method, db, number)))[0] for number in range(DIFFERENT)]
        ready = [(each.sql, each.arguments) for each in sent]
        places = [each.statement.params.index("embedding") for each in sent] if embeddings is not None else []
        connection = (await db._executor.lane.acquire(5))[0]
        db._executor.lane.keep(connection)
        same = connection._con

        async def encoded(number: int) -> Any:
            sql, arguments = ready[number % DIFFERENT]
            return await same.fetch(sql, *arguments)

        async def raw(number: int) -> Any:
            number %= DIFFERENT
            assert embeddings is not None
            sql, arguments = ready[number]
            values = list(arguments)
            values[places[number]] = Vector(embeddings[number]).to_binary()
            return await same.fetch(sql, *values)

        async def executor(number: int) -> Any:
            each = sent[number % DIFFERENT]
            return await db._executor.fetch(each.statement, **each.params)

        async def public(number: int) -> Any:
            return await method(db, number % DIFFERENT)

        bare = {RAW: encoded} if embeddings is None else {RAW: raw, ENCODED: encoded}
        variants = bare | {EXECUTOR: executor, METHOD: public}
        return await interleave(variants, sized(3000, 2), warmup=sized(300, 1)), sent[0].statement.name
    finally:
        await db.close()


def _on_loop(kind: str, work: Awaitable[T]) -> T:
    """Run on a new event loop of a kind."""
    loop = pytest.importorskip("uvloop").new_event_loop() if kind == "uvloop" else asyncio.SelectorEventLoop()
    try:
        return loop.run_until_complete(work)
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


@pytest.mark.parametrize("loop_kind", ["asyncio", "uvloop"])
def test_search_memories(benchmark: Any, ten: Database, vectors: data.Data, report: Report, loop_kind: str) -> None:
    async def method(db: elizasql.DatabaseAdapter, number: int) -> Any:
        return await db.search_memories(embedding=vectors.queries[number], table_name=TABLE)

    found, statement = _on_loop(loop_kind, _compare(ten.dsn, ten.agents[0].db.agent_id, method, vectors.queries))
    record(benchmark, found, METHOD)
    report.table(f"Search, agent-wide: {statement}, {loop_kind}", HEADER, found.rows())
    _hold(report, found, "search_memories", loop_kind)


def _hold(report: Report, found: Comparison, name: str, loop_kind: str) -> None:
    """Hold what a method costs to the goal."""
    limit = {"asyncio": 40, "uvloop": 25}[loop_kind]
    more, least = found.more(METHOD) * 1e6, found.more_at_least(METHOD) * 1e6
    parts = [each * 1e6 for each in found.more_by_stretch(METHOD)]
    measured = f"{more:+.0f} us ({min(parts):+.0f} to {max(parts):+.0f}; fastest calls: {least:+.0f})"
    report.goal(f"{name} over bare asyncpg, {loop_kind}", measured, f"≤ {limit} us", more <= limit)


@pytest.mark.parametrize("loop_kind", ["asyncio", "uvloop"])
def test_get_memory_by_id(benchmark: Any, ten: Database, report: Report, loop_kind: str) -> None:
    agent = ten.agents[0]

    async def method(db: elizasql.DatabaseAdapter, number: int) -> Any:
        return await db.get_memory_by_id(agent.ids[number % len(agent.ids)])

    found, statement = _on_loop(loop_kind, _compare(ten.dsn, agent.db.agent_id, method))
    record(benchmark, found, METHOD)
    report.table(f"{statement}, {loop_kind}", HEADER, found.rows())
    _hold(report, found, "get_memory_by_id", loop_kind)


def test_new_connection(benchmark: Any, run: Run, ten: Database, report: Report) -> None:
    """What makes a connection one of the library's, when the process has had another before."""

    async def connected(*, ours: bool) -> None:
        options = {"connection_class": _pool._Connection} if ours else {}
        connection = await asyncpg.connect(ten.dsn, server_settings=_pool.session_settings(Config()), **options)
        if ours:
            await _codecs.register(connection, "public")
        else:
            await connection.execute("SELECT 1")
        await connection.close()

    variants = {RAW: lambda _: connected(ours=False), "ours": lambda _: connected(ours=True)}
    found = run(interleave(variants, sized(200, 2), warmup=1))
    record(benchmark, found, "ours")
    report.table("A new connection", HEADER, found.rows())


def test_open(benchmark: Any, run: Run, report: Report, vectors: data.Data) -> None:
    """From nothing, not even a data directory, to the first answer; then again with everything in place."""
    agent_id = uuid4()
    folder = Path(tempfile.mkdtemp(prefix="esql-"))

    async def answer() -> float:
        begun = perf_counter()
        async with elizasql.connect(agent_id=agent_id, data_dir=folder / "pg") as db:
            await db.ensure_agent_exists({"name": "Ada"})
            await db.ensure_embedding_dimension(data.WIDTH)
            memory = Memory(content={"text": "hello"}, embedding=vectors.queries[0], unique=True)
            await db.create_memory(memory, TABLE)
            assert await db.search_memories(embedding=vectors.queries[0], table_name=TABLE)
            return perf_counter() - begun

    try:
        first, *later = [run(answer()) for _ in range(sized(6, 2))]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    record(benchmark, Comparison({"later": later}), "later")
    benchmark.extra_info["first"] = first
    report.goal(
        "first open of an empty data directory to the first answer", f"{first:.2f} s", "≤ 5 s", first <= 5, of=0
    )
    worst = max(later)
    report.goal("later opens to the first answer, the slowest", f"{worst:.2f} s", "≤ 1 s", worst <= 1, of=0)
