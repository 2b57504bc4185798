"""Loads the tokenizer of a folder with transformers, after its files have been checked against limits.

tokenizer.json is untrusted input, and the tokenizers library trusts it: a replacement of one character by a million, or
forty that double the text, ends the process. `check_pipeline` bounds the growth of a text. Endless regular expressions
are found by encoding short texts, on which the library's own limit stops them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.bounded_json import read_object, shortened, shown
from octavo.data.encoding import bos_ids
from octavo.data.panics import name_panics
from octavo.errors import ModelError
from octavo.store.foreign import refuse_pointer
from octavo.store.tokenizer_limits import check_pipeline

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Files with a tokenizer's vocabulary. For a folder without any of them transformers makes an empty tokenizer.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
OTHER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# For hints: hivemind/gpt-j-6B-8bit has only weights, no config.json and no tokenizer.
GPTJ_FILES = "for hivemind/gpt-j-6B-8bit and what was tuned from it, they are in EleutherAI/gpt-j-6B"
MAX_BYTES = 2**27  # the largest tokenizer.json known, of 262,144 tokens, has 33 MB
MAX_VALUES = 8_000_000
# Texts that reveal a regular expression with endless backtracking.
PROBES = tuple(letter * 200 + "\x00" for letter in ("a", "A", "1", " ", "\n", ".", "-", "\u00e9", "\u6f22", "a ", "a1"))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a folder. Code in the folder is never run.

    Raises ModelError if there is none, if a file is broken or exceeds a limit, if transformers cannot load it, and if
    it has no fast form or no EOS token.
    """
    from transformers import AutoTokenizer

    present = [name for name in VOCABULARY_FILES if (folder / name).is_file()]
    if not present:
        raise ModelError(
            f"{folder} has no tokenizer (none of {', '.join(VOCABULARY_FILES)}).",
            hint="Copy tokenizer.json and tokenizer_config.json of the model that the weights come from into it; "
            f"{GPTJ_FILES}.",
        )
    _check_files(folder, present)
    try:
        with name_panics(f"{folder}: its tokenizer"), quiet_transformers():
            tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(
                str(folder), use_fast=True, trust_remote_code=False, local_files_only=True
            )
    except ModelError:
        raise
    except Exception as error:  # transformers raises dozens of classes, also about config.json
        raise ModelError(
            f"{folder}: its tokenizer cannot be loaded ({shortened(f'{type(error).__name__}: {error}')}).",
            hint="transformers reads config.json, tokenizer_config.json and tokenizer.json: use those of the model's "
            "publisher, or correct what the message names.",
        ) from error
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise ModelError(
            f"{folder}: its tokenizer {'names no EOS token' if tokenizer.is_fast else 'has no fast form'}.",
            hint="octavo needs a tokenizer.json, and eos_token in tokenizer_config.json.",
        )
    if "tokenizer.json" not in present:
        check_pipeline(json.loads(tokenizer.backend_tokenizer.to_str()), where=str(folder))
    for text in PROBES:
        with name_panics(f"{folder}: its tokenizer"):
            try:
                tokenizer.backend_tokenizer.encode(text)
            except Exception:  # a word-level vocabulary without an unknown token: only its words can be encoded
                break
    return tokenizer


def check_ids(tokenizer: PreTrainedTokenizerFast, rows: int, *, where: str) -> None:
    """ModelError if the tokenizer has ids beyond the `rows` of the embedding.

    This includes control tokens: a chat template, an EOS token or padding would put them into the input.
    """
    beyond = sorted((token_id, token) for token, token_id in tokenizer.get_vocab().items() if token_id >= rows)
    if not beyond:
        added = [token_id for token_id in bos_ids(tokenizer) if token_id >= rows]
        if not added:
            return
        raise ModelError(
            f"{where}: its tokenizer puts the id {added[0]:,} into each text, but the embedding has {rows:,} rows.",
            hint="Use the tokenizer files that belong to the weights.",
        )
    some = ", ".join(f"{shown(token)} ({token_id})" for token_id, token in beyond[:3])
    roles = [name for name in ("bos", "eos", "pad", "unk") if (getattr(tokenizer, f"{name}_token_id") or 0) >= rows]
    special = f" Among them: {', '.join(f'{name}_token' for name in roles)}." if roles else ""
    raise ModelError(
        f"{where}: {len(beyond):,} tokens of its tokenizer are beyond the {rows:,} rows of the model's embedding: "
        f"{shortened(some)}{' and others' if len(beyond) > 3 else ''}.{special}",
        hint="They were added without resizing the model: call model.resize_token_embeddings(len(tokenizer)) in "
        "transformers and save it, or use the tokenizer files that belong to the weights.",
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences transformers' loggers, which print text from the files to the terminal unescaped."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check_files(folder: Path, present: list[str]) -> None:
    for name in (*present, "merges.txt"):
        path = folder / name
        if path.is_file():
            refuse_pointer(path)
            if path.stat().st_size > MAX_BYTES:
                raise ModelError(f"{path} is larger than the limit of {MAX_BYTES:,} bytes for a tokenizer's file.")
    for name in OTHER_FILES:
        if (folder / name).is_file():
            read_object(folder / name, error=ModelError)
    if "tokenizer.json" in present:
        path = folder / "tokenizer.json"
        content = read_object(path, error=ModelError, max_bytes=MAX_BYTES, max_values=MAX_VALUES, strict=False)
        check_pipeline(content, where=str(folder))
    elif present == ["tokenizer.model"]:
        missing = [package for package in ("sentencepiece", "protobuf") if not _is_installed(package)]
        if missing:
            raise ModelError(
                f"{folder} has its tokenizer as tokenizer.model alone; reading that needs {' and '.join(missing)}.",
                hint="Run `pip install sentencepiece protobuf`, or copy tokenizer.json of the model into the folder.",
            )


def _is_installed(package: str) -> bool:
    try:
        return find_spec("google.protobuf" if package == "protobuf" else package) is not None
    except ModuleNotFoundError:  # the parent package `google`
        return False
