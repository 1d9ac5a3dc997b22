"""A Trainer's run: pairs share a draw, passes without gradients are the mean's, logs keep names."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import RemoveColumnsCollator

from bayestune import LastToken
from bayestune.adapters import GaussianLinear, Slots, group_rows
from bayestune.forward import Draws
from bayestune.kl import KLStep
from bayestune.kl.trainer_runs import give_noise_of_its_own
from bayestune.posteriors import TokenNoise
from tiny import converted, tiny_llama

ROWS = [{"chosen": [5, 6, 7], "rejected": [5, 9, 8]}, {"chosen": [5, 3, 4], "rejected": [5, 7, 3]}]


class DataCollatorForPreference:
    """As TRL's: [chosen; rejected]."""

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        sides = [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
        ids = torch.tensor(sides)
        return {"input_ids": ids, "labels": ids}


class Own(DataCollatorForPreference):
    pass


class Watched(Trainer):
    """Notes the first layer's output at the first token, with gradients and without."""

    seen: dict[bool, list[torch.Tensor]]

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        layer = next(module for module in model.modules() if isinstance(module, GaussianLinear))
        self.seen = {True: [], False: []}
        hook = layer.register_forward_hook(
            lambda _, args, output: self.seen[torch.is_grad_enabled()].append(output[:, 0].detach())
        )
        with torch.no_grad():
            model(input_ids=inputs["input_ids"])
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        hook.remove()
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log({**logs, "kl": -1.0} if "loss" in logs else logs, *args, **kwargs)


def trained(model: nn.Module, collator: Any, folder: Path, *more: TrainerCallback) -> Watched:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        remove_unused_columns=False,
    )
    callbacks = [KLStep(final_std=0.1), *more]
    trainer = Watched(model, arguments, collator, ROWS, callbacks=callbacks)
    trainer.train()
    return trainer


@pytest.fixture
def model() -> nn.Module:
    return converted(tiny_llama(), root_std=0.1).train()


def wrapped(collator: Any) -> Any:
    return RemoveColumnsCollator(collator, ["chosen", "rejected"])


@pytest.mark.parametrize("collator", [Own(), wrapped(Own())])
def test_the_sides_of_a_preference_share_their_draw_until_the_run_ends(collator, model, tmp_path):
    trainer = trained(model, collator, tmp_path)
    ((one, two, three, four),) = trainer.seen[True]
    assert torch.equal(one, three)
    assert torch.equal(two, four)
    assert not torch.equal(one, two)
    ids = torch.tensor([[5, 6]]).repeat(4, 1)
    model.train()
    first, _, third, _ = model(input_ids=ids).logits[:, -1]
    assert not torch.equal(first, third)


def test_what_the_user_says_of_rows_goes_before(model, tmp_path):
    group_rows(model, 4, lasting=True)
    trainer = trained(model, DataCollatorForPreference(), tmp_path)
    ((one, two, _, _),) = trainer.seen[True]
    assert torch.equal(one, two)


def test_passes_without_gradients_are_the_means_until_the_run_ends(model, tmp_path):
    trainer = trained(model, DataCollatorForPreference(), tmp_path)
    ((one, two, *_),) = trainer.seen[False]
    assert torch.equal(one, two)
    ids = torch.tensor([[5, 6]]).repeat(2, 1)
    model.train()
    with torch.no_grad():
        first, second = model(input_ids=ids).logits[:, -1]
    assert not torch.equal(first, second)


def test_a_name_in_the_log_stays_the_trainers(model, tmp_path):
    log = trained(model, DataCollatorForPreference(), tmp_path).state.log_history[0]
    assert log["kl"] == -1.0
    assert log["posterior_kl"] > 0
    assert log["std_over_prior"] > 0


def test_processes_that_share_a_seed_have_noise_of_their_own():
    drawn = []
    for process in (0, 1, 2, 1):
        torch.manual_seed(7)
        give_noise_of_its_own(SimpleNamespace(process_index=process))
        drawn.append(torch.randn(3).tolist())
    torch.manual_seed(7)
    assert drawn[0] == torch.randn(3).tolist()
    assert drawn[1] == drawn[3]
    assert len({tuple(noise) for noise in drawn}) == 3


def test_a_copy_by_parameters_names_is_the_mean_without_noise(model):
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    model.add_adapter("copy", model.peft_config["default"])
    for name, value in list(model.named_parameters()):
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".copy.")).data.copy_(value.data)
    assert_close(Slots(model, "copy").weights(), Slots(model, "default").weights())
    assert not Slots(model, "copy").of_kind(GaussianLinear)
    assert Slots(model, "default").of_kind(GaussianLinear)
    with pytest.raises(AttributeError, match="has no attribute `root_std`"):
        model.get_parameter("base_model.model.lm_head.root_std")


class Interrupts(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


def test_a_run_that_is_interrupted_has_ended(model, tmp_path):
    """Later passes drew nothing, and sequences of later batches were the sides of pairs."""
    with pytest.raises(KeyboardInterrupt):
        trained(model, DataCollatorForPreference(), tmp_path, Interrupts())
    ids = torch.tensor([[5, 6]]).repeat(4, 1)
    model.train()
    with torch.no_grad():
        first, _, third, _ = model(input_ids=ids).logits[:, -1]
    assert not torch.equal(first, third)
    with pytest.raises(KeyboardInterrupt):
        trained(model, DataCollatorForPreference(), tmp_path, Interrupts())
    model.train()
    first, _, third, _ = model(input_ids=ids).logits[:, -1]
    assert not torch.equal(first, third)


def test_draws_that_are_asked_for_in_a_run_are_draws(model, tmp_path):
    """TokenNoise draws in passes without gradients, which are the mean's in a Trainer's run."""
    spread = []

    class Asks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            batch = {"input_ids": torch.tensor([[5, 6]])}
            logits = TokenNoise(model, LastToken([3, 4])).logits(batch, Draws(4))
            spread.append(float(logits.std(0).max()))

    trained(model, DataCollatorForPreference(), tmp_path, Asks())
    assert len(spread) == 2
    assert min(spread) > 0
