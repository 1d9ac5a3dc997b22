"""`python -m bayestune`: the commands."""

import sys

from bayestune.cli import main

sys.exit(main())
