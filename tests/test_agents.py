"""Agents: create, find, change, merge settings, delete with everything that is theirs."""

from __future__ import annotations

import asyncio
import copy
import random
import re
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta, timezone
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elizasql import (
    Agent,
    ArgumentError,
    DatabaseAdapter,
    Memory,
    NotFoundError,
)
from elizasql._statements import SQL

from .conftest import MakeAdapter, make_scene
from .locking import overtaken
from .test_plans import indexes, plan_of, scans_a_table

LONG_AGO = datetime(1980, 1, 1, tzinfo=timezone.utc)
INJECTION = "'; DROP TABLE elizasql.agents; -- $1 %s :x \\"


async def found(db: DatabaseAdapter, id: UUID) -> Agent:
    agent = await db.get_agent(id)
    assert agent is not None
    return agent


# --- create ----------------------------------------------------------------------------------------------------------


async def test_create_gives_everything_back(db: DatabaseAdapter) -> None:
    given = Agent(
        id=uuid4(),
        name=INJECTION,
        username="ada",
        system="be kind",
        bio=["one", "two"],
        message_examples=[{"examples": []}],
        post_examples=["p"],
        topics=["t"],
        adjectives=["a"],
        knowledge=[{"path": "x"}],
        plugins=["@e/p"],
        settings={"secrets": {"KEY": "v"}, "n": None},
        style={"all": ["short"]},
        enabled=False,
        server_id=uuid4(),
        created_at=LONG_AGO,
        updated_at=LONG_AGO + timedelta(days=1),
    )
    before = copy.deepcopy(given)
    assert await db.create_agent(given) is True
    assert given == before
    assert given.id is not None
    assert await db.get_agent(str(given.id)) == given


async def test_create_fills_in_what_is_missing(db: DatabaseAdapter) -> None:
    (id,) = await db.create_agents([{"name": "only a name", "bio": "one line", "status": "active"}])
    agent = await found(db, id)
    assert (agent.bio, agent.settings, agent.style, agent.enabled) == (["one line"], {}, {}, True)
    assert (agent.username, agent.system, agent.server_id) == (None, None, None)
    assert agent.created_at is not None
    assert agent.created_at == agent.updated_at


async def test_create_leaves_an_agent_that_is_there(db: DatabaseAdapter) -> None:
    id = uuid4()
    assert await db.create_agent({"id": id, "name": "first"}) is True
    assert await db.create_agent({"id": id, "name": "second"}) is False
    assert (await found(db, id)).name == "first"


async def test_create_many_gives_ids_in_order(db: DatabaseAdapter) -> None:
    ids = [uuid4() for _ in range(5)]
    await db.create_agent({"id": ids[2], "name": "there already"})
    assert await db.create_agents([Agent(id=id, name="same name") for id in [*ids, ids[0]]]) == [*ids, ids[0]]
    assert [agent.id for agent in await db.get_agents_by_ids(ids)] == ids
    assert (await found(db, ids[2])).name == "there already"


async def test_create_of_a_bad_one_writes_none(db: DatabaseAdapter, round_trips: list[str]) -> None:
    id = uuid4()
    bad: Any
    for bad in ({"id": uuid4()}, {"name": 3}, {"name": "x", "settings": []}, {"name": "x", "nmae": "x"}, "agent"):
        with pytest.raises(ArgumentError, match="position 1"):
            await db.create_agents([{"id": id, "name": "good"}, bad])
    with pytest.raises(ArgumentError, match="collection"):
        await db.create_agents({"name": "x"})  # type: ignore[arg-type]
    assert round_trips == []
    assert await db.get_agent(id) is None


async def test_text_that_the_server_cannot_store(db: DatabaseAdapter) -> None:
    (id,) = await db.create_agents([{"name": "a\x00b", "settings": {"k\x00": "\ud800"}}])
    agent = await found(db, id)
    assert (agent.name, agent.settings) == ("a\ufffdb", {"k\ufffd": "\ufffd"})


# --- list and count --------------------------------------------------------------------------------------------------


async def test_list_has_a_total_order_and_pages(db: DatabaseAdapter) -> None:
    same = LONG_AGO + timedelta(microseconds=random.randrange(10**15))
    ids = await db.create_agents([{"name": "x", "created_at": same} for _ in range(7)])
    everything = [agent.id for agent in await db.get_agents()]
    assert [id for id in everything if id in ids] == sorted(ids)
    assert len(everything) == len(set(everything)) == await db.count_agents()
    pages = [
        agent.id for offset in range(0, len(everything), 3) for agent in await db.get_agents(limit=3, offset=offset)
    ]
    assert pages == everything
    assert await db.get_agents(limit=0) == []


async def test_list_gives_whole_agents(db: DatabaseAdapter) -> None:
    mine = next(agent for agent in await db.get_agents() if agent.id == db.agent_id)
    assert mine == await db.get_agent(db.agent_id)


async def test_count_counts(db: DatabaseAdapter) -> None:
    before = await db.count_agents()
    await db.create_agents([{"name": "x"}, {"name": "y"}])
    assert await db.count_agents() == before + 2


# --- update ----------------------------------------------------------------------------------------------------------


async def test_update_changes_only_what_is_given(db: DatabaseAdapter) -> None:
    id = uuid4()
    await db.create_agent(
        {"id": id, "name": "n", "username": "u", "system": "s", "bio": ["b"], "topics": ["t"], "created_at": LONG_AGO}
    )
    before = await found(db, id)
    assert await db.update_agent(id, {"bio": "new"}) is True
    after = await found(db, id)
    assert after.updated_at is not None
    assert before.updated_at is not None
    assert after.updated_at > before.updated_at
    before.bio, before.updated_at = ["new"], after.updated_at
    assert after == before
    assert await db.update_agent(id, Agent(name="m", enabled=False)) is True
    after = await found(db, id)
    assert (after.name, after.enabled, after.username, after.bio) == ("m", False, "u", ["new"])


async def test_update_with_none_clears(db: DatabaseAdapter) -> None:
    id = uuid4()
    await db.create_agent(
        Agent(id=id, name="n", username="u", system="s", server_id=id, bio=["b"], style={"a": 1}, knowledge=["k"])
    )
    fields = {"username": None, "system": None, "serverId": None, "bio": None, "style": None, "knowledge": None}
    assert await db.update_agent(id, fields)
    agent = await found(db, id)
    assert (agent.username, agent.system, agent.server_id) == (None, None, None)
    assert (agent.bio, agent.style, agent.knowledge, agent.name) == ([], {}, [], "n")
    for name in ("name", "settings", "enabled", "created_at"):
        with pytest.raises(ArgumentError, match=f"{name} cannot be None"):
            await db.update_agent(id, {name: None})


async def test_update_of_an_unknown_agent_is_false(db: DatabaseAdapter) -> None:
    id = uuid4()
    assert await db.update_agent(id, {"name": "x"}) is False
    assert await db.get_agent(id) is None


@pytest.mark.parametrize("written_back", [False, True])
async def test_every_update_touches_the_time(db: DatabaseAdapter, written_back: bool) -> None:
    """Also that of an agent as it was read, whose old time would let `cleanup_agents` delete it."""
    by_update, by_upsert = await db.create_agents([{"name": "n", "updated_at": LONG_AGO}] * 2)
    old = [await found(db, id) for id in (by_update, by_upsert)]
    assert [agent.updated_at for agent in old] == [LONG_AGO] * 2
    assert await db.update_agent(by_update, old[0] if written_back else {}) is True
    await db.upsert_agents([old[1] if written_back else {"id": by_upsert, "name": "n"}])
    for id in (by_update, by_upsert):
        assert (await found(db, id)).updated_at > LONG_AGO  # type: ignore[operator]


async def test_a_time_of_creation_that_comes_back_in_milliseconds_stays(db: DatabaseAdapter) -> None:
    exact = LONG_AGO + timedelta(microseconds=1234)
    (id,) = await db.create_agents([{"name": "n", "created_at": exact}])
    given = (await found(db, id)).to_dict()
    await db.update_agent(id, given)
    await db.upsert_agents([given])
    assert (await found(db, id)).created_at == exact


async def test_update_refuses_another_id_and_bad_values(db: DatabaseAdapter, round_trips: list[str]) -> None:
    for id, fields in (
        (db.agent_id, {"id": uuid4()}),
        ("", {}),
        (None, {}),
        (db.agent_id, {"settings": "x"}),
        (db.agent_id, {"createdAt": "yesterday"}),
        (db.agent_id, None),
    ):
        with pytest.raises(ArgumentError):
            await db.update_agent(id, fields)  # type: ignore[arg-type]
    assert round_trips == []


async def test_update_does_not_touch_the_embedding_dimension(make_db: MakeAdapter) -> None:
    db = await make_db()
    await db.update_agent(db.agent_id, {"name": "other"})
    await db.upsert_agents([{"id": db.agent_id, "name": "third"}])
    assert await db.get_embedding_dimension() == 384


async def test_update_many(db: DatabaseAdapter) -> None:
    ids = await db.create_agents([{"name": "x", "settings": {"keep": 1}} for _ in range(3)])
    changes: list[Any] = [
        {"agentId": ids[0], "agent": {"settings": {"new": 2}}},
        Agent(id=ids[1], name="y"),
        {"id": str(ids[2]), "username": "z"},
    ]
    before = copy.deepcopy(changes)
    await db.update_agents(changes)
    assert changes == before
    agents = await db.get_agents_by_ids(ids)
    assert [agent.settings for agent in agents] == [{"keep": 1, "new": 2}, {"keep": 1}, {"keep": 1}]
    assert [(agent.name, agent.username) for agent in agents] == [("x", None), ("y", None), ("x", "z")]


async def test_update_many_is_atomic_and_names_who_is_missing(make_db: MakeAdapter) -> None:
    db = await make_db(batch_size=2)
    ids = sorted(await db.create_agents([{"name": "x"} for _ in range(3)]))
    nobody = UUID(int=2**128 - 1)
    with pytest.raises(NotFoundError, match=str(nobody)):
        await db.update_agents([{"id": id, "name": "y"} for id in [*ids, nobody]])
    assert [agent.name for agent in await db.get_agents_by_ids(ids)] == ["x"] * 3
    with pytest.raises(ArgumentError, match=f"{ids[0]} is given twice"):
        await db.update_agents([{"id": ids[0], "settings": {"a": 1}}, {"id": ids[0], "settings": {"a": None}}])
    with pytest.raises(ArgumentError, match="position 1: id is missing"):
        await db.update_agents([{"id": ids[0]}, {"name": "y"}])


# --- settings --------------------------------------------------------------------------------------------------------


async def test_settings_are_merged(db: DatabaseAdapter) -> None:
    id = uuid4()
    await db.create_agent(
        {"id": id, "name": "n", "settings": {"secrets": {"A": 1, "B": 2}, "x": {"y": 1}, "l": [1, 2]}}
    )
    change = {"settings": {"secrets": {"A": None, "C": 3}, "x": {"y": None}, "l": [9], "e": {}}}
    before = copy.deepcopy(change)
    await db.update_agent(id, change)
    assert change == before
    assert (await found(db, id)).settings == {"secrets": {"B": 2, "C": 3}, "l": [9], "e": {}}


@pytest.mark.parametrize(
    ("target", "source", "merged"),
    [
        ({"a": 1}, {}, {"a": 1}),
        ({"a": {"b": 1}}, {"a": {}}, {"a": {"b": 1}}),
        ({"a": 1}, {"a": {}}, {"a": {}}),
        ({"a": 1}, {"a": None}, {}),
        ({"a": {"b": {"c": 1}}}, {"a": {"b": {"c": None}}}, {}),
        ({"a": {"b": {"c": 1}, "d": 1}}, {"a": {"b": {"c": None}}}, {"a": {"d": 1}}),
        ({}, {"a": {"b": None}}, {}),
        ({}, {"a": {"b": {}}}, {"a": {"b": {}}}),
        ({"a": [1, {"b": 1}]}, {"a": [{"b": None}]}, {"a": [{"b": None}]}),
        ({"a": "text"}, {"a": {"b": 1}}, {"a": {"b": 1}}),
        ({"a": {"b": 1}}, {"a": "text"}, {"a": "text"}),
        ({"": 1, "ü": 1}, {"": {"x": 1}}, {"": {"x": 1}, "ü": 1}),
    ],
)
async def test_settings_rule(db: DatabaseAdapter, target: Any, source: Any, merged: Any) -> None:
    id = uuid4()
    await db.create_agent({"id": id, "name": "n", "settings": target})
    await db.update_agent(id, {"settings": source})
    assert (await found(db, id)).settings == merged


def merge(target: Any, source: dict[str, Any]) -> dict[str, Any] | None:
    """Merge settings by ElizaOS's rule, as it is written down for its users."""
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in source.items():
        result = merge(merged.get(key), value) if isinstance(value, dict) else value
        if result is None:
            merged.pop(key, None)
        else:
            merged[key] = result
    return merged if merged or not source else None


KEYS = st.sampled_from(["a", "b", "c", "secrets", ""])
LEAVES: st.SearchStrategy[Any] = (
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["x", "y"]) | st.lists(st.none() | st.just({}))
)
SETTINGS = st.dictionaries(
    KEYS, st.recursive(LEAVES, lambda inner: st.dictionaries(KEYS, inner, max_size=3), max_leaves=12), max_size=4
)


@given(first=SETTINGS, changes=st.lists(SETTINGS, min_size=1, max_size=3))
@settings(max_examples=60)
async def test_settings_merge_is_the_model(db: DatabaseAdapter, first: Any, changes: list[Any]) -> None:
    id = uuid4()
    await db.create_agent({"id": id, "name": "n", "settings": first})
    wanted = first
    for change in changes:
        await db.update_agent(id, {"settings": change})
        wanted = merge(wanted, change) or {}
    assert (await found(db, id)).settings == wanted


async def test_many_settings_are_merged(db: DatabaseAdapter) -> None:
    """In a second; key by key, each one with a copy of all, it took minutes."""
    many = {f"{number}": {"value": number} for number in range(20_000)}
    id = uuid4()
    await db.create_agent({"id": id, "name": "n", "settings": many})
    await db.update_agent(id, {"settings": many | {"1": None, "2": 3}})
    assert (await found(db, id)).settings == {key: value for key, value in many.items() if key != "1"} | {"2": 3}


async def test_concurrent_merges_lose_nothing(make_db: MakeAdapter) -> None:
    first = await make_db()
    adapters = [first, *[await make_db(first.agent_id) for _ in range(3)]]

    async def write(number: int) -> None:
        db = adapters[number % len(adapters)]
        for turn in range(5):
            await db.update_agent(first.agent_id, {"settings": {"deep": {f"{number}": {f"{turn}": True}}}})

    await asyncio.gather(*(write(number) for number in range(8)))
    wanted = {str(number): {str(turn): True for turn in range(5)} for number in range(8)}
    assert (await found(first, first.agent_id)).settings == {"deep": wanted}


async def test_concurrent_batches_lose_nothing_and_do_not_lock_each_other_out(make_db: MakeAdapter) -> None:
    db = await make_db()
    other = await make_db()
    ids = await db.create_agents([{"name": "x"} for _ in range(8)])

    async def write(adapter: DatabaseAdapter, number: int) -> None:
        order = ids if number % 2 else ids[::-1]
        await adapter.update_agents([{"id": id, "settings": {f"{number}": 1}} for id in order])
        await adapter.upsert_agents([{"id": id, "name": "x", "settings": {f"u{number}": 1}} for id in order[::-1]])

    await asyncio.gather(*(write(adapter, number) for number in range(6) for adapter in (db, other)))
    wanted = {f"{kind}{number}": 1 for number in range(6) for kind in ("", "u")}
    assert [agent.settings for agent in await db.get_agents_by_ids(ids)] == [wanted] * 8


# --- upsert ----------------------------------------------------------------------------------------------------------


async def test_upsert_creates_and_changes_what_is_given(db: DatabaseAdapter) -> None:
    old, new = uuid4(), uuid4()
    await db.create_agent(
        {"id": old, "name": "n", "username": "u", "bio": ["b"], "settings": {"a": {"b": 1}}, "created_at": LONG_AGO}
    )
    ids = await db.upsert_agents(
        [
            {"id": new, "name": "new"},
            {"id": old, "name": "m", "settings": {"a": {"c": 1}}, "system": None},
            {"name": "x"},
        ]
    )
    assert ids[:2] == [new, old]
    agent = await found(db, old)
    assert (agent.name, agent.username, agent.bio, agent.created_at) == ("m", "u", ["b"], LONG_AGO)
    assert agent.settings == {"a": {"b": 1, "c": 1}}
    assert agent.updated_at is not None
    assert agent.updated_at > LONG_AGO
    assert [(await found(db, id)).name for id in ids] == ["new", "m", "x"]


async def test_upsert_refuses_before_anything_is_sent(db: DatabaseAdapter, round_trips: list[str]) -> None:
    for bad in ([{"id": uuid4()}], [{"id": db.agent_id, "name": "x"}] * 2, [{"name": "x", "enabled": None}]):
        with pytest.raises(ArgumentError):
            await db.upsert_agents(bad)
    assert round_trips == []


async def test_concurrent_upserts_make_one_agent(db: DatabaseAdapter) -> None:
    id = uuid4()
    await asyncio.gather(*(db.upsert_agents([{"id": id, "name": "n", "settings": {f"{i}": i}}]) for i in range(10)))
    assert (await found(db, id)).settings == {f"{i}": i for i in range(10)}


async def test_ids_that_the_server_gave_are_taken(db: DatabaseAdapter) -> None:
    """The driver's ids are of a class of its own."""
    agent = await found(db, db.agent_id)
    assert agent.id is not None
    assert await db.upsert_agents([{"id": agent.id, "name": "y"}]) == [db.agent_id]
    await db.update_agents([{"agentId": agent.id, "agent": {"username": "u"}}])
    assert (await found(db, agent.id)).username == "u"


async def test_concurrent_ensures_make_one_agent(make_db: MakeAdapter) -> None:
    db = await make_db()
    await db.delete_agent(db.agent_id)
    agents = await asyncio.gather(*(db.ensure_agent_exists({"id": None, "name": f"{i}"}) for i in range(10)))
    assert len({agent.name for agent in agents}) == 1
    assert agents[0].bio == ["An AI agent"]


async def test_an_agent_that_is_there_is_ensured_without_a_write_or_a_wait(
    db: DatabaseAdapter, raw: asyncpg.Connection[Any]
) -> None:
    """Every process does it at its start, also while a long transaction changes the agent or writes what is its own."""
    version = "SELECT xmin::text, ctid::text FROM elizasql.agents WHERE id = $1"
    before = await raw.fetchrow(version, db.agent_id)
    async with raw.transaction():
        await raw.execute("SELECT FROM elizasql.agents WHERE id = $1 FOR UPDATE", db.agent_id)
        assert (await db.ensure_agent_exists({"name": "another"}, timeout=20)).name == "test"
    assert await raw.fetchrow(version, db.agent_id) == before


async def test_an_agent_that_is_being_made_is_waited_for(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    db = await make_db()
    await db.delete_agent(db.agent_id)
    first = "INSERT INTO elizasql.agents (id, name) VALUES ($1, 'first')", db.agent_id
    ensured = await overtaken(raw, db.ensure_agent_exists({"name": "second"}), first, ("SELECT 1",))
    assert ensured == await db.get_agent(db.agent_id)
    assert ensured.name == "first"


# --- delete ----------------------------------------------------------------------------------------------------------


async def owned_tables(raw: asyncpg.Connection[Any]) -> list[str]:
    """Give every table that has rows of agents; partitions under their parents."""
    rows = await raw.fetch(
        """
        SELECT c.relname FROM pg_class AS c
        INNER JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attname = 'agent_id' AND NOT a.attisdropped
        WHERE c.relnamespace = 'elizasql'::regnamespace AND c.relkind IN ('r', 'p') AND NOT c.relispartition
        ORDER BY 1
        """
    )
    return [row[0] for row in rows]


async def test_delete_takes_everything_that_is_the_agents(make_db: MakeAdapter, raw: asyncpg.Connection[Any]) -> None:
    db, other = await make_db(), await make_db()
    for adapter in (db, other):
        scene = await make_scene(adapter)
        await adapter.create_component(
            {"entityId": scene.entity, "roomId": scene.room, "worldId": scene.world, "type": "t"}
        )
        await adapter.create_relationship({"sourceEntityId": scene.entity, "targetEntityId": scene.other})
        memory = await adapter.create_memory(
            Memory(room_id=scene.room, entity_id=scene.entity, content={}, embedding=np.ones(384, np.float32)), "m"
        )
        assert await adapter.update_memory({"id": memory, "content": {"new": 1}})
        await adapter.set_cache("key", 1)
        await adapter.create_task({"name": "task"})
        await adapter.create_goal({"name": "goal"})
        await adapter.log({"entityId": scene.entity, "roomId": scene.room, "type": "t", "body": {}})
        await adapter.create_pairing_request({"channel": "c", "senderId": "s", "code": "x"})
        await adapter.create_pairing_allowlist_entry({"channel": "c", "senderId": "s"})
        server = await adapter.create_message_server({"id": uuid4(), "name": "s", "sourceType": "t"})
        assert server.id is not None
        await adapter.add_agent_to_message_server(server.id, adapter.agent_id)
        move = "INSERT INTO elizasql.reembeddings (agent_id, source, target, skip_missing) VALUES ($1, 384, 768, FALSE)"
        await raw.execute(move, adapter.agent_id)
    tables = await owned_tables(raw)

    async def rows_of(agent: UUID) -> dict[str, int]:
        return {
            table: await raw.fetchval(f"SELECT count(*) FROM elizasql.{table} WHERE agent_id = $1", agent)
            for table in tables
        }

    before = await rows_of(db.agent_id)
    assert all(before.values()), before
    assert await db.delete_agent(db.agent_id) is True
    assert await db.delete_agent(db.agent_id) is False
    assert set((await rows_of(db.agent_id)).values()) == {0}
    assert await rows_of(other.agent_id) == before


async def test_every_table_of_an_agent_goes_with_it(raw: asyncpg.Connection[Any]) -> None:
    """By the schema, so that no table is forgotten: each reaches agents by foreign keys that cascade, or a trigger."""
    rows = await raw.fetch(
        """
        SELECT regexp_replace(c.conrelid::regclass::text, '^elizasql\\.', '') AS child,
            regexp_replace(c.confrelid::regclass::text, '^elizasql\\.', '') AS parent
        FROM pg_constraint AS c
        WHERE c.contype = 'f' AND c.confdeltype = 'c' AND c.connamespace = 'elizasql'::regnamespace
        """
    )

    def whole(table: str) -> str:
        return re.sub(r"_p\d\d$", "", table)

    reached = {"agents", "memory_rewrites"}  # the latter by agents_rewrites_forgotten
    while True:
        # The key of a partition counts for its parent: every partition has one.
        more = {whole(row["child"]) for row in rows if whole(row["parent"]) in reached} - reached
        if not more:
            break
        reached |= more
    tables = await owned_tables(raw)
    assert len(tables) >= 8
    assert [table for table in tables if table not in reached] == []


async def test_delete_many_gives_the_number(db: DatabaseAdapter) -> None:
    ids = await db.create_agents([{"name": "x"} for _ in range(3)])
    assert await db.delete_agents([ids[0], uuid4(), ids[1], ids[0]]) == 2
    assert [agent.id for agent in await db.get_agents_by_ids(ids)] == [ids[2]]


async def test_cleanup_deletes_what_is_old_and_never_its_own(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any]
) -> None:
    db = await make_db()
    old = await db.create_agents([{"name": "old", "updated_at": LONG_AGO} for _ in range(3)])
    (recent,) = await db.create_agents([{"name": "new", "updated_at": datetime.now(timezone.utc) - timedelta(days=90)}])
    await raw.execute("UPDATE elizasql.agents SET updated_at = $2 WHERE id = $1", db.agent_id, LONG_AGO)
    deleted = await db.cleanup_agents(timedelta(days=365 * 20))
    # Agents of other tests may be as old.
    assert deleted >= 3
    assert [agent.id for agent in await db.get_agents_by_ids([*old, recent, db.agent_id])] == [recent, db.agent_id]
    assert await db.cleanup_agents(timedelta(days=365 * 20)) == 0
    assert await db.cleanup_agents(timedelta.max) == 0


async def test_cleanup_needs_an_age(db: DatabaseAdapter, round_trips: list[str]) -> None:
    with pytest.raises(TypeError):
        await db.cleanup_agents()  # type: ignore[call-arg]
    for bad in (None, timedelta(0), timedelta(days=-1), 30, "30 days"):
        with pytest.raises(ArgumentError, match="positive timedelta"):
            await db.cleanup_agents(bad)  # type: ignore[arg-type]
    assert round_trips == []


# --- round trips and plans -------------------------------------------------------------------------------------------

CALLS: dict[str, Callable[[DatabaseAdapter], Awaitable[Any]]] = {
    "get_agent": lambda db: db.get_agent(db.agent_id),
    "get_agents": lambda db: db.get_agents(3, 1),
    "get_agents_by_ids": lambda db: db.get_agents_by_ids([db.agent_id, uuid4()]),
    "count_agents": lambda db: db.count_agents(),
    "create_agent": lambda db: db.create_agent({"name": "x"}),
    "create_agents": lambda db: db.create_agents([{"name": "x"}] * 3),
    "ensure_agent_exists": lambda db: db.ensure_agent_exists(),
    "update_agent": lambda db: db.update_agent(db.agent_id, {"settings": {"a": 1}}),
    "update_agents": lambda db: db.update_agents([{"id": db.agent_id, "name": "x"}]),
    "upsert_agents": lambda db: db.upsert_agents([{"name": "x"}] * 3),
    "delete_agent": lambda db: db.delete_agent(uuid4()),
    "delete_agents": lambda db: db.delete_agents([uuid4(), uuid4()]),
    "cleanup_agents": lambda db: db.cleanup_agents(timedelta(days=36500)),
}


@pytest.mark.parametrize("name", CALLS)
async def test_one_round_trip(db: DatabaseAdapter, round_trips: list[str], name: str) -> None:
    await CALLS[name](db)
    assert len(round_trips) == 1, round_trips


async def test_no_round_trip_for_nothing(db: DatabaseAdapter, round_trips: list[str]) -> None:
    assert await db.get_agents_by_ids([]) == []
    assert await db.create_agents([]) == []
    assert await db.upsert_agents([]) == []
    await db.update_agents([])
    assert await db.delete_agents([]) == 0
    assert round_trips == []


# Both begin with the id.
BY_ID = ("agents_pkey", "agents_embedding_dimension_key")


@pytest.mark.parametrize(
    ("name", "params", "index"),
    [
        ("get_agents_by_ids", {"ids": [uuid4()]}, BY_ID),
        ("get_agents", {"count": 10, "skipped": 5}, ("agents_created_at_idx",)),
        ("count_agents", {}, ("agents_",)),
        ("update_agents", {"agents": f'[{{"id": "{uuid4()}", "name": "x"}}]', "required": False}, BY_ID),
        ("delete_agents", {"ids": [uuid4()]}, BY_ID),
        ("cleanup_agents", {"agent_id": uuid4(), "older_than": "3000 years"}, ("agents_updated_at_idx",)),
    ],
)
async def test_plans(
    session: asyncpg.Connection[Any],
    db: DatabaseAdapter,
    name: str,
    params: dict[str, Any],
    index: tuple[str, ...],
) -> None:
    nodes = await plan_of(session, SQL[name], params, execute=True)
    assert any(used.startswith(index) for used in indexes(nodes)), nodes
    assert not scans_a_table(nodes)
