"""Whether a head for the draws' disagreement is worth having, as records and as a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayestune.decisions import ONE_PASS, Spread, score_rows
from bayestune.metrics import auroc
from studies.epistemic_heads import FEATURES, HEADS, Collected, Part, predicted
from studies.score_price_table import cross_fitted, gain_interval, ranks

RESAMPLES = 1000
Record = dict[str, Any]


def record_of(found: Collected) -> Record:
    """Of each head: how it orders new rows, and what it adds to the student's own scores."""
    judged = found.judged
    judge = Judge.of(judged)
    entropy = score_rows(judged.logits[None], ["total_entropy"])["total_entropy"]
    estimates = {"the student's entropy": (entropy, 0.0)}
    for kind, head in HEADS.items():
        for name, features in FEATURES.items():
            estimates[f"{kind}, {name}"] = predicted(head, features, found)
    estimates["the draws themselves"] = (judged.information, 0.0)
    keys = ("model", "task", "seed", "train_rows", "teacher", "fit", "cpu_seconds", "versions")
    return {
        "study": "epistemic_head",
        **{key: found.facts[key] for key in keys},
        "rows": {"fitted": len(found.fitted.labels), "judged": len(judged.labels)},
        "draws": len(judged.draws),
        "wrong": int(judge.wrong.sum()),
        "one_pass": auroc(judge.before, judge.wrong),
        "attainable": attainable(judged),
        "heads": {
            name: {"penalty": penalty, **judge.worth(values)}
            for name, (values, penalty) in estimates.items()
        },
    }


@dataclass(frozen=True, eq=False)
class Judge:
    """What predictions of I on N rows are held against.

    Args:
        information: the draws' I (N,).
        wrong: the student's errors (N,).
        once: the student's own scores, (N,) each.
        before: log-odds of an error by these, cross-fitted (N,).
    """

    information: Tensor
    wrong: Tensor
    once: Sequence[Tensor]
    before: Tensor

    @classmethod
    def of(cls, part: Part) -> "Judge":
        """The judge of these rows."""
        wrong = part.logits.argmax(-1) != part.labels
        once = list(score_rows(part.logits[None], ONE_PASS).values())
        return cls(part.information, wrong, once, cross_fitted(once, wrong))

    def worth(self, values: Tensor) -> Record:
        """Rank correlation with the draws' I, and AUROC of errors added, each with its interval."""
        after = cross_fitted([*self.once, values], self.wrong)
        low, high = gain_interval(self.before, after, self.wrong)
        gain = auroc(after, self.wrong) - auroc(self.before, self.wrong)
        correlation = rank_correlation(values, self.information)
        return {
            "mean": values.mean().item(),
            "correlation": {"value": correlation, **self.resampled(values)},
            "auroc": auroc(values, self.wrong),
            "gain": {"value": gain, "low": low, "high": high},
        }

    def resampled(self, values: Tensor) -> Record:
        """The bootstrap's interval of the rank correlation over rows."""
        generator = torch.Generator().manual_seed(0)
        size = (RESAMPLES, len(values))
        chosen = torch.randint(len(values), size, generator=generator)
        found = [rank_correlation(values[rows], self.information[rows]) for rows in chosen]
        low, high = torch.tensor(found).quantile(torch.tensor([0.025, 0.975])).tolist()
        return {"low": low, "high": high}


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's ρ of two scores (N,)."""
    return (ranks(a) * ranks(b)).sum().item() / (len(a) - 1)


def attainable(part: Part) -> float:
    """The rank correlation that the limit of many draws would have with these draws' I.

    √r with r the reliability of S draws, 2h/(1 + h) by the correlation h of two halves of them.

    Reference: Spearman (1910) and Brown (1910), https://doi.org/10.1111/j.2044-8295.1910.tb00206.x
    """
    halves = [Spread.of(half).corrected_mutual_information() for half in part.draws.chunk(2)]
    half = max(rank_correlation(*halves), 0.0)
    return (2 * half / (1 + half)) ** 0.5


# The table


def table(records: Sequence[Record]) -> str:
    """Markdown: a line for each way to know I, a column for each student."""
    lines = []
    for record in records:
        rows = record["rows"]
        title = (
            f"**{record['task']}**, {record['model']}, seed {record['seed']}, student of "
            f"{record['teacher']}; {rows['judged']} rows, of which {record['wrong']} are answered "
            f"wrongly; AUROC of errors by the student's own scores {100 * record['one_pass']:.1f}; "
            f"attainable ρ {record['attainable']:.2f}"
        )
        lines += [
            title,
            "",
            "| I by | mean, nats | ρ with ten draws' I | AUROC alone | AUROC added, points |",
            "|---|---:|---:|---:|---:|",
        ]
        lines += [_line(name, found) for name, found in record["heads"].items()]
        lines.append("")
    return "\n".join(lines)


def _line(name: str, found: Record) -> str:
    rho, gain = found["correlation"], found["gain"]
    cells = [
        name,
        f"{found['mean']:.3f}",
        f"{rho['value']:.2f} [{rho['low']:.2f}, {rho['high']:.2f}]",
        f"{100 * found['auroc']:.1f}",
        f"{100 * gain['value']:+.1f} [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}]",
    ]
    return f"| {' | '.join(cells)} |"
