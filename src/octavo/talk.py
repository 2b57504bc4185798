"""`octavo chat`: a conversation in the terminal, through the model's own chat template."""

from __future__ import annotations

from collections.abc import Callable

from octavo.config import ChatOptions, Config, GenerateOptions
from octavo.data.documents import Message
from octavo.data.prompt import encode_conversation
from octavo.errors import UsageError
from octavo.report import Report
from octavo.run import open_speaker, sampling_of


def talk(config: Config, report: Report, *, read: Callable[[], str | None], write: Callable[[str], None]) -> None:
    """Reads a line, streams the answer, and so on until `read` gives None or /quit.

    /reset forgets the conversation but for the system message. A conversation that outgrows the model's context
    loses its oldest turns, and says so.
    """
    speaker = open_speaker(config, report)
    sampling = sampling_of(config[GenerateOptions])
    system = config[ChatOptions].system
    opening = [Message("system", system)] if system else []
    messages = list(opening)
    report.say("Say something. /reset begins anew, /quit leaves.")
    while (line := read()) is not None and line.strip() != "/quit":
        if line.strip() == "/reset":
            messages = list(opening)
            continue
        if not line.strip():
            continue
        messages.append(Message("user", line))
        room = speaker.model.config.context - sampling.max_new_tokens
        while len(ids := encode_conversation(messages, speaker.tokenizer)) > room:
            if len(messages) <= len(opening) + 1:
                raise UsageError(f"This message is longer than the {room:,} tokens of the model's context.")
            del messages[len(opening)]
            report.warn("The conversation outgrew the model's context: its oldest turn is forgotten.")
        answer = ""
        for piece in speaker.stream(ids, sampling):
            write(piece.text)
            answer += piece.text
        write("\n")
        messages.append(Message("assistant", answer))
