"""The beginning and the end of a Trainer's run: rows, seeds, and warnings."""

import logging
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from bayestune.adapters import RowGroups, found_passes
from bayestune.kl.run import HOOKED, KLRun

logger = logging.getLogger(__name__)

_SEED_STEP = 0x9E3779B97F4A7C15  # between processes; far beyond the seeds that people choose

_ALLOWED_SHORT = 0.95  # a σ of at least this share of final_std counts as there

# TRL's collators of batches [chosen; rejected]
_PAIR_COLLATORS = ("DataCollatorForPreference", "DataCollatorForVisionPreference")


def chosen_then_rejected(sequences: int) -> list[int]:
    """The row of each sequence of a batch [chosen; rejected]: both sides of a pair are one row."""
    pairs = (sequences + 1) // 2
    return [sequence % pairs for sequence in range(sequences)]


def say_several_batches(args: Any) -> None:
    """Warns that a Trainer without a launcher gives each GPU a batch (DataParallel)."""
    if getattr(args, "n_gpu", 1) > 1:
        logger.warning(
            "the Trainer gives each of %d GPUs a batch (DataParallel), so a step has %d rows "
            "instead of %d; start the script with accelerate launch, or let it see one GPU "
            "(CUDA_VISIBLE_DEVICES=0)",
            args.n_gpu,
            args.train_batch_size * args.gradient_accumulation_steps,
            args.per_device_train_batch_size * args.gradient_accumulation_steps,
        )


def rows_of_a_step(args: Any, state: Any) -> int:
    """The rows of an optimiser step over all processes.

    The batch size is that of the state, because `auto_find_batch_size` may have lowered it.
    """
    batch = state.train_batch_size or args.train_batch_size
    return batch * args.gradient_accumulation_steps * args.world_size


def begin_run(args: Any, model: nn.Module, dataloader: Any) -> None:
    """Tells the model's passes that a Trainer's run begins and how its batches make rows."""
    give_noise_of_its_own(args)
    say_several_batches(args)
    passes = found_passes(model)
    if passes is not None:
        groups = RowGroups(row_of=chosen_then_rejected) if _has_pairs(dataloader) else None
        passes.begin_run(groups, _is_running(sys._getframe()))


def _is_running(frame: FrameType | None) -> Callable[[], bool]:
    """A function that tells whether the `Trainer.train` that has led to a frame is still running.

    A Trainer has no callback for a run that ends by an error or an interrupt. A loop that calls the
    callback without a Trainer is taken to run until it calls `on_train_end`.
    """
    while frame is not None and not _is_train(frame):
        frame = frame.f_back
    if frame is None:
        return lambda: True
    thread = threading.get_ident()

    def is_running() -> bool:
        current = sys._current_frames().get(thread)
        while current is not None and current is not frame:
            current = current.f_back
        return current is not None

    return is_running


def _is_train(frame: FrameType) -> bool:
    return frame.f_code.co_name == "train" and isinstance(frame.f_locals.get("self"), Trainer)


def give_noise_of_its_own(args: Any) -> None:
    """Seeds the generator of each process but the first anew, differently.

    A Trainer gives all processes one seed, so rows in the same place of their batches would share
    their noise. A resumed run restores its generators from the checkpoint after this.
    """
    if args.process_index > 0:
        torch.manual_seed((torch.initial_seed() + args.process_index * _SEED_STEP) % 2**63)


def end_run(args: Any, model: nn.Module, run: KLRun, final_std: float | None) -> None:
    """Tells the model's passes that the run has ended; warns if σ is short of `final_std`."""
    run.name_unreached()
    complete = run.is_over and not run.owed
    if final_std is not None and (not complete or args.load_best_model_at_end):
        _say_short(run, final_std)
    passes = found_passes(model)
    if passes is not None:
        passes.end_run()


def say_unfinished(model: nn.Module) -> None:
    """Warns, once, that a posterior is saved before all KL steps are taken, outside a Trainer.

    In a training loop of the user's own, saving is the only sign that training has ended. Steps are
    left if `total_steps` counted batches instead of optimiser steps, or if another optimiser is
    stepped than the one that was attached.

    Args:
        model: the model that is saved.
    """
    passes = found_passes(model)
    if passes is None or passes.are_in_run():
        return
    modules = {id(module) for module in model.modules()}
    for runs in list(HOOKED.values()):
        for run in list(runs):
            is_on_model = modules.issuperset(map(id, run.layers.values()))
            if is_on_model and not run.is_over and not run.is_said_unfinished:
                _say_unfinished(run)


def _say_unfinished(run: KLRun) -> None:
    run.is_said_unfinished = True
    logger.warning(
        "the posterior is saved after %d of the KL's %d steps, with a standard deviation of %.3g "
        "so far; if the training is over, give attach as total_steps the number of the optimiser's "
        "steps (with accumulation fewer than batches), and the optimiser that is stepped",
        run.step,
        len(run.plan.rates),
        run.state()["std_over_prior"] * run.prior_std,
    )


def _say_short(run: KLRun, final_std: float) -> None:
    std = run.state()["std_over_prior"] * run.prior_std
    if std < _ALLOWED_SHORT * final_std:
        logger.warning(
            "the standard deviation is %.3g at the end of the run, not final_std (%.3g): the run "
            "took %d of the KL's %d steps, or its best checkpoint is an earlier one; "
            'schedule="early" takes nine tenths of the KL by a third of the steps, and '
            "PosteriorScale finds a factor on held-out rows",
            std,
            final_std,
            run.step,
            len(run.plan.rates),
        )


def _has_pairs(dataloader: Any) -> bool:
    collator = getattr(dataloader, "collate_fn", None)
    collator = getattr(collator, "data_collator", collator)  # a Trainer may wrap it
    return any(kind.__name__ in _PAIR_COLLATORS for kind in type(collator).__mro__)
