"""POST /prompt/: the legacy route of the service in the article on hivemind/gpt-j-6B-8bit, for its existing clients."""

from __future__ import annotations

from secrets import randbelow

from fastapi import APIRouter, Request, Response

from octavo.infer import requests
from octavo.infer.sample import Sampling
from octavo.server.errors import bad_request
from octavo.server.requests import SEED_LIMIT, ArticleRequest
from octavo.server.responses import ERROR_RESPONSES, ArticleAnswer
from octavo.server.service import Service


def router(service: Service) -> APIRouter:
    """The route /prompt/, with and without the trailing slash."""
    routes = APIRouter()

    @routes.post("/prompt", response_model=ArticleAnswer, include_in_schema=False)
    @routes.post("/prompt/", response_model=ArticleAnswer, responses=ERROR_RESPONSES, tags=["legacy"])
    async def prompt(body: ArticleRequest, request: Request, response: Response) -> ArticleAnswer:
        """Returns the text and its continuation. `length` is the number of tokens of both together."""
        service.check_fields(body, request.url.path)
        served = service.named(None)
        if (body.model_extra or {}).get("model") not in (None, served.name):
            message = f"This route always uses {served.name}. Use /v1/completions to choose a `model`."
            raise bad_request(message, param="model")
        ids = await service.encode_text(body.input, param="input")
        service.check_prompt(ids, param="input")
        length = int(body.length)
        if length <= len(ids):
            raise bad_request(
                f"`length` is {length}, but it includes the prompt, which has {len(ids)} tokens. Increase `length`.",
                param="length",
            )
        sampling = Sampling(
            temperature=float(body.temperature),
            top_p=1.0,
            max_new_tokens=service.new_tokens(length - len(ids), 0, param="length"),
            seed=randbelow(SEED_LIMIT),
        )
        engine_request = requests.Request(tuple(ids), sampling, served.adapter)
        output = body.input
        with service.begin([engine_request], request.receive) as generation:
            async for _, token in generation.tokens():
                output += token.text
        response.headers["X-System-Fingerprint"] = generation.fingerprint  # the clients accept one field only
        return ArticleAnswer(output=output)

    return routes
