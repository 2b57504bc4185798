"""In-place kernels, also those of rotary.py, compiled for a GPU that is not here."""

from __future__ import annotations

import pytest
from tests.forks import Forks

from octavo.kernels.pointwise import WIDTH

# Prints, for every choice of row pitches that are multiples of 16 or not, the loads (l), barriers (b) and stores (s) of
# global memory in the order of the program. A pitch decides which thread has which elements. A result `out` is over x.
COMPILED = """
import re
from itertools import product
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from octavo.kernels import {module}

kernel, constants = getattr({module}, "{kernel}"), {constants}
names, types = [p.name for p in kernel.params], dict.fromkeys(("x", "dy", "out"), "*bf16")
types |= dict.fromkeys(("weight", "cos", "sin"), "*fp32") | {{"eps": "fp32"}} | dict.fromkeys(constants, "constexpr")
for even in product([False, True], repeat=2):
    signature = {{name: types.get(name, "i32") for name in names}}
    pitches = dict(zip(["x_stride", "dy_stride", "out_stride"], [*even, even[0]]))
    divisible = [n for n in names if signature[n] not in ("constexpr", "fp32") and pitches.get(n, True)]
    attrs = {{(names.index(n),): [["tt.divisibility", 16]] for n in divisible}}
    source = ASTSource(kernel, signature, {{(names.index(name),): value for name, value in constants.items()}}, attrs)
    text = compile(source, target=GPUTarget("cuda", 90, 32), options={{"num_warps": 8}}).asm["ptx"]
    found = re.findall(r"(ld\\.global|bar\\.sync|st\\.global)", text)
    print("".join({{"ld.global": "l", "bar.sync": "b", "st.global": "s"}}[each] for each in found))
"""

ROTATION = {"INTERLEAVED": False, "ZERO_CENTRED_WEIGHT": True}


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("kernel", "constants"),
    [
        ("pointwise._gelu_backward", {"FUNCTION": "gelu", "WIDTH": WIDTH}),
        ("pointwise._gelu_backward", {"FUNCTION": "gelu_erf", "WIDTH": WIDTH}),
        ("pointwise._gated_backward", {"FUNCTION": "silu", "WIDTH": WIDTH}),
        ("pointwise._gated_backward", {"FUNCTION": "gelu", "WIDTH": WIDTH}),
        ("rotary._norm_rotate_backward", {**ROTATION, "HEADS": 8, "PAIRS": 128, "OF_ALL": False}),
        ("rotary._norm_rotate_backward", {**ROTATION, "HEADS": 32, "PAIRS": 64, "OF_ALL": True}),
    ],
    ids=["gelu", "gelu with erf", "swiglu", "geglu", "norm of heads and rotation", "norm of all heads and rotation"],
)
def test_nothing_is_stored_before_everything_is_loaded(kernel: str, constants: dict[str, object], forks: Forks) -> None:
    """A thread may store to an address that another one loads: with two kinds of pitches an H100 lost gradients."""
    module, _, name = kernel.partition(".")
    ran = forks.run(COMPILED.format(module=module, kernel=name, constants=constants))
    out, err = ran.communicate()
    assert ran.returncode == 0, err[-2000:]
    orders = out.split()
    assert len(orders) == 4
    for order in orders:
        assert "s" in order
        before_the_first_store = order[: order.index("s")]
        assert "l" not in order[order.index("s") :]
        assert before_the_first_store.rindex("b") > before_the_first_store.rindex("l")
