"""A prompt of the user's own: a template from a file, the chat format, a system message."""

import logging
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from string import Formatter

from bayestune.data.prompts import Prompt
from bayestune.data.questions import Question, Scoring
from bayestune.errors import Refusal, nearest

logger = logging.getLogger(__name__)

FIELDS = ("question", "context", "choices", "texts_first")
_TWICE = "a brace that is to be printed is written twice, {{ or }}"


@dataclass(frozen=True)
class OwnPrompt:
    """The user's options about the prompt; what they leave open stays as the task has it.

    Args:
        file: a template with {question}, {choices} and perhaps {context}.
        chat: whether prompts go through the tokenizer's chat template; None for whether there is a
            system message or a row with earlier messages.
        system: the system message.

    Raises:
        Refusal: if there is a system message and no chat.
    """

    file: Path | None = None
    chat: bool | None = None
    system: str | None = None

    def __post_init__(self) -> None:
        if self.system and self.chat is False:
            raise Refusal(
                f"got the system message {self.system!r} and chat=False; expected a chat, which "
                "alone has one; leave one of the two out"
            )

    def of(self, prompt: Prompt, rows: Collection[Question], scoring: Scoring) -> Prompt:
        """A task's prompt with these options applied.

        Args:
            prompt: of the task.
            rows: all rows that are put with it.
            scoring: how they are scored.

        Raises:
            Refusal: if the file holds no template, or a row has what the prompt cannot show.
        """
        has_turns = any(row.turns for row in rows)
        chat = bool(self.system or has_turns) if self.chat is None else self.chat
        if scoring == "head" and (self.file or chat):
            raise Refusal(
                "a classification head reads question and context as they stand: got a prompt, a "
                'chat or messages, expected none; leave them out, or give scoring="letter" or '
                '"text"'
            )
        if self.file is not None:
            template = read_template(self.file, scoring)
            prompt = Prompt(letter=template, text=template)
            if "{context}" in template and rows and not any(row.context for row in rows):
                logger.warning("%s: no row has a context, which the prompt shows", self.file.name)
        prompt = replace(prompt, chat=chat, system=self.system or "")
        refuse_unshown(prompt, rows, scoring)
        return prompt


def read_template(path: Path, scoring: Scoring) -> str:
    """The template of a file, without white space at its end.

    Args:
        path: of the file.
        scoring: how rows are scored, which says what a template needs.

    Raises:
        Refusal: if it is not text in UTF-8, or no template for this scoring.
        FileNotFoundError: if there is no such file.
    """
    if path.is_dir():
        raise Refusal(f"{path} is a folder: got no file, expected a template; name the file")
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}, expected a template for --prompt")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refusal(f"{path.name}: not UTF-8 text ({error}); save it as UTF-8") from None
    return checked_template(text.rstrip(), path.name, scoring)


def checked_template(text: str, name: str, scoring: Scoring) -> str:
    r"""The template, if it has the fields that it needs and no unknown ones; see `FIELDS`.

    Args:
        text: the template.
        name: of its file, for messages.
        scoring: letter scoring needs a place for the options.

    Raises:
        Refusal: if braces do not match, a field is unknown, or one that is needed is missing.

    >>> checked_template("Say {{yes}}.\n{question}\n{choices}\nAnswer:", "own.txt", "letter")[:9]
    'Say {{yes'
    """
    fields = _fields(text, name)
    for field in fields:
        if field not in FIELDS:
            alike = nearest(field, FIELDS)
            hint = f"did you mean {{{alike}}}?" if alike else _TWICE
            raise Refusal(
                f"{name}: got the unknown field {{{field}}}, expected some of "
                f"{', '.join(f'{{{known}}}' for known in FIELDS[:3])}; {hint}"
            )
    if "question" not in fields:
        raise Refusal(
            f"{name}: got no {{question}}, expected it where the row's text belongs; put it in"
        )
    if scoring == "letter" and not {"choices", "texts_first"} & set(fields):
        raise Refusal(
            f"{name}: got no {{choices}}, expected it under letter scoring, whose answers are the "
            'letters there; put it in, or give scoring="text"'
        )
    return text


def _fields(text: str, name: str) -> list[str]:
    """The fields of a template in order, each as it is written."""
    fields = []
    try:
        for _, field, spec, conversion in Formatter().parse(text):
            if field is not None:
                written = f"{field}!{conversion}" if conversion else field
                fields.append(f"{written}:{spec}" if spec else written)
    except ValueError as error:
        got = f"got braces that do not match ({error}), expected such as {{question}}"
        raise Refusal(f"{name}: {got}; {_TWICE}") from None
    return fields


def refuse_unshown(prompt: Prompt, rows: Collection[Question], scoring: Scoring) -> None:
    """Refuses rows with a context, or with earlier messages, for which the prompt has no place."""
    with_turns = [row.id for row in rows if row.turns]
    if with_turns and not prompt.chat:
        raise Refusal(
            f"{len(with_turns)} rows bring earlier messages, such as {with_turns[0]}: got a prompt "
            "that is plain text, expected a chat; give --chat true to the fit, or a question alone"
        )
    with_context = [row.id for row in rows if row.context]
    if with_context and scoring != "head" and "{context}" not in prompt.template(scoring):
        raise Refusal(
            f"{len(with_context)} rows have a context, such as {with_context[0]}: got a prompt "
            "without {context}, expected a place for it; put it in, or drop the column"
        )
