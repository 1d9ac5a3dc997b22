import json
from dataclasses import replace

import pytest
import torch

from bayestune.data.prompts import CHOICES, PASSAGE_CHOICES
from bayestune.errors import Refusal
from bayestune.evaluation import EvaluationOptions
from bayestune.forward import Draws
from bayestune.methods import METHODS, MLE, BLoB, Distilled, Ensemble, MCDropout, Temperature
from bayestune.methods.recipes import WithTraining
from bayestune.models import LoadedModel
from bayestune.session import Session, TaskOptions
from bayestune.session.as_fitted import seen_rows
from bayestune.session.before_fitting import learnt_rows
from bayestune.session.fit import details_of
from bayestune.sharing import write_card
from bayestune.training import Training

QUICK = Training(steps=2, batch_size=2, learning_rate=0.1, progress=False)
OPTIONS = TaskOptions()


@pytest.fixture
def opened(llama, byte_level, tiny_task, tmp_path):
    """A session on a tiny model in a folder."""
    llama().save_pretrained(tmp_path / "model")
    byte_level.save_pretrained(tmp_path / "model")
    model = llama().eval()
    name = str(tmp_path / "model")
    loaded = LoadedModel(model, byte_level, name)
    return Session.of(loaded, tiny_task, OPTIONS, progress=False)


def rows_file(folder, task):
    lines = []
    for row in task.evaluation:
        answer = row.options[row.answer]
        line = {"question": row.question, "options": row.options, "answer": answer}
        lines.append(json.dumps(line) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines))
    return TaskOptions(evaluation_data=folder / "rows.jsonl")


def test_a_fit_is_saved_and_loaded_as_it_was(opened, tmp_path):
    out = tmp_path / "out"
    fit = opened.fit(MLE(), QUICK, out)
    session = Session.of_posterior(out, rows_file(tmp_path, opened.task))
    loaded = session.load(out)
    assert loaded.posterior.report == fit.posterior.report
    assert loaded.posterior.report.seconds > 0
    assert (loaded.label, loaded.bf16) == (fit.label, fit.bf16) == ("MLE", False)
    before, after = opened.predict(fit, Draws(0)), session.predict(loaded, Draws(0))
    assert torch.equal(before.probabilities, after.probabilities)
    options = EvaluationOptions(draws=(0,), resamples=10)
    (now,) = session.evaluate(loaded, options)
    (then,) = opened.evaluate(fit, options)
    assert now.record["config"]["training"] == json.loads(json.dumps(fit.details["training"]))
    for key in ("method", "name", "label", "seed", "train_rows", "model", "rows"):
        assert now.record[key] == then.record[key], key


def test_noise_that_a_fit_chose_is_what_its_records_and_card_say(opened, tmp_path):
    train = opened.task.train
    more = [replace(row, id=f"{row.id}b", question=f"say {row.question}") for row in train]
    wide = Session.of(opened.loaded, replace(opened.task, train=(*train, *more)), OPTIONS)
    losses = {"1 × noise and 1 × steps": 2.0, "1 × noise and 0.5 × steps": 3.0}
    losses |= {"2 × noise and 1 × steps": 1.0, "4 × noise and 1 × steps": 2.0}
    out = tmp_path / "out"
    kept = out / "checkpoints" / "noise_choice.json"
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps({name: [loss] * 24 for name, loss in losses.items()}))
    training = replace(QUICK, steps=12, learning_rate=0.01, resume=True)
    fit = wide.fit(BLoB(final_std="auto"), training, out)
    (result,) = wide.evaluate(fit, EvaluationOptions(draws=(2,), resamples=10))
    course = result.record["fit"]
    assert course["prior_std"] == 0.4
    for std in course["std"].values():
        assert std / course["prior_std"] == pytest.approx(0.5, rel=0.1)
    assert result.record["config"]["method"]["final_std"] == "auto"  # as it was asked for
    text = write_card(out).read_text(encoding="utf-8")
    assert "| prior | N(0, σ²) on the entries of A, σ = 0.4 |" in text
    assert "`final_std=0.2`" in text


def new_rows(task):
    """Six rows that differ from each other and from those of the task."""
    rows = enumerate(task.evaluation)
    return tuple(
        replace(row, id=f"n{i}", question=f"{'the ' * (i + 1)}{row.question}") for i, row in rows
    )


@pytest.mark.parametrize(("steps", "count"), [(1, 2), (2, 4), (3, 6), (5, 6)])
def test_of_the_unlabelled_rows_those_that_a_student_reached_were_seen(
    steps, count, opened, tmp_path
):
    rows = new_rows(opened.task)
    scorer = replace(opened.scorer, task=replace(opened.task, unlabelled=rows))
    student = Distilled(MLE(), steps=steps)
    for method in (student, Temperature(student), WithTraining(student, {"progress": False})):
        learnt = learnt_rows(method, scorer, QUICK)
        assert len({row.fingerprint for row in learnt}) == count
        assert {row.fingerprint for row in learnt} <= {row.fingerprint for row in rows}
    assert learnt_rows(MLE(), scorer, QUICK) == ()
    assert len(learnt_rows(Ensemble(student), scorer, QUICK)) == 6  # a choice a member


def test_a_student_keeps_which_rows_it_has_seen(opened, tmp_path):
    rows = new_rows(opened.task)
    task = replace(opened.task, unlabelled=rows)
    session = Session.of(opened.loaded, task, OPTIONS, progress=False)
    fit = session.fit(Distilled(MLE(), steps=1), QUICK, tmp_path / "out")
    assert seen_rows(fit.details, rows) == fit.posterior.teacher.rows == 2


def test_a_finished_fit_is_loaded_and_not_made_again(opened, tmp_path, monkeypatch):
    out = tmp_path / "out"
    before = opened.fit(MLE(), QUICK, out).posterior.report

    def unwanted(*_):
        raise AssertionError("fitted again")

    monkeypatch.setattr(MLE, "fit", unwanted)
    session = Session.of_posterior(out, rows_file(tmp_path, opened.task))
    assert session.fit(MLE(), replace(QUICK, resume=True), out).posterior.report == before


def as_in_0_1_0(folder, key):
    """Rewrites `posterior.json` as it was before it held METHODS' key and the options."""
    path = folder / "posterior.json"
    details = json.loads(path.read_text())
    details.pop("questions", None)
    old = {"method": METHODS[key].__name__.lower(), "fields": {"prior_std": 0.3}}
    path.write_text(json.dumps({**details, **old}))


def test_an_artefact_of_0_1_0_is_of_its_method(opened, tmp_path):
    out = tmp_path / "out"
    opened.fit(MLE(), QUICK, out)
    for key in METHODS:
        as_in_0_1_0(out, key)
        assert details_of(out)["method"] == key
    as_in_0_1_0(out, "mc_dropout")
    session = Session.of_posterior(out, rows_file(tmp_path, opened.task))
    (result, *_) = session.evaluate(session.load(out), EvaluationOptions(resamples=10))
    assert (result.record["method"], result.record["label"]) == ("mc_dropout", "MCDropout")
    assert result.record["config"]["method"] == {"method": "mc_dropout", "prior_std": 0.3}
    questions = result.record["config"]["questions"]
    assert (questions["scoring"], questions["max_length"]) == ("letter", 300)


def test_a_posterior_alone_does_not_say_how_it_was_fitted(opened, tmp_path):
    out = tmp_path / "out"
    opened.fit(MLE(), QUICK, out)
    path = out / "posterior.json"
    details = json.loads(path.read_text())
    kept = ("format", "bayestune", "posterior", "facts", "mean_digest")
    path.write_text(json.dumps({name: details[name] for name in kept}))
    with pytest.raises(ValueError, match="does not say how it was fitted: got a posterior alone"):
        Session.of_posterior(out, OPTIONS)


def test_other_rows_are_put_as_those_of_the_fit(opened):
    """A passage that the fitted prompt has no place for is refused."""
    passage = replace(opened.task.evaluation[0], context="the sky is blue")
    other = replace(opened.task, name="other", evaluation=(passage,), prompt=PASSAGE_CHOICES)
    with pytest.raises(Refusal, match="1 rows of other have a context: got a fit whose rows had"):
        opened.on(other)
    plain = replace(other, evaluation=opened.task.evaluation)
    assert opened.on(plain).task.prompt == CHOICES


def test_records_keep_options_of_the_fit_and_of_the_evaluation(tmp_path):
    fitted = TaskOptions(data=tmp_path / "mine.jsonl", holdout=0.1, train_rows=8, scoring="text")
    here = TaskOptions(evaluation_data=tmp_path / "test.jsonl", evaluation_rows=5)
    recorded = here.recorded(fitted.recorded())
    assert recorded["data"] == "mine.jsonl"
    assert recorded["evaluation_data"] == "test.jsonl"
    assert (recorded["holdout"], recorded["train_rows"], recorded["scoring"]) == (0.1, 8, "text")
    assert recorded["evaluation_rows"] == 5


def test_the_details_name_the_method_by_its_key(opened, tmp_path):
    opened.fit(MCDropout(), QUICK, tmp_path / "out")
    details = json.loads((tmp_path / "out/posterior.json").read_text())
    assert details["method"] == details["fields"]["method"] == "mc_dropout"
