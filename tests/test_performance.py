"""docs/performance.md is what the committed records give."""

import json

import pytest

from studies.performance_page import main, read, rendered

PAGE = "# Title\n\n<!-- figures: train_step: .*row -->\nold\n<!-- end -->\n\nWords.\n"


def record(median=1.01, device="a chip", model="small", name="row, fp32", **environment):
    """A record as `harness.report` writes it."""
    ratio = {"median": median, "low": 0.97, "high": 1.04, "count": 8}
    amounts = {"row": 2.0, "lora": 1.98}
    return {
        "benchmark": "train_step",
        "title": f"BLoB step / LoRA step: {model}; of note",
        "environment": {"device": device, "threads": 2, "revision": "abc", **environment},
        "options": {},
        "cases": [{"name": name, "ratio": ratio, "amounts": amounts, "unit": "s"}],
    }


def lines_of(*records):
    return [line for line in rendered(PAGE, records).splitlines() if line.startswith("| BLoB")]


def test_the_committed_page_is_what_would_be_rendered():
    main(["--check"])


def test_a_stale_page_is_found_and_mended(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    (tmp_path / "x.jsonl").write_text(json.dumps(record()) + "\n", encoding="utf-8")
    where = ["--results", str(tmp_path), "--page", str(page)]
    with pytest.raises(SystemExit, match=r"page.md is stale: run python -m studies.performance"):
        main([*where, "--check"])
    main(where)
    main([*where, "--check"])
    page.write_text(page.read_text(encoding="utf-8").replace("1.010", "1.000"), encoding="utf-8")
    with pytest.raises(SystemExit, match="is stale"):
        main([*where, "--check"])


def test_a_line_says_what_where_and_how_much():
    text = rendered(PAGE, [record(date="2026-01-02 03:04")])
    assert text.startswith("# Title\n\n<!-- figures: train_step: .*row -->\n| case |")
    assert text.endswith("|\n<!-- end -->\n\nWords.\n")
    (line,) = lines_of(record(date="2026-01-02 03:04"))
    assert line == (
        "| BLoB step / LoRA step: row | small | **1.010** [0.970, 1.040], row 2, lora 1.98 s "
        "| a chip, threads 2, abc, 2026-01-02 |"
    )


def test_only_the_newest_of_the_same_is_shown_and_goes_by_the_date(tmp_path):
    dates = {"a": "2026-02-02 10:00", "b": None, "c": "2026-02-01 10:00"}
    for name, date in dates.items():
        one = record(revision=name, **({"date": date} if date else {}))
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(one) + "\n\n", encoding="utf-8")
    (line,) = lines_of(*read(tmp_path))
    assert ", a, 2026-02-02 |" in line
    assert len(lines_of(record(), record(device="another"))) == 2
    assert len(lines_of(record(), record(model="large"))) == 2
    (both,) = lines_of(record(1.5), record(1.6), record(1.7, name="row, bf16"))
    assert both.split(" | ")[2].startswith("**1.600**")
    assert both.split(" | ")[3].startswith("**1.700**")


def test_a_table_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no record of .*row'.*mend the page"):
        rendered(PAGE, [record(name="token, fp32")])
