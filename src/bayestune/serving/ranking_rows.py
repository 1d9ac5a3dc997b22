"""Rows ranked by what their labels would teach, as `bayestune rank` does."""

from typing import Any

from bayestune.decisions import rank_rows, score_rows
from bayestune.errors import Refusal
from bayestune.forward import Draws
from bayestune.serving.desk import Desk
from bayestune.serving.bodies import RankBody
from bayestune.serving.shelf import Served
from bayestune.serving.waiting import Answer
from bayestune.session import joined


async def ranked(desk: Desk, served: Served, body: RankBody) -> list[dict[str, Any]]:
    """The lines of rows, the one that teaches most first.

    Raises:
        Refusal: if a row cannot be put: an order without it would not be one of all rows.
    """
    count = Draws().count if body.draws is None else body.draws
    asked = body.model_copy(update={"draws": count, "seed": body.seed or 0})
    found = await desk.answers(served, desk.gated(served, asked), body.rows)
    answers = []
    for outcome in found:
        if isinstance(outcome, Refusal):
            raise outcome
        assert isinstance(outcome, Answer)
        answers.append(outcome)
    logits = joined([answer.logits[:, None] for answer in answers])
    by = body.by or ("bald" if len(logits) > 1 else "entropy")
    number = len(answers) if body.number is None else body.number
    order = rank_rows(logits, number, by, seed=asked.seed or 0).tolist()
    scores = score_rows(logits)
    lines = []
    for place, index in enumerate(order, 1):
        line = answers[index].line
        told = {"rank": place, "index": index, "id": line["id"], "question": line["question"]}
        told |= {"by": by, "options": line["options"]}
        lines.append(told | {name: values[index].item() for name, values in scores.items()})
    return lines
