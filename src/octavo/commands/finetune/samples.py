"""Samples of the model before, during and after training: continuations of a few prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from octavo.commands.finetune.state import Run
from octavo.commands.loading import end_ids
from octavo.config import RunOptions
from octavo.data.prompt import encode_prompt
from octavo.errors import UsageError
from octavo.infer.generate import check_prompt, complete
from octavo.infer.sample import Sampling
from octavo.runs import events

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PROMPT_WORDS = 12  # words of the held-out text that are the default prompt of samples


def check_prompts(options: RunOptions, tokenizer: PreTrainedTokenizerFast, context: int) -> None:
    """UsageError for a --sample-prompt that the model's context does not hold."""
    for prompt in options.sample_prompt:
        try:
            check_prompt(encode_prompt(prompt, tokenizer), context)
        except UsageError as error:
            short = prompt if len(prompt) <= 40 else f"{prompt[:40]}.."
            raise UsageError(f"--sample-prompt {short!r}: {error.message}", hint=error.hint) from error


def sample(run: Run, *, which: str, step: int) -> None:
    """Continues each prompt; records and prints the text."""
    options = run.config[RunOptions]
    run.micro_step.release()
    sampling = Sampling(temperature=0.7, top_p=0.9, max_new_tokens=options.sample_tokens, seed=0)
    for prompt in options.sample_prompt or _default_prompts(run, say=step == 0):
        ids = encode_prompt(prompt, run.tokenizer)
        text = complete(run.model, run.tokenizer, ids, sampling, stop_ids=end_ids(run.source)).text
        events.Sample(step, prompt, text, which).write(run.report)
        run.report.say(f"\nSample of the {which} model for {prompt!r}:\n{text}\n")


def _default_prompts(run: Run, *, say: bool) -> list[str]:
    """The beginning of a held-out text, or its prompt. If the model's context does not hold it: a part that takes at
    most half of the context, which is reported if `say` is set."""
    first, context = (run.test or run.train).documents[0], run.model.config.context
    text = first.prompt or " ".join(first.text.split()[:PROMPT_WORDS])
    if not text or (count := len(encode_prompt(text, run.tokenizer))) < context:
        return [text] if text else []
    while text and len(encode_prompt(text, run.tokenizer)) > context // 2:
        text = _first_half(text)
    if say:
        done = "it is shortened" if text else "there are no samples"
        run.report.say(
            f"The default prompt of the samples has {count:,} tokens, the model's context is {context:,}: {done}. "
            "--sample-prompt sets another."
        )
    return [text] if text else []


def _first_half(text: str) -> str:
    """The first half of a text, without a part of a word at its end if there is a word before it."""
    half = text[: len(text) // 2]
    words = half.rsplit(maxsplit=1)
    return words[0] if len(words) > 1 else half.strip()
