"""Whoever writes many rows locks them in one order, also those that go with others: no call waits for its waiter."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from elizasql import DatabaseAdapter, NotFoundError

from .conftest import MakeAdapter
from .locking import blocked_pid, overtaken

# How rows are locked by those who change many of them.
ORDERS = {
    "participants": "room_id, entity_id",
    "components": "id",
    "relationships": "id",
    "memories": "id",
    "goals": "id",
    "logs": "id",
    "rooms": "id",
}


@dataclass(frozen=True)
class Family:
    """A world, rooms and entities, and of each pair of them a row of every table; memories have no vector."""

    world: UUID
    rooms: list[UUID]
    entities: list[UUID]


def new_ids(count: int) -> list[UUID]:
    return [uuid4() for _ in range(count)]


async def settle(db: DatabaseAdapter, family: Family) -> None:
    """Create what is not there of a family."""
    await db.create_world({"id": family.world})
    rooms = [{"id": id, "source": "x", "type": "GROUP", "world_id": family.world} for id in family.rooms]
    await db.upsert_rooms(rooms)
    await db.create_entities([{"id": id, "names": ["x"]} for id in family.entities])
    for room in family.rooms:
        await db.add_participants_room(family.entities, room)
    pairs = [(room, entity) for room in family.rooms for entity in family.entities]
    scopes = [{"room_id": room, "entity_id": entity} for room, entity in pairs]
    await db.create_components(
        [
            {**scope, "type": scope["room_id"].hex, "world_id": family.world, "source_entity_id": family.entities[0]}
            for scope in scopes
        ]
    )
    await db.create_relationships(
        [
            {"source_entity_id": source, "target_entity_id": target}
            for source in family.entities
            for target in family.entities
        ]
    )
    await db.create_memories(
        [{**scope, "world_id": family.world, "content": {"text": "x"}, "unique": True} for scope in scopes], "messages"
    )
    await db.create_goals([{**scope, "name": "x"} for scope in scopes])
    await db.create_logs([{**scope, "type": "x", "body": {}} for scope in scopes])


Call = Callable[[DatabaseAdapter, Family], Awaitable[Any]]

# What is deleted: the call, the table, which rows of the family, and the columns of other tables that name them.
DELETIONS: dict[str, tuple[Call, str, Callable[[Family], list[UUID]], tuple[str, ...]]] = {
    "delete_rooms": (lambda db, f: db.delete_rooms(f.rooms[:2]), "rooms", lambda f: f.rooms[:2], ("room_id",)),
    "delete_rooms_by_world_ids": (
        lambda db, f: db.delete_rooms_by_world_ids([f.world]),
        "rooms",
        lambda f: f.rooms,
        ("room_id",),
    ),
    "delete_entities": (
        lambda db, f: db.delete_entities(f.entities[:2]),
        "entities",
        lambda f: f.entities[:2],
        ("entity_id", "source_entity_id", "target_entity_id"),
    ),
    "delete_worlds": (lambda db, f: db.delete_worlds([f.world]), "worlds", lambda f: [f.world], ("world_id",)),
}


@pytest.mark.parametrize("deletion", DELETIONS)
async def test_what_goes_with_a_row_is_locked_before_it_and_in_the_order_of_batches(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any], deletion: str
) -> None:
    """Somebody has the first row: then all behind it, and what they go with, are still to be had."""
    call, parent, doomed, columns = DELETIONS[deletion]
    looked_at = []
    for table, order in ORDERS.items():
        there = await raw.fetch(
            "SELECT attname FROM pg_attribute WHERE attrelid = $1::text::regclass AND attname = ANY($2)",
            f"elizasql.{table}",
            list(columns),
        )
        if not there:
            continue
        looked_at.append(table)
        family = Family(uuid4(), new_ids(3), new_ids(3))
        await settle(db, family)
        theirs = f"""
            FROM elizasql.{table}
            WHERE agent_id = $1 AND ({" OR ".join(f"{name} = ANY($2)" for (name,) in there)})
            ORDER BY {order}"""
        ids = doomed(family)
        rows = await raw.fetchval(f"SELECT count(*) FROM (SELECT {theirs}) AS all_of_them", db.agent_id, ids)
        assert rows >= 3, table
        async with raw.transaction():
            await raw.execute(f"SELECT {theirs} LIMIT 1 FOR UPDATE", db.agent_id, ids)
            waiting = asyncio.ensure_future(call(db, family))
            await blocked_pid(raw, waiting)
            free = await raw.fetch(f"SELECT {theirs} FOR UPDATE SKIP LOCKED", db.agent_id, ids)
            assert len(free) == rows, table
            of_parent = f"SELECT FROM elizasql.{parent} WHERE agent_id = $1 AND id = ANY($2) FOR UPDATE SKIP LOCKED"
            assert len(await raw.fetch(of_parent, db.agent_id, ids)) == len(ids), table
        assert await waiting == len(ids)
        left = f"SELECT count(*) FROM (SELECT {theirs}) AS left_behind"
        assert await raw.fetchval(left, db.agent_id, ids) == 0, table
    assert len(looked_at) == {"rooms": 5, "entities": 6, "worlds": 3}[parent]


async def test_all_goals_of_a_room_are_locked_in_the_order_of_batches(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any]
) -> None:
    """The later the id, the older the goal, so that the index of the room has them the other way round."""
    room = uuid4()
    await db.create_room({"id": room, "source": "x", "type": "GROUP"})
    ids = sorted(new_ids(5))
    await db.create_goals(
        [{"id": id, "name": "x", "room_id": room, "created_at": 100.0 - number} for number, id in enumerate(ids)]
    )
    theirs = "SELECT id FROM elizasql.goals WHERE agent_id = $1 AND room_id = $2 ORDER BY id FOR UPDATE SKIP LOCKED"
    async with raw.transaction():
        await raw.execute("SELECT FROM elizasql.goals WHERE agent_id = $1 AND id = $2 FOR UPDATE", db.agent_id, ids[0])
        waiting = asyncio.ensure_future(db.delete_all_goals(room))
        await blocked_pid(raw, waiting)
        assert len(await raw.fetch(theirs, db.agent_id, room)) == 5
    assert await waiting == 5


async def ids_of(db: DatabaseAdapter, raw: asyncpg.Connection[Any], table: str) -> list[UUID]:
    """Give the ids of an agent's rows, shuffled."""
    question = f"SELECT id FROM elizasql.{table} WHERE agent_id = $1 ORDER BY random()"
    return [id for (id,) in await raw.fetch(question, db.agent_id)]


# What others do meanwhile: makes the call from the family and the ids of the table's rows.
BATCHES: dict[str, tuple[str, Callable[[DatabaseAdapter, Family, list[UUID]], Awaitable[Any]]]] = {
    "update_participants": (
        "participants",
        lambda db, f, ids: db.update_participant_user_states(
            [{"roomId": room, "entityId": entity, "state": "MUTED"} for entity in f.entities for room in f.rooms]
        ),
    ),
    "update_components": (
        "components",
        lambda db, f, ids: db.update_components([{"id": id, "data": {"x": 1}} for id in ids]),
    ),
    "patch_components": (
        "components",
        lambda db, f, ids: db.patch_components(
            [{"componentId": id, "ops": [{"op": "set", "path": "x", "value": 1}]} for id in ids]
        ),
    ),
    "update_relationships": (
        "relationships",
        lambda db, f, ids: db.update_relationships([{"id": id, "tags": ["x"]} for id in ids]),
    ),
    "update_memories": (
        "memories",
        lambda db, f, ids: db.update_memories([{"id": id, "content": {"text": "y"}} for id in ids]),
    ),
    "delete_memories": ("memories", lambda db, f, ids: db.delete_memories(ids)),
    "delete_all_memories": ("memories", lambda db, f, ids: db.delete_all_memories(f.rooms, "messages")),
    "prune_memories all": ("memories", lambda db, f, ids: db.prune_memories("messages", keep=0)),
    "update_goals": ("goals", lambda db, f, ids: db.update_goals([{"id": id, "name": "y"} for id in ids])),
    "delete_all_goals": ("goals", lambda db, f, ids: db.delete_all_goals(f.rooms[0])),
    "update_logs": ("logs", lambda db, f, ids: db.update_logs([{"id": id, "body": {"x": 1}} for id in ids])),
    "delete_logs": ("logs", lambda db, f, ids: db.delete_logs(ids)),
    "update_rooms": ("rooms", lambda db, f, ids: db.update_rooms([{"id": id, "name": "y"} for id in ids])),
    **{name: ("rooms", lambda db, f, ids, name=name: DELETIONS[name][0](db, f)) for name in DELETIONS},  # type: ignore[misc]
}


async def test_a_batch_locks_its_rows_in_one_order_over_all_its_chunks(make_db: MakeAdapter, own_database: str) -> None:
    """They come the other way round, and somebody has the first one: then all behind it are still to be had.

    After vacuum, and before the first statistics, many an index looks as good as the key.
    """
    db = await make_db(dsn=own_database, batch_size=2)
    raw = await asyncpg.connect(own_database)
    family = Family(uuid4(), sorted(new_ids(3), reverse=True), sorted(new_ids(2), reverse=True))
    await settle(db, family)
    await raw.execute("VACUUM")
    for batch, (table, change) in BATCHES.items():
        if batch in DELETIONS or "all" in batch:
            continue
        theirs = f"SELECT id FROM elizasql.{table} WHERE agent_id = $1 ORDER BY {ORDERS[table]}"
        ids = [id for (id,) in await raw.fetch(theirs, db.agent_id)]
        async with raw.transaction():
            await raw.execute(f"{theirs} LIMIT 1 FOR UPDATE", db.agent_id)
            waiting = asyncio.ensure_future(change(db, family, ids[::-1]))
            await blocked_pid(raw, waiting)
            free = await raw.fetch(f"{theirs} FOR UPDATE SKIP LOCKED", db.agent_id)
            assert len(free) == len(ids) > 2, batch
        await waiting
    await raw.close()


@pytest.mark.parametrize("batch", ["delete_memories", "delete_all_memories", "prune_memories"])
async def test_memories_are_deleted_in_one_order_whatever_the_plan(
    make_db: MakeAdapter, own_database: str, batch: str
) -> None:
    """After vacuum, and before the first statistics, the index of entities looks as good as the key."""
    db = await make_db(dsn=own_database)
    family = Family(uuid4(), new_ids(3), sorted(new_ids(2)))
    await settle(db, family)
    first, *rest = sorted(new_ids(20))
    scope = {"room_id": family.rooms[0], "content": {}, "unique": True}
    last, others = family.entities[1], [{**scope, "id": id, "entity_id": family.entities[0]} for id in rest]
    await db.create_memories([{**scope, "id": first, "entity_id": last}, *others], "others")
    raw = await asyncpg.connect(own_database)
    await raw.execute("VACUUM")
    async with raw.transaction():
        await raw.execute("SELECT FROM elizasql.memories WHERE id = $1 FOR UPDATE", first)
        if batch == "delete_memories":
            waiting = asyncio.ensure_future(db.delete_memories([*rest, first]))
        elif batch == "prune_memories":
            waiting = asyncio.ensure_future(db.prune_memories("others", keep=0))
        else:
            waiting = asyncio.ensure_future(db.delete_all_memories(family.rooms, "others"))
        await blocked_pid(raw, waiting)
        free = await raw.fetch("SELECT FROM elizasql.memories WHERE id = ANY($1) FOR UPDATE SKIP LOCKED", rest)
        assert len(free) == 19
    assert await waiting in (None, 20)
    await raw.close()


# What makes rows of these ids.
CREATIONS: dict[str, Callable[[DatabaseAdapter, list[UUID]], Awaitable[Any]]] = {
    "worlds": lambda db, ids: db.create_worlds([{"id": id} for id in ids]),
    "rooms": lambda db, ids: db.create_rooms([{"id": id, "source": "x", "type": "GROUP"} for id in ids]),
    "entities": lambda db, ids: db.create_entities([{"id": id, "names": ["x"]} for id in ids]),
    "memories": lambda db, ids: db.create_memories(
        [{"id": id, "content": {}, "unique": True} for id in ids], "messages"
    ),
    "goals": lambda db, ids: db.create_goals([{"id": id, "name": "x"} for id in ids]),
    "tasks": lambda db, ids: db.create_tasks([{"id": id, "name": "x"} for id in ids]),
}


async def test_a_batch_creates_its_rows_in_one_order_over_all_its_chunks(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any]
) -> None:
    """They come the other way round, and somebody is about to create the first one: then the last one is not there."""
    db = await make_db(batch_size=2)
    for table, create in CREATIONS.items():
        others, ids = new_ids(2), sorted(new_ids(5))
        await create(db, others)
        become = f"UPDATE elizasql.{table} SET id = $3 WHERE agent_id = $1 AND id = $2"
        first, then = ((become, db.agent_id, other, id) for other, id in zip(others, (ids[0], ids[-1]), strict=True))
        await overtaken(raw, create(db, ids[::-1]), first, then)  # type: ignore[arg-type]
        left = f"SELECT id FROM elizasql.{table} WHERE agent_id = $1 ORDER BY id"
        assert [id for (id,) in await raw.fetch(left, db.agent_id)] == ids, table
        assert db._meter.retries == 0, table


@pytest.mark.slow
@pytest.mark.parametrize("batch", BATCHES)
async def test_no_deletion_and_no_batch_wait_for_each_other(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any], batch: str
) -> None:
    """Each deletion beside each batch, of the same rows, over and over: no try was undone by a deadlock."""
    table, change = BATCHES[batch]
    mine = await make_db()
    other = await make_db(mine.agent_id)
    family = Family(uuid4(), new_ids(8), new_ids(8))
    for call, *_ in DELETIONS.values():
        for _ in range(6):
            await settle(mine, family)
            ids = await ids_of(mine, raw, table)
            deletion = asyncio.ensure_future(call(mine, family))
            with suppress(NotFoundError):
                await change(other, family, ids)
            await deletion
            assert mine._meter.retries + other._meter.retries == 0
