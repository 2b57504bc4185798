"""The commands that continue text, on the engine that serves: `octavo generate`, for one prompt or a file of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.adapters import apply_
from octavo.bounded_json import JsonError, parse
from octavo.commands.loading import chosen_scheme, end_ids, load_model, opened, read_adapter, tokenizer_with
from octavo.config import Config, GenerateOptions, ModelOptions, PromptOptions
from octavo.data.documents import Message
from octavo.data.files import name_of, open_bytes, read_whole
from octavo.data.prompt import encode_conversation, encode_prompt
from octavo.errors import DataError, ModelError, OctavoError, UsageError
from octavo.failures import cut, explained
from octavo.infer.engine import Engine
from octavo.infer.generate import check_prompt
from octavo.infer.requests import Limits, Request, Stream, Token
from octavo.infer.sample import Sampling
from octavo.models import Model
from octavo.reporting import Report

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Speaker:
    """A model that is ready to continue text."""

    model: Model
    tokenizer: PreTrainedTokenizerFast
    stop_ids: tuple[int, ...]

    def engine(self, *, max_len: int, slots: int = 1, queue: int = 1) -> Engine:
        """An engine for `slots` requests at a time, each of up to `room` tokens with its answer."""
        limits = Limits(slots=slots, max_len=max_len, queue=queue)
        return Engine(self.model, self.tokenizer, base="model", limits=limits, stop_ids=self.stop_ids)


def open_speaker(
    config: Config, report: Report, *, before: Callable[[PreTrainedTokenizerFast], None] | None = None
) -> Speaker:
    """The model of a configuration, its adapter on it if one is named. `before` is called before weights are loaded."""
    asked, options = config[ModelOptions], config[GenerateOptions]
    hardware, source = opened(asked, report, own_adapters=options.adapter is None)
    found = None
    if options.adapter is not None:  # before the weights: what is wrong with it shows at once
        found = read_adapter(options.adapter, source, report, allow_pickle=asked.allow_pickle)
    tokenizer, stop_ids = tokenizer_with(found, options.adapter, source, report), end_ids(source)
    if before:
        before(tokenizer)
    model = load_model(source, chosen_scheme(asked, source), hardware, report)
    if found is not None:
        apply_(model, found)
    return Speaker(model, tokenizer, stop_ids)


def answer(engine: Engine, prompt: Sequence[int], sampling: Sampling) -> Generator[Token]:
    """The tokens of one answer as they come; the engine works in this thread. Closing the generator ends the request.

    Raises what the engine failed with.
    """
    stream = engine.submit(Request(tuple(prompt), sampling))
    finished = False
    try:
        while not finished:
            engine.step()
            for token in stream.ready():
                if token.finish_reason == "error":
                    raise failure_of(stream)
                finished = token.finish_reason is not None
                yield token
    finally:
        if not finished:
            stream.cancel()
            engine.step()  # which drops it


def failure_of(stream: Stream) -> Exception:
    """What the engine failed with for a request, as it was raised."""
    return stream.failure or ModelError(stream.error or "The engine failed.")


def sampling_of(options: GenerateOptions) -> Sampling:
    """The rules of a generate command."""
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
    """The token ids of a prompt: as text goes into training, or as a user's message of the chat template."""
    return encode_conversation([Message("user", text)], tokenizer) if chat else encode_prompt(text, tokenizer)


def generate_text(config: Config, report: Report, *, write: Callable[[str], None]) -> dict[str, Any]:
    """Continues the prompt; `write` gets the text as it comes."""
    options, sampling = config[PromptOptions], sampling_of(config[GenerateOptions])
    prompt = options.prompt
    assert prompt is not None
    ids: list[int] = []

    def encode(tokenizer: PreTrainedTokenizerFast) -> None:
        ids.extend(prompt_ids(prompt, tokenizer, chat=options.chat))
        check_prompt(ids, max_len=len(ids) + 1)

    speaker = open_speaker(config, report, before=encode)
    tokens = []
    for token in answer(speaker.engine(max_len=len(ids) + sampling.max_new_tokens), ids, sampling):
        tokens.append(token)
        write(token.text)
    return _document(tokens)


def generate_many(config: Config, report: Report, *, write: Callable[[str], None]) -> dict[str, Any]:
    """Continues every prompt of a JSONL file, many at once; `write` gets a JSON line for each, in the file's order.

    A line is {"prompt": ..} with max_new_tokens, temperature, top_k, top_p, repetition_penalty, stop or seed where
    they differ from the command's; whatever else it holds is handed on. UsageError names a line that is wrong. A
    prompt that the engine fails at gets a line too, with the error, and null for text and ids; ModelError at the end
    counts them.
    """
    options = config[PromptOptions]
    assert options.prompts is not None
    lines = _read_lines(options.prompts)
    speaker = open_speaker(config, report)
    requests = []
    for number, line in enumerate(lines, 1):
        own = _own_options(config[GenerateOptions], line, f"{options.prompts}:{number}")
        ids = prompt_ids(str(line["prompt"]), speaker.tokenizer, chat=options.chat)
        requests.append(Request(tuple(ids), sampling_of(own)))
    max_len = max(len(request.prompt) + request.sampling.max_new_tokens for request in requests)
    engine = speaker.engine(max_len=max_len, slots=min(options.slots, len(requests)), queue=len(requests))
    streams = [engine.submit(request) for request in requests]
    total = failed = 0
    with report.progress(len(streams), "Continuing") as bar:
        for line, stream in zip(lines, streams, strict=True):
            tokens = until_finished(engine, stream)
            if tokens[-1].finish_reason == "error":
                failed += 1
                document = _failed(failure_of(stream))
            else:
                total += len(tokens)
                document = _document(tokens)
            write(json.dumps({**line, **document}, ensure_ascii=False) + "\n")
            bar.advance()
    if failed:
        raise ModelError(
            f"{failed:,} of {len(lines):,} prompts failed.", hint='Their lines have the reason under "error".'
        )
    return {"prompts": len(lines), "generated_tokens": total}


def until_finished(engine: Engine, stream: Stream) -> list[Token]:
    """All tokens of a stream, the engine working for all others meanwhile."""
    tokens: list[Token] = list(stream.ready())
    while not tokens or tokens[-1].finish_reason is None:
        engine.step()
        tokens += stream.ready()
    return tokens


def _document(tokens: Sequence[Token]) -> dict[str, Any]:
    return {
        "text": "".join(token.text for token in tokens),
        "token_ids": [token.token_id for token in tokens],
        "finish_reason": tokens[-1].finish_reason,
    }


def _failed(error: Exception) -> dict[str, Any]:
    known = explained(error) or error
    message, hint = (known.message, known.hint) if isinstance(known, OctavoError) else (cut(known), "")
    told = {"type": type(known).__name__, "message": message, "hint": hint}
    return {"text": None, "token_ids": None, "finish_reason": "error", "error": told}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        with open_bytes(path) as stream:
            lines = read_whole(stream, name_of(path)).decode("utf-8-sig").splitlines()
    except (DataError, UnicodeDecodeError) as error:
        reason, hint = (error.message, error.hint) if isinstance(error, DataError) else (f"{path}: {error}", "")
        raise UsageError(f"The prompts are not read: {reason}", hint=hint) from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = parse(line)
        except JsonError as error:
            raise UsageError(f"{path}:{number} is not JSON ({error}).", hint="Write one JSON object a line.") from error
        if not isinstance(value, dict) or not isinstance(value.get("prompt"), str) or not value["prompt"]:
            raise UsageError(f"{path}:{number} has no prompt.", hint='A line is {"prompt": "Once upon a time"}.')
        found.append(value)
    if not found:
        raise UsageError(f"{path} holds no prompt.", hint='A line is {"prompt": "Once upon a time"}.')
    return found


def _own_options(options: GenerateOptions, line: Mapping[str, Any], where: str) -> GenerateOptions:
    """The command's options with what a line says differently."""
    own = {name: line[name] for name in GenerateOptions.model_fields if name in line and name != "adapter"}
    try:
        return GenerateOptions.model_validate({**options.model_dump(), **own})
    except ValueError as error:
        first = str(error).splitlines()[1:3]
        raise UsageError(f"{where}: {' '.join(part.strip() for part in first)}") from error
