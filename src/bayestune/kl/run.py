"""A run's KL steps: what happens before and after each step of the optimiser it is hooked to."""

import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bayestune.adapters import GaussianLinear
from bayestune.errors import Refusal
from bayestune.kl.closed_form import kl_divergence, kl_step_
from bayestune.kl.iterates import hooks_around, iterates_following
from bayestune.kl.plan import Plan
from bayestune.kl.remainders import Remainders
from bayestune.kl.surroundings import (
    check_gradients,
    check_synchronised,
    whole_value,
    with_trained_std,
    without_gradient,
)

logger = logging.getLogger(__name__)

HOOKED: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # by optimiser
_PATIENCE = 20  # steps without a gradient, or without a step, before a warning


class Progress(NamedTuple):
    """How far a run is: the steps done, the KL time τ, and the sizes η of steps that are owed."""

    step: int
    kl_time: float
    owed: Sequence[float] = ()


class KLRun:
    """Takes the KL's steps of a plan on Gaussian layers, with G's steps on the likelihood.

    Args:
        layers: by slot name.
        plan: the steps' sizes.
        prior_std: σ_p.
        progress: where it starts.
        moves_root_std: whether G follows the likelihood here, instead of in the optimiser.
    """

    def __init__(
        self,
        layers: Mapping[str, GaussianLinear],
        plan: Plan,
        prior_std: float,
        progress: Progress,
        *,
        moves_root_std: bool,
    ) -> None:
        self.layers = layers
        self.plan = plan
        self.prior_std = prior_std
        self.step = progress.step
        self.kl_time = progress.kl_time
        self.owed = list(progress.owed)
        self.moves_root_std = moves_root_std
        self._handles: list[Any] = []
        self._hooked: Any = None  # a weak reference to the optimiser
        self._gradients: dict[str, Tensor] = {}  # of G, withheld from the optimiser in its step
        self._to_undo: list[tuple[Tensor, Tensor]] = []  # G and its value before that step
        self._unreached: list[str] | None = None  # layers without a gradient; None before a step
        self._steps_taken = 0
        self._steps_skipped = 0  # by the optimiser, in a row
        self._scale = 1.0  # of the gradients
        self._overflowed = False
        self._is_at_mean = False
        self.is_said_unfinished = False

    def hook(self, optimizer: torch.optim.Optimizer) -> None:
        """Puts the hooks on.

        Raises:
            Refusal: if another run acts on the same layers in this optimiser's steps.
        """
        others = HOOKED.setdefault(optimizer, weakref.WeakSet())
        theirs: set[int] = set()
        for other in others:
            theirs.update(map(id, other.layers.values()))
        if theirs.intersection(map(id, self.layers.values())):
            raise Refusal(
                "a KL step acts on these layers already: got a second one on the same optimiser, "
                "expected one; give a Trainer one KLStep, or detach() the first"
            )
        others.add(self)
        self._hooked = weakref.ref(optimizer)
        self._remainders = Remainders(optimizer)
        self._handles = hooks_around(optimizer, self._before_gradients, self.after_step)
        for layer in self.layers.values():
            layer.takes_kl = True
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            first = next(iter(self.layers.values()))
            self._handles.append(first.register_forward_pre_hook(self._before_pass))

    def unhook(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        optimizer = self._hooked and self._hooked()
        if optimizer is not None:
            HOOKED[optimizer].discard(self)

    def _before_pass(self, *_: Any) -> None:
        self._handles.pop().remove()  # once
        check_synchronised(self.layers)

    def _before_gradients(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
        """A pre-hook that calls `before_step` once a closure, if given, has made the gradients."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0]: optimiser
        if closure is None:
            self.before_step(optimizer)
            return None

        def then_before_step() -> Any:
            loss = closure()
            self.before_step(optimizer)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": then_before_step}
        return (args[0], then_before_step, *args[2:]), kwargs

    def before_step(self, optimizer: Any) -> None:
        """Withholds the gradients of G from the optimiser; checks the first ones."""
        # a fused optimiser unscales the gradients, and skips the step, by itself
        scale = getattr(optimizer, "grad_scale", None)
        self._scale = 1.0 if scale is None else float(scale)
        overflow = getattr(optimizer, "found_inf", None)
        self._overflowed = overflow is not None and bool(overflow)
        if self._unreached is None and not self._overflowed:
            self._unreached = check_gradients(self.layers)
        elif self._unreached and not self._overflowed:
            self._unreached = without_gradient(self.layers, self._unreached)
        self.say_at_mean()
        self._gradients = {}
        for name, layer in self.layers.items():
            gradient = layer.root_std.grad
            if gradient is not None and self.moves_root_std:
                self._gradients[name] = gradient
                layer.root_std.grad = None
                if hasattr(gradient, "full_tensor"):
                    self._pass_over(layer.root_std, gradient)

    def say_at_mean(self) -> None:
        """Warns, once, that gradients are the mean's: the model stayed in evaluation mode."""
        trained = with_trained_std(self.layers)
        if self._is_at_mean or not trained or any(one.training for one in trained.values()):
            return
        self._is_at_mean = len(without_gradient(self.layers, trained)) == len(trained)
        if self._is_at_mean:
            logger.warning(
                "the model is in evaluation mode in step %d of the run: its gradients are the "
                "mean's, as without noise, while the KL takes the standard deviation on; call "
                "model.train() after each evaluation",
                self.step + 1,
            )

    def _pass_over(self, root_std: Tensor, gradient: Tensor) -> None:
        """Has the optimiser step on a sharded G at gradient 0; `after_step` undoes that.

        FSDP's checkpoints expect an optimiser state for every parameter that is trained.
        """
        root_std.grad = torch.zeros_like(gradient)
        self._to_undo.append((root_std, root_std.detach().clone()))

    def after_step(self, optimizer: Any) -> None:
        """Takes the KL's step, unless the optimiser has skipped its own."""
        with torch.no_grad():
            for root_std, value in self._to_undo:
                root_std.copy_(value)
                root_std.grad = None
        self._to_undo = []
        if not self._overflowed:
            sizes, std_rate = self.planned()
            if sizes:
                with iterates_following(self._moved(), optimizer, self._remainders):
                    self._move(sizes, std_rate / self._scale)
            self.count_step()

    def planned(self) -> tuple[list[float], float]:
        """The KL steps η to take now, none once the plan is over, and G's learning rate."""
        if self.is_over:
            return [], 0.0
        return [*self.owed, self.plan.size(self.step)], float(self.plan.std_rates[self.step])

    def count_step(self) -> None:
        """Counts a step that was taken."""
        self._steps_taken += 1
        if self._steps_taken == _PATIENCE:
            self.name_unreached()
        planned = len(self.plan.rates)
        if self.step == planned:
            logger.warning(
                "the KL's plan of %d steps is over, but the run goes on: from here nothing holds "
                "the mean to the prior, and the standard deviation stays as it is (unless "
                "std_optimizer is adamw); give the KL step the total_steps of the whole run",
                planned,
            )
        self.kl_time += sum(self.planned()[0])
        self.owed = []
        self.step += 1

    def _moved(self) -> Iterator[nn.Parameter]:
        """The parameters that a step moves."""
        for layer in self.layers.values():
            for parameter in layer.parameters():
                if parameter.requires_grad:
                    yield parameter

    @torch.no_grad()
    def _move(self, sizes: Sequence[float], std_rate: float) -> None:
        """Takes the KL steps η, and G's step on the likelihood, in float32."""
        values = self._remainders
        layers: list[Any] = list(self.layers.values())
        means = [layer.weight for layer in layers if layer.weight.requires_grad]
        trained = with_trained_std(self.layers)
        mean_values = [values.value(mean) for mean in means]
        root_values = {name: values.value(layer.root_std) for name, layer in trained.items()}
        for size in sizes:
            kl_step_(mean_values, list(root_values.values()), size, self.prior_std)
        if self._gradients:
            with_gradient = [root_values[name] for name in self._gradients]
            gradients = [self._gradients[n].to(root_values[n].dtype) for n in self._gradients]
            torch._foreach_add_(with_gradient, gradients, alpha=-std_rate)
            self._gradients = {}
        for mean, value in zip(means, mean_values, strict=True):
            values.set_value(mean, value)
        for name, layer in trained.items():
            values.set_value(layer.root_std, root_values[name])

    def name_unreached(self) -> None:
        """Warns, once, of layers that have had no gradient so far."""
        if self._unreached:
            logger.warning(
                "no gradient has reached %d of the %d Gaussian layers in %d steps, such as %s: "
                "no batch called them (unused experts?), or they are in evaluation mode; the KL "
                "alone moves them",
                len(self._unreached),
                len(self.layers),
                self._steps_taken,
                min(self._unreached),
            )
            self._unreached = []

    @property
    def is_hooked(self) -> bool:
        """Whether it is hooked to an optimiser."""
        return bool(self._handles)

    @property
    def is_over(self) -> bool:
        """Whether no step of its plan is left."""
        return self.step >= len(self.plan.rates)

    def go_on(self, plan: Plan, progress: Progress) -> None:
        """Goes on with a plan from the progress of another run."""
        self.plan = plan
        self.step, self.kl_time, owed = progress
        self.owed = list(owed)

    def catch_up(self, step: int) -> None:
        """Moves on to the Trainer's step; the KL of steps that the optimiser skipped is owed."""
        for skipped in range(self.step, min(step, len(self.plan.rates))):
            self.owed.append(self.plan.size(skipped))
        self._steps_skipped = self._steps_skipped + 1 if self.step < step else 0
        self.step = max(self.step, step)
        if self._steps_skipped == _PATIENCE:
            logger.warning(
                "the optimiser has taken none of the last %d steps (overflow under a gradient "
                "scaler, or an optimiser that does not call its hooks): the KL waits for it",
                _PATIENCE,
            )

    def state(self) -> dict[str, float]:
        """What `KLStep.state_of_kl` returns."""
        kl = 0.0
        mean_std = 0.0
        for layer in self.layers.values():
            std = whole_value(layer.root_std).square()
            kl += float(kl_divergence(whole_value(layer.weight), std, self.prior_std))
            mean_std += float(std.mean()) / len(self.layers)
        last = min(max(self.step - 1, 0), len(self.plan.rates) - 1)
        return {
            "kl_time": self.kl_time,
            "std_over_prior": mean_std / self.prior_std,
            "kl": kl,
            "kl_weight": float(self.plan.weights[last]),
            "kl_lr": float(self.plan.rates[last]),
        }
