"""What `test_methods` asks of a registered method, for one method at settings that a tiny model feels."""

import shutil
from dataclasses import replace

import torch

from bayestune.adapters import Slots
from bayestune.forward import Draws
from bayestune.posteriors import load_posterior, predict, save_posterior
from bayestune.scoring import make_scorer
from bayestune.training import Training
from bayestune.training.training import newest_checkpoint

TRAINING = Training(steps=8, learning_rate=1e-2, progress=False, logging_steps=1)


def bound(make, tokenizer, task, scoring):
    """A scorer, and a batch of its evaluation rows without labels."""
    scorer = make_scorer(make(), tokenizer, task, scoring)
    batch = scorer.collate(scorer.encode(task.evaluation))
    batch.pop("labels")
    return scorer, batch


def keeps_its_promises(method, make, scorer, batch, folder, steps=8):
    """Same seed same fit, base untouched, draws that differ and are the same after loading; returns the posterior."""
    training, base = replace(TRAINING, steps=steps), make()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    posterior = method.fit(base, scorer, training)
    logits = posterior.logits(batch, Draws(3))
    assert torch.equal(logits, method.fit(make(), scorer, training).logits(batch, Draws(3)))
    assert not torch.equal(
        logits, method.fit(make(), scorer, replace(training, seed=5)).logits(batch, Draws(3))
    )
    assert logits.nan_to_num(neginf=0).var(0).max() > 0
    assert predict(posterior, batch, 0).probabilities.isfinite().all()
    loaded = load_posterior(make(), save_posterior(posterior, folder), scorer)
    assert type(loaded) is type(posterior)
    assert torch.equal(loaded.logits(batch, Draws(3)), logits)
    assert torch.equal(loaded.logits(batch, Draws(0)), posterior.logits(batch, Draws(0)))
    heads = tuple(Slots(posterior.model).heads)  # trained whole
    after = posterior.model.unload().state_dict()
    assert all(
        torch.equal(value, after[name])
        for name, value in before.items()
        if not name.startswith(heads or "none")
    )
    return loaded


def learns(method, make, scorer, task, steps=60, learning_rate=3e-2):
    """The mean's loss on the training rows, over that of guessing."""
    posterior = method.fit(
        make(), scorer, replace(TRAINING, steps=steps, learning_rate=learning_rate)
    )
    batch = scorer.collate(scorer.encode(task.train))
    labels = batch.pop("labels")
    loss = -predict(posterior, batch, 0).probabilities[range(len(labels)), labels].log().mean()
    return loss / torch.tensor([len(row.options) for row in task.train]).double().log().mean()


def resumes(method, make, scorer, batch, folder):
    """Whether a run that is stopped at a checkpoint in its middle and resumed ends as the whole one."""
    training = replace(TRAINING, save_steps=4, output=folder)
    whole = method.fit(make(), scorer, training)
    shutil.rmtree(newest_checkpoint(folder))
    assert newest_checkpoint(folder).name == "checkpoint-4"
    resumed = method.fit(make(), scorer, replace(training, resume=True))
    tensors, expected = resumed.state()[0], whole.state()[0]
    assert set(tensors) == set(expected)
    same = all(torch.equal(value, expected[name]) for name, value in tensors.items())
    return same and torch.equal(resumed.logits(batch, Draws(2)), whole.logits(batch, Draws(2)))
