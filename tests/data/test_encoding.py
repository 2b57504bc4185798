from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from octavo.data import encoding
from octavo.data.encoding import begin_ids, block_ends, coder_of, plain_codes
from octavo.errors import UsageError


def test_the_copies_differ_in_control_tokens_only(tokenizer: PreTrainedTokenizerFast) -> None:
    coder = coder_of(tokenizer)
    assert coder.control.encode("a<|im_end|>").ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in coder.plain.encode("a<|im_end|>").ids
    assert coder.plain.encode("gentle rain").ids == coder.control.encode("gentle rain").ids
    assert coder_of(tokenizer) is coder


def test_the_tokenizer_itself_is_not_changed(own_tokenizer: PreTrainedTokenizerFast) -> None:
    own_tokenizer.backend_tokenizer.enable_truncation(3)
    coder = coder_of(own_tokenizer)
    assert len(coder.plain.encode("the quality of mercy is not strained").ids) > 3
    assert own_tokenizer.backend_tokenizer.truncation["max_length"] == 3
    assert not own_tokenizer.backend_tokenizer.encode_special_tokens


def test_tokens_added_later_are_known(own_tokenizer: PreTrainedTokenizerFast) -> None:
    coder_of(own_tokenizer)
    own_tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    assert coder_of(own_tokenizer).controls.findall("a<|tool|><|im_end|>b") == ["<|tool|>", "<|im_end|>"]


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        pass

    with pytest.raises(UsageError, match=r"no fast form.*\n.*tokenizer\.json"):
        coder_of(Slow())


@given(text=st.text("ab .\n\té世", max_size=400), block=st.integers(1, 30), batch=st.integers(1, 50))
def test_blocks_lose_nothing_of_any_text(tokenizer: PreTrainedTokenizerFast, text: str, block: int, batch: int) -> None:
    coder = coder_of(tokenizer)
    texts = ["hello", text, "", text]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "BLOCK_CHARACTERS", block)
        patch.setattr(encoding, "BATCH_CHARACTERS", batch)
        codes = list(plain_codes(texts, coder))
    assert [coder.plain.decode(code.ids.tolist()) for code in codes] == texts


@pytest.mark.parametrize("text", ["you? \n  I am\n\n\n\tThe rain.\n \nI.\n", "are  you   hello \t\t "])
@pytest.mark.parametrize("block", range(25, 41))
def test_blocks_have_the_ids_of_the_whole_text(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, text: str, block: int
) -> None:
    coder = coder_of(tokenizer)
    text = (text + "I am well. ") * 20
    monkeypatch.setattr(encoding, "BLOCK_CHARACTERS", block)
    (code,) = plain_codes([text], coder)
    whole = coder.plain.encode(text)
    assert len(list(block_ends(text))) > 4
    assert code.ids.tolist() == whole.ids
    assert code.first_characters == whole.offsets[0][1]


def test_a_text_without_any_space_is_cut_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "BLOCK_CHARACTERS", 10)
    assert list(block_ends("x" * 45)) == [20, 40, 45]
    assert list(block_ends("x" * 12 + " y" * 10)) == [12, 32]
    assert list(block_ends("")) == [0]


def words(*, unknown: str | None, begins: str | None, post: bool) -> PreTrainedTokenizerFast:
    """A word-level tokenizer, whose unknown token may be its begin token as in a hivemind folder's tests."""
    backend = Tokenizer(WordLevel({"<s>": 0, "the": 1, "king": 2, "<x>": 3}, unk_token=unknown))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if post:
        number = backend.token_to_id(begins or "<x>")
        backend.post_processor = TemplateProcessing(
            single=f"{begins or '<x>'} $A", pair="$A $B", special_tokens=[(begins or "<x>", number)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=begins, eos_token="<s>", unk_token=unknown)


@pytest.mark.parametrize("unknown", [None, "<s>"])
@pytest.mark.parametrize("begins", [None, "<s>"])
@pytest.mark.parametrize("post", [False, True])
def test_what_comes_before_a_text_is_what_the_tokenizer_itself_puts_there(
    unknown: str | None, begins: str | None, post: bool
) -> None:
    tokenizer = words(unknown=unknown, begins=begins, post=post)
    for text in ("the king", "king") + (("a duke",) if unknown else ()):
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert [*begin_ids(tokenizer), *plain] == tokenizer(text)["input_ids"]
