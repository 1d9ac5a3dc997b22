import csv
import json
from pathlib import Path

import pytest

from bayestune.data import (
    TASKS,
    Prompt,
    Question,
    Task,
    check_trainable,
    load_rows,
    load_task,
    own_task,
)
from bayestune.data.files import own_question
from bayestune.data.prompts import BLANK, CHOICES, PASSAGE_CHOICES, TRUE_FALSE

SHARED = Path(__file__).parents[2] / "shared" / "data"
LINE_SEPARATOR = "\u2028"


def ai2(key, stem, texts, labels, answer, column="question"):
    return {
        "id": key,
        column: stem,
        "choices": {"text": texts, "label": labels},
        "answerKey": answer,
    }


def mmlu(question, answer):
    return {
        "question": question,
        "subject": "college_physics",
        "choices": ["a", "b", "c", "d"],
        "answer": answer,
    }


ARC = [
    ai2(
        "four", f"Which{LINE_SEPARATOR}is hot?", ["ice", "snow", "fire", "rain"], list("ABCD"), "C"
    ),
    ai2("digits", "Which flies?", ["cat", "bird", "fish", "dog"], list("1234"), "2"),
    ai2("three", "Which is wet?", ["sand", "stone", "water"], list("ABC"), "C"),
    ai2("five", "Which is red?", ["sky", "grass", "snow", "coal", "blood"], list("ABCDE"), "E"),
]
WINOGRANDE = [
    {
        "sentence": "The cup is in the bag because the _ is big.",
        "option1": "cup",
        "option2": "bag",
        "answer": "2",
    },
    {
        "sentence": "Ann thanked Mary because _ was helped.",
        "option1": "Ann",
        "option2": "Mary",
        "answer": "1",
    },
    {"sentence": "Not labelled _ .", "option1": "Ann", "option2": "Mary", "answer": ""},
]
BOOLQ = [
    {"question": "is the sky blue", "answer": True, "passage": "The sky looks blue."},
    {"question": "is snow black?", "answer": False, "passage": "Snow is white."},
]
OPENBOOK = [
    ai2(
        "7-980",
        "The sun is responsible for",
        ["sleep", "plants"],
        list("AB"),
        "B",
        column="question_stem",
    )
]
MMLU = [mmlu("What is light?", 3), mmlu("What is mass?", 0)]
EVERYDAY = [
    {
        "id": "plants-1",
        "topic": "plants",
        "question": "Green?",
        "options": ["moss", "salt"],
        "answer": 1,
    }
]
GLUE_PAIR = [
    {"sentence1": "It rains.", "sentence2": "It is wet.", "label": 0, "idx": 0},
    {"sentence1": "It rains.", "sentence2": "It is dry.", "label": 1, "idx": 1},
]
GLUE_SENTENCE = [
    {"sentence": "It rains.", "label": 1, "idx": 0},
    {"sentence": "Rains it the.", "label": 0, "idx": 1},
]
ROWS = {
    "winogrande_s": WINOGRANDE,
    "winogrande_m": WINOGRANDE,
    "arc_challenge": ARC,
    "arc_easy": ARC,
    "openbookqa": OPENBOOK,
    "boolq": BOOLQ,
    "mmlu_chemistry": MMLU,
    "mmlu_physics": MMLU,
    "rte": GLUE_PAIR,
    "mrpc": GLUE_PAIR,
    "cola": GLUE_SENTENCE,
    "everyday": EVERYDAY,
    "arc_challenge_authors": ARC,
    "arc_easy_authors": ARC,
    "openbookqa_authors": OPENBOOK,
    "boolq_authors": BOOLQ,
}


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8", newline="")
    return path


def flipped(rows):
    """Other rows than those of train, so that a split read twice shows."""
    return rows[::-1]


@pytest.fixture
def root(tmp_path):
    for name, source in TASKS.items():
        folder = tmp_path / source.hub_id / source.config
        if source.train:
            write_lines(folder / f"{source.train}.jsonl", ROWS[name])
        write_lines(folder / f"{source.evaluation}.jsonl", flipped(ROWS[name]))
    return tmp_path


def test_the_table_names_the_public_sets():
    where = {name: (s.hub_id, s.config, s.train, s.evaluation) for name, s in TASKS.items()}
    assert where == {
        "winogrande_s": ("allenai/winogrande", "winogrande_s", "train", "validation"),
        "winogrande_m": ("allenai/winogrande", "winogrande_m", "train", "validation"),
        "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "train", "validation"),
        "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "train", "validation"),
        "openbookqa": ("allenai/openbookqa", "main", "train", "validation"),
        "boolq": ("google/boolq", "default", "train", "validation"),
        "mmlu_chemistry": ("cais/mmlu", "college_chemistry", None, "test"),
        "mmlu_physics": ("cais/mmlu", "college_physics", None, "test"),
        "rte": ("nyu-mll/glue", "rte", "train", "validation"),
        "mrpc": ("nyu-mll/glue", "mrpc", "train", "validation"),
        "cola": ("nyu-mll/glue", "cola", "train", "validation"),
        "everyday": ("everyday", "default", "train", "test"),
        **{
            f"{name}_authors": where[name]
            for name in ("arc_challenge", "arc_easy", "openbookqa", "boolq")
        },
    }


def test_glue_rows_are_the_right_way_round(root):
    entailed, other = load_task("rte", root).train
    assert (entailed.context, entailed.question) == ("It rains.", "It is wet.")
    assert [row.options[row.answer] for row in (entailed, other)] == ["entailed", "not entailed"]
    assert [row.options[row.answer] for row in load_task("mrpc", root).train] == [
        "different",
        "equivalent",
    ]
    assert [row.options[row.answer] for row in load_task("cola", root).train] == [
        "acceptable",
        "unacceptable",
    ]
    assert "Passage: It rains.\nStatement: It is wet." in load_task("rte", root).prompt.render(
        entailed, "letter"
    )


def test_arc_rows(root):
    task = load_task("arc_easy", root)
    assert [len(row.options) for row in task.train] == [4, 4, 3, 5]
    assert [row.options[row.answer] for row in task.train] == ["fire", "bird", "water", "blood"]
    assert [row.answer for row in task.train] == [2, 1, 2, 4]
    assert task.train[0].question == f"Which{LINE_SEPARATOR}is hot?"
    assert task.train[0].id == "four"
    assert task.evaluation == task.train[::-1]


def test_winogrande_rows(root):
    train = load_task("winogrande_s", root).train
    assert [row.options for row in train[:2]] == [("cup", "bag"), ("Ann", "Mary")]
    assert [row.answer for row in train] == [1, 0, None]
    assert [row.id for row in train] == ["train-0", "train-1", "train-2"]


def test_boolq_is_the_right_way_round(root):
    sky, snow = load_task("boolq", root).train
    assert sky.options[sky.answer] == "True"
    assert snow.options[snow.answer] == "False"
    assert [sky.question, snow.question] == ["is the sky blue?", "is snow black?"]
    assert sky.context == "The sky looks blue."
    assert TRUE_FALSE.answers(sky, "letter") == TRUE_FALSE.answers(sky, "text") == ("True", "False")


def test_openbookqa_rows(root):
    (row,) = load_task("openbookqa", root).train
    assert row == Question("7-980", "The sun is responsible for", ("sleep", "plants"), 1)


def test_mmlu_has_no_training_rows(root):
    task = load_task("mmlu_physics", root)
    assert task.train == ()
    assert [(row.question, row.answer) for row in task.evaluation] == [
        ("What is mass?", 0),
        ("What is light?", 3),
    ]


def test_everyday_comes_with_the_package(root):
    assert load_task("everyday", root).train == (
        Question("plants-1", "Green?", ("moss", "salt"), 1),
    )
    packaged = load_task("everyday")
    assert len(packaged.train) + len(packaged.evaluation) > 100


HEAD = "Return the label of the correct answer for the question below.\n\n"


@pytest.mark.parametrize(
    ("name", "place", "letter", "text"),
    [
        (
            "arc_easy",
            3,
            f"{HEAD}Question: Which is red?\nChoices:\nA) sky\nB) grass\nC) snow\nD) coal\nE) blood\nAnswer:",
            "Question: Which is red?\nAnswer:",
        ),
        (
            "openbookqa",
            0,
            f"{HEAD}Question: The sun is responsible for\nChoices:\nA) sleep\nB) plants\nAnswer:",
            "Question: The sun is responsible for\nAnswer:",
        ),
        (
            "winogrande_s",
            1,
            f"{HEAD}Question: Ann thanked Mary because _ was helped.\nChoices:\nA) Ann\nB) Mary\nAnswer:",
            "Fill in the blank: Ann thanked Mary because _ was helped.\nAnswer:",
        ),
        (
            "boolq",
            0,
            "Read the passage below and answer the question with the words 'true' or 'false'.\n\n"
            "Passage: The sky looks blue.\nQuestion: is the sky blue?\nAnswer (true or false):",
            "Read the passage below and answer the question with the words 'true' or 'false'.\n\n"
            "Passage: The sky looks blue.\nQuestion: is the sky blue?\nAnswer (true or false):",
        ),
    ],
)
def test_prompts(root, name, place, letter, text):
    task = load_task(name, root)
    assert task.prompt.render(task.train[place], "letter") == letter
    assert task.prompt.render(task.train[place], "text") == text


def test_a_prompt_with_a_passage():
    row = Question("1", "Who {x}?", ("you", "me"), 0, "A text {y}.")
    assert PASSAGE_CHOICES.render(row, "letter") == (
        f"{HEAD}Passage: A text {{y}}.\nQuestion: Who {{x}}?\nChoices:\nA) you\nB) me\nAnswer:"
    )
    assert (
        PASSAGE_CHOICES.render(row, "text") == "Passage: A text {y}.\nQuestion: Who {x}?\nAnswer:"
    )


def test_answers_are_letters_or_texts():
    row = Question("1", "?", ("you", "me", "us"), 0)
    assert CHOICES.answers(row, "letter") == ("A", "B", "C")
    assert BLANK.answers(row, "text") == ("you", "me", "us")


def test_more_options_than_labels():
    row = Question("r7", "?", ("a", "b", "c"), 0)
    with pytest.raises(ValueError, match="row r7: got 3 options, expected at most 2 under letter"):
        TRUE_FALSE.answers(row, "letter")
    assert TRUE_FALSE.answers(row, "text") == ("a", "b", "c")


@pytest.mark.parametrize("name", [name for name in TASKS if name != "everyday"])
def test_the_hub_gives_the_same_questions(root, name, monkeypatch):
    import datasets

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


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data")
@pytest.mark.parametrize(
    ("name", "train", "evaluation"),
    [
        ("winogrande_s", 640, 1267),
        ("arc_challenge", 1119, 299),
        ("arc_easy", 2251, 570),
        ("winogrande_m", 2558, 1267),
        ("openbookqa", 4957, 500),
        ("boolq", 9427, 3270),
        ("mmlu_chemistry", 0, 100),
        ("mmlu_physics", 0, 102),
    ],
)
def test_no_row_of_the_public_sets_is_dropped(name, train, evaluation):
    task = load_task(name, SHARED)
    assert (len(task.train), len(task.evaluation)) == (train, evaluation)
    assert all(row.answer is not None for row in (*task.train, *task.evaluation))


def test_unknown_task():
    with pytest.raises(
        ValueError,
        match=r"unknown task: got 'arc', expected one of \['arc_challenge', 'arc_challenge_authors'",
    ):
        load_task("arc")


def test_missing_file(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no such split: got .*ARC-Easy.train\.jsonl, expected <root>/"
    ):
        load_task("arc_easy", tmp_path)


def test_missing_column(root):
    rows = [{"question": "q", "passage": "p", "answer": True}, {"question": "q", "answer": True}]
    write_lines(root / "google/boolq/default/train.jsonl", rows)
    with pytest.raises(
        ValueError,
        match=r"row train-1: no column 'passage'; got the columns \['answer', 'question'\]",
    ):
        load_task("boolq", root)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("arc_easy", ai2("odd", "?", ["a", "b"], ["A", "B"], "C")),
        ("winogrande_s", {**WINOGRANDE[0], "answer": "3"}),
        ("mmlu_physics", mmlu("?", 4)),
    ],
)
def test_an_answer_that_is_no_option(root, name, row):
    source = TASKS[name]
    write_lines(
        root / source.hub_id / source.config / f"{source.train or source.evaluation}.jsonl", [row]
    )
    with pytest.raises(
        ValueError, match=r"row (odd|train-0|test-0): the right answer is not among its \d options"
    ):
        load_task(name, root)


def numbered(count):
    return tuple(Question(str(i), f"q{i}", ("a", "b"), i % 2) for i in range(count))


def ids(rows):
    return [row.id for row in rows]


def test_the_held_out_part_is_seeded_disjoint_and_sized():
    task = Task("t", numbered(50), numbered(20))
    part = task.subset(holdout=0.1, seed=3)
    assert (len(part.held_out), len(part.train)) == (5, 45)
    assert set(ids(part.held_out)) | set(ids(part.train)) == set(ids(task.train))
    assert part == task.subset(holdout=0.1, seed=3)
    assert set(ids(part.held_out)) != set(ids(task.subset(holdout=0.1, seed=4).held_out))
    assert part.evaluation == task.evaluation


def test_a_smaller_train_part_never_takes_held_out_rows():
    task = Task("t", numbered(50), numbered(20))
    small, large = task.subset(10, 7, 0.2, seed=1), task.subset(20, 7, 0.2, seed=1)
    assert (len(small.train), len(small.held_out), len(small.evaluation)) == (10, 10, 7)
    assert small.held_out == large.held_out
    assert small.train == large.train[:10]
    assert not set(ids(large.train)) & set(ids(large.held_out))
    assert len(set(ids(small.evaluation))) == 7
    assert small.evaluation != task.subset(10, 7, 0.2, seed=2).evaluation


def test_more_rows_than_there_are_is_all_of_them():
    task = Task("t", numbered(6), numbered(4)).subset(100, 100)
    assert (len(task.train), task.evaluation, task.held_out) == (6, numbered(4), ())


@pytest.mark.parametrize("holdout", [-0.1, 1.0, 2.0])
def test_holdout_out_of_range(holdout):
    with pytest.raises(ValueError, match=r"holdout must lie in \[0, 1\): got"):
        Task("t", numbered(6), ()).subset(holdout=holdout)


@pytest.mark.parametrize(("count", "holdout"), [(6, 0.01), (6, 0.99), (0, 0.5)])
def test_holdout_that_leaves_a_part_empty(count, holdout):
    with pytest.raises(
        ValueError, match=f"holdout={holdout} of {count} training rows leaves a part empty"
    ):
        Task("t", numbered(count), ()).subset(holdout=holdout)


@pytest.mark.parametrize("sizes", [{"train": -1}, {"evaluation": -2}])
def test_negative_sizes(sizes):
    with pytest.raises(ValueError, match="rows to keep must not be negative: got train="):
        Task("t", numbered(6), numbered(6)).subset(**sizes)


OWN = [
    {"id": 0, "question": "index", "options": ["x", "y", "z"], "answer": 2},
    {"text": "letter", "choices": ["x", "y", "z"], "answer": "B"},
    {
        "question": "text",
        "options": [10, 20],
        "answer": " 20 ",
        "context": f"two{LINE_SEPARATOR}lines",
    },
    {"question": "first", "options": ["B", "A"], "answer": "A"},
]


def test_own_rows_of_json_lines(tmp_path):
    rows = load_rows(write_lines(tmp_path / "own.jsonl", OWN))
    assert [row.options[row.answer] for row in rows] == ["z", "y", "20", "A"]
    assert [row.id for row in rows] == ["0", "own.jsonl:2", "own.jsonl:3", "own.jsonl:4"]
    assert [row.question for row in rows] == ["index", "letter", "text", "first"]
    assert [row.context for row in rows] == ["", "", f"two{LINE_SEPARATOR}lines", ""]


def test_own_rows_of_csv(tmp_path):
    path = tmp_path / "own.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "options", "answer", "context"])
        writer.writerow(["json", json.dumps(["x, y", "z"]), "z", ""])
        writer.writerow(["bars\nand a line", "x | y|z", "1", "a passage"])
        writer.writerow(["all", "", "A", ""])
    rows = load_rows(path, options=("yes", "no"))
    assert [row.options for row in rows] == [("x, y", "z"), ("x", "y", "z"), ("yes", "no")]
    assert [row.answer for row in rows] == [1, 1, 0]
    assert rows[1].question == "bars\nand a line"
    assert [row.context for row in rows] == ["", "a passage", ""]


def test_options_of_all_rows_and_rows_without_an_answer(tmp_path):
    path = write_lines(
        tmp_path / "own.jsonl",
        [{"question": "a"}, {"question": "b", "answer": "no"}, {"text": "c"}],
    )
    rows = load_rows(path, options=["yes", "no"], labelled=False)
    assert [row.answer for row in rows] == [None, 1, None]
    assert {row.options for row in rows} == {("yes", "no")}
    with pytest.raises(ValueError, match=r"row own\.jsonl:1: no column 'answer'"):
        load_rows(path, options=["yes", "no"])


@pytest.mark.parametrize("answer", [3, -1, "D", "w", "1.0", "²"])
@pytest.mark.parametrize("labelled", [True, False])
def test_own_answer_that_is_no_option(answer, labelled):
    row = {"question": "?", "options": ["x", "y", "z"], "answer": answer}
    with pytest.raises(
        ValueError, match=r"row k: the right answer .* is not among its options \['x', 'y', 'z'\]"
    ):
        own_question(row, "k", labelled=labelled)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"answer": 0, None: ["spare"]},
            r"row k: no column 'question' or 'text'; got .* \['None', 'answer'\]",
        ),
        ({"question": "?", "answer": 0}, "row k: no options; give a column 'options'"),
        (
            {"question": "?", "options": ["x"], "answer": 0},
            "row k: got 1 options, expected at least two",
        ),
        (
            {"question": "?", "options": '["x", "y', "answer": 0},
            r"row k: got options '\[\"x\", \"y', which is no JSON",
        ),
        (
            {"question": "?", "options": {"text": ["x", "y"]}, "answer": 0},
            "row k: got options .*expected a list",
        ),
    ],
)
def test_own_row_that_cannot_be_read(row, message):
    with pytest.raises(ValueError, match=message):
        own_question(row, "k")


@pytest.mark.parametrize("name", ["own.jsonl", "own.csv"])
@pytest.mark.parametrize("text", ["", "\n\n", "question,options\n"])
def test_empty_file(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text if name.endswith("csv") else text.rpartition("question")[0])
    with pytest.raises(ValueError, match=f"{name} is empty: expected at least one row"):
        load_rows(path)


def test_no_own_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*own\.csv"):
        load_rows(tmp_path / "own.csv")


@pytest.mark.parametrize(
    ("bad", "what"), [('{"question": ', "Expecting value"), ("[1, 2]", "got a list")]
)
def test_a_bad_line_is_named_by_its_number(tmp_path, bad, what):
    path = tmp_path / "own.jsonl"
    path.write_text(f'{{"question": "a{LINE_SEPARATOR}b"}}\n\n{bad}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=rf"own\.jsonl, line 3: not a JSON object \({what}"):
        load_rows(path, ("yes", "no"), labelled=False)


def test_own_task_asks_with_a_passage_where_a_row_has_one():
    plain, passage = numbered(2), (Question("p", "?", ("a", "b"), 0, "text"),)
    assert own_task("mine", plain, plain) == Task("mine", plain, plain, prompt=CHOICES)
    assert own_task("mine", plain, passage).prompt is PASSAGE_CHOICES
    assert own_task("mine", passage, ()).prompt is PASSAGE_CHOICES


def test_what_cannot_be_trained_on():
    rows = numbered(4)
    check_trainable(Task("t", rows, ()))
    with pytest.raises(ValueError, match="task t has no training rows; train on another task"):
        check_trainable(Task("t", (), rows))
    with pytest.raises(
        ValueError, match="all 2 training rows of t have the same answer, option 1: got one class"
    ):
        check_trainable(Task("t", rows[1::2], rows))


@pytest.mark.parametrize(("options", "answer"), [(("a",), 0), ((), None)])
def test_a_question_has_options(options, answer):
    with pytest.raises(
        ValueError, match=f"row 1: got {len(options)} options, expected at least two"
    ):
        Question("1", "?", options, answer)


def test_labels_stand_before_texts():
    prompt = Prompt("{choices}", "", labels=("x", "y"))
    assert (
        prompt.render(Question("1", "?", ("first", "second"), 0), "letter") == "x) first\ny) second"
    )
