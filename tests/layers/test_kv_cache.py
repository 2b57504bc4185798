"""The key/value caches: each row or slot attends to its tokens in order, in each layer, within max_len positions."""

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


def random_qkv(rows: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """q (rows, length, 2 G, D), k and v (rows, length, G, D)."""
    k, v = torch.randn(2, rows, length, HEADS, SIZE)
    return torch.randn(rows, length, 2 * HEADS, SIZE), k, v


@settings(max_examples=25, deadline=None)
@given(chunks=st.lists(st.integers(1, 4), min_size=1, max_size=5), spare=st.integers(0, 2))
def test_a_prompt_in_chunks_has_the_attention_of_the_entire_prompt(chunks: list[int], spare: int) -> None:
    cache = cache_of(sum(chunks) + spare)
    qkv = [random_qkv(BATCH, sum(chunks)) for _ in range(LAYERS)]
    expected = [causal_attention(*layer_qkv) for layer_qkv in qkv]
    for length in chunks:
        span = slice(cache.length, cache.length + length)
        view = cache.next(length)
        assert view.positions.tolist() == [list(range(span.start, span.stop))]
        for layer, (q, k, v) in enumerate(qkv):
            actual = view.attend(layer, q[:, span], k[:, span], v[:, span])
            torch.testing.assert_close(actual, expected[layer][:, span])
        view.finish()
    assert cache.length == sum(chunks)
    for layer, (_, k, v) in enumerate(qkv):
        assert torch.equal(cache.keys[layer, :, : cache.length], k)
        assert torch.equal(cache.values[layer, :, : cache.length], v)


def test_positions_without_finish_are_overwritten() -> None:
    cache = cache_of(4)
    cache.next(3).attend(0, *random_qkv(BATCH, 3))
    q, k, v = random_qkv(BATCH, 2)
    torch.testing.assert_close(cache.next(2).attend(0, q, k, v), causal_attention(q, k, v))
    assert cache.length == 0


def test_more_than_max_len_positions_are_refused() -> None:
    cache = cache_of(4)
    cache.next(3).finish()
    with pytest.raises(AssertionError, match="5 positions in a cache of 4"):
        cache.next(2)


def test_keys_are_stored_in_the_dtype_of_the_cache() -> None:
    cache = cache_of(4, dtype=torch.bfloat16)
    q, k, v = (x.bfloat16() for x in random_qkv(BATCH, 2))
    assert cache.next(2).attend(1, q, k, v).dtype == cache.keys.dtype == torch.bfloat16


SLOTS, MAX_LEN = 4, 9


def slot_cache() -> SlotCache:
    return SlotCache(LAYERS, slots=SLOTS, max_len=MAX_LEN, **SHAPE)


def steps_of(draw: st.DrawFn) -> list[tuple[str, int, int]]:
    """Prefills of one slot, decode steps of the first slots without an idle one, and copies, within max_len."""
    lengths, steps = [0] * SLOTS, []
    for _ in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(["one", "many", "copy"]))
        first = draw(st.integers(0, SLOTS - 1))
        if kind == "copy":
            target = draw(st.integers(0, SLOTS - 1))
            lengths[target] = draw(st.integers(0, lengths[first]))
            steps.append((f"copy {target}", first, lengths[target]))
        elif kind == "one" and lengths[first] < MAX_LEN:
            count = draw(st.integers(1, MAX_LEN - lengths[first]))
            lengths[first] += count
            steps.append((kind, first, count))
        elif kind == "many":
            count = draw(st.integers(1, SLOTS))
            idle = draw(st.integers(0, SLOTS - 1))  # the idle slot, if it is among them
            live = [slot for slot in range(count) if slot != idle]
            if live and all(lengths[slot] < MAX_LEN for slot in live):
                for slot in live:
                    lengths[slot] += 1
                steps.append((kind, idle, count))
    return steps


@settings(max_examples=60, deadline=None)
@given(steps=st.composite(steps_of)())
def test_each_slot_attends_to_its_tokens_only(steps: list[tuple[str, int, int]]) -> None:
    """The reference has the keys and values of each slot in a tensor of its own."""
    cache = slot_cache()
    for tensor in (cache.keys, cache.values):
        tensor.copy_(torch.randn(tensor.shape) * 1e6)  # of previous requests
    stored = [[(torch.zeros(0, HEADS, SIZE), torch.zeros(0, HEADS, SIZE)) for _ in range(SLOTS)] for _ in range(LAYERS)]
    for kind, first, count in steps:
        if kind.startswith("copy"):
            target = int(kind.removeprefix("copy "))
            cache.copy_(first, target, count)
            for slots in stored:
                slots[target] = slots[first][0][:count], slots[first][1][:count]
        elif kind == "one":
            append(cache, stored, {first: 0}, count)
        else:
            append(cache, stored, {slot: slot for slot in range(count) if slot != first}, 1, rows=count)
    assert cache.lengths == [len(keys) for keys, _ in stored[0]]
    for layer, slots in enumerate(stored):
        for slot, (keys, values) in enumerate(slots):
            assert torch.equal(cache.keys[layer, slot, : len(keys)], keys)
            assert torch.equal(cache.values[layer, slot, : len(keys)], values)


def append(
    cache: SlotCache, stored: list[list[tuple[Tensor, Tensor]]], live: dict[int, int], new: int, rows: int = 0
) -> None:
    """Appends `new` tokens to each slot of `live`, slot -> row of the batch: in a decode step of `rows`, or one slot.

    Compares attention with that over `stored`: for each layer and slot the keys and values (S, G, D).
    """
    starts = list(cache.lengths)
    if rows:
        lengths = torch.tensor([starts[slot] if slot in live else -1 for slot in range(rows)])
        view = cache.decode(lengths, int(lengths.max())).next(1)
    else:
        view = cache.slot(next(iter(live))).next(new)
    for slot, row in live.items():
        assert view.positions[row].tolist() == list(range(starts[slot], starts[slot] + new))
    for layer, slots in enumerate(stored):
        q, k, v = random_qkv(rows or 1, new)
        actual = view.attend(layer, q, k, v)
        for slot, row in live.items():
            slots[slot] = torch.cat((slots[slot][0], k[row])), torch.cat((slots[slot][1], v[row]))
            mask = torch.ones(new, starts[slot] + new, dtype=torch.bool).tril(starts[slot])
            all_k, all_v = (x.repeat_interleave(2, dim=1).transpose(0, 1) for x in slots[slot])  # (2 G, S, D)
            expected = F.scaled_dot_product_attention(q[row].transpose(0, 1), all_k, all_v, attn_mask=mask)
            torch.testing.assert_close(actual[row], expected.transpose(0, 1))
        assert not any(actual[row].any() for row in range(rows) if row not in live.values())
    assert cache.lengths == starts  # until all layers have stored the positions
    view.finish()
    if rows:  # the caller of a decode step increments the lengths
        for slot in live:
            cache.lengths[slot] += 1


def test_slots_are_finite_from_the_start_and_once_cleared() -> None:
    """Attention weights of 0 times NaN are NaN, and new memory may contain NaN."""
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        assert torch.empty(3).isnan().all()
        cache = slot_cache()
    finally:
        torch.use_deterministic_algorithms(False)
    assert not cache.keys.any()
    assert not cache.values.any()
    nan = torch.full((1, 5, HEADS, SIZE), torch.nan)
    for slot in (1, 2):
        view = cache.slot(slot).next(5)
        for layer in range(LAYERS):
            view.attend(layer, nan, nan, nan)
        view.finish()
    cache.clear_(1)
    assert cache.lengths == [0, 0, 5, 0]
    for tensor in (cache.keys, cache.values):
        assert tensor.isnan().any(dim=(0, 2, 3, 4)).tolist() == [False, False, True, False]


def test_more_than_max_len_positions_of_a_slot_and_decode_of_several_tokens_are_refused() -> None:
    cache = slot_cache()
    cache.lengths = [0, MAX_LEN - 1, 0, 0]
    for slot, new in ((0, MAX_LEN + 1), (1, 2)):
        with pytest.raises(AssertionError, match=f"in a cache of {MAX_LEN}"):
            cache.slot(slot).next(new)
    with pytest.raises(AssertionError):
        cache.decode(torch.zeros(2, dtype=torch.long), 0).next(2)
