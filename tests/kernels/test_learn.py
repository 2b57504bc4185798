"""The pass in which pairs learn, compiled for a Hopper that is not here: Gluon's names change with Triton's versions.

Its results are compared with those of its steps on a card (tests/gpu/test_learn.py).
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Prints shared memory and registers that were put aside, in bytes, and the stores, barriers and multiplications of the
# loop over tiles in the order of the program: what is written over a tile has to be there before it is multiplied.
COMPILED = """
import re
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import compile
from triton.experimental.gluon._runtime import GluonASTSource
from octavo.kernels import learn
from octavo.ops.learn import ROWS, Sides, one_pass

x, dy, t = (torch.empty(64, n, dtype=torch.bfloat16, device="meta") for n in ({parts} * 512, 512, {parts} * {rank}))
columns, stages = one_pass(x, dy, Sides(t, None, t[:, :{rank}]))
names = [p.name for p in learn._learn.params]
constants = {{"PARTS": {parts}, "TO_T": True, "STAGES": stages}}
wide = dict.fromkeys(["x", "x_up", "dy"], (ROWS, columns, learn.WIDE))
thin = dict.fromkeys(["t", "t_up", "after"], (ROWS, {rank}, learn.thin({rank})))
thin |= dict.fromkeys(["b", "b_up"], (columns, {rank}, learn.thin({rank})))
signature = dict.fromkeys(names, "i32")
signature |= {{name: f"tensordesc<bf16[{{h}}, {{w}}],{{l!r}}>" for name, (h, w, l) in (wide | thin).items()}}
signature |= dict.fromkeys(["sum_t", "sum_b", "sum_a"], "*fp32") | dict.fromkeys(constants, "constexpr")
source = GluonASTSource(learn._learn, signature, {{(names.index(n),): v for n, v in constants.items()}})
made = compile(source, target=GPUTarget("cuda", 90, 32), options={{"num_warps": 8}})
print(made.metadata.shared)
told = re.findall(r"(st\\.shared\\.v4|bar\\.sync|fence\\.proxy\\.async|wgmma\\.mma_async)", made.asm["ptx"])
print("".join({{"st.": "s", "bar": "b", "fen": "f", "wgm": "m"}}[each[:3]] for each in told))
"""


@pytest.mark.parametrize(("parts", "rank"), [(1, 16), (2, 16), (1, 64)])
def test_it_compiles_for_a_hopper_and_what_is_written_is_there_when_it_is_multiplied(parts: int, rank: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", COMPILED.format(parts=parts, rank=rank)], env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    shared, order = ran.stdout.split()
    assert int(shared) <= 227 * 1024
    last_store, first_product = order.rindex("s"), order.index("m")
    assert last_store < first_product
    # A fence between the threads' stores and the tensor cores' reading, and a barrier behind it: all have passed it.
    between = order[last_store:first_product]
    assert "f" in between
    assert "b" in between[between.index("f") :]
