"""Which commands a launcher may start in several processes, and what the page says of it."""

import re
from pathlib import Path

import pytest

from bayestune.cli.guard import SHARED, refuse_processes
from bayestune.cli.parser import COMMANDS
from bayestune.errors import Refusal
from bayestune.methods import METHODS, check_launch

PAGE = Path(__file__).parents[2] / "docs/scale.md"
ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
SINGLE = {"mle", "map", "mc_dropout", "blob", "bbb", "blob_authors"}
BESIDE_ADAMW = {"ivon", "swag", "scalabl", "dalorra", "early_stopping"}  # refused by the training


@pytest.fixture
def under(monkeypatch):
    def put(environment, processes=2):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_shares_its_work_or_refuses(command, under):
    under({}, processes=1)
    refuse_processes(command)
    under({}, processes=2)
    if command in SHARED:
        refuse_processes(command)
        return
    with pytest.raises(Refusal, match=f"got 2 for '{command}', expected one; .*start|split"):
        refuse_processes(command)


@pytest.mark.parametrize("environment", [ZERO3, FSDP2])
@pytest.mark.parametrize("command", SHARED)
def test_what_needs_a_whole_base_beside_a_training_refuses_parts(command, environment, under):
    under(environment)
    if command not in ("compare", "distil"):
        refuse_processes(command)
        return
    with pytest.raises(Refusal, match=f"'{command}' needs the whole base .*expected DDP"):
        refuse_processes(command)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_goes_on_after_a_training_refuses_parts(method, under):
    made = METHODS[method]()
    check_launch(made)
    under(ZERO3)
    if method in SINGLE | BESIDE_ADAMW:
        check_launch(made)
        return
    with pytest.raises(Refusal, match="goes on after a training: got it under ZeRO-3"):
        check_launch(made)


def test_noise_that_is_chosen_by_several_fits_refuses_parts(under):
    under(FSDP2)
    with pytest.raises(Refusal, match="goes on after a training: got it under FSDP 2"):
        check_launch(METHODS["blob"](final_std="auto"))


def test_the_page_has_every_command():
    page = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:`[a-z-]+`(?:, )?)+) \| (\w+)", page, re.MULTILINE)
    told = {name: how for names, how in rows for name in re.findall(r"`([a-z-]+)`", names)}
    assert told == {name: "shared" if name in SHARED else "refused" for name in COMMANDS}
