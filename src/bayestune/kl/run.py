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
    as_one,
    check_gradients,
    check_synchronised,
    without_gradient,
)

logger = logging.getLogger(__name__)

HOOKED: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # by optimiser
_SOON = 20  # steps after which what has not happened is told


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
        self._hooked: Any = None
        self._gradients: dict[str, Tensor] = {}  # of G: they wait for the optimiser
        self._before: list[tuple[Tensor, Tensor]] = []  # G's that the optimiser moves for nothing
        self._unreached: list[str] | None = None
        self._taken = 0
        self._idle = 0
        self._scale = 1.0
        self._overflowed = False
        self._is_at_mean = False
        self.is_said_unfinished = False

    def hook(self, optimizer: torch.optim.Optimizer) -> None:
        """Puts the hooks on.

        Raises:
            Refusal: if another run acts on the same layers in this optimiser's steps.
        """
        others = HOOKED.setdefault(optimizer, weakref.WeakSet())
        taken: set[int] = set()
        for other in others:
            taken.update(map(id, other.layers.values()))
        if taken.intersection(map(id, self.layers.values())):
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
        """Waits for the gradients, which an optimiser with a closure asks for inside its step."""
        closure = kwargs["closure"] if "closure" in kwargs else (*args, None, None)[1]
        if closure is None:
            self.before_step(optimizer)
            return None

        def evaluated() -> Any:
            loss = closure()
            self.before_step(optimizer)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": evaluated}
        return (args[0], evaluated, *args[2:]), kwargs

    def before_step(self, optimizer: Any) -> None:
        """Keeps the gradients of G from the optimiser; checks the first ones."""
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
        """Says once that later gradients are the mean's: the model stayed in evaluation mode."""
        learnt = {name: one for name, one in self.layers.items() if one.root_std.requires_grad}
        if self._is_at_mean or not learnt or any(one.training for one in learnt.values()):
            return
        self._is_at_mean = len(without_gradient(self.layers, learnt)) == len(learnt)
        if self._is_at_mean:
            logger.warning(
                "the model is in evaluation mode in step %d of the run: its gradients are the "
                "mean's, as without noise, while the KL takes the standard deviation on; call "
                "model.train() after each evaluation",
                self.step + 1,
            )

    def _pass_over(self, root_std: Tensor, gradient: Tensor) -> None:
        """Has the optimiser step on a spread G at gradient 0, which is undone afterwards.

        FSDP's checkpoints want a state of the optimiser for every parameter that is trained.
        """
        root_std.grad = torch.zeros_like(gradient)
        self._before.append((root_std, root_std.detach().clone()))

    def after_step(self, optimizer: Any) -> None:
        """Takes the step, unless the optimiser has skipped its own."""
        with torch.no_grad():
            for root_std, value in self._before:
                root_std.copy_(value)
                root_std.grad = None
        self._before = []
        if not self._overflowed:
            sizes, std_rate = self.planned()
            if sizes:
                with iterates_following(self._moved(), optimizer, self._remainders):
                    self._move(sizes, std_rate / self._scale)
            self.count_step()

    def planned(self) -> tuple[list[float], float]:
        """The KL steps η to take now, none once the plan is over, and G's rate."""
        if self.is_over:
            return [], 0.0
        return [*self.owed, self.plan.size(self.step)], float(self.plan.std_rates[self.step])

    def count_step(self) -> None:
        """Counts a step that was taken."""
        self._taken += 1
        if self._taken == _SOON:
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
            yield from (one for one in layer.parameters() if one.requires_grad)

    @torch.no_grad()
    def _move(self, sizes: Sequence[float], std_rate: float) -> None:
        """The KL steps η, and G's step on the likelihood."""
        values = self._remainders
        layers: list[Any] = list(self.layers.values())
        means = [layer.weight for layer in layers if layer.weight.requires_grad]
        roots = {n: one.root_std for n, one in self.layers.items() if one.root_std.requires_grad}
        mean_values = [values.value(mean) for mean in means]
        root_values = {name: values.value(root) for name, root in roots.items()}
        for size in sizes:
            kl_step_(mean_values, list(root_values.values()), size, self.prior_std)
        if self._gradients:
            moved = [root_values[name] for name in self._gradients]
            gradients = [
                g.to(v.dtype) for g, v in zip(self._gradients.values(), moved, strict=True)
            ]
            torch._foreach_add_(moved, gradients, alpha=-std_rate)
            self._gradients = {}
        for mean, value in zip(means, mean_values, strict=True):
            values.put(mean, value)
        for name, root in roots.items():
            values.put(root, root_values[name])

    def name_unreached(self) -> None:
        """Says once which layers have had no gradient so far."""
        if self._unreached:
            logger.warning(
                "no gradient has reached %d of the %d Gaussian layers in %d steps, such as %s: "
                "no batch called them (unused experts?), or they are in evaluation mode; the KL "
                "alone moves them",
                len(self._unreached),
                len(self.layers),
                self._taken,
                min(self._unreached),
            )
            self._unreached = []

    @property
    def is_hooked(self) -> bool:
        """Whether it acts in an optimiser's steps."""
        return bool(self._handles)

    @property
    def is_over(self) -> bool:
        """Whether its plan has no step left."""
        return self.step >= len(self.plan.rates)

    def go_on(self, plan: Plan, progress: Progress) -> None:
        """Goes on with a plan from where another run of it was."""
        self.plan = plan
        self.step, self.kl_time, owed = progress
        self.owed = list(owed)

    def catch_up(self, step: int) -> None:
        """Goes on to a step, and keeps the KL of those that the optimiser skipped for the next."""
        for skipped in range(self.step, min(step, len(self.plan.rates))):
            self.owed.append(self.plan.size(skipped))
        self._idle = self._idle + 1 if self.step < step else 0
        self.step = max(self.step, step)
        if self._idle == _SOON:
            logger.warning(
                "the optimiser has taken none of the last %d steps (overflow under a gradient "
                "scaler, or an optimiser that does not call its hooks): the KL waits for it",
                _SOON,
            )

    def state(self) -> dict[str, float]:
        """What is logged, see `KLStep.state_of_kl`."""
        kl = 0.0
        mean_std = 0.0
        for layer in self.layers.values():
            std = as_one(layer.root_std).square()
            kl += float(kl_divergence(as_one(layer.weight), std, self.prior_std))
            mean_std += float(std.mean()) / len(self.layers)
        last = min(max(self.step - 1, 0), len(self.plan.rates) - 1)
        return {
            "kl_time": self.kl_time,
            "std_over_prior": mean_std / self.prior_std,
            "kl": kl,
            "kl_weight": float(self.plan.weights[last]),
            "kl_lr": float(self.plan.rates[last]),
        }
