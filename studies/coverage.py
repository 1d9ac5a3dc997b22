"""How often each interval that a table prints holds the true value, and how large p-values are.

`python -m studies.coverage` draws rows from populations whose true values are known, asks the
package for its intervals and p-values, and keeps a record for each population and number of rows in
`--json`; what is there already goes on to `--sims` simulations. `--page` renders the page of all
records. One thread, about ten minutes from nothing.
"""

import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayestune.metrics import accuracy, aurc, brier, ece, nll, paired_bootstrap, summarise
from bayestune.metrics.intervals import resampled
from bayestune.metrics.scores import METRICS as WEIGHTED
from bayestune.metrics.scores import RowTerms
from bayestune.whole_files import read_json_lines, write_json_lines
from studies.calibration_table import share_kept
from studies.coverage_page import page

POPULATION = 500_000  # rows, whose values count as true
CLASSES = 4
METRICS = {"accuracy": accuracy, "nll": nll, "brier": brier, "ece": ece, "aurc": aurc}
PAIRED = ("accuracy", "nll", "brier")
PLAIN = ("nll", "ece")  # whose percentile intervals are tried too, to show why they are not used
NUMBERS = (50, 200, 1000)
RESULTS = Path(__file__).parents[1] / "results/coverage/records.jsonl"
PAGE = Path(__file__).parents[1] / "docs/intervals.md"
Record = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """A population: logits are N(0, spread²), labels follow softmax(logits/temperature)."""

    name: str
    spread: float
    temperature: float = 1.0


SETTINGS = (
    Setting("calibrated", 1.5),
    Setting("calibrated, right in 90 %", 7.0),
    Setting("calibrated, right in 97 %", 20.0),
    Setting("a little overconfident", 1.5, 1.3),
    Setting("overconfident", 3.0, 2.5),
    Setting("overconfident, right in 85 %", 7.0, 1.5),
    Setting("underconfident", 1.5, 0.7),
    Setting("nearly all rows sure", 20.0, 2.0),
)


@dataclass(frozen=True)
class Rows:
    """Rows of a model, of a second one, blunter and noisy, and of one between; labels (N,)."""

    first: Tensor
    second: Tensor
    between: Tensor
    labels: Tensor

    @classmethod
    def of(cls, setting: Setting, number: int, generator: torch.Generator) -> "Rows":
        """Draws rows."""
        shape = (number, CLASSES)
        logits = setting.spread * torch.randn(shape, generator=generator, dtype=torch.float64)
        noise = setting.spread * torch.randn(shape, generator=generator, dtype=torch.float64)
        chances = (logits / setting.temperature).softmax(1)
        labels = torch.multinomial(chances, 1, generator=generator)[:, 0]
        second = 0.8 * logits + 0.3 * noise
        between = 0.6 * logits + 0.4 * second
        return cls(logits.softmax(1), second.softmax(1), between.softmax(1), labels)

    def swapped(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Both models with the rows of one exchanged for the other's at random: no difference."""
        coin = torch.rand(len(self.labels), 1, generator=generator) < 0.5
        first = torch.where(coin, self.first, self.second)
        return first, torch.where(coin, self.second, self.first)


def _entropy(probabilities: Tensor) -> Tensor:
    return torch.special.entr(probabilities).sum(1)


def _losses(probabilities: Tensor, labels: Tensor) -> Tensor:
    return -probabilities.gather(1, labels[:, None])[:, 0].log()


def true_values(setting: Setting, generator: torch.Generator) -> dict[str, float]:
    """What each interval should hold."""
    rows = Rows.of(setting, POPULATION, generator)
    values = {name: metric(rows.first, rows.labels) for name, metric in METRICS.items()}
    if setting.temperature == 1:
        values["ece"] = 0.0  # and not what is left of it in finitely many rows
    for name in PAIRED:
        values[f"difference {name}"] = values[name] - METRICS[name](rows.second, rows.labels)
    first, second, between = (
        _losses(part, rows.labels).mean().item() for part in (rows.first, rows.second, rows.between)
    )
    for name in PLAIN:
        values[f"percentiles {name}"] = values[name]
    if setting.temperature == 1:  # else there may be no gain to share
        values["share kept"] = (second - between) / (second - first)
    gap = _entropy(rows.first) - _entropy(rows.second)
    values["difference of a row's number"] = gap.mean().item()
    return values


Ends = tuple[float | None, float | None]


def percentiles(rows: Rows) -> dict[str, Ends]:
    """The plain bootstrap intervals."""
    terms = RowTerms.of(rows.first, rows.labels)

    def statistics(weights: Tensor) -> Tensor:
        return torch.stack([WEIGHTED[name](terms, weights) for name in PLAIN])

    drawn = resampled(statistics, len(rows.labels), 1000)
    low, high = drawn.quantile(drawn.new_tensor([0.025, 0.975]), dim=1).tolist()
    names = (f"percentiles {name}" for name in PLAIN)
    return dict(zip(names, zip(low, high, strict=True), strict=True))


def intervals(rows: Rows) -> tuple[dict[str, Ends], float, bool]:
    """All intervals of a set of rows, the p of calibration, and whether each holds its value."""
    found: dict[str, Ends] = {}
    summary = summarise(rows.first, rows.labels)
    level = summary.pop("ece_if_calibrated")
    inside = True
    for name, interval in summary.items():
        found[name] = (interval.low, interval.high)
        if interval.low is not None and interval.high is not None:
            inside &= interval.low <= interval.value <= interval.high
    found |= percentiles(rows)
    for name in PAIRED:
        paired = paired_bootstrap(rows.first, rows.second, rows.labels, name)
        found[f"difference {name}"] = (paired.low, paired.high)
    losses = [_losses(part, rows.labels) for part in (rows.second, rows.first, rows.between)]
    found["share kept"] = share_kept(*losses, resamples=1000)[1:]
    gap = _entropy(rows.first) - _entropy(rows.second)
    half = 1.96 * gap.std().item() / len(gap) ** 0.5
    found["difference of a row's number"] = (gap.mean().item() - half, gap.mean().item() + half)
    return found, level.p_value, inside  # type: ignore[attr-defined]


def simulate(setting: Setting, number: int, sims: int, known: Record) -> Record:
    """How often each interval is printed and holds the true value, and each p is at most 0.05.

    It goes on where a known record of fewer simulations ends; empty but for the seed, it begins.
    """
    begin = time.process_time()
    generator = torch.Generator().manual_seed(known["seed"])
    truth = true_values(setting, generator)
    printed = Counter(known.get("printed", {}))
    covered = Counter(known.get("covered", {}))
    small = Counter(known.get("small_p", {}))
    outside = known.get("value_outside", 0)
    for i in range(sims):
        rows = Rows.of(setting, number, generator)
        first, second = rows.swapped(generator)
        if i < known.get("sims", 0):
            continue
        found, p_value, inside = intervals(rows)
        outside += not inside
        small["calibrated"] += p_value <= 0.05
        for name, (low, high) in found.items():
            if name in truth and low is not None and high is not None:
                printed[name] += 1
                covered[name] += low <= truth[name] <= high
        for name in PAIRED:
            small[name] += paired_bootstrap(first, second, rows.labels, name).p_value <= 0.05
    return {
        "setting": setting.name,
        "n": number,
        "sims": sims,
        "seed": known["seed"],
        "truth": truth,
        "printed": dict(printed),
        "covered": dict(covered),
        "small_p": dict(small),
        "value_outside": outside,
        "cpu_seconds": known.get("cpu_seconds", 0) + round(time.process_time() - begin),
    }


Key = tuple[str, int]


def in_order(records: Mapping[Key, Record]) -> list[Record]:
    """Records by number of rows, then as `SETTINGS` are."""
    places = [setting.name for setting in SETTINGS]
    return sorted(records.values(), key=lambda one: (one["n"], places.index(one["setting"])))


def parser() -> ArgumentParser:
    """The command's options."""
    made = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    made.add_argument("--rows", type=int, nargs="*", default=NUMBERS, help="n")
    made.add_argument("--sims", type=int, default=400, help="of each population and n")
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--json", type=Path, default=RESULTS, help="records")
    made.add_argument("--page", type=Path, default=PAGE, help="written anew from all records")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulates what is missing, and renders the page."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    records: dict[Key, Record] = {}
    for record in read_json_lines(options.json, missing_ok=True):
        records[record["setting"], record["n"]] = record
    for number, setting in product(options.rows, SETTINGS):
        key = (setting.name, number)
        known = records.get(key, {"seed": options.seed})
        if known.get("sims", 0) < options.sims:
            records[key] = simulate(setting, number, options.sims, known)
            write_json_lines(options.json, in_order(records))
            seconds = records[key]["cpu_seconds"]
            print(f"{setting.name}, n {number}: {seconds} s", flush=True)
    options.page.write_text(page(in_order(records)), encoding="utf-8")


if __name__ == "__main__":
    main()
