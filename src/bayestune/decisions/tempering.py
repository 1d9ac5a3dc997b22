"""The average over draws at a temperature, and the temperature that held-out rows ask for."""

import math

import torch
from torch import Tensor

from bayestune.errors import Refusal

# T from 1/8 to 20: log T in steps of 1/8.
LOG_GRID = torch.arange(-16, 25, dtype=torch.float64) / 8


class NotFiniteLogits(Refusal):
    """Raised for logits that are NaN or infinite: their rows have no prediction."""


def check_draws(logits: Tensor, labels: Tensor | None = None) -> None:
    """Refuses logits that nothing can be computed from, and labels that are not the rows' own.

    Args:
        logits: of draws, (S, N, C), -inf where a row has fewer options.
        labels: y (N,); None if there are none to check.

    Raises:
        NotFiniteLogits: if they hold NaN or ∞, or a row has no option.
        Refusal: if the logits are not (S, N, C) and non-empty, or a label is not one of its row's
            options.
    """
    shape = tuple(logits.shape)
    if logits.ndim != 3 or 0 in shape:
        raise Refusal(f"got logits of shape {shape}; expected (S, N, C); put the draws first")
    if logits.isnan().any() or (logits == -torch.inf).all(-1).any():
        got = "got logits with NaN or rows of no option"
        raise NotFiniteLogits(f"{got}; expected numbers; look at the fit, or its precision")
    if (logits == torch.inf).any():
        got = "got infinite logits"
        raise NotFiniteLogits(f"{got}; expected numbers; look at the fit, or its precision")
    if labels is None:
        return
    if labels.shape != shape[1:2]:
        got = f"labels of shape {tuple(labels.shape)} for {shape[1]} rows"
        raise Refusal(f"got {got}; expected (N,); give one label a row")
    inside = (labels >= 0) & (labels < shape[2])
    at_label = logits[0].gather(-1, labels.clamp(0, shape[2] - 1).long()[:, None])[:, 0]
    bad = (~inside | (at_label == -torch.inf)).nonzero()[:, 0].tolist()
    if bad:
        got = f"label {int(labels[bad[0]])} at row {bad[0]}"
        raise Refusal(f"got {got}; expected one of the row's options; look at the labels")


def log_predictive(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log 1/S Σ_s softmax(f_s/T), (N, C), in float64.

    Args:
        logits: f (S, N, C), -inf where a row has fewer options.
        temperature: T > 0.

    >>> log_predictive(torch.zeros(3, 1, 2)).exp()
    tensor([[0.5000, 0.5000]], dtype=torch.float64)
    """
    draws = (logits.double() / temperature).log_softmax(-1)
    return draws.logsumexp(0) - math.log(len(logits))


def predictive_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean negative log-likelihood of the average over draws, in nats, ().

    −mean_n log 1/S Σ_s softmax(f_s)_{n, y_n}.

    Args:
        logits: f (S, N, C).
        labels: y (N,).
    """
    index = labels.expand(len(logits), -1)[..., None]  # (S, N, 1)
    log_p = logits.log_softmax(-1).gather(-1, index)[..., 0]  # of the labels, (S, N)
    return -(log_p.logsumexp(0) - math.log(len(logits))).mean()


def best_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature of the least NLL, by LBFGS on log T within [−5, 5].

    T = argmin −mean log 1/S Σ_s softmax(f_s/T)_y.

    Args:
        logits: f (S, N, C), -inf where a row has fewer options.
        labels: y (N,).

    Example:
        >>> logits = torch.tensor([[[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [4.0, 0.0]]])
        >>> round(best_temperature(logits, torch.tensor([0, 0, 0, 1])), 3)  # 4/T = log 3
        3.641

    Reference:
        Guo, Pleiss, Sun, Weinberger: On calibration of modern neural networks, ICML 2017, section
        4.2, https://arxiv.org/abs/1706.04599.
    """
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    logits = logits.double().nan_to_num(neginf=-1e30)  # -inf times a gradient of 0 would be NaN
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = predictive_nll(logits * torch.exp(-log_temperature), labels)
            loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    bounded = min(max(log_temperature.item(), -5.0), 5.0)  # separable rows have no finite optimum
    return math.exp(bounded)


def compared_temperature(logits: Tensor, labels: Tensor) -> float:
    """`best_temperature` clamped to the ends of `LOG_GRID`, on which temperatures are compared.

    Rows whose choices are all right, or all wrong, ask for T = 0 or ∞: for probabilities of 0 and
    1, which so few rows do not justify, or for equal ones.
    """
    least, most = LOG_GRID[[0, -1]].exp().tolist()
    return min(max(best_temperature(logits, labels), least), most)


def nll_by_temperature(logits: Tensor, labels: Tensor) -> Tensor:
    """Each row's −log 1/S Σ_s softmax(f_s/T)_y at every T of the grid, (G, N), in nats.

    One table serves the temperatures of all folds: a fold's T is the grid's point with the least
    sum over the other folds' columns.
    """
    index = labels.expand(len(logits), -1)[..., None]  # (S, N, 1)
    logits = logits.double()
    losses = []
    for log_temperature in LOG_GRID.tolist():
        log_probabilities = (logits * math.exp(-log_temperature)).log_softmax(-1)
        log_p = log_probabilities.gather(-1, index)[..., 0]  # of the labels, (S, N)
        losses.append(math.log(len(logits)) - log_p.logsumexp(0))
    return torch.stack(losses)
