"""In-place kernels, compiled for a GPU that is not here."""

from __future__ import annotations

import pytest
from tests.forks import Forks

# Prints, for every choice of row pitches that are multiples of 16 or not, the loads (l), barriers (b) and stores (s) of
# global memory in the order of the program. A pitch decides which thread has which elements.
COMPILED = """
import re
from itertools import product
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from octavo.kernels import pointwise

kernel = getattr(pointwise, "{kernel}")
names, constants = [p.name for p in kernel.params], {{"WIDTH": pointwise.WIDTH, **{constants}}}
for even in product([False, True], repeat=2):
    signature = {{"x": "*bf16", "dy": "*bf16", "f": "i32", "x_stride": "i32", "dy_stride": "i32"}}
    signature |= dict.fromkeys(constants, "constexpr")
    divisible = ["x", "dy", "f", *(n for n, is_even in zip(["x_stride", "dy_stride"], even) if is_even)]
    attrs = {{(names.index(n),): [["tt.divisibility", 16]] for n in divisible}}
    source = ASTSource(kernel, signature, {{(names.index(name),): value for name, value in constants.items()}}, attrs)
    text = compile(source, target=GPUTarget("cuda", 90, 32), options={{"num_warps": 8}}).asm["ptx"]
    found = re.findall(r"(ld\\.global|bar\\.sync|st\\.global)", text)
    print("".join({{"ld.global": "l", "bar.sync": "b", "st.global": "s"}}[each] for each in found))
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("kernel", "constants"),
    [
        ("_gelu_backward", {"FUNCTION": "gelu"}),
        ("_gelu_backward", {"FUNCTION": "gelu_erf"}),
        ("_gated_backward", {"FUNCTION": "silu"}),
        ("_gated_backward", {"FUNCTION": "gelu"}),
    ],
    ids=["gelu", "gelu with erf", "swiglu", "geglu"],
)
def test_nothing_is_stored_before_everything_is_loaded(kernel: str, constants: dict[str, object], forks: Forks) -> None:
    """A thread may store to an address that another one loads: with two kinds of pitches an H100 lost gradients."""
    ran = forks.run(COMPILED.format(kernel=kernel, constants=constants))
    out, err = ran.communicate()
    assert ran.returncode == 0, err[-2000:]
    orders = out.split()
    assert len(orders) == 4
    for order in orders:
        assert "s" in order
        before_the_first_store = order[: order.index("s")]
        assert "l" not in order[order.index("s") :]
        assert before_the_first_store.rindex("b") > before_the_first_store.rindex("l")
