"""Dropout on the input of LoRA: masks that forward and backward make again from a seed instead of keeping them.

A mask is made up to three times in a pass: for the LoRA activations, for the gradient to the input and for the gradient
of A. Each time a generator with the same seed draws it. A pass takes its seeds, in the order of its layers, from
one generator on the CPU, whose seed before a micro-batch fixes all of its masks. Training has a generator of its own:
runs in several threads of a process do not change each other's masks.

A CUDA graph reads the seed of a generator from device memory at each replay, if the generator was registered with it.
`GraphDropout` therefore keeps one registered generator for each use of a mask, and gives all uses of one mask the same
new seed before a replay: a replay draws the same masks as an eager pass with the same seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from octavo.runtime.capture import register

Seed = Callable[[torch.device], torch.Generator]  # of one mask: a generator on the device, the same at every call


class Dropout:
    """Gives each mask of an eager pass its seed, drawn from `generator`; None: PyTorch's default one on the CPU."""

    generator: torch.Generator | None = None

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator

    def seed(self) -> Seed:
        """The seed of the next mask."""
        return partial(_generator, _draw(self.generator))


class CountingDropout(Dropout):
    """Eager; counts the generators that a pass uses, before it is captured. Draws from no other generator."""

    def __init__(self) -> None:
        super().__init__(torch.Generator())
        self.count = 0

    def seed(self) -> Seed:
        made = super().seed()

        def counted(device: torch.device) -> torch.Generator:
            self.count += 1
            return made(device)

        return counted


@dataclass
class RepeatedDropout(Dropout):
    """Gives the seeds of `source` and keeps them; `again` gives the same ones, for a block that is recomputed."""

    source: Dropout
    seeds: list[Seed] = field(default_factory=list)

    def seed(self) -> Seed:
        self.seeds.append(self.source.seed())
        return self.seeds[-1]

    def again(self) -> Dropout:
        """The same seeds, in the same order."""
        return _Repeating(iter(self.seeds).__next__)


@dataclass
class _Repeating(Dropout):
    next_seed: Callable[[], Seed]

    def seed(self) -> Seed:
        return self.next_seed()


class GraphDropout(Dropout):
    """Registered generators of one CUDA graph: `count` of them, made before the capture."""

    def __init__(self, graph: torch.cuda.CUDAGraph, count: int, device: torch.device) -> None:
        self._unused = [torch.Generator(device) for _ in range(count)]
        self._masks: list[list[torch.Generator]] = []  # the generators of each mask, in the order of the seeds
        register(graph, self._unused, device)

    def seed(self) -> Seed:
        uses: list[torch.Generator] = []
        self._masks.append(uses)

        def registered(device: torch.device) -> torch.Generator:
            uses.append(self._unused.pop())
            return uses[-1]

        return registered

    def reseed(self, generator: torch.Generator | None = None) -> None:
        """New seeds for the next replay, drawn as an eager pass draws them from `generator`."""
        for uses in self._masks:
            seed = _draw(generator)
            for registered in uses:
                registered.manual_seed(seed)


def mask(x: Tensor, dropout: float, seed: Seed | None) -> Tensor:
    """Of the shape of x: 0 with probability `dropout`, else 1 / (1 - dropout)."""
    assert seed is not None, "a linear with dropout has a seed"
    generator = None if x.is_meta else seed(x.device)
    kept = 1 - dropout
    return x.new_empty(x.shape).bernoulli_(kept, generator=generator).div_(kept)


def _draw(generator: torch.Generator | None) -> int:
    return int(torch.randint(2**62, (), generator=generator))


def _generator(seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)
