"""Every piece by itself: its output, once more in backward too, and the gradient that it writes over u are those of its
definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.fused.plain import plain
from torch import Tensor

from octavo.fused.mixers import Attention, Gelu, Mixer, Swiglu
from octavo.layers.context import ForwardContext
from octavo.layers.gemm_input import GemmInput
from octavo.ops.attention import HALF, INTERLEAVED, find_documents, rotary_table

BATCH, LENGTH = 2, 6
ROWS = BATCH * LENGTH
PIECES: dict[str, Any] = {
    "attention, interleaved, part of a head": (Attention(4, 4, 6, INTERLEAVED), 2),
    "attention, halves, shared heads": (Attention(4, 2, 6, HALF), 3),
    "attention, halves, one key head": (Attention(3, 1, 4, HALF), 2),
    "gelu": (Gelu(5), 1),
    "swiglu": (Swiglu(5), 1),
}  # -> (the piece, pairs that are rotated)
every_piece = pytest.mark.parametrize("name", PIECES)
both = pytest.mark.parametrize("packed", [False, True], ids=["a document a row", "packed"])


def context_of(pairs: int, *, packed: bool) -> ForwardContext:
    positions, documents = torch.arange(LENGTH)[None], None
    if packed:
        document = torch.tensor([[0, 0, 1, 1, 1, 2], [3, 3, 3, 3, 4, -1]])
        positions = torch.tensor([[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 0, 0]])
        documents = find_documents(document, document.device)
        assert documents is not None
    return ForwardContext(BATCH, LENGTH, rotary_table(positions, torch.rand(pairs)), documents)


def case(name: str, *, packed: bool) -> tuple[Mixer, ForwardContext, Tensor, Tensor]:
    """(piece, context, u as columns of a wider matrix, u under autograd)."""
    torch.manual_seed(0)
    piece, pairs = PIECES[name]
    context = context_of(pairs, packed=packed)
    plain = torch.randn(ROWS, piece.inputs, dtype=torch.float64, requires_grad=True)
    u = torch.full((ROWS, piece.inputs + 5), 9.0, dtype=torch.float64)[:, 2 : piece.inputs + 2]
    u.copy_(plain.detach())
    return piece, context, u, plain


def room_of(piece: Mixer, *, joined: bool = False) -> GemmInput:
    """With a part before the piece's, which is there, and one behind it."""
    gemm_input = GemmInput([2, piece.outputs, 3], 1, ROWS, torch.empty(0, dtype=torch.float64), joined=joined)
    gemm_input.add().fill_(9)
    return gemm_input


def plain_of(piece: Mixer, u: Tensor, context: ForwardContext) -> Tensor:
    return plain(piece, u.unflatten(0, (BATCH, LENGTH)), context).flatten(0, 1)


def surroundings_are_unchanged(columns: Tensor) -> bool:
    whole = columns._base
    assert whole is not None
    return bool((whole[:, :2] == 9).all() and (whole[:, -3:] == 9).all())


@every_piece
@both
@pytest.mark.parametrize("hold", [False, True], ids=["not held", "held"])
@pytest.mark.parametrize("joined", [False, True], ids=["by itself", "within a wider matrix"])
@torch.no_grad()
def test_forward_is_the_definition(name: str, packed: bool, hold: bool, joined: bool) -> None:
    piece, context, u, plain = case(name, packed=packed)
    gemm_input = room_of(piece, joined=joined)
    held = piece.forward(u, gemm_input, context, save=hold)
    gemm_input.add().fill_(9)
    torch.testing.assert_close(gemm_input.parts[1], plain_of(piece, plain, context))
    assert all(bool((other == 9).all()) for other in gemm_input.parts[::2])
    assert surroundings_are_unchanged(u)
    assert held is None or hold


@every_piece
@both
@pytest.mark.parametrize("how", ["held from forward", "u made again", "all made again"])
@torch.no_grad()
def test_backward_writes_the_gradient_over_u_and_gives_the_output_once_more(name: str, packed: bool, how: str) -> None:
    piece, context, u, plain = case(name, packed=packed)
    with torch.enable_grad():
        y = plain_of(piece, plain, context)
        dout = torch.full((ROWS, piece.outputs + 5), 9.0, dtype=torch.float64)[:, 2 : piece.outputs + 2]
        dout.copy_(torch.randn(ROWS, piece.outputs, dtype=torch.float64))
        (expected,) = torch.autograd.grad(y, plain, dout)
    held = piece.forward(u, room_of(piece), context, save=how != "all made again")
    if how != "held from forward":
        u = u._base.clone()[:, 2 : piece.inputs + 2]  # type: ignore[union-attr]
        u.copy_(plain)
        piece.prepare_(u, context)
    if how == "all made again":
        held = piece.save(u, context)
    found = piece.backward_(u, dout, held, context)
    assert isinstance(found, Tensor)
    torch.testing.assert_close(u, expected, rtol=1e-6, atol=1e-6)  # the rotary table is float32
    torch.testing.assert_close(found, y.detach(), rtol=1e-6, atol=1e-6)
    assert surroundings_are_unchanged(u)
    assert surroundings_are_unchanged(dout)
