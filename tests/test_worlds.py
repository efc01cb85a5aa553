"""Worlds: create, find, change and delete."""

from __future__ import annotations

import asyncio
import copy
import json
from datetime import datetime, timedelta, timezone
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from elizasql import ArgumentError, DatabaseAdapter, ForeignKeyError, Memory, NotFoundError, World
from elizasql._statements import SQL

from .conftest import MakeAdapter, Scene, make_scene
from .skew import Skew

T0 = datetime(2026, 1, 1, tzinfo=timezone.utc)


@pytest.fixture
async def full(db: DatabaseAdapter) -> World:
    """Give a world with every field set."""
    given = World(
        id=uuid4(), agent_id=db.agent_id, name="n", message_server_id=uuid4(), metadata={"a": [1]}, created_at=T0
    )
    await db.create_world(given)
    return given


async def get(db: DatabaseAdapter, id: UUID | None) -> World:
    assert id is not None
    stored = await db.get_world(id)
    assert stored is not None
    return stored


# --- create ----------------------------------------------------------------------------------------------------------


async def test_create_gives_everything_back(db: DatabaseAdapter, full: World) -> None:
    assert await get(db, full.id) == full
    assert await db.get_world(str(full.id)) == full
    assert World.from_dict(full.to_dict()) == full


async def test_create_fills_in_what_is_missing(db: DatabaseAdapter) -> None:
    stored = await get(db, await db.create_world({}))
    assert (stored.name, stored.message_server_id, stored.metadata) == ("", None, {})
    assert stored.created_at is not None
    assert stored.created_at.tzinfo is not None


@pytest.mark.parametrize("key", ["serverId", "server_id", "messageServerId", "message_server_id"])
async def test_server_id_is_an_alias(db: DatabaseAdapter, key: str) -> None:
    server = uuid4()
    assert (await get(db, await db.create_world({key: str(server)}))).message_server_id == server


async def test_a_world_that_is_there_stays_and_gives_its_id(db: DatabaseAdapter, full: World) -> None:
    new = uuid4()
    ids = await db.create_worlds([{"id": full.id, "name": "second"}, World(id=new), World(), World(id=new, name="x")])
    assert [ids[0], ids[1], ids[3]] == [full.id, new, new]
    assert await get(db, full.id) == full
    assert (await get(db, new)).name == ""


async def test_worlds_of_an_agent_that_is_not_there(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    db = await make_db(batch_size=2)
    await db.delete_agent(db.agent_id)
    with pytest.raises(ForeignKeyError) as caught:
        await db.create_worlds([World() for _ in range(5)])
    assert caught.value.constraint == "worlds_agent_fkey"
    assert await raw.fetchval("SELECT count(*) FROM elizasql.worlds WHERE agent_id = $1", db.agent_id) == 0


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"id": "nope"}, "UUID"),
        ({"serverId": "server-123"}, "UUID"),
        ({"name": 5}, "string"),
        ({"metadata": "text"}, "mapping"),
        ({"metadata": {"a": object()}}, "JSON"),
        ({"nmae": "typo"}, "did you mean 'name'"),
        ({"agentId": uuid4()}, "belongs to agent"),
        ({"createdAt": "yesterday"}, "time"),
    ],
)
async def test_a_wrong_world_is_named_before_anything_is_sent(
    db: DatabaseAdapter, round_trips: list[str], wrong: dict[str, Any], words: str
) -> None:
    for method in (db.create_worlds, db.upsert_worlds):
        with pytest.raises(ArgumentError, match=words) as caught:
            await method([{}, {}, wrong])
        assert "position 2" in str(caught.value)
    assert round_trips == []


async def test_text_is_stored_as_it_is_and_cleaned_where_it_cannot_be(db: DatabaseAdapter) -> None:
    attack = "'); DELETE FROM elizasql.worlds; --"
    given = {"name": attack + "\x00", "metadata": {"k\x00": "\ud800", "sql": attack}}
    before = copy.deepcopy(given)
    stored = await get(db, await db.create_world(given))
    assert (stored.name, stored.metadata) == (attack + "�", {"k�": "�", "sql": attack})
    assert given == before


# --- read ------------------------------------------------------------------------------------------------------------


async def test_worlds_come_in_the_order_of_the_ids(db: DatabaseAdapter) -> None:
    ids = await db.create_worlds([World() for _ in range(20)])
    found = await db.get_worlds_by_ids([ids[7], uuid4(), ids[3], str(ids[19]), ids[7]])
    assert [one.id for one in found] == [ids[7], ids[3], ids[19]]
    assert await db.get_world(uuid4()) is None


async def test_all_worlds_come_oldest_first(db: DatabaseAdapter) -> None:
    assert await db.get_all_worlds() == []
    given = [World(id=uuid4(), created_at=T0 + timedelta(seconds=i // 5)) for i in range(20)]
    await db.create_worlds(given)
    given.sort(key=lambda one: (one.created_at, one.id))
    assert [one.id for one in await db.get_all_worlds()] == [one.id for one in given]


# --- update and upsert -----------------------------------------------------------------------------------------------


async def test_only_what_is_given_changes(db: DatabaseAdapter, full: World) -> None:
    wanted = copy.deepcopy(full)
    changes: list[tuple[dict[str, Any], str, Any]] = [
        ({"name": "new"}, "name", "new"),
        ({"serverId": UUID(int=5)}, "message_server_id", UUID(int=5)),
        ({"metadata": {"only": True}}, "metadata", {"only": True}),
        ({"createdAt": 0}, "created_at", datetime(1970, 1, 1, tzinfo=timezone.utc)),
        ({"name": None}, "name", ""),
        ({"serverId": None}, "message_server_id", None),
        ({"metadata": None}, "metadata", {}),
    ]
    for given, name, value in changes:
        assert await db.update_world({"id": full.id, **given}) is True
        setattr(wanted, name, value)
        assert await get(db, full.id) == wanted, name
    assert await db.update_world({"id": full.id}) is True
    assert await db.update_world(World(id=full.id, name="of a model")) is True
    wanted.name = "of a model"
    assert await get(db, full.id) == wanted


async def test_a_time_of_creation_that_comes_back_in_milliseconds_stays(db: DatabaseAdapter) -> None:
    given = World(id=uuid4(), name="old", created_at=T0 + timedelta(microseconds=1234))
    assert given.id is not None
    await db.create_world(given)
    await db.update_world({**given.to_dict(), "name": "new"})
    stored = await db.get_world(given.id)
    assert stored is not None
    assert (stored.name, stored.created_at) == ("new", given.created_at)


async def test_a_world_that_is_missing(make_db: MakeAdapter) -> None:
    db = await make_db(batch_size=2)
    ids = await db.create_worlds([World(name="old") for _ in range(5)])
    missing = UUID(int=2**128 - 1)
    assert await db.update_world({"id": missing, "name": "x"}) is False
    with pytest.raises(NotFoundError, match=str(missing)):
        await db.update_worlds([{"id": id, "name": "new"} for id in [*ids, missing]])
    assert {one.name for one in await db.get_worlds_by_ids(ids)} == {"old"}
    await db.update_worlds([*({"id": id, "name": str(id)} for id in ids), {"id": ids[0], "metadata": {"a": 1}}])
    assert all(one.name == str(one.id) for one in await db.get_worlds_by_ids(ids))
    assert (await get(db, ids[0])).metadata == {"a": 1}


async def test_what_every_world_has_cannot_be_cleared(db: DatabaseAdapter, full: World, round_trips: list[str]) -> None:
    round_trips.clear()
    for wrong in ({"id": full.id, "createdAt": None}, {"name": "without id"}):
        with pytest.raises(ArgumentError, match=r"created_at cannot be None|id is missing") as caught:
            await db.update_worlds([{"id": full.id}, wrong])
        assert "position 1" in str(caught.value)
    assert round_trips == []


async def test_upsert_creates_and_changes_what_is_given(make_db: MakeAdapter) -> None:
    db = await make_db(batch_size=2)
    full = World(uuid4(), db.agent_id, "n", message_server_id=uuid4(), metadata={"a": 1}, created_at=T0)
    await db.create_world(full)
    new = uuid4()
    ids = await db.upsert_worlds([{"id": full.id, "createdAt": 0}, {"id": new, "name": "new"}, {}, World(id=full.id)])
    assert [ids[0], ids[1], ids[3]] == [full.id, new, full.id]
    assert await get(db, full.id) == full, "what is not given stays, and so does the time"
    assert (await get(db, new)).name == "new"
    assert (await get(db, ids[2])).metadata == {}
    await db.upsert_worlds([{"id": full.id, "name": "first"}, {"id": full.id, "serverId": None}])
    stored = await get(db, full.id)
    assert (stored.name, stored.message_server_id, stored.metadata) == ("first", None, {"a": 1})
    await db.upsert_worlds([{"id": full.id, "name": None, "metadata": None}])
    stored = await get(db, full.id)
    assert (stored.name, stored.metadata) == ("", {})


async def test_concurrent_writes_lose_nothing(make_db: MakeAdapter) -> None:
    first = await make_db()
    adapters = [first, *[await make_db(first.agent_id) for _ in range(2)]]
    ids = [uuid4() for _ in range(30)]
    await asyncio.gather(
        *(
            adapter.upsert_worlds([{"id": id, field: value} for id in order])
            for adapter in adapters
            for field, value, order in (("name", "x", ids), ("metadata", {"y": 1}, ids[::-1]))
        )
    )
    found = await first.get_worlds_by_ids(ids)
    assert [(one.id, one.name, one.metadata) for one in found] == [(id, "x", {"y": 1}) for id in ids]
    await asyncio.gather(
        *(
            adapter.update_worlds([{"id": id, field: value} for id in order])
            for adapter in adapters
            for field, value, order in (("name", "z", ids), ("metadata", {}, ids[::-1]))
        )
    )
    assert all((one.name, one.metadata) == ("z", {}) for one in await first.get_worlds_by_ids(ids))


# --- delete ----------------------------------------------------------------------------------------------------------


async def test_remove_leaves_nothing_that_points_at_the_world(
    db: DatabaseAdapter, agent_world: Scene, raw: asyncpg.Connection[Any]
) -> None:
    memory = await db.create_memory(
        Memory(room_id=agent_world.room, world_id=agent_world.world, content={"text": "x"}), "messages"
    )
    await raw.execute(
        "INSERT INTO elizasql.components (agent_id, entity_id, room_id, world_id, type) VALUES ($1, $2, $3, $4, 't')",
        db.agent_id,
        agent_world.entity,
        agent_world.room,
        agent_world.world,
    )
    assert await db.remove_world(agent_world.world) is True
    assert await db.remove_world(agent_world.world) is False
    assert await db.get_world(agent_world.world) is None
    room = await db.get_room(agent_world.room)
    assert room is not None
    assert room.world_id is None
    stored = await db.get_memory_by_id(memory)
    assert stored is not None
    assert stored.world_id is None
    assert stored.room_id == agent_world.room
    assert await raw.fetchval("SELECT count(*) FROM elizasql.components WHERE agent_id = $1", db.agent_id) == 0


async def test_delete_many_gives_how_many_there_were(db: DatabaseAdapter) -> None:
    ids = await db.create_worlds([World() for _ in range(10)])
    assert await db.delete_worlds([ids[1], str(ids[1]), uuid4(), ids[2]]) == 2
    assert [one.id for one in await db.get_all_worlds()] == sorted([ids[0], *ids[3:]])
    assert await db.delete_worlds(ids) == 8


# --- another agent, round trips, plans -------------------------------------------------------------------------------


async def test_another_agents_worlds_are_out_of_reach(make_db: MakeAdapter) -> None:
    mine, other = await make_db(), await make_db()
    scene = await make_scene(other)
    stored = await other.get_world(scene.world)
    assert await mine.get_worlds_by_ids([scene.world]) == []
    assert await mine.get_all_worlds() == []
    assert await mine.update_world({"id": scene.world, "name": "stolen"}) is False
    with pytest.raises(NotFoundError):
        await mine.update_worlds([{"id": scene.world, "name": "stolen"}])
    assert await mine.delete_worlds([scene.world]) == 0
    assert await mine.create_world({"id": scene.world, "name": "mine"}) == scene.world
    await mine.upsert_worlds([{"id": scene.world, "name": "mine, too"}])
    assert await mine.remove_world(scene.world) is True
    assert await other.get_world(scene.world) == stored
    room = await other.get_room(scene.room)
    assert room is not None
    assert room.world_id == scene.world


async def test_one_round_trip_each(make_db: MakeAdapter, round_trips: list[str]) -> None:
    db = await make_db(batch_size=50, pool_min_size=1)
    ids = [uuid4() for _ in range(50)]
    worlds = [{"id": id, "name": "x"} for id in ids]
    calls: list[Any] = [
        lambda: db.create_worlds(worlds),
        lambda: db.upsert_worlds(worlds),
        lambda: db.update_worlds(worlds),
        lambda: db.create_world(worlds[0]),
        lambda: db.update_world(worlds[0]),
        lambda: db.get_world(ids[0]),
        lambda: db.get_worlds_by_ids(ids),
        db.get_all_worlds,
        lambda: db.remove_world(ids[0]),
        lambda: db.delete_worlds(ids),
    ]
    await db.get_world(ids[0])
    for number, call in enumerate(calls):
        round_trips.clear()
        await call()
        assert len(round_trips) == 1, (number, round_trips)


async def test_nothing_in_nothing_out_without_a_round_trip(db: DatabaseAdapter, round_trips: list[str]) -> None:
    round_trips.clear()
    assert await db.create_worlds([]) == []
    assert await db.upsert_worlds([]) == []
    await db.update_worlds(iter(()))
    assert await db.get_worlds_by_ids([]) == []
    assert await db.delete_worlds([]) == 0
    for bad in ("nope", "", None, 5):
        for call in (db.get_world, db.remove_world):
            with pytest.raises(ArgumentError):
                await call(bad)  # type: ignore[arg-type]
        for many in (db.get_worlds_by_ids, db.delete_worlds):
            with pytest.raises(ArgumentError):
                await many([bad])  # type: ignore[list-item]
    for many in (db.get_worlds_by_ids, db.delete_worlds):
        with pytest.raises(ArgumentError, match="collection"):
            await many(str(uuid4()))
    assert round_trips == []


async def test_a_large_agent_among_small_ones_is_read_by_the_index(skew: Skew) -> None:
    row = {"id": str(skew.world), "name": "x"}
    change = json.dumps([row])
    statements: dict[str, dict[str, Any]] = {
        "get_worlds_by_ids": {"ids": [skew.world]},
        "create_worlds": {"worlds": change},
        "upsert_worlds": {"worlds": json.dumps({str(skew.world): row})},
        "update_worlds": {"worlds": change, "required": True},
        "delete_worlds": {"ids": [skew.world], "indexed": False},
    }
    for name, params in statements.items():
        await skew.check(SQL[name], **params)
