"""Calibration against cost: the arithmetic on made-up logits, the parts on a tiny model, and all steps at tiny size."""

import importlib
import json
import math
from argparse import Namespace
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bayestune.adapters import Lora, attach, bayesify, gaussian_layers
from bayestune.cli import main as bayestune
from bayestune.forward import Draws
from bayestune.posteriors import Gaussian
from bayestune.scoring import LetterScorer, TextScorer, row_logits

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def cost(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("calibration_cost")


@pytest.fixture
def table(cost):
    return importlib.import_module("calibration_table")


@pytest.fixture
def page(cost):
    return importlib.import_module("calibration_page")


# The share of the gain


def test_share_of_known_rows(table):
    mean, exact, other = (
        torch.tensor(rows).double() for rows in ([2.0, 4.0], [1.0, 1.0], [1.5, 3.5])
    )
    assert table.share_kept(mean, exact, other, 50)[0] == pytest.approx(
        0.5 / 2
    )  # not the mean of 1/2 and 1/6
    assert table.share_kept(mean, exact, mean, 50) == (0, 0, 0)
    assert table.share_kept(mean, exact, exact, 50) == (1, 1, 1)
    assert table.share_kept(mean, exact, mean + 0.5, 50)[0] == pytest.approx(
        -0.25
    )  # worse than the mean


def made_up_rows(count):
    torch.manual_seed(0)
    exact = torch.rand(count, dtype=torch.float64)
    gain = torch.rand(count, dtype=torch.float64)
    return (
        exact + gain,
        exact,
        exact + gain - 0.6 * gain + 0.1 * torch.randn(count, dtype=torch.float64),
    )


def test_interval_of_the_share(table):
    width = {}
    for count in (100, 10_000):
        mean, exact, other = made_up_rows(count)
        share, low, high = table.share_kept(mean, exact, other, 2000)
        residual = (mean - other) - share * (mean - exact)
        expected = (
            2 * 1.96 * residual.std() / (mean - exact).mean() / math.sqrt(count)
        )  # of a ratio of means
        assert low < share < high
        assert share == pytest.approx(0.6, abs=0.06)
        assert high - low == pytest.approx(expected.item(), rel=0.1)
        width[count] = high - low
    assert width[10_000] < width[100] / 5


def test_the_same_rows_are_drawn_above_and_below(table):
    mean, exact, _ = made_up_rows(30)
    assert table.share_kept(mean, exact, (mean + exact) / 2, 100) == pytest.approx((0.5, 0.5, 0.5))


def test_row_nll_averages_probabilities(table):
    sure, unsure = torch.tensor([0.9, 0.1]).log(), torch.tensor([0.3, 0.7]).log()
    logits = torch.stack([torch.stack([sure, unsure]), torch.stack([unsure, unsure])])
    expected = [-math.log((0.9 + 0.3) / 2), -math.log(0.7)]
    assert table.row_nll(logits, torch.tensor([0, 1])).tolist() == pytest.approx(expected)


# Tables of made-up logits


def options_of(**changes):
    settings = {
        "draws": 10,
        "prefixes": ["1", "4"],
        "blocks": [2, 1],
        "factors": [2.0, 3.0],
        "factors_for": ["4"],
    }
    return Namespace(**{**settings, **changes})


def with_label_at(probabilities, labels):
    """Logits (S, N, 2) whose draw s gives each row's label its probability."""
    p = torch.tensor(probabilities, dtype=torch.float64)[:, None].expand(-1, len(labels))
    return torch.where(torch.arange(2) == labels[:, None], p[..., None], 1 - p[..., None]).log()


def keep(setting, folder, part, logits, labels):
    save_file({"logits": logits.contiguous(), "labels": labels}, setting.file(folder, part))


def settings_by_name(table, **changes):
    return {setting.name: setting for setting in table.settings_of(options_of(**changes))}


def test_settings_with_a_factor_are_those_asked_for(table):
    plain = ["mean", "exact 10", "prefix 1", "prefix 4", "blocks 2", "blocks 1"]
    scaled = ["prefix 4 ×2", "prefix 4 ×3", "blocks 1 ×2", "blocks 1 ×3"]
    assert list(settings_by_name(table)) == plain + scaled
    assert settings_by_name(table)["prefix 4 ×2"].file(Path("a"), "held_out").name == (
        "held_out-prefix-4-x2.safetensors"
    )


def test_the_factor_of_least_held_out_nll_is_chosen(table, tmp_path):
    settings = settings_by_name(table)
    best = {"prefix 4": 0.5, "prefix 4 ×2": 0.7, "prefix 4 ×3": 0.6}
    best |= {"blocks 1": 0.8, "blocks 1 ×2": 0.75, "blocks 1 ×3": 0.4}  # of these none is better
    labels = torch.tensor([0, 1, 1])
    for name, setting in settings.items():
        keep(setting, tmp_path, "held_out", with_label_at([best.get(name, 0.5)], labels), labels)
    names = [setting.name for setting in table.chosen(tmp_path, list(settings.values()))]
    assert names == [name for name in settings if "×" not in name] + ["prefix 4 ×2"]


def scored(table, folder, settings, labels, held_labels, costs=None):
    """Writes logits for all settings, of noise and a hint at the labels 0, 1, 2, 0, …, and scores them."""
    for part, own in (("evaluation", labels), ("held_out", held_labels)):
        for number, setting in enumerate(settings.values()):
            generator = torch.Generator().manual_seed(100 * number + (part == "evaluation"))
            hint = 3.0 * (torch.arange(3) == torch.arange(len(own))[:, None] % 3)
            logits = hint + 3 * torch.randn(max(1, setting.draws), len(own), 3, generator=generator)
            keep(setting, folder, part, logits, own)
    record = table.score(folder, list(settings.values()), costs or {}, 20)
    return {line["name"]: line for line in record["lines"]}


def test_lines_of_fewer_draws_are_the_first_draws(table, tmp_path):
    settings, labels = settings_by_name(table, factors=[]), torch.arange(40) % 3
    lines = scored(table, tmp_path, settings, labels, labels)
    logits = load_file(settings["exact 10"].file(tmp_path, "evaluation"))["logits"].double()
    assert [name for name in lines if name.startswith("exact")] == [
        f"exact {count}" for count in (1, 2, 3, 5, 10)
    ]
    for count in (1, 2, 3, 5, 10):
        probabilities = sum(logits[i].softmax(-1) for i in range(count)) / count
        expected = -probabilities[torch.arange(40), labels].log().mean().item()
        assert lines[f"exact {count}"]["nll"] == pytest.approx(expected)
    assert lines["mean"]["share"] == lines["mean"]["share_low"] == lines["mean"]["share_high"] == 0
    assert lines["exact 10"]["share"] == lines["exact 10"]["share_low"] == 1
    full = lines["mean"]["nll"] - lines["exact 10"]["nll"]
    assert lines["prefix 1"]["share"] == pytest.approx(
        (lines["mean"]["nll"] - lines["prefix 1"]["nll"]) / full
    )


@pytest.mark.parametrize(("draws", "counts"), [(1, [1]), (3, [1, 2, 3]), (4, [1, 2, 3, 4])])
def test_no_line_has_more_draws_than_there_are(table, tmp_path, draws, counts):
    settings, labels = settings_by_name(table, factors=[], draws=draws), torch.arange(9) % 3
    lines = scored(table, tmp_path, settings, labels, labels)
    assert [name for name in lines if name.startswith("exact")] == [
        f"exact {count}" for count in counts
    ]


def test_temperature_is_of_held_out_rows(table, tmp_path):
    settings, labels, held = (
        settings_by_name(table, factors=[]),
        torch.arange(40) % 3,
        torch.arange(30) % 3,
    )
    first = scored(table, tmp_path, settings, labels, held)
    other_rows = scored(table, tmp_path, settings, (labels + 1) % 3, held)
    other_held = scored(
        table, tmp_path, settings, labels, torch.cat([held[:25], (held[25:] + 1) % 3])
    )
    for name, line in first.items():
        temperature = line["tempered"]["temperature"]
        assert other_rows[name]["tempered"]["temperature"] == temperature
        assert other_rows[name]["nll"] != line["nll"] == other_held[name]["nll"]
        assert other_held[name]["tempered"]["temperature"] != pytest.approx(temperature, rel=1e-3)


def test_temperature_is_the_best_and_used_on_evaluation_rows(table, tmp_path):
    settings, labels, held = (
        settings_by_name(table, factors=[]),
        torch.arange(40) % 3,
        torch.arange(30) % 3,
    )
    line = scored(table, tmp_path, settings, labels, held)["prefix 1"]
    logits, held_out = (
        table.kept(tmp_path, settings["prefix 1"], part)[0] for part in ("evaluation", "held_out")
    )
    temperature = line["tempered"]["temperature"]
    assert abs(math.log(temperature)) > 0.2
    least = table.row_nll(held_out / temperature, held).mean()
    assert all(
        table.row_nll(held_out / (temperature * by), held).mean() > least for by in (0.97, 1.03)
    )
    expected = table.row_nll(logits / temperature, labels).mean().item()
    assert line["tempered"]["nll"] == pytest.approx(expected)
    assert line["nll"] == pytest.approx(table.row_nll(logits, labels).mean().item())


def test_lines_with_a_factor_cost_as_much_as_without(table, tmp_path):
    settings, labels = settings_by_name(table), torch.tensor([0, 1, 2] * 4)
    costs = {"mean": 1.0, "exact 10": 10.0, "exact 2": 2.5, "prefix 4": 1.5}
    lines = scored(table, tmp_path, settings, labels, labels, costs)
    assert {
        name: line["cost"] for name, line in lines.items() if "×" not in name and line["cost"]
    } == costs
    assert lines["prefix 1"]["cost"] is None
    for name, line in lines.items():
        assert line["cost"] == costs.get(name.partition(" ×")[0])


def test_cost_is_the_median_of_turns_in_passes_of_the_mean(cost, tmp_path):
    assert cost.read_cost(tmp_path) == ({}, {})
    seconds = {"mean": [1.0, 4.0, 2.0], "exact 10": [9.0, 4.0, 2.0]}  # the ratio of medians is 2
    tensors = {name: torch.tensor(values) for name, values in seconds.items()}
    save_file(tensors, tmp_path / "cost.safetensors", {"threads": "1"})
    assert cost.read_cost(tmp_path) == ({"mean": 1.0, "exact 10": 1.0}, {"threads": "1"})


# Parts, on a tiny model


@pytest.fixture
def posterior(llama, byte_level, tiny_task):
    """A Gaussian with much noise on three blocks and the head."""
    model = attach(llama(num_hidden_layers=3, initializer_range=0.3), Lora(rank=2))
    bayesify(model, init_root_std=0.7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return Gaussian(model, LetterScorer(byte_level, tiny_task))


@pytest.fixture
def subject(cost, posterior, tiny_task):
    scorer = posterior.score
    rows = {part: scorer.encode(getattr(tiny_task, part)) for part in ("held_out", "evaluation")}
    labels = {part: torch.tensor([row["answer"] for row in rows[part]]) for part in rows}
    return cost.Subject(posterior, scorer, rows, labels, "fp32")


def test_scaled_multiplies_the_standard_deviation_and_restores_it(cost, posterior):
    layers, drawn = gaussian_layers(posterior.model), posterior.draw(3)
    before = {
        name: (layer.root_std.detach().clone(), layer.std.detach())
        for name, layer in layers.items()
    }
    with cost.scaled(posterior, 3.0):
        for name, layer in layers.items():
            assert torch.allclose(layer.std, 3 * before[name][1])
            noise = drawn[name] - layer.weight
            assert torch.allclose(posterior.draw(3)[name] - layer.weight, 3 * noise, atol=1e-5)
    assert all(torch.equal(layer.root_std, before[name][0]) for name, layer in layers.items())
    assert all(layer.root_std.requires_grad for layer in layers.values())


def test_scaled_restores_after_an_error(cost, posterior):
    layers = gaussian_layers(posterior.model).values()
    before = [layer.root_std.detach().clone() for layer in layers]
    with pytest.raises(RuntimeError, match="broken"), cost.scaled(posterior, 2.0):
        raise RuntimeError("broken")
    assert all(
        torch.equal(layer.root_std, root) for layer, root in zip(layers, before, strict=True)
    )


@pytest.mark.parametrize(
    ("blocks", "drawn"), [(1, {2}), (2, {1, 2}), (3, {0, 1, 2}), (5, {0, 1, 2})]
)
def test_only_the_last_blocks_are_drawn(cost, posterior, blocks, drawn):
    last = cost.LastBlocks(posterior.model, posterior.score, blocks=blocks)
    expected = {f"model.layers.{i}.self_attn.{name}_proj.lora_A" for i in drawn for name in "qv"}
    draw, whole = last.draw(4, seed=1), posterior.draw(4, seed=1)
    assert set(draw) == expected
    assert "lm_head.lora_A" in whole
    assert all(torch.equal(draw[name], whole[name]) for name in expected)


def test_logits_of_the_last_blocks_are_those_without_noise_elsewhere(table, subject, posterior):
    rows, setting = subject.rows["evaluation"], table.Setting(table.BLOCKS, 3, blocks=2)
    logits, exact = (
        subject.logits(one, rows, 4) for one in (setting, table.Setting(table.EXACT, 3))
    )
    with torch.no_grad():
        for name, layer in gaussian_layers(posterior.model).items():
            layer.root_std.mul_("layers.1." in name or "layers.2." in name)
    expected = subject.logits(table.Setting(table.EXACT, 3), rows, 4)
    assert torch.allclose(logits, expected, atol=1e-5)
    assert not torch.allclose(logits, exact, atol=1e-2)


def test_logits_are_those_of_the_setting_in_the_order_of_the_rows(table, subject, posterior):
    rows = subject.rows["evaluation"]
    assert len({row["options"] for row in rows}) == 2
    for setting, draws in (
        (table.Setting(table.MEAN, 0), Draws(0)),
        (table.Setting(table.EXACT, 3), Draws(3)),
        (table.Setting(table.PREFIX, 3, prefix="4"), Draws(3, shared_prefix=4)),
    ):
        logits = subject.logits(setting, rows, 2)
        alone = [row_logits(posterior, posterior.score, [row], draws) for row in rows]
        assert logits.shape == (max(1, setting.draws), 6, 4)
        for i, (row, own) in enumerate(zip(rows, alone, strict=True)):
            assert torch.allclose(logits[:, i, : row["options"]], own[:, 0], atol=1e-3)
            assert (logits[:, i, row["options"] :] == -torch.inf).all()


def test_a_factor_makes_the_draws_differ_more(table, subject):
    rows = subject.rows["evaluation"]
    spread = [
        subject.logits(table.Setting(table.PREFIX, 4, prefix="4", factor=factor), rows, 3)[..., :3]
        .std(0)
        .mean()
        for factor in (0.01, 0.5, 1.0)
    ]
    assert 20 * spread[0] < spread[1] < spread[2]


def test_draws_of_one_setting_are_not_forgotten_for_another(table, subject):
    """In turns, or a line's cost would hold the making of its draws because others were made between."""
    rows, settings = (
        subject.rows["evaluation"],
        [table.Setting(table.EXACT, count) for count in (3, 1)],
    )
    drawn = [subject.drawn_as(setting) for setting in settings]
    stacks = []
    for _ in range(2):
        for setting, one in zip(settings, drawn, strict=True):
            subject.logits(setting, rows[:2], 2)
            stacks.append(one._held.last[1])
    assert stacks[0] is stacks[2]
    assert stacks[1] is stacks[3]


@pytest.mark.parametrize("scoring", [LetterScorer, TextScorer])
def test_the_questions_prefix_is_all_but_the_instruction(
    cost, table, posterior, byte_level, tiny_task, scoring
):
    scorer = scoring(byte_level, tiny_task)
    rows = {part: scorer.encode(getattr(tiny_task, part)) for part in ("held_out", "evaluation")}
    one = cost.Subject(posterior, scorer, rows, {}, "fp32")
    prompts = [row["ids"] for part in rows.values() for row in part]
    same = takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False))
    common = [column[0] for column in same]
    assert byte_level.decode(common).startswith("Return" if scoring is LetterScorer else "Question")
    question, four, mean = (table.Setting("prefix", 3, prefix=m) for m in (table.QUESTION, "4", ""))
    lengths = sorted({len(ids) for ids in prompts})
    assert len(lengths) > 1
    batch = sorted((row for part in rows.values() for row in part), key=lambda row: len(row["ids"]))
    assert one.prefix(question, batch) == lengths[-1] - len(common)
    assert one.prefix(question, batch[:1]) == lengths[0] - len(common)
    assert (one.prefix(four, batch), one.prefix(mean, batch)) == (4, None)


# All steps


def write_rows(folder):
    """Rows in the Hub's layout with three or four options, of unlike length."""
    folder.mkdir(parents=True)
    texts = ["red", "green", "blue", "the sky"]
    for split, count in (("train", 16), ("validation", 7)):
        rows = []
        for i in range(count):
            size = 3 + i % 2
            choices = {"text": texts[:size], "label": list("ABCD")[:size]}
            question = f"what {split} is {'red and ' * (i % 3)}{i}?"
            rows.append(
                {
                    "id": f"{i}",
                    "question": question,
                    "choices": choices,
                    "answerKey": "ABCD"[i % size],
                }
            )
        (folder / f"{split}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )


@pytest.fixture
def fitted(llama, byte_level, tmp_path):
    """Fits a method for two steps; gives the options that every step of the benchmark needs."""
    llama(initializer_range=0.3).save_pretrained(tmp_path / "model")
    byte_level.save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "data" / "allenai" / "ai2_arc" / "ARC-Easy")

    def fit(method, *more):
        same = [
            "--model",
            tmp_path / "model",
            "--task",
            "arc_easy",
            "--data_root",
            tmp_path / "data",
        ]
        same = [*map(str, same), "--train_rows", "8", "--holdout", "0.25"]
        own = [
            "--output",
            str(tmp_path / method),
            "--steps",
            "2",
            "--batch_size",
            "2",
            "--lora.rank",
            "2",
        ]
        own += ["--learning_rate", "0.1", "--progress", "false"]
        assert bayestune(["fit", "--method", method, *same, *own, *more]) == 0
        return [*same, "--posterior", str(tmp_path / method), "--output", str(tmp_path / "kept")]

    return fit


TINY = "--rows 5 --batch 2 --draws 3 --prefixes 2 question --blocks 1 --factors 2 --factors_for 2 --turns 2"
PLAIN = ["mean", "exact 3", "prefix 2", "prefix question", "blocks 1"]
NOISY = ("--blob.init_root_std", "0.7", "--blob.prior_std", "1.0")


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def table_of(text):
    """The rows of a section's table, by the setting's name."""
    return {(row := cells(line))[0]: row[1:] for line in text.splitlines() if line.startswith("| ")}


def check_kept(table, folder):
    """The files of a collected task hold its rows: seven of unlike option counts, five of them asked for."""
    for name in PLAIN:
        setting = settings_by_name(table, draws=3, prefixes=["2", "question"], blocks=[1])[name]
        logits, labels = table.kept(folder, setting, "evaluation")
        assert logits.shape == (max(1, setting.draws), 5, 4)
        options = logits.isfinite().sum(-1)
        assert set(options.flatten().tolist()) == {3, 4}
        assert (labels < options).all()
        assert table.kept(folder, setting, "held_out")[0].shape[:2] == (max(1, setting.draws), 4)


def check_page(record, text):
    """A page's table says what the record's lines say."""
    rows = table_of(text)
    assert set(rows) == {"setting", *(line["name"] for line in record["lines"])}
    for line in record["lines"]:
        cost, loss, kept, ece, accuracy, temperature, tempered, tempered_ece = rows[line["name"]]
        low, high = (float(part) for part in kept.partition("[")[2].rstrip("]").split(","))
        assert float(cost) == pytest.approx(line["cost"], abs=0.0051)
        assert float(loss) == pytest.approx(line["nll"], abs=0.00051)
        assert float(kept.split()[0]) == pytest.approx(100 * line["share"], abs=0.51)
        assert (low, high) == pytest.approx(
            (100 * line["share_low"], 100 * line["share_high"]), abs=0.51
        )
        assert (float(ece), float(accuracy)) == pytest.approx(
            (100 * line["ece"], 100 * line["accuracy"]), abs=0.051
        )
        found, expected = (float(temperature), float(tempered)), line["tempered"]
        assert found == pytest.approx((expected["temperature"], expected["nll"]), abs=0.0051)
        assert float(tempered_ece) == pytest.approx(100 * expected["ece"], abs=0.051)


def test_collect_cost_and_table(cost, table, fitted, tmp_path, capsys):
    options, folder = [*fitted("blob", *NOISY), *TINY.split()], tmp_path / "kept"
    cost.main(["collect", *options])
    check_kept(table, folder)
    cost.main(["cost", *options])
    seconds = load_file(folder / "cost.safetensors")
    assert sorted(seconds) == sorted([*PLAIN, "exact 1", "exact 2"])
    assert all(len(values) == 2 and values.min() > 0 for values in seconds.values())

    file, shown, picture = (
        tmp_path / "runs.jsonl",
        tmp_path / "docs" / "page.md",
        tmp_path / "docs" / "picture.png",
    )
    showing = ["table", *options, "--resamples", "20", "--json", str(file), "--page", str(shown)]
    capsys.readouterr()
    cost.main([*showing, "--picture", str(picture)])
    record, text = json.loads(file.read_text(encoding="utf-8")), shown.read_text(encoding="utf-8")
    assert (record["task"], record["model"], record["n"], record["held_out"]) == (
        "arc_easy",
        "model",
        5,
        4,
    )
    names = [line["name"] for line in record["lines"]]
    assert [name for name in names if "×" not in name] == ["mean", "exact 1", "exact 2", *PLAIN[1:]]
    assert "dtype float32 · precision fp32 · batch 2" in text
    check_page(record, text)
    assert table_of(capsys.readouterr().out) == table_of(text)
    assert picture.read_bytes().startswith(b"\x89PNG")

    cost.main(showing)
    assert json.loads(file.read_text(encoding="utf-8")) == record  # one line, the same
    assert shown.read_text(encoding="utf-8") == text


def test_collect_goes_on_where_it_was_cut_off(cost, fitted, tmp_path, monkeypatch):
    options, asked = ["collect", *fitted("blob", *NOISY), *TINY.split()], []
    logits = cost.Subject.logits

    def counted(one, setting, rows, size):
        asked.append((setting.name, len(rows)))
        return logits(one, setting, rows, size)

    monkeypatch.setattr(cost.Subject, "logits", counted)
    cost.main(options)
    files = {path: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    assert len(files) == len(asked) > 2 * len(PLAIN)
    asked.clear()
    cost.main(options)
    assert asked == []
    lost = tmp_path / "kept" / "evaluation-prefix-2.safetensors"
    lost.unlink()
    (tmp_path / "kept" / "evaluation-prefix-2.partial").write_bytes(b"cut off")
    cost.main(options)
    assert asked == [("prefix 2", 5)]
    assert {path: path.read_bytes() for path in (tmp_path / "kept").iterdir()} == files


def test_a_posterior_that_is_not_gaussian_is_refused(cost, fitted):
    with pytest.raises(ValueError, match="got a Point, expected a Gaussian posterior: fit BLoB"):
        cost.main(["collect", *fitted("mle"), *TINY.split()])


def test_what_cannot_be_measured_is_refused(cost, fitted, capsys):
    options = [*fitted("blob"), *TINY.split()]
    with pytest.raises(
        ValueError, match=r"no held-out rows: got holdout=0\.0, expected a part of train"
    ):
        cost.main(["collect", *options, "--holdout", "0.0"])
    with pytest.raises(ValueError, match="got --dtype bfloat16, expected float32"):
        cost.main(["collect", *options, "--dtype", "bfloat16"])
    with pytest.raises(
        ValueError, match="got 5 evaluation rows, expected 6 or more; lower --batch"
    ):
        cost.main(["cost", *options, "--batch", "6"])
    with pytest.raises(SystemExit):
        cost.main(["table", *options, "--page", "page.md"])
    assert "--page and --picture show the records of --json" in capsys.readouterr().err


# The page


def made_up_record(task, nll, cost=1.0):
    scores = {"nll": nll, "ece": 0.1, "accuracy": 0.5}
    line = {"name": "mean", "kind": "mean", "factor": 1.0, "cost": cost, **scores}
    line |= {
        "share": 0.0,
        "share_low": 0.0,
        "share_high": 0.0,
        "tempered": {"temperature": 1.5, **scores},
    }
    facts = {
        "task": task,
        "model": "small",
        "n": 5,
        "held_out": 4,
        "draws": 3,
        "cost_measured_on": {},
    }
    return {**facts, "lines": [line]}


def test_one_record_a_task_and_model(page, tmp_path):
    file, shown = tmp_path / "runs.jsonl", tmp_path / "page.md"
    others = {**made_up_record("one", 0.7), "model": "large"}
    for record in (
        made_up_record("one", 0.5),
        made_up_record("two", 0.6),
        others,
        made_up_record("one", 0.4),
    ):
        page.render(record, file, shown, tmp_path / "picture.png")
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [(one["task"], one["model"], one["lines"][0]["nll"]) for one in records] == [
        ("two", "small", 0.6),
        ("one", "large", 0.7),
        ("one", "small", 0.4),
    ]
    heads = [
        line
        for line in shown.read_text(encoding="utf-8").splitlines()
        if line.startswith("## ") and ", " in line
    ]
    assert heads == ["## two, small", "## one, large", "## one, small"]


def test_points_of_the_picture_are_the_lines(page):
    record = made_up_record("one", 0.5)
    more = [
        {
            **record["lines"][0],
            "name": f"exact {n}",
            "kind": "exact",
            "cost": float(n),
            "nll": 0.5 - n / 100,
        }
        for n in (10, 2)
    ]
    scaled = {
        **more[0],
        "name": "prefix 2 ×2",
        "kind": "prefix",
        "factor": 2.0,
        "cost": 1.5,
        "nll": 0.3,
    }
    figure = page.figure_of([{**record, "lines": [*record["lines"], *more, scaled]}])
    upper, lower = figure.axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in upper.get_lines()}
    assert drawn["exact draws"] == [[2.0, 0.48], [10.0, 0.4]]
    assert drawn["mean"] == [[1.0, 0.5]]
    assert drawn["mean, temperature"] == [[0.0, 0.5], [1.0, 0.5]]
    (cross,) = upper.collections
    assert cross.get_offsets().tolist() == [[1.5, 0.3]]
    assert (upper.get_ylabel(), lower.get_ylabel()) == ("NLL, nats", "ECE")
    assert lower.get_lines()[0].get_ydata().tolist() == [0.1, 0.1]


def test_without_costs_there_is_a_table_and_an_empty_picture(page, tmp_path, capsys):
    picture = tmp_path / "picture.png"
    page.render(made_up_record("one", 0.5, cost=None), tmp_path / "runs.jsonl", None, picture)
    printed = capsys.readouterr().out
    assert "Cost was not measured." in printed
    assert table_of(printed)["mean"][:2] == ["", "0.500"]
    assert picture.is_file()
