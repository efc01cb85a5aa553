"""One large agent among many small ones: there, a plan that is best on average may read all that is the large one's.

Loaded in a transaction that is rolled back, so that no other test sees it.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import asyncpg

from elizasql import Config, _pool
from elizasql._statements import Statement

SMALL_AGENTS = 1500
LARGE = 8000

# Blocks that the scans of a statement may touch for one row, the way down a few indexes. All that is the large agent's
# are more than a hundred in every table.
ENOUGH = 40


@dataclass(frozen=True)
class Skew:
    """The large agent, and one of each that is its own.

    Attributes:
        room, entity: A membership.
        world: With one room in it; the others have ten.
        key_hash: Of the cache entry "key 5".
        request, entry: Of pairing; each is alone in its channel, "channel 5".
    """

    session: asyncpg.Connection[Any]
    agent: UUID
    world: UUID
    room: UUID
    entity: UUID
    key_hash: bytes
    request: UUID
    entry: UUID

    async def check(self, statement: Statement, **params: Any) -> None:
        """Run a statement by its generic plan, and refuse one that reads more than a few blocks."""
        params = {"agent_id": self.agent, **params}
        await self.session.execute(f"PREPARE planned AS {statement.sql}")
        arguments = ", ".join(_literal(params[name]) for name in statement.params)
        text = await self.session.fetchval(
            f"EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) EXECUTE planned({arguments})"
        )
        await self.session.execute("DEALLOCATE planned")
        root = json.loads(text)[0]["Plan"]
        plan = json.dumps(root, indent=1)
        assert '"Seq Scan"' not in plan, (statement.name, plan)
        blocks = _blocks_scanned(root)
        assert blocks <= ENOUGH, (statement.name, blocks, plan)


def _blocks_scanned(node: dict[str, Any]) -> int:
    """Give the blocks that the scans of a plan read; those that it writes depend on where there is room."""
    if "Plans" in node:
        return sum(map(_blocks_scanned, node["Plans"]))
    # A scan of a CTE counts what the CTE did.
    return int(node["Shared Hit Blocks"] + node["Shared Read Blocks"]) if "Relation Name" in node else 0


def _literal(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, list):
        items = (_text(item).replace("\\", "\\\\").replace('"', '\\"') for item in value)
        value = "{" + ",".join(f'"{item}"' for item in items) + "}"
    return "'" + _text(value).replace("'", "''") + "'"


def _text(value: Any) -> str:
    return "\\x" + value.hex() if isinstance(value, bytes) else str(value)


@asynccontextmanager
async def load(dsn: str) -> AsyncIterator[Skew]:
    """Load the agents and analyze the tables; everything is gone again at the end."""
    session = await asyncpg.connect(dsn, server_settings=_pool.session_settings(Config.load(environ={})))
    transaction = session.transaction()
    await transaction.start()
    try:
        agent = uuid4()
        await session.execute(LOAD.format(agent=agent, small=SMALL_AGENTS, large=LARGE))
        tables = ("worlds", "rooms", "entities", "participants", "cache", "pairing_requests", "pairing_allowlist")
        await session.execute(f"ANALYZE {', '.join(f'elizasql.{table}' for table in tables)}")
        row = await session.fetchrow(PICK, agent, f"world{1 + LARGE // 10}")
        assert row is not None
        yield Skew(session, agent, *row)
    finally:
        await transaction.rollback()
        await session.close()


LOAD = """
CREATE TEMPORARY TABLE owned ON COMMIT DROP AS
SELECT gen_random_uuid() AS agent_id, 1 AS n FROM generate_series(1, {small})
UNION ALL
SELECT '{agent}', n FROM generate_series(1, {large}) AS n;

INSERT INTO elizasql.agents (id, name) SELECT DISTINCT agent_id, 'skew' FROM owned;

INSERT INTO elizasql.worlds (agent_id, id, created_at)
SELECT agent_id, md5('world' || n)::uuid, now() - random() * interval '90 days' FROM owned;

INSERT INTO elizasql.rooms (agent_id, id, source, type, world_id, created_at)
SELECT
    agent_id, md5('room' || n)::uuid, 's', 't', md5('world' || 1 + n / 10)::uuid,
    now() - random() * interval '90 days'
FROM owned;

INSERT INTO elizasql.entities (agent_id, id, created_at)
SELECT agent_id, md5('entity' || n)::uuid, now() - random() * interval '90 days' FROM owned;

INSERT INTO elizasql.participants (agent_id, room_id, entity_id, created_at)
SELECT agent_id, md5('room' || n)::uuid, md5('entity' || n)::uuid, now() - random() * interval '90 days' FROM owned;

INSERT INTO elizasql.cache (agent_id, key, value, expires_at)
SELECT agent_id, 'key ' || n, '1', now() + random() * interval '90 days' FROM owned;

INSERT INTO elizasql.pairing_requests (agent_id, id, channel, sender_id, code)
SELECT agent_id, md5('request' || n)::uuid, 'channel ' || n, 'sender ' || n, 'code ' || n FROM owned;

INSERT INTO elizasql.pairing_allowlist (agent_id, id, channel, sender_id)
SELECT agent_id, md5('entry' || n)::uuid, 'channel ' || n, 'sender ' || n FROM owned;
"""

PICK = """
SELECT
    md5($2)::uuid, md5('room5')::uuid, md5('entity5')::uuid, key_hash, md5('request5')::uuid, md5('entry5')::uuid
FROM elizasql.cache
WHERE agent_id = $1 AND key = 'key 5'
"""
