"""What the server does with a query, and how fast: explain, recall-check and bench."""

from __future__ import annotations

import asyncio
import copy
import difflib
import inspect
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any
from uuid import UUID, uuid4

import numpy as np
import orjson
import typer

from elizasql import DatabaseAdapter, Memory, _codecs
from elizasql._retry import Outcome
from elizasql._statements import SQL, Statement
from elizasql.errors import ArgumentError

from . import _out, _place
from ._place import AgentId, DataDir, Dsn, Json, Place

_READS = ("get_", "search_", "count_", "is_", "are_", "query_")
_LADDER = (20, 40, 60, 80, 100, 150, 200, 300, 400, 600, 1000)
# Two similarities that differ by less count as equal: a vector may be there twice.
_EQUAL = 1e-6

# The memory that a vector is of, the vector, and the similarities that an exact search finds for it.
Query = tuple[UUID, Any, list[float]]


def add_to(app: typer.Typer) -> None:
    """Put the commands into the application."""
    app.command()(explain)
    app.command("recall-check")(recall_check)
    app.command()(bench)


# --- explain ---------------------------------------------------------------------------------------------------------


def explain(
    method: Annotated[str, typer.Argument(help="A method that reads, such as search_memories.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME=VALUE",
            help="Its arguments: text or JSON. embedding=of:ID takes that of a memory, embedding=@FILE of a .npy or "
            "JSON file.",
        ),
    ] = None,
    agent: AgentId = None,
    dsn: Dsn = None,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Run a method that reads, and show its statements' plans. Says of each whether an index was used.

    The plans are those of a second call, as an application goes on: the first search of a scope also measures it.
    """
    if method not in methods():
        near = difflib.get_close_matches(method, methods())
        others = f"is it {' or '.join(near)}?" if near else f"there are {', '.join(sorted(methods()))}"
        raise ArgumentError(f"{method} is no method that reads; {others}")

    async def work() -> dict[str, Any]:
        async with _place.reach(dsn, data_dir) as place:
            chosen = await place.choose_agent(agent)
            async with place.open(chosen, resident="off") as db:
                given = {name: await _read(db, value) for name, value in map(_split, arguments or [])}
                try:
                    inspect.signature(getattr(db, method)).bind(**given)
                except TypeError as error:
                    raise ArgumentError(f"{method}: {error}") from None
                # What the adapter learns by it, as the size of a search's scope, is not asked for again.
                await getattr(db, method)(**given)
                return await explain_call(db, method, given)

    told = asyncio.run(work())
    if json:
        _out.emit(told)
    else:
        _show_plans(told)


def methods() -> set[str]:
    """Give the names of the methods that read; is_ready only asks for a sign of life."""
    kinds = inspect.getmembers(DatabaseAdapter, inspect.iscoroutinefunction)
    return {name for name, _ in kinds if name.startswith(_READS)} - {"is_ready"}


def _split(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ArgumentError(f"{text!r:.80} is not of the form NAME=VALUE")
    return name, value


async def _read(db: DatabaseAdapter, text: str) -> Any:
    """Read a value: a stored vector, a file, JSON, or text as it is."""
    if text.startswith("of:"):
        dimension = await db.get_embedding_dimension()
        memory_id = _codecs.as_id(text[3:], "of")
        if dimension is not None:
            statement = SQL.at("get_embedding", dimension)
            vector = await db._executor.fetch_value(statement, agent_id=db.agent_id, memory_id=memory_id)
            if vector is not None:
                return vector
        raise ArgumentError(f"memory {memory_id} has no embedding")
    if text.startswith("@"):
        return _read_file(Path(text[1:]))
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return text


def _read_file(path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False) if path.suffix == ".npy" else orjson.loads(path.read_bytes())
    except ValueError as error:
        raise ArgumentError(f"{path} is neither .npy nor JSON: {error}") from None


class _Explainer:
    """Stands in for an executor: runs each statement, and once more under EXPLAIN.

    Attributes:
        plans: What was found, one entry a statement.
    """

    def __init__(self, executor: Any) -> None:
        self._executor = executor
        self.in_transaction = False
        self.plans: list[dict[str, Any]] = []

    async def _explain(self, statement: Statement, params: dict[str, Any]) -> None:
        sql, arguments = self._executor.text(statement, params), statement.order(params)

        async def work(connection: Any, deadline: float) -> dict[str, Any]:
            return await _find_plan(connection, sql, arguments, deadline)

        async with self._executor.transaction() as session:
            plan = await session._attempts(statement.name, work, Outcome.NOT_APPLIED)
        self.plans.append(
            {"statement": statement.name, "file": f"sql/{statement.file}", **summarize(plan), "plan": plan}
        )

    async def fetch(self, statement: Statement, **params: Any) -> Any:
        rows = await self._executor.fetch(statement, **params)
        await self._explain(statement, params)
        return rows

    async def fetch_row(self, statement: Statement, **params: Any) -> Any:
        row = await self._executor.fetch_row(statement, **params)
        await self._explain(statement, params)
        return row

    async def fetch_value(self, statement: Statement, **params: Any) -> Any:
        value = await self._executor.fetch_value(statement, **params)
        await self._explain(statement, params)
        return value


async def _find_plan(connection: Any, sql: str, arguments: Sequence[Any], deadline: float) -> dict[str, Any]:
    """Run a statement as sessions have it prepared, and give its plan.

    EXPLAIN before the statement itself would plan it for these very values, where the plan in force knows none.
    """

    def left() -> float:
        return max(deadline - time.monotonic(), 0.001)

    prepared = await connection.prepare(sql, timeout=left())
    given = ""
    if arguments:
        # As literals: EXECUTE takes no parameters of its own.
        texts = ", ".join(
            f"quote_nullable(${number}::{_quote(kind.schema)}.{kind.name}::text)"
            for number, kind in enumerate(prepared.get_parameters(), 1)
        )
        values = await connection.fetchrow(f"VALUES ({texts})", *arguments, timeout=left())
        given = f"({', '.join(values)})"
    # Once more, under a name of SQL's: what the protocol prepares has another one behind a pooler, or none.
    name = f"explained_{uuid4().hex}"
    await connection.execute(f"PREPARE {name} AS {sql}", timeout=left())
    found = await connection.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE {name}{given}", timeout=left())
    await connection.execute(f"DEALLOCATE {name}", timeout=left())
    plan: dict[str, Any] = orjson.loads(found)[0]
    return plan


def _quote(name: str) -> str:
    return '"{}"'.format(name.replace('"', '""'))


async def explain_call(db: DatabaseAdapter, method: str, given: dict[str, Any]) -> dict[str, Any]:
    """Call a method and give the plans of what it sent."""
    bound = copy.copy(db)
    explainer = _Explainer(db._executor)
    bound._executor = explainer  # type: ignore[assignment]
    result = await getattr(bound, method)(**given)
    sequential = sorted({table for plan in explainer.plans for table in plan["sequential"]})
    return {
        "method": method,
        "rows": len(result) if isinstance(result, (list, dict)) else None,
        "index_used": bool(explainer.plans) and not sequential and all(plan["indexes"] for plan in explainer.plans),
        "sequential": sequential,
        "statements": explainer.plans,
    }


def summarize(plan: dict[str, Any]) -> dict[str, Any]:
    """Take out of a plan what a caller wants to know first."""
    nodes = [node for _, node in walk(plan["Plan"]) if node["Actual Loops"]]
    return {
        "milliseconds": plan["Execution Time"],
        "rows": plan["Plan"]["Actual Rows"],
        "indexes": sorted({node["Index Name"] for node in nodes if "Index Name" in node}),
        "sequential": sorted({node["Relation Name"] for node in nodes if node["Node Type"].endswith("Seq Scan")}),
    }


def walk(node: dict[str, Any], depth: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Give every node of a plan and how deep it stands."""
    yield depth, node
    for below in node.get("Plans", ()):
        yield from walk(below, depth + 1)


def _show_plans(told: dict[str, Any]) -> None:
    for plan in told["statements"]:
        _out.say(f"{plan['statement']} ({plan['file']}): {plan['milliseconds']:.2f} ms")
        for depth, node in walk(plan["plan"]["Plan"]):
            _out.say(f"  {'  ' * depth}{_line(node)}")
    if not told["statements"]:
        _out.say("nothing was sent to the server")
    elif told["index_used"]:
        _out.say("every statement used an index", style="ok")
    else:
        found = f"tables read as a whole: {', '.join(told['sequential'])}" if told["sequential"] else "no index used"
        _out.say(found, style="warning")


def _line(node: dict[str, Any]) -> str:
    words = [node["Node Type"]]
    if "Index Name" in node:
        words.append(f"using {node['Index Name']}")
    elif "Relation Name" in node:
        words.append(f"on {node['Relation Name']}")
    elif "CTE Name" in node:
        words.append(f"on {node['CTE Name']}")
    if not node["Actual Loops"]:
        return f"{' '.join(words)} (never run)"
    total = node["Actual Total Time"] * node["Actual Loops"]
    rows = _out.counted(round(node["Actual Rows"] * node["Actual Loops"]), "row")
    return f"{' '.join(words)} ({total:.2f} ms, {rows})"


# --- recall-check ----------------------------------------------------------------------------------------------------


def recall_check(
    type: Annotated[
        str | None, typer.Option(help="Type of the memories; by default the one with most vectors.")
    ] = None,
    count: Annotated[int, typer.Option("-k", "--count", min=1, max=1000, help="How many are searched for.")] = 10,
    sample: Annotated[int, typer.Option(min=1, max=10_000, help="Vectors of your own that are searched with.")] = 100,
    target: Annotated[float, typer.Option(min=0.5, max=1.0, help="The recall that is wanted.")] = 0.99,
    agent: AgentId = None,
    dsn: Dsn = None,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Compare the index with exact search, on your own data. Takes a sample, and recommends an ef_search."""

    async def work() -> dict[str, Any]:
        async with _place.reach(dsn, data_dir) as place:
            chosen = await place.choose_agent(agent)
            with _out.progress(shown=not json) as advance:
                return await measure_recall(place, chosen, type, count, sample, target, advance)

    told = asyncio.run(work())
    if json:
        _out.emit(told)
        return
    _out.say(f"{told['vectors']:,} vectors of type {told['type']}, {told['indexed']:,} of them in the index")
    _out.table(
        ["ef_search", f"recall@{count}", "worst", "p50 ms", ""],
        [
            [step["ef_search"], step["recall"], step["worst"], step["milliseconds"], "now" if step["in_force"] else ""]
            for step in told["steps"]
        ],
    )
    _out.say(told["advice"])


async def measure_recall(
    place: Place, agent_id: UUID, type: str | None, count: int, sample: int, target: float, advance: _out.Advance
) -> dict[str, Any]:
    """Search with vectors that are stored, exactly and through the index at one ef_search after the other."""
    now = place.config.ef_search
    steps: list[dict[str, Any]] = []
    async with place.open(agent_id, resident="off") as db:
        found, queries = await _sample(db, type, count, sample, advance)
        kind, vectors = found["type"], found["vectors"]
        by_index = await uses_hnsw(db, kind, queries[0][1], count)
        missing = await db._executor.fetch(SQL["find_lost_index"], agent_id=agent_id)
        lost = await db.get_embedding_dimension() in {row["dimension"] for row in missing}
        # Whatever comes first reads the index from the disk, and must not be taken for slow.
        await _search_all(db, kind, count, queries, now)
        for ef in sorted({*_LADDER, now}):
            recalls, seconds = await _search_all(db, kind, count, queries, ef)
            advance("index", ef, _LADDER[-1])
            steps.append(
                {
                    "ef_search": ef,
                    "recall": mean(recalls),
                    "worst": min(recalls),
                    "milliseconds": median(seconds) * 1000,
                    "in_force": ef == now,
                }
            )
            if mean(recalls) >= target and ef >= now:
                break
    return {
        "type": kind,
        "vectors": vectors,
        "indexed": found["indexed"],
        "count": count,
        "sample": len(queries),
        "by_index": by_index,
        "steps": steps,
        **_advise(steps, now, target, found, by_index=by_index, lost=lost),
    }


async def _sample(
    db: DatabaseAdapter, type: str | None, count: int, sample: int, advance: _out.Advance
) -> tuple[dict[str, Any], list[Query]]:
    """Choose vectors to search with, and search exactly; and give the type, and how many vectors there are of it."""
    dimension = await db.get_embedding_dimension()
    if dimension is None:
        raise ArgumentError("the agent has no embedding yet")
    found = await _size(db, type)
    chosen = await db._executor.fetch(
        SQL.at("sample_embeddings", dimension), agent_id=db.agent_id, type=found["type"], count=sample
    )
    queries = []
    for number, row in enumerate(chosen, 1):
        # One more than is compared: the nearest is the vector itself.
        near = await db._executor.fetch(
            SQL.at("search_exactly", dimension),
            agent_id=db.agent_id,
            type=found["type"],
            embedding=_codecs.encode_vector(row["embedding"]),
            count=count + 1,
        )
        queries.append((row["memory_id"], row["embedding"], [each["similarity"] for each in near]))
        advance("exact", number, len(chosen))
    return found, queries


async def uses_hnsw(db: DatabaseAdapter, kind: str, vector: Any, count: int) -> bool:
    """Tell whether such a search goes through HNSW; small scopes are searched exactly."""
    told = await explain_call(db, "search_memories", {"embedding": vector, "table_name": kind, "count": count})
    return any(name.endswith("_hnsw") for plan in told["statements"] for name in plan["indexes"])


async def _size(db: DatabaseAdapter, type: str | None) -> dict[str, Any]:
    if type is None:
        row = await db._executor.fetch_row(SQL["get_largest_type"], agent_id=db.agent_id)
    else:
        row = await db._executor.fetch_row(SQL["count_vectors_of_type"], agent_id=db.agent_id, type=type)
    if row is None or not row["vectors"]:
        raise ArgumentError(
            f"the agent has no embedding of type {type!r}" if type else "the agent has no embedding yet"
        )
    return {"type": type, **row}


async def _search_all(
    db: DatabaseAdapter, kind: str, count: int, queries: list[Query], ef: int | None = None
) -> tuple[list[float], list[float]]:
    """Give the recall and the seconds of each query."""
    recalls, seconds = [], []
    for memory_id, vector, exact in queries:
        began = time.perf_counter()
        hits = await db.search_memories(embedding=vector, table_name=kind, count=count + 1, ef_search=ef)
        seconds.append(time.perf_counter() - began)
        wanted = exact[1:]
        others = [hit.similarity or 0.0 for hit in hits if hit.id != memory_id][: len(wanted)]
        found = sum(similarity >= wanted[-1] - _EQUAL for similarity in others)
        recalls.append(found / len(wanted) if wanted else 1.0)
    return recalls, seconds


def _advise(
    steps: list[dict[str, Any]], now: int, target: float, found: dict[str, Any], *, by_index: bool, lost: bool
) -> dict[str, Any]:
    enough = next((step["ef_search"] for step in steps if step["recall"] >= target), None)
    in_force = next(step for step in steps if step["in_force"])
    if lost:
        enough, advice = now, "the index is missing, so that all vectors are compared: build it: elizasql index"
    elif not by_index and in_force["recall"] == 1:
        enough, advice = now, "so few vectors are searched exactly: ef_search makes no difference yet"
    elif found["indexed"] < found["vectors"] * 0.9:
        advice = "most vectors are not in the index yet and are searched exactly: index them first: elizasql index"
    elif enough is None:
        advice = (
            f"no ef_search reaches {target:g}: build the index anew with elizasql index --rebuild, "
            f"then try again; until then {steps[-1]['ef_search']}"
        )
    elif in_force["recall"] >= target and enough >= now * 0.6:
        advice = f"ef_search = {now} is right: recall {in_force['recall']:.3f}"
    else:
        advice = f"set ELIZASQL_EF_SEARCH={enough}: recall {target:g} or more, {'faster' if enough < now else 'slower'}"
    return {"recommended": enough, "advice": advice}


# --- bench -----------------------------------------------------------------------------------------------------------


def bench(
    type: Annotated[
        str | None, typer.Option(help="Type of the memories; by default the one with most vectors.")
    ] = None,
    sample: Annotated[int, typer.Option(min=1, max=10_000, help="Calls of each kind.")] = 200,
    writes: Annotated[
        bool, typer.Option(help="Also write, for an agent that is made for it and deleted afterwards.")
    ] = True,
    agent: AgentId = None,
    dsn: Dsn = None,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Measure searches, look-ups and writes on your own server. Searches are for vectors of your own data."""

    async def work() -> list[dict[str, Any]]:
        async with _place.reach(dsn, data_dir) as place:
            chosen = await place.choose_agent(agent)
            with _out.progress(shown=not json) as advance:
                return await measure(place, chosen, type, sample, advance, writes=writes)

    told = asyncio.run(work())
    if json:
        _out.emit(told)
        return
    _out.table(
        ["what", "calls", "p50 ms", "p95 ms", "a second", "recall"],
        [[each[name] for name in ("what", "calls", "p50", "p95", "rate", "recall")] for each in told],
    )


async def measure(
    place: Place, agent_id: UUID, type: str | None, sample: int, advance: _out.Advance, *, writes: bool = True
) -> list[dict[str, Any]]:
    """Time calls one after the other; give for each kind calls, p50 and p95 in milliseconds, and rows a second."""
    told: list[dict[str, Any]] = []
    queries: list[Query] = []
    for what, resident in (("search, in the database", "off"), ("search, vectors in the process", "required")):
        async with place.open(agent_id, resident=resident) as db:
            if not queries:
                found, queries = await _sample(db, type, 10, sample, advance)
            # The first call opens the connection, makes the plan and, for the second kind, loads the vectors.
            await _search_all(db, found["type"], 10, queries[:1])
            recalls, seconds = await _search_all(db, found["type"], 10, queries)
            if resident == "off" or (await db.stats())["resident"]["hits"]:
                told.append(_times(what, seconds) | {"recall": mean(recalls)})
            if resident == "off":
                ids = [memory_id for memory_id, _, _ in queries]
                told.append(_times("get_memory_by_id", await _time(db.get_memory_by_id, ids)))
        advance(what, len(told), None)
    if writes:
        told += await _measure_writes(place, found["type"], [vector for _, vector, _ in queries], sample)
    return told


async def _measure_writes(place: Place, type: str, vectors: list[Any], sample: int) -> list[dict[str, Any]]:
    agent_id = uuid4()
    async with place.open(agent_id) as db:
        await db.ensure_agent_exists({"name": "elizasql bench"})
        try:
            await db.ensure_embedding_dimension(len(vectors[0]))
            memories = [
                Memory(content={"text": f"Memory {number}"}, embedding=vectors[number % len(vectors)], unique=True)
                for number in range(2 * sample + 1)
            ]

            async def create(memory: Memory) -> UUID:
                return await db.create_memory(memory, type)

            await create(memories[0])
            alone = await _time(create, memories[1 : sample + 1])
            began = time.perf_counter()
            await db.create_memories(memories[sample + 1 :], type)
            batch = time.perf_counter() - began
        finally:
            await db.delete_agent(agent_id)
    return [
        _times("create_memory", alone),
        {**_times("create_memories, one batch", [batch]), "calls": sample, "rate": sample / batch},
    ]


async def _time(call: Callable[[Any], Awaitable[Any]], arguments: Sequence[Any]) -> list[float]:
    seconds = []
    for each in arguments:
        began = time.perf_counter()
        await call(each)
        seconds.append(time.perf_counter() - began)
    return seconds


def _times(what: str, seconds: Sequence[float]) -> dict[str, Any]:
    return {
        "what": what,
        "calls": len(seconds),
        "p50": median(seconds) * 1000,
        "p95": float(np.quantile(seconds, 0.95)) * 1000,
        "rate": len(seconds) / sum(seconds),
        "recall": None,
    }
