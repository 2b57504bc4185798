"""Cross-entropy in chunks: the number and gradients of the plain one, and never all logits at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.ops import loss
from octavo.ops.linear import frozen_linear
from octavo.ops.loss import IGNORE, cross_entropy_sum, frozen_cross_entropy_sum

TOKENS, WIDTH, VOCABULARY = 23, 6, 10  # M, d, V
CHUNK_ROWS = 4

Loss = Callable[..., Tensor]
both = pytest.mark.parametrize("take", [cross_entropy_sum, frozen_cross_entropy_sum])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_LOGITS", CHUNK_ROWS * VOCABULARY + VOCABULARY - 1)


class RecordingHead:
    """A linear head that notes how many rows it is given each time."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.weight = torch.randn(VOCABULARY, WIDTH, dtype=dtype)
        self.rows: list[int] = []

    def __call__(self, hidden: Tensor) -> Tensor:
        self.rows.append(len(hidden))
        return F.linear(hidden, self.weight)


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, RecordingHead]:
    """hidden (M, d), labels (M,) of which every third is ignored, a head."""
    torch.manual_seed(0)
    labels = torch.randint(VOCABULARY, (TOKENS,))
    labels[::3] = IGNORE
    return torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True), labels, RecordingHead(dtype)


LEARNED = 15  # of the 23 labels of `batch`


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sum_and_gradient_are_those_of_cross_entropy(take: Loss, dtype: torch.dtype) -> None:
    hidden, labels, head = batch(dtype)
    ours = take(hidden, labels, head, vocabulary=VOCABULARY)
    theirs = F.cross_entropy(head(hidden), labels, reduction="sum", ignore_index=IGNORE)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs.float())
    (mine,) = torch.autograd.grad(0.5 * ours, hidden)
    (other,) = torch.autograd.grad(0.5 * theirs, hidden)
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)  # the loss is taken in float32


def test_a_trained_head_gets_its_gradient() -> None:
    hidden, labels, head = batch()
    head.weight.requires_grad_()
    leaves = (hidden, head.weight)
    ours = torch.autograd.grad(cross_entropy_sum(hidden, labels, head, vocabulary=VOCABULARY), leaves)
    theirs = torch.autograd.grad(F.cross_entropy(head(hidden), labels, reduction="sum", ignore_index=IGNORE), leaves)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_a_trained_head_gets_its_gradient_under_a_hidden_that_needs_none() -> None:
    hidden, labels, head = batch()
    head.weight.requires_grad_()
    total = cross_entropy_sum(hidden.detach(), labels, head, vocabulary=VOCABULARY)
    (gradient,) = torch.autograd.grad(total, head.weight)
    assert gradient.abs().sum() > 0


@both
def test_what_stands_at_an_ignored_position_does_not_matter(take: Loss) -> None:
    hidden, labels, head = batch()
    spoiled = hidden.detach().clone()
    spoiled[labels == IGNORE] = float("nan")
    spoiled.requires_grad_()
    total = take(spoiled, labels, head, vocabulary=VOCABULARY)
    assert torch.equal(total, take(hidden, labels, head, vocabulary=VOCABULARY))
    (gradient,) = torch.autograd.grad(total, spoiled)
    assert not gradient[labels == IGNORE].any()
    assert gradient[labels != IGNORE].any(dim=1).all()


@both
def test_all_ignored_costs_nothing_and_has_zero_gradients(take: Loss) -> None:
    hidden, _, plain = batch()

    def head(rows: Tensor) -> Tensor:  # octavo's own, which sees no rows at all
        return frozen_linear(rows, lambda dtype: (plain.weight.to(dtype), None))

    total = take(hidden, torch.full((TOKENS,), IGNORE), head, vocabulary=VOCABULARY)
    assert total.item() == 0
    (gradient,) = torch.autograd.grad(total, hidden)
    assert torch.equal(gradient, torch.zeros_like(hidden))


@both
def test_the_head_never_sees_more_than_a_chunk(take: Loss) -> None:
    hidden, labels, head = batch()
    take(hidden, labels, head, vocabulary=VOCABULARY)
    assert head.rows == [4, 4, 4, 3]
    assert sum(head.rows) == LEARNED


@both
def test_a_chunk_is_at_least_one_row(take: Loss, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_LOGITS", VOCABULARY - 1)
    hidden, labels, head = batch()
    take(hidden, labels, head, vocabulary=VOCABULARY)
    assert head.rows == [1] * LEARNED


def test_a_trained_heads_chunks_are_computed_again_and_a_frozen_heads_are_not() -> None:
    for take, times in ((cross_entropy_sum, 2), (frozen_cross_entropy_sum, 1)):
        hidden, labels, head = batch()
        torch.autograd.backward(take(hidden, labels, head, vocabulary=VOCABULARY))
        assert sum(head.rows) == times * LEARNED


@both
def test_nothing_the_size_of_the_logits_waits_for_backward(take: Loss) -> None:
    hidden, labels, head = batch()
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total = take(hidden, labels, head, vocabulary=VOCABULARY)
    assert total.requires_grad
    assert max(saved) <= LEARNED * WIDTH < LEARNED * VOCABULARY


@both
def test_without_grad_mode_the_number_is_the_same_and_nothing_hangs_on_it(take: Loss) -> None:
    hidden, labels, head = batch()
    with torch.no_grad():
        total = take(hidden, labels, head, vocabulary=VOCABULARY)
    assert not total.requires_grad
    torch.testing.assert_close(total, take(hidden, labels, head, vocabulary=VOCABULARY).detach())


@both
def test_a_short_type_is_summed_in_float32_and_answered_in_kind(take: Loss) -> None:
    hidden, labels, head = batch()
    short = hidden.detach().bfloat16().requires_grad_()
    head.weight = head.weight.bfloat16()
    total = take(short, labels, head, vocabulary=VOCABULARY)
    assert total.dtype == torch.float32
    (gradient,) = torch.autograd.grad(total, short)
    assert gradient.dtype == torch.bfloat16
