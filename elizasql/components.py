"""Components."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any
from uuid import UUID

from . import _codecs
from ._statements import SQL
from ._store import Store, naming_row, need, read_each
from .errors import ArgumentError, show
from .models import Component

_NEEDED = ("entity_id", "room_id", "type")
_PATH = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*(\.[a-zA-Z_][a-zA-Z0-9_]*|\.[0-9]+)*")
# Parts of a path. What is nested deeper than 1,024 levels cannot be read any more, nor can any list that it is in; an
# operation's value has up to 250.
_MOST_PARTS = 250

NaturalKey = tuple[UUID, str, UUID | None, UUID | None]


class Components(Store):
    """Create, find, change and delete components: what the agent knows of its entities, by type.

    A component's natural key is its entity, type, world and source entity, where None is a value: there is one
    component for each.
    """

    # --- writing -----------------------------------------------------------------------------------------------------

    async def create_component(self, component: Component | Mapping[str, Any], *, timeout: float | None = None) -> bool:
        """Create a component; False when its id or its natural key is there already, which leaves that one unchanged.

        Raises:
            As `create_components`.

        Statement: sql/components.sql create_components. Source: createComponent; differs: the natural key is unique,
        and `created_at` is taken as given.
        """
        [(_, created)] = await self._create_components([component])
        return created

    async def create_components(
        self, components: Iterable[Component | Mapping[str, Any]], *, timeout: float | None = None
    ) -> list[UUID]:
        """Create components, all or none, and give their ids in the order given.

        Where the natural key is there already, before or earlier in the batch, that component stays as it is and its id
        is given.

        Raises:
            ArgumentError: `entity_id`, `room_id` or `type` is missing.
            ForeignKeyError: Entity, room, world, source entity or agent does not exist.
            SerializationError: A component with the natural key was there and was deleted meanwhile; try again.

        Statement: sql/components.sql create_components. One round trip a chunk. Source: createComponents.
        """
        return [id for id, _ in await self._create_components(components)]

    async def _create_components(self, components: Iterable[Component | Mapping[str, Any]]) -> list[tuple[UUID, bool]]:
        """Give for each component the id that is stored, and whether it is new."""
        return await self._create_or_keep(
            "create_components", "components", Component, components, needed=_NEEDED, order=_lock_order
        )

    async def upsert_components(
        self, components: Iterable[Component | Mapping[str, Any]], *, timeout: float | None = None
    ) -> list[UUID]:
        """Create components, or replace room and data of those whose natural key is there; all or none.

        The id and the time of a component that is there stay. Of two with one natural key the last counts. Gives the
        ids that are stored, in the order given.

        Raises:
            ArgumentError: `entity_id`, `room_id`, `type` or `data` is missing.
            ForeignKeyError: Entity, room, world, source entity or agent does not exist.
            UniqueViolationError: An id is there with another natural key.

        Statement: sql/components.sql upsert_components. One round trip a chunk. Source: upsertComponents; differs: one
        upsert, no race, and ids come back.
        """
        # By natural key, not by id: two with one id and different keys are an error that the server finds.
        given = await self._read_each(Component, components, needed=(*_NEEDED, "data"))
        if not given:
            return []
        ids, keys = [row["id"] for row in given], [_natural_key(row) for row in given]
        rows = dict(zip(keys, given, strict=True))
        in_order = sorted(rows.values(), key=_lock_order)
        chunks = [
            {"agent_id": self.agent_id, "components": chunk} for chunk in self._encode_chunks(Component, in_order, ids)
        ]
        write = self._write_under_two_keys("upsert_components", chunks)
        stored = {_natural_key(row): row["id"] for row in await naming_row(write, "Component", in_order, ids)}
        return [stored[key] for key in keys]

    async def update_component(self, component: Component | Mapping[str, Any], *, timeout: float | None = None) -> bool:
        """Change the given fields of a component; False when there is no component of this id.

        Args:
            component: `id` and the fields to change: of a mapping its keys, of a `Component` what is not None. In a
                mapping None clears `world_id` and `source_entity_id` and empties `data`, which is replaced as a whole;
                `patch_component` changes parts of it. `created_at` stays.

        Raises:
            ArgumentError: `id` is missing; or `entity_id`, `room_id` or `type` is None.
            ForeignKeyError: What it is to point at does not exist.
            UniqueViolationError: The new natural key is there already.

        Statement: sql/components.sql update_components. Source: updateComponent; differs: an unknown id is False.
        """
        return bool(await self._update_components([component], required=False))

    async def update_components(
        self, components: Iterable[Component | Mapping[str, Any]], *, timeout: float | None = None
    ) -> None:
        """Change components as `update_component` does, all or none; changes of one of them are put together.

        Raises:
            NotFoundError: A component does not exist; names it. Nothing was changed.
            As `update_component`.

        Statement: sql/components.sql update_components. One round trip a chunk. Source: updateComponents; differs: one
        statement, and a component that is not there is an error.
        """
        await self._update_components(components, required=True)

    async def _update_components(
        self, components: Iterable[Component | Mapping[str, Any]], *, required: bool
    ) -> list[Any]:
        ids, rows = await self._read_partial(Component, components, fixed=_NEEDED)
        return await self._write_rows("update_components", "components", Component, rows, ids, required=required)

    async def patch_component(
        self, component_id: UUID | str, ops: Iterable[Mapping[str, Any]], *, timeout: float | None = None
    ) -> None:
        """Change parts of a component's data, all or none; concurrent patches of other parts are not lost.

        Args:
            component_id: The component.
            ops: Operations, applied one after the other: `{"op": ..., "path": ..., "value": ...}`. The path is names
                and indexes joined by dots, such as "wallet.balance" or "items.0.name": letters, digits and
                underscores, the first part a name, at most 250 parts. "set" puts a value there and makes what is
                missing on the way, an array where an index comes next; "push" appends it to the array there;
                "increment" adds a number to the number there; "remove" deletes what is there, if anything.

        Raises:
            ArgumentError: An operation, path or value is malformed; nothing was sent.
            NotFoundError: The component does not exist.
            DataError: What is at the path, or on the way, is of another type; names component and operation.

        Statement: sql/components.sql patch_components. Source: patchComponents.
        """
        await self.patch_components([{"component_id": component_id, "ops": ops}])

    async def patch_components(self, patches: Iterable[Mapping[str, Any]], *, timeout: float | None = None) -> None:
        """Change parts of the data of components as `patch_component` does, all or none.

        Args:
            patches: Mappings `{"componentId": ..., "ops": [...]}`; those of one component are applied in their order.

        Raises:
            As `patch_component`.

        Statement: sql/components.sql patch_components. One round trip a chunk. Source: patchComponents; differs: does
        what it says.
        """
        ops: dict[UUID, list[dict[str, Any]]] = {}
        for id, given in await read_each(patches, "patch", _read_patch, names="patches"):
            ops.setdefault(id, []).extend(given)
        if not ops:
            return
        rows = [{"id": id, "ops": ops[id]} for id in sorted(ops, key=lambda id: id.int)]
        chunks = [
            {"agent_id": self.agent_id, "patches": _codecs.encode_json(chunk, "patches")}
            for chunk in self._chunks(rows)
        ]
        await self._executor.fetch_chunks(SQL["patch_components"], chunks)

    async def delete_component(self, component_id: UUID | str, *, timeout: float | None = None) -> bool:
        """Delete a component; False when there was none.

        Statement: sql/components.sql delete_components. Source: deleteComponent.
        """
        return await self.delete_components([component_id]) > 0

    async def delete_components(self, component_ids: Iterable[UUID | str], *, timeout: float | None = None) -> int:
        """Delete components, all or none; give how many there were.

        Statement: sql/components.sql delete_components. One round trip a chunk. Source: deleteComponents; differs:
        gives a number.
        """
        return await self._delete_by_ids("delete_components", component_ids, "component_ids")

    # --- reading -----------------------------------------------------------------------------------------------------

    async def get_component(
        self,
        entity_id: UUID | str,
        type: str,
        world_id: UUID | str | None = None,
        source_entity_id: UUID | str | None = None,
        *,
        timeout: float | None = None,
    ) -> Component | None:
        """Get an entity's component of a type, None where there is none; of several that fit, the oldest.

        Args:
            entity_id: The entity.
            type: The type.
            world_id: Of this world; None: of any, or of none.
            source_entity_id: From this entity; None: from any, or from none.

        Statement: sql/components.sql get_component. Source: getComponent; differs: always the same one of several.
        """
        row = await self._executor.fetch_row(
            SQL["get_component"],
            agent_id=self.agent_id,
            entity_id=_codecs.as_id(entity_id, "entity_id"),
            type=_codecs.as_text(type, "type"),
            world_id=_codecs.as_optional_id(world_id, "world_id"),
            source_entity_id=_codecs.as_optional_id(source_entity_id, "source_entity_id"),
        )
        return None if row is None else Component(*row)

    async def get_components(
        self,
        entity_id: UUID | str,
        world_id: UUID | str | None = None,
        source_entity_id: UUID | str | None = None,
        *,
        timeout: float | None = None,
    ) -> list[Component]:
        """Get an entity's components, oldest first; equal times are ordered by id. None: any, as in `get_component`.

        Statement: sql/components.sql get_components_for_entities. Source: getComponents.
        """
        return await self.get_components_for_entities([entity_id], world_id, source_entity_id)

    async def get_components_for_entities(
        self,
        entity_ids: Iterable[UUID | str],
        world_id: UUID | str | None = None,
        source_entity_id: UUID | str | None = None,
        *,
        timeout: float | None = None,
    ) -> list[Component]:
        """Get the components of several entities in one list: in the order of the entities, those of each oldest first.

        Statement: sql/components.sql get_components_for_entities. One round trip. Source: getComponentsForEntities.
        """
        ids = _codecs.as_distinct_ids(entity_ids, "entity_ids")
        filters = {
            "world_id": _codecs.as_optional_id(world_id, "world_id"),
            "source_entity_id": _codecs.as_optional_id(source_entity_id, "source_entity_id"),
        }
        if not ids:
            return []
        rows = await self._executor.fetch(
            SQL["get_components_for_entities"], agent_id=self.agent_id, entity_ids=ids, **filters
        )
        return [Component(*row) for row in rows]

    async def get_components_by_ids(
        self, component_ids: Iterable[UUID | str], *, timeout: float | None = None
    ) -> list[Component]:
        """Get those of the components that exist, in the order of the ids, each once.

        Statement: sql/components.sql get_components_by_ids. One round trip. Source: getComponentsByIds.
        """
        return await self._get_by_ids("get_components_by_ids", Component, component_ids, "component_ids")

    async def get_components_by_natural_keys(
        self, keys: Iterable[Component | Mapping[str, Any]], *, timeout: float | None = None
    ) -> list[Component | None]:
        """Get a component for each natural key, in the order of the keys; None where there is none.

        Args:
            keys: Mappings with `entityId`, `type` and, unless they are None, `worldId` and `sourceEntityId`; None is a
                value here: it finds the component that has none.

        Raises:
            ArgumentError: A key lacks `entity_id` or `type`, or does not fit; names its position.

        Statement: sql/components.sql get_components_by_natural_keys. One round trip. Source:
        getComponentsByNaturalKeys; differs: None is a value.
        """
        wanted = await read_each(keys, "key", _read_natural_key, names="keys")
        if not wanted:
            return []
        entity_ids, types, world_ids, source_entity_ids = map(list, zip(*wanted, strict=True))
        rows = await self._executor.fetch(
            SQL["get_components_by_natural_keys"],
            agent_id=self.agent_id,
            entity_ids=entity_ids,
            types=types,
            world_ids=world_ids,
            source_entity_ids=source_entity_ids,
        )
        return [None if row["id"] is None else Component(*row) for row in rows]


def _natural_key(row: Any) -> NaturalKey:
    return row["entity_id"], row["type"], row.get("world_id"), row.get("source_entity_id")


def _read_natural_key(key: Any) -> NaturalKey:
    row = Component.read(key)
    need(row, "entity_id", "type")
    return _natural_key(row)


def _lock_order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Give what a batch is ordered by, over all its chunks, so that two batches cannot wait for each other.

    That is the natural key, as the statements order each chunk: None comes last.
    """
    entity, kind, *others = _natural_key(row)
    return entity.int, kind, *((other is None, other and other.int) for other in others)


def _read_patch(patch: Any) -> tuple[UUID, list[dict[str, Any]]]:
    if not isinstance(patch, Mapping):
        raise ArgumentError(f"expected a mapping, not {type(patch).__name__}")
    unknown = set(patch) - {"component_id", "componentId", "ops"}
    if unknown:
        raise ArgumentError(f"a patch has no field {min(map(show, unknown))}")
    id = _codecs.as_id(patch.get("component_id", patch.get("componentId")), "component_id")
    ops = _codecs.as_collection(patch.get("ops"), "expected a collection of operations")
    return id, [_read_op(op, number) for number, op in enumerate(ops, 1)]


def _read_op(op: Any, number: int) -> dict[str, Any]:
    if not isinstance(op, Mapping):
        raise ArgumentError(f"operation {number} must be a mapping, not {type(op).__name__}")
    kind, path = op.get("op"), op.get("path")
    if not isinstance(kind, str) or kind not in {"set", "push", "remove", "increment"}:
        raise ArgumentError(f"operation {number}: op must be set, push, remove or increment, not {show(kind, 40)}")
    if not isinstance(path, str) or not _PATH.fullmatch(path):
        raise ArgumentError(f"operation {number}: path must be names and indexes joined by dots, not {show(path)}")
    parts = path.count(".") + 1
    if parts > _MOST_PARTS:
        raise ArgumentError(f"operation {number}: path must have at most {_MOST_PARTS} parts, not {parts}")
    if kind == "remove":
        return {"op": kind, "path": path}
    if "value" not in op:
        raise ArgumentError(f"operation {number}: {kind} needs a value")
    value = op["value"]
    if kind == "increment" and (
        not _codecs.is_number(value) or not abs(value) < math.inf  # isfinite() refuses an int that no float holds
    ):
        raise ArgumentError(f"operation {number}: increment needs a finite number, not {show(value, 40)}")
    return {"op": kind, "path": path, "value": value}
