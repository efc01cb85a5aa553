"""A fault proxy: stands between an adapter and a real PostgreSQL, and breaks the network on command.

It knows PostgreSQL's framing (a type byte, then a length), so that a fault happens exactly before, in the middle of or
after a chosen message. Everything can be switched while connections are open:

    proxy.latency, proxy.jitter    seconds before every chunk goes on, in both directions
    proxy.slices                   every byte goes on alone
    proxy.hold()                   black hole: nothing goes on any more, and every socket stays open
    proxy.accepting = "silent"     a connection is accepted and never answered ("reset": it is reset at once)
    await proxy.refuse()           nobody listens
    proxy.when(...)                a fault at one message: the connection is closed, reset or swallowed there
    await proxy.heal()             all of that is over
"""

from __future__ import annotations

import asyncio
import random
import shutil
import socket
import struct
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, quote, urlsplit

Sender = Literal["client", "server"]
Action = Literal["close", "reset", "hold", "note"]
Where = Literal["before", "middle", "after"]
Accepting = Literal["pass", "silent", "reset"]

_SSL_REQUEST, _CANCEL_REQUEST = 80877103, 80877102
_SOCKET = ".s.PGSQL.5432"
_CHUNK = 1 << 16


class Frames:
    """Cuts a stream into whole messages; a client's first one has no type, here b""."""

    def __init__(self, sender: Sender) -> None:
        self._bare = sender == "client"
        self.rest = b""

    def feed(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Give the type and all bytes of every message that is complete now; `rest` is what is not."""
        self.rest += data
        while True:
            head = 0 if self._bare else 1
            if len(self.rest) < head + 4:
                return
            (length,) = struct.unpack_from("!I", self.rest, head)
            if len(self.rest) < head + length:
                return
            message, self.rest = self.rest[: head + length], self.rest[head + length :]
            if self._bare:
                # Another one without a type follows the question whether the server speaks TLS.
                self._bare = length == 8 and struct.unpack_from("!I", message, 4)[0] == _SSL_REQUEST
            yield message[:head], message


@dataclass
class Rule:
    """A fault at one message.

    Attributes:
        sender: Who sends it.
        kind: Its type byte, or several of which one fits: b"C" is the server's CommandComplete, b"s" stands in its
            place when not all rows were asked for, b"Z" is its ReadyForQuery; b"Q" is a client's simple query, b"B" its
            Bind, b"S" its Sync, b"" its startup packet.
        does: What happens to the connection. "hold" leaves both sockets open and lets nothing more through; "note" only
            counts.
        where: Whether the message is kept back, cut in two, or delivered first.
        holding: Bytes that it contains.
        following: Bytes that some message of the client on this connection must have contained before.
        skip: So many matching messages go by first.
        times: After so many the rule is spent; None: never.
        everywhere: "hold" is for the whole proxy, connections to come included.
        fired: Set when it happens.
        count: How often it has happened.
    """

    sender: Sender
    kind: bytes
    does: Action
    where: Where = "before"
    holding: bytes = b""
    following: bytes = b""
    skip: int = 0
    times: int | None = 1
    everywhere: bool = False
    fired: asyncio.Event = field(default_factory=asyncio.Event)
    count: int = 0

    def matches(self, link: _Link, sender: Sender, kind: bytes, message: bytes) -> bool:
        if sender != self.sender or self.holding not in message:
            return False
        if kind != self.kind and (not kind or kind not in self.kind):
            return False
        if self.following and self.following not in link.said:
            return False
        if self.times is not None and self.count >= self.times:
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.count += 1
        self.fired.set()
        return True


class _Cut(Exception):  # noqa: N818 - ends a connection, and is no error
    """The connection ends here; with a reset or in good order."""

    def __init__(self, *, reset: bool) -> None:
        super().__init__()
        self.reset = reset


class _Link:
    """One connection through the proxy."""

    def __init__(self, client: asyncio.StreamWriter) -> None:
        self.client = client
        self.server: asyncio.StreamWriter | None = None
        self.flow = asyncio.Event()
        self.flow.set()
        self.cut = asyncio.Event()
        self.said = b""  # by the client, where some rule asks for it
        self.held = False


class Proxy:
    """Listens on loopback TCP, or on a unix socket in a folder of its own.

    Attributes:
        dsn: The upstream's address, by way of the proxy.
        accepted: Connections that came, those that ask for a cancellation included.
        cancels: Those that asked for one.
        latency: Seconds before every chunk goes on.
        jitter: At most so many more, by chance.
        slices: Every byte goes on alone.
        accepting: What happens to new connections.
    """

    def __init__(self, upstream: str, *, unix: bool = False, seed: int = 0) -> None:
        self._upstream = Path(parse_qs(urlsplit(upstream).query)["host"][0]) / _SOCKET
        parts = urlsplit(upstream)
        self._folder: Path | None = None
        if unix:
            self._folder = Path(tempfile.mkdtemp(prefix="espx-"))
            host = quote(str(self._folder), safe="/")
            self.dsn = f"{parts.scheme}://{parts.netloc}{parts.path}?host={host}&port=5432&sslmode=disable"
        else:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self._port: int = probe.getsockname()[1]
            self.dsn = f"{parts.scheme}://{parts.netloc}127.0.0.1:{self._port}{parts.path}?sslmode=disable"
        self._chance = random.Random(seed)
        self._listener: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._links: set[_Link] = set()
        self._rules: list[Rule] = []
        self._flow = asyncio.Event()
        self._flow.set()
        self._healed = asyncio.Event()
        self.accepted = 0
        self.cancels = 0
        self.latency = 0.0
        self.jitter = 0.0
        self.slices = False
        self.accepting: Accepting = "pass"

    @property
    def open(self) -> int:
        """Connections that are open now."""
        return len(self._links)

    async def __aenter__(self) -> Proxy:
        await self.listen()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    # --- switches ----------------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Black hole: let nothing through any more, and leave every socket open."""
        self._flow.clear()

    def when(self, sender: Sender, kind: bytes, does: Action, where: Where = "before", **more: Any) -> Rule:
        """Add a fault at one message; gives the rule, to wait for."""
        rule = Rule(sender, kind, does, where, **more)
        self._rules.append(rule)
        return rule

    async def refuse(self) -> None:
        """Stop listening: who connects now is refused."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            if self._folder is not None:
                (self._folder / _SOCKET).unlink(missing_ok=True)

    async def listen(self) -> None:
        """Listen, again or for the first time, at the same address."""
        if self._listener is None:
            if self._folder is not None:
                self._listener = await asyncio.start_unix_server(self._accept, self._folder / _SOCKET)
            else:
                self._listener = await asyncio.start_server(self._accept, "127.0.0.1", self._port, backlog=512)

    async def heal(self, *, cut: bool = False) -> None:
        """End every fault. What was held back goes on; connections that were never answered are reset.

        Args:
            cut: Connections on which something was held back are reset instead, as by a router that has forgotten them.
        """
        self._rules.clear()
        self.latency = self.jitter = 0.0
        self.slices = False
        self.accepting = "pass"
        for link in list(self._links):
            if cut and (link.held or not link.flow.is_set()):
                link.cut.set()
            link.held = False
            link.flow.set()
        self._flow.set()
        self._healed.set()
        self._healed = asyncio.Event()
        await self.listen()

    def cut_all(self) -> None:
        """Reset every connection that is open."""
        for link in list(self._links):
            link.cut.set()

    async def close(self) -> None:
        """Stop listening, cut every connection, and leave no task behind."""
        await self.refuse()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    # --- the way through ---------------------------------------------------------------------------------------------

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer, self.accepting), name="proxy-link")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, accepting: Accepting) -> None:
        link = _Link(writer)
        self._links.add(link)
        reset = True
        pumps: list[asyncio.Task[Any]] = []
        try:
            if accepting == "silent":
                await self._healed.wait()
            if accepting != "pass":
                return
            back, link.server = await asyncio.open_unix_connection(self._upstream)
            loop = asyncio.get_running_loop()
            pumps = [
                loop.create_task(self._pump(link, "client", reader, link.server)),
                loop.create_task(self._pump(link, "server", back, writer)),
                loop.create_task(link.cut.wait()),
            ]
            done, _ = await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            errors = [task.exception() for task in done]
            reset = link.cut.is_set() or any(isinstance(error, _Cut) and error.reset for error in errors)
        except OSError:
            pass  # the server is down: to the client the connection breaks
        finally:
            for task in pumps:
                task.cancel()
            if pumps:
                await asyncio.gather(*pumps, return_exceptions=True)
            for each in (link.server, writer):
                if reset:
                    _reset(each)
                await _close(each)
            self._links.discard(link)

    async def _pump(
        self, link: _Link, sender: Sender, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        frames = Frames(sender)
        with suppress(OSError):
            while data := await reader.read(_CHUNK):
                if self.latency or self.jitter:
                    await asyncio.sleep(self.latency + self._chance.random() * self.jitter)
                ready = b""
                for kind, message in frames.feed(data):
                    if sender == "client":
                        self._hear(link, kind, message)
                    rule = next((r for r in self._rules if r.matches(link, sender, kind, message)), None)
                    if rule is None or rule.does == "note":
                        ready += message
                        continue
                    passed = {"before": 0, "middle": len(message) // 2, "after": len(message)}[rule.where]
                    await self._forward(link, writer, ready + message[:passed])
                    ready = message[passed:]
                    if rule.does != "hold":
                        raise _Cut(reset=rule.does == "reset")
                    if rule.everywhere:
                        self.hold()
                    link.flow.clear()
                await self._forward(link, writer, ready)
            await self._forward(link, writer, frames.rest)

    def _hear(self, link: _Link, kind: bytes, message: bytes) -> None:
        if not kind and len(message) == 16 and struct.unpack_from("!I", message, 4)[0] == _CANCEL_REQUEST:
            self.cancels += 1
        if any(rule.following for rule in self._rules):
            link.said += message

    async def _forward(self, link: _Link, writer: asyncio.StreamWriter, data: bytes) -> None:
        while not (self._flow.is_set() and link.flow.is_set()):
            link.held = True
            await self._flow.wait()
            await link.flow.wait()
        if link.cut.is_set():
            return
        if not self.slices:
            writer.write(data)
            await writer.drain()
            return
        for position in range(len(data)):
            writer.write(data[position : position + 1])
            await writer.drain()
            await asyncio.sleep(0)


def _reset(writer: asyncio.StreamWriter | None) -> None:
    """End a connection with RST, or what comes nearest on a unix socket."""
    if writer is None:
        return
    sock = writer.get_extra_info("socket")
    if sock is not None and sock.family == socket.AF_INET:
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _close(writer: asyncio.StreamWriter | None) -> None:
    if writer is not None:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
