"""Presets: the files of `configs/` by name, so that an installed package needs no checkout.

The files lie at the top of the repository; a wheel carries them as `bayestune/configs`.
"""

from argparse import ArgumentError
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile

from bayestune.errors import Refusal

PREFIX = "preset:"
PACKAGE = Path(__file__).parents[1]  # src/bayestune, or where it is installed


def preset_files(package: Path = PACKAGE) -> dict[str, Path]:
    """The file of each preset, by names such as "small/arc_easy".

    Args:
        package: the folder of the package bayestune.
    """
    in_wheel = package / "configs"
    folder = in_wheel if in_wheel.is_dir() else package.parents[1] / "configs"
    files = sorted(folder.glob("*/*.yaml"))
    return {f"{path.parent.name}/{path.stem}": path for path in files}


def resolve_preset(value: str) -> str:
    """The path of the file that `preset:NAME` stands for; any other value as it is.

    Raises:
        Refusal: if there is no preset of this name.
    """
    if not value.startswith(PREFIX):
        return value
    known = preset_files()
    name = value.removeprefix(PREFIX)
    if name not in known:
        raise Refusal(
            f"unknown preset: got {name!r}, expected one of {list(known)}; or give a file's path"
        )
    return str(known[name])


class ConfigOrPreset(ActionConfigFile):
    """The action of `--config`: reads a file of options, or the preset of a name."""

    def __call__(
        self, parser: Any, cfg: Any, values: Any, option_string: str | None = None
    ) -> None:
        """Reads the options of the file into `cfg`."""
        try:
            path = resolve_preset(values)
        except ValueError as error:
            raise ArgumentError(self, str(error)) from None
        super().__call__(parser, cfg, path, option_string)
