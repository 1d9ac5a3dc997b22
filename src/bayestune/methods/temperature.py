"""One scalar on the logits, or on the standard deviation, fitted on held-out rows."""

from dataclasses import dataclass, field, replace

from torch import nn

from bayestune.decisions import best_temperature, predictive_nll
from bayestune.errors import COUNT, NOT_NEGATIVE, NUMBER, Refusal, check_fields
from bayestune.forward import Draws
from bayestune.methods.blob import BLoB
from bayestune.methods.held_out import held_out_logits, held_out_rows
from bayestune.methods.method import Method
from bayestune.methods.mle import MLE
from bayestune.methods.unlabelled import unlabelled_of
from bayestune.methods.workplace import refuse_parts_of
from bayestune.posteriors import Gaussian, Tempered
from bayestune.scoring import Scorer
from bayestune.training import Meter, Training


@dataclass(frozen=True)
class Temperature:
    """The base's posterior with its logits over T, T fitted on the task's held-out rows.

    Args:
        base: whose posterior is tempered.
        draws: S of the fit, for a base that is not a point.

    Reference:
        Guo et al., see `best_temperature`.
    """

    base: Method = field(default_factory=MLE)
    draws: int = 10

    def __post_init__(self) -> None:
        check_fields(self, draws=NUMBER)

    def fit(self, model: nn.Module, scorer: Scorer, training: Training) -> Tempered:
        """Fits the base, then T."""
        refuse_parts_of("Temperature")
        rows = held_out_rows(scorer, "Temperature", unlabelled_of(self.base, scorer))
        posterior = self.base.fit(model, scorer, training)
        meter = Meter()
        draws = Draws(self.draws, bf16=training.bf16)
        temperature = best_temperature(*held_out_logits(posterior, scorer, rows, draws))
        report = posterior.report.plus(**meter.read(), temperature=temperature)
        return Tempered(posterior, temperature, report)


@dataclass(frozen=True)
class PosteriorScale:
    """The base's Gaussian with one factor c on Ω, the c of a grid with the least held-out NLL.

    Args:
        base: a method whose posterior is Gaussian.
        draws: S of the search.
        factors: the grid of c; 0 is the mean.
        shared_prefix: m of the search, and of the predictions that the factor is meant for.
    """

    base: Method = field(default_factory=BLoB)
    draws: int = 10
    factors: tuple[float, ...] = (0.0, 0.25, 0.354, 0.5, 0.707, 1.0, 1.414, 2.0, 2.83, 4.0)
    shared_prefix: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, draws=COUNT, shared_prefix=COUNT)
        wrong = [factor for factor in self.factors if factor not in NOT_NEGATIVE]
        if wrong or not self.factors:
            raise Refusal(
                f"PosteriorScale.factors: got {list(self.factors)}, expected one or more, each "
                f"{NOT_NEGATIVE.said}; correct them"
            )

    def fit(self, model: nn.Module, scorer: Scorer, training: Training) -> Gaussian:
        """Fits the base, then the factor."""
        refuse_parts_of("PosteriorScale")
        rows = held_out_rows(scorer, "PosteriorScale", unlabelled_of(self.base, scorer))
        posterior = self.base.fit(model, scorer, training)
        if not isinstance(posterior, Gaussian):
            raise Refusal(
                f"PosteriorScale scales a Gaussian: got a {type(posterior).__name__} from its "
                "base, expected BLoB, BBB, TFB or IVON"
            )
        meter = Meter()
        roots = {name: slot.root_std.detach().clone() for name, slot in posterior.layers().items()}
        draws = Draws(self.draws, shared_prefix=self.shared_prefix, bf16=training.bf16)
        losses = {}
        for factor in self.factors:
            posterior.scale_std(roots, factor)
            logits, labels = held_out_logits(posterior, scorer, rows, draws)
            losses[factor] = predictive_nll(logits.double(), labels).item()
        best = min(losses, key=losses.__getitem__)
        posterior.scale_std(roots, best)
        report = posterior.report.plus(**meter.read(), scale=best, nll_by_scale=losses)
        return replace(posterior, report=report)
