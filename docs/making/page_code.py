"""The code on a page: its blocks, the commands in them, and what is wrong with either.

The tutorials are run from what these functions find, so page and script cannot differ.
"""

import re
import shlex
import subprocess
from functools import cache
from typing import NamedTuple

FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[\w-]+)?[^\n]*\n(?P<text>.*?)^(?P=indent)```",
    re.MULTILINE | re.DOTALL,
)
HEREDOC = re.compile(r"<<-?\s*'?(?P<end>\w+)'?")
ELLIPSIS = "…"  # stands for what a reader puts there


class Block(NamedTuple):
    """A block of code: its language, "" for none, and its text."""

    language: str
    text: str


def blocks_of(markdown: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found = []
    for match in FENCE.finditer(markdown):
        lines = match["text"].splitlines(keepends=True)
        text = "".join(line.removeprefix(match["indent"]) for line in lines)
        found.append(Block(match["language"] or "", text))
    return found


def commands_of(script: str) -> list[str]:
    """The commands of a shell script, with their continued lines and here-documents."""
    found: list[str] = []
    lines = iter(script.splitlines())
    for line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        whole = line
        if end := HEREDOC.search(line):
            for more in lines:
                whole += "\n" + more
                if more == end["end"]:
                    break
        while _goes_on(whole) and (more := next(lines, None)) is not None:
            whole += "\n" + more
        found.append(whole)
    return found


def _goes_on(text: str) -> bool:
    """Whether a command's line ends in a backslash or within a quotation."""
    if "<<" in text:
        return False
    if text.rstrip().endswith("\\"):
        return True
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return True
    return False


def words_of(command: str) -> list[str]:
    """A command's words as the shell has them, without comments, pipes and here-documents."""
    first_line = command.split("<<")[0].replace("\\\n", " ")
    words = shlex.split(first_line, comments=True)
    stops = [i for i, word in enumerate(words) if word in ("|", ">", "&", "&&", ";")]
    return words[: min(stops, default=len(words))]


def wrong_code(markdown: str) -> list[str]:
    """What is wrong with the code of a page, a line each.

    Python has to compile, shell to parse, and the commands of bayestune to have their options.
    """
    found = []
    for block in blocks_of(markdown):
        if block.language == "python":
            found += _wrong_python(block.text)
        elif block.language == "bash":
            found += _wrong_shell(block.text)
            for command in commands_of(block.text):
                found += wrong_options(words_of(command))
    return found


def _wrong_python(text: str) -> list[str]:
    try:
        compile(text.replace(ELLIPSIS, "..."), "the block", "exec")
    except SyntaxError as error:
        return [f"Python that does not compile ({error}): {text[:60]!r}"]
    return []


def _wrong_shell(text: str) -> list[str]:
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    return [f"shell that does not parse ({done.stderr.strip()})"] if done.returncode else []


def wrong_options(words: list[str]) -> list[str]:
    """The options of a command that bayestune does not have, and commands that it does not have."""
    if words[:1] != ["bayestune"] or len(words) < 2 or words[1].startswith("-"):
        return []
    options = _options()
    if words[1] not in options:
        return [] if not words[1].isalpha() else [f"there is no command bayestune {words[1]}"]
    from bayestune.cli.words import with_option_names

    words = ["bayestune", *with_option_names(words[1:])]
    given = {word.partition("=")[0] for word in words[2:] if re.match(r"--\w", word)}
    unknown = sorted(given - options[words[1]])
    return [f"bayestune {words[1]} has no option {option}" for option in unknown]


@cache
def _options() -> dict[str, set[str]]:
    from site_reference import subparsers

    found = {}
    for name, parser in subparsers().items():
        found[name] = {text for action in parser._actions for text in action.option_strings}
    return found
