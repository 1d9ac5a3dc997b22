"""`gpu.py` keeps to its time: its budget and its sections on a clock that is made up."""

import importlib
import json
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
TINY = [
    "--device",
    "cpu",
    "--threads",
    "1",
    "--geometry",
    "tiny",
    "--length",
    "8",
    "--repeats",
    "50",
]


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


class Clock:
    """A clock that only moves when told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def lasting(self, seconds):
        def act(_):
            self.now += seconds

        return act


def test_what_a_section_saves_the_later_ones_have(load):
    clock = Clock()
    budget = load("gpu_budget").Budget(100.0, clock)
    assert budget.deadline([1, 1, 2]) == 23.0  # a quarter of the usable 92 %
    clock.now = 2.0
    assert budget.deadline([1, 2]) == 32.0
    clock.now = 92.0
    with pytest.raises(
        load("gpu_budget").UnfitError, match="no time is left; give it more --seconds"
    ):
        budget.deadline([2])


def pace_of(load, clock, deadline, most=400):
    return load("gpu_budget").Pace(deadline, most, 2, torch.device("cpu"), clock)


@pytest.mark.parametrize(("deadline", "turns"), [(60.0, 15), (33.0, 6), (10_000.0, 400)])
def test_as_many_turns_as_fit(load, deadline, turns):
    clock = Clock()
    seconds = pace_of(load, clock, deadline).interleave(
        {"a": clock.lasting(2.0), "b": clock.lasting(1.0)}
    )
    assert seconds == {"a": [2.0] * turns, "b": [1.0] * turns}
    assert (
        clock.now == 3.0 * (3 + 2 + turns) <= deadline
    )  # three to see how long they take, two to warm up


def test_too_few_turns_are_not_measured(load):
    clock = Clock()
    with pytest.raises(
        load("gpu_budget").UnfitError, match=r"a turn takes 3 s, and 23 s are left for it"
    ):
        pace_of(load, clock, 32.0).interleave({"a": clock.lasting(2.0), "b": clock.lasting(1.0)})
    assert clock.now == 9.0


def test_a_slow_first_turn_does_not_count_for_the_rate(load):
    clock = Clock()

    def act(turn, seen=[]):  # noqa: B006  (remembers its calls)
        clock.now += 0.5 if seen else 20.0
        seen.append(turn)

    assert len(pace_of(load, clock, 31.0).interleave({"a": act})["a"]) == 18


@pytest.fixture
def planned(load, monkeypatch, tmp_path):
    """Runs gpu.py with made-up sections on a made-up clock; gives what it printed, the records and the failures."""
    gpu, sections = load("gpu"), load("gpu_sections")

    def run(actions, seconds, capsys):
        clock, file = Clock(), tmp_path / "gpu.jsonl"

        def section(weight, lap):
            def measure(_, pace):
                if isinstance(lap, Exception):
                    raise lap
                seconds = pace.interleave(
                    {"ours": clock.lasting(1.1 * lap), "base": clock.lasting(lap)}
                )
                return [load("harness").timed_case("made up", seconds, ("ours", "base"), None)]

            return sections.Section(weight, measure)

        made = {name: section(*what) for name, what in actions.items()}
        monkeypatch.setattr(gpu, "SECTIONS", made)
        options = gpu.options_of([*TINY, "--seconds", str(seconds), "--json", str(file)])
        failed = gpu.run(options, clock)
        lines = file.read_text().splitlines() if file.exists() else []
        return capsys.readouterr().out, [json.loads(line) for line in lines], failed, clock

    return run


def test_a_section_that_does_not_fit_is_left_out_and_the_others_are_measured(planned, capsys):
    actions = {"quick": (1, 0.1), "slow": (1, 30.0), "after": (1, 0.2)}
    printed, records, failed, clock = planned(actions, 300, capsys)
    assert [(r["options"]["sections"], r["cases"][0]["ratio"]["count"]) for r in records] == [
        (["quick"], 50),
        (["after"], 50),
    ]
    assert "tiny slow left out: a turn takes 63 s, and 0 s are left for it" in printed
    assert failed == []
    assert clock.now < 300


def test_when_the_time_is_up_the_rest_is_left_out(planned, capsys):
    printed, records, failed, _ = planned({"slow": (100, 40.0), "late": (1, 0.1)}, 200, capsys)
    assert records == failed == []
    assert "tiny slow left out: a turn takes 84 s" in printed
    assert "tiny late left out: no time is left" in printed


def test_a_failure_loses_its_own_section_only_and_shows_in_the_exit_code(
    planned, capsys, load, monkeypatch
):
    actions = {"one": (1, 0.1), "broken": (1, RuntimeError("out of memory")), "two": (1, 0.1)}
    printed, records, failed, _ = planned(actions, 100, capsys)
    assert [record["options"]["sections"] for record in records] == [["one"], ["two"]]
    assert "tiny broken failed: RuntimeError: out of memory" in printed
    assert failed == ["tiny broken"]
    monkeypatch.setattr(load("gpu"), "run", lambda _: failed)
    with pytest.raises(SystemExit, match="failed: tiny broken"):
        load("gpu").main(TINY)
