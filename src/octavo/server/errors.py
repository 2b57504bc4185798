"""Error responses in OpenAI's format, and the exception handlers that produce them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from octavo.bounded_json import shortened
from octavo.errors import OctavoError
from octavo.server.requests import UNSUPPORTED

# Value of Retry-After. A generation takes a few seconds, so a slot is likely to be free by then.
RETRY_SECONDS = 2


class ApiError(Exception):
    """Ends a request with an HTTP status and an error in OpenAI's format. `param` names the invalid field."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @property
    def document(self) -> dict[str, Any]:
        error_type = "server_error" if self.status >= 500 else ERROR_TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": error_type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.document, self.status, self.headers)


ADAPTER_PATHS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")  # routes only with --adapters-from
UNREADABLE = "There was an error parsing the body"  # FastAPI's message for every exception of json.loads
ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
TOO_SHORT = ("string_too_short", "too_short")  # pydantic's types of errors


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request is invalid."""
    return ApiError(400, message, param=param, code=code)


def overloaded(message: str) -> ApiError:
    """429: too many requests at once."""
    return ApiError(429, message, code="overloaded", headers={"Retry-After": str(RETRY_SECONDS)})


def unavailable(message: str, *, code: str) -> ApiError:
    """503: the server cannot handle the request now; the client may retry."""
    return ApiError(503, message, code=code, headers={"Retry-After": str(RETRY_SECONDS)})


def one_line(error: OctavoError) -> str:
    """Message and hint of an octavo error on one line."""
    return " ".join(part for part in (error.message, error.hint) if part)


def install(app: FastAPI) -> None:
    """Registers exception handlers that return every error in OpenAI's format."""

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def validation_error(_: Request, error: RequestValidationError) -> JSONResponse:
        return _invalid(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        phrase = HTTPStatus(error.status_code).phrase
        message = str(error.detail) or phrase
        if message == UNREADABLE:
            message = "The body is not UTF-8, or its JSON is nested too deeply or has a number with too many digits."
        if message == phrase and error.status_code in (404, 405):
            message = f"There is no route {request.method} {shortened(request.url.path)}. GET / lists the routes."
            if error.status_code == 404 and request.url.path in ADAPTER_PATHS:
                message = "This server loads no adapters at runtime. Start it with --adapters-from FOLDER."
        return ApiError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def unexpected_error(_: Request, error: Exception) -> JSONResponse:
        # uvicorn logs the exception. The response does not contain internal details.
        return ApiError(500, "The server failed to answer this request.", code="internal_error").response()


def _invalid(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """The error for the first invalid field, with all its messages: a union field fails once for each member."""
    if any(problem["type"] == "json_invalid" for problem in problems):
        return bad_request("The body is not valid JSON.", code="invalid_json")
    names = [_field_name(problem["loc"]) for problem in problems]
    # A body that is a union (/tokenize) also fails as the other member, whose fields are missing: skip those.
    name = next((name for name, problem in zip(names, problems, strict=True) if problem["type"] != "missing"), names[0])
    if name in UNSUPPORTED:
        message = f"`{name}` is not supported. {UNSUPPORTED[name]}"
        return bad_request(message, param=name, code="unsupported_parameter")
    first = next(problem for problem, field in zip(problems, names, strict=True) if field == name)
    if first["type"] == "unsupported":
        return bad_request(f"`{_field_path(first['loc'])}`: {first['msg']}.", param=name, code="unsupported_parameter")
    # A union field fails once for each member: that it is empty is the reason, not that it is no list.
    own = [problem for problem, field in zip(problems, names, strict=True) if field == name]
    if any(problem["type"] in TOO_SHORT and problem["input"] in ("", []) for problem in own):
        path = _field_path(first["loc"]) if name == "messages" else name
        more = ": give at least one character or token to continue" if name == "prompt" else ""
        return bad_request(f"`{path}` is empty{more}.", param=name)
    messages = dict.fromkeys(str(problem["msg"]) for problem in own)
    reasons = "; ".join(list(messages)[:4])
    if not name:
        return bad_request("The body must be a JSON object, sent as `Content-Type: application/json`.")
    return bad_request(f"`{_field_path(first['loc']) if name == 'messages' else name}`: {reasons}.", param=name)


def _field_name(loc: Sequence[str | int]) -> str:
    """The top-level field of a pydantic error location; "" for the body itself.

    Capitalized parts are the class names of union members, not fields.
    """
    parts = [part for part in loc[1:] if not (isinstance(part, str) and part[:1].isupper())]
    return str(parts[0]) if parts and isinstance(parts[0], str) else ""


def _field_path(loc: Sequence[str | int]) -> str:
    """The path of a pydantic error location, for example messages[0].content."""
    parts = [part for part in loc[1:] if not (isinstance(part, str) and part[:1].isupper())]
    return str(parts[0]) + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts[1:])
