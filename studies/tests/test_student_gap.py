"""How near a student is to its teacher: the divergence, and what is collected."""

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from torch.testing import assert_close

from bayestune.adapters import Lora
from bayestune.methods import BLoB, Distilled
from bayestune.session import Session, TaskOptions
from bayestune.training import Training
from bayestune.whole_files import read_json_lines
from studies import student_gap as study
from tests.hub_files import write_arc, write_model


def test_the_divergence_is_torchs_and_an_absent_option_adds_nothing():
    torch.manual_seed(0)
    first, second = torch.randn(2, 5, 3, dtype=torch.float64).softmax(-1)
    expected = kl_divergence(Categorical(first), Categorical(second))
    found = torch.tensor(study.divergences(first, second), dtype=torch.float64)
    assert_close(found, expected, rtol=0, atol=1e-5)
    absent = torch.zeros(5, 1, dtype=torch.float64)
    wider = [torch.cat([each, absent], 1) for each in (first, second)]
    assert study.divergences(*wider) == study.divergences(first, second)


def test_collected_once_and_told(llama, byte_level, tmp_path, capsys):
    model = write_model(tmp_path / "model", llama(initializer_range=0.3), byte_level)
    data = write_arc(tmp_path / "data", 60, 8)
    options = TaskOptions(
        task="arc_easy", data_root=data, train_rows=10, unlabelled_rows=20, holdout=0.2
    )
    training = Training(lora=Lora(rank=2, targets=("q_proj",)), steps=2, progress=False)
    blob = BLoB(init_root_std=0.7, prior_std=1.0)
    for name, method in (("blob", blob), ("distilled", Distilled(base=blob, steps=2))):
        Session.open(str(model), options).fit(method, training, tmp_path / name)
    file = tmp_path / "records.jsonl"
    pair = [str(tmp_path / name) for name in ("blob", "distilled")]
    asked = ["collect", *pair, "--data_root", str(data), "--rows", "5", "--json", str(file)]
    study.main(asked)
    study.main(asked)
    (record,) = read_json_lines(file)
    assert all(len(record[part]["student"]["kl"]) == 5 for part in ("learnt", "held_out"))
    assert "losses" not in record["learnt"]["student"]
    capsys.readouterr()
    study.main(["table", "--json", str(file)])
    _, _, line = capsys.readouterr().out.strip().splitlines()
    nll = sum(record["held_out"]["student"]["losses"]) / 5
    assert f"| {nll:.3f} |" in line
    assert record["held_out"]["mean"]["kl"] != pytest.approx(record["held_out"]["student"]["kl"])
