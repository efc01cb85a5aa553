"""Agents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from uuid import UUID

from . import _codecs
from ._statements import SQL
from ._store import Store
from .errors import ArgumentError
from .models import Agent


class Agents(Store):
    """Create, find and delete agents."""

    async def get_agent(self, agent_id: UUID | str) -> Agent | None:
        """Get an agent, None where there is none.

        Statement: sql/agents.sql get_agents_by_ids. Source: getAgent.
        """
        found = await self.get_agents_by_ids([agent_id])
        return found[0] if found else None

    async def get_agents_by_ids(self, agent_ids: Iterable[UUID | str]) -> list[Agent]:
        """Get those of the agents that exist, in the order of the ids.

        Statement: sql/agents.sql get_agents_by_ids. Source: getAgentsByIds.
        """
        ids = _codecs.as_ids(agent_ids, "agent_ids")
        if not ids:
            return []
        found = {row["id"]: Agent(*row) for row in await self._executor.fetch(SQL["get_agents_by_ids"], ids=ids)}
        return [found[id] for id in dict.fromkeys(ids) if id in found]

    async def create_agent(self, agent: Agent | Mapping[str, Any]) -> bool:
        """Create an agent; False when its id is there already, which leaves it unchanged.

        Raises:
            ArgumentError: `name` is missing.

        Statement: sql/agents.sql create_agents. Source: createAgent; differs: a failure is an error, never False.
        """
        _, rows = self._read_agents([agent])
        return bool(await self._executor.fetch(SQL["create_agents"], agents=_codecs.encode_json(rows, "agents")))

    async def ensure_agent_exists(self, agent: Agent | Mapping[str, Any] | None = None) -> Agent:
        """Get the adapter's agent, and create it from `agent` when it is not there yet.

        An agent that is there comes back as it is. Defaults of a new one: name "Unknown Agent", bio "An AI agent".

        Statement: sql/agents.sql ensure_agent. Source: ensureAgentExists; differs: one upsert, no race.
        """
        given = Agent.read(agent if agent is not None else {})
        if given.setdefault("id", self.agent_id) != self.agent_id:
            raise ArgumentError(f"id is {given['id']}, but this adapter belongs to agent {self.agent_id}")
        if given.get("name") is None:
            given["name"] = "Unknown Agent"
        row = await self._executor.fetch_row(SQL["ensure_agent"], agent=_codecs.encode_json(given, "agent"))
        return Agent(*row)  # type: ignore[misc]

    async def delete_agent(self, agent_id: UUID | str) -> bool:
        """Delete an agent and everything that is its own; False when there was none.

        Statement: sql/agents.sql delete_agents. Source: deleteAgent.
        """
        ids = [_codecs.as_id(agent_id, "agent_id")]
        return bool(await self._executor.fetch(SQL["delete_agents"], ids=ids))

    def _read_agents(self, agents: Iterable[Agent | Mapping[str, Any]]) -> tuple[list[UUID], list[dict[str, Any]]]:
        ids, rows = self._read_all(Agent, agents)
        self._need(rows, Agent, "name")
        return ids, rows
