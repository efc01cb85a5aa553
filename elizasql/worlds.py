"""Worlds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from uuid import UUID

from ._statements import SQL
from ._store import Store, by_id, order_by_id
from .models import World


class Worlds(Store):
    """Create, find, change and delete worlds of the agent."""

    async def create_world(self, world: World | Mapping[str, Any], *, timeout: float | None = None) -> UUID:
        """Create a world and give its id; one that is there already stays as it is.

        Raises:
            As `create_worlds`.

        Statement: sql/worlds.sql create_worlds. Source: createWorld.
        """
        return (await self.create_worlds([world]))[0]

    async def create_worlds(
        self, worlds: Iterable[World | Mapping[str, Any]], *, timeout: float | None = None
    ) -> list[UUID]:
        """Create worlds, all or none, and give their ids in the order given; those that are there stay as they are.

        Raises:
            ArgumentError: A field does not fit, such as a `serverId` that is no UUID.
            ForeignKeyError: The agent does not exist.

        Statement: sql/worlds.sql create_worlds. One round trip a chunk. Source: createWorlds.
        """
        ids, rows = await self._read_all(World, worlds)
        order_by_id(rows)
        await self._write_rows("create_worlds", "worlds", World, rows, ids)
        return ids

    async def upsert_worlds(
        self, worlds: Iterable[World | Mapping[str, Any]], *, timeout: float | None = None
    ) -> list[UUID]:
        """Create worlds, or change the given fields of those that are there, all or none; give their ids in order.

        Of a mapping its keys are given, of a `World` what is not None. `created_at` of a world that is there stays.

        Raises:
            As `create_worlds`.

        Statement: sql/worlds.sql upsert_worlds. One round trip a chunk. Source: upsertWorlds; differs: what is not
        given stays, and ids come back.
        """
        ids, rows = await self._read_partial(World, worlds, new_ids=True)
        await self._write_rows("upsert_worlds", "worlds", World, rows, ids, form=by_id)
        return ids

    async def get_world(self, world_id: UUID | str, *, timeout: float | None = None) -> World | None:
        """Get a world, None where there is none.

        Statement: sql/worlds.sql get_worlds_by_ids. Source: getWorld; differs: this agent's only.
        """
        found = await self.get_worlds_by_ids([world_id])
        return found[0] if found else None

    async def get_worlds_by_ids(self, world_ids: Iterable[UUID | str], *, timeout: float | None = None) -> list[World]:
        """Get those of the worlds that exist, in the order of the ids, each once.

        Statement: sql/worlds.sql get_worlds_by_ids. One round trip. Source: getWorldsByIds.
        """
        return await self._get_by_ids("get_worlds_by_ids", World, world_ids, "world_ids")

    async def get_all_worlds(self, *, timeout: float | None = None) -> list[World]:
        """Get every world of the agent, oldest first; equal times are ordered by id.

        Statement: sql/worlds.sql get_all_worlds. Source: getAllWorlds.
        """
        return [World(*row) for row in await self._executor.fetch(SQL["get_all_worlds"], agent_id=self.agent_id)]

    async def update_world(self, world: World | Mapping[str, Any], *, timeout: float | None = None) -> bool:
        """Change the given fields of a world; False when there is no world of this id.

        Args:
            world: `id` and the fields to change: of a mapping its keys, of a `World` what is not None. In a mapping
                None clears `message_server_id` and empties `name` and `metadata`. `metadata` is replaced as a whole.

        Raises:
            ArgumentError: `id` is missing, or `created_at` is None.

        Statement: sql/worlds.sql update_worlds. Source: updateWorld; differs: what is not given stays.
        """
        return bool(await self._update_worlds([world], required=False))

    async def update_worlds(self, worlds: Iterable[World | Mapping[str, Any]], *, timeout: float | None = None) -> None:
        """Change worlds as `update_world` does, all or none; changes of one world in several places are put together.

        Raises:
            NotFoundError: A world does not exist; names it. Nothing was changed.
            As `update_world`.

        Statement: sql/worlds.sql update_worlds. One round trip a chunk. Source: updateWorlds.
        """
        await self._update_worlds(worlds, required=True)

    async def _update_worlds(self, worlds: Iterable[World | Mapping[str, Any]], *, required: bool) -> list[Any]:
        ids, rows = await self._read_partial(World, worlds, fixed=("created_at",))
        return await self._write_rows("update_worlds", "worlds", World, rows, ids, required=required)

    async def remove_world(self, world_id: UUID | str, *, timeout: float | None = None) -> bool:
        """Delete a world and its components; rooms and memories stay and lose their world. False when there was none.

        Statement: sql/worlds.sql delete_worlds. Source: removeWorld; differs: nothing points at the world any more.
        """
        return await self.delete_worlds([world_id]) > 0

    async def delete_worlds(self, world_ids: Iterable[UUID | str], *, timeout: float | None = None) -> int:
        """Delete worlds as `remove_world` does, all or none, and give how many there were.

        Statement: sql/worlds.sql delete_worlds. One round trip a chunk. Source: deleteWorlds.
        """
        deleted = await self._delete_by_ids("delete_worlds", world_ids, "world_ids", indexed=self._inline)
        self._indexer.wake()
        return deleted
