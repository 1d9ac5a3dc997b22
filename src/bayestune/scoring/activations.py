"""The mean's one pass over rows: their logits, and what the adapter's A gives where they answer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bayestune.adapters import Slots, eagerly, exclusive
from bayestune.errors import Refusal
from bayestune.forward import Draws
from bayestune.posteriors import Posterior
from bayestune.scoring.batches import batch_logits, batches_by_length, in_order
from bayestune.scoring.scorer import Encoded, Scorer

Places = tuple[Tensor, Tensor, int]  # each row's sequence and position in it; sequences' length


def mean_pass(
    posterior: Posterior,
    scorer: Scorer,
    rows: Sequence[Encoded],
    *,
    bf16: bool = False,
    batch_size: int = 8,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of the mean adapter, and h = A x at each row's answer, from one pass.

    Args:
        posterior: one that has a mean.
        scorer: of the rows.
        rows: N encoded rows.
        bf16: whether to run under bfloat16 autocast.
        batch_size: rows of a batch.

    Returns:
        Logits (1, N, C) as `row_logits` gives them, and h (N, r) in float32 by slot name. Slots
        that do not see the model's sequences are left out, as those of embeddings are.

    Raises:
        Refusal: if the posterior has no mean.
    """
    if not posterior.has_mean:
        raise Refusal(
            f"got a {type(posterior).__name__}, which has no mean; expected one adapter whose "
            "activations say where a row lies; leave the distance out"
        )
    slots = Slots(posterior.model, posterior.adapter)
    logits: dict[int, Tensor] = {}
    activations: dict[str, dict[int, Tensor]] = {}  # by slot name and number of the row
    for numbers, batch in batches_by_length(scorer, rows, batch_size):
        places = (*scorer.answer_places(batch), batch["input_ids"].shape[1])
        with _watched(slots) as outputs:
            of_batch = batch_logits(posterior, batch, Draws(0, bf16=bf16))
        logits.update(zip(numbers, of_batch.unbind(1), strict=True))
        for name, output in outputs.items():
            values = _at(output, places, len(batch["input_ids"]))
            if values is not None:
                activations.setdefault(name, {}).update(zip(numbers, values.unbind(), strict=True))
    stacked = {}
    for name, by_row in activations.items():
        if len(by_row) == len(rows):
            stacked[name] = torch.stack([by_row[number] for number in range(len(rows))])
    return in_order(logits), stacked


@contextmanager
def _watched(slots: Slots) -> Iterator[dict[str, Tensor]]:
    """The last output of each A in the passes of the context, by slot name.

    A slot may run twice in a pass, first on tokens that all rows begin with, then on the rest.
    """
    outputs: dict[str, Tensor] = {}
    with exclusive(slots.model), eagerly(slots.compiled):
        modules = slots.modules()
        handles = []
        for name in slots.names():
            hook = partial(_keep, outputs, name)
            handles.append(modules[name].register_forward_hook(hook))
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()


def _keep(
    outputs: dict[str, Tensor], name: str, _: nn.Module, __: tuple[Any, ...], output: Tensor
) -> None:
    outputs[name] = output.detach()


def _at(output: Tensor, places: Places, num_sequences: int) -> Tensor | None:
    """A slot's h (N, r) where the rows answer; None if its output is not of the sequences."""
    sequence, position, length = places
    if len(output) != num_sequences or output.ndim not in (2, 3):
        return None
    if output.ndim == 2:  # one vector a sequence, such as a pooled one
        return output[sequence.to(output.device)].float().cpu()
    missing = max(0, length - output.shape[1])  # first tokens: read before, or not needed
    if int(position.min()) < missing:
        return None
    answering = output[sequence.to(output.device), (position - missing).to(output.device)]
    return answering.float().cpu()
