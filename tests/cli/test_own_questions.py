"""One's own columns, prompt, chat and classes: given to a fit once, and used from then on."""

import copy
import csv
import json
import shutil

import pytest
import yaml

import bayestune
from bayestune.evaluation import read_records
from running import failed, fitting, furnish, probabilities, read_rows, run, write_rows

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
QUEUES = ("red", "green", "blue")
COLUMNS = "question=Subject,context=body,answer=queue"
TEMPLATE = "{{one}} letter\nBody: {context}\n{question}\n{choices}\nAnswer:\n"


def tickets(path, count, start=0, *, labelled=True):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["subject", "body", *["queue"] * labelled])
        for i in range(start, start + count):
            answer = QUEUES[(i * 7 // 5) % 3]
            writer.writerow([f"what is {i}?", "the sky " * (i % 3 + 1), *[answer] * labelled])
    return path


@pytest.fixture
def place(tmp_path, llama, byte_level):
    """A model with a chat template, tickets as a spreadsheet has them, and a template."""
    tokenizer = copy.deepcopy(byte_level)
    tokenizer.chat_template = CHATML
    folder = furnish(tmp_path, llama(initializer_range=0.3), tokenizer)
    tickets(folder / "train.csv", 12)
    tickets(folder / "test.csv", 9, 50)
    tickets(folder / "held_out.csv", 60, 100)
    tickets(folder / "new.csv", 7, 300, labelled=False)
    (folder / "prompt.txt").write_text(TEMPLATE)
    return folder


def own(place, command="fit", output="out", **more):
    given = {"data": place / "train.csv", "columns": COLUMNS, "prompt": place / "prompt.txt"}
    given |= {"method": "mle"} if command == "fit" else {}
    return fitting(place, command, output, **given, system="sort", learning_rate=0.1, **more)


def predicting(place, *options, rows="new.csv", folder="out"):
    out = place / "said.jsonl"
    given = [f"--posterior={place / folder}", f"--input={place / rows}", f"--output={out}"]
    run("predict", *given, "--overwrite", *options)
    return read_rows(out)


def as_questions(place, rows="new.csv", **more):
    """The same rows under known names, with their options."""
    with (place / rows).open(newline="") as file:
        read = list(csv.DictReader(file))
    found = []
    for row in read:
        named = {"question": row["subject"], "context": row["body"], "options": QUEUES[::-1]}
        found.append(named | {"answer": row.get("queue")} | more)
    return write_rows(place / "known.jsonl", found)


def test_what_a_fit_was_told_is_used_from_then_on(place):
    run(*own(place))
    (place / "prompt.txt").unlink()  # the text is kept, not the path
    details = json.loads((place / "out" / "posterior.json").read_text())
    told = details["task"]["prompt"]
    assert (told["letter"], told["chat"], told["system"]) == (TEMPLATE.rstrip(), True, "sort")
    assert details["questions"]["options"] == sorted(QUEUES)
    assert details["questions"]["columns"]["answer"] == "queue"
    assert details["questions"]["prompt"] == "prompt.txt"

    lines = predicting(place)
    assert [line["options"] for line in lines] == [sorted(QUEUES)] * 7
    assert lines[0]["question"] == "what is 300?"
    in_python = bayestune.decide(place / "out", place / "new.csv")
    assert probabilities(in_python) == pytest.approx(probabilities(lines), abs=1e-6)
    as_questions(place)
    known = predicting(place, rows="known.jsonl", folder="out")
    assert {tuple(line["options"]) for line in known} == {QUEUES[::-1]}
    renamed = tickets(place / "renamed.csv", 7, 300, labelled=False)
    renamed.write_text(renamed.read_text().replace("subject,body", "body,title"))
    swapped = predicting(place, "--columns=question=body,context=title", rows="renamed.csv")
    assert [line["probabilities"] for line in swapped] == [line["probabilities"] for line in lines]

    test = f"--evaluation_data={place / 'test.csv'}"
    run("evaluate", f"--posterior={place / 'out'}", test, "--resamples=20")
    (record,) = read_records(place / "out")
    assert record["config"]["questions"]["prompt"] == "prompt.txt"
    found = record["by_class"]
    assert [one["name"] for one in found["classes"]] == sorted(QUEUES)
    rows = read_rows(place / "out" / record["predictions"])
    for right in range(3):
        for chosen in range(3):
            count = sum((row["answer"], row["choice"]) == (right, chosen) for row in rows)
            assert found["confusion"][right][chosen] == count


def test_calibrate_rank_and_drift_read_the_same_columns(place, capsys):
    run(*own(place))
    easy = ("--risk=0.9", "--confidence=0.6", "--draws=[0]")
    run("calibrate", place / "out", f"--rows={place / 'held_out.csv'}", *easy, "--risk=0.9")
    assert all(line["calibration"] != "none" for line in predicting(place))
    capsys.readouterr()
    run("rank", place / "out", f"--rows={place / 'new.csv'}", "--number=2")
    ranked = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["options"] for line in ranked] == [sorted(QUEUES)] * 2
    assert ranked[0]["question"].startswith("what is 30")
    drifting = ["drift", place / "out", f"--rows={place / 'new.csv'}", "--level=0.0001"]
    run(*drifting)
    wrong = [*drifting, "--columns=question=title"]
    assert "expected 'title' for the question" in failed(wrong, capsys)


def test_a_plain_adapter_is_told_what_a_fit_would_be(place, capsys):
    run(*own(place))
    plain = place / "plain"
    plain.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(place / "out" / name, plain)
    asked = ["--risk=0.9", "--confidence=0.6", f"--rows={place / 'held_out.csv'}"]
    own_words = [f"--columns={COLUMNS}", f"--prompt={place / 'prompt.txt'}", "--system=sort"]
    said = failed(["calibrate", place / "out", *asked, own_words[1]], capsys)
    assert "got --prompt for a posterior" in said
    options = "--options=[blue,green,red]"
    run("calibrate", plain, *asked, *own_words, options, f"--model={place / 'model'}")
    (place / "prompt.txt").unlink()
    found = probabilities(predicting(place, "--uncalibrated", folder="plain"))
    assert found == pytest.approx(probabilities(predicting(place)), abs=1e-5)


def test_compare_and_bench_take_one_s_own_rows(place):
    test = {"evaluation_data": place / "test.csv"}
    more = {"methods": "[mle]", "resamples": 20, **test}
    run(*own(place, "compare", "compared", **more))
    questions = {
        "data": str(place / "train.csv"),
        "evaluation_data": str(place / "test.csv"),
        "columns": {"question": "Subject", "context": "body", "answer": "queue"},
        "prompt": str(place / "prompt.txt"),
        "system": "sort",
    }
    training = {"steps": 3, "batch_size": 2, "lora": {"rank": 2}, "learning_rate": 0.1}
    grid = {
        "models": [str(place / "model")],
        "tasks": {"train": {"questions": questions}},
        "methods": {"mle": None},
        "seeds": [1],
        "training": training,
        "predicting": {"resamples": 20},
    }
    (place / "grid.yaml").write_text(yaml.safe_dump(grid))
    run("bench", place / "grid.yaml", f"--output={place / 'grid'}")
    (compared,) = read_records(place / "compared")
    (computed,) = read_records(place / "grid")
    assert compared["metrics"]["nll"] == computed["metrics"]["nll"]
    assert compared["by_class"] == computed["by_class"]
    assert "macro F1" in (place / "compared" / "table.md").read_text()
    assert "what was chosen" in (place / "compared" / "report.html").read_text()


def test_rows_of_messages_are_a_chat_by_themselves(place, capsys):
    rows = []
    for i in range(8):
        talk = [{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": "hello"}]
        talk.append({"role": "user", "content": f"what is {i}?"})
        rows.append({"messages": [*talk, {"role": "assistant", "content": QUEUES[i % 2]}]})
    write_rows(place / "talks.jsonl", rows)
    given = {"data": place / "talks.jsonl", "method": "mle", "learning_rate": 0.1}
    run(*fitting(place, **given))
    lines = predicting(place, rows="talks.jsonl")
    assert [line["answer"] for line in lines] == [1, 0] * 4
    others = [{"messages": [{**turn, "content": "other"} for turn in rows[0]["messages"][:2]]}]
    others[0]["messages"].append(rows[0]["messages"][2])
    write_rows(place / "others.jsonl", others)
    (other,) = predicting(place, rows="others.jsonl")
    assert other["question"] == lines[0]["question"]
    assert other["probabilities"] != lines[0]["probabilities"]  # earlier turns are read
    run(*fitting(place, **{**given, "data": place / "train.jsonl"}, output="plain"))
    asked = ["predict", f"--posterior={place / 'plain'}", f"--input={place / 'others.jsonl'}"]
    assert "bring earlier messages" in failed([*asked, "--options=[red,green]"], capsys)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"columns": "question=title,answer=queue"}, "expected 'title' for the question"),
        ({"columns": "qestion=subject"}, "did you mean 'question'"),
        ({"prompt": "train.csv"}, "train.csv: got no {question}"),
        ({"prompt": "gone.txt"}, "no such file"),
        ({"chat": "false"}, "got the system message 'sort' and chat=False"),
        ({"scoring": "head"}, "a classification head reads question and context"),
        ({"answer_is": "letter"}, "answers that are the letter of an option each"),
    ],
)
def test_what_does_not_go_together_is_refused_before_a_model_is_loaded(
    place, capsys, options, said
):
    shutil.rmtree(place / "model")
    options = {k: place / v if k == "prompt" else v for k, v in options.items()}
    command = own(place)
    for name, value in options.items():
        command = [part for part in command if not part.startswith(f"--{name}=")]
        command.append(f"--{name}={value}")
    assert said in failed(command, capsys)
    assert not (place / "out").exists()


def test_a_model_without_a_chat_template_and_too_many_classes_are_refused(
    place, capsys, byte_level
):
    byte_level.save_pretrained(place / "model")
    (place / "model" / "chat_template.jinja").unlink(missing_ok=True)
    assert "without a chat template" in failed(own(place), capsys)
    with (place / "many.csv").open("w", newline="") as file:
        rows = [(f"what is {i}?", f"class {i % 30}") for i in range(90)]
        csv.writer(file).writerows([("text", "label"), *rows])
    many = fitting(place, data=place / "many.csv", method="mle")
    assert 'got 30 options, expected at most 26 under letter scoring; use scoring="text"' in failed(
        many, capsys
    )
    run(*many, "--scoring=text")


def test_a_run_is_resumed_with_its_own_prompt_only(place, capsys):
    run(*own(place))
    (place / "prompt.txt").write_text("{question} {context} {choices}\nLetter:")
    said = failed([*own(place), "--resume"], capsys)
    assert "started with other settings; the text of --prompt" in said
