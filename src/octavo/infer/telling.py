"""What is told of a token beside its text: how likely the model found it, and which were likeliest."""

from __future__ import annotations

from torch import Tensor

from octavo.infer.requests import Token


def tell(token: int, logits: Tensor, top: int | None) -> Token:
    """The token without its text; with `top` its log-probability, and the `top` likeliest, by its logits (V,)."""
    if top is None:
        return Token(token, "")
    scores = logits.log_softmax(dim=0)
    values, ids = scores.topk(top)
    best = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Token(token, "", logprob=float(scores[token]), top=best)
