"""What the user gave is what is asked: files, columns, answers, classes, contexts, rows."""

import gzip
import json
import logging
from dataclasses import replace

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from transformers import BertConfig, BertForSequenceClassification

from bayestune.cli.parser import make_parser
from bayestune.data import Question, Task, load_rows
from bayestune.data.prompts import TRUE_FALSE
from bayestune.errors import Refusal
from bayestune.evaluation import EvaluationOptions
from bayestune.forward import Draws
from bayestune.methods import MLE
from bayestune.models import LoadedModel
from bayestune.posteriors import load_posterior
from bayestune.session import Session, TaskOptions
from bayestune.training import Training

QUICK = Training(steps=2, batch_size=2, learning_rate=0.1, progress=False)
TABLE = "question,options,answer\nRight?,yes|no,no\nLeft?,yes|no,yes\n"


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def given(folder, content, name="rows.jsonl", **options):
    """The rows of a file of that content, a text, bytes or rows."""
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        text = content if isinstance(content, str) else lines(*content)
        path.write_bytes(text.encode())
    return load_rows(path, **options)


def answers(rows):
    return [row.options[row.answer] for row in rows]


# Files


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("own.csv", TABLE),
        ("OWN.CSV", TABLE),
        ("own.tsv", TABLE.replace(",", "\t")),
        ("own.csv", TABLE.replace(",", ";")),
        ("own.csv", "sep=;\r\n" + TABLE.replace(",", ";").replace("\n", "\r\n")),
        ("own.csv", TABLE.replace("\n", "\r\n")),
        ("own.csv", TABLE.replace("\n", "\r")),
        ("own.csv", TABLE.encode("utf-8-sig")),
        ("own.csv", TABLE.encode("utf-16")),
        ("own.txt", TABLE.replace(",", "\t").encode("utf-16")),
        ("own.csv", gzip.compress(TABLE.encode(), mtime=0)),
        ("own.csv.gz", gzip.compress(TABLE.encode(), mtime=0)),
        ("own.csv", TABLE.replace("\n", ",,\n") + ",,,,\n\n"),
        ("own.csv", TABLE.replace("question", " Question ").replace("answer", "ANSWER")),
        ("own.csv", TABLE.replace("yes|no", "\"['yes', 'no']\"")),
        ("own.csv", TABLE.replace("yes|no", '"[""yes"", ""no""]"')),
        ("own.csv", "question,option_a,option_b,answer\nRight?,yes,no,B\nLeft?,yes,no,A\n"),
        ("own.csv", "question,A,B,C,answer\nRight?,yes,no,,no\nLeft?,yes,no,,yes\n"),
    ],
)
def test_tables_of_the_usual_kinds(tmp_path, name, content):
    rows = given(tmp_path, content, name)
    assert [row.question for row in rows] == ["Right?", "Left?"]
    assert {row.options for row in rows} == {("yes", "no")}
    assert answers(rows) == ["no", "yes"]


ROWS = ({"question": "Right?", "options": ["yes", "no"], "answer": "no"},)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("own.jsonl", json.dumps(ROWS[0])),
        ("own.JSON", json.dumps(ROWS, indent=2)),
        ("own.jsonl", json.dumps(ROWS)),
        ("own.json", "\ufeff" + json.dumps(ROWS[0]) + "\r\n\r\n"),
        ("own.jsonl", json.dumps(ROWS[0]).encode("utf-16")),
        ("own.jsonl.gz", gzip.compress(json.dumps(ROWS[0]).encode(), mtime=0)),
        ("own", json.dumps(ROWS[0])),
    ],
)
def test_json_of_the_usual_kinds(tmp_path, name, content):
    (row,) = given(tmp_path, content, name)
    assert (row.question, row.options, row.answer) == ("Right?", ("yes", "no"), 1)


def test_parquet_with_named_classes(tmp_path):
    kinds = Features({"text": Value("string"), "label": ClassLabel(names=["ham", "spam"])})
    rows = {"text": ["a", "b", "c"], "label": [1, 0, None]}
    path = tmp_path / "own.parquet"
    Dataset.from_dict(rows, features=kinds).to_parquet(path)
    found = load_rows(path, ("spam", "ham"), labelled=False)
    assert [row.answer for row in found] == [0, 1, None]
    with pytest.raises(Refusal, match=r"own\.parquet:3: no column 'answer'"):
        load_rows(path, ("spam", "ham"))


def test_quoted_line_ends_and_thousands_of_rows(tmp_path):
    cells = "".join(f'"line {i}\nof ""two""",naïve,{i % 2}\n' for i in range(3000))
    rows = given(tmp_path, "text,id,label\n" + cells, "own.csv", options=("a|b", "ö"))
    assert rows[-1].question == 'line 2999\nof "two"'
    assert len({row.id for row in rows}) == 3000
    assert sum(row.answer for row in rows) == 1500


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("own.csv", "text,label\na,b,c\n", r"own\.csv:1 \(line 2\): got 3 cells, expected 2"),
        ("own.csv", 'text,label\n"a\nb",x\n\nc\n', r"own\.csv:2 \(line 5\): got 1 cells, expected"),
        ("own.csv", "text,text\na,b\n", r"got the columns \['text'\] more than once"),
        ("own.csv", "text,Text\na,b\n", r"got the columns \['text'\] twice, but for case"),
        ("own.csv", 'text,label\n"a,b\n', r"own\.csv: not a table of cells \(unexpected end"),
        ("own.csv", "text\nna\xefve\n".encode("latin-1"), r"own\.csv, line 2: not utf-8 text"),
        ("own.csv", TABLE.encode("utf-16-le"), r"own\.csv, line 1: got a zero byte"),
        ("own.xlsx", b"PK\x03\x04", r"own\.xlsx is of a kind that is not read: got \.xlsx"),
        ("own.csv", b"PK\x03\x04", r"own\.csv is of a kind that is not read: .* save a spreadsh"),
        ("own.pkl", b"x", r"got \.pkl, expected one of \.jsonl"),
        ("own.json", '[{"text": 1}, 2]', r"row own\.json:2: got a int, expected an object"),
        ("own.json", '[{"text": 1}', r"own\.json, line 1: not a JSON array"),
        ("own.jsonl", "\n{}\n{", r"own\.jsonl, line 3: not a JSON object"),
        ("own.jsonl", '{"text": "a", "text": "b"}', r"line 1: got \['text'\] more than once"),
        ("own.json", '{"text": {"0": "a"}}', r"got the question .*'0': 'a'.*orient=.records."),
        (
            "own.jsonl",
            '{"text": "a \\ud800"}',
            "jsonl:1: got the question .* half a character",
        ),
        ("own.csv", "a ticket,billing\n", r"is empty: expected at least one row"),
    ],
)
def test_what_is_no_table_is_refused_with_file_and_line(tmp_path, name, content, message):
    with pytest.raises(Refusal, match=message):
        given(tmp_path, content, name, options=("x", "y"))


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(Refusal, match="is a folder: got no file"):
        load_rows(tmp_path)


# Columns

YES_NO = {"options": ["yes", "no"], "answer": "yes"}


def test_text_beside_question_is_its_context(tmp_path):
    rows = [{"text": f"ticket {i}", "question": "Which?", **YES_NO} for i in range(2)]
    found = given(tmp_path, rows)
    assert [(row.context, row.question) for row in found] == [
        ("ticket 0", "Which?"),
        ("ticket 1", "Which?"),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "?", "text": "t", "context": "c"}, "got the columns 'text' and 'context', e"),
        ({"question": "?", "answer": "yes", "label": "no"}, "columns 'answer' and 'label', expec"),
        ({"qestion": "?"}, r"no column 'question' or 'text'; .*did you mean 'question' by 'qest"),
        ({"text": "?", "anwser": "yes"}, "no column 'answer' or 'label'; .*did you mean 'answer'"),
        ({"text": "?", "contxt": "c"}, "no column 'context' or 'passage'; .*did you mean 'context"),
        ({"text": "?", "options": ["yes", "no"], "answers": "yes"}, "did you mean 'answer' by"),
    ],
)
def test_columns_that_are_in_doubt_are_refused(tmp_path, row, message):
    with pytest.raises(Refusal, match=message):
        given(tmp_path, [{**row}], options=("yes", "no"))


def test_columns_that_are_not_used_are_named(tmp_path, caplog):
    table = ",question,options,answer,customer,Sent at\n0,?,a|b,a,7,May\n1,!,a|b,b,8,June\n"
    with caplog.at_level(logging.WARNING, "bayestune"):
        given(tmp_path, table, "own.csv")
    assert [record.getMessage() for record in caplog.records] == [
        "own.csv: columns not used: customer, sent_at"
    ]


@pytest.mark.parametrize(
    ("row", "options", "right"),
    [
        ({"sentence": "s", "label": 1, "idx": 4}, ("bad", "good"), "good"),
        ({"text": "s", "label": "good"}, ("bad", "good"), "good"),
        (
            {
                "question": "q",
                "choices": {"text": ["x", "y"], "label": ["1", "2"]},
                "answerKey": "2",
            },
            (),
            "y",
        ),
        (
            {
                "question_stem": "q",
                "choices": [{"text": "x", "label": "A"}, {"text": "y", "label": "B"}],
                "answerKey": "A",
            },
            (),
            "x",
        ),
        ({"question": "q", "options": {"A": "x", "B": "y"}, "answer": "y"}, (), "y"),
        ({"question": "q", "options": {"A": "x", "B": "y"}, "answer": "B"}, (), "y"),
        ({"question": "q", "article": "p", "options": ["x", "y"], "answer": "B"}, (), "y"),
        ({"premise": "p", "hypothesis": "q", "label": 2}, ("e", "n", "c"), "c"),
        ({"question": "q", "passage": "p", "answer": True}, ("no", "yes"), "yes"),
        ({"question": "q", "subject": "s", "choices": ["x", "y"], "answer": 1}, (), "y"),
        ({"sentence": "_", "option1": "x", "option2": "y", "answer": "y"}, (), "y"),
    ],
)
def test_rows_of_public_sets(tmp_path, row, options, right):
    assert answers(given(tmp_path, [row], options=options)) == [right]


# Values that are missing


@pytest.mark.parametrize("nothing", [None, float("nan"), "", "  ", "nan", "NaN", "null", "None"])
def test_nothing_is_no_word(tmp_path, nothing):
    row = {"question": "Right?", "context": nothing, "id": nothing, **YES_NO}
    (found,) = given(tmp_path, [row])
    assert (found.context, found.id) == ("", "rows.jsonl:1")
    with pytest.raises(Refusal, match=r"row rows\.jsonl:1: (no column|got the) .?question"):
        given(tmp_path, [{**row, "question": nothing}])


@pytest.mark.parametrize("nothing", [None, float("nan"), "", " "])
def test_nothing_is_no_option_and_no_answer(tmp_path, nothing):
    row = {"question": "?", **YES_NO}
    with pytest.raises(Refusal, match="got the option .* expected a text; fill it or drop it"):
        given(tmp_path, [{**row, "options": ["yes", nothing]}])
    with pytest.raises(Refusal, match="no column 'answer'"):
        given(tmp_path, [{**row, "answer": nothing}])
    (found,) = given(tmp_path, [{**row, "answer": nothing}], labelled=False)
    assert found.answer is None


def test_an_option_between_others_is_not_left_out(tmp_path):
    with pytest.raises(Refusal, match=r"options in the columns .*, expected no empty one between"):
        given(tmp_path, "question,A,B,C,answer\n?,x,,z,C\n", "own.csv")


def test_options_are_words_that_differ(tmp_path):
    row = {"question": "?", "answer": 0}
    with pytest.raises(Refusal, match=r"got the options \['x'\] more than once"):
        given(tmp_path, [{**row, "options": ["x", "y", "x "]}])
    with pytest.raises(Refusal, match="options=.*: got the options .*'a'.* more than once"):
        given(tmp_path, [row], options=("a", "a"))
    with pytest.raises(Refusal, match=r"give .* such as \[\"billing\", \"shipping\"\]"):
        given(tmp_path, [{"text": "?", "label": name} for name in ("shipping", "billing")])


# Answers: one reading for a file


def numbered(options, *answers):
    rows = []
    for i, answer in enumerate(answers):
        rows.append({"question": f"{i}?", "options": list(options), "answer": answer})
    return rows


@pytest.mark.parametrize(
    ("options", "given_answers", "right"),
    [
        ("4218", [1], [1]),
        ("12345", [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
        ("xyz", [0.0, 2.0], [0, 2]),
        ("xyz", ["1.0", "2"], [1, 2]),
        ("xyz", ["(B)", "B.", "b", "C)"], [1, 1, 1, 2]),
        ("xyz", ["Y", "x "], [1, 0]),
        (("yes", "no"), ["Yes", "NO"], [0, 1]),
        (("yes", "no"), [True, False], [0, 1]),
        (("True", "False"), ["true", "FALSE"], [0, 1]),
        (("Café", "thé"), ["cafe\u0301", "thé"], [0, 1]),
        ("01", ["1", "0"], [1, 0]),
        ("ABCD", ["B", "D"], [1, 3]),
    ],
)
def test_answers_in_the_usual_spellings(tmp_path, options, given_answers, right):
    rows = given(tmp_path, numbered(options, *given_answers))
    assert [row.answer for row in rows] == right


@pytest.mark.parametrize(
    ("options", "given_answers", "message"),
    [
        ("1234", ["1", "2"], r"'1' can be read in two ways: got '1' as its text, '2' as its index"),
        ("BA", ["A"], "can be read in two ways: .* as its text, 'B' as its letter"),
        ("xyz", [1, "B"], r"'B' is not among .* expected one kind of answer in the whole file"),
        ("xyz", ["x", "2"], "'2' is not among .* and would be one as the index"),
        ("xyz", [3], "3 is not among .* an index from 0 to 2"),
        (("10", "20"), [20], "20 is not among .* if it is the text, give answer_is='text'"),
        (("left", "right"), ["rihgt"], "'rihgt' is not among .* did you mean 'right'"),
        ("xyz", [["x", "y"]], "expected one answer, not several"),
        ("xyz", [-1], "leave the answer empty where it is not known"),
        ("xyz", [True], "True is not among"),
        (("US", "us"), ["Us"], "'Us' is not among"),
    ],
)
def test_answers_in_doubt_are_refused(tmp_path, options, given_answers, message):
    with pytest.raises(Refusal, match=rf"row rows\.jsonl:\d: .*{message}"):
        given(tmp_path, numbered(options, *given_answers))


@pytest.mark.parametrize(("answer_is", "right"), [("index", 1), ("text", 0)])
def test_the_reading_can_be_said(tmp_path, answer_is, right):
    (row,) = given(tmp_path, numbered("123", "1"), answer_is=answer_is)
    assert row.answer == right
    with pytest.raises(Refusal, match="unknown answer_is: got 'word', expected one of"):
        given(tmp_path, numbered("123", "1"), answer_is="word")


def test_numbered_columns_and_numbers_from_1(tmp_path):
    rows = "question,option1,option2,option3,answer\n?,x,y,z,1\n!,x,y,z,2\n"
    with pytest.raises(Refusal, match="option columns that count from 1 and no answer 0"):
        given(tmp_path, rows, "own.csv")
    found = given(tmp_path, rows, "own.csv", answer_is="index")
    assert answers(found) == ["y", "z"]


def test_indices_that_may_count_from_1_are_told(tmp_path, caplog):
    given(tmp_path, numbered("xyzw", *[1, 2, 3] * 4))
    assert "no row's answer is 0: indices count from 0" in caplog.text


# Ids


def test_rows_that_share_an_id_are_told_apart(tmp_path, caplog):
    ids = ["c", "c", "c#2", "c", 7, 7.0]
    rows = [{"id": key, "question": "?", **YES_NO} for key in ids]
    found = given(tmp_path, rows)
    assert [row.id for row in found] == ["c", "c#3", "c#2", "c#4", "7", "7#2"]
    assert "5 rows share their ids, such as 'c'" in caplog.text


def test_a_task_refuses_rows_that_share_an_id():
    row = Question("c", "?", ("yes", "no"), 0)
    with pytest.raises(Refusal, match="rows to evaluate on share an id: got 'c' 2 times"):
        Task("t", (), (row, replace(row, question="!")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": None}, "got the question None, expected a text"),
        ({"question": " "}, "got the question ' ', expected a text"),
        ({"context": float("nan")}, "got the context nan, expected a text"),
        ({"options": "yes"}, "got the options 'yes', expected texts"),
        ({"options": ("yes", "")}, "got the options .* none of them empty"),
        ({"options": ("yes", 2)}, "got the options .* expected texts"),
        ({"answer": True}, "got the answer True, expected an index"),
        ({"answer": "0"}, "got the answer '0', expected an index"),
        ({"options": ("yes", "yes")}, "got the right answer twice"),
    ],
)
def test_a_question_is_checked(change, message):
    with pytest.raises(Refusal, match=f"row q: {message}"):
        replace(Question("q", "?", ("yes", "no"), 0), **change)


# Options on the command line and in YAML


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("[yes, no]", ("yes", "no")),
        ("[on,off]", ("on", "off")),
        ("[1, 0]", ("1", "0")),
        ("[1.0, 2.50]", ("1.0", "2.50")),
        ("[null, true]", ("null", "true")),
        ('["yes", "no, not"]', ("yes", "no, not")),
        ("yes,no", ("yes", "no")),
        ("very good|not good", ("very good", "not good")),
    ],
)
def test_options_are_words(tmp_path, argument, words):
    parser = make_parser()
    fit = ["fit", "--output", "out"]
    assert parser.parse_args([*fit, "--options", argument]).fit.options == words
    assert parser.parse_args([*fit, f"--options={argument}"]).fit.options == words
    if argument.startswith("["):
        (tmp_path / "c.yaml").write_text(f"options: {argument}\nsteps: 3\nbf16: yes\n")
        parsed = parser.parse_args([*fit, "--config", str(tmp_path / "c.yaml")]).fit
        assert (parsed.options, parsed.steps, parsed.bf16) == (words, 3, True)


# Rows under a fit


def test_rows_are_named_once(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(lines({"question": "?", **YES_NO}))
    with pytest.raises(Refusal, match="the rows are named twice: got the task 'rte' and the file"):
        TaskOptions(task="rte", evaluation_data=path).load()
    with pytest.raises(Refusal, match="options are for rows of your own: got"):
        TaskOptions(task="everyday", options=("yes", "no")).load()


@pytest.fixture
def opened(llama, byte_level, tmp_path):
    """A function that opens a session on rows, their model in a folder."""
    llama().save_pretrained(tmp_path / "model")
    byte_level.save_pretrained(tmp_path / "model")
    loaded = LoadedModel(llama().eval(), byte_level, str(tmp_path / "model"))

    def opened(task, **options):
        return Session.of(loaded, task, TaskOptions(**options), progress=False)

    return opened


def coloured(count, options=("red", "green", "blue"), start=0, **more):
    rows = []
    for i in range(start, start + count):
        rows.append(Question(f"{i}", f"what is {i}?", options, i % len(options), **more))
    return tuple(rows)


def asked(folder, rows, **more):
    content = [{"id": r.id, "question": r.question, "context": r.context, **more} for r in rows]
    (folder / "ask.jsonl").write_text(lines(*content))
    return TaskOptions(evaluation_data=folder / "ask.jsonl")


def test_evaluate_needs_rows(opened, tmp_path):
    opened(Task("t", coloured(6), ())).fit(MLE(), QUICK, tmp_path / "out")
    with pytest.raises(Refusal, match="no rows to evaluate on: got neither a task nor a file"):
        Session.of_posterior(tmp_path / "out", TaskOptions())


def test_a_context_that_the_fit_did_not_have_is_refused(opened, tmp_path):
    opened(Task("t", coloured(6), ())).fit(MLE(), QUICK, tmp_path / "out")
    rows = asked(tmp_path, coloured(2, context="the sky"), options=["a", "b"])
    with pytest.raises(Refusal, match="2 rows of ask have a context: got a fit whose rows had no"):
        Session.of_posterior(tmp_path / "out", rows, labelled=False)


def test_labels_that_the_prompt_does_not_explain_keep_their_meaning(opened, tmp_path):
    rows = coloured(6, ("True", "False"), context="the sky")
    opened(Task("t", rows, (), prompt=TRUE_FALSE)).fit(MLE(), QUICK, tmp_path / "out")
    swapped = asked(tmp_path, rows[:2], options=["False", "True"])
    session = Session.of_posterior(tmp_path / "out", swapped, labelled=False)
    assert {row.options for row in session.rows()} == {("True", "False")}
    other = asked(tmp_path, rows[:2], options=["no", "yes"])
    with pytest.raises(Refusal, match=r"got the options \['no', 'yes'\], expected the classes"):
        Session.of_posterior(tmp_path / "out", other, labelled=False)


def test_rows_that_stand_in_training_are_told(opened, tmp_path, caplog):
    session = opened(Task("t", coloured(6), coloured(4, start=4)))
    fit = session.fit(MLE(), QUICK, tmp_path / "out")
    options = EvaluationOptions(draws=(0,), resamples=5)
    (result,) = session.evaluate(fit, options)
    assert result.record["seen_rows"] == 2
    rows = asked(tmp_path, coloured(4, start=4), options=["green", "red", "blue"], answer="red")
    again = Session.of_posterior(tmp_path / "out", rows)
    assert "2 of the 4 evaluation rows of ask stand in the training rows too" in caplog.text
    (result,) = again.evaluate(again.load(tmp_path / "out"), options)
    assert result.record["seen_rows"] == 2


# Class names of a head


@pytest.fixture
def head(byte_level, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=400, intermediate_size=32, num_labels=3, **sizes)
    model = BertForSequenceClassification(config)
    model.save_pretrained(tmp_path / "model")
    byte_level.save_pretrained(tmp_path / "model")
    return LoadedModel(model.eval(), byte_level, str(tmp_path / "model"))


def by_name(session, folder):
    found = session.predict(session.load(folder), Draws(0)).probabilities
    return [
        dict(zip(row.options, p.tolist(), strict=True))
        for row, p in zip(session.rows(), found, strict=True)
    ]


def test_a_head_keeps_its_class_names(head, tmp_path):
    out = tmp_path / "out"
    names = ["green", "blue", "red"]
    mixed = (*coloured(3, tuple(names)), *coloured(3, ("red", "green", "blue"), start=3))
    options = TaskOptions(scoring="head")
    Session.of(head, Task("t", mixed, ()), options, progress=False).fit(MLE(), QUICK, out)
    assert json.loads((out / "posterior.json").read_text())["class_names"] == names
    found = []
    for order in (names, names[::-1]):
        rows = asked(tmp_path, coloured(2), options=order)
        session = Session.of_posterior(out, rows, labelled=False)
        found.append(by_name(replace(session, progress=False), out))
    assert found[0] == found[1]
    other = asked(tmp_path, coloured(2), options=["red", "green", "pink"])
    with pytest.raises(Refusal, match=r"got the options .*'pink'\], expected the classes \['green"):
        Session.of_posterior(out, other, labelled=False)
    reversed_rows = Task("t", coloured(3, tuple(names[::-1])), ())
    scorer = Session.of(head, reversed_rows, options).scorer
    with pytest.raises(Refusal, match="is of a head with other classes: got"):
        load_posterior(head.model, out, scorer)


def test_a_model_that_names_its_classes_has_them_in_its_order(head):
    head.model.config.id2label = {0: "blue", 1: "red", 2: "green"}
    session = Session.of(head, Task("t", coloured(3), ()), TaskOptions(scoring="head"))
    assert session.task.class_names == ("blue", "red", "green")
    assert [row.options[row.answer] for row in session.task.train] == ["red", "green", "blue"]
