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


def _unused(
    *_: Any, **__: Any
) -> Tensor:  # given to the Trainer so that it counts the rows of an optimiser step
    raise AssertionError("compute_loss is overridden")


class ClassTrainer(Trainer):
    """A Trainer whose loss is the mean over rows of −log p(answer), exact under gradient accumulation."""

    def __init__(
        self, model: nn.Module, scorer: Scorer, *, group_by_length: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(
            model=model, data_collator=self._collate, compute_loss_func=_unused, **kwargs
        )  # type: ignore[arg-type]
        self.scorer, self.group_by_length, self.watch = scorer, group_by_length, FiniteLoss()
        self.add_callback(self.watch)

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's own, or one whose batches hold rows of like length.

        The Trainer's sampler for that wants `input_ids` in each row, and draws its order from the global generator,
        which a resumed run finds in another state: it would go on with other rows.
        """
        if not self.group_by_length:
            return super().get_train_dataloader()
        rows: Any = self.train_dataset
        size, lengths = self.args.train_batch_size, [row["length"] for row in rows]
        sampler = LengthGroups(lengths, size, self.args.seed, lambda: int(self.state.epoch or 0))
        pin = self.args.dataloader_pin_memory
        return self.accelerator.prepare(
            DataLoader(rows, size, sampler=sampler, collate_fn=self._collate, pin_memory=pin)
        )

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
        loss = F.cross_entropy(logits, labels, reduction="sum") / (
            num_items_in_batch or len(labels)
        )
        self.watch.see(loss, self.state, self.args)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, {"logits": logits}) if return_outputs else loss
