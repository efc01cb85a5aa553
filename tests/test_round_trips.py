"""One round trip for each public method of the hot path, one a chunk for batches."""

from __future__ import annotations

import functools
import re
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import numpy as np
import pytest

from elizasql import Agent, DatabaseAdapter, Entity, Log, Memory, Room, World, _codecs, _pool, _store
from elizasql._statements import SQL

from .conftest import MakeAdapter, Scene, make_scene
from .test_isolation import AGENTS, METHODS, filled

V = np.random.default_rng(0).normal(size=(20, 384)).astype(np.float32)

CALLS: dict[str, Callable[[DatabaseAdapter, Scene], Awaitable[Any]]] = {
    "is_ready": lambda db, s: db.is_ready(),
    "get_agent": lambda db, s: db.get_agent(db.agent_id),
    "create_agent": lambda db, s: db.create_agent(Agent(name="x")),
    "ensure_agent_exists": lambda db, s: db.ensure_agent_exists(),
    "delete_agent": lambda db, s: db.delete_agent(uuid4()),
    "create_world": lambda db, s: db.create_world(World(name="x")),
    "get_world": lambda db, s: db.get_world(s.world),
    "get_all_worlds": lambda db, s: db.get_all_worlds(),
    "remove_world": lambda db, s: db.remove_world(uuid4()),
    "create_rooms": lambda db, s: db.create_rooms([Room(source="a", type="DM"), Room(source="b", type="DM")]),
    "get_rooms_by_ids": lambda db, s: db.get_rooms_by_ids([s.room, uuid4()]),
    "get_rooms_by_world": lambda db, s: db.get_rooms_by_world(s.world),
    "delete_room": lambda db, s: db.delete_room(uuid4()),
    "create_entities": lambda db, s: db.create_entities([Entity(id=uuid4()), Entity(id=uuid4())]),
    "get_entities_by_ids": lambda db, s: db.get_entities_by_ids([s.entity]),
    "get_entities_for_room": lambda db, s: db.get_entities_for_room(s.room),
    "delete_entity": lambda db, s: db.delete_entity(uuid4()),
    "add_participant": lambda db, s: db.add_participant(s.entity, s.room),
    "add_participants_room": lambda db, s: db.add_participants_room([s.entity, s.other], s.room),
    "remove_participant": lambda db, s: db.remove_participant(s.other, s.room),
    "get_participants_for_room": lambda db, s: db.get_participants_for_room(s.room),
    "is_room_participant": lambda db, s: db.is_room_participant(s.room, s.entity),
    "get_rooms_for_participant": lambda db, s: db.get_rooms_for_participant(s.entity),
    "ensure_embedding_dimension": lambda db, s: db.ensure_embedding_dimension(384),
    "get_embedding_dimension": lambda db, s: db.get_embedding_dimension(),
    "create_memory": lambda db, s: db.create_memory(Memory(content={}), "messages"),
    "create_memory with embedding": lambda db, s: db.create_memory(
        Memory(content={}, embedding=V[0], unique=True), "messages"
    ),
    "create_memory, unique undecided": lambda db, s: db.create_memory(Memory(content={}, embedding=V[1]), "messages"),
    "create_memories": lambda db, s: db.create_memories(
        [Memory(content={}, embedding=v, unique=True) for v in V], "messages"
    ),
    "create_memories, unique undecided": lambda db, s: db.create_memories(
        [Memory(content={}, embedding=v) for v in V], "messages"
    ),
    "upsert_memories": lambda db, s: db.upsert_memories([Memory(content={}, embedding=v) for v in V], "messages"),
    "update_memory": lambda db, s: db.update_memory({"id": uuid4(), "content": {}, "embedding": V[0]}),
    "get_memories": lambda db, s: db.get_memories(table_name="messages", room_id=s.room, include_embedding=True),
    "get_memory_by_id": lambda db, s: db.get_memory_by_id(uuid4(), include_embedding=True),
    "get_memories_by_ids": lambda db, s: db.get_memories_by_ids([uuid4()]),
    "get_memories_by_room_ids": lambda db, s: db.get_memories_by_room_ids(room_ids=[s.room], table_name="messages"),
    "get_memories_by_world_id": lambda db, s: db.get_memories_by_world_id(world_id=s.world),
    "count_memories": lambda db, s: db.count_memories(s.room),
    "delete_memory": lambda db, s: db.delete_memory(uuid4()),
    "delete_memories": lambda db, s: db.delete_memories([uuid4(), uuid4()]),
    "delete_all_memories": lambda db, s: db.delete_all_memories(s.room, "messages"),
    "search_memories": lambda db, s: db.search_memories(embedding=V[0], table_name="messages"),
    "search_memories of a room": lambda db, s: db.search_memories(
        embedding=V[0], table_name="messages", room_id=s.room, include_embedding=True
    ),
    "search_memories_by_embedding": lambda db, s: db.search_memories_by_embedding(V[0], table_name="messages"),
    "get_cached_embeddings": lambda db, s: db.get_cached_embeddings(
        query_table_name="messages", query_threshold=2, query_input="hello"
    ),
}


@pytest.mark.parametrize("name", CALLS)
async def test_one_round_trip(db: DatabaseAdapter, agent_world: Scene, round_trips: list[str], name: str) -> None:
    await db.create_memory(
        Memory(content={"text": "hello"}, room_id=agent_world.room, embedding=V[5], unique=True), "messages"
    )
    round_trips.clear()
    await CALLS[name](db, agent_world)
    assert len(round_trips) == 1, round_trips
    # A plan through the partitioned tables has a part for each partition.
    if not re.search("INSERT|UPDATE|DELETE", round_trips[0]):
        assert not re.search(r"elizasql\.(memories|embeddings)\b", round_trips[0])
        # In a transaction a write may follow, and the locks have an order.
        round_trips.clear()
        async with db.transaction() as tx:
            await CALLS[name](tx, agent_world)
        assert not re.search("_p[0-9]{2}", " ".join(round_trips))


# Those that take several by their nature; test_agents.py counts for agents.
SEVERAL = {
    "abandon_reembedding",
    "close",
    "index_memories",
    "load_memories",
    "reembed",
    "transaction",
    "wait_for_tasks",
    "with_entity_context",
}


async def test_every_method_takes_one(db: DatabaseAdapter, round_trips: list[str]) -> None:
    own = await filled(db)
    scene = own.scene
    server = (await db.create_message_server({"name": "s", "sourceType": "x"})).id
    channel = (await db.create_channel({"messageServerId": server, "name": "c", "type": "GROUP"})).id
    author = scene.entity
    text = {"channelId": channel, "authorId": author, "content": "x"}
    message = (await db.create_message(text)).id
    await db.sweep_cache()  # opens the background's connection
    calls: dict[str, Callable[[], Awaitable[Any]]] = {
        "create_message_server": lambda: db.create_message_server({"name": "t", "sourceType": "x"}),
        "create_message_servers": lambda: db.create_message_servers([{"name": "t", "sourceType": "x"}]),
        "get_message_servers": lambda: db.get_message_servers(),
        "get_message_server_by_id": lambda: db.get_message_server_by_id(server),
        "add_agent_to_message_server": lambda: db.add_agent_to_message_server(server, db.agent_id),
        "get_agents_for_message_server": lambda: db.get_agents_for_message_server(server),
        "remove_agent_from_message_server": lambda: db.remove_agent_from_message_server(server, db.agent_id),
        "create_channel": lambda: db.create_channel({"messageServerId": server, "name": "d", "type": "GROUP"}),
        "get_channel_details": lambda: db.get_channel_details(channel),
        "get_channels_for_message_server": lambda: db.get_channels_for_message_server(server),
        "find_or_create_dm_channel": lambda: db.find_or_create_dm_channel(author, scene.other, server),
        "update_channel": lambda: db.update_channel(channel, {"name": "e", "participantCentralUserIds": [author]}),
        "add_channel_participants": lambda: db.add_channel_participants(channel, [author]),
        "get_channel_participants": lambda: db.get_channel_participants(channel),
        "is_channel_participant": lambda: db.is_channel_participant(channel, author),
        "remove_channel_participants": lambda: db.remove_channel_participants(channel, [author]),
        "create_message": lambda: db.create_message(text),
        "create_messages": lambda: db.create_messages([text, text]),
        "get_message_by_id": lambda: db.get_message_by_id(message),
        "get_messages_for_channel": lambda: db.get_messages_for_channel(channel),
        "get_replies": lambda: db.get_replies(message),
        "update_message": lambda: db.update_message(message, {"content": "y"}),
        "delete_message": lambda: db.delete_message(message),
        "delete_messages": lambda: db.delete_messages([message]),
        "delete_channel": lambda: db.delete_channel(channel),
        "search_entities_by_name for nothing": lambda: db.search_entities_by_name(""),
        "get_entities_by_ids with components": lambda: db.get_entities_by_ids([author], include_components=True),
        "get_entities_for_room with components": lambda: db.get_entities_for_room(scene.room, True),
        "get_relationships of several": lambda: db.get_relationships(entity_ids=[author, scene.other]),
        "get_memories_by_world_id": lambda: db.get_memories_by_world_id(world_id=scene.world),
        "create_pairing_request": lambda: db.create_pairing_request({"channel": "c", "senderId": "t", "code": "2"}),
        "create_pairing_requests": lambda: db.create_pairing_requests([{"channel": "c", "senderId": "u", "code": "3"}]),
        "ensure_agent_exists": db.ensure_agent_exists,
        "ensure_embedding_dimension": lambda: db.ensure_embedding_dimension(384),
        "get_embedding_dimension": db.get_embedding_dimension,
        "is_ready": db.is_ready,
    }
    for name in METHODS:
        if name not in calls and name not in SEVERAL:
            calls[name] = functools.partial(getattr(db, name), **own.arguments(name))
    every = {name for name in dir(DatabaseAdapter) if callable(getattr(DatabaseAdapter, name)) and name[0] != "_"}
    assert every - AGENTS == ({name.split()[0] for name in calls} | SEVERAL) - AGENTS
    found = {}
    for name in sorted(calls, key=lambda name: name.startswith(("delete_", "prune_", "remove_"))):
        round_trips.clear()
        await calls[name]()
        found[name] = len(round_trips)
    assert set(found.values()) == {1}, {name: number for name, number in found.items() if number != 1}


@pytest.mark.parametrize(
    "name",
    [
        "create_memory with embedding",
        "create_memory, unique undecided",
        "create_memories",
        "upsert_memories",
        "update_memory",
        "search_memories",
    ],
)
async def test_a_width_that_another_adapter_has_locked_is_asked_for_once(
    make_db: MakeAdapter, round_trips: list[str], name: str
) -> None:
    db = await make_db(dimension=None)
    scene = await make_scene(db)
    await make_db(db.agent_id)
    for number in (2, 1):
        round_trips.clear()
        await CALLS[name](db, scene)
        assert len(round_trips) == number, round_trips


async def test_a_batch_takes_one_round_trip_a_chunk_and_one_transaction(
    make_db: MakeAdapter, round_trips: list[str]
) -> None:
    db = await make_db(batch_size=5)
    await make_scene(db)
    memories = [Memory(id=uuid4(), content={}, embedding=v, unique=True) for v in V]
    for call in (
        lambda: db.create_memories(memories, "messages"),
        lambda: db.upsert_memories(memories, "messages"),
        lambda: db.update_memories(memories),
        lambda: db.delete_memories([m.id for m in memories]),  # type: ignore[misc]
    ):
        round_trips.clear()
        await call()  # type: ignore[no-untyped-call]
        kinds = [text.split()[0].rstrip(";") for text in round_trips]
        # The one before the end asks for the transaction's id, by which a lost end is settled.
        assert kinds[0] == "BEGIN" and kinds[-1] == "COMMIT" and len(kinds) == 4 + 3, round_trips


async def test_a_batch_of_large_memories_takes_more(
    db: DatabaseAdapter, round_trips: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server takes no message of 1 GB."""
    monkeypatch.setattr(_store, "_CHUNK_BYTES", 10_000)
    sizes = [20_000, 4_000, 4_000, 4_000, 20_000, 10, 10, 9_000, 9_900]
    memories = [
        Memory(id=UUID(int=n + 1), content={"text": "x" * size}, embedding=V[n % len(V)], unique=n != 2)
        for n, size in enumerate(sizes)
    ]
    for call in (db.create_memories, db.upsert_memories):
        round_trips.clear()
        await call(memories, "messages")
        assert len([text for text in round_trips if "INSERT" in text]) == 6, round_trips
        for n, size in enumerate(sizes):
            stored = await db.get_memory_by_id(UUID(int=n + 1))
            assert stored is not None and stored.content == {"text": "x" * size} and stored.unique is (n != 2)
    round_trips.clear()
    await db.update_memories(memories)
    assert len([text for text in round_trips if "UPDATE" in text]) == 6


async def test_so_do_large_logs_and_cache_entries(
    db: DatabaseAdapter, agent_world: Scene, round_trips: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_store, "_CHUNK_BYTES", 10_000)
    texts = [letter * 4_000 for letter in "abcde"]
    logs = [
        Log(id=uuid4(), entity_id=agent_world.entity, room_id=agent_world.room, type="t", body={"text": text})
        for text in texts
    ]
    round_trips.clear()
    ids = await db.create_logs(logs)
    assert len([sent for sent in round_trips if "INSERT" in sent]) == 3, round_trips
    assert [log.id for log in await db.get_logs()] == ids[::-1], "the order given holds across statements"
    round_trips.clear()
    await db.update_logs([{"id": id, "body": {"new": text}} for id, text in zip(ids, texts, strict=True)])
    assert len([sent for sent in round_trips if "UPDATE" in sent]) == 3, round_trips
    assert [log.body for log in await db.get_logs_by_ids(ids)] == [{"new": text} for text in texts]
    round_trips.clear()
    await db.set_caches(dict(zip("vwxyz", texts, strict=True)))
    assert len([sent for sent in round_trips if "INSERT" in sent]) == 3, round_trips
    assert await db.get_caches(["v", "w", "x", "y", "z"]) == dict(zip("vwxyz", texts, strict=True))


async def test_empty_input_takes_none(db: DatabaseAdapter, agent_world: Scene, round_trips: list[str]) -> None:
    round_trips.clear()
    assert await db.create_memories([], "messages") == []
    assert await db.create_rooms([]) == []
    assert await db.get_memories_by_ids([]) == []
    assert await db.get_rooms_by_ids([]) == []
    assert await db.add_participants_room([], agent_world.room) is False
    assert not round_trips


async def test_a_new_connection_knows_the_types_of_every_statement(dsn: str, round_trips: list[str]) -> None:
    connection = await asyncpg.connect(dsn)
    await _codecs.register(connection, "public")
    round_trips.clear()
    for statement in SQL.texts():
        await connection.prepare(statement.sql)
    await connection.close()
    assert not round_trips


async def test_what_one_connection_learns_of_types_the_next_is_told(
    dsn: str, round_trips: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_pool, "_INTROSPECTED", {})
    for expected in (["'jit'", "typeinfo_tree"], [], []):
        connection = await asyncpg.connect(dsn, connection_class=_pool._Connection)
        round_trips.clear()
        await _codecs.register(connection, "public")
        lookup, *introspection = round_trips
        assert "pg_catalog.pg_type" in lookup
        assert all(part in sent for part, sent in zip(expected, introspection, strict=True)), introspection
        round_trips.clear()
        for statement in SQL.texts():
            await connection.prepare(statement.sql)
        assert not round_trips
        await connection.close()


async def test_what_was_learnt_where_vector_has_another_number_is_not_told(
    dsn: str, round_trips: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt: dict[tuple[Any, ...], Any] = {}
    monkeypatch.setattr(_pool, "_INTROSPECTED", learnt)
    connection = await asyncpg.connect(dsn, connection_class=_pool._Connection)
    await _codecs.register(connection, "public")
    number = await connection.fetchval("SELECT 'public.vector'::regtype::oid")
    await connection.close()
    ((key, types),) = learnt.items()
    elsewhere = tuple(number + 1 if part == number else part for part in key)
    learnt.clear()
    learnt[elsewhere] = []
    connection = await asyncpg.connect(dsn, connection_class=_pool._Connection)
    round_trips.clear()
    await _codecs.register(connection, "public")
    await connection.close()
    assert "typeinfo_tree" in round_trips[-1]
    assert learnt == {elsewhere: [], key: types}


@pytest.mark.parametrize("prepared", [True, False], ids=["prepared", "unprepared"])
async def test_types_of_one_database_are_not_taken_for_those_of_another(
    make_db: MakeAdapter, dsn: str, empty_database: str, prepared: bool
) -> None:
    """There the extension has other numbers, in another schema."""
    admin = await asyncpg.connect(empty_database.replace("//elizasql@", "//postgres@"))
    await admin.execute("DROP EXTENSION vector; CREATE SCHEMA far; GRANT USAGE ON SCHEMA far TO public")
    await admin.execute("CREATE EXTENSION vector SCHEMA far")
    await admin.close()
    for address in (dsn, empty_database, dsn, empty_database):
        db = await make_db(dsn=address, prepared_statements=prepared)
        scene = await make_scene(db)
        memories = [
            Memory(entity_id=scene.entity, room_id=scene.room, content={"text": "x"}, embedding=V[number], unique=True)
            for number in range(2)
        ]
        ids = await db.create_memories(memories, "messages")
        found = {memory.id: memory.embedding for memory in await db.get_memories_by_ids(ids, include_embedding=True)}
        for id, vector in zip(ids, V, strict=False):
            np.testing.assert_array_equal(found[id], vector)
