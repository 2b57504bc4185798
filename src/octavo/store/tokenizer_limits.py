"""How much the parts of a tokenizer.json can enlarge a text, bounded before the tokenizers library runs them."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from typing import Any

from octavo.errors import ModelError

MAX_GROWTH = 64  # characters made of one, by all replacements together; tokenizers in use: 8
MAX_ADDED_TEXT = 64  # characters put before a text
MAX_ADDED_TOKENS = 64  # tokens put around a text
MAX_TOKEN_CHARACTERS = 2**13
MAX_PADDING = 2**20

_PARTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}


def check_pipeline(content: Mapping[str, Any], *, where: str) -> None:
    """ModelError if a text could grow beyond bounds on its way through the tokenizer of this tokenizer.json.

    What is not of the known form is left to the library, which refuses it.
    """
    for key, inner in _PARTS.items():
        growth = 1.0
        for part in _flat(content.get(key), inner):
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


def _flat(part: Any, inner: str) -> Iterator[Mapping[str, Any]]:
    """The parts of a pipeline in order; sequences may hold sequences."""
    if not isinstance(part, Mapping):
        return
    if part.get("type") == "Sequence" and isinstance(part.get(inner), list):
        for each in part[inner]:
            yield from _flat(each, inner)
    else:
        yield part


def _growth(part: Mapping[str, Any], where: str) -> float:
    """How many characters the part makes of one at most."""
    kind = part.get("type")
    if kind == "Replace":
        pattern, made = part.get("pattern"), part.get("content")
        made_characters = len(made) if isinstance(made, str) else 0
        if isinstance(pattern, Mapping) and isinstance(old := pattern.get("String"), str) and old:
            return max(1.0, made_characters / len(old))
        return 1.0 + made_characters  # a regular expression may match nothing between any two characters
    if kind == "Prepend" and isinstance(added := part.get("prepend"), str) and len(added) > MAX_ADDED_TEXT:
        raise _too_large(where, f"its normalizer puts {len(added):,} characters before each text")
    if kind == "Precompiled" and _longest_precompiled(part.get("precompiled_charsmap")) > MAX_GROWTH:
        raise _too_large(where, f"its normalizer makes more than {MAX_GROWTH} characters of one")
    return 1.0


def _longest_precompiled(charsmap: Any) -> int:
    """Bytes of the longest replacement in SentencePiece's table: the size of a trie, the trie, texts ended by NUL."""
    if not isinstance(charsmap, str):
        return 0
    try:
        raw = base64.b64decode(charsmap)
    except (binascii.Error, ValueError):
        return 0
    texts = raw[4 + int.from_bytes(raw[:4], "little") :]
    return max((len(text) for text in texts.split(b"\0")), default=0)


def _check_template(processor: Mapping[str, Any], where: str) -> None:
    specials = processor.get("special_tokens")
    values = specials.values() if isinstance(specials, Mapping) else ()
    sizes = {name: len(processor[name]) for name in ("single", "pair") if isinstance(processor.get(name), list)}
    ids = sum(len(each["ids"]) for each in values if isinstance(each, Mapping) and isinstance(each.get("ids"), list))
    if ids > MAX_ADDED_TOKENS or max(sizes.values(), default=0) > MAX_ADDED_TOKENS:
        raise _too_large(where, f"it puts more than {MAX_ADDED_TOKENS} tokens around each text")


def _tokens(content: Mapping[str, Any]) -> Iterator[str]:
    model, added = content.get("model"), content.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocabulary, Mapping):
        yield from vocabulary
    elif isinstance(vocabulary, list):
        yield from (str(each[0]) for each in vocabulary if isinstance(each, list) and each)
    if isinstance(added, list):
        yield from (str(each.get("content")) for each in added if isinstance(each, Mapping))


def _too_large(where: str, what: str) -> ModelError:
    return ModelError(
        f"{where}: its tokenizer is not used: {what}.",
        hint="Take the tokenizer files of the model's publisher.",
    )
