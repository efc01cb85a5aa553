"""Goals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, get_args
from uuid import UUID

from . import _codecs
from ._statements import SQL
from ._store import Store, as_limit, as_reach
from .models import Goal
from .types import GoalStatus

_CHANGEABLE = frozenset({"id", "room_id", "entity_id", "name", "status", "objectives"})


class Goals(Store):
    """Create, find, change and delete what the agent wants to reach.

    The interface is that of ElizaOS 0.x, which plugin-sql's README still promises; no table is left of it there.
    """

    async def create_goal(self, goal: Goal | Mapping[str, Any], *, timeout: float | None = None) -> UUID:
        """Create a goal and give its id; one that is there already stays as it is.

        Raises:
            ArgumentError: `name` is missing, an objective has no description, or a value does not fit.
            ForeignKeyError: The room, the entity or the agent does not exist.

        Statement: sql/goals.sql create_goals. One round trip. Source: createGoal.
        """
        return (await self.create_goals([goal]))[0]

    async def create_goals(
        self, goals: Iterable[Goal | Mapping[str, Any]], *, timeout: float | None = None
    ) -> list[UUID]:
        """Create goals, all or none, and give their ids in the order given. Goals without a time keep that order.

        Raises:
            As `create_goal`; errors of a goal name its position.

        Statement: sql/goals.sql create_goals. One round trip a chunk.
        """
        return await self._create_in_order("create_goals", "goals", Goal, goals, needed=("name",))

    async def get_goal(self, goal_id: UUID | str, *, timeout: float | None = None) -> Goal | None:
        """Get a goal, None where there is none.

        Statement: sql/goals.sql get_goals_by_ids. One round trip.
        """
        found = await self.get_goals_by_ids([goal_id])
        return found[0] if found else None

    async def get_goals_by_ids(self, goal_ids: Iterable[UUID | str], *, timeout: float | None = None) -> list[Goal]:
        """Get those of the goals that exist, in the order of the ids, each once.

        Statement: sql/goals.sql get_goals_by_ids. One round trip.
        """
        return await self._get_by_ids("get_goals_by_ids", Goal, goal_ids, "goal_ids")

    async def get_goals(
        self,
        *,
        room_id: UUID | str | None = None,
        entity_id: UUID | str | None = None,
        only_in_progress: bool = False,
        count: int | None = None,
        limit: int | None = None,
        offset: int | None = None,
        timeout: float | None = None,
    ) -> list[Goal]:
        """Get goals, oldest first; equal times are ordered by id. Filters combine with AND.

        Args:
            room_id, entity_id: Only of these.
            only_in_progress: Leave out what is done or failed.
            count: At most so many; None: all.
            limit: Another name of `count`.
            offset: Leave out so many of the oldest.

        Raises:
            ArgumentError: `count` and `limit` differ, or a value does not fit; nothing was sent.

        Statement: sql/goals.sql get_goals, get_goals_of_room or get_goals_of_entity. One round trip. Source: getGoals;
        differs: only this agent's, whose goals in every room come without a room_id.
        """
        room = _codecs.as_optional_id(room_id, "room_id")
        entity = _codecs.as_optional_id(entity_id, "entity_id")
        only = _codecs.as_bool(only_in_progress, "only_in_progress")
        if room is not None:
            statement = SQL["get_goals_of_room"]
        else:
            statement = SQL["get_goals" if entity is None else "get_goals_of_entity"]
        number = as_limit(count, limit)
        skip = _codecs.as_optional_count(offset, "offset")
        rows = await self._executor.fetch(
            statement,
            agent_id=self.agent_id,
            room_id=room,
            entity_id=entity,
            statuses=["IN_PROGRESS"] if only else list(get_args(GoalStatus)),
            reach=as_reach(number, skip),
            count=number,
            skip=skip,
        )
        return [Goal(*row) for row in rows]

    async def update_goal(self, goal: Goal | Mapping[str, Any], *, timeout: float | None = None) -> bool:
        """Change the fields of a goal that are given; False when there is no goal of this id.

        Args:
            goal: `id`, and of room_id, entity_id, name, status and objectives (replaced as a whole) those to change: of
                a mapping its keys, of a model what is not None. None clears what can be empty. Whatever else is in it
                is left as it is.

        Raises:
            As `create_goal`.

        Statement: sql/goals.sql update_goals. One round trip. Source: updateGoal.
        """
        return bool(await self._update_goals([goal], required=False))

    async def update_goals(self, goals: Iterable[Goal | Mapping[str, Any]], *, timeout: float | None = None) -> None:
        """Change goals as `update_goal` does, all or none.

        Raises:
            NotFoundError: A goal does not exist; names it. Nothing was changed.
            As `update_goal`; errors of a goal name its position.

        Statement: sql/goals.sql update_goals. One round trip a chunk.
        """
        await self._update_goals(goals, required=True)

    async def update_goal_status(
        self, goal_id: UUID | str, status: GoalStatus, *, timeout: float | None = None
    ) -> bool:
        """Set how far a goal is: "IN_PROGRESS", "DONE" or "FAILED"; False when there is no goal of this id.

        Raises:
            ArgumentError: Another status; nothing was sent.

        Statement: sql/goals.sql update_goals. One round trip. Source: updateGoalStatus.
        """
        return bool(await self._update_goals([{"id": goal_id, "status": status}], required=False))

    async def _update_goals(self, goals: Iterable[Goal | Mapping[str, Any]], *, required: bool) -> list[Any]:
        ids, rows = await self._read_partial(Goal, goals, fixed=("name", "status"))
        rows = [{key: value for key, value in row.items() if key in _CHANGEABLE} for row in rows]
        return await self._write_rows("update_goals", "goals", Goal, rows, ids, required=required)

    async def delete_goal(self, goal_id: UUID | str, *, timeout: float | None = None) -> bool:
        """Delete a goal; False when there was none.

        Statement: sql/goals.sql delete_goals. One round trip. Source: removeGoal.
        """
        return await self.delete_goals([goal_id]) > 0

    async def delete_goals(self, goal_ids: Iterable[UUID | str], *, timeout: float | None = None) -> int:
        """Delete goals, all or none; give how many there were.

        Statement: sql/goals.sql delete_goals. One round trip a chunk.
        """
        return await self._delete_by_ids("delete_goals", goal_ids, "goal_ids")

    async def delete_all_goals(self, room_id: UUID | str, *, timeout: float | None = None) -> int:
        """Delete the goals of a room; give how many there were.

        Statement: sql/goals.sql delete_all_goals. One round trip. Source: removeAllGoals.
        """
        room = _codecs.as_id(room_id, "room_id")
        deleted: int = await self._executor.fetch_value(SQL["delete_all_goals"], agent_id=self.agent_id, room_id=room)
        return deleted
