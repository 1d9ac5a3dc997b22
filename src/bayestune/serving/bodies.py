"""What requests may say: their fields and types, which the OpenAPI page shows."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt

Texts = list[str]
Count = Annotated[StrictInt, Field(ge=0)]
Seed = Annotated[StrictInt, Field(ge=0, lt=2**32)]


class Closed(BaseModel):
    """Fields that are known, and no others: a misspelt one is said and not dropped."""

    model_config = ConfigDict(extra="forbid")


class Part(BaseModel):
    """A part of a message, of which texts are read."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    @property
    def text(self) -> str:
        """Its text, its parts joined."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content)


class RowBody(BaseModel):
    """A row: a question, or messages of which the last one is the question, and its options.

    Fields may also have the names of the columns that the fit's files had; no others are taken.
    """

    model_config = ConfigDict(extra="allow")

    id: str | None = Field(None, description="names the row in the answer")
    question: str | None = None
    messages: list[Message] | None = Field(
        None, min_length=1, description="in place of question and context"
    )
    context: str = Field("", description="a passage that the question is about")
    options: Texts = Field([], description="left out: those that all rows of the fit had")


class AskedBody(BaseModel):
    """Which artefact answers, and how."""

    model: str | None = Field(None, description="of /v1/models; left out: the first")
    draws: Count | None = Field(None, description="0 for the mean; left out: as calibrated, or 10")
    seed: Seed | None = Field(None, description="of the draws; left out: as calibrated, or 0")


class DecisionsBody(RowBody, AskedBody):
    """One row, or several in `rows`."""

    rows: list[RowBody] | None = Field(None, min_length=1)
    include_draws: StrictBool = Field(False, description="each draw's probabilities too")


class RankBody(AskedBody, Closed):
    """Rows without answers, to be ranked by what their labels would teach."""

    rows: list[RowBody] = Field(min_length=1)
    number: Annotated[StrictInt, Field(ge=1)] | None = Field(None, description="left out: all")
    by: Literal["bald", "batch_bald", "entropy", "margin", "random"] | None = None


class ChatBody(BaseModel):
    """OpenAI's chat completions, as far as they have a meaning here; other fields are ignored."""

    messages: list[Message] = Field(min_length=1)
    model: str | None = None
    options: Texts | None = Field(None, description="the answer is one of these")
    guided_choice: Texts | None = Field(None, description="the same, as vLLM calls it")
    logprobs: StrictBool = False
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] = 0
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    draws: Count | None = None
    seed: Seed | None = None
    n: Annotated[StrictInt, Field(ge=1, le=1)] = 1
    stream: Literal[False] = False
    temperature: StrictFloat | StrictInt | None = Field(
        None, description="has no effect: the answer is the likeliest"
    )

    @property
    def choices(self) -> Texts | None:
        """The options that the answer is one of; empty for an answer in free words."""
        return self.guided_choice if self.options is None else self.options


class ErrorBody(BaseModel):
    """What went wrong, in the form of OpenAI's errors."""

    error: dict[str, Any]
