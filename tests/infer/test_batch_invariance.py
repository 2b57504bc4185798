"""An answer and its log-probabilities have the same bits alone, repeated, in any batch and with any chunks."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
import torch

from octavo.infer.engine import Engine
from octavo.infer.requests import Limits, Request, Token
from octavo.infer.sample import Sampling
from octavo.ops import tiles

if TYPE_CHECKING:
    from tests.infer.conftest import Family

VOCAB_SIZE, CONTEXT, TILE = 258, 48, 4
TYPES = torch.float32, torch.bfloat16
Answer = list[tuple[int, float | None]]


@pytest.fixture(autouse=True)
def tiles_of_four_tokens(prefill_tiles_of_one_token: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that prompts here have several tiles and an incomplete last one."""
    monkeypatch.setattr(tiles, "PREFILL_TILE", TILE)


def requests() -> list[Request]:
    """Prompts of 1 to 33 tokens, half of which begin like another one, to the base and two adapters in turn."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCAB_SIZE, (64,), generator=draw).tolist()
    batch = []
    for number, length in enumerate((1, 4, 5, 9, 16, 17, 23, 30, 33)):
        start = 0 if number % 2 else 3 * number
        sampling = Sampling(temperature=0.0 if number % 3 else 0.8, max_new_tokens=6, seed=number)
        adapter = (None, "blocks", "embeddings")[number % 3]
        batch.append(Request(tuple(ids[start : start + length]), sampling, adapter, logprobs=2))
    return batch


def serving_engine(family: Family, scheme: str, dtype: torch.dtype, **limits: Any) -> Engine:
    engine = family.engine(Limits(max_len=CONTEXT, queue=64, **limits), family.model(scheme, dtype))
    for name in ("blocks", "embeddings"):
        engine.load_adapter(name, family.adapter(name))
    return engine


def bits(tokens: list[Token]) -> Answer:
    return [(token.token_id, token.logprob) for token in tokens]


def answers_of(engine: Engine, family: Family, batch: list[Request]) -> list[Answer]:
    streams = [engine.submit(request) for request in batch]
    family.run_out(engine)
    return [bits(stream.ready()) for stream in streams]


# Each scheme with each type, and each family with each of them.
USUAL = [
    ("llama", "none", torch.float32), ("llama", "int8", torch.bfloat16), ("llama", "nf4", torch.bfloat16),
    ("gptj", "none", torch.bfloat16), ("gptj", "int8", torch.float32), ("gptj", "nf4", torch.float32),
    ("gemma2", "int8", torch.float32), ("gemma3", "none", torch.bfloat16),
]  # fmt: skip
OTHERS = [case for case in product(("llama", "gptj"), ("none", "int8", "nf4"), TYPES) if case not in USUAL]


@pytest.mark.parametrize(
    ("family", "scheme", "dtype"),
    [*USUAL, *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in OTHERS)],
    ids=str,
    indirect=["family"],
)
def test_an_answer_has_the_same_bits_alone_repeated_and_in_any_batch(
    family: Family, scheme: str, dtype: torch.dtype
) -> None:
    batch = requests()
    one = serving_engine(family, scheme, dtype, slots=1, chunk=TILE)
    alone = [answers_of(one, family, [request])[0] for request in batch]
    assert len({tuple(answer) for answer in alone}) == len(batch)
    again = [answers_of(one, family, [request, request]) for request in batch]
    assert again == [[answer, answer] for answer in alone]
    assert one.stats().reused_tokens_total > 0  # part of the prompts was copied
    several = serving_engine(family, scheme, dtype, slots=5, chunk=3 * TILE)
    assert answers_of(several, family, batch) == alone
    assert answers_of(several, family, batch[::-1]) == alone[::-1]


def test_loading_an_adapter_changes_no_bit_of_another(family: Family) -> None:
    """Even one of a higher rank, for which the banks of all layers grow."""
    batch = [request for request in requests() if request.adapter != "embeddings"]
    engine = family.engine(Limits(slots=3, max_len=CONTEXT, queue=64), family.model("int8", torch.bfloat16))
    engine.load_adapter("blocks", family.adapter("blocks"))
    before = answers_of(engine, family, batch)
    engine.load_adapter("embeddings", family.adapter("embeddings"))
    assert answers_of(engine, family, batch) == before
