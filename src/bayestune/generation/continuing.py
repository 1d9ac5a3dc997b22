"""Generation with S draws side by side, in transformers' own loop."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList, StopStringCriteria
from transformers.generation.streamers import BaseStreamer

from bayestune.adapters import base_of
from bayestune.errors import Refusal
from bayestune.forward import Batch, Draws, main_input, on_device, repeat_rows
from bayestune.generation.averaging import Averaging, Ends
from bayestune.generation.generated import Generation
from bayestune.generation.unsupported import refuse_right_padding, refuse_unsupported
from bayestune.posteriors import Posterior, count_for

DrawsAs = Literal["average", "sequences"]


def generate(
    posterior: Posterior,
    inputs: Batch,
    draws: int | Draws = 10,
    *,
    seed: int = 0,
    draws_as: DrawsAs = "average",
    **options: Any,
) -> Generation:
    """Continues N prompts with S held draws side by side, token by token.

    p(token | text so far) ≈ 1/S Σ_s softmax(f_s), so all draws of a row go on with the same token.
    Each draw has its own keys and values, as if it had written the text alone. The draws weigh
    the same at every step, however probable each found the text so far.

    Args:
        posterior: whose draws are adapters or dropout; or any, for its mean.
        inputs: prompts as a tokenizer returns them, (N, T); of decoders padded on the left.
        draws: S; 0 for the mean adapter. A posterior with `atoms` uses those. S·N rows go through
            the model at once: `max_tokens` does not split them.
        seed: of the set of draws. Sampling follows torch's generator, as in transformers.
        draws_as: "average" for one text a prompt; "sequences" if every draw writes a text of its
            own.
        options: of transformers' `generate`, such as max_new_tokens, do_sample, temperature, top_p,
            stop_strings with tokenizer, stopping_criteria, logits_processor, streamer.
            Processors and the streamer see N rows. What is not given is as in the model's
            `generation_config`.

    Returns:
        The new tokens with their uncertainty, (N, T); (S, N, T) of "sequences".

    Raises:
        Refusal: if the draws cannot stand side by side, prompts are padded on the right, or an
            option asks for beam search, assisted decoding or others that cannot work.
    """
    if draws_as not in ("average", "sequences"):
        raise Refusal(f"got draws_as={draws_as!r}; expected 'average' or 'sequences'; choose one")
    _refuse_without_names(inputs)
    model = base_of(posterior.model)
    _refuse_without_text(model)
    refuse_unsupported(options, model.generation_config)
    if not model.config.is_encoder_decoder:
        refuse_right_padding(inputs)
    draws = draws if isinstance(draws, Draws) else Draws(draws, seed)
    draws = replace(draws, count=count_for(posterior, draws.count))
    num_copies = max(1, draws.count)
    _check_bounds(draws, len(main_input(inputs)))
    prompts = {name: value for name, value in inputs.items() if name != "labels"}
    loop = Loop(posterior, num_copies, draws_as, options)
    with posterior.side_by_side(draws) as temperature:
        loop.temperature = temperature
        batch = repeat_rows(on_device(prompts, posterior.model), num_copies)
        sequences = model.generate(**batch, **loop.options(), custom_generate=loop)
    return loop.result(sequences)


def _refuse_without_names(inputs: Any) -> None:
    if not isinstance(inputs, Mapping):
        raise Refusal(
            f"prompts name their tensors: got a {type(inputs).__name__}, expected what a tokenizer "
            "returns, {'input_ids': …, 'attention_mask': …}; give that"
        )
    main_input(inputs)


def _refuse_without_text(model: Any) -> None:
    if not hasattr(model, "can_generate") or not model.can_generate():
        raise Refusal(
            f"a {type(model).__name__} writes no text: got a model that cannot generate, expected "
            "a language model; take `predict`"
        )


def _check_bounds(draws: Draws, num_rows: int) -> None:
    if draws.shared_prefix is not None:
        raise Refusal(
            f"generation reads the whole prompt with every draw: got shared_prefix="
            f"{draws.shared_prefix}, expected None; leave it out"
        )
    if draws.max_rows is not None and draws.count * num_rows > draws.max_rows:
        raise Refusal(
            f"all draws of a row take each step together: got {draws.count} draws of {num_rows} "
            f"rows and max_rows={draws.max_rows}, expected at most so many; give fewer rows at once"
        )


class Loop:
    """What transformers' `generate` calls once its options are prepared: its sampling loop.

    Args:
        posterior: whose draws generate.
        num_copies: how often the prompts were repeated.
        draws_as: whether each token is averaged over the draws, or each draw writes its own text.
        options: of transformers' `generate`.
    """

    def __init__(
        self, posterior: Posterior, num_copies: int, draws_as: DrawsAs, options: dict[str, Any]
    ) -> None:
        self._num_averaged = num_copies if draws_as == "average" else 1
        self._num_texts = num_copies if draws_as == "sequences" else None  # for each prompt
        self._exact = posterior.atoms is not None
        self._options = dict(options)
        streamer = self._options.pop("streamer", None)
        self._streamer = streamer and FirstRows(streamer, self._num_averaged)
        # taken from torch's generator now, before draws seed it for their own noise
        self._seed = int(torch.randint(2**62, ())) if self._samples(posterior) else None
        self.temperature = 1.0

    def _samples(self, posterior: Posterior) -> bool:
        """Whether tokens are sampled rather than the most probable ones taken."""
        config = self._options.get("generation_config")
        config = base_of(posterior.model).generation_config if config is None else config
        return bool(self._options.get("do_sample", config.do_sample))

    def options(self) -> dict[str, Any]:
        """The options for `generate`, which would not pass a streamer or a tokenizer on to us."""
        options = dict(self._options)
        tokenizer = options.pop("tokenizer", None)
        config = options.get("generation_config")
        strings = options.pop("stop_strings", getattr(config, "stop_strings", None))
        if strings is not None:
            if tokenizer is None:
                raise Refusal(
                    f"stop strings need the tokenizer: got stop_strings={strings!r} alone, expected"
                    " tokenizer=… beside it; pass it"
                )
            if config is not None:
                options["generation_config"] = copy.copy(config)
                options["generation_config"].stop_strings = None
            criteria = options.get("stopping_criteria") or ()
            stop = StopStringCriteria(tokenizer, strings)
            options["stopping_criteria"] = StoppingCriteriaList([*criteria, stop])
        options.setdefault("disable_compile", True)  # draws are other modules in each context
        return options | ({"streamer": self._streamer} if self._streamer else {})

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        **prepared: Any,
    ) -> Tensor:
        """The prompts and their continuations (S·N, T)."""
        noise = None
        if self._seed is not None:
            noise = torch.Generator(input_ids.device).manual_seed(self._seed)
        self._averaging = Averaging(
            logits_processor, self._num_averaged, self.temperature, self._exact, noise
        )
        self._ends = Ends(stopping_criteria)
        self._prompt_length = input_ids.shape[1]
        prepared["streamer"] = self._streamer
        processors = LogitsProcessorList([self._averaging])
        return model._sample(input_ids, processors, self._ends, **prepared)

    def result(self, sequences: Tensor) -> Generation:
        """What was generated, from the loop's output: prompts and continuations (S·N, T)."""
        new = sequences[: len(sequences) // self._num_averaged, self._prompt_length :]
        mask = self._ends.mask(*new.shape)
        fields = {"sequences": new, "mask": mask, **self._averaging.figures(mask)}
        if self._num_texts is not None:
            for name, value in fields.items():
                fields[name] = value.unflatten(0, (self._num_texts, -1))
        return Generation(**fields)


class FirstRows(BaseStreamer):
    """Gives a streamer the rows of the first draw alone, since all draws have the same tokens."""

    def __init__(self, streamer: BaseStreamer, num_draws: int) -> None:
        self._streamer = streamer
        self._num_draws = num_draws

    def put(self, value: Tensor) -> None:
        """Passes on the prompt (N, T), or a step's tokens (N,)."""
        self._streamer.put(value[: len(value) // self._num_draws])

    def end(self) -> None:
        """Passes on the end."""
        self._streamer.end()
