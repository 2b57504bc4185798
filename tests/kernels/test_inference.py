"""Tiles of the matmuls of inference: which of them may depend on the number of rows."""

from __future__ import annotations

import pytest
import torch

from octavo.kernels import inference
from octavo.kernels.inference import Tile, tile_for
from octavo.ops.tiles import Phase

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


@DTYPES
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("m", [1, 16, 17, 32])
def test_up_to_32_rows_decode_is_the_same_with_any_order_allowed(m: int, lora: bool, dtype: torch.dtype) -> None:
    tiles = [tile_for(m, dtype, phase, lora=lora) for phase in (Phase.DECODE, Phase.DECODE_ANY_ORDER)]
    assert tiles[0] == tiles[1]


@pytest.mark.parametrize("m", [1, 16, 33, 64, 500])
def test_decode_has_dots_of_at_most_32_rows_for_any_number_of_rows(m: int) -> None:
    """So that the compiler uses `mma` for all of them."""
    assert tile_for(m, torch.bfloat16, Phase.DECODE, lora=False).rows <= 32
    assert tile_for(m, torch.bfloat16, Phase.PREFILL, lora=False).rows >= 64
    if m > 32:
        assert tile_for(m, torch.bfloat16, Phase.DECODE_ANY_ORDER, lora=False).rows >= 64


@pytest.mark.parametrize(
    ("phase", "same"), [(Phase.PREFILL, True), (Phase.DECODE, True), (Phase.DECODE_ANY_ORDER, False)]
)
def test_only_decode_in_any_order_splits_sums_by_the_number_of_rows(
    phase: Phase, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    strips: set[int] = set()

    def parts_for(n: int, k: int, strip: int = inference.STRIP) -> tuple[int, int]:
        strips.add(strip)
        return 1, k

    monkeypatch.setattr(inference, "parts_for", parts_for)
    monkeypatch.setattr(
        inference, "tile_for", lambda m, *_, **__: Tile(16, 32 if m > 32 else inference.STRIP, 16, 4, 1)
    )
    weight = torch.randn(32, 16)
    for m in (1, 33):
        inference.matmul(torch.randn(m, 16), weight, phase=phase)
    assert (len(strips) == 1) == same
