"""When something is wrong or slow: how soon a caller is told, and what a look-up takes beside heavy searches."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack
from functools import partial
from itertools import count
from typing import Any
from uuid import uuid4

import pytest

from benchmarks import data
from benchmarks.conftest import (
    ROWS,
    TABLE,
    WORLDS,
    Database,
    Run,
    agent_named,
    bare,
    open_adapter,
    partition_of,
    sent_by,
    sized,
)
from benchmarks.report import (
    HEADER,
    Call,
    Comparison,
    Report,
    in_stretches,
    interleave,
    micro,
    percentile,
    played_back,
    record,
    with_spread,
)
from elizasql import Memory
from elizasql.errors import CircuitOpenError, ForeignKeyError, UniqueViolationError

pytestmark = pytest.mark.benchmark(timer=played_back, group="trouble")

SEARCHERS = 16
# Enough that the load builds its index anew.
LOADED = min(ROWS, sized(30_000, 200))
GET = "get_memory_by_id"
BARE = "the same on bare asyncpg"


def _fails(error: type[Exception], call: Callable[[], Awaitable[Any]]) -> Call:
    """Make a call that has to fail."""

    async def failing(_: int) -> None:
        try:
            await call()
        except error:
            return
        raise AssertionError(f"no {error.__name__}")

    return failing


def test_when_something_is_wrong(benchmark: Any, run: Run, one: Database, vectors: data.Data, report: Report) -> None:
    """How soon a call fails that cannot succeed: nothing of it is tried again, and nothing waits."""
    agent, query = one.agents[0], vectors.queries[0]
    there = agent.ids[0]
    request = {"channel": "benchmark", "code": "1234"}

    async def measure() -> Comparison:
        # Another threshold, and so another breaker than everybody else's.
        cut_off = await open_adapter(one.dsn, agent.db.agent_id, failure_threshold=3, reset_timeout=3600.0)
        db = await open_adapter(one.dsn, agent.db.agent_id)
        pairing = await db.create_pairing_request({**request, "sender_id": "first"})
        try:
            await cut_off.get_memory_by_id(there)
            breaker = cut_off._executor.connections.breaker
            while breaker.state == "closed":
                breaker.fail(breaker.enter())
            assert db._executor.connections.breaker.state == "closed"
            nobody = Memory(content={"text": "what was said"}, entity_id=uuid4(), embedding=query, unique=True)
            again = Memory(id=there, content={"text": "what was said"}, embedding=query, unique=True)
            search = partial(cut_off.search_memories, embedding=query, table_name=TABLE)
            variants: dict[str, Call] = {
                GET: lambda number: db.get_memory_by_id(agent.ids[number % len(agent.ids)]),
                "open breaker: get_memory_by_id": _fails(CircuitOpenError, partial(cut_off.get_memory_by_id, there)),
                "open breaker: search_memories": _fails(CircuitOpenError, search),
                "open breaker: create_memory": _fails(CircuitOpenError, partial(cut_off.create_memory, again, TABLE)),
                "no such entity: create_memory": _fails(ForeignKeyError, partial(db.create_memory, nobody, TABLE)),
                "id is there: load_memories": _fails(UniqueViolationError, partial(db.load_memories, [again], TABLE)),
                "code is there: create_pairing_request": _fails(
                    UniqueViolationError, partial(db.create_pairing_request, {**request, "sender_id": "second"})
                ),
            }
            return await interleave(variants, sized(300, 2), warmup=sized(30, 1))
        finally:
            await db.delete_pairing_request(pairing)
            await db.close()
            await cut_off.close()

    comparison = run(measure())
    record(benchmark, comparison, "no such entity: create_memory")
    report.table("When something is wrong: until the caller is told", HEADER, comparison.rows())
    slowest = max((name for name in comparison.seconds if name.startswith("open breaker")), key=comparison.p95)
    taken = comparison.p95(slowest) * 1e3
    report.goal(f"a call against an open breaker, p95 ({slowest})", f"{taken:.2f} ms", "≤ 1 ms", taken <= 1, of=0)
    for what, start in (("a broken foreign key", "no such entity"), ("a duplicate", ("id is there", "code is there"))):
        slowest = max((name for name in comparison.seconds if name.startswith(start)), key=comparison.median)
        taken = comparison.median(slowest) * 1e3
        measured = f"{taken:.2f} ms (p95 {comparison.p95(slowest) * 1e3:.2f})"
        report.goal(f"{what} is told, p50 ({slowest})", measured, "≤ 5 ms", taken <= 5, of=0)


def test_beside_what_is_slow(benchmark: Any, run: Run, one: Database, vectors: data.Data, report: Report) -> None:
    """Look-ups by id while the same process has 16 exact searches of a fifth of the rows under way, or a load.

    Sixteen searches keep every processor busy, and whoever asks has to wait for one, as long as the system lets others
    have it: many times what a look-up takes. So the same statement takes turns with the method, on a connection past
    the pool; and no look-up may wait for the end of a search.
    """
    agent = one.agents[0]
    world = WORLDS.index(0.2)
    searched: list[float] = []
    taken: dict[str, Comparison] = {}

    async def measure() -> None:
        async with AsyncExitStack() as stack:
            db = await open_adapter(one.dsn, agent.db.agent_id, pool_max_size=20)
            stack.push_async_callback(db.close)
            connection = await stack.enter_async_context(bare(one.dsn, tuned=True))
            home = await partition_of(connection, agent.db.agent_id)
            others = (agent_named("loads", number) for number in count())
            while await partition_of(connection, other := next(others)) == home:
                pass
            loading = await open_adapter(one.dsn, other)
            stack.push_async_callback(loading.close)
            await loading.delete_agent(other)
            await loading.ensure_agent_exists({"name": "loads"})
            stack.push_async_callback(loading.delete_agent, other)
            await loading.ensure_embedding_dimension(data.WIDTH)

            async def method(number: int) -> Any:
                return await db.get_memory_by_id(agent.ids[number % len(agent.ids)])

            ready = [(await sent_by(db, partial(method, number)))[0] for number in range(sized(1000, 5))]

            async def raw(number: int) -> Any:
                sent = ready[number % len(ready)]
                return await connection.fetch(sent.sql, *sent.arguments)

            async def search(enough: asyncio.Event) -> None:
                while not enough.is_set():
                    begun = time.perf_counter()
                    query = vectors.queries[len(searched) % len(vectors.queries)]
                    await db.search_memories(
                        embedding=query, table_name=TABLE, world_id=agent.worlds[world], recall="exact"
                    )
                    searched.append(time.perf_counter() - begun)

            async def load(_: asyncio.Event) -> None:
                memories = (
                    Memory(content={"text": "what was said"}, embedding=vector, unique=True)
                    for vector in vectors.vectors[:LOADED]
                )
                await loading.load_memories(memories, TABLE)

            look_up: dict[str, Call] = {GET: method, BARE: raw}
            await _meanwhile(look_up, sized(100, 1))
            taken["idle"] = await _meanwhile(look_up, sized(1000, 3))
            taken["searches"] = await _meanwhile(look_up, sized(300, 3), search, SEARCHERS)
            taken["a load, and its index"] = await _meanwhile(look_up, sized(300, 3), load)

    run(measure())
    rows = [
        [
            *(what, f"{len(each.seconds[GET]):,}", micro(each.median(GET)), micro(each.p95(GET))),
            *(f"{each.p95(GET) / taken['idle'].p95(GET):.1f}", micro(each.median(BARE)), micro(each.p95(BARE))),
            f"{each.p95(GET) / each.p95(BARE):.2f}",
        ]
        for what, each in taken.items()
    ]
    header = ["meanwhile", "look-ups", "p50 us", "p95 us", "p95 over idle", f"{BARE}: p50 us", "p95 us", "ours over it"]
    searching = f"{SEARCHERS} exact searches of {int((agent.world_of == world).sum()):,} rows"
    one_search = percentile(searched, 0.5)
    title = f"{GET} beside {searching}, p50 of one {micro(one_search)} us, and beside a load of {LOADED:,}"
    report.table(title, header, rows)
    record(benchmark, taken["searches"], GET)

    def p95s(what: str, name: str = GET) -> list[float]:
        """Give that of the whole, and of each stretch."""
        seconds = taken[what].seconds[name]
        return [percentile(each, 0.95) for each in (seconds, *in_stretches(seconds))]

    idle = p95s("idle")[0]
    beside, past = p95s("searches"), p95s("searches", BARE)
    ratios = [mine / other for mine, other in zip(beside, past, strict=True)]
    measured = f"{with_spread(ratios[0], ratios[1:])}; {beside[0] / idle:.1f} x idle"
    what = f"{GET} beside {searching}: p95 over the same on bare asyncpg"
    report.goal(what, measured, "≤ 1.3 x", ratios[0] <= 1.3)
    shares = [each / one_search for each in beside]
    report.goal(f"{GET} beside them: p95 over one search", with_spread(*_split(shares)), "≤ 0.5 x", shares[0] <= 0.5)
    shares = [each / idle for each in p95s("a load, and its index")]
    # A search beside a load is held to three times; a look-up takes a tenth of one, and waits as long for its turn.
    report.goal(f"{GET} beside a load: p95 over idle", with_spread(*_split(shares)), "≤ 10 x", shares[0] <= 10)


def _split(ratios: list[float]) -> tuple[float, list[float]]:
    return ratios[0], ratios[1:]


async def _meanwhile(
    look_up: Mapping[str, Call],
    least: int,
    work: Callable[[asyncio.Event], Coroutine[Any, Any, None]] | None = None,
    many: int = 1,
) -> Comparison:
    """Look up in turns while work goes on.

    Args:
        look_up: The ways.
        least: Look-ups of each; more while work that ends by itself has not ended.
        work: What goes on, until it has ended by itself or is told that it is enough.
        many: How often at once.
    """
    seconds: dict[str, list[float]] = {name: [] for name in look_up}
    enough = asyncio.Event()
    tasks = [asyncio.ensure_future(work(enough)) for _ in range(many)] if work else []
    turns = random.Random(0)
    try:
        for number in count():
            if number >= least and (many > 1 or all(task.done() for task in tasks)):
                break
            for name in turns.sample(list(look_up), len(look_up)):
                begun = time.perf_counter()
                await look_up[name](number)
                seconds[name].append(time.perf_counter() - begun)
    finally:
        enough.set()
        await asyncio.gather(*tasks)
    return Comparison(seconds)
