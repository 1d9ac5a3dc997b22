"""An adapter that exists already: a posterior around it without training, and its calibration.

    python examples/existing_adapter.py --adapter path/to/adapter --model its/base

Takes any LoRA adapter as PEFT saves it, or, with none, trains a small one as anybody would. TFB
widens it into a Gaussian as far as anchor rows allow; the plain adapter and the posterior are then
calibrated on held-out rows. Expect the posterior to be less sure, above all of the wolf.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import bayestune as bt
from bayestune import CalibrationOptions, Promise, Question
from bayestune.methods import TFB
from bayestune.posteriors import load_adapter

ANIMALS = ("ant", "horse", "mouse", "whale", "wasp", "bear", "snail", "cow")
OPTIONS = ("smaller than a shoe", "larger than a person")


def questions(first: int, last: int) -> list[Question]:
    texts = [f"How large is {ANIMALS[i % 8]} number {i}?" for i in range(first, last)]
    return [Question(text, text, OPTIONS, i % 2) for i, text in enumerate(texts, first)]


def train_one(model: str, task: bt.Task, steps: int, folder: Path) -> Path:
    loaded = bt.load_model(model)
    scorer = bt.make_scorer(loaded.model, loaded.tokenizer, task)
    training = bt.Training(
        bt.Lora(rank=8, alpha=16), steps=steps, learning_rate=1e-3, progress=False
    )
    bt.MLE().fit(loaded.model, scorer, training).model.save_pretrained(folder)
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--draws", type=int, default=10)
    given = parser.parse_args(arguments)

    task = bt.Task("animals", tuple(questions(0, 32)), ())
    asked = [Question("new", "How large is a wolf?", OPTIONS, None), *questions(92, 94)]
    with tempfile.TemporaryDirectory() as name:
        adapter = given.adapter or train_one(given.model, task, given.steps, Path(name, "plain"))
        loaded = bt.load_model(given.model)
        scorer = bt.make_scorer(loaded.model, loaded.tokenizer, task)
        point = load_adapter(loaded.model, adapter, scorer)
        posterior = TFB(anchors=16).bayesianise(point, scorer, task.train)
        bt.save_posterior(posterior, Path(name, "posterior"))
        found = bt.predict(posterior, scorer.collate(scorer.encode(asked)), given.draws)
        options = CalibrationOptions(Promise(risk=0.2))
        bt.calibrate(adapter, questions(32, 92), options, model=given.model)
        for row, line in enumerate(bt.decide(adapter, asked, model=given.model)):
            wide = found.probabilities[row].max().item()
            told = f"adapter {line['confidence']:.2f} ({line['decision']}), posterior {wide:.2f}"
            print(f"{asked[row].question:32} {told}")


if __name__ == "__main__":
    main()
