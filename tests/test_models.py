"""The models: from and to ElizaOS's JSON without loss, checked field by field, compared by value."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import re
from collections import OrderedDict, UserDict
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from types import MappingProxyType
from typing import Any
from uuid import UUID, uuid4

import numpy as np
import pgvector
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import elizasql
from elizasql import Agent, ArgumentError, EmbeddingError, Entity, Memory, Participant, Room, World, models
from elizasql.models import Model

EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


MODELS: list[type[Model]] = [
    kind
    for name in models.__all__
    if isinstance(kind := getattr(models, name), type) and issubclass(kind, Model) and kind is not Model
]
each_model = pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)


def fields(kind: type[Model]) -> dict[str, str]:
    """Give the names of a model's fields and the text of their types, without the None that every one may be."""
    return {field.name: str(field.type).removesuffix(" | None") for field in dataclasses.fields(kind)}


def camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


# --- values of every type of field ---

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=8)
JSON_VALUE: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
JSON_OBJECT = st.dictionaries(TEXT, JSON_VALUE, max_size=3)
# What a number of milliseconds can tell.
TIMES = st.integers(-62135596800000, 253402300799999).map(lambda ms: EPOCH + timedelta(milliseconds=ms))
VECTORS = hnp.arrays(np.float32, 384, elements=st.floats(0.5, 65504, width=32), fill=st.floats(1, 9, width=32))


def objectives() -> st.SearchStrategy[Any]:
    step = st.fixed_dictionaries({"id": st.uuids().map(str), "description": TEXT, "completed": st.booleans()})
    return st.lists(step, max_size=3, unique_by=lambda one: one["id"])


@functools.cache
def of_type(text: str) -> st.SearchStrategy[Any]:
    """Give a strategy for a type of field; a new type needs a line here."""
    if text in {kind.__name__ for kind in MODELS}:
        return model(next(kind for kind in MODELS if kind.__name__ == text))
    if (match := re.fullmatch(r"list\[(\w+)\]", text)) and match[1] in {kind.__name__ for kind in MODELS}:
        return st.lists(of_type(match[1]), max_size=2)
    return {
        "UUID": st.uuids(),
        "str": TEXT,
        "Key": TEXT,
        "bool": st.booleans(),
        "int": st.integers(0, 2**63 - 1),
        "MaxAttempts": st.integers(1, 2**31 - 1),
        "float": st.floats(allow_nan=False, allow_infinity=False),
        "datetime": TIMES,
        "Embedding": VECTORS,
        "JSON": JSON_VALUE.filter(lambda value: value is not None),
        "dict[str, Any]": JSON_OBJECT,
        "list[Any]": st.lists(JSON_VALUE, max_size=3),
        "list[Any] | str": st.lists(JSON_VALUE, max_size=3),
        "list[str]": st.lists(TEXT, max_size=3),
        "list[Objective]": objectives(),
        "GoalStatus": st.sampled_from(["IN_PROGRESS", "DONE", "FAILED"]),
        "RunStatus": st.sampled_from(["started", "completed", "timeout", "error"]),
    }[text]


@functools.cache
def model(kind: type[Model]) -> st.SearchStrategy[Model]:
    """Give a strategy for models with any of their fields set."""
    return st.builds(
        kind,
        **{
            field.name: of_type(text) if field.default is not None else st.none() | of_type(text)
            for field in dataclasses.fields(kind)
            for text in [fields(kind)[field.name]]
        },
    )


# --- there and back ---


@each_model
@settings(max_examples=40)
@given(data=st.data())
def test_a_model_survives_elizaos_json(kind: type[Model], data: st.DataObject) -> None:
    before = data.draw(model(kind))
    written = before.to_dict()
    read = json.loads(json.dumps(written))
    assert read == written, "it is JSON and nothing else"
    after = kind.from_dict(read)
    assert type(after) is kind
    assert after == before
    assert after.to_dict() == written
    given_fields = {name for name in fields(kind) if getattr(before, name) is not None}
    assert set(written) == {camel(name) for name in given_fields}
    for name, text in fields(kind).items():
        if name in given_fields:
            value = written[camel(name)]
            if text == "UUID":
                assert value == str(getattr(before, name))
            elif text == "datetime":
                assert EPOCH + timedelta(milliseconds=value) == getattr(before, name)
                assert type(value) is int


@each_model
@settings(max_examples=20)
@given(data=st.data())
def test_keys_may_be_in_snake_case_and_values_in_python_form(kind: type[Model], data: st.DataObject) -> None:
    before = data.draw(model(kind))
    as_fields = {name: getattr(before, name) for name in fields(kind)}
    assert kind.from_dict(as_fields) == before
    written = before.to_dict()
    names = {camel(name): name for name in fields(kind)}
    mixed = {key if data.draw(st.booleans()) else names[key]: value for key, value in written.items()}
    assert kind.from_dict(mixed) == before


@each_model
@settings(max_examples=20)
@given(data=st.data())
def test_reading_changes_nothing_and_takes_models_and_mappings(kind: type[Model], data: st.DataObject) -> None:
    before = data.draw(model(kind))
    written = before.to_dict()
    untouched = copy.deepcopy(written)
    set_fields = {name: getattr(before, name) for name in fields(kind) if getattr(before, name) is not None}
    readings = [
        kind.read(before),
        kind.read(written),
        kind.read(MappingProxyType(written)),
        kind.read(OrderedDict(written)),
        kind.read(UserDict(written)),
    ]
    for reading in readings:
        assert set(reading) == set(set_fields)
        assert kind(**reading) == before
    assert written == untouched


@each_model
def test_a_model_has_slots_and_every_field_a_default(kind: type[Model]) -> None:
    empty = kind()
    with pytest.raises(AttributeError):
        empty.nonsense = 1  # type: ignore[attr-defined]
    assert kind.from_dict({}) == empty
    assert all(value in (0, False) for value in empty.to_dict().values())
    assert getattr(elizasql, kind.__name__) is kind
    assert kind.__doc__


def test_no_model_is_kept_from_the_users() -> None:
    assert {kind.__name__ for kind in Model.__subclasses__()} <= set(models.__all__)


@each_model
def test_none_is_taken_for_every_field(kind: type[Model]) -> None:
    for name in fields(kind):
        assert kind.read({name: None}) == kind.read({camel(name): None}) == {name: None}


# --- keys ---


@each_model
def test_a_key_that_no_field_has_is_refused_with_a_suggestion(kind: type[Model]) -> None:
    keys = {*fields(kind), *map(camel, fields(kind)), *kind._aliases}
    for name in fields(kind):
        for wrong in (name + "x", camel(name) + "_", name.upper(), name[:-1] + "0"):
            if wrong in keys or wrong in kind._ignored:
                continue
            with pytest.raises(ArgumentError, match=f"{kind.__name__} has no field '{re.escape(wrong)}'"):
                kind.from_dict({wrong: None})
    longest = max(map(camel, fields(kind)), key=len)
    with pytest.raises(ArgumentError, match=f"did you mean '{longest}'"):
        kind.from_dict({longest[:-1]: None})
    for odd in (5, None, (), "", "\ud800", "x" * 10_000, uuid4()):
        with pytest.raises(ArgumentError, match="has no field") as caught:
            kind.from_dict({odd: 1})  # type: ignore[dict-item]
        assert "did you mean" not in str(caught.value)


@each_model
def test_keys_that_elizaos_does_not_store_either_are_left_out(kind: type[Model]) -> None:
    for key in kind._ignored:
        assert kind.read({key: "anything"}) == {}
        assert key not in {*fields(kind), *map(camel, fields(kind))}


@each_model
def test_other_names_of_a_key_are_taken(kind: type[Model]) -> None:
    for alias, name in kind._aliases.items():
        id = uuid4()
        assert fields(kind)[name] == "UUID"
        assert kind.read({alias: str(id)}) == {name: id}
        assert kind.read({alias: str(id), name: id}) == {name: id}
        assert kind.read({alias: id, name: None}) == kind.read({name: None, alias: id}) == {name: id}


def test_two_values_for_one_field_are_refused() -> None:
    first, second = uuid4(), uuid4()
    for data in ({"roomId": first, "room_id": second}, {"room_id": str(first), "roomId": str(second)}):
        with pytest.raises(ArgumentError, match="two values for room_id"):
            Memory.from_dict(data)
    with pytest.raises(ArgumentError, match="two values for message_server_id"):
        World.from_dict({"serverId": first, "messageServerId": second})
    assert Memory.from_dict({"roomId": str(first).upper(), "room_id": first}) == Memory(room_id=first)
    assert Memory.from_dict({"createdAt": 0, "created_at": EPOCH}) == Memory(created_at=EPOCH)


# --- values ---

BAD_VALUES: dict[str, list[Any]] = {
    "UUID": ["nope", "", 5, b"x", [uuid4()]],
    "str": [5, b"x", ["x"], {}],
    "Key": [5, b"x", ["x"], {}, "x" * 1025],
    "bool": [1, 0, "true", [], 1.0],
    "int": [True, 1.0, "1", -1, 2**63],
    "MaxAttempts": [True, 1.0, "1", 0, 2**31],
    "float": [True, "1.0", [1.0], 1j, 10**400],
    "datetime": ["yesterday", datetime(2025, 1, 1), [0], True, float("nan"), 1e30],  # noqa: DTZ001
    "Embedding": [[0.0] * 384, [1.0], "x", {}],
    "dict[str, Any]": ["{}", [], 5, [("a", 1)]],
    "list[Any]": ["x", 5, {"a": 1}, b"x"],
    "list[str]": [5, [5], {"a": 1}, [None], b"x"],
    "list[Any] | str": [5, {"a": 1}, b"x"],
    "GoalStatus": ["done", "", 5, ["DONE"]],
    "RunStatus": ["STARTED", "", 5],
}


@each_model
def test_a_value_that_does_not_fit_its_field_is_refused(kind: type[Model]) -> None:
    for name, text in fields(kind).items():
        for bad in BAD_VALUES.get(text, []):
            for wrong in ({name: bad}, {camel(name): bad}, kind(**{name: bad})):
                with pytest.raises(ArgumentError, match=name):
                    kind.read(wrong)


@each_model
@pytest.mark.parametrize("value", [None, 5, "text", b"bytes", [], [("id", 1)], object()])
def test_what_is_no_mapping_is_refused(kind: type[Model], value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"expected {kind.__name__} or a mapping"):
        kind.read(value)
    other = Room if kind is not Room else World
    with pytest.raises(ArgumentError, match=f"not {other.__name__}"):
        kind.read(other())


def test_ids_and_times_are_taken_in_every_usual_form() -> None:
    id = UUID("01890a5d-ac96-774b-bcce-b302099a8057")
    for form in (id, str(id), str(id).upper(), id.hex):
        assert Room.from_dict({"id": form}).id == id
    moment = datetime(2025, 3, 1, 12, 30, 15, 250_000, tzinfo=timezone.utc)
    forms: list[Any] = [
        moment,
        moment.astimezone(timezone(timedelta(hours=9))),
        1740832215250,
        1740832215250.0,
        np.int64(1740832215250),
        np.float64(1740832215250),
        "2025-03-01T12:30:15.250Z",
        "2025-03-01T12:30:15.250+00:00",
        "2025-03-01T21:30:15.250+09:00",
    ]
    for form in forms:
        assert Room.from_dict({"createdAt": form}).created_at == moment
    assert Room.from_dict({"createdAt": 0}).created_at == EPOCH, "0 is a time"


@given(st.datetimes(min_value=datetime(1, 1, 2), max_value=datetime(9999, 12, 30), timezones=st.just(timezone.utc)))  # noqa: DTZ001
def test_the_milliseconds_are_those_that_have_passed(moment: datetime) -> None:
    milliseconds = Room(created_at=moment).to_dict()["createdAt"]
    back = Room.from_dict({"createdAt": milliseconds}).created_at
    assert back is not None
    assert timedelta(0) <= moment - back < timedelta(milliseconds=1)


def test_a_time_without_its_zone_has_no_milliseconds() -> None:
    with pytest.raises(ArgumentError, match=r"must have a time zone, as datetime.now\(timezone.utc\) has"):
        Room(created_at=datetime(2025, 1, 1)).to_dict()  # noqa: DTZ001


def test_one_text_stands_for_a_list_of_one() -> None:
    assert Entity.from_dict({"names": "Ann"}).names == ["Ann"]
    assert Agent.from_dict({"bio": "A poet."}).bio == ["A poet."]
    assert Entity.from_dict({"names": ("Ann", "Bob")}).names == ["Ann", "Bob"]
    with pytest.raises(ArgumentError, match="topics"):
        Agent.from_dict({"topics": "tea"})


def test_texts_are_cleaned_on_the_way_in() -> None:
    assert Room.from_dict({"name": "a\x00\ud83d\ude00\ud800"}).name == "a\ufffd\U0001f600\ufffd"
    assert Entity.from_dict({"names": ["\x00"]}).names == ["\ufffd"]


def test_what_elizaos_sends_is_understood() -> None:
    ids = [uuid4() for _ in range(4)]
    sent = json.loads(
        json.dumps(
            {
                "id": str(ids[0]),
                "entityId": str(ids[1]),
                "agentId": str(ids[2]),
                "roomId": str(ids[3]),
                "createdAt": 1740832215250,
                "content": {"text": "Hello", "source": "discord", "attachments": [], "inReplyTo": str(ids[0])},
                "metadata": {"type": "message", "tags": ["greeting"], "timestamp": 1740832215250},
                "embedding": [0.25] * 384,
                "unique": True,
                "similarity": 0.75,
                "sessionId": "s",
                "sessionKey": "k",
            }
        )
    )
    memory = Memory.from_dict(sent)
    assert (memory.id, memory.entity_id, memory.agent_id, memory.room_id) == tuple(ids)
    assert memory.created_at == datetime(2025, 3, 1, 12, 30, 15, 250_000, tzinfo=timezone.utc)
    assert memory.content == sent["content"]
    assert isinstance(memory.embedding, np.ndarray)
    assert memory.embedding.dtype == np.float32
    assert memory.to_dict() == {key: value for key, value in sent.items() if not key.startswith("session")}
    room = Room.from_dict(
        {"id": str(ids[0]), "type": "GROUP", "source": "discord", "channelId": "9", "serverId": ids[1]}
    )
    assert room == Room(id=ids[0], type="GROUP", source="discord", channel_id="9", message_server_id=ids[1])
    agent = Agent.from_dict(
        {
            "id": ids[0],
            "name": "Ada",
            "status": "active",
            "messageExamples": [[{"name": "a"}]],
            "templates": {"reply": "{{text}}"},
            "secrets": {"KEY": "s"},
            "advancedMemory": True,
            "advancedPlanning": False,
        }
    )
    assert agent == Agent(id=ids[0], name="Ada", message_examples=[[{"name": "a"}]])
    participant = Participant.from_dict({"id": str(ids[0]), "entity": {"id": str(ids[1]), "names": ["Ann"]}})
    assert participant.entity == Entity(id=ids[1], names=["Ann"])


# --- memories and their embeddings ---

VECTOR = np.arange(1, 385, dtype=np.float32)


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        (None, None, True),
        (VECTOR, VECTOR, True),
        (VECTOR, VECTOR.copy(), True),
        (VECTOR, VECTOR[::-1][::-1], True),
        (VECTOR, VECTOR.astype(">f4"), True),
        (VECTOR, VECTOR.tolist(), True),
        (VECTOR, None, False),
        (VECTOR, VECTOR + 1, False),
        (VECTOR, np.append(VECTOR[:-1], np.float32(0)), False),
        (VECTOR, VECTOR[:-1], False),
        (VECTOR, np.ones(768, np.float32), False),
        (VECTOR, [1.0], False),
        (VECTOR, [], False),
    ],
)
def test_memories_are_equal_when_their_embeddings_are(left: Any, right: Any, equal: bool) -> None:
    id = uuid4()
    first, second = Memory(id=id, embedding=left), Memory(id=id, embedding=right)
    assert (first == second) is equal
    assert (second == first) is equal
    assert (first != second) is not equal
    assert ([first] == [second]) is equal


def test_memories_are_compared_by_every_field() -> None:
    full = Memory(
        id=uuid4(),
        entity_id=uuid4(),
        agent_id=uuid4(),
        room_id=uuid4(),
        world_id=uuid4(),
        type="messages",
        content={"text": "x", "list": [1, {"a": 2}]},
        metadata={"a": 1},
        unique=True,
        created_at=EPOCH,
        embedding=VECTOR,
        similarity=0.5,
    )
    assert full == copy.deepcopy(full)
    assert full != Memory()
    for field in fields(Memory):
        other = copy.copy(full)
        setattr(other, field, None)
        assert full != other, field
        assert other != full, field
    for stranger in (None, 5, "memory", Room(), full.to_dict(), object()):
        assert full != stranger
    with pytest.raises(TypeError, match="unhashable"):
        hash(full)


@pytest.mark.parametrize(
    "value", [VECTOR, VECTOR.tolist(), tuple(VECTOR), VECTOR.astype(">f8"), pgvector.Vector(VECTOR)]
)
def test_an_embedding_is_read_as_float32(value: Any) -> None:
    memory = Memory.from_dict({"embedding": value})
    assert memory == Memory(embedding=VECTOR)
    assert Memory.read(Memory(embedding=value))["embedding"].dtype == np.float32
    assert json.loads(json.dumps(memory.to_dict())) == {"embedding": VECTOR.tolist()}


def test_an_embedding_that_no_agent_can_have_is_refused() -> None:
    bad: list[Mapping[str, Any] | Memory] = [{"embedding": [0.0] * 384}, Memory(embedding=VECTOR[:-1])]
    for value in bad:
        with pytest.raises(EmbeddingError, match="embedding"):
            Memory.read(value)
