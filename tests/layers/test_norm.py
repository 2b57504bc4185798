"""The norms against PyTorch's."""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from octavo.layers.norm import GemmaRmsNorm, LayerNorm, RmsNorm

WIDTH = 40


def test_norms_are_torchs_in_float32_and_take_their_weights_in_the_type_of_x() -> None:
    x = torch.randn(3, WIDTH)
    layer, rms = LayerNorm(WIDTH, 1e-5), RmsNorm(WIDTH, 1e-5)
    for parameter in (*layer.parameters(), *rms.parameters()):
        nn.init.normal_(parameter, mean=1, std=0.3)
    for own, theirs in ((layer, nn.LayerNorm(WIDTH, 1e-5)), (rms, nn.RMSNorm(WIDTH, 1e-5))):
        theirs.load_state_dict(own.state_dict())
        torch.testing.assert_close(own(x), theirs(x))
        short = own(x.bfloat16())
        assert short.dtype == torch.bfloat16
        assert torch.equal(short, theirs.bfloat16()(x.bfloat16()))
        assert {p.dtype for p in own.parameters()} == {torch.float32}


def test_gemmas_norm_is_that_of_transformers() -> None:
    own, theirs = GemmaRmsNorm(WIDTH, 1e-5), Gemma3RMSNorm(WIDTH, 1e-5)
    nn.init.normal_(own.weight, std=0.3)
    theirs.load_state_dict(own.state_dict())
    x = torch.randn(3, WIDTH)
    torch.testing.assert_close(own(x), theirs(x))
    with torch.no_grad():  # in one pass, which rounds once too
        short = own(x.bfloat16())
    assert short.dtype == torch.bfloat16
    assert torch.equal(short, theirs(x.bfloat16()))
    assert torch.equal(short, own(x.bfloat16()))
