"""The whole of it: calibrate, store, decide; what is chosen where, and what is refused."""

import json
import logging
import math
from dataclasses import replace

import pytest
import torch

from bayestune.decisions import (
    Calibration,
    CalibrationOptions,
    HeldOut,
    Promise,
    Variant,
    calibrate,
    compare,
    decide,
    kept,
    losses_of,
    parts,
    score_rows,
)


def some_rows(count=400, seed=0, sharpness=3.0, draws=4):
    """Easy rows of four options, and logits that are `sharpness` times too large."""
    g = torch.Generator().manual_seed(seed)
    truth = 8 * torch.randn(count, 4, generator=g, dtype=torch.float64)
    labels = torch.multinomial(truth.softmax(-1), 1, generator=g)[:, 0]
    noise = torch.randn(draws, count, 4, generator=g, dtype=torch.float64)
    return sharpness * truth + noise, HeldOut(labels, [f"{seed}.{i}" for i in range(count)])


def some_calibration(asked=None, **options):
    logits, held_out = some_rows(**options)
    variants = {"mean": Variant(logits.mean(0, keepdim=True), 1.0, {"draws": 0})}
    variants["draws"] = Variant(logits, 4.0, {"draws": 4})
    return calibrate(variants, held_out, asked, "abc", "BLoB"), logits, held_out


def test_the_temperature_is_found_and_the_cheap_variant_kept():
    found, _, _ = some_calibration()
    assert (found.variant, found.settings) == ("mean", {"draws": 0})
    assert 2 < found.temperature < 4.5
    assert (found.num_choosing, found.num_thresholds) == (200, 200)
    assert [row["kept"] for row in found.table].count(True) == 1
    assert [row["milliseconds"] for row in found.table] == [1, 1, 4, 4]
    assert found.threshold.acted > 45


def test_a_dear_variant_is_kept_only_if_it_is_worth_its_price():
    logits, held_out = some_rows(sharpness=1.0)
    spoilt = logits[:1] + 6 * torch.randn(1, 400, 4, generator=torch.Generator().manual_seed(1))
    variants = {"mean": Variant(spoilt, 1.0), "draws": Variant(logits, 4.0)}
    assert calibrate(variants, held_out).variant == "draws"
    same = {"mean": Variant(logits, 1.0), "draws": Variant(logits, 4.0)}
    assert calibrate(same, held_out).variant == "mean"


def test_losses_of_the_comparison_are_cross_fitted():
    """Labels of a row's own fold must not reach its temperature."""
    logits, held_out = some_rows(100)
    labels = held_out.labels
    changed = labels.clone()
    changed[0] = (labels[0] + 1) % 4
    before = compare({"a": Variant(logits, 1.0)}, labels)[1]
    after = compare({"a": Variant(logits, 1.0)}, changed)[1]
    mine = torch.arange(100) % 5 == 0
    mine[0] = False
    assert torch.equal(before.losses[mine], after.losses[mine])
    assert before.tempered


def test_worse_means_by_more_than_chance_over_the_same_rows():
    logits, held_out = some_rows()
    trials = compare({"a": Variant(logits, 1.0), "b": Variant(logits * 5, 0.5)}, held_out.labels)
    chosen, table = kept(trials)
    assert chosen.tempered
    plain = next(row for row in table if row["variant"] == "b" and not row["temperature"])
    assert plain["worse_by"] > 1.645 * plain["standard_error"] > 0


def test_thresholds_are_set_on_rows_that_nothing_was_chosen_on():
    """Wrong labels on one part change the table alone, on the other the thresholds alone."""
    found, logits, held_out = some_calibration()
    order = held_out.order()
    variants = {"mean": Variant(logits.mean(0, keepdim=True), 1.0)}
    plain = calibrate(variants, held_out)
    for part, rows in (("choosing", order[:200]), ("promising", order[200:])):
        labels = held_out.labels.clone()
        labels[rows[:60]] = (labels[rows[:60]] + 1) % 4
        other = calibrate(variants, replace(held_out, labels=labels))
        assert (other.table == plain.table) == (part == "promising")
        assert (other.temperature == plain.temperature) == (part == "promising")
        assert (other.threshold.rows, plain.threshold.rows) == (200, 200)
    assert found.threshold.losses <= 0.05 * found.threshold.acted


def test_the_order_of_the_rows_changes_nothing_and_repeats_count_once(caplog):
    logits, held_out = some_rows()
    plain = calibrate({"draws": Variant(logits, 1.0)}, held_out)
    back = torch.arange(399, -1, -1)
    contents = [held_out.contents[index] for index in back.tolist()]
    turned = HeldOut(held_out.labels[back], contents)
    other = calibrate({"draws": Variant(logits[:, back], 1.0)}, turned)
    assert replace(other, date="") == replace(plain, date="")
    twice = HeldOut(held_out.labels.repeat(2), [*held_out.contents] * 2)
    with caplog.at_level(logging.WARNING):
        doubled = calibrate({"draws": Variant(logits.repeat(1, 2, 1), 1.0)}, twice)
    assert (doubled.num_choosing, doubled.thresholds) == (200, plain.thresholds)
    assert "400 rows repeat the content of others" in caplog.text


def test_rows_that_contradict_each_other_are_told(caplog):
    _, held_out = some_rows()
    contents = [*held_out.contents] * 2
    contradicted = HeldOut(torch.cat([held_out.labels, held_out.labels.flip(0)]), contents)
    unlike = int((held_out.labels != held_out.labels.flip(0)).sum())
    with caplog.at_level(logging.WARNING):
        kept = contradicted.order()
    assert 0 < unlike < 400
    assert f"{unlike} rows repeat a content with another label" in caplog.text
    back = torch.arange(799, -1, -1)
    turned = HeldOut(contradicted.labels[back], contents[::-1])
    assert torch.equal(turned.labels[turned.order()], contradicted.labels[kept])
    later = int((kept >= 400).sum())  # of labels that differ, either may count
    assert unlike / 4 < later < 3 * unlike / 4


def test_rows_contradict_each_other_whatever_the_order_of_their_options(caplog):
    labels = torch.tensor([0, 1, 0, 0])
    contents = ["q\na\nb", "q\nb\na", "r\na\nb", "r\nb\na"]
    same = ["q", "q", "r", "r"]
    with caplog.at_level(logging.WARNING):
        HeldOut(labels, contents, same=same, answers=["a", "a", "a", "b"]).order()
    assert "1 rows repeat a content with another label, such as 'r\\nb\\na'" in caplog.text


def test_rows_that_are_the_same_but_for_their_options_order_count_once(caplog):
    """Else a row would choose in one part, and vouch for the choice in the other."""
    logits, held_out = some_rows()
    turned = [f"{content} turned" for content in held_out.contents]
    twice = HeldOut(
        held_out.labels.repeat(2),
        [*held_out.contents, *turned],
        same=[*held_out.contents] * 2,
    )
    with caplog.at_level(logging.WARNING):
        found = calibrate({"draws": Variant(logits.repeat(1, 2, 1), 1.0)}, twice)
    assert (found.num_choosing, found.num_thresholds) == (200, 200)
    assert sorted(index % 400 for index in twice.order().tolist()) == list(range(400))
    assert "400 rows repeat the content of others" in caplog.text
    back = HeldOut(twice.labels, [*turned, *held_out.contents], same=twice.same)
    assert [(i + 400) % 800 for i in back.order().tolist()] == twice.order().tolist()


def test_a_calibration_survives_its_file(tmp_path):
    costs = torch.ones(4, 4) - torch.eye(4)
    asked = CalibrationOptions(Promise(0.1, 0.9), bands={"act": 0.1, "flag": 0.2}, costs=costs)
    found, _, _ = some_calibration(asked)
    path = found.write(tmp_path)
    assert path.name == "calibration.json"
    assert Calibration.read(tmp_path, "abc") == found
    assert Calibration.read(tmp_path / "none", "abc") is None
    assert [entry.name for entry in tmp_path.iterdir()] == ["calibration.json"]
    with pytest.raises(ValueError, match=r"a calibration of another posterior \(abc…, not xyz…"):
        Calibration.read(tmp_path, "xyz")
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"format": 2}))
    with pytest.raises(ValueError, match="got a calibration of format 2; expected 1; update"):
        Calibration.read(tmp_path, "abc")
    for wrong in ({"score": "none"}, {"set_kind": "none"}, {"temperature": -1.0}):
        path.write_text(json.dumps(facts | wrong))
        with pytest.raises(ValueError, match="expected what `bayestune calibrate` writes; calibr"):
            Calibration.read(tmp_path, "abc")
    path.write_text("[]")
    with pytest.raises(ValueError, match="expected what `bayestune calibrate` writes"):
        Calibration.read(tmp_path, "abc")


def test_decisions_are_the_calibrations_row_by_row():
    found, logits, held_out = some_calibration()
    mean = logits.mean(0, keepdim=True)
    got = decide(found, mean, held_out.contents)
    torch.testing.assert_close(got.probabilities, (mean[0] / found.temperature).softmax(-1))
    scores = score_rows(mean, (found.score,), found.temperature)[found.score]
    acts = torch.tensor([word == "act" for word in got.decisions])
    assert torch.equal(acts, scores <= found.threshold.value)
    second = held_out.order()[200:]
    assert acts[second].sum() == found.threshold.acted
    errors = losses_of(got.choice, held_out.labels)[second][acts[second]].sum()
    assert errors == found.threshold.losses
    row = got.rows()[0]
    assert row["score"]["name"] == found.score
    assert row["score"]["threshold"] == found.threshold.value
    assert row["calibration"]["temperature"] == found.temperature
    assert row["set"] == got.sets[0].nonzero()[:, 0].tolist()
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    one = decide(found, mean[:, 5:6])
    assert one.decisions == got.decisions[5:6]


def test_without_a_calibration_there_are_probabilities_alone():
    got = decide(None, torch.tensor([[[1.0, 0.0, -torch.inf]], [[0.0, 1.0, -torch.inf]]]))
    row = got.rows()[0]
    assert (row["calibration"], row["probabilities"]) == ("none", pytest.approx([0.5, 0.5]))
    assert "decision" not in row
    between = row["total_entropy"] - row["expected_entropy"]
    assert row["mutual_information"] == pytest.approx(2 * between)  # S/(S − 1), as in predictions


def test_bands_ask_beyond_the_last():
    found, logits, _ = some_calibration(
        CalibrationOptions(bands={"act": 0.05, "flag": 0.2}), count=1000
    )
    mean = logits.mean(0, keepdim=True)
    got = decide(found, mean)
    assert set(got.decisions) == {"act", "flag", "ask"} or set(got.decisions) == {"act", "flag"}
    cut = {name: band.value for name, band in found.bands.items()}
    for word, value, threshold in zip(got.decisions, got.values, got.thresholds, strict=True):
        assert (word == "act") == (value <= cut["act"])
        assert (word == "ask") == (value > cut["flag"])
        assert threshold == cut["flag" if word == "ask" else word]


def test_each_class_has_its_threshold():
    found, logits, _ = some_calibration(CalibrationOptions(per_class=True), count=1500)
    assert set(found.classes) == {"0", "1", "2", "3"}
    got = decide(found, logits.mean(0, keepdim=True))
    for word, value, choice in zip(got.decisions, got.values, got.choice.tolist(), strict=True):
        cut = found.classes[str(choice)].value
        assert (word == "act") == (cut is not None and value.item() <= cut)


def test_unsure_is_an_abstention():
    logits, held_out = some_rows()
    unsure = torch.full((400,), 2)
    unsure[::2] = -1  # every other row has no such option
    held_out = replace(held_out, unsure=unsure)
    found = calibrate({"draws": Variant(logits, 1.0)}, held_out)
    got = decide(found, logits, unsure=unsure)
    says_so = got.choice == unsure
    assert says_so.any()
    assert all(got.decisions[index] == "abstain" for index in says_so.nonzero()[:, 0].tolist())
    second = held_out.order()[200:]
    acts = torch.tensor([word == "act" for word in got.decisions])[second]
    assert acts.sum() == found.threshold.acted
    row = got.rows()[int(says_so.nonzero()[0])]
    assert row["score"]["value"] is None


@pytest.mark.parametrize("seed", range(10))
def test_a_score_of_ones_own_can_be_chosen(seed):
    logits, held_out = some_rows()
    choice = logits.softmax(-1).mean(0).argmax(-1)
    jitter = torch.rand(400, generator=torch.Generator().manual_seed(seed)) / 10
    oracle = (choice != held_out.labels).double() + jitter  # right below 0.1, wrong above 1
    held_out = replace(held_out, extra={"oracle": oracle})
    found = calibrate({"draws": Variant(logits, 1.0)}, held_out)
    assert found.score == "oracle"
    assert decide(found, logits, extra={"oracle": oracle}).decisions.count("act") > 200
    with pytest.raises(ValueError, match="got no score 'oracle'; expected the one"):
        decide(found, logits)


def test_a_variants_own_scores_are_on_offer_for_it_alone():
    logits, held_out = some_rows()
    variants = {}
    for name, own in (("mean", logits.mean(0, keepdim=True)), ("draws", logits)):
        wrong = own.softmax(-1).mean(0).argmax(-1) != held_out.labels
        variants[name] = Variant(own, 1.0, extra={f"oracle of {name}": wrong.double()})
    found = calibrate(variants, held_out)
    assert found.score == f"oracle of {found.variant}"
    assert sum(name.startswith("oracle") for name in found.thresholds) == 1
    short = {"mean": replace(variants["mean"], extra={"oracle": torch.zeros(3)})}
    with pytest.raises(ValueError, match=r"got columns of \[400, 3\] rows for 400 labels"):
        calibrate(short, held_out)


def test_what_costs_nothing_stands_beside_the_promises():
    logits, held_out = some_rows()
    found = calibrate({"draw": Variant(logits[:1], 1.0)}, held_out)
    _, second = parts(held_out, CalibrationOptions())
    labels = held_out.labels[second]
    wrong = (logits[0, second].argmax(-1) != labels).double().mean().item()
    commonest = labels.bincount().max().item() / len(labels)
    expected = {"chance": 0.25, "majority": commonest, "always_act": wrong}
    assert found.baselines == pytest.approx(expected)


def test_the_smallest_samples_calibrate_or_are_refused(caplog):
    """Two rows choose nothing; three do, and one of them is right by chance."""
    asked = CalibrationOptions(Promise(0.5, 0.5), set_coverage=0.5)
    for count in range(1, 21):
        logits, held_out = some_rows(count)
        variants = {"mean": Variant(logits[:1], 1.0), "draws": Variant(logits, 4.0)}
        if count < 3:
            with pytest.raises(ValueError, match=r"got . rows to choose a way .* give 4 held-out"):
                calibrate(variants, held_out, asked)
            continue
        found = calibrate(variants, held_out, asked)
        assert Calibration.from_json(found.to_json()) == found
        decide(found, variants[found.variant].logits, held_out.contents)


@pytest.mark.parametrize("wrong", [0, 1])
def test_rows_all_right_or_all_wrong_do_not_make_certainties(wrong):
    logits, held_out = some_rows(sharpness=1.0)
    labels = (logits.mean(0).argmax(-1) + wrong) % 4
    found = calibrate({"draws": Variant(logits, 1.0)}, replace(held_out, labels=labels))
    assert found.temperature == pytest.approx(math.exp(3.0 if wrong else -2.0))
    new, _ = some_rows(seed=1, sharpness=1.0)
    decided = decide(found, new, [str(index) for index in range(400)])
    assert decided.confidence.min() < 0.9
    assert (found.threshold.value is None) == bool(wrong)


def test_bands_begin_where_the_other_part_says_that_they_pass():
    """A band that begins at the fewest rows fails at the first error among them."""
    logits, held_out = some_rows(600, sharpness=1.0)
    noisy = torch.rand(600, generator=torch.Generator().manual_seed(3)) < 0.05
    labels = torch.where(noisy, (held_out.labels + 1) % 4, logits.mean(0).argmax(-1))
    asked = CalibrationOptions(Promise(0.3, 0.9), bands={"auto": 0.1, "look": 0.3})
    acted = []
    for seed in range(8):
        contents = [f"{seed}.{index}" for index in range(600)]
        same = HeldOut(labels, contents)
        found = calibrate({"draws": Variant(logits, 1.0)}, same, asked)
        assert found.threshold.risk == 0.1
        acted.append(found.bands["auto"].acted)
    assert sum(count > 150 for count in acted) >= 4


def test_random_ties_need_contents():
    found, logits, held_out = some_calibration(CalibrationOptions(set_kind="aps"))
    with pytest.raises(ValueError, match="got no contents; expected one a row"):
        decide(found, logits)
    first = decide(found, logits, held_out.contents).sets
    again = decide(found, logits[:, :7], held_out.contents[:7]).sets
    assert torch.equal(first[:7], again)


def test_refusals():
    logits, held_out = some_rows(89)
    variants = {"draws": Variant(logits, 1.0)}
    match = "got 45 rows to choose thresholds on; expected 59 or more .* give 118 held-out rows"
    with pytest.raises(ValueError, match=match):
        calibrate(variants, held_out, CalibrationOptions(Promise(0.05, 0.95)))
    with pytest.raises(ValueError, match="expected 59 or more .* give 118 held-out rows"):
        calibrate(variants, held_out, CalibrationOptions(bands={"act": 0.05, "flag": 0.2}))
    with pytest.raises(ValueError, match="got 2 of 89 rows that training saw, such as '0.1'"):
        replace(held_out, seen={"0.1", "0.2", "other"})
    with pytest.raises(ValueError, match="got no variants; expected one or more"):
        calibrate({}, held_out)
    with pytest.raises(ValueError, match=r"got variants of \(N, C\) \[\(88, 4\), \(89, 4\)\]"):
        calibrate(variants | {"mean": Variant(logits[:, 1:], 1.0)}, held_out)
    wrong = replace(held_out, labels=torch.full((89,), 4))
    with pytest.raises(ValueError, match="got label 4 at row 0; expected one of the row's options"):
        calibrate(variants, wrong)
    with pytest.raises(ValueError, match="got labels of shape"):
        calibrate({"draws": Variant(logits[:, 1:], 1.0)}, held_out)
    with pytest.raises(ValueError, match=r"got columns of \[3\] rows for 2 labels"):
        HeldOut(torch.zeros(2, dtype=torch.long), ["a", "b", "c"])
    for options, match in [
        ({"choosing_share": 1.0}, "got choosing_share=1.0; expected between 0 and 1"),
        ({"bands": {"act": 0.1}, "per_class": True}, "got bands and per_class; expected one"),
        ({"folds": 1}, "got folds=1; expected 2 or more"),
        ({"set_coverage": 1.0}, "got coverage=1.0; expected a share between 0 and 1"),
        ({"bands": {"flag": 0.2, "act": 0.1}}, "expected rising risks; put the"),
        ({"bands": {"act": 0.1, "all": 1}}, "expected each risk a number above 0 and"),
        ({"bands": {"act": 0.1, "ask": 0.2}}, "got a band named 'ask'; expected another name"),
        ({"bands": {"abstain": 0.1}}, "got a band named 'abstain'; expected another name"),
        ({"costs": torch.tensor([[0, 1], [torch.inf, 0]])}, "expected .C, C., finite, none below"),
    ]:
        with pytest.raises(ValueError, match=match):
            CalibrationOptions(**options)
    for options, match in [
        (
            {"set_coverage": 0.98},
            "got 45 rows for sets .* give 98 held-out rows in all, or ask for ",
        ),
        ({"per_class": True}, "expected 72 or more .* give 144 held-out rows in all"),
        ({"costs": torch.ones(5, 5)}, r"got costs of shape \(5, 5\) for 4 classes"),
    ]:
        with pytest.raises(ValueError, match=match):
            parts(held_out, CalibrationOptions(**options), 4)
        with pytest.raises(ValueError, match=match):
            calibrate(variants, held_out, CalibrationOptions(**options))


def test_a_class_with_an_error_among_its_surest_rows_is_acted_on():
    """Its sequence begins where the rows for choices say that it passes, as others do."""
    g = torch.Generator().manual_seed(1)
    acted = 0
    for _ in range(10):
        labels = torch.randint(2, (2000,), generator=g)
        says = torch.where(torch.rand(2000, generator=g) < 0.01, 1 - labels, labels)
        sure = 1 + 3 * torch.rand(2000, generator=g)
        logits = torch.nn.functional.one_hot(says, 2) * sure[:, None]
        held_out = HeldOut(labels, [f"row {i}" for i in range(2000)])
        options = CalibrationOptions(Promise(0.05, 0.9), per_class=True)
        found = calibrate({"mean": Variant(logits[None], 1.0)}, held_out, options)
        acted += sum(each.value is not None for each in found.classes.values())
    assert acted >= 19  # of 20; half of them without


def test_a_calibration_of_a_later_version_says_so():
    found, _, _ = some_calibration()
    later = json.loads(found.to_json()) | {"format": 2, "new": 1}
    with pytest.raises(ValueError, match="format 2; expected 1; update bayestune"):
        Calibration.from_json(json.dumps(later))
