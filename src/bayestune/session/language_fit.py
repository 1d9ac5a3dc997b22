"""A language model's posterior or plain adapter, opened by its folder, without a task."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from bayestune.errors import Refusal
from bayestune.models import LoadedModel
from bayestune.posteriors import artefact_folder, posterior_digest
from bayestune.session.fit import Fit, method_key, put_report
from bayestune.session.opened_model import open_model
from bayestune.session.plain_adapter import (
    PLAIN,
    details_if_any,
    load_posterior_or_adapter,
    name_of_base,
)


@dataclass(frozen=True)
class LanguageFit:
    """A language model's posterior or plain adapter, with its tokenizer.

    Args:
        place: its folder.
        loaded: the base model and its tokenizer.
        fit: the posterior on it, and what its folder says of how it came about.
    """

    place: Path
    loaded: LoadedModel
    fit: Fit

    @classmethod
    def open(cls, folder: Path, model: str | None = None, bf16: bool | None = None) -> Self:
        """Loads a posterior of any origin: of `fit`, of `save_posterior` alone, or PEFT's.

        Args:
            folder: of the artefact.
            model: the base model, where it has moved.
            bf16: whether to predict under autocast; None for as fitted.

        Raises:
            Refusal: if it has a classification head, or does not name its base model.
        """
        place = artefact_folder(folder)
        details = details_if_any(place)
        if details.get("scoring") == "head":
            raise Refusal(
                f"{place} has a classification head, so it writes no text: got scoring='head', "
                "expected a language model's posterior; use `bayestune predict`"
            )
        name = name_of_base(place, details, model)
        loaded = open_model(name, details.get("dtype", "float32"))
        posterior = load_posterior_or_adapter(loaded.model, place)
        put_report(posterior, place)
        posterior.digest = posterior_digest(place)
        return cls(place, loaded, Fit.of(posterior, _completed(details, name), bf16))


def _completed(details: dict[str, Any], base_model: str) -> dict[str, Any]:
    """What a folder says of its fit, with defaults for what only folders of `fit` say."""
    method = method_key(details.get("method", details.get("posterior", PLAIN)))
    defaults: dict[str, Any] = {
        "base_model": base_model,
        "dtype": "float32",
        "scoring": None,
        "train_rows": None,
        "training": {"bf16": False, "seed": 0},
        "questions": {},
    }
    fields = {"method": method, **details.get("fields", {})}
    return {**defaults, **details, "method": method, "fields": fields}
