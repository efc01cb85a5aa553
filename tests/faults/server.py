"""An embedded server to be broken: finds its processes, kills them, and says when it is well again."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import asyncpg

import elizasql
from elizasql import _embedded
from tests.conftest import COPIED

# How long a condition may take to come true before the test fails; generous, since nothing is measured by it.
PATIENCE = 60.0

# What a server says that was killed a moment ago, or does not say any more.
NOT_NOW = (
    *(OSError, asyncio.TimeoutError, asyncpg.PostgresConnectionError, asyncpg.CannotConnectNowError),
    *(asyncpg.AdminShutdownError, asyncpg.CrashShutdownError, asyncpg.InterfaceError, asyncpg.InternalClientError),
)

# Of the whole run: what was killed while writes were under way, what else was, and what became of the writes.
KILLS: dict[str, int] = {}
OTHER_KILLS: dict[str, int] = {}
WRITES = {"acknowledged": 0, "lost": 0}


async def until(condition: Callable[[], Awaitable[Any]], what: str, patience: float = PATIENCE) -> Any:
    """Wait for a condition to come true, and give what it gave; fails after `patience` seconds."""
    deadline = time.monotonic() + patience
    while not (found := await condition()):
        assert time.monotonic() < deadline, f"it did not come to pass within {patience:g} s: {what}"
        await asyncio.sleep(0.005)
    return found


class FaultServer:
    """A server in a folder of its own; whatever is done to it hurts nobody else.

    Attributes:
        dsn: Its address, as the application's role.
        home: Its folder.
    """

    def __init__(self, home: Path | None = None) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="esqf-")) if home is None else None
        self.home: Path = home or self._folder / "pg"  # type: ignore[operator]
        self._use: _embedded.EmbeddedServer | None = None

    @property
    def dsn(self) -> str:
        assert self._use is not None
        return self._use.dsn

    @property
    def admin_dsn(self) -> str:
        """The address as superuser."""
        return as_superuser(self.dsn)

    async def start(self, *, migrate: bool = True) -> None:
        """Start it, or wait until it is well again; bring the schema up to date."""
        use = await _embedded.acquire(self.home)
        self._use, before = use, self._use
        if before is not None:
            await before.release()
        if migrate:
            async with elizasql.connect(agent_id=uuid4(), dsn=use.dsn, indexing="manual", pool_min_size=0):
                pass

    async def stop(self, *, keep: bool = False) -> None:
        """Stop it and, unless it is to be kept, remove its folder."""
        if self._use is not None:
            await self._use.release()
            self._use = None
        if self._folder is not None and not keep:
            shutil.rmtree(self._folder, ignore_errors=True)

    @asynccontextmanager
    async def admin(self, database: str | None = None) -> AsyncIterator[asyncpg.Connection[Any]]:
        """Give a connection as superuser."""
        dsn = self.admin_dsn if database is None else with_database(self.admin_dsn, database)

        async def connected() -> asyncpg.Connection[Any] | None:
            # It may be recovering from what was done to it a moment ago.
            with suppress(*NOT_NOW):
                return await asyncpg.connect(dsn, timeout=PATIENCE)
            return None

        connection = await until(connected, "the server takes a connection")
        try:
            yield connection
        finally:
            connection.terminate()

    # --- its processes -----------------------------------------------------------------------------------------------

    def postmaster(self) -> int | None:
        """Give the postmaster's pid, None when there is none."""
        return _embedded._Cluster(self.home).postmaster()

    async def backends(self, application_name: str | None = None) -> list[int]:
        """Give the pids of the sessions, of one application or of all."""
        async with self.admin() as admin:
            rows = await admin.fetch(
                "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
                " AND ($1::text IS NULL OR application_name = $1) ORDER BY pid",
                application_name,
            )
        return [row["pid"] for row in rows]

    async def kill_backend(self, chance: random.Random, application_name: str) -> int | None:
        """Kill a session by SIGKILL; gives its pid, None when there was nobody to kill.

        The server ends every other session, recovers, and takes connections again.
        """
        pids: list[int] = []
        with suppress(*NOT_NOW):
            pids = await self.backends(application_name)
        postmaster = self.postmaster()
        if not pids or postmaster is None:
            return None
        victim = chance.choice(pids)
        if not self.kill_child(victim, postmaster):
            return None
        count("sessions by SIGKILL")
        return victim

    async def terminate_backend(self, chance: random.Random, application_name: str) -> int | None:
        """End a session as an administrator would; gives its pid."""
        async with self.admin() as admin:
            rows = await admin.fetch("SELECT pid FROM pg_stat_activity WHERE application_name = $1", application_name)
            if not rows:
                return None
            victim: int = chance.choice(rows)["pid"]
            if not await admin.fetchval("SELECT pg_terminate_backend($1)", victim):
                return None
        count("sessions by an administrator")
        return victim

    def kill_postmaster(self) -> None:
        """Kill the postmaster by SIGKILL; its children find out by themselves."""
        postmaster = self.postmaster()
        assert postmaster is not None
        os.kill(postmaster, signal.SIGKILL)
        count("postmasters by SIGKILL")

    def kill_child(self, pid: int, postmaster: int) -> bool:
        """Kill a process, if it still is a child of the postmaster; tells whether it was."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
            if int(stat.rpartition(")")[2].split()[1]) != postmaster:
                return False
            os.kill(pid, signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            return False
        return True

    async def answers(self) -> bool:
        """Tell whether it takes connections and answers."""
        try:
            connection = await asyncpg.connect(self.admin_dsn, timeout=5)
        except NOT_NOW:
            return False
        try:
            return bool(await connection.fetchval("SELECT true", timeout=5))
        except NOT_NOW:
            return False
        finally:
            connection.terminate()

    async def recovered(self) -> None:
        """Wait until it takes connections again."""
        await until(self.answers, "the server recovers")

    async def life(self) -> Any:
        """Give what is anew after every crash."""
        async with self.admin() as admin:
            return await admin.fetchval("SELECT pg_stat_get_bgwriter_stat_reset_time()")

    async def recovered_since(self, life: Any) -> None:
        """Wait until it takes connections again after a crash; `life` is what `life` gave before."""

        async def another() -> bool:
            with suppress(*NOT_NOW):
                return bool(await self.life() != life)
            return False

        await until(another, "the server recovers")

    async def no_idle_transactions(self, application_name: str, patience: float = 20.0) -> None:
        """Wait until no session of an application stands idle inside a transaction."""
        async with self.admin() as admin:

            async def none() -> bool:
                return not await admin.fetchval(
                    "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1 AND state ^@ 'idle in tr'",
                    application_name,
                )

            await until(none, "no session is idle in a transaction", patience)

    async def no_sessions(self, application_name: str, patience: float = 20.0) -> None:
        """Wait until no session of an application is left."""
        async with self.admin() as admin:

            async def none() -> bool:
                return not await admin.fetchval(
                    "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1", application_name
                )

            await until(none, "every session has ended", patience)

    # --- databases ---------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def database(self, tablespace: str | None = None) -> AsyncIterator[str]:
        """Make an empty database with the extension; gives its address as the application's role."""
        name = f"fault_{uuid4().hex[:12]}"
        place = "" if tablespace is None else f" TABLESPACE {tablespace}"
        async with self.admin() as admin:
            await admin.execute(f"CREATE DATABASE {name} OWNER elizasql{place} {COPIED}")
        async with self.admin(name) as admin:
            await admin.execute("CREATE EXTENSION vector")
        try:
            yield with_database(self.dsn, name)
        finally:
            async with self.admin() as admin:
                await admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


def count(what: str, *, under_load: bool = True) -> None:
    """Count what was killed, for the summary of the run."""
    kills = KILLS if under_load else OTHER_KILLS
    kills[what] = kills.get(what, 0) + 1


def as_superuser(dsn: str) -> str:
    """Give the address of the same database, as the role that may do everything."""
    return dsn.replace("//elizasql@", "//postgres@")


def with_database(dsn: str, name: str) -> str:
    """Give the address of another database of the server."""
    return urlunsplit(urlsplit(dsn)._replace(path=f"/{name}"))
