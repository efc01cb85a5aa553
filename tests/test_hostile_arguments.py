"""Whatever stands in an argument, a field of a model or a setting: it fits, or it is refused by an error of ours.

Every public method, each of its parameters and each field of the models that it takes, with values that are hard to
look at: none of them may end a call in an error of Python's, which no caller has asked to expect.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from itertools import count
from typing import Any, NoReturn
from uuid import UUID

import numpy as np
import pytest

from elizasql import (
    ArgumentError,
    Config,
    ConfigurationError,
    DatabaseAdapter,
    ElizaSQLError,
    Model,
    _codecs,
    elizaos,
    models,
)
from elizasql._statements import Statement

from .conftest import MakeAdapter

ID = UUID(int=7)

# More digits than Python writes.
HUGE = 10**5000


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("has no repr")


class Incomparable:
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("cannot be compared")


class Text(str):
    __slots__ = ()


def nested(wrap: Callable[[Any], Any]) -> Any:
    value: Any = "x"
    for _ in range(5000):
        value = wrap(value)
    return value


def circle() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["x"] = value
    return value


HOSTILE: list[Any] = [
    None,
    True,
    -1,
    1.5,
    math.nan,
    -math.inf,
    2**63,
    HUGE,
    -HUGE,
    1j,
    Decimal("sNaN"),
    Fraction(1, 3),
    "",
    "\x00\ud800",
    "x" * 3000,
    Text("x"),
    Text(ID),
    b"x",
    [],
    [None],
    [[]],
    [HUGE],
    [Unprintable()],
    [(ID,)],
    [(ID, Unprintable())],
    [{}],
    [{"id": Unprintable()}],
    [{HUGE: 1}],
    (ID, ID, ID),
    {},
    {1: 2},
    {"x": HUGE},
    {"x": Unprintable()},
    {HUGE: 1},
    {Unprintable(): 1},
    {ID},
    circle(),
    nested(lambda value: [value]),
    nested(lambda value: {"x": value}),
    object(),
    Unprintable(),
    Incomparable(),
    int,
    ...,
    KeyError(Unprintable()),
    ID,
    np.ones(2),
    np.array(None),
    np.array("x"),
    np.float32("nan"),
    np.int64(-5),
    np.datetime64("NaT"),
    np.timedelta64("NaT"),
    np.timedelta64(5, "D"),
    datetime.max,  # noqa: DTZ901
    datetime.max.replace(tzinfo=timezone(timedelta(hours=-1))),
    datetime.min.replace(tzinfo=timezone.utc),
    timedelta.max,
    timedelta.min,
]

# What a method takes as a model: by the name of the parameter, or the method's and its own; with fields that fit.
MODELS: dict[str, tuple[type[Model], dict[str, Any]]] = {
    "agent": (models.Agent, {"id": ID, "name": "x"}),
    "world": (models.World, {"id": ID}),
    "room": (models.Room, {"id": ID, "source": "x", "type": "DM"}),
    "entity": (models.Entity, {"id": ID, "names": ["x"]}),
    "component": (models.Component, {"id": ID, "entity_id": ID, "room_id": ID, "type": "x", "data": {}}),
    "relationship": (models.Relationship, {"id": ID, "source_entity_id": ID, "target_entity_id": ID}),
    "memory": (models.Memory, {"id": ID, "content": {}, "type": "messages"}),
    "task": (models.Task, {"id": ID, "name": "x"}),
    "log": (models.Log, {"id": ID, "entity_id": ID, "room_id": ID, "type": "x", "body": {}}),
    "goal": (models.Goal, {"id": ID, "name": "x"}),
    "server": (models.MessageServer, {"name": "x", "source_type": "x"}),
    "channel": (models.Channel, {"message_server_id": ID, "name": "x", "type": "GROUP"}),
    "message": (models.ChannelMessage, {"channel_id": ID, "author_id": ID, "content": "x"}),
    "request": (models.PairingRequest, {"id": ID, "channel": "x", "sender_id": "x", "code": "x"}),
    "entry": (models.PairingAllowlistEntry, {"id": ID, "channel": "x", "sender_id": "x"}),
    "update_agent agent": (models.Agent, {"name": "x"}),
    "update_task task": (models.Task, {"name": "x"}),
    "update_pending_task task": (models.Task, {"name": "x"}),
    "update_channel updates": (models.Channel, {"name": "x"}),
    "update_message updates": (models.ChannelMessage, {"content": "x"}),
}
PLURALS = {"entities": "entity", "memories": "memory", "entries": "entry"}

# Good values of what else is needed, by the parameter's name, or the method's and its own.
GOOD: dict[str, Any] = {
    "get_memories_by_world_id world_id": ID,
    "key": "x",
    "keys": ["x"],
    "expected": 1,
    "value": 1,
    "names": ["x"],
    "query": "x",
    "queries": ["x"],
    "dimension": 384,
    "name": "x",
    "to": 768,
    "embed": lambda texts: [np.ones(768) for _ in texts],
    "embedding": np.ones(384, np.float32),
    "table_name": "messages",
    "query_table_name": "messages",
    "query_threshold": 1,
    "query_input": "x",
    "type": "x",
    "older_than": timedelta(1),
    "error": "x",
    "state": "MUTED",
    "status": "DONE",
    "pairs": [(ID, ID)],
    "participants": [(ID, ID)],
    "ops": [{"op": "set", "path": "x", "value": 1}],
    "patches": [{"componentId": ID, "ops": [{"op": "push", "path": "x", "value": 1}]}],
    "get_components_by_natural_keys keys": [{"entity_id": ID, "type": "x"}],
    "update_participants participants": [{"entityId": ID, "roomId": ID, "updates": {"metadata": {}}}],
    "update_participant_user_states updates": [{"entityId": ID, "roomId": ID, "state": "MUTED"}],
    "set_caches entries": [{"key": "x", "value": 1}],
    "get_pairing_allowlist channel": "x",
    "get_relationships entity_id": ID,
    "query_entities component_type": "x",
    "prune_logs keep": 1,
    "prune_memories keep": 1,
    "complete_task task": models.Task(id=ID, claim_token=ID),
    "fail_task task": models.Task(id=ID, claim_token=ID),
    "heartbeat_task task": models.Task(id=ID, claim_token=ID),
    "release_task task": models.Task(id=ID, claim_token=ID),
}

# These end the adapter, tell what it is, or run what the caller gives them.
LEFT_OUT = {"close", "health", "is_ready", "with_entity_context"}


class Sent(Exception):  # noqa: N818
    """The arguments fit: from here on it is the server's."""


def methods() -> dict[str, list[str]]:
    """Give the public coroutine methods of each class that the adapter is made of."""
    found: dict[str, list[str]] = {}
    for kind in DatabaseAdapter.__mro__:
        names = [
            name
            for name, method in vars(kind).items()
            if inspect.iscoroutinefunction(method) and name[0] != "_" and name not in LEFT_OUT
        ]
        if names:
            found[kind.__name__] = names
    return found


def parameters(name: str) -> list[inspect.Parameter]:
    return list(inspect.signature(getattr(DatabaseAdapter, name)).parameters.values())[1:]


def model_of(method: str, parameter: str) -> tuple[type[Model], dict[str, Any]] | None:
    where = f"{method} {parameter}"
    if where in GOOD:
        return None
    return MODELS.get(where) or MODELS.get(PLURALS.get(parameter, parameter.removesuffix("s")))


def is_single(parameter: str) -> bool:
    return parameter in MODELS or parameter == "updates"


def good(method: str) -> dict[str, Any]:
    """Give arguments that fit."""
    found: dict[str, Any] = {}
    for parameter in parameters(method):
        name = parameter.name
        special = GOOD.get(f"{method} {name}", parameter)
        if special is not parameter:
            found[name] = special
        elif parameter.default is not parameter.empty:
            continue
        elif (model := model_of(method, name)) is not None:
            found[name] = model[1] if is_single(name) else [model[1]]
        elif name.endswith("_id"):
            found[name] = ID
        elif name.endswith("_ids"):
            found[name] = [ID]
        else:
            found[name] = GOOD[name]
    return found


def calls(method: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give each parameter of a method, and each field of a model that it takes, with each hostile value."""
    given = good(method)
    for parameter in parameters(method):
        name = parameter.name
        for value in HOSTILE:
            yield name, given | {name: value}
        model = model_of(method, name)
        if model is None or name not in given:
            continue
        kind, row = model
        for field in dataclasses.fields(kind):
            for number, value in enumerate(HOSTILE):
                fields = row | {field.name: value}
                whole = kind(**fields) if number % 2 else fields  # both are read by the same checks
                yield f"{name}.{field.name}", given | {name: whole if is_single(name) else [whole]}


@pytest.mark.parametrize("domain", methods())
async def test_no_value_ends_a_call_in_an_error_of_python(
    db: DatabaseAdapter, monkeypatch: pytest.MonkeyPatch, domain: str
) -> None:
    async def send(*_: object, **__: object) -> NoReturn:
        raise Sent

    async def outcome(method: str, arguments: Mapping[str, Any]) -> str:
        call: Callable[..., Awaitable[Any]] = getattr(db, method)
        try:
            await call(**arguments)
        except Sent:
            return "sent"
        except ElizaSQLError as error:
            return str(error)
        except Exception as error:
            return f"a {type(error).__name__} escapes"
        return ""

    wrong = []
    with monkeypatch.context() as patch:
        for executor in (db._executor, db._background):
            patch.setattr(executor, "_attempts", send)
        for method in methods()[domain]:
            assert await outcome(method, good(method)) == "sent", method
            for place, arguments in calls(method):
                said = await outcome(method, arguments)
                if said.endswith("escapes"):
                    wrong.append(f"{method}, {place}: {said}")
    assert not wrong, "\n".join(sorted(set(wrong)))


def varied(value: Any, number: int) -> Any:
    """Give a value of GOOD or MODELS with ids and texts of a row's own."""
    if isinstance(value, dict):
        return {key: varied(item, number) for key, item in value.items()}
    if isinstance(value, list):
        return [varied(item, number) for item in value]
    if isinstance(value, UUID):
        return UUID(int=value.int + number)
    return f"x{number}" if value == "x" else value


async def test_what_an_iterator_gives_is_read_before_it_is_asked_for_the_next(
    db: DatabaseAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be the same mapping or object, changed."""

    def mappings(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        one: dict[str, Any] = {}
        for row in rows:
            one.clear()
            one.update(row)
            yield one

    def objects(kind: type[Model], rows: list[dict[str, Any]]) -> Iterator[Model]:
        one = kind()
        for row in rows:
            for key, value in row.items():
                setattr(one, key, value)
            yield one

    async def record(statement: Statement, method: str = "", params: Any = None, **chunk: Any) -> NoReturn:
        sent.append((statement.name, statement.order(params or chunk)))
        raise Sent

    async def sent_by(method: str, **arguments: Any) -> list[Any]:
        sent.clear()
        with monkeypatch.context() as patch, suppress(Sent):
            patch.setattr(_codecs, "new_id", map(UUID, map("{:032x}".format, count(1))).__next__)
            await getattr(db, method)(**arguments)
        return list(sent)

    sent: list[Any] = []
    swept, wrong = 0, []
    with monkeypatch.context() as patch:
        for executor in (db._executor, db._background):
            patch.setattr(executor, "_run", record)
            patch.setattr(executor, "fetch_together", lambda statement, work, *_: work(record))
        for method in (name for names in methods().values() for name in names):
            given = good(method)
            for name, value in given.items():
                if not (isinstance(value, list) and isinstance(value[0], dict)):
                    continue
                swept += 1
                rows = [varied(value[0], number) for number in range(3)]
                expected = await sent_by(method, **given | {name: rows})
                assert expected, method
                model = model_of(method, name)
                reused = [mappings(rows), *([] if model is None else [objects(model[0], rows)])]
                wrong += [method for each in reused if await sent_by(method, **given | {name: each}) != expected]
    assert swept > 30
    assert not wrong, wrong


def documented(method: str) -> set[str]:
    """Give the errors that a method's docstring names, and those of the methods that it refers to ("As `x`")."""
    text = inspect.getdoc(getattr(DatabaseAdapter, method)) or ""
    named = set(re.findall(r"\b[A-Z]\w+Error\b", text))
    return named.union(*map(documented, re.findall(r"^ +As `(\w+)`", text, re.MULTILINE)))


# These run in no transaction, and the last one would wait for the agents of other tests.
NOT_UNDONE = {"abandon_reembedding", "index_memories", "load_memories", "reembed", "cleanup_agents"}


@pytest.mark.parametrize("there", [False, True], ids=["without the agent", "without what is referred to"])
async def test_what_a_call_raises_is_documented(make_db: MakeAdapter, there: bool) -> None:
    """Arguments that fit, about what does not exist."""
    db = await make_db()
    if not there:
        await db.delete_agent(db.agent_id)
    hidden, raised = [], set()
    for method in (name for names in methods().values() for name in names if name not in NOT_UNDONE):
        with suppress(ZeroDivisionError):
            async with db.transaction() as tx:
                try:
                    await getattr(tx, method)(**good(method))
                except ElizaSQLError as error:
                    raised.add(type(error).__name__)
                    if type(error).__name__ not in documented(method):
                        hidden.append(f"{method}: {type(error).__name__}: {error}")
                raise ZeroDivisionError
    assert not hidden, "\n".join(hidden)
    assert raised >= ({"NotFoundError", "ForeignKeyError"} if there else {"ForeignKeyError"})


# What makes a row of each model that has the id of all arguments that fit, each after what it points at.
CREATED_BY = {
    "agent": "create_agent",
    "world": "create_world",
    "room": "create_room",
    "entity": "create_entity",
    "component": "create_component",
    "relationship": "create_relationship",
    "memory": "create_memory",
    "task": "create_task",
    "log": "log",
    "goal": "create_goal",
    "server": "create_message_server",
    "channel": "create_channel",
    "message": "create_message",
    "request": "create_pairing_request",
    "entry": "create_pairing_allowlist_entry",
}


def dangling(method: str) -> Iterator[dict[str, Any]]:
    """Give arguments that fit; and with each field of a model that may point at something pointing at nothing."""
    given = good(method)
    yield given
    for name in given:
        kind, row = model_of(method, name) or (Model, {})
        for field in dataclasses.fields(kind):
            if field.name.endswith("_id") and field.name != "agent_id" and "UUID" in str(field.type):
                changed = row | {field.name: UUID(int=8)}
                yield given | {name: changed if is_single(name) else [changed]}


async def test_what_a_call_raises_about_rows_that_are_there_is_documented(db: DatabaseAdapter) -> None:
    """Arguments that fit, about what exists, and with references to what does not."""
    hidden, raised = set(), set()
    with suppress(ZeroDivisionError):
        async with db.transaction() as outer:
            for model, create in CREATED_BY.items():
                await getattr(outer, create)(MODELS[model][1] | {"id": ID})
            await outer.add_participant(ID, ID)
            for method in (name for names in methods().values() for name in names if name not in NOT_UNDONE):
                for arguments in dangling(method):
                    with suppress(ZeroDivisionError):
                        async with outer.transaction() as tx:
                            try:
                                await getattr(tx, method)(**arguments)
                            except ElizaSQLError as error:
                                raised.add((method, type(error).__name__))
                                if type(error).__name__ not in documented(method):
                                    hidden.add(f"{method}: {type(error).__name__}: {error}")
                            raise ZeroDivisionError
            raise ZeroDivisionError
    assert not hidden, "\n".join(sorted(hidden))
    for kind in ("memories", "rooms", "components", "goals"):
        assert (f"update_{kind}", "ForeignKeyError") in raised


# Arguments of a right type that break a rule of the method, wherever one takes them.
OTHER_AGENT = UUID(int=9)
BROKEN: list[dict[str, Any]] = [
    {"count": 1, "limit": 2},
    {"agent_id": OTHER_AGENT},
    {"agent_ids": [OTHER_AGENT]},
    {"room_id": ID, "room_ids": [ID]},
    {"entity_id": ID, "entity_ids": [ID]},
    {"world_id": ID, "world_ids": [ID]},
    {"cursor": (datetime.min.replace(tzinfo=timezone.utc), ID), "offset": 1},
    {"table_name": "x" * 1025},
    {"query_table_name": ""},
    {"query_field_name": "text"},
    {"recall": "exact", "ef_search": 9},
    {"status": "LOST"},
    {"state": "LOST"},
    {"pairs": [(ID, ID), {"entity_id": ID}]},
    {"participants": [(ID, ID), {"entity_id": ID}]},
    {"queries": [{"channel": "x", "agent_id": OTHER_AGENT}]},
    {"older_than": None, "keep": None},
]


async def test_the_rules_of_a_method_are_documented(db: DatabaseAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    async def send(*_: object, **__: object) -> NoReturn:
        raise Sent

    hidden, broken = set(), 0
    with monkeypatch.context() as patch:
        for executor in (db._executor, db._background):
            patch.setattr(executor, "_attempts", send)
        for method in (name for names in methods().values() for name in names):
            taken = {parameter.name for parameter in parameters(method)}
            for rule in BROKEN:
                if rule.keys() <= taken:
                    try:
                        await getattr(db, method)(**good(method) | rule)
                    except Sent:
                        continue  # it has no such rule
                    except ArgumentError as error:
                        broken += 1
                        if "ArgumentError" not in documented(method):
                            hidden.add(f"{method}: {error}")
    assert broken > 40
    assert not hidden, "\n".join(sorted(hidden))


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Config)])
def test_no_value_of_a_setting_ends_in_an_error_of_python(name: str) -> None:
    for value in HOSTILE:
        try:
            Config.load(environ={}, **{name: value})
        except ConfigurationError as error:
            assert str(error)  # noqa: PT017 - what is raised is the question


async def test_no_value_of_a_configuration_ends_in_an_error_of_python(monkeypatch: pytest.MonkeyPatch) -> None:
    async def open_with(*, agent_id: object, **settings: Any) -> NoReturn:
        _codecs.as_id(agent_id)
        Config.load(environ={}, **settings)
        raise Sent

    monkeypatch.setattr(elizaos, "open", open_with)
    for value in HOSTILE:
        for config, agent_id in (
            (value, ID),
            ({"postgresUrl": value}, ID),
            ({"POSTGRES_POOL_MAX": value}, ID),
            ({}, value),
        ):
            with pytest.raises((ElizaSQLError, Sent)):
                await elizaos.create_database_adapter(config, agent_id)
