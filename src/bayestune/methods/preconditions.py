"""What a method requires of its base, the model and the rows, checked before its base is fitted."""

from collections.abc import Sequence
from typing import Any, get_type_hints

from bayestune.adapters import Slots
from bayestune.errors import Refusal
from bayestune.methods.distilled import Distilled
from bayestune.methods.early_stopping import EarlyStopping
from bayestune.methods.ensemble import Ensemble
from bayestune.methods.held_out import head_slots, held_out_rows
from bayestune.methods.laplace import Laplace
from bayestune.methods.mc_dropout import MCDropout
from bayestune.methods.temperature import PosteriorScale, Temperature
from bayestune.methods.tfb import TFB
from bayestune.methods.unlabelled import unlabelled_of
from bayestune.methods.workplace import refuse_parts_of
from bayestune.posteriors import Gaussian, Mixture, Point, Tempered
from bayestune.scoring import Scorer

# they train on the base model again, or predict rows, after a training has ended
_GO_ON = (Distilled, Ensemble, Laplace, PosteriorScale, Temperature, TFB)


def check_method(method: Any, scorer: Scorer, slots: Slots) -> None:
    """Refuses what a method's fit would refuse after its base was fitted.

    Args:
        method: whatever it builds on is checked too.
        scorer: of the task.
        slots: of the model with a fresh adapter.
    """
    name = type(method).__name__
    inner = getattr(method, "method", None)  # of a method that changes its training
    for other in (inner, getattr(method, "base", None)):
        if hasattr(other, "fit"):
            check_method(other, scorer, slots)
    chooses = isinstance(method, Laplace) and method.prior_precision is None
    if isinstance(method, Temperature | PosteriorScale | EarlyStopping) or (
        chooses and method.choose == "held_out"
    ):
        learnt = unlabelled_of(getattr(method, "base", None), scorer)
        held_out_rows(scorer, name, learnt, warns=False)
    # Laplace takes the last block where the head has no adapter
    if getattr(method, "layers", "all") == "last" and not isinstance(method, Laplace):
        head_slots(slots, getattr(method, "sides", ("lora_A",)))
    _check_kind_of_base(method)


def _check_kind_of_base(method: Any) -> None:
    """Refuses a base whose posterior the method cannot build on."""
    name = type(method).__name__
    kinds = _posteriors_of(getattr(method, "base", None))
    is_mixture = _gives_mixture(getattr(method, "base", None))
    if isinstance(method, Laplace | MCDropout):
        _check_base(kinds, Point, f"{name} builds on a point", "use MLE or MAP as its base")
    if isinstance(method, MCDropout) and isinstance(_unwrapped(method.base), Distilled):
        raise Refusal(
            f"{name} drops as its base was trained: got Distilled as its base, whose student is "
            "trained without dropout, expected such as MLE; take MLE or MAP as its base"
        )
    if isinstance(method, PosteriorScale):
        need = f"{name} scales a Gaussian"
        _check_base(kinds, Gaussian, need, "expected BLoB, BBB, TFB or IVON")
    if isinstance(method, TFB) and is_mixture:
        raise Refusal(
            f"{name} starts from one adapter: got a Mixture without a mean from its base, expected "
            "such as MLE; use the base of its base"
        )
    if isinstance(method, TFB) and Tempered in kinds:
        raise Refusal(
            f"{name} takes an adapter, which has no temperature: got a Temperature as its base, "
            f"expected such as MLE; put the temperature around it, Temperature(base={name}())"
        )
    if isinstance(method, Ensemble) and is_mixture:
        raise Refusal(
            f"{name} saves its members as adapters: got an Ensemble as its base, expected a method "
            "of one adapter; raise `size` instead"
        )
    if isinstance(method, Temperature) and method.draws == 0 and is_mixture:
        raise Refusal(
            f"{name} of the mean: got draws=0 and a base without a mean, expected draws; leave "
            "draws out"
        )


def check_launch(method: Any) -> None:
    """Refuses a method that goes on after a training, where its launcher leaves a base in parts.

    Args:
        method: whatever it builds on is checked too.
    """
    if isinstance(method, _GO_ON) or getattr(method, "final_std", None) == "auto":
        refuse_parts_of(type(method).__name__)
    inner = getattr(method, "method", None)  # of a method that changes its training
    if hasattr(inner, "fit"):
        check_launch(inner)


def _check_base(kinds: Sequence[type], wanted: type, need: str, advice: str) -> None:
    """Refuses a base none of whose posteriors can be of the wanted class."""
    if kinds and not any(issubclass(kind, wanted) or issubclass(wanted, kind) for kind in kinds):
        got = " or ".join(kind.__name__ for kind in kinds)
        raise Refusal(f"{need}: got a {got} from its base, expected a {wanted.__name__}; {advice}")


def _gives_mixture(base: Any) -> bool:
    """Whether a method fits a mixture, under any number of temperatures."""
    method = _unwrapped(base)
    if isinstance(method, Temperature):
        return _gives_mixture(method.base)
    kinds = _posteriors_of(method)
    return bool(kinds) and all(issubclass(kind, Mixture) for kind in kinds)


def _unwrapped(method: Any) -> Any:
    """A method without what changes its training."""
    inner = getattr(method, "method", None)
    return inner if hasattr(inner, "fit") else method


def _posteriors_of(base: Any) -> list[type]:
    """The classes of what a method's fit may return, by its annotation; none if it has no base."""
    if not hasattr(base, "fit"):
        return []
    kind: Any = type(_unwrapped(base))
    returned = get_type_hints(kind.fit).get("return", object)
    return [kind for kind in getattr(returned, "__args__", (returned,)) if isinstance(kind, type)]
