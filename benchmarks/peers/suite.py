"""What the peers are asked, in which order, and what is kept of it.

All peers are loaded with the same rows, each into its own database of one server. Then they take turns in blocks, in
another order every round, so that whatever disturbs one disturbs all. While one works the others' processes wait.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import statistics
import subprocess
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

import asyncpg
import numpy as np

import elizasql
from benchmarks import data
from benchmarks.report import keep, machine, percentile
from elizasql import Config, _embedded, _pool

from . import driver
from .base import Knob, Place, agent_id
from .driver import CACHE, OURS, RESIDENT, PeerError, Process, Server, Spec, Task

T = TypeVar("T")

# The peers' ways to find more; pgvector's README has both settings.
KNOBS = tuple(Knob(ef_search, "relaxed_order") for ef_search in (100, 400, 40, 200))
# Ours, for the curve alone.
OUR_KNOBS = tuple(Knob(ef_search) for ef_search in (40, 200, 60, 400))
CALLERS = (1, 4, 16, 64)
# Batches that a quick peer stores in a turn, at most.
AT_ONCE = 4
# What stands before the names of those that grow.
_GROWTH = "growth-"


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        rows: Memories of all agents together.
        agents: So many.
        block, rounds: Searches of a peer in a turn, and turns.
        warmup: Searches before each turn that are not counted.
        inserts: Single inserts of a peer, in as many turns.
        batch, batches: Rows in a batch, and turns in which a peer stores one, or several quick ones.
        work: Calls of a mixed run, at most.
        knobs: How many of KNOBS.
        callers: Numbers of callers at once.
        growth: Numbers of rows of a single agent; none: not measured.
    """

    rows: int
    agents: int
    block: int
    rounds: int
    warmup: int
    inserts: int
    batch: int
    batches: int
    work: int
    knobs: int = len(KNOBS)
    callers: tuple[int, ...] = CALLERS
    growth: tuple[int, ...] = ()

    @classmethod
    def of(cls, rows: int) -> Sizes:
        """Choose the sizes for a number of memories."""
        if rows >= 20_000:
            largest = int(os.environ.get("ELIZASQL_BENCH_GROWTH") or rows)
            growth = tuple(sorted({rows // 100, rows // 10, rows, largest}))
            return cls(rows, 10, 40, 5, 10, 200, 1000, 3, 320, growth=growth)
        return cls(rows, 10, 10, 5, 3, 30, 300, 1, 120, 2, (1, 16), (rows // 10, rows))

    @classmethod
    def tiny(cls, rows: int) -> Sizes:
        """Choose sizes that tell nothing and take a second."""
        return cls(rows, 3, 4, 2, 1, 4, 20, 1, 10, 2, (1, 4), (rows // 10, rows // 2))


class Suite:
    """One run: the server, the processes of the peers, and what they did.

    Args:
        specs: The peers; elizasql's own are among them.
        sizes: How much.
        run: Runs a coroutine.
        say: Tells how far it is.

    Attributes:
        results: What is kept as JSON.
    """

    def __init__(
        self, specs: Sequence[Spec], sizes: Sizes, run: Callable[[Awaitable[Any]], Any], say: Callable[[str], None]
    ) -> None:
        self.specs = list(specs)
        self.sizes = sizes
        self._run = run
        self._say = say
        self._begun = perf_counter()
        self._order = random.Random(0)
        self.folder = Path(tempfile.mkdtemp(prefix="esql-"))
        self.processes: dict[str, Process] = {}
        # By database: the rows of all tables before what is written, and the memories that were sent.
        self._counted: dict[str, int] = {}
        self._sent: Counter[str] = Counter()
        self._embedded: Any = None
        self.server: Server
        self.task: Task
        self.results: dict[str, Any] = {
            "setup": machine() | {"rows": sizes.rows, "agents": sizes.agents},
            "peers": {},
            "limits": {},
            "growth": [],
            "progress": [],
        }

    def _tell(self, text: str) -> None:
        now = perf_counter() - self._begun
        self.results["progress"].append([round(now, 1), text])
        self._say(f"[{now:6.1f} s] {text}")

    # --- beginning and end -------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Start the server, and load every peer that can be installed and started."""
        self.server = self._run(self._start())
        sizes = self.sizes
        extra = 2 * max(sizes.inserts * 3 + sizes.work, sizes.batch * (1 + sizes.batches) * AT_ONCE)
        queries = max(100, self.sizes.block * self.sizes.rounds + self.sizes.warmup)
        self.task = driver.make_task(
            self.folder / "task", self.sizes.rows, extra, self.sizes.agents, min(queries, 1000)
        )
        self.results["setup"] |= {"source": self.task.source, "queries": len(self.task.queries)}
        driver.make_environments(self.specs)
        for spec in self.specs:
            self.results["peers"][spec.name] = {"title": spec.title, "how": spec.how, "failed": None, "points": []}
            self._guard(spec, lambda spec=spec: self._load(spec))  # type: ignore[misc]

    def close(self) -> None:
        """End the processes and the server, and remove everything but the results."""
        for process in self.processes.values():
            process.end()
        if self._embedded is not None:
            self._run(self._embedded.release())
        shutil.rmtree(self.folder, ignore_errors=True)

    async def _start(self) -> Server:
        """Start an embedded server, with more room than a guest takes, since a dozen databases share it."""
        given = os.environ.get("ELIZASQL_TEST_URL")
        if given:
            place = _place(given)
            return Server(place, place.user)
        home = self.folder / "pg"
        server = await _embedded.acquire(home)
        admin = Server(replace(_place(server.dsn), user="postgres"), "elizasql")
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
        connection = await admin.admin()
        try:
            for setting in (
                f"shared_buffers = '{min(memory // 4, 6144)}MB'",
                f"maintenance_work_mem = '{min(memory // 16, 1024)}MB'",
                "dynamic_shared_memory_type = 'sysv'",
                "max_wal_size = '8GB'",
                "checkpoint_timeout = '1h'",  # each database has one after loading; later it would disturb at random
                "max_connections = 400",
                "autovacuum = off",  # likewise
            ):
                await connection.execute(f"ALTER SYSTEM SET {setting}")
        finally:
            await connection.close()
        await server.release()
        self._embedded = await _embedded.acquire(home)
        connection = await admin.admin()
        try:
            self.results["setup"]["server"] = await connection.fetchval("SELECT version()")
            version = "SELECT default_version FROM pg_available_extensions WHERE name = 'vector'"
            self.results["setup"]["pgvector"] = await connection.fetchval(version)
            self.results["setup"]["shared_buffers"] = await connection.fetchval("SHOW shared_buffers")
        finally:
            await connection.close()
        return admin

    def _guard(self, spec: Spec, call: Callable[[], T]) -> T | None:
        """Do something with a peer; when it fails, note why and leave the peer out from then on. Ours may not fail."""
        try:
            return call()
        except (PeerError, asyncpg.PostgresError) as error:
            self._tell(f"{spec.title}: {error}")
            name = spec.name.removeprefix(_GROWTH)
            self.results["peers"][name]["failed"] = f"growth: {error}" if name != spec.name else str(error)
            process = self.processes.pop(spec.name, None)
            if process is not None:
                process.end()
            if _is_ours(name):
                raise
            return None

    def start(self, spec: Spec, task: Task | None = None) -> Process:
        """Start a peer's process and let it connect."""
        task = task or self.task
        process = Process(spec, self.folder / "logs")
        place = driver.as_request(self.server.of(spec), self.folder / "pglite")
        try:
            opened = process.ask("open", place=place, folder=str(task.folder), width=task.width)
        except PeerError:
            process.end()
            raise
        if spec.name in self.results["peers"]:
            self.results["peers"][spec.name] |= {"versions": opened["versions"], "runtime": opened["python"]}
        return process

    def _load(self, spec: Spec) -> None:
        if spec.like:
            if spec.like not in self.processes:
                raise PeerError(f"needs {spec.like}, which could not be loaded")
            self.processes[spec.name] = process = self.start(spec)
            if spec is RESIDENT:
                # The first search of each agent loads its tier.
                asked = [(0, agent) for agent in range(self.sizes.agents)]
                first = process.ask("search", asked=asked, warmup=0)["seconds"]
                self.results["peers"][spec.name]["cold"] = first
            return
        if spec.stores:
            self._run(self.server.create(spec))
        self.processes[spec.name] = process = self.start(spec)
        # Some make their tables at the first write; the HNSW index of whoever has one by then is built after loading.
        first = min(10, self.task.loaded) if spec.stores and spec.name != OURS.name else 0
        if first:
            process.ask("load", first=0, last=first)
        indexes = self._run(self.server.drop_hnsw(spec)) if first else []
        loaded = process.ask("load", first=first, last=self.task.loaded)
        seconds = loaded["seconds"]
        begun = perf_counter()
        process.ask("index")
        if indexes:
            self._run(self.server.run(spec, indexes))
        indexing = perf_counter() - begun
        if spec.stores:
            self._run(self.server.run(spec, ["VACUUM (ANALYZE)", "CHECKPOINT"]))
        kept = self.results["peers"][spec.name]
        kept["load"] = {
            "seconds": seconds,
            "index_seconds": indexing,
            "rows": self.task.loaded,
            "by_itself": loaded["by_itself"],
        }
        kept["bytes"] = self._run(self.server.size(spec)) if spec.stores else loaded.get("bytes")
        rate = self.task.loaded / (seconds + indexing)
        self._tell(f"{spec.title}: loaded in {seconds:.1f} s, indexed in {indexing:.1f} s, {rate:,.0f} rows/s")

    # --- turns -------------------------------------------------------------------------------------------------------

    def alive(self, *, stores: bool = True, all_kinds: bool = False) -> list[Spec]:
        """Give the peers that still take part."""
        specs = [spec for spec in self.specs if spec.name in self.processes]
        return [spec for spec in specs if all_kinds or not spec.name.endswith("-check") or not stores]

    def turns(self, specs: Sequence[Spec], rounds: int, turn: Callable[[Spec, int], None]) -> None:
        """Give every peer a turn in every round; the order is drawn anew each time, from a seed that never changes."""
        for number in range(rounds):
            for spec in self._order.sample(list(specs), len(specs)):
                if spec.name in self.processes:
                    self._guard(spec, lambda spec=spec, number=number: turn(spec, number))  # type: ignore[misc]

    def knob(self, spec: Spec, knob: Knob) -> None:
        """Turn a peer's knob; the database's settings are turned for those that have no parameter of their own."""
        if spec.stores and not _is_ours(spec.name):
            self._run(self.server.turn(spec, knob))
        self.processes[spec.name].ask("knob", ef_search=knob.ef_search, iterative=knob.iterative)

    def search(self, specs: Sequence[Spec], label: Callable[[Spec], str]) -> None:
        """Let peers search in turns; each gets a point: recall and latency."""
        seconds: dict[str, list[float]] = {spec.name: [] for spec in specs}
        recalls: dict[str, list[float]] = {spec.name: [] for spec in specs}
        short: dict[str, int] = {spec.name: 0 for spec in specs}
        medians: dict[str, list[float]] = {spec.name: [] for spec in specs}
        block, warmup, agents = self.sizes.block, self.sizes.warmup, self.sizes.agents

        def turn(spec: Spec, number: int) -> None:
            # What is slow by far is asked less: its median is known as well with a quarter.
            size = max(4, block // 4) if spec.exact and self.sizes.rows >= 20_000 and "elizaos" in spec.name else block
            first = number * block
            queries = [(first + n) % len(self.task.queries) for n in range(size)]
            before = [(first + n) % len(self.task.queries) for n in range(-min(warmup, size), 0)]
            asked = [(query, query % agents) for query in before + queries]
            answer = self.processes[spec.name].ask("search", asked=asked, warmup=len(before))
            seconds[spec.name] += answer["seconds"]
            medians[spec.name].append(statistics.median(answer["seconds"]))
            for query, found in zip(queries, answer["found"], strict=True):
                recalls[spec.name].append(self.task.recall(query, query % agents, found))
                wanted = min(10, len(self.task.members[query % agents]))
                short[spec.name] += len(set(found)) < wanted

        self.turns(specs, self.sizes.rounds, turn)
        for spec in specs:
            if spec.name in self.processes and seconds[spec.name]:
                times = seconds[spec.name]
                self.results["peers"][spec.name]["points"].append(
                    {
                        "label": label(spec),
                        "recall": float(np.mean(recalls[spec.name])),
                        "short": short[spec.name],
                        "searches": len(times),
                        "p50": statistics.median(times),
                        "p95": percentile(times, 0.95),
                        "medians": medians[spec.name],
                        # Of the blocks' medians, so that it tells how steady the machine was.
                        "spread": [percentile(medians[spec.name], 0.25), percentile(medians[spec.name], 0.75)],
                        "seconds": [round(each, 7) for each in times],
                    }
                )

    # --- what is measured --------------------------------------------------------------------------------------------

    def search_points(self) -> None:
        """Search with every peer as its documentation has it, then with its knob turned further and further."""
        self._tell("search, as documented")
        self.search(
            [spec for spec in self.alive() if not spec.like or spec.name.endswith("resident")],
            lambda _: "as documented",
        )
        for number, knob in enumerate(KNOBS[: self.sizes.knobs]):
            self._tell(f"search, ef_search {knob.ef_search}, iterative scan")
            ours = OUR_KNOBS[number]
            chosen = [spec for spec in self.alive() if not spec.exact and not spec.like]
            for spec in chosen:
                own = ours if spec is OURS else knob
                self._guard(spec, lambda spec=spec, own=own: self.knob(spec, own))  # type: ignore[misc]
            self.search(
                [spec for spec in chosen if spec.name in self.processes],
                lambda spec, knob=knob, ours=ours: (  # type: ignore[misc]
                    f"ef {ours.ef_search}" if spec is OURS else f"ef {knob.ef_search}, iterative"
                ),
            )
        self.results["setup"]["load after the searches"] = _load()

    def settle(self) -> dict[str, dict[str, Any]]:
        """Set every peer to its fastest point with at least our recall, else to its best; give the points.

        Then they search in turns once more, so that the ratios at equal recall are of one stretch of time.
        """
        ours = self.results["peers"][OURS.name]["points"][0]["recall"]
        chosen: dict[str, str] = {}
        for spec in self.alive():
            points = self.results["peers"][spec.name]["points"]
            if not points or spec.exact or spec.like:
                continue
            enough = [point for point in points if point["recall"] >= ours - 0.002]
            best = min(enough, key=lambda point: point["p50"]) if enough else max(points, key=lambda p: p["recall"])
            if spec is OURS:
                best = points[0]
            number = points.index(best)
            chosen[spec.name] = best["label"]
            knob = Knob() if number == 0 else (OUR_KNOBS if spec is OURS else KNOBS)[number - 1]
            self._guard(spec, lambda spec=spec, knob=knob: self.knob(spec, knob))  # type: ignore[misc]
        self._tell("search, at equal recall")
        before = {name: len(kept["points"]) for name, kept in self.results["peers"].items()}
        self.search(
            [spec for spec in self.alive() if not spec.like or spec.name.endswith("resident")],
            lambda spec: chosen.get(spec.name, "as documented"),
        )
        equal = {}
        for name, kept in self.results["peers"].items():
            if len(kept["points"]) > before[name]:
                kept["equal"] = kept["points"].pop()
                kept["equal"]["enough"] = kept["equal"]["recall"] >= ours - 0.004
                equal[name] = kept["equal"]
        for spec in self.alive(all_kinds=True, stores=False):
            self.results["peers"][spec.name]["memory"] = self.processes[spec.name].memory
        return equal

    def rooms(self) -> None:
        """Search in a room with a tenth of an agent's memories: ours and the original, which know rooms."""
        self._tell("search in a room")
        specs = [spec for spec in self.alive() if spec.name in (OURS.name, RESIDENT.name, "elizaos")]
        agents, block = self.sizes.agents, self.sizes.block

        def turn(spec: Spec, number: int) -> None:
            asked = [((number * block + n) % len(self.task.queries), n % agents) for n in range(-agents, block)]
            answer = self.processes[spec.name].ask("search", asked=asked, warmup=agents, room=True)
            nothing: dict[str, Any] = {"seconds": [], "medians": [], "recalls": [], "short": 0}
            kept = self.results["peers"][spec.name].setdefault("room", nothing)
            kept["seconds"] += answer["seconds"]
            kept["medians"].append(statistics.median(answer["seconds"]))
            for (query, agent), found in zip(asked[agents:], answer["found"], strict=True):
                kept["recalls"].append(self.task.recall(query, agent, found, room=True))
                kept["short"] += len(set(found)) < min(10, len(self.task.roommates[agent]))

        self.turns(specs, self.sizes.rounds, turn)
        self.results["setup"]["room"] = len(self.task.roommates[0])

    def _work(self, spec: Spec) -> int:
        """Give the calls of a mixed run: those that take one and a half seconds one by one, `work` at most."""
        alone = self.results["peers"][spec.name]["equal"]["p50"]
        return min(self.sizes.work, max(20, int(1.5 / alone)))

    def concurrency(self) -> None:
        """Search with 1 to 64 callers at once."""
        specs = [spec for spec in self.alive() if spec.stores or "pglite" in spec.name]
        for callers in self.sizes.callers:
            self._tell(f"search with {callers} callers")

            def turn(spec: Spec, number: int, callers: int = callers) -> None:
                count = max(callers, self._work(spec))
                queries = [(number * count + n) % len(self.task.queries) for n in range(count)]
                asked = [(query, query % self.sizes.agents) for query in queries]
                answer = self.processes[spec.name].ask("mixed", asked=asked, rows=[], callers=callers)
                kept = self.results["peers"][spec.name].setdefault("concurrency", {})
                kept.setdefault(str(callers), []).append(
                    {
                        "rate": count / answer["total"],
                        "p95": percentile(answer["searches"], 0.95),
                        "fewest": answer["fewest"],
                    }
                )

            self.turns(specs, 2, turn)

    def writes(self) -> None:
        """Single inserts and batches, with everything that was loaded indexed."""
        specs = self.alive(all_kinds=True, stores=False)
        specs = [spec for spec in specs if spec.stores or "pglite" in spec.name]
        for spec in specs:
            self._guard(spec, lambda spec=spec: self._count(spec))  # type: ignore[misc]
        start, sizes = self.task.loaded, self.sizes
        rounds = 10 if sizes.inserts >= 100 else 2
        each = sizes.inserts // rounds
        self._tell("single inserts")
        # Two of a kind write into one database: other rows for each.
        shifts = {
            spec.name: (1 if spec.name.endswith("-check") else 2 if spec.name.endswith("-resident") else 0)
            for spec in specs
        }

        def one(spec: Spec, number: int) -> None:
            first = start + shifts[spec.name] * sizes.inserts + number * each
            answer = self.processes[spec.name].ask("insert_one", rows=list(range(first, first + each)))
            self._sent[self.server.of(spec).database] += each
            kept = self.results["peers"][spec.name]
            kept.setdefault("insert_one", []).extend(answer["seconds"])
            kept.setdefault("insert_one_medians", []).append(statistics.median(answer["seconds"]))

        self.turns(specs, rounds, one)
        self._tell("batches")
        half = start + (len(self.task.vectors) - start) // 2

        stored = 0

        def many(spec: Spec, number: int) -> None:
            nonlocal stored
            taken = 0.0
            rates: list[float] = []
            for which in range(AT_ONCE):
                # Whoever takes 0.1 s stores several: one alone may meet what another has left to be written.
                if taken > 0.3:
                    break
                first = half + (number * AT_ONCE + which) * sizes.batch
                answer = self.processes[spec.name].ask("insert_many", first=first, last=first + sizes.batch)
                taken += answer["seconds"]
                self._sent[self.server.of(spec).database] += sizes.batch
                stored += sizes.batch * (spec is OURS)
                rates.append(sizes.batch / answer["seconds"])
            # The first turn, not counted, meets statements and pages that nobody has touched since the load.
            if number:
                kept = self.results["peers"][spec.name]
                kept.setdefault("insert_many", []).extend(rates)
                kept.setdefault("insert_many_medians", []).append(statistics.median(rates))

        self.turns([spec for spec in specs if not spec.like], 1 + sizes.batches, many)
        self._tell("what was written goes into the index")
        if OURS.name in self.processes:
            # What the background indexer would have done meanwhile.
            answer = self.processes[OURS.name].ask("catch_up")
            expected = sizes.inserts * sum(_is_ours(spec.name) for spec in specs) + stored
            if answer["moved"] != expected:
                raise RuntimeError(f"{answer['moved']} of {expected} new memories were not in the index")
            self.results["peers"][OURS.name]["indexing"] = expected / answer["seconds"]

    def mixed(self) -> None:
        """Eight callers, four searches to one insert."""
        self._tell("mixed")
        specs = [spec for spec in self.alive() if spec.stores or "pglite" in spec.name]
        sizes = self.sizes
        start = self.task.loaded + 3 * sizes.inserts

        def turn(spec: Spec, number: int) -> None:
            writes = self._work(spec) // 10
            first = start + (number + 2 * (spec is RESIDENT)) * (sizes.work // 10)
            queries = [(number * 4 * writes + n) % len(self.task.queries) for n in range(4 * writes)]
            asked = [(query, query % sizes.agents) for query in queries]
            rows = list(range(first, first + writes))
            answer = self.processes[spec.name].ask("mixed", asked=asked, rows=rows, callers=8)
            self._sent[self.server.of(spec).database] += writes
            self.results["peers"][spec.name].setdefault("mixed", []).append(
                {
                    "rate": 5 * writes / answer["total"],
                    "fewest": answer["fewest"],
                    "search_p95": percentile(answer["searches"], 0.95),
                    "insert_p95": percentile(answer["inserts"], 0.95),
                }
            )

        self.turns(specs, 2, turn)
        for spec in specs:
            self._guard(spec, lambda spec=spec: self._check_written(spec))  # type: ignore[misc]
        for name, process in self.processes.items():
            self.results["peers"][name]["peak"] = process.peak or None

    def _count(self, spec: Spec) -> None:
        if spec.stores:
            self._counted[self.server.of(spec).database] = self._run(self.server.count(spec))

    def _check_written(self, spec: Spec) -> None:
        """See that what a peer was sent is there: to store nothing is quick."""
        if spec.stores:
            database = self.server.of(spec).database
            more = self._run(self.server.count(spec)) - self._counted[database]
            if more < self._sent[database]:
                raise PeerError(f"was sent {self._sent[database]:,} memories, and has {more:,} rows more")

    # --- the limit ---------------------------------------------------------------------------------------------------

    def limits(self) -> None:
        """Run the same prepared statement by pgbench, in turns with the public method."""
        try:
            self._against_pgbench()
        except RuntimeError as error:
            self._tell(str(error))
            self.results["limits"]["pgbench"] = str(error)

    def _against_pgbench(self) -> None:
        program = find_pgbench()
        if program is None:
            self.results["limits"]["pgbench"] = "there is no pgbench"
            return
        self._tell("pgbench")
        script = self._run(self._scripts())
        ours = self.processes[OURS.name]
        seconds = 3 if self.sizes.rows >= 20_000 else 1
        asked = [(query, query % self.sizes.agents) for query in range(min(len(script), len(self.task.queries)))]
        singles: list[tuple[float, float]] = []
        many: list[tuple[float, float]] = []
        for _ in range(5 if self.sizes.rows >= 20_000 else 2):
            mine = ours.ask("search", asked=asked * 5, warmup=len(asked))["seconds"]
            theirs = self._pgbench(program, script, 1, seconds)
            singles.append((statistics.median(mine), statistics.median(theirs[0])))
            answer = ours.ask("mixed", asked=asked * max(1, self.sizes.work * 2 // len(asked)), rows=[], callers=16)
            rate = len(answer["searches"]) / answer["total"]
            many.append((rate, self._pgbench(program, script, 16, 2 * seconds)[1]))
        self.results["limits"]["pgbench"] = {
            "p50": [theirs for _, theirs in singles],
            "ours_p50": [mine for mine, _ in singles],
            "rate_16": [theirs for _, theirs in many],
            "ours_rate_16": [mine for mine, _ in many],
        }

    async def _scripts(self) -> list[str]:
        """Take the statement that a search sends, for 20 questions, each as a script that prepares it at its first run.

        As a variable of pgbench the vector would be a parameter of its own at each of its four places in the statement,
        sent and read four times.
        """
        from benchmarks.conftest import sent_by

        scripts: list[str] = []
        dsn = self.server.of(OURS).url()
        opened: dict[int, elizasql.DatabaseAdapter] = {}
        connection = await asyncpg.connect(dsn, server_settings=_pool.session_settings(Config()))
        try:
            for number in range(20):
                agent = number % self.sizes.agents
                if agent not in opened:
                    db = await elizasql.open(agent_id=agent_id(agent), dsn=dsn, indexing="manual", resident="off")
                    opened[agent] = db
                    await db.search_memories(embedding=self.task.queries[number], table_name="messages")
                db = opened[agent]

                async def call(db: elizasql.DatabaseAdapter = db, number: int = number) -> None:
                    await db.search_memories(embedding=self.task.queries[number], table_name="messages")

                sent = (await sent_by(db, call))[0]
                vector = "[" + ",".join(f"{x:.4g}" for x in self.task.queries[number]) + "]"
                given = [vector if name == "embedding" else sent.params[name] for name in sent.statement.params]
                values = ", ".join("NULL" if value is None else f"'{value}'" for value in given)
                # A statement is one line, else pgbench sends nothing: comments end with their lines.
                lines = [line for line in sent.sql.splitlines() if not line.lstrip().startswith("--")]
                prepare = f"PREPARE s{number} AS {' '.join(lines).rstrip().rstrip(';')};"
                execute = f"EXECUTE s{number} ({values});"
                await connection.execute(prepare)
                rows = await connection.fetch(execute)
                if len(rows) < 10:
                    raise RuntimeError(f"pgbench would get {len(rows)} rows")
                scripts.append(f"\\if :ready{number} = 0\n{prepare}\n\\set ready{number} 1\n\\endif\n{execute}\n")
        finally:
            await connection.close()
            for db in opened.values():
                await db.close()
        return scripts

    def _pgbench(self, program: str, scripts: list[str], clients: int, seconds: int) -> tuple[list[float], float]:
        """Run it; give the seconds of every transaction, and transactions a second."""
        place = self.server.of(OURS)
        folder = self.folder / "pgbench"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        command = [program, "-n", "-c", str(clients), "-j", str(min(clients, 2)), "-T", str(seconds)]
        command += ["--log", "--log-prefix", str(folder / "log")]
        for number, text in enumerate(scripts):
            path = folder / f"{number}.sql"
            path.write_text(text)
            command += ["-f", str(path), "-D", f"ready{number}=0"]
        # A blank would end the value.
        values = {name: value.replace(" ", "\\ ") for name, value in _pool.session_settings(Config()).items()}
        settings = " ".join(f"-c {name}={value}" for name, value in values.items())
        environment = os.environ | {
            "PGHOST": place.host,
            "PGPORT": str(place.port),
            "PGUSER": place.user,
            "PGDATABASE": place.database,
            "PGPASSWORD": place.password,
            "PGOPTIONS": settings,
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            raise RuntimeError(f"pgbench: {' '.join(done.stderr.split())[:300]}")
        # client, number, microseconds, script, and when it ended: seconds and microseconds
        entries = [
            line.split() for log in folder.glob("log.*") for line in log.read_text(encoding="utf-8").splitlines()
        ]
        ended = [int(line[4]) + int(line[5]) / 1e6 for line in entries]
        # Each connection prepares each script at its first call, which plans it for all partitions: the last half
        # counts.
        begin = max(ended) - seconds / 2
        times = [int(line[2]) / 1e6 for line, end in zip(entries, ended, strict=True) if end >= begin]
        return times, len(times) / (seconds / 2)

    # --- growth ------------------------------------------------------------------------------------------------------

    def growth(self, specs: Sequence[Spec]) -> None:
        """Let one agent have more and more memories."""
        sizes = self.sizes.growth
        if not sizes:
            return
        self._tell("growth")
        task = driver.make_task(self.folder / "growth", sizes[-1], 2, 1, 200)
        self.results["setup"]["growth"] = task.source
        grown = [
            replace(spec, name=f"{_GROWTH}{spec.name}", like=f"{_GROWTH}{spec.like}" if spec.like else "")
            for spec in specs
        ]
        loaded = 0
        try:
            for size in sizes:
                for spec in grown:
                    if spec.name in self.processes or not loaded:
                        self._guard(spec, partial(self._grow, spec, task, loaded, size))
                point: dict[str, Any] = {"rows": size, "peers": {}}
                self._search_grown(grown, task, size, point)
                self.results["growth"].append(point)
                loaded = size
        finally:
            for spec in grown:
                if (process := self.processes.pop(spec.name, None)) is not None:
                    process.end()

    def _grow(self, spec: Spec, task: Task, loaded: int, size: int) -> None:
        if spec.like:
            # Begun anew: after so much that another process has stored, the tier waits before it loads.
            if loaded:
                self.processes.pop(spec.name).end()
            self.processes[spec.name] = self.start(spec, task)
            return
        if not loaded:
            self._run(self.server.create(spec))
            self.processes[spec.name] = self.start(spec, task)
        process = self.processes[spec.name]
        ours = _is_ours(spec.name.removeprefix(_GROWTH))
        indexes = [] if ours else self._run(self.server.drop_hnsw(spec))
        process.ask("load", first=loaded, last=size)
        if indexes:
            self._run(self.server.run(spec, indexes))
        process.ask("index")
        self._run(self.server.run(spec, ["VACUUM (ANALYZE)", "CHECKPOINT"]))
        if not ours and not spec.exact:
            self._run(self.server.turn(spec, KNOBS[0]))
            process.ask("knob", ef_search=KNOBS[0].ef_search, iterative=KNOBS[0].iterative)
        self._tell(f"{spec.title}: {size:,} rows of one agent")

    def _search_grown(self, grown: list[Spec], task: Task, size: int, point: dict[str, Any]) -> None:
        # All questions: of the first eighty some are hard, and the recall of these alone is no verdict.
        block, rounds = self.sizes.block, self.sizes.rounds
        seconds: dict[str, list[float]] = {spec.name: [] for spec in grown}
        medians: dict[str, list[float]] = {spec.name: [] for spec in grown}
        recalls: dict[str, list[float]] = {spec.name: [] for spec in grown}
        short: dict[str, int] = {spec.name: 0 for spec in grown}
        exact = data.Exact(task.vectors[:size])

        def turn(spec: Spec, number: int) -> None:
            count = max(2, block // 4) if spec.exact else block
            queries = [(number * block + n) % len(task.queries) for n in range(count)]
            asked = [(queries[0], 0)] * 2 + [(query, 0) for query in queries]
            answer = self.processes[spec.name].ask("search", asked=asked, warmup=2)
            seconds[spec.name] += answer["seconds"]
            medians[spec.name].append(statistics.median(answer["seconds"]))
            for query, found in zip(queries, answer["found"], strict=True):
                recalls[spec.name].append(exact.recall(task.queries[query], sorted(set(found))))
                short[spec.name] += len(set(found)) < min(10, size)

        self.turns(grown, rounds, turn)
        for spec in grown:
            if spec.name in self.processes:
                times = seconds[spec.name]
                point["peers"][spec.name.removeprefix(_GROWTH)] = {
                    "p50": statistics.median(times),
                    "p95": percentile(times, 0.95),
                    "medians": medians[spec.name],
                    "recall": float(np.mean(recalls[spec.name])),
                    "short": short[spec.name],
                }

    # --- results -----------------------------------------------------------------------------------------------------

    @property
    def path(self) -> Path:
        """Where the results are kept."""
        stamp = re.sub(r"\D", "", self.results["setup"]["date"])
        return CACHE / f"peers-{stamp}-{self.sizes.rows}.json"

    def save(self) -> None:
        """Keep what there is by now."""
        CACHE.mkdir(exist_ok=True)
        self.results["setup"]["load at the end"] = _load()
        self.results["setup"]["seconds"] = round(perf_counter() - self._begun)
        keep(self.path, self.results)


def find_faults(results: dict[str, Any], *, all_succeed: bool = False) -> list[str]:
    """Give what fails the benchmark, whatever the figures: searches of ours that gave fewer rows than match.

    Args:
        results: Of the run, as far as it is.
        all_succeed: No peer may have failed either; of those that are installed for a run it is only told.
    """
    found = []
    for name, kept in results["peers"].items():
        if all_succeed and kept["failed"]:
            found.append(f"{name}: {kept['failed']}")
        if _is_ours(name):
            grown = [(f"growth to {point['rows']:,}", point["peers"].get(name)) for point in results["growth"]]
            searched = [*((point["label"], point) for point in kept["points"]), ("at equal recall", kept.get("equal"))]
            searched += [("in a room", kept.get("room")), *grown]
            found += [f"{name}, {what}: {each['short']} short" for what, each in searched if each and each["short"]]
            at_once = [each for runs in kept.get("concurrency", {}).values() for each in runs] + kept.get("mixed", [])
            few = [each["fewest"] for each in at_once if each["fewest"] < 10]
            found += [f"{name}, several callers: a search gave {fewest}" for fewest in few]
    return found


def _is_ours(name: str) -> bool:
    return name.startswith(OURS.name)


def last_run(results: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """Give the run to which one is held: the last before it with as many rows of the same kind, if there was one.

    A run that was broken off, or asked a few chosen peers, does not stand in the way of an older one that measured
    more of what this one did.

    Args:
        results: Of the one.
        path: Where they are kept, or will be.
    """
    best, most = None, 0
    for other in sorted(path.parent.glob(f"peers-*-{results['setup']['rows']}.json"), reverse=True):
        if other.name < path.name:
            before: dict[str, Any] = json.loads(other.read_text(encoding="utf-8"))
            measured = [{name for name, kept in each["peers"].items() if "equal" in kept} for each in (results, before)]
            both = len(measured[0] & measured[1])
            if before["setup"].get("source") == results["setup"].get("source") and both > most:
                best, most = before, both
    return best


def _place(dsn: str) -> Place:
    """Take an address apart; its host may be a folder with a socket."""
    parts = urlsplit(dsn)
    given = parse_qs(parts.query)
    host = parts.hostname or given.get("host", ["localhost"])[0]
    port = parts.port or int(given.get("port", ["5432"])[0])
    user = unquote(parts.username or given.get("user", ["postgres"])[0])
    return Place(host, port, user, unquote(parts.password or ""), parts.path.lstrip("/") or user)


def find_pgbench() -> str | None:
    """Find the program: that of the embedded server's wheel, else one that is installed."""
    here = _embedded._binaries() / "pgbench"
    return str(here) if here.is_file() else shutil.which("pgbench")


def _load() -> str:
    return " ".join(f"{load:.2f}" for load in os.getloadavg())


__all__ = ["CALLERS", "KNOBS", "Sizes", "Suite", "find_faults", "find_pgbench", "last_run"]
