"""Rows → batches of similar length → the logits of all rows."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

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
    """Batches of rows of similar length, the shortest first, each with the numbers of its rows."""
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
    return in_order(_found(posterior, scorer, rows, draws, (batch_size, 0, 1), progress))


def shared_row_logits(
    posterior: Posterior,
    scorer: Scorer,
    rows: Sequence[Encoded],
    draws: Draws,
    *,
    batch_size: int = 8,
    progress: str | None = None,
) -> Tensor:
    """`row_logits` of processes that run the same command: each takes some batches, all get all.

    The batches are those of one process, so the logits are, too.
    """
    share = (batch_size, process_index(), num_processes())
    found: dict[int, Tensor] = {}
    for part in of_all_processes(_found(posterior, scorer, rows, draws, share, progress)):
        found.update(part)
    return in_order(found)


def _found(
    posterior: Posterior,
    scorer: Scorer,
    rows: Sequence[Encoded],
    draws: Draws,
    share: tuple[int, int, int],
    progress: str | None,
) -> dict[int, Tensor]:
    """Logits (S, C_n) by the number of the row, of a share: a batch's rows, which, of how many."""
    batch_size, first, step = share
    found: dict[int, Tensor] = {}
    batches = islice(batches_by_length(scorer, rows, batch_size), first, None, step)
    with tqdm(total=len(rows), desc=progress, unit="row", disable=progress is None) as bar:
        for numbers, batch in batches:
            logits = batch_logits(posterior, batch, draws)
            found.update(zip(numbers, logits.unbind(1), strict=True))
            bar.update(step * len(numbers))
    return found


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


def in_order(found: Mapping[int, Tensor]) -> Tensor:
    """Rows' logits (S, C_n) by number as those of all, (S, N, C)."""
    width = max(logits.shape[1] for logits in found.values())
    ordered = [found[number] for number in range(len(found))]
    padded = [pad(logits, (0, width - logits.shape[1]), value=-torch.inf) for logits in ordered]
    return torch.stack(padded, 1)
