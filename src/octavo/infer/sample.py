"""Sampling: from logits to the next token, as pure functions.

The order is that of transformers and vLLM: repetition penalty, temperature, top-k, top-p, then a sample. Sampling is by
inverse transform: a uniform number u of a CPU generator selects the first token whose cumulative probability exceeds u,
in float64 and the likeliest token first. So a seed gives the same tokens on a CPU and a GPU, up to rounding of logits.

Legend: V the vocabulary, n rows, k candidates of a row; logits are (V,) float32 unless stated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.errors import UsageError

CANDIDATES = 512  # how many of the likeliest tokens of a row are copied to the CPU
# The smallest divisor: a temperature of 1e-310 is 0 in float32, and 0 / 0 is NaN. With this one only the likeliest
# tokens have a probability above 0, since different float32 logits differ by more than 1e-7.
MIN_TEMPERATURE = 1e-30


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled. Temperature 0 is greedy; top_k 0 and top_p 1 keep all tokens."""

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
            for text, valid in (
                (f"temperature {self.temperature} (at least 0)", self.temperature >= 0),
                (f"top-k {self.top_k} (at least 0)", self.top_k >= 0),
                (f"top-p {self.top_p} (over 0, at most 1)", 0 < self.top_p <= 1),
                (f"repetition penalty {self.repetition_penalty} (over 0)", self.repetition_penalty > 0),
                (f"max-new-tokens {self.max_new_tokens} (at least 1)", self.max_new_tokens >= 1),
                ("an empty stop string", all(self.stop)),
            )
            if not valid
        ]
        if wrong:
            raise UsageError(f"Text cannot be generated with {', '.join(wrong)}.")


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Repetition penalty (CTRL, arXiv 1909.05858): positive logits of `seen` ids / penalty, negative * penalty."""
    if penalty == 1.0:
        return logits
    scores = logits[seen]  # (n,)
    return logits.index_copy(0, seen, torch.where(scores > 0, scores / penalty, scores * penalty))


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Sets all but the k largest logits to -inf; with ties at the k-th, more remain."""
    if k <= 0 or k >= logits.numel():
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[-1], -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Nucleus sampling (arXiv 1904.09751): keeps the fewest likeliest tokens whose probabilities sum to p or more."""
    if p >= 1.0:
        return logits
    ordered, ids = logits.sort(descending=True)  # (V,) each
    probabilities = ordered.double().softmax(-1)  # (V,)
    # The probability of all likelier tokens. A token is dropped if these alone reach p: so the first one always stays.
    before = probabilities.cumsum(-1) - probabilities  # (V,)
    return logits.masked_fill(torch.zeros_like(logits, dtype=torch.bool).scatter(0, ids, before >= p), -torch.inf)


def choose(logits: Tensor, seen: Tensor, sampling: Sampling, *, generator: torch.Generator) -> int:
    """The id of the next token. `seen` (n,) are the ids of prompt and answer so far."""
    logits = penalise(logits.float(), seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = logits - logits.max()  # softmax is unchanged; without it a small temperature makes the logits infinite
    return _sample_all(logits / max(sampling.temperature, MIN_TEMPERATURE), sampling, generator)


def choose_rows(
    logits: Tensor, seen: Sequence[Sequence[int]], samplings: Sequence[Sampling], generators: Sequence[torch.Generator]
) -> list[int | None]:
    """`choose` for each row of logits (n, V); None for a row whose logits are not finite.

    `choose` sorts all V logits, which is slow for many rows. Here the CANDIDATES likeliest tokens of all rows are
    copied to the CPU at once, with the sum of exp over all V logits, which gives their exact probabilities. Nearly
    always they include all tokens that top-k and top-p keep; if not, the row is sampled from all of its logits.
    """
    scaled = logits.float()  # (n, V)
    for row, (past, sampling) in enumerate(zip(seen, samplings, strict=True)):
        if sampling.repetition_penalty != 1:
            past_ids = torch.tensor(past, dtype=torch.long, device=scaled.device)
            penalised = penalise(scaled[row], past_ids, sampling.repetition_penalty)  # (V,)
            scaled = scaled.index_copy(0, torch.tensor([row], device=scaled.device), penalised[None])
    # A greedy row is divided by 1: temperature 0 takes its largest logit below.
    divisors = [max(sampling.temperature, MIN_TEMPERATURE) if sampling.temperature else 1.0 for sampling in samplings]
    temperatures = torch.tensor(divisors, dtype=torch.float64)  # (n,)
    scaled = (scaled - scaled.amax(dim=1, keepdim=True)) / temperatures.to(scaled.device, scaled.dtype)[:, None]
    values, ids = scaled.topk(min(CANDIDATES, scaled.shape[1]), dim=1)  # (n, k) each, in descending order
    values, ids, totals = values.double().cpu(), ids.cpu(), scaled.double().exp().sum(dim=1).tolist()
    tokens: list[int | None] = []
    for row, (sampling, generator) in enumerate(zip(samplings, generators, strict=True)):
        if not math.isfinite(totals[row]):  # NaN; after the subtraction of the maximum no term exceeds 1
            tokens.append(None)
        elif sampling.temperature == 0:
            tokens.append(int(ids[row, 0]))
        else:
            distribution = _distribution(
                values[row], totals[row], sampling, complete=len(values[row]) == scaled.shape[1]
            )
            if distribution is None:
                tokens.append(_sample_all(scaled[row], sampling, generator))
            else:
                tokens.append(int(ids[row, _sample_index(distribution, generator)]))
    return tokens


def _sample_all(scaled: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Samples from all logits (V,), which are divided by the temperature already."""
    ordered, ids = keep_top_p(keep_top_k(scaled, sampling.top_k), sampling.top_p).sort(descending=True, stable=True)
    remaining = ordered[ordered > -torch.inf].double()  # (kept tokens,)
    return int(ids[_sample_index(remaining.softmax(-1).cumsum(-1).cpu(), generator)])


def _distribution(values: Tensor, total: float, sampling: Sampling, *, complete: bool) -> Tensor | None:
    """The cumulative probabilities of the tokens that top-k and top-p keep, the likeliest first.

    `values` (k,) are the largest logits in descending order, all V of them if `complete`; `total` is the sum of exp
    over all logits. None if tokens that are not among `values` may have to be kept.
    """
    k = sampling.top_k
    if 0 < k < len(values):
        values = values[values >= values[k - 1]]  # more than k if there are ties
        complete = complete or len(values) < CANDIDATES  # else ties may continue after the last candidate
        total = float(values.exp().sum())  # top-p counts the probabilities among the tokens that top-k keeps
    elif k > 0 and not complete:
        return None
    probabilities = values.exp() / total
    cumulative = probabilities.cumsum(0)
    if sampling.top_p < 1:
        # As in `keep_top_p`: tokens whose likelier tokens have less than p together.
        count = int((cumulative - probabilities < sampling.top_p).sum())
        if count == len(cumulative) and not complete:
            return None
        cumulative = cumulative[: max(count, 1)]
    elif not complete:
        return None
    return cumulative / cumulative[-1]


def _sample_index(cumulative: Tensor, generator: torch.Generator) -> int:
    """An index from cumulative probabilities (kept tokens,), by inverse transform sampling."""
    uniform = torch.rand((), dtype=torch.float64, generator=generator)
    # Rounding may leave the last cumulative probability below 1, and `uniform` above it.
    return min(int(torch.searchsorted(cumulative, uniform, right=True)), len(cumulative) - 1)
