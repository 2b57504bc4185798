"""The fused forms of blocks: residual branches with a hand-written backward (fused/branch.py).

Each is the same function as the block's `forward`. To give a family one: a function here and a line in FUSED. The table
is by the type of a block alone: a family is in it if all that its config.json may ask for has a fused form. A block of
another type, also one derived from a type in the table, runs as plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from octavo.fused.attention import Attention
from octavo.fused.branch import residual_branch
from octavo.fused.mixers import Geglu, Gelu, Swiglu
from octavo.layers.context import ForwardContext
from octavo.layers.norm import RmsNorm
from octavo.models import gemma2, gemma3, gpt2, gpt_neo, gpt_neox, gptj, granite, llama, olmo2, phi3, qwen3
from octavo.ops.rotary import ROTATE_HALF, ROTATE_INTERLEAVED


def _gptj(block: gptj.Block, x: Tensor, ctx: ForwardContext) -> Tensor:
    attention = Attention(block.heads, block.heads, block.head_size, ROTATE_INTERLEAVED)
    mixers, outer = (attention, Gelu(block.mlp_width)), (block.out_proj, block.fc_out)
    return residual_branch(x, block.norm, block.in_proj, mixers, outer, ctx)


def _gpt_neo(block: gpt_neo.Block, x: Tensor, ctx: ForwardContext) -> Tensor:
    attention = Attention(block.heads, block.heads, block.head_size, ROTATE_HALF)  # its layers have no rotary positions
    mlp = (Gelu(block.mlp_width, block.gelu_form),)
    x = residual_branch(x, block.norm_1, block.qkv, (attention,), (block.out,), ctx)
    return residual_branch(x, block.norm_2, block.fc_in, mlp, (block.fc_out,), ctx)


def _gpt_neox(block: gpt_neox.Block, x: Tensor, ctx: ForwardContext) -> Tensor:
    attention = Attention(block.heads, block.heads, block.head_size, ROTATE_HALF)
    h = residual_branch(x, block.norm_1, block.qkv, (attention,), (block.dense,), ctx)
    mlp = block.norm_2, block.fc_in, (Gelu(block.mlp_width, block.gelu_form),), (block.fc_out,), ctx
    return residual_branch(x, *mlp, residual=h) if block.parallel else residual_branch(h, *mlp)


def _llama(block: llama.Block, x: Tensor, ctx: ForwardContext) -> Tensor:
    x = residual_branch(x, block.norm_1, block.qkv, (_attention(block),), (block.out,), ctx)
    return residual_branch(x, block.norm_2, block.gate_up, (Swiglu(block.mlp_width),), (block.down,), ctx)


def _granite(block: granite.Block, x: Tensor, ctx: ForwardContext) -> Tensor:
    mlp, scale = (Swiglu(block.mlp_width),), block.residual_scale
    x = residual_branch(x, block.norm_1, block.qkv, (_attention(block),), (block.out,), ctx, scale=scale)
    return residual_branch(x, block.norm_2, block.gate_up, mlp, (block.down,), ctx, scale=scale)


def _qwen3(block: qwen3.Block, x: Tensor, ctx: ForwardContext) -> Tensor:
    attention = _attention(block, block.q_norm, block.k_norm)
    x = residual_branch(x, block.norm_1, block.qkv, (attention,), (block.out,), ctx)
    return residual_branch(x, block.norm_2, block.gate_up, (Swiglu(block.mlp_width),), (block.down,), ctx)


def _olmo2(block: olmo2.Block, x: Tensor, ctx: ForwardContext) -> Tensor:
    attention, mlp = _attention(block, block.q_norm, block.k_norm), Swiglu(block.mlp_width)
    x = residual_branch(x, None, block.qkv, (attention,), (block.out,), ctx, post_norm=block.norm_1)
    return residual_branch(x, None, block.gate_up, (mlp,), (block.down,), ctx, post_norm=block.norm_2)


def _gemma2(block: gemma2.Block, x: Tensor, ctx: ForwardContext) -> Tensor:
    return _gemma(block, _attention(block), x, ctx)


def _gemma3(block: gemma3.Block, x: Tensor, ctx: ForwardContext) -> Tensor:
    return _gemma(block, _attention(block, block.q_norm, block.k_norm), x, ctx)


def _gemma(block: gemma2.Block, attention: Attention, x: Tensor, ctx: ForwardContext) -> Tensor:
    mlp = (Geglu(block.mlp_width),)
    x = residual_branch(x, block.norm_1, block.qkv, (attention,), (block.out,), ctx, post_norm=block.norm_2)
    return residual_branch(x, block.norm_3, block.gate_up, mlp, (block.down,), ctx, post_norm=block.norm_4)


def _attention(block: llama.Block, *norms: RmsNorm) -> Attention:
    """The attention of a Llama's block, with norms of q and of k if given."""
    specs = (norms[0].spec(), norms[1].spec()) if norms else None
    return Attention(block.heads, block.key_value_heads, block.head_size, ROTATE_HALF, specs)


FUSED: dict[type[nn.Module], Callable[[Any, Tensor, ForwardContext], Tensor]] = {
    gemma2.Block: _gemma2,
    gemma3.Block: _gemma3,
    gptj.Block: _gptj,
    gpt2.Block: _gpt_neo,
    gpt_neo.Block: _gpt_neo,
    gpt_neox.Block: _gpt_neox,
    llama.Block: _llama,
    phi3.Block: _llama,
    granite.Block: _granite,
    qwen3.Block: _qwen3,
    olmo2.Block: _olmo2,
}
