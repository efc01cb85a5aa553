"""The command line: what a person types, what comes back, and what is left behind."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import json
import os
import pwd
import re
import resource
import shutil
import signal
import socketserver
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit
from uuid import UUID, uuid4

import asyncpg
import numpy as np
import orjson
import pytest

import elizasql
from elizasql import DatabaseAdapter, Log, Task, _embedded
from elizasql.__main__ import main
from elizasql._calls import current_deadline
from elizasql._indexer import Indexer
from elizasql._statements import SQL
from elizasql.cli import _app, _keeper, _out, data, doctor, look, queries
from elizasql.cli import migrate as cli_migrate
from elizasql.cli import server as cli_server
from elizasql.cli._destructive import find_destructive, split_migration
from elizasql.errors import ElizaSQLError
from elizasql.transfer import _report, export_archive
from elizasql.transfer import _rows as transfer_rows
from elizasql.types import DIMENSIONS
from tests.conftest import MakeAdapter, database, make_scene
from tests.elizaos_schema import TABLES as ELIZAOS_TABLES
from tests.shared import share, shared_calls
from tests.test_isolation import filled

pytestmark = pytest.mark.timeout(180)

SECRET = "hunter2-secret"


@dataclass(frozen=True)
class Said:
    """What a command gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def fails(self, code: int, pattern: str) -> None:
        """Check that it failed with one line, and that nothing else was printed."""
        assert (self.code, self.out) == (code, ""), self
        assert re.search(pattern, self.err), self.err
        assert self.err.count("\n") == 1 and self.err.startswith("elizasql: "), self.err
        assert "Traceback" not in self.err and SECRET not in self.err


Run = Callable[..., Said]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Give a function that runs a command in this process, in an empty folder and a clean environment."""
    for name in ("POSTGRES_URL", "ELIZASQL_MIGRATION_URL", "PGLITE_DATA_DIR", "ELIZA_ALLOW_DESTRUCTIVE_MIGRATIONS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Said:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture
def on_server(run: Run, dsn: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Give the same with POSTGRES_URL set to the server of this test run."""
    monkeypatch.setenv("POSTGRES_URL", dsn)
    return run


@pytest.fixture
def folder() -> Iterator[Path]:
    """Give a place for an embedded server; short, for the socket's path."""
    place = Path(tempfile.mkdtemp(prefix="esql-"))
    yield place / "pg"
    if (place / "pg").exists():
        main(["down", "--data-dir", str(place / "pg"), "--force"])
    shutil.rmtree(place, ignore_errors=True)


def with_agent(dsn: str, work: Callable[[DatabaseAdapter], Awaitable[None]], agent_id: UUID | None = None) -> UUID:
    """Do something as a new agent."""
    agent = agent_id or uuid4()

    async def act() -> None:
        async with elizasql.connect(agent_id=agent, dsn=dsn, indexing="manual", pool_min_size=0) as db:
            await db.ensure_agent_exists({"name": "Ada"})
            await work(db)

    asyncio.run(act())
    return agent


async def tables_of(dsn: str, schema: str) -> set[str]:
    connection = await asyncpg.connect(dsn)
    try:
        rows = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = $1", schema)
        return {row["tablename"] for row in rows}
    finally:
        await connection.close()


def process(*arguments: object, cwd: Path, **environ: str) -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("POSTGRES_URL", "PGLITE_DATA_DIR")}
    return subprocess.Popen(
        [sys.executable, "-m", "elizasql", *map(str, arguments)],
        cwd=cwd,
        env={**clean, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def shell(redirection: str, *arguments: object, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a command with its streams redirected as a shell does."""
    clean = {name: value for name, value in os.environ.items() if name not in ("POSTGRES_URL", "PGLITE_DATA_DIR")}
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-m", "elizasql", *map(str, arguments)],
        cwd=cwd,
        env={**clean, **environ},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )


# --- the command itself ----------------------------------------------------------------------------------------------


def test_without_a_command_it_helps(run: Run) -> None:
    said = run()
    assert said.code == 2
    for command in ("up", "down", "status", "migrate", "psql", "demo", "stats", "tail", "tasks"):
        assert re.search(rf"^ +{command} ", said.err, re.MULTILINE), command
    said = run("--help")
    assert (said.code, said.err) == (0, "")
    assert "Exit codes" in said.out


@pytest.mark.parametrize("arguments", [[], ["migrate"]])
def test_each_command_says_in_one_line_what_it_does(run: Run, arguments: list[str]) -> None:
    _, _, commands = run(*arguments, "--help").out.partition("Commands:\n")
    assert commands
    assert "..." not in commands


def test_version(run: Run) -> None:
    assert run("--version") == Said(0, f"elizasql {elizasql.__version__}\n", "")
    assert run("--version", "stats").out.strip() == f"elizasql {elizasql.__version__}"


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["nope"], "nope"),
        (["stats", "--nope"], "--nope"),
        (["tail", "-n", "many"], "--count"),
        (["tail", "-n", "-1"], "--count"),
        (["migrate", "new"], "(?i)name"),
        (["stats", "--dsn", f"mysql://a:{SECRET}@h/d"], "must start with postgres"),
        (["stats", "--dsn", f"postgres://a:{SECRET}/x@h/d"], "is no address"),
        (["stats", "--dsn", "postgres://h/d", "--data-dir", "x"], "exclude each other"),
        (["migrate", "up", "--dir", "missing"], "no folder missing"),
        (["migrate", "up", "--dir", "public=."], "schema public"),
        (["migrate", "up", "--dir", "pg_x=."], "schema pg_x"),
        (["migrate", "up", "--dir", "x y=."], "no name of a schema"),
        (["migrate", "up", "--dir", "a=.", "--dir", "a=."], "two folders"),
        (["migrate", "new", "..."], "no name for a file"),
    ],
)
def test_wrong_use_is_one_line_and_2(run: Run, arguments: list[str], pattern: str) -> None:
    run(*arguments).fails(2, pattern)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        (f"postgres://a:{SECRET}@h:1/d?sslmode=require", "postgres://h:1/d"),
        (f"postgres://a:x/{SECRET}@h/d", "(address)"),
        (f"postgresql://h/d?user=a&password={SECRET}", "postgresql://h/d"),
    ],
)
@pytest.mark.parametrize("command", ["status", "explain", "import", "restore", "tail --agent"])
def test_an_address_in_the_wrong_place_is_not_shown(on_server: Run, command: str, address: str, shown: str) -> None:
    said = on_server(*command.split(), address)
    assert said.code in (1, 2)
    assert SECRET not in said.err
    assert shown in said.err or "(address)" in said.err


def test_an_error_is_json_when_json_was_asked_for(run: Run) -> None:
    said = run("stats", "--json", "--dsn", f"postgres://a:{SECRET}@127.0.0.1:1/x")
    assert (said.code, said.out) == (3, "")
    told = json.loads(said.err)
    assert told["exit_code"] == 3 and told["type"] == "ConnectionLostError" and "127.0.0.1:1" in told["error"]
    assert SECRET not in said.err


def test_a_bug_is_not_hidden(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli_server, "find_keeper", broken)
    run("up").fails(1, "ZeroDivisionError.*a fault of elizasql")
    monkeypatch.setenv("ELIZASQL_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        run("up")


def test_an_interrupt_while_the_command_loads_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("import signal; signal.raise_signal(signal.SIGINT)")
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "elizasql", "stats"], env=environ, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "elizasql: interrupted\n")


def test_without_the_extra_one_line_says_so_and_the_demo_works(tmp_path: Path) -> None:
    code = "import sys; sys.modules['typer'] = None; from elizasql.__main__ import main; sys.exit(main(sys.argv[1:]))"

    def run(*arguments: str) -> Said:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path, check=False
        )
        return Said(done.returncode, done.stdout, done.stderr)

    run("status").fails(1, r"pip install 'elizasql\[cli\]'")
    assert run("demo", "--help").code == 0
    assert run("--version").code == 0
    assert "cannot read" in run("demo", "--file", "missing").err


# --- servers that are not there --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], pytest.param(["--json"], marks=pytest.mark.slow)])
def test_streams_that_are_closed_or_full(dsn: str, busy: UUID, tmp_path: Path, options: list[str]) -> None:
    for redirection in (">&-", "2>&-", "<&- >&- 2>&-"):
        said = shell(redirection, "index", "--agent", busy, *options, cwd=tmp_path, POSTGRES_URL=dsn)
        assert (said.returncode, said.stderr) == (0, ""), (redirection, said)
    # What is wrong goes nowhere rather than to where the answer is expected.
    said = shell("2>&-", "stats", "--agent", "nobody", *options, cwd=tmp_path, POSTGRES_URL=dsn)
    assert (said.returncode, said.stdout) == (2, "")
    if Path("/dev/full").exists():
        for unbuffered in ("", "1"):
            environ = {"POSTGRES_URL": dsn, "PYTHONUNBUFFERED": unbuffered}
            said = shell(">/dev/full", "stats", "--agent", busy, *options, cwd=tmp_path, **environ)
            assert said.returncode == 1 and said.stderr.count("\n") == 1 and "No space left" in said.stderr, said


def test_a_full_disk_is_named_and_nothing_half_done_is_left(on_server: Run, busy: UUID, tmp_path: Path) -> None:
    def on_full_disk(*arguments: object) -> Said:
        """A limit on the size of files stands in for it."""
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        try:
            return on_server(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    on_full_disk("migrate", "new", "shop", "--dir", tmp_path).fails(1, r"\d{14}_shop\.sql: File too large")
    for name in ("all.tar", "all.tar.gz", "all"):
        on_full_disk("export", name, "--agent", busy).fails(1, rf"^elizasql: {re.escape(name)}: File too large")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_letters_that_the_terminal_has_not(dsn: str, tmp_path: Path) -> None:
    agent = uuid4()

    async def rename(db: DatabaseAdapter) -> None:
        await db.update_agent(agent, {"name": "Zoë"})

    with_agent(dsn, rename, agent)
    poor = {"POSTGRES_URL": dsn, "PYTHONIOENCODING": "ascii"}
    said = shell("", "stats", "--agent", agent, cwd=tmp_path, **poor)
    assert (said.returncode, said.stderr) == (0, "") and "Zo?" in said.stdout
    said = shell("", "stats", "--agent", agent, "--json", cwd=tmp_path, **poor)
    assert json.loads(said.stdout)["agents"][0]["name"] == "Zoë"
    # A folder whose name is not UTF-8 can be named in a message all the same.
    for options in ([], ["--json"]):
        said = shell("", "stats", "--data-dir", os.fsdecode(b"\xff"), *options, cwd=tmp_path)
        assert said.returncode == 3 and "\ufffd: --data-dir names another" in said.stderr, said
        said = shell("", "down", "--data-dir", os.fsdecode(b"\xff"), *options, cwd=tmp_path)
        assert said.returncode == 0 and f"{tmp_path.name}/\ufffd" in said.stdout, said


# Every command that reaches a server, with as little as it takes; and those that a database without our schema is good
# enough for: they make it, or tell that it is not there.
REACHING = (
    *("status", "psql", "demo", "stats", "tail", "tasks", "export out", "export out.tar"),
    *("import ARCHIVE", "import ARCHIVE --report report.jsonl", "import --from ADDRESS", "index"),
    *("reembed --abandon", "reembed --to 512 --with json:dumps", "doctor", "explain count_memories", "recall-check"),
    *("bench", "migrate up", "migrate down", "migrate status"),
)
WITHOUT_SCHEMA = {
    command for command in REACHING if command.split()[0] in ("status", "psql", "demo", "doctor", "migrate")
}
WITHOUT_SCHEMA |= {command for command in REACHING if "ARCHIVE" in command}


def test_every_command_that_reaches_a_server_is_known() -> None:
    def reaching(group: Any, *before: str) -> Iterator[str]:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from reaching(command, *before, name)
            elif any(param.name == "dsn" for param in command.params):
                yield " ".join((*before, name))

    commands = [*reaching(_app._command()), "demo"]  # whose options are its own
    assert len(commands) > 15
    assert [name for name in commands if not any(each.startswith(name) for each in REACHING)] == []


@pytest.fixture(scope="module")
def nobody_listens() -> str:
    """Give an address at which there is no server."""
    return f"postgres://a:{SECRET}@127.0.0.1:1/x"


@pytest.fixture(scope="module")
def wrong_password() -> Iterator[str]:
    """Give the address of a server that takes no password; of the protocol it knows no more than that."""

    class Refuse(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while True:
                length, code = struct.unpack("!II", self.rfile.read(8))
                self.rfile.read(length - 8)
                if code == 3 << 16:
                    break
                self.wfile.write(b"N")  # it speaks neither TLS nor GSS
            self.wfile.write(struct.pack("!cII", b"R", 8, 3))
            (length,) = struct.unpack("!xI", self.rfile.read(5))
            self.rfile.read(length - 4)
            said = b'SFATAL\0VFATAL\0C28P01\0Mpassword authentication failed for user "a"\0\0'
            self.wfile.write(struct.pack("!cI", b"E", 4 + len(said)) + said)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Refuse) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"postgres://a:{SECRET}@127.0.0.1:{server.server_address[1]}/x"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def no_schema(dsn: str) -> Iterator[str]:
    """Give the address of a database without anything of ours."""
    with database(dsn) as made:
        yield made


@pytest.fixture(scope="module")
def archive(dsn: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give an archive of an agent that has nothing."""
    path = tmp_path_factory.mktemp("archive") / "agent.tar"

    async def export(db: DatabaseAdapter) -> None:
        await export_archive(dsn, path, db.config, agent_ids=[db.agent_id])

    with_agent(dsn, export)
    return path


@pytest.mark.parametrize(
    ("server", "command"),
    [
        (server, command)
        for server in ("nobody_listens", "wrong_password", "no_schema")
        for command in REACHING
        if server != "no_schema" or command not in WITHOUT_SCHEMA
    ],
)
def test_a_server_that_is_of_no_use(
    run: Run,
    request: pytest.FixtureRequest,
    archive: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    server: str,
    command: str,
) -> None:
    address = request.getfixturevalue(server)
    monkeypatch.setenv("POSTGRES_URL", address)
    monkeypatch.setattr(sys, "path", [*sys.path])
    said = run(*(word.replace("ARCHIVE", str(archive)).replace("ADDRESS", address) for word in command.split()))
    code, pattern = {
        "nobody_listens": (3, "127.0.0.1:1/x: "),
        "wrong_password": (1, '^elizasql: password authentication failed for user "a"$'),
        "no_schema": (1, "no database of ElizaOS" if "--from" in command else "elizasql migrate up"),
    }[server]
    if command == "psql":  # whose words are its own, and which only tells that it is not connected
        assert (said.code, said.out, said.err) == (3, "", "")
    elif command == "demo":  # which tells what it does
        Said(said.code, "", said.err.replace("elizasql demo: ", "elizasql: ")).fails(code, pattern)
    else:
        said.fails(code, pattern)
    assert SECRET not in said.out
    assert list(tmp_path.iterdir()) == []
    if server == "no_schema":
        assert asyncio.run(tables_of(address, "elizasql")) == set()


@pytest.mark.parametrize(
    "command",
    [command for command in REACHING if command.split()[0] not in ("status", "demo", "import", "migrate")]
    + ["migrate down", "migrate status"],
)
def test_no_embedded_server_is_3_and_none_is_made(
    run: Run, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    run(*command.split()).fails(
        3, f"no embedded server in {tmp_path.resolve()}/pglite: --data-dir names another folder"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_role_that_may_not_enter_is_1(run: Run, dsn: str) -> None:
    run("stats", "--dsn", dsn.replace("//elizasql@", f"//nobody:{SECRET}@")).fails(1, 'role "nobody" does not exist')


def test_a_missing_database_is_1(run: Run, dsn: str) -> None:
    run("stats", "--dsn", urlunsplit(urlsplit(dsn)._replace(path="/missing"))).fails(1, "missing")


# --- up, down, status ------------------------------------------------------------------------------------------------


def test_a_life_of_the_embedded_server(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    off = run("status", "--data-dir", folder, "--json")
    assert off.code == 3 and off.json["running"] is False
    assert not folder.exists()
    assert run("down", "--data-dir", folder).code == 0
    assert not folder.exists()

    up = run("up", "--data-dir", folder, "--json")
    assert up.code == 0, up
    assert up.json["running"] and up.json["data_dir"] == str(folder.resolve())
    assert run("up", "--data-dir", folder).code == 0  # again: nothing changes
    keeper = _keeper.find_keeper(folder)
    assert keeper is not None
    on = run("status", "--data-dir", folder, "--json")
    assert on.code == 0
    assert on.json["kept_up_by"] == keeper.pid
    assert on.json["pending_migrations"] == [] and on.json["postgres"].startswith("18")
    assert "0 pending" in run("status", "--data-dir", folder).out
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(_keeper, "_namespace", lambda: "pid:[1]")
        assert re.search("kept.up.by +another container", run("status", "--data-dir", folder).out)

    # Somebody else comes and goes: it stays up.
    with_agent(up.json["dsn"], lambda db: db.set_cache("a", 1))  # type: ignore[arg-type, return-value]
    assert run("stats", "--data-dir", folder).code == 0
    assert cli_server.is_running(folder)

    assert run("down", "--data-dir", folder, "--json").json["running"] is False
    assert not cli_server.is_running(folder)
    assert _keeper.find_keeper(folder) is None
    assert run("status", "--data-dir", folder).code == 3
    # A command that needs it starts it, and stops it behind itself.
    assert run("stats", "--data-dir", folder, "--json").json["agents"][0]["name"] == "Ada"
    assert not cli_server.is_running(folder)


def test_down_after_the_keeper_was_killed(run: Run, folder: Path) -> None:
    assert run("up", "--data-dir", folder, "--no-migrate").code == 0
    keeper = _keeper.find_keeper(folder)
    assert keeper is not None
    os.kill(keeper.pid, signal.SIGKILL)
    while _keeper.find_keeper(folder) is not None:
        pass
    assert cli_server.is_running(folder)
    assert run("down", "--data-dir", folder).code == 0
    assert not cli_server.is_running(folder)


def test_whoever_looks_for_the_keeper_is_not_in_its_way(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A status that looks just when another process starts the keeper."""
    assert run("up", "--data-dir", folder, "--no-migrate").code == 0
    assert run("down", "--data-dir", folder).code == 0
    close = _embedded._Lock.close

    def close_late(lock: _embedded._Lock) -> None:
        monkeypatch.setattr(_embedded._Lock, "close", close)
        assert run("up", "--data-dir", folder, "--no-migrate").code == 0
        close(lock)

    monkeypatch.setattr(_embedded._Lock, "close", close_late)
    assert _keeper.find_keeper(folder) is None
    assert _keeper.find_keeper(folder) is not None


def test_the_keeper_is_not_taken_for_the_one_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose process id may be anybody's by now."""
    folder.mkdir(mode=0o700)
    for name, text in (("elizasql.lock", ""), ("keeper.lock", "1")):
        (folder / name).write_text(text)
    take, found, others = _embedded._Lock.take, [], set(_embedded._locks)

    def take_slowly(lock: _embedded._Lock, *, shared: bool = False) -> bool:
        taken = take(lock, shared=shared)
        if taken and not shared:
            monkeypatch.setattr(_embedded._Lock, "take", take)
            found.append(_keeper.find_keeper(folder))
            monkeypatch.setattr(_embedded._Lock, "take", take_slowly)
        return taken

    class StartedError(ElizaSQLError):
        """The server need not start."""

    async def start(_: object) -> None:
        found.append(_keeper.find_keeper(folder))
        raise StartedError

    monkeypatch.setattr(_embedded, "acquire", start)
    monkeypatch.setattr(_embedded._Lock, "take", take_slowly)
    monkeypatch.setattr(_keeper, "answer", lambda **_: None)
    assert asyncio.run(_keeper.keep(folder)) == 1
    for lock in _embedded._locks - others:
        lock.close()
    assert set(found[:-1]) == {None} and found[-1] == _keeper.Keeper(os.getpid(), here=True)


def test_down_while_others_use_it(run: Run, folder: Path) -> None:
    assert run("up", "--data-dir", folder, "--no-migrate").code == 0
    other = process("up", "--foreground", "--no-migrate", cwd=folder.parent, PGLITE_DATA_DIR=str(folder))
    assert other.stdout is not None
    assert "up in" in other.stdout.readline()
    run("down", "--data-dir", folder).fails(1, "still in use by another process.*--force")
    assert cli_server.is_running(folder)
    assert run("down", "--data-dir", folder, "--force").code == 0
    assert not cli_server.is_running(folder)
    other.send_signal(signal.SIGINT)
    assert other.communicate(timeout=60)[1] == "" and other.returncode == 0


@pytest.mark.slow
def test_up_in_a_folder_with_modules_of_ones_own(folder: Path, tmp_path: Path) -> None:
    for name in ("queue", "random", "select", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not yours')")
    # The program that is installed does not look for modules where it is run, unlike python -m.
    program = ["-c", "import sys; sys.path.remove(''); from elizasql.__main__ import main; sys.exit(main())"]
    for word in ("up", "down"):
        done = subprocess.run(
            [sys.executable, *program, word, "--data-dir", folder], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("options", [[], ["--foreground"]])
def test_up_where_there_can_be_no_folder(run: Run, tmp_path: Path, options: list[str]) -> None:
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "below"
    run("up", "--data-dir", place, *options).fails(3, f"{place} cannot hold the embedded server: Not a directory")


def test_up_that_is_interrupted_keeps_nothing_up(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def interrupt(place: object) -> None:
        raise KeyboardInterrupt

    def up_interrupted() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(cli_server, "bring_up_to_date", interrupt)
            run("up", "--data-dir", folder).fails(130, "interrupted")

    up_interrupted()
    assert _keeper.find_keeper(folder) is None and not cli_server.is_running(folder)
    assert run("up", "--data-dir", folder).code == 0
    keeper = _keeper.find_keeper(folder)
    up_interrupted()  # what was up before stays
    assert _keeper.find_keeper(folder) == keeper is not None


@pytest.fixture
def heeded() -> Iterator[None]:
    """Let processes begin with a SIGHUP that ends them: under nohup it is ignored, by them too."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_an_end_does_not_come_in_the_middle_of_a_callback() -> None:
    """It could be the one that wakes a task, and the command would wait for it for ever."""
    done = []

    def callback() -> None:
        signal.raise_signal(signal.SIGTERM)
        done.append("whole")

    async def work() -> None:
        asyncio.get_running_loop().call_soon(callback)
        await asyncio.Event().wait()

    # In the background of a script SIGINT is ignored, and asyncio does not handle it.
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with _app._ended_in_order(), pytest.raises(KeyboardInterrupt):
            asyncio.run(work())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert done == ["whole"]


@pytest.mark.usefixtures("heeded")
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_what_is_ended_takes_the_server_along(run: Run, folder: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Such as by closing the terminal."""

    async def make(agent: UUID) -> None:
        async with elizasql.connect(agent_id=agent, data_dir=folder) as db:
            await db.ensure_agent_exists({"name": "Ada"})

    asyncio.run(make(agent := uuid4()))
    for interrupt in (signal.default_int_handler, signal.SIG_IGN):  # the second in the background of a script
        before = signal.signal(signal.SIGINT, interrupt)
        try:
            tail = process("tail", "--follow", "--agent", agent, "--data-dir", folder, cwd=tmp_path)
        finally:
            signal.signal(signal.SIGINT, before)
        with tail:
            while _embedded._Cluster(folder).postmaster() is None:
                assert tail.poll() is None
            tail.send_signal(number)
            assert tail.communicate(timeout=60) == ("", "elizasql: interrupted\n") and tail.returncode == 130
        assert not cli_server.is_running(folder)
    with process(
        "psql", "--data-dir", folder, "--", "-c", "\\echo here", "-c", "SELECT pg_sleep(100)", cwd=tmp_path
    ) as psql:
        assert psql.stdout is not None and psql.stdout.readline() == "here\n"
        psql.send_signal(number)
        psql.communicate(timeout=60)
        assert psql.returncode == 1
    assert not cli_server.is_running(folder)


def test_up_where_it_cannot_be(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    run("up", "--data-dir", tmp_path / "file").fails(3, "is a file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    run("up", "--data-dir", tmp_path / "full").fails(3, "not empty and not a data directory")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    run("up", "--data-dir", "/proc/nothing").fails(3, "/proc/nothing")


# --- migrations ------------------------------------------------------------------------------------------------------


def test_own_migrations_up_down_and_dry(run: Run, empty_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRES_URL", empty_database)
    dry = run("migrate", "up", "--dry-run", "--json")
    assert dry.code == 0
    files = [step["file"] for step in dry.json]
    assert files == sorted(files) and len(files) == len(elizasql._migrate.known_versions())
    assert "CREATE SCHEMA" in dry.json[0]["sql"] and not dry.json[0]["done"]
    assert {step["file"]: step["destructive"] for step in dry.json if step["destructive"]} == {}
    assert asyncio.run(tables_of(empty_database, "elizasql")) == set()  # really dry: not even the schema's table
    assert [row["applied"] for row in run("migrate", "status", "--json").json] == [False] * len(files)

    done = run("migrate", "up", "--json")
    assert [step["done"] for step in done.json] == [True] * len(files)
    assert run("migrate", "up").out == "nothing to do\n"
    assert {row["applied"] for row in run("migrate", "status", "--json").json} == {True}

    run("migrate", "down").fails(1, "ELIZA_ALLOW_DESTRUCTIVE_MIGRATIONS=true")
    dry = run("migrate", "down", "--dry-run", "--json")
    assert dry.json[0]["file"] == files[-1] and dry.json[0]["destructive"]
    assert {row["applied"] for row in run("migrate", "status", "--json").json} == {True}
    monkeypatch.setenv("ELIZA_ALLOW_DESTRUCTIVE_MIGRATIONS", "true")
    assert run("migrate", "down", "--json").json[0]["file"] == files[-1]
    assert [row["applied"] for row in run("migrate", "status", "--json").json] == [True] * (len(files) - 1) + [False]


def test_of_two_that_take_back_at_once_the_second_takes_back_nothing(
    run: Run, empty_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it would find then nobody has looked at."""
    monkeypatch.setenv("POSTGRES_URL", empty_database)
    write(tmp_path / "shop", "20260101000000_a.sql", "CREATE TABLE things (id int);", "DROP TABLE things;")
    write(tmp_path / "shop", "20260102000000_b[c].sql", "CREATE INDEX i ON things (id);", "DROP INDEX i;")
    folder = ["--dir", str(tmp_path / "shop")]
    assert run("migrate", "up", *folder).code == 0
    real = cli_migrate._run

    async def second(*args: Any, **options: Any) -> Any:
        if args[2] == "rollback":
            await real(*args, **options)
        return await real(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(cli_migrate, "_run", second)
        run("migrate", "down", *folder).fails(1, "can't rollback")
    assert [row["applied"] for row in run("migrate", "status", *folder, "--json").json] == [True, False]
    assert "things" in asyncio.run(tables_of(empty_database, "shop"))


def test_migrations_that_went_to_another_database(
    run: Run, empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = empty_database.replace("//elizasql@", f"//elizasql:{SECRET}@")
    monkeypatch.setenv("POSTGRES_URL", urlunsplit(urlsplit(empty_database)._replace(path="/template1")))
    monkeypatch.setenv("ELIZASQL_MIGRATION_URL", elsewhere)
    run("migrate", "up").fails(1, "migration_dsn, .*, leads to another database than dsn, .*: nothing was done")


def test_dry_run_without_a_server_makes_none(run: Run, tmp_path: Path) -> None:
    said = run("migrate", "up", "--dry-run", "--json")
    assert said.code == 0 and len(said.json) == len(elizasql._migrate.known_versions())
    assert list(tmp_path.iterdir()) == []


def write(folder: Path, name: str, up: str, down: str = "") -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"-- migrate:up\n{up}\n-- migrate:down\n{down}\n", encoding="utf-8")


def test_folders_of_ones_own(run: Run, empty_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRES_URL", empty_database)
    shop, blog = tmp_path / "my-shop", tmp_path / "blog"
    write(shop, "20260101000000_a.sql", "CREATE TABLE things (id int, v vector(3));", "DROP TABLE things;")
    write(blog, "20260101000000_a.sql", "CREATE TABLE things (id int);", "DROP TABLE things;")
    both = ["--dir", str(shop), "--dir", f"posts={blog}"]
    assert [row["schema"] for row in run("migrate", "status", *both, "--json").json] == ["my_shop", "posts"]
    assert run("migrate", "up", *both).code == 0
    for schema in ("my_shop", "posts"):
        assert asyncio.run(tables_of(empty_database, schema)) == {"things", "schema_migrations"}
    assert asyncio.run(tables_of(empty_database, "public")) == set()
    assert asyncio.run(tables_of(empty_database, "elizasql")) == set()

    # What takes data away is refused as a whole: what stands before it is not done either.
    write(shop, "20260102000000_b.sql", "CREATE TABLE more (id int);")
    write(shop, "20260103000000_c.sql", "ALTER TABLE things DROP COLUMN v; -- gone")
    run("migrate", "up", *both).fails(1, r"my_shop/20260103000000_c\.sql .*DROP COLUMN v.*nothing was done")
    assert "more" not in asyncio.run(tables_of(empty_database, "my_shop"))
    dry = run("migrate", "up", *both, "--dry-run")
    assert "takes data away: ALTER TABLE things DROP COLUMN v" in dry.out
    monkeypatch.setenv("ELIZA_ALLOW_DESTRUCTIVE_MIGRATIONS", "true")
    assert [step["file"] for step in run("migrate", "up", *both, "--json").json] == [
        "20260102000000_b.sql",
        "20260103000000_c.sql",
    ]
    write(blog, "20260104000000_bad.sql", "CREATE TABEL x ();")
    run("migrate", "up", *both).fails(1, "syntax error")


@pytest.mark.parametrize("name", [b"a, b", b"\xff"])
def test_a_folder_may_be_named_as_one_likes(run: Run, empty_database: str, tmp_path: Path, name: bytes) -> None:
    if not name.isascii() and sys.platform != "linux":
        pytest.skip("its file systems take UTF-8 only")
    write(tmp_path / os.fsdecode(name), "20260101000000_a.sql", "CREATE TABLE things (id int);")
    assert run("migrate", "up", "--dir", f"shop={tmp_path / os.fsdecode(name)}", "--dsn", empty_database).code == 0
    assert asyncio.run(tables_of(empty_database, "shop")) == {"things", "schema_migrations"}


def test_folder_of_ones_own_where_the_extension_is_elsewhere(run: Run, empty_database: str, tmp_path: Path) -> None:
    schema = '"E""x"'
    moved = [f"CREATE SCHEMA {schema}", f"GRANT USAGE ON SCHEMA {schema} TO PUBLIC"]
    moved += [f"ALTER EXTENSION vector SET SCHEMA {schema}"]
    asyncio.run(as_admin(empty_database, *moved))
    write(tmp_path / "shop", "20260101000000_a.sql", "CREATE TABLE things (v vector(3));")
    assert run("migrate", "up", "--dir", tmp_path / "shop", "--dsn", empty_database).code == 0
    assert asyncio.run(tables_of(empty_database, "shop")) == {"things", "schema_migrations"}
    asyncio.run(as_admin(empty_database, "DROP EXTENSION vector CASCADE"))
    write(tmp_path / "shop", "20260102000000_b.sql", "CREATE TABLE more (id int);")
    assert run("migrate", "up", "--dir", tmp_path / "shop", "--dsn", empty_database).code == 0
    assert asyncio.run(tables_of(empty_database, "shop")) == {"things", "more", "schema_migrations"}


def test_a_database_of_a_newer_library(run: Run, empty_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRES_URL", empty_database)
    monkeypatch.setenv("ELIZA_ALLOW_DESTRUCTIVE_MIGRATIONS", "true")
    assert run("migrate", "up").code == 0
    asyncio.run(as_admin(empty_database, "INSERT INTO elizasql.schema_migrations VALUES ('29990101000000')"))
    for words in (["up"], ["up", "--dry-run"], ["down"], ["status"]):
        run("migrate", *words).fails(1, "migrated to 29990101000000, this library knows .*: install a newer elizasql")
    assert "reembeddings" in asyncio.run(tables_of(empty_database, "elizasql"))


def test_a_server_that_no_adapter_takes_is_not_migrated(
    run: Run, empty_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSTGRES_URL", empty_database)
    asyncio.run(as_admin(empty_database, "UPDATE pg_extension SET extversion = '0.8.0' WHERE extname = 'vector'"))
    run("migrate", "up").fails(1, r"pgvector 0\.8\.4 or newer is needed")
    assert asyncio.run(tables_of(empty_database, "elizasql")) == set()
    # What others keep in it is their own business.
    write(tmp_path / "shop", "20260101000000_a.sql", "CREATE TABLE things (id int);")
    assert run("migrate", "up", "--dir", tmp_path / "shop").code == 0


def test_files_are_those_that_dbmate_takes(
    run: Run, empty_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSTGRES_URL", empty_database)
    write(tmp_path / "shop", "0001-init.sql", "CREATE TABLE things (id int);")
    write(tmp_path / "shop", "0002.sql", "CREATE TABLE more (id int);")
    done = run("migrate", "up", "--dir", tmp_path / "shop", "--json")
    assert [step["file"] for step in done.json] == ["0001-init.sql", "0002.sql"]
    assert asyncio.run(tables_of(empty_database, "shop")) == {"things", "more", "schema_migrations"}
    # Of two with one version it would apply the first and count the second as applied.
    write(tmp_path / "shop", "0002_b.sql", "CREATE TABLE lost (id int);")
    run("migrate", "up", "--dir", tmp_path / "shop").fails(2, r"0002\.sql and 0002_b\.sql have one version")
    made = {run("migrate", "new", name, "--dir", "at_once", "--json").json["file"][:22] for name in "abcd"}
    assert len(made) == 4


def test_new_migration(run: Run) -> None:
    made = run("migrate", "new", "Add Invoices!", "--dir", "plugins/shop", "--json")
    path = Path(made.json["file"])
    assert re.fullmatch(r"\d{14}_add_invoices\.sql", path.name)
    assert split_migration(path.read_text()) == ("", "")
    own = Path(elizasql.__file__).parent.parent / "migrations"
    run("migrate", "new", "x", "--dir", own).fails(2, "folder of your own")


@pytest.mark.parametrize(
    "sql",
    [
        "DROP TABLE a",
        "drop /* x */ table if exists a",
        "CREATE TABLE a (x int); DROP SCHEMA s CASCADE;",
        "TRUNCATE a",
        "DELETE FROM a WHERE x = 1",
        "WITH gone AS (DELETE FROM a RETURNING *) SELECT * FROM gone",
        "MERGE INTO a USING b ON a.x = b.x WHEN MATCHED THEN DELETE",
        "ALTER TABLE a DROP COLUMN x",
        "ALTER TABLE ONLY a ADD y int, DROP x",
        "ALTER TABLE a ALTER COLUMN x TYPE varchar(10)",
        "ALTER TABLE a ALTER x SET DATA TYPE integer USING x::integer",
        "ALTER TABLE a ALTER x TYPE numeric(10, 0)",
        "ALTER TABLE a ALTER COLUMN type TYPE integer",
        "ALTER TABLE a ALTER x$y TYPE integer",
        "ALTER TYPE a ALTER ATTRIBUTE x TYPE integer",
        "DROP FUNCTION f CASCADE",
        "DROP EXTENSION vector",
        "DROP TYPE mood",
        "ALTER TYPE pair DROP ATTRIBUTE x",
        "DO $$ BEGIN DROP TABLE a; END $$",
        "DO $x$ BEGIN IF true THEN DELETE FROM a; END IF; END $x$ LANGUAGE plpgsql",
        "DO $$ BEGIN EXECUTE format('DROP TABLE %I', 'a'); END $$",
        "DO $$ DECLARE q text; BEGIN FOR q IN SELECT format('DROP TABLE shop.%I', tablename) FROM pg_tables LOOP "
        "EXECUTE q; END LOOP; END $$",
        "DO $$ DECLARE q text := 'TRUNCATE a'; BEGIN EXECUTE q; END $$",
        "DO $$ BEGIN EXECUTE 'TRUNCATE' || ' a'; END $$",
        "DO $$ BEGIN EXECUTE 'ALTER TABLE ' || quote_ident('a') || ' DROP COLUMN x'; END $$",
        "DO $$ BEGIN EXECUTE 'ALTER TABLE ' || quote_ident('a') || ' ADD COLUMN y int, DROP COLUMN x'; END $$",
        "DO $$ BEGIN EXECUTE 'ALTER TABLE ' || quote_ident('a') || ' ALTER COLUMN x TYPE integer'; END $$",
        "DO $$ BEGIN EXECUTE 'DO ''BEGIN DROP TABLE a; END'''; END $$",
        "DO $$ DECLARE q text := ''; BEGIN DROP TABLE a; q := ''; END $$",
        "DO $$ BEGIN IF true THEN GRANT SELECT ON a TO b; DELETE FROM a; END IF; END $$",
        "CREATE FUNCTION f() RETURNS void LANGUAGE sql BEGIN ATOMIC DELETE FROM a; END; DELETE FROM a",
        "MERGE INTO a USING b ON a.x = b.x WHEN MATCHED THEN UPDATE SET x = 1 WHEN NOT MATCHED BY SOURCE THEN DELETE",
        "CREATE TABLE kept AS WITH gone AS (DELETE FROM a RETURNING *) SELECT * FROM gone",
        "CREATE MATERIALIZED VIEW kept AS WITH gone AS (DELETE FROM a RETURNING *) SELECT * FROM gone",
        "SELECT 'it''s'; DROP TABLE a",
        "SELECT E'\\'; ' ; DROP TABLE a",
    ],
)
def test_destructive_statements_are_found(sql: str) -> None:
    assert find_destructive(sql), sql


@pytest.mark.parametrize(
    "sql",
    [
        "",
        "-- DROP TABLE a",
        "/* DROP TABLE a; */ SELECT 1",
        "SELECT 'DROP TABLE a'",
        'CREATE TABLE "DROP TABLE a" (x int REFERENCES b ON DELETE CASCADE)',
        "COMMENT ON TABLE a IS 'DELETE FROM it'",
        "CREATE FUNCTION f() RETURNS void AS $$ DELETE FROM a; DROP TABLE b; $$ LANGUAGE sql",
        "CREATE TRIGGER t BEFORE TRUNCATE ON a EXECUTE FUNCTION f()",
        "CREATE TRIGGER t BEFORE TRUNCATE ON a EXECUTE FUNCTION f('DELETE FROM it')",
        "CREATE TABLE a (x int REFERENCES b ON DELETE CASCADE)",
        "CREATE RULE r AS ON DELETE TO a DO INSTEAD DELETE FROM b",
        "ALTER VIEW v ALTER COLUMN x SET DEFAULT 1",
        "GRANT DELETE, TRUNCATE ON a TO b",
        "ALTER TABLE a DROP CONSTRAINT c, ADD d int",
        "ALTER TABLE a ALTER x DROP NOT NULL, ALTER y DROP DEFAULT",
        "ALTER TABLE a ALTER x TYPE text",
        "ALTER TABLE a ALTER COLUMN type SET NOT NULL, ALTER type DROP DEFAULT",
        "ALTER TABLE a ALTER COLUMN type TYPE text, ALTER COLUMN y SET DEFAULT 1",
        "DROP INDEX i; DROP VIEW v; DROP FUNCTION f(); DROP TRIGGER t ON a",
        "INSERT INTO a VALUES (1); UPDATE a SET x = 2 WHERE x = 1",
        "DO $$ BEGIN CREATE TABLE b (x int); END $$",
        "DO $$ BEGIN EXECUTE 'SELECT 1'; RAISE NOTICE 'now DROP TABLE old'; END $$",
        "DO $$ BEGIN IF EXISTS (SELECT FROM r WHERE n = 'a') THEN GRANT DELETE, TRUNCATE ON a TO b; END IF; END $$",
        "DO $$ BEGIN CREATE TRIGGER t BEFORE TRUNCATE ON a EXECUTE FUNCTION f(); END $$",
        "ALTER DEFAULT PRIVILEGES IN SCHEMA a GRANT SELECT, TRUNCATE ON TABLES TO b",
        "ALTER PUBLICATION p DROP TABLE a; ALTER EXTENSION e DROP TABLE a",
        "CREATE FUNCTION f() RETURNS void LANGUAGE sql BEGIN ATOMIC DELETE FROM a; DELETE FROM b; END; SELECT 1",
        "DO $$ BEGIN RAISE NOTICE 'DROP TABLE'; END $$",
        "DO $$ BEGIN EXECUTE 'ALTER TABLE ' || quote_ident('a') || ' ALTER COLUMN x DROP NOT NULL'; END $$",
        "DO $$ BEGIN EXECUTE 'CREATE FUNCTION f() RETURNS void LANGUAGE sql AS ''DELETE FROM a'''; END $$",
        "DO $$ BEGIN CREATE FUNCTION f() RETURNS void LANGUAGE sql AS 'DELETE FROM a'; EXECUTE 'SELECT 1'; END $$",
    ],
)
def test_harmless_statements_pass(sql: str) -> None:
    assert find_destructive(sql) == []


# --- psql, stats, tail, tasks ----------------------------------------------------------------------------------------


def test_psql_runs_what_it_is_given(dsn: str, tmp_path: Path) -> None:
    with process("psql", "--", "-Atc", "SELECT 6 * 7", cwd=tmp_path, POSTGRES_URL=dsn) as psql:
        assert psql.communicate(timeout=60) == ("42\n", "") and psql.returncode == 0
    with process("psql", "--", "-c", "SELEC", cwd=tmp_path, POSTGRES_URL=dsn) as psql:
        assert "syntax error" in psql.communicate(timeout=60)[1] and psql.returncode == 1


FOREIGN = {
    "PGSERVICE": "nowhere",
    "PGHOSTADDR": "127.0.0.1",
    "PGREQUIREAUTH": "scram-sha-256",
    "PGREQUIREPEER": "nobody",
    "PGCHANNELBINDING": "require",
    "PGOPTIONS": "-c default_transaction_read_only=on",
    "PGDATESTYLE": "German",
    "PGCLIENTENCODING": "LATIN1",
    "PGTARGETSESSIONATTRS": "standby",
    "PGSSLMODE": "verify-full",
    "PGPORT": "1",
}


@pytest.mark.slow
def test_what_is_set_for_other_servers_does_not_lead_away(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder whose name libpq must not misread, too."""
    for name, value in FOREIGN.items():
        monkeypatch.setenv(name, value)
    home = folder / "my data+%41 ü"
    folder.mkdir()
    assert run("up", "--data-dir", home).code == 0
    try:
        with process("psql", "--data-dir", home, "--", "-Atc", "SELECT current_user", cwd=tmp_path) as psql:
            assert psql.communicate(timeout=60) == ("elizasql\n", "")
        assert run("backup", "b.dump", "--data-dir", home).code == 0
    finally:
        assert run("down", "--data-dir", home).code == 0
    said = run("restore", "b.dump", "--data-dir", folder / "two")
    assert said.code == 0, said


@contextmanager
def named_as_keeper(folder: Path, namespace: str) -> Iterator[None]:
    """Let a process be named as the keeper of a server that is none, and see that nobody ends it."""
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "PG_VERSION").write_text("18")
    (folder / "elizasql.lock").touch()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as named:
        lock = _embedded._Lock(os.open(folder / "keeper.lock", os.O_RDWR | os.O_CREAT))
        try:
            lock.take()
            os.write(lock.fd, f"{named.pid} {namespace}".encode())
            yield
        finally:
            lock.release()
            named.communicate(b"\n")
    assert named.returncode == 0, "it ended by itself"


def test_down_ends_no_process_that_another_user_names(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with named_as_keeper(folder, _keeper._namespace()), monkeypatch.context() as patched:
        if os.geteuid() == 0:
            os.chown(folder, 1, 1)
        patched.setattr(os, "geteuid", lambda: 2 if os.getuid() == 0 else os.getuid() + 1)
        run("down", "--data-dir", folder).fails(3, "belongs to uid")


def test_down_ends_no_process_that_has_the_number_of_one_in_another_container(run: Run, folder: Path) -> None:
    with named_as_keeper(folder, "pid:[1]"):
        run("down", "--data-dir", folder).fails(1, "kept up from another container: `elizasql down` there")


def test_a_password_stays_out_of_the_command_line() -> None:
    shown, environ = cli_server.for_libpq(f"postgres://me:{SECRET}%40@h:1/d?sslmode=require")
    assert shown == "postgres://me@h:1/d?sslmode=require" and environ["PGPASSWORD"] == f"{SECRET}@"
    shown, environ = cli_server.for_libpq(f"postgres:///d?host=%2Ftmp&password={SECRET}")
    assert shown == "postgres:///d?host=%2Ftmp" and environ["PGPASSWORD"] == SECRET
    shown, environ = cli_server.for_libpq(f"postgres://me:x@h/d?password={SECRET}&sslpassword={SECRET}")
    assert shown == "postgres://me@h/d" and environ["PGPASSWORD"] == "x"


def test_psql_with_an_address_that_names_no_host(dsn: str, tmp_path: Path) -> None:
    parts = urlsplit(dsn)
    named = {"user": parts.username, "password": parts.password, "host": parts.hostname, "port": parts.port}
    query = {name: value for name, value in named.items() if value} | dict(parse_qsl(parts.query))
    address = f"postgresql://{parts.path}?{urlencode(query)}"
    with process("psql", "--", "-Atc", "SELECT current_database()", cwd=tmp_path, POSTGRES_URL=address) as psql:
        assert psql.communicate(timeout=60) == (f"{parts.path[1:]}\n", "")


@pytest.mark.slow
def test_a_socket_that_is_elsewhere_is_found(run: Run, folder: Path) -> None:
    """By root, too, for whom another user runs the server."""
    home = folder / ("x" * 100)
    folder.mkdir()
    assert run("up", "--data-dir", home).code == 0
    try:
        assert (home / "socket").is_file()
        assert run("status", "--data-dir", home, "--json").json["running"] is True
        assert run("backup", "b.dump", "--data-dir", home).code == 0
        assert run("restore", "b.dump", "--data-dir", folder / ("y" * 100)).code == 0
    finally:
        assert run("down", "--data-dir", home).code == 0


@pytest.fixture
def busy(dsn: str) -> UUID:
    """Give an agent with memories, logs and tasks."""

    async def fill(db: DatabaseAdapter) -> None:
        scene = await make_scene(db)
        await db.create_memories([{"content": {"text": "a"}}, {"content": {"text": "b"}, "unique": False}], "facts")
        for number in range(3):
            body = {"n": number, "text": "bell \x07 \x1b[31mred"}
            await db.log(Log(entity_id=scene.entity, room_id=scene.room, type="action", body=body))
        await db.create_task(Task(name="ready", tags=["queue"]))
        await db.create_task(Task(name="later", tags=["queue"], due_at="2999-01-01T00:00:00Z"))  # type: ignore[arg-type]
        await db.create_task(Task(name="note"))

    return with_agent(dsn, fill)


def test_stats(on_server: Run, busy: UUID) -> None:
    said = on_server("stats", "--agent", busy, "--json").json
    (agent,) = said["agents"]
    assert agent["memories"] == 2 and agent["logs"] == 3 and agent["tasks"] == 3 and agent["dimension"] is None
    assert said["types"][0]["type"] == "facts" and said["types"][0]["duplicates"] == 1
    assert str(busy) in {row["id"] for row in on_server("stats", "--json").json["agents"]}
    table = on_server("stats", "--agent", busy).out
    assert re.search(rf"^{busy}  Ada ", table, re.MULTILINE) and "MB in the database" in table


def test_ids_and_numbers_stay_whole_on_a_narrow_terminal(
    on_server: Run, busy: UUID, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "dumb")  # 80 columns, no colours
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert str(busy) in on_server("stats").out.split()
    _out.table(["id", "said", "count"], [[busy, " ".join(["word"] * 40), 1_000_000]])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[0] == str(busy) and lines[1].split()[-1] == "1,000,000"
    assert sum(line.count("word") for line in lines) == 40 and max(map(len, lines)) <= 80


def test_tail_shows_the_newest_last_and_no_control_characters(on_server: Run, busy: UUID) -> None:
    said = on_server("tail", "--agent", busy, "-n", 2)
    assert [re.search(r'"n":(\d)', line)[1] for line in said.out.splitlines()] == ["1", "2"]  # type: ignore[index]
    assert "\x1b" not in said.out and "\x07" not in said.out
    lines = on_server("tail", "--agent", busy, "--json").out.splitlines()
    assert [json.loads(line)["body"]["n"] for line in lines] == [0, 1, 2]
    assert on_server("tail", "--agent", busy, "--type", "other").out == ""


def test_tasks_say_how_they_stand(on_server: Run, busy: UUID) -> None:
    said = on_server("tasks", "--agent", busy, "--json").json
    assert {task["name"]: task["state"] for task in said} == {
        "ready": "ready",
        "later": "waiting",
        "note": "not for workers",
    }
    assert "waiting" in on_server("tasks", "--agent", busy).out
    assert [task["name"] for task in on_server("tasks", "--agent", busy, "--tag", "queue", "-n", 1, "--json").json] == [
        "ready"
    ]


def test_task_of_an_ended_lease_waits_until_it_is_due() -> None:
    now = datetime.now(timezone.utc)
    task = Task(tags=["queue"], attempts=1, max_attempts=5, ready_at=now, claim_token=uuid4())
    assert look.state_of(task, now) == "ready"
    task.due_at = now + timedelta(hours=1)
    assert look.state_of(task, now) == "waiting"
    assert look.state_of(task, now - timedelta(seconds=1)) == "claimed"
    task.attempts = 5
    assert look.state_of(task, now) == "dead"
    assert look.state_of(task, now - timedelta(seconds=1)) == "claimed"  # a worker has it for the last time


@pytest.mark.parametrize("command", ["stats", "tail", "tasks", "bench", "recall-check", "explain count_memories"])
def test_an_agent_that_is_not_there(on_server: Run, command: str) -> None:
    id = uuid4()
    on_server(*command.split(), "--agent", id).fails(1, f"there is no agent {id}")


def test_which_agent(on_server: Run, busy: UUID, run: Run, empty_database: str) -> None:
    with_agent(os.environ["POSTGRES_URL"], lambda db: db.set_cache("a", 1))  # type: ignore[arg-type, return-value]
    on_server("tail").fails(2, "which agent.*--agent")
    for command in ("tail", "stats", "export ada.tar.gz"):
        on_server(*command.split(), "--agent", "Ada").fails(
            2, "--agent must be a UUID, not 'Ada': `elizasql stats` lists"
        )
    assert run("migrate", "up", "--dsn", empty_database).code == 0
    run("tail", "--dsn", empty_database).fails(2, "no agent")
    only = with_agent(empty_database, lambda db: db.set_cache("a", 1))  # type: ignore[arg-type, return-value]
    assert run("tail", "--dsn", empty_database) == Said(0, "", "")
    assert str(only)


async def test_what_is_new_for_tail(make_db: MakeAdapter) -> None:
    db = await make_db()
    scene = await make_scene(db)

    async def log(number: int, created_at: datetime | None = None) -> None:
        await db.log(
            Log(entity_id=scene.entity, room_id=scene.room, type="a", body={"n": number}, created_at=created_at)
        )

    def numbers(logs: list[Log]) -> list[Any]:
        return [(log.body or {})["n"] for log in logs]

    assert await look._newer(db, None, []) == []
    for number in range(250):
        await log(number)
    assert numbers(await look._newer(db, None, [])) == [*range(249, -1, -1)]
    known = await db.get_logs(count=100)
    assert await look._newer(db, None, known) == []
    for number in range(250, 400):
        await log(number)
    await log(400, known[5].created_at)  # was committed late
    new = await look._newer(db, None, known)
    assert numbers(new) == [*range(399, 249, -1), 400]
    # One that was committed late pushes out none that is newer, which would be shown a second time.
    known = look._newest(new + known)
    for number in range(401, 461):
        await log(number)
    await log(500, known[-5].created_at)
    new = await look._newer(db, None, known)
    assert numbers(new) == [*range(460, 400, -1), 500]
    known = look._newest(new + known)
    assert await look._newer(db, None, known) == []
    assert await look._newer(db, "b", known) == []


def test_tail_follows_and_repeats_nothing(dsn: str, busy: UUID, tmp_path: Path) -> None:
    environ = {"POSTGRES_URL": dsn, "PYTHONUNBUFFERED": "1"}
    with process("tail", "-f", "-n", "1", "--agent", busy, cwd=tmp_path, **environ) as tail:
        assert tail.stdout is not None
        assert '"n":2' in tail.stdout.readline()

        async def log(db: DatabaseAdapter) -> None:
            (old,) = await db.get_logs(count=1)
            await db.log(Log(entity_id=old.entity_id, room_id=old.room_id, type="action", body={"n": 3}))

        with_agent(dsn, log, busy)
        assert '{"n":3}' in tail.stdout.readline()
        tail.send_signal(signal.SIGINT)
        assert tail.communicate(timeout=60)[0] == ""


def test_ctrl_c_is_130_and_one_line(dsn: str, busy: UUID, tmp_path: Path) -> None:
    with process("tail", "--follow", "--agent", busy, cwd=tmp_path, POSTGRES_URL=dsn, PYTHONUNBUFFERED="1") as tail:
        assert tail.stdout is not None
        for _ in range(3):
            tail.stdout.readline()
        body = {"n": 4}

        async def log(db: DatabaseAdapter) -> None:
            (old,) = await db.get_logs(count=1)
            await db.log(Log(entity_id=old.entity_id, room_id=old.room_id, type="action", body=body))

        with_agent(dsn, log, busy)
        assert '{"n":4}' in tail.stdout.readline()
        tail.send_signal(signal.SIGINT)
        out, err = tail.communicate(timeout=60)
    assert tail.returncode == 130 and out == ""
    assert err.strip() == "elizasql: interrupted"


def test_a_reader_that_goes_away(dsn: str, busy: UUID, tmp_path: Path) -> None:
    with process("tail", "--follow", "--agent", busy, cwd=tmp_path, POSTGRES_URL=dsn, PYTHONUNBUFFERED="1") as tail:
        assert tail.stdout is not None and tail.stderr is not None
        tail.stdout.readline()
        tail.stdout.close()

        async def log(db: DatabaseAdapter) -> None:
            (old,) = await db.get_logs(count=1)
            await db.log(Log(entity_id=old.entity_id, room_id=old.room_id, type="action", body={}))

        with_agent(dsn, log, busy)
        assert tail.wait(timeout=60) == 0
        assert tail.stderr.read() == ""


# --- doctor ----------------------------------------------------------------------------------------------------------


async def as_admin(dsn: str, *statements: str) -> None:
    connection = await asyncpg.connect(dsn.replace("//elizasql@", "//postgres@"))
    for statement in statements:
        await connection.execute(statement)
    await connection.close()


def findings(said: Said, check: str) -> list[dict[str, str]]:
    return [finding for finding in said.json if finding["check"] == check]


def test_doctor_where_the_role_has_too_little_time(run: Run, dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong is its statement_timeout, and that is what is asked for; not a server that is away."""
    statement = SQL["check_server"]
    slow = dataclasses.replace(statement, sql=statement.sql.replace("SELECT", "SELECT pg_sleep(60),", 1))
    monkeypatch.setitem(SQL._statements, "check_server", slow)
    said = run("doctor", "--json", "--dsn", f"{dsn}&statement_timeout=200")
    assert (said.code, said.err) == (1, "")
    (server,) = said.json
    assert (server["check"], server["severity"]) == ("server", "error")
    assert "statement_timeout" in server["remedy"]


def test_doctor_on_a_healthy_database(run: Run, empty_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRES_URL", empty_database)
    said = run("doctor", "--json")
    assert said.code == 1  # no schema yet
    assert findings(said, "migrations")[0]["remedy"] == "elizasql migrate up"
    assert run("migrate", "up").code == 0
    said = run("doctor", "--json")
    assert said.code == 0, said
    assert {finding["severity"] for finding in said.json} <= {"ok", "note"}, said.out
    checks = {"server", "role", "clock", "distance", "pooler", "connections", "disk", "extensions", "migrations"}
    checks |= {"session", "schema", "indexes", "triggers", "tables", "memory", "tail", "reembed"}
    assert {finding["check"] for finding in said.json} == checks
    assert all(finding["remedy"] for finding in said.json if finding["severity"] in ("warning", "error"))
    assert "one process of elizasql takes up to 22" in findings(said, "connections")[0]["finding"]
    text = run("doctor")
    assert re.search(r"\d+ ok, \d note, 0 warning, 0 error", text.out) and "ok       server" not in text.out
    assert "ok       server" in run("doctor", "--all").out


def test_doctor_finds_what_is_broken(run: Run, empty_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRES_URL", empty_database)
    assert run("migrate", "up").code == 0

    async def remember(db: DatabaseAdapter) -> None:
        await db.ensure_embedding_dimension(384)
        vectors = np.random.default_rng(1).normal(size=(5, 384))
        await db.create_memories([{"content": {}, "embedding": vector, "unique": True} for vector in vectors], "facts")

    agent = with_agent(empty_database, remember)
    asyncio.run(
        as_admin(
            empty_database,
            "UPDATE pg_index SET indisvalid = FALSE WHERE indexrelid = 'elizasql.rooms_world_idx'::regclass",
            "DROP INDEX elizasql.embeddings_p03_dim_384_hnsw",
            "REVOKE DELETE ON elizasql.logs FROM elizasql",
            "ALTER TABLE elizasql.logs OWNER TO postgres",
            "ALTER TABLE elizasql.rooms DISABLE TRIGGER ALL",
            "ALTER TABLE elizasql.embeddings_p03 ENABLE TRIGGER embeddings_removed",
        )
    )
    monkeypatch.setattr(doctor, "_LONG_TAIL", 4)
    said = run("doctor", "--json")
    assert said.code == 1
    broken = " ".join(finding["finding"] for finding in findings(said, "indexes"))
    assert "elizasql.rooms_world_idx is invalid" in broken and "1 HNSW indexes are missing" in broken
    assert "REINDEX INDEX elizasql.rooms_world_idx" in {finding["remedy"] for finding in findings(said, "indexes")}
    (privileges,) = findings(said, "privileges")
    assert privileges["severity"] == "error" and "elizasql.logs" in privileges["finding"]
    off, weak = findings(said, "triggers")
    assert (off["severity"], weak["severity"]) == ("error", "note")
    assert (
        "elizasql.rooms are off" in off["finding"]
        and "embeddings_removed of elizasql.embeddings_p03" in weak["finding"]
    )
    asyncio.run(as_admin(empty_database, off["remedy"].split(", then")[0], weak["remedy"]))
    assert [each["severity"] for each in findings(run("doctor", "--json"), "triggers")] == ["ok"]
    (tail,) = findings(said, "tail")
    assert tail["severity"] == "warning" and f"5 of 5 vectors of agent {agent}" in tail["finding"]
    assert "error" in run("doctor").out

    admin = run("doctor", "--json", "--dsn", empty_database.replace("//elizasql@", "//postgres@"))
    assert findings(admin, "role")[0]["severity"] == "warning"

    asyncio.run(as_admin(empty_database, "DROP EXTENSION vector CASCADE"))
    said = run("doctor", "--json")
    assert "not created in this database" in findings(said, "server")[0]["finding"]
    (extension,) = (each for each in findings(said, "extensions") if each["severity"] == "error")
    assert "every vector with it" in extension["finding"] and "restore a backup" in extension["remedy"]
    assert not findings(said, "indexes"), "nothing that `elizasql index` could make again"


def test_doctor_counts_rows_where_counters_were_lost(
    run: Run, empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSTGRES_URL", empty_database)
    agent = with_agent(empty_database, lambda db: db.ensure_embedding_dimension(384))
    asyncio.run(
        as_admin(
            empty_database,
            "ALTER TABLE elizasql.cache SET (autovacuum_enabled = off)",
            "INSERT INTO elizasql.cache (agent_id, key, value) "
            f"SELECT '{agent}', n::text, '1' FROM generate_series(1, 1500) AS n",
            "ANALYZE elizasql.cache",
            "SELECT pg_stat_force_next_flush()",
            "SELECT pg_stat_reset_single_table_counters('elizasql.cache'::regclass)",
            "UPDATE elizasql.cache SET value = '2'",
            "SELECT pg_stat_force_next_flush()",
        )
    )
    (stale,) = findings(run("doctor", "--json"), "statistics")
    assert stale["finding"].startswith("1,500 inserts, updates and deletes in elizasql.cache since")
    assert "about 1,500 rows" in stale["finding"]


def test_doctor_finds_what_was_dropped(run: Run, empty_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRES_URL", empty_database)
    assert run("migrate", "up").code == 0
    assert [each["severity"] for each in findings(run("doctor", "--json"), "schema")] == ["ok"]
    asyncio.run(
        as_admin(
            empty_database,
            "DROP INDEX elizasql.memories_room_idx, elizasql.goals_status_idx",
            "DROP TABLE elizasql.pairing_allowlist",
            "ALTER TABLE elizasql.goals DROP CONSTRAINT goals_status_check",
            "ALTER TABLE elizasql.logs DROP CONSTRAINT logs_room_fkey",
            "ALTER TABLE elizasql.logs ADD CONSTRAINT logs_room_fkey FOREIGN KEY (agent_id, room_id)"
            " REFERENCES elizasql.rooms (agent_id, id) ON DELETE CASCADE NOT VALID",
            "ALTER TABLE elizasql.embeddings_p03 DROP CONSTRAINT embeddings_memory_fkey",
            "ALTER TABLE elizasql.worlds DROP COLUMN metadata",
            "DROP TRIGGER memories_copy_scope ON elizasql.memories",
            "DROP FUNCTION elizasql.near_duplicates_384",
        )
    )
    said = findings(run("doctor", "--json"), "schema")
    assert {(each["severity"], each["finding"].partition(": ")[2].partition(":")[0]) for each in said} == {
        ("warning", "goals_status_idx, memories_room_idx"),
        ("error", "pairing_allowlist"),
        ("error", "embeddings_p03.embeddings_memory_fkey, goals.goals_status_check, logs.logs_room_fkey"),
        ("error", "worlds.metadata"),
        ("error", "memories.memories_copy_scope"),
        ("error", "near_duplicates_384"),
    }


def test_doctor_for_a_role_with_few_rights(run: Run, empty_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRES_URL", empty_database)
    assert run("migrate", "up").code == 0
    role = f"app_{uuid4().hex}"
    needed = """
        DO $$ DECLARE name regclass; BEGIN
            FOR name IN SELECT oid FROM pg_class WHERE relnamespace = 'elizasql'::regnamespace
                AND relkind IN ('r', 'p') AND NOT relispartition AND relname <> 'schema_migrations'
            LOOP EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON %s TO {role}', name); END LOOP;
        END $$"""

    async def look_with_others(address: str) -> Said:
        """Ask while other roles have connections."""
        others = [await asyncpg.connect(empty_database.replace("//elizasql@", "//postgres@")) for _ in range(3)]
        said = await asyncio.to_thread(run, "doctor", "--json", "--dsn", address)
        for other in others:
            await other.close()
        return said

    asyncio.run(
        as_admin(
            empty_database,
            f"CREATE ROLE {role} LOGIN",
            f"GRANT USAGE ON SCHEMA elizasql TO {role}",
            f"GRANT SELECT ON elizasql.schema_migrations TO {role}",
            needed.replace("{role}", role),
        )
    )
    try:
        app = empty_database.replace("//elizasql@", f"//{role}@")
        said = asyncio.run(look_with_others(app))
        assert said.code == 0, said
        assert re.match("3 sessions of other roles are hidden", findings(said, "role")[1]["finding"])
        assert int(findings(said, "connections")[0]["finding"].split()[0]) >= 4

        # No row is an answer, too, and no migration that is there.
        guarded = [f"ALTER TABLE elizasql.{name} ENABLE ROW LEVEL SECURITY" for name in ("logs", "schema_migrations")]
        asyncio.run(as_admin(empty_database, *guarded, f"CREATE POLICY other ON elizasql.logs FOR INSERT TO {role}"))
        said = run("doctor", "--json", "--dsn", app)
        assert [each["check"] for each in said.json if each["severity"] == "error"] == ["policies", "migrations"]
        hidden = "row level security hides every row of elizasql.logs, elizasql.schema_migrations from the role"
        assert findings(said, "policies")[0]["finding"] == hidden
        asyncio.run(
            as_admin(
                empty_database,
                f"CREATE POLICY own ON elizasql.logs TO {role} USING (type = 'a')",
                "CREATE POLICY seen ON elizasql.schema_migrations FOR SELECT USING (true)",
            )
        )
        assert run("doctor", "--json", "--dsn", app).code == 0

        asyncio.run(
            as_admin(
                empty_database,
                f"ALTER ROLE {role} CONNECTION LIMIT 1",
                f"ALTER ROLE {role} SET default_transaction_read_only = on",
            )
        )
        said = run("doctor", "--json", "--dsn", app)
        assert said.code == 1, said
        assert "default_transaction_read_only is on" in findings(said, "writes")[0]["finding"]
        (session,) = findings(said, "session")  # which takes a connection more
        assert "too many connections" in session["finding"] and "ALTER ROLE" not in session["remedy"]
        asyncio.run(
            as_admin(
                empty_database,
                f"ALTER ROLE {role} CONNECTION LIMIT -1",
                f"ALTER ROLE {role} RESET default_transaction_read_only",
            )
        )
        # As on servers whose default privileges leave functions to their owner.
        asyncio.run(as_admin(empty_database, "REVOKE EXECUTE ON FUNCTION elizasql.partition_of FROM PUBLIC"))
        (lacking,) = findings(run("doctor", "--json", "--dsn", app), "privileges")
        assert lacking["finding"] == "the role lacks EXECUTE on elizasql.partition_of"
        assert lacking["remedy"].startswith("GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA elizasql")
        asyncio.run(as_admin(empty_database, "GRANT EXECUTE ON FUNCTION elizasql.partition_of TO PUBLIC"))
        asyncio.run(as_admin(empty_database, f"REVOKE UPDATE, DELETE ON elizasql.memories FROM {role}"))
        (lacking,) = findings(run("doctor", "--json", "--dsn", app), "privileges")
        assert lacking["finding"] == "the role lacks UPDATE/DELETE on elizasql.memories"

        # What cannot be asked takes nothing else with it.
        asyncio.run(as_admin(empty_database, f"REVOKE SELECT ON elizasql.embeddings FROM {role}"))
        said = run("doctor", "--json", "--dsn", app)
        assert said.code == 1 and said.err == ""
        assert [each["check"] for each in said.json if each["severity"] == "error"] == ["privileges", "tail"]
        (tail,) = findings(said, "tail")
        assert "permission denied for table embeddings" in tail["finding"] and "GRANT" in tail["remedy"]
        assert findings(said, "reembed")[0]["severity"] == "ok"
        asyncio.run(as_admin(empty_database, f"REVOKE SELECT ON elizasql.schema_migrations FROM {role}"))
        said = run("doctor", "--json", "--dsn", app)
        (lacking,), (unread,) = findings(said, "privileges"), findings(said, "migrations")
        assert "SELECT on elizasql.schema_migrations" in lacking["finding"]
        assert "permission denied" in unread["finding"] and "check of privileges" in unread["remedy"]
    finally:
        asyncio.run(as_admin(empty_database, f"DROP OWNED BY {role}", f"DROP ROLE {role}"))


def test_doctor_on_rows_that_cannot_be_made_here() -> None:
    def told(found: Iterable[doctor.Finding]) -> list[tuple[str, str]]:
        return [(finding.check, finding.severity) for finding in found]

    server: dict[str, Any] = {
        "in_recovery": True, "read_only": "on",
        "knows_case": False, "fsync": "off", "full_page_writes": "off", "synchronous_commit": "off",
        "data_checksums": "off", "autovacuum": "off", "track_counts": "off", "collation_changed": True,
        "xid_age": 2_000_000_000, "idle_slots": 2, "is_above_policies": False, "may_migrate": False,
        "connections": 90, "free_for_all": 97, "shared_buffers": 1 << 27, "effective_cache_size": 1 << 28,
        "maintenance_work_mem": 1 << 26, "hidden": 3, "huge_pages": None, "huge_pages_needed": -1,
    }  # fmt: skip
    assert told(doctor.check_settings(server)) == [  # type: ignore[arg-type]
        ("writes", "error"),
        ("locale", "note"),
        ("fsync", "error"),
        ("full_page_writes", "error"),
        ("synchronous_commit", "note"),
        ("autovacuum", "warning"),
        ("track_counts", "warning"),
        ("data_checksums", "note"),
        ("collation", "warning"),
        ("vacuum", "error"),
        ("replication", "warning"),
    ]
    assert told(doctor.check_role(server)) == [("role", "ok"), ("role", "note"), ("role", "note")]  # type: ignore[arg-type]
    assert doctor.check_connections(server, 20).severity == "warning"  # type: ignore[arg-type]
    for skew, severity in ((0.1, "ok"), (-3.0, "warning"), (120.0, "error")):
        assert doctor.check_clock(skew).severity == severity
    assert "behind" in doctor.check_clock(-3).finding

    def index(size: int, scans: int = 0, method: str = "btree", name: str = "i") -> dict[str, Any]:
        table = "elizasql.embeddings_p00"
        return {"name": f"elizasql.{name}", "table_name": table, "is_valid": "_cc" not in name, "is_unique": False,
                "method": method, "scans": scans, "bytes": size}  # fmt: skip

    names = [f"embeddings_p00_dim_{dimension}_hnsw" for dimension in DIMENSIONS]
    vectors = [index(0, method="hnsw", name=name) for name in names[1:]]
    large = [*vectors, index(1 << 30, method="hnsw", name=names[0]), index(1 << 28)]
    assert [finding.severity for finding in doctor.check_indexes(large)] == ["note", "note", "ok"]  # type: ignore[arg-type]
    # One more, of the user's own, does not stand in for one that is missing; what a rebuild has left is one too many.
    more = [*vectors, index(0, method="hnsw", name="mine"), index(0, method="hnsw", name=f"{names[1]}_ccnew")]
    left, missing = doctor.check_indexes(more)  # type: ignore[arg-type]
    assert left.remedy == f"DROP INDEX elizasql.{names[1]}_ccnew" and missing.finding.startswith("1 HNSW indexes are")
    assert [each.severity for each in doctor.check_indexes([*large, *more])] == ["error", "note", "note"]  # type: ignore[arg-type]
    for embedded, remedy in ((False, "raise shared_buffers"), (True, "stop the server once")):

        def memory(indexes: list[dict[str, Any]], embedded: bool = embedded) -> list[doctor.Finding]:
            return list(doctor.check_memory(server, indexes, embedded))  # type: ignore[arg-type]

        assert [finding.severity for finding in memory(large)] == ["warning", "note"]
        said = memory([index(1 << 27 | 1, method="hnsw")])
        assert [finding.severity for finding in said] == ["note", "note"]
        assert said[0].remedy.startswith(remedy)
        # Not of a small index, nor where they are in use, nobody can tell, or there are none to be had.
        walked = [index(1 << 24, method="hnsw")]
        for status, needed, indexes, noted in (
            ("off", 260, walked, True),
            ("on", 260, walked, False),
            (None, 260, walked, False),
            ("off", -1, walked, False),
            ("off", 260, [index(1 << 22, method="hnsw")], False),
        ):
            other = {**server, "huge_pages": status, "huge_pages_needed": needed}
            found = doctor.check_memory(other, indexes, embedded)  # type: ignore[arg-type]
            remedies = [finding.remedy for finding in found if finding.check == "huge pages"]
            assert len(remedies) == noted and all("vm.nr_hugepages=260 " in remedy for remedy in remedies)

    table = {"name": "elizasql.t", "live": 10_000, "dead": 20_000, "modified": 5_000, "analyzed_at": None, "bytes": 1}
    assert told(doctor.check_tables([table])) == [("statistics", "warning"), ("bloat", "warning")]  # type: ignore[list-item]
    # Each row may have changed several times, and be gone again: more changes than rows are no contradiction.
    for live in (1_200, 0):
        often = table | {"live": live, "dead": 0, "modified": 3_600}
        (stale,) = doctor.check_tables([often])  # type: ignore[list-item]
        assert (stale.check, stale.remedy) == ("statistics", "ANALYZE elizasql.t")
        assert stale.finding.startswith(
            "3,600 inserts, updates and deletes in elizasql.t since it was analyzed (never)"
        )
        assert stale.finding.endswith(f"about {live:,} rows by the server's estimate") and " of " not in stale.finding
    *_, walked_over = doctor.check_tables([table | {"name": "elizasql.embeddings_p05"}])  # type: ignore[list-item]
    assert re.match("REINDEX TABLE .* elizasql.embeddings_p05, .* VACUUM ANALYZE elizasql", walked_over.remedy)
    waiting = {"pid": 7, "application_name": "", "state": "idle in transaction", "prepared": None, "seconds": 600.0}
    orphan = {"pid": None, "application_name": None, "state": None, "prepared": "'a b'", "seconds": 1200.0}
    long, forgotten = doctor.check_transactions([waiting, orphan])  # type: ignore[list-item]
    assert "10 minutes" in long.finding and "pg_terminate_backend(7)" in long.remedy
    assert "20 minutes" in forgotten.finding and "ROLLBACK PREPARED 'a b'" in forgotten.remedy
    old = {"name": "vector", "created": "0.8.4", "available": "0.8.5"}
    late = doctor.failed("tail", asyncio.TimeoutError())
    assert late.severity == "error" and "within the time limit" in late.finding and "ELIZASQL_TIMEOUT" in late.remedy
    assert [finding.remedy for finding in doctor.check_extensions([old])] == ["ALTER EXTENSION vector UPDATE"]  # type: ignore[list-item]


# --- explain, recall-check -------------------------------------------------------------------------------------------


@pytest.fixture
def searched(dsn: str) -> tuple[UUID, UUID]:
    """Give an agent with 60 vectors in the index, and one of its memories."""
    ids: list[UUID] = []

    async def remember(db: DatabaseAdapter) -> None:
        await db.ensure_embedding_dimension(384)
        vectors = np.random.default_rng(2).normal(size=(60, 384))
        memories = [{"content": {}, "embedding": vector, "unique": True} for vector in vectors]
        ids.extend(await db.create_memories(memories, "facts"))
        await db.index_memories()

    return with_agent(dsn, remember), ids[0]


def test_explain_shows_the_plan_and_the_index(on_server: Run, searched: tuple[UUID, UUID], tmp_path: Path) -> None:
    agent, memory = searched
    call = ["explain", "search_memories", "--agent", agent, "table_name=facts", "count=3"]
    said = on_server(*call, f"embedding=of:{memory}", "--json").json
    assert said["index_used"] and said["rows"] == 3 and said["sequential"] == []
    (statement,) = said["statements"]
    assert statement["statement"] == "search_memories" and statement["file"] == "sql/embeddings.sql"
    assert statement["indexes"] and statement["plan"]["Plan"]["Node Type"]
    text = on_server(*call, f"embedding=of:{memory}").out
    assert "every statement used an index" in text and re.search(r"Index .*Scan using \w+ \(", text)
    np.save(tmp_path / "v.npy", np.ones(384))
    (tmp_path / "v.json").write_text(json.dumps([1.0] * 384))
    for file in ("v.npy", "v.json"):
        assert on_server(*call, f"embedding=@{file}", "--json").json["rows"] == 3
    assert on_server("explain", "get_memory_by_id", f"memory_id={memory}", "--agent", agent, "--json").json[
        "index_used"
    ]
    assert "nothing was sent" in on_server("explain", "get_memories_by_ids", "memory_ids=[]", "--agent", agent).out


def test_explain_shows_the_plan_that_is_in_force(on_server: Run, searched: tuple[UUID, UUID]) -> None:
    """Sessions have one plan for all values; one that was made for these would show them."""
    agent, memory = searched
    for call in (
        ["get_memories", "table_name=facts", "start=0", 'metadata={"a": "\'"}'],
        ["search_memories", "table_name=facts", f"embedding=of:{memory}", "match_threshold=0.5"],
        ["get_memories_by_ids", f'memory_ids=["{memory}"]'],
        ["count_agents"],  # without parameters
    ):
        (statement,) = on_server("explain", *call, "--agent", agent, "--json").json["statements"]
        plan = json.dumps(statement["plan"])
        assert str(agent) not in plan and str(memory) not in plan, call
        assert "agent_id = $" in plan or call[0] == "count_agents", call


def test_explain_shows_what_an_application_keeps_sending(on_server: Run, searched: tuple[UUID, UUID]) -> None:
    """Not the first search, which also measures its scope."""
    vector = json.dumps([1.0] * 384)
    call = ("explain", "search_memories", "table_name=facts", f"embedding={vector}", "--agent", searched[0], "--json")
    (statement,) = on_server(*call).json["statements"]
    assert statement["statement"] == "search_memories"
    loops = {node.get("Subplan Name"): node["Actual Loops"] for _, node in queries.walk(statement["plan"]["Plan"])}
    assert (loops["CTE choice"], loops["CTE scope"], loops["CTE graph"], loops["CTE placed"]) == (1, 0, 0, 0)


async def test_every_method_that_reads_can_be_explained(db: DatabaseAdapter) -> None:
    """With arguments as a command line has them; JSON has no tuples."""
    own = await filled(db)
    pair = {"sourceEntityId": own.scene.entity, "targetEntityId": own.scene.other}
    calls = {**shared_calls(await share(db)), "get_relationships_by_pairs": {"pairs": [pair]}}
    for method in sorted(queries.methods()):
        given = {}
        for name, value in (calls[method] if method in calls else own.arguments(method)).items():
            text = value if isinstance(value, str) else orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY).decode()
            given[name] = await queries._read(db, text)
        told = await queries.explain_call(db, method, given)
        assert told["index_used"], (method, told)


def test_explain_says_when_a_table_is_read_as_a_whole() -> None:
    scan = {
        "Node Type": "Seq Scan",
        "Relation Name": "logs",
        "Actual Loops": 1,
        "Actual Rows": 9,
        "Actual Total Time": 1,
    }
    never = {**scan, "Relation Name": "rooms", "Actual Loops": 0}
    top = {"Node Type": "Sort", "Actual Loops": 1, "Actual Rows": 9, "Actual Total Time": 2, "Plans": [scan, never]}
    assert queries.summarize({"Plan": top, "Execution Time": 2.5}) == {
        "milliseconds": 2.5,
        "rows": 9,
        "indexes": [],
        "sequential": ["logs"],
    }


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["delete_memory", "memory_id=x"], "no method that reads"),
        (["__init__"], "no method that reads; there are .*search_memories"),
        (["get_rooms"], "no method that reads; is it get_room or get_rooms_by_ids or [a-z_]+\\?$"),
        (["is_ready"], "no method that reads"),
        (["find_or_create_dm_channel", "user1_id=x", "user2_id=y", "server_id=z"], "no method that reads"),
        (["search_memories", "embedding"], "NAME=VALUE"),
        (["get_memories", "table_name=facts", "nope=1"], "nope"),
        (["get_memories", "table_name=facts", "room_id=here"], "room_id must be a UUID"),
        (["search_memories", "table_name=facts", f"embedding=of:{UUID(int=7)}"], "has no embedding"),
        (["search_memories", "table_name=facts", "embedding=@bad.json"], "neither .npy nor JSON"),
    ],
)
def test_explain_refuses_what_does_not_fit(
    on_server: Run, searched: tuple[UUID, UUID], tmp_path: Path, arguments: list[str], pattern: str
) -> None:
    (tmp_path / "bad.json").write_text("{")
    on_server("explain", *arguments, "--agent", searched[0]).fails(2, pattern)


async def test_explain_fails_as_the_method_does(own_database: str) -> None:
    """And has the time that the call has left, however long: what is slow is what one asks about."""
    failures: list[tuple[str, type[ElizaSQLError]]] = [
        ("RAISE 'no room' USING ERRCODE = 'configuration_limit_exceeded'", elizasql.ServerBusyError),
        ("PERFORM pg_sleep(60)", elizasql.DeadlineError),
    ]
    async with elizasql.connect(agent_id=uuid4(), dsn=own_database, indexing="manual") as db:
        await db.ensure_agent_exists({"name": "a"})
        await db.create_world({"name": "w"})
        connection = await asyncpg.connect(own_database)
        await connection.execute("CREATE SEQUENCE calls")
        for second, error in failures:
            await connection.execute(
                f"""
                CREATE OR REPLACE FUNCTION look() RETURNS boolean LANGUAGE plpgsql AS $$
                BEGIN
                    IF nextval('calls') > 1 THEN {second}; END IF;
                    RETURN true;
                END $$;
                DROP POLICY IF EXISTS looked ON elizasql.worlds;
                CREATE POLICY looked ON elizasql.worlds USING (look());
                ALTER TABLE elizasql.worlds ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
                SELECT setval('calls', 1, false);
                """
            )
            with pytest.raises(error, match="get_all_worlds: "):
                await queries.explain_call(db, "get_all_worlds", {"timeout": 0.5})
        await connection.close()


def test_recall_check_compares_with_exact_search(on_server: Run, searched: tuple[UUID, UUID]) -> None:
    said = on_server("recall-check", "--agent", searched[0], "--sample", 20, "-k", 5, "--json").json
    assert said["type"] == "facts" and said["vectors"] == said["indexed"] == 60 and said["sample"] == 20
    assert [step["recall"] for step in said["steps"]] == [1.0] * len(said["steps"])  # so few are searched exactly
    assert said["by_index"] is False and any(step["in_force"] for step in said["steps"])
    assert "searched exactly" in on_server("recall-check", "--agent", searched[0], "--sample", 5).out
    on_server("recall-check", "--agent", searched[0], "--type", "nope").fails(2, "no embedding of type 'nope'")


def test_recall_check_sees_what_is_missed(
    on_server: Run, searched: tuple[UUID, UUID], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = DatabaseAdapter.search_memories

    async def by_hnsw(*_: object) -> bool:
        return True

    monkeypatch.setattr(queries, "uses_hnsw", by_hnsw)

    async def lossy(self: DatabaseAdapter, **given: Any) -> Any:
        hits = await real(self, **given)
        return hits if given["ef_search"] >= 200 else hits[:1] + hits[2:]

    monkeypatch.setattr(DatabaseAdapter, "search_memories", lossy)
    said = on_server("recall-check", "--agent", searched[0], "--sample", 10, "-k", 5, "--json").json
    recalls = {step["ef_search"]: step["recall"] for step in said["steps"]}
    assert recalls[100] == pytest.approx(0.8) and recalls[200] == 1.0 and max(recalls) == 200
    assert said["recommended"] == 200 and "ELIZASQL_EF_SEARCH=200" in said["advice"]
    monkeypatch.setattr(DatabaseAdapter, "search_memories", real)
    said = on_server("recall-check", "--agent", searched[0], "--sample", 10, "-k", 5, "--json").json
    assert said["recommended"] == 20 and "ELIZASQL_EF_SEARCH=20:" in said["advice"]


def test_recall_check_times_no_search_with_a_vector_that_is_new_to_the_server(
    on_server: Run, searched: tuple[UUID, UUID], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of the ladder would pay for reading the index, and look slower than what is larger."""
    asked: list[tuple[bytes, int]] = []
    real = DatabaseAdapter.search_memories

    async def search(self: DatabaseAdapter, **given: Any) -> Any:
        if "ef_search" in given:  # else it is only looked at which way it goes
            asked.append((given["embedding"].tobytes(), given["ef_search"]))
        return await real(self, **given)

    monkeypatch.setattr(DatabaseAdapter, "search_memories", search)
    said = on_server("recall-check", "--agent", searched[0], "--sample", 5, "--json").json
    begun, timed = asked[:5], asked[5:]
    assert len({vector for vector, _ in begun}) == 5 and {ef for _, ef in begun} == {100}
    assert timed == [(vector, step["ef_search"]) for step in said["steps"] for vector, _ in begun]


def test_recall_check_on_an_index_that_is_used(run: Run, empty_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A database of its own: beside a large agent in its partition this one would be compared exactly.
    monkeypatch.setenv("POSTGRES_URL", empty_database)
    assert run("migrate", "up").code == 0

    async def remember(db: DatabaseAdapter) -> None:
        await db.ensure_embedding_dimension(384)
        vectors = np.random.default_rng(6).normal(size=(2500, 384)).astype(np.float32)
        memories = [{"content": {}, "embedding": vector, "unique": True} for vector in vectors]
        await db.create_memories(memories, "facts")
        await db.index_memories(rebuild=True)

    agent = with_agent(empty_database, remember)
    said = run("recall-check", "--agent", agent, "--sample", 200, "--json").json
    assert said["by_index"] is True
    recalls = [step["recall"] for step in said["steps"]]
    assert min(recalls) < 1  # random vectors are hard for a graph: of 2,000 neighbours some thirty are missed
    assert said["recommended"] is None or said["recommended"] >= 20
    vector = json.dumps([1.0] * 384)
    told = run("explain", "search_memories", "table_name=facts", f"embedding={vector}", "--agent", agent, "--json").json
    assert [plan["statement"] for plan in told["statements"]] == ["search_memories_by_hnsw"]
    # As a rebuild that is interrupted leaves it; that of another width is no matter of this agent's searches.
    for width, missing in ((512, False), (384, True)):
        indexes = (f"elizasql.embeddings_p{number:02}_dim_{width}_hnsw" for number in range(16))
        asyncio.run(as_admin(empty_database, f"DROP INDEX {', '.join(indexes)}"))
        assert ("the index is missing" in run("recall-check", "--agent", agent, "--sample", 5).out) is missing


def test_bench_measures_and_leaves_nothing(on_server: Run, searched: tuple[UUID, UUID], dsn: str) -> None:
    async def rows() -> dict[str, int]:
        connection = await asyncpg.connect(dsn)
        try:
            return {
                table: await connection.fetchval(f"SELECT count(*) FROM elizasql.{table}")
                for table in ("agents", "memories", "embeddings")
            }
        finally:
            await connection.close()

    before = asyncio.run(rows())
    said = on_server("bench", "--agent", searched[0], "--sample", 5, "--json").json
    by_name = {each["what"]: each for each in said}
    assert list(by_name) == [
        "search, in the database",
        "get_memory_by_id",
        "search, vectors in the process",
        "create_memory",
        "create_memories, one batch",
    ]
    assert all(0 < each["p50"] <= each["p95"] and each["rate"] > 0 and each["calls"] == 5 for each in said)
    assert by_name["search, in the database"]["recall"] == by_name["search, vectors in the process"]["recall"] == 1
    assert asyncio.run(rows()) == before
    shown = on_server("bench", "--agent", searched[0], "--sample", 3, "--no-writes").out
    assert "p95 ms" in shown and "create_memory" not in shown
    on_server("bench", "--agent", searched[0], "--type", "nope").fails(2, "no embedding of type 'nope'")


def test_recall_check_without_vectors(on_server: Run, busy: UUID) -> None:
    on_server("recall-check", "--agent", busy).fails(2, "no embedding yet")
    on_server("bench", "--agent", busy).fails(2, "no embedding yet")


# --- export, import, index, backup, restore --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out", "out.tar", "out.tar.gz"])
def test_out_and_in_again(
    on_server: Run, searched: tuple[UUID, UUID], empty_database: str, tmp_path: Path, name: str
) -> None:
    agent, _ = searched
    said = on_server("export", name, "--agent", agent, "--json")
    assert said.code == 0, said
    assert said.json["rows"] == {"agents": 1, "memories": 60, "embeddings": 60}
    assert (tmp_path / name).is_dir() == (name == "out")
    on_server("export", name, "--agent", agent).fails(2, "there already")

    dry = on_server("import", name, "--dsn", empty_database, "--dry-run", "--json")
    assert dry.json["agents"][0]["id"] == str(agent)
    assert asyncio.run(tables_of(empty_database, "elizasql")) == set()
    said = on_server("import", name, "--dsn", empty_database, "--json")
    assert said.code == 0, said
    assert {row["table"]: row["created"] for row in said.json["tables"]} == {
        "agents": 1,
        "memories": 60,
        "embeddings": 60,
    }
    assert said.json["report"] is None and said.json["index_seconds"] > 0
    assert on_server("stats", "--dsn", empty_database, "--json").json["agents"][0]["tail"] == 0
    again = on_server("import", name, "--dsn", empty_database)
    assert re.search(r"^memories +60 +0 +60 ", again.out, re.MULTILINE) and "done in" in again.out
    assert not list(tmp_path.glob("elizasql-import-*"))


def test_what_comes_while_an_archive_is_written_is_not_replaced(
    on_server: Run, busy: UUID, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, name = os.fsync, ""

    def come(descriptor: int) -> None:
        sync(descriptor)
        (tmp_path / name).write_text("mine")

    def link(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    for without_links in (False, True):
        if without_links:
            monkeypatch.setattr(os, "link", link)
            assert on_server("export", "all.tar", "--agent", busy).code == 0
            assert [path.name for path in tmp_path.iterdir()] == ["all.tar"]
        for name in ("a.tar", "a"):
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", come)
                on_server("export", name, "--agent", busy).fails(2, f"^elizasql: {name} is there by now")
            assert (tmp_path / name).read_text() == "mine"
            (tmp_path / name).unlink()


@pytest.mark.parametrize("owner", [True, False])
def test_an_import_rebuilds_where_that_pays_and_it_may(
    on_server: Run, searched: tuple[UUID, UUID], empty_database: str, monkeypatch: pytest.MonkeyPatch, owner: bool
) -> None:
    monkeypatch.setattr(data, "_REBUILD", 10)
    agent, _ = searched
    assert on_server("export", "out", "--agent", agent).code == 0
    role = f"app_{uuid4().hex}"
    assert on_server("migrate", "up", "--dsn", empty_database).code == 0

    async def index() -> Any:
        connection = await asyncpg.connect(empty_database)
        found = await connection.fetchval(
            "SELECT to_regclass('elizasql.' || elizasql.partition_of($1) || '_dim_384_hnsw')::oid", agent
        )
        await connection.close()
        return found

    before = asyncio.run(index())
    asyncio.run(
        as_admin(
            empty_database,
            f"CREATE ROLE {role} LOGIN",
            f"GRANT USAGE ON SCHEMA elizasql TO {role}",
            f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA elizasql TO {role}",
        )
    )
    try:
        address = empty_database if owner else empty_database.replace("//elizasql@", f"//{role}@")
        said = on_server("import", "out", "--dsn", address)
        assert said.code == 0, said
        assert on_server("stats", "--dsn", empty_database, "--json").json["agents"][0]["tail"] == 0
        assert (asyncio.run(index()) == before) is not owner
        # What is in the index already is much more than what comes.
        before = asyncio.run(index())
        some = f"(SELECT memory_id FROM elizasql.embeddings WHERE agent_id = '{agent}' LIMIT 12)"
        asyncio.run(
            as_admin(
                empty_database,
                "ANALYZE",
                f"UPDATE elizasql.embeddings SET indexed = FALSE WHERE memory_id IN {some}",
            )
        )
        assert on_server("index", "--dsn", address, "--json").json[0]["moved"] == 12
        assert asyncio.run(index()) == before
    finally:
        asyncio.run(as_admin(empty_database, f"DROP OWNED BY {role}", f"DROP ROLE {role}"))


def test_import_of_bad_files(on_server: Run, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    on_server("import", "text").fails(1, "no archive of elizasql")
    on_server("import", "missing").fails(1, "missing: No such file")
    on_server("import", ".").fails(1, "no archive of elizasql, or not a complete one")
    on_server("import").fails(2, "either an archive or --from")
    on_server("import", "text", "--from", "postgres://h/d").fails(2, "either an archive or --from")
    on_server("export", "-").fails(2, "standard output")
    on_server("export", "out", "--agent", uuid4()).fails(1, "there is no agent")
    on_server("export", "/proc/nothing/out").fails(1, "/proc/nothing")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text"]


def test_a_report_that_cannot_be_written_is_refused_at_once(
    on_server: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the first row to tell of would find it out, after hours."""
    text = tmp_path / "text"
    text.write_text("hello")
    for report in ("none/x", ".", "text/x"):
        on_server("import", text, "--report", report).fails(2, f"the report {re.escape(report)} cannot be written: ")
    on_server("import", text, "--report", "text").fails(1, "no archive of elizasql")
    on_server("import", text, "--report", "new").fails(1, "no archive of elizasql")
    on_server("import", text).fails(1, "no archive of elizasql")
    assert [path.name for path in tmp_path.iterdir()] == ["text"] and text.read_text() == "hello"
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    on_server("import", text).fails(2, r"the report elizasql-import-.*\.jsonl cannot be written: .*--report")


def test_index_moves_the_tail(on_server: Run, dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def remember(db: DatabaseAdapter) -> None:
        await db.ensure_embedding_dimension(384)
        await db.create_memories([{"content": {}, "embedding": v} for v in np.random.normal(size=(5, 384))], "facts")

    async def drop(*args: Any) -> bool:
        raise AssertionError("it may be ended at any time: nobody asked for an index to be built anew")

    agent = with_agent(dsn, remember)
    with monkeypatch.context() as patched:
        patched.setattr(data, "_REBUILD", 1)
        patched.setattr(Indexer, "drop", drop)
        assert on_server("index", "--agent", agent, "--json").json[0]["moved"] == 5
    assert re.search(rf"{agent}  Ada +0", on_server("index", "--agent", agent).out)
    assert on_server("index", "--agent", agent, "--rebuild", "--json").code == 0


def test_what_goes_over_all_vectors_has_more_time_than_from_a_program(
    on_server: Run, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who sees how far it is can end it himself; an hour would cut a million vectors off."""
    given: list[tuple[str, float]] = []

    def note(kind: type, name: str) -> None:
        real = getattr(kind, name)

        async def noted(*args: Any, **options: Any) -> Any:
            given.append((name, current_deadline(0.0) - time.monotonic()))
            return await real(*args, **options)

        monkeypatch.setattr(kind, name, noted)

    async def remember(db: DatabaseAdapter) -> None:
        await db.ensure_embedding_dimension(384)
        await db.create_memories([{"content": {}, "embedding": v} for v in np.random.normal(size=(5, 384))], "facts")

    agent = with_agent(dsn, remember)
    for kind, name in ((Indexer, "drain"), (Indexer, "build"), (DatabaseAdapter, "_look_at_move")):
        note(kind, name)
    assert on_server("index", "--agent", agent).code == 0
    assert on_server("index", "--agent", agent, "--rebuild").code == 0
    on_server("reembed", "--agent", agent, "--to", 512, "--with", "json:loads").fails(1, "have a vector and no text")
    assert on_server("reembed", "--agent", agent, "--abandon").code == 0
    assert {name for name, _ in given} == {"drain", "build", "_look_at_move"}
    assert min(left for _, left in given) > 86_400


def test_index_makes_a_lost_one_again_and_a_shared_one_once(
    run: Run, empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSTGRES_URL", empty_database)
    assert run("migrate", "up").code == 0
    admin = empty_database.replace("//elizasql@", "//postgres@")

    async def ask(query: str) -> Any:
        connection = await asyncpg.connect(admin)
        try:
            return await connection.fetchval(query)
        finally:
            await connection.close()

    async def remember(db: DatabaseAdapter) -> None:
        await db.ensure_embedding_dimension(384)
        await db.create_memories([{"content": {}, "embedding": v} for v in np.random.normal(size=(5, 384))], "facts")

    neighbours = asyncio.run(
        ask(
            """
            WITH made AS MATERIALIZED (SELECT gen_random_uuid() AS id FROM generate_series(1, 300))
            SELECT array_agg(id) FROM made WHERE elizasql.partition_of(id) = 'embeddings_p03'
            """
        )
    )
    for agent in neighbours[:2]:
        with_agent(empty_database, remember, UUID(bytes=agent.bytes))
    with_agent(empty_database, lambda db: db.ensure_embedding_dimension(384), UUID(bytes=neighbours[2].bytes))
    assert [row["moved"] for row in run("index", "--json").json] == [5, 5, 0]

    index = "embeddings_p03_dim_384_hnsw"
    asyncio.run(as_admin(empty_database, f"DROP INDEX elizasql.{index}"))
    assert [row["moved"] for row in run("index", "--json").json] == [0, 0, 0]
    assert asyncio.run(ask(f"SELECT to_regclass('elizasql.{index}')")) is not None

    # An event trigger counts what is built, whoever builds it.
    asyncio.run(
        as_admin(
            empty_database,
            "CREATE TABLE public.built (tag text)",
            "GRANT INSERT ON public.built TO elizasql",
            """
            CREATE FUNCTION public.note() RETURNS event_trigger LANGUAGE plpgsql
            AS 'BEGIN INSERT INTO public.built VALUES (tg_tag); END'
            """,
            "CREATE EVENT TRIGGER note ON ddl_command_end WHEN tag IN ('CREATE INDEX') EXECUTE FUNCTION public.note()",
        )
    )
    assert run("index", "--rebuild").code == 0
    assert asyncio.run(ask("SELECT count(*) FROM public.built")) == 1


def test_the_way_over_from_elizaos(on_server: Run, empty_database: str, tmp_path: Path) -> None:
    on_server("import", "--from", empty_database).fails(1, "no database of ElizaOS")
    on_server("import", "--from", f"postgres://a:{SECRET}@127.0.0.1:1/x").fails(
        3, "no connection to postgres://127.0.0.1:1/x: .*(refused|failed)"
    )
    on_server("import", "--from", f"postgres://a:{SECRET}/x@h/d").fails(2, "--from: .*is no address")
    on_server("import", "--from", "nowhere").fails(2, "neither a connection string nor the folder of a PGlite")
    # Where it has nothing to take over, it makes no place for that either.
    on_server("import", "--from", empty_database, "--data-dir", "new").fails(1, "no database of ElizaOS")
    assert not (tmp_path / "new").exists()

    agent, good, bad = uuid4(), uuid4(), uuid4()

    async def fill() -> None:
        connection = await asyncpg.connect(empty_database.replace("//elizasql@", "//postgres@"))
        await connection.execute(ELIZAOS_TABLES)
        await connection.execute("INSERT INTO agents (id, name) VALUES ($1, 'Old')", agent)
        for memory, value in ((good, 1), (bad, 0)):
            await connection.execute(
                "INSERT INTO memories (id, type, content, agent_id) VALUES ($1, 'facts', '{}', $2)", memory, agent
            )
            await connection.execute(
                "INSERT INTO embeddings (memory_id, dim_384) VALUES ($1, $2::text::vector)", memory, str([value] * 384)
            )
        await connection.close()

    asyncio.run(fill())
    admin = empty_database.replace("//elizasql@", "//postgres@")
    dry = on_server("import", "--from", admin, "--dry-run")
    assert dry.code == 0 and "nothing was written" in dry.out
    assert str(agent) not in {row["id"] for row in on_server("stats", "--json").json["agents"]}
    for path in tmp_path.glob("elizasql-import-*"):
        path.unlink()
    said = on_server("import", "--from", admin, "--report", "report.jsonl", "--json")
    assert said.code == 0, said
    tables = {row["table"]: row for row in said.json["tables"]}
    assert tables["memories"]["created"] == 2 and tables["embeddings"]["created"] == 1
    assert said.json["report"] == "report.jsonl"
    (line,) = (tmp_path / "report.jsonl").read_text().splitlines()
    assert json.loads(line)["row"]["memory_id"] == str(bad) and "zero vector" in json.loads(line)["problem"]
    text = on_server("import", "--from", admin, "--report", "report.jsonl").out
    assert "1 row could not be taken" in text and "see report.jsonl" in text
    if Path("/dev/full").exists():
        on_server("import", "--from", admin, "--report", "/dev/full").fails(1, "/dev/full: No space left")


def test_a_report_whose_reader_has_gone_is_a_failure(
    on_server: Run, empty_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is found out when the report's buffer is full, or when the report is closed."""
    agent = uuid4()
    asyncio.run(
        as_admin(
            empty_database,
            ELIZAOS_TABLES,
            f"INSERT INTO agents (id, name) VALUES ('{agent}', 'Old')",
            "CREATE TABLE bad AS SELECT gen_random_uuid() AS id FROM generate_series(1, 100)",
            f"INSERT INTO memories (id, type, content, agent_id) SELECT id, 'facts', '{{}}', '{agent}' FROM bad",
            "INSERT INTO embeddings (memory_id, dim_384) SELECT id, array_fill(0::real, ARRAY[384])::vector FROM bad",
        )
    )
    admin = empty_database.replace("//elizasql@", "//postgres@")
    os.mkfifo(tmp_path / "report")
    real = _report.open_private

    def open_and_leave(path: Path, mode: str) -> Any:
        reader = threading.Thread(target=lambda: path.open("rb").close())
        reader.start()
        file = real(path, mode)
        reader.join()
        return file

    monkeypatch.setattr(_report, "open_private", open_and_leave)
    on_server("import", "--from", admin, "--report", "report").fails(1, "^elizasql: report: Broken pipe")
    asyncio.run(as_admin(empty_database, "DELETE FROM embeddings WHERE memory_id NOT IN (TABLE bad LIMIT 1)"))
    on_server("import", "--from", admin, "--report", "report").fails(1, "^elizasql: report: Broken pipe")


def test_ctrl_c_in_an_import_says_how_to_go_on(
    on_server: Run, searched: tuple[UUID, UUID], empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert on_server("export", "out", "--agent", searched[0]).code == 0
    real = transfer_rows.put_lines

    async def interrupted(db: Any, table: str, *rest: Any) -> None:
        if table == "memories":
            raise KeyboardInterrupt
        await real(db, table, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("elizasql.transfer.importer.put_lines", interrupted)
        on_server("import", "out", "--dsn", empty_database).fails(130, "interrupted: .*do it again to go on")
    assert on_server("import", "out", "--dsn", empty_database).code == 0


def test_ctrl_c_in_a_rebuild_says_how_to_go_on(
    run: Run, searched: tuple[UUID, UUID], dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def interrupted(indexer: Indexer) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Indexer, "build", interrupted)
        said = run("index", "--rebuild", "--agent", searched[0], "--dsn", dsn)
        said.fails(130, "interrupted: .*an index in the making does not; do it again to go on")
    assert run("index", "--agent", searched[0], "--dsn", dsn).code == 0


def test_an_agent_that_is_not_there_is_an_error(on_server: Run, searched: tuple[UUID, UUID]) -> None:
    assert on_server("export", "out", "--agent", searched[0]).code == 0
    for command in (("import", "out", "--dry-run"), ("import", "out"), ("index",)):
        on_server(*command, "--agent", UUID(int=9)).fails(1, f"no agent {UUID(int=9)}")
    on_server("import", "out", "--dimension", 384).fails(2, "--dimension goes with --from")


def test_a_dry_run_tells_of_the_agents_that_are_meant(on_server: Run, searched: tuple[UUID, UUID], busy: UUID) -> None:
    assert on_server("export", "out", "--agent", searched[0], "--agent", busy).code == 0
    dry = on_server("import", "out", "--agent", searched[0], "--dry-run", "--json")
    assert [row["id"] for row in dry.json["agents"]] == [str(searched[0])]
    assert {row["table"]: row["rows"] for row in dry.json["tables"]} == {"agents": 1, "memories": 60, "embeddings": 60}


def test_an_import_that_ended_before_its_index_is_finished_by_the_next(
    on_server: Run, searched: tuple[UUID, UUID], empty_database: str
) -> None:
    assert on_server("export", "out", "--agent", searched[0]).code == 0
    assert on_server("import", "out", "--dsn", empty_database, "--no-index").code == 0
    assert on_server("stats", "--dsn", empty_database, "--json").json["agents"][0]["tail"] == 60
    assert on_server("import", "out", "--dsn", empty_database).code == 0
    assert on_server("stats", "--dsn", empty_database, "--json").json["agents"][0]["tail"] == 0


def test_backup_and_restore(run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    up = run("up", "--data-dir", folder, "--json")
    write(
        tmp_path / "shop",
        "20260101000000_a.sql",
        "CREATE TABLE things AS SELECT 7 AS id; COMMENT ON TABLE things IS 'mine';",
    )
    assert run("migrate", "up", "--dir", tmp_path / "shop", "--data-dir", folder).code == 0

    async def remember(db: DatabaseAdapter) -> None:
        await db.ensure_embedding_dimension(384)
        vectors = np.random.default_rng(4).normal(size=(20, 384))
        await db.create_memories([{"content": {}, "embedding": v, "unique": True} for v in vectors], "facts")
        await db.index_memories()

    agent = with_agent(up.json["dsn"], remember)
    said = run("backup", "b.dump", "--data-dir", folder, "--json")
    assert said.code == 0 and said.json["bytes"] == (tmp_path / "b.dump").stat().st_size
    assert stat.S_IMODE((tmp_path / "b.dump").stat().st_mode) == 0o600
    run("backup", "b.dump", "--data-dir", folder).fails(2, "there already")
    run("backup", "none/b.dump", "--data-dir", folder).fails(1, "none/b.dump: No such file")
    run("backup", "c.dump", "--data-dir", folder.parent / "none").fails(3, "no embedded server")
    with monkeypatch.context() as patch:
        patch.setenv("POSTGRES_URL", "postgres://h/d")
        patch.setenv("PGLITE_DATA_DIR", str(folder))
        run("backup", "c.dump").fails(2, "POSTGRES_URL names a server that is not embedded: .*--data-dir")
        assert run("backup", "c.dump", "--data-dir", folder).code == 0
    with monkeypatch.context() as patch:
        ends, sync = [], os.fsync

        def come(descriptor: int) -> None:
            sync(descriptor)
            (unfinished,) = tmp_path.glob(".d.dump.*.partial")
            ends.append(unfinished.read_bytes()[-8:])
            (tmp_path / "d.dump").write_text("mine")

        patch.setattr(os, "fsync", come)
        run("backup", "d.dump", "--data-dir", folder).fails(2, "d.dump is there by now")
        assert ends == [b"elizasql"] and (tmp_path / "d.dump").read_text() == "mine"
        assert not list(tmp_path.glob(".*"))
    run("restore", "b.dump", "--data-dir", folder).fails(2, "not empty")
    (tmp_path / "text").write_text("hello")
    run("restore", "text", "--data-dir", folder.parent / "two").fails(1, "no backup")
    (tmp_path / "half").write_bytes((tmp_path / "b.dump").read_bytes()[: said.json["bytes"] // 2])
    run("restore", "half", "--data-dir", folder.parent / "two").fails(1, "no whole backup")
    damaged = bytearray((tmp_path / "b.dump").read_bytes())
    damaged[100:2100] = bytes(2000)
    (tmp_path / "damaged").write_bytes(damaged)
    run("restore", "damaged", "--data-dir", folder.parent / "two").fails(1, "pg_restore failed")
    assert {path.name for path in folder.parent.iterdir()} == {"pg"}

    # A folder that is there is filled: a disk may be mounted there.
    two = folder.parent / "two"
    (two / "lost+found").mkdir(parents=True)
    place = two.stat().st_ino
    run("restore", "damaged", "--data-dir", two).fails(1, "pg_restore failed")
    assert [path.name for path in two.iterdir()] == ["lost+found"]
    if os.geteuid() == 0:  # for another user
        os.chown(two, *pwd.getpwnam("daemon")[2:4])
    assert run("restore", "b.dump", "--data-dir", two).code == 0
    assert {each.stat().st_uid for each in two.rglob("*") if each.name != "lost+found"} == {two.stat().st_uid}
    assert two.stat().st_ino == place and not list(two.glob(".*"))
    assert not cli_server.is_running(two)
    (row,) = run("stats", "--data-dir", two, "--json").json["agents"]
    assert row["id"] == str(agent) and row["embeddings"] == 20 and row["tail"] == 0
    assert run("doctor", "--data-dir", two, "--json").code == 0
    query = "SELECT id, obj_description('shop.things'::regclass) FROM shop.things"
    with process("psql", "--data-dir", two, "--", "-Atc", query, cwd=tmp_path) as psql:
        assert psql.communicate(timeout=60)[0] == "7|mine\n"


ROLES = """
CREATE ROLE shop NOLOGIN;
CREATE ROLE "The Reader" LOGIN PASSWORD 'secret' IN ROLE shop;
ALTER ROLE "The Reader" SET statement_timeout = '5s';
GRANT "The Reader" TO elizasql;
CREATE TABLE public.things AS SELECT 7 AS id;
ALTER TABLE public.things OWNER TO shop;
GRANT UPDATE ON public.things TO "The Reader";
"""

ASK_ROLES = """
SELECT
    pg_get_userbyid(relowner),
    has_table_privilege('The Reader', oid, 'UPDATE'),
    pg_has_role('elizasql', 'The Reader', 'USAGE'),
    (SELECT rolconfig::text || rolcanlogin FROM pg_roles WHERE rolname = 'The Reader'),
    (SELECT left(rolpassword, 5) FROM pg_authid WHERE rolname = 'The Reader')
FROM pg_class WHERE oid = 'public.things'::regclass
"""


@pytest.mark.slow
def test_a_backup_holds_the_roles(run: Run, folder: Path) -> None:
    """Those that the user has made: what belongs to them could not be restored without."""

    async def ask(place: Path, statement: str) -> list[Any]:
        connection = await asyncpg.connect(_embedded._Cluster(place).dsn("postgres"))
        try:
            return [list(row) for row in await connection.fetch(statement)]
        finally:
            await connection.close()

    two = folder.parent / "two"
    assert run("up", "--data-dir", folder).code == 0
    for statement in filter(str.strip, ROLES.split(";")):
        asyncio.run(ask(folder, statement))
    assert run("backup", "b.dump", "--data-dir", folder).code == 0
    said = run("restore", "b.dump", "--data-dir", two)
    assert said.code == 0, said
    assert run("up", "--data-dir", two).code == 0
    try:
        expected = [["shop", True, True, "{statement_timeout=5s}true", "SCRAM"]]
        assert asyncio.run(ask(folder, ASK_ROLES)) == asyncio.run(ask(two, ASK_ROLES)) == expected
    finally:
        assert run("down", "--data-dir", two).code == 0


EMBED = """
import asyncio
import numpy as np

calls = 0
width = 512

def embed(texts):
    assert all(isinstance(text, str) for text in texts)
    return [np.full(width, 1.0 + len(text)) for text in texts]

async def slowly(texts):
    return embed(texts)

class Model:
    def encode(self, texts):
        return embed(texts)

model = Model()

def narrow(texts):
    return [[1.0] * 384 for _ in texts]

def fails(texts):
    raise RuntimeError("the model is\\ngone")

def is_broken_off(texts):
    global calls
    calls += 1
    if calls == 3:  # the first is one text, to try
        raise KeyboardInterrupt
    return embed(texts)
"""


@pytest.fixture
def embedded(dsn: str, tmp_path: Path) -> UUID:
    """Give an agent with five vectors, and a module with functions that embed in the working folder."""

    async def remember(db: DatabaseAdapter) -> None:
        await db.ensure_embedding_dimension(384)
        vectors = np.random.default_rng(5).normal(size=(5, 384))
        rows = [{"content": {"text": f"fact {number}"}, "embedding": v} for number, v in enumerate(vectors)]
        await db.create_memories([{**row, "unique": True} for row in rows], "facts")

    return with_agent(dsn, remember)


@pytest.fixture
def embedding_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Give the name of a module in the working folder that embeds."""
    name = f"embeds_{uuid4().hex[:8]}"
    (tmp_path / f"{name}.py").write_text(EMBED)
    (tmp_path / f"{name}_broken.py").write_text("import a_module_that_is_not_there")
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield name
    for loaded in (name, f"{name}_broken"):
        sys.modules.pop(loaded, None)


@pytest.mark.parametrize("function", ["embed", "slowly", "model.encode"])
def test_reembed_moves_an_agent(on_server: Run, embedded: UUID, embedding_module: str, function: str) -> None:
    move = ("reembed", "--agent", embedded, "--to", 512, "--with", f"{embedding_module}:{function}")
    said = on_server(*move, "--json", "--batch-size", 2)
    assert (said.code, said.err) == (0, ""), said
    assert {name: value for name, value in said.json.items() if name != "seconds"} == {
        "agent_id": str(embedded),
        "dimension": 512,
        "embedded": 5,
        "skipped": [],
        "dropped": 5,
        "types": {"facts": 5},
    }
    said = on_server(*move)
    assert said.code == 0 and "facts" in said.out and "0 embedded" in said.out and "512 dimensions" in said.out
    (row,) = on_server("stats", "--agent", embedded, "--json").json["agents"]
    assert (row["dimension"], row["embeddings"], row["tail"]) == (512, 5, 0)


def test_reembed_on_bad_input_changes_nothing(on_server: Run, embedded: UUID, embedding_module: str) -> None:
    def move(function: str, *more: object, to: object = 512, agent: object = embedded) -> Said:
        return on_server("reembed", "--agent", agent, "--to", to, "--with", function, *more)

    good = f"{embedding_module}:embed"
    on_server("reembed", "--agent", embedded).fails(2, "give --to and --with, or --abandon")
    on_server("reembed", "--agent", embedded, "--to", 512).fails(2, "--with")
    move("embed").fails(2, "has not the form MODULE:FUNCTION")
    move(":embed").fails(2, "has not the form MODULE:FUNCTION")
    move("no_such_module_here:embed").fails(2, "no_such_module_here cannot be imported: ModuleNotFoundError")
    move(f"{embedding_module}_broken:embed").fails(2, "cannot be imported.*a_module_that_is_not_there")
    move(f"{embedding_module}:nothing").fails(2, "has no nothing")
    move(f"{embedding_module}:model.nothing").fails(2, "has no model.nothing")
    move(f"{embedding_module}:width").fails(2, "is not a function but int")
    move(good, to=500).fails(2, "to must be one of 384")
    move(good, to="x").fails(2, "--to")
    move(good, "--batch-size", 0).fails(2, "--batch-size")
    move(good, "--abandon").fails(2, "--abandon takes neither")
    move(good, agent="x").fails(2, "--agent must be a UUID")
    move(good, agent=uuid4()).fails(1, "there is no agent")
    move(f"{embedding_module}:narrow").fails(2, r"shape \(1, 384\) for 1 texts, not \(1, 512\)")
    move(f"{embedding_module}:fails").fails(1, f"{embedding_module}:fails: RuntimeError: the model is gone")
    said = on_server("reembed", "--agent", embedded, "--to", "512", "--with", f"{embedding_module}:fails", "--json")
    assert said.code == 1 and json.loads(said.err)["type"] == "ReembeddingError"
    (row,) = on_server("stats", "--agent", embedded, "--json").json["agents"]
    assert (row["dimension"], row["embeddings"]) == (384, 5)
    findings = on_server("doctor", "--json").json
    assert not any(each["check"] == "reembed" and str(embedded) in each["finding"] for each in findings)


def test_reembed_that_is_interrupted_goes_on(on_server: Run, embedded: UUID, embedding_module: str) -> None:
    move = ("reembed", "--agent", embedded, "--to", 512, "--batch-size", 2, "--json", "--with")
    said = on_server(*move, f"{embedding_module}:is_broken_off")
    assert said.code == 130 and "do it again to go on" in json.loads(said.err)["error"]
    (row,) = on_server("stats", "--agent", embedded, "--json").json["agents"]
    assert (row["dimension"], row["embeddings"]) == (384, 5)
    findings = on_server("doctor", "--json").json
    assert any(each["check"] == "reembed" and str(embedded) in each["finding"] for each in findings)
    other = ("reembed", "--agent", embedded, "--to", 768, "--with", f"{embedding_module}:embed")
    on_server(*other).fails(1, "from 384 to 512 dimensions.*abandon")
    said = on_server(*move, f"{embedding_module}:is_broken_off")
    assert said.code == 0 and said.json["embedded"] == 3, said
    abandon = ("reembed", "--agent", embedded, "--abandon")
    assert on_server(*abandon, "--json").json["dropped"] == 0
    assert "0 vectors dropped" in on_server(*abandon).out


def test_reembed_lists_what_has_no_text(on_server: Run, dsn: str, embedding_module: str) -> None:
    ids: list[UUID] = []

    async def remember(db: DatabaseAdapter) -> None:
        await db.ensure_embedding_dimension(384)
        ids.append(await db.create_memory({"content": {"url": "x"}, "embedding": np.ones(384)}, "facts"))

    agent = with_agent(dsn, remember)
    move = ("reembed", "--agent", agent, "--to", 512, "--with", f"{embedding_module}:embed")
    on_server(*move).fails(1, f"no text.*{ids[0]}.*skip_missing")
    said = on_server(*move, "--skip-missing")
    assert said.code == 0 and f"no text, no vector: {ids[0]}" in said.out and "1 skipped" in said.out
