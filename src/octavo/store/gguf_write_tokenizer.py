"""A tokenizer as the metadata of a GGUF file: the inverse of store/gguf_tokenizer.py.

GGUF has the name of a pre-tokenizer in place of its rules, and scores in place of SentencePiece's merges. So the name
is found by trial: the file's tokenizer, read back, must give the ids of the original for a text with everything that
pre-tokenizers treat differently.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from octavo.data.encoding import bos_ids
from octavo.errors import ModelError
from octavo.store.gguf_tokenizer import PRE_TOKENIZERS, build_tokenizer
from octavo.store.gguf_vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from octavo.store.gguf_write_config import MERGE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Digits, contractions in both cases, marks, runs of spaces and lines, letters beyond ASCII with and without marks of
# their own, signs of several bytes, control characters.
PROBE = (
    "Hello, World! It's 12:34 on 2024-05-06; they'LL pay $1234567.89 (or 1 000 000)... WE'RE don't I'M\n\n\n  indented"
    "\n\tcode = x1[2] += 0x3F; // a==b && c!=d\r\n   trailing   \n \n\u00fcber stra\u00dfe \u00c5ngstr\u00f6m "
    "nai\u0308ve cafe\u0301 \u4f60\u597d\u4e16\u754c \u3053\u3093\u306b\u3061\u306f \u0645\u0631\u062d\u0628\u0627 "
    "\U0001f600\U0001f44d\U0001f3fd \u2014 \u201cquotes\u201d \u2026 x\u00b2 \u00bd\u2028\u00a0end' 's'S 'Ll "
    "!!!???\t\t1a2b 123abc456 _under_score "
    "CamelCaseWords http://a.b/c?d=e#f @user #tag \x07 a\u200bb"
)  # fmt: skip


def tokenizer_metadata(
    tokenizer: PreTrainedTokenizerFast, vocabulary: int, *, end_ids: tuple[int, ...] = ()
) -> dict[str, Any]:
    """The entries tokenizer.* of a GGUF file, whose embedding has `vocabulary` rows.

    `end_ids` are the tokens that end an answer, from the generation config. ModelError if the file's tokenizer would
    give other ids.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"].get("type") != "BPE":
        raise ModelError(f"A {state['model'].get('type')} tokenizer cannot be written as GGUF.", hint=MERGE)
    common = _common(tokenizer, state, vocabulary, end_ids)
    expected = tokenizer.backend_tokenizer.encode(PROBE).ids
    for candidate in _candidates(state, common):
        metadata = {**common, **candidate}
        try:
            again = build_tokenizer(metadata, where="The tokenizer", max_length=vocabulary)
        except ModelError:
            continue
        if again.backend_tokenizer.encode(PROBE).ids == expected:
            return metadata
    raise ModelError(
        "The tokenizer splits text in a way that GGUF has no name for here: "
        f"octavo knows {', '.join(PRE_TOKENIZERS)}, and SentencePiece's BPE.",
        hint=MERGE,
    )


def _common(
    tokenizer: PreTrainedTokenizerFast, state: Mapping[str, Any], vocabulary: int, end_ids: tuple[int, ...]
) -> dict[str, Any]:
    tokens, kinds = _tokens(tokenizer, state, vocabulary)
    entries: dict[str, Any] = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_bos_token": bool(bos_ids(tokenizer)),
        "tokenizer.ggml.add_eos_token": False,
    }
    named = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "padding": tokenizer.pad_token_id}
    named["unknown"] = tokenizer.unk_token_id
    others = [number for number in end_ids if number != tokenizer.eos_token_id]
    named["eot"] = others[0] if others else None
    entries |= {f"tokenizer.ggml.{role}_token_id": int(number) for role, number in named.items() if number is not None}
    if isinstance(tokenizer.chat_template, str):
        entries["tokenizer.chat_template"] = tokenizer.chat_template
    return entries


def _tokens(
    tokenizer: PreTrainedTokenizerFast, state: Mapping[str, Any], vocabulary: int
) -> tuple[list[str], list[int]]:
    """(tokens by id, their types); ids without a token, of rows that pad the embedding, are unused tokens."""
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    added = {entry["id"]: CONTROL if entry["special"] else USER_DEFINED for entry in state["added_tokens"]}
    unknown, fallback = tokenizer.unk_token_id, bool(state["model"].get("byte_fallback"))
    tokens, kinds = [], []
    for number in range(vocabulary):
        token = by_id.get(number)
        tokens.append(f"[PAD{number}]" if token is None else token)
        if token is None:
            kinds.append(UNUSED)
        elif number == unknown and fallback:
            kinds.append(UNKNOWN)
        elif fallback and len(token) == 6 and token.startswith("<0x"):
            kinds.append(BYTE)
        else:
            kinds.append(added.get(number, NORMAL))
    return tokens, kinds


def _candidates(state: Mapping[str, Any], common: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What the tokenizer may be in GGUF: byte-level BPE with one of the known splits, or SentencePiece's BPE."""
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in state["model"]["merges"]]
    byte_level = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.merges": [" ".join(pair) for pair in pairs],
    }
    if not state["model"].get("byte_fallback"):
        yield from ({**byte_level, "tokenizer.ggml.pre": name} for name in PRE_TOKENIZERS)
        return
    rank: dict[str, int] = {}
    for number, (left, right) in enumerate(pairs):
        rank.setdefault(left + right, number)
    scores = [
        -float(rank.get(token, len(pairs) + number)) for number, token in enumerate(common["tokenizer.ggml.tokens"])
    ]
    for prefix in (True, False):
        yield {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.add_space_prefix": prefix,
        }
