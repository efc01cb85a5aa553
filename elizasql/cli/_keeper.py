"""The process behind `elizasql up`: uses the embedded server until it gets SIGTERM, so that it stays up.

It holds a lock on keeper.lock, with its process id in it, for as long as it lives. The file is put in its place locked
and written: whoever finds it locked reads the id of who has locked it, and looking at it is in nobody's way. The id is
that of its own namespace of processes, which is written beside it: each container has one. It answers its starter with
one line of JSON.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import orjson

from elizasql import _embedded
from elizasql.errors import ElizaSQLError

_LOCK = "keeper.lock"
_PATIENCE = 120.0  # of a start of the server that is under way


async def keep(data_dir: Path) -> int:
    """Use the server in `data_dir` until SIGTERM or SIGINT."""
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    try:
        cluster = _embedded._Cluster(data_dir)
        cluster.claim()
        async with cluster.lifecycle(time.monotonic() + _PATIENCE):
            if find_keeper(data_dir) is None:
                _publish(cluster)
            else:
                ended.set()  # another one was faster: nothing is left to do
        server = await _embedded.acquire(data_dir)
    except ElizaSQLError as error:
        answer(error=str(error))
        return 1
    except OSError as error:
        answer(error=f"{data_dir} cannot hold the embedded server: {error.strerror or error}")
        return 1
    answer(dsn=server.dsn)
    await ended.wait()
    await server.release()
    return 0


def _publish(cluster: _embedded._Cluster) -> None:
    """Become the keeper."""
    new = cluster.home / f"{_LOCK}.new"
    new.unlink(missing_ok=True)
    lock = cluster.open_lock(new.name)
    lock.take()
    os.write(lock.fd, f"{os.getpid()} {_namespace()}".encode())
    new.replace(cluster.home / _LOCK)


@dataclass(frozen=True)
class Keeper:
    """Who keeps a server up.

    Attributes:
        pid: Its process id, as it knows it.
        here: Whether that is its id for us, too; False in another container, where it may be anybody's.
    """

    pid: int
    here: bool


def find_keeper(data_dir: Path) -> Keeper | None:
    """Give the keeper, None where there is none."""
    path = data_dir.expanduser().resolve() / _LOCK
    if not path.is_file():
        return None
    lock = _embedded._Lock(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    try:
        if lock.take(shared=True):
            return None
        pid, _, namespace = os.pread(lock.fd, 64, 0).decode().partition(" ")
        return Keeper(int(pid), namespace == _namespace())
    finally:
        lock.close()


def _namespace() -> str:
    """Name the namespace of this process's id; nothing where the system knows only one."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def answer(**words: str) -> None:
    """Tell the starter, and let go of its pipe."""
    os.write(1, orjson.dumps(words, option=orjson.OPT_APPEND_NEWLINE))
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)


def main() -> None:
    """Keep the server that is named on the command line up, as nobody's child."""
    if os.fork():
        os._exit(0)
    sys.exit(asyncio.run(keep(Path(sys.argv[1]))))
