"""The adapter against a plain in-memory model of it: random calls on all stores, two agents in turn, no difference."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from datetime import datetime, timedelta, timezone
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

import elizasql.sync
from elizasql import (
    Component,
    Entity,
    ForeignKeyError,
    Goal,
    Log,
    Memory,
    NotFoundError,
    Relationship,
    Room,
    Task,
    World,
)

# Small pools, the same for both agents: ids collide within an agent and across.
IDS = {
    kind: [UUID(int=1000 * n + i) for i in range(3)]
    for n, kind in enumerate(("world", "room", "entity", "memory", "task", "goal", "log", "component"), 1)
}
T0 = datetime(2026, 1, 1, tzinfo=timezone.utc)

agents = st.sampled_from((0, 1))
texts = st.sampled_from(("a", "b", "O'Hara; --", "π", ""))
tags = st.lists(st.sampled_from(("x", "y", "z")), unique=True, max_size=3)
objects = st.dictionaries(st.sampled_from(("k", "l")), st.sampled_from((1, None, "v", [1], {"m": 2})), max_size=2)
times = st.integers(0, 5).map(lambda second: T0 + timedelta(seconds=second))


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

    def __init__(self) -> None:
        super().__init__()
        self.dbs = []
        for _ in range(2):
            db = elizasql.sync.open(agent_id=uuid4(), dsn=self.dsn, indexing="manual", pool_max_size=2, pool_min_size=0)
            db.ensure_agent_exists({"name": "agent"})
            self.dbs.append(db)
        self.stores = [Stores(), Stores()]

    def teardown(self) -> None:
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
        upsert: bool,
    ) -> None:
        store, db = self.stores[agent], self.dbs[agent]
        row = {"room_id": room, "entity_id": entity, "world_id": world, "created_at": time}
        row |= {"content": {"text": text}, "metadata": metadata, "unique": unique}
        possible = id in store.memories or store.has(room_id=room, entity_id=entity, world_id=world)
        memory = Memory(id=id, **deepcopy(row))
        call = db.upsert_memories if upsert else db.create_memories
        if self.refused_unless(possible, lambda: call([memory], "messages")):
            if id not in store.memories:
                store.memories[id] = row
            elif upsert:
                store.memories[id] |= {name: row[name] for name in ("content", "metadata", "unique")}

    @rule(agent=agents, id=ids("memory"), text=texts, room=maybe(ids("room")))
    def update_memory(self, agent: int, id: UUID, text: str, room: UUID | None) -> None:
        store, db = self.stores[agent], self.dbs[agent]
        change = {"id": id, "content": {"text": text}, "roomId": room}
        if id not in store.memories:
            assert db.update_memory(change) is False
        elif self.refused_unless(store.has(room_id=room), lambda: db.update_memory(change)):
            store.memories[id]["content"] = {"text": text}
            if room is not None:
                store.memories[id]["room_id"] = room

    @rule(agent=agents, id=ids("memory"))
    def delete_memory(self, agent: int, id: UUID) -> None:
        there = self.stores[agent].memories.pop(id, None) is not None
        assert self.dbs[agent].delete_memory(id) is there

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

    @rule(agent=agents, id=ids("task"))
    def delete_task(self, agent: int, id: UUID) -> None:
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
        kind=st.sampled_from(("a", "b")),
        time=times,
    )
    def create_log(self, agent: int, id: UUID, room: UUID, entity: UUID, kind: str, time: datetime) -> None:
        store = self.stores[agent]
        row = {"room_id": room, "entity_id": entity, "type": kind, "created_at": time}
        possible = id in store.logs or store.has(room_id=room, entity_id=entity)
        if self.refused_unless(possible, lambda: self.dbs[agent].create_logs([Log(id=id, body={}, **row)])):
            store.logs.setdefault(id, row)

    @rule(agent=agents, entity=maybe(ids("entity")), room=maybe(ids("room")), kind=maybe(st.sampled_from(("a", "b"))))
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

    # --- after every step ---

    @invariant()
    def everything_agrees(self) -> None:
        for db, store in zip(self.dbs, self.stores, strict=True):
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
                assert {name: getattr(memories[id], name) for name in row} == row
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


def contains(whole: Any, part: Any) -> bool:
    """Say what jsonb containment says."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(key in whole and contains(whole[key], part[key]) for key in part)
    if isinstance(part, list):
        return isinstance(whole, list) and all(any(contains(item, wanted) for item in whole) for wanted in part)
    return type(whole) is type(part) and bool(whole == part)


def run(dsn: str, examples: int, steps: int) -> None:
    machine = type("Machine", (AdapterMachine,), {"dsn": dsn})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_adapter_does_what_the_model_says(dsn: str) -> None:
    run(dsn, examples=12, steps=40)


@pytest.mark.slow
def test_adapter_does_what_the_model_says_for_long(dsn: str) -> None:
    run(dsn, examples=300, steps=60)
