"""The adapter against a plain in-memory model of it: random calls on all stores, two agents in turn, no difference.

Messaging is the one store that both agents share.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from datetime import datetime, timedelta, timezone
from typing import Any
from uuid import UUID, uuid4

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

import elizasql.sync
from elizasql import (
    ChannelMessage,
    Component,
    DataError,
    Entity,
    ForeignKeyError,
    Goal,
    Log,
    Memory,
    NotFoundError,
    Relationship,
    Room,
    Task,
    UniqueViolationError,
    World,
)

# Small pools, the same for both agents: ids collide within an agent and across.
IDS = {
    kind: [UUID(int=1000 * n + i) for i in range(5 if kind == "memory" else 3)]
    for n, kind in enumerate(("world", "room", "entity", "memory", "task", "goal", "log", "request", "entry"), 1)
}
T0 = datetime(2026, 1, 1, tzinfo=timezone.utc)

agents = st.sampled_from((0, 1))
texts = st.sampled_from(("a", "b", "O'Hara; --", "π", ""))
tags = st.lists(st.sampled_from(("x", "y", "queue")), unique=True, max_size=3)
objects = st.dictionaries(st.sampled_from(("k", "l")), st.sampled_from((1, None, "v", [1], {"m": 2})), max_size=2)
times = st.integers(0, 5).map(lambda second: T0 + timedelta(seconds=second))
# Few directions, one of them in two lengths: what is equally similar, too.
VECTORS = np.zeros((5, 384), np.float32)
VECTORS[:, :2] = ((1, 0), (3, 0), (1, 1), (0, 1), (-1, 0.5))
vectors = st.sampled_from(range(len(VECTORS)))
log_types = st.sampled_from(("action", "run_event"))
ENDINGS = ("completed", "error")
# Of what is shared, and so not by the same id in every run.
places = st.integers(0, 2)
users = st.sampled_from([UUID(int=100 + i) for i in range(3)])


def ids(kind: str) -> st.SearchStrategy[UUID]:
    return st.sampled_from(IDS[kind])


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


class Stores:
    """What one agent has: dictionaries by id."""

    def __init__(self) -> None:
        self.worlds: dict[UUID, Any] = {}
        self.rooms: dict[UUID, Any] = {}
        self.entities: dict[UUID, Any] = {}
        self.members: dict[tuple[UUID, UUID], str | None] = {}
        self.memories: dict[UUID, Any] = {}
        self.components: dict[tuple[Any, ...], Any] = {}
        self.relationships: dict[tuple[UUID, UUID], Any] = {}
        self.cache: dict[str, Any] = {}
        self.tasks: dict[UUID, Any] = {}
        self.goals: dict[UUID, Any] = {}
        self.logs: dict[UUID, Any] = {}
        self.settings: dict[str, Any] = {}
        self.claimed: dict[UUID, Task] = {}
        self.requests: dict[UUID, Any] = {}
        self.entries: dict[UUID, Any] = {}

    def has(self, **references: UUID | None) -> bool:
        """Tell whether everything that is referred to is there."""
        tables = {"room_id": self.rooms, "entity_id": self.entities, "world_id": self.worlds, "other_id": self.entities}
        return all(id is None or id in tables[name] for name, id in references.items())

    def forget(self, gone: Callable[[Any], bool]) -> None:
        """Drop what a deleted room or entity takes along; `gone` tells of a row whether it does."""
        for table in (self.memories, self.components, self.goals, self.logs):
            for key in [key for key, row in table.items() if gone(row)]:  # type: ignore[attr-defined]
                del table[key]  # type: ignore[attr-defined]


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Merge settings by the rule that flat ones need: null deletes, everything else replaces."""
    return {key: value for key, value in {**old, **new}.items() if value is not None}


class AdapterMachine(RuleBasedStateMachine):
    """Calls a real adapter and a model, and compares what both say."""

    dsn: str
    in_the_process: list[int]  # how many searches were answered there, of each machine

    def __init__(self) -> None:
        super().__init__()
        self.dbs = []
        settings: dict[str, Any] = {"dsn": self.dsn, "indexing": "manual", "pool_max_size": 2, "pool_min_size": 0}
        for resident in ("off", "required"):
            db = elizasql.sync.open(agent_id=uuid4(), resident=resident, **settings)
            db.ensure_agent_exists({"name": "agent"})
            db.ensure_embedding_dimension(VECTORS.shape[1])
            self.dbs.append(db)
        self.stores = [Stores(), Stores()]
        self.server = self.dbs[0].create_message_server({"name": "s", "sourceType": "test"}).id
        self.channel_ids, self.message_ids = ([uuid4() for _ in range(3)] for _ in range(2))
        self.channels: dict[UUID, Any] = {}
        self.messages: dict[UUID, Any] = {}
        self.steps = 0

    def teardown(self) -> None:
        self.in_the_process.append(self.dbs[1].stats()["resident"]["hits"])
        for channel in self.dbs[0].get_channels_for_message_server(self.server):
            self.dbs[0].delete_channel(channel.id)
        for db in self.dbs:
            db.delete_agent(db.agent_id)
            db.close()

    def refused_unless(self, possible: bool, call: Callable[[], Any]) -> bool:
        """Make a call that must fail on a broken reference unless it is possible."""
        if not possible:
            with pytest.raises(ForeignKeyError):
                call()
        else:
            call()
        return possible

    @initialize(
        rows=st.lists(
            st.tuples(
                ids("memory"), *(maybe(ids(kind)) for kind in ("room", "entity", "world")), st.booleans(), vectors
            ),
            max_size=8,
        )
    )
    def begin(self, rows: list[Any]) -> None:
        """Begin with nothing, or with a place for everything and memories that can be found: few steps make some."""
        for agent in (0, 1) if rows else ():
            for number in range(3):
                self.create_world(agent, IDS["world"][number], "a")
                self.create_room(agent, IDS["room"][number], None, "a")
                self.create_entity(agent, IDS["entity"][number], ["a"], {})
            for id, room, entity, world, unique, vector in rows:
                self.store_memory(agent, id, room, entity, world, "a", {}, T0, unique, vector, upsert=True)

    # --- worlds, rooms, entities, participants ---

    @rule(agent=agents, id=ids("world"), name=texts)
    def create_world(self, agent: int, id: UUID, name: str) -> None:
        assert self.dbs[agent].create_world(World(id=id, name=name)) == id
        self.stores[agent].worlds.setdefault(id, {"name": name})

    @rule(agent=agents, id=ids("world"), name=texts)
    def update_world(self, agent: int, id: UUID, name: str) -> None:
        there = id in self.stores[agent].worlds
        assert self.dbs[agent].update_world({"id": id, "name": name}) is there
        if there:
            self.stores[agent].worlds[id]["name"] = name

    @rule(agent=agents, id=ids("world"))
    def remove_world(self, agent: int, id: UUID) -> None:
        store = self.stores[agent]
        assert self.dbs[agent].remove_world(id) is (store.worlds.pop(id, None) is not None)
        for table in (store.rooms, store.memories):
            for row in table.values():
                if row["world_id"] == id:
                    row["world_id"] = None
        for key in [key for key, row in store.components.items() if row["world_id"] == id]:
            del store.components[key]

    @rule(agent=agents, id=ids("room"), world=maybe(ids("world")), name=maybe(texts))
    def create_room(self, agent: int, id: UUID, world: UUID | None, name: str | None) -> None:
        store = self.stores[agent]
        room = Room(id=id, source="s", type="DM", world_id=world, name=name)
        # A row that is there already is not looked at any further.
        possible = id in store.rooms or store.has(world_id=world)
        if self.refused_unless(possible, lambda: self.dbs[agent].create_rooms([room])):
            store.rooms.setdefault(id, {"world_id": world, "name": name})

    @rule(agent=agents, id=ids("room"), name=maybe(texts))
    def update_room(self, agent: int, id: UUID, name: str | None) -> None:
        there = id in self.stores[agent].rooms
        assert self.dbs[agent].update_room({"id": id, "name": name}) is there
        if there:
            self.stores[agent].rooms[id]["name"] = name

    @rule(agent=agents, id=ids("room"), world=maybe(ids("world")), name=maybe(texts))
    def upsert_room(self, agent: int, id: UUID, world: UUID | None, name: str | None) -> None:
        store = self.stores[agent]
        room = Room(id=id, source="s", type="DM", world_id=world, name=name)
        if self.refused_unless(store.has(world_id=world), lambda: self.dbs[agent].upsert_rooms([room])):
            # What a model leaves out is not given, and stays.
            given = {name: value for name, value in (("world_id", world), ("name", name)) if value is not None}
            store.rooms[id] = {"world_id": None, "name": None} | store.rooms.get(id, {}) | given

    @rule(agent=agents, world=ids("world"))
    def delete_rooms_of_a_world(self, agent: int, world: UUID) -> None:
        store = self.stores[agent]
        doomed = {id for id, row in store.rooms.items() if row["world_id"] == world}
        assert self.dbs[agent].delete_rooms_by_world_id(world) == len(doomed)
        store.rooms = {id: row for id, row in store.rooms.items() if id not in doomed}
        store.members = {key: state for key, state in store.members.items() if key[1] not in doomed}
        store.forget(lambda row: row["room_id"] in doomed)

    @rule(agent=agents, id=ids("room"))
    def delete_room(self, agent: int, id: UUID) -> None:
        store = self.stores[agent]
        assert self.dbs[agent].delete_room(id) is (store.rooms.pop(id, None) is not None)
        store.members = {key: state for key, state in store.members.items() if key[1] != id}
        store.forget(lambda row: row["room_id"] == id)

    @rule(agent=agents, id=ids("entity"), names=st.lists(texts, max_size=2), metadata=objects)
    def create_entity(self, agent: int, id: UUID, names: list[str], metadata: dict[str, Any]) -> None:
        assert self.dbs[agent].create_entities([Entity(id=id, names=names, metadata=metadata)]) == [id]
        self.stores[agent].entities.setdefault(id, {"names": names, "metadata": metadata})

    @rule(agent=agents, id=ids("entity"), names=maybe(st.lists(texts, max_size=2)), metadata=maybe(objects))
    def update_entity(self, agent: int, id: UUID, names: list[str] | None, metadata: dict[str, Any] | None) -> None:
        store = self.stores[agent]
        change = {k: v for k, v in {"names": names, "metadata": metadata}.items() if v is not None}
        assert self.dbs[agent].update_entity({"id": id, **change}) is (id in store.entities)
        if id in store.entities:
            store.entities[id] |= deepcopy(change)

    @rule(agent=agents, id=ids("entity"))
    def delete_entity(self, agent: int, id: UUID) -> None:
        store = self.stores[agent]
        assert self.dbs[agent].delete_entity(id) is (store.entities.pop(id, None) is not None)
        store.members = {key: state for key, state in store.members.items() if key[0] != id}
        store.relationships = {key: row for key, row in store.relationships.items() if id not in key}
        store.forget(lambda row: row["entity_id"] == id)

    @rule(agent=agents, entity=ids("entity"), room=ids("room"))
    def add_participant(self, agent: int, entity: UUID, room: UUID) -> None:
        store = self.stores[agent]
        possible = store.has(entity_id=entity, room_id=room)
        if self.refused_unless(possible, lambda: self.dbs[agent].add_participant(entity, room)):
            store.members.setdefault((entity, room), None)

    @rule(agent=agents, entity=ids("entity"), room=ids("room"))
    def remove_participant(self, agent: int, entity: UUID, room: UUID) -> None:
        store = self.stores[agent]
        there = (entity, room) in store.members
        assert self.dbs[agent].remove_participant(entity, room) is there
        store.members.pop((entity, room), None)

    @rule(agent=agents, entity=ids("entity"), room=ids("room"), state=st.sampled_from(("MUTED", "FOLLOWED", None)))
    def set_state(self, agent: int, entity: UUID, room: UUID, state: str | None) -> None:
        store = self.stores[agent]
        if (entity, room) in store.members:
            self.dbs[agent].set_participant_user_state(room, entity, state)
            store.members[entity, room] = state
        else:
            with pytest.raises(NotFoundError):
                self.dbs[agent].set_participant_user_state(room, entity, state)

    # --- memories ---

    @rule(
        agent=agents,
        id=ids("memory"),
        room=maybe(ids("room")),
        entity=maybe(ids("entity")),
        world=maybe(ids("world")),
        text=texts,
        metadata=objects,
        time=times,
        unique=st.booleans(),
        vector=maybe(vectors),
        upsert=st.booleans(),
    )
    def store_memory(
        self,
        agent: int,
        id: UUID,
        room: UUID | None,
        entity: UUID | None,
        world: UUID | None,
        text: str,
        metadata: dict[str, Any],
        time: datetime,
        unique: bool,
        vector: int | None,
        upsert: bool,
    ) -> None:
        store, db = self.stores[agent], self.dbs[agent]
        row = {"room_id": room, "entity_id": entity, "world_id": world, "created_at": time}
        row |= {"content": {"text": text}, "metadata": metadata, "unique": unique}
        possible = id in store.memories or store.has(room_id=room, entity_id=entity, world_id=world)
        memory = Memory(id=id, **deepcopy(row), embedding=None if vector is None else VECTORS[vector])
        call = db.upsert_memories if upsert else db.create_memories
        if self.refused_unless(possible, lambda: call([memory], "messages")):
            if id not in store.memories:
                store.memories[id] = row | {"vector": vector}
            elif upsert:
                store.memories[id] |= {name: row[name] for name in ("content", "metadata", "unique")}
                if vector is not None:
                    store.memories[id]["vector"] = vector

    @rule(agent=agents, id=ids("memory"), text=texts, room=maybe(ids("room")), vector=maybe(vectors))
    def update_memory(self, agent: int, id: UUID, text: str, room: UUID | None, vector: int | None) -> None:
        store, db = self.stores[agent], self.dbs[agent]
        change = {"id": id, "content": {"text": text}, "roomId": room}
        change["embedding"] = None if vector is None else VECTORS[vector]
        if id not in store.memories:
            assert db.update_memory(change) is False
        elif self.refused_unless(store.has(room_id=room), lambda: db.update_memory(change)):
            store.memories[id]["content"] = {"text": text}
            if room is not None:
                store.memories[id]["room_id"] = room
            if vector is not None:
                store.memories[id]["vector"] = vector

    @rule(agent=agents, id=ids("memory"))
    def delete_memory(self, agent: int, id: UUID) -> None:
        there = self.stores[agent].memories.pop(id, None) is not None
        assert self.dbs[agent].delete_memory(id) is there

    @rule(agent=agents, room=maybe(ids("room")), keep=st.integers(0, 2), end=maybe(times))
    def prune_memories(self, agent: int, room: UUID | None, keep: int, end: datetime | None) -> None:
        store = self.stores[agent]
        times = {id: row["created_at"] for id, row in store.memories.items() if room in (None, row["room_id"])}
        newest = sorted(times, key=lambda id: (times[id], id), reverse=True)
        gone = [id for id in newest[keep:] if end is None or times[id] < end]
        assert self.dbs[agent].prune_memories("messages", end, keep, room_id=room) == len(gone)
        for id in gone:
            del store.memories[id]

    @rule(
        agent=agents,
        room=maybe(ids("room")),
        entity=maybe(ids("entity")),
        start=maybe(times),
        unique=st.booleans(),
        metadata=maybe(objects),
    )
    def get_memories(
        self,
        agent: int,
        room: UUID | None,
        entity: UUID | None,
        start: datetime | None,
        unique: bool,
        metadata: dict[str, Any] | None,
    ) -> None:
        db = self.dbs[agent]
        filters = {"room_id": room, "entity_id": entity, "start": start, "unique": unique, "metadata": metadata}
        wanted = [
            (row["created_at"], id)
            for id, row in self.stores[agent].memories.items()
            if (room is None or row["room_id"] == room)
            and (entity is None or row["entity_id"] == entity)
            and (start is None or row["created_at"] >= start)
            and (not unique or row["unique"])
            and (metadata is None or contains(row["metadata"], metadata))
        ]
        found = db.get_memories(table_name="messages", **filters)
        assert [(m.created_at, m.id) for m in found] == sorted(wanted, reverse=True)
        assert db.count_memories(table_name="messages", **filters) == len(wanted)

    @rule(agent=agents)
    def index_memories(self, agent: int) -> None:
        self.dbs[agent].index_memories()

    @rule(
        agent=agents,
        vector=vectors,
        room=maybe(ids("room")),
        entity=maybe(ids("entity")),
        world=maybe(ids("world")),
        unique=st.booleans(),
        count=st.integers(0, 3),
        threshold=maybe(st.sampled_from((-0.5, 0.3, 0.9))),
    )
    def search_memories(
        self,
        agent: int,
        vector: int,
        room: UUID | None,
        entity: UUID | None,
        world: UUID | None,
        unique: bool,
        count: int,
        threshold: float | None,
    ) -> None:
        scope = {"room_id": room, "entity_id": entity, "world_id": world}
        self.search_agrees(agent, vector, scope, unique, count, threshold)

    def search_agrees(
        self,
        agent: int,
        vector: int,
        scope: dict[str, UUID | None],
        unique: bool = False,
        count: int = 3,
        threshold: float | None = None,
    ) -> None:
        exact = VECTORS.astype(np.float64)
        exact /= np.linalg.norm(exact, axis=1, keepdims=True)
        to_each = (exact @ exact[vector]).round(5).tolist()
        similar = {
            id: to_each[row["vector"]]
            for id, row in self.stores[agent].memories.items()
            if row["vector"] is not None
            and (row["unique"] or not unique)
            and all(wanted in (None, row[name]) for name, wanted in scope.items())
        }
        best = sorted(similar.values(), reverse=True)[:count]
        found = self.dbs[agent].search_memories(
            embedding=VECTORS[vector],
            table_name="messages",
            unique=unique,
            count=count,
            match_threshold=threshold,
            **scope,
        )
        # Of those that are equally similar any one may be the last.
        similarities = [round(memory.similarity or 0, 5) for memory in found]
        assert similarities == [each for each in best if threshold is None or each >= threshold]
        assert [similar[memory.id] for memory in found] == similarities
        assert len({memory.id for memory in found}) == len(found)

    # --- components, relationships ---

    @rule(
        agent=agents,
        entity=ids("entity"),
        room=ids("room"),
        world=maybe(ids("world")),
        kind=st.sampled_from(("p", "q")),
        data=objects,
    )
    def upsert_component(
        self, agent: int, entity: UUID, room: UUID, world: UUID | None, kind: str, data: dict[str, Any]
    ) -> None:
        store = self.stores[agent]
        row = {"entity_id": entity, "room_id": room, "world_id": world, "data": data}
        possible = store.has(entity_id=entity, room_id=room, world_id=world)
        component = Component(type=kind, **deepcopy(row))
        if self.refused_unless(possible, lambda: self.dbs[agent].upsert_components([component])):
            store.components[entity, kind, world] = row

    @rule(
        agent=agents,
        entity=ids("entity"),
        kind=st.sampled_from(("p", "q")),
        world=maybe(ids("world")),
        key=st.sampled_from(("k", "l")),
        op=st.sampled_from(("set", "remove", "push", "increment")),
    )
    def patch_component(self, agent: int, entity: UUID, kind: str, world: UUID | None, key: str, op: str) -> None:
        store, db = self.stores[agent], self.dbs[agent]
        [found] = db.get_components_by_natural_keys([{"entityId": entity, "type": kind, "worldId": world}])
        row = store.components.get((entity, kind, world))
        assert (found is None) is (row is None)
        if found is None or row is None:
            return
        data, ops = deepcopy(row["data"]), [{"op": "set", "path": "done", "value": [2]}, {"op": op, "path": key}]
        if op != "remove":
            ops[1]["value"] = 2
        possible = op in ("set", "remove") or type(data.get(key)) is {"push": list, "increment": int}[op]
        if not possible:
            with pytest.raises(DataError):
                db.patch_component(found.id, ops)
            return
        db.patch_component(found.id, ops)
        data["done"] = [2]
        if op == "remove":
            data.pop(key, None)
        elif op == "set":
            data[key] = 2
        else:
            data[key] += [2] if op == "push" else 2
        row["data"] = data

    @rule(agent=agents, entity=ids("entity"), kind=st.sampled_from(("p", "q")), world=maybe(ids("world")))
    def delete_component(self, agent: int, entity: UUID, kind: str, world: UUID | None) -> None:
        db, key = self.dbs[agent], {"entityId": entity, "type": kind, "worldId": world}
        found = [component.id for component in db.get_components_by_natural_keys([key]) if component is not None]
        gone = self.stores[agent].components.pop((entity, kind, world), None)
        assert db.delete_components(found) == len(found) == (gone is not None)

    @rule(agent=agents, kind=maybe(st.sampled_from(("p", "q"))), world=maybe(ids("world")), data=maybe(objects))
    def query_entities(self, agent: int, kind: str | None, world: UUID | None, data: dict[str, Any] | None) -> None:
        store = self.stores[agent]
        filtered = kind is not None or world is not None or data is not None
        wanted = {
            row["entity_id"]
            for (_, its, _), row in store.components.items()
            if (kind is None or its == kind)
            and (world is None or row["world_id"] == world)
            and (data is None or contains(row["data"], data))
        }
        found = self.dbs[agent].query_entities(
            component_type=kind, world_id=world, component_data_filter=data, limit=10
        )
        assert [entity.id for entity in found] == sorted(wanted if filtered else store.entities)

    @rule(agent=agents, source=ids("entity"), other=ids("entity"), tags=maybe(tags))
    def change_relationship(self, agent: int, source: UUID, other: UUID, tags: list[str] | None) -> None:
        """Give it other tags, or end it."""
        store, db = self.stores[agent], self.dbs[agent]
        found = db.get_relationship(source, other)
        assert (found is not None) is ((source, other) in store.relationships)
        if found is None or found.id is None:
            return
        assert found.tags == store.relationships[source, other]["tags"]
        if tags is None:
            assert db.delete_relationship(found.id) is True
            del store.relationships[source, other]
        else:
            assert db.update_relationship({"id": found.id, "tags": tags}) is True
            store.relationships[source, other] = {"tags": tags}

    @rule(agent=agents, source=ids("entity"), other=ids("entity"), tags=tags)
    def create_relationship(self, agent: int, source: UUID, other: UUID, tags: list[str]) -> None:
        store = self.stores[agent]
        relationship = Relationship(source_entity_id=source, target_entity_id=other, tags=tags)
        if (source, other) in store.relationships:
            assert self.dbs[agent].create_relationship(relationship) is False
        elif self.refused_unless(
            store.has(entity_id=source, other_id=other), lambda: self.dbs[agent].create_relationship(relationship)
        ):
            store.relationships[source, other] = {"tags": tags}

    @rule(agent=agents, entity=ids("entity"), tags=maybe(tags.filter(bool)))
    def get_relationships(self, agent: int, entity: UUID, tags: list[str] | None) -> None:
        wanted = {
            pair
            for pair, row in self.stores[agent].relationships.items()
            if entity in pair and (tags is None or set(tags) & set(row["tags"]))
        }
        found = self.dbs[agent].get_relationships(entity_id=entity, tags=tags)
        assert len(found) == len(wanted)
        assert {(r.source_entity_id, r.target_entity_id) for r in found} == wanted

    # --- cache, tasks, goals, logs, settings ---

    @rule(agent=agents, key=texts, value=st.sampled_from((None, 0, "", {"a": [1]}, False)))
    def set_cache(self, agent: int, key: str, value: Any) -> None:
        assert self.dbs[agent].set_cache(key, value) is True
        self.stores[agent].cache[key] = value

    @rule(agent=agents, key=texts)
    def delete_cache(self, agent: int, key: str) -> None:
        self.dbs[agent].delete_cache(key)
        self.stores[agent].cache.pop(key, None)

    @rule(agent=agents, key=texts, expected=st.sampled_from((None, 0, "")), value=st.sampled_from((1, "new")))
    def compare_and_set_cache(self, agent: int, key: str, expected: Any, value: Any) -> None:
        cache = self.stores[agent].cache
        same = key in cache and cache[key] == expected and type(cache[key]) is type(expected)
        assert self.dbs[agent].compare_and_set_cache(key, expected, value) is same
        if same:
            cache[key] = value

    @rule(agent=agents, id=ids("task"), name=texts.filter(bool), tags=tags, room=maybe(ids("room")))
    def create_task(self, agent: int, id: UUID, name: str, tags: list[str], room: UUID | None) -> None:
        assert self.dbs[agent].create_task(Task(id=id, name=name, tags=tags, room_id=room)) == id
        self.stores[agent].tasks.setdefault(id, {"name": name, "tags": tags, "room_id": room})

    @rule(agent=agents, id=ids("task"), tags=tags)
    def update_task(self, agent: int, id: UUID, tags: list[str]) -> None:
        tasks = self.stores[agent].tasks
        assert self.dbs[agent].update_task(id, {"tags": tags}) is (id in tasks)
        if id in tasks:
            tasks[id]["tags"] = tags

    @rule(agent=agents, limit=st.integers(1, 3))
    def claim_tasks(self, agent: int, limit: int) -> None:
        store = self.stores[agent]
        ready = {id for id, row in store.tasks.items() if "queue" in row["tags"] and id not in store.claimed}
        taken = {task.id: task for task in self.dbs[agent].claim_tasks(limit, lease=timedelta(days=1))}
        assert taken.keys() <= ready
        assert len(taken) == min(limit, len(ready))
        store.claimed |= taken

    @rule(agent=agents, theirs=st.booleans(), done=st.booleans())
    def end_a_claim(self, agent: int, theirs: bool, done: bool) -> None:
        """Complete a task or give it back; the claim of the other agent's is none of this one's."""
        store, db = self.stores[agent], self.dbs[agent]
        claimed = self.stores[agent ^ theirs].claimed
        if not claimed:
            return
        id, task = next(iter(claimed.items()))
        call = db.complete_task if done else db.release_task
        claim = {"id": id, "claimToken": task.claim_token}
        assert call(claim) is not theirs
        if not theirs:
            del store.claimed[id]
            if done:
                del store.tasks[id]

    @rule(agent=agents, id=ids("task"))
    def delete_task(self, agent: int, id: UUID) -> None:
        self.stores[agent].claimed.pop(id, None)
        assert self.dbs[agent].delete_task(id) is (self.stores[agent].tasks.pop(id, None) is not None)

    @rule(agent=agents, tags=tags, room=maybe(ids("room")))
    def get_tasks(self, agent: int, tags: list[str], room: UUID | None) -> None:
        wanted = {
            id
            for id, row in self.stores[agent].tasks.items()
            if set(tags) <= set(row["tags"]) and (room is None or row["room_id"] == room)
        }
        assert {task.id for task in self.dbs[agent].get_tasks(tags=tags, room_id=room)} == wanted

    @rule(agent=agents, id=ids("goal"), room=maybe(ids("room")), entity=maybe(ids("entity")))
    def create_goal(self, agent: int, id: UUID, room: UUID | None, entity: UUID | None) -> None:
        store = self.stores[agent]
        possible = id in store.goals or store.has(room_id=room, entity_id=entity)
        goal = Goal(id=id, name="g", room_id=room, entity_id=entity, objectives=[])
        if self.refused_unless(possible, lambda: self.dbs[agent].create_goal(goal)):
            store.goals.setdefault(id, {"room_id": room, "entity_id": entity, "status": "IN_PROGRESS"})

    @rule(agent=agents, id=ids("goal"), status=st.sampled_from(("IN_PROGRESS", "DONE", "FAILED")))
    def update_goal_status(self, agent: int, id: UUID, status: str) -> None:
        goals = self.stores[agent].goals
        assert self.dbs[agent].update_goal_status(id, status) is (id in goals)
        if id in goals:
            goals[id]["status"] = status

    @rule(agent=agents, room=maybe(ids("room")), entity=maybe(ids("entity")), only=st.booleans())
    def get_goals(self, agent: int, room: UUID | None, entity: UUID | None, only: bool) -> None:
        wanted = {
            id
            for id, row in self.stores[agent].goals.items()
            if (room is None or row["room_id"] == room)
            and (entity is None or row["entity_id"] == entity)
            and (not only or row["status"] == "IN_PROGRESS")
        }
        found = self.dbs[agent].get_goals(room_id=room, entity_id=entity, only_in_progress=only)
        assert {goal.id for goal in found} == wanted

    @rule(
        agent=agents,
        id=ids("log"),
        room=ids("room"),
        entity=ids("entity"),
        kind=log_types,
        status=st.sampled_from(("started", "completed", "error", "?")),
        run=st.sampled_from(("one", "two")),
        time=times,
    )
    def create_log(
        self, agent: int, id: UUID, room: UUID, entity: UUID, kind: str, status: str, run: str, time: datetime
    ) -> None:
        store = self.stores[agent]
        row = {"room_id": room, "entity_id": entity, "type": kind, "created_at": time}
        row["body"] = {"runId": run, "status": status}
        possible = id in store.logs or store.has(room_id=room, entity_id=entity)
        if self.refused_unless(possible, lambda: self.dbs[agent].create_logs([Log(id=id, **deepcopy(row))])):
            store.logs.setdefault(id, row)

    @rule(agent=agents, entity=maybe(ids("entity")), status=maybe(st.sampled_from(("started", "completed", "error"))))
    def get_runs(self, agent: int, entity: UUID | None, status: Any) -> None:
        wanted = {}
        for run in ("one", "two"):
            logs = sorted(
                (row["created_at"], id, row["type"], row["body"]["status"], row["entity_id"])
                for id, row in self.stores[agent].logs.items()
                if row["body"]["runId"] == run
            )
            events = [log for log in logs if log[2] == "run_event"]
            if all(entity not in (None, log[4]) for log in events):
                continue
            begun = min((log[0] for log in events if log[3] == "started"), default=None)
            last = max((log for log in events if log[3] in ENDINGS), default=None)
            ended, state = (None, "started") if last is None else (last[0], last[3])
            if status in (None, state):
                lasted = None if begun is None or ended is None else max(ended - begun, timedelta(0))
                wanted[run] = (state, begun, ended, lasted, len(logs) - len(events))
        found = self.dbs[agent].get_agent_run_summaries(entity_id=entity, status=status)
        assert found.total == len(wanted)
        assert {
            each.run_id: (
                each.status,
                each.started_at,
                each.ended_at,
                None if each.duration_ms is None else timedelta(milliseconds=each.duration_ms),
                each.counts.actions,
            )
            for each in found.runs or ()
            if each.counts is not None
        } == wanted

    @rule(agent=agents, keep=st.integers(1, 2))
    def prune_logs(self, agent: int, keep: int) -> None:
        store = self.stores[agent]
        newest = sorted(store.logs, key=lambda id: (store.logs[id]["created_at"], id), reverse=True)
        assert self.dbs[agent].prune_logs(keep=keep) == len(newest[keep:])
        store.logs = {id: store.logs[id] for id in newest[:keep]}

    @rule(agent=agents, entity=maybe(ids("entity")), room=maybe(ids("room")), kind=maybe(log_types))
    def get_logs(self, agent: int, entity: UUID | None, room: UUID | None, kind: str | None) -> None:
        wanted = [
            (row["created_at"], id)
            for id, row in self.stores[agent].logs.items()
            if (entity is None or row["entity_id"] == entity)
            and (room is None or row["room_id"] == room)
            and (kind is None or row["type"] == kind)
        ]
        found = self.dbs[agent].get_logs(entity_id=entity, room_id=room, type=kind)
        assert [(log.created_at, log.id) for log in found] == sorted(wanted, reverse=True)

    @rule(agent=agents, settings=objects.map(lambda o: {k: v for k, v in o.items() if not isinstance(v, dict)}))
    def update_settings(self, agent: int, settings: dict[str, Any]) -> None:
        db, store = self.dbs[agent], self.stores[agent]
        assert db.update_agent(db.agent_id, {"settings": settings}) is True
        store.settings = merged(store.settings, settings)

    @rule(agent=agents)
    def fail_in_a_transaction(self, agent: int) -> None:
        with suppress(ZeroDivisionError), self.dbs[agent].transaction() as tx:
            tx.create_world(World(id=IDS["world"][0], name="undone"))
            tx.set_cache("a", "undone")
            tx.delete_room(IDS["room"][0])
            raise ZeroDivisionError

    # --- pairing ---

    @rule(
        agent=agents,
        id=ids("request"),
        channel=st.sampled_from("ab"),
        sender=st.sampled_from("st"),
        code=st.sampled_from("cd"),
    )
    def create_pairing_request(self, agent: int, id: UUID, channel: str, sender: str, code: str) -> None:
        requests, db = self.stores[agent].requests, self.dbs[agent]
        row = {"channel": channel, "sender_id": sender, "code": code}
        rivals = [other for other in requests.values() if other["channel"] == channel]
        taken = any(other["sender_id"] == sender or other["code"] == code for other in rivals)
        if id not in requests and taken:
            with pytest.raises(UniqueViolationError):
                db.create_pairing_request({"id": id, **row})
        else:
            assert db.create_pairing_request({"id": id, **row}) == id
            requests.setdefault(id, row)

    @rule(agent=agents, id=ids("request"))
    def delete_pairing_request(self, agent: int, id: UUID) -> None:
        there = self.stores[agent].requests.pop(id, None) is not None
        assert self.dbs[agent].delete_pairing_request(id) is there

    @rule(agent=agents, id=ids("entry"), channel=st.just("a"), sender=st.sampled_from("st"))
    def allow(self, agent: int, id: UUID, channel: str, sender: str) -> None:
        entries = self.stores[agent].entries
        row = {"channel": channel, "sender_id": sender}
        stored = next((other for other in entries if entries[other] == row), id)
        assert self.dbs[agent].create_pairing_allowlist_entry({"id": id, **row}) == stored
        entries.setdefault(stored, row)

    @rule(agent=agents, id=ids("entry"), metadata=maybe(objects))
    def change_allowance(self, agent: int, id: UUID, metadata: dict[str, Any] | None) -> None:
        """Give it other metadata, or end it."""
        entries, db = self.stores[agent].entries, self.dbs[agent]
        if metadata is None:
            assert db.delete_pairing_allowlist_entry(id) is (entries.pop(id, None) is not None)
        else:
            assert db.update_pairing_allowlist_entry({"id": id, "metadata": metadata}) is (id in entries)

    # --- messaging, which both agents share ---

    @rule(agent=agents, place=places, name=texts, members=st.sets(users, max_size=2))
    def create_channel(self, agent: int, place: int, name: str, members: set[UUID]) -> None:
        id = self.channel_ids[place]
        given = {"id": id, "messageServerId": self.server, "name": name, "type": "GROUP"}
        row = self.channels.setdefault(id, {"name": name, "members": set()})
        assert self.dbs[agent].create_channel(given, members).name == row["name"]
        row["members"] |= members

    @rule(agent=agents, place=places, name=texts, members=maybe(st.sets(users, max_size=2)))
    def update_channel(self, agent: int, place: int, name: str, members: set[UUID] | None) -> None:
        id = self.channel_ids[place]
        if id not in self.channels:
            with pytest.raises(NotFoundError):
                self.dbs[agent].update_channel(id, {"name": name}, members)
            return
        assert self.dbs[agent].update_channel(id, {"name": name}, members).name == name
        self.channels[id] = {"name": name, "members": self.channels[id]["members"] if members is None else members}

    @rule(agent=agents, place=places)
    def delete_channel(self, agent: int, place: int) -> None:
        id = self.channel_ids[place]
        assert self.dbs[agent].delete_channel(id) is (self.channels.pop(id, None) is not None)
        for message in [message for message, row in self.messages.items() if row["channel_id"] == id]:
            self.forget_message(message)

    @rule(agent=agents, one=users, other=users)
    def find_direct_channel(self, agent: int, one: UUID, other: UUID) -> None:
        found = self.dbs[agent].find_or_create_dm_channel(one, other, self.server)
        assert found.id is not None
        assert self.channels.setdefault(found.id, {"name": found.name, "members": {one, other}})["members"] == {
            one,
            other,
        }
        assert self.dbs[agent ^ 1].find_or_create_dm_channel(other, one, self.server) == found

    @rule(agent=agents, place=places, where=places, time=times, answers=maybe(places))
    def create_message(self, agent: int, place: int, where: int, time: datetime, answers: int | None) -> None:
        id, target = self.message_ids[place], None if answers is None else self.message_ids[answers]
        row = {"channel_id": self.channel_ids[where], "created_at": time, "in_reply_to_root_message_id": target}
        message = ChannelMessage(id=id, author_id=UUID(int=1), content="", **row)
        # One may answer itself: it is there when the reference is looked at.
        refers = row["channel_id"] in self.channels and (target in self.messages or target in (None, id))
        if self.refused_unless(id in self.messages or refers, lambda: self.dbs[agent].create_message(message)):
            self.messages.setdefault(id, row)

    @rule(agent=agents, place=places)
    def delete_message(self, agent: int, place: int) -> None:
        there = self.message_ids[place] in self.messages
        assert self.dbs[agent].delete_message(self.message_ids[place]) is there
        if there:
            self.forget_message(self.message_ids[place])

    def forget_message(self, id: UUID) -> None:
        del self.messages[id]
        for row in self.messages.values():
            if row["in_reply_to_root_message_id"] == id:
                row["in_reply_to_root_message_id"] = None

    @rule(agent=agents, place=places, backward=st.booleans(), limit=st.integers(1, 2))
    def page_through_a_channel(self, agent: int, place: int, backward: bool, limit: int) -> None:
        id, db = self.channel_ids[place], self.dbs[agent]
        of_channel = [(row["created_at"], key) for key, row in self.messages.items() if row["channel_id"] == id]
        seen: list[ChannelMessage] = []
        page = db.get_messages_for_channel(id, limit, oldest_first=not backward)
        while page:
            seen += page
            page = db.get_messages_for_channel(id, limit, cursor=page[-1], oldest_first=not backward)
        assert [(message.created_at, message.id) for message in seen] == sorted(of_channel, reverse=backward)

    # --- after every step ---

    @invariant()
    def everything_agrees(self) -> None:
        """Look at one of the two agents, or at what they share, in turn: what a call did elsewhere shows soon after."""
        self.steps += 1
        turn = self.steps % 3
        if turn == 2:
            self.what_is_shared_agrees(self.dbs[0])
        else:
            self.an_agent_agrees(self.dbs[turn], self.stores[turn])
            self.searches_agree(turn)

    def searches_agree(self, agent: int) -> None:
        """Search all that there is, one place, be it gone, and where two memories are, which may be the same."""
        turn, rows = self.steps // 3, [*self.stores[agent].memories.values()]
        vector, unique = turn % len(VECTORS), turn % 2 == 0
        self.search_agrees(agent, vector, {}, unique)
        for kind in ("room", "entity", "world"):
            self.search_agrees(agent, vector, {f"{kind}_id": IDS[kind][turn % 3]}, not unique)
        pairs = ("room_id", "entity_id"), ("room_id", "world_id"), ("entity_id", "world_id")
        for first, second in pairs if rows else ():
            one, other = rows[turn % len(rows)][first], rows[turn // 2 % len(rows)][second]
            if one and other:
                self.search_agrees(agent, vector, {first: one, second: other})

    def what_is_shared_agrees(self, db: elizasql.sync.DatabaseAdapter) -> None:
        channels = {channel.id: channel.name for channel in db.get_channels_for_message_server(self.server)}
        assert channels == {id: row["name"] for id, row in self.channels.items()}
        for id in self.channel_ids:
            members = self.channels[id]["members"] if id in self.channels else set()
            assert set(db.get_channel_participants(id)) == members
        for id in self.message_ids:
            found, row = db.get_message_by_id(id), self.messages.get(id, {})
            assert (found is not None) is (id in self.messages)
            assert {name: getattr(found, name) for name in row} == row

    def an_agent_agrees(self, db: elizasql.sync.DatabaseAdapter, store: Stores) -> None:
        assert {w.id: w.name for w in db.get_all_worlds()} == {k: v["name"] for k, v in store.worlds.items()}
        rooms = db.get_rooms_by_ids(IDS["room"])
        assert {r.id: {"name": r.name, "world_id": r.world_id} for r in rooms} == store.rooms
        entities = db.get_entities_by_ids(IDS["entity"])
        assert {e.id: {"names": e.names, "metadata": e.metadata} for e in entities} == store.entities
        pairs = [(entity, room) for entity in IDS["entity"] for room in IDS["room"]]
        assert db.are_room_participants([{"entityId": e, "roomId": r} for e, r in pairs]) == [
            pair in store.members for pair in pairs
        ]
        states = db.get_participant_user_states([{"entityId": e, "roomId": r} for e, r in pairs])
        assert states == [store.members.get(pair) for pair in pairs]
        memories = {m.id: m for m in db.get_memories_by_ids(IDS["memory"])}
        assert memories.keys() == store.memories.keys()
        for id, row in store.memories.items():
            stored = {name: value for name, value in row.items() if name != "vector"}
            assert {name: getattr(memories[id], name) for name in stored} == stored
        components = db.get_components_for_entities(IDS["entity"])
        assert {
            (c.entity_id, c.type, c.world_id): {
                "entity_id": c.entity_id,
                "room_id": c.room_id,
                "world_id": c.world_id,
                "data": c.data,
            }
            for c in components
        } == store.components
        assert db.get_caches(["a", "b", "O'Hara; --", "π", ""]) == store.cache
        agent = db.get_agent(db.agent_id)
        assert agent is not None and agent.settings == store.settings
        requests = [each for of_channel in db.get_pairing_requests(["a", "b"]) for each in of_channel]
        assert {
            r.id: {"channel": r.channel, "sender_id": r.sender_id, "code": r.code} for r in requests
        } == store.requests
        entries = [each for of_channel in db.get_pairing_allowlists(["a", "b"]) for each in of_channel]
        assert {e.id: {"channel": e.channel, "sender_id": e.sender_id} for e in entries} == store.entries


def contains(whole: Any, part: Any) -> bool:
    """Say what jsonb containment says."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(key in whole and contains(whole[key], part[key]) for key in part)
    if isinstance(part, list):
        return isinstance(whole, list) and all(any(contains(item, wanted) for item in whole) for wanted in part)
    return type(whole) is type(part) and bool(whole == part)


# Few long runs: what a store does with what was there before needs many calls on the same rows.
def run(dsn: str, examples: int, steps: int) -> None:
    in_the_process: list[int] = []
    machine = type("Machine", (AdapterMachine,), {"dsn": dsn, "in_the_process": in_the_process})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
    assert sum(in_the_process) > 0


# What differs is made small first, which takes a while.
@pytest.mark.timeout(600)
def test_adapter_does_what_the_model_says(dsn: str) -> None:
    run(dsn, examples=4, steps=150)


@pytest.mark.slow
def test_adapter_does_what_the_model_says_for_long(dsn: str) -> None:
    run(dsn, examples=120, steps=150)
