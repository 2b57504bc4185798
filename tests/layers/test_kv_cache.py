"""The key/value caches: a row or slot attends to its own tokens, in order, for each layer, and never past its room."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.layers.kv_cache import KeyValueCache, SlotCache
from octavo.ops.attention import causal_attention

LAYERS, BATCH, HEADS, SIZE = 3, 2, 2, 4
SHAPE: dict[str, Any] = {"heads": HEADS, "head_size": SIZE, "dtype": torch.float32, "device": torch.device("cpu")}


def cache_of(max_len: int, **shape: Any) -> KeyValueCache:
    return KeyValueCache(LAYERS, batch=BATCH, max_len=max_len, **{**SHAPE, **shape})


def fresh(rows: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, with twice as many heads, k and v."""
    k, v = torch.randn(2, rows, length, HEADS, SIZE)
    return torch.randn(rows, length, 2 * HEADS, SIZE), k, v


@settings(max_examples=25, deadline=None)
@given(pieces=st.lists(st.integers(1, 4), min_size=1, max_size=5), spare=st.integers(0, 2))
def test_pieces_see_what_they_would_see_in_one(pieces: list[int], spare: int) -> None:
    cache = cache_of(sum(pieces) + spare)
    whole = [fresh(BATCH, sum(pieces)) for _ in range(LAYERS)]
    wanted = [causal_attention(*own) for own in whole]
    for length in pieces:
        span = slice(cache.length, cache.length + length)
        over = cache.next(length)
        assert over.positions.tolist() == [list(range(span.start, span.stop))]
        for layer, own in enumerate(whole):
            found = over.attend(layer, *(x[:, span] for x in own))
            torch.testing.assert_close(found, wanted[layer][:, span])
        over.finish()
    assert cache.length == sum(pieces)
    for layer, (_, k, v) in enumerate(whole):
        assert torch.equal(cache.keys[layer, :, : cache.length], k)
        assert torch.equal(cache.values[layer, :, : cache.length], v)


def test_what_is_not_finished_is_written_again() -> None:
    cache = cache_of(4)
    cache.next(3).attend(0, *fresh(BATCH, 3))
    q, k, v = fresh(BATCH, 2)
    torch.testing.assert_close(cache.next(2).attend(0, q, k, v), causal_attention(q, k, v))
    assert cache.length == 0


def test_more_than_its_room_is_refused() -> None:
    cache = cache_of(4)
    cache.next(3).finish()
    with pytest.raises(AssertionError, match="5 positions in a cache with room for 4"):
        cache.next(2)


def test_keys_are_kept_in_the_caches_type() -> None:
    cache = cache_of(4, dtype=torch.bfloat16)
    q, k, v = (x.bfloat16() for x in fresh(BATCH, 2))
    assert cache.next(2).attend(1, q, k, v).dtype == cache.keys.dtype == torch.bfloat16


SLOTS, ROOM = 4, 9


def slots_of() -> SlotCache:
    return SlotCache(LAYERS, slots=SLOTS, max_len=ROOM, **SHAPE)


def steps_of(draw: st.DrawFn) -> list[tuple[str, int, int]]:
    """Reads of several tokens into one slot, or of one into each of the first but one, and copies, as there is room."""
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
            count = draw(st.integers(1, SLOTS))
            idle = draw(st.integers(0, SLOTS - 1))  # one that is left out, if it is among them
            live = [slot for slot in range(count) if slot != idle]
            if live and all(lengths[slot] < ROOM for slot in live):
                for slot in live:
                    lengths[slot] += 1
                steps.append((kind, idle, count))
    return steps


@settings(max_examples=60, deadline=None)
@given(steps=st.composite(steps_of)())
def test_each_slot_attends_to_its_own_tokens_whatever_lies_behind_them(steps: list[tuple[str, int, int]]) -> None:
    """The kernel keeps each slot's keys and values in a list, and attends to them alone."""
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
        elif kind == "one":
            read(cache, held, {first: 0}, count)
        else:
            read(cache, held, {slot: slot for slot in range(count) if slot != first}, 1, rows=count)
    assert cache.lengths == [len(keys) for keys, _ in held[0]]
    for layer, own in enumerate(held):
        for slot, (keys, values) in enumerate(own):
            assert torch.equal(cache.keys[layer, slot, : len(keys)], keys)
            assert torch.equal(cache.values[layer, slot, : len(keys)], values)


def read(
    cache: SlotCache, held: list[list[tuple[Tensor, Tensor]]], live: dict[int, int], new: int, rows: int = 0
) -> None:
    """`new` tokens into each slot of `live`, slot -> row of the batch: by a step of `rows`, or into one slot alone."""
    starts = list(cache.lengths)
    if rows:
        lengths = torch.tensor([starts[slot] if slot in live else -1 for slot in range(rows)])
        over = cache.step(lengths, int(lengths.max())).next(1)
    else:
        over = cache.slot(next(iter(live))).next(new)
    for slot, row in live.items():
        assert over.positions[row].tolist() == list(range(starts[slot], starts[slot] + new))
    for layer, own in enumerate(held):
        q, k, v = fresh(rows or 1, new)
        found = over.attend(layer, q, k, v)
        for slot, row in live.items():
            own[slot] = torch.cat((own[slot][0], k[row])), torch.cat((own[slot][1], v[row]))
            seen = torch.ones(new, starts[slot] + new, dtype=torch.bool).tril(starts[slot])
            whole_k, whole_v = (x.repeat_interleave(2, dim=1).transpose(0, 1) for x in own[slot])  # (2 G, S, D)
            wanted = F.scaled_dot_product_attention(q[row].transpose(0, 1), whole_k, whole_v, attn_mask=seen)
            torch.testing.assert_close(found[row], wanted.transpose(0, 1))
        assert not any(found[row].any() for row in range(rows) if row not in live.values())
    assert cache.lengths == starts  # until all layers have stored theirs
    over.finish()
    if rows:  # a step leaves the lengths to whoever takes it
        for slot in live:
            cache.lengths[slot] += 1


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
        over = cache.slot(slot).next(5)
        for layer in range(LAYERS):
            over.attend(layer, nan, nan, nan)
        over.finish()
    cache.clear_(1)
    assert cache.lengths == [0, 0, 5, 0]
    for store in (cache.keys, cache.values):
        assert store.isnan().any(dim=(0, 2, 3, 4)).tolist() == [False, False, True, False]


def test_more_than_a_slots_room_is_refused_and_so_is_a_step_of_several_tokens() -> None:
    cache = slots_of()
    cache.lengths = [0, ROOM - 1, 0, 0]
    for slot, new in ((0, ROOM + 1), (1, 2)):
        with pytest.raises(AssertionError, match=f"in a cache with room for {ROOM}"):
            cache.slot(slot).next(new)
    with pytest.raises(AssertionError):
        cache.step(torch.zeros(2, dtype=torch.long), 0).next(2)
