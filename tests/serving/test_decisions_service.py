"""What the service answers: that of the commands, whatever rows came together."""

import json
import logging
import math
import re
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from clients import held, serving, wait_for

import bayestune
from bayestune.decisions import FILE_NAME
from bayestune.errors import Refusal
from bayestune.forward import Draws
from bayestune.scoring import NextToken
from bayestune.serving import ArtefactStore, Limits, ServiceOptions, serve
from bayestune.serving.request_handler import service_line
from bayestune.serving.waiting import Answer
from running import fitting, furnish, read_rows, run, write_rows

PARTS = ("total_entropy", "expected_entropy", "mutual_information", "confidence")
ABC = ["red", "green", "blue"]
SAME = ("choice", "choice_text", "decision", "set", "calibration")


def same(line, expected):
    """Whether a line of the service says what one of `predict` does."""
    assert line["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-5)
    for name in PARTS:
        if name in expected:
            assert line[name] == pytest.approx(expected[name], abs=1e-5)
    for name in SAME:
        assert line[name] == expected.get(name)
    assert line["calibration_applied"] == (expected["calibration"] != "none")
    if line["score"]:
        assert line["score"]["value"] == pytest.approx(expected["score"]["value"], abs=1e-5)


def ask(client, path="/v1/decisions", status=200, **body):
    reply = client.post(path, json=body)
    assert reply.status_code == status, reply.text
    return reply.json() if status == 200 else reply.json()["error"]["message"]


def passes(client):
    lines = client.get("/metrics").text.splitlines()
    (line,) = [line for line in lines if line.startswith("bayestune_pass_rows_count")]
    return float(line.split()[1])


def test_answers_are_those_of_predict_whatever_came_together(client, place, new):
    expected = bayestune.decide(place / "blob", place / "new.jsonl")
    assert {line["decision"] for line in expected} == {"act", "abstain"}
    for line, told in zip(ask(client, rows=new)["rows"], expected, strict=True):
        same(line, told)
    before = passes(client)
    with ThreadPoolExecutor(16) as pool:
        lines = list(pool.map(lambda row: ask(client, **row), new))
    assert passes(client) - before < len(new)  # some shared a pass
    for line, told in zip(lines, expected, strict=True):
        same(line, told)
        assert line["model"] == "blob"


def test_other_draws_are_those_of_predict_and_decide_nothing(client, place, new, tmp_path):
    out = tmp_path / "said.jsonl"
    given = [f"--posterior={place / 'blob'}", f"--input={place / 'new.jsonl'}", f"--output={out}"]
    run("predict", *given, "--draws=2", "--draw_seed=5", "--uncalibrated")
    found = ask(client, rows=new, draws=2, seed=5, include_draws=True)["rows"]
    for line, told in zip(found, read_rows(out), strict=True):
        same(line, told)
        mean = torch.tensor(line["draws"], dtype=torch.float64).mean(0).tolist()
        assert mean == pytest.approx(line["probabilities"], abs=1e-9)
        assert len(line["draws"]) == 2
    assert ask(client, **new[0], draws=3)["calibration_applied"]  # as calibrated


def test_messages_are_a_question_and_what_stands_before_it(client, new):
    row = new[0]
    said = [{"role": "user", "content": [{"type": "text", "text": row["question"]}]}]
    plain = ask(client, **row)
    found = ask(client, messages=said, options=row["options"])
    assert found["probabilities"] == pytest.approx(plain["probabilities"], abs=1e-6)
    more = [{"role": "system", "content": "Be brief."}, *said]
    message = ask(client, messages=more, options=row["options"], status=422)
    assert "got a fit whose rows had none" in message


@pytest.mark.parametrize(
    ("decision", "bands", "band"),
    [
        ("act", {"act": 0.05, "flag": 0.2}, "act"),
        ("flag", {"act": 0.05, "flag": 0.2}, "flag"),
        ("ask", {"act": 0.05, "flag": 0.2}, None),
        ("act", None, None),
        ("abstain", None, None),
    ],
)
def test_a_line_names_its_band(decision, bands, band):
    calibration = {"risk": 0.05, **({"bands": bands} if bands else {})}
    line = {"decision": decision, "calibration": calibration, "answer": None}
    told = service_line(Answer(line, torch.zeros(1, 2), {}))
    assert (told["band"], told["decision"], told["calibration_applied"]) == (band, decision, True)
    unapplied = service_line(Answer({"calibration": "none"}, torch.zeros(1, 2), {}))
    assert (unapplied["band"], unapplied["calibration_applied"]) == (None, False)


def test_rows_are_ranked_as_by_the_command(client, place, new, tmp_path):
    out = tmp_path / "ranked.jsonl"
    run("rank", place / "blob", f"--rows={place / 'new.jsonl'}", "--number=7", f"--output={out}")
    found = ask(client, "/v1/rank", rows=new, number=7)["rows"]
    for line, told in zip(found, read_rows(out), strict=True):
        assert (line["rank"], line["question"]) == (told["rank"], told["question"])
        assert line["total_entropy"] == pytest.approx(told["total_entropy"], abs=1e-5)
    assert "expected 1 to 2" in ask(client, "/v1/rank", rows=new[:2], number=3, status=422)


def test_rows_are_ranked_by_the_posterior_itself(place, new, tmp_path):
    """A calibration of as many draws with a factor on Ω says how to decide, not how to rank."""
    folder = Path(shutil.copytree(place / "blob", tmp_path / "wide"))
    calibration = folder / FILE_NAME
    facts = json.loads(calibration.read_text())
    facts["settings"] |= {"draws": 10, "factor": 3.0}
    calibration.write_text(json.dumps(facts))
    out = tmp_path / "ranked.jsonl"
    run("rank", folder, f"--rows={place / 'new.jsonl'}", "--number=7", f"--output={out}")
    with serving([folder]) as client:
        found = ask(client, "/v1/rank", rows=new, number=7)["rows"]
        most = ask(client, "/v1/rank", rows=new, draws=10**6, status=413)
    assert "got draws=1000000; expected" in most
    for line, told in zip(found, read_rows(out), strict=True):
        assert (line["rank"], line["question"]) == (told["rank"], told["question"])
        assert line["total_entropy"] == pytest.approx(told["total_entropy"], abs=1e-5)


def test_a_chat_has_one_of_its_options_for_an_answer(client, new):
    row = new[1]
    messages = [{"role": "user", "content": row["question"]}]
    for name in ("options", "guided_choice"):
        body = {"messages": messages, name: row["options"], "logprobs": True, "top_logprobs": 2}
        found = ask(client, "/v1/chat/completions", **body)
        (choice,) = found["choices"]
        line = ask(client, **row)
        assert found["object"] == "chat.completion"
        assert choice["message"] == {"role": "assistant", "content": line["choice_text"]}
        assert found["bayestune"]["decision"] == line["decision"]
        (content,) = choice["logprobs"]["content"]
        assert math.exp(content["logprob"]) == pytest.approx(line["confidence"], abs=1e-5)
        assert len(content["top_logprobs"]) == 2
        assert found["usage"]["completion_tokens"] == 1


def test_a_written_answer_has_the_probability_that_the_draws_give_it_on_average(client, place):
    body = {"messages": [{"role": "user", "content": "what is red?"}], "options": [], "draws": 4}
    found = ask(client, "/v1/chat/completions", **body, max_tokens=3, logprobs=True)
    tokens = found["choices"][0]["logprobs"]["content"]
    total = sum(token["logprob"] for token in tokens)
    assert found["bayestune"]["log_probability"] == pytest.approx(total, abs=1e-9)

    handler = client.app.state.handler
    served = handler.served("blob")
    tokenizer = served.session.loaded.tokenizer
    prompt = tokenizer("what is red?")["input_ids"]
    posterior = served.posterior.on(NextToken())
    ids = list(prompt)
    by_draw = torch.zeros(4, dtype=torch.float64)
    for _ in tokens:
        batch = {
            "input_ids": torch.tensor([ids]),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
            "position_ids": torch.arange(len(ids))[None],
        }
        logs = posterior.logits(batch, Draws(4))[:, 0].double().log_softmax(-1)
        mean = (by_draw[:, None] + logs).logsumexp(0)
        token = int(mean.argmax())
        ids.append(token)
        by_draw += logs[:, token]
    text = tokenizer.decode(ids[len(prompt) :])
    assert found["choices"][0]["message"]["content"] == text
    assert total == pytest.approx((by_draw.logsumexp(0) - math.log(4)).item(), abs=1e-4)
    message = ask(client, "/v1/chat/completions", **body, max_tokens=17, status=413)
    assert "expected 16 or fewer" in message


def test_an_answer_is_written_under_the_noise_that_the_calibration_chose(place, tmp_path):
    """Without any, its draws write as the mean does."""
    folder = Path(shutil.copytree(place / "blob", tmp_path / "narrow"))
    calibration = folder / FILE_NAME
    facts = json.loads(calibration.read_text())
    facts["settings"] |= {"draws": 4, "factor": 0.0}
    calibration.write_text(json.dumps(facts))
    body = {"messages": [{"role": "user", "content": "what is red?"}], "options": []}
    body |= {"max_tokens": 3}
    with serving([folder]) as client:
        found = ask(client, "/v1/chat/completions", **body)["bayestune"]
        mean = ask(client, "/v1/chat/completions", **body, draws=0)["bayestune"]
        other = ask(client, "/v1/chat/completions", **body, draws=5)["bayestune"]
    assert found["draws"] == 4
    assert found["log_probability"] == pytest.approx(mean["log_probability"], abs=1e-5)
    assert other["log_probability"] != pytest.approx(mean["log_probability"], abs=1e-3)


def test_several_posteriors_have_one_base_in_memory(client, place, new):
    blob, mle = client.app.state.handler.store.all()
    names = dict(mle.posterior.model.named_parameters())
    shared = 0
    for name, parameter in blob.posterior.model.named_parameters():
        if "lora" not in name and name in names:
            assert parameter.data_ptr() == names[name].data_ptr()
            shared += 1
    assert shared > 10
    expected = bayestune.decide(place / "mle", place / "new.jsonl")
    for line, told in zip(ask(client, rows=new, model="mle")["rows"], expected, strict=True):
        same(line, told)
    assert client.get("/v1/models").json()["data"][1]["calibration"] is None
    with pytest.raises(Refusal, match="expected unlike names"):
        ArtefactStore([place / "blob", place / "blob"])


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ensemble", {"ensemble.size": 2}),
        ("mc_dropout", {"lora.dropout": 0.2}),
        ("blob", {"scoring": "text"}),
    ],
)
def test_other_families_and_scorings_answer_as_predict(place, new, tmp_path, method, options):
    folder = tmp_path / method
    run(*fitting(place, output=folder, method=method, **options))
    with serving([folder]) as client:
        found = ask(client, rows=new[:6])["rows"]
        for row, line in zip(new[:6], found, strict=True):
            (told,) = bayestune.decide(folder, [bayestune.Question("a", **as_row(row))])
            same(line, told)


def test_classes_of_a_head_are_in_its_order(tmp_path, bert, byte_level):
    rows = [{"question": f"{i} what?", "options": ABC, "answer": i % 3} for i in range(9)]
    furnish(tmp_path, bert(), byte_level)
    write_rows(tmp_path / "train.jsonl", rows)
    given = {"scoring": "head", "lora.targets": "[query,value]"}
    run(*fitting(tmp_path, method="blob", **given))
    with serving([tmp_path / "out"]) as client:
        plain = ask(client, question="what is red?")
        assert plain["options"] == ABC
        turned = ask(client, question="what is red?", options=ABC[::-1])
        assert turned["options"] == ABC
        assert turned["probabilities"] == pytest.approx(plain["probabilities"], abs=1e-6)
        assert "expected the classes" in ask(client, question="x", options=["a", "b"], status=422)
        chat = {"messages": [{"role": "user", "content": "what is red?"}]}
        found = ask(client, "/v1/chat/completions", **chat)
        assert found["choices"][0]["message"]["content"] == plain["choice_text"]
        message = ask(client, "/v1/chat/completions", **chat, options=[], status=422)
        assert "which has a classification head" in message


def test_a_calibrated_plain_adapter_is_served(place, new, tmp_path):
    folder = shutil.copytree(place / "mle", tmp_path / "plain")
    for name in ("posterior.json", "posterior.safetensors"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(Refusal, match="is not a posterior: got a plain LoRA adapter"):
        ArtefactStore([folder])
    rows = f"--rows={place / 'held_out.jsonl'}"
    run("calibrate", folder, rows, "--risk=0.8", "--confidence=0.6")
    expected = bayestune.decide(folder, place / "new.jsonl")
    with serving([folder]) as client:
        for line, told in zip(ask(client, rows=new)["rows"], expected, strict=True):
            same(line, told)


def test_an_artefact_that_changes_is_opened_anew(place, new, tmp_path, caplog):
    folder = shutil.copytree(place / "blob", tmp_path / "blob")
    with serving([folder]) as client:
        store = client.app.state.handler.store
        before = ask(client, **new[0])
        assert store.renew() == []
        config = folder / "posterior.safetensors"
        whole = config.read_bytes()
        config.write_bytes(whole[:100])  # as while it is written
        assert store.renew() == []
        assert "is served as it was" in caplog.text
        assert ask(client, **new[0])["artefact"] == before["artefact"]
        shutil.rmtree(folder)
        assert store.renew() == []
        shutil.copytree(place / "mle", folder)
        assert store.renew() == ["blob"]
        after = ask(client, **new[0])
        assert after["artefact"] != before["artefact"]
        (told,) = bayestune.decide(folder, [bayestune.Question("a", **as_row(new[0]))])
        same(after, told)
        assert 'bayestune_reloads{model="blob"} 1.0' in client.get("/metrics").text


def as_row(row):
    return {"question": row["question"], "options": tuple(row["options"]), "answer": None}


def test_too_many_rows_are_turned_away_and_the_others_answered(place, new):
    limits = Limits(max_waiting=3, request_seconds=20)
    with serving([place / "blob"], limits) as client, held(client) as release:
        with ThreadPoolExecutor(4) as pool:
            waits = pool.submit(ask, client, rows=new[:3])
            wait_for(lambda: client.app.state.handler.worker.waiting == 3)
            reply = client.post("/v1/decisions", json=new[3])
            assert reply.status_code == 429
            assert reply.headers["retry-after"] == "1"
            assert client.get("/readyz").status_code == 503
            assert "got 4 rows; expected 3" in ask(client, rows=new[:4], status=413)
            release.set()
            assert len(waits.result()["rows"]) == 3
        assert client.get("/readyz").json()["status"] == "ready"


def test_what_takes_too_long_is_given_up_and_the_service_goes_on(place, new):
    with serving([place / "blob"], Limits(request_seconds=0.2)) as client:
        with held(client) as release:
            assert "took too long" in ask(client, **new[0], status=504)
            release.set()
        client.app.state.handler.limits.__dict__["request_seconds"] = 20.0
        assert ask(client, **new[0])["model"] == "blob"


def test_rows_that_wait_are_answered_at_the_end(place, new):
    with serving([place / "blob"]) as client, ThreadPoolExecutor(1) as pool:
        worker = client.app.state.handler.worker
        with held(client) as release:
            waits = pool.submit(ask, client, rows=new[:5])
            wait_for(lambda: worker.waiting == 5)
            threading.Timer(0.1, release.set).start()
            worker.stop()
        assert len(waits.result()["rows"]) == 5
        assert "the service ends" in ask(client, **new[0], status=503)
        assert client.get("/healthz").status_code == 503


def test_a_token_is_asked_for_everything_but_health_and_the_page(place, new, monkeypatch):
    monkeypatch.setenv("BAYESTUNE_TOKEN", "correct-horse-battery")
    with serving([place / "blob"]) as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "correct-horse"}):
            reply = client.post("/v1/decisions", json=new[0], headers=headers)
            assert reply.status_code == 401
            assert "Bearer" in reply.json()["error"]["message"]
        assert client.get("/metrics").status_code == 401
        for path in ("/", "/healthz", "/readyz", "/openapi.json"):
            assert client.get(path).status_code == 200
        right = {"authorization": "Bearer correct-horse-battery"}
        assert client.post("/v1/decisions", json=new[0], headers=right).status_code == 200


def test_an_address_beyond_this_machine_needs_a_token(monkeypatch, tmp_path):
    monkeypatch.delenv("BAYESTUNE_TOKEN", raising=False)
    with pytest.raises(Refusal, match="without a token: anybody who reaches"):
        ServiceOptions("0.0.0.0").token()
    assert ServiceOptions("0.0.0.0", open_to_all=True).token() is None
    assert ServiceOptions("::1").token() is None
    short = tmp_path / "token"
    short.write_text("abc\n")
    with pytest.raises(Refusal, match="a token of 3 characters; expected 16 or more"):
        ServiceOptions(token_file=short).token()


def test_the_extra_is_asked_for_by_name(place, monkeypatch):
    monkeypatch.delenv("BAYESTUNE_TOKEN", raising=False)
    monkeypatch.delitem(sys.modules, "bayestune.serving.application", raising=False)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(Refusal, match=r"got no fastapi; .*pip install 'bayestune\[serve\]'"):
        serve([place / "blob"])


def test_the_log_has_no_text_of_users_unless_asked(place, new, caplog):
    with caplog.at_level(logging.INFO, "bayestune.requests"):
        for given in ({}, {"log_texts": True}):
            caplog.clear()
            with serving([place / "blob"], **given) as client:
                ask(client, question="SECRET question", options=["red", "green"])
                client.get("/SECRET")
            lines = [record.log_line for record in caplog.records if hasattr(record, "log_line")]
            assert [line["status"] for line in lines] == [200, 404]
            assert lines[0]["route"] == "/v1/decisions"
            assert ("SECRET" in str(lines)) == bool(given)
            assert "SECRET" not in str(lines[1])


def test_the_same_question_asked_again_is_no_drift(place, new):
    others = [{**row, "question": f"and {row['question']}"} for row in new[:15]]
    rows = [*new, *others]

    def distance(client):
        text = client.get("/metrics").text
        return re.findall(r'drift_\w+{model="blob"} (\S+)', text)

    with serving([place / "blob"]) as client:
        for _ in range(3):
            ask(client, rows=new[:1] * 40)
        assert distance(client) == []  # one content
        ask(client, rows=rows)
        found = distance(client)
        assert len(found) == 2
        for _ in range(5):
            ask(client, rows=new[:1] * 60)
        assert distance(client) == found


def test_figures_for_prometheus(client, new):
    others = [{**row, "question": f"and {row['question']}"} for row in new]
    ask(client, rows=new + others)
    text = client.get("/metrics").text
    for name in ("request_seconds_bucket", "waiting_rows", "pass_tokens_total"):
        assert f"bayestune_{name}" in text
    for name in ("drift_distance", "drift_p_value", "abstentions_total", "rows_total"):
        assert f'bayestune_{name}{{model="blob"}}' in text
    assert 'bayestune_decisions_total{decision="act",model="blob"}' in text


def test_the_paths_are_described(client):
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/decisions", "/v1/rank", "/v1/chat/completions", "/healthz"} <= set(paths)
