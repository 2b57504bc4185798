"""Where an input is put together: side by side in one matrix, or each part by itself."""

from __future__ import annotations

import torch

from octavo.layers.gemm_input import GemmInput

LIKE = torch.empty(0, dtype=torch.float64)


def test_if_joined_parts_are_written_or_copied_into_one_matrix() -> None:
    gemm_input, x = GemmInput([2, 3], 4, 5, LIKE, joined=True), torch.rand(5, 3).double()
    gemm_input.add().fill_(1)
    gemm_input.put(x)
    gemm_input.extra.fill_(2)
    assert gemm_input.whole.dtype == torch.float64
    assert torch.equal(gemm_input.whole, torch.cat([torch.ones(5, 2), x, torch.full((5, 4), 2.0)], dim=1))
    assert [part.data_ptr() - gemm_input.whole.data_ptr() for part in gemm_input.parts] == [0, 2 * 8]
    detach_extra = gemm_input.detach_extra()
    assert torch.equal(detach_extra, gemm_input.extra)
    assert detach_extra.untyped_storage().nbytes() == 5 * 4 * 8  # and not the whole


def test_if_not_joined_an_existing_tensor_is_used_without_a_copy() -> None:
    gemm_input, x = GemmInput([2, 3], 4, 5, LIKE, joined=False), torch.rand(5, 3)
    assert gemm_input.add().shape == (5, 2)
    gemm_input.put(x)
    assert gemm_input.parts[1] is x
    assert gemm_input.parts[0].is_contiguous()
    assert gemm_input.detach_extra().shape == (5, 4)
    assert gemm_input.detach_extra().untyped_storage().nbytes() == 5 * 4 * 8


def test_on_a_cpu_no_uninitialized_memory_is_next_to_the_parts(poisoned_memory: None) -> None:
    assert LIKE.new_empty(1).isnan().all()  # the fixture works
    gemm_input = GemmInput([2, 3], 4, 5, LIKE, joined=True)
    for part in (gemm_input.add(), gemm_input.add()):
        part.zero_()
    assert gemm_input.whole.isfinite().all()
