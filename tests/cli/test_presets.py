import re
from pathlib import Path

import pytest

from bayestune.cli import main
from bayestune.cli.presets import preset_files, resolve_preset

CONFIGS = Path(__file__).parents[2] / "configs"


def test_every_file_of_the_configurations_is_a_preset():
    found = preset_files()  # of the checkout, or of an installed package that is tested
    names = {
        path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml")
    }
    assert set(found) == names
    for name, path in found.items():
        assert path.read_bytes() == (CONFIGS / f"{name}.yaml").read_bytes()


def test_the_files_of_an_installed_package_go_before_those_of_a_checkout(tmp_path):
    package = tmp_path / "bayestune"
    preset = package / "configs/mine/one.yaml"
    preset.parent.mkdir(parents=True)
    preset.write_text("steps: 3\n")
    assert preset_files(package) == {"mine/one": preset}


def test_a_preset_is_its_file_and_a_path_stays_as_it_is():
    assert resolve_preset("preset:small/grid") == str(preset_files()["small/grid"])
    assert resolve_preset("small/grid") == "small/grid"


def test_an_unknown_preset_is_told_with_the_known_ones():
    message = re.escape("unknown preset: got 'small/nothing', expected one of ['evidence/")
    with pytest.raises(ValueError, match=message):
        resolve_preset("preset:small/nothing")


@pytest.mark.parametrize(
    ("command", "name"), [("compare --config", "small/arc_easy"), ("bench", "small/grid")]
)
def test_a_command_takes_a_preset_for_a_file(command, name, capsys):
    def printed(config):
        with pytest.raises(SystemExit):
            main([*command.split(), config, "--output=out", "--print_config"])
        return capsys.readouterr().out

    assert printed(f"preset:{name}") == printed(str(CONFIGS / f"{name}.yaml"))


def test_a_command_names_the_preset_that_is_not_there(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["compare", "--config=preset:nothing", "--output=out"])
    assert "--config: unknown preset: got 'nothing'" in capsys.readouterr().err
