"""OpenAI's chat completions: one of given options, or a short answer in free words."""

import math
import time
import uuid
from collections.abc import Sequence
from typing import Any

from bayestune.errors import Refusal
from bayestune.serving.artefact_store import Served
from bayestune.serving.bodies import ChatBody, Message, RowBody
from bayestune.serving.request_handler import RequestHandler, TooLarge, service_line, shortened
from bayestune.serving.waiting import Answer
from bayestune.serving.written import Written
from bayestune.session import CalibratedPredictor

_TOKENS = 16  # of an answer, unless the request says


async def completion(handler: RequestHandler, body: ChatBody) -> dict[str, Any]:
    """The answer to a body, in OpenAI's form; `bayestune` has the decision beside it."""
    served = handler.served(body.model)
    predictor = handler.predictor_for(served, body)
    options = body.choices
    if options is None:
        options = list(served.options)
    if options:
        return await _chosen(handler, served, predictor, body, options)
    return await _written(handler, served, predictor, body)


async def _chosen(
    handler: RequestHandler,
    served: Served,
    predictor: CalibratedPredictor,
    body: ChatBody,
    options: Sequence[str],
) -> dict[str, Any]:
    """The likeliest option, with the averaged log-probabilities of all."""
    row = RowBody.model_validate({"messages": body.messages, "options": list(options)})
    (outcome,) = await handler.answers(served, predictor, [row])
    assert isinstance(outcome, Answer)
    line = outcome.line
    logs = [_log(p) for p in line["probabilities"]]
    order = sorted(range(len(logs)), key=lambda index: -logs[index])
    offered = line["options"]
    top = [_with_logprob(offered[index], logs[index]) for index in order[: body.top_logprobs]]
    chosen = _with_logprob(line["choice_text"], logs[line["choice"]]) | {"top_logprobs": top}
    answer = _answer(served, line["choice_text"], [chosen] if body.logprobs else None, "stop")
    answer["usage"] = _usage(outcome.tokens, 1)
    return answer | {"bayestune": service_line(outcome)}


async def _written(
    handler: RequestHandler, served: Served, predictor: CalibratedPredictor, body: ChatBody
) -> dict[str, Any]:
    """The likeliest tokens, one after the other."""
    if served.fit.details["scoring"] == "head":
        raise Refusal(
            f"got no options for {served.name}, which has a classification head; expected some; "
            "give `options`"
        )
    most = body.max_completion_tokens or body.max_tokens or min(_TOKENS, _most(handler))
    if most > _most(handler):
        got = f"max_tokens={most}"
        raise TooLarge(f"got {got}; expected {_most(handler)} or fewer: answers here are short")
    tokenizer: Any = served.session.loaded.tokenizer
    ids = await handler.encoded(lambda: prompt_ids(tokenizer, body.messages))
    handler.refuse_long(served, len(ids) + most)
    prompt = len(ids)
    written = Written.begin(predictor, ids)
    reason = "length"
    for _ in range(most):
        token = await handler.call(lambda: written.step(body.top_logprobs))
        if token in _ends(served):
            reason = "stop"
            break
    kept = [token["id"] for token in written.tokens if token["id"] not in _ends(served)]
    text = await handler.encoded(lambda: tokenizer.decode(kept))
    tokens = await handler.encoded(lambda: [_of_token(tokenizer, t) for t in written.tokens])
    answer = _answer(served, text, tokens if body.logprobs else None, reason)
    answer["usage"] = _usage(prompt, len(written.tokens))
    total = sum(token["logprob"] for token in written.tokens)
    return answer | {"bayestune": {"log_probability": total, "draws": written.draws.count}}


def prompt_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """A conversation's tokens under the tokenizer's own template, or the texts as they stand."""
    if not messages[-1].text.strip():
        raise Refusal("got a last message without text; expected some; say what is asked")
    if not getattr(tokenizer, "chat_template", None):
        return list(tokenizer("\n".join(message.text for message in messages))["input_ids"])
    turns = [{"role": message.role, "content": message.text} for message in messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as problem:  # a template raises what it likes
        got = f"messages that the model's template refuses ({shortened(str(problem))})"
        raise Refusal(f"got {got}; expected roles in its order; change them") from None
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _most(handler: RequestHandler) -> int:
    return handler.limits.max_answer_tokens


def _ends(served: Served) -> set[int]:
    """The tokens that end an answer."""
    model: Any = served.session.loaded.model
    tokenizer: Any = served.session.loaded.tokenizer
    of_model: Any = getattr(model.generation_config, "eos_token_id", None)
    ends = of_model if isinstance(of_model, list) else [of_model]
    return {token for token in (tokenizer.eos_token_id, *ends) if token is not None}


def _of_token(tokenizer: Any, token: dict[str, Any]) -> dict[str, Any]:
    """A token of `Written` in OpenAI's form, with the likeliest ones beside it."""
    top = [_with_logprob(tokenizer.decode([other]), value) for other, value in token["top"]]
    chosen = _with_logprob(tokenizer.decode([token["id"]]), token["logprob"])
    return chosen | {"top_logprobs": top}


def _with_logprob(text: str, value: float) -> dict[str, Any]:
    """A token's text and log-probability in OpenAI's form."""
    return {"token": text, "logprob": value, "bytes": list(text.encode("utf-8", "replace"))}


def _log(p: float) -> float:
    return math.log(p) if p > 0 else -9999.0  # as OpenAI writes it


def _usage(prompt: int, completion: int) -> dict[str, int]:
    total = prompt + completion
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total}


def _answer(
    served: Served, text: str, logprobs: list[dict[str, Any]] | None, reason: str
) -> dict[str, Any]:
    """A completion in OpenAI's form; `reason` is why the answer ends."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "logprobs": None if logprobs is None else {"content": logprobs},
        "finish_reason": reason,
    }
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": served.name,
        "choices": [choice],
    }
