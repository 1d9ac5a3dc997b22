import json
import logging
import os
import random
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from bayestune.bench import Grid, TaskSettings, cells, collect, launch, run_bench, store, worker
from bayestune.bench.grid import digest, lasting
from bayestune.cli import parser as cli
from bayestune.evaluation import EvaluationOptions, read_records
from bayestune.methods import METHODS, MLE, BLoB, changed, make_method
from bayestune.posteriors import Prediction
from bayestune.report import grid_tables, render
from bayestune.training import Training
from bayestune.training.callbacks import NotFiniteError
from bayestune.training.trainer import ClassTrainer
from benching import grid

ROOT = Path(__file__).parents[2]
GRIDS = [*(ROOT / "configs").rglob("*grid.yaml"), *(ROOT / "configs/paper").glob("llama*.yaml")]
VOLATILE = ("seconds", "peak_memory_mb")


def rows(count, start=0):
    options = ("red", "green", "blue", "the sky")
    return [
        {"question": f"what is {options[i % 4]} and {i}?", "options": options, "answer": i % 4}
        for i in range(start, start + count)
    ]


@pytest.fixture
def place(tmp_path, llama, byte_level):
    """A folder with a model and the rows of two tasks."""
    llama().save_pretrained(tmp_path / "model")
    byte_level.save_pretrained(tmp_path / "model")
    for name, part in {"one": rows(8), "two": rows(8, 20), "test": rows(6, 40)}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return tmp_path


def small(place, **changes):
    """One task, one seed."""
    whole = grid(place)
    return replace(whole, tasks={"one": whole.tasks["one"]}, seeds=(1,), **changes)


def lasting_part(folder):
    """What two runs of the same grid must agree in: the records but for times, the rows, the table."""
    records = read_records(folder)
    files = {
        record["predictions"]: (folder / record["predictions"]).read_text() for record in records
    }
    same = [
        {key: value for key, value in record.items() if key not in VOLATILE} for record in records
    ]
    return same, files, render(grid_tables(records, folder, 50))


@pytest.fixture
def fitted(monkeypatch):
    """The methods that are really fitted, not taken from before."""
    names = []
    for method in (MLE, BLoB, METHODS["tfb"]):

        def fit(self, model, scorer, training, fit=method.fit):
            names.append((type(self).__name__, scorer.task.name, training.seed))
            return fit(self, model, scorer, training)

        monkeypatch.setattr(method, "fit", fit)
    return names


# Settings


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_grid_parses_to_what_it_says(path):
    parser = cli.make_parser()
    options = parser.instantiate(
        parser.parse_args(["bench", "--config", str(path), "--output", "out"])
    ).bench
    made = cli._built(Grid, options)
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert list(made.tasks) == list(given["tasks"])
    assert list(made.methods) == list(given["methods"])
    assert made.training.steps == given["training"]["steps"]
    for task in made.tasks:
        entries = made.entries(task)
        for name in entries:
            make_method(entries[name], entries, name=name)


def test_the_cells_of_the_first_seed_come_first(place):
    whole = grid(place)
    made = cells(whole, whole.load_all())
    names = ["mle", "TFB on MLE", "BLoB, small"]
    assert [(c.training.seed, c.task, c.name) for c in made] == [
        (seed, task, name) for seed in (1, 2) for task in ("one", "two") for name in names
    ]
    assert [c.training.steps for c in made[:6]] == [4, 4, 4, 3, 3, 3]
    assert made[1].key.startswith("model-one-tfb-on-mle-1--")
    assert made[3].evaluate_on == ("two", "one")


def keys_of(one):
    return [cell.key for cell in cells(one, one.load_all())]


def test_a_key_changes_with_what_changes_the_result_and_with_nothing_else(place):
    base = small(place, methods={"blob": {}})
    same = replace(base, training=replace(base.training, save_steps=None, logging_steps=1, seed=9))
    assert keys_of(same) == keys_of(base)
    changes = {
        "methods": {"blob": {"prior_std": 0.1}},
        "training": replace(base.training, learning_rate=1e-3),
        "predicting": EvaluationOptions(draws=(0, 3), resamples=10),
        "questions": replace(base.questions, train_rows=4),
        "dtype": "bfloat16",
    }
    others = [keys_of(replace(base, **{name: value})) for name, value in changes.items()]
    assert len({base_key for (base_key,) in [keys_of(base), *others]}) == 6
    (place / "test.jsonl").write_text(
        (place / "test.jsonl").read_text().replace("and 41", "and 42")
    )
    assert keys_of(base) not in others
    (place / "model/config.json").write_text("{}")
    assert len({key for (key,) in [*others, keys_of(base)]}) == 6


def test_a_task_changes_training_and_methods(place):
    whole = small(place)
    task = replace(
        whole.tasks["one"], training={"lora": {"rank": 3}}, methods={"blob": {"final_std": 0.3}}
    )
    made = replace(
        whole, tasks={"one": task}, methods={"blob": {"prior_std": 0.5, "training": {"steps": 7}}}
    )
    (cell,) = cells(made, made.load_all())
    assert (cell.training.lora.rank, cell.training.steps, cell.training.batch_size) == (3, 4, 2)
    assert (cell.method.method.prior_std, cell.method.method.final_std) == (0.5, 0.3)
    assert cell.method.changes == {"steps": 7}


def test_bad_grids_are_refused(place):
    whole = small(place)
    twice = replace(whole, methods={"my mle": {"method": "mle"}, "My  MLE": {"method": "mle"}})
    with pytest.raises(
        ValueError, match="cannot be told apart: got .'model-one-my-mle-1'. more than once.*rename"
    ):
        cells(twice, twice.load_all())
    strange = replace(whole, tasks={"one": replace(whole.tasks["one"], methods={"blub": {}})})
    with pytest.raises(
        ValueError, match="changes methods that are not in the grid: got .'blub'., expected some of"
    ):
        cells(strange, strange.load_all())
    blind = replace(whole, tasks={"one": TaskSettings(questions={"data": place / "one.jsonl"})})
    with pytest.raises(
        ValueError, match="one has no evaluation rows: got none, expected some; evaluate on others"
    ):
        blind.load_all()


def test_what_aside_of_the_result_is_not_hashed():
    assert (
        set(lasting(Training())) & {"output", "resume", "progress", "save_steps", "logging_steps"}
        == set()
    )
    assert digest(1, "a") == digest(1, "a") != digest("1", "a")


def test_a_field_that_came_later_is_in_a_key_only_where_it_is_set(place):
    base = small(place, methods={"mle": None})
    assert "group_by_length" not in lasting(base.training)
    grouped = replace(base, training=replace(base.training, group_by_length=True))
    assert lasting(grouped.training)["group_by_length"] is True
    assert keys_of(grouped) != keys_of(base)
    assert "shared_prefix" not in lasting(base.predicting)
    prefixed = replace(base, predicting=replace(base.predicting, shared_prefix=16))
    assert lasting(prefixed.predicting)["shared_prefix"] == 16
    assert keys_of(prefixed) != keys_of(base)


def test_the_settings_of_committed_results_are_what_their_keys_were_made_of():
    files = sorted((ROOT / "results").glob("*/cells/*.jsonl"))
    assert files
    for file in files:
        config = json.loads(file.read_text(encoding="utf-8").splitlines()[0])["config"]
        for name, usual in (("training", Training()), ("predicting", EvaluationOptions())):
            assert json.loads(json.dumps(lasting(changed(usual, config[name])))) == config[name]


# Running


def test_a_second_run_computes_nothing_and_fits_are_shared(place, fitted, caplog):
    caplog.set_level(logging.INFO, "bayestune")
    whole, out = grid(place, seeds=(1,)), place / "out"
    assert run_bench(whole, out) == 0
    once = [(m, t, 1) for t in ("one", "two") for m in ("MLE", "TFB", "BLoB")]
    assert fitted == once  # TFB's base is the MLE's fit
    records = read_records(out)
    assert [(r["label"], r["trained_on"], r["task"], r["seed"]) for r in records[:5]] == [
        ("MLE", "one", "one", 1),
        ("TFB on MLE N=0", "one", "one", 1),
        ("TFB on MLE N=2", "one", "one", 1),
        ("BLoB, small N=0", "one", "one", 1),
        ("BLoB, small N=2", "one", "one", 1),
    ]
    assert [(r["trained_on"], r["task"]) for r in records[5:7]] == [("two", "two"), ("two", "one")]
    assert len(records) == 5 + 10
    assert records[1]["config"]["method"]["base"] == {"method": "mle"}
    for record in records:
        lines = (out / record["predictions"]).read_text().splitlines()
        assert len(lines) == record["n"] == 6
    assert "[0/6] one, mle, seed 1 starts, time left unknown" in caplog.text
    assert "[6/6] two, BLoB, small, seed 1 computed" in caplog.text
    before = lasting_part(out), (out / "records.jsonl").read_bytes()
    assert run_bench(whole, out) == 0
    assert fitted == once
    assert (lasting_part(out), (out / "records.jsonl").read_bytes()) == before


def test_a_part_of_the_grid_then_the_rest(place, fitted):
    whole, out = grid(place, seeds=(1,)), place / "out"
    assert run_bench(whole, out, only_tasks=["one"], only_methods=["TFB on MLE"]) == 0
    assert fitted == [("TFB", "one", 1), ("MLE", "one", 1)]
    assert {r["method"] for r in read_records(out)} == {"TFB on MLE"}
    assert run_bench(whole, out, only_tasks=["one"], only_methods=["mle"]) == 0
    assert len(fitted) == 2
    assert [r["method"] for r in read_records(out)] == ["mle", "TFB on MLE", "TFB on MLE"]


def test_changed_settings_take_the_place_of_old_ones(place):
    out = place / "out"
    methods = {"mle": None, "blob": {"final_std": 0.05, "schedule": "constant"}}
    assert run_bench(small(place, methods=methods), out) == 0
    assert (
        run_bench(small(place, methods={"blob": {"final_std": 0.1, "schedule": "constant"}}), out)
        == 0
    )
    records = read_records(out)
    assert [r["label"] for r in records] == ["BLoB N=0", "BLoB N=2", "MLE"]
    assert records[0]["config"]["method"]["final_std"] == 0.1


def test_fits_are_discarded_at_the_end(place):
    assert run_bench(small(place, methods={"mle": None}), place / "out", discard_fits=True) == 0
    assert not (place / "out/fits").exists()
    assert len(collect(place / "out")) == 1


def test_a_cell_that_fails_is_told_and_tried_again(place, monkeypatch, caplog):
    out, one = place / "out", small(place)
    fit = MLE.fit

    def broken(self, model, scorer, training):
        fit(self, model, scorer, training)  # leaves its adapter on the model
        raise NotFiniteError("the loss is nan at step 3")

    with monkeypatch.context() as patch:
        patch.setattr(MLE, "fit", broken)
        assert run_bench(one, out) == 1
    assert "one, mle, seed 1 failed: NotFiniteError: the loss is nan at step 3" in caplog.text
    assert "2 of 3 cells failed; run again to try them again" in caplog.text
    assert {r["method"] for r in read_records(out)} == {"BLoB, small"}
    (note, _) = sorted((out / "failed").iterdir())
    assert "NotFiniteError: the loss is nan" in note.read_text()
    assert run_bench(one, out) == 0
    assert [r["method"] for r in read_records(out)] == [
        "mle",
        *["TFB on MLE"] * 2,
        *["BLoB, small"] * 2,
    ]
    assert list((out / "failed").iterdir()) == []


def test_what_another_process_computes_is_passed_over_and_looked_at_again(place, monkeypatch):
    out, one = place / "out", small(place)
    cell, *_ = cells(one, one.load_all())
    lock = store.claimed(out / "locks", f"cell-{cell.key}")
    lock.__enter__()
    monkeypatch.setattr(launch, "PAUSE", 0.0)
    seen = []
    attempt = worker.Worker.attempt

    def watched(self, cell, starts):
        seen.append((cell.name, state := attempt(self, cell, starts)))
        if len(seen) == 4:
            lock.__exit__(None, None, None)
        return state

    monkeypatch.setattr(worker.Worker, "attempt", watched)
    assert run_bench(one, out) == 0
    names = [("TFB on MLE", "computed"), ("BLoB, small", "computed")]
    assert seen == [("mle", "busy"), *names, ("mle", "busy"), ("mle", "computed")]


def test_a_fit_of_another_process_is_waited_for(place):
    one = small(place, methods={"mle": None})
    shop = worker.Worker(one, place / "out")
    (cell,) = shop.cells
    assert shop.attempt(cell) == "computed"
    (place / "out/cells" / f"{cell.key}.jsonl").unlink()
    (lock,) = (place / "out/locks").glob("fit-*")
    with store.claimed(place / "out/locks", lock.stem):
        assert shop.attempt(cell) == "busy"
    assert shop.attempt(cell) == "computed"
    assert shop.attempt(cell) == "finished"


def test_time_left_is_by_like_cells(place, monkeypatch):
    whole = grid(place, seeds=(1, 2, 3))
    made = cells(whole, whole.load_all())
    taken = {("mle", "one"): 60.0, ("mle", "two"): 120.0, ("TFB on MLE", "one"): 600.0}
    known = {c.key: taken[c.name, c.task] for c in made[:4] if (c.name, c.task) in taken}
    monkeypatch.setattr(
        launch,
        "read_cell",
        lambda _, key: [{"seconds": {"cell": known[key]}}] if key in known else [],
    )
    progress = launch.Progress(place, made)
    mle, tfb, blob = 2 * (60 + 120), 5 * 600, 6 * (60 + 120 + 600) / 3
    assert (
        progress.left() == f"about {launch._span(mle + tfb + blob)} left" == "about 1 h 22 min left"
    )
    assert [launch._span(seconds) for seconds in (7, 119, 4000)] == ["7 s", "2 min", "1 h 7 min"]


# Ray


def fake_ray(died=()):
    """A Ray that runs a task when its result is asked for."""

    class RayError(Exception):
        pass

    calls, tasks = [], []

    class Remote:
        def __init__(self, function):
            self.function = function

        def remote(self, *arguments):
            calls.append(arguments[-1])
            tasks.append(lambda: self.function(*arguments))
            return len(tasks)

    def get(reference):
        if reference in died:
            raise RayError
        return tasks[reference - 1]()

    ray = types.ModuleType("ray")
    ray.exceptions = types.SimpleNamespace(RayError=RayError)
    ray.init = lambda **_: None
    ray.cluster_resources = lambda: {"CPU": 2.0}
    ray.remote = lambda **_: Remote
    ray.wait = lambda references, num_returns: (references[:1], references[1:])
    ray.get = get
    ray.calls = calls
    return ray


def test_ray_gets_each_cell_once(place, monkeypatch):
    out, one = place / "out", small(place)
    assert run_bench(one, place / "local") == 0
    _, second, *_ = keys = [cell.key for cell in cells(one, one.load_all())]
    ray = fake_ray(died={2})
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert run_bench(one, out, launcher="ray") == 1
    assert ray.calls == keys
    assert run_bench(one, out, launcher="ray") == 0
    assert ray.calls == [*keys, second]
    assert lasting_part(out) == lasting_part(place / "local")


def test_ray_hands_out_again_what_was_busy(place, monkeypatch):
    ray = fake_ray()
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr("bayestune.bench.launch.PAUSE", 0.0)
    states = iter(["busy", "computed", "busy", "computed", "computed"])
    monkeypatch.setattr(worker.Worker, "attempt", lambda *_: next(states))
    one = small(place)
    first, second, third = (cell.key for cell in cells(one, one.load_all()))
    assert run_bench(one, place / "out", launcher="ray") == 0
    assert ray.calls == [first, second, third, first, third]


def test_ray_that_is_not_installed_is_told(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        ImportError,
        match=r"got the launcher 'ray', expected ray to be installed: pip install 'bayes",
    ):
        run_bench(small(place), place / "out", launcher="ray")


# Cut off


class Killed(BaseException):
    """What nothing may catch."""


@pytest.fixture
def killer(monkeypatch):
    """Ends a run at its n-th file operation, training step or batch."""
    left = [10**9]

    def deadly(function):
        def call(*arguments, **named):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return function(*arguments, **named)

        return call

    for owner, name in [
        (Path, "replace"),
        (Path, "write_text"),
        (os, "replace"),
        (worker, "make_record"),
        (ClassTrainer, "compute_loss"),
        (Prediction, "of"),
    ]:
        monkeypatch.setattr(owner, name, deadly(getattr(owner, name)))
    return left


def test_a_run_cut_off_anywhere_ends_as_one_that_was_not(place, killer):
    one = small(place)
    assert run_bench(one, place / "whole") == 0
    operations, chance, cut = 10**9 - killer[0], random.Random(1), 0
    for _ in range(8):
        killer[0] = chance.randrange(operations // 3)
        try:
            run_bench(one, place / "cut")
        except Killed:
            cut += 1
    assert cut >= 5
    killer[0] = 10**9
    assert run_bench(one, place / "cut") == 0
    assert lasting_part(place / "cut") == lasting_part(place / "whole")


def helper(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "tests/benching.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_as_one_that_was_not(place):
    assert run_bench(grid(place), place / "whole") == 0
    helper("kill", place, 20)
    assert lasting_part(place / "killed") == lasting_part(place / "whole")


def test_two_runs_on_one_folder_share_the_cells(place):
    helper("both", place)
    log = (place / "both.log").read_text()
    assert log.count(" computed, ") == len(list((place / "both/cells").iterdir())) == 6
    for name in ("MLE", "BLoB"):
        assert log.count(f"fitting {name} on ") == 2
    assert run_bench(grid(place, seeds=(1,)), place / "whole") == 0
    assert lasting_part(place / "both") == lasting_part(place / "whole")


# The commands


def test_bench_and_table_from_the_command_line(place, capsys):
    settings = {
        "models": [str(place / "model")],
        "tasks": {
            "one": {
                "questions": {
                    "data": f"{place}/one.jsonl",
                    "evaluation_data": f"{place}/test.jsonl",
                }
            }
        },
        "methods": {"mle": None, "blob": {"final_std": 0.05, "schedule": "constant"}},
        "training": {"steps": 2, "batch_size": 2},
        "predicting": {"draws": [0, 2], "resamples": 10},
    }
    (place / "grid.yaml").write_text(yaml.safe_dump(settings))
    out = place / "out"
    command = [
        "bench",
        str(place / "grid.yaml"),
        "--output",
        str(out),
        "--seeds=[1, 2]",
        "--training.lora.rank=2",
    ]
    assert cli.main(command) == 0
    capsys.readouterr()
    assert cli.main(["table", str(out), "--resamples=20"]) == 0
    table = capsys.readouterr().out
    assert "mean ± standard deviation over 2 seeds" in table
    assert "BLoB N=2" in table
    assert (
        cli.main(
            [
                "table",
                str(out),
                "--style=latex",
                "--resamples=0",
                f"--output={place / 'tables/t.tex'}",
            ]
        )
        == 0
    )
    assert (place / "tables/t.tex").read_text().startswith("% needs")
    assert cli.main(["table", str(place)]) == 2
    assert "expected a folder of `bench` or `compare`; run one first" in capsys.readouterr().err
    settings["methods"]["blob"]["final_std"] = "wide"
    (place / "grid.yaml").write_text(yaml.safe_dump(settings))
    assert cli.main(command) == 2
    assert "settings of BLoB: got {'final_std': 'wide'" in capsys.readouterr().err
