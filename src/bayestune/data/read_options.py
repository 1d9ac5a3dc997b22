"""How a file of rows is read: its rows' options, what its answers are, which column is what."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bayestune.data.answer_readings import AnswerIs
from bayestune.data.column_roles import checked_columns, plain_name
from bayestune.errors import Refusal, nearest
from bayestune.whole_files import JsonRow


@dataclass(frozen=True)
class ReadOptions:
    """How a file of rows is read.

    Args:
        options: of every row that has none of its own.
        otherwise: the same, used if `options` are not given; no warning if no row needs them.
        answer_is: "index" (from 0), "letter" or "text"; None to find what all rows agree with.
        columns: the file's names of columns by role; these columns must be there.
        usual_columns: the same, for roles that `columns` leave out; where the file has no such
            column, the known names of the role are looked for.
        from_answers: whether the different answers become the options if no row has any.
        usual_answer_is: what answers are in other files of the fit, which is tried first.

    Raises:
        Refusal: if columns are given to unknown roles, or one column to two.
    """

    options: tuple[str, ...] = ()
    otherwise: tuple[str, ...] = ()
    answer_is: AnswerIs | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    usual_columns: Mapping[str, str] = field(default_factory=dict)
    from_answers: bool = False
    usual_answer_is: AnswerIs | None = None

    def __post_init__(self) -> None:
        checked_columns(self.columns)

    def names(self, file: str, rows: Sequence[JsonRow], *, labelled: bool) -> dict[str, str]:
        """The columns of a file by role, as far as `columns` and `usual_columns` say.

        Args:
            file: its name, for messages.
            rows: of the file.
            labelled: whether answers are needed; if not, their column may be missing.

        Raises:
            Refusal: if the file lacks one of `columns`.
        """
        present = {plain_name(str(column)): str(column) for row in rows for column in row}
        for role, column in self.columns.items():
            is_needed = labelled or role != "answer"
            if is_needed and rows and plain_name(column) not in present:
                alike = nearest(plain_name(column), present)
                hint = f"did you mean {present[alike]!r}?" if alike else "correct the name"
                got = f"got the columns {sorted(present.values())}"
                raise Refusal(f"{file}: {got}, expected {column!r} for the {role}; {hint}")
        column_of = dict(self.columns)
        used = set(map(plain_name, column_of.values()))
        for role, column in self.usual_columns.items():
            name = plain_name(column)
            if role not in column_of and name in present and name not in used:
                column_of[role] = column
        return column_of
