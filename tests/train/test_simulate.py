"""Simulation of a step on the meta device: the allocator, peak memory, and counted work."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
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
from octavo.hardware import GPUS, Measured, Peak
from octavo.hardware.rates import BUS_SHARE, PUBLISHED, STEPS_ERROR, WIDE_ERROR
from octavo.layers.context import ForwardOptions, Save
from octavo.layers.lora import LoraSpec, flatten_
from octavo.objective import Inputs, next_token_loss
from octavo.ops.attention import AttentionSpec, Documents, causal_attention
from octavo.ops.matmul8 import matmul_8bit_into
from octavo.ops.quantize import scheme_named
from octavo.runtime.dispatch import KERNELS, OP_OBSERVERS, kernel
from octavo.store.weights import allocated
from octavo.train.simulate import PAGES, ROUND, SMALL, Arena, Forecast, simulate

PAGE = PAGES[False]
META = torch.device("meta")


def block(pages: float) -> Tensor:
    """A meta tensor of `pages` pages."""
    return torch.empty(int(pages * PAGE), dtype=torch.uint8, device=META)


def pages(step: Callable[[], Any]) -> float:
    """Peak memory of a step in pages of large blocks."""
    return simulate(step).peak_bytes / PAGE


def holes(*sizes: int) -> Arena:
    """An arena with free blocks of these sizes in this order, each followed by an allocated one."""
    arena = Arena(page=1)
    starts = [(arena.allocate(size), arena.allocate(1))[0] for size in sizes]
    for start in starts:
        arena.free_block(start)
    return arena


@pytest.mark.parametrize(("size", "address"), [(1, 11), (2, 11), (3, 6), (4, 6), (5, 0), (6, 14), (8, 14), (9, 23)])
def test_the_smallest_sufficient_free_block_is_allocated(size: int, address: int) -> None:
    arena = holes(5, 4, 2, 8)  # at 0, 6, 11 and 14; the end is at 23
    assert arena.allocate(size) == address


def test_the_free_block_at_the_end_counts_as_the_largest() -> None:
    arena = holes(5, 8)  # at 0 and 6
    arena.free_block(14)  # the last one: the free block from 6 on is at the end
    arena.allocate(4)
    assert arena.free == [(1, 4), (9, 6)]
    end = arena.end
    arena = Arena(page=1)
    for size in (9, 1, 5):
        arena.allocate(size)
    arena.free_block(0)
    arena.free_block(10)  # 5 at the end, which would fit more tightly
    assert (arena.allocate(5), arena.end) == (0, end)


def test_the_rest_of_a_block_is_allocated_next() -> None:
    arena = holes(8)
    end = arena.end
    assert [arena.allocate(3), arena.allocate(2), arena.allocate(3)] == [0, 3, 5]
    assert arena.end == end


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0), (2, 0, 1), (1, 2, 0)])
def test_adjacent_free_blocks_are_merged(order: tuple[int, ...]) -> None:
    arena = Arena(page=10)
    starts = [arena.allocate(2) for _ in range(3)]
    guard = arena.allocate(4)
    for index in order:
        arena.free_block(starts[index])
    assert arena.free == [(6, 0)]
    arena.free_block(guard)
    assert arena.free == [(10, 0)]
    assert arena.taken == {}


def test_memory_grows_at_its_end_by_the_smallest_number_of_pages() -> None:
    arena = Arena(page=10)
    assert (arena.allocate(4), arena.end) == (0, 10)
    assert (arena.allocate(9), arena.end) == (4, 20)  # uses the six free bytes at the end and one new page
    assert (arena.allocate(30), arena.end) == (13, 50)
    arena.free_block(0)
    assert (arena.allocate(8), arena.end) == (43, 60)  # the hole of four bytes at the start is too small


@settings(max_examples=200, deadline=None)
@given(steps=st.lists(st.integers(-20, 100).filter(bool), max_size=60))
@example(steps=[9, 1, 5, -3, -1, 5, 9])
def test_memory_reserved_at_the_start_is_enough_and_changes_no_address(steps: list[int]) -> None:
    """So a graph may reserve the forecast of its blocks. A positive step allocates, a negative one frees a block."""

    def addresses(arena: Arena) -> list[int]:
        made: list[int] = []
        for step in steps:
            if step > 0:
                made.append(arena.allocate(step))
            elif arena.taken:
                arena.free_block(list(arena.taken)[step % len(arena.taken)])
        return made

    grown = Arena(page=7)
    expected = addresses(grown)
    reserved = Arena(page=7)
    if grown.end:
        reserved.free_block(reserved.allocate(grown.end))
    assert addresses(reserved) == expected
    assert reserved.end == grown.end


@settings(max_examples=200, deadline=None)
@given(page=st.sampled_from([1, 7, 64]), steps=st.lists(st.integers(-20, 100).filter(bool), max_size=60))
@example(page=7, steps=[3, 3, 3, -1, -2, 6, 1])
def test_blocks_do_not_overlap_and_are_merged_at_the_end(page: int, steps: list[int]) -> None:
    """A positive step allocates that many bytes, a negative one frees a block."""
    arena, allocated_blocks = Arena(page), dict[int, int]()
    peak = 0
    for step in steps:
        if step > 0:
            start = arena.allocate(step)
            assert start not in allocated_blocks
            allocated_blocks[start] = step
        elif allocated_blocks:
            start = list(allocated_blocks)[step % len(allocated_blocks)]
            del allocated_blocks[start]
            arena.free_block(start)
        peak = max(peak, sum(allocated_blocks.values()))
        blocks = sorted(
            [(start, size) for start, size in allocated_blocks.items()] + [(at, size) for size, at in arena.free]
        )
        assert [at for at, _ in blocks] == [sum(size for _, size in blocks[:i]) for i in range(len(blocks))]
        assert sum(size for _, size in blocks) == arena.end >= peak
        assert arena.end % page == 0
        assert arena.free == sorted(arena.free)
    for start in list(allocated_blocks):
        arena.free_block(start)
    assert arena.free == ([(arena.end, 0)] if arena.end else [])


def test_the_peak_counts_tensors_that_are_alive_together() -> None:
    def together() -> None:
        first, second = block(1), block(2)
        del first, second

    def in_turn() -> None:
        block(2)
        block(1)
        block(2)

    def larger_after_freed() -> None:
        block(1)  # freed, at the end: the block grows
        block(3)

    def larger_next_to_allocated() -> None:
        first, second = block(1), block(1)
        del first
        third = block(2)
        del second, third

    assert [pages(step) for step in (together, in_turn, larger_after_freed, larger_next_to_allocated)] == [3, 2, 3, 4]


def test_results_are_counted_and_existing_tensors_are_not() -> None:
    before = block(1)
    assert pages(lambda: before + 1) == 1
    assert pages(lambda: (before + 1) * 2) == 2
    assert pages(lambda: torch.cat([before, before])) == 2
    assert pages(lambda: before.to(torch.int16)) == 2
    assert pages(lambda: [before.unsqueeze(0), before]) == 0


def test_views_and_in_place_operations_need_no_memory() -> None:
    before, out = block(1), block(1)

    def step() -> None:
        matrix = before.view(1024, -1)
        views = [*matrix.split(512), matrix.T, matrix[3:9, ::2], matrix.expand(4, *matrix.shape), matrix.detach()]
        views += matrix.unbind()[:2]
        before.add_(1).mul_(2).zero_()
        before.copy_(before)
        torch.add(before, before, out=out)
        matrix[:2].fill_(1)
        del views

    assert pages(step) == 0


def test_a_view_keeps_its_storage_alive() -> None:
    def step() -> None:
        corner = block(2)[:1]
        other = block(1)
        del corner, other

    assert pages(step) == 3


def test_small_blocks_have_separate_pages_and_sizes_are_rounded_up() -> None:
    def bytes_of(*sizes: int) -> int:
        return simulate(lambda: [torch.empty(size, dtype=torch.uint8, device=META) for size in sizes]).peak_bytes

    assert bytes_of(1) == bytes_of(SMALL, SMALL) == PAGES[True]
    assert bytes_of(SMALL, SMALL, 1) == 2 * PAGES[True]
    assert bytes_of(SMALL + 1) == PAGE
    assert bytes_of(1, SMALL + 1) == PAGES[True] + PAGE
    count = PAGES[True] // ROUND
    assert bytes_of(*[1] * count) == PAGES[True]
    assert bytes_of(*[1] * count, 0) == 2 * PAGES[True]  # as in PyTorch, no block has size 0


def test_saved_tensors_are_alive_until_backward() -> None:
    x = block(1).view(torch.float32).requires_grad_()
    x.grad = torch.empty_like(x)

    def step() -> None:
        x.exp().exp().exp().sum().backward()

    # Three saved results and the gradient of the last; then every gradient replaces a result.
    assert pages(step) == pytest.approx(4, abs=0.2)  # plus a page of small blocks
    with torch.no_grad():
        assert pages(lambda: x.exp().exp().exp()) == 2


def test_a_failed_step_ends_the_simulation() -> None:
    def step() -> None:
        raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        simulate(step)
    assert OP_OBSERVERS == []


def test_an_empty_step_needs_no_memory_and_no_time() -> None:
    assert simulate(lambda: None) == Forecast(0, 0.0, 0.0, 0.0)


def test_a_matmul_has_two_flops_per_multiplication() -> None:
    a, b, y = (torch.empty(shape, device=META) for shape in ((3, 5), (5, 7), (3, 7)))
    cube = torch.empty(2, 3, 5, device=META)
    for matmul, rows in (
        (lambda: a @ b, 3),
        (lambda: torch.mm(a, b, out=y), 3),
        (lambda: torch.addmm(y, a, b), 3),
        (lambda: y.addmm_(a, b), 3),
        (lambda: F.linear(cube, b.T), 6),
        (lambda: F.linear(a, b.T, y[0]), 3),
    ):
        assert simulate(matmul).matmul_flops == 2 * rows * 5 * 7
    weight = torch.empty(7, 5, device=META, requires_grad=True)
    assert simulate(lambda: F.linear(a.requires_grad_(), weight).sum().backward()).matmul_flops == 3 * 2 * 3 * 5 * 7


def test_moved_bytes_are_read_and_written_bytes() -> None:
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
def test_causal_attention_counts_two_half_matmuls_forward_and_five_backward(key_heads: int) -> None:
    q, k, v = (torch.empty(2, 64, heads, 16, device=META, requires_grad=True) for heads in (8, key_heads, key_heads))
    forward = 2 * 8 * (2 * 2 * 64 * 64 * 16) / 2
    forecast = simulate(lambda: causal_attention(q, k, v))
    assert (forecast.attention_flops, forecast.matmul_flops) == (forward, 0)
    assert simulate(lambda: causal_attention(q, k, v).sum().backward()).attention_flops == 3.5 * forward


@pytest.mark.parametrize(("key_heads", "backward"), [(8, 6), (2, 7)])
def test_attention_needs_the_memory_of_cudnn_attention(key_heads: int, backward: int) -> None:
    """Backward allocates dq in float32 and, with grouped key heads, dk and dv of every query head."""
    shapes = [(1, 20480, heads, 64) for heads in (8, key_heads, key_heads)]
    q, k, v = (torch.empty(shape, dtype=torch.bfloat16, device=META, requires_grad=True) for shape in shapes)
    assert q.nbytes == PAGE
    log_sum_exp = PAGES[True]  # 640 KiB of log-sum-exp, and the loss
    assert simulate(lambda: causal_attention(q, k, v)).peak_bytes == PAGE + log_sum_exp
    # The output, dq in float32 (two pages), dq, dk and dv (one page each; grouped: a quarter, and one of all heads).
    assert simulate(lambda: causal_attention(q, k, v).sum().backward()).peak_bytes == backward * PAGE + log_sum_exp


@pytest.mark.parametrize(
    ("sequences", "size", "window", "mebibytes"),
    [
        # The output, dq in float32 (two pages), dq, dk and dv; each of these sequences adds 128 positions of dq.
        (0, 64, None, 120),
        (0, 64, 20480, 120),  # a window that covers the row
        (0, 64, 20479, 140),
        (80, 64, None, 140),
        (81, 64, None, 160),
        # 15 MiB instead of 20, but FlashAttention rounds the size of a head of dq in float32 up to 64.
        (0, 48, None, 100),
        (80, 48, None, 120),
        (81, 48, None, 140),
    ],
)
def test_attention_over_documents_or_a_window_needs_the_memory_of_flash_attention(
    sequences: int, size: int, window: int | None, mebibytes: int
) -> None:
    q, k, v = (torch.empty(1, 20480, 8, size, dtype=torch.bfloat16, device=META, requires_grad=True) for _ in range(3))
    number, offsets = torch.empty(1, 20480, device=META), torch.empty(sequences + 1, device=META)
    documents = Documents(number, offsets, 20480) if sequences else None

    def step() -> None:
        causal_attention(q, k, v, AttentionSpec(window=window), documents=documents).sum().backward()

    assert simulate(step).peak_bytes == mebibytes * 2**20 + PAGES[True]  # log-sum-exp, row sums and the loss are small


KINDS = ((1e12, 0, 0, 0), (0, 1e12, 0, 0), (0, 0, 1e9, 0), (0, 0, 0, 2e12))
HOPPER = Measured(steps=True)
OTHERS = Measured((9e11, 9e11), 0.9)  # published of a GPU on which octavo never ran


def gpu_of(times: float, capability: tuple[int, int] = (9, 0), measured: Measured = HOPPER) -> Peak:
    """A GPU `times` as fast as one with round numbers."""
    return Peak(1e12 * times, 2e12 * times, 1e9 * times, 1e8 * times, capability, measured=measured)


def test_the_time_of_a_gpu_is_the_sum_over_kinds_of_work() -> None:
    alone = [Forecast(0, *parts).seconds(gpu_of(1)) for parts in KINDS]
    assert all(1 < seconds < 3 for seconds in alone)  # no GPU reaches its peak throughput
    assert Forecast(5, 1e12, 1e12, 1e9, 2e12).seconds(gpu_of(1)) == pytest.approx(sum(alone))
    assert Forecast(5, 1e12, 1e12, 1e9, 2e12).seconds(gpu_of(2)) == pytest.approx(sum(alone) / 2)


@pytest.mark.parametrize("work", [*KINDS, (1e12, 1e12, 1e9, 2e12)])
def test_the_range_of_a_time_is_around_its_middle_and_wider_for_a_gpu_that_was_not_measured(
    work: tuple[float, float, float, float],
) -> None:
    forecast = Forecast(5, *work)
    widths = []
    for gpu in (gpu_of(1), gpu_of(1, (8, 6), OTHERS), gpu_of(1, (7, 5), OTHERS)):
        low, high = forecast.seconds_range(gpu)
        assert low < forecast.seconds(gpu) < high
        widths.append(high / low)
    assert widths[0] == pytest.approx(STEPS_ERROR[1] / STEPS_ERROR[0])
    assert min(widths[1:]) > 1.9 > widths[0]  # the peak is the limit of matmuls alone, whose rate was published


@pytest.mark.parametrize("key", GPUS)
def test_the_shortest_time_is_not_shorter_than_at_the_peak_of_the_gpu(key: str) -> None:
    gpu = GPUS[key]
    half = max(gpu.half_flops_per_second, *(gpu.measured.half_flops_per_second or (0.0,)))
    works = (Forecast(0, 3e12, 0, 0), Forecast(0, 0, 3e12, 0), Forecast(0, 0, 0, 0, matmul8_flops=3e12))
    for work, peak in zip(works, (half, half, gpu.int8_ops_per_second), strict=True):
        low, high = work.seconds_range(gpu)
        assert 3e12 / peak <= low < high


@pytest.mark.parametrize("key", ["T4", "H100"])
def test_a_narrow_model_takes_the_time_in_which_its_kernels_start(key: str) -> None:
    work, waiting = Forecast(0, 1e9, 0, 1e6), Forecast(0, 1e9, 0, 1e6, launches=5000)
    low, high = waiting.seconds_range(GPUS[key])
    assert low == waiting.seconds(GPUS[key]) == pytest.approx(5000 * 1e-6)
    assert 5000 * 12e-6 < high < 5000 * 12e-6 + work.seconds_range(GPUS[key])[1]
    wide = replace(Forecast(0, 1e14, 0, 1e12), launches=5000)  # whose kernels are long: the start is within the error
    assert wide.seconds_range(GPUS[key]) == replace(wide, launches=0).seconds_range(GPUS[key])
    assert wide.seconds(GPUS[key]) == replace(wide, launches=0).seconds(GPUS[key])


def test_operations_that_start_a_kernel_are_counted() -> None:
    x = torch.empty(256, 256, device=META)
    steps: dict[int, list[Callable[[], Any]]] = {
        0: [lambda: x.view(-1), lambda: x.T, lambda: torch.empty_like(x)],
        1: [lambda: x + 1, lambda: x @ x, lambda: x.zero_(), lambda: matmul_8bit_into(x, x[0], x, x)],
        2: [lambda: (x @ x).exp(), lambda: F.linear(x, x).add_(1)],
    }
    for count, made in steps.items():
        assert [simulate(step).launches for step in made] == [count] * len(made)
    assert simulate(llama()).launches > 3 * 40  # three layers


def test_copies_that_take_longer_than_computing_are_the_time_at_both_ends() -> None:
    forecast = Forecast(0, 1e6, 0, 0, bus_bytes=1e9)
    low, high = forecast.seconds_range(gpu_of(1, (8, 6), OTHERS))
    assert low == pytest.approx(WIDE_ERROR[0] * 1e9 / (BUS_SHARE * 1e8 * PUBLISHED))
    assert high == pytest.approx(WIDE_ERROR[1] * 1e9 / (BUS_SHARE * 1e8 / PUBLISHED))


def test_an_8_bit_matmul_needs_no_memory_and_has_its_own_throughput() -> None:
    quantized, weight = torch.empty(3000, 512, dtype=torch.int8, device=META), torch.empty(70, 512, device=META)
    scale, out = torch.empty(3000, device=META), torch.empty(3000, 70, device=META)
    forecast = simulate(lambda: matmul_8bit_into(quantized, scale, weight, out))
    assert (forecast.peak_bytes, forecast.matmul_flops, forecast.moved_bytes) == (0, 0, 0)
    assert forecast.matmul8_flops == 2 * 3000 * 512 * 70


# tests/kernels/test_lora_tiles.py, and below
BY_KERNEL = {name for name in KERNELS if name.startswith(("lora_backward.", "softcap."))}


@pytest.mark.parametrize("name", sorted(KERNELS.keys() - {"matmul8.matmul_8bit_into"} - BY_KERNEL))
def test_a_kernel_needs_only_the_memory_of_its_result(name: str) -> None:
    """The temporary tensors of its reference are not counted."""
    call = getattr(import_module(KERNELS[name].__module__), KERNELS[name].__name__)
    x = torch.empty(3 * SMALL, 2, device=META)
    forecast = simulate(lambda: call(x, x[:1]))
    assert forecast.peak_bytes == (PAGE if name == "loss.cross_entropy_" else 0)
    assert forecast.moved_bytes == x.nbytes + x[:1].nbytes
    assert forecast.matmul_flops == 0


def test_a_reference_is_not_run_during_a_simulation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.runtime.dispatch.KERNELS", {})

    @kernel
    def wasteful(x: Tensor) -> None:
        raise AssertionError

    wasteful(torch.empty(3, device=META))


def llama() -> Callable[[], None]:
    """A step of a small Llama with allocated gradients."""
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


@pytest.mark.parametrize("length", [2048, 4096])
def test_soft_capped_attention_has_the_memory_of_its_kernels(length: int) -> None:
    """No scores are stored, and key heads are not repeated."""
    shapes = [(2, length, heads, 128) for heads in (16, 4, 4)]
    q, k, v = (torch.empty(shape, device=META, dtype=torch.bfloat16, requires_grad=True) for shape in shapes)

    def step(spec: AttentionSpec) -> None:
        torch.autograd.backward(causal_attention(q, k, v, spec), torch.empty_like(q))

    capped, plain = (simulate(partial(step, spec)) for spec in (AttentionSpec(softcap=50.0), AttentionSpec()))
    sums = 4 * 2 * 16 * length  # bytes of lse, and of delta
    results = 3 * q.nbytes + k.nbytes + v.nbytes + 2 * sums  # output, its gradient, those of q, k and v
    assert results <= capped.peak_bytes < results + 2 * PAGES[False]
    assert capped.peak_bytes < plain.peak_bytes  # cuDNN's gradients of keys have every query head
    assert capped.attention_flops == plain.attention_flops > 0


def test_a_simulation_does_not_depend_on_garbage_collection() -> None:
    """A step has no reference cycles: their memory would be free at an unpredictable time."""
    step = llama()
    thresholds = gc.get_threshold()
    forecasts = []
    try:
        for threshold in (0, 1, 10**6):  # never, always, rarely
            gc.set_threshold(threshold)
            forecasts.append(simulate(step))
    finally:
        gc.set_threshold(*thresholds)
    assert forecasts[0] == forecasts[1] == forecasts[2]
    assert forecasts[0].peak_bytes > 100 * 2**20


def test_operations_of_other_threads_are_not_counted() -> None:
    """Another run may train in this process."""

    def observed() -> None:
        for observe in OP_OBSERVERS:
            observe("other", [block(1)])

    def step() -> None:
        thread = threading.Thread(target=observed)
        thread.start()
        thread.join()

    assert simulate(step).moved_bytes == 0
    assert simulate(observed).moved_bytes > 0
