"""The way over from ElizaOS: everything arrives, what cannot is named, and a second time changes nothing."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import datetime, timezone
from hashlib import md5
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID, uuid4

import asyncpg
import numpy as np
import pytest

import elizasql
from elizasql import DatabaseAdapter
from elizasql._statements import SQL
from elizasql.config import Config
from elizasql.errors import ArgumentError, ConfigurationError, NotFoundError, PermissionDeniedError
from elizasql.transfer import Decisions, Summary, import_elizaos
from elizasql.transfer import elizaos as module
from elizasql.transfer._connection import snapshot
from elizasql.transfer.node import serve_pglite
from tests.conftest import COPIED
from tests.elizaos_schema import AS_IN_1_6, TABLES

pytestmark = pytest.mark.skipif("ELIZASQL_TEST_URL" in os.environ, reason="needs a server to make databases on")

ADA, BOB = UUID(int=0xA1), UUID(int=0xB1)
PACKAGES = ("@elizaos/plugin-sql@1.7.2", "@electric-sql/pglite-socket@0.0.22")


def admin(address: str) -> str:
    return address.replace("//elizasql@", "//postgres@")


@asynccontextmanager
async def connected(address: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    connection = await asyncpg.connect(address)
    try:
        yield connection
    finally:
        await connection.close()


@pytest.fixture
async def source(dsn: str) -> AsyncIterator[str]:
    """Give the address of a database without anything but the extension."""
    name = f"test_{uuid4().hex}"
    async with connected(admin(dsn)) as connection:
        await connection.execute(f"CREATE DATABASE {name} OWNER elizasql {COPIED}")
        made = urlunsplit(urlsplit(dsn)._replace(path=f"/{name}"))
        async with connected(admin(made)) as inside:
            await inside.execute("CREATE EXTENSION vector; GRANT ALL ON SCHEMA public TO elizasql")
        yield made
        await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@asynccontextmanager
async def opened(address: str, agent_id: UUID = ADA) -> AsyncIterator[DatabaseAdapter]:
    settings = {"indexing": "manual", "pool_min_size": 0, "pool_max_size": 3}
    async with elizasql.connect(agent_id=agent_id, dsn=address, **settings) as db:
        yield db


@pytest.fixture
async def target(dsn: str) -> AsyncIterator[str]:
    """Give the address of the database that takes the rows, emptied of what these tests bring."""
    yield dsn
    async with connected(dsn) as connection:
        await connection.execute("DELETE FROM elizasql.agents WHERE id = ANY($1)", [ADA, BOB])
        await connection.execute("DELETE FROM elizasql.message_servers WHERE source_type = 'discord'")


class Told(list[tuple[str, dict[str, Any], str]]):
    """What was reported."""

    def tell(self, table: str, row: bytes, problem: object) -> None:
        self.append((table, json.loads(row), str(problem)))

    def of(self, table: str) -> list[str]:
        return [problem for name, _, problem in self if name == table]


async def take(source: str, target: str | None, **options: Any) -> tuple[Summary, Decisions, Told]:
    told = Told()
    if target is None:
        return *await import_elizaos(source, Config(), None, tell=told.tell, **options), told
    async with opened(target) as db:
        return *await import_elizaos(source, Config(), db, tell=told.tell, **options), told


async def rows_of(address: str) -> dict[str, list[str]]:
    """Give everything of these tests' agents and of their message server, as text; other tests leave rows of theirs."""
    of_agent = "worlds rooms entities participants components relationships memories embeddings cache tasks logs"
    conditions = dict.fromkeys(of_agent.split(), "agent_id = ANY($1)")
    channels = "SELECT id FROM elizasql.channels WHERE message_server_id = ANY($1)"
    conditions |= {
        "agents": "id = ANY($1)",
        "message_servers": "id = ANY($1)",
        "channels": "message_server_id = ANY($1)",
        "channel_participants": f"channel_id IN ({channels})",
        "central_messages": f"channel_id IN ({channels})",
    }
    found = {}
    async with connected(address) as connection:
        for table, condition in conditions.items():
            rows = await connection.fetch(
                f"SELECT t::text AS row FROM elizasql.{table} AS t WHERE {condition} ORDER BY 1", [ADA, BOB, SERVER]
            )
            found[table] = [row["row"] for row in rows]
    return found


# --- a database like the original's ----------------------------------------------------------------------------------


WORLD, ROOM, OWN, LOST, GONE = (UUID(int=n) for n in range(1, 6))
ANN, BEN = UUID(int=11), UUID(int=12)
SERVER = UUID(int=0x5E)
BIG = 2**70 + 1


def utc(*parts: int) -> datetime:
    """Give a time as the original writes it: of UTC, without saying so."""
    return datetime(*parts, tzinfo=timezone.utc).replace(tzinfo=None)  # type: ignore[misc, arg-type]


def memory(number: int) -> UUID:
    return UUID(int=1000 + number)


async def fill(connection: asyncpg.Connection[Any]) -> None:
    """Put in what users of the original have."""
    await connection.execute(TABLES)
    run = connection.execute
    for agent, name in ((ADA, "Ada"), (BOB, "Bob")):
        await run("INSERT INTO agents (id, name, bio, settings) VALUES ($1, $2, '\"x\"', '{\"a\": 1}')", agent, name)
    await run(
        "INSERT INTO worlds (id, agent_id, name, created_at) VALUES ($1, $2, 'w', '2024-01-02 03:04:05.6')", WORLD, ADA
    )
    for room, agent, world in ((ROOM, ADA, WORLD), (OWN, BOB, None), (LOST, ADA, GONE)):
        await run(
            "INSERT INTO rooms (id, agent_id, source, type, world_id, message_server_id, channel_id) "
            "VALUES ($1, $2, 's', 'GROUP', $3, $4, 'c')",
            *(room, agent, world, SERVER),
        )
    for entity, agent in ((ANN, ADA), (BEN, ADA), (BOB, BOB)):
        await run("INSERT INTO entities (id, agent_id, names) VALUES ($1, $2, $3)", entity, agent, ["n", "m"])
    for entity, state in ((ANN, None), (ANN, None), (ANN, "MUTED"), (BEN, "BANANA")):
        await run(
            "INSERT INTO participants (entity_id, room_id, agent_id, room_state) VALUES ($1, $2, $3, $4)",
            *(entity, ROOM, ADA, state),
        )
    await run("INSERT INTO participants (entity_id, room_id) VALUES ($1, $2)", BOB, OWN)  # without an agent
    for day, data in ((1, "old"), (2, "new")):
        await run(
            "INSERT INTO components (entity_id, agent_id, room_id, type, data, created_at) "
            "VALUES ($1, $2, $3, 'profile', $4, $5)",
            *(ANN, ADA, ROOM, json.dumps({"is": data}), utc(2024, 1, day)),
        )
    await run(
        "INSERT INTO relationships (source_entity_id, target_entity_id, agent_id) VALUES ($1, $2, $3)", ANN, BEN, ADA
    )
    for number in range(12):
        # Bob speaks of Ada's people in Ada's room, too.
        agent, room, entity = (ADA, ROOM, ANN) if number < 8 else (BOB, ROOM if number == 11 else OWN, BEN)
        await run(
            'INSERT INTO memories (id, type, content, entity_id, agent_id, room_id, world_id, created_at, "unique") '
            "VALUES ($1, 'messages', $2, $3, $4, $5, $6, $7, $8)",
            *(memory(number), f'{{"text": "é {number}", "big": {BIG}}}', entity, agent, room),
            *(GONE if number == 1 else WORLD, utc(2024, 1, 1, 12, number, 0, 123456), number % 2 == 0),
        )
    rng = np.random.default_rng(3)

    async def embed(number: int, minute: int, width: int, value: Any = None) -> None:
        vector = rng.normal(size=width) if value is None else np.full(width, value)
        await run(
            f"INSERT INTO embeddings (memory_id, created_at, dim_{width}) VALUES ($1, $2, $3::text::vector)",
            *(memory(number), utc(2024, 1, 1, 12, minute), str(vector.astype(np.float32).tolist())),
        )

    for number in range(5):
        await embed(number, number, 384)
    for minute in (20, 30, 25):
        await embed(5, minute, 384, minute)  # three for one memory: the newest has the value 30
    await embed(6, 6, 384, 0)
    await run("INSERT INTO embeddings (memory_id) VALUES ($1)", memory(7))
    await embed(8, 40, 384)
    await embed(9, 41, 768)
    await embed(10, 42, 384)
    await embed(10, 43, 768)
    await run("INSERT INTO logs (entity_id, room_id, type, body) VALUES ($1, $2, 'action', '{\"a\": 1}')", ANN, ROOM)
    await run("INSERT INTO cache (key, agent_id, value) VALUES ('k', $1, 'null'), ('l', $1, '[1.50]')", ADA)
    await run(
        "INSERT INTO tasks (id, name, agent_id, world_id, tags) VALUES ($1, 't', $2, $3, '{queue}')",
        UUID(int=7),
        ADA,
        GONE,
    )
    await run("INSERT INTO message_servers (id, name, source_type) VALUES ($1, 's', 'discord')", SERVER)
    await run("INSERT INTO message_server_agents VALUES ($1, $2), ($1, $3)", SERVER, ADA, BOB)
    direct = f"DM-{ANN}-{BEN}"
    for number, (kind, name) in enumerate([("GROUP", "general"), ("DM", direct), ("DM", direct), ("GROUP", "odd")]):
        id = "no uuid" if name == "odd" else str(UUID(int=100 + number))
        await run(
            "INSERT INTO channels (id, message_server_id, name, type, created_at) VALUES ($1, $2, $3, $4, $5)",
            *(id, SERVER, name, kind, utc(2024, 1, 1, 12, number)),
        )
        for user in (ANN, BEN):
            await run("INSERT INTO channel_participants VALUES ($1, $2)", id, str(user))
        await run(
            "INSERT INTO central_messages (id, channel_id, author_id, content, in_reply_to_root_message_id) "
            "VALUES ($1, $2, $3, 'm', $4)",
            *(str(UUID(int=200 - number)), id, str(ANN), str(UUID(int=201 - number)) if number else None),
        )
    await run("CREATE TABLE fact_candidates (id int); INSERT INTO fact_candidates VALUES (1), (2)")
    await run("ANALYZE fact_candidates")


@pytest.fixture(params=["1.7", "1.6"])
async def eliza(source: str, request: pytest.FixtureRequest) -> str:
    """Give a database of the original, by the names of its columns in either line of versions."""
    async with connected(source) as connection:
        await fill(connection)
        if request.param == "1.6":
            for statement in AS_IN_1_6:
                await connection.execute(statement)
    return source


async def test_everything_arrives(eliza: str, target: str) -> None:
    old = await asyncpg.connect(eliza)
    is_old = await old.fetchval("SELECT to_regclass('server_agents') IS NOT NULL")
    await old.close()
    summary, decisions, told = await take(eliza, target)
    assert decisions.dimensions == {ADA: 384, BOB: 768}
    assert decisions.found == {ADA: {384: 9}, BOB: {768: 2, 384: 2}}
    assert set(decisions.left) == {"fact_candidates"}  # the number is the estimate of the server
    assert decisions.copied == {"entities": 1, "worlds": 1, "rooms": 1}
    by_table = {row.pop("table"): row for row in summary.rows()}
    assert all(
        row["read"] == row["created"] + row["kept"] + row["folded"] + row["refused"] for row in by_table.values()
    )
    assert {name: row["created"] for name, row in by_table.items()} == {
        "agents": 2, "worlds": 2, "rooms": 4, "entities": 4, "participants": 3, "components": 1, "relationships": 1,
        "memories": 12, "embeddings": 8, "cache": 2, "tasks": 1, "logs": 1, "message_servers": 1,
        "message_server_agents": 2, "channels": 2, "channel_participants": 4, "central_messages": 3,
        **({} if is_old else {"servers": 0}),
    }  # fmt: skip
    assert {name: row["folded"] for name, row in by_table.items() if row["folded"]} == {
        "participants": 2, "embeddings": 3, "channels": 1, "channel_participants": 2,
    }  # fmt: skip

    async with opened(target, ADA) as db:
        assert (await db.get_agent(ADA)).bio == "x"
        found = {each.id: each for each in await db.get_memories(table_name="messages", include_embedding=True)}
        assert len(found) == 8
        assert found[memory(3)].created_at == datetime(2024, 1, 1, 12, 3, 0, 123456, tzinfo=timezone.utc)
        assert found[memory(3)].unique is False and found[memory(3)].world_id == WORLD
        assert found[memory(1)].world_id is None
        assert found[memory(6)].embedding is None and found[memory(7)].embedding is None
        assert np.array_equal(found[memory(5)].embedding, np.full(384, 30))
        (world,) = await db.get_worlds_by_ids([WORLD])
        assert world.created_at == datetime(2024, 1, 2, 3, 4, 5, 600000, tzinfo=timezone.utc)
        if is_old:
            assert world.message_server_id == UUID(md5(b"guild 7").hexdigest())
        rooms = {room.id: room for room in await db.get_rooms_by_ids([ROOM, LOST])}
        assert rooms[ROOM].message_server_id == SERVER and rooms[ROOM].channel_id == "c"
        assert rooms[LOST].world_id is None
        assert await db.get_participant_user_state(room_id=ROOM, entity_id=ANN) == "MUTED"
        assert await db.get_participant_user_state(room_id=ROOM, entity_id=BEN) is None
        (component,) = await db.get_components(ANN)
        assert component.data == {"is": "new"}
        assert await db.get_cache("k") is None and await db.get_cache("l") == [1.5]
        (task,) = await db.get_tasks()
        assert task.world_id == GONE and task.tags == ["queue"]
        assert len(await db.get_logs()) == 1
        messages = {each.id: each for each in await db.get_messages_for_channel(UUID(int=101))}
        assert set(messages) == {UUID(int=199), UUID(int=198)}
        assert messages[UUID(int=199)].in_reply_to_root_message_id == UUID(int=200)
    async with opened(target, BOB) as db:
        found = {each.id: each for each in await db.get_memories(table_name="messages", include_embedding=True)}
        assert len(found) == 4 and found[memory(11)].room_id == ROOM and found[memory(11)].entity_id == BEN
        assert [number for number in (8, 9, 10, 11) if found[memory(number)].embedding is not None] == [9, 10]
        assert found[memory(9)].embedding.shape == (768,)
        assert (await db.get_entities_by_ids([BEN]))[0].names == ["n", "m"]
        assert await db.is_room_participant(OWN, BOB)
    async with connected(target) as connection:
        # A number that no double holds is as it was.
        text = await connection.fetchval("SELECT content ->> 'big' FROM elizasql.memories WHERE id = $1", memory(3))
        assert text == str(BIG)

    assert told.of("embeddings") == [
        "embedding is a zero vector, which has no direction",
        "there is no vector in it",
        "its width is 384, for its agent the width 768 is taken",
    ]
    assert told.of("participants") == ["there is no state BANANA"]
    assert told.of("components") == ["another row has its place"]
    assert told.of("memories") == [f"there is no world {GONE}"]
    assert told.of("channels") == ["its id is no UUID"]
    assert told.of("channel_participants") == ["its channel is no UUID"] * 2
    assert sorted(told.of("central_messages")) == [
        "its channel is no UUID",
        f"its channel was {UUID(int=102)}, one of several for two users",
    ]
    refused = [row for table, row, _ in told if table == "components"]
    assert refused[0]["data"] == {"is": "old"}  # the row as a whole: nothing is lost
    expected = {"rooms": 1, "worlds": 1} if is_old else {"rooms": 1}
    assert {
        name: row["altered"] for name, row in by_table.items() if name in ("rooms", "worlds") and row["altered"]
    } == expected


@pytest.mark.parametrize("version", ["1.7", "1.6"])
async def test_every_value_arrives(source: str, version: str) -> None:
    """None is left to a default, whatever its column is called there."""
    ids = {"servers": GONE, "agents": ADA, "worlds": WORLD, "rooms": ROOM, "entities": ANN, "message_servers": SERVER}
    ids |= {"channels": UUID(int=100), "central_messages": UUID(int=200)}
    given: dict[str, Any] = {"server_id": GONE, "agent_id": ADA, "world_id": WORLD, "room_id": ROOM}
    given |= dict.fromkeys(("entity_id", "source_entity_id", "target_entity_id", "author_id"), ANN)
    given |= {"message_server_id": SERVER, "channel_id": UUID(int=100), "in_reply_to_root_message_id": UUID(int=200)}
    given |= {"room_state": "MUTED"}
    times = itertools.count(1)
    of_kind: dict[str, Callable[[str], object]] = {
        "uuid": lambda _: uuid4(),
        "text": str,
        "text[]": lambda place: f'{{"{place}"}}',
        "jsonb": lambda place: json.dumps({"of": place}),
        "boolean": lambda _: False,
        "timestamp with time zone": lambda _: f"2024-01-02 03:04:05.{next(times):06}+00",
        "timestamp without time zone": lambda _: f"2024-01-02 03:04:05.{next(times):06}",
    }
    rows: dict[str, dict[str, Any]] = {}

    async def only_row(connection: asyncpg.Connection[Any], table: str) -> dict[str, Any]:
        await connection.execute("SET TimeZone = 'UTC'")
        (row,) = await connection.fetch(f"SELECT to_jsonb(t)::text FROM {table} AS t")
        found: dict[str, Any] = json.loads(row[0].replace("+00:00", ""))
        return found

    async with connected(source) as connection:
        await connection.execute(TABLES)
        listing = (
            "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' ORDER BY oid"
        )
        for (table,) in await connection.fetch(listing):
            if table == "embeddings":
                continue
            columns = await connection.fetch(
                "SELECT attname, format_type(atttypid, NULL) FROM pg_attribute "
                "WHERE attrelid = $1::text::regclass AND attnum > 0 ORDER BY attnum",
                table,
            )
            values = {**given, "id": ids.get(table, uuid4())}
            row = [values.get(name) or of_kind[kind](f"{table} {name}") for name, kind in columns]
            kinds = ", ".join(f"${place}::text::{kind}" for place, (_, kind) in enumerate(columns, 1))
            await connection.execute(f"INSERT INTO {table} VALUES ({kinds})", *map(str, row))
            rows[table] = await only_row(connection, table)
        if version == "1.6":
            for statement in AS_IN_1_6:
                await connection.execute(statement)
            del rows["servers"]
            rows["agents"]["server_id"] = None
            rows["worlds"]["message_server_id"] = str(UUID(md5(b"guild 7").hexdigest()))
    await take(source, source)
    async with connected(source) as connection:
        for table, expected in rows.items():
            found = await only_row(connection, f"elizasql.{table}")
            assert {name: found[name] for name in expected} == expected, table


async def test_a_second_time_changes_nothing(eliza: str, target: str) -> None:
    _, _, first = await take(eliza, target)
    before = await rows_of(target)
    summary, decisions, second = await take(eliza, target)
    assert await rows_of(target) == before
    assert not +summary.created and not any(decisions.copied.values())
    assert sorted(first, key=str) == sorted(second, key=str)
    # What was changed here since then stays, and what came there since then is taken.
    async with opened(target) as db:
        await db.update_memory({"id": memory(0), "content": {"text": "mine"}})
    async with connected(eliza) as connection:
        await connection.execute("INSERT INTO cache (key, agent_id, value) VALUES ('later', $1, '1')", ADA)
    summary, _, _ = await take(eliza, target)
    assert +summary.created == {"cache": 1}
    async with opened(target) as db:
        assert (await db.get_memory_by_id(memory(0))).content == {"text": "mine"}


async def test_a_dry_run_says_the_same_and_writes_nothing(eliza: str, target: str) -> None:
    before = await rows_of(target)
    dry, decisions, told = await take(eliza, None)
    assert await rows_of(target) == before
    wet, _, real = await take(eliza, target)
    assert decisions.dimensions == {ADA: 384, BOB: 768}
    assert dry.folded == wet.folded
    # What only the database that takes them can know: two components for one place.
    assert set(map(str, real)) - set(map(str, told)) == {str(each) for each in real if each[0] == "components"}
    for table, count in dry.read.items():
        assert wet.read[table] - count == {"worlds": 1, "rooms": 1, "entities": 1}.get(table, 0), table


async def test_an_interruption_is_made_good_by_the_next(
    eliza: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", 2)
    left = 0

    def stop(*_: object) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt

    for left in (3, 10, 14, 20, 25):  # noqa: B007
        with pytest.raises(KeyboardInterrupt):
            await take(eliza, target, advance=stop)
    await take(eliza, target)
    after = await rows_of(target)
    assert len(after["memories"]) == 12 and len(after["embeddings"]) == 8 and len(after["central_messages"]) == 3


async def test_what_is_missing_is_fetched_while_the_source_is_read(
    eliza: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", 1)
    summary, decisions, _ = await take(eliza, target)
    assert summary.created["memories"] == 12 and summary.created["embeddings"] == 8
    assert decisions.copied == {"entities": 1, "worlds": 1, "rooms": 1}


async def test_one_agent_and_another_width(eliza: str, target: str) -> None:
    summary, decisions, told = await take(eliza, target, agent_ids=[BOB], dimension=384)
    assert decisions.dimensions == {BOB: 384}
    assert summary.created["agents"] == 1 and summary.created["memories"] == 4 and summary.created["embeddings"] == 2
    assert told.of("embeddings") == ["its width is 768, for its agent the width 384 is taken"]
    assert not (await rows_of(target))["logs"]
    with pytest.raises(ConfigurationError, match="dimension must be one of"):
        await take(eliza, target, dimension=1000)


async def test_an_agent_that_is_locked_keeps_its_width(eliza: str, target: str) -> None:
    async with opened(target, BOB) as db:
        await db.ensure_agent_exists({"name": "Bob"})
        await db.ensure_embedding_dimension(384)
    _, decisions, told = await take(eliza, target)
    assert decisions.dimensions[BOB] == 384
    assert "its width is 768, for its agent the width 384 is taken" in told.of("embeddings")
    async with opened(target, BOB) as db:
        assert await db.get_embedding_dimension() == 384
        assert (await db.stats())["unindexed"] == 2


async def test_both_in_one_database(eliza: str) -> None:
    """Our schema beside the original's: neither is in the other's way."""
    listing = "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace ORDER BY 1"
    async with connected(eliza) as connection:
        before = await connection.fetch(listing)
    summary, _, _ = await take(eliza, eliza)
    assert summary.created["memories"] == 12
    async with connected(eliza) as connection:
        assert await connection.fetch(listing) == before
        assert await connection.fetchval("SELECT count(*) FROM memories") == 12


async def test_searches_find_what_exact_search_finds_there(eliza: str, target: str) -> None:
    await take(eliza, target)
    rng = np.random.default_rng(9)
    owner = '"agentId"' if (await _columns(eliza, "memories")) & {"agentId"} else "agent_id"
    async with opened(target, ADA) as db, connected(eliza) as connection:
        for _ in range(5):
            query = rng.normal(size=384).astype(np.float32)
            rows = await connection.fetch(
                "SELECT memory_id FROM embeddings JOIN memories m ON m.id = memory_id "
                f"WHERE m.{owner} = $2 AND vector_norm(dim_384) > 0 AND (memory_id <> $3 OR dim_384 = $4::text::vector)"
                " ORDER BY dim_384 <=> $1::text::vector",
                *(str(query.tolist()), ADA, memory(5), str([30.0] * 384)),
            )
            hits = await db.search_memories(embedding=query, table_name="messages", count=10)
            assert [hit.id for hit in hits] == [row["memory_id"] for row in rows]


async def _columns(address: str, table: str) -> set[str]:
    async with connected(address) as connection:
        rows = await connection.fetch("SELECT attname FROM pg_attribute WHERE attrelid = $1::text::regclass", table)
        return {row["attname"] for row in rows}


async def test_other_databases_are_refused(source: str, target: str) -> None:
    with pytest.raises(ConfigurationError, match=r"no database of ElizaOS's.*public\.agents"):
        await take(source, target)
    async with connected(source) as connection:
        await connection.execute(TABLES)
        await connection.execute("DROP TABLE embeddings")
    with pytest.raises(ConfigurationError, match=r"public\.embeddings"):
        await take(source, target)


async def test_hidden_rows_are_an_error_and_not_left_out(eliza: str, target: str) -> None:
    async with connected(eliza) as connection:
        await connection.execute("ALTER TABLE memories ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
    with pytest.raises(PermissionDeniedError, match=r"data isolation is on there.* of public\.memories: connect"):
        await take(eliza, target)
    summary, _, _ = await take(admin(eliza), target)
    assert summary.created["memories"] == 12


async def test_rows_that_point_at_nothing(source: str, target: str) -> None:
    """Foreign keys may be missing there: each row that has nothing to point at is named, the others arrive."""
    async with connected(source) as connection:
        await fill(connection)
        for table, name in await connection.fetch(
            "SELECT conrelid::regclass::text, conname FROM pg_constraint WHERE contype = 'f' "
            "AND connamespace = 'public'::regnamespace"
        ):
            await connection.execute(f"ALTER TABLE {table} DROP CONSTRAINT {name}")
        await connection.execute("DELETE FROM entities WHERE id = $1", ANN)
        await connection.execute("DELETE FROM memories WHERE id = $1", memory(3))
        await connection.execute("UPDATE rooms SET agent_id = NULL WHERE id = $1", LOST)
    summary, _, told = await take(source, target)
    assert summary.created["memories"] == 4 and set(told.of("memories")) >= {f"there is no entity {ANN}"}
    assert told.of("memories").count(f"there is no entity {ANN}") == 7
    assert told.of("embeddings").count(f"there is no memory {memory(3)}") == 1
    assert "agent_id is missing" in told.of("rooms")
    assert told.of("participants").count(f"there is no entity {ANN}") == 1
    assert told.of("logs") == [f"there is no entity {ANN}"]
    assert told.of("relationships") == [f"there is no entity {ANN}"]


# --- what breaks this library's rules ---------------------------------------------------------------------------------


async def test_rooms_that_belong_to_no_agent(source: str, target: str) -> None:
    async with connected(source) as connection:
        await fill(connection)
        await connection.execute("UPDATE rooms SET agent_id = NULL WHERE id = $1", OWN)
        await connection.execute(
            "INSERT INTO logs (entity_id, room_id, type, body) VALUES ($1, $2, 'x', '{}')", BOB, OWN
        )
    summary, _, told = await take(source, target)
    assert summary.created["memories"] == 12  # Bob's are his, whosever the room is
    for table in ("rooms", "logs", "participants"):
        assert "agent_id is missing" in told.of(table), table


async def test_a_direct_channel_whose_id_cannot_be_taken_takes_no_other_along(source: str, target: str) -> None:
    async with connected(source) as connection:
        await fill(connection)
        await connection.execute(
            "INSERT INTO channels (id, message_server_id, name, type, created_at) "
            "SELECT 'oldest', message_server_id, name, type, '2000-01-01' FROM channels WHERE id = $1",
            str(UUID(int=101)),
        )
    summary, _, told = await take(source, target)
    assert summary.created["channels"] == 2 and summary.folded["channels"] == 1
    assert told.of("channels") == ["its id is no UUID"] * 2
    assert summary.created["central_messages"] == 3


async def test_messages_whose_answered_message_does_not_come(source: str, target: str) -> None:
    strange, anonymous = "message 1", str(UUID(int=300))
    async with connected(source) as connection:
        await fill(connection)
        for id, author, answers in (
            (strange, str(ANN), None),
            (anonymous, "nobody", None),
            (str(UUID(int=301)), str(ANN), strange),
            (str(UUID(int=302)), str(ANN), anonymous),
        ):
            await connection.execute(
                "INSERT INTO central_messages (id, channel_id, author_id, content, in_reply_to_root_message_id) "
                "VALUES ($1, $2, $3, 'late', $4)",
                *(id, str(UUID(int=100)), author, answers),
            )
    for _ in range(2):
        summary, _, told = await take(source, target)
        said = {row["id"]: problem for table, row, problem in told if row.get("content") == "late"}
        assert said == {
            strange: "its id is no UUID",
            anonymous: "its author is no UUID",
            str(UUID(int=301)): f"the id of the message that it answers is no UUID: {strange}",
            str(UUID(int=302)): f"there is no message {anonymous} that it answers",
        }
        assert summary.altered["central_messages"] == 3  # the third is in a folded channel


async def test_a_time_outside_the_calendar_is_moved_to_its_end(eliza: str, target: str) -> None:
    name = '"createdAt"' if "createdAt" in await _columns(eliza, "memories") else "created_at"
    times = {memory(0): "55840-01-01", memory(2): "0044-03-15 BC", memory(3): "infinity"}
    async with connected(eliza) as connection:
        for id, time in times.items():
            await connection.execute(f"UPDATE memories SET {name} = '{time}' WHERE id = $1", id)
    _, _, told = await take(eliza, target)
    said = {UUID(row["id"]): problem for table, row, problem in told if table == "memories"}
    assert said.keys() - {memory(1)} == times.keys()
    assert said[memory(0)] == "its time lies outside the calendar: 55840-01-01 00:00:00"
    async with opened(target) as db:
        found = {each.id: each.created_at for each in await db.get_memories(table_name="messages")}
    last = datetime.max.replace(tzinfo=timezone.utc)
    assert found[memory(0)] == found[memory(3)] == last
    assert found[memory(2)] == datetime.min.replace(tzinfo=timezone.utc)


async def test_a_name_that_no_index_holds_takes_no_other_row_along(source: str, target: str) -> None:
    """The original has no index on these."""
    long = "".join(map(chr, range(0x4E00, 0x4E00 + 3000)))
    async with connected(source) as connection:
        await fill(connection)
        await connection.execute("INSERT INTO tasks (name, agent_id) VALUES ($1, $2)", long, ADA)
        await connection.execute(
            "INSERT INTO logs (entity_id, room_id, type, body) VALUES ($1, $2, $3, '{}')", ANN, ROOM, long
        )
        await connection.execute(
            "INSERT INTO components (entity_id, agent_id, room_id, type) VALUES ($1, $2, $3, $4)", ANN, ADA, ROOM, long
        )
    summary, _, told = await take(source, target)
    assert "its name is too long for an index" in told.of("tasks")
    for table in ("logs", "components"):
        assert "its type is too long for an index" in told.of(table)
    assert min(summary.created[table] for table in ("tasks", "logs", "components")) > 0


async def test_a_number_that_no_double_holds_in_a_row_that_needs_a_copy(source: str, target: str) -> None:
    async with connected(source) as connection:
        await fill(connection)
        await connection.execute("UPDATE memories SET content = '{\"n\": 1e400}' WHERE id = $1", memory(11))
    summary, _, _ = await take(source, target)
    assert summary.created["memories"] == 12
    async with connected(target) as connection:
        text = await connection.fetchval("SELECT content ->> 'n' FROM elizasql.memories WHERE id = $1", memory(11))
    assert text == str(10**400)


async def test_everything_that_a_room_loses_is_told(source: str, target: str) -> None:
    async with connected(source) as connection:
        await fill(connection)
        for statement in AS_IN_1_6:
            await connection.execute(statement)
        await connection.execute("UPDATE rooms SET \"serverId\" = 'guild 8' WHERE id = $1", LOST)
    _, _, told = await take(source, target)
    assert told.of("rooms") == [f"there is no world {GONE}; message server guild 8 got an id made of its name"]


async def test_tables_that_nobody_has_counted_are_named(source: str) -> None:
    async with connected(admin(source)) as connection:
        await connection.execute(TABLES)
        await connection.execute("CREATE TABLE empty (id int); CREATE TABLE full_one AS SELECT 1 AS id")
        for statement in ("SELECT pg_stat_force_next_flush()", "SELECT pg_stat_reset()"):
            await connection.execute(statement)
    _, decisions, _ = await take(admin(source), None)
    assert decisions.left == {"full_one": None}


async def test_an_agent_that_is_not_there(source: str, target: str) -> None:
    async with connected(source) as connection:
        await fill(connection)
    for place in (None, target):
        with pytest.raises(NotFoundError, match=f"there is no agent {GONE}"):
            await take(source, place, agent_ids=[ADA, GONE])
    assert not any((await rows_of(target)).values())
    with pytest.raises(ArgumentError, match="agent_id must be a UUID"):
        await take("postgresql://nowhere.invalid/x", None, agent_ids=["Ada"])


async def test_no_limit_of_the_servers_own_ends_what_reads_it(source: str) -> None:
    """The transaction stands idle while the database that takes the rows is slow."""
    limits = {"statement_timeout": "10s", "idle_in_transaction_session_timeout": "10s", "TimeZone": "Asia/Tokyo"}
    async with connected(admin(source)) as connection:
        if connection.get_server_version() >= (17,):
            limits["transaction_timeout"] = "10s"
        for name, value in limits.items():
            await connection.execute(f"ALTER DATABASE {urlsplit(source).path[1:]} SET {name} = '{value}'")
    async with snapshot(source, Config()) as opened:
        found = {name: await opened._connection.fetchval("SELECT current_setting($1)", name) for name in limits}
    assert found == {name: "UTC" if name == "TimeZone" else "0" for name in limits}


def test_its_statements_stand_apart_from_ours() -> None:
    assert not set(module.reads()) & set(SQL)
    used = {name for _, name, _ in module._READS} | {name for _, name in module._COPIES.values()}
    assert set(module.reads()) == used | {
        "list_source_tables",
        "count_rows",
        "find_agents",
        "find_dimensions",
        "read_embeddings",
    }


# --- the real package ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packages() -> Iterator[Path]:
    """Give a folder with the original in node_modules; ELIZASQL_TEST_NODE names one that is kept."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("Node and npm are not installed")
    kept = os.environ.get("ELIZASQL_TEST_NODE")
    folder = Path(kept) if kept else Path(tempfile.mkdtemp(prefix="esql-node-"))
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "node_modules" / "@elizaos" / "plugin-sql").is_dir():
        run = subprocess.run(
            [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--legacy-peer-deps", *PACKAGES],
            cwd=folder, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        if run.returncode:
            pytest.skip(f"npm cannot install {PACKAGES[0]}: {run.stderr.strip().splitlines()[-1:]}")
    yield folder
    if not kept:
        shutil.rmtree(folder, ignore_errors=True)


def make(packages: Path, where: str) -> dict[str, Any]:
    script = Path(__file__).parent / "node" / "make_database.mjs"
    run = subprocess.run(
        ["node", str(script), where], cwd=packages, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "LOG_LEVEL": "error"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    made: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    return made


async def check(made: dict[str, Any], summary: Summary, told: Told, target: str) -> None:
    assert summary.created["memories"] == summary.read["memories"] == sum(made["memories"].values())
    assert summary.read["embeddings"] - summary.folded["embeddings"] == summary.created["embeddings"] + 3
    assert set(told.of("embeddings")) == {
        "embedding is a zero vector, which has no direction",
        "there is no vector in it",
        "its width is 384, for its agent the width 768 is taken",
    }
    assert summary.folded["participants"] == 2
    ada, bob = UUID(made["ada"]), UUID(made["bob"])
    async with opened(target, ada) as db:
        assert await db.get_embedding_dimension() == 384
        assert await db.count_memories(table_name="documents") == 2
        (hit,) = await db.get_memories_by_ids([made["twice"]], include_embedding=True)
        assert hit.embedding is not None
        assert (await db.get_agent(ada)).settings == {"secrets": {"KEY": "value"}}
        (person,) = await db.get_entities_by_ids([made["people"][0]])
        assert person.metadata == {"n": 0, "deep": {"ключ": ["é", None, 1e21]}}
        assert await db.get_cache("key") == {"a": [1, "two"]}
        first = await db.get_memories(table_name="messages", end=datetime(2024, 1, 1, 0, 0, 2, tzinfo=timezone.utc))
        assert first[0].created_at == datetime(2024, 1, 1, 0, 0, 1, 1000, tzinfo=timezone.utc)
    async with opened(target, bob) as db:
        assert await db.get_embedding_dimension() == 768
        assert await db.get_cache("key") is False
        kept = await db.get_memories_by_ids([made["old"], *made["newest"]], include_embedding=True)
        assert {each.id: each.embedding is not None for each in kept} == {
            UUID(made["old"]): False,
            **{UUID(id): True for id in made["newest"]},
        }


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_a_database_of_the_real_package(packages: Path, source: str) -> None:
    """On the same PostgreSQL; the original through its own methods, our schema beside its tables."""
    made = await asyncio.to_thread(make, packages, source)
    summary, _, told = await take(source, source)
    await check(made, summary, told, source)
    again, _, _ = await take(source, source)
    assert not +again.created


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_a_pglite_of_the_real_package(
    packages: Path, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pglite"
    made = await asyncio.to_thread(make, packages, str(folder))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.chdir(packages)
    async with serve_pglite(folder) as address:
        summary, _, told = await take(address, source)
    await check(made, summary, told, source)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in for Node by what is ready at once and does not end; give a folder for it to serve."""
    (tmp_path / "node").write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\necho ready\nexec sleep 300\n")
    (tmp_path / "node").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name in ("temporary", "data"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "data"


async def test_a_copy_of_a_pglite_is_served(stand_in: Path) -> None:
    """Two processes that open one folder would destroy it, and ElizaOS may run."""
    place = stand_in.parent
    script = (place / "node").read_text().replace("sleep 300", "cat")
    (place / "node").write_text(script.replace("echo ready", f"echo $2 > {place}/served; echo ready"))
    (stand_in / "PG_VERSION").write_text("17")
    async with serve_pglite(stand_in):
        served = Path((place / "served").read_text().strip())
        assert served != stand_in and (served / "PG_VERSION").read_text() == "17"
        (served / "PG_VERSION").unlink()
    assert not served.exists() and [each.name for each in stand_in.iterdir()] == ["PG_VERSION"]


@pytest.mark.parametrize(
    ("says", "told"),
    [
        ("echo 'error it is no PGlite'", ": it is no PGlite; run this in the folder"),
        ("exit 0", ": Node ended at once; run this in the folder"),
        ("exec cat", " within 0.05 s$"),
    ],
)
async def test_a_pglite_that_does_not_open_is_an_error(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch, says: str, told: str
) -> None:
    (stand_in.parent / "node").write_text(f"#!/bin/sh\n{says}\n")
    if "within" in told:
        monkeypatch.setattr("elizasql.transfer.node._PATIENCE", 0.05)
    with pytest.raises(ConfigurationError, match=f"PGlite does not open {stand_in}{told}"):
        async with serve_pglite(stand_in):
            pass
    assert list(Path(tempfile.gettempdir()).iterdir()) == []


async def test_a_copy_that_is_cut_leaves_nothing(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()

    async def cancel() -> None:
        task.cancel()
        for _ in range(10):
            await asyncio.sleep(0)

    def copy(source: Path, target: Path) -> None:
        asyncio.run_coroutine_threadsafe(cancel(), loop).result(60)
        target.mkdir(parents=True)

    async def work() -> None:
        async with serve_pglite(stand_in):
            pass

    monkeypatch.setattr(shutil, "copytree", copy)
    task = asyncio.create_task(work())
    with pytest.raises(asyncio.CancelledError):
        await task
    await loop.shutdown_default_executor()
    assert list(Path(tempfile.gettempdir()).iterdir()) == []


async def test_a_pglite_whose_end_is_cut_is_gone(stand_in: Path) -> None:
    served = asyncio.Event()

    async def work() -> None:
        async with serve_pglite(stand_in):
            served.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await served.wait()
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(ProcessLookupError):
        os.kill(int((stand_in.parent / "pid").read_text()), 0)
    assert list(Path(tempfile.gettempdir()).iterdir()) == []


@pytest.mark.slow
async def test_a_pglite_without_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("node") is None:
        pytest.skip("Node is not installed")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(ConfigurationError, match=r"Node package @electric-sql/pglite is missing.*npm install"):
        async with serve_pglite(tmp_path / "data"):
            pass
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigurationError, match="Node is missing"):
        async with serve_pglite(tmp_path / "data"):
            pass
