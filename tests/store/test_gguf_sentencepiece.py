"""SentencePiece tokenizers of GGUF files give the ids of sentencepiece itself."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
from hypothesis import assume, example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from octavo.data.bytes import token_bytes
from octavo.data.encoding import bos_ids, coder_of
from octavo.errors import ModelError
from octavo.store.gguf_header import read_header
from octavo.store.gguf_tokenizer import build_tokenizer

LINES = [
    "the king spoke to the queen of the storm and the sea, where is my lord the duke of york?",
    "def f(x):\n    if x == 1:\n        return  x\n\n\treturn 2023 + 0.5",
    "hello    world  with   runs of        spaces,  naïve café 漢字かな",
    "aaa aaaa aaaaaa bbbb abab ababab aabb",
]
OWN = ["<ud>", "▁▁▁▁", "<|user|>", "\n\n"]  # user-defined pieces
CONTROL = ["[INST]", "<pad>"]
PIECES = [
    "a", "b", "aa", "ab", " ", "  ", "    ", "the king", "king", "\n", "\n\n", "\t", "é", "e\u0301", "漢",
    "😀", "\U0001f469\u200d\U0001f469", "\u200b",
    "\x00", "▁", "<0x41>", "<s>", "</s>", "<unk>", "[INST]", "<ud>", "<|user|>", "2023", "ﬁ", "\u00a0", "\r\n", "ж",
]  # fmt: skip
TEXT = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=14).map("".join)


def trained(**options: Any) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in LINES for line in text.split("\n")] * 20), model_writer=model,
        vocab_size=460 if options.get("byte_fallback") else 200, model_type="bpe",
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, user_defined_symbols=OWN, control_symbols=CONTROL, num_threads=1,
        character_coverage=0.999, minloglevel=2, **options,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def metadata(processor: sentencepiece.SentencePieceProcessor, **changes: Any) -> dict[str, Any]:
    """What convert_hf_to_gguf.py writes of a SentencePiece model."""
    count = processor.get_piece_size()
    tokens = [processor.id_to_piece(number) for number in range(count)]

    def kind(number: int) -> int:
        if processor.is_unknown(number):
            return 2
        if processor.is_control(number):
            return 3
        return 6 if processor.is_byte(number) else 4 if tokens[number] in OWN else 1

    entries = {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": [float(processor.get_score(number)) for number in range(count)],
        "token_type": [kind(number) for number in range(count)],
        "bos_token_id": processor.bos_id(),
        "eos_token_id": processor.eos_id(),
        "unknown_token_id": processor.unk_id(),
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in entries.items() if value is not None}


def build(entries: dict[str, Any]) -> Any:
    return build_tokenizer(entries, where="m.gguf", max_length=77)


OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {"byte_fallback": True},
    "no prefix": {"byte_fallback": True, "add_dummy_prefix": False},
    "no bytes": {"byte_fallback": False},
    "digits apart": {"byte_fallback": True, "split_digits": True, "split_by_whitespace": False},
}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, tuple[sentencepiece.SentencePieceProcessor, Any]]:
    built = {}
    for name, options in OPTIONS.items():
        theirs = trained(**options)
        built[name] = theirs, build(metadata(theirs, add_space_prefix=options.get("add_dummy_prefix")))
    return built


@pytest.mark.parametrize("name", OPTIONS)
@given(text=TEXT)
@example(text="")
@example(text=" ")
@example(text="<ud> the king")
@example(text="the king<|user|>\n\n    spoke")
@example(text="aaaaaaaaaaa" + " " * 33 + "abababab")
@example(text="".join(LINES))
def test_ids_equal_those_of_sentencepiece(tokenizers: dict[str, tuple[Any, Any]], name: str, text: str) -> None:
    theirs, ours = tokenizers[name]
    assume(text.replace(" ", "▁") not in OWN or name == "no prefix")  # the one text that is encoded differently
    assert coder_of(ours).plain.encode(text, add_special_tokens=False).ids == theirs.encode(text)


@given(text=TEXT)
def test_text_round_trips(tokenizers: dict[str, tuple[Any, Any]], text: str) -> None:
    text = text.replace("▁", " ")  # the same to SentencePiece
    theirs, ours = tokenizers["llama"]
    assume(text not in [piece.replace("▁", " ") for piece in OWN])
    ids = coder_of(ours).plain.encode(text, add_special_tokens=False).ids
    assert ours.decode(ids) == theirs.decode(ids) == text


def test_every_byte_of_a_text_is_counted(tokenizers: dict[str, tuple[Any, Any]]) -> None:
    _, ours = tokenizers["llama"]
    text = "".join(LINES) + "😀 <ud>"
    ids = coder_of(ours).plain.encode(text, add_special_tokens=False).ids
    assert token_bytes(ours)[ids].sum() == len(text.encode()) + 1  # and the space that is put before


def test_a_file_written_by_the_gguf_library_gives_the_same_tokenizer(tmp_path: Path) -> None:
    theirs = trained(byte_fallback=True)
    entries = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata(theirs).items()}
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(entries["tokens"])
    writer.add_token_scores(entries["scores"])
    writer.add_token_types(entries["token_type"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_space_prefix(True)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = build(read_header(tmp_path / "m.gguf").metadata)
    for line in LINES:
        assert ours(line)["input_ids"] == [1, *theirs.encode(line)]


@given(text=TEXT)
@example(text="a    b" + " " * 9 + "\n\n    c")
def test_user_defined_pieces_of_spaces_may_be_stored_as_spaces(text: str) -> None:
    """As convert_hf_to_gguf.py stores those of Gemma."""
    theirs, ours = spaces_as_spaces()
    ids = coder_of(ours).plain.encode(text, add_special_tokens=False).ids
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == theirs.decode(ids)


@cache
def spaces_as_spaces() -> tuple[Any, Any]:
    theirs = trained(byte_fallback=True, add_dummy_prefix=False)
    entries = metadata(theirs, add_space_prefix=False)
    entries["tokenizer.ggml.tokens"] = [
        token.replace("\u2581", " ") if token in OWN else token for token in entries["tokenizer.ggml.tokens"]
    ]
    return theirs, build(entries)


@pytest.mark.parametrize(("add_bos", "expected"), [(None, [1]), (True, [1]), (False, [])])
def test_the_bos_token_comes_first_unless_the_file_disables_it(add_bos: bool | None, expected: list[int]) -> None:
    theirs = trained(byte_fallback=True)
    ours = build(metadata(theirs, add_bos_token=add_bos))
    assert bos_ids(ours) == expected
    assert ours("the king")["input_ids"] == [*expected, *theirs.encode("the king")]
    assert (ours.bos_token, ours.eos_token, ours.unk_token, ours.model_max_length) == ("<s>", "</s>", "<unk>", 77)


def test_default_special_ids_are_sentencepieces() -> None:
    ours = build(metadata(trained(byte_fallback=True), bos_token_id=None, eos_token_id=None, unknown_token_id=None))
    assert (ours.bos_token, ours.eos_token, ours.unk_token) == ("<s>", "</s>", "<unk>")


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2", "gemma3_text"])
def test_a_saved_tokenizer_gives_the_same_ids(
    tokenizers: dict[str, tuple[Any, Any]], model_type: str, tmp_path: Path
) -> None:
    _, ours = tokenizers["llama"]
    ours.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*LINES, "", "<ud> x", "[INST] hello [/INST]", "  a", "😀"]:
        assert again(text)["input_ids"] == ours(text)["input_ids"]
        assert again.decode(again(text)["input_ids"]) == ours.decode(ours(text)["input_ids"])


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "scores missing": ({"scores": None}, "scores"),
    "scores too few": ({"scores": [0.0]}, "scores"),
    "scores not finite": ({"scores": [float("nan")] * 460}, "not finite"),
    "a normalizer": ({"precompiled_charsmap": [1, 2, 3]}, "normalizes"),
    "white space removed": ({"remove_extra_whitespaces": True}, "normalizes"),
    "end token outside": ({"eos_token_id": 9999}, "9999"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_or_unsupported_metadata_is_refused(case: str) -> None:
    changes, named = BROKEN[case]
    with pytest.raises(ModelError, match=named):
        build(metadata(trained(byte_fallback=True), **changes))
