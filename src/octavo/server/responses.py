"""What clients get: the answers' half of the OpenAPI schema, in OpenAI's shapes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

FinishReason = Literal["stop", "length"]
Fingerprint = Annotated[str, Field(description="The sha256 of the adapter's tensors, or of the base's files.")]


class Usage(BaseModel):
    """Tokens read and written; an end token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """For each token its natural log-probability and the likeliest ones in its place; the first of all has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int] = Field(description="The character of `text` that each token begins at.")


class CompletionChoice(BaseModel):
    """One continuation, or a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


class Completion(BaseModel):
    """The answer of /v1/completions, whole or in pieces."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: Fingerprint
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    """A token that could have stood there."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """A token that stands there."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """The tokens of a message."""

    content: list[ChatLogprob]
    refusal: None = None


class AnswerMessage(BaseModel):
    """The assistant's turn."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason


class Chat(BaseModel):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: Fingerprint
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(BaseModel):
    """The base, or an adapter (its `parent` is the base)."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["octavo"] = "octavo"
    parent: str | None = None
    system_fingerprint: Fingerprint
    max_model_len: int = Field(description="Tokens of a prompt and its answer together.")


class ModelList(BaseModel):
    """All names that `model` can have."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ArticleAnswer(BaseModel):
    """The prompt and its continuation as one text."""

    output: str


class Tokens(BaseModel):
    """The ids of a text or a conversation."""

    tokens: list[int]
    count: int
    max_model_len: int
    system_fingerprint: Fingerprint


class Text(BaseModel):
    """The text that token ids stand for."""

    prompt: str


class Version(BaseModel):
    """Which octavo this is."""

    version: str


class Index(BaseModel):
    """What is here."""

    name: Literal["octavo"] = "octavo"
    version: str
    models: list[str]
    routes: list[str]


class State(BaseModel):
    """Whether the server runs."""

    status: Literal["ok"] = "ok"


class Refusal(BaseModel):
    """Why there is no answer."""

    message: str
    type: str
    param: str | None
    code: str | None


class RefusalAnswer(BaseModel):
    """OpenAI's shape of errors."""

    error: Refusal


# What every route may answer instead, as FastAPI takes it.
REFUSALS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": RefusalAnswer, "description": "The request is at fault, or one too many."},
    "5XX": {"model": RefusalAnswer, "description": "The server cannot answer."},
}
# The same where an answer is plain text: beside `model` FastAPI would say that refusals are too.
_REFUSAL = {"application/json": {"schema": {"$ref": "#/components/schemas/RefusalAnswer"}}}
TEXT_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"content": _REFUSAL, "description": answer["description"]} for status, answer in REFUSALS.items()
}
_EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string", "description": "A piece of the answer as JSON; at the end [DONE]."}},
}
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"text/event-stream": {"itemSchema": _EVENT}},
        "description": "The whole answer, or with `stream` its pieces as server-sent events, then [DONE].",
    },
    **REFUSALS,
}
