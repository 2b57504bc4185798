"""Matmuls of decode without Triton's dots: the reference's results, and the same bits for any number of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import devices
from tests.kernels.cases import CASES, ON_GPU
from tests.kernels.test_parity import test_a_kernel_is_its_reference as check_parity
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.hardware import Capabilities
from octavo.kernels import inference, inference_dotless
from octavo.ops import cached_attention
from octavo.ops.inference import BatchedLora
from octavo.ops.quantize import SCHEMES
from octavo.ops.tiles import Phase
from octavo.runtime import dispatch

pytestmark = pytest.mark.skipif(ON_GPU, reason="the interpreter runs it on a GPU that is not there")


@pytest.fixture(autouse=True)
def on_a_t4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "capabilities_of", lambda _: devices.T4)


@pytest.mark.exhaustive  # 16 s in the interpreter
def test_it_is_the_reference() -> None:
    assert len(CASES["inference.matmul"]) > 10
    check_parity("inference.matmul", torch.float16)


def inputs(m: int, *, n: int = 70, k: int = 1300, rank: int = 3) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Rows of a matmul with everything that follows its sum; the first rows are the same for any m."""
    random = torch.Generator().manual_seed(0)
    x, residual, t = (torch.randn(9, size, generator=random).half()[:m] for size in (k, n, 2 * rank))
    weight = SCHEMES["int8"].quantize(torch.randn(n, k, generator=random) * k**-0.5)
    b, names = torch.randn(3, rank, n, generator=random).half(), torch.zeros(n).int()
    names[n // 3 :] = 1
    lora = BatchedLora(t.float(), b, torch.arange(m) % 3, names, ((0, n // 3), (n // 3, n)))
    bias = torch.randn(n // 2, generator=random)
    return (x, weight["weight"], weight["absmax"]), {
        "bias": bias, "bias_start": 3, "lora": lora, "residual": residual,
    }  # fmt: skip


@pytest.mark.parametrize(("n", "k"), [(70, 2100), (70, 300)], ids=["split sums", "whole sums"])
def test_the_bits_of_a_row_do_not_depend_on_the_others(n: int, k: int) -> None:
    assert (inference_dotless.parts_for(n, k)[0] > 1) == (k == 2100)
    given, named = inputs(9, n=n, k=k)
    together = inference.matmul(*given, phase=Phase.DECODE, **named)
    for m in (1, 3, 4, 5):
        given, named = inputs(m, n=n, k=k)
        assert torch.equal(inference.matmul(*given, phase=Phase.DECODE, **named), together[:m])


@pytest.mark.parametrize(
    ("phase", "rows", "here"),
    [(Phase.DECODE, 1, True), (Phase.DECODE, 9, True), (Phase.DECODE_ANY_ORDER, 16, True),
     (Phase.DECODE_ANY_ORDER, 17, False), (Phase.PREFILL, 1, False)],
)  # fmt: skip
def test_prompts_and_many_rows_in_any_order_are_left_to_cublas(
    phase: Phase, rows: int, here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = torch.empty(0)
    monkeypatch.setitem(dispatch.KERNELS, "inference.matmul", lambda *_, **__: answer)
    y = inference.matmul(torch.randn(rows, 40), torch.randn(24, 40), phase=phase)
    assert (y is not answer) == here


class Waiting(TorchDispatchMode):
    """Raises at operations for which the CPU waits for a GPU: no CUDA graph can capture them."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "_unique2"), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("phase", [Phase.PREFILL, Phase.DECODE_ANY_ORDER, Phase.DECODE])
def test_adapters_do_not_wait_for_the_gpu(phase: Phase, monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured decode step has up to 64 rows, with adapters."""
    monkeypatch.setattr(inference_dotless, "MOST_ROWS", 4)
    given, named = inputs(9)
    with Waiting():  # type: ignore[no-untyped-call]
        y = inference.matmul(*given, phase=phase, **named)
    expected = dispatch.KERNELS["inference.matmul"](*given, phase=Phase.PREFILL, **named)
    # Each sum is rounded to float16 at most four times: after the matmul, the bias, the LoRA terms and the residual.
    torch.testing.assert_close(y, expected, rtol=4 * 2.0**-11, atol=4 * 2.0**-11 * float(expected.abs().max()))


@pytest.mark.parametrize(("device", "runs"), [(devices.T4, False), (devices.A100, True)], ids=["T4", "A100"])
def test_a_kernel_made_of_dots_runs_from_ampere_on(
    device: Capabilities, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = torch.empty(0)
    monkeypatch.setattr(dispatch, "capabilities_of", lambda _: device)
    monkeypatch.setattr(dispatch, "kernels_disabled_reason", lambda _: "")
    monkeypatch.setattr("octavo.kernels.cached_attention.prefill_attention", lambda *_: answer)
    q, cache, starts = torch.randn(1, 3, 2, 8), torch.randn(1, 9, 2, 8), torch.tensor([0])
    assert (cached_attention.prefill_attention(q, cache, cache, starts) is answer) == runs
