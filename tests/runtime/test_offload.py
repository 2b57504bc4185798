"""Offloaded tensors come back bit for bit, last first, and use no device memory between forward and backward."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from octavo.errors import UsageError
from octavo.runtime import offload
from octavo.runtime.dispatch import OP_OBSERVERS
from octavo.runtime.offload import IN_FLIGHT, ActivationOffload, on_host, pinned_bytes
from octavo.train.simulate import simulate

SHAPE = 6, 5


def tensors(number: int, *, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(SHAPE, generator=torch.Generator().manual_seed(n)).to(dtype) for n in range(number)]


@pytest.mark.parametrize("number", [1, IN_FLIGHT, IN_FLIGHT + 1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_take_returns_the_tensors_of_put_last_first(number: int, dtype: torch.dtype) -> None:
    stack, expected = ActivationOffload(), tensors(number, dtype=dtype)
    for x in tensors(number, dtype=dtype):
        stack.put(x)
    for x in reversed(expected):
        assert torch.equal(stack.take(), x)


def test_a_released_tensor_may_be_overwritten() -> None:
    """A layer that allocates the same memory does so."""
    stack, xs, expected = ActivationOffload(), tensors(5), tensors(5)
    for x in xs:
        stack.put(x)
    for x in xs[: 5 - IN_FLIGHT]:
        x.zero_()
    assert all(torch.equal(stack.take(), x) for x in reversed(expected))


def test_passes_share_their_buffers_one_after_another() -> None:
    n_buffers = []
    for seed in range(3):
        stack, xs = ActivationOffload(), tensors(5)[seed:]
        for x in xs:
            stack.put(x)
        n_buffers.append(sum(len(buffers) for buffers in offload._PINNED.values()))
        assert all(torch.equal(stack.take(), x) for x in reversed(xs))
    assert n_buffers == [n_buffers[0]] * 3


def test_tensors_of_another_size_have_other_buffers() -> None:
    """A last batch has fewer rows, and captured graphs still write to the buffers of the others."""
    stack, larger, xs = ActivationOffload(), ActivationOffload(), tensors(4)
    for x in xs:
        stack.put(x)
    for x in tensors(4):
        larger.put(torch.cat([x, x]))  # larger than any before
    assert all(torch.equal(stack.take(), x) for x in reversed(xs))
    assert all(torch.equal(larger.take(), torch.cat([x, x])) for x in reversed(xs))


def test_all_but_the_last_are_released() -> None:
    stack, references, freed = ActivationOffload(), [], []
    for _ in range(6):
        x = torch.ones(SHAPE)
        references.append(weakref.ref(x))
        stack.put(x)
        del x
        freed.append([ref() is None for ref in references])
    gc.collect()
    assert freed[-1] == [True] * (6 - IN_FLIGHT) + [False] * IN_FLIGHT
    assert freed[IN_FLIGHT] == [True, *[False] * IN_FLIGHT]


def test_a_simulation_sees_the_memory_and_the_copies_of_a_gpu() -> None:
    """Of twelve tensors of 64 MiB two in flight and one in use are on the device, forward and backward."""
    size, number = 64 * 2**20, 12
    seen: list[str] = []

    def step() -> None:
        stack = ActivationOffload()
        for _ in range(number):
            stack.put(torch.empty(2**14, 2**11, dtype=torch.bfloat16, device="meta"))
        for _ in range(number):
            stack.take()

    OP_OBSERVERS.append(lambda name, _: seen.append(name))
    try:
        forecast = simulate(step)
    finally:
        OP_OBSERVERS.pop()
    assert forecast.peak_bytes == pytest.approx((IN_FLIGHT + 1) * size, rel=0.1)
    assert forecast.host_bytes == number * size
    assert seen == ["to_host"] * number + ["from_host"] * (number - IN_FLIGHT)


def test_cpu_memory_that_cannot_be_pinned_is_not_reported_as_gpu_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> Tensor:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(UsageError, match="No 2 MiB of CPU memory can be pinned"):
        offload._allocate(torch.Size((2**20,)), torch.bfloat16, pinned=True)


@pytest.mark.parametrize(("size", "pinned"), [(0, 0), (1, 1), (2**24, 2**24), (2**24 + 1, 2**25), (206_438_400, 2**28)])
def test_pinned_memory_comes_in_powers_of_two(size: int, pinned: int) -> None:
    assert pinned_bytes(size) == pinned


def test_on_a_cpu_an_embedding_is_not_copied() -> None:
    x = torch.ones(3)
    assert on_host(x) is x


@pytest.mark.parametrize(("layers", "copies"), [(False, False), (True, True), (True, False), (False, True)])
def test_a_capture_waits_for_captured_copies_alone(layers: bool, copies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """To wait for others is a CUDA error, which would hide the lack of memory that ended the capture."""
    waited: list[str] = []
    streams = {"layers": layers, "copies": copies}
    current = SimpleNamespace(name="layers", wait_stream=lambda other: waited.append(other.name))
    monkeypatch.setattr(offload, "_stream", lambda device: SimpleNamespace(name="copies"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(offload, "_is_capturing", lambda stream: streams[stream.name])
    offload.join(torch.device("cuda"))
    assert waited == (["copies"] if layers == copies else [])
    offload.join(torch.device("cpu"))
    assert len(waited) <= 1
