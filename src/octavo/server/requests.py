"""Request models: every field with its type and bounds. FastAPI derives the OpenAPI schema from them.

Unknown fields are kept in `model_extra`: `unsupported.check_fields` rejects those that would change the output, because
clients send many that have no effect. An OpenAI field that octavo does not support is declared with its neutral value
only; UNSUPPORTED gives the reason. Null means the default.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_CHOICES = 16
MAX_PROMPTS = 128
MAX_STOPS = 16  # OpenAI allows 4; evaluation harnesses send up to twelve
MAX_STOP_LENGTH = 200  # characters
MAX_LOGPROBS = 20
MAX_MESSAGES = 256
MAX_PARTS = 64
MAX_NAME_LENGTH = 200
MAX_TEXT_LENGTH = 2**22  # characters; the limit of the body is usually reached first
MAX_IDS = 2**20
SEED_LIMIT = 2**63
MAX_TOKENS = 2**20
ENDS = "The answer ends with the context at the latest, with the finish_reason `length`."
ADAPTER_NAME = r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,99}"

UNSUPPORTED = {
    "best_of": "Use `n`.",
    "suffix": "Infilling is not supported.",
    "logit_bias": "Omit it.",
    "frequency_penalty": "Use repetition_penalty.",
    "presence_penalty": "Use repetition_penalty.",
    "tools": "Describe tools in a message.",
    "tool_choice": "Describe tools in a message.",
    "functions": "Describe functions in a message.",
    "function_call": "Describe functions in a message.",
    "response_format": "The output is plain text.",
    "modalities": "The output is plain text.",
    "audio": "The output is plain text.",
    "web_search_options": "There is no web search.",
    "load_inplace": "Unload the adapter first.",
}  # fmt: skip


def _check_integer(value: object) -> object:
    """Rejects strings and booleans, which pydantic would convert. 2.0 is accepted: JSON has one number type."""
    if isinstance(value, bool | str):
        raise PydanticCustomError("int_type", "Input should be a valid integer")
    return value


def _convert_integers(value: object) -> object:
    """Converts integral floats in a list. The items are then validated in strict mode, which is fast."""
    if isinstance(value, list):
        return [int(item) if type(item) is float and item.is_integer() else item for item in value]
    return value


def _check_bool(value: object) -> object:
    """Rejects 0, which equals False in Python."""
    if not isinstance(value, bool):
        raise PydanticCustomError("bool_type", "Input should be a valid boolean")
    return value


Flag = Annotated[bool, Field(strict=True)]
OnlyFalse = Annotated[Literal[False], BeforeValidator(_check_bool)]
INTEGER = BeforeValidator(_check_integer)  # after the bounds in Annotated, otherwise they are missing in the schema
Zero = Annotated[float, Field(strict=True, ge=0, le=0)]
Name = Annotated[str, Field(max_length=MAX_NAME_LENGTH)]
Text = Annotated[str, Field(max_length=MAX_TEXT_LENGTH)]
Prompt = Annotated[str, Field(min_length=1, max_length=MAX_TEXT_LENGTH)]
TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
TokenIds = Annotated[
    list[TokenId], Field(min_length=1, max_length=MAX_IDS, fail_fast=True), BeforeValidator(_convert_integers)
]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
MaxTokens = Annotated[int, Field(ge=0, le=MAX_TOKENS), INTEGER]
LogprobCount = Annotated[int, Field(ge=0, le=MAX_LOGPROBS), INTEGER]
EmptyList = Annotated[list[Any], Field(max_length=0)]


class Fields(BaseModel):
    """An object in a request. Unknown fields are in `model_extra`."""

    model_config = ConfigDict(extra="allow")


class StreamOptions(Fields):
    """Options of a streamed response."""

    include_usage: Flag | None = None


class GenerationRequest(Fields):
    """Fields that /v1/completions and /v1/chat/completions share."""

    model: Name | None = Field(
        None, description="The base model or an adapter; null: the first adapter, else the base."
    )
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), INTEGER] | None = None
    temperature: Annotated[float, Field(strict=True, ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**20), INTEGER] | None = None
    repetition_penalty: Annotated[float, Field(strict=True, ge=0.1, le=10, allow_inf_nan=False)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-SEED_LIMIT, lt=SEED_LIMIT), INTEGER] | None = None
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
        """Whether a stream ends with a chunk of token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(GenerationRequest):
    """Body of OpenAI's /v1/completions: text or token ids to continue."""

    prompt: (
        Prompt
        | Annotated[list[Prompt], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    max_tokens: MaxTokens | None = Field(None, description=f"Maximum number of new tokens; null: 16. {ENDS}")
    logprobs: LogprobCount | None = None
    echo: Flag | None = None
    best_of: Annotated[int, Field(ge=1, le=1), INTEGER] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None


class TextPart(Fields):
    """A text part of a message's content."""

    type: Literal["text"]
    text: Text


ROLES = ("system", "developer", "user", "assistant")


class ChatMessage(Fields):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS)]

    @model_validator(mode="before")
    @classmethod
    def _reject_unsupported(cls, message: object) -> object:
        """Rejects OpenAI messages that a text model does not support, with one clear error instead of a union's."""
        if isinstance(message, dict) and (reason := _unsupported_reason(message)):
            raise PydanticCustomError("unsupported", "{reason}", {"reason": reason})
        return message

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


def _unsupported_reason(message: dict[str, Any]) -> str | None:
    """The reason why a message is not supported, or None if it is supported or malformed."""
    role, content = message.get("role"), message.get("content")
    if role in ("tool", "function"):
        return f"messages with the role {role!r} are not supported. Send the result of a tool as a user message"
    if isinstance(role, str) and role not in ROLES:
        return f"there is no role {role[:40]!r}. The roles are {', '.join(ROLES)}"
    if message.get("tool_calls") or message.get("function_call"):
        return "tool calls are not supported. Describe the calls and their results in the content"
    if content is None and "content" in message:
        return "the content is null; it must be text"
    for number, part in enumerate(content if isinstance(content, list) else ()):
        kind = part.get("type") if isinstance(part, dict) else "text"
        if isinstance(kind, str) and kind != "text":
            return f"content[{number}] has the type {kind[:40]!r}. This model supports text only"
    return None


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]


class PlainText(Fields):
    """The only supported response format."""

    type: Literal["text"]


class ChatRequest(GenerationRequest):
    """Body of OpenAI's /v1/chat/completions: a conversation, formatted with the model's chat template."""

    messages: Messages
    max_tokens: MaxTokens | None = Field(
        None, description=f"Maximum number of new tokens; null: the server's limit. {ENDS}"
    )
    max_completion_tokens: MaxTokens | None = Field(None, description="The newer name of max_tokens; takes precedence.")
    logprobs: Flag | None = None
    top_logprobs: LogprobCount | None = None
    tools: EmptyList | None = None
    functions: EmptyList | None = None
    tool_choice: Literal["none", "auto"] | None = None
    function_call: Literal["none", "auto"] | None = None
    response_format: PlainText | None = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    web_search_options: None = None

    @property
    def logprob_count(self) -> int | None:
        """Number of top logprobs for each token, None without logprobs. `top_logprobs` alone implies `logprobs`."""
        return (self.top_logprobs or 0) if self.logprobs or self.top_logprobs else None


class ArticleRequest(Fields):
    """Body of the legacy POST /prompt/. `length` includes the prompt. The article's page sends numbers as strings."""

    input: Prompt
    length: (
        Annotated[int, Field(ge=1, le=MAX_TOKENS), INTEGER] | Annotated[str, Field(pattern=r"^[ \n]*[0-9]{1,7}[ \n]*$")]
    ) = 100
    temperature: (
        Annotated[float, Field(strict=True, ge=0, le=2, allow_inf_nan=False)]
        | Annotated[str, Field(pattern=r"^[ \n]*([01](\.[0-9]*)?|\.[0-9]+|2(\.0*)?)[ \n]*$")]
    ) = 0.8


AdapterName = Annotated[str, Field(pattern=f"^{ADAPTER_NAME}$", max_length=100)]


class LoadAdapter(Fields):
    """Body of /v1/load_lora_adapter, as in vLLM."""

    lora_name: AdapterName
    lora_path: Annotated[
        str,
        Field(
            min_length=1,
            max_length=1024,
            description="An adapter, a run, or RUN@STEP, in the server's --adapters-from.",
        ),
    ]
    load_inplace: OnlyFalse | None = None


class UnloadAdapter(Fields):
    """Body of /v1/unload_lora_adapter, as in vLLM."""

    lora_name: AdapterName


class TokenizeText(Fields):
    """Body of /tokenize: a text."""

    model: Name | None = None
    prompt: Text
    add_special_tokens: Flag = Field(True, description="Prepend the BOS token if the model has one.")


class TokenizeChat(Fields):
    """Body of /tokenize: a conversation, formatted up to the start of the next assistant message."""

    model: Name | None = None
    messages: Messages


class Detokenize(Fields):
    """Body of /detokenize: token ids."""

    model: Name | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_IDS, fail_fast=True), BeforeValidator(_convert_integers)]
