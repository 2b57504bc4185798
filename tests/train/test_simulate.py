"""Rehearsals: whose memory is counted and for how long, by which rules it is handed out, and what work is counted."""

from __future__ import annotations

import gc
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo import adapters
from octavo.adapters import AdapterPlan
from octavo.hardware import Peak
from octavo.layers.context import ForwardOptions, Save
from octavo.layers.lora import LoraSpec, flatten_
from octavo.objective import Inputs, next_token_loss
from octavo.ops.attention import causal_attention
from octavo.ops.matmul8 import matmul_8bit_into
from octavo.ops.quantize import scheme_named
from octavo.runtime.dispatch import KERNELS, OP_OBSERVERS, kernel
from octavo.store.weights import allocated
from octavo.train.simulate import PAGES, ROUND, SMALL, Arena, Forecast, simulate

PAGE = PAGES[False]
META = torch.device("meta")


def room(pages: float) -> Tensor:
    """A meta tensor of so many pages."""
    return torch.empty(int(pages * PAGE), dtype=torch.uint8, device=META)


def pages(step: Callable[[], Any]) -> float:
    """The peak of a step, in pages of large blocks."""
    return simulate(step).peak_bytes / PAGE


def holes(*sizes: int) -> Arena:
    """An arena with free blocks of these sizes, in this order, a taken one behind each."""
    arena = Arena(page=1)
    starts = [(arena.allocate(size), arena.allocate(1))[0] for size in sizes]
    for start in starts:
        arena.free_block(start)
    return arena


@pytest.mark.parametrize(("wanted", "place"), [(1, 11), (2, 11), (3, 6), (4, 6), (5, 0), (6, 14), (8, 14), (9, 23)])
def test_the_smallest_free_block_that_is_large_enough_is_given(wanted: int, place: int) -> None:
    arena = holes(5, 4, 2, 8)  # at 0, 6, 11 and 14; the end is at 23
    assert arena.allocate(wanted) == place


def test_what_is_left_of_a_block_is_given_next() -> None:
    arena = holes(8)
    end = arena.end
    assert [arena.allocate(3), arena.allocate(2), arena.allocate(3)] == [0, 3, 5]
    assert arena.end == end


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0), (2, 0, 1), (1, 2, 0)])
def test_free_neighbours_become_one_block(order: tuple[int, ...]) -> None:
    arena = Arena(page=10)
    starts = [arena.allocate(2) for _ in range(3)]
    guard = arena.allocate(4)
    for index in order:
        arena.free_block(starts[index])
    assert arena.free == [(6, 0)]
    arena.free_block(guard)
    assert arena.free == [(10, 0)]
    assert arena.taken == {}


def test_memory_grows_at_its_end_by_whole_pages_and_only_by_what_is_lacking() -> None:
    arena = Arena(page=10)
    assert (arena.allocate(4), arena.end) == (0, 10)
    assert (arena.allocate(9), arena.end) == (4, 20)  # the six at the end are used, so one page is enough
    assert (arena.allocate(30), arena.end) == (13, 50)
    arena.free_block(0)
    assert (arena.allocate(8), arena.end) == (43, 60)  # a hole of four before others cannot be made longer


@settings(max_examples=200, deadline=None)
@given(page=st.sampled_from([1, 7, 64]), steps=st.lists(st.integers(-20, 100).filter(bool), max_size=60))
@example(page=7, steps=[3, 3, 3, -1, -2, 6, 1])
def test_blocks_never_overlap_and_come_back_as_one(page: int, steps: list[int]) -> None:
    """A positive number takes so much, a negative one gives a block back."""
    arena, held = Arena(page), dict[int, int]()
    most = 0
    for step in steps:
        if step > 0:
            start = arena.allocate(step)
            assert start not in held
            held[start] = step
        elif held:
            start = list(held)[step % len(held)]
            del held[start]
            arena.free_block(start)
        most = max(most, sum(held.values()))
        blocks = sorted([(start, size) for start, size in held.items()] + [(at, size) for size, at in arena.free])
        assert [at for at, _ in blocks] == [sum(size for _, size in blocks[:i]) for i in range(len(blocks))]
        assert sum(size for _, size in blocks) == arena.end >= most
        assert arena.end % page == 0
        assert arena.free == sorted(arena.free)
    for start in list(held):
        arena.free_block(start)
    assert arena.free == ([(arena.end, 0)] if arena.end else [])


def test_what_is_alive_at_once_is_counted() -> None:
    def together() -> None:
        first, second = room(1), room(2)
        del first, second

    def one_by_one() -> None:
        room(2)
        room(1)
        room(2)

    def a_larger_one_after() -> None:
        room(1)  # free, and at the end: it grows
        room(3)

    def a_larger_one_beside() -> None:
        first, second = room(1), room(1)
        del first
        third = room(2)
        del second, third

    assert [pages(step) for step in (together, one_by_one, a_larger_one_after, a_larger_one_beside)] == [3, 2, 3, 4]


def test_results_of_operations_are_counted_and_what_stood_before_is_not() -> None:
    before = room(1)
    assert pages(lambda: before + 1) == 1
    assert pages(lambda: (before + 1) * 2) == 2
    assert pages(lambda: torch.cat([before, before])) == 2
    assert pages(lambda: before.to(torch.int16)) == 2
    assert pages(lambda: [before.unsqueeze(0), before]) == 0


def test_views_and_operations_in_place_cost_nothing() -> None:
    before, beside = room(1), room(1)

    def step() -> None:
        matrix = before.view(1024, -1)
        pieces = [*matrix.split(512), matrix.T, matrix[3:9, ::2], matrix.expand(4, *matrix.shape), matrix.detach()]
        pieces += matrix.unbind()[:2]
        before.add_(1).mul_(2).zero_()
        before.copy_(before)
        torch.add(before, before, out=beside)
        matrix[:2].fill_(1)
        del pieces

    assert pages(step) == 0


def test_a_view_keeps_the_whole_of_its_memory() -> None:
    def step() -> None:
        corner = room(2)[:1]
        other = room(1)
        del corner, other

    assert pages(step) == 3


def test_small_blocks_have_pages_of_their_own_and_sizes_are_rounded_up() -> None:
    def bytes_of(*sizes: int) -> int:
        return simulate(lambda: [torch.empty(size, dtype=torch.uint8, device=META) for size in sizes]).peak_bytes

    assert bytes_of(1) == bytes_of(SMALL, SMALL) == PAGES[True]
    assert bytes_of(SMALL, SMALL, 1) == 2 * PAGES[True]
    assert bytes_of(SMALL + 1) == PAGE
    assert bytes_of(1, SMALL + 1) == PAGES[True] + PAGE
    count = PAGES[True] // ROUND
    assert bytes_of(*[1] * count) == PAGES[True]
    assert bytes_of(*[1] * count, 0) == 2 * PAGES[True]  # PyTorch, too, has no block of no size


def test_what_backward_needs_is_alive_until_it_comes() -> None:
    x = room(1).view(torch.float32).requires_grad_()
    x.grad = torch.empty_like(x)

    def step() -> None:
        x.exp().exp().exp().sum().backward()

    # Three results that are kept, and a gradient for the last; then each gradient takes the place of a result.
    assert pages(step) == pytest.approx(4, abs=0.2)  # and a page of small blocks
    with torch.no_grad():
        assert pages(lambda: x.exp().exp().exp()) == 2


def test_a_rehearsal_ends_also_when_its_step_fails() -> None:
    def step() -> None:
        raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        simulate(step)
    assert OP_OBSERVERS == []


def test_a_step_without_anything_takes_nothing() -> None:
    assert simulate(lambda: None) == Forecast(0, 0.0, 0.0, 0.0)


def test_products_are_two_operations_a_multiplication() -> None:
    a, b, y = (torch.empty(shape, device=META) for shape in ((3, 5), (5, 7), (3, 7)))
    cube = torch.empty(2, 3, 5, device=META)
    for product, rows in (
        (lambda: a @ b, 3),
        (lambda: torch.mm(a, b, out=y), 3),
        (lambda: torch.addmm(y, a, b), 3),
        (lambda: y.addmm_(a, b), 3),
        (lambda: F.linear(cube, b.T), 6),
        (lambda: F.linear(a, b.T, y[0]), 3),
    ):
        assert simulate(product).matmul_flops == 2 * rows * 5 * 7
    weight = torch.empty(7, 5, device=META, requires_grad=True)
    assert simulate(lambda: F.linear(a.requires_grad_(), weight).sum().backward()).matmul_flops == 3 * 2 * 3 * 5 * 7


def test_bytes_are_those_that_are_read_and_written() -> None:
    x = torch.empty(256, 256, dtype=torch.float32, device=META)
    size = x.nbytes
    moved = {
        0: [lambda: x.view(-1), lambda: x.T, lambda: x[3:], lambda: x.split([200, 56]), lambda: x.select(0, 1),
            lambda: torch.empty_like(x), lambda: x.new_empty(3), lambda: x.detach(), lambda: x @ x],
        2: [lambda: x + 1, lambda: x.clone(), lambda: x.copy_(x), lambda: x.contiguous().exp()],
        3: [lambda: x + x],
        1: [lambda: x.zero_(), lambda: x.fill_(2)],
    }  # fmt: skip
    for times, steps in moved.items():
        assert [simulate(step).moved_bytes for step in steps] == [times * size] * len(steps)
    assert simulate(lambda: x.to(torch.bfloat16)).moved_bytes == 1.5 * size


@pytest.mark.parametrize("key_heads", [8, 2])
def test_attention_is_two_products_over_half_a_square_and_five_backward(key_heads: int) -> None:
    q, k, v = (torch.empty(2, 64, heads, 16, device=META, requires_grad=True) for heads in (8, key_heads, key_heads))
    forward = 2 * 8 * (2 * 2 * 64 * 64 * 16) / 2
    found = simulate(lambda: causal_attention(q, k, v))
    assert (found.attention_flops, found.matmul_flops) == (forward, 0)
    assert simulate(lambda: causal_attention(q, k, v).sum().backward()).attention_flops == 3.5 * forward


@pytest.mark.parametrize(("key_heads", "backward"), [(8, 6), (2, 7)])
def test_attention_takes_what_cudnns_takes(key_heads: int, backward: int) -> None:
    """Backward makes dq in float32 first and, where heads of keys are shared, dk and dv for every query head."""
    shapes = [(1, 20480, heads, 64) for heads in (8, key_heads, key_heads)]
    q, k, v = (torch.empty(shape, dtype=torch.bfloat16, device=META, requires_grad=True) for shape in shapes)
    assert q.nbytes == PAGE
    logsums = PAGES[True]  # 640 KiB of them, and the loss
    assert simulate(lambda: causal_attention(q, k, v)).peak_bytes == PAGE + logsums
    # The output, dq in float32 (two pages), dq; dk and dv (one each), or (a quarter each, and one each before).
    assert simulate(lambda: causal_attention(q, k, v).sum().backward()).peak_bytes == backward * PAGE + logsums


def test_a_card_takes_the_sum_of_what_its_parts_take() -> None:
    card = Peak(half_flops_per_second=1e12, int8_ops_per_second=2e12, bytes_per_second=1e9, compute_capability=(9, 0))
    each = ((1e12, 0, 0, 0), (0, 1e12, 0, 0), (0, 0, 1e9, 0), (0, 0, 0, 2e12))
    alone = [Forecast(0, *parts).seconds(card) for parts in each]
    assert all(1 < seconds < 3 for seconds in alone)  # no card reaches its peaks
    assert Forecast(5, 1e12, 1e12, 1e9, 2e12).seconds(card) == pytest.approx(sum(alone))
    faster = Peak(half_flops_per_second=2e12, int8_ops_per_second=4e12, bytes_per_second=2e9, compute_capability=(9, 0))
    assert Forecast(5, 1e12, 1e12, 1e9, 2e12).seconds(faster) == pytest.approx(sum(alone) / 2)


def test_a_product_in_8_bits_takes_no_memory_and_is_work_at_their_rate() -> None:
    codes, weight = torch.empty(3000, 512, dtype=torch.int8, device=META), torch.empty(70, 512, device=META)
    scale, out = torch.empty(3000, device=META), torch.empty(3000, 70, device=META)
    found = simulate(lambda: matmul_8bit_into(codes, scale, weight, out))
    assert (found.peak_bytes, found.matmul_flops, found.moved_bytes) == (0, 0, 0)
    assert found.matmul8_flops == 2 * 3000 * 512 * 70


BY_KERNEL = {name for name in KERNELS if name.startswith("lora_backward.")}  # tests/kernels/test_lora_tiles.py


@pytest.mark.parametrize("name", sorted(KERNELS.keys() - {"matmul8.matmul_8bit_into"} - BY_KERNEL))
def test_a_twin_takes_the_memory_of_its_result_alone(name: str) -> None:
    """Whatever its definition makes along the way."""
    call = getattr(import_module(KERNELS[name].__module__), KERNELS[name].__name__)
    x = torch.empty(3 * SMALL, 2, device=META)
    found = simulate(lambda: call(x, x[:1]))
    assert found.peak_bytes == (PAGE if name == "loss.cross_entropy_" else 0)
    assert found.moved_bytes == x.nbytes + x[:1].nbytes
    assert found.matmul_flops == 0


def test_a_definition_without_a_rule_of_its_own_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.runtime.dispatch.KERNELS", {})

    @kernel
    def wasteful(x: Tensor) -> None:
        raise AssertionError

    wasteful(torch.empty(3, device=META))


def llama() -> Callable[[], None]:
    """A step of a small Llama, with its gradients in their place."""
    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 512, "hidden_size": 512, "intermediate_size": 1024,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip
    model = allocated(config, scheme_named("int8"), dtype=torch.bfloat16, device=META)
    adapters.create_(model, AdapterPlan(LoraSpec()), seed=0)
    flatten_(adapters.trained(model))
    ids = torch.zeros(8, 2048, dtype=torch.int64, device=META)
    return lambda: next_token_loss(
        model, Inputs(ids, ids, ids.flatten(), None, None), ForwardOptions(Save.ATTENTION)
    ).backward()


def test_a_rehearsal_gives_the_same_whenever_garbage_is_collected() -> None:
    """Nothing of a step waits for the collector: what it holds would be another thing on each card."""
    step = llama()
    thresholds = gc.get_threshold()
    found = []
    try:
        for threshold in (0, 1, 10**6):  # never, always, hardly
            gc.set_threshold(threshold)
            found.append(simulate(step))
    finally:
        gc.set_threshold(*thresholds)
    assert found[0] == found[1] == found[2]
    assert found[0].peak_bytes > 100 * 2**20
