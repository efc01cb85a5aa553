"""Logs, and the runs that they tell of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal, TypeAlias, get_args
from uuid import UUID

from . import _codecs
from ._statements import SQL
from ._store import Store, as_limit, naming_row, order_by_id, read_cursor, read_limits, unwrap
from .errors import ArgumentError, show
from .models import AgentRunCounts, AgentRunSummary, AgentRunSummaryResult, Log
from .types import RunStatus

Cursor: TypeAlias = "Log | Mapping[str, Any] | tuple[datetime, UUID | str]"

# What a body may be at most: levels, which is the encoder's own limit, and bytes of JSON.
_MAX_DEPTH = 254
_MAX_BYTES = 16 * 1024 * 1024


class Logs(Store):
    """Write, find, change and delete logs, and see the runs in them."""

    # --- writing -----------------------------------------------------------------------------------------------------

    async def log(self, log: Log | Mapping[str, Any], *, timeout: float | None = None) -> None:
        """Write a log: `body`, `entity_id`, `room_id`, `type`.

        The body is stored as it is, but: text that PostgreSQL cannot hold is cleaned as everywhere (U+0000 and unpaired
        surrogates become U+FFFD), times become ISO-8601 text, integers beyond 64 bits become text, NaN and infinities
        null, and what contains itself is cut where it begins anew, to null.

        Raises:
            ArgumentError: A field is missing, the body is nested deeper than 254 levels, larger than 16 MiB, or holds
                what is not JSON. Nothing was sent.
            ForeignKeyError: The entity or the room does not exist.

        Statement: sql/logs.sql create_logs. One round trip. Source: log; differs: backslashes, repeated objects and
        dates stay intact, a failure is an error.
        """
        await self.create_logs([log])

    async def create_logs(self, logs: Iterable[Log | Mapping[str, Any]], *, timeout: float | None = None) -> list[UUID]:
        """Write logs as `log` does, all or none, and give their ids in the order given.

        Logs without a time keep the order given. Ids that are there already keep their rows.

        Raises:
            As `log`; errors of a log name its position.

        Statement: sql/logs.sql create_logs. One round trip a chunk. Source: createLogs; differs: gives the ids.
        """
        ids, rows = await self._read_all(Log, logs, needed=("entity_id", "room_id", "type", "body"))
        if not rows:
            return []
        bodies = _encode_bodies(rows, ids)
        positions = order_by_id(rows)
        placed = list(zip(rows, positions, strict=True))
        chunks = [
            {
                "agent_id": self.agent_id,
                "ids": [row["id"] for row, _ in chunk],
                "entity_ids": [row["entity_id"] for row, _ in chunk],
                "room_ids": [row["room_id"] for row, _ in chunk],
                "types": [row["type"] for row, _ in chunk],
                "bodies": [bodies[row["id"]] for row, _ in chunk],
                "created_ats": [row.get("created_at") for row, _ in chunk],
                "positions": [position for _, position in chunk],
                "begins": number == 0,
            }
            for number, chunk in enumerate(self._chunks(placed, lambda each: len(bodies[each[0]["id"]])))
        ]
        executor = self._aside if self.config.log_lane == "background" else self._executor
        await naming_row(executor.fetch_chunks(SQL["create_logs"], chunks), "Log", rows, ids)
        return ids

    async def update_logs(self, logs: Iterable[Log | Mapping[str, Any]], *, timeout: float | None = None) -> None:
        """Replace `type` and `body` of logs, each where given, all or none. Whatever else is given is left as it is.

        Args:
            logs: Models or mappings with `id`, or mappings `{"id": ..., "updates": ...}`.

        Raises:
            ArgumentError: As `create_logs`.
            NotFoundError: A log does not exist; names it. Nothing was changed.

        Statement: sql/logs.sql update_logs. One round trip a chunk. Source: updateLogs.
        """
        ids, rows = await self._read_partial(Log, logs, fixed=("type", "body"), read=unwrap(Log, "updates"))
        if not rows:
            return
        bodies = _encode_bodies(rows, ids)
        chunks = [
            {
                "agent_id": self.agent_id,
                "ids": [row["id"] for row in chunk],
                "types": [row.get("type") for row in chunk],
                "bodies": [bodies.get(row["id"]) for row in chunk],
            }
            for chunk in self._chunks(rows, lambda row: len(bodies.get(row["id"], b"")))
        ]
        await naming_row(self._executor.fetch_chunks(SQL["update_logs"], chunks), "Log", rows, ids)

    async def delete_log(self, log_id: UUID | str, *, timeout: float | None = None) -> bool:
        """Delete a log; False when there was none.

        Statement: sql/logs.sql delete_logs. One round trip. Source: deleteLog; differs: this agent's only.
        """
        return await self.delete_logs([log_id]) > 0

    async def delete_logs(self, log_ids: Iterable[UUID | str], *, timeout: float | None = None) -> int:
        """Delete logs, all or none; give how many there were.

        Statement: sql/logs.sql delete_logs. One round trip a chunk. Source: deleteLogs.
        """
        return await self._delete_by_ids("delete_logs", log_ids, "log_ids")

    async def prune_logs(
        self,
        older_than: timedelta | datetime | float | None = None,
        keep: int | None = None,
        *,
        timeout: float | None = None,
    ) -> int:
        """Delete old logs of the agent, oldest first; give how many.

        Each batch of `config.batch_size` is a transaction of its own, so that nobody waits long. When both limits are
        given, only what is beyond both goes.

        Args:
            older_than: Only what is older than this time (an aware datetime, or milliseconds since 1970) or this age.
            keep: The newest so many stay in any case.

        Raises:
            ArgumentError: Neither is given, or one does not fit.

        Statement: sql/logs.sql prune_logs, one round trip a batch, and one more after several; get_oldest_kept_log
        before it for `keep`.
        """
        params = {"agent_id": self.agent_id, "batch_size": self.config.batch_size, **read_limits(older_than, keep)}
        if keep:
            oldest = await self._aside.fetch_row(SQL["get_oldest_kept_log"], agent_id=self.agent_id, keep=keep)
            if oldest is None:
                return 0
            params |= {"kept_time": oldest[0], "kept_id": oldest[1]}
        deleted: int = 0
        while True:
            [(batch, last_time, last_id)] = await self._aside.fetch(SQL["prune_logs"], **params)
            deleted += batch
            if batch == self.config.batch_size:
                params |= {"after_time": last_time, "after_id": last_id}
            elif params["after_id"] is not None:
                # Once more from the start: others may have let go of what they had locked meanwhile.
                params |= {"after_time": None, "after_id": None}
            else:
                return deleted

    # --- reading -----------------------------------------------------------------------------------------------------

    async def get_logs(
        self,
        *,
        entity_id: UUID | str | None = None,
        room_id: UUID | str | None = None,
        type: str | None = None,
        count: int | None = None,
        limit: int | None = None,
        offset: int | None = None,
        cursor: Cursor | None = None,
        timeout: float | None = None,
    ) -> list[Log]:
        """Get logs, newest first; equal times are ordered by id, descending. Filters combine with AND.

        Args:
            entity_id, room_id, type: Only of these.
            count: At most so many; default 10.
            limit: Another name of `count`.
            offset: Leave out so many of the newest; for deep pages `cursor` is faster.
            cursor: Only what comes after this log, exclusive: the last one of the page before, or its time and id.

        Raises:
            ArgumentError: A value does not fit; nothing was sent.

        Statement: sql/logs.sql get_logs, get_logs_by_type, get_logs_of_room or get_logs_of_entity. One round trip.
        Source: getLogs; differs: the entity filters, only this agent's, a total order.
        """
        number = as_limit(count, limit)
        if cursor is not None and offset:
            raise ArgumentError("cursor and offset exclude each other")
        params: dict[str, Any] = {
            "agent_id": self.agent_id,
            "entity_id": _codecs.as_optional_id(entity_id, "entity_id"),
            "room_id": _codecs.as_optional_id(room_id, "room_id"),
            "type": _codecs.as_optional_text(type, "type"),
            **read_cursor(Log, cursor),
            "count": 10 if number is None else number,
            "skip": _codecs.as_optional_count(offset, "offset"),
        }
        if params["entity_id"] is not None:
            statement = SQL["get_logs_of_entity"]
        elif params["room_id"] is not None:
            statement = SQL["get_logs_of_room"]
        else:
            statement = SQL["get_logs" if type is None else "get_logs_by_type"]
        return [Log(*row) for row in await self._executor.fetch(statement, **params)]

    async def get_logs_by_ids(self, log_ids: Iterable[UUID | str], *, timeout: float | None = None) -> list[Log]:
        """Get those of the logs that exist, in the order of the ids, each once.

        Statement: sql/logs.sql get_logs_by_ids. One round trip. Source: getLogsByIds.
        """
        return await self._get_by_ids("get_logs_by_ids", Log, log_ids, "log_ids")

    # --- runs --------------------------------------------------------------------------------------------------------

    async def get_agent_run_summaries(
        self,
        *,
        limit: int = 20,
        offset: int = 0,
        room_id: UUID | str | None = None,
        status: RunStatus | Literal["all"] | None = None,
        from_time: datetime | float | None = None,
        to_time: datetime | float | None = None,
        entity_id: UUID | str | None = None,
        timeout: float | None = None,
    ) -> AgentRunSummaryResult:
        """See the agent's runs: logs of type "run_event" with the same `body["runId"]`.

        Those that started last come first, those without a start at the end. A run that is chosen is told as a whole:
        its status is that of its latest event "completed", "timeout" or "error", also when that is outside the time
        chosen.

        Args:
            limit: At most so many, default 20; taken as 1 below that and as 100 above.
            offset: Leave out so many.
            room_id, entity_id: Only runs with an event there, of this entity.
            status: Only runs of this status; "all" and None: of any.
            from_time, to_time: Only runs with an event in this time, both ends included: aware datetimes or
                milliseconds since 1970. A `to_time` of whole milliseconds means to the end of the last one. With
                `room_id` and `entity_id`, one event must fit all.

        Returns:
            `runs`, the `total` that match, and whether some come after the page.

        Raises:
            ArgumentError: A value does not fit; nothing was sent.

        Statement: sql/logs.sql get_agent_run_summaries. One round trip. Source: getAgentRunSummaries; differs: true
        durations and totals, the latest terminal event decides, the entity filters.
        """
        if status is not None:
            _codecs.as_choice(status, ("all", *get_args(RunStatus)), "status")
        if isinstance(limit, bool) or not isinstance(limit, int):
            raise ArgumentError(f"limit must be a whole number, not {show(limit)}")
        skip = _codecs.as_count(offset, "offset")
        filters = {
            "room_id": _codecs.as_optional_id(room_id, "room_id"),
            "entity_id": _codecs.as_optional_id(entity_id, "entity_id"),
            "from_time": _codecs.as_optional_time(from_time, "from_time"),
            "to_time": _codecs.as_optional_end(to_time, "to_time"),
        }
        rows = await self._executor.fetch(
            SQL["get_agent_run_summaries"],
            agent_id=self.agent_id,
            narrowed=any(value is not None for value in filters.values()),
            status=None if status == "all" else status,
            skip=skip,
            count=min(max(limit, 1), 100),
            **filters,
        )
        # One row comes in any case, with the total; without a run in it, the page is empty.
        total: int = rows[0]["total"]
        runs = [_summary(*row) for row in rows if row["run_id"] is not None]
        return AgentRunSummaryResult(runs, total, has_more=skip + len(runs) < total)


def _summary(_: int, *columns: Any) -> AgentRunSummary:
    return AgentRunSummary(*[*columns[:-4], AgentRunCounts(*columns[-4:])])


def _encode_bodies(rows: Iterable[Mapping[str, Any]], ids: Sequence[UUID]) -> dict[UUID, bytes]:
    """Encode the bodies of a batch; an error names the position.

    Args:
        rows: The fields, every id once.
        ids: The id of every value in the order given.
    """
    positions = {id: position for position, id in reversed(list(enumerate(ids)))}
    return {
        row["id"]: _encode_body(row["body"], f"body at position {positions[row['id']]}")
        for row in rows
        if "body" in row
    }


def _encode_body(body: dict[str, Any], name: str) -> bytes:
    try:
        encoded = _codecs.encode_json(body, name)
    except ArgumentError:
        # Rare, and three times as slow: integers beyond 64 bits and what contains itself.
        encoded = _codecs.encode_json(_tame(body, name, ()), name)
    if len(encoded) > _MAX_BYTES:
        raise ArgumentError(f"{name} takes {len(encoded):,} bytes of JSON; at most {_MAX_BYTES:,} are stored")
    return encoded


def _tame(value: Any, name: str, around: tuple[int, ...]) -> Any:
    """Write what JSON's encoder refuses in another form; of a key that is no text and no number it says so itself.

    Args:
        value: A part of the body.
        name: What an error calls the body.
        around: Identities of the containers that the value is in.
    """
    value = _tame_number(value, name)
    if not isinstance(value, (Mapping, list, tuple)):
        return value
    if id(value) in around:
        return None
    if len(around) >= _MAX_DEPTH:
        raise ArgumentError(f"{name} is nested deeper than {_MAX_DEPTH} levels")
    around = (*around, id(value))
    if isinstance(value, Mapping):
        return {_tame_number(key, name): _tame(item, name, around) for key, item in value.items()}
    return [_tame(item, name, around) for item in value]


def _tame_number(value: Any, name: str) -> Any:
    if not isinstance(value, int) or -(2**63) <= value < 2**64:
        return value
    try:
        return str(value)
    except ValueError as error:
        raise ArgumentError(f"{name} holds a number that cannot be written: {error}") from None
