"""The command `elizasql`, also as `python -m elizasql`. The demo works without the extra `cli`."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from elizasql import __version__, cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and give the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - for good
    # Ctrl-C may come before what was to run has begun; one line says that, and Python would add another.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    if argv[:1] == ["demo"]:
        from elizasql import demo  # noqa: PLC0415 - no other command needs it

        return demo.main(argv[1:])
    if argv == ["--version"]:
        print(f"elizasql {__version__}")
        return 0
    return cli.main(argv)


if __name__ == "__main__":
    sys.exit(main())
