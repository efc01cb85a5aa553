"""The embedded server: up, down, status; psql and the demo."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qsl, quote, unquote, urlencode

import orjson
import typer

from elizasql import _embedded, _migrate, _pool
from elizasql._statements import SQL
from elizasql.config import Config, redact, split_address
from elizasql.errors import ConfigurationError, ElizaSQLError, EmbeddedServerError

from . import _out, _place
from ._keeper import find_keeper
from ._place import DataDir, Dsn, Json, Place

_PATIENCE = 60.0


def add_to(app: typer.Typer) -> None:
    """Put the commands into the application."""
    app.command()(up)
    app.command()(down)
    app.command()(status)
    passed = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(context_settings=passed)(psql)
    app.command("demo", context_settings={**passed, "help_option_names": []})(run_demo)


# --- up and down -----------------------------------------------------------------------------------------------------


def up(
    data_dir: DataDir = None,
    foreground: Annotated[bool, typer.Option(help="Stay until Ctrl-C instead of in the background.")] = False,
    migrate: Annotated[bool, typer.Option(help="Bring the schema up to date.")] = True,
    json: Json = False,
) -> None:
    """Start the embedded server and keep it up until `down`. Others may use it and leave it meanwhile."""
    config = _place.load(None, data_dir)
    started = False
    try:
        if foreground:
            _embedded._Cluster(config.data_dir).claim()
        else:
            started = _start_keeper(config.data_dir)
    except OSError as error:
        raise EmbeddedServerError(f"{config.data_dir} cannot hold the embedded server: {error.strerror}") from error

    async def work() -> None:
        async with _place.reach(None, str(config.data_dir), create=True) as place:
            if migrate:
                await bring_up_to_date(place)
            shown = {"running": True, "data_dir": str(config.data_dir.resolve()), "dsn": place.address}
            if json:
                _out.emit(shown)
            else:
                _out.say(f"up in {shown['data_dir']}")
                _out.say(f"POSTGRES_URL={place.address}")
            if foreground:
                await _until_told_to_end()

    try:
        asyncio.run(work())
    except KeyboardInterrupt:
        if started:
            with suppress(ElizaSQLError):  # somebody else may use it by now
                asyncio.run(_stop(config, force=False))
        raise


async def _until_told_to_end() -> None:
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    await ended.wait()


async def bring_up_to_date(place: Place) -> list[str]:
    """Apply this library's pending migrations; give their versions."""
    async with place.connect(ready=False) as connection:
        server = await _pool.look_at(connection)
        server.check()
        pending = await _migrate.pending_versions(connection)
    if pending:
        await _migrate.migrate(place.address, place.config)
    return pending


def _start_keeper(data_dir: Path) -> bool:
    """Start the process that uses the server until it is told to end; False: there is one."""
    if find_keeper(data_dir) is not None:
        return False
    # With the modules that this process has: "-m" would look for them in the working folder first, where a project may
    # have a queue.py or a tasks.py of its own.
    places = [os.path.abspath(place) for place in sys.path]  # noqa: PTH100
    code = f"import sys; sys.path[:] = {places!r}; from elizasql.cli._keeper import main; main()"
    # It forks and leaves a process that is nobody's child; its pipe tells when the server is up.
    with subprocess.Popen(  # noqa: S603 - this very program
        [sys.executable, "-c", code, str(data_dir.resolve())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",  # it must not keep a file system busy
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        answer = process.stdout.readline()
    told = orjson.loads(answer) if answer.strip() else {"error": "the keeper of the embedded server ended at once"}
    if "error" in told:
        raise EmbeddedServerError(told["error"])
    return True


def down(
    data_dir: DataDir = None,
    force: Annotated[bool, typer.Option(help="Stop it even while others use it.")] = False,
    json: Json = False,
) -> None:
    """Stop keeping the embedded server up. It stops when nobody uses it any more."""
    config = _place.load(None, data_dir)
    if _place.has_cluster(config):
        asyncio.run(_stop(config, force=force))
    if json:
        _out.emit({"running": False, "data_dir": str(config.data_dir.resolve())})
    else:
        _out.say(f"down in {config.data_dir.resolve()}")


async def _stop(config: Config, *, force: bool) -> None:
    deadline = time.monotonic() + _PATIENCE
    cluster = _embedded._Cluster(config.data_dir)
    cluster.claim()  # another user's folder could name any process as its keeper
    while (keeper := find_keeper(config.data_dir)) is not None:
        if not keeper.here:
            raise InUseError(
                f"the embedded server in {config.data_dir} is kept up from another container: "
                "`elizasql down` there ends that"
            )
        with suppress(ProcessLookupError):
            os.kill(keeper.pid, signal.SIGTERM)
        await cluster.nap(deadline, "its keeper does not end", 0.05)
    if not is_running(config.data_dir):
        return
    if force:
        async with cluster.lifecycle(deadline):
            await cluster.stop(deadline)
    else:
        # Nobody kept it up: it was left by a process that was killed, or others use it. The last one out stops it.
        await (await _embedded.acquire(config.data_dir)).release()
    if is_running(config.data_dir):
        raise InUseError(
            f"the embedded server in {config.data_dir} is still in use by another process: "
            "it stops with the last of them, or now with --force"
        )


class InUseError(ElizaSQLError):
    """Others use the server."""


def is_running(data_dir: Path) -> bool:
    """Tell whether a process of the embedded server is left."""
    cluster = _embedded._Cluster(data_dir)
    if not (cluster.home / "server.lock").is_file():
        return False
    lock = cluster.lock_server()
    if lock is None:
        return True
    lock.release()
    return False


# --- status ----------------------------------------------------------------------------------------------------------


def status(dsn: Dsn = None, data_dir: DataDir = None, json: Json = False) -> None:
    """Tell whether the server runs, and what it is. Also whether its schema is up to date. Starts nothing."""
    config = _place.load(dsn, data_dir)
    embedded = config.dsn is None
    if embedded and not (_place.has_cluster(config) and is_running(config.data_dir)):
        shown: dict[str, Any] = {"running": False, "where": f"embedded server in {config.data_dir.resolve()}"}
    else:
        address = _embedded._Cluster(config.data_dir).dsn("elizasql") if embedded else config.dsn
        assert address is not None
        where = f"embedded server in {config.data_dir.resolve()}" if embedded else redact(address)
        shown = {"running": True, "where": where, **asyncio.run(_look(Place(address, config, embedded)))}
        if embedded:
            keeper = find_keeper(config.data_dir)
            shown["kept_up_by"] = keeper and (keeper.pid if keeper.here else "another container")
    if json:
        _out.emit(shown)
    else:
        if isinstance(shown.get("kept_up_by"), int):
            shown["kept_up_by"] = f"process {shown['kept_up_by']}"
        pending = shown.pop("pending_migrations", None)
        _out.mapping(shown if pending is None else shown | {"migrations": f"{len(pending)} pending"})
    if not shown["running"]:
        raise typer.Exit(3)


async def _look(place: Place) -> dict[str, Any]:
    async with place.connect(ready=False) as connection:
        row = await connection.fetchrow(SQL["look_at_database"].sql)
        assert row is not None
        server = await _pool.look_at(connection)
        return {
            "database": row["name"],
            "role": row["role"],
            "postgres": row["version"],
            "pgvector": server.vector_version,
            "started_at": row["started_at"],
            "bytes": row["bytes"],
            "connections": row["connections"],
            "max_connections": row["max_connections"],
            "pending_migrations": await _migrate.pending_versions(connection),
        }


# --- psql and the demo -----------------------------------------------------------------------------------------------


def psql(context: typer.Context, dsn: Dsn = None, data_dir: DataDir = None) -> None:
    """Open psql on the server. What stands behind `--` goes to psql: elizasql psql -- -c "TABLE pg_roles"."""

    async def work() -> int:
        async with _place.reach(dsn, data_dir) as place:
            return await run_psql(place, context.args)

    code = asyncio.run(work())
    if code:
        raise typer.Exit(3 if code == 2 else 1)


async def run_psql(place: Place, arguments: list[str]) -> int:
    """Run psql in the foreground; the password travels in the environment, which others cannot read."""
    shown, environ = for_libpq(place.address, embedded=place.embedded)
    command = [find_program("psql"), shown, *arguments]
    psql: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def pass_on(number: int, _: object) -> None:
        if psql is None:
            early.append(number)
        else:
            psql.send_signal(number)

    # Ctrl-C is psql's, which ends a query with it, and comes to it from the terminal. By a handler and not by SIG_IGN,
    # which psql would inherit.
    ours: dict[signal.Signals, Any] = {
        signal.SIGINT: lambda *_: None,
        signal.SIGTERM: pass_on,
        signal.SIGHUP: pass_on,
    }
    before = {number: signal.signal(number, handler) for number, handler in ours.items()}
    try:
        await asyncio.sleep(0)  # what has come to us before these handlers were there is raised here
        with subprocess.Popen(command, env=environ) as psql:  # noqa: S603, ASYNC220 - in the foreground
            for number in early:
                psql.send_signal(number)
            return psql.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def for_libpq(address: str, *, embedded: bool = False) -> tuple[str, dict[str, str]]:
    """Split a connection string into one that may be seen, and an environment that holds the password.

    Args:
        address: The connection string.
        embedded: It is the embedded server's, and says all: what the user has set for other servers (PGSERVICE,
            PGHOSTADDR, ...) would lead there.
    """
    parts = split_address(address)
    user, at, host = parts.netloc.rpartition("@")
    name, _, password = user.partition(":")
    query = dict(parse_qsl(parts.query))
    password = unquote(password) or query.get("password", "")
    for secret in ("password", "sslpassword"):  # for the latter there is no variable: psql asks for it
        query.pop(secret, None)
    others = {name: value for name, value in os.environ.items() if not (embedded and name.startswith("PG"))}
    environ = {"PGAPPNAME": "elizasql", **others}
    if password:
        environ["PGPASSWORD"] = password
    # Put together by hand: urlunsplit leaves out the "//" where no host is named. libpq takes "+" as it is.
    shown = f"{parts.scheme}://{name}{at}{host}{parts.path}"
    return f"{shown}?{urlencode(query, quote_via=quote)}" if query else shown, environ


def find_program(name: str) -> str:
    """Find a program of PostgreSQL: the one that came with the embedded server, else one on the path."""
    with suppress(EmbeddedServerError):
        if (program := _embedded._binaries() / name).is_file():
            return str(program)
    found = shutil.which(name)
    if found is None:
        raise ConfigurationError(f"the program {name} is missing: install PostgreSQL's client programs")
    return found


def run_demo(context: typer.Context) -> None:
    """An agent remembers a conversation and answers. Takes --file FILE, --data-dir DIR, --dsn DSN."""
    from elizasql import demo  # noqa: PLC0415 - no other command needs it

    code = demo.main(context.args)
    if code:
        raise typer.Exit(code)
