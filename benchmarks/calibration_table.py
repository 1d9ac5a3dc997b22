"""Settings of cheaper draws, and their scores from kept logits: what each keeps of the gain of exact draws."""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from bayestune.methods.temperature import best_temperature
from bayestune.metrics import accuracy, ece, nll

MEAN, EXACT, PREFIX, BLOCKS, QUESTION = "mean", "exact", "prefix", "blocks", "question"
FEWER = (1, 2, 3, 5)


@dataclass(frozen=True)
class Setting:
    """One way to predict: the mean, exact draws, a shared prefix but for m tokens, or the last blocks drawn alone."""

    kind: str
    draws: int
    prefix: str = ""
    blocks: int = 0
    factor: float = 1.0

    @property
    def name(self) -> str:
        """Its name in files and tables."""
        detail = {
            MEAN: "",
            EXACT: f" {self.draws}",
            PREFIX: f" {self.prefix}",
            BLOCKS: f" {self.blocks}",
        }[self.kind]
        return f"{self.kind}{detail}" + (f" ×{self.factor:g}" if self.factor != 1 else "")

    def file(self, folder: Path, part: str) -> Path:
        """Where its logits are kept."""
        return folder / f"{part}-{self.name.replace(' ', '-').replace('×', 'x')}.safetensors"


def settings_of(options: Namespace) -> list[Setting]:
    """All settings, those with a factor behind."""
    count = options.draws
    plain = [Setting(PREFIX, count, prefix=m) for m in options.prefixes]
    plain += [Setting(BLOCKS, count, blocks=b) for b in options.blocks]
    one = min(options.blocks, default=0)
    scaled = [
        replace(setting, factor=factor)
        for setting in plain
        if setting.prefix in options.factors_for or (setting.blocks and setting.blocks == one)
        for factor in options.factors
    ]
    return [Setting(MEAN, 0), Setting(EXACT, count), *plain, *scaled]


def kept(folder: Path, setting: Setting, part: str) -> tuple[Tensor, Tensor]:
    """Logits (S, N, C) and labels (N,)."""
    tensors = load_file(setting.file(folder, part))
    return tensors["logits"], tensors["labels"]


def row_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """−log of each row's averaged probability of its label, (N,)."""
    return -logits.double().softmax(-1).mean(0).gather(1, labels[:, None])[:, 0].log()


def chosen(folder: Path, settings: Sequence[Setting]) -> list[Setting]:
    """The settings without a factor, and of those with one the best of each kind on held-out rows, if it is better."""
    plain = [setting for setting in settings if setting.factor == 1]
    best = []
    for setting in plain:
        family = [other for other in settings if replace(other, factor=1.0) == setting]
        losses = {
            other: row_nll(*kept(folder, other, "held_out")).mean().item() for other in family
        }
        if len(family) > 1 and (winner := min(losses, key=losses.__getitem__)) != setting:
            best.append(winner)
    return plain + best


def scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """NLL, ECE and accuracy of the averaged probabilities."""
    probabilities = logits.double().softmax(-1).mean(0)
    return {m.__name__: m(probabilities, labels) for m in (nll, ece, accuracy)}


def share_kept(
    mean: Tensor, exact: Tensor, other: Tensor, resamples: int
) -> tuple[float, float, float]:
    """(L_mean − L)/(L_mean − L_exact) of the rows' NLL (N,), with a bootstrap interval of 95 %."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(mean), (resamples, len(mean)), generator=generator)
    gain, full = mean - other, mean - exact
    shares = gain[picks].mean(1) / full[picks].mean(1)
    low, high = shares.quantile(torch.tensor([0.025, 0.975], dtype=shares.dtype)).tolist()
    return (gain.mean() / full.mean()).item(), low, high


def counts_of(setting: Setting) -> list[int]:
    """Numbers of draws that lines of the table have: some smaller ones, and the setting's own."""
    return [*(count for count in FEWER if count < setting.draws), setting.draws]


def lines_of(folder: Path, settings: Sequence[Setting]) -> Iterator[tuple[Setting, Tensor, Tensor]]:
    """Each line of the table: a setting, its logits of evaluation rows and of held-out rows."""
    for setting in chosen(folder, settings):
        logits, held_out = (kept(folder, setting, part)[0] for part in ("evaluation", "held_out"))
        if setting.kind != EXACT:
            yield setting, logits, held_out
            continue
        for count in counts_of(setting):
            yield replace(setting, draws=count), logits[:count], held_out[:count]


def score(
    folder: Path, settings: Sequence[Setting], costs: dict[str, float], resamples: int
) -> dict[str, Any]:
    """The task's lines: cost in passes of the mean, scores with and without temperature, and the share kept."""
    by_kind = {setting.kind: setting for setting in settings[:2]}
    labels, held_labels = (
        kept(folder, by_kind[MEAN], "evaluation")[1],
        kept(folder, by_kind[MEAN], "held_out")[1],
    )
    mean, exact = (row_nll(*kept(folder, by_kind[kind], "evaluation")) for kind in (MEAN, EXACT))
    lines = []
    for setting, logits, held_out in lines_of(folder, settings):
        temperature = best_temperature(held_out, held_labels)
        share, low, high = share_kept(mean, exact, row_nll(logits, labels), resamples)
        line: dict[str, Any] = {
            "name": setting.name,
            "kind": setting.kind,
            "factor": setting.factor,
        }
        line |= {"cost": costs.get(replace(setting, factor=1.0).name), **scores(logits, labels)}
        line |= {"share": share, "share_low": low, "share_high": high}
        line["tempered"] = {"temperature": temperature, **scores(logits / temperature, labels)}
        lines.append(line)
    return {
        "n": len(labels),
        "held_out": len(held_labels),
        "draws": settings[1].draws,
        "lines": lines,
    }
