"""A method from settings: its name and fields, where a post-hoc method's `base` is settings again or another entry."""

from argparse import ArgumentError
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, TypeVar

from jsonargparse import ArgumentParser
from torch import nn

from bayestune.methods.method import Method
from bayestune.methods.registry import METHODS
from bayestune.posteriors import Posterior
from bayestune.scoring import Scorer
from bayestune.training import Training

Settings = Mapping[str, Any] | str | None
T = TypeVar("T")


@dataclass(frozen=True)
class WithTraining:
    """A method that changes the training it is given.

    Args:
        method: what is fitted.
        changes: fields of `Training`, nested ones in part.
    """

    method: Method
    changes: Mapping[str, Any]

    def fit(self, model: nn.Module, scorer: Scorer, training: Training) -> Posterior:
        """Fits the method under the changed training."""
        return self.method.fit(model, scorer, changed(training, self.changes))


def changed(value: T, changes: Mapping[str, Any]) -> T:
    """A dataclass with some fields set anew, each checked against its type; a nested dataclass may change in part.

    Args:
        value: a frozen dataclass.
        changes: new values by field name, as a configuration file gives them.

    Raises:
        ValueError: if a field is unknown or a value is not of its type.

    >>> changed(Training(), {"steps": 7, "lora": {"rank": 4}}).lora
    Lora(rank=4, alpha=16, dropout=0.0, targets=None)
    """
    return _built(type(value), changes, asdict(value), {}) if changes else value  # type: ignore[call-overload]


def _built(
    cls: type[T], given: Mapping[str, Any], defaults: Mapping[str, Any], more: Mapping[str, Any]
) -> T:
    known = {field.name for field in fields(cls)} - set(more)  # type: ignore[arg-type]
    if unknown := sorted(set(given) - known):
        raise ValueError(
            f"unknown settings of {cls.__name__}: got {unknown}, expected some of {sorted(known)}; correct the name"
        )
    if not known:
        return cls(**more)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, skip=set(more))
    parser.set_defaults(dict(defaults))
    try:
        values = parser.instantiate(parser.parse_object(dict(given)))
    except ArgumentError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"settings of {cls.__name__}: got {dict(given)}, expected values of its fields' types; {reason}"
        ) from None
    return cls(**vars(values), **more)


def _is_method(value: object) -> bool:
    return callable(getattr(value, "fit", None))


def make_method(
    settings: Settings, entries: Mapping[str, Settings] | None = None, *, name: str = ""
) -> Method:
    """A method from settings such as `{method: tfb, base: mle, training: {learning_rate: 1e-3}}`.

    Args:
        settings: a mapping with the method's name and its fields; or the name of an entry or of a method of
            `METHODS`. `training` holds changes to the training. `base` is settings again.
        entries: named settings, which may be bases.
        name: what the settings are called; their method, where they do not say which.

    Returns:
        The method; in `WithTraining` if the settings change the training.

    Raises:
        ValueError: if a method or a field is unknown, a value is not of its field's type, a base is missing, or
            a method is its own base.

    >>> make_method({"prior_std": 0.1, "final_std": 0.05}, name="blob").final_std
    0.05
    """
    return _made(settings, entries or {}, name, (name,) if name else ())


def _made(
    settings: Settings, entries: Mapping[str, Settings], name: str, chain: tuple[str, ...]
) -> Method:
    if isinstance(settings, str):
        if settings in chain:
            raise ValueError(
                f"a method is its own base: got {' → '.join((*chain, settings))}, expected a chain that ends; "
                "rename one of the entries"
            )
        if settings in entries:
            return _made(entries[settings], entries, settings, (*chain, settings))
        settings = {"method": settings}
    given = dict(settings or {})
    key, changes = given.pop("method", name), given.pop("training", None)
    if key not in METHODS:
        raise ValueError(
            f"unknown method: got {key!r}, expected one of {sorted(METHODS)}; set `method`"
        )
    cls = METHODS[key]
    more = _base(cls, given, entries, chain)
    method = _built(cls, {k: v for k, v in given.items() if k not in more}, {}, more)
    return WithTraining(method, changes) if changes else method


def _base(
    cls: type[Method],
    given: Mapping[str, Any],
    entries: Mapping[str, Settings],
    chain: tuple[str, ...],
) -> dict[str, Method]:
    base = next((field for field in fields(cls) if field.name == "base"), None)  # type: ignore[arg-type]
    if base is None:
        return {}
    if "base" in given:
        return {"base": _made(given["base"], entries, "", chain)}
    if base.default_factory is not MISSING:
        return {"base": base.default_factory()}
    if base.default is not MISSING:
        return {"base": base.default}
    raise ValueError(
        f"{cls.__name__} needs a base: got {dict(given)}, expected `base`, a method's name or settings; add it"
    )


def described(method: Method) -> dict[str, Any]:
    """A method as settings that `make_method` reads: its name in `METHODS`, all its fields, its base likewise.

    >>> described(make_method("mle"))
    {'method': 'mle'}
    """
    inner: Any = getattr(method, "method", None)
    if _is_method(inner):
        changes = getattr(method, "changes", None)
        return {**described(inner), **({"training": dict(changes)} if changes else {})}
    name = next(
        (key for key, cls in METHODS.items() if type(method) is cls), type(method).__name__.lower()
    )
    values = {field.name: getattr(method, field.name) for field in fields(method)}  # type: ignore[arg-type]
    return {
        "method": name,
        **{key: described(v) if _is_method(v) else v for key, v in values.items()},
    }
