"""A stock Trainer with the two lines, under any launcher: FOLDER OPTIONS (JSON); writes what came.

Each process writes `rank-N.json`: losses, σ of each layer, sums of a draw, logits of four draws.
"""

import contextlib
import faulthandler
import json
import os
import sys
from pathlib import Path
from unittest import mock

import torch
from as_accelerators import pretend, without_compiling
from transformers import Trainer, TrainingArguments

from bayestune import Draws, save_posterior
from bayestune.adapters import bayesify
from bayestune.kl import KLStep
from bayestune.posteriors import Gaussian
from tiny import adapted, tiny_llama

STEPS = 6
ROWS = 8  # of a step, all processes together


def rows(count=48):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 400, (count, 6), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def last_logits(model, batch):
    return model(input_ids=batch["input_ids"]).logits[:, -1, :5]


@contextlib.contextmanager
def noise(kind):
    """Under "fixed" all rows see A = M + Ω, in however many processes: a trajectory to compare."""
    if kind != "fixed":
        yield
        return

    randn = torch.randn
    randint = torch.randint

    def ones(*shape, generator=None, dtype=None, device=None, **more):
        if generator is not None:  # held draws
            return randn(*shape, generator=generator, dtype=dtype, device=device, **more)
        return torch.ones(*shape, dtype=dtype, device=device)

    def no_bits(*given, generator=None, dtype=torch.long, device=None, **more):
        if generator is not None:  # a bootstrap
            return randint(*given, generator=generator, dtype=dtype, device=device, **more)
        return torch.zeros(given[-1], dtype=dtype, device=device)

    with mock.patch("torch.randn", ones), mock.patch("torch.randint", no_bits):
        yield


def trained(folder, options, resume=None):
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=STEPS,
        per_device_train_batch_size=options.get("rows", ROWS),
        learning_rate=0.01,
        lr_scheduler_type="linear",
        warmup_steps=1,
        max_grad_norm=0.1,  # below what the gradients have
        weight_decay=0.1,
        logging_steps=1,
        save_strategy="steps" if "save_steps" in options else "no",
        save_steps=options.get("save_steps", STEPS),
        seed=1,
        report_to=[],
        use_cpu=not options.get("sharded"),
        disable_tqdm=True,
        bf16=options.get("bf16", False),
        deepspeed=options.get("deepspeed"),
    )
    torch.manual_seed(5)
    model = adapted(tiny_llama())
    bayesify(model)
    step = KLStep(final_std=0.1, std_lr=options.get("std_lr", 2.0), **options.get("kl", {}))
    trainer = Trainer(model, arguments, train_dataset=rows(), callbacks=[step])
    with noise(options.get("noise")):
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def sums(draw):
    return {name: weight.double().sum().item() for name, weight in draw.items()}


def report_of(trainer, folder):
    history = [line for line in trainer.state.log_history if "loss" in line]
    posterior = Gaussian(trainer.model, last_logits)
    draw = posterior.draw(0)
    batch = {"input_ids": torch.stack([row["input_ids"] for row in rows(4)])}
    save_posterior(posterior, folder / "posterior")
    trainer.save_model(str(folder / "saved"))
    return {
        "losses": [line["loss"] for line in history],
        "kl": [line["kl"] for line in history],
        "std": [line["std_over_prior"] for line in history],
        "draw": sums(draw),
        "logits": posterior.logits(batch, Draws(4)).tolist(),
    }


def main():
    folder = Path(sys.argv[1])
    options = json.loads(sys.argv[2])
    if options.get("sharded"):
        pretend()
    if "deepspeed" in options:
        without_compiling()
    trainer = trained(folder, options)
    report = report_of(trainer, folder)
    if "save_steps" in options:
        checkpoint = folder / "checkpoints" / f"checkpoint-{options['save_steps']}"
        again = trained(folder, options, resume=str(checkpoint))
        report["resumed"] = sums(Gaussian(again.model, last_logits).draw(0))
    rank = trainer.args.process_index
    (folder / f"rank-{rank}.json").write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    # processes that wait for each other say where
    faulthandler.dump_traceback_later(float(os.environ.get("PATIENCE", "200")), exit=True)
    main()
