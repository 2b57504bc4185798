"""Greedy tokens compared with transformers; streamed text is the text of all tokens, up to a stop string."""

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
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from octavo.errors import UsageError
from octavo.infer.generate import Continuation, complete, generate, greedy_batch
from octavo.infer.sample import Sampling
from octavo.models import Decoder
from octavo.ops.tiles import Phase

UNHURRIED = settings(deadline=None)  # other processes may slow the machine down
GREEDY = Sampling(temperature=0.0)
CONTEXT = 64
TEXT = st.text(st.sampled_from("ab .\n世界é😀👩‍👧\N{REPLACEMENT CHARACTER}"), max_size=25)


def byte_level() -> PreTrainedTokenizerFast:
    """Bytes and a few merges, some of a space or a letter with a part of a character."""
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
    """As Llama 2's: a symbol for the space, dropped at the start, and unknown characters as bytes."""
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
EOS = int(BYTES.eos_token_id)
VOCAB_SIZE = len(BYTES)
ORDINARY = st.integers(0, VOCAB_SIZE - 1).filter(lambda token: token != EOS)
GEMMA: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6,
    "max_position_embeddings": CONTEXT, "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
    ),
    "gptj": GPTJConfig(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=CONTEXT),
    "gpt2": GPT2Config(
        vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, bos_token_id=0, eos_token_id=0
    ),
    "gpt_neo": GPTNeoConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["local", "global"], 1]],
        window_size=5,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "gemma2": Gemma2Config(**GEMMA, final_logit_softcapping=5.0, attn_implementation="eager"),
    "gemma3": Gemma3TextConfig(**GEMMA, sliding_window_pattern=2),
}


@pytest.fixture(scope="module", params=CONFIGS)
def models(request: pytest.FixtureRequest, models_of: Callable[[Any], tuple[Any, Decoder]]) -> tuple[Any, Decoder]:
    """(transformers' model, octavo's) with the same weights."""
    return models_of(CONFIGS[request.param])


def theirs_greedy(theirs: Any, prompt: Sequence[int], *, stop_ids: Sequence[int], penalty: float) -> list[int]:
    ids = torch.tensor([prompt])
    out = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=30,
        repetition_penalty=penalty,
        eos_token_id=list(stop_ids),
        pad_token_id=EOS,
    )
    return [int(token) for token in out[0, len(prompt) :]]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("prompt", [[5], [40, 41, 200, 7, 7, 90]])
def test_greedy_tokens_are_those_of_transformers(
    models: tuple[Any, Decoder], prompt: list[int], penalty: float
) -> None:
    theirs, ours = models
    sampling = Sampling(temperature=0.0, repetition_penalty=penalty, max_new_tokens=30)
    expected = theirs_greedy(theirs, prompt, stop_ids=[EOS], penalty=penalty)
    assert len(set(expected)) > 3
    answer = complete(ours, BYTES, prompt, sampling)
    assert list(answer.token_ids) == expected
    # With a stop id in addition to the tokenizer's EOS token.
    stop_id = next(token for n, token in enumerate(expected) if n > 1 and token not in expected[:n])
    expected = theirs_greedy(theirs, prompt, stop_ids=[EOS, stop_id], penalty=penalty)
    answer = complete(ours, BYTES, prompt, sampling, stop_ids=[stop_id])
    assert list(answer.token_ids) == expected
    assert answer.token_ids[-1] == stop_id
    assert answer.finish_reason == "stop"
    assert answer.text == BYTES.decode(answer.token_ids[:-1], skip_special_tokens=True)


def test_a_greedy_batch_has_the_tokens_of_each_prompt_alone(models: tuple[Any, Decoder]) -> None:
    prompts = [[40, 41, 200], [7, 7, 90], [5, 6, 7]]
    batch = greedy_batch(models[1], prompts, new_tokens=12, vocab_size=VOCAB_SIZE).tolist()
    for prompt, tokens in zip(prompts, batch, strict=True):
        alone = complete(models[1], BYTES, prompt, Sampling(temperature=0.0, max_new_tokens=12)).token_ids
        assert tuple(tokens[: len(alone)]) == alone
    assert len({tuple(tokens) for tokens in batch}) == 3


class Scripted(nn.Module):
    """A fake model whose greedy tokens are `script`; lists its inputs."""

    def __init__(self, script: Sequence[int], *, vocab_size: int = VOCAB_SIZE, context: int = 10_000) -> None:
        super().__init__()
        self.script, self.vocab_size = list(script), vocab_size
        self.config = SimpleNamespace(context=context)
        self.embed = SimpleNamespace(matrix=SimpleNamespace(device=torch.device("cpu")))
        self.inputs: list[list[int]] = []
        self.max_len = 0

    def new_cache(self, *, batch: int, max_len: int) -> None:
        self.max_len = max_len

    def hidden(self, ids: Tensor, *, cache: None) -> Tensor:
        self.inputs.append(ids[0].tolist())
        return torch.zeros(*ids.shape, 1)

    def infer_logits(self, hidden: Tensor, phase: Phase) -> Tensor:
        logits = torch.zeros(*hidden.shape[:2], self.vocab_size)
        logits[..., self.script[len(self.inputs) - 1]] = 1.0
        return logits


def pieces_of(
    script: Sequence[int], tokenizer: PreTrainedTokenizerFast = BYTES, stop: tuple[str, ...] = ()
) -> tuple[list[str], Continuation]:
    """(the text of each token, the complete answer) of a model that generates `script`."""
    sampling = Sampling(temperature=0.0, max_new_tokens=len(script), stop=stop)

    def model() -> Decoder:
        return cast(Decoder, Scripted(script, vocab_size=len(tokenizer)))

    pieces = list(generate(model(), tokenizer, [3], sampling))
    whole = complete(model(), tokenizer, [3], sampling)
    assert "".join(piece.text for piece in pieces) == whole.text
    assert tuple(piece.token_id for piece in pieces) == whole.token_ids
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    return [piece.text for piece in pieces], whole


@UNHURRIED
@given(script=st.lists(ORDINARY, min_size=1, max_size=30), stop_ids=st.booleans())
def test_streamed_text_of_any_tokens_is_the_text_of_all(script: list[int], stop_ids: bool) -> None:
    _, whole = pieces_of([*script, EOS] if stop_ids else script)
    assert whole.text == BYTES.decode(script, skip_special_tokens=True)
    assert whole.finish_reason == ("stop" if stop_ids else "length")


@pytest.mark.parametrize("tokenizer", [BYTES, PIECES], ids=["byte level", "byte fallback"])
@UNHURRIED
@given(text=TEXT)
def test_any_text_is_streamed_unchanged(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces, whole = pieces_of([*ids, int(tokenizer.eos_token_id)], tokenizer)
    assert whole.text == tokenizer.decode(ids, skip_special_tokens=True)
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_the_bytes_of_a_character_are_held_back_until_it_is_complete() -> None:
    script = [token for character in "a😀😀b" for token in PIECES.encode(character, add_special_tokens=False)]
    script = [token for token in script if PIECES.convert_ids_to_tokens(token) != "▁"]
    pieces, _ = pieces_of(script, PIECES)
    assert pieces == ["a", "", "", "", "😀", "", "", "", "😀", "b"]


def test_a_control_token_between_words_keeps_the_space() -> None:
    script = PIECES.convert_tokens_to_ids(["▁ab", "<s>", "▁ab", "<unk>", "<s>", "▁a"])
    assert pieces_of(script, PIECES)[0] == ["ab", "", " ab", "", "", " a"]


A_AND_A_HALF = BYTES.encode(" a界")[0]  # a letter and a part of a character, as one token
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
    pieces, whole = pieces_of([*script, EOS] if stop_ids else script, stop=stop)
    if cut is None:
        assert whole.text == text
    else:
        # Of two stop strings the one that is complete first ends the answer; it may begin later.
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
    # The longest possible start of a stop string is held back.
    assert pieces_of(BYTES.convert_tokens_to_ids(["a", "a", "b"]), stop=("aab",))[0] == ["", "", ""]
    # The start of a stop string that does not follow is streamed.
    assert pieces_of(script, stop=("bax",))[1].text == "abab.aba"


def test_a_stop_string_within_the_pending_text_at_the_end_does_not_leak() -> None:
    assert BYTES.decode([A_AND_A_HALF]) == " a\N{REPLACEMENT CHARACTER}"
    assert pieces_of([10, A_AND_A_HALF, EOS], stop=("a",))[1].text == BYTES.decode([10]) + " "


def test_an_eos_token_at_the_limit_is_a_stop_and_no_text() -> None:
    script = [*BYTES.encode("ab"), EOS]
    pieces, whole = pieces_of(script)
    assert (whole.text, whole.finish_reason, whole.token_ids[-1]) == ("ab", "stop", EOS)
    assert pieces[-1] == ""
    assert pieces_of(script[:-1])[1].finish_reason == "length"


def test_the_prompt_is_prefilled_once_and_each_token_decoded_once() -> None:
    model = Scripted([10, 11, 12])
    complete(cast(Decoder, model), BYTES, [1, 2, 3], Sampling(temperature=0.0, max_new_tokens=3))
    assert model.inputs == [[1, 2, 3], [10], [11]]
    assert model.max_len == 6


def test_generation_ends_when_the_context_is_full(models: tuple[Any, Decoder]) -> None:
    _, model = models
    sampling = Sampling(temperature=0.0, max_new_tokens=500)
    prompt = [5] * (CONTEXT - 7)
    answer = complete(model, no_eos(), prompt, sampling)
    assert len(prompt) + len(answer.token_ids) == CONTEXT
    assert answer.finish_reason == "length"
    with pytest.raises(UsageError, match=f"prompt has {CONTEXT} tokens; the model's context holds {CONTEXT}"):
        complete(model, BYTES, [5] * CONTEXT, sampling)
    with pytest.raises(UsageError, match="prompt is empty"):
        complete(model, BYTES, [], sampling)


def no_eos() -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    tokenizer.eos_token = None
    return tokenizer


def test_a_tokenizer_without_an_eos_token_generates() -> None:
    model = cast(Decoder, Scripted([10, EOS, 11]))
    sampling = Sampling(temperature=0.0, max_new_tokens=3)
    assert complete(model, no_eos(), [3], sampling).finish_reason == "length"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_past_the_tokenizer_are_never_selected(
    models_of: Callable[[Any], tuple[Any, Decoder]], temperature: float
) -> None:
    config = GPTJConfig(vocab_size=VOCAB_SIZE + 14, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, n_positions=CONTEXT)
    _, model = models_of(config)
    assert model.head.bias is not None
    model.head.bias.data[VOCAB_SIZE:] = 1000.0
    assert int(model(torch.tensor([[5]]))[0, -1].argmax()) >= VOCAB_SIZE
    answer = complete(model, BYTES, [5], Sampling(temperature=temperature, max_new_tokens=40))
    assert max(answer.token_ids) < VOCAB_SIZE


def test_a_seed_repeats_a_continuation(models: tuple[Any, Decoder]) -> None:
    _, model = models
    first, again, other = (
        complete(model, BYTES, [5], Sampling(temperature=2.0, top_p=1.0, max_new_tokens=20, seed=seed))
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first.token_ids != other.token_ids


def test_train_mode_is_restored_even_if_the_generator_is_closed(models: tuple[Any, Decoder]) -> None:
    _, model = models
    model.train()
    pieces = generate(model, BYTES, [5], GREEDY)
    next(pieces)
    during = model.training
    pieces.close()  # type: ignore[attr-defined]
    after = model.training
    model.eval()
    assert (during, after) == (False, True)
