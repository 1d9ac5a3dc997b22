"""Code and links of all pages hold, and every command is one that the reference has."""

import re
from pathlib import Path

import page_code
import pytest
import site_links
import site_reference

import bayestune

ROOT = Path(__file__).parents[2]
PAGES = sorted(path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md"))


@pytest.mark.parametrize("place", PAGES)
def test_the_code_of_a_page_holds(place):
    assert page_code.wrong_code((ROOT / "docs" / place).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("place", PAGES)
def test_the_links_of_a_page_exist(place):
    text = (ROOT / "docs" / place).read_text(encoding="utf-8")
    assert site_links.outward_links(text, place, "x")[1] == []
    for target in re.findall(r"\]\((?!http|#|\.\./\.\./)([^)#\s]+)", text):
        found = (ROOT / "docs" / place).parent / target
        made = "reference/" in target and target.endswith(".md")
        assert made or found.exists(), target


def test_wrong_code_is_found():
    wrong = "```python\nx = (\n```\n```bash\nbayestune fit --modle x\nbayestune fitt\n```\n"
    found = page_code.wrong_code(wrong + "```bash\nif true\n```\n")
    assert len(found) == 4
    assert "bayestune fit has no option --modle" in found


def test_links_out_of_docs_lead_to_the_repository():
    text, missing = site_links.outward_links("[a](../../README.md#x) [b](../c.md)", "t/p.md", "R")
    assert text == "[a](R/blob/main/README.md#x) [b](../c.md)"
    assert missing == []
    assert site_links.outward_links("[a](../gone.md)", "p.md", "R")[1] == ["gone.md"]


def test_the_reference_has_every_public_name_and_command():
    assert set(bayestune.__all__) <= {n for names in site_reference.rooms().values() for n in names}
    pages = site_reference.room_pages()
    for room, names in site_reference.rooms().items():
        for name in names:
            assert re.search(
                rf"^::: bayestune\.{room}\.(\w+\.)?{name}$",
                pages[f"reference/{room}.md"],
                re.MULTILINE,
            )
    text = site_reference.commands_page()
    for command, parser in site_reference.subparsers().items():
        assert f"## bayestune {command}\n" in text
        for action in parser._actions:
            shown = action.option_strings[-1:] if site_reference._is_shown(action) else []
            assert all(f"`{option}`" in text for option in shown), (command, shown)


@pytest.mark.parametrize("place", PAGES)
def test_pictures_are_told_in_words(place):
    text = (ROOT / "docs" / place).read_text(encoding="utf-8")
    for told, picture in re.findall(r"!\[(.*?)\]\((.*?)\)", text):
        assert len(told.split()) > 3, picture
