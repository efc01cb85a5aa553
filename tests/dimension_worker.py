"""A client in a process of its own, for test_dimension_lock: pickled commands come on stdin, answers go to stdout.

    ("open", dsn, agent_id, settings)   opens an adapter in place of the one before; answers None
    ("run", [call, ...])                runs the calls concurrently; answers the list of their outcomes
    ("stream", [call, ...])             runs them one after the other; answers each outcome as soon as it is there

A call is (method, arguments, keywords); an outcome is its result or the exception. The process ends when stdin does.
"""

from __future__ import annotations

import asyncio
import pickle
import sys
from typing import Any

import elizasql

Call = tuple[str, tuple[Any, ...], dict[str, Any]]


def answer(value: Any) -> None:
    pickle.dump(value, sys.stdout.buffer)
    sys.stdout.buffer.flush()


async def outcome(db: elizasql.DatabaseAdapter, call: Call) -> Any:
    method, arguments, keywords = call
    try:
        return await getattr(db, method)(*arguments, **keywords)
    except Exception as error:
        return error


async def main() -> None:
    db: elizasql.DatabaseAdapter | None = None
    while True:
        try:
            name, *rest = await asyncio.to_thread(pickle.load, sys.stdin.buffer)
        except EOFError:
            break
        if name == "open":
            if db is not None:
                await db.close()
            dsn, agent_id, settings = rest
            db = await elizasql.open(dsn=dsn, agent_id=agent_id, **settings)
            answer(None)
            continue
        assert db is not None
        if name == "run":
            answer(await asyncio.gather(*(outcome(db, call) for call in rest[0])))
        elif name == "stream":
            for call in rest[0]:
                answer(await outcome(db, call))
    if db is not None:
        await db.close()


if __name__ == "__main__":
    asyncio.run(main())
