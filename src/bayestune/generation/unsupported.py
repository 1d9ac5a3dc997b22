"""Options of transformers' `generate` that draws side by side cannot serve."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bayestune.errors import Refusal
from bayestune.forward import Batch

_BEAMS = "beam search follows several texts of a row"
_ASSISTED = "assisted decoding takes several tokens in a step"
_RESULT = "generate returns a Generation, which has each token's figures"
_REASONS = {
    "num_beams": _BEAMS,
    "num_beam_groups": _BEAMS,
    "constraints": _BEAMS,
    "force_words_ids": _BEAMS,
    "assistant_model": _ASSISTED,
    "assistant_early_exit": _ASSISTED,
    "prompt_lookup_num_tokens": _ASSISTED,
    "use_mtp": _ASSISTED,
    "penalty_alpha": "contrastive search compares tokens of one model",
    "dola_layers": "DoLa compares layers of one model",
    "guidance_scale": "guidance runs the model on other rows than the draws'",
    "encoder_repetition_penalty": "the penalty looks at the prompt of each of the S·N rows",
    "token_healing": "healing generates on its own, prompt by prompt",
    "custom_generate": "the average over draws is taken in one",
    "synced_gpus": "the loop does not wait for other processes",
    "past_key_values": "the cache has a row for each draw",
    "cache": "the cache has a row for each draw",
    "return_dict_in_generate": _RESULT,
    "output_scores": _RESULT,
    "output_logits": _RESULT,
    "output_attentions": _RESULT,
    "output_hidden_states": _RESULT,
}


def refuse_unsupported(options: Mapping[str, Any], model_config: Any) -> None:
    """Refuses options that cannot work, whether given or from the model's configuration.

    Args:
        options: of `generate`, by name.
        model_config: the model's own generation configuration, which one among the options
            replaces.
    """
    given = options.get("generation_config")
    for name, reason in _REASONS.items():
        value = getattr(model_config if given is None else given, name, None)
        source = "of the generation configuration"
        if name in options:
            value = options[name]
            source = "given"
        if _is_on(value):
            raise Refusal(
                f"draws cannot generate with {name}, because {reason}: got {name}={_short(value)} "
                f"{source}, expected greedy decoding or sampling; "
                + (f"pass {name}=1" if source != "given" else "leave it out")
            )
    cache = options.get("cache_implementation", getattr(given, "cache_implementation", None))
    if cache == "paged":
        raise Refusal(
            "draws cannot generate with cache_implementation='paged', which schedules rows one by "
            "one: got 'paged', expected another cache; leave it out"
        )


def _is_on(value: Any) -> bool:
    """Whether an option asks for anything: None, False, 0 and 1, as in num_beams=1, do not."""
    return value is True or not (value is None or value is False or value in (0, 1))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else type(value).__name__


def refuse_right_padding(inputs: Batch) -> None:
    """Refuses prompts of a decoder that are padded at their end."""
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and not mask[:, -1].all():
        padded = int((mask[:, -1] == 0).sum())
        raise Refusal(
            f"a decoder goes on after a prompt's last token: got {padded} of {len(mask)} prompts "
            "padded on the right, expected the left; set tokenizer.padding_side='left'"
        )
