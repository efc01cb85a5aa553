"""Every public method that writes, cancelled at each point at which it waits, on a server that goes on answering.

The step of the loop is chosen by hand, so that every one of them is met: what was written is there as a whole or not at
all, and nothing is left behind, no connection, no transaction, no probe of the breaker and no task.
"""

from __future__ import annotations

import asyncio
import gc
import types
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any

import asyncpg
import pytest

from elizasql import DatabaseAdapter
from tests.conftest import MakeAdapter, Scene, make_scene
from tests.test_isolation import METHODS, VECTOR, Filled, filled, snapshot
from tests.test_simulation import ABOUT_ITSELF

Call = Callable[[DatabaseAdapter, Filled], Awaitable[Any]]


def of_method(name: str) -> Call:
    return lambda db, own: getattr(db, name)(**own.arguments(name))


async def in_a_transaction(db: DatabaseAdapter, own: Filled) -> None:
    async with db.transaction() as tx:
        await tx.create_worlds([{"name": "a"}, {"name": "b"}])
        async with tx.transaction() as inner:
            await asyncio.gather(inner.create_logs(logs(own.scene)), inner.count_memories(), inner.set_cache("k", 1))


async def load(db: DatabaseAdapter, own: Filled) -> None:
    await db.load_memories(memories(own.scene, 1), "messages", build_index=False)


def memories(scene: Scene, number: int = 3) -> list[dict[str, Any]]:
    place = {"entity_id": scene.entity, "room_id": scene.room}
    return [{"content": {"text": str(n)}, "embedding": VECTOR, **place} for n in range(number)]


def logs(scene: Scene) -> list[dict[str, Any]]:
    return [{"type": "x", "body": {}, "entity_id": scene.entity, "room_id": scene.room} for _ in range(3)]


# What is cut in every run: a statement, several in a transaction, and several transactions.
QUICK: dict[str, Call] = {
    "count_memories": lambda db, _: db.count_memories(),
    "create_memories of several chunks": lambda db, own: db.create_memories(memories(own.scene), "messages"),
    "a transaction": in_a_transaction,
    "load_memories": load,
}
# And everything else that writes, when there is time for it.
READS = ("get_", "count_", "search_", "query_", "are_", "is_")
SLOW = {
    name: of_method(name)
    for name in METHODS
    if not name.startswith(READS) and name not in ABOUT_ITSELF and name not in QUICK
}


@types.coroutine
def stepping(coroutine: Coroutine[Any, Any, Any], waits: Callable[[int, Any], None]) -> Generator[Any, Any, Any]:
    """Run a coroutine, and tell each time that it waits how often it has, and what for."""
    error: BaseException | None = None
    number = 0
    while True:
        try:
            future = coroutine.send(None) if error is None else coroutine.throw(error)
        except StopIteration as end:
            return end.value
        number, error = number + 1, None
        waits(number, future)
        try:
            yield future
        except BaseException as raised:
            error = raised


def cancel(how: str, position: int, reached: list[int]) -> Callable[[int, Any], None]:
    """Give what cancels the running task at its wait number `position`."""

    def waits(number: int, future: Any) -> None:
        reached[0] = number
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        if number == position and how == "with the answer" and future is not None:
            future.add_done_callback(lambda _: task.cancel())  # before the task hears of it
        elif number == position or (number == position + 1 and how == "twice"):
            loop.call_soon(task.cancel)

    return waits


def changes(before: dict[str, list[str]], after: dict[str, list[str]]) -> Counter[str]:
    found: Counter[str] = Counter()
    for table, rows in after.items():
        found[table.partition("_p0")[0].partition("_p1")[0]] += len(set(rows) ^ set(before[table]))
    del found["memory_rewrites"]
    return +found


async def assert_nothing_is_left(db: DatabaseAdapter, tasks: set[asyncio.Task[Any]]) -> None:
    for executor in (db._executor, db._background):
        lane = executor.lane
        while lane._connecting:
            await asyncio.wait(lane._connecting)
        await lane.let_go()
        assert (executor.in_flight, executor._held, lane.in_use, lane.waiting) == (0, set(), 0, 0)
        assert lane.pool.get_size() == lane.pool.get_idle_size()
        for holder in lane.pool._holders:
            assert holder._con is None or holder._con.is_closed() or not holder._con.is_in_transaction()
    breaker = db._connections.breaker
    assert (breaker.state, breaker._in_flight) == ("half_open", 0) or breaker.state == "closed"
    assert asyncio.all_tasks() <= tasks
    assert await db.is_ready()


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((name, "with the answer") for name in QUICK),
        *(pytest.param(name, how, marks=pytest.mark.slow) for name in QUICK for how in ("at once", "twice")),
        *(pytest.param(name, "with the answer", marks=pytest.mark.slow) for name in SLOW),
    ],
)
async def test_cancellation_at_each_wait(
    make_db: MakeAdapter, raw: asyncpg.Connection[Any], name: str, how: str
) -> None:
    untold: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: untold.append(context))
    call = (QUICK | SLOW)[name]
    whole: Counter[str] | None = None
    position = -1  # the first run is not cut
    while True:
        db = await make_db(batch_size=1)
        own = await filled(db) if name in SLOW else Filled(db.agent_id, await make_scene(db), {}, {})
        before, tasks = await snapshot(raw, db.agent_id), asyncio.all_tasks()
        db._connections.breaker._move("half_open")
        reached = [0]

        async def run(db: DatabaseAdapter = db, own: Filled = own) -> Any:
            return await call(db, own)

        running = asyncio.ensure_future(_stepped(run(), cancel(how, position, reached)))
        outcome = await asyncio.gather(running, return_exceptions=True)
        kind = type(outcome[0])
        await assert_nothing_is_left(db, tasks)
        db._connections.breaker._move("closed")
        changed = changes(before, await snapshot(raw, db.agent_id))
        await db.close()
        if whole is None:
            whole, position, uncut = changed, 0, kind
        elif reached[0] < position:
            break
        else:
            assert kind in (asyncio.CancelledError, uncut)
            assert changed in (Counter(), whole), f"cut at wait {position} of {reached[0]}"
        position += 1
    assert position > 1
    del running, outcome
    gc.collect()
    assert not untold


async def _stepped(coroutine: Coroutine[Any, Any, Any], waits: Callable[[int, Any], None]) -> Any:
    return await stepping(coroutine, waits)
