"""What cheaper draws keep of ten exact draws' calibration, and what they cost: one task, one saved posterior.

Three steps, each a command: `collect` asks a posterior of `bayestune fit` for the logits of every setting on held-out
and on evaluation rows and keeps them in `--output` (it goes on where it was cut off); `cost` measures each setting's
cost in passes of the mean, interleaved in one process; `table` scores them, appends the task's record to `--json`, and
renders the page and the picture of all records. The factor on Ω and every temperature are chosen on held-out rows.
"""

import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from bayestune.adapters import GaussianLinear, gaussian_layers
from bayestune.data import load_task
from bayestune.forward import Draws
from bayestune.posteriors import Gaussian, load_posterior
from bayestune.scoring import Encoded, Scorer, row_logits
from bayestune.session import open_folder, scorer_of
from calibration_page import render
from calibration_table import EXACT, MEAN, QUESTION, Setting, chosen, counts_of, score, settings_of
from harness import environment, interleave, quantile
from subjects import DTYPES, autocast


@dataclass
class LastBlocks(Gaussian):
    """A Gaussian of which only the last blocks are drawn, the others held at the mean."""

    blocks: int = 1

    def draw(self, index: int, seed: int = 0) -> dict[str, Tensor]:
        """The draw's slots in the last blocks."""
        first = max(0, self.model.config.num_hidden_layers - self.blocks)  # type: ignore[union-attr, operator]
        return {
            name: w
            for name, w in Gaussian.draw(self, index, seed).items()
            if block_of(name) >= first
        }


def block_of(slot: str) -> int:
    """The number of the block that a slot is in; -1 for a slot in none, as the head's."""
    return next((int(part) for part in slot.split(".") if part.isdigit()), -1)


@contextmanager
def scaled(posterior: Gaussian, factor: float) -> Iterator[None]:
    """The posterior with its standard deviations times `factor`, for the time of the context."""
    layers = list(gaussian_layers(posterior.model, posterior.adapter).values())
    roots = [layer.root_std.detach().clone() for layer in layers]
    try:
        _put(layers, [root * factor**0.5 for root in roots])
        yield
    finally:
        _put(layers, roots)


def _put(layers: Sequence[GaussianLinear], roots: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for layer, root in zip(layers, roots, strict=True):
            layer.root_std.copy_(root)


@dataclass
class Subject:
    """A posterior, its scorer, and rows with their labels."""

    posterior: Gaussian
    scorer: Scorer
    rows: dict[str, list[Encoded]]
    labels: dict[str, Tensor]
    precision: str
    drawn: dict[tuple[int, int], Gaussian] = field(default_factory=dict)

    def __post_init__(self) -> None:
        prompts = [row["ids"] for part in self.rows.values() for row in part]
        same = [len(set(column)) == 1 for column in zip(*prompts, strict=False)]
        self.instruction = [*same, False].index(False)  # tokens that all prompts begin with

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.posterior.model.parameters()).device

    def drawn_as(self, setting: Setting) -> Gaussian:
        """The posterior, drawn in the last blocks only where the setting says so.

        One for each number of draws: in turns with others, each keeps its draws and what they have read, as it would
        alone.
        """
        key = setting.blocks, setting.draws
        if key not in self.drawn:
            model, score, adapter = (
                self.posterior.model,
                self.posterior.score,
                self.posterior.adapter,
            )
            whole = Gaussian(model, score, adapter=adapter)
            part = LastBlocks(model, score, adapter=adapter, blocks=setting.blocks)
            self.drawn[key] = part if setting.blocks else whole
        return self.drawn[key]

    def logits(self, setting: Setting, rows: Sequence[Encoded], size: int) -> Tensor:
        """The setting's logits (S, N, C) of some rows, in batches of like length."""
        order = sorted(range(len(rows)), key=lambda i: rows[i]["length"])
        parts: dict[int, Tensor] = {}
        posterior = self.drawn_as(setting)
        with scaled(self.posterior, setting.factor), autocast(self.device, self.precision):
            for start in range(0, len(order), size):
                places = order[start : start + size]
                batch = [rows[i] for i in places]
                draws = Draws(setting.draws, shared_prefix=self.prefix(setting, batch))
                logits = row_logits(posterior, self.scorer, batch, draws, batch_size=size)
                parts.update(zip(places, logits.unbind(1), strict=True))
        width = max(part.shape[-1] for part in parts.values())
        padded = [
            pad(parts[i], (0, width - parts[i].shape[-1]), value=-torch.inf)
            for i in range(len(rows))
        ]
        return torch.stack(padded, 1)

    def prefix(self, setting: Setting, batch: Sequence[Encoded]) -> int | None:
        """m; for "question" all of the longest prompt but the instruction that all prompts begin with."""
        if setting.prefix == QUESTION:
            return max(len(row["ids"]) for row in batch) - self.instruction
        return int(setting.prefix) if setting.prefix else None


def subject(options: Namespace) -> Subject:
    """What a posterior's folder, a model and a task make.

    Raises:
        ValueError: if the posterior is not Gaussian, no rows are held out, or the weights are of another type.
    """
    details, loaded = open_folder(options.posterior, options.model)
    task = load_task(options.task, options.data_root).subset(
        options.train_rows, options.rows, options.holdout
    )
    scorer = scorer_of(details, loaded, task)
    posterior = load_posterior(loaded.model, options.posterior, scorer)
    if not isinstance(posterior, Gaussian):
        raise ValueError(
            f"got a {type(posterior).__name__}, expected a Gaussian posterior: fit BLoB"
        )
    if not task.held_out:
        raise ValueError(
            f"no held-out rows: got holdout={options.holdout}, expected a part of train; set --holdout"
        )
    if options.dtype not in (None, dtype := dtype_of(posterior)):
        raise ValueError(
            f"got --dtype {options.dtype}, expected {dtype}, the posterior's: leave --dtype out"
        )
    parts = {"held_out": task.held_out[: options.held_out_rows], "evaluation": task.evaluation}
    rows = {name: scorer.encode(part) for name, part in parts.items()}
    labels = {name: torch.tensor([row.answer for row in part]) for name, part in parts.items()}
    return Subject(posterior, scorer, rows, labels, "bf16" if options.bf16 else "fp32")


def keep(one: Subject, setting: Setting, part: str, options: Namespace) -> None:
    """One setting's logits on one part, unless they are there already."""
    path = setting.file(options.output, part)
    if path.is_file():
        return
    begin = time.perf_counter()
    logits = one.logits(setting, one.rows[part], options.batch)
    save_file(
        {"logits": logits.contiguous(), "labels": one.labels[part]}, path.with_suffix(".partial")
    )
    path.with_suffix(".partial").replace(path)
    print(f"{options.task} {part} {setting.name}: {time.perf_counter() - begin:.1f} s", flush=True)


def collect(options: Namespace) -> None:
    """The logits of every setting: on held-out rows first, which choose the factors to evaluate."""
    one, settings = subject(options), settings_of(options)
    options.output.mkdir(parents=True, exist_ok=True)
    for setting in settings:
        keep(one, setting, "held_out", options)
    for setting in chosen(options.output, settings):
        keep(one, setting, "evaluation", options)


def cost(options: Namespace) -> None:
    """Seconds of each setting on some batches of evaluation rows, in turns; kept in the output folder.

    Raises:
        ValueError: if there are fewer evaluation rows than a batch has.
    """
    options.output.mkdir(parents=True, exist_ok=True)
    one, settings = subject(options), [s for s in settings_of(options) if s.factor == 1.0]
    where = {
        **environment(one.device),
        "precision": one.precision,
        "dtype": dtype_of(one.posterior),
    }
    fewer = [
        replace(s, draws=count)
        for s in settings
        if s.kind == EXACT
        for count in counts_of(s)
        if count < s.draws
    ]
    order = sorted(one.rows["evaluation"], key=lambda row: row["length"])
    if len(order) < options.batch:
        raise ValueError(
            f"no batch: got {len(order)} evaluation rows, expected {options.batch} or more; lower --batch"
        )
    starts = [
        int(quantile(range(len(order) - options.batch + 1), part))
        for part in (0.1, 0.3, 0.5, 0.7, 0.9)
    ]
    batches = [order[start : start + options.batch] for start in starts]

    def act(setting: Setting, turn: int) -> None:
        one.logits(setting, batches[turn % len(batches)], options.batch)

    actions = {setting.name: partial(act, setting) for setting in [*settings, *fewer]}
    seconds = interleave(actions, options.turns, warmup=1, device=one.device)
    lengths = [max(row["length"] for row in batch) for batch in batches]
    facts = {**where, "batch": options.batch, "tokens": lengths}
    tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in seconds.items()}
    save_file(
        tensors,
        options.output / "cost.safetensors",
        {name: str(value) for name, value in facts.items()},
    )


def dtype_of(posterior: Gaussian) -> str:
    """The type of the base weights."""
    return str(next(posterior.model.parameters()).dtype).removeprefix("torch.")


def read_cost(folder: Path) -> tuple[dict[str, float], dict[str, str]]:
    """Median cost of each setting in passes of the mean, and where it was measured; nothing where it was not."""
    path = folder / "cost.safetensors"
    if not path.is_file():
        return {}, {}
    with safe_open(path, "pt") as file:
        seconds = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata())
    return {
        name: (values / seconds[MEAN]).median().item() for name, values in seconds.items()
    }, metadata


def table(options: Namespace) -> None:
    """The record of one task, then the page and the picture of all tasks."""
    costs, where = read_cost(options.output)
    facts: dict[str, Any] = {
        "benchmark": "calibration_cost",
        "task": options.task,
        "model": Path(options.model).name,
    }
    record = score(options.output, settings_of(options), costs, options.resamples)
    render(
        {**facts, "cost_measured_on": where, **record}, options.json, options.page, options.picture
    )


def parser() -> ArgumentParser:
    """The command's options."""
    made = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    made.add_argument("step", choices=("collect", "cost", "table"), help="what to do")
    made.add_argument(
        "--posterior", type=Path, required=True, help="a folder of `bayestune fit --method blob`"
    )
    made.add_argument("--model", required=True, help="its base model")
    made.add_argument("--task", required=True, help="its name in the table")
    made.add_argument(
        "--data_root", type=Path, default=None, help="folder of the data sets; left out: the Hub"
    )
    made.add_argument("--train_rows", type=int, default=None, help="as in the fit")
    made.add_argument("--holdout", type=float, default=0.0, help="as in the fit")
    made.add_argument(
        "--output", type=Path, required=True, help="where logits and seconds are kept"
    )
    made.add_argument("--rows", type=int, default=300, help="evaluation rows")
    made.add_argument("--held_out_rows", type=int, default=120, help="held-out rows, at most")
    made.add_argument("--batch", type=int, default=8, help="rows of a batch")
    made.add_argument("--draws", type=int, default=10, help="S")
    made.add_argument(
        "--prefixes",
        nargs="+",
        default=["1", "4", "16", "32", QUESTION],
        help="m of shared prefixes",
    )
    made.add_argument(
        "--blocks", type=int, nargs="+", default=[1, 4, 8], help="last blocks, drawn alone"
    )
    made.add_argument(
        "--factors", type=float, nargs="+", default=[1.5, 2.0, 3.0], help="on Ω, beside 1"
    )
    made.add_argument(
        "--factors_for",
        nargs="+",
        default=["1", "4", "16"],
        help="m that get a factor; one block does",
    )
    made.add_argument("--turns", type=int, default=10, help="of the measurement of cost")
    made.add_argument("--resamples", type=int, default=2000, help="of the bootstrap")
    made.add_argument(
        "--dtype", choices=DTYPES, default=None, help="of the weights; left out: as fitted"
    )
    made.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    made.add_argument(
        "--json", type=Path, default=None, help="file of the tasks' records, one a line"
    )
    made.add_argument("--page", type=Path, default=None, help="page to render from it")
    made.add_argument("--picture", type=Path, default=None, help="picture to draw from it")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Does one of the steps."""
    made = parser()
    options = made.parse_args(arguments)
    if options.json is None and (options.page or options.picture):
        made.error("--page and --picture show the records of --json: give it too")
    {"collect": collect, "cost": cost, "table": table}[options.step](options)


if __name__ == "__main__":
    main()
