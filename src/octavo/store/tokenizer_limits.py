"""Limits how much a tokenizer.json can enlarge a text, before the tokenizers library runs it."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from typing import Any

from octavo.errors import ModelError

MAX_GROWTH = 64  # output characters per input character, by all replacements together; tokenizers in use: 8
MAX_ADDED_TEXT = 64  # characters added before a text
MAX_ADDED_TOKENS = 64  # tokens added around a text
MAX_TOKEN_CHARACTERS = 2**13
MAX_PADDING = 2**20

_PARTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}


def check_pipeline(content: Mapping[str, Any], *, where: str) -> None:
    """ModelError if the tokenizer of this tokenizer.json could enlarge a text beyond the limits.

    Unknown structures are ignored here: the library rejects them.
    """
    for key, list_key in _PARTS.items():
        growth = 1.0
        for part in _flat(content.get(key), list_key):
            growth *= _growth(part, where)
            if growth > MAX_GROWTH:
                raise _too_large(where, f"its {key} makes more than {MAX_GROWTH} characters of one")
    for processor in _flat(content.get("post_processor"), "processors"):
        _check_template(processor, where)
    for name in ("strategy", "pad_to_multiple_of"):
        padding = content.get("padding")
        value = padding.get(name) if isinstance(padding, Mapping) else None
        value = value.get("Fixed") if isinstance(value, Mapping) else value
        if isinstance(value, int) and value > MAX_PADDING:
            raise _too_large(where, f"it pads texts to {value:,} tokens")
    if any(len(token) > MAX_TOKEN_CHARACTERS for token in _tokens(content)):
        raise _too_large(where, f"it has a token of more than {MAX_TOKEN_CHARACTERS:,} characters")


def _flat(part: Any, list_key: str) -> Iterator[Mapping[str, Any]]:
    """The parts of a pipeline in order. A Sequence may contain Sequences."""
    if not isinstance(part, Mapping):
        return
    if part.get("type") == "Sequence" and isinstance(part.get(list_key), list):
        for child in part[list_key]:
            yield from _flat(child, list_key)
    else:
        yield part


def _growth(part: Mapping[str, Any], where: str) -> float:
    """The largest number of output characters of a part per input character."""
    kind = part.get("type")
    if kind == "Replace":
        pattern, content = part.get("pattern"), part.get("content")
        n_characters = len(content) if isinstance(content, str) else 0
        if isinstance(pattern, Mapping) and isinstance(old := pattern.get("String"), str) and old:
            return max(1.0, n_characters / len(old))
        return 1.0 + n_characters  # a regular expression may match the empty string between any two characters
    if kind == "Prepend" and isinstance(added := part.get("prepend"), str) and len(added) > MAX_ADDED_TEXT:
        raise _too_large(where, f"its normalizer puts {len(added):,} characters before each text")
    if kind == "Precompiled" and _longest_precompiled(part.get("precompiled_charsmap")) > MAX_GROWTH:
        raise _too_large(where, f"its normalizer makes more than {MAX_GROWTH} characters of one")
    return 1.0


def _longest_precompiled(charsmap: Any) -> int:
    """Bytes of the longest replacement in SentencePiece's charsmap: trie size, trie, NUL-terminated texts."""
    if not isinstance(charsmap, str):
        return 0
    try:
        raw = base64.b64decode(charsmap)
    except (binascii.Error, ValueError):
        return 0
    texts = raw[4 + int.from_bytes(raw[:4], "little") :]
    return max((len(text) for text in texts.split(b"\0")), default=0)


def _check_template(processor: Mapping[str, Any], where: str) -> None:
    special = processor.get("special_tokens")
    values = special.values() if isinstance(special, Mapping) else ()
    sizes = {name: len(processor[name]) for name in ("single", "pair") if isinstance(processor.get(name), list)}
    ids = sum(
        len(value["ids"]) for value in values if isinstance(value, Mapping) and isinstance(value.get("ids"), list)
    )
    if ids > MAX_ADDED_TOKENS or max(sizes.values(), default=0) > MAX_ADDED_TOKENS:
        raise _too_large(where, f"it puts more than {MAX_ADDED_TOKENS} tokens around each text")


def _tokens(content: Mapping[str, Any]) -> Iterator[str]:
    model, added = content.get("model"), content.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocabulary, Mapping):
        yield from vocabulary
    elif isinstance(vocabulary, list):
        yield from (str(item[0]) for item in vocabulary if isinstance(item, list) and item)
    if isinstance(added, list):
        yield from (str(token.get("content")) for token in added if isinstance(token, Mapping))


def _too_large(where: str, what: str) -> ModelError:
    return ModelError(
        f"{where}: its tokenizer is not used: {what}.",
        hint="Use the tokenizer files of the model's publisher.",
    )
