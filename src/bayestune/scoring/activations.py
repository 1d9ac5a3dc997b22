"""The mean's one pass over rows: their logits, and what the adapter's A gives where they answer."""

from collections.abc import Iterator, Mapping, Sequence
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

Places = tuple[Tensor, Tensor, int]  # each row's sequence and position, and the sequences' length


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
        bf16: whether under bfloat16 autocast.
        batch_size: rows of a batch.

    Returns:
        Logits (1, N, C) as `row_logits` gives them, and h (N, r) in float32 by slot name, of the
        slots that see sequences as the model does: none where A adapts embeddings alone.

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
    parts: dict[str, dict[int, Tensor]] = {}
    for numbers, batch in batches_by_length(scorer, rows, batch_size):
        places = (*scorer.answer_places(batch), batch["input_ids"].shape[1])
        with _watched(slots) as outputs:
            found = batch_logits(posterior, batch, Draws(0, bf16=bf16))
        logits.update(zip(numbers, found.unbind(1), strict=True))
        for name, output in outputs.items():
            values = _at(output, places, len(batch["input_ids"]))
            if values is not None:
                parts.setdefault(name, {}).update(zip(numbers, values.unbind(), strict=True))
    whole = {name: part for name, part in parts.items() if len(part) == len(rows)}
    return in_order(logits), {name: _stacked(part) for name, part in whole.items()}


def _stacked(found: Mapping[int, Tensor]) -> Tensor:
    return torch.stack([found[number] for number in range(len(found))])


@contextmanager
def _watched(slots: Slots) -> Iterator[dict[str, Tensor]]:
    """The last output of each A in the passes of the context, by slot name.

    The last one, because tokens that all rows begin with may have been read before the rest.
    """
    outputs: dict[str, Tensor] = {}
    with exclusive(slots.model), eagerly(slots.compiled):
        modules = slots.modules()
        hooks = []
        for name in slots.names():
            hook = partial(_keep, outputs, name)
            hooks.append(modules[name].register_forward_hook(hook))
        try:
            yield outputs
        finally:
            for handle in hooks:
                handle.remove()


def _keep(
    outputs: dict[str, Tensor], name: str, _: nn.Module, __: tuple[Any, ...], output: Tensor
) -> None:
    outputs[name] = output.detach()


def _at(output: Tensor, places: Places, count: int) -> Tensor | None:
    """h (N, r) where the rows answer; None of a layer that sees something else than sequences."""
    sequence, position, length = places
    if len(output) != count or output.ndim not in (2, 3):
        return None
    if output.ndim == 2:  # of one vector a sequence, such as a pooled one
        return output[sequence.to(output.device)].float().cpu()
    missing = max(0, length - output.shape[1])  # read before, or not needed
    if int(position.min()) < missing:
        return None
    own = output[sequence.to(output.device), (position - missing).to(output.device)]
    return own.float().cpu()
