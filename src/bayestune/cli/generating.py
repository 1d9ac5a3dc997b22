"""`generate`: texts under held draws, and which of their tokens the draws are unsure of."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from jsonargparse import Namespace
from tqdm import tqdm

from bayestune.cli.answers import LineWriter, readable
from bayestune.cli.labelling import new_file
from bayestune.errors import Refusal
from bayestune.forward import Draws
from bayestune.generation import Generation, generate
from bayestune.models import LoadedModel
from bayestune.posteriors import Posterior
from bayestune.session import LanguageFit
from bayestune.whole_files import JsonRow, read_json_lines

_FIGURES = ("log_probability", "total_entropy", "expected_entropy", "mutual_information")
_OF_SAMPLING = ("temperature", "top_p", "top_k")
_ASKED = ("id", "prompt", "messages")


def generate_texts(o: Namespace) -> None:
    """Continues prompts under a posterior's draws: JSON lines in, JSON lines out."""
    output = new_file(o)
    given = [name for name in _OF_SAMPLING if o[name] is not None]
    if given and not o.do_sample:
        raise Refusal(
            f"got --{given[0]} for greedy decoding, expected it with --do_sample; give that, or "
            f"leave --{given[0]} out"
        )
    with readable(o.input) as file:
        rows = read_json_lines(file)
    if not rows:
        raise Refusal(f"got no rows in {o.input}; expected one or more")
    writer = Writer.open(o)
    prompts = [writer.prompt_of(row, number) for number, row in enumerate(rows, 1)]
    torch.manual_seed(o.seed)
    starts = range(0, len(rows), o.batch_size)
    bar = tqdm(starts, "generate", unit="batch", disable=not o.progress or output is None)
    place = output and output.with_name(f".{output.name}.unfinished")
    if place is not None:
        place.unlink(missing_ok=True)
    with LineWriter(place) as lines:
        for start in bar:
            stop = start + o.batch_size
            for row, line in zip(rows[start:stop], writer.lines(prompts[start:stop]), strict=True):
                lines.write(_asked(row) | line)
    if place is not None and output is not None:
        place.replace(output)


def _asked(row: JsonRow) -> JsonRow:
    """What a line repeats of its row."""
    return {name: row[name] for name in _ASKED if name in row}


@dataclass(frozen=True)
class Writer:
    """A posterior that writes, with its tokenizer.

    Args:
        loaded: the base model and its tokenizer.
        posterior: on it.
        draws: which.
        options: of `generate`.
    """

    loaded: LoadedModel
    posterior: Posterior
    draws: Draws
    options: Mapping[str, Any]

    @classmethod
    def open(cls, o: Namespace) -> Self:
        """Loads the posterior or plain adapter that the options name."""
        opened = LanguageFit.open(o.posterior, o.model, o.bf16)
        loaded = opened.loaded
        draws = Draws(o.draws, o.draw_seed, bf16=opened.fit.bf16)
        options: dict[str, Any] = {"max_new_tokens": o.max_new_tokens, "do_sample": o.do_sample}
        options |= {name: o[name] for name in _OF_SAMPLING if o[name] is not None}
        if o.stop:
            options |= {"stop_strings": list(o.stop), "tokenizer": loaded.tokenizer}
        return cls(loaded, opened.fit.posterior, draws, {**options, "draws_as": o.draws_as})

    def prompt_of(self, row: JsonRow, number: int) -> str:
        """A row's prompt as text; messages in the model's own template."""
        prompt, messages = row.get("prompt"), row.get("messages")
        if isinstance(prompt, str) and prompt and messages is None:
            return prompt
        if not isinstance(messages, list) or not messages or prompt is not None:
            raise Refusal(
                f"line {number}: got a row with {sorted(row)}, expected a text in `prompt`, or "
                "`messages` with role and content"
            )
        if not self.loaded.tokenizer.chat_template:
            raise Refusal(
                f"line {number}: got messages for {self.loaded.name}, which has no chat template; "
                "expected a text in `prompt`"
            )
        chat: Any = self.loaded.tokenizer.apply_chat_template
        return chat(messages, tokenize=False, add_generation_prompt=True)

    def lines(self, prompts: Sequence[str]) -> Iterator[JsonRow]:
        """What is written for some prompts."""
        tokenizer: Any = self.loaded.tokenizer
        tokenizer.padding_side = "left"
        encoded = []
        for prompt in prompts:
            begun = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
            ids = tokenizer(prompt, add_special_tokens=not begun)["input_ids"]
            encoded.append({"input_ids": ids})
        inputs = tokenizer.pad(encoded, return_tensors="pt")
        found = generate(self.posterior, inputs, self.draws, **self.options)
        for row in range(len(prompts)):
            if found.sequences.dim() == 2:
                yield self._text(found, (row,))
            else:
                draws = range(len(found.sequences))
                yield {"texts": [self._text(found, (draw, row)) for draw in draws]}

    def _text(self, found: Generation, place: tuple[int, ...]) -> JsonRow:
        """One text with its figures: sums over it, and token by token."""
        tokenizer: Any = self.loaded.tokenizer
        ids = found.sequences[place][found.mask[place]].tolist()
        names = ("log_probabilities", *_FIGURES[1:])
        values = [getattr(found, name)[place].tolist() for name in names]
        tokens = []
        for index, token in enumerate(ids):
            figures = {name: of[index] for name, of in zip(_FIGURES, values, strict=True)}
            tokens.append({"token": tokenizer.decode([token]), **figures})
        sums = found.per_sequence()
        whole = {name: getattr(sums, name)[place].item() for name in _FIGURES}
        return {"text": tokenizer.decode(ids, skip_special_tokens=True), **whole, "tokens": tokens}
