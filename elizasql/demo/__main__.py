"""`python -m elizasql.demo`."""

import sys

from elizasql.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
