"""Calibrate once, decide everywhere: the same decisions by `predict`, `evaluate` and Python."""

import json
import random
import shlex
import shutil
from pathlib import Path

import pytest

import bayestune
from bayestune.cli import main
from bayestune.decisions import FILE_NAME, Calibration
from bayestune.evaluation import read_records
from bayestune.posteriors import posterior_digest
from running import failed, fitting, furnish, read_rows, run, write_rows

NOISY = {"learning_rate": 0.1, "blob.init_root_std": 0.7, "blob.prior_std": 1.0}
DRAWS = ("--draws=[0,2]", "--factors=[0.5]")
EASY = ("--risk=0.4", "--confidence=0.8")
SAME = ("id", "choice", "choice_text", "decision", "set", "calibration")
COLOURS = ("red", "green", "I do not know")


def labelled(count, start=0):
    generator = random.Random(start)
    rows = []
    for i in range(start, start + count):
        options = COLOURS[: 2 + i % 2]
        row = {"question": f"what is number {i}?", "options": options}
        rows.append({**row, "answer": generator.randrange(2)})
    return rows


@pytest.fixture
def place(tmp_path, llama, byte_level):
    """A model whose answers are not all alike, and rows: training, held-out, new."""
    folder = furnish(tmp_path, llama(initializer_range=0.3), byte_level)
    write_rows(folder / "train.jsonl", labelled(8))
    write_rows(folder / "held_out.jsonl", labelled(80, 100))
    write_rows(folder / "new.jsonl", labelled(40, 300))
    return folder


def learn(place, method="blob"):
    """Fits, and has the held-out and the new rows say what the model says, but for some."""
    run(*fitting(place, method=method, **(NOISY if method == "blob" else {"learning_rate": 0.1})))
    for name in ("held_out.jsonl", "new.jsonl"):
        rows = []
        for i, line in enumerate(predicting(place, "--draws=2", rows=name)):
            wrong = i % 16 == 0
            answer = (line["choice"] + wrong) % len(line["options"])
            rows.append({**{k: line[k] for k in ("question", "options")}, "answer": answer})
        write_rows(place / name, rows)


def calibrating(place, *options, folder="out", rows="held_out.jsonl"):
    return ["calibrate", place / folder, f"--rows={place / rows}", *EASY, *options]


def predicting(place, *options, folder="out", rows="new.jsonl"):
    """What `predict` says of rows."""
    out = place / "said.jsonl"
    given = [f"--posterior={place / folder}", f"--input={place / rows}", f"--output={out}"]
    run("predict", *given, "--overwrite", *options)
    return read_rows(out)


@pytest.mark.parametrize("method", ["blob", "mle", "ensemble"])
def test_decisions_are_the_same_by_every_way(place, capsys, method):
    learn(place, method)
    capsys.readouterr()
    run(*calibrating(place, *DRAWS, "--unsure=i do not KNOW"))
    said = capsys.readouterr().out
    assert "ways of predicting" in said
    assert "risk at most 0.4 with confidence 0.8" in said
    lines = predicting(place)
    calibration = Calibration.read(place / "out", posterior_digest(place / "out"))
    assert calibration is not None
    assert "act" in {line["decision"] for line in lines} <= {"act", "abstain"}
    for line in lines:
        assert line["calibration"] == calibration.applied()
        assert line["confidence"] == line["probabilities"][line["choice"]]
        assert line["choice_text"] == line["options"][line["choice"]]
        score = line["score"]
        is_unsure = line["choice_text"] == COLOURS[2]
        assert score["threshold"] == calibration.threshold.value
        assert (score["value"] is None) == is_unsure
        acts = not is_unsure and score["value"] <= (score["threshold"] or -1)
        assert (line["decision"] == "act") == acts
        assert all(0 <= index < len(line["options"]) for index in line["set"])

    told = bayestune.decide(place / "out", place / "new.jsonl")
    for row, line in zip(told, lines, strict=True):
        assert row.keys() == line.keys()
        assert row["probabilities"] == pytest.approx(line["probabilities"], abs=1e-5)
        assert [row[name] for name in SAME] == [line[name] for name in SAME]
    given = [f"--posterior={place / 'out'}", f"--evaluation_data={place / 'new.jsonl'}"]
    run("evaluate", *given, "--resamples=20", "--draws=[0]")
    record = read_records(place / "out")[-1]
    assert record["label"].endswith(", calibrated")
    assert record["calibration"] == calibration.applied()
    rows = read_rows(place / "out" / record["predictions"])
    for row, line in zip(rows, lines, strict=True):
        assert row["score"]["value"] == pytest.approx(line["score"]["value"], abs=1e-5)
        assert [row[name] for name in SAME] == [line[name] for name in SAME]
    acted = [line for line in lines if line["decision"] == "act"]
    assert record["gate"]["acted"] == pytest.approx(len(acted) / len(lines))


def test_a_calibration_of_laplace_is_of_its_draws_not_of_its_mean(place, capsys):
    run(*fitting(place, method="laplace", learning_rate=0.1, **{"laplace.prior_precision": 1.0}))
    run(*calibrating(place))
    calibration = Calibration.read(place / "out", posterior_digest(place / "out"))
    assert calibration is not None
    assert calibration.settings["draws"] == 1000
    assert all(line["mutual_information"] > 1e-4 for line in predicting(place))
    given = [f"--posterior={place / 'out'}", f"--evaluation_data={place / 'new.jsonl'}"]
    for draws in (1000, 0):  # an earlier version calibrated 0, the mean
        text = json.loads((place / "out" / FILE_NAME).read_text(encoding="utf-8"))
        text["settings"]["draws"] = draws
        (place / "out" / FILE_NAME).write_text(json.dumps(text), encoding="utf-8")
        run("evaluate", *given, "--resamples=20", "--draws=[0]")
        record = read_records(place / "out")[-1]
        assert record["draws"] == draws
        rows = read_rows(place / "out" / record["predictions"])
        assert all((row["mutual_information"] > 1e-4) == (draws > 0) for row in rows)
    text["settings"]["draws"] = 10  # of which an earlier version averaged an ensemble
    (place / "out" / FILE_NAME).write_text(json.dumps(text), encoding="utf-8")
    told = failed(["evaluate", *given], capsys)
    assert "got one of 10 draws, expected 1000" in told


def test_a_row_that_cannot_be_read_is_an_error_in_python_too(place):
    run(*fitting(place, **NOISY))
    run(*calibrating(place, "--draws=[2]", "--factors=[]"))
    rows = [*labelled(3, 700), {"question": "no options"}, {"question": "", "options": COLOURS}]
    write_rows(place / "some.jsonl", [rows[3], *rows[:2], rows[4], rows[2]])
    lines = predicting(place, rows="some.jsonl")
    assert ["error" in line for line in lines] == [True, False, False, True, False]
    assert bayestune.decide(place / "out", place / "some.jsonl") == lines


def test_other_draws_than_calibrated_are_not_decided_on(place, caplog):
    run(*fitting(place, **NOISY))
    run(*calibrating(place, "--draws=[2]", "--factors=[]"))
    assert all("decision" in line for line in predicting(place, "--draws=2"))
    for option in ("--draws=3", "--draw_seed=1", "--shared_prefix=3", "--uncalibrated"):
        caplog.clear()
        lines = predicting(place, option)
        assert [line["calibration"] for line in lines] == ["none"] * len(lines)
        assert not any("decision" in line for line in lines)
        assert ("is not what was calibrated" in caplog.text) == (option != "--uncalibrated")


def test_a_plain_adapter_takes_two_commands(place, capsys):
    run(*fitting(place, method="mle", learning_rate=0.1))
    plain = place / "plain"
    plain.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(place / "out" / name, plain)
    given = [f"--posterior={plain}", f"--input={place / 'new.jsonl'}"]
    said = failed(["predict", *given], capsys)
    assert "plain LoRA adapter" in said
    assert "run `bayestune calibrate` on it first" in said
    seen = calibrating(place, "--trained_on", place / "train.jsonl", folder="plain")
    seen[2] = f"--rows={place / 'train.jsonl'}"
    assert "8 of 8 rows that training saw" in failed(seen, capsys)
    model = f"--model={place / 'model'}"
    run(*calibrating(place, model, folder="plain"))
    ranking = ["rank", plain, f"--rows={place / 'new.jsonl'}", "--max_length=50"]
    assert "got --max_length for a calibrated adapter" in failed(ranking, capsys)
    lines = predicting(place, folder="plain")
    run(*calibrating(place))
    for line, fitted in zip(lines, predicting(place), strict=True):
        assert [line[name] for name in SAME[:-1]] == [fitted[name] for name in SAME[:-1]]
        assert line["probabilities"] == pytest.approx(fitted["probabilities"], abs=1e-5)
    evaluation = [f"--posterior={plain}", f"--evaluation_data={place / 'new.jsonl'}"]
    run("evaluate", *evaluation, "--resamples=20")
    labels = [record["label"] for record in read_records(plain)]
    assert labels == ["lora", "lora, calibrated"]


def test_a_student_that_is_kept_predicts(place, capsys):
    run(*fitting(place, **NOISY))
    run(*fitting(place, method="mle", output="student", learning_rate=0.1))
    run(*calibrating(place, "--draws=[2]", "--factors=[]", f"--student={place / 'student'}"))
    path = place / "out" / FILE_NAME
    facts = json.loads(path.read_text())
    assert {row["variant"] for row in facts["table"]} == {"2 draws", "student"}
    if facts["variant"] != "student":  # which one is kept depends on the machine's time
        digest = posterior_digest(place / "student")
        facts |= {"variant": "student", "temperature": 1.0}
        facts["settings"] |= {"draws": 0, "student": "../student", "student_digest": digest}
        path.write_text(json.dumps(facts))
    lines = predicting(place)
    alone = predicting(place, folder="student")
    if facts["temperature"] == 1.0:
        for line, other in zip(lines, alone, strict=True):
            assert line["probabilities"] == pytest.approx(other["probabilities"], abs=1e-6)
    assert all(line["calibration"]["variant"] == "student" for line in lines)
    run(*fitting(place, method="mle", output="student", learning_rate=0.2), "--overwrite")
    ask = ["predict", f"--posterior={place / 'out'}", f"--input={place / 'new.jsonl'}"]
    assert "another student" in failed(ask, capsys)
    shutil.rmtree(place / "student")
    assert "it was moved" in failed(ask, capsys)


def test_refit_and_change_end_a_calibration(place, capsys):
    run(*fitting(place, **NOISY))
    run(*calibrating(place, "--draws=[2]", "--factors=[]"))
    path = place / "out" / FILE_NAME
    kept = path.read_text()
    run(*fitting(place, **NOISY), "--overwrite")
    assert not path.exists()
    assert predicting(place)[0]["calibration"] == "none"
    details = place / "out" / "posterior.json"
    details.write_text(details.read_text() + " ")
    path.write_text(kept)
    ask = ["predict", f"--posterior={place / 'out'}", f"--input={place / 'new.jsonl'}"]
    assert "a calibration of another posterior" in failed(ask, capsys)
    run(*ask, "--uncalibrated")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--rows=train.jsonl",), "8 of 8 rows that training saw"),
        (("--risk=0.01",), "rows to choose thresholds on; expected"),
        (("--scoring=text",), "got --scoring for a posterior"),
        (("--unsure=perhaps",), "no row with the option 'perhaps'"),
        (("--per_class",), "rows of unlike options"),
        (("--draws=[]",), "got draws=[]"),
        (("--factors=[-1]",), "got factors=[-1.0]"),
        (("--risk=2",), "risk"),
        (("--set_coverage=1",), "got coverage=1.0"),
        (("--set_coverage=0.99",), "rows for sets of coverage 0.99; expected 99 or more"),
        (("--bands={flag: 0.5, act: 0.3}",), "expected rising risks"),
    ],
)
def test_what_cannot_be_promised_is_refused_before_any_pass(place, capsys, options, said):
    run(*fitting(place, method="mle"))
    shutil.rmtree(place / "model")  # a pass would need it
    options = [o.replace("=train", f"={place}/train") for o in options]
    assert said in failed(calibrating(place, *options), capsys)
    assert not (place / "out" / FILE_NAME).exists()


def test_evaluate_fails_below_its_gate(place, capsys):
    run(*fitting(place, method="mle"))
    given = [f"--posterior={place / 'out'}", f"--evaluation_data={place / 'new.jsonl'}"]
    command = ["evaluate", *map(str, given), "--resamples=20"]
    assert main([*command, "--gate", "nll<=100", "--gate=wrong_at_0.9<=1000"]) == 0
    out = capsys.readouterr().out
    assert "holds  nll <= 100" in out
    assert "wrong ≥ 0.9" in out
    assert main([*command, "--gate=nll<=100", "--gate=accuracy>1"]) == 1
    assert "FAILS  accuracy > 1" in capsys.readouterr().out
    assert main([*command, "--gate", "nll<=0.001"]) == 1
    assert "did you mean 'wrong_at_90'" in failed([*command, "--gate", "wrong_at90<=2"], capsys)
    assert "expected such as" in failed([*command, "--gate", "nll"], capsys)


def test_rank_and_drift(place, capsys):
    run(*fitting(place, **NOISY))
    pool = write_rows(place / "pool.jsonl", [{**row, "answer": None} for row in labelled(12, 500)])
    ranking = ["rank", place / "out", f"--rows={pool}", "--draws=3", "--number=4"]
    capsys.readouterr()
    run(*ranking)
    lines = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert [line["rank"] for line in lines] == [1, 2, 3, 4]
    assert {line["by"] for line in lines} == {"bald"}
    assert len({line["id"] for line in lines}) == 4
    first = max(lines, key=lambda line: line["corrected_mutual_information"])
    assert first["rank"] == 1
    run(*ranking, "--by=entropy", f"--output={place / 'ranked.jsonl'}")
    entropies = [row["total_entropy"] for row in read_rows(place / "ranked.jsonl")]
    assert entropies == sorted(entropies, reverse=True)

    for options, said in (
        (["--number=13"], "got number=13; expected 1 to 12"),
        (["--number=0"], "got number=0; expected 1 to 12"),
        (["--by=bald", "--draws=0"], "got one draw for 'bald'"),
        (["--number=11", "--by=batch_bald"], "got number=11 for 'batch_bald'"),
        (["--scoring=text"], "got --scoring for a posterior"),
    ):
        assert said in failed([*ranking, *options], capsys)

    nowhere = ["drift", place / "nowhere", f"--rows={pool}"]
    assert "nowhere is not a posterior" in failed(nowhere, capsys)
    drifting = ["drift", place / "out", f"--rows={place / 'new.jsonl'}"]
    assert "has no calibration" in failed(drifting, capsys)
    run(*calibrating(place, "--draws=[2]", "--factors=[]"))
    figures = place / "drift.jsonl"
    run(*drifting, f"--output={figures}", "--level=0.001")
    assert "are not told from the held-out ones" in capsys.readouterr().out
    long = [{**row, "question": "red green blue " * 9 + row["question"]} for row in labelled(30, 7)]
    other = write_rows(place / "other.jsonl", long)
    code = main([str(part) for part in ("drift", place / "out", f"--rows={other}")])
    assert code == 1
    said = capsys.readouterr().out
    assert "differ from the held-out ones" in said
    assert "sticks out: other.jsonl:" in said
    assert 0 <= read_rows(figures)[0]["false_alarm_rate"] <= 0.05


def test_repeated_rows_are_no_further_evidence_and_labelled_once(place, capsys):
    run(*fitting(place, **NOISY))
    held_out = read_rows(place / "held_out.jsonl")
    turned = [{**row, "options": row["options"][:2][::-1]} for row in held_out[::2]]
    turned = [{**row, "answer": 1 - row["answer"]} for row in turned]
    write_rows(place / "held_out.jsonl", [*held_out, *held_out[1::2], *turned])
    run(*calibrating(place, "--draws=[2]", "--factors=[]"))
    calibration = Calibration.read(place / "out", posterior_digest(place / "out"))
    assert {len(scores) for scores in calibration.held_out.values()} == {80}
    once = read_rows(place / "new.jsonl")
    figures = place / "drift.jsonl"
    told = []
    for rows in (once, once * 4):
        write_rows(place / "new.jsonl", rows)
        drifting = [f"--rows={place / 'new.jsonl'}", f"--output={figures}", "--overwrite"]
        main([str(part) for part in ("drift", place / "out", *drifting)])
        (line,) = read_rows(figures)
        told.append((line["rows"], line["p_value"]))
    assert told[0] == told[1]
    assert told[0][0] == 40

    capsys.readouterr()
    for by in ("bald", "entropy", "margin", "random"):
        run("rank", place / "out", f"--rows={place / 'new.jsonl'}", "--number=6", f"--by={by}")
        lines = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
        assert len({line["question"] for line in lines}) == 6
    run("rank", place / "out", f"--rows={place / 'new.jsonl'}")
    lines = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert len({line["id"] for line in lines}) == 160
    assert len({line["question"] for line in lines[:40]}) == 40


def test_the_commands_of_the_readme_run(place, monkeypatch, capsys):
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    block = readme.split("## Decide")[1].split("```bash\n")[1].split("```")[0]
    monkeypatch.chdir(place)
    write_rows(place / "test.jsonl", labelled(20, 400))
    write_rows(place / "pool.jsonl", labelled(30, 500))
    ran = []
    for line in block.splitlines():
        command, *arguments = shlex.split(line, comments=True)
        assert command == "bayestune"
        if arguments[0] == "fit":
            arguments += ["--steps=3", "--batch_size=2", "--lora.rank=2", "--progress=false"]
        code = main([str(place / "model") if part == "MODEL" else part for part in arguments])
        assert code in ((0, 1) if arguments[0] in ("evaluate", "drift") else (0,))
        ran.append(arguments[0])
    assert ran == ["fit", "calibrate", "predict", "evaluate", "rank", "drift"]
    assert '"decision": "abstain"' in capsys.readouterr().out


def decide_by(folder, score):
    """Has a calibration decide by another of its scores: which one wins is the rows' affair."""
    path = folder / FILE_NAME
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "score": score}))


@pytest.mark.parametrize("draws", ["0", "2"])
def test_the_distance_is_a_score_like_the_others(place, capsys, draws):
    learn(place)
    trained = f"--trained_on={place / 'train.jsonl'}"
    capsys.readouterr()
    run(*calibrating(place, f"--draws=[{draws}]", "--factors=[]", trained))
    said = capsys.readouterr().out
    assert "by distance: " in said or "decides by distance" in said
    assert "For nothing: always act, risk " in said
    calibration = Calibration.read(place / "out", posterior_digest(place / "out"))
    assert calibration is not None
    assert {"distance", "prompt_length"} <= set(calibration.thresholds)
    assert calibration.baselines["chance"] == pytest.approx(0.4, abs=0.1)
    decide_by(place / "out", "distance")
    lines = predicting(place)
    assert {line["score"]["name"] for line in lines} == {"distance"}
    assert all(line["score"]["value"] == line["distance"] > 0 for line in lines)
    held_out = predicting(place, rows="held_out.jsonl")
    kept = calibration.held_out["distance"]
    assert [line["distance"] for line in held_out] == pytest.approx(kept, rel=1e-4)
    told = bayestune.decide(place / "out", place / "new.jsonl")
    assert [row["distance"] for row in told] == pytest.approx(
        [line["distance"] for line in lines], rel=1e-4
    )
    assert [row["decision"] for row in told] == [line["decision"] for line in lines]
    run("evaluate", f"--posterior={place / 'out'}", f"--evaluation_data={place / 'new.jsonl'}")
    record = read_records(place / "out")[-1]
    rows = read_rows(place / "out" / record["predictions"])
    assert [row["decision"] for row in rows] == [line["decision"] for line in lines]

    figures = place / "drift.jsonl"
    drifting = [f"--rows={place / 'new.jsonl'}", f"--output={figures}", "--level=0.001"]
    main(["drift", str(place / "out"), *drifting, "--scores=[distance]"])
    assert set(read_rows(figures)[0]["distances"]) == {"distance"}
    capsys.readouterr()
    run("rank", place / "out", f"--rows={place / 'new.jsonl'}", "--draws=2", "--number=3")
    ranked = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    by_id = {line["id"]: line["distance"] for line in lines}
    for line in ranked:
        assert line["distance"] == pytest.approx(by_id[line["id"]], rel=1e-4)


def test_a_plain_adapter_and_a_student_have_distances_of_their_own(place):
    run(*fitting(place, method="mle", learning_rate=0.1))
    shutil.copytree(place / "out", place / "plain")
    for path in (place / "plain").iterdir():
        if not path.name.startswith("adapter"):
            path.unlink() if path.is_file() else shutil.rmtree(path)
    trained = f"--trained_on={place / 'train.jsonl'}"
    run(*calibrating(place, trained))
    model = f"--model={place / 'model'}"
    run(*calibrating(place, trained, model, folder="plain"))
    own = [line["distance"] for line in predicting(place)]
    plain = [line["distance"] for line in predicting(place, folder="plain")]
    assert own == pytest.approx(plain, rel=1e-4)

    run(*fitting(place, output="blob", **NOISY))
    student = f"--student={place / 'out'}"
    ways = ["--draws=[2]", "--factors=[]", student]
    run(*calibrating(place, *ways, trained, folder="blob"))
    path = place / "blob" / FILE_NAME
    facts = json.loads(path.read_text())
    if facts["variant"] == "student":
        of_student = [line["distance"] for line in predicting(place, folder="blob")]
        assert of_student == pytest.approx(own, rel=1e-4)
    else:
        assert predicting(place, folder="blob")[0]["distance"] != pytest.approx(own[0], rel=1e-2)


def test_what_has_no_distance_says_so(place, capsys, caplog):
    run(*fitting(place, method="ensemble"))
    trained = f"--trained_on={place / 'train.jsonl'}"
    run(*calibrating(place, trained))
    assert "no distance: the posterior has no mean adapter" in caplog.text
    assert "distance" not in predicting(place)[0]
    wrong = calibrating(place, f"--trained_on={place / 'new.jsonl'}")
    assert "was fitted on none; expected the rows of its training" in failed(wrong, capsys)
    capsys.readouterr()
    run(*calibrating(place))
    assert "--trained_on FILE" in capsys.readouterr().out


def test_a_single_training_row_gives_no_distance_and_the_rest(place, caplog):
    run(*fitting(place, method="mle", learning_rate=0.1))
    one = write_rows(place / "one.jsonl", read_rows(place / "train.jsonl")[:1])
    run(*calibrating(place, f"--trained_on={one}"))
    assert "no distance: got activations of one row" in caplog.text
    assert "distance" not in predicting(place)[0]
