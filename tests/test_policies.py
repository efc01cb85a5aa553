"""Row level security: PostgreSQL lets leakproof comparisons alone bound a scan. The same answers, few rows read."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import numpy as np
import pytest

from elizasql import (
    Channel,
    ChannelMessage,
    DatabaseAdapter,
    Entity,
    Log,
    Memory,
    MessageServer,
    Room,
    Task,
    World,
    _pool,
)
from elizasql import reembedding as _reembedding
from elizasql._statements import SQL
from elizasql.config import Config
from elizasql.errors import PermissionDeniedError

from .conftest import MakeAdapter
from .reembed_worker import embedder, vector_of
from .test_plans import plan_of

MANY = 150
T0 = datetime(2026, 1, 1, tzinfo=timezone.utc)
LATE = T0 + timedelta(minutes=MANY - 5)
ROOM, ENTITY, CHANNEL, AUTHOR = (uuid4() for _ in range(4))
# What pages go on from: three rows are older than the one, four newer than the other.
EARLY_ID, LATE_ID = UUID(int=4), UUID(int=MANY - 4)


async def fill(db: DatabaseAdapter) -> None:
    """Store many of each, one a minute, a fragment for each fifth memory; names and tags of the last are rare."""
    await db.create_room(Room(id=ROOM, source="test", type="GROUP"))
    names = [["Common", f"Name {i}"] for i in range(MANY - 1)] + [["Rare Zoë", "x"]]
    await db.create_entities([Entity(id=UUID(int=i + 1), names=each) for i, each in enumerate(names)])
    await db.create_entity(Entity(id=ENTITY, names=["of the logs"]))
    times = [T0 + timedelta(minutes=i) for i in range(MANY)]
    memories = [Memory(id=uuid4(), room_id=ROOM, content={"text": "x"}, created_at=time) for time in times]
    await db.create_memories(memories, "messages")
    fragments = [{"type": "fragment", "documentId": str(memory.id), "position": 0} for memory in memories[::5]]
    await db.create_memories([Memory(content={}, metadata=each) for each in fragments], "fragments")
    tags = [["common"]] * (MANY - 1) + [["common", "rare"]]
    await db.create_tasks([Task(name="t", tags=each, created_at=time) for each, time in zip(tags, times, strict=True)])
    bodies = [{"runId": str(time), "status": "started"} for time in times]
    ids = [UUID(int=i + 1) for i in range(MANY)]
    await db.create_logs(
        [
            Log(id=id, entity_id=ENTITY, room_id=ROOM, type="run_event", body=body, created_at=time)
            for id, body, time in zip(ids, bodies, times, strict=True)
        ]
    )
    server = await db.create_message_server(MessageServer(name="server", source_type="test"))
    await db.create_channel(Channel(id=CHANNEL, message_server_id=server.id, name="channel", type="GROUP"))
    said = [
        ChannelMessage(id=id, channel_id=CHANNEL, author_id=AUTHOR, content="x", created_at=time)
        for id, time in zip(ids, times, strict=True)
    ]
    for message in said[1:]:
        message.in_reply_to_root_message_id = ids[0]
    await db.create_messages(said)


async def answers(db: DatabaseAdapter) -> list[Any]:
    queries = ("common", "rare", "zoë", "z", "x", "14", "no")
    found: list[Any] = [await db.search_entities_by_name(query, 7) for query in queries]
    found += [await db.get_entities_by_names(names) for names in (["Rare Zoë", "Name 3", "name 4"], ["Common"], ["no"])]
    found += [await db.get_tasks(tags=tags, count=3) for tags in (["rare"], ["common"], ["rare", "common"], ["no"])]
    for scope in ({}, {"room_id": ROOM}):
        found.append(await db.get_memories(table_name="messages", start=LATE, count=20, **scope))
        found.append(await db.get_memories(table_name="messages", end=T0 + timedelta(minutes=3), count=20, **scope))
        found.append(await db.count_memories(table_name="messages", start=LATE, **scope))
    found.append(await db.get_agent_run_summaries(from_time=LATE))
    for id in (EARLY_ID, uuid4()):
        early, late = (T0 + timedelta(minutes=3), id), (LATE, LATE_ID if id == EARLY_ID else id)
        scopes: tuple[dict[str, Any], ...] = ({}, {"type": "run_event"}, {"room_id": ROOM}, {"entity_id": ENTITY})
        found += [await db.get_logs(cursor=early, **scope) for scope in scopes]
        found.append(await db.get_messages_for_channel(CHANNEL, cursor=early))
        found.append(await db.get_messages_for_channel(CHANNEL, cursor=late, oldest_first=True))
        found.append(await db.get_messages_for_channel(CHANNEL, None, LATE, cursor=early, oldest_first=True))
        found.append(await db.get_replies(UUID(int=1), cursor=late))
    return found


async def test_policies_change_no_answer_and_let_no_scan_read_in_vain(make_db: MakeAdapter, own_database: str) -> None:
    db = await make_db(dsn=own_database)
    await fill(db)
    expected = await answers(db)
    session = await asyncpg.connect(own_database, server_settings=_pool.session_settings(Config.load(environ={})))
    guards = dict.fromkeys(("memories", "embeddings", "entities", "tasks", "logs"), f"agent_id = '{db.agent_id}'")
    guards["central_messages"] = f"author_id = '{AUTHOR}'"
    for table, guard in guards.items():
        await session.execute(f"""
            ALTER TABLE elizasql.{table} ENABLE ROW LEVEL SECURITY;
            ALTER TABLE elizasql.{table} FORCE ROW LEVEL SECURITY;
            CREATE POLICY guard ON elizasql.{table} USING ({guard});
            ANALYZE elizasql.{table}
        """)
    guarded = await make_db(db.agent_id, dsn=own_database)
    assert guarded._executor.home is None
    assert await answers(guarded) == expected

    agent = {"agent_id": db.agent_id}
    listed = {**agent, "type": "messages", "only_unique": False, "start_time": LATE, "skip": 0, "count": 20}
    page = {**listed, "start_time": None, "end_time": T0 + timedelta(minutes=3), "count": 3}
    # The batch is read, all fragments, and what goes twice, to lock it and to delete it.
    old = {**agent, "type": "messages", "batch_size": 50}
    names = [f"Nobody{i}" for i in range(20)]
    # Of a cursor its own row is read, too, once for each place where its time is needed.
    early = {**agent, "cursor_id": EARLY_ID, "skip": 0, "count": 20}
    late = {"channel_id": CHANNEL, "message_id": UUID(int=1), "cursor_id": LATE_ID, "count": 20}
    before = {"channel_id": CHANNEL, "before_time": T0 + timedelta(minutes=3), "count": 20}
    cases: list[tuple[str, dict[str, Any], int]] = [
        ("get_memories", listed, 5),
        ("get_memories", page, 3),
        ("get_memories_of_room", {**listed, "room_id": ROOM}, 5),
        ("count_memories", listed, 5),
        ("count_memories_of_rooms", {**listed, "room_ids": [ROOM]}, 5),
        ("get_agent_run_summaries", {**agent, "narrowed": True, "from_time": LATE, "skip": 0, "count": 0}, 10),
        ("prune_logs", {**agent, "before": T0 + timedelta(minutes=3), "batch_size": 50}, 6),
        ("prune_logs", {**agent, "after_time": LATE, "after_id": LATE_ID, "batch_size": 50}, 8),
        ("get_logs", early, 4),
        ("get_logs_by_type", {**early, "type": "run_event"}, 4),
        ("get_logs_of_room", {**early, "room_id": ROOM}, 4),
        ("get_logs_of_entity", {**early, "entity_id": ENTITY}, 4),
        ("get_messages_for_channel", {**before, "cursor_id": EARLY_ID}, 5),
        ("get_messages_for_channel_oldest_first", late, 5),
        ("get_messages_for_channel_oldest_first", before, 3),
        ("get_replies", late, 5),
        ("get_entities_by_names", {**agent, "names": names}, MANY + 1),
        ("search_entities_by_name", {**agent, "query": "nobody", "count": 7}, 100 + MANY + 1),
        ("get_tasks_by_tags", {**agent, "tags": ["rare"], "skip": 0, "count": 3}, 30 + MANY),
        ("prune_memories", {**old, "before": T0 + timedelta(minutes=3)}, 2 * (MANY // 5) + 3 + 2 * 4),
        ("prune_memories", {**old, "before": T0 + timedelta(minutes=3), "room_id": ROOM}, 2 * (MANY // 5) + 3 + 2 * 4),
        ("prune_memories", {**old, "after_time": LATE, "after_id": UUID(int=2**128 - 1)}, 2 * (MANY // 5) + 4 + 2 * 4),
        ("delete_all_memories", {**agent, "room_ids": [ROOM], "type": "messages"}, 10 * MANY),
    ]
    for name, params, most in cases:
        transaction = session.transaction()
        await transaction.start()
        nodes = await plan_of(session, SQL[name], params, execute=True, named=False)
        await transaction.rollback()
        scans = [node for node in nodes if "Relation Name" in node and node["Node Type"].endswith("Scan")]
        read = sum(
            node["Actual Loops"] * (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) for node in scans
        )
        assert 0 < read <= most, (name, read)
        filters = [node.get("Filter", "") for node in scans if node["Actual Loops"]]
        assert not [each for each in filters if "_grams" in each or "_keys" in each], name
    await session.close()


@pytest.mark.parametrize("resident", ["off", "required"])
async def test_what_policies_hide_is_made_up_for(make_db: MakeAdapter, own_database: str, resident: str) -> None:
    """Those of memories, which embeddings do not have: the nearest may be among what is hidden."""
    db = await make_db(dsn=own_database)
    vectors = np.random.default_rng(0).normal(size=(150, 384)).astype(np.float32)
    query = vectors[0]
    similarity = vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)
    order = [int(each) for each in np.argsort(-similarity)]
    hidden = set(order[:20])
    await db.create_memories(
        [
            Memory(
                id=UUID(int=i + 1),
                content={},
                embedding=vector,
                unique=True,
                metadata={"hidden": i in hidden, "rare": i == order[-1]},
            )
            for i, vector in enumerate(vectors)
        ],
        "messages",
    )
    raw = await asyncpg.connect(own_database)
    await raw.execute("""
        ALTER TABLE elizasql.memories ENABLE ROW LEVEL SECURITY;
        ALTER TABLE elizasql.memories FORCE ROW LEVEL SECURITY;
        CREATE POLICY guard ON elizasql.memories USING (NOT metadata @> '{"hidden": true}')
    """)
    await raw.close()
    guarded = await make_db(db.agent_id, dsn=own_database, resident=resident)

    async def search(**options: Any) -> list[int]:
        hits = await guarded.search_memories(embedding=query, table_name="messages", **options)
        return [hit.id.int - 1 for hit in hits if hit.id is not None]

    assert await search() == order[20:30]
    assert await search(count=1000) == order[20:]
    assert await search(recall="exact") == order[20:30]
    least = (similarity[order[24]] + similarity[order[25]]) / 2
    assert await search(match_threshold=float(least)) == order[20:25]
    assert await search(metadata={"rare": False}) == order[20:30]
    assert await search(metadata={"rare": True}) == order[-1:]
    assert await search(metadata={"hidden": True}) == []


GUARDS = {"memories": "NOT metadata @> '{\"hidden\": true}'", "embeddings": f"memory_id > '{UUID(int=2)}'"}


class Hidden:
    """Six memories with vectors of 384 dimensions, two of which policies can hide from the owner of the tables."""

    def __init__(self, db: DatabaseAdapter, admin: asyncpg.Connection[Any]) -> None:
        self.db = db
        self.admin = admin

    async def guard(self, *tables: str) -> None:
        for table in tables:
            await self.admin.execute(f"""
                ALTER TABLE elizasql.{table} ENABLE ROW LEVEL SECURITY;
                ALTER TABLE elizasql.{table} FORCE ROW LEVEL SECURITY;
                CREATE POLICY guard ON elizasql.{table} USING ({GUARDS[table]})
            """)

    async def vectors(self) -> dict[int, int]:
        """Give the number of vectors of each width."""
        rows = await self.admin.fetch("SELECT dimension, count(*) FROM elizasql.embeddings GROUP BY dimension")
        return dict(map(tuple, rows))

    async def moves(self) -> int:
        count: int = await self.admin.fetchval("SELECT count(*) FROM elizasql.reembeddings")
        return count


@pytest.fixture
async def hidden(make_db: MakeAdapter, own_database: str) -> AsyncIterator[Hidden]:
    db = await make_db(dsn=own_database)
    numbers = range(1, 7)
    await db.create_memories(
        [
            Memory(
                id=UUID(int=i),
                content={"text": str(i)},
                embedding=vector_of(str(i), 384),
                unique=True,
                metadata={"hidden": i <= 2},
            )
            for i in numbers
        ],
        "messages",
    )
    admin = await asyncpg.connect(own_database.replace("//elizasql@", "//postgres@"))
    yield Hidden(db, admin)
    await admin.close()


@pytest.mark.parametrize("tables", [("memories",), ("embeddings",), ("memories", "embeddings")], ids="+".join)
async def test_under_policies_no_move_to_another_width_begins(
    make_db: MakeAdapter, own_database: str, hidden: Hidden, tables: tuple[str, ...]
) -> None:
    """What they hide would have no vector of the new width, and lose that of the old one."""
    await hidden.guard(*tables)
    guarded = await make_db(hidden.db.agent_id, dsn=own_database)
    with pytest.raises(PermissionDeniedError, match="row-level security"):
        await guarded.reembed(512, embedder(512))
    assert await hidden.vectors() == {384: 6}
    assert await hidden.moves() == 0
    assert await guarded.get_embedding_dimension() == 384
    assert await guarded.abandon_reembedding() == 0, "there is nothing to give up"


@pytest.mark.parametrize("during", ["filling", "cleaning up"])
async def test_a_move_that_meets_policies_waits_for_a_role_that_sees_all(
    make_db: MakeAdapter, own_database: str, hidden: Hidden, monkeypatch: pytest.MonkeyPatch, during: str
) -> None:
    db, switch = hidden.db, _reembedding._Move._switch

    async def meet(self: _reembedding._Move) -> bool:
        if during == "filling":
            await hidden.guard("memories", "embeddings")
        switched = await switch(self)
        if during == "cleaning up":
            await hidden.guard("memories", "embeddings")
        return switched

    with monkeypatch.context() as patched, pytest.raises(PermissionDeniedError, match="row-level security"):
        patched.setattr(_reembedding._Move, "_switch", meet)
        await db.reembed(512, embedder(512))
    assert await hidden.moves() == 1
    vectors = await hidden.vectors()
    if during == "filling":
        assert vectors == {384: 6, 512: 6}
        assert await db.get_embedding_dimension() == 384
        with pytest.raises(PermissionDeniedError, match="row-level security"):
            await db.abandon_reembedding()
        assert await hidden.vectors() == vectors
    else:
        assert vectors == {384: 2, 512: 6}, "what is seen of the old width may go"
    seer = await make_db(db.agent_id, dsn=own_database.replace("//elizasql@", "//postgres@"), dimension=None)
    assert (await seer.reembed(512, embedder(512))).dropped == vectors[384]
    assert await hidden.vectors() == {512: 6}
    assert await hidden.moves() == 0


@pytest.mark.parametrize("tries", [0, 3])
async def test_a_move_that_cannot_change_the_agent_ends(
    own_database: str, hidden: Hidden, monkeypatch: pytest.MonkeyPatch, tries: int
) -> None:
    """What policies hide from an UPDATE is passed over without an error."""
    await hidden.admin.execute("""
        ALTER TABLE elizasql.agents ENABLE ROW LEVEL SECURITY;
        ALTER TABLE elizasql.agents FORCE ROW LEVEL SECURITY;
        CREATE POLICY see ON elizasql.agents FOR SELECT USING (TRUE)
    """)
    monkeypatch.setattr(_reembedding, "_TRIES", tries)
    with pytest.raises(PermissionDeniedError, match=r"elizasql\.agents stands in the way"):
        await hidden.db.reembed(512, embedder(512))
    assert await hidden.vectors() == {384: 6, 512: 6}
    await hidden.admin.execute(
        "DROP POLICY see ON elizasql.agents; CREATE POLICY change ON elizasql.agents USING (TRUE)"
    )
    assert (await hidden.db.reembed(512, embedder(512))).dropped == 6
    assert await hidden.vectors() == {512: 6}


async def test_policies_do_not_keep_an_agent_that_is_on_its_way_from_being_deleted(
    make_db: MakeAdapter, own_database: str, hidden: Hidden
) -> None:
    def end(done: int, total: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        await hidden.db.reembed(512, embedder(512), progress=end)
    assert await hidden.moves() == 1
    await hidden.guard("memories", "embeddings")
    guarded = await make_db(hidden.db.agent_id, dsn=own_database)
    assert await guarded.delete_agent(guarded.agent_id)
    assert await hidden.moves() == 0


async def test_what_a_cascade_changes_is_not_passed_over(
    make_db: MakeAdapter, own_database: str, server_dir: Path
) -> None:
    """From PostgreSQL 18 on its triggers run as the owner, who may see less than the role that deletes."""
    if str(server_dir) not in own_database:
        pytest.skip("the embedded server is not used")
    db = await make_db(dsn=own_database)
    admin = await asyncpg.connect(own_database.replace("//elizasql@", "//postgres@"))
    await admin.execute("CREATE ROLE member LOGIN")
    try:
        await admin.execute("GRANT USAGE ON SCHEMA elizasql TO member")
        await admin.execute("GRANT ALL ON ALL TABLES IN SCHEMA elizasql TO member")
        member = await make_db(db.agent_id, dsn=own_database.replace("//elizasql@", "//member@"), migrate=False)
        await member.create_world(World(id=ROOM, name="world"))
        [vector] = np.random.default_rng(0).normal(size=(1, 384)).astype(np.float32)
        memory = Memory(world_id=ROOM, content={}, embedding=vector, unique=True)
        await member.create_memory(memory, "messages")
        for table in ("memories", "embeddings"):
            await admin.execute(f"""
                ALTER TABLE elizasql.{table} ENABLE ROW LEVEL SECURITY;
                ALTER TABLE elizasql.{table} FORCE ROW LEVEL SECURITY;
                CREATE POLICY guard ON elizasql.{table} TO member USING (TRUE)
            """)
        with contextlib.suppress(PermissionDeniedError):
            await member.remove_world(ROOM)
        scopes = await admin.fetchrow(
            "SELECT m.world_id, e.world_id AS copied FROM elizasql.memories AS m, elizasql.embeddings AS e"
            " WHERE m.agent_id = $1 AND e.agent_id = $1",
            db.agent_id,
        )
        assert scopes is not None and scopes["world_id"] == scopes["copied"]
        await member.close()
    finally:
        await admin.execute("DROP OWNED BY member; DROP ROLE member")
        await admin.close()
