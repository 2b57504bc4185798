"""The fused forms of blocks: residual branches with a hand-written backward (fused/branch.py).

Each is the same function as the block's `forward`. To give a family one: a function here and a line in FUSED.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from octavo.fused.attention import Attention
from octavo.fused.branch import residual_branch
from octavo.fused.mixers import Gelu, Swiglu
from octavo.layers.context import ForwardContext
from octavo.models import gptj, llama
from octavo.ops.rotary import ROTATE_HALF, ROTATE_INTERLEAVED


def _gptj(block: gptj.Block, x: Tensor, ctx: ForwardContext) -> Tensor:
    attention = Attention(block.heads, block.heads, block.head_size, ROTATE_INTERLEAVED)
    mixers, outer = (attention, Gelu(block.mlp_width)), (block.out_proj, block.fc_out)
    return residual_branch(x, block.norm, block.in_proj, mixers, outer, ctx)


def _llama(block: llama.Block, x: Tensor, ctx: ForwardContext) -> Tensor:
    attention = Attention(block.heads, block.key_value_heads, block.head_size, ROTATE_HALF)
    x = residual_branch(x, block.norm_1, block.qkv, (attention,), (block.out,), ctx)
    return residual_branch(x, block.norm_2, block.gate_up, (Swiglu(block.mlp_width),), (block.down,), ctx)


FUSED: dict[type[nn.Module], Callable[[Any, Tensor, ForwardContext], Tensor]] = {gptj.Block: _gptj, llama.Block: _llama}
