"""No method of one agent's adapter returns, changes or deletes a row of another agent: every method is tried."""

from __future__ import annotations

import asyncio
import inspect
import re
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any
from uuid import UUID, uuid4, uuid5

import asyncpg
import numpy as np
import pytest

import elizasql
from elizasql import (
    AgentRunSummaryResult,
    ArgumentError,
    Component,
    DatabaseAdapter,
    ElizaSQLError,
    Goal,
    Log,
    Memory,
    Relationship,
    Room,
    Task,
    UniqueViolationError,
)
from elizasql.models import Model

from .conftest import MakeAdapter, Scene, make_scene, neighbour_of

SECRET = "a secret of the other agent"
OWN = "something of the agent's own"
VECTOR, OWN_VECTOR = np.random.default_rng(3).normal(size=(2, 384)).astype(np.float32)
CLAIM = uuid4()

# What is shared by all agents, by its nature; what looks after agents as such; what needs no ids.
SHARED = {
    name
    for name in dir(DatabaseAdapter)
    if any(word in name for word in ("channel", "message_server", "message_by", "replies", "get_message"))
} | {"create_message", "create_messages", "update_message", "delete_message", "delete_messages"}
AGENTS = {
    name
    for name in dir(DatabaseAdapter)
    if name.endswith(("_agent", "_agents")) or (name.startswith("get_agent") and name != "get_agent_run_summaries")
}
PLAIN = {
    "close",
    "transaction",
    "with_entity_context",
    "is_ready",
    "wait_for_tasks",
    "get_embedding_dimension",
    "ensure_embedding_dimension",
    "ensure_agent_exists",
}


async def fill(db: DatabaseAdapter, scene: Scene, text: str = SECRET) -> dict[str, Any]:
    """Give an agent one of everything; give the ids."""
    ids = {
        name: uuid5(scene.world, name)
        for name in ("memory", "fragment", "component", "relationship", "task", "goal", "log")
    }
    place = {"entity_id": scene.entity, "room_id": scene.room}
    await db.update_entities([{"id": id, "metadata": {"secret": text}} for id in (scene.entity, scene.other)])
    await db.create_memory(
        Memory(
            id=ids["memory"],
            content={"text": text, "title": text},
            metadata={"title": text},
            world_id=scene.world,
            embedding=VECTOR if text == SECRET else OWN_VECTOR,
            **place,
        ),
        "messages",
    )
    fragment = {"type": "fragment", "documentId": str(ids["memory"]), "position": 0}
    await db.create_memory(Memory(id=ids["fragment"], content={"text": text}, metadata=fragment, **place), "fragments")
    await db.create_component(
        Component(id=ids["component"], type="profile", data={"n": 1, "secret": text}, world_id=scene.world, **place)
    )
    await db.create_relationship(
        Relationship(id=ids["relationship"], source_entity_id=scene.entity, target_entity_id=scene.other, tags=["t"])
    )
    await db.create_task(
        Task(id=ids["task"], name="task", description=text, tags=["queue"], world_id=scene.world, **place)
    )
    await db.create_goal(Goal(id=ids["goal"], name=text, objectives=[], **place))
    await db.create_logs([Log(id=ids["log"], type="run_event", body={"runId": "r", "secret": text}, **place)])
    await db.set_caches({"key": text, "another": text})
    await db.set_cache("expired", text, ttl=1e-6)
    await db.set_participant_user_state(scene.room, scene.entity, "MUTED")
    for kind, create, more in (
        ("request", db.create_pairing_request, {"code": "code"}),
        ("entry", db.create_pairing_allowlist_entry, {}),
    ):
        pairing = {"id": uuid5(scene.world, kind), "channel": "c", "senderId": "s", "metadata": {"secret": text}}
        await create({**pairing, **more})
    return ids


def arguments(
    name: str, scene: Scene, ids: dict[str, Any], pairing: dict[str, UUID], text: str = SECRET
) -> dict[str, Any]:
    """Give what a method is called with: the other agent's ids wherever it takes ids."""
    method = getattr(DatabaseAdapter, name)
    place = {"entity_id": scene.entity, "room_id": scene.room, "world_id": scene.world}
    changed: dict[str, dict[str, Any]] = {
        "memory": {"id": ids["memory"], "content": {"text": "taken"}},
        "component": {"id": ids["component"], "data": {"taken": True}},
        "relationship": {"id": ids["relationship"], "tags": ["taken"]},
        "goal": {"id": ids["goal"], "name": "taken"},
        "room": {"id": scene.room, "name": "taken"},
        "world": {"id": scene.world, "name": "taken"},
        "entity": {"id": scene.entity, "names": ["taken"]},
        "log": {"id": ids["log"], "type": "taken"},
        "request": {"id": pairing["request"], "metadata": {"taken": True}},
        "entry": {"id": pairing["entry"], "metadata": {"taken": True}},
        "task": {"name": "taken"},
    }
    full: dict[str, dict[str, Any]] = {
        "memory": {"content": {"text": "x"}, **place},
        "component": {"type": "profile", "data": {}, **place},
        "relationship": {"source_entity_id": scene.entity, "target_entity_id": scene.other},
        "goal": {"name": "x", "objectives": [], "entity_id": scene.entity, "room_id": scene.room},
        "room": {"id": scene.room, "source": "x", "type": "DM"},
        "world": {"id": scene.world, "name": "x"},
        "entity": {"id": scene.entity, "names": ["x"]},
        "log": {"type": "x", "body": {}, "entity_id": scene.entity, "room_id": scene.room},
        "task": {"id": ids["task"], "name": "x"},
        "request": {"channel": "c", "sender_id": "s", "code": "code"},
        "entry": {"channel": "c", "sender_id": "s"},
    }
    creating = name.startswith(("create", "upsert", "ensure", "load", "log"))
    one = full if creating else changed
    if name.startswith("upsert"):
        full["memory"]["id"] = ids["memory"]
    pair = (scene.entity, scene.room)
    known: dict[str, Any] = {
        **place,
        "source_entity_id": scene.entity,
        "target_entity_id": scene.other,
        "room_ids": [scene.room],
        "world_ids": [scene.world],
        "entity_ids": [scene.entity, scene.other],
        "table_name": "messages",
        "embedding": VECTOR if text == SECRET else OWN_VECTOR,
        "query_table_name": "messages",
        "query_threshold": 50,
        "query_input": text,
        "names": ["Ann", "Bob", "task"],
        "name": "task",
        "query": "Ann",
        "key": "key",
        "keys": ["key"],
        "value": "taken",
        "expected": text,
        "entries": {"key": "taken"},
        "pairs": [pair],
        "participants": [pair],
        "updates": [{"entityId": scene.entity, "roomId": scene.room, "state": "FOLLOWED"}],
        "state": "FOLLOWED",
        "status": "DONE",
        "type": "profile",
        "ops": [{"op": "set", "path": "taken", "value": True}],
        "patches": [{"componentId": ids["component"], "ops": [{"op": "set", "path": "taken", "value": True}]}],
        "older_than": timedelta(0),
        "channel": "c",
        "queries": [{"channel": "c", "agentId": None}],
        "error": "failed",
        "tags": None,
        "to": 512,
        "embed": lambda texts: np.ones((len(texts), 512)),
        "skip_missing": True,
        "include_embedding": True,
        "include_components": True,
        "include_all_components": True,
        **one,
    }
    if name in (
        "claim_tasks",
        "get_relationships_by_pairs",
        "get_components_by_natural_keys",
        "get_agent_run_summaries",
    ):
        known |= {
            "names": None,
            "status": "all",
            "pairs": [(scene.entity, scene.other)],
            "keys": [{"entityId": scene.entity, "type": "profile", "worldId": scene.world}],
        }
    if name == "are_room_participants" or name.startswith("get_participant_user_states"):
        known["pairs"] = [{"entityId": scene.entity, "roomId": scene.room}]
    if name == "update_participants":
        known["participants"] = [{"entityId": scene.entity, "roomId": scene.room, "updates": {"roomState": "FOLLOWED"}}]
    if "pairing_allowlist" in name:
        known["entries"] = [one["entry"]]
    if name == "query_entities":
        known["limit"] = 10
    if name == "get_memories_by_world_id":  # one or several
        del known["world_ids"]
    if name.startswith("get_component"):
        del known["source_entity_id"]
    if name == "get_logs":
        known["type"] = "run_event"
    if name.endswith("_task") and name.split("_")[0] in ("complete", "fail", "heartbeat", "release"):
        known["task"] = Task(id=ids["task"], claim_token=CLAIM)
    given: dict[str, Any] = {}
    for parameter in list(inspect.signature(method).parameters.values())[1:]:
        word = parameter.name
        if word in known:
            given[word] = known[word]
        elif word.endswith("_ids") and word[:-4] in ids:
            given[word] = [ids[word[:-4]]]
        elif word.endswith("_id") and word[:-3] in ids:
            given[word] = ids[word[:-3]]
        elif word in ("request_id", "entry_id"):
            given[word] = pairing[word[:-3]]
        elif word in ("request_ids", "entry_ids"):
            given[word] = [pairing[word[:-4]]]
        elif word in (
            "memories",
            "components",
            "relationships",
            "goals",
            "rooms",
            "worlds",
            "logs",
            "tasks",
            "requests",
        ):
            single = {"memories": "memory"}.get(word, word[:-1])
            given[word] = [{**one[single], **({"id": ids["task"]} if single == "task" else {})}]
        elif word == "entities":
            given[word] = [one["entity"]]
        else:
            assert parameter.default is not inspect.Parameter.empty, f"{name} takes {word}: say what it is called with"
    if given.get("room_id") is not None:
        given.pop("room_ids", None)
    if name == "get_relationships":
        given.pop("entity_ids", None)
    return given


METHODS = [
    name
    for name, _ in inspect.getmembers(elizasql.DatabaseAdapter, inspect.isfunction)
    if not name.startswith("_") and name not in SHARED | AGENTS | PLAIN
]


async def snapshot(raw: asyncpg.Connection[Any], agent: UUID) -> dict[str, list[str]]:
    """Give every row of an agent in every table that has an agent_id."""
    tables = await raw.fetch(
        """SELECT c.relname FROM pg_attribute AS a
        INNER JOIN pg_class AS c ON c.oid = a.attrelid
        WHERE c.relnamespace = 'elizasql'::regnamespace AND c.relkind IN ('r', 'p') AND NOT c.relispartition
        AND a.attname = 'agent_id'"""
    )
    found: dict[str, list[str]] = {table: [] for (table,) in tables}
    parts = (f"SELECT '{table}', t::text FROM elizasql.{table} AS t WHERE agent_id = $1" for table in found)
    for table, row in await raw.fetch(" UNION ALL ".join(parts), agent):
        found[table].append(row)
    return {table: sorted(rows) for table, rows in found.items()}


READS = ("are_", "count_", "get_", "is_", "query_", "search_")
SCOPES = ("room_id", "room_ids", "entity_id", "entity_ids", "world_id", "world_ids")


@dataclass(frozen=True)
class Filled:
    """An agent that has one of everything."""

    agent: UUID
    scene: Scene
    ids: dict[str, Any]
    pairing: dict[str, UUID]
    text: str = SECRET

    def arguments(self, name: str) -> dict[str, Any]:
        """Give what a method is called with, to reach what is this agent's."""
        return arguments(name, self.scene, self.ids, self.pairing, self.text)

    def calls(self, name: str) -> list[dict[str, Any]]:
        """Give what a method is called with to run each of its statements.

        With all its scopes; where these can be left out, with each alone and with none; and by what else it looks for.
        """
        given, parameters = self.arguments(name), inspect.signature(getattr(DatabaseAdapter, name)).parameters
        scopes = [word for word in SCOPES if word in given and parameters[word].default is not inspect.Parameter.empty]
        unscoped = {word: value for word, value in given.items() if word not in scopes}
        one = {"limit": 1} if "limit" in parameters else {}
        less = [{**unscoped, **one, word: given[word]} for word in scopes] + [unscoped | one] if scopes else []
        also: dict[str, list[dict[str, Any]]] = {
            "claim_tasks": [{**unscoped, "names": ["task"]}],
            "complete_task": [{**given, "again_in": 60}],
            "get_cached_embeddings": [
                {**given, "query_field_name": field, "query_field_sub_name": "title"}
                for field in ("content", "metadata")
            ],
            "get_relationships": [
                {"entity_id": self.scene.other},
                {"entity_ids": [self.scene.entity, self.scene.other]},
            ],
            "get_tasks": [{"tags": ["queue"]}, {"tags": ["queue"], "limit": 1}],
            "prune_memories": [{"table_name": "messages", "keep": 0}],
            "query_entities": [
                {"component_type": "profile"},
                {"component_type": "profile", "world_id": self.scene.world},
                {"world_id": self.scene.world},
                {"component_data_filter": {"n": 1}},
            ],
            "search_entities_by_name": [{"query": ""}],
        }
        return [given, *less, *also.get(name, [])]


async def filled(db: DatabaseAdapter, twin: Filled | None = None) -> Filled:
    """Fill the agent of an adapter; as a twin of another agent, whose ids its rows have, with a text of its own."""
    scene = await make_scene(db, twin and twin.scene)
    text = OWN if twin else SECRET
    ids = await fill(db, scene, text)
    pairing = {
        "request": (await db.get_pairing_requests([{"channel": "c"}]))[0][0].id,
        "entry": (await db.get_pairing_allowlist("c"))[0].id,
    }
    return Filled(db.agent_id, scene, ids, pairing, text)  # type: ignore[arg-type]


async def claim(raw: asyncpg.Connection[Any], agent: UUID) -> None:
    """Let an agent's task be claimed, under the token that all of these tests know."""
    await raw.execute("UPDATE elizasql.tasks SET claim_token = $2, attempts = 1 WHERE agent_id = $1", agent, CLAIM)


@pytest.fixture(scope="module")
def theirs(dsn: str) -> Filled:
    """Give the other agent, which every test leaves as it was; its id is low, so that its rows are found first."""

    async def make() -> Filled:
        agent = UUID(int=uuid4().int >> 64)
        async with elizasql.connect(agent_id=agent, dsn=dsn, indexing="manual", pool_min_size=0) as db:
            await db.ensure_agent_exists({"name": "theirs"})
            await db.ensure_embedding_dimension(384)
            made = await filled(db)
            # Before those of others in every order.
            place: dict[str, Any] = {"entity_id": made.scene.entity, "room_id": made.scene.room}
            place |= {"id": UUID(int=uuid4().int >> 64), "created_at": datetime.now(timezone.utc) + timedelta(1)}
            first = Memory(content={"text": SECRET}, world_id=made.scene.world, embedding=OWN_VECTOR, **place)
            await db.create_memory(first, "messages")
            await db.create_logs([Log(type="run_event", body={"secret": SECRET}, **place)])
            about = {"entity_id": made.scene.other, "room_id": made.scene.room, "world_id": made.scene.world}
            await db.create_component(Component(type="profile", data={"n": 1, "secret": SECRET}, **about))
            await db.create_room(Room(id=place["id"], source="test", type="DM", world_id=made.scene.world))
            await db.add_participant(made.scene.entity, place["id"])
        raw = await asyncpg.connect(dsn)
        await claim(raw, agent)
        await raw.close()
        return made

    return asyncio.run(make())


@pytest.fixture
async def db(make_db: MakeAdapter, theirs: Filled, raw: asyncpg.Connection[Any]) -> DatabaseAdapter:
    """Give an adapter of a new agent in the other one's partitions: what reads an agent's rows looks into no others."""
    return await make_db(await neighbour_of(theirs.agent, raw))


@pytest.mark.parametrize("name", METHODS)
async def test_method_leaves_the_other_agent_alone(
    db: DatabaseAdapter, indexed: None, theirs: Filled, raw: asyncpg.Connection[Any], name: str
) -> None:
    before = await snapshot(raw, theirs.agent)
    assert sum(len(rows) for rows in before.values()) >= 15
    result: Any = None
    # An error is an answer, too; what counts is the other agent's rows.
    with suppress(ElizaSQLError):
        result = await getattr(db, name)(**theirs.arguments(name))
    assert await snapshot(raw, theirs.agent) == before
    assert SECRET not in repr(result)
    assert str(theirs.agent) not in repr(result)
    if name.startswith(READS):
        assert not any(parts_of(result))


def ids_in(result: Any) -> set[str]:
    """Give every id that is anywhere in a result."""
    return set(re.findall(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", repr(result)))


def parts_of(result: Any) -> list[Any]:
    """Give what a result is made of, whatever it comes in."""
    if isinstance(result, AgentRunSummaryResult):
        return [*(result.runs or ()), result.total]
    if isinstance(result, (dict, np.ndarray)):
        return parts_of(list(result.values()) if isinstance(result, dict) else result.tolist())
    return [part for one in result for part in parts_of(one)] if isinstance(result, list) else [result]


@pytest.mark.parametrize("held", [False, True], ids=["free", "held"])
async def test_the_same_calls_do_reach_the_own_rows_alone(
    make_db: MakeAdapter, theirs: Filled, raw: asyncpg.Connection[Any], dsn: str, held: bool
) -> None:
    """The calls above are no empty gestures: most change or return something for the agent that has the rows.

    The other agent has rows with all the same ids, in the same partitions, and these stay out of it: they are neither
    given nor changed, and while somebody has them locked nobody waits.
    """
    holder = await asyncpg.connect(dsn)
    await holder.execute("BEGIN")
    untouched = await snapshot(raw, theirs.agent)
    if held:
        for table in untouched:
            await holder.execute(f"SELECT FROM elizasql.{table} WHERE agent_id = $1 FOR UPDATE", theirs.agent)
    silent = []
    db: DatabaseAdapter | None = None
    for name in METHODS:
        for number in range(len(theirs.calls(name)) if not held else 1):
            if db is None:
                # Less than the server gives one who holds locks and does nothing.
                db = await make_db(await neighbour_of(theirs.agent, raw), timeout=20)
                own = await filled(db, twin=theirs)
                await claim(raw, db.agent_id)
                before = await snapshot(raw, db.agent_id)
                strange = ids_in(untouched) - ids_in(before)
            given = own.calls(name)[number]
            try:
                result = await getattr(db, name)(**given)
            except (ArgumentError, UniqueViolationError):
                result = None
            else:
                assert not name.startswith(READS) or any(parts_of(result)), (name, number)
            assert await snapshot(raw, theirs.agent) == untouched, (name, number)
            assert SECRET not in repr(result), (name, number)
            assert not strange & ids_in(result), (name, number)
            # What has no agent_id to be told by comes twice where it comes from both, and not where they fill the page.
            ids = [str(getattr(part, "id", part)) for part in parts_of(result) if isinstance(part, (Model, UUID))]
            assert len(set(ids)) == len(ids), (name, number)
            if name == "count_memories":
                assert result == 1, number
            if name == "query_entities" and given.keys() & {"component_type", "component_data_filter", "world_id"}:
                assert [entity.id for entity in result] == [own.scene.entity], number
            if name == "get_cached_embeddings":
                assert [each["embedding"].tolist() for each in result] == [OWN_VECTOR.tolist()], number
            if await snapshot(raw, db.agent_id) != before:
                # The next method finds everything again, with a new agent.
                db = None
            elif not result and number == 0:
                silent.append(name)
    await holder.close()
    # What exists already is not created again.
    assert set(silent) <= {"abandon_reembedding", *(name for name in METHODS if name.startswith("create_"))}, silent


async def test_the_resident_tier_gives_the_own_rows(
    make_db: MakeAdapter, theirs: Filled, raw: asyncpg.Connection[Any]
) -> None:
    """When it loads them, when it has them, and when they or the other agent's have changed since."""
    other = await make_db(theirs.agent)
    db = await make_db(await neighbour_of(theirs.agent, raw), resident="required")
    own = await filled(db, twin=theirs)
    late = [uuid4() for _ in range(2)]
    for change in range(4):
        if change == 2:
            await db.update_memory({"id": own.ids["memory"], "content": {"text": OWN}, "embedding": OWN_VECTOR})
        if change == 3:
            await other.create_memories([Memory(id=id, content={}, embedding=OWN_VECTOR) for id in late], "messages")
        found = [await db.search_memories(**given) for given in own.calls("search_memories")]
        assert [[memory.id for memory in memories] for memories in found] == [[own.ids["memory"]]] * len(found), change
        for memory in [each for memories in found for each in memories]:
            assert (memory.agent_id, (memory.content or {})["text"]) == (db.agent_id, OWN)
            assert memory.embedding is not None and memory.embedding.tolist() == OWN_VECTOR.tolist()
    await other.delete_memories(late)


async def test_a_page_begins_behind_the_own_row(
    make_db: MakeAdapter, theirs: Filled, raw: asyncpg.Connection[Any]
) -> None:
    """The time of a cursor is read from the row that it names: from the agent's own one."""
    db = await make_db(await neighbour_of(theirs.agent, raw))
    own = await filled(db, twin=theirs)
    now = datetime.now(timezone.utc)
    scene = own.scene
    place: dict[str, Any] = {"entity_id": scene.entity, "room_id": scene.room}
    memory, log = uuid4(), uuid4()
    await db.create_memory(
        Memory(id=memory, content={}, created_at=now - timedelta(1), world_id=scene.world, **place), "messages"
    )
    await db.create_logs([Log(id=log, type="run_event", body={}, created_at=now - timedelta(1), **place)])
    pages: dict[str, Any] = {
        "room_id": scene.room,
        "entity_id": scene.entity,
        "world_id": scene.world,
        "type": "run_event",
    }
    for kept in (*pages, None):
        scope = {word: value for word, value in pages.items() if word == kept}
        if kept != "type":
            found = await db.get_memories(table_name="messages", cursor=(now, own.ids["memory"]), **scope)
            assert [each.id for each in found] == [memory], kept
        if kept != "world_id":
            logs = await db.get_logs(cursor=(now, own.ids["log"]), **scope)
            assert [each.id for each in logs] == [log], kept


async def test_the_own_room_tells_of_which_world_it_is(
    make_db: MakeAdapter, theirs: Filled, raw: asyncpg.Connection[Any]
) -> None:
    db = await make_db(await neighbour_of(theirs.agent, raw))
    own = await filled(db, twin=theirs)
    asked: dict[str, Any] = {"world_id": own.scene.world, "table_name": "fragments"}
    assert [found.id for found in await db.get_memories_by_world_id(**asked)] == [own.ids["fragment"]]
    await db.update_room({"id": own.scene.room, "world_id": None})
    assert await db.get_memories_by_world_id(**asked) == []


async def test_one_of_many_cached_embeddings_is_the_own_one(
    make_db: MakeAdapter, theirs: Filled, raw: asyncpg.Connection[Any]
) -> None:
    """So many have about the length of the text that their vectors are read when it is known which are wanted."""
    other, db = await make_db(theirs.agent), await make_db(await neighbour_of(theirs.agent, raw))
    ids = [uuid4() for _ in range(257)]
    for each, vector in ((other, VECTOR), (db, OWN_VECTOR)):
        await each.create_memories(
            [Memory(id=id, content={"text": f"{n:03}"}, embedding=vector, unique=True) for n, id in enumerate(ids)],
            "facts",
        )
    found = await db.get_cached_embeddings(query_table_name="facts", query_threshold=0, query_input="123")
    await other.delete_memories(ids)
    assert [each["embedding"].tolist() for each in found] == [OWN_VECTOR.tolist()]


async def test_a_run_is_told_by_the_own_events(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    db = await make_db()
    other = await make_db(await neighbour_of(db.agent_id, raw))
    scene = await make_scene(db)
    await make_scene(other, scene)
    now, run = datetime.now(timezone.utc), str(uuid4())

    async def tell(adapter: DatabaseAdapter, run: str, status: str, seconds: int) -> None:
        own = adapter is db
        place: dict[str, Any] = {"entity_id": scene.entity if own else scene.other, "room_id": scene.room}
        body = {"runId": run, "status": status, "messageId": f"{own}", "metadata": {"own": own}}
        when = now + timedelta(seconds=seconds)
        await adapter.create_logs([Log(type="run_event", body=body, created_at=when, **place)])
        await adapter.create_logs(
            [Log(type=kind, body={"runId": run, "promptCount": 1}, **place) for kind in ("action", "evaluator")]
        )

    await tell(db, run, "started", 0)
    narrow: list[dict[str, Any]] = [{}, {"room_id": scene.room}, {"entity_id": scene.entity}]
    before = [await db.get_agent_run_summaries(**filters) for filters in narrow]
    await tell(other, run, "started", -1)
    await tell(other, run, "error", 1)
    assert [await db.get_agent_run_summaries(**filters) for filters in narrow] == before
    await tell(other, str(uuid4()), "started", 0)
    assert [await db.get_agent_run_summaries(**filters) for filters in narrow] == before


async def test_a_batch_is_of_the_own_rows(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    """Another agent's rows that come before them take none of the places in it."""
    db = await make_db(batch_size=1)
    other = await make_db(await neighbour_of(db.agent_id, raw))
    scene = await make_scene(db)
    await make_scene(other, scene)
    place: dict[str, Any] = {"entity_id": scene.entity, "room_id": scene.room}
    for each in (other, db):
        await each.create_memory(Memory(content={}, **place), "messages")
        await each.create_logs([Log(type="t", body={}, **place)])
        await each.set_cache("expired", None, ttl=1e-6)
    assert await db.sweep_cache(1) == 1
    assert await db.prune_logs(keep=0) == await db.prune_memories("messages", keep=0) == 1
    assert await other.sweep_cache() == await other.count_memories() == len(await other.get_logs()) == 1
