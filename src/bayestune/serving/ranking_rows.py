"""Rows ranked by what their labels would teach, as `bayestune rank` does."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from bayestune.decisions import (
    rank_rows,
    ranked_lines,
    score_rows,
    spread_out,
    usual_acquisition,
)
from bayestune.errors import Refusal
from bayestune.forward import Draws
from bayestune.serving.artefact_store import Served
from bayestune.serving.bodies import RankBody
from bayestune.serving.request_handler import RequestHandler
from bayestune.serving.waiting import Answer
from bayestune.session import (
    DISTANCE,
    PredictionOptions,
    joined_columns,
    joined_logits,
    prompt_lengths,
    reference_of_artefact,
    windows,
)


async def ranked(handler: RequestHandler, served: Served, body: RankBody) -> list[dict[str, Any]]:
    """The lines of rows, the one that teaches most first.

    Raises:
        Refusal: if a row cannot be put: an order without it would not be one of all rows.
    """
    count = Draws().count if body.draws is None else body.draws
    seed = body.seed or 0
    with_defaults = body.model_copy(update={"draws": count, "seed": seed})
    handler.predictor_for(served, with_defaults)  # refuses draws that may not be asked for
    predictor = served.plainly(count, seed)
    answers = []
    for outcome in await handler.answers(served, predictor, body.rows):
        if isinstance(outcome, Refusal):
            raise outcome
        assert isinstance(outcome, Answer)
        answers.append(outcome)
    logits = joined_logits([answer.logits[:, None] for answer in answers])
    by = body.by or usual_acquisition(len(logits))
    number = len(answers) if body.number is None else body.number
    scores = score_rows(logits) | prompt_lengths([answer.encoded for answer in answers])
    reference = reference_of_artefact(served.calibration)
    features = None
    if served.posterior.has_mean and (by == "bald" or reference is not None):
        activations = await _activations(handler, served, answers)
        if by == "bald" and len(answers) > 1:
            features = spread_out(activations)
        if reference is not None:
            scores[DISTANCE] = reference.of(activations)
    same = [repr(answer.encoded) for answer in answers]  # what the model read
    order = rank_rows(logits, number, by, features, seed, same)
    rows = []
    for index, answer in enumerate(answers):
        shown = {name: answer.line[name] for name in ("id", "question", "options")}
        rows.append({"index": index, **shown})
    return ranked_lines(order, rows, by, scores)


async def _activations(
    handler: RequestHandler, served: Served, answers: Sequence[Answer]
) -> dict[str, Tensor]:
    """A x (N, r) of rows by slot name, some at a time, so that other requests have their turn."""
    scorer = served.session.scorer
    mean = PredictionOptions(0, bf16=served.fit.bf16)
    parts = []
    for window in windows([answer.encoded for answer in answers]):
        parts.append(await handler.call(partial(mean.watched, served.fit, scorer, window)))
    return joined_columns([activations for _, activations in parts])
