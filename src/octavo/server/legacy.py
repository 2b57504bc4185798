"""POST /prompt/: the service of the article that octavo goes back to, as the clients of that service ask for it."""

from __future__ import annotations

from secrets import randbelow

from fastapi import APIRouter, Request, Response

from octavo.infer import requests
from octavo.infer.sample import Sampling
from octavo.server.errors import wrong
from octavo.server.requests import SEEDS, ArticleRequest
from octavo.server.responses import REFUSALS, ArticleAnswer
from octavo.server.service import Service


def router(service: Service) -> APIRouter:
    """The route, with and without the slash at its end."""
    routes = APIRouter()

    @routes.post("/prompt", response_model=ArticleAnswer, include_in_schema=False)
    @routes.post("/prompt/", response_model=ArticleAnswer, responses=REFUSALS, tags=["the article"])
    async def prompt(asked: ArticleRequest, request: Request, response: Response) -> ArticleAnswer:
        """The text and its continuation; `length` counts the tokens of both."""
        service.check_fields(asked, request.url.path)
        served = service.named(None)
        if (asked.model_extra or {}).get("model") not in (None, served.name):
            raise wrong(f"`model` cannot be chosen here: {served.name} answers. Ask /v1/completions.", param="model")
        ids = await service.encode_text(asked.input, param="input")
        service.check_prompt(ids, param="input")
        length = int(asked.length)
        if length <= len(ids):
            raise wrong(
                f"`length` is {length} and counts the prompt too, which has {len(ids)} tokens: ask for more.",
                param="length",
            )
        sampling = Sampling(
            temperature=float(asked.temperature),
            top_p=1.0,
            max_new_tokens=service.new_tokens(length - len(ids), 0, param="length"),
            seed=randbelow(SEEDS),
        )
        wanted = requests.Request(tuple(ids), sampling, served.adapter)
        output = asked.input
        with service.begin([wanted], request.receive) as generation:
            async for _, token in generation.tokens():
                output += token.text
        response.headers["X-System-Fingerprint"] = generation.fingerprint  # the clients expect one field and no more
        return ArticleAnswer(output=output)

    return routes
