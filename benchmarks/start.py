"""Measures the start of a run on a CPU: `python benchmarks/start.py [--tokens 3000000] [--repetitions 3]`.

Prints seconds, the minimum over the repetitions: opening SmolLM2 (after its conversion), loading it in float32 and in
int8, and packing documents of 2 to 400 tokens into rows of 512.
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
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    open_smollm2(Report())
    documents = random_documents(round(args.tokens / MEAN_LENGTH))
    count = sum(len(document.ids) for document in documents)
    tasks: dict[str, Callable[[], object]] = {
        "open": lambda: open_smollm2().config,
        "load, float32": lambda: loaded("none"),
        "load, int8": lambda: loaded("int8"),
        f"pack {count:,} tokens": lambda: pack(documents, seq_len=512, pad_id=0),
    }
    for name, task in tasks.items():
        sys.stdout.write(f"{name:24} {best_of(args.repetitions, task):7.3f} s\n")


def loaded(scheme: str) -> object:
    return load(open_smollm2(), scheme_named(scheme), dtype=torch.float32, device=torch.device("cpu"))


def random_documents(count: int) -> list[Tokens]:
    """Documents of 2 to 400 random tokens."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(2, 400, size=count)
    return [
        Tokens("random", line, generator.integers(0, 50_000, n, dtype=np.int32), np.ones(n, dtype=np.bool_), int(n))
        for line, n in enumerate(lengths)
    ]


def best_of(repetitions: int, task: Callable[[], object]) -> float:
    """The minimum time of a task: other processes only add time."""
    times = []
    for _ in range(repetitions):
        began = perf_counter()
        task()
        times.append(perf_counter() - began)
    return min(times)


if __name__ == "__main__":
    main()
