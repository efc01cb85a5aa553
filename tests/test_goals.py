"""Goals: what the agent wants to reach."""

from __future__ import annotations

import asyncio
import copy
from datetime import datetime, timedelta, timezone
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from elizasql import ArgumentError, DatabaseAdapter, ForeignKeyError, Goal, NotFoundError

from .conftest import MakeAdapter, Scene, make_scene
from .locking import overtaken
from .test_tasks import check_plan, skewed

START = datetime(2026, 1, 1, tzinfo=timezone.utc)
INJECTION = "'); DROP TABLE elizasql.goals; -- $1 :id %s {} \\"


def at(seconds: int) -> datetime:
    return START + timedelta(seconds=seconds)


def names(goals: list[Goal]) -> list[str | None]:
    return [goal.name for goal in goals]


async def test_goal_comes_back_with_every_field(db: DatabaseAdapter, agent_world: Scene) -> None:
    goal = Goal(
        id=uuid4(),
        room_id=agent_world.room,
        entity_id=agent_world.entity,
        name="win",
        status="FAILED",
        objectives=[
            {"id": "o1", "description": "try", "completed": True},
            {"id": "o2", "description": "try again", "completed": False, "note": {"x": [1]}},
        ],
        created_at=START,
        updated_at=at(1),
    )
    before = copy.deepcopy(goal)
    assert await db.create_goal(goal) == goal.id
    assert goal == before
    goal.agent_id = db.agent_id
    assert await db.get_goal(goal.id or "") == goal
    assert Goal.from_dict(goal.to_dict()) == goal


async def test_mapping_of_the_old_interface(db: DatabaseAdapter, agent_world: Scene) -> None:
    given = {
        "roomId": str(agent_world.room),
        "userId": str(agent_world.entity),
        "name": "n",
        "status": "IN_PROGRESS",
        "objectives": [{"description": "a", "completed": False}, {"description": ""}],
    }
    before = copy.deepcopy(given)
    goal = await db.get_goal(await db.create_goal(given))
    assert given == before
    assert goal is not None
    assert (goal.room_id, goal.entity_id) == (agent_world.room, agent_world.entity)
    assert goal.objectives is not None
    assert [{**step, "id": None} for step in goal.objectives] == [
        {"id": None, "description": "a", "completed": False},
        {"id": None, "description": "", "completed": False},
    ]
    assert len({UUID(step["id"]) for step in goal.objectives}) == 2


async def test_defaults(db: DatabaseAdapter) -> None:
    goal = await db.get_goal(await db.create_goal({"name": "n"}))
    assert goal is not None
    assert (goal.status, goal.objectives, goal.room_id, goal.entity_id) == ("IN_PROGRESS", [], None, None)
    assert goal.created_at == goal.updated_at


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        ({}, "name is missing"),
        ({"name": "n", "status": "done"}, "status must be one of IN_PROGRESS, DONE, FAILED"),
        ({"name": "n", "status": 1}, "status"),
        ({"name": "n", "objectives": {}}, "objectives must be a list"),
        ({"name": "n", "objectives": "a"}, "objectives must be a list"),
        ({"name": "n", "objectives": ["a"]}, r"objectives\[0\] must be a mapping"),
        ({"name": "n", "objectives": [{}]}, r"objectives\[0\].description must be a string"),
        ({"name": "n", "objectives": [{"description": 1}]}, r"objectives\[0\].description"),
        ({"name": "n", "objectives": [{"description": "a", "completed": 1}]}, r"objectives\[0\].completed"),
        ({"name": "n", "objectives": [{"description": "a", "id": ""}]}, r"objectives\[0\].id"),
        (
            {"name": "n", "objectives": [{"description": "a", "id": 1}, {"description": "b", "id": "1"}]},
            r"objectives\[1\].id is there twice",
        ),
        ({"name": "n", "objectives": [{"description": "a", "x": {1}}]}, "is not JSON"),
        ({"name": "n", "roomId": "room"}, "room_id must be a UUID"),
        ({"name": "n", "goal": 1}, "no field 'goal'"),
    ],
)
async def test_bad_goal_sends_nothing(
    db: DatabaseAdapter, round_trips: list[str], goal: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=f"Goal at position 1.*{message}"):
        await db.create_goals([{"name": "good"}, goal])
    assert round_trips == []


async def test_batch(db: DatabaseAdapter, agent_world: Scene, round_trips: list[str]) -> None:
    del round_trips[:]
    ids = await db.create_goals([{"name": f"{i}", "roomId": agent_world.room} for i in range(50)])
    assert len(round_trips) == 1
    assert [goal.id for goal in await db.get_goals(room_id=agent_world.room)] == ids
    wanted = [ids[7], uuid4(), ids[3], ids[7]]
    assert [goal.id for goal in await db.get_goals_by_ids(wanted)] == [ids[7], ids[3]]
    assert await db.create_goals([{"id": ids[0], "name": "second"}]) == [ids[0]]
    assert names(await db.get_goals_by_ids(ids[:1])) == ["0"]
    del round_trips[:]
    assert await db.create_goals([]) == await db.get_goals_by_ids([]) == []
    assert await db.delete_goals([]) == 0
    await db.update_goals([])
    assert round_trips == []


async def test_batch_of_several_chunks_keeps_its_order(make_db: MakeAdapter) -> None:
    """Whatever the ids: the chunks go by them, the times do not."""
    db = await make_db(batch_size=5)
    batch = [Goal(id=uuid4(), name=f"{i}") for i in range(23)]
    later = [Goal(id=uuid4(), name=f"{i}") for i in range(23, 40)]
    async with db.transaction() as tx:
        assert await tx.create_goals(batch) == [goal.id for goal in batch]
        assert await tx.create_goals(later) == [goal.id for goal in later]
    assert names(await db.get_goals()) == [f"{i}" for i in range(40)]


async def test_greatest_count_with_an_offset(db: DatabaseAdapter, agent_world: Scene) -> None:
    await db.create_goals(
        [{"name": f"{i}", "roomId": agent_world.room, "entityId": agent_world.entity} for i in range(3)]
    )
    most = 2**63 - 1
    for scope in ({}, {"room_id": agent_world.room}, {"entity_id": agent_world.entity}):
        assert names(await db.get_goals(count=most, offset=1, **scope)) == ["1", "2"]
        assert await db.get_goals(count=most, offset=most, **scope) == []


async def test_broken_reference_writes_nothing(db: DatabaseAdapter, agent_world: Scene) -> None:
    for bad in ({"room_id": uuid4()}, {"entity_id": uuid4()}):
        with pytest.raises(ForeignKeyError):
            await db.create_goals([{"name": "good", "roomId": agent_world.room}, {"name": "bad", **bad}])
    assert await db.get_goals() == []


async def test_text_policy(db: DatabaseAdapter) -> None:
    id = await db.create_goal(
        {"name": f"a\x00{INJECTION}", "objectives": [{"description": "\ud800\\d", "k\x00": "\udfff"}]}
    )
    goal = await db.get_goal(id)
    assert goal is not None
    assert goal.objectives is not None
    assert goal.name == f"a\ufffd{INJECTION}"
    assert goal.objectives[0]["description"] == "\ufffd\\d"
    assert goal.objectives[0]["k\ufffd"] == "\ufffd"


async def test_filters_combine(db: DatabaseAdapter, agent_world: Scene, round_trips: list[str]) -> None:
    other = await make_scene(db)
    rows = [
        Goal(name="g", room_id=room, entity_id=entity, status=status, created_at=at(i % 4))  # type: ignore[arg-type]
        for i, (room, entity, status) in enumerate(
            (room, entity, status)
            for room in (agent_world.room, other.room, None)
            for entity in (agent_world.entity, other.entity, None)
            for status in ("IN_PROGRESS", "DONE", "FAILED", "IN_PROGRESS")
        )
    ]
    for row, id in zip(rows, await db.create_goals(rows), strict=True):
        row.id = id
    ordered = sorted(rows, key=lambda row: (row.created_at, row.id.int if row.id else 0))
    for room in (None, agent_world.room, uuid4()):
        for entity in (None, other.entity):
            for only in (False, True):
                expected = [
                    row.id
                    for row in ordered
                    if (room is None or row.room_id == room)
                    and (entity is None or row.entity_id == entity)
                    and (not only or row.status == "IN_PROGRESS")
                ]
                del round_trips[:]
                found = await db.get_goals(room_id=room, entity_id=entity, only_in_progress=only)
                assert [goal.id for goal in found] == expected
                page = await db.get_goals(room_id=room, entity_id=entity, only_in_progress=only, count=3, offset=2)
                assert [goal.id for goal in page] == expected[2:5]
                assert len(round_trips) == 2
    assert await db.get_goals(count=0) == []
    assert len(await db.get_goals(limit=2)) == 2
    del round_trips[:]
    bad: dict[str, Any]
    for bad in ({"count": 1, "limit": 2}, {"count": -1}, {"only_in_progress": None}, {"room_id": 1}, {"offset": 0.5}):
        with pytest.raises(ArgumentError):
            await db.get_goals(**bad)
    assert round_trips == []


async def test_update_changes_what_is_given(db: DatabaseAdapter, agent_world: Scene, round_trips: list[str]) -> None:
    steps = [{"id": "1", "description": "a", "completed": False}]
    id = await db.create_goal(
        Goal(name="n", room_id=agent_world.room, entity_id=agent_world.entity, objectives=steps, created_at=START)
    )
    del round_trips[:]
    assert await db.update_goal({"id": id, "status": "DONE"}) is True
    assert len(round_trips) == 1
    goal = await db.get_goal(id)
    assert goal is not None
    assert (goal.name, goal.room_id, goal.entity_id) == ("n", agent_world.room, agent_world.entity)
    assert goal.objectives == steps
    assert (goal.status, goal.created_at) == ("DONE", START)
    assert goal.updated_at is not None
    assert goal.updated_at > START
    done = [{"id": "1", "description": "a", "completed": True}]
    assert await db.update_goal(Goal(id=id, objectives=done)) is True
    assert await db.update_goal({"id": id, "roomId": None, "userId": None}) is True
    goal = await db.get_goal(id)
    assert goal is not None
    assert (goal.room_id, goal.entity_id, goal.objectives, goal.status) == (None, None, done, "DONE")
    assert await db.update_goal({"id": id, "objectives": None}) is True
    goal = await db.get_goal(id)
    assert goal is not None
    assert goal.objectives == []
    assert await db.update_goal({"id": uuid4(), "name": "x"}) is False


async def test_update_status(db: DatabaseAdapter, round_trips: list[str]) -> None:
    id = await db.create_goal({"name": "n"})
    for status in ("DONE", "FAILED", "IN_PROGRESS"):
        del round_trips[:]
        assert await db.update_goal_status(id, status) is True
        assert len(round_trips) == 1
        assert len(await db.get_goals(only_in_progress=True)) == (status == "IN_PROGRESS")
    assert await db.update_goal_status(uuid4(), "DONE") is False
    del round_trips[:]
    with pytest.raises(ArgumentError, match="status"):
        await db.update_goal_status(id, "OPEN")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="status"):
        await db.update_goal_status(id, None)  # type: ignore[arg-type]
    assert round_trips == []


async def test_plural_update_is_all_or_nothing(db: DatabaseAdapter) -> None:
    ids = await db.create_goals([{"name": "a"}, {"name": "b"}])
    missing = uuid4()
    with pytest.raises(NotFoundError, match=str(missing)):
        await db.update_goals([{"id": ids[0], "name": "x"}, {"id": missing, "name": "y"}])
    with pytest.raises(ForeignKeyError):
        await db.update_goals([{"id": ids[0], "name": "x"}, {"id": ids[1], "roomId": uuid4()}])
    for bad in ({"id": ids[1], "name": None}, {"name": "x"}, {"id": ids[1], "objectives": [1]}):
        with pytest.raises(ArgumentError, match="position 1"):
            await db.update_goals([{"id": ids[0], "name": "x"}, bad])
    assert names(await db.get_goals()) == ["a", "b"]
    await db.update_goals([{"id": ids[1], "name": "B"}, {"id": ids[0], "name": "A"}])
    assert names(await db.get_goals()) == ["A", "B"]


async def test_concurrent_updates_of_different_fields_both_hold(make_db: MakeAdapter) -> None:
    db = await make_db()
    other = await make_db(db.agent_id)
    id = await db.create_goal({"name": "n"})
    for i in range(10):
        await asyncio.gather(
            db.update_goal({"id": id, "name": f"{i}"}),
            other.update_goal({"id": id, "objectives": [{"id": f"{i}", "description": "d"}]}),
        )
        goal = await db.get_goal(id)
        assert goal is not None
        assert goal.objectives is not None
        assert (goal.name, goal.objectives[0]["id"]) == (f"{i}", f"{i}")


async def test_delete(db: DatabaseAdapter, agent_world: Scene, round_trips: list[str]) -> None:
    ids = await db.create_goals([{"name": f"{i}", "roomId": agent_world.room if i % 2 else None} for i in range(10)])
    del round_trips[:]
    assert await db.delete_goal(ids[0]) is True
    assert await db.delete_goal(ids[0]) is False
    assert await db.delete_goals([ids[1], ids[1], ids[2], uuid4()]) == 2
    assert await db.delete_all_goals(agent_world.room) == 4
    assert await db.delete_all_goals(agent_world.room) == 0
    assert len(round_trips) == 5
    assert [goal.id for goal in await db.get_goals()] == [ids[4], ids[6], ids[8]]


async def test_a_goal_that_left_a_room_meanwhile_is_spared(
    db: DatabaseAdapter, agent_world: Scene, raw: asyncpg.Connection[Any]
) -> None:
    """It leaves in a transaction that ends while the deletion waits for it."""
    room = await db.create_room({"source": "x", "type": "DM"})
    ids = await db.create_goals([{"name": "x", "room_id": agent_world.room} for _ in range(3)])
    move = ("UPDATE elizasql.goals SET room_id = $3 WHERE agent_id = $1 AND id = $2", db.agent_id, ids[1], room)
    assert await overtaken(raw, db.delete_all_goals(agent_world.room), move, ("SELECT 1",)) == 2
    assert [goal.id for goal in await db.get_goals()] == [ids[1]]


async def test_goals_go_with_what_they_belong_to(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    db = await make_db()
    one, two = await make_scene(db), await make_scene(db)
    await db.create_goals(
        [
            {"name": "room", "roomId": one.room},
            {"name": "entity", "entityId": one.entity},
            {"name": "both", "roomId": two.room, "entityId": two.entity},
            {"name": "alone"},
        ]
    )
    await db.delete_room(one.room)
    assert names(await db.get_goals()) == ["entity", "both", "alone"]
    await raw.execute("DELETE FROM elizasql.entities WHERE agent_id = $1 AND id = $2", db.agent_id, one.entity)
    assert names(await db.get_goals()) == ["both", "alone"]
    await db.delete_agent(db.agent_id)
    assert await raw.fetchval("SELECT count(*) FROM elizasql.goals WHERE agent_id = $1", db.agent_id) == 0


async def test_other_agents_goals_are_out_of_reach(make_db: MakeAdapter) -> None:
    db, other = await make_db(), await make_db()
    scene = await make_scene(other)
    id = await other.create_goal({"name": "theirs", "roomId": scene.room, "entityId": scene.entity})
    assert await db.get_goal(id) is None
    assert await db.get_goals() == await db.get_goals(room_id=scene.room) == []
    assert await db.get_goals(entity_id=scene.entity) == []
    assert await db.update_goal({"id": id, "name": "mine"}) is await db.update_goal_status(id, "DONE") is False
    assert await db.delete_goal(id) is False
    assert await db.delete_all_goals(scene.room) == 0
    with pytest.raises(ForeignKeyError):
        await db.create_goal({"name": "mine", "roomId": scene.room})
    with pytest.raises(ArgumentError, match="belongs to agent"):
        await db.create_goal(Goal(name="mine", agent_id=other.agent_id))
    assert await db.create_goal({"id": id, "name": "mine"}) == id
    assert names(await other.get_goals()) == ["theirs"]


async def test_the_schema_knows_the_statuses(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> None:
    with pytest.raises(asyncpg.CheckViolationError) as caught:
        await raw.execute("INSERT INTO elizasql.goals (agent_id, name, status) VALUES ($1, 'n', 'OPEN')", db.agent_id)
    assert caught.value.constraint_name == "goals_status_check"


async def test_plans_read_what_they_give(dsn: str) -> None:
    load = """
        INSERT INTO elizasql.rooms (agent_id, id, source, type)
        SELECT DISTINCT agent_id, md5('room' || n % 4)::uuid, 's', 't' FROM owned;
        INSERT INTO elizasql.entities (agent_id, id)
        SELECT DISTINCT agent_id, md5('entity' || n % 4)::uuid FROM owned;
        INSERT INTO elizasql.goals (agent_id, id, name, room_id, entity_id, status, created_at)
        SELECT
            agent_id, md5('goal' || n)::uuid, 'n', md5('room' || n % 4)::uuid, md5('entity' || n % 4)::uuid,
            CASE WHEN n % 500 = 0 THEN 'IN_PROGRESS' ELSE 'DONE' END, now() - random() * interval '90 days'
        FROM owned;
        ANALYZE elizasql.rooms, elizasql.entities, elizasql.goals;
    """
    every = ["IN_PROGRESS", "DONE", "FAILED"]
    async with skewed(dsn, load) as session:
        room, entity = [await session.fetchval("SELECT md5($1)::uuid", x) for x in ("room0", "entity0")]
        for name, params, index, most in (
            ("get_goals", {"statuses": every, "reach": 20}, "goals_status_idx", 20),
            ("get_goals", {"statuses": ["IN_PROGRESS"], "reach": 20}, "goals_status_idx", 20),
            ("get_goals_of_room", {"room_id": room, "statuses": every, "reach": 20}, "goals_room_idx", 20),
            ("get_goals_of_room", {"room_id": room, "statuses": ["IN_PROGRESS"], "reach": 20}, "goals_room_idx", 20),
            (
                "get_goals_of_entity",
                {"entity_id": entity, "statuses": ["IN_PROGRESS"], "reach": 20},
                "goals_entity_idx",
                20,
            ),
            ("get_goals_by_ids", {"ids": [uuid4()]}, "goals_pkey", 0),
            ("update_goals", {"goals": f'[{{"id": "{uuid4()}"}}]', "required": False}, "goals_pkey", 0),
            ("delete_goals", {"ids": [uuid4()]}, "goals_pkey", 0),
            ("delete_all_goals", {"room_id": uuid4()}, "goals_room_idx", 0),
        ):
            await check_plan(session, name, params, index, most)
