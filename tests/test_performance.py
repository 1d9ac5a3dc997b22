"""The page of figures: what is on it, and that the committed one is what the records give."""

import importlib
import json
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def made(
    benchmark="train_step",
    device="a chip",
    cases=(("row, fp32", 1.01, 1.02),),
    environment=(),
    **options,
):
    """A record as `harness.report` writes it."""
    spread = {"lower_quartile": 0.98, "upper_quartile": 1.03, "low": 0.97, "high": 1.04, "count": 8}
    return {
        "benchmark": benchmark,
        "title": f"Steps: {options.get('model')}",
        "environment": {"device": device, "threads": 2, **dict(environment)},
        "options": {"device": "cpu", "threads": 2, **options},
        "cases": [
            {
                "name": n,
                "ratio": {"median": m, **spread},
                "bar": b,
                "amounts": {"row": 2.0},
                "unit": "s",
            }
            for n, m, b in cases
        ],
    }


@pytest.fixture
def render(load, tmp_path):
    """Renders the page of some records and notes."""

    def run(records, notes=None, check=False):
        for name in ("results", "notes"):
            (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / "results/x.jsonl").write_text(
            "".join(json.dumps(record) + "\n" for record in records)
        )
        for name, text in (notes or {}).items():
            (tmp_path / f"notes/{name}.md").write_text(text)
        page = tmp_path / "page.md"
        folders = [
            "--results",
            str(tmp_path / "results"),
            "--notes",
            str(tmp_path / "notes"),
            "--output",
            str(page),
        ]
        load("render").main([*folders, *(["--check"] if check else [])])
        return page.read_text(encoding="utf-8")

    return run


def test_the_committed_page_is_what_would_be_rendered(load):
    load("render").main(["--check"])


def test_a_stale_page_is_found(render, tmp_path):
    page = render([made()])
    render([made()], check=True)
    (tmp_path / "page.md").write_text(page.replace("1.010", "1.000"))
    with pytest.raises(SystemExit, match=r"page.md is stale: run python benchmarks/render.py"):
        render([made()], check=True)
    (tmp_path / "page.md").unlink()
    with pytest.raises(SystemExit, match="is stale"):
        render([made()], check=True)


def test_a_run_is_shown_with_command_environment_and_table(render):
    page = render(
        [
            made(
                rows=2,
                logits="full",
                repeats=40,
                noise=["row"],
                control=True,
                model="/own/place/tiny-7b",
            )
        ]
    )
    assert "## train_step\n\nA BLoB training step over a stock PEFT LoRA step:" in page
    assert "### Steps: tiny-7b\n" in page
    command = (
        "python benchmarks/train_step.py --rows 2 --logits full --control --model MODEL --threads 2"
    )
    assert f"```sh\n{command}\n```" in page
    assert "device a chip · threads 2 · `MODEL` tiny-7b" in page
    assert (
        "| row, fp32 | 1.010 | 0.980 – 1.030 | 0.970 – 1.040 | ≤ 1.02 | met | row 2 s | 8 |" in page
    )
    assert "/own/place" not in page


def test_every_bar_has_its_line_and_its_verdict(render):
    cases = [("below", 1.0, 1.02), ("at", 1.02, 1.02), ("above", 1.021, 1.02), ("none", 3.0, None)]
    top = render([made(cases=cases)]).partition("## train_step")[0]
    lines = [line for line in top.splitlines() if line.startswith("| [train_step]")]
    assert [line.split(" | ")[1:6] for line in lines] == [
        ["Steps: None: below", "1.000", "0.970 – 1.040", "≤ 1.02", "met"],
        ["Steps: None: at", "1.020", "0.970 – 1.040", "≤ 1.02", "met"],
        ["Steps: None: above", "1.021", "0.970 – 1.040", "≤ 1.02", "**missed**"],
    ]
    assert all(line.endswith("| a chip |") for line in lines)


def test_bars_on_amounts_and_on_single_values(render):
    late = made("import_time", cases=[("import, after x; bar: added ≤ 0.3 s", 1.1, None)])
    late["cases"][0]["amounts"] = {"base": 4.0, "added": 0.4}
    values = {"laplace_over_epoch": 2.0, "laplace_over_epoch_bar": 3.0, "peak": 9.5, "peak_bar": 9}
    laplace = {
        "benchmark": "laplace",
        "environment": {"device": "b"},
        "options": {"model": "m/n"},
        **values,
    }
    page = render([late, laplace])
    assert "| Import" not in page
    assert "bar: added ≤ 0.3 s | 0.4 s |  | ≤ 0.3 s | **missed** | a chip |" in page
    assert "| n: laplace_over_epoch | 2 |  | ≤ 3 | met | b |" in page
    assert "| peak | 9.5 | ≤ 9 | **missed** |" in page


def shown(load, *records):
    found = load("render").newest(records)
    return [record["cases"][0]["name"] for record in found]


def run_of(name, **options):
    return made(cases=[(name, 1.0, None)], **options)


@pytest.mark.parametrize(
    ("older", "newer", "left"),
    [
        ({}, {}, ["new"]),
        ({"repeats": 8, "warmup": 3}, {"repeats": 20, "warmup": 1}, ["new"]),
        ({}, {"rows": 4}, ["new"]),  # an option that came later, at its default
        ({"model": "/a/small"}, {"model": "/b/small"}, ["new"]),
        ({"precisions": ["fp32"]}, {"precisions": ["fp32", "bf16"]}, ["new"]),
        ({"precisions": ["fp32", "bf16"]}, {"precisions": ["bf16"]}, ["old", "new"]),
        ({"rows": 1}, {"rows": 2}, ["old", "new"]),
        ({"model": "/a/small"}, {"model": "/a/large"}, ["old", "new"]),
        ({"threads": 1}, {"threads": 2}, ["old", "new"]),
        ({"device": "one chip"}, {"device": "another"}, ["old", "new"]),
        ({"benchmark": "memory"}, {}, ["old", "new"]),
    ],
)
def test_only_the_newest_of_the_same_is_shown(load, older, newer, left):
    assert shown(load, run_of("old", **older), run_of("new", **newer)) == left


def test_newest_goes_by_the_date_not_by_the_file(load, tmp_path):
    dates = {"a": "2026-02-02 10:00", "b": None, "c": "2026-02-01 10:00"}
    for name, date in dates.items():
        record = run_of(name, environment={"date": date} if date else {})
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record) + "\n\n")
    assert shown(load, *load("render").read(tmp_path)) == ["a"]


def test_sections_of_one_command_are_one_run(render):
    lines = [
        made("gpu", cases=[(name, 1.0, None)], geometry=["tiny"], sections=[name])
        for name in ("train-4", "memory")
    ]
    later = made(
        "gpu", geometry=["tiny"], sections=["draws-1"], environment={"date": "2026-01-01 00:00"}
    )
    page = render([*lines, later])
    assert page.count("### ") == 2
    assert "--geometry tiny --sections train-4 memory" in page
    assert page.index("| train-4 |") < page.index("| memory |") < page.index("--sections draws-1")


def test_notes_are_put_where_they_belong(render):
    notes = {
        "intro": "To begin.",
        "closing": "To end.",
        "memory": "What was found.",
        "calibration_cost": "Of draws.",
    }
    strange = {"benchmark": "calibration_cost", "cells": [1, 2, 3]}
    page = render([made(), made("memory"), strange], notes)
    words = [
        "# Performance\n\nTo begin.",
        "## Bars",
        "## train_step",
        "## memory",
        "What was found.",
        "### Steps",
    ]
    places = [page.index(word) for word in words[:-1]]
    assert places == sorted(places)
    assert page.index("What was found.") < page.rindex("### Steps")
    assert page.endswith("Of draws.\n\nTo end.\n")
    assert page.index("## calibration_cost") < page.index("Of draws.")
    assert "cells" not in page


def test_any_other_benchmark_is_shown_as_it_is(render):
    record = {
        "benchmark": "unheard_of",
        "options": {"depth": 3, "kind": "a b"},
        "score": 0.123456,
        "parts": {"a|b": 1},
    }
    page = render([record])
    assert "python benchmarks/unheard_of.py --depth 3 --kind 'a b'" in page
    assert '| score | 0.1235 |  |  |\n| parts | {"a\\|b": 1} |  |  |' in page


def test_a_command_on_the_page_gives_the_options_of_its_record(load):
    parts, records = load("render_parts"), load("render").read(ROOT / "results/benchmarks")
    tried = [record for record in records if record["benchmark"] != "calibration_cost"]
    assert tried
    for record in tried:
        words = shlex.split(parts.command(record))
        assert words[:2] == ["python", f"benchmarks/{record['benchmark']}.py"]
        parsed = json.loads(
            json.dumps(
                vars(parts.parser_of(record["benchmark"]).parse_args(words[2:])), default=str
            )
        )
        for name, value in record["options"].items():
            assert parsed[name] == (parts.PATHS.get(name, value) if value else value)
