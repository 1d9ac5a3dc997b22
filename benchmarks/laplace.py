"""Laplace-LoRA's fit over one epoch of training: seconds, and memory above training's peak.

An adapter is trained by maximum likelihood for one epoch, then the curvature around it is taken on the same rows and λ
chosen by the evidence. On the CPU memory is the resident set, sampled; on CUDA what torch has allocated at most. The
result is printed as one JSON object. Bars, for Qwen2.5-Coder-0.5B and 240 rows: 3 times an epoch's time, 3 GB.
"""

import json
import os
import threading
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from bayestune.adapters import Lora
from bayestune.data import load_task
from bayestune.forward import Draws
from bayestune.methods import MLE, Laplace
from bayestune.models import load_model
from bayestune.posteriors import Point
from bayestune.scoring import Scorer, make_scorer
from bayestune.training import Training
from harness import environment

TIME_BAR, MEMORY_BAR_MB = 3.0, 3 * 1024
PERIOD = 0.02  # seconds between two looks at the resident set


def resident_mb() -> float:
    """The process's resident set in MB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextmanager
def peak_of(device: torch.device, into: dict[str, float], name: str) -> Iterator[None]:
    """Writes the peak memory of what runs in the context into `into[name]`, in MB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield
        into[name] = torch.cuda.max_memory_allocated(device) / 2**20
        return
    done, peak = threading.Event(), [resident_mb()]

    def watch() -> None:
        while not done.wait(PERIOD):
            peak[0] = max(peak[0], resident_mb())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    into[name] = max(peak[0], resident_mb())


def tiny() -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A random Llama of two small layers, and a tokenizer of bytes in which the answers' letters are one token."""
    letters = ["Ġ" + letter for letter in "ABCDE"]
    alphabet = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *letters]
    merges = [(letter[0], letter[1]) for letter in letters]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        eos_token_id=1,
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    return LlamaForCausalLM(config), fast


def measure(
    model: nn.Module, scorer: Scorer, options: Namespace, device: torch.device
) -> dict[str, Any]:
    """Seconds and peaks of an epoch, of the Laplace fit, and of predicting some rows."""
    training = Training(
        Lora(rank=options.rank),
        epochs=1,
        batch_size=options.batch_size,
        bf16=options.bf16,
        progress=False,
    )
    method, peaks = (
        Laplace(structure=options.structure, batch_size=options.batch_size),
        dict[str, float](),
    )
    with peak_of(device, peaks, "train"):
        point: Point = MLE().fit(model, scorer, training)
    with peak_of(device, peaks, "laplace"):
        posterior = method.around(point, scorer, bf16=options.bf16)
    batch = scorer.collate(scorer.encode(scorer.task.evaluation[: options.predicted]))
    batch.pop("labels", None)
    seconds = {}
    for name, fitted in (("point", point), ("linearised", posterior)):
        begin = time.perf_counter()
        fitted.logits(batch, Draws(10))
        seconds[name] = time.perf_counter() - begin
    epoch, fit = point.fitted["seconds"], posterior.fitted["laplace_seconds"]
    return {
        "rows": len(scorer.task.train),
        "epoch_seconds": epoch,
        "laplace_seconds": fit,
        "laplace_over_epoch": fit / epoch,
        "laplace_over_epoch_bar": TIME_BAR,
        "train_peak_mb": peaks["train"],
        "laplace_peak_mb": peaks["laplace"],
        "laplace_above_train_mb": max(0.0, peaks["laplace"] - peaks["train"]),
        "laplace_above_train_mb_bar": MEMORY_BAR_MB,
        "predicted_rows": options.predicted,
        "predict_point_seconds": seconds["point"],
        "predict_linearised_seconds": seconds["linearised"],
        "prior_precision": posterior.prior_precision,
        "log_evidence": posterior.fitted["log_evidence"],
    }


def options_of(arguments: Sequence[str] | None) -> Namespace:
    """The command's options."""
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default=None, help="directory or name of a real model")
    parser.add_argument(
        "--tiny", action="store_true", help="a random tiny Llama on the embedded questions instead"
    )
    parser.add_argument("--task", default="arc_easy", help="whose questions")
    parser.add_argument(
        "--data_root", type=Path, default=None, help="folder of the data sets; left out: the Hub"
    )
    parser.add_argument(
        "--scoring", choices=("letter", "text"), default="letter", help="of the options"
    )
    parser.add_argument("--rows", type=int, default=240, help="to train on")
    parser.add_argument("--predicted", type=int, default=8, help="rows to predict")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters on q_proj and v_proj")
    parser.add_argument(
        "--batch_size", type=int, default=4, help="rows of a pass, in training and in the fit"
    )
    parser.add_argument(
        "--structure", choices=("kfac", "diagonal"), default="kfac", help="of the curvature"
    )
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, …")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of torch on the CPU"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of rows")
    options = parser.parse_args(arguments)
    if (options.model is None) != options.tiny:
        parser.error("give either --model or --tiny")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    options = options_of(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    if options.tiny:
        (model, tokenizer), task = tiny(), load_task("everyday")
    else:
        loaded = load_model(options.model)
        model, tokenizer, task = (
            loaded.model,
            loaded.tokenizer,
            load_task(options.task, options.data_root),
        )
    task = task.subset(train=options.rows, evaluation=options.predicted, seed=options.seed)
    scorer = make_scorer(model, tokenizer, task, options.scoring)
    where = environment(device)
    result = measure(model.to(device), scorer, options, device)
    print(
        json.dumps(
            {"benchmark": "laplace", "environment": where, "options": vars(options), **result},
            default=str,
        )
    )


if __name__ == "__main__":
    main()
