"""`octavo chat`: a conversation in the terminal, through the model's own chat template."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path

from octavo.commands.generate import Speaker, answer, open_speaker, sampling_of
from octavo.config import ChatOptions, Config, GenerateOptions
from octavo.data.documents import Message
from octavo.data.prompt import encode_conversation
from octavo.failures import cut, explained
from octavo.infer.requests import Token
from octavo.infer.sample import Sampling
from octavo.reporting import Report
from octavo.stopping import handled

# Tokens that a conversation's cache has room for at first; it doubles, up to the model's context. At a context of
# 131,072 a cache for all of it would take more memory than the model.
FIRST_ROOM = 2048


COMMANDS = {
    "/reset": "begins anew",
    "/system TEXT": "begins anew with another system message",
    "/save FILE": "adds the conversation to a JSONL file",
    "/help": "lists the commands",
    "/quit": "leaves",
}


def talk(config: Config, report: Report, *, read: Callable[[], str | None], write: Callable[[str], None]) -> int:
    """Reads a line, streams the answer, and so on until `read` gives None or /quit.

    /reset forgets the conversation but for the system message, /system gives another one and begins anew, /save FILE
    writes the conversation as a line of JSON that `octavo finetune --data` reads. What was read of a conversation
    stays in the engine's cache: a turn costs its own tokens. A conversation that outgrows the model's context loses
    its oldest turns, and says so. A line that begins with another / is refused; // stands for a message's own /.

    Ctrl-C stops the answer that is being written, which stays in the conversation as far as it came. An answer that the
    engine fails at is reported and its question forgotten; the conversation goes on. Returns how many failed.
    """
    speaker = open_speaker(config, report)
    sampling = sampling_of(config[GenerateOptions])
    engine = speaker.engine(max_len=FIRST_ROOM)
    system = config[ChatOptions].system
    opening = [Message("system", system)] if system else []
    messages = list(opening)
    failed = 0
    report.say("Say something. /help lists the commands; Ctrl-C stops an answer.")
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
            report.warn(f"There is no command {cut(command, 40)}. Write // for a message that begins with a /.")
            _help(report)
        elif command:
            messages.append(Message("user", line.lstrip()[1:] if command.startswith("//") else line))
            ids = _fitting(messages, len(opening), speaker, sampling, report)
            if not ids:
                continue
            if len(ids) + sampling.max_new_tokens > engine.context < speaker.model.config.context:
                engine = speaker.engine(max_len=max(2 * engine.context, len(ids) + sampling.max_new_tokens))
            try:
                said = _streamed(answer(engine, ids, sampling), write)
            except Exception as error:
                if (known := explained(error)) is None or isinstance(error, OSError):
                    raise
                failed += 1
                report.warn(f"There is no answer: {known}")
                messages.pop()
                continue
            messages.append(Message("assistant", said))
    return failed


def _streamed(tokens: Generator[Token], write: Callable[[str], None]) -> str:
    """Writes an answer as it comes and returns it; Ctrl-C ends it."""
    stops: list[int] = []
    said = ""
    with closing(tokens), handled(lambda number, _: stops.append(number), (signal.SIGINT,)):
        for token in tokens:
            write(token.text)
            said += token.text
            if stops:
                break
        write("\n")
    return said


def _help(report: Report) -> None:
    width = max(map(len, COMMANDS))
    report.say("\n".join(f"{command:{width}}  {what}" for command, what in COMMANDS.items()))


def _save(messages: list[Message], name: str, report: Report) -> None:
    """Adds the conversation to a JSONL file."""
    if not name or not messages:
        report.warn("Nothing is saved: say something first." if name else "Nothing is saved: give a file, /save FILE.")
        return
    line = {"messages": [{"role": message.role, "content": message.content} for message in messages]}
    try:
        with Path(name).expanduser().open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    except OSError as error:
        report.warn(f"{name} cannot be written ({error.strerror}).")
        return
    report.say(f"The conversation is in {name}.")


def _fitting(messages: list[Message], opening: int, speaker: Speaker, sampling: Sampling, report: Report) -> list[int]:
    """The ids of a conversation, cut in place until it fits; none, and its last message gone, if that alone does not.

    A question goes together with its answer: templates expect the two in turn.
    """
    context = speaker.model.config.context
    max_len = max(context - sampling.max_new_tokens, context // 2)
    while len(ids := encode_conversation(messages, speaker.tokenizer)) > max_len:
        if len(messages) <= opening + 1:
            report.warn(f"This message is longer than the {max_len:,} tokens that there is room for: it is left out.")
            messages.pop()
            return []
        del messages[opening : opening + 2]
        report.warn("The conversation outgrew the model's context: its oldest turn is forgotten.")
    return ids
