"""What goes in and comes out: one slots dataclass per kind of row.

Fields stand in the order of the columns that the statements select, so that a row becomes an object by `Model(*row)`.
Every field has a default; what a method needs, it checks. Ids are UUIDs (text is accepted), times are aware datetimes,
embeddings are float32 arrays.

`from_dict` and `to_dict` speak ElizaOS's JSON: camelCase keys, times as milliseconds since 1970. Every method takes such
a mapping wherever it takes a model; snake_case keys are understood, too. A key that no field has is an error, so that
nothing is lost silently. Arguments are never changed.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any, ClassVar, TypeVar
from uuid import UUID

import numpy as np

from . import _codecs
from .errors import ArgumentError
from .types import Embedding

__all__ = ["Agent", "Entity", "Memory", "Model", "Participant", "Room", "World"]

M = TypeVar("M", bound="Model")


@dataclass(slots=True)
class Model:
    """Base of the models: the way from and to ElizaOS's JSON."""

    # Keys that ElizaOS's objects carry and the original does not store either.
    _ignored: ClassVar[frozenset[str]] = frozenset()
    # Other names of a key.
    _aliases: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def from_dict(cls: type[M], data: Mapping[str, Any]) -> M:
        """Make a model of a mapping in ElizaOS's form.

        Raises:
            ArgumentError: A key that no field has, or a value that does not fit the field.
        """
        return cls(**cls.read(data))

    @classmethod
    def read(cls, value: object) -> dict[str, Any]:
        """Give the fields that a model or mapping sets, checked: of a mapping its keys, of a model what is not None."""
        if isinstance(value, cls):
            given = {name: getattr(value, name) for name in _fields(cls) if getattr(value, name) is not None}
        elif isinstance(value, Mapping):
            given = cls._by_field(value)
        else:
            raise ArgumentError(f"expected {cls.__name__} or a mapping, not {type(value).__name__}")
        readers = _fields(cls)
        return {name: readers[name](item, name) for name, item in given.items()}

    @classmethod
    def _by_field(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        keys = _keys(cls)
        given: dict[str, Any] = {}
        for key, item in data.items():
            name = keys.get(key)
            if name is None:
                if key in cls._ignored:
                    continue
                near = difflib.get_close_matches(str(key), keys, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ArgumentError(f"{cls.__name__} has no field {key!r}{hint}")
            if name in given and item is None:
                continue
            given[name] = item
        return given

    def to_dict(self) -> dict[str, Any]:
        """Give ElizaOS's form: camelCase keys, ids as text, times in milliseconds; fields that are None are left out."""
        return {
            _camel(field.name): _plain(value)
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) is not None
        }


@dataclass(slots=True)
class Agent(Model):
    """An agent: its character and settings. `name` is needed to create one."""

    id: UUID | None = None
    name: str | None = None
    username: str | None = None
    system: str | None = None
    bio: list[Any] | str | None = None
    message_examples: list[Any] | None = None
    post_examples: list[Any] | None = None
    topics: list[Any] | None = None
    adjectives: list[Any] | None = None
    knowledge: list[Any] | None = None
    plugins: list[Any] | None = None
    settings: dict[str, Any] | None = None
    style: dict[str, Any] | None = None
    enabled: bool | None = None
    server_id: UUID | None = None
    created_at: datetime | None = None
    updated_at: datetime | None = None

    _ignored: ClassVar[frozenset[str]] = frozenset({"status", "templates", "secrets"})


@dataclass(slots=True)
class World(Model):
    """A world: a server, a guild, a workspace; rooms are in it."""

    id: UUID | None = None
    agent_id: UUID | None = None
    name: str | None = None
    message_server_id: UUID | None = None
    metadata: dict[str, Any] | None = None
    created_at: datetime | None = None

    _aliases: ClassVar[Mapping[str, str]] = {"serverId": "message_server_id", "server_id": "message_server_id"}


@dataclass(slots=True)
class Room(Model):
    """A room: a channel, a thread, a direct conversation. `source` and `type` are needed to create one."""

    id: UUID | None = None
    agent_id: UUID | None = None
    name: str | None = None
    source: str | None = None
    type: str | None = None
    channel_id: str | None = None
    message_server_id: UUID | None = None
    world_id: UUID | None = None
    metadata: dict[str, Any] | None = None
    created_at: datetime | None = None

    _aliases: ClassVar[Mapping[str, str]] = {"serverId": "message_server_id", "server_id": "message_server_id"}


@dataclass(slots=True)
class Entity(Model):
    """Somebody or something that the agent knows. `id` is needed to create one."""

    id: UUID | None = None
    agent_id: UUID | None = None
    names: list[str] | None = None
    metadata: dict[str, Any] | None = None
    created_at: datetime | None = None


@dataclass(slots=True)
class Participant(Model):
    """An entity's membership in a room, from one agent's view."""

    id: UUID | None = None
    agent_id: UUID | None = None
    room_id: UUID | None = None
    entity_id: UUID | None = None
    room_state: str | None = None
    metadata: dict[str, Any] | None = None
    created_at: datetime | None = None


@dataclass(slots=True, eq=False)
class Memory(Model):
    """A memory.

    Attributes:
        id: Made when missing.
        entity_id: Who said or did it.
        agent_id: The adapter's agent; another one is refused.
        room_id: Where.
        world_id: In which world.
        type: The `table_name`, such as "messages".
        content: JSON object; `content["text"]` is what text search and the embedding cache read.
        metadata: JSON object.
        unique: False marks a near-duplicate. None on creation: decided by the store.
        created_at: When; made by the server when missing.
        embedding: float32[dimension]; filled in reads only when asked for.
        similarity: Cosine similarity, -1 to 1; filled by searches.
    """

    id: UUID | None = None
    entity_id: UUID | None = None
    agent_id: UUID | None = None
    room_id: UUID | None = None
    world_id: UUID | None = None
    type: str | None = None
    content: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    unique: bool | None = None
    created_at: datetime | None = None
    embedding: Embedding | None = None
    similarity: float | None = None

    _ignored: ClassVar[frozenset[str]] = frozenset({"sessionId", "sessionKey"})

    def __eq__(self, other: object) -> bool:
        """Compare field by field; embeddings by their components."""
        if not isinstance(other, Memory):
            return NotImplemented
        return all(
            np.array_equal(mine, others) if isinstance(mine, np.ndarray) else mine == others
            for mine, others in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        )

    __hash__ = None  # type: ignore[assignment]


# --- how a field is checked ------------------------------------------------------------------------------------------


def _read_object(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ArgumentError(f"{name} must be a mapping, not {type(value).__name__}")
    return value if isinstance(value, dict) else dict(value)


def _read_list(value: object, name: str) -> list[Any]:
    if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__iter__"):
        raise ArgumentError(f"{name} must be a list, not {type(value).__name__}")
    return value if isinstance(value, list) else list(value)


def _read_texts(value: object, name: str) -> list[str]:
    # One name alone is as common as a list of names.
    items = [value] if isinstance(value, str) else _read_list(value, name)
    return [_codecs.as_text(item, name) for item in items]


def _read_bio(value: object, name: str) -> list[Any]:
    return [value] if isinstance(value, str) else _read_list(value, name)


def _read_similarity(value: object, name: str) -> float:
    return float(value)  # type: ignore[arg-type]


_READERS: dict[str, Callable[[Any, str], Any]] = {
    "UUID": _codecs.as_id,
    "str": _codecs.as_text,
    "bool": _codecs.as_bool,
    "int": _codecs.as_count,
    "datetime": _codecs.as_time,
    "Embedding": _codecs.as_embedding,
    "dict[str, Any]": _read_object,
    "list[Any]": _read_list,
    "list[str]": _read_texts,
    "list[Any] | str": _read_bio,
    "float": _read_similarity,
}


def _optional(reader: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    return lambda value, name: None if value is None else reader(value, name)


@cache
def _fields(cls: type[Model]) -> dict[str, Callable[[Any, str], Any]]:
    # With postponed evaluation a field's type is its text; the table above is the closed list of them.
    return {
        field.name: _optional(_READERS[str(field.type).removesuffix(" | None")]) for field in dataclasses.fields(cls)
    }


@cache
def _keys(cls: type[Model]) -> dict[str, str]:
    keys = {_camel(name): name for name in _fields(cls)} | {name: name for name in _fields(cls)}
    return {**cls._aliases, **keys}


def _camel(name: str) -> str:
    return re.sub(r"_([a-z])", lambda match: match[1].upper(), name)


def _plain(value: Any) -> Any:
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, datetime):
        # Whole milliseconds, without the float of timestamp(), which is off by one in rare cases.
        return (value - _EPOCH) // _MILLISECOND
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value


_EPOCH = _codecs.as_time(0, "epoch")
_MILLISECOND = _codecs.as_time(1, "millisecond") - _EPOCH
