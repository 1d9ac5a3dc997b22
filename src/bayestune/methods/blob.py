"""BLoB: Bayesian low-rank adaptation by backpropagation; its symmetric form; its authors' noise."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

from torch import nn

from bayestune.adapters import SIDES, Noise, Slots, bayesify
from bayestune.errors import Refusal
from bayestune.kl import Aim, KLStep, Schedule, StdOptimizer
from bayestune.methods.held_out import head_slots
from bayestune.methods.noise_choice import choose_noise
from bayestune.posteriors import Gaussian, TokenNoise
from bayestune.scoring import Scorer
from bayestune.training import Training, fit_adapter


@dataclass(frozen=True)
class BLoB:
    """q(A) = N(M, Ω²) over LoRA's A, with B a point.

    It minimises the free energy −E_q[log p(D | A, B)] + KL[q(A) ‖ p(A)].

    Args:
        prior_std: σ_p, the prior's standard deviation.
        init_root_std: ε; G, the root of the standard deviation Ω, starts uniform on (ε/√2, ε).
        noise: what sees a draw of its own in training: "row", each row of the batch, by signs on
            one E; "independent", each row by an E of its own; "token", each token, as in the
            authors' code.
        final_std: the standard deviation to end at; the KL's step is solved for. None takes half of
            `prior_std`, unless `kl_lr` or bursts are given. "auto" chooses it, `prior_std` with it,
            and how many of the steps are taken, by cross-fitting the training rows, see
            `choose_noise`: that takes as long as four to six fits.
        kl_lr: the KL's learning rate, instead of `final_std`; 0.01 where neither holds.
        schedule: "constant", "early" or "bursts", see `KLStep`; None takes "constant", or the
            authors' "bursts" if `kl_lr` is given.
        std_optimizer: what moves G by the likelihood's gradient: "sgd", at `std_lr`, or "adamw",
            with the rest of the adapter.
        std_lr: the learning rate of G under "sgd", see `KLStep`.
        layers: "all", or "last" for noise on the output head's adapter alone: class logits are
            exactly Gaussian, and any number of draws costs one pass.

    Raises:
        Refusal: if a value is out of range.

    Example:
        >>> BLoB(prior_std=0.4).final_std
        0.2

    Reference:
        Wang, Shi, Han, Metaxas, Wang: BLoB, NeurIPS 2024, https://arxiv.org/abs/2406.11675.
    """

    prior_std: float = 0.2
    init_root_std: float = 0.05
    noise: Noise = "row"
    final_std: float | Literal["auto"] | None = None
    kl_lr: float | None = None
    schedule: Schedule | None = None
    std_optimizer: StdOptimizer = "sgd"
    std_lr: float | None = None
    layers: Literal["all", "last"] = "all"

    sides: ClassVar[tuple[str, ...]] = ("lora_A",)
    share: ClassVar[float] = 0.5  # of prior_std, where final_std is left open

    def __post_init__(self) -> None:
        if self.final_std == "auto":
            self._scaled(1.0)  # refuses what cannot be chosen among
            return
        aim = Aim.of(self.prior_std, self.final_std, self.kl_lr, self.schedule, share=self.share)
        object.__setattr__(self, "final_std", aim.final_std)  # records say what was done
        object.__setattr__(self, "schedule", aim.schedule)
        self._kl_step(0.0)  # refuses what is out of range

    def fit(self, model: nn.Module, scorer: Scorer, training: Training) -> Gaussian:
        """Trains a Gaussian adapter."""
        if self.final_std == "auto":
            method, shortened, choice = choose_noise(self._scaled, model, scorer, training)
            posterior = method.fit(model, scorer, shortened)
            chosen = {"prior_std": method.prior_std, "final_std": method.final_std}
            return replace(posterior, report=posterior.report.plus(**choice, **chosen))
        step = self._kl_step(training.warmup_ratio)
        adapted, report = fit_adapter(model, scorer, training, [step], prepare=self._bayesify)
        return Gaussian(adapted, scorer, report=report)

    def _scaled(self, factor: float) -> Self:
        """The method with the prior's and the final σ scaled: what "auto" chooses among."""
        if self.kl_lr is not None or self.schedule == "bursts":
            raise Refusal(
                f'final_std="auto" solves for the KL\'s rate: got kl_lr={self.kl_lr} and schedule='
                f"{self.schedule!r}, expected neither kl_lr nor bursts; leave them out"
            )
        return replace(self, prior_std=factor * self.prior_std, final_std=None)

    def _kl_step(self, warmup_ratio: float) -> KLStep:
        return KLStep(
            self.prior_std,
            final_std=None if self.final_std == "auto" else self.final_std,
            kl_lr=self.kl_lr,
            schedule=self.schedule,
            warmup_ratio=warmup_ratio,
            std_optimizer=self.std_optimizer,
            std_lr=self.std_lr,
        )

    def _bayesify(self, adapted: nn.Module) -> None:
        slots = Slots(adapted)
        names = head_slots(slots, self.sides) if self.layers == "last" else slots.names(self.sides)
        bayesify(adapted, init_root_std=self.init_root_std, noise=self.noise, slots=names)


@dataclass(frozen=True)
class BBB(BLoB):
    """q(A, B) = N(M_A, Ω_A²) N(M_B, Ω_B²): BLoB with noise and KL step in both slots of each layer.

    The paper argues for the asymmetric form with what this symmetric one shows: B starts at 0 with
    noise, so early gradients of A are noise too, and the product of two noises is not Gaussian.
    Noise in B acts through A's own: with σ in both, an entry of W gets about (α/r)·√r·σ². So
    `final_std` is a tenth of `prior_std` where it is left open.

    Reference:
        Blundell, Cornebise, Kavukcuoglu, Wierstra: Weight uncertainty in neural networks, ICML
        2015, https://arxiv.org/abs/1505.05424; a baseline in BLoB's table 1.
    """

    sides: ClassVar[tuple[str, ...]] = SIDES
    share: ClassVar[float] = 0.1


@dataclass(frozen=True)
class AuthorsBLoB(BLoB):
    """BLoB with new noise for every token (`noise="token"`), in training and in every drawn pass.

    The KL has the authors' bursts at their rate by default. A draw is not a function of the row, so
    it cannot be exported; docs/fidelity.md says what that changes.

    Reference:
        BLoB's public code, https://github.com/Wang-ML-Lab/bayesian-peft.
    """

    noise: Noise = "token"
    schedule: Schedule | None = "bursts"

    def fit(self, model: nn.Module, scorer: Scorer, training: Training) -> TokenNoise:  # type: ignore[override]
        """Trains as BLoB; draws are noisy passes, see `TokenNoise`."""
        gaussian = super().fit(model, scorer, training)
        return TokenNoise(gaussian.model, scorer, adapter=gaussian.adapter, report=gaussian.report)
