"""What a student learns: the probabilities that a posterior gives to rows."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from bayestune.forward import Draws
from bayestune.posteriors import Mixture, Posterior, Tempered
from bayestune.runtime import is_first_process
from bayestune.scoring import Encoded, Scorer
from bayestune.training import Training
from bayestune.whole_files import replaced

ASKED = "asked-*.safetensors"  # parts of targets
_BATCH = 8  # rows that share a fresh draw
_PART = 32  # batches whose targets are one file, from which an interrupted run goes on


@dataclass(frozen=True)
class Asking:
    """A posterior, asked for its probabilities of rows, once or several times (visits).

    Args:
        teacher: the posterior.
        scorer: of the rows.
        rows: N encoded rows.
        draws: S of an average; None takes a fresh draw for each batch of a visit, whose rows differ
            from visit to visit.
        visits: V, how often each row is asked about.
        training: its seed, precision and progress bar.
    """

    teacher: Posterior
    scorer: Scorer
    rows: Sequence[Encoded]
    draws: int | None
    visits: int
    training: Training

    def targets(self, folder: Path) -> Tensor:
        """Probabilities (V, N, C), 0 for options that a row does not have.

        They are written to the folder part by part; parts that are there already are read.
        """
        folder.mkdir(parents=True, exist_ok=True)
        by_visit: list[Tensor] = []
        seeds = count(100_000 * self.training.seed + 1)  # far from those of predictions
        hidden = not self.training.progress
        total = self.visits * len(self.rows)
        with tqdm(total=total, desc="teacher", unit="row", disable=hidden) as bar:
            for visit, batches in enumerate(self._visits()):
                seeded = [(numbers, next(seeds)) for numbers in batches]
                of_row: dict[int, Tensor] = {}
                for start in range(0, len(seeded), _PART):
                    part = seeded[start : start + _PART]
                    probabilities = self._read_or_ask(_file(folder, visit, start), part)
                    in_part = [number for numbers, _ in part for number in numbers]
                    of_row.update(zip(in_part, probabilities, strict=True))
                    bar.update(len(in_part))
                in_order = [of_row[number] for number in range(len(self.rows))]
                by_visit.append(pad_sequence(in_order, batch_first=True))
        width = max(visit.shape[1] for visit in by_visit)
        return torch.stack([pad(visit, (0, width - visit.shape[1])) for visit in by_visit])

    def _visits(self) -> Iterator[list[list[int]]]:
        """For each visit, its batches: the numbers of rows of similar length."""
        generator = torch.Generator().manual_seed(self.training.seed)
        for _ in range(self.visits):
            order = list(range(len(self.rows)))
            if self.draws is None:
                order = torch.randperm(len(order), generator=generator).tolist()
            order.sort(key=lambda number: self.rows[number]["length"])
            yield [order[start : start + _BATCH] for start in range(0, len(order), _BATCH)]

    def _read_or_ask(self, file: Path, batches: Sequence[tuple[list[int], int]]) -> Tensor:
        """Probabilities (rows, C) of batches, each given by its rows' numbers and its seed."""
        if file.is_file():
            return load_file(file)["targets"]
        targets = self._asked(batches)
        if is_first_process():
            save_targets(targets, file)
        return targets

    def _asked(self, batches: Sequence[tuple[list[int], int]]) -> Tensor:
        """The teacher's probabilities (rows, C), 0 for options that a row does not have."""
        rows: list[Tensor] = []
        for numbers, seed in batches:
            batch = self.scorer.collate([self.rows[number] for number in numbers])
            batch.pop("labels", None)
            logits = self.teacher.logits(batch, self._draws(seed)).float().cpu()
            rows.extend(logits.double().softmax(-1).mean(0).float())
        return pad_sequence(rows, batch_first=True)

    def _draws(self, seed: int) -> Draws:
        bf16 = self.training.bf16
        if self.draws is not None:
            return Draws(self.draws, bf16=bf16)
        # draw i of a mixture comes from member i mod K
        member = random.Random(seed).randrange(num_members(self.teacher))
        return Draws(1, seed, first=member, bf16=bf16)


def save_targets(targets: Tensor, file: Path) -> None:
    """Writes targets whole or not at all."""
    with replaced(file) as scratch:
        save_file({"targets": targets.contiguous()}, scratch)


def forget(folder: Path) -> None:
    """Removes the parts of targets that are kept in a folder."""
    for path in folder.glob(ASKED):
        path.unlink(missing_ok=True)


def num_members(posterior: Posterior) -> int:
    """K of a mixture, whatever its temperature; 1 of others."""
    if isinstance(posterior, Tempered):
        return num_members(posterior.base)
    return len(posterior.members) if isinstance(posterior, Mixture) else 1


def _file(folder: Path, visit: int, start: int) -> Path:
    return folder / f"asked-{visit}-{start}.safetensors"
