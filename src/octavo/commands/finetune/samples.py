"""Samples of the model before, during and after training: continuations of text, or answers to held-out questions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from octavo.commands.finetune.state import Run
from octavo.commands.loading import end_ids
from octavo.config import RunOptions
from octavo.data.prompt import encode_conversation, encode_prompt
from octavo.data.records import Document
from octavo.errors import DataError, ModelError, UsageError
from octavo.infer.generate import check_prompt, complete
from octavo.infer.sample import Sampling
from octavo.runs import events

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PROMPT_WORDS = 12  # words of the held-out text that are the default prompt of samples
REFERENCE_WORDS = 60  # that follow them, about as many as --sample-tokens
QUESTIONS = 2  # held-out conversations or pairs that are samples
MAX_CONVERSATIONS = 20  # among which they are searched


def check_prompts(options: RunOptions, tokenizer: PreTrainedTokenizerFast, context: int) -> None:
    """UsageError for a --sample-prompt that the model's context does not hold."""
    for prompt in options.sample_prompt:
        try:
            check_prompt(encode_prompt(prompt, tokenizer), context)
        except UsageError as error:
            short = prompt if len(prompt) <= 40 else f"{prompt[:40]}.."
            raise UsageError(f"--sample-prompt {short!r}: {error.message}", hint=error.hint) from error


@dataclass(frozen=True)
class Prompt:
    """What a sample continues or answers, and how the held-out text does."""

    text: str  # of a conversation: the user's last message
    ids: list[int]
    reference: str = ""
    is_question: bool = False

    @property
    def reference_title(self) -> str:
        """What the reference is, for people."""
        return "Reference answer" if self.is_question else "The held-out text goes on"


def sample(run: Run, *, which: str, step: int) -> None:
    """Continues each prompt, or answers each question; records and prints the text."""
    options = run.config[RunOptions]
    run.micro_step.release()
    sampling = Sampling(temperature=0.7, top_p=0.9, max_new_tokens=options.sample_tokens, seed=0)
    given = [Prompt(text, encode_prompt(text, run.tokenizer)) for text in options.sample_prompt]
    prompts = given or _default_prompts(run, say=step == 0)
    with run.report.progress(len(prompts), f"Samples of the {which} model") as bar:
        texts = []
        for prompt in prompts:
            texts.append(complete(run.model, run.tokenizer, prompt.ids, sampling, stop_ids=end_ids(run.source)).text)
            bar.advance()
    for prompt, text in zip(prompts, texts, strict=True):
        events.Sample(step, prompt.text, text, which, prompt.reference).write(run.report)
        reference = f"\n{prompt.reference_title}:\n{prompt.reference}\n" if prompt.reference else ""
        run.report.say(f"\nSample of the {which} model for {prompt.text!r}:\n{text}\n{reference}")


def _default_prompts(run: Run, *, say: bool) -> list[Prompt]:
    """Questions of held-out conversations, prompts of held-out pairs, or the beginning of a held-out text."""
    documents = (run.test or run.train).documents
    if documents[0].messages:
        return _questions(run, documents, say=say)
    count = QUESTIONS if documents[0].completion is not None else 1
    return [prompt for one in documents[:count] if (prompt := _beginning(run, one, say=say))]


def _questions(run: Run, documents: Sequence[Document], *, say: bool) -> list[Prompt]:
    """The first QUESTIONS conversations up to their last trained answer, which is the reference, by the chat template.

    A conversation that fills the model's context is passed over, and one that the template does not render so far.
    """
    prompts: list[Prompt] = []
    for document in documents[:MAX_CONVERSATIONS]:
        turns = document.messages
        last = max((n for n, turn in enumerate(turns) if turn.role == "assistant" and turn.trained), default=0)
        question = next((turn.content for turn in reversed(turns[:last]) if turn.role == "user"), "")
        if not question or len(prompts) == QUESTIONS:
            continue
        try:
            ids = encode_conversation(turns[:last], run.tokenizer, tools=document.tools, now=document.now)
        except (DataError, ModelError) as error:
            if say:
                run.report.say(f"{document.where} is no sample: {error.message}")
            continue
        if 0 < len(ids) < run.model.config.context:
            prompts.append(Prompt(question, ids, turns[last].content, is_question=True))
    return prompts


def _beginning(run: Run, document: Document, *, say: bool) -> Prompt | None:
    """The beginning of a text, or the prompt of a pair. If the model's context does not hold it: a part that takes at
    most half of the context, which is reported if `say` is set."""
    context, is_pair = run.model.config.context, document.completion is not None
    text, rest = (document.prompt or "", document.completion or "") if is_pair else _divided(document.text)
    if not text or (count := len(encode_prompt(text, run.tokenizer))) < context:
        return Prompt(text, encode_prompt(text, run.tokenizer), rest, is_question=is_pair) if text else None
    while text and len(encode_prompt(text, run.tokenizer)) > context // 2:
        text = _first_half(text)
    if say:
        done = "it is shortened" if text else "there are no samples"
        run.report.say(
            f"The default prompt of the samples has {count:,} tokens, the model's context is {context:,}: {done}. "
            "--sample-prompt sets another."
        )
    return Prompt(text, encode_prompt(text, run.tokenizer)) if text else None


def _divided(text: str) -> tuple[str, str]:
    """(the first PROMPT_WORDS words of a text, the REFERENCE_WORDS after them), with its line breaks."""
    ends = [word.end() for word in islice(re.finditer(r"\S+", text), PROMPT_WORDS + REFERENCE_WORDS)]
    if not ends:
        return "", ""
    middle = ends[min(len(ends), PROMPT_WORDS) - 1]
    return text[:middle].lstrip(), text[middle : ends[-1]].lstrip(" ")


def _first_half(text: str) -> str:
    """The first half of a text, without a part of a word at its end if there is a word before it."""
    half = text[: len(text) // 2]
    words = half.rsplit(maxsplit=1)
    return words[0] if len(words) > 1 else half.strip()
