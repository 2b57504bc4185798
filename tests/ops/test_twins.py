"""Every Triton twin against its definition: odd shapes, strided columns, results over inputs; and who is called.

Where there is a card, compiled and on it, bfloat16 too; else in Triton's interpreter on the CPU. In float32 a twin may
differ by what reordered float32 sums make; in a short type by that and one rounding of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.ops import attention, loss, pointwise, quantize, twins  # noqa: F401  (what they mark is in TWINS)
from octavo.ops.attention import rotary_table
from octavo.ops.quantize import SCHEMES
from octavo.ops.twins import TWINS, kernels_missing, kernels_run_on, use_kernels

Case = Callable[[torch.dtype], tuple[tuple[object, ...], dict[str, object], Tensor]]
CARD = torch.cuda.is_available()
TOLERANCES = {torch.float32: 5e-6, torch.float16: 1.5e-3}  # float16 rounds to 2^-11 = 4.9e-4 of a number
if CARD:  # whose exp is off by some units in the last place
    TOLERANCES = {torch.float32: 2e-5, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
pytestmark = [pytest.mark.filterwarnings("default")] if CARD else []  # what compilers say is no fault of ours


@pytest.fixture(autouse=True)
def where_kernels_run() -> Iterator[None]:
    """Makes the tensors of a case on the card if there is one."""
    with torch.device("cuda" if CARD else "cpu"):
        yield


def columns(m: int, n: int, dtype: torch.dtype) -> Tensor:
    """(m, n) random numbers that are columns of a wider matrix."""
    return torch.randn(m, n + 5).to(dtype)[:, 2 : n + 2]


def norm(dtype: torch.dtype, *, centred: bool) -> tuple[tuple[object, ...], dict[str, object], Tensor]:
    out = columns(7, 100, dtype)
    return (columns(7, 100, dtype), torch.randn(100), torch.randn(100) if centred else None, 1e-5, out), {}, out


def norm_backward(dtype: torch.dtype, *, centred: bool) -> tuple[tuple[object, ...], dict[str, object], Tensor]:
    out = columns(7, 100, dtype)
    x, dy, residual = (columns(7, 100, dtype) for _ in range(3))
    return (x, torch.randn(100), 1e-5, dy, residual, out), {"centred": centred}, out


def norm_over_residual(dtype: torch.dtype) -> tuple[tuple[object, ...], dict[str, object], Tensor]:
    x, dy, residual = (columns(7, 100, dtype) for _ in range(3))
    return (x, torch.randn(100), 1e-5, dy, residual, residual), {"centred": True}, residual


def activation(inputs: int, outputs: int, *, backward: bool = False, over: bool = False, far: bool = False) -> Case:
    def make(dtype: torch.dtype) -> tuple[tuple[object, ...], dict[str, object], Tensor]:
        x = columns(3, inputs, dtype).mul_(3)
        if far:
            x[:, :outputs:3] *= 300
        if over:
            return (x, columns(3, outputs, dtype), x), {}, x
        if backward:
            return (x, columns(3, outputs, dtype), out := columns(3, inputs, dtype)), {}, out
        return (x, out := columns(3, outputs, dtype)), {}, out

    return make


def rotation(form: str, turned: int, *, heads: int = 3, rows: int = 1) -> Case:
    def make(dtype: torch.dtype) -> tuple[tuple[object, ...], dict[str, object], Tensor]:
        x = columns(10, heads * 24, dtype)
        positions = torch.tensor([[9, 10, 11, 12, 13], [0, 1, 0, 1, 2]])[:rows]
        return (x, *rotary_table(positions, torch.rand(turned // 2)), 24, form), {}, x

    return make


def codes(scheme: str, n: int = 9, k: int = 1111) -> Case:
    def make(dtype: torch.dtype) -> tuple[tuple[object, ...], dict[str, object], Tensor]:
        parts = SCHEMES[scheme].quantise(torch.randn(n, k))
        out = columns(n, k, dtype)
        names = {"int8": ("weight", "absmax"), "nf4": ("weight", "absmax"), "dynamic8": ("weight", "absmax", "code")}
        return (*(parts[name] for name in names[scheme]), out), {}, out

    return make


def losses(vocabulary: int, labels: list[int], *, gradient: bool, hidden: bool = False) -> Case:
    def make(dtype: torch.dtype) -> tuple[tuple[object, ...], dict[str, object], Tensor]:
        logits = columns(len(labels), vocabulary, dtype).mul_(4)
        if hidden:
            logits[:, 1::2] = float("-inf")
        return (logits, torch.tensor(labels)), {"gradient": gradient}, logits

    return make


CASES: dict[str, list[Case]] = {
    "quantize.int8_into": [codes("int8"), codes("int8", 2, 4500)],
    "quantize.dynamic8_into": [codes("dynamic8"), codes("dynamic8", 2, 4500)],
    "quantize.nf4_into": [codes("nf4"), codes("nf4", 2, 4500), codes("nf4", 1, 1)],
    "pointwise.norm_into": [lambda t: norm(t, centred=True), lambda t: norm(t, centred=False)],
    "pointwise.norm_backward_into": [
        lambda t: norm_backward(t, centred=True), lambda t: norm_backward(t, centred=False), norm_over_residual,
    ],
    "pointwise.gelu_into": [activation(2100, 2100), activation(2100, 2100, far=True)],
    "pointwise.gelu_backward_into": [
        activation(2100, 2100, backward=True), activation(2100, 2100, over=True),
        activation(70, 70, over=True, far=True),
    ],
    "pointwise.swiglu_into": [activation(4200, 2100), activation(4200, 2100, far=True)],
    "pointwise.swiglu_backward_into": [
        activation(4200, 2100, backward=True), activation(4200, 2100, over=True),
        activation(70, 35, over=True, far=True),
    ],
    "attention.rotate_": [
        rotation("interleaved", 8), rotation("half", 24), rotation("interleaved", 24, heads=11, rows=2),
        rotation("half", 24, heads=9, rows=2),
    ],
    "loss.cross_entropy_": [
        losses(9001, [0, 9000, -100, 5000], gradient=True), losses(9001, [0, 9000, -100, 5000], gradient=False),
        losses(37, [36, -100, 0], gradient=True), losses(37, [-100, -100], gradient=True),
        losses(9001, [0, 9000, 8192], gradient=True, hidden=True),
    ],
}  # fmt: skip


def test_every_twin_has_a_case() -> None:
    assert CASES.keys() == TWINS.keys()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_twin_is_its_definition(name: str, dtype: torch.dtype) -> None:
    room, _, function = name.partition(".")
    kernel = getattr(import_module(f"octavo.kernels.{room}"), function)
    for make in CASES[name]:
        torch.manual_seed(0)
        arguments, named, wanted = make(dtype)
        whole = wanted._base if wanted._base is not None else wanted
        result = TWINS[name](*arguments, **named)
        torch.manual_seed(0)
        again, named, found = make(dtype)
        with np.errstate(invalid="ignore"):  # the interpreter's numpy minds -inf + inf, which `where` leaves out
            fast = kernel(*again, **named)
        tolerance = TOLERANCES[dtype]
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(fast, result, rtol=tolerance, atol=tolerance)
        # What lies beside the columns is somebody else's.
        beside = found._base if found._base is not None else found
        assert torch.equal(beside[:, :2], whole[:, :2])
        assert torch.equal(beside[:, -3:], whole[:, -3:])


class OnCard(Tensor):
    """Says that it is on a card."""

    is_cuda = True


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What the twin of gelu_into is called with, in its place."""
    calls: list[Any] = []
    monkeypatch.setattr(import_module("octavo.kernels.pointwise"), "gelu_into", lambda *call: calls.append(call))
    kernels_missing.cache_clear()
    yield calls
    use_kernels(None)
    kernels_missing.cache_clear()


def two(*, card: bool) -> tuple[Tensor, Tensor]:
    x = torch.rand(2, 3, device="cpu") + 1
    return x.as_subclass(OnCard) if card else x, torch.zeros(2, 3, device="cpu")


def test_a_tensor_on_a_card_goes_to_the_twin(called: list[Any]) -> None:
    assert kernels_missing() == ""
    for wanted in (None, True):
        use_kernels(wanted)
        x, out = two(card=True)
        assert kernels_run_on(x)
        pointwise.gelu_into(x, out)
        assert called.pop() == (x, out)
        assert not out.any()


def test_a_tensor_on_a_cpu_goes_to_the_definition_whatever_is_wanted(called: list[Any]) -> None:
    for wanted in (None, True, False):
        use_kernels(wanted)
        x, out = two(card=False)
        assert not kernels_run_on(x)
        pointwise.gelu_into(x, out)
        assert out.all()
    assert called == []


def test_twins_that_are_switched_off_leave_the_definitions_alone(called: list[Any]) -> None:
    use_kernels(False)
    x, out = two(card=True)
    pointwise.gelu_into(x, out)
    assert out.all()
    assert called == []


@pytest.mark.parametrize(
    ("missing", "reason"), [("triton", "Triton is not installed"), ("octavo.kernels", "octavo/kernels is not there")]
)
def test_without_triton_or_the_folder_the_definitions_are_left(
    called: list[Any], missing: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(twins, "find_spec", lambda name: None if name == missing else object())
    assert kernels_missing() == reason
    x, out = two(card=True)
    pointwise.gelu_into(x, out)
    assert out.all()
    assert called == []
