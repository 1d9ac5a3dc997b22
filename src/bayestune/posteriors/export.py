"""Exports one draw as a plain LoRA adapter, which any LoRA server can load."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bayestune.adapters import Slots, are_alike
from bayestune.errors import Refusal
from bayestune.posteriors.mixture import Mixture
from bayestune.posteriors.posterior import AdapterPosterior, Posterior
from bayestune.posteriors.saving import replacing, save_adapter


def export_draw(
    posterior: Posterior | nn.Module,
    draw: int | Mapping[str, Tensor],
    folder: str | PathLike[str],
    seed: int = 0,
) -> Path:
    """Writes one draw as a plain LoRA adapter, which any LoRA server loads.

    Args:
        posterior: whose draw; or its PEFT model, if it has no other adapter.
        draw: which draw, from 0; or its weights by slot name, as `posterior.draw` returns them,
            A (r, k) and B (d, r); the rest is the mean's.
        folder: made if it is not there.
        seed: of the set of draws.

    Returns:
        The folder.

    Raises:
        Refusal: if the posterior's draws are not adapters, a name is not a slot of the adapter,
            or it is not clear which adapter's configuration, mean and head belong to the weights.
    """
    if isinstance(draw, int):
        if not isinstance(posterior, AdapterPosterior | Mixture):
            raise Refusal(
                f"{type(posterior).__name__} draws are not adapters: got draw {draw}, expected a "
                "posterior whose draws can be exported, such as Gaussian"
            )
        owner = posterior.member_of(draw) if isinstance(posterior, Mixture) else posterior
        slots = Slots(owner.model, owner.adapter)
        draw = posterior.draw(draw, seed)
    else:
        slots = _slots_of(posterior, draw)
    if unknown := sorted(set(draw) - set(slots.modules())):
        raise Refusal(
            f"a draw of another model: got the slots {unknown[:3]}, expected slots of the adapter "
            f"{slots.adapter!r}; export it with the posterior it is of"
        )
    folder = Path(folder).expanduser()
    with replacing(folder, slots.model) as scratch:
        save_adapter(slots, scratch, draw)
    return folder


def _slots_of(posterior: Posterior | nn.Module, draw: Mapping[str, Tensor]) -> Slots:
    """The slots of the adapter to which the weights of a draw belong."""
    if isinstance(posterior, nn.Module):
        slots = Slots(posterior)
    else:
        slots = Slots(posterior.model, posterior.adapter)
        if not isinstance(posterior, Mixture):
            return slots
    names: Any = getattr(slots.model, "peft_config", [slots.adapter])
    adapters = [Slots(slots.model, name) for name in names]
    fits_any = set(draw) >= set(slots.modules()) and are_alike(adapters)
    if len(names) > 1 and not fits_any:
        raise Refusal(
            f"which adapter the draw belongs to is not clear: got a model with the adapters "
            f"{list(names)}, expected one; give the posterior and the draw's number instead"
        )
    return slots
