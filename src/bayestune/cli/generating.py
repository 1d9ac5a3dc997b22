"""`generate`: texts under held draws, with the uncertainty of each token."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from jsonargparse import Namespace
from tqdm import tqdm

from bayestune.cli.answers import LineWriter, new_output_file, readable_file, unfinished_file
from bayestune.errors import Refusal
from bayestune.forward import Draws
from bayestune.generation import Generation, generate
from bayestune.models import LoadedModel
from bayestune.posteriors import Posterior
from bayestune.session import LanguageFit
from bayestune.whole_files import JsonRow, read_json_lines

_ENTROPIES = ("total_entropy", "expected_entropy", "mutual_information")
_SAMPLING_OPTIONS = ("temperature", "top_p", "top_k")
_REPEATED_FIELDS = ("id", "prompt", "messages")  # of a row, in its line


def generate_texts(args: Namespace) -> None:
    """Continues prompts under a posterior's draws: JSON lines in, JSON lines out."""
    output = new_output_file(args)
    given = [name for name in _SAMPLING_OPTIONS if args[name] is not None]
    if given and not args.do_sample:
        raise Refusal(
            f"got --{given[0]} for greedy decoding, expected it with --do_sample; give that, or "
            f"leave --{given[0]} out"
        )
    with readable_file(args.input) as file:
        rows = read_json_lines(file)
    if not rows:
        raise Refusal(f"got no rows in {args.input}; expected one or more")
    generator = TextGenerator.open(args)
    prompts = [generator.prompt_of(row, number) for number, row in enumerate(rows, 1)]
    torch.manual_seed(args.seed)
    starts = range(0, len(rows), args.batch_size)
    bar = tqdm(starts, "generate", unit="batch", disable=not args.progress or output is None)
    unfinished = output and unfinished_file(output)
    if unfinished is not None:
        unfinished.unlink(missing_ok=True)
    with LineWriter(unfinished) as writer:
        for start in bar:
            stop = start + args.batch_size
            generated = generator.lines(prompts[start:stop])
            for row, line in zip(rows[start:stop], generated, strict=True):
                repeated = {name: row[name] for name in _REPEATED_FIELDS if name in row}
                writer.write(repeated | line)
    if unfinished is not None and output is not None:
        unfinished.replace(output)


@dataclass(frozen=True)
class TextGenerator:
    """Continues prompts as lines of `generate`.

    Args:
        loaded: the base model and its tokenizer.
        posterior: on that model.
        draws: those that write.
        options: of `generation.generate`.
    """

    loaded: LoadedModel
    posterior: Posterior
    draws: Draws
    options: Mapping[str, Any]

    @classmethod
    def open(cls, args: Namespace) -> Self:
        """Loads the posterior or plain adapter that the options name."""
        opened = LanguageFit.open(args.posterior, args.model, args.bf16)
        loaded = opened.loaded
        draws = Draws(args.draws, args.draw_seed, bf16=opened.fit.bf16)
        options: dict[str, Any] = {
            "max_new_tokens": args.max_new_tokens,
            "do_sample": args.do_sample,
            "draws_as": args.draws_as,
        }
        options |= {name: args[name] for name in _SAMPLING_OPTIONS if args[name] is not None}
        if args.stop:
            options |= {"stop_strings": list(args.stop), "tokenizer": loaded.tokenizer}
        return cls(loaded, opened.fit.posterior, draws, options)

    def prompt_of(self, row: JsonRow, number: int) -> str:
        """A row's prompt as text; messages in the model's own template.

        Args:
            row: with a text in `prompt`, or `messages`.
            number: of its line, for what is refused.

        Raises:
            Refusal: if the row has neither or both, or messages for a model without a template.
        """
        prompt = row.get("prompt")
        messages = row.get("messages")
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
        apply_template: Any = self.loaded.tokenizer.apply_chat_template
        return apply_template(messages, tokenize=False, add_generation_prompt=True)

    def lines(self, prompts: Sequence[str]) -> Iterator[JsonRow]:
        """Continues some prompts in one batch.

        Args:
            prompts: texts, perhaps in the model's template.

        Returns:
            A line for each: one text with its figures; or, with `--draws_as sequences`, `texts` of
            each draw.
        """
        tokenizer: Any = self.loaded.tokenizer
        tokenizer.padding_side = "left"
        encoded = []
        for prompt in prompts:
            # a template may have written the token that the tokenizer would put first
            has_bos = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
            ids = tokenizer(prompt, add_special_tokens=not has_bos)["input_ids"]
            encoded.append({"input_ids": ids})
        inputs = tokenizer.pad(encoded, return_tensors="pt")
        generation = generate(self.posterior, inputs, self.draws, **self.options)
        for row in range(len(prompts)):
            if generation.sequences.dim() == 2:
                yield self._text(generation, (row,))
            else:
                draws = range(len(generation.sequences))
                yield {"texts": [self._text(generation, (draw, row)) for draw in draws]}

    def _text(self, generation: Generation, index: tuple[int, ...]) -> JsonRow:
        """One text with its figures: sums over it, and token by token.

        Args:
            generation: of a batch.
            index: of the text in it: (row,), or (draw, row) where each draw has a text.
        """
        tokenizer: Any = self.loaded.tokenizer
        ids = generation.sequences[index][generation.mask[index]].tolist()
        by_token = {"log_probability": generation.log_probabilities[index].tolist()}
        for name in _ENTROPIES:
            by_token[name] = getattr(generation, name)[index].tolist()
        tokens = []
        for position, token in enumerate(ids):
            figures = {name: values[position] for name, values in by_token.items()}
            tokens.append({"token": tokenizer.decode([token]), **figures})
        sums = generation.per_sequence()
        of_text = {name: getattr(sums, name)[index].item() for name in by_token}
        text = tokenizer.decode(ids, skip_special_tokens=True)
        return {"text": text, **of_text, "tokens": tokens}
