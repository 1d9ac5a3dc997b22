"""A task of twelve classes from the embedded questions: which topic a question has."""

from pathlib import Path

from bayestune.data import Prompt, Question, Task, public_tasks
from bayestune.whole_files import read_json_lines

TOPICS = (
    ("animals", "animals"),
    ("earth", "earth and rocks"),
    ("tools", "everyday life and tools"),
    ("food", "food and health"),
    ("forces", "forces and energy"),
    ("geography", "geography"),
    ("body", "human body"),
    ("light", "light sound and electricity"),
    ("matter", "matter and materials"),
    ("plants", "plants"),
    ("space", "space"),
    ("weather", "weather and climate"),
)
_TOPIC = "Name the topic of the question.\n\nQuestion: {question}\nTopic:"


def topics() -> Task:
    """Which of twelve topics an embedded question has: its train rows, its validation rows."""
    folder = Path(public_tasks.__file__).parent / "everyday/default"
    names = [name for _, name in TOPICS]

    def part(name: str) -> tuple[Question, ...]:
        lines = read_json_lines(folder / f"{name}.jsonl")
        rows = [(row["id"], row["question"], names.index(row["topic"])) for row in lines]
        return tuple(Question(key, text, tuple(names), answer) for key, text, answer in rows)

    prompt = Prompt(_TOPIC, _TOPIC, tuple(label for label, _ in TOPICS))
    return Task("topics", part("train"), part("validation"), prompt=prompt)
