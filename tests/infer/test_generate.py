"""Greedy tokens are those of transformers; streamed text is the text of all tokens, up to a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from torch import Tensor, nn
from transformers import GPTJConfig, LlamaConfig, PreTrainedTokenizerFast

from octavo.errors import UsageError
from octavo.infer.generate import Continuation, complete, generate
from octavo.infer.sample import Sampling
from octavo.models import Decoder
from octavo.ops.tiles import Phase

UNHURRIED = settings(deadline=None)  # other processes may hold a machine up
GREEDY = Sampling(temperature=0.0)
CONTEXT = 64
TEXT = st.text(st.sampled_from("ab .\n世界é😀👩‍👧\N{REPLACEMENT CHARACTER}"), max_size=25)


def byte_level() -> PreTrainedTokenizerFast:
    """Bytes and a few merges, some of which join a space, or a letter, and half a character."""
    backend = Tokenizer(tokenizer_models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270,
        special_tokens=["<|end|>", "<|other|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["ab ab abab aab 世 世世 a界 a畍 a畎 b 界 😀 a😀"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2's: a sign for the space that is dropped at the start, and unknown characters byte by byte."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁ab.", "▁a", "▁ab"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("▁a", "b")]
    backend = Tokenizer(tokenizer_models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


BYTES, PIECES = byte_level(), byte_fallback()
END = int(BYTES.eos_token_id)
WORDS = len(BYTES)
ORDINARY = st.integers(0, WORDS - 1).filter(lambda token: token != END)
CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
    ),
    "gptj": GPTJConfig(vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=CONTEXT),
}


@pytest.fixture(scope="module", params=CONFIGS)
def kernels(request: pytest.FixtureRequest, twins_of: Callable[[Any], tuple[Any, Decoder]]) -> tuple[Any, Decoder]:
    return twins_of(CONFIGS[request.param])


def theirs_greedy(theirs: Any, prompt: Sequence[int], *, stop_ids: Sequence[int], penalty: float) -> list[int]:
    ids = torch.tensor([prompt])
    out = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=30,
        repetition_penalty=penalty,
        eos_token_id=list(stop_ids),
        pad_token_id=END,
    )
    return [int(token) for token in out[0, len(prompt) :]]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("prompt", [[5], [40, 41, 200, 7, 7, 90]])
def test_greedy_tokens_are_those_of_transformers(
    kernels: tuple[Any, Decoder], prompt: list[int], penalty: float
) -> None:
    theirs, ours = kernels
    sampling = Sampling(temperature=0.0, repetition_penalty=penalty, max_new_tokens=30)
    expected = theirs_greedy(theirs, prompt, stop_ids=[END], penalty=penalty)
    assert len(set(expected)) > 3
    found = complete(ours, BYTES, prompt, sampling)
    assert list(found.token_ids) == expected
    # Now an end token in the midst of it, besides the tokenizer's own.
    end = next(token for place, token in enumerate(expected) if place > 1 and token not in expected[:place])
    expected = theirs_greedy(theirs, prompt, stop_ids=[END, end], penalty=penalty)
    found = complete(ours, BYTES, prompt, sampling, stop_ids=[end])
    assert list(found.token_ids) == expected
    assert found.token_ids[-1] == end
    assert found.finish_reason == "stop"
    assert found.text == BYTES.decode(found.token_ids[:-1], skip_special_tokens=True)


class Scripted(nn.Module):
    """Stands in for a model that wants to say `script`, token by token, and notes what it is fed."""

    def __init__(self, script: Sequence[int], *, words: int = WORDS, context: int = 10_000) -> None:
        super().__init__()
        self.script, self.words = list(script), words
        self.config = SimpleNamespace(context=context)
        self.embed = SimpleNamespace(matrix=SimpleNamespace(device=torch.device("cpu")))
        self.fed: list[list[int]] = []
        self.max_len = 0

    def new_cache(self, *, batch: int, max_len: int) -> None:
        self.max_len = max_len

    def hidden(self, ids: Tensor, *, cache: None) -> Tensor:
        self.fed.append(ids[0].tolist())
        return torch.zeros(*ids.shape, 1)

    def infer_logits(self, hidden: Tensor, phase: Phase) -> Tensor:
        logits = torch.zeros(*hidden.shape[:2], self.words)
        logits[..., self.script[len(self.fed) - 1]] = 1.0
        return logits


def pieces_of(
    script: Sequence[int], tokenizer: PreTrainedTokenizerFast = BYTES, stop: tuple[str, ...] = ()
) -> tuple[list[str], Continuation]:
    """(the text of each piece, the whole) of a model that says `script`."""
    sampling = Sampling(temperature=0.0, max_new_tokens=len(script), stop=stop)

    def model() -> Decoder:
        return cast(Decoder, Scripted(script, words=len(tokenizer)))

    pieces = list(generate(model(), tokenizer, [3], sampling))
    whole = complete(model(), tokenizer, [3], sampling)
    assert "".join(piece.text for piece in pieces) == whole.text
    assert tuple(piece.token_id for piece in pieces) == whole.token_ids
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    return [piece.text for piece in pieces], whole


@UNHURRIED
@given(script=st.lists(ORDINARY, min_size=1, max_size=30), stop_ids=st.booleans())
def test_any_tokens_stream_as_the_text_of_them_all(script: list[int], stop_ids: bool) -> None:
    _, whole = pieces_of([*script, END] if stop_ids else script)
    assert whole.text == BYTES.decode(script, skip_special_tokens=True)
    assert whole.finish_reason == ("stop" if stop_ids else "length")


@pytest.mark.parametrize("tokenizer", [BYTES, PIECES], ids=["byte level", "byte fallback"])
@UNHURRIED
@given(text=TEXT)
def test_any_text_streams_as_itself(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces, whole = pieces_of([*ids, int(tokenizer.eos_token_id)], tokenizer)
    assert whole.text == tokenizer.decode(ids, skip_special_tokens=True)
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_characters_bytes_are_held_until_it_is_whole() -> None:
    script = [token for character in "a😀😀b" for token in PIECES.encode(character, add_special_tokens=False)]
    script = [token for token in script if PIECES.convert_ids_to_tokens(token) != "▁"]
    pieces, _ = pieces_of(script, PIECES)
    assert pieces == ["a", "", "", "", "😀", "", "", "", "😀", "b"]


def test_a_control_token_between_words_takes_no_space_away() -> None:
    script = PIECES.convert_tokens_to_ids(["▁ab", "<s>", "▁ab", "<unk>", "<s>", "▁a"])
    assert pieces_of(script, PIECES)[0] == ["ab", "", " ab", "", "", " a"]


A_AND_A_HALF = BYTES.encode(" a界")[0]  # the letter and a part of the character, as one token
BUILDING = sorted({*BYTES.encode("ab 世 a界 b😀 ba"), *BYTES.convert_tokens_to_ids(["a", "b"]), A_AND_A_HALF})
STOPS = st.lists(st.text("ab 世", min_size=1, max_size=4), min_size=1, max_size=3).map(tuple)


@UNHURRIED
@given(
    script=st.lists(st.sampled_from(BUILDING), min_size=1, max_size=25),
    stop=STOPS,
    stop_ids=st.booleans(),
)
def test_no_character_of_a_stop_string_leaks(script: list[int], stop: tuple[str, ...], stop_ids: bool) -> None:
    text = BYTES.decode(script)
    cut = min((at for at in (text.find(word) for word in stop) if at >= 0), default=None)
    pieces, whole = pieces_of([*script, END] if stop_ids else script, stop=stop)
    if cut is None:
        assert whole.text == text
    else:
        # Of two stop strings, the one that is complete first counts, which may begin later.
        assert text.startswith(whole.text)
        assert len(whole.text) >= cut
        assert any(text.startswith(word, len(whole.text)) for word in stop)
    shown = ""
    for piece in pieces:
        shown += piece
        assert not any(word in shown for word in stop)


def test_a_stop_string_across_tokens_ends_the_text_before_it() -> None:
    script = BYTES.convert_tokens_to_ids(["a", "b", "a", "b", ".", "a", "b", "a"])
    pieces, whole = pieces_of(script, stop=("b.a",))
    assert pieces == ["a", "", "ba", "", "", ""]
    assert (whole.text, whole.finish_reason) == ("aba", "stop")
    assert len(whole.token_ids) == 6
    # What is longest and could still become a stop string is held, or its first letters would be out.
    assert pieces_of(BYTES.convert_tokens_to_ids(["a", "a", "b"]), stop=("aab",))[0] == ["", "", ""]
    # The start of a stop string that never ends is shown after all.
    assert pieces_of(script, stop=("bax",))[1].text == "abab.aba"


def test_a_stop_string_within_what_is_held_at_the_end_does_not_leak() -> None:
    assert BYTES.decode([A_AND_A_HALF]) == " a\N{REPLACEMENT CHARACTER}"
    assert pieces_of([10, A_AND_A_HALF, END], stop=("a",))[1].text == BYTES.decode([10]) + " "


def test_an_end_token_wins_over_the_limit_and_is_no_text() -> None:
    script = [*BYTES.encode("ab"), END]
    pieces, whole = pieces_of(script)
    assert (whole.text, whole.finish_reason, whole.token_ids[-1]) == ("ab", "stop", END)
    assert pieces[-1] == ""
    assert pieces_of(script[:-1])[1].finish_reason == "length"


def test_the_prompt_runs_once_and_then_each_token_alone() -> None:
    model = Scripted([10, 11, 12])
    complete(cast(Decoder, model), BYTES, [1, 2, 3], Sampling(temperature=0.0, max_new_tokens=3))
    assert model.fed == [[1, 2, 3], [10], [11]]
    assert model.max_len == 6


def test_generation_ends_where_the_context_is_full(kernels: tuple[Any, Decoder]) -> None:
    _, model = kernels
    sampling = Sampling(temperature=0.0, max_new_tokens=500)
    prompt = [5] * (CONTEXT - 7)
    found = complete(model, no_end(), prompt, sampling)
    assert len(prompt) + len(found.token_ids) == CONTEXT
    assert found.finish_reason == "length"
    with pytest.raises(UsageError, match=f"prompt has {CONTEXT} tokens; the model's context holds {CONTEXT}"):
        complete(model, BYTES, [5] * CONTEXT, sampling)
    with pytest.raises(UsageError, match="prompt is empty"):
        complete(model, BYTES, [], sampling)


def no_end() -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    tokenizer.eos_token = None
    return tokenizer


def test_a_tokenizer_without_an_end_token_generates() -> None:
    model = cast(Decoder, Scripted([10, END, 11]))
    sampling = Sampling(temperature=0.0, max_new_tokens=3)
    assert complete(model, no_end(), [3], sampling).finish_reason == "length"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_past_the_tokenizer_are_never_chosen(
    twins_of: Callable[[Any], tuple[Any, Decoder]], temperature: float
) -> None:
    config = GPTJConfig(vocab_size=WORDS + 14, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, n_positions=CONTEXT)
    _, model = twins_of(config)
    assert model.head.bias is not None
    model.head.bias.data[WORDS:] = 1000.0
    assert int(model(torch.tensor([[5]]))[0, -1].argmax()) >= WORDS
    found = complete(model, BYTES, [5], Sampling(temperature=temperature, max_new_tokens=40))
    assert max(found.token_ids) < WORDS


def test_a_seed_repeats_a_continuation(kernels: tuple[Any, Decoder]) -> None:
    _, model = kernels
    first, again, other = (
        complete(model, BYTES, [5], Sampling(temperature=2.0, top_p=1.0, max_new_tokens=20, seed=seed))
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first.token_ids != other.token_ids


def test_a_model_in_training_goes_on_training_even_if_the_reader_leaves(kernels: tuple[Any, Decoder]) -> None:
    _, model = kernels
    model.train()
    pieces = generate(model, BYTES, [5], GREEDY)
    next(pieces)
    during = model.training
    pieces.close()  # type: ignore[attr-defined]
    after = model.training
    model.eval()
    assert (during, after) == (False, True)
