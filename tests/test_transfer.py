"""Archives: what goes out comes back as it was, from every table; and nothing is ever half done."""

from __future__ import annotations

import asyncio
import bz2
import contextlib
import gzip
import hashlib
import io
import json
import lzma
import os
import random
import tarfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID, uuid4

import asyncpg
import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import elizasql
from elizasql import DatabaseAdapter, Entity, Memory, Room
from elizasql._statements import SQL
from elizasql.config import Config
from elizasql.errors import (
    ArgumentError,
    DataError,
    EmbeddingDimensionError,
    NotFoundError,
    NotNullError,
    PermissionDeniedError,
)
from elizasql.transfer import (
    Archive,
    ArchiveError,
    Summary,
    _archive,
    _connection,
    _rows,
    export,
    export_archive,
    import_archive,
)
from elizasql.transfer._report import Report
from elizasql.transfer.importer import put_vectors
from tests.conftest import COPIED, MakeAdapter, make_scene
from tests.locking import blocked_pid

pytestmark = pytest.mark.skipif("ELIZASQL_TEST_URL" in os.environ, reason="needs a server to make databases on")

TABLES = [table.name for table in _rows.TABLES] + ["embeddings"]


def admin(address: str) -> str:
    return address.replace("//elizasql@", "//postgres@")


@asynccontextmanager
async def connected(address: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    connection = await asyncpg.connect(address)
    try:
        yield connection
    finally:
        await connection.close()


@pytest.fixture(scope="module")
def databases(dsn: str) -> Iterator[list[str]]:
    """Give two migrated databases that belong to this module."""

    async def make() -> list[str]:
        names = [f"test_{uuid4().hex}" for _ in range(2)]
        made = [urlunsplit(urlsplit(dsn)._replace(path=f"/{name}")) for name in names]
        async with connected(admin(dsn)) as connection:
            await connection.execute(f"CREATE DATABASE {names[0]} OWNER elizasql {COPIED}")
            async with connected(admin(made[0])) as inside:
                await inside.execute("CREATE EXTENSION vector")
            async with elizasql.connect(agent_id=uuid4(), dsn=made[0], indexing="manual", pool_min_size=0):
                pass
            await connection.execute(f"CREATE DATABASE {names[1]} OWNER elizasql TEMPLATE {names[0]} {COPIED}")
        return made

    async def drop(made: list[str]) -> None:
        async with connected(admin(dsn)) as connection:
            for address in made:
                await connection.execute(f"DROP DATABASE {urlsplit(address).path[1:]} WITH (FORCE)")

    made = asyncio.run(make())
    yield made
    asyncio.run(drop(made))


@asynccontextmanager
async def opened(address: str, agent_id: UUID | None = None) -> AsyncIterator[DatabaseAdapter]:
    settings = {"indexing": "manual", "pool_min_size": 0, "pool_max_size": 3}
    async with elizasql.connect(agent_id=agent_id or UUID(int=0), dsn=address, **settings) as db:
        yield db


async def clear(address: str) -> None:
    async with connected(address) as connection:
        await connection.execute(SQL["delete_everything"].sql)


async def contents(address: str) -> dict[str, list[str]]:
    """Give every row of every table as JSON text, in a fixed order; not decoded, since numbers may be of any size."""
    found = {}
    async with connected(address) as connection:
        for name in TABLES:
            # An index and a transaction are the database's own.
            line = (
                "(to_jsonb(t) - '{indexed,xid,text_hash}'::text[])::text"
                if name == "embeddings"
                else "to_jsonb(t)::text"
            )
            rows = await connection.fetch(f"SELECT {line} AS line FROM elizasql.{name} AS t ORDER BY 1")
            found[name] = [row["line"] for row in rows]
    return found


def decoded(found: dict[str, list[str]], name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in found[name]]


async def out(address: str, path: Path, **options: Any) -> dict[str, Any]:
    return await export_archive(address, path, Config(), **options)


async def into(address: str, path: Path, **options: Any) -> Summary:
    with Archive(path) as archive:
        async with opened(address) as db:
            return await import_archive(db, archive, **options)


# --- rows of every table ---------------------------------------------------------------------------------------------


texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x00"), max_size=8)
numbers = st.one_of(st.integers(-(2**70), 2**70), st.sampled_from(["1e400", "0.1000000000000000000001", "-0.0"]))
documents = st.recursive(
    st.one_of(st.none(), st.booleans(), texts.map(json.dumps), numbers.map(str)).map(
        lambda value: {None: "null", True: "true", False: "false"}.get(value, value)  # type: ignore[call-overload]
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]"),
        st.dictionaries(texts, inner, max_size=3).map(
            lambda items: "{" + ", ".join(f"{json.dumps(key)}: {value}" for key, value in items.items()) + "}"
        ),
    ),
    max_leaves=5,
)


class Filler:
    """Makes rows for every table of the schema as the catalog describes it, whatever columns there are."""

    def __init__(self, connection: asyncpg.Connection[Any], draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self._connection = connection
        self._draw = draw
        self._random = random.Random(draw(st.integers(0, 2**32)))
        self._rows: dict[str, list[dict[str, Any]]] = {}

    async def fill(self) -> None:
        for name in TABLES:
            columns = await self._connection.fetch(
                "SELECT attname AS name, format_type(atttypid, NULL) AS kind, attnotnull AS needed "
                "FROM pg_attribute WHERE attrelid = $1::text::regclass AND attnum > 0 "
                "AND NOT attisdropped AND attgenerated = '' ORDER BY attnum",
                f"elizasql.{name}",
            )
            self._rows[name] = []
            owners: list[Any] = [None]
            if any(column["name"] == "agent_id" for column in columns):
                owners = [row["id"] for row in self._rows["agents"]]
            for owner in owners:
                for number in range(2 if name == "agents" else self._random.randint(0, 3)):
                    await self._insert(name, columns, owner, number)

    def _pick(self, table: str, owner: Any, column: str = "id") -> Any:
        rows = [row for row in self._rows[table] if owner is None or row.get("agent_id", owner) == owner]
        return self._random.choice(rows)[column] if rows else None

    async def _insert(self, name: str, columns: list[asyncpg.Record], owner: Any, number: int) -> None:
        row = {column["name"]: self._value(name, column, owner, number) for column in columns}
        if name == "embeddings":
            memory = self._pick("memories", owner)
            dimension = next(agent["embedding_dimension"] for agent in self._rows["agents"] if agent["id"] == owner)
            if memory is None or dimension is None:
                return
            row["memory_id"], row["dimension"] = memory, dimension
            row[f"dim_{dimension}"] = str([self._random.uniform(-1, 1) for _ in range(dimension)])
            scope = next(each for each in self._rows["memories"] if (each["agent_id"], each["id"]) == (owner, memory))
            row |= {key: scope[key] for key in ("type", "room_id", "world_id", "entity_id", "unique")}
        if any(column["needed"] and row[column["name"]] is None for column in columns):
            return
        kinds = [column["kind"] for column in columns]
        values = ", ".join(f"${place}::text::{kind}" for place, kind in enumerate(kinds, 1))
        names = ", ".join(f'"{key}"' for key in row)
        made = await self._connection.fetchrow(
            f"INSERT INTO elizasql.{name} ({names}) VALUES ({values}) ON CONFLICT DO NOTHING RETURNING 1",
            *(None if value is None else str(value) for value in row.values()),
        )
        if made is not None:
            self._rows[name].append(row)

    def _value(self, name: str, column: asyncpg.Record, owner: Any, number: int) -> Any:
        key, kind = column["name"], column["kind"]
        fixed: dict[str, Callable[[], Any]] = {
            "agent_id": lambda: owner,
            "embedding_dimension": lambda: (384, None)[number] if self._random.random() < 0.5 else 512,
            "room_state": lambda: self._random.choice([None, "MUTED", "FOLLOWED"]),
            "status": lambda: self._random.choice(["IN_PROGRESS", "DONE", "FAILED"]),
            "attempts": lambda: self._random.randint(0, 3),
            "max_attempts": lambda: self._random.randint(1, 5),
            "unique": lambda: self._random.random() < 0.5,
            "indexed": lambda: False,
            "xid": lambda: 1,
            "key_hash": lambda: "",  # a trigger makes it
            "dimension": lambda: None,
            "in_reply_to_root_message_id": lambda: self._pick("central_messages", None),
            "message_server_id": lambda: self._pick("message_servers", None),
            "channel_id": lambda: self._pick("channels", None),
        }
        if name in ("worlds", "rooms") and key in ("message_server_id", "channel_id"):
            return uuid4() if kind == "uuid" else self._draw(texts)
        if key in fixed:
            return fixed[key]()
        parents = {"room_id": "rooms", "world_id": "worlds", "entity_id": "entities", "source_entity_id": "entities",
                   "target_entity_id": "entities"}  # fmt: skip
        if key in parents and "agent_id" in self._columns_of(name):
            chosen = self._pick(parents[key], owner)
            return chosen if column["needed"] or self._random.random() < 0.8 else None
        if not column["needed"] and self._random.random() < 0.3:
            return None
        return self._random_value(kind)

    @staticmethod
    def _columns_of(name: str) -> tuple[str, ...]:
        shared = {table.name for table in _rows.TABLES if table.shared}
        return () if name in shared else ("agent_id",)

    def _random_value(self, kind: str) -> Any:
        if kind == "uuid":
            return UUID(int=self._random.getrandbits(128))
        if kind.startswith("timestamp"):
            moment = datetime(2000, 1, 1, tzinfo=timezone.utc) + timedelta(microseconds=self._random.getrandbits(57))
            return moment.isoformat()
        if kind == "jsonb":
            return self._draw(documents)
        if kind == "text":
            return self._draw(texts)
        if kind == "text[]":
            return "{" + ",".join(json.dumps(text) for text in self._draw(st.lists(texts, max_size=3))) + "}"
        if kind in ("smallint", "integer", "bigint"):
            return self._random.randint(0, 1000)
        if kind == "boolean":
            return self._random.random() < 0.5
        assert kind == "vector", f"the test knows no values of type {kind}"
        return None


@pytest.mark.parametrize("examples", [4, pytest.param(12, marks=pytest.mark.slow)])
def test_what_goes_out_comes_back(
    databases: list[str], tmp_path_factory: pytest.TempPathFactory, examples: int
) -> None:
    # Shrinking would take minutes, as every example fills and copies a database.
    @settings(
        max_examples=examples,
        phases=[Phase.explicit, Phase.reuse, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data(), kind=st.sampled_from(["", ".tar", ".tar.gz"]))
    def run(data: Any, kind: str) -> None:
        asyncio.run(there_and_back(databases, tmp_path_factory.mktemp("archive") / f"made{kind}", data))

    run()


async def there_and_back(databases: list[str], path: Path, data: Any) -> None:
    one, other = databases
    await clear(one)
    await clear(other)
    async with connected(one) as connection:
        await Filler(connection, data.draw).fill()
    before = await contents(one)
    told = await out(one, path)
    assert told["rows"] == {name: len(rows) for name, rows in before.items() if rows}
    summary = await into(other, path)
    assert await contents(other) == before
    assert summary.created == {name: len(rows) for name, rows in before.items() if rows}
    assert not +summary.refused
    # Once more: nothing changes, and the archive of the copy holds the same parts.
    again = await into(other, path)
    assert not +again.created and not +again.refused
    assert await contents(other) == before
    second = path.with_name(f"again{path.name.removeprefix('made')}")
    await out(other, second)
    with Archive(path) as first, Archive(second) as copy:
        assert [part.sha256 for part in first.parts] == [part.sha256 for part in copy.parts]


async def test_every_table_of_the_schema_is_moved(raw: asyncpg.Connection[Any]) -> None:
    rows = await raw.fetch(
        "SELECT c.relname FROM pg_class AS c INNER JOIN pg_namespace AS n ON n.oid = c.relnamespace "
        "WHERE n.nspname = 'elizasql' AND c.relkind IN ('r', 'p') AND NOT c.relispartition"
    )
    # A move to another width stays behind: what is taken along are the vectors in force. So do numbers of transactions.
    assert {row["relname"] for row in rows} - {"schema_migrations", "reembeddings", "memory_rewrites"} == set(TABLES), (
        "a table was added: give it export_X and import_X in sql/transfer.sql, and a place in transfer/_rows.py"
    )


async def test_everything_is_deleted(databases: list[str]) -> None:
    async with opened(databases[0], uuid4()) as db:
        await db.ensure_agent_exists({"name": "a"})
        await make_scene(db)
        await db.create_message_server({"name": "s", "sourceType": "x"})
    await clear(databases[0])
    assert not any((await contents(databases[0])).values())


# --- choosing, repeating, refusing -----------------------------------------------------------------------------------


async def remember(db: DatabaseAdapter, count: int, dimension: int = 384) -> None:
    await db.ensure_agent_exists({"name": "Ada"})
    await db.ensure_embedding_dimension(dimension)
    vectors = np.random.default_rng(count).normal(size=(count, dimension)).astype(np.float32)
    await db.create_memories(
        [Memory(content={"n": n}, embedding=v, unique=True) for n, v in enumerate(vectors)], "facts"
    )


async def test_one_agent_of_two_and_what_it_shares(databases: list[str], tmp_path: Path) -> None:
    one, other = databases
    await clear(one)
    await clear(other)
    ids = [uuid4(), uuid4()]
    for agent in ids:
        async with opened(one, agent) as db:
            await remember(db, 3)
            server = await db.create_message_server({"name": "s", "sourceType": "x"})
            await db.add_agent_to_message_server(server.id, agent)
            channel = await db.create_channel({"messageServerId": server.id, "name": "c", "type": "GROUP"}, [uuid4()])
            first = await db.create_message({"channelId": channel.id, "authorId": uuid4(), "content": "a"})
            await db.create_message(
                {"channelId": channel.id, "authorId": uuid4(), "content": "b", "inReplyToRootMessageId": first.id}
            )
    path = tmp_path / "a.tar"
    assert (await out(one, path, agent_ids=[ids[0]]))["rows"] == {
        "agents": 1, "memories": 3, "embeddings": 3, "message_servers": 1, "message_server_agents": 1, "channels": 1,
        "channel_participants": 1, "central_messages": 2,
    }  # fmt: skip
    await into(other, path)
    found = await contents(other)
    assert [row["id"] for row in decoded(found, "agents")] == [str(ids[0])]
    messages = decoded(found, "central_messages")
    assert sum(row["in_reply_to_root_message_id"] is not None for row in messages) == 1

    everything = tmp_path / "all"
    await out(one, everything)
    await clear(other)
    await into(other, everything, agent_ids=[ids[1]])
    found = await contents(other)
    assert {row["agent_id"] for row in decoded(found, "memories")} == {str(ids[1])}
    with pytest.raises(NotFoundError, match="holds no agent"):
        await into(other, everything, agent_ids=[uuid4()])
    with pytest.raises(NotFoundError, match="there is no agent"):
        await out(one, tmp_path / "none", agent_ids=[uuid4()])
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["a", "a.tar"])
async def test_agents_that_are_chosen_bring_what_they_share(databases: list[str], tmp_path: Path, name: str) -> None:
    """Once or twice, and a message before the one that it answers; and not what only others have."""
    one, other = databases
    await clear(one)
    await clear(other)
    ids = [uuid4() for _ in range(3)]
    deployments = [uuid4() for _ in range(2)]
    async with connected(one) as connection:
        await connection.execute("INSERT INTO elizasql.servers (id) SELECT unnest($1::uuid[])", deployments)
    messages: list[Any] = []
    async with opened(one, ids[0]) as db:
        for agent, deployment in zip(ids, (deployments[0], None, deployments[1]), strict=True):
            await db.create_agent({"id": agent, "name": "x", "server_id": deployment})
        for agents in (ids[1:2], ids[:2], ids[2:]):
            server = await db.create_message_server({"name": "s", "sourceType": "x"})
            for agent in agents:
                await db.add_agent_to_message_server(server.id, agent)
            channel = await db.create_channel({"messageServerId": server.id, "name": "c", "type": "GROUP"}, [uuid4()])
            message = {"channelId": channel.id, "authorId": uuid4(), "content": "m"}
            root = messages[0].id if messages else None
            messages.append(await db.create_message({**message, "inReplyToRootMessageId": root}))
    await out(one, tmp_path / name, agent_ids=ids[:2])
    told: list[Any] = []
    await into(other, tmp_path / name, refuse=lambda *each: told.append(each))
    assert told == []
    before, found = await contents(one), await contents(other)
    assert [row["id"] for row in decoded(found, "servers")] == [str(deployments[0])]
    assert {row["id"] for row in decoded(found, "agents")} == {str(id) for id in ids[:2]}
    sent = {str(message.id) for message in messages[:2]}
    assert decoded(found, "central_messages") == [
        row for row in decoded(before, "central_messages") if row["id"] in sent
    ]
    assert [len(found[table]) for table in ("message_servers", "channels", "channel_participants")] == [2] * 3
    # What was changed here since stays so.
    async with opened(other, ids[0]) as db:
        await db.update_message(messages[1].id, {"inReplyToRootMessageId": None})
        await into(other, tmp_path / name)
        kept = await db.get_message_by_id(messages[1].id)
    assert kept is not None and kept.in_reply_to_root_message_id is None


async def test_search_gives_the_same_behind_it(databases: list[str], tmp_path: Path) -> None:
    agent = uuid4()
    queries = np.random.default_rng(5).normal(size=(5, 384)).astype(np.float32)

    async def search(address: str) -> list[Any]:
        async with opened(address, agent) as db:
            return [
                [(hit.id, hit.similarity) for hit in await db.search_memories(embedding=q, table_name="facts")]
                for q in queries
            ]

    async with opened(databases[0], agent) as db:
        await remember(db, 50)
    await out(databases[0], tmp_path / "a", agent_ids=[agent])
    await into(databases[1], tmp_path / "a")
    assert await search(databases[1]) == await search(databases[0])


async def test_what_is_there_stays(databases: list[str], tmp_path: Path) -> None:
    agent = uuid4()
    async with opened(databases[0], agent) as db:
        await remember(db, 2)
        await db.set_cache("k", "old")
        scene = await make_scene(db)
    await out(databases[0], tmp_path / "a", agent_ids=[agent])
    async with opened(databases[1], agent) as db:
        await db.ensure_agent_exists({"name": "Other"})
        await db.set_cache("k", "new")
        await db.create_room(Room(id=scene.room, source="here", type="DM"))
        await db.create_entity(Entity(id=scene.entity, names=["here"]))
        await db.add_participant(scene.entity, scene.room)
    refused: list[tuple[str, str]] = []
    summary = await into(
        databases[1], tmp_path / "a", refuse=lambda table, line, why: refused.append((table, str(why)))
    )
    async with opened(databases[1], agent) as db:
        assert (await db.get_agent(agent)).name == "Other"
        assert await db.get_cache("k") == "new"
        assert (await db.get_rooms_by_ids([scene.room]))[0].source == "here"
        assert await db.get_embedding_dimension() == 384  # there was none
        assert await db.count_memories(table_name="facts") == 2
    # The membership is there under another id: its place is taken, and that is said.
    assert refused == [("participants", "another row has its place")]
    assert summary.refused == {"participants": 1}
    told = {row["table"]: row for row in summary.rows()}
    assert told["participants"]["kept"] == 0 and told["participants"]["created"] == 1
    assert told["rooms"]["kept"] == 1 and told["cache"]["kept"] == 1
    assert told["agents"]["kept"] == 1 and told["agents"]["created"] == 0  # though it got a width


async def test_what_has_expired_is_in_nobodys_way(databases: list[str], tmp_path: Path) -> None:
    agent = uuid4()
    expire = "UPDATE elizasql.cache SET expires_at = now() - interval '1 minute' WHERE agent_id = $1 AND key = ANY($2)"
    for database, value in zip(databases, ("new", "old"), strict=False):
        async with opened(database, agent) as db:
            await db.ensure_agent_exists({"name": "x"})
            for key in ("dead there", "dead in both", "dead here", "alive"):
                await db.set_cache(key, value, ttl=3600)
    raw = await asyncpg.connect(databases[0])
    await raw.execute(expire, agent, ["dead here", "dead in both"])
    await raw.close()
    await out(databases[0], tmp_path / "a", agent_ids=[agent])
    raw = await asyncpg.connect(databases[1])
    try:
        await raw.execute(expire, agent, ["dead there", "dead in both"])
        for created in (1, 0):
            told = {row["table"]: row for row in (await into(databases[1], tmp_path / "a")).rows()}
            assert told["cache"]["created"] == created
            rows = await raw.fetch("SELECT key, value, expires_at > now() AS alive FROM elizasql.cache")
            assert {row["key"]: (json.loads(row["value"]), row["alive"]) for row in rows} == {
                "alive": ("old", True),
                "dead here": ("old", True),
                "dead in both": ("old", False),
                "dead there": ("new", True),
            }
    finally:
        await raw.close()


async def test_rows_that_point_at_nothing_are_refused_one_by_one(db: DatabaseAdapter) -> None:
    scene = await make_scene(db)
    agent, gone = str(db.agent_id), str(uuid4())
    base = {"agent_id": agent, "content": {}, "type": "facts", "metadata": {}, "unique": True}
    base |= {"created_at": "2024-01-01T00:00:00Z"}
    lines = [
        {**base, "id": str(uuid4()), "room_id": str(scene.room)},
        {**base, "id": str(uuid4()), "room_id": gone},
        {**base, "id": str(uuid4()), "entity_id": gone},
        {**base, "id": str(uuid4()), "world_id": gone},
        {**base, "id": str(uuid4()), "agent_id": gone},
        {**base, "id": str(uuid4()), "metadata": {"type": "fragment"}},
        {**base, "id": str(uuid4()), "metadata": {"type": "document"}},
        {**base, "id": str(uuid4()), "metadata": {"type": "document", "timestamp": None}},
    ]
    refused: list[str] = []
    summary = Summary()
    await _rows.put_lines(
        db, "memories", [orjson.dumps(line) for line in lines], summary, lambda _, line, why: refused.append(str(why))
    )
    assert summary.created == {"memories": 2}
    assert refused == [
        f"there is no room {gone}",
        f"there is no entity {gone}",
        f"there is no world {gone}",
        f"there is no agent {gone}",
        "it is a fragment and its metadata lacks documentId or position",
        "it is a document and its metadata lacks timestamp",
    ]


async def test_another_width_is_refused_before_anything_is_written(databases: list[str], tmp_path: Path) -> None:
    agent = uuid4()
    async with opened(databases[0], agent) as db:
        await remember(db, 2)
    await out(databases[0], tmp_path / "a", agent_ids=[agent])
    async with opened(databases[1], agent) as db:
        await remember(db, 1, 512)
    with pytest.raises(EmbeddingDimensionError, match="locked at 512, given 384"):
        await into(databases[1], tmp_path / "a")
    async with opened(databases[1], agent) as db:
        assert await db.count_memories(table_name="facts") == 1


# --- the snapshot, the size, the interruption ------------------------------------------------------------------------


async def test_the_export_is_one_snapshot(
    databases: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = uuid4()
    async with opened(databases[0], agent) as db:
        await remember(db, 30)
        real = _connection.Snapshot.stream

        async def slow(self: Any, statement: Any, size: int, **params: Any) -> AsyncIterator[Any]:
            if statement.name == "export_memories":
                await remember(db, 5)  # a write between two tables
            async for rows in real(self, statement, 7, **params):
                yield rows

        monkeypatch.setattr(_connection.Snapshot, "stream", slow)
        told = await out(databases[0], tmp_path / "a", agent_ids=[agent])
        assert await db.count_memories(table_name="facts") == 35
    assert told["rows"] == {"agents": 1, "memories": 30, "embeddings": 30}


async def test_parts_are_small(databases: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_BYTES", 40_000)
    monkeypatch.setattr(export, "_FETCH", 10)
    agent = uuid4()
    async with opened(databases[0], agent) as db:
        await remember(db, 200)
    await out(databases[0], tmp_path / "a", agent_ids=[agent])
    with Archive(tmp_path / "a") as archive:
        assert all(part.bytes < 60_000 for part in archive.parts)
        matrices = [part for part in archive.parts if part.name.endswith(".npy")]
        assert len(matrices) == 8 and sum(part.rows for part in matrices) == 200
        assert np.load(io.BytesIO(archive.read(matrices[0]))).dtype == np.float32
    await into(databases[1], tmp_path / "a")
    async with opened(databases[1], agent) as db:
        assert (await db.stats())["unindexed"] == 200


async def test_large_rows_are_asked_for_and_given_in_small_numbers(
    databases: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_connection, "_BYTES", 50_000)
    agent, asked = uuid4(), []
    async with opened(databases[0], agent) as db:
        await db.ensure_agent_exists({"name": "Ada"})
        small = [Memory(id=UUID(int=n), content={"n": n}) for n in range(300)]
        large = [Memory(id=UUID(int=1000 + n), content={"text": "x" * 20_000}) for n in range(200)]
        await db.create_memories(small + large, "facts")
    real = asyncpg.cursor.Cursor.fetch

    async def fetch(self: Any, count: int) -> Any:
        asked.append(count)
        return await real(self, count)

    monkeypatch.setattr(asyncpg.cursor.Cursor, "fetch", fetch)
    async with _connection.snapshot(databases[0], Config()) as source:
        stream = source.stream(SQL["export_memories"], 250, agent_id=agent)
        given = [[len(row["line"]) for row in rows] async for rows in stream]
    assert sum(map(len, given)) == 500
    assert max(map(len, given)) > 100 and all(sum(sizes) - sizes[-1] < 50_000 for sizes in given)
    assert max(asked) <= 200 and asked[-1] <= 2


async def test_an_export_that_fails_leaves_nothing(
    databases: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = uuid4()
    async with opened(databases[0], agent) as db:
        await remember(db, 5)

    def full(self: Any, name: str, data: bytes) -> None:
        if "memories" in name:
            raise OSError(28, "No space left on device")
        real(self, name, data)

    for kind, store in (("a", _archive._Folder), ("a.tar", _archive._Tar), ("a.tgz", _archive._Tar)):
        real = store.add
        monkeypatch.setattr(store, "add", full)
        with pytest.raises(OSError, match="No space left"):
            await out(databases[0], tmp_path / kind, agent_ids=[agent])
        monkeypatch.setattr(store, "add", real)
    for name in ("a" * 254, "a" * 250 + ".tar"):  # too long while it is not finished
        with pytest.raises(OSError, match="too long") as caught:
            await out(databases[0], tmp_path / name, agent_ids=[agent])
        assert caught.value.filename == str(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a.tar").write_text("mine")
    with pytest.raises(ArgumentError, match="there already"):
        await out("postgresql://nowhere.invalid/x", tmp_path / "a.tar", agent_ids=[agent])  # before the server is asked
    assert (tmp_path / "a.tar").read_text() == "mine"


async def test_only_the_owner_may_read_what_is_made(databases: list[str], tmp_path: Path) -> None:
    agent = uuid4()
    async with opened(databases[0], agent) as db:
        await remember(db, 5)
        server = await db.create_message_server({"name": "x", "sourceType": "y"})
        await db.add_agent_to_message_server(server.id, agent)
    (tmp_path / "filled").mkdir(mode=0o755)
    before = os.umask(0)
    try:
        for name in ("a", "a.tar", "a.tgz", "filled"):
            await out(databases[0], tmp_path / name, agent_ids=[agent])
        report = Report(tmp_path / "report")
        report.add("rooms", b"{}", "no")
        report.close()
    finally:
        os.umask(before)
    others = [str(path) for path in tmp_path.rglob("*") if path.stat().st_mode & 0o077]
    assert others == [str(tmp_path / "filled")]


async def test_an_empty_folder_is_filled_and_stays(
    databases: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = uuid4()
    async with opened(databases[0], agent) as db:
        await remember(db, 5)
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")

    def full(self: Any, name: str, data: bytes) -> None:
        if "memories" in name:
            raise OSError(28, "No space left on device")
        real(self, name, data)

    real = _archive._Folder.add
    with monkeypatch.context() as patch:
        patch.setattr(_archive._Folder, "add", full)
        with pytest.raises(OSError, match="No space left"):
            await out(databases[0], Path(), agent_ids=[agent])
    assert list(tmp_path.rglob("*")) == [tmp_path / "in"]
    await out(databases[0], Path(), agent_ids=[agent])
    with Archive(tmp_path / "in") as archive:
        assert len(list(archive.verify())) == len(archive.parts)
    (tmp_path / "in.tar").mkdir()
    with pytest.raises(ArgumentError, match="there already"):
        await out(databases[0], tmp_path / "in.tar", agent_ids=[agent])


@pytest.mark.parametrize("name", ["a", "a.tar.gz"])
async def test_others_have_the_event_loop_while_files_are_written_and_read(
    databases: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    loop = asyncio.get_running_loop()
    turns: list[bool] = []

    def slow(kind: Any, method: str) -> None:
        real = getattr(kind, method)

        def work(*arguments: Any) -> Any:
            turn = threading.Event()
            loop.call_soon_threadsafe(turn.set)
            turns.append(turn.wait(10))
            return real(*arguments)

        monkeypatch.setattr(kind, method, work)

    store = _archive._Folder if name == "a" else _archive._Tar
    slow(store, "add")
    slow(store, "close")
    slow(Archive, "read")
    agent = uuid4()
    async with opened(databases[0], agent) as db:
        await remember(db, 5)
    await out(databases[0], tmp_path / name, agent_ids=[agent])
    with Archive(tmp_path / name) as archive:
        parts = len(archive.parts)
        async with opened(databases[1]) as db:
            await import_archive(db, archive)
    assert turns == [True] * (parts + 2 + 2 * parts)


async def test_imports_share_an_archive(databases: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = uuid4()
    async with opened(databases[0], agent) as db:
        await remember(db, 5)
    await out(databases[0], tmp_path / "a.tar", agent_ids=[agent])

    class Moved(io.FileIO):
        """Where one reader waits for another between looking up its place and reading there."""

        both = threading.Barrier(2, timeout=0.2)

        def seek(self, *where: int) -> int:
            place = super().seek(*where)
            with contextlib.suppress(threading.BrokenBarrierError):
                self.both.wait()
            return place

    with Archive(tmp_path / "a.tar") as archive, Moved(tmp_path / "a.tar") as moved, monkeypatch.context() as patch:
        patch.setattr(archive._tar, "fileobj", moved)
        parts = [archive.parts[0], archive.parts[-1]]
        assert len(await asyncio.gather(*(asyncio.to_thread(archive.read, part) for part in parts))) == 2


@pytest.mark.parametrize("name", ["a", "a.tar.gz"])
async def test_an_export_that_is_cancelled_while_it_writes_leaves_nothing(
    databases: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The write that is under way ends first: it would make its file again, or miss what it writes to."""
    loop = asyncio.get_running_loop()
    writing, cancelled = asyncio.Event(), threading.Event()
    store: Any = _archive._Folder if name == "a" else _archive._Tar
    real = store.add
    ended: list[str] = []

    def slow(self: Any, part: str, data: bytes) -> None:
        loop.call_soon_threadsafe(writing.set)
        assert cancelled.wait(10)
        real(self, part, data)
        ended.append(part)

    monkeypatch.setattr(store, "add", slow)
    agent = uuid4()
    async with opened(databases[0], agent) as db:
        await remember(db, 5)
    export = asyncio.create_task(out(databases[0], tmp_path / name, agent_ids=[agent]))
    await writing.wait()
    for _ in range(2):
        export.cancel()
        await asyncio.sleep(0)
    cancelled.set()
    with pytest.raises(asyncio.CancelledError):
        await export
    assert len(ended) == 1 and list(tmp_path.iterdir()) == []


async def test_a_row_that_could_not_be_read_again_ends_the_export(
    databases: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = uuid4()
    async with opened(databases[0], agent) as db:
        await db.ensure_agent_exists({"name": "Ada"})
        await db.set_cache("large", "x" * 20_000)
    monkeypatch.setattr(_archive, "_LARGEST", 10_000)
    with pytest.raises(ArchiveError, match=r"cache-00001\.jsonl has a row that is too large"):
        await out(databases[0], tmp_path / "a", agent_ids=[agent])
    assert list(tmp_path.iterdir()) == []


async def test_a_list_of_parts_that_could_not_be_read_again_ends_the_export(
    databases: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = uuid4()
    async with opened(databases[0], agent) as db:
        await remember(db, 50)
    monkeypatch.setattr(export, "_ROWS", 1)
    monkeypatch.setattr(_archive, "_LARGEST", 10_000)
    for name in ("a", "a.tar"):
        with pytest.raises(ArchiveError, match=r"^1\d\d parts are too many for an archive"):
            await out(databases[0], tmp_path / name, agent_ids=[agent])
    assert list(tmp_path.iterdir()) == []


async def test_what_a_part_takes_does_not_grow_with_their_number(
    databases: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing goes through all agents, or all parts, for each part."""
    passes = 0

    class Counted(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            nonlocal passes
            passes += 1
            return super().__iter__()

        def __reversed__(self) -> Iterator[Any]:
            nonlocal passes
            passes += 1
            return super().__reversed__()

    work, members = export._Export, tarfile.TarFile.getmembers
    monkeypatch.setattr(export, "_Export", lambda a, b, c, agents: work(a, b, c, Counted(agents)))
    monkeypatch.setattr(tarfile.TarFile, "getmembers", lambda tar: Counted(members(tar)))
    agent = uuid4()
    async with opened(databases[0], agent) as db:
        await remember(db, 50)
    found = {}
    for rows in (5, 50):
        monkeypatch.setattr(export, "_ROWS", rows)
        passes = 0
        await out(databases[0], tmp_path / f"{rows}.tar", agent_ids=[agent])
        with Archive(tmp_path / f"{rows}.tar") as archive:
            archive.parts = Counted(archive.parts)
            async with opened(databases[1]) as db:
                await import_archive(db, archive)
            found[len(archive.parts)] = passes
    (many, for_many), (few, for_few) = found.items()
    assert many >= few + 18 and for_many == for_few


async def test_ids_and_paths_may_be_text(databases: list[str], tmp_path: Path) -> None:
    agent = uuid4()
    async with opened(databases[0], agent) as db:
        await db.ensure_agent_exists({"name": "Ada"})
    path = str(tmp_path / "a.tar")
    await export_archive(databases[0], path, Config(), agent_ids=[str(agent).upper()])  # type: ignore[list-item]
    async with opened(databases[1]) as db:
        with Archive(path) as archive:
            done = await import_archive(db, archive, agent_ids=[str(agent).upper()])  # type: ignore[list-item]
            assert done.created == {"agents": 1}
            with pytest.raises(ArgumentError, match="agent_id must be a UUID"):
                await import_archive(db, archive, agent_ids=["Ada"])  # type: ignore[list-item]
    with pytest.raises(ArgumentError, match="agent_ids must be a collection"):
        await export_archive("postgresql://nowhere.invalid/x", path, Config(), agent_ids=str(agent))  # type: ignore[arg-type]


async def test_rows_that_a_policy_hides_are_an_error(databases: list[str], tmp_path: Path) -> None:
    async with opened(databases[0]) as db:
        await db.ensure_agent_exists({"name": "Ada"})
    async with connected(databases[0]) as connection:
        await connection.execute(
            "ALTER TABLE elizasql.rooms ENABLE ROW LEVEL SECURITY; ALTER TABLE elizasql.rooms FORCE ROW LEVEL SECURITY"
        )
        try:
            with pytest.raises(PermissionDeniedError, match="row-level security"):
                await out(databases[0], tmp_path / "a")
        finally:
            await connection.execute(
                "ALTER TABLE elizasql.rooms DISABLE ROW LEVEL SECURITY;"
                "ALTER TABLE elizasql.rooms NO FORCE ROW LEVEL SECURITY"
            )
    assert list(tmp_path.iterdir()) == []


async def test_a_message_that_answers_what_did_not_come_along_is_told(databases: list[str], tmp_path: Path) -> None:
    one, other = databases
    await clear(one)
    await clear(other)
    agent = uuid4()
    async with opened(one, agent) as db:
        await db.ensure_agent_exists({"name": "Ada"})
        messages: list[Any] = []
        for name in ("theirs", "hers"):
            server = await db.create_message_server({"name": name, "sourceType": "x"})
            channel = await db.create_channel({"messageServerId": server.id, "name": "c", "type": "GROUP"}, [])
            root = messages[0].id if messages else None
            message = {"channelId": channel.id, "authorId": uuid4(), "content": name, "inReplyToRootMessageId": root}
            messages.append(await db.create_message(message))
        await db.add_agent_to_message_server(server.id, agent)
    await out(one, tmp_path / "a", agent_ids=[agent])
    for _ in range(2):
        told: list[tuple[str, str, str]] = []
        summary = await into(
            other,
            tmp_path / "a",
            refuse=lambda table, line, why, told=told: told.append((table, orjson.loads(line)["content"], str(why))),
        )
        assert told == [("central_messages", "hers", f"there is no message {messages[0].id} that it answers")]
        assert summary.altered == {"central_messages": 1} and not +summary.refused
    await out(one, tmp_path / "all")
    told.clear()
    await into(other, tmp_path / "all", refuse=lambda *each: told.append(each))
    assert told == [] and await contents(other) == await contents(one)


async def test_what_another_import_brings_meanwhile_is_not_refused(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any]
) -> None:
    row = {"agent_id": str(db.agent_id), "id": str(uuid4()), "source": "x", "type": "DM", "metadata": {}}
    line = orjson.dumps({**row, "created_at": "2024-01-01T00:00:00Z"})
    refused: list[Any] = []
    summary = Summary()
    async with raw.transaction():
        await raw.fetch(SQL["import_rooms"].sql, f"[{line.decode()}]")
        put = asyncio.ensure_future(_rows.put_lines(db, "rooms", [line], summary, lambda *each: refused.append(each)))
        await blocked_pid(raw, put)
    await put
    assert refused == [] and not +summary.created and not +summary.refused


async def test_a_vector_has_the_scope_that_its_memory_gets_meanwhile(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any]
) -> None:
    """And memories are locked in the order of their ids, whatever that of the archive is."""
    scene = await make_scene(db)
    room = await db.create_room(Room(source="x", type="DM"))
    memories = [Memory(content={}, room_id=scene.room, unique=True) for _ in range(2)]
    first, last = sorted(await db.create_memories(memories, "messages"))
    async with raw.transaction():
        await raw.execute(
            "UPDATE elizasql.memories SET room_id = $3 WHERE agent_id = $1 AND id = $2", db.agent_id, first, room
        )
        put = asyncio.ensure_future(put_vectors(db, db.agent_id, [last, first], [np.ones(384, np.float32)] * 2))
        await blocked_pid(raw, put)
        free = "SELECT id FROM elizasql.memories WHERE agent_id = $1 FOR UPDATE SKIP LOCKED"
        assert {id for (id,) in await raw.fetch(free, db.agent_id)} == {first, last}
    assert await put == (2, [])
    rows = await raw.fetch("SELECT memory_id, room_id FROM elizasql.embeddings WHERE agent_id = $1", db.agent_id)
    assert dict(rows) == {first: room, last: scene.room}


async def test_an_import_that_is_interrupted_is_finished_by_the_next(
    databases: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "_ROWS", 10)
    agent = uuid4()
    async with opened(databases[0], agent) as db:
        await remember(db, 50)
    await out(databases[0], tmp_path / "a", agent_ids=[agent])
    stops = [3, 6, 9]

    def stop(name: str, done: int, total: int | None) -> None:
        if name in ("memories", "embeddings"):
            stops[0] -= 1
            if stops[0] == 0:
                raise KeyboardInterrupt

    while stops:
        with pytest.raises(KeyboardInterrupt):
            await into(databases[1], tmp_path / "a", advance=stop)
        stops.pop(0)
    await into(databases[1], tmp_path / "a")
    async with opened(databases[1], agent) as db:
        assert await db.count_memories(table_name="facts") == 50
        assert (await db.stats())["unindexed"] == 50


# --- archives that are not what they should be -----------------------------------------------------------------------


@pytest.fixture
async def made(databases: list[str], tmp_path: Path) -> Path:
    """Give an archive of an agent with a few memories, as a folder."""
    agent = uuid4()
    async with opened(databases[0], agent) as db:
        await remember(db, 4)
    await out(databases[0], tmp_path / "made", agent_ids=[agent])
    return tmp_path / "made"


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def leave_out(path: Path, name: str) -> None:
    """Let the manifest know nothing of some parts."""
    rewrite(path, lambda m: m.update(parts=[part for part in m["parts"] if name not in part["name"]]))


def rename(path: Path, table: str) -> None:
    """Let the first part hold rows of another table."""

    def change(manifest: dict[str, Any]) -> None:
        part = manifest["parts"][0]
        manifest["rows"][table] = manifest["rows"].pop(part["table"])
        part["table"] = table

    rewrite(path, change)


def replace_part(made: Path, pattern: str, change: Callable[[bytes], bytes]) -> None:
    """Change a part, and what the manifest says of it, too."""
    path = part_of(made, pattern)
    data = change(path.read_bytes())
    path.write_bytes(data)

    def tell(manifest: dict[str, Any]) -> None:
        (part,) = [part for part in manifest["parts"] if path == made / part["name"]]
        part["bytes"], part["sha256"] = len(data), hashlib.sha256(data).hexdigest()

    rewrite(made, tell)


def give_away(path: Path, table: str, key: str = "agent_id") -> None:
    """Let a part hold a row of an agent that it does not belong to."""

    def change(data: bytes) -> bytes:
        first, *others = data.splitlines()
        return b"\n".join([*others, orjson.dumps({**orjson.loads(first), key: str(uuid4())})])

    replace_part(path, f"{table}-*.jsonl", change)


def part_of(path: Path, pattern: str) -> Path:
    (found,) = path.rglob(pattern)
    return found


def swap(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "manifest.json").unlink(), "no archive of elizasql, or not a complete one"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json is damaged"),
        (lambda path: rewrite(path, lambda m: m.update(format=2)), "format 2, this version knows 1"),
        (lambda path: rewrite(path, lambda m: m.update(format=0)), "manifest.json is damaged"),
        (
            lambda path: rewrite(path, lambda m: m.update(schema="29990101000001")),
            "schema 29990101000001, this version",
        ),
        (lambda path: rewrite(path, lambda m: m.update(schema=None)), "manifest.json is damaged"),
        (lambda path: leave_out(path, "memories-"), "manifest.json is damaged"),
        (lambda path: leave_out(path, ".npy"), "manifest.json is damaged"),
        (lambda path: leave_out(path, "/embeddings-00001.jsonl"), "manifest.json is damaged"),
        (lambda path: rewrite(path, lambda m: m["parts"].append(m["parts"][0])), "manifest.json is damaged"),
        (lambda path: rewrite(path, lambda m: m.pop("agents")), "manifest.json is damaged"),
        (lambda path: rewrite(path, lambda m: m.pop("rows")), "manifest.json is damaged"),
        (lambda path: rewrite(path, lambda m: m.update(agents=["Ada"])), "manifest.json is damaged"),
        (lambda path: rewrite(path, lambda m: m.update(agents=[])), "manifest.json is damaged"),
        (lambda path: rewrite(path, lambda m: m["agents"][0].update(id="Ada")), "manifest.json is damaged"),
        (lambda path: rewrite(path, lambda m: m["agents"][0].update(dimension="384")), "manifest.json is damaged"),
        (lambda path: rewrite(path, lambda m: m["parts"][0].update(rows="1")), "manifest.json is damaged"),
        (lambda path: rewrite(path, lambda m: m["parts"][0].update(table=[])), "manifest.json is damaged"),
        (lambda path: rewrite(path, lambda m: m["parts"][0].update(agent_id="Ada")), "manifest.json is damaged"),
        (lambda path: rewrite(path, lambda m: [part.update(agent_id=None) for part in m["parts"]]), "is damaged"),
        (lambda path: rewrite(path, lambda m: m["parts"][0].pop("rows")), "manifest.json is damaged"),
        (lambda path: rewrite(path, lambda m: m["parts"][0].update(name="../x.jsonl")), "has the name"),
        (lambda path: rewrite(path, lambda m: m["parts"][0].update(name="/etc/passwd")), "has the name"),
        (lambda path: rename(path, "pg_authid"), "knows no table 'pg_authid'"),
        (lambda path: give_away(path, "memories"), "memories-00001.jsonl is damaged: .* not its agent's"),
        (lambda path: give_away(path, "agents", "id"), "agents-00001.jsonl is damaged: .* not its agent's"),
        (lambda path: replace_part(path, "memories-*", lambda _: b"[]"), "memories-00001.jsonl cannot be read"),
        (lambda path: replace_part(path, "memories-*", lambda _: b"{}"), "memories-00001.jsonl cannot be read"),
        (lambda path: replace_part(path, "memories-*", lambda _: b"{"), "memories-00001.jsonl cannot be read"),
        (lambda path: rewrite(path, lambda m: m["parts"][0].update(agent_id=None)), "is damaged: .* not its agent's"),
        (lambda path: part_of(path, "memories-*").unlink(), "lacks .*memories-00001.jsonl"),
        (lambda path: part_of(path, "memories-*").write_text("{}"), "memories-00001.jsonl is damaged"),
        (lambda path: part_of(path, "*.npy").write_bytes(b""), "npy is damaged"),
        (lambda path: swap(part_of(path, "memories-*"), "/dev/null"), "memories-00001.jsonl is no part"),
    ],
)
async def test_a_damaged_archive_is_refused_and_nothing_written(
    databases: list[str], made: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(made)
    before = await contents(databases[1])
    with pytest.raises(ArchiveError, match=message):
        await into(databases[1], made)
    assert await contents(databases[1]) == before


async def test_a_check_hears_an_interrupt_after_each_part(databases: list[str], made: Path) -> None:
    """And others have the event loop meanwhile: to check a large archive takes minutes."""
    told: list[tuple[str, int]] = []

    def stop(name: str, done: int, _: int | None) -> None:
        told.append((name, done))
        importing.cancel()

    importing = asyncio.ensure_future(into(databases[1], made, advance=stop))
    with pytest.raises(asyncio.CancelledError):
        await importing
    assert told == [("check", 1)]


async def test_vectors_are_checked_even_under_a_right_checksum(databases: list[str], made: Path) -> None:
    def put(pattern: str, data: bytes) -> None:
        replace_part(made, pattern, lambda _: data)

    def saved(save: Callable[..., object], *values: Any, **options: Any) -> bytes:
        data = io.BytesIO()
        save(data, *values, **options)
        return data.getvalue()

    good = np.ones((4, 384), np.float32)
    bad = [good[:3], good * 0, good * np.nan, good[0], np.array([{}] * 4, object)]
    too_large = {"descr": "<f4", "fortran_order": False, "shape": (10**12, 384)}
    header = b"\x93NUMPY\x01\x00\x0b\x00{'descr': ("
    for data in (
        *(saved(np.save, matrix, allow_pickle=True) for matrix in bad),
        saved(np.savez, good),
        saved(np.lib.format.write_array_header_1_0, too_large),
        header,
    ):
        put("*.npy", data)
        with pytest.raises(ArchiveError, match="cannot be read"):
            await into(databases[1], made)
    put("*.npy", saved(np.save, good))
    for line in (b"{}", b"[]", b'{"memory_id": 1}', b'{"memory_id": "x"}', b"{", b""):
        put("embeddings-*.jsonl", b"\n".join([line] * 4))
        with pytest.raises(ArchiveError, match="cannot be read"):
            await into(databases[1], made)


@pytest.mark.parametrize("compress", [bz2.compress, gzip.compress, lzma.compress])
async def test_damage_that_the_compression_notices_is_refused(
    databases: list[str], made: Path, tmp_path: Path, compress: Callable[[bytes], bytes]
) -> None:
    agent = UUID(json.loads((made / "manifest.json").read_text())["agents"][0]["id"])
    await out(databases[0], tmp_path / "a.tar", agent_ids=[agent])
    path = tmp_path / "packed"
    whole = compress((tmp_path / "a.tar").read_bytes())
    refused = 0
    for place in range(0, len(whole), len(whole) // 50):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            with Archive(path) as archive:
                list(archive.verify())
        except ArchiveError:  # and no other error
            refused += 1
    assert refused >= 48  # some bytes do not matter


def test_other_files_are_no_archives(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    with tarfile.open(tmp_path / "other.tar", "w") as file:
        file.add(tmp_path / "text", "text")
    for name in ("text", "empty.tar", "folder", "other.tar"):
        with pytest.raises(ArchiveError):
            Archive(tmp_path / name)
    os.mkfifo(tmp_path / "pipe")
    for endless in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ArchiveError, match="is a pipe or a device"):
            Archive(endless)
    with pytest.raises(FileNotFoundError):
        Archive(tmp_path / "missing")


async def test_a_truncated_tar_is_refused(databases: list[str], made: Path, tmp_path: Path) -> None:
    agent = UUID(json.loads((made / "manifest.json").read_text())["agents"][0]["id"])
    for name in ("a.tar", "a.tar.gz"):
        await out(databases[0], tmp_path / name, agent_ids=[agent])
        data = (tmp_path / name).read_bytes()
        for size in (10, len(data) // 3, len(data) // 2):
            (tmp_path / name).write_bytes(data[:size])
            with pytest.raises(ArchiveError):
                await into(databases[1], tmp_path / name)


async def test_a_row_that_no_table_can_hold_ends_the_part(make_db: MakeAdapter) -> None:
    db = await make_db(dimension=None)
    good = {"agent_id": str(db.agent_id), "id": str(uuid4()), "source": "x", "type": "DM", "metadata": {}}
    good["created_at"] = "2024-01-01T00:00:00Z"
    for bad in ({"id": "x"}, {**good, "id": str(uuid4()), "source": None}):
        with pytest.raises((DataError, NotNullError)):
            await _rows.put_lines(db, "rooms", [*map(orjson.dumps, (good, bad))], Summary(), lambda *_: None)
    assert await db.get_rooms_by_ids([good["id"]]) == []


async def test_an_export_that_fails_leaves_what_others_put_into_its_folder(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full"):
        await fill_and_fail(tmp_path)
    assert [each.name for each in tmp_path.rglob("*")] == ["photos", "a.jpg"]


async def fill_and_fail(tmp_path: Path) -> None:
    async with _archive.create(tmp_path) as writer:
        writer._store.add("agents/one.jsonl", b"{}")
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
        raise OSError("full")


async def test_an_export_whose_compression_is_not_there_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise tarfile.CompressionError("no such module")

    monkeypatch.setattr(tarfile, "open", missing)
    with pytest.raises(tarfile.CompressionError):
        async with _archive.create(tmp_path / "a.tar.gz"):
            pass
    assert not [*tmp_path.iterdir()]
