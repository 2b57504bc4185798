"""What slots hold and find again, against a kernel that keeps plain lists and looks through all of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.infer.slots import Slots
from octavo.layers.kv_cache import SlotCache
from octavo.ops import tiles
from octavo.ops.tiles import Phase

SLOTS, ROOM, TILE = 3, 12, 2
ADAPTERS = (None, "a", "b")
SavedAttention = tuple[str | None, list[int]]


def fresh() -> Slots:
    return Slots(
        SlotCache(2, slots=SLOTS, max_len=ROOM, heads=1, head_size=1, dtype=torch.float32, device=torch.device("cpu"))
    )


def write(slots: Slots, slot: int, tokens: list[int], phase: Phase = Phase.PREFILL) -> None:
    """As a pass over the model does. The keys of a token say which it is, and so do its values."""
    if tokens:
        over = slots.cache.slot(slot).next(len(tokens))
        adapter_ids = torch.tensor(tokens).view(1, -1, 1, 1).float()
        for layer in range(2):
            over.attend(layer, adapter_ids, adapter_ids + 100 * layer, adapter_ids + 100 * layer + 10)
        over.finish()
        slots.wrote(slot, tokens, phase)


def stored(slots: Slots, slot: int, count: int) -> list[list[float]]:
    """What both stores of both layers hold, with the marks of store and layer taken off."""
    return [
        (store[layer, slot, :count, 0, 0] - 100 * layer - shift).tolist()
        for layer in range(2)
        for store, shift in ((slots.cache.keys, 0), (slots.cache.values, 10))
    ]


def longest(held: list[SavedAttention], adapter: str | None, prompt: list[int]) -> int:
    """The most tokens of a prompt, in whole tiles, that any slot holds of a prompt of its own."""
    return max(
        n
        for own, tokens in held
        for n in range(0, len(prompt) + 1, TILE)
        if n == 0 or (own == adapter and tokens[:n] == prompt[:n])
    )


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "PREFILL_TILE", TILE)


STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("serve"),
            st.integers(0, SLOTS - 1),
            st.sampled_from(ADAPTERS),
            st.lists(st.integers(1, 2), max_size=ROOM - 2),
            st.integers(0, 2),
        ),
        st.tuples(st.just("move"), st.integers(0, SLOTS - 1), st.integers(0, SLOTS - 1)),
        st.tuples(st.just("forget"), st.sampled_from(ADAPTERS)),
        st.tuples(st.just("clear"), st.integers(0, SLOTS - 1)),
    ),
    max_size=20,
)


@settings(max_examples=150, deadline=None)
@given(steps=STEPS)
def test_the_longest_common_start_of_any_slot_is_found(steps: list[tuple[str, *tuple[object, ...]]]) -> None:
    slots = fresh()
    held: list[SavedAttention] = [(None, [])] * SLOTS
    for step in steps:
        match step:
            case ("serve", int(slot), None | str() as adapter, list(prompt), int(answer)):
                wanted = longest(held, adapter, prompt)
                assert slots.begin(slot, adapter, prompt) == wanted
                assert slots.cache.lengths[slot] == wanted
                write(slots, slot, prompt[wanted:])
                write(slots, slot, [1] * answer, Phase.DECODE)  # which no prompt finds again
                held[slot] = adapter, list(prompt)
            case ("move", int(source), int(target)):
                slots.move(source, target)
                held[target] = held[source]
            case ("forget", None | str() as adapter):
                slots.forget(adapter)
                held = [(None, []) if adapter in (None, own) else (own, tokens) for own, tokens in held]
            case ("clear", int(slot)):
                slots.clear(slot)
                held[slot] = None, []
                assert slots.cache.lengths[slot] == 0
        for slot, (_, tokens) in enumerate(held):
            assert stored(slots, slot, len(tokens)) == [tokens] * 4


def test_the_longest_of_several_is_taken_and_cut_where_they_part() -> None:
    slots = fresh()
    for slot, tokens in enumerate([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 7], [1, 9]]):
        slots.begin(slot, None, [])
        write(slots, slot, tokens)
    assert slots.begin(2, None, [1, 2, 3, 4, 5, 6, 8, 8]) == 6
    assert stored(slots, 2, 6) == [[1, 2, 3, 4, 5, 6]] * 4
    assert slots.begin(0, None, [1, 2, 3]) == 2  # of its own, in whole tiles
    assert slots.begin(0, None, [1, 2, 3, 4, 5]) == 4  # and what it had behind them, from another slot
    assert slots.begin(0, "a", [1, 2, 3]) == 0
    assert slots.begin(0, None, [1, 2, 3]) == 2
    assert slots.begin(1, None, [2, 3]) == 0


def test_an_answer_and_a_tile_that_is_not_whole_are_not_used_again() -> None:
    slots = fresh()
    slots.begin(0, None, [])
    write(slots, 0, [1, 2, 3])
    write(slots, 0, [4, 5], Phase.DECODE)
    assert slots.begin(1, None, [1, 2, 3, 4, 5, 6]) == 2
    with pytest.raises(AssertionError):
        slots.wrote(0, [6], Phase.PREFILL)


def test_one_adapter_is_forgotten_or_all() -> None:
    slots = fresh()
    for slot, adapter in enumerate(ADAPTERS):
        slots.begin(slot, adapter, [])
        write(slots, slot, [1, 2, 3, 4])
    slots.forget("a")
    assert [slots.begin(1, adapter, [1, 2, 3, 4]) for adapter in ("a", "b", None)] == [0, 4, 4]
    slots.forget()
    assert [slots.begin(1, adapter, [1, 2, 3, 4]) for adapter in ("a", "b", None)] == [0, 0, 0]


def test_what_a_slot_took_over_is_its_own_to_go_on_from() -> None:
    slots = fresh()
    write(slots, 0, [1, 2, 3])
    slots.begin(1, None, [1, 2, 5])
    write(slots, 1, [5, 6])
    slots.move(1, 2)
    write(slots, 2, [7])
    write(slots, 1, [8])
    assert [stored(slots, slot, slots.cache.lengths[slot])[3] for slot in range(3)] == [
        [1, 2, 3],
        [1, 2, 5, 6, 8],
        [1, 2, 5, 6, 7],
    ]
    assert slots.begin(0, None, [1, 2, 5, 6, 8]) == 4
    assert slots.begin(0, None, [1, 2, 5, 6, 7]) == 4
