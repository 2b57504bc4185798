"""What is told of tokens beside an answer's text: how likely the model found them, and which were likeliest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from octavo.infer.requests import Token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def tell(token: int, logits: Tensor, top: int | None) -> Token:
    """The token without its text; with `top` its log-probability, and the `top` likeliest, by its logits (V,)."""
    if top is None:
        return Token(token, "")
    scores = logits.log_softmax(dim=0)
    values, ids = scores.topk(top)
    best = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Token(token, "", logprob=float(scores[token]), top=best)


def tell_prompt(
    tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], start: int, logits: Tensor, top: int
) -> list[Token]:
    """What the logits (T, V) of a prompt's tokens `start` and on tell of the tokens behind them.

    The last logits of a chunk tell of the next one's first token; before the prompt's first there are none.
    """
    told = [Token(ids[0], tokenizer.decode([ids[0]]))] if start == 0 else []
    for row, token in enumerate(ids[start + 1 : start + 1 + len(logits)]):
        told.append(replace(tell(token, logits[row], top), text=tokenizer.decode([token])))
    return told
