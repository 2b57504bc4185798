"""Tokenizers of folders: those that would end the process, do not fit the weights or are missing."""

from __future__ import annotations

import base64
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from octavo.errors import ModelError
from octavo.store import tokenizer_files
from octavo.store.sources import FolderSource
from octavo.store.tokenizer_files import load_tokenizer
from octavo.store.tokenizer_limits import check_pipeline


def change(folder: Path, **parts: Any) -> None:
    """Sets keys of the folder's tokenizer.json."""
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **parts}))


def replace(old: Any, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": old, "content": new}


def sequence(*parts: Any, key: str = "normalizers") -> dict[str, Any]:
    return {"type": "Sequence", key: list(parts)}


def precompiled(*texts: str) -> dict[str, Any]:
    raw = (8).to_bytes(4, "little") + bytes(8) + b"".join(text.encode() + b"\0" for text in texts)
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(raw).decode()}


DOUBLES = replace({"String": "e"}, "ee")
TEMPLATE = {"type": "TemplateProcessing", "single": [], "pair": []}
BOMBS: dict[str, dict[str, Any]] = {
    "one of a million": {"normalizer": replace({"String": "e"}, "e" * 10**6)},
    "by a pattern": {"normalizer": replace({"Regex": "e"}, "e" * 10**6)},
    "forty that double": {"normalizer": sequence(*[DOUBLES] * 40)},
    "forty in one another": {"normalizer": sequence(DOUBLES, sequence(sequence(*[DOUBLES] * 39)))},
    "patterns of nothing": {"normalizer": sequence(*[replace({"Regex": "x*"}, "y")] * 40)},
    "put before": {"normalizer": {"type": "Prepend", "prepend": "x" * 10**6}},
    "precompiled": {"normalizer": precompiled("x" * 10**6)},
    "decoder": {"decoder": sequence(*[DOUBLES] * 40, key="decoders")},
    "padding": {"padding": {"strategy": {"Fixed": 10**12}, "direction": "Right"}},
    "padding to a multiple": {"padding": {"strategy": "BatchLongest", "pad_to_multiple_of": 10**12}},
    "tokens around": {"post_processor": {**TEMPLATE, "special_tokens": {"x": {"id": "x", "ids": [1] * 1000}}}},
    "template": {"post_processor": {**TEMPLATE, "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 1000}},
    "a long token": {"added_tokens": [{"id": 300, "content": "x" * 10**6}]},
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_tokenizer_that_enlarges_texts_without_bound_is_refused_before_it_runs(name: str, llama_folder: Path) -> None:
    change(llama_folder, **BOMBS[name])
    with pytest.raises(ModelError, match=r"tokenizer") as caught:
        load_tokenizer(llama_folder)
    assert "is not used" in caught.value.message


@pytest.mark.parametrize(
    "normalizer",
    [
        sequence({"type": "Prepend", "prepend": "▁"}, replace({"String": " "}, "▁")),
        sequence({"type": "NFKC"}, replace({"Regex": " {2,}"}, " "), replace({"String": "``"}, '"')),
        precompiled("fi", "…" * 3),
        None,
    ],
)
def test_common_tokenizer_parts_are_within_the_limits(normalizer: Any) -> None:
    check_pipeline({"normalizer": normalizer}, where="m")


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)+$", "( |  )+$"])
def test_an_endless_regular_expression_is_a_model_error(
    pattern: str, llama_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    change(llama_folder, pre_tokenizer=split)
    with pytest.raises(ModelError, match="fails on a text"):
        load_tokenizer(llama_folder)


@pytest.mark.parametrize(
    "content",
    ["[" * 200_000, '{"a":' * 5000 + "1" + "}" * 5000, "[]", "", "version https://git-lfs.github.com/spec/v1\n"],
)
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_the_error_of_broken_and_deep_files_names_the_file(content: str, file: str, llama_folder: Path) -> None:
    (llama_folder / file).write_text(content)
    with pytest.raises(ModelError, match=file):
        load_tokenizer(llama_folder)


def test_the_error_of_a_config_that_transformers_rejects_quotes_it(llama_folder: Path) -> None:
    config = json.loads((llama_folder / "config.json").read_text())
    (llama_folder / "config.json").write_text(json.dumps({**config, "initializer_range": "wide"}))
    with pytest.raises(ModelError, match=r"cannot be loaded \(.*initializer_range"):
        load_tokenizer(llama_folder)


def test_transformers_prints_no_text_from_the_files(
    llama_folder: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    config = json.loads((llama_folder / "config.json").read_text())
    (llama_folder / "config.json").write_text(json.dumps({**config, "model_type": "x\x1b]0;owned\x07"}))
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        with pytest.raises(ModelError, match="does not support"):
            FolderSource(llama_folder).tokenizer()
        (llama_folder / "config.json").write_text(json.dumps(config))
        FolderSource(llama_folder).tokenizer()
        assert logger.level == logging.INFO
    finally:
        logger.setLevel(level)
    shown = capfd.readouterr()
    assert shown.out + shown.err + caplog.text == ""


@pytest.mark.parametrize("lacking", [["sentencepiece"], ["protobuf"], ["sentencepiece", "protobuf"]])
def test_a_sentencepiece_model_alone_raises_an_error_with_the_packages(
    lacking: list[str], llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (llama_folder / "tokenizer.json").unlink()
    (llama_folder / "tokenizer.model").write_bytes(b"\n")
    monkeypatch.setattr(tokenizer_files, "_is_installed", lambda package: package not in lacking)
    with pytest.raises(ModelError, match=f"needs {' and '.join(lacking)}(.|\\n)*pip install sentencepiece protobuf"):
        load_tokenizer(llama_folder)


def more_tokens(folder: Path, role: str) -> PreTrainedTokenizerFast:
    """Saves the folder's tokenizer with a token more than the embedding has rows (300; the tokenizer has 258)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<filler_{number}>" for number in range(300 - len(tokenizer))])
    if role == "plain":
        tokenizer.add_tokens(["<extra_a>", "<extra_b>"])
    elif role != "none":
        tokenizer.add_special_tokens({f"{role}_token": "<extra_a>"})
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize(
    ("role", "message"),
    [
        ("plain", r"2 tokens .* beyond the 300 rows .*: '<extra_a>' \(300\), '<extra_b>' \(301\)\."),
        ("eos", r"1 tokens .* '<extra_a>' \(300\)\. Among them: eos_token\."),
        ("bos", r"'<extra_a>' \(300\)\. Among them: bos_token\."),
        ("pad", r"'<extra_a>' \(300\)\. Among them: pad_token\."),
    ],
)
def test_tokens_beyond_the_embedding_are_one_error(role: str, message: str, llama_folder: Path) -> None:
    more_tokens(llama_folder, role)
    with pytest.raises(ModelError, match=message) as caught:
        FolderSource(llama_folder).tokenizer()
    assert "resize_token_embeddings" in caught.value.hint


def test_as_many_tokens_as_embedding_rows_are_accepted(llama_folder: Path) -> None:
    more_tokens(llama_folder, "none")
    assert len(FolderSource(llama_folder).tokenizer()) == 300


def test_an_id_that_only_the_post_processor_adds_is_found(llama_folder: Path) -> None:
    one = {"SpecialToken": {"id": "<x>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    special = {"<x>": {"id": "<x>", "ids": [4096], "tokens": ["<x>"]}}
    change(
        llama_folder,
        post_processor={"type": "TemplateProcessing", "single": [one, text], "pair": [text], "special_tokens": special},
    )
    with pytest.raises(ModelError, match=r"id 4,096 .* 300 rows"):
        FolderSource(llama_folder).tokenizer()
