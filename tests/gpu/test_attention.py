"""Every implementation of attention on a card against the formula in float32: output and gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from octavo.ops.attention import Documents, causal_attention, find_documents
from octavo.runtime.dispatch import ATTENTIONS, Backends, set_backends

pytestmark = pytest.mark.filterwarnings("default")  # libraries warn of what they cannot do before the next one is asked
CARD = torch.device("cuda")
BATCH, LENGTH, HEADS = 2, 96, 8
DOCUMENT = torch.tensor([[0] * 40 + [1] * 7 + [2] * 49, [3] * 1 + [4] * 80 + [-1] * 15])
SHAPES = [(HEADS, 64), (HEADS, 128), (2, 64)]  # key heads, size of a head


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    yield
    set_backends(Backends())


def three(groups: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    """q (B, T, H, D), k and v (B, T, G, D), on the card; rounded to `dtype`."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(BATCH, LENGTH, heads, size) for heads in (HEADS, groups, groups)]
    return [torch.randn(shape, generator=generator).to(CARD, dtype).requires_grad_() for shape in shapes]


def formula(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, written out in float32."""
    q, k, v = (x.float() for x in (q, k, v))
    k, v = (x.repeat_interleave(HEADS // x.shape[2], dim=2) for x in (k, v))
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=CARD).tril()
    if documents is not None:
        number = documents.number
        seen = seen & (number[:, None, :, None] == number[:, None, None, :])
    scores = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(~seen, -torch.inf).softmax(dim=-1), v)


def assert_is_the_formula(x: list[Tensor], document: Tensor | None, tolerance: float) -> None:
    documents = find_documents(document, CARD)
    assert (documents is None) == (document is None)
    dout = torch.randn(BATCH, LENGTH, HEADS, x[0].shape[-1], generator=torch.Generator().manual_seed(1)).to(CARD)
    q, k, v = x
    expected = formula(q, k, v, documents)
    theirs = torch.autograd.grad(expected, x, dout)
    out = causal_attention(q, k, v, documents=documents)
    ours = torch.autograd.grad(out, x, dout.to(out.dtype))
    assert out.dtype == x[0].dtype
    for mine, other in zip([out, *ours], [expected, *theirs], strict=True):
        assert (mine.float() - other.float()).norm() < tolerance * other.float().norm()


@pytest.mark.parametrize("wanted", ATTENTIONS)
@pytest.mark.parametrize(("groups", "size"), SHAPES)
@pytest.mark.parametrize("document", [None, DOCUMENT], ids=["a document a row", "packed"])
def test_in_bfloat16(wanted: str, groups: int, size: int, document: Tensor | None) -> None:
    set_backends(Backends(attention=wanted))
    assert_is_the_formula(three(groups, size, torch.bfloat16), document, 0.02)


@pytest.mark.parametrize("wanted", ["auto", "efficient", "math"])  # the others are for short types
@pytest.mark.parametrize(("groups", "size"), SHAPES)
@pytest.mark.parametrize("document", [None, DOCUMENT], ids=["a document a row", "packed"])
def test_in_float32(wanted: str, groups: int, size: int, document: Tensor | None) -> None:
    set_backends(Backends(attention=wanted))
    assert_is_the_formula(three(groups, size, torch.float32), document, 1e-4)


@pytest.mark.parametrize("document", [None, DOCUMENT], ids=["a document a row", "packed"])
def test_heads_as_wide_as_those_of_gptj(document: Tensor | None) -> None:
    assert_is_the_formula(three(HEADS, 256, torch.bfloat16), document, 0.02)


@pytest.mark.parametrize("wanted", ATTENTIONS)
@torch.no_grad()
def test_one_query_over_a_cache(wanted: str) -> None:
    set_backends(Backends(attention=wanted))
    q, k, v = three(HEADS, 64, torch.bfloat16)
    out = causal_attention(q[:, -1:], k, v)
    expected = formula(q, k, v, None)[:, -1:]
    assert (out.float() - expected).norm() < 0.02 * expected.norm()
