"""Each mixer against its reference: its output, in backward too, and the gradient that it writes over u."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.fused.plain import plain
from torch import Tensor

from octavo.fused.attention import Attention
from octavo.fused.mixers import Geglu, Gelu, Mixer, Swiglu
from octavo.layers.context import ForwardContext
from octavo.layers.gemm_input import GemmInput
from octavo.layers.norm import NormSpec
from octavo.ops.attention import find_documents
from octavo.ops.rotary import ROTATE_HALF, ROTATE_INTERLEAVED, rotary_table

BATCH, LENGTH = 2, 6
ROWS = BATCH * LENGTH


def norms_of(
    q: int, k: int, *, plus_one: bool = False, trained: bool = True, centred: bool = False
) -> tuple[NormSpec, NormSpec]:
    """Norms of groups of q and of k columns."""
    weights = [torch.linspace(0.5, 2, width, dtype=torch.float64, requires_grad=trained) for width in (q, k)]
    biases = [weight.detach() - 1 if centred else None for weight in weights]
    return NormSpec(weights[0], biases[0], 1e-2, plus_one), NormSpec(weights[1], biases[1], 1e-2, plus_one)


MIXERS: dict[str, Any] = {
    "attention, interleaved, part of a head": (Attention(4, 4, 6, ROTATE_INTERLEAVED), 2),
    "attention, halves, shared heads": (Attention(4, 2, 6, ROTATE_HALF), 3),
    "attention, halves, one key head": (Attention(3, 1, 4, ROTATE_HALF), 2),
    "attention, norms of heads": (Attention(4, 2, 6, ROTATE_HALF, norms_of(6, 6)), 3),
    "attention, norms of heads with 1 + w": (Attention(3, 1, 4, ROTATE_HALF, norms_of(4, 4, plus_one=True)), 2),
    "attention, frozen norms of heads": (Attention(4, 2, 6, ROTATE_HALF, norms_of(6, 6, trained=False)), 3),
    "attention, frozen norms of all heads": (
        Attention(4, 2, 6, ROTATE_INTERLEAVED, norms_of(24, 12, plus_one=True, trained=False)), 3,
    ),
    "attention, frozen norms of heads, part of a head": (
        Attention(4, 2, 6, ROTATE_HALF, norms_of(6, 6, trained=False)), 2,
    ),
    "attention, norms of heads, part of a head": (Attention(4, 2, 6, ROTATE_HALF, norms_of(6, 6)), 2),
    "attention, frozen LayerNorms of heads": (
        Attention(4, 2, 6, ROTATE_HALF, norms_of(6, 6, trained=False, centred=True)), 3,
    ),
    "attention, no rotary positions": (Attention(4, 2, 6, ROTATE_HALF), 0),
    "attention, norms of heads, no rotary positions": (Attention(4, 2, 6, ROTATE_HALF, norms_of(6, 6)), 0),
    "attention, norms of all heads": (Attention(4, 2, 6, ROTATE_INTERLEAVED, norms_of(24, 12)), 3),
    "gelu": (Gelu(5), 1),
    "gelu with erf": (Gelu(5, "none"), 1),
    "swiglu": (Swiglu(5), 1),
    "geglu": (Geglu(5), 1),
}  # fmt: skip  # -> (the mixer, rotary pairs of a head)
every_mixer = pytest.mark.parametrize("name", MIXERS)
both = pytest.mark.parametrize("packed", [False, True], ids=["a document a row", "packed"])


def context_of(rotary_pairs: int, *, packed: bool) -> ForwardContext:
    positions, documents = torch.arange(LENGTH)[None], None
    if packed:
        document = torch.tensor([[0, 0, 1, 1, 1, 2], [3, 3, 3, 3, 4, -1]])
        positions = torch.tensor([[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 0, 0]])
        documents = find_documents(document, document.device)
        assert documents is not None
    table = rotary_table(positions, torch.rand(rotary_pairs)) if rotary_pairs else None
    return ForwardContext(BATCH, LENGTH, table, documents)


def case(name: str, *, packed: bool) -> tuple[Mixer, ForwardContext, Tensor, Tensor]:
    """(mixer, context, u as columns of a wider matrix, u under autograd)."""
    torch.manual_seed(0)
    mixer, rotary_pairs = MIXERS[name]
    context = context_of(rotary_pairs, packed=packed)
    plain = torch.randn(ROWS, mixer.inputs, dtype=torch.float64, requires_grad=True)
    u = torch.full((ROWS, mixer.inputs + 5), 9.0, dtype=torch.float64)[:, 2 : mixer.inputs + 2]
    u.copy_(plain.detach())
    return mixer, context, u, plain


def gemm_input_for(mixer: Mixer, *, joined: bool = False) -> GemmInput:
    """The input of a GEMM of three parts: the mixer's, one before it that is filled already, and one after it."""
    gemm_input = GemmInput([2, mixer.outputs, 3], 1, ROWS, torch.empty(0, dtype=torch.float64), joined=joined)
    gemm_input.add().fill_(9)
    return gemm_input


def plain_of(mixer: Mixer, u: Tensor, context: ForwardContext) -> Tensor:
    return plain(mixer, u.unflatten(0, (BATCH, LENGTH)), context).flatten(0, 1)


def surroundings_are_unchanged(columns: Tensor) -> bool:
    whole = columns._base
    assert whole is not None
    return bool((whole[:, :2] == 9).all() and (whole[:, -3:] == 9).all())


@every_mixer
@both
@pytest.mark.parametrize("save", [False, True], ids=["nothing saved", "saved"])
@pytest.mark.parametrize("joined", [False, True], ids=["by itself", "within a wider matrix"])
@torch.no_grad()
def test_forward_equals_the_reference(name: str, packed: bool, save: bool, joined: bool) -> None:
    mixer, context, u, plain = case(name, packed=packed)
    gemm_input = gemm_input_for(mixer, joined=joined)
    saved = mixer.forward(u, gemm_input, context, save=save)
    gemm_input.add().fill_(9)
    torch.testing.assert_close(gemm_input.parts[1], plain_of(mixer, plain, context))
    assert all(bool((other == 9).all()) for other in gemm_input.parts[::2])
    assert surroundings_are_unchanged(u)
    assert saved is None or save


@every_mixer
@both
@pytest.mark.parametrize("how", ["saved by forward", "u recomputed", "all recomputed"])
@torch.no_grad()
def test_backward_writes_the_gradient_over_u_and_returns_the_output(name: str, packed: bool, how: str) -> None:
    mixer, context, u, plain = case(name, packed=packed)
    with torch.enable_grad():
        y = plain_of(mixer, plain, context)
        dout = torch.full((ROWS, mixer.outputs + 5), 9.0, dtype=torch.float64)[:, 2 : mixer.outputs + 2]
        dout.copy_(torch.randn(ROWS, mixer.outputs, dtype=torch.float64))
        trained = [tensor for tensor in mixer.trained if tensor.requires_grad]
        expected, *expected_trained = torch.autograd.grad(y, [plain, *trained], dout)
    saved = mixer.forward(u, gemm_input_for(mixer), context, save=how != "all recomputed")
    if how != "saved by forward":
        u = u._base.clone()[:, 2 : mixer.inputs + 2]  # type: ignore[union-attr]
        u.copy_(plain)
        mixer.prepare_(u, context)
    if how == "all recomputed":
        saved = mixer.save(u, context)
    output = mixer.backward_(u, dout, saved, context)
    assert isinstance(output, Tensor)
    torch.testing.assert_close(u, expected, rtol=1e-6, atol=1e-6)  # the rotary table is float32
    torch.testing.assert_close(output, y.detach(), rtol=1e-6, atol=1e-6)
    gradients = saved.grad_trained if saved is not None else []
    assert [gradient is not None for gradient in gradients] == [tensor.requires_grad for tensor in mixer.trained]
    for found, wanted in zip([each for each in gradients if each is not None], expected_trained, strict=True):
        torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-5)
    assert surroundings_are_unchanged(u)
    assert surroundings_are_unchanged(dout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_whether_norms_are_trained_changes_no_bit(dtype: torch.dtype) -> None:
    """The gradients of trained norms need a pass of their own, between the rotation and the norm."""
    torch.manual_seed(0)
    context, u, dout = context_of(3, packed=False), torch.randn(ROWS, 48).to(dtype), torch.randn(ROWS, 24).to(dtype)
    found = []
    for trained in (False, True):
        mixer, own = Attention(4, 2, 6, ROTATE_HALF, norms_of(6, 6, trained=trained)), u.clone()
        output = mixer.backward_(own, dout, mixer.save(own, context), context)
        assert isinstance(output, Tensor)
        found.append((own, output))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
