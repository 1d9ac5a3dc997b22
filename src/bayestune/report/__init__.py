"""From records to tables, figures and one self-contained page; nothing here runs a model.

Tables are made of records first and given a style by `render`; figures import matplotlib only when
one is drawn.
"""

from bayestune.report.comparison import grid_tables, significance
from bayestune.report.figures import risk_coverage_figure, summary_figure
from bayestune.report.gate_figures import gate_tables, promises, variant_table
from bayestune.report.page import Origin, write_page
from bayestune.report.picture_style import BLUE, FAINT, INK, STYLE, VERMILLION, save_figure
from bayestune.report.rows import read_rows, renewed
from bayestune.report.shift import has_shift, write_shift
from bayestune.report.summary import evaluation_tables, summary_tables
from bayestune.report.table import Style, Table, render

__all__ = [
    "BLUE",
    "FAINT",
    "INK",
    "STYLE",
    "VERMILLION",
    "Origin",
    "Style",
    "Table",
    "evaluation_tables",
    "gate_tables",
    "grid_tables",
    "has_shift",
    "promises",
    "read_rows",
    "render",
    "renewed",
    "risk_coverage_figure",
    "save_figure",
    "significance",
    "summary_figure",
    "summary_tables",
    "variant_table",
    "write_page",
    "write_shift",
]
