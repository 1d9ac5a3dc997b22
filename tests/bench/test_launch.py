import logging
import os
import random
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

from bayestune.bench import collect, launch, run_bench, store, worker
from bayestune.cli import main
from bayestune.evaluation import read_records, records
from bayestune.methods import METHODS, MLE, BLoB
from bayestune.posteriors import Prediction, posterior_digest, read_details
from bayestune.report import grid_tables, render
from bayestune.training.callbacks import NotFiniteError
from bayestune.training.trainer import ClassTrainer
from benching import furnish, grid, small

ROOT = Path(__file__).parents[2]
VOLATILE = ("seconds", "peak_memory_mb", "date")


@pytest.fixture
def place(tmp_path, llama, byte_level):
    """A folder with a model and the rows of two tasks."""
    return furnish(tmp_path, llama(), byte_level)


def lasting_part(folder):
    """What two runs of the same grid must agree in: records but for times, rows, the table."""
    found = read_records(folder)
    files = {one["predictions"]: (folder / one["predictions"]).read_text() for one in found}
    same = [{key: one[key] for key in one if key not in VOLATILE} for one in found]
    return same, files, render(grid_tables(found, folder, 50))


def labels(folder):
    return [record["label"] for record in read_records(folder)]


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


# Running


def test_a_second_run_computes_nothing_and_fits_are_shared(place, fitted, caplog):
    caplog.set_level(logging.INFO, "bayestune")
    whole = grid(place, seeds=(1,))
    out = place / "out"
    assert run_bench(whole, out) == 0
    # TFB's base is the MLE's fit
    once = [(m, t, 1) for t in ("one", "two") for m in ("MLE", "TFB", "BLoB")]
    assert fitted == once
    found = read_records(out)
    assert [(r["label"], r["method"], r["task"], r["seed"]) for r in found[:5]] == [
        ("MLE", "mle", "one", 1),
        ("TFB on MLE N=0", "tfb", "one", 1),
        ("TFB on MLE N=2", "tfb", "one", 1),
        ("BLoB, small N=0", "blob", "one", 1),
        ("BLoB, small N=2", "blob", "one", 1),
    ]
    assert {record["trained_on"] for record in found[:5]} == {"one"}
    assert [(r["trained_on"], r["task"]) for r in found[5:7]] == [("two", "two"), ("two", "one")]
    assert len(found) == 5 + 10
    assert found[1]["config"]["method"]["base"] == {"method": "mle"}
    for record in found:
        lines = (out / record["predictions"]).read_text().splitlines()
        assert len(lines) == record["n"] == 6
    assert "[0/6] one, mle, seed 1 starts, time left unknown" in caplog.text
    assert "[6/6] two, BLoB, small, seed 1 computed" in caplog.text
    before = (lasting_part(out), (out / "records.jsonl").read_bytes())
    assert run_bench(whole, out) == 0
    assert fitted == once
    assert (lasting_part(out), (out / "records.jsonl").read_bytes()) == before


def test_students_take_the_fits_of_their_teachers(place, fitted):
    """In the grid that has them, and in one of students alone that writes to the same folder."""
    out = place / "out"
    blob = {"method": "blob", "final_std": 0.05, "schedule": "constant"}
    student = {"method": "distilled", "steps": 2}
    first = {"mle": None, "noisy": blob, "student": {**student, "base": "noisy"}}
    assert run_bench(small(place, methods=first), out) == 0
    assert fitted == [("MLE", "one", 1), ("BLoB", "one", 1)]
    controls = {
        "student of MLE": {**student, "base": "mle"},
        "student at a temperature": {"method": "temperature", "base": {**student, "base": blob}},
        "student of two": {**student, "base": {"method": "ensemble", "base": "mle", "size": 2}},
    }
    assert run_bench(small(place, methods=controls), out) == 0
    assert fitted[2:] == [("MLE", "one", 1001)]  # the ensemble's second member
    folders = {path.name.split("--")[0]: path for path in (out / "fits").iterdir()}
    told = read_details(folders["one-temperature-1"])["facts"]["base"]["facts"]["teacher"]
    assert told["digest"] == posterior_digest(folders["one-blob-1"])
    students = [path for path in (out / "fits").iterdir() if "-distilled-" in path.name]
    assert len(students) == 3  # that at a temperature is the first grid's
    for path in students:
        assert read_details(path)["facts"]["teacher"]["digest"]
    kept = [record["label"].partition(" N=")[0] for record in read_records(out)]
    assert list(dict.fromkeys(kept)) == [*controls, "MLE", "noisy", "student"]


def test_a_part_of_the_grid_then_the_rest(place, fitted):
    whole = grid(place, seeds=(1,))
    out = place / "out"
    assert run_bench(whole, out, only_tasks=["one"], only_methods=["TFB on MLE"]) == 0
    assert fitted == [("TFB", "one", 1), ("MLE", "one", 1)]
    assert labels(out) == ["TFB on MLE N=0", "TFB on MLE N=2"]
    assert run_bench(whole, out, only_tasks=["one"], only_methods=["mle"]) == 0
    assert len(fitted) == 2
    assert labels(out) == ["MLE", "TFB on MLE N=0", "TFB on MLE N=2"]


def test_a_part_that_the_grid_does_not_have_is_refused(place):
    said = "tasks to run that are not in the grid: got .'ones'., expected some of .'one'."
    with pytest.raises(ValueError, match=said):
        run_bench(small(place), place / "out", only_tasks=["ones"])
    with pytest.raises(ValueError, match="methods to run that are not in the grid: got .'tfb'."):
        run_bench(small(place), place / "out", only_methods=["tfb"])


def test_changed_settings_take_the_place_of_old_ones(place):
    out = place / "out"
    blob = {"final_std": 0.05, "schedule": "constant"}
    assert run_bench(small(place, methods={"mle": None, "blob": blob}), out) == 0
    assert run_bench(small(place, methods={"blob": {**blob, "final_std": 0.1}}), out) == 0
    assert labels(out) == ["BLoB N=0", "BLoB N=2", "MLE"]
    assert read_records(out)[0]["config"]["method"]["final_std"] == 0.1


def test_fits_are_discarded_at_the_end(place):
    assert run_bench(small(place, methods={"mle": None}), place / "out", discard_fits=True) == 0
    assert not (place / "out/fits").exists()
    assert len(collect(place / "out")) == 1


def test_what_an_entry_changes_of_the_training_holds_for_its_predictions(place):
    """A method that is fitted in bfloat16 is evaluated in bfloat16."""
    rough = {"method": "mle", "training": {"bf16": True}}
    assert run_bench(small(place, methods={"mle": None, "rough": rough}), place / "out") == 0
    exact, found = read_records(place / "out")
    assert [one["config"]["bf16"] for one in (exact, found)] == [False, True]
    assert found["config"]["training"]["bf16"] is True


def test_a_cell_that_fails_is_told_and_tried_again(place, monkeypatch, caplog):
    out = place / "out"
    fit = MLE.fit

    def broken(self, model, scorer, training):
        fit(self, model, scorer, training)  # leaves its adapter on the model
        raise NotFiniteError("the loss is nan at step 3")

    with monkeypatch.context() as patch:
        patch.setattr(MLE, "fit", broken)
        assert run_bench(small(place), out) == 1
    assert "one, mle, seed 1 failed: NotFiniteError: the loss is nan at step 3" in caplog.text
    assert "2 of 3 cells failed; run again to try them again" in caplog.text
    small_blob = ["BLoB, small N=0", "BLoB, small N=2"]
    assert labels(out) == small_blob
    (note, _) = sorted((out / "failed").iterdir())
    assert "NotFiniteError: the loss is nan" in note.read_text()
    assert run_bench(small(place), out) == 0
    assert labels(out) == ["MLE", "TFB on MLE N=0", "TFB on MLE N=2", *small_blob]
    assert list((out / "failed").iterdir()) == []


def test_what_another_process_computes_is_passed_over_and_looked_at_again(place, monkeypatch):
    one = small(place)
    first, *_ = one.cells(one.load_all())
    lock = store.claimed(place / "out/locks", f"cell-{first.key}")
    lock.__enter__()
    monkeypatch.setattr(launch, "PAUSE", 0.0)
    seen = []
    compute = worker.Worker.compute

    def watched(self, cell, starting):
        state = compute(self, cell, starting)
        seen.append((cell.name, state))
        if len(seen) == 4:
            lock.__exit__(None, None, None)
        return state

    monkeypatch.setattr(worker.Worker, "compute", watched)
    assert run_bench(one, place / "out") == 0
    others = [("TFB on MLE", "computed"), ("BLoB, small", "computed")]
    assert seen == [("mle", "busy"), *others, ("mle", "busy"), ("mle", "computed")]


def test_a_fit_of_another_process_is_waited_for(place):
    out = place / "out"
    own = worker.Worker(small(place, methods={"mle": None}), out)
    (cell,) = own.cells
    assert own.compute(cell) == "computed"
    store.cell_file(out, cell.key).unlink()
    (lock,) = (out / "locks").glob("fit-*")
    with store.claimed(out / "locks", lock.stem):
        assert own.compute(cell) == "busy"
    assert own.compute(cell) == "computed"
    assert own.compute(cell) == "finished"


def test_time_left_is_by_like_cells(place):
    whole = grid(place, seeds=(1, 2, 3))
    made = whole.cells(whole.load_all())
    taken = {("mle", "one"): 60.0, ("mle", "two"): 120.0, ("TFB on MLE", "one"): 600.0}
    (place / "out/cells").mkdir(parents=True)
    for cell in made[:4]:
        if (cell.name, cell.task) in taken:
            record = f'{{"seconds": {{"cell": {taken[cell.name, cell.task]}}}}}\n'
            store.cell_file(place / "out", cell.key).write_text(record)
    mle, tfb, blob = 2 * (60 + 120), 5 * 600, 6 * (60 + 120 + 600) / 3
    assert (mle + tfb + blob) / 60 == 82
    assert worker.Progress(place / "out", made).left() == "about 1 h 22 min left"
    assert [worker._span(seconds) for seconds in (7, 119, 4000)] == ["7 s", "2 min", "1 h 7 min"]


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
    out = place / "out"
    one = small(place)
    assert run_bench(one, place / "local") == 0
    keys = [cell.key for cell in one.cells(one.load_all())]
    ray = fake_ray(died={2})
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert run_bench(one, out, launcher="ray") == 1
    assert ray.calls == keys
    assert run_bench(one, out, launcher="ray") == 0
    assert ray.calls == [*keys, keys[1]]
    assert lasting_part(out) == lasting_part(place / "local")


def test_ray_hands_out_again_what_was_busy(place, monkeypatch):
    ray = fake_ray()
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(launch, "PAUSE", 0.0)
    states = iter(["busy", "computed", "busy", "computed", "computed"])
    monkeypatch.setattr(worker.Worker, "compute", lambda *_: next(states))
    one = small(place)
    first, second, third = (cell.key for cell in one.cells(one.load_all()))
    assert run_bench(one, place / "out", launcher="ray") == 0
    assert ray.calls == [first, second, third, first, third]


def test_ray_that_is_not_installed_is_told(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    said = r"got the launcher 'ray', expected ray to be installed: pip install 'bayes"
    with pytest.raises(ImportError, match=said):
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
        (records, "summarise"),
        (ClassTrainer, "compute_loss"),
        (Prediction, "of"),
    ]:
        monkeypatch.setattr(owner, name, deadly(getattr(owner, name)))
    return left


def test_a_run_cut_off_anywhere_ends_as_one_that_was_not(place, killer):
    assert run_bench(small(place), place / "whole") == 0
    operations = 10**9 - killer[0]
    chance = random.Random(1)
    cut = 0
    for _ in range(8):
        killer[0] = chance.randrange(operations // 3)
        try:
            run_bench(small(place), place / "cut")
        except Killed:
            cut += 1
    assert cut >= 5
    killer[0] = 10**9
    assert run_bench(small(place), place / "cut") == 0
    assert lasting_part(place / "cut") == lasting_part(place / "whole")


def helper(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "tests/benching.py"), *map(str, arguments)]
    subprocess.run(command, check=True, env=environment, timeout=300)


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_as_one_that_was_not(place):
    assert run_bench(grid(place), place / "whole") == 0
    helper("kill", place, 20)
    assert lasting_part(place / "killed") == lasting_part(place / "whole")


@pytest.mark.slow
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
    rows = {"data": f"{place}/one.jsonl", "evaluation_data": f"{place}/test.jsonl"}
    settings = {
        "models": [str(place / "model")],
        "tasks": {"one": {"questions": rows}},
        "methods": {"mle": None, "blob": {"final_std": 0.05, "schedule": "constant"}},
        "training": {"steps": 2, "batch_size": 2},
        "predicting": {"draws": [0, 2], "resamples": 10},
    }
    (place / "grid.yaml").write_text(yaml.safe_dump(settings))
    out = str(place / "out")
    command = ["bench", str(place / "grid.yaml"), "--output", out]
    command += ["--seeds=[1, 2]", "--training.lora.rank=2"]
    assert main(command) == 0
    capsys.readouterr()
    assert main(["table", out, "--resamples=20"]) == 0
    table = capsys.readouterr().out
    assert "mean ± standard deviation over 2 seeds" in table
    assert "BLoB N=2" in table
    written = place / "tables/t.tex"
    assert main(["table", out, "--style=latex", "--resamples=0", f"--output={written}"]) == 0
    assert written.read_text().startswith("% needs")
    assert main(["table", str(place)]) == 2
    assert "expected a folder of `bench` or `compare`; run one first" in capsys.readouterr().err
    settings["methods"]["blob"]["final_std"] = "wide"
    (place / "grid.yaml").write_text(yaml.safe_dump(settings))
    assert main(command) == 2
    assert "settings of BLoB: got {'final_std': 'wide'" in capsys.readouterr().err
