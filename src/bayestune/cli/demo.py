"""`demo`: MLE, BLoB and a one-pass rival of each, on questions that no setting was chosen on."""

import time
from dataclasses import replace

from jsonargparse import Namespace

from bayestune.adapters import Lora
from bayestune.cli.comparing_methods import Run, compare_methods
from bayestune.cli.output_folder import OutputFolder
from bayestune.data import Task, load_split
from bayestune.evaluation import EvaluationOptions
from bayestune.methods import MLE, BLoB, Distilled, Method, Temperature
from bayestune.session import Session, TaskOptions
from bayestune.training import Training

# Chosen on the validation questions, see docs/demo.md; the test questions were not looked at.
QUESTIONS = TaskOptions(
    task="everyday", scoring="text", train_rows=96, evaluation_rows=240, unlabelled_rows=144
)
LORA = Lora(targets=("q_proj", "v_proj"))
TRAINING = Training(lora=LORA, steps=144, learning_rate=1e-3, bf16=True, logging_steps=24)
BLOB = BLoB(prior_std=0.4, final_std=0.3, schedule="constant")
PREDICTING = EvaluationOptions(draws=(0, 10))
STUDENT_STEPS = 132  # of 4 questions: each of the 264 twice
LABELS = {"temperature": "MLE + temperature", "distilled": "Student of BLoB"}


def demo(args: Namespace) -> None:
    """Fits and evaluates on the embedded questions in a few minutes, with a report."""
    begin = time.perf_counter()
    output = OutputFolder.of(args)
    session = Session.open(args.model, QUESTIONS, task=demo_task())
    session = replace(session, progress=args.progress)
    training = replace(TRAINING, progress=args.progress)
    run = Run(output, labels=LABELS, command=args.command_line)
    compare_methods(session, demo_methods(), training, PREDICTING, run)
    print(f"finished in {time.perf_counter() - begin:.0f} s")


def demo_task() -> Task:
    """The questions of the demo.

    The temperature is fitted on the validation questions. The student learns from the validation
    questions and the training questions that are not trained on, all without their answers.
    """
    task = QUESTIONS.load()
    validation = load_split("everyday", "validation")
    without_answers = tuple(replace(row, answer=None) for row in validation)
    return replace(task, held_out=validation, unlabelled=(*task.unlabelled, *without_answers))


def demo_methods() -> dict[str, Method]:
    """What is compared: two fits, and after each what builds on it without fitting it again."""
    return {
        "mle": MLE(),
        "temperature": Temperature(MLE()),
        "blob": BLOB,
        "distilled": Distilled(BLOB, steps=STUDENT_STEPS),
    }
