"""docs/results.md has the tables that the committed records give."""

import pytest

from studies.results_page import main


def test_the_committed_page_is_what_would_be_rendered():
    main(["--check"])


def test_a_stale_page_is_told(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Words.\n\n<!-- table: promises -->\nold\n<!-- end -->\n")
    with pytest.raises(SystemExit, match="is stale: run python -m studies.results_page"):
        main(["--page", str(page), "--check"])
    main(["--page", str(page)])
    text = page.read_text(encoding="utf-8")
    assert "old" not in text
    assert "openbookqa, seeds 1" in text
    main(["--page", str(page), "--check"])
