"""Models with sliding windows over a cache that is far shorter than the sequence, against transformers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models.families import CASES, VOCABULARY
from torch import Tensor

from octavo.infer.decoding import DecodeRunner
from octavo.infer.slots import Slots
from octavo.layers import kv_store
from octavo.layers.kv_cache import KeyValueCache
from octavo.layers.multi_lora import ServedAdapters
from octavo.models import Decoder
from octavo.ops import tiles
from octavo.ops.tiles import Phase

NAMES = [
    "mistral, short window", "gemma2, grouped heads, window, soft-caps", "gemma3, a full layer after five",
    "gemma3, every second layer full, both rotary settings",
]  # fmt: skip
ROWS, LENGTH, CHUNK = 4, 120, 4  # the windows have 6 to 9 positions, their layers hold 10 to 13
TOLERANCE = 2e-5  # of logits, absolute


class Case(NamedTuple):
    theirs: Any
    model: Decoder
    ids: Tensor  # (ROWS, LENGTH)
    logits: Tensor  # (ROWS, LENGTH, V), of transformers


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest, models_of: Callable[[Any], tuple[Any, Decoder]]) -> Case:
    theirs, model = models_of(CASES[request.param])
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = theirs(ids).logits
    assert logits.std() > 0.5
    return Case(theirs, model, ids, logits)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_store, "CHUNK", CHUNK)
    monkeypatch.setattr(tiles, "PREFILL_TILE", CHUNK)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def check_chunks(case: Case, chunks: list[int]) -> None:
    cache = case.model.new_cache(batch=ROWS, max_len=LENGTH)
    assert min(cache.held) <= 9 + CHUNK
    logits = [case.model(ids, cache=cache) for ids in case.ids.split(chunks, dim=1)]
    assert_same(torch.cat(logits, dim=1), case.logits)


@settings(max_examples=8, deadline=None)
@given(cuts=st.sets(st.integers(1, LENGTH - 1), max_size=8))
def test_logits_in_any_chunks_are_transformers(case: Case, cuts: set[int]) -> None:
    ends = [0, *sorted(cuts), LENGTH]
    check_chunks(case, [end - start for start, end in pairwise(ends)])


def test_logits_of_single_tokens_are_transformers(case: Case) -> None:
    check_chunks(case, [1] * LENGTH)


def serve(case: Case) -> tuple[Slots, DecodeRunner]:
    cache = case.model.new_slots(slots=ROWS, max_len=LENGTH)
    return Slots(cache), DecodeRunner(case.model, cache, ServedAdapters(), VOCABULARY)


def prefill(case: Case, slots: Slots, slot: int, ids: Tensor) -> Tensor:
    """Logits (T, V) of new tokens (T,) in a slot."""
    logits: Tensor = case.model(ids[None], cache=slots.cache.slot(slot))
    slots.append(slot, ids.tolist(), Phase.PREFILL)
    return logits[0]


@torch.no_grad()
def test_logits_in_slots_next_to_others_are_transformers(case: Case) -> None:
    """Three prompts in one padded pass, of which one is several times as long as a ring; one in chunks of its own."""
    slots, decoder = serve(case)
    lengths = [50, 3, 17, 64]
    padded = case.ids[:3, :60].clone()  # (3, 60)
    view = slots.cache.prefill(torch.arange(3), torch.tensor(lengths[:3]))
    logits = case.model(padded, cache=view)
    for slot, length in enumerate(lengths[:3]):
        slots.cache.lengths[slot] = length
        assert_same(logits[slot, :length], case.logits[slot, :length])
    for ids in case.ids[3, : lengths[3]].split(24):
        prefill(case, slots, 3, ids)
    for step in range(LENGTH - max(lengths)):
        at = range(ROWS), [length + step for length in lengths]
        assert_same(decoder.step(case.ids[at].tolist(), [0] * ROWS).logits, case.logits[at])


@torch.no_grad()
def test_a_prefix_is_reused_while_its_last_positions_are_held(case: Case) -> None:
    slots, decoder = serve(case)
    prefill(case, slots, 0, case.ids[0, :40])
    for token in case.ids[0, 40:44].tolist():  # an answer of CHUNK tokens
        decoder.step([token], [0])
        slots.append(0, [token], Phase.DECODE)
    for slot in (1, 0):  # the second time from the slot itself
        prompt = torch.cat([case.ids[0, :40], case.ids[slot + 1, :30]])  # (70,)
        assert slots.reuse_prefix(slot, None, prompt.tolist()) == 40
        assert_same(prefill(case, slots, slot, prompt[40:]), case.theirs(prompt[None]).logits[0, 40:])
    assert slots.reuse_prefix(2, None, case.ids[0, :44].tolist()) == 0  # both slots hold later positions only
    assert slots.reuse_prefix(2, None, prompt.tolist()) == 68


@torch.no_grad()
def test_a_copied_slot_continues(case: Case) -> None:
    slots, _ = serve(case)
    prefill(case, slots, 0, case.ids[0, :57])
    slots.copy(0, 3)
    slots.clear(0)
    assert_same(prefill(case, slots, 3, case.ids[0, 57:]), case.logits[0, 57:])


def cache_bytes(cache: kv_store.KeyValueStore) -> int:
    return sum(tensor.nbytes for group in cache.groups.values() for tensor in group)


def test_memory_is_bounded_by_the_windows(case: Case) -> None:
    config = case.model.config
    positions = [
        2000 if layer.spec.window is None else min(2000, layer.spec.window + CHUNK) for layer in config.attention
    ]
    numbers = sum(positions) * 2 * config.key_value_heads * config.head_size
    assert cache_bytes(case.model.new_cache(batch=3, max_len=2000)) == 3 * 4 * numbers
    assert cache_bytes(case.model.new_slots(slots=5, max_len=2000)) == 5 * 4 * numbers


def test_memory_of_gemma_3_12b(monkeypatch: pytest.MonkeyPatch) -> None:
    """48 layers, 8 key heads of 256, a full layer after five with a window of 1,024; 32,768 positions in bfloat16."""
    monkeypatch.undo()
    windows = [None if layer % 6 == 5 else 1024 for layer in range(48)]
    shape: dict[str, Any] = {
        "batch": 1, "max_len": 32_768, "heads": 8, "head_size": 256, "dtype": torch.bfloat16,
        "device": torch.device("meta"),
    }  # fmt: skip
    a_position = 2 * 8 * 256 * 2  # bytes of keys and values in a layer
    assert cache_bytes(KeyValueCache([None] * 48, **shape)) == 48 * 32_768 * a_position == 12 * 2**30
    bounded = cache_bytes(KeyValueCache(windows, **shape))
    assert bounded == (8 * 32_768 + 40 * (1024 + kv_store.CHUNK)) * a_position == int(2.46875 * 2**30)
