"""Calibrates an artefact on labelled rows that its training did not see."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bayestune import decisions
from bayestune.data import Question
from bayestune.decisions import Calibration, CalibrationOptions, HeldOut, Variant, score_rows
from bayestune.errors import Refusal
from bayestune.posteriors import artefact_folder, is_hub_id, posterior_digest
from bayestune.scoring import check_lengths
from bayestune.session.artefact import (
    Artefact,
    RowOptions,
    Rows,
    content_of,
    rows_for_artefact,
    unsure_options,
)
from bayestune.session.as_fitted import seen_fingerprints
from bayestune.session.compared_ways import VariantOptions, cascade_of, variants_of
from bayestune.session.fit import details_of
from bayestune.session.plain_adapter import is_plain
from bayestune.session.row_predictor import prompt_lengths

_UNLIKE = "promises about classes, or costs of errors, for rows of unlike options"  # what was got
_LEAVE_OUT = "leave --per_class and --costs out"


def calibrate(
    folder: Path | str,
    rows: Rows,
    options: CalibrationOptions | None = None,
    compared: VariantOptions | None = None,
    row_options: RowOptions | None = None,
    model: str | None = None,
) -> Calibration:
    """Chooses on held-out rows how an artefact predicts and when one may act on it; keeps that.

    `calibration.json` beside the artefact holds what was chosen, bound to the artefact by its
    digest: `predict`, `evaluate` and `decide` apply it.

    Args:
        folder: of `fit`, or any LoRA adapter's.
        rows: questions with answers that training did not see, or a file of them.
        options: the promises; an error rate of 0.05 with confidence 0.9 unless given.
        compared: the ways of predicting.
        row_options: how rows are read and put.
        model: the base model, where it has moved, or where the adapter does not name it.

    Returns:
        The calibration, which is written.

    Raises:
        Refusal: if training saw some of the rows, or there are too few for what is asked.
    """
    options = options or CalibrationOptions()
    compared = compared or VariantOptions()
    row_options = row_options or RowOptions()
    place = _local_folder(folder)
    row_options.check(place)
    questions = rows_for_artefact(rows, place, row_options, labelled=True)
    trained = _trained_on(place, row_options)
    fits = [place, compared.student] if compared.student else [place]
    _refuse_seen(questions, trained, fits)
    _refuse_unlike(questions, options)
    _refuse_too_few(questions, options, row_options)
    artefact = Artefact.open(place, questions, row_options, model)
    options = _in_class_order(options, questions, artefact.rows)
    encoded = artefact.session.scorer.encode(artefact.rows)
    check_lengths(artefact.session.loaded.model, artefact.rows, encoded)
    held_out = replace(_held_out(artefact.rows, row_options), extra=prompt_lengths(encoded))
    variants = variants_of(artefact, compared, trained)
    if compared.cascade:
        variants["cascade"] = cascade_of(variants, held_out, options, compared.cascade)
    digest = posterior_digest(place)
    calibration = decisions.calibrate(variants, held_out, options, digest, artefact.fit.label)
    chosen = variants[calibration.variant]
    calibration = replace(
        calibration,
        settings={**calibration.settings, **_settings(artefact, options, row_options)},
        held_out=_scores(chosen, calibration.temperature, held_out),
    )
    calibration.write(place)
    return calibration


def _local_folder(folder: Path | str) -> Path:
    """The artefact's folder; refuses one on the Hub, which nothing can be written into."""
    if isinstance(folder, str) and is_hub_id(folder):
        raise Refusal(
            f"got {folder} on the Hub, expected a folder of this machine, which the calibration is "
            "written into; download it first: `hf download`"
        )
    return artefact_folder(folder)


def _refuse_too_few(
    rows: Sequence[Question], options: CalibrationOptions, row_options: RowOptions
) -> None:
    """Refuses before any pass what would be refused after all of them."""
    num_classes = max(len(row.options) for row in rows)
    decisions.parts(_held_out(rows, row_options), options, num_classes)


def _settings(
    artefact: Artefact, options: CalibrationOptions, row_options: RowOptions
) -> dict[str, Any]:
    """What later rows need to be decided on: the unsure option, the classes, an adapter's details.

    Classes are kept for thresholds or costs by class; details for a plain adapter, which has no
    `posterior.json`.
    """
    settings: dict[str, Any] = {"unsure": row_options.unsure}
    if options.per_class or options.costs is not None:
        settings["classes"] = artefact.rows[0].options
    if is_plain(artefact.place):
        settings["adapter"] = artefact.fit.details
    return settings


def _held_out(rows: Sequence[Question], row_options: RowOptions) -> HeldOut:
    """The labels and contents of rows; refuses an unsure option that no row has."""
    labels = torch.tensor([row.answer for row in rows])
    indices = unsure_options(rows, row_options.unsure)
    if indices is not None and max(indices) < 0:
        got = f"no row with the option {row_options.unsure!r}"
        raise Refusal(f"got {got}; expected some; look at its spelling, or leave --unsure out")
    unsure = None if indices is None else torch.tensor(indices)
    same = [row.fingerprint for row in rows]  # whatever the order of their options
    answers = [row.options[row.answer] for row in rows if row.answer is not None]
    contents = [content_of(row) for row in rows]
    return HeldOut(labels, contents, unsure, same=same, answers=answers)


def _trained_on(place: Path, row_options: RowOptions) -> tuple[Question, ...]:
    """The rows of the file that training saw; all of them if the folder does not say which.

    Raises:
        Refusal: if training saw none of them.
    """
    if row_options.trained_on is None:
        return ()
    rows = rows_for_artefact(row_options.trained_on, place, row_options, labelled=False)
    details = {} if is_plain(place) else details_of(place)
    if "seen" not in details:
        return rows
    seen = seen_fingerprints(details, len(rows[0].fingerprint))
    trained = tuple(row for row in rows if row.fingerprint in seen)
    if not trained:
        raise Refusal(
            f"got {row_options.trained_on}, of whose {len(rows)} rows {place} was fitted on none; "
            "expected the rows of its training; give those, or leave --trained_on out"
        )
    return trained


def _refuse_seen(
    rows: Sequence[Question], trained: Sequence[Question], folders: Sequence[Path]
) -> None:
    """Refuses rows whose content is that of a training row, or stands in a folder as seen.

    Args:
        rows: those to calibrate on.
        trained: training rows that the user gave.
        folders: of the artefact and perhaps a student.
    """
    seen = {row.fingerprint for row in trained}
    for folder in folders:
        if not is_plain(folder):
            seen |= seen_fingerprints(details_of(folder), len(rows[0].fingerprint))
    seen_ids = [row.id for row in rows if row.fingerprint in seen]
    if seen_ids:
        raise Refusal(
            f"got {len(seen_ids)} of {len(rows)} rows that training saw, such as {seen_ids[0]}; "
            "expected others: a model is surer of what it was fitted on; hold rows out of training"
        )


def _refuse_unlike(rows: Sequence[Question], options: CalibrationOptions) -> None:
    """Refuses promises about classes where the rows' options are not classes."""
    about_classes = options.per_class or options.costs is not None
    if about_classes and len({tuple(sorted(row.options)) for row in rows}) > 1:
        raise Refusal(f"got {_UNLIKE}; expected the same options in every row; {_LEAVE_OUT}")


def _in_class_order(
    options: CalibrationOptions, given: Sequence[Question], as_put: Sequence[Question]
) -> CalibrationOptions:
    """The options with costs in the order in which the rows' options are put to the model.

    The user's costs are in the order of the file's options; a head may have another order.

    Args:
        options: of the calibration.
        given: the rows as the file has them.
        as_put: the same rows as they are put to the model.

    Raises:
        Refusal: if promises are about classes and the rows' options are not all in one order.
    """
    if not options.per_class and options.costs is None:
        return options
    orders = {row.options for row in (as_put if options.costs is None else given)}
    if len(orders) > 1:
        expected = "the same options in the same order in every row"
        raise Refusal(f"got {_UNLIKE}; expected {expected}; {_LEAVE_OUT}")
    if options.costs is None:
        return options
    indices = [given[0].options.index(option) for option in as_put[0].options]
    return replace(options, costs=options.costs[indices][:, indices])


def _scores(variant: Variant, temperature: float, held_out: HeldOut) -> dict[str, list[float]]:
    """The scores of the held-out rows, which new rows are compared with; without constant ones.

    Each content counts once: with copies among them, rows without copies would look different.
    """
    rows = sorted(held_out.distinct())
    scores = score_rows(variant.logits[:, rows], temperature=temperature)
    extra = {**held_out.extra, **variant.extra}
    scores |= {name: values[rows] for name, values in extra.items()}
    varying = {name: values for name, values in scores.items() if values.max() > values.min()}
    return decisions.as_kept(varying)
