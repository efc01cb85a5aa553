"""Migrations are killed in the middle: at every statement, by every way to die, and with eight starters at once.

The invariant: whatever died and wherever, the next start brings the schema to where an undisturbed one has it, each
version exactly once.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

import elizasql
from elizasql import _embedded, _migrate
from tests import schema_dump
from tests.faults.harness import no_leaks
from tests.faults.server import FaultServer, as_superuser, count, until

VERSIONS = _migrate.known_versions()
SETTINGS: dict[str, Any] = {"indexing": "manual", "pool_min_size": 0, "pool_max_size": 2, "connection_timeout": 20.0}

# Counts the statements that change the schema, and at one of them ends the session, or waits to be killed.
TRAP = """
CREATE SEQUENCE public.statements;
CREATE TABLE public.trap (at bigint, waits boolean);
INSERT INTO public.trap VALUES (0, false);
CREATE FUNCTION public.spring() RETURNS event_trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE number bigint := nextval('public.statements'); chosen public.trap;
BEGIN
    SELECT * INTO chosen FROM public.trap;
    IF number = chosen.at THEN
        IF chosen.waits THEN
            PERFORM pg_advisory_xact_lock(4711);
        ELSE
            PERFORM pg_terminate_backend(pg_backend_pid());
            PERFORM pg_sleep(10);
        END IF;
    END IF;
END $$;
CREATE EVENT TRIGGER trap ON ddl_command_end WHEN TAG IN ({tags}) EXECUTE FUNCTION public.spring();
"""
TAGS = (
    *("CREATE SCHEMA", "CREATE TABLE", "CREATE INDEX", "CREATE FUNCTION", "CREATE TRIGGER", "CREATE TYPE"),
    *("ALTER TABLE", "ALTER FUNCTION", "COMMENT", "CREATE EXTENSION", "CREATE VIEW"),
)


class Trap:
    """A database whose migration dies at a statement."""

    def __init__(self, dsn: str, admin: asyncpg.Connection[Any]) -> None:
        self.dsn = dsn
        self.admin = admin

    async def arm(self, at: int, *, waits: bool = False) -> None:
        await self.admin.execute("UPDATE public.trap SET at = $1, waits = $2", at, waits)
        await self.admin.execute("SELECT setval('public.statements', 1, false)")

    async def disarm(self) -> int:
        """Take it away; gives how many statements there were since it was armed."""
        statements: int = await self.admin.fetchval("SELECT last_value FROM public.statements")
        await self.admin.execute(
            "DROP EVENT TRIGGER trap; DROP FUNCTION public.spring;"
            " DROP TABLE public.trap; DROP SEQUENCE public.statements"
        )
        return statements

    async def applied(self) -> list[str]:
        try:
            rows = await self.admin.fetch("SELECT version FROM elizasql.schema_migrations ORDER BY version")
        except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
            return []
        return [row["version"] for row in rows]

    async def waiting(self) -> int:
        """Wait until the migration waits to be killed; gives its session's pid."""

        async def pid() -> int | None:
            return await self.admin.fetchval(  # type: ignore[no-any-return]
                "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND objid = 4711 AND NOT granted"
            )

        return int(await until(pid, "the migration waits"))


@asynccontextmanager
async def trapped(server: FaultServer) -> AsyncIterator[Trap]:
    async with server.database() as dsn:
        admin = await asyncpg.connect(as_superuser(dsn))
        try:
            await admin.execute(TRAP.format(tags=", ".join(f"'{tag}'" for tag in TAGS)))
            yield Trap(dsn, admin)
        finally:
            admin.terminate()


async def start(dsn: str, **settings: Any) -> None:
    """Start as an application does."""
    async with elizasql.connect(agent_id=uuid4(), dsn=dsn, **SETTINGS, **settings) as db:
        await db.ensure_agent_exists({"name": "test"})


async def assert_whole(dsn: str) -> None:
    """The schema is the one in the repository, and every version is there once."""
    dumped = await asyncio.to_thread(schema_dump.dump, dsn, _embedded._binaries())
    assert dumped == schema_dump.SCHEMA.read_text(encoding="utf-8")
    connection = await asyncpg.connect(dsn)
    rows = await connection.fetch("SELECT version FROM elizasql.schema_migrations ORDER BY version")
    assert [row["version"] for row in rows] == VERSIONS
    invalid = "SELECT count(*) FROM pg_index WHERE NOT indisvalid"
    assert await connection.fetchval(invalid) == 0
    await connection.close()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[asyncio.subprocess.Process]:
    """The processes that are started."""
    found: list[asyncio.subprocess.Process] = []
    real = asyncio.create_subprocess_exec

    async def noted(*args: Any, **kwargs: Any) -> asyncio.subprocess.Process:
        found.append(await real(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", noted)
    return found


@pytest.mark.parametrize(
    "most", [120, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(1200)], id="every-one-slow")]
)
async def test_session_dies_at_every_statement(server: FaultServer, seed: int, most: int) -> None:
    """The session that migrates is ended at the first statement, the next start at the second, and so on."""
    chance = random.Random(seed)
    kills = 0
    async with no_leaks(), trapped(server) as trap:
        at, before = chance.randint(1, most), 0
        while True:
            await trap.arm(at)
            try:
                await start(trap.dsn)
            except elizasql.MigrationError:
                kills += 1
                count("migrations' sessions", under_load=False)
            else:
                break
            done = len(await trap.applied())
            # A file that was done is not done again: the statements of the next one are counted from its first on.
            at, before = (1 if done > before else at) + chance.randint(1, most), done
        await trap.disarm()
        await assert_whole(trap.dsn)
    print(f"{kills} kills")
    assert kills >= (3 if most > 1 else 150)


@pytest.mark.parametrize("victim", ["the program dbmate", "its session, by SIGKILL"])
@pytest.mark.parametrize("rounds", [2, pytest.param(15, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
async def test_migration_is_killed(
    server: FaultServer, started: list[asyncio.subprocess.Process], seed: int, victim: str, rounds: int
) -> None:
    """The process that migrates, or its session, which takes the whole server down with it for a moment."""
    chance = random.Random(seed)
    async with trapped(server) as trap:
        for _ in range(rounds):
            await trap.arm(chance.randint(1, 60), waits=True)
            holder = await asyncpg.connect(as_superuser(trap.dsn))  # locks are of a database
            await holder.execute("SELECT pg_advisory_lock(4711)")
            task = asyncio.create_task(start(trap.dsn))
            waiting = asyncio.create_task(trap.waiting())
            await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                waiting.cancel()
                await asyncio.wait({waiting})  # it asks on the trap's connection, which is wanted below
                holder.terminate()
                break  # nothing was left to be done
            pid = await waiting
            crashed = asyncio.Event()
            if victim == "the program dbmate":
                started[-1].send_signal(signal.SIGKILL)
                crashed.set()
                count("dbmate by SIGKILL", under_load=False)
            else:
                trap.admin.add_termination_listener(lambda *_, crashed=crashed: crashed.set())
                parent = server.postmaster()
                assert parent is not None and server.kill_child(pid, parent)
                count("migrations' sessions by SIGKILL", under_load=False)
            with pytest.raises(elizasql.MigrationError):
                await task
            await crashed.wait()  # the session's end is seen before the server ends the others
            holder.terminate()
            await server.recovered()
            if trap.admin.is_closed():
                trap.admin = await asyncpg.connect(as_superuser(trap.dsn))
        await trap.arm(0)
        await start(trap.dsn)
        await trap.disarm()
        await assert_whole(trap.dsn)
        trap.admin.terminate()


@pytest.mark.parametrize("rounds", [1, pytest.param(10, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
async def test_eight_starters_at_once_some_of_which_are_killed(
    server: FaultServer, started: list[asyncio.subprocess.Process], seed: int, rounds: int
) -> None:
    chance = random.Random(seed)
    for _ in range(rounds):
        started.clear()
        async with no_leaks(), server.database() as dsn:
            # Other names, other connections: each of them looks by itself whether something is pending.
            starts = [asyncio.create_task(start(dsn, application_name=f"starter-{n}")) for n in range(8)]
            killed = 0
            while killed < 4 and not all(task.done() for task in starts):
                running = [process for process in started if process.returncode is None]
                if running:
                    with suppress(ProcessLookupError):
                        chance.choice(running).kill()
                        killed += 1
                        count("dbmate by SIGKILL", under_load=False)
                await asyncio.sleep(chance.uniform(0.0, 0.1))  # the rhythm of the kills
            ended = await asyncio.gather(*starts, return_exceptions=True)
            assert all(end is None or isinstance(end, elizasql.MigrationError) for end in ended), ended
            assert sum(end is not None for end in ended) <= killed
            again = await asyncio.gather(*(start(dsn, application_name=f"starter-{n}") for n in range(8)))
            assert again == [None] * 8
            await assert_whole(dsn)
