"""`octavo chat`: a conversation in the terminal, through the model's own chat template."""

from __future__ import annotations

from collections.abc import Callable

from octavo.config import ChatOptions, Config, GenerateOptions
from octavo.data.documents import Message
from octavo.data.prompt import encode_conversation
from octavo.infer.sample import Sampling
from octavo.report import Report
from octavo.run import Speaker, open_speaker, sampling_of


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
        ids = _fitting(messages, len(opening), speaker, sampling, report)
        if not ids:
            continue
        answer = ""
        for piece in speaker.stream(ids, sampling):
            write(piece.text)
            answer += piece.text
        write("\n")
        messages.append(Message("assistant", answer))


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
