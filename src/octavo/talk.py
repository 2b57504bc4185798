"""`octavo chat`: a conversation in the terminal, through the model's own chat template."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from octavo.config import ChatOptions, Config, GenerateOptions
from octavo.data.documents import Message
from octavo.data.prompt import encode_conversation
from octavo.infer.sample import Sampling
from octavo.report import Report
from octavo.speak import Speaker, answer, open_speaker, sampling_of

# Tokens that a conversation's cache has room for at first; it doubles, up to the model's context. At a context of
# 131,072 a cache for all of it would take more memory than the model.
FIRST_ROOM = 2048


def talk(config: Config, report: Report, *, read: Callable[[], str | None], write: Callable[[str], None]) -> None:
    """Reads a line, streams the answer, and so on until `read` gives None or /quit.

    /reset forgets the conversation but for the system message, /system gives another one and begins anew, /save FILE
    writes the conversation as a line of JSON that `octavo finetune --data` reads. What was read of a conversation
    stays in the engine's cache: a turn costs its own tokens. A conversation that outgrows the model's context loses
    its oldest turns, and says so.
    """
    speaker = open_speaker(config, report)
    sampling = sampling_of(config[GenerateOptions])
    engine = speaker.engine(room=FIRST_ROOM)
    system = config[ChatOptions].system
    opening = [Message("system", system)] if system else []
    messages = list(opening)
    report.say("Say something. /reset begins anew, /system TEXT too, /save FILE keeps it, /quit leaves.")
    while (line := read()) is not None and line.strip() != "/quit":
        command, _, rest = line.strip().partition(" ")
        if command in ("/reset", "/system"):
            if command == "/system":
                opening = [Message("system", rest.strip())] if rest.strip() else []
            messages = list(opening)
        elif command == "/save":
            _save(messages, rest.strip(), report)
        elif command:
            messages.append(Message("user", line))
            ids = _fitting(messages, len(opening), speaker, sampling, report)
            if not ids:
                continue
            if len(ids) + sampling.max_new_tokens > engine.context < speaker.model.config.context:
                engine = speaker.engine(room=max(2 * engine.context, len(ids) + sampling.max_new_tokens))
            said = ""
            for token in answer(engine, ids, sampling):
                write(token.text)
                said += token.text
            write("\n")
            messages.append(Message("assistant", said))


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
    room = max(context - sampling.max_new_tokens, context // 2)
    while len(ids := encode_conversation(messages, speaker.tokenizer)) > room:
        if len(messages) <= opening + 1:
            report.warn(f"This message is longer than the {room:,} tokens that there is room for: it is left out.")
            messages.pop()
            return []
        del messages[opening : opening + 2]
        report.warn("The conversation outgrew the model's context: its oldest turn is forgotten.")
    return ids
