"""Log-probabilities of tokens, and of the likeliest tokens at their positions.

Legend: T positions of a chunk, V the vocabulary of the tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from octavo.infer.requests import Token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def token_with_logprobs(token_id: int, logits: Tensor, top: int | None) -> Token:
    """The token without its text, by the logits (V,) of its position.

    Unless `top` is None, it has its log-probability and those of the `top` likeliest tokens.
    """
    if top is None:
        return Token(token_id, "")
    logprobs = logits.log_softmax(dim=0)  # (V,)
    values, ids = logprobs.topk(top)  # (top,) each
    likeliest = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Token(token_id, "", logprob=float(logprobs[token_id]), top=likeliest)


def prompt_logprobs(
    tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], start: int, logits: Tensor, top: int
) -> list[Token]:
    """The tokens of a prompt that the logits (T, V) of positions `start`, `start` + 1, .. predict.

    Row t of the logits predicts token start + t + 1: the last row of a chunk predicts the first token of the next
    chunk, and the last row of a prompt none of its tokens. The first token of the prompt has no
    log-probability, since nothing predicts it; it is returned with `start` = 0.
    """
    tokens = [Token(ids[0], tokenizer.decode([ids[0]]))] if start == 0 else []
    for row, token_id in enumerate(ids[start + 1 : start + 1 + len(logits)]):
        token = token_with_logprobs(token_id, logits[row], top)
        tokens.append(replace(token, text=tokenizer.decode([token_id])))
    return tokens
