"""A PGlite as a server: Node runs it, on a copy of its folder, behind a socket that only we can enter."""

from __future__ import annotations

import asyncio
import functools
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from elizasql import _embedded
from elizasql._calls import wait_for
from elizasql.errors import ConfigurationError

# Seconds for the start: it is a database in WebAssembly that may have to recover.
_PATIENCE = 120.0
_ADVICE = (
    "run this in the folder of your ElizaOS project, where PGlite is installed, "
    "after `npm install --no-save @electric-sql/pglite-socket` of the version that fits it"
)


@asynccontextmanager
async def serve_pglite(folder: Path) -> AsyncIterator[str]:
    """Give the connection string of a server for the folder of a PGlite; it takes one connection at a time.

    The folder itself is not touched: two processes that open it would destroy it.

    Raises:
        ConfigurationError: Node or one of its packages is missing, or PGlite cannot read the folder.
    """
    node = shutil.which("node")
    if node is None:
        raise ConfigurationError("Node is missing, which a PGlite needs: install it, or import from PostgreSQL")
    with tempfile.TemporaryDirectory(prefix="esql-") as place:
        copy = Path(place) / "data"
        # Waited for also when cancelled: what it copies must not come into a place that is being removed.
        await _embedded._in_thread(functools.partial(shutil.copytree, folder, copy))
        where = [str(Path.cwd()), str(folder)]
        process = await asyncio.create_subprocess_exec(
            node,
            str(Path(__file__).with_name("node.mjs")),
            *(str(copy), str(Path(place) / ".s.PGSQL.5432"), *where),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            try:
                answer = (await wait_for(process.stdout.readline(), _PATIENCE, "elizasql-node")).decode().strip()
            except asyncio.TimeoutError:
                raise ConfigurationError(f"PGlite does not open {folder} within {_PATIENCE:g} s") from None
            if answer != "ready":
                why = answer.removeprefix("error ") or "Node ended at once"
                raise ConfigurationError(f"PGlite does not open {folder}: {why}; {_ADVICE}")
            yield f"postgresql://postgres@/postgres?host={quote(place)}&port=5432&sslmode=disable"
        finally:
            process.stdin.close()
            try:
                with suppress(asyncio.TimeoutError):
                    await wait_for(process.wait(), 5, "elizasql-node")
            finally:
                if process.returncode is None:
                    with suppress(ProcessLookupError):
                        process.kill()
                    await process.wait()
