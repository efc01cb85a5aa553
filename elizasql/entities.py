"""Entities."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from uuid import UUID

from . import _codecs
from ._statements import SQL
from ._store import Store, by_id, order_by_id
from .errors import ArgumentError
from .models import Component, Entity

# Columns of an entity; what a statement gives behind them are its components.
_WIDTH = 5

_ALL = 2**63 - 1


class Entities(Store):
    """Create, find, change and delete entities of the agent."""

    # --- writing -----------------------------------------------------------------------------------------------------

    async def create_entity(self, entity: Entity | Mapping[str, Any], *, timeout: float | None = None) -> UUID:
        """Create an entity and give its id; one that is there already stays as it is.

        Raises:
            As `create_entities`.

        Statement: sql/entities.sql create_entities. Source: createEntities.
        """
        return (await self.create_entities([entity]))[0]

    async def create_entities(
        self, entities: Iterable[Entity | Mapping[str, Any]], *, timeout: float | None = None
    ) -> list[UUID]:
        """Create entities, all or none, and give their ids in the order given; those that are there stay as they are.

        `components` are not created: `create_components` does.

        Raises:
            ArgumentError: An `id` is missing.
            ForeignKeyError: The agent does not exist.

        Statement: sql/entities.sql create_entities. One round trip a chunk. Source: createEntities; differs: gives
        ids, as its successor does, and does not give up a batch because of one that is there.
        """
        ids, rows = await self._read_all(Entity, entities, new_ids=False)
        order_by_id(rows)
        await self._write_rows("create_entities", "entities", Entity, _own(rows), ids)
        return ids

    async def ensure_entity_exists(self, entity: Entity | Mapping[str, Any], *, timeout: float | None = None) -> bool:
        """Create an entity unless it is there; True either way.

        Raises:
            As `create_entities`.

        Statement: sql/entities.sql create_entities. Source: ensureEntityExists.
        """
        await self.create_entities([entity])
        return True

    async def upsert_entities(
        self, entities: Iterable[Entity | Mapping[str, Any]], *, timeout: float | None = None
    ) -> list[UUID]:
        """Create entities, or change the given fields of those that are there, all or none; give their ids in order.

        Of a mapping its keys are given, of an `Entity` what is not None. `created_at` of one that is there stays.

        Raises:
            As `create_entities`.

        Statement: sql/entities.sql upsert_entities. One round trip a chunk. Source: upsertEntities; differs: one
        upsert, no race; what is not given stays, and ids come back.
        """
        ids, rows = await self._read_partial(Entity, entities)
        await self._write_rows("upsert_entities", "entities", Entity, _own(rows), ids, form=by_id)
        return ids

    async def update_entity(self, entity: Entity | Mapping[str, Any], *, timeout: float | None = None) -> bool:
        """Change the given fields of an entity; False when there is no entity of this id.

        Args:
            entity: `id` and the fields to change: of a mapping its keys, of an `Entity` what is not None. In a mapping
                None empties `names` and `metadata`. Both are replaced as a whole; `components` are left alone.

        Raises:
            ArgumentError: `id` is missing, or `created_at` is None.

        Statement: sql/entities.sql update_entities. Source: updateEntity; differs: what is not given stays, and an
        unknown id is False.
        """
        return bool(await self._update_entities([entity], required=False))

    async def update_entities(
        self, entities: Iterable[Entity | Mapping[str, Any]], *, timeout: float | None = None
    ) -> None:
        """Change entities as `update_entity` does, all or none; changes of one of them are put together.

        Raises:
            NotFoundError: An entity does not exist; names it. Nothing was changed.
            As `update_entity`.

        Statement: sql/entities.sql update_entities. One round trip a chunk. Source: updateEntities; differs: one
        statement, and an entity that is not there is an error.
        """
        await self._update_entities(entities, required=True)

    async def _update_entities(self, entities: Iterable[Entity | Mapping[str, Any]], *, required: bool) -> list[Any]:
        ids, rows = await self._read_partial(Entity, entities, fixed=("created_at",))
        return await self._write_rows("update_entities", "entities", Entity, _own(rows), ids, required=required)

    async def delete_entity(self, entity_id: UUID | str, *, timeout: float | None = None) -> bool:
        """Delete an entity and what points at it; False when there was none.

        That is its components, and those of others that it is the source of; its memberships, relationships, goals,
        logs and memories.

        Statement: sql/entities.sql delete_entities. Source: deleteEntity.
        """
        return await self.delete_entities([entity_id]) > 0

    async def delete_entities(self, entity_ids: Iterable[UUID | str], *, timeout: float | None = None) -> int:
        """Delete entities as `delete_entity` does, all or none; give how many there were.

        Statement: sql/entities.sql delete_entities. One round trip a chunk. Source: deleteEntities; differs: one
        statement, and gives a number.
        """
        return await self._delete_by_ids("delete_entities", entity_ids, "entity_ids")

    # --- reading -----------------------------------------------------------------------------------------------------

    async def get_entity(
        self, entity_id: UUID | str, *, include_components: bool = False, timeout: float | None = None
    ) -> Entity | None:
        """Get an entity, None where there is none.

        Statement: sql/entities.sql get_entities_by_ids. Source: getEntitiesByIds.
        """
        found = await self.get_entities_by_ids([entity_id], include_components=include_components)
        return found[0] if found else None

    async def get_entities_by_ids(
        self, entity_ids: Iterable[UUID | str], *, include_components: bool = False, timeout: float | None = None
    ) -> list[Entity]:
        """Get those of the entities that exist, in the order of the ids, each once.

        Args:
            entity_ids: The ids.
            include_components: Fill `components`, oldest first.

        Statement: sql/entities.sql get_entities_by_ids. One round trip. Source: getEntitiesByIds; differs: this
        agent's only, in order, and components only when asked for.
        """
        ids = _codecs.as_distinct_ids(entity_ids, "entity_ids")
        include = _codecs.as_bool(include_components, "include_components")
        if not ids:
            return []
        rows = await self._executor.fetch(
            SQL["get_entities_by_ids"], agent_id=self.agent_id, ids=ids, include_components=include
        )
        return [_entity(row, include) for row in rows]

    async def get_entity_by_ids(
        self, entity_ids: Iterable[UUID | str], *, include_components: bool = False, timeout: float | None = None
    ) -> list[Entity]:
        """Get entities: another name of `get_entities_by_ids`, which some callers of ElizaOS use.

        Statement: sql/entities.sql get_entities_by_ids. Source: getEntityByIds.
        """
        return await self.get_entities_by_ids(entity_ids, include_components=include_components)

    async def get_entities_for_room(
        self, room_id: UUID | str, include_components: bool = False, *, timeout: float | None = None
    ) -> list[Entity]:
        """Get the entities that take part in a room, oldest first; equal times are ordered by id.

        Statement: sql/entities.sql get_entities_for_rooms. Source: getEntitiesForRoom.
        """
        return (await self.get_entities_for_rooms([room_id], include_components))[0]

    async def get_entities_for_rooms(
        self, room_ids: Iterable[UUID | str], include_components: bool = False, *, timeout: float | None = None
    ) -> list[list[Entity]]:
        """Get the entities that take part in each of the rooms: one list for each room asked for, in their order.

        Statement: sql/entities.sql get_entities_for_rooms. One round trip. Source: getEntitiesForRooms; differs: the
        lists alone, without the rooms' ids beside them.
        """
        ids = _codecs.as_ids(room_ids, "room_ids")
        include = _codecs.as_bool(include_components, "include_components")
        if not ids:
            return []
        rows = await self._executor.fetch(
            SQL["get_entities_for_rooms"], agent_id=self.agent_id, room_ids=ids, include_components=include
        )
        found: list[list[Entity]] = [[] for _ in ids]
        for position, *row in rows:
            found[position - 1].append(_entity(row, include))
        return found

    async def get_entities_by_names(
        self, names: Iterable[str], *, agent_id: UUID | str | None = None, timeout: float | None = None
    ) -> list[Entity]:
        """Get the entities that have one of the names, exactly as written, oldest first; equal times by id.

        Args:
            names: The names; none give no entities.
            agent_id: The adapter's agent; another one is refused.

        Raises:
            ArgumentError: `agent_id` is another one, or a value does not fit; nothing was sent.

        Statement: sql/entities.sql get_entities_by_names. One round trip. Source: getEntitiesByNames; differs: no
        names give no entities.
        """
        self._check_agent_id(_codecs.as_optional_id(agent_id, "agent_id"))
        wanted = list(dict.fromkeys(_codecs.as_texts(names, "names")))
        if not wanted:
            return []
        rows = await self._executor.fetch(SQL["get_entities_by_names"], agent_id=self.agent_id, names=wanted)
        return [Entity(*row) for row in rows]

    async def search_entities_by_name(
        self,
        query: str,
        limit: int | None = 10,
        *,
        agent_id: UUID | str | None = None,
        timeout: float | None = None,
    ) -> list[Entity]:
        """Find entities by a part of a name, whatever the case (of ASCII alone where the database's locale is C).

        First those with a name that is the query, then those with a name that begins with it, then those with a name
        that contains it; each by id.

        Args:
            query: Plain text: `%` and `_` mean themselves. Blank: the first entities by id.
            limit: At most so many, default 10; None: all.
            agent_id: The adapter's agent; another one is refused.

        Raises:
            ArgumentError: `agent_id` is another one, or a value does not fit; nothing was sent.

        Statement: sql/entities.sql search_entities_by_name, get_first_entities where the query is blank. One round
        trip. Source: searchEntitiesByName; differs: in order of relevance, no wildcards, indexed.
        """
        self._check_agent_id(_codecs.as_optional_id(agent_id, "agent_id"))
        text = _codecs.as_text(query, "query")
        count = _codecs.as_optional_count(limit, "limit")
        count = _ALL if count is None else count
        if not text.strip():
            rows = await self._executor.fetch(SQL["get_first_entities"], agent_id=self.agent_id, count=count)
        else:
            rows = await self._executor.fetch(
                SQL["search_entities_by_name"], agent_id=self.agent_id, query=text, count=count
            )
        return [Entity(*row) for row in rows]

    async def query_entities(
        self,
        *,
        component_type: str | None = None,
        component_data_filter: Mapping[str, Any] | None = None,
        world_id: UUID | str | None = None,
        entity_ids: Iterable[UUID | str] | None = None,
        agent_id: UUID | str | None = None,
        limit: int | None = None,
        offset: int | None = None,
        include_all_components: bool = False,
        timeout: float | None = None,
    ) -> list[Entity]:
        """Find entities by a component that they have; ordered by id. All filters must hold.

        Args:
            component_type: They have a component of this type,
            component_data_filter: with data that contain this object (jsonb containment),
            world_id: in this world; the three hold for one and the same component.
            entity_ids: Only among these.
            agent_id: The adapter's agent; another one is refused.
            limit: At most so many entities; None: all.
            offset: Leave out so many of the first.
            include_all_components: True: `components` holds all of an entity; False: those of `component_type`, or all
                where no type is given.

        Raises:
            ArgumentError: Neither a filter nor a limit is given, or `agent_id` is another one.

        Statement: sql/entities.sql query_entities. One round trip. Source: queryEntities; differs: every filter
        filters, and the order is total.
        """
        self._check_agent_id(_codecs.as_optional_id(agent_id, "agent_id"))
        filters = {
            "component_type": _codecs.as_optional_text(component_type, "component_type"),
            "data": None
            if component_data_filter is None
            else _codecs.encode_object(component_data_filter, "component_data_filter"),
            "world_id": _codecs.as_optional_id(world_id, "world_id"),
            "entity_ids": None if entity_ids is None else _codecs.as_distinct_ids(entity_ids, "entity_ids"),
        }
        page = {
            "count": _codecs.as_optional_count(limit, "limit"),
            "skipped": _codecs.as_optional_count(offset, "offset"),
        }
        include_all = _codecs.as_bool(include_all_components, "include_all_components")
        if page["count"] is None and all(value is None for value in filters.values()):
            raise ArgumentError("query_entities needs a filter or a limit")
        if filters["entity_ids"] == []:
            return []
        rows = await self._executor.fetch(
            SQL["query_entities"],
            agent_id=self.agent_id,
            include_all_components=include_all,
            **filters,
            **page,
        )
        return [_entity(row, True) for row in rows]


def _own(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out the components of entities that a read has filled: they are not an entity's columns."""
    return [{name: value for name, value in row.items() if name != "components"} for row in rows]


def _entity(row: Any, include_components: bool) -> Entity:
    entity = Entity(*row[:_WIDTH])
    if include_components:
        ids = row[_WIDTH]
        entity.components = [] if ids is None else [Component(*c) for c in zip(*row[_WIDTH:], strict=True)]
    return entity
