"""The commands: `bayestune fit | evaluate | predict | compare | …`.

`start` answers what needs no torch, `parser` derives their options from the constructors,
`commands` does what they say, and `guard` tells the user in a line what went wrong.
"""

from bayestune.cli.start import main

__all__ = ["main"]
