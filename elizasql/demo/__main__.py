"""`python -m elizasql.demo`."""

import sys

from elizasql.demo import main

if __name__ == "__main__":
    sys.exit(main())
