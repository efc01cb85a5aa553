"""Agents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any
from uuid import UUID

from . import _codecs
from ._statements import SQL
from ._store import Store, by_id, order_by_id
from .errors import ArgumentError, show
from .models import Agent

# What None cannot clear. Settings are removed by a None inside them.
_FIXED = ("name", "settings", "enabled", "created_at")

# No server has an older row, and PostgreSQL's times end at 4713 BC.
_LONGEST = timedelta(days=365 * 2000)


class Agents(Store):
    """Create, find, change and delete agents. Like messaging they are shared: any adapter may do so with any agent."""

    async def get_agent(self, agent_id: UUID | str, *, timeout: float | None = None) -> Agent | None:
        """Get an agent, None where there is none.

        Statement: sql/agents.sql get_agents_by_ids. Source: getAgent.
        """
        found = await self.get_agents_by_ids([agent_id])
        return found[0] if found else None

    async def get_agents_by_ids(self, agent_ids: Iterable[UUID | str], *, timeout: float | None = None) -> list[Agent]:
        """Get those of the agents that exist, in the order of the ids, each once.

        Statement: sql/agents.sql get_agents_by_ids. One round trip. Source: getAgentsByIds.
        """
        return await self._get_by_ids("get_agents_by_ids", Agent, agent_ids, "agent_ids")

    async def get_agents(
        self, limit: int | None = None, offset: int | None = None, *, timeout: float | None = None
    ) -> list[Agent]:
        """Get all agents, oldest first; equal times are ordered by id.

        Args:
            limit: At most so many; None: all.
            offset: Leave out so many of the oldest.

        Statement: sql/agents.sql get_agents. Source: getAgents; differs: whole agents, in a total order.
        """
        rows = await self._executor.fetch(
            SQL["get_agents"],
            count=_codecs.as_optional_count(limit, "limit"),
            skipped=_codecs.as_optional_count(offset, "offset"),
        )
        return [Agent(*row) for row in rows]

    async def count_agents(self, *, timeout: float | None = None) -> int:
        """Count all agents.

        Statement: sql/agents.sql count_agents. Source: countAgents; differs: a failure is an error, never 0.
        """
        number: int = await self._executor.fetch_value(SQL["count_agents"])
        return number

    async def create_agent(self, agent: Agent | Mapping[str, Any], *, timeout: float | None = None) -> bool:
        """Create an agent; False when its id is there already, which leaves it unchanged.

        Raises:
            ArgumentError: `name` is missing.

        Statement: sql/agents.sql create_agents. Source: createAgent; differs: a failure is an error, never False.
        """
        _, created = await self._create_agents([agent])
        return bool(created)

    async def create_agents(
        self, agents: Iterable[Agent | Mapping[str, Any]], *, timeout: float | None = None
    ) -> list[UUID]:
        """Create agents, all or none, and give their ids in the order given; those that are there stay as they are.

        Raises:
            ArgumentError: A `name` is missing.

        Statement: sql/agents.sql create_agents. One round trip a chunk. Source: createAgents; differs: an id is made
        where it is missing.
        """
        ids, _ = await self._create_agents(agents)
        return ids

    async def _create_agents(self, agents: Iterable[Agent | Mapping[str, Any]]) -> tuple[list[UUID], list[Any]]:
        """Give the id of each agent, and the rows of those that are new."""
        ids, rows = await self._read_all(Agent, agents, needed=("name",))
        order_by_id(rows)
        return ids, await self._write_rows("create_agents", "agents", Agent, rows, ids)

    async def ensure_agent_exists(
        self, agent: Agent | Mapping[str, Any] | None = None, *, timeout: float | None = None
    ) -> Agent:
        """Get the adapter's agent, and create it from `agent` when it is not there yet.

        An agent that is there is only read, and comes back as it is. Defaults of a new one: name "Unknown Agent", bio
        "An AI agent". What it says itself needs an entity of its id, too, which `create_entity` makes.

        Raises:
            ArgumentError: `agent` has another id, or a value does not fit; nothing was sent.

        Statement: sql/agents.sql ensure_agent. Source: ensureAgentExists; differs: one statement, no race.
        """
        given = Agent.read(agent if agent is not None else {})
        if given.get("id") is None:
            given["id"] = self.agent_id
        if given["id"] != self.agent_id:
            raise ArgumentError(f"id is {given['id']}, but this adapter belongs to agent {self.agent_id}")
        if given.get("name") is None:
            given["name"] = "Unknown Agent"
        row = await self._executor.fetch_row(SQL["ensure_agent"], agent=_codecs.encode_json(given, "agent"))
        return Agent(*row)  # type: ignore[misc]

    async def upsert_agents(
        self, agents: Iterable[Agent | Mapping[str, Any]], *, timeout: float | None = None
    ) -> list[UUID]:
        """Create agents, or change the given fields of those that are there as `update_agent` does; give their ids.

        Raises:
            ArgumentError: A `name` is missing, or an id is given twice.

        Statement: sql/agents.sql upsert_agents. One round trip a chunk. Source: upsertAgents; differs: one upsert, no
        race, and ids come back.
        """
        ids, rows = await self._read_partial(Agent, agents, needed=("name",), fixed=_FIXED, new_ids=True)
        _refuse_twice(ids)
        await self._write_rows("upsert_agents", "agents", Agent, rows, ids, form=by_id)
        return ids

    async def update_agent(
        self, agent_id: UUID | str, agent: Agent | Mapping[str, Any], *, timeout: float | None = None
    ) -> bool:
        """Change the given fields of an agent; False when there is no agent of this id.

        Settings are merged, and no setting that somebody else changes meanwhile is lost: objects are merged key by key,
        None removes a key, everything else replaces what was there; an object that this has emptied goes, too.

        Args:
            agent_id: The agent.
            agent: The fields to change: of a mapping its keys, of an `Agent` what is not None. In a mapping None clears
                `username`, `system` and `server_id`, and empties a list or `style`. `updated_at` becomes the present
                time, also where another one is given.

        Raises:
            ArgumentError: The agent has another id; or `name`, `settings`, `enabled` or `created_at` is None.

        Statement: sql/agents.sql update_agents. Source: updateAgent; differs: an agent that is not there is False.
        """
        return bool(await self._update_agents([(agent_id, agent)], _read_change, required=False))

    async def update_agents(self, agents: Iterable[Agent | Mapping[str, Any]], *, timeout: float | None = None) -> None:
        """Change agents as `update_agent` does, all or none.

        Args:
            agents: Agents with their `id`, or mappings `{"agentId": ..., "agent": ...}`.

        Raises:
            NotFoundError: An agent does not exist; names it. Nothing was changed.
            ArgumentError: As `update_agent`; or an id is missing or given twice.

        Statement: sql/agents.sql update_agents. One round trip a chunk. Source: updateAgents; differs: one statement,
        and an agent that is not there is an error.
        """
        await self._update_agents(agents, lambda value: _read_change(_split(value)), required=True)

    async def _update_agents(
        self, agents: Iterable[Any], read: Callable[[Any], dict[str, Any]], *, required: bool
    ) -> list[Any]:
        ids, rows = await self._read_partial(Agent, agents, fixed=_FIXED, read=read)
        _refuse_twice(ids)
        return await self._write_rows("update_agents", "agents", Agent, rows, ids, required=required)

    async def delete_agent(self, agent_id: UUID | str, *, timeout: float | None = None) -> bool:
        """Delete an agent and everything that is its own; False when there was none.

        Statement: sql/agents.sql delete_agents. Source: deleteAgent.
        """
        return await self.delete_agents([agent_id]) > 0

    async def delete_agents(self, agent_ids: Iterable[UUID | str], *, timeout: float | None = None) -> int:
        """Delete agents and everything that is theirs, all or none; give how many there were.

        Statement: sql/agents.sql delete_agents. One round trip a chunk. Source: deleteAgents; differs: gives a number.
        """
        return await self._delete_by_ids("delete_agents", agent_ids, "agent_ids")

    async def cleanup_agents(self, older_than: timedelta, *, timeout: float | None = None) -> int:
        """Delete the agents that were not updated for so long, with everything that is theirs; give how many.

        The adapter's own agent stays in any case. What counts is `updated_at`: a call of `update_agent`, even without
        fields, keeps an agent.

        Args:
            older_than: Time since the last update.

        Raises:
            ArgumentError: Not a positive `timedelta`.

        Statement: sql/agents.sql cleanup_agents. Source: cleanupAgents; differs: deletes what is old, not everything.
        """
        if not isinstance(older_than, timedelta) or older_than <= timedelta(0):
            raise ArgumentError(f"older_than must be a positive timedelta, not {show(older_than)}")
        number: int = await self._executor.fetch_value(
            SQL["cleanup_agents"], agent_id=self.agent_id, older_than=min(older_than, _LONGEST)
        )
        return number


def _split(value: Any) -> tuple[Any, Any]:
    """Tell apart an agent's id and its fields: ElizaOS's updateAgents has one beside the other."""
    if isinstance(value, Mapping) and "agent" in value:
        return value.get("agentId", value.get("agent_id")), value["agent"]
    return None, value


def _read_change(change: tuple[Any, Any]) -> dict[str, Any]:
    """Read an agent's fields, and the id that stands beside them."""
    id, agent = change
    row = Agent.read(agent)
    if id is not None:
        asked = _codecs.as_id(id, "agent_id")
        if row.get("id") not in {None, asked}:
            raise ArgumentError(f"id is {row['id']}, but agent_id {asked}")
        row["id"] = asked
    return row


def _refuse_twice(ids: list[UUID]) -> None:
    """Refuse two changes of one agent in one statement: what becomes of settings depends on which comes first."""
    seen: set[UUID] = set()
    for id in ids:
        if id in seen:
            raise ArgumentError(f"agent {id} is given twice")
        seen.add(id)
