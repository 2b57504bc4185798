"""Measures soft-capped attention on a GPU: `python benchmarks/softcap.py [--sweep]`.

Prints milliseconds of forward and backward, the median of 20 runs measured with CUDA events: octavo's kernels, their
reference in plain PyTorch, and PyTorch's fused attention without the cap, an upper bound of the speed. The default
shape is that of Gemma 2 9B. `--sweep` compiles and measures other tiles for each of the passes and prints the
fastest last; a tile that does not fit the GPU is reported.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.kernels import softcap as kernels
from octavo.kernels.softcap_tiles import Tile, Tiles
from octavo.ops.attention import AttentionSpec, Documents, causal_attention, find_documents
from octavo.runtime.dispatch import Backends, set_backends
from timing import milliseconds

CAP = 50.0
# (queries, keys, warps, stages) of a program, to be measured for each pass.
FORWARD = (
    (128, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 3), (128, 64, 4, 2), (128, 128, 8, 1), (128, 64, 8, 1),
    (64, 64, 4, 2), (64, 32, 4, 3), (64, 64, 4, 1), (64, 128, 4, 1),
)  # fmt: skip
DQ = (
    (128, 32, 8, 2), (128, 32, 8, 1), (64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 4, 2), (64, 64, 4, 2), (128, 64, 8, 1),
    (128, 64, 8, 2), (64, 32, 4, 3),
)  # fmt: skip
DKV = (  # in one pass
    (32, 64, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2), (64, 64, 8, 1), (32, 128, 8, 2), (64, 128, 8, 2), (64, 64, 16, 2),
)  # fmt: skip
DK = ((32, 128, 8, 2), (32, 128, 8, 1), (64, 128, 8, 1), (32, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 1))
DV = (
    (64, 128, 8, 2), (32, 128, 8, 2), (32, 128, 8, 3), (64, 128, 8, 1), (64, 64, 4, 2), (32, 64, 4, 3), (128, 64, 4, 1),
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """B sequences, T positions, H query heads, G key/value heads, D the size of a head."""

    batch: int
    length: int
    heads: int
    groups: int
    size: int
    window: int | None
    documents: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 4), ("length", 2048), ("heads", 16), ("groups", 8), ("size", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--window", type=int, help="sliding window; default: none")
    parser.add_argument("--documents", type=int, default=1, help="packed documents in a row, of equal length")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--sweep", action="store_true")
    args = vars(parser.parse_args())
    sweep, dtype = args.pop("sweep"), getattr(torch, args.pop("dtype"))
    shape = Shape(**args)
    if sweep:
        sweep_tiles(shape, dtype)
    compare(shape, dtype)


def inputs(shape: Shape, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Documents | None]:
    """(q, k and v; the gradient of the output; the documents)."""
    torch.manual_seed(0)
    heads = shape.heads, shape.groups, shape.groups
    sizes = [(shape.batch, shape.length, count, shape.size) for count in heads]
    qkv = [torch.randn(size, device="cuda", dtype=dtype, requires_grad=True) for size in sizes]
    numbers = (torch.arange(shape.length) * shape.documents // shape.length).expand(shape.batch, -1).contiguous()
    return qkv, torch.randn(sizes[0], device="cuda", dtype=dtype), find_documents(numbers, torch.device("cuda"))


def compare(shape: Shape, dtype: torch.dtype) -> None:
    """Prints the times of the three implementations and their ratios."""
    (q, k, v), grad, documents = inputs(shape, dtype)
    spec = AttentionSpec(softcap=CAP, window=shape.window)
    plain = AttentionSpec(window=shape.window)
    methods: dict[str, tuple[Backends, Callable[[], Tensor]]] = {
        "kernels": (Backends(), lambda: causal_attention(q, k, v, spec, documents=documents)),
        "reference": (Backends(kernels=False), lambda: causal_attention(q, k, v, spec, documents=documents)),
        "octavo without cap": (Backends(), lambda: causal_attention(q, k, v, plain, documents=documents)),
    }
    if documents is None and shape.window is None:
        methods["SDPA without cap"] = Backends(), partial(uncapped, q, k, v)
    seconds: dict[str, tuple[float, float]] = {}
    for name, (backends, forward) in methods.items():
        set_backends(backends)
        out = forward()
        backward = partial(torch.autograd.grad, out, (q, k, v), grad, retain_graph=True)
        with torch.no_grad():
            ahead = milliseconds(forward)
        seconds[name] = ahead, milliseconds(backward)
        del out
    set_backends(Backends())
    first = seconds["kernels"]
    for name, times in seconds.items():
        ratios = [time / own for time, own in zip((*times, sum(times)), (*first, sum(first)), strict=True)]
        sys.stdout.write(
            f"{name:20} forward {times[0]:8.3f} ms ({ratios[0]:5.2f} of the kernels')  "
            f"backward {times[1]:8.3f} ms ({ratios[1]:5.2f})  both {sum(times):8.3f} ms ({ratios[2]:5.2f})\n"
        )
    # Two matmuls forward, five backward, over half of the square: those that attention needs, not those repeated.
    flops = 2.0 * shape.batch * shape.heads * shape.length**2 * shape.size
    if documents is None and shape.window is None:
        sys.stdout.write(
            f"kernels: forward {flops / first[0] / 1e9:.0f}, backward {2.5 * flops / first[1] / 1e9:.0f} TFLOP/s\n"
        )


def uncapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's fused attention."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D), (B, G, T, D) twice
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def sweep_tiles(shape: Shape, dtype: torch.dtype) -> None:
    """Prints the time of each pass with each tile; the passes of the backward are measured together."""
    (q, k, v), grad, documents = inputs(shape, dtype)
    spec = AttentionSpec(softcap=CAP, window=shape.window)
    usual = kernels._tiles(q)
    assert usual is not None
    best: Tiles = usual
    with torch.no_grad():
        call = partial(causal_attention, q, k, v, spec, documents=documents)
        best = best._replace(forward=fastest("forward", FORWARD, lambda tile: best._replace(forward=tile), call))
    out = causal_attention(q, k, v, spec, documents=documents)
    backward = partial(torch.autograd.grad, out, (q, k, v), grad, retain_graph=True)
    best = best._replace(dq=fastest("dq", DQ, lambda tile: best._replace(dq=tile), backward))
    together = fastest("dk + dv", DKV, lambda tile: best._replace(dk=tile, dv=None), backward)
    dk = fastest("dk", DK, lambda tile: best._replace(dk=tile, dv=best.dv or tile), backward)
    dv = fastest("dv", DV, lambda tile: best._replace(dk=dk, dv=tile), backward)
    choices = best._replace(dk=together, dv=None), best._replace(dk=dk, dv=dv)
    best = min(choices, key=partial(backward_time, backward))
    sys.stdout.write(f"fastest: {best}\n")


def backward_time(backward: Callable[[], object], chosen: Tiles) -> float:
    """Milliseconds of the backward with these tiles."""
    with mock.patch.object(kernels, "tiles_for", return_value=chosen):
        return milliseconds(backward)


def fastest(
    name: str, choices: tuple[tuple[int, int, int, int], ...], with_tile: Callable[[Tile], Tiles],
    run: Callable[[], object],
) -> Tile:  # fmt: skip
    """The tile with the shortest time; the others are printed with theirs, or with the error."""
    times: dict[Tile, float] = {}
    for tile in (Tile(*choice) for choice in choices):
        try:
            with mock.patch.object(kernels, "tiles_for", return_value=with_tile(tile)):
                times[tile] = milliseconds(run)
            sys.stdout.write(f"{name:8} {times[tile]:8.3f} ms {tile}\n")
        except Exception as error:  # of Triton, of several types: not enough shared memory or registers
            sys.stdout.write(f"{name:8}   failed    {tile}: {str(error).strip().splitlines()[0][:100]}\n")
        sys.stdout.flush()
    return min(times, key=lambda tile: times[tile])


if __name__ == "__main__":
    main()
