"""`transformers.Trainer` with the mean loss over rows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import Trainer

from bayestune.scoring import Scorer
from bayestune.training.callbacks import FiniteLoss
from bayestune.training.length_groups import LengthGroups


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """−Σ_n Σ_c y_nc log p_nc of logits (N, C); y are indices (N,) or probabilities (N, C).

    Probabilities may be 0 where a logit is -inf, of an option that a row does not have.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0, -torch.inf]])
        >>> round(summed_loss(logits, torch.tensor([[0.5, 0.5, 0.0]])).item(), 4)
        0.6931
    """
    if labels.dim() == 1:
        return F.cross_entropy(logits, labels, reduction="sum")
    log_p = logits.log_softmax(-1)
    labels = labels[:, : log_p.shape[1]]
    return -(labels * log_p.masked_fill(labels == 0, 0.0)).sum()


class ClassTrainer(Trainer):
    """Minimises the mean over rows of −log p(answer), exactly under gradient accumulation.

    A row with a "target" has −Σ_c target_c log p_c instead.
    """

    def __init__(self, model: nn.Module, scorer: Scorer, **kwargs: Any) -> None:
        super().__init__(
            model=model,  # type: ignore[arg-type]
            data_collator=self._collate,
            compute_loss_func=F.cross_entropy,  # not called: makes the Trainer count a step's rows
            **kwargs,
        )
        self.scorer = scorer
        self.finite_loss = FiniteLoss()
        self.add_callback(self.finite_loss)

    def _collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self.scorer.collate(rows)
        if "target" in rows[0]:
            batch["labels"] = torch.stack([row["target"] for row in rows])
        # The Trainer counts `labels[:, 1:]` for causal models unless it is told what to count.
        return {**batch, "shift_labels": torch.zeros(len(rows), dtype=torch.long)}

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
        loss = summed_loss(logits, labels) / num_rows
        self.finite_loss.record(loss, self.state, self.args)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, {"logits": logits}) if return_outputs else loss


class LengthGroupedTrainer(ClassTrainer):
    """A `ClassTrainer` whose batches hold rows of like length, the same ones in a resumed run.

    The Trainer's own sampler wants `input_ids` in each row and uses the global generator.
    """

    def get_train_dataloader(self) -> DataLoader:  # noqa: D102
        rows: Any = self.train_dataset
        size = self.args.train_batch_size
        order = LengthGroups(
            lengths=[row["length"] for row in rows],
            batch_size=size * self.args.world_size,  # of all processes together
            seed=self.args.seed,
            epoch=lambda: int(self.state.epoch or 0),
        )
        pin = self.args.dataloader_pin_memory
        loader = DataLoader(rows, size, sampler=order, collate_fn=self._collate, pin_memory=pin)
        return self.accelerator.prepare(loader)
