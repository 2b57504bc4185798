"""The vocabulary in the metadata of a GGUF file: tokens, token types, and the BOS, EOS and padding tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.errors import ModelError
from octavo.store.tokenizer_limits import MAX_TOKEN_CHARACTERS

# tokenizer.ggml.token_type. Source: gguf.constants.TokenType.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# A padding token equal to the EOS token would remove the EOS token from every loss mask that is made from padding. If a
# file has that, the first of these that is one of its control tokens is used instead.
PAD_TOKENS = ("<|finetune_right_pad_id|>", "<|endoftext|>", "<pad>", "[PAD]")

ELSEWHERE = "Give the Hugging Face folder or id of the same model instead of the GGUF file."
# llama.cpp's defaults for a SentencePiece vocabulary.
SENTENCEPIECE_IDS = {"bos": 1, "eos": 2}


def special_ids(metadata: Mapping[str, Any], where: str) -> dict[str, int | None]:
    """The ids of the BOS ("bos"), EOS ("eos") and padding ("pad") tokens; None for a token that does not exist.

    Raises ModelError if an id is outside the vocabulary, or if there is no EOS token.
    """
    tokens, kinds = vocabulary_of(metadata, where)
    named = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id"}
    defaults = SENTENCEPIECE_IDS if metadata.get("tokenizer.ggml.model") == "llama" else {}
    ids: dict[str, int | None] = {}
    for role, key in named.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}", defaults.get(role))
        if token_id is not None and not (type(token_id) is int and 0 <= token_id < len(tokens)):
            raise ModelError(f"{where}: tokenizer.ggml.{key} is {token_id!r}, outside its {len(tokens):,} tokens.")
        ids[role] = token_id
    if ids["eos"] is None:
        raise ModelError(f"{where}: the file names no EOS token (tokenizer.ggml.eos_token_id).", hint=ELSEWHERE)
    if ids["pad"] in (None, ids["eos"]):
        control = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == CONTROL}
        others = [control[token] for token in PAD_TOKENS if control.get(token, ids["eos"]) != ids["eos"]]
        ids["pad"] = others[0] if others else ids["eos"]
    return ids


def vocabulary_of(metadata: Mapping[str, Any], where: str) -> tuple[list[str], list[int]]:
    """(tokens by id, token type of each)."""
    tokens = strings_of(metadata, "tokenizer.ggml.tokens", where)
    kinds = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise ModelError(f"{where}: broken tokenizer: tokenizer.ggml.token_type does not have a value for each token.")
    # Rows that pad the embedding to a round size are listed as unused tokens; they are not part of the tokenizer.
    used = len(tokens)
    while used and kinds[used - 1] == UNUSED:
        used -= 1
    if any(len(token) > MAX_TOKEN_CHARACTERS for token in tokens):
        raise ModelError(f"{where}: broken tokenizer: a token has more than {MAX_TOKEN_CHARACTERS:,} characters.")
    return tokens[:used], kinds[:used]


def strings_of(metadata: Mapping[str, Any], key: str, where: str) -> list[str]:
    values = metadata.get(key)
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise ModelError(f"{where}: {key} is missing or is not a list of strings.", hint=ELSEWHERE)
    return values
