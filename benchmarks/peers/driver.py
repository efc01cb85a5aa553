"""The driver of the peers: makes their environments, starts their processes, asks them, and judges what they find."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import IO, Any

import asyncpg
import numpy as np

from benchmarks import data

from .base import Knob, Place

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".benchmarks"
# Seconds between two looks at the memory of a process; a look takes some 50 us.
_LOOK = 0.05
_PACKAGE = Path(__file__).parents[1]
_START = "import sys; sys.path.append({folder!r}); from peers.worker import main; main({kind!r}, {option!r})"


@dataclass(frozen=True)
class Spec:
    """A peer: what it is called, what it needs, and how it is run.

    Attributes:
        name: In the results, and of its database.
        title: In tables.
        kind: `module:class` in this package, or a program for Node.
        packages: What pip, or npm, installs; nothing: it runs in this environment.
        option: What the class is to do in particular.
        how: How it was tuned.
        exact: It has no index, so there is nothing to tune.
        stores: Whether it has a database.
        like: Another peer's name, whose database it uses.
    """

    name: str
    title: str
    kind: str
    packages: tuple[str, ...] = ()
    option: str = ""
    how: str = ""
    exact: bool = False
    stores: bool = True
    like: str = ""

    @property
    def node(self) -> bool:
        """Whether it runs under Node."""
        return self.kind.endswith(".mjs")


_B_TREE = "b-tree on the agent, HNSW (m 16, ef_construction 64), as pgvector's README"

OURS = Spec(
    "elizasql",
    "elizasql",
    "on_elizasql:OnElizaSQL",
    option="off",
    how='resident="off", indexing="manual", inserts with unique=True, otherwise its defaults',
)
RESIDENT = Spec(
    "elizasql-resident",
    "elizasql, resident tier",
    "on_elizasql:OnElizaSQL",
    option="required",
    how='resident="required", the tier loaded; indexing="manual", inserts with unique=True',
    like="elizasql",
)
CHECKED = Spec(
    "elizasql-check",
    "elizasql, near-duplicate check",
    "on_elizasql:OnElizaSQL",
    option="check",
    how="inserts without unique, its default and the original's",
    like="elizasql",
)
ASYNCPG = Spec(
    "asyncpg",
    "asyncpg",
    "on_asyncpg:OnAsyncpg",
    ("asyncpg==0.32.0", "pgvector==0.5.1", "numpy"),
    how=f"its pool with its reset, prepared, binary, numpy; {_B_TREE}",
)
PSYCOPG = Spec(
    "psycopg",
    "psycopg 3",
    "on_psycopg:OnPsycopg",
    ("psycopg[binary,pool]==3.3.9", "pgvector==0.5.1", "numpy"),
    how=f"asynchronous pool, binary; {_B_TREE}",
)
BY_HAND = Spec(
    "by-hand",
    "by hand on asyncpg: a floor, no product",
    "on_asyncpg:ByHand",
    ("asyncpg==0.32.0", "numpy", "orjson"),
    how="what a careful hand writes for this task alone: a LIST partition for each agent, known beforehand; HNSW over "
    "halfvec (m 16, ef_construction 128, ef_search 100), generic plans, no reset of connections; no checks, retries, "
    "foreign keys or other filters",
)
PEERS = (
    ASYNCPG,
    Spec(
        "asyncpg-partitions",
        "asyncpg, partition per agent",
        "on_asyncpg:OnAsyncpg",
        ASYNCPG.packages,
        "partitions",
        "as asyncpg, LIST partition for each agent, what pgvector's README advises for filters of few values",
    ),
    BY_HAND,
    PSYCOPG,
    Spec(
        "sqlalchemy",
        "SQLAlchemy 2 + pgvector",
        "on_sqlalchemy:OnSQLAlchemy",
        ("sqlalchemy[asyncio]==2.1.9", "asyncpg==0.32.0", "pgvector==0.5.1", "numpy"),
        how=f"ORM, asyncpg; {_B_TREE}",
    ),
    Spec(
        "langchain",
        "langchain-postgres PGVectorStore",
        "on_langchain:OnLangChain",
        ("langchain-postgres==0.0.19", "numpy"),
        how="metadata column for the agent, HNSWIndex(), engine of the running loop",
    ),
    Spec(
        "langgraph",
        "langgraph AsyncPostgresStore",
        "on_langgraph:OnLangGraph",
        ("langgraph-checkpoint-postgres==3.2.0", "psycopg[binary,pool]", "numpy"),
        how="namespace for each agent, pool, HNSW by setup()",
    ),
    Spec(
        "llama-index",
        "llama-index PGVectorStore",
        "on_llama_index:OnLlamaIndex",
        ("llama-index-vector-stores-postgres==0.9.0", "numpy"),
        how="jsonb, indexed metadata key, hnsw_kwargs with cosine",
    ),
    Spec(
        "mem0",
        "mem0 pgvector store",
        "on_mem0:OnMem0",
        ("mem0ai==2.2.1", "psycopg[binary,pool]", "numpy"),
        how="hnsw=True, payload key for the agent",
    ),
    Spec(
        "agno",
        "agno PgVector",
        "on_agno:OnAgno",
        ("agno==3.1.10", "sqlalchemy", "psycopg[binary]", "pgvector", "numpy"),
        how="user_id for the agent (b-tree), HNSW by hand since optimize() fails",
    ),
    Spec(
        "vecs",
        "vecs",
        "on_vecs:OnVecs",
        ("vecs==0.4.5", "numpy"),
        how="create_index(hnsw, cosine), metadata key for the agent; the pool of its client, which takes none: 5 to 15",
    ),
    Spec(
        "elizaos",
        "@elizaos/plugin-sql",
        "on_elizaos.mjs",
        ("@elizaos/plugin-sql@1.7.2",),
        how="the same PostgreSQL; has no index to tune; rows loaded into its tables; inserts with unique",
        exact=True,
    ),
    Spec(
        "elizaos-pglite",
        "@elizaos/plugin-sql on PGlite",
        "on_elizaos.mjs",
        ("@elizaos/plugin-sql@1.7.2",),
        "pglite",
        "its embedded default; has no index to tune; inserts with unique",
        exact=True,
        stores=False,
    ),
)
ELIZAOS_CHECKED = Spec(
    "elizaos-check",
    "@elizaos/plugin-sql, near-duplicate check",
    "on_elizaos.mjs",
    ("@elizaos/plugin-sql@1.7.2",),
    "check",
    "inserts without unique, its default",
    exact=True,
    like="elizaos",
)
IN_PROCESS = (
    Spec("numpy", "numpy, in the process", "in_process:Numpy", how="exact, no database", exact=True, stores=False),
    Spec(
        "usearch",
        "usearch HNSW, in the process",
        "in_process:USearch",
        ("usearch==2.26.6", "numpy"),
        how="an index for each agent, m 16, ef 128/100, no database",
        exact=True,
        stores=False,
    ),
)


class PeerError(Exception):
    """A peer could not be installed, started, or asked; says why."""


# --- environments ----------------------------------------------------------------------------------------------------


def environment(spec: Spec) -> list[str]:
    """Make the environment of a peer where there is none; give the command that starts its process."""
    if spec.node:
        return _node(spec)
    start = _START.format(folder=str(_PACKAGE), kind=spec.kind, option=spec.option)
    if not spec.packages:
        return [sys.executable, "-c", start]
    folder = CACHE / "venvs" / f"{spec.packages[0].split('=')[0].split('[')[0]}-{_mark(spec)}"
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        _install([sys.executable, "-m", "venv", str(folder)])
        _install([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *spec.packages])
        (folder / "installed").touch()
    return [str(python), "-c", start]


def make_environments(specs: Iterable[Spec]) -> None:
    """Make those that are missing, two at a time; of one that cannot be made is told when its peer is started."""

    def make(spec: Spec) -> None:
        with suppress(PeerError):
            environment(spec)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(make, {spec.packages: spec for spec in specs if spec.packages}.values()))


def _node(spec: Spec) -> list[str]:
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        raise PeerError("needs node and npm, which are not there")
    folder = CACHE / "node" / _mark(spec)
    if not (folder / "installed").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "package.json").write_text('{"private": true, "type": "module"}')
        _install([npm, "install", "--no-audit", "--no-fund", *spec.packages], folder)
        (folder / "installed").touch()
    return [node, str(Path(__file__).parent / spec.kind), str(folder), spec.option]


def _mark(spec: Spec) -> str:
    return hashlib.sha256(f"{sys.version_info[:2]} {sorted(spec.packages)}".encode()).hexdigest()[:8]


def _install(command: Sequence[str], folder: Path | None = None) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900, check=False)
    except subprocess.TimeoutExpired as error:
        raise PeerError("its installation took longer than 15 minutes") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise PeerError(f"cannot be installed: {' / '.join(said[-3:])[:400]}")


# --- processes -------------------------------------------------------------------------------------------------------


class Process:
    """The process of a peer. Every request may raise PeerError.

    Args:
        spec: Which.
        logs: Folder for what it prints.

    Attributes:
        peak: The most memory of its own that it was seen to have, in bytes; 0 where the system does not tell.
    """

    def __init__(self, spec: Spec, logs: Path) -> None:
        command = environment(spec)
        self.spec = spec
        self.peak = 0
        logs.mkdir(parents=True, exist_ok=True)
        self._log = (logs / f"{spec.name}.log").open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=_environment_variables(),
        )

    def ask(self, do: str, *, limit: float = 1800.0, **given: Any) -> dict[str, Any]:
        """Send a request and wait for the answer.

        Args:
            do: Its name, see worker.py.
            limit: Seconds after which the process is ended.
            given: Its arguments.
        """
        stdin, stdout = self._pipes
        answered = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(answered, limit))
        watcher.start()
        try:
            stdin.write(json.dumps({"do": do, **given}) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            answered.set()
            watcher.join()
        if not line:
            raise PeerError(f"its process ended during {do!r}: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{do}: {answer['error']}"[:600])
        return answer

    @property
    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        return self._process.stdin, self._process.stdout

    def _watch(self, answered: threading.Event, limit: float) -> None:
        """Look at its memory until it has answered, and end it when that takes too long."""
        latest = perf_counter() + limit
        while True:
            self.peak = max(self.peak, self.memory or 0)
            if answered.wait(_LOOK):
                self.peak = max(self.peak, self.memory or 0)
                return
            if perf_counter() > latest:
                self._process.kill()

    @property
    def memory(self) -> int | None:
        """The memory that it has of its own, in bytes; None where the system does not tell."""
        try:
            lines = Path(f"/proc/{self._process.pid}/status").read_text(encoding="utf-8").splitlines()
        except OSError:
            return None
        anonymous = [int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")]
        return anonymous[0] if anonymous else None

    def _last_words(self) -> str:
        self._log.flush()
        said = Path(self._log.name).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return " / ".join(said[-3:])[:400] or f"exit {self._process.poll()}"

    def end(self) -> None:
        """Close it, or end it when it does not close."""
        with suppress(PeerError):
            if self._process.poll() is None:
                self.ask("close", limit=30)
        for pipe in self._pipes:
            with suppress(BrokenPipeError):
                pipe.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def _environment_variables() -> dict[str, str]:
    """Give what a peer may see of ours: no settings of elizasql's, of Python's path or of the database."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ELIZASQL", "PYTHON", "PG", "POSTGRES"))
    }
    return kept | {"LOG_LEVEL": "error", "TOKENIZERS_PARALLELISM": "false"}


# --- what is stored --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What every peer is given, as files that every language reads; and what is right.

    Attributes:
        folder: Of vectors.f32, queries.f32, agents.i32 and rooms.i32.
        source: Where the vectors come from.
        loaded: So many rows are stored at the beginning; the others are there to be inserted later.
        vectors, queries: float32[n, width].
        agents: int32[n], whose a row is.
        members: The rows of each agent that are loaded.
        roommates: Those of them that are in the smaller of its two rooms.
    """

    folder: Path
    source: str
    loaded: int
    vectors: data.Floats
    queries: data.Floats
    agents: Any
    members: dict[int, Any]
    roommates: dict[int, Any]

    @cached_property
    def _exact(self) -> list[dict[int, data.Exact]]:
        both = self.members, self.roommates
        return [{agent: data.Exact(self.vectors[mine]) for agent, mine in each.items()} for each in both]

    @property
    def width(self) -> int:
        """The dimension."""
        return int(self.vectors.shape[1])

    def recall(self, query: int, agent: int, found: Sequence[int], *, room: bool = False) -> float:
        """Compare with an exact search in what was loaded, or in a room; what is not of it counts for nothing."""
        mine = (self.roommates if room else self.members)[agent]
        place = np.searchsorted(mine, found)
        known = {int(p) for p, row in zip(place, found, strict=True) if p < len(mine) and mine[p] == row}
        return self._exact[room][agent].recall(self.queries[query], sorted(known))


def make_task(folder: Path, loaded: int, extra: int, agents: int, queries: int) -> Task:
    """Write the files. What is to be inserted later are other agents' vectors: of the same kind, and new to the agent.

    Args:
        folder: For the files.
        loaded: Rows to load, dealt to the agents.
        extra: Rows to insert later: the first half is dealt to the agents, the second half is all of agent 0.
        agents: So many.
        queries: So many.
    """
    given = data.load(loaded, queries)
    random = np.random.default_rng(11)
    owner = np.arange(loaded, dtype=np.int32) % agents
    again = random.permutation(loaded)[:extra]
    again = np.resize(again, extra)
    later = (owner[again] + 1) % max(agents, 1)
    half = extra // 2
    later[half:] = 0
    vectors = np.concatenate([given.vectors, given.vectors[again]])
    everyone = np.concatenate([owner, later.astype(np.int32)])
    folder.mkdir(parents=True, exist_ok=True)
    vectors.tofile(folder / "vectors.f32")
    given.queries.tofile(folder / "queries.f32")
    everyone.tofile(folder / "agents.i32")
    room = np.zeros(len(vectors), np.int32)
    room[:loaded] = np.arange(loaded) // agents % 10 == 0
    room.tofile(folder / "rooms.i32")
    members = {agent: np.flatnonzero(owner == agent) for agent in range(agents)}
    roommates = {agent: mine[room[mine] == 1] for agent, mine in members.items()}
    return Task(folder, given.source, loaded, vectors, given.queries, everyone, members, roommates)


# --- the server ------------------------------------------------------------------------------------------------------

_HNSW = """
SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid) FROM pg_index
WHERE pg_get_indexdef(indexrelid) ~ 'USING hnsw'
"""

_TABLES = """
SELECT oid::regclass::text FROM pg_class
WHERE relkind = 'r' AND relnamespace::regnamespace::text NOT IN ('pg_catalog', 'information_schema')
"""


@dataclass(frozen=True)
class Server:
    """The one server, on which each peer has a database of its own.

    Attributes:
        place: The database of the administrator.
        user: Who owns the peers' databases.
    """

    place: Place
    user: str

    async def admin(self, database: str | None = None) -> asyncpg.Connection[Any]:
        """Connect as the administrator."""
        return await asyncpg.connect(
            host=self.place.host,
            port=self.place.port,
            user=self.place.user,
            password=self.place.password or None,
            database=database or self.place.database,
        )

    def of(self, spec: Spec) -> Place:
        """Give a peer's place."""
        name = "bench_" + (spec.like or spec.name).replace("-", "_")
        return Place(self.place.host, self.place.port, self.user, self.place.password, name)

    async def create(self, spec: Spec) -> Place:
        """Make a peer's database anew, with pgvector."""
        place = self.of(spec)
        connection = await self.admin()
        try:
            await connection.execute(f'DROP DATABASE IF EXISTS "{place.database}" WITH (FORCE)')
            await connection.execute(f'CREATE DATABASE "{place.database}" OWNER "{self.user}"')
        finally:
            await connection.close()
        connection = await self.admin(place.database)
        try:
            await connection.execute("CREATE EXTENSION vector")
        finally:
            await connection.close()
        return place

    async def turn(self, spec: Spec, knob: Knob) -> None:
        """Set for a peer's database how widely HNSW searches; new connections have it."""
        connection = await self.admin()
        try:
            values = {"hnsw.ef_search": knob.ef_search, "hnsw.iterative_scan": knob.iterative}
            for name, value in values.items():
                change = f"RESET {name}" if value is None else f"SET {name} = '{value}'"
                await connection.execute(f'ALTER DATABASE "{self.of(spec).database}" {change}')
        finally:
            await connection.close()

    async def drop_hnsw(self, spec: Spec) -> list[str]:
        """Drop a peer's HNSW indexes before a load, as one does; give what makes them again."""
        connection = await self.admin(self.of(spec).database)
        try:
            found = await connection.fetch(_HNSW)
            for name, _ in found:
                await connection.execute(f"DROP INDEX {name}")
            return [definition for _, definition in found]
        finally:
            await connection.close()

    async def run(self, spec: Spec, statements: Iterable[str]) -> None:
        """Run statements in a peer's database."""
        connection = await self.admin(self.of(spec).database)
        try:
            for statement in statements:
                await connection.execute(statement, timeout=3600)
        finally:
            await connection.close()

    async def count(self, spec: Spec) -> int:
        """Count the rows of all tables in a peer's database."""
        connection = await self.admin(self.of(spec).database)
        try:
            tables = await connection.fetch(_TABLES)
            return sum([await connection.fetchval(f"SELECT count(*) FROM {name}") for (name,) in tables])
        finally:
            await connection.close()

    async def size(self, spec: Spec) -> int:
        """Give the bytes of a peer's database."""
        connection = await self.admin()
        try:
            size: int = await connection.fetchval("SELECT pg_database_size($1)", self.of(spec).database)
            return size
        finally:
            await connection.close()


def as_request(place: Place, folder: Path) -> dict[str, Any]:
    """Write a place for the protocol; PGlite's is a folder."""
    return asdict(place) | {"folder": str(folder)}
