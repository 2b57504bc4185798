"""Families without a fused block train too: packed documents, 8-bit matmuls, every way to save memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.commands.finetune.conftest import Tune
from tests.conftest import _write_tiny
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    Olmo2Config,
    Qwen3Config,
    SmolLM3Config,
)

SHAPE: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128,
}  # fmt: skip
NO_IDS: dict[str, Any] = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
GEMMA = {"num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 12}
CONFIGS = {
    "qwen3": Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=16),
    "smollm3": SmolLM3Config(**SHAPE, num_key_value_heads=2, no_rope_layers=[0, 1], **NO_IDS),
    "olmo2": Olmo2Config(**SHAPE, **NO_IDS),
    "gemma2": Gemma2Config(**SHAPE, **GEMMA, **NO_IDS, initializer_range=0.05),
    "gemma3": Gemma3TextConfig(**SHAPE, **GEMMA, **NO_IDS, sliding_window_pattern=2),
    "neox": GPTNeoXConfig(**SHAPE),
    "gpt2": GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=128, **NO_IDS),
    "gpt_neo": GPTNeoConfig(
        vocab_size=320,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=16,
        max_position_embeddings=128,
        **NO_IDS,
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_tiny(tmp_path_factory.mktemp("models") / request.param, CONFIGS[request.param])


def losses(run: Path) -> list[float]:
    events = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [event["loss"] for event in events if event["event"] == "step"]


def test_a_run_on_packed_documents_with_8bit_matmuls_is_near_to_the_exact_one(
    folder: Path, tune: Tune, tmp_path: Path
) -> None:
    runs = []
    for matmul in ("exact", "8bit"):
        tune(tmp_path / matmul, model=str(folder), scheme="int8", matmul=matmul, split_on="lines", steps=16)
        runs.append(losses(tmp_path / matmul))
    exact, short = runs
    assert sum(exact[:4]) > sum(exact[-4:])  # of another row each: a single loss may be higher
    assert short != exact
    # The first loss has the error of one forward pass. Later ones also have what 16 updates of a tiny random model make
    # of it, which is several times as much for single rows and averages out.
    assert short[0] == pytest.approx(exact[0], rel=0.005)
    assert sum(short) == pytest.approx(sum(exact), rel=0.02)


def test_recomputation_changes_no_loss_with_dropout_on(folder: Path, tune: Tune, tmp_path: Path) -> None:
    for recompute in ("none", "full"):
        tune(tmp_path / recompute, model=str(folder), scheme="none", dropout=0.2, recompute=recompute, steps=3)
    assert losses(tmp_path / "full") == losses(tmp_path / "none")
