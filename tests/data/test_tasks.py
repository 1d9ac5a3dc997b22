"""The public tasks, their prompts, and the parts of a task."""

import json
from dataclasses import replace
from pathlib import Path

import datasets
import pytest

from bayestune import Refusal
from bayestune.data import (
    TASKS,
    Prompt,
    Question,
    Task,
    check_trainable,
    load_task,
    own_task,
    with_unlabelled,
)
from bayestune.data.prompts import CHOICES, PASSAGE_CHOICES, TRUE_FALSE

SHARED = Path(__file__).parents[2] / "shared" / "data"
LINE_SEPARATOR = "\u2028"


def ai2(key, stem, texts, answer, labels="ABCDE", column="question"):
    options = texts.split()
    choices = {"text": options, "label": list(labels[: len(options)])}
    return {"id": key, column: stem, "choices": choices, "answerKey": answer}


def winogrande(sentence, answer):
    return {"sentence": sentence, "option1": "Ann", "option2": "Mary", "answer": answer}


def glue(text, label):
    return {"sentence": text, "sentence1": "It rains.", "sentence2": text, "label": label}


ROWS = {
    "allenai/ai2_arc": [
        ai2("four", f"Which{LINE_SEPARATOR}is hot?", "ice snow fire rain", "C"),
        ai2("digits", "Which flies?", "cat bird fish dog", "2", labels="1234"),
        ai2("three", "Which is wet?", "sand stone water", "C"),
        ai2("five", "Which is red?", "sky grass snow coal blood", "E"),
    ],
    "allenai/winogrande": [
        winogrande("Mary is big", "2"),
        winogrande("Ann thanked Mary because _ was helped.", "1"),
        winogrande("Not labelled _ .", ""),
    ],
    "google/boolq": [
        {"question": "is the sky blue", "answer": True, "passage": "Blue sky."},
        {"question": "is snow black?", "answer": False, "passage": "Snow is white."},
    ],
    "allenai/openbookqa": [ai2("7", "Sun makes", "sleep plants", "B", column="question_stem")],
    "cais/mmlu": [
        {"question": "What is light?", "choices": ["a", "b", "c", "d"], "answer": 3},
        {"question": "What is mass?", "choices": ["a", "b", "c", "d"], "answer": 0},
    ],
    "everyday": [{"id": "moss-1", "question": "Green?", "options": ["moss", "salt"], "answer": 1}],
    "nyu-mll/glue": [glue("It is wet.", 0), glue("It is dry.", 1), glue("Unknown.", -1)],
}


def write_split(root, name, split, rows):
    path = root / TASKS[name].hub_id / TASKS[name].config / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8", newline="")


@pytest.fixture
def root(tmp_path):
    """All tasks in the Hub's layout, the rows of evaluation in the reverse order."""
    for name, source in TASKS.items():
        if source.train:
            write_split(tmp_path, name, source.train, ROWS[source.hub_id])
        write_split(tmp_path, name, source.evaluation, ROWS[source.hub_id][::-1])
    return tmp_path


@pytest.mark.parametrize(
    ("name", "answers", "first"),
    [
        (
            "arc_easy",
            "four=fire digits=bird three=water five=blood",
            f"|Which{LINE_SEPARATOR}is hot?|ice|snow|fire|rain",
        ),
        ("openbookqa", "7=plants", "|Sun makes|sleep|plants"),
        ("winogrande_s", "train-0=Mary train-1=Ann train-2=None", "|Mary is big|Ann|Mary"),
        ("boolq", "train-0=True train-1=False", "Blue sky.|is the sky blue?|True|False"),
        ("rte", "train-0=entailed train-1=not entailed train-2=None", "It rains.|It is wet.|"),
        ("mrpc", "train-0=different train-1=equivalent train-2=None", "It rains.|It is wet.|"),
        ("cola", "train-0=unacceptable train-1=acceptable train-2=None", "|It is wet.|unacc"),
        ("everyday", "moss-1=salt", "|Green?|moss|salt"),
    ],
)
def test_rows_are_read_the_right_way_round(root, name, answers, first):
    task = load_task(name, root)
    right = [None if row.answer is None else row.options[row.answer] for row in task.train]
    found = [f"{row.id}={option}" for row, option in zip(task.train, right, strict=True)]
    assert " ".join(found) == answers
    assert "|".join(task.train[0].content).startswith(first)
    assert [row.content for row in task.evaluation] == [row.content for row in task.train[::-1]]


def test_tasks_without_a_training_split_and_within_the_package(root):
    mmlu = load_task("mmlu_physics", root)
    assert [(row.question, row.answer) for row in mmlu.evaluation] == [
        ("What is mass?", 0),
        ("What is light?", 3),
    ]
    everyday = load_task("everyday")
    assert (len(mmlu.train), len(everyday.train), len(everyday.evaluation)) == (0, 240, 360)


@pytest.mark.parametrize("name", [name for name in TASKS if name != "everyday"])
def test_the_hub_gives_the_same_questions(root, name, monkeypatch):
    asked = []

    def from_disk(path, config, *, split):
        asked.append((path, config, split))
        rows = (root / path / config / f"{split}.jsonl").read_text(encoding="utf-8").split("\n")
        return datasets.Dataset.from_list([json.loads(row) for row in rows if row])

    monkeypatch.setattr(datasets, "load_dataset", from_disk)
    source = TASKS[name]
    assert load_task(name) == load_task(name, root)
    splits = [split for split in (source.train, source.evaluation) if split]
    assert asked == [(source.hub_id, source.config, split) for split in splits]


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared/data")
def test_no_row_of_the_public_sets_is_dropped():
    sizes = {
        "winogrande_s": (640, 1267),
        "arc_challenge": (1119, 299),
        "arc_easy": (2251, 570),
        "winogrande_m": (2558, 1267),
        "openbookqa": (4957, 500),
        "boolq": (9427, 3270),
        "mmlu_chemistry": (0, 100),
        "mmlu_physics": (0, 102),
    }
    for name, expected in sizes.items():
        task = load_task(name, SHARED)
        assert (len(task.train), len(task.evaluation)) == expected
        assert all(row.answer is not None for row in (*task.train, *task.evaluation))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("arc", r"unknown task: got 'arc', expected one of \['arc_challenge', .* or your own"),
        ("arc_easy", r"no such split: got .*ARC-Easy.train\.jsonl, expected <root>/"),
    ],
)
def test_an_unknown_task_or_split(tmp_path, name, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_task(name, tmp_path)


NO_OPTION = "the right answer is not among its . options"


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("arc_easy", ai2("odd", "?", "a b", "C"), f"row odd: {NO_OPTION}"),
        ("winogrande_s", winogrande("?", "3"), f"row train-0: {NO_OPTION}"),
        ("rte", glue("?", 2), f"row train-0: {NO_OPTION}"),
        ("boolq", {"question": "q", "answer": 1}, r"row train-0: no column 'passage'; got the .*"),
    ],
)
def test_a_row_that_cannot_be_read(root, name, row, message):
    write_split(root, name, "train", [row])
    with pytest.raises(ValueError, match=message):
        load_task(name, root)


# Prompts


HEAD = "Return the label of the correct answer for the question below.\n\n"
AB = "\nChoices:\nA) a\nB) b\nAnswer:"
BOOLQ = (
    "Read the passage below and answer the question with the words 'true' or 'false'.\n\n"
    "Passage: P {x}.\nQuestion: Q {x}?\nAnswer (true or false):"
)
RTE = "Passage: P {x}.\nStatement: Q {x}?\nDoes the passage entail the statement?"
PASSAGE = "Passage: P {x}.\nQuestion: Q {x}?"


@pytest.mark.parametrize(
    ("prompt", "letter", "text"),
    [
        (TASKS["arc_easy"].prompt, f"{HEAD}Question: Q {{x}}?{AB}", "Question: Q {x}?\nAnswer:"),
        (
            TASKS["winogrande_s"].prompt,
            f"{HEAD}Question: Q {{x}}?{AB}",
            "Fill in the blank: Q {x}?\nAnswer:",
        ),
        (TASKS["rte"].prompt, f"{HEAD}{RTE}{AB}", f"{RTE}\nAnswer:"),
        (TASKS["boolq"].prompt, BOOLQ, BOOLQ),
        (PASSAGE_CHOICES, f"{HEAD}{PASSAGE}{AB}", f"{PASSAGE}\nAnswer:"),
        (Prompt("{texts_first}", "", ("x", "y")), "a) x\nb) y", ""),
    ],
)
def test_prompts(prompt, letter, text):
    row = Question("1", "Q {x}?", ("a", "b"), 0, "P {x}.")
    assert prompt.render(row, "letter") == letter
    assert prompt.render(row, "text") == text


def test_answers_are_labels_or_texts():
    row = Question("r7", "?", ("you", "me", "us"), 0)
    assert CHOICES.answers(row, "letter") == ("A", "B", "C")
    assert TRUE_FALSE.answers(row, "text") == ("you", "me", "us")
    with pytest.raises(ValueError, match="row r7: got 3 options, expected at most 2 under letter"):
        TRUE_FALSE.answers(row, "letter")


# Parts


def numbered(count):
    return tuple(Question(str(i), f"q{i}", ("a", "b"), i % 2) for i in range(count))


def ids(rows):
    return [row.id for row in rows]


def test_the_held_out_part_is_seeded_disjoint_and_sized():
    task = Task("t", numbered(50), numbered(20))
    part = task.subset(holdout=0.1, seed=3)
    assert (len(part.held_out), len(part.train)) == (5, 45)
    assert {*part.held_out, *part.train} == set(task.train)
    assert part == task.subset(holdout=0.1, seed=3)
    assert set(part.held_out) != set(task.subset(holdout=0.1, seed=4).held_out)
    assert part.evaluation == task.evaluation


def test_a_smaller_train_part_never_takes_held_out_rows():
    task = Task("t", numbered(50), numbered(20))
    small = task.subset(10, 7, 0.2, seed=1)
    large = task.subset(20, 7, 0.2, seed=1)
    assert (len(small.train), len(small.held_out), len(small.evaluation)) == (10, 10, 7)
    assert small.held_out == large.held_out
    assert small.train == large.train[:10]
    assert not set(large.train) & set(large.held_out)
    assert len(set(small.evaluation)) == 7
    assert small.evaluation != task.subset(10, 7, 0.2, seed=2).evaluation


@pytest.mark.parametrize("evaluation", [None, 3])
def test_training_rows_keep_their_order_unless_some_are_chosen(evaluation):
    task = Task("t", numbered(10), numbered(10))
    assert task.subset(evaluation=evaluation, seed=1).train == task.train


def test_the_chosen_rows_are_those_of_before():
    task = Task("t", numbered(10), numbered(10))
    assert ids(task.subset(100, seed=1).train) == list("6897530412")
    part = task.subset(4, 3, 0.3, seed=2)
    assert (ids(part.train), ids(part.held_out)) == (list("4672"), list("593"))
    assert ids(part.evaluation) == list("018")


def test_a_repeated_row_is_not_held_out():
    task = Task("t", numbered(8) + numbered(8), ())
    part = task.subset(holdout=0.5, seed=1)
    assert 0 < len(part.held_out) < 8
    assert not set(part.held_out) & set(part.train)


def test_more_rows_than_there_are_is_all_of_them():
    part = Task("t", numbered(6), numbered(4)).subset(100, 100)
    assert (set(part.train), part.evaluation, part.held_out) == (set(numbered(6)), numbered(4), ())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"holdout": -0.1}, r"holdout must lie in \[0, 1\): got -0.1"),
        ({"holdout": 1.0}, r"holdout must lie in \[0, 1\): got 1.0"),
        ({"holdout": 0.01}, "holdout=0.01 of 6 training rows leaves a part empty"),
        ({"holdout": 0.99}, "holdout=0.99 of 6 training rows leaves a part empty"),
        ({"train": -1}, "rows to keep must not be negative: got train=-1"),
        ({"evaluation": -2}, "rows to keep must not be negative: got .*evaluation=-2"),
    ],
)
def test_parts_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        Task("t", numbered(6), numbered(6)).subset(**changes)


def test_own_task_has_a_prompt_with_a_passage_where_a_row_has_one():
    plain = numbered(2)
    passage = (Question("p", "?", ("a", "b"), 0, "text"),)
    assert own_task("mine", plain, plain) == Task("mine", plain, plain, prompt=CHOICES)
    assert own_task("mine", plain, passage).prompt is PASSAGE_CHOICES
    assert own_task("mine", passage, ()).prompt is PASSAGE_CHOICES


def test_what_cannot_be_trained_on():
    rows = numbered(4)
    check_trainable(Task("t", rows, ()))
    with pytest.raises(ValueError, match="task t has no training rows; train on another task"):
        check_trainable(Task("t", (), rows))
    with pytest.raises(
        ValueError, match="all 2 training rows of t have .* option 1: got one class"
    ):
        check_trainable(Task("t", rows[1::2], rows))


@pytest.mark.parametrize(("options", "answer"), [(("a",), 0), ((), None)])
def test_a_question_has_options(options, answer):
    with pytest.raises(ValueError, match=f"row 1: got {len(options)} options, expected at least"):
        Question("1", "?", options, answer)


def test_spare_rows_of_train_lose_their_answers():
    task = load_task("everyday")
    chosen = task.subset(train=20, evaluation=10, holdout=0.1, seed=3, unlabelled=30)
    assert [len(part) for part in (chosen.train, chosen.unlabelled)] == [20, 30]
    assert all(row.answer is None for row in chosen.unlabelled)
    parts = [{row.content for row in part} for part in (chosen.train, chosen.held_out)]
    assert not {row.content for row in chosen.unlabelled} & (parts[0] | parts[1])
    assert chosen.train == task.subset(train=20, holdout=0.1, seed=3).train
    rest = task.subset(unlabelled=30)
    assert len(rest.train) == len(task.train) - 30
    with pytest.raises(Refusal, match="too few rows to spare: got .* ask for fewer"):
        task.subset(train=len(task.train) - 5, unlabelled=6)


def test_evaluation_rows_that_a_student_learns_from_are_seen():
    rows = [Question(f"{i}", f"what is {i}?", ("red", "green"), 0) for i in range(6)]
    task = own_task("own", rows[:2], rows[1:5])
    assert [row.id for row in task.seen] == ["1"]
    turned = replace(rows[4], options=("green", "red"), answer=None)
    assert [row.id for row in with_unlabelled(task, [turned, rows[5]]).seen] == ["1", "4"]
