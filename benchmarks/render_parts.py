"""What `render.py` puts a run on the page with: its command, its environment, its table and its bars."""

import importlib
import json
import re
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

Record = dict[str, Any]
FOLDER = Path(__file__).parent
PATHS = {
    "model": "MODEL",
    "data_root": "DATA",
    "official": "OFFICIAL",
    "posterior": "POSTERIOR",
    "logits_file": "LOGITS",
    "save_logits": "LOGITS",
}
ADDED = re.compile(
    r"bar: added ≤ ([\d.]+) s"
)  # import_time's bar is on an amount, not on the ratio
MET, MISSED = "met", "**missed**"


class _Built(Exception):
    """A benchmark has built its parser: no error, it carries the parser out of its main."""

    def __init__(self, parser: ArgumentParser) -> None:
        self.parser = parser


@cache
def parser_of(name: str) -> ArgumentParser | None:
    """The parser of a benchmark's command, taken from its main as it is about to parse; None for no such benchmark."""
    if not (FOLDER / f"{name}.py").is_file():
        return None
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    parse = ArgumentParser.parse_args

    def take(self: ArgumentParser, *_: Any, **__: Any) -> NoReturn:
        raise _Built(self)

    module = importlib.import_module(name)
    ArgumentParser.parse_args = take  # type: ignore[method-assign]
    try:
        module.main([])
    except _Built as built:
        return built.parser
    finally:
        ArgumentParser.parse_args = parse  # type: ignore[method-assign]
    return None


def described(name: str) -> str:
    """The first paragraph of what a benchmark says about itself."""
    parser = parser_of(name)
    text = (parser.description or "") if parser is not None else ""
    return " ".join(text.split("\n\n")[0].split())


def _shown(name: str, value: Any) -> str:
    if value is True:
        return f"--{name}"
    values = value if isinstance(value, list) else [PATHS.get(name, value)]
    return " ".join([f"--{name}", *(f"'{v}'" if " " in str(v) else str(v) for v in values)])


def distinct(record: Record) -> dict[str, Any]:
    """The options of a record that differ from the defaults of its parser, as it is today.

    The threads are always there on a CPU, for their default is the machine's.
    """
    options, parser = record["options"], parser_of(record["benchmark"])
    default = {
        name: None if parser is None else _plain(parser.get_default(name)) for name in options
    }
    found = {
        name: value for name, value in options.items() if value not in (default[name], None, False)
    }
    found.pop("threads", None)
    on_cpu = str(options.get("device", "cpu")).startswith("cpu")
    return {**found, "threads": options["threads"]} if on_cpu and "threads" in options else found


def command(record: Record) -> str:
    """The command that made a record, with placeholders for paths."""
    shown = [_shown(name, value) for name, value in distinct(record).items()]
    return " ".join([f"python benchmarks/{record['benchmark']}.py", *shown])


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def title_of(record: Record) -> str:
    """The title that the benchmark gave the run, or the model's name; no folder of the machine is in it."""
    model = record["options"].get("model")
    name = Path(model).name if model else "random weights"
    title = record.get("title", name)
    for option in PATHS:
        if value := record["options"].get(option):
            title = title.replace(str(value), Path(value).name)
    return title


def environment_line(record: Record) -> str:
    """Where the run was made, and what stands for the placeholders."""
    where = " · ".join(
        f"{name} {value}" for name, value in record["environment"].items() if value is not None
    )
    names = [
        f"`{sign}` {Path(v).name}" for o, sign in PATHS.items() if (v := record["options"].get(o))
    ]
    return " · ".join([where, *names])


def _amount(value: float) -> str:
    return f"{value:.4g}"


def _verdict(value: float, bar: float) -> str:
    return MET if value <= bar else MISSED


def _bar_of(case: Record) -> tuple[float, float, str] | None:
    """A case's value, bar and unit, if it has a bar."""
    if case["bar"] is not None:
        return case["ratio"]["median"], case["bar"], ""
    if (match := ADDED.search(case["name"])) is not None:
        return case["amounts"]["added"], float(match[1]), " s"
    return None


def _interval(ratio: Record, low: str = "low", high: str = "high") -> str:
    return f"{ratio[low]:.3f} – {ratio[high]:.3f}"


def _case_row(case: Record) -> list[str]:
    ratio, held = case["ratio"], _bar_of(case)
    bar, verdict = (
        ("", "") if held is None else (f"≤ {held[1]:g}{held[2]}", _verdict(held[0], held[1]))
    )
    amounts = ", ".join(f"{name} {_amount(value)}" for name, value in case["amounts"].items())
    quartiles = _interval(ratio, "lower_quartile", "upper_quartile")
    spread = [quartiles, _interval(ratio)] if ratio["count"] > 1 else ["", ""]
    return [
        case["name"],
        f"{ratio['median']:.3f}",
        *spread,
        bar,
        verdict,
        f"{amounts} {case['unit']}",
        str(ratio["count"]),
    ]


def _facts(record: Record) -> dict[str, Any]:
    aside = {"benchmark", "title", "environment", "options", "cases"}
    return {
        name: value
        for name, value in record.items()
        if name not in aside and not name.endswith("_bar")
    }


def measured(record: Record) -> tuple[Sequence[str], list[list[str]]]:
    """The run's table, its head and its rows: cases, or whatever else the record holds."""
    if "cases" in record:
        head = ["case", "ratio", "quartiles", "95 % interval", "bar", "", "medians", "turns"]
        return head, [_case_row(case) for case in record["cases"]]
    rows = []
    for name, value in _facts(record).items():
        text = (
            _amount(value)
            if isinstance(value, float)
            else value
            if isinstance(value, str)
            else json.dumps(value)
        )
        bar = record.get(f"{name}_bar")
        rows.append(
            [name, text, *(("", "") if bar is None else (f"≤ {bar:g}", _verdict(value, bar)))]
        )
    return ["", "value", "bar", ""], rows


def bar_rows(record: Record) -> list[list[str]]:
    """A row for each bar that the run is held to: what, value, interval, bar, verdict."""
    rows = []
    for case in record.get("cases", []):
        if (held := _bar_of(case)) is not None:
            value, bar, unit = held
            interval = (
                _interval(case["ratio"])
                if case["bar"] is not None and case["ratio"]["count"] > 1
                else ""
            )
            name = f"{title_of(record)}: {case['name']}"
            text = f"{_amount(value)}{unit}" if unit else f"{value:.3f}"
            rows.append([name, text, interval, f"≤ {bar:g}{unit}", _verdict(value, bar)])
    for name in _facts(record):
        if (bar := record.get(f"{name}_bar")) is not None:
            what = f"{title_of(record)}: {name}"
            rows.append(
                [what, _amount(record[name]), "", f"≤ {bar:g}", _verdict(record[name], bar)]
            )
    return rows
