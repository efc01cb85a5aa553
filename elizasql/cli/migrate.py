"""Migrations: this library's, and folders of your own, each in a schema of its own with its own table of versions."""

from __future__ import annotations

import asyncio
import os
import re
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Annotated

import typer

from elizasql import _migrate, _pool
from elizasql._statements import find_folder
from elizasql.errors import ArgumentError, MigrationError
from elizasql.transfer._report import naming

from . import _out, _place
from ._destructive import find_destructive, split_migration
from ._place import DataDir, Dsn, Json, Place

PERMISSION = "ELIZA_ALLOW_DESTRUCTIVE_MIGRATIONS"
_RESERVED = re.compile(r"public|elizasql|migrations|information_schema|pg_.*")
_FILE = re.compile(r"(\d+).*\.sql")  # what dbmate takes for a migration

app: typer.Typer = typer.Typer(
    help="Bring the schema up to date, or back.", no_args_is_help=True, rich_markup_mode=None
)

Dirs = Annotated[
    list[str] | None,
    typer.Option(
        "--dir",
        metavar="[SCHEMA=]FOLDER",
        help="A folder of migrations of your own, in place of elizasql's; may be repeated. Its tables and its versions "
        "are in the schema SCHEMA, by default the folder's name.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and do nothing.")]


@dataclass(frozen=True, slots=True)
class Source:
    """A folder of migrations.

    Attributes:
        schema: Where its tables go.
        folder: None: this library's own.
    """

    schema: str
    folder: Path | None

    @property
    def path(self) -> Path:
        """The folder, whichever it is."""
        return self.folder or find_folder("migrations")

    def files(self) -> list[Path]:
        """Give the migration files, oldest first."""
        return sorted(path for path in self.path.iterdir() if _FILE.fullmatch(path.name))

    def check(self) -> None:
        """Refuse two files of one version: when the first is applied, dbmate counts the other as applied, too."""
        found: dict[str, str] = {}
        for path in self.files():
            version = re.sub(r"\D.*", "", path.name)
            if version in found:
                raise ArgumentError(f"--dir: {found[version]} and {path.name} have one version: rename one of them")
            found[version] = path.name


@dataclass(frozen=True, slots=True)
class Step:
    """A migration that is to be applied or taken back: what is run, and what of that takes data away."""

    schema: str
    file: str
    sql: str
    destructive: list[str]


def read_sources(given: list[str] | None) -> list[Source]:
    """Read the folders that are given."""
    if not given:
        return [Source("elizasql", None)]
    sources = []
    for text in given:
        schema, equals, folder = text.partition("=")
        path = Path(folder if equals else text).expanduser()
        if not path.is_dir():
            raise ArgumentError(f"--dir: there is no folder {path}")
        source = Source(name_schema(schema if equals else path.resolve().name, given=bool(equals)), path.resolve())
        source.check()
        sources.append(source)
    schemas = [source.schema for source in sources]
    if twice := sorted({name for name in schemas if schemas.count(name) > 1}):
        raise ArgumentError(f"--dir: two folders for the schema {twice[0]}: name one of them with SCHEMA=FOLDER")
    return sources


def name_schema(text: str, *, given: bool) -> str:
    """Check the name of a schema that is given, or make one of a folder's name."""
    name = text if given else re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,62}", name):
        raise ArgumentError(f"--dir: {name!r} is no name of a schema: give one as SCHEMA=FOLDER, in a-z, 0-9 and _")
    if _RESERVED.fullmatch(name):
        raise ArgumentError(f"--dir: the schema {name} belongs to somebody else: give another one as SCHEMA=FOLDER")
    return name


@app.command("up")
def up(
    dirs: Dirs = None, dry_run: DryRun = False, dsn: Dsn = None, data_dir: DataDir = None, json: Json = False
) -> None:
    """Apply what is pending. Statements that take data away need ELIZA_ALLOW_DESTRUCTIVE_MIGRATIONS=true."""
    sources = read_sources(dirs)

    async def work() -> None:
        config = _place.load(dsn, data_dir)
        if dry_run and config.dsn is None and not _place.has_cluster(config):
            # A server that would have to be made first has no version of anything.
            _show([_step(source, path, down=False) for source in sources for path in source.files()], json, dry_run)
            return
        async with _place.reach(dsn, data_dir, create=True) as place:
            await _look(place, sources, check=True)
            pending = [step for source in sources for step in await _pending(place, source)]
            if not dry_run:
                _refuse_destructive([step for step in pending if step.schema != "elizasql"])
                for source in sources:
                    if any(step.schema == source.schema for step in pending):
                        await _run(place, source, "migrate")
                        if source.folder is None:
                            async with place.connect(ready=False) as connection:
                                await _migrate.confirm(connection, place.address, place.config)
            _show(pending, json, dry_run)

    asyncio.run(work())


@app.command("down")
def down(
    dirs: Dirs = None, dry_run: DryRun = False, dsn: Dsn = None, data_dir: DataDir = None, json: Json = False
) -> None:
    """Take back the newest migration of each folder. What drops data needs ELIZA_ALLOW_DESTRUCTIVE_MIGRATIONS=true."""
    sources = read_sources(dirs)

    async def work() -> None:
        async with _place.reach(dsn, data_dir) as place:
            await _look(place, sources)
            steps = []
            for source in sources:
                applied = [name for name, done in await _versions(place, source) if done]
                if applied:
                    steps.append(_step(source, source.path / applied[-1], down=True))
            if not dry_run:
                _refuse_destructive(steps)
                for source in sources:
                    for step in steps:
                        if step.schema == source.schema:
                            # Of all files it would take the newest by then: somebody else may take back this one.
                            await _run(place, source, "rollback", only=step.file)
            _show(steps, json, dry_run)

    asyncio.run(work())


@app.command("status")
def status(dirs: Dirs = None, dsn: Dsn = None, data_dir: DataDir = None, json: Json = False) -> None:
    """List the migrations and which of them are applied."""
    sources = read_sources(dirs)

    async def work() -> None:
        async with _place.reach(dsn, data_dir) as place:
            await _look(place, sources)
            rows = [
                {"schema": source.schema, "file": name, "applied": done}
                for source in sources
                for name, done in await _versions(place, source)
            ]
        if json:
            _out.emit(rows)
        else:
            _out.table(
                ["schema", "file", ""],
                [[row["schema"], row["file"], "applied" if row["applied"] else "pending"] for row in rows],
                ["" if row["applied"] else "warning" for row in rows],
            )

    asyncio.run(work())


@app.command("new")
def new(
    name: Annotated[str, typer.Argument(help="What it does, such as add_invoices.")],
    dir: Annotated[Path, typer.Option(help="Folder of your own migrations; made when missing.")] = Path("migrations"),
    json: Json = False,
) -> None:
    """Begin a migration. Makes a file with an empty part for up and one for down."""
    cleaned = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    if not cleaned:
        raise ArgumentError(f"{name!r} is no name for a file")
    if dir.resolve() == find_folder("migrations").resolve():
        raise ArgumentError("--dir: elizasql's own migrations come with elizasql: choose a folder of your own")
    dir.mkdir(parents=True, exist_ok=True)
    now = datetime.now(timezone.utc)
    while any(dir.glob(f"{now:%Y%m%d%H%M%S}*.sql")):  # made in the same second
        now += timedelta(seconds=1)
    path = dir / f"{now:%Y%m%d%H%M%S}_{cleaned}.sql"
    file = path.open("x", encoding="utf-8")
    try:
        with naming(path), file:
            file.write("-- migrate:up\n\n\n-- migrate:down\n\n")
    except OSError:
        path.unlink()  # `migrate up` would stumble over what is left of it
        raise
    if json:
        _out.emit({"file": str(path)})
    else:
        _out.say(path)


# --- what they have in common ----------------------------------------------------------------------------------------


async def _look(place: Place, sources: list[Source], *, check: bool = False) -> None:
    """See whether there is a server at all; for our own migrations, whether they are the newest that it has had.

    Args:
        place: The server.
        sources: The folders that are meant.
        check: Refuse for our own migrations a server that no adapter would take.
    """
    async with place.connect(ready=False) as connection, _pool.steady(connection, place.config):
        if any(source.folder is None for source in sources):
            if check:
                (await _pool.look_at(connection)).check()
            await _migrate.pending_versions(connection)


async def _run(place: Place, source: Source, command: str, *, only: str | None = None) -> str:
    words = (command,) if command == "status" else ("--migration-lock", command)
    return await _migrate.run_dbmate(
        *words,
        dsn=place.address,
        config=place.config,
        folder=source.folder,
        table=f"{source.schema}.schema_migrations",
        only=only,
    )


async def _versions(place: Place, source: Source) -> list[tuple[str, bool]]:
    """Give the files that dbmate knows of, oldest first, and whether they are applied; changes nothing."""
    if not source.files():
        return []
    said = await _run(place, source, "status")
    return [(line[4:], line[1] == "X") for line in said.splitlines() if re.match(r"\[[ X]\] ", line)]


async def _pending(place: Place, source: Source) -> list[Step]:
    versions = await _versions(place, source)
    return [_step(source, source.path / name, down=False) for name, done in versions if not done]


def _step(source: Source, path: Path, *, down: bool) -> Step:
    sql = split_migration(path.read_text(encoding="utf-8"))[1 if down else 0]
    return Step(source.schema, path.name, sql, find_destructive(sql))


def _refuse_destructive(steps: list[Step]) -> None:
    if os.environ.get(PERMISSION, "").strip().lower() == "true":
        return
    for step in steps:
        if step.destructive:
            more = f" and {len(step.destructive) - 1} more" if len(step.destructive) > 1 else ""
            raise MigrationError(
                f"{step.schema}/{step.file} may take data away ({step.destructive[0]}{more}); nothing was done: "
                f"look at it with --dry-run, and set {PERMISSION}=true to allow it"
            )


def _show(steps: list[Step], json: bool, dry_run: bool) -> None:
    if json:
        _out.emit(
            [
                {"schema": step.schema, "file": step.file, "destructive": step.destructive, "done": not dry_run}
                | ({"sql": step.sql} if dry_run else {})
                for step in steps
            ]
        )
        return
    if not steps:
        _out.say("nothing to do")
    for step in steps:
        _out.say(f"{'would run' if dry_run else 'done'}  {step.schema}/{step.file}")
        if dry_run:
            for statement in step.destructive:
                _out.say(f"  takes data away: {statement}", style="warning")
            _out.say(step.sql)
