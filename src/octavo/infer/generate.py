"""Generation of one sequence over a key/value cache, as a stream of text: the reference of the engine.

Legend: T new positions of a pass, d the width of the model, V the vocabulary of the tokenizer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from octavo.errors import UsageError
from octavo.infer.sample import Sampling, choose
from octavo.models import Decoder
from octavo.ops.tiles import Phase

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # the decoded text of an incomplete character


@dataclass(frozen=True)
class GeneratedToken:
    """One new token with the text that became final with it: "" while a character or a stop string is incomplete."""

    token_id: int
    text: str
    finish_reason: str | None = None  # of the last token: "stop" (stop id or stop string) or "length"


@dataclass(frozen=True)
class Continuation:
    """A finished continuation. `token_ids` are all generated tokens, with the stop id."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str


def generate(
    model: Decoder,
    tokenizer: PreTrainedTokenizerFast,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    stop_ids: Collection[int] = (),
) -> Iterator[GeneratedToken]:
    """Yields the continuation of the token ids `prompt`, token by token.

    It ends at the tokenizer's EOS token or one of `stop_ids`, before a stop string, after `max_new_tokens`, or when
    the model's context is full. Tokens past the tokenizer's length are never selected. UsageError if the prompt does
    not fit.
    """
    max_len = model.config.context
    check_prompt(prompt, max_len)
    limit = min(sampling.max_new_tokens, max_len - len(prompt))
    stop_ids = all_stop_ids(tokenizer, stop_ids)
    text = TextStream(tokenizer, sampling.stop)
    for count, token in enumerate(_tokens(model, list(prompt), sampling, limit=limit, vocab_size=len(tokenizer)), 1):
        if token in stop_ids:
            yield GeneratedToken(token, text.finish(), "stop")
            return
        added, stopped = text.push(token)
        if stopped:
            yield GeneratedToken(token, added, "stop")
            return
        if count == limit:
            yield GeneratedToken(token, added + text.finish(), "length")
            return
        yield GeneratedToken(token, added)


def check_prompt(prompt: Sequence[int], max_len: int) -> None:
    """UsageError unless the prompt has at least one token and fewer than `max_len`."""
    if not prompt:
        raise UsageError("The prompt is empty.", hint="Give at least one character to continue.")
    if len(prompt) >= max_len:
        raise UsageError(
            f"The prompt has {len(prompt):,} tokens; the model's context holds {max_len:,}.",
            hint="Shorten the prompt.",
        )


def all_stop_ids(tokenizer: PreTrainedTokenizerFast, stop_ids: Collection[int]) -> frozenset[int]:
    """The tokens that end an answer: the tokenizer's EOS token and `stop_ids`."""
    eos = tokenizer.eos_token_id
    return frozenset(stop_ids) if eos is None else frozenset({int(eos), *stop_ids})


def complete(
    model: Decoder,
    tokenizer: PreTrainedTokenizerFast,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    stop_ids: Collection[int] = (),
) -> Continuation:
    """`generate` to its end."""
    return finished(list(generate(model, tokenizer, prompt, sampling, stop_ids=stop_ids)))


def finished(tokens: Sequence[GeneratedToken]) -> Continuation:
    """The continuation that consists of all its `tokens`."""
    reason = tokens[-1].finish_reason
    assert reason is not None
    return Continuation("".join(token.text for token in tokens), tuple(token.token_id for token in tokens), reason)


def _tokens(model: Decoder, ids: list[int], sampling: Sampling, *, limit: int, vocab_size: int) -> Iterator[int]:
    """Up to `limit` new ids: prefill of the prompt, then a decode step for each new token."""
    device = model.embed.matrix.device
    generator = torch.Generator().manual_seed(sampling.seed)
    was_training = model.training
    model.eval()
    try:
        cache = model.new_cache(batch=1, max_len=len(ids) + limit)
        new = ids[:]  # ids that are not in the cache: the prompt first, then one token
        for _ in range(limit):
            with torch.no_grad():
                hidden = model.hidden(torch.tensor([new], device=device), cache=cache)  # (1, T, d)
                # The head runs as in decode also after the prompt: the engine computes these logits in one batch.
                logits = model.infer_logits(hidden[:, -1:], Phase.DECODE)[0, 0, :vocab_size]  # (V,)
            token = choose(logits, torch.tensor(ids, device=device), sampling, generator=generator)
            ids.append(token)
            new = [token]
            yield token
    finally:
        model.train(was_training)


@torch.no_grad()
def greedy_batch(model: Decoder, prompts: Sequence[Sequence[int]], *, new_tokens: int, vocab_size: int) -> Tensor:
    """(B, new_tokens) The likeliest continuations of B prompts of one length, in one batch, on the CPU.

    They do not end at stop ids: the caller cuts them there.
    """
    ids = torch.tensor(prompts, device=model.embed.matrix.device)  # (B, T)
    was_training = model.training
    model.eval()
    try:
        cache = model.new_cache(batch=len(prompts), max_len=ids.shape[1] + new_tokens)
        new: list[Tensor] = []  # (B, 1) each
        for _ in range(new_tokens):
            hidden = model.hidden(new[-1] if new else ids, cache=cache)  # (B, T, d)
            logits = model.infer_logits(hidden[:, -1:], Phase.DECODE)[..., :vocab_size]  # (B, 1, V)
            new.append(logits.argmax(-1))
        return torch.cat(new, 1).cpu()
    finally:
        model.train(was_training)


class TextStream:
    """Incremental decoding of token ids to text: complete characters only, and no part of a stop string.

    Tokens cannot be decoded one by one: a token may have a part of a character only, and in SentencePiece vocabularies
    the text of a token depends on the previous one (the first space of a text is dropped). So a few previous tokens are
    decoded again with the new ones, and the difference of both texts is new.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.ids: list[int] = []
        self.context = 0  # ids[context : decoded] is the last group of ids that was decoded; see `_new_text`
        self.decoded = 0  # the number of ids that have been decoded
        self.pending = ""  # decoded text that is not yet returned: it may be the start of a stop string

    def push(self, token: int) -> tuple[str, bool]:
        """Adds a token. Returns (text that is final now, whether a stop string is complete)."""
        self.ids.append(token)
        self.pending += self._new_text()
        at = self._stop_at()
        if at is not None:
            text, self.pending = self.pending[:at], ""
            return text, True
        # The end of the text that a stop string may begin with stays pending until the next tokens decide.
        final = len(self.pending) - max((_overlap(self.pending, word) for word in self.stop), default=0)
        text, self.pending = self.pending[:final], self.pending[final:]
        return text, False

    def finish(self) -> str:
        """The pending text, up to a stop string within it."""
        self.pending += self._new_text(final=True)
        text, self.pending = self.pending[: self._stop_at()], ""
        return text

    def _stop_at(self) -> int | None:
        """The index of the first stop string in the pending text."""
        return min((at for at in (self.pending.find(word) for word in self.stop) if at >= 0), default=None)

    def _new_text(self, *, final: bool = False) -> str:
        """Decodes the new ids after the last decoded group: the text of a token can depend on the previous tokens.

        A group ends when its text ends with a complete character. The context is a complete group: after a part of a
        character a byte-fallback decoder decodes the next character to replacement characters too.
        """
        before = self._decode(self.ids[self.context : self.decoded])
        after = self._decode(self.ids[self.context :])
        if len(after) <= len(before) or (after.endswith(REPLACEMENT) and not final):
            return ""
        self.context, self.decoded = self.decoded, len(self.ids)
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def _overlap(text: str, word: str) -> int:
    """The length of the longest suffix of `text` that is a proper prefix of `word`."""
    return next((n for n in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:n])), 0)
