"""Rows → batches of similar length → the logits of all rows."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from bayestune.decisions import NotFiniteLogits
from bayestune.forward import Draws
from bayestune.posteriors import Posterior
from bayestune.runtime import num_processes, of_all_processes, process_index
from bayestune.scoring.scorer import Encoded, Scorer


def batches_by_length(
    scorer: Scorer, rows: Sequence[Encoded], size: int
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Batches of rows of similar length, the shortest first, each with the numbers of its rows.

    Args:
        scorer: which collates the batches.
        rows: N encoded rows.
        size: rows of a batch.
    """
    order = sorted(range(len(rows)), key=lambda number: rows[number]["length"])
    for start in range(0, len(order), size):
        numbers = order[start : start + size]
        yield numbers, scorer.collate([rows[number] for number in numbers])


def row_logits(
    posterior: Posterior,
    scorer: Scorer,
    rows: Sequence[Encoded],
    draws: Draws,
    *,
    batch_size: int = 8,
    progress: str | None = None,
) -> Tensor:
    """The logits of every row under the same held draws.

    Args:
        posterior: whose draws.
        scorer: of the rows.
        rows: N encoded rows.
        draws: which draws, the bounds of a pass, and its precision.
        batch_size: rows of a batch.
        progress: title of a progress bar; None for none.

    Returns:
        Logits (S, N, C) in the order of the rows, -inf for options that a row does not have.

    Raises:
        NotFiniteLogits: if they are -inf for one that it has.
    """
    share = _Share(batch_size, first=0, step=1)
    return in_order(_logits_by_row(posterior, scorer, rows, draws, share, progress))


def shared_row_logits(
    posterior: Posterior,
    scorer: Scorer,
    rows: Sequence[Encoded],
    draws: Draws,
    *,
    batch_size: int = 8,
    progress: str | None = None,
) -> Tensor:
    """`row_logits` for processes that run the same command: each computes a share, all get all.

    The batches are those that one process would make, so the logits are the same. Arguments and
    result are those of `row_logits`.
    """
    share = _Share(batch_size, first=process_index(), step=num_processes())
    logits: dict[int, Tensor] = {}
    for part in of_all_processes(_logits_by_row(posterior, scorer, rows, draws, share, progress)):
        logits.update(part)
    return in_order(logits)


class _Share(NamedTuple):
    """Which batches a process computes: every `step`-th from `first` on."""

    batch_size: int
    first: int
    step: int


def _logits_by_row(
    posterior: Posterior,
    scorer: Scorer,
    rows: Sequence[Encoded],
    draws: Draws,
    share: _Share,
    progress: str | None,
) -> dict[int, Tensor]:
    """Logits (S, C_n) of a share of the rows, by the number of the row."""
    by_row: dict[int, Tensor] = {}
    batches = islice(
        batches_by_length(scorer, rows, share.batch_size), share.first, None, share.step
    )
    with tqdm(total=len(rows), desc=progress, unit="row", disable=progress is None) as bar:
        for numbers, batch in batches:
            logits = batch_logits(posterior, batch, draws)
            by_row.update(zip(numbers, logits.unbind(1), strict=True))
            bar.update(share.step * len(numbers))  # the other processes do as much meanwhile
    return by_row


def batch_logits(posterior: Posterior, batch: dict[str, Tensor], draws: Draws) -> Tensor:
    """The logits (S, N, C) of a batch, whose labels are left aside, in float32 on the CPU.

    Raises:
        NotFiniteLogits: if they are -inf for an option that a row has.
    """
    batch.pop("labels", None)
    mask = batch.get("option_mask")
    logits = posterior.logits(batch, draws).float().cpu()
    _refuse_lost_options(logits, None if mask is None else mask.cpu())
    return logits


def _refuse_lost_options(logits: Tensor, mask: Tensor | None) -> None:
    """Refuses −∞ for an option that a row has: it would be taken for one that it does not have.

    Args:
        logits: (S, N, C).
        mask: (N, C), the options that the rows have; None where they have all.
    """
    lost = logits.isneginf()
    if mask is not None:
        lost = lost & mask
    if lost.any():
        count = int(lost.any(-1).any(0).sum())
        got = f"got logits of −∞ for options of {count} rows"
        raise NotFiniteLogits(f"{got}; expected numbers; look at the fit, or its precision")


def in_order(by_row: Mapping[int, Tensor]) -> Tensor:
    """Logits (S, C_n) by the number of the row as one tensor (S, N, C), -inf where C_n < C."""
    width = max(logits.shape[1] for logits in by_row.values())
    ordered = [by_row[number] for number in range(len(by_row))]
    padded = [pad(logits, (0, width - logits.shape[1]), value=-torch.inf) for logits in ordered]
    return torch.stack(padded, 1)
