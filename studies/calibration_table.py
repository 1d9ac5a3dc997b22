"""Settings of cheaper draws, and their scores from kept logits: what each keeps of the gain."""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from bayestune.decisions import best_temperature
from bayestune.metrics import accuracy, ece, nll

MEAN, EXACT, PREFIX, BLOCKS = "mean", "exact", "prefix", "blocks"
FEWER = (1, 2, 3, 5)


@dataclass(frozen=True)
class Setting:
    """One way to predict.

    Args:
        kind: the mean, exact draws, draws that share a prefix, or draws of the last blocks alone.
        draws: S.
        size: m tokens that do not share the prefix, or the number of blocks.
        factor: on Ω.
    """

    kind: str
    draws: int
    size: int = 0
    factor: float = 1.0

    @property
    def name(self) -> str:
        """Its name in tables."""
        detail = {MEAN: "", EXACT: f" {self.draws}"}.get(self.kind, f" {self.size}")
        return f"{self.kind}{detail}" + (f" ×{self.factor:g}" if self.factor != 1 else "")

    def file(self, folder: Path, part: str) -> Path:
        """Where its logits are kept."""
        return folder / f"{part}-{self.name.replace(' ', '-').replace('×', 'x')}.safetensors"


def settings_of(options: Namespace) -> list[Setting]:
    """All settings, those with a factor behind."""
    plain = [Setting(PREFIX, options.draws, size) for size in options.prefixes]
    plain += [Setting(BLOCKS, options.draws, size) for size in options.blocks]
    to_scale = {(PREFIX, size) for size in options.factors_for}
    to_scale.add((BLOCKS, min(options.blocks, default=0)))
    scaled = []
    for setting in plain:
        if (setting.kind, setting.size) in to_scale:
            scaled += [replace(setting, factor=factor) for factor in options.factors]
    return [Setting(MEAN, 0), Setting(EXACT, options.draws), *plain, *scaled]


def counts_of(setting: Setting) -> list[int]:
    """Numbers of draws that lines of the table have: some smaller ones, and the setting's own."""
    return [*(count for count in FEWER if count < setting.draws), setting.draws]


def kept(folder: Path, setting: Setting, part: str) -> tuple[Tensor, Tensor]:
    """Logits (S, N, C) and labels (N,)."""
    tensors = load_file(setting.file(folder, part))
    return tensors["logits"], tensors["labels"]


def row_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """−log of each row's averaged probability of its label, (N,)."""
    return -logits.double().softmax(-1).mean(0).gather(1, labels[:, None])[:, 0].log()


def chosen(folder: Path, settings: Sequence[Setting]) -> list[Setting]:
    """The settings without a factor, and the best factor of each if it beats none.

    The best one has the least NLL on held-out rows.
    """
    plain = [setting for setting in settings if setting.factor == 1]
    best = []
    for setting in plain:
        family = [other for other in settings if replace(other, factor=1.0) == setting]
        if len(family) == 1:
            continue
        losses = {other: row_nll(*kept(folder, other, "held_out")).mean() for other in family}
        winner = min(family, key=lambda other: losses[other])
        if winner != setting:
            best.append(winner)
    return plain + best


def scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """NLL, ECE and accuracy of the averaged probabilities."""
    probabilities = logits.double().softmax(-1).mean(0)
    return {metric.__name__: metric(probabilities, labels) for metric in (nll, ece, accuracy)}


def share_kept(
    mean: Tensor, exact: Tensor, other: Tensor, resamples: int
) -> tuple[float, float, float]:
    """(L_mean − L)/(L_mean − L_exact) of the rows' NLL (N,), with a 95 % bootstrap interval."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(mean), (resamples, len(mean)), generator=generator)
    gain = mean - other
    full = mean - exact
    shares = gain[picks].mean(1) / full[picks].mean(1)
    low, high = shares.quantile(torch.tensor([0.025, 0.975], dtype=shares.dtype)).tolist()
    return (gain.mean() / full.mean()).item(), low, high


def lines_of(folder: Path, settings: Sequence[Setting]) -> Iterator[tuple[Setting, Tensor, Tensor]]:
    """Each line of the table: a setting, its logits of evaluation rows and of held-out rows."""
    for setting in chosen(folder, settings):
        logits, _ = kept(folder, setting, "evaluation")
        held_out, _ = kept(folder, setting, "held_out")
        if setting.kind != EXACT:
            yield setting, logits, held_out
            continue
        for count in counts_of(setting):
            yield replace(setting, draws=count), logits[:count], held_out[:count]


def score(
    folder: Path, settings: Sequence[Setting], costs: dict[str, float], resamples: int
) -> dict[str, Any]:
    """The task's lines: cost in passes of the mean, scores, and the share of the gain kept."""
    mean, labels = kept(folder, settings[0], "evaluation")
    exact, _ = kept(folder, settings[1], "evaluation")
    _, held_labels = kept(folder, settings[0], "held_out")
    losses = row_nll(mean, labels), row_nll(exact, labels)
    lines = []
    for setting, logits, held_out in lines_of(folder, settings):
        temperature = best_temperature(held_out, held_labels)
        share, low, high = share_kept(*losses, row_nll(logits, labels), resamples)
        lines.append(
            {
                "name": setting.name,
                "kind": setting.kind,
                "factor": setting.factor,
                "cost": costs.get(replace(setting, factor=1.0).name),
                **scores(logits, labels),
                "share": share,
                "share_low": low,
                "share_high": high,
                "tempered": {"temperature": temperature, **scores(logits / temperature, labels)},
            }
        )
    counts = {"n": len(labels), "held_out": len(held_labels), "draws": settings[1].draws}
    return {**counts, "lines": lines}
