"""A request at work in the engine, and which token comes next for each of several."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch

from octavo.infer.decoding import Chosen
from octavo.infer.generate import TextStream
from octavo.infer.requests import Stream, Token
from octavo.infer.sample import choose_rows


@dataclass
class ActiveRequest:
    """`ids` are prompt and answer so far; `done` of them are in the cache. A `limit` of 0 marks one that is over."""

    stream: Stream
    limit: int
    text: TextStream
    generator: torch.Generator
    ids: list[int]
    done: int = 0
    logprobs: list[Token] = field(default_factory=list)  # of the prompt, with their log-probabilities

    @property
    def adapter(self) -> str | None:
        return self.stream.request.adapter

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken as it is."""
        sampling = self.stream.request.sampling
        return sampling.temperature == 0 and sampling.repetition_penalty == 1

    @property
    def answered(self) -> int:
        """Tokens of the answer so far."""
        return len(self.ids) - len(self.stream.request.prompt)

    def goes_on(self, stop_ids: Collection[int]) -> bool:
        """Whether another token is sure to be wanted, unless a stop string turns up; and no logits of the last one."""
        return (
            0 < self.answered < self.limit
            and self.ids[-1] not in stop_ids
            and self.stream.request.logprobs is None
            and not self.stream.cancelled
        )


def next_tokens(runs: Sequence[ActiveRequest], found: Chosen) -> list[int | None]:
    """The next token of each run, by its row of the logits; None where they are not finite, or nothing can be drawn."""
    tokens: list[int | None] = list(found.greedy)
    for row, best in enumerate(found.best):
        if not math.isfinite(best):
            tokens[row] = None
    rows = [row for row, run in enumerate(runs) if tokens[row] is not None and not run.greedy]
    if rows:
        drawing = [runs[row] for row in rows]
        logits = found.logits if len(rows) == len(runs) else found.logits[rows]
        samplings = [run.stream.request.sampling for run in drawing]
        drawn = choose_rows(logits, [run.ids for run in drawing], samplings, [run.generator for run in drawing])
        for row, token in zip(rows, drawn, strict=True):
            tokens[row] = token
    return tokens
