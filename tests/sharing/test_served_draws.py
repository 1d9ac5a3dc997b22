"""The client of a server that holds the draws as adapters says what `predict` says.

The server is a stub of `/v1/completions`; its numbers come from the exported folders through stock
PEFT.
"""

import importlib.util
import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from bayestune import export, predict
from bayestune.session import Session, TaskOptions
from bayestune.sharing import read_manifest

EXAMPLE = Path(__file__).parents[2] / "examples/vllm_client.py"


@pytest.fixture(scope="module")
def client():
    spec = importlib.util.spec_from_file_location("vllm_client", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Completions(BaseHTTPRequestHandler):
    """Answers as a server without a sampler: the log-probabilities of one token."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/completions"
        assert asked["max_tokens"] == 1
        server = self.server
        model = server.adapters[asked["model"]]
        ids = server.tokenizer(asked["prompt"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            found = model(input_ids=ids).logits[0, -1].log_softmax(-1)
        if server.knows_ids:
            top = {f"token_id:{one}": found[one].item() for one in asked["logprob_token_ids"]}
        else:
            best = found.topk(server.most).indices.tolist()
            top = {server.tokenizer.decode([one]): found[one].item() for one in best}
        body = json.dumps({"choices": [{"text": "?", "logprobs": {"top_logprobs": [top]}}]})
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def served(home, tmp_path_factory):
    """An export, and a server of its adapters."""
    folder = export(home / "out", tmp_path_factory.mktemp("served") / "out", draws=3, draw_seed=1)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Completions)
    server.tokenizer = AutoTokenizer.from_pretrained(home / "model")
    server.adapters = {}
    for adapter in read_manifest(folder)["adapters"]:
        base = AutoModelForCausalLM.from_pretrained(home / "model")
        model = PeftModel.from_pretrained(base, folder / adapter["folder"])
        server.adapters[adapter["name"]] = model.eval()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, server, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("knows_ids", [True, False])
def test_the_client_says_what_predict_says(knows_ids, home, served, client, capsys):
    folder, server, address = served
    server.knows_ids = knows_ids
    server.most = 400
    session = Session.of_posterior(home / "out", TaskOptions(evaluation_data=home / "test.jsonl"))
    posterior = session.load(home / "out").posterior
    for row in session.rows()[:2]:
        batch = session.scorer.collate(session.scorer.encode([replace(row, answer=None)]))
        expected = predict(posterior, batch, draws=3, seed=1)
        probabilities, disagreement = client.ask(folder, address, row.question, row.options)
        assert probabilities == pytest.approx(expected.probabilities[0].tolist(), abs=1e-5)
        assert disagreement == pytest.approx(expected.mutual_information.item(), abs=1e-6)
        assert disagreement > 1e-5
        client.main([str(folder), row.question, *row.options, f"--server={address}"])
        best = row.options[expected.choice.item()]
        said = f"{best}: probability {expected.confidence.item():.4f}, mutual information "
        assert capsys.readouterr().out.startswith(said)


def test_a_letter_that_the_server_does_not_tell_is_named(served, client):
    folder, server, address = served
    server.knows_ids = False
    server.most = 1
    with pytest.raises(SystemExit, match="out-draw-0: no log-probability of "):
        client.ask(folder, address, "what is red?", ["red", "green"])
    with pytest.raises(SystemExit, match="a letter for each option"):
        client.ask(folder, address, "what is red?", ["red"] * 99)
