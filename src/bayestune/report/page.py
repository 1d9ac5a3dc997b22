"""Records → one HTML page that loads nothing: what the numbers say, in words, tables, figures and single questions."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayestune import metrics
from bayestune.report.rows import read_rows
from bayestune.report.table import COLUMNS, Column, Record, names, render_table

_LEVEL, _RESAMPLES, _SHOWN = 0.95, 1000, 10
_COMPARED = tuple(column for column in COLUMNS if column.key in ("accuracy", "ece", "nll", "brier"))
_WORDS = {
    "accuracy": "accuracy",
    "ece": "calibration error (ECE)",
    "nll": "NLL",
    "brier": "Brier score",
}
_CSS = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1f2328; --soft: #59636e; --faint: #8c959f;
  --rule: #d8dee4; --shade: #f6f8fa; --blue: #0072b2; --vermillion: #d55e00; --green: #007a56; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --ink: #e6e8eb; --soft: #a3abb4; --faint: #7b858f;
  --rule: #343a41; --shade: #1d2126; --blue: #56b4e9; --vermillion: #ee8434; --green: #2fc49a; } }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 66rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1rem 0 .5rem; }
p { max-width: 46rem; margin: .5rem 0; } .lead { font-size: 1.06rem; } .note, caption, footer { color: var(--soft); }
.note, footer, td, th, caption { font-size: .875rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; margin: .75rem 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .4rem; }
th, td { text-align: left; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
thead th { color: var(--soft); font-weight: 600; white-space: nowrap; } td b { font-weight: 400; }
td span { color: var(--soft); white-space: nowrap; display: block; font-size: .8rem; }
.best b { font-weight: 700; color: var(--green); } tbody th { font-weight: 600; }
figure { margin: 1rem 0; overflow-x: auto; } figure text { font-family: inherit !important; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 0 2.5rem; }
.question { padding: .7rem 0; border-bottom: 1px solid var(--rule); font-size: .9rem; overflow-wrap: anywhere; }
.question ul { list-style: none; margin: .3rem 0 0; padding: 0; }
.question li { display: grid; grid-template-columns: 4rem 1fr; color: var(--soft); }
.question .answer { color: var(--green); font-weight: 600; } .question .chosen { color: var(--vermillion); }
.question .answer.chosen { color: var(--green); }
.bar { display: flex; height: .45rem; margin: .4rem 0 .15rem; background: var(--shade); }
.bar i:first-child { background: var(--faint); } .bar i { background: var(--vermillion); }
pre { background: var(--shade); padding: .75rem; overflow-x: auto; font-size: .8rem; }
"""


@dataclass(frozen=True)
class _Evaluation:
    """A record, the name it goes by on the page, and its rows; none if their file is missing."""

    name: str
    record: Record
    rows: Sequence[Mapping[str, Any]]

    def number(self, column: Column, end: str = "value") -> str:
        return column.number((self.record.get("metrics", {}).get(column.key) or {}).get(end))


def _read(name: str, record: Record, folder: Path) -> _Evaluation:
    return _Evaluation(name, record, read_rows(record, folder))


def _tensors(rows: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
    width = max(len(row["probabilities"]) for row in rows)
    padded = [[*row["probabilities"], *[0.0] * (width - len(row["probabilities"]))] for row in rows]
    return torch.tensor(padded, dtype=torch.float64), torch.tensor([row["answer"] for row in rows])


def _compare(first: _Evaluation, other: _Evaluation) -> dict[str, metrics.PairedDifference] | str:
    """Other minus first on the rows that both have, by metric; or why they cannot be compared."""
    for one in (first, other):
        if not one.rows:
            return f"the predictions of {one.name} are missing"
    if first.record.get("task") != other.record.get("task"):
        return "they are of different tasks"
    mine, theirs = ({row["id"]: row for row in one.rows} for one in (first, other))
    shared = [key for key in mine if key in theirs and mine[key]["answer"] == theirs[key]["answer"]]
    if not shared:
        return "they have no row in common"
    (p, y), (q, _) = (
        _tensors([theirs[key] for key in shared]),
        _tensors([mine[key] for key in shared]),
    )
    kind = {
        "bins": first.record.get("bins", 15),
        "binning": first.record.get("binning", "torchmetrics"),
    }
    return {
        c.key: metrics.paired_bootstrap(p, q, y, c.key, _RESAMPLES, level=_LEVEL, **kind)
        for c in _COMPARED
    }


def _verdict(column: Column, paired: metrics.PairedDifference) -> int:
    """1 if better, −1 if worse, 0 unless the interval leaves out 0 and p is below 1 − level."""
    settled = (paired.low > 0 or paired.high < 0) and paired.p_value < 1 - _LEVEL
    return column.sign * (1 if paired.difference > 0 else -1) if settled else 0


def _listing(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _sentence(
    first: _Evaluation, other: _Evaluation, compared: Mapping[str, metrics.PairedDifference] | str
) -> str:
    """What the paired intervals support about other against first, and no more."""
    if isinstance(compared, str):
        return f"{other.name} cannot be compared with {first.name} here: {compared}."
    found: dict[int, list[str]] = {1: [], -1: [], 0: []}
    for column in _COMPARED:
        verdict = _verdict(column, compared[column.key])
        size = f"{column.number(abs(compared[column.key].difference))}{' points' if column.scale == 100 else ''}"
        found[verdict].append(_WORDS[column.key] + (f" (by {size})" if verdict else ""))
    heads = {1: "better in ", -1: "worse in ", 0: "not settled by these rows: "}
    parts = [heads[verdict] + _listing(words) for verdict, words in found.items() if words]
    return f"{other.name} against {first.name} on the same {compared['nll'].n} questions: {'; '.join(parts)}."


def _opening(first: _Evaluation) -> str:
    accuracy, ece, nll, _ = (_interval(first, column) for column in _COMPARED)
    text = f"On {first.record.get('n', '?')} questions of {first.record.get('task', '?')}, {first.name} has "
    text += f"{accuracy} right, with an NLL of {nll} and a calibration error (ECE) of {ece}."
    if first.rows:
        p, y = _tensors(first.rows)
        gap = 100 * (p.max(1).values.mean().item() - metrics.accuracy(p, y))
        side = "above" if gap > 0 else "below"
        text += f" Its confidence is on average {abs(gap):.1f} points {side} its accuracy on these questions."
    return text


def _interval(one: _Evaluation, column: Column) -> str:
    unit = "\N{NO-BREAK SPACE}%" if column.scale == 100 else ""
    return f"{one.number(column)}{unit} [{one.number(column, 'low')}, {one.number(column, 'high')}]"


def _summary(evaluations: Sequence[_Evaluation], comparisons: Sequence[Any]) -> str:
    first, *others = evaluations
    sentences = [
        _opening(first),
        *(_sentence(first, o, c) for o, c in zip(others, comparisons, strict=True)),
    ]
    return "".join(f'<p class="lead">{escape(sentence)}</p>\n' for sentence in sentences)


def _difference(column: Column, paired: metrics.PairedDifference) -> str:
    value, low, high = (_signed(column, x) for x in (paired.difference, paired.low, paired.high))
    best = " class=best" if _verdict(column, paired) > 0 else ""
    return f"<td{best}><b>{value}</b> <span>[{low}, {high}]</span><span>p = {paired.p_value:.3f}</span></td>"


def _signed(column: Column, value: float) -> str:
    text = column.number(abs(value))
    return text if float(text) == 0 else ("+" if value > 0 else "−") + text


def _paired(evaluations: Sequence[_Evaluation], comparisons: Sequence[Any]) -> str:
    first, *others = evaluations
    if not others:
        return "<p>There is one method only, so nothing to compare it with.</p>"
    head = "".join(f'<th scope="col">{column.heading}</th>' for column in _COMPARED)
    body = ""
    for other, compared in zip(others, comparisons, strict=True):
        if isinstance(compared, str):
            cells = f'<td colspan="{len(_COMPARED) + 1}">Not compared: {escape(compared)}.</td>'
        else:
            cells = f"<td>{compared['nll'].n}</td>" + "".join(
                _difference(c, compared[c.key]) for c in _COMPARED
            )
        body += f'<tr><th scope="row">{escape(other.name)}</th>{cells}</tr>\n'
    note = (
        f"Each method minus {first.name}, on the rows that both answered: difference, {_LEVEL:.0%} interval and "
        f"two-sided p-value of a paired bootstrap ({_RESAMPLES} resamples). Green: better, the interval leaves out 0 "
        f"and p < {1 - _LEVEL:.2f}. No correction for looking at several methods and metrics."
    )
    head = f'<thead><tr><th scope="col">Method</th><th scope="col">Rows</th>{head}</tr></thead>'
    table = f'<div class="scroll"><table>{head}\n<tbody>{body}</tbody></table></div>'
    return f'<p class="note">{escape(note)}</p>{table}'


def _missing(evaluations: Sequence[_Evaluation]) -> str:
    lacking = [one.name for one in evaluations if not one.rows]
    return (
        f"<p>The predictions file of {escape(_listing(lacking))} is missing.</p>" if lacking else ""
    )


def _diagrams(evaluations: Sequence[_Evaluation]) -> str:
    from bayestune.report import plots

    present = [one for one in evaluations if one.rows]
    if not present:
        return _missing(evaluations)
    diagrams = [
        metrics.reliability(*_tensors(one.rows), bins=one.record.get("bins", 15)) for one in present
    ]
    captions = [f"ECE {_interval(one, COLUMNS[1])}" for one in present]
    figure = plots.reliability_figure([one.name for one in present], diagrams, captions)
    label = f"Reliability diagrams and confidence histograms of {_listing([one.name for one in present])}"
    note = "Above: accuracy in each bin of confidence. Below: share of rows per bin, with mean accuracy (solid line) "
    note += "and mean confidence (dashed line)."
    return f'<figure>{plots.inline_svg(figure, label)}</figure><p class="note">{note}</p>{_missing(evaluations)}'


def _question(row: Mapping[str, Any], extra: str) -> str:
    p = row["probabilities"]
    items = ""
    for i, option in enumerate(row.get("options") or [f"option {i + 1}" for i in range(len(p))]):
        marks = " ".join(["answer"] * (i == row["answer"]) + ["chosen"] * (p[i] == max(p)))
        sign = " ✓" if i == row["answer"] else ""
        items += f'<li class="{marks}"><span>{p[i]:.1%}</span><span>{escape(str(option))}{sign}</span></li>'
    return f'<div class="question">{escape(str(row.get("question") or row["id"]))}<ul>{items}</ul>{extra}</div>\n'


def _entropy(row: Mapping[str, Any], most: float) -> str:
    total, expected, mutual = (
        row[k] for k in ("total_entropy", "expected_entropy", "mutual_information")
    )
    parts = "".join(
        f'<i style="width:{100 * part / most if most else 0:.1f}%"></i>'
        for part in (expected, mutual)
    )
    text = f"total {total:.3f} = expected {expected:.3f} + mutual information {mutual:.3f} nats"
    return f'<div class="bar">{parts}</div><span class="note">{text}</span>'


def _uncertain(last: _Evaluation) -> str:
    rows = sorted(last.rows, key=lambda row: -row["total_entropy"])[:_SHOWN]
    if not rows:
        return _missing([last])
    note = f"By total entropy under {last.name}. Grey: expected entropy, what every draw is unsure of. Orange: mutual "
    note += "information, what the draws disagree on."
    questions = "".join(_question(row, _entropy(row, rows[0]["total_entropy"])) for row in rows)
    return f'<p class="note">{escape(note)}</p><div class="pair">{questions}</div>'


def _wrong(one: _Evaluation) -> str:
    wrong = [
        row for row in one.rows if row["probabilities"][row["answer"]] < max(row["probabilities"])
    ]
    rows = sorted(wrong, key=lambda row: -row["confidence"])[:_SHOWN]
    text = (
        "".join(_question(row, "") for row in rows)
        or _missing([one])
        or "<p>No answer is wrong.</p>"
    )
    return f"<div><h3>{escape(one.name)}</h3>{text}</div>"


def _footer(evaluations: Sequence[_Evaluation]) -> str:
    keys = (
        "model",
        "method",
        "draws",
        "seed",
        "train_rows",
        "n",
        "bins",
        "binning",
        "scoring",
        "peak_memory_mb",
    )
    head = "".join(
        f'<th scope="col">{key.replace("_", " ")}</th>' for key in ("name", *keys, "seconds")
    )
    body, details = "", ""
    for one in evaluations:
        seconds = ", ".join(
            f"{key} {value:.1f}" for key, value in (one.record.get("seconds") or {}).items()
        )
        cells = [one.name, *(_plain(one.record.get(key)) for key in keys), seconds]
        body += f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>\n"
        settings = json.dumps(
            {k: one.record.get(k) for k in ("config", "versions")}, indent=2, ensure_ascii=False
        )
        details += f"<details><summary>{escape(one.name)}: configuration and versions</summary>"
        details += f"<pre>{escape(settings)}</pre></details>\n"
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>{details}'


def _plain(value: object) -> str:
    return "–" if value is None else f"{value:.0f}" if isinstance(value, float) else str(value)


def write_page(records: Sequence[Record], folder: str | Path, title: str) -> Path:
    """One self-contained `report.html`: a summary in words, the table, paired comparisons, figures, single questions.

    The words say that a method is better or worse only where the paired interval leaves out 0 and p < 0.05.

    Args:
        records: one per evaluated method; the others are compared with the first.
        folder: where the records' predictions are and the page goes.
        title: of the page.

    Returns:
        The path of the page.

    Raises:
        ValueError: if there are no records.
    """
    from bayestune.report import plots

    folder = Path(folder)
    table = render_table(records, "html")
    evaluations = [
        _read(name, record, folder) for name, record in zip(names(records), records, strict=True)
    ]
    comparisons = [_compare(evaluations[0], other) for other in evaluations[1:]]
    ends = [evaluations[0], evaluations[-1]] if len(evaluations) > 1 else evaluations
    picture = plots.inline_svg(
        plots.summary_figure(records), "Metrics of each method with bootstrap intervals"
    )
    sections = {
        "": _summary(evaluations, comparisons),
        "Metrics": f"<figure>{picture}</figure>{table}",
        "Paired comparisons": _paired(evaluations, comparisons),
        "Calibration": _diagrams(evaluations),
        "Most uncertain questions": _uncertain(evaluations[-1]),
        "Most confidently wrong": f'<div class="pair">{"".join(_wrong(one) for one in ends)}</div>',
    }
    body = "".join(
        (f"<h2>{head}</h2>\n" if head else "") + text + "\n" for head, text in sections.items()
    )
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_CSS}</style></head>\n'
        f"<body><h1>{escape(title)}</h1>\n<main>{body}</main>\n"
        f"<footer><h2>How this was made</h2>{_footer(evaluations)}</footer></body></html>\n"
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path
