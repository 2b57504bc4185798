"""Response models in OpenAI's format. FastAPI derives the OpenAPI schema from them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

FinishReason = Literal["stop", "length"]
Fingerprint = Annotated[str, Field(description="The sha256 of the adapter's tensors, or of the base's files.")]


class Usage(BaseModel):
    """Token counts. The EOS token is included."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """Logprob (natural logarithm) and top logprobs of each token; null for the first token of the prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int] = Field(description="Character offset of each token in `text`.")


class CompletionChoice(BaseModel):
    """One completion, or a chunk of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


class Completion(BaseModel):
    """Response of /v1/completions, or one chunk of the stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: Fingerprint
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    """A candidate token at a position."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """The generated token at a position."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Logprobs of a message."""

    content: list[ChatLogprob]
    refusal: None = None


class AnswerMessage(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One generated message."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason


class Chat(BaseModel):
    """Response of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: Fingerprint
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(BaseModel):
    """The base model, or an adapter, whose `parent` is the base model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["octavo"] = "octavo"
    parent: str | None = None
    attached: dict[str, int] | None = Field(None, description="Number of an adapter's modules by last name.")
    system_fingerprint: Fingerprint
    max_model_len: int = Field(description="Maximum number of prompt and generated tokens together.")


class ModelList(BaseModel):
    """All served models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ArticleAnswer(BaseModel):
    """The prompt and its continuation as one text."""

    output: str


class Tokens(BaseModel):
    """Token ids of a text or a conversation."""

    tokens: list[int]
    count: int
    max_model_len: int
    system_fingerprint: Fingerprint


class Text(BaseModel):
    """Decoded text."""

    prompt: str


class Version(BaseModel):
    """The version of octavo."""

    version: str


class Index(BaseModel):
    """Version, models and routes of the server."""

    name: Literal["octavo"] = "octavo"
    version: str
    models: list[str]
    routes: list[str]


class State(BaseModel):
    """Status of the server."""

    status: Literal["ok"] = "ok"


class Refusal(BaseModel):
    """Details of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class RefusalAnswer(BaseModel):
    """An error in OpenAI's format."""

    error: Refusal


# Error responses of every route, for FastAPI's `responses` argument.
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": RefusalAnswer, "description": "The request is invalid, or there are too many."},
    "5XX": {"model": RefusalAnswer, "description": "The server cannot handle the request."},
}
# The same for routes that return plain text: with `model` FastAPI would declare the errors as plain text too.
_ERROR_CONTENT = {"application/json": {"schema": {"$ref": "#/components/schemas/RefusalAnswer"}}}
TEXT_ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"content": _ERROR_CONTENT, "description": response["description"]}
    for status, response in ERROR_RESPONSES.items()
}
_EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string", "description": "A chunk of the response as JSON; [DONE] at the end."}},
}
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"text/event-stream": {"itemSchema": _EVENT}},
        "description": "The whole response, or with `stream` its chunks as server-sent events, then [DONE].",
    },
    **ERROR_RESPONSES,
}
