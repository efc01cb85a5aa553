"""Participants: joining, leaving, who is where, and how the agent follows."""

from __future__ import annotations

import asyncio
import copy
import json
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from elizasql import (
    ArgumentError,
    DatabaseAdapter,
    Entity,
    ForeignKeyError,
    NotFoundError,
    Participant,
    Room,
)
from elizasql._statements import SQL

from .conftest import MakeAdapter, Scene, make_scene
from .skew import Skew


async def make_many(db: DatabaseAdapter, entities: int, rooms: int) -> tuple[list[UUID], list[UUID]]:
    """Create entities and rooms that nobody is in."""
    ids = [uuid4() for _ in range(entities)]
    await db.create_entities([Entity(id=id, names=[f"name {i}"], metadata={"i": i}) for i, id in enumerate(ids)])
    return ids, await db.create_rooms([Room(source="s", type="t") for _ in range(rooms)])


async def memberships(raw: asyncpg.Connection[Any], db: DatabaseAdapter) -> set[tuple[UUID, UUID]]:
    rows = await raw.fetch("SELECT entity_id, room_id FROM elizasql.participants WHERE agent_id = $1", db.agent_id)
    return {tuple(row) for row in rows}


# --- joining ---------------------------------------------------------------------------------------------------------


async def test_joining_several_times_is_one_membership(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    (entity,), (room,) = await make_many(db, 1, 1)
    for _ in range(3):
        assert await db.add_participant(entity, room) is True
    assert await db.get_participants_for_room(room) == [entity]
    assert await db.get_rooms_for_participant(entity) == [room]
    assert await db.add_participants_room([entity, entity], str(room)) is True
    assert await memberships(raw, db) == {(entity, room)}
    assert len(await db.get_participants_for_entity(entity)) == 1


async def test_joining_is_all_or_nothing(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    (one, two), (room,) = await make_many(db, 2, 1)
    for call in (db.add_participants_room, db.create_room_participants):
        with pytest.raises(ForeignKeyError) as caught:
            await call([one, uuid4(), two], room)
        assert caught.value.constraint == "participants_entity_fkey"
        with pytest.raises(ForeignKeyError) as caught:
            await call([one], uuid4())
        assert caught.value.constraint == "participants_room_fkey"
    for entity, where in ((uuid4(), room), (one, uuid4())):
        with pytest.raises(ForeignKeyError):
            await db.add_participant(entity, where)
    assert await memberships(raw, db) == set()


async def test_created_memberships_give_their_real_ids_in_order(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any]
) -> None:
    entities, (room, other) = await make_many(db, 6, 2)
    await db.add_participants_room(entities[:2], room)
    await db.set_participant_user_state(room, entities[0], "MUTED")
    asked = [entities[5], entities[0], entities[3], entities[5], entities[1]]
    ids = await db.create_room_participants(asked, room)
    stored = dict(
        await raw.fetch(
            "SELECT entity_id, id FROM elizasql.participants WHERE agent_id = $1 AND room_id = $2", db.agent_id, room
        )
    )
    assert ids == [stored[entity] for entity in asked]
    assert set(stored) == set(asked)
    assert await db.create_room_participants(asked, room) == ids
    assert await db.create_room_participants([entities[0]], other) != ids[1:2]
    assert await db.get_participant_user_state(room, entities[0]) == "MUTED", "one that is there stays as it is"


async def test_a_membership_that_is_there_is_not_written_again(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any]
) -> None:
    entities, (room,) = await make_many(db, 20, 1)
    versions = "SELECT entity_id, xmin::text, ctid::text FROM elizasql.participants WHERE agent_id = $1"
    await db.create_room_participants(entities, room)
    before = {tuple(row) for row in await raw.fetch(versions, db.agent_id)}
    await db.create_room_participants(entities, room)
    await db.add_participants_room(entities, room)
    assert {tuple(row) for row in await raw.fetch(versions, db.agent_id)} == before


async def test_concurrent_joins_are_one_membership(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    first = await make_db()
    adapters = [first, *[await make_db(first.agent_id) for _ in range(3)]]
    entities, (room,) = await make_many(first, 15, 1)
    results, _ = await asyncio.gather(
        asyncio.gather(*(one.create_room_participants(entities, room) for one in adapters for _ in range(4))),
        asyncio.gather(*(one.add_participants_room(entities[::-1], room) for one in adapters)),
    )
    ids = await first.create_room_participants(entities, room)
    assert len(set(ids)) == 15
    assert all(result == ids for result in results)
    assert await memberships(raw, first) == {(entity, room) for entity in entities}


async def test_a_join_that_waits_for_another_gives_its_id(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    """The other one commits after our statement began: its row is not in our snapshot."""
    (entity,), (room,) = await make_many(db, 1, 1)
    transaction = raw.transaction()
    await transaction.start()
    id = await raw.fetchval(
        "INSERT INTO elizasql.participants (agent_id, room_id, entity_id) VALUES ($1, $2, $3) RETURNING id",
        db.agent_id,
        room,
        entity,
    )
    call = asyncio.ensure_future(db.create_room_participants([entity], room))
    waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND $1 = ANY(pg_blocking_pids(pid))"
    while not await raw.fetchval(waits, raw.get_server_pid()):
        assert not call.done(), "it did not wait"
    await transaction.commit()
    assert await call == [id]


# --- leaving ---------------------------------------------------------------------------------------------------------


async def test_leaving(db: DatabaseAdapter, agent_world: Scene) -> None:
    elsewhere = await db.create_room({"source": "test", "type": "DM"})
    await db.add_participant(agent_world.entity, elsewhere)
    assert await db.remove_participant(agent_world.entity, agent_world.room) is True
    assert await db.remove_participant(agent_world.entity, agent_world.room) is False
    assert await db.remove_participant(agent_world.room, agent_world.other) is False
    assert await db.get_participants_for_rooms([agent_world.room, elsewhere]) == [
        [agent_world.other],
        [agent_world.entity],
    ]


async def test_deleting_pairs_does_not_stop_at_one_that_is_missing(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any]
) -> None:
    entities, rooms = await make_many(db, 4, 2)
    for room in rooms:
        await db.add_participants_room(entities, room)
    gone: list[Any] = [
        (entities[0], rooms[0]),
        (uuid4(), rooms[0]),
        {"entityId": str(entities[1]), "roomId": rooms[1]},
        {"entity_id": entities[2], "room_id": rooms[1]},
        Participant(entity_id=entities[3], room_id=rooms[0]),
    ]
    assert await db.delete_participants(gone) is False
    wanted = {(entity, room) for entity in entities for room in rooms}
    wanted -= {(entities[0], rooms[0]), (entities[1], rooms[1]), (entities[2], rooms[1]), (entities[3], rooms[0])}
    assert await memberships(raw, db) == wanted
    rest = sorted(wanted)
    assert await db.delete_participants([*rest, rest[0]]) is True, "a pair twice is one membership"
    assert await memberships(raw, db) == set()
    assert await db.delete_participants(rest) is False
    assert await db.delete_participants([]) is True


# --- reading ---------------------------------------------------------------------------------------------------------


async def test_participants_of_a_room_come_in_the_order_in_which_they_came(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any]
) -> None:
    entities, (room, empty) = await make_many(db, 8, 2)
    for entity in entities:
        await db.add_participant(entity, room)
    assert await db.get_participants_for_room(room) == entities
    await raw.execute("UPDATE elizasql.participants SET created_at = now() WHERE agent_id = $1", db.agent_id)
    assert await db.get_participants_for_room(room) == sorted(entities), "equal times are ordered by id"
    await db.add_participant(entities[0], empty)
    asked = [empty, uuid4(), room, empty]
    assert await db.get_participants_for_rooms(asked) == [entities[:1], [], sorted(entities), entities[:1]]


async def test_participants_of_an_entity_have_the_membership_and_the_entity(db: DatabaseAdapter) -> None:
    (one, two, idle), rooms = await make_many(db, 3, 3)
    ids = [(await db.create_room_participants([one], room))[0] for room in rooms[::-1]]
    await db.create_room_participants([two], rooms[0])
    await db.update_participants(
        [{"entityId": one, "roomId": rooms[2], "updates": {"roomState": "FOLLOWED", "metadata": {"a": [1]}}}]
    )
    found = await db.get_participants_for_entity(one)
    assert [(p.id, p.agent_id, p.room_id, p.entity_id) for p in found] == [
        (id, db.agent_id, room, one) for id, room in zip(ids, rooms[::-1], strict=True)
    ]
    assert [(p.room_state, p.metadata) for p in found] == [("FOLLOWED", {"a": [1]}), (None, {}), (None, {})]
    stored = (await db.get_entities_by_ids([one]))[0]
    for participant in found:
        assert participant.entity is not None
        for name in ("id", "agent_id", "names", "metadata", "created_at"):
            assert getattr(participant.entity, name) == getattr(stored, name), name
        assert Participant.from_dict(participant.to_dict()).to_dict() == participant.to_dict()
    both = await db.get_participants_for_entities([two, uuid4(), idle, one, two])
    assert [(p.entity_id, p.room_id) for p in both] == [(two, rooms[0]), *[(one, room) for room in rooms[::-1]]]
    assert await db.get_participants_for_entity(idle) == []
    assert await db.get_participants_for_entity(uuid4()) == []


async def test_rooms_of_entities_come_once_each(db: DatabaseAdapter) -> None:
    (one, two, idle), rooms = await make_many(db, 3, 4)
    for room in rooms[:3]:
        await db.add_participant(one, room)
    await db.add_participant(two, rooms[0])
    await db.add_participant(two, rooms[3])
    assert await db.get_rooms_for_participant(one) == sorted(rooms[:3])
    assert await db.get_rooms_for_participants([two, one, idle, two]) == sorted(rooms)
    assert await db.get_rooms_for_participants([idle, uuid4()]) == []


async def test_pairwise_reads_answer_in_the_order_of_the_pairs(db: DatabaseAdapter) -> None:
    (one, two), (here, there) = await make_many(db, 2, 2)
    await db.add_participants_room([one, two], here)
    await db.set_participant_user_state(here, one, "FOLLOWED")
    pairs: list[Any] = [
        (two, here),
        (one, there),
        {"entityId": one, "roomId": here},
        (str(one), str(here)),
        (uuid4(), here),
        (here, one),
        {"room_id": here, "entity_id": one},
        [two, here],
    ]
    assert await db.are_room_participants(pairs) == [True, False, True, True, False, False, True, True]
    followed = "FOLLOWED"
    assert await db.get_participant_user_states(pairs) == [None, None, followed, followed, None, None, followed, None]
    assert await db.is_room_participant(here, one) is True
    assert await db.is_room_participant(there, one) is False
    assert await db.is_room_participant(one, here) is False, "the room comes first here, as in the original"


async def test_pairs_are_checked_before_anything_is_sent(
    db: DatabaseAdapter, agent_world: Scene, round_trips: list[str]
) -> None:
    good = (agent_world.entity, agent_world.room)
    methods: list[Any] = [db.are_room_participants, db.get_participant_user_states, db.delete_participants]
    round_trips.clear()
    for method in methods:
        wrong: list[Any] = [
            (agent_world.entity,),
            (agent_world.entity, "nope"),
            (agent_world.entity, agent_world.room, None),
            (agent_world.entity, None),
            {"entityId": agent_world.entity},
            {"entityId": agent_world.entity, "roomId": agent_world.room, "agentId": uuid4()},
            {"entityId": agent_world.entity, "roomId": agent_world.room, "rooms": 1},
            agent_world.entity,
            "text",
            None,
        ]
        for bad in wrong:
            with pytest.raises(ArgumentError, match="pair at position 1"):
                await method([good, bad])
        wrong = [{"entityId": agent_world.entity, "roomId": agent_world.room}, "text", 5, None]
        for bad in wrong:
            with pytest.raises(ArgumentError, match="collection"):
                await method(bad)
        with pytest.raises(ArgumentError, match="pair at position 0"):
            await method(good)
    assert round_trips == []


# --- how the agent follows -------------------------------------------------------------------------------------------


async def test_states(db: DatabaseAdapter, agent_world: Scene) -> None:
    room, entity = agent_world.room, agent_world.entity
    assert await db.get_participant_user_state(room, entity) is None
    for state in ("FOLLOWED", "MUTED", None, "MUTED"):
        assert await db.set_participant_user_state(room, entity, state) is None  # type: ignore[func-returns-value]
        assert await db.get_participant_user_state(room, entity) == state
    assert await db.get_participant_user_state(room, agent_world.other) is None
    assert await db.get_participant_user_state(uuid4(), entity) is None


async def test_another_state_is_refused(
    db: DatabaseAdapter, agent_world: Scene, round_trips: list[str], raw: asyncpg.Connection[Any]
) -> None:
    room, entity = agent_world.room, agent_world.entity
    round_trips.clear()
    for bad in ("BANANA", "", "followed", 1, True):
        with pytest.raises(ArgumentError, match="state"):
            await db.set_participant_user_state(room, entity, bad)  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match="position 1"):
            await db.update_participants(
                [
                    {"roomId": room, "entityId": entity, "updates": {}},
                    {"roomId": room, "entityId": entity, "updates": {"roomState": bad}},
                ]
            )
    assert round_trips == []
    with pytest.raises(asyncpg.CheckViolationError):
        await raw.execute("UPDATE elizasql.participants SET room_state = 'BANANA' WHERE agent_id = $1", db.agent_id)


async def test_a_state_of_no_membership_is_an_error(db: DatabaseAdapter, agent_world: Scene) -> None:
    room, entity = agent_world.room, agent_world.entity
    stranger, nowhere = uuid4(), uuid4()
    for where, who in ((nowhere, entity), (room, stranger), (entity, room)):
        with pytest.raises(NotFoundError, match=f"entity {who} in room {where}"):
            await db.set_participant_user_state(where, who, "MUTED")
    with pytest.raises(NotFoundError) as caught:
        await db.update_participant_user_states(
            [
                {"roomId": room, "entityId": entity, "state": "MUTED"},
                {"roomId": room, "entityId": stranger, "state": "MUTED"},
                {"roomId": nowhere, "entityId": entity, "state": "MUTED"},
            ]
        )
    assert str(stranger) in str(caught.value)
    assert str(nowhere) in str(caught.value)
    assert await db.get_participant_user_state(room, entity) is None, "nothing was changed"


async def test_states_of_many_at_once(make_db: MakeAdapter) -> None:
    db = await make_db(batch_size=3)
    entities, rooms = await make_many(db, 4, 2)
    for room in rooms:
        await db.add_participants_room(entities, room)
    pairs = [(entity, room) for entity in entities for room in rooms]
    states = ["FOLLOWED", "MUTED", None, "MUTED", None, "FOLLOWED", "FOLLOWED", "MUTED"]
    updates: list[dict[str, Any]] = [
        {"room_id": room, "entity_id": entity, "state": state}
        for (entity, room), state in zip(pairs, states, strict=True)
    ]
    before = copy.deepcopy(updates)
    await db.update_participant_user_states(updates)
    assert updates == before
    assert await db.get_participant_user_states(pairs) == states
    with pytest.raises(NotFoundError):
        await db.update_participant_user_states(
            [
                *({**update, "state": None} for update in updates),
                {"entity_id": entities[0], "room_id": UUID(int=2**128 - 1), "state": None},
            ]
        )
    assert await db.get_participant_user_states(pairs) == states, "the chunks before it are undone"
    one = {"room_id": rooms[0], "entity_id": entities[0]}
    await db.update_participant_user_states([{**one, "state": None}, {**one, "state": "MUTED"}])
    assert await db.get_participant_user_state(rooms[0], entities[0]) == "MUTED", "the last one counts"


async def test_updates_change_what_is_given(db: DatabaseAdapter, agent_world: Scene) -> None:
    pair = {"entityId": agent_world.entity, "roomId": agent_world.room}

    async def stored() -> tuple[Any, Any]:
        participant = (await db.get_participants_for_entity(agent_world.entity))[0]
        return participant.room_state, participant.metadata

    for updates, wanted in (
        ({"metadata": {"a": {"b": 1}, "n\x00": "\ud800"}}, (None, {"a": {"b": 1}, "n�": "�"})),
        ({"roomState": "MUTED"}, ("MUTED", {"a": {"b": 1}, "n�": "�"})),
        ({"metadata": {"c": 2}}, ("MUTED", {"c": 2})),
        ({}, ("MUTED", {"c": 2})),
        ({"room_state": None}, (None, {"c": 2})),
        ({"metadata": None, "roomState": "FOLLOWED"}, ("FOLLOWED", {})),
        (Participant(metadata={"of": "a model"}), ("FOLLOWED", {"of": "a model"})),
    ):
        await db.update_participants([{**pair, "updates": updates}])
        assert await stored() == wanted
    await db.update_participants(
        [{**pair, "updates": {"metadata": {"x": 1}}}, {**pair, "updates": {"roomState": "MUTED"}}]
    )
    assert await stored() == ("MUTED", {"x": 1}), "changes of one membership are put together"


async def test_wrong_updates_are_named_before_anything_is_sent(
    db: DatabaseAdapter, agent_world: Scene, round_trips: list[str]
) -> None:
    pair = {"entityId": agent_world.entity, "roomId": agent_world.room}
    good = {**pair, "updates": {}}
    round_trips.clear()
    wrong: list[Any] = [
        pair,
        {**pair, "updates": None},
        {**pair, "updates": {"roomId": uuid4()}},
        {**pair, "updates": {"createdAt": 0}},
        {**pair, "updates": {"metadata": [1]}},
        {**pair, "updates": {"metadata": {"a": object()}}},
        {"entityId": agent_world.entity, "updates": {}},
        {**pair, "agentId": uuid4(), "updates": {}},
        {**pair, "metadata": {"b": 1}, "updates": {}},
        {**pair, "roomState": "MUTED", "updates": {"metadata": {}}},
        (agent_world.entity, agent_world.room),
    ]
    for bad in wrong:
        with pytest.raises(ArgumentError, match="pair at position 1"):
            await db.update_participants([good, bad])
    wrong = [pair, {**pair, "state": "MUTED", "x": 1}, {**pair, "state": "MUTED", "metadata": {}}, None]
    for bad in wrong:
        with pytest.raises(ArgumentError, match="pair at position 0"):
            await db.update_participant_user_states([bad])
    assert round_trips == []


async def test_concurrent_updates_lose_nothing(make_db: MakeAdapter) -> None:
    first = await make_db()
    second = await make_db(first.agent_id)
    entities, rooms = await make_many(first, 10, 3)
    for room in rooms:
        await first.add_participants_room(entities, room)
    pairs = [{"entityId": entity, "roomId": room} for entity in entities for room in rooms]
    await asyncio.gather(
        *(
            call
            for _ in range(5)
            for call in (
                first.update_participants([{**pair, "updates": {"metadata": {"a": 1}}} for pair in pairs]),
                second.update_participant_user_states([{**pair, "state": "MUTED"} for pair in pairs[::-1]]),
            )
        )
    )
    found = await first.get_participants_for_entities(entities)
    assert len(found) == 30
    assert all((p.room_state, p.metadata) == ("MUTED", {"a": 1}) for p in found)


async def test_concurrent_deletes_do_not_wait_for_each_other(make_db: MakeAdapter) -> None:
    first = await make_db()
    second = await make_db(first.agent_id)
    entities, rooms = await make_many(first, 10, 3)
    pairs = [(entity, room) for entity in entities for room in rooms]
    for _ in range(5):
        for room in rooms:
            await first.add_participants_room(entities, room)
        await asyncio.gather(
            first.delete_participants(pairs),
            second.delete_participants(pairs[::-1]),
            second.delete_participants(sorted(pairs)),
            *(first.create_room_participants(entities[::-1], room) for room in rooms),
        )
        await first.delete_participants(pairs)
        assert await first.get_participants_for_rooms(rooms) == [[]] * 3


# --- another agent, round trips, plans -------------------------------------------------------------------------------


async def test_another_agents_participants_are_out_of_reach(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    mine, other = await make_db(), await make_db()
    scene = await make_scene(other)
    pair = (scene.entity, scene.room)
    await other.set_participant_user_state(scene.room, scene.entity, "MUTED")
    before = await memberships(raw, other)
    assert await mine.get_participants_for_room(scene.room) == []
    assert await mine.get_participants_for_rooms([scene.room]) == [[]]
    assert await mine.get_participants_for_entity(scene.entity) == []
    assert await mine.get_rooms_for_participant(scene.entity) == []
    assert await mine.is_room_participant(scene.room, scene.entity) is False
    assert await mine.are_room_participants([pair]) == [False]
    assert await mine.get_participant_user_state(scene.room, scene.entity) is None
    assert await mine.get_participant_user_states([pair]) == [None]
    assert await mine.remove_participant(*pair) is False
    assert await mine.delete_participants([pair]) is False
    with pytest.raises(NotFoundError):
        await mine.set_participant_user_state(scene.room, scene.entity, "FOLLOWED")
    with pytest.raises(NotFoundError):
        await mine.update_participants([{"entityId": scene.entity, "roomId": scene.room, "updates": {}}])
    with pytest.raises(ForeignKeyError):
        await mine.add_participant(*pair)
    assert await memberships(raw, other) == before
    assert await other.get_participant_user_state(scene.room, scene.entity) == "MUTED"


async def test_one_round_trip_each(make_db: MakeAdapter, round_trips: list[str]) -> None:
    db = await make_db(batch_size=50, pool_min_size=1)
    entities, rooms = await make_many(db, 25, 2)
    pairs = [(entity, room) for entity in entities for room in rooms]
    changes = [{"entityId": entity, "roomId": room, "updates": {"metadata": {}}} for entity, room in pairs]
    states = [{"entityId": entity, "roomId": room, "state": "MUTED"} for entity, room in pairs]
    calls: list[Any] = [
        lambda: db.add_participants_room(entities, rooms[0]),
        lambda: db.create_room_participants(entities, rooms[1]),
        lambda: db.add_participant(entities[0], rooms[0]),
        lambda: db.update_participants(changes),
        lambda: db.update_participant_user_states(states),
        lambda: db.set_participant_user_state(rooms[0], entities[0], None),
        lambda: db.get_participant_user_state(rooms[0], entities[0]),
        lambda: db.get_participant_user_states(pairs),
        lambda: db.is_room_participant(rooms[0], entities[0]),
        lambda: db.are_room_participants(pairs),
        lambda: db.get_participants_for_room(rooms[0]),
        lambda: db.get_participants_for_rooms(rooms),
        lambda: db.get_participants_for_entity(entities[0]),
        lambda: db.get_participants_for_entities(entities),
        lambda: db.get_rooms_for_participant(entities[0]),
        lambda: db.get_rooms_for_participants(entities),
        lambda: db.remove_participant(entities[0], rooms[0]),
        lambda: db.delete_participants(pairs),
    ]
    for number, call in enumerate(calls):
        round_trips.clear()
        await call()
        assert len(round_trips) == 1, (number, round_trips)


async def test_nothing_in_nothing_out_without_a_round_trip(db: DatabaseAdapter, round_trips: list[str]) -> None:
    room = uuid4()
    round_trips.clear()
    assert await db.add_participants_room([], room) is False
    assert await db.create_room_participants([], room) == []
    assert await db.delete_participants(iter(())) is True
    await db.update_participants([])
    await db.update_participant_user_states([])
    assert await db.are_room_participants([]) == []
    assert await db.get_participant_user_states([]) == []
    assert await db.get_participants_for_rooms([]) == []
    assert await db.get_participants_for_entities([]) == []
    assert await db.get_rooms_for_participants([]) == []
    calls: list[Any] = [
        lambda bad: db.add_participant(bad, room),
        lambda bad: db.add_participant(room, bad),
        lambda bad: db.add_participants_room([], bad),
        lambda bad: db.create_room_participants([], bad),
        lambda bad: db.create_room_participants([bad], room),
        lambda bad: db.remove_participant(bad, room),
        lambda bad: db.remove_participant(room, bad),
        lambda bad: db.is_room_participant(bad, room),
        lambda bad: db.is_room_participant(room, bad),
        lambda bad: db.get_participant_user_state(bad, room),
        lambda bad: db.get_participant_user_state(room, bad),
        lambda bad: db.set_participant_user_state(bad, room, "MUTED"),
        lambda bad: db.get_participants_for_rooms([bad]),
        db.get_participants_for_room,
        db.get_participants_for_entity,
        db.get_rooms_for_participant,
    ]
    for call in calls:
        for bad in ("nope", "", None, 5):
            with pytest.raises(ArgumentError):
                await call(bad)
    assert round_trips == []


async def test_a_large_agent_among_small_ones_is_read_by_the_index(skew: Skew) -> None:
    pair = {"room_id": skew.room, "entity_id": skew.entity}
    pairs = {"room_ids": [skew.room], "entity_ids": [skew.entity]}
    change = json.dumps([{"room_id": str(skew.room), "entity_id": str(skew.entity), "room_state": "MUTED"}])
    statements: dict[str, dict[str, Any]] = {
        "get_participants_for_entities": {"entity_ids": [skew.entity]},
        "get_participants_for_room": {"room_id": skew.room},
        "get_participants_for_rooms": {"room_ids": [skew.room]},
        "get_rooms_for_participants": {"entity_ids": [skew.entity]},
        "is_room_participant": pair,
        "are_room_participants": pairs,
        "get_participant_user_state": pair,
        "get_participant_user_states": pairs,
        "update_participants": {"participants": change},
        "add_participants": {"room_id": skew.room, "entity_ids": [skew.entity]},
        "create_room_participants": {"room_id": skew.room, "entity_ids": [skew.entity]},
        "delete_participants": pairs,
        "remove_participant": pair,
    }
    for name, params in statements.items():
        await skew.check(SQL[name], **params)
