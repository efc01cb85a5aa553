"""The proxy itself: what it breaks, and that it breaks it where it was told to."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from tests.faults.harness import no_leaks
from tests.faults.proxy import Frames, Proxy
from tests.faults.server import FaultServer, until

# What a connection says that broke while it waited.
BROKEN = (asyncpg.PostgresConnectionError, asyncpg.InterfaceError, OSError)


@asynccontextmanager
async def connected(proxy: Proxy, **options: Any) -> AsyncIterator[asyncpg.Connection[Any]]:
    connection = await asyncpg.connect(proxy.dsn, timeout=10, **options)
    try:
        yield connection
    finally:
        connection.terminate()


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["tcp", "unix"])
async def proxy(server: FaultServer, request: pytest.FixtureRequest) -> AsyncIterator[Proxy]:
    async with no_leaks(), Proxy(server.dsn, unix=request.param) as made:
        yield made


def message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!I", len(body) + 4) + body


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 1000])
def test_frames_come_out_as_they_went_in(size: int) -> None:
    startup = struct.pack("!II", 8, 80877103), struct.pack("!II", 13, 196608) + b"user\0"
    messages = [*startup, message(b"Q", b"COMMIT;\0"), message(b"S", b""), message(b"X", b"")]
    stream, frames = b"".join(messages), Frames("client")
    out = [each for start in range(0, len(stream), size) for each in frames.feed(stream[start : start + size])]
    assert [whole for _, whole in out] == messages
    assert [kind for kind, _ in out] == [b"", b"", b"Q", b"S", b"X"]
    assert frames.rest == b""


def test_a_frame_that_is_not_complete_is_kept() -> None:
    frames = Frames("server")
    assert list(frames.feed(message(b"C", b"SELECT 1\0")[:-1])) == []
    assert list(frames.feed(b"\0Z")) == [(b"C", message(b"C", b"SELECT 1\0"))]
    assert frames.rest == b"Z"


async def test_nothing_is_changed_on_the_way(proxy: Proxy) -> None:
    async with connected(proxy) as connection:
        text = "x" * 300_000
        assert await connection.fetchval("SELECT $1::text", text) == text
        assert await connection.fetchval("SELECT count(*) FROM generate_series(1, 1000)") == 1000
        assert proxy.accepted == proxy.open == 1


async def test_connections_are_counted_and_end_with_the_client(proxy: Proxy) -> None:
    connections = [await asyncpg.connect(proxy.dsn) for _ in range(3)]
    assert (proxy.accepted, proxy.open) == (3, 3)
    for connection in connections:
        await connection.close()

    async def none() -> bool:
        return proxy.open == 0

    await until(none, "every connection has ended")
    assert proxy.accepted == 3


async def test_latency(proxy: Proxy) -> None:
    async with connected(proxy) as connection:
        await connection.fetchval("SELECT 1")
        proxy.latency, proxy.jitter = 0.05, 0.01
        began = time.monotonic()
        assert await connection.fetchval("SELECT 1") == 1
        assert time.monotonic() - began >= 0.1
        await proxy.heal()
        assert proxy.latency == proxy.jitter == 0


async def test_slices(proxy: Proxy) -> None:
    proxy.slices = True
    async with connected(proxy) as connection:
        assert await connection.fetchval("SELECT repeat('ab', 1000)") == "ab" * 1000


async def test_black_hole_keeps_every_socket_open(proxy: Proxy) -> None:
    async with connected(proxy) as connection:
        await connection.fetchval("SELECT 1")
        proxy.hold()
        asked = asyncio.create_task(connection.fetchval("SELECT 2"))
        connecting = asyncio.create_task(asyncpg.connect(proxy.dsn))
        done, _ = await asyncio.wait({asked, connecting}, timeout=0.3)
        assert not done
        assert proxy.open == 2
        await proxy.heal()
        assert await asked == 2
        await (await connecting).close()


async def test_healing_can_forget_what_was_held_back(proxy: Proxy) -> None:
    async with connected(proxy) as connection, connected(proxy) as idle:
        await connection.fetchval("SELECT 1")
        proxy.hold()
        asked = asyncio.create_task(connection.fetchval("SELECT 2"))

        async def held() -> bool:
            return any(link.held for link in proxy._links)

        await until(held, "the question has come to the proxy")
        await proxy.heal(cut=True)
        with pytest.raises(BROKEN):
            await asked
        assert await idle.fetchval("SELECT 3") == 3


async def test_refused(proxy: Proxy) -> None:
    async with connected(proxy) as connection:
        await proxy.refuse()
        with pytest.raises((ConnectionRefusedError, FileNotFoundError)):
            await asyncpg.connect(proxy.dsn)
        assert await connection.fetchval("SELECT 1") == 1
    await proxy.heal()
    async with connected(proxy) as connection:
        assert await connection.fetchval("SELECT 1") == 1


async def test_accepted_and_never_answered(proxy: Proxy) -> None:
    proxy.accepting = "silent"
    with pytest.raises((asyncio.TimeoutError, TimeoutError)):
        await asyncpg.connect(proxy.dsn, timeout=0.2)
    assert proxy.accepted == 1
    assert proxy.open == 1
    # Without TLS: an attempt at it that is cut is followed by one without, which succeeds.
    waiting = asyncio.create_task(asyncpg.connect(proxy.dsn, timeout=10, ssl="disable"))

    async def came() -> bool:
        return proxy.accepted == 2

    await until(came, "the second has come")
    await proxy.heal()
    with pytest.raises(BROKEN):
        await waiting
    async with connected(proxy) as connection:
        assert await connection.fetchval("SELECT 1") == 1


async def test_reset_when_accepted(proxy: Proxy) -> None:
    proxy.accepting = "reset"
    with pytest.raises(BROKEN):
        await asyncpg.connect(proxy.dsn, timeout=10)


@pytest.mark.parametrize("does", ["close", "reset"])
@pytest.mark.parametrize("where", ["before", "middle", "after"])
async def test_cut_at_the_end_of_a_write(proxy: Proxy, server: FaultServer, does: Any, where: Any) -> None:
    """The server has done it, and the client does not hear of it, unless it is cut after the very last message."""
    async with server.admin() as admin:
        await admin.execute("CREATE TABLE IF NOT EXISTS public.cuts (n int); TRUNCATE public.cuts")
        await admin.execute("GRANT ALL ON public.cuts TO elizasql")
        async with connected(proxy) as connection:
            rule = proxy.when("server", b"C", does, where, holding=b"INSERT")
            with pytest.raises(BROKEN):
                await connection.execute("INSERT INTO public.cuts SELECT $1::int", 1)
            assert rule.fired.is_set()
            assert connection.is_closed()

        async def done() -> bool:
            return bool(await admin.fetchval("SELECT count(*) = 1 FROM public.cuts"))

        await until(done, "the row is there")
        assert await admin.fetchval("SELECT count(*) FROM public.cuts") == 1
        # Once: the rule is spent.
        async with connected(proxy) as connection:
            await connection.execute("INSERT INTO public.cuts SELECT $1::int", 2)


async def test_cut_before_the_server_hears_of_it(proxy: Proxy, server: FaultServer) -> None:
    async with server.admin() as admin:
        await admin.execute("CREATE TABLE IF NOT EXISTS public.cuts (n int); TRUNCATE public.cuts")
        await admin.execute("GRANT ALL ON public.cuts TO elizasql")
        async with connected(proxy) as connection:
            await connection.execute("BEGIN")
            await connection.execute("INSERT INTO public.cuts SELECT $1::int", 1)
            proxy.when("client", b"Q", "reset", holding=b"COMMIT")
            with pytest.raises(BROKEN):
                await connection.execute("COMMIT")

        async def gone() -> bool:
            sessions = "SELECT count(*) = 0 FROM pg_stat_activity WHERE usename = 'elizasql' AND state ^@ 'idle in tr'"
            return bool(await admin.fetchval(sessions))

        await until(gone, "the session has ended")
        assert await admin.fetchval("SELECT count(*) FROM public.cuts") == 0


async def test_rules_wait_for_what_the_client_said(proxy: Proxy) -> None:
    async with connected(proxy) as first, connected(proxy) as second:
        rule = proxy.when("server", b"Z", "reset", following=b"needle", skip=1)
        assert await first.fetchval("SELECT 1") == 1
        assert await second.fetchval("SELECT $1::text", "hay") == "hay"
        assert not rule.fired.is_set()
        with pytest.raises(BROKEN):
            for _ in range(3):
                await second.fetchval("SELECT $1::text", "needle")
        assert rule.count == 1
        assert await first.fetchval("SELECT 1") == 1


async def test_hold_at_a_message_is_for_its_connection(proxy: Proxy) -> None:
    async with connected(proxy) as first, connected(proxy) as second:
        rule = proxy.when("server", b"Z", "hold", following=b"needle")
        asked = asyncio.create_task(first.fetchval("SELECT $1::text", "needle"))
        await rule.fired.wait()
        assert await second.fetchval("SELECT 1") == 1
        assert not asked.done()
        await proxy.heal()
        assert await asked == "needle"


async def test_hold_everywhere(proxy: Proxy) -> None:
    async with connected(proxy) as first, connected(proxy) as second:
        rule = proxy.when("server", b"Z", "hold", following=b"needle", everywhere=True)
        asked = asyncio.create_task(first.fetchval("SELECT $1::text", "needle"))
        await rule.fired.wait()
        other = asyncio.create_task(second.fetchval("SELECT 1"))
        done, _ = await asyncio.wait({asked, other}, timeout=0.2)
        assert not done
        await proxy.heal()
        assert (await asked, await other) == ("needle", 1)


async def test_cancellations_are_counted(proxy: Proxy) -> None:
    async with connected(proxy) as connection:
        with pytest.raises((asyncio.TimeoutError, TimeoutError)):
            await connection.fetchval("SELECT pg_sleep(60)", timeout=0.1)
        assert await connection.fetchval("SELECT 1", timeout=10) == 1
        assert proxy.cancels == 1


async def test_server_that_is_down(proxy: Proxy, server: FaultServer) -> None:
    proxy._upstream = proxy._upstream.with_name("nobody")
    with pytest.raises(BROKEN):
        await asyncpg.connect(proxy.dsn, timeout=10)


async def test_closing_cuts_what_is_open(server: FaultServer) -> None:
    async with no_leaks():
        async with Proxy(server.dsn) as made:
            connection = await asyncpg.connect(made.dsn)
            made.hold()
            asked = asyncio.create_task(connection.fetchval("SELECT 1"))
            silent = asyncio.create_task(asyncpg.connect(made.dsn))

            async def came() -> bool:
                return made.open == 2

            await until(came, "both are there")
        for task in (asked, silent):
            with pytest.raises(BROKEN):
                await task
        assert connection.is_closed()
