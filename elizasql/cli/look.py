"""Looking at what is stored: stats, tail, tasks."""

from __future__ import annotations

import asyncio
from datetime import datetime, timezone
from typing import Annotated, Any

import orjson
import typer

from elizasql import DatabaseAdapter, Log, Task
from elizasql._statements import SQL
from elizasql.errors import NotFoundError

from . import _out, _place
from ._place import AgentId, DataDir, Dsn, Json

OneAgent = Annotated[str | None, typer.Option("--agent", help="Only the agent of this id.")]

# Seconds between two looks for new logs, and how many are remembered: one that was committed late stands among them.
_PAUSE, _WINDOW = 1.0, 100


def add_to(app: typer.Typer) -> None:
    """Put the commands into the application."""
    app.command()(stats)
    app.command()(tail)
    app.command()(tasks)


def stats(agent: OneAgent = None, dsn: Dsn = None, data_dir: DataDir = None, json: Json = False) -> None:
    """Count what each agent has. With --agent also its memories by type."""

    async def work() -> None:
        async with _place.reach(dsn, data_dir) as place, place.connect() as connection:
            chosen = None if agent is None else _place.read_agent(agent)
            agents = [dict(row) for row in await connection.fetch(SQL["count_rows_of_agents"].sql, chosen)]
            types = []
            if chosen is not None and not agents:
                raise NotFoundError(f"there is no agent {chosen}")
            if chosen is not None:
                types = [dict(row) for row in await connection.fetch(SQL["count_memories_by_type"].sql, chosen)]
            database = await connection.fetchrow(SQL["look_at_database"].sql)
            assert database is not None
        if json:
            _out.emit({"bytes": database["bytes"], "agents": agents} | ({"types": types} if chosen else {}))
            return
        _show_rows(agents)
        if chosen is not None:
            _out.say()
            _show_rows(types)
        _out.say(f"\n{database['bytes'] / 1e6:,.1f} MB in the database {database['name']}")

    asyncio.run(work())


def _show_rows(rows: list[dict[str, Any]]) -> None:
    if rows:
        _out.table(list(rows[0]), [list(row.values()) for row in rows])


def tail(
    agent: AgentId = None,
    count: Annotated[int, typer.Option("-n", "--count", min=0, help="How many of the newest.")] = 10,
    type: Annotated[str | None, typer.Option(help='Only of this type, such as "run_event".')] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on with what comes, until Ctrl-C.")] = False,
    dsn: Dsn = None,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Show an agent's newest logs, the newest last."""

    async def work() -> None:
        async with _place.reach(dsn, data_dir) as place:
            chosen = await place.choose_agent(agent)
            async with place.open(chosen) as db:
                known = await db.get_logs(type=type, count=max(count, _WINDOW))
                _show_logs(known[:count], json=json)
                while follow:
                    await asyncio.sleep(_PAUSE)
                    new = await _newer(db, type, known)
                    _show_logs(new, json=json)
                    known = _newest(new + known)

    asyncio.run(work())


async def _newer(db: DatabaseAdapter, type: str | None, known: list[Log]) -> list[Log]:
    """Give the logs that have come since, newest first: those above the oldest that is known, and not known."""
    ids, oldest = {log.id for log in known}, min(map(_rank, known), default=None)
    new: list[Log] = []
    page = await db.get_logs(type=type, count=_WINDOW)
    while page:
        above = [log for log in page if oldest is None or _rank(log) > oldest]
        new += [log for log in above if log.id not in ids]
        if len(above) < len(page):
            break
        page = await db.get_logs(type=type, count=_WINDOW, cursor=page[-1])
    return new


def _newest(logs: list[Log]) -> list[Log]:
    """Give those that later looks compare with; one that was committed late is older than some behind it."""
    return sorted(logs, key=_rank, reverse=True)[:_WINDOW]


def _rank(log: Log) -> tuple[Any, Any]:
    return log.created_at, log.id


def _show_logs(logs: list[Log], *, json: bool) -> None:
    for log in reversed(logs):
        if json:
            _out.emit(log.to_dict(), lines=True)
        else:
            _out.say(log.created_at, f"{log.type:<20}", orjson.dumps(log.body).decode())


def tasks(
    agent: AgentId = None,
    tag: Annotated[list[str] | None, typer.Option(help="Only with this tag; may be repeated.")] = None,
    count: Annotated[int | None, typer.Option("-n", "--count", min=0, help="At most so many.")] = None,
    dsn: Dsn = None,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Show an agent's tasks and how each stands. It is ready, waiting, claimed, dead, or not for workers."""

    async def work() -> None:
        async with _place.reach(dsn, data_dir) as place:
            chosen = await place.choose_agent(agent)
            async with place.open(chosen) as db:
                found = await db.get_tasks(tags=tag or None, count=count)
        now = datetime.now(timezone.utc)
        if json:
            _out.emit([{**task.to_dict(), "state": state_of(task, now)} for task in found])
        else:
            rows = [
                [task.id, task.name, state_of(task, now), task.attempts, task.ready_at, ", ".join(task.tags or [])]
                for task in found
            ]
            _out.table(["id", "name", "state", "attempts", "ready at", "tags"], rows)

    asyncio.run(work())


def state_of(task: Task, now: datetime) -> str:
    """Say in a word how a task stands."""
    if "queue" not in (task.tags or []):
        return "not for workers"
    held = task.ready_at is not None and task.ready_at > now
    if task.claim_token is not None and held:
        return "claimed"
    if (task.attempts or 0) >= (task.max_attempts or 1):
        return "dead"
    return "waiting" if held or (task.due_at is not None and task.due_at > now) else "ready"
