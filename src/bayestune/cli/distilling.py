"""`distil`: a student of a posterior's folder."""

from typing import Any

from jsonargparse import Namespace

from bayestune.bench import lasting, lasting_method
from bayestune.cli.options import built
from bayestune.cli.output_folder import OutputFolder
from bayestune.cli.run_settings import Settings, plain_settings
from bayestune.data import rows_digest
from bayestune.methods import Distilled
from bayestune.posteriors import DETAILS, Teacher, read_details
from bayestune.runtime import is_first_process
from bayestune.session import DistillationRows, Lesson
from bayestune.training import Training


def distil(o: Namespace) -> None:
    """A student of a posterior: one plain LoRA adapter that answers as its draws do."""
    output = OutputFolder.of(o)
    method = built(Distilled, o)
    rows = built(DistillationRows, o)
    started = built(Training, o, output=None, bf16=False)
    lesson = Lesson.open(o.posterior, rows, method, o.model)
    training = lesson.training(started, o.bf16)
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
    own = lasting_method(lesson.method)
    found: Settings = {name: own[name] for name in own if name not in ("method", "base")}
    found |= {name: value for name, value in lasting(training).items() if name not in found}
    found["the files of POSTERIOR"] = lesson.digest
    found["the rows of --unlabelled"] = rows_digest(lesson.rows)
    return plain_settings(found)
