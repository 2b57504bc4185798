"""Every attention implementation on a GPU against a float32 reference: output and gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from octavo.ops.attention import Documents, causal_attention, find_documents
from octavo.runtime.dispatch import ATTENTIONS, Backends, set_backends

pytestmark = pytest.mark.filterwarnings("default")  # backends warn when they are not applicable
GPU = torch.device("cuda")
BATCH, LENGTH, HEADS = 2, 96, 8
DOCUMENT = torch.tensor([[0] * 40 + [1] * 7 + [2] * 49, [3] * 1 + [4] * 80 + [-1] * 15])
SHAPES = [(HEADS, 64), (HEADS, 128), (2, 64)]  # (key heads G, head dimension D)


@pytest.fixture(autouse=True)
def default_backends() -> Iterator[None]:
    yield
    set_backends(Backends())


def random_qkv(groups: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    """q (B, T, H, D), k and v (B, T, G, D) in `dtype` on the GPU."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(BATCH, LENGTH, heads, size) for heads in (HEADS, groups, groups)]
    return [torch.randn(shape, generator=generator).to(GPU, dtype).requires_grad_() for shape in shapes]


def reference(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v in float32."""
    q, k, v = (x.float() for x in (q, k, v))
    k, v = (x.repeat_interleave(HEADS // x.shape[2], dim=2) for x in (k, v))
    visible = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=GPU).tril()
    if documents is not None:
        number = documents.number
        visible = visible & (number[:, None, :, None] == number[:, None, None, :])
    scores = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5  # (B, H, T, T)
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(~visible, -torch.inf).softmax(dim=-1), v)


def assert_equals_reference(x: list[Tensor], document: Tensor | None, tolerance: float) -> None:
    documents = find_documents(document, GPU)
    assert (documents is None) == (document is None)
    dout = torch.randn(BATCH, LENGTH, HEADS, x[0].shape[-1], generator=torch.Generator().manual_seed(1)).to(GPU)
    q, k, v = x
    expected = reference(q, k, v, documents)
    expected_gradients = torch.autograd.grad(expected, x, dout)
    out = causal_attention(q, k, v, documents=documents)
    gradients = torch.autograd.grad(out, x, dout.to(out.dtype))
    assert out.dtype == x[0].dtype
    for actual, wanted in zip([out, *gradients], [expected, *expected_gradients], strict=True):
        assert (actual.float() - wanted.float()).norm() < tolerance * wanted.float().norm()


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize(("groups", "size"), SHAPES)
@pytest.mark.parametrize("document", [None, DOCUMENT], ids=["one document per row", "packed"])
def test_attention_in_bfloat16(attention: str, groups: int, size: int, document: Tensor | None) -> None:
    set_backends(Backends(attention=attention))
    assert_equals_reference(random_qkv(groups, size, torch.bfloat16), document, 0.02)


@pytest.mark.parametrize("attention", ["auto", "efficient", "math"])  # the others support 16-bit dtypes only
@pytest.mark.parametrize(("groups", "size"), SHAPES)
@pytest.mark.parametrize("document", [None, DOCUMENT], ids=["one document per row", "packed"])
def test_attention_in_float32(attention: str, groups: int, size: int, document: Tensor | None) -> None:
    set_backends(Backends(attention=attention))
    assert_equals_reference(random_qkv(groups, size, torch.float32), document, 1e-4)


@pytest.mark.parametrize("document", [None, DOCUMENT], ids=["one document per row", "packed"])
def test_a_head_dimension_of_256(document: Tensor | None) -> None:
    assert_equals_reference(random_qkv(HEADS, 256, torch.bfloat16), document, 0.02)


@pytest.mark.parametrize("attention", ATTENTIONS)
@torch.no_grad()
def test_one_query_on_a_cache(attention: str) -> None:
    set_backends(Backends(attention=attention))
    q, k, v = random_qkv(HEADS, 64, torch.bfloat16)
    out = causal_attention(q[:, -1:], k, v)
    expected = reference(q, k, v, None)[:, -1:]
    assert (out.float() - expected).norm() < 0.02 * expected.norm()
