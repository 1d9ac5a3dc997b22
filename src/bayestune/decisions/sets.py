"""Split-conformal sets of options: the right one is inside with the stated probability.

Over exchangeable rows P(y ∈ set) ≥ 1 − α, on average over held-out and new rows: not within each
class, nor for the rows that one picks afterwards. A set may be empty (LAC; APS with a tie-break),
which says that no option is likely enough.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from bayestune.errors import Refusal

SetKind = Literal["lac", "aps", "aps_inclusive"]


@dataclass(frozen=True)
class SetRule:
    """A fitted rule: which options go into a row's set.

    Args:
        kind: "lac" has the smallest sets on average; "aps" grows with the row's difficulty, with a
            random tie-break; "aps_inclusive" has none, so it needs no contents, and covers
            more than stated.
        coverage: 1 − α.
        quantile: q, the largest score that an option in the set may have.
        rows: n, the held-out rows.
    """

    kind: SetKind
    coverage: float
    quantile: float
    rows: int

    def sets(
        self, probabilities: Tensor, options: Tensor | None = None, ties: Tensor | None = None
    ) -> Tensor:
        """The options in each row's set, (N, C) bool.

        Args:
            probabilities: p̄ (N, C).
            options: (N, C) bool, the options that each row has; those of positive probability
                unless given.
            ties: u (N,), `row_uniforms` of the rows' contents; for "aps" alone.
        """
        exists = probabilities > 0 if options is None else options
        return (option_scores(probabilities, self.kind, ties) <= self.quantile) & exists


def row_uniforms(contents: Sequence[str]) -> Tensor:
    """A number in [0, 1) for each row, (N,), made of its content: a row always gets the same set.

    >>> row_uniforms(["Is the sky blue?"])
    tensor([0.9715], dtype=torch.float64)
    """
    digests = [hashlib.sha256(f"ties\0{content}".encode()).digest() for content in contents]
    values = [int.from_bytes(digest[:6], "big") / 2**48 for digest in digests]
    return torch.tensor(values, dtype=torch.float64)


def option_scores(probabilities: Tensor, kind: SetKind, ties: Tensor | None = None) -> Tensor:
    """How badly each option fits, (N, C): options of small scores enter the set first.

    LAC: 1 − p̄(c). APS: Σ of the p̄ of the options before c in falling order, + (1 − u) p̄(c); u = 0
    without a tie-break.

    Args:
        probabilities: p̄ (N, C).
        kind: see `SetRule`.
        ties: u (N,), for "aps" alone.

    Raises:
        Refusal: on an unknown kind, or "aps" without ties.
    """
    if kind not in get_args(SetKind):
        raise Refusal(f"got sets {kind!r}; expected one of {get_args(SetKind)}; choose one")
    p = probabilities.double()
    if kind == "lac":
        return 1 - p
    if kind != "aps":
        share = torch.ones(len(p), dtype=p.dtype)
    elif ties is not None:
        share = 1 - ties.double()
    else:
        raise Refusal('got "aps" without ties; expected (N,) numbers; give row_uniforms(contents)')
    order = torch.sort(p, dim=-1, descending=True, stable=True).indices
    before = torch.empty_like(p).scatter_(-1, order, p.gather(-1, order).cumsum(-1)) - p
    return before + share[:, None] * p


def check_coverage(coverage: float) -> None:
    """Refuses a coverage that is not between 0 and 1."""
    if not 0 < coverage < 1:
        raise Refusal(f"got coverage={coverage}; expected a share between 0 and 1; 0.9 is common")


def check_set_rows(rows: int, coverage: float, share: float = 1.0) -> None:
    """Refuses a coverage that so many rows can never support: n < (1 − α)/α.

    Args:
        rows: n, those that sets are fitted on.
        coverage: 1 − α, in (0, 1).
        share: of all held-out rows that these are.
    """
    check_coverage(coverage)
    if _place(rows, coverage) <= rows:
        return
    needed = math.ceil(coverage / (1 - coverage) - 1e-9)
    total = math.ceil(needed / share - 1e-9)
    most = math.floor(1000 * rows / (rows + 1)) / 1000
    raise Refusal(
        f"got {rows} rows for sets of coverage {coverage:g}; expected {needed} or more; give "
        f"{total} held-out rows in all, or ask for {most:g} or less"
    )


def _place(rows: int, coverage: float) -> int:
    """⌈(n + 1)(1 − α)⌉, the place of the quantile among n scores, from 1; above n there is none."""
    return math.ceil((rows + 1) * coverage - 1e-9)


def fit_sets(
    probabilities: Tensor,
    labels: Tensor,
    kind: SetKind = "lac",
    coverage: float = 0.9,
    ties: Tensor | None = None,
) -> SetRule:
    """The rule whose sets hold the right option with probability `coverage` or more.

    q is the ⌈(n + 1)(1 − α)⌉-th smallest score of the right options.

    Args:
        probabilities: p̄ (N, C) of held-out rows that nothing was chosen on.
        labels: y (N,).
        kind: see `SetRule`.
        coverage: 1 − α, in (0, 1).
        ties: u (N,), for "aps".

    Raises:
        Refusal: if there are too few rows for the coverage: n < (1 − α)/α.

    >>> p = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.2, 0.8]])
    >>> fit_sets(p, torch.tensor([0, 0, 1, 1]), coverage=0.75).quantile  # the fourth of 4
    0.39999...

    References:
        LAC: Sadinle, Lei, Wasserman (2019), https://arxiv.org/abs/1609.00451; APS: Romano, Sesia,
        Candès (2020), https://arxiv.org/abs/2006.02544.
    """
    rows = len(labels)
    check_set_rows(rows, coverage)
    place = _place(rows, coverage)
    of_labels = option_scores(probabilities, kind, ties).gather(-1, labels[:, None])[:, 0]
    # Sums of probabilities in another order differ in the last bits, and must not lose an option.
    quantile = of_labels.sort().values[place - 1].item() + 1e-12
    return SetRule(kind, coverage, quantile, rows)
