"""The dimension lock: whatever clients do, in whatever order, an agent has vectors of one width and whole memories.

The state machine draws interleavings of locks, writes of right and wrong widths, deletes, indexing, raw SQL attacks and
kills, over several adapters and two processes of one agent. After each step a bare connection looks at the tables. The
other tests are the races, attacks and kills that must not be left to chance, each arranged with a lock in the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import itertools
import os
import pickle
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias
from uuid import UUID, uuid4

import asyncpg
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

import elizasql
from elizasql import (
    ArgumentError,
    DatabaseAdapter,
    DeadlockError,
    EmbeddingDimensionError,
    Entity,
    NotFoundError,
    Room,
    World,
    errors,
)
from elizasql.types import DIMENSIONS

from .conftest import MakeAdapter

Vector = np.ndarray[Any, np.dtype[np.float32]]
Raw: TypeAlias = "asyncpg.Connection[Any]"
Call = tuple[str, tuple[Any, ...], dict[str, Any]]

WORKER = Path(__file__).with_name("dimension_worker.py")
WIDTHS = (384, 512, 768)


def vector_of(width: int, mark: int) -> Vector:
    """Make a vector that can be told from every other: its first two components are a number."""
    vector = np.full(width, 0.5, np.float32)
    vector[0], vector[1] = mark // 1000 + 1, mark % 1000 + 1
    return vector


def text_of(vector: Vector) -> str:
    return str(vector.tolist())


# --- a client in another process ---


class Worker:
    """A process that runs dimension_worker."""

    def __init__(self) -> None:
        self.name = f"worker-{uuid4()}"
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(elizasql.__file__).parents[1])},
        )
        self.is_open = False

    def send(self, *command: Any) -> None:
        assert self.process.stdin is not None
        pickle.dump(command, self.process.stdin)
        self.process.stdin.flush()

    def receive(self) -> Any:
        assert self.process.stdout is not None
        return pickle.load(self.process.stdout)

    async def ask(self, *command: Any) -> Any:
        self.send(*command)
        return await asyncio.to_thread(self.receive)

    async def open(self, dsn: str, agent_id: UUID, **options: Any) -> None:
        options = {"application_name": self.name, "pool_min_size": 0, "pool_max_size": 4, **options}
        await self.ask("open", dsn, agent_id, options)
        self.is_open = True

    async def run(self, *calls: Call) -> list[Any]:
        outcomes: list[Any] = await self.ask("run", list(calls))
        return outcomes

    async def kill(self, raw: Raw) -> list[Any]:
        """Kill the process, and give what it had still answered, after the server has ended its sessions."""
        self.process.kill()
        left = []
        with contextlib.suppress(EOFError, pickle.UnpicklingError):
            while True:
                left.append(await asyncio.to_thread(self.receive))
        self.end()
        while await raw.fetchval("SELECT count(*) FROM pg_stat_activity WHERE application_name = $1", self.name):
            pass
        return left

    def end(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


@pytest.fixture
def workers() -> Iterator[Callable[[], Worker]]:
    """Start processes that end with the test."""
    started: list[Worker] = []

    def start() -> Worker:
        started.append(Worker())
        return started[-1]

    yield start
    for worker in started:
        if worker.process.poll() is None:
            worker.end()


# --- what the tables hold ---

LOOK = """
SELECT
    coalesce(m.id, e.memory_id) AS id, m.id IS NOT NULL AS has_memory, e.memory_id IS NOT NULL AS has_embedding,
    m.content ->> 'mark' AS mark, e.dimension,
    num_nonnulls(e.dim_384, e.dim_512, e.dim_768, e.dim_1024, e.dim_1536, e.dim_3072) AS columns,
    CASE e.dimension
        WHEN 384 THEN e.dim_384::real[] WHEN 512 THEN e.dim_512::real[] WHEN 768 THEN e.dim_768::real[]
        WHEN 1024 THEN e.dim_1024::real[] WHEN 1536 THEN e.dim_1536::real[] WHEN 3072 THEN e.dim_3072::real[]
    END AS vector,
    (m.type, m.room_id, m.world_id, m.entity_id, m."unique")
        IS NOT DISTINCT FROM (e.type, e.room_id, e.world_id, e.entity_id, e."unique") AS same_scope,
    m.type, m.room_id, (SELECT embedding_dimension FROM elizasql.agents WHERE id = $1) AS locked
FROM (SELECT * FROM elizasql.memories WHERE agent_id = $1) AS m
FULL JOIN (SELECT * FROM elizasql.embeddings WHERE agent_id = $1) AS e ON m.id = e.memory_id
"""

# A memory's content and its vector by their marks; None: there is no such memory.
State = tuple[int, int | None] | None


async def look(raw: Raw, agent: UUID) -> dict[UUID, State]:
    """Give the agent's memories, after checking all that must be true of each of them."""
    states: dict[UUID, State] = {}
    for row in await raw.fetch(LOOK, agent):
        assert row["has_memory"], "a vector without its memory"
        mark = None
        if row["has_embedding"]:
            assert row["columns"] == 1, "exactly one column holds the vector"
            assert row["vector"] is not None, "it is the one that the row says"
            assert row["dimension"] == row["locked"] == len(row["vector"]), "the agent has one width"
            assert row["same_scope"], "the vector is searched in the scope of its memory"
            mark = round((row["vector"][0] - 1) * 1000 + row["vector"][1] - 1)
            assert row["vector"] == vector_of(row["dimension"], mark).tolist()
        states[row["id"]] = (int(row["mark"]), mark)
    return states


async def locked_width(raw: Raw, agent: UUID) -> int | None:
    width: int | None = await raw.fetchval("SELECT embedding_dimension FROM elizasql.agents WHERE id = $1", agent)
    return width


# --- attacks over a bare connection, as the owner of the tables ---


@dataclass(frozen=True)
class Target:
    """What an attack is aimed at: `embedded` has a vector of the locked width, `bare` is a memory without one."""

    agent: UUID
    locked: int
    other: int
    embedded: UUID
    bare: UUID

    def fill(self, sql: str) -> str:
        """Write the values into a statement: L and W stand for the locked and another width."""
        values = {
            "{agent}": f"'{self.agent}'",
            "{embedded}": f"'{self.embedded}'",
            "{bare}": f"'{self.bare}'",
            "{stranger}": f"'{uuid4()}'",
            "{vec_L}": f"'{text_of(vector_of(self.locked, 1))}'",
            "{vec_W}": f"'{text_of(vector_of(self.other, 1))}'",
            "{L}": str(self.locked),
            "{W}": str(self.other),
        }
        for name, value in values.items():
            sql = sql.replace(name, value)
        return sql.replace("dim_L", f"dim_{self.locked}").replace("dim_W", f"dim_{self.other}")


_SCOPE = 'type, room_id, world_id, entity_id, "unique"'


def _insert(dimension: str, columns: str, values: str, end: str = "", memory: str = "{bare}") -> str:
    return (
        f"INSERT INTO elizasql.embeddings (agent_id, memory_id, {_SCOPE}, dimension, {columns}) "
        f"SELECT agent_id, id, {_SCOPE}, {dimension}, {values} FROM elizasql.memories "
        f"WHERE agent_id = {{agent}} AND id = {memory} {end}"
    )


_ROW = "WHERE agent_id = {agent} AND memory_id = {embedded}"
ATTACKS = {
    "insert another width": _insert("{W}", "dim_W", "{vec_W}"),
    "insert another width where the locked one is claimed": _insert("{L}", "dim_W", "{vec_W}"),
    "insert the locked width where another one is claimed": _insert("{W}", "dim_L", "{vec_L}"),
    "insert a vector that does not fit its column": _insert("{L}", "dim_L", "{vec_W}::vector"),
    "insert two vectors": _insert("{L}", "dim_L, dim_W", "{vec_L}, {vec_W}"),
    "insert two vectors, the other way round": _insert("{W}", "dim_L, dim_W", "{vec_L}, {vec_W}"),
    "insert no vector": _insert("{L}", "dim_L", "NULL"),
    "insert no dimension": _insert("NULL", "dim_W", "{vec_W}"),
    "insert a dimension that there is not": _insert("100", "dim_L", "{vec_L}"),
    "insert for no memory": "INSERT INTO elizasql.embeddings (agent_id, memory_id, type, \"unique\", dimension, dim_L) "
    "VALUES ({agent}, {stranger}, 'x', TRUE, {L}, {vec_L})",
    "insert a second vector": _insert("{L}", "dim_L", "{vec_L}", memory="{embedded}"),
    "on conflict do nothing": _insert("{W}", "dim_W", "{vec_W}", "ON CONFLICT DO NOTHING", memory="{embedded}"),
    "on conflict do nothing, new row": _insert("{W}", "dim_W", "{vec_W}", "ON CONFLICT DO NOTHING"),
    "on conflict change the width": _insert(
        "{W}", "dim_W", "{vec_W}",
        "ON CONFLICT (agent_id, memory_id, dimension) DO UPDATE SET dimension = excluded.dimension, dim_L = NULL, "
        "dim_W = excluded.dim_W", memory="{embedded}",
    ),
    "on conflict add a vector": _insert(
        "{W}", "dim_W", "{vec_W}",
        "ON CONFLICT (agent_id, memory_id, dimension) DO UPDATE SET dim_W = excluded.dim_W", memory="{embedded}",
    ),
    "change the dimension": f"UPDATE elizasql.embeddings SET dimension = {{W}} {_ROW}",
    "change the dimension and the vector": "UPDATE elizasql.embeddings SET dimension = {W}, dim_L = NULL, "
    f"dim_W = {{vec_W}} {_ROW}",
    "add a vector": f"UPDATE elizasql.embeddings SET dim_W = {{vec_W}} {_ROW}",
    "swap the vector": f"UPDATE elizasql.embeddings SET dim_L = NULL, dim_W = {{vec_W}} {_ROW}",
    "take the vector": f"UPDATE elizasql.embeddings SET dim_L = NULL {_ROW}",
    "take the dimension": f"UPDATE elizasql.embeddings SET dimension = NULL {_ROW}",
    "give the vector to a stranger": f"UPDATE elizasql.embeddings SET memory_id = {{stranger}} {_ROW}",
    "give the vector to a strange agent": f"UPDATE elizasql.embeddings SET agent_id = {{stranger}} {_ROW}",
    "give the memory to a strange agent": "UPDATE elizasql.memories SET agent_id = {stranger} "
    "WHERE agent_id = {agent} AND id = {embedded}",
    "rename the memory": "UPDATE elizasql.memories SET id = {stranger} WHERE agent_id = {agent} AND id = {embedded}",
    "change the lock": "UPDATE elizasql.agents SET embedding_dimension = {W} WHERE id = {agent}",
    "take the lock": "UPDATE elizasql.agents SET embedding_dimension = NULL WHERE id = {agent}",
    "change the lock among others": "UPDATE elizasql.agents SET (name, embedding_dimension) = ('x', {W}) "
    "WHERE id = {agent}",
    "change the lock by insert": "INSERT INTO elizasql.agents (id, name, embedding_dimension) "
    "VALUES ({agent}, 'x', {W}) ON CONFLICT (id) DO UPDATE SET embedding_dimension = excluded.embedding_dimension",
    "change the lock by merge": "MERGE INTO elizasql.agents AS a USING (VALUES ({agent}::uuid)) AS v (id) "
    "ON a.id = v.id WHEN MATCHED THEN UPDATE SET embedding_dimension = {W}",
    "rename the agent": "UPDATE elizasql.agents SET id = {stranger} WHERE id = {agent}",
    "a second agent of the name": "INSERT INTO elizasql.agents (id, name, embedding_dimension) "
    "VALUES ({agent}, 'x', {W})",
    "change lock and vectors together": "WITH a AS (UPDATE elizasql.agents SET embedding_dimension = {W} "
    "WHERE id = {agent} RETURNING 1) UPDATE elizasql.embeddings SET dimension = {W}, dim_L = NULL, dim_W = {vec_W} "
    f"FROM a {_ROW}",
    "deferred": f"SET CONSTRAINTS ALL DEFERRED; {_insert('{W}', 'dim_W', '{vec_W}')}",
    "truncate the agents": "TRUNCATE elizasql.agents",
}  # fmt: skip


# What refuses an attack is a rule of the schema, but for these.
REFUSALS = {
    "insert a vector that does not fit its column": asyncpg.DataError,
    "truncate the agents": asyncpg.FeatureNotSupportedError,
}


async def attack(raw: Raw, target: Target, name: str) -> bool:
    """Run an attack: the server refuses it, which gives True, or nothing was there to change."""
    try:
        async with raw.transaction():
            status = await raw.execute(target.fill(ATTACKS[name]))
    except REFUSALS.get(name, asyncpg.IntegrityConstraintViolationError):
        return True
    assert status in {"INSERT 0 0", "UPDATE 0", "MERGE 0"}, f"{name}: {status}"
    return False


async def attack_by_copy(raw: Raw, target: Target) -> None:
    """COPY rows of another width into the table and into the agent's partition of it."""
    suffix = await raw.fetchval(
        "SELECT right(tableoid::regclass::text, 4) FROM elizasql.memories WHERE agent_id = $1 LIMIT 1", target.agent
    )
    line = f"{target.agent}\t{target.bare}\tmessages\tt\t{target.other}\t{text_of(vector_of(target.other, 1))}\n"
    for table in ("embeddings", f"embeddings{suffix}") if suffix else ("embeddings",):

        async def lines() -> AsyncIterator[bytes]:
            yield line.encode()

        with pytest.raises(asyncpg.ForeignKeyViolationError):
            await raw.copy_to_table(
                table,
                schema_name="elizasql",
                source=lines(),
                columns=["agent_id", "memory_id", "type", "unique", "dimension", f"dim_{target.other}"],
            )


@pytest.fixture
async def target(db: DatabaseAdapter, raw: Raw) -> Target:
    """Give an agent with a memory that has a vector and one that has none."""
    embedded, bare = await db.create_memories(
        [{"content": {"mark": 1}, "embedding": vector_of(384, 1), "unique": True}, {"content": {"mark": 2}}],
        "messages",
    )
    return Target(db.agent_id, 384, 512, embedded, bare)


@pytest.mark.parametrize("name", ATTACKS)
async def test_raw_sql_cannot_break_the_lock(raw: Raw, target: Target, name: str) -> None:
    before = await look(raw, target.agent)
    assert await attack(raw, target, name)
    assert await look(raw, target.agent) == before
    assert await locked_width(raw, target.agent) == target.locked


async def test_raw_sql_cannot_give_a_memory_to_another_agent(make_db: MakeAdapter, raw: Raw, target: Target) -> None:
    """Whichever partition that one's memories are in: into another, the server moves a row by deleting it first."""
    ids = [uuid4() for _ in range(300)]
    where = "SELECT elizasql.partition_of(id) = elizasql.partition_of($1) AS near, id FROM unnest($2::uuid[]) AS id"
    places = {row["near"]: row["id"] for row in await raw.fetch(where, target.agent, ids)}
    assert set(places) == {True, False}
    before = await look(raw, target.agent)
    for id in places.values():
        await make_db(id)
        with pytest.raises(asyncpg.IntegrityConstraintViolationError):
            await raw.execute("UPDATE elizasql.memories SET agent_id = $1 WHERE agent_id = $2", id, target.agent)
        assert await look(raw, target.agent) == before
        assert await look(raw, id) == {}


async def test_neither_can_copy(raw: Raw, target: Target) -> None:
    before = await look(raw, target.agent)
    await attack_by_copy(raw, target)
    assert await look(raw, target.agent) == before


async def test_the_attacks_would_work_with_the_right_width(raw: Raw, target: Target) -> None:
    # Otherwise the tests above could pass because of a slip in their SQL.
    harmless = dataclasses.replace(target, other=target.locked)
    assert await raw.execute(harmless.fill(_insert("{W}", "dim_W", "{vec_W}"))) == "INSERT 0 1"
    assert await raw.execute(harmless.fill(ATTACKS["change the dimension"])) == "UPDATE 1"
    assert await raw.execute(harmless.fill(ATTACKS["change the lock"])) == "UPDATE 1"
    assert await raw.execute(harmless.fill(ATTACKS["change the lock by merge"])) == "MERGE 1"
    assert (await look(raw, target.agent))[target.bare] == (2, 1)


@pytest.mark.parametrize("dimension", [0, 1, 100, -384, 385, 4096])
async def test_raw_sql_cannot_lock_an_unsupported_width(make_db: MakeAdapter, raw: Raw, dimension: int) -> None:
    db = await make_db(dimension=None)
    with pytest.raises(asyncpg.CheckViolationError):
        await raw.execute("UPDATE elizasql.agents SET embedding_dimension = $1 WHERE id = $2", dimension, db.agent_id)
    assert await db.get_embedding_dimension() is None


async def test_before_the_lock_no_vector_can_be_inserted(make_db: MakeAdapter, raw: Raw) -> None:
    db = await make_db(dimension=None)
    bare = await db.create_memory({"content": {"mark": 1}}, "messages")
    for width in DIMENSIONS:
        sql = Target(db.agent_id, width, width, bare, bare).fill(_insert("{L}", "dim_L", "{vec_L}"))
        with pytest.raises(asyncpg.ForeignKeyViolationError, match="width none") as caught:
            await raw.execute(sql)
        assert caught.value.constraint_name == "embeddings_dimension_fkey"
    assert await look(raw, db.agent_id) == {bare: (1, None)}


# --- the lock itself ---


async def test_the_first_lock_stays(make_db: MakeAdapter) -> None:
    db = await make_db(dimension=None)
    other = await make_db(db.agent_id, dimension=None)
    assert await db.get_embedding_dimension() is None
    await db.ensure_embedding_dimension(768)
    await db.ensure_embedding_dimension(768)
    await other.ensure_embedding_dimension(768)
    for adapter in (db, other):
        with pytest.raises(EmbeddingDimensionError, match="Cannot change embedding dimension for agent") as caught:
            await adapter.ensure_embedding_dimension(384)
        assert (caught.value.agent_id, caught.value.locked, caught.value.given) == (db.agent_id, 768, 384)
        assert await adapter.get_embedding_dimension() == 768


async def test_a_lock_that_is_there_is_ensured_without_a_write_or_a_wait(make_db: MakeAdapter, raw: Raw) -> None:
    """Every process does it at its start, also while a long transaction changes the agent or writes what is its own."""
    db = await make_db(dimension=512)
    version = "SELECT xmin::text, ctid::text FROM elizasql.agents WHERE id = $1"
    before = await raw.fetchrow(version, db.agent_id)
    async with raw.transaction():
        await raw.execute("SELECT FROM elizasql.agents WHERE id = $1 FOR UPDATE", db.agent_id)
        await db.ensure_embedding_dimension(512, timeout=20)
        with pytest.raises(EmbeddingDimensionError):
            await db.ensure_embedding_dimension(384, timeout=20)
    assert await raw.fetchrow(version, db.agent_id) == before


async def test_agents_are_locked_each_by_themselves(make_db: MakeAdapter) -> None:
    agents = [await make_db(dimension=width) for width in DIMENSIONS]
    for agent, width in zip(agents, DIMENSIONS, strict=True):
        assert await agent.get_embedding_dimension() == width


async def test_an_agent_that_is_not_there_cannot_be_locked(make_db: MakeAdapter) -> None:
    db = await make_db(dimension=None)
    await db.delete_agent(db.agent_id)
    with pytest.raises(NotFoundError, match="ensure_agent_exists"):
        await db.ensure_embedding_dimension(384)
    assert await db.get_embedding_dimension() is None


async def test_of_tasks_and_processes_that_race_exactly_one_width_wins(
    make_db: MakeAdapter, dsn: str, raw: Raw, workers: Callable[[], Worker]
) -> None:
    first = await make_db(dimension=None)
    agent = first.agent_id
    # Connections of their own: what is held back by one pool does not race.
    names = [f"race {number}" for number in range(3)]
    adapters = [first, *[await make_db(agent, dimension=None, application_name=name) for name in names]]
    processes = [workers() for _ in range(4)]
    await asyncio.gather(*(process.open(dsn, agent) for process in processes))
    widths: Iterator[int] = itertools.cycle(DIMENSIONS)
    racers: list[tuple[int, Awaitable[Any]]] = []
    transaction = raw.transaction()
    await transaction.start()
    # All of them wait for the agent's row, and run together when it is let go.
    await raw.execute("SELECT FROM elizasql.agents WHERE id = $1 FOR UPDATE", agent)
    for adapter, _ in itertools.product(adapters, range(4)):
        width = next(widths)
        racers.append((width, asyncio.ensure_future(adapter.ensure_embedding_dimension(width))))
    for process in processes:
        width = next(widths)
        racers.append((width, asyncio.ensure_future(process.run(("ensure_embedding_dimension", (width,), {})))))
    await until_waiting(dsn, raw, 20)
    await transaction.commit()
    outcomes = await asyncio.gather(*(racer for _, racer in racers), return_exceptions=True)
    locked = await locked_width(raw, agent)
    assert locked in DIMENSIONS
    for (width, _), outcome in zip(racers, outcomes, strict=True):
        found = outcome[0] if isinstance(outcome, list) else outcome
        if width == locked:
            assert found is None
        else:
            assert isinstance(found, EmbeddingDimensionError), found
            assert (found.agent_id, found.locked, found.given) == (agent, locked, width)


async def until_waiting(dsn: str, raw: Raw, count: int) -> None:
    """Return when so many sessions wait for what the session `raw` holds."""
    pid = raw.get_server_pid()
    watcher = await asyncpg.connect(dsn)
    try:
        # Those behind the first one wait for it, and not for `raw` itself.
        while (
            await watcher.fetchval(
                """
                WITH RECURSIVE waiting (pid) AS (
                    SELECT a.pid FROM pg_stat_activity AS a WHERE $1 = ANY(pg_blocking_pids(a.pid))
                    UNION
                    SELECT a.pid FROM waiting, pg_stat_activity AS a WHERE waiting.pid = ANY(pg_blocking_pids(a.pid))
                )
                SELECT count(*) FROM waiting
                """,
                pid,
            )
            < count
        ):
            pass
    finally:
        await watcher.close()


@pytest.mark.parametrize("commits", [True, False])
async def test_a_lock_in_an_open_transaction_decides_when_it_ends(
    make_db: MakeAdapter, dsn: str, raw: Raw, commits: bool
) -> None:
    db = await make_db(dimension=None)
    transaction = raw.transaction()
    await transaction.start()
    await raw.execute("UPDATE elizasql.agents SET embedding_dimension = 512 WHERE id = $1", db.agent_id)
    task = asyncio.ensure_future(db.ensure_embedding_dimension(384))
    await until_waiting(dsn, raw, 1)
    if commits:
        await transaction.commit()
        with pytest.raises(EmbeddingDimensionError) as caught:
            await task
        assert (caught.value.locked, caught.value.given) == (512, 384)
    else:
        await transaction.rollback()
        await task
    assert await locked_width(raw, db.agent_id) == (512 if commits else 384)


async def test_a_lock_that_is_rolled_back_is_forgotten(make_db: MakeAdapter, raw: Raw) -> None:
    db = await make_db(dimension=None)
    with pytest.raises(ZeroDivisionError):
        async with db.transaction() as tx:
            await tx.ensure_embedding_dimension(512)
            await tx.create_memory({"content": {"mark": 1}, "embedding": vector_of(512, 1)}, "messages")
            raise ZeroDivisionError
    assert await db.get_embedding_dimension() is None
    await db.ensure_embedding_dimension(384)
    id = await db.create_memory({"content": {"mark": 2}, "embedding": vector_of(384, 2)}, "messages")
    assert await look(raw, db.agent_id) == {id: (2, 2)}


# --- an adapter that was opened before another one locked the agent ---


@pytest.fixture
async def late(make_db: MakeAdapter) -> tuple[DatabaseAdapter, DatabaseAdapter, UUID]:
    """Give an adapter that does not know the lock, one that does, and a memory of that one."""
    ignorant = await make_db(dimension=None)
    knowing = await make_db(ignorant.agent_id, dimension=384)
    id = await knowing.create_memory({"content": {"mark": 1}, "embedding": vector_of(384, 1)}, "messages")
    return ignorant, knowing, id


WRONG_WRITES: dict[str, Callable[[DatabaseAdapter, UUID], Awaitable[Any]]] = {
    "create": lambda db, _: db.create_memory({"content": {"mark": 9}, "embedding": vector_of(768, 9)}, "messages"),
    "create, unique given": lambda db, _: db.create_memory(
        {"content": {"mark": 9}, "embedding": vector_of(768, 9)}, "messages", unique=True
    ),
    "create what is there": lambda db, id: db.create_memory(
        {"id": id, "content": {"mark": 9}, "embedding": vector_of(768, 9)}, "messages", unique=True
    ),
    "create many": lambda db, id: db.create_memories(
        [{"content": {"mark": 8}}, {"id": id, "content": {"mark": 9}, "embedding": vector_of(768, 9)}], "messages"
    ),
    "upsert": lambda db, id: db.upsert_memories(
        [{"content": {"mark": 8}}, {"id": id, "content": {"mark": 9}, "embedding": vector_of(768, 9)}], "messages"
    ),
    "load many": lambda db, id: db.load_memories(
        [{"content": {"mark": 8}}, {"id": id, "content": {"mark": 9}, "embedding": vector_of(768, 9)}], "messages"
    ),
    "update": lambda db, id: db.update_memory({"id": id, "embedding": vector_of(768, 9)}),
    "update what is not there": lambda db, _: db.update_memory({"id": uuid4(), "embedding": vector_of(768, 9)}),
    "update many": lambda db, id: db.update_memories(
        [{"id": id, "content": {"mark": 9}, "embedding": vector_of(768, 9)}]
    ),
    "search": lambda db, _: db.search_memories(embedding=vector_of(768, 9), table_name="messages"),
    "search in a room": lambda db, _: db.search_memories(
        embedding=vector_of(768, 9), table_name="messages", room_id=uuid4()
    ),
}


@pytest.mark.parametrize("name", WRONG_WRITES)
async def test_an_adapter_that_does_not_know_the_lock_learns_it(
    late: tuple[DatabaseAdapter, DatabaseAdapter, UUID], raw: Raw, name: str
) -> None:
    ignorant, _, id = late
    with pytest.raises(EmbeddingDimensionError) as caught:
        await WRONG_WRITES[name](ignorant, id)
    assert (caught.value.agent_id, caught.value.locked, caught.value.given) == (ignorant.agent_id, 384, 768)
    assert await look(raw, ignorant.agent_id) == {id: (1, 1)}
    # And it goes on with the width in force, not with the one that failed.
    assert await ignorant.update_memory({"id": id, "embedding": vector_of(384, 2)})
    hits = await ignorant.search_memories(embedding=vector_of(384, 2), table_name="messages")
    assert [hit.id for hit in hits] == [id]


@pytest.mark.parametrize("name", [name for name in WRONG_WRITES if "there" not in name and "many" not in name])
async def test_without_a_lock_nothing_is_written_or_found(make_db: MakeAdapter, raw: Raw, name: str) -> None:
    db = await make_db(dimension=None)
    id = await db.create_memory({"content": {"mark": 1}}, "messages")
    if name.startswith("search"):
        assert await WRONG_WRITES[name](db, id) == []
    else:
        with pytest.raises(EmbeddingDimensionError, match="call ensure_embedding_dimension") as caught:
            await WRONG_WRITES[name](db, id)
        assert (caught.value.locked, caught.value.given) == (None, 768)
    assert await look(raw, db.agent_id) == {id: (1, None)}
    assert await db.get_embedding_dimension() is None
    await db.ensure_embedding_dimension(384)


async def test_a_lock_that_comes_in_the_middle_of_a_write_is_no_contradiction(
    make_db: MakeAdapter, raw: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = await make_db(dimension=None)
    real = db._executor.fetch_row

    async def locked_meanwhile(statement: Any, **params: Any) -> Any:
        assert statement.name == "get_embedding_dimension"
        await raw.execute("UPDATE elizasql.agents SET embedding_dimension = 384 WHERE id = $1", db.agent_id)
        return await real(statement, **params)

    monkeypatch.setattr(db._executor, "fetch_row", locked_meanwhile)
    # To refuse 384 because the agent is locked at 384 would be nonsense.
    id = await db.create_memory({"content": {"mark": 1}, "embedding": vector_of(384, 1)}, "messages")
    assert await look(raw, db.agent_id) == {id: (1, 1)}


async def test_a_vector_for_an_agent_without_a_width_is_refused_also_where_no_memory_would_get_it(
    make_db: MakeAdapter,
) -> None:
    db = await make_db(dimension=None)
    with pytest.raises(EmbeddingDimensionError, match="No embedding dimension is set"):
        await db.update_memory({"id": uuid4(), "embedding": vector_of(384, 1)})


# --- batches that meet ---


@pytest.mark.parametrize("method", ["create_memories", "upsert_memories", "update_memories"])
async def test_batches_with_the_same_ids_do_not_wait_for_each_other(
    make_db: MakeAdapter, dsn: str, raw: Raw, method: str
) -> None:
    db = await make_db()
    first, middle, last = sorted(uuid4() for _ in range(3))
    if method == "update_memories":
        await db.create_memories([{"id": id, "content": {"mark": 0}} for id in (first, middle, last)], "messages")
    transaction = raw.transaction()
    await transaction.start()
    # Both batches get to the middle one and wait there, each with what it has locked before.
    if method == "update_memories":
        await raw.execute(
            "SELECT FROM elizasql.memories WHERE agent_id = $1 AND id = $2 FOR UPDATE", db.agent_id, middle
        )
    else:
        await raw.execute(
            "INSERT INTO elizasql.memories (agent_id, id, type, content) VALUES ($1, $2, 'x', '{}')",
            db.agent_id,
            middle,
        )

    def batch(mark: int, *ids: UUID) -> asyncio.Future[Any]:
        embedding = vector_of(384, mark)
        rows = [{"id": id, "content": {"mark": mark}, "embedding": embedding, "unique": True} for id in ids]
        arguments = [rows] if method == "update_memories" else [rows, "messages"]
        call: Awaitable[Any] = getattr(db, method)(*arguments)
        return asyncio.ensure_future(call)

    batches = [batch(1, first, middle, last), batch(2, last, middle, first)]
    await until_waiting(dsn, raw, 2)
    await transaction.rollback()
    await asyncio.gather(*batches)
    assert set(await look(raw, db.agent_id)) == {first, middle, last}


# --- kills ---


@pytest.mark.parametrize(("batch_size", "kept"), [(4, 0), (1000, 12)])
async def test_a_batch_of_a_killed_client_is_there_as_a_whole_or_not_at_all(
    make_db: MakeAdapter, dsn: str, raw: Raw, workers: Callable[[], Worker], batch_size: int, kept: int
) -> None:
    db = await make_db()
    worker = workers()
    await worker.open(dsn, db.agent_id, batch_size=batch_size, indexing="manual")
    ids = sorted(uuid4() for _ in range(12))
    rows = [
        {"id": id, "content": {"mark": mark}, "embedding": vector_of(384, mark), "unique": True}
        for mark, id in enumerate(ids)
    ]
    before = {"content": {"mark": 99}, "embedding": vector_of(384, 99), "unique": True}
    assert await worker.run(("create_memory", ({"id": UUID(int=1), **before}, "messages"), {}))
    transaction = raw.transaction()
    await transaction.start()
    # The batch waits in its last third, so that the kill comes while it runs.
    await raw.execute(
        "INSERT INTO elizasql.memories (agent_id, id, type, content) VALUES ($1, $2, 'x', '{}')", db.agent_id, ids[10]
    )
    worker.send("stream", [("create_memories", (rows, "messages"), {})])
    await until_waiting(dsn, raw, 1)
    worker.process.kill()
    worker.process.wait()
    await transaction.rollback()
    assert await worker.kill(raw) == [], "it was not acknowledged"
    found = await look(raw, db.agent_id)
    assert found.pop(UUID(int=1)) == (99, 99), "what was acknowledged is there"
    # One statement commits by itself, whether its client lives or not; several need the client's COMMIT.
    assert len(found) == kept
    assert found == {id: (mark, mark) for mark, id in enumerate(ids[:kept])}


# --- the error ---


@pytest.mark.parametrize("locked", [None, 384])
def test_the_error_can_be_sent_to_another_process(locked: int | None) -> None:
    error = EmbeddingDimensionError(uuid4(), locked=locked, given=768, statement="create_memory")
    error.args = (f"Memory at position 3: {error}",)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for again in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error), copy.deepcopy(error)):
            assert type(again) is EmbeddingDimensionError
            assert (again.agent_id, again.locked, again.given) == (error.agent_id, locked, 768)
            assert (again.statement, again.sqlstate, again.retryable) == ("create_memory", None, False)
            assert str(again) == str(error)
            assert "position 3" in str(again)


@pytest.mark.parametrize(
    "kind",
    [kind for name in errors.__all__ if isinstance(kind := getattr(errors, name), type)],
    ids=lambda k: k.__name__,
)
def test_every_other_error_can_be_sent_too(kind: type[elizasql.ElizaSQLError]) -> None:
    if kind is EmbeddingDimensionError:
        return
    error = kind("went wrong", statement="get_room", sqlstate="23503")
    if isinstance(error, errors.IntegrityError):
        error.constraint, error.table, error.detail = "a_fkey", "a", "why"
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == "went wrong"
    assert vars(again) == vars(error)
    assert str(kind()), "the class says what it means"


# --- the state machine ---


@dataclass(frozen=True)
class Row:
    """A memory in an operation: which of the few ids, and the marks of content and vector, None where not given."""

    id: UUID
    content: int | None
    vector: int | None
    width: int


@dataclass(frozen=True)
class Operation:
    """A call of one of the adapters, and what the model must know of it."""

    kind: str
    rows: tuple[Row, ...] = ()
    width: int = 0
    unique: bool | None = True
    room: UUID | None = None

    def call(self) -> Call:
        """Give the method and its arguments."""
        if self.kind == "ensure":
            return "ensure_embedding_dimension", (self.width,), {}
        if self.kind == "delete":
            return "delete_memory", (self.rows[0].id,), {}
        if self.kind == "delete_many":
            return "delete_memories", ([row.id for row in self.rows],), {}
        memories = [self._memory(row) for row in self.rows]
        if self.kind == "create":
            return "create_memory", (memories[0], "messages"), {"unique": self.unique}
        if self.kind == "update":
            return "update_memory", (memories[0],), {}
        name = {"create_many": "create_memories", "upsert": "upsert_memories"}[self.kind]
        return name, (memories, "messages"), {}

    def _memory(self, row: Row) -> dict[str, Any]:
        memory: dict[str, Any] = {"id": row.id}
        if row.content is not None:
            memory["content"] = {"text": f"memory {row.content}", "mark": row.content}
        if row.vector is not None:
            memory["embedding"] = vector_of(row.width, row.vector)
        if self.kind not in ("create", "update"):
            memory["unique"] = self.unique
        if self.room is not None:
            memory["roomId"] = self.room
        return memory

    @property
    def widths(self) -> set[int]:
        return {row.width for row in self.rows if row.vector is not None}

    def apply(self, state: State, row: Row) -> tuple[State, Any]:
        """Give the memory's next state, and what the call returns where that depends on it."""
        if self.kind.startswith("delete"):
            return None, state is not None
        if self.kind == "update":
            if state is None:
                return None, False
            return (state[0] if row.content is None else row.content,
                    state[1] if row.vector is None else row.vector), True  # fmt: skip
        assert row.content is not None
        if state is None:
            return (row.content, row.vector), None
        if self.kind == "upsert":
            return (row.content, state[1] if row.vector is None else row.vector), None
        return state, None


def outcomes_of(state: State, done: list[tuple[Operation, Row, Any]]) -> set[State]:
    """Give every state that a memory may have after operations that ran together, in one order or another."""
    possible = set()
    for order in itertools.permutations(done):
        now, fits = state, True
        for operation, row, result in order:
            now, returned = operation.apply(now, row)
            fits = fits and (len(operation.rows) > 1 or returned is None or bool(returned) == bool(result))
        if fits:
            possible.add(now)
    return possible


ADAPTERS: dict[str, dict[str, Any]] = {
    "manual": {"indexing": "manual"},
    "inline": {"indexing": "inline"},
    "background": {"indexing": "background", "index_interval": 0.3},
    "chunks": {"indexing": "manual", "batch_size": 2},
    "process 1": {"indexing": "background", "index_interval": 0.3},
    "process 2": {"indexing": "manual", "batch_size": 3},
}

NUMBERS = st.integers(0, 5)
CHOICES = st.tuples(
    st.sampled_from(list(ADAPTERS)),
    st.sampled_from(
        ["ensure", "create", "create", "create_many", "upsert", "update", "update", "delete", "delete_many"]
    ),
    st.lists(
        # Which id; is content given, is a vector given; of which width: "right" is the one in force, or 384.
        st.tuples(NUMBERS, st.booleans(), st.booleans(), st.sampled_from(["right", "right", "right", 512, 768, 3072])),
        min_size=1,
        max_size=5,
        unique_by=lambda row: row[0],
    ),
    st.sampled_from([*WIDTHS, *WIDTHS, *DIMENSIONS]),
    st.sampled_from([True, True, False, None]),
    st.sampled_from([None, None, 0, 1]),
)


class Clients:
    """The event loop, the bare connections and the processes, which all examples share."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.loop = asyncio.new_event_loop()
        self.raw: Raw = self.do(asyncpg.connect(dsn))
        self.second: Raw = self.do(asyncpg.connect(dsn))
        self.processes = {name: Worker() for name in ADAPTERS if name.startswith("process")}

    def do(self, awaitable: Awaitable[Any]) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(awaitable, 60))

    def end(self) -> None:
        for worker in self.processes.values():
            worker.end()
        self.do(self.raw.close())
        self.do(self.second.close())
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()


class DimensionLock(RuleBasedStateMachine):
    """One agent, and everything that may happen to it at once."""

    def __init__(self, clients: Clients) -> None:
        super().__init__()
        self.clients = clients
        self.agent = uuid4()
        self.locked: int | None = None
        self.states: dict[UUID, State] = {}
        self.ids = [uuid4() for _ in range(6)]
        self.rooms = [uuid4(), uuid4()]
        self.marks = itertools.count(1)
        self.open: dict[str, DatabaseAdapter] = {}
        self.killed = False

    # What is known of the tables

    async def settle(self, possible: dict[UUID, set[State]] | None = None) -> None:
        """Compare the tables with the model: of the memories named every state given is right, of the others one."""
        found = await look(self.clients.raw, self.agent)
        for id in {*self.states, *found, *(possible or {})}:
            allowed = (possible or {}).get(id, {self.states.get(id)})
            assert found.get(id) in allowed, f"memory {id} is {found.get(id)}, not one of {allowed}"
        self.states = dict(found)

    async def adapter(self, name: str) -> DatabaseAdapter:
        if name not in self.open:
            options = {"pool_min_size": 0, "pool_max_size": 4, **ADAPTERS[name]}
            self.open[name] = await elizasql.open(dsn=self.clients.dsn, agent_id=self.agent, **options)
        return self.open[name]

    async def process(self, name: str) -> Worker:
        worker = self.clients.processes[name]
        if worker.process.poll() is not None:
            worker = self.clients.processes[name] = Worker()
        if not worker.is_open:
            await worker.open(self.clients.dsn, self.agent, **ADAPTERS[name])
        return worker

    async def run(self, name: str, operations: list[Operation]) -> list[Any]:
        """Run operations of one client, all together, and give their results and errors."""
        calls = [operation.call() for operation in operations]
        if name.startswith("process"):
            return await (await self.process(name)).run(*calls)
        db = await self.adapter(name)
        return await asyncio.gather(
            *(getattr(db, method)(*arguments, **keywords) for method, arguments, keywords in calls),
            return_exceptions=True,
        )

    # Steps

    @initialize(width=st.sampled_from([None, *WIDTHS]))
    def create_agent(self, width: int | None) -> None:
        self.clients.do(self._create_agent(width))

    async def _create_agent(self, width: int | None) -> None:
        db = await self.adapter("manual")
        await db.ensure_agent_exists({"name": "locked"})
        world, entity = uuid4(), uuid4()
        await db.create_world(World(id=world))
        await db.create_entities([Entity(id=entity, names=["Ann"])])
        await db.create_rooms([Room(id=room, source="test", type="GROUP", world_id=world) for room in self.rooms])
        await self._act([("manual", Operation("create", (Row(self.ids[0], next(self.marks), None, 0),)))], [])
        if width is not None:
            await self._act([("manual", Operation("ensure", width=width))], [])

    acting: ClassVar[dict[str, Any]] = {
        "choices": st.lists(CHOICES, min_size=1, max_size=5),
        "attacks": st.lists(st.sampled_from(list(ATTACKS)), max_size=1),
    }

    @rule(**acting)
    def act(self, choices: list[Any], attacks: list[str]) -> None:
        """Run some calls at once, and attack the tables meanwhile."""
        self.clients.do(self._act([(choice[0], self.operation(choice)) for choice in choices], attacks))

    # The rules are drawn with equal chance: what matters most is there several times.

    @rule(**acting)
    def act_more(self, choices: list[Any], attacks: list[str]) -> None:
        self.act(choices, attacks)

    @rule(**acting)
    def act_most(self, choices: list[Any], attacks: list[str]) -> None:
        self.act(choices, attacks)

    def operation(self, choice: Any) -> Operation:
        _, kind, rows, width, unique, room = choice
        if kind == "ensure":
            return Operation("ensure", width=width)
        if kind in ("create", "update", "delete"):
            rows = rows[:1]
        made = []
        for number, has_content, has_vector, choice_of_width in rows:
            width = self.locked or 384 if choice_of_width == "right" else choice_of_width
            content = next(self.marks) if has_content or kind != "update" else None
            vector = next(self.marks) if has_vector and not kind.startswith("delete") else None
            made.append(Row(self.ids[number], content, vector, width))
        return Operation(kind, tuple(made), unique=unique, room=None if room is None else self.rooms[room])

    async def _act(self, chosen: list[tuple[str, Operation]], attacks: list[str]) -> None:
        before = self.locked
        # Each statement locks in the order of the ids, but the statements of one batch stand in the order given.
        deadlocks = any(len(operation.rows) > ADAPTERS[name].get("batch_size", 1000) for name, operation in chosen)
        by_client: dict[str, list[Operation]] = {}
        for name, operation in chosen:
            by_client.setdefault(name, []).append(operation)
        for name in by_client:  # the opening is not what shall race
            await (self.process(name) if name.startswith("process") else self.adapter(name))
        running: list[Awaitable[Any]] = [self.run(name, operations) for name, operations in by_client.items()]
        if self.locked is not None:
            running += [attack(self.clients.second, self.target(), name) for name in attacks]
        outcomes = (await asyncio.gather(*running))[: len(by_client)]
        self.locked = await locked_width(self.clients.raw, self.agent)
        if before is not None:
            assert self.locked == before, "the first lock stays"
        elif not any(operation.kind == "ensure" for _, operation in chosen):
            assert self.locked is None, "nobody locked it"
        done: dict[UUID, list[tuple[Operation, Row, Any]]] = {}
        for operations, results in zip(by_client.values(), outcomes, strict=True):
            for operation, result in zip(operations, results, strict=True):
                if not (deadlocks and isinstance(result, DeadlockError)):
                    self.judge(operation, result, before)
                if not isinstance(result, BaseException):
                    for row in operation.rows:
                        done.setdefault(row.id, []).append((operation, row, result))
        await self.settle({id: outcomes_of(self.states.get(id), applied) for id, applied in done.items()})

    def judge(self, operation: Operation, result: Any, before: int | None) -> None:
        """Check that a call came out as the lock before and after it demand."""
        widths = {operation.width} if operation.kind == "ensure" else operation.widths
        wrong = {width for width in widths if width != self.locked}
        if isinstance(result, BaseException):
            assert widths, f"{operation} has no width to be wrong, but: {result!r}"
            if len(widths) > 1 and type(result) is ArgumentError:
                return
            assert isinstance(result, EmbeddingDimensionError), repr(result)
            assert result.agent_id == self.agent
            assert result.given in widths
            assert result.given != result.locked
            if operation.kind == "ensure":
                assert result.locked == self.locked
            else:
                # Where the lock came meanwhile, the call may have been before it.
                assert result.locked in {before, self.locked}
            assert wrong or before is None
        else:
            assert not wrong, f"{operation} was accepted, although the agent has {self.locked}"

    def target(self) -> Target:
        """Give what to attack; where there is no such memory, the attack is one at nothing."""
        assert self.locked is not None
        embedded = [id for id, state in self.states.items() if state is not None and state[1] is not None]
        bare = [id for id, state in self.states.items() if state is not None and state[1] is None]
        other = next(width for width in (512, 384) if width != self.locked)
        return Target(self.agent, self.locked, other, [*embedded, uuid4()][0], [*bare, uuid4()][0])

    @precondition(lambda self: self.locked is None)
    @rule(width=st.sampled_from(WIDTHS), rival=st.sampled_from(WIDTHS), name=st.sampled_from(list(ADAPTERS)),
          commits=st.booleans())  # fmt: skip
    def lock_in_an_open_transaction(self, width: int, rival: int, name: str, commits: bool) -> None:
        """Let a bare connection lock first, and another client at the same time; then end the transaction."""
        self.clients.do(self._lock_in_an_open_transaction(width, rival, name, commits))

    async def _lock_in_an_open_transaction(self, width: int, rival: int, name: str, commits: bool) -> None:
        await (self.process(name) if name.startswith("process") else self.adapter(name))
        transaction = self.clients.raw.transaction()
        await transaction.start()
        await self.clients.raw.execute(
            "UPDATE elizasql.agents SET embedding_dimension = $1 WHERE id = $2", width, self.agent
        )
        task = asyncio.ensure_future(self.run(name, [Operation("ensure", width=rival)]))
        await until_waiting(self.clients.dsn, self.clients.raw, 1)
        await (transaction.commit() if commits else transaction.rollback())
        (result,) = await task
        self.locked = width if commits else rival
        assert await locked_width(self.clients.raw, self.agent) == self.locked
        self.judge(Operation("ensure", width=rival), result, None)
        await self.settle()

    @rule(name=st.sampled_from([name for name in ADAPTERS if not name.startswith("process")]), choice=CHOICES)
    def roll_back(self, name: str, choice: Any) -> None:
        """Do something in a transaction that fails."""
        self.clients.do(self._roll_back(name, self.operation(choice)))

    async def _roll_back(self, name: str, operation: Operation) -> None:
        method, arguments, keywords = operation.call()
        db = await self.adapter(name)
        with contextlib.suppress(ZeroDivisionError):
            async with db.transaction() as tx:
                with contextlib.suppress(EmbeddingDimensionError, ArgumentError):
                    await getattr(tx, method)(*arguments, **keywords)
                raise ZeroDivisionError
        assert await locked_width(self.clients.raw, self.agent) == self.locked
        await self.settle()

    @precondition(lambda self: self.locked is not None)
    @rule(name=st.sampled_from([*ATTACKS, "copy", "copy", "copy"]))
    def attack(self, name: str) -> None:
        """Attack the tables while nothing else goes on."""
        self.clients.do(self._attack(name))

    async def _attack(self, name: str) -> None:
        if name == "copy":
            await attack_by_copy(self.clients.second, self.target())
        else:
            await attack(self.clients.second, self.target(), name)
        assert await locked_width(self.clients.raw, self.agent) == self.locked
        await self.settle()

    @rule(what=st.sampled_from(["index", "rebuild", "move", *ADAPTERS]))
    def look_after(self, what: str) -> None:
        """Move the vectors into the index, or one to another memory, or close a client, which its next use opens."""
        if what == "move":
            if self.locked is not None:
                self.clients.do(self._move_a_vector(self.target()))
        elif what in self.open:
            self.clients.do(self.open.pop(what).close())
        elif what in self.clients.processes:
            self.clients.processes[what].is_open = False
        elif what in ("index", "rebuild"):
            self.clients.do(self._index(what == "rebuild"))

    async def _move_a_vector(self, target: Target) -> None:
        moved = "UPDATE 0"
        with contextlib.suppress(asyncpg.IntegrityConstraintViolationError):
            moved = await self.clients.second.execute(
                "UPDATE elizasql.embeddings AS e SET memory_id = m.id, type = m.type, room_id = m.room_id, "
                'world_id = m.world_id, entity_id = m.entity_id, "unique" = m."unique" FROM elizasql.memories AS m '
                "WHERE e.agent_id = $1 AND e.memory_id = $2 AND m.agent_id = $1 AND m.id = $3",
                target.agent,
                target.embedded,
                target.bare,
            )
        giver, taker = self.states.get(target.embedded), self.states.get(target.bare)
        if moved == "UPDATE 1" and giver is not None and taker is not None:
            self.states |= {target.embedded: (giver[0], None), target.bare: (taker[0], giver[1])}
        await self.settle()

    async def _index(self, rebuild: bool) -> None:
        await (await self.adapter("manual")).index_memories(rebuild=rebuild)
        await self.settle()

    @rule(name=st.sampled_from([name for name in ADAPTERS if not name.startswith("process")]))
    def read(self, name: str) -> None:
        """Read through an adapter what the tables hold, and find every vector by its meaning."""
        self.clients.do(self._read(name))

    async def _read(self, name: str) -> None:
        db = await self.adapter(name)
        read: dict[UUID | None, State] = {}
        for memory in await db.get_memories(table_name="messages", include_embedding=True):
            assert memory.content is not None
            mark = None
            if memory.embedding is not None:
                assert memory.embedding.shape == (self.locked,)
                mark = round((float(memory.embedding[0]) - 1) * 1000 + float(memory.embedding[1]) - 1)
            read[memory.id] = (memory.content["mark"], mark)
        assert read == self.states
        for width in {384, self.locked or 384}:
            query = db.search_memories(embedding=vector_of(width, 1), table_name="messages", count=1000)
            if self.locked not in {None, width}:
                with pytest.raises(EmbeddingDimensionError) as caught:
                    await query
                assert (caught.value.locked, caught.value.given) == (self.locked, width)
            else:
                expected = {id for id, state in self.states.items() if state is not None and state[1] is not None}
                assert {memory.id for memory in await query} == expected

    @precondition(lambda self: self.locked is not None and not self.killed)
    @rule(name=st.sampled_from(["process 1", "process 2"]), answers=st.integers(0, 3), creates=st.booleans())
    def kill(self, name: str, answers: int, creates: bool) -> None:
        """Kill a process -9 in the middle of a row of batches, after it has acknowledged so many of them."""
        self.killed = True  # a new process takes a second: once an example
        self.clients.do(self._kill(name, answers, creates))

    async def _kill(self, name: str, answers: int, creates: bool) -> None:
        assert self.locked is not None
        kind = "create_many" if creates else "upsert"
        batches = [
            Operation(kind, tuple(Row(uuid4(), next(self.marks), next(self.marks), self.locked) for _ in range(8)))
            for _ in range(6)
        ]
        worker = await self.process(name)
        worker.send("stream", [batch.call() for batch in batches])
        acknowledged = [await asyncio.to_thread(worker.receive) for _ in range(answers)]
        acknowledged += await worker.kill(self.clients.raw)
        found = await look(self.clients.raw, self.agent)
        possible: dict[UUID, set[State]] = {}
        for position, batch in enumerate(batches):
            whole: dict[UUID, State] = {row.id: (row.content or 0, row.vector) for row in batch.rows}
            if position < len(acknowledged):
                assert acknowledged[position] == list(whole)
                possible |= {id: {state} for id, state in whole.items()}
            else:
                there = [id for id in whole if id in found]
                assert not there or there == list(whole), "a part of a batch"
                possible |= {id: {state, None} for id, state in whole.items()}
        await self.settle(possible)

    def teardown(self) -> None:
        self.clients.do(self._teardown())

    async def _teardown(self) -> None:
        for db in self.open.values():
            await db.close()
        for worker in self.clients.processes.values():
            worker.is_open = False
        await self.clients.raw.execute("DELETE FROM elizasql.agents WHERE id = $1", self.agent)


def run_machine(dsn: str, examples: int, steps: int) -> None:
    clients = Clients(dsn)
    try:
        run_state_machine_as_test(
            lambda: DimensionLock(clients),  # type: ignore[arg-type]
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
                # What happens depends on timing, too: a smaller example need not fail again.
                phases=[Phase.generate],
            ),
        )
    finally:
        clients.end()


def test_whatever_clients_do_the_lock_holds_and_memories_stay_whole(dsn: str) -> None:
    run_machine(dsn, examples=4, steps=30)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_same_for_a_long_time(dsn: str) -> None:
    run_machine(dsn, examples=250, steps=50)
