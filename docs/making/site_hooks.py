"""What `mkdocs build` does beside turning pages into HTML: `hooks` in mkdocs.yml.

Pages of the reference are made from the package, links that leave docs/ lead to the repository,
code on every page is checked, and so is that every public name and command is on the site.
"""

import logging
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))

from page_code import wrong_code
from site_links import outward_links
from site_reference import COMMANDS_PAGE, NAMES_PAGE, commands_page, names_page, room_pages, rooms

BY_ROOM = "Names by room"
log = logging.getLogger("mkdocs.hooks.bayestune")  # its warnings fail a strict build


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Enters the rooms' pages, which the package makes, into the navigation."""
    for part in config.nav or []:
        for entry in part.get("Reference", []):
            if isinstance(entry, dict) and BY_ROOM in entry:
                entry[BY_ROOM] = [{room: f"reference/{room}.md"} for room in rooms()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of the reference."""
    made = {COMMANDS_PAGE: commands_page(), NAMES_PAGE: names_page(), **room_pages()}
    for place, text in made.items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Checks a page's code, and sends its links beyond docs/ to the repository."""
    place = page.file.src_uri
    if not page.file.generated_by:
        for problem in wrong_code(markdown):
            log.warning("%s: %s", place, problem)
    text, missing = outward_links(markdown, place, config.extra["repository"])
    for target in missing:
        log.warning("%s: a link to %s, which does not exist", place, target)
    return text


def on_post_build(config: MkDocsConfig) -> None:
    """Checks that every public name has its anchor on the built site."""
    built = Path(config.site_dir)
    for room, names in rooms().items():
        html = (built / f"reference/{room}.html").read_text(encoding="utf-8")
        for name in names:
            if not re.search(rf'id="bayestune\.{room}\.(\w+\.)?{name}"', html):
                log.warning("the public name bayestune.%s.%s is not on the site", room, name)
