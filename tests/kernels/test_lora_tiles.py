"""Tiles and partial sums of the Hopper kernel for an activation's backward with LoRA gradients."""

from __future__ import annotations

from importlib.machinery import ModuleSpec

import pytest
import torch
from torch import Tensor

from octavo.kernels.lora_tiles import Tile, hopper_tile, partial_sums, sum_parts
from octavo.ops.lora_backward import LoraOperands, gelu_lora_backward_, swiglu_lora_backward_
from octavo.runtime import dispatch
from octavo.train.simulate import simulate


def on_meta(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta")


@pytest.mark.parametrize(
    ("parts", "rank", "behind", "tile"),
    [(1, 16, 16, (256, 3)), (2, 16, 16, (256, 2)), (1, 64, 64, (256, 2)), (2, 64, 64, (128, 2)), (2, 128, 128, None)],
)
def test_a_tile_fits_into_the_shared_memory_of_a_program(
    parts: int, rank: int, behind: int, tile: tuple[int, int] | None
) -> None:
    x, dy, t, after = (on_meta(64, n) for n in (parts * 512, 512, parts * rank, behind))
    assert hopper_tile(x, dy, LoraOperands(t, None, after)) == tile


def test_partial_sums_have_a_part_for_each_program() -> None:
    x, dy, t, b = on_meta(2048, 16384), on_meta(2048, 16384), on_meta(2048, 16), on_meta(16384, 16)
    operands = LoraOperands(t, b, t)
    sums = partial_sums(x, dy, operands, hopper_tile(x, dy, operands))
    assert sums.t is not None
    assert (sums.t.shape, sums.b.shape, sums.a.shape) == ((64, 2048, 16), (2, 16384, 16), (2, 16, 16384))
    assert partial_sums(x, dy, operands, None).b.shape == (1, 16384, 16)


def test_the_sum_of_parts_is_the_gradient() -> None:
    x, dy, t = torch.randn(128, 512), torch.randn(128, 512), torch.randn(128, 3)
    sums = partial_sums(x, dy, LoraOperands(t, torch.randn(512, 3), t), Tile(256, 3))
    for part in sums:
        assert part is not None
        part.copy_(torch.arange(part.numel()).view(part.shape))
    for found, part in zip(sum_parts(sums), sums, strict=True):
        assert found is not None
        assert part is not None
        assert torch.equal(found, part.sum(0))


@pytest.mark.parametrize("parts", [1, 2])
def test_a_simulated_step_allocates_the_partial_sums(parts: int) -> None:
    """Otherwise the forecast of device memory is too low."""
    x, dy, t, after = (on_meta(2048, n) for n in (parts * 16384, 16384, parts * 16, 16))
    b = on_meta(parts * 16384, 16)
    backward_ = gelu_lora_backward_ if parts == 1 else swiglu_lora_backward_
    operands = LoraOperands(t, b, after)
    sums = [part for part in partial_sums(x, dy, operands, hopper_tile(x, dy, operands)) if part is not None]
    found = simulate(lambda: backward_(x, dy, operands))
    total = sum(part.nbytes for part in sums) + sum(part[0].nbytes for part in sums if len(part) > 1)
    assert total <= found.peak_bytes < total + 2**25
    moved = [x, dy, t, b, after, *sums, *(part for part in sums if len(part) > 1)]
    added = sum(part[0].nbytes for part in sums if len(part) > 1)
    assert found.moved_bytes == sum(tensor.nbytes for tensor in moved) + added


def test_without_the_kernels_the_reference_is_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    spec: ModuleSpec | None = None
    monkeypatch.setattr(dispatch, "find_spec", lambda name: spec)
    x, dy, t = on_meta(2048, 16384), on_meta(2048, 16384), on_meta(2048, 16)
    grads = gelu_lora_backward_(x, dy, LoraOperands(t, None, t))
    assert grads.t is None
    assert (grads.b.shape, grads.a.shape) == ((16384, 16), (16, 16384))
