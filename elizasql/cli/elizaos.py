"""`elizasql import --from`: the way over from ElizaOS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

from elizasql.config import Config, redact
from elizasql.errors import ArgumentError, ConfigurationError
from elizasql.transfer import Decisions, Summary
from elizasql.transfer._report import Report
from elizasql.transfer.elizaos import open_elizaos
from elizasql.transfer.node import serve_pglite

from . import _out, _place, data, server


async def take_over(
    source: str,
    chosen: list[UUID] | None,
    report: Report,
    advance: _out.Advance,
    dry_run: bool,
    index: bool,
    dimension: int | None,
    dsn: str | None,
    data_dir: str | None,
) -> dict[str, Any]:
    """Take over a database of the original, on PostgreSQL or in the folder of a PGlite."""
    clock = asyncio.get_running_loop().time
    async with _reach_source(source) as address, AsyncExitStack() as stack:
        config = _place.load(dsn, data_dir)
        taking = await stack.enter_async_context(open_elizaos(address, config, agent_ids=chosen, dimension=dimension))
        if dry_run:
            summary, decisions = await taking.run(None, report.add, advance)
            names = ("table", "read", "folded", "refused", "altered")
            rows = [{name: row[name] for name in names} for row in summary.rows()]
            return {"agents": _agents(decisions), "tables": rows, "remarks": _remarks(decisions, address)}
        async with _place.reach(dsn, data_dir, create=True) as place:
            await server.bring_up_to_date(place)
            began = clock()
            async with place.open(UUID(int=0), timeout=data._PATIENCE) as db:
                summary, decisions = await taking.run(db, report.add, advance)
            seconds = clock() - began
            await stack.aclose()  # what is left, the index, needs no snapshot of the source
            told = await data.finish(place, summary, list(decisions.dimensions), seconds, advance, index=index)
    remarks = [*_speed(summary, seconds), *_remarks(decisions, address)]
    return {"agents": _agents(decisions), **told, "remarks": remarks}


@asynccontextmanager
async def _reach_source(source: str) -> AsyncIterator[str]:
    """Give the connection string of what `--from` names."""
    if "://" in source:
        try:
            address = Config.load(environ={}, dsn=source).dsn or ""
        except ConfigurationError as error:
            raise ArgumentError(f"--from: {error}") from None
        yield address
        return
    async with serve_pglite(_find_pglite(source)) as address:
        yield address


def _find_pglite(source: str) -> Path:
    folder = Path(source).expanduser()
    if not (folder / "PG_VERSION").is_file():
        raise ArgumentError(f"--from: {source} is neither a connection string nor the folder of a PGlite")
    return folder.resolve()


def _agents(decisions: Decisions) -> list[dict[str, Any]]:
    return [
        {
            "agent": agent,
            "takes width": decisions.dimensions.get(agent),
            "vectors": ", ".join(f"{count:,} of {width}" for width, count in widths.items()),
        }
        for agent, widths in decisions.found.items()
    ]


def _speed(summary: Summary, seconds: float) -> list[str]:
    if not summary.created["memories"]:
        return []
    return [f"{summary.created['memories'] / seconds:,.0f} memories/s"]


def _remarks(decisions: Decisions, source: str) -> list[str]:
    said = [
        f"{count:,} {table} of other agents were copied for an agent that refers to them"
        for table, count in decisions.copied.items()
        if count
    ]
    said += [
        f"the table {name} ({'nobody knows how many' if rows is None else f'about {rows:,}'} rows) has no counterpart "
        f"here and was left in {redact(source)}"
        for name, rows in decisions.left.items()
    ]
    return said
