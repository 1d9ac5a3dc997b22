"""From records to a table, figures and one self-contained page; `bayestune.report.plots` is what needs matplotlib."""

from bayestune.report.page import write_page
from bayestune.report.table import render_table

__all__ = ["render_table", "write_page"]
