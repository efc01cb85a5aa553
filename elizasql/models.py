"""What goes in and comes out: one slots dataclass per kind of row.

Fields stand in the order of the columns that the statements select, so that a row becomes an object by `Model(*row)`.
Every field has a default; what a method needs, it checks. Ids are UUIDs, times aware datetimes, embeddings float32
arrays: as such they come out, and a type checker asks for them. At run time methods take more: an id or a time as
text, a time as milliseconds since 1970, as an embedding whatever converts to float32.

`from_dict` and `to_dict` speak ElizaOS's JSON: camelCase keys, times as milliseconds since 1970. Every method takes
such a mapping wherever it takes a model; snake_case keys are understood, too. A key that no field has is an error, so
that nothing is lost silently; but for a few that ElizaOS's objects carry and the original does not store either: of an
agent `status`, `templates`, `secrets`, `advancedMemory` and `advancedPlanning`, of a memory `sessionId` and
`sessionKey`. Arguments are never changed.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Any, ClassVar, TypeVar, get_args
from uuid import UUID

import numpy as np

from . import _codecs
from .errors import ArgumentError, show
from .types import JSON, Embedding, GoalStatus, Key, MaxAttempts, Objective, RunStatus

__all__ = [
    "MISSING",
    "Agent",
    "AgentRunCounts",
    "AgentRunSummary",
    "AgentRunSummaryResult",
    "Channel",
    "ChannelMessage",
    "Component",
    "Entity",
    "Goal",
    "LoadSummary",
    "Log",
    "Memory",
    "MessageServer",
    "Missing",
    "Model",
    "PairingAllowlistEntry",
    "PairingRequest",
    "Participant",
    "Relationship",
    "Room",
    "Task",
    "World",
]

M = TypeVar("M", bound="Model")


class Missing(Enum):
    """The type of `MISSING`."""

    MISSING = "MISSING"


MISSING = Missing.MISSING
"""Stands for no value at all, where None stands for JSON's null."""


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
        readers = _fields(cls)
        if isinstance(value, cls):
            row: dict[str, Any] = {}
            for name, read in readers.items():  # a quarter faster than as a comprehension
                item = getattr(value, name)
                if item is not None:
                    row[name] = read(item, name)
            return row
        if not isinstance(value, Mapping):
            raise ArgumentError(f"expected {cls.__name__} or a mapping, not {type(value).__name__}")
        given = cls._by_field(value)
        return {name: None if item is None else readers[name](item, name) for name, item in given.items()}

    @classmethod
    def _by_field(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        keys = _keys(cls)
        given: dict[str, Any] = {}
        for key, item in data.items():
            name = keys.get(key)
            if name is None:
                if key in cls._ignored:
                    continue
                near = difflib.get_close_matches(key, keys, n=1) if isinstance(key, str) else []
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ArgumentError(f"{cls.__name__} has no field {show(key)}{hint}")
            if given.get(name) is not None:
                if item is None:
                    continue
                read = _fields(cls)[name]
                if read(item, name) != read(given[name], name):
                    raise ArgumentError(f"{cls.__name__} has two values for {name}: under {key!r} and another key")
            given[name] = item
        return given

    def to_dict(self) -> dict[str, Any]:
        """Give ElizaOS's form: camelCase keys, ids as text, times in milliseconds; without the fields that are None."""
        return {
            _camel(field.name): _plain(value)
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) is not None
        }


@dataclass(slots=True)
class Agent(Model):
    """An agent: its character and settings. `name` is needed to create one.

    What is not said below is ElizaOS's character, stored as it is given.

    Attributes:
        id: Made when missing.
        bio: A text alone is stored as a list of one.
        settings: JSON object; updates are merged into it, key by key.
        enabled: True when missing; kept, and nothing here asks for it.
        server_id: The deployment that it belongs to, by which ElizaOS isolates rows; kept, and isolates nothing here.
        created_at, updated_at: Made by the server when missing; every change sets `updated_at`.
    """

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

    _ignored: ClassVar[frozenset[str]] = frozenset(
        {"status", "templates", "secrets", "advancedMemory", "advancedPlanning"}
    )


@dataclass(slots=True)
class World(Model):
    """A world: a server, a guild, a workspace; rooms are in it.

    Attributes:
        id: Made when missing.
        agent_id: The adapter's agent.
        name: Text; "" when missing.
        message_server_id: Of the messaging platform's server; it need not exist. ElizaOS's older key is `serverId`.
        metadata: JSON object.
        created_at: Made by the server when missing.
    """

    id: UUID | None = None
    agent_id: UUID | None = None
    name: str | None = None
    message_server_id: UUID | None = None
    metadata: dict[str, Any] | None = None
    created_at: datetime | None = None

    _aliases: ClassVar[Mapping[str, str]] = {"serverId": "message_server_id", "server_id": "message_server_id"}


@dataclass(slots=True)
class Room(Model):
    """A room: a channel, a thread, a direct conversation. `source` and `type` are needed to create one.

    Attributes:
        id: Made when missing.
        agent_id: The adapter's agent.
        name: Text.
        source: The platform, such as "discord" or "cli".
        type: The kind of room, such as "DM" or "GROUP".
        channel_id: Its name on the platform, any text.
        message_server_id: Of the messaging platform's server; it need not exist. ElizaOS's older key is `serverId`.
        world_id: The world that it is in; a world that is deleted leaves None.
        metadata: JSON object.
        created_at: Made by the server when missing.
    """

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
    """Somebody or something that the agent knows. `id` is needed to create one.

    Attributes:
        id: Given by the caller.
        agent_id: The adapter's agent.
        names: What it is called; searches by name look at all of them.
        metadata: JSON object.
        created_at: Made by the server when missing.
        components: Filled by reads that are asked for it, and not written: components have methods of their own.
    """

    id: UUID | None = None
    agent_id: UUID | None = None
    names: list[str] | None = None
    metadata: dict[str, Any] | None = None
    created_at: datetime | None = None
    components: list[Component] | None = None


@dataclass(slots=True)
class Component(Model):
    """What is known of an entity, by type. `entity_id`, `room_id` and `type` are needed to create one.

    Entity, type, world and source entity are its natural key: there is one component for each, None counts as a value.

    Attributes:
        id: Made when missing.
        agent_id: The adapter's agent.
        entity_id: Whom it is about.
        room_id: Where it was learned.
        world_id: In which world it holds.
        source_entity_id: Who said so.
        type: A name of the caller's choice, such as "profile"; at most 1,024 bytes.
        data: JSON object.
        created_at: Made by the server when missing.
    """

    id: UUID | None = None
    agent_id: UUID | None = None
    entity_id: UUID | None = None
    room_id: UUID | None = None
    world_id: UUID | None = None
    source_entity_id: UUID | None = None
    type: Key | None = None
    data: dict[str, Any] | None = None
    created_at: datetime | None = None


@dataclass(slots=True)
class Relationship(Model):
    """How one entity stands to another, in this direction. Both are needed to create one.

    Attributes:
        id: Made when missing.
        agent_id: The adapter's agent.
        source_entity_id, target_entity_id: From whom, to whom; there is one relationship for each such pair.
        tags: Texts.
        metadata: JSON object.
        created_at: Made by the server when missing.
    """

    id: UUID | None = None
    agent_id: UUID | None = None
    source_entity_id: UUID | None = None
    target_entity_id: UUID | None = None
    tags: list[str] | None = None
    metadata: dict[str, Any] | None = None
    created_at: datetime | None = None


@dataclass(slots=True)
class Participant(Model):
    """An entity's membership in a room, from one agent's view.

    Attributes:
        id: Of the membership.
        agent_id: The adapter's agent.
        room_id: Where.
        entity_id: Who.
        room_state: How the agent follows the entity there: "FOLLOWED", "MUTED" or None.
        metadata: JSON object.
        created_at: Since when.
        entity: Who, as a whole; filled by `get_participants_for_entity` and its plural.
    """

    id: UUID | None = None
    agent_id: UUID | None = None
    room_id: UUID | None = None
    entity_id: UUID | None = None
    room_state: str | None = None
    metadata: dict[str, Any] | None = None
    created_at: datetime | None = None
    entity: Entity | None = None


@dataclass(slots=True, eq=False)
class Memory(Model):
    """A memory.

    Attributes:
        id: Made when missing.
        entity_id: Who said or did it.
        agent_id: The adapter's agent; another one is refused.
        room_id: Where.
        world_id: In which world.
        type: The `table_name`, such as "messages"; at most 1,024 bytes.
        content: JSON object; its "text" is what `text_contains`, `get_cached_embeddings` and `reembed` read.
        metadata: JSON object; of type "document" with `timestamp`, of type "fragment" with `documentId` and `position`.
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
    type: Key | None = None
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
        return all(_same(getattr(self, name), getattr(other, name)) for name in _fields(Memory))

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class LoadSummary:
    """What `load_memories` did.

    Attributes:
        loaded: Memories that it stored.
        skipped: Memories that were there already, or came twice.
        indexed: Vectors that it brought into the HNSW index; those that had waited in the agent's tail are among them.
        seconds: How long it took.
    """

    loaded: int
    skipped: int
    indexed: int
    seconds: float


@dataclass(slots=True)
class MessageServer(Model):
    """A server that messages pass through: a guild, a workspace. `name` and `source_type` are needed to create one.

    Attributes:
        id: Made when missing.
        name: Text.
        source_type: The platform, such as "discord".
        source_id: Its name there.
        metadata: JSON object.
        created_at, updated_at: Made by the server when missing.
    """

    id: UUID | None = None
    name: str | None = None
    source_type: str | None = None
    source_id: str | None = None
    metadata: dict[str, Any] | None = None
    created_at: datetime | None = None
    updated_at: datetime | None = None


@dataclass(slots=True)
class Channel(Model):
    """A channel of a message server. `message_server_id`, `name` and `type` are needed to create one.

    Attributes:
        id: Made when missing.
        message_server_id: The server; the channel is deleted with it. ElizaOS's older key is `serverId`.
        name: Text.
        type: The kind of channel, such as "DM" or "GROUP".
        source_type, source_id: The platform, and the channel's name there.
        topic: Text.
        metadata: JSON object.
        created_at, updated_at: Made by the server when missing.
    """

    id: UUID | None = None
    message_server_id: UUID | None = None
    name: str | None = None
    type: str | None = None
    source_type: str | None = None
    source_id: str | None = None
    topic: str | None = None
    metadata: dict[str, Any] | None = None
    created_at: datetime | None = None
    updated_at: datetime | None = None

    _aliases: ClassVar[Mapping[str, str]] = {"serverId": "message_server_id", "server_id": "message_server_id"}


@dataclass(slots=True)
class ChannelMessage(Model):
    """A message in a channel, not to be confused with a memory of type "messages", which is one agent's view of it.

    `channel_id`, `author_id` and `content` are needed to create one.

    Attributes:
        id: Made when missing. ElizaOS's other key is `messageId`.
        channel_id: The channel; the message is deleted with it.
        author_id: A user of the platform, who need not be an entity of any agent.
        content: The text.
        raw_message: The message as the platform gave it, any JSON.
        in_reply_to_root_message_id: The message that it answers; one that is deleted leaves None.
        source_type, source_id: The platform, and the message's name there.
        metadata: JSON object.
        created_at, updated_at: Made by the server when missing.
    """

    id: UUID | None = None
    channel_id: UUID | None = None
    author_id: UUID | None = None
    content: str | None = None
    raw_message: JSON | None = None
    in_reply_to_root_message_id: UUID | None = None
    source_type: str | None = None
    source_id: str | None = None
    metadata: dict[str, Any] | None = None
    created_at: datetime | None = None
    updated_at: datetime | None = None

    _aliases: ClassVar[Mapping[str, str]] = {"messageId": "id", "message_id": "id"}


@dataclass(slots=True)
class PairingRequest(Model):
    """Somebody's wish to write to the agent. `channel`, `sender_id` and `code` are needed to create one.

    Attributes:
        id: Made when missing.
        agent_id: The adapter's agent.
        channel: The platform, such as "telegram"; no `Channel`.
        sender_id: Who asks, by the platform's name for them; once in a channel.
        code: What the sender shows to the agent's owner; once in a channel. Each of the three has at most 1,024 bytes.
        metadata: JSON object.
        created_at, last_seen_at: Made by the server when missing.
    """

    id: UUID | None = None
    agent_id: UUID | None = None
    channel: Key | None = None
    sender_id: Key | None = None
    code: Key | None = None
    metadata: dict[str, Any] | None = None
    created_at: datetime | None = None
    last_seen_at: datetime | None = None


@dataclass(slots=True)
class PairingAllowlistEntry(Model):
    """Somebody who may write to the agent. `channel` and `sender_id` are needed to create one.

    Attributes:
        id: Made when missing.
        agent_id: The adapter's agent.
        channel, sender_id: As in a `PairingRequest`; a sender is once in a channel.
        metadata: JSON object.
        created_at: Made by the server when missing.
    """

    id: UUID | None = None
    agent_id: UUID | None = None
    channel: Key | None = None
    sender_id: Key | None = None
    metadata: dict[str, Any] | None = None
    created_at: datetime | None = None


@dataclass(slots=True)
class Task(Model):
    """Something to do later. `name` is needed to create one.

    Workers take the tasks that are tagged "queue". The fields from `ready_at` on, except `max_attempts`, are kept by
    the claims; `create_task` and `update_task` do not write them.

    Attributes:
        id: Made when missing.
        agent_id: The adapter's agent.
        name: Of what is to be done; workers choose by it. At most 1,024 bytes.
        description: Text.
        room_id, world_id, entity_id: What it is about; they need not exist.
        tags: Texts.
        metadata: JSON object.
        created_at, updated_at: Made by the server when missing. A claim does not count as an update.
        due_at: Not before this time; None: at once.
        ready_at: From when on a worker may take it: it is due, the lease of a claim or the pause after a failure ends.
            A `due_at` that was set during the claim, and is later than the end of its lease, counts as well.
        attempts: Claims so far.
        max_attempts: With so many the task is dead: it stays, and no worker takes it any more.
        claim_token: Of the newest claim, until it is ended.
        claimed_by: Who claimed it last.
        error: Of the last failure.
    """

    id: UUID | None = None
    agent_id: UUID | None = None
    name: Key | None = None
    description: str | None = None
    room_id: UUID | None = None
    world_id: UUID | None = None
    entity_id: UUID | None = None
    tags: list[str] | None = None
    metadata: dict[str, Any] | None = None
    created_at: datetime | None = None
    updated_at: datetime | None = None
    due_at: datetime | None = None
    ready_at: datetime | None = None
    attempts: int | None = None
    max_attempts: MaxAttempts | None = None
    claim_token: UUID | None = None
    claimed_by: str | None = None
    error: str | None = None


@dataclass(slots=True)
class Goal(Model):
    """What the agent wants to reach, in a room, for an entity, or for itself. `name` is needed to create one.

    Attributes:
        id: Made when missing.
        agent_id: The adapter's agent.
        room_id, entity_id: What it belongs to and is deleted with.
        name: Text.
        status: "IN_PROGRESS", "DONE" or "FAILED".
        objectives: The steps, each `{"id", "description", "completed"}`; an id that is missing is made.
        created_at, updated_at: Made by the server when missing.
    """

    id: UUID | None = None
    agent_id: UUID | None = None
    room_id: UUID | None = None
    entity_id: UUID | None = None
    name: str | None = None
    status: GoalStatus | None = None
    objectives: list[Objective] | None = None
    created_at: datetime | None = None
    updated_at: datetime | None = None

    _aliases: ClassVar[Mapping[str, str]] = {"userId": "entity_id", "user_id": "entity_id"}


@dataclass(slots=True)
class Log(Model):
    """Something that happened. `entity_id`, `room_id`, `type` and `body` are needed to create one.

    Attributes:
        id: Made when missing.
        agent_id: The adapter's agent.
        entity_id: Who did it.
        room_id: Where.
        type: Such as "action", "evaluator", "useModel:TEXT_LARGE" or "run_event"; at most 1,024 bytes.
        body: JSON object; `body["runId"]` is the run that it belongs to.
        created_at: When; made by the server when missing.
    """

    id: UUID | None = None
    agent_id: UUID | None = None
    entity_id: UUID | None = None
    room_id: UUID | None = None
    type: Key | None = None
    body: dict[str, Any] | None = None
    created_at: datetime | None = None


@dataclass(slots=True)
class AgentRunCounts(Model):
    """How often what happened in a run."""

    actions: int = 0
    model_calls: int = 0
    errors: int = 0
    evaluators: int = 0


@dataclass(slots=True)
class AgentRunSummary(Model):
    """A run, as its logs tell.

    Attributes:
        run_id: As in the logs' bodies.
        status: "completed", "timeout" or "error" by the latest event that says so; "started" before.
        started_at: Of the first event "started"; None when there is none.
        ended_at: Of the latest terminal event.
        duration_ms: Between the two, not below 0.
        message_id: The first that an event names, as text.
        room_id, entity_id: Of the first event.
        metadata: The first that an event carries.
        counts: Of all logs of the run.
    """

    run_id: str | None = None
    status: RunStatus | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    duration_ms: int | None = None
    message_id: str | None = None
    room_id: UUID | None = None
    entity_id: UUID | None = None
    metadata: dict[str, Any] | None = None
    counts: AgentRunCounts | None = None


@dataclass(slots=True)
class AgentRunSummaryResult(Model):
    """A page of runs.

    Attributes:
        runs: Those that started last come first.
        total: All that match, whatever the page.
        has_more: Whether some come after this page.
    """

    runs: list[AgentRunSummary] | None = None
    total: int = 0
    has_more: bool = False


# --- how a field is checked ------------------------------------------------------------------------------------------


def _read_object(value: object, name: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    if not isinstance(value, Mapping):
        raise ArgumentError(f"{name} must be a mapping, not {type(value).__name__}")
    return dict(value)


def _read_list(value: object, name: str) -> list[Any]:
    return value if isinstance(value, list) else list(_codecs.as_collection(value, f"{name} must be a list"))


def _read_texts(value: object, name: str) -> list[str]:
    # One name alone is as common as a list of names.
    items = [value] if isinstance(value, str) else _read_list(value, name)
    return [_codecs.as_text(item, name) for item in items]


def _read_bio(value: object, name: str) -> list[Any]:
    return [value] if isinstance(value, str) else _read_list(value, name)


def _read_number(value: Any, name: str) -> float:
    if not _codecs.is_number(value):
        raise ArgumentError(f"{name} must be a number, not {show(value, 40)}")
    try:
        return float(value)
    except OverflowError:
        raise ArgumentError(f"{name} is a number beyond what a float holds") from None


def _read_max_attempts(value: object, name: str) -> int:
    number = _codecs.as_count(value, name, least=1)
    if number >= 2**31:
        raise ArgumentError(f"{name} must be below 2**31, what an integer holds")
    return number


def _one(kind: type[M]) -> Callable[[Any, str], M]:
    def read(value: Any, name: str) -> M:  # noqa: ARG001 - the error names the key that is wrong
        return value if isinstance(value, kind) else kind.from_dict(value)

    return read


def _many(kind: type[M]) -> Callable[[Any, str], list[M]]:
    read = _one(kind)
    return lambda value, name: [read(item, name) for item in _read_list(value, name)]


def _one_of(*allowed: str) -> Callable[[Any, str], str]:
    return lambda value, name: _codecs.as_choice(value, allowed, name)


def _read_objectives(value: object, name: str) -> list[Objective]:
    """Check the steps of a goal and make the ids that are missing; what else a step carries is kept."""
    read: dict[str, Objective] = {}
    for position, item in enumerate(_read_list(value, name)):
        where = f"{name}[{position}]"
        given = _read_object(item, where)
        step = {
            **given,
            "id": _read_step_id(given.get("id"), f"{where}.id"),
            "description": _codecs.as_text(given.get("description"), f"{where}.description"),
            "completed": _codecs.as_bool(given.get("completed", False), f"{where}.completed"),
        }
        if step["id"] in read:
            raise ArgumentError(f"{where}.id is there twice: {show(step['id'])}")
        read[step["id"]] = step
    return list(read.values())


def _read_step_id(id: object, name: str) -> str:
    if id is None or isinstance(id, UUID):
        return str(id or _codecs.new_id())
    return _codecs.as_text(str(_codecs.as_count(id, name)) if isinstance(id, int) else id, name, empty=False)


def _read_json(value: object, name: str) -> Any:  # noqa: ARG001 - what JSON cannot hold is found when it is encoded
    return value


_READERS: dict[str, Callable[[Any, str], Any]] = {
    "UUID": _codecs.as_id,
    "str": _codecs.as_text,
    "Key": _codecs.as_key,
    "bool": _codecs.as_bool,
    "int": _codecs.as_count,
    "MaxAttempts": _read_max_attempts,
    "datetime": _codecs.as_time,
    "Embedding": _codecs.as_embedding,
    "dict[str, Any]": _read_object,
    "list[Any]": _read_list,
    "list[str]": _read_texts,
    "list[Any] | str": _read_bio,
    "float": _read_number,
    "JSON": _read_json,
    "Entity": _one(Entity),
    "list[Component]": _many(Component),
    "GoalStatus": _one_of(*get_args(GoalStatus)),
    "RunStatus": _one_of(*get_args(RunStatus)),
    "list[Objective]": _read_objectives,
    "AgentRunCounts": _one(AgentRunCounts),
    "list[AgentRunSummary]": _many(AgentRunSummary),
}


# Both are filled on first use: a class's fields are known only after its decorator ran.
_FIELDS: dict[type[Model], dict[str, Callable[[Any, str], Any]]] = {}
_KEYS: dict[type[Model], dict[str, str]] = {}


def _fields(cls: type[Model]) -> dict[str, Callable[[Any, str], Any]]:
    if cls not in _FIELDS:
        # With postponed evaluation a field's type is its text; the table above is the closed list of them.
        _FIELDS[cls] = {
            field.name: _READERS[str(field.type).removesuffix(" | None")] for field in dataclasses.fields(cls)
        }
    return _FIELDS[cls]


def _keys(cls: type[Model]) -> dict[str, str]:
    if cls not in _KEYS:
        names = _fields(cls)
        _KEYS[cls] = {**cls._aliases, **{_camel(name): name for name in names}, **{name: name for name in names}}
    return _KEYS[cls]


def _camel(name: str) -> str:
    return re.sub(r"_([a-z])", lambda match: match[1].upper(), name)


def _same(mine: Any, others: Any) -> bool:
    # An array compares itself with anything component by component, from either side.
    if isinstance(mine, np.ndarray) or isinstance(others, np.ndarray):
        return np.array_equal(mine, others)
    return bool(mine == others)


def _plain(value: Any) -> Any:
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, datetime):
        # Whole milliseconds, without the float of timestamp(), which is off by one in rare cases.
        return (_codecs.as_time(value, "a time") - _EPOCH) // _MILLISECOND
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Model):
        return value.to_dict()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


_EPOCH = _codecs.as_time(0, "epoch")
_MILLISECOND = _codecs.as_time(1, "millisecond") - _EPOCH
