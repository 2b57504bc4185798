"""`octavo chat`: a conversation in the terminal, formatted with the chat template of the model."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.commands.generate import open_model, sampling_of
from octavo.config import ChatOptions, Config, GenerateOptions
from octavo.data.prompt import encode_conversation
from octavo.data.turns import Message
from octavo.errors import UsageError
from octavo.failures import cut, explained
from octavo.infer.loaded_model import LoadedModel, answer
from octavo.infer.requests import Token
from octavo.infer.sample import Sampling
from octavo.reporting import Report
from octavo.stopping import handled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Initial max_len of the KV cache, in tokens; it doubles, up to the model's context. A cache for a whole context of
# 131,072 tokens would take more memory than the model.
INITIAL_MAX_LEN = 2048


COMMANDS = {
    "/reset": "start a new conversation",
    "/system TEXT": "start a new conversation with another system message",
    "/save FILE": "append the conversation to a JSONL file",
    "/help": "list the commands",
    "/quit": "quit",
}


def talk(config: Config, report: Report, *, read: Callable[[], str | None], write: Callable[[str], None]) -> int:
    """Reads a line, streams the answer, and repeats until `read` returns None or /quit. Returns the failed answers.

    /reset removes all messages except the system message, /system replaces the system message and starts anew, /save
    FILE appends the conversation as a line of JSON that `octavo finetune --data` reads. The keys and values of earlier
    turns stay in the cache, so a turn computes only its new tokens. If a conversation exceeds the model's context, its
    oldest turns are removed with a warning. Any other line that starts with / is an error; // escapes a leading /.

    Ctrl-C stops the current answer; its text so far stays in the conversation. If the engine fails at an answer, the
    error is reported, the question is removed, and the conversation continues.
    """
    loaded = open_model(config, report, before=_check_template)
    sampling = sampling_of(config[GenerateOptions])
    engine = loaded.engine(max_len=INITIAL_MAX_LEN)
    system = config[ChatOptions].system
    opening = [Message("system", system)] if system else []
    messages = list(opening)
    failed = 0
    report.say("Type a message. /help lists the commands; Ctrl-C stops an answer.")
    while (line := read()) is not None and line.strip() != "/quit":
        command, _, rest = line.strip().partition(" ")
        if command in ("/reset", "/system"):
            if command == "/system":
                opening = [Message("system", rest.strip())] if rest.strip() else []
            messages = list(opening)
        elif command == "/save":
            _save(messages, rest.strip(), report)
        elif command == "/help":
            _help(report)
        elif command.startswith("/") and not command.startswith("//"):
            report.warn(f"Unknown command {cut(command, 40)}. Start with // for a message that begins with a /.")
            _help(report)
        elif command:
            messages.append(Message("user", line.lstrip()[1:] if command.startswith("//") else line))
            ids = _fitting(messages, len(opening), loaded, sampling, report)
            if not ids:
                continue
            if len(ids) + sampling.max_new_tokens > engine.context < loaded.model.config.context:
                engine = loaded.engine(max_len=max(2 * engine.context, len(ids) + sampling.max_new_tokens))
            try:
                text = _streamed(answer(engine, ids, sampling), write)
            except Exception as error:
                if (explanation := explained(error)) is None or isinstance(error, OSError):
                    raise
                failed += 1
                report.warn(f"The answer failed: {explanation}")
                messages.pop()
                continue
            messages.append(Message("assistant", text))
    return failed


def _check_template(tokenizer: PreTrainedTokenizerFast) -> None:
    """UsageError for a model that was not tuned for chat, before its weights are loaded."""
    if not tokenizer.chat_template:
        raise UsageError(
            "The model's tokenizer has no chat template, so it cannot chat.",
            hint="Use a model that was tuned for chat (often named -Instruct), or continue a text with "
            "`octavo generate`.",
        )


def _streamed(tokens: Generator[Token], write: Callable[[str], None]) -> str:
    """Writes an answer token by token and returns it; Ctrl-C stops it."""
    stops: list[int] = []
    text = ""
    with closing(tokens), handled(lambda number, _: stops.append(number), (signal.SIGINT,)):
        for token in tokens:
            write(token.text)
            text += token.text
            if stops:
                break
        write("\n")
    return text


def _help(report: Report) -> None:
    width = max(map(len, COMMANDS))
    report.say("\n".join(f"{command:{width}}  {description}" for command, description in COMMANDS.items()))


def _save(messages: list[Message], name: str, report: Report) -> None:
    """Appends the conversation to a JSONL file."""
    if not name or not messages:
        report.warn("Not saved: the conversation is empty." if name else "Not saved: name a file, /save FILE.")
        return
    line = {"messages": [{"role": message.role, "content": message.content} for message in messages]}
    try:
        with Path(name).expanduser().open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    except OSError as error:
        report.warn(f"{name} cannot be written ({error.strerror}).")
        return
    report.say(f"Saved the conversation to {name}.")


def _fitting(
    messages: list[Message], opening: int, loaded: LoadedModel, sampling: Sampling, report: Report
) -> list[int]:
    """The token ids of a conversation; removes its oldest turns in place until it fits into the context.

    Removes the last message and returns [] if that alone is too long. A question is removed together with its answer:
    chat templates expect alternating roles.
    """
    context = loaded.model.config.context
    max_len = max(context - sampling.max_new_tokens, context // 2)
    while len(ids := encode_conversation(messages, loaded.tokenizer)) > max_len:
        if len(messages) <= opening + 1:
            report.warn(f"This message is longer than the limit of {max_len:,} tokens: it is ignored.")
            messages.pop()
            return []
        del messages[opening : opening + 2]
        report.warn("The conversation exceeds the model's context: its oldest turn is removed.")
    return ids
