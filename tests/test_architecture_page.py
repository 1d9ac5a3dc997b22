"""docs/architecture.md names every package and module of the source, and no others."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src/bayestune"
PAGE = ROOT / "docs/architecture.md"
LINE = re.compile(r"^(  |    )([a-z_]+(?:, [a-z_]+)*)(?:  .*)?$")


def on_the_page() -> set[str]:
    """Rooms, and modules as "room.module": the first words of the lines of the tree."""
    block = PAGE.read_text(encoding="utf-8").split("```")[1]
    found, room = set(), ""
    for match in filter(None, map(LINE.match, block.splitlines())):
        names = match[2].split(", ")
        if match[1] == "  ":
            room = names[0]
            found.add(room)
        else:
            found |= {f"{room}.{name}" for name in names}
    return found


def in_the_source() -> set[str]:
    paths = {path.relative_to(SOURCE).with_suffix("") for path in SOURCE.rglob("*.py")}
    parts = [path.parts for path in paths if path.name != "__main__"]
    return {".".join(part for part in path if part != "__init__") for path in parts} - {""}


def test_the_tree_on_the_page_is_the_source():
    missing = sorted(in_the_source() - on_the_page())
    gone = sorted(on_the_page() - in_the_source())
    assert not missing, "docs/architecture.md lacks these"
    assert not gone, "docs/architecture.md names these, which do not exist"
