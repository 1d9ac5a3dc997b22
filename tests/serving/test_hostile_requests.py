"""Requests that are malformed or mean harm get a clear 4xx, and the service goes on."""

import json

import pytest
from clients import serving
from safetensors.torch import load_file, save_file

from bayestune.serving import Limits
from running import fitting, furnish, run
from tiny import byte_level_tokenizer, tiny_llama

PATHS = ("/v1/decisions", "/v1/rank", "/v1/chat/completions")
GOOD = {"question": "what is red?", "options": ["red", "green"]}
MESSAGE = {"role": "user", "content": "what is red?"}
WRONG = (1, 1.5, True, None, "text", [], {}, [1], [None], {"a": 1}, [["a", "b"]], "\u0000", -1)
NAMES = (
    "../../etc/passwd",
    "/etc/passwd",
    "..\\..\\boot.ini",
    "blob/../blob",
    "%2e%2e%2f",
    "\u0000",
)
NAMES += (
    "file:///etc/passwd",
    "blob\nX-Evil: 1",
    "a" * 5000,
    "${jndi:ldap://x}",
    "' OR 1=1 --",
    "",
)


def wrong_types():
    """Bodies in which one field has a type that it cannot have."""
    for value in WRONG:
        if not isinstance(value, str):
            yield "/v1/decisions", {**GOOD, "question": value}
        yield "/v1/decisions", {**GOOD, "options": value}
        if value not in ("", None) and not isinstance(value, str):
            yield "/v1/decisions", {**GOOD, "context": value}
            yield "/v1/decisions", {**GOOD, "id": value}
        yield "/v1/decisions", {"rows": value if value is not None else 0}
        yield "/v1/rank", {"rows": value}
        yield "/v1/chat/completions", {"messages": value}
        if value not in (None, 1):
            yield "/v1/decisions", {**GOOD, "draws": value}
            yield "/v1/chat/completions", {"messages": [MESSAGE], "n": value}
        if not isinstance(value, bool):
            yield "/v1/decisions", {**GOOD, "include_draws": value}
        yield "/v1/chat/completions", {"messages": [{**MESSAGE, "role": value}]}
        if not isinstance(value, str):
            yield "/v1/chat/completions", {"messages": [{**MESSAGE, "content": value}]}


def unfit():
    """Bodies of the right types that cannot be answered."""
    for name in NAMES:
        yield "/v1/decisions", {**GOOD, "model": name}
        yield "/v1/rank", {"rows": [GOOD], "model": name}
        yield "/v1/chat/completions", {"messages": [MESSAGE], "model": name}
    for options in ([], ["a"], ["a", "a"], ["", "a"], [" ", "a"], ["a"] * 10_000):
        yield "/v1/decisions", {**GOOD, "options": options}
    many = [f"option {i}" for i in range(10_000)]
    for text in ("", " ", "\n\t", "\ud800", "x\udfff"):
        yield "/v1/decisions", {**GOOD, "question": text}
    yield "/v1/decisions", {**GOOD, "options": many}
    yield "/v1/decisions", {**GOOD, "options": ["a", "\ud800"]}
    yield "/v1/decisions", {**GOOD, "qestion": "misspelt"}
    yield "/v1/decisions", {"rows": [GOOD], "question": "both"}
    yield "/v1/decisions", {"rows": [{**GOOD, "id": "a"}, {**GOOD, "id": "a"}]}
    yield "/v1/decisions", {"rows": [GOOD] * 10_000}
    yield "/v1/decisions", {**GOOD, "question": "what is the answer? " * 400}
    yield "/v1/decisions", {**GOOD, "draws": 10**6}
    yield "/v1/decisions", {**GOOD, "draws": 10**30}
    yield "/v1/decisions", {**GOOD, "draws": -1}
    yield "/v1/decisions", {**GOOD, "seed": 10**30}
    yield "/v1/decisions", {**GOOD, "context": "a passage that the fit had no place for"}
    yield "/v1/decisions", {"messages": [MESSAGE], "question": "both", "options": ["a", "b"]}
    yield "/v1/decisions", {"messages": [], "options": ["a", "b"]}
    for role in ("system", "assistant"):
        yield "/v1/decisions", {"messages": [{"role": role, "content": "x"}], "options": ["a", "b"]}
    yield "/v1/rank", {"rows": [GOOD], "number": 2}
    yield "/v1/rank", {"rows": [GOOD, {"question": "x"}]}
    yield "/v1/rank", {"rows": [GOOD], "by": "best"}
    yield "/v1/rank", {"rows": [GOOD, GOOD], "by": "bald", "draws": 1}
    yield "/v1/chat/completions", {"messages": [MESSAGE], "stream": True}
    yield "/v1/chat/completions", {"messages": [MESSAGE], "n": 2}
    yield "/v1/chat/completions", {"messages": [MESSAGE], "max_tokens": 10**9}
    yield "/v1/chat/completions", {"messages": [MESSAGE], "top_logprobs": 21}
    long = {**MESSAGE, "content": "what is red? " * 2000}
    yield "/v1/chat/completions", {"messages": [long]}


def garbled():
    """Bytes that are no body at all."""
    deep = b"[" * 100_000
    for text in (b"", b"{", b"null", b"[]", b"\xff\xfe\x00", b'{"question": NaN}', b"a=b", deep):
        for path in PATHS:
            yield path, text
    yield "/v1/decisions", b'{"question": "' + b"a" * 70_000 + b'"}'
    yield "/v1/decisions", b'{"question": "x\x01", "options": ["a", "b"]}'
    yield "/v1/decisions", b'{"a":' * 50_000 + b"1" + b"}" * 50_000


@pytest.fixture(scope="module")
def small(place):
    with serving([place / "blob"], Limits(max_body=2**20, max_request_tokens=4096)) as client:
        yield client


def said(reply):
    """The message of an error in the service's form."""
    error = reply.json()["error"]
    assert set(error) == {"type", "message"}
    assert error["type"] not in ("unexpected", "")
    return error["message"]


def test_hostile_requests_get_a_clear_4xx_and_the_service_goes_on(small):
    before = small.post("/v1/decisions", json=GOOD).json()
    headers = {"content-type": "application/json"}
    requests = [(path, json.dumps(body).encode()) for path, body in (*wrong_types(), *unfit())]
    requests += list(garbled())
    assert len(requests) >= 200
    for path, body in requests:
        reply = small.post(path, content=body, headers=headers)
        assert 400 <= reply.status_code < 500, (path, body[:200], reply.text)
        message = said(reply)
        assert 10 < len(message) < 2000, (path, body[:200])
    assert small.post("/v1/decisions", json=GOOD).json() == before
    assert small.get("/readyz").status_code == 200


def test_other_methods_paths_types_and_hosts_are_turned_away(small):
    assert small.get("/v1/decisions").status_code == 405
    for path in ("/etc/passwd", "/../../etc/passwd", "/v1/../../x", "/%2e%2e/x", "/v1/decisions/x"):
        reply = small.get(path)
        assert reply.status_code == 404
        assert said(reply)
    text = {"content-type": "text/plain"}
    assert small.post("/v1/decisions", content=json.dumps(GOOD), headers=text).status_code == 422
    reply = small.post("/v1/decisions", json=GOOD, headers={"host": "evil.example:8000"})
    assert reply.status_code == 421
    assert "expected localhost" in said(reply)


def test_a_body_beyond_the_limit_is_not_read(small):
    reply = small.post("/v1/decisions", content=b"x" * (2**20 + 1))
    assert reply.status_code == 413
    chunks = (b"x" * 2**16 for _ in range(20))  # without a content-length
    reply = small.post("/v1/decisions", content=chunks)
    assert reply.status_code == 413
    assert "expected fewer" in said(reply)


def test_characters_of_every_kind_are_questions_too(small):
    for text in (
        "\u0000\u0001\u001b[31m",
        "\u202egnp.exe",
        "🙂" * 50,
        "ﷺ",
        "{question}{0}%s",
        "<script>",
    ):
        reply = small.post("/v1/decisions", json={**GOOD, "question": f"what is {text}?"})
        assert reply.status_code == 200
        assert reply.json()["question"] == f"what is {text}?"


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory):
    """A fit on a model that overflows where it reads a z, which no training row has."""
    tokenizer = byte_level_tokenizer()
    place = furnish(tmp_path_factory.mktemp("z"), tiny_llama(initializer_range=0.3), tokenizer)
    path = place / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.embed_tokens.weight"][tokenizer("z")["input_ids"]] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    run(*fitting(place, method="mle"))
    return place / "out"


def test_a_row_whose_logits_are_no_numbers_takes_no_other_with_it(overflowing):
    bad = {**GOOD, "question": "is a z?"}
    with serving([overflowing]) as client:
        reply = client.post("/v1/decisions", json={"rows": [GOOD, bad, GOOD]})
        assert reply.status_code == 200
        first, second, third = reply.json()["rows"]
        assert first["probabilities"] == third["probabilities"]
        assert "got logits with NaN" in second["error"]
        for body in (bad, {"rows": [bad, bad]}):
            reply = client.post("/v1/decisions", json=body)
            assert reply.status_code == 422
            assert "got logits with NaN" in reply.json()["error"]["message"]
        reply = client.post("/v1/rank", json={"rows": [GOOD, bad]})
        assert "got logits with NaN" in reply.json()["error"]["message"]
