"""Bands, thresholds by class, costs, an unsure option; a row decides alike in any company."""

from collections import Counter

import pytest

import bayestune
from bayestune.cli import main
from bayestune.data import Question
from bayestune.decisions import Calibration
from bayestune.evaluation import read_records
from bayestune.posteriors import posterior_digest
from bayestune.report.panels import coverage_curve
from running import failed, fitting, furnish, read_rows, run, write_rows

COLOURS = ("red", "green", "unsure")
EASY = ("--risk=0.4", "--confidence=0.8", "--draws=[0]")


def questions(count, start, options=COLOURS):
    return [
        {"question": f"what is {i} {'and red ' * (i % 5)}?", "options": options, "answer": i % 2}
        for i in range(start, start + count)
    ]


@pytest.fixture
def place(tmp_path, llama, byte_level):
    """A fit whose choices vary, and rows that say what it says but for many it is unsure of."""
    folder = furnish(tmp_path, llama(initializer_range=0.3), byte_level)
    write_rows(folder / "train.jsonl", questions(8, 0))
    run(*fitting(folder, method="mle", learning_rate=0.05))
    for name, start, count in (("held_out.jsonl", 100, 160), ("new.jsonl", 300, 40)):
        write_rows(folder / name, questions(count, start))
        rows = []
        lines = predicting(folder, name)
        middle = sorted(line["confidence"] for line in lines)[count // 2]
        for i, line in enumerate(lines):
            is_wrong = line["confidence"] < middle and i % 3 > 0
            answer = (line["choice"] + is_wrong) % 3
            rows.append({**{k: line[k] for k in ("question", "options")}, "answer": answer})
        write_rows(folder / name, rows)
    return folder


def predicting(place, rows="new.jsonl"):
    out = place / "said.jsonl"
    given = [f"--posterior={place / 'out'}", f"--input={place / rows}", f"--output={out}"]
    run("predict", *given, "--overwrite")
    return read_rows(out)


def calibrated(place, *options):
    run("calibrate", place / "out", f"--rows={place / 'held_out.jsonl'}", *EASY, *options)
    found = Calibration.read(place / "out", posterior_digest(place / "out"))
    assert found is not None
    return found


def everywhere(place, lines):
    """Checks that Python and `evaluate` decide as the lines of `predict` do, row by row."""
    told = bayestune.decide(place / "out", place / "new.jsonl")
    test = f"--evaluation_data={place / 'new.jsonl'}"
    run("evaluate", f"--posterior={place / 'out'}", test, "--resamples=20", "--draws=[0]")
    record = read_records(place / "out")[-1]
    rows = read_rows(place / "out" / record["predictions"])
    for name in ("decision", "choice", "set"):
        said = [line[name] for line in lines]
        assert [row[name] for row in told] == said
        assert [row[name] for row in rows] == said
    acted = sum(line["decision"] == "act" for line in lines)
    assert record["gate"]["acted"] == pytest.approx(acted / len(lines))


def below(line, threshold):
    value = line["score"]["value"]
    return value is not None and threshold.value is not None and value <= threshold.value


def test_bands(place, capsys):
    found = calibrated(place, "--bands={act: 0.3, flag: 0.5}", "--confidence=0.8")
    assert "band flag: acts on" in capsys.readouterr().out
    lines = predicting(place)
    act, flag = found.bands["act"], found.bands["flag"]
    for line in lines:
        expected = "act" if below(line, act) else "flag" if below(line, flag) else "ask"
        assert line["decision"] == expected
    assert "act" in {line["decision"] for line in lines}
    everywhere(place, lines)
    held_out = [f"--rows={place / 'held_out.jsonl'}", *EASY]
    falling = ["calibrate", place / "out", *held_out, "--bands={act: 0.5, flag: 0.3}"]
    assert "expected rising risks" in failed(falling, capsys)
    named = ["calibrate", place / "out", *held_out, "--bands={act: 0.3, ask: 0.5}"]
    assert "got a band named 'ask'" in failed(named, capsys)
    both = ["calibrate", place / "out", *held_out, "--bands={act: 0.3}", "--per_class"]
    assert "got bands and per_class" in failed(both, capsys)


def test_bands_of_any_name_are_told_and_counted(place):
    """The strictest one is acted on, and what is said of the risk is of the bands."""
    found = calibrated(place, "--bands={auto: 0.3, look: 0.5}", "--risk=0.01")
    applied = found.applied()
    assert (applied["risk"], applied["confidence"]) == (0.3, 0.8)
    assert applied["bands"] == {"auto": 0.3, "look": 0.5}
    lines = predicting(place)
    assert {line["decision"] for line in lines} <= {"auto", "look", "ask"}
    test = f"--evaluation_data={place / 'new.jsonl'}"
    run("evaluate", f"--posterior={place / 'out'}", test, "--resamples=20", "--draws=[0]")
    record = read_records(place / "out")[-1]
    rows = read_rows(place / "out" / record["predictions"])
    acted = [row for row in rows if row["decision"] == "auto"]
    assert acted
    assert record["gate"]["acted"] == pytest.approx(len(acted) / len(rows))
    wrong = [row["choice"] != row["answer"] for row in acted]
    assert record["gate"]["risk"] == pytest.approx(sum(wrong) / len(wrong))
    curve = coverage_curve(rows)["threshold"]
    assert (curve["acted"], curve["promised"]) == (len(acted), 0.3)


def test_thresholds_by_class_whatever_the_order_of_options(place, capsys):
    found = calibrated(place, "--per_class", "--risk=0.5", "--confidence=0.6")
    assert list(found.classes) == ["0", "1", "2"]
    assert "choice 'green': " in capsys.readouterr().out
    lines = predicting(place)
    for line in lines:
        own = found.classes[str(line["choice"])]
        assert line["score"]["threshold"] == own.value
        assert line["decision"] == ("act" if below(line, own) else "abstain")
    assert {line["decision"] for line in lines} == {"act", "abstain"}
    everywhere(place, lines)
    turned = [{**row, "options": COLOURS[::-1]} for row in read_rows(place / "new.jsonl")]
    write_rows(place / "turned.jsonl", [{**row, "answer": None} for row in turned])
    for line in predicting(place, "turned.jsonl"):
        own = found.classes[str(COLOURS.index(line["choice_text"]))]
        assert line["score"]["threshold"] == own.value
    others = [{**row, "options": ("red", "blue", "sky"), "answer": None} for row in turned]
    write_rows(place / "others.jsonl", others)
    for line in predicting(place, "others.jsonl"):
        if line["choice_text"] != "red":
            assert (line["decision"], line["score"]["threshold"]) == ("abstain", None)


def test_costs(place, capsys):
    plain = calibrated(place)
    found = calibrated(place, "--costs=[[0,1,1],[9,0,1],[1,1,0]]")
    assert found.costs == [[0, 1, 1], [9, 0, 1], [1, 1, 0]]
    first = found.threshold
    assert first.losses / max(1, first.acted) <= first.risk
    assert first.losses * 9 == pytest.approx(round(first.losses * 9))  # costs are ninths here
    assert first.losses < first.acted
    assert plain.threshold.losses == int(plain.threshold.losses)
    lines = predicting(place)
    for line in lines:
        assert line["decision"] == ("act" if below(line, first) else "abstain")
    everywhere(place, lines)
    record = read_records(place / "out")[-1]
    rows = read_rows(place / "out" / record["predictions"])
    acted = [row for row in rows if row["decision"] == "act"]
    paid = [found.costs[row["answer"]][row["choice"]] / 9 for row in acted]
    assert record["gate"]["cost"] == pytest.approx(sum(paid) / len(paid))
    turned = [{**row, "options": COLOURS[::-1], "answer": 2 - row["answer"]} for row in rows]
    keys = ("question", "options", "answer")
    turned = [{name: row[name] for name in keys} for row in turned]
    write_rows(place / "turned.jsonl", turned)
    bar = f"--evaluation_data={place / 'turned.jsonl'}"
    run("evaluate", f"--posterior={place / 'out'}", bar, "--resamples=20", "--gate=cost<=1")
    record = read_records(place / "out")[-1]
    rows = read_rows(place / "out" / record["predictions"])
    acted = [row for row in rows if row["decision"] == "act"]
    paid = [found.costs[2 - row["answer"]][2 - row["choice"]] / 9 for row in acted]
    assert record["gate"]["cost"] == pytest.approx(sum(paid) / max(1, len(paid)))
    few = ["calibrate", place / "out", f"--rows={place / 'held_out.jsonl'}", *EASY]
    assert "got costs of shape (2, 2)" in failed([*few, "--costs=[[0,1],[1,0]]"], capsys)
    ragged = "--costs=[[0,1,1],[1,0,1],[1,1]]"
    assert "got costs in rows of [3, 3, 2] numbers" in failed([*few, ragged], capsys)


def test_costs_are_in_the_order_of_the_rows_under_a_head_too(place, bert, byte_level, capsys):
    """A head has its own order of classes, which the file's options need not be in."""
    furnish(place, bert(), byte_level)
    write_rows(place / "train.jsonl", questions(8, 0))
    run(*fitting(place, method="mle", scoring="head", learning_rate=0.05), "--overwrite")
    straight = questions(60, 100)
    turned = [{**row, "options": COLOURS[::-1], "answer": 2 - row["answer"]} for row in straight]
    both = [turned[i] if i % 2 else row for i, row in enumerate(straight)]
    easy = ["--risk=0.8", "--confidence=0.6", "--per_class"]
    costs = "--costs=[[0,1,2],[3,0,4],[5,6,0]]"
    back = "--costs=[[0,6,5],[4,0,3],[2,1,0]]"
    found = []
    for rows, own in ((straight, costs), (turned, back)):
        write_rows(place / "held_out.jsonl", rows)
        found.append(calibrated(place, own, *easy))
    assert found[0].costs == found[1].costs == [[0, 1, 2], [3, 0, 4], [5, 6, 0]]
    assert found[0].classes == found[1].classes
    write_rows(place / "held_out.jsonl", both)
    assert calibrated(place, *easy).settings["classes"] == [*COLOURS]
    given = ["calibrate", place / "out", f"--rows={place / 'held_out.jsonl'}", *EASY, costs]
    assert "in the same order in every row" in failed(given, capsys)


def test_an_unsure_option_is_never_acted_on(place):
    chosen = Counter(line["choice_text"] for line in predicting(place))
    text = chosen.most_common()[-1][0]  # the model knows nothing of the word
    found = calibrated(place, f"--unsure={text.upper()}")
    assert found.settings["unsure"] == text.upper()
    lines = predicting(place)
    unsure = [line for line in lines if line["choice_text"] == text]
    assert 0 < len(unsure) < len(lines)
    for line in unsure:
        assert (line["decision"], line["score"]["value"]) == ("abstain", None)
    assert "act" in {line["decision"] for line in lines}
    everywhere(place, lines)


def test_no_held_out_row_is_decided_otherwise_in_other_company(place):
    """λ is between the rows it was found on, so that rounding in another batch moves none."""
    found = calibrated(place)
    lines = predicting(place, "held_out.jsonl")
    cut = found.threshold.value
    assert cut is not None
    decided = {line["question"]: line["decision"] for line in lines}
    values = {line["question"]: line["score"]["value"] for line in lines}
    assert set(decided.values()) == {"act", "abstain"}
    rows = read_rows(place / "held_out.jsonl")
    long = {"question": "red green blue " * 20, "options": COLOURS, "answer": 0}
    mixed = [row for one in reversed(rows) for row in (one, long)]
    write_rows(place / "mixed.jsonl", mixed)
    again = [line for line in predicting(place, "mixed.jsonl") if line["question"] in decided]
    assert len(again) == len(lines)
    moved = [line["score"]["value"] != values[line["question"]] for line in again]
    assert any(moved)
    assert {line["question"]: line["decision"] for line in again} == decided
    nearest = sorted(values, key=lambda text: abs(values[text] - cut))[:3]
    for text in nearest:
        (alone,) = bayestune.decide(place / "out", [Question("one", text, COLOURS, None)])
        assert alone["decision"] == decided[text]


def test_what_acting_costs_needs_no_texts_in_the_rows(place):
    calibrated(place, "--costs=[[0,1,1],[2,0,1],[1,1,0]]")
    test = f"--evaluation_data={place / 'new.jsonl'}"
    for texts in ("true", "false"):
        run("evaluate", f"--posterior={place / 'out'}", test, "--resamples=20", f"--texts={texts}")
    with_texts, without = [r for r in read_records(place / "out") if "calibration" in r]
    assert with_texts["gate"]["cost"] == without["gate"]["cost"]


def test_the_risk_of_no_row_is_unknown_and_holds_no_bar(place, capsys):
    found = calibrated(place, "--risk=0.01", "--confidence=0.5")
    assert found.threshold.value is None
    test = f"--evaluation_data={place / 'new.jsonl'}"
    evaluating = ["evaluate", f"--posterior={place / 'out'}", test, "--resamples=20"]
    assert main([str(part) for part in [*evaluating, "--gate=risk<=0.9"]]) == 1
    record = read_records(place / "out")[-1]
    assert (record["gate"]["acted"], record["gate"]["risk"]) == (0.0, None)
    assert record["seen_rows"] == 0
    assert record["config"]["predicting"]["draws"] == [0]
