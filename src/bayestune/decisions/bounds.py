"""What k errors among n rows say about the error rate: tails, bounds, how many rows are needed."""

import math
from dataclasses import dataclass

from bayestune.errors import Refusal

_ROUNDING = 1e-12  # by how much rounding may lift a p-value that is exactly δ


@dataclass(frozen=True)
class Promise:
    """Among the rows acted on, the mean loss is at most `risk`, with probability `confidence`.

    The probability is over the held-out rows that the threshold was chosen on.

    Args:
        risk: α, an error rate in (0, 1); a cost, as a share of the greatest, if errors have costs.
        confidence: 1 − δ, in [0.5, 1).
    """

    risk: float = 0.05
    confidence: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.risk < 1:
            got = f"risk={self.risk}"
            raise Refusal(f"got {got}; expected a rate between 0 and 1; 0.05 is one error in 20")
        if not 0.5 <= self.confidence < 1:
            got = f"confidence={self.confidence}"
            raise Refusal(f"got {got}; expected 0.5 to less than 1; 0.9 is customary")

    @property
    def delta(self) -> float:
        """δ, the probability that the promise is broken."""
        return 1 - self.confidence

    def shared_by(self, count: int) -> "Promise":
        """The promise that each of `count` must keep so that all hold at once (Bonferroni)."""
        return Promise(self.risk, 1 - self.delta / count)

    def kept_at(self, p_value: float) -> bool:
        """Whether p ≤ δ."""
        return p_value <= self.delta + _ROUNDING


def binomial_p_value(errors: int, rows: int, risk: float) -> float:
    """P(Bin(n, α) ≤ k), the probability of k errors or fewer if the error rate is α.

    Args:
        errors: k.
        rows: n; no rows give 1.
        risk: α.

    >>> round(binomial_p_value(0, 45, 0.05), 4)
    0.0994

    Reference: Geifman, El-Yaniv (2017), lemma 3.1, https://arxiv.org/abs/1705.08500
    """
    if errors >= rows:
        return 1.0
    log_odds = math.log(risk) - math.log1p(-risk)
    log_term = rows * math.log1p(-risk)
    total = math.exp(log_term)
    for count in range(errors):
        log_term += math.log((rows - count) / (count + 1)) + log_odds
        total += math.exp(log_term)
    return min(1.0, total)


def bounded_loss_p_value(losses: float, rows: int, risk: float) -> float:
    """The Hoeffding–Bentkus p-value of n losses in [0, 1] with mean r̂.

    min(1, exp(−n h(min(r̂, α), α)), e · P(Bin(n, α) ≤ ⌈n r̂⌉)), h the binary relative entropy.

    Args:
        losses: n r̂, their sum.
        rows: n; no rows give 1.
        risk: α.

    Reference: Bates et al. (2021), section 3.1, https://arxiv.org/abs/2101.02703
    """
    if rows == 0:
        return 1.0
    mean = min(losses / rows, risk)
    entropy = relative_entropy(mean, risk)
    ceiling = math.ceil(losses - 1e-9)
    return min(1.0, math.exp(-rows * entropy), math.e * binomial_p_value(ceiling, rows, risk))


def p_value(losses: float, rows: int, risk: float, *, bounded: bool) -> float:
    """The p-value of a sum of losses among n rows: Hoeffding–Bentkus if `bounded`, else binomial.

    Args:
        losses: their sum.
        rows: n.
        risk: α.
        bounded: whether losses may lie between 0 and 1; if not, each is 0 or 1.
    """
    if bounded:
        return bounded_loss_p_value(losses, rows, risk)
    return binomial_p_value(round(losses), rows, risk)


def risk_bound(losses: float, rows: int, confidence: float, *, bounded: bool = False) -> float:
    """The least α that n rows with these losses rule out: an upper bound on the mean loss.

    For errors it is Clopper and Pearson's one-sided bound, P(Bin(n, α) ≤ k) = 1 − confidence.

    Args:
        losses: k errors, or a sum of losses in [0, 1].
        rows: n; no rows give 1.
        confidence: of the bound.
        bounded: whether losses may lie between 0 and 1.

    >>> round(risk_bound(0, 45, 0.9), 4)
    0.0499
    """
    low = 0.0
    high = 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if p_value(losses, rows, middle, bounded=bounded) <= 1 - confidence:
            high = middle
        else:
            low = middle
    return high


def rows_needed(promise: Promise, errors: int = 0) -> int:
    """How many rows must be acted on to keep a promise with k errors among them.

    Without an error it is ⌈log δ / log(1 − α)⌉; with fewer rows nothing can ever be promised.

    >>> [rows_needed(Promise(risk, 0.9), k) for risk in (0.05, 0.01) for k in (0, 1)]
    [45, 77, 230, 388]
    """
    low = errors
    high = max(1, 2 * errors)
    while not _enough(promise, errors, high):
        low = high
        high *= 2
    while high - low > 1:
        middle = (low + high) // 2
        if _enough(promise, errors, middle):
            high = middle
        else:
            low = middle
    return high


def relative_entropy(mean: float, risk: float) -> float:
    """h(r, α) = r log(r/α) + (1 − r) log((1 − r)/(1 − α)), in nats, for r in [0, 1)."""
    of_losses = mean * math.log(mean / risk) if mean > 0 else 0.0
    of_the_rest = (1 - mean) * math.log((1 - mean) / (1 - risk))
    return of_the_rest + of_losses


def rows_for_rate(rate: float, promise: Promise) -> int | None:
    """How many rows acted on suffice if their error rate is `rate`; None if it is α or more.

    n = ⌈−log δ / h(r, α)⌉ by Hoeffding's bound, for errors and costs alike.

    Args:
        rate: r in [0, 1), errors or mean loss among the rows acted on.
        promise: α and 1 − δ.

    >>> [rows_for_rate(rate, Promise(0.05, 0.9)) for rate in (0.0, 0.02, 0.05)]
    [45, 190, None]
    """
    if rate >= promise.risk:
        return None
    return math.ceil(-math.log(promise.delta) / relative_entropy(rate, promise.risk))


def _enough(promise: Promise, errors: int, rows: int) -> bool:
    return promise.kept_at(p_value(errors, rows, promise.risk, bounded=False))


def smallest_risk(rows: int, confidence: float) -> float:
    """The smallest risk that n rows without a single error support, 1 − δ^(1/n).

    Args:
        rows: n.
        confidence: 1 − δ.
    """
    return 1 - (1 - confidence) ** (1 / rows)
