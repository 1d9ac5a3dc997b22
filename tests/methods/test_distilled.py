import json
import re
import shutil
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from bayestune import Refusal
from bayestune.forward import Draws
from bayestune.methods import (
    MLE,
    SWAG,
    TFB,
    BLoB,
    Distilled,
    Ensemble,
    Laplace,
    MCDropout,
    ScalaBL,
    Temperature,
    distil,
)
from bayestune.methods.asking import Asking
from bayestune.posteriors import load_posterior, posterior_digest, predict, save_posterior
from bayestune.training import newest_checkpoint
from promises import LONG, TRAINING

WIDE = BLoB(prior_std=0.4, final_std=0.3, schedule="constant")
QUICK = {"steps": 60, "learning_rate": 3e-2}


def divergence(p, q):
    """Mean KL(p ‖ q) over rows, in nats."""
    return torch.special.xlogy(p, p / q).nan_to_num(0).sum(-1).mean().item()


@pytest.fixture(scope="module")
def teacher(case):
    return case.fit(WIDE, **LONG)


def test_the_student_of_a_fixed_average_is_nearer_to_it_than_the_mean_is(case, teacher):
    batch, _ = case.collate(case.task.train)
    average = predict(teacher, batch, 40).probabilities
    student = case.fit(Distilled(WIDE, draws=40, **QUICK), **LONG)
    of_mean = divergence(average, predict(teacher, batch, 0).probabilities)
    of_student = divergence(average, predict(student, batch, 0).probabilities)
    assert of_student < 0.2 * of_mean


@pytest.fixture(scope="module")
def pair(case):
    """Two Gaussians that say the opposite of each other."""
    posterior = case.fit(Ensemble(WIDE, size=2), **LONG)
    with torch.no_grad():
        for name, weight in posterior.members[1].slots.weights().items():
            if "lora_B" in name:
                weight.mul_(-3)
    return posterior


@pytest.mark.parametrize("name", ["teacher", "pair"])
def test_fresh_targets_average_to_the_predictive(case, name, request, tmp_path):
    teacher = request.getfixturevalue(name)
    rows = case.scorer.encode(case.task.evaluation)
    asking = Asking(teacher, case.scorer, rows, None, 150, TRAINING)
    targets = asking.targets(tmp_path).double()
    average = predict(teacher, case.batch, 200).probabilities
    error = (targets.var(0) / 150 + targets.var(0) / 200).sqrt().clamp_min(1e-9)
    width = average.shape[1]
    assert ((targets.mean(0)[:, :width] - average).abs() / error[:, :width]).max() < 4.5
    assert torch.equal(targets[:, :, :width] > 0, (average > 0).expand(150, -1, -1))


def test_a_point_is_its_own_students_optimum(case):
    student = case.fit(Distilled(MLE(), draws=1, steps=20, learning_rate=1e-4), **LONG)
    point = case.fit(MLE(), **LONG)
    for draws in (Draws(0), Draws(3)):
        torch.testing.assert_close(
            student.logits(case.batch, draws), point.logits(case.batch, draws), atol=0.02, rtol=0.02
        )


def test_answers_are_not_seen(case):
    unlabelled = replace(case.task, unlabelled=case.task.evaluation)
    scorer = replace(case.scorer, task=unlabelled)
    chosen = Distilled().offered(scorer)
    assert [row.content for row in chosen] == [row.content for row in case.task.evaluation]
    assert all(row.answer is None for row in chosen)
    both = Distilled(labelled=True).offered(scorer)
    assert len(both) == len(case.task.evaluation) + len(case.task.train)
    assert all(row.answer is None for row in both)


@pytest.mark.parametrize(
    ("base", "draws"),
    [
        (MLE(), 1),
        (Ensemble(size=2), 2),
        (Ensemble(WIDE, size=2), "fresh"),
        (Laplace(), 1000),
        (Laplace(predictive="sampled"), "fresh"),
        (MCDropout(), "fresh"),
        (Temperature(), 1),
        (Temperature(Ensemble(WIDE, size=2)), "fresh"),
        (SWAG(every=1), "fresh"),
        (ScalaBL(), "fresh"),
        (TFB(anchors=6, draws=2, evaluations=2), "fresh"),
    ],
    ids=str,
)
def test_any_method_can_teach(case, base, draws):
    student = case.fit(Distilled(base, steps=4))
    assert student.atoms == 1
    assert student.teacher.draws == draws
    assert student.teacher.rows == len(case.task.train)
    assert student.report.steps > 8


def test_the_folder_is_a_stock_adapter(case, tmp_path):
    save_posterior(case.fit(Distilled(WIDE, steps=2)), tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in names)


def test_the_student_is_the_same_when_it_resumes(case, tmp_path):
    method = Distilled(WIDE, steps=8)
    run = {"save_steps": 4, "output": tmp_path}
    whole = case.fit(method, **run)
    shutil.rmtree(newest_checkpoint(tmp_path / "student"))
    asked = (tmp_path / "taught" / "targets.safetensors").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "base")  # the teacher is not needed again
    resumed = case.fit(method, **run, resume=True)
    assert (tmp_path / "taught" / "targets.safetensors").stat().st_mtime_ns == asked
    assert torch.equal(resumed.logits(case.batch, Draws(0)), whole.logits(case.batch, Draws(0)))


def test_a_head_is_distilled_with_its_layer(head):
    student = head.fit(Distilled(BLoB(prior_std=0.4, final_std=0.3), draws=4, steps=4), **LONG)
    assert student.logits(head.batch, Draws(0)).isfinite().all()


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"learning_rate": 0.0}, {"draws": 0}])
def test_nonsense_is_refused(wrong):
    with pytest.raises(Refusal, match="Distilled"):
        Distilled(**wrong)


def test_a_student_knows_its_teacher(case, teacher, tmp_path):
    folder = save_posterior(teacher, tmp_path / "teacher")
    loaded = load_posterior(case.make(), folder, case.scorer)
    student = distil(loaded, case.task.evaluation, Distilled(steps=2), TRAINING)
    assert (student.teacher.draws, student.teacher.rows) == ("fresh", len(case.task.evaluation))
    assert student.teacher.digest == posterior_digest(folder)
    save_posterior(student, tmp_path / "student")
    loaded = load_posterior(case.make(), tmp_path / "student", case.scorer)
    assert loaded.teacher == student.teacher
    assert "fresh draws of the posterior" in str(loaded.teacher)


def test_a_point_without_a_teacher_loads_as_before(case, tmp_path):
    save_posterior(case.fit(MLE()), tmp_path)
    assert json.loads((tmp_path / "posterior.json").read_text())["facts"] == {}
    assert load_posterior(case.make(), tmp_path, case.scorer).teacher is None


def test_a_students_temperature_is_its_own(case, tmp_path):
    tempered = case.fit(Temperature(Distilled(WIDE, steps=4)))
    save_posterior(tempered, tmp_path)
    loaded = load_posterior(case.make(), tmp_path, case.scorer)
    assert loaded.base.teacher == tempered.base.teacher
    assert loaded.temperature == tempered.temperature


def test_the_student_of_a_tempered_point_starts_at_its_probabilities_temperature(case):
    """The targets are the tempered ones: a student that is trained long is as unsure as they."""
    batch, _ = case.collate(case.task.train)
    tempered = case.fit(Temperature(), **LONG)
    assert tempered.temperature > 1.05
    target = predict(tempered, batch, 0).probabilities
    untempered = predict(tempered.base, batch, 0).probabilities
    student = case.fit(Distilled(Temperature(), **QUICK), **LONG)
    found = predict(student, batch, 0).probabilities
    assert divergence(target, found) < 0.2 * divergence(target, untempered)


def test_a_student_trains_without_its_teachers_dropout(case, tmp_path):
    save_posterior(case.fit(Distilled(MCDropout(), steps=2)), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0


def test_questions_are_needed_and_a_scorer_that_puts_them(case, teacher):
    with pytest.raises(Refusal, match="got no questions; expected one or more"):
        distil(teacher, ())
    with pytest.raises(Refusal, match="which cannot put questions; expected one of make_scorer"):
        distil(teacher.on(lambda model, batch: model(**batch).logits), case.task.train)


def test_what_is_no_posterior_question_or_distilled_is_refused(case, teacher, tmp_path):
    rows = case.task.evaluation
    for given in (
        (str(tmp_path), rows),
        (teacher, [{"question": "what is red?", "options": ["red", "green"]}]),
        (teacher, ["what is red?"]),
        (teacher, rows, BLoB()),
    ):
        with pytest.raises(Refusal, match="distil takes a posterior, questions and a Distilled"):
            distil(*given)


def test_an_output_may_be_text(case, tmp_path):
    student = case.fit(Distilled(MLE(), steps=2), output=str(tmp_path / "run"))
    assert student.atoms == 1
    assert (tmp_path / "run/taught/taught.json").is_file()


def interrupted_after(monkeypatch, parts):
    """Has the asking of a teacher end as by ctrl-C after so many parts."""
    whole = Asking._asked
    done = []

    def ask(self, batches):
        if len(done) == parts:
            raise KeyboardInterrupt
        done.append(batches)
        return whole(self, batches)

    monkeypatch.setattr(Asking, "_asked", ask)


def test_an_interrupted_teacher_is_asked_on(case, tmp_path, monkeypatch):
    """Its fit and what it said are kept; the student is the same bit for bit."""
    fits = []
    fit = BLoB.fit

    def counted(self, *given):
        fits.append(1)
        return fit(self, *given)

    monkeypatch.setattr(BLoB, "fit", counted)
    method = Distilled(WIDE, steps=12)
    whole = case.fit(method, output=tmp_path / "whole")
    with monkeypatch.context() as broken:
        interrupted_after(broken, 2)
        with pytest.raises(KeyboardInterrupt):
            case.fit(method, output=tmp_path / "cut")
    assert len(list((tmp_path / "cut/taught").glob("asked-*"))) == 2
    with monkeypatch.context() as watched:
        interrupted_after(watched, 2)  # two more are enough
        resumed = case.fit(method, output=tmp_path / "cut", resume=True)
    assert len(fits) == 2
    assert not list((tmp_path / "cut/taught").glob("asked-*"))
    assert resumed.teacher == whole.teacher
    assert torch.equal(resumed.logits(case.batch, Draws(0)), whole.logits(case.batch, Draws(0)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"draws": 5}, "draws: got 5, the fit has None"),
        ({"base": MLE()}, "base.method: got 'MLE', the fit has 'BLoB'"),
        ({"base": replace(WIDE, final_std=0.1)}, "base.final_std: got 0.1, the fit has 0.3"),
        ({"seed": 5}, "training.seed: got 5, the fit has 1"),
    ],
)
@pytest.mark.parametrize("parts", [1, 99])
def test_another_student_does_not_learn_what_was_kept(
    case, tmp_path, monkeypatch, parts, change, said
):
    method = Distilled(WIDE, steps=4)
    with monkeypatch.context() as broken:
        interrupted_after(broken, parts)
        with pytest.raises(KeyboardInterrupt) if parts == 1 else nullcontext():
            case.fit(method, output=tmp_path)
    run = {"output": tmp_path, "resume": True}
    if "seed" in change:
        run |= change
    else:
        method = replace(method, **change)
    with pytest.raises(Refusal, match=re.escape(said)):
        case.fit(method, **run)


def test_other_rows_or_another_posterior_are_not_those_that_were_kept(case, teacher, tmp_path):
    """Also where the posterior was fitted anew in the same place."""
    folder = save_posterior(teacher, tmp_path / "teacher")
    run = replace(TRAINING, output=tmp_path / "run")
    again = replace(run, resume=True)

    def load():
        return load_posterior(case.make(), folder, case.scorer)

    first = distil(load(), case.task.evaluation, Distilled(steps=2), run)
    same = distil(load(), case.task.evaluation, Distilled(steps=2), again)
    assert same.teacher == first.teacher
    with pytest.raises(Refusal, match="the student's rows: got '5 rows"):
        distil(load(), case.task.train[:5], Distilled(steps=2), again)
    refitted = load()
    with torch.no_grad():
        next(iter(refitted.slots.modules().values())).weight.mul_(2)
    with pytest.raises(Refusal, match="base.digest: got"):
        distil(refitted, case.task.evaluation, Distilled(steps=2), again)


@pytest.mark.parametrize("part", ["base", "student"])
def test_a_run_over_an_older_one_goes_on_with_its_own(case, tmp_path, monkeypatch, part):
    """A fit that is started anew where another was, and cut off, takes nothing of the other."""
    case.fit(Distilled(WIDE, steps=12), output=tmp_path, save_steps=4)
    other = Distilled(replace(WIDE, final_std=0.1), steps=8)
    cut = BLoB if part == "base" else Distilled
    with monkeypatch.context() as broken:
        broken.setattr(cut, "fit" if part == "base" else "learn", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            case.fit(other, output=tmp_path, save_steps=4)
    resumed = case.fit(other, output=tmp_path, save_steps=4, resume=True)
    whole = case.fit(other)
    assert resumed.teacher == whole.teacher
    assert torch.equal(resumed.logits(case.batch, Draws(0)), whole.logits(case.batch, Draws(0)))


def _interrupted(*given):
    raise KeyboardInterrupt


def test_of_more_rows_than_its_steps_reach_a_student_learns_a_choice_by_the_seed(case, tmp_path):
    """The teacher is not asked about the others, and nobody says that they were learnt."""
    rows = case.task.train + case.task.evaluation
    task = replace(case.task, unlabelled=rows)
    method = Distilled(MLE(), steps=2)
    training = replace(TRAINING, batch_size=2, output=tmp_path)
    scorer = replace(case.scorer, task=task)
    chosen = [method.rows(scorer, replace(training, seed=seed)) for seed in range(40)]
    assert {len(own) for own in chosen} == {4}
    assert chosen[0] == method.rows(scorer, replace(training, seed=0))
    assert {row.id for own in chosen for row in own} == {row.id for row in rows}
    student = method.fit(case.make(), scorer, training)
    assert student.teacher.rows == 4
    assert len(load_file(tmp_path / "taught/targets.safetensors")["targets"][0]) == 4
    assert len(method.rows(scorer, replace(training, accumulation=len(rows)))) == len(rows)


def test_a_student_that_was_saved_beside_the_parts_stays(case, tmp_path):
    student = case.fit(Distilled(MLE(), steps=2))
    save_posterior(student, tmp_path / "student")
    case.fit(Distilled(MLE(), steps=2), output=tmp_path)
    assert (tmp_path / "student/posterior.json").is_file()
