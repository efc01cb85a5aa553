"""Relationships: directed, one for each pair, found from both sides."""

from __future__ import annotations

import asyncio
import copy
import json
import random
from datetime import datetime, timedelta, timezone
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from elizasql import ArgumentError, DatabaseAdapter, Entity, ForeignKeyError, NotFoundError, Relationship
from elizasql._statements import SQL

from .conftest import MakeAdapter, Scene, make_scene
from .locking import overtaken
from .skew import ENOUGH, Skew
from .test_entities import crowd, of, read_rows  # noqa: F401 - `crowd` is a fixture

T0 = datetime(2026, 1, 1, tzinfo=timezone.utc)
INJECTION = "'; DROP TABLE elizasql.relationships; -- $1 %s :x \\"
NOWHERE = UUID(int=2**128 - 1)


async def people(db: DatabaseAdapter, number: int) -> list[UUID]:
    return await db.create_entities([Entity(id=uuid4()) for _ in range(number)])


def pair(source: UUID, target: UUID, **fields: Any) -> dict[str, Any]:
    return {"sourceEntityId": source, "targetEntityId": target, **fields}


async def stored(db: DatabaseAdapter, id: UUID) -> Relationship:
    (relationship,) = await db.get_relationships_by_ids([id])
    return relationship


def ids_of(relationships: list[Relationship]) -> list[UUID | None]:
    return [relationship.id for relationship in relationships]


# --- create ----------------------------------------------------------------------------------------------------------


async def test_create_gives_everything_back(db: DatabaseAdapter) -> None:
    a, b = await people(db, 2)
    given = Relationship(uuid4(), db.agent_id, a, b, ["friend", INJECTION], {"since": [1, None]}, T0)
    before = copy.deepcopy(given)
    assert await db.create_relationship(given) is True
    assert given == before
    assert await db.get_relationship(str(a), b) == given
    assert await db.get_relationship(source_entity_id=b, target_entity_id=a) is None
    assert Relationship.from_dict(json.loads(json.dumps(given.to_dict()))) == given


async def test_directed_unique_and_to_oneself(db: DatabaseAdapter) -> None:
    a, b = await people(db, 2)
    assert await db.create_relationship(pair(a, b, tags=["first"])) is True
    assert await db.create_relationship(pair(b, a)) is True
    assert await db.create_relationship(pair(a, a)) is True
    assert await db.create_relationship(pair(a, b, tags=["second"])) is False
    relationship = await db.get_relationship(a, b)
    assert relationship is not None
    assert (relationship.tags, relationship.metadata) == (["first"], {})
    assert relationship.created_at is not None


async def test_create_gives_the_ids_that_are_stored(make_db: MakeAdapter) -> None:
    db = await make_db(batch_size=2)
    a, b, c = await people(db, 3)
    (there,) = await db.create_relationships([pair(a, b)])
    new = uuid4()
    ids = await db.create_relationships(
        [
            pair(a, b),
            pair(b, c, id=new, tags=["x"]),
            pair(c, a),
            pair(b, c, id=uuid4()),
            pair(c, a),
            pair(c, c, id=there),
        ]
    )
    assert ids[:2] == [there, new]
    assert ids[2] == ids[4]
    assert ids[3] == new
    assert ids[5] == there
    assert {relationship.id for relationship in await db.get_relationships(entity_ids=[a, b, c])} == set(ids)
    assert (await stored(db, new)).tags == ["x"]


async def test_a_broken_reference_is_an_error_and_writes_none(db: DatabaseAdapter) -> None:
    a, b = await people(db, 2)
    for bad, constraint in ((pair(a, NOWHERE), "target"), (pair(NOWHERE, a), "source")):
        with pytest.raises(ForeignKeyError) as caught:
            await db.create_relationships([pair(a, b), bad])
        assert caught.value.constraint == f"relationships_{constraint}_fkey"
    assert await db.get_relationships(a) == []


async def test_refused_before_anything_is_sent(db: DatabaseAdapter, round_trips: list[str]) -> None:
    a, b = uuid4(), uuid4()
    bad: Any
    for bad in (
        {"sourceEntityId": a},
        {"targetEntityId": a},
        pair(a, b, tags=[1]),
        pair(a, b, tags={"x": 1}),
        pair(a, b, metadata=[]),
        pair(a, b, agentId=uuid4()),
        pair(a, b, tag="x"),
        "x",
    ):
        with pytest.raises(ArgumentError, match="position 1"):
            await db.create_relationships([pair(a, b), bad])
    wrong: Any
    for wrong in ({"id": None}, {"tags": []}):
        with pytest.raises(ArgumentError, match="id is missing"):
            await db.update_relationship(wrong)
    with pytest.raises(ArgumentError):
        await db.create_relationships(pair(a, b))  # type: ignore[arg-type]
    assert await db.create_relationships([]) == []
    await db.update_relationships([])
    assert await db.delete_relationships([]) == 0
    assert round_trips == []


async def test_text_that_the_server_cannot_store(db: DatabaseAdapter) -> None:
    a, b = await people(db, 2)
    (id,) = await db.create_relationships([pair(a, b, tags=["a\x00"], metadata={"\ud800": "\x00"})])
    relationship = await stored(db, id)
    assert (relationship.tags, relationship.metadata) == (["a\ufffd"], {"\ufffd": "\ufffd"})
    assert ids_of(await db.get_relationships(a, tags=["a\x00"])) == [id]


async def test_concurrent_creates_of_a_pair_make_one(make_db: MakeAdapter) -> None:
    first = await make_db()
    adapters = [first, *[await make_db(first.agent_id) for _ in range(3)]]
    a, b, c = await people(first, 3)
    pairs = [pair(a, b), pair(b, c), pair(c, a), pair(a, a)]
    answers = await asyncio.gather(
        *(adapters[n % 4].create_relationships(pairs if n % 2 else pairs[::-1]) for n in range(16))
    )
    found = await first.get_relationships_by_pairs(pairs)
    wanted = [relationship and relationship.id for relationship in found]
    assert [ids if n % 2 else ids[::-1] for n, ids in enumerate(answers)] == [wanted] * 16
    created = await asyncio.gather(*(db.create_relationship(pair(b, b)) for db in adapters * 3))
    assert sorted(created) == [False] * 11 + [True]


async def test_a_relationship_that_goes_while_another_is_waited_for_is_created(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any]
) -> None:
    """It was there when its turn came, and is not when the ids are looked up: none of them is None."""
    a, b = sorted(await people(db, 2))
    await db.create_relationship(pair(a, a))
    insert = "INSERT INTO elizasql.relationships (agent_id, source_entity_id, target_entity_id) VALUES ($1, $2, $3)"
    delete = "DELETE FROM elizasql.relationships WHERE agent_id = $1 AND target_entity_id = $2"
    create = db.create_relationships([pair(a, to, tags=["new"]) for to in (a, b)])
    ids = await overtaken(raw, create, (insert, db.agent_id, a, b), (delete, db.agent_id, a))
    assert [(await stored(db, id)).tags for id in ids] == [["new"], []]


# --- update and delete -----------------------------------------------------------------------------------------------


async def test_update_changes_only_what_is_given(db: DatabaseAdapter) -> None:
    a, b, c = await people(db, 3)
    relationship = Relationship(uuid4(), db.agent_id, a, b, ["t"], {"m": 1}, T0)
    await db.create_relationship(relationship)
    assert relationship.id is not None
    assert await db.update_relationship({"id": relationship.id, "tags": ["u"]}) is True
    relationship.tags = ["u"]
    assert await stored(db, relationship.id) == relationship
    assert await db.update_relationship(Relationship(id=relationship.id, metadata={"n": 2})) is True
    relationship.metadata = {"n": 2}
    assert await stored(db, relationship.id) == relationship
    assert await db.update_relationship({"id": relationship.id, "targetEntityId": c, "createdAt": 5}) is True
    assert await stored(db, relationship.id) == relationship
    assert await db.update_relationship({"id": relationship.id, "tags": None, "metadata": None}) is True
    relationship.tags, relationship.metadata = [], {}
    assert await stored(db, relationship.id) == relationship


async def test_update_and_delete_of_what_is_not_there(make_db: MakeAdapter) -> None:
    db = await make_db(batch_size=2)
    a, b, c = await people(db, 3)
    ids = await db.create_relationships([pair(a, b), pair(b, c), pair(c, a)])
    assert await db.update_relationship({"id": NOWHERE, "tags": ["x"]}) is False
    with pytest.raises(NotFoundError, match=str(NOWHERE)):
        await db.update_relationships([{"id": id, "tags": ["x"]} for id in [*ids, NOWHERE]])
    assert [relationship.tags for relationship in await db.get_relationships_by_ids(ids)] == [[]] * 3
    await db.update_relationships([{"id": ids[0], "tags": ["x"]}, {"id": ids[0], "metadata": {"y": 1}}, {"id": ids[1]}])
    assert (await stored(db, ids[0])).tags == ["x"]
    assert (await stored(db, ids[0])).metadata == {"y": 1}
    assert await db.delete_relationship(NOWHERE) is False
    assert await db.delete_relationship(ids[0]) is True
    assert await db.delete_relationships([*ids, ids[1], NOWHERE]) == 2
    assert await db.get_relationships(entity_ids=[a, b, c]) == []


# --- read ------------------------------------------------------------------------------------------------------------


async def test_found_from_both_sides_in_a_total_order(db: DatabaseAdapter) -> None:
    a, b, c, d = await people(db, 4)
    pairs = [(a, b), (b, a), (a, a), (c, a), (a, d), (b, c), (c, d)]
    times = [T0, T0, T0 + timedelta(2), T0 - timedelta(1), T0 + timedelta(1), T0, T0]
    ids = await db.create_relationships([pair(*ends, created_at=time) for ends, time in zip(pairs, times, strict=True)])

    def wanted(*among: UUID) -> list[UUID]:
        hits = [(time, id) for time, id, ends in zip(times, ids, pairs, strict=True) if set(ends) & set(among)]
        return [id for _, id in sorted(hits)]

    assert ids_of(await db.get_relationships(a)) == wanted(a)
    assert ids_of(await db.get_relationships(entity_id=str(d))) == wanted(d)
    for among in ([a], [b, d], [d, b, d], [a, b, c, d], [c, NOWHERE]):
        assert ids_of(await db.get_relationships(entity_ids=among)) == wanted(*among), among
    for kwargs in ({"entity_id": a}, {"entity_ids": [a, c]}):
        everything = ids_of(await db.get_relationships(**kwargs))  # type: ignore[arg-type]
        pages = [
            ids_of(await db.get_relationships(**kwargs, limit=2, offset=offset))  # type: ignore[arg-type]
            for offset in range(0, len(everything), 2)
        ]
        assert [id for page in pages for id in page] == everything
        assert ids_of(await db.get_relationships(**kwargs, offset=3)) == everything[3:]  # type: ignore[arg-type]
        assert await db.get_relationships(**kwargs, limit=0) == []  # type: ignore[arg-type]
        assert await db.get_relationships(**kwargs, limit=2**63 - 1, offset=2**63 - 1) == []  # type: ignore[arg-type]
    assert await db.get_relationships(NOWHERE) == await db.get_relationships(entity_ids=[]) == []


async def test_pages_of_several_entities_are_those_of_the_whole(db: DatabaseAdapter) -> None:
    """What was made first is neither first by its id nor by its time, and many times are equal."""
    chance = random.Random(1)
    everybody = await people(db, 12)
    made = [
        pair(a, b, id=UUID(int=chance.getrandbits(128)), created_at=T0 + timedelta(chance.randrange(5)))
        for a in everybody
        for b in everybody
    ]
    await db.create_relationships(made)
    for among in ([everybody[0]], everybody[:2], everybody):
        wanted = sorted(
            (each["created_at"], each["id"])
            for each in made
            if not {each["sourceEntityId"], each["targetEntityId"]}.isdisjoint(among)
        )
        for begin in range(0, len(wanted), 3):
            page = await db.get_relationships(entity_ids=among, limit=3, offset=begin)
            assert ids_of(page) == [id for _, id in wanted[begin : begin + 3]]


async def test_tags_are_shared_if_any_is(db: DatabaseAdapter) -> None:
    a, b, c, d = await people(db, 4)
    ids = await db.create_relationships(
        [
            pair(a, b, tags=["friend", "work"], created_at=T0),
            pair(c, a, tags=["family"], created_at=T0 + timedelta(1)),
            pair(a, d, created_at=T0 + timedelta(2)),
            pair(a, a, tags=["Friend", INJECTION], created_at=T0 + timedelta(3)),
        ]
    )

    async def ask(*tags: str) -> list[int]:
        found = ids_of(await db.get_relationships(a, tags=tags))
        assert ids_of(await db.get_relationships(entity_ids=[a, b], tags=tags)) == found
        return [ids.index(id) for id in found if id is not None]

    assert await ask("friend") == [0]
    assert await ask("family", "work") == [0, 1]
    assert await ask("nobody") == []
    assert await ask(INJECTION) == [3]
    assert await ask() == [0, 1, 2, 3]
    assert ids_of(await db.get_relationships(a, tags=["family", "friend", "Friend"], limit=1, offset=1)) == [ids[1]]
    assert await db.get_relationships(b, tags=["family"]) == []


async def test_reads_refuse_before_anything_is_sent(db: DatabaseAdapter, round_trips: list[str]) -> None:
    id = uuid4()
    refused: list[dict[str, Any]] = [
        {},
        {"entity_id": id, "entity_ids": [id]},
        {"entity_id": "x"},
        {"entity_ids": str(id)},
        {"entity_id": id, "tags": "friend"},
        {"entity_id": id, "tags": [1]},
        {"entity_id": id, "limit": -1},
        {"entity_id": id, "offset": "1"},
    ]
    for bad in refused:
        with pytest.raises(ArgumentError):
            await db.get_relationships(**bad)
    wrong: Any
    for wrong in ((id,), (id, id, id), {"sourceEntityId": id}, {"targetEntityId": id}, (id, "x"), "ab", None):
        with pytest.raises(ArgumentError, match="position 1"):
            await db.get_relationships_by_pairs([(id, id), wrong])
    with pytest.raises(ArgumentError):
        await db.get_relationships_by_pairs(pair(id, id))  # type: ignore[arg-type]
    assert await db.get_relationships_by_pairs([]) == await db.get_relationships_by_ids([]) == []
    assert round_trips == []


async def test_by_ids_and_by_pairs_are_in_order(db: DatabaseAdapter) -> None:
    a, b, c = await people(db, 3)
    ids = await db.create_relationships([pair(a, b), pair(b, c), pair(c, c)])
    asked = [ids[2], NOWHERE, ids[0], ids[2], ids[1]]
    assert ids_of(await db.get_relationships_by_ids(asked)) == [ids[2], ids[0], ids[1]]
    found = await db.get_relationships_by_pairs(
        [(c, c), pair(b, a), (str(a), b), Relationship(source_entity_id=a, target_entity_id=b)]
    )
    assert [relationship and relationship.id for relationship in found] == [ids[2], None, ids[0], ids[0]]


async def test_another_agents_relationships_are_out_of_reach(make_db: MakeAdapter) -> None:
    mine, other = await make_db(), await make_db()
    s = await make_scene(other)
    (id,) = await other.create_relationships([pair(s.entity, s.other, tags=["t"])])
    before = await other.get_relationships(s.entity)
    assert await mine.get_relationship(s.entity, s.other) is None
    assert await mine.get_relationships(s.entity) == await mine.get_relationships(entity_ids=[s.entity, s.other]) == []
    assert await mine.get_relationships_by_ids([id]) == []
    assert await mine.get_relationships_by_pairs([(s.entity, s.other)]) == [None]
    assert await mine.update_relationship({"id": id, "tags": ["stolen"]}) is False
    with pytest.raises(NotFoundError):
        await mine.update_relationships([{"id": id, "tags": ["stolen"]}])
    assert await mine.delete_relationships([id]) == 0
    with pytest.raises(ForeignKeyError):
        await mine.create_relationship(pair(s.entity, s.other))
    # The same pair of another agent is another relationship.
    await mine.create_entities([{"id": s.entity}, {"id": s.other}])
    assert await mine.create_relationship(pair(s.entity, s.other, id=id)) is True
    assert await mine.delete_relationship(id) is True
    assert await other.get_relationships(s.entity) == before


# --- round trips and plans -------------------------------------------------------------------------------------------


async def test_one_round_trip_for_many_updates(db: DatabaseAdapter, agent_world: Scene, round_trips: list[str]) -> None:
    s = agent_world
    ids = await db.create_relationships([pair(s.entity, s.other), pair(s.other, s.entity)])
    round_trips.clear()
    await db.update_relationships([{"id": id, "tags": ["x"]} for id in ids])
    assert len(round_trips) == 1, round_trips


async def test_plans_read_what_they_give(crowd: Skew) -> None:  # noqa: F811
    """Entity 1 is the target of thousands: a page of them comes off the index in its order."""
    s, hub, e, id = crowd, of(crowd, "entity", 1), of(crowd, "entity", 5), of(crowd, "relationship", 5)
    page = {"tags": None, "reach": 10, "count": 10, "skipped": None}
    calls: list[tuple[str, dict[str, Any], int]] = [
        ("get_relationship", {"source_entity_id": e, "target_entity_id": e}, 1),
        ("get_relationships", {"entity_id": hub, **page}, 15),
        ("get_relationships", {"entity_id": hub, **page, "tags": ["t4"]}, 200),
        ("get_relationships", {"entity_id": e, **page, "reach": None, "count": None}, 4),
        ("get_relationships_of_entities", {"entity_ids": [hub, e], **page}, 40),
        ("get_relationships_by_ids", {"ids": [id]}, 1),
        ("get_relationships_by_pairs", {"source_entity_ids": [e], "target_entity_ids": [e]}, 1),
        ("update_relationships", {"relationships": json.dumps([{"id": str(id), "tags": []}]), "required": True}, 2),
        ("delete_relationships", {"ids": [id]}, 2),
    ]
    for name, params, most in calls:
        rows = await read_rows(s, SQL[name], **params)
        assert 0 < sum(rows.values()) <= most, (name, params, rows)


async def test_a_pair_is_looked_up_by_both_of_its_entities(crowd: Skew) -> None:  # noqa: F811
    """Entity 1 is the target of thousands, entity 3 the source of thousands: neither is read to find one pair."""
    s, hub, source = crowd, of(crowd, "entity", 1), of(crowd, "entity", 3)
    await s.session.execute(
        "INSERT INTO elizasql.relationships (agent_id, source_entity_id, target_entity_id)"
        " SELECT agent_id, $2, id FROM elizasql.entities WHERE agent_id = $1 ON CONFLICT DO NOTHING",
        s.agent,
        source,
    )
    await s.session.execute("ANALYZE elizasql.relationships")
    one = {"source_entity_id": source, "target_entity_id": hub}
    await s.check(SQL["get_relationship"], **one)
    await s.check(SQL["get_relationships_by_pairs"], source_entity_ids=[source], target_entity_ids=[hub])
    row = {"id": str(uuid4()), **{key: str(id) for key, id in one.items()}}
    for number in range(2):
        text = await s.session.fetchval(
            "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) SELECT elizasql.create_relationships("
            f"'{s.agent}', '{json.dumps([row])}')"
        )
        plan = json.loads(text)[0]["Plan"]
        # The first call also reads the catalog, to compile the function and to plan.
        assert number == 0 or plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] <= ENOUGH, plan


async def test_create_reads_what_it_writes(crowd: Skew) -> None:  # noqa: F811
    """Its statements run inside a function, where EXPLAIN does not look: the blocks that it touches are counted."""
    s = crowd
    for number in range(2):
        row = {
            "id": str(uuid4()),
            "source_entity_id": str(of(s, "entity", 5)),
            "target_entity_id": str(of(s, "entity", 6)),
        }
        text = await s.session.fetchval(
            "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) SELECT elizasql.create_relationships("
            f"'{s.agent}', '{json.dumps([row])}')"
        )
        plan = json.loads(text)[0]["Plan"]
        # The first call also reads the catalog, to compile the function and to plan.
        assert number == 0 or plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] <= ENOUGH, plan
