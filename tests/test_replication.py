"""Logical replication: what one database publishes another takes, whichever tables are named, and searches find it."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit, urlunsplit
from uuid import UUID, uuid4

import asyncpg
import numpy as np
import pytest

import elizasql
from elizasql import (
    Channel,
    ChannelMessage,
    Component,
    DatabaseAdapter,
    Entity,
    Goal,
    Log,
    Memory,
    MessageServer,
    PairingAllowlistEntry,
    PairingRequest,
    Relationship,
    Room,
    Task,
    World,
    _embedded,
)

from .conftest import make_scene

_OWN = {"schema_migrations", "memory_rewrites"}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Give the address of a server that publishes, of this module's own."""
    folder = Path(tempfile.mkdtemp(prefix="esql-"))

    async def start() -> _embedded.EmbeddedServer:
        await (await _embedded.acquire(folder / "pg")).release()
        with (folder / "pg/data/postgresql.conf").open("a") as file:
            file.write("wal_level = logical\nmax_wal_senders = 10\n")
        return await _embedded.acquire(folder / "pg")

    made = asyncio.run(start())
    yield made.dsn
    asyncio.run(made.release())
    shutil.rmtree(folder, ignore_errors=True)


class Pair:
    """Two databases, and a subscription of the second to the first.

    Attributes:
        urls: Their addresses.
        publisher, subscriber: Connections of an administrator's.
    """

    def __init__(
        self, urls: list[str], publisher: asyncpg.Connection[Any], subscriber: asyncpg.Connection[Any]
    ) -> None:
        self.urls = urls
        self.publisher = publisher
        self.subscriber = subscriber

    async def caught_up(self) -> None:
        """Wait until the subscriber has all that is written by now."""
        end = await self.publisher.fetchval("SELECT pg_current_wal_lsn()")
        while not await self.publisher.fetchval(
            "SELECT confirmed_flush_lsn >= $1 FROM pg_replication_slots WHERE slot_name = 'follower'", end
        ) or await self.subscriber.fetchval("SELECT count(*) FROM pg_subscription_rel WHERE srsubstate <> 'r'"):
            # A slot moves on with what comes behind.
            await self.publisher.execute("SELECT pg_logical_emit_message(FALSE, 'elizasql', '')")

    async def contents(self) -> list[dict[str, list[str]]]:
        """Give the rows of every table in both; but for the numbers of transactions, which are the server's own."""
        found = []
        for connection in (self.publisher, self.subscriber):
            names = await connection.fetch(
                "SELECT relname AS name FROM pg_class "
                "WHERE relnamespace = 'elizasql'::regnamespace AND relkind IN ('r', 'p') AND NOT relispartition"
            )
            found.append(
                {
                    row["name"]: [
                        line["line"]
                        for line in await connection.fetch(
                            f"SELECT (to_jsonb(t) - 'xid')::text AS line FROM elizasql.{row['name']} AS t ORDER BY 1"
                        )
                    ]
                    for row in names
                    if row["name"] not in _OWN
                }
            )
        return found


@pytest.fixture
async def pair(server: str) -> AsyncIterator[Pair]:
    """Give two migrated databases of roles that own no server."""
    admin = server.replace("//elizasql@", "//postgres@")
    root = await asyncpg.connect(admin)
    urls = [urlunsplit(urlsplit(server)._replace(path=f"/{name}")) for name in ("leader", "led")]
    async with AsyncExitStack() as stack:
        connections = []
        for name, url in zip(("leader", "led"), urls, strict=True):
            await root.execute(f"CREATE DATABASE {name} OWNER elizasql")
            connections.append(await asyncpg.connect(url.replace("//elizasql@", "//postgres@")))
            stack.push_async_callback(connections[-1].close)
            await connections[-1].execute("CREATE EXTENSION vector")
            async with opened(url, uuid4()):
                pass
        yield Pair(urls, *connections)
        await connections[1].execute("DROP SUBSCRIPTION follower")
    for name in ("led", "leader"):
        await root.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await root.close()


def opened(url: str, agent_id: UUID, **options: Any) -> Any:
    settings: dict[str, Any] = {"indexing": "manual", "resident": "off", "pool_min_size": 0, "pool_max_size": 3}
    return elizasql.connect(agent_id=agent_id, dsn=url, **settings | options)


async def subscribe(pair: Pair) -> None:
    """Publish the schema as a whole, and subscribe to it; in one server the slot has to be made before."""
    await pair.publisher.execute("CREATE PUBLICATION everything FOR TABLES IN SCHEMA elizasql")
    await pair.publisher.execute("SELECT pg_create_logical_replication_slot('follower', 'pgoutput')")
    host = parse_qs(urlsplit(pair.urls[0]).query)["host"][0]
    await pair.subscriber.execute(
        f"CREATE SUBSCRIPTION follower CONNECTION 'host={host} dbname=leader user=postgres' "
        "PUBLICATION everything WITH (create_slot = false)"
    )
    await pair.caught_up()


def some_vector(random: np.random.Generator) -> Any:
    return random.normal(size=384).astype(np.float32)


async def use(db: DatabaseAdapter, random: np.random.Generator) -> list[UUID]:
    """Write, change and delete rows of every table; give the ids of the memories."""
    scene = await make_scene(db)
    there = {"room_id": scene.room, "entity_id": scene.entity}
    ids = await db.create_memories(
        [Memory(content={"n": n}, embedding=some_vector(random), unique=True, **there) for n in range(20)], "messages"
    )
    await db.update_memory({"id": ids[0], "content": {"text": "changed"}})
    await db.update_memory({"id": ids[1], "room_id": await db.create_room(Room(source="test", type="GROUP"))})
    await db.update_memory({"id": ids[2], "embedding": some_vector(random)})
    await db.delete_memory(ids[3])
    await db.index_memories(rebuild=True)
    passing = await db.create_world(World(name="passing"))
    await db.create_memory(Memory(content={}, embedding=some_vector(random), world_id=passing), "messages")
    await db.remove_world(passing)
    await db.set_caches({"kept": 1, "changed": 1, "gone": 1})
    await db.set_cache("changed", 2)
    await db.delete_cache("gone")
    await db.create_components([Component(type="mood", data={"calm": 1}, **there)])
    await db.create_relationship(Relationship(source_entity_id=scene.entity, target_entity_id=scene.other))
    await db.update_task(await db.create_task(Task(name="work", tags=["queue"])), {"name": "more work"})
    await db.create_goal(Goal(name="goal"))
    await db.log(Log(type="run_event", body={"runId": "run", "status": "started"}, **there))
    sender = str(scene.entity)
    await db.create_pairing_request(PairingRequest(channel="c", sender_id=sender, code=sender))
    await db.create_pairing_allowlist_entry(PairingAllowlistEntry(channel="c", sender_id=sender))
    place = await db.create_message_server(MessageServer(name="server", source_type="test"))
    await db.add_agent_to_message_server(place.id, db.agent_id)
    channel = await db.create_channel(Channel(message_server_id=place.id, name="channel", type="GROUP"), [scene.entity])
    await db.create_message(ChannelMessage(channel_id=channel.id, author_id=scene.entity, content="hello"))
    await db.delete_entity(await db.create_entity(Entity(id=uuid4(), names=["passing"])))
    return ids


async def found(db: DatabaseAdapter, query: Any) -> list[Memory]:
    """Search; similarities that the process adds up are not the server's to the last bit."""
    memories = await db.search_memories(embedding=query, table_name="messages", count=10)
    return [replace(memory, similarity=None) for memory in memories]


@pytest.mark.parametrize("resident", [pytest.param("off", marks=pytest.mark.slow), "required"])
async def test_what_is_written_is_found_there(pair: Pair, resident: str) -> None:
    random = np.random.default_rng(0)
    query, agent = some_vector(random), uuid4()
    async with opened(pair.urls[0], agent) as leader, opened(pair.urls[1], agent, resident=resident) as led:
        await leader.ensure_agent_exists({"name": "agent"})
        await leader.ensure_embedding_dimension(384)
        await use(leader, random)
        await subscribe(pair)
        first, second = await pair.contents()
        assert first == second and {name for name, rows in first.items() if not rows} == {"servers", "reembeddings"}
        assert await found(led, query) == await found(leader, query)
        # Behind the first copy, row by row.
        ids = await use(leader, random)
        await leader.update_memory({"id": (await found(leader, query))[0].id, "content": {"text": "nearest"}})
        await leader.delete_memory((await found(leader, query))[1].id)
        await pair.caught_up()
        first, second = await pair.contents()
        assert first == second
        assert await found(led, query) == await found(leader, query)
        # The subscriber is a database like any other once it is let go of.
        await pair.subscriber.execute("ALTER SUBSCRIPTION follower DISABLE")
        await led.create_memory(Memory(content={"text": "ours"}, embedding=query), "messages")
        await led.delete_memory(ids[5])
        assert (await found(led, query))[0].content == {"text": "ours"}


async def test_rows_are_known_by_what_a_publisher_tells(raw: asyncpg.Connection[Any]) -> None:
    """Else it refuses updates and deletes of a table as soon as it is published, or the subscriber cannot find them."""
    rows = await raw.fetch(
        """
        SELECT c.relname AS name, a.attname AS generated
        FROM pg_class AS c
        LEFT JOIN pg_index AS i ON i.indrelid = c.oid AND i.indisprimary
        LEFT JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum = ANY(i.indkey) AND a.attgenerated <> ''
        WHERE c.relnamespace = 'elizasql'::regnamespace AND c.relkind IN ('r', 'p')
            AND ((i.indexrelid IS NULL AND c.relreplident <> 'f') OR a.attname IS NOT NULL)
        """
    )
    assert rows == []
