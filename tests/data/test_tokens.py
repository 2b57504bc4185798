from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from octavo.data.documents import Skipped
from octavo.data.packing import pack
from octavo.data.records import Document
from octavo.data.tokens import Tokens, _without_end, encode, encode_all
from octavo.data.turns import Message
from octavo.errors import DataError, UsageError
from octavo.store.tokenizer_files import load_tokenizer

ANY_TEXT = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        st.just("<|im_end|>"),
        st.just("gentle "),
    ),
    max_size=6,
).map("".join)


def text_of(tokens: Tokens, tokenizer: PreTrainedTokenizerFast) -> str:
    return str(tokenizer.decode(tokens.ids.tolist(), skip_special_tokens=False))


@given(text=ANY_TEXT)
def test_a_text_round_trips_with_one_eos_token(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    end_id = tokenizer.eos_token_id
    tokens = encode(Document("f", 1, text=text), tokenizer)
    assert tokens.ids[-1] == end_id
    assert np.count_nonzero(tokens.ids == end_id) == 1
    bare = text
    while bare.rstrip().endswith("<|im_end|>"):
        bare = bare.rstrip().removesuffix("<|im_end|>")
    assert text_of(tokens, tokenizer) == bare + "<|im_end|>"
    assert tokens.trained.tolist() == [False] + [True] * (len(tokens.ids) - 1)


@given(prompt=ANY_TEXT, completion=ANY_TEXT)
def test_only_the_completion_and_the_eos_token_are_trained(
    tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str
) -> None:
    document = Document("f", 1, prompt=prompt, completion=completion + "!")
    tokens = encode(document, tokenizer)
    masked = tokenizer.decode(tokens.ids[~tokens.trained].tolist())
    trained = tokenizer.decode(tokens.ids[tokens.trained].tolist())
    if prompt:
        assert (masked, trained) == (prompt, completion + "!<|im_end|>")
        assert tokens.n_bytes == len((completion + "!").encode())
    assert text_of(tokens, tokenizer) == prompt + completion + "!<|im_end|>"
    assert tokens.trained[-1]


def test_n_bytes_counts_the_predicted_text(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "gentle “rain”"
    tokens = encode(Document("f", 1, text=text), tokenizer)
    first = tokenizer.decode(tokens.ids[:1].tolist())
    assert tokens.n_bytes == len(text.encode()) - len(first.encode()) > 0


def test_a_text_of_only_the_eos_token_has_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = encode(Document("f", 1, text="<|im_end|>\n"), tokenizer)
    assert (tokens.ids.tolist(), tokens.trained.tolist(), tokens.n_bytes) == (
        [tokenizer.eos_token_id],
        [False],
        0,
    )


def test_many_documents_are_encoded_in_order_and_as_each_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = [
        Document("f", 1, text="one"),
        Document("f", 2, messages=(Message("user", "two"), Message("assistant", "three"))),
        Document("f", 3, prompt="four", completion="five"),
        Document("g", 1, text="six"),
    ]
    done: list[int] = []
    together = encode_all(documents, tokenizer, progress=done.append)
    assert sum(done) == len("onetwothreefourfivesix")
    for document, tokens in zip(documents, together, strict=True):
        alone = encode(document, tokenizer)
        assert (tokens.source, tokens.line) == (document.source, document.line)
        assert tokens.ids.tolist() == alone.ids.tolist()
        assert tokens.ids.dtype == np.int32


def test_a_refused_conversation_is_added_to_skipped_if_given(tokenizer: PreTrainedTokenizerFast) -> None:
    bad = Document("f", 1, messages=(Message("not a role", "ü"), Message("assistant", "b")))
    good = Document("f", 2, text="good")
    with pytest.raises(DataError, match=r"f:1: the role 'not a role'"):
        encode_all([bad, good], tokenizer)
    skipped: list[Skipped] = []
    (tokens,) = encode_all([bad, good], tokenizer, skipped=skipped)
    assert tokens.line == 2
    assert skipped == [Skipped("f", 1, "the role 'not a role' is not a word.", 3)]


def test_a_tokenizer_without_an_eos_token_is_refused(tokenizer_copy: PreTrainedTokenizerFast) -> None:
    tokenizer_copy.eos_token = None
    with pytest.raises(UsageError, match="no EOS token"):
        encode(Document("f", 1, text="a"), tokenizer_copy)


def test_turns_after_the_last_trained_one_are_counted_as_left_out(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    talk = (Message("user", "the king"), Message("assistant", "the queen"))
    more_turns = (Message("user", "the storm"), Message("assistant", "the duke", trained=False))
    documents = (Document("f", 1, messages=turns) for turns in (talk, talk + more_turns))
    short, long = (encode(document, tokenizer) for document in documents)
    assert long.ids.tolist() == short.ids.tolist()
    assert (short.n_after, long.n_after) == (
        0,
        len(tokenizer("the storm").input_ids) + len(tokenizer("the duke").input_ids),
    )
    _, ledger = pack([long], seq_len=64, pad_id=0)
    assert (ledger.tokens, ledger.left_out) == (len(long.ids) + long.n_after, long.n_after)
    ledger.check(seq_len=64)


def test_repeated_eos_strings_at_the_end_of_a_text_are_removed() -> None:
    assert _without_end("a <e> b" + "<e> \n" * 5000, "<e>") == "a <e> b"
    assert _without_end("a  ", "<e>") == "a  "
