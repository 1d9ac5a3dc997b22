"""The table of public tasks, and how their rows are read."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from bayestune.data import prompts
from bayestune.data.prompts import Prompt
from bayestune.data.questions import Question
from bayestune.data.tasks import Task
from bayestune.errors import Refusal, nearest
from bayestune.whole_files import JsonRow, read_json_lines

Parse = Callable[[JsonRow, str], Question]


def _ai2(row: JsonRow, key: str) -> Question:
    labels = row["choices"]["label"]
    right = row["answerKey"]
    answer = labels.index(right) if right in labels else -1  # which `Question` refuses
    question = row.get("question") or row["question_stem"]
    return Question(row.get("id", key), question, tuple(row["choices"]["text"]), answer)


def _winogrande(row: JsonRow, key: str) -> Question:
    options = (row["option1"], row["option2"])
    answer = int(row["answer"]) - 1 if row["answer"] else None
    return Question(key, row["sentence"], options, answer)


def _boolq(row: JsonRow, key: str) -> Question:
    question = row["question"].strip().rstrip("?") + "?"
    answer = 0 if row["answer"] else 1
    return Question(key, question, ("True", "False"), answer, context=row["passage"])


def _boolq_authors(row: JsonRow, key: str) -> Question:
    # as their code reads it: the question as it stands, the passage cut by characters
    question = _boolq(row, key)
    return replace(question, question=row["question"], context=row["passage"][:1024])


def _label(row: JsonRow) -> int | None:
    return row["label"] if row["label"] >= 0 else None  # GLUE's label of an unknown answer is -1


def _pair(*options: str) -> Parse:
    def parse(row: JsonRow, key: str) -> Question:
        return Question(key, row["sentence2"], options, _label(row), row["sentence1"])

    return parse


def _cola(row: JsonRow, key: str) -> Question:
    return Question(key, row["sentence"], ("unacceptable", "acceptable"), _label(row))


def _plain(row: JsonRow, key: str) -> Question:
    options = tuple(row.get("options") or row["choices"])
    return Question(str(row.get("id", key)), row["question"], options, row["answer"])


@dataclass(frozen=True)
class Source:
    """A public task: where its rows are and how they are read."""

    hub_id: str
    config: str
    parse: Parse
    prompt: Prompt = prompts.CHOICES
    train: str | None = "train"
    evaluation: str = "validation"


def _mmlu(config: str) -> Source:
    return Source("cais/mmlu", config, _plain, train=None, evaluation="test")


TASKS: dict[str, Source] = {
    "winogrande_s": Source("allenai/winogrande", "winogrande_s", _winogrande, prompts.BLANK),
    "winogrande_m": Source("allenai/winogrande", "winogrande_m", _winogrande, prompts.BLANK),
    "arc_challenge": Source("allenai/ai2_arc", "ARC-Challenge", _ai2),
    "arc_easy": Source("allenai/ai2_arc", "ARC-Easy", _ai2),
    "openbookqa": Source("allenai/openbookqa", "main", _ai2),
    "boolq": Source("google/boolq", "default", _boolq, prompts.TRUE_FALSE),
    "mmlu_chemistry": _mmlu("college_chemistry"),
    "mmlu_physics": _mmlu("college_physics"),
    "rte": Source("nyu-mll/glue", "rte", _pair("entailed", "not entailed"), prompts.ENTAILMENT),
    "mrpc": Source("nyu-mll/glue", "mrpc", _pair("different", "equivalent"), prompts.PARAPHRASE),
    "cola": Source("nyu-mll/glue", "cola", _cola, prompts.ACCEPTABLE),
    "everyday": Source("everyday", "default", _plain, evaluation="test"),
    "arc_challenge_authors": Source("allenai/ai2_arc", "ARC-Challenge", _ai2, prompts.AUTHORS_ARC),
    "arc_easy_authors": Source("allenai/ai2_arc", "ARC-Easy", _ai2, prompts.AUTHORS_ARC),
    "openbookqa_authors": Source("allenai/openbookqa", "main", _ai2, prompts.AUTHORS_OPENBOOK),
    "boolq_authors": Source("google/boolq", "default", _boolq_authors, prompts.AUTHORS_BOOLQ),
}


def load_task(name: str, data_root: Path | None = None) -> Task:
    """Loads a task of the table, without training rows where the table names no such split.

    Args:
        name: a key of `TASKS`.
        data_root: has `<hub id>/<config>/<split>.jsonl`; None for the Hub, or for "everyday".

    Raises:
        Refusal: if the name is not in the table, or a row cannot be read.
        FileNotFoundError: if the directory lacks a file.
    """
    source = _source(name)
    data_root = _root(source, data_root)
    train = _questions(source, source.train, data_root) if source.train else ()
    evaluation = _questions(source, source.evaluation, data_root)
    return Task(name, train, evaluation, prompt=source.prompt)


def load_split(name: str, split: str, data_root: Path | None = None) -> tuple[Question, ...]:
    """The rows of one split of a public task's data set, whether the table names it or not.

    Args:
        name: a key of `TASKS`.
        split: as the data set calls it.
        data_root: as in `load_task`.

    Raises:
        Refusal: if the name is not in the table, or a row cannot be read.
        FileNotFoundError: if the directory lacks the file.
    """
    source = _source(name)
    return _questions(source, split, _root(source, data_root))


def _root(source: Source, data_root: Path | None) -> Path | None:
    """The directory of the rows: this package's own for "everyday"; None for the Hub."""
    if source.hub_id == "everyday" and data_root is None:
        return Path(__file__).parent
    return data_root


def prompt_of(name: str) -> Prompt:
    """The prompt of a public task; refuses a name that is no key of `TASKS`."""
    return _source(name).prompt


def _source(name: str) -> Source:
    if name not in TASKS:
        alike = nearest(name, TASKS)
        hint = f"; did you mean {alike!r}?" if alike else ""
        raise Refusal(
            f"unknown task: got {name!r}, expected one of {sorted(TASKS)} or your own --data{hint}"
        )
    return TASKS[name]


def _questions(source: Source, split: str, data_root: Path | None) -> tuple[Question, ...]:
    questions = []
    for i, row in enumerate(_rows(source, split, data_root)):
        key = f"{split}-{i}"
        try:
            questions.append(source.parse(row, key))
        except KeyError as error:
            got = sorted(row)
            raise Refusal(f"row {key}: no column {error}; got the columns {got}") from None
    return tuple(questions)


def _rows(source: Source, split: str, data_root: Path | None) -> Iterable[JsonRow]:
    if data_root is None:
        from datasets import load_dataset

        return load_dataset(source.hub_id, source.config, split=split)  # type: ignore[return-value]
    path = data_root / source.hub_id / source.config / f"{split}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"no such split: got {path}, expected <root>/<hub id>/<config>/<split>.jsonl"
        )
    return read_json_lines(path)
