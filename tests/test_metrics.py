"""Perplexity against transformers on the same windows; bits per byte; evaluation does not change the model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma3TextConfig, GPTJConfig, LlamaConfig

from octavo import adapters
from octavo.adapters import AdapterPlan
from octavo.data.packing import Row, pack, pack_windows
from octavo.data.tokens import Tokens
from octavo.intervals import DOCUMENTS
from octavo.layers.fused_linear import FusedLinear
from octavo.layers.lora import LoraSpec
from octavo.metrics import Score, score
from octavo.models import Decoder

VOCAB_SIZE, SEQ_LEN = 61, 24
CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "gptj": GPTJConfig(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
}
BOS = 2
GEMMA = Gemma3TextConfig(
    vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"],
)  # fmt: skip
LENGTHS = (70, 3, 25, 2, 24, 11, 49, 5)


@pytest.fixture(scope="module", params=CONFIGS)
def models(request: pytest.FixtureRequest, models_of: Callable[[Any], tuple[Any, Decoder]]) -> tuple[Any, Decoder]:
    return models_of(CONFIGS[request.param])


def texts() -> list[Tokens]:
    """Documents of unequal lengths; in every third one only the second half has labels, as in prompt and completion."""
    generator = np.random.default_rng(0)
    documents = []
    for number, length in enumerate(LENGTHS):
        ids = generator.integers(0, VOCAB_SIZE, length).astype(np.int32)
        trained = np.arange(length) >= (length // 2 if number % 3 == 2 else 1)
        documents.append(Tokens(f"f{number}", 1, ids, trained, 3 * length))
    return documents


def rows() -> list[Row]:
    return pack(texts(), seq_len=SEQ_LEN, pad_id=0)[0]


def scored(model: Decoder, batch_size: int = 3) -> Score:
    return score(model, rows(), n_bytes=500, batch_size=batch_size)


@torch.no_grad()
def window_losses(theirs: Any) -> list[tuple[float, int]]:
    """(mean loss, tokens) of every window; transformers shifts the labels."""
    losses = []
    for text in texts():
        for start in range(0, len(text.ids) - 1, SEQ_LEN):
            window = slice(start, start + SEQ_LEN + 1)
            ids = torch.from_numpy(text.ids[window].astype(np.int64))[None]
            labels = ids.masked_fill(~torch.from_numpy(text.trained[window])[None], -100)
            tokens = int((labels[:, 1:] != -100).sum())
            if tokens:
                losses.append((float(theirs(ids, labels=labels).loss), tokens))
    return losses


def test_perplexity_is_that_of_transformers_weighted_by_tokens(models: tuple[Any, Decoder]) -> None:
    theirs, ours = models
    windows = window_losses(theirs)
    tokens = sum(count for _, count in windows)
    expected = math.exp(sum(loss * count for loss, count in windows) / tokens)
    result = scored(ours)
    assert result.tokens == tokens
    assert result.perplexity == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("config", [CONFIGS["llama"], GEMMA], ids=["llama", "gemma3"])
@torch.no_grad()
def test_every_window_of_a_long_document_is_read_after_the_bos_token(
    models_of: Callable[[Any], tuple[Any, Decoder]], config: Any
) -> None:
    """As llama.cpp computes perplexity: the loss of transformers over [BOS] and a chunk of the text."""
    theirs, ours = models_of(config)
    text = np.random.default_rng(1).integers(3, VOCAB_SIZE, 150).astype(np.int32)
    document = Tokens("f", 1, np.concatenate([[np.int32(BOS)], text]), np.arange(151) >= 1, 150)
    rows, _ = pack([document], seq_len=SEQ_LEN, pad_id=0, bos_ids=[BOS])
    nats, tokens = 0.0, 0
    while tokens < len(text):
        last = text[max(0, tokens - 1) : tokens].tolist()  # the token that the window before ends with
        chunk = text[tokens : tokens + SEQ_LEN - len(last)].tolist()
        labels = torch.tensor([[-100] * (1 + len(last)) + chunk])
        nats += float(theirs(torch.tensor([[BOS, *last, *chunk]]), labels=labels).loss) * len(chunk)
        tokens += len(chunk)
    result = score(ours, rows, n_bytes=1, batch_size=3)
    assert result.tokens == tokens == len(text)
    assert result.loss == pytest.approx(nats / tokens, rel=1e-5)
    without = score(ours, pack([document], seq_len=SEQ_LEN, pad_id=0)[0], n_bytes=1, batch_size=3)
    assert abs(without.loss - result.loss) > 1e-3


def test_perplexity_differs_from_unweighted_means_of_windows(models: tuple[Any, Decoder]) -> None:
    theirs, ours = models
    windows = window_losses(theirs)
    perplexity = scored(ours).perplexity
    mean_of_means = math.exp(sum(loss for loss, _ in windows) / len(windows))
    mean_of_perplexities = sum(math.exp(loss) for loss, _ in windows) / len(windows)
    assert abs(mean_of_means / perplexity - 1) > 0.01
    assert abs(mean_of_perplexities / perplexity - 1) > 0.01


def test_the_score_does_not_depend_on_the_batch_size(models: tuple[Any, Decoder]) -> None:
    single, *others = (scored(models[1], batch_size) for batch_size in (1, 2, 100))
    for other in others:
        assert other.tokens == single.tokens
        assert other.nats == pytest.approx(single.nats, rel=1e-6)


def test_the_score_with_a_head_in_tiles_is_the_same(
    models: tuple[Any, Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models[1]
    whole = scored(model)
    tiles: list[int] = []
    of_tiles = FusedLinear.tiles

    def counted(head: FusedLinear, x: Any, rows: int) -> Any:
        tiles.append(rows)
        return of_tiles(head, x, rows)

    monkeypatch.setattr(FusedLinear, "tiles", counted)
    tiled = score(model, rows(), n_bytes=1, batch_size=3, tiled_head=True)
    assert tiles
    assert tiled.loss == pytest.approx(whole.loss, rel=1e-5)


def test_bits_per_byte_are_nats_over_the_log_of_2_and_the_bytes() -> None:
    result = Score(nats=1000 * math.log(2), tokens=400, n_bytes=1600)
    assert result.bits_per_byte == pytest.approx(0.625)
    assert result.loss == pytest.approx(2.5 * math.log(2))
    assert result.perplexity == pytest.approx(2**2.5)
    assert math.isnan(Score(1.0, 1, 0).bits_per_byte)


@pytest.mark.parametrize(("nats", "expected"), [(5000.0, math.inf), (math.inf, math.inf)])
def test_a_diverged_model_has_an_infinite_perplexity(nats: float, expected: float) -> None:
    assert Score(nats, 2, 10).perplexity == expected


def test_evaluation_does_not_change_the_training_mode_and_gradients(
    models_of: Callable[[Any], tuple[Any, Decoder]],
) -> None:
    _, model = models_of(CONFIGS["llama"])
    adapters.create_(model, AdapterPlan(LoraSpec(rank=2, alpha=4, dropout=0.5)), seed=0)
    parameters = adapters.trained(model)
    for parameter in parameters.values():
        torch.nn.init.normal_(parameter)
        parameter.grad = torch.full_like(parameter, 3.0)
    evaluated = scored(model.eval())
    assert not model.training
    assert scored(model.train()) == evaluated  # dropout is off
    assert all(module.training for module in model.modules())
    assert all(p.grad is not None and bool((p.grad == 3.0).all()) for p in parameters.values())


def test_the_losses_of_each_document_are_those_of_the_document_alone(models: tuple[Any, Decoder]) -> None:
    """Also of those that are split over rows: each of them is scored in rows of its own length."""
    documents = [*texts(), *texts()[:3]]
    packed, _ = pack(documents, seq_len=SEQ_LEN, pad_id=0)
    result = score(models[1], packed, n_bytes=1, batch_size=3)
    assert result.units is not None
    assert (result.units.over, result.units.documents, result.units.rows) == (DOCUMENTS, 11, len(packed))
    assert (result.units.nats.sum(), result.units.tokens.sum()) == pytest.approx((result.nats, result.tokens))
    for number, document in enumerate(documents):
        own, _ = pack([document], seq_len=SEQ_LEN, pad_id=0)
        alone = score(models[1], [row for row in own if (row.labels >= 0).any()], n_bytes=1, batch_size=1)
        assert result.units.tokens[number] == alone.tokens
        assert result.units.nats[number] == pytest.approx(alone.nats, rel=1e-5)


def test_progress_counts_every_row(models: tuple[Any, Decoder]) -> None:
    done: list[int] = []
    score(models[1], rows(), n_bytes=1, batch_size=4, progress=done.append)
    assert sum(done) == len(rows())
    assert max(done) == 4


@pytest.mark.parametrize(("window", "stride"), [(16, 4), (24, 24), (30, 11)])
def test_a_sliding_window_has_the_losses_of_the_loop_in_transformers_documentation(
    models: tuple[Any, Decoder], window: int, stride: int
) -> None:
    """The loop over end positions, with every label before the new ones ignored; its windows have the last label."""
    theirs, ours = models
    text = Tokens("f", 1, np.random.default_rng(3).integers(0, VOCAB_SIZE, 83).astype(np.int32), np.arange(83) > 0, 83)
    ids, total, counted, previous = torch.from_numpy(text.ids.astype(np.int64))[None], 0.0, 0, 0
    for begin in range(0, 83, stride):
        end = min(begin + window + 1, 83)
        labels = ids[:, begin:end].clone()
        labels[:, : -(end - previous)] = -100
        with torch.no_grad():
            loss = float(theirs(ids[:, begin:end], labels=labels).loss)
        new = int((labels[:, 1:] != -100).sum())
        total, counted, previous = total + loss * new, counted + new, end
        if end == 83:
            break
    windows = pack_windows([text], window=window, stride=stride, pad_id=0)
    result = score(ours, windows, n_bytes=1, batch_size=2)
    assert result.tokens == counted == 82
    assert result.loss == pytest.approx(total / counted, rel=1e-5)
