"""Rotary positions that depend on the length of a request, longrope and dynamic: the same answer in any engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.infer.conftest import LLAMA, NO_IDS, _write_model
from transformers import LlamaConfig, Phi3Config, PreTrainedTokenizerFast

from octavo.infer.engine import Engine
from octavo.infer.generate import complete
from octavo.infer.requests import Limits, Request
from octavo.infer.sample import Sampling
from octavo.models import Decoder
from octavo.ops import tiles
from octavo.ops.quantize import scheme_named
from octavo.store.sources import FolderSource
from octavo.store.weights import load

ORIGINAL = 40
SIZES: dict[str, Any] = {"vocab_size": 264, **LLAMA, **NO_IDS, "max_position_embeddings": 160}
FACTORS = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.0 + 2 * i for i in range(8)],
}  # fmt: skip
CONFIGS = {
    "longrope": Phi3Config(**SIZES, original_max_position_embeddings=ORIGINAL, rope_parameters=FACTORS),
    "dynamic": LlamaConfig(
        **SIZES | {"max_position_embeddings": ORIGINAL},
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    ),
}
# (tokens of the prompt, new tokens): short, across the original context, long; the last begins like the first.
SHAPES = ((33, 6), (30, 40), (70, 20), (12, 8))
Model = tuple[Decoder, PreTrainedTokenizerFast]


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("models")
    _, tokenizer = _write_model(folder, CONFIGS[request.param])
    return (
        load(FolderSource(folder), scheme_named("none"), dtype=torch.float32, device=torch.device("cpu")).eval(),
        tokenizer,
    )


def requests() -> list[Request]:
    """Prompts with one beginning, so that a later one could reuse the keys of an earlier one."""
    ids = torch.randint(1, 257, (max(length for length, _ in SHAPES),), generator=torch.Generator().manual_seed(3))
    return [
        Request(tuple(ids[:length].tolist()), Sampling(temperature=0.0, max_new_tokens=new)) for length, new in SHAPES
    ]


def answers(model: Model, given: list[Request], *, slots: int, max_len: int) -> list[list[int]]:
    engine = Engine(*model, base="base", limits=Limits(slots=slots, max_len=max_len, queue=len(given)))
    streams = [engine.submit(request) for request in given]
    while (stats := engine.stats()).running or stats.waiting:
        engine.step()
    return [[token.token_id for token in stream.ready()] for stream in streams]


@pytest.mark.parametrize(("slots", "max_len"), [(1, 100), (1, 160), (4, 160), (2, 90)])
def test_an_answer_depends_on_its_own_request_alone(
    model: Model, slots: int, max_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "PREFILL_TILE", 8)  # prefixes of 8 tokens are reused
    decoder, tokenizer = model
    given = requests()
    alone = [list(complete(decoder, tokenizer, list(one.prompt), one.sampling).token_ids) for one in given]
    assert answers(model, given, slots=slots, max_len=max_len) == alone
    assert answers(model, given[::-1], slots=slots, max_len=max_len) == alone[::-1]


def test_lengths_with_equal_frequencies_are_one_regime(model: Model) -> None:
    decoder = model[0]
    longrope = bool(decoder.config.attention[0].rotary and decoder.config.attention[0].rotary.long)
    assert decoder.length_regime(3) == decoder.length_regime(ORIGINAL)
    assert decoder.length_regime(ORIGINAL) != decoder.length_regime(ORIGINAL + 1)
    assert (decoder.length_regime(ORIGINAL + 1) == decoder.length_regime(ORIGINAL + 9)) == longrope
