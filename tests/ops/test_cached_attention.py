"""Attention over a cache against the formula; and no bit of a row depends on chunks or on the other slots."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.ops.attention import AttentionSpec, causal_attention
from octavo.ops.cached_attention import decode_attention, prefill_attention
from octavo.ops.tiles import PREFILL_TILE

SIZE = 8


def formula(q: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
    """q (T, H, D) at positions `start` and on, over keys and values (L, G, D)."""
    shared = q.shape[1] // keys.shape[1]
    k, v = (x.repeat_interleave(shared, dim=1).float() for x in (keys, values))
    scores = torch.einsum("thd,shd->hts", q.float(), k) / SIZE**0.5
    seen = torch.arange(len(keys)) <= start + torch.arange(len(q))[:, None]
    return torch.einsum("hts,shd->thd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (3, 1)])
def test_a_slots_token_looks_at_what_its_slot_holds_and_itself(heads: int, groups: int) -> None:
    torch.manual_seed(heads)
    lengths, max_len = [0, 4, -1, 9, 1], 10
    m = len(lengths)
    q, k, v = torch.randn(m, heads, SIZE), torch.randn(m, groups, SIZE), torch.randn(m, groups, SIZE)
    keys, values = torch.randn(2, m, max_len, groups, SIZE)
    before = keys.clone(), values.clone()
    output = decode_attention(q, k, v, keys, values, torch.tensor(lengths), max(lengths))
    for slot, length in enumerate(lengths):
        if length < 0:
            assert not output[slot].any()
        for store, old, new in ((keys, before[0], k), (values, before[1], v)):
            wanted = old[slot].clone()
            if length >= 0:
                wanted[length] = new[slot]
            assert torch.equal(store[slot], wanted)  # and nothing else was written
        if length >= 0:
            wanted = formula(q[slot, None], keys[slot, : length + 1], values[slot, : length + 1], length)
            torch.testing.assert_close(output[slot, None], wanted)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("length", [1, 2, PREFILL_TILE, PREFILL_TILE + 3])
def test_a_chunk_looks_at_what_is_before_it_in_its_own_slot(heads: int, groups: int, length: int) -> None:
    torch.manual_seed(length)
    starts, slots, max_len = [0, 5, PREFILL_TILE], [2, 0, 3], 2 * PREFILL_TILE + 8
    q, (keys, values) = torch.randn(3, length, heads, SIZE), torch.randn(2, 4, max_len, groups, SIZE)
    output = prefill_attention(q, keys, values, torch.tensor(starts), torch.tensor(slots))
    for row, (start, slot) in enumerate(zip(starts, slots, strict=True)):
        end = start + length
        torch.testing.assert_close(output[row], formula(q[row], keys[slot, :end], values[slot, :end], start))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decode_has_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    m, max_len, heads, groups = 9, 300, 6, 3
    lengths = torch.tensor([0, 5, 299, 128, 127, 1, 64, 200, 33])
    q, k, v = (torch.randn(m, n, SIZE).to(dtype) for n in (heads, groups, groups))
    keys, values = torch.randn(2, m, max_len, groups, SIZE).to(dtype)
    together = decode_attention(q, k, v, keys.clone(), values.clone(), lengths, 299)
    for row, length in enumerate(lengths.tolist()):
        one = slice(row, row + 1)
        stores = keys[one].clone(), values[one].clone()
        assert torch.equal(decode_attention(q[one], k[one], v[one], *stores, lengths[one], length), together[one])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prefill_has_the_same_bits_in_any_chunks(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    length, heads, groups = 3 * PREFILL_TILE + 7, 4, 2
    q = torch.randn(1, length, heads, SIZE).to(dtype)
    keys, values = torch.randn(2, 1, length, groups, SIZE).to(dtype)
    whole = prefill_attention(q, keys, values, torch.tensor([0]))
    for cut in (PREFILL_TILE, 3 * PREFILL_TILE):
        parts = [
            prefill_attention(q[:, :cut], keys, values, torch.tensor([0])),
            prefill_attention(q[:, cut:], keys, values, torch.tensor([cut])),
        ]
        assert torch.equal(torch.cat(parts, dim=1), whole)


WINDOWS = [AttentionSpec(window=5), AttentionSpec(1.3, softcap=0.9, window=17), AttentionSpec(0.4, softcap=2.0)]


def whole(q: Tensor, keys: Tensor, values: Tensor, spec: AttentionSpec) -> Tensor:
    """Attention of a whole sequence (T, H or G, D)."""
    return causal_attention(q[None], keys[None], values[None], spec)[0]


@pytest.mark.parametrize("spec", WINDOWS, ids=str)
def test_a_cache_of_one_window_gives_the_attention_of_the_whole_sequence(spec: AttentionSpec) -> None:
    """Position p is held at p mod S: tokens that no query sees any more are overwritten."""
    torch.manual_seed(0)
    length, heads, groups = 60, 4, 2
    held = spec.window or length
    q, (k, v) = torch.randn(length, heads, SIZE), torch.randn(2, length, groups, SIZE)
    wanted = whole(q, k, v, spec)
    keys, values = torch.zeros(2, 1, held, groups, SIZE)
    for at in range(length):
        found = decode_attention(q[None, at], k[None, at], v[None, at], keys, values, torch.tensor([at]), at, spec)
        torch.testing.assert_close(found[0], wanted[at])


@pytest.mark.parametrize("spec", WINDOWS, ids=str)
def test_chunks_in_a_cache_that_wraps_around_give_the_attention_of_the_whole_sequence(spec: AttentionSpec) -> None:
    torch.manual_seed(0)
    length, heads, groups, chunk = 60, 4, 2, 12
    held = spec.window + chunk if spec.window else length
    q, (k, v) = torch.randn(length, heads, SIZE), torch.randn(2, length, groups, SIZE)
    wanted = whole(q, k, v, spec)
    keys, values = torch.zeros(2, 1, held, groups, SIZE)
    for start in range(0, length, chunk):
        cells = torch.arange(start, start + chunk) % held
        keys[0, cells], values[0, cells] = k[start : start + chunk], v[start : start + chunk]
        found = prefill_attention(q[None, start : start + chunk], keys, values, torch.tensor([start]), None, spec)
        torch.testing.assert_close(found[0], wanted[start : start + chunk])
