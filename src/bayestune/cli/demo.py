"""The demo: MLE and BLoB on embedded questions, evaluated on those that nothing was chosen on."""

import time
from dataclasses import replace

from jsonargparse import Namespace

from bayestune.adapters import Lora
from bayestune.cli.commands import Run, compare_methods
from bayestune.cli.output_folder import OutputFolder
from bayestune.evaluation import EvaluationOptions
from bayestune.methods import MLE, BLoB
from bayestune.session import Session, TaskOptions
from bayestune.training import Training

# Chosen on the validation questions, see docs/demo.md; the test questions were not looked at.
QUESTIONS = TaskOptions(task="everyday", scoring="text", train_rows=96, evaluation_rows=240)
LORA = Lora(targets=("q_proj", "v_proj"))
TRAINING = Training(lora=LORA, steps=144, learning_rate=1e-3, bf16=True, logging_steps=24)
BLOB = BLoB(prior_std=0.4, final_std=0.3, schedule="constant")
PREDICTING = EvaluationOptions(draws=(0, 10))


def demo(o: Namespace) -> None:
    """MLE and BLoB on the embedded questions in a few minutes, with a report."""
    begin = time.perf_counter()
    output = OutputFolder.of(o)
    session = replace(Session.open(o.model, QUESTIONS), progress=o.progress)
    training = replace(TRAINING, progress=o.progress)
    run = Run(output, command=o.command_line)
    compare_methods(session, {"mle": MLE(), "blob": BLOB}, training, PREDICTING, run)
    print(f"finished in {time.perf_counter() - begin:.0f} s")
