"""`transformers.Trainer` with the mean loss over rows."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import Trainer

from bayestune.scoring import Scorer
from bayestune.training.callbacks import FiniteLoss
from bayestune.training.length_groups import LengthGroups


def _unused(*_: Any, **__: Any) -> Tensor:
    """With a loss function of its own the Trainer counts the rows of an optimiser step."""
    raise AssertionError("compute_loss is overridden")


class ClassTrainer(Trainer):
    """Minimises the mean over rows of −log p(answer), exactly under gradient accumulation."""

    def __init__(self, model: nn.Module, scorer: Scorer, **kwargs: Any) -> None:
        super().__init__(
            model=model,  # type: ignore[arg-type]
            data_collator=self._collate,
            compute_loss_func=_unused,
            **kwargs,
        )
        self.scorer = scorer
        self.finite_loss = FiniteLoss()
        self.add_callback(self.finite_loss)

    def _collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self.scorer.collate(rows)
        # The Trainer counts `labels[:, 1:]` for causal models unless it is told what to count.
        return {**batch, "shift_labels": batch["labels"]}

    def compute_loss(  # noqa: D102
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        labels = inputs["labels"]
        logits = self.scorer(model, inputs)
        num_rows = num_items_in_batch or len(labels)
        loss = F.cross_entropy(logits, labels, reduction="sum") / num_rows
        self.finite_loss.record(loss, self.state, self.args)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, {"logits": logits}) if return_outputs else loss


class LengthGroupedTrainer(ClassTrainer):
    """A `ClassTrainer` whose batches hold rows of like length.

    The Trainer's own sampler for that wants `input_ids` in each row, and draws its order from the
    global generator, which a resumed run finds in another state: it would go on with other rows.
    """

    def get_train_dataloader(self) -> DataLoader:  # noqa: D102
        rows: Any = self.train_dataset
        sampler = LengthGroups(
            [row["length"] for row in rows],
            self.args.train_batch_size,
            self.args.seed,
            epoch=lambda: int(self.state.epoch or 0),
        )
        loader = DataLoader(
            rows,
            self.args.train_batch_size,
            sampler=sampler,
            collate_fn=self._collate,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)
