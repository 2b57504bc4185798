"""Runs a prompt and its continuation over a key/value cache, one token at a time, as a stream of text."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from octavo.errors import UsageError
from octavo.infer.sample import Sampling, choose
from octavo.models import Decoder
from octavo.ops.tiles import Phase

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what half a character decodes to


@dataclass(frozen=True)
class Piece:
    """What one new token adds. `text` may be empty while a character or a stop string is incomplete."""

    token_id: int
    text: str
    finish_reason: str | None = None  # with the last piece: "stop" (end token, stop string) or "length"


@dataclass(frozen=True)
class Continuation:
    """A finished continuation. `token_ids` are all that were generated, the end token included."""

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
) -> Iterator[Piece]:
    """The continuation of the token ids `prompt`, piece by piece.

    Ends at the tokenizer's end token or one of `ends`, before a stop string, after `max_new_tokens`, or where
    the model's context is full. Rows of the vocabulary past the tokenizer's length are never chosen. UsageError
    if the prompt does not fit.
    """
    max_len = model.config.context
    check_prompt(prompt, max_len)
    limit = min(sampling.max_new_tokens, max_len - len(prompt))
    stop_ids = all_stop_ids(tokenizer, stop_ids)
    text = TextStream(tokenizer, sampling.stop)
    for count, token in enumerate(_tokens(model, list(prompt), sampling, limit=limit, vocab_size=len(tokenizer)), 1):
        if token in stop_ids:
            yield Piece(token, text.finish(), "stop")
            return
        added, stopped = text.push(token)
        if stopped:
            yield Piece(token, added, "stop")
            return
        if count == limit:
            yield Piece(token, added + text.finish(), "length")
            return
        yield Piece(token, added)


def check_prompt(prompt: Sequence[int], max_len: int) -> None:
    """UsageError unless the prompt has tokens, and leaves room for one more."""
    if not prompt:
        raise UsageError("The prompt is empty.", hint="Give at least one character to go on from.")
    if len(prompt) >= max_len:
        raise UsageError(
            f"The prompt has {len(prompt):,} tokens; the model's context holds {max_len:,}.",
            hint="Shorten the prompt.",
        )


def all_stop_ids(tokenizer: PreTrainedTokenizerFast, stop_ids: Collection[int]) -> frozenset[int]:
    """The tokens that end a text: the tokenizer's own and those given."""
    own = tokenizer.eos_token_id
    return frozenset(stop_ids) if own is None else frozenset({int(own), *stop_ids})


def complete(
    model: Decoder,
    tokenizer: PreTrainedTokenizerFast,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    stop_ids: Collection[int] = (),
) -> Continuation:
    """The whole continuation at once."""
    return finished(list(generate(model, tokenizer, prompt, sampling, stop_ids=stop_ids)))


def finished(pieces: Sequence[Piece]) -> Continuation:
    """The continuation that all its pieces make."""
    reason = pieces[-1].finish_reason
    assert reason is not None
    return Continuation("".join(p.text for p in pieces), tuple(p.token_id for p in pieces), reason)


def _tokens(model: Decoder, ids: list[int], sampling: Sampling, *, limit: int, vocab_size: int) -> Iterator[int]:
    """Up to `limit` new ids. The prompt runs once, then each new token alone, over the cache."""
    device = model.embed.matrix.device
    generator = torch.Generator().manual_seed(sampling.seed)
    was_training = model.training
    model.eval()
    try:
        cache = model.new_cache(batch=1, max_len=len(ids) + limit)
        new = ids[:]
        for _ in range(limit):
            with torch.no_grad():
                hidden = model.hidden(torch.tensor([new], device=device), cache=cache)
                logits = model.infer_logits(hidden[:, -1:], Phase.DECODE)[0, 0, :vocab_size]
            token = choose(logits, torch.tensor(ids, device=device), sampling, generator=generator)
            ids.append(token)
            new = [token]
            yield token
    finally:
        model.train(was_training)


class TextStream:
    """Token ids to text that can be shown at once: whole characters only, and nothing of a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.ids: list[int] = []
        self.context = 0  # where the last settled group of ids begins
        self.settled = 0  # the ids before this one are decoded for good
        self.held = ""  # text that may turn out to be the start of a stop string

    def push(self, token: int) -> tuple[str, bool]:
        """(text that is certain now, whether a stop string was completed)."""
        self.ids.append(token)
        self.held += self._new_text()
        at = self._stop_at()
        if at is not None:
            text, self.held = self.held[:at], ""
            return text, True
        keep = max((_overlap(self.held, word) for word in self.stop), default=0)
        text, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return text, False

    def finish(self) -> str:
        """What was held back, up to a stop string within it."""
        self.held += self._new_text(final=True)
        text, self.held = self.held[: self._stop_at()], ""
        return text

    def _stop_at(self) -> int | None:
        """Where the first stop string in the held text begins."""
        return min((at for at in (self.held.find(word) for word in self.stop) if at >= 0), default=None)

    def _new_text(self, *, final: bool = False) -> str:
        """Decodes the unsettled ids behind the last settled group, since a token's text can depend on what is before.

        A group is settled when its text is whole. The context is a whole group and never a part of one: half a
        character before it makes a byte-fallback decoder spell the next one out as replacement characters too.
        """
        before = self._decode(self.ids[self.context : self.settled])
        after = self._decode(self.ids[self.context :])
        if len(after) <= len(before) or (after.endswith(REPLACEMENT) and not final):
            return ""
        self.context, self.settled = self.settled, len(self.ids)
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def _overlap(text: str, word: str) -> int:
    """The length of the longest end of `text` that is a proper start of `word`."""
    return next((n for n in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:n])), 0)
