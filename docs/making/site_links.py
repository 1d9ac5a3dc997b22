"""Links of a page that lead out of docs/: to files of the repository."""

import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?P<before>\]\()(?P<target>\.\./[^)\s#]+)(?P<anchor>#[^)\s]*)?(?=\))")


def outward_links(markdown: str, place: str, repository: str) -> tuple[str, list[str]]:
    """The page with repository addresses in the place of relative links beyond docs/.

    Args:
        markdown: the page.
        place: of the page within docs/, such as "tutorials/serve.md".
        repository: its address.

    Returns:
        The page, and the targets that do not exist.
    """
    missing = []

    def replaced(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(place), match[2]))
        if target.startswith("docs/"):
            return match[0]  # mkdocs checks those
        if not (ROOT / target).exists():
            missing.append(target)
        kind = "tree" if (ROOT / target).is_dir() else "blob"
        return f"{match['before']}{repository}/{kind}/main/{target}{match['anchor'] or ''}"

    return LINK.sub(replaced, markdown), missing
