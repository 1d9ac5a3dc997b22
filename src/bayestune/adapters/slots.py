"""LoRA's slots in a PEFT model: finds them, fills them, refuses what cannot be replaced."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from peft.tuners.lora import Embedding, LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper, _ConvNd
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from bayestune.adapters.arrivals import Arrivals, check_arrived, why_silent
from bayestune.adapters.drawn_linear import DrawnLinear, refuse_other_shapes
from bayestune.adapters.locks import base_of, exclusive, marked_as_drawn, refuse_inside_drawn
from bayestune.adapters.spread import shape_of, whole
from bayestune.adapters.wrapped import eagerly, plain_path, runs_compiled, unwrapped
from bayestune.errors import Refusal

ADAPTER = "default"
PREFIX = "base_model.model."
SIDES = ("lora_A", "lora_B")
Kind = TypeVar("Kind", bound=nn.Module)


class Slots:
    """The slots A and B of one adapter, found once; PEFT calls whatever module stands in a slot.

    A slot's name is its layer's path in the base model and ".lora_A" or ".lora_B"; it is the same
    with and without PEFT's and other wrappers, and for every adapter. `layers` holds the LoRA
    layers by path, `heads` what PEFT trains and saves whole beside the adapter
    (`modules_to_save`), and `model` is the given one without a compiler's or parallel wrapper.

    Args:
        model: a model with LoRA layers.
        adapter: the adapter's name; None for the active one.

    Raises:
        Refusal: if `adapter` is None and several adapters are active.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> base = nn.Sequential(nn.Linear(4, 3))
        >>> Slots(get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))).names()
        ['0.lora_A']
    """

    def __init__(self, model: nn.Module, adapter: str | None = None) -> None:
        self.compiled = runs_compiled(model)  # the model, or a part of it
        model = unwrapped(model)
        modules: dict[str, nn.Module] = {}
        for name, module in model.named_modules():
            modules[plain_path(name).removeprefix(PREFIX)] = module
            self.compiled |= runs_compiled(module)
        layers = {path: layer for path, layer in modules.items() if isinstance(layer, LoraLayer)}
        self.model = model
        self.adapter = _active(layers) if adapter is None else adapter
        self.layers = {path: layer for path, layer in layers.items() if self._holds(layer)}
        self.heads: dict[str, nn.Module] = {}
        for path, module in modules.items():
            if isinstance(module, ModulesToSaveWrapper) and self.adapter in module.modules_to_save:
                self.heads[path] = module.modules_to_save[self.adapter]

    def _holds(self, layer: LoraLayer) -> bool:
        return self.adapter in layer.lora_A or self.adapter in layer.lora_embedding_A

    def modules(self) -> dict[str, nn.Module]:
        """The module in each slot, by slot name."""
        modules: dict[str, nn.Module] = {}
        with exclusive(self.model):  # other threads' draws may stand in the slots
            for path, layer in self.layers.items():
                for side in SIDES:
                    if self.adapter in getattr(layer, side):
                        modules[f"{path}.{side}"] = getattr(layer, side)[self.adapter]
        return modules

    def of_kind(self, kind: type[Kind]) -> dict[str, Kind]:
        """The slots that hold a module of some class, by slot name."""
        return {name: slot for name, slot in self.modules().items() if isinstance(slot, kind)}

    def names(
        self, sides: Collection[str] = ("lora_A",), layers: Collection[str] = ()
    ) -> list[str]:
        """Names of the slots of some sides; only of layers with these last names, if given."""
        chosen = []
        for name in self.modules():
            path, side = split_name(name)
            if side in sides and (not layers or path.rpartition(".")[2] in layers):
                chosen.append(name)
        return chosen

    def weights(self) -> dict[str, Tensor]:
        """A (r, k) and B (d, r) by slot name: the mean where a slot is stochastic.

        Raises:
            Refusal: inside `drawn()`.
        """
        modules = self.modules()
        if any(isinstance(slot, DrawnLinear) for slot in modules.values()):
            refuse_inside_drawn(self.model)
        return {n: whole(slot.get_parameter("weight")).detach() for n, slot in modules.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of A and B by slot name."""
        modules = self.modules()
        return {n: tuple(shape_of(slot.get_parameter("weight"))) for n, slot in modules.items()}

    def put(self, modules: Mapping[str, nn.Module]) -> None:
        """Puts modules in slots, by slot name."""
        for name, module in modules.items():
            path, side = split_name(name)
            getattr(self.layers[path], side)[self.adapter] = module

    @contextmanager
    def holding(
        self, stacks: Mapping[str, Tensor], arrivals: Arrivals | None = None
    ) -> Iterator[Arrivals]:
        """Puts S fixed weights, (S, r, k) or (S, d, r) by slot name, in slots for the context.

        Other slots keep their module. A batch must hold S·N rows, draw by draw. Other threads that
        ask this package for passes of the model wait for the end of the context.

        Args:
            stacks: the weights, S the same for all.
            arrivals: of the pass; made if it is not given.

        Raises:
            Refusal: if a name is not a slot of the adapter, its weights have another shape or
                number, or its layer does not apply it as a plain map, such as DoRA's.
        """
        draws = len(next(iter(stacks.values()), ()))
        arrivals = arrivals if arrivals is not None else Arrivals(draws)
        with exclusive(self.model), eagerly(self.compiled):
            kept = self._able_to_hold(stacks)
            refuse_other_shapes(stacks, kept, draws)
            drawn: dict[str, nn.Module] = {}
            for name, stack in stacks.items():
                layer = DrawnLinear.of(stack, kept[name], name, arrivals)
                drawn[name] = layer.train(kept[name].training)
            try:
                self.put(drawn)
                with marked_as_drawn(self.model, self.adapter), _not_merged(self.layers.values()):
                    yield arrivals
            finally:
                self.put(kept)

    def _able_to_hold(self, names: Collection[str]) -> dict[str, nn.Module]:
        """The modules in some slots now; refuses slots that cannot hold draws."""
        modules = self.modules()
        if unknown := sorted(set(names) - set(modules)):
            raise Refusal(
                f"draws for slots the model does not have: got {unknown[:3]}, expected slots of "
                f"the adapter {self.adapter!r}; take draws of a posterior on this model"
            )
        refused = {name: self._reason_of_layer(split_name(name)[0]) for name in names}
        if lines := [f"  {name}: {reason}" for name, reason in refused.items() if reason]:
            raise Refusal(
                f"{len(lines)} of {len(names)} slots cannot hold draws, expected plain LoRA on "
                "linear layers; leave them out:\n" + "\n".join(lines)
            )
        return {name: modules[name] for name in names}

    def replaceable(self, names: Collection[str] | None = None) -> dict[str, nn.Linear]:
        """The plain Linear modules in slots, by slot name; None stands for every A.

        Raises:
            Refusal: if there is no such slot, or PEFT does not apply one once as a plain map;
                each is named with its reason.
        """
        names = [f"{path}.lora_A" for path in self.layers] if names is None else names
        if not self.layers or not names:
            kind = type(self.model).__name__
            raise Refusal(
                f"no LoRA layer holds the adapter {self.adapter!r}: got a {kind}, expected a model "
                "from peft.get_peft_model with LoraConfig; check target_modules and the name"
            )
        paths_and_sides = [split_name(name) for name in names]
        if unknown := [path for path, _ in paths_and_sides if path not in self.layers]:
            raise Refusal(
                f"no such LoRA layer: got {unknown[:3]}, expected paths among "
                f"{list(self.layers)[:3]} …; take names from Slots(model).names()"
            )
        refused = {path: self._reason_to_refuse(path, side) for path, side in paths_and_sides}
        lines = "\n".join(f"  {path}: {reason}" for path, reason in refused.items() if reason)
        if lines:
            count = lines.count("\n") + 1
            raise Refusal(
                f"{count} of {len(names)} LoRA layers cannot be made stochastic, none was "
                f"converted; leave them out of target_modules or use plain LoRA there:\n{lines}"
            )
        modules: dict[str, Any] = self.modules()
        return {name: modules[name] for name in names}

    def _reason_of_layer(self, path: str) -> str | None:
        """Why a layer does not apply what stands in its slots as plain maps."""
        layer: Any = self.layers[path]
        if isinstance(layer, Embedding) or self.adapter in layer.lora_embedding_A:
            return "it adapts an embedding, which looks A up instead of applying it"
        if isinstance(layer, ParamWrapper):
            return "it adapts a bare parameter (target_parameters), which merges A into the weight"
        if isinstance(layer, MultiheadAttention):
            return "nn.MultiheadAttention merges A into the weight in its forward pass"
        if self.adapter in getattr(layer, "lora_variant", {}):
            variant = type(layer.lora_variant[self.adapter]).__name__
            return f"its variant {variant} does not apply A once as a plain map"
        if isinstance(layer, _ConvNd):
            return "it adapts a convolution"
        return None

    def _reason_to_refuse(self, path: str, side: str) -> str | None:
        layer: Any = self.layers[path]
        if reason := self._reason_of_layer(path):
            return reason
        slot = getattr(layer, side)[self.adapter]
        if hasattr(slot, "root_std"):
            return "it has been converted already"
        if type(slot) is not nn.Linear:
            return f"its {side} is a {type(slot).__name__}, not a plain Linear"
        if slot.bias is not None:
            return f"its {side} has a bias (lora_bias), which draws of it would leave out"
        return None


def _active(layers: Mapping[str, LoraLayer]) -> str:
    """The name of the active adapter; PEFT's default name where no layer is adapted."""
    first = next(iter(layers.values()), None)
    active = [ADAPTER] if first is None else list(first.active_adapters)
    if len(active) != 1:
        raise Refusal(
            f"which adapter is meant is not clear: got the active adapters {active}, expected one; "
            "name it with adapter=…"
        )
    return active[0]


def split_name(name: str) -> tuple[str, str]:
    """The two parts of a slot's name: its layer's path and its side, "lora_A" or "lora_B"."""
    path, _, side = name.rpartition(".")
    return path, side


@contextmanager
def _not_merged(layers: Collection[nn.Module]) -> Iterator[None]:
    """Refuses to merge an adapter into the base while draws stand in its slots."""

    def refuse(*_: object, **__: object) -> None:
        raise Refusal(
            "an adapter is not merged inside drawn(): got a merge while slots hold draws, expected "
            "it outside; export_draw(posterior, index, folder), and merge that adapter"
        )

    for layer in layers:
        layer.merge = refuse  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("merge", None)


@contextmanager
def drawn(
    model: nn.Module, weights: Mapping[str, Tensor], adapter: str | None = None
) -> Iterator[None]:
    """Puts S fixed weights in an adapter's slots for the time of the context, `Slots.holding`.

    The model must be called on S·N rows, draw by draw: every model where S is 1, else those whose
    layers see the rows as their first axis. Inside, the adapter is not saved, copied or merged.

    Args:
        model: a model with LoRA layers.
        weights: by slot name, A (S, r, k) and B (S, d, r); slots left out keep the mean.
        adapter: the adapter's name; None for the active one.

    Raises:
        Refusal: if a layer sees other rows than the model was given, or the model was called and
            used none of the weights, or the weights do not fit.
    """
    slots = Slots(model, adapter)
    passes = 0

    def begin(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal passes
        passes += 1
        if not arrivals.called:
            arrivals.silent = arrivals.silent or why_silent(slots.layers, slots.adapter)
        inputs = (*args, *kwargs.values())
        arrivals.rows = next((len(x) for x in inputs if isinstance(x, Tensor) and x.dim()), None)

    with slots.holding(weights) as arrivals:
        # PEFT goes past the hooks of the model inside it, and `generate` past PEFT's
        watched = {slots.model, base_of(model)}
        hooks = [m.register_forward_pre_hook(begin, with_kwargs=True) for m in watched]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
    if passes and weights:
        check_arrived(arrivals, slots.layers, slots.adapter)
