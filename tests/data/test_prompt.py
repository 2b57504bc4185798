"""Prompts have the form of the training data: a BOS token if the model has one, and control strings stay text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from octavo.data.encoding import bos_ids
from octavo.data.prompt import encode_conversation, encode_prompt
from octavo.data.records import Document
from octavo.data.tokens import encode
from octavo.data.turns import Message
from octavo.errors import ModelError, UsageError

UNHURRIED = settings(deadline=None)  # other processes may slow a machine down
BEGIN, END = "<|im_start|>", "<|im_end|>"
CONTROLS = ("<|endoftext|>", BEGIN, END)
TEXT = st.text(st.sampled_from("ae \n世😀<|>_imstarendoftext"), max_size=20)
WITH_CONTROLS = st.lists(TEXT | st.sampled_from(CONTROLS), max_size=6).map("".join)
ROLES = st.sampled_from(["system", "user", "assistant"])
# Hypothesis also tries strings from the code: transformers reads that of a control token as the token, octavo as text.
WORDS = TEXT.filter(lambda text: not any(name in text for name in CONTROLS))
TALK = st.lists(st.tuples(ROLES, WORDS), min_size=1, max_size=5)


def add_around(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    """Makes the tokenizer add control tokens around every text, as a Llama's adds its BOS token."""
    numbers = [(name, tokenizer.convert_tokens_to_ids(name)) for name in (BEGIN, END)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=numbers)
    return tokenizer


@pytest.mark.parametrize(
    ("template", "begins"), [("$A", False), (f"{BEGIN} $A", True), (f"{BEGIN} $A {END}", True), (f"$A {END}", False)]
)
def test_a_prompt_has_the_bos_token_if_the_tokenizer_adds_it(
    tokenizer_copy: PreTrainedTokenizerFast, template: str, begins: bool
) -> None:
    tokenizer = add_around(tokenizer_copy, template)
    expected = [tokenizer.bos_token_id] if begins else []
    assert bos_ids(tokenizer) == expected
    bare = tokenizer.encode("the rain", add_special_tokens=False)
    assert encode_prompt("the rain", tokenizer) == [*expected, *bare]


def test_an_added_eos_token_is_no_bos_token_even_if_both_are_the_same(
    tokenizer_copy: PreTrainedTokenizerFast,
) -> None:
    tokenizer_copy.bos_token = END
    assert bos_ids(add_around(tokenizer_copy, f"$A {END}")) == []
    assert bos_ids(add_around(tokenizer_copy, f"{END} $A")) == [tokenizer_copy.eos_token_id]


def test_any_token_that_the_tokenizer_adds_first_is_kept(
    tokenizer_copy: PreTrainedTokenizerFast,
) -> None:
    tokenizer_copy.bos_token = None
    assert bos_ids(tokenizer_copy) == []
    tokenizer = add_around(tokenizer_copy, f"{BEGIN} $A")
    assert encode_prompt("the rain", tokenizer) == tokenizer.encode("the rain")


@pytest.mark.parametrize("template", ["$A", f"{BEGIN} $A"])
def test_a_prompt_begins_with_the_same_ids_as_the_trained_text(
    tokenizer_copy: PreTrainedTokenizerFast, template: str
) -> None:
    tokenizer = add_around(tokenizer_copy, template)
    text = "The quality of mercy <|im_end|> is not strained"
    trained = encode(Document("f", 1, text=text), tokenizer)
    assert [*encode_prompt(text, tokenizer), tokenizer.eos_token_id] == trained.ids.tolist()


@UNHURRIED
@given(text=WITH_CONTROLS)
def test_control_strings_in_a_prompt_stay_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = encode_prompt(text, tokenizer)
    assert not set(ids) & {tokenizer.convert_tokens_to_ids(name) for name in CONTROLS}
    assert tokenizer.decode(ids) == text


@UNHURRIED
@given(turns=TALK)
def test_the_ids_of_a_conversation_equal_those_of_apply_chat_template(
    tokenizer: PreTrainedTokenizerFast, turns: list[tuple[str, str]]
) -> None:
    ids = encode_conversation([Message(*turn) for turn in turns], tokenizer)
    messages = [{"role": role, "content": content} for role, content in turns]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == expected
    assert tokenizer.decode(ids).endswith(f"{BEGIN}assistant\n")


@UNHURRIED
@given(content=WITH_CONTROLS)
def test_control_strings_in_a_conversation_stay_text(tokenizer: PreTrainedTokenizerFast, content: str) -> None:
    plain, quoted = (encode_conversation([Message("user", text)], tokenizer) for text in ("hello", content))
    for name in CONTROLS:
        number = tokenizer.convert_tokens_to_ids(name)
        assert quoted.count(number) == plain.count(number)
    assert f"user\n{content}{END}" in tokenizer.decode(quoted)


def test_a_conversation_without_a_template_is_an_error(tokenizer_copy: PreTrainedTokenizerFast) -> None:
    tokenizer_copy.chat_template = None
    with pytest.raises(UsageError, match="no chat template"):
        encode_conversation([Message("user", "hello")], tokenizer_copy)


def test_a_tokenizer_that_fails_on_a_text_is_a_model_error(tokenizer_copy: PreTrainedTokenizerFast) -> None:
    backend = tokenizer_copy.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("(z+)+$"), behavior="isolated")
    endless = "z" * 200 + "!"
    assert encode_prompt("the quality of mercy", tokenizer_copy)
    with pytest.raises(ModelError, match="The tokenizer fails on a text"):
        encode_prompt(endless, tokenizer_copy)
    with pytest.raises(ModelError, match="The tokenizer fails on a text"):
        encode_conversation([Message("user", endless)], tokenizer_copy)
    with pytest.raises(ModelError, match="The tokenizer fails on a text"):
        encode(Document("f", 1, text=endless), tokenizer_copy)
