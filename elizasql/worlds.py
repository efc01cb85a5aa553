"""Worlds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from uuid import UUID

from . import _codecs
from ._statements import SQL
from ._store import Store
from .models import World


class Worlds(Store):
    """Create, find and delete worlds of the agent."""

    async def create_world(self, world: World | Mapping[str, Any]) -> UUID:
        """Create a world and give its id; one that is there already stays as it is.

        Statement: sql/worlds.sql create_worlds. Source: createWorld.
        """
        return (await self.create_worlds([world]))[0]

    async def create_worlds(self, worlds: Iterable[World | Mapping[str, Any]]) -> list[UUID]:
        """Create worlds, all or none, and give their ids in the order given.

        Statement: sql/worlds.sql create_worlds. Source: createWorlds.
        """
        ids, rows = self._read_all(World, worlds)
        if rows:
            chunks = [
                {"agent_id": self.agent_id, "worlds": _codecs.encode_json(chunk, "worlds")}
                for chunk in self._chunks(rows)
            ]
            await self._executor.fetch_chunks(SQL["create_worlds"], chunks)
        return ids

    async def get_world(self, world_id: UUID | str) -> World | None:
        """Get a world, None where there is none.

        Statement: sql/worlds.sql get_worlds_by_ids. Source: getWorld.
        """
        found = await self.get_worlds_by_ids([world_id])
        return found[0] if found else None

    async def get_worlds_by_ids(self, world_ids: Iterable[UUID | str]) -> list[World]:
        """Get those of the worlds that exist, in the order of the ids.

        Statement: sql/worlds.sql get_worlds_by_ids. Source: getWorldsByIds.
        """
        ids = _codecs.as_ids(world_ids, "world_ids")
        if not ids:
            return []
        rows = await self._executor.fetch(SQL["get_worlds_by_ids"], agent_id=self.agent_id, ids=ids)
        found = {row["id"]: World(*row) for row in rows}
        return [found[id] for id in dict.fromkeys(ids) if id in found]

    async def get_all_worlds(self) -> list[World]:
        """Get every world of the agent, oldest first.

        Statement: sql/worlds.sql get_all_worlds. Source: getAllWorlds.
        """
        return [World(*row) for row in await self._executor.fetch(SQL["get_all_worlds"], agent_id=self.agent_id)]

    async def remove_world(self, world_id: UUID | str) -> bool:
        """Delete a world and its components; rooms and memories stay and lose their world. False when there was none.

        Statement: sql/worlds.sql delete_worlds. Source: removeWorld.
        """
        ids = [_codecs.as_id(world_id, "world_id")]
        return bool(await self._executor.fetch(SQL["delete_worlds"], agent_id=self.agent_id, ids=ids))
