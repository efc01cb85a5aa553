"""Logs, and the runs that they tell of: compared with a plain model of both."""

from __future__ import annotations

import asyncio
import copy
import math
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta, timezone
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elizasql import (
    AgentRunCounts,
    AgentRunSummary,
    AgentRunSummaryResult,
    ArgumentError,
    DatabaseAdapter,
    ForeignKeyError,
    Log,
    NotFoundError,
)
from elizasql._statements import Statement

from .conftest import MakeAdapter, Scene, make_scene
from .test_tasks import check_plan, plan, skewed

START = datetime(2026, 1, 1, tzinfo=timezone.utc)
INJECTION = "'); DROP TABLE elizasql.logs; -- $1 :id %s {} \\"


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def log(scene: Scene, type: str = "action", body: dict[str, Any] | None = None, **fields: Any) -> Log:
    return Log(**{"entity_id": scene.entity, "room_id": scene.room, "type": type, "body": body or {}, **fields})


def ids(logs: list[Log]) -> list[UUID | None]:
    return [log.id for log in logs]


# --- writing ---------------------------------------------------------------------------------------------------------


async def test_log_comes_back_with_every_field(db: DatabaseAdapter, agent_world: Scene, round_trips: list[str]) -> None:
    body = {"text": "hi", "nested": {"list": [1, 2.5, None, True, "x"]}}
    given = {"body": body, "entityId": str(agent_world.entity), "roomId": str(agent_world.room), "type": "action"}
    before = copy.deepcopy(given)
    del round_trips[:]
    assert await db.log(given) is None  # type: ignore[func-returns-value]
    assert len(round_trips) == 1
    assert given == before
    (found,) = await db.get_logs()
    assert (found.agent_id, found.entity_id, found.room_id) == (db.agent_id, agent_world.entity, agent_world.room)
    assert (found.type, found.body) == ("action", body)
    assert isinstance(found.created_at, datetime)
    assert Log.from_dict({**found.to_dict(), "createdAt": found.created_at}) == found


async def test_batch_keeps_its_order(db: DatabaseAdapter, agent_world: Scene, round_trips: list[str]) -> None:
    del round_trips[:]
    made = await db.create_logs([log(agent_world, body={"n": i}) for i in range(100)])
    assert len(round_trips) == 1
    assert ids(await db.get_logs(count=1000)) == made[::-1]
    wanted = [made[7], uuid4(), made[3], made[7]]
    assert ids(await db.get_logs_by_ids(wanted)) == [made[7], made[3]]
    # An id that is there keeps its row.
    assert await db.create_logs([log(agent_world, "other", id=made[0])]) == [made[0]]
    assert [found.type for found in await db.get_logs_by_ids(made[:1])] == ["action"]
    del round_trips[:]
    assert await db.create_logs([]) == await db.get_logs_by_ids([]) == []
    assert await db.delete_logs([]) == 0
    await db.update_logs([])
    assert round_trips == []


async def test_batch_of_several_chunks_keeps_its_order(make_db: MakeAdapter) -> None:
    db = await make_db(batch_size=5)
    scene = await make_scene(db)
    made = await db.create_logs([log(scene, id=uuid4()) for _ in range(23)])
    assert ids(await db.get_logs(count=100)) == made[::-1]


async def test_batch_whose_first_chunk_has_all_its_times_gives_the_others_their_own(make_db: MakeAdapter) -> None:
    db = await make_db(batch_size=2)
    scene = await make_scene(db)
    # Chunks go by ids: the two logs that bring a time make the first one.
    timed = [log(scene, id=UUID(int=number), created_at=at(number)) for number in (1, 2)]
    await db.create_logs([*timed, log(scene, id=UUID(int=3))])
    async with db.transaction() as tx:
        await tx.create_logs([log(scene, id=UUID(int=number)) for number in range(10, 20)])
        timed = [log(scene, id=UUID(int=number), created_at=at(number)) for number in (4, 5)]
        await tx.create_logs([*timed, log(scene, id=UUID(int=6))])
    order = [found.id.int for found in await db.get_logs(count=100) if found.id is not None]
    assert order == [6, *range(19, 9, -1), 3, 5, 4, 2, 1]


@pytest.mark.parametrize(
    "change",
    [
        {"body": None},
        {"body": "text"},
        {"body": [1]},
        {"type": None},
        {"type": 5},
        {"entity_id": None},
        {"room_id": None},
        {"room_id": "room"},
        {"body": {"x": {1, 2}}},
        {"body": {"x": print}},
        {"body": {"x": b"bytes"}},
        {"body": {(1, 2): 3}},
        {"body": {"x": {(2**70,): 2**70}}},
        {"created_at": datetime(2026, 1, 1)},  # noqa: DTZ001
    ],
)
async def test_bad_log_sends_nothing(
    db: DatabaseAdapter, agent_world: Scene, round_trips: list[str], change: dict[str, Any]
) -> None:
    good = {"entity_id": agent_world.entity, "room_id": agent_world.room, "type": "t", "body": {}}
    del round_trips[:]
    with pytest.raises(ArgumentError, match="position 1"):
        await db.create_logs([good, {**good, **change}])
    with pytest.raises(ArgumentError):
        await db.log({**good, **change})
    assert round_trips == []


async def test_broken_reference_is_an_error_and_writes_nothing(db: DatabaseAdapter, agent_world: Scene) -> None:
    broken: list[dict[str, Any]] = [{"entity_id": uuid4()}, {"room_id": uuid4()}]
    for bad in broken:
        with pytest.raises(ForeignKeyError):
            await db.create_logs([log(agent_world), log(agent_world, **bad)])
        with pytest.raises(ForeignKeyError):
            await db.log(log(agent_world, **bad))
    assert await db.get_logs() == []


# --- what a body becomes ---------------------------------------------------------------------------------------------


async def stored(db: DatabaseAdapter, scene: Scene, body: dict[str, Any]) -> Any:
    (id,) = await db.create_logs([log(scene, body=body)])
    (found,) = await db.get_logs_by_ids([id])
    return found.body


async def test_body_is_stored_as_it_is(db: DatabaseAdapter, agent_world: Scene) -> None:
    shared = {"a": [1]}
    for body in (
        {"path": "C:\\dir", "pattern": "\\d+\\u12", "quote": '"', "line": "a\nb\t\u2028", INJECTION: INJECTION},
        {"first": shared, "second": shared, "list": [shared, shared]},
        {"text": "ünïcode 🙂", "": "empty key", "escaped": "\\u0000"},
        {"big": 2**63 - 1, "small": -(2**63), "unsigned": 2**64 - 1, "zero": 0, "float": 1e-7, "false": False},
        {},
    ):
        assert await stored(db, agent_world, body) == body


async def test_what_json_cannot_hold_gets_another_form(db: DatabaseAdapter, agent_world: Scene) -> None:
    id = uuid4()
    body: dict[Any, Any] = {
        "time": datetime(2026, 1, 1, 12, tzinfo=timezone(timedelta(hours=1))),
        "day": date(2026, 1, 1),
        "id": id,
        "nan": math.nan,
        "inf": [math.inf, -math.inf],
        "array": np.array([1.5, 2.5], dtype=np.float32),
        "tuple": (1, 2),
        5: "number as key",
        "nul\x00": "a\x00b",
        "lone": "\ud800x\udfff",
        "pair": "\ud83d\ude42",
        "huge": 10**30,
        "negative": -(10**30),
        10**30: [2**64, True],
    }
    before = copy.deepcopy({key: value for key, value in body.items() if key not in ("nan", "inf", "array")})
    assert await stored(db, agent_world, body) == {
        "time": "2026-01-01T12:00:00+01:00",
        "day": "2026-01-01",
        "id": str(id),
        "nan": None,
        "inf": [None, None],
        "array": [1.5, 2.5],
        "tuple": [1, 2],
        "5": "number as key",
        "nul\ufffd": "a\ufffdb",
        "lone": "\ufffdx\ufffd",
        "pair": "🙂",
        "huge": str(10**30),
        "negative": str(-(10**30)),
        str(10**30): [str(2**64), True],
    }
    assert {key: body[key] for key in before} == before


async def test_what_contains_itself_is_cut(db: DatabaseAdapter, agent_world: Scene) -> None:
    shared = [1]
    body: dict[str, Any] = {"a": {"twice": [shared, shared]}, "text": "\ud800"}
    body["a"]["back"] = body
    body["a"]["twice"].append(body["a"])
    assert await stored(db, agent_world, body) == {"a": {"twice": [[1], [1], None], "back": None}, "text": "\ufffd"}
    assert body["a"]["back"] is body


async def test_depth_and_size_have_a_limit(db: DatabaseAdapter, agent_world: Scene, round_trips: list[str]) -> None:
    def nested(levels: int, core: Any) -> dict[str, Any]:
        for _ in range(levels):
            core = {"x": core}
        return core  # type: ignore[no-any-return]

    assert await stored(db, agent_world, nested(200, 1)) == nested(200, 1)
    assert await stored(db, agent_world, nested(200, 2**70)) == nested(200, str(2**70))
    del round_trips[:]
    for body in (nested(255, 1), nested(5000, 1), nested(5000, 2**70), {"text": "x" * (16 * 1024 * 1024)}):
        with pytest.raises(ArgumentError, match="body at position 0"):
            await db.log(log(agent_world, body=body))
    with pytest.raises(ArgumentError, match="body at position 0"):
        await db.log(log(agent_world, body={"number": 10**5000}))
    assert round_trips == []


async def test_no_run_id_is_too_long_for_the_index(db: DatabaseAdapter, agent_world: Scene) -> None:
    """A body may hold anything; what is no id is no run."""
    long = "".join(chr(0x4E00 + i * 7919 % 20000) for i in range(9000))
    for run_id in (long, "", None, {"x": long}, [long], 5, True):
        body = {"runId": run_id, "status": "started"}
        assert await stored(db, agent_world, body) == body
    await db.update_logs([{"id": found.id, "type": "run_event"} for found in await db.get_logs(count=20)])
    assert {run.run_id for run in (await db.get_agent_run_summaries()).runs or []} == {"5", "true"}


# --- reading ---------------------------------------------------------------------------------------------------------


async def test_filters_combine_and_pages_are_whole(
    db: DatabaseAdapter, agent_world: Scene, round_trips: list[str]
) -> None:
    other = await make_scene(db)
    rows = [
        Log(entity_id=entity, room_id=room, type=kind, body={"n": n}, created_at=at(n % 3))
        for n, (entity, room, kind) in enumerate(
            (entity, room, kind)
            for entity in (agent_world.entity, agent_world.other, other.entity)
            for room in (agent_world.room, other.room)
            for kind in ("a", "b")
            for _ in range(3)
        )
    ]
    for row, id in zip(rows, await db.create_logs(rows), strict=True):
        row.id = id
    ordered = sorted(rows, key=lambda row: (row.created_at, row.id.int if row.id else 0), reverse=True)
    for entity in (None, agent_world.entity, uuid4()):
        for room in (None, other.room):
            for kind in (None, "a", INJECTION):
                expected = [
                    row.id
                    for row in ordered
                    if (entity is None or row.entity_id == entity)
                    and (room is None or row.room_id == room)
                    and (kind is None or row.type == kind)
                ]
                scope = {"entity_id": entity, "room_id": room, "type": kind}
                del round_trips[:]
                found = await db.get_logs(count=100, **scope)  # type: ignore[arg-type]
                assert ids(found) == expected
                assert len(round_trips) == 1
                assert ids(await db.get_logs(**scope)) == expected[:10]  # type: ignore[arg-type]
                assert ids(await db.get_logs(limit=3, offset=2, **scope)) == expected[2:5]  # type: ignore[arg-type]
                paged: list[Log] = []
                while page := await db.get_logs(count=4, cursor=paged[-1] if paged else None, **scope):  # type: ignore[arg-type]
                    paged += page
                assert ids(paged) == expected


async def test_pages_by_a_cursor_in_json_form_are_whole(db: DatabaseAdapter, agent_world: Scene) -> None:
    """A batch's times are a microsecond apart, and ElizaOS's JSON cuts them to milliseconds."""
    made = await db.create_logs([log(agent_world, body={"n": n}) for n in range(10)])
    for scope in ({}, {"type": "action"}, {"room_id": agent_world.room}, {"entity_id": agent_world.entity}):
        found: list[Log] = []
        while page := await db.get_logs(count=3, cursor=found[-1].to_dict() if found else None, **scope):  # type: ignore[arg-type]
            found += page
        assert ids(found) == made[::-1], scope


async def test_list_arguments(db: DatabaseAdapter, agent_world: Scene, round_trips: list[str]) -> None:
    first, second, third = await db.create_logs([log(agent_world, created_at=START) for _ in range(3)])
    newest = max(first, second, third, key=lambda id: id.int)
    rest = await db.get_logs(cursor=(START, str(newest)))
    assert len(rest) == 2
    assert ids(await db.get_logs(cursor={"id": newest, "createdAt": START.timestamp() * 1000})) == ids(rest)
    assert await db.get_logs(count=0) == []
    del round_trips[:]
    bad: dict[str, Any]
    for bad in (
        {"count": 1, "limit": 2},
        {"count": -1},
        {"offset": -1},
        {"type": 5},
        {"entity_id": 5},
        {"cursor": (START,)},
        {"cursor": {"id": newest}},
        {"cursor": Log()},
        {"cursor": (START, newest), "offset": 1},
    ):
        with pytest.raises(ArgumentError):
            await db.get_logs(**bad)
    assert round_trips == []


# --- changing and deleting -------------------------------------------------------------------------------------------


async def test_update_replaces_type_and_body_only(
    db: DatabaseAdapter, agent_world: Scene, round_trips: list[str]
) -> None:
    made = await db.create_logs([log(agent_world, "a", {"n": i, "runId": "r"}) for i in range(3)])
    before = await db.get_logs_by_ids(made)
    del round_trips[:]
    await db.update_logs(
        [
            {"id": made[2], "body": {"x": 2**70}},
            {"id": str(made[0]), "updates": {"type": "b", "roomId": str(uuid4())}},
            Log(id=made[1], type="c", body={"y": 1}, entity_id=uuid4(), created_at=START),
        ]
    )
    assert len(round_trips) == 1
    after = await db.get_logs_by_ids(made)
    assert [(found.type, found.body) for found in after] == [
        ("b", {"n": 0, "runId": "r"}),
        ("c", {"y": 1}),
        ("a", {"x": str(2**70)}),
    ]
    for old, new in zip(before, after, strict=True):
        assert (old.entity_id, old.room_id, old.created_at) == (new.entity_id, new.room_id, new.created_at)


async def test_update_is_all_or_nothing(db: DatabaseAdapter, agent_world: Scene, round_trips: list[str]) -> None:
    (id,) = await db.create_logs([log(agent_world, "a")])
    missing = uuid4()
    with pytest.raises(NotFoundError, match=str(missing)):
        await db.update_logs([{"id": id, "type": "b"}, {"id": missing, "type": "c"}])
    del round_trips[:]
    for bad in (
        {"id": id, "type": None},
        {"id": id, "body": None},
        {"type": "x"},
        {"id": id, "body": {"x": {1}}},
        {"id": id, "updates": {"body": 1}},
        {"id": id, "updates": {"type": "c"}, "type": "d"},
        {"id": missing, "updates": {"id": id, "type": "c"}},
    ):
        with pytest.raises(ArgumentError, match="position 1"):
            await db.update_logs([{"id": uuid4(), "type": "b"}, bad])
    assert round_trips == []
    assert [found.type for found in await db.get_logs()] == ["a"]


async def test_delete(db: DatabaseAdapter, agent_world: Scene, round_trips: list[str]) -> None:
    made = await db.create_logs([log(agent_world) for _ in range(5)])
    del round_trips[:]
    assert await db.delete_log(made[0]) is True
    assert await db.delete_log(str(made[0])) is False
    assert await db.delete_logs([made[1], made[1], uuid4(), made[2]]) == 2
    assert len(round_trips) == 3
    assert ids(await db.get_logs()) == [made[4], made[3]]


async def test_logs_go_with_room_and_entity(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    db = await make_db()
    one, two = await make_scene(db), await make_scene(db)
    await db.create_logs([log(one), log(two), log(two, entity_id=two.other), log(two, entity_id=one.entity)])
    await db.delete_room(one.room)
    await raw.execute("DELETE FROM elizasql.entities WHERE agent_id = $1 AND id = $2", db.agent_id, one.entity)
    assert {found.entity_id for found in await db.get_logs()} == {two.entity, two.other}
    await db.delete_agent(db.agent_id)
    assert await raw.fetchval("SELECT count(*) FROM elizasql.logs WHERE agent_id = $1", db.agent_id) == 0


async def test_other_agents_logs_are_out_of_reach(make_db: MakeAdapter) -> None:
    db, other = await make_db(), await make_db()
    scene = await make_scene(other)
    body = {"runId": "r", "status": "started"}
    (id,) = await other.create_logs([log(scene, "run_event", body)])
    assert (
        await db.get_logs() == await db.get_logs(entity_id=scene.entity) == await db.get_logs(room_id=scene.room) == []
    )
    assert await db.get_logs_by_ids([id]) == await db.get_logs(type="run_event") == []
    assert await db.delete_log(id) is False
    assert await db.prune_logs(keep=0) == 0
    assert (await db.get_agent_run_summaries(room_id=scene.room)).total == 0
    with pytest.raises(NotFoundError):
        await db.update_logs([{"id": id, "type": "mine"}])
    with pytest.raises(ForeignKeyError):
        await db.log(log(scene))
    # The same run of two agents is two runs.
    mine = await make_scene(db)
    await db.create_logs([log(mine, "run_event", {**body, "status": "error"}), log(mine, "action", body)])
    for adapter, status, actions in ((db, "error", 1), (other, "started", 0)):
        (run,) = (await adapter.get_agent_run_summaries()).runs or []
        assert run.counts is not None
        assert (run.status, run.counts.actions) == (status, actions)


# --- pruning ---------------------------------------------------------------------------------------------------------


async def test_prune_by_time_and_number(make_db: MakeAdapter, round_trips: list[str]) -> None:
    db = await make_db(batch_size=3)
    scene = await make_scene(db)
    made: list[UUID] = []

    async def fill() -> None:
        await db.prune_logs(keep=0)
        # Pairs of equal times: the order is by id then.
        rows = [log(scene, id=UUID(int=i), created_at=at(i // 2)) for i in range(1, 11)]
        made[:] = await db.create_logs(rows)

    await fill()
    assert await db.prune_logs(older_than=at(2)) == 3
    assert ids(await db.get_logs()) == made[:2:-1]
    assert await db.prune_logs(at(2)) == 0
    await fill()
    assert await db.prune_logs(keep=4) == 6
    assert ids(await db.get_logs()) == made[:5:-1]
    await fill()
    # Both: only what is beyond both goes.
    assert await db.prune_logs(older_than=at(2), keep=9) == 1
    assert await db.prune_logs(older_than=at(2), keep=1) == 2
    assert await db.prune_logs(older_than=START, keep=1) == 0
    assert len(await db.get_logs()) == 7
    assert await db.prune_logs(older_than=timedelta(days=365_000)) == await db.prune_logs(timedelta.max) == 0
    assert await db.prune_logs(older_than=at(100).timestamp() * 1000, keep=7) == await db.prune_logs(keep=8) == 0
    assert await db.prune_logs(keep=7) == 0
    await fill()
    del round_trips[:]
    assert await db.prune_logs(older_than=timedelta(0)) == 10
    # Three full batches, what is left, and a look at what was stepped over.
    assert len(round_trips) == 5
    await fill()
    assert await db.prune_logs(keep=0) == 10


async def test_prune_keeps_what_stands_at_the_end_of_the_calendar(db: DatabaseAdapter, agent_world: Scene) -> None:
    last = datetime.max.replace(tzinfo=timezone.utc)
    made = await db.create_logs([log(agent_world, id=UUID(int=i), created_at=last) for i in (1, 2, 3)])
    assert await db.prune_logs(keep=2) == 1
    assert ids(await db.get_logs()) == made[:0:-1]


async def test_prune_never_defaults_to_everything(db: DatabaseAdapter, round_trips: list[str]) -> None:
    with pytest.raises(ArgumentError, match="older_than, keep or both"):
        await db.prune_logs()
    bad: dict[str, Any]
    for bad in (
        {"keep": -1},
        {"keep": 1.5},
        {"older_than": "soon"},
        {"older_than": timedelta(seconds=-1)},
        {"older_than": 30 * 86400},  # an age in seconds, and one in milliseconds
        {"older_than": 365 * 86_400_000.0},
        {"older_than": datetime(2026, 1, 1)},  # noqa: DTZ001
    ):
        with pytest.raises(ArgumentError):
            await db.prune_logs(**bad)
    assert round_trips == []


async def test_concurrent_prunes_count_each_log_once(make_db: MakeAdapter) -> None:
    db = await make_db(batch_size=7)
    other = await make_db(db.agent_id, batch_size=5)
    scene = await make_scene(db)
    await db.create_logs([log(scene) for _ in range(200)])
    deleted = await asyncio.gather(*(adapter.prune_logs(keep=20) for adapter in (db, other, db, other)))
    assert sum(deleted) == 180
    assert len(await db.get_logs(count=100)) == 20


async def test_prune_does_not_go_through_what_it_has_deleted_batch_by_batch(make_db: MakeAdapter) -> None:
    """It stays in the index while somebody may see it, as here until the transaction ends."""
    db = await make_db(batch_size=10)
    scene = await make_scene(db)
    await db.create_logs([log(scene) for _ in range(300)])
    count = "SELECT pg_stat_get_xact_tuples_returned('elizasql.logs_created_at_idx'::regclass)"
    async with db.transaction() as tx:
        assert await tx.prune_logs(keep=0) == 300
        read = await tx._executor.fetch_value(Statement("count", count, (), "", ""))
    # Each once by its batch, and once by the last look; thirty batches from the start would be 4,950.
    assert read <= 700


async def test_prune_takes_what_others_let_go_meanwhile(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has the oldest ones lets them go after the first batch, which is behind them."""
    db = await make_db(batch_size=3)
    scene = await make_scene(db)
    made = await db.create_logs([log(scene) for _ in range(10)])
    transaction = raw.transaction()
    await transaction.start()
    await raw.execute("SELECT FROM elizasql.logs WHERE id = ANY($1) FOR UPDATE", made[:4])
    real = db._background.fetch
    asked = 0

    async def fetch(statement: Statement, **params: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 2:
            await transaction.rollback()
        return await real(statement, **params)

    monkeypatch.setattr(db._background, "fetch", fetch)
    assert await db.prune_logs(older_than=timedelta(0)) == 10


# --- runs ------------------------------------------------------------------------------------------------------------


def event(scene: Scene, run: str, status: str | None, seconds: float, **fields: Any) -> Log:
    body = {"runId": run, "status": status, **fields.pop("body", {})}
    return log(scene, "run_event", body, created_at=at(seconds), **fields)


async def runs(db: DatabaseAdapter, **filters: Any) -> list[AgentRunSummary]:
    return (await db.get_agent_run_summaries(limit=100, **filters)).runs or []


async def test_a_run_from_start_to_end(db: DatabaseAdapter, agent_world: Scene, round_trips: list[str]) -> None:
    metadata = {"source": "chat", "n": [1]}
    await db.create_logs(
        [
            event(agent_world, "r1", "started", 1, body={"messageId": "m1", "metadata": metadata}),
            event(agent_world, "r1", "completed", 3.5, body={"messageId": "m2", "metadata": {"other": 1}}),
            log(agent_world, "action", {"runId": "r1", "promptCount": 2, "result": {"success": True}}),
            log(agent_world, "action", {"runId": "r1", "promptCount": 3, "result": {"success": False}}),
            log(agent_world, "useModel:TEXT_LARGE", {"runId": "r1"}),
            log(agent_world, "useModel:", {"runId": "r1"}),
            log(agent_world, "useModelX", {"runId": "r1"}),
            log(agent_world, "evaluator", {"runId": "r1", "promptCount": 100}),
            log(agent_world, "embedding_event", {"runId": "r1", "status": "failed"}),
            log(agent_world, "embedding_event", {"runId": "r1", "status": "completed"}),
            log(agent_world, "action", {"runId": "another", "promptCount": 7}),
            log(agent_world, "action", {"promptCount": 7}),
        ]
    )
    del round_trips[:]
    result = await db.get_agent_run_summaries()
    assert len(round_trips) == 1
    assert result == AgentRunSummaryResult(
        [
            AgentRunSummary(
                run_id="r1",
                status="completed",
                started_at=at(1),
                ended_at=at(3.5),
                duration_ms=2500,
                message_id="m1",
                room_id=agent_world.room,
                entity_id=agent_world.entity,
                metadata=metadata,
                counts=AgentRunCounts(actions=2, model_calls=7, errors=2, evaluators=1),
            )
        ],
        total=1,
        has_more=False,
    )
    plain = result.to_dict()
    (run,) = plain.pop("runs")
    assert plain == {"total": 1, "hasMore": False}
    assert run["counts"] == {"actions": 2, "modelCalls": 7, "errors": 2, "evaluators": 1}
    assert run["endedAt"] - run["startedAt"] == run["durationMs"] == 2500
    assert AgentRunSummaryResult.from_dict(result.to_dict()) == result


async def test_the_latest_terminal_event_decides(db: DatabaseAdapter, agent_world: Scene) -> None:
    await db.create_logs(
        [
            event(agent_world, "a", "timeout", 5),
            event(agent_world, "a", "completed", 9),
            event(agent_world, "a", "started", 2),
            event(agent_world, "a", "started", 4),
            event(agent_world, "b", "completed", 1),
            event(agent_world, "b", "error", 7),
            event(agent_world, "b", "started", 8),
            event(agent_world, "c", "started", 6),
            event(agent_world, "c", "paused", 7),
            event(agent_world, "d", "error", 3),
            event(agent_world, "e", None, 3),
        ]
    )
    found = {run.run_id: run for run in await runs(db)}
    shown = {id: (run.status, run.started_at, run.ended_at, run.duration_ms) for id, run in found.items()}
    assert shown == {
        "a": ("completed", at(2), at(9), 7000),
        "b": ("error", at(8), at(7), 0),
        "c": ("started", at(6), None, None),
        "d": ("error", None, at(3), None),
        "e": ("started", None, None, None),
    }
    # Those that started last come first, those without a start at the end.
    assert list(found) == ["b", "c", "a", "d", "e"]


async def test_equal_times_are_decided_by_id(db: DatabaseAdapter, agent_world: Scene) -> None:
    await db.create_logs(
        [
            event(agent_world, "a", "timeout", 5, id=UUID(int=9)),
            event(agent_world, "a", "error", 5, id=UUID(int=3), entity_id=agent_world.other),
        ]
    )
    (run,) = await runs(db)
    assert (run.status, run.entity_id) == ("timeout", agent_world.other)


@pytest.mark.parametrize(
    ("given", "counted"),
    [
        (3, 3),
        ("3", 3),
        (3.0, 3),
        (0, 0),
        (999_999_999, 999_999_999),
        (1_000_000_000, 0),
        (2**63, 0),
        (10**40, 0),
        (-3, 0),
        (2.5, 0),
        (1e300, 0),
        (math.nan, 0),
        ("many", 0),
        ("", 0),
        (" 3", 0),
        ("\uff13", 0),
        (None, 0),
        (True, 0),
        ([3], 0),
        ({"count": 3}, 0),
        (INJECTION, 0),
    ],
)
async def test_malformed_prompt_count_harms_nothing(
    db: DatabaseAdapter, agent_world: Scene, given: Any, counted: int
) -> None:
    await db.create_logs(
        [
            event(agent_world, "r", "started", 1),
            log(agent_world, "action", {"runId": "r", "promptCount": given}),
            log(agent_world, "action", {"runId": "r", "promptCount": 5, "result": "text"}),
            log(agent_world, "action", {"runId": "r"}),
        ]
    )
    (run,) = await runs(db)
    assert run.counts == AgentRunCounts(actions=3, model_calls=counted + 5)


async def test_malformed_events_harm_nothing(db: DatabaseAdapter, agent_world: Scene) -> None:
    await db.create_logs(
        [
            event(agent_world, "r", "started", 1, body={"messageId": 5, "metadata": "text", "roomId": "x"}),
            event(agent_world, "r", "completed", 2, body={"messageId": "", "metadata": {}, "status": ["completed"]}),
            event(agent_world, "r", "completed", 3, body={"messageId": {"a": 1}, "metadata": [1]}),
            event(agent_world, "r", "error", 4, body={"messageId": "it", "metadata": {"a": None}}),
        ]
    )
    (run,) = await runs(db)
    assert (run.status, run.message_id, run.metadata, run.duration_ms) == ("error", "it", {"a": None}, 3000)


async def test_totals_are_true_under_paging(db: DatabaseAdapter, agent_world: Scene, round_trips: list[str]) -> None:
    rows = []
    for i in range(152):
        rows.append(event(agent_world, f"{i:03}", "started", i))
        if i % 3:
            rows.append(event(agent_world, f"{i:03}", "completed" if i % 3 == 1 else "error", i + 1))
    await db.create_logs(rows)
    expected = [f"{i:03}" for i in reversed(range(152))]
    del round_trips[:]
    for offset, limit, size in ((0, 5, 5), (150, 5, 2), (52, 100, 100), (151, 1, 1), (152, 5, 0), (9999, 5, 0)):
        page = await db.get_agent_run_summaries(limit=limit, offset=offset)
        assert [run.run_id for run in page.runs or []] == expected[offset : offset + limit]
        assert (len(page.runs or []), page.total, page.has_more) == (size, 152, offset + size < 152)
    assert len(round_trips) == 6
    page = await db.get_agent_run_summaries(status="completed", limit=20, offset=40)
    assert (len(page.runs or []), page.total, page.has_more) == (11, 51, False)
    assert {run.status for run in page.runs or []} == {"completed"}
    assert (await db.get_agent_run_summaries(status="started")).total == 51
    assert (await db.get_agent_run_summaries(status="timeout")).total == 0


async def test_limit_is_clamped(db: DatabaseAdapter, agent_world: Scene) -> None:
    await db.create_logs([event(agent_world, f"{i}", "started", i) for i in range(105)])
    for limit, size in ((0, 1), (-7, 1), (1, 1), (100, 100), (101, 100), (10**30, 100)):
        assert len((await db.get_agent_run_summaries(limit=limit)).runs or []) == size
    assert len((await db.get_agent_run_summaries()).runs or []) == 20


async def test_run_arguments(db: DatabaseAdapter, round_trips: list[str]) -> None:
    bad: dict[str, Any]
    for bad in (
        {"limit": None},
        {"limit": 1.5},
        {"limit": True},
        {"offset": -1},
        {"status": "done"},
        {"room_id": "x"},
        {"entity_id": 1},
        {"from_time": "soon"},
        {"to_time": datetime(2026, 1, 1)},  # noqa: DTZ001
    ):
        with pytest.raises(ArgumentError):
            await db.get_agent_run_summaries(**bad)
    assert round_trips == []
    assert await db.get_agent_run_summaries(status="all") == AgentRunSummaryResult([], 0, has_more=False)


async def test_a_chosen_run_is_told_as_a_whole(db: DatabaseAdapter, agent_world: Scene) -> None:
    """A window that holds the start alone does not make a finished run a running one."""
    other = await make_scene(db)
    await db.create_logs(
        [
            event(agent_world, "a", "started", 10),
            event(agent_world, "a", "completed", 20),
            event(other, "b", "started", 30, entity_id=agent_world.other),
            event(other, "b", "error", 40),
        ]
    )

    async def chosen(**filters: Any) -> list[tuple[str | None, str | None, int | None]]:
        return [(run.run_id, run.status, run.duration_ms) for run in await runs(db, **filters)]

    a, b = ("a", "completed", 10_000), ("b", "error", 10_000)
    assert await chosen() == await chosen(from_time=0) == await chosen(to_time=at(100)) == [b, a]
    assert await chosen(to_time=at(10)) == await chosen(from_time=at(20), to_time=at(20)) == [a]
    milliseconds = int(at(20).timestamp() * 1000)
    assert await chosen(from_time=milliseconds, to_time=milliseconds) == [a]
    assert await chosen(from_time=at(20) + timedelta(microseconds=1)) == [b]
    assert await chosen(from_time=at(21), to_time=at(29)) == await chosen(from_time=at(50), to_time=at(1)) == []
    assert await chosen(room_id=agent_world.room) == await chosen(entity_id=agent_world.entity) == [a]
    assert await chosen(entity_id=agent_world.other) == await chosen(entity_id=other.entity) == [b]
    assert await chosen(room_id=other.room, entity_id=agent_world.entity) == await chosen(room_id=uuid4()) == []
    assert await chosen(entity_id=agent_world.other, from_time=at(40)) == []
    assert await chosen(room_id=other.room, status="completed") == []
    assert await chosen(room_id=other.room, status="error") == [b]


async def test_end_in_milliseconds_is_the_end_of_the_last_one(db: DatabaseAdapter, agent_world: Scene) -> None:
    time = at(10) + timedelta(microseconds=123_456)
    await db.create_logs([replace(event(agent_world, "a", "started", 10), created_at=time)])
    (found,) = await db.get_logs()
    assert len(await runs(db, from_time=found.to_dict()["createdAt"], to_time=found.to_dict()["createdAt"])) == 1
    assert await runs(db, to_time=time - timedelta(microseconds=1)) == []


@dataclass
class Row:
    """What one log is made of, for the model."""

    run: object
    type: str
    status: object
    second: int
    room: int
    entity: int
    message: object
    metadata: object
    prompts: object
    success: object

    def body(self) -> dict[str, Any]:
        given = {
            "runId": self.run,
            "status": self.status,
            "messageId": self.message,
            "metadata": self.metadata,
            "promptCount": self.prompts,
            "result": ... if self.success is ... else {"success": self.success},
        }
        return {key: value for key, value in given.items() if value is not ...}


ROWS = st.builds(
    Row,
    run=st.sampled_from(["r1", "r2", "r3", "", None, ..., 7]),
    type=st.sampled_from(["run_event"] * 5 + ["action", "evaluator", "useModel:TEXT", "embedding_event", "other"]),
    status=st.sampled_from(["started", "started", "completed", "timeout", "error", "failed", "odd", None, ..., 1]),
    second=st.integers(0, 6),
    room=st.integers(0, 1),
    entity=st.integers(0, 1),
    message=st.sampled_from(["m1", "m2", "", None, ..., 5]),
    metadata=st.sampled_from([{"a": 1}, {"b": 2}, {}, None, ..., "x"]),
    prompts=st.sampled_from([1, "2", 3.0, -1, 2.5, "x", None, ...]),
    success=st.sampled_from([True, False, "false", None, ...]),
)


def fold(rows: list[tuple[UUID, Row]], scene: dict[str, list[UUID]], filters: dict[str, Any]) -> list[AgentRunSummary]:
    """Say in plain Python what the statement is to give."""

    def key(row: Row) -> str | None:
        return None if row.run in ("", None, ...) else str(row.run)

    def whole(value: object) -> int:
        text = str(value).removesuffix(".0")
        return int(text) if isinstance(value, (int, float, str)) and text.isdigit() else 0

    ordered = sorted(rows, key=lambda pair: (pair[1].second, pair[0].int))
    found = []
    for run in dict.fromkeys(key(row) for _, row in ordered):
        events = [row for _, row in ordered if key(row) == run and row.type == "run_event"]
        if run is None or not any(
            filters.get("room_id") in (None, scene["rooms"][row.room])
            and filters.get("entity_id") in (None, scene["entities"][row.entity])
            and filters.get("from_time", at(0)) <= at(row.second) <= filters.get("to_time", at(99))
            for row in events
        ):
            continue
        others = [row for _, row in ordered if key(row) == run]
        starts = [row.second for row in events if row.status == "started"]
        ends = [row for row in events if row.status in ("completed", "timeout", "error")]
        found.append(
            AgentRunSummary(
                run_id=run,
                status=ends[-1].status if ends else "started",  # type: ignore[arg-type]
                started_at=at(starts[0]) if starts else None,
                ended_at=at(ends[-1].second) if ends else None,
                duration_ms=max(ends[-1].second - starts[0], 0) * 1000 if starts and ends else None,
                message_id=next((str(row.message) for row in events if row.message in ("m1", "m2")), None),
                room_id=scene["rooms"][events[0].room],
                entity_id=scene["entities"][events[0].entity],
                metadata=next((row.metadata for row in events if isinstance(row.metadata, dict) and row.metadata), {}),
                counts=AgentRunCounts(
                    actions=sum(row.type == "action" for row in others),
                    model_calls=sum(row.type == "useModel:TEXT" for row in others)
                    + sum(whole(row.prompts) for row in others if row.type == "action"),
                    errors=sum(row.type == "action" and row.success in (False, "false") for row in others)
                    + sum(row.type == "embedding_event" and row.status == "failed" for row in others),
                    evaluators=sum(row.type == "evaluator" for row in others),
                ),
            )
        )
    if filters.get("status") not in (None, "all"):
        found = [run for run in found if run.status == filters["status"]]
    return sorted(found, key=lambda run: (-(run.started_at or at(-1)).timestamp(), run.run_id or ""))


@pytest.mark.parametrize("examples", [50, pytest.param(150, marks=pytest.mark.slow)])
async def test_summaries_are_what_a_plain_model_says(make_db: MakeAdapter, examples: int) -> None:
    db = await make_db()
    one, two = await make_scene(db), await make_scene(db)
    scene = {"rooms": [one.room, two.room], "entities": [one.entity, two.entity]}
    filters = st.fixed_dictionaries(
        {},
        optional={
            "room_id": st.sampled_from(scene["rooms"]),
            "entity_id": st.sampled_from(scene["entities"]),
            "status": st.sampled_from(["started", "completed", "timeout", "error", "all"]),
            "from_time": st.integers(0, 6).map(at),
            "to_time": st.integers(0, 6).map(at),
        },
    )

    async def compare(rows: list[Row], chosen: dict[str, Any], offset: int, limit: int) -> None:
        await db.prune_logs(keep=0)
        made = await db.create_logs(
            [
                Log(
                    entity_id=scene["entities"][row.entity],
                    room_id=scene["rooms"][row.room],
                    type=row.type,
                    body=row.body(),
                    created_at=at(row.second),
                )
                for row in rows
            ]
        )
        expected = fold(list(zip(made, rows, strict=True)), scene, chosen)
        result = await db.get_agent_run_summaries(limit=limit, offset=offset, **chosen)
        assert result.runs == expected[offset : offset + limit]
        assert result.total == len(expected)
        assert result.has_more == (len(expected) > offset + limit)

    loop = asyncio.get_running_loop()

    @settings(max_examples=examples)
    @given(st.lists(ROWS, max_size=25), filters, st.integers(0, 2), st.integers(1, 4))
    def run(rows: list[Row], chosen: dict[str, Any], offset: int, limit: int) -> None:
        asyncio.run_coroutine_threadsafe(compare(rows, chosen, offset, limit), loop).result(60)

    await asyncio.to_thread(run)


# --- plans -----------------------------------------------------------------------------------------------------------


async def test_plans_read_what_they_give(dsn: str) -> None:
    load = """
        INSERT INTO elizasql.rooms (agent_id, id, source, type)
        SELECT DISTINCT agent_id, md5('room' || n % 4)::uuid, 's', 't' FROM owned;
        INSERT INTO elizasql.entities (agent_id, id)
        SELECT DISTINCT agent_id, md5('entity' || n % 4)::uuid FROM owned;
        INSERT INTO elizasql.logs (agent_id, id, entity_id, room_id, type, body, created_at)
        SELECT
            agent_id, md5('log' || n || k)::uuid, md5('entity' || n % 4)::uuid, md5('room' || n % 4)::uuid, type,
            jsonb_build_object('runId', 'run' || n, 'status', status),
            timestamptz '2026-01-01' + n * interval '1 minute' + k * interval '1 second'
        FROM owned, (VALUES
            (1, 'run_event', 'started'), (2, 'action', 'x'), (3, 'run_event', 'completed')
        ) AS kinds (k, type, status);
        ANALYZE elizasql.rooms, elizasql.entities, elizasql.logs;
    """
    page = {"limit": 20}
    async with skewed(dsn, load) as session:
        room, entity, known = [await session.fetchval("SELECT md5($1)::uuid", x) for x in ("room0", "entity0", "log51")]
        middle = {"cursor_time": at(240_000), "cursor_id": uuid4()}
        for name, params, index, most in (
            ("get_logs", {}, "logs_created_at_idx", 20),
            ("get_logs", middle, "logs_created_at_idx", 20),
            ("get_logs_by_type", {"type": "action", **middle}, "logs_type_idx", 20),
            ("get_logs_of_room", {"room_id": room, **middle}, "logs_room_idx", 20),
            ("get_logs_of_entity", {"entity_id": entity, **middle}, "logs_entity_idx", 20),
            ("get_logs_by_ids", {"ids": [uuid4()]}, "logs_pkey", 0),
            ("update_logs", {"ids": [known], "types": ["x"], "bodies": []}, "logs_pkey", 1),
            ("delete_logs", {"ids": [uuid4()]}, "logs_pkey", 0),
            ("get_oldest_kept_log", {"keep": 20}, "logs_created_at_idx", 20),
            ("prune_logs", {"before": at(600), "batch_size": 10}, "logs_created_at_idx", 10),
        ):
            await check_plan(session, name, {**page, **params}, index, most)
        # All runs are folded off one index, two events each; what a page shows is looked up.
        whole = {"narrowed": False}
        await check_plan(session, "get_agent_run_summaries", whole, "logs_run_event_idx", 16_000)
        read = [scan["Actual Rows"] for scan in await plan(session, "get_agent_run_summaries", whole)]
        assert sorted(read)[-2] <= 3, read
        # A window, and the runs in it.
        window = {"narrowed": True, "from_time": at(60 * 4000), "to_time": at(60 * 4010)}
        await check_plan(session, "get_agent_run_summaries", window, "logs_run_event_time_idx", 22)
