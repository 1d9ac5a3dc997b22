"""Parsed options → the objects that they stand for."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

from jsonargparse import Namespace

from bayestune.errors import Refusal
from bayestune.methods import METHODS, Method

T = TypeVar("T")


def built(cls: type[T], options: Namespace, **more: Any) -> T:
    """A dataclass of the options called like its fields; `more` goes before them."""
    names = [field.name for field in fields(cls) if field.name in options]  # type: ignore[arg-type]
    return cls(**{name: options[name] for name in names} | more)


def chosen_methods(names: Sequence[str], options: Namespace) -> dict[str, Method]:
    """The methods of these names with their options; `--base` replaces the base of those with one.

    Raises:
        Refusal: if a name is unknown, or `--base` is given and no method has a base.
    """
    methods = {name: _method(name, options) for name in names}
    base = options.get("base")
    with_base = [name for name, method in methods.items() if hasattr(method, "base")]
    if base and not with_base:
        raise Refusal(
            f"--base is for methods that build on another: got {base!r} for {list(names)}, "
            "expected one such as tfb; leave it out"
        )
    for name in with_base if base else ():
        methods[name] = replace(methods[name], base=_method(base, options))  # type: ignore[type-var]
    return methods


def _method(name: str, options: Namespace) -> Method:
    if name not in METHODS:
        raise Refusal(f"unknown method: got {name!r}, expected one of {sorted(METHODS)}")
    return options[name] if name in options else METHODS[name]()
