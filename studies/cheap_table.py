"""The table of cheap posteriors, the choice of σ, and draws' logits as a Gaussian's."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

DRAWN = "10 draws"
Record = Mapping[str, Any]


def fitted_average(logits: Tensor, samples: int = 256) -> Tensor:
    """Probabilities (N, C) of a Gaussian fitted to each row's draws (S, N, C), S of 2 or more.

    The logits of a further draw are N(f̄, (1 + 1/S)·Σ̂), Σ̂ = w·Σ_n + (1 − w)·Σ̄ with w = (S − 1)/
    (S − 1 + C): a row's own covariance, shrunk to the mean one of all rows. Options that a row
    does not have, -inf, stay out.
    """
    count, _, classes = logits.shape
    absent = logits[0] == -torch.inf
    values = logits.masked_fill(absent, 0.0)
    present = (~absent).to(values.dtype)
    values = (values - (values.sum(-1) / present.sum(-1))[..., None]) * present
    mean = values.mean(0)
    apart = values - mean
    of_row = torch.einsum("snc,snd->ncd", apart, apart) / (count - 1)
    own = (count - 1) / (count - 1 + classes)
    covariance = own * of_row + (1 - own) * of_row.mean(0)
    spread, axes = torch.linalg.eigh((1 + 1 / count) * covariance)
    root = axes * spread.clamp_min(0).sqrt()[:, None]
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(samples, classes, generator=generator, dtype=values.dtype)
    normal = torch.cat([normal, -normal])
    further = mean + torch.einsum("ncd,sd->snc", root, normal)
    return further.masked_fill(absent, -torch.inf).softmax(-1).mean(0)


def best_std(records: Sequence[Record], arm: str) -> float | None:
    """The σ of an arm's first seed whose draws have the lowest NLL on held-out rows."""
    fits = [record for record in records if record.get("arm") == arm]
    first = [record for record in fits if record["seed"] == fits[0]["seed"]]
    if not first:
        return None
    return min(first, key=lambda record: record["held_out"][DRAWN]["nll"])["std"]


def difference(first: Sequence[float], second: Sequence[float]) -> str:
    """The mean of rows' losses less others', with two standard errors."""
    apart = torch.tensor(first, dtype=torch.float64) - torch.tensor(second, dtype=torch.float64)
    error = apart.std() / len(apart) ** 0.5
    return f"{apart.mean():+.3f} ± {2 * error:.3f}"


def cells(figures: Record) -> str:
    """NLL, ECE % and ACC %."""
    percent = (100 * figures["ece"], 100 * figures["accuracy"])
    return f"{figures['nll']:.3f} / {percent[0]:.1f} / {percent[1]:.1f}"


def table(records: Sequence[Record]) -> str:
    """The fits of each setting, their cost, and what their draws lose against the full posterior's.

    A setting is a task, a number of steps and a learning rate.
    """
    costs = [record for record in records if "passes" in record]
    settings: dict[str, list[Record]] = {}
    for record in (one for one in records if "arm" in one):
        how = f"{record['steps']} steps at {record['learning_rate']:g}"
        settings.setdefault(f"{record['task']}, {how}", []).append(record)
    return "\n\n".join(f"{name}\n\n{_of_fits(fits, costs)}" for name, fits in settings.items())


def _of_fits(fits: Sequence[Record], costs: Sequence[Record]) -> str:
    """The table of one setting's fits."""
    seeds = sorted({record["seed"] for record in fits})
    titles = ["arm", "σ", "seed", "held-out NLL", "mean", DRAWN, "draws − full's"]
    titles += [f"passes ({one['task']}, {one['tokens']:.0f} tokens)" for one in costs]
    lines = [_line(titles), _line(["---"] * len(titles))]
    for seed in seeds:
        chosen = {record["arm"]: best_std(fits, record["arm"]) for record in fits if record["std"]}
        full = _losses(fits, "full", chosen.get("full"), seed)
        for record in (one for one in fits if one["seed"] == seed):
            lines.append(_line(_fit(record, full, chosen, costs)))
    lines += ["", *_fewer(fits)]
    return "\n".join(lines)


def _line(parts: Sequence[str]) -> str:
    return f"| {' | '.join(parts)} |"


def _losses(
    fits: Sequence[Record], arm: str, std: float | None, seed: int
) -> Sequence[float] | None:
    for record in fits:
        if (record["arm"], record["std"], record["seed"]) == (arm, std, seed):
            return record["evaluation"][DRAWN]["losses"]
    return None


def _fit(
    record: Record,
    full: Sequence[float] | None,
    chosen: Mapping[str, float | None],
    costs: Sequence[Record],
) -> list[str]:
    """The cells of a fit; the chosen σ in bold."""
    arm = record["arm"]
    reported = record["evaluation"]
    drawn = reported.get(DRAWN)
    held_out = record["held_out"].get(DRAWN, record["held_out"]["mean"])
    std = f"**{record['std']}**" if chosen.get(arm) == record["std"] else f"{record['std']}"
    losses = (drawn or reported["mean"])["losses"]
    passes = []
    for one in costs:
        spread = one["passes"].get("mean" if arm == "mle" else arm)
        passes.append(f"{spread['median']:.2f}" if spread else "")
    return [
        arm,
        std if record["std"] else "",
        str(record["seed"]),
        f"{held_out['nll']:.3f}",
        cells(reported["mean"]),
        cells(drawn) if drawn else "",
        difference(losses, full) if full else "",
        *passes,
    ]


def _fewer(fits: Sequence[Record]) -> list[str]:
    """Fewer draws of the full posterior: plain, antithetic, as a Gaussian's."""
    full = [record for record in fits if record["arm"] == "full"]
    if not full:
        return []
    names = [name for name in full[0]["evaluation"] if name not in ("mean", DRAWN)]
    heads = [f"σ {record['std']}, seed {record['seed']}" for record in full]
    lines = [_line(["draws of full", *heads]), _line(["---"] * (1 + len(full)))]
    for name in names:
        lines.append(_line([name, *(cells(record["evaluation"][name]) for record in full)]))
    return lines
