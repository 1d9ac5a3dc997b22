import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from bayestune import Refusal
from bayestune.forward import Draws
from bayestune.methods import MLE, BLoB, Distilled, Ensemble, Laplace, MCDropout, Temperature
from bayestune.methods.distilled import fresh_targets
from bayestune.posteriors import predict, save_posterior
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


def test_fresh_targets_average_to_the_predictive(case, teacher):
    rows = case.scorer.encode(case.task.evaluation)
    targets = fresh_targets(teacher, case.scorer, rows, 300, TRAINING).double()
    average = predict(teacher, case.batch, 400).probabilities
    error = (targets.var(0) / 300 + targets.var(0) / 400).sqrt().clamp_min(1e-9)
    width = average.shape[1]
    assert ((targets.mean(0)[:, :width] - average).abs() / error[:, :width]).max() < 4.5
    assert torch.equal(targets[:, :, :width] > 0, (average > 0).expand(300, -1, -1))


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
    chosen = Distilled().rows(scorer)
    assert [row.content for row in chosen] == [row.content for row in case.task.evaluation]
    assert all(row.answer is None for row in chosen)
    both = Distilled(labelled=True).rows(scorer)
    assert len(both) == len(case.task.evaluation) + len(case.task.train)
    assert all(row.answer is None for row in both)


@pytest.mark.parametrize(
    "base", [Ensemble(size=2), Laplace(), MCDropout(), Temperature(), Ensemble(WIDE, size=2)]
)
def test_any_method_can_teach(case, base):
    student = case.fit(Distilled(base, steps=4))
    assert student.atoms == 1
    assert student.report.extra["teacher"]["draws"] == "fresh"
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
