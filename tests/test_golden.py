"""Tiny fits of every method give what they gave when the golden run was frozen, see `golden.py`."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bayestune import METHODS
from golden import (
    COMMANDS,
    SCORINGS,
    SEEDS,
    SETTINGS,
    addresses,
    configurations,
    fitted,
    grid_keys,
    records,
)

GOLDEN = Path(__file__).parent / "golden"
TENSORS = load_file(GOLDEN / "tensors.safetensors")
TEXTS = json.loads((GOLDEN / "texts.json").read_text(encoding="utf-8"))


def assert_golden(found, prefix):
    expected = {name: value for name, value in TENSORS.items() if name.startswith(prefix)}
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_every_method_has_golden_values():
    assert set(SETTINGS) == set(METHODS)


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("name", SETTINGS)
def test_fits_and_artefacts_are_the_golden_ones(name, scoring):
    found = {}
    for seed in SEEDS:
        found |= fitted(name, scoring, seed)
    assert_golden(found, f"{name}/{scoring}/")


def test_noise_with_an_address_is_the_golden_one():
    found = addresses()
    assert found
    assert all(torch.equal(value, TENSORS[name]) for name, value in found.items())


@pytest.fixture(scope="module")
def printed():
    return configurations()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_commands_configuration_is_the_golden_one(printed, command):
    assert printed[command] == TEXTS["configurations"][command]


def test_a_grids_keys_are_the_golden_ones():
    assert grid_keys() == TEXTS["grid_keys"]


def assert_close(found, expected, place=""):
    if isinstance(expected, dict):
        assert set(found) == set(expected), place
        for key, value in expected.items():
            assert_close(found[key], value, f"{place}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for i, value in enumerate(expected):
            assert_close(found[i], value, f"{place}/{i}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5), place
    else:
        assert found == expected, place


def test_records_of_compare_are_the_golden_ones():
    assert_close(json.loads(json.dumps(records())), TEXTS["records"])
