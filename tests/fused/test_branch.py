"""A branch with a hand-written backward: what it saves, what it recomputes, and that both passes use one dropout mask.

tests/fused/test_residual_branch.py compares its output and gradients with the reference.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.fused.attention import Attention
from octavo.fused.branch import Branch, branch
from octavo.fused.mixers import Geglu, Gelu, Mixer, Swiglu
from octavo.layers.context import ForwardContext, Save
from octavo.layers.fused_linear import FusedLinear
from octavo.layers.norm import NormSpec
from octavo.ops.attention import find_documents
from octavo.ops.linear import LoraSlice
from octavo.ops.linear_spec import LinearSpec
from octavo.ops.rotary import ROTATE_HALF, ROTATE_INTERLEAVED, rotary_table
from octavo.runtime.offload import ActivationOffload

BATCH, LENGTH, WIDTH, MLP_WIDTH = 2, 4, 6, 10  # B, T, d, F
ROWS, HEADS, HEAD_SIZE = BATCH * LENGTH, 3, 4  # heads are wider than d on the whole, so that no size is another's
MIXERS: dict[str, tuple[Mixer, ...]] = {
    "GPT-J's": (Attention(HEADS, HEADS, HEAD_SIZE, ROTATE_INTERLEAVED), Gelu(MLP_WIDTH)),
    "attention": (Attention(HEADS, 1, HEAD_SIZE, ROTATE_HALF),),
    "gated MLP": (Swiglu(MLP_WIDTH),),
    "gated MLP, GELU": (Geglu(MLP_WIDTH),),
}
MIXERS |= {f"{kind}, by name": MIXERS[kind] for kind in ("GPT-J's", "gated MLP")}  # see Case


class Form(NamedTuple):
    """A branch that differs from y = x + W_out mix(W_in norm(x))."""

    norm: bool = True
    post_norm: bool = False
    plus_one: bool = False  # the weights of its norms are 1 + w
    scale: float = 1.0
    residual: bool = False  # another one than x
    head_norms: bool = False  # of q and k


FORMS = {
    "attention, post-norm": Form(norm=False, post_norm=True),
    "attention, scaled": Form(scale=0.3),
    "attention, norms of heads": Form(head_norms=True),
    "gated MLP, GELU, both norms": Form(post_norm=True, plus_one=True, scale=0.6),
    "gated MLP, by name, other residual": Form(residual=True),
}
MIXERS |= {kind: MIXERS["attention" if kind.startswith("attention") else "gated MLP"] for kind in FORMS}
MIXERS["gated MLP, GELU, both norms"] = (Geglu(MLP_WIDTH),)
every_kind = pytest.mark.parametrize("kind", MIXERS)
every_save = pytest.mark.parametrize("save", list(Save))
RANK = 2

SavedBy = Callable[[Callable[[], Tensor]], tuple[Tensor, int]]


class Case:
    """A branch with everything trained on it. `leaves` are x, then all that is trained, in its order.

    "by name": LoRA for every name instead of one for the first matmul, and its bias is not trained, as is usual:
    then the backward of an activation also computes LoRA gradients.
    """

    def __init__(self, kind: str, *, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int, scale: float = 0.5) -> Tensor:
            return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

        self.mixers, self.dropout, self.form = MIXERS[kind], dropout, FORMS.get(kind, Form())
        self.inner_rows = sum(mixer.inputs for mixer in self.mixers)
        self.by_name, bias = "by name" in kind, "gated MLP" not in kind
        self.weights = [random(self.inner_rows, WIDTH)] + [random(WIDTH, mixer.outputs) for mixer in self.mixers]
        norm = ([random(WIDTH) + 1] + ([random(WIDTH)] if bias else [])) if self.form.norm else []
        self.groups = [self.inner_rows]
        if self.by_name:
            self.groups = [
                n
                for mixer in self.mixers
                for n in [mixer.inputs // (mixer.lora_chunks or 1)] * (mixer.lora_chunks or 1)
            ]
        inner = [factor for n in self.groups for factor in (random(RANK, WIDTH), random(n, RANK))]
        self.bias = random(self.inner_rows) if bias else None
        if self.bias is not None and not self.by_name:
            inner.append(self.bias)
        outer = [factor for mixer in self.mixers for factor in (random(RANK, mixer.outputs), random(WIDTH, RANK))]
        post = [random(WIDTH) + 1] if self.form.post_norm else []
        heads = [random(HEAD_SIZE) + 1, random(HEAD_SIZE) + 1] if self.form.head_norms else []
        residual = [random(BATCH, LENGTH, WIDTH)] if self.form.residual else []
        self.sizes = [len(norm), len(inner), len(outer), len(heads), len(post), len(residual)]
        self.leaves = [random(BATCH, LENGTH, WIDTH, scale=1.0), *norm, *inner, *outer, *heads, *post, *residual]
        for leaf in self.leaves:
            leaf.requires_grad_()
        self.dy = random(BATCH, LENGTH, WIDTH)

    def branch(self, *trained: Tensor) -> Branch:
        norm, inner, outer, heads, post, _ = _split(list(trained), self.sizes)
        stops = list(accumulate(self.groups))
        low = tuple(
            LoraSlice(stop - span, stop, a, b, 2.5 if self.by_name else 0.5)
            for span, stop, a, b in zip(self.groups, stops, inner[::2], inner[1::2], strict=False)
        )
        bias = self.bias if self.by_name or self.bias is None else inner[-1]
        first = LinearSpec(self.inner_rows, WIDTH, _filling(self.weights[0]), bias, 0, low, self.dropout)
        parts = [
            LinearSpec(WIDTH, mixer.outputs, _filling(weight), None, 0, (LoraSlice(0, WIDTH, a, b, 2.0),), self.dropout)
            for mixer, weight, a, b in zip(self.mixers, self.weights[1:], outer[::2], outer[1::2], strict=True)
        ]
        norms = [self.norm_of(parameters) for parameters in (norm, post)]
        mixers = self.mixers
        if heads:
            assert isinstance(mixers[0], Attention)
            mixers = (replace(mixers[0], norms=(NormSpec(heads[0], None, 1e-2), NormSpec(heads[1], None, 1e-2))),)
        linears = FusedLinear((first,)), mixers, FusedLinear(tuple(parts))
        return Branch(norms[0], *linears, norms[1], self.form.scale)

    def norm_of(self, parameters: list[Tensor]) -> NormSpec | None:
        if not parameters:
            return None
        return NormSpec(parameters[0], parameters[1] if len(parameters) > 1 else None, 1e-2, self.form.plus_one)

    def run(
        self,
        x: Tensor,
        *trained: Tensor,
        save: Save,
        packed: bool = False,
        seed: int = 3,
        offload: ActivationOffload | None = None,
    ) -> Tensor:
        torch.manual_seed(seed)
        residual = trained[-1] if self.form.residual else None
        return branch(x, self.branch(*trained), context_of(packed=packed, offload=offload).at(0, save), residual)

    def gradients(
        self, *, save: Save, packed: bool = False, seed: int = 3, offload: ActivationOffload | None = None
    ) -> tuple[Tensor, ...]:
        y = self.run(*self.leaves, save=save, packed=packed, seed=seed, offload=offload)
        return torch.autograd.grad(y, self.leaves, self.dy)


def _split(flat: list[Tensor], sizes: list[int]) -> list[list[Tensor]]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [flat[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def _filling(weight: Tensor) -> Any:
    return lambda out: out.copy_(weight)


def context_of(*, packed: bool, offload: ActivationOffload | None = None) -> ForwardContext:
    document = torch.tensor([[0, 0, 1, 1], [2, 3, 3, -1]]) if packed else None
    positions = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 0]]) if packed else torch.arange(LENGTH)[None]
    table = rotary_table(positions, torch.tensor([0.7, 0.3]))
    return ForwardContext(BATCH, LENGTH, table, find_documents(document, positions.device), offload=offload)


@every_kind
@pytest.mark.parametrize("packed", [False, True], ids=["a document a row", "packed"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_finite_differences_under_one_seed(kind: str, packed: bool, dropout: float) -> None:
    # With dropout this holds only if forward and backward use the same mask.
    case = Case(kind, dropout=dropout, dtype=torch.float64)

    def run(*leaves: Tensor) -> Tensor:
        return case.run(*leaves, save=Save.ALL, packed=packed)

    assert torch.autograd.gradcheck(run, case.leaves, eps=1e-4, atol=1e-5, rtol=1e-4, fast_mode=True)


@every_kind
@pytest.mark.parametrize("packed", [False, True], ids=["a document a row", "packed"])
@pytest.mark.parametrize("save", [Save.INPUT, Save.ATTENTION])
def test_the_save_level_changes_no_bit_with_dropout(kind: str, packed: bool, save: Save) -> None:
    case = Case(kind, dropout=0.4)
    everything = case.gradients(save=Save.ALL, packed=packed)
    for one, other in zip(everything, case.gradients(save=save, packed=packed), strict=True):
        assert torch.equal(one, other)
        assert one.any()


@every_kind
@every_save
def test_an_offloaded_input_changes_no_bit(kind: str, save: Save) -> None:
    case = Case(kind, dropout=0.4)
    for one, other in zip(
        case.gradients(save=save), case.gradients(save=save, offload=ActivationOffload()), strict=True
    ):
        assert torch.equal(one, other)


def test_no_input_is_offloaded_without_a_backward() -> None:
    case, offload = Case("GPT-J's"), ActivationOffload()
    y = case.run(*(leaf.detach() for leaf in case.leaves), save=Save.ALL, offload=offload)
    assert not y.requires_grad
    with pytest.raises(IndexError):
        offload.take()
    with torch.no_grad():
        case.run(*case.leaves, save=Save.ALL, offload=offload)
    with pytest.raises(IndexError):
        offload.take()


@every_kind
def test_another_seed_gives_another_dropout_mask(kind: str) -> None:
    case = Case(kind, dropout=0.4)
    first, again, other = (case.run(*case.leaves, save=Save.INPUT, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@every_kind
@every_save
def test_backward_draws_nothing_from_the_global_generator(kind: str, save: Save) -> None:
    case = Case(kind, dropout=0.4)
    y = case.run(*case.leaves, save=save)
    state = torch.get_rng_state()
    torch.autograd.backward(y, case.dy)
    assert torch.equal(torch.get_rng_state(), state)


@every_kind
@pytest.mark.parametrize("packed", [False, True], ids=["a document a row", "packed"])
def test_the_saved_bytes_are_those_of_the_save_level(kind: str, packed: bool, saved_by: SavedBy) -> None:
    case = Case(kind, dropout=0.4)
    context = context_of(packed=packed)
    if context.documents is not None:
        assert context.documents.mask.any()  # computed once for all blocks
    saved = {
        save: saved_by(
            lambda save=save: branch(  # type: ignore[misc]
                case.leaves[0],
                case.branch(*case.leaves[1:]),
                context.at(0, save),
                case.leaves[-1] if case.form.residual else None,
            )
        )[1]
        for save in Save
    }
    built = case.branch(*case.leaves[1:])
    lora_bytes = ROWS * sum(linear.width - linear.inputs for linear in (built.inner, built.outer)) * 4
    assert saved[Save.INPUT] == lora_bytes  # not counting x, which existed before
    attention = ROWS * HEADS * (HEAD_SIZE + 1) * 4 if "gated MLP" not in kind else 0  # its output and log-sums
    if kind.startswith("attention"):
        attention += 2 * ROWS * HEADS * HEAD_SIZE * 4  # a CPU repeats shared heads and saves the copies
    if packed and "gated MLP" not in kind:
        attention += BATCH * LENGTH * LENGTH * 4  # and the mask is float32
    if case.form.post_norm:
        attention += ROWS * WIDTH * 4  # and its input
    assert saved[Save.ATTENTION] == lora_bytes + attention
    assert saved[Save.ALL] == lora_bytes + attention + ROWS * case.inner_rows * 4  # and u


@every_kind
def test_without_grad_mode_nothing_is_saved_and_the_output_is_the_same(kind: str, saved_by: SavedBy) -> None:
    case = Case(kind, dropout=0.4)
    expected = case.run(*case.leaves, save=Save.ALL)
    with torch.no_grad():
        y, saved = saved_by(lambda: case.run(*case.leaves, save=Save.ALL))
    assert saved == 0
    assert not y.requires_grad
    assert torch.equal(y, expected)


@every_kind
@every_save
def test_backward_frees_the_saved_tensors_while_the_output_is_alive(kind: str, save: Save, saved_by: SavedBy) -> None:
    case, outputs = Case(kind), []

    def both_ways() -> Tensor:
        outputs.append(case.run(*case.leaves, save=save))
        (gradient,) = torch.autograd.grad(outputs[0], case.leaves[0], case.dy)
        return gradient

    _, saved = saved_by(both_ways)
    assert saved == outputs[0].nbytes + context_bytes()


def context_bytes() -> int:
    """Bytes of the rotary table, which the output's graph refers to."""
    table = context_of(packed=False).rotary
    assert table is not None
    return sum(part.nbytes for part in table)


class MatmulCounter(TorchDispatchMode):
    """Counts matmuls by (M, K, N)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[tuple[int, int, int]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = [x for x in args if isinstance(x, Tensor)][-2:]
            self.counts[a.shape[0], a.shape[1], b.shape[1]] += 1
        return function(*args, **(kwargs or {}))


@every_kind
@every_save
def test_only_matmuls_whose_output_is_needed_run_again(kind: str, save: Save) -> None:
    case = Case(kind)
    built = case.branch(*case.leaves[1:])
    inner = ROWS, built.inner.width, case.inner_rows
    outer = ROWS, built.outer.width, WIDTH
    with MatmulCounter() as forward:
        y = case.run(*case.leaves, save=save)
    assert (forward.counts[inner], forward.counts[outer]) == (1, 1)
    with MatmulCounter() as backward:
        torch.autograd.backward(y, case.dy)
    # Recomputed for a norm after it only, whose backward reads its output.
    assert backward.counts[outer] == (case.form.post_norm and save is Save.INPUT)
    assert backward.counts[inner] == (0 if save is Save.ALL else 1)
    # And the two matmuls of the gradients of their inputs.
    assert backward.counts[ROWS, WIDTH, built.outer.width] == 1
    assert backward.counts[ROWS, case.inner_rows, built.inner.width] == 1


class AllocationCounter(TorchDispatchMode):
    """Counts new tensors of a shape that no operation has computed."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.empty_like, torch.ops.aten.new_empty):
            self.count += result.shape == self.shape
        return result


@every_save
def test_a_post_norm_overwrites_its_input_unless_backward_reads_it(save: Save) -> None:
    case = Case("attention, post-norm")
    with AllocationCounter((ROWS, WIDTH)) as allocations:
        case.run(*case.leaves, save=save)
    assert allocations.count == (save is not Save.INPUT)


@every_kind
@every_save
def test_no_matmul_computes_the_gradient_of_an_x_that_needs_none(kind: str, save: Save) -> None:
    case = Case(kind)
    everything = case.gradients(save=save)
    x, *leaves = case.leaves
    norm, *others = _split(leaves, case.sizes)
    still = [tensor.detach() for tensor in norm]
    trained = [tensor for group in others for tensor in group]
    y = case.run(x.detach(), *still, *trained, save=save)
    with MatmulCounter() as backward:
        gradients = torch.autograd.grad(y, trained, case.dy)
    for one, other in zip(gradients, everything[1 + len(norm) :], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    built = case.branch(*leaves)
    assert backward.counts[ROWS, case.inner_rows, built.inner.width] == 0
    if not norm:
        return
    # A norm before it may be trained nevertheless.
    y = case.run(x.detach(), *leaves, save=save)
    for one, other in zip(torch.autograd.grad(y, leaves, case.dy), everything[1:], strict=True):
        assert torch.equal(one, other)


@every_kind
def test_the_incoming_gradient_is_not_changed(kind: str) -> None:
    case = Case(kind)
    before = case.dy.clone()
    case.gradients(save=Save.ALL)
    assert torch.equal(case.dy, before)


@every_save
@pytest.mark.parametrize("kind", ["GPT-J's", "gated MLP, GELU, both norms"])
def test_a_retained_graph_gives_the_same_gradients_again(kind: str, save: Save) -> None:
    case = Case(kind, dropout=0.4)
    y = case.run(*case.leaves, save=save)
    first = torch.autograd.grad(y, case.leaves, case.dy, retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(y, case.leaves, case.dy), strict=True):
        assert torch.equal(one, other)
