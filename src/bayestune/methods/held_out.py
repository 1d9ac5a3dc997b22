"""For methods that build on others: held-out rows and their logits, a point, the head's slots."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bayestune.adapters import Slots, output_head, split_name
from bayestune.data import Question
from bayestune.errors import Refusal
from bayestune.forward import Draws
from bayestune.posteriors import Point, Posterior, count_for
from bayestune.scoring import Scorer, row_logits

logger = logging.getLogger(__name__)


def check_point(posterior: Posterior, method: str) -> Point:
    """The posterior if it is a point; raises Refusal if not."""
    if not isinstance(posterior, Point):
        raise Refusal(
            f"{method} builds on a point: got a {type(posterior).__name__} from its base, expected "
            "a Point; use MLE or MAP as its base"
        )
    return posterior


def held_out_rows(
    scorer: Scorer, method: str, learnt: Sequence[Question] = (), *, warns: bool = True
) -> tuple[Question, ...]:
    """The task's held-out rows on which a method may choose.

    Those from which its base may learn without their answers, as a student does, are left out.

    Args:
        scorer: of the task.
        method: the method's name, for messages.
        learnt: rows from which its base may learn beside the training rows.
        warns: whether it says how many it leaves out.

    Raises:
        Refusal: if none is left, one has no answer, or one is a training row.
    """
    rows = scorer.task.held_out
    if not rows:
        raise Refusal(
            f"{method} chooses on held-out rows: got none, expected some; set --holdout 0.1"
        )
    if any(row.answer is None for row in rows):
        raise Refusal(
            f"{method} chooses on held-out rows with answers: got a row without one; drop it"
        )
    trained_on = {row.fingerprint for row in scorer.task.train}
    seen = [row.id for row in rows if row.fingerprint in trained_on]
    if seen:
        raise Refusal(
            f"{method} must not choose on rows seen in training: got {len(seen)} of {len(rows)}, "
            f"such as {seen[0]}; take them out of one part"
        )
    known = {row.fingerprint for row in learnt}
    left = tuple(row for row in rows if row.fingerprint not in known)
    if not left:
        raise Refusal(
            f"{method} must not choose on rows that its base may learn: got {len(rows)} held-out "
            "rows, all among the unlabelled ones, expected others; take them out of one part"
        )
    if warns and len(left) < len(rows):
        logger.warning(
            "%s leaves out %d of %d held-out rows: its base may learn them as unlabelled rows",
            method,
            len(rows) - len(left),
            len(rows),
        )
    return left


def held_out_logits(
    posterior: Posterior, scorer: Scorer, rows: Sequence[Question], draws: Draws
) -> tuple[Tensor, Tensor]:
    """Logits (S, N, C) and labels (N,) of rows; S is the posterior's `atoms`, if it has them."""
    labels = torch.tensor([row.answer for row in rows])
    draws = replace(draws, count=count_for(posterior, draws.count))
    return row_logits(posterior, scorer, scorer.encode(rows), draws), labels


def head_slots(slots: Slots, sides: Collection[str] = ("lora_A",)) -> list[str]:
    """Names of the output head's slots; raises Refusal if the head is not adapted."""
    head = output_head(slots.model)
    path = next((path for path, layer in slots.layers.items() if layer is head), None)
    if path is None:
        raise Refusal(
            'layers="last" puts noise on the output head\'s adapter: got a model whose head has '
            'none, expected one; add "lm_head" to the targets'
        )
    return [name for name in slots.names(sides) if split_name(name)[0] == path]
