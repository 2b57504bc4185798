"""`octavo generate`: continues one prompt or a file of prompts, with the engine of `octavo serve`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from octavo.bounded_json import JsonError, encodable, parse
from octavo.commands.loading import (
    apply_adapter,
    chosen_scheme,
    end_ids,
    load_model,
    opened,
    read_adapter,
    tokenizer_with,
)
from octavo.config import Config, GenerateOptions, ModelOptions, PromptOptions
from octavo.data.files import name_of, open_bytes, read_whole
from octavo.data.prompt import encode_conversation, encode_prompt
from octavo.data.turns import Message
from octavo.errors import DataError, ModelError, OctavoError, UsageError
from octavo.failures import cut, explained
from octavo.infer.generate import check_prompt
from octavo.infer.loaded_model import LoadedModel, answer, failure_of, until_finished
from octavo.infer.requests import Request, Token
from octavo.infer.sample import Sampling
from octavo.reporting import Report

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def open_model(
    config: Config, report: Report, *, before: Callable[[PreTrainedTokenizerFast], None] | None = None
) -> LoadedModel:
    """The model of a configuration, with --adapter applied. `before` is called before weights are loaded."""
    model_options, options = config[ModelOptions], config[GenerateOptions]
    hardware, source = opened(model_options, report, own_adapters=options.adapter is None)
    # Before the weights, so that its errors are reported at once.
    allow_pickle = model_options.allow_pickle
    named = options.adapter and read_adapter(options.adapter, source, report, allow_pickle=allow_pickle)
    folder, adapter = named or (None, None)
    tokenizer, stop_ids = tokenizer_with(adapter, folder, source, report), end_ids(source)
    if before:
        before(tokenizer)
    model = load_model(source, chosen_scheme(model_options, source), hardware, report)
    if adapter is not None:
        apply_adapter(model, adapter, report)
    return LoadedModel(model, tokenizer, stop_ids)


def sampling_of(options: GenerateOptions) -> Sampling:
    """The sampling parameters of GenerateOptions."""
    return Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        repetition_penalty=options.repetition_penalty,
        max_new_tokens=options.max_new_tokens,
        stop=tuple(options.stop),
        seed=options.seed,
    )


def prompt_ids(text: str, tokenizer: PreTrainedTokenizerFast, *, chat: bool) -> list[int]:
    """The token ids of a prompt: encoded as training text, or with `chat` as a user message of the chat template.

    UsageError for a prompt with a lone surrogate, which tokenizers do not encode.
    """
    if not encodable(text):
        raise UsageError("The prompt is not Unicode text: it has a lone surrogate.", hint="Decode it from UTF-8.")
    return encode_conversation([Message("user", text)], tokenizer) if chat else encode_prompt(text, tokenizer)


def generate_text(config: Config, report: Report, *, write: Callable[[str], None]) -> dict[str, Any]:
    """Continues the prompt; `write` gets the text token by token, then a newline."""
    options, sampling = config[PromptOptions], sampling_of(config[GenerateOptions])
    prompt = options.prompt
    assert prompt is not None
    ids: list[int] = []

    def encode(tokenizer: PreTrainedTokenizerFast) -> None:
        ids.extend(prompt_ids(prompt, tokenizer, chat=options.chat))
        check_prompt(ids, max_len=len(ids) + 1)

    loaded = open_model(config, report, before=encode)
    document = continuation(loaded, ids, sampling, write=write)
    write("\n")
    if _ended_by_context(document, sampling):
        report.say(
            f"The text ends where the model's context of {loaded.model.config.context:,} tokens does, before "
            f"--max-new-tokens {sampling.max_new_tokens:,}: the prompt has {len(ids):,} tokens."
        )
    return document


def _ended_by_context(document: Mapping[str, Any], sampling: Sampling) -> bool:
    return document["finish_reason"] == "length" and len(document["token_ids"]) < sampling.max_new_tokens


def continuation(
    loaded: LoadedModel, prompt: Sequence[int], sampling: Sampling, *, write: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """The document of one answer to the token ids of a prompt; `write` gets the text token by token."""
    tokens = []
    for token in answer(loaded.engine(max_len=len(prompt) + sampling.max_new_tokens), prompt, sampling):
        tokens.append(token)
        if write:
            write(token.text)
    return _document(tokens)


def generate_many(config: Config, report: Report, *, write: Callable[[str], None]) -> dict[str, Any]:
    """Continues every prompt of a JSONL file as one batch; `write` gets one JSON line a prompt, in the file's order.

    A line is {"prompt": ..}, optionally with max_new_tokens, temperature, top_k, top_p, repetition_penalty, stop or
    seed, which override the options; all other fields are copied to the output. UsageError names an invalid line. If
    the engine fails at a prompt, its output line has the error, and null for text and ids; a ModelError at the end
    counts these.
    """
    options = config[PromptOptions]
    assert options.prompts is not None
    numbered = _read_lines(options.prompts)
    lines = list(numbered.values())
    places = [f"{options.prompts}:{number}" for number in numbered]
    samplings = [
        _line_sampling(config[GenerateOptions], line, place) for line, place in zip(lines, places, strict=True)
    ]
    loaded = open_model(config, report)
    requests = []
    for line, sampling, place in zip(lines, samplings, places, strict=True):
        with _located(place):
            ids = prompt_ids(str(line["prompt"]), loaded.tokenizer, chat=options.chat)
        requests.append(Request(tuple(ids), sampling))
    max_len = max(len(request.prompt) + request.sampling.max_new_tokens for request in requests)
    engine = loaded.engine(max_len=max_len, slots=min(options.slots, len(requests)), queue=len(requests))
    streams = []
    for request, place in zip(requests, places, strict=True):
        with _located(place):
            streams.append(engine.submit(request))
    total = failed = ended = 0
    with report.progress(len(streams), "Generating") as bar:
        for line, request, stream in zip(lines, requests, streams, strict=True):
            tokens = until_finished(engine, stream)
            if tokens[-1].finish_reason == "error":
                failed += 1
                document = _failed(failure_of(stream))
            else:
                total += len(tokens)
                document = _document(tokens)
                ended += _ended_by_context(document, request.sampling)
            write(json.dumps({**line, **document}, ensure_ascii=False) + "\n")
            bar.advance()
    if ended:
        context = loaded.model.config.context
        report.say(
            f"{ended:,} of {len(lines):,} texts end where the model's context of {context:,} tokens does, before their "
            "max_new_tokens."
        )
    if failed:
        raise ModelError(
            f"{failed:,} of {len(lines):,} prompts failed.", hint='The field "error" of their lines has the reason.'
        )
    return {"prompts": len(lines), "generated_tokens": total}


def _document(tokens: Sequence[Token]) -> dict[str, Any]:
    return {
        "text": "".join(token.text for token in tokens),
        "token_ids": [token.token_id for token in tokens],
        "finish_reason": tokens[-1].finish_reason,
    }


def _failed(error: Exception) -> dict[str, Any]:
    reason = explained(error) or error
    message, hint = (reason.message, reason.hint) if isinstance(reason, OctavoError) else (cut(reason), "")
    document = {"type": type(reason).__name__, "message": message, "hint": hint}
    return {"text": None, "token_ids": None, "finish_reason": "error", "error": document}


@contextmanager
def _located(place: str) -> Iterator[None]:
    """Context in which a UsageError gets the file and line of the prompt."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{place}: {error.message}", hint=error.hint) from error


def _read_lines(path: Path) -> dict[int, dict[str, Any]]:
    """The prompts of a file by their 1-based line."""
    try:
        with open_bytes(path) as stream:
            lines = read_whole(stream, name_of(path)).decode("utf-8-sig").split("\n")
    except (DataError, UnicodeDecodeError) as error:
        reason, hint = (error.message, error.hint) if isinstance(error, DataError) else (f"{path}: {error}", "")
        raise UsageError(f"The prompts cannot be read: {reason}", hint=hint) from error
    prompts = {}
    for number, line in enumerate(lines, 1):  # not splitlines, which splits at U+2028 within a JSON string
        if not line.strip():
            continue
        try:
            value = parse(line)
        except JsonError as error:
            raise UsageError(f"{path}:{number} is not JSON ({error}).", hint="Write one JSON object a line.") from error
        if not isinstance(value, dict) or not isinstance(value.get("prompt"), str) or not value["prompt"]:
            raise UsageError(f"{path}:{number} has no prompt.", hint='A line is {"prompt": "Once upon a time"}.')
        prompts[number] = value
    if not prompts:
        raise UsageError(f"{path} has no prompt.", hint='A line is {"prompt": "Once upon a time"}.')
    return prompts


def _line_sampling(options: GenerateOptions, line: Mapping[str, Any], place: str) -> Sampling:
    """The sampling parameters of `options`, overridden by the fields of a line."""
    values = {name: line[name] for name in GenerateOptions.model_fields if name in line and name != "adapter"}
    with _located(place):
        try:
            return sampling_of(GenerateOptions.model_validate({**options.model_dump(), **values}))
        except ValidationError as error:
            first = str(error).splitlines()[1:3]
            raise UsageError(" ".join(part.strip() for part in first)) from error
