"""The tokenizer inside a GGUF file, rebuilt so that its token ids are llama.cpp's and the original model's.

GGUF stores the vocabulary and the merges of a byte-level BPE tokenizer, but of the way text is split before
merging only a name (`tokenizer.ggml.pre`). PRE_TOKENIZERS holds the splits that are known exactly; any
other name is refused, because a wrong split trains on ids that the model has never seen together and
nothing would say so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from octavo.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# tokenizer.ggml.token_type: what is not ordinary text. Source: gguf.constants.TokenType.
UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5

# A pad equal to the end token would hide the end token from every loss mask made from pads. Where a file says
# that, the first of these that is one of its control tokens is taken instead.
PAD_TOKENS = ("<|finetune_right_pad_id|>", "<|endoftext|>", "<pad>", "[PAD]")

_ELSEWHERE = "Give the Hugging Face folder or id of the same model instead of the GGUF file."


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


def build_tokenizer(metadata: Mapping[str, Any], *, where: str, max_length: int) -> PreTrainedTokenizerFast:
    """The tokenizer that the GGUF `metadata` of the file `where` describes; `max_length` in tokens.

    Raises ModelError if the metadata is broken or describes a tokenizer that is not known exactly.
    """
    # Importing transformers takes seconds; opening a file for its weights alone must not pay them.
    from transformers import PreTrainedTokenizerFast

    kind, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or not isinstance(split, str) or split not in PRE_TOKENIZERS:
        raise ModelError(
            f"{where}: its tokenizer (model {kind!r}, split {split!r}) is not known exactly; "
            f"known is byte-level BPE (model 'gpt2') with the splits {', '.join(PRE_TOKENIZERS)}.",
            hint=_ELSEWHERE,
        )
    tokens, kinds = _vocabulary(metadata, where)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ModelError(f"{where}: broken tokenizer: a token comes twice in its vocabulary.")
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
    ids = special_ids(metadata, where)
    tokenizer.post_processor = _post_processor(metadata, tokens, ids, starts=split == "llama-bpe")
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
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


def special_ids(metadata: Mapping[str, Any], where: str) -> dict[str, int | None]:
    """The ids of the tokens that begin ("bos"), end ("eos") and pad ("pad") a text; None where there is none.

    Raises ModelError if an id lies outside the vocabulary, or if no end token is named.
    """
    tokens, kinds = _vocabulary(metadata, where)
    named = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id"}
    ids: dict[str, int | None] = {}
    for role, key in named.items():
        number = metadata.get(f"tokenizer.ggml.{key}")
        if number is not None and not (isinstance(number, int) and 0 <= number < len(tokens)):
            raise ModelError(f"{where}: tokenizer.ggml.{key} is {number!r}, outside its {len(tokens):,} tokens.")
        ids[role] = number
    if ids["eos"] is None:
        raise ModelError(f"{where}: the file does not say which token ends a text.", hint=_ELSEWHERE)
    if ids["pad"] in (None, ids["eos"]):
        control = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == CONTROL}
        others = [control[token] for token in PAD_TOKENS if control.get(token, ids["eos"]) != ids["eos"]]
        ids["pad"] = others[0] if others else ids["eos"]
    return ids


def _post_processor(
    metadata: Mapping[str, Any], tokens: list[str], ids: Mapping[str, int | None], *, starts: bool
) -> Any:
    """Puts the begin token before a text if the file asks for it; `starts` decides if it does not say."""
    byte_level = processors.ByteLevel(trim_offsets=False)
    begin = ids["bos"]
    if begin is None or not metadata.get("tokenizer.ggml.add_bos_token", starts):
        return byte_level
    token = tokens[begin]
    template = processors.TemplateProcessing(
        single=f"{token}:0 $A:0", pair=f"{token}:0 $A:0 {token}:1 $B:1", special_tokens=[(token, begin)]
    )
    return processors.Sequence([byte_level, template])


def _merges(metadata: Mapping[str, Any], vocabulary: Mapping[str, int], where: str) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    for merge in _strings(metadata, "tokenizer.ggml.merges", where):
        # Byte-level BPE writes a space inside a token as another letter, so the one space here separates.
        left, _, right = merge.partition(" ")
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise ModelError(f"{where}: broken tokenizer: the merge {merge!r} does not join two tokens to a third.")
        merges.append((left, right))
    return merges


def _vocabulary(metadata: Mapping[str, Any], where: str) -> tuple[list[str], list[int]]:
    """The tokens by id, and the token type of each."""
    tokens = _strings(metadata, "tokenizer.ggml.tokens", where)
    kinds = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise ModelError(f"{where}: broken tokenizer: tokenizer.ggml.token_type does not have a value for each token.")
    # Rows that pad the embedding to a round number are listed as unused tokens: not part of the tokenizer.
    used = len(tokens)
    while used and kinds[used - 1] == UNUSED:
        used -= 1
    return tokens[:used], kinds[:used]


def _strings(metadata: Mapping[str, Any], key: str, where: str) -> list[str]:
    values = metadata.get(key)
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise ModelError(f"{where}: {key} is missing or is not a list of strings.", hint=_ELSEWHERE)
    return values
