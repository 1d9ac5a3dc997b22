"""The price of scores: what is collected, the matched noise, the regression, the table."""

from pathlib import Path

import pytest
import torch

from bayestune.adapters import Lora
from bayestune.methods import MLE, BLoB
from bayestune.metrics import auroc
from bayestune.session import Session, TaskOptions
from bayestune.training import Training
from bayestune.whole_files import read_json_lines
from studies import score_price as study
from studies.score_price_table import added, cross_fitted, logistic, realised
from tests.hub_files import write_arc, write_model


@pytest.fixture
def fits(llama, byte_level, tmp_path):
    """An MLE and a BLoB as `fit` leaves them, and the data they were fitted on."""
    model = write_model(tmp_path / "model", llama(initializer_range=0.3), byte_level)
    data = write_arc(tmp_path / "data", 12, 40)
    options = TaskOptions(task="arc_easy", data_root=data, train_rows=10)
    lora = Lora(rank=2, targets=("q_proj", "v_proj"))
    training = Training(lora=lora, steps=2, learning_rate=0.1, progress=False)
    for name, method in (("mle", MLE()), ("blob", BLoB(init_root_std=0.7, prior_std=1.0))):
        Session.open(str(model), options).fit(method, training, tmp_path / name)
    return [str(tmp_path / name) for name in ("mle", "blob")], data


def test_collected_once_and_told(fits, tmp_path, capsys):
    folders, data = fits
    output = tmp_path / "scores"
    asked = ["collect", *folders, "--data_root", str(data), "--output", str(output)]
    study.main(asked)
    paths = sorted(output.iterdir(), key=lambda path: path.stem)
    assert [path.stem for path in paths] == ["blob", "blob--noise"]
    times = [path.stat().st_mtime_ns for path in paths]
    study.main(asked)
    assert [path.stat().st_mtime_ns for path in paths] == times
    blob, noise = (study.read(path) for path in paths)
    assert blob.draws.shape[:2] == (study.DRAWS, 40)
    assert (noise.draws.std(0) > 0).any()
    study.main(["table", "--risks", "0.6", "0.01", "--output", str(output)])
    said = capsys.readouterr().out
    assert "blob less matched noise on MLE" in said
    assert "refused: too few rows" in said
    records = read_json_lines(output / "records.jsonl")
    assert [record["kind"] for record in records] == ["added", "gate", "gate"] * 2
    assert records[0]["one_pass"] == added(blob)["one_pass"]
    through = realised(blob, 0.6)["scores"]
    assert all(
        0 <= found["low"] <= found["risk"] <= found["high"] <= 1 for found in through.values()
    )


def test_noise_has_the_norm_of_the_blobs(fits):
    folders, data = fits
    norms = study.norms_of(Path(folders[1]))
    options = TaskOptions(task="arc_easy", data_root=data)
    session = Session.of_posterior(Path(folders[0]), options)
    posterior = study.noisy(session.load(Path(folders[0])).posterior, norms)
    means = posterior.slots.weights()
    squares = dict.fromkeys(norms, 0.0)
    for index in range(200):
        for name, weight in posterior.draw(index).items():
            squares[name] += (weight - means[name]).square().sum().item() / 200
    for name, norm in norms.items():
        assert squares[name] ** 0.5 == pytest.approx(norm, rel=0.05)


def test_logistic_regression_is_at_its_optimum_and_cross_fitted():
    g = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(400, 2, generator=g), torch.ones(400, 1)], 1).double()
    truth = torch.tensor([2.0, 0.0, -0.5], dtype=torch.float64)
    y = torch.rand(400, generator=g) < (x @ truth).sigmoid()
    weights = logistic(x, y.double()).requires_grad_()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(x @ weights, y.double())
    (400 * loss + weights[:2].square().sum() / 2).backward()
    assert weights.grad.abs().max() < 1e-8
    noise = [torch.randn(400, generator=g).double() for _ in range(20)]
    useless = torch.rand(400, generator=g) < 0.5
    columns = torch.stack([*noise, torch.ones(400).double()], 1)
    assert auroc(columns @ logistic(columns, useless.double()), useless) > 0.6
    assert auroc(cross_fitted(noise, useless), useless) < 0.55
