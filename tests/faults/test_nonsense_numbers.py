"""Numbers that cannot be meant are refused when settings are made, before a model is loaded."""

from dataclasses import fields

import numpy as np
import pytest

from bayestune.adapters import Lora, attach
from bayestune.bench import Grid, run_bench
from bayestune.cli import main
from bayestune.data import load_task
from bayestune.errors import Refusal
from bayestune.evaluation import EvaluationOptions
from bayestune.methods import (
    IVON,
    MAP,
    SWAG,
    TFB,
    DALorRA,
    Ensemble,
    Laplace,
    MCDropout,
    PosteriorScale,
    ScalaBL,
    Temperature,
)
from bayestune.session import TaskOptions
from bayestune.training import Training

NAN = float("nan")


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        *((Training, "steps", value) for value in (-5, 0, 2.5, True, "7", NAN)),
        *((Training, "warmup_ratio", value) for value in (3, -0.1, NAN)),
        (Training, "epochs", 0),
        (Training, "batch_size", 0),
        (Training, "accumulation", -1),
        (Training, "learning_rate", -1e-3),
        (Training, "learning_rate", float("inf")),
        (Training, "weight_decay", -1),
        (Training, "max_grad_norm", -1),
        (Training, "seed", -1),
        (Training, "seed", 2**32),
        (Training, "save_steps", 0),
        (Training, "logging_steps", 0),
        (Lora, "rank", 0),
        (Lora, "alpha", -16),
        (Lora, "dropout", 1.0),
        (Lora, "targets", "q_proj"),
        *((TaskOptions, "max_length", value) for value in (0, -1)),
        (TaskOptions, "train_rows", 0),
        (TaskOptions, "evaluation_rows", -3),
        (TaskOptions, "holdout", 1.0),
        (TaskOptions, "subset_seed", -1),
        (TaskOptions, "scoring", "leter"),
        (TaskOptions, "answer_is", "word"),
        *((EvaluationOptions, "draws", value) for value in ((0, -2), (5, 5), (2.5,))),
        (EvaluationOptions, "prediction_batch", 0),
        (EvaluationOptions, "max_tokens", 0),
        (EvaluationOptions, "bins", 0),
        (EvaluationOptions, "binning", "text"),
        (EvaluationOptions, "resamples", 0),
        (EvaluationOptions, "shared_prefix", 0),
        (EvaluationOptions, "draw_seed", -1),
        (Grid, "seeds", ()),
        (Grid, "seeds", (1, 1)),
        (Grid, "seeds", (1, -1)),
        (Grid, "models", ()),
        (Grid, "tasks", {}),
        (Grid, "methods", {}),
        (TFB, "anchors", 0),
        (TFB, "tolerance", NAN),
        (Laplace, "rank_kfac", 0),
        (Laplace, "structure", "kfca"),
        (Temperature, "draws", -1),
        (PosteriorScale, "factors", (1.0, -1.0)),
        (Ensemble, "seed_step", 0),
        (MAP, "prior_std", NAN),
        (MCDropout, "dropout", NAN),
        (SWAG, "rate", NAN),
        (SWAG, "every", 0),
        (ScalaBL, "init_std", NAN),
        (DALorRA, "kl_weight", NAN),
        (IVON, "ess", NAN),
    ],
)
def test_a_number_that_cannot_be_meant(kind, name, value):
    assert name in {field.name for field in fields(kind)}
    with pytest.raises(Refusal, match=rf"{kind.__name__}\.{name}: got .*, expected "):
        kind(**{name: value})


def test_numbers_of_other_libraries_are_numbers():
    made = Training(steps=np.int64(3), learning_rate=np.float32(0.5), warmup_ratio=1)
    assert (made.steps, made.epochs) == (3, None)


@pytest.mark.parametrize("option", ["--steps=-5", "--warmup_ratio=3", "--lora.rank=0"])
def test_a_command_says_so_before_it_loads_a_model(option, tmp_path, capsys, monkeypatch):
    def unwanted(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("bayestune.session.opened_model.load_model", unwanted)
    output = f"--output={tmp_path / 'out'}"
    try:
        code = main(["fit", "--model=no/such", "--task=everyday", output, option])
    except SystemExit as end:
        code = end.code
    assert code == 2
    said = capsys.readouterr().err
    assert ": got " in said
    assert "expected a" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("targets", [("q_prj",), ("q_proj", "v_prj"), ("lm_head", "proj")])
def test_every_target_is_a_module(llama, targets):
    wrong = next(name for name in targets if name not in ("q_proj", "lm_head"))
    with pytest.raises(Refusal, match=rf"got targets \['{wrong}'\], expected names among .*; did"):
        attach(llama(), Lora(targets=targets))


def test_targets_of_several_families_may_stand_together(llama):
    adapted = attach(llama(), Lora(targets=("q_proj", "query")))
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == 2


def test_a_target_may_be_a_path(llama):
    path = "model.layers.0.self_attn.q_proj"
    adapted = attach(llama(), Lora(targets=(path, "mlp.up_proj")))
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == 3


def test_a_misspelt_name_is_told_with_the_nearest(tmp_path):
    with pytest.raises(Refusal, match="unknown task: got 'boolqq', .*; did you mean 'boolq'"):
        load_task("boolqq")
    for only in ({"only_tasks": ["everydya"]}, {"only_methods": ["blop"]}):
        with pytest.raises(Refusal, match="not in the grid: got .*; did you mean '(everyday|blob)"):
            run_bench(Grid(), tmp_path, **only)
