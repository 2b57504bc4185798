"""Rebuilds the tokenizer of a GGUF file, with the token ids of llama.cpp and of the original model.

GGUF stores the vocabulary and the merges of a byte-level BPE tokenizer, but only the name of its pre-tokenizer
(`tokenizer.ggml.pre`). PRE_TOKENIZERS contains the ones that are known exactly. Any other name is an error: a wrong
split would give ids that the model was not trained on, and nothing would report it. For a SentencePiece tokenizer GGUF
stores pieces and scores (store/gguf_sentencepiece.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from octavo.bounded_json import shown
from octavo.errors import ModelError
from octavo.store.gguf_sentencepiece import sentencepiece_tokenizer
from octavo.store.gguf_vocabulary import (
    CONTROL,
    ELSEWHERE,
    UNKNOWN,
    USER_DEFINED,
    special_ids,
    strings_of,
    vocabulary_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def _gpt2_split() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm_split() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2_split()])


def _words_split(digits: str) -> Any:
    """The pre-tokenizer of Qwen2 and Llama 3, which differ only in the number of digits that stay together."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


# Name in tokenizer.ggml.pre -> pre-tokenizer. Sources: the models' tokenizer.json, llama.cpp's llama-vocab.cpp.
PRE_TOKENIZERS: dict[str, Callable[[], Any]] = {
    "gpt-2": _gpt2_split,
    "smollm": _smollm_split,
    "starcoder": _smollm_split,
    "refact": _smollm_split,  # StarCoder's tokenizer in Granite's files too
    "qwen2": lambda: _words_split(r"\p{N}"),
    "llama-bpe": lambda: _words_split(r"\p{N}{1,3}"),
}
KINDS = ("gpt2", "llama")  # tokenizer.ggml.model


def build_tokenizer(metadata: Mapping[str, Any], *, where: str, max_length: int) -> PreTrainedTokenizerFast:
    """The tokenizer of the GGUF file `where` with this `metadata`; `max_length` in tokens.

    Raises ModelError if the metadata is broken or describes a tokenizer that octavo cannot reproduce exactly.
    """
    # Importing transformers takes seconds, which opening a file for its weights alone should not cost.
    from transformers import PreTrainedTokenizerFast

    kind = metadata.get("tokenizer.ggml.model")
    if kind not in KINDS:
        raise ModelError(
            f"{where}: its tokenizer (tokenizer.ggml.model {shown(kind)}) is not known exactly; known are "
            "byte-level BPE ('gpt2') and SentencePiece's BPE ('llama').",
            hint=ELSEWHERE,
        )
    tokens, kinds = vocabulary_of(metadata, where)
    if len(set(tokens)) != len(tokens):
        raise ModelError(f"{where}: broken tokenizer: a token comes twice in its vocabulary.")
    ids = special_ids(metadata, where)
    if kind == "llama":
        tokenizer = sentencepiece_tokenizer(metadata, tokens, kinds, where=where)
        tokenizer.post_processor = _bos_processor(metadata, tokens, ids, default=True)
    else:
        tokenizer = _byte_level_tokenizer(metadata, tokens, kinds, where)
        default = metadata.get("tokenizer.ggml.pre") == "llama-bpe"
        bos = _bos_processor(metadata, tokens, ids, default=default)
        byte_level = processors.ByteLevel(trim_offsets=False)
        tokenizer.post_processor = processors.Sequence([byte_level, bos]) if bos else byte_level
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0 if kind == "llama" else None)
    result = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        unk_token=tokens[unknown] if isinstance(unknown, int) and 0 <= unknown < len(tokens) else None,
        **{f"{role}_token": tokens[token_id] for role, token_id in ids.items() if token_id is not None},
    )
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        result.chat_template = template
    return result


def _byte_level_tokenizer(metadata: Mapping[str, Any], tokens: list[str], kinds: list[int], where: str) -> Tokenizer:
    split = metadata.get("tokenizer.ggml.pre")
    if not isinstance(split, str) or split not in PRE_TOKENIZERS:
        raise ModelError(
            f"{where}: its tokenizer (byte-level BPE, split {shown(split)}) is not known exactly; known are the splits "
            f"{', '.join(PRE_TOKENIZERS)}.",
            hint=ELSEWHERE,
        )
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = _merges(metadata, vocabulary, where)
    # Llama 3 keeps a word that is itself a token whole, whether or not merges lead to it.
    tokenizer = Tokenizer(BPE(vocabulary, merges, ignore_merges=split == "llama-bpe"))
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[split]()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind != USER_DEFINED, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ]
    )
    return tokenizer


def _bos_processor(
    metadata: Mapping[str, Any], tokens: list[str], ids: Mapping[str, int | None], *, default: bool
) -> Any:
    """The processor that adds the BOS token before a text, or None; `default` applies if the file does not say."""
    bos = ids["bos"]
    if bos is None or not metadata.get("tokenizer.ggml.add_bos_token", default):
        return None
    token = tokens[bos]
    return processors.TemplateProcessing(
        single=f"{token}:0 $A:0", pair=f"{token}:0 $A:0 {token}:1 $B:1", special_tokens=[(token, bos)]
    )


def _merges(metadata: Mapping[str, Any], vocabulary: Mapping[str, int], where: str) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    for merge in strings_of(metadata, "tokenizer.ggml.merges", where):
        # Byte-level BPE maps a space inside a token to another character, so the only space is the separator.
        left, _, right = merge.partition(" ")
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise ModelError(f"{where}: broken tokenizer: the merge {merge!r} does not join two tokens to a third.")
        merges.append((left, right))
    return merges
