"""Rows → batches of similar length → the logits of all rows."""

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from bayestune.forward import Draws
from bayestune.posteriors import Posterior
from bayestune.scoring.choose import Scorer
from bayestune.scoring.tokens import Encoded


def row_logits(
    posterior: Posterior,
    scorer: Scorer,
    rows: Sequence[Encoded],
    draws: Draws,
    *,
    batch_size: int = 8,
    progress: str | None = None,
) -> Tensor:
    """The logits of every row under the same held draws; batches hold rows of like length.

    Args:
        posterior: whose draws.
        scorer: made the rows.
        rows: N encoded rows.
        draws: which draws, the bounds of a pass, and its precision.
        batch_size: rows of a batch.
        progress: title of a progress bar; None for none.

    Returns:
        Logits (S, N, C) in the order of the rows, C the largest number of options, -inf where a row has fewer.
    """
    order = sorted(range(len(rows)), key=lambda i: rows[i]["length"])
    parts: dict[int, Tensor] = {}
    with tqdm(total=len(rows), desc=progress, unit="row", disable=progress is None) as bar:
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            batch = scorer.collate([rows[i] for i in places])
            batch.pop("labels", None)
            logits = posterior.logits(batch, draws).float().cpu()
            parts.update(zip(places, logits.unbind(1), strict=True))
            bar.update(len(places))
    width = max(part.shape[-1] for part in parts.values())
    padded = [
        torch.nn.functional.pad(parts[i], (0, width - parts[i].shape[-1]), value=-torch.inf)
        for i in range(len(rows))
    ]
    return torch.stack(padded, 1)
