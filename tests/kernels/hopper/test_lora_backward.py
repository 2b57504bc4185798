"""The backward of an activation with LoRA gradients, compiled for a Hopper GPU that is not here.

Gluon's names change with Triton's versions.

Its results are compared with those of separate kernels on a GPU (tests/gpu/test_lora_backward.py).
"""

from __future__ import annotations

import pytest
from tests.forks import Forks

# Prints the shared memory of a program in bytes, and the number of different matmul instructions.
COMPILED = """
import re
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import compile
from triton.experimental.gluon._runtime import GluonASTSource
from octavo.kernels.hopper import lora_backward
from octavo.kernels.lora_tiles import ROWS, hopper_tile
from octavo.ops.lora_backward import LoraOperands

x, dy, t = (torch.empty(64, n, dtype=torch.bfloat16, device="meta") for n in ({parts} * 512, 512, {parts} * {rank}))
columns, stages = hopper_tile(x, dy, LoraOperands(t, None, t[:, :{rank}]))
names = [p.name for p in lora_backward._lora_backward.params]
constants = {{"PARTS": {parts}, "FUNCTION": "{function}", "TO_T": True, "STAGES": stages}}
wide = dict.fromkeys(["x", "x_up", "dy"], (ROWS, columns, lora_backward.WIDE))
thin = dict.fromkeys(["t", "t_up", "after"], (ROWS, {rank}, lora_backward.rank_layout({rank})))
thin |= dict.fromkeys(["b", "b_up"], (columns, {rank}, lora_backward.rank_layout({rank})))
signature = dict.fromkeys(names, "i32")
signature |= {{name: f"tensordesc<bf16[{{h}}, {{w}}],{{l!r}}>" for name, (h, w, l) in (wide | thin).items()}}
signature |= dict.fromkeys(["sum_t", "sum_b", "sum_a"], "*fp32") | dict.fromkeys(constants, "constexpr")
source = GluonASTSource(lora_backward._lora_backward, signature, {{(names.index(n),): v for n, v in constants.items()}})
made = compile(source, target=GPUTarget("cuda", 90, 32), options={{"num_warps": 8}})
print(made.metadata.shared)
print(len(set(re.findall(r"wgmma\\.mma_async\\S*(m64n\\d+k16\\.f32\\.bf16)", made.asm["ptx"]))))
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("parts", "function", "rank"),
    [(1, "gelu", 16), (2, "silu", 16), (1, "gelu", 64), (2, "gelu", 16), (1, "gelu_erf", 16)],
)
def test_it_compiles_for_a_hopper_and_fits_into_its_shared_memory(
    parts: int, function: str, rank: int, forks: Forks
) -> None:
    """If the choice of its tile counts too few bytes, it cannot be launched."""
    ran = forks.run(COMPILED.format(parts=parts, function=function, rank=rank))
    out, err = ran.communicate()
    assert ran.returncode == 0, err[-2000:]
    shared, kinds = map(int, out.split())
    assert shared <= 227 * 1024
    assert kinds == 2  # the sums of B and of A are as wide as the rank, two groups share the gradient to t
