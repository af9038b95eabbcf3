"""Train, validate, test or predict from the command line: the same as the console script `bsdp`."""

import sys

from bsdp.cli import main

if __name__ == "__main__":
    sys.exit(main())
