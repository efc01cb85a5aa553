"""Entities: create, find, search by name, query by components, change and delete."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import itertools
import json
import random
from collections.abc import AsyncIterator
from datetime import datetime, timedelta, timezone
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elizasql import (
    ArgumentError,
    Component,
    DatabaseAdapter,
    Entity,
    ForeignKeyError,
    NotFoundError,
)
from elizasql._statements import SQL, Statement

from .conftest import MakeAdapter, Scene, make_scene
from .skew import LARGE, Skew, load
from .test_plans import plan_of

T0 = datetime(2026, 1, 1, tzinfo=timezone.utc)
INJECTION = "'; DROP TABLE elizasql.entities; -- $1 %s :x \\"
NOWHERE = UUID(int=2**128 - 1)


async def found(db: DatabaseAdapter, id: UUID) -> Entity:
    entity = await db.get_entity(id)
    assert entity is not None
    return entity


async def named(db: DatabaseAdapter, *names: list[str]) -> list[UUID]:
    """Create an entity for each list of names; the ids ascend."""
    ids = sorted(uuid4() for _ in names)
    return await db.create_entities([Entity(id=id, names=given) for id, given in zip(ids, names, strict=True)])


# --- create ----------------------------------------------------------------------------------------------------------


async def test_create_gives_everything_back(db: DatabaseAdapter) -> None:
    given = Entity(id=uuid4(), names=["Ann", INJECTION, ""], metadata={"a": [1, None]}, created_at=T0)
    before = copy.deepcopy(given)
    assert given.id is not None
    assert await db.create_entity(given) == given.id
    assert given == before
    given.agent_id = db.agent_id
    assert await db.get_entity(str(given.id)) == given


async def test_create_fills_in_what_is_missing(db: DatabaseAdapter) -> None:
    ids = [uuid4() for _ in range(3)]
    await db.create_entities([{"id": ids[0]}, {"id": ids[1], "names": "one"}, {"id": ids[2], "metadata": None}])
    entities = await db.get_entities_by_ids(ids)
    assert [entity.names for entity in entities] == [[], ["one"], []]
    assert [entity.metadata for entity in entities] == [{}] * 3
    assert all(entity.components is None for entity in entities)


async def test_create_leaves_what_is_there_and_makes_what_is_new(db: DatabaseAdapter) -> None:
    old, new = uuid4(), uuid4()
    await db.create_entity({"id": old, "names": ["first"]})
    batch = [{"id": old, "names": ["second"]}, {"id": new, "names": ["n"]}, {"id": new, "names": ["m"]}]
    assert await db.create_entities(batch) == [old, new, new]
    assert [entity.names for entity in await db.get_entities_by_ids([old, new])] == [["first"], ["n"]]
    assert await db.ensure_entity_exists({"id": old}) is True
    assert (await found(db, old)).names == ["first"]


async def test_create_of_a_bad_one_writes_none(make_db: MakeAdapter, round_trips: list[str]) -> None:
    db = await make_db(batch_size=2)
    round_trips.clear()
    good = [{"id": uuid4()} for _ in range(3)]
    for bad in (
        {},
        {"id": "x"},
        {"id": uuid4(), "names": [1]},
        {"id": uuid4(), "agentId": uuid4()},
        {"id": NOWHERE, "x": 1},
    ):
        with pytest.raises(ArgumentError, match="position 3"):
            await db.create_entities([*good, bad])
    with pytest.raises(ArgumentError, match="collection"):
        await db.create_entities(Entity(id=uuid4()))  # type: ignore[arg-type]
    assert round_trips == []
    assert await db.create_entities([]) == []
    assert round_trips == []


async def test_create_without_the_agent_is_an_error(make_db: MakeAdapter) -> None:
    db = await make_db()
    await db.delete_agent(db.agent_id)
    with pytest.raises(ForeignKeyError) as caught:
        await db.create_entity({"id": uuid4()})
    assert caught.value.constraint == "entities_agent_fkey"


async def test_text_that_the_server_cannot_store(db: DatabaseAdapter) -> None:
    id = uuid4()
    await db.create_entity({"id": id, "names": ["a\x00b", "\ud83d\ude00", "\ud800"], "metadata": {"k": "\x00"}})
    entity = await found(db, id)
    assert (entity.names, entity.metadata) == (["a\ufffdb", "😀", "\ufffd"], {"k": "\ufffd"})
    assert [entity.id for entity in await db.get_entities_by_names(["a\x00b"])] == [id]
    assert [entity.id for entity in await db.search_entities_by_name("a\x00")] == [id]


# --- upsert, update, delete ------------------------------------------------------------------------------------------


async def test_upsert_changes_only_what_is_given(db: DatabaseAdapter) -> None:
    old, new = uuid4(), uuid4()
    await db.create_entity(Entity(id=old, names=["n"], metadata={"a": 1}, created_at=T0))
    batch: list[Any] = [{"id": old, "metadata": {"b": 2}}, Entity(id=new, names=["x"]), {"id": old, "names": None}]
    assert await db.upsert_entities(batch) == [old, new, old]
    assert await found(db, old) == Entity(old, db.agent_id, [], {"b": 2}, T0)
    assert (await found(db, new)).names == ["x"]
    entity = await found(db, old)
    entity.names = ["back"]
    await db.upsert_entities([entity])
    assert await found(db, old) == Entity(old, db.agent_id, ["back"], {"b": 2}, T0)


async def test_concurrent_upserts_make_one_entity(db: DatabaseAdapter) -> None:
    ids = [uuid4() for _ in range(5)]
    batches = [ids, ids[::-1]] * 4
    await asyncio.gather(*(db.upsert_entities([{"id": id, "names": ["n"]} for id in batch]) for batch in batches))
    assert len(await db.get_entities_by_ids(ids)) == 5


async def test_update_changes_only_what_is_given(db: DatabaseAdapter) -> None:
    id = uuid4()
    await db.create_entity(Entity(id=id, names=["n"], metadata={"a": 1}, created_at=T0))
    assert await db.update_entity({"id": id, "metadata": {"b": 2}}) is True
    assert await found(db, id) == Entity(id, db.agent_id, ["n"], {"b": 2}, T0)
    assert await db.update_entity(Entity(id=id, names=["m", "o"])) is True
    assert await found(db, id) == Entity(id, db.agent_id, ["m", "o"], {"b": 2}, T0)
    assert await db.update_entity({"id": id}) is True
    assert await found(db, id) == Entity(id, db.agent_id, ["m", "o"], {"b": 2}, T0)
    assert await db.update_entity({"id": id, "names": None, "metadata": None, "created_at": T0 + timedelta(1)})
    assert await found(db, id) == Entity(id, db.agent_id, [], {}, T0 + timedelta(1))


async def test_a_time_of_creation_that_comes_back_in_milliseconds_stays(db: DatabaseAdapter) -> None:
    given = Entity(id=uuid4(), names=["old"], created_at=T0 + timedelta(microseconds=1234))
    assert given.id is not None
    await db.create_entity(given)
    await db.update_entity({**given.to_dict(), "names": ["new"]})
    stored = await found(db, given.id)
    assert (stored.names, stored.created_at) == (["new"], given.created_at)


async def test_update_of_what_is_not_there(make_db: MakeAdapter) -> None:
    db = await make_db(batch_size=2)
    ids = await named(db, ["a"], ["b"], ["c"])
    assert await db.update_entity({"id": uuid4(), "names": ["x"]}) is False
    with pytest.raises(NotFoundError, match=str(NOWHERE)):
        await db.update_entities([{"id": id, "names": ["x"]} for id in [*ids, NOWHERE]])
    assert [entity.names for entity in await db.get_entities_by_ids(ids)] == [["a"], ["b"], ["c"]]
    await db.update_entities([{"id": ids[0], "names": ["x"]}, {"id": ids[1], "metadata": {"y": 1}}, {"id": ids[0]}])
    assert [entity.names for entity in await db.get_entities_by_ids(ids)] == [["x"], ["b"], ["c"]]


async def test_update_refuses_before_anything_is_sent(db: DatabaseAdapter, round_trips: list[str]) -> None:
    for bad in ({"names": ["x"]}, {"id": None}, {"id": uuid4(), "created_at": None}, {"id": uuid4(), "name": "x"}):
        with pytest.raises(ArgumentError):
            await db.update_entity(bad)
    await db.update_entities([])
    assert round_trips == []


async def test_an_entity_with_its_components_can_be_written_back(db: DatabaseAdapter, agent_world: Scene) -> None:
    await db.create_component({"entityId": agent_world.entity, "roomId": agent_world.room, "type": "t"})
    entity = await db.get_entity(agent_world.entity, include_components=True)
    assert entity is not None
    assert entity.components is not None
    entity.names = ["Anna"]
    assert await db.update_entity(entity) is True
    assert await db.create_entities([entity, entity.to_dict()]) == [entity.id] * 2
    assert await db.upsert_entities([entity]) == [entity.id]
    assert await db.get_entity(agent_world.entity, include_components=True) == entity
    # Times of the JSON form are whole milliseconds.
    again = Entity.from_dict(json.loads(json.dumps(entity.to_dict())))
    assert again.components is not None
    assert again.components[0].id == entity.components[0].id


async def test_delete_takes_what_hangs_on_it(
    db: DatabaseAdapter, agent_world: Scene, raw: asyncpg.Connection[Any]
) -> None:
    s = agent_world
    await db.create_component({"entityId": s.entity, "roomId": s.room, "type": "own"})
    await db.create_component({"entityId": s.other, "roomId": s.room, "type": "said", "sourceEntityId": s.entity})
    await db.create_relationships([{"sourceEntityId": s.other, "targetEntityId": s.entity}])
    await db.create_memory({"entityId": s.entity, "roomId": s.room, "content": {}}, "messages")
    assert await db.delete_entity(s.entity) is True
    assert await db.delete_entity(s.entity) is False
    for table in ("components", "relationships", "memories"):
        left = await raw.fetchval(f"SELECT count(*) FROM elizasql.{table} WHERE agent_id = $1", db.agent_id)
        assert left == 0, table
    assert await db.get_participants_for_room(s.room) == [s.other]


async def test_delete_many_gives_the_number(make_db: MakeAdapter) -> None:
    db = await make_db(batch_size=2)
    ids = await named(db, *[["x"]] * 5)
    assert await db.delete_entities([*ids[:4], ids[0], uuid4()]) == 4
    assert await db.delete_entities([]) == 0
    assert [entity.id for entity in await db.get_entities_by_ids(ids)] == ids[4:]


# --- read ------------------------------------------------------------------------------------------------------------


async def test_get_by_ids_is_in_order(db: DatabaseAdapter) -> None:
    ids = await named(db, ["a"], ["b"], ["c"])
    asked: list[Any] = [ids[2], uuid4(), ids[0], str(ids[1]), ids[2]]
    assert [entity.id for entity in await db.get_entities_by_ids(asked)] == [ids[2], ids[0], ids[1]]
    assert await db.get_entity_by_ids(asked) == await db.get_entities_by_ids(asked)
    assert await db.get_entities_by_ids([]) == []
    with pytest.raises(ArgumentError):
        await db.get_entities_by_ids(str(ids[0]))


async def test_components_come_when_asked_for(db: DatabaseAdapter, agent_world: Scene) -> None:
    s = agent_world
    components = [
        Component(uuid4(), db.agent_id, s.entity, s.room, world, source, "t", {"n": n}, T0 - timedelta(n))
        for n, (world, source) in enumerate([(None, None), (s.world, None), (None, s.other), (s.world, s.entity)])
    ]
    await db.create_components(components)
    first, second = await db.get_entities_by_ids([s.other, s.entity], include_components=True)
    assert first.components == []
    assert second.components == components[::-1]
    for entities in (
        await db.get_entities_for_room(s.room, include_components=True),
        await db.query_entities(entity_ids=[s.entity, s.other]),
    ):
        assert {entity.id: entity.components for entity in entities} == {s.other: [], s.entity: components[::-1]}
    assert [entity.components for entity in await db.get_entities_for_room(s.room)] == [None, None]


async def test_get_for_rooms_is_in_the_order_of_the_rooms(db: DatabaseAdapter, agent_world: Scene) -> None:
    rooms = [await db.create_room({"source": "t", "type": "t"}) for _ in range(2)]
    ids = [uuid4() for _ in range(4)]
    times = [T0, T0, T0 + timedelta(1), T0 - timedelta(1)]
    await db.create_entities([Entity(id=id, created_at=time) for id, time in zip(ids, times, strict=True)])
    await db.add_participants_room(ids, rooms[0])
    lists = await db.get_entities_for_rooms([rooms[1], rooms[0], NOWHERE, agent_world.room, rooms[0]])
    wanted = [ids[3], *sorted(ids[:2]), ids[2]]
    assert [[entity.id for entity in entities] for entities in lists[:3]] == [[], wanted, []]
    assert {entity.id for entity in lists[3]} == {agent_world.entity, agent_world.other}
    assert lists[4] == lists[1]
    assert await db.get_entities_for_room(rooms[0]) == lists[1]
    assert await db.get_entities_for_rooms([]) == []


async def test_get_by_names_is_exact(db: DatabaseAdapter) -> None:
    ids = await named(db, ["Ann", "Annie"], ["ann"], ["Bob", "Ann"], ["Ann "], [""], ["A_n"])

    async def ask(*names: str) -> list[UUID | None]:
        return [entity.id for entity in await db.get_entities_by_names(names)]

    assert set(await ask("Ann")) == {ids[0], ids[2]}
    assert await ask("Ann", "Bob", "Ann") == await ask("Bob", "Ann")
    assert await ask("ann") == [ids[1]]
    assert await ask("A_n") == [ids[5]]
    assert await ask("A%", "An", INJECTION) == []
    assert await ask("") == [ids[4]]
    assert await ask() == []
    with pytest.raises(ArgumentError):
        await db.get_entities_by_names("Ann")
    with pytest.raises(ArgumentError):
        await db.get_entities_by_names([1])  # type: ignore[list-item]


async def test_names_are_looked_up_for_the_adapters_agent(db: DatabaseAdapter, round_trips: list[str]) -> None:
    [id] = await named(db, ["Ann"])
    for agent in (db.agent_id, str(db.agent_id), None):
        assert [entity.id for entity in await db.get_entities_by_names(["Ann"], agent_id=agent)] == [id]
        assert [entity.id for entity in await db.search_entities_by_name("ann", agent_id=agent)] == [id]
    round_trips.clear()
    for stranger in (uuid4(), "Ann"):
        for search in (
            db.get_entities_by_names(["Ann"], agent_id=stranger),
            db.search_entities_by_name("", agent_id=stranger),
        ):
            with pytest.raises(ArgumentError, match="agent"):
                await search
    assert round_trips == []


async def test_get_by_names_is_oldest_first(db: DatabaseAdapter) -> None:
    ids = [uuid4() for _ in range(6)]
    times = [T0 + timedelta(n % 3) for n in range(6)]
    await db.create_entities([Entity(id=id, names=["N"], created_at=t) for id, t in zip(ids, times, strict=True)])
    wanted = [id for _, id in sorted(zip(times, ids, strict=True))]
    assert [entity.id for entity in await db.get_entities_by_names(["N"])] == wanted


# --- search ----------------------------------------------------------------------------------------------------------


def rank(names: list[str], query: str) -> int | None:
    """Rank as search_entities_by_name is meant to."""
    folded = [name.lower() for name in names]
    wanted = query.lower()
    if wanted in folded:
        return 0
    if any(name.startswith(wanted) for name in folded):
        return 1
    return 2 if any(wanted in name for name in folded) else None


def search(crowd: dict[UUID, list[str]], query: str, limit: int) -> list[UUID]:
    hits = [(r, id) for id, names in crowd.items() if (r := rank(names, query)) is not None]
    return [id for _, id in sorted(hits)][:limit]


async def test_search_ranks_exact_prefix_substring(db: DatabaseAdapter) -> None:
    ids = await named(db, ["Joanne"], ["x", "anne"], ["Anne-Marie"], ["ANNE"], ["Bob"], ["Anne-Marie", "Anne"])
    result = [entity.id for entity in await db.search_entities_by_name("anne")]
    assert result == [ids[1], ids[3], ids[5], ids[2], ids[0]]
    assert [entity.id for entity in await db.search_entities_by_name("ANNE", limit=3)] == result[:3]
    assert await db.search_entities_by_name("anne", limit=0) == []
    entity = (await db.search_entities_by_name("bob"))[0]
    assert entity == await db.get_entity(ids[4])


async def test_search_takes_wildcards_for_text(db: DatabaseAdapter) -> None:
    ids = await named(db, ["100%"], ["a_b"], ["axb"], ["back\\slash"], ["[a]*"], ["it's"])
    for query, wanted in (
        ("%", [0]),
        ("_", [1]),
        ("a_b", [1]),
        ("\\", [3]),
        ("[a]*", [4]),
        (".", []),
        ("'", [5]),
        (INJECTION, []),
    ):
        assert [entity.id for entity in await db.search_entities_by_name(query)] == [ids[n] for n in wanted], query


async def test_blank_search_gives_the_first_by_id(db: DatabaseAdapter) -> None:
    ids = await named(db, *[[f"n{i}"] for i in range(12)])
    for query in ("", "  ", "\t\n"):
        assert [entity.id for entity in await db.search_entities_by_name(query)] == ids[:10]
    assert [entity.id for entity in await db.search_entities_by_name("", limit=None)] == ids
    assert len(await db.search_entities_by_name("n", limit=None)) == 12


async def test_search_ignores_case_beyond_ascii(db: DatabaseAdapter) -> None:
    ids = await named(db, ["ÉVA"], ["Łukasz"], ["Юлия"], ["田中太郎"], ["Ünal"])
    for query, wanted in (("éva", 0), ("łuk", 1), ("ли", 2), ("ю", 2), ("中", 3), ("太郎", 3), ("ü", 4)):
        assert [entity.id for entity in await db.search_entities_by_name(query)] == [ids[wanted]], query


async def test_search_refuses_before_anything_is_sent(db: DatabaseAdapter, round_trips: list[str]) -> None:
    for query, limit in ((None, 10), (3, 10), ("x", -1), ("x", "10"), ("x", True)):
        with pytest.raises(ArgumentError):
            await db.search_entities_by_name(query, limit)  # type: ignore[arg-type]
    assert round_trips == []


CROWD = 1700
QUERIES = [
    *(
        "u",
        "us",
        "use",
        "user",
        "user_",
        "user_1",
        "user_17",
        "r_1",
        "_",
        "1",
        "7",
        "17",
        "z",
        "zz",
        "zzz",
        "~",
        "~~",
        "~~~",
    ),
    *(
        "common",
        "comm",
        "ommo",
        "on",
        "mo",
        "common 5",
        "rare",
        "rare 33",
        "e 3",
        "qu",
        "quux",
        "uux",
        "UUX",
        "xx",
        "ö",
        "öl",
    ),
    *("öln", "köln", "köl", "k", "same", "sam", "ame", "s", "sa"),
]


async def test_search_of_a_crowd_is_the_model(db: DatabaseAdapter, make_db: MakeAdapter) -> None:
    """Names that nearly all have, that many, few or none have: every way that the statement can take.

    Another agent has some of each, with ids that come before.
    """
    dice = random.Random(7)
    ids = sorted(uuid4() for _ in range(CROWD))
    crowd: dict[UUID, list[str]] = {}
    for n, id in enumerate(ids):
        names = [f"user_{n}"]
        if n % 40:
            names.append(f"{dice.choice(['', 'x'])}common {n % 90}")
        if n % 300 == 299:
            names = [f"rare {n}", "Köln"]
        if n > 100 and n % 4:
            names.insert(0, "Same")
        if n in {1500, 1600}:
            names.append("quux" if n == 1500 else "the quuxes")
        crowd[id] = names
    await db.create_entities([Entity(id=id, names=names) for id, names in crowd.items()])
    other = await make_db()
    some = [id for n, id in enumerate(ids) if n % 7 == 0 or n in {1500, 1600}]
    await other.create_entities([Entity(id=UUID(int=id.int >> 64), names=crowd[id]) for id in some])
    for limit in (1, 10, 200, 5000):
        for query in QUERIES:
            result = [entity.id for entity in await db.search_entities_by_name(query, limit)]
            assert result == search(crowd, query, limit), (query, limit)


@given(
    crowd=st.lists(st.lists(st.text("abcäß中", max_size=6), max_size=3), min_size=1, max_size=6),
    queries=st.lists(st.text("abcäß中AÄ", min_size=1, max_size=4), min_size=1, max_size=6),
    limit=st.integers(1, 4),
)
@settings(max_examples=40)
@pytest.mark.usefixtures("db")  # which keeps the connections that every example's adapter shares
async def test_search_is_the_model(
    make_db: MakeAdapter, crowd: list[list[str]], queries: list[str], limit: int
) -> None:
    # 100 entities that match nothing, and come first, take the walk out of the way of the index.
    db = await make_db(dimension=None)
    try:
        await db.create_entities([{"id": UUID(int=n), "names": ["xyz"]} for n in range(1, 101)])
        ids = sorted(uuid4() for _ in crowd)
        assert ids[0].int > 100
        await db.create_entities([{"id": id, "names": names} for id, names in zip(ids, crowd, strict=True)])
        model = dict(zip(ids, crowd, strict=True))
        for query in queries:
            result = [entity.id for entity in await db.search_entities_by_name(query, limit)]
            assert result == search(model, query, limit), query
            exact = {entity.id for entity in await db.get_entities_by_names([query])}
            assert exact == {id for id, names in model.items() if query in names}
    finally:
        await db.close()


async def test_names_are_found_as_they_are_now(db: DatabaseAdapter) -> None:
    (id,) = await named(db, ["Before"])
    await db.create_entities([{"id": uuid4(), "names": ["x"]} for _ in range(150)])
    await db.update_entity({"id": id, "names": ["After"]})
    assert await db.search_entities_by_name("before") == []
    assert [entity.id for entity in await db.search_entities_by_name("aft")] == [id]
    await db.delete_entity(id)
    assert await db.search_entities_by_name("aft") == []
    assert await db.get_entities_by_names(["After"]) == []


# --- query_entities --------------------------------------------------------------------------------------------------


async def test_query_combines_all_filters(db: DatabaseAdapter) -> None:
    scene = await make_scene(db)
    other_world = await db.create_world({"name": "other"})
    await db.delete_entities([scene.entity, scene.other])
    ids = sorted(uuid4() for _ in range(8))
    await db.create_entities([Entity(id=id) for id in ids])
    components = [
        Component(
            id=uuid4(),
            agent_id=db.agent_id,
            entity_id=ids[n % 7],
            room_id=scene.room,
            world_id=[None, scene.world, other_world][n % 3],
            type=["a", "b"][n % 2],
            data={"n": n % 4, "tags": [f"t{n % 5}", "all"], "deep": {"x": {"y": n % 2}}},
            created_at=T0 + timedelta(n),
        )
        for n in range(28)
    ]
    # Some of them share a natural key, and then the first one counts.
    stored = dict(zip(await db.create_components(components), components, strict=True))
    mine = {id: component for id, component in stored.items() if component.id == id}

    def contains(value: Any, part: Any) -> bool:
        if isinstance(part, dict):
            return isinstance(value, dict) and all(k in value and contains(value[k], v) for k, v in part.items())
        if isinstance(part, list):
            return isinstance(value, list) and all(any(contains(item, p) for item in value) for p in part)
        return bool(value == part)

    def model(
        kind: str | None, data: Any, world: UUID | None, among: list[UUID] | None, limit: int | None, offset: int | None
    ) -> list[UUID]:
        def fits(component: Component) -> bool:
            return (
                (kind is None or component.type == kind)
                and (data is None or contains(component.data, data))
                and (world is None or component.world_id == world)
            )

        hits = ids if among is None else [id for id in ids if id in among]
        if kind is not None or data is not None or world is not None:
            hits = [id for id in hits if any(fits(c) for c in mine.values() if c.entity_id == id)]
        return hits[offset or 0 :][: len(hits) if limit is None else limit]

    checked = 0
    for kind, data, world, among, (limit, offset), include_all in itertools.product(
        (None, "a", "none"),
        (None, {"n": 1}, {"tags": ["t2", "all"], "deep": {"x": {}}}, {}),
        (None, scene.world, uuid4()),
        (None, [ids[6], ids[2], ids[7], ids[6], uuid4()]),
        ((None, None), (2, None), (2, 1), (None, 3), (0, None)),
        (False, True),
    ):
        if kind is None and data is None and world is None and among is None and limit is None:
            continue
        entities = await db.query_entities(
            component_type=kind,
            component_data_filter=data,
            world_id=world,
            entity_ids=among,
            limit=limit,
            offset=offset,
            include_all_components=include_all,
        )
        case = (kind, data, world, among, limit, offset, include_all)
        assert [entity.id for entity in entities] == model(kind, data, world, among, limit, offset), case
        for entity in entities:
            wanted = [
                component
                for component in sorted(mine.values(), key=lambda c: (c.created_at, c.id))
                if component.entity_id == entity.id and (include_all or kind is None or component.type == kind)
            ]
            assert entity.components == wanted, case
        checked += bool(entities)
    assert checked > 100


async def test_query_counts_entities_and_not_components(db: DatabaseAdapter, agent_world: Scene) -> None:
    s = agent_world
    for entity in (s.entity, s.other):
        await db.create_components(
            [
                {"entityId": entity, "roomId": s.room, "type": "t", "sourceEntityId": source}
                for source in (s.entity, s.other)
            ]
        )
    page = await db.query_entities(component_type="t", limit=2)
    assert {entity.id for entity in page} == {s.entity, s.other}
    assert [len(entity.components or []) for entity in page] == [2, 2]


async def test_query_needs_a_filter_or_a_limit(db: DatabaseAdapter, round_trips: list[str]) -> None:
    refused: list[dict[str, Any]] = [
        {},
        {"offset": 3},
        {"include_all_components": True},
        {"component_data_filter": [1]},
        {"limit": -1},
        {"offset": 1.5, "limit": 1},
        {"agent_id": uuid4(), "limit": 1},
        {"entity_ids": str(uuid4())},
    ]
    for bad in refused:
        with pytest.raises(ArgumentError):
            await db.query_entities(**bad)
    assert await db.query_entities(entity_ids=[]) == []
    assert round_trips == []
    assert await db.query_entities(limit=5, agent_id=db.agent_id) == []


# --- two agents ------------------------------------------------------------------------------------------------------


async def test_another_agents_entities_are_out_of_reach(make_db: MakeAdapter) -> None:
    mine, other = await make_db(), await make_db()
    scene = await make_scene(other)
    await other.create_component({"entityId": scene.entity, "roomId": scene.room, "worldId": scene.world, "type": "t"})
    before = await other.get_entities_by_ids([scene.entity, scene.other], include_components=True)
    ids = [scene.entity, scene.other]

    assert await mine.get_entities_by_ids(ids) == []
    assert await mine.get_entities_for_rooms([scene.room], True) == [[]]
    assert await mine.get_entities_by_names(["Ann", "Bob"]) == []
    assert await mine.search_entities_by_name("an") == await mine.search_entities_by_name("") == []
    given: list[dict[str, Any]] = [
        {"component_type": "t"},
        {"world_id": scene.world},
        {"entity_ids": ids},
        {"limit": 9},
    ]
    for filters in given:
        assert await mine.query_entities(**filters) == []
    assert await mine.update_entity({"id": scene.entity, "names": ["stolen"]}) is False
    with pytest.raises(NotFoundError):
        await mine.update_entities([{"id": scene.entity, "names": ["stolen"]}])
    assert await mine.delete_entities(ids) == 0
    # The same ids are other entities here.
    await mine.upsert_entities([{"id": scene.entity, "names": ["mine"]}])
    assert await mine.delete_entity(scene.entity) is True
    assert await other.get_entities_by_ids(ids, include_components=True) == before


# --- round trips and plans -------------------------------------------------------------------------------------------

CROWD_LOAD = """
UPDATE elizasql.entities SET names = ARRAY['Name ' || md5(id::text), 'user_' || substr(md5(id::text), 1, 4)]
WHERE agent_id = '{agent}' OR id = md5('entity1')::uuid;

INSERT INTO elizasql.components (agent_id, id, entity_id, room_id, world_id, type, data, created_at)
SELECT
    agent_id, md5('component' || n)::uuid, md5('entity' || n)::uuid, md5('room' || n)::uuid,
    CASE WHEN n % 4 = 0 THEN md5('world' || 1 + n % 700)::uuid END, CASE WHEN n % 100 = 0 THEN 'rare' ELSE 'common' END,
    jsonb_build_object('n', n), now() - random() * interval '90 days'
FROM owned;

INSERT INTO elizasql.relationships (agent_id, id, source_entity_id, target_entity_id, tags, created_at)
SELECT
    agent_id, md5('relationship' || n)::uuid, md5('entity' || n)::uuid,
    md5('entity' || CASE WHEN n % 2 = 0 THEN 1 ELSE n END)::uuid, ARRAY['t' || n % 9],
    now() - random() * interval '90 days'
FROM owned;
"""


@pytest.fixture
async def crowd(dsn: str) -> AsyncIterator[Skew]:
    """Give one large agent among many small ones, with names, components and relationships; rolled back at the end."""
    async with load(dsn) as skew:
        await skew.session.execute(CROWD_LOAD.format(agent=skew.agent))
        await skew.session.execute("ANALYZE elizasql.entities, elizasql.components, elizasql.relationships")
        yield skew


def of(skew: Skew, kind: str, number: int) -> UUID:
    """Give the id of one of the large agent's rows."""
    return UUID(hashlib.md5(f"{kind}{number}".encode()).hexdigest())


def name_of(entity: UUID) -> str:
    """Give the first name of one of the large agent's entities."""
    return f"Name {hashlib.md5(str(entity).encode()).hexdigest()}"


async def read_rows(skew: Skew, statement: Statement, **params: Any) -> dict[str, float]:
    """Give how many rows each index gave, and how many were thrown away behind it; no table may be scanned."""
    nodes = await plan_of(skew.session, statement, {"agent_id": skew.agent, **params}, execute=True)
    rows: dict[str, float] = {}
    for node in nodes:
        assert node["Node Type"] != "Seq Scan" or not node["Actual Loops"], node
        if "Index Name" in node and node["Actual Loops"]:
            number = (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"]
            rows[node["Index Name"]] = rows.get(node["Index Name"], 0) + number
    return rows


async def test_plans_read_what_they_give(crowd: Skew) -> None:
    s, e = crowd, of(crowd, "entity", 5)
    calls: dict[str, dict[str, Any]] = {
        "get_entities_by_ids": {"ids": [e], "include_components": True},
        "get_entities_for_rooms": {"room_ids": [s.room], "include_components": True},
        "get_entities_by_names": {"names": [name_of(e)]},
        "get_first_entities": {"count": 10},
        "update_entities": {"entities": json.dumps([{"id": str(e), "metadata": {"a": 1}}]), "required": True},
        "delete_entities": {"ids": [e]},
    }
    for name, params in calls.items():
        rows = await read_rows(s, SQL[name], **params)
        assert sum(rows.values()) <= 30, (name, rows)


QUERY = {
    "entity_ids": None,
    "component_type": None,
    "world_id": None,
    "data": None,
    "include_all_components": False,
    "count": 10,
    "skipped": None,
}


async def test_queries_stop_when_they_have_enough(crowd: Skew) -> None:
    s = crowd
    world = of(s, "world", 5)
    calls: list[tuple[dict[str, Any], int]] = [
        ({"component_type": "common"}, 60),
        ({"component_type": "rare", "skipped": 20}, 90),
        ({"component_type": "common", "world_id": world}, 60),
        ({"world_id": world}, 60),
        ({"entity_ids": [of(s, "entity", n) for n in range(20)], "component_type": "common"}, 90),
        ({}, 60),
        # No index holds the data: they are looked at one after the other, until there are enough.
        ({"component_type": "common", "data": '{"n": 5}'}, LARGE + 60),
    ]
    for params, most in calls:
        rows = await read_rows(s, SQL["query_entities"], **{**QUERY, **params})
        assert 0 < sum(rows.values()) <= most, (params, rows)


async def test_searches_read_few(crowd: Skew) -> None:
    """Whether nearly all have a name or nobody, a search does not look at all of the large agent's entities."""
    name = name_of(of(crowd, "entity", 7000))
    for query in ("name", "user_", "ser_", "user_a", "zzz", "qx", "xyzzy", name, name[9:15], "name 1"):
        rows = await read_rows(crowd, SQL["search_entities_by_name"], query=query, count=10)
        by_order = rows.pop("entities_pkey")
        assert by_order <= 1500, (query, by_order)
        assert sum(rows.values()) <= 2 * LARGE, (query, rows)


async def test_the_index_of_names_is_kept_short(raw: asyncpg.Connection[Any]) -> None:
    """Each search reads the list of names that are not in the index yet."""
    options = await raw.fetchval(
        "SELECT reloptions FROM pg_class WHERE oid = 'elizasql.entities_name_grams_idx'::regclass"
    )
    assert options == ["gin_pending_list_limit=256"]
