import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from bayestune.bench import Grid, TaskSettings, keys, run_bench, weights_digest
from bayestune.bench.keys import digest, lasting, lasting_method
from bayestune.cli.options import build
from bayestune.cli.parser import make_parser
from bayestune.evaluation import EvaluationOptions, read_records
from bayestune.methods import METHODS, MLE, changed, make_method
from bayestune.session import TaskOptions
from bayestune.training import Training
from benching import furnish, grid, small

ROOT = Path(__file__).parents[2]
GRIDS = [*(ROOT / "configs").rglob("*grid.yaml"), *(ROOT / "configs/paper").glob("llama*.yaml")]
GRIDS.append(ROOT / "configs/evidence/controls.yaml")
ASIDE = {"output", "resume", "progress", "save_steps", "logging_steps"}


@pytest.fixture
def place(tmp_path, llama, byte_level):
    """A folder with a model and the rows of two tasks."""
    return furnish(tmp_path, llama(), byte_level)


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_grid_parses_to_what_it_says(path):
    parser = make_parser()
    parsed = parser.parse_args(["bench", "--config", str(path), "--output", "out"])
    made = build(Grid, parser.instantiate(parsed).bench)
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert list(made.tasks) == list(given["tasks"])
    assert list(made.methods) == list(given["methods"])
    assert made.training.steps == given["training"]["steps"]
    for task in made.tasks:
        entries = made.entries(task)
        for name in entries:
            make_method(entries[name], entries, name=name)


def test_the_students_controls_have_the_regime_and_the_bases_of_the_evidence():
    """So they take its fits: a key of a fit is made of these and of the rows."""
    made = {}
    for name in ("grid", "controls"):
        parser = make_parser()
        path = ROOT / f"configs/evidence/{name}.yaml"
        parsed = parser.parse_args(["bench", "--config", str(path), "--output", "out"])
        made[name] = build(Grid, parser.instantiate(parsed).bench)
    same = {"methods": made["grid"].methods}
    assert replace(made["controls"], **same) == made["grid"]

    def settings(name, entry):
        entries = made[name].entries("boolq")
        return lasting_method(make_method(entries[entry], entries, name=entry))

    assert settings("controls", "Student + temperature")["base"] == settings("grid", "distilled")
    assert settings("controls", "Student of ensemble")["base"] == settings("grid", "ensemble")
    tempered = settings("controls", "Student of MLE + temperature")["base"]
    assert tempered == settings("grid", "temperature")
    for shared in ("temperature", "Student of MLE"):
        assert settings("controls", shared) == settings("grid", shared)


def test_the_cells_of_the_first_seed_come_first(place):
    whole = grid(place)
    made = whole.cells(whole.load_all())
    expected = []
    for seed in (1, 2):
        for task in ("one", "two"):
            expected += [(seed, task, name) for name in whole.methods]
    assert [(c.training.seed, c.task, c.name) for c in made] == expected
    assert [c.training.steps for c in made[:6]] == [4, 4, 4, 3, 3, 3]
    assert made[1].key.startswith("model-one-tfb-on-mle-1--")
    assert made[3].evaluate_on == ("two", "one")
    assert [c.label for c in made[:3]] == ["MLE", "TFB on MLE", "BLoB, small"]


def test_a_task_changes_training_and_methods(place):
    whole = small(place)
    task = replace(
        whole.tasks["one"], training={"lora": {"rank": 3}}, methods={"blob": {"final_std": 0.3}}
    )
    methods = {"blob": {"prior_std": 0.5, "training": {"steps": 7}}}
    made = replace(whole, tasks={"one": task}, methods=methods)
    (cell,) = made.cells(made.load_all())
    assert (cell.training.lora.rank, cell.training.steps, cell.training.batch_size) == (3, 4, 2)
    assert (cell.method.method.prior_std, cell.method.method.final_std) == (0.5, 0.3)
    assert cell.method.changes == {"steps": 7}


def test_bad_grids_are_refused(place):
    twice = small(place, methods={"my mle": {"method": "mle"}, "My  MLE": {"method": "mle"}})
    said = "cannot be told apart: got .'model-one-my-mle-1'. more than once.*rename"
    with pytest.raises(ValueError, match=said):
        twice.cells(twice.load_all())
    whole = small(place)
    strange = replace(whole, tasks={"one": replace(whole.tasks["one"], methods={"blub": {}})})
    said = "changes methods that are not in the grid: got .'blub'., expected some of"
    with pytest.raises(ValueError, match=said):
        strange.cells(strange.load_all())
    blind = replace(whole, tasks={"one": TaskSettings(questions={"data": place / "one.jsonl"})})
    said = "one has no evaluation rows: got none, expected some; evaluate on others"
    with pytest.raises(ValueError, match=said):
        blind.load_all()


# Keys


def key_of(one):
    (cell,) = one.cells(one.load_all())
    return cell.key


def test_a_key_changes_with_what_changes_the_result_and_with_nothing_else(place):
    base = small(place, methods={"blob": {}})
    aside = replace(base.training, save_steps=None, logging_steps=1, resume=True, seed=9)
    assert key_of(replace(base, training=aside)) == key_of(base)
    changes = {
        "methods": {"blob": {"prior_std": 0.1}},
        "training": replace(base.training, learning_rate=1e-3),
        "predicting": EvaluationOptions(draws=(0, 3), resamples=10),
        "questions": replace(base.questions, train_rows=4),
        "dtype": "bfloat16",
    }
    seen = {key_of(base)} | {key_of(replace(base, **{k: v})) for k, v in changes.items()}
    assert len(seen) == 6
    test = place / "test.jsonl"
    test.write_text(test.read_text().replace("and 41", "and 42"))
    seen.add(key_of(base))
    (place / "model/config.json").write_text("{}")
    seen.add(key_of(base))
    assert len(seen) == 8


def test_a_key_holds_the_version_of_the_arithmetic(place, monkeypatch):
    """So that a grid that goes on after an upgrade does not mix."""
    base = small(place, methods={"mle": None})
    (before,) = base.cells(base.load_all())
    monkeypatch.setattr(keys, "ARITHMETIC", 2)
    (after,) = base.cells(base.load_all())
    assert before.key != after.key
    assert before.context != after.context  # that of the kept fits too


def test_a_field_that_came_later_is_in_a_key_only_where_it_is_set(place):
    base = small(place, methods={"mle": None})
    assert "group_by_length" not in lasting(base.training)
    grouped = replace(base, training=replace(base.training, group_by_length=True))
    assert lasting(grouped.training)["group_by_length"] is True
    prefixed = replace(base, predicting=replace(base.predicting, shared_prefix=16))
    assert "shared_prefix" not in lasting(base.predicting)
    assert lasting(prefixed.predicting)["shared_prefix"] == 16
    assert len({key_of(base), key_of(grouped), key_of(prefixed)}) == 3


def test_a_new_field_orphans_no_cell_if_it_says_what_its_absence_means(monkeypatch):
    """Whatever the default becomes; without saying so it changes the keys, golden ones too."""

    @dataclass(frozen=True)
    class Said(Training):
        brand_new: bool = field(default=True, metadata={"absent_means": False})

    @dataclass(frozen=True)
    class Unsaid(Training):
        brand_new: bool = False

    assert lasting(Said(brand_new=False)) == lasting(Training())
    assert digest(lasting(Said(brand_new=False))) == digest(lasting(Training()))
    assert lasting(Said())["brand_new"] is True
    assert digest(lasting(Unsaid())) != digest(lasting(Training()))

    @dataclass(frozen=True)
    class Method(MLE):
        brand_new: int = field(default=3, metadata={"absent_means": 3})

    monkeypatch.setitem(METHODS, "mle", Method)
    tempered = make_method({"method": "temperature", "base": "mle"})
    assert lasting_method(tempered) == {
        "method": "temperature",
        "base": {"method": "mle"},
        "draws": 10,
    }
    assert lasting_method(Method(brand_new=4)) == {"method": "mle", "brand_new": 4}


def test_what_leaves_the_result_as_it_is_is_not_hashed():
    assert not set(lasting(Training())) & ASIDE
    assert digest(1, "a") == digest(1, "a") != digest("1", "a")


def test_the_settings_of_committed_results_are_what_their_keys_were_made_of():
    files = sorted((ROOT / "results").glob("*/cells/*.jsonl"))
    assert files
    for file in files:
        config = json.loads(file.read_text(encoding="utf-8").splitlines()[0])["config"]
        for name, usual in (("training", Training()), ("predicting", EvaluationOptions())):
            assert json.loads(json.dumps(lasting(changed(usual, config[name])))) == config[name]


def test_a_seed_may_choose_its_own_training_rows(place):
    questions = TaskOptions(holdout=0.25, train_rows=3, evaluation_rows=2, unlabelled_rows=2)
    made = small(place, seeds=(1, 2), questions=questions, rows_by_seed=True)
    loaded = made.load_all()
    first = loaded[1]["one"]
    second = loaded[2]["one"]
    assert first.evaluation == second.evaluation
    assert first.train != second.train
    assert len({cell.context for cell in made.cells(loaded)}) == 2
    shared = replace(made, rows_by_seed=False).load_all()
    assert shared[1]["one"].evaluation == first.evaluation
    assert shared[1] == shared[2]


def test_records_carry_the_protocols_digest(place):
    (place / "protocol.md").write_text("what decides\n")
    made = small(place, methods={"mle": None}, protocol=place / "protocol.md")
    assert run_bench(made, place / "out") == 0
    digests = {record["protocol"] for record in read_records(place / "out")}
    assert digests == {hashlib.sha256(b"what decides\n").hexdigest()}


def trained_in_place(folder):
    """Other weights in the same files, of the same size."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    save_file({name: value + 0.01 for name, value in weights.items()}, file, {"format": "pt"})


def test_results_of_a_model_that_was_trained_in_place_are_not_taken_for_its_own(place):
    whole = small(place, methods={"mle": None})
    assert run_bench(whole, place / "out") == 0
    before = read_records(place / "out")
    assert run_bench(whole, place / "out") == 0  # nothing has changed
    size = (place / "model/model.safetensors").stat().st_size
    trained_in_place(place / "model")
    assert (place / "model/model.safetensors").stat().st_size == size
    with pytest.raises(ValueError, match="has results of model: got .*choose another --output"):
        run_bench(whole, place / "out")
    assert read_records(place / "out") == before
    assert run_bench(whole, place / "new") == 0


def test_a_large_files_blocks_are_read_from_first_to_last(tmp_path):
    file = tmp_path / "large.gguf"
    whole = bytearray(9 * 2**20)
    seen = set()
    for changed_byte in (None, 0, 4 * 2**20 + 1, len(whole) - 1):
        if changed_byte is not None:
            start = changed_byte - changed_byte % 2**16
            whole[start : start + 2**16] = b"x" * (min(len(whole), start + 2**16) - start)
        file.write_bytes(whole)
        seen.add(weights_digest(str(file)))
    assert len(seen) == 4
    assert weights_digest("owner/model") is None
