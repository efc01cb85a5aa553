"""Tasks: the store, the claims of workers, and what wakes them."""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from elizasql import (
    ArgumentError,
    ClosedError,
    Config,
    ConnectionLostError,
    DatabaseAdapter,
    DeadlineError,
    NotFoundError,
    Task,
    UnknownOutcomeError,
    _pool,
)
from elizasql import tasks as _tasks
from elizasql._listener import Listener
from elizasql._statements import SQL

from .conftest import MakeAdapter, Scene
from .locking import overtaken

START = datetime(2026, 1, 1, tzinfo=timezone.utc)
INJECTION = "'); DROP TABLE elizasql.tasks; -- $1 :id %s {} \\"


def at(seconds: int) -> datetime:
    return START + timedelta(seconds=seconds)


async def queue(db: DatabaseAdapter, *names: str, **fields: Any) -> list[UUID]:
    """Create tasks that are tagged "queue" and became ready one after the other, long ago."""
    return await db.create_tasks(
        [Task(**{"name": name, "tags": ["queue"], "due_at": at(i), **fields}) for i, name in enumerate(names)]
    )


async def end_lease(raw: asyncpg.Connection[Any], task: Task) -> None:
    """Let the time of a lease pass."""
    done = await raw.execute(
        "UPDATE elizasql.tasks SET ready_at = now() - interval '1 second' WHERE agent_id = $1 AND id = $2",
        task.agent_id,
        task.id,
    )
    assert done == "UPDATE 1"


def names(tasks: list[Task]) -> list[str | None]:
    return [task.name for task in tasks]


# --- create and get --------------------------------------------------------------------------------------------------


async def test_task_comes_back_with_every_field(db: DatabaseAdapter, agent_world: Scene) -> None:
    task = Task(
        id=uuid4(),
        name="REMIND",
        description="call Ann",
        room_id=agent_world.room,
        world_id=agent_world.world,
        entity_id=agent_world.entity,
        tags=["queue", "repeat"],
        metadata={"updateInterval": 1000, "nested": {"a": [1, None]}},
        created_at=START,
        updated_at=at(1),
        due_at=at(2),
        max_attempts=3,
    )
    before = copy.deepcopy(task)
    assert await db.create_task(task) == task.id
    assert task == before
    found = await db.get_task(task.id or "")
    task.agent_id, task.ready_at, task.attempts = db.agent_id, at(2), 0
    assert found == task


async def test_mapping_in_elizaos_form(db: DatabaseAdapter) -> None:
    entity = uuid4()
    id = await db.create_task({"name": "N", "entityId": str(entity), "dueAt": 1_000, "updatedAt": 2_000, "tags": []})
    found = await db.get_task(str(id))
    assert found is not None
    assert (found.entity_id, found.due_at) == (entity, datetime(1970, 1, 1, 0, 0, 1, tzinfo=timezone.utc))
    plain = found.to_dict()
    assert plain["dueAt"] == 1_000
    assert plain["updatedAt"] == 2_000
    assert plain["entityId"] == str(entity)
    again = Task.from_dict(plain)
    assert await db.create_tasks([again]) == [id]


async def test_defaults(db: DatabaseAdapter) -> None:
    found = await db.get_task(await db.create_task({"name": ""}))
    assert found is not None
    assert (found.name, found.description, found.tags, found.metadata) == ("", "", [], {})
    assert [found.room_id, found.world_id, found.entity_id, found.due_at, found.claim_token] == [None] * 5
    assert found.created_at == found.updated_at == found.ready_at
    assert (found.attempts, found.max_attempts) == (0, 5)


async def test_rooms_and_entities_need_not_exist(db: DatabaseAdapter) -> None:
    ids = [uuid4(), uuid4(), uuid4()]
    found = await db.get_task(await db.create_task(Task(name="x", room_id=ids[0], world_id=ids[1], entity_id=ids[2])))
    assert found is not None
    assert [found.room_id, found.world_id, found.entity_id] == ids


async def test_second_create_leaves_the_first(db: DatabaseAdapter) -> None:
    id = await db.create_task(Task(name="first"))
    assert await db.create_tasks([{"id": id, "name": "second"}, {"id": id, "name": "third"}]) == [id, id]
    assert names(await db.get_tasks()) == ["first"]


async def test_batch_keeps_its_order_and_takes_one_round_trip(db: DatabaseAdapter, round_trips: list[str]) -> None:
    ids = await db.create_tasks([{"name": f"{i}"} for i in range(100)])
    assert len(round_trips) == 1
    assert [task.id for task in await db.get_tasks()] == ids
    wanted = [ids[7], uuid4(), ids[3], ids[7]]
    assert [task.id for task in await db.get_tasks_by_ids(wanted)] == [ids[7], ids[3]]
    assert len(round_trips) == 3


async def test_batch_of_several_chunks_keeps_its_order(make_db: MakeAdapter) -> None:
    """Whatever the ids: the chunks go by them, the times do not."""
    db = await make_db(batch_size=5)
    batch = [Task(id=uuid4(), name=f"{i}", tags=["queue"]) for i in range(23)]
    later = [Task(id=uuid4(), name=f"{i}", tags=["queue"]) for i in range(23, 40)]
    async with db.transaction() as tx:
        assert await tx.create_tasks(batch) == [task.id for task in batch]
        assert await tx.create_tasks(later) == [task.id for task in later]
    wanted = [f"{i}" for i in range(40)]
    assert names(await db.get_tasks()) == wanted
    assert names(await db.claim_tasks(50)) == wanted


async def test_empty_input_costs_nothing(db: DatabaseAdapter, round_trips: list[str]) -> None:
    assert await db.create_tasks([]) == await db.get_tasks_by_ids([]) == []
    assert await db.delete_tasks([]) == 0
    await db.update_tasks([])
    assert await db.claim_tasks(0) == await db.claim_tasks(names=[]) == []
    assert round_trips == []


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({}, "name is missing"),
        ({"name": None}, "name is missing"),
        ({"name": 1}, "name must be a string"),
        ({"name": "x", "tags": "queue,repeat", "metadata": []}, "metadata must be a mapping"),
        ({"name": "x", "tags": [1]}, "tags must be a string"),
        ({"name": "x", "roomId": "room"}, "room_id must be a UUID"),
        ({"name": "x", "dueAt": "soon"}, "due_at is not a time"),
        ({"name": "x", "max_attempts": 0}, "max_attempts"),
        ({"name": "x", "max_attempts": 2**31}, "max_attempts"),
        ({"name": "x", "agentId": "00000000-0000-0000-0000-000000000001"}, "belongs to agent"),
        ({"name": "x", "metadata": {"f": print}}, "Task at position 1 is not JSON"),
        ({"name": "x", "queue": True}, "no field 'queue'"),
    ],
)
async def test_bad_task_sends_nothing(
    db: DatabaseAdapter, round_trips: list[str], task: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        await db.create_tasks([{"name": "good"}, task])
    assert round_trips == []


async def test_the_error_about_attempts_names_the_position_also_of_an_id_that_comes_again(
    db: DatabaseAdapter, round_trips: list[str]
) -> None:
    id = uuid4()
    for call in (db.create_tasks, db.update_tasks):
        with pytest.raises(ArgumentError, match="Task at position 1: max_attempts"):
            await call([{"id": id, "name": "x"}, {"id": id, "name": "x", "max_attempts": 0}])
    assert round_trips == []


async def test_text_is_stored_as_it_is(db: DatabaseAdapter) -> None:
    for text in (INJECTION, "C:\\dir \\d+ \\u12", "ünïcode 🙂", "%_", "x" * 1024):
        id = await db.create_task(Task(name=text, description=text, tags=[text, "queue"], metadata={text: text}))
        found = await db.get_tasks_by_name(text)
        assert [task.id for task in found] == [id]
        assert (found[0].description, found[0].metadata) == (text, {text: text})
        assert [task.id for task in await db.get_tasks(tags=[text])] == [id]
        assert [task.id for task in await db.claim_tasks(names=[text], tags=[text])] == [id]


async def test_text_that_cannot_be_stored_is_replaced(db: DatabaseAdapter) -> None:
    id = await db.create_task(Task(name="a\x00b", tags=["\ud800"], metadata={"k\x00": "\udfff"}))
    found = await db.get_task(id)
    assert found is not None
    assert (found.name, found.tags, found.metadata) == ("a\ufffdb", ["\ufffd"], {"k\ufffd": "\ufffd"})
    assert [task.id for task in await db.get_tasks_by_name("a\x00b")] == [id]
    assert [task.id for task in await db.get_tasks(tags=["\ud800"])] == [id]


async def test_a_tag_may_be_longer_than_an_index_entry(db: DatabaseAdapter) -> None:
    tag = "".join(chr(0x4E00 + i % 5000) for i in range(50_000))
    id = await db.create_task(Task(name="x", tags=[tag]))
    assert [task.id for task in await db.get_tasks(tags=[tag])] == [id]


# --- lists -----------------------------------------------------------------------------------------------------------


async def test_filters_combine(db: DatabaseAdapter, round_trips: list[str]) -> None:
    rooms, entities, worlds = [uuid4(), uuid4()], [uuid4(), uuid4()], [uuid4(), uuid4()]
    tags = [[], ["a"], ["b"], ["a", "b"], ["b", "a", "c"]]
    rows = [
        Task(name="t", room_id=room, entity_id=entity, world_id=world, tags=marks, created_at=at(i % 5))
        for i, (room, entity, world, marks) in enumerate(
            (r, e, w, t) for r in rooms for e in entities for w in worlds for t in tags
        )
    ]
    for row, id in zip(rows, await db.create_tasks(rows), strict=True):
        row.id = id
    ordered = sorted(rows, key=lambda row: (row.created_at, row.id.int if row.id else 0))
    for room in (None, rooms[0]):
        for entity in (None, entities[1]):
            for world in (None, worlds[0]):
                for marks in (None, [], ["a"], ["a", "b"], ["c", "a"], ["a", "nobody"]):
                    expected = [
                        row.id
                        for row in ordered
                        if (room is None or row.room_id == room)
                        and (entity is None or row.entity_id == entity)
                        and (world is None or row.world_id == world)
                        and set(marks or []) <= set(row.tags or [])
                    ]
                    del round_trips[:]
                    found = await db.get_tasks(room_id=room, entity_id=entity, world_id=world, tags=marks)
                    assert [task.id for task in found] == expected
                    page = await db.get_tasks(
                        room_id=room, entity_id=entity, world_id=world, tags=marks, count=2, offset=1
                    )
                    assert [task.id for task in page] == expected[1:3]
                    assert len(round_trips) == 2


async def test_pages_of_tags_are_the_list_cut_up(db: DatabaseAdapter) -> None:
    """Whether the oldest tasks have the tag, only later ones, or so few that no page is full."""
    rows = [
        Task(name=f"{n}", tags=["all", *(["late"] if n >= 150 else []), *(["rare"] if n % 40 == 7 else [])])
        for n in range(200)
    ]
    ids = await db.create_tasks(rows)
    for tag in ("all", "late", "rare", "none"):
        wanted = [id for id, row in zip(ids, rows, strict=True) if tag in (row.tags or [])]
        assert [task.id for task in await db.get_tasks(tags=tag)] == wanted
        for count in (1, 3, 10, 250, 2**63 - 1):
            for offset in (0, 1, 4, 49, 150, 2**62):
                page = await db.get_tasks(tags=tag, count=count, offset=offset)
                assert [task.id for task in page] == wanted[offset : offset + count], (tag, count, offset)


async def test_every_list_is_oldest_first(db: DatabaseAdapter) -> None:
    """And by id where the times are equal; here the ids go the other way."""
    first, second, third, last = sorted(uuid4() for _ in range(4))
    place: dict[str, Any] = {"room_id": uuid4(), "world_id": uuid4(), "entity_id": uuid4()}
    times = {last: at(1), third: at(3), second: at(2), first: at(3)}
    await db.create_tasks([Task(id=id, name="n", tags=["t"], created_at=time, **place) for id, time in times.items()])
    chosen: list[dict[str, Any]] = [{}, {"tags": "t"}, *({name: id} for name, id in place.items())]
    for found in [await db.get_tasks_by_name("n"), *[await db.get_tasks(**each) for each in chosen]]:
        assert [task.id for task in found] == [last, second, first, third]


async def test_list_arguments(db: DatabaseAdapter, round_trips: list[str]) -> None:
    await queue(db, "a", "b", "c")
    assert names(await db.get_tasks(agent_ids=[db.agent_id], limit=2)) == ["a", "b"]
    assert names(await db.get_tasks(tags="queue", limit=1, count=1)) == ["a"]
    assert await db.get_tasks(count=0) == await db.get_tasks(agent_ids=[]) == []
    assert names(await db.get_tasks_by_name("b", limit=1)) == ["b"]
    assert await db.get_tasks_by_name("b", offset=1) == []
    del round_trips[:]
    bad: dict[str, Any]
    for bad in (
        {"agent_ids": [uuid4()]},
        {"count": 1, "limit": 2},
        {"count": -1},
        {"offset": -1},
        {"tags": [1]},
        {"tags": 5},
        {"tags": {"a": 1}},
        {"room_id": "x"},
    ):
        with pytest.raises(ArgumentError):
            await db.get_tasks(**bad)
    assert round_trips == []


# --- change and delete -----------------------------------------------------------------------------------------------


async def test_update_changes_what_is_given(db: DatabaseAdapter) -> None:
    room = uuid4()
    id = await db.create_task(
        Task(name="n", description="d", room_id=room, tags=["queue"], metadata={"a": 1, "b": 2}, created_at=START)
    )
    assert await db.update_task(id, {"metadata": {"a": 3}, "entityId": str(room)}) is True
    task = await db.get_task(id)
    assert task is not None
    assert (task.name, task.description, task.room_id, task.tags) == ("n", "d", room, ["queue"])
    assert (task.metadata, task.entity_id) == ({"a": 3}, room)
    assert task.created_at == START
    assert task.updated_at
    assert task.updated_at > START
    assert await db.update_task(id, {"roomId": None, "description": None, "tags": None, "metadata": None}) is True
    task = await db.get_task(id)
    assert task is not None
    assert (task.name, task.description, task.room_id, task.tags, task.metadata) == ("n", "", None, [], {})
    # A model that was read may go back: what only claims change is left as it is.
    task.name, task.attempts, task.claim_token, task.error = "m", 4, uuid4(), "?"
    assert await db.update_task(id, task) is True
    found = await db.get_task(id)
    assert found is not None
    assert (found.name, found.attempts, found.claim_token, found.error) == ("m", 0, None, None)


@pytest.mark.parametrize("update", ["update_task", "update_pending_task"])
async def test_each_field_is_changed_alone(db: DatabaseAdapter, update: str) -> None:
    (id,) = await queue(db, "n")

    async def change(field: str, given: Any, wanted: Any) -> None:
        before = await db.get_task(id)
        assert await getattr(db, update)(id, {field: given}) is True
        after = await db.get_task(id)
        assert before is not None and before.updated_at and after is not None and after.updated_at
        assert after.updated_at > before.updated_at
        ready_at = wanted if field == "due_at" else before.ready_at
        assert after == replace(before, **{field: wanted, "ready_at": ready_at, "updated_at": after.updated_at})

    places = ["room_id", "world_id", "entity_id"]
    for field in places:
        await change(field, place := uuid4(), place)
    for field, value in {"name": "m", "description": "d", "metadata": {"a": 1}, "max_attempts": 3}.items():
        await change(field, value, value)
    await change("due_at", at(99), at(99))
    await change("tags", ["queue", "t"], ["queue", "t"])
    empty: dict[str, Any] = {**dict.fromkeys(places), "description": "", "metadata": {}, "tags": []}
    for field, value in empty.items():
        await change(field, None, value)


async def test_update_of_nothing_is_false(db: DatabaseAdapter) -> None:
    assert await db.update_task(uuid4(), {"name": "x"}) is False


async def test_plural_update_is_all_or_nothing(db: DatabaseAdapter, round_trips: list[str]) -> None:
    ids = await db.create_tasks([{"name": "a"}, {"name": "b"}])
    missing = uuid4()
    with pytest.raises(NotFoundError, match=str(missing)):
        await db.update_tasks([{"id": ids[0], "name": "x"}, {"id": missing, "name": "y"}])
    assert names(await db.get_tasks()) == ["a", "b"]
    del round_trips[:]
    await db.update_tasks([Task(id=ids[1], name="B"), {"id": str(ids[0]), "task": {"name": "A", "dueAt": 5}}])
    assert len(round_trips) == 1
    assert names(await db.get_tasks()) == ["A", "B"]
    await db.update_tasks([{"id": ids[0], "name": "1"}, {"id": ids[0], "description": "2"}])
    task = await db.get_task(ids[0])
    assert task is not None
    assert (task.name, task.description) == ("1", "2")


@pytest.mark.parametrize(
    "patch",
    [
        {"name": None},
        {"max_attempts": None},
        {"max_attempts": 0},
        {"tags": [None]},
        {"metadata": {"x": {1, 2}}},
        {"id": "00000000-0000-0000-0000-000000000009"},
        {"nam": "x"},
    ],
)
async def test_bad_update_sends_nothing(db: DatabaseAdapter, round_trips: list[str], patch: dict[str, Any]) -> None:
    id = await db.create_task({"name": "a"})
    del round_trips[:]
    for update in (db.update_task, db.update_pending_task):
        with pytest.raises(ArgumentError):
            await update(id, patch)
    with pytest.raises(ArgumentError, match="Task at position 1"):
        await db.update_tasks([{"id": uuid4(), "name": "b"}, {"id": id, "task": patch}])
    with pytest.raises(ArgumentError, match="position 0: expected id and task"):
        await db.update_tasks([{"id": id, "task": {}, "name": "x"}])
    with pytest.raises(ArgumentError, match="id is missing"):
        await db.update_tasks([{"name": "x"}])
    assert round_trips == []


async def test_delete(db: DatabaseAdapter, round_trips: list[str]) -> None:
    ids = await queue(db, "a", "b", "c")
    del round_trips[:]
    assert await db.delete_task(ids[0]) is True
    assert await db.delete_task(ids[0]) is False
    assert await db.delete_tasks([ids[1], ids[1], str(ids[2]), uuid4()]) == 2
    assert len(round_trips) == 3
    assert await db.get_tasks() == []


async def test_other_agents_tasks_are_out_of_reach(make_db: MakeAdapter) -> None:
    db, other = await make_db(), await make_db()
    room = uuid4()
    (id,) = await queue(other, "theirs", room_id=room)
    assert await db.get_task(id) is None
    assert await db.get_tasks() == await db.get_tasks(room_id=room) == await db.get_tasks(tags=["queue"]) == []
    assert await db.get_tasks_by_name("theirs") == await db.claim_tasks(9) == await db.claim_tasks(names="theirs") == []
    assert await db.update_task(id, {"name": "mine"}) is False
    assert await db.update_pending_task(id, {"name": "mine"}) is False
    assert await db.delete_task(id) is False
    (claimed,) = await other.claim_tasks()
    with pytest.raises(ArgumentError, match="belongs to agent"):
        await db.complete_task(claimed)
    foreign = {"id": id, "claim_token": claimed.claim_token}
    assert await db.complete_task(foreign) is await db.heartbeat_task(foreign) is False
    assert await db.release_task(foreign) is await db.fail_task(foreign, "x") is False
    # The same id is another task for another agent.
    assert await db.create_task({"id": id, "name": "mine"}) == id
    assert names(await db.get_tasks()) == ["mine"]
    assert names(await other.get_tasks()) == ["theirs"]


async def test_tasks_go_with_their_agent(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    db = await make_db()
    await queue(db, "a")
    await db.delete_agent(db.agent_id)
    assert await raw.fetchval("SELECT count(*) FROM elizasql.tasks WHERE agent_id = $1", db.agent_id) == 0


# --- pending tasks ---------------------------------------------------------------------------------------------------


async def test_pending_is_what_is_tagged_queue_and_unclaimed(db: DatabaseAdapter) -> None:
    (id,) = await queue(db, "a")
    other = await db.create_task({"name": "b", "tags": ["repeat"]})
    assert await db.update_pending_task(id, {"metadata": {"x": 1}}) is True
    assert await db.update_pending_task(id, {"tags": []}) is True
    assert await db.update_pending_task(id, {"name": "late"}) is False
    assert await db.update_pending_task(other, {"name": "c"}) is False
    assert await db.update_pending_task(uuid4(), {"name": "c"}) is False
    assert names(await db.get_tasks_by_ids([id, other])) == ["a", "b"]
    await db.update_task(id, {"tags": ["queue"]})
    (claimed,) = await db.claim_tasks()
    assert await db.update_pending_task(id, {"name": "late"}) is False
    await db.release_task(claimed)
    assert await db.update_pending_task(id, {"name": "late"}) is True


async def test_an_ended_claim_is_lost_to_who_takes_the_tag_away(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any]
) -> None:
    await queue(db, "a", "b")
    taken, edited = await db.claim_tasks(2)
    await end_lease(raw, taken)
    await end_lease(raw, edited)
    assert await db.update_pending_task(taken.id or "", {"tags": ["running"]}) is True
    assert await db.update_pending_task(edited.id or "", {"tags": ["queue", "x"], "description": "d"}) is True
    assert await db.heartbeat_task(taken) is await db.complete_task(taken) is False
    assert names(await db.get_tasks(tags=["running"])) == ["a"]
    # Nobody took this one.
    assert await db.update_pending_task(edited.id or "", {"description": "e"}) is True
    assert await db.complete_task(edited) is True


async def test_racing_updates_of_a_pending_task_have_one_winner(make_db: MakeAdapter) -> None:
    adapters = [await make_db()]
    adapters += [await make_db(adapters[0].agent_id) for _ in range(3)]
    for _ in range(10):
        (id,) = await queue(adapters[0], "a")
        won = await asyncio.gather(
            *(db.update_pending_task(id, {"tags": ["running"], "description": f"{i}"}) for i, db in enumerate(adapters))
        )
        assert sorted(won) == [False, False, False, True]
        task = await adapters[0].get_task(id)
        assert task is not None
        assert task.description == f"{won.index(True)}"


# --- claims ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_names", [False, True])
async def test_claim_takes_the_ready_ones_in_order(db: DatabaseAdapter, round_trips: list[str], by_names: bool) -> None:
    chosen: dict[str, Any] = {"names": ["a", "b", "c", "later", "choice"]} if by_names else {}
    await queue(db, "c", "b", "a")
    await db.create_tasks(
        [
            {"name": "later", "tags": ["queue"], "due_at": datetime(2100, 1, 1, tzinfo=timezone.utc)},
            {"name": "choice", "tags": ["AWAITING_CHOICE"]},
        ]
    )
    del round_trips[:]
    claimed = await db.claim_tasks(2, lease=60, worker="w1", **chosen)
    assert len(round_trips) == 1
    assert names(claimed) == ["c", "b"]
    assert {task.claimed_by for task in claimed} == {"w1"}
    assert [task.attempts for task in claimed] == [1, 1]
    assert len({task.claim_token for task in claimed} - {None}) == 2
    assert await db.get_tasks_by_ids([task.id or "" for task in claimed]) == claimed
    assert names(await db.claim_tasks(9, **chosen)) == ["a"]
    assert await db.claim_tasks(9, **chosen) == []


@pytest.mark.parametrize("by_names", [False, True])
async def test_claim_filters(db: DatabaseAdapter, by_names: bool) -> None:
    await queue(db, "a", "b", "a")
    await queue(db, "a", "c", tags=["queue", "gpu", "big"])
    chosen: dict[str, Any] = {"names": ["c", "a", "a"]} if by_names else {}
    assert names(await db.claim_tasks(9, tags=["gpu", "big"], **chosen)) == ["a", "c"]
    assert await db.claim_tasks(9, tags="small", **chosen) == []
    rest = await db.claim_tasks(9, **chosen)
    assert names(rest) == (["a", "a"] if by_names else ["a", "b", "a"])


async def test_claim_by_names_keeps_the_order_over_names(db: DatabaseAdapter) -> None:
    await queue(db, *(f"n{i % 3}" for i in range(12)))
    assert names(await db.claim_tasks(4, names=["n2", "n1"])) == ["n1", "n2", "n1", "n2"]
    assert names(await db.claim_tasks(3, names="n0")) == ["n0", "n0", "n0"]


async def test_claim_by_names_takes_the_first_of_more_than_are_looked_up(db: DatabaseAdapter) -> None:
    one_name = await queue(db, *["a"] * 103)
    two_names = await queue(db, *("bc"[i % 2] for i in range(103)))
    for ids, chosen in ((one_name, ["a"]), (two_names, ["b", "c"])):
        assert [task.id for task in await db.claim_tasks(1, names=chosen)] == ids[:1]


async def test_bad_claims_send_nothing(db: DatabaseAdapter, round_trips: list[str]) -> None:
    bad: dict[str, Any]
    for bad in (
        {"limit": -1},
        {"limit": 1.5},
        {"limit": 10_001},
        {"lease": 0},
        {"lease": float("nan")},
        {"lease": timedelta(seconds=-1)},
        {"lease": "30"},
        {"worker": 5},
        {"names": [1]},
    ):
        with pytest.raises(ArgumentError):
            await db.claim_tasks(**bad)
    for call in (db.complete_task, db.heartbeat_task, db.release_task):
        for task in (Task(id=uuid4(), name="x"), {"id": uuid4()}, {"claim_token": uuid4()}):
            with pytest.raises(ArgumentError, match="not claimed"):
                await call(task)
    claimed = {"id": uuid4(), "claim_token": uuid4()}
    with pytest.raises(ArgumentError, match="error must be a string"):
        await db.fail_task(claimed, 5)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="base_delay"):
        await db.fail_task(claimed, "x", base_delay=-1)
    with pytest.raises(ArgumentError, match="retry"):
        await db.fail_task(claimed, "x", retry=None)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="again_in"):
        await db.complete_task(claimed, again_in=-1)
    assert round_trips == []


@pytest.mark.parametrize("by_names", [False, True])
async def test_each_task_goes_to_exactly_one_worker(make_db: MakeAdapter, by_names: bool) -> None:
    adapters = [await make_db()]
    adapters += [await make_db(adapters[0].agent_id) for _ in range(3)]
    created = await queue(adapters[0], *(f"n{i % 5}" for i in range(200)))

    async def work(number: int) -> list[UUID]:
        done = []
        chosen: dict[str, Any] = {"names": [f"n{i}" for i in range(5)]} if by_names else {}
        while tasks := await adapters[number % 4].claim_tasks(
            1 + number,
            lease=600,
            worker=f"{number}",
            **chosen,
        ):
            done += [task.id for task in tasks if task.id]
        return done

    done = await asyncio.gather(*(work(number) for number in range(8)))
    assert sorted(id for ids in done for id in ids) == sorted(created)
    tasks = await adapters[0].get_tasks()
    assert {task.attempts for task in tasks} == {1}
    assert all(task.id in done[int(task.claimed_by or "")] for task in tasks)


async def test_claim_steps_over_locked_rows(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    ids = await queue(db, *"abcd")
    async with raw.transaction():
        await raw.execute(
            "SELECT FROM elizasql.tasks WHERE agent_id = $1 AND id = ANY($2) FOR UPDATE", db.agent_id, ids[:2]
        )
        assert names(await db.claim_tasks(1)) == ["c"]
        assert names(await db.claim_tasks(1, names=["a", "b", "d"])) == ["d"]
        assert await db.claim_tasks() == []
    assert names(await db.claim_tasks(9)) == ["a", "b"]


async def test_workers_of_many_names_do_not_hide_tasks_from_each_other(make_db: MakeAdapter) -> None:
    """A worker locks what it takes, and not what it only looked at."""
    db = await make_db()
    other = await make_db(db.agent_id)
    await queue(db, "a", "b")
    async with db.transaction() as tx:
        assert names(await tx.claim_tasks(1, names=["a", "b"])) == ["a"]
        assert names(await other.claim_tasks(1, names=["a", "b"])) == ["b"]


async def test_a_claim_by_names_steps_over_many_locked_tasks(make_db: MakeAdapter) -> None:
    db = await make_db()
    other = await make_db(db.agent_id)
    ids = await db.create_tasks([{"name": "ab"[i % 2], "tags": ["queue"]} for i in range(300)])
    async with db.transaction() as tx:
        assert len(await tx.claim_tasks(150, names=["a", "b"])) == 150
        assert [task.id for task in await other.claim_tasks(2, names=["a", "b"])] == ids[150:152]
        # Ten of these are among the candidates, the others behind them.
        assert [task.id for task in await other.claim_tasks(60, names=["a", "b"])] == ids[152:212]
        assert [task.id for task in await other.claim_tasks(120, names="a")] == ids[212::2]
        assert [task.id for task in await other.claim_tasks(500, names=["b", "c"])] == ids[213::2]


async def test_behind_many_locked_tasks_only_what_fits_is_claimed(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any]
) -> None:
    db, stranger = await make_db(), await make_db()
    other = await make_db(db.agent_id)
    tags, never = ["queue", "t"], datetime(2100, 1, 1, tzinfo=timezone.utc)
    async with db.transaction() as tx:
        await queue(db, *["a"] * 101, tags=tags)
        assert len(await tx.claim_tasks(101, names="a")) == 101
        await queue(db, "b", tags=tags, due_at=at(200))
        await queue(db, "a", tags=["t"], due_at=at(200))
        await queue(db, "a", tags=["queue"], due_at=at(200))
        await queue(db, "a", tags=tags, due_at=never)
        await queue(stranger, "a", tags=tags, due_at=at(200))
        exhausted, moved, fit = await queue(db, *["a"] * 3, tags=tags, due_at=at(200))
        await raw.execute("UPDATE elizasql.tasks SET attempts = max_attempts WHERE id = $1", exhausted)
        await raw.execute("UPDATE elizasql.tasks SET due_at = $2 WHERE id = $1", moved, never)
        await raw.execute("UPDATE elizasql.tasks SET ready_at = $2 WHERE id = $1", fit, at(300))
        claimed = [await other.claim_tasks(1, names="a", tags="t") for _ in range(2)]
        assert [[task.id for task in each] for each in claimed] == [[fit], []]


async def test_what_no_longer_fits_when_a_claim_by_names_has_its_row_stays(
    make_db: MakeAdapter, own_database: str
) -> None:
    """All that fit are looked up first, then locked one by one: here the claim is held up with the first in hand."""
    db = await make_db(dsn=own_database)
    raw = await asyncpg.connect(own_database)
    later = "'2100-01-01'"
    changes = [
        "description = 'new'",
        "name = 'b'",
        "tags = '{t}'",
        "tags = '{queue}'",
        "attempts = max_attempts",
        f"due_at = {later}",
        f"ready_at = {later}, attempts = 1, claim_token = gen_random_uuid()",  # another worker has it
    ]
    first, *others, last = await queue(db, *["a"] * (len(changes) + 2), tags=["queue", "t"])
    await raw.execute(
        f"""CREATE FUNCTION elizasql.hold_up() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NEW; END';
        CREATE TRIGGER hold_up BEFORE UPDATE ON elizasql.tasks
        FOR EACH ROW WHEN (old.id = '{first}') EXECUTE FUNCTION elizasql.hold_up()"""
    )
    change = ";".join(
        f"UPDATE elizasql.tasks SET {change} WHERE id = '{id}'" for id, change in zip(others, changes, strict=True)
    )
    claim = db.claim_tasks(9, names="a", tags="t")
    claimed = await overtaken(raw, claim, ("SELECT pg_advisory_xact_lock(1)",), (change,))
    await raw.close()
    assert [(task.id, task.description) for task in claimed] == [(first, ""), (others[0], "new"), (last, "")]
    assert db._meter.retries == 0


async def test_workers_wait_for_what_they_may_take(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    """By the time from which a task is ready, and by the one at which it is due, where that is later."""
    db, stranger = await make_db(), await make_db()
    hours = [datetime.now(timezone.utc) + timedelta(hours=n) for n in range(4)]
    tags = ["queue", "t"]

    async def put(ready_at: datetime, due_at: datetime | None, on: DatabaseAdapter = db, **fields: Any) -> UUID:
        (id,) = await on.create_tasks([Task(**{"name": "a", "tags": tags, **fields})])
        await raw.execute("UPDATE elizasql.tasks SET (ready_at, due_at) = ($2, $3) WHERE id = $1", id, ready_at, due_at)
        return id

    async def wait(**chosen: Any) -> int:
        asked = {"agent_id": db.agent_id, "names": None, "tags": None, **chosen}
        seconds: float = await db._executor.fetch_value(SQL["get_seconds_to_next_task"], **asked)
        return round(seconds / 3600)

    for ready_at, due_at in ((hours[1], None), (START, hours[1])):
        await put(ready_at, due_at, name="b")
        await put(ready_at, due_at, tags=["queue"])
        await put(ready_at, due_at, tags=["t"])
        await put(ready_at, due_at, on=stranger)
        exhausted = await put(ready_at, due_at)
        await raw.execute("UPDATE elizasql.tasks SET attempts = max_attempts WHERE id = $1", exhausted)
    await put(START, None)
    await put(START - timedelta(hours=1), START)
    await put(hours[1], hours[3])
    await put(hours[3], hours[1])
    for ready_at, due_at in ((hours[2], None), (START, hours[2])):
        id = await put(ready_at, due_at)
        assert await wait(names=["a"], tags=["t"]) == 2
        await db.delete_task(id)
        assert await wait(names=["a"], tags=["t"]) == 3
        assert [await wait(names=["a"]), await wait(tags=["t"]), await wait()] == [1, 1, 1]


async def test_an_ended_lease_hands_the_task_over(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    db = await make_db()
    other = await make_db(db.agent_id)
    await queue(db, "a")
    (mine,) = await db.claim_tasks(worker="mine")
    assert await other.claim_tasks() == []
    await end_lease(raw, mine)
    taken = await asyncio.gather(*(adapter.claim_tasks(worker="theirs") for adapter in (db, other, db, other)))
    (theirs,) = [task for tasks in taken for task in tasks]
    assert (theirs.id, theirs.attempts, theirs.claimed_by) == (mine.id, 2, "theirs")
    assert theirs.claim_token != mine.claim_token
    # The first worker comes back too late, and can do no harm.
    assert await db.heartbeat_task(mine) is await db.complete_task(mine) is await db.fail_task(mine, "x") is False
    assert await db.release_task(mine) is await db.complete_task(mine, again_in=1) is False
    assert await db.get_tasks() == [theirs]
    assert await other.complete_task(theirs) is True
    assert await other.complete_task(theirs) is await other.heartbeat_task(theirs) is False
    assert await db.get_tasks() == []


async def test_heartbeat_extends_the_lease(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    await queue(db, "a")
    (task,) = await db.claim_tasks(lease=1)
    assert await db.heartbeat_task(task, timedelta(hours=1)) is True
    extended = await db.get_task(task.id or "")
    assert extended is not None
    assert task.ready_at
    assert extended.ready_at
    assert extended.ready_at - task.ready_at > timedelta(minutes=59)
    assert extended.claim_token == task.claim_token
    assert extended.attempts == 1
    # An ended lease that nobody took over is still the worker's.
    await end_lease(raw, task)
    assert await db.heartbeat_task(task) is True
    assert await db.claim_tasks() == []


async def test_completed_task_is_gone_or_due_again(db: DatabaseAdapter) -> None:
    await queue(db, "once", "again")
    once, again = await db.claim_tasks(2)
    assert await db.complete_task(once) is True
    assert await db.fail_task(again, "not yet", base_delay=0) is True
    (again,) = await db.claim_tasks()
    assert again.error == "not yet"
    assert await db.complete_task(again, again_in=3600) is True
    (task,) = await db.get_tasks()
    assert (task.name, task.attempts, task.claim_token, task.error) == ("again", 0, None, None)
    assert task.due_at == task.ready_at
    assert again.updated_at
    assert task.updated_at
    assert task.due_at
    assert task.due_at - task.updated_at == timedelta(hours=1)
    assert await db.claim_tasks() == []
    await db.update_task(task.id or "", {"due_at": 0})
    (task,) = await db.claim_tasks()
    assert await db.complete_task(task, again_in=0) is True
    assert names(await db.claim_tasks()) == ["again"]


async def test_a_due_time_that_came_during_the_claim_counts_more_than_a_repetition(db: DatabaseAdapter) -> None:
    await queue(db, "later", "sooner", "past")
    due = {"later": datetime(2100, 1, 1, tzinfo=timezone.utc), "past": START}
    for task in await db.claim_tasks(3):
        if task.name in due:
            await db.update_task(task.id or "", {"due_at": due[task.name]})
        assert await db.complete_task(task, again_in=3600) is True
    found = {task.name: task for task in await db.get_tasks()}
    assert found["later"].due_at == found["later"].ready_at == due["later"]
    for name in ("sooner", "past"):
        task = found[name]
        assert task.due_at and task.updated_at
        assert task.due_at - task.updated_at == timedelta(hours=1)


async def test_released_task_is_as_before(db: DatabaseAdapter) -> None:
    await queue(db, "a", "b", max_attempts=1)
    (task,) = await db.claim_tasks()
    assert task.name == "a"
    assert await db.release_task(task) is True
    assert await db.release_task(task) is False
    # It goes behind those that have been waiting.
    first, second = await db.claim_tasks(9)
    assert (first.name, second.name, second.attempts) == ("b", "a", 1)
    assert await db.release_task(second, delay=3600) is True
    assert await db.claim_tasks() == []


async def test_released_task_does_not_come_before_it_is_due(db: DatabaseAdapter) -> None:
    await queue(db, "a")
    (task,) = await db.claim_tasks()
    due = datetime(2100, 1, 1, tzinfo=timezone.utc)
    await db.update_task(task.id or "", {"due_at": due})
    claimed = await db.get_task(task.id or "")
    assert claimed is not None
    assert (claimed.due_at, claimed.ready_at) == (due, task.ready_at)
    assert await db.heartbeat_task(task) is await db.release_task(task) is True
    released = await db.get_task(task.id or "")
    assert released is not None
    assert released.ready_at == due


async def test_failures_back_off_and_end(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    (id,) = await queue(db, "a", max_attempts=6)
    for attempt, pause in enumerate((200, 400, 800, 1000, 1000), 1):
        (task,) = await db.claim_tasks()
        assert task.attempts == attempt
        error = ValueError(f"no {attempt}")
        before = await raw.fetchval("SELECT now()")
        assert await db.fail_task(task, error, base_delay=200, max_delay=timedelta(seconds=1000)) is True
        after = await raw.fetchval("SELECT now()")
        failed = await db.get_task(id)
        assert failed is not None
        assert failed.ready_at
        assert pause <= (failed.ready_at - before).total_seconds()
        assert (failed.ready_at - after).total_seconds() <= pause * 1.25
        assert (failed.claim_token, failed.error) == (None, f"ValueError: no {attempt}")
        assert await db.claim_tasks() == []
        assert await db.update_task(id, {"due_at": attempt}) is True
    (task,) = await db.claim_tasks()
    assert await db.fail_task(task, "the end\x00") is True
    assert await db.update_task(id, {"due_at": 0}) is True
    assert await db.claim_tasks() == await db.claim_tasks(names="a") == []
    dead = await db.get_task(id)
    assert dead is not None
    assert (dead.attempts, dead.max_attempts, dead.error) == (6, 6, "the end\ufffd")
    assert await db.update_task(id, {"max_attempts": 7}) is True
    assert [task.attempts for task in await db.claim_tasks()] == [7]


@pytest.mark.parametrize("update", ["update_task", "update_pending_task"])
async def test_due_time_that_is_there_leaves_the_pause(db: DatabaseAdapter, update: str) -> None:
    """A task that was read and goes back, with other metadata, say, is not ready before the pause is over."""
    due = START + timedelta(microseconds=123_456)
    id = await db.create_task(Task(name="a", tags=["queue"], due_at=due))
    (claimed,) = await db.claim_tasks()
    assert await db.fail_task(claimed, "x", base_delay=3600) is True
    failed = await db.get_task(id)
    assert failed is not None
    forms: list[Any] = [
        {"due_at": due},
        {"dueAt": failed.to_dict()["dueAt"]},
        {"due_at": due.replace(microsecond=123_000)},
    ]
    for form in forms:
        assert await getattr(db, update)(id, {"metadata": {"n": 1}, **form}) is True
        found = await db.get_task(id)
        assert found is not None
        assert (found.due_at, found.ready_at) == (due, failed.ready_at), form
    # The next millisecond is another time.
    other = due.replace(microsecond=124_000)
    assert await getattr(db, update)(id, {"due_at": other}) is True
    found = await db.get_task(id)
    assert found is not None
    assert (found.due_at, found.ready_at) == (other, other)


async def test_no_due_time_where_none_is_leaves_the_pause(db: DatabaseAdapter) -> None:
    id = await db.create_task(Task(name="a", tags=["queue"]))
    (claimed,) = await db.claim_tasks()
    assert await db.fail_task(claimed, "x", base_delay=3600) is True
    failed = await db.get_task(id)
    assert await db.update_task(id, {"dueAt": None}) is True
    found = await db.get_task(id)
    assert failed is not None and found is not None
    assert (found.due_at, found.ready_at) == (None, failed.ready_at)


async def test_failed_task_does_not_come_before_it_is_due(db: DatabaseAdapter) -> None:
    await queue(db, "a")
    (task,) = await db.claim_tasks()
    due = datetime(2100, 1, 1, tzinfo=timezone.utc)
    await db.update_task(task.id or "", {"due_at": due})
    assert await db.fail_task(task, "x", base_delay=0) is True
    failed = await db.get_task(task.id or "")
    assert failed is not None
    assert failed.ready_at == due


@pytest.mark.parametrize("by_names", [False, True])
async def test_task_of_an_ended_lease_does_not_come_before_it_is_due(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any], by_names: bool
) -> None:
    await queue(db, "a", "b")
    (task,) = await db.claim_tasks()
    due = datetime(2100, 1, 1, tzinfo=timezone.utc)
    await db.update_task(task.id or "", {"due_at": due})
    await end_lease(raw, task)
    wanted = ["a", "b"] if by_names else None
    assert names(await db.claim_tasks(9, names=wanted)) == ["b"]
    await db.delete_tasks([task.id or "" for task in await db.get_tasks_by_name("b")])
    seconds = await db._until_next(1e12, {"names": wanted, "tags": None})
    assert abs(due.timestamp() - (await raw.fetchval("SELECT now()")).timestamp() - seconds) < 60
    # Who has the claim may still end it, and a time that has come is no obstacle.
    assert await db.heartbeat_task(task) is True
    await end_lease(raw, task)
    await db.update_task(task.id or "", {"due_at": START})
    assert names(await db.claim_tasks(9, names=wanted)) == ["a"]


@pytest.mark.parametrize("update", ["update_task", "update_pending_task"])
async def test_due_time_after_the_end_of_a_lease_is_no_lease(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any], update: str
) -> None:
    (id,) = await queue(db, "a")
    (task,) = await db.claim_tasks()
    await end_lease(raw, task)
    due = datetime(2100, 1, 1, tzinfo=timezone.utc)
    assert await getattr(db, update)(id, {"due_at": due}) is True
    assert await db.claim_tasks() == []
    assert await db.update_pending_task(id, {"description": "no worker has it"}) is True
    # Whoever waits for the later time is told of the sooner one.
    assert await notifications(raw, db, lambda: getattr(db, update)(id, {"due_at": START})) == 1
    (again,) = await db.claim_tasks()
    assert (again.id, again.attempts) == (id, 2)
    await end_lease(raw, again)
    assert await db.update_pending_task(id, {"due_at": due, "tags": []}) is True
    taken = await db.get_task(id)
    assert taken is not None
    assert (taken.claim_token, taken.ready_at) == (None, due)


async def test_waiting_worker_takes_a_task_of_an_ended_lease_when_it_is_due(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any]
) -> None:
    await queue(db, "a")
    (task,) = await db.claim_tasks()
    due = await raw.fetchval("SELECT now() + interval '0.5 seconds'")
    await db.update_task(task.id or "", {"due_at": due})
    await end_lease(raw, task)
    async with aclosing(db.wait_for_tasks(poll_interval=1000)) as tasks:
        again = await next_of(tasks)
    assert (again.id, again.attempts) == (task.id, 2)
    assert await raw.fetchval("SELECT now() >= $1", due)


async def test_the_longest_pause_is_no_overflow(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    await queue(db, "a", max_attempts=2**31 - 1)
    await raw.execute("UPDATE elizasql.tasks SET attempts = 2147483640 WHERE agent_id = $1", db.agent_id)
    (task,) = await db.claim_tasks()
    assert await db.fail_task(task, "x", base_delay=1e8, max_delay=9e8) is True


async def test_failure_without_retry_is_the_end(db: DatabaseAdapter) -> None:
    (id,) = await queue(db, "a")
    (task,) = await db.claim_tasks()
    assert await db.fail_task(task, "hopeless", retry=False) is True
    assert await db.fail_task(task, "again") is False
    dead = await db.get_task(id)
    assert dead is not None
    assert (dead.attempts, dead.error) == (5, "hopeless")
    await db.update_task(id, {"due_at": 0})
    assert await db.claim_tasks() == []


async def test_a_worker_that_dies_on_the_last_attempt_leaves_a_dead_task(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any]
) -> None:
    await queue(db, "poison", max_attempts=1)
    (task,) = await db.claim_tasks()
    await end_lease(raw, task)
    assert await db.claim_tasks() == []
    assert names(await db.get_tasks()) == ["poison"]
    assert await db.complete_task(task) is True


async def test_claim_of_a_rolled_back_transaction_is_none(db: DatabaseAdapter) -> None:
    await queue(db, "a")
    with pytest.raises(RuntimeError):
        async with db.transaction() as tx:
            (lost,) = await tx.claim_tasks()
            raise RuntimeError
    assert await db.heartbeat_task(lost) is False
    assert [task.attempts for task in await db.claim_tasks()] == [1]


# --- notifications ---------------------------------------------------------------------------------------------------


async def notifications(raw: asyncpg.Connection[Any], db: DatabaseAdapter, action: Callable[[], Awaitable[Any]]) -> int:
    """Count what arrives on the agent's channel because of an action."""
    channel = f"elizasql_tasks_{db.agent_id.hex}"
    heard: list[str] = []
    over = asyncio.Event()

    def hear(_: Any, __: int, ___: str, payload: object) -> None:
        heard.append(str(payload))
        if payload == "over":
            over.set()

    await raw.add_listener(channel, hear)
    await action()
    await raw.execute("SELECT pg_notify($1, 'over')", channel)
    await asyncio.wait_for(over.wait(), 30)
    await raw.remove_listener(channel, hear)
    assert set(heard[:-1]) <= {""}
    assert heard[-1] == "over"
    return len(heard) - 1


async def test_what_makes_a_task_ready_is_notified(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    async def count(action: Callable[[], Awaitable[Any]]) -> int:
        return await notifications(raw, db, action)

    times = itertools.count()

    async def claimed() -> Task:
        due = at(-next(times))  # another time than before ends the pause
        await db.update_tasks([Task(id=task.id, due_at=due) for task in await db.get_tasks(tags="queue")])
        return (await db.claim_tasks())[0]

    assert await count(lambda: queue(db, "a")) == 1
    # One transaction, one notification.
    assert await count(lambda: queue(db, *["b"] * 50)) == 1
    await db.delete_tasks([task.id or "" for task in await db.get_tasks_by_name("b")])
    idle = await db.create_task({"name": "idle", "tags": ["repeat"]})
    assert await count(lambda: db.create_task({"name": "idle", "tags": ["repeat"]})) == 0
    assert await count(lambda: db.update_task(idle, {"name": "x"})) == 0
    assert await count(lambda: db.update_task(idle, {"tags": ["queue"]})) == 1
    assert await count(lambda: db.update_task(idle, {"description": "y", "name": "x"})) == 0
    assert await count(lambda: db.update_task(idle, {"due_at": 0})) == 1
    # Workers choose by name and tags, also what another one has left behind.
    assert await count(lambda: db.update_task(idle, {"name": "y"})) == 1
    await db.claim_tasks(names="y")
    assert await count(lambda: db.update_task(idle, {"tags": ["queue", "gpu"]})) == 1
    assert await count(lambda: db.update_task(idle, {"name": "z"})) == 1
    await db.delete_task(idle)
    # What a worker does with its claim makes nothing ready, until it gives it back.
    assert await count(claimed) == 0
    (task,) = await db.get_tasks(tags="queue")
    assert await count(lambda: db.heartbeat_task(task)) == 0
    assert await count(lambda: db.release_task(task)) == 1
    task = await claimed()
    assert await count(lambda: db.fail_task(task, "x")) == 1
    task = await claimed()
    assert await count(lambda: db.complete_task(task, again_in=1)) == 1
    task = await claimed()
    assert await count(lambda: db.fail_task(task, "x", retry=False)) == 0
    assert await count(lambda: db.update_task(task.id or "", {"max_attempts": 9})) == 1
    task = await claimed()
    assert await count(lambda: db.complete_task(task)) == 0


async def listening(raw: asyncpg.Connection[Any], db: DatabaseAdapter) -> set[int]:
    """Give the server processes that listen for the agent's tasks."""
    rows = await raw.fetch(
        "SELECT pid FROM pg_stat_activity WHERE query LIKE '%LISTEN%' || $1 || '%' AND pid <> pg_backend_pid()",
        db.agent_id.hex,
    )
    return {row[0] for row in rows}


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async def ask() -> None:
        while not await condition():
            pass

    await asyncio.wait_for(ask(), 60)


async def next_of(tasks: AsyncIterator[Task]) -> Task:
    return await asyncio.wait_for(anext(tasks), 60)


@asynccontextmanager
async def waiting_for_tasks(db: DatabaseAdapter, **options: Any) -> AsyncIterator[asyncio.Task[Task]]:
    """Begin to wait for a task in the background."""
    async with aclosing(db.wait_for_tasks(**options)) as tasks:
        waiting = asyncio.create_task(next_of(tasks))
        try:
            yield waiting
        finally:
            waiting.cancel()
            await asyncio.wait([waiting])


async def test_waiting_worker_is_woken_by_a_new_task(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    await queue(db, "there already")
    async with aclosing(db.wait_for_tasks(poll_interval=1000, worker="w", lease=5)) as tasks:
        first = await next_of(tasks)
        assert (first.name, first.claimed_by, first.attempts) == ("there already", "w", 1)
        assert await db.complete_task(first) is True
        waiting = asyncio.create_task(next_of(tasks))
        await until(lambda: _is(len, listening(raw, db), 1))
        await queue(db, "new")
        assert (await waiting).name == "new"
    await until(lambda: _is(len, listening(raw, db), 0))


async def _is(measure: Callable[[Any], int], value: Awaitable[Any], wanted: int) -> bool:
    return measure(await value) == wanted


async def test_waiting_worker_takes_a_task_when_it_is_due(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    """No notification tells of it: the worker knows when the next one is due."""
    async with waiting_for_tasks(db, poll_interval=1000, names=["due"]) as waiting:
        await until(lambda: _is(len, listening(raw, db), 1))
        due = await raw.fetchval("SELECT now() + interval '0.3 seconds'")
        await queue(db, "other", due_at=START)
        await queue(db, "due", due_at=due)
        task = await waiting
        assert task.name == "due"
        assert task.due_at == due


async def test_waiting_worker_takes_over_an_ended_lease(db: DatabaseAdapter) -> None:
    await queue(db, "a")
    (lost,) = await db.claim_tasks(lease=0.3)
    async with aclosing(db.wait_for_tasks(poll_interval=1000)) as tasks:
        task = await next_of(tasks)
    assert (task.id, task.attempts) == (lost.id, 2)


async def test_lost_notification_only_delays(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Listener, "_hear", lambda *_: None)
    async with waiting_for_tasks(db, poll_interval=0.2) as waiting:
        await until(lambda: _is(len, listening(raw, db), 1))
        await queue(db, "silent")
        assert (await waiting).name == "silent"


async def test_lost_connection_is_made_again(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any], caplog: pytest.LogCaptureFixture
) -> None:
    async with waiting_for_tasks(db, poll_interval=1000) as waiting:
        await until(lambda: _is(len, listening(raw, db), 1))
        (first,) = await listening(raw, db)
        await raw.execute("SELECT pg_terminate_backend($1)", first)
        await until(lambda: _is(len, _without(listening(raw, db), first), 1))
        await queue(db, "after")
        assert (await waiting).name == "after"
    assert "notifications are interrupted" in caplog.text


async def _without(pids: Awaitable[set[int]], pid: int) -> set[int]:
    return await pids - {pid}


async def test_task_that_came_while_the_connection_was_down_is_found(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new connection is a reason to look: no poll is needed."""
    down = asyncio.Event()
    refused = asyncio.Event()
    real = _pool.connect

    async def connect(*args: Any) -> Any:
        if down.is_set():
            refused.set()
            raise ConnectionLostError("down")
        return await real(*args)

    monkeypatch.setattr(_pool, "connect", connect)
    async with waiting_for_tasks(db, poll_interval=1000) as waiting:
        await until(lambda: _is(len, listening(raw, db), 1))
        down.set()
        (pid,) = await listening(raw, db)
        await raw.execute("SELECT pg_terminate_backend($1)", pid)
        await asyncio.wait_for(refused.wait(), 60)
        await queue(db, "meanwhile")
        down.clear()
        assert (await waiting).name == "meanwhile"


async def test_a_look_that_fails_is_made_again_soon(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What woke the worker is used up, and nothing else will."""
    db = await make_db(failure_threshold=1, reset_timeout=0.2)
    other = await make_db(db.agent_id)
    monkeypatch.setattr(_tasks, "_AFTER_ERROR", 0.05)
    breaker = db._connections.breaker
    async with waiting_for_tasks(db, poll_interval=1000) as waiting:
        await until(lambda: _is(len, listening(raw, db), 1))
        breaker.fail(breaker.era)
        assert breaker.state == "open"
        await queue(other, "meanwhile")
        assert (await waiting).name == "meanwhile"


async def test_silent_connection_is_found_dead(
    db: DatabaseAdapter, dsn: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A connection that answers nothing more is left, although nobody said that it is lost."""
    made: list[asyncpg.Connection[Any]] = []
    real = _pool.connect

    async def connect(*args: Any) -> Any:
        connection = await real(*args)
        made.append(connection)
        if len(made) == 1:

            async def silent(*_: Any, timeout: float, **__: Any) -> None:
                raise asyncio.TimeoutError

            monkeypatch.setattr(type(connection), "fetchval", silent)
        else:
            monkeypatch.undo()
        return connection

    monkeypatch.setattr(_pool, "connect", connect)
    listener = Listener(dsn, db.config, "quiet", check_interval=0.01)
    try:
        await listener.wait(60)
        await listener.wait(60)
    finally:
        await listener.close()
    assert len(made) >= 2
    assert all(connection.is_closed() for connection in made)
    assert "notifications are interrupted" in caplog.text


async def test_pause_before_a_new_connection_begins_anew(
    dsn: str, db: DatabaseAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that is lost now and then does not keep the listener deaf for longer each time."""
    pauses: list[float] = []
    real = asyncio.sleep

    async def sleep(delay: float, *args: Any) -> Any:
        task = asyncio.current_task()
        if task is not None and task.get_name() == "elizasql-listener":
            pauses.append(delay)
            delay = 0
        return await real(delay, *args)

    made: list[asyncpg.Connection[Any]] = []
    connect_really = _pool.connect

    async def connect(*args: Any) -> Any:
        if len(pauses) < 3:
            raise ConnectionLostError("down")
        made.append(await connect_really(*args))
        return made[-1]

    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(_pool, "connect", connect)
    listener = Listener(dsn, db.config, "quiet")
    try:
        for _ in range(4):
            await listener.wait(60)
            made[-1].terminate()
    finally:
        await listener.close()
    assert pauses[:6] == [0.1, 0.2, 0.4, 0.1, 0.1, 0.1]


async def test_cancelled_worker_leaves_no_connection(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    async def work() -> None:
        async with aclosing(db.wait_for_tasks()) as tasks:
            async for task in tasks:
                await db.complete_task(task)

    worker = asyncio.create_task(work())
    await until(lambda: _is(len, listening(raw, db), 1))
    worker.cancel()
    with pytest.raises(asyncio.CancelledError):
        await worker
    assert db._listeners == set()
    await until(lambda: _is(len, listening(raw, db), 0))
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "elizasql-listener"]


async def test_closing_the_adapter_ends_the_wait(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    db = await make_db()
    waiting = asyncio.create_task(next_of(db.wait_for_tasks(poll_interval=1000)))
    await until(lambda: _is(len, listening(raw, db), 1))
    await db.close()
    with pytest.raises(ClosedError):
        await waiting
    await until(lambda: _is(len, listening(raw, db), 0))


async def test_waiting_goes_on_while_the_server_does_not_answer(
    db: DatabaseAdapter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await queue(db, "a")
    real = db.claim_tasks
    late = DeadlineError("it may have been claimed")
    late.retryable = False
    failures = [
        ConnectionLostError("gone"),
        UnknownOutcomeError("it may have been claimed"),
        late,
        ConnectionLostError("still gone"),
    ]

    async def claim(*args: Any, **kwargs: Any) -> list[Task]:
        if failures:
            raise failures.pop()
        return await real(*args, **kwargs)

    monkeypatch.setattr(db, "claim_tasks", claim)
    async with aclosing(db.wait_for_tasks(poll_interval=0.01)) as tasks:
        assert (await next_of(tasks)).name == "a"
    assert "still gone" in caplog.text
    assert not failures


async def test_other_errors_end_the_wait(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    bad: dict[str, Any]
    for bad in ({"lease": 0}, {"names": []}, {"poll_interval": 0}, {"worker": 1}):
        with pytest.raises(ArgumentError):
            await next_of(db.wait_for_tasks(**bad))
    async with db.transaction() as tx:
        with pytest.raises(ArgumentError, match="transaction"):
            await next_of(tx.wait_for_tasks())
    assert db._listeners == set()
    assert await listening(raw, db) == set()


async def test_several_workers_share_what_comes(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    db = await make_db()
    done: list[UUID | None] = []
    enough = asyncio.Event()

    async def work() -> None:
        async with aclosing(db.wait_for_tasks(poll_interval=1000)) as tasks:
            async for task in tasks:
                assert await db.complete_task(task) is True
                done.append(task.id)
                if len(done) == 60:
                    enough.set()

    workers = [asyncio.create_task(work()) for _ in range(3)]
    await until(lambda: _is(len, listening(raw, db), 3))
    created = [id for _ in range(20) for id in await queue(db, "a", "b", "c")]
    await asyncio.wait_for(enough.wait(), 60)
    for worker in workers:
        worker.cancel()
    await asyncio.gather(*workers, return_exceptions=True)
    assert sorted(id for id in done if id) == sorted(created)


# --- plans -----------------------------------------------------------------------------------------------------------


def literal(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, list):
        value = "{" + ",".join(map(str, value)) + "}"
    return "'" + str(value).replace("'", "''") + "'"


@asynccontextmanager
async def skewed(dsn: str, load: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    """Give a connection that is set as the pooled ones are and sees one large agent among many small ones.

    There, a plan that is best on average may read all that is the large agent's. Nothing of it stays.

    Args:
        dsn: The database.
        load: What fills the tables from `owned`: agent_id and n, which counts the rows of an agent.
    """
    session = await asyncpg.connect(dsn, server_settings=_pool.session_settings(Config.load(environ={})))
    transaction = session.transaction()
    await transaction.start()
    try:
        await session.execute(f"""
            CREATE TEMPORARY TABLE owned ON COMMIT DROP AS
            SELECT md5('agent' || a)::uuid AS agent_id, 1 AS n FROM generate_series(1, 1500) AS a
            UNION ALL
            SELECT '{LARGE}', n FROM generate_series(1, 8000) AS n;
            INSERT INTO elizasql.agents (id, name) SELECT DISTINCT agent_id, 'skew' FROM owned;
            {load}""")
        yield session
    finally:
        await transaction.rollback()
        await session.close()


LARGE = UUID(int=1)


async def plan(session: asyncpg.Connection[Any], name: str, params: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a statement with its generic plan, undo it, and give the scans of the plan that ran."""
    transaction = session.transaction()
    await transaction.start()
    await session.execute(f"PREPARE planned AS {SQL[name].sql}")
    params = {"agent_id": LARGE, "count": 20, **params}
    arguments = ", ".join(literal(params.get(parameter)) for parameter in SQL[name].params)
    row = await session.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) EXECUTE planned ({arguments})")
    await session.execute("DEALLOCATE planned")
    await transaction.rollback()
    scans: list[dict[str, Any]] = []

    def walk(node: dict[str, Any]) -> None:
        if node.get("Actual Loops") and ("Index Name" in node or node["Node Type"] == "Seq Scan"):
            scans.append(node)
        for child in node.get("Plans", ()):
            walk(child)

    walk(json.loads(row)[0]["Plan"])
    return scans


async def check_plan(
    session: asyncpg.Connection[Any], name: str, params: dict[str, Any], index: str, most: int
) -> None:
    """Refuse a plan that does not use the index, or reads more rows than that from any."""
    scans = await plan(session, name, params)
    shown = [(scan["Node Type"], scan.get("Index Name"), scan["Actual Rows"], scan.get("Filter")) for scan in scans]
    assert "Seq Scan" not in {scan["Node Type"] for scan in scans}, (name, shown)
    assert index in {scan["Index Name"] for scan in scans}, (name, shown)
    read = max(scan["Actual Rows"] + scan.get("Rows Removed by Filter", 0) for scan in scans)
    assert read <= most, (name, read, shown)


async def test_plans_read_what_they_give(dsn: str) -> None:
    one = {"id": LARGE, "claim_token": LARGE}
    load = """
        INSERT INTO elizasql.tasks (agent_id, id, name, room_id, world_id, entity_id, tags, created_at, ready_at)
        SELECT
            agent_id, md5('task' || n)::uuid, 'n' || n % 40, md5('room')::uuid, md5('world')::uuid, md5('entity')::uuid,
            ARRAY['queue', CASE WHEN n % 2000 = 7 THEN 'rare' ELSE 'common' END],
            now() - random() * interval '90 days', now() - random() * interval '90 days'
        FROM owned;
        ANALYZE elizasql.tasks;
    """
    async with skewed(dsn, load) as session:
        room, world, entity = [await session.fetchval("SELECT md5($1)::uuid", x) for x in ("room", "world", "entity")]
        for name, params, index, most in (
            ("get_tasks", {}, "tasks_created_at_idx", 20),
            ("get_tasks_by_tags", {"tags": ["rare"], "count": None}, "tasks_tags_idx", 4),
            ("get_tasks_by_tags", {"tags": ["queue", "rare"], "count": None}, "tasks_tags_idx", 4),
            ("get_tasks_by_tags", {"tags": ["rare"], "count": 2}, "tasks_tags_idx", 20),
            ("get_tasks_by_tags", {"tags": ["queue"]}, "tasks_created_at_idx", 20),
            ("get_tasks_by_tags", {"tags": ["queue", "common"], "skip": 30}, "tasks_created_at_idx", 60),
            ("get_tasks_by_name", {"name": "n7"}, "tasks_name_idx", 20),
            ("get_tasks_of_room", {"room_id": room}, "tasks_room_idx", 20),
            ("get_tasks_of_entity", {"entity_id": entity}, "tasks_entity_idx", 20),
            ("get_tasks_of_world", {"world_id": world, "tags": ["queue"]}, "tasks_world_idx", 20),
            ("get_tasks_by_ids", {"ids": [LARGE]}, "tasks_pkey", 0),
            ("claim_tasks", {"lease": 30}, "tasks_ready_idx", 20),
            ("claim_tasks_by_names", {"lease": 30, "names": ["n3", "n4"]}, "tasks_ready_name_idx", 120),
            ("get_seconds_to_next_task", {}, "tasks_ready_idx", 0),
            ("get_seconds_to_next_task", {}, "tasks_due_idx", 0),
            ("heartbeat_task", {**one, "lease": 1}, "tasks_pkey", 0),
            ("complete_task", one, "tasks_pkey", 0),
            ("repeat_task", {**one, "delay": 1}, "tasks_pkey", 0),
            ("release_task", {**one, "delay": 1}, "tasks_pkey", 0),
            ("fail_task", {**one, "retry": True}, "tasks_pkey", 0),
            ("update_tasks", {"tasks": f'[{{"id": "{LARGE}"}}]', "required": False}, "tasks_pkey", 0),
            ("update_pending_task", {**one, "task": "{}"}, "tasks_pkey", 0),
            ("delete_tasks", {"ids": [LARGE]}, "tasks_pkey", 0),
        ):
            await check_plan(session, name, params, index, most)


@pytest.mark.parametrize(
    ("call", "trips"),
    [
        (lambda db, task: db.get_task(task.id), 1),
        (lambda db, task: db.update_task(task.id, {"name": "x"}), 1),
        (lambda db, task: db.update_pending_task(task.id, {"name": "x"}), 1),
        (lambda db, task: db.heartbeat_task(task), 1),
        (lambda db, task: db.release_task(task), 1),
        (lambda db, task: db.fail_task(task, "x"), 1),
        (lambda db, task: db.complete_task(task), 1),
        (lambda db, task: db.complete_task(task, again_in=1), 1),
        (lambda db, task: db.claim_tasks(names="a"), 1),
        (lambda db, task: db.delete_task(task.id), 1),
    ],
)
async def test_round_trips(db: DatabaseAdapter, round_trips: list[str], call: Any, trips: int) -> None:
    await queue(db, "a", "a")
    (task,) = await db.claim_tasks()
    del round_trips[:]
    assert await call(db, task) is not None
    assert len(round_trips) == trips
