"""A cascade: the student or the mean first, draws for the rows it is in doubt about."""

import shutil

import pytest
import torch
from clients import serving, with_band

import bayestune
from bayestune.decisions import Calibration, CalibrationOptions, Promise, doubtful_band
from bayestune.errors import Refusal
from bayestune.posteriors import posterior_digest
from bayestune.session import PredictionOptions, VariantOptions
from running import run


def lines_of(client, new, **more):
    return client.post("/v1/decisions", json={"rows": new, **more}).json()["rows"]


@pytest.mark.parametrize("student", [False, True])
def test_rows_in_the_band_have_the_draws_and_others_the_first_answer(place, new, tmp_path, student):
    folder = shutil.copytree(place / "blob", tmp_path / "blob")
    with serving([folder, place / "mle"]) as client:
        drawn = lines_of(client, new)
        first = lines_of(client, new, **({"model": "mle"} if student else {"draws": 0}))
    temperature = drawn[0]["calibration"]["temperature"]
    doubts = sorted(1 - line["confidence"] for line in first)
    band = [(doubts[9] + doubts[10]) / 2, (doubts[29] + doubts[30]) / 2]
    more = {}
    if student:
        shutil.copytree(place / "mle", tmp_path / "mle")
        more = {"student": "../mle", "student_digest": posterior_digest(place / "mle")}
    with_band(folder, band, **more)

    told = bayestune.decide(folder, place / "new.jsonl")
    with serving([folder]) as client:
        client.app.state.handler.served(None).check_cascade()
        found = lines_of(client, new, include_draws=True)
        alone = [client.post("/v1/decisions", json=row).json() for row in new[:6]]
    asked = 0
    for line, quick, slow, said in zip(found, first, drawn, told, strict=True):
        assert line["probabilities"] == pytest.approx(said["probabilities"], abs=1e-5)
        assert line["decision"] == said["decision"]
        if band[0] <= 1 - quick["confidence"] <= band[1]:
            asked += 1
            assert line["probabilities"] == pytest.approx(slow["probabilities"], abs=1e-5)
        else:
            p = torch.tensor(quick["probabilities"]).log() / temperature
            assert line["probabilities"] == pytest.approx(p.softmax(0).tolist(), abs=1e-4)
            assert line["mutual_information"] == pytest.approx(0, abs=1e-9)
        assert len(line["draws"]) == 3
    assert asked == 20
    for line, whole in zip(alone, found, strict=False):
        assert line["probabilities"] == pytest.approx(whole["probabilities"], abs=1e-5)
        assert line["decision"] == whole["decision"]


def test_a_cascade_is_compared_with_the_other_ways(place, tmp_path, capsys):
    folder = shutil.copytree(place / "blob", tmp_path / "blob")
    rows = f"--rows={place / 'held_out.jsonl'}"
    easy = ("--risk=0.3", "--confidence=0.8", "--factors=[]")
    run("calibrate", folder, rows, *easy, "--draws=[0,3]", "--cascade=0.4")
    assert "cascade" in capsys.readouterr().out
    calibration = Calibration.read(folder, posterior_digest(folder))
    times = {row["variant"]: row["milliseconds"] for row in calibration.table}
    assert times["mean"] < times["cascade"] < times["mean"] + times["3 draws"]
    assert PredictionOptions.of({"band": [0.1, 0.2]}).band == (0.1, 0.2)
    easier = CalibrationOptions(Promise(0.3, 0.8))
    only_draws = VariantOptions((3,), factors=(), cascade=0.4)
    with pytest.raises(Refusal, match="expected a student or the mean, and draws"):
        bayestune.calibrate(folder, place / "held_out.jsonl", easier, only_draws)
    with pytest.raises(Refusal, match="VariantOptions.cascade: got 1.5"):
        VariantOptions(cascade=1.5)


def test_an_artefact_without_a_cascade_is_not_served_as_one(place):
    with serving([place / "blob"]) as client:
        served = client.app.state.handler.served(None)
        with pytest.raises(Refusal, match="got --cascade for blob, of '3 draws"):
            served.check_cascade()


def test_the_band_holds_its_share_of_rows_and_the_threshold():
    scores = torch.linspace(0, 1, 101)
    wrong = scores > 0.6
    low, high = doubtful_band(scores, wrong, 0.1, 0.2)
    inside = (scores >= low) & (scores <= high)
    assert inside.sum() == 20
    acted = torch.arange(101)[(wrong.cumsum(0) / torch.arange(1, 102)) <= 0.1].max()
    assert inside[acted]
    assert inside[acted + 1]
    low, high = doubtful_band(scores, torch.zeros(101, dtype=torch.bool), 0.1, 0.2)
    assert ((scores >= low) & (scores <= high)).nonzero()[:, 0].tolist() == list(range(81, 101))
    with pytest.raises(Refusal, match="got cascade=1"):
        doubtful_band(scores, wrong, 0.1, 1)
