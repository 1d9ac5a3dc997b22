"""How a question becomes a prompt: the templates, including those of BLoB's authors."""

from dataclasses import dataclass, field

from bayestune.data.questions import LETTERS, Question, Scoring
from bayestune.errors import Refusal


@dataclass(frozen=True)
class Prompt:
    """How a question becomes text.

    Args:
        letter: template under letter scoring, up to the label, with {context}, {question} and
            {choices} (lines such as "A) text") or {texts_first} (lines such as "text) A").
        text: template under text scoring, up to the option, with {context} and {question}.
        labels: what stands for the options under letter scoring.
        chat: whether it is a user's message, put by the tokenizer's chat template, and not plain
            text.
        system: the message before it; one of the row's own takes its place.
        spaced_by_end: whether the end of a chat's prompt alone decides if a space stands before
            the answer, whatever the template has there, as in fits of 0.2.
    """

    letter: str
    text: str
    labels: tuple[str, ...] = LETTERS
    chat: bool = field(default=False, metadata={"absent_means": False})
    system: str = field(default="", metadata={"absent_means": ""})
    spaced_by_end: bool = field(default=False, metadata={"absent_means": False})

    def template(self, scoring: Scoring) -> str:
        """The template under a way of scoring."""
        return self.letter if scoring == "letter" else self.text

    def render(self, row: Question, scoring: Scoring) -> str:
        """The prompt of a row, up to the place of its answer; of a chat, the user's message."""
        labelled = list(zip(self.labels, row.options, strict=False))
        return self.template(scoring).format(
            context=row.context,
            question=row.question,
            choices="\n".join(f"{label}) {option}" for label, option in labelled),
            texts_first="\n".join(f"{option}) {label}" for label, option in labelled),
        )

    def messages(self, row: Question, scoring: Scoring) -> list[dict[str, str]]:
        """The conversation that a row is the end of, as chat templates take it."""
        turns = list(row.turns)
        if self.system and all(role != "system" for role, _ in turns):
            turns.insert(0, ("system", self.system))
        turns.append(("user", self.render(row, scoring)))
        return [{"role": role, "content": text} for role, text in turns]

    def answers(self, row: Question, scoring: Scoring) -> tuple[str, ...]:
        """The texts that may continue the prompt, one for each option.

        Raises:
            Refusal: if the row has more options than there are labels, but for text scoring.
        """
        if scoring == "text":
            return row.options
        count = len(row.options)
        if count > len(self.labels):
            raise Refusal(
                f"row {row.id}: got {count} options, expected at most {len(self.labels)} under "
                'letter scoring; use scoring="text", or "head" with a model that has one'
            )
        return self.labels[:count]


_INSTRUCTION = "Return the label of the correct answer for the question below.\n\n"


def _with_choices(body: str, text: str | None = None) -> Prompt:
    """A prompt of instruction, body and choices; `text`, or else the body, is for text scoring."""
    return Prompt(
        letter=f"{_INSTRUCTION}{body}\nChoices:\n{{choices}}\nAnswer:",
        text=f"{text or body}\nAnswer:",
    )


_STATEMENT = "Passage: {context}\nStatement: {question}\nDoes the passage entail the statement?"
_SENTENCES = "First: {context}\nSecond: {question}\nDo the two sentences mean the same?"

CHOICES = _with_choices("Question: {question}")
PASSAGE_CHOICES = _with_choices("Passage: {context}\nQuestion: {question}")
BLANK = _with_choices("Question: {question}", text="Fill in the blank: {question}")
ENTAILMENT = _with_choices(_STATEMENT)
PARAPHRASE = _with_choices(_SENTENCES)
ACCEPTABLE = _with_choices("Sentence: {question}\nIs the sentence acceptable English?")
_BOOLQ = (
    "Read the passage below and answer the question with the words 'true' or 'false'.\n\n"
    "Passage: {context}\nQuestion: {question}\nAnswer (true or false):"
)
TRUE_FALSE = Prompt(letter=_BOOLQ, text=_BOOLQ, labels=("True", "False"))

# As the public code of BLoB's authors prints them, to compare results with: the texts stand where
# the letters belong, a word is misspelt, and BoolQ's labels are swapped. See docs/fidelity.md.
_TEXTS_FIRST = CHOICES.letter.replace("{choices}", "{texts_first}")
AUTHORS_ARC = Prompt(letter=_TEXTS_FIRST, text=CHOICES.text)
AUTHORS_OPENBOOK = Prompt(letter=_TEXTS_FIRST.replace("Choices:", "Chioces:"), text=CHOICES.text)
AUTHORS_BOOLQ = Prompt(letter=_BOOLQ, text=_BOOLQ, labels=("False", "True"))
