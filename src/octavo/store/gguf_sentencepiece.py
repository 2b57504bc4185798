"""SentencePiece tokenizers of GGUF files (`tokenizer.ggml.model` = "llama": Llama 2, Mistral) as byte-pair encoding.

SentencePiece repeatedly joins the two adjacent pieces whose concatenation has the highest score, the leftmost ones if
scores are equal. This is byte-pair encoding with merges ranked by the score of their result. The other rules are kept:

- The text is not split into words first. A space is written as U+2581, and one more is added before the text.
- User-defined pieces are matched first and never joined. Control pieces and bytes are not produced from text.
- A character without a piece becomes its bytes, or one unknown token for a run of such characters.

One text is encoded differently: a user-defined piece alone. SentencePiece adds a space before it, this tokenizer none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from octavo.errors import ModelError
from octavo.store.gguf_vocabulary import CONTROL, ELSEWHERE, NORMAL, UNKNOWN, UNUSED, USER_DEFINED

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def sentencepiece_tokenizer(
    metadata: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int], *, where: str
) -> Tokenizer:
    """The tokenizer of the pieces `tokens` with types `kinds`, without BOS and EOS tokens.

    Raises ModelError if the metadata is broken, or needs a feature that byte-pair encoding cannot reproduce.
    """
    if metadata.get("tokenizer.ggml.precompiled_charsmap") or metadata.get("tokenizer.ggml.remove_extra_whitespaces"):
        raise ModelError(f"{where}: its tokenizer normalizes texts, which is not supported.", hint=ELSEWHERE)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    unknown = [token for token, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN]
    merges = _merges(tokens, kinds, _scores(metadata, len(tokens), where), where)
    tokenizer = Tokenizer(
        BPE(
            vocabulary,
            merges,
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)),
        )
    )
    user_defined = [token for token, kind in zip(tokens, kinds, strict=True) if kind == USER_DEFINED]
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    tokenizer.normalizer = _normalizer(user_defined, prefix=prefix)
    # Matched in the normalized text, as in SentencePiece: a space that belongs to the next piece stays part of it.
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=True) for token in user_defined])
    tokenizer.add_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (UNKNOWN, CONTROL)
        ]
    )
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)
    return tokenizer


def _normalizer(user_defined: Sequence[str], *, prefix: bool) -> Any:
    spaces = normalizers.Replace(" ", SPACE)
    if not prefix:
        return spaces
    # The library also normalizes the user-defined pieces, once; that must not change them.
    pieces = "|".join(re.escape(token.replace(" ", SPACE)) for token in user_defined)
    not_a_piece = rf"(?!(?:{pieces})\z)" if user_defined else ""
    return normalizers.Sequence([spaces, normalizers.Replace(Regex(rf"\A(?=[\s\S]){not_a_piece}"), SPACE)])


def _scores(metadata: Mapping[str, Any], count: int, where: str) -> list[float]:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) < count or not all(isinstance(score, float) for score in scores):
        raise ModelError(f"{where}: broken tokenizer: tokenizer.ggml.scores does not have a value for each token.")
    if not all(abs(score) < float("inf") for score in scores):
        raise ModelError(f"{where}: broken tokenizer: tokenizer.ggml.scores holds values that are not finite.")
    return scores[:count]


def _merges(tokens: Sequence[str], kinds: Sequence[int], scores: Sequence[float], where: str) -> list[tuple[str, str]]:
    """All (left, right) that concatenate to a piece, the highest score first."""
    score_of = {token: score for token, kind, score in zip(tokens, kinds, scores, strict=True) if kind == NORMAL}
    unused = {token for token, kind in zip(tokens, kinds, strict=True) if kind == UNUSED}
    ranked: list[tuple[float, int, str, str]] = []
    for token, score in score_of.items():
        if len(token) > 1 and not all(letter in score_of for letter in token):
            raise ModelError(
                f"{where}: the piece {token!r} of its tokenizer holds a character that is no piece.", hint=ELSEWHERE
            )
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in score_of and right in score_of:
                ranked.append((-score, cut, left, right))
            elif left in unused or right in unused:
                raise ModelError(
                    f"{where}: the unused piece {left if left in unused else right!r} of its tokenizer is part of "
                    f"another, {token!r}.",
                    hint=ELSEWHERE,
                )
    return [(left, right) for _, _, left, right in sorted(ranked)]
