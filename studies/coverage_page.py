"""The page of `studies.coverage`: a note, and how often each interval covers, from the records."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bayestune.metrics.intervals import LEVEL
from bayestune.metrics.proportions import share_interval

NOTE = Path(__file__).with_name("coverage_page.md")
NAMES = {
    "accuracy": "accuracy",
    "nll": "NLL",
    "brier": "Brier score",
    "ece": "ECE",
    "aurc": "AURC",
    "difference accuracy": "paired difference, accuracy",
    "difference nll": "paired difference, NLL",
    "difference brier": "paired difference, Brier score",
    "share kept": "share of a gain in NLL",
    "difference of a row's number": "mean ± 1.96 standard errors",
    "percentiles nll": "*not printed:* NLL, by percentiles",
    "percentiles ece": "*not printed:* ECE, by percentiles",
}
SIZES = {
    "calibrated": "ECE at least that of a calibrated model",
    "accuracy": "paired difference, accuracy",
    "nll": "paired difference, NLL",
    "brier": "paired difference, Brier score",
}
SHARES = (0.5, 0.9, 0.97, 0.99, 0.995, 0.999)
LEAST, MOST = 0.90, 0.99  # what is good enough for 95 %
Record = Mapping[str, Any]


def exact_coverage(share: float, num_rows: int) -> float:
    """The chance that the interval of a share holds it, by summing over all outcomes."""
    covered = 0.0
    for right in range(num_rows + 1):
        low, high = share_interval(right, num_rows, LEVEL)
        if low <= share <= high:
            covered += math.comb(num_rows, right) * share**right * (1 - share) ** (num_rows - right)
    return covered


def _mark(value: float) -> str:
    text = f"{value:.2f}"
    return text if LEAST <= float(text) <= MOST else f"**{text}**"


def covering(covered: int, printed: int) -> str:
    """A share with its standard error, from at least one simulation that is not covered."""
    share = covered / printed
    off = min(max(share, 1 / printed), 1 - 1 / printed)
    return f"{_mark(share)} ± {math.sqrt(off * (1 - off) / printed):.3f}"


def _outside(records: Sequence[Record]) -> str:
    """What does not cover as it should, in words."""
    found = []
    for record in records:
        for key, name in NAMES.items():
            printed = record["printed"].get(key, 0)
            if name.startswith("*") or printed < record["sims"] / 2:
                continue
            share = record["covered"].get(key, 0) / printed
            if not LEAST <= float(f"{share:.2f}") <= MOST:
                found.append(f"* {name}, n = {record['n']}, {record['setting']}: {share:.2f}")
    return "\n".join(found) or "* none"


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def coverage_table(records: Sequence[Record], number: int) -> str:
    """A line for each interval and a column for each population, of one number of rows."""
    own = [record for record in records if record["n"] == number]
    if not own:
        return ""
    lines = [
        f"**n = {number}** ({_span([one['sims'] for one in own])} simulations each)",
        "",
        _row(["95 % interval of", *(record["setting"] for record in own)]),
        _row(["---", *(["---:"] * len(own))]),
    ]
    for key, name in NAMES.items():
        cells = []
        for record in own:
            printed = record["printed"].get(key, 0)
            few = printed < record["sims"] / 2
            cells.append("–" if few else covering(record["covered"].get(key, 0), printed))
        lines.append(_row([name, *cells]))
    return "\n".join(lines)


def size_table(records: Sequence[Record]) -> str:
    """How often each p is at most 0.05 where nothing is to be found."""
    numbers = sorted({record["n"] for record in records})
    lines = [
        _row(["p-value of", *(f"n = {number}" for number in numbers)]),
        _row(["---", *(["---:"] * len(numbers))]),
    ]
    for key, name in SIZES.items():
        cells = []
        for number in numbers:
            shares = []
            for record in records:
                null = key != "calibrated" or record["setting"].startswith("calibrated")
                if record["n"] == number and null:
                    shares.append(record["small_p"].get(key, 0) / record["sims"])
            cells.append(f"{min(shares):.3f} to {max(shares):.3f}")
        lines.append(_row([name, *cells]))
    return "\n".join(lines)


def share_table(numbers: Sequence[int]) -> str:
    """The exact coverage of accuracy's interval."""
    lines = [
        _row(["true accuracy", *(f"{share:.1%}" for share in SHARES)]),
        _row(["---", *(["---:"] * len(SHARES))]),
    ]
    for number in numbers:
        covers = [_mark(exact_coverage(share, number)) for share in SHARES]
        lines.append(_row([f"n = {number}", *covers]))
    return "\n".join(lines)


def page(records: Sequence[Record]) -> str:
    """The note with the tables in their places."""
    numbers = sorted({record["n"] for record in records})
    tables = [coverage_table(records, number) for number in numbers]
    outside = sum(record["value_outside"] for record in records)
    return (
        NOTE.read_text(encoding="utf-8")
        .replace("{coverage}", "\n\n".join(tables))
        .replace("{beyond}", _outside(records))
        .replace("{sizes}", size_table(records))
        .replace("{shares}", share_table(numbers))
        .replace("{outside}", str(outside))
        .replace("{sims}", f"{sum(record['sims'] for record in records):,}")
    )
