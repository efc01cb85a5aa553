"""A batch that goes in several statements does what it does in one: two agents, the same calls, no difference."""

from __future__ import annotations

import random
from contextlib import nullcontext
from datetime import datetime, timedelta, timezone
from typing import Any
from uuid import UUID

import numpy as np
import pytest

from elizasql import DatabaseAdapter, ElizaSQLError

from .conftest import MakeAdapter

START = datetime(2026, 1, 1, tzinfo=timezone.utc)
TIMES = [START + timedelta(seconds=second) for second in range(3)]
IDS = [UUID(int=number) for number in range(1, 10)]
PLACES = IDS[:8]
VECTORS = list(np.random.default_rng(7).normal(size=(4, 384)).astype(np.float32))

Choices = dict[str, list[Any]]

# Of each kind of row: the verbs of its batch methods, the fields that it needs, and those that it may have.
KINDS: dict[str, tuple[str, Choices, Choices]] = {
    "worlds": ("create upsert update delete", {}, {"name": ["a", "b"], "created_at": TIMES}),
    "rooms": ("create upsert update", {"source": ["s"], "type": ["t"]}, {"name": ["a", "b"], "world_id": PLACES}),
    "entities": ("create upsert update", {}, {"names": [["a"], ["b"]], "metadata": [{}, {"k": 1}]}),
    "components": (
        "create upsert delete",
        {"entity_id": PLACES, "room_id": PLACES, "type": ["p", "q"], "data": [{}, {"k": 1}]},
        {"world_id": PLACES},
    ),
    "relationships": (
        "create update delete",
        {"source_entity_id": PLACES, "target_entity_id": PLACES},
        {"tags": [["x"], ["y"]]},
    ),
    "memories": (
        "create upsert update delete",
        {"type": ["messages"], "content": [{"text": "a"}, {"text": "b"}]},
        {"room_id": PLACES, "unique": [True, False], "embedding": VECTORS, "created_at": TIMES},
    ),
    "tasks": ("create update delete", {"name": ["a", "b"]}, {"tags": [["x"], ["y"]], "created_at": TIMES}),
    "goals": ("create update delete", {"name": ["a", "b"]}, {"room_id": PLACES, "created_at": TIMES}),
    "logs": (
        "create create delete",
        {"entity_id": PLACES, "room_id": PLACES, "type": ["a", "b"], "body": [{}]},
        {"created_at": TIMES},
    ),
    "pairing_requests": (
        "create update delete",
        {"channel": ["c"], "sender_id": list("stuvw"), "code": list("12345")},
        {"metadata": [{}, {"k": 1}]},
    ),
}


def make_call(chance: random.Random) -> tuple[str, list[Any]]:
    """Give a batch method and what it is called with."""
    kind = chance.choice(list(KINDS))
    verbs, needed, possible = KINDS[kind]
    verb = chance.choice(verbs.split())
    rows = [
        {"id": chance.choice(IDS)}
        | {name: chance.choice(values) for name, values in needed.items()}
        | {name: chance.choice(values) for name, values in possible.items() if chance.random() < 0.6}
        for _ in range(chance.randrange(1, 8))
    ]
    return f"{verb}_{kind}", [row["id"] for row in rows] if verb == "delete" else rows


async def answer(db: DatabaseAdapter, calls: list[tuple[str, list[Any]]]) -> list[Any]:
    """Make calls, several in one transaction; of what is wrong with several rows, either may be told."""
    if len(calls) > 1:
        async with db.transaction() as tx:
            return [(await answer(tx, [call]))[0] for call in calls]
    try:
        async with db.transaction() if db._executor.in_transaction else nullcontext(db) as inside:
            return [await getattr(inside, name)(batch) for name, batch in calls]
    except ElizaSQLError:
        return ["refused"]


async def look(db: DatabaseAdapter) -> dict[str, list[Any]]:
    """Give everything that there is, in the order of its times where a batch has one."""
    found: dict[str, list[Any]] = {
        "memories": await db.get_memories(table_name="messages", include_embedding=True),
        "tasks": await db.get_tasks(),
        "goals": await db.get_goals(),
        "logs": await db.get_logs(limit=1000),
    }
    without_order: list[list[Any]] = [
        await db.get_all_worlds(),
        await db.get_rooms_by_ids(IDS),
        await db.get_entities_by_ids(IDS),
        await db.get_components_for_entities(IDS),
        await db.get_relationships(entity_ids=IDS),
        *await db.get_pairing_requests(["c"]),
    ]
    found |= {str(number): sorted(rows, key=lambda row: row.id) for number, rows in enumerate(without_order)}
    return {name: [_plain(row) for row in rows] for name, rows in found.items()}


def _plain(row: Any) -> dict[str, Any]:
    """Give what must be the same: not whose it is, nor the times that the server has made."""
    fields: dict[str, Any] = row.to_dict()
    for name in ("agentId", "updatedAt", "readyAt", "lastSeenAt"):
        fields.pop(name, None)
    fields["createdAt"] = row.created_at if row.created_at in TIMES else None
    return fields


@pytest.mark.parametrize("seed", [3, 4])
async def test_a_batch_in_several_statements_is_the_same_as_in_one(make_db: MakeAdapter, seed: int) -> None:
    chance = random.Random(seed)
    whole, chunked = await make_db(), await make_db(batch_size=2)
    for db in (whole, chunked):
        await db.create_worlds([{"id": id} for id in PLACES[:6]])
        await db.create_rooms([{"id": id, "source": "s", "type": "t"} for id in PLACES])
        await db.create_entities([{"id": id} for id in PLACES])
    for _ in range(60):
        calls = [make_call(chance) for _ in range(chance.choice((1, 1, 3)))]
        assert await answer(chunked, calls) == await answer(whole, calls), calls
        assert await look(chunked) == await look(whole), calls
