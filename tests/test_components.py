"""Components: natural keys, upsert, patches, reads in order."""

from __future__ import annotations

import asyncio
import copy
import json
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elizasql import (
    ArgumentError,
    Component,
    DatabaseAdapter,
    DataError,
    ForeignKeyError,
    NotFoundError,
    UniqueViolationError,
)
from elizasql._statements import SQL

from .conftest import MakeAdapter, Scene, make_scene
from .locking import overtaken
from .skew import ENOUGH, Skew
from .test_entities import crowd, of, read_rows  # noqa: F401 - `crowd` is a fixture

T0 = datetime(2026, 1, 1, tzinfo=timezone.utc)
INJECTION = "'; DROP TABLE elizasql.components; -- $1 %s :x \\"
NOWHERE = UUID(int=2**128 - 1)


def of_scene(scene: Scene, **fields: Any) -> dict[str, Any]:
    return {"entity_id": scene.entity, "room_id": scene.room, "type": "t", **fields}


async def stored(db: DatabaseAdapter, id: UUID) -> Component:
    (component,) = await db.get_components_by_ids([id])
    return component


async def number_of(db: DatabaseAdapter, raw: asyncpg.Connection[Any]) -> int:
    number: int = await raw.fetchval("SELECT count(*) FROM elizasql.components WHERE agent_id = $1", db.agent_id)
    return number


# --- create ----------------------------------------------------------------------------------------------------------


async def test_create_gives_everything_back(db: DatabaseAdapter, agent_world: Scene) -> None:
    s = agent_world
    given = Component(uuid4(), db.agent_id, s.entity, s.room, s.world, s.other, INJECTION, {"a": [1, None, {}]}, T0)
    before = copy.deepcopy(given)
    assert await db.create_component(given) is True
    assert given == before
    assert given.id is not None
    assert await db.get_components_by_ids([str(given.id)]) == [given]
    assert Component.from_dict(json.loads(json.dumps(given.to_dict()))) == given


async def test_create_fills_in_what_is_missing(db: DatabaseAdapter, agent_world: Scene) -> None:
    (id,) = await db.create_components([of_scene(agent_world)])
    component = await stored(db, id)
    assert id.version == 7
    assert (component.world_id, component.source_entity_id, component.data) == (None, None, {})
    assert component.created_at is not None


async def test_one_for_each_natural_key_and_none_is_a_value(
    db: DatabaseAdapter, agent_world: Scene, raw: asyncpg.Connection[Any]
) -> None:
    s = agent_world
    for world in (None, s.world):
        for source in (None, s.other):
            key = of_scene(s, world_id=world, source_entity_id=source)
            assert await db.create_component({**key, "data": {"first": True}}) is True
            assert await db.create_component({**key, "data": {"second": True}}) is False
    assert await number_of(db, raw) == 4
    assert {str(component.data) for component in await db.get_components(s.entity)} == {"{'first': True}"}


async def test_create_gives_the_ids_that_are_stored(db: DatabaseAdapter, agent_world: Scene) -> None:
    s = agent_world
    (there,) = await db.create_components([of_scene(s, data={"n": 0})])
    new, same_id = uuid4(), uuid4()
    ids = await db.create_components(
        [
            of_scene(s, data={"n": 1}),
            of_scene(s, id=new, type="new", data={"n": 2}),
            of_scene(s, type="new", data={"n": 3}),
            of_scene(s, id=same_id, type="x"),
            of_scene(s, id=same_id, type="y"),
            of_scene(s, id=there, type="z"),
        ]
    )
    assert ids == [there, new, new, same_id, same_id, there]
    components = await db.get_components(s.entity)
    assert {component.type: component.data for component in components} == {"t": {"n": 0}, "new": {"n": 2}, "x": {}}
    assert await db.create_component(of_scene(s, id=there, type="other")) is False


async def test_create_over_several_chunks(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    db = await make_db(batch_size=2)
    s = await make_scene(db)
    ids = await db.create_components([of_scene(s, type=f"{n % 4}") for n in range(7)])
    assert ids == [*ids[:4], *ids[:3]]
    assert {component.id for component in await db.get_components(s.entity)} == set(ids)
    with pytest.raises(ForeignKeyError):
        await db.create_components([*(of_scene(s, type=f"n{n}") for n in range(4)), of_scene(s, entity_id=NOWHERE)])
    assert await number_of(db, raw) == 4


@pytest.mark.parametrize(
    ("field", "constraint"),
    [
        ("entity_id", "components_entity_fkey"),
        ("room_id", "components_room_fkey"),
        ("world_id", "components_world_fkey"),
        ("source_entity_id", "components_source_entity_fkey"),
    ],
)
async def test_a_broken_reference_is_an_error(
    db: DatabaseAdapter, agent_world: Scene, raw: asyncpg.Connection[Any], field: str, constraint: str
) -> None:
    good, bad = of_scene(agent_world), of_scene(agent_world, type="bad", data={}, **{field: NOWHERE})
    for call in (db.create_components, db.upsert_components):
        with pytest.raises(ForeignKeyError) as caught:
            await call([{**good, "data": {}}, bad])
        assert caught.value.constraint == constraint
    assert await number_of(db, raw) == 0


async def test_refused_before_anything_is_sent(db: DatabaseAdapter, agent_world: Scene, round_trips: list[str]) -> None:
    good = of_scene(agent_world, data={})
    changes: list[dict[str, Any]] = [
        {"entity_id": None},
        {"room_id": None},
        {"type": None},
        {"type": 3},
        {"data": []},
        {"world_id": "x"},
        {"agent_id": uuid4()},
        {"typ": "x"},
        {"data": {"x": object()}},
    ]
    for change in changes:
        for call in (db.create_components, db.upsert_components):
            with pytest.raises(ArgumentError, match=None if "data" in change else "position 1"):
                await call([good, {**good, **change}])
    with pytest.raises(ArgumentError, match="position 1: data is missing"):
        await db.upsert_components([good, of_scene(agent_world)])
    for call in (db.create_components, db.upsert_components):
        with pytest.raises(ArgumentError):
            await call(good)  # type: ignore[arg-type]
        assert await call([]) == []
    assert round_trips == []


async def test_concurrent_creates_of_a_natural_key_make_one(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    first = await make_db()
    scene = await make_scene(first)
    adapters = [first, *[await make_db(first.agent_id) for _ in range(3)]]
    keys = [of_scene(scene, type=f"{n}") for n in range(6)]
    answers = await asyncio.gather(
        *(adapters[n % 4].create_components(keys if n % 2 else keys[::-1]) for n in range(16))
    )
    assert await number_of(first, raw) == 6
    wanted = [component.id for component in await first.get_components_by_natural_keys(keys) if component]
    assert [ids if n % 2 else ids[::-1] for n, ids in enumerate(answers)] == [wanted] * 16
    created = await asyncio.gather(*(db.create_component(of_scene(scene, type="one")) for db in adapters * 3))
    assert sorted(created) == [False] * 11 + [True]


async def test_a_component_that_goes_while_another_is_waited_for_is_created(
    db: DatabaseAdapter, agent_world: Scene, raw: asyncpg.Connection[Any]
) -> None:
    """It was there when its turn came, and is not when the ids are looked up: none of them is None."""
    s = agent_world
    await db.create_component(of_scene(s, type="a"))
    insert = "INSERT INTO elizasql.components (agent_id, entity_id, room_id, type) VALUES ($1, $2, $3, 'b')"
    delete = "DELETE FROM elizasql.components WHERE agent_id = $1 AND type = 'a'"
    create = db.create_components([of_scene(s, type=name, data={"new": True}) for name in "ab"])
    ids = await overtaken(raw, create, (insert, db.agent_id, s.entity, s.room), (delete, db.agent_id))
    assert [(await stored(db, id)).data for id in ids] == [{"new": True}, {}]


# --- upsert ----------------------------------------------------------------------------------------------------------


async def test_upsert_goes_by_the_natural_key(db: DatabaseAdapter, agent_world: Scene) -> None:
    s = agent_world
    room = await db.create_room({"source": "t", "type": "t"})
    first = Component(uuid4(), db.agent_id, s.entity, s.room, None, s.other, "t", {"n": 1}, T0)
    await db.create_component(first)
    ids = await db.upsert_components(
        [
            of_scene(s, type="new", data={"n": 1}),
            of_scene(s, id=uuid4(), source_entity_id=s.other, data={"n": 2}, created_at=T0 + timedelta(1)),
            of_scene(s, data={"n": 3}),
            of_scene(s, source_entity_id=s.other, room_id=room, data={"n": 4}),
            of_scene(s, type="new", data={"n": 5}),
        ]
    )
    assert ids[1] == ids[3] == first.id
    assert ids[0] == ids[4]
    first.room_id, first.data = room, {"n": 4}
    assert await stored(db, ids[1]) == first
    assert (await stored(db, ids[0])).data == {"n": 5}
    assert len({*ids}) == len(await db.get_components(s.entity)) == 3


async def test_upsert_of_an_id_with_another_key_is_an_error(db: DatabaseAdapter, agent_world: Scene) -> None:
    (id,) = await db.create_components([of_scene(agent_world)])
    with pytest.raises(UniqueViolationError) as caught:
        await db.upsert_components([of_scene(agent_world, id=id, type="other", data={})])
    assert caught.value.constraint == "components_pkey"
    async with db.transaction() as tx:
        with pytest.raises(UniqueViolationError):
            async with tx.transaction() as savepoint:
                await savepoint.upsert_components([of_scene(agent_world, id=id, type="other", data={})])


async def test_concurrent_upserts_make_one(db: DatabaseAdapter, agent_world: Scene) -> None:
    keys = [of_scene(agent_world, type=f"{n}", data={}) for n in range(6)]
    answers = await asyncio.gather(*(db.upsert_components(keys if n % 2 else keys[::-1]) for n in range(10)))
    assert len(await db.get_components(agent_world.entity)) == 6
    assert len({tuple(ids if n % 2 else ids[::-1]) for n, ids in enumerate(answers)}) == 1


async def test_upsert_of_what_is_created_meanwhile_changes_it(
    db: DatabaseAdapter, agent_world: Scene, raw: asyncpg.Connection[Any]
) -> None:
    """The server refuses it by the id, which is not the key that the upsert looks at."""
    s, id = agent_world, uuid4()
    columns = "(agent_id, id, entity_id, room_id, type, data)"
    upsert = db.upsert_components([of_scene(s, id=id, data={"a": 2})])
    stored_ids = await overtaken(
        raw,
        upsert,
        (
            f"INSERT INTO elizasql.components {columns} VALUES ($1, $2, $3, $4, 'not yet', '{{}}')",
            *(db.agent_id, id, s.entity, s.room),
        ),
        ("UPDATE elizasql.components SET type = 't' WHERE agent_id = $1 AND id = $2", db.agent_id, id),
    )
    assert stored_ids == [id]
    assert (await stored(db, id)).data == {"a": 2}


# --- update and delete -----------------------------------------------------------------------------------------------


async def test_update_changes_only_what_is_given(db: DatabaseAdapter, agent_world: Scene) -> None:
    s = agent_world
    component = Component(uuid4(), db.agent_id, s.entity, s.room, s.world, s.other, "t", {"a": 1}, T0)
    await db.create_component(component)
    assert component.id is not None
    assert await db.update_component({"id": component.id, "data": {"b": 2}}) is True
    component.data = {"b": 2}
    assert await stored(db, component.id) == component
    assert await db.update_component(Component(id=component.id, type="u", entity_id=s.other)) is True
    component.type, component.entity_id = "u", s.other
    assert await stored(db, component.id) == component
    fields = {"worldId": None, "sourceEntityId": None, "data": None, "createdAt": T0 + timedelta(1)}
    assert await db.update_component({"id": component.id, **fields}) is True
    component.world_id, component.source_entity_id, component.data = None, None, {}
    assert await stored(db, component.id) == component
    for name in ("entity_id", "room_id", "type"):
        with pytest.raises(ArgumentError, match=f"{name} cannot be None"):
            await db.update_component({"id": component.id, name: None})
    with pytest.raises(ForeignKeyError):
        await db.update_component({"id": component.id, "room_id": NOWHERE})


async def test_update_cannot_take_anothers_natural_key(db: DatabaseAdapter, agent_world: Scene) -> None:
    ids = await db.create_components([of_scene(agent_world), of_scene(agent_world, type="u")])
    with pytest.raises(UniqueViolationError) as caught:
        await db.update_components([{"id": ids[0], "data": {"a": 1}}, {"id": ids[1], "type": "t"}])
    assert caught.value.constraint == "components_natural_key"
    assert [component.data for component in await db.get_components_by_ids(ids)] == [{}, {}]


async def test_update_and_delete_of_what_is_not_there(make_db: MakeAdapter) -> None:
    db = await make_db(batch_size=2)
    ids = await db.create_components([of_scene(await make_scene(db), type=f"{n}") for n in range(3)])
    assert await db.update_component({"id": NOWHERE, "data": {}}) is False
    with pytest.raises(NotFoundError, match=str(NOWHERE)):
        await db.update_components([{"id": id, "data": {"x": 1}} for id in [*ids, NOWHERE]])
    assert [component.data for component in await db.get_components_by_ids(ids)] == [{}] * 3
    await db.update_components([{"id": ids[0], "data": {"x": 1}}, {"id": ids[0], "type": "u"}])
    assert (await stored(db, ids[0])).type == "u"
    assert (await stored(db, ids[0])).data == {"x": 1}
    assert await db.delete_component(NOWHERE) is False
    assert await db.delete_component(ids[0]) is True
    assert await db.delete_components([*ids, ids[1], NOWHERE]) == 2


# --- patches ---------------------------------------------------------------------------------------------------------

Ops = list[dict[str, Any]]


def op(kind: str, path: Any, *value: Any) -> dict[str, Any]:
    return {"op": kind, "path": path, **({"value": value[0]} if value else {})}


@pytest.mark.parametrize(
    ("data", "ops", "wanted"),
    [
        ({}, [op("set", "a", 1)], {"a": 1}),
        ({"a": 1}, [op("set", "a", None)], {"a": None}),
        ({}, [op("set", "a.b.c", [])], {"a": {"b": {"c": []}}}),
        ({"a": {"x": 1}}, [op("set", "a.b", 2)], {"a": {"x": 1, "b": 2}}),
        ({}, [op("set", "a.0.b", 1)], {"a": [{"b": 1}]}),
        ({"a": [1, 2]}, [op("set", "a.1", 3)], {"a": [1, 3]}),
        ({"a": [1, 2]}, [op("set", "a.2", 3)], {"a": [1, 2, 3]}),
        ({"a": [1]}, [op("set", "a.1.b", 3)], {"a": [1, {"b": 3}]}),
        ({"a": {"7": {"n": 1}}}, [op("increment", "a.7.n", 1)], {"a": {"7": {"n": 2}}}),
        ({"a": {}}, [op("set", "a.123456789012345678901.n", 1)], {"a": {"123456789012345678901": {"n": 1}}}),
        (
            {"a": []},
            [op("push", "a", 1), op("push", "a", [2, 3]), op("push", "a", {"b": 1})],
            {"a": [1, [2, 3], {"b": 1}]},
        ),
        ({"a": [[]]}, [op("push", "a.0", None)], {"a": [[None]]}),
        ({"a": 1, "b": 2}, [op("remove", "a"), op("remove", "a")], {"b": 2}),
        ({"a": [1, 2, 3]}, [op("remove", "a.1")], {"a": [1, 3]}),
        (
            {"a": [1]},
            [op("remove", "a.9"), op("remove", "a.b"), op("remove", "x.y.z"), op("remove", "a.0.b")],
            {"a": [1]},
        ),
        ({"n": 1}, [op("increment", "n", 2), op("increment", "n", -5)], {"n": -2}),
        ({"n": 1}, [op("increment", "n", 0.25)], {"n": 1.25}),
        ({"n": 1}, [op("increment", "n", np.int64(2)), op("increment", "n", np.float32(0.5))], {"n": 3.5}),
        ({"n": 0.1}, [op("increment", "n", 0.2)], {"n": 0.3}),
        ({"a": 1}, [op("remove", "a"), op("set", "a.b", 1)], {"a": {"b": 1}}),
        ({"_a1": 0, "B": 0}, [op("set", "_a1", INJECTION), op("set", "B", "\x00")], {"_a1": INJECTION, "B": "\ufffd"}),
        ({"a": 1}, [], {"a": 1}),
    ],
)
async def test_patch(db: DatabaseAdapter, agent_world: Scene, data: Any, ops: Ops, wanted: Any) -> None:
    (id,) = await db.create_components([of_scene(agent_world, data=data)])
    before = copy.deepcopy(ops)
    await db.patch_component(id, ops)
    assert ops == before
    assert (await stored(db, id)).data == wanted


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (op("push", "n", 1), "an array is needed, not number"),
        (op("push", "nothing", 1), "an array is needed, and nothing is there"),
        (op("push", "o", 1), "an array is needed, not object"),
        (op("increment", "s", 1), "a number is needed, not string"),
        (op("increment", "nothing.here", 1), "a number is needed, and nothing is there"),
        (op("increment", "nil", 1), "a number is needed, not null"),
        (op("set", "n.x", 1), "number is in the way"),
        (op("set", "nil.x", 1), "null is in the way"),
        (op("set", "s.0", 1), "string is in the way"),
        (op("set", "l.x", 1), "an array has no field x"),
        (op("set", "l.3", 1), "the array has 2 elements"),
        (op("set", "l.99999999999999999999", 1), "the array has 2 elements"),
        (op("set", "new.1", 1), "the array has 0 elements"),
        (op("increment", "l.2", 1), "a number is needed, and nothing is there"),
        (op("increment", "huge", 1e308), "the sum is beyond the range of a double"),
        (op("increment", "low", -1e308), "the sum is beyond the range of a double"),
    ],
)
async def test_a_patch_that_does_not_fit_changes_nothing(
    db: DatabaseAdapter, agent_world: Scene, bad: dict[str, Any], problem: str
) -> None:
    data = {"n": 1, "s": "text", "nil": None, "o": {}, "l": [1, 2], "huge": 1.7e308, "low": -1.7e308}
    before = [op("increment", "n", 6), op("remove", "s.0"), op("set", "new2", 6), op("remove", "new2")]  # these fit
    ids = await db.create_components([of_scene(agent_world, type=f"{n}", data=data) for n in range(2)])
    with pytest.raises(DataError) as caught:
        await db.patch_components(
            [
                {"componentId": ids[0], "ops": [op("set", "n", 5)]},
                {"componentId": ids[1], "ops": [*before, bad]},
            ]
        )
    message = str(caught.value)
    assert f'component {ids[1]}, operation 5 ({bad["op"]} "{bad["path"]}"): {problem}' in message
    assert [component.data for component in await db.get_components_by_ids(ids)] == [data, data]


async def test_patches_of_many_are_all_or_none(make_db: MakeAdapter) -> None:
    db = await make_db(batch_size=2)
    s = await make_scene(db)
    ids = await db.create_components([of_scene(s, type=f"{n}", data={"n": n}) for n in range(3)])
    patches = [{"componentId": id, "ops": [op("increment", "n", 10)]} for id in ids]
    with pytest.raises(NotFoundError, match=str(NOWHERE)):
        await db.patch_components([*patches, {"componentId": NOWHERE, "ops": []}])
    assert [component.data for component in await db.get_components_by_ids(ids)] == [{"n": n} for n in range(3)]
    again = {"component_id": str(ids[0]), "ops": ({"op": "push", "path": "n", "value": 1},)}
    await db.patch_components([{"componentId": ids[0], "ops": [op("set", "n", [])]}, *patches[1:], again])
    wanted = [{"n": [1]}, {"n": 11}, {"n": 12}]
    assert [component.data for component in await db.get_components_by_ids(ids)] == wanted
    with pytest.raises(NotFoundError):
        await db.patch_component(uuid4(), [])


async def test_bad_patches_are_refused_before_anything_is_sent(db: DatabaseAdapter, round_trips: list[str]) -> None:
    good = {"componentId": uuid4(), "ops": [op("set", "a", 1)]}
    for bad in (
        *(
            op("set", path, 1)
            for path in ("", "0", "0.a", "a.", ".a", "a..b", "a b", "a-b", "a.b-c", "ä", "a.-1", "a.0x", "a\n")
        ),
        *(op("set", path, 1) for path in (None, 3, ["a"], "$.a", "a[0]", "a'", "{a}", "a.1_0", ".".join("a" * 251))),
        op("set", "a"),
        op("push", "a"),
        op("increment", "a"),
        *(op("increment", "a", value) for value in ("1", None, True, float("nan"), -float("inf"), 10**400, [1])),
        op("SET", "a", 1),
        op("merge", "a", 1),
        {"op": [], "path": "a", "value": 1},
        {"path": "a", "value": 1},
        op("set", "a", object()),
        "set",
    ):
        with pytest.raises(ArgumentError, match=r"position 1: operation 2|not JSON"):
            await db.patch_components([good, {"componentId": uuid4(), "ops": [op("remove", "a"), bad]}])
    wrong: Any
    for wrong in (
        {"ops": []},
        {"componentId": uuid4()},
        {"componentId": uuid4(), "ops": op("set", "a", 1)},
        "x",
        {**good, "x": 1},
    ):
        with pytest.raises(ArgumentError, match="position 1"):
            await db.patch_components([good, wrong])
    with pytest.raises(ArgumentError):
        await db.patch_components(good)  # type: ignore[arg-type]
    await db.patch_components([])
    assert round_trips == []


async def test_what_patches_make_can_be_read(db: DatabaseAdapter, agent_world: Scene) -> None:
    """However deep: one component that cannot be read would take along every list that it is in."""
    (id,) = await db.create_components([of_scene(agent_world)])
    deepest: Any = []
    while True:
        try:
            await db.patch_component(id, [op("set", "depth", deepest)])
        except ArgumentError:
            break
        fits, deepest = deepest, [deepest]
    path = ".".join("a" * 250)
    await db.patch_component(id, [op("set", path, [fits[0]]), op("push", path, fits)])
    [component] = await db.get_components(agent_world.entity)
    found: Any = component.data
    for _ in range(250):
        found = found["a"]
    assert found == [fits[0], fits]


async def test_concurrent_patches_lose_nothing(make_db: MakeAdapter) -> None:
    first = await make_db()
    scene = await make_scene(first)
    adapters = [first, *[await make_db(first.agent_id) for _ in range(3)]]
    ids = await first.create_components([of_scene(scene, type=f"{n}", data={"n": 0, "l": []}) for n in range(5)])

    async def patch(number: int) -> None:
        order = ids if number % 2 else ids[::-1]
        ops = [op("increment", "n", 1), op("push", "l", number), op("set", f"by.n{number}", True)]
        await adapters[number % 4].patch_components([{"componentId": id, "ops": ops} for id in order])

    await asyncio.gather(*(patch(number) for number in range(20)))
    for component in await first.get_components_by_ids(ids):
        assert component.data is not None
        assert component.data["n"] == 20
        assert sorted(component.data["l"]) == list(range(20))
        assert len(component.data["by"]) == 20


class WrongError(Exception):
    """The model's DataError."""


def apply(data: Any, ops: Ops) -> Any:
    """Apply operations as patch_components is meant to."""
    data = copy.deepcopy(data)
    for step in ops:
        kind, parts = step["op"], step["path"].split(".")
        place, missing, wrong = data, False, False
        parents = []
        for number, part in enumerate(parts):
            parents.append(place)
            if isinstance(place, dict):
                missing = part not in place
            elif isinstance(place, list) and part.isdigit() and int(part) <= len(place):
                missing = int(part) == len(place)
            else:
                wrong = True
                break
            if missing and (kind != "set" or number == len(parts) - 1):
                break
            if missing:
                put(place, part, [] if parts[number + 1].isdigit() else {})
                missing = False
            place = place[int(part)] if isinstance(place, list) else place[part]
        if kind == "remove":
            if not wrong and not missing:
                del parents[-1][int(parts[-1]) if isinstance(parents[-1], list) else parts[-1]]
        elif wrong:
            raise WrongError
        elif kind == "set":
            put(parents[-1], parts[-1], copy.deepcopy(step["value"]))
        elif missing:
            raise WrongError
        elif kind == "push":
            if not isinstance(place, list):
                raise WrongError
            place.append(copy.deepcopy(step["value"]))
        elif isinstance(place, bool) or not isinstance(place, (int, float)):
            raise WrongError
        else:
            put(parents[-1], parts[-1], float(Decimal(repr(place)) + Decimal(repr(step["value"]))))
    return data


def put(container: Any, part: str, value: Any) -> None:
    if isinstance(container, dict):
        container[part] = value
    elif int(part) == len(container):
        container.append(value)
    else:
        container[int(part)] = value


NUMBERS = st.integers(-99, 99) | st.sampled_from([0.1, 0.2, -1.5, 1e6])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.sampled_from(["", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc01"), inner, max_size=3),
    max_leaves=8,
)
PATHS = st.builds(
    lambda first, rest: ".".join([first, *rest]),
    st.sampled_from("abc"),
    st.lists(st.sampled_from("abc012"), max_size=3),
)
OPS = st.one_of(
    st.builds(op, st.just("set"), PATHS, VALUES),
    st.builds(op, st.just("push"), PATHS, VALUES),
    st.builds(op, st.just("remove"), PATHS),
    st.builds(op, st.just("increment"), PATHS, NUMBERS),
)


@given(data=st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3), ops=st.lists(OPS, max_size=5))
@settings(max_examples=250)
async def test_patch_is_the_model(db: DatabaseAdapter, agent_world: Scene, data: Any, ops: Ops) -> None:
    (id,) = await db.create_components([of_scene(agent_world, type=uuid4().hex, data=data)])
    try:
        wanted = apply(data, ops)
    except WrongError:
        with pytest.raises(DataError, match=f"component {id}, operation"):
            await db.patch_component(id, ops)
        wanted = data
    else:
        await db.patch_component(id, ops)
    assert (await stored(db, id)).data == wanted


# --- read ------------------------------------------------------------------------------------------------------------


async def test_get_component_is_always_the_same_one(db: DatabaseAdapter, agent_world: Scene) -> None:
    s = agent_world
    keys = [(None, None), (s.world, None), (None, s.other), (s.world, s.other)]
    ids = await db.create_components(
        [
            of_scene(s, world_id=world, source_entity_id=source, created_at=T0 - timedelta(n))
            for n, (world, source) in enumerate(keys)
        ]
    )

    async def ask(*key: Any) -> UUID | None:
        component = await db.get_component(s.entity, "t", *key)
        return None if component is None else component.id

    assert await ask() == ids[3]
    assert await ask(s.world) == ids[3]
    assert await ask(None, s.other) == ids[3]
    assert await ask(s.world, s.other) == ids[3]
    await db.delete_component(ids[3])
    assert await ask() == ids[2]
    assert await ask(s.world) == ids[1]
    assert await ask(s.world, s.other) is None
    assert await db.get_component(s.other, "t") is None
    assert await db.get_component(s.entity, "T") is None
    same = await db.create_components([of_scene(s, type=f"{n}", created_at=T0) for n in range(4)])
    listed = [component.id for component in await db.get_components(s.entity)]
    assert listed == [ids[2], ids[1], *sorted([ids[0], *same])]
    assert [component.id for component in await db.get_components(s.entity, s.world)] == [ids[1]]
    assert [component.id for component in await db.get_components(s.entity, None, s.other)] == [ids[2]]


async def test_natural_keys_take_none_for_a_value(db: DatabaseAdapter, agent_world: Scene) -> None:
    s = agent_world
    keys: list[dict[str, Any]] = [
        {"entityId": s.entity, "type": "t"},
        {"entityId": s.entity, "type": "t", "worldId": s.world},
        {"entityId": str(s.entity), "type": "t", "sourceEntityId": s.other},
        {"entityId": s.entity, "type": "t", "worldId": s.world, "sourceEntityId": s.other},
    ]
    ids = await db.create_components([{**key, "roomId": s.room} for key in keys])
    asked = [
        keys[3],
        {"entityId": s.other, "type": "t"},
        keys[0],
        keys[2],
        keys[1],
        keys[0],
        {**keys[0], "type": INJECTION},
    ]
    found = await db.get_components_by_natural_keys(asked)
    wanted = [ids[3], None, ids[0], ids[2], ids[1], ids[0], None]
    assert [component and component.id for component in found] == wanted
    await db.delete_component(ids[0])
    assert await db.get_components_by_natural_keys(keys[:1]) == [None]
    assert await db.get_components_by_natural_keys([]) == []
    for bad in ({"type": "t"}, {"entityId": s.entity}, {"entityId": s.entity, "type": None}, "x"):
        with pytest.raises(ArgumentError, match="position 1"):
            await db.get_components_by_natural_keys([keys[0], bad])  # type: ignore[list-item]


async def test_reads_of_many_are_in_order(db: DatabaseAdapter, agent_world: Scene) -> None:
    s = agent_world
    mine = await db.create_components([of_scene(s, type=f"{n}", created_at=T0 - timedelta(n)) for n in range(3)])
    others = await db.create_components(
        [of_scene(s, entity_id=s.other, type=f"{n}", world_id=s.world) for n in range(2)]
    )
    asked = [others[1], NOWHERE, mine[0], mine[2], others[1]]
    assert [component.id for component in await db.get_components_by_ids(asked)] == [others[1], mine[0], mine[2]]
    flat = await db.get_components_for_entities([s.other, NOWHERE, s.entity, s.other])
    assert [component.id for component in flat] == [*sorted(others), *mine[::-1]]
    in_world = await db.get_components_for_entities([s.other, s.entity], s.world)
    assert [component.id for component in in_world] == sorted(others)
    assert await db.get_components_for_entities([]) == await db.get_components_by_ids([]) == []


async def test_another_agents_components_are_out_of_reach(make_db: MakeAdapter) -> None:
    mine, other = await make_db(), await make_db()
    s = await make_scene(other)
    (id,) = await other.create_components([of_scene(s, data={"n": 1})])
    before = await other.get_components(s.entity)
    assert await mine.get_component(s.entity, "t") is None
    assert await mine.get_components(s.entity) == await mine.get_components_by_ids([id]) == []
    assert await mine.get_components_by_natural_keys([of_scene(s)]) == [None]
    assert await mine.update_component({"id": id, "data": {}}) is False
    assert await mine.delete_components([id]) == 0
    with pytest.raises(NotFoundError):
        await mine.patch_component(id, [op("set", "n", 2)])
    with pytest.raises(ForeignKeyError):
        await mine.create_component(of_scene(s))
    # The same ids are other entities, rooms and components here.
    await mine.create_entity({"id": s.entity})
    await mine.create_room({"id": s.room, "source": "t", "type": "t"})
    assert await mine.create_component(of_scene(s, id=id)) is True
    await mine.delete_component(id)
    assert await other.get_components(s.entity) == before


# --- round trips and plans -------------------------------------------------------------------------------------------


async def test_one_round_trip_for_changes(db: DatabaseAdapter, agent_world: Scene, round_trips: list[str]) -> None:
    ids = await db.create_components([of_scene(agent_world, type=f"{n}", data={"n": n}) for n in range(3)])
    round_trips.clear()
    await db.update_components([{"id": id, "data": {"n": 1}} for id in ids])
    await db.patch_components([{"componentId": id, "ops": [op("increment", "n", 1)] * 3} for id in ids])
    assert len(round_trips) == 2, round_trips


async def test_plans_read_what_they_give(crowd: Skew) -> None:  # noqa: F811
    s, e, id = crowd, of(crowd, "entity", 5), of(crowd, "component", 5)
    calls: dict[str, dict[str, Any]] = {
        "get_component": {"entity_id": e, "type": "common", "world_id": None, "source_entity_id": None},
        "get_components_for_entities": {"entity_ids": [e], "world_id": None, "source_entity_id": None},
        "get_components_by_ids": {"ids": [id]},
        "get_components_by_natural_keys": {
            "entity_ids": [e],
            "types": ["common"],
            "world_ids": "{NULL}",
            "source_entity_ids": "{NULL}",
        },
        "update_components": {"components": json.dumps([{"id": str(id), "data": {}}]), "required": True},
        "patch_components": {"patches": json.dumps([{"id": str(id), "ops": [op("set", "n", 1)]}])},
        "delete_components": {"ids": [id]},
    }
    for name, params in calls.items():
        rows = await read_rows(s, SQL[name], **params)
        assert 0 < sum(rows.values()) <= 3, (name, rows)


async def test_create_reads_what_it_writes(crowd: Skew) -> None:  # noqa: F811
    """Its statements run inside a function, where EXPLAIN does not look: the blocks that it touches are counted."""
    s = crowd
    for number in range(2):
        row = {
            "id": str(uuid4()),
            "entity_id": str(of(s, "entity", 5)),
            "room_id": str(of(s, "room", 5)),
            "type": "new",
        }
        text = await s.session.fetchval(
            "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) SELECT elizasql.create_components("
            f"'{s.agent}', '{json.dumps([row])}')"
        )
        plan = json.loads(text)[0]["Plan"]
        # The first call also reads the catalog, to compile the function and to plan.
        assert number == 0 or plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] <= ENOUGH, plan
