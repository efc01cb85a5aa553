"""The process behind `elizasql up`: uses the embedded server until it gets SIGTERM, so that it stays up.

It holds keeper.lock, with its process id in it, for as long as it lives. It answers its starter with one line of JSON.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import orjson

from elizasql import _embedded
from elizasql.errors import ElizaSQLError


async def keep(data_dir: Path) -> int:
    """Use the server in `data_dir` until SIGTERM or SIGINT."""
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    try:
        cluster = _embedded._Cluster(data_dir)
        cluster.claim()
        # The folder counts as ours from its first lock file on.
        cluster.open_lock("elizasql.lock").close()
        lock = cluster.open_lock("keeper.lock")
        if lock.take():
            os.ftruncate(lock.fd, 0)
            os.pwrite(lock.fd, str(os.getpid()).encode(), 0)
        else:
            ended.set()  # another one was faster: nothing is left to do
        server = await _embedded.acquire(data_dir)
    except (ElizaSQLError, OSError) as error:
        answer(error=str(error))
        return 1
    answer(dsn=server.dsn)
    await ended.wait()
    await server.release()
    return 0


def answer(**words: str) -> None:
    """Tell the starter, and let go of its pipe."""
    os.write(1, orjson.dumps(words, option=orjson.OPT_APPEND_NEWLINE))
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)


def main() -> None:
    """Keep the server that is named on the command line up, as nobody's child."""
    if os.fork():
        os._exit(0)
    sys.exit(asyncio.run(keep(Path(sys.argv[1]))))
