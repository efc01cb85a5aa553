"""Whoever writes many rows locks them in one order, also those that go with others: no call waits for its waiter."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from elizasql import DatabaseAdapter

from .locking import blocked_pid

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
