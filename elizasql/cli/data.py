"""Moving data: export, import, backup, restore."""

from __future__ import annotations

import asyncio
import os
import shutil
import struct
import subprocess
import uuid
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import typer

from elizasql import DatabaseAdapter, _embedded
from elizasql._indexer import BUILD_TIME
from elizasql._statements import SQL
from elizasql.config import Config
from elizasql.errors import ArgumentError, ConfigurationError, ElizaSQLError
from elizasql.transfer import Archive, Summary, export_archive, import_archive
from elizasql.transfer._report import Report, naming, open_private, place
from elizasql.transfer._rows import refuse_missing
from elizasql.transfer.importer import check_parts

from . import _out, _place, server
from ._place import DataDir, Dsn, Json, Place

# Seconds that one statement of an import may take, and the building of an index behind it.
_PATIENCE = BUILD_TIME

# Seconds for what goes over all vectors of an agent, batch by batch, and may be ended and begun again at any time.
LONG = 7 * 86_400.0

# With so many new vectors, building the index anew may be faster than adding them one by one: the server tells, which
# knows what else is in the index, and whether this role may build it.
_REBUILD = 5000

# The end of a backup: the length of what makes the roles, in front of it, and the mark.
_END, _MARK = struct.Struct(">Q8s"), b"elizasql"

Agents = Annotated[list[str] | None, typer.Option("--agent", help="Only this agent; may be repeated.")]


def add_to(app: typer.Typer) -> None:
    """Put the commands into the application."""
    app.command("export")(export)
    app.command("import")(import_)
    app.command("index")(index_)
    app.command()(backup)
    app.command()(restore)


# --- export and import -----------------------------------------------------------------------------------------------


def export(
    path: Annotated[Path, typer.Argument(help="What to make: a name in .tar or .tar.gz for a file, else a folder.")],
    agent: Agents = None,
    dsn: Dsn = None,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Write agents with all that is theirs into an archive. What is in it is one consistent snapshot."""
    if str(path) == "-":
        raise ArgumentError("an archive is a file or a folder: it cannot be written to standard output")

    async def work() -> dict[str, Any]:
        chosen = _read_agents(agent)
        async with _place.reach(dsn, data_dir) as place:
            async with place.connect():
                pass  # is the schema up to date?
            with _out.progress(shown=not json) as advance:
                return await export_archive(place.address, path, place.config, agent_ids=chosen, advance=advance)

    told = asyncio.run(work())
    if json:
        _out.emit({"path": str(path), **told})
    else:
        _out.table(["table", "rows"], list(told["rows"].items()))
        _out.say(f"{_out.counted(len(told['agents']), 'agent')} in {path}")


def _read_agents(given: list[str] | None) -> list[UUID] | None:
    return [_place.read_agent(text) for text in given] if given else None


def import_(
    path: Annotated[Path | None, typer.Argument(help="An archive that `elizasql export` made.")] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="URL|FOLDER",
            help="A database that ElizaOS's plugin-sql wrote: PostgreSQL, or the folder of a PGlite (needs Node).",
        ),
    ] = None,
    agent: Agents = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Look at everything and write nothing.")] = False,
    report: Annotated[
        Path | None, typer.Option(help="Where to list rows that cannot be taken. Default: elizasql-import-TIME.jsonl.")
    ] = None,
    index: Annotated[bool, typer.Option(help="Put the vectors into the index at the end.")] = True,
    dimension: Annotated[
        int | None, typer.Option(help="With --from: the width of the vectors to take, where the newest are not meant.")
    ] = None,
    dsn: Dsn = None,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Take over an archive, or with --from a database of ElizaOS. May be repeated: what is there stays as it is."""
    if (path is None) == (source is None):
        raise ArgumentError("give either an archive or --from")
    if path is not None and dimension is not None:
        raise ArgumentError("--dimension goes with --from: an archive holds vectors of one width for each agent")
    told = Report(report or Path(f"elizasql-import-{datetime.now():%Y%m%d-%H%M%S}.jsonl"))  # noqa: DTZ005
    try:
        told.check()  # else it is found out by the first row to list, perhaps after hours
    except OSError as error:
        raise ArgumentError(
            f"the report {told.path} cannot be written: {error.strerror}; --report names another place"
        ) from None

    async def work() -> dict[str, Any]:
        chosen = _read_agents(agent)
        with _out.progress(shown=not json) as advance:
            if path is not None:
                return await _import_archive(path, chosen, told, advance, dry_run, index, dsn, data_dir)
            from .elizaos import take_over  # noqa: PLC0415 - only needed here

            assert source is not None
            return await take_over(source, chosen, told, advance, dry_run, index, dimension, dsn, data_dir)

    try:
        result = asyncio.run(work())
    except KeyboardInterrupt:
        raise InterruptedWorkError("interrupted: what was imported so far stays; do it again to go on") from None
    finally:
        told.close()
    result["report"] = str(told.path) if told.count else None
    if json:
        _out.emit(result)
        return
    for name in ("agents", "tables"):
        if result.get(name):
            _out.table(list(result[name][0]), [list(row.values()) for row in result[name]])
            _out.say()
    for line in result.get("remarks", ()):
        _out.say(line)
    if told.count:
        rows = _out.counted(told.count, "row")
        _out.say(f"{rows} could not be taken, or not as they were: see {told.path}", style="warning")
    _out.say("nothing was written" if dry_run else f"done in {result['seconds']:,.1f} s")


class InterruptedWorkError(ElizaSQLError):
    """The user ended what can be gone on with."""


async def _import_archive(
    path: Path,
    chosen: list[UUID] | None,
    report: Report,
    advance: _out.Advance,
    dry_run: bool,
    index: bool,
    dsn: str | None,
    data_dir: str | None,
) -> dict[str, Any]:
    with Archive(path) as archive:
        agents = archive.find_agents(chosen)
        if dry_run:
            parts = archive.parts_of(agents)
            await check_parts(archive, parts, advance)
            rows: dict[str, int] = {}
            for part in parts:
                if not part.name.endswith(".npy"):
                    rows[part.table] = rows.get(part.table, 0) + part.rows
            return {"agents": agents, "tables": [{"table": name, "rows": count} for name, count in rows.items()]}
        async with _place.reach(dsn, data_dir, create=True) as place:
            await server.bring_up_to_date(place)
            began = asyncio.get_running_loop().time()
            async with place.open(UUID(int=0), timeout=_PATIENCE) as db:
                summary = await import_archive(db, archive, agent_ids=chosen, refuse=report.add, advance=advance)
            seconds = asyncio.get_running_loop().time() - began
            return await finish(place, summary, [UUID(each["id"]) for each in agents], seconds, advance, index=index)


async def finish(
    place: Place, summary: Summary, agents: list[UUID], seconds: float, advance: _out.Advance, *, index: bool
) -> dict[str, Any]:
    """Put new vectors into the index, and say what was done."""
    began = asyncio.get_running_loop().time()
    # Those that were there already, too: an earlier import may have been interrupted before it came to this.
    for agent_id in agents if index and summary.read["embeddings"] else ():
        async with place.open(agent_id, timeout=_PATIENCE) as db:
            await _index(db, advance, rebuild=None)
    return {
        "tables": summary.rows(),
        "seconds": round(seconds, 3),
        "index_seconds": round(asyncio.get_running_loop().time() - began, 3),
    }


async def _index(db: DatabaseAdapter, advance: _out.Advance, *, rebuild: bool | None) -> int:
    """Put the vectors that wait into the index; one that was lost is made again, also where none waits.

    `rebuild`: build it anew; None: where that is likely to be faster.
    """
    waiting: int = (await db.stats())["unindexed"]
    name = f"index {db.agent_id}"
    if waiting or rebuild:
        advance(name, 0, waiting or None)
    if rebuild is None:
        rebuild = waiting >= _REBUILD and await db._indexer.drop(waiting)
    # Added one by one, a million vectors take more than an hour.
    return await db.index_memories(lambda done, total: advance(name, done, total), rebuild=rebuild, timeout=LONG)


def index_(
    agent: Agents = None,
    rebuild: Annotated[
        bool,
        typer.Option(help="Build the index anew, faster where most is new; writes to the same partition wait."),
    ] = False,
    dsn: Dsn = None,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Put the vectors that wait into the index now. A lost index is built again. All agents', or some agents'."""

    async def work() -> list[dict[str, Any]]:
        async with _place.reach(dsn, data_dir) as place:
            chosen = _read_agents(agent)
            async with place.connect() as connection:
                rows = await connection.fetch(SQL["list_agents_to_index"].sql, chosen)
            refuse_missing(chosen, rows)
            moved = []
            built: set[str] = set()  # agents share indexes
            with _out.progress(shown=not json) as advance:
                for row in rows:
                    anew = rebuild and row["has_vectors"] and row["index_name"] not in built
                    async with place.open(row["id"], timeout=_PATIENCE) as db:
                        count = await _index(db, advance, rebuild=anew)
                    if anew:
                        built.add(row["index_name"])
                    moved.append({"id": row["id"], "name": row["name"], "moved": count})
            return moved

    try:
        told = asyncio.run(work())
    except KeyboardInterrupt:
        raise InterruptedWorkError(
            "interrupted: what was moved so far stays, an index in the making does not; do it again to go on"
        ) from None
    if json:
        _out.emit(told)
    else:
        _out.table(["id", "name", "moved"], [list(row.values()) for row in told])


# --- backup and restore ----------------------------------------------------------------------------------------------


def backup(
    path: Annotated[Path, typer.Argument(help="The file to make.")],
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Write the embedded server's database into a file. Its roles, too; it may be in use meanwhile."""
    config = _place.load(None, data_dir)
    if config.dsn is not None:
        raise ArgumentError(
            "POSTGRES_URL names a server that is not embedded: save that with pg_dump, or say with --data-dir which is"
        )
    if os.path.lexists(path):
        raise ArgumentError(f"{path} is there already: choose another name")

    async def work() -> None:
        async with _place.reach(None, str(config.data_dir)):
            unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
            try:
                # It holds all that the server's folder keeps from others, and hashes of passwords.
                with naming(path):
                    open_private(unfinished, "xb").close()
                # As superuser: it also holds what others than elizasql keep in the database.
                await _run(config, "pg_dump", "--format=custom", "--compress=1", f"--file={unfinished}")
                roles = await _run(config, "pg_dumpall", "--roles-only")
                with naming(path):
                    with unfinished.open("ab") as file:
                        file.write(roles + _END.pack(len(roles), _MARK))
                        file.flush()
                        os.fsync(file.fileno())
                    place(unfinished, path)
            finally:
                unfinished.unlink(missing_ok=True)

    asyncio.run(work())
    if json:
        _out.emit({"path": str(path), "bytes": path.stat().st_size})
    else:
        _out.say(f"{path}: {path.stat().st_size / 1e6:,.1f} MB")


def restore(
    path: Annotated[Path, typer.Argument(help="A file that `elizasql backup` made.")],
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Make a new embedded server out of a backup. The folder must be new or empty."""
    config = _place.load(None, data_dir)
    folder = config.data_dir.expanduser().resolve()
    roles = _read_roles(path)
    # One that is there is filled, not replaced: where a disk is mounted it cannot be.
    fills = folder.is_dir()
    if os.path.lexists(folder) and not (fills and {each.name for each in folder.iterdir()} <= {"lost+found"}):
        raise ArgumentError(f"{folder} is not empty: restore into a new folder with --data-dir")

    async def work() -> None:
        name = f".{folder.name}.{uuid.uuid4().hex[:8]}.partial"
        unfinished = folder / name if fills else folder.with_name(name)
        try:
            if fills and os.geteuid() == 0 and (owner := folder.stat()).st_uid:
                # Else it would be a system user's, and whose folder it is could not use what is in it.
                unfinished.mkdir(mode=0o700)
                _embedded.give_over(unfinished, owner.st_uid, owner.st_gid)
            made = await _embedded.acquire(unfinished)
            try:
                config = _place.load(None, str(unfinished))
                await _run(config, "psql", "--no-psqlrc", "--single-transaction", "--set=ON_ERROR_STOP=1", said=roles)
                whole = ("--exit-on-error", "--single-transaction", "--dbname=elizasql")
                await _run(config, "pg_restore", *whole, str(path.resolve()))
            finally:
                await made.release()
            if fills:
                # Its lock makes a folder a server's: that comes last, and nobody uses what is not all there.
                for each in sorted(unfinished.iterdir(), key=lambda each: each.name == "elizasql.lock"):
                    each.rename(folder / each.name)
            else:
                unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    asyncio.run(work())
    if json:
        _out.emit({"data_dir": str(folder)})
    else:
        _out.say(f"restored to {folder}")


def _read_roles(path: Path) -> bytes:
    """Give the statements that make the roles of a backup: they stand behind the dump, which ends before them."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - _END.size, 0))
        end = file.read()
        length, mark = _END.unpack(end) if len(end) == _END.size else (0, b"")
        if mark == _MARK:
            file.seek(size - _END.size - length)
            roles = file.read(length)
        file.seek(0)
        if file.read(5) != b"PGDMP":
            raise ConfigurationError(f"{path} is no backup: `elizasql backup` makes them")
    if mark != _MARK:
        raise ConfigurationError(f"{path} is no whole backup: its end is missing")
    for name in (b"elizasql", b"postgres"):  # every embedded server has them
        roles = roles.replace(b"\nCREATE ROLE %b;\n" % name, b"\n", 1)
    return roles


async def _run(config: Config, program: str, *arguments: str, said: bytes = b"") -> bytes:
    """Run one of PostgreSQL's programs on the embedded server as its superuser, and give what it prints."""
    cluster = _embedded._Cluster(config.data_dir)
    _, environ = server.for_libpq(cluster.dsn("postgres"), embedded=True)
    where = {"PGHOST": str(cluster._socket_dir()), "PGPORT": "5432", "PGUSER": "postgres", "PGDATABASE": "elizasql"}
    process = await asyncio.create_subprocess_exec(
        str(_embedded._binaries() / program),
        *arguments,
        env={**environ, **where},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        printed, complaint = await process.communicate(said)
    except BaseException:
        with suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
        raise
    if process.returncode:
        lines = complaint.decode(errors="replace").strip().splitlines() or [f"exit code {process.returncode}"]
        raise ProgramError(f"{program} failed: {' '.join(lines[:3])}")
    return printed


class ProgramError(ElizaSQLError):
    """A program of PostgreSQL failed."""
