"""`python -m elizasql demo`: see elizasql.demo."""

from __future__ import annotations

import sys

from elizasql import __version__, demo


def main(argv: list[str]) -> int:
    """Run a command and give the exit code."""
    if argv[:1] == ["demo"]:
        return demo.main(argv[1:])
    if argv == ["--version"]:
        print(f"elizasql {__version__}")
        return 0
    print("usage: python -m elizasql demo [--file FILE] [--data-dir DIR] [--dsn DSN]", file=sys.stderr)
    return 0 if argv[:1] in (["-h"], ["--help"]) else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
