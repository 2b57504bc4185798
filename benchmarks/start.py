"""What comes before a run's first step, on a CPU: `python benchmarks/start.py [--tokens 3000000] [--times 3]`.

Seconds, the best of some times: SmolLM2 opened (it is converted before, if it has to be), loaded in float32 and in 8
bits, and documents of 2 to 400 tokens packed into rows of 512.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from time import perf_counter

import numpy as np
import torch

from octavo.data.packing import pack
from octavo.data.tokens import Tokens
from octavo.ops.quantize import scheme_named
from octavo.reporting import Report
from octavo.store.builtin import open_smollm2
from octavo.store.weights import load

MEAN_LENGTH = 200.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=3_000_000)
    parser.add_argument("--times", type=int, default=3)
    asked = parser.parse_args()
    open_smollm2(Report())
    documents = drawn(round(asked.tokens / MEAN_LENGTH))
    works: dict[str, Callable[[], object]] = {
        "open": lambda: open_smollm2().config,
        "load, float32": lambda: loaded("none"),
        "load, int8": lambda: loaded("int8"),
        f"pack {sum(len(one.ids) for one in documents):,} tokens": lambda: pack(documents, seq_len=512, pad_id=0),
    }
    for name, work in works.items():
        sys.stdout.write(f"{name:24} {best_of(asked.times, work):7.3f} s\n")


def loaded(scheme: str) -> object:
    return load(open_smollm2(), scheme_named(scheme), dtype=torch.float32, device=torch.device("cpu"))


def drawn(count: int) -> list[Tokens]:
    """Documents of 2 to 400 random tokens."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(2, 400, size=count)
    return [
        Tokens("drawn", line, draw.integers(0, 50_000, n, dtype=np.int32), np.ones(n, dtype=np.bool_), int(n))
        for line, n in enumerate(lengths)
    ]


def best_of(times: int, work: Callable[[], object]) -> float:
    """The time that the work takes, not the machine's other work."""
    spent = []
    for _ in range(times):
        began = perf_counter()
        work()
        spent.append(perf_counter() - began)
    return min(spent)


if __name__ == "__main__":
    main()
