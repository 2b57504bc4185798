"""The tokenizer inside a GGUF file, rebuilt so that its token ids are llama.cpp's and the original model's.

GGUF stores the vocabulary and the merges of a byte-level BPE tokenizer, but of the way text is split before
merging only a name (`tokenizer.ggml.pre`). PRE_TOKENIZERS holds the splits that are known exactly; any
other name is refused, because a wrong split trains on ids that the model has never seen together and
nothing would say so. Of a SentencePiece tokenizer it stores pieces and scores (store/gguf_sentencepiece.py).
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
    """The split of Qwen2 and Llama 3: alike but for how many digits stay together."""
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


# Name in tokenizer.ggml.pre -> the split. Sources: the models' tokenizer.json, llama.cpp's llama-vocab.cpp.
PRE_TOKENIZERS: dict[str, Callable[[], Any]] = {
    "gpt-2": _gpt2_split,
    "smollm": _smollm_split,
    "qwen2": lambda: _words_split(r"\p{N}"),
    "llama-bpe": lambda: _words_split(r"\p{N}{1,3}"),
}
KINDS = ("gpt2", "llama")  # tokenizer.ggml.model


def build_tokenizer(metadata: Mapping[str, Any], *, where: str, max_length: int) -> PreTrainedTokenizerFast:
    """The tokenizer that the GGUF `metadata` of the file `where` describes; `max_length` in tokens.

    Raises ModelError if the metadata is broken or describes a tokenizer that is not known exactly.
    """
    # Importing transformers takes seconds; opening a file for its weights alone must not pay them.
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
        tokenizer.post_processor = _begin(metadata, tokens, ids, starts=True)
    else:
        tokenizer = _byte_level_tokenizer(metadata, tokens, kinds, where)
        starts = metadata.get("tokenizer.ggml.pre") == "llama-bpe"
        begin, byte_level = _begin(metadata, tokens, ids, starts=starts), processors.ByteLevel(trim_offsets=False)
        tokenizer.post_processor = processors.Sequence([byte_level, begin]) if begin else byte_level
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0 if kind == "llama" else None)
    result = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        unk_token=tokens[unknown] if isinstance(unknown, int) and 0 <= unknown < len(tokens) else None,
        **{f"{role}_token": tokens[number] for role, number in ids.items() if number is not None},
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
    # Llama 3 takes a word that is itself a token whole, whether or not merges lead to it.
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


def _begin(metadata: Mapping[str, Any], tokens: list[str], ids: Mapping[str, int | None], *, starts: bool) -> Any:
    """What puts the begin token before a text, if the file asks for it; `starts` decides if it does not say."""
    begin = ids["bos"]
    if begin is None or not metadata.get("tokenizer.ggml.add_bos_token", starts):
        return None
    token = tokens[begin]
    return processors.TemplateProcessing(
        single=f"{token}:0 $A:0", pair=f"{token}:0 $A:0 {token}:1 $B:1", special_tokens=[(token, begin)]
    )


def _merges(metadata: Mapping[str, Any], vocabulary: Mapping[str, int], where: str) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    for merge in strings_of(metadata, "tokenizer.ggml.merges", where):
        # Byte-level BPE writes a space inside a token as another letter, so the one space here separates.
        left, _, right = merge.partition(" ")
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise ModelError(f"{where}: broken tokenizer: the merge {merge!r} does not join two tokens to a third.")
        merges.append((left, right))
    return merges
