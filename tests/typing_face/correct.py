"""A user's program: what the types of the public face permit. No line of it may be reported.

`assert_type` stands where an annotation would also be content with Any.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import numpy as np
from numpy.typing import NDArray
from pgvector import HalfVector, Vector
from typing_extensions import Unpack, assert_type

import elizasql
import elizasql.sync
from elizasql import (
    MISSING,
    Agent,
    AgentRunSummaryResult,
    Channel,
    ChannelMessage,
    CircuitOpenError,
    Component,
    Config,
    DatabaseAdapter,
    ElizaSQLError,
    EmbeddingDimensionError,
    Entity,
    ForeignKeyError,
    Goal,
    Log,
    Memory,
    MessageServer,
    PairingRequest,
    Participant,
    Relationship,
    Room,
    Settings,
    Task,
    World,
)
from elizasql.transfer import Archive
from elizasql.types import DIMENSIONS, Dimension, EmbeddingInput, GoalStatus, UserState

AGENT = uuid4()


def embed(text: str) -> NDArray[np.float32]:
    return np.full(384, len(text), np.float32)


def as_list(text: str) -> EmbeddingInput:
    return [float(len(text))] * 384


class Tensor:
    """An array of another library, which declares as little as they do."""

    def __array__(self, dtype: Any = None) -> NDArray[Any]:
        return np.ones(384, dtype)


INPUTS: list[EmbeddingInput] = [
    (0.5, 1) * 192,
    np.ones(384),
    np.ones(384, np.int64),
    Tensor(),
    Vector([1.0] * 384),
    HalfVector([1.0] * 384),
]


async def remember(db: DatabaseAdapter, room: UUID, user: UUID) -> list[Memory]:
    assert_type(db, DatabaseAdapter)
    assert_type(db.config, Config)
    agent = assert_type(await db.ensure_agent_exists(Agent(name="Ada", bio=["an agent"])), Agent)
    await db.ensure_embedding_dimension(DIMENSIONS[0])
    width = assert_type(await db.get_embedding_dimension(), int | None)
    print(agent.id, width)
    world = assert_type(await db.create_world(World(name="home")), UUID)
    await db.create_room(Room(id=room, source="cli", type="DM", world_id=world))
    await db.create_rooms([{"source": "cli", "type": "GROUP"}, Room(source="cli", type="DM")])
    await db.create_entities([Entity(id=user, names=["Mara"]), {"id": str(uuid4()), "names": ["Ben"]}])
    joined: bool = await db.add_participants_room([user], room)
    assert joined
    memory_id: UUID = await db.create_memory(
        Memory(entity_id=user, room_id=room, content={"text": "nuts"}, embedding=embed("nuts")), "facts", timeout=5.0
    )
    ids: list[UUID] = await db.create_memories(
        [Memory(content={"text": text}, embedding=embed(text)) for text in ("a", "bc")], table_name="facts"
    )
    stored = assert_type(await db.get_memory_by_id(memory_id), Memory | None)
    if stored is not None and stored.content is not None:
        print(stored.content["text"], stored.to_dict())
    hits = await db.search_memories(
        embedding=as_list("nuts"), table_name="facts", count=3, match_threshold=0.5, room_id=room
    )
    assert_type(hits, list[Memory])
    for hit in hits:
        print(hit.similarity or 0.0, hit.embedding)
    number: int = await db.count_memories(room, table_name="facts", start=datetime.now(timezone.utc))
    page = await db.get_memories(table_name="facts", room_id=str(room), count=number, cursor=stored)
    await db.update_memory({"id": memory_id, "metadata": {"seen": True}})
    deleted: int = await db.delete_memories(ids)
    near = await db.get_cached_embeddings(query_table_name="facts", query_threshold=2, query_input="nuts")
    print(deleted, near[0]["levenshtein_score"] if near else None)
    return page


async def know(db: DatabaseAdapter, room: UUID, user: UUID, other: UUID) -> None:
    component = Component(entity_id=user, room_id=room, type="profile", data={"city": "Oslo"})
    created: bool = await db.create_component(component)
    found: Component | None = await db.get_component(user, "profile")
    relationship = Relationship(source_entity_id=user, target_entity_id=other, tags=["friend"])
    await db.create_relationships([relationship])
    named: list[Entity] = await db.search_entities_by_name("mar", limit=None)
    present: list[UUID] = await db.get_participants_for_room(room)
    participants: list[Participant] = await db.get_participants_for_entity(user)
    state: UserState | None = await db.get_participant_user_state(room, user)
    await db.set_participant_user_state(room, user, "MUTED" if state is None else state)
    print(created, found, named, present, [participant.room_state for participant in participants])


async def work(db: DatabaseAdapter, room: UUID) -> AgentRunSummaryResult:
    await db.set_cache("key", {"value": [1, 2, None]}, ttl=timedelta(hours=1))
    swapped: bool = await db.compare_and_set_cache("lock", MISSING, "mine", ttl=60)
    await db.create_task(Task(name="remind", room_id=room, tags=["queue"]))
    for task in await db.claim_tasks(limit=2, lease=timedelta(seconds=30), names=["remind"]):
        done: bool = await db.complete_task(task)
        print(done, task.attempts)
    async for task in db.wait_for_tasks(names="remind"):
        assert_type(task, Task)
        await db.fail_task(task, "not today")
        break
    status: GoalStatus = "DONE"
    goal: UUID = await db.create_goal(Goal(name="learn", status="IN_PROGRESS"))
    await db.update_goal_status(goal, status)
    await db.log(Log(entity_id=uuid4(), room_id=room, type="action", body={"runId": "1"}))
    logs: list[Log] = await db.get_logs(type="action", count=10)
    print(swapped, logs)
    return await db.get_agent_run_summaries(limit=5)


async def talk(db: DatabaseAdapter) -> None:
    server: MessageServer = await db.create_message_server(MessageServer(name="guild", source_type="x"))
    assert server.id is not None
    channel: Channel = await db.create_channel(
        Channel(message_server_id=server.id, name="general", type="GROUP"), [uuid4()]
    )
    message: ChannelMessage = await db.create_message(
        ChannelMessage(channel_id=channel.id, author_id=uuid4(), content="hello")
    )
    await db.create_pairing_request(PairingRequest(channel="mail", sender_id="x", code="123"))
    print(message.created_at)


def opened(**settings: Unpack[Settings]) -> AbstractAsyncContextManager[DatabaseAdapter]:
    return elizasql.connect(agent_id=AGENT, **settings)


async def main(dsn: str | None) -> None:
    config: Config = Config.load(ef_search=100)
    dimension: Dimension = 384
    more: Settings = {"resident": config.resident, "memory_types": ["messages"], "timeout": None}
    async with opened(ef_search=config.ef_search, pool_max_size=5), elizasql.connect(agent_id=AGENT, **more):
        pass
    anything: dict[str, Any] = {"indexing": "manual"}
    async with elizasql.connect(agent_id=AGENT, dsn=dsn, ef_search=config.ef_search, **anything) as db:
        try:
            await remember(db, uuid4(), uuid4())
            async with db.transaction() as tx, tx.transaction() as savepoint:
                assert_type(savepoint, DatabaseAdapter)
                await know(savepoint, uuid4(), uuid4(), uuid4())
            runs = await db.with_entity_context(None, lambda bound: work(bound, uuid4()))
            assert_type(runs, AgentRunSummaryResult)
            await talk(db)
            await db.index_memories(lambda done, total: print(done, total), rebuild=True)
        except EmbeddingDimensionError as error:
            print(error.locked, error.given, dimension)
        except ForeignKeyError as error:
            print(error.constraint, error.table, error.detail)
        except CircuitOpenError as error:
            print(error.retry_after + 1.0)
        except ElizaSQLError as error:
            assert_type(error.statement, str | None)
            print(error.sqlstate, error.retryable)
        print((await db.health())["ready"], (await db.stats())["retries"])
    adapter: DatabaseAdapter = await elizasql.create_database_adapter({"dataDir": "pglite"}, str(AGENT))
    await adapter.close()


def blocking() -> int:
    with elizasql.sync.connect(agent_id=AGENT, data_dir=Path("memory")) as db:
        assert_type(db, elizasql.sync.DatabaseAdapter)
        assert_type(db.agent_id, UUID)
        memory_id = assert_type(db.create_memory({"content": {"text": "x"}}, table_name="facts"), UUID)
        memory = assert_type(db.get_memory_by_id(memory_id), Memory | None)
        with db.transaction() as tx:
            assert_type(tx.get_room(AGENT), Room | None)
        assert_type(db.with_entity_context(AGENT, lambda bound: bound.count_memories()), int)
        for task in db.wait_for_tasks():
            assert_type(task, Task)
            db.complete_task(task)
            break
    opened: elizasql.sync.DatabaseAdapter = elizasql.sync.open(agent_id=str(AGENT))
    opened.close()
    with Archive(Path("x.tar")) as archive:
        print(archive.manifest["agents"])
    return memory is not None
