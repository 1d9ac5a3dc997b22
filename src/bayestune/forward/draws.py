"""Which draws of a posterior to take, how many at once, and in which precision."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from bayestune.errors import NUMBER, Refusal

Batch = Mapping[str, Tensor]
_SEEDING = threading.RLock()


class ClassLogits(Protocol):
    """Maps a model and a batch of N rows to class logits (N, C): a scorer, when it is called."""

    def __call__(self, model: nn.Module, batch: Batch, /) -> Tensor:
        """Class logits (N, C)."""
        ...


@dataclass(frozen=True)
class Draws:
    """Which draws of a posterior, and how many rows may go through the model at once.

    Args:
        count: S; 0 means the mean.
        seed: of the set; draw i of one seed is always the same function.
        max_rows: bound on the rows (draws times rows) of one pass; None for none.
        max_tokens: bound on the tokens (draws times rows times length) of one pass, for memory. A
            single draw of the batch always runs, whatever the bounds.
        first: the index of the first draw: `Draws(5, first=5)` goes on where `Draws(5)` ended.
        shared_prefix: m; an approximation in which the mean adapter reads all but the last m tokens
            of the prompt, once for all draws, see `SharedPrefix`. None for exact draws.
        bf16: whether passes run under bfloat16 autocast; False leaves the caller's setting.
    """

    count: int = 10
    seed: int = 0
    max_rows: int | None = None
    max_tokens: int = 16384
    first: int = 0
    shared_prefix: int | None = None
    bf16: bool = False

    def __post_init__(self) -> None:
        if self.count not in NUMBER or self.first not in NUMBER:
            raise Refusal(
                f"draws are counted from 0: got count={self.count}, first={self.first}, expected "
                "neither to be negative; count=0 means the mean"
            )

    @property
    def indices(self) -> range:
        """The indices of the draws in the set."""
        return range(self.first, self.first + self.count)

    def at_once(self, inputs: Batch) -> int:
        """How many draws of this batch run in one pass, at least 1."""
        main = main_input(inputs)
        tokens = main if "input_ids" in inputs else main[..., 0]
        bound = min(self.count, self.max_tokens // max(1, tokens.numel()))
        if self.max_rows is not None:
            bound = min(bound, self.max_rows // len(main))
        return max(1, bound)

    def precision(self, model: nn.Module) -> AbstractContextManager[Any]:
        """A context of bfloat16 autocast on the model's device if `bf16`, else an empty one."""
        return torch.autocast(device_of(model).type, torch.bfloat16) if self.bf16 else nullcontext()


class Chunk(NamedTuple):
    """Some of the draws, which run in one pass."""

    start: int  # the place of the first one among all that are asked for
    size: int
    stacks: Mapping[str, Tensor]  # weights by slot name, (S, r, k) for A and (S, d, r) for B

    def one(self, place: int) -> "Chunk":
        """One of these draws alone."""
        stacks = {name: stack[place : place + 1] for name, stack in self.stacks.items()}
        return Chunk(self.start + place, 1, stacks)


def main_input(inputs: Batch) -> Tensor:
    """A batch's ids (N, T), embeddings (N, T, width), or the first tensor there is.

    Raises:
        Refusal: if the batch has no tensor with rows, or no row or token.
    """
    for name in ("input_ids", "inputs_embeds", *inputs):
        value = inputs.get(name)
        if isinstance(value, Tensor) and value.dim():
            _refuse_empty(name, value)
            return value
    raise Refusal(
        f"a batch without rows: got {sorted(inputs)}, expected tensors whose leading axis is the "
        "rows; give what the tokenizer or the scorer's collate returns"
    )


def _refuse_empty(name: str, value: Tensor) -> None:
    if not all(value.shape[:2]):
        raise Refusal(
            f"a batch without anything to read: got {name} of shape {tuple(value.shape)}, expected "
            "a row or more, of a token or more; leave it out"
        )


@contextmanager
def seeded(model: nn.Module, seed: int, index: int) -> Iterator[None]:
    """Seeds torch's generators by (seed, index) for the time of the context.

    The generators are the whole process's, so other threads that ask for this wait.
    """
    device = device_of(model)
    devices = [] if device.type == "cpu" else [device]
    with _SEEDING, torch.random.fork_rng(devices, device_type=device.type):
        torch.manual_seed(1_000_003 * seed + index)
        yield


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter, found without a walk of the module tree."""
    for parameter in model._parameters.values():
        if parameter is not None:
            return parameter.device
    return device_of(next(c for c in model.children() if next(c.parameters(), None) is not None))


def on_device(inputs: Batch, model: nn.Module) -> dict[str, Tensor]:
    """The batch on the model's device."""
    device = device_of(model)
    moved = {}
    for name, value in inputs.items():
        moved[name] = value.to(device) if isinstance(value, Tensor) else value
    return moved


def stacked(draw: Callable[[int, int], Mapping[str, Tensor]], draws: Draws) -> dict[str, Tensor]:
    """The weights of all draws by slot name, (S, r, k) for A and (S, d, r) for B.

    Args:
        draw: maps an index and a seed to one draw's weights by slot name.
        draws: which.
    """
    return stacked_weights([draw(index, draws.seed) for index in draws.indices])


def stacked_weights(weights: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The weights of S draws, each by slot name, as stacks (S, …) by slot name."""
    stacks = {}
    for name in weights[0]:
        stacks[name] = torch.stack([of_draw[name] for of_draw in weights])
    return stacks


def repeat_rows(inputs: Batch, times: int) -> dict[str, Tensor]:
    """The batch `times` over along the leading axis: (N, …) to (times·N, …), copy by copy."""
    return {name: repeated(value, times) for name, value in inputs.items()}


def repeated(value: Tensor, times: int) -> Tensor:
    """A tensor `times` over along its leading axis; anything without one stays as it is."""
    if not isinstance(value, Tensor) or not value.dim():
        return value
    return value.repeat(times, *[1] * (value.dim() - 1))
