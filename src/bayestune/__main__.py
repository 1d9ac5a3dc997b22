"""`python -m bayestune`: the commands."""

import sys

from bayestune.cli import main

if __name__ == "__main__":
    sys.exit(main())
