"""Bytes of target tokens, the denominator of bits per byte, against the bytes of the texts."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from octavo.data.bytes import token_bytes
from octavo.data.packing import Row, pack, trained_bytes
from octavo.data.records import Document
from octavo.data.tokens import Tokens, encode_all
from octavo.data.turns import Message

UNHURRIED = settings(deadline=None)  # other processes may slow a machine down
ALPHABET = st.characters(codec="utf-8") | st.sampled_from("ae \n世é😀👩‍👧<|>")
TEXTS = st.lists(st.text(ALPHABET, max_size=30), min_size=1, max_size=4)


def encoded(documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast) -> list[Tokens]:
    return encode_all(documents, tokenizer)


def packed(tokens: Sequence[Tokens], seq_len: int = 7) -> list[Row]:
    return pack(tokens, seq_len=seq_len, pad_id=0)[0]


@UNHURRIED
@given(texts=TEXTS, seq_len=st.integers(1, 20))
def test_trained_bytes_are_the_bytes_of_the_texts(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], seq_len: int
) -> None:
    # The first token of a text is no target. After "The" no token ends within a character.
    tokens = encoded([Document("f", 1, text="The " + text) for text in texts], tokenizer)
    assert trained_bytes(packed(tokens, seq_len), tokenizer) == sum(one.n_bytes for one in tokens)


@UNHURRIED
@given(text=st.text(ALPHABET, min_size=1, max_size=30))
def test_a_token_within_a_character_counts_its_own_bytes(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    (tokens,) = encoded([Document("f", 1, text=text)], tokenizer)
    first = len(tokenizer.convert_ids_to_tokens(int(tokens.ids[0])))
    assert trained_bytes(packed([tokens]), tokenizer) == len(text.encode()) - first


@UNHURRIED
@given(prompt=st.text(ALPHABET, min_size=1, max_size=9), completion=st.text(ALPHABET, max_size=9))
def test_only_the_completion_counts(tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str) -> None:
    tokens = encoded([Document("f", 1, prompt=prompt, completion=completion)], tokenizer)
    assert trained_bytes(packed(tokens), tokenizer) == len(completion.encode())


def test_control_tokens_have_no_bytes(tokenizer_copy: PreTrainedTokenizerFast) -> None:
    tokenizer_copy.bos_token = tokenizer_copy.eos_token = "<|endoftext|>"
    messages = (Message("user", "hello"), Message("assistant", "well"))
    tokens = encoded([Document("f", 1, messages=messages)], tokenizer_copy)
    learned = tokens[0].ids[tokens[0].trained].tolist()
    assert tokenizer_copy.convert_tokens_to_ids("<|im_end|>") in learned
    assert trained_bytes(packed(tokens), tokenizer_copy) == tokens[0].n_bytes == len("well")


def test_added_tokens_count_the_bytes_of_their_text(tokenizer_copy: PreTrainedTokenizerFast) -> None:
    tokenizer_copy.add_tokens([AddedToken("naïveté", normalized=False), AddedToken("    ", normalized=False)])
    lengths = token_bytes(tokenizer_copy)
    assert lengths[tokenizer_copy.convert_tokens_to_ids("naïveté")] == 9
    assert lengths[tokenizer_copy.convert_tokens_to_ids("    ")] == 4


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """A tokenizer like Llama 2's and Mistral's: U+2581 for a space, <0xNN> for a byte without a character."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁theranié"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


SENTENCEPIECE = sentencepiece_like()


def test_bytes_of_a_sentencepiece_vocabulary() -> None:
    lengths = token_bytes(SENTENCEPIECE)
    expected = {"</s>": 0, "<0xE4>": 1, "▁": 1, "▁the": 4, "é": 2}
    assert {name: lengths[SENTENCEPIECE.convert_tokens_to_ids(name)] for name in expected} == expected


@UNHURRIED
@given(texts=TEXTS)
def test_trained_bytes_of_a_sentencepiece_tokenizer_are_the_bytes_of_the_texts(texts: list[str]) -> None:
    documents = [Document("f", 1, text="t" + text.replace("▁", "")) for text in texts]
    tokens = encoded(documents, SENTENCEPIECE)
    assert trained_bytes(packed(tokens), SENTENCEPIECE) == sum(one.n_bytes for one in tokens)
