"""A fit's own columns, prompt, chat and classes; a calibration's distances and classes: served."""

import copy
import csv
import shutil

import pytest
from clients import serving
from fastapi.testclient import TestClient

import bayestune
from bayestune import decisions
from bayestune.decisions import Calibration, CalibrationOptions, Promise
from bayestune.posteriors import posterior_digest
from bayestune.session import RowOptions, VariantOptions
from running import fitting, furnish, read_rows, run, write_rows
from tiny import byte_level_tokenizer, tiny_llama

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
QUEUES = ("red", "green", "blue")
TEMPLATE = "{{one}} letter\nBody: {context}\n{question}\n{choices}\nAnswer:\n"


def tickets(path, count, start=0):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Subject", "body", "queue"])
        for i in range(start, start + count):
            answer = QUEUES[(i * 7 // 5) % 3]
            writer.writerow([f"what is {i}?", "the sky " * (i % 3 + 1), answer])
    return path


def ask(client: TestClient, path="/v1/decisions", status=200, **body):
    answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders "own", a calibrated chat on own columns and prompt, and "mle", its student."""
    folder = tmp_path_factory.mktemp("as_fitted")
    tokenizer = copy.deepcopy(byte_level_tokenizer())
    tokenizer.chat_template = CHATML
    furnish(folder, tiny_llama(initializer_range=0.3), tokenizer)
    tickets(folder / "train.csv", 12)
    tickets(folder / "held_out.csv", 90, 100)
    tickets(folder / "new.csv", 9, 300)
    (folder / "prompt.txt").write_text(TEMPLATE)
    given = {"data": folder / "train.csv", "prompt": folder / "prompt.txt", "system": "sort"}
    given |= {"columns": "question=Subject,context=body,answer=queue", "learning_rate": 0.1}
    noisy = {"blob.init_root_std": 0.7, "blob.prior_std": 1.0}
    run(*fitting(folder, output="own", method="blob", **given, **noisy))
    run(*fitting(folder, output="mle", method="mle", **given))
    calibrate(folder, "--draws=[3]", "--per_class")
    return folder


def calibrate(folder, *options, name="own"):
    given = [f"--rows={folder / 'held_out.csv'}", f"--trained_on={folder / 'train.csv'}"]
    easy = ("--risk=0.9", "--confidence=0.5", "--factors=[]")
    run("calibrate", folder / name, *given, *easy, *options)


@pytest.fixture(scope="module")
def client(place):
    with serving([place / "own"]) as found:
        yield found


def in_columns(place):
    with (place / "new.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def same(line, told):
    assert line["probabilities"] == pytest.approx(told["probabilities"], abs=1e-5)
    assert line["options"] == told["options"]
    assert (line["decision"], line["set"]) == (told["decision"], told["set"])
    assert line["score"]["threshold"] == pytest.approx(told["score"]["threshold"], nan_ok=True)
    assert line["distance"] == pytest.approx(told["distance"], rel=1e-4)


def test_rows_in_the_fit_s_columns_are_answered_as_by_predict(place, client):
    told = bayestune.decide(place / "own", place / "new.csv")
    kept = Calibration.read(place / "own", posterior_digest(place / "own"))
    assert kept.settings["classes"] == sorted(QUEUES)
    assert len(kept.classes) == len(QUEUES)
    rows = in_columns(place)
    plain = [{"question": row["Subject"], "context": row["body"]} for row in rows]
    for given in (rows, plain):
        for line, expected in zip(ask(client, rows=given)["rows"], told, strict=True):
            same(line, expected)
    same(ask(client, **{" subject": rows[0]["Subject"], "BODY": rows[0]["body"]}), told[0])
    (about,) = client.get("/v1/models").json()["data"]
    assert about["columns"] == {"question": "Subject", "context": "body", "answer": "queue"}


def test_unknown_fields_and_a_field_under_two_names_are_refused(client):
    wrong = {"Subject": "what is 1?", "topic": "red"}
    for body in (wrong, {"rows": [wrong]}, {"rows": [{"Subject": "why?"}], "body": "the sky"}):
        assert "Extra inputs" in str(ask(client, status=422, **body))
    assert "got question too" in str(ask(client, status=422, Subject="why?", question="why?"))
    assert "valid string" in str(ask(client, status=422, Subject=[1]))
    assert "Extra inputs" in str(ask(client, "/v1/rank", status=422, rows=[wrong, wrong]))


def test_messages_are_the_conversation_that_a_chat_is_asked(place, client):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]
    said = [{"role": "developer", "content": "be brief"}, *turns]
    said.append({"role": "user", "content": "what is 301?"})
    asked = [{**said[0], "role": "system"}, *said[1:]]
    file = write_rows(place / "talk.jsonl", [{"messages": asked}, {"messages": asked[1:]}])
    told = bayestune.decide(place / "own", file)
    found = ask(client, rows=[{"messages": said}, {"messages": said[1:]}])["rows"]
    for line, expected in zip(found, told, strict=True):
        same(line, expected)
    assert found[0]["probabilities"] != pytest.approx(found[1]["probabilities"], abs=1e-5)
    chat = ask(client, "/v1/chat/completions", messages=said)
    assert chat["bayestune"]["probabilities"] == pytest.approx(found[0]["probabilities"], abs=1e-5)


def test_rows_are_ranked_with_their_distances_as_by_the_command(place, client, tmp_path):
    out = tmp_path / "ranked.jsonl"
    run("rank", place / "own", f"--rows={place / 'new.csv'}", f"--output={out}")
    found = ask(client, "/v1/rank", rows=in_columns(place))["rows"]
    for line, told in zip(found, read_rows(out), strict=True):
        assert (line["rank"], line["question"]) == (told["rank"], told["question"])
        assert line["prompt_length"] == told["prompt_length"]
        assert line["distance"] == pytest.approx(told["distance"], rel=1e-4)


@pytest.mark.parametrize("student", [False, True])
def test_a_cascade_has_the_distance_in_the_adapter_that_is_asked_first(
    place, tmp_path, monkeypatch, student
):
    folder = shutil.copytree(place / "own", tmp_path / "own")
    compared = VariantOptions(
        (0, 3), factors=(), student=place / "mle" if student else None, cascade=0.4
    )
    given = (
        CalibrationOptions(Promise(0.9, 0.5)),
        compared,
        RowOptions(trained_on=place / "train.csv"),
    )
    chosen = decisions.calibrate
    lines = {}
    for variant in ("cascade", "student" if student else "mean"):

        def only(variants, *more, name=variant):
            return chosen({name: variants[name]}, *more)

        monkeypatch.setattr(decisions, "calibrate", only)
        kept = bayestune.calibrate(folder, place / "held_out.csv", *given)
        assert kept.variant == variant
        lines[variant] = bayestune.decide(folder, place / "new.csv")
        with serving([folder]) as client:
            found = ask(client, rows=in_columns(place))["rows"]
        for line, told in zip(found, lines[variant], strict=True):
            same(line, told)
    first, second = ([line["distance"] for line in found] for found in lines.values())
    assert first == pytest.approx(second, rel=1e-4)
    assert any(line["mutual_information"] > 1e-6 for line in lines["cascade"])
    assert any(abs(line["mutual_information"]) < 1e-9 for line in lines["cascade"])
