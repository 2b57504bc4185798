"""The key/value caches: each row or slot attends to its tokens in order, in each layer, within max_len positions.

The layers have different windows: two of them hold fewer positions than max_len.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.layers import kv_store
from octavo.layers.kv_cache import KeyValueCache, SlotCache
from octavo.layers.kv_store import KeyValueStore
from octavo.ops import tiles
from octavo.ops.attention import AttentionSpec, causal_attention

WINDOWS, CHUNK = (None, 2, 3), 2
SPECS = [AttentionSpec(window=window) for window in WINDOWS]
LAYERS, BATCH, HEADS, SIZE = len(WINDOWS), 2, 2, 4
SHAPE: dict[str, Any] = {"heads": HEADS, "head_size": SIZE, "dtype": torch.float32, "device": torch.device("cpu")}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_store, "CHUNK", CHUNK)


def cache_of(max_len: int, **shape: Any) -> KeyValueCache:
    return KeyValueCache(WINDOWS, batch=BATCH, max_len=max_len, **{**SHAPE, **shape})


def tensors(cache: KeyValueStore) -> list[Tensor]:
    return [tensor for group in cache.groups.values() for tensor in group]


def last_positions(cache: KeyValueStore, layer: int, length: int) -> tuple[slice, list[int]]:
    """The positions that a token at `length` sees, and their cells."""
    window = WINDOWS[layer]
    first = 0 if window is None else max(0, length + 1 - window)
    return slice(first, length), [position % cache.keys(layer).shape[1] for position in range(first, length)]


def random_qkv(rows: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """q (rows, length, 2 G, D), k and v (rows, length, G, D)."""
    k, v = torch.randn(2, rows, length, HEADS, SIZE)
    return torch.randn(rows, length, 2 * HEADS, SIZE), k, v


@settings(max_examples=25, deadline=None)
@given(chunks=st.lists(st.integers(1, 4), min_size=1, max_size=5), spare=st.integers(0, 2))
def test_a_prompt_in_chunks_has_the_attention_of_the_entire_prompt(chunks: list[int], spare: int) -> None:
    cache = cache_of(sum(chunks) + spare)
    qkv = [random_qkv(BATCH, sum(chunks)) for _ in range(LAYERS)]
    expected = [causal_attention(*layer_qkv, spec) for layer_qkv, spec in zip(qkv, SPECS, strict=True)]
    for length in chunks:
        span = slice(cache.length, cache.length + length)
        view = cache.next(length)
        assert view.positions.tolist() == [list(range(span.start, span.stop))]
        for layer, (q, k, v) in enumerate(qkv):
            actual = view.attend(layer, q[:, span], k[:, span], v[:, span], SPECS[layer])
            torch.testing.assert_close(actual, expected[layer][:, span])
        view.finish()
    assert cache.length == sum(chunks)
    for layer, (_, k, v) in enumerate(qkv):
        positions, cells = last_positions(cache, layer, cache.length)
        assert torch.equal(cache.keys(layer)[:, cells], k[:, positions])
        assert torch.equal(cache.values(layer)[:, cells], v[:, positions])


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
    assert cache.next(2).attend(1, q, k, v).dtype == cache.keys(1).dtype == torch.bfloat16


SLOTS, MAX_LEN = 4, 9


def slot_cache() -> SlotCache:
    return SlotCache(WINDOWS, slots=SLOTS, max_len=MAX_LEN, **SHAPE)


def steps_of(draw: st.DrawFn) -> list[tuple[str, int, int]]:
    """Prefills of one slot, decode steps of the first slots without an idle one, and copies, within max_len."""
    lengths, written, steps = [0] * SLOTS, [0] * SLOTS, []
    for _ in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(["one", "many", "copy"]))
        first = draw(st.integers(0, SLOTS - 1))
        if kind == "copy":
            target = draw(st.integers(0, SLOTS - 1))
            possible = [n for n in range(lengths[first] + 1) if continues(n, written[first])]
            lengths[target] = draw(st.sampled_from(possible))
            written[target] = written[first] if lengths[target] else 0
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
        written = [max(pair) for pair in zip(written, lengths, strict=True)]
    return steps


def continues(length: int, written: int) -> bool:
    """Whether the cells still hold what a token at position `length` sees, after `written` positions from 0 on."""
    for window in (2, 3):
        cells = dict.fromkeys(range(window + CHUNK), -1)
        cells |= {position % (window + CHUNK): position for position in range(written)}
        if not {*range(max(0, length + 1 - window), length)} <= {*cells.values()}:
            return False
    return True


@given(length=st.integers(0, 40), more=st.integers(0, 40))
def test_a_slot_can_continue_from_a_prefix_whose_last_positions_it_holds(length: int, more: int) -> None:
    cache = SlotCache(WINDOWS, slots=1, max_len=80, **SHAPE)
    assert cache.can_continue(length, length + more) == continues(length, length + more) or length == 0


@settings(max_examples=60, deadline=None)
@given(steps=st.composite(steps_of)())
def test_each_slot_attends_to_its_tokens_only(steps: list[tuple[str, int, int]]) -> None:
    """The reference has the keys and values of each slot in a tensor of its own."""
    cache = slot_cache()
    for tensor in tensors(cache):
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
            positions, cells = last_positions(cache, layer, len(keys))
            assert torch.equal(cache.keys(layer)[slot, cells], keys[positions])
            assert torch.equal(cache.values(layer)[slot, cells], values[positions])


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
        actual = view.attend(layer, q, k, v, SPECS[layer])
        for slot, row in live.items():
            slots[slot] = torch.cat((slots[slot][0], k[row])), torch.cat((slots[slot][1], v[row]))
            mask = torch.ones(new, starts[slot] + new, dtype=torch.bool).tril(starts[slot])
            if (window := WINDOWS[layer]) is not None:
                mask = mask.triu(starts[slot] + 1 - window)
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
    assert not any(tensor.any() for tensor in tensors(cache))
    nan = torch.full((1, 5, HEADS, SIZE), torch.nan)
    for slot in (1, 2):
        view = cache.slot(slot).next(5)
        for layer in range(LAYERS):
            view.attend(layer, nan, nan, nan, SPECS[layer])
        view.finish()
    cache.clear_(1)
    assert cache.lengths == [0, 0, 5, 0]
    for tensor in tensors(cache):
        assert tensor.isnan().any(dim=(0, 2, 3, 4)).tolist() == [False, False, True, False]


def test_more_than_max_len_positions_of_a_slot_and_decode_of_several_tokens_are_refused() -> None:
    cache = slot_cache()
    cache.lengths = [0, MAX_LEN - 1, 0, 0]
    for slot, new in ((0, MAX_LEN + 1), (1, 2)):
        with pytest.raises(AssertionError, match=f"in a cache of {MAX_LEN}"):
            cache.slot(slot).next(new)
    with pytest.raises(AssertionError):
        cache.decode(torch.zeros(2, dtype=torch.long), 0).next(2)


def test_layers_hold_their_window_and_chunk_and_layers_without_windows_share_one_tensor() -> None:
    cache = SlotCache((5, None, 30, 5), slots=SLOTS, max_len=20, **SHAPE)
    assert [cache.keys(layer).shape[1] for layer in range(4)] == [5 + CHUNK, 20, 20, 5 + CHUNK]
    assert [tensor.shape[:3] for tensor in tensors(cache)] == 2 * [(2, SLOTS, 7)] + 2 * [(2, SLOTS, 20)]
    places = {(cache.keys(layer).data_ptr(), cache.values(layer).data_ptr()) for layer in range(4)}
    assert len(places) == 4
    assert [tensor.shape for tensor in tensors(KeyValueCache([None] * 3, batch=2, max_len=20, **SHAPE))] == 2 * [
        (3, 2, 20, HEADS, SIZE)
    ]


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, MAX_LEN), min_size=1, max_size=SLOTS), padded=st.integers(0, 2))
def test_padded_prompts_are_stored_without_their_padding(lengths: list[int], padded: int) -> None:
    """In rings that are shorter than the prompts; the cells are then those of the same prompt in a pass of its own."""
    cache, expected = slot_cache(), slot_cache()
    total = min(MAX_LEN, max(lengths) + padded)
    slots = [3, 1, 0, 2][: len(lengths)]
    qkv = [random_qkv(len(lengths), total) for _ in range(LAYERS)]
    view = cache.prefill(torch.tensor(slots), torch.tensor(lengths))
    outputs = [view.next(total).attend(layer, *qkv[layer], SPECS[layer]) for layer in range(LAYERS)]
    assert view.finite.all()
    for row, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
        alone = expected.slot(slot).next(length)
        for layer, (q, k, v) in enumerate(qkv):
            one = slice(row, row + 1), slice(length)
            wanted = alone.attend(layer, q[one], k[one], v[one], SPECS[layer])
            torch.testing.assert_close(outputs[layer][row, :length], wanted[0])
    for pair in zip(tensors(cache), tensors(expected), strict=True):
        assert torch.equal(*pair)


@pytest.mark.parametrize(
    ("tile", "window", "length", "cut"),
    [(4, 3, 23, 4), (4, 3, 23, 20), (tiles.PREFILL_TILE, 600, 2100, 64), (tiles.PREFILL_TILE, 600, 2100, 1920)],
)
def test_a_pass_has_the_same_bits_in_a_ring(
    tile: int, window: int, length: int, cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "PREFILL_TILE", tile)
    qkv, spec, results = random_qkv(BATCH, length), AttentionSpec(window=window), []
    for chunk, cuts in ((tile, [cut, length - cut]), (8 * tile, [length]), (length, [length])):
        monkeypatch.setattr(kv_store, "CHUNK", chunk)
        cache = KeyValueCache([window], batch=BATCH, max_len=length, **SHAPE)
        assert cache.held == [min(length, window + chunk)]
        for tensor in tensors(cache):
            tensor.fill_(torch.nan)  # as new memory may be
        outputs = []
        for q, k, v in zip(*(x.split(cuts, dim=1) for x in qkv), strict=True):
            view = cache.next(q.shape[1])
            outputs.append(view.attend(0, q, k, v, spec))
            view.finish()
        results.append(torch.cat(outputs, dim=1))
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[2])


def test_keys_that_are_not_finite_are_found_in_rings() -> None:
    cache = slot_cache()
    view = cache.slot(1).next(8)
    for layer in range(LAYERS):
        view.attend(layer, *random_qkv(1, 8), SPECS[layer])
    view.finish()
    assert cache.keys_finite(1, 3)
    cache.keys(2)[1, 6 % 5, 0, 0] = torch.inf  # position 6 of the layer with 5 cells
    assert not cache.keys_finite(1, 3)
    assert not cache.keys_finite(1, 8)
    assert cache.keys_finite(1, 1)
