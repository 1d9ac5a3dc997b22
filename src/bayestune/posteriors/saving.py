"""Saves a posterior as a stock PEFT adapter (the mean) with two files beside it."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bayestune.adapters import (
    FILES,
    PREFIX,
    GaussianLinear,
    Slots,
    add_beside,
    exclusive,
    facts_of,
    is_spread,
    place_of,
    plain_state,
    refuse_inside_drawn,
    refuse_unless_saved_whole,
    write_posterior,
)
from bayestune.decisions import FILE_NAME as CALIBRATION
from bayestune.errors import Refusal
from bayestune.kl import say_unfinished
from bayestune.posteriors.gaussian import Gaussian
from bayestune.posteriors.mixture import Mixture
from bayestune.posteriors.point import Point
from bayestune.posteriors.posterior import Posterior, unbound
from bayestune.posteriors.tempered import Tempered
from bayestune.runtime import follow_umask, is_first_process, wait_for_processes

Folder = str | PathLike[str]


@contextmanager
def replacing(folder: Path, model: nn.Module) -> Iterator[Path]:
    """A scratch folder, whose files are moved to the folder once all are written.

    Where the model is spread over processes, each writes to its own and the first one's are kept.
    """
    if is_spread(model):
        with tempfile.TemporaryDirectory() as thrown_away:
            if is_first_process():
                with _replacing(folder) as scratch:
                    yield scratch
            else:
                yield Path(thrown_away)
        wait_for_processes()
        return
    with _replacing(folder) as scratch:
        yield scratch


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as scratch:
        yield Path(scratch)
        follow_umask(Path(scratch))
        (folder / CALIBRATION).unlink(missing_ok=True)  # of what the folder held before
        _move(Path(scratch), folder)


def _move(scratch: Path, folder: Path) -> None:
    for name in FILES:
        if (scratch / name).exists():
            (scratch / name).replace(folder / name)


def save_posterior(
    posterior: Posterior | nn.Module,
    folder: Folder,
    details: Mapping[str, Any] | None = None,
    *,
    adapter: str | None = None,
) -> Path:
    """Writes a stock LoRA folder of the mean, with `posterior.safetensors` and `posterior.json`.

    Each file is written elsewhere and moved into place, `posterior.json` last, so a folder that has
    it is whole. A mixture has no mean: its members are such folders beside its `posterior.json`.
    Where a model is spread over processes (FSDP2, ZeRO-3), all of them must call it: each gives its
    part, and the first writes.

    Args:
        posterior: what `fit` returned, or a PEFT model, converted by `bayesify` or not.
        folder: made if it is not there, and returned.
        details: what else to keep in `posterior.json`: method, task, base model.
        adapter: which adapter of a PEFT model; None for the active one.

    Raises:
        Refusal: if what is saved would not give back the same predictions: the adapter's
            initialisation changed the base, its scaling is not its configuration's, other adapters
            take part in the passes, or the model is not PEFT's. Or if it is not clear which adapter
            is meant.
    """
    place = Path(folder).expanduser()
    model = posterior if isinstance(posterior, nn.Module) else posterior.model
    with exclusive(model):
        refuse_inside_drawn(model)
    say_unfinished(model)
    if isinstance(posterior, nn.Module):
        posterior = _of_model(posterior, adapter)
    record: dict[str, Any] = {"posterior": posterior.kind}
    if classes := getattr(posterior.scorer, "class_names", None):  # of a classification head
        record["class_names"] = list(classes)
    with replacing(place, posterior.model) as scratch:
        tensors = None
        if isinstance(posterior, Mixture):
            record["members"] = [f"member-{i}" for i in range(len(posterior.members))]
            for member, name in zip(posterior.members, record["members"], strict=True):
                save_posterior(member, place / name, details)
        elif isinstance(posterior, Tempered) and _is_of_several(posterior.base):
            record |= {"base": "base", "facts": {"temperature": posterior.temperature}}
            save_posterior(posterior.base, place / "base", details)
        else:
            tensors, record["facts"] = posterior.state()
            slots = Slots(posterior.model, posterior.adapter)
            record |= facts_of(slots, save_adapter(slots, scratch))
        write_posterior(scratch, {**record, **(details or {})}, tensors)
    return place


def _is_of_several(posterior: Posterior) -> bool:
    """Whether it is a mixture, under any number of temperatures: not of one adapter."""
    while isinstance(posterior, Tempered):
        posterior = posterior.base
    return isinstance(posterior, Mixture)


def _of_model(model: nn.Module, adapter: str | None) -> Posterior:
    """A Gaussian if `bayesify` has converted the adapter of a PEFT model, else a point."""
    if Slots(model, adapter).of_kind(GaussianLinear):
        return Gaussian(model, unbound, adapter=adapter)  # type: ignore[arg-type]
    names = [] if adapter else list(getattr(model, "peft_config", []))
    if others := [name for name in names if Slots(model, name).of_kind(GaussianLinear)]:
        raise Refusal(
            f"which adapter is meant is not clear: got the plain adapter {Slots(model).adapter!r} "
            f"active, while {others} are Gaussian; name it with adapter=…"
        )
    return Point(model, unbound, adapter=adapter)  # type: ignore[arg-type]


def save_adapter(
    slots: Slots, folder: Path, draw: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Writes a stock adapter as PEFT does, without the files of a posterior.

    Args:
        slots: of the adapter.
        folder: where to.
        draw: weights by slot name, A (r, k) and B (d, r), which take the place of the mean's.

    Returns:
        The model's plain state that was written from.
    """
    refuse_unless_saved_whole(slots)
    state = plain_state(slots.model)
    for slot, weight in (draw or {}).items():
        name = f"{PREFIX}{slot}.{slots.adapter}.weight"
        state[name] = weight.to(state[name].dtype)
    model: Any = slots.model
    # the class's own method: a converted model's instance has one that writes a posterior
    save: Any = type(model).save_pretrained
    names = [slots.adapter]
    save(model, folder, state_dict=state, save_embedding_layers=False, selected_adapters=names)
    written_to = place_of(folder, slots.adapter)
    add_beside(slots, state, written_to)
    if written_to != folder:
        _move(written_to, folder)
    return state
