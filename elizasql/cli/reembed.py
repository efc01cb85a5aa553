"""`elizasql reembed`: an agent's vectors move to another width."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from elizasql.errors import ArgumentError, ElizaSQLError, ReembeddingError
from elizasql.reembedding import call

from . import _out, _place, data
from ._place import AgentId, DataDir, Dsn, Json


def add_to(app: typer.Typer) -> None:
    """Put the command into the application."""
    app.command()(reembed)


def reembed(
    agent: AgentId = None,
    to: Annotated[int | None, typer.Option(help="The new width: 384, 512, 768, 1024, 1536 or 3072.")] = None,
    function: Annotated[
        str | None,
        typer.Option(
            "--with",
            metavar="MODULE:FUNCTION",
            help="What embeds: takes a list of texts, gives an array of shape (texts, width); may be async.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts in one call of the function.")] = 64,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Let memories without text lose their vectors.")
    ] = False,
    abandon: Annotated[bool, typer.Option("--abandon", help="Give up a move that was broken off instead.")] = False,
    dsn: Dsn = None,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Give an agent's vectors another width, while it works. May be broken off; the next run goes on."""
    if abandon:
        if to is not None or function is not None:
            raise ArgumentError("--abandon takes neither --to nor --with")
        embed = None
    elif to is None or function is None:
        raise ArgumentError("give --to and --with, or --abandon")
    else:
        embed = find_function(function)

    async def work() -> dict[str, Any]:
        async with _place.reach(dsn, data_dir) as place:
            chosen = await place.choose_agent(agent)
            async with place.open(chosen, timeout=data._PATIENCE) as db:
                if embed is None or to is None:
                    return {"agent_id": chosen, "dropped": await db.abandon_reembedding(timeout=data.LONG)}
                with _out.progress(shown=not json) as advance:
                    done = await db.reembed(
                        to,
                        embed,
                        batch_size=batch_size,
                        skip_missing=skip_missing,
                        progress=lambda done, total: advance("embed", done, total),
                        timeout=data.LONG,
                    )
                return {"agent_id": chosen, **asdict(done)}

    try:
        told = asyncio.run(work())
    except KeyboardInterrupt:
        raise data.InterruptedWorkError("interrupted: what was embedded so far stays; do it again to go on") from None
    if json:
        _out.emit(told)
    elif abandon:
        _out.say(f"{told['dropped']:,} vectors dropped")
    else:
        _out.table(["type", "vectors"], list(told["types"].items()))
        for id in told["skipped"]:
            _out.say(f"no text, no vector: {id}", style="warning")
        _out.say(
            f"{told['embedded']:,} embedded, {len(told['skipped']):,} skipped, {told['dropped']:,} of the old width "
            f"dropped in {told['seconds']:,.1f} s; the agent has {told['dimension']} dimensions now"
        )


def find_function(name: str) -> Callable[[list[str]], Any]:
    """Find a function by `module:function`, in the working folder, too; what it raises becomes one line.

    Raises:
        ArgumentError: There is no such module, or no such function in it.
    """
    module_name, colon, path = name.partition(":")
    if not (module_name and colon and path):
        raise ArgumentError(f"--with: {name} has not the form MODULE:FUNCTION")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise ArgumentError(f"--with: {module_name} cannot be imported: {type(error).__name__}: {error}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise ArgumentError(f"--with: {module_name} has no {path}")
        found = getattr(found, part)
    if not callable(found):
        raise ArgumentError(f"--with: {name} is not a function but {type(found).__name__}")
    function: Callable[[list[str]], Any] = found

    async def embed(texts: list[str]) -> Any:
        try:
            return await call(function, texts)
        except ElizaSQLError:
            raise
        except Exception as error:
            raise ReembeddingError(f"{name}: {type(error).__name__}: {error}") from error

    return embed
