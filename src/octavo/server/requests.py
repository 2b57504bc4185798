"""What clients may ask: every field with its type and bounds, and so the requests' half of the OpenAPI schema.

Other fields are kept as they came: `unsupported.check_fields` refuses those that would change the answer, since clients
send many that would not. Of OpenAI's own fields, one that octavo does not support is declared with the value that
changes nothing; UNSUPPORTED says why. Null means the default.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MOST_CHOICES = 16
MOST_PROMPTS = 128
MOST_STOPS = 16  # OpenAI takes 4; evaluation harnesses send up to a dozen
LONGEST_STOP = 200  # characters
MOST_LOGPROBS = 20
MOST_MESSAGES = 256
MOST_PARTS = 64
LONGEST_NAME = 200
LONGEST_TEXT = 2**22  # characters; the body's limit is the narrower one
MOST_IDS = 2**20
SEEDS = 2**63
MOST_TOKENS = 2**20
ADAPTER_NAME = r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,99}"

UNSUPPORTED = {
    "best_of": "Ask for n answers instead.",
    "suffix": "Text is only ever continued at its end.",
    "logit_bias": "Leave it out.",
    "frequency_penalty": "Use repetition_penalty.",
    "presence_penalty": "Use repetition_penalty.",
    "tools": "Describe tools in a message.",
    "tool_choice": "Describe tools in a message.",
    "functions": "Describe functions in a message.",
    "function_call": "Describe functions in a message.",
    "response_format": "Answers are plain text.",
    "modalities": "Answers are plain text.",
    "audio": "Answers are plain text.",
    "web_search_options": "The model alone answers.",
    "load_inplace": "Unload the adapter first.",
}  # fmt: skip


def _whole(value: object) -> object:
    """JSON does not tell 2.0 from 2. Text and true are no numbers, though pydantic would take them for some."""
    if isinstance(value, bool | str):
        raise PydanticCustomError("int_type", "Input should be a valid integer")
    return value


def _whole_items(value: object) -> object:
    """The same for long lists, whose items are then checked strictly."""
    if isinstance(value, list):
        return [int(item) if type(item) is float and item.is_integer() else item for item in value]
    return value


def _flag(value: object) -> object:
    """Python takes 0 for false."""
    if not isinstance(value, bool):
        raise PydanticCustomError("bool_type", "Input should be a valid boolean")
    return value


Flag = Annotated[bool, Field(strict=True)]
No = Annotated[Literal[False], BeforeValidator(_flag)]
WHOLE = BeforeValidator(_whole)  # behind the bounds: before them it would hide them from the schema
Zero = Annotated[float, Field(strict=True, ge=0, le=0)]
Name = Annotated[str, Field(max_length=LONGEST_NAME)]
Text = Annotated[str, Field(max_length=LONGEST_TEXT)]
Prompt = Annotated[str, Field(min_length=1, max_length=LONGEST_TEXT)]
TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
TokenIds = Annotated[
    list[TokenId], Field(min_length=1, max_length=MOST_IDS, fail_fast=True), BeforeValidator(_whole_items)
]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
MostTokens = Annotated[int, Field(ge=0, le=MOST_TOKENS), WHOLE]
MostLogprobs = Annotated[int, Field(ge=0, le=MOST_LOGPROBS), WHOLE]
Nothing = Annotated[list[Any], Field(max_length=0)]


class Fields(BaseModel):
    """An object of a request. What its schema does not have is in `model_extra`."""

    model_config = ConfigDict(extra="allow")


class StreamOptions(Fields):
    """How a stream ends."""

    include_usage: Flag | None = None


class Sampled(Fields):
    """What both of OpenAI's ways to ask share."""

    model: Name | None = Field(None, description="The base or an adapter; null: the first adapter, else the base.")
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES), WHOLE] | None = None
    temperature: Annotated[float, Field(strict=True, ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**20), WHOLE] | None = None
    repetition_penalty: Annotated[float, Field(strict=True, ge=0.1, le=10, allow_inf_nan=False)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-SEEDS, lt=SEEDS), WHOLE] | None = None
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the counts of its tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(Sampled):
    """OpenAI's /v1/completions: text or token ids to continue."""

    prompt: (
        Prompt
        | Annotated[list[Prompt], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
    )
    max_tokens: MostTokens | None = Field(None, description="New tokens at most; null: 16.")
    logprobs: MostLogprobs | None = None
    echo: Flag | None = None
    best_of: Annotated[int, Field(ge=1, le=1), WHOLE] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None


class TextPart(Fields):
    """A piece of a message's content."""

    type: Literal["text"]
    text: Text


ROLES = ("system", "developer", "user", "assistant")


class ChatMessage(Fields):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=MOST_PARTS)]

    @model_validator(mode="before")
    @classmethod
    def _said_plainly(cls, turn: object) -> object:
        """Messages that OpenAI's API has and a text model has not: refused in words instead of a union's errors."""
        if isinstance(turn, dict) and (why := _not_text(turn)):
            raise PydanticCustomError("unsupported", "{why}", {"why": why})
        return turn

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


def _not_text(turn: dict[str, Any]) -> str | None:
    """Why a message cannot be read, or None if it can or is malformed."""
    role, content = turn.get("role"), turn.get("content")
    if role in ("tool", "function"):
        return f"messages of the role {role!r} are not supported. Give what a tool found as a user's message"
    if isinstance(role, str) and role not in ROLES:
        return f"there is no role {role[:40]!r}. The roles are {', '.join(ROLES)}"
    if turn.get("tool_calls") or turn.get("function_call"):
        return "tool calls are not supported. Describe calls and their results in the content"
    if content is None and "content" in turn:
        return "the content is null, and must be text"
    for number, part in enumerate(content if isinstance(content, list) else ()):
        kind = part.get("type") if isinstance(part, dict) else "text"
        if isinstance(kind, str) and kind != "text":
            return f"content[{number}] is of the type {kind[:40]!r}. This model reads text alone"
    return None


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)]


class PlainText(Fields):
    """The one form of answers."""

    type: Literal["text"]


class ChatRequest(Sampled):
    """OpenAI's /v1/chat/completions: a conversation to answer, through the model's own chat template."""

    messages: Messages
    max_tokens: MostTokens | None = Field(None, description="New tokens at most; null: the server's limit.")
    max_completion_tokens: MostTokens | None = Field(None, description="The newer name of max_tokens; it wins.")
    logprobs: Flag | None = None
    top_logprobs: MostLogprobs | None = None
    tools: Nothing | None = None
    functions: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    function_call: Literal["none", "auto"] | None = None
    response_format: PlainText | None = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    web_search_options: None = None

    @property
    def wanted_logprobs(self) -> int | None:
        """How many of the likeliest tokens go with each; who asks for some has asked for log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs or self.top_logprobs else None


class ArticleRequest(Fields):
    """The article's POST /prompt/: `length` counts the prompt's tokens too. Its page sends numbers as text."""

    input: Prompt
    length: (
        Annotated[int, Field(ge=1, le=MOST_TOKENS), WHOLE] | Annotated[str, Field(pattern=r"^[ \n]*[0-9]{1,7}[ \n]*$")]
    ) = 100
    temperature: (
        Annotated[float, Field(strict=True, ge=0, le=2, allow_inf_nan=False)]
        | Annotated[str, Field(pattern=r"^[ \n]*([01](\.[0-9]*)?|\.[0-9]+|2(\.0*)?)[ \n]*$")]
    ) = 0.8


AdapterName = Annotated[str, Field(pattern=f"^{ADAPTER_NAME}$", max_length=100)]


class LoadAdapter(Fields):
    """An adapter to serve under a new name, as vLLM's clients ask for it."""

    lora_name: AdapterName
    lora_path: Annotated[str, Field(min_length=1, max_length=1024, description="Below the server's --adapters-from.")]
    load_inplace: No | None = None


class UnloadAdapter(Fields):
    """An adapter to serve no more."""

    lora_name: AdapterName


class TokenizeText(Fields):
    """A text whose ids are wanted."""

    model: Name | None = None
    prompt: Text
    add_special_tokens: Flag = Field(True, description="With the begin token, where the model has one.")


class TokenizeChat(Fields):
    """A conversation whose ids are wanted, up to where the assistant's next turn begins."""

    model: Name | None = None
    messages: Messages


class Detokenize(Fields):
    """Ids whose text is wanted."""

    model: Name | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MOST_IDS, fail_fast=True), BeforeValidator(_whole_items)]
