"""`distil`: a student of a posterior's folder."""

from typing import Any

from jsonargparse import Namespace

from bayestune.bench import lasting, lasting_method
from bayestune.cli.options import build
from bayestune.cli.output_folder import OutputFolder
from bayestune.cli.run_settings import Settings, plain_settings
from bayestune.data import rows_digest
from bayestune.methods import Distilled
from bayestune.posteriors import DETAILS, Teacher, read_details
from bayestune.runtime import is_first_process
from bayestune.session import DistillationRows, Lesson
from bayestune.training import Training


def distil(args: Namespace) -> None:
    """Trains a student of a posterior: one plain LoRA adapter that answers as its draws do."""
    output = OutputFolder.of(args)
    method = build(Distilled, args)
    rows = build(DistillationRows, args)
    asked_for = build(Training, args, output=None, bf16=False)
    lesson = Lesson.open(args.posterior, rows, method, args.model)
    training = lesson.training(asked_for, args.bf16)
    settings = _settings(lesson, training)
    if output.resume and (output.place / DETAILS).is_file():
        output.finish(output.begin(settings))
        if is_first_process():
            print(f"finished already: student in {output.folder}")
        return
    place = output.begin(settings)
    lesson.student(training, place)
    output.finish(place)
    if not is_first_process():
        return
    teacher: dict[str, Any] = read_details(output.folder)["facts"]["teacher"]
    print(f"student in {output.folder}: {Teacher(**teacher)}")


def _settings(lesson: Lesson, training: Training) -> Settings:
    """What determines the student, by the names of the options."""
    of_method = lasting_method(lesson.method)
    del of_method["method"]
    of_method.pop("base", None)
    settings: Settings = dict(of_method)
    for name, value in lasting(training).items():
        settings.setdefault(name, value)  # the steps and the rate are the method's too
    settings["the files of POSTERIOR"] = lesson.digest
    settings["the rows of --unlabelled"] = rows_digest(lesson.rows)
    return plain_settings(settings)
