"""What cheaper draws keep of ten exact draws' calibration, and what they cost.

Three steps, each a command. `collect` asks a posterior of `bayestune fit` for the logits of every
setting on held-out and on evaluation rows and keeps them in `--output`; run again, it continues.
`cost` measures each setting's cost in passes of the mean, interleaved in one process. `table`
scores them, appends the task's record to `--json`, and renders the page and the picture of all
records. The factor on Ω and every temperature are chosen on held-out rows.
"""

import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bayestune.adapters import GaussianLinear, Slots
from bayestune.forward import Draws
from bayestune.posteriors import Gaussian
from bayestune.scoring import Encoded, Scorer, row_logits
from bayestune.session import Session, TaskOptions
from bayestune.whole_files import replaced
from harness import Action, environment, interleave, quantile
from studies.calibration_page import render
from studies.calibration_table import (
    BLOCKS,
    MEAN,
    PREFIX,
    Setting,
    chosen,
    counts_of,
    score,
    settings_of,
)


@dataclass
class LastBlocks(Gaussian):
    """A Gaussian of which only the last blocks are drawn, the others held at the mean."""

    blocks: int = 1

    def draw(self, index: int, seed: int = 0) -> dict[str, Tensor]:
        """The draw's slots in the last blocks."""
        config: Any = self.model.config
        first = max(0, config.num_hidden_layers - self.blocks)
        whole = Gaussian.draw(self, index, seed)
        return {name: weight for name, weight in whole.items() if block_of(name) >= first}


def block_of(slot: str) -> int:
    """The number of the block that a slot is in; -1 for a slot in none, such as the head's."""
    numbers = [int(part) for part in slot.split(".") if part.isdigit()]
    return numbers[0] if numbers else -1


@contextmanager
def scaled(posterior: Gaussian, factor: float) -> Iterator[None]:
    """The posterior with its standard deviations times `factor`, for the time of the context."""
    layers = list(Slots(posterior.model, posterior.adapter).of_kind(GaussianLinear).values())
    roots = [layer.root_std.detach().clone() for layer in layers]
    try:
        with torch.no_grad():
            for layer in layers:
                layer.root_std.mul_(factor**0.5)
        yield
    finally:
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
    bf16: bool
    drawn: dict[tuple[int, int], Gaussian] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        """The type of the base weights."""
        return str(next(self.posterior.model.parameters()).dtype).removeprefix("torch.")

    def drawn_as(self, setting: Setting) -> Gaussian:
        """The posterior, drawn in the last blocks only where the setting says so.

        One for each number of draws, so that each keeps its draws when settings take turns.
        """
        blocks = setting.size if setting.kind == BLOCKS else 0
        key = (blocks, setting.draws)
        if key not in self.drawn:
            model = self.posterior.model
            adapter = self.posterior.adapter
            whole = Gaussian(model, self.scorer, adapter=adapter)
            part = LastBlocks(model, self.scorer, adapter=adapter, blocks=blocks)
            self.drawn[key] = part if blocks else whole
        return self.drawn[key]

    def logits(self, setting: Setting, rows: Sequence[Encoded], size: int) -> Tensor:
        """The setting's logits (S, N, C) of some rows."""
        prefix = setting.size if setting.kind == PREFIX else None
        draws = Draws(setting.draws, shared_prefix=prefix, bf16=self.bf16)
        posterior = self.drawn_as(setting)
        with scaled(self.posterior, setting.factor):
            return row_logits(posterior, self.scorer, rows, draws, batch_size=size)


def opened(options: Namespace) -> Subject:
    """What a posterior's folder, a model and a task make.

    Raises:
        ValueError: if the posterior is not Gaussian, or no rows are held out.
    """
    questions = TaskOptions(
        task=options.task,
        data_root=options.data_root,
        holdout=options.holdout,
        train_rows=options.train_rows,
        evaluation_rows=options.rows,
    )
    session = Session.of_posterior(options.posterior, questions, options.model)
    task = session.task
    scorer = session.scorer
    posterior = session.load(options.posterior).posterior
    if not isinstance(posterior, Gaussian):
        kind = type(posterior).__name__
        raise ValueError(f"got a {kind}, expected a Gaussian posterior: fit BLoB")
    if not task.held_out:
        raise ValueError(
            f"no held-out rows: got holdout={options.holdout}, expected a part of train; set "
            "--holdout"
        )
    parts = {"held_out": task.held_out[: options.held_out_rows], "evaluation": task.evaluation}
    rows = {name: scorer.encode(part) for name, part in parts.items()}
    labels = {}
    for name, part in parts.items():
        labels[name] = torch.tensor([row.answer for row in part])
    return Subject(posterior, scorer, rows, labels, options.bf16)


# The steps


def keep(one: Subject, setting: Setting, part: str, options: Namespace) -> None:
    """One setting's logits on one part, unless they are there already."""
    path = setting.file(options.output, part)
    if path.is_file():
        return
    begin = time.perf_counter()
    logits = one.logits(setting, one.rows[part], options.batch)
    with replaced(path) as scratch:
        save_file({"logits": logits.contiguous(), "labels": one.labels[part]}, scratch)
    seconds = time.perf_counter() - begin
    print(f"{options.task} {part} {setting.name}: {seconds:.1f} s", flush=True)


def collect(options: Namespace) -> None:
    """The logits of every setting: on held-out rows first, which choose the factors."""
    one = opened(options)
    settings = settings_of(options)
    options.output.mkdir(parents=True, exist_ok=True)
    for setting in settings:
        keep(one, setting, "held_out", options)
    for setting in chosen(options.output, settings):
        keep(one, setting, "evaluation", options)


def batches_of(rows: Sequence[Encoded], size: int) -> list[list[Encoded]]:
    """Five batches of like length, from short to long.

    Raises:
        ValueError: if there are fewer rows than a batch has.
    """
    order = sorted(rows, key=lambda row: row["length"])
    if len(order) < size:
        raise ValueError(
            f"no batch: got {len(order)} evaluation rows, expected {size} or more; lower --batch"
        )
    places = range(len(order) - size + 1)
    starts = [int(quantile(places, part)) for part in (0.1, 0.3, 0.5, 0.7, 0.9)]
    return [order[start : start + size] for start in starts]


def cost(options: Namespace) -> None:
    """Seconds of each setting on some batches of evaluation rows, in turns, kept in `--output`."""
    one = opened(options)
    settings = [setting for setting in settings_of(options) if setting.factor == 1.0]
    settings += [replace(settings[1], draws=count) for count in counts_of(settings[1])[:-1]]
    batches = batches_of(one.rows["evaluation"], options.batch)
    lengths = [batch[-1]["length"] for batch in batches]  # the longest row's
    device = next(one.posterior.model.parameters()).device
    facts = {
        **environment(device),
        "precision": "bf16" if one.bf16 else "fp32",
        "dtype": one.dtype,
        "batch": options.batch,
        "tokens": lengths,
    }

    def action(setting: Setting) -> Action:
        return lambda turn: one.logits(setting, batches[turn % len(batches)], options.batch)

    actions = {setting.name: action(setting) for setting in settings}
    seconds = interleave(actions, options.turns, warmup=1, device=device)
    tensors = {name: torch.tensor(laps, dtype=torch.float64) for name, laps in seconds.items()}
    metadata = {name: str(value) for name, value in facts.items()}
    options.output.mkdir(parents=True, exist_ok=True)
    save_file(tensors, options.output / "cost.safetensors", metadata)


def read_cost(folder: Path) -> tuple[dict[str, float], dict[str, str]]:
    """Median cost of each setting in passes of the mean, and where it was measured, if it was."""
    path = folder / "cost.safetensors"
    if not path.is_file():
        return {}, {}
    with safe_open(path, "pt") as file:
        seconds = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata())
    costs = {name: (laps / seconds[MEAN]).median().item() for name, laps in seconds.items()}
    return costs, metadata


def table(options: Namespace) -> None:
    """The record of one task, then the page and the picture of all tasks."""
    costs, where = read_cost(options.output)
    record: dict[str, Any] = {
        "benchmark": "calibration_cost",
        "task": options.task,
        "model": Path(options.model).name,
        "cost_measured_on": where,
        **score(options.output, settings_of(options), costs, options.resamples),
    }
    render(record, options.json, options.page, options.picture)


STEPS = {"collect": collect, "cost": cost, "table": table}


def parser() -> ArgumentParser:
    """The command's options."""
    made = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    add = made.add_argument
    add("step", choices=list(STEPS), help="what to do")
    add("--posterior", type=Path, required=True, help="a folder of `bayestune fit --method blob`")
    add("--model", required=True, help="its base model")
    add("--task", required=True, help="its name in the table")
    add("--data_root", type=Path, default=None, help="folder of the data sets; left out: the Hub")
    add("--train_rows", type=int, default=None, help="as in the fit")
    add("--holdout", type=float, default=0.0, help="as in the fit")
    add("--output", type=Path, required=True, help="where logits and seconds are kept")
    add("--rows", type=int, default=300, help="evaluation rows")
    add("--held_out_rows", type=int, default=120, help="held-out rows, at most")
    add("--batch", type=int, default=8, help="rows of a batch")
    add("--draws", type=int, default=10, help="S")
    add("--prefixes", type=int, nargs="+", default=[1, 4, 16, 32], help="m of shared prefixes")
    add("--blocks", type=int, nargs="+", default=[1, 4, 8], help="last blocks, drawn alone")
    add("--factors", type=float, nargs="+", default=[1.5, 2.0, 3.0], help="on Ω, beside 1")
    text = "m that get a factor; the fewest blocks get one too"
    add("--factors_for", type=int, nargs="+", default=[1, 4, 16], help=text)
    add("--turns", type=int, default=10, help="of the measurement of cost")
    add("--resamples", type=int, default=2000, help="of the bootstrap")
    add("--bf16", action="store_true", help="bfloat16 autocast")
    add("--json", type=Path, default=None, help="file of the tasks' records, one a line")
    add("--page", type=Path, default=None, help="page to render from it")
    add("--picture", type=Path, default=None, help="picture to draw from it")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Does one of the steps."""
    made = parser()
    options = made.parse_args(arguments)
    if options.json is None and (options.page or options.picture):
        made.error("--page and --picture show the records of --json: give it too")
    STEPS[options.step](options)


if __name__ == "__main__":
    main()
