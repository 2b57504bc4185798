"""The kernels of soft-capped attention, compiled, against the formula in float64 with bounds of the rounding errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from tests.gpu.cases import matrix
from tests.kernels.softcap_bounds import bounded_attention
from torch import Tensor

from octavo.kernels.softcap_tiles import tiles_for
from octavo.ops.attention import AttentionSpec, Documents, causal_attention, find_documents
from octavo.runtime.dispatch import Backends, kernels_run_on, set_backends

pytestmark = pytest.mark.filterwarnings("default")
GPU = torch.device("cuda")


class Case(NamedTuple):
    """Documents of each row by length; query heads, key heads and head size; the window. Padding is number -1."""

    lengths: list[list[int]]
    heads: tuple[int, int, int]
    window: int | None = None
    padding: bool = False

    def __str__(self) -> str:
        return f"{self.lengths}-{self.heads}-{self.window}"


CASES = {
    "one document": Case([[2048]], (4, 2, 256)),
    "one document, odd length": Case([[1999]], (4, 1, 128)),
    "a window": Case([[2048]], (4, 2, 256), window=500),
    "a window of a block": Case([[1024], [1024]], (2, 2, 64), window=64),
    "a window of one position": Case([[300]], (2, 1, 96), window=1),
    "packed": Case([[1, 1, 62, 64, 128, 700, 68], [1000, 1, 23]], (4, 2, 256)),
    "packed, a window": Case([[1, 1, 62, 64, 128, 700, 68], [1000, 1, 23]], (4, 1, 128), window=63),
    "packed, padding": Case([[63, 65, 300, 84], [127, 129, 200, 56]], (8, 2, 64), window=100, padding=True),
    "one position": Case([[1], [1]], (2, 1, 64)),
}


@pytest.fixture(autouse=True)
def default_backends() -> Iterator[None]:
    yield
    set_backends(Backends())


def operands_of(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Documents | None]:
    """(q, k and v, columns of one matrix; the gradient of the output; the documents)."""
    torch.manual_seed(0)
    (heads, groups, size), rows, length = case.heads, len(case.lengths), sum(case.lengths[0])
    u = torch.randn(rows, length, heads + 2 * groups, size, device=GPU).to(dtype)
    numbers = torch.tensor([[n for n, count in enumerate(row) for _ in range(count)] for row in case.lengths])
    if case.padding:
        numbers[numbers == numbers[:, -1:]] = -1
    grad = torch.randn(rows, length, heads, size, device=GPU).to(dtype)
    return [x.requires_grad_() for x in u.split([heads, groups, groups], dim=2)], grad, find_documents(numbers, GPU)


def results_of(x: list[Tensor], grad: Tensor, spec: AttentionSpec, documents: Documents | None) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    q, k, v = x
    out = causal_attention(q, k, v, spec, documents=documents)
    return [out.detach(), *torch.autograd.grad(out, x, grad)]


# Every case in bfloat16, and some in the other dtypes: each compiles three kernels.
@matrix(name=CASES, dtype=(torch.bfloat16, torch.float16, torch.float32), softcap=(50.0, 1.5))(
    lambda name, dtype, softcap: (
        (dtype == torch.bfloat16 and softcap == 1.5)
        or (dtype, name, softcap) in ((torch.float32, "packed, a window", 1.5), (torch.float16, "packed", 50.0))
    )
)
def test_the_kernels_are_the_formula(name: str, dtype: torch.dtype, softcap: float) -> None:
    case = CASES[name]
    x, grad, documents = operands_of(case, dtype)
    assert kernels_run_on(x[0])
    spec = AttentionSpec(case.heads[2] ** -0.5, softcap=softcap, window=case.window)
    found = results_of(x, grad, spec, documents)
    bounded = bounded_attention([*(tensor.detach() for tensor in x), grad], spec, documents)
    for kind, result, (wanted, bound) in zip(("out", "dq", "dk", "dv"), found, bounded, strict=True):
        excess = ((result.double() - wanted).abs() / bound).max().item()
        assert excess < 1, f"{kind}: {excess:.2f} times the bound of the error"


@pytest.mark.parametrize("name", ["a window", "packed"])
def test_results_have_the_same_bits_again(name: str) -> None:
    case = CASES[name]
    x, grad, documents = operands_of(case, torch.bfloat16)
    spec = AttentionSpec(softcap=50.0, window=case.window)
    first = results_of(x, grad, spec, documents)
    for _ in range(5):
        assert all(torch.equal(*both) for both in zip(first, results_of(x, grad, spec, documents), strict=True))


@pytest.mark.parametrize("shared_kib", [64, 99], ids=["64 KB", "99 KB"])
@pytest.mark.parametrize("name", ["packed", "packed, a window"])
def test_the_tiles_of_smaller_gpus(name: str, shared_kib: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    monkeypatch.setattr("octavo.kernels.softcap.tiles_for", lambda _, *rest: tiles_for(shared_kib * 1024, *rest))
    x, grad, documents = operands_of(case, torch.float16)
    spec = AttentionSpec(softcap=1.5, window=case.window)
    bounded = bounded_attention([*(tensor.detach() for tensor in x), grad], spec, documents)
    for result, (wanted, bound) in zip(results_of(x, grad, spec, documents), bounded, strict=True):
        assert bool(((result.double() - wanted).abs() < bound).all())


def test_memory_is_that_of_the_results() -> None:
    """No scores are stored: forward adds the output and lse, backward the gradients and delta."""
    x, grad, documents = operands_of(CASES["one document"], torch.bfloat16)
    q, k, v = x
    results_of(x, grad, AttentionSpec(softcap=50.0), documents)  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = causal_attention(q, k, v, AttentionSpec(softcap=50.0))
    torch.autograd.grad(out, x, grad)
    sums = 4 * q.shape[0] * q.shape[2] * q.shape[1]
    assert torch.cuda.max_memory_allocated() - before <= out.nbytes + sum(t.nbytes for t in x) + 2 * sums + 2**16
