"""The commands: `bayestune fit | evaluate | predict | compare | …`.

`start` answers what needs no torch; `guard` runs a command and says in one line what went wrong.
The table of commands in `parser` names the function of each; `command_options` has their options.
"""

from bayestune.cli.start import main

__all__ = ["main"]
