"""Transactions: all or nothing, savepoints, one connection, and what breaks in the middle."""

from __future__ import annotations

import asyncio
import gc
import re
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import numpy as np
import pytest

import elizasql
from elizasql import DatabaseAdapter, Memory, Room, Task, _executor
from elizasql._statements import Statement
from tests.conftest import MakeAdapter, Scene, make_scene
from tests.locking import blocked_pid, locked
from tests.shared import share, shared_calls
from tests.test_isolation import METHODS, filled

VECTOR = np.ones(384, dtype=np.float32)


def memory(text: str = "x", **fields: Any) -> Memory:
    return Memory(content={"text": text}, **fields)


async def add(db: DatabaseAdapter, text: str = "x", *, timeout: float | None = None, **fields: Any) -> UUID:
    return await db.create_memory(memory(text, **fields), "messages", timeout=timeout)


async def texts(db: DatabaseAdapter) -> list[str]:
    return sorted(found.content["text"] for found in await db.get_memories(table_name="messages"))  # type: ignore[index]


async def fail(db: DatabaseAdapter) -> None:
    """Make the server raise an error."""
    with pytest.raises(elizasql.ForeignKeyError):
        await add(db, "homeless", room_id=uuid4())


async def assert_sound(db: DatabaseAdapter) -> None:
    """Every connection of the pool can be used, and none of them is in a transaction or taken."""
    pool = db._executor.lane.pool
    await db._executor.lane.let_go()
    assert db._executor.lane.in_use == 0
    assert pool.get_size() == pool.get_idle_size()
    assert db._executor.in_flight == 0
    held = [await asyncio.wait_for(pool.acquire(), 10) for _ in range(pool.get_max_size())]
    for connection in held:
        assert not connection.is_in_transaction()
        assert await connection.fetchval("SELECT pg_current_xact_id_if_assigned()") is None
        await pool.release(connection)


# --- all or nothing --------------------------------------------------------------------------------------------------


async def test_commit(db: DatabaseAdapter, make_db: MakeAdapter) -> None:
    other = await make_db(db.agent_id)
    async with db.transaction() as tx:
        await add(tx, "a")
        await add(tx, "b")
        assert await texts(tx) == ["a", "b"]
        assert await texts(db) == []
        assert await texts(other) == []
    assert await texts(db) == ["a", "b"]
    assert await texts(other) == ["a", "b"]
    await assert_sound(db)


async def test_rollback_on_any_exception(db: DatabaseAdapter) -> None:
    class OwnError(Exception):
        pass

    error = OwnError("mine")
    with pytest.raises(OwnError) as caught:
        async with db.transaction() as tx:
            await add(tx)
            raise error
    assert caught.value is error
    assert caught.value.__context__ is None
    assert await texts(db) == []
    await assert_sound(db)


async def test_rollback_on_an_error_of_ours(db: DatabaseAdapter) -> None:
    with pytest.raises(elizasql.ForeignKeyError) as caught:
        async with db.transaction() as tx:
            await add(tx, "a")
            await add(tx, "homeless", room_id=uuid4())
    assert caught.value.statement == "create_memory"
    assert await texts(db) == []
    await assert_sound(db)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
async def test_rollback_on_what_is_no_exception(db: DatabaseAdapter, error: type[BaseException]) -> None:
    context = db.transaction()
    tx = await context.__aenter__()
    await add(tx)
    raised = error()
    # By hand: pytest and asyncio take these for themselves.
    assert not await context.__aexit__(error, raised, None)
    assert await texts(db) == []
    await assert_sound(db)


async def test_error_before_any_io_ends_nothing(db: DatabaseAdapter) -> None:
    async with db.transaction() as tx:
        await add(tx, "a")
        with pytest.raises(elizasql.ArgumentError):
            await tx.create_memory(memory(), "")
        await add(tx, "b")
    assert await texts(db) == ["a", "b"]


def refused_in_a_transaction() -> set[str]:
    sources = "".join(path.read_text(encoding="utf-8") for path in Path(elizasql.__file__).parent.glob("*.py"))
    return set(re.findall(r"_refuse_in_transaction\(\"(\w+)\"\)", sources))


async def every_row(connection: asyncpg.Connection[Any]) -> dict[str, list[str]]:
    """Give all rows of all tables, as a connection sees them."""
    tables = await connection.fetch(
        "SELECT relname FROM pg_class WHERE relnamespace = 'elizasql'::regnamespace"
        " AND relkind IN ('r', 'p') AND NOT relispartition"
    )
    found: dict[str, list[str]] = {table: [] for (table,) in tables}
    parts = (f"SELECT '{table}', t::text FROM elizasql.{table} AS t" for table in found)
    for table, row in await connection.fetch(" UNION ALL ".join(parts)):
        found[table].append(row)
    return {table: sorted(rows) for table, rows in found.items()}


def anew(value: Any, others: dict[str, Any]) -> Any:
    """Give what a method that creates is called with, changed so that it is not there yet."""
    if isinstance(value, list):
        return [anew(row, others) for row in value]
    if isinstance(value, dict):
        return {name: others.get(name, field) for name, field in value.items()} | {"id": uuid4()}
    return value


# They write only where something is missing.
WRITES_NOTHING = {"ensure_agent_exists", "ensure_embedding_dimension"}
ASKS = ("get_", "count_", "search_", "query_", "are_", "is_", "health", "stats")


async def test_every_method_runs_inside_and_is_undone(make_db: MakeAdapter, own_database: str) -> None:
    db = await make_db(dsn=own_database)
    raw = await asyncpg.connect(own_database)
    own, shared = await filled(db), await share(db)
    entity, other, room = own.scene.entity, own.scene.other, own.scene.room
    others = {"source_entity_id": other, "target_entity_id": entity}
    others |= dict.fromkeys(("type", "sender_id", "code"), "another")
    calls = {name: own.arguments(name) for name in METHODS} | shared_calls(shared)
    calls |= {
        "cleanup_agents": {"older_than": timedelta(microseconds=1)},
        "delete_agents": {"agent_ids": [shared["other"]]},
    }
    before = await every_row(raw)
    assert all(len(before[table]) for table in before.keys() - {"servers", "reembeddings", "memory_rewrites"})
    refused = refused_in_a_transaction()
    for name, arguments in calls.items():
        if name in refused:
            continue
        if name.startswith(("create_", "ensure_entity")) and name not in shared_calls(shared):
            arguments = {key: anew(value, others) for key, value in arguments.items()}
        with pytest.raises(ZeroDivisionError):
            async with db.transaction() as tx:
                if name.startswith(("add_participant", "create_room_participants")):
                    await tx.delete_participants([(entity, room), (other, room)])
                elif isinstance(arguments.get("task"), Task) and name != "create_task":
                    [arguments["task"]] = await tx.claim_tasks()
                prepared = await every_row(_connection(tx))
                await getattr(tx, name)(**arguments)
                wrote = await every_row(_connection(tx)) != prepared
                assert wrote is (not name.startswith(ASKS) and name not in WRITES_NOTHING), name
                raise ZeroDivisionError
        assert await every_row(raw) == before, name
    await raw.close()
    await assert_sound(db)


async def test_dimension_that_was_rolled_back_is_not_remembered(make_db: MakeAdapter) -> None:
    db = await make_db(dimension=None)
    with pytest.raises(ZeroDivisionError):
        async with db.transaction() as tx:
            await tx.ensure_embedding_dimension(384)
            await add(tx, embedding=np.ones(384))
            raise ZeroDivisionError
    assert await db.get_embedding_dimension() is None
    await db.ensure_embedding_dimension(768)
    await add(db, embedding=np.ones(768))
    with pytest.raises(elizasql.EmbeddingDimensionError):
        await add(db, embedding=np.ones(384))


async def test_vectors_are_searched_inside_and_found_outside_afterwards(db: DatabaseAdapter) -> None:
    vector = np.ones(384, dtype=np.float32)
    async with db.transaction() as tx:
        id = await add(tx, embedding=vector)
        hits = await tx.search_memories(embedding=vector, table_name="messages")
        assert [hit.id for hit in hits] == [id]
        assert await db.search_memories(embedding=vector, table_name="messages") == []
    assert [hit.id for hit in await db.search_memories(embedding=vector, table_name="messages")] == [id]


@pytest.mark.parametrize("good", [True, False])
async def test_batch_of_several_chunks(make_db: MakeAdapter, good: bool) -> None:
    db = await make_db(batch_size=10)
    batch = [memory(str(number)) for number in range(35)]
    if not good:
        batch[-1].room_id = uuid4()
    async with db.transaction() as tx:
        await add(tx, "before")
        if good:
            assert len(await tx.create_memories(batch, "messages")) == 35
            assert len(await texts(tx)) == 36
        else:
            # The chunks have a savepoint of their own.
            with pytest.raises(elizasql.ForeignKeyError):
                await tx.create_memories(batch, "messages")
            assert await texts(tx) == ["before"]
    assert len(await texts(db)) == (36 if good else 1)
    await assert_sound(db)


# Of each kind of row: how one is made, and how those that there are come back, by time.
MADE: dict[str, tuple[Callable[..., Awaitable[Any]], Callable[..., Awaitable[list[Any]]]]] = {
    "memory": (
        lambda db, scene, id: db.create_memory({"id": id, "content": {}}, "messages"),
        lambda db, scene: db.get_memories(table_name="messages"),
    ),
    "memory, with a vector": (
        lambda db, scene, id: db.create_memory({"id": id, "content": {}, "embedding": VECTOR}, "messages", unique=True),
        lambda db, scene: db.get_memories(table_name="messages"),
    ),
    "memory, unique undecided": (
        lambda db, scene, id: db.create_memory({"id": id, "content": {}, "embedding": VECTOR}, "messages"),
        lambda db, scene: db.get_memories(table_name="messages"),
    ),
    "memory, in a batch": (
        lambda db, scene, id: db.create_memories([{"id": id, "content": {}}], "messages"),
        lambda db, scene: db.get_memories(table_name="messages"),
    ),
    "memory, upserted": (
        lambda db, scene, id: db.upsert_memories([{"id": id, "content": {}}], "messages"),
        lambda db, scene: db.get_memories(table_name="messages"),
    ),
    "log": (
        lambda db, scene, id: db.log(
            {"id": id, "body": {}, "entity_id": scene.entity, "room_id": scene.room, "type": "t"}
        ),
        lambda db, scene: db.get_logs(),
    ),
    "task": (lambda db, scene, id: db.create_task({"id": id, "name": "n"}), lambda db, scene: db.get_tasks()),
    "goal": (lambda db, scene, id: db.create_goal({"id": id, "name": "n"}), lambda db, scene: db.get_goals()),
    "agent": (lambda db, scene, id: db.create_agent({"id": id, "name": "n"}), lambda db, scene: db.get_agents()),
    "agent, upserted": (
        lambda db, scene, id: db.upsert_agents([{"id": id, "name": "n"}]),
        lambda db, scene: db.get_agents(),
    ),
    "world": (lambda db, scene, id: db.create_world({"id": id}), lambda db, scene: db.get_all_worlds()),
    "world, upserted": (lambda db, scene, id: db.upsert_worlds([{"id": id}]), lambda db, scene: db.get_all_worlds()),
    "room": (
        lambda db, scene, id: db.create_room({"id": id, "source": "s", "type": "t", "world_id": scene.world}),
        lambda db, scene: db.get_rooms_by_world(scene.world),
    ),
    "room, upserted": (
        lambda db, scene, id: db.upsert_rooms([{"id": id, "source": "s", "type": "t", "world_id": scene.world}]),
        lambda db, scene: db.get_rooms_by_world(scene.world),
    ),
    "entity": (
        lambda db, scene, id: db.create_entity({"id": id, "names": ["n"]}),
        lambda db, scene: db.get_entities_by_names(["n"]),
    ),
    "entity, upserted": (
        lambda db, scene, id: db.upsert_entities([{"id": id, "names": ["n"]}]),
        lambda db, scene: db.get_entities_by_names(["n"]),
    ),
    "component": (
        lambda db, scene, id: db.create_component(
            {"id": id, "entity_id": scene.entity, "room_id": scene.room, "type": str(id)}
        ),
        lambda db, scene: db.get_components(scene.entity),
    ),
    "component, upserted": (
        lambda db, scene, id: db.upsert_components(
            [{"id": id, "entity_id": scene.entity, "room_id": scene.room, "type": str(id), "data": {}}]
        ),
        lambda db, scene: db.get_components(scene.entity),
    ),
    "pairing request": (
        lambda db, scene, id: db.create_pairing_request(
            {"id": id, "channel": "c", "sender_id": str(id), "code": str(id)}
        ),
        lambda db, scene: _first_of(db.get_pairing_requests(["c"])),
    ),
    "allowlist entry": (
        lambda db, scene, id: db.create_pairing_allowlist_entry({"id": id, "channel": "c", "sender_id": str(id)}),
        lambda db, scene: db.get_pairing_allowlist("c"),
    ),
}


async def _first_of(found: Awaitable[list[list[Any]]]) -> list[Any]:
    return (await found)[0]


@pytest.mark.parametrize("kind", MADE)
async def test_what_one_transaction_makes_keeps_its_order(db: DatabaseAdapter, agent_world: Scene, kind: str) -> None:
    """Each statement has a time of its own: with equal times the order would be that of the ids."""
    make, read = MADE[kind]
    first, second, third = sorted(uuid4() for _ in range(3))
    made = [second, third, first]
    async with db.transaction() as tx:
        for id in made:
            await make(tx, agent_world, id)
    found = [row.id for row in await read(db, agent_world) if row.id in made]
    assert found == (made[::-1] if kind.startswith(("memory", "log")) else made)


@pytest.mark.parametrize("way", ["add_participant", "create_room_participants"])
async def test_memberships_that_one_transaction_makes_keep_their_order(db: DatabaseAdapter, way: str) -> None:
    first, second, third = sorted([uuid4() for _ in range(3)])
    made = [second, third, first]
    room = await db.create_room({"source": "s", "type": "t"})
    await db.create_entities([{"id": id} for id in made])
    async with db.transaction() as tx:
        for id in made:
            await (
                tx.add_participant(id, room) if way == "add_participant" else tx.create_room_participants([id], room)
            )
    assert await db.get_participants_for_room(room) == made


async def test_relationships_that_one_transaction_makes_keep_their_order(
    db: DatabaseAdapter, agent_world: Scene
) -> None:
    first, second, third = sorted([uuid4() for _ in range(3)])
    made = [second, third, first]
    await db.create_entities([{"id": id} for id in made])
    async with db.transaction() as tx:
        for id in made:
            await tx.create_relationship({"id": id, "source_entity_id": agent_world.entity, "target_entity_id": id})
    assert [found.id for found in await db.get_relationships(agent_world.entity)] == made


# How a batch of rows is made that two batches may both have.
BATCHES: dict[str, Callable[..., Awaitable[Any]]] = {
    "create_agents": lambda db, scene, ids: db.create_agents([{"id": id, "name": "n"} for id in ids]),
    "create_worlds": lambda db, scene, ids: db.create_worlds([{"id": id} for id in ids]),
    "create_rooms": lambda db, scene, ids: db.create_rooms([{"id": id, "source": "s", "type": "t"} for id in ids]),
    "create_entities": lambda db, scene, ids: db.create_entities([{"id": id} for id in ids]),
    "create_tasks": lambda db, scene, ids: db.create_tasks([{"id": id, "name": "n"} for id in ids]),
    "create_goals": lambda db, scene, ids: db.create_goals([{"id": id, "name": "n"} for id in ids]),
    "create_logs": lambda db, scene, ids: db.create_logs(
        [{"id": id, "entity_id": scene.entity, "room_id": scene.room, "type": "t", "body": {}} for id in ids]
    ),
    "create_pairing_requests": lambda db, scene, ids: db.create_pairing_requests(
        [{"id": id, "channel": "c", "sender_id": str(id), "code": str(id)} for id in ids]
    ),
    "create_components": lambda db, scene, ids: db.create_components(
        [{"entity_id": scene.entity, "room_id": scene.room, "type": str(id)} for id in ids]
    ),
    "upsert_components": lambda db, scene, ids: db.upsert_components(
        [{"entity_id": scene.entity, "room_id": scene.room, "type": str(id), "data": {}} for id in ids]
    ),
    "create_relationships": lambda db, scene, ids: db.create_relationships(
        [{"source_entity_id": scene.entity, "target_entity_id": id} for id in ids]
    ),
}


@pytest.mark.parametrize("name", BATCHES)
async def test_two_batches_cannot_wait_for_each_other(make_db: MakeAdapter, name: str) -> None:
    """A batch of several chunks that waits for its lowest row has not made the higher ones yet."""
    db = await make_db(batch_size=1)
    scene = await make_scene(db)
    low, high = sorted([uuid4(), uuid4()])
    if name == "create_relationships":
        await db.create_entities([{"id": low}, {"id": high}])
    async with db.transaction() as tx:
        await BATCHES[name](tx, scene, [low])
        batch: asyncio.Task[Any] = asyncio.create_task(BATCHES[name](db, scene, [high, low]))
        await blocked_pid(tx._executor._connection, batch)  # type: ignore[attr-defined]
        await tx._executor._connection.execute("SET LOCAL lock_timeout = '100ms'")  # type: ignore[attr-defined]
        await BATCHES[name](tx, scene, [high])
    await batch


async def test_round_trips(db: DatabaseAdapter, round_trips: list[str]) -> None:
    async with db.transaction() as tx:
        await add(tx)
        await texts(tx)
    assert len(round_trips) == 5
    assert "pg_current_xact_id_if_assigned" in round_trips[-2]
    assert round_trips[0].startswith("BEGIN")
    assert round_trips[-1].startswith("COMMIT")


async def test_round_trips_of_a_rollback(db: DatabaseAdapter, round_trips: list[str]) -> None:
    with pytest.raises(ZeroDivisionError):
        async with db.transaction():
            raise ZeroDivisionError
    assert [sent.strip(";") for sent in round_trips] == ["BEGIN", "ROLLBACK"]


async def test_with_entity_context(db: DatabaseAdapter) -> None:
    entity = uuid4()

    async def work(tx: DatabaseAdapter) -> str:
        await add(tx, "kept")
        assert await texts(db) == []
        return "given back"

    assert await db.with_entity_context(entity, work) == "given back"
    await db.with_entity_context(str(entity), work_nothing)
    await db.with_entity_context(None, work_nothing)
    assert await texts(db) == ["kept"]

    async def broken(tx: DatabaseAdapter) -> None:
        await add(tx, "lost")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await db.with_entity_context(entity, broken)
    assert await texts(db) == ["kept"]


async def work_nothing(tx: DatabaseAdapter) -> None:
    pass


@pytest.mark.parametrize("callback", [5, None, lambda tx: "not awaited"])
async def test_callback_that_is_none(db: DatabaseAdapter, callback: Any) -> None:
    with pytest.raises(elizasql.ArgumentError, match="callback must"):
        await db.with_entity_context(None, callback)


async def test_entity_that_is_no_id(db: DatabaseAdapter, round_trips: list[str]) -> None:
    with pytest.raises(elizasql.ArgumentError, match="entity_id"):
        await db.with_entity_context("'; DROP TABLE elizasql.agents; --", work_nothing)
    assert round_trips == []


# --- errors of the server inside -------------------------------------------------------------------------------------


async def test_error_ends_the_transaction(db: DatabaseAdapter) -> None:
    with pytest.raises(elizasql.TransactionError) as caught:
        async with db.transaction() as tx:
            await add(tx, "a")
            await fail(tx)
            with pytest.raises(elizasql.TransactionError, match=r"open a savepoint with tx.transaction\(\)"):
                await add(tx, "b")
            assert not await tx.is_ready()
            await texts(tx)
    assert caught.value.sqlstate == "25P02"
    assert not caught.value.retryable
    assert await texts(db) == []
    await assert_sound(db)


async def test_end_of_a_failed_transaction_is_no_success(db: DatabaseAdapter) -> None:
    """The server answers COMMIT with ROLLBACK and no error; whoever caught the first error must hear of it."""
    with pytest.raises(elizasql.TransactionError):
        async with db.transaction() as tx:
            await add(tx, "a")
            await fail(tx)
    assert await texts(db) == []
    await assert_sound(db)


async def test_call_that_ran_out_of_time_ends_the_transaction(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any]
) -> None:
    id = await add(db, "old")
    with pytest.raises(elizasql.TransactionError) as caught:
        async with db.transaction() as tx, locked(raw, id):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(tx.update_memory(memory("new", id=id)), 0.1)
    assert caught.value.__cause__ is not caught.value
    assert await texts(db) == ["old"]
    await assert_sound(db)


async def test_call_that_did_not_get_its_turn_in_time_ends_nothing(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any]
) -> None:
    """Nothing of it was sent: the transaction is as it was."""
    id = await add(db, "old")
    async with db.transaction() as tx:
        async with locked(raw, id):
            running = asyncio.create_task(tx.update_memory(memory("new", id=id)))
            await blocked_pid(raw, running)
            with pytest.raises(elizasql.DeadlineError) as caught:
                await asyncio.wait_for(add(tx, timeout=0.05), 10)
            assert caught.value.statement == "create_memory"
        assert await running
        await add(tx, "other")
    assert await texts(db) == ["new", "other"]
    await assert_sound(db)


async def test_call_that_was_done_and_cut_short_ends_the_transaction(
    db: DatabaseAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server was quicker than the cancellation: the caller does not know it, so it must not be kept."""
    id = await add(db, "old")
    with pytest.raises(elizasql.TransactionError, match="update_memories was cut short"):
        async with db.transaction() as tx:
            real = tx._executor._attempts

            async def attempts(name: str, work: Any, lost: Any, **options: Any) -> Any:
                async def done(connection: Any, deadline: float) -> Any:
                    await work(connection, deadline)
                    raise asyncio.CancelledError

                return await real(name, done, lost, **options)

            monkeypatch.setattr(tx._executor, "_attempts", attempts)
            with pytest.raises(asyncio.CancelledError):
                await tx.update_memory(memory("new", id=id))
    assert await texts(db) == ["old"]
    await assert_sound(db)


# --- savepoints ------------------------------------------------------------------------------------------------------


async def test_error_in_a_savepoint_undoes_only_it(db: DatabaseAdapter, round_trips: list[str]) -> None:
    async with db.transaction() as tx:
        await add(tx, "a")
        with pytest.raises(elizasql.ForeignKeyError):
            async with tx.transaction() as inner:
                await add(inner, "b")
                await add(inner, "homeless", room_id=uuid4())
        await add(tx, "c")
        with pytest.raises(ZeroDivisionError):
            async with tx.transaction() as inner:
                await add(inner, "d")
                raise ZeroDivisionError
        async with tx.transaction() as inner:
            await add(inner, "e")
    # Undoing a savepoint takes two: back to it, and out of it.
    assert len(round_trips) == 3 + 6 + 6 + 2
    assert await texts(db) == ["a", "c", "e"]
    await assert_sound(db)


async def test_error_that_was_caught_in_a_savepoint(db: DatabaseAdapter) -> None:
    async with db.transaction() as tx:
        await add(tx, "a")
        with pytest.raises(elizasql.TransactionError):
            async with tx.transaction() as inner:
                await add(inner, "b")
                await fail(inner)
        await add(tx, "c")
    assert await texts(db) == ["a", "c"]
    await assert_sound(db)


async def test_savepoints_in_savepoints(db: DatabaseAdapter) -> None:
    async with db.transaction() as one:
        await add(one, "1")
        async with one.transaction() as two:
            await add(two, "2")
            with pytest.raises(ZeroDivisionError):
                async with two.transaction() as three:
                    await add(three, "3")
                    async with three.transaction() as four:
                        await add(four, "4")
                    raise ZeroDivisionError
            await add(two, "5")
    assert await texts(db) == ["1", "2", "5"]


async def test_outer_error_undoes_finished_savepoints(db: DatabaseAdapter) -> None:
    with pytest.raises(ZeroDivisionError):
        async with db.transaction() as tx:
            async with tx.transaction() as inner:
                await add(inner)
            raise ZeroDivisionError
    assert await texts(db) == []


async def test_outer_adapter_is_refused_while_a_savepoint_is_open(db: DatabaseAdapter) -> None:
    """To wait for the savepoint's end would be to wait for oneself."""
    async with db.transaction() as tx:
        async with tx.transaction() as inner:
            with pytest.raises(elizasql.TransactionError, match="savepoint"):
                await add(tx, "outer")
            with pytest.raises(elizasql.TransactionError, match="savepoint"):
                async with tx.transaction():
                    pass
            results = await asyncio.gather(add(tx, "outer"), add(inner, "a"), return_exceptions=True)
            assert isinstance(results[0], elizasql.TransactionError)
        await add(tx, "b")
    assert await texts(db) == ["a", "b"]


# --- one connection --------------------------------------------------------------------------------------------------


async def test_concurrent_calls_run_one_after_the_other(db: DatabaseAdapter) -> None:
    async with db.transaction() as tx:
        await asyncio.gather(*(add(tx, f"{number:02}") for number in range(40)))
        assert len(await texts(tx)) == 40
        assert db._executor.lane.in_use == 1
    assert len(await texts(db)) == 40


async def test_transactions_of_one_adapter_run_side_by_side(db: DatabaseAdapter) -> None:
    """Each waits inside for all of the others to have begun."""
    begun: list[int] = []
    all_begun = asyncio.Event()

    async def work(number: int) -> None:
        async with db.transaction() as tx:
            await add(tx, str(number))
            begun.append(number)
            if len(begun) == 5:
                all_begun.set()
            await all_begun.wait()

    await asyncio.gather(*map(work, range(5)))
    assert await texts(db) == list("01234")
    await assert_sound(db)


async def test_use_after_the_end(db: DatabaseAdapter) -> None:
    async with db.transaction() as tx:
        async with tx.transaction() as inner:
            await add(inner)
        for use in (add(inner), inner.is_ready()):
            with pytest.raises(elizasql.ClosedError, match="transaction is over"):
                await raising(use)
    with pytest.raises(elizasql.ClosedError, match="transaction is over"):
        await add(tx)
    with pytest.raises(elizasql.ClosedError):
        async with tx.transaction():
            pass
    with pytest.raises(ZeroDivisionError):
        async with db.transaction() as tx:
            raise ZeroDivisionError
    with pytest.raises(elizasql.ClosedError):
        await add(tx)
    assert await texts(db) == ["x"]
    await assert_sound(db)


async def raising(call: Awaitable[Any]) -> None:
    """Await a call; `is_ready` says no where others raise."""
    if await call is False:
        raise elizasql.ClosedError("transaction is over")


@pytest.mark.parametrize("keep", [True, False])
async def test_calls_that_still_run_at_the_end(db: DatabaseAdapter, raw: asyncpg.Connection[Any], keep: bool) -> None:
    """The one that is running belongs to the transaction, those that wait for their turn do not run at all."""
    id = await add(db, "old")
    running: list[asyncio.Task[Any]] = []

    async def block(tx: DatabaseAdapter) -> None:
        running.append(asyncio.create_task(tx.update_memory(memory("new", id=id))))
        await blocked_pid(raw, running[0])
        running.extend(asyncio.create_task(add(tx, "late")) for _ in range(3))
        await asyncio.sleep(0)
        if not keep:
            raise ZeroDivisionError

    async def whole() -> None:
        async with db.transaction() as tx:
            await block(tx)

    async with locked(raw, id):
        task = asyncio.create_task(whole())
        while len(running) < 4:
            await asyncio.sleep(0)
        assert not task.done()
    results = await asyncio.gather(task, *running, return_exceptions=True)
    assert (results[0] is None) == keep
    assert results[1] is True
    assert all(isinstance(result, elizasql.ClosedError) for result in results[2:])
    assert await texts(db) == ["new" if keep else "old"]
    await assert_sound(db)


async def test_what_does_not_run_in_a_transaction_is_refused_and_documented(db: DatabaseAdapter) -> None:
    async with db.transaction() as tx:
        calls: dict[str, Callable[[], Awaitable[Any]]] = {
            "close": tx.close,
            "index_memories": lambda: tx.index_memories(rebuild=True),
            "load_memories": lambda: tx.load_memories([], "messages"),
            "reembed": lambda: tx.reembed(512, lambda texts: np.ones((len(texts), 512))),
            "abandon_reembedding": tx.abandon_reembedding,
            "wait_for_tasks": lambda: anext(tx.wait_for_tasks()),
        }
        for call in calls.values():
            with pytest.raises(elizasql.ArgumentError, match="transaction"):
                await call()
        await add(tx)
    assert await texts(db) == ["x"]
    assert refused_in_a_transaction() == calls.keys()
    assert all(f"`{name}`" in (DatabaseAdapter.transaction.__doc__ or "") for name in calls)


async def test_closing_waits_for_a_transaction(make_db: MakeAdapter) -> None:
    db = await make_db()
    other = await make_db(db.agent_id)
    async with db.transaction() as tx:
        await add(tx, "a")
        closing = asyncio.create_task(db.close())
        await asyncio.sleep(0)
        with pytest.raises(elizasql.ClosedError):
            await texts(db)
        await add(tx, "b")
        assert not closing.done()
    await closing
    assert await texts(other) == ["a", "b"]


async def test_transaction_on_a_closed_adapter(make_db: MakeAdapter) -> None:
    db = await make_db()
    await db.close()
    with pytest.raises(elizasql.ClosedError):
        async with db.transaction():
            pytest.fail("never reached")


async def test_no_free_connection(make_db: MakeAdapter) -> None:
    db = await make_db(pool_max_size=1, connection_timeout=1.0)
    async with db.transaction() as tx:
        with pytest.raises(elizasql.PoolTimeoutError) as caught:
            async with db.transaction():
                pytest.fail("never reached")
        assert caught.value.statement == "transaction"
        await add(tx)
    assert await texts(db) == ["x"]
    await assert_sound(db)


# --- broken in the middle --------------------------------------------------------------------------------------------


async def test_cancellation_inside_a_call(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    id = await add(db, "old")

    async def work() -> None:
        async with db.transaction() as tx:
            await add(tx, "lost")
            await tx.update_memory(memory("new", id=id))

    async with locked(raw, id):
        task = asyncio.create_task(work())
        await blocked_pid(raw, task)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert await texts(db) == ["old"]
    await assert_sound(db)


async def test_cancellation_between_calls(db: DatabaseAdapter) -> None:
    reached = asyncio.Event()

    async def work() -> None:
        async with db.transaction() as tx:
            await add(tx, "lost")
            reached.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await texts(db) == []
    await assert_sound(db)


async def test_cancellation_while_the_end_waits_for_a_call(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    """Whoever is cancelled again does not wait for it: the connection is closed, and its place in the pool is free."""
    db = await make_db(pool_max_size=1)
    id = await add(db, "old")
    running: list[asyncio.Task[Any]] = []
    bound: list[DatabaseAdapter] = []

    async def work() -> None:
        async with db.transaction() as tx:
            bound.append(tx)
            running.append(asyncio.create_task(tx.update_memory(memory("new", id=id))))
            await asyncio.Event().wait()

    async with locked(raw, id):
        task = asyncio.create_task(work())
        while not running:
            await asyncio.sleep(0)
        await blocked_pid(raw, running[0])
        for _ in range(2):
            task.cancel()
            while not bound[0]._executor._closed:
                await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(elizasql.ConnectionLostError):
            await running[0]
    assert await texts(db) == ["old"]
    await assert_sound(db)


async def test_savepoint_whose_end_was_not_waited_for(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    """It was not undone: whoever catches that and goes on must not keep what was done in it."""
    id = await add(db, "old")
    running: list[asyncio.Task[Any]] = []
    bound: list[DatabaseAdapter] = []
    ended = asyncio.Event()

    async def work() -> None:
        async with db.transaction() as tx:
            with suppress(asyncio.CancelledError):
                async with tx.transaction() as inner:
                    bound.append(inner)
                    running.append(asyncio.create_task(inner.update_memory(memory("new", id=id))))
                    await asyncio.Event().wait()
            await ended.wait()

    async with locked(raw, id):
        task = asyncio.create_task(work())
        while not running:
            await asyncio.sleep(0)
        await blocked_pid(raw, running[0])
        for _ in range(2):
            task.cancel()
            while not bound[0]._executor._closed:
                await asyncio.sleep(0)
        await asyncio.sleep(0)
    await asyncio.gather(*running, return_exceptions=True)
    ended.set()
    with pytest.raises(elizasql.ConnectionLostError):
        await task
    assert await texts(db) == ["old"]
    await assert_sound(db)


@pytest.mark.parametrize("nested", [False, True])
async def test_a_task_that_nobody_held(make_db: MakeAdapter, nested: bool) -> None:
    """The garbage collector ends it where it waits, and it can await nothing more."""
    db = await make_db(pool_max_size=1)
    reached: list[int] = []

    async def work() -> None:
        async with db.transaction() as tx:
            await add(tx)
            async with tx.transaction() if nested else nullcontext(tx) as inner:
                await add(inner)
                reached.append(_connection(tx).get_server_pid())
                await asyncio.get_running_loop().create_future()

    task = asyncio.create_task(work())
    while not reached:
        await asyncio.sleep(0)
    ended = weakref.ref(task)
    del task
    gc.collect()
    assert ended() is None
    assert await texts(db) == []
    await assert_sound(db)
    assert not db._executor._held
    # Nothing is wrong with any connection, nor with this one: what still ran on it was waited for.
    assert db._executor.lane._generation == 0
    async with db.transaction() as tx:
        assert [_connection(tx).get_server_pid()] == reached


async def test_transaction_that_is_left_before_its_savepoint(make_db: MakeAdapter) -> None:
    """Nobody may ever end the savepoint: the connection does not wait for it, and serves on."""
    db = await make_db(pool_max_size=1)
    outer = db.transaction()
    tx = await outer.__aenter__()
    pid = _connection(tx).get_server_pid()
    inner = tx.transaction()
    await add(await inner.__aenter__(), "lost")
    await outer.gen.aclose()  # type: ignore[attr-defined]
    assert await texts(db) == []
    async with db.transaction() as tx:
        assert _connection(tx).get_server_pid() == pid
    await inner.gen.aclose()  # type: ignore[attr-defined]
    await add(db, "kept")
    assert await texts(db) == ["kept"]
    await assert_sound(db)


async def test_transaction_that_was_left_takes_no_call(make_db: MakeAdapter) -> None:
    """Its connection goes back: what it did now would be undone with the rest, or be done for somebody else."""
    db = await make_db(pool_max_size=1)
    block = db.transaction()
    tx = await block.__aenter__()
    await block.gen.aclose()  # type: ignore[attr-defined]
    with pytest.raises(elizasql.ClosedError, match="transaction is over"):
        await add(tx)
    assert await texts(db) == []
    await assert_sound(db)


async def test_savepoint_in_an_iteration_that_is_left(db: DatabaseAdapter) -> None:
    """Calls that come after it in the transaction find it undone."""

    async def rows(tx: DatabaseAdapter) -> AsyncGenerator[UUID, None]:
        async with tx.transaction() as inner:
            yield await add(inner, "lost")

    async with db.transaction() as tx:
        await add(tx, "kept")
        async with aclosing(rows(tx)) as each:
            await anext(each)
        assert await texts(tx) == ["kept"]
    assert await texts(db) == ["kept"]
    await assert_sound(db)


async def test_savepoint_that_is_left_open(make_db: MakeAdapter) -> None:
    """As by an iteration that is broken off and kept: nobody waits for the end of the savepoint for ever."""
    db = await make_db(pool_max_size=1, timeout=3.0)

    async def rows(tx: DatabaseAdapter) -> AsyncGenerator[UUID, None]:
        async with tx.transaction() as inner:
            while True:
                yield await add(inner)

    with pytest.raises(elizasql.DeadlineError):
        async with db.transaction() as tx:
            left = rows(tx)
            await anext(left)
    with pytest.raises(ZeroDivisionError):
        async with db.transaction() as tx, tx.transaction() as outer:
            other = rows(outer)
            await anext(other)
            raise ZeroDivisionError
    assert await texts(db) == []
    for each in (left, other):
        with suppress(elizasql.ElizaSQLError):
            await each.aclose()
    await assert_sound(db)


async def test_turns_are_passed_on_by_who_goes_away() -> None:
    turn = _executor._Turn()
    await turn.take("first")
    gone, late, last = (
        asyncio.create_task(turn.take(name, deadline))
        for name, deadline in (("gone", None), ("late", 0.0), ("last", None))
    )
    with pytest.raises(elizasql.DeadlineError, match="late"):
        await late
    assert not gone.done() and not last.done()
    assert len(turn._waiters) == 2
    # The turn and the cancellation come together.
    turn.pass_on()
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    await last
    turn.pass_on()
    await turn.take("next")


async def test_a_turn_that_did_not_come_is_not_passed_on() -> None:
    """The cancellation comes together with the end of the wait: nobody else may go in for that."""
    turn = _executor._Turn()
    await turn.take("first")
    gone = asyncio.create_task(turn.take("gone"))
    await asyncio.sleep(0)
    _executor._expire(next(iter(turn._waiters)))
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    with pytest.raises(elizasql.DeadlineError):
        await turn.take("second", 0.0)


async def test_cancellation_anywhere(db: DatabaseAdapter, caplog: pytest.LogCaptureFixture) -> None:
    """All or nothing, whichever step of the loop it hits, BEGIN and COMMIT included."""

    async def work() -> None:
        async with db.transaction() as tx:
            await add(tx, "a")
            async with tx.transaction() as inner:
                await add(inner, "b")

    steps, further = 0, 1
    while True:
        before = len(await texts(db))
        task = asyncio.create_task(work())
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        result = (await asyncio.gather(task, return_exceptions=True))[0]
        added = len(await texts(db)) - before
        await assert_sound(db)
        if result is None:
            break
        assert isinstance(result, asyncio.CancelledError)
        assert added in (0, 2)
        steps, further = further, steps + further
    assert added == 2
    assert steps > 10
    assert not caplog.records


async def _kill(raw: asyncpg.Connection[Any], pid: int) -> None:
    assert await raw.fetchval("SELECT pg_terminate_backend($1, 10000)", pid)


def _connection(tx: DatabaseAdapter) -> Any:
    return tx._executor._connection  # type: ignore[attr-defined]


KILLED: dict[str, Callable[[DatabaseAdapter], Awaitable[Any]]] = {
    "call": add,
    "end": work_nothing,
    "savepoint": lambda tx: tx.with_entity_context(None, work_nothing),
}


@pytest.mark.parametrize("noticed", [True, False])
@pytest.mark.parametrize("then", KILLED)
async def test_connection_killed_between_calls(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any], then: str, noticed: bool
) -> None:
    """Noticed: asyncpg has seen the end of the connection before anything is sent on it."""
    with pytest.raises(elizasql.ConnectionLostError) as caught:
        async with db.transaction() as tx:
            await add(tx, "lost")
            connection = _connection(tx)
            await _kill(raw, connection.get_server_pid())
            while noticed and connection._con is not None:
                await asyncio.sleep(0)
            await KILLED[then](tx)
    assert caught.value.retryable
    assert await texts(db) == []
    await assert_sound(db)


@pytest.mark.parametrize("noticed", [True, False])
async def test_error_of_the_caller_is_not_hidden_by_a_killed_connection(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any], noticed: bool
) -> None:
    with pytest.raises(ZeroDivisionError):
        async with db.transaction() as tx, tx.transaction() as inner:
            await add(inner, "lost")
            connection = _connection(tx)
            await _kill(raw, connection.get_server_pid())
            while noticed and connection._con is not None:
                await asyncio.sleep(0)
            raise ZeroDivisionError
    assert await texts(db) == []
    await assert_sound(db)


@pytest.mark.parametrize("chunks", [1, 3])
async def test_connection_killed_inside_a_call(make_db: MakeAdapter, raw: asyncpg.Connection[Any], chunks: int) -> None:
    db = await make_db(batch_size=2)
    first, *others = await db.create_memories([memory("old") for _ in range(2 * chunks)], "messages")

    async def work() -> None:
        async with db.transaction() as tx:
            await add(tx, "lost")
            await tx.update_memories([memory("new", id=id) for id in (first, *others)])

    async with locked(raw, max(first, *others)):
        task = asyncio.create_task(work())
        await _kill(raw, await blocked_pid(raw, task))
        with pytest.raises(elizasql.ConnectionLostError):
            await task
    assert set(await texts(db)) == {"old"}
    await assert_sound(db)


async def test_caught_connection_loss_is_no_success(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    with pytest.raises(elizasql.ConnectionLostError):
        async with db.transaction() as tx:
            await add(tx, "lost")
            await _kill(raw, _connection(tx).get_server_pid())
            with pytest.raises(elizasql.ConnectionLostError):
                await add(tx, "lost")
    assert await texts(db) == []
    await assert_sound(db)


# Who begins one.
SAVEPOINTS: dict[str, Callable[[DatabaseAdapter], Awaitable[Any]]] = {
    "caller": lambda tx: tx.with_entity_context(None, work_nothing),
    "chunks": lambda tx: tx.create_memories([memory(), memory()], "messages"),
}


@pytest.mark.parametrize("by", SAVEPOINTS)
async def test_savepoint_that_was_cancelled_while_it_began(
    make_db: MakeAdapter, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """The server has ended the transaction, which no call has told of."""
    db = await make_db(batch_size=1)

    async def cancelled(connection: Any, *args: Any) -> None:
        with pytest.raises(asyncpg.DivisionByZeroError):
            await connection.execute("SELECT 1 / 0")
        raise asyncio.CancelledError

    with pytest.raises(elizasql.TransactionError):
        async with db.transaction() as tx:
            await add(tx, "lost")
            with monkeypatch.context() as patch:
                patch.setattr(_executor, "_send", cancelled)
                with pytest.raises(asyncio.CancelledError):
                    await SAVEPOINTS[by](tx)
    assert await texts(db) == []
    await assert_sound(db)


@pytest.mark.parametrize("by", SAVEPOINTS)
async def test_savepoint_that_is_there_unheard_is_not_taken_for_the_one_around_it(
    make_db: MakeAdapter, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """The cancellation came before the answer: who caught it goes on, and what is around it is undone as a whole."""
    db = await make_db(batch_size=1)
    send = _executor._send

    async def unheard(connection: Any, statement: Statement, deadline: float) -> None:
        await send(connection, statement, deadline)
        if statement.name == "begin_savepoint":
            raise asyncio.CancelledError

    async with db.transaction() as tx:
        await add(tx, "kept")
        with pytest.raises(asyncio.CancelledError):
            async with tx.transaction() as inner:
                await add(inner, "lost")
                with monkeypatch.context() as patch:
                    patch.setattr(_executor, "_send", unheard)
                    await SAVEPOINTS[by](inner)
        await add(tx, "kept, too")
    assert await texts(db) == ["kept", "kept, too"]
    await assert_sound(db)


async def test_savepoints_have_names_of_their_own(db: DatabaseAdapter, round_trips: list[str]) -> None:
    async with db.transaction() as tx:
        async with tx.transaction() as inner:
            await inner.with_entity_context(None, work_nothing)
        with pytest.raises(ZeroDivisionError):
            async with tx.transaction():
                raise ZeroDivisionError
    assert [sent.strip(";") for sent in round_trips if "SAVEPOINT" in sent] == [
        "SAVEPOINT nested_1",
        "SAVEPOINT nested_2",
        "RELEASE SAVEPOINT nested_2",
        "RELEASE SAVEPOINT nested_1",
        "SAVEPOINT nested_3",
        "ROLLBACK TO SAVEPOINT nested_3",
        "RELEASE SAVEPOINT nested_3",
    ]


# --- calls that stand in a transaction and are no part of it ---------------------------------------------------------

BESIDE = "is no part of it"


async def to_what_it_has_made(db: DatabaseAdapter, tx: DatabaseAdapter) -> None:
    room_id = await tx.create_room(Room(source="test", type="GROUP"))
    await add(db, room_id=room_id)


async def to_what_it_has_changed(db: DatabaseAdapter, tx: DatabaseAdapter) -> None:
    id = await add(db)
    await tx.update_memory(memory("ours", id=id))
    await asyncio.gather(db.update_memory(memory("theirs", id=id), timeout=0.3))


async def to_its_connection(db: DatabaseAdapter, tx: DatabaseAdapter) -> None:
    await db.transaction().__aenter__()


async def from_another_one(db: DatabaseAdapter, tx: DatabaseAdapter) -> None:
    id = await add(db)
    await tx.update_memory(memory("ours", id=id))
    async with db.transaction() as second, second.transaction() as inner:
        await inner.update_memory(memory("theirs", id=id), timeout=0.3)


@pytest.mark.parametrize(
    ("call", "connections", "error"),
    [
        (to_what_it_has_made, 2, elizasql.ForeignKeyError),
        (to_what_it_has_changed, 2, elizasql.DeadlineError),
        (to_its_connection, 1, elizasql.PoolTimeoutError),
        (from_another_one, 2, elizasql.DeadlineError),
    ],
)
async def test_error_of_a_call_beside_the_transaction_around_it_says_so(
    make_db: MakeAdapter,
    call: Callable[[DatabaseAdapter, DatabaseAdapter], Awaitable[None]],
    connections: int,
    error: type[elizasql.ElizaSQLError],
) -> None:
    db = await make_db(pool_max_size=connections, connection_timeout=1.0)
    with pytest.raises(error, match=BESIDE):
        async with db.transaction() as tx:
            await call(db, tx)


async def test_error_of_another_call_says_nothing_of_a_transaction(db: DatabaseAdapter, make_db: MakeAdapter) -> None:
    other = await make_db()
    entered, ended = asyncio.Event(), asyncio.Event()

    async def homeless(db: DatabaseAdapter) -> str:
        with pytest.raises(elizasql.ForeignKeyError) as caught:
            await add(db, "homeless", room_id=uuid4())
        return str(caught.value)

    async def later() -> str:
        await ended.wait()
        return await homeless(db)

    async def apart() -> str:
        await entered.wait()
        return await homeless(db)

    outside = asyncio.create_task(apart())
    said = []
    async with db.transaction() as tx:
        outliving = asyncio.create_task(later())
        entered.set()
        said += [await outside, await homeless(other)]
        with suppress(elizasql.TransactionError):
            async with tx.transaction() as inner:
                said.append(await homeless(inner))
    ended.set()
    said += [await outliving, await homeless(db)]
    assert len(said) == 5
    assert not [each for each in said if BESIDE in each]


async def test_a_task_that_outlives_the_block_does_not_hold_the_transaction(db: DatabaseAdapter) -> None:
    ended = asyncio.Event()
    async with db.transaction() as tx:
        outliving = asyncio.create_task(ended.wait())
        held = weakref.ref(tx._executor)
    del tx
    gc.collect()
    assert held() is None
    ended.set()
    await outliving
