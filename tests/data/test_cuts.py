"""The ids of a text in segments equal those of the whole text, for tokenizers of every kind."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from octavo.data import encoding
from octavo.data.cuts import WHOLE, cuts_of
from octavo.data.encoding import coder_of, encode_plain

LINES = [
    "The quality of mercy is not strained, it droppeth as the gentle rain from heaven.\nUpon the place beneath.",
    "### Instruction: one two three 12345, naïve café — “quotes”. 世界 世界\n\n  a  b\t\tc\n- x\n/ y",
    "a \n  b\n\n\n\tc  d   e \t\t f\n \ng the the and\nthe " * 3,
]
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{M}]*[\p{Ll}\p{Lo}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def byte_level(*before: object, regex: bool = True, prefix: bool = False, spans: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, level]) if before else level
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    train(tokenizer, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False))
    return tokenizer


def split(pattern: str) -> object:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def sentencepiece(*, prepend: bool, across: bool = False) -> Tokenizer:
    """Like Llama 2's: no pre-tokenizer, byte fallback. `across`: with tokens that contain spaces."""
    pieces = LINES if across else [word for line in LINES for word in line.replace("\n", " ").split(" ")]
    trained = Tokenizer(models.BPE())
    marked = [piece.replace(" ", "▁") if across else "▁" + piece for piece in pieces]
    trained.train_from_iterator(marked, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    vocab = list(trained.get_vocab())
    merges = trained_merges(trained)
    tokens = ["<unk>", *(f"<0x{n:02X}>" for n in range(256)), *vocab]
    model = models.BPE(
        {t: n for n, t in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    tokenizer = Tokenizer(model)
    if prepend:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def trained_merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    import json

    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in merges]


def unigram(*, splits: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=splits)
    train(
        tokenizer,
        trainers.UnigramTrainer(vocab_size=120, show_progress=False, unk_token="<unk>", special_tokens=["<unk>"]),
    )
    return tokenizer


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    train(tokenizer, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False))
    return tokenizer


def words() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    train(tokenizer, trainers.WordLevelTrainer(special_tokens=["[UNK]"], show_progress=False))
    return tokenizer


def literal_spaces() -> Tokenizer:
    """Without normalizer and pre-tokenizer: tokens contain plain spaces."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(["ACGT GATTACA CCGT TTGA " * 40], trainer)
    return tokenizer


def with_added(*tokens: AddedToken, to: Callable[[], Tokenizer] = byte_level) -> Tokenizer:
    tokenizer = to()
    tokenizer.add_tokens(list(tokens))
    return tokenizer


def gemma() -> Tokenizer:
    """Spaces as in SentencePiece, none added before a text, and added tokens that are not special."""
    tokenizer = sentencepiece(prepend=True)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    added = [AddedToken(name, normalized=False) for name in ("\n", "\n\n", "▁▁", "<h1>", "king")]
    tokenizer.add_tokens(added)
    return tokenizer


def train(tokenizer: Tokenizer, trainer: Any) -> None:
    tokenizer.train_from_iterator(LINES, trainer)


MAKES: dict[str, tuple[Callable[[], Tokenizer], bool]] = {
    "gpt-2": (byte_level, True),
    "digits": (lambda: byte_level(pre_tokenizers.Digits(individual_digits=True)), True),
    "prefix space": (lambda: byte_level(prefix=True), True),
    "llama 3": (lambda: byte_level(split(LLAMA_3), regex=False), True),
    "o200k": (lambda: byte_level(split(O200K), regex=False), True),
    "deepseek": (lambda: byte_level(split(r"[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), regex=False), True),
    "bytes unsplit": (lambda: byte_level(regex=False), False),
    "llama 2": (lambda: sentencepiece(prepend=True), True),
    "metaspace": (lambda: sentencepiece(prepend=False), True),
    "over spaces": (lambda: sentencepiece(prepend=True, across=True), False),
    "unigram": (lambda: unigram(splits=True), True),
    "unigram unsplit": (lambda: unigram(splits=False), False),
    "wordpiece": (wordpiece, True),
    "words": (words, True),
    "added words": (lambda: with_added(AddedToken("the"), AddedToken("  "), AddedToken("\n\n")), True),
    "greedy added": (lambda: with_added(AddedToken("king", rstrip=True)), False),
    "added phrase": (lambda: with_added(AddedToken("the king")), False),
    "added phrase of pieces": (lambda: with_added(AddedToken("the▁king"), to=gemma), False),
    "added to llama 2": (
        lambda: with_added(AddedToken("the", normalized=False), to=lambda: sentencepiece(prepend=True)),
        False,
    ),
    "added to metaspace": (lambda: with_added(AddedToken("\n"), to=lambda: sentencepiece(prepend=False)), True),
    "added to unigram": (lambda: with_added(AddedToken("queen"), to=lambda: unigram(splits=True)), True),
    "gemma": (gemma, True),
    "literal spaces": (literal_spaces, False),
}


@functools.cache
def made(name: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=MAKES[name][0]())


BORDERS = st.sampled_from(
    [
        " ",
        "  ",
        "\n",
        "\n\n",
        " \n",
        "\n ",
        "\t",
        "\r\n",
        "\r",
        "\u00a0",
        "\u2028",
        "\u200b",
        "\x1c",
        "",
        "/",
        "!",
        "'s",
        "12",
        "- ",
    ]
)
WORDS = st.sampled_from(
    ["the", "The", "king", "a", "é", "e\u0301", "世界", "x1", "123", "“q”", "(", "🙂", "ͺ", "İ", "²", "_", "."]
)
TEXTS = st.lists(st.one_of(BORDERS, WORDS, st.text(max_size=3)), max_size=30).map("".join)


@pytest.mark.parametrize("name", MAKES)
@given(text=TEXTS, most=st.integers(1, 40), many=st.sampled_from([1, 4096]))
@example(text=" the", most=1, many=4096)
@example(text="a the b GATTACA CCGT ACGT", most=1, many=1)
@example(text="it's 12\u2009x\u00a0\u0301 \n\n\t'll 世界", most=40, many=1)
@settings(max_examples=60)
def test_ids_of_segments_equal_those_of_the_whole_text(name: str, text: str, most: int, many: int) -> None:
    coder = coder_of(made(name))
    texts = [text, "the king", "", text[::-1], text]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "BATCH_CHARACTERS", most)
        patch.setattr(encoding, "MAX_SEGMENTS", 3)
        patch.setattr(encoding, "MANY_SEGMENTS", many)
        encoded = list(encode_plain(texts, coder))
    assert [text.ids.tolist() for text in encoded] == [coder.plain.encode(one).ids for one in texts]


@pytest.mark.parametrize("name", MAKES)
def test_a_text_is_split_only_if_its_tokenizer_allows_it(name: str) -> None:
    cuts = coder_of(made(name)).cuts
    assert (cuts is not WHOLE) == MAKES[name][1]
    count = sum(len(words) for words, _ in cuts.segments("the king spoke to the queen " * 9, 40))
    assert count == (54 if MAKES[name][1] else 1)


def test_a_text_is_split_after_a_line_break_only_if_the_tokenizer_splits_there() -> None:
    text = "The king,\nThe queen\n\nend\n"
    both = [made(name) for name in ("gpt-2", "llama 2")]
    actual = [[word for words, _ in coder_of(one).cuts.segments(text, 99) for word in words] for one in both]
    assert actual[0] == ["The", " king,\n", "The", " queen\n\nend\n"]
    assert actual[1] == ["The", "king,\nThe", "queen\n\nend\n"]


@given(text=TEXTS, most=st.integers(1, 40))
def test_segments_concatenate_to_the_text(text: str, most: int) -> None:
    for cuts in (coder_of(made("gpt-2")).cuts, WHOLE):
        lists = list(cuts.segments(text, most))
        assert "".join(word for words, _ in lists for word in words) == text
        assert [last for _, last in lists] == [False] * (len(lists) - 1) + [True]


def test_a_normalizer_that_depends_on_distant_characters_prevents_a_split() -> None:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Strip()
    assert cuts_of(tokenizer) is WHOLE
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    assert cuts_of(tokenizer) is not WHOLE


def test_a_token_added_later_changes_the_split() -> None:
    """The cache key is a tokenizer's content, not the object."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level())
    assert coder_of(tokenizer).cuts is coder_of(made("gpt-2")).cuts is not WHOLE
    tokenizer.add_tokens([AddedToken("king", rstrip=True)])
    assert coder_of(tokenizer).cuts is WHOLE
