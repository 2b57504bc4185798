"""LoRA gradients computed in the backward of an activation: those of autograd, and when a branch computes them there.

The Hopper kernel is compared with separate kernels in tests/gpu/test_lora_backward.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.fused import lora_operands, mixers
from octavo.fused.attention import Attention
from octavo.fused.branch import Branch, branch
from octavo.fused.mixers import Geglu, Gelu, Mixer, Swiglu
from octavo.layers.context import ForwardContext
from octavo.layers.fused_linear import FusedLinear
from octavo.layers.norm import NormSpec
from octavo.ops import lora_backward
from octavo.ops.linear import LoraSlice
from octavo.ops.linear_spec import LinearSpec
from octavo.ops.lora_backward import LoraGrads, LoraOperands
from octavo.ops.rotary import ROTATE_INTERLEAVED, rotary_table

M, WIDTH, RANK, NEXT_RANK = 7, 10, 3, 2


def plain(x: Tensor, activation: str) -> Tensor:
    """The activation."""
    if activation == "gelu none":
        return F.gelu(x)
    if activation == "gelu":
        return F.gelu(x, approximate="tanh")
    gate, up = x.chunk(2, dim=1)
    return (F.silu(gate) if activation == "swiglu" else F.gelu(gate, approximate="tanh")) * up


@pytest.mark.parametrize("activation", ["gelu", "gelu none", "swiglu", "geglu"])
@pytest.mark.parametrize("to_t", [True, False])
def test_gradients_are_those_of_autograd(activation: str, to_t: bool) -> None:
    torch.manual_seed(0)
    parts = 1 if activation.startswith("gelu") else 2

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    base, t, b = random(M, parts * WIDTH), random(M, parts * RANK), random(parts * WIDTH, RANK)
    a, down = random(NEXT_RANK, WIDTH), torch.randn(M, WIDTH, dtype=torch.float64)
    after = torch.randn(M, NEXT_RANK, dtype=torch.float64)
    added = [t_part @ b_part.T for t_part, b_part in zip(t.chunk(parts, dim=1), b.chunk(parts), strict=True)]
    x = base + torch.cat(added, dim=1)
    y = plain(x, activation)
    wanted = torch.autograd.grad((y * down).sum(), (x, t, b), retain_graph=True)
    (wanted_a,) = torch.autograd.grad((y @ a.T * after).sum(), a)
    dx, dy = x.detach().clone(), down.clone()
    operands = LoraOperands(t.detach(), b.detach() if to_t else None, after)
    name, _, approximate = activation.partition(" ")
    named = {"approximate": approximate} if approximate else {}
    grads: LoraGrads = getattr(lora_backward, f"{name}_lora_backward_")(dx, dy, operands, **named)
    near: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6}  # sums are float32
    torch.testing.assert_close(dx, wanted[0])
    torch.testing.assert_close(grads.b.double(), wanted[2], **near)
    torch.testing.assert_close(grads.a.double(), wanted_a, **near)
    if to_t:
        assert grads.t is not None
        torch.testing.assert_close(grads.t.double(), wanted[1], **near)
    else:
        assert grads.t is None


# When a branch computes LoRA gradients in the backward of an activation.


class Decoder:
    """A branch of d = 6; `ranks` and `next_rank` are those of the LoRA before and after the activation."""

    def __init__(
        self, activation: str, *, ranks: tuple[int, ...], next_rank: int = 2, dropout: float = 0, bias: str = ""
    ) -> None:
        torch.manual_seed(0)
        mixers: dict[str, tuple[Mixer, ...]] = {
            "gelu": (Attention(2, 2, 4, ROTATE_INTERLEAVED), Gelu(10)), "swiglu": (Swiglu(10),),
            "geglu": (Geglu(10),),
        }  # fmt: skip
        self.mixers = mixers[activation]
        groups = [24, 10] if activation == "gelu" else [10, 10]
        inner, start = [], 0
        for span, rank in zip(groups, ranks, strict=True):
            if rank:
                inner.append(LoraSlice(start, start + span, parameter(rank, 6), parameter(span, rank), 2.0))
            start += span
        bias_of = {"": None, "frozen": torch.randn(start), "trained": parameter(start)}[bias]
        first = LinearSpec(start, 6, filling(start, 6), bias_of, 0, tuple(inner))
        outer = []
        for mixer in self.mixers:
            lora = (
                (LoraSlice(0, 6, parameter(next_rank, mixer.outputs), parameter(6, next_rank), 0.5),)
                if next_rank
                else ()
            )
            outer.append(LinearSpec(6, mixer.outputs, filling(6, mixer.outputs), None, 0, lora, dropout))
        self.made = Branch(
            NormSpec(torch.ones(6), None, 1e-5), FusedLinear((first,)), self.mixers, FusedLinear(tuple(outer))
        )

    def gradients(self) -> list[Tensor]:
        torch.manual_seed(1)
        x = torch.randn(1, 5, 6).requires_grad_()
        y = branch(x, self.made, ForwardContext(1, 5, rotary_table(torch.arange(5)[None], torch.ones(2))))
        trained = [tensor for tensor in (*self.made.inner.trained, *self.made.outer.trained) if tensor.requires_grad]
        return list(torch.autograd.grad(y.square().sum(), [x, *trained]))


def parameter(*shape: int) -> Tensor:
    return torch.randn(*shape).requires_grad_()


def filling(*shape: int) -> Callable[[Tensor], None]:
    weight = torch.randn(*shape)

    def fill(out: Tensor) -> None:
        out.copy_(weight)

    return fill


@pytest.mark.parametrize(
    ("activation", "case", "expected"),
    [
        ("gelu", {"ranks": (3, 2)}, True),
        ("gelu", {"ranks": (0, 2), "bias": "frozen"}, True),
        ("gelu", {"ranks": (3, 0)}, False),
        ("gelu", {"ranks": (3, 2), "next_rank": 0}, False),
        ("gelu", {"ranks": (3, 2), "bias": "trained"}, False),
        ("gelu", {"ranks": (3, 2), "dropout": 0.4}, False),
        ("swiglu", {"ranks": (2, 2)}, True),
        ("swiglu", {"ranks": (2, 3)}, False),
        ("swiglu", {"ranks": (0, 2)}, False),
        ("swiglu", {"ranks": (2, 0)}, False),
        ("geglu", {"ranks": (2, 2)}, True),
        ("geglu", {"ranks": (2, 3)}, False),
    ],
)
def test_lora_gradients_are_computed_in_the_pass_if_layers_before_and_after_have_lora(
    activation: str, case: dict[str, Any], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In either case the gradients are the same."""
    calls: list[LoraOperands] = []
    real = getattr(mixers, f"{activation}_lora_backward_")

    def recorded(x: Tensor, dy: Tensor, operands: LoraOperands, **named: Any) -> LoraGrads:
        calls.append(operands)
        grads: LoraGrads = real(x, dy, operands, **named)
        return grads

    monkeypatch.setattr(mixers, f"{activation}_lora_backward_", recorded)
    grads = Decoder(activation, **case).gradients()
    assert len(calls) == expected
    monkeypatch.setattr(lora_operands, "_in_front", lambda *_: None)
    for one, other in zip(grads, Decoder(activation, **case).gradients(), strict=True):
        torch.testing.assert_close(one, other)
    assert len(calls) == expected
