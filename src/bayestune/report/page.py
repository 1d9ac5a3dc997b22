"""Records → one HTML page that loads nothing: words, tables, figures, and single questions."""

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from bayestune.metrics import LEVEL, Row, is_right, reliability
from bayestune.report.claims import RESAMPLES, Evaluation, compare, listing, paired_table, sentence
from bayestune.report.columns import ECE
from bayestune.report.comparable import names
from bayestune.report.figures import reliability_figure, summary_figure
from bayestune.report.rows import Record, read_rows, renewed, tensors
from bayestune.report.summary import evaluation_tables
from bayestune.report.svg import inline_svg
from bayestune.report.table import DASH, Block, Cell, Table, render

_SHOWN = 10
_ALONE = "<p>There is one method only, so nothing to compare it with.</p>"
_SIZES = ("draws", "seed", "train_rows", "n", "bins", "binning", "scoring", "peak_memory_mb")
_FACTS = ("model", "method", *_SIZES)


def write_page(records: Sequence[Record], folder: str | Path, title: str) -> Path:
    """Writes `report.html`, complete in itself: words, tables, figures, single questions.

    The words say that a method is better or worse only where the paired interval leaves out 0 and
    p < 0.05.

    Args:
        records: one for each evaluated method; the others are compared with the first.
        folder: where the records' rows are, and where the page goes.
        title: of the page.

    Returns:
        The path.

    Raises:
        Refusal: if there are no records.
    """
    records = renewed(records, folder)
    tables = render(evaluation_tables(records), "html")
    evaluations = []
    for name, record in zip(names(records), records, strict=True):
        evaluations.append(Evaluation(name, record, read_rows(record, folder)))
    first, *others = evaluations
    compared = [(other, compare(first, other)) for other in others]
    words = [first.opening(), *(sentence(first, *pair) for pair in compared)]
    picture = inline_svg(summary_figure(records), "Metrics of each method with intervals")
    ends = [first, evaluations[-1]] if others else [first]
    template = files("bayestune.report").joinpath("page.html").read_text(encoding="utf-8")
    page = Template(template).substitute(
        title=escape(title),
        words="".join(f'<p class="lead">{escape(text)}</p>\n' for text in words),
        metrics=f"<figure>{picture}</figure>{tables}",
        comparisons=_paired(first, paired_table(compared)) if others else _ALONE,
        calibration=_diagrams(evaluations),
        uncertain=_uncertain(evaluations[-1]),
        wrong="".join(map(_wrong, ends)),
        footer=_footer(evaluations),
    )
    path = Path(folder) / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _paired(first: Evaluation, table: Table) -> str:
    note = (
        f"Each method minus {first.name}, on the rows that both answered: difference, "
        f"{LEVEL:.0%} interval and two-sided p-value of a paired bootstrap ({RESAMPLES} "
        f"resamples). Green: better, the interval leaves out 0 and p < {1 - LEVEL:.2f}. "
        "No correction for looking at several methods and metrics. ECE is not here, because no "
        "interval of its differences covers: compare each with its ECE if calibrated."
    )
    return f'<p class="note">{escape(note)}</p>{render([table], "html")}'


def _missing(evaluations: Sequence[Evaluation]) -> str:
    lacking = [escape(one.name) for one in evaluations if not one.rows]
    return f"<p>The predictions file of {listing(lacking)} is missing.</p>" if lacking else ""


def _diagrams(evaluations: Sequence[Evaluation]) -> str:
    panels = []
    for one in evaluations:
        if one.rows:
            diagram = reliability(*tensors(one.rows), one.record.get("bins", 15))
            panels.append((one.name, f"ECE {one.told(ECE)}", diagram))
    if not panels:
        return _missing(evaluations)
    shown = listing([name for name, _, _ in panels])
    label = f"Reliability diagrams and confidence histograms of {shown}"
    picture = inline_svg(reliability_figure(panels), label)
    return (
        f'<figure>{picture}</figure><p class="note">Above: accuracy in each bin of confidence. '
        "Below: share of rows per bin, with mean accuracy (solid line) and mean confidence "
        f"(dashed line).</p>{_missing(evaluations)}"
    )


def _question(row: Row, extra: str = "") -> str:
    probabilities = row["probabilities"]
    options = row.get("options") or [f"option {i + 1}" for i in range(len(probabilities))]
    items = ""
    chosen = probabilities.index(max(probabilities))
    for i, (option, p) in enumerate(zip(options, probabilities, strict=True)):
        answer = i == row["answer"]
        marks = ["answer"] * answer + ["chosen"] * (i == chosen)
        items += f'<li class="{" ".join(marks)}"><span>{p:.1%}</span>'
        items += f"<span>{escape(str(option))}{' ✓' if answer else ''}</span></li>"
    text = escape(str(row.get("question") or row["id"]))
    return f'<div class="question">{text}<ul>{items}</ul>{extra}</div>\n'


def _entropy(row: Row, most: float) -> str:
    """The total entropy and its parts, and a bar of the parts as shares of the most."""
    total = row["total_entropy"]
    expected = row["expected_entropy"]
    shares = [100 * part / most if most else 0 for part in (expected, max(0, total - expected))]
    bar = "".join(f'<i style="width:{share:.1f}%"></i>' for share in shares)
    text = f"total {total:.3f} nats, in each draw {expected:.3f}"
    text += f"; mutual information {row['mutual_information']:.3f}"
    return f'<div class="bar">{bar}</div><span class="note">{text}</span>'


def _uncertain(last: Evaluation) -> str:
    rows = sorted(last.rows, key=lambda row: -row["total_entropy"])[:_SHOWN]
    if not rows:
        return _missing([last])
    note = (
        f"By total entropy under {last.name}. The bar's first part: expected entropy, what every "
        "draw is unsure of; its second part: what these draws disagree on. Mutual information is "
        "that times S/(S − 1), its estimate for infinitely many draws from S; without the factor "
        "where the draws are all there is, and in older records."
    )
    most = rows[0]["total_entropy"]
    questions = "".join(_question(row, _entropy(row, most)) for row in rows)
    return f'<p class="note">{escape(note)}</p><div class="pair">{questions}</div>'


def _wrong(one: Evaluation) -> str:
    right = is_right(one.rows) if one.rows else ()
    wrong = [row for row, correct in zip(one.rows, right, strict=True) if not correct]
    rows = sorted(wrong, key=lambda row: -row["confidence"])[:_SHOWN]
    text = "".join(map(_question, rows)) or _missing([one]) or "<p>No answer is wrong.</p>"
    return f"<div><h3>{escape(one.name)}</h3>{text}</div>"


def _footer(evaluations: Sequence[Evaluation]) -> str:
    lines = []
    details = ""
    for one in evaluations:
        cells = []
        for key in _FACTS:
            value = one.record.get(key)
            cells.append(Cell(DASH if value is None else str(value)))
        seconds = one.record.get("seconds") or {}  # `evaluate` does not know those of the fit
        taken = [f"{key} {value:.1f}" for key, value in seconds.items() if value is not None]
        lines.append((one.name, (*cells, Cell(", ".join(taken)))))
        settings = {key: one.record.get(key) for key in ("config", "versions")}
        details += f"<details><summary>{escape(one.name)}: configuration and versions</summary>"
        details += f"<pre>{escape(json.dumps(settings, indent=2, ensure_ascii=False))}</pre>"
        details += "</details>\n"
    headings = (*(key.replace("_", " ") for key in _FACTS), "seconds")
    table = Table("", headings, (Block("", tuple(lines)),), heads=("name",))
    return render([table], "html") + details
