"""A request that has a slot of the cache, and the selection of the next tokens of several.

Legend: n requests that sample, V the vocabulary of the tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch

from octavo.infer.decoding import StepOutput
from octavo.infer.generate import TextStream
from octavo.infer.requests import Stream, Token
from octavo.infer.sample import choose_rows


@dataclass
class ActiveRequest:
    """A request with a slot. `ids` are the tokens of prompt and answer; the first `cached` of them are in the cache."""

    stream: Stream
    limit: int  # the most tokens of the answer
    text: TextStream
    generator: torch.Generator
    ids: list[int]
    cached: int = 0
    prompt_logprobs: list[Token] = field(default_factory=list)
    finished: bool = False

    @property
    def adapter(self) -> str | None:
        return self.stream.request.adapter

    @property
    def greedy(self) -> bool:
        """Whether the next token is the argmax of the model's logits, which `StepOutput` has already."""
        sampling = self.stream.request.sampling
        return sampling.temperature == 0 and sampling.repetition_penalty == 1

    @property
    def generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.ids) - len(self.stream.request.prompt)

    def needs_next_step(self, stop_ids: Collection[int]) -> bool:
        """Whether the request certainly continues, unless a stop string ends the answer.

        False with log-probabilities: they are computed from the logits of this step, which the next step overwrites.
        """
        return (
            not self.finished
            and 0 < self.generated < self.limit
            and self.ids[-1] not in stop_ids
            and self.stream.request.logprobs is None
            and not self.stream.cancelled
        )


def next_tokens(requests: Sequence[ActiveRequest], output: StepOutput) -> list[int | None]:
    """The next token of every request, by its row of the logits; None if they are not finite."""
    tokens: list[int | None] = [
        token if math.isfinite(largest) else None
        for token, largest in zip(output.argmax, output.max_logits, strict=True)
    ]
    rows = [row for row, request in enumerate(requests) if tokens[row] is not None and not request.greedy]
    if rows:
        sampled = [requests[row] for row in rows]
        logits = output.logits if len(rows) == len(requests) else output.logits[rows]  # (n, V); no copy if all sample
        samplings = [request.stream.request.sampling for request in sampled]
        generators = [request.generator for request in sampled]
        for row, token in zip(
            rows, choose_rows(logits, [request.ids for request in sampled], samplings, generators), strict=True
        ):
            tokens[row] = token
    return tokens
