"""From logits to the next token: pure functions. Legend: logits are (V,), float32; V the vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.errors import UsageError

CANDIDATES = 512  # of the likeliest tokens, what is looked at first
# Nothing is divided by less: a temperature of 1e-310 is 0 in float32, and 0 / 0 no number. By this one only the
# likeliest tokens are left, as logits of float32 differ by more than 1e-7 or not at all.
LEAST_TEMPERATURE = 1e-30


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
    probabilities = ordered.double().softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # what the tokens ahead of each already reach
    return logits.masked_fill(torch.zeros_like(logits, dtype=torch.bool).scatter(0, places, before >= p), -torch.inf)


def choose(logits: Tensor, seen: Tensor, sampling: Sampling, *, generator: torch.Generator) -> int:
    """The next token's id. `seen` (n,) are the ids so far, prompt included."""
    logits = penalise(logits.float(), seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = logits - logits.max()  # so that no temperature, however small, divides them to infinity
    return _drawn_from_all(logits / max(sampling.temperature, LEAST_TEMPERATURE), sampling, generator)


def choose_rows(
    logits: Tensor, seen: Sequence[Sequence[int]], samplings: Sequence[Sampling], generators: Sequence[torch.Generator]
) -> list[int | None]:
    """`choose` for each row of logits (n, V); None where a row's numbers are not finite.

    The likeliest tokens of all rows are found and sent to the host at once. Nearly always they hold all that a rule
    keeps; where they do not, the row is drawn from as a whole.
    """
    scaled = logits.float()
    for row, (past, sampling) in enumerate(zip(seen, samplings, strict=True)):
        if sampling.repetition_penalty != 1:
            said = torch.tensor(past, dtype=torch.long, device=scaled.device)
            own = penalise(scaled[row], said, sampling.repetition_penalty)
            scaled = scaled.index_copy(0, torch.tensor([row], device=scaled.device), own[None])
    divisors = [max(sampling.temperature, LEAST_TEMPERATURE) if sampling.temperature else 1.0 for sampling in samplings]
    temperatures = torch.tensor(divisors, dtype=torch.float64)
    scaled = (scaled - scaled.amax(dim=1, keepdim=True)) / temperatures.to(scaled.device, scaled.dtype)[:, None]
    values, ids = scaled.topk(min(CANDIDATES, scaled.shape[1]), dim=1)
    values, ids, totals = values.double().cpu(), ids.cpu(), scaled.double().exp().sum(dim=1).tolist()
    tokens: list[int | None] = []
    for row, (sampling, generator) in enumerate(zip(samplings, generators, strict=True)):
        if not math.isfinite(totals[row]):
            tokens.append(None)
        elif sampling.temperature == 0:
            tokens.append(int(ids[row, 0]))
        else:
            reached = _reached(values[row], totals[row], sampling, complete=len(values[row]) == scaled.shape[1])
            if reached is None:
                tokens.append(_drawn_from_all(scaled[row], sampling, generator))
            else:
                tokens.append(int(ids[row, _drawn(reached, generator)]))
    return tokens


def _drawn_from_all(scaled: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token by all logits (V,), over their temperature already."""
    ordered, ids = keep_top_p(keep_top_k(scaled, sampling.top_k), sampling.top_p).sort(descending=True, stable=True)
    kept = ordered[ordered > -torch.inf].double()
    return int(ids[_drawn(kept.softmax(-1).cumsum(-1).cpu(), generator)])


def _reached(values: Tensor, total: float, sampling: Sampling, *, complete: bool) -> Tensor | None:
    """What the kept of the likeliest logits (n,), likeliest first, reach in sum; None if there may be more to keep.

    `total` is the sum of exp over all logits.
    """
    k = sampling.top_k
    if 0 < k < len(values):
        values = values[values >= values[k - 1]]
        complete = complete or len(values) < CANDIDATES
        total = float(values.exp().sum())
    elif k > 0 and not complete:
        return None
    shares = values.exp() / total
    reached = shares.cumsum(0)
    if sampling.top_p < 1:
        kept = int((reached - shares < sampling.top_p).sum())
        if kept == len(reached) and not complete:
            return None
        reached = reached[: max(kept, 1)]
    elif not complete:
        return None
    return reached / reached[-1]


def _drawn(reached: Tensor, generator: torch.Generator) -> int:
    """A place, by a number drawn evenly from 0 to 1. `reached` (n,) ends at 1."""
    number = torch.rand((), dtype=torch.float64, generator=generator)
    return min(int(torch.searchsorted(reached, number, right=True)), len(reached) - 1)
