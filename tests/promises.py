"""A tiny model, task and scorer on which methods are fitted, and what their posteriors promise."""

import shutil
from dataclasses import replace
from functools import cache

import torch

from bayestune.forward import Draws
from bayestune.methods import MLE
from bayestune.posteriors import AdapterPosterior, Mixture, predict
from bayestune.scoring import make_scorer
from bayestune.training import Training, newest_checkpoint
from tiny import byte_level_tokenizer, coloured_questions, labelled_sentences, tiny_bert, tiny_llama

TRAINING = Training(steps=8, learning_rate=1e-2, progress=False, logging_steps=1)
LONG = {"steps": 60, "learning_rate": 3e-2}
SHORT = {  # arguments of methods that take longer by default
    "tfb": {"anchors": 6, "draws": 2, "evaluations": 3},
    "posterior_scale": {"factors": (0.5, 1.0)},
    "ivon": {"learning_rate": 12.0},
    "distilled": {"base": MLE(), "steps": 8},
}

tokenizer = cache(byte_level_tokenizer)


class Case:
    """One way of scoring: an encoder for "head", else a language model; its task and its scorer."""

    def __init__(self, scoring="letter", **options):
        head = scoring == "head"
        self.make = tiny_bert if head else tiny_llama
        self.task = labelled_sentences() if head else coloured_questions()
        self.scorer = make_scorer(self.make(), tokenizer(), self.task, scoring, **options)
        self.batch, self.labels = self.collate(self.task.evaluation)

    def collate(self, rows):
        """A batch without labels, and the labels."""
        batch = self.scorer.collate(self.scorer.encode(rows))
        return batch, batch.pop("labels")

    def fit(self, method, **changes):
        """A fit on a fresh base model."""
        return method.fit(self.make(), self.scorer, replace(TRAINING, **changes))


def exportable(posterior):
    """Whether each draw is an adapter, so that it can be written out."""
    members = posterior.members if isinstance(posterior, Mixture) else [posterior]
    return all(isinstance(member, AdapterPosterior) for member in members)


def learnt(posterior, case):
    """The loss on the training rows over that of guessing; the mean's, where there is one."""
    batch, labels = case.collate(case.task.train)
    probabilities = predict(posterior, batch, 0 if posterior.has_mean else 3).probabilities
    loss = -probabilities[range(len(labels)), labels].log().mean()
    return loss / torch.tensor([len(row.options) for row in case.task.train]).double().log().mean()


def resumes(method, case, folder):
    """Whether a run that is stopped at a checkpoint, or after the last, ends as the whole one."""
    whole = case.fit(method, save_steps=4, output=folder)
    finished = case.fit(method, save_steps=4, output=folder, resume=True)
    assert finished.report.steps == whole.report.steps
    shutil.rmtree(newest_checkpoint(folder))
    assert newest_checkpoint(folder).name == "checkpoint-4"
    resumed = case.fit(method, save_steps=4, output=folder, resume=True)
    return all(_are_equal(own, whole, case) for own in (finished, resumed))


def _are_equal(own, whole, case):
    expected = whole.state()[0]
    tensors = own.state()[0]
    assert set(tensors) == set(expected)
    same = all(torch.equal(value, expected[name]) for name, value in tensors.items())
    draws = Draws(2)
    return same and torch.equal(own.logits(case.batch, draws), whole.logits(case.batch, draws))
