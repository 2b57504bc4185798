"""From logits to the next token: pure functions. Legend: logits are (V,), float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How continuations are drawn. Temperature 0 is greedy; top_k 0 and top_p 1 cut nothing."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    repetition_penalty: float = 1.0
    max_new_tokens: int = 200
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = [
            text
            for text, fine in (
                (f"temperature {self.temperature} (at least 0)", self.temperature >= 0),
                (f"top-k {self.top_k} (at least 0)", self.top_k >= 0),
                (f"top-p {self.top_p} (over 0, at most 1)", 0 < self.top_p <= 1),
                (f"repetition penalty {self.repetition_penalty} (over 0)", self.repetition_penalty > 0),
                (f"max-new-tokens {self.max_new_tokens} (at least 1)", self.max_new_tokens >= 1),
                ("an empty stop string", all(self.stop)),
            )
            if not fine
        ]
        if wrong:
            raise UsageError(f"Text cannot be generated with {', '.join(wrong)}.")


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Makes tokens that occurred less likely: positive logits over the penalty, negative ones times it (CTRL)."""
    if penalty == 1.0:
        return logits
    scores = logits[seen]
    return logits.index_copy(0, seen, torch.where(scores > 0, scores / penalty, scores * penalty))


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """All but the k largest become -inf."""
    if k <= 0 or k >= logits.numel():
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[-1], -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keeps the likeliest tokens whose probabilities together reach p, at least one (arXiv 1904.09751)."""
    if p >= 1.0:
        return logits
    ordered, places = logits.sort(descending=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # what the tokens ahead of each already reach
    return logits.masked_fill(torch.zeros_like(logits, dtype=torch.bool).scatter(0, places, before >= p), -torch.inf)


def choose(logits: Tensor, seen: Tensor, sampling: Sampling, *, generator: torch.Generator) -> int:
    """The next token's id. `seen` (n,) are the ids so far, prompt included."""
    logits = penalise(logits.float(), seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = logits - logits.max()  # so that no temperature, however small, divides them to infinity
    logits = keep_top_p(keep_top_k(logits / sampling.temperature, sampling.top_k), sampling.top_p)
    return int(torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator))
