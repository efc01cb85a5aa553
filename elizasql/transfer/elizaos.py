"""Taking over a database that @elizaos/plugin-sql 1.6 to 2.0 wrote.

The original's tables are in the schema public and ours in elizasql: both may be in one database. Ids, JSON and times
stay as they are. What an agent's rows point at and another agent owns is copied, since here every agent has its own.
Vectors are those of the width of each agent's newest one; a memory whose vector has another width, or none that can be
searched, is taken without it. Whatever is left out or altered is reported, row by row.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import asyncpg
import orjson

from elizasql import DatabaseAdapter, _codecs
from elizasql._statements import SQL, Statement, Statements, find_folder
from elizasql.config import Config
from elizasql.errors import ConfigurationError, EmbeddingError, PermissionDeniedError
from elizasql.types import DIMENSIONS

from ._connection import Snapshot, snapshot
from ._rows import Refused, Summary, put_lines, put_replies, refuse_missing
from .export import Advance, _silent
from .importer import put_vectors

_CHUNK = 1000
_NEEDED = {"agents", "rooms", "entities", "memories", "embeddings"}
# Which table of ours a statement fills, in this order; a statement whose table the source lacks is left out.
_READS = (
    ("servers", "read_servers", "servers"),
    ("servers", "read_owners", "owners"),
    ("agents", "read_agents", "agents"),
    ("worlds", "read_worlds", "worlds"),
    ("rooms", "read_rooms", "rooms"),
    ("entities", "read_entities", "entities"),
    ("participants", "read_participants", "participants"),
    ("components", "read_components", "components"),
    ("relationships", "read_relationships", "relationships"),
    ("memories", "read_memories", "memories"),
    ("cache", "read_cache", "cache"),
    ("tasks", "read_tasks", "tasks"),
    ("logs", "read_logs", "logs"),
    ("pairing_requests", "read_pairing_requests", "pairing_requests"),
    ("pairing_allowlist", "read_pairing_allowlist", "pairing_allowlist"),
    ("message_servers", "read_message_servers", "message_servers"),
    ("message_server_agents", "read_message_server_agents", "message_server_agents"),
    ("message_server_agents", "read_server_agents", "server_agents"),
    ("channels", "read_channels", "channels"),
    ("channel_participants", "read_channel_participants", "channel_participants"),
    ("central_messages", "read_central_messages", "central_messages"),
)
# Where a missing id is looked for, and with which statement.
_COPIES = {
    "world_id": ("worlds", "copy_worlds"),
    "room_id": ("rooms", "copy_rooms"),
    "entity_id": ("entities", "copy_entities"),
    "source_entity_id": ("entities", "copy_entities"),
    "target_entity_id": ("entities", "copy_entities"),
}


@functools.cache
def reads() -> Statements:
    """Give the statements for the original's tables; they cannot be prepared on ours, and are loaded when needed."""
    return Statements(find_folder("sql") / "elizaos")


# Told of a row: the table, its JSON, what is the matter.
Tell = Callable[[str, bytes, object], None]


@dataclass(slots=True)
class Decisions:
    """What was found in the source and decided about it.

    Attributes:
        dimensions: The width of the vectors that are taken, of each agent that has any.
        found: How many vectors of which width each agent has.
        copied: Rows of other agents that became an agent's own, too, by table.
        left: Tables of the source that have no counterpart here, and about how many rows each has; None: nobody knows.
    """

    dimensions: dict[UUID, int] = field(default_factory=dict)
    found: dict[UUID, dict[int, int]] = field(default_factory=dict)
    copied: dict[str, int] = field(default_factory=dict)
    left: dict[str, int | None] = field(default_factory=dict)


async def import_elizaos(
    source: str,
    config: Config,
    db: DatabaseAdapter | None,
    *,
    agent_ids: Collection[UUID] | None = None,
    dimension: int | None = None,
    tell: Tell = _silent,
    advance: Advance = _silent,
) -> tuple[Summary, Decisions]:
    """Take over agents, or all of them, with everything that the original keeps.

    May be repeated, also after an interruption: what is there already stays as it is.

    Args:
        source: Connection string of the original's database. Its role must see all rows.
        config: Time limits for it.
        db: An adapter of the database that takes the rows, of whatever agent; None: only look, write nothing.
        agent_ids: Only these; messaging is shared and taken in any case.
        dimension: Take vectors of this width, whatever the newest are. An agent that is locked keeps its width.
        tell: Told of each row that is refused or altered.
        advance: Told how far it is.

    Raises:
        ArgumentError: An id is none.
        ConfigurationError: It is no database of the original.
        NotFoundError: There is no such agent in it.
        PermissionDeniedError: The role does not see all rows there.
    """
    async with open_elizaos(source, config, agent_ids=agent_ids, dimension=dimension) as taking:
        return await taking.run(db, tell, advance)


@asynccontextmanager
async def open_elizaos(
    source: str, config: Config, *, agent_ids: Collection[UUID] | None = None, dimension: int | None = None
) -> AsyncIterator[Taking]:
    """Connect to the source and see whether it is one, before anything is done to the database that takes the rows.

    Takes and raises what `import_elizaos` does.
    """
    given = None if agent_ids is None else _codecs.as_ids(agent_ids, "agent_ids")
    if dimension is not None and dimension not in DIMENSIONS:
        raise ConfigurationError(f"dimension must be one of {', '.join(map(str, DIMENSIONS))}")
    async with snapshot(source, config) as opened:
        taking = Taking(opened, given, dimension)
        await taking.look()
        yield taking


class Taking:
    """A source that is open. Made by `open_elizaos`; to be run once."""

    def __init__(self, source: Snapshot, agent_ids: list[UUID] | None, dimension: int | None) -> None:
        self._source = source
        self._agent_ids = agent_ids
        self._dimension = dimension
        self._db: DatabaseAdapter | None = None
        self._tell: Tell = _silent
        self._advance: Advance = _silent
        self._tables: set[str] = set()
        self._totals: dict[str, int] = {}
        self.summary: Summary = Summary()
        self.decisions: Decisions = Decisions()

    # --- what is there -----------------------------------------------------------------------------------------------

    async def look(self) -> None:
        """Look whether the tables and the agents are there."""
        rows = await self._source.fetch(reads()["list_source_tables"])
        tables = {row["name"]: row["estimate"] for row in rows}
        if missing := _NEEDED - set(tables):
            raise ConfigurationError(
                f"this is no database of ElizaOS's plugin-sql 1.6 to 2.0: there is no table public.{min(missing)}"
            )
        self._tables = set(tables)
        known = {table for _, _, table in _READS} | {"embeddings"}
        if hidden := sorted(known & {row["name"] for row in rows if row["is_hidden"]}):
            raise PermissionDeniedError(
                f"data isolation is on there, and row-level security hides rows of public.{', public.'.join(hidden)}: "
                "connect as a superuser or a role with BYPASSRLS"
            )
        self.decisions.left = {name: rows for name, rows in tables.items() if name not in known and rows != 0}
        if self._agent_ids is not None:
            agents = await self._source.fetch(reads()["find_agents"], agent_ids=self._agent_ids)
            refuse_missing(self._agent_ids, agents)

    async def _decide(self) -> None:
        """Look at the widths of the vectors."""
        if self._agent_ids is None:
            self._totals = dict((await self._source.fetch(reads()["count_rows"]))[0])
        rows = await self._source.fetch(reads()["find_dimensions"], agent_ids=self._agent_ids)
        for row in rows:
            agent = UUID(bytes=row["agent_id"].bytes)
            self.decisions.found.setdefault(agent, {})[row["dimension"]] = row["vectors"]
            if self._dimension is None:
                self.decisions.dimensions.setdefault(agent, row["dimension"])  # the newest comes first
            elif self._dimension == row["dimension"]:
                self.decisions.dimensions[agent] = self._dimension
        if self._db is not None:
            locked = await self._db._executor.fetch(SQL["get_dimensions_of"], agent_ids=list(self.decisions.found))
            for row in locked:
                if row["dimension"] is not None:
                    self.decisions.dimensions[UUID(bytes=row["id"].bytes)] = row["dimension"]

    def _params(self) -> dict[str, Any]:
        """Give what the statements ask for, each some of it."""
        return {
            "agent_ids": self._agent_ids,
            "agents": list(self.decisions.dimensions),
            "dimensions": list(self.decisions.dimensions.values()),
        }

    # --- rows --------------------------------------------------------------------------------------------------------

    async def run(self, db: DatabaseAdapter | None, tell: Tell, advance: Advance) -> tuple[Summary, Decisions]:
        """Take table after table; the arguments are those of `import_elizaos`."""
        self._db, self._tell, self._advance = db, tell, advance
        await self._decide()
        for table, name, source in _READS:
            if source in self._tables:
                async for lines in self._read(table, reads()[name]):
                    if self._db is not None:
                        await put_lines(self._db, table, lines, self.summary, self._refuse, self._fetch)
                if table == "memories":
                    await self._vectors()
        if self._db is not None and "central_messages" in self._tables:
            statement = reads()["read_central_messages"]
            async for rows in self._source.stream(statement, _CHUNK):
                lines = [row["line"].encode() for row in rows if row["problem"] is None]
                await put_replies(self._db, lines, self.summary, self._refuse)
        return self.summary, self.decisions

    async def _read(self, table: str, statement: Statement) -> AsyncIterator[list[bytes]]:
        """Give the rows of the source that can be taken; tell of the others, and of what is altered."""
        summary = self.summary
        summary.read[table] += 0
        async for rows in self._source.stream(statement, _CHUNK, **self._params()):
            lines = []
            for row in rows:
                line = row["line"].encode()
                summary.read[table] += row["copies"]
                summary.folded[table] += row["copies"] - 1
                if row["problem"] is not None:
                    summary.refused[table] += 1
                    self._tell(table, line, row["problem"])
                    continue
                if row["note"] is not None:
                    summary.altered[table] += 1
                    self._tell(table, line, row["note"])
                lines.append(line)
            yield lines
            self._advance(table, summary.read[table], self._totals.get(table))

    def _refuse(self, table: str, line: bytes, why: Refused) -> None:
        self._tell(table, line, why)

    async def _fetch(self, table: str, wanting: list[Refused]) -> bool:
        """Copy what rows point at and another agent owns; True when there was something."""
        assert self._db is not None
        wanted: dict[tuple[str, str, UUID], set[UUID]] = {}
        for refused in wanting:
            if refused.problem in _COPIES and refused.agent_id is not None and refused.missing is not None:
                wanted.setdefault((*_COPIES[refused.problem], refused.agent_id), set()).add(refused.missing)
        found = False
        for (target, name, agent), ids in wanted.items():
            rows = await self._source.fetch(reads()[name], agent_id=agent, ids=sorted(ids))
            if rows and target != table:
                lines = [row["line"].encode() for row in rows]
                before = self.summary.created[target]
                self.summary.read[target] += len(lines)
                await put_lines(self._db, target, lines, self.summary, self._refuse, self._fetch)
                made = self.summary.created[target] - before
                self.decisions.copied[target] = self.decisions.copied.get(target, 0) + made
                found = found or made > 0
        return found

    # --- vectors -----------------------------------------------------------------------------------------------------

    async def _vectors(self) -> None:
        """Take one vector for each memory."""
        summary = self.summary
        summary.read["embeddings"] += 0
        async for rows in self._source.stream(reads()["read_embeddings"], _CHUNK, **self._params()):
            by_agent: dict[UUID, tuple[list[UUID], list[Any]]] = {}
            for row in rows:
                summary.read["embeddings"] += row["copies"]
                summary.folded["embeddings"] += row["copies"] - 1
                problem = self._judge(row)
                if problem is not None:
                    self._refuse_vector(row["memory_id"], row["agent_id"], row["widths"], problem)
                else:
                    ids, vectors = by_agent.setdefault(UUID(bytes=row["agent_id"].bytes), ([], []))
                    ids.append(row["memory_id"])
                    vectors.append(row["embedding"])
            for agent, (ids, vectors) in by_agent.items():
                if self._db is not None:
                    created, refused = await put_vectors(self._db, agent, ids, vectors)
                    summary.created["embeddings"] += created
                    for each in refused:
                        self._refuse_vector(ids[each.position], agent, str(len(vectors[0])), str(each))
            self._advance("embeddings", summary.read["embeddings"], self._totals.get("embeddings"))

    @staticmethod
    def _judge(row: asyncpg.Record) -> str | None:
        """Say why a vector cannot be taken."""
        if row["agent_id"] is None:
            return f"there is no memory {row['memory_id']}"
        if not row["widths"]:
            return "there is no vector in it"
        if row["embedding"] is None:
            wanted = "no width" if row["dimension"] is None else f"the width {row['dimension']}"
            return f"its width is {row['widths']}, for its agent {wanted} is taken"
        try:
            _codecs.as_embedding(row["embedding"])
        except EmbeddingError as error:
            return str(error)
        return None

    def _refuse_vector(self, memory_id: UUID | None, agent_id: UUID | None, widths: str, problem: str) -> None:
        self.summary.refused["embeddings"] += 1
        row = {"memory_id": memory_id and str(memory_id), "agent_id": agent_id and str(agent_id), "widths": widths}
        self._tell("embeddings", orjson.dumps(row), problem)
