"""The commands put together, and what becomes of every error: one line and an exit code."""

from __future__ import annotations

import asyncio
import functools
import io
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import orjson
import typer

from elizasql import __version__
from elizasql.config import redact
from elizasql.errors import ArgumentError, DeadlineError, ElizaSQLError, EmbeddedServerError, UnavailableError

from . import _out, data, doctor, give_up_output, look, migrate, queries, reembed, server

FAILED, USAGE, UNAVAILABLE, INTERRUPTED = 1, 2, 3, 130

EPILOG = (
    "Exit codes: 0 done, 1 failed, 2 used wrongly, 3 the server cannot be reached or does not run, 130 interrupted. "
    "All commands but psql and demo take --json. "
    "The server is POSTGRES_URL, else the embedded one in PGLITE_DATA_DIR or ./pglite."
)

app = typer.Typer(
    name="elizasql",
    help="The memory of an AI agent on PostgreSQL: its server, its schema, its data.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    """Take what stands before the command."""
    if version:
        print(f"elizasql {__version__}")
        raise typer.Exit


for module in (server, look, data, reembed, doctor, queries):
    module.add_to(app)
app.add_typer(migrate.app, name="migrate")


# To put it together takes 40 ms.
_command = functools.cache(functools.partial(typer.main.get_command, app))


def run(argv: Sequence[str]) -> int:
    """Run a command and give the exit code; see elizasql.cli for what they mean."""
    # What the library logs about retries and slow calls would stand between our lines.
    logging.getLogger("elizasql").addHandler(logging.NullHandler())
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            if "--json" in argv:
                stream.reconfigure(encoding="utf-8")  # JSON is, whatever the terminal is
            else:
                stream.reconfigure(errors="replace")  # a memory may hold letters that the terminal has not
    with _ended_in_order():
        return _run(argv)


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Take SIGTERM, and the SIGHUP of a terminal that is closed, as Ctrl-C: what was started is stopped again."""
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    for number in numbers:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _interrupt(*_: object) -> None:
    if signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, signal.default_int_handler):  # asyncio's, which waits
        signal.raise_signal(signal.SIGINT)
        return
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        raise KeyboardInterrupt from None
    # Between two callbacks: inside of one it may take along what wakes a task, and the loop would wait for it for ever.
    loop.call_soon_threadsafe(_raise_interrupt)


def _raise_interrupt() -> None:
    raise KeyboardInterrupt


def _run(argv: Sequence[str]) -> int:
    try:
        code = _command()(args=list(argv), prog_name="elizasql", standalone_mode=False)
        sys.stdout.flush()
    except SystemExit as error:
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        return _complain_of_file(error.__context__, argv)  # typer exits for that by itself
    except (KeyboardInterrupt, typer.Abort) as error:
        return _complain("interrupted", error, INTERRUPTED, argv)
    except data.InterruptedWorkError as error:
        return _complain(str(error), error, INTERRUPTED, argv)
    except ArgumentError as error:
        return _complain(str(error), error, USAGE, argv)
    except (UnavailableError, EmbeddedServerError, DeadlineError) as error:
        return _complain(str(error), error, UNAVAILABLE, argv)
    except ElizaSQLError as error:
        return _complain(str(error), error, FAILED, argv)
    except OSError as error:
        return _complain_of_file(error, argv)
    except MemoryError as error:
        return _complain("out of memory", error, FAILED, argv)
    except Exception as error:
        # What typer finds wrong with the command line has its own class, in a module that differs between versions.
        explain = getattr(error, "format_message", None)
        if explain is None:
            if os.environ.get("ELIZASQL_TRACEBACK"):
                raise
            told = f"{type(error).__name__}: {error}; this is a fault of elizasql, ELIZASQL_TRACEBACK=1 shows where"
            return _complain(told, error, FAILED, argv)
        if type(error).__name__ == "NoArgsIsHelpError":
            print(explain(), file=sys.stderr)
            return USAGE
        return _complain(explain(), error, USAGE, argv)
    if code == INTERRUPTED:
        return _complain("interrupted", KeyboardInterrupt(), INTERRUPTED, argv)
    return code if isinstance(code, int) else 0


def _complain_of_file(error: OSError, argv: Sequence[str]) -> int:
    """Say which file is at fault; whoever read our output and has seen enough is none."""
    if isinstance(error, BrokenPipeError) and error.filename is None:  # else it is the report whose reader has gone
        give_up_output()  # no more may be written, not even by the interpreter's exit
        return 0
    try:
        sys.stdout.flush()
    except OSError:  # it was the output's: what is left of it would fail again at the interpreter's exit
        give_up_output()
    where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    return _complain(f"{where}{error.strerror or error}", error, FAILED, argv)


def _complain(message: str, error: BaseException, code: int, argv: Sequence[str]) -> int:
    """Print one line that says what is wrong, without any password in it."""
    line = " ".join(_out.clean(message).split())
    # Also of an address that was given in place of something else, and is none or was taken for a path.
    line = re.sub(r"postgres(ql)?:/\S*[^\s:;,.'\")]", lambda found: redact(found[0]), line)
    if "--json" in argv:
        line = orjson.dumps({"error": line, "type": type(error).__name__, "exit_code": code}).decode()
    else:
        line = f"elizasql: {line}"
    print(line, file=sys.stderr)
    return code
