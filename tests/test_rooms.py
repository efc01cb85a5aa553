"""Rooms: create, find, change and delete."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import json
from datetime import datetime, timedelta, timezone
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from elizasql import (
    ArgumentError,
    DatabaseAdapter,
    Entity,
    ForeignKeyError,
    Memory,
    NotFoundError,
    Room,
    World,
)
from elizasql._statements import SQL

from .conftest import MakeAdapter, Scene, make_scene
from .skew import Skew

T0 = datetime(2026, 1, 1, tzinfo=timezone.utc)


def room(**fields: Any) -> dict[str, Any]:
    return {"id": uuid4(), "source": "discord", "type": "GROUP", **fields}


async def count(raw: asyncpg.Connection[Any], table: str, db: DatabaseAdapter) -> int:
    found: int = await raw.fetchval(f"SELECT count(*) FROM elizasql.{table} WHERE agent_id = $1", db.agent_id)
    return found


# --- create ----------------------------------------------------------------------------------------------------------


async def test_create_gives_everything_back(db: DatabaseAdapter, agent_world: Scene) -> None:
    given = Room(
        id=uuid4(),
        name="général",
        source="discord",
        type="FORUM",
        channel_id="123",
        message_server_id=uuid4(),
        world_id=agent_world.world,
        metadata={"a": [1, None, {"b": "c"}]},
        created_at=T0,
    )
    assert await db.create_room(given) == given.id
    given.agent_id = db.agent_id
    assert given.id is not None
    assert await db.get_room(given.id) == given
    assert await db.get_room(str(given.id)) == given


async def test_create_fills_in_what_is_missing(db: DatabaseAdapter) -> None:
    id = await db.create_room({"source": "s", "type": "DM"})
    assert id.version == 7
    stored = await db.get_room(id)
    assert stored is not None
    assert (stored.name, stored.channel_id, stored.world_id, stored.message_server_id) == (None, None, None, None)
    assert stored.metadata == {}
    assert stored.created_at is not None
    assert stored.created_at.tzinfo is not None


@pytest.mark.parametrize("key", ["serverId", "server_id", "messageServerId", "message_server_id"])
async def test_server_id_is_an_alias(db: DatabaseAdapter, key: str) -> None:
    server = uuid4()
    stored = await db.get_room(await db.create_room(room(**{key: str(server)})))
    assert stored is not None
    assert stored.message_server_id == server


async def test_a_room_that_is_there_stays_and_gives_its_id(db: DatabaseAdapter) -> None:
    first = room(name="first")
    second = room(name="new")
    await db.create_room(first)
    assert await db.create_rooms([{**first, "name": "second"}, second]) == [first["id"], second["id"]]
    assert [found.name for found in await db.get_rooms_by_ids([first["id"], second["id"]])] == ["first", "new"]


async def test_ids_come_in_the_order_given_also_for_one_id_twice(db: DatabaseAdapter) -> None:
    a, b = room(name="a"), room(name="b")
    ids = await db.create_rooms([a, {"source": "s", "type": "DM"}, b, {**a, "name": "later"}])
    assert [ids[0], ids[2], ids[3]] == [a["id"], b["id"], a["id"]]
    assert len(await db.get_rooms_by_ids(ids)) == 3
    stored = await db.get_room(a["id"])
    assert stored is not None
    assert stored.name == "a"


async def test_create_is_all_or_nothing(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    db = await make_db(batch_size=2)
    rooms = [room() for _ in range(5)]
    with pytest.raises(ForeignKeyError) as caught:
        await db.create_rooms([*rooms, room(worldId=uuid4())])
    assert caught.value.constraint == "rooms_world_fkey"
    assert await count(raw, "rooms", db) == 0


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"source": None}, "source"),
        ({"type": None}, "type"),
        ({"id": "nope"}, "UUID"),
        ({"serverId": "server-123"}, "UUID"),
        ({"name": 5}, "string"),
        ({"metadata": [1]}, "mapping"),
        ({"metadata": {"a": object()}}, "JSON"),
        ({"nmae": "typo"}, "did you mean 'name'"),
        ({"agentId": uuid4()}, "belongs to agent"),
    ],
)
async def test_a_wrong_room_is_named_before_anything_is_sent(
    db: DatabaseAdapter, round_trips: list[str], wrong: dict[str, Any], words: str
) -> None:
    for method in (db.create_rooms, db.upsert_rooms):
        with pytest.raises(ArgumentError, match=words) as caught:
            await method([room(), room(), room(**wrong)])
        assert "position 2" in str(caught.value)
    assert round_trips == []


async def test_text_is_stored_as_it_is_and_cleaned_where_it_cannot_be(db: DatabaseAdapter) -> None:
    attack = "'; DROP TABLE elizasql.rooms; --"
    nul = room(name="a\x00b", channelId="\ud800", source=attack, metadata={"k\x00": ["\udc00", "\\u0000"]})
    nul["type"] = "😀\ud83d\ude00"
    stored = await db.get_room(await db.create_room(nul))
    assert stored is not None
    assert (stored.name, stored.channel_id, stored.source, stored.type) == ("a�b", "�", attack, "😀😀")
    assert stored.metadata == {"k�": ["�", "\\u0000"]}
    await db.update_room({"id": nul["id"], "name": "\x00", "metadata": {"\x00": attack}})
    stored = await db.get_room(nul["id"])
    assert stored is not None
    assert (stored.name, stored.metadata) == ("�", {"�": attack})


async def test_arguments_stay_as_they_are(db: DatabaseAdapter) -> None:
    given = [room(name="a\x00", metadata={"l": [{"\x00": "\ud800"}]}), {"source": "s", "type": "t"}]
    model = Room(source="s", type="t", metadata={"a": 1})
    before = copy.deepcopy((given, model))
    await db.create_rooms([*given, model])
    await db.upsert_rooms([*given, model])
    await db.update_rooms(given[:1])
    assert (given, model) == before


# --- read ------------------------------------------------------------------------------------------------------------


async def test_rooms_come_in_the_order_of_the_ids(db: DatabaseAdapter) -> None:
    ids = await db.create_rooms([room() for _ in range(20)])
    asked: list[UUID | str] = [ids[7], uuid4(), ids[3], str(ids[19]), ids[7], ids[0]]
    found = await db.get_rooms_by_ids(asked)
    assert [one.id for one in found] == [ids[7], ids[3], ids[19], ids[0]]
    assert await db.get_room(uuid4()) is None


async def make_worlds(db: DatabaseAdapter) -> tuple[list[UUID], list[UUID]]:
    """Make three worlds with rooms, many of which are of one time; give the worlds and the rooms in their order."""
    worlds = await db.create_worlds([World(), World(), World()])
    rooms = [
        Room(id=uuid4(), source="s", type="t", world_id=worlds[i % 3], created_at=T0 + timedelta(seconds=i // 4))
        for i in range(24)
    ]
    await db.create_rooms([*rooms, Room(source="s", type="t")])
    rooms.sort(key=lambda one: (one.created_at, one.id))
    return worlds, [one.id for one in rooms if one.id]


async def test_rooms_by_world(db: DatabaseAdapter) -> None:
    worlds, order = await make_worlds(db)
    found = [[one.id for one in await db.get_rooms_by_world(world)] for world in worlds]
    assert all(len(ids) == 8 for ids in found)
    for ids in found:
        assert ids == [id for id in order if id in ids]
    assert await db.get_rooms_by_world(uuid4()) == []
    both = [one.id for one in await db.get_rooms_by_worlds([worlds[2], worlds[0], worlds[2], uuid4()])]
    assert both == [id for id in order if id in found[0] + found[2]]


async def test_pages_of_rooms_neither_repeat_nor_skip(db: DatabaseAdapter) -> None:
    worlds, order = await make_worlds(db)
    for size in (1, 5, 7, 24, 100):
        pages = [await db.get_rooms_by_worlds(worlds, limit=size, offset=start) for start in range(0, 24, size)]
        assert [one.id for page in pages for one in page] == order, size
        assert all(len(page) <= size for page in pages)
    assert [one.id for one in await db.get_rooms_by_worlds(worlds, offset=20)] == order[20:]
    assert await db.get_rooms_by_worlds(worlds, limit=0) == []
    assert await db.get_rooms_by_worlds(worlds, offset=24) == []
    assert len(await db.get_rooms_by_worlds(worlds, limit=2**63 - 1, offset=1)) == 23
    for bad in (-1, 1.5, True, "1", 2**63):
        with pytest.raises(ArgumentError, match="limit"):
            await db.get_rooms_by_worlds(worlds, limit=bad)  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match="offset"):
            await db.get_rooms_by_worlds(worlds, offset=bad)  # type: ignore[arg-type]


# --- update ----------------------------------------------------------------------------------------------------------


@pytest.fixture
async def full(db: DatabaseAdapter, agent_world: Scene) -> Room:
    """Give a room with every field set."""
    id = await db.create_room(
        room(
            name="n",
            channelId="c",
            serverId=uuid4(),
            worldId=agent_world.world,
            metadata={"a": 1, "b": {"c": 2}},
            createdAt=T0,
        )
    )
    stored = await db.get_room(id)
    assert stored is not None
    return stored


async def test_only_what_is_given_changes(db: DatabaseAdapter, full: Room) -> None:
    assert full.id is not None
    changes: list[tuple[dict[str, Any], str, Any]] = [
        ({"name": "new"}, "name", "new"),
        ({"source": "slack"}, "source", "slack"),
        ({"type": "DM"}, "type", "DM"),
        ({"channelId": "9"}, "channel_id", "9"),
        ({"serverId": UUID(int=5)}, "message_server_id", UUID(int=5)),
        ({"metadata": {"only": True}}, "metadata", {"only": True}),
        ({"createdAt": 0}, "created_at", datetime(1970, 1, 1, tzinfo=timezone.utc)),
        ({"name": None}, "name", None),
        ({"channelId": None}, "channel_id", None),
        ({"serverId": None}, "message_server_id", None),
        ({"worldId": None}, "world_id", None),
        ({"metadata": None}, "metadata", {}),
    ]
    wanted = copy.deepcopy(full)
    for given, name, value in changes:
        assert await db.update_room({"id": full.id, **given}) is True
        setattr(wanted, name, value)
        assert await db.get_room(full.id) == wanted, name
    assert await db.update_room({"id": full.id}) is True
    assert await db.update_room(Room(id=full.id, name="of a model")) is True
    wanted.name = "of a model"
    assert await db.get_room(full.id) == wanted


async def test_a_time_of_creation_that_comes_back_in_milliseconds_stays(db: DatabaseAdapter) -> None:
    """Cut to milliseconds it would put the room before those of the same millisecond."""
    exact = T0 + timedelta(microseconds=1234)
    (id,) = await db.create_rooms([room(created_at=exact)])
    stored = await db.get_room(id)
    assert stored is not None
    await db.update_room({**stored.to_dict(), "name": "new"})
    stored.name = "new"
    assert await db.get_room(id) == stored
    assert stored.created_at == exact


async def test_a_room_that_is_missing(db: DatabaseAdapter, full: Room) -> None:
    assert full.id is not None
    missing = uuid4()
    assert await db.update_room({"id": missing, "name": "x"}) is False
    assert await db.get_room(missing) is None
    with pytest.raises(NotFoundError, match=str(missing)):
        await db.update_rooms([{"id": full.id, "name": "changed"}, {"id": missing, "name": "x"}])
    assert await db.get_room(full.id) == full


async def test_a_missing_room_undoes_the_chunks_before_it(make_db: MakeAdapter) -> None:
    db = await make_db(batch_size=2)
    ids = await db.create_rooms([room(name="old") for _ in range(5)])
    with pytest.raises(NotFoundError):
        await db.update_rooms([{"id": id, "name": "new"} for id in [*ids, UUID(int=2**128 - 1)]])
    assert {one.name for one in await db.get_rooms_by_ids(ids)} == {"old"}
    await db.update_rooms([{"id": id, "name": f"{id}"} for id in ids])
    assert all(one.name == str(one.id) for one in await db.get_rooms_by_ids(ids))


async def test_changes_of_one_room_in_several_places_are_put_together(db: DatabaseAdapter, full: Room) -> None:
    assert full.id is not None
    await db.update_rooms(
        [
            {"id": full.id, "name": "first", "channelId": "x"},
            {"id": full.id, "name": "last"},
            {"id": full.id, "worldId": None},
        ]
    )
    stored = await db.get_room(full.id)
    assert stored is not None
    assert (stored.name, stored.channel_id, stored.world_id, stored.source) == ("last", "x", None, "discord")


@pytest.mark.parametrize("name", ["source", "type", "created_at", "id"])
async def test_what_every_room_has_cannot_be_cleared(
    db: DatabaseAdapter, full: Room, round_trips: list[str], name: str
) -> None:
    with pytest.raises(ArgumentError, match=name):
        await db.update_rooms([{"id": full.id}, {"id": full.id, name: None}])
    assert round_trips == []


async def test_a_broken_reference_undoes_the_update(db: DatabaseAdapter, full: Room) -> None:
    assert full.id is not None
    other = await db.create_room(room(name="other"))
    with pytest.raises(ForeignKeyError):
        await db.update_rooms([{"id": other, "name": "changed"}, {"id": full.id, "worldId": uuid4()}])
    assert await db.get_room(full.id) == full
    stored = await db.get_room(other)
    assert stored is not None
    assert stored.name == "other"


async def test_concurrent_updates_lose_nothing(make_db: MakeAdapter) -> None:
    first = await make_db()
    adapters = [first, *[await make_db(first.agent_id) for _ in range(3)]]
    ids = await first.create_rooms([room() for _ in range(30)])
    fields = ["name", "channelId", "source", "type"]
    await asyncio.gather(
        *(
            adapter.update_rooms([{"id": id, field: f"{field} {turn}"} for id in (ids if turn % 2 else reversed(ids))])
            for turn in range(6)
            for adapter, field in zip(adapters, fields, strict=True)
        )
    )
    for stored in await first.get_rooms_by_ids(ids):
        for field in ("name", "channel_id", "source", "type"):
            value = getattr(stored, field)
            assert str(value).rsplit(" ")[-1] in "012345", (field, value)


# --- upsert ----------------------------------------------------------------------------------------------------------


async def test_upsert_creates_and_changes(db: DatabaseAdapter, full: Room) -> None:
    assert full.id is not None
    new = room(name="new", metadata={"x": 1})
    ids = await db.upsert_rooms([new, {"id": full.id, "source": "slack", "type": "DM", "name": "changed"}])
    assert ids == [new["id"], full.id]
    wanted = copy.deepcopy(full)
    wanted.source, wanted.type, wanted.name = "slack", "DM", "changed"
    assert await db.get_room(full.id) == wanted
    stored = await db.get_room(new["id"])
    assert stored is not None
    assert (stored.name, stored.metadata) == ("new", {"x": 1})


async def test_upsert_leaves_what_is_not_given_and_clears_what_is_none(db: DatabaseAdapter, full: Room) -> None:
    assert full.id is not None
    same = {"id": full.id, "source": full.source, "type": full.type}
    await db.upsert_rooms([same, Room(**same)])  # type: ignore[arg-type]
    assert await db.get_room(full.id) == full
    await db.upsert_rooms([{**same, "createdAt": 0, "metadata": {}}])
    wanted = copy.deepcopy(full)
    wanted.metadata = {}
    assert await db.get_room(full.id) == wanted
    await db.upsert_rooms([{**same, "name": None, "channelId": None, "serverId": None, "worldId": None}])
    wanted.name = wanted.channel_id = wanted.message_server_id = wanted.world_id = None
    assert await db.get_room(full.id) == wanted


async def test_upsert_makes_ids_and_the_last_of_one_id_counts(make_db: MakeAdapter) -> None:
    db = await make_db(batch_size=3)
    given = [room(name=str(i)) for i in range(7)]
    ids = await db.upsert_rooms([*given, {"source": "s", "type": "t"}, {**given[0], "name": "last"}])
    assert ids[:7] == [one["id"] for one in given]
    assert ids[8] == ids[0]
    assert ids[7].version == 7
    assert [one.name for one in await db.get_rooms_by_ids(ids)] == ["last", "1", "2", "3", "4", "5", "6", None]
    with pytest.raises(ForeignKeyError):
        await db.upsert_rooms([{**one, "name": "x"} for one in given] + [room(worldId=uuid4())])
    assert "x" not in [one.name for one in await db.get_rooms_by_ids(ids)]


async def test_concurrent_upserts_of_one_room(make_db: MakeAdapter) -> None:
    first = await make_db()
    adapters = [first, *[await make_db(first.agent_id) for _ in range(3)]]
    rooms = [room() for _ in range(20)]
    results = await asyncio.gather(
        *(
            adapter.upsert_rooms([{**one, "name": str(turn)} for one in (rooms if turn % 2 else rooms[::-1])])
            for turn, adapter in enumerate(adapters * 3)
        )
    )
    assert all(set(ids) == {one["id"] for one in rooms} for ids in results)
    found = await first.get_rooms_by_ids([one["id"] for one in rooms])
    assert len(found) == 20
    assert all(one.name is not None for one in found)


# --- delete ----------------------------------------------------------------------------------------------------------

OF_A_ROOM = ("participants", "memories", "embeddings", "components")


async def fill_room(db: DatabaseAdapter, raw: asyncpg.Connection[Any], id: UUID, entity: UUID) -> None:
    """Put something of every kind that belongs to a room into it."""
    await db.add_participant(entity, id)
    await db.create_memory(Memory(room_id=id, content={"text": "x"}, embedding=[1.0] * 384), "messages")  # type: ignore[arg-type]
    await raw.execute(
        "INSERT INTO elizasql.components (agent_id, id, entity_id, room_id, type) VALUES ($1, $2, $3, $4, $5)",
        db.agent_id,
        uuid4(),
        entity,
        id,
        str(id),
    )


async def test_delete_takes_what_is_in_the_room(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    entity = uuid4()
    await db.create_entities([Entity(id=entity)])
    gone, kept = await db.create_rooms([room(), room()])
    for id in (gone, kept):
        await fill_room(db, raw, id, entity)
    assert await db.delete_room(gone) is True
    assert await db.delete_room(gone) is False
    assert await db.get_room(gone) is None
    for table in OF_A_ROOM:
        assert await count(raw, table, db) == 1, table
    with pytest.raises(ArgumentError):
        await db.delete_room("")


async def test_delete_many_gives_how_many_there_were(db: DatabaseAdapter) -> None:
    ids = await db.create_rooms([room() for _ in range(10)])
    assert await db.delete_rooms([ids[1], str(ids[1]), uuid4(), ids[2]]) == 2
    assert await db.delete_rooms(ids) == 8
    assert await db.get_rooms_by_ids(ids) == []


async def test_delete_by_world(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    entity = uuid4()
    await db.create_entities([Entity(id=entity)])
    worlds, _ = await make_worlds(db)
    for world in worlds:
        for one in await db.get_rooms_by_world(world):
            assert one.id is not None
            await fill_room(db, raw, one.id, entity)
    assert await db.delete_rooms_by_world_id(worlds[0]) == 8
    assert await db.delete_rooms_by_world_id(worlds[0]) == 0
    assert [await count(raw, table, db) for table in OF_A_ROOM] == [16] * 4
    assert await db.delete_rooms_by_world_ids([worlds[0], worlds[1], uuid4()]) == 8
    assert len(await db.get_rooms_by_worlds(worlds)) == 8
    assert await count(raw, "rooms", db) == 9
    assert {world.id for world in await db.get_all_worlds()} == set(worlds)


async def test_concurrent_deletes_do_not_wait_for_each_other(make_db: MakeAdapter) -> None:
    first = await make_db()
    second = await make_db(first.agent_id)
    for _ in range(5):
        worlds = await first.create_worlds([World(), World()])
        rooms = [room(worldId=worlds[i % 2]) for i in range(40)]
        ids = await first.create_rooms(rooms)
        counts = await asyncio.gather(
            first.delete_rooms(ids),
            second.delete_rooms_by_world_ids(worlds),
            first.delete_rooms_by_world_ids(worlds[::-1]),
            second.upsert_rooms(rooms[::-1]),
            first.delete_rooms(ids[::-1]),
            *(second.update_room({"id": id, "name": "x"}) for id in ids[:5]),
        )
        assert all(0 <= count <= 40 for count in counts[:3])  # type: ignore[operator]
        await first.delete_rooms(ids)
        assert await first.get_rooms_by_worlds(worlds) == []


async def test_a_room_that_left_a_world_meanwhile_is_spared(
    db: DatabaseAdapter, agent_world: Scene, raw: asyncpg.Connection[Any]
) -> None:
    """It leaves in a transaction that ends while the deletion waits for it."""
    other = await db.create_room(room(worldId=agent_world.world))
    transaction = raw.transaction()
    await transaction.start()
    await raw.execute(
        "UPDATE elizasql.rooms SET world_id = NULL WHERE agent_id = $1 AND id = $2", db.agent_id, agent_world.room
    )
    call = asyncio.ensure_future(db.delete_rooms_by_world_id(agent_world.world))
    waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND $1 = ANY(pg_blocking_pids(pid))"
    while not await raw.fetchval(waits, raw.get_server_pid()):
        assert not call.done(), "it did not wait"
    await transaction.commit()
    assert await call == 1
    assert await db.get_room(other) is None
    assert await db.get_room(agent_world.room) is not None


async def test_an_update_that_waits_sees_what_it_waited_for(
    db: DatabaseAdapter, agent_world: Scene, raw: asyncpg.Connection[Any]
) -> None:
    for end, there in (
        ("UPDATE elizasql.rooms SET channel_id = 'theirs'", True),
        ("DELETE FROM elizasql.rooms", False),
    ):
        transaction = raw.transaction()
        await transaction.start()
        await raw.execute(f"{end} WHERE agent_id = $1 AND id = $2", db.agent_id, agent_world.room)
        call = asyncio.ensure_future(db.update_room({"id": agent_world.room, "name": "ours"}))
        waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND $1 = ANY(pg_blocking_pids(pid))"
        while not await raw.fetchval(waits, raw.get_server_pid()):
            assert not call.done(), "it did not wait"
        await transaction.commit()
        assert await call is there
        stored = await db.get_room(agent_world.room)
        assert (None if stored is None else (stored.name, stored.channel_id)) == (("ours", "theirs") if there else None)


# --- another agent ---------------------------------------------------------------------------------------------------


async def test_another_agents_rooms_are_out_of_reach(make_db: MakeAdapter) -> None:
    """The same ids in two agents: every method of one touches its own rows only."""
    mine, other = await make_db(), await make_db()
    scene = await make_scene(other)
    stored = await other.get_room(scene.room)
    assert await mine.get_rooms_by_ids([scene.room]) == []
    assert await mine.get_rooms_by_world(scene.world) == []
    assert await mine.get_rooms_by_worlds([scene.world]) == []
    assert await mine.update_room({"id": scene.room, "name": "stolen"}) is False
    with pytest.raises(NotFoundError):
        await mine.update_rooms([{"id": scene.room, "name": "stolen"}])
    assert await mine.delete_rooms([scene.room]) == 0
    assert await mine.delete_rooms_by_world_id(scene.world) == 0
    with pytest.raises(ForeignKeyError):
        await mine.create_room(room(worldId=scene.world))
    assert await mine.create_room(room(id=scene.room, name="mine")) == scene.room
    await mine.upsert_rooms([room(id=scene.room, name="mine, too")])
    assert await mine.delete_rooms([scene.room]) == 1
    assert await other.get_room(scene.room) == stored


# --- round trips and plans -------------------------------------------------------------------------------------------


async def test_one_round_trip_each(make_db: MakeAdapter, round_trips: list[str]) -> None:
    db = await make_db(batch_size=50, pool_min_size=1)
    world = await db.create_world(World())
    rooms = [room(worldId=world) for _ in range(50)]
    ids = [one["id"] for one in rooms]
    await db.get_room(ids[0])
    calls: list[Any] = [
        lambda: db.create_rooms(rooms),
        lambda: db.upsert_rooms(rooms),
        lambda: db.update_rooms(rooms),
        lambda: db.create_room(rooms[0]),
        lambda: db.update_room(rooms[0]),
        lambda: db.get_room(ids[0]),
        lambda: db.get_rooms_by_ids(ids),
        lambda: db.get_rooms_by_world(world),
        lambda: db.get_rooms_by_worlds([world, uuid4()], limit=10, offset=3),
        lambda: db.delete_room(ids[0]),
        lambda: db.delete_rooms(ids[:20]),
        lambda: db.delete_rooms_by_world_id(world),
        lambda: db.delete_rooms_by_world_ids([world]),
    ]
    for number, call in enumerate(calls):
        round_trips.clear()
        await call()
        assert len(round_trips) == 1, (number, round_trips)
    round_trips.clear()
    await db.create_rooms([room() for _ in range(120)])
    assert len(round_trips) == 6, "three chunks in one transaction, and the look at its id"


async def test_nothing_in_nothing_out_without_a_round_trip(db: DatabaseAdapter, round_trips: list[str]) -> None:
    round_trips.clear()
    assert await db.create_rooms([]) == []
    assert await db.upsert_rooms(iter(())) == []
    await db.update_rooms([])
    assert await db.get_rooms_by_ids([]) == []
    assert await db.get_rooms_by_worlds([]) == []
    assert await db.delete_rooms([]) == 0
    assert await db.delete_rooms_by_world_ids([]) == 0
    assert round_trips == []


async def test_bad_ids_are_refused_without_a_round_trip(db: DatabaseAdapter, round_trips: list[str]) -> None:
    calls: list[Any] = [
        db.get_room,
        db.get_rooms_by_world,
        db.delete_room,
        db.delete_rooms_by_world_id,
        lambda bad: db.get_rooms_by_ids([uuid4(), bad]),
        lambda bad: db.get_rooms_by_worlds([bad]),
        lambda bad: db.delete_rooms([bad]),
        lambda bad: db.delete_rooms_by_world_ids([bad]),
    ]
    for call in calls:
        for bad in ("nope", "", None, 5, b"x"):
            with pytest.raises(ArgumentError):
                await call(bad)
    for many in (db.get_rooms_by_ids, db.get_rooms_by_worlds, db.delete_rooms, db.delete_rooms_by_world_ids):
        with pytest.raises(ArgumentError, match="collection"):
            await many(str(uuid4()))
    for batch in (db.create_rooms, db.upsert_rooms, db.update_rooms):
        with pytest.raises(ArgumentError, match="collection"):
            await batch(room())  # type: ignore[arg-type]
    assert round_trips == []


async def test_a_large_agent_among_small_ones_is_read_by_the_index(skew: Skew) -> None:
    one = [skew.room]
    row = {"id": str(skew.room), "name": "x", "source": "s", "type": "t"}
    change = json.dumps([row])
    statements: dict[str, dict[str, Any]] = {
        "get_rooms_by_ids": {"ids": one},
        "get_rooms_by_world": {"world_id": skew.world},
        "get_rooms_by_worlds": {"world_ids": [skew.world], "reach": 3, "count": 2, "skipped": 1},
        "create_rooms": {"rooms": change},
        "upsert_rooms": {"rooms": json.dumps({str(skew.room): row})},
        "update_rooms": {"rooms": change, "required": True},
        "delete_rooms": {"ids": one},
        "delete_rooms_by_world_ids": {"world_ids": [skew.world]},
    }
    for name, params in statements.items():
        await skew.check(SQL[name], **params)


async def test_the_planner_takes_every_agent_for_a_large_one(skew: Skew) -> None:
    """Told how few agents there are, it finds the right index for the plainest statement, too."""
    plain = dataclasses.replace(
        SQL["delete_rooms"],
        sql="DELETE FROM elizasql.rooms WHERE agent_id = $1 AND id = ANY($2::uuid[])",
        params=("agent_id", "ids"),
    )
    await skew.check(plain, ids=[skew.room])
    told = await skew.session.fetch(
        "SELECT relname FROM pg_attribute INNER JOIN pg_class ON pg_class.oid = attrelid"
        " WHERE attname = 'agent_id' AND relnamespace = 'elizasql'::regnamespace AND 'n_distinct=10' = ANY(attoptions)"
    )
    wanted = {"worlds", "rooms", "entities", "participants", "cache", "pairing_requests", "pairing_allowlist"}
    assert wanted <= {row[0] for row in told}
