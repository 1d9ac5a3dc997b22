"""Does final_std="auto" choose well? Against 0.1, on held-out parts of train.

    python -m studies.noise_choice run --model MODEL --data_root DATA [--tasks TASK …] [--seeds 1 …]
    python -m studies.noise_choice table

For each task and seed: cross-fitting on the training rows tries its candidates; then each of these
is fitted on all training rows, and ten draws of it are asked about held-out rows, which neither the
fits nor the choice have seen. A record is a candidate's mean losses, cross-fitted and held out, and
the rows' own; one stands for maximum likelihood. Records go to results/noise_choice/records.jsonl;
a run goes on where it stopped.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayestune.adapters import Lora, detach
from bayestune.decisions import best_temperature
from bayestune.forward import Draws
from bayestune.methods import MLE, BLoB
from bayestune.methods.held_out import held_out_logits
from bayestune.methods.method import Method
from bayestune.methods.noise_choice import Candidate, CrossFit, choose
from bayestune.runtime import versions
from bayestune.session import Session, TaskOptions
from bayestune.training import Training
from bayestune.whole_files import read_json_lines, write_json_lines

RECORDS = Path(__file__).parents[1] / "results/noise_choice/records.jsonl"
TASKS = ("arc_easy", "openbookqa", "arc_challenge", "everyday")
HELD_OUT, LABELLED = 200, 60  # rows to judge on, and the first of them for a temperature
# of the demo, but for the noise
TRAINING = Training(lora=Lora(targets=("q_proj", "v_proj")), steps=144, learning_rate=1e-3)


def opened(model: str, data_root: Path | None, task: str, seed: int) -> Session:
    """A task's session with 96 training rows and its held-out rows."""
    chosen = TaskOptions(
        task=task,
        data_root=None if task == "everyday" else data_root,
        scoring="text",
        holdout=0.5,
        train_rows=96,
        evaluation_rows=1,
        subset_seed=seed,
    )
    session = Session.open(model, chosen)
    held_out = session.task.held_out[:HELD_OUT]
    return session.on(replace(session.task, held_out=held_out))


def row_losses(method: Method, session: Session, training: Training, draws: int) -> dict[str, Any]:
    """A full fit's nats on each held-out row, its accuracy, and its NLL under a fitted temperature.

    The temperature is fitted on the first sixty rows and judged on the others.
    """
    posterior = method.fit(session.loaded.model, session.scorer, training)
    rows = session.task.held_out
    logits, labels = held_out_logits(posterior, session.scorer, rows, Draws(draws, bf16=True))
    detach(posterior.model)
    losses = nats(logits.double(), labels)
    temperature = best_temperature(logits[:, :LABELLED], labels[:LABELLED])
    tempered = nats(logits[:, LABELLED:].double() / temperature, labels[LABELLED:])
    right = logits.double().softmax(-1).mean(0).argmax(-1) == labels
    return {
        "nll": losses.mean().item(),
        "accuracy": right.double().mean().item(),
        "nll_of_last": losses[LABELLED:].mean().item(),
        "tempered_nll_of_last": tempered.mean().item(),
        "rows": [round(loss, 5) for loss in losses.tolist()],
    }


def nats(logits: Tensor, labels: Tensor) -> Tensor:
    """−log of the draws' mean probability of each row's answer (N,), from logits (S, N, C)."""
    averaged = logits.softmax(-1).mean(0)
    return -averaged[torch.arange(len(labels)), labels].log()


def of_task(session: Session, seed: int) -> Iterator[dict[str, Any]]:
    """The records of a task and seed: maximum likelihood, then every candidate that was tried."""
    training = replace(TRAINING, seed=seed, bf16=True, progress=False)
    yield {"candidate": "MLE", **row_losses(MLE(), session, training, 0)}
    tried: dict[Candidate, Tensor] = {}
    crossed = CrossFit(with_factor, session.loaded.model, session.scorer, training)

    def losses(candidate: Candidate) -> Tensor:
        tried[candidate] = crossed.losses(candidate)
        return tried[candidate]

    chosen, _ = choose(losses)
    for candidate, found in tried.items():
        own = replace(training, steps=round(training.steps * candidate.length))
        yield {
            "candidate": list(candidate),
            "chosen": candidate == chosen,
            "cross_fitted_nll": found.mean().item(),
            **row_losses(with_factor(candidate.factor), session, own, 10),
        }


def with_factor(factor: float) -> BLoB:
    """The default BLoB with a factor on its noise and prior."""
    return BLoB(prior_std=0.2 * factor)


def run(options: argparse.Namespace) -> None:
    """Computes the tasks and seeds that have no records yet."""
    torch.set_num_threads(options.threads)
    known = list(read_json_lines(RECORDS)) if RECORDS.is_file() else []
    done = {(record["task"], record["seed"]) for record in known}
    for seed in options.seeds:
        for task in options.tasks:
            if (task, seed) in done:
                continue
            begin = time.perf_counter()
            session = opened(options.model, options.data_root, task, seed)
            facts = {"task": task, "seed": seed, "model": Path(options.model).name}
            facts |= {"n": len(session.task.held_out), "train_rows": len(session.task.train)}
            for record in of_task(session, seed):
                known.append({**facts, **record})
                print(
                    f"{task}, seed {seed}: {record['candidate']}: {record['nll']:.3f}", flush=True
                )
            known[-1] |= {"seconds": time.perf_counter() - begin, "versions": versions()}
            RECORDS.parent.mkdir(parents=True, exist_ok=True)
            write_json_lines(RECORDS, known)


def table(_: argparse.Namespace) -> None:
    """Prints a line for each task and seed: MLE, the usual settings, the choice, the best tried."""
    print("| task | seed | MLE | MLE + T | 0.1 | auto | auto − 0.1 | chosen | best tried |")
    print("|---|---|---|---|---|---|---|---|---|")
    records = list(read_json_lines(RECORDS))
    for task, seed in dict.fromkeys((one["task"], one["seed"]) for one in records):
        own = [one for one in records if (one["task"], one["seed"]) == (task, seed)]
        print(line_of(task, seed, own))


def line_of(task: str, seed: int, own: Sequence[dict[str, Any]]) -> str:
    """The table's line of a task and seed."""
    plain = next(one for one in own if one["candidate"] == "MLE")
    usual = next(one for one in own if one["candidate"] == [1.0, 1.0])
    chosen = next(one for one in own if one.get("chosen"))
    best = min((one for one in own if one is not plain), key=lambda one: one["nll"])
    apart = torch.tensor(chosen["rows"]) - torch.tensor(usual["rows"])
    error = apart.double().std().item() / len(apart) ** 0.5
    parts = [
        task,
        str(seed),
        f"{plain['nll']:.3f}",
        f"{plain['tempered_nll_of_last']:.3f}",
        f"{usual['nll']:.3f}",
        f"{chosen['nll']:.3f}",
        f"{apart.double().mean().item():+.3f} ± {error:.3f}",
        said(chosen),
        f"{said(best)}: {best['nll']:.3f}",
    ]
    return f"| {' | '.join(parts)} |"


def said(record: dict[str, Any]) -> str:
    """A candidate in words."""
    factor, length = record["candidate"]
    return f"σ {0.1 * factor:g}, {round(TRAINING.steps * length)} steps"


def main() -> None:
    """Reads the options and runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("run")
    runs.add_argument("--model", required=True)
    runs.add_argument("--data_root", type=Path)
    runs.add_argument("--tasks", nargs="+", default=TASKS)
    runs.add_argument("--seeds", nargs="+", type=int, default=[1])
    runs.add_argument("--threads", type=int, default=1)
    runs.set_defaults(act=run)
    commands.add_parser("table").set_defaults(act=table)
    options = parser.parse_args()
    options.act(options)


if __name__ == "__main__":
    main()
