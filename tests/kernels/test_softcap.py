"""The kernels of soft-capped attention against the formula in float64, with bounds of the rounding errors.

The interpreter has no bfloat16 (tests/kernels/domains.py); tests/gpu/test_softcap.py has it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from tests.kernels.cases import ON_GPU
from tests.kernels.softcap_bounds import bounded_attention
from torch import Tensor

from octavo.kernels import softcap
from octavo.kernels.softcap_tiles import Tile, Tiles
from octavo.ops.attention import AttentionSpec, causal_attention, find_documents
from octavo.runtime import dispatch

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
pytestmark = [pytest.mark.filterwarnings("default")] if ON_GPU else []


class Case(NamedTuple):
    """Documents of each row by length, the last one padding if `padding`; heads, head size, window, tile (BM, BN)."""

    lengths: list[list[int]]
    heads: int = 2
    groups: int = 1
    size: int = 16
    window: int | None = None
    tile: tuple[int, int] = (32, 16)
    padding: bool = False
    split: bool = False  # dk and dv in passes of their own


CASES = [
    Case([[1]]),
    Case([[2], [2]], window=1),
    Case([[64]], tile=(32, 32)),
    Case([[65]], tile=(16, 32)),
    Case([[150]], heads=1, tile=(32, 64)),
    Case([[97]], window=1),
    Case([[97]], window=16, tile=(16, 32)),
    Case([[97]], window=33, size=40, tile=(32, 64)),
    Case([[70]], window=70),
    Case([[1, 1, 1, 30, 32, 16, 15], [64, 1, 31]], heads=4, groups=2, split=True),
    Case([[1, 1, 1, 30, 32, 16, 15], [64, 1, 31]], heads=4, tile=(16, 32), padding=True),
    Case([[20, 50, 26], [40, 30, 26]], heads=1, window=17, tile=(16, 32), padding=True),
    Case([[20, 76], [40, 56]], heads=4, window=31, tile=(32, 16)),
    Case([[33, 31]], heads=4, groups=4, window=5),
    Case([[33, 31]], size=128, heads=1, window=20, split=True),
    Case([[33, 7]], size=256, heads=1),
]


def attention_of(case: Case, dtype: torch.dtype, spec: AttentionSpec) -> tuple[list[Tensor], list[Tensor], Any]:
    """(out and gradients; q, k, v and the gradient of out; documents) of a case, q, k and v columns of one matrix."""
    torch.manual_seed(0)
    rows, length, groups = len(case.lengths), sum(case.lengths[0]), case.groups
    u = torch.randn(rows, length, case.heads + 2 * groups, case.size).to(DEVICE, dtype)
    q, k, v = (x.requires_grad_() for x in u.split([case.heads, groups, groups], dim=2))
    numbers = torch.tensor([[n for n, count in enumerate(row) for _ in range(count)] for row in case.lengths])
    if case.padding:
        numbers[numbers == numbers[:, -1:]] = -1
    documents = find_documents(numbers, DEVICE)
    assert (documents is None) == (len(case.lengths[0]) == 1)
    out = causal_attention(q, k, v, spec, documents=documents)
    grad = torch.randn(out.shape).to(DEVICE, dtype)
    gradients = torch.autograd.grad(out, (q, k, v), grad)
    return [out.detach(), *gradients], [q.detach(), k.detach(), v.detach(), grad], documents


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "kernels_run_on", lambda tensor: not tensor.is_meta)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.exhaustive), torch.float16], ids=["float32", "float16"]
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_are_the_formula(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    tile = Tile(*case.tile, 4, 1)
    monkeypatch.setattr(softcap, "tiles_for", lambda *_: Tiles(tile, tile, tile, tile if case.split else None))
    spec = AttentionSpec(case.size**-0.5, softcap=1.5, window=case.window)
    results, operands, documents = attention_of(case, dtype, spec)
    for name, found, (wanted, bound) in zip(
        ("out", "dq", "dk", "dv"), results, bounded_attention(operands, spec, documents), strict=True
    ):
        assert found.dtype == dtype
        excess = ((found.double() - wanted).abs() / bound).max().item()
        assert excess < 1, f"{name}: {excess:.2f} times the bound of the error"


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("softcap_of_scores", [1e-3, 0.05, 50.0, 1000.0])
def test_small_and_large_caps(softcap_of_scores: float) -> None:
    """Scores far above the cap, where tanh is 1, and far below it, where it is the identity."""
    spec = AttentionSpec(0.5, softcap=softcap_of_scores)
    results, operands, documents = attention_of(Case([[40]]), torch.float32, spec)
    for found, (wanted, bound) in zip(results, bounded_attention(operands, spec, documents), strict=True):
        assert bool(((found.double() - wanted).abs() < bound).all())


@pytest.mark.usefixtures("kernels")
def test_without_tiles_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(softcap, "tiles_for", lambda *_: None)
    for name in ("_forward", "_backward_q", "_backward_kv"):
        monkeypatch.setattr(softcap, name, fail)
    spec = AttentionSpec(softcap=2.0)
    results, operands, documents = attention_of(Case([[40]]), torch.float32, spec)
    for found, (wanted, bound) in zip(results, bounded_attention(operands, spec, documents), strict=True):
        assert bool(((found.double() - wanted).abs() < bound).all())


@pytest.mark.usefixtures("kernels")
def test_a_gradient_may_be_expanded() -> None:
    """sum() has one: all its strides are 0."""
    q, k, v = (torch.randn(1, 20, 1, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    out = causal_attention(q, k, v, AttentionSpec(softcap=2.0))
    found = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    wanted = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert all(torch.equal(*both) for both in zip(found, wanted, strict=True))
