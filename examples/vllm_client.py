"""Asks draws that a server holds as LoRA adapters, and averages what they say.

    bayestune export runs/tickets --draws 8 --to served    # prints the command that serves them
    python examples/vllm_client.py served "Is this ticket about billing?" yes no

The average over draws is the probability of an option; mutual information, in nats, is how much
the draws disagree. The posterior must be one of letter scoring.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen


def logits_of(server: str, adapter: str, prompt: str, answers: list[dict[str, Any]]) -> list[float]:
    """Log-probabilities of the letters' tokens after the prompt."""
    ids = [answer["token_id"] for answer in answers]
    asked = {"model": adapter, "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 20}
    asked |= {"logprob_token_ids": ids, "return_tokens_as_token_ids": True}  # of vLLM
    kind = {"Content-Type": "application/json"}
    with urlopen(Request(f"{server}/v1/completions", json.dumps(asked).encode(), kind)) as answer:
        found = json.load(answer)["choices"][0]["logprobs"]["top_logprobs"][0]
    names = [(f"token_id:{answer['token_id']}", answer["text"]) for answer in answers]
    told = [found.get(number, found.get(text)) for number, text in names]
    if None in told:
        raise SystemExit(f"{adapter}: no log-probability of {answers[told.index(None)]['label']}")
    return told


def softmax(logits: Sequence[float], temperature: float) -> list[float]:
    weights = [math.exp((logit - max(logits)) / temperature) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def entropy(probabilities: Sequence[float]) -> float:
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def ask(
    folder: Path, server: str, question: str, options: Sequence[str], context: str = ""
) -> tuple[list[float], float]:
    """The options' probabilities and the mutual information, from a folder's manifest."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    told = manifest["questions"]
    answers = told["answers"][: len(options)]
    if told["chat"] or len(answers) < len(options):
        raise SystemExit("expected a plain prompt and a letter for each option")
    pairs = [(answer["label"], option) for answer, option in zip(answers, options, strict=True)]
    choices = "\n".join(f"{label}) {option}" for label, option in pairs)
    texts = "\n".join(f"{option}) {label}" for label, option in pairs)
    parts = {"question": question, "context": context, "choices": choices, "texts_first": texts}
    prompt = told["prompt"].format(**parts)
    draws = [one["name"] for one in manifest["adapters"] if one["folder"].startswith("draw-")]
    temperature = manifest["temperature"]["average"]
    drawn = [softmax(logits_of(server, draw, prompt, answers), temperature) for draw in draws]
    average = [sum(column) / len(drawn) for column in zip(*drawn, strict=True)]
    disagreement = entropy(average) - sum(map(entropy, drawn)) / len(drawn)
    if len(drawn) > 1 and not manifest["average"]["exact"]:  # a sample tells too little of it
        disagreement *= len(drawn) / (len(drawn) - 1)
    return average, disagreement


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of `bayestune export`")
    parser.add_argument("question")
    parser.add_argument("options", nargs="+")
    parser.add_argument("--context", default="")
    parser.add_argument("--server", default="http://localhost:8000")
    given = parser.parse_args(arguments)
    asked = (given.folder, given.server, given.question, given.options, given.context)
    probabilities, disagreement = ask(*asked)
    best = probabilities.index(max(probabilities))
    told = f"probability {probabilities[best]:.4f}, mutual information {disagreement:.5f} nats"
    print(f"{given.options[best]}: {told}")


if __name__ == "__main__":
    main()
