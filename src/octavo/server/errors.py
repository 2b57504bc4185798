"""Everything a client can get instead of an answer, in the shape of OpenAI's errors."""

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

# Seconds after which an overloaded server is worth asking again. Answers take seconds, so that slots free up as fast.
RETRY_SECONDS = 2


class ApiError(Exception):
    """Ends a request with a status and OpenAI's error document; `param` names the field at fault."""

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
        kind = "server_error" if self.status >= 500 else KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.document, self.status, self.headers)


UNREADABLE = "There was an error parsing the body"  # FastAPI's word for whatever json.loads raised
KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def wrong(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request itself is at fault."""
    return ApiError(400, message, param=param, code=code)


def busy(message: str) -> ApiError:
    """429: there are too many requests just now."""
    return ApiError(429, message, code="overloaded", headers={"Retry-After": str(RETRY_SECONDS)})


def unavailable(message: str, *, code: str) -> ApiError:
    """503: this server cannot answer now; it or another one can later."""
    return ApiError(503, message, code=code, headers={"Retry-After": str(RETRY_SECONDS)})


def told(error: OctavoError) -> str:
    """An error of octavo's as one line."""
    return " ".join(part for part in (error.message, error.hint) if part)


def install(app: FastAPI) -> None:
    """Gives all of the app's errors OpenAI's shape: ours, validation's, the router's, and unforeseen ones."""

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return _invalid(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        phrase = HTTPStatus(error.status_code).phrase
        message = str(error.detail) or phrase
        if message == UNREADABLE:
            message = "The body is not read: it is no UTF-8, or its JSON is nested too deep or holds too long a number."
        if message == phrase and error.status_code in (404, 405):
            message = f"There is no {request.method} {shortened(request.url.path)} here. GET /docs lists the routes."
        return ApiError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def unforeseen(_: Request, error: Exception) -> JSONResponse:
        # What it was is logged by the server; a client learns nothing of the inside.
        return ApiError(500, "The server failed to answer this request.", code="internal_error").response()


def _invalid(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first field at fault, with all that was said about it: a field of several forms fails once for each."""
    if any(problem["type"] == "json_invalid" for problem in problems):
        return wrong("The body is not valid JSON.", code="invalid_json")
    names = [_name(problem["loc"]) for problem in problems]
    # Of a body of several forms, the one that lacks a field is not the one that was meant.
    name = next((name for name, problem in zip(names, problems, strict=True) if problem["type"] != "missing"), names[0])
    if name in UNSUPPORTED:
        return wrong(f"`{name}` is not supported here. {UNSUPPORTED[name]}", param=name, code="unsupported_parameter")
    first = next(problem for problem, own in zip(problems, names, strict=True) if own == name)
    if first["type"] == "unsupported":
        return wrong(f"`{_place(first['loc'])}`: {first['msg']}.", param=name, code="unsupported_parameter")
    said = dict.fromkeys(str(problem["msg"]) for problem, own in zip(problems, names, strict=True) if own == name)
    what = "; ".join(list(said)[:4])
    if not name:
        return wrong("The body must be a JSON object, sent as `Content-Type: application/json`.")
    return wrong(f"`{_place(first['loc']) if name == 'messages' else name}`: {what}.", param=name)


def _name(place: Sequence[str | int]) -> str:
    """The top field that a place in the body belongs to; "" for the body itself. Forms have names like classes."""
    parts = [part for part in place[1:] if not (isinstance(part, str) and part[:1].isupper())]
    return str(parts[0]) if parts and isinstance(parts[0], str) else ""


def _place(place: Sequence[str | int]) -> str:
    """The whole way to a place in the body, as in messages[0]."""
    parts = [part for part in place[1:] if not (isinstance(part, str) and part[:1].isupper())]
    return str(parts[0]) + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts[1:])
