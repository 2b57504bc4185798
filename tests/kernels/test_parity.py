"""Every Triton kernel against its reference, on every case of its domain.

On a GPU kernels are compiled, and bfloat16 is tested too; else they run in Triton's interpreter. In float32 a kernel
may differ by what reordered float32 sums make; in a 2-byte dtype by that and one rounding of the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from tests import devices
from tests.kernels.cases import CASES, ON_GPU, TOLERANCES, matmul, prefill
from torch import Tensor

from octavo.hardware import Capabilities
from octavo.layers import kv_cache, kv_store
from octavo.ops import inference, matmul8
from octavo.ops.attention import PLAIN, AttentionSpec
from octavo.ops.rotary import rotary_table
from octavo.ops.tiles import Phase
from octavo.runtime.dispatch import KERNELS

pytestmark = [pytest.mark.filterwarnings("default")] if ON_GPU else []  # warnings of compilers are not our errors


def types(*quick: torch.dtype) -> pytest.MarkDecorator:
    """All dtypes. On a GPU, which compiles kernels for each, those that are not `quick` are exhaustive; in the
    interpreter, which runs every dtype alike and slowly, all but float16."""
    kept = quick if ON_GPU else (torch.float16,)
    marks = {dtype: [] if dtype in kept else [pytest.mark.exhaustive] for dtype in TOLERANCES}
    return pytest.mark.parametrize(
        "dtype", [pytest.param(dtype, marks=marks[dtype], id=str(dtype)) for dtype in TOLERANCES]
    )


@pytest.fixture(autouse=True)
def where_kernels_run() -> Iterator[None]:
    """Makes the tensors of a case on the GPU if there is one."""
    with torch.device("cuda" if ON_GPU else "cpu"):
        yield


@pytest.fixture(autouse=True)
def rounding_to_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter (Triton 3.7.1) loses the carry when it rounds to fp8; PyTorch rounds as a GPU does."""
    interpreter = import_module("triton.runtime.interpreter")
    convert = interpreter._convert_float

    def converted(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if target.is_fp8e4nv():
            return torch.from_numpy(values).to(matmul8.FP8).view(torch.uint8).numpy()
        return convert(values, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", converted)


@types(torch.bfloat16)
@pytest.mark.parametrize("device", [devices.B200, devices.A100], ids=["TMA", "no TMA"])
def test_an_8bit_matmul_is_the_same_with_and_without_tma(
    device: Capabilities, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul8_kernels(), "hopper_kernels_run_on", lambda _: False)
    monkeypatch.setattr(matmul8_kernels(), "capabilities_of", lambda _: device)
    test_a_kernel_is_its_reference("matmul8.matmul_8bit_into", dtype)


def test_tiles_of_8bit_matmuls_fit_into_the_shared_memory_of_a_gpu() -> None:
    kernels = matmul8_kernels()
    for device, tile in (
        (devices.A100, kernels.LITTLE), (devices.RTX_4090, kernels.LITTLE), (devices.H200, kernels.SHORT),
        (devices.B200, kernels.LITTLE),
    ):  # fmt: skip
        assert kernels.tile_for(device, 2, groups=False) == tile
        assert kernels.tile_for(device, 2, groups=True) == kernels.LITTLE
        assert kernels.tile_for(device, 4, groups=False) == kernels.LONG


@types(torch.bfloat16)
@pytest.mark.parametrize("m", [1, 5, 33, 70])
def test_an_adapter_that_is_not_finite_changes_no_other_row(dtype: torch.dtype, m: int) -> None:
    """Requests of several adapters, and of the base model, share a matmul."""
    torch.manual_seed(0)
    given, named, _ = matmul(m, 200, 70, rank=5)(dtype)
    lora = named["lora"]
    assert isinstance(lora, inference.BatchedLora)
    lora.b[2, 1, 3::5] = torch.nan
    found = import_module("octavo.kernels.inference").matmul(*given, **named)
    assert torch.equal(found.isfinite().all(dim=1), lora.adapter_ids != 2)


def same_bits(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """On a GPU; the interpreter's dots are NumPy's, whose order of sums follows the machine and the shape."""
    tolerance = 0.0 if ON_GPU else TOLERANCES[dtype]
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@types(*TOLERANCES)
@pytest.mark.parametrize("weight", ["int8", "float"])
@pytest.mark.parametrize("phase", [Phase.PREFILL, Phase.DECODE])
def test_a_row_of_a_matmul_has_the_same_bits_in_any_batch(phase: Phase, weight: str, dtype: torch.dtype) -> None:
    """On a GPU with every tile of rows, and with and without split sums."""
    kernel = import_module("octavo.kernels.inference")
    shapes, cuts = ((71, 1100, 70), (130, 200, 140)), ((7, 8), (7, 23), (3, 35), (0, 33), (6, 71))
    if not ON_GPU:
        shapes, cuts = ((19, 1100, 30),), ((7, 8), (2, 19))  # type: ignore[assignment]
    for m, k, n in shapes:
        torch.manual_seed(0)
        (x, *given), named, _ = matmul(m, k, n, rank=3, bias=True, residual=True, weight=weight, phase=phase)(dtype)
        lora, residual = named.pop("lora"), named.pop("residual")
        assert isinstance(lora, inference.BatchedLora)
        whole = kernel.matmul(x, *given, lora=lora, residual=residual, **named)
        for rows in (slice(*cut) for cut in cuts):
            own = lora._replace(t=lora.t[rows], adapter_ids=lora.adapter_ids[rows])
            found = kernel.matmul(x[rows], *given, lora=own, residual=residual[rows], **named)  # type: ignore[index]
            same_bits(found, whole[rows], dtype)


@pytest.mark.parametrize("spec", [PLAIN, AttentionSpec(window=21)], ids=["all", "window"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_query_has_the_same_bits_in_any_chunk_and_batch(dtype: torch.dtype, spec: AttentionSpec) -> None:
    kernel = import_module("octavo.kernels.cached_attention")
    torch.manual_seed(0)
    given: Any = prefill(70, [64, 0, 3], [4, 0, 2], heads=3, groups=1, size=16)(dtype)[0]
    q, keys, values, starts, slots, _ = given
    whole = kernel.prefill_attention(q, keys, values, starts, slots, spec)
    for row in range(3):
        for cut in (1, 37, 64) if ON_GPU else (37,):
            one = slice(row, row + 1)
            found = kernel.prefill_attention(q[one, cut:], keys, values, starts[one] + cut, slots[one], spec)
            same_bits(found, whole[one, cut:], dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_ring_has_the_bits_of_a_cache_of_all_positions(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In passes of many windows and of single tokens, next to slots of other lengths."""
    kernel = import_module("octavo.kernels.cached_attention")
    for name in ("prefill_attention", "decode_attention"):
        monkeypatch.setattr(kv_cache, name, getattr(kernel, name))
    spec, outputs = AttentionSpec(window=21), []
    for chunk in (64, 300):
        monkeypatch.setattr(kv_store, "CHUNK", chunk)
        torch.manual_seed(0)
        shape = {"heads": 1, "head_size": 16, "dtype": dtype, "device": torch.empty(0).device}
        cache = kv_cache.SlotCache([21], slots=2, max_len=300, **shape)
        views = [(cache.slot(1).next(5), 5), (cache.slot(0).next(150), 150)]
        views += [(cache.decode(torch.tensor([150 + n, 5 + n]), 300).next(1), 1) for n in range(2)]
        cache.lengths[0] = 152
        views += [(cache.slot(0).next(70), 70)]
        for view, length in views:
            rows = 2 if length == 1 else 1
            q, k, v = (torch.randn(rows, length, heads, 16).to(dtype) for heads in (2, 1, 1))
            with np.errstate(invalid="ignore"):  # rows after the last query, which are not stored, see no position
                outputs.append(view.attend(0, q, k, v, spec))
    for ring, whole in zip(outputs[: len(views)], outputs[len(views) :], strict=True):
        same_bits(ring, whole, dtype)


def matmul8_kernels() -> Any:
    return import_module("octavo.kernels.matmul8")


@types(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_is_its_reference(name: str, dtype: torch.dtype) -> None:
    file, _, function = name.partition(".")
    kernel = getattr(import_module(f"octavo.kernels.{file}"), function)
    for make in CASES[name]:
        torch.manual_seed(0)
        arguments, named, wanted = make(dtype)
        whole = wanted._base if wanted._base is not None else wanted
        result = KERNELS[name](*arguments, **named)
        torch.manual_seed(0)
        again, named, found = make(dtype)
        with np.errstate(
            invalid="ignore"
        ):  # the interpreter's numpy warns of -inf + inf, which `where` does not select
            fast = kernel(*again, **named)
        tolerance = TOLERANCES[dtype]
        if ON_GPU and name == "matmul8.matmul_8bit_into":  # tensor cores keep 14 binary digits of sums of fp8
            tolerance = max(tolerance, 2.0**-8)
        if wanted.itemsize == 1:  # quantized values are equal
            found, wanted, whole, tolerance = (*(x.view(torch.int8) for x in (found, wanted, whole)), 0)
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(fast, result, rtol=tolerance, atol=tolerance)
        # Columns next to the result are unchanged.
        base = found._base if found._base is not None else found
        assert torch.equal(base[:, :2], whole[:, :2])
        assert torch.equal(base[:, -3:], whole[:, -3:])


def test_a_zero_centred_weight_is_not_rounded() -> None:
    """Sums in another order change the last bit of some results; a weight in float16 would change that of a third."""
    torch.manual_seed(0)
    x, weight = torch.randn(7, 100).half(), torch.randn(100) / 3
    wanted, found = torch.empty_like(x), torch.empty_like(x)
    KERNELS["pointwise.norm_into"](x, weight, None, 1e-5, wanted, zero_centred_weight=True)
    kernel = import_module("octavo.kernels.pointwise")
    kernel.norm_into(x, weight, None, 1e-5, found, zero_centred_weight=True)
    assert (found != wanted).float().mean() < 0.02


@pytest.mark.parametrize("scale", [1.0, 0.375])  # of float16: a CPU's torch.add rounds alpha to the dtype, a GPU's not
@pytest.mark.parametrize("plus_one", [False, True])
def test_a_norm_in_one_pass_with_its_sum_rounds_as_in_two(scale: float, plus_one: bool) -> None:
    """The norm before it is added, and scale * dy before the norm's backward: in float16 the bits of two passes."""
    torch.manual_seed(0)
    x, residual, dy = (torch.randn(64, 100).half() for _ in range(3))
    weight, kernel = torch.randn(100), import_module("octavo.kernels.pointwise")
    two, one, two_back, one_back = (torch.empty_like(x) for _ in range(4))
    kernel.norm_into(x, weight, None, 1e-5, two, zero_centred_weight=plus_one)
    torch.add(residual, two, alpha=scale, out=two)
    kernel.add_norm_into(x, weight, None, 1e-5, residual, one, scale=scale, zero_centred_weight=plus_one)
    assert torch.equal(one, two)
    named = {"centred": False, "zero_centred_weight": plus_one}
    kernel.norm_backward_into(x, weight, 1e-5, dy * scale, None, two_back, **named)
    kernel.norm_backward_into(x, weight, 1e-5, dy, None, one_back, scale=scale, **named)
    assert torch.equal(one_back, two_back)


@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("form", ["half", "interleaved"])
def test_a_norm_in_one_pass_with_its_rotation_rounds_as_in_two(form: str, plus_one: bool) -> None:
    """The norm before it is rotated, and the rotated gradient before the norm's backward: in float16 the bits of two
    passes but where sums in another order change the last bit, as they do for few values."""
    torch.manual_seed(0)
    x, dy = (torch.randn(40, 4 * 96).half() for _ in range(2))
    weight, table = torch.randn(96), rotary_table(torch.arange(20)[None], torch.rand(48))
    norms, rotations = import_module("octavo.kernels.pointwise"), import_module("octavo.kernels.rotary")
    two, one, two_back, one_back = (torch.empty_like(x) for _ in range(4))
    norms.norm_into(x, weight, None, 1e-5, two, zero_centred_weight=plus_one)
    rotations.rotate_into(two, *table, 96, form, two)
    rotations.norm_rotate_into(x, weight, 1e-5, *table, 96, form, one, zero_centred_weight=plus_one)
    assert (one != two).float().mean() < 0.01
    rotations.rotate_into(dy, *table, 96, form, two_back, back=True)
    named = {"centred": False, "zero_centred_weight": plus_one}
    norms.norm_backward_into(x, weight, 1e-5, two_back, None, two_back, **named)
    given = x, weight, 1e-5, *table, 96, form, dy, one_back
    rotations.norm_rotate_backward_into(*given, zero_centred_weight=plus_one)
    assert (one_back != two_back).float().mean() < 0.01
