"""Rows on their way into the tables: what goes where, in which order, and what was refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import asyncpg

from elizasql import DatabaseAdapter
from elizasql._statements import SQL, Statement
from elizasql.errors import NotFoundError


@dataclass(frozen=True, slots=True)
class Table:
    """A table that is moved as JSON lines.

    Attributes:
        name: Without the schema.
        exports, imports: Its statements in sql/transfer.sql.
        shared: Whether its rows belong to no agent.
    """

    name: str
    exports: str
    imports: str
    shared: bool = False


# Each after those that it points at. Embeddings come after memories, in a form of their own.
TABLES = (
    Table("servers", "export_servers", "import_servers", shared=True),
    Table("agents", "export_agents", "import_agents"),
    Table("worlds", "export_worlds", "import_worlds"),
    Table("rooms", "export_rooms", "import_rooms"),
    Table("entities", "export_entities", "import_entities"),
    Table("participants", "export_participants", "import_participants"),
    Table("components", "export_components", "import_components"),
    Table("relationships", "export_relationships", "import_relationships"),
    Table("memories", "export_memories", "import_memories"),
    Table("cache", "export_cache", "import_cache"),
    Table("tasks", "export_tasks", "import_tasks"),
    Table("goals", "export_goals", "import_goals"),
    Table("logs", "export_logs", "import_logs"),
    Table("pairing_requests", "export_pairing_requests", "import_pairing_requests"),
    Table("pairing_allowlist", "export_pairing_allowlist", "import_pairing_allowlist"),
    Table("message_servers", "export_message_servers", "import_message_servers", shared=True),
    Table("message_server_agents", "export_message_server_agents", "import_message_server_agents", shared=True),
    Table("channels", "export_channels", "import_channels", shared=True),
    Table("channel_participants", "export_channel_participants", "import_channel_participants", shared=True),
    Table("central_messages", "export_central_messages", "import_central_messages", shared=True),
)
BY_NAME = {table.name: table for table in TABLES}

PROBLEMS = {
    "agent_id": "there is no agent {}",
    "room_id": "there is no room {}",
    "entity_id": "there is no entity {}",
    "source_entity_id": "there is no entity {}",
    "target_entity_id": "there is no entity {}",
    "world_id": "there is no world {}",
    "memory_id": "there is no memory {}",
    "message_server_id": "there is no message server {}",
    "channel_id": "there is no channel {}",
    "fragment": "it is a fragment and its metadata lacks documentId or position",
    "document": "it is a document and its metadata lacks timestamp",
    "place": "another row has its place",
    "reply": "there is no message {} that it answers",
}


@dataclass(frozen=True, slots=True)
class Refused:
    """A row that could not be taken.

    Attributes:
        position: In the batch.
        problem: A key of PROBLEMS.
        missing: The id that it points at, where there is nothing.
        agent_id: Whose it is, of what points at rows of its own agent.
    """

    position: int
    problem: str
    missing: UUID | None
    agent_id: UUID | None

    def __str__(self) -> str:
        said = PROBLEMS[self.problem]
        return f"{self.problem} is missing" if "{}" in said and self.missing is None else said.format(self.missing)


@dataclass(slots=True)
class Summary:
    """What an import did, by table.

    Attributes:
        read: Rows that were looked at.
        created: Rows that are new.
        refused: Rows that could not be taken; each stands in the report.
        folded: Rows that say what another row says, too.
        altered: Rows that were taken without something; each stands in the report.
    """

    read: Counter[str] = field(default_factory=Counter)
    created: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    folded: Counter[str] = field(default_factory=Counter)
    altered: Counter[str] = field(default_factory=Counter)

    def rows(self) -> list[dict[str, Any]]:
        """Give one row a table; `kept` are those that were there already."""
        return [
            {
                "table": name,
                "read": self.read[name],
                "created": self.created[name],
                "kept": self.read[name] - self.created[name] - self.refused[name] - self.folded[name],
                "folded": self.folded[name],
                "refused": self.refused[name],
                "altered": self.altered[name],
            }
            for name in self.read
        ]


def refuse_missing(asked: Collection[UUID] | None, agents: Iterable[asyncpg.Record]) -> None:
    """Refuse agents that are asked for and not among those that were found."""
    if missing := set(asked or ()) - {agent["id"] for agent in agents}:
        raise NotFoundError(f"there is no agent {', '.join(sorted(map(str, missing)))}")


def as_array(lines: Sequence[bytes]) -> bytes:
    """Put lines of JSON together to one array, in the server's binary form of jsonb; nothing is decoded on the way."""
    return b"\x01[" + b",".join(lines) + b"]"


async def put(db: DatabaseAdapter, statement: Statement, **params: Any) -> tuple[int, list[Refused]]:
    """Run a statement that imports; give how many rows were created, and what was refused."""
    # A lost end is settled: a second run would find what the first one made, and count nothing as created.
    [row] = await db._executor.fetch_chunks(statement, [params], settle=True)
    return row["created"], [_read_refused(item) for item in row["refused"]]


def _read_refused(item: Mapping[str, Any]) -> Refused:
    missing, agent_id = item["missing"], item.get("agent_id")
    return Refused(item["position"], item["problem"], missing and UUID(missing), agent_id and UUID(agent_id))


# Told of a row that was refused, or taken without something: the table, its JSON line, and what is the matter.
Refuse = Callable[[str, bytes, Refused], None]
# Asked to bring what rows of a table lack; tells whether another try is worth it.
Fetch = Callable[[str, list[Refused]], Awaitable[bool]]


async def put_lines(
    db: DatabaseAdapter,
    table: str,
    lines: Sequence[bytes],
    summary: Summary,
    refuse: Refuse,
    fetch: Fetch | None = None,
) -> None:
    """Import rows of a table; what is refused goes to `refuse`, after `fetch` had its chance."""
    statement = SQL[BY_NAME[table].imports]
    created, refused = await put(db, statement, rows=as_array(lines))
    summary.created[table] += created
    doubted = True
    while refused:
        wanting = [each for each in refused if each.missing is not None]
        if fetch is None or not wanting or not await fetch(table, wanting):
            # A statement that waited for another import does not see the rows of that one, and takes their places for
            # taken; the next one does.
            if not doubted or all(each.problem != "place" for each in refused):
                break
            doubted = False
        lines = [lines[each.position] for each in refused]
        created, refused = await put(db, statement, rows=as_array(lines))
        summary.created[table] += created
    for each in refused:
        summary.refused[table] += 1
        refuse(table, lines[each.position], each)


async def put_replies(db: DatabaseAdapter, lines: Sequence[bytes], summary: Summary, refuse: Refuse) -> None:
    """Say of messages that were imported which one they answer; what answers nothing that is there goes to `refuse`."""
    _, refused = await put(db, SQL["import_replies"], rows=as_array(lines))
    for each in refused:
        summary.altered["central_messages"] += 1
        refuse("central_messages", lines[each.position], each)
