from __future__ import annotations

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from octavo.data.encoding import bos_ids, coder_of
from octavo.errors import UsageError


def test_the_copies_differ_in_control_tokens_only(tokenizer: PreTrainedTokenizerFast) -> None:
    coder = coder_of(tokenizer)
    assert coder.control.encode("a<|im_end|>").ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in coder.plain.encode("a<|im_end|>").ids
    assert coder.plain.encode("gentle rain").ids == coder.control.encode("gentle rain").ids
    assert coder_of(tokenizer) is coder


def test_the_tokenizer_itself_is_not_changed(tokenizer_copy: PreTrainedTokenizerFast) -> None:
    tokenizer_copy.backend_tokenizer.enable_truncation(3)
    coder = coder_of(tokenizer_copy)
    assert len(coder.plain.encode("the quality of mercy is not strained").ids) > 3
    assert tokenizer_copy.backend_tokenizer.truncation["max_length"] == 3
    assert not tokenizer_copy.backend_tokenizer.encode_special_tokens


def test_control_tokens_added_later_are_recognized(tokenizer_copy: PreTrainedTokenizerFast) -> None:
    coder_of(tokenizer_copy)
    tokenizer_copy.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    assert coder_of(tokenizer_copy).controls.findall("a<|tool|><|im_end|>b") == ["<|tool|>", "<|im_end|>"]


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        pass

    with pytest.raises(UsageError, match=r"no fast form.*\n.*tokenizer\.json"):
        coder_of(Slow())


def word_tokenizer(*, unknown: str | None, begins: str | None, post: bool) -> PreTrainedTokenizerFast:
    """A word-level tokenizer, whose unknown token may be its BOS token, as in the tests of a hivemind folder."""
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
def test_bos_ids_are_the_ids_that_the_tokenizer_puts_before_a_text(
    unknown: str | None, begins: str | None, post: bool
) -> None:
    tokenizer = word_tokenizer(unknown=unknown, begins=begins, post=post)
    for text in ("the king", "king") + (("a duke",) if unknown else ()):
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert [*bos_ids(tokenizer), *plain] == tokenizer(text)["input_ids"]
