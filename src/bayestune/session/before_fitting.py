"""Checks before the first fit of a run, so that hours are not lost to what its last fit refuses."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from bayestune.adapters import Lora, Slots, attach, detach
from bayestune.data import Question
from bayestune.errors import Refusal
from bayestune.methods import (
    Distilled,
    Ensemble,
    Method,
    changed,
    check_method,
    inner_methods,
    learns_unlabelled,
)
from bayestune.scoring import Scorer, check_lengths
from bayestune.session.as_fitted import warn_of_repeated_rows
from bayestune.training import Training

logger = logging.getLogger(__name__)


def check_fits(model: nn.Module, scorer: Scorer, lora: Lora, methods: Iterable[Method]) -> None:
    """Refuses what one of the fits to come would refuse, or fail at, once others have taken hours.

    Args:
        model: the base model, which may be on the meta device; left as it was.
        scorer: of the task.
        lora: the adapter that the fits attach.
        methods: that are to be fitted.

    Raises:
        Refusal: if a row is too long for the model, or a method does not fit it or the task.
    """
    methods = list(methods)
    if scorer.warns and scorer.task.unlabelled and not any(map(learns_unlabelled, methods)):
        logger.warning("no method learns on the unlabelled rows: expected distilled among them")
    quiet = replace(scorer, warns=False)
    for part in (scorer.task.train, scorer.task.held_out, scorer.task.unlabelled):
        check_lengths(model, part, quiet.encode(part))
    with torch.random.fork_rng(devices=[]):
        adapted = attach(model, lora)
    try:
        for method in methods:
            check_method(method, scorer, Slots(adapted))
    finally:
        detach(adapted)


def learnt_rows(method: Any, scorer: Scorer, training: Training) -> tuple[Question, ...]:
    """The unlabelled rows that a fit learns from: those that the steps of its students reach."""
    if not learns_unlabelled(method):
        return ()
    if isinstance(method, Ensemble):  # each member chooses its own
        return scorer.task.unlabelled
    of_student = method.rows(scorer, training) if isinstance(method, Distilled) else ()
    training = changed(training, getattr(method, "changes", {}))
    of_inner = (learnt_rows(inner, scorer, training) for inner in inner_methods(method))
    return (*of_student, *chain.from_iterable(of_inner))


def check_answers(rows: Sequence[Question]) -> None:
    """Refuses rows to evaluate on that have no answer; warns of those that repeat others."""
    unlabelled = [row.id for row in rows if row.answer is None]
    if unlabelled:
        raise Refusal(
            f"rows to evaluate on need answers: got {len(unlabelled)} of {len(rows)} without one, "
            f"such as {unlabelled[0]}; add them, or take these rows out"
        )
    warn_of_repeated_rows("rows to evaluate on", rows, evaluated=True)
