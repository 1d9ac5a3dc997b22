"""How a question becomes a prompt: the templates, those of BLoB's authors among them."""

from dataclasses import dataclass

from bayestune.data.questions import LETTERS, Question, Scoring


@dataclass(frozen=True)
class Prompt:
    """How a question becomes text.

    Args:
        letter: template under letter scoring, with {context}, {question} and {choices}, lines such as "A) text"; or
            with {texts_first}, lines such as "text) A". It ends where the label comes.
        text: template under text scoring, with {context} and {question}; it ends where the option's text comes.
        labels: what stands for the options under letter scoring.
    """

    letter: str
    text: str
    labels: tuple[str, ...] = LETTERS

    def render(self, row: Question, scoring: Scoring) -> str:
        """The prompt of a row, up to the place of its answer."""
        pairs = list(zip(self.labels, row.options, strict=False))
        lines = {
            "choices": "\n".join(f"{label}) {option}" for label, option in pairs),
            "texts_first": "\n".join(f"{option}) {label}" for label, option in pairs),
        }
        template = self.letter if scoring == "letter" else self.text
        return template.format(context=row.context, question=row.question, **lines)

    def answers(self, row: Question, scoring: Scoring) -> tuple[str, ...]:
        """What continues the prompt for each option.

        Raises:
            ValueError: if a row has more options than there are labels.
        """
        if scoring == "text":
            return row.options
        if len(row.options) > len(self.labels):
            raise ValueError(
                f"row {row.id}: got {len(row.options)} options, expected at most {len(self.labels)} under letter "
                'scoring; use scoring="text"'
            )
        return self.labels[: len(row.options)]


CHOICES = Prompt(
    letter="Return the label of the correct answer for the question below.\n\n"
    "Question: {question}\nChoices:\n{choices}\nAnswer:",
    text="Question: {question}\nAnswer:",
)
PASSAGE_CHOICES = Prompt(
    letter="Return the label of the correct answer for the question below.\n\n"
    "Passage: {context}\nQuestion: {question}\nChoices:\n{choices}\nAnswer:",
    text="Passage: {context}\nQuestion: {question}\nAnswer:",
)
BLANK = Prompt(letter=CHOICES.letter, text="Fill in the blank: {question}\nAnswer:")
_BOOLQ = (
    "Read the passage below and answer the question with the words 'true' or 'false'.\n\n"
    "Passage: {context}\nQuestion: {question}\nAnswer (true or false):"
)
_LABELLED = "Return the label of the correct answer for the question below.\n\n{text}\nChoices:\n{{choices}}\nAnswer:"


def _sentences(text: str) -> Prompt:
    return Prompt(letter=_LABELLED.format(text=text), text=text + "\nAnswer:")


ENTAILMENT = _sentences(
    "Passage: {context}\nStatement: {question}\nDoes the passage entail the statement?"
)
PARAPHRASE = _sentences("First: {context}\nSecond: {question}\nDo the two sentences mean the same?")
ACCEPTABLE = _sentences("Sentence: {question}\nIs the sentence acceptable English?")
TRUE_FALSE = Prompt(letter=_BOOLQ, text=_BOOLQ, labels=("True", "False"))
# The prompts as the public code of BLoB's authors prints them, to compare results with: the texts stand where the
# letters belong, a word is misspelt, and BoolQ's labels are interchanged. See docs/fidelity.md.
_TEXTS_FIRST = CHOICES.letter.replace("{choices}", "{texts_first}")
AUTHORS_ARC = Prompt(letter=_TEXTS_FIRST, text=CHOICES.text)
AUTHORS_OPENBOOK = Prompt(letter=_TEXTS_FIRST.replace("Choices:", "Chioces:"), text=CHOICES.text)
AUTHORS_BOOLQ = Prompt(letter=_BOOLQ, text=_BOOLQ, labels=("False", "True"))
