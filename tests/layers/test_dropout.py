"""Seeds of dropout masks: a replay of a CUDA graph draws the masks of an eager pass, and a recomputed block its own."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from octavo.layers.dropout import CountingDropout, Dropout, GraphDropout, RepeatedDropout, Seed, mask

CPU, X = torch.device("cpu"), torch.empty(64)


class Graph:
    """Stands for a CUDA graph: it takes the generators that are registered with it."""

    def __init__(self) -> None:
        self.registered: list[torch.Generator] = []

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.registered.append(generator)


def masks(seeds: list[Seed]) -> list[Tensor]:
    """Each mask twice, as forward and backward use it."""
    return [mask(X, 0.5, seed) for seed in seeds for _ in range(2)]


def eager(seed: int, count: int = 3) -> list[Tensor]:
    dropout = Dropout(torch.Generator().manual_seed(seed))
    return masks([dropout.seed() for _ in range(count)])


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def test_a_mask_is_the_same_at_every_use_and_another_one_for_each_seed() -> None:
    drawn = eager(7)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert set(drawn[0].unique().tolist()) == {0.0, 2.0}
    assert not equal(drawn, eager(8))


def test_a_replay_draws_the_masks_of_an_eager_pass_with_the_same_generator() -> None:
    counting = CountingDropout()
    masks([counting.seed() for _ in range(3)])
    graph = Graph()
    dropout = GraphDropout(cast(Any, graph), counting.count, CPU)
    assert len(graph.registered) == counting.count == 6
    uses = [(seed := dropout.seed(), [seed(CPU), seed(CPU)])[1] for _ in range(3)]
    for run in (7, 8):
        dropout.reseed(torch.Generator().manual_seed(run))
        replayed = [X.new_empty(X.shape).bernoulli_(0.5, generator=g).div_(0.5) for group in uses for g in group]
        assert equal(replayed, eager(run))


def test_a_recomputed_block_draws_its_masks_again() -> None:
    repeated = RepeatedDropout(Dropout(torch.Generator().manual_seed(7)))
    first = masks([repeated.seed() for _ in range(3)])
    again = repeated.again()
    assert equal(masks([again.seed() for _ in range(3)]), first)


def test_counting_draws_nothing_from_the_default_generator() -> None:
    before = torch.get_rng_state()
    CountingDropout().seed()
    assert torch.equal(torch.get_rng_state(), before)
