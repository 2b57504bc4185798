"""Reuse of prompts between slots, compared with a reference that searches plain lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from octavo.infer.slots import Slots
from octavo.layers import kv_store
from octavo.layers.kv_cache import SlotCache
from octavo.ops import tiles
from octavo.ops.attention import AttentionSpec
from octavo.ops.tiles import Phase

SLOTS, MAX_LEN, TILE = 3, 12, 2
CHUNK, WINDOW = 2, 3  # of the second layer, if it has a window: 5 cells
ADAPTERS = (None, "a", "b")
Content = tuple[str | None, list[int], int]  # adapter and prompt of a slot, and positions since it was empty


def fresh(window: int | None = None) -> Slots:
    return Slots(
        SlotCache(
            (None, window), slots=SLOTS, max_len=MAX_LEN, heads=1, head_size=1, dtype=torch.float32,
            device=torch.device("cpu"),
        )
    )  # fmt: skip


def write(slots: Slots, slot: int, tokens: list[int], phase: Phase = Phase.PREFILL) -> None:
    """Writes tokens as a pass over the model does. Keys and values contain the token id."""
    if tokens:
        view = slots.cache.slot(slot).next(len(tokens))
        ids = torch.tensor(tokens).view(1, -1, 1, 1).float()  # (1, T, 1, 1)
        for layer in range(2):
            spec = AttentionSpec(window=slots.cache.windows[layer])
            view.attend(layer, ids, ids + 100 * layer, ids + 100 * layer + 10, spec)
        view.finish()
        slots.append(slot, tokens, phase)


def stored(slots: Slots, slot: int, count: int) -> list[list[float]]:
    """The token ids in the keys and the values of both layers, at the last positions in a layer with a window."""
    return [
        (store(layer)[slot, cells(slots, slot, layer, count), 0, 0] - 100 * layer - shift).tolist()
        for layer in range(2)
        for store, shift in ((slots.cache.keys, 0), (slots.cache.values, 10))
    ]


def cells(slots: Slots, slot: int, layer: int, count: int) -> list[int]:
    """The cells of those of the first `count` positions that the next token of the slot sees."""
    held, window = slots.cache.held[layer], slots.cache.windows[layer] or MAX_LEN
    return [position % held for position in range(max(0, slots.cache.lengths[slot] + 1 - window), count)]


def expected_of(slots: Slots, slot: int, tokens: list[int]) -> list[list[int]]:
    """What `stored` returns for a slot with these tokens."""
    counts = [len(cells(slots, slot, layer, len(tokens))) for layer in (0, 0, 1, 1)]
    return [tokens[len(tokens) - count :] for count in counts]


def longest(contents: list[Content], adapter: str | None, prompt: list[int], window: int | None) -> tuple[int, int]:
    """The most tokens of a prompt, in whole tiles, that are the start of the prompt of any slot, and its positions.

    The slot must still hold the last ones: its ring holds the last positions that were written.
    """
    possible = [
        (n, written if n else 0)
        for owner, tokens, written in contents
        for n in range(0, len(prompt) + 1, TILE)
        if n == 0
        or (
            (owner == adapter and tokens[:n] == prompt[:n])
            and (window is None or max(0, n + 1 - window) >= written - (window + CHUNK))
        )
    ]
    return max(possible, key=lambda found: found[0])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "PREFILL_TILE", TILE)
    monkeypatch.setattr(kv_store, "CHUNK", CHUNK)


STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("serve"),
            st.integers(0, SLOTS - 1),
            st.sampled_from(ADAPTERS),
            st.lists(st.integers(1, 2), max_size=MAX_LEN - 2),
            st.integers(0, 2),
        ),
        st.tuples(st.just("move"), st.integers(0, SLOTS - 1), st.integers(0, SLOTS - 1)),
        st.tuples(st.just("forget"), st.sampled_from(ADAPTERS)),
        st.tuples(st.just("clear"), st.integers(0, SLOTS - 1)),
    ),
    max_size=20,
)


# The third prompt starts like the first one, of which the ring has lost too much, although the slot is shorter now.
SHORTER_TWICE = [("serve", 0, None, [1] * 6 + end, 0) for end in ([1] * 4, [1, 1, 2], [2, 2])]


@settings(max_examples=150, deadline=None)
@given(steps=STEPS, window=st.sampled_from([None, WINDOW]))
@example(steps=SHORTER_TWICE, window=WINDOW)
def test_begin_copies_the_longest_common_start_of_any_slot(
    steps: list[tuple[str, *tuple[object, ...]]], window: int | None
) -> None:
    slots = fresh(window)
    contents: list[Content] = [(None, [], 0)] * SLOTS
    for step in steps:
        match step:
            case ("serve", int(slot), None | str() as adapter, list(prompt), int(answer)):
                expected, written = longest(contents, adapter, prompt, window)
                assert slots.reuse_prefix(slot, adapter, prompt) == expected
                assert slots.cache.lengths[slot] == expected
                write(slots, slot, prompt[expected:])
                write(slots, slot, [1] * answer, Phase.DECODE)  # which is never reused
                contents[slot] = adapter, list(prompt), max(len(prompt) + answer, written)
            case ("move", int(source), int(target)):
                slots.copy(source, target)
                contents[target] = contents[source]
            case ("forget", None | str() as adapter):
                slots.invalidate(adapter)
                contents = [(None, [], 0) if adapter in (None, content[0]) else content for content in contents]
            case ("clear", int(slot)):
                slots.clear(slot)
                contents[slot] = None, [], 0
                assert slots.cache.lengths[slot] == 0
        for slot, (_, tokens, _) in enumerate(contents):
            assert stored(slots, slot, len(tokens)) == expected_of(slots, slot, tokens)


def test_the_longest_of_several_common_starts_is_copied_up_to_the_first_difference() -> None:
    slots = fresh()
    for slot, tokens in enumerate([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 7], [1, 9]]):
        slots.reuse_prefix(slot, None, [])
        write(slots, slot, tokens)
    assert slots.reuse_prefix(2, None, [1, 2, 3, 4, 5, 6, 8, 8]) == 6
    assert stored(slots, 2, 6) == [[1, 2, 3, 4, 5, 6]] * 4
    assert slots.reuse_prefix(0, None, [1, 2, 3]) == 2  # of the slot itself, in whole tiles
    assert slots.reuse_prefix(0, None, [1, 2, 3, 4, 5]) == 4  # the slot lost the rest, which another slot has
    assert slots.reuse_prefix(0, "a", [1, 2, 3]) == 0
    assert slots.reuse_prefix(0, None, [1, 2, 3]) == 2
    assert slots.reuse_prefix(1, None, [2, 3]) == 0


def test_answers_and_incomplete_tiles_are_not_reused() -> None:
    slots = fresh()
    slots.reuse_prefix(0, None, [])
    write(slots, 0, [1, 2, 3])
    write(slots, 0, [4, 5], Phase.DECODE)
    assert slots.reuse_prefix(1, None, [1, 2, 3, 4, 5, 6]) == 2
    with pytest.raises(AssertionError):
        slots.append(0, [6], Phase.PREFILL)


def test_invalidate_prevents_reuse_of_one_adapter_or_of_all() -> None:
    slots = fresh()
    for slot, adapter in enumerate(ADAPTERS):
        slots.reuse_prefix(slot, adapter, [])
        write(slots, slot, [1, 2, 3, 4])
    slots.invalidate("a")
    assert [slots.reuse_prefix(1, adapter, [1, 2, 3, 4]) for adapter in ("a", "b", None)] == [0, 4, 4]
    slots.invalidate()
    assert [slots.reuse_prefix(1, adapter, [1, 2, 3, 4]) for adapter in ("a", "b", None)] == [0, 0, 0]


def test_a_copy_continues_independently_of_its_source() -> None:
    slots = fresh()
    write(slots, 0, [1, 2, 3])
    slots.reuse_prefix(1, None, [1, 2, 5])
    write(slots, 1, [5, 6])
    slots.copy(1, 2)
    write(slots, 2, [7])
    write(slots, 1, [8])
    assert [stored(slots, slot, slots.cache.lengths[slot])[3] for slot in range(3)] == [
        [1, 2, 3],
        [1, 2, 5, 6, 8],
        [1, 2, 5, 6, 7],
    ]
    assert slots.reuse_prefix(0, None, [1, 2, 5, 6, 8]) == 4
    assert slots.reuse_prefix(0, None, [1, 2, 5, 6, 7]) == 4
