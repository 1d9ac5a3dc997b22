"""A method from settings: its name and fields; a `base` is settings again, or another entry."""

from argparse import ArgumentError
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, fields
from typing import Any, TypeVar

from jsonargparse import ArgumentParser
from torch import nn

from bayestune.errors import Refusal
from bayestune.methods.method import Method
from bayestune.methods.registry import METHODS
from bayestune.posteriors import Posterior
from bayestune.scoring import Scorer
from bayestune.training import Training

Settings = Mapping[str, Any] | str | None
T = TypeVar("T")


@dataclass(frozen=True)
class WithTraining:
    """A method that changes fields of the training it is given, nested ones in part."""

    method: Method
    changes: Mapping[str, Any]

    def fit(self, model: nn.Module, scorer: Scorer, training: Training) -> Posterior:
        """Fits the method under the changed training."""
        return self.method.fit(model, scorer, changed(training, self.changes))


def changed(value: T, changes: Mapping[str, Any]) -> T:
    """A frozen dataclass with some fields set anew, each checked against its type.

    Args:
        value: the dataclass; one nested in it may change in part.
        changes: new values by field name, as a configuration file gives them.

    Raises:
        Refusal: if a field is unknown or a value is not of its type.

    Example:
        >>> changed(Training(), {"steps": 7, "lora": {"rank": 4}}).lora
        Lora(rank=4, alpha=16, dropout=0.0, targets=None)
    """
    return _built(type(value), changes, asdict(value), {}) if changes else value  # type: ignore[call-overload]


def make_method(
    settings: Settings, entries: Mapping[str, Settings] | None = None, *, name: str = ""
) -> Method:
    """A method from settings such as `{method: tfb, base: mle, training: {learning_rate: 1e-3}}`.

    Args:
        settings: a mapping with the method's name and fields, or the name of an entry or a method.
            `training` holds changes to the training, and `base` is settings again.
        entries: named settings, which may be bases.
        name: what the settings are called; their method, where they do not say which.

    Returns:
        The method; in `WithTraining` if the settings change the training.

    Raises:
        Refusal: if a name is unknown, a value is not of its field's type, a base is missing, or
            a method is its own base.

    Example:
        >>> make_method({"prior_std": 0.1, "final_std": 0.05}, name="blob").final_std
        0.05
    """
    return _made(settings, entries or {}, name, (name,) if name else ())


def described(method: Method) -> dict[str, Any]:
    """A method as settings that `make_method` reads: its name, all its fields, its base likewise.

    Example:
        >>> described(make_method("mle"))
        {'method': 'mle'}
    """
    inner: Any = getattr(method, "method", None)
    if hasattr(inner, "fit"):  # a wrapper is described by what it wraps
        settings = described(inner)
        changes = getattr(method, "changes", None)
        return {**settings, "training": dict(changes)} if changes else settings
    names = {cls: name for name, cls in METHODS.items()}
    settings: dict[str, Any] = {"method": names.get(type(method), type(method).__name__.lower())}
    for field in fields(method):  # type: ignore[arg-type]
        value = getattr(method, field.name)
        settings[field.name] = described(value) if hasattr(value, "fit") else value
    return settings


def _made(
    settings: Settings, entries: Mapping[str, Settings], name: str, chain: tuple[str, ...]
) -> Method:
    """The method of settings called `name`; `chain` holds the names of entries that led to it."""
    if isinstance(settings, str):
        if settings in chain:
            raise Refusal(
                f"a method is its own base: got {' → '.join((*chain, settings))}, expected a chain "
                "that ends; rename one of the entries"
            )
        if settings in entries:
            return _made(entries[settings], entries, settings, (*chain, settings))
        settings = {"method": settings}
    given = dict(settings or {})
    key = given.pop("method", name)
    changes = given.pop("training", None)
    if key not in METHODS:
        raise Refusal(
            f"unknown method: got {key!r}, expected one of {sorted(METHODS)}; set `method`"
        )
    cls = METHODS[key]
    base: dict[str, Method] = {}
    for field in fields(cls):
        if field.name == "base" and "base" in given:
            base["base"] = _made(given.pop("base"), entries, "", chain)
        elif field.name == "base":
            base["base"] = _default_base(cls, field, given)
    method = _built(cls, given, {}, base)
    return WithTraining(method, changes) if changes else method


def _default_base(cls: type[Method], field: Field[Any], given: Settings) -> Method:
    if field.default_factory is MISSING:
        raise Refusal(
            f"{cls.__name__} needs a base: got {given}, expected `base`, a method's name or "
            "settings; add it"
        )
    return field.default_factory()


def _built(
    cls: type[T], given: Mapping[str, Any], defaults: Mapping[str, Any], base: Mapping[str, Any]
) -> T:
    """A dataclass from a configuration, each value checked against its field's type.

    Args:
        cls: the dataclass.
        given: values by field name, as a configuration file gives them.
        defaults: values of other fields, in place of the dataclass's own.
        base: the `base` of a method, if it has one, as an object.
    """
    names = {field.name for field in fields(cls)} - set(base)  # type: ignore[arg-type]
    if unknown := sorted(set(given) - names):
        raise Refusal(
            f"unknown settings of {cls.__name__}: got {unknown}, expected some of {sorted(names)}; "
            "correct the name"
        )
    if not names:
        return cls(**base)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, skip=set(base))
    parser.set_defaults(dict(defaults))
    try:
        values = parser.instantiate(parser.parse_object(dict(given)))
    except ArgumentError as error:
        reason = " ".join(str(error).split())
        raise Refusal(
            f"settings of {cls.__name__}: got {dict(given)}, expected values of its fields' types; "
            f"{reason}"
        ) from None
    return cls(**vars(values), **base)
