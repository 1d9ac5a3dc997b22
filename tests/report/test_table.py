"""A table in four styles: what is marked, escaped and aligned."""

import re

import pytest
from recorded import Page

from bayestune.report.table import Block, Cell, Table, marked, render

COLUMNS = [
    [Cell("55.0", ("± 7.1",), "best"), Cell("40.0", ("(1)",), "second"), Cell("3.0")],
    [Cell("0.644", ("[0.5, 0.7]", "p = 0.01")), Cell(), Cell("+0.1, p 0.2")],
]
NAMES = ["MLE", "a|b", "50% & {more}_$#~^\\<x>"]
TABLE = Table(
    "tiny_model · ECE",
    ("arc_easy (n=10)", "obqa → arc ↓"),
    (Block.of("ACC % ↑", NAMES, COLUMNS), Block.of("NLL ↓", NAMES, COLUMNS)),
    ("A note – 100 %.", "Another."),
    ("Metric", "Method"),
)


def test_what_is_printed_the_same_is_as_good():
    cells = [Cell("0.5"), Cell("0.50"), Cell("0.7"), Cell(), Cell("0.6")]
    best = [cell.mark for cell in marked(cells, 1, ("best", "second"))]
    least = [cell.mark for cell in marked(cells, -1, ("best", "second"))]
    assert best == ["", "", "best", "", "second"]
    assert least == ["best", "best", "", "", "second"]
    assert [cell.mark for cell in marked(cells, -1)] == ["best", "best", "", "", ""]


def test_one_number_is_not_the_best_of_anything():
    for cells in ([Cell("0.5"), Cell()], [Cell("0.5"), Cell("0.5")], [Cell("0.5")], [Cell()]):
        assert marked(cells, 1) == cells


def test_text():
    lines = render([TABLE]).split("\n")
    assert lines[:2] == ["tiny_model · ECE", ""]
    cells = [re.split(r"\s{2,}", line.strip()) for line in lines]
    assert cells[2] == ["Metric", "Method", "arc_easy (n=10)", "obqa → arc ↓"]
    assert cells[4] == ["ACC % ↑", "MLE", "55.0* ± 7.1", "0.644 [0.5, 0.7] p = 0.01"]
    assert cells[5] == ["a|b", "40.0+ (1)", "–"]
    assert cells[8][:2] == ["NLL ↓", "MLE"]
    assert set(lines[3]) == {"-", " "}
    assert lines[3] == lines[7] == lines[11]
    assert lines[12:] == ["A note – 100 %.", "Another.", "* best, + runner-up"]


def test_text_explains_the_marks_in_use_only():
    plain = Table("", ("n",), (Block.of("", ["a"], [[Cell("1")]]),))
    assert render([plain]).endswith("a       1\n------  -")
    best = Table("", ("n",), (Block.of("", ["a"], [[Cell("1", (), "best")]]),))
    assert render([best]).endswith("\n* best")


def test_markdown_has_as_many_cells_in_every_line():
    text = render([TABLE, TABLE], "markdown")
    one, two = text.split("\n\ntiny_model")
    assert one == "tiny_model" + two
    lines = [line for line in one.split("\n") if line.startswith("|")]
    assert {len(re.split(r"(?<!\\)\|", line)) for line in lines} == {6}
    assert lines[1] == "| --- | --- | ---: | ---: |"
    assert lines[2] == "| ACC % ↑ | MLE | **55.0** ± 7.1 | 0.644 [0.5, 0.7] p = 0.01 |"
    assert lines[3] == r"|  | a\|b | <u>40.0</u> (1) | – |"
    assert one.endswith("|\n\nA note – 100 %.\nAnother.")


def test_html_is_well_formed_and_escaped():
    text = render([TABLE], "html")
    page = Page(text)
    assert "50% & {more}_$#~^\\<x>" in page.text
    assert page.tags.count("tr") == 7
    assert page.tags.count("caption") == 1
    assert "<td class=best><b>55.0</b> <span>± 7.1</span></td>" in text
    assert "<td class=second><b>40.0</b> <span>(1)</span></td><td>–</td>" in text
    assert text.endswith('<p class="note">A note – 100 %.</p><p class="note">Another.</p>')


def test_latex_is_balanced_and_escaped():
    text = render([TABLE], "latex")
    for opening in ("table", "tabular"):
        assert text.count(rf"\begin{{{opening}}}") == text.count(rf"\end{{{opening}}}") == 1
    bare = re.sub(r"\\[{}]", "", text)
    assert bare.count("{") == bare.count("}")
    assert re.sub(r"\\\$", "", text).count("$") % 2 == 0
    lines = [line for line in text.split("\n") if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {3}
    assert r"\begin{tabular}{llrr}" in text
    assert text.count(r"\midrule") == 2
    assert r"ACC \% $\uparrow$ & MLE & \textbf{55.0}$_{\pm7.1}$ & 0.644 [0.5, 0.7] p = 0.01" in text
    assert r"\underline{40.0} (1) & --" in text
    assert r"50\% \& \{more\}\_\$\#\textasciitilde{}\textasciicircum{}\textbackslash{}<x>" in text
    assert r"\caption{tiny\_model $\cdot$ ECE. A note -- 100 \%. Another.}" in text


def test_an_unknown_style_is_refused():
    known = r"\('text', 'markdown', 'html', 'latex'\)"
    with pytest.raises(ValueError, match=f"got style 'pdf'; expected one of {known}; 'text' is"):
        render([TABLE], "pdf")
