"""What attention allocates on the meta device, by the GPU that is simulated."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from octavo.ops.attention import AttentionSpec, Documents, causal_attention
from octavo.runtime.dispatch import simulated_gpu, simulates_ampere
from octavo.train.simulate import simulate

B, T, H, G, D = 8, 4096, 16, 4, 256
PAGE = 20 * 2**20
WHOLE = B * T * H * D * 2  # bytes of q or of the output: 256 MiB


def heads(count: int, size: int = D) -> Tensor:
    return torch.empty(B, T, count, size, dtype=torch.float16, device="meta", requires_grad=True)


def peak(
    *, flash: bool, groups: int = H, size: int = D, backward: bool = True, packed: int = 0, layers: int = 1
) -> int:
    """Bytes of attention in so many layers, its backward included; `packed`: documents, of which a row has several."""
    q, k, v = heads(H, size), heads(groups, size), heads(groups, size)
    documents = None
    if packed:
        ids = torch.empty(B, T, dtype=torch.int64, device="meta")
        documents = Documents(ids, torch.empty(packed + 1, dtype=torch.int32, device="meta"), T)

    def step() -> None:
        results = [causal_attention(q, k, v, AttentionSpec(), documents=documents) for _ in range(layers)]
        for out in results if backward else ():
            torch.autograd.grad(out, (q, k, v), torch.empty_like(out))

    with simulated_gpu(ampere=flash):
        return simulate(step).peak_bytes


def test_efficient_attention_sums_wide_heads_in_memory_in_float32() -> None:
    """In forward those of heads of over 128; in backward of dq, and of dk and dv for heads of over 64."""
    forward = {size: peak(flash=False, size=size, backward=False) / WHOLE for size in (256, 128)}
    assert forward == pytest.approx({256: 1 + 2, 128: 0.5}, abs=2 * PAGE / WHOLE)
    # The output and its gradient, dq, dk and dv, and the sums.
    both = {size: peak(flash=False, size=size) / WHOLE for size in (256, 128, 64)}
    assert both == pytest.approx({256: 5 + 6, 128: 2.5 + 3, 64: 1.25 + 0.5}, abs=2 * PAGE / WHOLE)


def test_without_flash_attention_shared_key_heads_are_repeated() -> None:
    """They are saved for backward, which has their gradients before those of the shared ones."""
    shared, own = (peak(flash=False, groups=groups) for groups in (G, H))
    assert shared - own == pytest.approx(2 * WHOLE, abs=2 * PAGE)


def test_without_flash_attention_packed_documents_have_one_mask_for_all_layers() -> None:
    """A mask of booleans, and from it the one that is added to the scores."""
    masks = B * T * T * (1 + 2)
    one, two = (peak(flash=False, packed=6, layers=n) - peak(flash=False, layers=n) for n in (1, 2))
    assert one == pytest.approx(masks, abs=masks / 3 + 2 * PAGE)
    assert two <= one


def test_without_kernels_made_of_dots_soft_capped_attention_is_the_reference() -> None:
    """It has the scores of 256 queries in float32 at a time."""
    q, k, v = heads(H), heads(G), heads(G)
    peaks = []
    for ampere in (True, False):
        with simulated_gpu(ampere=ampere):
            spec = AttentionSpec(softcap=50.0)
            peaks.append(simulate(lambda: causal_attention(q, k, v, spec)).peak_bytes)  # noqa: B023
    scores = B * H * 256 * T * 4
    assert peaks[1] - peaks[0] >= 2 * scores


def test_the_simulated_gpu_is_that_of_the_thread() -> None:
    seen: list[bool] = []
    with simulated_gpu(ampere=False):
        thread = threading.Thread(target=lambda: seen.append(simulates_ampere()))
        thread.start()
        thread.join()
        assert not simulates_ampere()
    assert simulates_ampere()
    assert seen == [True]
