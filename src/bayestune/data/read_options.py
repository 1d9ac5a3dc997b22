"""How a file of rows is read: whose options, what its answers are, which column is what."""

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
        otherwise: the same, without `options`; nothing is said if no row needs them.
        answer_is: "index" (from 0), "letter" or "text"; None to find what all rows agree with.
        columns: the file's columns of some roles, which must be there.
        usual_columns: the same, of roles that `columns` leave out; those that a file does not have
            are looked for under the known names.
        from_answers: whether rows without any options have the different answers as theirs.
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
        """The columns of roles in a file.

        Raises:
            Refusal: if it has none of that name; answers may be missing if they are not needed.
        """
        known = {plain_name(str(column)): str(column) for row in rows for column in row}
        for role, column in self.columns.items():
            is_needed = labelled or role != "answer"
            if is_needed and rows and plain_name(column) not in known:
                alike = nearest(plain_name(column), known)
                hint = f"did you mean {known[alike]!r}?" if alike else "correct the name"
                got = f"got the columns {sorted(known.values())}"
                raise Refusal(f"{file}: {got}, expected {column!r} for the {role}; {hint}")
        found = dict(self.columns)
        taken = set(map(plain_name, found.values()))
        for role, column in self.usual_columns.items():
            name = plain_name(column)
            if role not in found and name in known and name not in taken:
                found[role] = column
        return found
