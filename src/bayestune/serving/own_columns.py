"""Rows of a request whose fields have the names of the columns that the fit's files had."""

from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from bayestune.data import plain_name
from bayestune.serving.bodies import RowBody


def named(body: RowBody, columns: Mapping[str, str]) -> RowBody:
    """The row under the names that requests have; case and blanks of a column do not matter.

    Args:
        body: the row, with fields that may be unknown.
        columns: those of the fit by what they stand for. An answer's may be there and is not read.

    Raises:
        RequestValidationError: of a field that is neither known nor one of the columns, or stands
            for one that is there too, or holds something else than such a field does.
    """
    unknown = body.model_extra
    if not unknown:
        return body
    roles = {plain_name(column): role for role, column in columns.items()}
    fields = body.model_dump(include=body.model_fields_set - unknown.keys())
    for name, value in unknown.items():
        role = roles.get(plain_name(name))
        if role is None:
            raise _fault(name, "Extra inputs are not permitted")
        if role in fields:
            raise _fault(name, f"got {role} too; expected one of them")
        if role != "answer":
            fields[role] = value
    try:
        return RowBody.model_validate(fields)
    except ValidationError as problem:
        raise RequestValidationError(problem.errors()) from None


def refuse_unknown(unknown: Mapping[str, Any] | None) -> None:
    """Refuses any unknown field, as of a body whose `rows` have the fields."""
    for name in unknown or ():
        raise _fault(name, "Extra inputs are not permitted")


def _fault(name: str, message: str) -> RequestValidationError:
    error = {"loc": ("body", name), "msg": message, "type": "extra_forbidden"}
    return RequestValidationError([error])
