"""What is published: sdist, wheel, citation, changelog; and what `make help` says."""

import re
import subprocess
import tomllib
from collections import Counter
from pathlib import Path

import pytest
import yaml

import bayestune

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TARGETS = PROJECT["tool"]["hatch"]["build"]["targets"]
KINDS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]


def test_the_sdist_holds_all_that_is_tracked():
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = {f"/{path.split('/')[0]}" for path in done.stdout.splitlines()}
    assert tracked <= set(TARGETS["sdist"]["include"])


def test_a_release_has_one_date():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{bayestune.__version__}] - {citation['date-released']}\n" in text


def test_the_wheel_holds_the_package_and_its_presets():
    assert TARGETS["wheel"]["include"] == ["/src/bayestune", "/configs"]
    assert TARGETS["wheel"]["sources"] == {"src": "", "configs": "bayestune/configs"}


def test_the_citation_is_of_this_version_and_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == bayestune.__version__
    assert citation["license"] == PROJECT["project"]["license"]
    assert citation["repository-code"] == PROJECT["project"]["urls"]["Source"]
    assert citation["references"][0]["url"] == "https://arxiv.org/abs/2406.11675"


def test_the_changelog_keeps_its_form():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)
    assert versions[:2] == ["Unreleased", bayestune.__version__]
    assert len(versions) == text.count("\n## ")
    assert re.search(rf"^## \[{bayestune.__version__}\] - \d{{4}}-\d\d-\d\d$", text, re.MULTILINE)
    unreleased, *sections = text.split("\n## ")[1:]
    if "\n### " in unreleased:  # it is empty right after a release
        sections.append(unreleased)
    for section in sections:
        kinds = re.findall(r"^### (.+)$", section, re.MULTILINE)
        assert kinds
        assert kinds == [kind for kind in KINDS if kind in kinds]


def test_make_help_lists_every_target():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.+)$", text, re.MULTILINE)[1].split()
    done = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert sorted(line.split()[1] for line in done.stdout.splitlines()) == sorted(phony)


def test_no_two_test_files_share_a_name():
    folders = [ROOT / "tests", ROOT / "studies"]
    names = Counter(path.name for folder in folders for path in folder.rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
