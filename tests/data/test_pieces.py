"""The pieces from a tokenizer's pattern equal those of its pre-tokenizer, or the text is not split."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.data.test_cuts import LLAMA_3, TEXTS, byte_level, made, split
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from octavo.data.pieces import Pieces

KNOWN = ("gpt-2", "digits", "llama 3")


def theirs(tokenizer: Tokenizer, text: str) -> list[str]:
    """The tokenizer's own split of a text."""
    return [text[start:end] for _, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


@pytest.fixture(scope="module")
def splitters() -> dict[str, tuple[Tokenizer, Pieces]]:
    tokenizers = {name: made(name).backend_tokenizer for name in KNOWN}
    return {name: (one, Pieces(one)) for name, one in tokenizers.items()}


@pytest.mark.parametrize("name", KNOWN)
@given(text=st.one_of(TEXTS, st.text(st.characters(max_codepoint=0x52F, exclude_categories=["Cs"]))))
def test_pieces_equal_those_of_the_pre_tokenizer(
    splitters: dict[str, tuple[Tokenizer, Pieces]], name: str, text: str
) -> None:
    tokenizer, pieces = splitters[name]
    (actual,) = pieces.split([text])
    assert actual == [text] or actual == theirs(tokenizer, text)


@pytest.mark.parametrize("name", KNOWN)
def test_a_usual_text_is_split(splitters: dict[str, tuple[Tokenizer, Pieces]], name: str) -> None:
    tokenizer, pieces = splitters[name]
    text = "It's 1,204 sacks — “quoted”, naïve Ελλάς: Привет…\n\n\tx_1  end"
    assert list(pieces.split([text, "世界"])) == [theirs(tokenizer, text), ["世界"]]


def with_normalizer(normalizer: Any) -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizer
    return tokenizer


def of_words() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


UNKNOWN: dict[str, Any] = {
    "lower case": lambda: with_normalizer(normalizers.Lowercase()),
    "a space before": lambda: byte_level(prefix=True),
    "two patterns": lambda: byte_level(split(r"[\r\n]"), split(LLAMA_3), regex=False),
    "gaps between matches": lambda: byte_level(split(r"\p{L}+"), regex=False),
    "groups": lambda: byte_level(split("(" + LLAMA_3 + ")"), regex=False),
    "words": of_words,
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_text_is_not_split_for_an_unknown_pre_tokenizer(name: str) -> None:
    assert list(Pieces(UNKNOWN[name]()).split(["the king ab"])) == [["the king ab"]]


def test_with_nfc_only_ascii_is_split() -> None:
    pieces = Pieces(with_normalizer(normalizers.NFC()))
    assert list(pieces.split(["a b", "é b"])) == [["a", " b"], ["é b"]]


def test_a_text_with_an_added_token_is_not_split() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<think>")])
    assert list(Pieces(tokenizer).split(["a <think> b", "a b"])) == [["a <think> b"], ["a", " b"]]
