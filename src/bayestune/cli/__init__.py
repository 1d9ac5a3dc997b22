"""The commands: `bayestune fit | evaluate | predict | compare | …`.

`parser` derives their options from the constructors, `commands` does what they say.
"""

from bayestune.cli.parser import main

__all__ = ["main"]
