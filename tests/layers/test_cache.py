"""The key/value caches: what goes in comes out in order, for each layer and slot alone, and never past its room."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.layers.cache import KeyValueCache, SlotCache
from octavo.ops.attention import causal_attention

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


SLOTS, ROOM = 4, 9


def slots_of() -> SlotCache:
    return SlotCache(
        LAYERS,
        slots=SLOTS,
        room=ROOM,
        heads=HEADS,
        head_size=SIZE,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def steps_of(draw: st.DrawFn) -> list[tuple[str, int, int]]:
    """Writes of several tokens into one slot, or of one into several, and copies, while there is room."""
    lengths, steps = [0] * SLOTS, []
    for _ in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(["one", "many", "copy"]))
        first = draw(st.integers(0, SLOTS - 1))
        if kind == "copy":
            target = draw(st.integers(0, SLOTS - 1))
            lengths[target] = draw(st.integers(0, lengths[first]))
            steps.append((f"copy {target}", first, lengths[target]))
        elif kind == "one" and lengths[first] < ROOM:
            count = draw(st.integers(1, ROOM - lengths[first]))
            lengths[first] += count
            steps.append((kind, first, count))
        elif kind == "many":
            count = draw(st.integers(1, SLOTS - first))
            if max(lengths[first : first + count]) < ROOM:
                lengths[first : first + count] = [length + 1 for length in lengths[first : first + count]]
                steps.append((kind, first, count))
    return steps


@settings(max_examples=60, deadline=None)
@given(steps=st.composite(steps_of)())
def test_each_slot_attends_to_its_own_tokens_whatever_lies_behind_them(steps: list[tuple[str, int, int]]) -> None:
    """The twin keeps each slot's keys and values in a list, and attends to them alone."""
    cache = slots_of()
    for store in (cache.keys, cache.values):
        store.copy_(torch.randn(store.shape) * 1e6)  # what others left behind
    held = [[(torch.zeros(0, HEADS, SIZE), torch.zeros(0, HEADS, SIZE)) for _ in range(SLOTS)] for _ in range(LAYERS)]
    for kind, first, count in steps:
        if kind.startswith("copy"):
            target = int(kind.removeprefix("copy "))
            cache.copy_(first, target, count)
            for own in held:
                own[target] = own[first][0][:count], own[first][1][:count]
            continue
        rows, new = (1, count) if kind == "one" else (count, 1)
        view = cache.rows(first, rows)
        starts = [len(held[0][slot][0]) for slot in range(first, first + rows)]
        assert view.positions(new).tolist() == [list(range(start, start + new)) for start in starts]
        mask = view.mask(new)
        for layer, own in enumerate(held):
            q = torch.randn(rows, new, 2 * HEADS, SIZE)
            k, v = torch.randn(rows, new, HEADS, SIZE), torch.randn(rows, new, HEADS, SIZE)
            found = causal_attention(q, *view.at(layer)(k, v), mask=mask)
            for row, slot in enumerate(range(first, first + rows)):
                own[slot] = torch.cat((own[slot][0], k[row])), torch.cat((own[slot][1], v[row]))
                seen = torch.ones(new, starts[row] + new, dtype=torch.bool).tril(starts[row])
                wanted = causal_attention(q[row, None], own[slot][0][None], own[slot][1][None], mask=seen)
                torch.testing.assert_close(found[row, None], wanted)
        assert cache.lengths[first : first + rows] == starts  # until all layers have stored theirs
        view.advance(new)
    assert cache.lengths == [len(keys) for keys, _ in held[0]]
    for layer, own in enumerate(held):
        for slot, (keys, values) in enumerate(own):
            assert torch.equal(cache.keys[layer, slot, : len(keys)], keys)
            assert torch.equal(cache.values[layer, slot, : len(keys)], values)


def test_slots_are_finite_from_the_start_and_once_cleared() -> None:
    """Weights of 0 make nothing of a number, but NaN of NaN: so there is none, though fresh memory may hold it."""
    torch.use_deterministic_algorithms(True)  # fills what is taken and not written with NaN
    try:
        assert torch.empty(3).isnan().all()
        cache = slots_of()
    finally:
        torch.use_deterministic_algorithms(False)
    assert not cache.keys.any()
    assert not cache.values.any()
    nan = torch.full((1, 5, HEADS, SIZE), torch.nan)
    for slot in (1, 2):
        view = cache.rows(slot, 1)
        for layer in range(LAYERS):
            view.at(layer)(nan, nan)
        view.advance(5)
    cache.clear_(1)
    assert cache.lengths == [0, 0, 5, 0]
    for store in (cache.keys, cache.values):
        assert store.isnan().any(dim=(0, 2, 3, 4)).tolist() == [False, False, True, False]


def test_more_than_a_slots_room_is_refused_and_so_are_chunks_of_several_slots() -> None:
    cache = slots_of()
    cache.lengths = [0, ROOM - 1, 0, 0]
    for first, rows, new in ((0, 1, ROOM + 1), (1, 1, 2), (2, 2, 2)):
        with pytest.raises(AssertionError):
            cache.rows(first, rows).at(0)(*torch.zeros(2, rows, new, HEADS, SIZE))
    k, _ = cache.rows(0, 2).at(0)(*torch.ones(2, 2, 1, HEADS, SIZE))
    assert k.shape == (2, ROOM, HEADS, SIZE)
    assert k.data_ptr() == cache.keys.data_ptr()  # a view: nothing is copied to be read
