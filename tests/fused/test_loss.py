"""Cross-entropy in chunks: the loss and gradients of F.cross_entropy, and never all logits at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.data.packing import IGNORE_INDEX
from octavo.fused import loss
from octavo.fused.loss import cross_entropy_each, cross_entropy_sum
from octavo.layers.dropout import Dropout
from octavo.layers.fused_linear import FusedLinear
from octavo.ops.linear import LoraSlice
from octavo.ops.linear_spec import LinearSpec
from octavo.ops.loss import cross_entropy_

TOKENS, WIDTH, VOCABULARY = 23, 6, 10  # M, d, V
CHUNK_ROWS = 4
WITHOUT_GRADIENT = [(None, False), (3.0, False), (None, True), (3.0, True)]
KINDS = ["frozen", "trained"]
both = pytest.mark.parametrize("kind", KINDS)

SavedBy = Callable[[Callable[[], Tensor]], tuple[Tensor, int]]


@dataclass
class Head:
    """A head with a bias and, if it is trained, LoRA; it counts how often its matrix is written."""

    weight: Tensor
    bias: Tensor
    factors: list[Tensor] = field(default_factory=list)
    written: int = 0

    def fill_rows(self, first: int, out: Tensor) -> None:
        self.written += 1
        out.copy_(self.weight[first : first + len(out)])

    def fill(self, out: Tensor) -> None:
        self.written += 1
        out.copy_(self.weight)

    @property
    def linear(self) -> FusedLinear:
        lora = (LoraSlice(0, VOCABULARY, self.factors[0], self.factors[1], 0.5),) if self.factors else ()
        spec = LinearSpec(VOCABULARY, WIDTH, self.fill, self.bias, 0, lora, fill_rows=self.fill_rows)
        return FusedLinear((spec,))

    @property
    def trained(self) -> list[Tensor]:
        return [tensor for tensor in (*self.factors, self.bias) if tensor.requires_grad]

    def plain(self, hidden: Tensor) -> Tensor:
        logits = F.linear(hidden, self.weight, self.bias)
        return logits + 0.5 * hidden @ self.factors[0].T @ self.factors[1].T if self.factors else logits


def batch(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Head]:
    """hidden (M, d), labels (M,) of which every third is ignored, a head."""
    torch.manual_seed(0)
    labels = torch.randint(VOCABULARY, (TOKENS,))
    labels[::3] = IGNORE_INDEX
    trained = kind == "trained"
    weight, bias = torch.randn(VOCABULARY, WIDTH, dtype=dtype), torch.randn(VOCABULARY, dtype=dtype)
    factors = [torch.randn(2, WIDTH, dtype=dtype), torch.randn(VOCABULARY, 2, dtype=dtype)] if trained else []
    for tensor in (bias, *factors) if trained else ():
        tensor.requires_grad_()
    return torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True), labels, Head(weight, bias, factors)


def plain_loss(hidden: Tensor, labels: Tensor, head: Head) -> Tensor:
    return F.cross_entropy(head.plain(hidden), labels, reduction="sum", ignore_index=IGNORE_INDEX)


@pytest.fixture(autouse=True)
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes chunks small; returns the number of rows of each."""
    chunk_rows: list[int] = []
    monkeypatch.setattr(loss, "CHUNK_BYTES", (4 + 8) * (CHUNK_ROWS * VOCABULARY + VOCABULARY - 1))

    def recorded(logits: Tensor, labels: Tensor, *, gradient: bool, softcap: float | None) -> Tensor:
        chunk_rows.append(len(logits))
        assert logits.shape == (len(labels), VOCABULARY)
        return cross_entropy_(logits, labels, gradient=gradient, softcap=softcap)

    monkeypatch.setattr(loss, "cross_entropy_", recorded)
    return chunk_rows


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sum_and_gradients_are_those_of_cross_entropy(kind: str, dtype: torch.dtype) -> None:
    hidden, labels, head = batch(kind, dtype)
    ours, theirs = cross_entropy_sum(hidden, labels, head.linear, Dropout()), plain_loss(hidden, labels, head)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs.float())
    leaves = [hidden, *head.trained]
    assert len(leaves) == (4 if kind == "trained" else 1)
    mine, other = torch.autograd.grad(0.5 * ours, leaves), torch.autograd.grad(0.5 * theirs, leaves)
    for one, two in zip(mine, other, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=2e-6)  # the loss is computed in float32


@both
def test_weights_scale_the_loss_and_the_gradient_of_each_label(kind: str) -> None:
    hidden, labels, head = batch(kind)
    weights = torch.rand(TOKENS) * 2
    weights[5] = 0
    ours = cross_entropy_sum(hidden, labels, head.linear, Dropout(), weights)
    losses = F.cross_entropy(head.plain(hidden), labels, reduction="none", ignore_index=IGNORE_INDEX)
    theirs = (losses * weights).sum()
    torch.testing.assert_close(ours, theirs)
    leaves = [hidden, *head.trained]
    for one, two in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=2e-6)
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy_sum(hidden, labels, head.linear, Dropout(), weights), theirs.detach())


@both
def test_a_soft_cap_bounds_the_logits_of_loss_and_gradient(kind: str, chunks: list[int]) -> None:
    hidden, labels, head = batch(kind)
    ours = cross_entropy_sum(hidden, labels, head.linear, Dropout(), softcap=3.0)
    assert sum(chunks) == TOKENS
    assert max(chunks) < CHUNK_ROWS  # a chunk has fewer rows: the reference has more copies of its logits
    logits = head.plain(hidden)
    assert logits.abs().max() > 6  # the soft-cap has an effect
    theirs = F.cross_entropy(3 * torch.tanh(logits / 3), labels, reduction="sum", ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(ours, theirs)
    leaves = [hidden, *head.trained]
    for one, two in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=2e-6)
    with torch.no_grad():
        torch.testing.assert_close(
            cross_entropy_sum(hidden, labels, head.linear, Dropout(), softcap=3.0), theirs.detach()
        )


def test_a_trained_head_gets_gradients_if_hidden_needs_none() -> None:
    hidden, labels, head = batch("trained")
    ours = torch.autograd.grad(cross_entropy_sum(hidden.detach(), labels, head.linear, Dropout()), head.trained)
    theirs = torch.autograd.grad(plain_loss(hidden.detach(), labels, head), head.trained)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two)


def test_a_frozen_bias_takes_no_gradient() -> None:
    hidden, labels, head = batch("frozen")
    torch.autograd.backward(cross_entropy_sum(hidden, labels, head.linear, Dropout()))
    assert head.bias.grad is None
    assert not cross_entropy_sum(hidden.detach(), labels, head.linear, Dropout()).requires_grad


@both
def test_hidden_states_at_ignored_positions_do_not_matter(kind: str) -> None:
    hidden, labels, head = batch(kind)
    expected = cross_entropy_sum(hidden, labels, head.linear, Dropout())
    spoiled = hidden.detach().clone()
    spoiled[labels == IGNORE_INDEX] = 1e4
    spoiled.requires_grad_()
    total = cross_entropy_sum(spoiled, labels, head.linear, Dropout())
    assert torch.equal(total, expected)
    mine = torch.autograd.grad(total, [spoiled, *head.trained])
    theirs = torch.autograd.grad(expected, [hidden, *head.trained])
    assert not mine[0][labels == IGNORE_INDEX].any()
    assert mine[0][labels != IGNORE_INDEX].any(dim=1).all()
    for one, two in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, two)


@both
def test_all_ignored_costs_nothing_and_has_zero_gradients(kind: str) -> None:
    hidden, labels, head = batch(kind)
    total = cross_entropy_sum(hidden, torch.full_like(labels, IGNORE_INDEX), head.linear, Dropout())
    assert total.item() == 0
    for gradient in torch.autograd.grad(total, [hidden, *head.trained]):
        assert not gradient.any()


@both
def test_no_rows_give_a_loss_of_zero(kind: str) -> None:
    hidden, labels, head = batch(kind)
    total = cross_entropy_sum(hidden[:0], labels[:0], head.linear, Dropout())
    assert total.item() == 0
    (gradient,) = torch.autograd.grad(total, hidden)
    assert not gradient.any()


@both
def test_the_logits_of_no_more_than_a_chunk_exist(kind: str, chunks: list[int]) -> None:
    hidden, labels, head = batch(kind)
    cross_entropy_sum(hidden, labels, head.linear, Dropout())
    assert chunks == [4, 4, 4, 4, 4, 3]


@both
def test_a_chunk_is_at_least_one_row(kind: str, chunks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_BYTES", VOCABULARY)
    hidden, labels, head = batch(kind)
    cross_entropy_sum(hidden, labels, head.linear, Dropout())
    assert chunks == [1] * TOKENS


@both
def test_the_matrix_is_written_once_and_no_chunk_is_computed_again(kind: str, chunks: list[int]) -> None:
    hidden, labels, head = batch(kind)
    total = cross_entropy_sum(hidden, labels, head.linear, Dropout())
    torch.autograd.backward(total)
    assert head.written == 1
    assert sum(chunks) == TOKENS


@both
def test_only_gradients_are_saved_for_backward(kind: str, saved_by: SavedBy) -> None:
    hidden, labels, head = batch(kind)
    _, saved_bytes = saved_by(lambda: cross_entropy_sum(hidden, labels, head.linear, Dropout()))
    gradients = sum(tensor.nbytes for tensor in (hidden, *head.trained))
    # Gradients of a bias and of B are columns of one matmul: its other columns and padding are allocated with them.
    assert gradients <= saved_bytes <= gradients + 4 * 8 * VOCABULARY
    assert saved_bytes < TOKENS * VOCABULARY * 4


@both
def test_without_grad_mode_the_loss_is_the_same_and_nothing_is_saved(kind: str, saved_by: SavedBy) -> None:
    hidden, labels, head = batch(kind)
    with torch.no_grad():
        total, saved_bytes = saved_by(lambda: cross_entropy_sum(hidden, labels, head.linear, Dropout()))
    assert not total.requires_grad
    assert saved_bytes == 0
    torch.testing.assert_close(total, cross_entropy_sum(hidden, labels, head.linear, Dropout()).detach())


@both
def test_without_grad_mode_no_gradient_is_computed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, labels, head = batch(kind)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("computed gradients")

    monkeypatch.setattr(FusedLinear, "backward", refuse)
    with torch.no_grad():
        cross_entropy_sum(hidden, labels, head.linear, Dropout())
    with pytest.raises(AssertionError, match="computed gradients"):
        cross_entropy_sum(hidden, labels, head.linear, Dropout())


@both
def test_bfloat16_is_summed_in_float32_and_gets_bfloat16_gradients(kind: str) -> None:
    hidden, labels, head = batch(kind)
    short = hidden.detach().bfloat16().requires_grad_()
    total = cross_entropy_sum(short, labels, head.linear, Dropout())
    expected = plain_loss(hidden, labels, head)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, expected, rtol=0.02, atol=0)
    mine = torch.autograd.grad(total, [short, *head.trained])
    theirs = torch.autograd.grad(expected, [hidden, *head.trained])
    assert [one.dtype for one in mine] == [torch.bfloat16, *[torch.float32] * len(head.trained)]
    for one, two in zip(mine, theirs, strict=True):
        assert (one.float() - two).norm() < 0.02 * two.norm()


def test_dropout_of_the_heads_lora_draws_another_mask_for_every_chunk() -> None:
    hidden, labels, head = batch("trained")
    (part,) = head.linear.parts
    dropping = FusedLinear((part._replace(dropout=0.5),))
    same = hidden.detach()[:1].expand(8, -1).contiguous().requires_grad_()  # two chunks of the same rows
    torch.manual_seed(0)
    total = cross_entropy_sum(same, labels[1:2].expand(8).contiguous(), dropping, Dropout())
    (gradient,) = torch.autograd.grad(total, same)
    assert len(gradient.unique(dim=0)) > CHUNK_ROWS


@pytest.mark.parametrize("softcap", [None, 1.5])
@both
def test_tiles_of_the_head_give_the_same_loss_and_gradients(
    kind: str, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for tile_rows in (None, 1, 4, VOCABULARY + 5):
        hidden, labels, head = batch(kind)
        monkeypatch.setattr(loss, "TILE_ROWS", tile_rows)
        total = cross_entropy_sum(hidden, labels, head.linear, Dropout(), softcap=softcap, tiled=tile_rows is not None)
        torch.autograd.backward(total)
        if tile_rows is not None:
            chunks = -(-TOKENS // loss._chunk(hidden, head.linear, softcap))
            assert head.written == 2 * chunks * -(-VOCABULARY // tile_rows)
        results.append([total.detach(), *(tensor.grad for tensor in (hidden, *head.trained))])
    for found in results[1:]:
        for one, other in zip(found, results[0], strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("softcap", "tiled"), WITHOUT_GRADIENT)
@both
def test_the_loss_of_each_position(
    kind: str, softcap: float | None, tiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "CHUNK_BYTES", 4 * 3 * VOCABULARY * CHUNK_ROWS)
    hidden, labels, head = batch(kind)
    each = cross_entropy_each(hidden, labels, head.linear, Dropout(), softcap=softcap, tiled=tiled)
    logits = head.plain(hidden)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")
    torch.testing.assert_close(each, expected.detach())
    assert not each.requires_grad
    total = cross_entropy_sum(hidden, labels, head.linear, Dropout(), softcap=softcap, tiled=tiled)
    torch.testing.assert_close(each.sum(), total.detach())
