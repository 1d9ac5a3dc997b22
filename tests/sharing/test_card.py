"""A card says what the folder and its records say, and nothing else."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard

from bayestune import Refusal, write_card
from bayestune.evaluation import read_records
from bayestune.posteriors import posterior_digest
from bayestune.sharing import Known
from bayestune.sharing.card import card_digest
from running import failed, fitting, own_rows, run, write_rows


def copied(home, tmp_path):
    return shutil.copytree(home / "out", tmp_path / "tickets")


def test_a_card_has_the_fit_the_figures_and_how_to_load(home, tmp_path, capsys):
    folder = copied(home, tmp_path)
    run("card", folder, "--base_model=owner/base")
    assert capsys.readouterr().out == f"card in {folder / 'README.md'}\n"
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "| method | `blob` |" in text
    assert "| prior | N(0, σ²) on the entries of A, σ = 0.2 |" in text
    assert "| posterior | mean standard deviation of the entries of A: 0." in text
    assert "| training rows | 8 |" in text
    assert "| optimiser's steps | 6 |" in text
    assert "`learning_rate=0.05`" in text
    assert "| LoRA | rank 2, alpha 16, on lm_head, q_proj, v_proj |" in text
    assert "BLoB N=8" in text
    assert "bayestune export FOLDER" in text
    student = shutil.copytree(home / "student", tmp_path / "student")
    told = write_card(student).read_text(encoding="utf-8")
    assert "A LoRA adapter of `model`, fitted with bayestune." in told
    assert "bayestune export" not in told  # it is one already
    assert "5 rows" in text
    assert 'AutoModelForCausalLM.from_pretrained("owner/base")' in text
    assert "## When to act" not in text  # it is not calibrated
    assert str(home) not in text


@pytest.mark.parametrize(
    ("method", "prior", "spread"),
    [("bbb", "A and B", "A and B"), ("map", "A and B", None), ("ivon", None, "A and B")],
)
def test_a_card_says_whose_entries_have_the_prior(method, prior, spread, home):
    given = {"map.prior_std": 0.2} if method == "map" else {}
    run(*fitting(home, output=method, method=method, **given))
    text = write_card(home / method).read_text(encoding="utf-8")
    lines = {
        "| prior | N(0, σ²) on the entries of ": prior,
        "| posterior | mean standard deviation of the entries of ": spread,
    }
    for begin, sides in lines.items():
        assert (begin in text) is (sides is not None)
        assert sides is None or f"{begin}{sides}" in text


def test_the_metadata_are_the_hubs(home, tmp_path):
    folder = copied(home, tmp_path)
    text = write_card(folder, base_model="owner/base").read_text(encoding="utf-8")
    data = ModelCard(text, ignore_metadata_errors=False).data
    assert data.library_name == "peft"
    assert data.base_model == "owner/base"
    assert {"lora", "bayestune", "blob"} <= set(data.tags)
    records = {record["label"]: record for record in read_records(folder)}
    assert set(records) == {"BLoB N=0", "BLoB N=8"}
    found = {(one.metric_type, one.metric_name): one for one in data.eval_results}
    assert len(found) == 10
    for label, record in records.items():
        one = found["nll", f"NLL, {label}"]
        told = record["metrics"]["nll"]
        assert one.metric_value == told["value"]
        assert one.metric_args == {"n": 5, "low": told["low"], "high": told["high"]}
        assert one.dataset_name == record["task"]
    assert data.model_name == "tickets"


def test_what_is_not_known_is_left_out(home, tmp_path):
    folder = copied(home, tmp_path)
    (folder / "records.jsonl").unlink()
    (folder / "training.json").unlink()
    text = write_card(folder).read_text(encoding="utf-8")
    card = ModelCard(text)
    assert card.data.eval_results is None
    assert card.data.base_model is None  # a folder of this machine is no model of the Hub
    assert "## Calibration" not in text
    assert "optimiser's steps" not in text
    assert str(home) not in text


def test_a_calibrations_promises_are_told(home, tmp_path):
    folder = copied(home, tmp_path)
    write_rows(tmp_path / "held.jsonl", own_rows(60, start=100))
    run("calibrate", folder, f"--rows={tmp_path / 'held.jsonl'}", "--risk=0.5", "--draws=[2]")
    text = write_card(folder).read_text(encoding="utf-8")
    assert "of 30 held-out rows to choose on, 30 to promise on" in text
    assert "Kept: " in text


def test_records_of_another_fit_are_refused(home, tmp_path, capsys):
    folder = copied(home, tmp_path)
    records = read_records(folder)
    own = Known.of(folder, records).records
    assert [record["label"] for record in own] == ["BLoB N=0", "BLoB N=8"]
    run(*fitting(home, method="mle", output=tmp_path / "mle"))
    test = f"--evaluation_data={home / 'test.jsonl'}"
    run("evaluate", f"--posterior={tmp_path / 'mle'}", test)
    capsys.readouterr()
    said = failed(["card", folder, f"--records={tmp_path / 'mle'}"], capsys)
    assert "got 1 records (mle on test), of which none is of the fit in" in said
    both = [*read_records(tmp_path / "mle"), *records]
    assert Known.of(folder, both).records == own
    other = [{**record, "train_rows": 7} for record in records]
    with pytest.raises(Refusal, match="of which none is of the fit"):
        write_card(folder, records=other)


def test_a_card_that_is_there_is_kept(home, tmp_path, capsys):
    folder = copied(home, tmp_path)
    (folder / "README.md").write_text("mine")
    assert "README.md is there already: give --overwrite" in failed(["card", folder], capsys)
    run("card", folder, "--overwrite")
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert card_digest(text) == posterior_digest(folder)
    assert card_digest("mine") is None


def test_a_plain_adapter_and_a_mixture_have_cards(home, tmp_path):
    folder = copied(home, tmp_path)
    for name in ("posterior.json", "posterior.safetensors", "records.jsonl"):
        (folder / name).unlink()
    text = write_card(folder).read_text(encoding="utf-8")
    assert "PeftModel.from_pretrained" in text
    assert "load_posterior" not in text
    assert "## The fit" in text  # rank and targets
    sizes = {"ensemble.size": 2, "base": "mle"}
    run(*fitting(home, method="ensemble", output=tmp_path / "mixture", **sizes))
    text = write_card(tmp_path / "mixture").read_text(encoding="utf-8")
    assert "| on top of | `mle` |" in text
    assert "PeftModel" not in text  # there is no mean
    assert json.loads((tmp_path / "mixture/posterior.json").read_text())["members"]
