"""A batch that the server refuses because of one row: nothing is written, and the error says where that row stands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import numpy as np
import pytest

import elizasql
from elizasql import CheckError, DatabaseAdapter, ForeignKeyError, UniqueViolationError, _store
from elizasql import memories as _memories

from .conftest import MakeAdapter, Scene, make_scene
from .test_hostile_arguments import documented

MANY, AT = 1000, 517
VECTORS = np.random.default_rng(11).normal(size=(8, 384)).astype(np.float32)
GONE = UUID(int=1)

# A row of each kind, apart from the references that may be left out.
ROWS: dict[str, Callable[[Scene, int], dict[str, Any]]] = {
    "memories": lambda scene, number: {"type": "messages", "content": {"text": f"a secret {number}"}},
    "rooms": lambda scene, number: {"source": "s", "type": "t"},
    "components": lambda scene, number: {
        "type": f"t{number}",
        "entity_id": scene.entity,
        "room_id": scene.room,
        "data": {},
    },
    "relationships": lambda scene, number: {"source_entity_id": scene.entity, "target_entity_id": scene.other},
    "logs": lambda scene, number: {"type": "t", "body": {}, "entity_id": scene.entity, "room_id": scene.room},
    "goals": lambda scene, number: {"name": "n"},
    "messages": lambda scene, number: {"channel_id": scene.room, "author_id": scene.entity, "content": "a secret"},
}

# Of each kind: the verbs of its batch methods, and the references that a row can have.
REFERENCES: dict[str, tuple[str, str]] = {
    "memories": ("create upsert update load", "entity_id room_id world_id"),
    "rooms": ("create upsert update", "world_id"),
    "components": ("create upsert update", "entity_id room_id world_id source_entity_id"),
    "relationships": ("create", "source_entity_id target_entity_id"),
    "logs": ("create", "entity_id room_id"),
    "goals": ("create update", "room_id entity_id"),
    "messages": ("create", "channel_id in_reply_to_root_message_id"),
}
CASES = [
    (f"{verb}_{kind}", field)
    for kind, (verbs, fields) in REFERENCES.items()
    for verb in verbs.split()
    for field in fields.split()
]


# Where what all rows point at can be missing, the agent or the channel, and no row is worse than another.
ALL_ALIKE = {
    "add_channel_participants",
    *("create_worlds", "upsert_worlds", "create_entities", "upsert_entities", "create_tasks", "set_caches"),
    *("create_pairing_requests", "create_pairing_allowlist_entries"),
}


async def fill(db: DatabaseAdapter, kind: str, scene: Scene) -> list[dict[str, Any]]:
    """Give many rows of a kind that fit, and make what they point at."""
    rows = [{"id": uuid4(), **ROWS[kind](scene, number)} for number in range(MANY)]
    if kind == "relationships":
        entities = [uuid4() for _ in range(32)]
        await db.create_entities([{"id": id} for id in entities])
        for number, row in enumerate(rows):
            row["source_entity_id"], row["target_entity_id"] = entities[number % 32], entities[number // 32]
    if kind == "messages":
        server = await db.create_message_server({"name": "s", "source_type": "s"})
        await db.create_channel({"id": scene.room, "message_server_id": server.id, "name": "c", "type": "GROUP"})
    return rows


@pytest.mark.parametrize(("method", "field"), CASES)
async def test_the_row_that_points_at_nothing_is_named(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any], method: str, field: str
) -> None:
    db = await make_db(batch_size=300)
    verb, kind = method.split("_", 1)
    rows = await fill(db, kind, await make_scene(db))
    if verb == "update":
        await getattr(db, f"create_{kind}")(rows)
        rows = [{"id": row["id"]} for row in rows]
    rows[AT][field] = GONE
    with pytest.raises(ForeignKeyError, match=f"^[A-Za-z]+ at position {AT}: {method}: .*{GONE}") as caught:
        await getattr(db, method)(rows)
    error = caught.value
    assert (error.statement, error.sqlstate) == (method, "23503")
    assert error.constraint is not None
    assert "secret" not in str(error)
    if verb != "update":
        ids = [row["id"] for row in rows]
        assert not await raw.fetchval(f"SELECT count(*) FROM elizasql.{error.table} WHERE id = ANY($1)", ids)


@pytest.mark.parametrize("method", ["add_participants_room", "create_room_participants"])
async def test_the_entity_that_is_not_there_is_named(db: DatabaseAdapter, agent_world: Scene, method: str) -> None:
    entities = [uuid4() for _ in range(MANY)]
    await db.create_entities([{"id": id} for id in entities])
    entities[AT] = GONE
    with pytest.raises(ForeignKeyError, match=f"^entity at position {AT}: .*{GONE}"):
        await getattr(db, method)(entities, agent_world.room)
    with pytest.raises(ForeignKeyError, match=r"^\w+participants: .*A room is made by"):
        await getattr(db, method)([agent_world.entity], GONE)


def test_every_batch_method_that_can_meet_one_is_tried() -> None:
    tried = {method for method, _ in CASES} | {"add_participants_room", "create_room_participants"}
    plural = {
        name
        for name in dir(DatabaseAdapter)
        if name.startswith(("create_", "upsert_", "update_", "load_", "set_", "add_"))
        and any(annotation.startswith("Iterable[") for annotation in given_types(name))
        and "ForeignKeyError" in documented(name)
    }
    assert plural == tried | ALL_ALIKE


def given_types(name: str) -> list[str]:
    """Give the types of what a method takes, without what stands beside the rows."""
    types: dict[str, str] = getattr(DatabaseAdapter, name).__annotations__
    return [each for key, each in types.items() if key not in ("participant_ids", "return")]


@pytest.mark.parametrize("alike", [False, True], ids=["in one statement", "looked up before"])
@pytest.mark.parametrize("batch_size", [2, 100])
async def test_a_memory_is_named_where_near_duplicates_are_looked_for(
    make_db: MakeAdapter, batch_size: int, alike: bool
) -> None:
    db = await make_db(batch_size=batch_size)
    batch = [{"content": {}, "embedding": vector} for vector in VECTORS]
    batch[3]["room_id"] = GONE
    if alike:
        batch[7]["embedding"] = VECTORS[6]
    with pytest.raises(ForeignKeyError, match=r"^Memory at position 3: "):
        await db.create_memories(batch, "messages")


async def test_the_memory_that_breaks_a_rule_is_named_and_not_shown(
    db: DatabaseAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [uuid4() for _ in range(5)]
    await db.create_memories([{"id": id, "content": {}} for id in ids], "messages")
    monkeypatch.setattr(_memories, "_check_metadata", lambda encoded: None)  # the table's rule speaks
    batch = [{"id": id, "content": {"text": "a secret"}} for id in ids]
    batch[2]["metadata"] = {"type": "fragment"}
    new = [{**row, "id": uuid4()} for row in batch]
    for write in (
        lambda: db.create_memories(new, "messages"),
        lambda: db.upsert_memories(batch, "messages"),
        lambda: db.update_memories(batch),
    ):
        with pytest.raises(CheckError, match=r"^Memory at position 2: ") as caught:
            await write()
        assert "secret" not in str(caught.value)
        assert "secret" in (caught.value.detail or "")


async def test_a_key_that_is_there_already_names_the_row(db: DatabaseAdapter, agent_world: Scene) -> None:
    def request(id: int, code: str) -> dict[str, Any]:
        return {"id": UUID(int=id), "channel": "c (1)", "sender_id": f"s{id}", "code": code}

    await db.create_pairing_request(request(1, "a"))
    with pytest.raises(UniqueViolationError, match=r"^PairingRequest at position 1: "):
        await db.create_pairing_requests([request(3, "b"), request(2, "a"), request(4, "c")])

    place = {"entity_id": agent_world.entity, "room_id": agent_world.room, "data": {}}
    ids = await db.create_components([{"type": each, **place} for each in ("a", "b", "c", "d, e", "f")])
    # An update gives a part of the key.
    changes: list[dict[str, Any]] = [
        {"id": ids[1], "data": {}},
        {"id": ids[2], "type": "a"},
        {"id": ids[4], "type": "g"},
    ]
    with pytest.raises(UniqueViolationError, match=r"^Component at position 1: "):
        await db.update_components(changes)
    # Either may be the one, as far as the server tells.
    changes[2] = {"id": ids[4], "type": "a", "world_id": None}
    with pytest.raises(UniqueViolationError, match=r"^update_components: "):
        await db.update_components(changes)
    with pytest.raises(UniqueViolationError, match=r"^update_components: "):
        await db.update_components([{"id": ids[0], "type": "d, e"}])
    # Two rows of one id: which of them is the wrong one only the caller can tell.
    one = [{"type": "x", **place}, *({"id": UUID(int=5), "type": each, **place} for each in ("y", "z"))]
    with pytest.raises(UniqueViolationError, match=r"^Component at position 1, 2: "):
        await db.upsert_components(one)


async def test_a_row_that_several_values_make_is_named_by_all_of_them(db: DatabaseAdapter) -> None:
    first, second = await db.create_memories([{"content": {}}, {"content": {}}], "messages")
    changes = [{"id": second, "content": {}}, {"id": first, "room_id": GONE}, *[{"id": first, "content": {}}] * 20]
    with pytest.raises(ForeignKeyError, match=r"^Memory at position 1, 2, 3, 4, 5, 6, 7, 8, 9, 10: "):
        await db.update_memories(changes)


async def test_of_several_rows_that_are_refused_the_first_one_is_named(make_db: MakeAdapter) -> None:
    db = await make_db(batch_size=2)
    ids = [UUID(int=number) for number in (9, 8, 7, 6, 5)]
    batch = [{"id": id, "content": {}, **({"room_id": GONE} if place else {})} for place, id in enumerate(ids)]
    with pytest.raises(ForeignKeyError, match=r"^Memory at position 1: "):
        await db.create_memories(batch, "messages")
    async with db.transaction() as tx:
        with pytest.raises(ForeignKeyError, match=r"^Memory at position 1: "):
            async with tx.transaction() as savepoint:
                await savepoint.create_memories(batch, "messages")


async def test_where_the_server_does_not_tell_the_error_stays_as_it_is(make_db: MakeAdapter) -> None:
    db = await make_db()
    await db.delete_agent(db.agent_id)
    with pytest.raises(ForeignKeyError, match=r"^create_memories: .*An agent is made by"):
        await db.create_memories([{"content": {}}, {"content": {}}], "messages")
    error = elizasql.ForeignKeyError("said")
    for error.detail in (None, "", 'Key is not present in table "rooms".', "(", "Failing row contains (1, 2)."):
        _store.name_row(error, "Memory", [{"id": GONE, "room_id": GONE}], [(0, GONE)])
        assert str(error) == "said"
