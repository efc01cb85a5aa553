"""The command `elizasql`; needs the extra `cli`: pip install 'elizasql[cli]'.

Exit codes: 0 done; 1 failed; 2 used wrongly; 3 the server cannot be reached or does not run; 130 interrupted, by
Ctrl-C, SIGTERM or a terminal that was closed. An error is one line on standard error (with `--json` one line of JSON);
what a command gives goes to standard output.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

__all__ = ["give_up_output", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and give the exit code.

    Args:
        argv: What stands behind `elizasql`; None: the process's arguments.
    """
    try:
        from . import _app  # noqa: PLC0415 - typer and rich are an extra
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich", "click"):
            raise
        print(f"elizasql: {error.name} is missing: pip install 'elizasql[cli]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # they take a moment to load
        print("elizasql: interrupted", file=sys.stderr)
        return 130
    return _app.run(sys.argv[1:] if argv is None else argv)


def give_up_output() -> None:
    """Let nothing more go to standard output, not even what the interpreter finds in its buffer at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
