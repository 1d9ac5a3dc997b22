"""One table, whatever it is of, and four ways to write it: text, markdown, HTML, LaTeX."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import chain
from string import Template
from typing import Literal

from bayestune.errors import Refusal

Mark = Literal["", "best", "second", "better"]
Style = Literal["text", "markdown", "html", "latex"]
Lines = list[list[str]]  # of a block, ready to be joined
DASH = "–"


@dataclass(frozen=True)
class Cell:
    """A number as printed, what is printed after it (an interval, a deviation), and its mark."""

    number: str = DASH
    behind: tuple[str, ...] = ()
    mark: Mark = ""


@dataclass(frozen=True)
class Block:
    """Named lines of cells under a title."""

    title: str
    lines: tuple[tuple[str, tuple[Cell, ...]], ...]

    @classmethod
    def of(cls, title: str, names: Sequence[str], columns: Sequence[Sequence[Cell]]) -> "Block":
        """A block from its columns, each with a cell for every name."""
        return cls(title, tuple(zip(names, zip(*columns, strict=True), strict=True)))


@dataclass(frozen=True)
class Table:
    """All that a table says, before it has a style.

    A line begins with its name, or, if there are two `heads`, with its block's title and its name;
    `heads` are the headings of these leading columns.
    """

    caption: str
    columns: tuple[str, ...]
    blocks: tuple[Block, ...]
    notes: tuple[str, ...] = ()
    heads: tuple[str, ...] = ("Method",)

    def lines(self, write: Callable[[Cell], str], lead: Callable[[str], str] = str) -> list[Lines]:
        """The headings and each block as lines of strings.

        Only a block's first line shows its title.

        Args:
            write: makes a cell a string.
            lead: makes a heading, a title or a line's name a string.
        """
        blocks = [[[*map(lead, self.heads), *map(lead, self.columns)]]]
        for block in self.blocks:
            lines = []
            for i, (name, cells) in enumerate(block.lines):
                titles = ["" if i else block.title, name][-len(self.heads) :]
                lines.append([*map(lead, titles), *map(write, cells)])
            blocks.append(lines)
        return blocks


def marked(cells: Iterable[Cell], sign: int, marks: Sequence[Mark] = ("best",)) -> list[Cell]:
    """Marks the best cells of a column, and the runners-up if `marks` has one for them.

    Cells that print the same number get the same mark; a column of one number only has no marks.
    The `sign` is 1 if higher is better, −1 if lower is, and 0 for no marks.
    """
    cells = list(cells)
    numbers = {cell.number: float(cell.number) for cell in cells if cell.number != DASH}
    ranked = sorted(set(numbers.values()), reverse=sign > 0)
    mark_of = dict(zip(ranked, marks, strict=False)) if sign and len(ranked) > 1 else {}
    mark_of_text = {text: mark_of.get(number, "") for text, number in numbers.items()}
    return [replace(cell, mark=mark_of_text.get(cell.number, "")) for cell in cells]


def _text(table: Table) -> str:
    signs = {"": "", "best": "*", "second": "+", "better": "*"}
    legend = {"best": "* best", "second": "+ runner-up", "better": "* better"}

    def write(cell: Cell) -> str:
        return " ".join([cell.number + signs[cell.mark], *cell.behind])

    blocks = table.lines(write)
    widths = [max(map(len, column)) for column in zip(*chain(*blocks), strict=True)]
    lines = [table.caption, ""]
    for block in blocks:
        for line in block:
            lines.append("  ".join(map(str.ljust, line, widths)).rstrip())
        lines.append("  ".join("-" * width for width in widths))
    written = chain.from_iterable(block.lines for block in table.blocks)
    used = {cell.mark for _, cells in written for cell in cells}
    meanings = [meaning for mark, meaning in legend.items() if mark in used]
    return "\n".join([*lines, *table.notes, *([", ".join(meanings)] if meanings else [])])


def _markdown(table: Table) -> str:
    forms = {"": "{}", "best": "**{}**", "second": "<u>{}</u>", "better": "**{}**"}

    def write(cell: Cell) -> str:
        return " ".join([forms[cell.mark].format(cell.number), *cell.behind])

    def row(cells: Sequence[str]) -> str:
        escaped = [" ".join(cell.split()).replace("|", r"\|") for cell in cells]
        return f"| {' | '.join(escaped)} |"

    ruler = ["---"] * len(table.heads) + ["---:"] * len(table.columns)
    heading, *lines = chain(*table.lines(write))
    rows = map(row, [heading, ruler, *lines])
    notes = ["", *table.notes] if table.notes else []
    return "\n".join([table.caption, "", *rows, *notes])


def _html(table: Table) -> str:
    def write(cell: Cell) -> str:
        if not cell.behind and not cell.mark:
            return f"<td>{escape(cell.number)}</td>"
        mark = f" class={cell.mark}" if cell.mark else ""
        behind = "".join(f"<span>{escape(part)}</span>" for part in cell.behind)
        return f"<td{mark}><b>{escape(cell.number)}</b> {behind}</td>"

    def lead(name: str) -> str:
        return f'<th scope="row">{escape(name)}</th>'

    _, *lines = [f"<tr>{''.join(line)}</tr>\n" for line in chain(*table.lines(write, lead))]
    headings = map(escape, [*table.heads, *table.columns])
    head = "".join(f'<th scope="col">{heading}</th>' for heading in headings)
    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    return (
        f'<div class="scroll"><table>{caption}<thead><tr>{head}</tr></thead>\n'
        f"<tbody>{''.join(lines)}</tbody></table></div>{notes}"
    )


_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "→": r"$\to$",
    "±": r"$\pm$",
    "·": r"$\cdot$",
    "–": "--",
}
_LATEX_TABLE = Template(r"""% needs \usepackage{booktabs}
\begin{table}
\centering
\caption{$caption}
\begin{tabular}{$columns}
\toprule
$rows
\bottomrule
\end{tabular}
\end{table}""")


def _latex(table: Table) -> str:
    bold = r"\textbf{{{}}}"
    forms = {"": "{}", "best": bold, "second": r"\underline{{{}}}", "better": bold}

    def escaped(text: str) -> str:
        return text.translate(str.maketrans(_LATEX))

    def write(cell: Cell) -> str:
        text = forms[cell.mark].format(escaped(cell.number))
        for part in cell.behind:
            deviation = part.removeprefix("± ")
            text += f" {escaped(part)}" if part == deviation else rf"$_{{\pm{deviation}}}$"
        return text

    def block(lines: Lines) -> str:
        return "\n".join(f"{' & '.join(line)} \\\\" for line in lines)

    return _LATEX_TABLE.substitute(
        caption=escaped(" ".join([f"{table.caption}.", *table.notes])),
        columns="l" * len(table.heads) + "r" * len(table.columns),
        rows="\n\\midrule\n".join(map(block, table.lines(write, escaped))),
    )


_WRITERS = {"text": _text, "markdown": _markdown, "html": _html, "latex": _latex}


def render(tables: Sequence[Table], style: Style = "text") -> str:
    """Tables one below the other.

    "text" marks the best number with * and the runner-up with +; "markdown" and "latex" (booktabs)
    make them bold and underlined; "html" gives them a class. What is "better" by a test looks like
    the best, but in "html" it has a class of its own.

    Args:
        tables: the tables.
        style: "text", "markdown", "html" or "latex".

    Raises:
        Refusal: if the style is unknown.
    """
    if style not in _WRITERS:
        styles = tuple(_WRITERS)
        raise Refusal(f"got style {style!r}; expected one of {styles}; 'text' is for terminals")
    return "\n\n".join(_WRITERS[style](table) for table in tables)
