"""Parsed options → the objects that they stand for.

`args` are throughout the options of one command, as jsonargparse parses them.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

from jsonargparse import Namespace

from bayestune.data import Task
from bayestune.errors import Refusal
from bayestune.methods import METHODS, Method
from bayestune.session import Session, TaskOptions

T = TypeVar("T")


def build(cls: type[T], args: Namespace, **settled: Any) -> T:
    """Makes a dataclass of the options that are called like its fields.

    Args:
        cls: the dataclass. A field that is no option keeps its default.
        args: the options.
        settled: fields that do not come from the options, whatever those say.
    """
    names = [field.name for field in fields(cls) if field.name in args]  # type: ignore[arg-type]
    from_options = {name: args[name] for name in names}
    return cls(**from_options | settled)


def open_session(args: Namespace, options: TaskOptions, task: Task) -> Session:
    """Opens the session to fit in, with or without progress bars.

    Args:
        args: with `--model`, `--dtype` and whether to show progress.
        options: of the task.
        task: as it was loaded with them.
    """
    session = Session.open(args.model, options, args.dtype, task=task)
    return replace(session, progress=args.progress)


def chosen_methods(names: Sequence[str], args: Namespace) -> dict[str, Method]:
    """The methods of these names with their options; `--base` replaces the base of those with one.

    Args:
        names: keys of `METHODS`.
        args: the options: of each method, and `--base`.

    Returns:
        The methods by name, in this order.

    Raises:
        Refusal: if a name is unknown, or `--base` is given and no method has a base.
    """
    methods = {name: _method(name, args) for name in names}
    base = args.get("base")
    with_base = [name for name, method in methods.items() if hasattr(method, "base")]
    if base and not with_base:
        raise Refusal(
            f"--base is for methods that build on another: got {base!r} for {list(names)}, "
            "expected one such as tfb; leave it out"
        )
    if base:
        for name in with_base:
            methods[name] = replace(methods[name], base=_method(base, args))  # type: ignore[type-var]
    return methods


def _method(name: str, args: Namespace) -> Method:
    """One method with its options; with its defaults under a command that has none for it."""
    if name not in METHODS:
        raise Refusal(f"unknown method: got {name!r}, expected one of {sorted(METHODS)}")
    return args[name] if name in args else METHODS[name]()
