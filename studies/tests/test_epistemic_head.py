"""Heads for the draws' disagreement: what is collected, the two heads, the table."""

import pytest
import torch
from torch.distributions import Dirichlet

from bayestune.adapters import Lora
from bayestune.decisions import Spread
from bayestune.methods import BLoB, Distilled
from bayestune.session import Session, TaskOptions
from bayestune.training import Training
from bayestune.whole_files import read_json_lines
from studies import epistemic_head as study
from studies import epistemic_heads as heads
from studies.epistemic_table import attainable, rank_correlation
from tests.hub_files import write_arc, write_model


@pytest.fixture
def folders(llama, byte_level, tmp_path):
    """A BLoB and its student as `fit` leaves them, and the data they were fitted on."""
    model = write_model(tmp_path / "model", llama(initializer_range=0.3), byte_level)
    data = write_arc(tmp_path / "data", 60, 8)
    options = TaskOptions(task="arc_easy", data_root=data, train_rows=10, unlabelled_rows=20)
    training = Training(lora=Lora(rank=2, targets=("q_proj",)), steps=2, progress=False)
    blob = BLoB(init_root_std=0.7, prior_std=1.0)
    for name, method in (("blob", blob), ("distilled", Distilled(base=blob, steps=2))):
        Session.open(str(model), options).fit(method, training, tmp_path / name)
    return [str(tmp_path / name) for name in ("blob", "distilled")], data


def test_collected_once_and_told(folders, tmp_path, capsys):
    pair, data = folders
    output = tmp_path / "heads"
    asked = ["collect", *pair, "--data_root", str(data), "--output", str(output)]
    asked += ["--fitted", "20", "--judged", "25"]
    study.main(asked)
    (path,) = output.iterdir()
    found = study.read(path)
    assert found.fitted.draws.shape[:2] == (study.DRAWS, 20)
    assert found.judged.activations.shape == (25, 2 * 2)  # two layers, rank 2
    numbers = [set(rows) for rows in found.facts["rows"].values()]
    assert not numbers[0] & numbers[1]
    written = path.stat().st_mtime_ns
    study.main(asked)
    assert path.stat().st_mtime_ns == written
    study.main(["table", "--output", str(output)])
    assert "the draws themselves" in capsys.readouterr().out
    (record,) = read_json_lines(output / "records.jsonl")
    assert record["heads"]["the draws themselves"]["correlation"]["value"] == pytest.approx(1)
    with pytest.raises(ValueError, match="a student of 20 rows"):
        study.main([*asked[:-4], "--fitted", "21", "--output", str(tmp_path / "other")])


def dirichlet_rows(log_total, draws, seed):
    """A part whose draws are Dirichlet(α₀ p) with p of random logits of three options."""
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(len(log_total), 3, generator=g, dtype=torch.float64)
    torch.manual_seed(seed)
    drawn = Dirichlet(log_total.exp()[:, None] * logits.softmax(-1)).sample((draws,)).log()
    labels = torch.zeros(len(logits), dtype=torch.long)
    return heads.Part(drawn, logits, torch.zeros(len(logits), 1), labels)


def test_information_of_a_dirichlet():
    log_total = torch.tensor([0.0, 1.0, 3.0, 5.0], dtype=torch.float64)
    part = dirichlet_rows(log_total, 100_000, 1)
    spread = Spread.of(part.draws)
    each = spread.total_entropy() - torch.special.entr(spread.draws).sum(-1)
    error = each.std(0) / each.shape[0] ** 0.5
    exact = heads.information_of(log_total, part)
    shift = exact - each.mean(0)
    assert (shift.abs() < 4 * error + 0.01).all()  # 0.01: a hundredth of p is smoothed away


@pytest.mark.parametrize("name", list(heads.HEADS))
def test_head_finds_what_the_activations_say(name):
    """α₀ depends on one activation: the head with activations orders new rows, the other not."""
    parts = []
    for seed in (2, 3):
        g = torch.Generator().manual_seed(seed)
        z = torch.randn(300, 4, generator=g, dtype=torch.float64)
        part = dirichlet_rows(2 + z[:, 0], 10, seed)
        parts.append(heads.Part(part.draws, part.logits, z, part.labels))
    found = heads.Collected({}, *parts)
    rho = {}
    for kind, features in heads.FEATURES.items():
        values, _ = heads.predicted(heads.HEADS[name], features, found)
        rho[kind] = rank_correlation(values, found.judged.information)
    assert rho["and activations"] > rho["probabilities"] + 0.1
    assert rho["and activations"] > 0.9 * attainable(found.judged)


def test_an_option_that_a_row_lacks_changes_nothing():
    part = dirichlet_rows(torch.tensor([0.5, 2.0], dtype=torch.float64), 10, 4)
    missing = torch.full((10, 2, 1), -torch.inf, dtype=torch.float64)
    wider = heads.Part(
        torch.cat([part.draws, missing], -1),
        torch.cat([part.logits, missing[0]], -1),
        part.activations,
        part.labels,
    )
    log_total = torch.tensor([0.5, 2.0], dtype=torch.float64)
    for of in (heads.log_likelihood, heads.information_of):
        torch.testing.assert_close(of(log_total, wider), of(log_total, part))
