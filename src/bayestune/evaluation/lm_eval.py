"""A posterior as a model of lm-evaluation-harness; needs the extra `lm-eval`.

Each request is read by the harness's own HFLM, once under each held draw, so tokens, batches and
chat templates are the harness's. What is averaged over draws are the probabilities of options.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import LM, CachingLM  # type: ignore[import-not-found]
from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found]
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from bayestune.errors import Refusal
from bayestune.evaluation.option_likelihoods import averaged_options, averaged_texts
from bayestune.forward import Draws
from bayestune.generation import generate
from bayestune.posteriors import Posterior

logger = logging.getLogger(__name__)

Key = tuple[str, int]  # a task and the number of its document
_GREEDY = {"do_sample": False}


class AveragedLM(LM):
    """A posterior as a model of the harness: `lm_eval.simple_evaluate(AveragedLM(…), tasks=[…])`.

    * `loglikelihood`: several requests of one document are its options. They get the numbers whose
      softmax is the average over draws of the options' probabilities, see `averaged_options`. A
      request by itself gets the logarithm of its average likelihood. "Greedy" is what most draws
      would write.
    * `loglikelihood_rolling`: the logarithm of the text's average likelihood.
    * `generate_until`: each token averaged over draws, see `bayestune.generate`.

    Args:
        posterior: of a language model, whose draws are functions, as adapters are.
        tokenizer: of that model.
        draws: which; a count of 0 gives HFLM's own numbers with the mean adapter.
        batch_size: requests of a pass.
        cache: folder of log-likelihoods that were read before, a file for each draw of each
            posterior; None for none. The harness's own cache is refused: it knows neither.
        progress: whether to show a bar over draws.

    Raises:
        Refusal: if draws cannot be read one at a time, or a cache is asked for a posterior without
            a digest.
    """

    def __init__(
        self,
        posterior: Posterior,
        tokenizer: PreTrainedTokenizerBase,
        draws: Draws | None = None,
        *,
        batch_size: int = 8,
        cache: Path | None = None,
        progress: bool = False,
    ) -> None:
        super().__init__()
        self.draws = draws or Draws()
        _refuse_unheld(posterior, self.draws)
        self.posterior = posterior
        self.progress = progress
        self.plain = _Reader(posterior, tokenizer, self.draws, batch_size)
        self.cache = None if cache is None else cache / self._digest(cache)
        self.drawn: dict[Key, Tensor] = {}  # (S, C) of each document with options, in nats / T
        self.seconds = 0.0

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """A log-likelihood for each request, and whether most draws would write it."""
        drawn, temperature = self._read("loglikelihood", requests)
        answers = torch.tensor(drawn, dtype=torch.float64)  # (S, requests, 2)
        likelihoods = answers[..., 0]
        greedy = answers[..., 1].mean(0) > 0.5
        averages = averaged_texts(likelihoods)
        num_alone = 0
        for (task, document, without_context), places in _questions(requests).items():
            firsts = [of_option[0] for of_option in places]
            if len(firsts) == 1:
                num_alone += 1
                continue
            options = likelihoods[:, firsts]
            if not without_context:
                self.drawn[task, document] = options / temperature
            averaged = averaged_options(options, temperature)
            for average, of_option in zip(averaged, places, strict=True):
                averages[of_option] = average
        _say_untempered(temperature, num_alone)
        return list(zip(averages.tolist(), greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """The log-likelihood of each whole text."""
        drawn, temperature = self._read("loglikelihood_rolling", requests)
        _say_untempered(temperature, len(requests))
        return averaged_texts(torch.tensor(drawn).double()).tolist()

    def generate_until(self, requests: list[Any]) -> list[str]:
        """A text for each request; nothing of it is cached."""
        if self.draws.count:
            return self.plain.generate_until(requests)
        with self.posterior.side_by_side(self.draws):
            return self.plain.generate_until(requests)

    def _read(self, kind: str, requests: list[Any]) -> tuple[list[Any], float]:
        """What HFLM answers under each draw, and the posterior's temperature.

        Args:
            kind: the method of HFLM.
            requests: its argument.
        """
        begin = time.perf_counter()
        answers = []
        temperature = 1.0
        ones = list(self._one_by_one())
        for one in tqdm(ones, "draws", disable=not self.progress):
            with self.posterior.side_by_side(one) as of_posterior:
                temperature = of_posterior  # the same under every draw
                if self.cache is None:
                    answers.append(getattr(self.plain, kind)(requests, disable_tqdm=True))
                else:
                    answers.append(getattr(self._cached(one), kind)(requests))
        self.seconds += time.perf_counter() - begin
        return answers, temperature

    def _one_by_one(self) -> Iterator[Draws]:
        """Each draw alone; the mean if there are none."""
        if self.draws.count == 0:
            yield self.draws
        for index in self.draws.indices:
            yield replace(self.draws, count=1, first=index)

    def _cached(self, one: Draws) -> CachingLM:
        """HFLM behind a cache of this draw alone."""
        which = f"draw-{one.first}" if one.count else "mean"
        return CachingLM(self.plain, f"{self.cache}-{which}.db")

    def _digest(self, cache: Path) -> str:
        """A digest of all that likelihoods depend on, except for the draw's index."""
        if self.posterior.digest is None:
            raise Refusal(
                f"got cache={cache} for a posterior without a digest, which the cache could not "
                "tell from another; expected one; set posterior.digest = posterior_digest(folder)"
            )
        facts = [self.posterior.digest, self.draws.seed, self.draws.bf16, version("lm-eval")]
        facts += [str(self.plain.config.name_or_path), str(self.plain.model.dtype)]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Refuses the harness's own cache."""
        if cache_hook.dbdict is not None:
            raise Refusal(
                "got the harness's use_cache, whose keys know neither posterior nor draws; "
                "expected AveragedLM(…, cache=folder), or --use_cache of `bayestune lm-eval`"
            )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of HFLM."""
        return self.plain.tokenizer

    @property
    def tokenizer_name(self) -> str:
        """Of HFLM."""
        return self.plain.tokenizer_name

    @property
    def device(self) -> torch.device:
        """Of HFLM."""
        return self.plain.device

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Of HFLM."""
        return self.plain.chat_template(chat_template)

    def apply_chat_template(self, *given: Any, **more: Any) -> str:
        """Of HFLM."""
        return self.plain.apply_chat_template(*given, **more)

    def get_model_info(self) -> dict[str, Any]:
        """Of HFLM."""
        return self.plain.get_model_info()


class _Reader(HFLM):
    """HFLM on a posterior's model, whose texts average the draws at each token."""

    def __init__(
        self,
        posterior: Posterior,
        tokenizer: PreTrainedTokenizerBase,
        draws: Draws,
        batch_size: int,
    ) -> None:
        self._posterior = posterior
        self._draws = draws
        with _without_warnings("lm_eval"):  # a model that is loaded already is what we give it
            super().__init__(
                posterior.model,
                tokenizer=tokenizer,
                batch_size=batch_size,
                mixed_precision_dtype="bfloat16" if draws.bf16 else None,
            )

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **options: Any
    ) -> Tensor:
        if self._draws.count == 0:
            return super()._model_generate(context, max_length, stop, **options)
        if not options.get("temperature"):  # the harness's way to say greedy
            options.pop("temperature", None)
            options = _GREEDY | options
        if stops := [text for text in stop if text]:
            options |= {"stop_strings": stops, "tokenizer": self.tokenizer}
        mask = options.pop("attention_mask", torch.ones_like(context))
        inputs = {"input_ids": context, "attention_mask": mask}
        options |= {"max_new_tokens": max_length - context.shape[1]}
        options |= {"pad_token_id": self.tokenizer.pad_token_id}
        generation = generate(self._posterior, inputs, self._draws, **options)
        new = generation.sequences.to(context.device)
        return torch.cat([context, new], 1) if self.backend == "causal" else new


def _refuse_unheld(posterior: Posterior, draws: Draws) -> None:
    """Refuses draws under which not all options of a question can be read."""
    if draws.count and posterior.by_batch:
        raise Refusal(
            f"the draws of a {type(posterior).__name__} are other ones in each batch, so a "
            f"question's options cannot be read under one: got draws={draws.count}, expected draws "
            "that are functions, such as those of Gaussian or Scaled; give draws=0 for the mean"
        )
    try:
        with posterior.side_by_side(replace(draws, count=min(draws.count, 1))):
            pass
    except Refusal as problem:
        raise Refusal(
            f"the harness's requests cannot be read under the draws of a "
            f"{type(posterior).__name__}: {problem}; or give draws=0 for the mean"
        ) from problem


def _questions(requests: Sequence[Any]) -> dict[tuple[str, int, bool], list[list[int]]]:
    """The places of requests that are options of one question: a list of places for each option.

    A request may come several times. Options without a context, which tasks with mutual information
    ask for besides, are a question of their own.

    Returns:
        Places by task, document, and whether the options come without a context beside others with
        one.
    """
    groups: dict[Any, dict[int, list[int]]] = {}
    for place, request in enumerate(requests):
        if request.doc_id is None:
            key = (request.task_name, f"request {place}", False)
        else:
            key = (request.task_name, request.doc_id, request.args[0] == "")
        groups.setdefault(key, {}).setdefault(request.idx, []).append(place)
    bare = [key for key in groups if key[2] and (*key[:2], False) not in groups]
    for key in bare:  # no other options: these are the question's
        groups[(*key[:2], False)] = groups.pop(key)
    questions = {}
    for key, options in groups.items():
        questions[key] = [options[index] for index in sorted(options)]
    return questions


def _say_untempered(temperature: float, num_alone: int) -> None:
    if temperature != 1 and num_alone:
        logger.warning(
            "the temperature %.3g is of options: %d requests without options are read at 1",
            temperature,
            num_alone,
        )


@contextmanager
def _without_warnings(name: str) -> Iterator[None]:
    log = logging.getLogger(name)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
