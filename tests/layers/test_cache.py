"""The key/value cache: what goes in comes out in order, for each layer alone, and never past its room."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.layers.cache import KeyValueCache

LAYERS, BATCH, HEADS, SIZE = 3, 2, 2, 4


def cache_of(room: int, dtype: torch.dtype = torch.float32) -> KeyValueCache:
    return KeyValueCache(
        LAYERS,
        batch=BATCH,
        room=room,
        heads=HEADS,
        head_size=SIZE,
        dtype=dtype,
        device=torch.device("cpu"),
    )


def fresh(length: int) -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, length, HEADS, SIZE), torch.randn(BATCH, length, HEADS, SIZE)


@settings(max_examples=25, deadline=None)
@given(pieces=st.lists(st.integers(1, 4), min_size=1, max_size=5), spare=st.integers(0, 2))
def test_pieces_come_back_whole_for_each_layer(pieces: list[int], spare: int) -> None:
    cache = cache_of(sum(pieces) + spare)
    seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(LAYERS)]
    for length in pieces:
        for layer in range(LAYERS):
            seen[layer].append(fresh(length))
            k, v = cache.extend(layer, *seen[layer][-1])
            assert torch.equal(k, torch.cat([piece[0] for piece in seen[layer]], dim=1))
            assert torch.equal(v, torch.cat([piece[1] for piece in seen[layer]], dim=1))
        cache.advance(length)
    assert cache.length == sum(pieces)


def test_what_is_not_advanced_over_is_written_again() -> None:
    cache = cache_of(4)
    cache.extend(0, *fresh(3))
    k, v = fresh(2)
    assert torch.equal(cache.extend(0, k, v)[0], k)
    assert cache.length == 0


def test_more_than_its_room_is_refused() -> None:
    cache = cache_of(4)
    cache.extend(0, *fresh(3))
    cache.advance(3)
    with pytest.raises(AssertionError, match="5 positions in a cache with room for 4"):
        cache.extend(0, *fresh(2))


def test_keys_are_kept_in_the_caches_type() -> None:
    k, _ = cache_of(4, torch.bfloat16).extend(1, *fresh(2))
    assert k.dtype == torch.bfloat16
